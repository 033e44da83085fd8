"""Packing: nothing lost, nothing twice, nothing too long; layouts; TRL's rows."""

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_rl.losses.supervised import targets_of
from lit_rl.replay.packing import pack, packed_layout, padded_layout, row_lengths, take

SIZES = st.lists(st.integers(0, 40), max_size=30)


@given(SIZES, st.integers(1, 20), st.sampled_from(["bfd", "bfd_split", "wrapped"]))
def test_every_token_is_in_exactly_one_row(sizes, length, strategy):
    sequences = [[(k, i) for i in range(size)] for k, size in enumerate(sizes)]
    plan = pack(sizes, length=length, strategy=strategy)
    rows = take(plan, sequences)
    assert all(0 < len(row) <= length for row in rows)
    assert row_lengths(plan) == [[end - start for _, start, end in row] for row in plan]
    kept = [s[:length] for s in sequences] if strategy == "bfd" else sequences
    assert sorted(token for row in rows for token in row) == sorted(token for s in kept for token in s)
    if strategy == "wrapped":
        assert [token for row in rows for token in row] == [token for s in sequences for token in s]
        assert all(len(row) == length for row in rows[:-1])
    else:  # no two rows that one could hold
        assert all(len(a) + len(b) > length for a, b in itertools.combinations(rows, 2))


def test_best_fit_by_hand():
    """Rows of 10 for 6, 7, 3, 4, 2: 7 + 3, 6 + 4, 2."""
    assert [[piece.sequence for piece in row] for row in pack([6, 7, 3, 4, 2], length=10)] == [[1, 2], [0, 3], [4]]
    with pytest.raises(ValueError, match="at least 1"):
        pack([1], length=0)


def test_padding_is_not_told_by_its_id():
    """Trap 19: the end-of-text token that pads is also the last, supervised one."""
    ids, labels, mask = padded_layout([[5, 2], [5, 6, 7, 2]], [[-100, 2], [-100, 6, 7, 2]], pad=2)
    assert ids.tolist() == [[5, 2, 2, 2], [5, 6, 7, 2]] and mask.sum(1).tolist() == [2, 4]
    assert targets_of(labels)[1].tolist() == [[True, False, False], [True, True, True]]


def test_segments_of_a_packed_row_start_anew():
    row = packed_layout([1, 2, 3, 4], [1, 2, 3, 4], [2, 1, 1])
    assert row.positions.tolist() == [[0, 1, 0, 0]] and row.labels.tolist() == [[-100, 2, -100, -100]]
    assert row.bounds.tolist() == [0, 2, 3, 4] and row.longest == 2
    with pytest.raises(ValueError, match="a row of 4"):
        packed_layout([1, 2, 3, 4], [1, 2, 3, 4], [2, 1])


@pytest.mark.golden
def test_trl_rows(golden_dir):
    data = json.loads((golden_dir / "llm" / "trl_sft_packing.json").read_text())
    for strategy, expected in data["packed"].items():
        plan = pack([len(ids) for ids in data["input_ids"]], length=data["seq_length"], strategy=strategy)
        for name in ("input_ids", "labels"):
            assert take(plan, data[name]) == expected[name], strategy
        if "seq_lengths" in expected:
            assert row_lengths(plan) == expected["seq_lengths"]


@pytest.mark.golden
def test_trl_layouts(golden_dir):
    data = json.loads((golden_dir / "llm" / "trl_sft_packing.json").read_text())
    rows, expected = data["packed"]["bfd"], data["collated_padding_free_first3_bfd"]
    ids, labels, segments = (list(itertools.chain(*rows[name][:3])) for name in ("input_ids", "labels", "seq_lengths"))
    row = packed_layout(ids, labels, segments)
    for ours, theirs in {"ids": "input_ids", "labels": "labels", "positions": "position_ids", "segment": "seq_idx"}.items():
        assert torch.equal(getattr(row, ours), torch.tensor(expected[theirs])), theirs
    assert row.bounds.tolist() == expected["cu_seq_lens_q"] and row.longest == expected["max_length_q"]
    expected = data["collated_padded_first3"]
    ids, labels, mask = padded_layout(data["input_ids"][:3], data["labels"][:3], pad=0)
    assert ids.tolist() == expected["input_ids"] and labels.tolist() == expected["labels"]
    assert mask.long().tolist() == expected["attention_mask"]
