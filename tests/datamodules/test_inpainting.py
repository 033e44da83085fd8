"""Inpainting items: what a file says becomes prompts with images, and what is wrong in it is told by name."""

from __future__ import annotations

import json
import pickle
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from PIL import Image
from torch import Tensor
from toy import toy_method, toy_trainer

from callbacks.image_writer import ImageWriter
from callbacks.sample_gallery import SampleGallery
from datamodules.inpainting import Inpainting, main
from datamodules.inpainting_items import FIELDS
from datamodules.lazy import ImageCache, LazyRow
from lit_rl.errors import ConfigError

BOX = (10, 4, 30, 12)  # of the mask: left, top, right, bottom
WIDTH, HEIGHT = 48, 24


def noise(seed: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 256, (height, width, 3), dtype=np.uint8)


def save(path: Path, image: np.ndarray) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path.name


def save_mask(path: Path, box: tuple[int, int, int, int] = BOX, *, width: int = WIDTH, height: int = HEIGHT, white: int = 255) -> str:
    mask = np.zeros((height, width), np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = white
    return save(path, mask)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """imgs/ with source.png, mask.png and two references."""
    save(tmp_path / "imgs/source.png", noise(0))
    save(tmp_path / "imgs/other.png", noise(1))
    save_mask(tmp_path / "imgs/mask.png")
    for i, size in enumerate([(7, 5), (9, 30)]):
        save(tmp_path / f"imgs/r{i}.png", noise(10 + i, *size))
    return tmp_path


def item(**fields: Any) -> dict[str, Any]:
    """An entry; None takes a field away."""
    return {k: v for k, v in {"source": "source.png", "mask": "mask.png", "text": "MOCHA", **fields}.items() if v is not None}


def write(folder: Path, *items: Any, name: str = "data.json", **head: Any) -> str:
    path = folder / name
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(i, ensure_ascii=False) for i in items), encoding="utf-8")
    else:
        path.write_text(json.dumps({"version": 1, "root": "imgs", "items": items} | head), encoding="utf-8")
    return str(path)


def data(*args: Any, **kwargs: Any) -> Inpainting:
    return Inpainting(*args, **{"resolution": (HEIGHT, WIDTH)} | kwargs)


