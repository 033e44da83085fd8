"""Rewards of texts: rules, functions of one's own, reward models."""
