"""Phases of an iteration, computed on imagined tensors: what a rollout, a training step and an update hold beside what is always there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lit_rl.doctor.conditioners import answering, hand_out_states, learned_conditions, masks_of, reading
from lit_rl.doctor.ledger import Ledger, imagine, imagined, mixed
from lit_rl.doctor.placement import Line, Placement
from lit_rl.doctor.shallow import extrapolated
from lit_rl.doctor.towers import lines, looked_at, patches_at_most
from lit_rl.modules.flow import LitFlow
from lit_rl.modules.tokens import LitTokens
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.policies.critic import Critic
from lit_rl.policies.deepgen import DeepGenPolicy
from lit_rl.policies.diffusers_flow import DiffusersFlowPolicy
from lit_rl.policies.language_model import TokenNetwork
from lit_rl.policies.vision_language import VisionLanguageModel
from lit_rl.rollouts.answers import Answers
from lit_rl.rollouts.decoder import Decoder, unsupported
from lit_rl.rollouts.graphs import BUCKET
from lit_rl.rollouts.hf import HFEngine
from lit_rl.rollouts.native import NativeEngine
from lit_rl.rollouts.room import need_of

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "style_encoder", "conditioner")
Blocks = Mapping[nn.Module, Sequence[nn.Module]]


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of the longest prompt, of the longest row that is trained, and of those of its tokens that count in the loss."""

    prompt: int
    row: int
    trained: int


def freed(networks: Blocks) -> None:
    """Let go of each gradient as soon as it is there: gradients are counted on their own."""
    for parameter in (p for network in networks for p in network.parameters() if p.requires_grad):
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))


def prepared(networks: Blocks, placement: Placement) -> None:
    """Give networks imagined weights in the precision in which they are used."""
    imagine(networks, dtype=placement.computes_in)
    freed(networks)


