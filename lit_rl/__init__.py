"""Reinforcement-learning post-training of diffusion / flow models, language models and agents on PyTorch Lightning."""
