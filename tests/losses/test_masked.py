"""Masked statistics and what a token weighs: NaN hygiene, empty masks, invariance to the split, the authors' numbers."""

import pytest
import torch
from golden_numbers import assert_close, f64, load_llm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import grad

from lit_rl.credit.tokens import whiten
from lit_rl.credit.weights import mixed_weights, token_weights
from lit_rl.losses.masked import masked, masked_mean, row_mean

MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm", "dr-grpo")
NAN = float("nan")


def test_statistics_by_hand():
    """(1, 3, 8) in one of two rows: mean 4, squares 9 + 1 + 16, unbiased variance 13."""
    x, mask = f64(1, NAN, 3, 100, 8), torch.tensor([True, False, True, False, True])
    assert masked_mean(x, mask).item() == pytest.approx(4)
    white = whiten(torch.stack([x, x]), torch.stack([mask, mask & False]), total=lambda t: t)
    torch.testing.assert_close(white, torch.stack([f64(-3, 0, -1, 0, 4) / 13**0.5, torch.zeros(5)]), rtol=1e-7, atol=1e-7)


def test_whitening_looks_at_all_processes():
    """Rows on two processes, whose sums are handed in: the same as in one."""
    x, mask = (
        torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),
        torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < 0.7,
    )
    whole = whiten(x, mask, total=lambda t: t)
    kept = x.double().where(mask, 0.0)
    sums = iter([torch.stack([kept.sum(), mask.sum().double()]), (x.double() - kept.sum() / mask.sum()).where(mask, 0.0).pow(2).sum()])
    torch.testing.assert_close(whiten(x[:2], mask[:2], total=lambda _: next(sums)), whole[:2])


def test_row_means_by_hand():
    x, mask = f64(1, NAN, 3, 100, 8), torch.tensor([True, False, True, False, True])
    assert row_mean(torch.stack([x, x]), torch.stack([mask, ~mask & False])).tolist() == [4, 0]


@pytest.mark.parametrize("kept", [0, 1])
def test_whitening_nothing_or_one_token_gives_zero(kept):
    """Trap 30: upstream raises."""
    mask = torch.arange(4) < kept
    assert whiten(f64(5, NAN, NAN, 1)[None], mask[None], total=lambda t: t).tolist() == [[0, 0, 0, 0]]
    assert masked_mean(f64(5, NAN, NAN, 1), mask).item() == pytest.approx(5 * kept)


def test_nan_under_the_mask_reaches_neither_value_nor_gradient():
    """Trap 31: 0 * NaN is NaN."""
    x, mask = f64(1, 2, 3).requires_grad_(), torch.tensor([True, False, True])
    loss = masked((x * f64(1, NAN, 1)).log(), mask).sum()
    assert loss.isfinite() and masked(x, mask).sum().item() == 4
    logits = f64(0, -torch.inf).requires_grad_()
    assert grad(masked(logits * 2, torch.tensor([True, False])).sum(), logits)[0].tolist() == [2, 0]


def test_weights_by_hand():
    """Rows of 3, 1 and no tokens: N = 4, S = 2; padded length 3."""
    mask = torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 0]]).bool()
    ones = mask.double()
    table = {
        "token-mean": ones / 4,
        "seq-mean-token-sum": ones / 2,
        "seq-mean-token-mean": torch.stack([ones[0] / 6, ones[1] / 2, ones[2]]),
        "seq-mean-token-sum-norm": ones / 3,
    }
    for mode, expected in table.items():
        torch.testing.assert_close(token_weights(mask, mode, dtype=torch.float64), expected)
    torch.testing.assert_close(token_weights(mask, "dr-grpo", scale=8, dtype=torch.float64), ones / 16)
    with pytest.raises(ValueError, match="set scale"):
        token_weights(mask, "dr-grpo")


def test_weights_of_an_empty_step_are_zero():
    for mode in MODES:
        assert (token_weights(torch.zeros(2, 3, dtype=torch.bool), mode, scale=4) == 0).all()


