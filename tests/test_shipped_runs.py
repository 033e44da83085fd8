"""Every shipped production run trains on a miniature: only sizes, paths, the device and how often things are saved are changed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fill import HEIGHT, WIDTH, build_fill
from PIL import Image
from safetensors.torch import load_file
from squares import square
from text_rows import jsonl

from lit_rl.checkpoints.ip_adapter import read_ip_adapter
from lit_rl.miniatures.deepgen import build_deepgen
from lit_rl.miniatures.images import build_flux, build_sd3
from lit_rl.miniatures.lm import build_lm
from lit_rl.miniatures.vlm import build_vlm
from lit_rl.policies.deepgen import DeepGenPolicy

CONFIGS = Path(__file__).parent.parent / "configs"
SHIPPED = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name not in ("base", "demo", "agent"))
"""Runs of agents: tiny_desktop below, cua_grpo in tests/agents/test_cua_run.py."""
VISION = [path for path in SHIPPED if "vision_language" in path.read_text()]
TEXTS = [path for path in SHIPPED if "causal_lm" in path.read_text()] + VISION
RUNS = [path for path in SHIPPED if path not in TEXTS]
PROMPTS, GROUP = 2, 2


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each family, prompts, and inpainting items."""
    folder = tmp_path_factory.mktemp("home")
    sizes: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "hidden": 32, "heads": 2, "text_hidden": 16, "image_channels": 3}
    build_sd3(folder / "sd3", **sizes, layers=2, t5_hidden=32)  # the last block has fewer layers for LoRA
    build_flux(folder / "flux", **sizes, layers=1, single_layers=1, t5_hidden=24)
    build_fill(folder / "fill")
    build_deepgen(folder / "deepgen", height=HEIGHT, width=WIDTH, hidden=32, connector_hidden=24, language_layers=2)
    (folder / "train.txt").write_text("".join(f'a sign with "{i}"\n' for i in range(4)))
    (folder / "test.txt").write_text('a sign with "9"\n')
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(folder / "source.png")
    Image.new("RGB", (WIDTH, WIDTH)).save(folder / "square.png")
    sets = [{"name": "signs", "path": "train.txt", "rewards": [{"ocr": 0.7}, {"clip_sim": 0.3}, {"unifiedreward_think": 0.5}]}]
    (folder / "sets.yaml").write_text(yaml.safe_dump({"datasets": sets}))
    (folder / "pictures.json").write_text(json.dumps([{"image_path": f"{name}.png", "txt": name} for name in ("source", "square")]))
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[4:12, 4:20] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    items: list[dict[str, Any]] = [{"source": "source.png", "mask": "mask.png", "text": f"{i}", "target": "source.png"} for i in range(4)]
    items.append({"source": "source.png", "mask": "mask.png", "text": "9", "split": "val"})
    (folder / "items.json").write_text(json.dumps(items))
    return folder


def shrunk(run: dict[str, Any], home: Path) -> dict[str, Any]:
    """The same run on a miniature and one CPU process: a warm-up step where it warms up, and one iteration."""
    model, trainer, data = run["model"]["init_args"], run["trainer"], run["data"]["init_args"]
    policy = model["policy"]["init_args"]
    family = {"SD3Policy": "sd3", "FluxPolicy": "flux", "FluxFillPolicy": "fill", "DeepGenPolicy": "deepgen"}[
        model["policy"]["class_path"].rpartition(".")[2]
    ]
    policy |= {"pretrained": str(home / family), "resolution": [HEIGHT, WIDTH], "max_sequence_length": 8}
    if family == "deepgen":
        policy |= {"pretrained": str(home / "deepgen/sd3"), "language_model": str(home / "deepgen/language")}
        policy |= {"checkpoint": str(home / "deepgen/checkpoint.pth"), "adapter": {"rank": 4, "alpha": 8}, "connector_heads": 2}
        policy["max_sequence_length"] = 64
        model["num_steps"] = 10
        next(c for c in trainer["callbacks"] if "RewardScoring" in c["class_path"])["init_args"]["rewards"]["clip"]["init_args"] = {
            "model_path": str(home)
        }
        model["supervised"]["data"]["init_args"] = {"sources": [{"path": str(home / "pictures.json")}], "size": 16, "multiple": 8}
    model |= {
        "prompts_per_iteration": PROMPTS,
        "group_size": GROUP,
        "evaluation": {"num_steps": 2},
        "train_micro_batch": None,
        "updates_per_iteration": None,
    }
    data |= {"train": str(home / "sets.yaml"), "val": str(home / "test.txt")} if family == "deepgen" else {"train": str(home)}
    if family == "fill":
        policy |= {"pretrained": str(home / "fill/pipeline"), "context_height": 8}
        policy["style"] |= {"encoder": str(home / "fill/siglip"), "tokens": 3}
        data |= {"train": str(home / "items.json"), "resolution": [HEIGHT, WIDTH]}
    if model.get("supervised"):
        model["supervised"] |= {"batch_size": 4} | ({"warmup_steps": 1} if warms_up(run) else {})
    trainer |= {"accelerator": "cpu", "devices": 1, "accumulate_grad_batches": 2, "check_val_every_n_epoch": 1}
    trainer |= {"max_epochs": 2 if warms_up(run) else 1, "enable_model_summary": False}
    if trainer["precision"] == "16-mixed":  # which CPUs do not have
        trainer["precision"], policy["dtype"] = "bf16-mixed", "bfloat16"
    return saved_every_iteration(run)


