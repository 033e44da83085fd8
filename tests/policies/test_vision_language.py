"""Vision-language models: log-probabilities with ragged pictures, places of pictures, what is trained, what is saved, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lit_rl.errors import ConfigError
from lit_rl.merge import merge
from lit_rl.miniatures.lm import build_lm
from lit_rl.miniatures.vlm import Family, build_vlm
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.policies.critic import Critic
from lit_rl.policies.vision_language import VisionLanguageModel
from lit_rl.policies.weights.lora import LoraSettings
from lit_rl.rollouts.base import Request, Sampling
from lit_rl.rollouts.hf import HFEngine
from lit_rl.rollouts.start_check import check_logprobs, check_sampler

FAMILIES: Sequence[Family] = get_args(Family)
DENSE = FAMILIES[:2]
"""Those without experts."""

LAYOUTS: Sequence[Sequence[tuple[int, int]]] = [[(64, 64)], [], [(64, 64), (128, 96)], [(20, 300)], [(100, 70), (30, 30), (600, 600)]]
"""(height, width) of the pictures of each row of a batch."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vlms")
    return {family: build_vlm(root / family, family=family) for family in FAMILIES}


def loaded(folder: Path, **settings: Any) -> VisionLanguageModel:
    torch.manual_seed(0)
    policy = VisionLanguageModel(str(folder), **settings)
    policy.load()
    return policy


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).randint(0, 255, (3, height, width), dtype=np.uint8))


def conversation(count: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}] * count + [{"type": "text", "text": "count the dots"}]}]


def prompt(policy: VisionLanguageModel, sizes: Sequence[tuple[int, int]]) -> tuple[list[int], Sequence[Tensor]]:
    ids = policy.encode(conversation(len(sizes)))
    pictures = policy.media([picture(*size, seed) for seed, size in enumerate(sizes)])
    return policy.with_pictures(ids, [False] * len(ids), sizes)[0], pictures


Rows = tuple[Tensor, Tensor, Tensor, list[Sequence[Tensor]]]


def rows(policy: VisionLanguageModel, layouts: Sequence[Sequence[tuple[int, int]]] = LAYOUTS) -> Rows:
    """Tokens, lengths, mask and media of a batch whose answers have 3 to 7 tokens."""
    found = [prompt(policy, sizes) for sizes in layouts]
    answers = [policy.encode("forty2!")[: 3 + i] for i in range(len(layouts))]
    lengths = torch.tensor([len(ids) + len(answer) for (ids, _), answer in zip(found, answers)])
    tokens = torch.full((len(layouts), int(lengths.max())), 10**6)
    mask = torch.zeros(len(layouts), tokens.shape[1] - 1, dtype=torch.bool)
    for i, ((ids, _), answer) in enumerate(zip(found, answers)):
        tokens[i, : lengths[i]] = torch.tensor([*ids, *answer])
        mask[i, len(ids) - 1 : lengths[i] - 1] = True
    return tokens, lengths, mask, [media for _, media in found]


@torch.no_grad()
def stock(policy: VisionLanguageModel, batch: Rows, layouts: Sequence[Sequence[tuple[int, int]]] = LAYOUTS) -> Tensor:
    """Log-probabilities by transformers' own model and image processor from the pictures as they were, one row at a time."""
    tokens, lengths, mask, _ = batch
    processor = Qwen2VLImageProcessorPil.from_pretrained(policy.pretrained)
    lm: Any = policy.network.lm
    result = torch.zeros(mask.shape)
    for i, n in enumerate(lengths.tolist()):
        images = [Image.fromarray(picture(*size, seed).permute(1, 2, 0).numpy()) for seed, size in enumerate(layouts[i])]
        seen = dict(processor(images=images, return_tensors="pt")) if images else {}
        kinds = (tokens[i : i + 1, :n] == lm.config.image_token_id).int()
        logp = lm(input_ids=tokens[i : i + 1, :n], mm_token_type_ids=kinds, **seen).logits[0].float().log_softmax(-1)
        result[i, : n - 1] = logp[:-1].gather(-1, tokens[i, 1:n, None])[:, 0]
    return result * mask


# ---------------------------------------------------------------------- log-probabilities
@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_transformers_whatever_a_row_is_batched_with(
    folders: dict[str, Path], family: Family, padding_free: bool
) -> None:
    policy = loaded(folders[family], padding_free=padding_free)
    batch = rows(policy)
    with torch.no_grad():
        found, entropy = policy.logprobs(*batch[:3], media=batch[3], entropy=True)
    torch.testing.assert_close(found, stock(policy, batch), atol=2e-6, rtol=0)
    assert entropy is not None and (entropy[batch[2]] > 0).all()


