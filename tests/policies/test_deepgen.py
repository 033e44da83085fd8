"""DeepGen against the numbers of its authors' classes, and what each of its trained parts does."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from deepgen import build, deepgen_policy
from golden_numbers import load
from safetensors.torch import load_file
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.losses.flow import flow_matching_loss
from lit_rl.policies.deepgen import DeepGenPolicy
from lit_rl.types import Cond

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent.parent / "golden")) / "deepgen"
TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
Make = Callable[..., DeepGenPolicy]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("deepgen"))


@pytest.fixture
def make(folder: Path) -> Make:
    """make(train=[...], lora={...}) -> a loaded policy."""

    def loaded(**settings: Any) -> DeepGenPolicy:
        torch.manual_seed(0)
        policy = deepgen_policy(folder, **settings)
        policy.load()
        return policy.train()

    return loaded


@torch.no_grad()
def velocity(policy: DeepGenPolicy, cond: Cond, rows: slice = slice(None)) -> Tensor:
    x = torch.randn(3, *policy.latent_shape(), generator=torch.Generator().manual_seed(2))[rows]
    return policy.velocity(x, torch.tensor([0.9, 0.4, 0.7])[rows], cond)


def train_a_little(policy: DeepGenPolicy, prompts: list[str], lr: float = 0.5) -> None:
    optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=lr)
    x = torch.randn(len(prompts), *policy.latent_shape(), generator=torch.Generator().manual_seed(3))
    for _ in range(2):
        optimizer.zero_grad()
        policy.velocity(x, torch.full((len(prompts),), 0.5), policy.encode(prompts)).square().mean().backward()
        optimizer.step()


# ---------------------------------------------------------------------- the authors' numbers
@pytest.fixture(scope="module")
def authors(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], DeepGenPolicy]:
    """The numbers, and a policy of the authors' tiny model, read through files as they come."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    place, data, about = (
        tmp_path_factory.mktemp("authors"),
        load(GOLDEN, "tiny_model"),
        json.loads((GOLDEN / "tiny_model.json").read_text()),
    )
    torch.save({name.removeprefix("w/"): value for name, value in data.items() if name.startswith("w/")}, place / "checkpoint.pth")
    sizes = dict(about["config"]["qwen"])
    rope = {"rope_type": "default", "rope_theta": sizes.pop("rope_theta"), "mrope_section": sizes.pop("mrope_section")}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32, "fullatt_block_indexes": [1]}
    text = sizes | {"rope_parameters": rope, "bos_token_id": None, "eos_token_id": None}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(place / "language")
    word_tokenizer(about["vocab"]).save_pretrained(place / "language")
    SD3Transformer2DModel(**about["config"]["sd3"]).save_pretrained(place / "sd3" / "transformer")
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(place / "sd3" / "scheduler")
    AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4).save_pretrained(place / "sd3" / "vae")
    policy = deepgen_policy(place, connector_heads=4, resolution=(8, 8))
    policy.load()
    return data | {"prompts": about["prompts"]}, policy


