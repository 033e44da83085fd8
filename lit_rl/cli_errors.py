"""From jsonargparse's reports to one sentence that says where the mistake is and what was probably meant."""

from __future__ import annotations

import ast
import difflib
import inspect
import pkgutil
import re
from collections.abc import Iterable, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import yaml

EXPECTATION = re.compile(r"Expected a |Not a valid subclass|Does not validate|a class path|a dict with")
"""How jsonargparse begins what it says of the types that a value might also have had, beside the one whose constructor objected."""

TYPE_NAMES = {"float": "a number", "int": "a whole number", "bool": "true or false", "str": "a text", "NoneType": "null"}


def explain(message: str, argv: Sequence[str]) -> str:
    """One line from the report of a failed parse: its innermost cause, the file and line of the key, the nearest key that exists."""
    return broken_yaml(argv) or old_option(message) or missing_class(message, argv) or wrong_type(message, argv) or innermost(message, argv)


def broken_yaml(argv: Sequence[str]) -> str | None:
    """Of the first --config file that is no YAML or no mapping: where, and what is wrong with it."""
    for file in config_files(argv):
        try:
            root = yaml.compose(file.read_text(encoding="utf-8"))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f"{file}:{mark.line + 1}" if mark else str(file)
            began = f" ({error.context} that began in line {error.context_mark.line + 1})" if error.context and error.context_mark else ""
            return (
                f"{where}: this is not YAML: {error.problem}{began}; indent with spaces, close what is open, put a space after each colon"
            )
        if not isinstance(root, yaml.MappingNode):
            return f"{file}: a run has keys such as model, data and trainer; this file {'holds a list' if root else 'is empty'}"
    return None


def missing_class(message: str, argv: Sequence[str]) -> str | None:
    """Of a dotted path in the report that leads nowhere: how far it leads, and the nearest one that exists."""
    for path in re.findall(r"class_path[ =]'([\w.]+)'", message):
        module, _, name = path.rpartition(".")
        if not module:
            continue
        try:
            found = import_module(module)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):
                return _at(path, f"{path} cannot be imported: {error}", argv)  # a module of ours is there, one that it needs is not
            parent = module.rpartition(".")[0]
            near = difflib.get_close_matches(module, _submodules(parent), n=1)
            meant = _class_in(near[0], name) if near else None
            return _at(path, f"there is no class {path}: no module {error.name}" + (f"; did you mean {meant}?" if meant else ""), argv)
        if not hasattr(found, name):
            meant = _class_in(module, name)
            return _at(path, f"there is no class {path}: {module} has no {name}" + (f"; did you mean {meant}?" if meant else ""), argv)
    return None


def wrong_type(message: str, argv: Sequence[str]) -> str | None:
    """Of a single value that is not of its parameter's type: key, value and what is expected."""
    key = re.match(r'\s*Parser key "([\w.]+)":', message)
    given = re.search(r"(?:Got value|Given value): (.*)\s*$", message)
    if not key or not given or given[1].startswith(("{", "[", "Namespace")):
        return None
    subtypes = re.search(r"Subtypes: \[(.*)\]\n", message)
    single = re.search(r"Expected a (<class '[\w.]+'>|typing\.Literal\[.*?\])", message)
    causes = [line.strip().removeprefix("- ") for line in message.splitlines() if line.strip().startswith("- ")]
    if not (subtypes or single) or not all(EXPECTATION.match(line) or line.startswith("Expected a") for line in causes):
        return None
    text = subtypes[1] if subtypes else single[1] if single else ""
    choices = list(dict.fromkeys(str(c) for literal in re.findall(r"Literal(\[.*?\])", text) for c in ast.literal_eval(literal)))
    words = [TYPE_NAMES.get(name, name) for name in re.findall(r"<class '(?:[\w.]+\.)?(\w+)'>", text) if name != "Tensor"]
    near = difflib.get_close_matches(given[1], choices, n=1, cutoff=0.8)
    expected = " or ".join([*([f"one of {', '.join(choices)}"] if choices else []), *words])
    meant = f"; did you mean {near[0]}?" if near else ""
    return _at(key[1], f"{key[1]} is {given[1]!r}; expected {expected}{meant}", argv, value=given[1])