def test_larger_pictures_are_scaled_down_to_the_limit(folders: dict[str, Path]) -> None:
    policy = loaded(folders["qwen3_vl"], max_pixels=64 * 64)
    ids, media = prompt(policy, [(600, 600)])
    assert [tuple(one.shape) for one in media] == [(3, 64, 64)] and ids.count(policy.picture_id) == 4


@pytest.mark.parametrize("family", DENSE)
def test_recomputed_blocks_give_the_same_gradient(folders: dict[str, Path], family: Family) -> None:
    gradients = []
    for again in (False, True):
        policy = loaded(folders[family], gradient_checkpointing=again, train_vision=True)
        batch = rows(policy, LAYOUTS[:3])
        policy.logprobs(*batch[:3], media=batch[3])[0].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for _, p in policy.trainable() if p.grad is not None]))
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", DENSE)
def test_a_batch_without_pictures_gives_the_tower_a_gradient_of_zero(folders: dict[str, Path], family: Family) -> None:
    policy = loaded(folders[family], train_vision=True)
    runs = []
    policy.network.get_submodule("lm.model.visual").register_forward_hook(lambda *_: runs.append(1))
    batch = rows(policy, [[], []])
    found, _ = policy.logprobs(*batch[:3])
    torch.testing.assert_close(found, stock(policy, batch, [[], []]), atol=2e-6, rtol=0)
    found.sum().backward()
    tower = [p.grad for name, p in policy.trainable() if ".visual." in name]
    assert len(runs) == 1 and tower and all(grad is not None and not grad.any() for grad in tower)


def test_a_sampled_place_of_a_picture_changes_no_token_before_it_and_stops_nothing(folders: dict[str, Path]) -> None:
    policy = loaded(folders["qwen3_vl"])
    tokens, lengths, mask, media = rows(policy, LAYOUTS[:3])
    clean, _ = policy.logprobs(tokens, lengths, mask, media=media)
    tokens[0, lengths[0] - 2] = policy.picture_id
    found, _ = policy.logprobs(tokens, lengths, mask, media=media)
    torch.testing.assert_close(found[1:], clean[1:])
    assert torch.equal(found[0, : lengths[0] - 3], clean[0, : lengths[0] - 3]) and found.isfinite().all()


def test_more_places_than_pieces_are_an_error_that_names_the_row(folders: dict[str, Path]) -> None:
    policy = loaded(folders["qwen3_vl"])
    tokens, lengths, mask, media = rows(policy, LAYOUTS[:3])
    with pytest.raises(ValueError, match="row 2 of a micro-batch has 16 places for 4 pieces of its 1 pictures"):
        policy.logprobs(tokens, lengths, mask, media=[*media[:2], media[2][:1]])
    with pytest.raises(ValueError, match="row 1 of a micro-batch has 0 places for 4 pieces"):
        policy.logprobs(tokens, lengths, mask, media=[media[0], media[0], media[2]])


@pytest.mark.parametrize("family", DENSE)
def test_the_critic_sees_pictures(folders: dict[str, Path], family: Family) -> None:
    policy, critic = loaded(folders[family]), Critic()
    critic.load(beside=policy)
    torch.nn.init.normal_(critic.network.head.weight)
    tokens, lengths, mask, media = rows(policy, [[(64, 64)], [(64, 64)]])
    other = [media[0], policy.media([picture(64, 64, 9)])]
    tokens[1], lengths[1], mask[1] = tokens[0], lengths[0], mask[0]
    values = critic.values(tokens, lengths, mask, media=other, beside=policy)
    assert (values[0] - values[1]).abs()[mask[0]].min() > 1e-6
    assert not any(p.requires_grad for name, p in critic.named_parameters() if ".visual." in name)


# ---------------------------------------------------------------------- places of pictures
@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("sizes", LAYOUTS)
def test_a_picture_has_as_many_places_as_the_processor_makes_pieces_of_it(
    folders: dict[str, Path], family: Family, sizes: Sequence[tuple[int, int]]
) -> None:
    policy = VisionLanguageModel(str(folders[family]))
    ids, media = prompt(policy, sizes)
    if sizes:
        grid = policy.pictures.patches(media)[1]
        assert ids.count(policy.picture_id) == int(grid.prod(1).sum()) // 4
    assert policy.misplaced(ids, media) == ""
    assert ("0 places" in policy.misplaced(policy.encode("a"), media)) == bool(sizes)


