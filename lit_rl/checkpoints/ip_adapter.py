"""The three files that IP-Adapters for FLUX come in, and what is in them.

standard   {image_proj, ip_adapter [, image_proj_qformer]}             what training writes (`ip-adapter.bin`)
legacy     {image_proj_mlp, attn_adapter}
released   {image_proj_mlp, image_proj_qformer, attn_adapter}          `calligrapher.bin`, which the published inference opens

python -m lit_rl.checkpoints.ip_adapter ip-adapter.bin calligrapher.bin --format released
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_rl.checkpoints.replacing import atomic_file
from lit_rl.checkpoints.weights import check_numbers, read_plain
from lit_rl.errors import ConfigError, listed

Format = Literal["standard", "legacy", "released"]
Weights = dict[str, dict[str, Tensor]]

_QFORMER = {"image_proj_qformer": "image_proj_qformer"}
_STANDARD = {"image_proj": "image_proj", "ip_adapter": "ip_adapter"}
_LEGACY = {"image_proj": "image_proj_mlp", "ip_adapter": "attn_adapter"}
LAYOUTS = {"standard": _STANDARD, "standard with Q-Former": _STANDARD | _QFORMER, "legacy": _LEGACY, "released": _LEGACY | _QFORMER}
"""Sections by their standard name -> their name in the file."""


def _both(*layers: str) -> set[str]:
    return {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


MLP_KEYS = _both("proj.0", "proj.2", "norm")
QFORMER_KEYS = _both("id_proj.0", "id_proj.2", "cross_attn.out_proj", "cross_attn_norm", "norm") | {
    "query_embeds",
    "cross_attn.in_proj_weight",
    "cross_attn.in_proj_bias",
}
QFORMER_KEY_TOKENS = 32
"""Tokens that the published Q-Former attends to."""


def to_sections(weights: Mapping[str, Tensor]) -> Weights:
    """{"ip_adapter.0.to_k_ip.weight": ...} -> {"ip_adapter": {"0.to_k_ip.weight": ...}}."""
    sections: Weights = {}
    for name, tensor in weights.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = tensor
    return sections


def to_standard(state: Mapping[str, object], *, what: str = "the IP-Adapter's state") -> Weights:
    """The weights of a file in any of the formats under their standard names; the Q-Former stays where there is one.

    what: its name in errors. Raises ConfigError that lists what is missing and what is unknown.
    """
    layout = next((sections for sections in LAYOUTS.values() if set(sections.values()) == set(state)), None)
    if layout is None:
        raise ConfigError(f"{what} has the keys {listed(_words(state))}, which is no IP-Adapter; {_nearest(state)}")
    modules = {name: inner for name in layout.values() if isinstance(inner := state[name], Mapping)}
    odd = [name for name in layout.values() if not _holds_tensors(state[name])]
    if odd:
        raise ConfigError(f"{what}: {listed(odd)} must be a dict of tensors by name; save each module's state_dict() under its name")
    wanted = {name: _inner_keys(section, modules[name]) for section, name in layout.items()}
    missing = sorted(f"{name}.{key}" for name, keys in wanted.items() for key in keys - modules[name].keys())
    unknown = sorted(f"{name}.{key}" for name, keys in wanted.items() for key in modules[name].keys() - keys)
    if missing or unknown:
        raise ConfigError(f"{what} is not a whole IP-Adapter; {_problems(missing, unknown)}")
    return {section: dict(modules[name]) for section, name in layout.items()}


def from_standard(weights: Weights, *, format: Format = "standard") -> Weights:
    """The content of an adapter file in the given format.

    A released file has a Q-Former always: where there is none, one whose tokens are exactly zero takes its place. A legacy one has none:
    raises ConfigError where there is one, as without it the adapter would be another function.
    """
    if format not in get_args(Format):
        raise ConfigError(f"format: {format!r} is none of {', '.join(get_args(Format))}")
    has_qformer = "image_proj_qformer" in weights
    if format == "legacy" and has_qformer:
        raise ConfigError("format: a legacy file has no place for the Q-Former of this adapter; set it to released or standard")
    if format == "released" and not has_qformer:
        weights = {**weights, "image_proj_qformer": silent_qformer(weights["image_proj"])}
    layout = LAYOUTS["standard with Q-Former" if format == "standard" and has_qformer else format]
    return {name: weights[section] for section, name in layout.items()}


def silent_qformer(mlp: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Q-Former of the published sizes beside this MLP whose every weight is 0: LayerNorm(x) * 0 + 0 are its tokens."""
    hidden, features = mlp["proj.0.weight"].shape
    width = len(mlp["norm.weight"])
    shapes = {
        "query_embeds": (len(mlp["proj.2.bias"]) // width, width),
        "id_proj.0.weight": (hidden, features),
        "id_proj.0.bias": (hidden,),
        "id_proj.2.weight": (QFORMER_KEY_TOKENS * width, hidden),
        "id_proj.2.bias": (QFORMER_KEY_TOKENS * width,),
        "cross_attn.in_proj_weight": (3 * width, width),
        "cross_attn.in_proj_bias": (3 * width,),
        "cross_attn.out_proj.weight": (width, width),
        **dict.fromkeys(("cross_attn.out_proj.bias", *sorted(_both("cross_attn_norm", "norm"))), (width,)),
    }
    return {key: mlp["norm.weight"].new_zeros(shape) for key, shape in shapes.items()}


def read_ip_adapter(path: str | Path) -> Weights:
    """The standard weights of a file in any of the formats, on the CPU. Nothing in the file is executed.

    Raises ConfigError when there is no such file, when it holds other things than tensors, or other ones than an IP-Adapter's.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"IP-Adapter: no such file {str(path)!r}")
    state = read_plain(file, what=f"IP-Adapter: {str(path)!r}")
    if not isinstance(state, Mapping):
        raise ConfigError(f"IP-Adapter: {str(path)!r} holds a {type(state).__name__}, not a dict; {_nearest({})}")
    weights = to_standard(state, what=f"IP-Adapter: {str(path)!r}")
    check_numbers(weights, what=f"IP-Adapter: {str(path)!r}")
    return weights


def write_ip_adapter(path: str | Path, weights: Weights, *, format: Format = "standard") -> None:
    """Write standard weights to a file of that format: whole or not at all."""
    state = from_standard(to_standard(weights), format=format)
    target = Path(path).expanduser()
    target.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: {key: tensor.detach().cpu().contiguous() for key, tensor in section.items()} for name, section in state.items()}
    with atomic_file(target) as file:
        torch.save(plain, file)


def convert(source: str, target: str, format: Format = "standard") -> None:
    """Write the IP-Adapter of file `source`, in whatever format, to file `target`.

    Args:
        source: A standard, legacy or released file.
        target: The file to write.
        format: Of the file to write.
    """
    write_ip_adapter(target, read_ip_adapter(source), format=format)


def _holds_tensors(section: object) -> bool:
    return isinstance(section, Mapping) and all(isinstance(value, Tensor) for value in section.values())


def _inner_keys(section: str, stored: Mapping[str, Tensor]) -> set[str]:
    """The keys that the section must hold; attentions are numbered from 0 to the highest number stored."""
    if section != "ip_adapter":
        return MLP_KEYS if section == "image_proj" else QFORMER_KEYS
    numbers = [int(first) for key in stored if (first := key.partition(".")[0]).isdecimal()]
    return {f"{i}.{layer}.weight" for i in range(max(numbers, default=0) + 1) for layer in ("to_k_ip", "to_v_ip")}


def _nearest(state: Iterable[object]) -> str:
    """A sentence about the format that most of the keys belong to, and what is wrong with it."""
    there = set(_words(state))
    name, keys = min(((name, set(layout.values())) for name, layout in LAYOUTS.items()), key=lambda format: len(format[1] ^ there))
    return f"a {name} file holds {', '.join(sorted(keys))}: {_problems(sorted(keys - there), sorted(there - keys))}"


def _problems(missing: list[str], unknown: list[str]) -> str:
    return "; ".join(f"{what}: {listed(keys)}" for what, keys in (("missing", missing), ("unknown", unknown)) if keys)


def _words(keys: Iterable[object]) -> list[str]:
    return [str(key) for key in keys]


if __name__ == "__main__":
    from jsonargparse import auto_cli

    try:
        auto_cli(convert, as_positional=True)
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