def warms_up(run: dict[str, Any]) -> bool:
    return "warmup_steps" in run["model"]["init_args"].get("supervised", {})


def saved_every_iteration(run: dict[str, Any]) -> dict[str, Any]:
    usual = run["run"].get("callbacks", {})
    for options in [callback.get("init_args", {}) for callback in run["trainer"].get("callbacks", [])] + list(usual.values()):
        options |= {key: 1 for key in ("every_n_epochs",) if key in options}
    return run


@pytest.fixture
def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], Any]:
    """Train a run in `tmp_path`, with pseudo-random scores and options of the command line; returns the CLI."""
    from lit_rl.command_line.run import CLI

    def go(run: dict[str, Any], *options: str) -> Any:
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("DISABLE_RL_REWARD_MODEL", "true")
        monkeypatch.setattr(sys, "argv", ["cli.py", "fit", "--config", "run.yaml", *options])
        return CLI()

    return go


@pytest.mark.parametrize(
    ("advantage", "sde"),
    [
        ({"kind": "sum", "std": "group", "ddof": 1}, {"dynamics": "flow_sde"}),  # grpo, flowgrpo_sde
        ({"kind": "sum", "std": "batch", "ddof": 1}, {"dynamics": "dance_sde"}),  # grpo_global_std, dance_sde
        ({"kind": "reinforce", "ddof": 1}, {"dynamics": "cps"}),  # reinforcepp, cps_sde; gdpo is that of the file
    ],
)
def test_deepgen_trains_with_each_advantage_and_sampler(
    advantage: dict[str, Any], sde: dict[str, Any], home: Path, fit: Callable[..., Any]
) -> None:
    """Options over configs/deepgen/flow_grpo.yaml; before a weight has moved every step has the log-probability that it was drawn with."""
    kind = {"flow_sde": "v_diffusion"}.get(sde["dynamics"], "v_noise_std")
    chosen = {f"advantage.{key}": value for key, value in advantage.items()} | {"kl.kind": kind}
    chosen |= {f"sde.{key}": value for key, value in sde.items()}
    options = [word for name, value in chosen.items() for word in (f"--model.init_args.{name}", str(value))]
    run = shrunk(yaml.safe_load((CONFIGS / "deepgen/flow_grpo.yaml").read_text()), home)
    done = fit(run, *options, "--trainer.precision", "32-true")
    rule, sampler, metrics = done.model.credit_rule, done.model.sde, done.trainer.callback_metrics
    assert advantage.items() <= vars(rule).items() and (sampler.dynamics, sampler.noise_level, sampler.same_latent) == (
        sde["dynamics"], 1.0, True,
    )  # fmt: skip
    assert metrics["ratio_first_update_max_dev"] < 1e-4 and metrics["trained_share"] == 1 and np.isfinite(float(metrics["kl_divergence"]))
    before, live = start(done.model.policy), dict(done.model.policy.named_parameters())
    assert any(not torch.equal(value, live[name].detach()) for name, value in before.items())


def start(policy: DeepGenPolicy) -> dict[str, torch.Tensor]:
    """The weights of the transformer before training."""
    return {f"network.{n}": x for n, x in load_file(Path(policy.pretrained) / "transformer/diffusion_pytorch_model.safetensors").items()}


