"""`predict` writes its images as files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from callbacks.base import Predicted, RLCallback
from lit_rl.errors import ConfigError
from lit_rl.ranks import gather_objects
from lit_rl.types import Info, Prompts

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


class ImageWriter(RLCallback):
    """One PNG per prompt, named by its number and first words, and `prompts.jsonl` that says which file shows which prompt (and its `id`).

    Part of every run; does nothing outside `predict`, and where no images are made. Files of an earlier prediction with the same names are
    overwritten.

    Args:
        output_dir: Folder of the images; by default `predictions` in the run's folder.
        triptych: For inpainting: beside each `name.png` a `triptych-name.png` of the source with its mask outlined, the reference, and
            the image.
    """

    def __init__(self, output_dir: str | None = None, *, triptych: bool = False) -> None:
        self.output_dir = Path(output_dir or "predictions")
        self.triptych = triptych
        self._written: list[dict[str, str | int]] = []

    def on_predict_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Begin an empty list of files."""
        self._written = []

    def on_predict_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Prompts, batch_idx: int, *_: object) -> None:
        """Refuse triptychs of prompts that lack an image."""
        lacking = [field for field in ("source", "mask", "reference") if any(field not in row for row in batch.info)]
        if self.triptych and lacking:
            raise ConfigError(f"images.triptych shows source, mask and reference, and prompts lack {lacking}: set it to false")

    def on_predict_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Predicted, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write the images of a batch."""
        if "media" not in outputs:
            return
        prompts = outputs["prompts"]
        self.output_dir.mkdir(parents=True, exist_ok=True)
        for media, index, text, info in zip(outputs["media"], prompts.group.tolist(), prompts.text, prompts.info):
            if index < 0:
                continue  # fills up the last batch
            name = f"{index:05d}-{slug(text)}.png"
            to_image(media).save(self.output_dir / name)
            if self.triptych:
                triptych(info, media).save(self.output_dir / f"triptych-{name}")
            known = {"id": info["id"]} if "id" in info else {}
            self._written.append({"file": name, "index": index, "prompt": text, **known})

    def on_predict_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write prompts.jsonl, on the first process."""
        rows = sorted((row for rank in gather_objects(self._written) for row in rank), key=lambda row: row["index"])
        if trainer.is_global_zero and rows:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (self.output_dir / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
            rank_zero_info(f"{len(rows)} images and prompts.jsonl are in {self.output_dir}")


def slug(text: str, *, length: int = 48) -> str:
    """The words of `text` (of any alphabet) joined by hyphens, cut to `length` letters: safe in a file name."""
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")[:length].strip("-") or "prompt"


def to_image(media: Tensor) -> Picture:
    """uint8 "3 H W" -> PIL image."""
    from PIL import Image

    return Image.fromarray(media.permute(1, 2, 0).contiguous().cpu().numpy())


def triptych(info: Info, media: Tensor, *, gap: int = 4) -> Picture:
    """Source with its mask outlined in red | reference, scaled to fit | result: a PIL image, three times as wide as the result."""
    from PIL import Image, ImageOps

    source, white = info["source"].clone(), (info["mask"] > 0).float()[None]
    edge = (white > 0) & (F.max_pool2d(1 - white, 3, stride=1, padding=1) > 0)
    source[:, edge[0]] = torch.tensor([[255], [0], [0]], dtype=torch.uint8)
    result = to_image(media)
    parts = [to_image(source), ImageOps.pad(to_image(info["reference"]), result.size, color="white"), result]
    sheet = Image.new("RGB", (3 * result.width + 2 * gap, result.height), "white")
    for i, part in enumerate(parts):
        sheet.paste(part, (i * (result.width + gap), 0))
    return sheet