def pixels(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


# ------------------------------------------------------------------ what a prompt holds


def test_a_prompt_holds_text_and_images(folder: Path) -> None:
    (row,) = data(write(folder, item(id="cafe-01", reference="r0.png"))).train_prompts
    assert {k: row[k] for k in ("prompt", "id", "text", "target")} == {
        "prompt": "The text is 'MOCHA'.",
        "id": "cafe-01",
        "text": "MOCHA",
        "target": "MOCHA",
    }
    assert torch.equal(row["source"], pixels(noise(0))) and torch.equal(row["reference"], pixels(noise(10, 7, 5)))
    expected = torch.zeros(HEIGHT, WIDTH, dtype=torch.uint8)
    expected[4:12, 10:30] = 255
    assert torch.equal(row["mask"], expected)


def test_without_a_reference_the_style_is_the_masked_part_of_the_source(folder: Path) -> None:
    """At the file's own resolution: the published references are that crop, pixel for pixel."""
    (row,) = data(write(folder, item()), resolution=(16, 16)).train_prompts
    assert torch.equal(row["reference"], pixels(noise(0)[4:12, 10:30]))
    assert row["source"].shape == (3, 16, 16) and row["mask"].shape == (16, 16)


@pytest.mark.parametrize("white", [1, 255])
def test_masks_are_white_wherever_they_are_not_black_and_stay_binary(folder: Path, white: int) -> None:
    """48 x 24 -> 24 x 12: columns 10-29 become 5-14, rows 4-11 become 2-5."""
    save_mask(folder / "imgs/mask.png", white=white)
    (row,) = data(write(folder, item()), resolution=(12, 24)).train_prompts
    expected = torch.zeros(12, 24, dtype=torch.uint8)
    expected[2:6, 5:15] = 255
    assert torch.equal(row["mask"], expected)


def test_every_reference_is_a_sample(folder: Path) -> None:
    rows = data(write(folder, item(id="a", reference=["r0.png", "r1.png"]), item())).train_prompts
    assert [row["id"] for row in rows] == ["a#1", "a#2", "1"]
    assert [tuple(row["reference"].shape) for row in rows] == [(3, 5, 7), (3, 30, 9), (3, 8, 20)]


@pytest.mark.parametrize("text", ["don't panic", 'say "hi"', "{braces}", "Été 漢字"])
def test_any_text_can_be_wanted(folder: Path, text: str) -> None:
    row, own = data(write(folder, item(text=text), item(text=text, prompt="Paint it.")), template="It says “{text}”").train_prompts
    assert row["prompt"] == f"It says “{text}”" and own["prompt"] == "Paint it."
    assert row["target"] == row["text"] == own["target"] == text


def test_transparent_and_turned_pictures_are_seen_as_people_see_them(folder: Path) -> None:
    """A pixel without opacity is white; a photograph taken sideways (EXIF 6) is 48 x 24 when it stands upright."""
    rgba = np.dstack([noise(0), np.full((HEIGHT, WIDTH), 255, np.uint8)])
    rgba[0, 0, 3] = 0
    save(folder / "imgs/clear.png", rgba)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(noise(1)).copy()).save(folder / "imgs/photo.webp", exif=exif, lossless=True)
    clear, photo = data(write(folder, item(source="clear.png"), item(source="photo.webp"))).train_prompts
    assert clear["source"][:, 0, 0].tolist() == [255] * 3 and torch.equal(clear["source"][:, 1:], pixels(noise(0))[:, 1:])
    assert torch.equal(photo["source"], pixels(noise(1)))


