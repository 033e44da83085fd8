"""Log-probabilities from hidden states: equal to the plain way in value and gradient, TRL's numbers, and what is never in memory."""

import math
import re

import pytest
import torch
from golden_numbers import assert_close, load_llm
from torch.autograd import grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_rl.losses import token_logprobs as module
from lit_rl.losses.token_logprobs import token_logprobs


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gives back."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max(
            [self.elements, *(t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(out) if isinstance(t, torch.Tensor))]
        )
        return out


def inputs(n=11, h=8, v=37, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(k, h, generator=g, dtype=dtype).requires_grad_() for k in (n, v))
    return hidden, weight, torch.randn(v, generator=g, dtype=dtype).requires_grad_(), torch.randint(v, (n,), generator=g)


def test_temperature_by_hand():
    """Trap 20: logits 0 and log 3 at temperature 1/2 are 0 and log 9: probability .9, entropy -.9 log .9 - .1 log .1."""
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [math.log(3)]])
    got = token_logprobs(hidden, weight, torch.tensor([1]), temperature=0.5, entropy=True)
    assert got.logprobs.item() == pytest.approx(math.log(0.9))
    assert got.entropy.item() == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))


def test_tokens_may_have_temperatures_of_their_own():
    """The same logits 0 and log 3 at temperatures 1 and 1/2: probabilities .75 and .9."""
    hidden, weight, temperature = torch.ones(2, 1), torch.tensor([[0.0], [math.log(3)]]), torch.tensor([1.0, 0.5])
    got = token_logprobs(hidden, weight, torch.tensor([1, 1]), temperature=temperature)
    assert got.logprobs.exp().tolist() == pytest.approx([0.75, 0.9])


