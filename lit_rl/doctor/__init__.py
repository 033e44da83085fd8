"""What is wrong with a machine or a run, and what to do about it, before hours are spent on it: `python -m lit_rl.doctor`."""