def test_masks_are_what_people_see_in_whatever_way_they_were_saved(folder: Path) -> None:
    """Drawn on a transparent layer; taken sideways (EXIF 6); a JPEG, whose black has grey rings; 16 bits. All of the same region."""
    box = np.zeros((HEIGHT, WIDTH), np.uint8)
    box[4:12, 10:30] = 255
    save(folder / "imgs/layer.png", np.dstack([np.full((HEIGHT, WIDTH, 3), 255, np.uint8), box]))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(box).copy()).save(folder / "imgs/turned.webp", exif=exif, lossless=True)
    Image.fromarray(box).save(folder / "imgs/rings.jpg", quality=85)
    assert (np.asarray(Image.open(folder / "imgs/rings.jpg"))[box == 0] > 0).any(), "or the test would test nothing"
    save(folder / "imgs/deep.png", box.astype(np.uint16) * 257)
    save(folder / "imgs/labels.png", box.astype(np.uint16) // 255)
    save(folder / "imgs/ones.png", box // 255)
    Image.fromarray(box).save(folder / "imgs/rings.webp", quality=40)
    Image.fromarray(box).save(folder / "imgs/rings.jp2", quality_mode="rates", quality_layers=[3], irreversible=True)
    Image.fromarray(box).convert("RGB").save(folder / "imgs/rings.tiff", compression="jpeg", quality=60)
    assert all((np.asarray(Image.open(folder / f"imgs/rings.{kind}").convert("L"))[box == 0] > 0).any() for kind in ("webp", "jp2", "tiff"))
    Image.fromarray(box.astype(np.float32) / 255).save(folder / "imgs/float.tiff")
    Image.fromarray(box.astype(np.int32) * 257).save(folder / "imgs/int.tiff")
    Image.fromarray(box).convert("1").save(folder / "imgs/bits.png")
    palette = Image.fromarray(box // 255, mode="P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    palette.save(folder / "imgs/palette.png")
    Image.fromarray(box).convert("RGB").convert("CMYK").save(folder / "imgs/cmyk.tiff")
    masks = ["layer.png", "turned.webp", "rings.jpg", "deep.png", "labels.png", "ones.png", "rings.webp", "rings.jp2", "rings.tiff"]
    masks += ["float.tiff", "int.tiff", "bits.png", "palette.png", "cmyk.tiff", "blue.jpg", "dark.png"]
    blue = np.dstack([box * 0, box * 0, box])
    Image.fromarray(blue).save(folder / "imgs/blue.jpg", quality=95, subsampling=0)
    Image.fromarray(blue // 64).save(folder / "imgs/dark.png")  # 3 of 255
    for name, row in zip(masks, data(write(folder, *[item(mask=name) for name in masks])).train_prompts, strict=True):
        assert torch.equal(row["mask"], torch.from_numpy(box)), name
        assert torch.equal(row["reference"], pixels(noise(0)[4:12, 10:30])), f"the box of {name}"


def test_sixteen_bits_of_grey_become_eight(folder: Path) -> None:
    grey = noise(3)[..., 0]
    save(folder / "imgs/deep.png", grey.astype(np.uint16) * 257)
    grey[0, 0] = 255
    for name, values in {
        "float.tiff": grey / np.float32(255),
        "levels.tiff": grey.astype(np.float32),
        "int.tiff": grey.astype(np.int32),
    }.items():
        Image.fromarray(values.astype(np.float32 if name != "int.tiff" else np.int32)).save(folder / "imgs" / name)
    Image.fromarray(grey.astype(np.int32) * 257).save(folder / "imgs/wide.tiff")
    save(folder / "imgs/deep.png", grey.astype(np.uint16) * 257)
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "imgs/deep.tiff")
    names = ["deep.png", "deep.tiff", "float.tiff", "levels.tiff", "int.tiff", "wide.tiff"]
    for name, row in zip(names, data(write(folder, *[item(source=name) for name in names])).train_prompts, strict=True):
        assert torch.equal(row["source"], torch.from_numpy(grey).expand(3, -1, -1)), name


def test_pictures_that_are_several_or_have_no_colours_are_refused(folder: Path) -> None:
    frames = [Image.fromarray(noise(i)) for i in range(2)]
    for name in ("two.gif", "two.webp", "two.png", "two.tiff"):
        frames[0].save(folder / "imgs" / name, save_all=True, append_images=frames[1:])
        with pytest.raises(ConfigError, match=f"source: .*{name} is not an image that can be read .it holds 2 frames"):
            data(write(folder, item(source=name)))
    Image.fromarray(noise(0)[..., 0].astype(np.float32) - 1e6).save(folder / "imgs/below.tiff")
    wrong = data(write(folder, item(source="below.tiff"))).unreadable()[0]
    assert "its values reach from -999999 to" in wrong


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_scans_of_twelve_bits_are_refused_not_taken_for_dark(folder: Path, kind: type) -> None:
    Image.fromarray((noise(0)[..., 0].astype(np.uint16) * 16).astype(kind)).save(folder / "imgs/scan.tiff")
    wrong = data(write(folder, item(source="scan.tiff"))).unreadable()[0]
    assert "scan.tiff cannot be read (its brightest value is 4" in wrong and "save it with 8 bits" in wrong
    Image.fromarray(np.zeros((HEIGHT, WIDTH), kind)).save(folder / "imgs/scan.tiff")
    assert not data(write(folder, item(source="scan.tiff"))).unreadable(), "black is black"


# ------------------------------------------------------------------ formats


def test_object_list_and_lines_say_the_same(folder: Path) -> None:
    items = [item(id="a"), item(text="Tea\u2028Time", reference="r1.png")]  # a separator of lines for Unicode, not for JSON
    (folder / "imgs/list.json").write_text(json.dumps(items))
    files = [write(folder, *items), str(folder / "imgs/list.json"), write(folder / "imgs", *items, name="lines.jsonl")]
    said = [[(r["prompt"], r["id"], r["reference"].shape) for r in data(file).train_prompts] for file in files]
    assert said[0] == said[1] == said[2] and len(said[0]) == 2


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """Two items; 11 has no reference of its own, and cross_bench takes two foreign ones."""
    for i in (11, 50):
        save(tmp_path / f"bench/test{i}_source.png", noise(i))
        save_mask(tmp_path / f"bench/test{i}_mask.png")
    save(tmp_path / "bench/test50_ref.png", noise(500, 9, 9))
    save(tmp_path / "bench/test7_ref.png", noise(7, 6, 6))
    (tmp_path / "bench/self_bench.txt").write_text("11-X-ray\n\n50-Tea & Co.\n")
    (tmp_path / "bench/cross_bench.txt").write_text("11-7,50-cross-wise\n")
    return tmp_path / "bench"


def test_benchmark_folders_and_their_conversion(bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = data(str(bench)).train_prompts
    assert [(r["id"], r["text"]) for r in rows] == [
        ("11", "X-ray"),
        ("50", "Tea & Co."),
        ("cross-11#1", "cross-wise"),
        ("cross-11#2", "cross-wise"),
    ]
    assert torch.equal(rows[0]["reference"], pixels(noise(11)[4:12, 10:30]))
    assert [r["reference"].shape[1] for r in rows[1:]] == [9, 6, 9]
    (bench.parent / "elsewhere").mkdir()
    out = bench.parent / "elsewhere/bench.json"
    main([str(bench), str(out)])
    assert "3 items" in capsys.readouterr().out
    for row, again in zip(rows, data(str(out)).train_prompts, strict=True):
        assert all(torch.equal(row[k], again[k]) if isinstance(row[k], Tensor) else row[k] == again[k] for k in row)


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("self_bench.txt", "eleven", r"self_bench\.txt:1: expected `id-text`, found 'eleven'"),
        ("cross_bench.txt", "11-text", r"cross_bench\.txt:1: expected `id-ref1,ref2-text`"),
        ("cross_bench.txt", "11-8-x", r"cross_bench\.txt:1 \(cross-11\): reference: no such file .*test8_ref\.png"),
        ("self_bench.txt", "12-x", r"self_bench\.txt:1 \(12\): source: no such file"),
    ],
)
def test_what_is_wrong_with_a_benchmark(bench: Path, file: str, line: str, message: str) -> None:
    for name in ("self_bench.txt", "cross_bench.txt"):
        (bench / name).unlink()
    (bench / file).write_text(line)
    with pytest.raises(ConfigError, match=message):
        data(str(bench))
    with pytest.raises(SystemExit, match=message):
        main([str(bench), str(bench / "out.json")])
    assert not (bench / "out.json").exists()


# ------------------------------------------------------------------ splits


def test_splits_of_one_file_and_of_two(folder: Path) -> None:
    one = write(folder, item(id="a"), item(id="b", split="val"), item(id="c", split="train"), item(id="d", split="test"))
    two = write(folder, item(id="x"), item(id="y", split="train"), name="val.json")

    def ids(source: Inpainting) -> list[str]:
        return ["".join(row["id"] for row in rows) for rows in (source.train_prompts, source.held_out, source.to_predict)]

    assert ids(data(one)) == ["ac", "bd", ""]
    assert ids(data(one, two)) == ["ac", "x", ""]
    assert ids(data(one, one, two)) == ["ac", "bd", "xy"]
    assert ids(data(one, max_train=1, max_val=1)) == ["a", "b", ""]
    assert ids(data(predict=one)) == ["", "", "abcd"]
    with pytest.raises(ConfigError, match="all 1 items have split val or test"):
        data(write(folder, item(split="val"), name="v.json"))
    with pytest.raises(ConfigError, match="nothing is left to evaluate"):
        data(one, write(folder, item(split="train"), name="t.json"))


# ------------------------------------------------------------------ what is wrong with a file


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask": None}, r"mask: missing; every item needs source, mask, text"),
        ({"txt": "a"}, r"txt: no such field; did you mean text\?"),
        ({"colour": "red"}, r"colour: no such field; there are \['id', 'mask'"),
        ({"text": "  "}, r"text: is empty; write the wanted text"),
        ({"text": 7}, r"text: must be a string, is 7"),
        ({"source": "nowhere.png"}, r"source: no such file .*imgs/nowhere\.png; relative paths count from .*imgs"),
        ({"source": "broken.png"}, r"source: .*broken\.png is not an image"),
        ({"reference": ["r0.png", "no.png"]}, r"reference: no such file .*no\.png"),
        ({"reference": []}, r"reference: must be a file or a list of files, is \[\]; leave it out"),
        ({"target": "r0.png"}, r"target: is 7 x 5 pixels, source is 48 x 24 \(width x height\)"),
        ({"mask": "large.png"}, r"mask: is 50 x 24 pixels, source is 48 x 24"),
        ({"mask": "black.png"}, r"mask: .*black\.png is all black; white is where the text goes"),
        ({"mask": "dot.png"}, r"mask: .*dot\.png has nothing white left at 24 x 12 pixels; .*raise data\.resolution"),
        ({"mask": "cut.png"}, r"mask: .*cut\.png is not an image that can be read"),
        ({"split": "dev"}, r"split: must be train, val or test, is 'dev'"),
        ({"weight": 0}, r"weight: must be a number above 0, is 0; .*set split to val"),
        ({"weight": float("nan")}, r"weight: must be a number above 0, is nan"),
        ({"weight": "2"}, r"weight: must be a number above 0, is '2'"),
        ({"id": "first"}, r"id: 'first' is also the id of data\.json: items\[0\]"),
    ],
)
def test_an_item_that_is_wrong_is_named(folder: Path, fields: dict[str, Any], message: str) -> None:
    (folder / "imgs/broken.png").write_bytes(b"not a picture")
    (folder / "imgs/cut.png").write_bytes((folder / "imgs/mask.png").read_bytes()[:60])
    save_mask(folder / "imgs/large.png", width=50)
    save_mask(folder / "imgs/black.png", white=0)
    save_mask(folder / "imgs/dot.png", (20, 10, 21, 11))  # even row and column: between those that halving looks at
    path = write(folder, item(id="first"), item(**{"id": "cafe-02"} | fields))
    where = rf"data\.json: items\[1\] \({fields.get('id', 'cafe-02')}\): "
    with pytest.raises(ConfigError, match=r"data\.json: 1 problem in the inpainting data\n  " + where + message):
        data(path, resolution=(12, 24))
    lines = write(folder / "imgs", item(), item(**{"id": "cafe-02"} | fields), name="data.jsonl")
    if "id" not in fields:
        with pytest.raises(ConfigError, match=r"data\.jsonl:2 \(cafe-02\): " + message):
            data(lines, resolution=(12, 24))


