"""Pictures to imitate from weighted lists: which are drawn, at what size, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from datamodules.picture_sources import PictureSources, Source, read_sources, resized, weighted_rows
from lit_rl.errors import ConfigError

NUMBERS = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent.parent / "golden")) / "deepgen" / "sftaux_data.json"
SIZES = {"red": (40, 20), "blue": (20, 60), "grey": (32, 32)}


def lists(folder: Path) -> list[Source]:
    for name, size in SIZES.items():
        Image.new("RGB", size, name).save(folder / f"{name}.png")
    (folder / "a.json").write_text(json.dumps([{"image_path": f"{name}.png", "txt": f"a {name} one"} for name in ("red", "blue")]))
    (folder / "b.jsonl").write_text(json.dumps({"image_path": "grey.png", "txt": "a grey one"}))
    return [Source(path=str(folder / "a.json")), Source(path=str(folder / "b.jsonl"), weight=3.0, size=64)]


@pytest.mark.golden
def test_sizes_and_draws_are_the_authors() -> None:
    numbers = json.loads(NUMBERS.read_text())
    for case in numbers["resize"]:
        sides, size = (case["inputs"]["h"], case["inputs"]["w"]), case["inputs"]["image_size"]
        assert list(resized(sides, size=size, by="area"))[::-1] == case["fix_pixels"]
        assert list(resized(sides, size=size, by="longest"))[::-1] == case["dynamic"]
    for case in numbers["weighted_infinite_sampler"]:
        given, first = case["inputs"], case["outputs"]["first"]
        weights = [1.0 if weight is None else float(weight) for weight in given["weights"]]
        assert weights == case["outputs"]["sample_weights"]
        of_rows = torch.tensor(weights).repeat_interleave(torch.tensor(given["lengths"]))
        count, draw = int(of_rows.numel()), torch.Generator().manual_seed(given["seed"])
        stream: list[int] = []
        while len(stream) < len(first) * given["world"]:
            stream += weighted_rows(of_rows, count, draw)
        assert stream[given["rank"] :: given["world"]][: len(first)] == first


def test_a_step_is_drawn_once_for_all_that_share_it(tmp_path: Path) -> None:
    source = PictureSources(lists(tmp_path), size=32, drop_prompt=0.5, seed=1)
    info, images = source.examples(3, 40)
    again = [source.examples(3, 40, slice(i, i + 7)) for i in range(0, 40, 7)]
    assert [dict(row) for row in info] == [dict(row) for part, _ in again for row in part]
    assert all(torch.equal(a, b) for a, b in zip(images, [image for _, part in again for image in part], strict=True))
    assert {image.shape for image in images} == {(3, 32, 64), (3, 64, 32), (3, 64, 64)}
    assert 5 < sum(row["prompt"] == "" for row in info) < 35
    assert 14 <= sum(image.shape == (3, 64, 64) for image in images) < 34  # 3 of 5
    assert [dict(row) for row in source.examples(4, 40)[0]] != [dict(row) for row in info]


def test_pictures_of_one_size_are_a_batch(tmp_path: Path) -> None:
    _, images = PictureSources(lists(tmp_path)[:1], size=32, resize="square").examples(0, 4)
    assert isinstance(images, Tensor) and images.shape == (4, 3, 32, 32)


def test_a_file_names_lists_beside_it(tmp_path: Path) -> None:
    lists(tmp_path)
    (tmp_path / "sources.yaml").write_text("sources:\n- {path: a.json}\n- {path: b.jsonl, weight: 3.0}\n")
    source = PictureSources(str(tmp_path / "sources.yaml"))
    assert len(source.rows) == 3 and source.weights.tolist() == [1.0, 1.0, 3.0]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (None, "SFTAUX_DATASET_CONFIG"),
        ("lists.csv", "named in .yaml, .json or DeepGen-RL's .py"),
        ("lists.yaml", "lists.yaml: no such file"),
        ([Source(path="b.jsonl", weight=0.0)], "weight=0.0 must be above 0"),
        ([Source(path="c.json")], r"items\[0\] needs image_path and txt"),
    ],
)
def test_what_cannot_be_drawn_from_is_told(sources: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists(tmp_path)
    (tmp_path / "c.json").write_text('[{"image_path": "red.png"}]')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        PictureSources(sources)


def test_a_picture_that_is_not_there_is_named(tmp_path: Path) -> None:
    source = PictureSources(lists(tmp_path)[1:])
    (tmp_path / "grey.png").unlink()
    with pytest.raises(ConfigError, match="grey.png cannot be read"):
        source.examples(0, 1)


def test_deepgens_own_file_names_lists_and_is_not_executed(tmp_path: Path) -> None:
    source = f"one = dict(data_path='{tmp_path}/a.json', image_folder='/pictures', sample_weight=3.0)\n"
    (tmp_path / "aux.py").write_text(source + "train_dataloader = dict(batch_size=2, dataset=dict(datasets=[one]))\n")
    assert read_sources(tmp_path / "aux.py") == [Source(path=f"{tmp_path}/a.json", folder="/pictures", weight=3.0)]
