"""Token surrogates: cases by hand, properties, verl's, TRL's, OpenRLHF's, AReaL's and slime's numbers."""

import math

import pytest
import torch
from golden_numbers import assert_close, f64, load_llm
from torch.autograd import grad

from lit_rl.credit.weights import token_weights
from lit_rl.errors import ConfigError
from lit_rl.losses.kl import kl_estimate
from lit_rl.losses.masked import masked, masked_mean, row_mean
from lit_rl.losses.off_policy import importance_weights, within_bounds
from lit_rl.losses.policy_gradient import clipped_ratio_loss, clipped_surrogate, is_clipped
from lit_rl.losses.sequence_ratio import answer_ratios, sequence_log_ratio
from lit_rl.losses.surrogates import (
    Cispo,
    Clip,
    GeoMean,
    Reinforce,
    Sapo,
    SequenceClip,
    Surrogate,
    Vespo,
    surrogate_metrics,
)


def random_rows(seed=0, rows=5, length=7, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    new, old, advantages = (torch.randn(rows, length, generator=g, dtype=dtype) for _ in range(3))
    return new, old, advantages, torch.rand(rows, length, generator=g) < 0.7


def test_dual_clip_by_hand():
    """A = -1, c = 3: r = 2 costs 2, r = 5 only 3 and has no gradient; A = 1 is as before."""
    new = f64(2, 5, 5).log().requires_grad_()
    loss = clipped_surrogate(new, torch.zeros(3).double(), f64(-1, -1, 1), clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    torch.testing.assert_close(loss, f64(2, 3, -1.2))
    torch.testing.assert_close(grad(loss.sum(), new)[0], f64(2, 0, 0))
    with pytest.raises(ValueError, match="must be above 1"):
        clipped_surrogate(new, new, f64(1, 1, 1), clip_low=0.2, clip_high=0.2, dual_clip=1.0)


def test_sequence_ratio_by_hand():
    """Row of log-ratios (.1, .3, masked 9): every token has exp(.2), and its own gradient exp(.2) A_t."""
    new, mask = f64(0.1, 0.3, 9)[None].requires_grad_(), torch.tensor([[True, True, False]])
    ratio = sequence_log_ratio(new, torch.zeros(1, 3).double(), mask)
    torch.testing.assert_close(ratio, f64(0.2, 0.2, 0)[None])
    loss = clipped_ratio_loss(ratio, f64(2, -1, 5)[None], clip_low=0.5, clip_high=0.5)
    torch.testing.assert_close(grad((loss * mask).sum(), new)[0], math.exp(0.2) * f64(-2, 1, 0)[None])


SURROGATES = [Clip(dual=3.0), SequenceClip(low=0.2, high=0.3), Sapo(), Cispo(high=0.3), GeoMean(), Vespo(), Reinforce()]
NAMES = [type(surrogate).__name__ for surrogate in SURROGATES]


@pytest.mark.parametrize("surrogate", [s for s in SURROGATES if not isinstance(s, Vespo)], ids=lambda s: type(s).__name__)
def test_on_policy_gradient_is_reinforce(surrogate: Surrogate):
    """At new == old every one of them starts with -A d new, in the mean over rows."""
    new, _, advantages, mask = random_rows()
    advantages = advantages[:, :1].expand_as(advantages) if isinstance(surrogate, GeoMean) else advantages
    mask[:, 0] = True
    new.requires_grad_()
    weights = token_weights(mask, "seq-mean-token-mean", dtype=torch.float64)
    losses, _ = surrogate(new, new.detach(), advantages, mask)
    torch.testing.assert_close(grad((losses * weights).sum(), new)[0], -advantages * weights, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("surrogate", SURROGATES, ids=NAMES)
def test_rows_may_be_split_anywhere(surrogate: Surrogate):
    """Weights are made for the whole step; then micro-batches of 1, 2 and 4 rows, padding cut off, add up to its gradient."""
    new, old, advantages, mask = random_rows(seed=4, rows=7)
    mask[:, 5:] = False
    new.requires_grad_()
    weights = token_weights(mask, "seq-mean-token-mean", dtype=torch.float64)

    def gradient(*rows):
        n, o, a, m = (t[list(rows), :5] for t in (new, old, advantages, mask))
        return grad((surrogate(n, o, a, m)[0] * weights[list(rows), :5]).sum(), new)[0]

    torch.testing.assert_close(gradient(0) + gradient(5, 2) + gradient(1, 6, 3, 4), gradient(*range(7)), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("surrogate", SURROGATES, ids=NAMES)
def test_only_what_clips_tells_of_clipping(surrogate: Surrogate):
    """Ratios of e^5 and e^-5 are outside of every range."""
    new, mask = f64(5, -5)[None], torch.ones(1, 2, dtype=torch.bool)
    _, metrics = surrogate(new, torch.zeros_like(new), f64(1, -1)[None], mask)
    assert metrics["ppo_kl"] == 0
    clips = isinstance(surrogate, Clip | Cispo | GeoMean)
    assert {name for name in metrics if name.startswith("clip_fraction")} >= ({"clip_fraction"} if clips else set())
    assert clips or metrics.keys() == {"ppo_kl"}
    if isinstance(surrogate, Cispo | GeoMean):
        assert metrics["clip_fraction_high"] == pytest.approx(0.5)


@pytest.mark.parametrize("make", [lambda: Clip(low=-0.1), lambda: Clip(dual=1.0), lambda: Cispo(high=-1.0), lambda: Sapo(tau_pos=0.0)])
def test_ranges_that_cannot_be_are_refused(make):
    with pytest.raises(ConfigError, match="model.surrogate"):
        make()


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    new, zero, good, mask = f64(3.0, 3.0).log()[None].requires_grad_(), f64(0, 0)[None], f64(1, 1)[None], torch.tensor([[True, True]])
    assert grad(Clip()(new, zero, good, mask)[0].sum(), new)[0].tolist() == [[0, 0]]
    torch.testing.assert_close(grad(Cispo(high=0.2)(new, zero, good, mask)[0].sum(), new)[0], f64(-1.2, -1.2)[None])


def test_cispo_bound_is_relative():
    """Trap 13: TRL's epsilon_high 5 is the bound itself: high 4 here. r = 6 counts 5 times."""
    loss, _ = Cispo(high=4.0)(f64(6).log()[None], f64(0)[None], f64(1)[None], torch.tensor([[True]]))
    torch.testing.assert_close(loss, -5 * f64(6).log()[None])


def test_decoupled_ppo_corrects_without_a_rejection_rule():
    """Trap 10: AReaL forgets pi_prox / pi_behave when nothing is configured; here it is a factor of its own. 1.5 of -A r = -1.1."""
    new, prox, behave, mask = f64(1.1)[None].log(), f64(1)[None].log(), f64(1 / 1.5)[None].log(), torch.tensor([[True]])
    loss = clipped_surrogate(new, prox, f64(1)[None], clip_low=0.2, clip_high=0.2) * importance_weights(prox, behave, mask, high=None)
    torch.testing.assert_close(loss, f64(-1.65)[None])


def test_metrics_by_hand():
    """A = 1, r = 2 and A = -1, r = .5 lose their gradient; A = -1, r = 4 is at the dual clip; the fifth is masked."""
    log_ratio = f64(2, 0.5, 4, 1, 7).log()
    mask = torch.tensor([True, True, True, True, False])
    metrics = surrogate_metrics(log_ratio, f64(1, -1, -1, 1, 1), mask, clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    assert metrics["clip_fraction_low"].item() == pytest.approx(0.25) == metrics["clip_fraction_high"].item()
    assert metrics["clip_fraction"].item() == pytest.approx(0.5) and metrics["clip_fraction_dual"].item() == pytest.approx(0.25)
    assert metrics["ppo_kl"].item() == pytest.approx(-math.log(4) / 4)


VERL: dict[str, tuple[type[Surrogate], dict[str, str], str]] = {
    "vanilla": (Clip, {"low": "clip_ratio_low", "high": "clip_ratio_high", "dual": "clip_ratio_c"}, "seq-mean-token-sum-norm"),
    "gspo": (SequenceClip, {"low": "clip_ratio_low", "high": "clip_ratio_high"}, "seq-mean-token-mean"),
    "sapo": (Sapo, {"tau_pos": "tau_pos", "tau_neg": "tau_neg"}, "seq-mean-token-mean"),
    "cispo": (Cispo, {"low": "clip_ratio_low", "high": "clip_ratio_high"}, ""),
    "geo_mean": (GeoMean, {"low": "clip_ratio_low", "high": "clip_ratio_high"}, "seq-mean-token-mean"),
    "reinforce": (Reinforce, {}, ""),
}
"""Surrogate of a case by its name's first part, its options in verl's words, and the aggregation where the case says nothing of it."""


def verl_loss(case, options):
    kind = {"extreme": "vanilla", "gpg": "reinforce"}.get(case.split(".")[0], case.split(".")[0])
    if kind in ("kl_cov", "clip_cov"):
        return None, ""  # they look at all tokens of a micro-batch at once, so that its cut would change the gradient: we have neither
    cls, names, mode = VERL[kind]
    fixed = kind in ("gspo", "sapo", "geo_mean")
    chosen = {ours: float(options[theirs]) for ours, theirs in names.items() if options.get(theirs) is not None}
    return cls(**chosen), mode if fixed else options.get("mode", mode)


@pytest.mark.golden
def test_verl_policy_losses(golden_dir):
    data, meta = load_llm(golden_dir, "verl_policy_loss")
    assert meta["cases"]
    for case, options in meta["cases"].items():
        mask, advantages = data[f"in.{options['mask']}"].bool(), data[f"in.{options['adv']}"]
        old = data[options["old"]] if "old" in options else data["in.old_log_prob"]
        new = data["in.log_prob"].clone().requires_grad_()
        surrogate, mode = verl_loss(case, options)
        if surrogate is None:
            continue
        losses, metrics = surrogate(new, old, advantages, mask)
        if options.get("rollout_is_weights"):
            weight = data["in.rollout_is_weights"]
            if case.startswith("geo_mean"):  # one ratio per row, hence one weight: the geometric mean
                weight = row_mean((weight + 1e-10).log(), mask).exp()[:, None]
            losses = losses * weight
        step = options.get("global_batch_info", {})
        totals = {
            "tokens": step.get("batch_num_tokens"),
            "sequences": step.get("global_batch_size"),
            "scale": step.get("loss_scale_factor"),
        }
        ranks = step.get("dp_size", 1) if mode != "seq-mean-token-sum-norm" else 1
        loss = ranks * (losses * token_weights(mask, mode, **totals)).sum()
        assert_close(loss, data[f"{case}.loss"], what=case)
        assert_close(grad(loss, new)[0], data[f"{case}.grad_log_prob"], what=case)
        logged = {key.split(".metric.actor_")[1]: value.double() for key, value in data.items() if key.startswith(f"{case}.metric.")}
        names = {"pg_clipfrac": "clip_fraction", "pg_clipfrac_lower": "clip_fraction_dual", "ppo_kl": "ppo_kl"}
        told = {"pg_clipfrac", "ppo_kl"} - ({"pg_clipfrac"} if case.startswith("geo_mean") else set())  # it counts in another way
        for name in (told | ({"pg_clipfrac_lower"} if options.get("clip_ratio_c") else set())) & logged.keys():
            if names[name] in metrics:
                assert_close(metrics[names[name]].double(), logged[name], f64=2e-5, what=f"{case} {name}")


def trl_weights(kind, mask, common):
    """TRL's normalisers, gradient accumulation included."""
    accumulate = common["current_gradient_accumulation_steps"]
    if kind in ("grpo", "sapo"):
        return token_weights(mask, "seq-mean-token-mean", sequences=len(mask)) / accumulate
    if kind == "bnpo":
        return token_weights(mask, "token-mean") / accumulate
    if kind == "dr_grpo":
        return token_weights(mask, "dr-grpo", sequences=len(mask), scale=common["max_completion_length"]) / accumulate
    if kind == "luspo":
        return token_weights(mask, "seq-mean-token-sum", sequences=len(mask)) / accumulate
    # The step's tokens, of which each of its micro-batches gets the whole: TRL divides by the accumulation over steps_per_generation later.
    return token_weights(mask, "token-mean", tokens=common["num_items_in_batch"]) * common["steps_per_generation"] / accumulate


@pytest.mark.golden
def test_trl_losses(golden_dir):
    data, meta = load_llm(golden_dir, "trl_grpo_loss")
    assert meta["cases"]
    for case, o in meta["cases"].items():
        if o["off_policy_mask_threshold"] is not None or o["top_entropy_quantile"] < 1:
            continue  # options that we have not
        mask = data["in.completion_mask"].bool()
        if o["tool_mask"]:
            mask = mask & data["in.tool_mask"].bool()
        new, entropies = data["in.per_token_logps"].clone().requires_grad_(), data["in.entropies"].clone().requires_grad_()
        old = new.detach() if o["old_missing"] else data["in.old_per_token_logps"]
        advantages = data["in.advantages"][:, None].expand_as(new)
        kind, low, high = o["loss_type"], float(o["epsilon"]), float(o["epsilon_high"])
        whole = SequenceClip if o["level"] == "sequence" else Clip
        cls, chosen = {"cispo": (Cispo, {"high": high - 1}), "sapo": (Sapo, {}), "vespo": (Vespo, {})}.get(
            kind, (whole, {"low": low, "high": high, "cap": o["delta"]})
        )
        losses, _ = cls(**chosen)(new, old, advantages, mask)
        if o["importance_sampling_ratio"]:
            losses = losses * data["in.sequence_mask_is_ratio" if "seqmask" in case else "in.token_truncate_is_ratio"]
        if o["beta"]:
            kl = kl_estimate(new, data["in.ref_per_token_logps"], kind="k3")
            kl = kl * (new - old).exp() if o["use_bias_correction_kl"] else kl
            losses = losses + o["beta"] * kl
        loss = (losses * trl_weights(kind, mask, meta["common"])).sum()
        loss = loss - o["entropy_coef"] * (entropies * trl_weights("bnpo", mask, meta["common"])).sum()
        assert_close(loss, data[f"{case}.loss"], what=case)
        assert_close(grad(loss, new, retain_graph=True)[0], data[f"{case}.grad_logps"], what=case)
        if f"{case}.grad_entropies" in data:
            assert_close(grad(loss, entropies)[0], data[f"{case}.grad_entropies"], what=case)
        ours = {"entropy": masked_mean(entropies, mask)}
        if o["level"] == "token":
            clipped = surrogate_metrics(new - old, advantages, mask, clip_low=low, clip_high=high)
            ours |= {f"clip_ratio_{side}_mean": clipped[f"clip_fraction_{side}"] for side in ("low", "high")}
            ours["clip_ratio_region_mean"] = clipped["clip_fraction"]
        if o["beta"]:
            ours["kl"] = masked_mean(kl, mask)
        for name, value in ours.items():
            if f"{case}.metric.{name}" in data:
                assert_close(value.double(), data[f"{case}.metric.{name}"].double(), f64=2e-5, what=f"{case} {name}")


@pytest.mark.golden
def test_openrlhf_policy_losses(golden_dir):
    """tok1: token mean, tok0: mean over rows of token means; gspo is always the latter."""
    data, meta = load_llm(golden_dir, "openrlhf_slime_torchtune")
    old, behaved, mask = data["in.old_log_prob"], data["in.rollout_log_prob"], data["in.mask"].bool()
    cases = {case: options for case, options in meta["cases"].items() if case.startswith("openrlhf.policy.")}
    assert cases
    for case, o in cases.items():
        _, _, kind, aggregation = case.split(".")
        advantages = data["in.adv_tok"]
        new = data["in.log_prob"].clone().requires_grad_()
        gspo = kind.startswith("gspo")
        # Its ratio has one gradient per row, which differs from GSPO's per token only where advantages differ within a row.
        corrected = bool(o.get("enable_vllm_is_correction"))
        base = behaved if gspo and corrected else old  # its GSPO corrects by taking the ratio to the sampler's policy
        ratio = row_mean(new - base, mask)[:, None].expand_as(new) if gspo else new - old
        clip = {"clip_low": o["clip_low"], "clip_high": o["clip_high"]}
        losses = clipped_ratio_loss(ratio, advantages, dual_clip=o.get("dual_clip"), **clip)
        if corrected and not gspo:
            low, high = (float(x) for x in o["vllm_is_truncated_threshold"])
            correction = o.get("vllm_is_correction_type", "tis")
            if correction == "seq-mask-tis":
                kept = within_bounds(old, behaved, mask, metric="ratio", over="mean", lower=low, upper=high)
                losses = losses * kept * importance_weights(old, behaved, mask, high=None)
            else:
                outside = "zero" if correction == "icepop" else "clamp"
                losses = losses * importance_weights(old, behaved, mask, low=low, high=high, outside=outside)
        mode = "token-mean" if aggregation == "tok1" and not gspo else "seq-mean-token-mean"
        loss = (losses * token_weights(mask, mode)).sum()
        assert_close(loss, data[f"{case}.loss"], what=case)
        assert_close(grad(loss, new)[0], data[f"{case}.grad"], what=case)
        if not o.get("dual_clip"):
            assert_close(surrogate_metrics(ratio, advantages, mask, **clip)["clip_fraction"], data[f"{case}.clip_ratio"], what=case)


@pytest.mark.golden
def test_slime_token_losses(golden_dir):
    data, _ = load_llm(golden_dir, "openrlhf_slime_torchtune")
    new, old, advantages = data["in.log_prob"], data["in.old_log_prob"], data["in.adv_tok"]
    everywhere = torch.ones_like(new, dtype=torch.bool)
    assert_close(Clip(low=0.2, high=0.28, dual=3.0)(new, old, advantages, everywhere)[0], data["slime.policy.dual"])
    assert_close(Cispo(high=0.28)(new, old, advantages, everywhere)[0], data["slime.cispo"])
    assert_close(kl_estimate(new, data["in.ref_log_prob"], kind="k3") * (new - old).exp(), data["slime.kl.k3.unbiased"])


@pytest.mark.golden
def test_areal_losses(golden_dir):
    """Decoupled PPO: the surrogate against the proximal policy, times the proximal policy's weight against the sampler's."""
    data, meta = load_llm(golden_dir, "areal_decoupled_ppo")
    mask, prox, behave = data["in.loss_mask"].bool(), data["in.proximal_logprobs"], data["in.old_logprobs(behave)"]
    weights = token_weights(mask, "token-mean")
    assert meta["cases"]
    for case, o in meta["cases"].items():
        new, advantages = data["in.logprobs"].clone().requires_grad_(), data["in.advantages"]
        low = float(o["eps_clip"])
        high = low if o["eps_clip_higher"] is None else float(o["eps_clip_higher"])
        rule, kept, importance = o["rejection_sampling"], mask, torch.ones_like(new)
        log_ratio = new - prox
        if o["level"] == "sequence":
            log_ratio = sequence_log_ratio(new, prox, mask)
            advantages = row_mean(advantages, mask)[:, None].expand_as(new)
        if rule is not None:
            by_row = rule["level"] == "sequence" and rule["metric"] == "ratio"
            importance = importance_weights(prox, behave, mask, level="geometric" if by_row else "token", high=None)
            inside = areal_within(prox, behave, mask, rule)
            if rule["action"] == "mask":
                kept = inside
            else:
                importance = torch.where(inside, importance, masked(importance.clamp(rule["lower"] or 0.0, rule["upper"]), mask))
            assert_close(masked(importance, kept), data[f"{case}.behave_imp_weight"], what=case)
        losses = clipped_ratio_loss(log_ratio, advantages, clip_low=low, clip_high=high, dual_clip=o["c_clip"])
        loss = (masked(losses * importance, kept) * weights).sum()
        assert_close(loss, data[f"{case}.loss"], what=case)
        gradient = grad(loss, new)[0]
        assert_close(gradient, data[f"{case}.grad"], what=case)
        clipped = masked_mean((is_clipped(log_ratio, advantages, clip_low=low, clip_high=high) & kept).float(), mask)
        assert_close(clipped, data[f"{case}.clip_frac"], what=case)
        if f"packed.{case}.grad" in data:  # the same rows end to end, without padding
            assert_close(loss, data[f"packed.{case}.loss"], what=case)
            assert_close(gradient[data["packed.select_mask"]], data[f"packed.{case}.grad"], what=case)


def areal_within(prox, behave, mask, rule):
    return within_bounds(
        prox,
        behave,
        mask,
        metric={"ratio": "ratio", "kl_k1": "k1", "kl_k2": "k2", "kl_k3": "k3_reverse"}[rule["metric"]],
        over=rule["agg"] if rule["level"] == "sequence" else "token",
        lower=rule["lower"],
        upper=rule["upper"],
    )


@pytest.mark.golden
def test_areal_soft_clipping(golden_dir):
    data, _ = load_llm(golden_dir, "areal_decoupled_ppo")
    new, mask = data["in.logprobs"].clone().requires_grad_(), data["in.loss_mask"].bool()
    losses, _ = Sapo()(new, data["in.proximal_logprobs"], data["in.advantages"], mask)
    loss = (losses * token_weights(mask, "token-mean")).sum()
    assert_close(loss, data["sapo.loss"])
    assert_close(grad(loss, new)[0], data["sapo.grad"])


def test_ratios_of_answers_by_hand():
    """Only answers that count and have an advantage: the first, 4 times as likely by token, and the third, half as likely."""
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    new = torch.tensor([[2.0, 2.0, 50.0], [9.0, 9.0, 9.0], [-1.0, 7.0, 7.0], [3.0, 3.0, 3.0]], dtype=torch.float64) * math.log(2)
    advantages = torch.tensor([[1.0], [0.0], [-1.0], [1.0]]).double().expand(4, 3)
    given = torch.zeros(4, 3, dtype=torch.float64), advantages, mask
    sums, largest = answer_ratios(new, *given, counted=torch.tensor([True] * 4), clip_low=0.6, clip_high=1.0)
    assert float(sums["seq_ratio_mean"]) == pytest.approx(4.5) and float(sums["clipfrac"]) == 1 and float(largest) == pytest.approx(4)
    sums, largest = answer_ratios(new, *given, counted=torch.tensor([False, True, True, True]), clip_low=0.4, clip_high=1.0)
    assert float(sums["seq_ratio_mean"]) == pytest.approx(0.5) and float(sums["clipfrac"]) == 1 and float(largest) == pytest.approx(0.5)
    sums, largest = answer_ratios(new, *given, counted=torch.zeros(4, dtype=torch.bool), clip_low=0.4, clip_high=1.0)
    assert [float(sums["seq_ratio_mean"]), float(sums["clipfrac"]), float(largest)] == [0, 0, 0]
