"""`predict` writes its answers as a file."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from callbacks.base import Predicted, RLCallback
from lit_rl.ranks import gather_objects


class TextWriter(RLCallback):
    """One JSON object per prompt, in order: `prompt`, `response`, and the row's `id` and `data_source` where it has them.

    Part of every run; does nothing outside `predict`, and where no texts are made.

    Args:
        output_file: `.jsonl` file, overwritten; by default `predictions/answers.jsonl` in the run's folder.
    """

    def __init__(self, output_file: str | None = None) -> None:
        self.output_file = Path(output_file or "predictions/answers.jsonl")
        self._written: list[tuple[int, dict[str, object]]] = []

    def on_predict_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Begin an empty list."""
        self._written = []

    def on_predict_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Predicted, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the answers of a batch."""
        prompts = outputs["prompts"]
        for text, index, info in zip(outputs.get("texts", ()), prompts.group.tolist(), prompts.info):
            if index >= 0:  # the rest fills up the last batch
                known = {key: info[key] for key in ("id", "data_source") if key in info}
                self._written.append((index, known | {"prompt": info["prompt"], "response": text}))

    def on_predict_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write the file, on the first process."""
        rows = sorted((row for rank in gather_objects(self._written) for row in rank), key=lambda row: row[0])
        if trainer.is_global_zero and rows:
            self.output_file.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for _, row in rows)
            self.output_file.write_text("".join(lines), encoding="utf-8")
            rank_zero_info(f"{len(rows)} answers are in {self.output_file}")
