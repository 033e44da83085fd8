"""Miniature language models whose next tokens depend on what was read, and requests for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lit_rl.miniatures.lm import Family, build_lm
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.rollouts.base import Request, RolloutEngine, Sample

PROMPTS = ["a", "hello world", "abc", "the quick brown fox jumps"]


def policy_of(
    folder: Path, family: Family = "qwen2", *, lora: LoraSettings | None = None, dtype: str = "float32", **sizes: Any
) -> CausalLM:
    build_lm(folder, family=family, **sizes)
    policy = CausalLM(str(folder), lora=lora, dtype=dtype)  # type: ignore[arg-type]
    policy.load()
    policy.eval()
    roughen(policy.network.lm)
    policy.stop_ids = [policy.tokenizer.eos_token_id, *range(10, 14)]  # type: ignore[misc]  # so that some answers end early
    return policy


@torch.no_grad()
def roughen(lm: Any) -> None:
    """Initial weights are so small that no layer matters, their biases 0 and their norms 1: nothing that is left out would be seen."""
    drawn = torch.Generator().manual_seed(1)
    for name, parameter in lm.named_parameters():
        if parameter.ndim == 1:
            parameter += 0.3 * torch.randn(parameter.shape, generator=drawn)
        elif ".lora_" in name:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=drawn))
        elif "embed" not in name:
            parameter *= 5


def requests(policy: CausalLM, group: int = 3, seed: int = 0) -> list[Request]:
    """`group` siblings of each prompt, some of which are asked again later."""
    asked = [text for text in [*PROMPTS, PROMPTS[1]] for _ in range(group)]
    return [Request(policy.encode(text), (seed, i)) for i, text in enumerate(asked)]


def ready(engine: RolloutEngine, policy: CausalLM) -> Any:
    engine.setup(policy, rank=0, world_size=1)
    return engine


@torch.no_grad()
def recomputed(policy: CausalLM, request: Request, sample: Sample, temperature: float) -> list[float]:
    """The trainer's log-probabilities of an answer."""
    tokens = torch.tensor([[*request.prompt, *sample.ids]])
    mask = torch.arange(tokens.shape[1] - 1)[None] >= len(request.prompt) - 1
    values, _ = policy.logprobs(tokens, torch.tensor([tokens.shape[1]]), mask, temperature=temperature)
    return values[mask].tolist()


def farthest(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b)
    return max(abs(x - y) for x, y in zip(a, b))
