"""Memory that does not suffice is told with its phase, the option to turn, and its next value."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy import ToyData, toy_method, toy_trainer
from toy_text import Digits, policy, trainer

from lit_rl.command_line.out_of_memory import out_of_memory
from lit_rl.methods.grpo import GRPO
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Sampling
from lit_rl.rollouts.native import NativeEngine


def fails(*_: object, **__: object) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB")


def ended(run: Callable[[], object], module: object, *, accumulate: int = 1) -> str:
    with pytest.raises(torch.OutOfMemoryError) as raised:
        run()
    return out_of_memory(raised.value, module, accumulate) or ""


def grpo(folder: Path, **settings: Any) -> GRPO:
    answers = Answers(engine=NativeEngine(batch=16), sampling=Sampling(max_new_tokens=4))
    adam = partial(torch.optim.AdamW, lr=1e-3)
    return GRPO(policy(folder), prompts_per_iteration=4, group_size=2, answers=answers, optimizer=adam, **settings)


def fit(method: GRPO, **settings: Any) -> Callable[[], object]:
    return lambda: trainer(max_epochs=1, limit_val_batches=0, **settings).fit(method, datamodule=Digits())


def test_answers(sorting_lm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = grpo(sorting_lm)
    monkeypatch.setattr("lit_rl.rollouts.decoder.Decoder.step", fails)
    told = ended(fit(method), method)
    assert told.startswith("out of memory while answers were generated (2.50 GiB more were asked for): lower model.answers.engine.")
    assert "init_args.batch (now 16) to 8; python -m lit_rl.doctor" in told


def test_training(sorting_lm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = grpo(sorting_lm)
    monkeypatch.setattr(type(method.surrogate), "__call__", fails)
    assert "in a forward or backward pass of training" in (told := ended(fit(method), method, accumulate=2))
    assert "raise trainer.accumulate_grad_batches (now 2) to 4, which halves what a forward holds" in told
    method = grpo(sorting_lm, micro_batch_tokens=40)
    assert "lower model.micro_batch_tokens (now 40) to 20" in ended(fit(method), method)


def test_the_optimizers_step(sorting_lm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = grpo(sorting_lm)
    monkeypatch.setattr(torch.optim.AdamW, "_init_group", fails)
    assert "in the optimizer's step" in (told := ended(fit(method), method)) and "configs/base/lora.yaml, fsdp.yaml" in told


def test_weights(sorting_lm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = grpo(sorting_lm)
    monkeypatch.setattr("lit_rl.policies.causal_lm.read_lm", fails)
    assert "while weights were read" in ended(fit(method), method)


def test_samples_and_evaluation_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = toy_method()
    monkeypatch.setattr(type(method.policy), "velocity", fails)
    data = ToyData()
    told = ended(lambda: toy_trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(method, datamodule=data), method)
    assert (
        f"while samples were drawn (2.50 GiB more were asked for): lower model.rollout_micro_batch (now {method.rollout_micro_batch}) to"
        in told
    )
    shown = ended(lambda: toy_trainer(tmp_path, limit_val_batches=1).validate(method, datamodule=data), method)
    assert "in evaluation" in shown and f"lower data.eval_batch_size (now {data.eval_batch_size}) to" in shown


def called_from(path: str, function: str) -> Callable[[], object]:
    """A call that fails in a function of that name and file."""
    names: dict[str, Any] = {}
    exec(compile(f"def {function}(f):\n    f()", path, "exec"), names)
    return lambda: names[function](fails)


def test_a_reward_in_the_process() -> None:
    told = ended(called_from("/x/lit_rl/rewards/text/model.py", "score"), None)
    assert "in a reward model" in told and "lower the batch_size of the reward model" in told


def test_the_host() -> None:
    cpu = RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes"
    )
    assert "out of memory (8.00 GiB more were asked for)" in (out_of_memory(cpu, None, 1) or "")
    assert out_of_memory(RuntimeError("shapes differ"), None, 1) is None


def test_a_batch_of_one_cannot_be_halved() -> None:
    engine = SimpleNamespace(batch=1)
    told = ended(called_from("/x/lit_rl/rollouts/under_way.py", "advance"), SimpleNamespace(answers=SimpleNamespace(engine=engine)))
    assert "init_args.batch is 1 already: keep less of the model on each device" in told