def test_all_problems_come_in_one_message(folder: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        data(write(folder, *[item(text="", split="x")] * 7, "nothing"))
    lines = str(raised.value).splitlines()
    assert lines[0].endswith("15 problems in the inpainting data") and len(lines) == 12 and lines[-1] == "  ... and 5 more"
    assert lines[1].startswith("  data.json: items[0]: text") and lines[2].startswith("  data.json: items[0]: split")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.json", '{"items": [\n {"a": }]}', r"d\.json:2: not JSON \(Expecting value at column 8\)"),
        ("d.json", '{"text": "a"}\n{"text": "b"}', r"d\.json:2: not JSON \(Extra data at column 1\); .* named \.jsonl"),
        ("d.jsonl", '{"text": "a"}\n{"text', r"d\.jsonl:2: not JSON .*each line must be one item"),
        ("d.json", '{"data": []}', r"expected \{\"version\": 1.* found an object with \['data'\]"),
        ("d.json", '{"items": [], "rot": "x"}', r"beside items there may be version and root, found \['rot'\]"),
        ("d.json", '{"items": [], "version": 2}', r"version is 2; this program reads version 1"),
        ("d.json", "[]", "holds no items"),
        ("d.csv", "", r"read from \.json and \.jsonl files and benchmark folders \(self_bench\.txt or cross_bench\.txt\)"),
    ],
)
def test_a_file_that_is_wrong(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        data(str(tmp_path / name))


def test_missing_files_and_other_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or folder"):
        data(str(tmp_path / "no.json"))
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ConfigError, match=r"holds self_bench\.txt or cross_bench\.txt; found \['notes\.txt'\]"):
        data(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"), [({"resolution": 0}, "resolution"), ({"template": "text"}, "{text}"), ({"style_dropout": 1.0}, "style_dropout")]
)
def test_options_that_make_no_sense(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        data(write(folder, item()), **options)


# ------------------------------------------------------------------ which prompts come, and when


def test_without_weights_every_prompt_comes_once_a_round_in_the_order_of_all_datamodules(folder: Path) -> None:
    source = data(write(folder, *[item(text=str(i)) for i in range(5)]), seed=3)
    plain = super(Inpainting, source)
    for iteration in range(6):
        assert [id(row) for row in source.prompts(iteration, 3)] == [id(row) for row in plain.prompts(iteration, 3)]


@pytest.mark.parametrize("count", [1, 4, 7])
def test_weights_are_kept_round_by_round(folder: Path, count: int) -> None:
    """Weights 1, 2, .5, 1.5 and .25: 20 rounds hold 20, 40, 10, 30 and 5 of them, whatever the size of an iteration."""
    weights = [1, 2, 0.5, 1.5, 0.25]
    source = data(write(folder, *[item(id=str(i), weight=w) for i, w in enumerate(weights)]), seed=1)
    total = 105
    stream = [row["id"] for k in range(-(-total // count)) for row in source.prompts(k, count)][:total]
    counted = Counter(stream)
    assert [counted[str(i)] for i in range(5)] == [20, 40, 10, 30, 5]
    first_rounds = Counter(stream[: int(source._before(4).sum())])
    assert all(abs(first_rounds[str(i)] - 4 * w) < 1 for i, w in enumerate(weights))


def test_fractional_weights_are_spread_over_the_rounds(folder: Path) -> None:
    """30 items of weight 0.5 and 30 of 0.2: each round holds about 15 and 6 of them, not all in every second and fifth."""
    source = data(write(folder, *[item(id=str(i), weight=0.5 if i < 30 else 0.2) for i in range(60)]))
    for round_ in range(10):
        rows = source._order(round_)
        assert 13 <= sum(i < 30 for i in rows) <= 17 and 4 <= sum(i >= 30 for i in rows) <= 8


def test_siblings_share_one_object(folder: Path) -> None:
    """`condition` encodes each object once; a prompt that comes again is the same object, so nothing is encoded twice."""
    source = data(write(folder, item()))
    first, again = source.prompts(0, 1)[0], source.prompts(5, 1)[0]
    assert first is again and first == again and len({first, again}) == 1
    assert first != first.but() and first != first.but(styled=False)  # type: ignore[attr-defined]


# ------------------------------------------------------------------ supervised examples


def test_examples_show_the_ground_truth(folder: Path) -> None:
    """`other.png` is the target of b; c is reconstructed, as its source already says the wanted text; a can only be reinforced."""
    source = data(
        write(folder, item(id="a"), item(id="b", target="other.png"), item(id="c", source_text="MOCHA"), item(id="d", source_text="TEA"))
    )
    info, images = source.examples(0, 64)
    assert images.dtype == torch.uint8 and {row["id"] for row in info} == {"b", "c"}
    for row, image in zip(info, images):
        assert torch.equal(image, pixels(noise(1 if row["id"] == "b" else 0)))
        assert torch.equal(row["source"], pixels(noise(0))) and row["target"] == "MOCHA"
    some, shown = source.examples(0, 64, slice(10, 13))
    assert [row["id"] for row in some] == [row["id"] for row in info[10:13]] and torch.equal(shown, images[10:13])


def test_examples_are_a_function_of_seed_and_step(folder: Path) -> None:
    path = write(folder, *[item(id=str(i), target="other.png", weight=1 if i else 30) for i in range(8)])

    def drawn(seed: int, step: int) -> list[tuple[str, bool]]:
        return [(row["id"], row.get("styled", True)) for row in data(path, seed=seed, style_dropout=0.5).examples(step, 32)[0]]

    assert drawn(0, 5) == drawn(0, 5) and drawn(0, 5) != drawn(0, 6) and drawn(0, 5) != drawn(1, 5)
    counted = Counter(id_ for step in range(20) for id_, _ in drawn(0, step))
    assert 480 < counted["0"] < 560  # 30 / 37 of 640 is 519, standard deviation 10


def test_one_example_in_twenty_has_no_style(folder: Path) -> None:
    source = data(write(folder, item(target="other.png")))
    styled = [row.get("styled", True) for step in range(20) for row in source.examples(step, 100)[0]]
    assert 60 < styled.count(False) < 140  # 100 of 2000, standard deviation 10
    assert all(row.get("styled", True) for row in data(write(folder, item(target="other.png")), style_dropout=0).examples(0, 200)[0])
    assert "styled" not in source.train_prompts[0]


def attached(source: Inpainting, method: Any) -> Inpainting:
    source.trainer = SimpleNamespace(lightning_module=method)  # type: ignore[assignment]
    return source


def test_a_warmup_without_targets_is_refused_before_any_model_is_read(folder: Path) -> None:
    path = write(folder, item(), item(target="other.png", split="val"))
    with pytest.raises(ConfigError, match=r"no item of data\.train has one: .*leave model\.supervised out"):
        attached(data(path), toy_method(warmup_steps=3)).setup("fit")
    with pytest.raises(ConfigError, match="model.supervised"):
        data(path).examples(0, 2)
    attached(data(path), toy_method(warmup_steps=3)).setup("predict")
    attached(data(path), toy_method()).setup("fit")


def test_another_resolution_than_the_policys_is_refused_before_any_model_is_read(folder: Path) -> None:
    method = toy_method()
    method.policy.image_size = (32, 64)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"data\.resolution is \[24, 48\] and model\.policy\.resolution \[32, 64\]"):
        attached(data(write(folder, item())), method).setup("fit")
    attached(data(write(folder, item()), resolution=(32, 64)), method).setup("fit")


# ------------------------------------------------------------------ laziness


def test_images_are_read_when_asked_for_and_memory_is_bounded(folder: Path) -> None:
    """Construction looks at headers and masks only; a source that broke since is named when it is needed."""
    source = data(write(folder, *[item(id=str(i), source=save(folder / f"imgs/s{i}.png", noise(i))) for i in range(20)]))
    assert not source._cache.held
    prompts = source.prompts(0, 20)
    assert all(row["prompt"] and "mask" in row and len(row) == 7 for row in prompts) and not source._cache.held
    source._cache.limit = 5 * 3 * WIDTH * HEIGHT
    for row in prompts:
        assert row["source"] is row["source"]
        assert sum(image.nbytes for image in source._cache.held.values()) <= source._cache.limit
    (folder / "imgs/s3.png").write_bytes((folder / "imgs/s3.png").read_bytes()[:200])
    row = source.train_prompts[3]
    source._cache.held.clear()
    with pytest.raises(ConfigError, match=r"data\.json: items\[3\] \(3\): source: .*s3\.png cannot be read"):
        row["source"]
    assert row["mask"].any()


def test_large_references_are_reduced_so_that_they_do_not_fill_the_memory(folder: Path) -> None:
    save(folder / "imgs/poster.png", np.zeros((300, 3000, 3), np.uint8))
    (row,) = data(write(folder, item(reference="poster.png"))).train_prompts
    assert row["reference"].shape == (3, 102, 1024)


def test_rows_survive_what_lightning_does_to_batches(folder: Path) -> None:
    """Half precision rebuilds every mapping of a batch; spawned processes get a pickled datamodule."""
    (row,) = data(write(folder, item(reference="r0.png"))).train_prompts
    rebuilt = apply_to_collection([row], Tensor, lambda x: x.half() if x.is_floating_point() else x)[0]
    for other in (rebuilt, pickle.loads(pickle.dumps(row))):
        assert isinstance(other, LazyRow) and list(other) == list(row)
        assert all(torch.equal(other[k], row[k]) if isinstance(row[k], Tensor) else other[k] == row[k] for k in row)
    with pytest.raises(KeyError):
        row["styled"]
    with pytest.raises(TypeError):
        row["target"] = "x"  # type: ignore[index]
    assert ImageCache(7).limit == pickle.loads(pickle.dumps(ImageCache(7))).limit


def test_the_documented_file_is_read(folder: Path) -> None:
    """docs/inpainting.md names every field, and its example is valid."""
    page = (Path(__file__).parents[2] / "docs/inpainting.md").read_text()
    assert sorted(re.findall(r"^\| `(\w+)` \|", page, re.M)) == sorted(FIELDS)
    (folder / "data.json").write_text(re.findall(r"```json\n(.*?)```", page, re.S)[0])
    names = {name for entry in json.loads((folder / "data.json").read_text())["items"] for name in re.findall(r"\w+\.png", str(entry))}
    for name in names:
        save_mask(folder / "imgs" / name)
    source = data(str(folder / "data.json"))
    assert [row["id"] for row in source.train_prompts] == ["cafe-01", "cafe-02#1", "cafe-02#2", "2"]
    assert {row["id"] for row in source.examples(0, 50)[0]} == {"cafe-02#1", "cafe-02#2", "2"}


# ------------------------------------------------------------------ in a run


def test_a_run_on_items(folder: Path) -> None:
    """Warm-up, rollouts with gallery, evaluation and prediction; the toy policy reads prompts only, so only targets are read."""
    items = [item(id=f"i{i}", text=str(i), target="other.png", weight=1 + i % 2, split="val" if i > 3 else "train") for i in range(6)]
    source = data(write(folder, *items), template="{text}", resolution=(2, 2), eval_batch_size=2)
    gallery, writer = SampleGallery(2, every_n_iterations=1, folder=str(folder / "gallery")), ImageWriter(str(folder / "out"))
    trainer = toy_trainer(folder, callbacks=[gallery, writer], max_epochs=3, limit_val_batches=1.0, accumulate_grad_batches=2)
    trainer.fit(toy_method(warmup_steps=2, warmup_batch_size=4), source)
    assert len(list((folder / "gallery").glob("rollout-*.png"))) == 2 and list((folder / "gallery").glob("evaluation-*.png"))
    assert [reader[1][0].name for reader in source._cache.held] == ["other.png"]
    toy_trainer(folder, callbacks=[writer]).predict(toy_method(), source)
    written = [json.loads(line) for line in (folder / "out/prompts.jsonl").read_text().splitlines()]
    assert [(row["id"], row["prompt"], row["file"]) for row in written] == [("i4", "4", "00000-4.png"), ("i5", "5", "00001-5.png")]


def test_broken_pixels_are_found_without_training(folder: Path) -> None:
    """A file cut short has a good header, which is all that the constructor reads of pictures."""
    whole = (folder / "imgs/other.png").read_bytes()
    (folder / "imgs/cut.png").write_bytes(whole[: len(whole) // 2])
    assert data(write(folder, item(id="a"), item(id="b", target="other.png"))).unreadable() == []
    source = data(write(folder, item(id="a"), item(id="b", target="cut.png"), item(id="c", reference=["other.png", "cut.png"])))
    problems = source.unreadable()
    assert len(problems) == 2 and all("cut.png cannot be read" in text for text in problems)
    assert sum("target" in text for text in problems) == sum("reference" in text for text in problems) == 1
