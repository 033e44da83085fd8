"""The command line: quick help, one sentence for each mistake, the documented options."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from forked import ended, forked_script
from lightning.pytorch.loggers import Logger
from toy import Brightness, toy_config

from callbacks.graceful_stop import GracefulStop
from callbacks.rng_state import RngState
from lit_rl.command_line.options import with_help_classes
from lit_rl.command_line.saved_config import without_secrets
from lit_rl.types import Info

ROOT = Path(__file__).parents[2]


LM = {"class_path": "lit_rl.policies.causal_lm.CausalLM", "init_args": {"pretrained": "owner/never-downloaded"}}


class Unscored(Brightness):
    """Can score nothing."""

    def score(self, media: torch.Tensor, info: Sequence[Info]) -> Mapping[str, torch.Tensor]:
        return {"brightness": torch.full((len(info),), torch.nan)}


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`cli("fit", config, *options)` runs the real command line in this process and returns the CLI object."""
    from lit_rl.command_line.run import CLI

    def run(command: str, config: dict[str, Any], *options: str) -> Any:
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        monkeypatch.setattr(sys, "argv", ["cli.py", command, "--config", str(tmp_path / "run.yaml"), *options])
        return CLI()

    return run


def test_help_does_not_import_torch(tmp_path: Path) -> None:
    for module in ("torch", "lightning", "transformers"):
        (tmp_path / f"{module}.py").write_text("raise ImportError('imported for a help page')")
    for args in ([], ["--help"], ["fit", "--help"], ["predict", "-h"]):
        done = subprocess.run(
            [sys.executable, "cli.py", *args], cwd=ROOT, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
        )
        assert done.returncode == 0 and "--ckpt_path" in done.stdout, done.stderr


def test_options_of_the_help_page_exist(cli: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--model.init_args.group_size",
        "8",
        "--trainer.max_epochs",
        "300",
        "--trainer.devices",
        "1",
        "--trainer.precision",
        "bf16-mixed",
    ]
    with pytest.raises(SystemExit) as done:
        cli("fit", toy_config(tmp_path), *options, "--trainer.callbacks+=lightning.pytorch.callbacks.RichProgressBar", "--print_config")
    assert done.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["group_size"] == 8 and len(printed["trainer"]["callbacks"]) == 3


def test_help_of_a_class_that_the_run_names(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(toy_config(tmp_path)))
    words = ["fit", "--config", str(tmp_path / "run.yaml")]
    assert with_help_classes([*words, "--model.policy.help"]) == [*words, "--model.policy.help", "toy.ToyPolicy"]
    assert with_help_classes([*words, "--model.init_args.optimizer.help"])[-1] == "torch.optim.AdamW"
    assert with_help_classes([*words, "--model.policy", "lit_rl.policies.sd3.SD3Policy", "--model.policy.help"])[-1].endswith("SD3Policy")
    assert with_help_classes([*words, "--data.help", "toy.ToyData"]) == [*words, "--data.help", "toy.ToyData"]
    assert with_help_classes(["fit", "--model.policy.help"]) == ["fit", "--model.policy.help"]


