"""Variables of the environment: an option beats the YAML, the YAML the environment, the environment the default."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest
import yaml
from jsonargparse import Namespace

from lit_rl.command_line.dotted import imported_class
from lit_rl.command_line.environment import fill_in, places, sources
from lit_rl.doctor import runs
from lit_rl.errors import ConfigError
from lit_rl.net import env_file
from lit_rl.net.env_file import use_env_file
from lit_rl.net.environment import DEEPGEN, SECRETS, VARIABLES, variable_of
from lit_rl.rewards.services import ServiceReward
from lit_rl.rollouts.http import HTTPEngine

CHECKPOINT = "--model.init_args.policy.init_args.checkpoint"


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable.name, raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    policy = {"class_path": DEEPGEN, "init_args": {"resolution": 64}}
    run = {
        "run": {"name": "signs"},
        "model": {
            "class_path": "lit_rl.methods.flow_grpo.FlowGRPO",
            "init_args": {"policy": policy, "prompts_per_iteration": 2, "group_size": 2},
        },
        "data": {"class_path": "toy.ToyData"},
        "trainer": {"logger": [{"class_path": "callbacks.trackers.SwanLab"}, {"class_path": "callbacks.trackers.WandB"}]},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    return tmp_path / "run.yaml"


def parsed(file: Path, *options: str) -> Namespace:
    return runs.parse(["--config", str(file), *options])


def test_an_option_beats_the_yaml_that_beats_the_environment(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def checkpoint(*options: str) -> str | None:
        found: str | None = parsed(file, *options).model.init_args.policy.init_args.checkpoint
        return found

    (tmp_path / "over.yaml").write_text("model: {init_args: {policy: {init_args: {checkpoint: of_yaml.pth}}}}")
    over = ("--config", str(tmp_path / "over.yaml"))
    assert checkpoint() is None
    monkeypatch.setenv("CHECKPOINT", "~/of_environment.pth ")
    assert checkpoint() == str(Path("~/of_environment.pth").expanduser())
    assert checkpoint(*over) == "of_yaml.pth"
    assert checkpoint(*over, CHECKPOINT, "of_option.pth") == "of_option.pth"
    monkeypatch.setenv("CHECKPOINT", "")  # as if it were not there
    assert checkpoint() is None


def test_each_tracker_has_its_own_variables(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WANDB_MODE": "online", "WANDB_PROJECT": "DeepGen-RL", "SWANLAB_EXP_NAME": "second"}.items():
        monkeypatch.setenv(name, value)
    swanlab, wandb = (logger.init_args for logger in parsed(file, "--run.dir", "runs").trainer.logger)
    assert (wandb.mode, wandb.project, wandb.name, wandb.save_dir) == ("online", "DeepGen-RL", "signs", "runs/signs")
    assert (swanlab.mode, swanlab.project, swanlab.name, swanlab.save_dir) == (None, None, "second", "runs/signs")


def test_variables_of_a_guide_are_of_its_runs_alone(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"OUTPUT_DIR": str(tmp_path / "results"), "NNODES": "4", "NGPUS": "8"}.items():
        monkeypatch.setenv(name, value)
    run = parsed(file)
    assert (run.run.dir, run.trainer.num_nodes, run.trainer.devices) == (str(tmp_path / "results"), 4, 8)
    assert run.trainer.default_root_dir == str(tmp_path / "results" / "signs")
    other = parsed(file, "--model.init_args.policy", "toy.ToyPolicy")
    assert (other.run.dir, other.trainer.num_nodes, other.trainer.devices) == ("outputs", 1, "auto")


def test_a_service_has_its_own_address(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OCR_URL is that of `ocr` alone, and an address in the run comes before it."""
    run = yaml.safe_load(file.read_text())
    given = {"a": {"service": "ocr"}, "b": {"service": "pickscore"}, "c": {"service": "ocr", "urls": "http://here:2"}}
    rewards = {name: {"class_path": "lit_rl.rewards.services.ServiceReward", "init_args": args} for name, args in given.items()}
    run["trainer"]["callbacks"] = [{"class_path": "callbacks.reward_scoring.RewardScoring", "init_args": {"rewards": rewards}}]
    file.write_text(yaml.safe_dump(run))
    monkeypatch.setenv("OCR_URL", "http://elsewhere:1")
    told = [line for line in sources(parsed(file)) if "OCR_URL" in line]
    assert len(told) == 2 and "http://elsewhere:1: from OCR_URL in the environment" in told[0]
    assert "http://here:2: from the run itself, before OCR_URL" in told[1]
    assert ServiceReward("ocr").urls == ["http://elsewhere:1"] and "elsewhere" not in ServiceReward("pickscore").urls[0]


@pytest.mark.parametrize(
    ("name", "value", "wanted"), [("NNODES", "four", "a positive whole number"), ("WANDB_MODE", "on", "online, offline")]
)
def test_a_value_that_cannot_be_is_told_with_its_variable(
    name: str, value: str, wanted: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name}={value} in the environment must be .*{wanted}"):
        parsed(file)


