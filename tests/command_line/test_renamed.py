"""A file of an earlier release gets a sentence with the new name."""

from __future__ import annotations

from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest
import yaml
from jsonargparse import Namespace
from toy import toy_config

from lit_rl.command_line.renamed import CONFIG_VERSION, MOVED, RENAMED, moved, other_version
from lit_rl.doctor.runs import parse
from lit_rl.errors import ConfigError
from lit_rl.rewards.client import HTTPReward

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("old", MOVED)
def test_what_moved_is_where_the_sentence_says(old: str) -> None:
    module, _, name = MOVED[old].rpartition(".")
    if name[0].isupper():
        assert hasattr(import_module(module), name)
    else:
        import_module(MOVED[old])
    assert moved(f"{old}.Some" if name[0].islower() else old) == MOVED[old] + (".Some" if name[0].islower() else "")


def test_what_is_where_it_was_has_not_moved() -> None:
    assert moved("lit_rl.methods.flow_grpo.FlowGRPO") is None and moved("lit_rl.modules.base.LitRL") is None


def test_an_old_class_in_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    run = toy_config(tmp_path)
    run["trainer"]["strategy"] = {"class_path": "lit_rl.strategies.FSDP2Strategy"}
    text = yaml.safe_dump(run)
    (tmp_path / "run.yaml").write_text(text)
    line = next(i for i, row in enumerate(text.splitlines(), start=1) if "FSDP2Strategy" in row)
    with pytest.raises(ConfigError) as said:
        parse(["--config", str(tmp_path / "run.yaml")])
    assert f"run.yaml:{line}: lit_rl.strategies.FSDP2Strategy is now lit_rl.strategies.fsdp2.FSDP2Strategy" in str(said.value)


@pytest.fixture(scope="module")
def runs() -> dict[str, Namespace]:
    """Shipped runs, with the components that they leave out."""
    nothing = ["--model.kl_in_reward.coef", "0.1", "--model.length_penalty.buffer", "1", "--model.credit", "lit_rl.credit.rules.Group"]
    dynamic = ["--model.dynamic_sampling.max_generations", "3"]
    others = ("ppo/qwen25_7b_gsm8k", "demo/flow_grpo_ocr", "gspo/qwen25_7b_self_play", "diffusion_nft/flux_ocr")
    awm = ["--model", "lit_rl.methods.diffusion_nft.AWM", "--model.surrogate", "lit_rl.losses.point_surrogates.Matching"]
    more = {"grpo/qwen25_7b_gsm8k": [*nothing, *dynamic], "demo/diffusion_nft_ocr": awm, **{name: [] for name in others}}
    return {name: parse(["--config", str(ROOT / f"configs/{name}.yaml"), *options]) for name, options in more.items()}


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_option_is_where_the_sentence_says(runs: dict[str, Namespace], old: str) -> None:
    if "." not in old:  # an option of a class, wherever that stands in a run
        assert RENAMED[old] in signature(HTTPReward).parameters and old not in signature(HTTPReward).parameters
        return
    assert any(RENAMED[old] in run for run in runs.values()) and not all(old in run for run in runs.values())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.clip_low", "0.1"], "model.clip_low of earlier releases is now model.init_args.surrogate.init_args.low"),
        (["--model.init_args.sampling.top_p", "0.9"], "is now model.init_args.answers.sampling"),
    ],
)
def test_an_old_option_is_named_with_the_new_one(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(["--config", str(ROOT / "configs/grpo/qwen25_7b_gsm8k.yaml"), *words])
    assert said in str(raised.value)


def test_an_old_option_in_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    text = (
        (ROOT / "configs/grpo/qwen25_7b_gsm8k.yaml").read_text().replace("    group_size: 5\n", "    group_size: 5\n    dual_clip: 3.0\n")
    )
    (tmp_path / "run.yaml").write_text(text)
    line = next(i for i, row in enumerate(text.splitlines(), start=1) if "dual_clip" in row)
    with pytest.raises(ConfigError) as raised:
        parse(["--config", str(tmp_path / "run.yaml")])
    assert f"run.yaml:{line}: model.dual_clip of earlier releases is now model.init_args.surrogate.init_args.dual" in str(raised.value)


# ---------------------------------------------------------------------- versions
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"config_version: {CONFIG_VERSION}\n", None),
        ("trainer: {}\n", None),
        ("trainer: {}\nconfig_version: 0\n", "run.yaml:2: config_version is 0, and this release reads"),
        ("config_version: 99\n", "update lit-rl"),
        ("# lightning.pytorch==2.6.6\nmodel: {}\n", "run.yaml was saved by a run of an earlier release: it has no config_version"),
    ],
)
def test_the_version_that_a_file_states(tmp_path: Path, text: str, said: str | None) -> None:
    (tmp_path / "run.yaml").write_text(text)
    sentence = other_version(["cli.py", "fit", "--config", str(tmp_path / "run.yaml")])
    assert sentence is None if said is None else said in (sentence or "")


def test_what_a_run_saves_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_rl.command_line.run import CLI

    (tmp_path / "run.yaml").write_text(yaml.safe_dump(toy_config(tmp_path)))
    monkeypatch.setattr("sys.argv", ["cli.py", "fit", "--config", str(tmp_path / "run.yaml"), "--trainer.max_epochs", "1"])
    CLI()
    saved = tmp_path / "config.yaml"
    assert yaml.safe_load(saved.read_text())["config_version"] == CONFIG_VERSION
    assert parse(["--config", str(saved)]).trainer.max_epochs == 1
    saved.write_text(saved.read_text().replace(f"config_version: {CONFIG_VERSION}", ""))
    with pytest.raises(ConfigError, match=r"was saved by a run of an earlier release"):
        parse(["--config", str(saved)])


@pytest.mark.parametrize(
    ("config", "now", "then", "said"),
    [
        ("gspo/qwen25_7b_self_play", "    group_size: ", "    pref_coef: 0.5\n    group_size: ", "model.init_args.preference.coef"),
        ("demo/flow_grpo_ocr", "outputs: [ocr_similarity]", "outputs: [ocr_similarity], images_per_request: 4", "samples_per_request"),
    ],
)
def test_an_old_option_of_a_part_is_named_where_it_stands(tmp_path: Path, config: str, now: str, then: str, said: str) -> None:
    """The name that a user gives to a reward is part of the old path."""
    text = (ROOT / f"configs/{config}.yaml").read_text()
    assert text.count(now) == 1
    (tmp_path / "run.yaml").write_text(text.replace(now, then))
    line = next(i for i, row in enumerate(text.replace(now, then).splitlines(), start=1) if "pref_coef" in row or "images_per" in row)
    with pytest.raises(ConfigError) as raised:
        parse(["--config", str(tmp_path / "run.yaml")])
    assert f"run.yaml:{line}: " in str(raised.value) and f"of earlier releases is now {said}" in str(raised.value)
