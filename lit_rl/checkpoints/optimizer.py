"""Optimizer and schedule of a continued run: moments from the checkpoint, settings from the options, the rate at its place in the curve."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lit_rl.errors import ConfigError

Groups = list[dict[str, object]]
Schedule = LRScheduler | ReduceLROnPlateau

SCHEDULED = ("lr", "initial_lr", "min_lr", "max_lr", "momentum", "base_momentum", "max_momentum", "betas")
"""Settings that torch's schedules write into the parameter groups."""

ADDED = ("initial_lr", "min_lr", "max_lr", "base_momentum", "max_momentum")
"""Those of them that no optimizer has by itself."""

COMPUTED = ("fused", "foreach", "capturable", "differentiable")
"""Settings that say how a step is computed: the moments lie where the checkpoint's had them."""

ON_PLATEAU = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
"""State of `ReduceLROnPlateau`."""

NEEDS_STATE = ("amsgrad", "centered")
"""Settings that add a moment, which the checkpoint of a run without them lacks."""

OF_WEIGHT_SHAPE = (
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg", "sum", "acc_delta", "prev",
)  # fmt: skip
"""Moments of torch's optimizers that have a number for every number of the weight. Those of other optimizers may be packed."""


def settings_of(optimizer: Optimizer) -> Groups:
    """Settings of each parameter group, and its number of tensors."""
    return [{k: v for k, v in group.items() if k != "params"} | {"tensors": len(group["params"])} for group in optimizer.param_groups]


def check_moments(stored: Mapping[str, object], new: Callable[[], Optimizer]) -> None:
    """Raise ConfigError where a checkpoint holds the moments of another optimizer than this run's.

    stored: `checkpoint["optimizer"]`. new: Makes an optimizer of this run.
    """
    if stored.get("groups"):
        check_same_optimizer(stored, new())


def check_same_optimizer(stored: Mapping[str, object], optimizer: Optimizer) -> None:
    """Raise ConfigError where the moments in a checkpoint are not those that `optimizer` needs.

    stored: `checkpoint["optimizer"]`: its class and the `settings_of` it at the start of the run.
    """
    here, name = settings_of(optimizer), type(optimizer).__name__
    there = _groups(stored)
    remedy = "continue with the model.optimizer it was written with, or start a new run from its weights (an export as policy.pretrained)"
    counts = [[group["tensors"] for group in groups] for groups in (there, here)]
    if counts[0] != counts[1]:
        raise ConfigError(f"the checkpoint's optimizer has groups of {counts[0]} weights, and this run's groups of {counts[1]}; {remedy}")
    if _names(there) != _names(here):
        raise ConfigError(f"the checkpoint holds the state of {stored['class']}, and model.optimizer is {name}; {remedy}")
    for group, before in zip(here, there):
        for key in NEEDS_STATE:
            if group.get(key) and not before.get(key):
                raise ConfigError(
                    f"model.optimizer: {key}=true needs moments that the checkpoint, written with {key}=false, lacks; {remedy}"
                )


def check_moment_shapes(states: Sequence[Mapping[str, object]], optimizer: Optimizer) -> None:
    """Raise ConfigError where the moments of a whole file are missing, or of other shapes than the weights.

    states: `checkpoint["optimizer_states"]`.
    """
    if not states:
        raise ConfigError("the checkpoint holds no state of an optimizer, with which training cannot go on: use another")
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    state = states[0].get("state")
    if not isinstance(state, Mapping):
        raise ConfigError(
            "the checkpoint's optimizer_states have no moments under `state`: it was changed after it was written, use another"
        )
    for i, moments in state.items():
        for name in OF_WEIGHT_SHAPE:
            moment = moments.get(name)
            if isinstance(moment, Tensor) and moment.shape != weights[i].shape:
                raise ConfigError(
                    f"the checkpoint's optimizer holds {name} of shape {list(moment.shape)} for weight {i}, which has "
                    f"{list(weights[i].shape)}: it was changed after it was written, use another"
                )


def follow_options(optimizer: Optimizer, settings: Groups, stored: Mapping[str, object], schedule: Schedule | None, *, step: int) -> None:
    """Give a restored optimizer the settings of this run's options, and the schedule its place after `step` optimizer steps.

    What has the same option as before stays as the checkpoint has it, for callbacks may have changed it on the way. With a schedule the
    learning rate is the one that an unbroken run with these options would have; `ReduceLROnPlateau` goes on from what it has seen.

    settings: `settings_of` the optimizer when the schedule was built. stored: `checkpoint["optimizer"]`, and the `schedules`' states.
    """
    before = _groups(stored) or [{} for _ in settings]
    schedules = stored["schedules"]
    assert isinstance(schedules, Sequence)
    plateau = next((state for state in schedules if "num_bad_epochs" in state), None)
    goes_on = plateau is not None and isinstance(schedule, ReduceLROnPlateau)
    anew = SCHEDULED if not goes_on and (schedule is not None or stored.get("scheduled")) else ()
    for group, options, old in zip(optimizer.param_groups, settings, before, strict=True):
        for key in [key for key in ADDED if key in group and key not in options]:
            del group[key]
        for key, value in options.items():
            if key not in ("tensors", *COMPUTED) and (key in anew or key not in old or old[key] != value):
                group[key] = value
    if isinstance(schedule, ReduceLROnPlateau):
        vars(schedule).update({key: plateau[key] for key in ON_PLATEAU} if plateau else {})
        metric = stored.get("metric")
        if plateau and isinstance(metric, float | int | Tensor):
            schedule.step(metric)
    elif schedule is not None:
        _advance(schedule, step)


def _advance(schedule: LRScheduler, step: int) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*lr_scheduler.step\(\)")  # no optimizer step came before these
            for _ in range(step):
                schedule.step()
    except ValueError as error:
        raise ConfigError(f"model.lr_scheduler ends before optimizer step {step}, where the checkpoint continues: {error}") from error


def _groups(stored: Mapping[str, object]) -> Groups:
    groups = stored.get("groups")
    return list(groups) if isinstance(groups, Sequence) else []


def _names(groups: Groups) -> list[set[str]]:
    return [{*group} - {*ADDED, *COMPUTED, "tensors", "param_names"} for group in groups]
