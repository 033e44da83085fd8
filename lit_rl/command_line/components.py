"""The second half of a method's help page: the classes that may stand under its options, each with its own options."""

from __future__ import annotations

import inspect
import pkgutil
import re
import sys
import textwrap
import typing
from argparse import Action
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from importlib import import_module
from itertools import pairwise

from lit_rl.command_line.class_change import definer
from lit_rl.command_line.dotted import imported

WIDTH = 140
TITLE = "components: classes that may stand under these options, {class_path: PATH, init_args: {...}}, with their own options and defaults"


def asked_class(argv: Sequence[str]) -> type | None:
    """The method after `--model.help`."""
    words = [word.removeprefix("--model.help=") for word in argv if word.startswith("--model.help=")]
    words += [value for flag, value in pairwise(argv) if flag == "--model.help"]
    found = imported(words[-1]) if words else None
    return found if inspect.isclass(found) else None


def components_page(method: type) -> str:
    """A section for each option of `method` that takes a class of this project, or of the method's own package."""
    lines = [TITLE]
    for option, base in sections(method):
        own = getattr(method, "defines", {}).get(option)
        lines += ["", f"--model.{option}: {base.__name__}{', by its options alone, without class_path' if written_out(base) else ''}"]
        for cls in choices(base):
            if not written_out(base):
                lines += [f"  {cls.__module__}.{cls.__qualname__}{' (default)' if cls is own else ''}"]
            lines += textwrap.wrap(_first_line(cls), WIDTH, initial_indent="    ", subsequent_indent="    ")
            for name, value, text in _options(cls):
                lines += textwrap.wrap(f"{name}: {value}  {text}".rstrip(), WIDTH, initial_indent="      ", subsequent_indent=" " * 10)
    return "\n".join(lines)


def sections(cls: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Option and class of the components of `cls`, and of the components that these have."""
    for name, base in components(cls).items():
        yield f"{prefix}{name}", base
        if written_out(base):
            yield from sections(base, f"{prefix}{name}.")


def components(cls: type) -> dict[str, type]:
    """The class of each option of `cls` that takes one of this project, or of the package of `cls`."""
    found = {}
    for owner in dict.fromkeys(definer(cls, name) for name in _names(cls)):
        for name, hint in typing.get_type_hints(owner.__init__).items():
            kinds = [kind for kind in (hint, *typing.get_args(hint)) if inspect.isclass(kind) and _ours(kind, cls)]
            if name != "return" and definer(cls, name) is owner and kinds and choices(kinds[0]):
                found[name] = kinds[0]
    return found


def written_out(base: type) -> bool:
    """True if a run writes the options of `base` without naming a class, because nothing else may stand there."""
    return (is_dataclass(base) and not type.__subclasses__(base)) or bool(getattr(base, "__final__", False))


def choices(base: type) -> list[type]:
    """The classes that can be built in the place of `base`, of all files of its folder, by dotted path."""
    package = base.__module__.rpartition(".")[0]
    for module in pkgutil.walk_packages(getattr(sys.modules.get(package), "__path__", ()), f"{package}."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    return sorted({cls for cls in _family(base) if _buildable(cls)}, key=lambda cls: (cls.__module__, cls.__qualname__))


def _buildable(cls: type) -> bool:
    return not (inspect.isabstract(cls) or getattr(cls, "_is_protocol", False) or cls.__name__.startswith("_"))


def _family(base: type) -> Iterator[type]:
    yield base
    derived: list[type] = type.__subclasses__(base)
    for cls in derived:
        yield from _family(cls)


def _names(cls: type) -> list[str]:
    signatures = [inspect.signature(owner.__init__).parameters for owner in inspect.getmro(cls) if "__init__" in vars(owner)]
    return [name for parameters in signatures for name in parameters if name != "self" and definer(cls, name) is not None]


def _ours(kind: type, method: type) -> bool:
    return kind.__module__.split(".")[0] in {"lit_rl", "callbacks", "datamodules", method.__module__.split(".")[0]}


def _options(cls: type) -> Iterator[tuple[str, str, str]]:
    """Name, default and help text of each option of a class."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "x", sub_configs=True)
    for action in parser._actions:
        if action.dest.startswith("x.") and not action.dest.endswith(".help"):
            text = re.sub(r"\((required, )?type: .*", "", action.help or "", flags=re.DOTALL).strip()
            yield action.dest.removeprefix("x."), _default(action), text


def _default(action: Action) -> str:
    if action.required:
        return "(required)"
    return "null" if action.default is None else str(action.default).lower() if isinstance(action.default, bool) else str(action.default)


def _first_line(cls: type) -> str:
    return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