def word_tokenizer(vocabulary: Mapping[str, int]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(dict(vocabulary), unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = [token for token in vocabulary if token.startswith("<|")]
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", additional_special_tokens=marks)


@pytest.mark.golden
def test_prompts_are_framed_and_tokenized_as_the_authors_do(authors: tuple[dict[str, Any], DeepGenPolicy]) -> None:
    data, policy = authors
    for prompt, ids, mask in zip(data["prompts"], data["input_ids"], data["attention_mask"]):
        assert policy.tokens(prompt) == ids[mask.bool()].tolist()


@pytest.mark.golden
def test_conditions_are_those_of_the_authors_for_a_prompt_alone(authors: tuple[dict[str, Any], DeepGenPolicy]) -> None:
    """Theirs of the shorter prompt beside the longer one differ by up to 0.1: its padding is seen there."""
    data, policy = authors
    cond = policy.encode(data["prompts"])
    torch.testing.assert_close(cond["prompt_embeds"][0][cond["real"][0]], data["seq_alone"][0], **TOLERANCE)
    torch.testing.assert_close(cond["pooled"][0], data["pooled_alone"][0], **TOLERANCE)
    torch.testing.assert_close(cond["prompt_embeds"][1], data["seq"][1], **TOLERANCE)
    torch.testing.assert_close(cond["pooled"][1], data["pooled"][1], **TOLERANCE)
    assert float((data["pooled"][0] - data["pooled_alone"][0]).abs().max()) > 0.05


@pytest.mark.golden
def test_a_bridge_that_sees_padding_is_the_authors(authors: tuple[dict[str, Any], DeepGenPolicy]) -> None:
    data, policy = authors
    with torch.no_grad():
        found = policy._pipe.conditioner.bridge(data["fused"])
    torch.testing.assert_close(found.sequence, data["seq"], **TOLERANCE)
    torch.testing.assert_close(found.pooled, data["pooled"], **TOLERANCE)


@pytest.mark.golden
def test_velocity_and_supervised_loss_are_the_authors(authors: tuple[dict[str, Any], DeepGenPolicy]) -> None:
    data, policy = authors
    cond = {"prompt_embeds": data["seq"], "pooled": data["pooled"]}
    with torch.no_grad():
        torch.testing.assert_close(policy.velocity(data["x"], data["t"] / 1000, cond), data["pred"], **TOLERANCE)
        sigma = data["train_sigmas"][(data["sft_u"] * 1000).long()]
        noisy = torch.lerp(data["sft_lat"], data["sft_noise"], sigma.view(-1, 1, 1, 1))
        loss = flow_matching_loss(policy.velocity(noisy, sigma, cond), data["sft_lat"], data["sft_noise"]).mean()
    torch.testing.assert_close(loss, data["sft_loss"], **TOLERANCE)


def test_an_image_that_has_no_positions_is_named(authors: tuple[dict[str, Any], DeepGenPolicy]) -> None:
    """A strip of a given area may be longer than any picture that the transformer knows."""
    most = authors[1]._pipe.transformer.config.pos_embed_max_size * 2
    assert authors[1].encode_images(torch.zeros(1, 3, 2, most, dtype=torch.uint8)).shape[-1] == most
    with pytest.raises(ConfigError, match=f"an image of {most + 2} x 2 pixels of 'a strip' is beyond the {most} pixels"):
        authors[1].encode_images(torch.zeros(1, 3, 2, most + 2, dtype=torch.uint8), [{"prompt": "a strip"}])


# ---------------------------------------------------------------------- a prompt beside others
@pytest.mark.parametrize("train", [["transformer"], ["bridge"]])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_a_prompt_is_answered_as_if_it_were_alone(train: list[str], guidance_scale: float, make: Make) -> None:
    policy, prompts = make(train=train, guidance_scale=guidance_scale), ["a", "a much longer prompt", "some"]
    with torch.no_grad():
        together = velocity(policy, policy.encode(prompts))
        for i, prompt in enumerate(prompts):
            alone = policy.encode([prompt])
            assert ("real" in alone) == (guidance_scale > 1)  # the empty prompt is shorter
            torch.testing.assert_close(velocity(policy, alone, slice(i, i + 1)), together[i : i + 1], rtol=1e-4, atol=1e-5)
    assert float((together[0] - together[1]).abs().max()) > 1e-3


def test_a_prompt_alone_has_no_mask_and_is_the_stock_transformers(make: Make, folder: Path) -> None:
    from diffusers import SD3Transformer2DModel

    policy = make()
    cond, x = policy.encode(["a"]), torch.randn(1, *policy.latent_shape())
    stock = SD3Transformer2DModel.from_pretrained(folder / "sd3", subfolder="transformer")
    with torch.no_grad():
        expected = stock(x, cond["prompt_embeds"], cond["pooled"], torch.tensor([300.0]), return_dict=False)[0]
        assert torch.equal(policy.velocity(x, torch.tensor([0.3]), cond), expected)


# ---------------------------------------------------------------------- what is trained
WITHOUT_EFFECT = re.compile(r"transformer_blocks\.1\.attn\.(add_q_proj|norm_added_q)|self_attn\.k_proj\.bias")
"""What the text asks in the last block, which only the pixels leave; and what is added to all keys alike."""
KINDS: dict[str, dict[str, Any]] = {
    "transformer": {},
    "LoRA": {"lora": {"rank": 2}},
    "bridge": {"train": ["bridge"]},
    "adapter": {"train": ["adapter"]},
    "all": {"train": ["transformer", "bridge", "adapter"]},
    "all, LoRA": {"train": ["transformer", "bridge", "adapter"], "lora": {"rank": 2}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_is_trained_learns_and_the_reference_stays(kind: str, make: Make) -> None:
    policy, prompts = make(**KINDS[kind], keep_reference=True, gradient_checkpointing=True), ["a", "a longer one", "some"]
    with torch.no_grad():
        before = velocity(policy, policy.encode(prompts))
    weights = {name: p.detach().clone() for name, p in policy.trainable()}
    train_a_little(policy, prompts)
    still = [name for name, p in policy.trainable() if torch.equal(p, weights[name])]
    assert not [name for name in still if not WITHOUT_EFFECT.search(name)]
    with torch.no_grad():
        after = velocity(policy, policy.encode(prompts))
        assert float((after - before).abs().max()) > 1e-5
        with policy.reference():
            assert torch.equal(velocity(policy, policy.encode(prompts)), before)
    policy.refresh_reference()
    with torch.no_grad(), policy.reference():
        assert torch.equal(velocity(policy, policy.encode(prompts)), after)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_what_is_trained_and_its_reference(kind: str, make: Make) -> None:
    policy, prompts = make(**KINDS[kind], keep_reference=True), ["a", "a longer one", "some"]
    train_a_little(policy, prompts)
    stored = {name: value.clone() for name, value in policy.state_dict().items() if name in policy.checkpoint_keys()}
    assert {name for name, _ in policy.trainable()} < stored.keys()
    again = make(**KINDS[kind], keep_reference=True)
    again.load_state_dict(stored, strict=False)
    with torch.no_grad():
        assert torch.equal(velocity(again, again.encode(prompts)), velocity(policy, policy.encode(prompts)))
        with again.reference(), policy.reference():
            assert torch.equal(velocity(again, again.encode(prompts)), velocity(policy, policy.encode(prompts)))


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_a_checkpoint_that_starts_the_same_policy(kind: str, make: Make, folder: Path, tmp_path: Path) -> None:
    policy, prompts = make(**KINDS[kind]), ["a", "a longer one", "some"]
    train_a_little(policy, prompts)
    policy.save(tmp_path, {name: p.detach() for name, p in policy.trainable()})
    state = load_file(tmp_path / "model.safetensors")
    groups = {name.split(".")[0] for name in state}
    assert groups == {"transformer", "connector", "projector_1", "projector_2", "projector_3", "meta_queries"} | (
        {"lmm"} if "adapter" in policy.train_parts else set()
    )
    assert not [name for name in state if "lora" in name and not name.startswith("lmm.model.")]
    old = torch.load(folder / "checkpoint.pth")["state_dict"]
    torch.save(old | state, tmp_path / "laid_over.pth")  # as the old system does: over the file from before RL
    again = make(checkpoint=str(tmp_path / "laid_over.pth"))
    with torch.no_grad():
        torch.testing.assert_close(velocity(again, again.encode(prompts)), velocity(policy, policy.encode(prompts)), **TOLERANCE)


def test_parts_have_their_own_learning_rates(make: Make) -> None:
    from lit_rl.modules.optimization import parameter_groups

    policy = make(train=["transformer", "bridge", "adapter"], learning_rates={"bridge": 1e-3, "adapter": 1e-4})
    groups = parameter_groups(policy)
    optimizer = torch.optim.AdamW(groups, lr=1e-5)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-5, 1e-3, 1e-4]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(policy.trainable()))
    queries = policy.conditioner.bridge.queries.weight
    assert any(queries is p for p in optimizer.param_groups[1]["params"])


def test_only_the_reference_of_what_is_kept_exists(make: Make) -> None:
    with pytest.raises(ConfigError, match="keep_reference"):
        make(train=["bridge"]).check_reference(after_warmup=False)
    make(lora={"rank": 2}).check_reference(after_warmup=False)


# ---------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": []}, "at least one"),
        ({"train": ["bridge"], "lora": {"rank": 2}}, "model.policy.lora is of the transformer"),
        ({"learning_rates": {"bridge": 1e-3}}, "learning_rates names bridge"),
        ({"train": ["bridge"], "learning_rates": {"bridge": 0.0}}, "must be above 0"),
        ({"checkpoint": "nowhere.pth"}, "no such file"),
        ({"language_model": "/nowhere"}, "no such folder"),
        ({"pretrained": "/nowhere"}, "has no transformer, vae, scheduler"),
    ],
)
def test_wrong_options_are_told_before_anything_is_read(settings: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        deepgen_policy(folder, **settings)


def test_paths_come_from_the_guides_variables(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"SD3_5_MODEL_NAME_OR_PATH": "sd3", "QWEN2_5_VL_MODEL_NAME_OR_PATH": "language", "CHECKPOINT": "checkpoint.pth"}
    for name, part in variables.items():
        monkeypatch.setenv(name, str(folder / part))
    policy = DeepGenPolicy(resolution=(16, 24))
    assert (policy.pretrained, policy.language_folder) == (str(folder / "sd3"), str(folder / "language"))
    assert policy.checkpoint == folder / "checkpoint.pth"
    monkeypatch.delenv("CHECKPOINT")
    with pytest.raises(ConfigError, match="model.policy.checkpoint: give it, or set the environment variable CHECKPOINT"):
        DeepGenPolicy(resolution=(16, 24))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("meta_queries"), "no bridge .* meta_queries missing"),
        (lambda state: state.pop("projector_2.bias"), "1 missing: projector_2.bias"),
        (lambda state: state.update({"connector.extra": torch.zeros(1)}), "1 unknown: connector.extra"),
        (lambda state: state.update({"transformer.proj_out.bias": torch.zeros(48)}), "missing: .*context_embedder"),
        (lambda state: state.update({"lmm.model.layers.3.nothing.weight": torch.zeros(1)}), "no place in the language model"),
        (lambda state: state.update({"projector_3.bias": torch.full((24,), torch.nan)}), "NaN"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_listed(change: Any, message: str, folder: Path, tmp_path: Path) -> None:
    state = torch.load(folder / "checkpoint.pth")["state_dict"]
    change(state)
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(ConfigError, match=message):
        deepgen_policy(folder, checkpoint=str(tmp_path / "wrong.pth")).load()


def test_a_rank_that_is_not_the_files_is_refused(folder: Path) -> None:
    from lit_rl.policies.weights.lora import LoraSettings

    with pytest.raises(ConfigError, match="set model.policy.adapter.rank to 4"):
        deepgen_policy(folder, adapter=LoraSettings(rank=8, alpha=16.0)).load()
