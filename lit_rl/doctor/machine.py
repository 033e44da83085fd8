"""Python, packages, GPUs and disks. torch is imported only where there are GPUs that it must see."""

from __future__ import annotations

import os
import platform
import re
import runpy
import shutil
import tomllib
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from lit_rl.doctor.report import Finding, gigabytes, ok, problem, warning
from lit_rl.net.gpus import Gpu

ROOT = Path(__file__).parents[2]
BFLOAT16 = 8.0
"""The first compute capability with bfloat16."""


def packages(root: Path = ROOT) -> Iterator[Finding]:
    """Python and the packages of pyproject.toml, against what it asks for and what constraints.txt was tested with."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    if not (root / "pyproject.toml").is_file():
        yield warning("packages", f"{root} has no pyproject.toml, so versions are not compared; run from a checkout of the repository")
        return
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    here = platform.python_version()
    fits = SpecifierSet(project["requires-python"]).contains(here, prereleases=True)
    yield ok("Python", here) if fits else problem("Python", f"{here}, but {project['requires-python']} is needed: make a new .venv with it")
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", (root / "constraints.txt").read_text(), re.M))
    bad, other = [], []
    for requirement in map(Requirement, project["dependencies"]):
        version = installed(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            bad.append(f"{requirement.name} is {version or 'not installed'}, needed: {requirement.specifier or 'any version'}")
    for name, pin in pins.items():
        version = installed(name)
        if version is not None and version.split("+")[0] != pin:
            other.append(f"{name} {version} (tested: {pin})")
    if bad:
        yield problem("packages", f"{'; '.join(bad)}. Run `make setup`, or pip install -e . -c constraints.txt")
    if other:
        yield warning("packages", f"{', '.join(other)}. For the tested versions: pip install -e . -c constraints.txt")
    if not bad and not other:
        yield ok("packages", f"all {len(project['dependencies'])} there, in the versions of constraints.txt")


def installed(name: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def torch_build() -> tuple[str, str | None]:
    """Version of the installed torch and its CUDA version, from the file that says them."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return "", None
    said = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    return said["__version__"], said["cuda"]


def accelerators(found: Sequence[Gpu], *, wants_gpu: bool, wants_bfloat16: bool) -> Iterator[Finding]:
    """The GPUs, whether torch can use them, and whether they can do what the run asks for."""
    version, cuda = torch_build()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not version:
        return  # `packages` says so
    if not found:
        text = f"no NVIDIA GPU here (torch {version})"
        yield (
            problem("GPUs", f"{text}, and the run asks for one: use configs/base/cpu.yaml, or start it on a GPU machine")
            if wants_gpu
            else ok("GPUs", f"{text}; runs and servers compute on the CPU")
        )
        return
    for gpu in found:
        precision = "bfloat16" if gpu.capability >= BFLOAT16 else "no bfloat16"
        line = f"{gpu.name}, {gpu.memory / 1024:.0f} GiB, {precision}"
        if gpu.capability < BFLOAT16 and wants_bfloat16:
            yield problem(f"GPU {gpu.index}", f"{line}, which the run asks for: set trainer.precision to 16-mixed and dtype to float16")
        elif gpu.used > 0.1 * gpu.memory:
            yield warning(f"GPU {gpu.index}", f"{line}; {gpu.used / 1024:.0f} GiB are in use: see nvidia-smi, or take other GPUs")
        else:
            yield ok(f"GPU {gpu.index}", line)
    if cuda is None:
        yield problem("torch", f"{version} is a build without CUDA and sees none of these GPUs: install torch from its CUDA index")
        return
    import torch

    seen = f"torch {version} (CUDA {cuda}) sees {torch.cuda.device_count()} of {len(found)} GPUs"
    hidden = f", CUDA_VISIBLE_DEVICES is {visible!r}" if visible is not None else ""
    if torch.cuda.is_available() and torch.cuda.device_count():
        yield ok("torch", seen + hidden)
    else:
        cure = "unset CUDA_VISIBLE_DEVICES" if visible is not None else "update the driver, or install a torch for an older CUDA"
        yield (problem if wants_gpu else warning)("torch", f"{seen}{hidden}: {cure}")


def room(folders: Sequence[Path], *, checkpoint: float, copies: int, least: bool, what: str = "checkpoint") -> Iterator[Finding]:
    """Findings about the folders that a run writes to: permissions, and room for its checkpoints.

    checkpoint: bytes of one, of which `copies` are kept; least: the bytes are a lower bound. what: "export" for those of `Export`.
    """
    one, knob = {"checkpoint": ("a checkpoint", "ModelCheckpoint's save_top_k"), "export": ("an export", "Export's keep")}[what]
    for folder in folders:
        there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            yield problem("disk", f"{folder}: {there} cannot be written to; choose another folder")
            continue
        free = shutil.disk_usage(there).free
        each = f"{'at least ' if least else 'about '}{gigabytes(checkpoint)}"
        line = f"{folder}: {gigabytes(free)} free, {one} takes {each}, up to {copies} are kept"
        if free < 2 * checkpoint:  # the new one is written before the old one goes
            yield problem("disk", f"{line}; make room or choose another folder")
        elif free < (copies + 1) * checkpoint:
            yield warning("disk", f"{line}; make room, or keep fewer ({knob})")
        else:
            yield ok("disk", line if checkpoint else f"{folder}: {gigabytes(free)} free")