@pytest.mark.parametrize("option", ["--model.policy.help", "--model.init_args.reward.help"])
def test_help_without_a_class_says_how(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    from lit_rl.command_line.run import CLI

    monkeypatch.setattr(sys, "argv", ["cli.py", "fit", option])
    with pytest.raises(SystemExit):
        CLI()
    assert f"error: {option} shows what a class takes: name one, e.g. --model" in capsys.readouterr().err


@pytest.mark.parametrize("batches", ["true", "3"])
def test_a_fast_dev_run_trains_and_leaves_nothing(cli: Any, tmp_path: Path, batches: str) -> None:
    run = cli("fit", toy_config(tmp_path), "--trainer.fast_dev_run", batches)
    assert run.trainer.global_step == 1 and not (tmp_path / "checkpoints").exists()
    cli("fit", toy_config(tmp_path), "--trainer.fast_dev_run", batches)  # nothing of the first is in its way
    with pytest.raises(SystemExit):
        cli("fit", toy_config(tmp_path), "--trainer.max_steps", "1")


def test_a_callback_of_the_run_takes_the_place_of_the_default_one(cli: Any, tmp_path: Path) -> None:
    """Their hooks ran twice, and the default STOP file was obeyed where the run names another."""
    config = toy_config(tmp_path)
    config["trainer"]["callbacks"] += [
        {"class_path": "callbacks.graceful_stop.GracefulStop", "init_args": {"stop_file": str(tmp_path / "halt")}},
        {"class_path": "callbacks.rng_state.RngState"},
    ]
    callbacks = cli("fit", config, "--trainer.fast_dev_run", "true").trainer.callbacks
    assert [c.stop_file for c in callbacks if isinstance(c, GracefulStop)] == [str(tmp_path / "halt")]
    assert sum(isinstance(c, RngState) for c in callbacks) == 1


def test_a_list_inside_of_the_list_of_callbacks(cli: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = toy_config(tmp_path)
    config["trainer"]["callbacks"] = [config["trainer"]["callbacks"]]
    with pytest.raises(SystemExit):
        cli("fit", config)
    assert "trainer.callbacks holds a list inside of the list" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["limit_train_batches", "overfit_batches"])
def test_a_part_of_a_rollout_is_not_trained_in_silence(cli: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    """Optimizer steps were cut short, and their weights no longer summed up to what was decided."""
    with pytest.raises(SystemExit):
        cli("fit", toy_config(tmp_path), f"--trainer.{option}", "1")
    assert f"trainer.{option} would train a part of every rollout only" in capsys.readouterr().err


def test_early_stopping_on_what_is_not_logged_is_one_sentence(cli: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = toy_config(tmp_path)
    config["trainer"]["callbacks"].append({"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/nope"}})
    with pytest.raises(SystemExit):
        cli("fit", config)
    error = capsys.readouterr().err
    assert "EarlyStopping in trainer.callbacks: " in error and "`val/nope`" in error and "`reward_mean`" in error


def test_the_home_folder_in_any_option(cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.txt").write_text("1\n2\n3\n4\n")
    config = toy_config(Path("~/run"))
    config["data"] = {"class_path": "datamodules.prompts.PromptFiles", "init_args": {"train": "~/p.txt"}}
    run = cli("fit", config, "--trainer.max_epochs", "1", "--images.output_dir", "~/pictures")
    assert run.trainer.default_root_dir == str(tmp_path / "run") and run.config.fit.images.output_dir == str(tmp_path / "pictures")
    assert (tmp_path / "run/checkpoints/last.ckpt").is_file() and not Path("~").exists()


def test_one_seed_reaches_method_and_data(cli: Any, tmp_path: Path) -> None:
    run = cli("fit", toy_config(tmp_path), "--seed_everything", "7")
    assert run.model.seed == run.datamodule.seed == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.init_args.grup_size", "8"], "did you mean 'group_size'?"),
        (["--model.init_args.group_size", "many"], "group_size"),
        (["--model.init_args.evaluation.num_steps", "0"], "model.evaluation.num_steps=0 must be at least 1"),
        (["--model.init_args.prompts_per_iteration", "0"], "model.prompts_per_iteration=0 must be at least 1"),
        (["--trainer.max_steps", "5"], "set trainer.max_epochs"),
        (["--trainer.max_epoch", "5"], "max_epoch"),
        (["--rl_kl_beta", "0.1"], "--rl_kl_beta is an option of another trainer; here it is `model.init_args.kl.coef`"),
        (["--trainer.gradient_clip_val", "-1"], "trainer.gradient_clip_val=-1 must be positive"),
        (["--trainer.devices", "many"], "`devices` selected with `CPUAccelerator` should be an int > 0"),
        (["--trainer.accelerator", "mps"], "can not run on your system"),
        (
            ["--model.init_args.policy", "lit_rl.policies.sd3.SD3Policy", "--model.init_args.policy.pretrained", "./no/such"],
            "no such folder",
        ),
        (["--data", "datamodules.prompts.PromptFiles", "--data.train", "missing.txt"], "missing.txt: no such file or folder"),
        (["--ckpt_path", "nowhere.ckpt"], "nowhere.ckpt"),
        (["--trainer.max_epoks", "5"], "--trainer.max_epoks: Trainer has no option 'max_epoks'; did you mean 'max_epochs'?"),
        (["--max_epochs", "5"], "there is no option --max_epochs; did you mean --trainer.max_epochs?"),
        (["--group_size", "5"], "there is no option --group_size; did you mean --model.init_args.group_size?"),
        (["--widht", "5"], "there is no option --widht; did you mean --model.init_args.policy.init_args.width?"),
        (["--model.policy.lora.rank", "8"], "--model.policy.lora.rank: ToyPolicy has no option 'lora'; it has dropout, seed, width"),
        (["--model.policy", "lit_rl.policies.sd3.SD3Policy", "--lora.rank", "8"], "mean --model.init_args.policy.init_args.lora.rank?"),
        (["--model.policy", "lit_rl.policies.sd3.SD3Policy", "--model.policy.lora.rnk", "8"], "has no option 'rnk'; did you mean 'rank'?"),
        (["--foo"], "there is no option --foo; see python cli.py fit --help"),
        (["foo"], "foo is not an option"),
        (["--trainer.accelerator", "gpu"], "torch sees no GPU here: add --config configs/base/cpu.yaml, or --trainer.accelerator cpu"),
        (["--trainer.strategy", "dpp"], "configs/base/*.yaml are the strategies that are tested here"),
        (["--model.lr_scheduler", "torch.optim.lr_scheduler.CosineAnnealingLR"], "needs T_max: set model.init_args.lr_scheduler.init_args"),
    ],
)
def test_mistakes_get_one_sentence(cli: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as done:
        cli("fit", toy_config(tmp_path), *options)
    assert done.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]


def test_mistakes_in_a_file_are_named_with_line_and_remedy(cli: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for key, value, message in (
        ("grop_size", 4, "did you mean 'group_size'?"),
        ("group_size", "four", "group_size is 'four'; expected a whole number"),
    ):
        with pytest.raises(SystemExit):
            cli("fit", toy_config(tmp_path, **{key: value}))
        lines = (tmp_path / "run.yaml").read_text().splitlines()
        number = next(i for i, line in enumerate(lines, start=1) if line.strip() == f"{key}: {value}")
        error = capsys.readouterr().err
        assert f"run.yaml:{number}: " in error and message in error


def changed(text: str, old: str, new: str) -> tuple[str, int]:
    """The text with one thing replaced, and the number of the line where that is."""
    assert text.count(old) == 1
    return text.replace(old, new), text[: text.index(old)].count("\n") + 1


@pytest.mark.parametrize(
    ("old", "new", "down", "message"),
    [
        ("group_size: 4", "group_size: [4", 1, "this is not YAML: expected ',' or ']', but got ':' (while parsing a flow sequence"),
        ("group_size: 4", "group_size 4", 1, "this is not YAML: could not find expected ':'"),
        ("  class_path: lit_rl.methods", "\tclass_path: lit_rl.methods", 0, "this is not YAML: found character '\\t'"),
        ("max_epochs: 2", "max_epochs: 2\n  max_epochs: 3", 1, "`max_epochs` stands a second time (first in line "),
        (
            ".FlowGRPO",
            ".FlowGRPO\n  group_size: 8",
            1,
            "`group_size` stands beside class_path: options of a class stand under its init_args",
        ),
        ("lr: 0.01", "lr: fast", 0, "lr is 'fast'; expected a number"),
        ("lr: 0.01", "lr: 0.01\n    supervised: {warmup_lr: fast}", 1, "warmup_lr is 'fast'; expected a number or null"),
        ("max_epochs: 2", "max_epochs: 2\n  precision: bf16-mixd", 1, "did you mean bf16-mixed?"),
        ("trainer:", "trianer:", 0, "did you mean 'trainer'?"),
        (
            "torch.optim.AdamW",
            "torch.optim.AdmW",
            0,
            "there is no class torch.optim.AdmW: torch.optim has no AdmW; did you mean torch.optim.AdamW?",
        ),
        (
            ".flow_grpo.FlowGRPO",
            ".flow_gpro.FlowGRP",
            0,
            "no module lit_rl.methods.flow_gpro; did you mean lit_rl.methods.flow_grpo.FlowGRPO?",
        ),
        ("toy.ToyData", "toy.ToyDate", 0, "toy has no ToyDate; did you mean toy.ToyData?"),
        ("class_path: toy.Brightness", "class_path: toy.Britness", 0, "toy has no Britness; did you mean toy.Brightness?"),
        ("toy.ToyPolicy", "no_such_package.Policy", 0, "there is no class no_such_package.Policy: no module no_such_package"),
        (
            "class_path: toy.ToyData",
            "class_path: toy.ToyData\n  init_args: {trian: a}",
            1,
            "ToyData has no option 'trian'; it has eval_batch",
        ),
        ("      lr: 0.01", "      lrr: 0.01", 0, "AdamW has no option 'lrr'; did you mean 'lr'?"),
        (
            "logger: false",
            "logger: tensorbord",
            0,
            "trainer.logger is 'tensorbord'; it takes a class: {class_path: lightning.pytorch.loggers",
        ),
        (
            "class_path: torch.optim.AdamW\n      init_args:\n        lr: 0.01",
            "adamw",
            -1,
            "optimizer is 'adamw'; it takes a class: {class_path: torch.optim.AdamW, init_args: {...}}",
        ),
        (
            "optimizer:\n      class_path: torch.optim.AdamW\n      init_args:\n        lr: 0.01",
            "optimizer:\n    - class_path: torch.optim.AdamW",
            0,
            "it takes a class: {class_path: torch.optim.AdamW, init_args: {...}}",
        ),
        (
            "    policy:\n      class_path: toy.ToyPolicy\n",
            "",
            -10,
            "lit_rl.methods.flow_grpo.FlowGRPO needs policy: set model.init_args.policy",
        ),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, old: str, new: str, down: int, message: str
) -> None:
    from lit_rl.command_line.run import CLI

    text, line = changed(yaml.safe_dump(toy_config(tmp_path)), old, new)
    (tmp_path / "run.yaml").write_text(text)
    monkeypatch.setattr(sys, "argv", ["cli.py", "fit", "--config", str(tmp_path / "run.yaml")])
    with pytest.raises(SystemExit) as done:
        CLI()
    assert done.value.code == 2
    error = capsys.readouterr().err
    assert f"error: {tmp_path}/run.yaml:{line + down}: " in error and message in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run.pop("data"), "the run has no `data`: add `data: {class_path: datamodules.prompts.PromptFiles, init_args: {...}}`"),
        (lambda run: run.pop("model"), "the run has no `model`: add `model: {class_path: lit_rl.methods"),
        (lambda run: run.update(model=None), "the run has no `model`"),
        (lambda run: run["trainer"].update(callbacks={"a": 1}), "trainer.callbacks is a list: begin each one with `- class_path:"),
        (
            lambda run: run["trainer"]["callbacks"].pop(0),
            "FlowGRPO learns from rewards, and the run has none: add {class_path: callbacks.rew",
        ),
        (
            lambda run: run["model"].update(class_path="lit_rl.methods.diffusion_nft.DiffusionNFT"),
            "needs callbacks.old_policy.OldPolicySync",
        ),
        (
            lambda run: run.update(data={"class_path": "lightning.pytorch.demos.boring_classes.BoringDataModule"}),
            "BoringDataModule has no `prompts`, which FlowGRPO asks for: use datamodules.prompts.PromptFiles",
        ),
        (
            lambda run: run["model"].update(
                class_path="lit_rl.methods.sft.SFT", init_args={"policy": dict(LM), "prompts_per_iteration": 4}
            ),
            "ToyData has no `supervised_ids`, which SFT asks for: use datamodules.supervised.SupervisedText",
        ),
        (lambda run: run["model"]["init_args"]["optimizer"]["init_args"].update(lr=-1.0), "model.optimizer: Invalid learning rate: -1.0"),
        (
            lambda run: run["model"]["init_args"].update(
                lr_scheduler={"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 0}}
            ),
            "model.lr_scheduler: integer modulo by zero",
        ),
    ],
)
def test_a_run_that_lacks_a_part_is_told_how_to_add_it(
    cli: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, message: str
) -> None:
    config = toy_config(tmp_path)
    change(config)
    with pytest.raises(SystemExit) as done:
        cli("fit", config)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert done.value.code == 2 and len(lines) == 1 and message in lines[0]


def test_a_missing_file_is_told_with_the_line_that_names_it(cli: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = toy_config(tmp_path)
    config["data"] = {"class_path": "datamodules.prompts.PromptFiles", "init_args": {"train": str(tmp_path / "prompts")}}
    with pytest.raises(SystemExit):
        cli("fit", config)
    line = next(i for i, text in enumerate((tmp_path / "run.yaml").read_text().splitlines(), 1) if "train: " in text)
    assert f"run.yaml:{line}: {tmp_path}/prompts" in capsys.readouterr().err


def test_a_list_of_mistakes_in_the_data_keeps_its_lines(cli: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.json").write_text('[{"text": "A"}, {"text": "B"}]')
    config = toy_config(tmp_path)
    config["data"] = {"class_path": "datamodules.inpainting.Inpainting", "init_args": {"train": str(tmp_path / "data.json")}}
    with pytest.raises(SystemExit):
        cli("fit", config)
    error = capsys.readouterr().err
    assert "problems in the inpainting data\n  data.json: items[0]" in error and "\n  data.json: items[1]" in error


def test_unreachable_server_is_named_before_the_model_is_loaded(cli: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = toy_config(tmp_path)
    reward = {"class_path": "lit_rl.rewards.client.HTTPReward", "init_args": {"urls": "127.0.0.1:9", "outputs": ["vlm_score"]}}
    config["trainer"]["callbacks"][0]["init_args"]["rewards"] = {"ocr": reward}
    with pytest.raises(SystemExit) as done:
        cli("fit", config)
    assert done.value.code == 2
    assert "no reward server answers at http://127.0.0.1:9" in capsys.readouterr().err


def test_a_mistake_deep_in_a_list_is_told_without_the_types_that_were_also_possible(
    cli: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_SERVER_PORT", "abc")
    config = toy_config(tmp_path)
    config["trainer"]["callbacks"][0]["init_args"]["rewards"] = {"ocr": {"class_path": "lit_rl.rewards.client.HTTPReward"}}
    with pytest.raises(SystemExit):
        cli("fit", config)
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: REWARD_SERVER_PORT=abc in the environment is not a number; it is the port of the first server"
    )


def test_a_run_whose_rewards_fail_ends_with_one_sentence(cli: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = toy_config(tmp_path)
    config["trainer"]["callbacks"][0]["init_args"]["rewards"] = {"b": {"class_path": "test_run.Unscored"}}
    with pytest.raises(SystemExit) as done:
        cli("fit", config)
    assert done.value.code == 1
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def test_a_new_run_does_not_write_among_the_checkpoints_of_another(cli: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli("fit", toy_config(tmp_path))
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "checkpoints").iterdir()}
    with pytest.raises(SystemExit) as done:
        cli("fit", toy_config(tmp_path))
    error = capsys.readouterr().err
    assert done.value.code == 2 and "holds checkpoints of an earlier run" in error and "continue it with --ckpt_path last" in error
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "checkpoints").iterdir()}
    assert cli("fit", toy_config(tmp_path), "--ckpt_path", "last", "--trainer.max_epochs", "3").trainer.current_epoch == 3


@pytest.mark.slow
def test_what_stops_all_processes_is_said_once(tmp_path: Path) -> None:
    config = toy_config(tmp_path, prompts_per_iteration=3)
    config["trainer"] |= {"devices": 2, "strategy": "ddp"}
    text = yaml.safe_dump(config)
    (tmp_path / "run.yaml").write_text(text)
    line = changed(text, "prompts_per_iteration", "")[1]
    assert ended(forked_script(str(ROOT / "cli.py"), "fit", "--config", str(tmp_path / "run.yaml"), folder=tmp_path), 200) == 2
    assert [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("error: ")] == [
        f"error: {tmp_path}/run.yaml:{line}: model.prompts_per_iteration=3 does not divide among 2 processes; use a multiple of 2, e.g. 4"
    ]


def test_options_beat_what_a_checkpoint_was_trained_with(cli: Any, tmp_path: Path) -> None:
    cli("fit", toy_config(tmp_path))
    run = cli("fit", toy_config(tmp_path), "--ckpt_path", "last", "--trainer.max_epochs", "3", "--model.init_args.sde.noise_level", "0.5")
    assert run.model.sde.noise_level == 0.5 and run.trainer.current_epoch == 3


@pytest.mark.parametrize("command", ["validate", "predict"])
def test_last_must_be_there_for_what_only_uses_it(cli: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as done:
        cli(command, toy_config(tmp_path), "--ckpt_path", "last")
    assert done.value.code == 2 and "there is no checkpoint yet" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "does"), [("validate", "scores"), ("predict", "is made by")])
def test_without_a_checkpoint_the_untrained_model_is_announced(cli: Any, tmp_path: Path, command: str, does: str) -> None:
    with pytest.warns(UserWarning, match=f"what follows {does} the model as `pretrained` has it, not as this run trained it"):
        cli(command, toy_config(tmp_path), "--images.output_dir", str(tmp_path / "images"))


def test_last_starts_from_scratch_when_there_is_nothing_yet(cli: Any, tmp_path: Path) -> None:
    assert cli("fit", toy_config(tmp_path), "--ckpt_path", "last").trainer.current_epoch == 2


def test_truncated_checkpoint_is_refused_with_the_last_good_one(cli: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli("fit", toy_config(tmp_path))
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    with pytest.raises(SystemExit):
        cli("fit", toy_config(tmp_path), "--ckpt_path", "last")
    assert str(tmp_path / "checkpoints" / "epoch=1.ckpt") in capsys.readouterr().err


def test_best_checkpoints_follow_the_held_out_reward(cli: Any, tmp_path: Path) -> None:
    config = toy_config(tmp_path)
    best = {"dirpath": str(tmp_path / "best"), "filename": "{epoch}", "monitor": "val/brightness", "mode": "max", "save_top_k": 1}
    best |= {"every_n_epochs": 2, "save_on_train_epoch_end": False}
    config["trainer"]["callbacks"].append({"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": best})
    cli("fit", config, "--trainer.max_epochs", "4", "--trainer.check_val_every_n_epoch", "2")
    assert len(list((tmp_path / "best").glob("epoch=*.ckpt"))) == 1


def test_validate_and_predict_use_the_checkpoint(cli: Any, tmp_path: Path) -> None:
    cli("fit", toy_config(tmp_path))
    run = cli("predict", toy_config(tmp_path), "--ckpt_path", "last", "--images.output_dir", str(tmp_path / "images"))
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(run.model.policy.network[1].bias.detach(), saved["policy.network.1.bias"])
    assert len(list((tmp_path / "images").glob("*.png"))) == len(run.datamodule.held_out)
    assert "val/brightness" in cli("validate", toy_config(tmp_path), "--ckpt_path", "last").trainer.callback_metrics


# ---------------------------------------------------------------------- what loggers and folders are told of a run
class Folderless(Logger):
    """A tracker somewhere else."""

    told: ClassVar[list[Any]] = []
    name, version = "tracker", 0

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.told.append(params)

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass


def test_every_logger_gets_the_options_and_no_checkpoint_does(cli: Any, tmp_path: Path) -> None:
    config = toy_config(tmp_path, timestep_fraction=0.75)
    csv = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": "csv", "version": ""}}
    config["trainer"] |= {"logger": [{"class_path": "test_run.Folderless"}, csv], "limit_val_batches": 0, "max_epochs": 1}
    Folderless.told.clear()
    cli("fit", config)
    (options,) = Folderless.told
    assert options["model"]["init_args"]["timestep_fraction"] == 0.75 and options["seed_everything"] == 3
    assert "timestep_fraction: 0.75" in (tmp_path / "csv" / "hparams.yaml").read_text()
    assert (tmp_path / "config.yaml").exists(), "the first logger has no folder"
    assert not [key for key in torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True) if "hyper" in key]


def test_other_commands_leave_the_options_of_the_training_run_alone(cli: Any, tmp_path: Path) -> None:
    cli("fit", toy_config(tmp_path))
    before = (tmp_path / "config.yaml").read_text()
    for command in ("validate", "test"):
        cli(command, toy_config(tmp_path), "--ckpt_path", "last", "--model.init_args.evaluation.num_steps", "2")
        assert "num_steps: 2" in (tmp_path / f"config-{command}.yaml").read_text()
    assert (tmp_path / "config.yaml").read_text() == before


def test_two_checkpoint_callbacks_of_one_key_are_refused(cli: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = toy_config(tmp_path)
    config["trainer"]["callbacks"].append({"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"filename": "b"}})
    with pytest.raises(SystemExit):
        cli("fit", config)
    assert "has two ModelCheckpoint whose states would be one" in capsys.readouterr().err


def test_what_nobody_should_read_is_starred() -> None:
    given = {"a": [{"api_key": "x", "n": 1}], "token": None, "password": "y", "max_new_tokens": 5}
    assert without_secrets(given) == {"a": [{"api_key": "***", "n": 1}], "token": None, "password": "***", "max_new_tokens": 5}