EACH = torch.linspace(0.5, 1.5, 11, dtype=torch.float64)
OPTIONS = [
    {},
    {"temperature": 0.7},
    {"scale": 0.5, "softcap": 3.0},
    {"entropy": True},
    {"entropy": True, "temperature": 1.3, "softcap": 4.0},
    {"temperature": EACH},
    {"entropy": True, "temperature": EACH, "scale": 0.5, "softcap": 4.0},
]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunks_give_the_plain_values_and_gradients(options, biased, frozen, chunk):
    hidden, weight, bias, targets = inputs()
    if frozen:
        weight, bias = weight.detach(), bias.detach()
    bias = bias if biased else None
    g = torch.randn(len(targets), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    learned = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]

    def run(**how):
        got = token_logprobs(hidden, weight, targets, bias=bias, **options, **how)
        loss = (got.logprobs * g).sum() + (0 if got.entropy is None else (got.entropy * g.flip(0)).sum())
        return [t for t in got if t is not None], grad(loss, learned)

    for plain, chunked in zip(run(), run(chunk=chunk), strict=True):
        assert len(plain) == len(chunked)
        for a, b in zip(plain, chunked, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_an_adapter_of_the_head_counts_as_its_product_would(options, chunk):
    """hidden W^T + (hidden A^T) B^T = hidden (W + B A)^T, in value and in every gradient."""
    hidden, weight, bias, targets = inputs()
    down, up = torch.randn(3, 8, dtype=torch.float64, requires_grad=True), torch.randn(37, 3, dtype=torch.float64, requires_grad=True)
    weight, learned = weight.detach(), (hidden, down, up, bias)
    got = token_logprobs(hidden, weight, targets, bias=bias, low_rank=(hidden @ down.T, up), chunk=chunk, **options)
    dense = token_logprobs(hidden, weight + up @ down, targets, bias=bias, **options)
    for a, b in zip((t for t in got if t is not None), (t for t in dense if t is not None), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    losses = [t.logprobs.sin().sum() + (0 if t.entropy is None else t.entropy.cos().sum()) for t in (got, dense)]
    for a, b in zip(grad(losses[0], learned), grad(losses[1], learned), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("frozen", [False, True])
def test_bfloat16_is_normalised_in_float32(frozen):
    hidden, weight, _, targets = inputs(n=40, h=32, v=300, dtype=torch.float32)
    low = [t.detach().bfloat16().requires_grad_(not frozen or k == 0) for k, t in enumerate((hidden, weight))]
    got = token_logprobs(*low, targets, chunk=7)
    exact = token_logprobs(*(t.detach().float().requires_grad_(t.requires_grad) for t in low), targets)
    assert got.logprobs.dtype == torch.float32
    torch.testing.assert_close(got.logprobs, exact.logprobs, rtol=0.01, atol=0.1)
    for g in grad(got.logprobs.sum(), [t for t in low if t.requires_grad]):
        assert g.dtype == torch.bfloat16 and g.isfinite().all()


def test_autocast_reaches_the_matrix_products_and_gradients_come_back_in_float32():
    hidden, weight, _, targets = inputs(n=9, h=16, v=50, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = token_logprobs(hidden, weight, targets, chunk=4).logprobs
    low = token_logprobs(hidden.bfloat16(), weight.bfloat16(), targets, chunk=4).logprobs
    assert torch.equal(got, low) and got.dtype == torch.float32
    assert [g.dtype for g in grad(got.sum(), [hidden, weight])] == [torch.float32] * 2


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
def test_no_tensor_of_all_logits_exists(entropy, frozen):
    """64 tokens x 1000 words by 4 at a time: nothing larger than 4 x 1000, which the head's gradient is too."""
    hidden, weight, _, targets = inputs(n=64, h=4, v=1000, dtype=torch.float32)
    weight = weight.detach() if frozen else weight
    with Largest() as chunked:
        got = token_logprobs(hidden, weight, targets, entropy=entropy, chunk=4)
        (got.logprobs + (got.entropy if entropy else 0)).sum().backward()
    assert chunked.elements == 4000
    with Largest() as plain:
        token_logprobs(hidden, weight, targets)
    assert plain.elements == 64_000


def test_chunks_begin_where_memory_would_hurt(monkeypatch):
    hidden, weight, _, targets = inputs(n=64, h=4, v=1000, dtype=torch.float32)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", {"cpu": 5000, "other": 1})
    with Largest() as largest, torch.no_grad():
        token_logprobs(hidden, weight, targets)
    assert largest.elements == 5000
    assert token_logprobs(hidden[:0], weight, targets[:0], chunk=3).logprobs.shape == (0,)


WORDS = {"temperature": "temperature", "softcap": "softcap", "scale": "logit_scale"}


@pytest.mark.golden
@pytest.mark.parametrize("chunk", [None, 4])
def test_trl_golden(golden_dir, chunk):
    data, meta = load_llm(golden_dir, "trl_chunked_logprob")
    assert meta["cases"]
    for case, words in meta["cases"].items():
        found = {name: re.search(word + r" ([\d.]+)", words) for name, word in WORDS.items()}
        options = {name: float(match[1]) for name, match in found.items() if match}
        leaves = [data[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
        got = token_logprobs(*leaves[:2], data["targets"], bias=leaves[2], entropy=True, chunk=chunk, **options)
        for name, theirs in {"logprobs": "log_probs", "entropy": "entropy"}.items():
            assert_close(getattr(got, name), data[f"{case}.{theirs}"], what=f"{case} {name}")
        loss = (got.logprobs * data["grad_logprobs"]).sum() + (got.entropy * data["grad_entropy"]).sum()
        for name, gradient in zip(("hidden", "weight", "bias"), grad(loss, leaves), strict=True):
            assert_close(gradient, data[f"{case}.grad_{name}"], what=f"{case} {name}")


@pytest.mark.golden
def test_verl_golden(golden_dir):
    """Logits themselves: the identity is the head."""
    data, _ = load_llm(golden_dir, "verl_misc")
    logits, labels = data["logits"].flatten(0, 1), data["labels"].flatten()
    for chunk in (None, 5):
        got = token_logprobs(logits, torch.eye(logits.shape[1]), labels, entropy=True, chunk=chunk)
        for name in ("logprobs_v2", "logprobs_naive"):
            assert_close(got.logprobs, data[name].flatten())
        assert_close(got.entropy, data["entropy_from_logits"].flatten())


LINEAR = [{}, {"temperature": 0.7}, {"scale": 0.5, "softcap": 3.0}]


@pytest.mark.parametrize("options", LINEAR, ids=str)
@pytest.mark.parametrize("factor", [1.0, -3.5])
@pytest.mark.parametrize("adapter", [False, True])
def test_gradients_of_a_linear_loss_are_made_in_forward(options, factor, adapter):
    """Weights of both signs, one of 0: sum_i w_i logprob_i times a factor that is known only later."""
    hidden, weight, bias, targets = inputs()
    g = torch.Generator().manual_seed(1)
    weights = torch.randn(len(targets), generator=g, dtype=torch.float64).index_fill(0, torch.tensor([2]), 0.0)
    low, up = (torch.randn(n, 3, generator=g, dtype=torch.float64).requires_grad_() for n in (len(hidden), len(weight)))
    given = {"bias": bias, "low_rank": (low, up) if adapter else None, **options}
    leaves = [hidden, weight, bias, *([low, up] if adapter else [])]
    plain = token_logprobs(hidden, weight, targets, **given, chunk=100).logprobs
    ahead = token_logprobs(hidden, weight, targets, **given, chunk=4, arriving=weights).logprobs
    assert torch.allclose(ahead, plain, rtol=1e-12)
    for got, expected in zip(grad((ahead * weights).sum() * factor, leaves), grad((plain * weights).sum() * factor, leaves), strict=True):
        assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12)


def test_another_gradient_than_the_one_that_was_named_is_refused():
    hidden, weight, _, targets = inputs()
    ahead = token_logprobs(hidden, weight, targets, chunk=4, arriving=torch.ones(len(targets), dtype=torch.float64)).logprobs
    with pytest.raises(RuntimeError, match="no multiple of `arriving`"):
        (ahead**2).sum().backward()


def test_no_logits_are_made_again_for_a_linear_loss():
    """Products with the vocabulary: logits, hidden's gradient and the head's in each of three chunks, and none in backward."""
    hidden, weight, _, targets = inputs()
    weights = torch.ones(len(targets), dtype=torch.float64)

    def products(arriving: torch.Tensor | None) -> int:
        with Products() as seen:
            token_logprobs(hidden, weight, targets, chunk=4, arriving=arriving).logprobs.sum().backward()
        return seen.count

    assert (products(weights), products(None)) == (9, 12)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_")
        return func(*args, **(kwargs or {}))