@pytest.mark.parametrize("path", RUNS, ids=[f"{p.parent.name}/{p.stem}" for p in RUNS])
def test_run_trains_on_a_miniature(path: Path, home: Path, tmp_path: Path, fit: Callable[[dict[str, Any]], Any]) -> None:
    """One iteration with advantages moves the weights; checkpoint, exports and held-out scores of every name are where the YAML says."""
    run = shrunk(yaml.safe_load(path.read_text()), home)
    done = fit(run)
    method, trainer = done.model, done.trainer
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    warmup = 1 if warms_up(run) else 0
    assert trainer.global_step == 1 + warmup and metrics["images"] == PROMPTS * GROUP
    assert metrics["zero_std_ratio"] == 0 and np.isfinite(metrics["loss"])

    folder = Path(trainer.logger.save_dir)
    assert list((folder / "logs").glob("events.out.tfevents.*"))
    last = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == trainer.global_step
    before = last["ema"]["weights"] if "ema" in last else start(method.policy)
    live = dict(method.policy.named_parameters())
    assert any(not torch.equal(value, live[name].detach()) for name, value in before.items()), "the average lags behind what was trained"
    weights = next(c["init_args"] for c in run["trainer"]["callbacks"] if "RewardScoring" in c["class_path"]).get("weights")
    assert all(f"val/{name}" in metrics for name in weights or ())

    if "style" not in run["model"]["init_args"]["policy"]["init_args"]:
        exported = {file.name for file in (folder / "export").glob("iteration-1/*")}
        weights_file = "pytorch_lora_weights.safetensors" if method.policy.lora else "model.safetensors"
        assert exported == {weights_file, "manifest.json"}
        assert list((folder / "best").glob("*.ckpt")) or not any("ModelCheckpoint" in c["class_path"] for c in run["trainer"]["callbacks"])
        return
    files = [folder / kind / f"checkpoint-{trainer.global_step}/ip-adapter.bin" for kind in ("", "ema")]
    trained, average = (read_ip_adapter(file) for file in files)
    assert any(not torch.equal(trained[s][k], average[s][k]) for s in trained for k in trained[s])


# ------------------------------------------------------------------ language models
QUESTION = {"question": "2+2?", "answer": "#### 4", "prompt": [{"role": "user", "content": "2+2?"}]}
SCORED = QUESTION | {"data_source": "gsm8k", "reward_model": {"style": "rule", "ground_truth": "4"}}
PAIR = {"prompt": "Human: hi Assistant:", "chosen": " Hello.", "rejected": " What?"}
ROWS: dict[str, list[dict[str, Any]]] = {
    "SupervisedText": [QUESTION],
    "PreferencePairs": [PAIR],
    "TextPrompts": [SCORED],
    "PromptsAndPairs": [SCORED, PAIR, SCORED | {"self_play": True}],
}
"""Rows that `python -m lit_rl.prepare` writes, by datamodule."""


