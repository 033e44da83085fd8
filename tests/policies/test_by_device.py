"""What a run leaves to the device: chosen on a GPU (whose properties are made up here), left alone on a CPU, and no number differs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import MakePolicy

from lit_rl import seeding
from lit_rl.command_line.usual import set_float32_matmul
from lit_rl.miniatures.lm import build_lm
from lit_rl.policies import by_device
from lit_rl.policies.by_device import Place, settle
from lit_rl.policies.causal_lm import CausalLM

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], None]:
    """gpu(capability): this process has such a GPU, Triton, flash-attn and a C compiler."""

    def have(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(by_device, "find_spec", lambda name: object())
        monkeypatch.setattr(by_device.shutil, "which", lambda name: "/usr/bin/cc")

    return have


def compiled(policy: Any) -> list[bool]:
    return [block._compiled_call_impl is not None for block in policy.blocks(policy.network)]


def test_blocks_are_compiled_on_a_gpu_that_it_pays_on(
    make_policy: MakePolicy, make_inputs: Callable[..., SimpleNamespace], gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And compiled blocks give the velocity and the gradients of plain ones (traced as on a GPU, run by plain kernels)."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    gpu((8, 0))
    plain, policy = make_policy("sd3", compile=False), make_policy("sd3")
    for place in (Place(CPU), Place(GPU, fetches=True)):
        assert not settle(policy, place) and not any(compiled(policy))
    [sentence] = settle(policy, Place(GPU))
    assert "model.policy.compile: false" in sentence and all(compiled(policy))
    assert not settle(plain, Place(GPU)) and not any(compiled(plain))
    batch = make_inputs(plain)
    v, expected = (p.velocity(batch.x, batch.t, batch.cond) for p in (policy, plain))
    torch.testing.assert_close(v, expected, rtol=0, atol=1e-5)
    v.square().mean().backward()
    expected.square().mean().backward()
    for (name, mine), (_, theirs) in zip(policy.trainable(), plain.trainable(), strict=True):
        if theirs.grad is not None:
            assert torch.allclose(mine.grad, theirs.grad, atol=1e-5), name
    gpu((7, 5))
    assert not Place(GPU).compiles() and not Place(GPU, half=True).varlen()
    monkeypatch.setattr(by_device, "find_spec", lambda name: None)
    gpu((9, 0))
    monkeypatch.setattr(by_device, "find_spec", lambda name: None)
    assert not Place(GPU).compiles() and not Place(GPU, half=True).varlen()


def test_sequences_side_by_side_take_flash_attention_where_it_is(
    tmp_path: Path, gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu((9, 0))
    folder, chosen = build_lm(tmp_path, hidden=32), []
    for settings in ({}, {"padding_free": True}, {"padding_free": True, "attention": "sdpa"}):
        policy = CausalLM(str(folder), **settings)  # type: ignore[arg-type]
        policy.load()
        monkeypatch.setattr(type(policy.network.lm), "set_attn_implementation", lambda lm, name: chosen.append(name))
        for place in (Place(CPU, half=True), Place(GPU), Place(GPU, half=True)):
            told = settle(policy, place)
            assert bool(told) == (settings == {"padding_free": True} and place == Place(GPU, half=True))
        assert not any(compiled(policy))  # lengths differ
    assert chosen == ["flash_attention_2"]


def test_tf32_is_for_gpus_that_have_it(gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for capability, expected in {(8, 0): "high", (9, 0): "high", (7, 5): "highest"}.items():
            gpu(capability)
            assert set_float32_matmul(None, GPU) == expected == torch.get_float32_matmul_precision()
        assert set_float32_matmul(None, CPU) == "highest" == torch.get_float32_matmul_precision()
        assert set_float32_matmul("medium", CPU) == "medium" == torch.get_float32_matmul_precision()
        monkeypatch.setattr(torch.version, "hip", "6.0")
        gpu((9, 0))
        assert set_float32_matmul(None, GPU) == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


def test_noise_for_a_gpu_is_drawn_into_pinned_memory_and_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, asked = [(1, "a"), (2, "b")], []
    expected = seeding.normal(keys, (3, 2))
    empty, move = torch.empty, torch.Tensor.to

    def watched_empty(*size: int, pin_memory: bool = False) -> torch.Tensor:
        asked.append(pin_memory)
        return empty(*size)

    def watched_move(x: torch.Tensor, device: torch.device, *, non_blocking: bool = False) -> torch.Tensor:
        asked.append((device.type, non_blocking))
        return move(x, CPU)

    monkeypatch.setattr(seeding.torch, "empty", watched_empty)
    monkeypatch.setattr(torch.Tensor, "to", watched_move)
    found = seeding.normal(keys, (3, 2), GPU)
    monkeypatch.undo()
    assert asked == [True, ("cuda", True)]
    assert torch.equal(found, expected)
