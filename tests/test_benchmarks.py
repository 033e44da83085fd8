"""The benchmarks in miniature: that both arms compute the same update, and that their difference would be seen."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import ForkedModule, ended, forked_script

from benchmarks import data as data_sets
from benchmarks import (
    deepgen_iteration,
    demos,
    flow_grpo_iteration,
    generation,
    growth,
    overhead,
    overlap,
    pages,
    platform_load,
    processes,
    push,
    startup,
    token_logprobs,
    trl_compare,
    trl_sides,
)
from lit_rl.miniatures.lm import build_lm

SIZES = {
    "mini": replace(
        flow_grpo_iteration.SIZES["mini"],
        **{"prompts": 2, "group": 3, "num_steps": 3, "plain_batches": (3, 1), "rollout_batch": 4, "pairs": 5},
        model={"hidden": 16, "heads": 1, "layers": 1, "text_hidden": 8, "t5_hidden": 16},
    )
}


def test_our_iteration_and_the_plain_loop_train_the_same_weights() -> None:
    """6 images x 2 trained steps, in micro-batches of 2 or 3 pairs beside forwards of 3 images and of 1, over two iterations."""
    table = flow_grpo_iteration.main(["--repeats", "1", "--latency", "0.001"], SIZES)
    assert re.findall(r"ratio \d+\.\d\d, undisturbed \d+\.\d\d \(ours / plain, (\d) images\)", table) == ["3", "1"]
    distances = [float(number) for number in re.findall(r"weights differ by (\S+) of the way moved", table)]
    assert len(distances) == 2 and all(0 < distance < 1e-3 for distance in distances)


def test_a_plain_loop_that_trains_something_else_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    right = flow_grpo_iteration.group_advantages
    monkeypatch.setattr(flow_grpo_iteration, "group_advantages", lambda *given: 0.9 * right(*given))
    with pytest.raises(SystemExit, match="did not compute the same update"):
        flow_grpo_iteration.main(["--repeats", "1", "--latency", "0", "--plain-batch", "3"], SIZES)


@pytest.mark.parametrize("options", [[], ["--one-backward"]])
def test_an_iteration_of_deepgen_and_its_own_loop_train_the_same_weights(options: list[str]) -> None:
    """32 images x 6 trained steps with the divergence from the reference, over two iterations."""
    small: dict[str, Any] = {"hidden": 16, "heads": 1, "layers": 1, "language_layers": 3, "connector_hidden": 24}
    table = deepgen_iteration.main(["--repeats", "1", "--latency", "0.001", *options], **small)
    distance = float(re.findall(r"weights differ by (\S+) of the way moved", table)[0])
    assert 0 < distance < 1e-3 and 10 < int(re.findall(r"(\d+)% of our iteration's CPU seconds", table)[0]) < 100


def test_a_data_set_is_opened_and_tokenized_by_both_arms(tmp_path: Path) -> None:
    """Both read the rows of the file; ours keeps what it found and sees the changed row. In one process, where nothing is measured."""
    model, path = build_lm(tmp_path / "lm", hidden=32), tmp_path / "rows.jsonl"
    data_sets.write_rows(path, 30)
    assert all(arm(path, model, 20)["last"] == 1 for arm in (data_sets.ours, data_sets.datasets))
    stamp, before = path.stat(), path.read_bytes()
    data_sets.changed(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stamp.st_size, stamp.st_mtime_ns)
    assert [a == b for a, b in zip(before, path.read_bytes(), strict=True)].count(False) == 1
    assert data_sets.ours(path, model, 20)["last"] == 0


def test_overhead_prints_ratios_of_all_arms() -> None:
    """And the bare loop it compares with learns: the mean pixel rises."""
    table = overhead.main(["--iterations", "2", "--minibatches", "2", "5"])
    names = [line[:28].strip() for line in table.splitlines()[1:]]
    assert names == ["iteration of 2 minibatches", "iteration of 5 minibatches", "one more minibatch"]
    ours, bare, least, *ratios = (float(number) for number in table.splitlines()[1][28:].split())
    assert ratios == pytest.approx([ours / bare, least / bare, ours / least], rel=0.1)
    torch.manual_seed(0)
    loop = overhead.BareLoop(overhead.Work(2))
    before = brightness(loop)
    for _ in range(200):
        loop.iteration()
    assert brightness(loop) > before + 0.05


def brightness(loop: overhead.BareLoop) -> float:
    """Mean pixel of deterministic samples."""
    x = torch.randn(64, *overhead.SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for sigma, following in zip(loop.sigmas, loop.sigmas[1:]):
            x = x + loop.policy.velocity(x, sigma.expand(64), {}) * (following - sigma)
    return float(loop.reward.score(loop.policy.decode(x), [])["brightness"].mean()) / 255


@pytest.mark.slow  # a second process imports everything
def test_overlap_prints_a_factor_for_every_reward() -> None:
    table = overlap.main(["--repeats", "1", "--prompts", "2", "--group", "2", "--chunk", "2", "--side", "32"])
    rows = {line[:24].strip(): [float(number) for number in line[24:].split()] for line in table.splitlines()[2:]}
    assert list(rows) == ["sleeping, 0.5 x rollout", "sleeping, 1.0 x rollout", "HTTP, 0.5 x rollout", "HTTP, 1.0 x rollout"]
    for _, scoring, overlapped, waited, factor in rows.values():
        assert 0 < waited < overlapped and scoring > 0 and factor > 0
    assert torch.get_num_threads() == 1


@pytest.mark.slow  # fresh processes, for their high-water marks
def test_token_logprobs_prints_ratios_of_equal_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    case = token_logprobs.Case(tokens=1024, vocabulary=32768, hidden=16, frozen=False, entropy=False)
    row = token_logprobs.measure(case, repeats=1)
    numbers = [float(number) for number in row.removeprefix("trained head").split()]
    assert len(numbers) == 6 and 0 < numbers[5] < 0.5
    monkeypatch.setitem(token_logprobs.WAYS, "ours", lambda *given: 0.99 * token_logprobs.plain(*given))
    with pytest.raises(SystemExit, match="same gradients"):
        token_logprobs.measure(case, repeats=1)


def test_both_ways_to_generate_draw_as_many_tokens() -> None:
    """2 x 3 answers of 5 tokens; and of fewer where one token in four ends an answer."""
    endless = generation.Case(vocab=128, prompts=2, group=3, prompt_lengths=(3, 6), new_tokens=5, stops=0, hidden=32, layers=1)
    table = generation.main(["--repeats", "1", "--no-memory"], {"endless": endless, "ragged": replace(endless, new_tokens=40, stops=32)})
    assert len(re.findall(r"times the answers/s \d+\.\d\d, by CPU seconds \d+\.\d\d", table)) == 2
    tokens = [float(line.split()[-1]) for line in table.splitlines() if line.startswith("drawn")]
    assert tokens[:2] == [30, 30] and all(6 <= drawn < 60 for drawn in tokens[2:])


TRL_CASES = {name: replace(case, rows=4, prompt=5, answer=6, vocab=128, hidden=16, layers=1) for name, case in trl_compare.CASES.items()}


def our_lines(case: trl_sides.Case, folder: Path) -> list[dict[str, Any]]:
    """The lines that our side writes in 2 turns of 2 steps."""
    build_lm(folder, vocab_size=case.vocab, hidden=case.hidden, layers=case.layers, tied=True, chat=False)
    told = StringIO()
    turns = trl_sides.Turns(2, told, StringIO())
    trl_sides.ours(case, folder, 4, turns)
    turns.end()
    return [json.loads(line) for line in told.getvalue().splitlines()]


@pytest.mark.parametrize("method", ["sft-half-1k", "dpo-1k", "grpo-1k"])
def test_our_side_of_the_comparison_with_trl_trains_what_the_case_says(method: str, tmp_path: Path) -> None:
    """Every step trains rows x answer tokens; the first loss is the model's own cross-entropy of the answers with their ends, or log 2."""
    case = TRL_CASES[method]
    lines = our_lines(case, tmp_path)
    assert [next(iter(line)) for line in lines] == ["ready", "turn", "turn", "end"]
    end = lines[-1]["end"]
    assert end["tokens"] == [4 * 6 * (2 if method == "dpo-1k" else 1)] * 4 == [case.tokens] * 4
    if method == "grpo-1k":
        return
    expected = math.log(2) if method == "dpo-1k" else cross_entropy(case, tmp_path)
    assert end["losses"][0] == pytest.approx(expected, abs=1e-5) and end["losses"][1] != end["losses"][0]


