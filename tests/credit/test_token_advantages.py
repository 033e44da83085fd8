"""Token advantages: cases by hand, holes, groups of one, the authors' numbers."""

import pytest
import torch
from golden_numbers import assert_close, f64, load_llm
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_rl.credit.groups import gdpo_advantages, group_advantages, group_statistics, leave_one_out
from lit_rl.credit.tokens import (
    gae,
    groups_that_teach,
    length_weighted_advantages,
    overlong_penalty,
    pass_at_k_advantages,
    place_scores,
    rewards_to_go,
    spread,
    token_rewards,
    whiten,
    win_rates,
)
from lit_rl.losses.kl import kl_estimate
from lit_rl.losses.masked import masked, masked_mean

NAN = float("nan")


HOLED = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]]).bool()


def test_scores_land_on_the_last_chosen_token():
    """Trap 1: not on the tool's token behind it, where GAE would drop them."""
    assert place_scores(f64(5, 7, 9), HOLED).tolist() == [[0, 0, 5, 0], [0, 0, 0, 7], [0, 0, 0, 0]]
    advantages, _ = gae(place_scores(f64(5, 7, 9), HOLED), torch.zeros(3, 4).double(), HOLED)
    assert advantages.tolist() == [[5, 0, 5, 0], [0, 7, 7, 7], [0, 0, 0, 0]]


def test_kl_in_the_reward_needs_a_reference():
    """Trap 11: zeros as reference log-probabilities would make it a reward for unlikely tokens."""
    kl = torch.full((3, 4), 2.0).double()
    assert token_rewards(f64(5, 7, 9), HOLED, kl=kl, kl_coef=0.5)[0].tolist() == [-1, 0, 4, 0]
    with pytest.raises(ValueError, match="needs a reference"):
        token_rewards(f64(5, 7, 9), HOLED, kl_coef=0.1)


def test_gae_by_hand():
    """r = (0, 1), V = (.5, .25), gamma .5, lam .5: delta = (.5 * .25 - .5, 1 - .25); A_1 = .75, A_0 = -.375 + .25 * .75."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    advantages, returns = gae(f64(0, 1)[None], f64(0.5, 0.25)[None], mask, gamma=0.5, lam=0.5)
    torch.testing.assert_close(advantages, f64(-0.1875, 0.75)[None])
    torch.testing.assert_close(returns, f64(0.3125, 1)[None])


@given(st.integers(0, 10_000), st.sampled_from([1.0, 0.9]), st.sampled_from([1.0, 0.95]))
@settings(max_examples=40, deadline=None)
def test_holes_are_as_if_they_were_not_there(seed, gamma, lam):
    g = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(1, 9, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(1, 9, generator=g) < 0.6
    dense = torch.ones(1, int(mask.sum()), dtype=torch.bool)
    dirty = [torch.where(mask, x, torch.full_like(x, NAN)) for x in (rewards, values)]
    for holed, whole in zip(
        (*gae(*dirty, mask, gamma=gamma, lam=lam), rewards_to_go(dirty[0], mask, gamma=gamma)),
        (
            *gae(rewards[mask][None], values[mask][None], dense, gamma=gamma, lam=lam),
            rewards_to_go(rewards[mask][None], dense, gamma=gamma),
        ),
        strict=True,
    ):
        torch.testing.assert_close(holed[mask], whole[0])
        assert (holed[~mask] == 0).all()


def test_gae_with_lambda_1_is_rewards_to_go_minus_value():
    g = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(4, 6, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(4, 6, generator=g) < 0.7
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    torch.testing.assert_close(returns, rewards_to_go(rewards, mask, gamma=0.9))
    torch.testing.assert_close(advantages, returns - masked(values, mask))


def test_groups_of_one_say_nothing_unless_asked():
    """Trap 14."""
    scores, group = f64(1, 3, 7), torch.tensor([0, 0, 5])
    for advantages in (leave_one_out(scores, group), pass_at_k_advantages(scores, group, std=False)):
        assert advantages[2] == 0
    assert length_weighted_advantages(scores, torch.tensor([1, 1, 1]), group).tolist() == [-1, 1, 0]


def test_estimators_by_hand():
    """(1, 2, 6): best 4 above the second, std sqrt(7); lengths 1, 1, 2 weigh the baseline (1 + 2 + 12) / 4. GPG: 4 of 3 scored non-zero."""
    scores, group = f64(1, 2, 6, 0), torch.tensor([0, 0, 0, 1])
    torch.testing.assert_close(pass_at_k_advantages(scores, group, eps=0.0), f64(0, 0, 4 / 7**0.5, 0))
    torch.testing.assert_close(length_weighted_advantages(scores, torch.tensor([1, 1, 2, 9]), group), f64(-2.75, -1.75, 2.25, 0))
    assert pass_at_k_advantages(f64(NAN, 2, 6, 0), group, std=False).tolist() == [0, 0, 4, 0]


def test_duplicate_prompts_are_told_apart_by_their_group():
    """Trap 16: ids come from the sampler; one text asked twice is two groups."""
    scores = f64(0, 2, 10, 12)
    assert group_advantages(scores, torch.tensor([0, 0, 1, 1]), std="none").tolist() == [-1, 1, -1, 1]


def test_standard_deviation_is_unbiased_with_the_projects_own_eps():
    """Trap 15: (0, 2): sd sqrt(2), not 1."""
    scores, group = f64(0, 2), torch.tensor([0, 0])
    for eps in (1e-6, 1e-4, 1e-9):
        assert group_advantages(scores, group, std="group", ddof=1, eps=eps)[1].item() == pytest.approx(1 / (2**0.5 + eps))


def test_overlong_by_hand():
    """Trap 23: of at most 20, buffer 5: 15 is free, 18 costs .6, 22 costs 1.4."""
    lengths = torch.tensor([10, 15, 18, 22])
    torch.testing.assert_close(overlong_penalty(lengths, max_length=20, buffer=5), torch.tensor([0, 0, -0.6, -1.4]))
    torch.testing.assert_close(overlong_penalty(lengths, max_length=20, buffer=5, factor=2.0), torch.tensor([0, 0, -1.2, -2.8]))
    with pytest.raises(ValueError, match="must be above 0"):
        overlong_penalty(lengths, max_length=20, buffer=0)


def test_dynamic_sampling_by_hand():
    """Group 0 differs (its middle row has advantage 0 and stays), 1 does not, 2 is alone, 3 has no reward."""
    metric, group = f64(0, 0.5, 1, 1, 1, 1, NAN, NAN), torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])
    assert groups_that_teach(metric, group).tolist() == [True, True, True, False, False, True, False, False]


VERL_EPS = 2e-8
"""verl adds 1e-8 to the counts that it divides by."""


def holed(mask):
    """There is a masked token between two others."""
    return bool((mask.long().diff(dim=1) == 1).sum() > (~mask[:, 0] & mask.any(1)).sum())


def alone(x):
    """The sum over a single process."""
    return x


def raw_singletons(advantages, scores, group):
    """The score itself in groups of one, where ours say 0: verl's GRPO, RLOO and OPO."""
    return torch.where(group_statistics(scores, group).size == 1, scores, advantages)


