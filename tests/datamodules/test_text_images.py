"""Rows of texts with images: where sources may stand, where images stand in a conversation, what is refused with line and field."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.pairs import PreferencePairs
from datamodules.prompts_text import TextPrompts
from datamodules.supervised import SupervisedText
from datamodules.text_files import InvalidRow
from datamodules.text_images import with_images
from lit_rl.errors import ConfigError
from lit_rl.miniatures.vlm import build_vlm
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.policies.vision_language import VisionLanguageModel

PART = {"type": "image"}


def png(seed: int = 0, size: tuple[int, int] = (64, 48)) -> bytes:
    buffer = BytesIO()
    Image.fromarray(np.random.RandomState(seed).randint(0, 255, (*size, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_vlm(tmp_path_factory.mktemp("vlm"), family="qwen3_vl")


@pytest.fixture
def policy(folder: Path) -> VisionLanguageModel:
    return VisionLanguageModel(str(folder))


def written(root: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    (root / "pictures").mkdir(exist_ok=True)
    (root / "pictures" / "a.png").write_bytes(png())
    Image.new("RGB", (900, 4)).save(root / "pictures" / "strip.png")
    Image.new("L", (9, 9)).save(root / "pictures" / "frames.gif", save_all=True, append_images=[Image.new("L", (9, 9), 200)])
    file = root / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def ready(data: Any, policy: CausalLM) -> Any:
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(policy=policy))
    data.setup("fit")
    return data


def user(content: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": content}]


URL = "data:image/png;base64," + base64.b64encode(png()).decode()
ROWS: dict[str, dict[str, Any]] = {
    "path": {"prompt": user("<image>?"), "images": ["pictures/a.png"]},
    "one path": {"prompt": user("<image>?"), "images": "pictures/a.png"},
    "data url": {"prompt": user("<image>?"), "images": [URL]},
    "object": {"prompt": user("<image>?"), "images": [{"bytes": None, "path": "pictures/a.png"}]},
    "part": {"prompt": user([PART, {"type": "text", "text": "?"}]), "images": ["pictures/a.png"]},
    "part with its source": {"prompt": user([{"type": "image", "image": "pictures/a.png"}, {"type": "text", "text": "?"}])},
    "part of OpenAI": {"prompt": user([{"type": "image_url", "image_url": {"url": URL}}, {"type": "text", "text": "?"}])},
    "no place": {"prompt": user("?"), "images": ["pictures/a.png"]},
}


@pytest.mark.parametrize("form", ROWS)
def test_every_form_of_a_row_gives_the_same_tokens_and_the_same_picture(form: str, tmp_path: Path, policy: VisionLanguageModel) -> None:
    data = ready(TextPrompts(train=written(tmp_path, [ROWS[form]])), policy)
    (row,) = data.train_prompts
    wanted = policy.encode(user([PART, {"type": "text", "text": "?"}]))
    wanted, _ = policy.with_pictures(wanted, [False] * len(wanted), [(64, 48)])
    assert data.prompt_ids(row) == wanted and len(wanted) > 20 and data.max_tokens == {"prompt": len(wanted)}
    (picture,) = data.media(row)
    pixels = torch.from_numpy(np.array(Image.open(BytesIO(png())))).permute(2, 0, 1)
    assert torch.equal(picture, policy.media([pixels])[0]) and picture.dtype == torch.uint8
    assert data.media(row)[0] is picture  # held


def test_parquet_with_bytes_as_datasets_writes_it(tmp_path: Path, policy: VisionLanguageModel) -> None:
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    message = List({"role": Value("string"), "content": Value("string")})
    features = Features({"prompt": message, "images": List(ImageFeature())})
    rows = {"prompt": [user("<image> and <image>?"), user("none?")], "images": [[Image.open(BytesIO(png(i))) for i in (1, 2)], []]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    data = ready(TextPrompts(train=str(tmp_path / "train.parquet")), policy)
    two, none = data.train_prompts
    assert [len(data.media(row)) for row in (two, none)] == [2, 0] and "images" not in none
    assert [part["type"] for part in two["prompt"][0]["content"]] == ["image", "text", "image", "text"]
    assert torch.equal(data.media(two)[1], policy.media([torch.from_numpy(np.array(Image.open(BytesIO(png(2))))).permute(2, 0, 1)])[0])


def test_a_row_may_hold_pictures_of_pillow(tmp_path: Path) -> None:
    row = with_images({"prompt": user("?")}, given=[Image.open(BytesIO(png()))], key="images", folder=tmp_path)
    assert np.array_equal(np.array(Image.open(BytesIO(row["images"][0]))), np.array(Image.open(BytesIO(png()))))  # type: ignore[index]


def test_pictures_of_every_mode_are_read_upright_as_large_as_their_places(tmp_path: Path, policy: VisionLanguageModel) -> None:
    """Grey, with a palette, half transparent, of 16 bits, turned by EXIF, and as large as a camera's."""
    pixels = Image.open(BytesIO(png(size=(90, 200))))
    turned = pixels.getexif()
    turned[0x0112] = 6
    kinds = {
        "grey.png": pixels.convert("L"),
        "palette.png": pixels.convert("P"),
        "clear.png": pixels.convert("RGBA"),
        "deep.png": Image.fromarray(np.linspace(0, 65535, 90 * 200).reshape(90, 200).astype(np.uint16)),
        "large.jpg": pixels.resize((4032, 3024)),
    }
    for name, image in kinds.items():
        image.save(tmp_path / name)
    pixels.save(tmp_path / "turned.jpg", exif=turned)
    names = [*kinds, "turned.jpg"]
    data = ready(TextPrompts(train=written(tmp_path, [{"prompt": user("?"), "images": [name]} for name in names])), policy)
    for name, row in zip(names, data.train_prompts, strict=True):
        (picture,) = data.media(row)
        assert policy.misplaced(data.prompt_ids(row), [picture]) == "", name
        assert (picture.shape[1] > picture.shape[2]) == (name == "turned.jpg"), name


