"""configs/base/*.yaml say where a run happens, and nothing about what it is. Two are laid over: lora.yaml says what is trained of a
language model, trackers.yaml who shows the curves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

from lit_rl.strategies.fsdp2 import FSDP2Strategy
from lit_rl.strategies.zero import ZeroStrategy

ROOT = Path(__file__).parent.parent
BASES = sorted(path for path in (ROOT / "configs" / "base").glob("*.yaml") if path.stem not in ("lora", "trackers"))
RUN = ROOT / "configs" / "flow_grpo" / "flux_ocr.yaml"
STRATEGIES: dict[str, type] = {"cpu": str, "one_gpu": str, "ddp": DDPStrategy, "fsdp": FSDP2Strategy}


def parsed(*options: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The configuration that the command line resolves from the options, every default included."""
    from lit_rl.command_line.run import CLI

    monkeypatch.setattr(sys, "argv", ["cli.py", "fit", *options, "--print_config"])
    with pytest.raises(SystemExit) as stop:
        CLI()
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("base", BASES, ids=lambda path: path.stem)
def test_base_is_laid_under_any_run(base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The run's own values win, the strategy is the base's and can be built without a GPU."""
    from jsonargparse import ArgumentParser
    from lightning.pytorch.strategies import Strategy

    said = yaml.safe_load(base.read_text())
    assert base.read_text().startswith("# ") and said.keys() == {"trainer"}
    config = parsed("--config", str(base), "--config", str(RUN), monkeypatch=monkeypatch, capsys=capsys)
    for key in ("accelerator", "devices"):
        assert config["trainer"][key] == said["trainer"][key]
    assert config["model"]["class_path"] == yaml.safe_load(RUN.read_text())["model"]["class_path"]

    parser = ArgumentParser()
    parser.add_argument("--strategy", type=str | Strategy)
    built = parser.instantiate_classes(parser.parse_object({"strategy": said["trainer"]["strategy"]})).strategy
    assert isinstance(built, STRATEGIES.get(base.stem, ZeroStrategy))
    if isinstance(built, DeepSpeedStrategy):
        assert isinstance(built.config, dict)
        zero = built.config["zero_optimization"]
        assert str(zero["stage"]) in base.stem and ("offload_param" in zero) == ("offload" in base.stem)
        assert zero["stage"] < 3 or zero["stage3_param_persistence_threshold"] == 0


def test_all_bases_are_there() -> None:
    names = {"cpu", "one_gpu", "ddp", "fsdp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero3_offload"}
    names |= {"deepspeed_zero3_sd3"}  # DeepGen's fourth
    assert {base.stem for base in BASES} == names


def test_trackers_are_laid_over_any_run_and_stay_in_its_folder() -> None:
    from lit_rl.doctor.runs import parse

    overlay = ROOT / "configs/base/trackers.yaml"
    loggers = parse(["--config", str(RUN), "--config", str(overlay), "--run.name", "signs"]).trainer.logger
    assert [logger.class_path for logger in loggers] == ["callbacks.trackers.WandB", "callbacks.trackers.SwanLab"]
    assert {(logger.init_args.save_dir, logger.init_args.name, logger.init_args.mode) for logger in loggers} == {
        ("outputs/signs", "signs", None)
    }


def test_lora_is_laid_over_any_run_of_a_language_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An adapter in place of every weight; whatever else the run says stays."""
    run, overlay = ROOT / "configs/grpo/qwen25_7b_gsm8k.yaml", ROOT / "configs/base/lora.yaml"
    full, adapted = (
        parsed("--config", str(run), *more, monkeypatch=monkeypatch, capsys=capsys)
        for more in ((), ("--config", str(overlay), "--model.optimizer.lr", "1e-5"))
    )
    policy = adapted["model"]["init_args"]["policy"]["init_args"]
    assert (policy["lora"]["rank"], policy["lora"]["alpha"], policy["keep_reference"], policy["dtype"]) == (32, 64, False, "bfloat16")
    assert adapted["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 1e-5
    for run in (full, adapted):
        for changed in ("lora", "keep_reference", "dtype"):
            del run["model"]["init_args"]["policy"]["init_args"][changed]
        del run["model"]["init_args"]["optimizer"]["init_args"]["lr"]
    assert full == adapted
