"""Rows of a rollout keep all that is said of them, whatever it is called: taken, joined, cut into minibatches, stored and read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.replay.batches import finite_rows, token_batch, without_rows
from lit_rl.replay.pairs import sibling_numbers
from lit_rl.replay.preferences import of_both, pair_rows, pair_units, preferences
from lit_rl.replay.rows import concatenated, restored, select
from lit_rl.replay.sequences import pair_sequences, sequences
from lit_rl.types import Prompts, TokenRollout


def rollout(first: int, lengths: list[int], *, media: bool = True) -> TokenRollout:
    """Row r has tokens r; its stream, column and pictures are made of r."""
    rows = range(first, first + len(lengths))
    prompts = Prompts(group=torch.tensor(list(rows), dtype=torch.long), info=[{"prompt": f"{r}"} for r in rows])
    made = sequences(prompts, [[r] * n for r, n in zip(rows, lengths)], [[False] + [True] * (n - 1) for n in lengths])
    each = torch.tensor(list(rows), dtype=torch.float32)
    made = made.with_streams(flat=each[:, None] * made.mask, deep=(each[:, None] * made.mask)[..., None].expand(-1, -1, 2))
    made = made.with_columns(turn=each, place=torch.stack([each, -each], 1))
    pictures = [[torch.full((3, r + 1, i + 1), r, dtype=torch.uint8) for i in range(r % 3)] for r in rows]
    return replace(made, rewards={"right": each.double()}, media=pictures if media else ())


def check(found: TokenRollout, expected: list[int]) -> None:
    """The rows are these, and all that is said of them is theirs."""
    assert found.group.tolist() == expected and [row["prompt"] for row in found.info] == [f"{r}" for r in expected]
    each = torch.tensor(expected, dtype=torch.float32)
    assert torch.equal(found.columns["turn"], each) and torch.equal(found.columns["place"], torch.stack([each, -each], 1))
    assert torch.equal(found.streams["flat"], each[:, None] * found.mask)
    assert torch.equal(found.streams["deep"], (each[:, None] * found.mask)[..., None].expand(-1, -1, 2))
    assert found.rewards["right"].tolist() == expected
    for r, row in zip(expected, found.media):
        assert [picture.shape for picture in row] == [(3, r + 1, i + 1) for i in range(r % 3)] and all((x == r).all() for x in row)


def test_rows_are_taken_in_any_order_and_none_of_them_too() -> None:
    made = rollout(0, [3, 5, 2, 4])
    check(select(made, torch.tensor([2, 0, 3])), [2, 0, 3])
    nothing = select(made, torch.tensor([], dtype=torch.long))
    assert len(nothing) == 0 and nothing.streams["deep"].shape == (0, 4, 2) and list(nothing.media) == []


def test_rollouts_are_joined_as_wide_as_the_widest() -> None:
    joined = concatenated([rollout(0, [3, 2]), rollout(2, []), rollout(2, [6, 2, 3])])
    assert joined.tokens.shape == (5, 6) and joined.streams["deep"].shape == (5, 5, 2)
    check(joined, [0, 1, 2, 3, 4])
    parts = concatenated([select(joined, torch.tensor([r])) for r in (4, 1)])
    check(parts, [4, 1])


def test_rows_without_media_stand_beside_rows_with_some() -> None:
    joined = concatenated([rollout(0, [2, 2], media=False), rollout(2, [2])])
    assert [len(row) for row in joined.media] == [0, 0, 2]
    assert concatenated([rollout(0, [2], media=False)] * 2).media == ()


def test_what_some_lack_is_named() -> None:
    with pytest.raises(ValueError, match="some have the columns turns, the streams values"):
        concatenated([rollout(0, [2]), rollout(1, [2]).with_streams(values=torch.zeros(1, 1)).with_columns(turns=torch.zeros(1))])


def test_everything_moves_but_what_a_prompt_holds() -> None:
    made = replace(rollout(1, [2, 3]), info=[{"prompt": "a", "image": torch.zeros(1)}] * 2)
    moved = made.to("meta")
    assert all(x.is_meta for x in (moved.tokens, moved.streams["flat"], moved.columns["turn"], moved.rewards["right"], moved.media[0][0]))
    assert not moved.info[0]["image"].is_meta and not made.tokens.is_meta and len(made) == len(moved) == 2
    batch = token_batch(made, torch.tensor([0, 1])).to("meta")
    assert batch.media[0][0].is_meta and batch.streams["flat"].is_meta


# ---------------------------------------------------------------------- minibatches
def weighed(lengths: list[int], weights: list[float], **settings: Any) -> TokenRollout:
    made = rollout(1, lengths, **settings)
    each = torch.tensor(weights)[:, None] * made.mask
    return replace(made, advantages=each, weights=each)


def test_a_minibatch_is_as_wide_as_its_longest_row() -> None:
    batch = token_batch(weighed([3, 9, 5], [1.0, 1.0, 1.0]), torch.tensor([2, 0]))
    assert batch.tokens.shape == (2, 5) and batch.streams["deep"].shape == (2, 4, 2) and batch.group.tolist() == [3, 1]
    assert batch.columns["turn"].tolist() == [3, 1] and [len(row) for row in batch.media] == [0, 1]


@pytest.mark.parametrize("media", [True, False])
def test_a_row_without_weight_shows_another(media: bool) -> None:
    """Two tokens of it, or all that has places for its pictures; its streams are 0, its columns its own."""
    batch = token_batch(weighed([4, 9, 5], [0.0, 1.0, 0.0], media=media), torch.tensor([0, 1, ~torch.tensor(1)]))
    assert batch.lengths.tolist() == ([9, 9, 9] if media else [2, 9, 9])
    assert (batch.tokens[0, :2] == 2).all() and not batch.mask[0].any() and not batch.streams["deep"][0].any()
    assert batch.columns["turn"].tolist() == [1, 2, 2] and batch.weights[2].sum() == 0 and batch.mask[2].any()
    assert not media or [len(row) for row in batch.media] == [2, 2, 2]


@pytest.mark.parametrize("name", ["flat", "deep", "logprobs"])
def test_a_stream_that_is_not_finite_spoils_its_row_alone(name: str) -> None:
    made = rollout(0, [3, 4, 2])
    stream = made.logprobs if name == "logprobs" else made.streams[name]
    stream = stream.clone()
    stream[1, 2], stream[2, 2] = torch.nan, torch.inf  # the second of them is padding
    made = replace(made, logprobs=stream) if name == "logprobs" else made.with_streams(**{name: stream})
    kept = finite_rows(made)
    assert kept.tolist() == [True, False, True]
    clean = without_rows(made, kept)
    assert not clean.mask[1].any() and clean.rewards["right"].isnan().tolist() == [False, True, False]
    assert all(x[1].isfinite().all() for x in (clean.logprobs, *clean.streams.values())) and clean.columns["turn"][1] == 1


# ---------------------------------------------------------------------- checkpoints
def plain(made: TokenRollout) -> dict[str, Any]:
    return dict(vars(made))


def test_a_rollout_is_read_as_it_was_stored(tmp_path: Any) -> None:
    torch.save(plain(rollout(0, [3, 5, 2, 4])), tmp_path / "rollout.pt")
    check(restored(torch.load(tmp_path / "rollout.pt", weights_only=True)), [0, 1, 2, 3])


def test_earlier_layouts_are_read() -> None:
    """Streams and columns were fields, None where a method had none; answers from the data did not say that they are whole."""
    made = rollout(0, [3, 2])
    earlier = plain(made) | {"behaviour": made.logprobs + 1, "reference": None, "values": None, "returns": None, "stopped": torch.empty(0)}
    for name in ("streams", "columns", "media"):
        del earlier[name]
    found = restored(earlier | {"preference": torch.tensor([1, -1])})
    assert found.streams.keys() == {"behaviour"} and torch.equal(found.streams["behaviour"], made.logprobs + 1)
    assert found.columns["preference"].tolist() == [1, -1] and found.stopped.tolist() == [True, True] and not found.media


def test_layouts_that_nobody_knows_are_refused() -> None:
    stored = plain(rollout(0, [3, 2]))
    with pytest.raises(ConfigError, match="its rollout has latents, which this release does not know.*or from a checkpoint of the end"):
        restored(stored | {"latents": torch.zeros(2)})
    with pytest.raises(ConfigError, match="its rollout lacks mask"):
        restored({name: x for name, x in stored.items() if name != "mask"})


# ---------------------------------------------------------------------- pairs
GROUP = torch.tensor([7, 3, 3, 9, 7, 5])
PREFERENCE = torch.tensor([-1, 1, -1, 0, 1, 0])


def test_pairs_are_found_by_their_ids() -> None:
    """3: rows 1 and 2; 7: rows 4 and 0. Rows 3 and 5 are answers of the policy."""
    chosen, rejected = pair_rows(GROUP, PREFERENCE)
    assert chosen.tolist() == [1, 4] and rejected.tolist() == [2, 0]
    spread: Tensor = of_both((chosen, rejected), torch.tensor([10, 20]), torch.arange(6))
    assert spread.tolist() == [20, 10, 10, 3, 20, 5]
    units = pair_units(torch.arange(6), GROUP, PREFERENCE)
    assert [unit.tolist() for unit in units] == [[4, 0], [1, 2], [3], [5]]
    assert [unit.tolist() for unit in pair_units(torch.tensor([5, 2, 1]), GROUP, PREFERENCE)] == [[5], [1, 2]]


def test_no_pairs_are_no_rows() -> None:
    chosen, rejected = pair_rows(GROUP, torch.zeros_like(GROUP))
    assert len(chosen) == len(rejected) == 0


@pytest.mark.parametrize("preference", [[1, 1, -1, -1], [1, -1, 1, 0]])
def test_answers_that_have_no_other_are_refused(preference: list[int]) -> None:
    with pytest.raises(ValueError, match="do not make pairs"):
        pair_rows(torch.tensor([1, 2, 1, 3]), torch.tensor(preference))


def test_each_row_of_the_data_gives_both_of_its_answers() -> None:
    """Wherever its two rows stand."""
    prompts = Prompts(group=torch.tensor([4, 8, 4, 8]), info=[{"prompt": p} for p in "abab"])
    made = pair_sequences(prompts, lambda row: ([1], [2, 2], [3, 3]) if row["prompt"] == "a" else ([5], [6], [7]))
    assert [row[:n].tolist() for row, n in zip(made.tokens, made.lengths.tolist())] == [[1, 2, 2], [5, 6], [1, 3, 3], [5, 7]]
    assert made.columns["preference"].tolist() == [1, 1, -1, -1] == preferences(prompts.group).tolist()
    assert sibling_numbers(prompts.group) == [0, 0, 1, 1] and made.stopped.all()