def test_the_sum_norm_mode_ignores_how_many_rows_there_are():
    """Trap 5: twice the rows, twice the loss; dr-grpo is the mean."""
    mask = torch.ones(2, 4, dtype=torch.bool)
    twice = torch.cat([mask, mask])
    for mode, factor in (("seq-mean-token-sum-norm", 2), ("dr-grpo", 1)):
        assert token_weights(twice, mode, scale=4).sum() == factor * token_weights(mask, mode, scale=4).sum()


@given(st.integers(0, 10_000), st.sampled_from(MODES))
@settings(max_examples=40, deadline=None)
def test_any_split_into_micro_batches_gives_the_same_gradient(seed, mode):
    """Trap 6. Rows are cut anywhere, columns nobody uses are dropped, ranks average and multiply back: the gradient stays."""
    g = torch.Generator().manual_seed(seed)
    rows, length = int(torch.randint(1, 9, (), generator=g)), 7
    theta = torch.randn(3, generator=g, dtype=torch.float64, requires_grad=True)
    features = torch.randn(rows, length, 3, generator=g, dtype=torch.float64)
    mask = torch.rand(rows, length, generator=g) < torch.rand(rows, 1, generator=g)
    totals = {"tokens": mask.sum().item(), "sequences": max(mask.any(1).sum().item(), 1), "scale": 11, "dtype": torch.float64}

    def gradient(part, weights):
        return grad((masked((features[part] @ theta).tanh(), mask[part]) * weights).sum(), theta)[0]

    whole = gradient(
        slice(None), token_weights(mask, mode, **(totals if "norm" in mode or mode == "dr-grpo" else {"dtype": torch.float64}))
    )
    order, parts = torch.randperm(rows, generator=g), int(torch.randint(1, rows + 1, (), generator=g))
    split = sum(gradient(part, token_weights(mask[part], mode, **totals)) for part in order.chunk(parts))
    torch.testing.assert_close(split, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.golden
def test_statistics_golden(golden_dir):
    data, _ = load_llm(golden_dir, "verl_misc")
    names = [key.removeprefix("masked_mean.") for key in data if key.startswith("masked_mean.")]
    assert names
    for name in names:
        x, mask = data["in.adv_tok"], data[f"in.{name}"].bool()
        assert_close(masked_mean(x, mask), data[f"masked_mean.{name}"])
        white = whiten(x, mask, total=lambda t: t)
        assert_close(white, torch.where(mask, data[f"whiten.{name}"], 0.0), f64=2e-8, what=name)  # verl adds 1e-8 to the count


@pytest.mark.golden
def test_aggregation_golden(golden_dir):
    """verl's agg_loss: with the totals of a larger step it multiplies by dp_size, which Lightning's averaging needs."""
    data, meta = load_llm(golden_dir, "verl_misc")
    total, loss = meta["agg.global"], data["agg.loss_mat"]
    checked = 0
    for key in data:
        if not key.startswith("agg.") or key == "agg.loss_mat":
            continue
        mode, mask, *rest = key.removeprefix("agg.").split(".")
        known = {"tokens": total["batch_num_tokens"], "sequences": total["global_batch_size"], "scale": total["loss_scale_factor"]}
        weights = token_weights(data[f"in.{mask}"].bool(), mode, **(known if rest else {}))
        ranks = total["dp_size"] if rest and mode != "seq-mean-token-sum-norm" else 1
        assert_close(ranks * (loss * weights).sum(), data[key], what=key)
        checked += 1
    assert checked >= 24


def test_rows_of_both_kinds_weigh_by_hand():
    """4 rows in a step: one with two answers of 1 and 2 tokens (another has none), and a pair that counts 3 times."""
    mask = torch.tensor([[1, 0], [1, 1], [0, 0], [1, 1], [1, 0]]).bool()
    paired, siblings = torch.tensor([False, False, False, True, True]), f64(2, 2, 2, 0, 0)
    weights = mixed_weights(mask, paired, siblings, rows=4, pair=3.0)
    torch.testing.assert_close(weights, f64([1, 0], [0.5, 0.5], [0, 0], [6, 6], [6, 0]) / 8)
    assert weights[~paired].sum() == 1 / 4
