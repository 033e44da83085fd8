"""Both families against stock diffusers pipelines read from the same folders."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from schedule_formulas import flux_sigmas, sd3_sigmas
from torch import Tensor, nn

from lit_rl.errors import ConfigError
from lit_rl.policies.diffusers_flow import DiffusersFlowPolicy
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.types import Cond, take_rows

HEIGHT, WIDTH, TOKENS = 16, 24, 8
PROMPTS = ['say "42"', 'say "07"']

MakePolicy = Callable[..., DiffusersFlowPolicy]
MakeInputs = Callable[[DiffusersFlowPolicy], SimpleNamespace]
families = pytest.mark.parametrize("name", ["sd3", "flux"])


def stock(folder: Path) -> Any:
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, policy: DiffusersFlowPolicy, **settings: Any) -> Any:
    asked = {"height": HEIGHT, "width": WIDTH, "max_sequence_length": TOKENS, "guidance_scale": policy.guidance_scale}
    return pipe(PROMPTS, generator=torch.Generator().manual_seed(0), **asked, **settings).images


@torch.no_grad()
def sample(policy: DiffusersFlowPolicy, num_steps: int) -> Tensor:
    """Euler from the noise that the pipeline draws with seed 0."""
    channels = policy._pipe.vae.config.latent_channels
    x = policy.pack(torch.randn(len(PROMPTS), channels, *policy.latent_size, generator=torch.Generator().manual_seed(0)))
    cond, sigmas = policy.encode(PROMPTS), policy.sigmas(num_steps).float()
    for now, then in pairwise(sigmas):
        x = x + (then - now) * policy.velocity(x, now.expand(len(x)), take_rows(cond, torch.arange(len(x))))
    return x


# ---------------------------------------------------------------------- equal to the pipeline
@pytest.mark.parametrize("name", ["sd3", "sd3-kl", "flux", "flux-kl", "flux-schnell"])
def test_velocity_is_what_the_pipeline_steps_with(
    name: str, make_policy: MakePolicy, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every (sample, timestep, prediction) that the stock pipeline hands to its scheduler, guidance included."""
    policy, pipe, seen = make_policy(name), stock(folders[name]), []
    step = pipe.scheduler.step
    monkeypatch.setattr(pipe.scheduler, "step", lambda v, t, x, **kw: (seen.append((v, t, x)), step(v, t, x, **kw))[1])
    run(pipe, policy, num_inference_steps=3, output_type="latent")
    cond = policy.encode(PROMPTS)
    assert len(seen) == 3
    for v, t, x in seen:
        with torch.no_grad():
            ours = policy.velocity(x, (t / 1000).expand(len(x)), cond)
        torch.testing.assert_close(ours, v, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["sd3", "sd3-kl", "flux", "flux-kl", "flux-schnell"])
def test_euler_rollout_gives_the_pipelines_images(name: str, make_policy: MakePolicy, folders: dict[str, Path]) -> None:
    policy = make_policy(name)
    expected = torch.from_numpy((run(stock(folders[name]), policy, num_inference_steps=5, output_type="np") * 255).round()).permute(
        0, 3, 1, 2
    )
    images = policy.decode(sample(policy, 5))
    assert images.dtype == torch.uint8 and images.shape == (2, 3, HEIGHT, WIDTH)
    difference = (images.float() - expected).abs()
    assert difference.max() <= 1 and difference.mean() < 0.01  # 1: a value on the edge between two levels
    assert images.float().std() > 10


def test_unguided_sd3_is_the_pipelines_too(make_policy: MakePolicy, folders: dict[str, Path]) -> None:
    policy = make_policy("sd3", guidance_scale=1.0)
    assert not any(key.startswith("negative") for key in policy.encode(PROMPTS))
    latents = run(stock(folders["sd3"]), policy, num_inference_steps=3, output_type="latent")
    torch.testing.assert_close(sample(policy, 3), latents, rtol=1e-4, atol=1e-5)


def test_sd3_without_t5_is_the_pipelines_too(make_policy: MakePolicy, folders: dict[str, Path]) -> None:
    policy = make_policy("sd3-no-t5")
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folders["sd3-no-t5"], text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    torch.testing.assert_close(sample(policy, 3), run(pipe, policy, num_inference_steps=3, output_type="latent"), rtol=1e-4, atol=1e-5)
    assert make_policy("sd3-no-t5", max_sequence_length=0).encode(PROMPTS)["prompt_embeds"].shape[1] == 16  # CLIP's tokens alone


def test_t5_cannot_encode_zero_tokens(make_policy: MakePolicy) -> None:
    with pytest.raises(ValueError, match="max_sequence_length: 0 .* at least 1"):
        make_policy("sd3", max_sequence_length=0)