def test_relative_paths_count_from_the_folder_of_the_file_or_from_the_one_that_is_given(
    tmp_path: Path, policy: VisionLanguageModel
) -> None:
    file = written(tmp_path, [{"prompt": user("<image>?"), "images": ["a.png"]}])
    with pytest.raises(ConfigError, match=rf"rows.jsonl:1: images\[0\]: no such file {tmp_path}/a.png"):
        ready(TextPrompts(train=file), policy)
    assert ready(TextPrompts(train=file, image_folder=str(tmp_path / "pictures")), policy).train_prompts


def test_conversations_learn_answers_beside_images(tmp_path: Path, policy: VisionLanguageModel) -> None:
    turns = [*user("<image>a"), {"role": "assistant", "content": "b"}, *user("and <image>?"), {"role": "assistant", "content": "cd"}]
    rows = [{"messages": turns, "images": ["pictures/a.png"] * 2}, {"prompt": "a", "response": "b", "images": ["pictures/a.png"]}]
    data = ready(SupervisedText(train=written(tmp_path, rows), chat=True), policy)
    for row, wanted in zip(data.train_prompts, ("b<|im_end|>cd<|im_end|>", "b<|im_end|>")):
        ids, learned = data.supervised_ids(row)
        assert policy.tokenizer.decode([i for i, kept in zip(ids, learned) if kept]) == wanted
        assert policy.misplaced(ids, data.media(row)) == ""
    assert len(data.train_prompts[0]["prompt"]) == 3


