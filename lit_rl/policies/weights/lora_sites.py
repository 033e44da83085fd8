"""The weights of a language model that LoRA adapts: found in the loaded model, and named as PEFT reads them."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import nn

from lit_rl.errors import ConfigError, listed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUTER = re.compile(r"router|gate|wg|shared_expert_gate")
"""Names of modules, or of modules around them, that choose experts. `gate_proj` of a gated MLP is none."""


@dataclass(frozen=True)
class Sites:
    """Full names of what is adapted: linear layers, and weights of experts that are fused into one parameter "experts in out"."""

    layers: list[str]
    experts: list[str] = field(default_factory=list)

    @property
    def names(self) -> set[str]:
        """As `lit_rl.policies.weights.adapters.adapted_name` has them."""
        return {name.removesuffix(".weight") for name in (*self.layers, *self.experts)}


def decoder_of(lm: Any) -> nn.Module:
    """The part of a model that reads text, without the vision tower and projector of a multimodal one."""
    found = lm.get_decoder() if hasattr(lm, "get_decoder") else lm.base_model
    return lm.base_model if found is None else found


def repeated_blocks(lm: nn.Module) -> list[nn.Module]:
    """The decoder layers: the longest list of modules of the decoder that is not inside of another (experts of a layer are)."""
    decoder = decoder_of(lm)
    lists = [(name, module) for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise ConfigError(
            f"pretrained: {type(lm).__name__} has no list of decoder layers, so it can be neither sharded nor adapted by block"
        )
    outer = [module for name, module in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    return list(max(outer, key=lambda blocks: len(list(blocks))))


def default_sites(lm: PreTrainedModel, beside: str | None = None) -> Sites:
    """Every linear layer and every fused expert of the blocks, but routers and layers whose weight the model reads past the layer.

    beside: Name of a module outside of the decoder whose linear layers are adapted too.
    """
    blocks = _block_names(lm)
    layers = [name for name, layer in _linear(lm) if name.startswith(blocks) and not _routes(lm, name) and not bypassed(lm, name)]
    experts = [name for name in _fused(lm) if name.startswith(blocks)]
    return Sites(layers + _inside(lm, beside), experts)


def named_sites(lm: PreTrainedModel, targets: Sequence[str], beside: str | None = None) -> Sites:
    """The layers and fused experts of the decoder, of `beside` and its output layer whose names end in one of `targets`.

    Raises ConfigError where none does.
    """
    inside, head = _reach(lm)
    layers = [name for name, _ in _linear(lm) if name.startswith(inside) or name == head] + _inside(lm, beside)
    experts = [name for name in _fused(lm) if name.startswith(inside)]
    missing = [t for t in targets if not any(_ends(name, t) for name in (*layers, *experts))]
    if missing:
        here = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in (*layers, *experts) if name.startswith(_block_names(lm))})
        raise ConfigError(
            f"lora.targets: no linear layer ends in {', '.join(missing)}; a block has {', '.join(here)}"
            + (" (its experts are fused: name gate_up_proj and down_proj)" if experts else "")
        )
    chosen = Sites(*([name for name in names if any(_ends(name, t) for t in targets)] for names in (layers, experts)))
    past = [name for name in chosen.layers if bypassed(lm, name)]
    if past:
        raise ConfigError(
            f"lora.targets: the model reads the weight of {listed(past)} without calling the layer, so an adapter there would be passed "
            f"over; leave {', '.join(sorted({name.rpartition('.')[2] for name in past}))} out"
        )
    return chosen


def adaptable(lm: PreTrainedModel, beside: str | None = None) -> set[str]:
    """Names of everything that an adapter from elsewhere may sit on: what training reaches, routers too. For a model without adapters."""
    inside, head = _reach(lm)
    own = ((name, module, getattr(module, "weight", None)) for name, module in lm.named_modules() if name.startswith(inside))
    matrices = {name for name, module, weight in own if getattr(weight, "ndim", 0) == 2 and not isinstance(module, nn.Embedding)}
    return {head, *_inside(lm, beside)} | Sites([name for name in matrices if not bypassed(lm, name)], _fused(lm)).names


def peft_targets(network: PreTrainedModel, sites: Sites) -> dict[str, list[str]]:
    """`target_modules` and `target_parameters` of a `LoraConfig` for exactly these sites: the shortest endings that name nothing else."""
    rewritten = _rewritten(network, {name.rpartition(".")[2] for name in sites.layers})
    layers = [name for name in sites.layers if name.rpartition(".")[2] not in rewritten]
    parameters = [*sites.experts, *(f"{name}.weight" for name in sites.layers if name.rpartition(".")[2] in rewritten)]
    every_module, every_parameter = ([name for name, _ in found] for found in (network.named_modules(), network.named_parameters()))
    return {
        "target_modules": _shortest(layers, every_module, parts=1),
        "target_parameters": _shortest(parameters, every_parameter, parts=2),
    }


def coverage(lm: PreTrainedModel, sites: Sites) -> str:
    """A sentence: the share of the blocks' matrices that adapters sit on, and the matrices without one."""
    blocks, chosen = _block_names(lm), {*sites.experts, *(f"{name}.weight" for name in sites.layers)}
    sizes = {n: p.numel() for n, p in lm.named_parameters() if n.startswith(blocks) and p.ndim > 1}
    total, rest = sum(sizes.values()), Counter[str]()
    for name, size in sizes.items():
        if name not in chosen:
            rest[re.sub(r"^.*?\.\d+\.", "", name).removesuffix(".weight")] += size
    inside = [name.removesuffix(".weight") for name in (*sites.layers, *sites.experts) if name.startswith(blocks)]
    parts = sorted({name.rpartition(".")[2] for name in inside})
    said = f"LoRA sits on {1 - sum(rest.values()) / total:.1%} of the weights of the decoder layers ({', '.join(parts)})"
    said += f", and on {beside} linear layers beside the decoder" if (beside := len(_names_beside(lm, sites))) else ""
    if not rest:
        return said
    left = ", ".join(f"{name} {size / total:.1%}" for name, size in rest.most_common(8))
    past = sorted({name.rpartition(".")[2] for name, _ in _linear(lm) if name.startswith(blocks) and bypassed(lm, name)})
    why = f" (kernels read the weights of {', '.join(past)} past an adapter)" if past else ""
    return f"{said}; left out: {left}{why}. lora.targets chooses other layers, by the ends of their names"