def cross_entropy(case: trl_sides.Case, folder: Path) -> float:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, lm = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    rows = case.data(4)[: case.rows]
    ids = torch.tensor([[*tokenizer(row["prompt"] + row["completion"]).input_ids, tokenizer.eos_token_id] for row in rows])
    labels = ids.clone()
    labels[:, : case.prompt] = -100
    return float(lm(input_ids=ids, labels=labels).loss.detach())


def test_sides_that_do_different_work_are_told() -> None:
    case = TRL_CASES["sft-1k"]
    same = {"tokens": [24, 24], "losses": [2.0, 1.5], "cpu": 1.0, "clock": 2.0, "growth": 2**20}
    table = trl_compare.report("sft", case, {"ours": same, "trl": same | {"cpu": 4.0, "growth": 2**22}})
    assert "differ by at most 0e+00" in table and table.split()[-3:] == ["0.25", "1.00", "0.25"]
    with pytest.raises(SystemExit, match="not 24 in each"):
        trl_compare.check(case, {"ours": same | {"tokens": [24, 23]}, "trl": same})
    with pytest.raises(SystemExit, match="losses differ by up to 2.0e-04"):
        trl_compare.check(case, {"ours": same, "trl": same | {"losses": [2.0, 1.5002]}})


@pytest.mark.slow  # a second process imports everything
def test_the_comparison_with_trl_runs_our_side_alone_in_turns() -> None:
    table = trl_compare.main(["--case", "sft-1k", "--side", "ours", "--turns", "1", "--size", "2"], TRL_CASES)
    assert "sft-1k: 4 steps, each of 24 trained tokens; losses" in table and "MiB" in table and "ratio" not in table


