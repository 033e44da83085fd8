"""Adapter files written in training draw the trained policy's pictures in a fresh process, and start a new run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fill import RELEASED, build_fill, settings
from forked import ended, forked_script

import cli
from lit_rl.checkpoints.ip_adapter import convert, read_ip_adapter

ROOT = Path(__file__).parent.parent
STYLE = "--model.init_args.policy.init_args.style"
Pictures = dict[str, bytes]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fill(tmp_path_factory.mktemp("fill"))


def config(folder: Path, policy: dict[str, Any]) -> dict[str, Any]:
    """2 iterations of Flow-GRPO of 2 optimizer steps, every checkpoint with its adapter, as it is and averaged."""
    model = {
        "policy": {"class_path": "lit_rl.policies.flux_fill.FluxFillPolicy", "init_args": policy},
        "prompts_per_iteration": 4, "group_size": 4, "num_steps": 3, "evaluation": {"num_steps": 3}, "inner_epochs": 2,
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.05}},
    }  # fmt: skip
    exports = [{"dirpath": str(folder / kind), "at": "checkpoint", "weights": kind, "keep": None} for kind in ("live", "ema")]
    callbacks: list[tuple[str, dict[str, Any]]] = [
        ("callbacks.reward_scoring.RewardScoring", {"rewards": {"b": {"class_path": "toy.Brightness"}}}),
        ("callbacks.ema.EMA", {"decay": 0.7, "warmup_steps": 1}),
        *(("callbacks.export.Export", arguments) for arguments in exports),
        ("lightning.pytorch.callbacks.ModelCheckpoint", {"dirpath": str(folder / "ckpt"), "every_n_train_steps": 2, "save_last": True}),
    ]
    trainer = {
        "accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "num_sanity_val_steps": 0, "limit_val_batches": 0, "log_every_n_steps": 1, "default_root_dir": str(folder),
        "callbacks": [{"class_path": path, "init_args": arguments} for path, arguments in callbacks],
    }  # fmt: skip
    return {
        "seed_everything": 3,
        "model": {"class_path": "lit_rl.methods.flow_grpo.FlowGRPO", "init_args": model},
        "data": {"class_path": "fill.FillData"},
        "trainer": trainer,
    }


Run = Callable[..., None]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """run("fit", *options) is `python cli.py fit --config run.yaml *options`, in a process of its own where fresh is set."""

    def start(command: str, *options: str, fresh: bool = False) -> None:
        words = [str(ROOT / "cli.py"), command, "--config", str(tmp_path / "run.yaml"), *options]
        if fresh:
            assert ended(forked_script(*words, folder=tmp_path), timeout=200) == 0, (tmp_path / "log").read_text()
            return
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", words)
        cli.main()

    return start


@pytest.fixture
def predicted(run: Run, tmp_path: Path) -> Callable[..., Pictures]:
    """Bytes of the pictures of the held-out images by file name."""

    def predict(*options: str, fresh: bool = False) -> Pictures:
        folder = tmp_path / "pictures" / str(len(list((tmp_path / "pictures").glob("*"))))
        run("predict", "--images.output_dir", str(folder), *options, fresh=fresh)
        return {file.name: file.read_bytes() for file in folder.glob("*.png")}

    return predict


@pytest.mark.slow
def test_an_exported_adapter_draws_what_was_trained(places: Path, tmp_path: Path, run: Run, predicted: Callable[..., Pictures]) -> None:
    """As it is and averaged; as a legacy and as a released file too, and from those back."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config(tmp_path, settings(places))))
    run("fit")
    for kind in ("live", "ema"):
        assert sorted(file.parent.name for file in (tmp_path / kind).glob("*/ip-adapter.bin")) == ["checkpoint-2", "checkpoint-4"]
    adapters = {kind: str(tmp_path / kind / "checkpoint-4" / "ip-adapter.bin") for kind in ("live", "ema")}
    untrained, averaged = predicted(), predicted("--ckpt_path", "last")
    assert len(averaged) == 2 and all(averaged[name] != untrained[name] for name in averaged)
    assert predicted(f"{STYLE}.initial", adapters["ema"], fresh=True) == averaged
    live = predicted(f"{STYLE}.initial", adapters["live"])
    assert live != averaged
    for i, word in enumerate(words := yaml.safe_load((tmp_path / "run.yaml").read_text())["trainer"]["callbacks"]):
        if word["class_path"].endswith("EMA"):
            words[i]["init_args"]["evaluate"] = False
    (tmp_path / "callbacks.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": words}}))
    assert predicted("--config", str(tmp_path / "callbacks.yaml"), "--ckpt_path", "last") == live

    legacy, released, back = (str(tmp_path / f"{name}.bin") for name in ("legacy", "released", "back"))
    convert(adapters["live"], legacy, "legacy")
    convert(legacy, released, "released")
    convert(released, back)
    assert torch.load(legacy, weights_only=True).keys() == {"image_proj_mlp", "attn_adapter"}
    for path in (legacy, back):
        assert predicted(f"{STYLE}.initial", path) == live


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adapter and LoRA", "everything"])
def test_an_export_with_more_than_the_adapter(
    places: Path, tmp_path: Path, run: Run, predicted: Callable[..., Pictures], kind: str
) -> None:
    """A Q-Former with LoRA beside it, or a whole fine-tuned pipeline, exported as a released file."""
    how: dict[str, Any] = {"lora": {"rank": 2, "alpha": 4.0}} if kind == "adapter and LoRA" else {"train": "full", "keep_reference": True}
    whole = config(tmp_path, settings(places, style=RELEASED, **how))
    for callback in whole["trainer"]["callbacks"]:
        if callback["class_path"].endswith("Export"):
            callback["init_args"]["format"] = "released"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(whole))
    run("fit")
    folder = tmp_path / "ema" / "checkpoint-4"
    file = str(folder / "ip-adapter.bin")
    assert torch.load(file, weights_only=True).keys() == {"image_proj_mlp", "image_proj_qformer", "attn_adapter"}
    policy = "--model.init_args.policy.init_args"
    rest = [f"{policy}.lora.initial", str(folder)] if kind == "adapter and LoRA" else [f"{policy}.pretrained", str(folder)]
    assert predicted(f"{STYLE}.initial", file, *rest, fresh=True) == predicted("--ckpt_path", "last")


