"""Mistakes that are told before torch is imported: the same sentences as the full parse's, and never one about a run that it accepts."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_rl.command_line import early
from lit_rl.command_line.dotted import imported_class
from lit_rl.command_line.options import constructor_options, keys_of

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))
NAMED = sorted({value for file in SHIPPED for path, value, _ in keys_of(file, full=True) if path.endswith("class_path")})
RUN = """
model:
  class_path: lit_rl.methods.grpo.GRPO
  init_args:
    policy: {class_path: lit_rl.policies.causal_lm.CausalLM, init_args: {pretrained: owner/model}}
    credit: {class_path: lit_rl.credit.rules.Group, init_args: {std: false}}
    answers: {chunk: 8}
data: {class_path: datamodules.prompts_text.TextPrompts, init_args: {train: a.jsonl}}
"""


@pytest.fixture
def fully(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], str | None]:
    """The sentence of the full parse, or None if it accepts the run."""
    from lit_rl.command_line.run import CLI

    def parse(words: list[str]) -> str | None:
        monkeypatch.setattr(sys, "argv", ["cli.py", *words])
        monkeypatch.setattr(CLI, "instantiate_classes", lambda self: sys.exit(0))
        with pytest.raises(SystemExit) as done:
            CLI()
        said = capsys.readouterr().err
        return said.removeprefix("error: ").strip() if done.value.code else None

    return parse


def words_of(folder: Path, *texts: str) -> list[str]:
    """A command line with one file for each text."""
    words = ["fit"]
    for number, text in enumerate(texts):
        (folder / f"{number}.yaml").write_text(text)
        words += ["--config", str(folder / f"{number}.yaml")]
    return words


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "run.yaml: there is no such file; did you mean "),
        ("model: [", "this is not YAML"),
        (RUN.replace("chunk: 8", "chunks: 8"), "run.yaml:7: GRPO has no option 'chunks'; did you mean 'chunk'?"),
        (RUN.replace("pretrained:", "pretraned:"), "run.yaml:5: CausalLM has no option 'pretraned'; did you mean 'pretrained'?"),
    ],
)
def test_a_mistake_is_told_without_torch(tmp_path: Path, text: str | None, said: str) -> None:
    for module in ("torch", "lightning", "transformers", "jsonargparse"):
        (tmp_path / f"{module}.py").write_text("raise ImportError('imported before the files were read')")
    file = tmp_path / ("run2.yaml" if text is None else "run.yaml")
    file.write_text(text or "model: 1")
    words = [sys.executable, "cli.py", "fit", "--config", str(tmp_path / "run.yaml")]
    done = subprocess.run(words, cwd=ROOT, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_shipped_files_are_right(file: Path) -> None:
    assert early.early_mistake(["cli.py", "fit", "--config", str(file)]) is None


def test_constructors_that_are_read_have_the_options_that_they_have_when_imported() -> None:
    read = {path: early.parameters(source) for path in NAMED if (source := early.source_of(path))}
    certain = {path: set(names) for path, names in read.items() if names is not None}
    assert len(certain) > 0.8 * len(read) > 20
    for path, names in certain.items():
        known = {option.path.removeprefix("x.") for option in constructor_options(imported_class(path), "x")}
        assert names == {name for name in known if "." not in name}, path


def test_misspelt_keys_of_shipped_files_get_the_sentence_of_the_full_parse(
    fully: Callable[[list[str]], str | None], tmp_path: Path
) -> None:
    draw, told = random.Random(0), 0
    for file in draw.sample([file for file in SHIPPED if file.parent.name not in ("base", "configs")], 12):
        lines = file.read_text().splitlines(keepends=True)
        keys = [(path.split("."), line) for path, _, line in keys_of(file, full=True)]
        path, line = draw.choice([(path, line) for path, line in keys if not path[-1].isdigit() and len(path[-1]) > 3])
        key = path[-1]
        lines[line - 1] = lines[line - 1].replace(f"{key}:", f"{key[:-2]}{key[-1]}:", 1)
        words = words_of(tmp_path, "".join(lines))
        if said := early.early_mistake(["cli.py", *words]):
            told += 1
            later = fully(words)
            assert later is not None and later.split(": ")[0] == said.split(": ")[0], (file, key)
            assert said == later or any(part.isdigit() for part in path), (file, key)  # of callbacks in a list it may name another
    assert told >= 3


TRAINER = """
trainer:
  callbacks:
  - {class_path: callbacks.export.Export, init_args: {at: checkpoint}}
  - class_path: callbacks.reward_scoring.RewardScoring
    init_args: {rewards: {right: {class_path: lit_rl.rewards.text.rules.Gsm8k}}}
