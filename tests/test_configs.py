"""Every shipped YAML is a run that the command line accepts, and says what it is in its first line."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

CONFIGS = Path(__file__).parent.parent / "configs"
RUNS = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "base")


@pytest.mark.parametrize("path", RUNS, ids=[f"{p.parent.name}/{p.stem}" for p in RUNS])
def test_run_is_accepted(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from lit_rl.lightning_cli import CLI

    monkeypatch.setattr(sys, "argv", ["cli.py", "fit", "--config", str(path), "--print_config"])
    with pytest.raises(SystemExit) as done:
        CLI()
    printed = yaml.safe_load(capsys.readouterr().out)
    assert done.value.code == 0
    assert printed["model"]["class_path"] == yaml.safe_load(path.read_text())["model"]["class_path"]


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_first_line_says_what_it_is(path: Path) -> None:
    assert path.read_text().startswith("# ") and len(path.read_text().splitlines()[0]) > 20


@pytest.mark.parametrize("path", RUNS, ids=[f"{p.parent.name}/{p.stem}" for p in RUNS])
def test_products_of_the_first_line_are_right(path: Path) -> None:
    """`a prompts x b samples = c images` in the comment is what the run does."""
    run = yaml.safe_load(path.read_text())["model"]["init_args"]
    prompts, group = run["prompts_per_iteration"], run["group_size"]
    head = "\n".join(line for line in path.read_text().splitlines()[:3] if line.startswith("#"))
    assert f"{prompts} prompts x {group} samples = {prompts * group} images" in head


SHARES = re.compile(
    r"(?:on (\d+) GPUs (\d+) each|(\d+) images) x (\d+) trained steps = (\d+) pairs = (\d+) updates? x (\d+) micro-batches of (\d+)"
)
STATED = {path: stated for path in RUNS if (stated := SHARES.search("\n".join(path.read_text().splitlines()[:3])))}


@pytest.mark.parametrize("path", STATED, ids=[f"{p.parent.name}/{p.stem}" for p in STATED])
def test_shares_of_the_first_lines_are_right(path: Path) -> None:
    """`on n GPUs c each x s trained steps = p pairs = u updates x m micro-batches of k`."""
    gpus, each, images, steps, pairs, updates, micro_batches, size = (int(number or 0) for number in STATED[path].groups())
    gpus, each = gpus or 1, each or images
    run = yaml.safe_load(path.read_text())
    model = run["model"]["init_args"]
    assert model["prompts_per_iteration"] % gpus == 0 and each * gpus == model["prompts_per_iteration"] * model["group_size"]
    assert each * steps == pairs == updates * micro_batches * size
    assert (size, micro_batches) == (model["train_micro_batch"], run["trainer"]["accumulate_grad_batches"])
    assert steps in (model.get("window_size"), int(model["num_steps"] * model.get("timestep_fraction", 0.99)))


def test_production_runs_state_their_shares() -> None:
    """All but DanceGRPO, which trains a part of each trajectory."""
    assert {p.stem for p in RUNS if p.parent.name != "demo"} - {p.stem for p in STATED} == {"flux_dance_pickscore"}


GUIDE = {"flow_grpo": (500, 0.1, 0.9999), "diffusion_nft": (1000, 0.01, 0.999)}
"""Warm-up steps, KL and EMA decay of the FLUX-Fill guide's two production commands; the rest is the same in both."""


@pytest.mark.parametrize("method", GUIDE)
def test_flux_fill_runs_are_the_guides(method: str) -> None:
    warmup, kl, decay = GUIDE[method]
    run = yaml.safe_load((CONFIGS / method / "flux_fill_text.yaml").read_text())
    model, trainer = run["model"]["init_args"], run["trainer"]
    policy, callbacks = (
        model["policy"]["init_args"],
        {c["class_path"].rpartition(".")[2]: c.get("init_args", {}) for c in trainer["callbacks"]},
    )
    assert (model["warmup_steps"], model["kl_coef"], callbacks["EMA"]) == (warmup, kl, {"decay": decay, "update_interval": 1})
    assert (model["group_size"], model["num_steps"], model["timestep_fraction"], model["train_micro_batch"]) == (4, 50, 1.0, 1)
    assert model["advantage"] == {"kind": "history", "clip": 5.0} and model["optimizer"]["init_args"] == {"lr": 1e-4}
    assert policy["gradient_checkpointing"] and policy["offload_text_encoders"] and policy["guidance_scale"] == 3.5
    assert policy["resolution"] == run["data"]["init_args"]["resolution"] == 512
    assert (trainer["accumulate_grad_batches"], trainer["precision"], trainer["gradient_clip_val"]) == (4, "16-mixed", 1.0)
    if method == "diffusion_nft":
        assert (model["beta"], model["adv_mode"], callbacks["OldPolicySync"]) == (0.5, "normal", {"decay": 1})

    per_rollout = int(STATED[CONFIGS / method / "flux_fill_text.yaml"][6])
    assert warmup + (trainer["max_epochs"] - 1) * per_rollout == 10000
    assert callbacks["ModelCheckpoint"]["every_n_epochs"] * per_rollout == 500
