"""Advantages: invariances, cases worked by hand, the authors' numbers."""

import json

import pytest
import torch
from golden_numbers import assert_close, f64, load
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_rl.credit.groups import (
    PromptTracker,
    gdpo_advantages,
    group_advantages,
    group_metrics,
    group_statistics,
    has_any_reward,
    leave_one_out,
    per_reward_advantages,
    total_reward,
)

NAN = float("nan")
SCALES = ("group", "batch", "max_group", "none")


@st.composite
def scored_groups(draw):
    """Rewards and group ids: groups of any size, some of one, some of equal rewards, some rows NaN."""
    n = draw(st.integers(1, 24))
    group = draw(st.lists(st.integers(-3, 5), min_size=n, max_size=n))
    reward = st.one_of(st.floats(-5, 5, allow_subnormal=False).map(lambda r: round(r, 3)), st.just(NAN), st.just(0.5))
    return f64(*draw(st.lists(reward, min_size=n, max_size=n))), torch.tensor(group)


def test_group_advantages_by_hand():
    """Groups (1, 3), (2, 2, 8): means 2 and 4, stds 1 and sqrt(8). Batch: mean 3.2, variance (1 + 4 + 4 + 9 + 64) / 5 - 3.2^2 = 6.16."""
    rewards, group = f64(1, 2, 2, 3, 8), torch.tensor([7, 9, 9, 7, 9])
    centred = f64(-1, -2, -2, 1, 4)
    torch.testing.assert_close(group_advantages(rewards, group, std="none"), centred)
    torch.testing.assert_close(group_advantages(rewards, group, std="batch", eps=0.0), centred / 6.16**0.5)
    torch.testing.assert_close(group_advantages(rewards, group, std="max_group", eps=0.0), centred / 8**0.5)
    own = f64(1, 8**0.5, 8**0.5, 1, 8**0.5)
    torch.testing.assert_close(group_advantages(rewards, group, std="group", eps=0.5), centred / (own + 0.5))
    torch.testing.assert_close(
        group_advantages(rewards, group, std="group", eps=0.0, ddof=1), centred / f64(2**0.5, 12**0.5, 12**0.5, 2**0.5, 12**0.5)
    )
    torch.testing.assert_close(group_advantages(rewards, group, std="group", eps=0.0, std_floor=2.0), centred / own.clamp(min=2.0))


@given(scored_groups(), st.sampled_from(SCALES), st.sampled_from([0, 1]))
@settings(max_examples=150, deadline=None)
def test_no_signal_is_exactly_zero_and_nan_never_leaks(data, std, ddof):
    rewards, group = data
    result = group_advantages(rewards, group, std=std, ddof=ddof, eps=0.0)
    assert result.isfinite().all()
    for g in group.unique():
        mine = group == g
        values = rewards[mine]
        values = values[~values.isnan()]
        assert (result[mine & rewards.isnan()] == 0).all()
        if len(values) < 2 or (values == values[0]).all():
            assert (result[mine] == 0).all()
        else:
            assert result[mine].sum().abs() < 1e-9 * result[mine].abs().sum()
            assert (result[mine] != 0).any()


