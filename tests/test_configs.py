"""Every shipped YAML is a run that the command line accepts, and says what it is in its first line."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from benchmarks.house import shipped
from lit_rl.losses.point_surrogates import NFT
from lit_rl.methods.agent_grpo import AgentGRPO
from lit_rl.methods.dpo import DPO
from lit_rl.methods.flow_grpo import FlowGRPO
from lit_rl.methods.sft import SFT
from lit_rl.modules.base import LitRL
from lit_rl.modules.tokens import LitTokens
from lit_rl.policies.flux_fill import FluxFillPolicy

CONFIGS = Path(__file__).parent.parent / "configs"
RUNS = shipped()


@pytest.mark.parametrize("path", RUNS, ids=[f"{p.parent.name}/{p.stem}" for p in RUNS])
def test_run_is_accepted(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from lit_rl.command_line.run import CLI

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
def test_a_run_names_its_folder_once(path: Path) -> None:
    """Demos read their model and data from there, too."""
    text = path.read_text()
    run = yaml.safe_load(text)
    assert run["run"]["name"] and (path.parent.name == "demo" or "outputs/" not in text)
    assert not any({"dirpath", "save_dir", "folder"} & c.get("init_args", {}).keys() for c in run["trainer"].get("callbacks", []))


def default(cls: type, option: str) -> Any:
    """Its default, of the constructor that has it."""
    parameters = [inspect.signature(c.__init__).parameters for c in inspect.getmro(cls) if "__init__" in vars(c)]
    return next(p[option].default for p in parameters if option in p)


def head(path: Path) -> str:
    return "\n".join(line for line in path.read_text().splitlines()[:3] if line.startswith("#"))


def method(path: Path) -> type[LitRL[Any]]:
    module, _, name = yaml.safe_load(path.read_text())["model"]["class_path"].rpartition(".")
    return getattr(importlib.import_module(module), name)


def samples_per_prompt(path: Path) -> int:
    """One answer of a demonstration, two of a pair; the other methods have an option for it."""
    cls = method(path)
    return (
        1 if issubclass(cls, SFT) else 2 if issubclass(cls, DPO) else yaml.safe_load(path.read_text())["model"]["init_args"]["group_size"]
    )


@pytest.mark.parametrize("path", RUNS, ids=[f"{p.parent.name}/{p.stem}" for p in RUNS])
def test_products_of_the_first_line_are_right(path: Path) -> None:
    """`a prompts x b samples = c images` (or answers) in the comment is what the run does."""
    prompts, group = yaml.safe_load(path.read_text())["model"]["init_args"]["prompts_per_iteration"], samples_per_prompt(path)
    if issubclass(method(path), AgentGRPO):  # whose episodes have turns
        assert f"{prompts} tasks x {group} episodes = {prompts * group} episodes" in head(path)
    else:
        assert f"{prompts} prompts x {group} samples = {prompts * group} {method(path).samples}" in head(path)


SHARES = re.compile(
    r"(?:on (\d+) GPUs (\d+) each|(\d+) images) x (\d+) trained steps = (\d+) pairs = (\d+) updates? x (\d+) micro-batches of (\d+)"
)
STATED = {path: stated for path in RUNS if (stated := SHARES.search(head(path)))}


@pytest.mark.parametrize("path", STATED, ids=[f"{p.parent.name}/{p.stem}" for p in STATED])
def test_shares_of_the_first_lines_are_right(path: Path) -> None:
    """`on n GPUs c each x s trained steps = p pairs = u updates x m micro-batches of k`."""
    gpus, each, images, steps, pairs, updates, micro_batches, size = (int(number or 0) for number in STATED[path].groups())
    gpus, each = gpus or 1, each or images
    run = yaml.safe_load(path.read_text())
    model = run["model"]["init_args"]
    assert model["prompts_per_iteration"] % gpus == 0 and each * gpus == model["prompts_per_iteration"] * model["group_size"]
    assert each * steps == pairs == updates * micro_batches * size
    assert (size, updates) == (model["train_micro_batch"], model["updates_per_iteration"])
    assert "accumulate_grad_batches" not in run["trainer"]  # follows, on any number of GPUs
    fraction = model.get("points", {}).get("fraction", model.get("timestep_fraction", 0.99))
    assert steps in (model.get("window_size"), int(model["num_steps"] * fraction))


OF_TEXTS = re.compile(r"on (\d+) GPUs (\d+) each = (\d+) updates? x (\d+) micro-batch(?:es)? of (\d+)")
PASSES = re.compile(r"(\d+) epochs? of (\d+) rows (?:\(.*\) )?= (\d+) x (\d+) = (\d+) iterations")
AGENTS = [path for path in RUNS if path.parent.name != "demo" and issubclass(method(path), AgentGRPO)]
TEXTS = [path for path in RUNS if path.parent.name != "demo" and issubclass(method(path), LitTokens) and path not in AGENTS]


@pytest.mark.parametrize("path", TEXTS, ids=[f"{p.parent.name}/{p.stem}" for p in TEXTS])
def test_shares_and_length_of_runs_on_texts_are_right(path: Path) -> None:
    """`on n GPUs a each = u updates x m micro-batches of k`, `e epochs of r rows = e x i = t iterations`."""
    run, stated, passes = yaml.safe_load(path.read_text()), OF_TEXTS.search(head(path)), PASSES.search(head(path))
    model, trainer = run["model"]["init_args"], run["trainer"]
    assert stated and passes, head(path)
    gpus, each, updates, micro_batches, size = map(int, stated.groups())
    prompts, per_update = model["prompts_per_iteration"], model.get("prompts_per_update", model["prompts_per_iteration"])
    assert prompts % gpus == per_update % gpus == 0 and gpus * each == prompts * samples_per_prompt(path)
    assert each == updates * micro_batches * size and updates * per_update == prompts
    assert micro_batches == trainer["accumulate_grad_batches"]
    epochs, rows, again, iterations, total = map(int, passes.groups())
    assert (epochs, rows // prompts, epochs * iterations) == (again, iterations, total) and total == trainer["max_epochs"]


def test_production_runs_state_their_shares() -> None:
    """All but DanceGRPO, which trains a part of each trajectory."""
    assert {p.stem for p in RUNS if p.parent.name != "demo" and p not in [*TEXTS, *AGENTS]} - {p.stem for p in STATED} == {
        "flux_dance_pickscore"
    }


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
    assert (model["supervised"]["warmup_steps"], model["kl"]["coef"], callbacks["EMA"]) == (
        warmup,
        kl,
        {"decay": decay, "update_interval": 1},
    )
    fraction = model["points"]["fraction"] if method == "diffusion_nft" else model["timestep_fraction"]
    assert (model["group_size"], model["num_steps"], fraction, model["train_micro_batch"]) == (4, 50, 1.0, 1)
    assert model["advantage"] == {"kind": "history", "clip": 5.0} and model["optimizer"]["init_args"] == {"lr": 1e-4}
    assert (
        policy["gradient_checkpointing"]
        and policy.get("offload_text_encoders", default(FluxFillPolicy, "offload_text_encoders"))
        and policy["guidance_scale"] == 3.5
    )
    assert policy["resolution"] == run["data"]["init_args"]["resolution"] == 512
    assert (model["updates_per_iteration"], trainer["precision"], trainer["gradient_clip_val"]) == (50, "16-mixed", 1.0)
    if method == "diffusion_nft":
        assert (model["surrogate"]["init_args"], NFT().mode, callbacks["OldPolicySync"]) == ({"beta": 0.5}, "normal", {"decay": 1})

    per_rollout = int(STATED[CONFIGS / method / "flux_fill_text.yaml"][6])
    assert warmup + (trainer["max_epochs"] - 1) * per_rollout == 10000
    assert run["run"]["callbacks"]["newest"]["every_n_epochs"] * per_rollout == 500


def test_runs_on_texts_are_listed_with_their_methods() -> None:
    listed = re.findall(r"`((?:sft|dpo|ppo|grpo|gspo|dapo|demo)/\w+)`", (CONFIGS.parent / "docs/methods.md").read_text())
    there = {f"{p.parent.name}/{p.stem}" for p in RUNS if issubclass(method(p), LitTokens) and not issubclass(method(p), AgentGRPO)}
    assert there <= set(listed) and set(listed) <= {f"{p.parent.name}/{p.stem}" for p in RUNS}


LLM_GUIDE: dict[str, dict[str, Any]] = {
    "sft/qwen25_7b_gsm8k": {"epochs": 3, "data": {"max_length": 4096}},
    "dpo/qwen25_7b_hh_rlhf": {
        "epochs": 1,
        "model": {"beta": 0.1, "loss_kind": "sigmoid"},
        "lr": 5e-7,
        "data": {"max_length": 4096},
        "policy": {"keep_reference": True},
    },
    "grpo/qwen25_7b_gsm8k": {
        "epochs": 15,
        "lr": 1e-6,
        "model": {
            "prompts_per_iteration": 1024,
            "prompts_per_update": 256,
            "group_size": 5,
            "kl": {"coef": 0.001, "kind": "k3"},
            "answers": {"sampling": {"max_new_tokens": 1024, "temperature": 1.0}, "chunk": 160},
        },
        "policy": {"keep_reference": True, "gradient_checkpointing": True},
        "data": {"max_prompt_length": 512, "filter_overlong_prompts": True, "truncation": "error"},
        "frequencies": (20, 5),
    },
    "ppo/qwen25_7b_gsm8k": {
        "epochs": 10,
        "lr": 1e-6,
        "model": {"prompts_per_iteration": 256, "prompts_per_update": 64, "credit": {"gamma": 1.0, "lam": 0.95}},
    },
}
"""Values that the language models' guide has in each of its commands; save and test frequencies in iterations."""