def verl_estimates(name, data, mask, scores, group):
    """The estimators of verl's that depend on the sequence's score alone."""
    options = {"ddof": 1, "eps": 1e-6}
    if name in ("grpo", "dr_grpo"):
        return raw_singletons(group_advantages(scores, group, std="none" if name == "dr_grpo" else "group", **options), scores, group)
    if name == "grpo_vectorized":
        return raw_singletons(group_advantages(scores, group, std="group", std_floor=1e-3, **options), scores, group)
    if name == "rloo":
        return raw_singletons(leave_one_out(scores, group), scores, group)
    if name == "rloo_vectorized":
        return leave_one_out(scores, group)
    if name == "opo":
        return raw_singletons(length_weighted_advantages(scores, mask.sum(1), group), scores, group)
    raise AssertionError(name)


@pytest.mark.golden
def test_verl_group_estimators(golden_dir):
    data, _ = load_llm(golden_dir, "verl_advantages")
    rewards, group, checked = data["in.token_level_rewards"], data["in.index"], 0
    for key in data:
        name, _, rest = key.partition(".")
        if name not in ("grpo", "dr_grpo", "grpo_vectorized", "rloo", "rloo_vectorized", "opo") or rest.count(".") != 1:
            continue
        mask = data[f"in.{rest.split('.')[0]}"].bool()
        ours = verl_estimates(name, data, mask, rewards.sum(1), group)
        assert_close(spread(ours, mask), data[key], what=key)
        checked += 1
    assert checked >= 12
    whole = masked(torch.ones_like(rewards), data["in.mask"].bool()).bool()
    for name in ("grpo", "grpo_vectorized"):
        scores = data["grpo_all_equal.token_level_rewards"].sum(1)
        ours = raw_singletons(group_advantages(scores, group, std="group", ddof=1, eps=1e-6), scores, group)
        expected = data[f"{name}_all_equal.advantages"]
        grouped = group_statistics(scores, group).size > 1
        assert (ours[grouped] == 0).all() and expected[grouped].abs().max() < 0.2  # a rounding error over eps
        assert_close(spread(ours, whole)[~grouped], expected[~grouped])
    for norm in ("0", "1"):
        scores = rewards.sum(1)
        ours = pass_at_k_advantages(scores, data["passk.index"], std=norm == "1")
        assert_close(spread(ours, whole), data[f"passk.norm{norm}.advantages"], what=norm)


