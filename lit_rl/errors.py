"""Errors that a person can act on."""


class ConfigError(ValueError):
    """What was asked cannot be done as asked; the message says what there is and which knob to turn. The CLI prints just that sentence."""
