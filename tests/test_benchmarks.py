"""The benchmarks in miniature: that both arms compute the same update, and that their difference would be seen."""

import re
from dataclasses import replace

import pytest
import torch

from benchmarks import flow_grpo_iteration, generation, overlap, token_logprobs

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


@pytest.mark.slow  # a second process imports everything
def test_overlap_prints_a_factor_for_every_reward() -> None:
    table = overlap.main(["--repeats", "1", "--prompts", "2", "--group", "2", "--chunk", "2", "--side", "32"])
    rows = {line[:24].strip(): [float(number) for number in line[24:].split()] for line in table.splitlines()[2:]}
    assert list(rows) == ["sleeping, 0.5 x rollout", "HTTP, 0.5 x rollout", "sleeping, 1.0 x rollout", "HTTP, 1.0 x rollout"]
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