def test_sigmas_are_the_published_schedules(make_policy: MakePolicy) -> None:
    torch.testing.assert_close(make_policy("sd3").sigmas(10), sd3_sigmas(10, shift=3.0), rtol=1e-6, atol=0)
    tokens = (HEIGHT // 4) * (WIDTH // 4)
    torch.testing.assert_close(make_policy("flux").sigmas(10), flux_sigmas(10, image_tokens=tokens), rtol=1e-6, atol=0)
    evenly = torch.cat([torch.linspace(1, 0.25, 4, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    torch.testing.assert_close(make_policy("flux-schnell").sigmas(4), evenly, rtol=1e-6, atol=0)


def test_flux_packs_as_the_pipeline_does(make_policy: MakePolicy) -> None:
    policy = make_policy("flux")
    z = torch.randn(2, 4, *policy.latent_size)
    assert torch.equal(policy.pack(z), diffusers.FluxPipeline._pack_latents(z, *z.shape))
    assert torch.equal(policy.unpack(policy.pack(z)), z)
    assert policy.latent_shape() == policy.pack(z).shape[1:]


# ---------------------------------------------------------------------- guidance
def test_guidance_extrapolates_from_the_empty_prompt_and_reaches_both_halves(make_policy: MakePolicy, make_inputs: MakeInputs) -> None:
    """v(s) = n + s (p - n) with p, n the unguided velocities of the prompt and of ""; so dv/dn = 1 - s, which is not 0."""
    policy = make_policy("sd3")
    batch = make_inputs(policy)
    positive = {key: batch.cond[key] for key in ("prompt_embeds", "pooled")}
    negative = {key: batch.cond[f"negative_{key}"] for key in positive}
    guided = policy.velocity(batch.x, batch.t, batch.cond)
    policy.guidance_scale = 1.0
    p, n = policy.velocity(batch.x, batch.t, positive), policy.velocity(batch.x, batch.t, negative)
    torch.testing.assert_close(guided, n + 4.5 * (p - n), rtol=1e-4, atol=1e-5)
    weight = policy.network.proj_out.weight
    whole = torch.autograd.grad(guided.sum(), weight)[0]
    halves = torch.autograd.grad(4.5 * p.sum() - 3.5 * n.sum(), weight)[0]
    torch.testing.assert_close(whole, halves, rtol=1e-3, atol=1e-3)


def test_flux_dev_takes_the_scale_as_an_input_and_schnell_has_none(make_policy: MakePolicy, make_inputs: MakeInputs) -> None:
    for name, changes in (("flux", True), ("flux-schnell", False)):
        policy = make_policy(name)
        batch = make_inputs(policy)
        before = policy.velocity(batch.x, batch.t, batch.cond)
        policy.guidance_scale = 7.0
        assert torch.equal(policy.velocity(batch.x, batch.t, batch.cond), before) != changes


# ---------------------------------------------------------------------- determinism and precision
@families
def test_rollout_and_training_see_the_same_bits(name: str, make_policy: MakePolicy, make_inputs: MakeInputs) -> None:
    policy = make_policy(name)
    batch = make_inputs(policy)
    with torch.no_grad():
        rollout = policy.velocity(batch.x, batch.t, batch.cond)
    training = policy.train().velocity(batch.x, batch.t.double(), batch.cond)
    assert training.requires_grad and training.dtype == torch.float32
    assert torch.equal(rollout, training)
    assert torch.equal(rollout, make_policy(name).velocity(batch.x, batch.t, batch.cond))


@families
def test_gradient_checkpointing_changes_no_gradient(name: str, make_policy: MakePolicy, make_inputs: MakeInputs) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = make_policy(name, gradient_checkpointing=checkpointing)
        batch = make_inputs(policy)
        policy.velocity(batch.x, batch.t, batch.cond).square().mean().backward()
        gradients.append({key: p.grad for key, p in policy.trainable() if p.grad is not None})
        assert any(getattr(module, "gradient_checkpointing", False) for module in policy.network.modules()) == checkpointing
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][key]), key


@families
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_base_answers_in_float32_and_close_by(
    name: str, dtype: str, make_policy: MakePolicy, make_inputs: MakeInputs
) -> None:
    from lit_rl.policies.weights.lora import LoraSettings

    exact, low = make_policy(name), make_policy(name, dtype=dtype, lora=LoraSettings(rank=2))
    assert low.encode(PROMPTS)["prompt_embeds"].dtype == low._pipe.text_encoder.dtype == getattr(torch, dtype)
    batch = make_inputs(exact)
    v, expected = low.velocity(batch.x, batch.t, batch.cond), exact.velocity(batch.x, batch.t, batch.cond)
    assert v.dtype == torch.float32
    error = (v - expected).norm() / expected.norm()
    assert 0 < error < 0.06  # 8 bits of mantissa, amplified by guidance


@families
def test_autocast_chooses_the_precision_of_a_full_fine_tune(name: str, make_policy: MakePolicy, make_inputs: MakeInputs) -> None:
    policy = make_policy(name)
    batch = make_inputs(policy)
    exact = policy.velocity(batch.x, batch.t, batch.cond)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        v = policy.velocity(batch.x, batch.t, batch.cond)
        again = policy.encode(['say "99"'])
    assert v.dtype == torch.float32
    assert 0 < (v - exact).norm() / exact.norm() < 0.06
    for key, value in make_policy(name).encode(['say "99"']).items():
        assert torch.equal(value, again[key]), "autocast must not reach the frozen text encoders"


def test_compile_is_per_block_and_in_place(make_policy: MakePolicy) -> None:
    policy = make_policy("flux", compile=True)
    plain = make_policy("flux")
    assert all(block._compiled_call_impl is not None for block in policy.blocks(policy.network))
    assert policy.state_dict().keys() == plain.state_dict().keys()
    assert len(policy.blocks(policy.network)) == 3


# ---------------------------------------------------------------------- frozen parts
@families
def test_only_the_network_is_registered(name: str, make_policy: MakePolicy) -> None:
    policy = make_policy(name)
    policy.load()
    assert {key.split(".")[0] for key in policy.state_dict()} == {"network"}
    assert policy.networks() == [policy.network]
    assert all(not p.requires_grad for part in (policy._pipe.vae, policy._pipe.text_encoder) for p in part.parameters())
    assert all(p.requires_grad for p in policy.network.parameters())


def count_calls(module: nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@families
def test_each_prompt_is_encoded_once_and_alone(name: str, make_policy: MakePolicy) -> None:
    policy = make_policy(name)
    calls = count_calls(policy._pipe.text_encoder)
    first = policy.encode(["a", "b", "a"])
    assert len(calls) == (3 if policy.guided else 2)  # "a", "b" and the empty prompt
    again = policy.encode(["b", "a"])
    assert len(calls) == (3 if policy.guided else 2)
    for key in ("prompt_embeds", "pooled"):
        assert first[key].shape[0] == 3 and torch.equal(first[key][0], first[key][2])
        assert torch.equal(again[key], first[key][:2].flip(0))
        assert torch.equal(make_policy(name).encode(["b"])[key], first[key][1:2])
        assert not first[key].requires_grad
    assert policy.guided == (name == "sd3")
    if policy.guided:
        assert first["negative_prompt_embeds"].shape[0] == first["negative_pooled"].shape[0] == 1
        assert torch.equal(first["negative_pooled"], policy.encode([""])["pooled"])


def test_the_least_recently_used_prompt_is_forgotten(make_policy: MakePolicy) -> None:
    policy = make_policy("flux", cache_prompts=2)
    calls = count_calls(policy._pipe.text_encoder)
    for prompts, total in ((["a", "b"], 2), (["a"], 2), (["c"], 3), (["a"], 3), (["b"], 4), (["a", "b", "c"], 5)):
        policy.encode(prompts)
        assert len(calls) == total, prompts


@pytest.mark.parametrize("offload", [True, False])
def test_idle_parts_leave_the_device(offload: bool, make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy("sd3", offload_text_encoders=offload, offload_vae=offload, vae_slice=1)
    pipe, moves = policy._pipe, []
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3", "vae"):
        monkeypatch.setattr(getattr(pipe, part), "to", lambda device, part=part: moves.append((part, str(device))))
    encoders = ["text_encoder", "text_encoder_2", "text_encoder_3"]
    monkeypatch.setattr(type(policy), "device", SimpleNamespace(type="cpu", __str__=lambda _: "there"))
    away = [(part, "cpu") for part in encoders] if offload else []
    with policy.frozen.on_device(encoders, policy.device, offload=offload):
        assert [part for part, _ in moves] == encoders and ("text_encoder", "cpu") not in moves
    assert moves[3:] == away
    with pytest.raises(KeyError), policy.frozen.on_device(["vae"], policy.device, offload=offload):
        raise KeyError
    assert (moves[-1] == ("vae", "cpu")) == offload


@pytest.mark.parametrize("name", ["sd3-kl", "flux-kl"])
def test_images_are_encoded_to_the_posteriors_mode(name: str, make_policy: MakePolicy, folders: dict[str, Path]) -> None:
    """(mode - shift_factor) * scaling_factor of the same pixels through diffusers' own preprocessing."""
    policy, pipe = make_policy(name, vae_slice=2), stock(folders[name])
    images = torch.randint(0, 256, (3, 3, HEIGHT, WIDTH), dtype=torch.uint8)
    pixels = pipe.image_processor.preprocess(images.permute(0, 2, 3, 1).numpy() / 255.0)
    with torch.no_grad():
        mode = pipe.vae.encode(pixels.float()).latent_dist.mode()
    torch.testing.assert_close(policy.encode_images(images), policy.pack((mode - 0.1) * 1.5), rtol=1e-4, atol=1e-5)


@families
def test_pixel_latents_decode_to_the_same_grey_images(name: str, make_policy: MakePolicy) -> None:
    policy = make_policy(name, vae_slice=2)
    images = torch.randint(0, 256, (3, 1, HEIGHT, WIDTH), dtype=torch.uint8).expand(-1, 3, -1, -1)
    latents = policy.encode_images(images)
    assert latents.shape[1:] == policy.latent_shape() and not latents.requires_grad
    assert torch.equal(policy.decode(latents), images)


def test_decoding_in_slices_changes_nothing(make_policy: MakePolicy) -> None:
    x = torch.randn(5, 4, HEIGHT // 2, WIDTH // 2)
    whole, sliced = (make_policy("sd3-kl", vae_slice=n).decode(x).int() for n in (5, 2))
    assert (whole - sliced).abs().max() <= 1


# ---------------------------------------------------------------------- full fine-tune: reference and saving
def train_a_little(policy: DiffusersFlowPolicy, batch: SimpleNamespace, *, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for _, p in policy.trainable()], lr=1e-2)
    for _ in range(steps):
        policy.velocity(batch.x, batch.t, batch.cond).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def velocity(policy: DiffusersFlowPolicy, batch: SimpleNamespace, cond: Cond | None = None) -> Tensor:
    with torch.no_grad():
        return policy.velocity(batch.x, batch.t, cond or batch.cond)


@families
def test_frozen_copy_answers_with_the_initial_weights_until_refreshed(name: str, make_policy: MakePolicy, make_inputs: MakeInputs) -> None:
    policy = make_policy(name, keep_reference=True)
    batch = make_inputs(policy)
    initial = velocity(policy, batch)
    train_a_little(policy, batch)
    trained = velocity(policy, batch)
    assert not torch.equal(trained, initial)
    with policy.reference():
        assert torch.equal(velocity(policy, batch), initial)
    assert torch.equal(velocity(policy, batch), trained)
    with pytest.raises(KeyError), policy.reference():
        raise KeyError
    assert torch.equal(velocity(policy, batch), trained)
    policy.refresh_reference()
    with policy.reference():
        assert torch.equal(velocity(policy, batch), trained)
    assert {key.split(".")[0] for key in policy.state_dict()} == {"network", "reference_network"}
    assert policy.networks() == [policy.network, policy.reference_network]
    assert {key.split(".")[0] for key, _ in policy.trainable()} == {"network"}


def test_a_reference_that_would_not_be_there_is_refused_before_loading(make_policy: MakePolicy) -> None:
    full, lora = make_policy("sd3"), make_policy("sd3", lora=LoraSettings(rank=2))
    with pytest.raises(ConfigError, match=r"set model\.policy\.keep_reference to true, or model\.kl\.coef to 0"):
        full.check_reference(after_warmup=False)
    lora.check_reference(after_warmup=False)
    with pytest.raises(ConfigError, match="base from before the warm-up"):
        lora.check_reference(after_warmup=True)
    for settings in ({}, {"lora": LoraSettings(rank=2)}):
        make_policy("sd3", keep_reference=True, **settings).check_reference(after_warmup=True)


@families
def test_saved_pipeline_is_read_by_stock_diffusers(name: str, make_policy: MakePolicy, make_inputs: MakeInputs, tmp_path: Path) -> None:
    policy = make_policy(name)
    batch = make_inputs(policy)
    before = {key: tensor.clone() for key, tensor in policy.state_dict().items()}
    averaged = {key: p.detach() + 0.01 for key, p in policy.trainable()}
    policy.save(tmp_path / "out", averaged)
    assert all(torch.equal(tensor, before[key]) for key, tensor in policy.state_dict().items())
    stored = stock(tmp_path / "out").transformer.state_dict()
    assert stored.keys() == policy.network.state_dict().keys()
    for key, tensor in policy.network.state_dict().items():
        assert torch.equal(stored[key], averaged.get(f"network.{key}", tensor)), key
    again = type(policy)(
        str(tmp_path / "out"), resolution=(HEIGHT, WIDTH), guidance_scale=policy.guidance_scale, max_sequence_length=TOKENS
    )
    again.load()
    for key, p in policy.named_parameters():
        p.data = averaged[key]
    assert torch.equal(velocity(again, batch), velocity(policy, batch))
