"""Episodes on the disk: lines that can be done again, film strips, and a file that a continued run takes up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from copies import every_step
from digit_world import agent, digit_tasks
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image
from test_episodes import BUTTONS, play
from toy_text import model_folder, trainer

from callbacks.episode_records import EpisodeRecords
from callbacks.rng_state import RngState
from lit_rl.agents.episodes import Manner
from lit_rl.agents.film import FRAME, MARK, film_strip
from lit_rl.agents.records import action_from, header, read_records, record, written
from lit_rl.envs.failures import Status
from lit_rl.envs.gym import GymWorlds
from lit_rl.envs.tasks import Task
from lit_rl.envs.tiny_desktop import TinyDesktops
from lit_rl.errors import ConfigError
from lit_rl.miniatures.vlm import build_vlm
from lit_rl.policies.vision_language import VisionLanguageModel
from lit_rl.replay.__main__ import main
from lit_rl.trackers.samples import Sample


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> VisionLanguageModel:
    folder = tmp_path_factory.mktemp("vlm")
    return VisionLanguageModel(str(build_vlm(folder, family="qwen3_vl", hidden=32, vision_hidden=32, max_side=96)))


@pytest.fixture(scope="module")
def file(policy: VisionLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two episodes in the tiny desktop, of clicks, of a wrong answer, and of a drag."""
    said = {0: ["click 0 0", "hm", "click 1 1", "drag 0 0 1 1"], 1: ["click 1 0", "done", "", ""]}
    found, _ = play(policy, lambda key: said[key[-3]][key[-1]], tasks=[(BUTTONS, 0, 0), (BUTTONS, 0, 1)], manner=Manner(max_repeats=0))
    path = tmp_path_factory.mktemp("records") / "rollouts.jsonl"
    path.write_text(written([header(TinyDesktops(size=64)), *(record(t, iteration=1, stage="train") for t in found)]))
    strip = film_strip(found[0])
    assert strip is not None
    strip.save(path.with_suffix(".png"))
    return path


def test_an_episode_is_read_as_it_was_written(file: Path) -> None:
    worlds, rows = read_records(file)
    assert isinstance(worlds, TinyDesktops) and worlds.size == 64 and len(rows) == 2
    assert [len(row["turns"]) for row in rows] == [4, 2] and rows[0]["task"]["id"] == "b" and rows[0]["seed"] == 3
    assert rows[0]["turns"][1]["action"] is None and "is no action" in rows[0]["turns"][1]["error"]
    drag = action_from(rows[0]["turns"][3]["action"])
    assert drag.kind == "drag" and (drag.x, drag.y2) == (16, 48)


def test_episodes_done_again_go_as_before(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(file)]) == 0
    assert "2 of 2 episodes went as before (0 were lost then and left out)" in capsys.readouterr().out


