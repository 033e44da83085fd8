"""One sentence for memory that did not suffice: in which phase, and the option to turn with its next value."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

PHASES = (
    ("weights", r"lit_rl/policies/.*/(load|_read)$|/configure_model$"),
    ("reward", r"lit_rl/rewards/"),
    ("answers", r"lit_rl/rollouts/(native|under_way|decoder|cache|hf)\.py/"),
    ("training", r"lit_rl/.*/(each_action|loss|training_step)$|/(backward|_engine_run_backward)$"),
    ("step", r"torch/optim/|deepspeed/.*/step$"),
    ("evaluation", r"lit_rl/.*/(validation_step|test_step|predict_step)$"),
    ("samples", r"lit_rl/methods/.*/collect$"),
)
"""Names of phases, and patterns of `file/function` among the frames of an error; the first that fits is it: an optimizer calls the loss."""

DOING = {
    "weights": "while weights were read",
    "reward": "in a reward model",
    "answers": "while answers were generated",
    "training": "in a forward or backward pass of training",
    "step": "in the optimizer's step",
    "evaluation": "in evaluation",
    "samples": "while samples were drawn",
}
SMALLER = (
    "keep less of the model on each device: configs/base/lora.yaml, fsdp.yaml or deepspeed_zero3_offload.yaml before the run's own, and "
    "model.policy.gradient_checkpointing: true"
)


def is_out_of_memory(error: BaseException) -> bool:
    """A device's allocator, or that of the host, had nothing left."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("DefaultCPUAllocator: can't allocate memory" in said or "out of memory" in said)
    )


def phase_of(error: BaseException) -> str:
    """The phase that the error's frames tell, `other` where none does."""
    frames = traceback.extract_tb(error.__traceback__)
    names = [f"{Path(frame.filename).as_posix()}/{frame.name}" for frame in reversed(frames)]
    return next((phase for phase, pattern in PHASES if any(re.search(pattern, name) for name in names)), "other")


def out_of_memory(error: BaseException, module: object, accumulate: int) -> str | None:
    """A sentence; None for any other error. module: The method that ran; accumulate: trainer.accumulate_grad_batches."""
    if not is_out_of_memory(error):
        return None
    phase = phase_of(error)
    told = re.search(r"[Tt]ried to allocate (?:([\d.]+ ?[KMGT]i?B)|(\d+) bytes)", str(error))
    size = "" if told is None else f" ({told[1] or f'{int(told[2]) / 2**30:.2f} GiB'} more were asked for)"
    where = f" {DOING[phase]}" if phase in DOING else ""
    remedy = REMEDIES.get(phase, _of_training)(module, accumulate)
    return f"out of memory{where}{size}: {remedy}; python -m lit_rl.doctor --config RUN estimates what a run needs"


def _lower(option: str, value: object, default: int) -> str:
    now = value if isinstance(value, int) and not isinstance(value, bool) else default
    shown = f"{now}" if isinstance(value, int) else f"unset, at most {default}"
    return f"lower {option} (now {shown}) to {max(1, now // 2)}" if now > 1 else f"{option} is 1 already: {SMALLER}"


def _of_answers(module: object, accumulate: int) -> str:
    engine = getattr(getattr(module, "answers", None), "engine", None)
    return _lower("model.answers.engine.init_args.batch", getattr(engine, "batch", None), 64)


def _of_samples(module: object, accumulate: int) -> str:
    return _lower("model.rollout_micro_batch", getattr(module, "rollout_micro_batch", None), 8)


def _of_evaluation(module: object, accumulate: int) -> str:
    data = getattr(getattr(module, "trainer", None), "datamodule", None)
    return _lower("data.eval_batch_size", getattr(data, "eval_batch_size", None), 8)


def _of_training(module: object, accumulate: int) -> str:
    for name in ("micro_batch_tokens", "train_micro_batch"):
        if isinstance(value := getattr(module, name, None), int):
            return _lower(f"model.{name}", value, value)
    return f"raise trainer.accumulate_grad_batches (now {accumulate}) to {2 * accumulate}, which halves what a forward holds"


def _of_reward(module: object, accumulate: int) -> str:
    return "lower the batch_size of the reward model, or ask it in a reward server on another device (docs/rewards.md)"


def _of_weights(module: object, accumulate: int) -> str:
    return SMALLER


REMEDIES: Mapping[str, Callable[[object, int], str]] = {
    "weights": _of_weights,
    "step": _of_weights,
    "reward": _of_reward,
    "answers": _of_answers,
    "samples": _of_samples,
    "evaluation": _of_evaluation,
    "training": _of_training,
}
