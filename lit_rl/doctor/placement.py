"""The share of weights, gradients and moments that a process holds under each strategy, from a run's options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jsonargparse import Namespace
from torch import nn

GIB = 2**30
LIBRARIES, MESSAGES = 0.7 * GIB, 0.8 * GIB
"""CUDA's context with the kernels of torch; NCCL's buffers where processes talk to each other."""
BUCKET, LIVE = 2e8, 1e9
"""Numbers in a buffer of DeepSpeed's for sending, and gathered at once in stage 3, as Lightning and DeepSpeed set them."""


@dataclass(frozen=True)
class Line:
    """Bytes that are there during one phase of an iteration, or always."""

    what: str
    bytes: float
    phase: str = ""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Processes of a run, what each holds, and in which precisions it computes.

    autocast: lower precision of mixed precision. whole: dtype of all weights under DeepSpeed. gather: `gather_dtype` of FSDP2.
    """

    processes: int = 1
    kind: Literal["one", "ddp", "fsdp", "zero"] = "one"
    stage: int = 0
    offloads: frozenset[str] = frozenset()
    views: bool = True
    autocast: torch.dtype | None = None
    whole: torch.dtype | None = None
    gather: torch.dtype | None = None
    accumulate: int = 1
    gpu: bool = True

    @classmethod
    def of(cls, trainer: Namespace, *, processes: int, gpu: bool) -> Placement:
        """The placement of a run's `trainer` options."""
        strategy, precision = trainer.strategy, str(trainer.precision)
        path = strategy if isinstance(strategy, str) else strategy.class_path
        options = {} if isinstance(strategy, str) else (strategy.get("init_args") or Namespace()).as_dict()
        lower = torch.bfloat16 if "bf16" in precision else torch.float16 if "16" in precision else None
        accumulate = int(trainer.accumulate_grad_batches or 1)
        if path.endswith("ZeroStrategy"):
            offloads = frozenset(name for name in ("optimizer", "parameters") if options.get(f"offload_{name}"))
            stage = int(options.get("stage") or 2)
            return cls(
                processes=processes,
                kind="zero",
                stage=stage,
                offloads=offloads,
                whole=lower or torch.float32,
                accumulate=accumulate,
                gpu=gpu,
            )
        if path.endswith("FSDP2Strategy"):
            gather = getattr(torch, str(options.get("gather_dtype")), None)
            return cls(processes=processes, kind="fsdp", gather=gather, autocast=lower, accumulate=accumulate, gpu=gpu)
        views = bool(options.get("gradient_as_bucket_view"))
        kind: Literal["one", "ddp"] = "ddp" if processes > 1 else "one"
        return cls(processes=processes, kind=kind, views=views, autocast=lower, accumulate=accumulate, gpu=gpu)

    @property
    def cuts_weights(self) -> bool:
        """Weights are in shards between uses."""
        return self.kind == "fsdp" or (self.kind == "zero" and self.stage == 3)

    @property
    def computes_in(self) -> torch.dtype | None:
        """The precision that all weights have while they are used; None where it is that in which they are kept."""
        return self.gather if self.kind == "fsdp" else self.whole

    def share(self, of: Literal["weights", "gradients", "moments"]) -> float:
        """The part of them on the GPU of a process."""
        offloaded = ("parameters" if of == "weights" else "optimizer") in self.offloads
        if offloaded and (of != "weights" or self.stage == 3):
            return 0.0
        cut = self.kind == "fsdp" or (self.kind == "zero" and self.stage >= {"moments": 1, "gradients": 2, "weights": 3}[of])
        return 1 / self.processes if cut else 1.0

    def of_weights(self, networks: Mapping[str, nn.Module]) -> list[Line]:
        """Weights of each network, and the float32 ones beside DeepSpeed's."""
        share, lines = self.share("weights"), []
        for name, network in networks.items():
            for trained, what in ((True, "trained"), (False, "frozen")):
                numbers = [p for p in network.parameters() if p.requires_grad is trained]
                size = sum(p.numel() * (self.whole.itemsize if self.whole else p.itemsize) for p in numbers)
                lines.append(Line(f"weights of the {name}, {what}", share * size))
        if self.kind == "zero":
            lines.append(Line("float32 weights of the optimizer", 4 * trained_numbers(networks.values()) * self.share("moments")))
        return lines

    def of_gradients(self, networks: Sequence[nn.Module]) -> list[Line]:
        """Gradients, from the first backward of a step to its end; buckets of DDP stay."""
        count, share = trained_numbers(networks), self.share("gradients")
        if self.kind == "zero":
            assert self.whole is not None
            buckets = min(BUCKET, count) * self.whole.itemsize * 2
            step = Line("gradients in float32", 4 * count * self.share("moments"), "update")
            return [*_during("gradients", self.whole.itemsize * count * share), step, Line("buckets of DeepSpeed", buckets)]
        size = sum(p.nbytes for network in networks for p in network.parameters() if p.requires_grad) * share
        if self.kind == "ddp":
            return [Line("gradients (buckets of DDP)", size), *([] if self.views else _during("gradients beside their buckets", size))]
        return _during("gradients", size)

    def of_gathering(self, networks: Mapping[nn.Module, Sequence[nn.Module]]) -> list[Line]:
        """Weights that are gathered while they are used, with what is sent back in backward."""
        if not self.cuts_weights:
            return []
        whole = sum(p.numel() for network in networks for p in network.parameters())
        if self.kind == "zero":
            assert self.whole is not None
            return [Line("weights gathered", min(whole, LIVE) * self.whole.itemsize, phase) for phase in ("rollout", "training")]
        most, root, learns = 0, 0, 0
        for network, blocks in networks.items():
            sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
            most, root = max(most, *sizes), max(root, sum(p.numel() for p in network.parameters()) - sum(sizes))
            inside = {id(p) for block in blocks for p in block.parameters()}
            learns = max(learns, sum(p.numel() for p in network.parameters() if p.requires_grad and id(p) not in inside))
        size = self.gather.itemsize if self.gather else 4
        gathered = (2 * most + root) * size
        back = trained_share(networks) * most * (size + 4) + learns * size
        return [
            Line("weights gathered", gathered, "rollout"),
            Line("weights gathered, gradients sent", gathered + back, "training"),
        ]

    def of_libraries(self) -> list[Line]:
        """Memory that no tensor has."""
        return [Line("CUDA and its libraries", LIBRARIES + (MESSAGES if self.processes > 1 else 0))] if self.gpu else []


def trained_numbers(networks: Iterable[nn.Module]) -> int:
    """Numbers that training changes."""
    return sum(p.numel() for network in networks for p in network.parameters() if p.requires_grad)


def trained_share(networks: Mapping[nn.Module, Sequence[nn.Module]]) -> float:
    """The part of the numbers of the blocks that is trained."""
    numbers = [p for blocks in networks.values() for block in blocks for p in block.parameters()]
    return sum(p.numel() for p in numbers if p.requires_grad) / max(1, sum(p.numel() for p in numbers))


def _during(what: str, size: float) -> list[Line]:
    return [Line(what, size, phase) for phase in ("training", "update")]