@given(scored_groups(), st.sampled_from(SCALES), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_order_and_names_of_groups_do_not_matter(data, std, random):
    rewards, group = data
    order = list(range(len(group)))
    random.shuffle(order)
    order = torch.tensor(order)
    result = group_advantages(rewards, group, std=std)
    torch.testing.assert_close(group_advantages(rewards[order], 100 - 7 * group[order], std=std), result[order])
    others = ~rewards.isnan()
    if others.any():
        torch.testing.assert_close(group_advantages(rewards[others], group[others], std=std), result[others])


@given(scored_groups(), st.floats(0.1, 10), st.floats(-10, 10))
@settings(max_examples=50, deadline=None)
def test_units_of_the_reward_do_not_matter(data, scale, offset):
    rewards, group = data
    result = group_advantages(rewards, group, std="group", eps=0.0)
    torch.testing.assert_close(
        group_advantages((rewards * scale).round(decimals=9) + offset, group, std="group", eps=0.0), result, rtol=1e-4, atol=1e-4
    )


def test_large_equal_float32_rewards_give_zero():
    """mean of six 0.1f + 1000 is not that number in float32; a std floor of 1e-6 would turn the rounding error into advantages."""
    rewards = torch.full((6,), 1000.1)
    for std in SCALES:
        assert (group_advantages(rewards, torch.zeros(6, dtype=torch.long), std=std, eps=0.0, std_floor=1e-6) == 0).all()


def test_result_has_the_dtype_of_the_rewards():
    rewards, group = torch.tensor([1.0, 2.0, 4.0]), torch.zeros(3, dtype=torch.long)
    assert group_advantages(rewards, group).dtype == torch.float32
    assert group_advantages(rewards.double(), group).dtype == torch.float64


def test_trimming_leaves_out_the_lowest():
    """(1, 2, 3, 10), trim .3: int(1.2) = 1 left out; mean of (2, 3, 10) is 5. The trimmed row keeps its advantage: 1 - 5."""
    rewards, group = f64(10, 1, 3, 2), torch.zeros(4, dtype=torch.long)
    torch.testing.assert_close(group_advantages(rewards, group, std="none", trim=0.3), f64(5, -4, -2, -3))
    torch.testing.assert_close(group_advantages(rewards, group, std="none", trim=0.99), f64(0, -9, -7, -8))


def test_total_reward():
    rewards = {"a": f64(1, 2, NAN), "b": f64(10, NAN, 30), "c": f64(NAN, NAN, NAN)}
    assert total_reward(rewards, {"a": 2.0, "b": 0.5})[0] == 7
    assert total_reward(rewards, {"a": 2.0, "b": 0.5}).isnan().tolist() == [False, True, True]
    assert total_reward(rewards, {"a": 2.0, "c": 0.0})[:2].tolist() == [2, 4]
    with pytest.raises(ValueError, match=r"\['d'\].*rewards are \['a', 'b', 'c'\]"):
        total_reward(rewards, {"d": 1.0})


def test_a_saturated_reward_has_no_say_with_gdpo():
    """In group 0 reward b is constant: only a counts there, with its full weight, however small its numbers are."""
    group = torch.tensor([0, 0, 1, 1])
    rewards = {"a": f64(0, 0.01, 0, 0.01), "b": f64(500, 500, 0, 1000)}
    parts = per_reward_advantages(rewards, group, weights={"a": 1.0, "b": 1.0}, std="group", eps=0.0)
    torch.testing.assert_close(parts, f64(-1, 1, -2, 2))
    torch.testing.assert_close(gdpo_advantages(rewards, group, weights={"a": 1.0, "b": 1.0}), f64(-1, 1, -2, 2) / 2.5**0.5)


def test_a_missing_score_is_missing_for_its_reward_only():
    """By hand, deviations of the group with ddof 0: a of (0, 2, -) gives (-1, 1, 0), b of (-, 10, 14) gives (0, -1, 1); 2 a + b is
    (-2, 1, 1), and the last row, which has neither, is nowhere. GDPO: mean 0, deviation sqrt(2)."""
    group = torch.tensor([0, 0, 0, 0])
    rewards, weights = {"a": f64(0, 2, NAN, NAN), "b": f64(NAN, 10, 14, NAN)}, {"a": 2.0, "b": 1.0}
    parts = per_reward_advantages(rewards, group, weights=weights, std="group", eps=0.0)
    torch.testing.assert_close(parts, f64(-2, 1, 1, 0))
    assert has_any_reward(rewards, weights).tolist() == [True, True, True, False]
    torch.testing.assert_close(gdpo_advantages(rewards, group, weights=weights), f64(-2, 1, 1, 0) / 2**0.5)
    # The second row asks for b alone: what it scored in a does not count for it.
    asked = {"a": f64(2, 0, 2, 2), "b": f64(1, 1, 1, 1)}
    torch.testing.assert_close(per_reward_advantages(rewards, group, weights=asked, std="group", eps=0.0), f64(-2, -1, 1, 0))


@given(scored_groups(), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_a_row_without_any_score_is_as_if_it_were_not_there(data, seed):
    first, group = data
    g = torch.Generator().manual_seed(seed)
    second = torch.rand(len(first), generator=g, dtype=torch.float64).round(decimals=1)
    second = second.where(torch.rand(len(first), generator=g) < 0.7, torch.nan)
    rewards, weights = {"a": first, "b": second}, {"a": 1.0, "b": 0.5}
    lost = first.isnan() & second.isnan()
    assert torch.equal(has_any_reward(rewards, weights), ~lost)
    for rule in (gdpo_advantages, per_reward_advantages):
        result = rule(rewards, group, weights=weights)
        assert result.isfinite().all() and (result[lost] == 0).all()
        if not lost.all():
            rest = {k: r[~lost] for k, r in rewards.items()}
            torch.testing.assert_close(result[~lost], rule(rest, group[~lost], weights=weights))
    # A single reward: GDPO is the group advantage, standardised once more.
    alone = gdpo_advantages({"a": first}, group, weights={"a": 2.0})
    assert (alone[group_advantages(first, group, std="none") == 0].abs() < 1e-9).all()


def test_leave_one_out_by_hand():
    """(1, 2, 6): 1 - 4, 2 - 3.5, 6 - 1.5; a lone row and a NaN give 0."""
    result = leave_one_out(f64(1, 5, 2, NAN, 6), torch.tensor([0, 1, 0, 0, 0]))
    torch.testing.assert_close(result, f64(-3, 0, -1.5, 0, 4.5))


def test_group_metrics_by_hand():
    """Groups (0, 2), (5), (1, 1), (NaN, NaN): mean of 0, 2, 5, 1, 1 is 1.8; stds 1, 0, 0, 0; three of four groups teach nothing."""
    metrics = group_metrics(f64(0, 5, 2, 1, 1, NAN, NAN), torch.tensor([3, 4, 3, 5, 5, 6, 6]))
    assert metrics == pytest.approx(
        {
            "reward_mean": 1.8,
            "reward_std": (31 / 5 - 1.8**2) ** 0.5,
            "nan_ratio": 2 / 7,
            "group_std_mean": 0.25,
            "group_size_mean": 7 / 4,
            "zero_std_ratio": 0.75,
        }
    )


def test_tracker_remembers():
    """A lone 4 after a lone 2: mean 3, std 1. NaN is neither remembered nor rewarded."""
    tracker = PromptTracker(eps=0.0)
    assert tracker.update(["cat", "dog"], f64(2, 1)).tolist() == [0, 0]
    assert tracker.update(["dog", "cat"], f64(NAN, 4)).tolist() == [0, 1]
    assert tracker.history == {"cat": [2.0, 4.0], "dog": [1.0]}


def test_tracker_continues_from_its_state(tmp_path):
    g = torch.Generator().manual_seed(0)
    batches = [torch.rand(6, generator=g, dtype=torch.float64) for _ in range(6)]
    keys = ["a", "b", "a", "c", "c", "a"]
    whole, before = PromptTracker(), PromptTracker()
    for batch in batches[:3]:
        whole.update(keys, batch), before.update(keys, batch)
    torch.save(before.state_dict(), tmp_path / "state")
    after = PromptTracker()
    after.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for batch in batches[3:]:
        assert torch.equal(after.update(keys, batch), whole.update(keys, batch))


def test_tracker_with_all_rewards_of_one_iteration_is_the_group_advantage():
    rewards, group = torch.rand(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64), torch.arange(12) % 3
    torch.testing.assert_close(
        PromptTracker().update([f"prompt {g}" for g in group.tolist()], rewards), group_advantages(rewards, group, std="group")
    )


def assert_same_advantages(actual, expected, flat, **options):
    """Equal, but in `flat` rows, those of groups with equal rewards: there ours are 0 and upstream's a rounding error over eps."""
    assert (actual[flat] == 0).all()
    assert_close(actual[~flat], expected[~flat], **options)


@pytest.mark.golden
def test_stat_trackers(golden_dir):
    """Flow-GRPO, Edit-R1, GenRL: unequal groups, one of one, one of equal rewards."""
    data = load(golden_dir / "diffusion", "advantages_stat_tracker")
    group, names = data["group_id"], data["reward_names"]
    rewards = {name: r.double() for name, r in zip(names, data["rewards"], strict=True)}
    weights = dict(zip(names, data["weights"].tolist(), strict=True))
    total = total_reward(rewards, weights)
    assert_close(total, data["weighted_sum"])

    flat = group_statistics(total, group).std < 1e-12

    def wide(actual, key):
        return actual[:, None].expand_as(data[key]) if data[key].ndim == 2 else actual

    def check(key, actual):
        assert_close(wide(actual, key), data[key], what=key)

    def check_advantages(key, actual):
        assert_same_advantages(wide(actual, key), data[key], flat, what=key)

    for flag, std in (("0", "group"), ("1", "batch")):
        for key in (f"fg_grpo_globalstd{flag}", f"fg_grpo_globalstd{flag}_1d", f"editr1_globalstd{flag}_adv"):
            check_advantages(key, group_advantages(total, group, std=std))
        stats = group_statistics(total, group)
        check(f"editr1_globalstd{flag}_mean", stats.mean)
        check(f"editr1_globalstd{flag}_std", stats.std)
    for key, std in (("genrl_group", "group"), ("genrl_global", "batch"), ("genrl_maxgroup", "max_group")):
        check_advantages(key, group_advantages(total, group, std=std))
    check_advantages("genrl_weight_advantages", per_reward_advantages(rewards, group, weights=weights, std="group"))
    check("fg_no_tracking", group_advantages(total, torch.zeros_like(group), std="batch"))
    assert group_metrics(total, group)["zero_std_ratio"] == pytest.approx(float(data["zero_std_ratio"]))


@pytest.mark.golden
def test_multi_reward(golden_dir):
    """Flow-Factory, DeepGen-RL, DanceGRPO, MixGRPO: equal groups, a constant reward in one, only constants in another."""
    data = load(golden_dir / "diffusion", "advantages_multi_reward")
    group, names = data["group_id"], data["reward_names"]
    rewards = dict(zip(names, data["rewards"].double(), strict=True))
    weights = dict(zip(names, data["weights"].tolist(), strict=True))
    total, everyone = total_reward(rewards, weights), torch.zeros_like(group)
    flat = group_statistics(total, group).std < 1e-12

    def check(key, result, **tolerance):
        assert_same_advantages(result, data[key], flat, what=key, **tolerance)

    for key in (k for k in data if k.startswith("ff_")):
        kind, flag = key.split("_")[1:3]
        if kind == "gdpo":  # its means and stds are float32
            check(key, gdpo_advantages(rewards, group, weights=weights), f64=2e-5)
        else:  # its products are float32, their sum is not
            products = {name: (r.float() * weights[name]).double() for name, r in rewards.items()}
            std = "batch" if flag.endswith("1") else "group"
            result = group_advantages(total_reward(products, dict.fromkeys(names, 1.0)), group, std=std, eps=0.0, std_floor=1e-6)
            # With whole groups on one rank, its global std is reduced in float32.
            check(key, result, f64=2e-5 if "contiguous" in key and std == "batch" else 1e-12)

    # The rest works in float32, except where the name says f64.
    loose = {"f32": 2e-4}
    deepgen, dg = {"ddof": 1, "eps": 1e-4}, data["deepgen_total"].double()
    for tag in ("f32", "f64"):
        check(f"deepgen_grpo_{tag}", group_advantages(dg, group, std="group", **deepgen), **loose)
        check(f"deepgen_grpo_global_std_{tag}", group_advantages(dg, group, std="batch", **deepgen), **loose)
        assert_close(group_advantages(dg, everyone, std="batch", **deepgen), data[f"deepgen_reinforcepp_{tag}"], **loose)
        check(f"deepgen_gdpo_{tag}", gdpo_advantages(rewards, group, weights=dict.fromkeys(names, 1.0), std_floor=0.0, **deepgen), **loose)
    of_group = dict(zip(names, data["deepgen_gdpo_per_sample_weights"][group].T, strict=True))
    check("deepgen_gdpo_per_sample", gdpo_advantages(rewards, group, weights=of_group, std_floor=0.0, **deepgen), **loose)

    dance = {"ddof": 1, "eps": 1e-8}
    check("dance_group1", group_advantages(total, group, std="group", **dance), **loose)
    assert_close(group_advantages(total, everyone, std="batch", **dance), data["dance_group0"], **loose)
    mixed = dict(zip(names, data["mix_reward_weights"].tolist(), strict=True))
    for key in (k for k in data if "_aggr_trim" in k):
        options = dance | {"std": "group", "trim": float(key.split("trim")[1])}
        if "advantage" in key:
            check(key, per_reward_advantages(rewards, group, weights=mixed, **options), **loose)
        else:
            check(key, group_advantages(total_reward(rewards, mixed), group, **options), **loose)


@pytest.mark.golden
def test_prompt_tracker_histories(golden_dir):
    cases = json.loads((golden_dir / "calligrapher" / "rl.json").read_text())["cases"]
    cases = [c for c in cases if c.get("fn") == "PerPromptStatTracker.update"]
    assert cases
    for case in cases:
        tracker = PromptTracker(std="batch" if case["global_std"] else "prompt")
        for call in case["calls"]:
            assert_close(tracker.update(call["prompts"], f64(*call["rewards"])), f64(*call["advantages"]))