def test_print_config_says_what_came_from_where(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from lit_rl.command_line.run import CLI

    for name in SECRETS:
        monkeypatch.setenv(name, "of-nobodys-business")
    monkeypatch.setenv("CHECKPOINT", "a.pth")
    monkeypatch.setenv("QWEN2_5_VL_MODEL_NAME_OR_PATH", "https://me:word@host/lm")
    monkeypatch.setenv("OUTPUT_DIR", "elsewhere")
    monkeypatch.setattr(sys, "argv", ["cli.py", "fit", "--config", str(file), "--run.dir", "here", "--print_config"])
    with pytest.raises(SystemExit):
        CLI()
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["model"]["init_args"]["policy"]["init_args"]["checkpoint"] == "a.pth"
    assert "# model.policy.checkpoint = a.pth: from CHECKPOINT in the environment\n" in text
    assert "# model.policy.language_model = https://***@host/lm: from QWEN2_5_VL_MODEL_NAME_OR_PATH in the environment\n" in text
    assert "# run.dir = here: from the run itself, before OUTPUT_DIR in the environment\n" in text
    assert "business" not in text


def test_options_deep_in_lists_and_dictionaries_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = Namespace(class_path="callbacks.trackers.WandB", init_args=Namespace(project=None, name=None, mode=None))
    options = Namespace(trainer=Namespace(callbacks=[Namespace(class_path="x.Y", init_args=Namespace(rewards={"a": deep}))]))
    monkeypatch.setenv("WANDB_PROJECT", "found")
    assert [place.path.rpartition(".")[0] for place in places(options)] == ["trainer.callbacks.rewards.a"] * 3
    assert list(sources(fill_in(options))) == ["trainer.callbacks.rewards.a.project = found: from WANDB_PROJECT in the environment"]


def test_each_row_names_an_option_that_is_unset_by_default(file: Path) -> None:
    run = parsed(file)
    for variable in VARIABLES:
        if variable.owner is None:
            assert run.get(variable.option) == variable.unset
        else:
            owner = imported_class(variable.owner)
            assert owner is not None, variable.owner
            assert inspect.signature(owner).parameters[variable.option].default is variable.unset
            assert variable_of(variable.owner, variable.option) == variable.name


def test_a_judge_reads_its_variable_itself_and_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Namespace(class_path="lit_rl.rewards.judges.pairwise.UnifiedRewardThink", init_args=Namespace(judge=None))
    options = Namespace(trainer=Namespace(callbacks=[Namespace(class_path="x.Y", init_args=Namespace(rewards={"think": judge}))]))
    monkeypatch.setenv("UNIFIEDREWARD_THINK_URL", "http://judge:18087")
    told = "trainer.callbacks.rewards.think.judge = http://judge:18087: from UNIFIEDREWARD_THINK_URL in the environment"
    assert list(sources(fill_in(options))) == [told] and judge.init_args.judge is None
    judge.init_args.judge = Namespace(urls="http://other:1")
    assert [line.partition(" = ")[2].partition(": from")[0] for line in sources(fill_in(options))] == ["http://other:1"]


def test_the_file_comes_after_the_process_and_before_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Namespace(class_path="lit_rl.rollouts.http.HTTPEngine", init_args=Namespace(urls=None))
    options = Namespace(model=Namespace(init_args=Namespace(answers=Namespace(engine=engine))))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(env_file, "_of_file", set())
    (tmp_path / ".env").write_text("VLLM_API_BASE=http://file:1/v1\n")
    monkeypatch.setenv("VLLM_API_BASE", "http://process:1/v1")
    use_env_file()
    assert list(sources(fill_in(options.clone()))) == [
        "model.answers.engine.urls = http://process:1/v1: from VLLM_API_BASE in the environment"
    ]
    monkeypatch.setenv("VLLM_API_BASE", "your_server")
    use_env_file()
    filled = fill_in(options.clone())
    assert list(sources(filled)) == ["model.answers.engine.urls = http://file:1/v1: from VLLM_API_BASE in .env"]
    assert HTTPEngine(**vars(filled.model.init_args.answers.engine.init_args)).urls == ["http://file:1"]
    engine.init_args.urls = "yaml:2"
    told = "model.answers.engine.urls = yaml:2: from the run itself, before VLLM_API_BASE in .env"
    assert list(sources(fill_in(options))) == [told]
    assert HTTPEngine().urls == ["http://localhost:8000"]


def test_the_page_has_the_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "running.md").read_text()
    table = text.partition("## Variables of the environment")[2].partition("##")[0]
    told = {cells[1].strip(" `"): cells[2] for line in table.splitlines() if len(cells := line.split("|")) == 4}
    assert {variable.name for variable in VARIABLES} == told.keys() - {"variable", "---"}
    for variable in VARIABLES:
        assert all(part is None or f"`{part}`" in told[variable.name] for part in (variable.option, variable.owner)), variable.name
    assert all(f"`{name}`" in text for name in SECRETS)
