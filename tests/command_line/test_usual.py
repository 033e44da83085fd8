"""A run names its folder once, and has the callbacks that every run has unless it says otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace
from toy import toy_config

from lit_rl.command_line.usual import USUAL, filled_in
from lit_rl.command_line.usual_classes import USUAL_CLASSES
from lit_rl.doctor.runs import parse
from lit_rl.errors import ConfigError

ROOT = Path(__file__).parents[2]
CHECKPOINT = "lightning.pytorch.callbacks.ModelCheckpoint"


def toy_run(folder: Path, *callbacks: str | dict[str, Any], **trainer: Any) -> Path:
    """A YAML that leaves all folders open. callbacks: class paths, or specs, beside RewardScoring."""
    run = toy_config(folder)
    run["trainer"] = {"accelerator": "cpu", "max_epochs": 2, "callbacks": run["trainer"]["callbacks"][:1]} | trainer
    run["trainer"]["callbacks"] += [{"class_path": spec} if isinstance(spec, str) else spec for spec in callbacks]
    run["run"] = {"dir": str(folder), "name": "toy"}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder / "run.yaml"


def complete(file: Path, *options: str) -> Namespace:
    """The options that the run is built from."""
    return parse(["--config", str(file), *options])


def named(run: Namespace, name: str) -> list[Namespace]:
    return [spec.init_args for spec in run.trainer.callbacks if spec.class_path.endswith(f".{name}")]


def test_the_folder_of_a_run_stands_in_it_once(tmp_path: Path) -> None:
    best = {"class_path": CHECKPOINT, "init_args": {"monitor": "val/brightness"}}
    elsewhere = {"class_path": "callbacks.export.Export", "init_args": {"dirpath": "elsewhere"}}
    file = toy_run(tmp_path, best, "callbacks.export.Export", elsewhere)
    run = complete(file, "--run.name", "other")
    folder = f"{tmp_path}/other"
    assert (run.trainer.default_root_dir, run.trainer.logger.init_args.save_dir) == (folder, folder)
    assert [c.dirpath for c in named(run, "ModelCheckpoint")] == [f"{folder}/best", f"{folder}/checkpoints"]
    assert [c.dirpath for c in named(run, "Export")] == [f"{folder}/export", "elsewhere"]
    assert named(run, "SampleGallery")[0].folder == f"{folder}/samples"
    assert (run.images.output_dir, run.texts.output_file) == (f"{folder}/predictions", f"{folder}/predictions/answers.jsonl")


@pytest.mark.parametrize(("at", "live", "ema"), [("iteration", "/export", "/export/ema"), ("checkpoint", "", "/ema")])
def test_live_and_averaged_weights_go_to_two_folders(tmp_path: Path, at: str, live: str, ema: str) -> None:
    exports = [{"class_path": "callbacks.export.Export", "init_args": {"at": at, "weights": weights}} for weights in ("live", "ema")]
    assert [c.dirpath for c in named(complete(toy_run(tmp_path, *exports)), "Export")] == [f"{tmp_path}/toy{live}", f"{tmp_path}/toy{ema}"]
    assert named(complete(toy_run(tmp_path, exports[1])), "Export")[0].dirpath == f"{tmp_path}/toy{live}"
    run = complete(toy_run(tmp_path, exports[1], "callbacks.best_model.BestModel"))  # which writes live weights into a folder of its own
    assert (named(run, "Export")[0].dirpath, named(run, "BestModel")[0].dirpath) == (f"{tmp_path}/toy{live}", f"{tmp_path}/toy/best_model")


def test_every_run_has_the_usual_callbacks_around_its_own(tmp_path: Path) -> None:
    run = complete(toy_run(tmp_path))
    order = [spec.class_path for spec in run.trainer.callbacks]
    own = order.index("callbacks.reward_scoring.RewardScoring")
    usual = [paths[-1] for paths in USUAL_CLASSES.values()]
    assert order[:own] + order[own + 1 :] == usual
    assert named(run, "ModelCheckpoint")[0].save_last is True


@pytest.mark.parametrize(
    ("own", "default", "there"),
    [
        ("lightning.pytorch.callbacks.RichProgressBar", "Progress", 0),
        ("lightning.pytorch.callbacks.LearningRateMonitor", "LearningRate", 0),
        ("callbacks.throughput.Throughput", "Throughput", 1),
        ("callbacks.sample_texts.SampleTexts", "SampleGallery", 0),
        (CHECKPOINT, "ModelCheckpoint", 1),
        ("callbacks.graceful_stop.GracefulStop", "GracefulStop", 1),
        ("callbacks.rng_state.RngState", "RngState", 1),
    ],
)
def test_a_callback_of_the_run_takes_the_place_of_the_usual_one(tmp_path: Path, own: str, default: str, there: int) -> None:
    run = complete(toy_run(tmp_path, own))
    assert len(named(run, own.rpartition(".")[2])) == 1 and len(named(run, default)) == there


@pytest.mark.parametrize("name", USUAL)
def test_null_leaves_one_out(tmp_path: Path, name: str) -> None:
    file = toy_run(tmp_path)
    all_of_them, fewer = complete(file).trainer.callbacks, complete(file, f"--run.callbacks.{name}", "null").trainer.callbacks
    (left_out,) = [spec.class_path for spec in all_of_them if spec.class_path not in {other.class_path for other in fewer}]
    assert issubclass(_imported(left_out), tuple(map(_imported, USUAL_CLASSES[name])))


def _imported(path: str) -> Any:
    from lit_rl.command_line.options import imported

    return imported(path)


def test_options_of_a_usual_one_in_a_file_and_on_the_command_line_add_up(tmp_path: Path) -> None:
    file = toy_run(tmp_path)
    text = yaml.safe_load(file.read_text())
    text["run"]["callbacks"] = {"newest": {"every_n_epochs": 7}, "samples": {"max_images": 3}}
    file.write_text(yaml.safe_dump(text))
    run = complete(file, "--run.callbacks.newest.save_top_k", "-1", "--run.callbacks.progress", "{line: step}")
    newest = named(run, "ModelCheckpoint")[0]
    assert (newest.every_n_epochs, newest.save_top_k, newest.save_last) == (7, -1, True)
    assert named(run, "SampleGallery")[0].max_images == 3 and named(run, "Progress")[0].line == "step"


def test_what_a_trainer_without_them_forbids_is_left_out(tmp_path: Path) -> None:
    run = complete(toy_run(tmp_path, logger=False, enable_progress_bar=False, enable_checkpointing=False))
    assert not named(run, "Progress") + named(run, "LearningRate") + named(run, "ModelCheckpoint") and run.trainer.logger is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run.callbacks.newest", "{evry: 1}"], "run.callbacks.newest are options of lightning.pytorch.callbacks.ModelCheckpoint, which"),
        (["--run.callbacks.newst", "null"], "did you mean 'newest'?"),
        (["--run.name", "../../tmp"], "run.name='../../tmp' must be a folder in run.dir"),
        (["--run.nam", "x"], "did you mean 'name'?"),
    ],
)
def test_mistakes(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as said:
        complete(toy_run(tmp_path), *options)
    assert message in str(said.value)


def test_options_for_one_that_the_run_replaces(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run.callbacks.newest=.* has no part in a run whose trainer.callbacks names its own"):
        complete(toy_run(tmp_path, CHECKPOINT), "--run.callbacks.newest", "{every_n_epochs: 3}")


def test_without_a_name_the_root_folder_is_the_runs(tmp_path: Path) -> None:
    file = toy_run(tmp_path)
    text = yaml.safe_load(file.read_text()) | {"run": {}}
    file.write_text(yaml.safe_dump(text))
    assert complete(file).trainer.default_root_dir == "outputs/run"
    run = complete(file, "--trainer.default_root_dir", "here")
    assert named(run, "ModelCheckpoint")[0].dirpath == "here/checkpoints"


def test_the_options_of_a_run_are_not_changed(tmp_path: Path) -> None:
    """`config.yaml` says what was asked for: with another run.name it is a run in another folder."""
    from lit_rl.doctor.runs import Inspector

    file = toy_run(tmp_path, "callbacks.export.Export")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["cli.py", "fit", "--config", str(file)])
        asked = Inspector().config.fit
    before = asked.clone()
    filled_in(asked)
    assert asked == before and asked.trainer.default_root_dir is None