def test_startup_tells_mistakes_sooner_than_it_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those two and `import torch` are fresh processes; the others, whose seconds are not compared, are forked from one that is warm."""
    fresh = startup.cpu_seconds

    def cpu_seconds(command: Sequence[str], folder: Path, *, fails: bool) -> float:
        if fails or command[-1] == "import torch":
            return fresh(command, folder, fails=fails)
        if command[1] == "-c":
            (folder / "code.py").write_text(command[2])
        words = ["code.py"] if command[1] == "-c" else command[1:]
        assert ended(forked_script(*words, folder=folder), timeout=200) == 0, (folder / "log").read_text()
        return 1.0

    monkeypatch.setattr(startup, "cpu_seconds", cpu_seconds)
    rows = {line[:20].strip(): float(line[20:28]) for line in startup.main(["--repeats", "1"]).splitlines()[1:]}
    assert list(rows) == ["import torch", "import lightning", "a missing file", "a wrong key", "plain script", "first forward", "one step"]
    assert rows["a missing file"] < rows["import torch"] and rows["a wrong key"] < rows["import torch"]


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark's processes are forked from one that has imported everything, for tests that do not ask what an arm costs."""
    monkeypatch.setattr("subprocess.Popen", ForkedModule)


@pytest.mark.usefixtures("forks")
def test_both_pushes_write_the_same_weights_in_their_dtypes(tmp_path: Path) -> None:
    model = build_lm(tmp_path / "model", hidden=64, heads=2, vocab_size=4096)
    figures = {arm: push.run_pair(arm, model) for arm in push.ARMS}
    size = {arm: first["files_mib"] for arm, (first, _) in figures.items()}
    assert size["torch, float32"] == pytest.approx(size["ours, float32"], rel=0.02)
    assert size["torch, float32"] == pytest.approx(2 * size["ours, bfloat16"], rel=0.05) and size["ours, bfloat16"] > 1
    assert all(second["files_mib"] == 0 and second["change"] >= 0 for _, second in figures.values())


