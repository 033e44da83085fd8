"""Checks the folders and files that a run reads by their first kilobytes: no weights are loaded."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

from lit_rl.doctor.report import Finding, gigabytes, ok, problem, warning
from lit_rl.errors import ConfigError, listed

WEIGHTLESS = ("Scheduler", "Tokenizer", "TokenizerFast", "Processor", "FeatureExtractor")
CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
Header = dict[str, list[int]]
"""Shape by name of the weights in a file."""


class Entry(TypedDict):
    """A tensor in the header of a safetensors file."""

    shape: list[int]
    data_offsets: list[int]


class Broken(Exception):
    """Why a file or folder cannot be what it should be."""


def check_path(key: str, path: str) -> Iterator[Finding]:
    """The finding about the value of `key`: a pipeline, a model, a LoRA folder, an adapter's file, or a hub id."""
    place = Path(path).expanduser()
    try:
        if place.is_file():
            yield ok(key, f"{path}: {_adapter(place)}")
        elif place.is_dir():
            yield ok(key, f"{path}: {folder(place)[0]}")
        elif path.count("/") == 1 and not path.startswith((".", "/", "~")):
            yield _hub(key, path)
        else:
            yield problem(key, f"no such file or folder: {path}")
    except (Broken, ConfigError) as error:
        yield problem(key, f"{path}: {error}. Download it again, or correct the path")


def folder(place: Path) -> tuple[str, Header]:
    """A folder's content in words, and the weights of the network that is trained. Raises Broken."""
    if (place / "model_index.json").is_file():
        index = _json(place / "model_index.json")
        parts = {name: kind[1] for name, kind in index.items() if isinstance(kind, list) and kind[0] is not None}
        missing = [name for name in parts if not (place / name).is_dir()]
        if missing:
            raise Broken(f"model_index.json names {', '.join(missing)}, which is not there")
        headers = {name: component(place / name, weightless=kind.endswith(WEIGHTLESS)) for name, kind in parts.items()}
        return f"{index.get('_class_name')} of {listed(sorted(parts), shown=12)}; {_size(place)}", headers.get("transformer", {})
    if (place / "adapter_config.json").is_file():
        _json(place / "adapter_config.json")
        return f"LoRA; {_size(place)}", weights(place)
    if not (place / "config.json").is_file() and any(place.glob("*lora*.safetensors")):
        return f"LoRA; {_size(place)}", weights(place)
    header = component(place, weightless=False)
    return f"{', '.join(map(str, _listed(_json(place / 'config.json').get('architectures')))) or 'model'}; {_size(place)}", header


def component(place: Path, *, weightless: bool) -> Header:
    """Shapes of the weights in a folder with a config, {} where it needs none. Raises Broken."""
    configs = [place / name for name in CONFIGS if (place / name).is_file()]
    for config in configs:
        _json(config)
    if not configs and not any(place.glob("*")):
        raise Broken(f"{place.name} is empty")
    if weightless:
        return {}
    if not (place / "config.json").is_file():
        raise Broken(f"{place.name} has no config.json")
    return weights(place)


def weights(place: Path) -> Header:
    """Shapes in all files of weights of a folder, each looked at; those that an index names must be there. Raises Broken."""
    indices = list(place.glob("*.index*.json"))
    for index in indices:
        weight_map = _json(index).get("weight_map")
        named = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
        if missing := sorted(name for name in named if not (place / name).is_file()):
            raise Broken(f"{place.name}/{index.name} names {listed(missing)}, which is not there")
    found: Header = {}
    files = sorted(place.glob("*.safetensors"))
    for file in files:
        found |= safetensors_header(file)
    for file in [] if files else sorted(place.glob("*.bin")):
        if not zipfile.is_zipfile(file):
            raise Broken(f"{file.name} is not whole ({file.stat().st_size} bytes){_pointer(file)}")
        files.append(file)
    if not files:
        raise Broken(f"{place.name} has no weights (*.safetensors or *.bin)")
    return found


def safetensors_header(file: Path) -> Header:
    """Shape by name, after comparing the file's length with what its header announces. Raises Broken."""
    if not os.access(file, os.R_OK):
        raise Broken(f"{file.name} may not be read by this user")
    size = file.stat().st_size
    with open(file, "rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise Broken(f"{file.name} is not a whole safetensors file ({size} bytes){_pointer(file)}")
        try:
            header: dict[str, Entry] = json.loads(stream.read(length))
        except ValueError as error:
            raise Broken(f"{file.name} is not a safetensors file") from error
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if size != 8 + length + end:
        raise Broken(f"{file.name} has {size} of {8 + length + end} bytes")
    return {name: entry["shape"] for name, entry in tensors.items()}


def _adapter(file: Path) -> str:
    from lit_rl.checkpoints.ip_adapter import read_ip_adapter

    sections = read_ip_adapter(file)
    return f"IP-Adapter of {', '.join(sorted(sections))}; {gigabytes(file.stat().st_size)}"


def _hub(key: str, name: str) -> Finding:
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "hub").expanduser()
    if any((cache / f"models--{name.replace('/', '--')}").glob("snapshots/*")):
        return ok(key, f"{name}: in the hub's cache {cache}")
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return problem(
            key, f"{name} is no folder and not in the hub's cache {cache}, and HF_HUB_OFFLINE is set: give a folder, or unset it"
        )
    return warning(key, f"{name} is not in the hub's cache {cache} and will be downloaded at the start; give a folder to avoid that")


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _json(file: Path) -> dict[str, object]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Broken(f"{file.parent.name}/{file.name} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise Broken(f"{file.parent.name}/{file.name} holds no object")
    return content


def _pointer(file: Path) -> str:
    with open(file, "rb") as stream:
        return ": it is a pointer of Git LFS, run `git lfs pull`" if stream.read(20).startswith(b"version https://git") else ""


def _size(place: Path) -> str:
    return gigabytes(sum(file.stat().st_size for file in place.rglob("*") if file.is_file()))
