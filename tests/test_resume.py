"""A run that is stopped again and again, anywhere, ends as the one that is left alone: weights, optimizer, counters, metrics, callbacks."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from test_kill_and_resume import differences
from toy import ToyData, ToyPolicy, toy_method, toy_trainer, with_parts
from toy_text import Digits, Sorted, model_folder, policy, trainer

from callbacks.ema import EMA
from callbacks.graceful_stop import GracefulStop
from callbacks.old_policy import EMAOldPolicy, OldPolicySync
from callbacks.reward_scoring import RewardScoring
from callbacks.rng_state import RngState
from lit_rl.credit.advantage import Advantage
from lit_rl.errors import ConfigError
from lit_rl.losses.kl import KL, RewardKL
from lit_rl.losses.surrogates import Clip
from lit_rl.methods.diffusion_nft import DiffusionNFT
from lit_rl.methods.dpo import DPO
from lit_rl.methods.flow_grpo import DanceGRPO, FlowGRPO, GRPOGuard, MixGRPO
from lit_rl.methods.grpo import DAPO, GRPO, RLOO
from lit_rl.methods.ppo import PPO, CriticTraining
from lit_rl.methods.sft import SFT
from lit_rl.modules.dynamic import DynamicSampling
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.base import Sampling


class Stopped(Exception):
    """The process is gone."""


class Watch(L.Callback):
    """Counts the moments at which a process can die, and dies at number `at`. Its state is what every epoch logged."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.moments = at, 0
        self.rows: dict[int, dict[str, float]] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"rows": dict(self.rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = dict(state["rows"])

    def moment(self, *_: Any) -> None:
        self.moments += 1
        if self.moments == self.at:
            raise Stopped

    on_train_epoch_start = on_train_batch_start = on_validation_start = moment  # type: ignore[assignment]

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.rows[trainer.current_epoch] = {k: float(v) for k, v in trainer.callback_metrics.items() if "seconds" not in k}
        self.moment()


Run = Callable[[Path, list[L.Callback], "str | None"], object]
EVERY_STEP: dict[str, Any] = dict(every_n_train_steps=1, save_top_k=-1)


def checkpoints(folder: Path, kinds: Sequence[dict[str, Any]]) -> list[ModelCheckpoint]:
    return [ModelCheckpoint(dirpath=folder / str(i), filename="{epoch}-{step}", save_last=True, **kind) for i, kind in enumerate(kinds)]


def newest(folder: Path) -> str | None:
    files = list(folder.glob("*/last*.ckpt"))
    return str(max(files, key=lambda file: file.stat().st_mtime_ns)) if files else None


def play(folder: Path, run: Run, kinds: Sequence[dict[str, Any]] = (EVERY_STEP,), stops: Sequence[int] = ()) -> dict[str, Any]:
    """Start, die at the given moments, continue from the newest file: what the last one holds, and the last start's moments."""
    for at in (*stops, None):
        watch = Watch(at)
        try:
            run(folder, [RngState(), watch, *checkpoints(folder, kinds)], newest(folder))
            break
        except Stopped:
            pass
    path = newest(folder)
    assert path is not None
    return torch.load(path, weights_only=True) | {"metrics": watch.rows, "moments": watch.moments, "folder": str(folder)}


def odd(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Differences between the ends of two runs, except their folders and the place in a last epoch."""

    def told(run: dict[str, Any]) -> dict[str, Any]:
        callbacks = {k: str(v).replace(run["folder"], "") for k, v in run["callbacks"].items()}
        streams = [{k: v for k, v in rank.items() if k != "python"} for rank in run["rng"]]  # beartype draws from Python's, in tests
        run.get("rollout", {"metrics": {}})["metrics"].pop("reward/wait_seconds", None)
        return {k: v for k, v in run.items() if k not in ("moments", "folder", "logged")} | {"callbacks": callbacks, "rng": streams}

    return differences(told(a), told(b))


# ---------------------------------------------------------------------- flow models
def flow(*, old: Callable[[], OldPolicySync] | None = None, callbacks: Callable[[], list[L.Callback]] = list, **changes: Any) -> Run:
    """8 minibatches in an iteration (2 passes x 4), an optimizer step every 2; dropout, moving average, statistics by prompt."""
    settings: dict[str, Any] = dict(max_epochs=4, accumulate_grad_batches=2, enable_checkpointing=True, gradient_clip_val=1.0)
    settings |= changes.pop("trainer", {})
    model: dict[str, Any] = dict(inner_epochs=2, kl_coef=0.1)
    schedule = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=16)

    def run(folder: Path, after: list[L.Callback], path: str | None) -> None:
        L.seed_everything(0, verbose=False)
        given = model | dict(lr_scheduler=schedule, advantage=Advantage(kind="history")) | changes
        given["updates_per_iteration"] = 4 * given["inner_epochs"] // settings["accumulate_grad_batches"]
        if old is None:
            method: Any = toy_method(dropout=0.1, **given)
        else:
            adam = partial(torch.optim.AdamW, lr=1e-2)
            sizes: dict[str, Any] = dict(prompts_per_iteration=4, group_size=4, num_steps=4, eval_num_steps=4, warmup_batch_size=24)
            method = DiffusionNFT(ToyPolicy(dropout=0.1), optimizer=adam, **with_parts(DiffusionNFT, sizes | given))
        first = [old()] if old else []
        toy_trainer(folder, callbacks=[*first, EMA(0.9), *callbacks(), *after], **settings).fit(method, ToyData(), ckpt_path=path)

    return run


VALIDATE: dict[str, Any] = dict(limit_val_batches=1.0)
WARMUP: dict[str, Any] = dict(warmup_steps=3, warmup_lr=1e-3)
BEST: dict[str, Any] = dict(monitor="val/brightness", mode="max", save_top_k=2)
PLANS: dict[str, tuple[dict[str, Any], Sequence[dict[str, Any]]]] = {
    "every step": ({}, [EVERY_STEP]),
    "warm-up": (WARMUP, [EVERY_STEP]),
    "no accumulation": ({"trainer": {"accumulate_grad_batches": 1}}, [EVERY_STEP]),
    "old policy": ({"old": partial(OldPolicySync, {"value": 0.3, "end": 0.3}), **WARMUP}, [EVERY_STEP]),
    "old policy by steps": ({"old": EMAOldPolicy}, [EVERY_STEP]),
    "validation": ({"trainer": VALIDATE}, [EVERY_STEP]),
    "validation inside": ({"trainer": VALIDATE | {"val_check_interval": 0.5}}, [EVERY_STEP]),
    "validation by batches": ({"trainer": VALIDATE | {"val_check_interval": 3, "check_val_every_n_epoch": None}}, [EVERY_STEP]),
    "every second step": ({**WARMUP, "trainer": VALIDATE}, [dict(every_n_train_steps=2, save_top_k=-1)]),
    "epoch ends": ({"trainer": VALIDATE}, [dict(every_n_epochs=1, save_on_train_epoch_end=True)]),
    "ends of validation": ({"trainer": VALIDATE | {"val_check_interval": 0.5}}, [dict(every_n_epochs=1)]),
    "best and newest": ({**WARMUP, "trainer": VALIDATE}, [BEST, EVERY_STEP]),
    "any minibatch": ({}, [dict(train_time_interval=timedelta(0), save_top_k=-1)]),
}


@pytest.mark.parametrize("name", PLANS)
def test_flow_models(tmp_path: Path, name: str) -> None:
    changes, kinds = PLANS[name]
    run = flow(**changes)
    whole = play(tmp_path / "whole", run, kinds)
    draw = random.Random(name)
    stops = [draw.randrange(2, whole["moments"] // 3) for _ in range(3)]  # none after the last checkpoint
    assert odd(whole, play(tmp_path / "stopped", run, kinds, stops)) == [], stops


@pytest.mark.slow
def test_every_first_of_two_stops(tmp_path: Path) -> None:
    """The first one at every second moment of the first two epochs, the second one wherever it is from there."""
    changes, kinds = PLANS["best and newest"]
    run = flow(**changes | {"trainer": VALIDATE | {"max_epochs": 3}})
    whole = play(tmp_path / "whole", run, kinds)
    for first in range(2, whole["moments"] * 2 // 3, 2):
        second = 2 + 5 * first % (whole["moments"] - first - 2)
        assert odd(whole, play(tmp_path / str(first), run, kinds, [first, second])) == [], (first, second)


def test_a_checkpoint_of_the_last_minibatch_then_a_stop_inside_the_next_epoch(tmp_path: Path) -> None:
    """4 steps an epoch and 16 in all; the first stop before the 5th, the second before the 7th."""
    run = flow(inner_epochs=1, trainer={"accumulate_grad_batches": 1})
    whole = play(tmp_path / "whole", run)
    twice = play(tmp_path / "twice", run, stops=[7, 4])
    assert whole["global_step"] == twice["global_step"] == 16
    assert odd(whole, twice) == []


def test_the_rest_of_an_epoch_that_ran_out_of_time(tmp_path: Path) -> None:
    """`trainer.should_stop` (max_time, early stopping) leaves an epoch where it is; the next start goes on there."""

    class OutOfTime(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == self.at

    def run(folder: Path, after: list[L.Callback], path: str | None) -> None:
        limit = OutOfTime()
        limit.at = {None: 3}.get(path, 10 if folder.name == "stopped" else 99)  # type: ignore[attr-defined]
        limit.at = limit.at if folder.name == "stopped" else 99  # type: ignore[attr-defined]
        flow(callbacks=lambda: [limit, GracefulStop()])(folder, after, path)

    kinds = [dict(every_n_epochs=1, save_on_train_epoch_end=True, save_top_k=-1)]
    whole = play(tmp_path / "whole", run, kinds)
    play(tmp_path / "stopped", run, kinds)
    play(tmp_path / "stopped", run, kinds)
    stopped = play(tmp_path / "stopped", flow(callbacks=lambda: [GracefulStop()]), kinds)
    assert stopped["global_step"] == 16
    assert (
        differences([whole[k] for k in ("state_dict", "optimizer_states")], [stopped[k] for k in ("state_dict", "optimizer_states")]) == []
    )


# ---------------------------------------------------------------------- language models
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("lm"))


SHORT = Sampling(max_new_tokens=5)
ADAM = partial(torch.optim.AdamW, lr=1e-3)
SIZES: dict[str, Any] = dict(prompts_per_iteration=8, prompts_per_update=4, optimizer=ADAM)
ACTING: dict[str, Any] = SIZES | dict(group_size=2, answers=Answers(sampling=SHORT), inner_epochs=2)
TEXT: dict[str, Callable[[Path], Any]] = {
    "SFT": lambda f: SFT(policy(f), **SIZES),
    "DPO": lambda f: DPO(policy(f, keep_reference=True), **SIZES),
    "DPO, precomputed": lambda f: DPO(policy(f, keep_reference=False), reference="precomputed", **SIZES),
    "GRPO": lambda f: GRPO(policy(f, keep_reference=True), kl=KL(coef=0.1), **ACTING),
    "DAPO": lambda f: DAPO(policy(f), dynamic_sampling=DynamicSampling(prompts_per_generation=6, max_generations=30), **ACTING),
    "PPO": lambda f: PPO(
        policy(f, keep_reference=True),
        critic_training=CriticTraining(lr=1e-3, warmup=1),
        kl_in_reward=RewardKL(coef=0.05, target=0.01, horizon=50),
        **ACTING,
    ),
}


class Length(Sorted):
    """Most groups teach, whatever the model has learned."""

    def score(self, media: Sequence[str], info: Any) -> Any:
        return {"exact": torch.tensor([float(sum(map(ord, text)) % 7) for text in media])}


@pytest.mark.parametrize("name", TEXT)
def test_language_models(folder: Path, tmp_path: Path, name: str) -> None:
    def run(at: Path, after: list[L.Callback], path: str | None) -> None:
        L.seed_everything(0, verbose=False)
        settings: dict[str, Any] = dict(max_epochs=4, accumulate_grad_batches=2, enable_checkpointing=True, limit_val_batches=1)
        callbacks = [RewardScoring({"sorted": Length()}), EMA(0.9), *after]
        trainer(callbacks=callbacks, default_root_dir=at, **settings).fit(TEXT[name](folder), datamodule=Digits(), ckpt_path=path)

    whole = play(tmp_path / "whole", run)
    draw = random.Random(name)
    stops = [draw.randrange(2, whole["moments"] * 2 // 3) for _ in range(3)]
    assert odd(whole, play(tmp_path / "stopped", run, stops=stops)) == [], stops


# ---------------------------------------------------------------------- options beat checkpoints
S = torch.optim.lr_scheduler
TEN = [(i + 1) / 10 for i in range(10)]
SCHEDULES: dict[str, tuple[Any, Any]] = {
    "longer cosine": (partial(S.CosineAnnealingLR, T_max=4), partial(S.CosineAnnealingLR, T_max=12)),
    "line": (partial(S.LinearLR, total_iters=4), partial(S.LinearLR, start_factor=0.5, total_iters=10)),
    "steps": (partial(S.StepLR, step_size=2), partial(S.StepLR, step_size=3, gamma=0.5)),
    "milestones": (partial(S.MultiStepLR, milestones=[2]), partial(S.MultiStepLR, milestones=[2, 5, 7])),
    "exponential": (partial(S.ExponentialLR, gamma=0.9), partial(S.ExponentialLR, gamma=0.5)),
    "lambda": (partial(S.LambdaLR, lr_lambda=lambda t: 1.0), partial(S.LambdaLR, lr_lambda=lambda t: TEN[t % 10])),
    "power": (partial(S.PolynomialLR, total_iters=4), partial(S.PolynomialLR, total_iters=12, power=2.0)),
    "one cycle": (partial(S.OneCycleLR, max_lr=0.1, total_steps=4), partial(S.OneCycleLR, max_lr=0.1, total_steps=12)),
    "restarts": (partial(S.CosineAnnealingWarmRestarts, T_0=3), partial(S.CosineAnnealingWarmRestarts, T_0=5, T_mult=2)),
    "cycles": (
        partial(S.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=2),
        partial(S.CyclicLR, base_lr=0.01, max_lr=0.2, step_size_up=3),
    ),
    "another kind": (partial(S.StepLR, step_size=2), partial(S.CosineAnnealingLR, T_max=12)),
    "none before": (None, partial(S.CosineAnnealingLR, T_max=12)),
    "none now": (partial(S.CosineAnnealingLR, T_max=4), None),
    "a sequence": (
        lambda o: S.SequentialLR(o, [S.LinearLR(o, total_iters=2), S.StepLR(o, 1)], [2]),
        lambda o: S.SequentialLR(o, [S.LinearLR(o, total_iters=3), S.CosineAnnealingLR(o, T_max=9)], [3]),
    ),
}


class Rates(L.Callback):
    def __init__(self) -> None:
        self.rows: dict[int, tuple[float, ...]] = {}

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        group = trainer.optimizers[0].param_groups[0]
        self.rows[trainer.global_step] = (group["lr"], *group["betas"], group["weight_decay"])


def trained(
    folder: Path, epochs: int, path: Path | None = None, *, save: bool = False, optimizer: Any = None, **model: Any
) -> dict[int, tuple[float, ...]]:
    """Learning rate, betas and weight decay before each optimizer step; 2 steps in an iteration."""
    rates, kept = Rates(), ModelCheckpoint(dirpath=folder, filename="{epoch}-{step}", save_top_k=-1, every_n_train_steps=1)
    sizes: dict[str, Any] = dict(prompts_per_iteration=2, group_size=2, num_steps=2, eval_num_steps=1)
    method = toy_method(updates_per_iteration=2, optimizer=optimizer or partial(torch.optim.AdamW, lr=0.01), **sizes | model)
    settings: dict[str, Any] = dict(callbacks=[rates, *([kept] if save else [])], max_epochs=epochs, enable_checkpointing=save)
    toy_trainer(folder, **settings).fit(method, ToyData(), ckpt_path=path)
    return rates.rows


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_continued_run_is_on_the_curve_of_its_options(tmp_path: Path, name: str) -> None:
    before, now = SCHEDULES[name]
    trained(tmp_path / "a", 2, save=True, lr_scheduler=before)
    wanted = trained(tmp_path / "whole", 6, lr_scheduler=now)
    found = trained(tmp_path / "b", 6, tmp_path / "a" / "epoch=1-step=3.ckpt", lr_scheduler=now)
    assert found == {step: row for step, row in wanted.items() if step >= 3}


def test_a_longer_cosine_after_the_warm_up(tmp_path: Path) -> None:
    model: dict[str, Any] = dict(warmup_steps=2, warmup_lr=0.1)
    trained(tmp_path / "a", 2, save=True, lr_scheduler=partial(S.CosineAnnealingLR, T_max=2), **model)
    wanted = trained(tmp_path / "whole", 5, lr_scheduler=partial(S.CosineAnnealingLR, T_max=8), **model)
    found = trained(tmp_path / "b", 5, tmp_path / "a" / "epoch=1-step=4.ckpt", lr_scheduler=partial(S.CosineAnnealingLR, T_max=8), **model)
    assert found == {step: row for step, row in wanted.items() if step >= 4} and found[6][0] < 0.01


@pytest.mark.parametrize("at", ["epoch=1-step=3", "epoch=1-step=4", "epoch=2-step=6"])
def test_a_plateau_goes_on_from_what_it_has_seen(tmp_path: Path, at: str) -> None:
    """`patience` 0 and a metric that is never good enough: halved after every iteration but the first, which is the best."""
    plateau = partial(ReduceLROnPlateau, monitor="reward_mean", mode="max", patience=0, factor=0.5, threshold=10.0, min_lr=1e-9)

    def run(at: Path, path: Path | None = None) -> dict[int, tuple[float, ...]]:
        rates = Rates()
        kinds = [dict(every_n_epochs=1, save_on_train_epoch_end=True, save_top_k=-1)] if "step=3" not in str(path or at) else [EVERY_STEP]
        method = toy_method(updates_per_iteration=2, lr_scheduler=plateau)
        settings: dict[str, Any] = dict(callbacks=[rates, *checkpoints(at, kinds)], max_epochs=5, enable_checkpointing=True)
        toy_trainer(at, **settings).fit(method, ToyData(), ckpt_path=path)
        return rates.rows

    wanted = run(tmp_path / ("step=3" if "step=3" in at else "whole"))
    assert [wanted[step][0] for step in (0, 2, 4, 6, 8)] == [0.01, 0.01, 0.005, 0.0025, 0.00125]
    first = int(at.rpartition("=")[2])
    found = run(tmp_path / "b", tmp_path / ("step=3" if "step=3" in at else "whole") / "0" / f"{at}.ckpt")
    assert found == {step: row for step, row in wanted.items() if step >= first}


def test_settings_of_the_optimizer_are_those_of_the_options(tmp_path: Path) -> None:
    trained(tmp_path / "a", 2, save=True)
    path = tmp_path / "a" / "epoch=1-step=3.ckpt"
    other = partial(torch.optim.AdamW, lr=0.003, betas=(0.8, 0.9), weight_decay=0.5)
    assert trained(tmp_path / "b", 2, path, optimizer=other) == {3: (0.003, 0.8, 0.9, 0.5)}
    assert trained(tmp_path / "c", 2, path) == {3: (0.01, 0.9, 0.999, 0.01)}


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (partial(torch.optim.SGD, lr=0.1), "holds the state of AdamW, and model.optimizer is SGD; continue with"),
        (partial(torch.optim.RMSprop, lr=0.1), "holds the state of AdamW, and model.optimizer is RMSprop"),
        (partial(torch.optim.AdamW, lr=0.1, amsgrad=True), "amsgrad=true needs moments that the checkpoint"),
        (
            lambda p: torch.optim.AdamW([{"params": p[:1]}, {"params": p[1:]}]),
            r"groups of \[4\] weights, and this run's groups of \[1, 3\]",
        ),
    ],
)
def test_the_moments_of_another_optimizer_are_refused(tmp_path: Path, optimizer: Any, message: str) -> None:
    trained(tmp_path / "a", 1, save=True)
    with pytest.raises(ConfigError, match=message):
        trained(tmp_path / "b", 2, tmp_path / "a" / "epoch=0-step=2.ckpt", optimizer=optimizer)


def test_a_cycle_that_is_too_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ends after total_steps=3 optimizer steps, and this run has 12 .* set total_steps to 12"):
        trained(tmp_path, 6, lr_scheduler=partial(S.OneCycleLR, max_lr=0.1, total_steps=3))


def test_weights_alone_are_not_continued(tmp_path: Path) -> None:
    only = ModelCheckpoint(dirpath=tmp_path, filename="weights", save_weights_only=True)
    toy_trainer(tmp_path, callbacks=[only], enable_checkpointing=True, max_epochs=1).fit(toy_method(), ToyData())
    with pytest.raises(ConfigError, match="holds weights only"):
        toy_trainer(tmp_path).fit(toy_method(), ToyData(), ckpt_path=tmp_path / "weights.ckpt")


# ---------------------------------------------------------------------- options that a stored rollout was made with
Begun = Callable[[Callable[..., Run], dict[str, Any]], Path]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Begun:
    """begun(kind, options): folder with a checkpoint for each step of the run `kind(**options)`, which is made once."""
    made: dict[str, Path] = {}

    def run(kind: Callable[..., Run], options: dict[str, Any]) -> Path:
        key = f"{kind.__name__} {options}"
        if key not in made:
            at = tmp_path_factory.mktemp("begun")
            kind(**options)(at, checkpoints(at, [EVERY_STEP]), None)
            assert "rollout" in torch.load(inside(at / "0"), weights_only=True)
            made[key] = at / "0"
        return made[key]

    return run


def inside(folder: Path) -> str:
    """The checkpoint inside of iteration 0, after its first optimizer step."""
    return str(folder / "epoch=0-step=1.ckpt")


def flow_run(cls: Any = FlowGRPO, data: dict[str, Any] | None = None, **model: Any) -> Any:
    """A function that trains two iterations and returns the number of optimizer steps."""

    def fit(at: Path, after: list[L.Callback], path: str | None) -> int:
        method, run = toy_method(cls, **{"updates_per_iteration": 4} | model), toy_trainer(at, callbacks=after, enable_checkpointing=True)
        run.fit(method, ToyData(**data or {}), ckpt_path=path)
        return run.global_step

    return fit


@pytest.mark.parametrize(
    ("cls", "before", "now", "message"),
    [
        (
            FlowGRPO,
            {},
            {"noise_level": 0.3},
            r"model.sde.noise_level=0.3, and .* made with 0.7: continue with model.sde.noise_level=0.7",
        ),
        (FlowGRPO, {}, {"dynamics": "cps"}, "model.sde.dynamics=cps, .* made with flow_sde"),
        (FlowGRPO, {}, {"num_steps": 6}, "model.num_steps=6, .* made with 4"),
        (FlowGRPO, {}, {"group_size": 8}, "model.group_size=8, .* made with 4"),
        (FlowGRPO, {}, {"prompts_per_iteration": 2}, "model.prompts_per_iteration=2"),
        (FlowGRPO, {}, {"schedule_kind": "shifted"}, "model.schedule.kind=shifted"),
        (FlowGRPO, {"schedule_kind": "shifted"}, {"schedule_kind": "shifted", "schedule_shift": 2.0}, "model.schedule.shift=2.0"),
        (FlowGRPO, {}, {"storage_dtype": "bfloat16"}, "model.storage_dtype=bfloat16, .* made with float32"),
        (FlowGRPO, {}, {"updates_per_iteration": 2}, "model.updates_per_iteration=2"),
        (FlowGRPO, {}, {"inner_epochs": 2}, "model.inner_epochs=2"),
        (FlowGRPO, {}, {"seed": 9}, "model.seed=9"),
        (FlowGRPO, {}, {"data": {"seed": 7}}, "data: the prompts of iteration 0 are others"),
        (FlowGRPO, {}, {"cls": GRPOGuard}, "model.class_path=GRPOGuard, .* made with FlowGRPO"),
        (MixGRPO, {"num_steps": 8}, {"num_steps": 8, "window_size": 2}, "model.window_size=2, .* made with 4"),
        (DanceGRPO, {}, {"trained_fraction": 0.4}, "model.trained_fraction=0.4"),
    ],
)
def test_options_that_contradict_a_stored_rollout_are_refused(
    begun: Begun, tmp_path: Path, cls: Any, before: dict[str, Any], now: dict[str, Any], message: str
) -> None:
    folder = begun(flow_run, {"cls": cls} | before)
    with pytest.raises(ConfigError, match=message):
        flow_run(**{"cls": cls} | now)(tmp_path / "b", [], inside(folder))
    end = max(folder.glob("epoch=0-step=*.ckpt"), key=lambda file: int(file.stem.rpartition("=")[2]))
    flow_run(**{"cls": cls} | now)(tmp_path / "c", [], str(end))  # the end of an iteration: everything may change


def test_other_options_may_change_inside_an_iteration(begun: Begun, tmp_path: Path) -> None:
    path = inside(begun(flow_run, {"cls": FlowGRPO}))
    free = dict(lr=1e-3, clip_low=0.2, rollout_micro_batch=3, train_micro_batch=3, eval_num_steps=2, advantage=Advantage(clip=1.0))
    assert flow_run(**free)(tmp_path / "b", [], path) == 2 * 4


def test_the_warm_up_stays_as_long_as_it_was(tmp_path: Path) -> None:
    flow_run(warmup_steps=2)(tmp_path / "a", checkpoints(tmp_path / "a", [EVERY_STEP]), None)
    for name in ("epoch=0-step=1", "epoch=1-step=3", "epoch=1-step=6"):
        with pytest.raises(ConfigError, match="model.supervised.warmup_steps=3, and the run of this checkpoint began with 2"):
            flow_run(warmup_steps=3)(tmp_path / "b", [], str(tmp_path / "a" / "0" / f"{name}.ckpt"))


def text_run(folder: Path, cls: Any = GRPO, data: dict[str, Any] | None = None, **model: Any) -> Any:
    def fit(at: Path, after: list[L.Callback], path: str | None) -> int:
        method = cls(policy(folder, keep_reference=True), **ACTING | model)
        callbacks = [RewardScoring({"sorted": Length()}), *after]
        settings: dict[str, Any] = dict(max_epochs=1, enable_checkpointing=True, limit_val_batches=0, default_root_dir=at)
        run = trainer(callbacks=callbacks, **settings)
        run.fit(method, datamodule=Digits(**data or {}), ckpt_path=path)
        return run.global_step

    return fit


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (
            {"answers": Answers(sampling=Sampling(max_new_tokens=5, temperature=0.5))},
            "model.answers.sampling.temperature=0.5, .* made with 1.0",
        ),
        ({"answers": Answers(sampling=Sampling(max_new_tokens=6))}, "model.answers.sampling.max_new_tokens=6, .* made with 5"),
        ({"prompts_per_update": 2}, "model.prompts_per_update=2"),
        ({"group_size": 4}, "model.group_size=4"),
        ({"answers": Answers(sampling=SHORT, old_logprobs="rollout")}, "model.answers.old_logprobs=rollout, .* made with auto"),
        ({"kl": KL(coef=0.1)}, "no log-probabilities of the reference, which model.kl "),
        ({"cls": RLOO}, "model.class_path=RLOO, .* made with GRPO"),
        ({"data": {"digits": 4}}, "data: the prompts of iteration 0 are others"),
    ],
)
def test_options_that_contradict_stored_answers_are_refused(
    begun: Begun, folder: Path, tmp_path: Path, now: dict[str, Any], message: str
) -> None:
    path = inside(begun(text_run, {"folder": folder}))
    with pytest.raises(ConfigError, match=message):
        text_run(folder, **now)(tmp_path, [], path)


def test_other_options_may_change_among_stored_answers(begun: Begun, folder: Path, tmp_path: Path) -> None:
    steps = text_run(folder, surrogate=Clip(high=0.3), entropy_coef=0.01)(tmp_path, [], inside(begun(text_run, {"folder": folder})))
    assert steps == 2 * 2, "two passes of two optimizer steps"