def innermost(message: str, argv: Sequence[str]) -> str:
    """The report without the types that were also possible, with the place and the nearest name of a key that does not exist."""
    if "\n" in message and not re.search(r"Parser key|Subtypes|Given value|Problem with", message):
        return message  # one of our own, in lines already
    lines = [line.strip() for line in message.splitlines()]
    bullets = [text for text in _bullets(message) if "NoneType" not in text.splitlines()[0]]
    causes = [line for line in bullets if not EXPECTATION.match(line)] or bullets
    sentence = " ".join(dict.fromkeys(causes)) if "Union subtypes" in message and causes else " ".join(lines)
    sentence = re.sub(r"<class '(?:builtins\.)?([\w.]+)'>", r"\1", sentence)
    sentence = re.sub(r'Parser key "([\w.]+)": ', r"\1: ", sentence)
    key = re.search(
        r"(?:Option|Key|key) '([\w.]+)' is not (?:accepted|expected)|does not accept option '([\w.]+)'|No action for key \"([\w.]+)\"",
        sentence,
    )
    if key is None:
        return _at(re.split(r"[:=]", sentence)[0], sentence, argv)  # `key: what is wrong` or `key=value must ...`
    parts, known = next(part for part in key.groups() if part).split("."), known_keys(argv)
    wrong = next((part for part in parts if part not in known), parts[-1])
    near = difflib.get_close_matches(wrong, known - {wrong}, n=1, cutoff=0.6)
    return _at(wrong, sentence + (f"; did you mean '{near[0]}'?" if near else ""), argv)


def old_option(message: str) -> str | None:
    """Of an option of the trainers that people come from: where its new name stands."""
    unknown = re.search(r"[Uu]nrecognized arguments: (.*)", message)
    for page in sorted(Path(__file__).parent.parent.glob("docs/migration*.md")) if unknown else ():
        text = page.read_text(encoding="utf-8")
        for option in unknown[1].split() if unknown else ():
            name = option.partition("=")[0]
            row = next((line for line in text.splitlines() if line.startswith("| `") and f"`{name}" in line.split("|")[1]), None)
            if row is not None:
                keys = " ".join(row.split("|")[2:4]).strip()
                return f"{name} is an option of another trainer; here it is {keys} (docs/{page.name})"
    return None


def _bullets(message: str) -> list[str]:
    """The points of the report's list, each with the lines that are indented under it: one of our own messages may have several."""
    found: list[list[str]] = []
    depth = 0
    for line in message.splitlines():
        indent = len(line) - len(line.lstrip())
        if line.lstrip().startswith("- "):
            found.append([line.strip().removeprefix("- ")])
            depth = indent
        elif found and indent > depth:
            found[-1].append(line.strip())
    return [(" " if text[0].startswith("Problem with") else "\n  ").join(text) for text in found]


def _at(key: str, sentence: str, argv: Sequence[str], *, value: str = "") -> str:
    place = where(key, argv, value=value)
    return f"{place}: {sentence}" if place else sentence


def where(key: str, argv: Sequence[str], *, value: str = "") -> str | None:
    """`file:line` of the only place in the run's YAML files that sets the last part of `key` (to `value`), or names the class `key`.

    None when an option sets it anew.
    """
    last = re.escape(key.rsplit(".")[-1])
    if any(re.match(rf"--(?:[\w.]+\.)?{last}(?:=|$)", word) or word.endswith(key) for word in argv):
        return None
    pattern = rf"(?:^|[\s{{,]){last}\s*:\s*[\"']?{re.escape(value)}|\b{re.escape(key)}(?![\w.:])"
    places = [
        f"{file}:{number}"
        for file in config_files(argv)
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(pattern, line.split("#")[0])
    ]
    return places[0] if len(places) == 1 else None


def config_files(argv: Sequence[str]) -> list[Path]:
    """The files given by --config."""
    values = [value for flag, value in pairwise(argv) if flag in ("--config", "-c")]
    values += [word.split("=", 1)[1] for word in argv if word.startswith("--config=")]
    return [Path(value) for value in values if Path(value).is_file()]


def known_keys(argv: Sequence[str]) -> set[str]:
    """Parameters of every class that the run names, and of the Trainer."""
    text = "\n".join([*(file.read_text(encoding="utf-8") for file in config_files(argv)), *argv])
    paths = set(re.findall(r"\b(?:\w+\.)+[A-Z]\w+\b", text)) | {"lightning.Trainer"}
    return {"model", "data", "trainer", "seed_everything", "ckpt_path", "class_path", "init_args"}.union(*map(_parameters, paths))


def _parameters(class_path: str) -> Iterable[str]:
    module, _, name = class_path.rpartition(".")
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError):  # not a class path after all, e.g. a file name
        return set()
    classes = inspect.getmro(cls) if inspect.isclass(cls) else ()
    return {p for c in classes if "__init__" in vars(c) for p in inspect.signature(c.__init__).parameters} - {"self", "args", "kwargs"}


def _submodules(package: str) -> list[str]:
    try:
        folder = getattr(import_module(package), "__path__", ()) if package else ()
    except ImportError:
        return []
    return [f"{package}.{module.name}" for module in pkgutil.iter_modules(folder)]


def _class_in(module: str, name: str) -> str | None:
    """The dotted path of the class of `module` whose name is nearest."""
    try:
        found = import_module(module)
    except ImportError:
        return None
    near = difflib.get_close_matches(name, [key for key, value in vars(found).items() if inspect.isclass(value)], n=1)
    return f"{module}.{near[0]}" if near else None
