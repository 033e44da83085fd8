"""From jsonargparse's reports to one sentence that says where the mistake is and what was probably meant."""

from __future__ import annotations

import ast
import difflib
import inspect
import pkgutil
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from lit_rl.command_line.options import Option, nearest, options, settings, short
from lit_rl.command_line.places import at, names_no_class
from lit_rl.command_line.renamed import moved, renamed
from lit_rl.command_line.yaml_files import beside_class, broken_yaml

EXPECTATION = re.compile(r"Expected a |Not a valid subclass|Does not validate|a class path|a dict with")
"""How jsonargparse begins what it says of the types that a value might also have had, beside the one whose constructor objected."""

EXAMPLES = {
    "model": "lit_rl.methods.flow_grpo.FlowGRPO",
    "data": "datamodules.prompts.PromptFiles",
    "policy": "lit_rl.policies.sd3.SD3Policy",
    "optimizer": "torch.optim.AdamW",
    "lr_scheduler": "torch.optim.lr_scheduler.ConstantLR",
    "logger": "lightning.pytorch.loggers.TensorBoardLogger",
    "callbacks": "callbacks.reward_scoring.RewardScoring",
    "rewards": "lit_rl.rewards.client.HTTPReward",
    "surrogate": "lit_rl.losses.surrogates.Clip",
    "credit": "lit_rl.credit.rules.Group",
    "engine": "lit_rl.rollouts.native.NativeEngine",
}
"""A class that may stand under a key that takes one."""

REMEDIES = {
    r"No supported gpu backend": "; torch sees no GPU here: add --config configs/base/cpu.yaml, or --trainer.accelerator cpu",
    r"invalid strategy name": "; configs/base/*.yaml are the strategies that are tested here, e.g. --config configs/base/ddp.yaml",
    r"devices.*should be an int": "; trainer.devices is the number of processes on this machine, e.g. 1",
}
"""Remedies for reports of Lightning's, by a part of the report."""

TYPE_NAMES = {"float": "a number", "int": "a whole number", "bool": "true or false", "str": "a text", "NoneType": "null"}


def explain(message: str, argv: Sequence[str]) -> str:
    """One line from the report of a failed parse: its innermost cause, the file and line of the key, the nearest key that exists."""
    if broken := broken_yaml(argv):
        return broken
    known = (help_wanted, old_option, class_wanted, missing_class, wrong_type, required, unknown_option, remedy)
    return next((sentence for explained in known if (sentence := explained(message, argv))), None) or innermost(message, argv)


def missing_class(message: str, argv: Sequence[str]) -> str | None:
    """The sentence for a dotted path that leads nowhere: how far it leads, and the nearest one that exists."""
    for path in re.findall(r"class_path[ =]'([\w.]+)'", message):
        module, _, name = path.rpartition(".")
        if not module:
            continue
        if (new := moved(path)) is not None:
            return at(path, f"{path} is now {new}", argv)
        try:
            found = import_module(module)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):
                return at(path, f"{path} cannot be imported: {error}", argv)  # a module of ours is there, one that it needs is not
            parent = module.rpartition(".")[0]
            near = difflib.get_close_matches(module, _submodules(parent), n=1)
            meant = _class_in(near[0], name) if near else None
            return at(path, f"there is no class {path}: no module {error.name}" + (f"; did you mean {meant}?" if meant else ""), argv)
        if not hasattr(found, name):
            meant = _class_in(module, name)
            return at(path, f"there is no class {path}: {module} has no {name}" + (f"; did you mean {meant}?" if meant else ""), argv)
    return None


def wrong_type(message: str, argv: Sequence[str]) -> str | None:
    """The sentence for a single value that is not of its parameter's type: key, value and what is expected."""
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
    return at(key[1], f"{key[1]} is {given[1]!r}; expected {expected}{meant}", argv, value=given[1])


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
    return at(re.split(r"[:=]", sentence)[0], sentence, argv)  # `key: what is wrong` or `key=value must ...`


def class_wanted(message: str, argv: Sequence[str]) -> str | None:
    """The sentence for a key that takes a class, or a list of them, and has something else."""
    if "Not a valid subclass" in message and (stray := beside_class(argv)):
        return stray
    for setting in settings(argv):
        if setting.path == "trainer.callbacks" and setting.place and not setting.value and names_no_class(setting.path, argv):
            return f"{setting.place}: trainer.callbacks is a list: begin each one with `- class_path: {EXAMPLES['callbacks']}`"
    if "Not a valid subclass of Callback. Got value: [" in message:
        return at("trainer.callbacks", "trainer.callbacks holds a list inside of the list: put each callback into the outer one", argv)
    key = re.match(r'\s*Parser key "([\w.]+)":', message)
    given = re.search(r"(?:Got value|Given value|import path string): (.*?)>?\s*$", message, flags=re.MULTILINE)
    example = EXAMPLES.get(key[1].split(".")[-1]) if key else None
    if key is None or example is None or given is None or not re.search(r"import path string|subclass spec", message):
        return None
    if re.fullmatch(r"[\w.]*\.\w+", given[1]):
        return None  # a dotted path that leads nowhere, see `missing_class`
    return at(key[1], f"{short(key[1])} is {given[1]!r}; it takes a class: {{class_path: {example}, init_args: {{...}}}}", argv)


