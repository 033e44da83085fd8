"""The demos: miniature models learn to write numbers from the answers of an OCR server. `python -m lit_rl.demo` runs them."""
