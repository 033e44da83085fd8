"""Whole weights are pushed in the dtype that the servers hold them in, which changes nothing but their size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fake_server import FakeServer
from safetensors.torch import load_file
from test_http import LORA, loaded, move, pushed

from lit_rl.errors import ConfigError
from lit_rl.rollouts.http import HTTPEngine
from lit_rl.rollouts.push import gather, sum_of_bits

ROUGH = 0.05
"""Of a server in bfloat16."""


@pytest.fixture
def rounding(base: Path) -> Iterator[FakeServer]:
    with FakeServer(base, dtype=torch.bfloat16) as running:
        yield running


def files(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the newest push."""
    newest = max((folder / "sync").iterdir(), key=lambda path: path.stat().st_mtime)
    return {name: tensor for file in newest.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dialect", ["openai", "vllm"])
def test_the_server_says_in_which_dtype(dialect: str, base: Path, rounding: FakeServer, tmp_path: Path) -> None:
    """What it holds after a push in its dtype is, bit for bit, what it holds after one in float32."""
    policy = loaded(base, None, shift=0.05)
    made = pushed(rounding, tmp_path / "told", policy, dialect=dialect, probe_tolerance=ROUGH)
    assert made.push_dtype is torch.bfloat16 and {t.dtype for t in files(tmp_path / "told").values()} == {torch.bfloat16}
    held = {name: weight.clone() for name, weight in rounding.model.state_dict().items()}
    move(policy, 0.05)
    made.update_weights(1)
    move(policy, -0.05)
    pushed(rounding, tmp_path / "given", policy, dialect=dialect, dtype="float32", probe_tolerance=ROUGH)
    assert {t.dtype for t in files(tmp_path / "given").values()} == {torch.float32}
    exact = {name: weight for name, weight in policy.network.lm.state_dict().items()}
    for name, weight in rounding.model.state_dict().items():
        assert torch.equal(weight, exact[name].to(torch.bfloat16))
        assert torch.allclose(weight, held[name], atol=1e-2)


def test_a_server_that_does_not_say_gets_what_is_trained_or_what_is_asked_for(base: Path, rounding: FakeServer, tmp_path: Path) -> None:
    rounding.tells_settings = False
    policy = loaded(base, None, shift=0.05)
    for dtype, expected in ((None, torch.float32), ("bfloat16", torch.bfloat16)):
        folder = tmp_path / str(dtype)
        pushed(rounding, folder, policy, dtype=dtype, probe_tolerance=ROUGH)
        assert {tensor.dtype for tensor in files(folder).values()} == {expected}
    pushed(rounding, tmp_path / "sglang", policy, dialect="sglang", dtype="bfloat16", probe_tolerance=ROUGH)
    assert {tensor.dtype for tensor in files(tmp_path / "sglang").values()} == {torch.bfloat16}


def test_servers_of_different_dtypes_get_what_is_trained(base: Path, server: FakeServer, rounding: FakeServer, tmp_path: Path) -> None:
    made = HTTPEngine([server.url, rounding.url], str(tmp_path / "sync"), probe_tolerance=ROUGH, health_s=5.0)
    made.setup(loaded(base, None), rank=0, world_size=1)
    assert made.push_dtype is None


def test_adapters_are_pushed_as_they_are(base: Path, rounding: FakeServer, tmp_path: Path) -> None:
    made = pushed(rounding, tmp_path, loaded(base, LORA, shift=0.05), dtype="bfloat16", probe_tolerance=ROUGH)
    assert made.push_dtype is None and {tensor.dtype for tensor in files(tmp_path).values()} == {torch.float32}


def test_weights_that_a_model_keeps_in_float32_stay_so(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = loaded(base, None)
    monkeypatch.setattr(policy.network.lm, "_keep_in_fp32_modules_strict", {"lm_head"})
    dtypes = {name.rpartition("lm.")[2]: tensor.dtype for name, tensor in gather(policy, torch.bfloat16).items()}
    assert {name for name, dtype in dtypes.items() if dtype is torch.float32} == {"lm_head.weight"} and len(dtypes) > 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("size", [0, 1, 2, 7, 8, 33])
def test_a_change_of_any_element_changes_the_sum_of_bits(dtype: torch.dtype, size: int) -> None:
    """Wherever the tensor begins in its storage: a shard is a part of one."""
    drawn = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    room = torch.zeros(size + 1, dtype=dtype)
    room[1:] = drawn
    before = sum_of_bits(drawn)
    assert sum_of_bits(room[1:]) == before and (not size or sum_of_bits(torch.stack([drawn, drawn]).T[:, 0]) == before)
    changed = []
    for i in range(size):
        moved = drawn.clone()
        moved[i] = moved[i].float() + 0.5
        changed.append(sum_of_bits(moved))
    assert before not in changed


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match="engine.dtype='int8': choose one of float32, bfloat16, float16"):
        HTTPEngine("localhost:8000", "sync", dtype="int8")  # type: ignore[arg-type]
