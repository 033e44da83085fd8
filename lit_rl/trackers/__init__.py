"""Reports of a run to the platform and to Weights & Biases, without torch and Lightning."""
