import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_rl.miniatures.images import build_flux, build_sd3, build_siglip
from lit_rl.miniatures.pixel_vae import PixelUnshuffleVAE
from lit_rl.miniatures.text_encoders import clip_tokenizer, t5_encoder, t5_tokenizer


def images(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).float() / 127.5 - 1


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_pixel_vae_is_exactly_invertible(factor: int) -> None:
    levels = (1,) * factor.bit_length()
    vae = PixelUnshuffleVAE(image_channels=3, latent_channels=3 * factor**2, block_out_channels=levels)
    pixels = images(2, 3, 8, 16)
    latents = vae.encode(pixels).latent_dist.mode()
    assert latents.shape == (2, 3 * factor**2, 8 // factor, 16 // factor)
    assert torch.equal(vae.decode(latents).sample, pixels)


def test_pixel_vae_of_one_channel_keeps_grey_images() -> None:
    vae = PixelUnshuffleVAE(image_channels=1, latent_channels=4, block_out_channels=(1, 1))
    grey = images(2, 1, 4, 4).expand(-1, 3, -1, -1)
    torch.testing.assert_close(vae.decode(vae.encode(grey).latent_dist.mode()).sample, grey)


def test_pixel_vae_refuses_channels_that_do_not_add_up() -> None:
    with pytest.raises(ValueError, match="latent_channels=3: 1 channels unshuffled by 2 make 4"):
        PixelUnshuffleVAE(image_channels=1, latent_channels=3)


def test_every_character_is_one_token() -> None:
    text = '"4207"'
    clip, t5 = clip_tokenizer(16), t5_tokenizer()
    ids = clip(text).input_ids
    assert len(ids) == len(text) + 2 and len(set(ids)) == len(set(text)) + 2
    assert t5.convert_ids_to_tokens(t5(text).input_ids) == ["▁", *text, "</s>"]
    assert len(clip("any length of text", padding="max_length", truncation=True).input_ids) == 16


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_text_tokens_know_where_they_stand(seed: int) -> None:
    """FLUX gives its text no positions: with the same characters in another order, some token must be one that the other text lacks."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = t5_encoder(32)
    one, other = (encoder(**t5_tokenizer()(f"'{text}'.", return_tensors="pt")).last_hidden_state[0] for text in ("47", "74"))
    assert torch.cdist(one, other).min(1).values.max() > 0.25 * one.norm(dim=1).mean()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_style_features_tell_inks_apart_whatever_is_written(tmp_path: Path, seed: int) -> None:
    """A linear map, which is less than a style adapter is, learns the ink from some strokes and knows it of others."""
    from transformers import SiglipVisionModel

    encoder = SiglipVisionModel.from_pretrained(build_siglip(tmp_path / "siglip", seed=seed))
    strokes = torch.rand(120, 1, 16, 16, generator=torch.Generator().manual_seed(seed)) < 0.25
    inks = torch.tensor([[0.5, -1, -1], [-1, -0.2, -1], [-1, -1, 0.5]]).view(3, 1, 3, 1, 1)
    with torch.no_grad():
        features = encoder(pixel_values=torch.where(strokes, inks, 1.0).flatten(0, 1)).pooler_output.view(3, 120, -1)
    known, unseen = features.split([80, 40], dim=1)
    answers = torch.eye(3).repeat_interleave(80, 0)
    learned = torch.linalg.lstsq(
        torch.cat([known.flatten(0, 1), torch.eye(known.shape[-1])]), torch.cat([answers, torch.zeros(64, 3)])
    ).solution
    assert ((unseen @ learned).argmax(-1) == torch.arange(3)[:, None]).float().mean() > 0.95


def test_tokenizers_survive_the_disk(folders: dict[str, Path]) -> None:
    from transformers import CLIPTokenizer, T5Tokenizer

    for kind, name, own in ((CLIPTokenizer, "tokenizer", clip_tokenizer(16)), (T5Tokenizer, "tokenizer_3", t5_tokenizer())):
        stored = kind.from_pretrained(folders["sd3"] / name)
        for text in ('say "42"', "", "ÄÖ~ x"):
            assert stored(text).input_ids == own(text).input_ids


def test_same_seed_same_weights_whatever_was_drawn_before(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    small = {"hidden": 16, "heads": 1, "layers": 1, "text_hidden": 8, "t5_hidden": 16}
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(3)
        state = torch.get_rng_state()
        folder = build_sd3(tmp_path / name, **small, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        weights.append(load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")["proj_out.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_sizes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose multiples of 4"):
        build_sd3(tmp_path / "x", height=18)
    with pytest.raises(ValueError, match="t5_hidden=8 .* at least 128"):
        build_sd3(tmp_path / "x", t5_hidden=8)
    with pytest.raises(ValueError, match="factor=3 is not a power of 2"):
        build_flux(tmp_path / "x", factor=3, height=12, width=12)


def test_command_builds_a_folder(tmp_path: Path) -> None:
    options = ["--hidden", "16", "--heads", "1", "--layers", "1", "--height", "8", "--width", "8"]
    subprocess.run(
        [sys.executable, "-m", "lit_rl.miniatures.images", "sd3", str(tmp_path / "x"), *options], check=True, capture_output=True
    )
    assert (tmp_path / "x" / "model_index.json").is_file()
