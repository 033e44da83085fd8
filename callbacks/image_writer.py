"""`predict` writes its images as files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_rl.module import gather_objects
from lit_rl.types import Prompts


class ImageWriter(L.Callback):
    """One PNG per prompt, named by its number and first words, and `prompts.jsonl` that says which file shows which prompt.

    Part of every run; does nothing outside `predict`. Files of an earlier prediction with the same names are overwritten.

    Args:
        output_dir: Folder of the images.
    """

    def __init__(self, output_dir: str = "outputs/predictions") -> None:
        self.output_dir = Path(output_dir)
        self._written: list[dict[str, Any]] = []

    def on_predict_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._written = []
        self.output_dir.mkdir(parents=True, exist_ok=True)

    def on_predict_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        prompts: Prompts = outputs["prompts"]
        for media, index, text in zip(outputs["media"], prompts.group.tolist(), prompts.text):
            if index < 0:
                continue  # fills up the last batch
            name = f"{index:05d}-{slug(text)}.png"
            to_image(media).save(self.output_dir / name)
            self._written.append({"file": name, "index": index, "prompt": text})

    def on_predict_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        rows = sorted((row for rank in gather_objects(self._written) for row in rank), key=lambda row: row["index"])
        if trainer.is_global_zero:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (self.output_dir / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
        rank_zero_info(f"{len(rows)} images and prompts.jsonl are in {self.output_dir}")


def slug(text: str, *, length: int = 48) -> str:
    """The words of `text` (of any alphabet) joined by hyphens, cut to `length` letters: safe in a file name."""
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")[:length].strip("-") or "prompt"


def to_image(media: torch.Tensor) -> Any:
    """uint8 "3 H W" -> PIL image."""
    from PIL import Image

    return Image.fromarray(media.permute(1, 2, 0).contiguous().cpu().numpy())
