"""Each way to keep a reference costs what it says and follows the trained weights only when it is refreshed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fill import build_fill, fill_policy

from lit_rl.errors import ConfigError
from lit_rl.policies.flux_fill import FluxFillPolicy
from lit_rl.policies.weights.reference import AdapterOff, FrozenAdapter, FrozenNetwork, NoReference, reference_of

LORA = {"rank": 2}
WAYS = {  # settings, names of what answers in the reference besides the base, in bytes per weight
    "style off": ({}, 0),
    "frozen style": ({"keep_reference": True}, 4),
    "style and adapter off": ({"lora": LORA}, 0),
    "frozen style and frozen adapter": ({"lora": LORA, "keep_reference": True}, 4),
    "frozen network": ({"train": "full", "keep_reference": True}, 4),
    "frozen network in bfloat16": ({"train": "full", "keep_reference": True, "dtype": "bfloat16"}, 2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fill(tmp_path_factory.mktemp("fill"))


@pytest.mark.parametrize("way", WAYS)
def test_the_memory_is_that_of_the_trained_weights_once_more_or_nothing(way: str, folder: Path) -> None:
    settings, width = WAYS[way]
    policy = fill_policy(folder, **settings)
    policy.load()
    trained = sum(p.numel() for _, p in policy.trainable())
    assert policy.reference_weights.bytes(policy) == width * trained
    held = sum(p.nbytes for name, p in policy.named_parameters() if any(key in name for key in (".frozen.", ".reference.", "reference_n")))
    assert held == width * trained


def changed(policy: FluxFillPolicy) -> None:
    with torch.no_grad():
        for _, p in policy.trainable():
            p += 1


@pytest.mark.parametrize("way", [way for way in WAYS if "frozen" in way])
def test_a_copy_follows_when_it_is_refreshed(way: str, folder: Path) -> None:
    policy = fill_policy(folder, **WAYS[way][0])
    policy.load()
    copies = {n: p for n, p in policy.named_parameters() if not p.requires_grad and (policy.full or ".frozen." in n or ".reference." in n)}
    first = {name: p.clone() for name, p in copies.items()}
    changed(policy)
    assert all(torch.equal(p, first[name]) for name, p in copies.items())
    policy.refresh_reference()
    assert all(torch.equal(p, (first[name].float() + 1).to(p.dtype)) or p.dtype == torch.bfloat16 for name, p in copies.items())
    assert not any(torch.equal(p, first[name]) for name, p in copies.items())


@pytest.mark.parametrize(
    ("adapter", "copied", "kind"),
    [(True, False, AdapterOff), (True, True, FrozenAdapter), (False, True, FrozenNetwork), (False, False, NoReference)],
)
def test_what_a_warm_up_leaves_behind_is_said_before_weights_are_read(adapter: bool, copied: bool, kind: Callable[[], object]) -> None:
    reference = reference_of(adapter=adapter, copied=copied)
    assert type(reference) is kind
    for after_warmup in (False, True):
        if (not adapter and not copied) or (after_warmup and not copied):
            with pytest.raises(ConfigError, match=r"set model\.policy\.keep_reference to true"):
                reference.check(after_warmup=after_warmup)
        else:
            reference.check(after_warmup=after_warmup)
