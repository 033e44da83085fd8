"""Supervised losses."""

import pytest
import torch
from golden_numbers import assert_close, load_llm
from torch.autograd import grad

from lit_rl.credit.weights import token_weights
from lit_rl.losses.supervised import dft_loss, nll_loss


def test_dft_gradient_is_that_of_the_probability():
    """d(-sg(p) log p) = -dp: what p itself would move."""
    logprobs = torch.tensor([-0.1, -3.0], dtype=torch.float64).requires_grad_()
    torch.testing.assert_close(grad(dft_loss(logprobs).sum(), logprobs)[0], -logprobs.detach().exp())


@pytest.mark.golden
def test_losses_golden(golden_dir):
    data, _ = load_llm(golden_dir, "trl_chunked_logprob")
    weights = token_weights(data["sft.mask"].bool(), "token-mean")
    for name, function in (("nll", nll_loss), ("dft", dft_loss)):
        logprobs = data["sft.log_probs"].clone().requires_grad_()
        loss = (function(logprobs) * weights).sum()
        assert_close(loss, data[f"sft.{name}.loss"])
        assert_close(grad(loss, logprobs)[0], data[f"sft.{name}.grad"])