def shrunk_text(run: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same run on a miniature and one CPU process: one iteration of as many updates, on 4 prompts each."""
    model, trainer, data = run["model"]["init_args"], run["trainer"], run["data"]["init_args"]
    updates = model["prompts_per_iteration"] // model.get("prompts_per_update", model["prompts_per_iteration"])
    sees = "vision" in model["policy"]["class_path"]
    built = build_vlm(folder / "model", hidden=32, layers=1) if sees else build_lm(folder / "model", hidden=32, layers=1, heads=2)
    model["policy"]["init_args"]["pretrained"] = str(built)
    model.get("answers", {}).pop("engine", None)  # a server
    model |= {"prompts_per_iteration": 4 * updates} | ({"prompts_per_update": 4} if updates > 1 else {})
    for name in {"sampling", "eval_sampling"} & model.get("answers", {}).keys():
        model["answers"][name]["max_new_tokens"] = 6
    for part, size in {"length_penalty": {"buffer": 2}, "dynamic_sampling": {"prompts_per_generation": 4 * updates}}.items():
        model |= {part: model[part] | size} if part in model else {}
    if model.get("group_size", 1) > 4:
        model["group_size"] = 4
    rows = ROWS[run["data"]["class_path"].rpartition(".")[2]]
    if sees:
        square(0, np.random.RandomState(0)).save(folder / "square.png")
        rows = [row | {"images": ["square.png"]} for row in rows]
    data |= {"train": jsonl(folder / "train.jsonl", *rows * 8), "val": jsonl(folder / "val.jsonl", *rows)}
    trainer |= {"accelerator": "cpu", "devices": 1, "accumulate_grad_batches": 2, "check_val_every_n_epoch": 1, "max_epochs": 1}
    trainer["enable_model_summary"] = False
    return saved_every_iteration(run)


@pytest.mark.parametrize("path", TEXTS, ids=[f"{p.parent.name}/{p.stem}" for p in TEXTS])
def test_run_on_texts_trains_on_a_miniature(
    path: Path, tmp_path: Path, fit: Callable[[dict[str, Any]], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """One iteration moves the weights that are exported; its line, logs, checkpoint and held-out numbers are where the YAML says."""
    run = shrunk_text(yaml.safe_load(path.read_text()), tmp_path)
    trainer = fit(run).trainer
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    updates = run["model"]["init_args"]["prompts_per_iteration"] // run["model"]["init_args"].get("prompts_per_update", 4)
    assert trainer.global_step == updates and np.isfinite(metrics["loss"])
    assert f"Step {updates}/{updates} | Loss: " in capsys.readouterr().out
    weights = next(
        (c["init_args"]["weights"] for c in run["trainer"].get("callbacks", []) if "RewardScoring" in c["class_path"]), {"loss": 1}
    )
    assert metrics.keys() >= {f"val/{name}" for name in weights}

    folder = Path(trainer.logger.save_dir)
    assert list((folder / "logs").glob("events.out.tfevents.*"))
    last = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == updates
    (exported,) = (folder / "export").glob("iteration-1")
    if run["model"]["init_args"]["policy"]["init_args"].get("lora"):  # B starts at 0
        assert any(weight.any() for name, weight in load_file(exported / "adapter_model.safetensors").items() if "lora_B" in name)
    else:
        before, after = (load_file(where / "model.safetensors") for where in (tmp_path / "model", exported))
        assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)


# ------------------------------------------------------------------ agents
CLICKS = [
    f'<tool_call>\n{{"name": "computer_use", "arguments": {{"action": "left_click", "coordinate": [{x}, {y}]}}}}\n</tool_call>'
    for x in range(100, 1000, 100)
    for y in range(100, 1000, 100)
]
"""One token each, so that a random model says one of them in every second turn."""


def test_an_agent_trains_on_the_tiny_desktop(tmp_path: Path, fit: Callable[[dict[str, Any]], Any]) -> None:
    """One iteration moves the adapter that is exported and evaluated; its episodes are recorded and logged where the YAML says."""
    run = yaml.safe_load((CONFIGS / "agent/tiny_desktop.yaml").read_text())
    model, trainer, data = run["model"]["init_args"], run["trainer"], run["data"]["init_args"]
    built = build_vlm(tmp_path / "model", family="qwen3_vl", words=CLICKS, hidden=32, layers=1, vision_hidden=32, max_length=4096)
    model["policy"]["init_args"] |= {"pretrained": str(built), "dtype": "float32"}
    model |= {"prompts_per_iteration": 2, "group_size": 4}
    model["answers"]["sampling"]["max_new_tokens"] = 1
    for split, count in {"train": 2, "val": 3}.items():
        lines = (CONFIGS.parent / data[split]).read_text().splitlines(keepends=True)[:count]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
        data[split] = str(tmp_path / f"{split}.jsonl")
    trainer |= {"accelerator": "cpu", "devices": 1, "precision": "32-true", "max_epochs": 1, "check_val_every_n_epoch": 1}
    done = fit(saved_every_iteration(run)).trainer
    metrics, folder = done.callback_metrics, Path(done.logger.save_dir)
    assert done.global_step == 1 and metrics["episodes/lost"] == 0 and 0 < metrics["episodes/invalid_action_rate"] < 1
    assert {"success", "val/accuracy", "val/reward", "val/turns"} <= metrics.keys()
    adapters = [load_file(where / "adapter_model.safetensors") for where in (folder / "export/iteration-1", folder / "best_model")]
    assert any(weight.any() for name, weight in adapters[0].items() if "lora_B" in name)  # B starts at 0
    assert all(torch.equal(weight, adapters[1][name]) for name, weight in adapters[0].items())
    assert len((folder / "episodes/rollouts.jsonl").read_text().splitlines()) == 1 + 8 + 3
    training, rollouts = ((folder / f"logs/{name}.log").read_text() for name in ("training", "rollouts"))
    assert "iteration 1/1 step 1: " in training and len(rollouts.splitlines()) == 8 + 3