@pytest.mark.golden
def test_verl_gae(golden_dir):
    data, meta = load_llm(golden_dir, "verl_advantages")
    assert meta["cases"]
    for case, options in meta["cases"].items():
        mask = data[f"in.{case.split('.')[1]}"].bool()
        rewards = data[f"in.{options['rewards']}"]
        advantages, returns = gae(rewards, data["in.values"], mask, gamma=float(options["gamma"]), lam=float(options["lam"]))
        assert_close(whiten(advantages, mask, total=alone), masked(data[f"{case}.advantages"], mask), f64=VERL_EPS, what=case)
        assert_close(returns, masked(data[f"{case}.returns"], mask), what=case)


@pytest.mark.golden
def test_verl_token_estimators(golden_dir):
    """REINFORCE++ and its baseline, ReMax."""
    data, meta = load_llm(golden_dir, "verl_advantages")
    group, rewards = data["in.index"], data["in.token_level_rewards"]
    scores, plus = rewards.sum(1), meta["notes"]["reinforce_plus_plus"]
    masks = {key.split(".")[1] for key in data if key.startswith("remax.")}
    assert masks
    for name in masks:
        mask = data[f"in.{name}"].bool()
        if not holed(mask):  # upstream loses at a hole what comes after it
            returns = rewards_to_go(data[f"in.{plus['rewards']}"], mask, gamma=float(plus["gamma"]))
            assert_close(returns, masked(data[f"reinforce_plus_plus.{name}.returns"], mask), what=name)
            assert_close(whiten(returns, mask, total=alone), data[f"reinforce_plus_plus.{name}.advantages"], f64=VERL_EPS, what=name)
        centred = raw_singletons(group_advantages(scores, group, std="none"), scores, group)
        white = whiten(spread(centred, mask), mask, total=alone)
        assert_close(white, data[f"reinforce_plus_plus_baseline.{name}.advantages"], f64=VERL_EPS, what=name)
        to_go = rewards_to_go(rewards, mask)
        assert_close(to_go, masked(data[f"remax.{name}.returns"], mask), what=name)
        greedy = data[f"remax.{name}.reward_baselines"]
        assert_close(masked(to_go - greedy[:, None], mask), masked(data[f"remax.{name}.advantages"], mask), what=name)


@pytest.mark.golden
def test_trl_advantages(golden_dir):
    """A reward that is None counts for nothing there (nansum); a row with none at all gets 0."""
    data, meta = load_llm(golden_dir, "trl_advantages")
    size, weights = meta["group_size"], data["in.reward_weights"]
    options = {"ddof": 1, "eps": 1e-4}
    for key in (k for k in data if k.startswith(("grpo.", "rloo."))):
        method, kind, *rest = key.split(".")
        rewards = data["in.rewards_per_func" + ("_nan" if kind == "nan" else "")].double()
        group = torch.arange(len(rewards)) // size
        lost = rewards.isnan().all(1)
        if method == "rloo":
            low, high = meta["rloo_clip"]
            total = torch.where(lost, NAN, (rewards * weights).nansum(1))
            ours = leave_one_out(total.clamp(low, high) if "clip1" in rest else total, group)
            if "norm1" in rest:
                known = ~lost
                ours = masked((ours - ours[known].mean()) / (ours[known].std() + 1e-4), known)
        elif rest[0] == "sum_then_normalize":
            total = torch.where(lost, NAN, (rewards * weights).nansum(1))
            ours = group_advantages(total, group, std=rest[1], **options)
        elif kind == "plain":
            named = {str(k): r for k, r in enumerate(rewards.T)}
            ours = gdpo_advantages(named, group, weights={str(k): w for k, w in enumerate(weights.tolist())}, std_floor=0.0, **options)
        else:  # ours leaves a row that lacks a reward out of all of them
            continue
        assert_close(ours, data[key], what=key)


@pytest.mark.golden
def test_penalties_golden(golden_dir):
    data, meta = load_llm(golden_dir, "verl_misc")
    o = meta["overlong"]
    lengths = data["in.lens"]
    for key in (k for k in data if k.startswith("overlong.verl.f")):
        factor = float(key.removeprefix("overlong.verl.f").removesuffix(".reward_tensor"))
        penalty = overlong_penalty(lengths, max_length=o["max_resp_len"], buffer=o["buffer_len"], factor=factor)
        at = torch.arange(data[key].shape[1]) < lengths[:, None]
        assert_close(place_scores(o["base_score"] + penalty, at), data[key], what=key)
    trl, _ = load_llm(golden_dir, "trl_advantages")
    for key in (k for k in trl if k.startswith("soft_overlong.max")):
        longest, buffer = (int(n) for n in key.removeprefix("soft_overlong.max").split("_cache"))
        penalty = overlong_penalty(trl["soft_overlong.len"], max_length=longest, buffer=buffer).clamp(min=-1)  # no longer ones here
        assert_close(penalty, trl[key], what=key)