@pytest.mark.usefixtures("forks")
def test_two_processes_do_the_work_of_two_single_runs() -> None:
    """Each process trains on as many rows either way, so that only the run of two waits for others, and says for whom."""
    table = processes.main(["--case", "language", "--iterations", "1", "--rounds", "1"])
    assert re.findall(r"language: (\w+) \d+\.\d+ s alone, \d+\.\d+ s together, efficiency \d+\.\d\d", table) == ["clock", "cpu"]
    assert re.findall(r"waits \d+\.\d+ s in (?:\w+\.py:\w+|Lightning)", table)


def test_growth_prints_a_ratio_for_every_size_and_what_it_holds() -> None:
    """A rollout of 4 prompts x G samples of 6 steps holds at least its latents; the cache holds what answers of L tokens need."""
    table = growth.main(["--iterations", "1", "--case", "group", "length"], {"group": (2, 4), "length": (3, 6)})
    rows = [[float(n) for n in re.findall(r"\d+\.?\d*", line)] for line in table.splitlines() if re.match(r"\| \d", line)]
    assert [row[0] for row in rows] == [2, 4, 3, 6]
    assert all(row[1] > 0 and row[3] == pytest.approx(row[1] / row[2], rel=0.02) for row in rows)
    assert all(1 <= row[4] < 2 for row in rows[:2]) and all(0.5 < row[4] <= 1 for row in rows[2:])
    assert len(re.findall(r"growth / 2 ", table)) == 2


def test_demos_that_did_other_work_are_not_compared(tmp_path: Path) -> None:
    """And a demo's counts and accuracy are those of its logs and its summary."""
    from torch.utils.tensorboard import SummaryWriter

    for name, steps in {"sft": (1, 2), "grpo": (5, 9)}.items():
        with SummaryWriter(tmp_path / name) as log:
            for step in steps:
                log.add_scalar("val/score", 0.5, step)
                log.add_scalar("loss", 0.5, step + 1)
    (tmp_path / "summary.json").write_text(json.dumps({"answers_trained": 80, "held_out_accuracy": {"after_rl": 0.75}}))
    then = demos.found(tmp_path, 20.0)
    assert then.work == (80, [3, 10], 2) and then.accuracy == 0.75
    now = replace(then, seconds=13.0, accuracy=0.8)
    assert demos.row("llm", 1, then, now) == "| llm, seed 1 | 80 | 20 s | 13 s | **0.65** | 0.750 / 0.800 |"
    with pytest.raises(SystemExit, match="did not do the same"):
        demos.row("llm", 1, then, replace(now, evaluations=1))


@pytest.mark.slow  # a server of its own
def test_the_platform_takes_a_load_and_a_kill() -> None:
    """Whoever reads gets the last step beside a client that is frozen; of what was accepted before a kill nothing is lost."""
    table = platform_load.main(["--jobs", "2", "--points", "400", "--clients", "3", "--seconds", "0.3"])
    assert "400 numbers of 2 jobs" in table and "2 of the 2 that read saw the last step" in table
    found = re.search(
        r"1 kills .*: 0 jobs lost, 0 started twice, 0 with another end than expected, 0 of \d+", platform_load.main(["--kills", "1"])
    )
    assert found is not None


def test_pages_are_compared_by_medians() -> None:
    """2 episodes a second there; 4 pages at once give 5, which is 2.5 times as many."""
    table = pages.report({0: [1.0, 3.0, 2.0], 4: [4.0, 9.0, 5.0]})
    assert re.findall(r"([\d.]+) episodes/s", table) == ["2.00", "5.00"] and table.endswith("ratio 2.50")
