"""Errors that a person can act on."""

from collections.abc import Sequence

LEFT_BY_ANOTHER = 75
"""Exit code of a process that ended because another one of its run was lost (EX_TEMPFAIL): starting again may help."""


class ConfigError(ValueError):
    """A request cannot be met as it stands; the message says what there is and which knob to turn. The CLI prints just that sentence."""


def listed(items: Sequence[str], *, shown: int = 5) -> str:
    """The first few names for an error message, and how many more there are."""
    rest = len(items) - shown
    return ", ".join(items[:shown]) + (f" and {rest} more" if rest > 0 else "")
