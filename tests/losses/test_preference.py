"""DPO and its relatives: arithmetic by hand, what smoothing and lengths do, TRL's and OpenRLHF's numbers."""

import math

import pytest
import torch
from golden_numbers import assert_close, f64, load_llm
from torch.autograd import grad, gradcheck

from lit_rl.credit.weights import token_weights
from lit_rl.losses.masked import masked
from lit_rl.losses.preference import (
    _OF_PAIRS,
    Preference,
    ld_sequence_logprobs,
    preference_loss,
    preference_metrics,
    sequence_logprobs,
)
from lit_rl.losses.supervised import nll_loss

NAN = float("nan")


def test_dpo_by_hand():
    """h = 2, k = -1, beta .5: z = 1.5; -log sigmoid(1.5) = log(1 + e^-1.5) = 0.2014; its slope in chosen -beta sigmoid(-1.5)."""
    chosen = f64(-3).requires_grad_()
    loss = preference_loss(chosen, f64(-6), f64(-5), f64(-5), beta=0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1.5)))
    assert grad(loss, chosen)[0].item() == pytest.approx(-0.5 / (1 + math.exp(1.5)))
    assert preference_loss(f64(-3), f64(-6), f64(-5), f64(-5), kind="hinge", beta=0.5).item() == 0


def test_pairs_beside_other_rows_tell_loss_margin_and_winner_of_each():
    """z = 0.5 (3 - 1) = 1, 0 and -0.5; none of it has a gradient but the losses."""
    chosen = f64(-1.0, -2.0, -3.0).requires_grad_()
    losses, seen = Preference(beta=0.5)(chosen, f64(-5.0, -2.0, -2.0), f64(-4.0, -2.0, -3.0), f64(-6.0, -2.0, -3.0))
    expected = [math.log(1 + math.exp(-z)) for z in (1, 0, -0.5)]
    assert losses.tolist() == pytest.approx(expected, abs=1e-6) == seen["loss"].tolist()
    assert seen["margin"].tolist() == [1, 0, -0.5] and seen["accuracy"].tolist() == [1, 0, 0]
    assert losses.requires_grad and not any(values.requires_grad for values in seen.values())


def test_label_smoothing_does_something_in_sigmoid():
    """Trap 3: TRL's sigmoid ignores it. e = .2: .8 log(1 + e^-1.5) + .2 log(1 + e^1.5)."""
    loss = preference_loss(f64(-3), f64(-6), f64(-5), f64(-5), beta=0.5, label_smoothing=0.2)
    assert loss.item() == pytest.approx(0.8 * math.log(1 + math.exp(-1.5)) + 0.2 * math.log(1 + math.exp(1.5)))


def test_ipo_with_and_without_lengths():
    """Trap 4: h = 2 over 4 tokens, k = -1 over 2: (.5 + .5 - 1)^2 = 0 with beta .5; without lengths (3 - 1)^2."""
    pair = f64(-3), f64(-6), f64(-5), f64(-5)
    assert preference_loss(*pair, kind="ipo", beta=0.5, lengths=(torch.tensor([4]), torch.tensor([2]))).item() == 0
    assert preference_loss(*pair, kind="ipo_sum", beta=0.5).item() == 4
    with pytest.raises(ValueError, match="pass lengths"):
        preference_loss(*pair, kind="ipo")
    with pytest.raises(ValueError, match="label_smoothing above 0"):
        preference_loss(*pair, kind="exo_pair")
    with pytest.raises(ValueError, match=r"in \[0, 0.5\)"):
        preference_loss(*pair, kind="robust", label_smoothing=0.5)


@pytest.mark.parametrize("kind", sorted(_OF_PAIRS))
def test_gradients_agree_with_differences(kind):
    g = torch.Generator().manual_seed(1)
    pairs = [torch.randn(4, generator=g, dtype=torch.float64).requires_grad_() for _ in range(4)]
    assert gradcheck(lambda *p: preference_loss(*p, kind=kind, beta=0.7, label_smoothing=0.1), pairs)


