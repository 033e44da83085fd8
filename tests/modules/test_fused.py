"""The step of an optimizer in one kernel, which is the choice on a GPU, is the step that a CPU makes otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adam, AdamW, Optimizer

from lit_rl.modules.optimization import configured, use_fused

Make = Callable[[Any], Optimizer]


def trained(make: Make, *, fused: bool) -> list[Tensor]:
    """Weights after six steps on gradients of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((7, 5), (5,), (1, 3, 2))]
    optimizer = make(weights)
    if fused:
        use_fused(optimizer, device="cpu")
        assert all(group["fused"] for group in optimizer.param_groups)
    for step in range(6):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator) * 10.0 ** (step - 4)
        optimizer.step()
    return [weight.detach() for weight in weights]


@pytest.mark.parametrize(
    "make",
    [
        lambda weights: AdamW(weights, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1),
        lambda weights: AdamW([{"params": weights[:1], "lr": 3e-2}, {"params": weights[1:]}], lr=1e-2, amsgrad=True),
        lambda weights: Adam(weights, lr=1e-2),
        lambda weights: SGD(weights, lr=1e-2, momentum=0.9),
    ],
)
def test_a_fused_step_is_the_same_step(make: Make) -> None:
    before, after = trained(make, fused=False), trained(make, fused=True)
    torch.testing.assert_close(after, before, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("options", [{"fused": False}, {"foreach": False}, {"foreach": True}, {"differentiable": True}])
def test_what_a_run_says_stays(options: dict[str, bool]) -> None:
    optimizer = AdamW([nn.Parameter(torch.zeros(2))], **options)  # type: ignore[arg-type]
    before = dict(optimizer.param_groups[0])
    use_fused(optimizer, device="cpu")
    assert optimizer.param_groups[0] == before


def test_weights_elsewhere_and_optimizers_without_it_stay() -> None:
    adam = AdamW([nn.Parameter(torch.zeros(2))])
    configured(adam, None, None)  # of a CPU
    mixed = AdamW([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, device="meta"))])
    use_fused(mixed, device="meta")
    assert adam.param_groups[0]["fused"] is None and mixed.param_groups[0]["fused"] is None
    other = Adafactor([nn.Parameter(torch.zeros(2))])
    use_fused(other, device="cpu")
    assert "fused" not in other.param_groups[0]
