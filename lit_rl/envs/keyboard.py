"""Names of keys: browsers' in small letters, as `lit_rl.envs.actions` has them, to those of the machine that is typed on."""

from __future__ import annotations

from lit_rl.envs.actions import ActionError

NAMED = (
    *("Enter", "Tab", "Escape", "Backspace", "Delete", "Insert", "Home", "End", "PageUp", "PageDown"),
    *("ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight", "Control", "Shift", "Alt", "Meta", "CapsLock"),
    *(f"F{number}" for number in range(1, 13)),
)
BROWSER_KEYS = {name.lower(): name for name in NAMED} | {"space": " ", "return": "Enter", "esc": "Escape", "ctrl": "Control", "cmd": "Meta"}
"""Keys of more than one character, by their names in actions."""

GBOX_KEYS = {name.lower(): name[0].lower() + name[1:] for name in NAMED}
GBOX_KEYS |= {"space": "space", "return": "enter", "esc": "escape", "ctrl": "control", "cmd": "meta"}


def gbox_keys(keys: tuple[str, ...]) -> list[str]:
    """`("control", "a")` as GBox names keys. Raises ActionError for a key that it does not have."""
    for key in keys:
        if key.lower() not in GBOX_KEYS and not (len(key) == 1 and key.isascii() and key.isprintable() and key != " "):
            raise ActionError(f"there is no key {key!r}; keys are single characters and {', '.join(sorted(GBOX_KEYS))}")
    return [GBOX_KEYS.get(key.lower(), key.lower()) for key in keys]


def browser_chord(keys: tuple[str, ...]) -> str:
    """`("control", "a")` -> `Control+a`, as playwright presses them. Raises ActionError for a key that there is not."""
    return "+".join(_browser_key(key) for key in keys)


def _browser_key(key: str) -> str:
    if len(key) == 1 and key.isprintable():
        return key
    if key.lower() not in BROWSER_KEYS:
        raise ActionError(f"there is no key {key!r}; keys are single characters and {', '.join(sorted(BROWSER_KEYS))}")
    return BROWSER_KEYS[key.lower()]
