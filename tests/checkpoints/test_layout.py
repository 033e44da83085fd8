"""A checkpoint of another model is refused by the names of the weights."""

from __future__ import annotations

import pytest

from lit_rl.checkpoints.layout import check_layout
from lit_rl.errors import ConfigError


def test_more_may_be_stored_than_is_wanted() -> None:
    check_layout({"a": [2, 3], "base": [5]}, {"a": [2, 3]})


def test_what_is_missing_is_named() -> None:
    wanted = {f"layer{i}": [1] for i in range(7)}
    with pytest.raises(ConfigError, match="lacks 6 of the 7 weights of this run: layer1, layer2, layer3, layer4, layer5 and 1 more"):
        check_layout({"layer0": [1], "other": [1]}, wanted)


def test_what_has_another_shape_is_named_with_both() -> None:
    with pytest.raises(ConfigError, match=r"1 of 2 weights .* b is \[4, 32\] there and \[8, 32\] here; .*lora.rank"):
        check_layout({"a": (2,), "b": (4, 32)}, {"a": [2], "b": [8, 32]})
