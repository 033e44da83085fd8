"""Files of other systems, read without executing them, and what they say in a run's YAML here: one module for each system."""