def _names_beside(lm: PreTrainedModel, sites: Sites) -> list[str]:
    inside, head = _reach(lm)
    return [name for name in sites.layers if not name.startswith(inside) and name != head]


def bypassed(lm: PreTrainedModel, name: str) -> bool:
    """True where a state-space module reads the layer's weight itself, for a kernel of its own: an adapter there has no effect."""
    parent, _, leaf = name.rpartition(".")
    cls: type = type(lm.get_submodule(parent))
    return re.search("Mamba|Mixer|SSM", cls.__name__) is not None and leaf in _read_weights(cls)


# ---------------------------------------------------------------------- what is where
def _linear(lm: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    from transformers.pytorch_utils import Conv1D

    return [(name, module) for name, module in lm.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def _inside(lm: PreTrainedModel, beside: str | None) -> list[str]:
    """Linear layers of a module beside the decoder."""
    return [name for name, _ in _linear(lm) if beside is not None and name.startswith(f"{beside}.")]


def _fused(lm: PreTrainedModel) -> list[str]:
    """Three-dimensional weights of modules of experts."""
    found = []
    for name, module in lm.named_modules():
        if "expert" in f"{name.rpartition('.')[2]} {type(module).__name__}".lower():
            found += [f"{name}.{key}" for key, weight in module.named_parameters(recurse=False) if weight.ndim == 3]
    return found


def _routes(lm: PreTrainedModel, name: str) -> bool:
    parts = name.split(".")
    classes = (type(lm.get_submodule(".".join(parts[:i]))).__name__ for i in range(1, len(parts) + 1))
    return any(ROUTER.fullmatch(part) for part in parts) or any(re.search("Router|TopKGating", kind) for kind in classes)


def _block_names(lm: PreTrainedModel) -> tuple[str, ...]:
    blocks = {id(block) for block in repeated_blocks(lm)}
    return tuple(f"{name}." for name, module in lm.named_modules() if id(module) in blocks)


def _name_of(lm: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in lm.named_modules() if module is wanted)


def _reach(lm: PreTrainedModel) -> tuple[str, str]:
    """The prefix of the names of the decoder, and the name of the output layer."""
    return f"{_name_of(lm, decoder_of(lm))}.".removeprefix("."), _name_of(lm, lm.get_output_embeddings())


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


@cache
def _read_weights(cls: type) -> frozenset[str]:
    """Attributes whose `.weight` a class computes with outside of its constructor and weight initialization."""
    methods: Iterable[Callable[..., object]] = [
        value for key, value in vars(cls).items() if inspect.isfunction(value) and "init" not in key and "reset" not in key
    ]
    found: set[str] = set()
    for method in methods:
        try:
            source = inspect.getsource(method)
        except OSError:  # a class without a source file cannot be looked at
            continue
        found |= set(re.findall(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|is_|numel|data_ptr))", source))
    return frozenset(found)


# ---------------------------------------------------------------------- how PEFT is told
def _rewritten(network: PreTrainedModel, leaves: Iterable[str]) -> set[str]:
    """Names that PEFT takes for the experts of transformers 4 in this model, and aims at the fused ones: `gate_proj` of a shared expert."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    if not hasattr(getattr(network, "config", None), "model_type"):
        return set()
    found = set()
    for leaf in leaves:
        config = LoraConfig(target_modules=[leaf])
        try:
            convert_peft_config_for_transformers(config, network, None)
        except ValueError:  # "cannot convert gate_proj without up_proj"
            found.add(leaf)
            continue
        if leaf not in (config.target_modules or ()):
            found.add(leaf)
    return found


def _shortest(names: Sequence[str], every: Sequence[str], *, parts: int) -> list[str]:
    """Endings of at least `parts` words that cover `names` and none else of `every`."""
    wanted, verdicts, chosen = set(names), dict[str, bool](), set()
    for name in names:
        words = name.split(".")
        for count in range(min(parts, len(words)), len(words) + 1):
            ending = ".".join(words[-count:])
            if ending not in verdicts:
                verdicts[ending] = all(other in wanted for other in every if _ends(other, ending))
            if verdicts[ending]:
                chosen.add(ending)
                break
    return sorted(chosen)