@pytest.mark.golden
def test_openrlhf_and_slime(golden_dir):
    """These step through masked tokens as if they were tokens without reward and value: right padding aside, that is wrong."""
    data, _ = load_llm(golden_dir, "openrlhf_slime_torchtune")
    mask, rewards, values = data["in.mask"].bool(), data["in.token_level_rewards_kl"], data["in.values"]
    for key in (k.removesuffix(".advantages") for k in data if k.startswith("openrlhf.gae.") and k.endswith(".advantages")):
        gamma, lam = (float(".".join(part)) for part in zip(*[iter(key.removeprefix("openrlhf.gae.").split("."))] * 2, strict=True))
        advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
        assert_close(advantages, masked(data[f"{key}.advantages"], mask), what=key)
        assert_close(returns, masked(data[f"{key}.returns"], mask), what=key)
    for key in (k for k in data if k.startswith("openrlhf.cumret.")):
        ours = rewards_to_go(rewards, mask, gamma=float(key.removeprefix("openrlhf.cumret.")))
        assert_close(ours, masked(data[key], mask), what=key)
    # slime and torchtune ignore the mask altogether; torchtune's whitening puts the mean back.
    everywhere = torch.ones_like(mask)
    advantages, returns = gae(rewards, values, everywhere, gamma=0.98, lam=0.9)
    assert_close(advantages, data["slime.gae.adv"])
    assert_close(returns, data["slime.gae.ret"])
    assert_close(advantages, data["slime.chunked_gae.adv"])
    advantages, returns = gae(rewards, values, everywhere, gamma=1.0, lam=0.95)
    white = whiten(advantages, mask, total=alone) + masked_mean(advantages, mask)
    assert_close(masked(white, mask), masked(data["torchtune.estimate_advantages.adv"], mask), f64=VERL_EPS)
    assert_close(returns, data["torchtune.estimate_advantages.ret"])


@pytest.mark.golden
def test_openrlhf_rewards(golden_dir):
    """Score on the last token and KL on all; responses that do not stop are as long as the row."""
    data, _ = load_llm(golden_dir, "openrlhf_slime_torchtune")
    mask, lengths = data["in.mask"].bool(), data["in.lens"]
    kl = kl_estimate(data["in.log_prob"], data["in.ref_log_prob"], kind="k1")
    clipped = data["openrlhf.reward.r"].clamp(-2, 2)  # its reward_clip_range in that call
    assert_close(token_rewards(clipped, mask, kl=kl, kl_coef=0.05), masked(data["openrlhf.reward"], mask))
    longest = mask.shape[1]
    for key in (k for k in data if k.startswith("openrlhf.overlong.T.buf")):
        penalty = overlong_penalty(lengths, max_length=longest, buffer=int(key.rpartition("buf")[2])).clamp(min=-1)
        assert_close(1 + penalty, data[key], what=key)


@pytest.mark.golden
def test_areal_norms(golden_dir):
    """mean level, std level, leave one out, unbiased; not those whose std is about another level's mean."""
    data, meta = load_llm(golden_dir, "areal_decoupled_ppo")
    x, eps = data["norm.x"], float(meta["norm"]["eps"])
    group, everyone = torch.arange(len(x)) // meta["norm"]["group_size"], torch.zeros(len(x), dtype=torch.long)
    assert_close(group_advantages(x, everyone, std="batch", eps=eps), data["norm.batch.batch.loo0.ub0"])
    assert_close(group_advantages(x, group, std="group", ddof=1, eps=eps), data["norm.group.group.loo0.ub1"])
    assert_close(leave_one_out(x, group), data["norm.group.none.loo1.ub0"])
    advantages, mask = data["in.advantages"], data["in.loss_mask"].bool()
    scaled = masked((advantages - advantages[mask].mean()) / (advantages[mask].std() + eps), mask)
    assert_close(scaled, data["norm.adv_batch_masked"])


def test_win_rates_by_hand():
    """Scores 0, ln 3 and ln 3 in a group: sigmoid(ln 3) = 3/4, so (1/4 + 1/4) / 2, (3/4 + 1/2) / 2, the same."""
    log3 = float(torch.tensor(3.0, dtype=torch.float64).log())
    rates = win_rates(f64(0, log3, log3, 9, NAN, 5), torch.tensor([0, 0, 0, 1, 1, 2]))
    torch.testing.assert_close(rates, f64(0.25, 0.625, 0.625, 0.5, NAN, 0.5), equal_nan=True)