@pytest.mark.parametrize("family", DENSE)
def test_a_server_that_resizes_what_it_is_sent_changes_nothing(folders: dict[str, Path], family: Family) -> None:
    """Strips, of which the stock processor takes a piece away each time; limits without a size between them change no place either."""
    policy = VisionLanguageModel(str(folders[family]))
    for size in [(20, 1900), (23, 1843), (1, 150), (1, 1), (700, 4000), (150, 1)]:
        ids, (sent,) = prompt(policy, [size])
        read = dict(policy.pictures.stock(images=[sent], return_tensors="pt"))
        assert ids.count(policy.picture_id) == int(read["image_grid_thw"].prod()) // 4 and policy.misplaced(ids, [sent]) == "", size
    fixed = VisionLanguageModel(str(folders[family]), min_pixels=224 * 224, max_pixels=224 * 224)
    ids, media = prompt(fixed, [(100, 130), (300, 200)])
    assert fixed.misplaced(ids, media) == "" and fixed.pictures.resized_size((100, 130)) != fixed.pictures.resized_size((224, 280))


def test_pictures_and_places_that_differ_in_number_are_refused(folders: dict[str, Path]) -> None:
    policy = VisionLanguageModel(str(folders["qwen3_vl"]))
    ids = policy.encode(conversation(1))
    with pytest.raises(ConfigError, match="2 images and 1 places for them in the text: give the prompt as messages"):
        policy.with_pictures(ids, [False] * len(ids), [(64, 64), (64, 64)])
    with pytest.raises(ConfigError, match="an answer that is learned holds a token that stands for pictures"):
        policy.with_pictures(ids, [True] * len(ids), [(64, 64)])
    with pytest.raises(ConfigError, match=r"a picture of 9000 x 20 pixels \(width x height\) cannot be read"):
        policy.with_pictures(ids, [False] * len(ids), [(20, 9000)])


def test_limits_of_pixels_that_leave_no_size_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="min_pixels=90000 is more than max_pixels=50176: raise max_pixels"):
        VisionLanguageModel(str(folders["qwen3_vl"]), min_pixels=90_000).pictures.tokens((64, 64))
    with pytest.raises(ConfigError, match="max_pixels=0 must be at least 1"):
        VisionLanguageModel(str(folders["qwen3_vl"]), max_pixels=0)


def test_a_model_of_text_refuses_pictures_and_is_refused(tmp_path: Path) -> None:
    folder = str(build_lm(tmp_path, hidden=32))
    with pytest.raises(ConfigError, match="is a qwen2, and VisionLanguageModel reads qwen2_5_vl, qwen3_vl, qwen3_vl_moe"):
        VisionLanguageModel(folder)
    with pytest.raises(ConfigError, match="there are 1 images, and CausalLM reads text only: set model.policy to"):
        CausalLM(folder).with_pictures([5], [False], [(64, 64)])