@pytest.mark.parametrize("name", LLM_GUIDE)
def test_runs_on_texts_are_the_guides(name: str) -> None:
    path, said = CONFIGS / f"{name}.yaml", LLM_GUIDE[name]
    run = yaml.safe_load(path.read_text())
    model, data = run["model"]["init_args"], run["data"]["init_args"]
    policy = model["policy"]["init_args"]
    assert policy["pretrained"].startswith("Qwen/Qwen2.5-7B")
    for found, expected in ((model, said.get("model")), (policy, said.get("policy")), (data, said.get("data"))):
        assert expected is None or {key: found.get(key) for key in expected} == expected
    assert "lora" not in policy
    if "lr" in said:
        assert model["optimizer"]["init_args"]["lr"] == said["lr"]
    passes = PASSES.search(head(path))
    assert passes and int(passes[1]) == said["epochs"]
    if "frequencies" in said:
        saved = {c["init_args"]["every_n_epochs"] for c in run["trainer"]["callbacks"] if "every_n_epochs" in c.get("init_args", {})}
        saved.add(run["run"]["callbacks"]["newest"]["every_n_epochs"])
        assert (saved, run["trainer"]["check_val_every_n_epoch"]) == ({said["frequencies"][0]}, said["frequencies"][1])


def test_the_guides_adapter_is_the_overlays() -> None:
    """Rank 32, alpha 64, on every linear layer, which is the policy's own choice."""
    policy = yaml.safe_load((CONFIGS / "base/lora.yaml").read_text())["model"]["init_args"]["policy"]["init_args"]
    assert policy["lora"] == {"rank": 32, "alpha": 64} and not policy["keep_reference"]


@pytest.mark.parametrize(
    ("method", "given", "dynamics"),
    [("FlowGRPO", "noise_level", "flow_sde"), ("FlowGRPOFast", "noise_level", "cps"), ("DanceGRPO", "noise_level", "dance_sde")],
)
def test_a_part_of_the_sampler_leaves_the_rest_as_the_method_has_it(method: str, given: str, dynamics: str) -> None:
    """`sde: {noise_level: 0.5}` over a relative keeps its own dynamics."""
    run = yaml.safe_load((CONFIGS / "flow_grpo/sd35m_ocr.yaml").read_text())
    run["model"]["class_path"] = f"lit_rl.methods.flow_grpo.{method}"
    run["model"]["init_args"]["sde"] = {given: 0.5}
    parser = ArgumentParser()
    parser.add_subclass_arguments(FlowGRPO, "model")
    sde = parser.parse_object({"model": run["model"]}).model.init_args.sde
    assert (sde.dynamics, sde.noise_level) == (dynamics, 0.5)