def required(message: str, argv: Sequence[str]) -> str | None:
    """The sentence for parameters that a class cannot do without."""
    given = re.search(r"the following arguments are required: (.*)", message)
    if given is None:
        return None
    names = [short(name) for name in given[1].split(", ")]
    if top := [name for name in names if name in ("model", "data")]:
        return f"the run has no `{top[0]}`: add `{top[0]}: {{class_path: {EXAMPLES[top[0]]}, init_args: {{...}}}}` to a --config file"
    present = {setting.path for setting in settings(argv)}
    for option in options(argv):
        if option.path.split(".")[-1] in names and option.required and short(option.path) not in present:
            owner, wanted = f"{option.owner.__module__}.{option.owner.__qualname__}", ", ".join(names)
            return at(owner, f"{owner} needs {wanted}: set {option.path}", argv)
    return None


def unknown_option(message: str, argv: Sequence[str]) -> str | None:
    """The sentence for an option that no class of the run has: where it stands, who would have to know it, and the nearest that exists."""
    pattern = r"(?:Option|Key|key) '([\w.]+)' is not (?:accepted|expected)|does not accept option '([\w.]+)'|No action for key \"([\w.]+)\""
    found = re.search(pattern, message)
    stray = re.search(r"[Uu]nrecognized arguments: -*([^\s=]+)", message)
    if found is None and stray is None:
        return None
    name = next(part for part in found.groups() if part) if found else stray[1] if stray else ""
    if stray and not any(word.startswith("--") and name in word for word in argv):
        return f"{name} is not an option; options begin with --, see python cli.py fit --help"
    known = options(argv)
    given, paths = settings(argv), {short(option.path) for option in known}
    same = [setting.path for setting in given if f".{setting.path}".endswith(f".{short(name)}")]
    unknown = [path for path in same if path not in paths] or [path for path in same if not paths.issuperset(_beginnings(path))]
    whole = unknown[0] if unknown else name
    path = next((part for part in _beginnings(whole) if part not in paths), whole)
    if (new := renamed(whole)) is not None:
        return at(whole, f"{whole} of earlier releases is now {new}", argv)
    if place := next((setting.place for setting in given if setting.path == path and setting.place), None):
        return f"{place}: {_unknown(path, known)}"
    word = next((word for word in argv if word.startswith("--") and name in word), f"--{name}").partition("=")[0]
    if "." in path:
        return f"{word}: {_unknown(path, known)}"
    meant = nearest(whole, known)  # the beginning of the path may have been left out
    return f"there is no option {word}; " + (f"did you mean --{meant}?" if meant else "see python cli.py fit --help")


def _beginnings(path: str) -> list[str]:
    """`a`, `a.b`, `a.b.c` of `a.b.c`."""
    return [".".join(path.split(".")[: i + 1]) for i in range(path.count(".") + 1)]


def _unknown(path: str, known: Sequence[Option]) -> str:
    """The sentence for a key that its class does not have: the nearest of the class's own options, the option of that name elsewhere in the
    run, or a list of what the class has."""
    parent, _, wrong = path.rpartition(".")
    siblings = [option for option in known if short(option.path).rpartition(".")[0] == parent]
    names = sorted({short(option.path).split(".")[-1] for option in siblings})
    return no_option(siblings[0].owner.__name__ if parent and siblings else "", wrong, names)


def no_option(owner: str, wrong: str, names: Sequence[str]) -> str:
    """The sentence for a key that a class does not have. owner: its name, "" at the top of a run. names: what it has, sorted."""
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.6)
    said = f"{owner} has no option '{wrong}'" if owner else f"there is no option '{wrong}'"
    if near:
        return f"{said}; did you mean '{near[0]}'?"
    return f"{said}; it has {', '.join(names)}" if owner and names else f"{said}; see python cli.py fit --help"


def help_wanted(message: str, argv: Sequence[str]) -> str | None:
    """The sentence for `--model.policy.help` without a class."""
    word = next((word for word in argv if word.startswith("--") and word.endswith(".help")), None)
    if word is None or not re.search(r"expected one argument|NestedArg\(key='[\w.]*help'", message):
        return None
    path = short(word[2:].removesuffix(".help"))
    example = EXAMPLES.get(path.split(".")[-1], EXAMPLES["model"])
    inside = f", beside a --config or --{path.split('.')[0]} that names the class around it" if "." in path else ""
    return f"{word} shows what a class takes: name one, e.g. --{path}.help {example}{inside}"


def remedy(message: str, argv: Sequence[str]) -> str | None:
    """A report of Lightning's with what to do about it."""
    cure = next((text for pattern, text in REMEDIES.items() if re.search(pattern, message)), None)
    return None if cure is None else re.split(r" Find a complete list| Example choices", message)[0].strip().rstrip(".!") + cure


def old_option(message: str, argv: Sequence[str]) -> str | None:
    """The sentence for an option of the trainers that people come from: its name here, and the page that lists it."""
    unknown = re.search(r"[Uu]nrecognized arguments: (.*)", message)
    for page in sorted(Path(__file__).parents[2].glob("docs/migration*.md")) if unknown else ():
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