# ---------------------------------------------------------------------- what is trained, what is saved
@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4, alpha=8)], ids=["full", "lora"])
@pytest.mark.parametrize("train_vision", [False, True])
def test_the_tower_is_trained_on_request_only(
    folders: dict[str, Path], family: Family, lora: Any, train_vision: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    policy = loaded(folders[family], lora=lora, train_vision=train_vision)
    names = [name for name, _ in policy.trainable()]
    if lora:
        assert ("linear layers beside the decoder" in caplog.text) == train_vision
    assert any(".visual." in name for name in names) == train_vision
    assert all("language_model.layers" in name or ".visual." in name or lora is None for name in names)
    assert any(".visual." in key for key in policy.checkpoint_keys()) == train_vision
    if lora:
        assert len([name for name in names if ".language_model." in name]) == 2 * 7 * 2  # two layers of seven, A and B


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train_vision", [False, True])
def test_exports_load_in_stock_transformers_and_peft(folders: dict[str, Path], tmp_path: Path, family: Family, train_vision: bool) -> None:
    batch = rows(loaded(folders[family]), LAYOUTS[:3])
    for lora in (None, LoraSettings(rank=4, alpha=8)):
        policy = loaded(folders[family], lora=lora, train_vision=train_vision)
        for _, parameter in policy.trainable():
            parameter.data += 0.02 * torch.randn(parameter.shape)
        with torch.no_grad():
            trained, _ = policy.logprobs(*batch[:3], media=batch[3])
        folder = tmp_path / ("full" if lora is None else "lora")
        folder.mkdir()
        policy.save(folder, {name: p.detach() for name, p in policy.trainable()})
        again = loaded(folder if lora is None else folders[family])
        if lora is not None:
            base: Any = transformers.AutoModelForImageTextToText.from_pretrained(folders[family])
            again.network.lm = PeftModel.from_pretrained(base, folder).merge_and_unload()  # type: ignore[operator]
        torch.testing.assert_close(stock(again, batch, LAYOUTS[:3]), trained, atol=5e-5, rtol=0)
        if lora is not None:
            whole = merge(folder, tmp_path / "merged")
            for source, adapter in ((folder, LoraSettings()), (whole, None)):
                continued = loaded(source, lora=adapter, train_vision=train_vision)
                with torch.no_grad():
                    torch.testing.assert_close(continued.logprobs(*batch[:3], media=batch[3])[0], trained, atol=5e-5, rtol=0)


def test_experts_are_exported_as_they_are_published(folders: dict[str, Path], tmp_path: Path) -> None:
    """ "experts in out", which vLLM turns; in memory they lie the other way."""
    policy = loaded(folders["qwen3_vl_moe"])
    policy.save(tmp_path, {name: p.detach() for name, p in policy.trainable()})
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        for name in ("gate_up_proj", "down_proj"):
            inside = policy.network.get_parameter(f"lm.model.language_model.layers.1.mlp.experts.{name}")
            assert torch.equal(file.get_tensor(f"model.language_model.layers.1.mlp.experts.{name}"), inside.transpose(1, 2))


@pytest.mark.parametrize("family", DENSE)
def test_a_model_whose_output_layer_is_its_embedding_is_exported_as_such(tmp_path: Path, family: Family) -> None:
    """The smallest Qwen2.5-VL and Qwen3-VL are such models."""
    policy = loaded(build_vlm(tmp_path / "tied", family=family, tied=True))
    batch = rows(policy, LAYOUTS[:3])
    for _, parameter in policy.trainable():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    with torch.no_grad():
        trained, _ = policy.logprobs(*batch[:3], media=batch[3])
    (tmp_path / "out").mkdir()
    policy.save(tmp_path / "out", {name: p.detach() for name, p in policy.trainable()})
    torch.testing.assert_close(stock(loaded(tmp_path / "out"), batch, LAYOUTS[:3]), trained, atol=5e-5, rtol=0)


# ---------------------------------------------------------------------- generation
@pytest.mark.parametrize("family", FAMILIES)
def test_generated_answers_have_the_log_probabilities_that_train_and_no_token_of_pictures(folders: dict[str, Path], family: Family) -> None:
    policy = loaded(folders[family], lora=LoraSettings(rank=4, alpha=8))
    head: Any = policy.network.lm.get_output_embeddings()
    head.weight.data[policy.banned_ids] *= 30  # likely where they are not banned
    engine = HFEngine(batch=4)
    engine.setup(policy, rank=0, world_size=1)
    found = [prompt(policy, sizes) for sizes in LAYOUTS]
    requests = [Request(ids, (i,), media) for i, (ids, media) in enumerate(found)]
    samples = engine.generate(requests, Sampling(max_new_tokens=8))
    alone = [engine.generate([request], Sampling(max_new_tokens=8))[0] for request in requests]
    assert [sample.ids for sample in samples] == [sample.ids for sample in alone]
    assert not {i for sample in samples for i in sample.ids} & set(policy.banned_ids)
    for request, sample in zip(requests, samples):
        row = torch.tensor([[*request.prompt, *sample.ids]])
        mask = torch.arange(row.shape[1] - 1)[None] >= len(request.prompt) - 1
        with torch.no_grad():
            mine, _ = policy.logprobs(row, torch.tensor([row.shape[1]]), mask, media=[request.media])
        torch.testing.assert_close(mine[mask], torch.tensor(sample.logprobs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_start_checks_look_at_a_picture(folders: dict[str, Path], family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = loaded(folders[family], padding_free=True)
    engine = HFEngine()
    engine.setup(policy, rank=0, world_size=1)
    check_logprobs(policy, world_size=1)
    check_sampler(policy, engine, Sampling(max_new_tokens=4), world_size=1)
    monkeypatch.setattr(policy, "generation_inputs", lambda ids, media: {})  # an engine that does not show them
    with pytest.raises(ConfigError, match="the log-probabilities that HFEngine samples with are"):
        check_sampler(policy, engine, Sampling(max_new_tokens=4), world_size=1)
    read = policy.pictures.patches
    calls: list[int] = []

    def dark(pictures: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        calls.append(1)
        patches, grid = read(pictures)
        return (patches if len(calls) % 2 else -patches), grid  # another picture in every second forward

    monkeypatch.setattr(policy.pictures, "patches", dark)
    with pytest.raises(ConfigError, match="the log-probabilities that training computes are"):
        check_logprobs(policy, world_size=1)


def test_a_vocabulary_of_a_few_words_has_each_as_one_token_and_passes_the_check(tmp_path: Path) -> None:
    """The check tries words that stand for no picture, however few there are."""
    policy = loaded(build_vlm(tmp_path, family="qwen3_vl", characters="\n", words=("click", " red", " 1", " 2"), hidden=32, layers=1))
    ids = policy.encode("click 1 2")
    assert len(ids) == 3 and policy.decode(ids) == "click 1 2" and policy.decode(policy.encode("click red")) == "click red"
    check_logprobs(policy, world_size=1)
