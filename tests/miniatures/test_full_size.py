"""Counted on the meta device; the building itself is tested with the same code and thinner parts."""

from pathlib import Path

import pytest
import torch

from lit_rl.miniatures import full_size
from lit_rl.policies.diffusers_flow import DiffusersFlowPolicy
from lit_rl.policies.flux import FluxPolicy
from lit_rl.policies.sd3 import SD3Policy


def test_parameters_are_those_of_the_published_weights() -> None:
    """FLUX.1-dev: 11,901,408,320, the weights' own metadata say. SD3.5-M stores 2.47 B numbers, 384^2 x 1536 of them positions."""
    flux, sd35 = full_size.parameter_counts("flux_dev"), full_size.parameter_counts("sd35_medium")
    assert flux == {"transformer": 11_901_408_320, "vae": 83_819_683, "text_encoder": 123_060_480, "text_encoder_2": 4_762_310_656}
    assert sd35["text_encoder"] == 123_650_304 and sd35["text_encoder_2"] == 694_659_840
    assert sd35["text_encoder_3"] == flux["text_encoder_2"] and sd35["vae"] == flux["vae"]
    assert round((sd35["transformer"] + 384**2 * 1536) / 1e9, 2) == 2.47


def test_without_its_three_novelties_sd35_medium_is_sd3_medium(monkeypatch: pytest.MonkeyPatch) -> None:
    """SD3-Medium, 2,028,328,000 parameters: no second attention, no normalised queries and keys, half the positions."""
    for key, value in {"dual_attention_layers": (), "qk_norm": None, "pos_embed_max_size": 192}.items():
        monkeypatch.setitem(full_size.SD35_MEDIUM, key, value)
    assert full_size.parameter_counts("sd35_medium")["transformer"] == 2_028_328_000


def test_small_text_encoders_feed_the_same_transformer() -> None:
    for model in ("sd35_medium", "flux_dev"):
        small, full = full_size.parameter_counts(model, text_encoders="small"), full_size.parameter_counts(model)
        assert small["transformer"] == full["transformer"]
        assert all(small[name] < full[name] / 10 for name in full if name.startswith("text"))


@pytest.mark.parametrize("family", ["sd35_medium", "flux_dev"])
def test_what_is_built_is_a_pipeline_that_its_policy_runs(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        full_size,
        "SD35_MEDIUM",
        full_size.SD35_MEDIUM | {"num_layers": 1, "num_attention_heads": 1, "caption_projection_dim": 64, "pos_embed_max_size": 8},
    )
    monkeypatch.setattr(full_size, "FLUX_DEV", full_size.FLUX_DEV | {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1})
    monkeypatch.setattr(full_size, "VAE", full_size.VAE | {"block_out_channels": (32,) * 4, "layers_per_block": 1})
    built = {"sd35_medium": full_size.build_sd35_medium, "flux_dev": full_size.build_flux_dev}[family]
    family_policy: type[DiffusersFlowPolicy] = {"sd35_medium": SD3Policy, "flux_dev": FluxPolicy}[family]
    policy = family_policy(str(built(tmp_path / family)), resolution=32, max_sequence_length=16)
    policy.load()
    cond = policy.encode(["a cat"])
    x = torch.randn(1, *policy.latent_shape())
    assert policy.velocity(x, torch.tensor([0.5]), cond).shape == x.shape
    assert policy.decode(x).shape == (1, 3, 32, 32)
    assert torch.get_default_dtype() == torch.float32


def test_same_seed_same_weights() -> None:
    def drawn(seed: int) -> torch.Tensor:
        with full_size._drawing("bfloat16", "cpu", seed):
            return torch.nn.Linear(4, 4).weight

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2)) and drawn(1).dtype == torch.bfloat16