"""


@pytest.mark.parametrize(
    ("right", "wrong", "sentence"),
    [
        ("at: ", "att: ", "0.yaml:12: Export has no option 'att'; did you mean 'at'?"),
        ("rewards: ", "reward: ", "0.yaml:14: RewardScoring has no option 'reward'; did you mean 'rewards'?"),
        ("{rewards", "{wait: 1, rewards", "0.yaml:14: RewardScoring has no option 'wait'"),
    ],
)
def test_a_key_of_a_callback_in_a_list(
    fully: Callable[[list[str]], str | None], tmp_path: Path, right: str, wrong: str, sentence: str
) -> None:
    words = words_of(tmp_path, RUN + TRAINER.replace(right, wrong))
    said, later = early.early_mistake(["cli.py", *words]), fully(words)
    assert said is not None and sentence in said
    assert later is not None and later.split(": ")[0] == said.split(": ")[0]  # the full parse refuses the same line


@pytest.mark.parametrize("options", [["--trainer.callbacks", "[]"], ["--trainer.callbacks=null"]])
def test_a_list_that_is_replaced_is_left_to_the_full_parse(tmp_path: Path, options: list[str]) -> None:
    wrong = RUN + TRAINER.replace("at: ", "att: ")
    assert early.early_mistake(["cli.py", *words_of(tmp_path, wrong), *options]) is None
    assert early.early_mistake(["cli.py", *words_of(tmp_path, wrong, "trainer: {callbacks: [{class_path: callbacks.ema.EMA}]}")]) is None


@pytest.mark.parametrize(
    ("usual", "said"),
    [
        ("{sampels: null}", "run.callbacks has no option 'sampels'; did you mean 'samples'?"),
        ("{graceful_stop: {stop_fil: X}}", "run.callbacks.graceful_stop: GracefulStop has no option 'stop_fil'; did you mean 'stop_file'?"),
        ("{samples: {max_images: 2, max_texts: 1}}", None),  # which of the two is not certain
        ("{samples: {max_imagess: 2}}", "run.callbacks.samples: SampleTexts has no option 'max_imagess'"),
        ("{newest: {anything: 1}, progress: null, rng_state: {}}", None),
    ],
)
def test_a_key_of_a_callback_that_every_run_has(tmp_path: Path, usual: str, said: str | None) -> None:
    found = early.early_mistake(["cli.py", *words_of(tmp_path, RUN + f"run: {{callbacks: {usual}}}")])
    assert found is None if said is None else found is not None and said in found


def test_an_option_of_an_earlier_release(fully: Callable[[list[str]], str | None], tmp_path: Path) -> None:
    words = words_of(tmp_path, RUN.replace("answers: {chunk: 8}", "rollout_chunk: 8"))
    said = early.early_mistake(["cli.py", *words])
    assert said is not None and said.endswith("is now model.init_args.answers.chunk") and said == fully(words)


@pytest.mark.parametrize(
    ("texts", "options"),
    [
        ((RUN.replace("std: false", "stdd: false"), "model: {init_args: {credit: {class_path: lit_rl.credit.rules.LeaveOneOut}}}"), []),
        ((RUN.replace("pretrained:", "width:"),), ["--model.policy", "toy.ToyPolicy"]),
        ((RUN.replace("pretrained:", "width:").replace("lit_rl.policies.causal_lm.CausalLM", "toy.ToyPolicy"),), []),
        (("base: &base {chunks: 8}\n" + RUN.replace("{chunk: 8}", "{<<: *base}"),), []),
        ((RUN.replace("chunk: 8", "chunks: 8"),), ["--model.help", "lit_rl.methods.grpo.GRPO"]),
        ((RUN.replace("chunk: 8", "chunks: 8"),), ["--config", "{model: {class_path: toy.Other}}"]),
    ],
)
def test_what_is_not_certain_is_left_to_the_full_parse(tmp_path: Path, texts: tuple[str, ...], options: list[str]) -> None:
    assert early.early_mistake(["cli.py", *words_of(tmp_path, *texts), *options]) is None


@pytest.mark.parametrize(
    "source",
    [
        "class A(B):\n    def __init__(self, a, **kwargs):\n        self.kept = kwargs",
        "class A(Unknown):\n    def __init__(self, a, **kwargs):\n        super().__init__(**kwargs)",
        "class A(metaclass=M):\n    def __init__(self, a): ...",
        "@changed\nclass A:\n    def __init__(self, a): ...",
        "class A:\n    def __new__(cls, *args): ...\n    def __init__(self, a): ...",
        "@dataclass\nclass A:\n    a: int = field(init=False)",
    ],
)
def test_constructors_that_reading_cannot_be_sure_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    (tmp_path / "lit_rl").mkdir()
    (tmp_path / "lit_rl" / "made_up.py").write_text(source)
    monkeypatch.setattr(early, "ROOT", tmp_path)
    found = early.source_of("lit_rl.made_up.A")
    assert found is not None and early.parameters(found) is None
    early._tree.cache_clear()
