"""Figures of networks of many equal blocks, from copies of one and two blocks of each kind: a 7B model costs what three layers cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby

from torch import nn

Kind = tuple[tuple[str, tuple[int, ...]], ...]
Blocks = Mapping[nn.Module, Sequence[nn.Module]]
"""The repeated blocks of each network."""


def kind_of(block: nn.Module) -> Kind:
    """Blocks with weights of the same names and shapes are of one kind."""
    return tuple((name, tuple(p.shape)) for name, p in block.named_parameters())


def extrapolated(blocks: Blocks, measure: Callable[[], Sequence[float]]) -> list[float]:
    """base + sum_k (n_k - 1) (m_k - base): `measure` of networks with n_k blocks of kind k, in the number of which it is linear.

    base: with one block of each kind; m_k: with two of kind k.
    """
    counts: dict[Kind, int] = {}
    for own in blocks.values():
        here: dict[Kind, int] = {}
        for block in own:
            here[kind_of(block)] = here.get(kind_of(block), 0) + 1
        counts |= {kind: max(count, counts.get(kind, 0)) for kind, count in here.items()}
    with shallow(blocks, None):
        base = list(measure())
    found = list(base)
    for kind in (kind for kind, count in counts.items() if count > 1):
        with shallow(blocks, kind):
            more = measure()
        found = [value + (counts[kind] - 1) * (two - one) for value, two, one in zip(found, more, base, strict=True)]
    return found


@contextmanager
def shallow(blocks: Blocks, twice: Kind | None) -> Iterator[None]:
    """Inside it each network has the first block of each kind alone, and the first two of the kind `twice`."""
    changed: list[tuple[nn.Module, str, nn.ModuleList]] = []
    try:
        for network, own in blocks.items():
            known = {id(block) for block in own}
            for parent, name, children in [(m, n, c) for m in network.modules() for n, c in m.named_children()]:
                if isinstance(children, nn.ModuleList) and any(id(child) in known for child in children):
                    changed.append((parent, name, children))
                    parent.register_module(name, nn.ModuleList(_chosen(list(children), twice)))
        yield
    finally:
        for parent, name, children in changed:
            parent.register_module(name, children)


def _chosen(children: Sequence[nn.Module], twice: Kind | None) -> list[nn.Module]:
    places = sorted(range(len(children)), key=lambda i: kind_of(children[i]))
    kept = {kind: list(group)[: 2 if kind == twice else 1] for kind, group in groupby(places, key=lambda i: kind_of(children[i]))}
    return [children[i] for i in sorted(i for group in kept.values() for i in group)]