def test_pairs_have_their_images_in_the_prompt(tmp_path: Path, policy: VisionLanguageModel) -> None:
    rows = [{"prompt": user("<image>?"), "chosen": "yes", "rejected": "no", "images": ["pictures/a.png"]}]
    file = written(tmp_path, rows)
    data = ready(PreferencePairs(train=file), policy)
    prompt, chosen, rejected = data.pair_ids(data.train_prompts[0])
    assert policy.misplaced(prompt, data.media(data.train_prompts[0])) == ""
    assert [policy.decode(answer) for answer in (chosen, rejected)] == ["yes", "no"]
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: prompt: has \d+ tokens with its images, which data.max_length=20 cuts"):
        ready(PreferencePairs(train=file, max_length=20), policy)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "missing file": ({"prompt": user("<image>?"), "images": ["b.png"]}, r"images\[0\]: no such file .*b.png"),
    "no image": ({"prompt": user("<image>?"), "images": ["rows.jsonl"]}, r"images\[0\]: .*rows.jsonl is not an image that can be read"),
    "network": ({"prompt": user("<image>?"), "images": ["https://x/y.png"]}, r"images\[0\]: 'https://x/y.png' is on the network; download"),
    "number": ({"prompt": user("<image>?"), "images": [7]}, r"images\[0\]: expected the path of an image, bytes or a picture, found int"),
    "empty object": ({"prompt": user("<image>?"), "images": [{"name": "a"}]}, r"images\[0\]: expected a path, bytes or .*\['name'\]"),
    "half a data url": ({"prompt": user("?"), "images": ["data:image/png;base64,A"]}, r"images\[0\]: `image` is not base64"),
    "too few": ({"prompt": user("<image><image>?"), "images": ["pictures/a.png"]}, "prompt: it has 2 places for images, and the row has 1"),
    "too many": ({"prompt": user([PART]), "images": ["pictures/a.png"] * 2}, "prompt: it has 1 places for images, and the row has 2"),
    "no images": ({"prompt": user([PART])}, "prompt: it has 1 places for images, and the row has 0"),
    "both": (
        {"prompt": user([{"type": "image", "image": "pictures/a.png"}]), "images": ["pictures/a.png"]},
        "images: the conversation names its images itself",
    ),
    "a string": (
        {"prompt": "<image>?", "images": ["pictures/a.png"]},
        "images: images stand in conversations, and the prompt is a string: set data.chat to true",
    ),
    "a place alone": ({"prompt": user("<image>?"), "image": "pictures/a.png"}, "images: the text has a place <image>, .* data.images_key"),
    "an empty name": ({"prompt": user("?"), "images": ""}, r"images\[0\]: is empty: name an image, or leave the field out"),
    "a strip": ({"prompt": user("?"), "images": ["pictures/strip.png"]}, "a picture of 900 x 4 pixels .*; crop it"),
    "frames": ({"prompt": user("?"), "images": ["pictures/frames.gif"]}, r"images\[0\]: .*it holds 2 frames; save the one that is meant"),
    "a place in letters": ({"prompt": user("a <|image_pad|> b")}, r"0 images and 1 places .* take <\|image_pad\|> out of what is text"),
    "a film": ({"prompt": user([{"type": "video", "video": "a.mp4"}])}, r'prompt\[0\].content\[0\]: expected {"type": "text"'),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_used_is_told_with_line_and_field(case: str, tmp_path: Path, policy: VisionLanguageModel) -> None:
    row, message = WRONG[case]
    with pytest.raises(ConfigError, match=rf"(?s)rows.jsonl:2: {message}"):
        ready(TextPrompts(train=written(tmp_path, [ROWS["path"], row])), policy)


@pytest.mark.parametrize("prompt", ["a", user("a")], ids=["text", "conversation"])
def test_answers_that_hold_the_letters_of_a_place_are_told_before_anything_trains(
    prompt: object, tmp_path: Path, policy: VisionLanguageModel
) -> None:
    row = {"prompt": prompt, "response": "<|image_pad|>", "chosen": "b", "rejected": "<|image_pad|>"}
    for kind in (SupervisedText, PreferencePairs):
        with pytest.raises(ConfigError, match="rows.jsonl:1: an answer that is learned holds a token that stands for pictures"):
            ready(kind(train=written(tmp_path, [row])), policy)


