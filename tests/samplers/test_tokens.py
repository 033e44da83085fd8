"""Tokens are drawn from the distribution that is asked for, by their own random number alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lit_rl.samplers.tokens import BLOCK, draw_tokens, inverse_cumulative, nucleus
from lit_rl.seeding import uniforms

SIZES = [7, BLOCK, 5 * BLOCK + 3, 16 * BLOCK, 16 * BLOCK + 1, 30 * BLOCK]
"""Sizes of vocabularies: both ways to search, with and without a last block that is not full."""


def logits_of(size: int, rows: int = 3) -> Tensor:
    return 2 * torch.randn(rows, size, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("size", [7, 16 * BLOCK + 1])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_frequencies_are_the_probabilities(size: int, temperature: float) -> None:
    """Chi-square of 40000 draws over the likeliest tokens and the rest together: above the 99.99 % point only once in ten thousand."""
    count = 40_000
    logits = logits_of(size, rows=1)
    uniform = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = torch.cat([draw_tokens(logits.expand(len(u), -1), u, temperature=temperature)[0] for u in uniform.split(2000)])
    expected = (logits[0].double() / temperature).softmax(-1) * count
    seen = torch.bincount(drawn, minlength=size).double()
    order = expected.argsort(descending=True)
    bins = [lambda x, i=i: x[order[i]] for i in range(6)] + [lambda x: x[order[6:]].sum()]
    square = sum(float((b(seen) - b(expected)) ** 2 / b(expected)) for b in bins)
    assert square < 27.9  # 6 degrees of freedom


@pytest.mark.parametrize("size", SIZES)
def test_a_draw_is_where_the_running_sum_passes_it(size: int) -> None:
    """Against the plain float64 sum, at numbers that are far enough from its steps for rounding."""
    logits = logits_of(size)
    shares = logits.double().softmax(-1)
    steps = shares.cumsum(-1)
    wide = [int(place) for place in shares.argmax(-1)]
    uniform = torch.stack([steps[row, place] - shares[row, place] / 2 for row, place in enumerate(wide)])
    assert draw_tokens(logits, uniform, temperature=1.0)[0].tolist() == wide


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.4}, {"top_k": 5, "top_p": 0.6}])
def test_no_token_of_probability_zero_is_drawn_at_the_ends(size: int, settings: dict[str, float]) -> None:
    """The first and the last tokens are impossible, and the numbers are the least and the greatest that `torch.rand` gives."""
    logits = logits_of(size, rows=2)
    logits[:, [0, 1, -1, -2]] = -torch.inf
    for number in (0.0, 1 - 2**-53):
        chosen, logprobs = draw_tokens(logits, torch.full((2,), number, dtype=torch.float64), temperature=1.0, **settings)  # type: ignore[arg-type]
        assert logprobs.isfinite().all() and (chosen > 1).all() and (chosen < size - 2).all()


@pytest.mark.parametrize("size", [7, 16 * BLOCK + 1])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (0, 0.05), (4, 1.0), (4, 0.7), (10**6, 0.5)])
@pytest.mark.parametrize("temperature", [0.6, 1.3])
def test_what_may_be_drawn_is_what_the_warpers_of_transformers_leave(size: int, top_k: int, top_p: float, temperature: float) -> None:
    """In their order: temperature, top-k, top-p. 500 evenly spread numbers reach every token of a five-hundredth of the probability."""
    logits = logits_of(size, rows=1)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)])
    if top_k:
        warpers.insert(1, TopKLogitsWarper(top_k))
    left = warpers(torch.zeros(1, 1, dtype=torch.long), logits.clone()).softmax(-1)[0]  # type: ignore[arg-type]
    uniform = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
    drawn = set(draw_tokens(logits.expand(500, -1), uniform, temperature=temperature, top_k=top_k, top_p=top_p)[0].tolist())
    assert {i for i, p in enumerate(left.tolist()) if p > 1 / 500} <= drawn <= {i for i, p in enumerate(left.tolist()) if p > 0}


def test_the_nucleus_by_hand() -> None:
    """Shares 0.5, 0.3, 0.15, 0.05: 0.8 takes two; 0.81 a third; a little takes the first."""
    logits = torch.tensor([[0.05, 0.5, 0.15, 0.3]]).log()
    left = {p: nucleus(logits, p).isfinite()[0].tolist() for p in (0.01, 0.79, 0.81)}
    assert left == {0.01: [False, True, False, False], 0.79: [False, True, False, True], 0.81: [False, True, True, True]}


@pytest.mark.parametrize("settings", [{}, {"top_k": 5, "top_p": 0.9}], ids=str)
def test_rows_with_temperatures_of_their_own_are_drawn_as_if_alone(settings: dict[str, float]) -> None:
    logits, uniform = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)), torch.linspace(0.1, 0.9, 4).double()
    each = torch.tensor([0.5, 0.8, 1.0, 2.0])
    together = draw_tokens(logits, uniform, temperature=each, **settings)  # type: ignore[arg-type]
    alone = [draw_tokens(logits[[i]], uniform[[i]], temperature=float(each[i]), **settings) for i in range(4)]  # type: ignore[arg-type]
    assert together[0].tolist() == [int(chosen) for chosen, _ in alone]
    torch.testing.assert_close(together[1], torch.cat([logprobs for _, logprobs in alone]))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("settings", [{}, {"top_k": 2, "top_p": 0.5}])
def test_log_probabilities_are_those_of_the_whole_distribution(size: int, temperature: float, settings: dict[str, float]) -> None:
    logits = logits_of(size)
    uniform = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    chosen, logprobs = draw_tokens(logits, uniform, temperature=temperature, **settings)  # type: ignore[arg-type]
    whole = (logits.double() / (temperature or 1.0)).log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
    assert torch.allclose(logprobs.double(), whole, atol=2e-6)
    if not temperature:
        assert chosen.tolist() == logits.argmax(-1).tolist()


def test_the_whole_sum_is_accurate_over_a_real_vocabulary() -> None:
    weights = torch.rand(2, 151_936, generator=torch.Generator().manual_seed(0))
    _, total = inverse_cumulative(weights, torch.tensor([0.2, 0.9], dtype=torch.float64))
    assert torch.allclose(total, weights.double().sum(-1), rtol=1e-7)


def test_random_numbers_belong_to_their_key() -> None:
    a, b = (1, "rollout", 0), (1, "rollout", 1)
    assert torch.equal(uniforms([a, b], 5), uniforms([b, a], 9)[[1, 0], :5])
    assert not torch.equal(*uniforms([a, b], 5))
