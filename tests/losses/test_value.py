"""The critic's loss."""

import pytest
import torch
from golden_numbers import assert_close, load_llm
from torch.autograd import grad

from lit_rl.credit.weights import token_weights
from lit_rl.losses.value import clipped_share, value_loss


def test_clipping_by_hand():
    """v_old = 0, clip .5, R = 1: v = .8 -> max(.2, .5)^2 / 2; v = -.8 -> max(1.8, 1.5)^2 / 2; v = .3 stays."""
    v, zero, one = torch.tensor([0.8, -0.8, 0.3]), torch.zeros(3), torch.ones(3)
    torch.testing.assert_close(value_loss(v, zero, one, clip=0.5), torch.tensor([0.125, 1.62, 0.245]))
    torch.testing.assert_close(value_loss(v, zero, one, clip=None), torch.tensor([0.02, 1.62, 0.245]))


@pytest.mark.golden
def test_value_loss_golden(golden_dir):
    data, _ = load_llm(golden_dir, "verl_misc")
    mask, returns, old = data["in.mask"].bool(), data["value.returns"], data["in.values"]
    keys = [key.removesuffix(".loss") for key in data if key.startswith("value.clip") and key.endswith(".loss")]
    assert keys
    for key in keys:
        clip, mode = key.removeprefix("value.clip").rsplit(".", 1)
        values = data["value.vpreds"].clone().requires_grad_()
        loss = (value_loss(values, old, returns, clip=float(clip)) * token_weights(mask, mode)).sum()
        assert_close(loss, data[f"{key}.loss"], what=key)
        assert_close(grad(loss, values)[0], data[f"{key}.grad"], what=key)
        assert_close(clipped_share(values, old, returns, mask, clip=float(clip)), data[f"{key}.clipfrac"])


@pytest.mark.golden
def test_value_loss_of_other_frameworks(golden_dir):
    data, _ = load_llm(golden_dir, "openrlhf_slime_torchtune")
    mask = data["in.mask"].bool()
    for key in (k for k in data if k.startswith("openrlhf.value.clip")):
        clip = key.removeprefix("openrlhf.value.clip")
        loss = value_loss(data["in.vpreds"], data["in.values"], data["in.returns"], clip=None if clip == "None" else float(clip))
        assert_close((loss * token_weights(mask, "token-mean")).sum(), data[key], what=key)


@pytest.mark.golden
def test_areal_critic(golden_dir):
    """Its Huber loss is the square for errors this small."""
    data, _ = load_llm(golden_dir, "areal_decoupled_ppo")
    mask = data["in.loss_mask"].bool()
    for kind in ("mse", "huber"):
        values = data["critic.value"].clone().requires_grad_()
        loss = (value_loss(values, data["critic.old_value"], data["critic.target"], clip=0.3) * token_weights(mask, "token-mean")).sum()
        assert_close(loss, data[f"critic.{kind}.loss"])
        assert_close(grad(loss, values)[0], data[f"critic.{kind}.grad"])
