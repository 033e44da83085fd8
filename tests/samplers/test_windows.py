"""Windows are where they are published to be, and never empty."""

import ast
import random
from collections import Counter

import numpy as np
import pytest
import torch
from golden_numbers import cases, load
from hypothesis import given
from hypothesis import strategies as st

from lit_rl.samplers.windows import full_window, mix_window, random_subset, random_window

STRATEGIES = ("progressive", "random", "decay", "exp_decay")


def test_full_window():
    assert full_window(10, fraction=0.99) == range(9)
    assert full_window(10, fraction=1.0) == range(10)
    assert full_window(1, fraction=0.99) == range(1)
    assert full_window(16, fraction=0.6) == range(9)
    with pytest.raises(ValueError, match="fraction"):
        full_window(10, fraction=0.0)


@given(st.integers(0, 10), st.integers(1, 6), st.integers(0, 10), st.integers())
def test_random_window_lies_inside(low, size, spare, seed):
    high = low + size + spare
    window = random_window(size=size, low=low, high=high, rng=random.Random(seed))
    assert len(window) == size and low <= window.start and window.stop <= high


def test_random_window_reaches_both_ends_evenly():
    rng = random.Random(0)
    starts = Counter(random_window(size=2, low=0, high=5, rng=rng).start for _ in range(8000))
    assert set(starts) == {0, 1, 2, 3}
    assert all(abs(n - 2000) < 200 for n in starts.values())


def test_random_window_that_does_not_fit():
    with pytest.raises(ValueError, match=r"set size in \[1, 3\]"):
        random_window(size=4, low=0, high=3, rng=random.Random(0))


@given(
    iteration=st.integers(0, 2000),
    num_steps=st.integers(1, 30),
    size=st.integers(1, 8),
    strategy=st.sampled_from(STRATEGIES),
    every=st.integers(1, 30),
    overlap=st.booleans(),
    roll_back=st.booleans(),
)
def test_mix_window_is_never_empty(iteration, num_steps, size, strategy, every, overlap, roll_back):
    window = mix_window(
        iteration, num_steps=num_steps, size=size, strategy=strategy, iterations_per_window=every, overlap=overlap, roll_back=roll_back
    )
    assert len(window) >= 1 and window.step == 1
    assert window.start >= 0 and window.stop <= max(1, num_steps - 2)


def test_mix_window_with_the_published_defaults():
    """25 steps, window 4, 25 iterations each: c = iteration // 25 up to 22, then published code trains nothing for 25 iterations."""
    assert mix_window(0, num_steps=25) == range(0, 4)
    assert mix_window(24, num_steps=25) == range(0, 4)
    assert mix_window(25, num_steps=25) == range(1, 5)
    assert mix_window(574, num_steps=25) == range(22, 23)
    assert mix_window(575, num_steps=25) == mix_window(599, num_steps=25) == range(22, 23)
    assert mix_window(600, num_steps=25) == range(0, 4)


def test_random_subset_draws_without_repetition():
    candidates = range(1, 6)
    drawn = random_subset(candidates, count=3, generator=torch.Generator().manual_seed(0))
    assert len(set(drawn)) == 3 and set(drawn) <= set(candidates)
    assert sorted(random_subset(candidates, count=5, generator=torch.Generator())) == list(candidates)
    assert drawn == random_subset(candidates, count=3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"set count in \[1, 5\]"):
        random_subset(candidates, count=6, generator=torch.Generator())


@pytest.mark.golden
def test_fast_windows(golden_dir):
    """Python's own generator, drawn from again and again; upstream's windows include their last step."""
    data = load(golden_dir / "diffusion", "samplers_windows")
    seed, size, low, high = data["fg_fast_seed_size_r0_r1"].tolist()
    rng = random.Random(seed)
    for first, last in data["fg_fast_windows"].tolist():
        window = random_window(size=size, low=low, high=high, rng=rng)
        assert (window.start, window.stop) == (first, last)
    first, last = data["fg_fast_window_size0"].tolist()
    assert full_window(last + 1, fraction=0.99) == range(first, last)


@pytest.mark.golden
def test_mix_windows(golden_dir):
    """Equal wherever upstream trains something; where its window is empty, ours stays where it last was."""
    data = load(golden_dir / "diffusion", "samplers_windows")
    for match, case in cases(data, r"mixwin_(\w+)"):
        kwargs = ast.literal_eval(case["kwargs"])
        options = {
            "num_steps": kwargs["max_timesteps"] + 2,
            "size": kwargs["group_size"],
            "iterations_per_window": kwargs["iters_per_group"],
            "strategy": kwargs["sample_strategy"],
            "overlap": kwargs.get("prog_overlap", False),
            "overlap_step": kwargs.get("prog_overlap_step", 1),
            "roll_back": kwargs.get("roll_back", False),
            "decay_from": kwargs.get("exp_decay_thre_timestep", 13),
            "decay_rate": kwargs.get("exp_decay_k", 0.1),
        }
        trace = list(zip(case["first"].tolist(), case["len"].tolist(), strict=True))
        if options["strategy"] == "random":
            options["seed"] = _seed_of(trace, kwargs)
        before = range(0)
        for iteration, (first, length) in enumerate(trace):
            window = mix_window(iteration, **options)
            assert window == (range(first, first + length) if length else before), f"{match[0]} at {iteration}"
            before = window


def _seed_of(trace: list[tuple[int, int]], kwargs: dict) -> int:
    """The file does not hold it: the one whose numpy generators draw the trace from iteration 1 on."""
    starts = [first for first, _ in trace[1:]]
    end = kwargs["max_timesteps"] - kwargs["group_size"] + 1
    fits = (s for s in range(5000) if all(np.random.default_rng(s + i).integers(0, end) == c for i, c in enumerate(starts)))
    seed = next(fits, None)
    assert seed is not None, f"no seed draws {starts}"
    return seed


@pytest.mark.golden
def test_flow_factory_sde_steps(golden_dir):
    data = load(golden_dir / "diffusion", "sde_step_flow_factory")
    candidates = data["sde_subset_candidates"].tolist()
    for seed, steps in zip(data["sde_subset_seed"].tolist(), data["sde_subset_steps"].tolist(), strict=True):
        generator = torch.Generator().manual_seed(seed)
        assert random_subset(candidates, count=len(steps), generator=generator) == steps