def test_a_file_that_is_cut_off_is_told_with_row_and_field_when_it_is_read(tmp_path: Path, policy: VisionLanguageModel) -> None:
    """Its header is whole."""
    file = written(tmp_path, [ROWS["path"], {"prompt": user("?"), "images": ["pictures/half.png"]}])
    (tmp_path / "pictures" / "half.png").write_bytes(png()[:2000])
    data = ready(TextPrompts(train=file), policy)
    with pytest.raises(ConfigError, match=r"rows-1: images\[0\]: .*half.png cannot be read .*write the image again or take the item out"):
        data.media(data.train_prompts[1])


def test_an_answer_that_is_an_image_is_refused_and_one_before_it_is_not(tmp_path: Path, policy: VisionLanguageModel) -> None:
    drawn: dict[str, Any] = {"role": "assistant", "content": [PART, {"type": "text", "text": "b"}]}
    turns = [*user("draw"), drawn, *user("and?"), {"role": "assistant", "content": "c"}]
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: messages\[1\]: an answer with an image cannot be learned"):
        ready(SupervisedText(train=written(tmp_path, [{"messages": turns, "images": ["pictures/a.png"]}])), policy)
    turns[1] = drawn | {"weight": 0}
    (row,) = (
        data := ready(SupervisedText(train=written(tmp_path, [{"messages": turns, "images": ["pictures/a.png"]}])), policy)
    ).train_prompts
    ids, learned = data.supervised_ids(row)
    assert policy.decode([i for i, kept in zip(ids, learned) if kept]) == "c" and policy.misplaced(ids, data.media(row)) == ""


def test_a_missing_file_is_not_left_out_in_silence(tmp_path: Path, policy: VisionLanguageModel) -> None:
    file = written(tmp_path, [ROWS["path"], {"prompt": user("<image>?"), "images": ["b.png"]}])
    with pytest.raises(ConfigError, match="no such file"):
        ready(TextPrompts(train=file, filter_overlong_prompts=True), policy)


def test_prompts_with_images_are_left_out_or_refused_but_never_cut(tmp_path: Path, policy: VisionLanguageModel) -> None:
    file = written(tmp_path, [ROWS["path"], {"prompt": user("b")}])
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: prompt: has \d+ tokens with its images, .* images cannot be cut"):
        ready(TextPrompts(train=file, max_prompt_length=24, truncation="left"), policy)
    kept = ready(TextPrompts(train=file, max_prompt_length=24, filter_overlong_prompts=True), policy)
    assert [row["prompt"][0]["content"] for row in kept.train_prompts] == ["b"]


def test_a_conversation_whose_images_are_cut_off_is_left_out(tmp_path: Path, policy: VisionLanguageModel) -> None:
    turns = [*user("a"), {"role": "assistant", "content": "b"}, *user("<image>?"), {"role": "assistant", "content": "c"}]
    file = written(tmp_path, [{"messages": turns, "images": ["pictures/a.png"]}, {"messages": turns[:2]}])
    assert len(ready(SupervisedText(train=file, max_length=31), policy).train_prompts) == 1
    assert len(ready(SupervisedText(train=file, max_length=160), policy).train_prompts) == 2


def test_a_model_of_text_says_what_reads_images(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match="there are 1 images, and CausalLM reads text only: set model.policy to lit_rl.policies.vision"):
        ready(TextPrompts(train=written(tmp_path, [ROWS["path"]])), CausalLM(str(folder)))


def test_the_answer_of_a_row_keeps_its_words(tmp_path: Path) -> None:
    turns = [*user("<image>?"), {"role": "assistant", "content": "I see <image>"}]
    row = with_images({"messages": turns}, given=["a.png"], key="images", folder=tmp_path)
    assert row["messages"][1]["content"] == "I see <image>"  # type: ignore[index]
    with pytest.raises(InvalidRow, match="messages: it has 2 places"):
        with_images({"messages": [*user("<image>"), *turns]}, given=["a.png"], key="images", folder=tmp_path)