def test_sequence_sums_are_exact_for_long_rows():
    """3000 float32 tokens of -1.1 and one of -1e-4 more: float32 loses the difference of the two sums."""
    lower = torch.full((1, 3000), -1.1)
    higher = lower.clone()
    higher[0, 0] += 1e-4
    mask = torch.ones(1, 3000, dtype=torch.bool)
    assert (sequence_logprobs(higher, mask) - sequence_logprobs(lower, mask)).item() == pytest.approx(1e-4, rel=1e-2)
    assert sequence_logprobs(torch.tensor([[1.0, NAN]]), torch.tensor([[True, False]])).tolist() == [1]


def test_ld_counts_what_is_beyond_the_shorter_completion_less():
    logprobs, mask = torch.tensor([[NAN, -1.0, -2, -4]]), torch.tensor([[False, True, True, True]])
    assert ld_sequence_logprobs(logprobs, mask, torch.tensor([2]), alpha=0.5).tolist() == [-5]
    assert ld_sequence_logprobs(logprobs, mask, torch.tensor([2]), alpha=1.0).tolist() == [-7]


def trl_loss(o, data, policy, mask):
    """A case of TRL's, from per-token log-probabilities [chosen; rejected]."""
    ref, n = data["in.ref_per_token_logps"], len(mask) // 2
    counts = mask.sum(1)
    if o["ld_alpha"] is None:
        sums = [*sequence_logprobs(policy, mask).chunk(2), *sequence_logprobs(ref, mask).chunk(2)]
    else:
        shared = torch.minimum(*counts.chunk(2)).repeat(2)
        sums = [part for x in (policy, ref) for part in ld_sequence_logprobs(x, mask, shared, alpha=o["ld_alpha"]).chunk(2)]
    loss = 0
    for kind, share in zip(o["loss_type"], o["loss_weights"], strict=True):
        if kind == "sft":  # over all chosen tokens
            loss = loss + share * (nll_loss(policy[:n]) * token_weights(mask[:n], "token-mean")).sum()
            continue
        smoothing = 0.0 if kind == "sigmoid" else o["label_smoothing"]  # ignored there
        options = {"beta": o["beta"], "label_smoothing": smoothing, "f_divergence": o["f_divergence"], "alpha": o["alpha"]}
        pairs = preference_loss(*sums, kind=kind, lengths=(counts[:n], counts[n:]), **options)
        loss = loss + share * pairs.mean()
    return loss, sums


@pytest.mark.golden
def test_trl_preference_losses(golden_dir):
    data, meta = load_llm(golden_dir, "trl_dpo_loss")
    mask = data["in.completion_mask"][:, 1:].bool()
    names = {"margin": "rewards_margins", "accuracy": "rewards_accuracies", "logprobs_chosen": "logps_chosen"}
    names |= {"logprobs_rejected": "logps_rejected"}
    assert meta["cases"]
    for case, options in meta["cases"].items():
        if options["wpo"]:
            continue
        policy = data["in.per_token_logps"].clone().requires_grad_()
        loss, sums = trl_loss(options, data, policy, mask)
        assert_close(loss, data[f"{case}.loss"], f32=5e-5, f64=5e-5, what=case)
        gradient = grad(loss, policy)[0]
        assert (gradient[~mask] == 0).all()  # TRL's are of log-probabilities masked before
        assert_close(gradient, masked(data[f"{case}.grad_logps"], mask), f32=5e-5, what=case)
        for name, value in preference_metrics(*sums, beta=options["beta"]).items():
            assert_close(value, data[f"{case}.metric.{names.get(name, name)}"], f64=5e-5, what=f"{case} {name}")


@pytest.mark.golden
def test_openrlhf_preference_losses(golden_dir):
    data, meta = load_llm(golden_dir, "trl_dpo_loss")
    pairs = [data[f"seq.{name}"] for name in ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")]
    cases = [key.removesuffix(".loss") for key in data if key.startswith("openrlhf.") and key.endswith(".loss")]
    assert cases
    for case in cases:
        smoothing, _, ipo = case.removeprefix("openrlhf.ls").rpartition(".ipo")
        options = {"kind": "ipo_sum"} if ipo == "1" else {"label_smoothing": float(smoothing)}
        assert_close(preference_loss(*pairs, beta=meta["beta"], **options).mean(), data[f"{case}.loss"], f32=5e-5, what=case)
        metrics = preference_metrics(*pairs, beta=meta["beta"])
        for name in ("chosen", "rejected"):
            assert_close(metrics[f"rewards_{name}"], data[f"{case}.{name}_rewards"].mean(), f32=5e-5)
