"""Pictures of training and evaluation, with prompt and rewards beneath each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from callbacks.base import Media, Method, RLCallback
from callbacks.image_writer import to_image
from callbacks.reported_samples import Shown, report_rows
from lit_rl.errors import ConfigError
from lit_rl.modules.reporting import logged_step
from lit_rl.types import Info, Prompts, Rollout

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

PICTURE = 160
"""Pixels that the shorter side of a picture has at least, so that the text beneath is readable."""
TEXT_SIZE = 12
CAPTION_LINES = 3


class SampleGallery(RLCallback):
    """Shows a few images of the rollout every n iterations, and of every evaluation, to each logger that takes images.

    TensorBoard gets one contact sheet, loggers with `log_image` (W&B, SwanLab) the single images with captions, the platform each image
    with its rewards and advantage. The first process
    shows its own share of the samples: images spread evenly over the rollout, the first ones of the evaluation set.

    Args:
        max_images: Images on a sheet.
        every_n_iterations: Of the rollouts; evaluations are always shown.
        folder: Also write each sheet there as `rollout-<iteration>.png` or `evaluation-<step>.png`; the command line fills in
            `samples` in the run's folder.
    """

    def __init__(self, max_images: int = 8, *, every_n_iterations: int = 10, folder: str | None = None) -> None:
        if max_images < 1 or every_n_iterations < 1:
            raise ConfigError(f"SampleGallery max_images={max_images} and every_n_iterations={every_n_iterations} must be at least 1")
        self.max_images = max_images
        self.every_n_iterations = every_n_iterations
        self.folder = Path(folder) if folder is not None else None
        self._seen = 0
        self._kept: list[tuple[int, Tensor, Info]] = []  # row of the rollout or evaluation, image, prompt

    # ------------------------------------------------------------------ training samples
    def on_phase_start(self, trainer: L.Trainer, module: Method, name: str) -> None:
        """Begin a new sheet with each rollout."""
        if name == "rollout":
            self._seen, self._kept = 0, []

    def on_rollout_chunk(self, trainer: L.Trainer, module: Method, media: Media, info: Sequence[Info], total: int) -> None:
        """Keep the images that the sheet shows."""
        assert isinstance(media, Tensor), "SampleGallery shows images; a method on tokens has SampleTexts"
        rows = range(self._seen, self._seen + len(media))
        self._seen += len(media)
        if trainer.is_global_zero and module.iteration % self.every_n_iterations == 0:
            wanted = spread(total, self.max_images)
            self._kept += [(row, image.clone(), prompt) for row, image, prompt in zip(rows, media, info) if row in wanted]

    def on_rollout_end(self, trainer: L.Trainer, module: Method, rollout: Rollout) -> None:
        """Show the sheet of the rollout."""
        self._show(trainer, module, "samples/rollout", f"rollout-{module.iteration + 1:05d}", rollout, rollout.rewards)

    # ------------------------------------------------------------------ evaluation samples
    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Begin a new sheet."""
        self._seen, self._kept = 0, []

    def on_validation_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the first images; evaluation sets show their own."""
        if outputs is None:
            return
        assert isinstance(outputs, Mapping)
        prompts: Prompts = outputs["prompts"]
        for i, image in enumerate(outputs["media"]):
            if prompts.group[i] >= 0 and trainer.is_global_zero and len(self._kept) < self.max_images:
                self._kept.append((self._seen + i, image.clone(), prompts.info[i]))
        self._seen += len(prompts)

    def on_evaluation_end(self, trainer: L.Trainer, module: Method, prompts: Prompts, rewards: Mapping[str, Tensor]) -> None:
        """Show the sheet of the evaluation."""
        if not trainer.sanity_checking:
            self._show(trainer, module, "samples/evaluation", f"evaluation-{trainer.global_step:06d}", prompts, rewards)

    # ------------------------------------------------------------------ to people
    def _show(self, trainer: L.Trainer, module: Method, key: str, name: str, prompts: Prompts, rewards: Mapping[str, Tensor]) -> None:
        """Under the step of the numbers that belong to the pictures."""
        kept, self._kept, step = self._kept, [], logged_step(trainer, module)
        if not kept:
            return
        shown = (Shown(row, str(info["prompt"]), image=image) for row, image, info in kept)
        report_rows(trainer, module, key.rpartition("/")[2], shown, prompts, rewards)
        images = [image for _, image, _ in kept]
        captions = [caption(info, {n: float(values[row]) for n, values in rewards.items()}) for row, _, info in kept]
        sheet = contact_sheet(images, captions)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            sheet.save(self.folder / f"{name}.png")
        for logger in trainer.loggers:
            experiment = getattr(logger, "experiment", None)
            if hasattr(logger, "log_image"):
                logger.log_image(key=key, images=[to_image(image) for image in images], step=step, caption=captions)
            elif callable(add := getattr(experiment, "add_image", None)):
                pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).view(sheet.height, sheet.width, 3)
                add(key, pixels, step, dataformats="HWC")


def spread(total: int, count: int) -> set[int]:
    """At most `count` of the rows 0 ... total - 1, as evenly as they go, the first one among them."""
    count = min(count, total)
    return {i * total // count for i in range(count)}


def caption(info: Info, rewards: Mapping[str, float]) -> str:
    """The prompt, and below it the rewards."""
    return f"{info['prompt']}\n" + "  ".join(f"{name} {value:.3g}" for name, value in rewards.items())


def contact_sheet(images: Sequence[Tensor], captions: Sequence[str], *, columns: int = 4) -> Picture:
    """uint8 images "3 H W" of one size -> one PIL image, captions beneath. Small images are enlarged without smoothing."""
    from PIL import Image

    pictures = [to_image(image) for image in images]
    width, height = pictures[0].size
    factor = max(1, -(-PICTURE // min(width, height)))
    width, height = width * factor, height * factor
    text_height = (TEXT_SIZE + 3) * CAPTION_LINES + 6
    columns = min(columns, len(pictures))
    sheet = Image.new("RGB", (columns * (width + 8), -(-len(pictures) // columns) * (height + text_height)), "white")
    for i, (picture, text) in enumerate(zip(pictures, captions)):
        x, y = i % columns * (width + 8) + 4, i // columns * (height + text_height)
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, y))
        _write(sheet, text, x, y + height + 2, width)
    return sheet


def _write(sheet: Picture, text: str, x: int, y: int, width: int) -> None:
    """The prompt in all lines but the last, cut where it does not fit; the rewards in the last."""
    from PIL import ImageDraw, ImageFont

    font, draw = ImageFont.load_default(TEXT_SIZE), ImageDraw.Draw(sheet)
    prompt, _, rewards = text.rpartition("\n")
    lines = _wrap(prompt, width, lambda line: draw.textlength(line, font))
    if len(lines) > CAPTION_LINES - 1:
        lines = [*lines[: CAPTION_LINES - 2], lines[CAPTION_LINES - 2][:-1] + "…"]
    for i, line in enumerate([*lines, rewards]):
        draw.text((x, y + i * (TEXT_SIZE + 3)), line, fill="black" if i < len(lines) else "#0a58ca", font=font)


def _wrap(text: str, width: float, length: Callable[[str], float]) -> list[str]:
    """Lines of at most `width`, broken between words, and within a word that is longer than a line."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if length(longer) <= width:
            lines[-1] = longer
            continue
        lines.append("")
        for letter in word:
            if length(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line]