# ---------------------------------------------------------------------- what is said of other files
def broken(places: Path, folder: Path, fault: str) -> Path:
    """An adapter's file with this fault."""
    from fill import fill_policy

    policy, file = fill_policy(places, style=RELEASED if fault == "mixed" else None), folder / "ip-adapter.bin"
    policy.load()
    policy.save(folder, {name: p.detach() for name, p in policy.trainable()})
    sections = read_ip_adapter(file)
    if fault == "incomplete":
        del sections["image_proj"]["norm.bias"]
        sections["image_proj"]["norm.offset"] = torch.zeros(1)
    if fault == "mixed":
        sections["image_proj_mlp"] = sections.pop("image_proj")
    if fault == "another network's":
        sections["ip_adapter"] = {f"{i}.to_{kv}_ip.weight": torch.zeros(32, 24) for i in range(3) for kv in "kv"}
    if fault == "another encoder's":
        sections["image_proj"]["proj.0.weight"] = torch.zeros(20, 7)
    torch.save(sections, file)
    if fault == "no file of tensors":
        file.write_text("version https://git-lfs.github.com/spec/v1")
    return file


@pytest.mark.parametrize(
    ("fault", "messages"),
    [
        ("incomplete", ["is not a whole IP-Adapter; missing: image_proj.norm.bias; unknown: image_proj.norm.offset"]),
        ("mixed", ["has the keys ip_adapter, image_proj_qformer, image_proj_mlp", "missing: image_proj; unknown: image_proj_mlp"]),
        (
            "another network's",
            ["of another model than the transformer", "unknown: ip_adapter.2.to_k_ip.weight, ip_adapter.2.to_v_ip.weight"],
        ),
        ("another encoder's", ["projects 7 features, the encoder", "has 10"]),
        ("no file of tensors", ["is not a file of tensors, or not a whole one"]),
        ("absent", ["no such file"]),
    ],
)
def test_a_file_that_is_no_adapter_for_this_run_gets_one_sentence(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], fault: str, messages: list[str]
) -> None:
    from lit_rl.command_line.run import CLI

    file = tmp_path / "nowhere.bin" if fault == "absent" else broken(places, tmp_path, fault)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config(tmp_path, settings(places, style={"initial": str(file)}))))
    monkeypatch.setattr(sys, "argv", ["cli.py", "fit", "--config", str(tmp_path / "run.yaml")])
    with pytest.raises(SystemExit) as done:
        CLI()
    assert done.value.code == 2
    said = capfd.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and all(message in lines[0] for message in messages), said
    assert "Traceback" not in said


def test_a_legacy_export_of_a_q_former_is_refused_before_training(
    places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from lit_rl.command_line.run import CLI

    whole = config(tmp_path, settings(places, style=RELEASED))
    whole["trainer"]["callbacks"][2]["init_args"]["format"] = "legacy"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(whole))
    monkeypatch.setattr(sys, "argv", ["cli.py", "fit", "--config", str(tmp_path / "run.yaml")])
    with pytest.raises(SystemExit):
        CLI()
    assert "error: Export format=legacy has no place for the Q-Former of this adapter" in capfd.readouterr().err
    assert not (tmp_path / "live").exists()
