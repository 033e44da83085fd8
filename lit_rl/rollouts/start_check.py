"""Checks on a few tokens that training computes the log-probabilities of the model's logits, and that the sampler reports the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.policies.base import TokenPolicy
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.policies.sizes import positions
from lit_rl.policies.weights.shards import part, reshard
from lit_rl.ranks import gather_objects
from lit_rl.rollouts.base import Request, RolloutEngine, Sample, Sampling
from lit_rl.rollouts.hf import HFEngine
from lit_rl.rollouts.native import NativeEngine
from lit_rl.seeding import generator

TEXT = "Question: what is 12 + 34? Answer: 46."
TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.02}
EXACT = 2e-3
"""Difference of log-probabilities that is still rounding, by the coarsest precision; of float32 and float64."""
NEW_TOKENS = 4
SEEN = 1e-5
"""Difference in float32 that another sequence makes, its length unchanged: a model that does not see it computes the same numbers."""
MINGLES = (
    "it does not keep apart the sequences that model.policy.padding_free=true puts side by side in one row (it has a state, a "
    "convolution, or positions that do not begin again): set model.policy.padding_free to false"
)


Row = tuple[Tensor, Sequence[Tensor]]
"""Tokens Int "T", and the media among them."""


def check_logprobs(policy: CausalLM, *, world_size: int, coarsest: torch.dtype | None = None) -> None:
    """Raise ConfigError unless `policy.logprobs` are those of the model's plain forward. Collective: a few short forwards.

    Adapters are made to matter for it and put back bit for bit; no random stream moves. coarsest: a precision that weights travel in.
    """
    rows = sequences(policy)
    limit = tolerance(policy, coarsest)
    with evaluating(policy), adapters_that_matter(policy):

        def gap(**how: bool) -> float:
            return max(gather_objects(_gap(policy, rows, **how)))

        wrong = gap(packed=policy.padding_free)
        if wrong <= limit:
            if policy.padding_free:
                _check_apart(policy, rows, limit=limit, world_size=world_size)
            return
        raise ConfigError(
            f"{_name(policy)}: the log-probabilities that training computes are {wrong:.3g} from those of the model's "
            f"own logits, more than rounding ({limit:g}): {_cause(policy, gap, limit)}"
        )


def _check_apart(policy: CausalLM, rows: Sequence[Row], *, limit: float, world_size: int) -> None:
    """Raise ConfigError where the second of two rows side by side changes with the words of the first.

    Weights as a model is begun with are so small that what is seen of them may pass for rounding; training makes it larger.
    """
    other = torch.full_like(rows[0][0], int(rows[0][0][0]))
    before, after = (_trained(policy, [first, rows[1]])[1] for first in (rows[0], (other, ())))
    exact = limit == EXACT
    moved = max(gather_objects(float((after - before).abs().max()) if exact else typical(after - before)))
    if moved > (SEEN if exact else limit):
        raise ConfigError(f"{_name(policy)}: the words of one sequence move the log-probabilities of another by {moved:.3g}: {MINGLES}")


def _cause(policy: CausalLM, gap: Callable[..., float], limit: float) -> str:
    if policy.padding_free and gap(packed=False) <= limit:
        return MINGLES
    if gap(packed=False, alone=True) <= limit:
        return "padding on the right changes what stands before it: its attention is not causal, so it cannot be trained here"
    if policy.lora:
        with policy.reference():
            if gap(packed=False) <= limit:
                return "an adapter has no part in one of them: leave its layer out of model.policy.lora.targets"
    return (
        "its forward computes logits of more than each token's last hidden state, or draws random numbers in evaluation mode: "
        "such a model cannot be trained here"
    )


def _gap(policy: CausalLM, rows: Sequence[Row], *, packed: bool, alone: bool = False) -> float:
    """The largest over the rows of their typical difference; infinity where a number is missing."""
    parts = [[row] for row in rows] if alone else [list(rows)]
    configured, policy.padding_free = policy.padding_free, packed
    try:
        found = [values for some in parts for values in _trained(policy, some)]
    finally:
        policy.padding_free = configured
    return max(typical(values - policy.plain_logprobs(*row)) for values, row in zip(found, rows, strict=True))


def _trained(policy: CausalLM, rows: Sequence[Row], temperature: float = 1.0) -> list[Tensor]:
    lengths = torch.tensor([len(row) for row, _ in rows], device=policy.device)
    tokens = torch.nn.utils.rnn.pad_sequence([row for row, _ in rows], batch_first=True)
    mask = torch.arange(tokens.shape[1] - 1, device=policy.device) < (lengths - 1)[:, None]
    found, _ = policy.logprobs(tokens, lengths, mask, media=[media for _, media in rows], temperature=temperature)
    return [values[: len(row) - 1] for values, (row, _) in zip(found, rows)]


def typical(difference: Tensor) -> float:
    """The median: in 16 bits a router may send a single token elsewhere. Infinity where a number is missing."""
    return float(difference.abs().float().nan_to_num(torch.inf, torch.inf).quantile(0.5)) if len(difference) else 0.0


# ---------------------------------------------------------------------- the sampler
def check_sampler(
    policy: CausalLM, engine: RolloutEngine, sampling: Sampling, *, world_size: int, autocast: AbstractContextManager[object] | None = None
) -> None:
    """Raise ConfigError unless an engine over the training weights reports the trainer's log-probabilities of its answers. Collective.

    Where padding on the left is what makes the difference, `HFEngine` is told to do without.
    """
    ids = token_ids(policy)
    most = positions(policy.network.lm.config)
    prompts = [ids[: min(len(ids), 7, max(1, (most or 64) - NEW_TOKENS))], ids[:3]]
    few = replace(sampling, max_new_tokens=min(NEW_TOKENS, sampling.max_new_tokens))
    limit = tolerance(policy, torch.get_autocast_dtype(policy.device.type) if autocast is not None else None)
    first, media = policy.trial(prompts[0])
    requests = [Request(first, ("start check", 0), media), Request(prompts[1], ("start check", 1))]
    with evaluating(policy, autocast), adapters_that_matter(policy):

        def gap(*batches: list[Request]) -> float:
            told = [_compared(policy, batch, engine.generate(batch, few), few.temperature) for batch in batches]
            return max(gather_objects(max(told)))

        wrong = gap(requests)
        if wrong <= limit:
            return
        if isinstance(engine, NativeEngine) and engine.cuda_graphs:
            engine.cuda_graphs = False
            if gap(requests) <= limit:
                raise ConfigError(
                    f"{_name(policy)}: steps of decoding that are replayed as CUDA graphs give log-probabilities {wrong:.3g} from those "
                    f"that training computes, more than rounding ({limit:g}), and the same steps without graphs do not: set "
                    "model.answers.engine.cuda_graphs to false"
                )
        stock = getattr(engine, "fallback", None) or engine
        if isinstance(stock, HFEngine):
            if gap(*([request, replace(request, key=("sibling", *request.key))] for request in requests)) <= limit:
                rank_zero_info(f"{_name(policy)} does not see past padding: only prompts of one length are answered together")
                stock.one_length = True
                return
            if gap(*([request] for request in requests)) <= limit:
                rank_zero_info(f"{_name(policy)} confuses the rows of a batch as it generates: prompts are answered one by one")
                stock.batch = 1
                return
    raise ConfigError(
        f"{_name(policy)}: the log-probabilities that {type(engine).__name__} samples with are {wrong:.3g} from those that training "
        f"computes, more than rounding ({limit:g}): with its cache the model computes something else than without. Set "
        "model.answers.engine to lit_rl.rollouts.http.HTTPEngine, or take another model"
    )


def _name(policy: CausalLM) -> str:
    return type(policy.network.lm).__name__


def _compared(policy: CausalLM, requests: Sequence[Request], samples: Sequence[Sample], temperature: float) -> float:
    rows = [(torch.tensor([*r.prompt, *s.ids], device=policy.device), r.media) for r, s in zip(requests, samples)]
    found = _trained(policy, rows, temperature or 1.0)
    gaps = [typical(values[-len(s.ids) :] - torch.tensor(s.logprobs, device=values.device)) for values, s in zip(found, samples)]
    return max(gaps)


# ---------------------------------------------------------------------- what it is tried with
def token_ids(policy: CausalLM) -> list[int]:
    """At least 12 ids, of plain words where the tokenizer has them, and none that stands for a picture."""
    words = [i for i in policy.encode(TEXT) if i < vocabulary(policy)]
    others = [i for i in range(3, vocabulary(policy)) if i not in policy.banned_ids] or [0]
    return words if len(words) >= 12 else [others[i % len(others)] for i in range(12)]


def vocabulary(policy: CausalLM) -> int:
    lm = policy.network.lm
    return int(lm.config.get_text_config().vocab_size)


def sequences(policy: CausalLM) -> list[Row]:
    """Two rows of different lengths, within the positions that the model has; the first with a picture where the model reads them."""
    ids, most = token_ids(policy), positions(policy.network.lm.config) or 64
    first, media = policy.trial(ids[:8])
    rows: list[tuple[list[int], Sequence[Tensor]]] = [(first, media), (ids[2:7], ())]
    return [(torch.tensor(row if seen else row[:most], device=policy.device), seen) for row, seen in rows]


def tolerance(policy: CausalLM, coarsest: torch.dtype | None) -> float:
    dtypes = {p.dtype for p in policy.network.parameters()} | {coarsest}
    return max(TOLERANCE.get(dtype, EXACT) for dtype in dtypes if dtype is not None)


@contextmanager
def evaluating(policy: CausalLM, context: AbstractContextManager[object] | None = None) -> Iterator[None]:
    """Evaluation mode, without gradients; modes and random streams are afterwards what they were. context: instead of full precision."""
    modes = {module: module.training for module in policy.modules()}
    devices = [policy.device] if policy.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices), context or torch.autocast(policy.device.type, enabled=False):
        policy.eval()
        try:
            yield
        finally:
            reshard(policy)
            for module, mode in modes.items():
                module.training = mode


@contextmanager
def adapters_that_matter(policy: TokenPolicy, *, within: str = "") -> Iterator[None]:
    """Adapters begin at 0, where one that is left out would not be seen: inside it they are not. Put back bit for bit.

    within: A part of the names of layers whose adapters these are; default: of all.
    """
    reshard(policy)
    kept = {name: part(p).clone() for name, p in policy.trainable() if ".lora_B." in name and within in name}
    draws = generator("start check")
    try:
        for name, parameter in policy.trainable():
            if name in kept:
                part(parameter).copy_(0.02 * torch.randn(kept[name].shape, generator=draws))
        torch.clear_autocast_cache()
        yield
    finally:
        reshard(policy)
        for name, parameter in policy.trainable():
            if name in kept:
                part(parameter).copy_(kept[name])
        torch.clear_autocast_cache()
