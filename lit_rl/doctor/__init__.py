"""Finds problems of a machine or a run, with their remedies, before hours are spent on it: `python -m lit_rl.doctor`."""
