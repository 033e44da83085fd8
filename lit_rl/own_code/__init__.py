"""Code of the user's own: the working folder as a place to import from, and Python files that are named by their path.

A file is imported as a module of this package whose name holds its path. So the module is found again by its name in every process that can
import `lit_rl` (pickling, process pools), two files of one name are two modules, and `from .helper import ...` finds what lies beside it.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

from lit_rl.errors import ConfigError

FOLDER, FILE = "in_", "file_"
"""Names of modules are these and, in hexadecimal, a folder or the name of a file that no import statement could write."""


def use_working_folder() -> None:
    """Make the working folder importable, as the last place that is looked at: a folder named `callbacks` there hides nothing of ours.

    `python -m` puts it first, where it stays if this package itself lies in it.
    """
    here, ours = Path.cwd(), Path(__file__).parent.parent.parent
    if here == ours:
        return
    sys.path[:] = [entry for entry in sys.path if entry and Path(entry).absolute() != here]
    sys.path.append(str(here))


def load_file(path: Path) -> ModuleType:
    """The module that a Python file, or a folder with `__init__.py`, is when it is run; run again only after it has changed.

    Its folder can be imported from, and is looked at first while it runs. Raises ConfigError with file and line when it cannot be run.
    """
    path = path.expanduser().absolute()
    file = path / "__init__.py" if path.is_dir() else path
    if file.suffix != ".py" or not file.is_file():
        raise ConfigError(f"path: {path} is no Python file{', nor a folder with __init__.py' if path.is_dir() else ''}")
    root, name = module_of(file)
    stamp = (file.stat().st_mtime_ns, file.stat().st_size)
    if getattr(sys.modules.get(name), "__stamp__", None) == stamp:
        return sys.modules[name]
    sys.modules.pop(name, None)
    importlib.invalidate_caches()
    try:
        with _first(root):
            module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"path: {_place(error, file)}: running it raised {type(error).__name__}: {error}") from error
    finally:
        sys.path += [str(folder) for folder in dict.fromkeys((root, file.parent)) if str(folder) not in sys.path]
    _check_siblings(file, root)
    module.__stamp__ = stamp  # type: ignore[attr-defined]
    return module


def module_of(file: Path) -> tuple[Path, str]:
    """The folder above the topmost package that holds a file, and the file's name as a module."""
    names = [file.stem if "." not in file.stem else FILE + file.name.encode().hex()]
    root = file.parent
    while (root / "__init__.py").is_file():
        names.insert(0, root.name)
        root = root.parent
    names = names[:-1] if file.name == "__init__.py" else names
    return root, ".".join([__name__, FOLDER + str(root).encode().hex(), *names])


@contextmanager
def _first(folder: Path) -> Iterator[None]:
    """Imports look into a folder first, and write no bytecode there: it is taken for new by the second and the length of its source."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.dont_write_bytecode = before
        sys.path.remove(str(folder))


def _check_siblings(file: Path, root: Path, checked: frozenset[Path] = frozenset()) -> None:
    """Raise ConfigError where an import means a file beside this one, and another module of its name was loaded before.

    So do imports of the files that it means.
    """
    for name in sorted(_imported(file)):
        place = root.joinpath(*name.split("."))
        own = next((path for path in (place.with_name(f"{place.name}.py"), place / "__init__.py") if path.is_file()), None)
        loaded = getattr(sys.modules.get(name), "__file__", None)
        if own is None or loaded is None or own in checked:
            continue
        if not os.path.samefile(own, loaded):
            raise ConfigError(
                f"path: {file} imports {name}, of which there is {own}, but {loaded} was loaded under this name before; write "
                f"`from .{name} import ...`, or give it another name"
            )
        _check_siblings(own, root, checked | {file, own})


def _imported(file: Path) -> set[str]:
    """The modules that a file's absolute imports may mean, with the packages above them; none of the standard library."""
    imports = [node for node in ast.walk(ast.parse(file.read_bytes())) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    for node in imports:
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    names |= {".".join(parts[:i]) for parts in [name.split(".") for name in names] for i in range(1, len(parts))}
    return {name for name in names if name.partition(".")[0] not in sys.stdlib_module_names}


def _place(error: BaseException, file: Path) -> str:
    """`file:line` where an error arose, in this file if its line is known."""
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return f"{error.filename}:{error.lineno}"
    return line_of(error, file) or str(file)


def line_of(error: BaseException, file: Path) -> str | None:
    """`file:line` of the innermost frame of an error that is code of this file; None where there is none."""
    found, trace = None, error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename) == file:
            found = f"{file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


class _Finder:
    """Finds the folders and files that names of this package's modules hold; what lies in a folder is found as in any package."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        parent, _, last = name.rpartition(".")
        if parent == __name__ and last.startswith(FOLDER):
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [folder := bytes.fromhex(last.removeprefix(FOLDER)).decode()]
            if folder not in sys.path:  # in a process that unpickles
                sys.path.append(folder)
            return spec
        if parent.startswith(f"{__name__}.") and last.startswith(FILE) and path:
            return spec_from_file_location(name, Path(next(iter(path))) / bytes.fromhex(last.removeprefix(FILE)).decode())
        return None


sys.meta_path.append(_Finder())  # type: ignore[arg-type]
