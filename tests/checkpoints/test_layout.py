"""A checkpoint of another model is refused by the names of the weights."""

from __future__ import annotations

from typing import Any

import pytest

from lit_rl.checkpoints.layout import check_adapters, check_layout
from lit_rl.errors import ConfigError


def test_more_may_be_stored_than_is_wanted() -> None:
    check_layout({"a": [2, 3], "base": [5]}, {"a": [2, 3]})
    with pytest.raises(ConfigError, match="lacks 1 of the 2 weights of this run: base"):
        check_layout({"a": [2, 3]}, {"a": [2, 3], "base": [5]})


def test_what_is_missing_is_named() -> None:
    wanted = {f"layer{i}": [1] for i in range(7)}
    with pytest.raises(ConfigError, match="lacks 6 of the 7 weights of this run: layer1, layer2, layer3, layer4, layer5 and 1 more"):
        check_layout({"layer0": [1], "other": [1]}, wanted)


def test_what_has_another_shape_is_named_with_both() -> None:
    with pytest.raises(ConfigError, match=r"1 of 2 weights .* b is \[4, 32\] there and \[8, 32\] here; .*lora.rank"):
        check_layout({"a": (2,), "b": (4, 32)}, {"a": [2], "b": [8, 32]})


@pytest.mark.parametrize("name", ["policy.net.to_k.lora_A.default.weight", "policy.reference_network.to_k.weight", "policy.a.frozen.b"])
def test_what_would_be_dropped_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"1 weights of adapters or of a reference that this run would drop: {name}"):
        check_layout({"a": [1], name: [1]}, {"a": [1]})


def adapter(rank: int = 4, alpha: float = 8.0, layers: tuple[str, ...] = ("q", "k"), **scaling: float) -> dict[str, Any]:
    return {"policy": {"rank": rank, "alpha": alpha, "layers": {name: [rank, scaling.get(name, alpha / rank)] for name in layers}}}


LORA = "model.init_args.policy.init_args.lora"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (adapter(layers=("q",)), rf"{LORA}.targets: the checkpoint's adapter sits on 2 layers and this run's on 1, e.g. k "),
        (adapter(rank=2), rf"{LORA}.rank: .* trained with 4 and this run has 2, another rank; set {LORA}.rank to 4"),
        (adapter(alpha=64.0), rf"{LORA}.alpha: .* trained with 8 and this run has 64, .*; set {LORA}.alpha to 8"),
        (adapter(q=4.0), rf"{LORA}.initial: 1 layers have another strength alpha / rank in the checkpoint, e.g. q 2 there and 4 here"),
    ],
)
def test_an_adapter_elsewhere_or_of_another_strength_is_refused(other: dict[str, Any], said: str) -> None:
    check_adapters(adapter(), adapter())
    check_adapters({}, other)
    with pytest.raises(ConfigError, match=said):
        check_adapters(adapter(), other)
