"""Defaults of a class that a later file or option of the run names in the place of another.

jsonargparse keeps every option whose name the new class has too. A clip range of 0.2 for ratios of tokens becomes one of 0.2 for ratios of
whole answers, a thousand times too wide, and nothing is said. Here a class that takes another's place starts from its own defaults.

A relative of a method may fill in a component with settings of its own (its `presets`): DAPO's `Clip` has a high of 0.28. They are the
default of that option, so a run that names the same class by some of its options keeps the relative's others, not those of the class.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING

import lightning as L
from jsonargparse import ArgumentParser, Namespace, _typehints
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_rl.command_line.dotted import imported_class
from lit_rl.modules.base import LitRL

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_class_parser = _typehints.ActionTypeHint.get_class_parser

HOOK = "discard_init_args_on_class_path_change"
"""jsonargparse's function that decides what is kept. It is no public name: `tests/command_line/test_class_change.py` fails without it."""

PARSER = "get_class_parser"
"""jsonargparse's function that makes the parser of a class, of `ActionTypeHint`. It is no public name either."""

Options = Namespace | dict[str, object]
"""class_path and init_args, as jsonargparse has read them."""

WHOLE = (LitRL, L.LightningDataModule)
"""Another method or datamodule is named to run the same thing otherwise: it keeps what both understand in the same way."""


def install() -> None:
    """Let `start_anew` decide, and `parser_with_presets` be made, for every parser of this process."""
    for owner, name in ((_typehints, HOOK), (_typehints.ActionTypeHint, PARSER)):
        if not callable(getattr(owner, name, None)):
            raise RuntimeError(f"this version of jsonargparse has no {name}: install the one in constraints.txt")
    setattr(_typehints, HOOK, start_anew)
    setattr(_typehints.ActionTypeHint, PARSER, staticmethod(parser_with_presets))


def parser_with_presets(val_class: object, *args: object, **kwargs: object) -> ArgumentParser:
    """jsonargparse's parser of a class, in which the `presets` of a method are the defaults of its options."""
    parser: ArgumentParser = _class_parser(val_class, *args, **kwargs)
    if given := presets(imported_class(val_class) if isinstance(val_class, str) else val_class):
        parser.set_defaults(given)
    return parser


def presets(method: object) -> dict[str, dict[str, object]]:
    """Class and options of the components that `method` fills in with settings of its own, by option, as a run would write them."""
    parts: Mapping[str, DataclassInstance] = getattr(method, "presets", {}) if inspect.isclass(method) else {}
    return {
        name: {
            "class_path": f"{type(part).__module__}.{type(part).__qualname__}",
            "init_args": {field.name: getattr(part, field.name) for field in fields(part)},
        }
        for name, part in parts.items()
    }


def start_anew(parser_or_action: object, before: Options | None, value: Options) -> None:
    """Remove from `before.init_args` the options that the class of `value` does not take over. Changes `before`."""
    if not before or not isinstance(options := before.get("init_args"), Namespace | dict):
        return
    old, new = imported_class(before["class_path"]), imported_class(value["class_path"])
    if old is new or old is None or new is None:
        return
    set_anew = _options(value)
    names = dict(options.items(branches=True, nested=False) if isinstance(options, Namespace) else options)
    dropped = {name: options.pop(name) for name in names if not keeps(old, new, name)}
    if names in _preset_options(old):
        return
    defaults = dict(_defaults(old)) | {name: Namespace(part) for name, part in presets(old).items()}
    told = [f"{n}: {_short(v)}" for n, v in dropped.items() if n not in set_anew and v is not None and defaults.get(n, v) != v]
    if told:
        rank_zero_info(f"{new.__name__} takes the place of {old.__name__} and starts from its own defaults; left out: {', '.join(told)}")


def keeps(old: type, new: type, name: str) -> bool:
    """True if the value of the option `name` of `old` holds for `new`: never for a component; for a method or datamodule where `new` cannot
    be built without it, or where both have the option from the same constructor."""
    if not any(issubclass(old, kind) and issubclass(new, kind) for kind in WHOLE):
        return False
    owner = definer(new, name)
    if owner is None:
        return False
    return inspect.signature(owner.__init__).parameters[name].default is inspect.Parameter.empty or owner is definer(old, name)


def definer(cls: type, name: str) -> type | None:
    """The class whose constructor names the option, where those below it hand `**kwargs` on; None if there is none."""
    return next((owner for owner, parameters in _constructors(cls) if name in parameters), None)


def replaced_components(method: type, options: Mapping[str, object]) -> list[str]:
    """Sentences about components that define `method` (its `defines`) where the run's init_args put others in their place."""
    sentences = []
    for name, own in getattr(method, "defines", {}).items():
        given = options.get(name)
        other = imported_class(given["class_path"]) if isinstance(given, Namespace | dict) and "class_path" in given else None
        if other is not None and other is not own:
            sentences.append(
                f"{method.__name__} is defined by {name}={own.__name__}, and this run sets model.{name} to {other.__name__}, which is "
                f"another method: leave model.{name} out for {method.__name__} itself"
            )
    return sentences


def _preset_options(component: type) -> list[object]:
    """The options that methods fill in for this component: nobody wrote them."""
    methods, ahead = list[type](), [LitRL]
    while ahead:
        methods += ahead
        ahead = [cls for method in ahead for cls in method.__subclasses__()]
    parts: list[DataclassInstance] = [part for method in methods for part in getattr(method, "presets", {}).values()]
    return [{field.name: getattr(part, field.name) for field in fields(part)} for part in parts if type(part) is component]


def _constructors(cls: type) -> Iterator[tuple[type, Mapping[str, inspect.Parameter]]]:
    for owner in inspect.getmro(cls):
        if "__init__" in vars(owner):
            parameters = inspect.signature(owner.__init__).parameters
            yield owner, parameters
            if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                return


def _defaults(cls: type) -> Iterator[tuple[str, object]]:
    for _, parameters in reversed(list(_constructors(cls))):
        yield from ((name, p.default) for name, p in parameters.items() if p.default is not p.empty)


def _options(value: Options) -> Options:
    given = value.get("init_args")
    return given if isinstance(given, Namespace | dict) else {}


def _short(value: object) -> str:
    if isinstance(value, Namespace | dict) and "class_path" in value:
        return str(value["class_path"]).rpartition(".")[2]
    return str(value.as_dict() if isinstance(value, Namespace) else value)