def test_episodes_of_an_environment_go_as_before_by_its_own_keys_and_a_last_line_that_was_cut_is_passed_over(
    policy: VisionLanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where an instruction has a character by which Unicode ends a line."""
    worlds = GymWorlds(env_id="gym_corridor:Corridor-v0", options={"fault": ""}, keys={"left": 0, "right": 1})
    task = Task(id="a", instruction="go\u2028right", params={"cell": 3}, evaluator={"at_least": 1})
    said = ["key left", "hm", "key right", "key right"]
    [found], _ = play(policy, lambda key: said[key[-1]], worlds=worlds, tasks=[(task, 0, 0)])
    assert found.success and len(found.turns) == 4
    text = written([header(worlds), *[record(found, iteration=1, stage="train")] * 2])
    (tmp_path / "r.jsonl").write_text(text[:-20], encoding="utf-8")
    assert main([str(tmp_path / "r.jsonl")]) == 0
    assert "1 of 1 episodes went as before" in capsys.readouterr().out


def test_an_episode_that_nobody_understood_goes_as_before_where_its_world_would_count_as_done(
    policy: VisionLanguageModel, tmp_path: Path
) -> None:
    task = replace(BUTTONS, evaluator={"command": "desktop get misses", "at_most": 0})
    [found], _ = play(policy, lambda key: "hm", tasks=[(task, 0, 0)])
    assert found.status is Status.PARSE_ERROR and found.reward == 0.0
    (tmp_path / "r.jsonl").write_text(written([header(TinyDesktops(size=64)), record(found, iteration=1, stage="train")]))
    assert main([str(tmp_path / "r.jsonl")]) == 0


def test_another_screen_and_another_end_are_told(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[1]["turns"][1]["state"] = "0123456789abcdef"
    lines[2]["success"] = not lines[2]["success"]
    lines.append({**lines[2], "reward": None})
    (tmp_path / "other.jsonl").write_text(written(lines))
    assert main([str(tmp_path / "other.jsonl")]) == 1
    told = capsys.readouterr().out
    assert "iteration 1 train b #0: turn 2 begins with another screen" in told and "#1: it ends in failure now" in told
    assert "0 of 2 episodes went as before (1 were lost then" in told


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("{", ":1: this is not JSON"),
        ('{"turns": []}', ":1: this has no 'worlds'"),
        ('{"episodes": 9, "worlds": {}}', "its layout is version 9"),
        ('{"episodes": 1, "worlds": {"class_path": "lit_rl.nowhere.X", "init_args": {}}}', "there is no lit_rl.nowhere.X"),
        ('{"episodes": 1, "worlds": {"class_path": "pathlib.Path", "init_args": {}}}', "is no kind of worlds"),
        (
            '{"episodes": 1, "worlds": {"class_path": "lit_rl.envs.tiny_desktop.TinyDesktops", "init_args": {}}}\n[]',
            ":2: this has no 'turns'",
        ),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    assert main([str(tmp_path / "x.jsonl")]) == 2
    assert said in capsys.readouterr().err


def test_a_film_strip_marks_the_actions(file: Path) -> None:
    """Four screens and the last one, side by side; a ring in colour around the first click."""
    strip = Image.open(file.with_suffix(".png")).convert("RGB")
    frame = -(-FRAME // 64) * 64
    assert strip.width == 5 * (frame + 8) and strip.height > frame
    first = strip.crop((0, 0, frame + 8, strip.height))
    assert any(colour == MARK for _, colour in first.getcolors(1 << 20) or ())
    last = strip.crop((4 * (frame + 8), 0, strip.width, strip.height))
    assert not any(colour == MARK for _, colour in last.getcolors(1 << 20) or ())


def test_film_strips_go_to_loggers_that_take_samples(policy: VisionLanguageModel, tmp_path: Path) -> None:
    class Takes(DummyLogger):
        def log_samples(self, samples: Sequence[Sample]) -> None:
            taken.extend(samples)

    taken: list[Sample] = []
    said = {0: ["click 0 0", "click 1 1"], 1: ["done", "done"]}
    found, _ = play(policy, lambda key: said[key[-3]][key[-1] % 2], tasks=[(BUTTONS, 0, 0), (BUTTONS, 0, 1)], manner=Manner(max_repeats=0))
    run, learner = trainer(), agent(model_folder(tmp_path / "lm"))
    run.loggers = [Takes()]
    EpisodeRecords(str(tmp_path), strips=2)._show(run, learner, found, "train-00001")
    assert [sample.prompt for sample in taken] == [f"{t.task.id}: {t.instruction}" for t in found]
    assert [sample.rewards["reward"] for sample in taken] == [t.reward for t in found]
    assert [sample.picture.size for sample in taken if sample.picture] == [film.size for t in found if (film := film_strip(t))]


# ---------------------------------------------------------------------- of whole runs
def lines(folder: Path) -> list[tuple[Any, ...]]:
    rows = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()][1:]
    return [(row["iteration"], row["stage"], row["task"]["id"], row["number"], [t["text"] for t in row["turns"]]) for row in rows]


def test_a_continued_run_writes_every_episode_once(tmp_path: Path) -> None:
    """From inside an iteration, whose episodes are not played again, and from the end of one."""
    model = model_folder(tmp_path / "lm")

    def run(out: str, ckpt: str | None = None) -> list[tuple[Any, ...]]:
        learner, records = agent(model, prompts_per_update=4, group_size=2), EpisodeRecords(str(tmp_path / out / "episodes"))
        fit = trainer(
            max_epochs=3, enable_checkpointing=True, callbacks=[RngState(), records, every_step(tmp_path / out)], limit_val_batches=1
        )
        fit.fit(learner, datamodule=digit_tasks(tmp_path), ckpt_path=ckpt)
        return lines(tmp_path / out / "episodes")

    unbroken = run("run")
    assert len(unbroken) == 3 * 16 + 3 * 8 and len(set(map(str, unbroken))) == len(unbroken)
    for step in (3, 4):
        [saved] = (tmp_path / "run").glob(f"*step={step}.ckpt")
        assert sorted(map(str, run("run", str(saved)))) == sorted(map(str, unbroken)), step


def test_settings_out_of_range() -> None:
    with pytest.raises(ConfigError, match="strips=-1 must not be negative"):
        EpisodeRecords(strips=-1)
