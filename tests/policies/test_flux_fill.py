"""FLUX.1-Fill against the stock pipeline, and with an injected style."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from lit_rl.checkpoints.ip_adapter import read_ip_adapter, write_ip_adapter
from lit_rl.errors import ConfigError
from lit_rl.miniatures.images import build_flux, build_siglip
from lit_rl.policies.flux_fill import FluxFillPolicy
from lit_rl.policies.ip_adapter import adapter_names, style_attentions
from lit_rl.policies.style import StyleSettings, count_new_adapter, letterbox, strip
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.types import Cond

HEIGHT, WIDTH, TOKENS, SIDE, FEATURES = 16, 24, 8, 12, 10
PROMPTS = ['say "42"', 'say "07"']
SMALL: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "hidden": 32, "heads": 2, "layers": 1, "single_layers": 1}
SMALL |= {"text_hidden": 16, "text_length": 16, "t5_hidden": 24, "fill": True, "image_channels": 3}

MakeFill = Callable[..., FluxFillPolicy]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("fill")
    kl: dict[str, Any] = {"vae": "kl", "scaling_factor": 1.5, "shift_factor": 0.1}
    return {
        "pixel": build_flux(root / "pixel", **SMALL),
        "kl": build_flux(root / "kl", **SMALL | kl),
        "text": build_flux(root / "text", **SMALL | {"fill": False}),
        "siglip": build_siglip(root / "siglip", side=SIDE, hidden=FEATURES, layers=1),
    }


@pytest.fixture
def make_fill(places: dict[str, Path]) -> MakeFill:
    """make_fill(lora=..., style={...}) -> a loaded policy; by default it trains a style adapter."""

    def make(folder: str = "pixel", *, style: dict[str, Any] | None = {}, **settings: Any) -> FluxFillPolicy:  # noqa: B006
        chosen = None if style is None else StyleSettings(**{"encoder": str(places["siglip"]), "tokens": 3} | style)
        defaults = {"resolution": (HEIGHT, WIDTH), "max_sequence_length": TOKENS}
        torch.manual_seed(0)
        policy = FluxFillPolicy(str(places[folder]), style=chosen, **defaults | settings)
        policy.load()
        return policy

    return make


def infos(**changes: Any) -> list[dict[str, Any]]:
    """Two prompts with different images, masks and styles, the second style not square."""
    g = torch.Generator().manual_seed(1)
    rows = []
    for i, prompt in enumerate(PROMPTS):
        mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8)
        mask[4 : 11 + i, 3:17] = 255  # edges off the grid of tokens
        source = torch.randint(0, 256, (3, HEIGHT, WIDTH), generator=g, dtype=torch.uint8)
        style = torch.randint(0, 256, (3, 20, 20 + 9 * i), generator=g, dtype=torch.uint8)
        rows.append({"prompt": prompt, "source": source, "mask": mask, "reference": style} | changes)
    return rows


@torch.no_grad()
def velocity(policy: FluxFillPolicy, cond: Cond) -> Tensor:
    x = torch.randn(2, *policy.latent_shape(), generator=torch.Generator().manual_seed(2))
    return policy.velocity(x, torch.tensor([0.9, 0.4]), cond)


def train_a_little(policy: FluxFillPolicy, cond: Cond) -> None:
    x = torch.randn(2, *policy.latent_shape(), generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=1.0)
    for _ in range(2):
        policy.velocity(x, torch.tensor([0.9, 0.4]), cond).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


# ---------------------------------------------------------------------- equal to the pipeline
@pytest.mark.parametrize("folder", ["pixel", "kl"])
def test_velocity_is_what_the_pipeline_steps_with(
    folder: str, make_fill: MakeFill, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    policy, pipe, seen = make_fill(folder, style=None, train="full"), diffusers.FluxFillPipeline.from_pretrained(places[folder]), []
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda posterior, generator=None: posterior.mode())
    step = pipe.scheduler.step
    monkeypatch.setattr(pipe.scheduler, "step", lambda v, t, x, **kw: (seen.append((v, t, x)), step(v, t, x, **kw))[1])
    rows = infos()
    pipe(
        PROMPTS,
        image=torch.stack([row["source"] for row in rows]).float() / 255,
        mask_image=torch.stack([row["mask"] for row in rows])[:, None].float() / 255,
        height=HEIGHT,
        width=WIDTH,
        guidance_scale=30.0,
        max_sequence_length=TOKENS,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    cond = policy.condition(rows)
    assert len(seen) == 3
    torch.testing.assert_close(policy.sigmas(3)[:3].float() * 1000, torch.stack([t for _, t, _ in seen]))
    for v, t, x in seen:
        with torch.no_grad():
            ours = policy.velocity(x, (t / 1000).expand(len(x)), cond)
        torch.testing.assert_close(ours, v, rtol=1e-4, atol=1e-5)


def test_what_is_masked_does_not_reach_the_network(make_fill: MakeFill) -> None:
    policy, rows = make_fill(), infos()
    before = policy.condition(rows)["fill"]
    outside, inside = rows[0]["source"].clone(), rows[0]["source"].clone()
    inside[:, 5, 5] ^= 255
    outside[:, 0, 0] ^= 255
    assert torch.equal(policy.condition([rows[0] | {"source": inside}, rows[1]])["fill"], before)
    assert not torch.equal(policy.condition([rows[0] | {"source": outside}, rows[1]])["fill"], before)


def test_mask_channels_are_the_pixels_of_each_cell(make_fill: MakeFill) -> None:
    """One white pixel at (5, 7), 2 x 2 pixels a cell, 2 x 2 cells a token, 4 x 6 tokens: token (1, 1), its cell (0, 1), its pixel (1, 1).

    Channel = pixel * 4 + cell = 3 * 4 + 1, after the 4 * 12 channels of the masked image.
    """
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8)
    mask[5, 7] = 255
    fill = make_fill().condition(infos(mask=mask))["fill"]
    assert (fill[0, :, 48:] > 0).nonzero().tolist() == [[1 * 6 + 1, 13]]


# ---------------------------------------------------------------------- style
def test_only_the_adapter_is_trained_and_it_starts_silent(make_fill: MakeFill) -> None:
    policy, plain = make_fill(), make_fill(style=None, train="full")
    cond = policy.condition(infos())
    assert torch.equal(velocity(policy, cond), velocity(plain, plain.condition(infos())))
    adapter = {f"network.{name}" for name in adapter_names(policy.network)}
    assert {name for name, _ in policy.trainable()} == adapter == policy.checkpoint_keys()
    assert not [name for name, _ in policy.named_parameters() if "siglip" in name or "vision" in name]


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)])
def test_the_reference_is_the_base_without_style(lora: LoraSettings | None, make_fill: MakeFill) -> None:
    policy, plain = make_fill(lora=lora), make_fill(style=None, train="full")
    cond = policy.condition(infos())
    base = velocity(plain, cond)
    train_a_little(policy, cond)
    trained = velocity(policy, cond)
    assert (trained - base).abs().max() > 1e-4
    policy.check_reference(after_warmup=True)
    with policy.reference():
        torch.testing.assert_close(velocity(policy, cond), base)
    assert torch.equal(velocity(policy, cond), trained)
    assert bool([key for key in policy.checkpoint_keys() if ".lora_" in key]) == (lora is not None)


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)])
def test_a_kept_reference_is_the_adapter_as_it_was(lora: LoraSettings | None, make_fill: MakeFill, tmp_path: Path) -> None:
    policy, plain = make_fill(lora=lora, keep_reference=True), make_fill(lora=lora)
    cond = policy.condition(infos())
    assert {name for name, _ in policy.trainable()} == {name for name, _ in plain.trainable()}
    base = velocity(policy, cond)
    train_a_little(policy, cond)
    warm = velocity(policy, cond)
    with policy.reference():
        assert torch.equal(velocity(policy, cond), base)
    policy.refresh_reference()
    train_a_little(policy, cond)
    trained = velocity(policy, cond)
    assert (trained - warm).abs().max() > 1e-4
    with policy.reference():
        torch.testing.assert_close(velocity(policy, cond), warm)
    assert torch.equal(velocity(policy, cond), trained)
    stored = {key: value.clone() for key, value in policy.state_dict().items() if key in policy.checkpoint_keys()}
    again = make_fill(lora=lora, keep_reference=True)
    assert again.load_state_dict(stored, strict=False).unexpected_keys == []
    assert torch.equal(velocity(again, cond), trained)
    with again.reference():
        torch.testing.assert_close(velocity(again, cond), warm)
    policy.save(tmp_path, {name: p.detach() for name, p in policy.trainable()})
    assert read_ip_adapter(tmp_path / "ip-adapter.bin").keys() == {"image_proj", "ip_adapter"}


def test_a_full_fine_tune_keeps_a_reference_with_its_style(make_fill: MakeFill) -> None:
    policy = make_fill(train="full", keep_reference=True)
    for network in policy.networks():
        for attention in style_attentions(network):
            nn.init.constant_(attention.to_v_ip.weight, 0.1)
    cond, plain = policy.condition(infos()), policy.condition(infos(styled=False))
    before = velocity(policy, cond)
    assert not torch.equal(before, velocity(policy, plain))
    train_a_little(policy, cond)
    assert not torch.equal(velocity(policy, cond), before)
    with policy.reference():
        torch.testing.assert_close(velocity(policy, cond), before)


def test_a_prompt_without_style_is_plain_fill_beside_one_with(make_fill: MakeFill) -> None:
    policy, plain = make_fill(), make_fill(style=None, train="full")
    train_a_little(policy, policy.condition(infos()))
    rows = infos()
    mixed = velocity(policy, policy.condition([rows[0] | {"styled": False}, rows[1]]))
    base = velocity(plain, plain.condition(rows))
    torch.testing.assert_close(mixed[0], base[0])
    assert not torch.equal(mixed[1], base[1])


def test_features_are_the_encoders_on_a_letterboxed_image(make_fill: MakeFill, places: dict[str, Path]) -> None:
    from transformers import SiglipVisionModel

    encoder, image = SiglipVisionModel.from_pretrained(places["siglip"]), torch.full((3, 30, 60), 255, dtype=torch.uint8)
    square = letterbox(image, SIDE)
    rows = torch.arange(SIDE)
    white = ((rows >= 3) & (rows < 9)).float().view(1, SIDE, 1).expand(3, SIDE, SIDE)
    torch.testing.assert_close(square, white)
    with torch.no_grad():
        expected = encoder(pixel_values=white[None] * 2 - 1).pooler_output
    found = make_fill().style_features([None, image])
    torch.testing.assert_close(found, torch.cat([torch.zeros(1, FEATURES), expected]))


# ---------------------------------------------------------------------- files
@pytest.mark.parametrize("qformer", [False, True])
def test_a_saved_adapter_starts_the_same_policy(qformer: bool, make_fill: MakeFill, tmp_path: Path) -> None:
    heads = {"qformer": qformer, "heads": 2, "key_tokens": 2}
    policy = make_fill(style=heads, lora=LoraSettings(rank=2))
    cond = policy.condition(infos())
    train_a_little(policy, cond)
    policy.save(tmp_path, {name: p.detach() for name, p in policy.trainable()})
    file = tmp_path / "ip-adapter.bin"
    lora = LoraSettings(rank=2, initial=str(tmp_path))
    again = make_fill(style={"initial": str(file), "heads": 2}, lora=lora)
    assert torch.equal(velocity(again, cond), velocity(policy, cond))
    other = tmp_path / "other.bin"
    write_ip_adapter(other, read_ip_adapter(file), format="released")
    released = make_fill(style={"initial": str(other), "heads": 2}, lora=lora)
    torch.testing.assert_close(velocity(released, cond), velocity(policy, cond))


def test_a_saved_full_pipeline_is_stock_and_the_adapter_lies_beside_it(make_fill: MakeFill, tmp_path: Path) -> None:
    policy = make_fill(train="full")
    cond = policy.condition(infos())
    train_a_little(policy, cond)
    policy.save(tmp_path, {name: p.detach() for name, p in policy.trainable()})
    stock = diffusers.FluxFillPipeline.from_pretrained(tmp_path).transformer.state_dict()
    ours, adapter = policy.network.state_dict(), adapter_names(policy.network)
    assert stock.keys() == ours.keys() - adapter.keys()
    assert all(torch.equal(value, ours[key]) for key, value in stock.items())
    assert read_ip_adapter(tmp_path / "ip-adapter.bin").keys() == {"image_proj", "ip_adapter"}


# ---------------------------------------------------------------------- strip, and what is refused
def test_the_strip_stands_above_the_source_and_is_cut_off_again(make_fill: MakeFill) -> None:
    policy, rows = make_fill(context_height=8), infos()
    images = torch.stack([row["source"] for row in rows])
    canvas = policy.canvas(images, rows)
    assert canvas.shape == (2, 3, 8 + HEIGHT, WIDTH) and torch.equal(canvas[:, :, 8:], images)
    assert torch.equal(canvas[1, :, :8], strip(rows[1]["reference"], 8, WIDTH))
    assert policy.latent_shape()[0] == (8 + HEIGHT) * WIDTH // 16
    assert torch.equal(policy.decode(policy.encode_images(images, rows)), images)
    greyed = policy.condition(rows)["fill"].view(2, 6, 6, -1)  # rows and columns of tokens, 4 x 4 pixels each
    assert not greyed[:, :2, :, 48:].any() and greyed[:, 2:, :, 48:].any()


@pytest.mark.parametrize(
    ("size", "ink"),
    [
        ((10, 40), (slice(20, 40), slice(0, 80))),  # twice as wide: black above
        ((40, 20), (slice(0, 40), slice(30, 50))),  # as high as the strip: black on both sides
        ((22, 40), (slice(0, 40), slice(0, 80))),  # 44 rows at this width, near enough to be stretched
    ],
)
def test_a_strip_keeps_the_shape_of_the_reference(size: tuple[int, int], ink: tuple[slice, slice]) -> None:
    expected = torch.zeros(3, 40, 80, dtype=torch.uint8)
    expected[:, ink[0], ink[1]] = 200
    assert torch.equal(strip(torch.full((3, *size), 200, dtype=torch.uint8), 40, 80), expected)


def test_each_prompt_is_conditioned_once_for_its_siblings(make_fill: MakeFill) -> None:
    policy, rows = make_fill(), infos()
    assert policy.condition_key(rows[0]) != policy.condition_key({**rows[0]})
    assert policy.condition_key(rows[0]) == policy.condition_key(rows[0])


def test_what_cannot_be_trained_is_refused(places: dict[str, Path]) -> None:
    def make(**settings: Any) -> FluxFillPolicy:
        return FluxFillPolicy(str(places["pixel"]), resolution=(HEIGHT, WIDTH), **settings)

    style = StyleSettings(encoder="siglip")
    with pytest.raises(ConfigError, match="nothing to train"):
        make()
    with pytest.raises(ConfigError, match="leave policy.lora out"):
        make(train="full", lora=LoraSettings())
    with pytest.raises(ConfigError, match=r"context_height=6 must be a multiple of 4 pixels"):
        make(style=style, context_height=6)
    with pytest.raises(ConfigError, match="style.initial: no such file"):
        StyleSettings(encoder="siglip", initial="absent.bin")
    with pytest.raises(ConfigError, match="holds a FluxPipeline, not a FluxFillPipeline; lit_rl.policies.flux.FluxPolicy serves that"):
        FluxFillPolicy(str(places["text"]), style=style)


def test_an_adapter_for_another_encoder_is_refused(make_fill: MakeFill, tmp_path: Path) -> None:
    policy = make_fill()
    policy.save(tmp_path, {name: p.detach() for name, p in policy.trainable()})
    weights = read_ip_adapter(tmp_path / "ip-adapter.bin")
    weights["image_proj"]["proj.0.weight"] = torch.zeros(8, 4)
    write_ip_adapter(tmp_path / "narrow.bin", weights)
    with pytest.raises(ConfigError, match="projects 4 features, the encoder .* has 10"):
        make_fill(style={"initial": str(tmp_path / "narrow.bin")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": None}, r"mask must be uint8 \[16, 24\] for this policy's resolution, is NoneType"),
        ({"reference": None}, r"reference must be uint8 \[3, h, w\] .* is NoneType"),
        ({"source": torch.zeros(3, 16, 16, dtype=torch.uint8)}, r"source must be uint8 \[3, 16, 24\] .* torch.uint8 \[3, 16, 16\]"),
        ({"source": torch.zeros(3, 16, 24)}, r"prompt 'say \"42\"': source .* is torch.float32 \[3, 16, 24\]"),
    ],
)
def test_images_that_do_not_fit_are_named(change: dict[str, Any], message: str, make_fill: MakeFill) -> None:
    with pytest.raises(ConfigError, match=message):
        make_fill().condition(infos(**change))


@pytest.mark.parametrize(("qformer", "weights"), [(True, 3_018_043_904), (False, 3_018_043_904 - 372_443_392)])
def test_the_published_adapter_has_three_billion_weights(qformer: bool, weights: int) -> None:
    """MLP 1 211 148 544, Q-Former 372 443 392, attentions of 57 blocks 1 434 451 968."""
    flux = {"joint_attention_dim": 4096, "num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 19, "num_single_layers": 38}
    assert count_new_adapter(StyleSettings(encoder="siglip", qformer=qformer), features=1152, transformer=flux) == weights
