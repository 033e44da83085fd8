"""Evaluation sets: prompts beside the run's own, rendered with settings of theirs and scored by a judge."""
