"""The import path of the platform guide; everything is in `lit_rl`."""