# ---------------------------------------------------------------------- tokens
def micro_batch_rows(method: LitTokens, placement: Placement, lengths: Lengths) -> int:
    """Rows of a micro-batch on a process, where all are the longest."""
    answers = -(-method.prompts_per_update // placement.processes) * method.group_size
    parts = placement.accumulate
    if method.micro_batch_tokens is not None:
        fit = max(1, method.micro_batch_tokens // lengths.row // method.unit_size) * method.unit_size
        parts = max(parts, -(-answers // fit))
    return max(method.unit_size, -(-answers // parts))


def of_tokens(method: LitTokens, critic: Critic | None, networks: Blocks, placement: Placement, lengths: Lengths) -> Iterator[Line]:
    """Training on micro-batches of the longest rows, and answers by an engine in this process."""
    rows = micro_batch_rows(method, placement, lengths)
    with imagined(gpu=placement.gpu):
        prepared(networks, placement)
        (activations,) = extrapolated(networks, lambda: [_trained_tokens(method, critic, rows, lengths, placement.autocast)])
    yield Line(f"activations of {rows} x {lengths.row} tokens", activations, "training")
    if isinstance(method.policy, VisionLanguageModel):
        patches = patches_at_most(method.policy, lengths.prompt or lengths.row)
        network = method.policy.network
        with imagined(gpu=placement.gpu):
            prepared(networks, placement)
            held, peak = extrapolated(networks, lambda: looked_at(network, rows, patches, placement.autocast))
        yield from lines(held, peak, what=f"{rows} pictures of {patches} patches", activations=activations)
    here = -(-method.prompts_per_iteration * method.group_size // placement.processes)
    yield Line("rollout", here * lengths.row * (8 + 1 + 4 * 5))
    if method.answers is not None and lengths.prompt and isinstance(method.policy, CausalLM):
        yield from _answers(method, method.answers, method.policy.network, networks, placement, lengths)


def _trained_tokens(method: LitTokens, critic: Critic | None, rows: int, lengths: Lengths, lower: torch.dtype | None) -> float:
    tokens = torch.zeros(rows, lengths.row - 1, dtype=torch.long)
    places = torch.zeros(rows * lengths.trained, dtype=torch.long)
    look = bool(getattr(method, "entropy_coef", 0))
    with Ledger() as ledger:
        with mixed(lower):
            new, entropy = method.policy.network(tokens, places, places, positions=None, temperature=1.0, entropy=look)
            loss = new.sum() if entropy is None else new.sum() + entropy.sum()
            if critic is not None:
                loss = loss + critic.network(tokens, places).sum()
        torch.autograd.backward(loss)
    return ledger.peak


def _answers(
    method: LitTokens, answers: Answers, network: TokenNetwork, networks: Blocks, placement: Placement, lengths: Lengths
) -> Iterator[Line]:
    engine, chunk = answers.engine, answers.chunk
    if not isinstance(engine, NativeEngine | HFEngine):
        return
    config = network.lm.config.get_text_config()
    longest = lengths.prompt + answers.sampling.max_new_tokens
    # An engine that looks for memory itself has as many rows as fit: these make it quick.
    limit = (isinstance(engine, NativeEngine) and engine.max_batch_tokens) or 131072
    rows = max(1, min(engine.batch or 64, limit // longest, chunk))
    prompts = max(1, min(-(-chunk // method.group_size), rows))
    kept = next(p.dtype for p in network.lm.get_input_embeddings().parameters())
    precision = placement.autocast or placement.whole or kept
    need = need_of(config, precision)
    yield Line(f"keys and values of {rows} x {longest} tokens", rows * longest * need.token, "rollout")
    if isinstance(engine, HFEngine) or unsupported(network.lm):
        return
    own: Blocks = {network: networks[network]}
    with imagined(gpu=placement.gpu):
        imagine(own, dtype=placement.whole)
        asked = [[0] * lengths.prompt] * prompts
        copies, forward, step = extrapolated(own, lambda: _decoder(network.lm, asked, placement, rows=rows, columns=longest - 1))
    yield Line("the sampler's copies of weights", copies, "rollout")
    logits = rows * config.vocab_size * 4 * 3
    yield Line("reading prompts and drawing tokens", max(forward, logits), "rollout")
    if isinstance(engine, NativeEngine) and engine.cuda_graphs:
        yield Line("steps of decoding as CUDA graphs", step + (-(-longest // BUCKET) - 1) * rows * config.vocab_size * 4, "rollout")


@torch.no_grad()
def _decoder(lm: object, prompts: Sequence[Sequence[int]], placement: Placement, *, rows: int, columns: int) -> list[float]:
    """Bytes of the decoder's copies of weights, of reading prompts, and of one step of so many rows over so many columns."""

    def copied(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.detach().to(dtype, copy=placement.cuts_weights)

    with patch("lit_rl.rollouts.decoder.readable", copied), patch("lit_rl.rollouts.fused.readable", copied), Ledger() as ledger:
        with mixed(placement.autocast):
            decoder = Decoder(lm)
        ledger.peak = copies = ledger.now
        cache = decoder.cache(rows=len(prompts), columns=len(prompts[0]), places=0, prompt=0)
        decoder.prefill(prompts, range(len(prompts)), cache)
        reading = ledger.peak - copies
        del cache
        tokens, cache = torch.zeros(rows, dtype=torch.long), decoder.cache(rows=rows, columns=columns, places=0, prompt=1)
        cache.reserve(columns)
        ledger.peak = before = ledger.now
        decoder.step(tokens, tokens, cache, None, newest=columns - 1, columns=tokens)
    return [copies, reading, ledger.peak - before]


# ---------------------------------------------------------------------- pictures
def pairs_at_once(method: LitFlow, placement: Placement) -> int:
    """(sample, step) pairs of a forward in training."""
    here = -(-method.prompts_per_iteration // placement.processes) * method.group_size * method.most_trained_steps()
    pairs = -(-here // method.updates)
    cut = -(-pairs // placement.accumulate)
    return min(cut, method.train_micro_batch or cut)


def of_pictures(method: LitFlow, policy: DiffusersFlowPolicy, networks: Blocks, placement: Placement) -> Iterator[Line]:
    """Denoising, decoding and encoding in a rollout, and training on pairs."""
    pairs, images, lower = pairs_at_once(method, placement), method.rollout_micro_batch, placement.autocast
    prompts = -(-method.prompts_per_iteration // placement.processes)
    with imagined(gpu=placement.gpu):
        prepared(networks, placement)
        if isinstance(policy, DeepGenPolicy) and policy.trains_condition:
            hand_out_states(policy.conditioner)
        training, sampling = extrapolated(
            answering(networks),
            lambda: [_trained_pairs(method, policy, pairs, lower, prompts=min(pairs, prompts)), _velocity(policy, images, lower)],
        )
    with imagined(gpu=placement.gpu):
        vae = policy._pipe.vae
        imagine([vae])
        decoding = _decoded(policy, images)
    yield Line(f"activations of {pairs} pairs", training, "training")
    yield Line(f"denoising {images} images", sampling, "rollout")
    yield Line(f"decoding {min(images, policy.vae_slice)} images", decoding, "decoding")
    if isinstance(policy, DeepGenPolicy):
        at_once, precision = (prompts, lower) if policy.trains_condition else (1, None)
        yield Line(f"reading {at_once} prompts", reading(policy, at_once, gpu=placement.gpu, lower=precision), "encoding")
    yield from _frozen_parts(policy)
    yield from _kept(method, policy, placement)


def _conditions(policy: DiffusersFlowPolicy, rows: int) -> dict[str, Tensor]:
    shapes = policy.condition_shapes()
    found = {name: torch.zeros(1 if name.startswith("negative") else rows, *shape) for name, shape in shapes.items()}
    return found | (masks_of(found) if isinstance(policy, DeepGenPolicy) else {})


def _trained_pairs(method: LitFlow, policy: DiffusersFlowPolicy, pairs: int, lower: torch.dtype | None, *, prompts: int) -> float:
    with Ledger() as ledger:
        x, t = torch.zeros(pairs, *policy.latent_shape()), torch.zeros(pairs)
        with mixed(lower):
            if isinstance(policy, DeepGenPolicy) and policy.trains_condition:
                cond = learned_conditions(policy, prompts=prompts, rows=pairs)
            else:
                cond = _conditions(policy, pairs)
            v = policy.velocity(x, t, cond)
            if getattr(getattr(method, "kl", None), "coef", 0):
                with torch.no_grad(), policy.reference():
                    reference = policy.velocity(x, t, cond)
                v = v - reference
        torch.autograd.backward((v**2).sum())
    return ledger.peak


@torch.no_grad()
def _velocity(policy: DiffusersFlowPolicy, images: int, lower: torch.dtype | None) -> float:
    with Ledger() as ledger, mixed(lower):
        policy.velocity(torch.zeros(images, *policy.latent_shape()), torch.zeros(images), _conditions(policy, images))
    return ledger.peak


@torch.no_grad()
def _decoded(policy: DiffusersFlowPolicy, images: int) -> float:
    with Ledger() as ledger:  # as `FrozenParts.images`, which looks at numbers
        z, vae = policy.unpack(torch.zeros(images, *policy.latent_shape())), policy._pipe.vae
        found = [vae.decode(part.to(vae.dtype), return_dict=False)[0] for part in z.split(policy.vae_slice)]
        _ = [(image.float().nan_to_num() * 0.5 + 0.5).clamp(0, 1) * 255 for image in found]
    return ledger.peak


def _frozen_parts(policy: DiffusersFlowPolicy) -> Iterator[Line]:
    parts = [part for name in ENCODERS if (part := getattr(policy._pipe, name, None)) is not None and part not in policy.networks()]
    size = sum(p.nbytes for part in parts for p in part.parameters())
    vae = sum(p.nbytes for p in policy._pipe.vae.parameters())
    yield Line("VAE", vae, "decoding" if policy.frozen.offload_vae else "")
    yield Line("text and style encoders", size, "encoding" if policy.frozen.offload_text_encoders else "")


def _kept(method: LitFlow, policy: DiffusersFlowPolicy, placement: Placement) -> Iterator[Line]:
    prompts = -(-method.prompts_per_iteration // placement.processes)
    numbers = torch.Size(policy.latent_shape()).numel()
    steps = method.most_trained_steps()
    clean = not hasattr(method, "sde")
    points = 1 if clean else steps + 1
    means = steps * 4 if getattr(getattr(method, "surrogate", None), "needs_means", False) else 0
    latents = prompts * method.group_size * numbers * (points * method.storage_dtype.itemsize + means)
    text = sum(torch.Size(shape).numel() for name, shape in policy.condition_shapes().items() if not name.startswith("negative"))
    yield Line(f"kept latents of {prompts * method.group_size} samples", latents)
    yield Line(f"conditions of {prompts} prompts", prompts * text * policy.dtype.itemsize)
