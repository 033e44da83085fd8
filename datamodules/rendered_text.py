"""Pictures of short numbers and the prompts that ask for them: a text-to-image task small enough to learn on a laptop."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from datamodules.base import PromptDataModule
from lit_rl.errors import ConfigError
from lit_rl.replay.sources import ExampleSource
from lit_rl.seeding import generator
from lit_rl.types import ALL, Info

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont


class RenderedText(PromptDataModule, ExampleSource):
    """Prompts such as `a sign that says "47"` with black-on-white renderings for the warm-up; held-out numbers are never trained on.

    Args:
        height: Of the images in pixels.
        width: Of the images in pixels.
        digits: Length of the numbers; there are 10^digits.
        held_out_share: Share of the numbers kept for evaluation.
        eval_repeats: Evaluation images of each held-out number, each from its own noise.
        defect: What is wrong with some of the warm-up images: `lines` are printed over the number, or one digit is a `misprint`.
            Supervised learning imitates that, a reward corrects it.
        defect_share: Share of the warm-up images with the defect.
        line_start: First row that is a line, counted from 0.
        line_distance: Rows from one line to the next. Of numbers of font size 12 on 16 x 16 pixels PP-OCRv6 reads one in two through lines
            with start 0 and distance 3, and none with start 1 and distance 2.
        jitter: Renderings are shifted sideways by up to so many pixels.
        font_size: Of Pillow's built-in font, in pixels.
        template: Of the prompt; {text} is the number.
        eval_batch_size, shuffle, seed: See `PromptDataModule`. Which numbers are held out does not depend on the seed.
    """

    def __init__(
        self,
        *,
        height: int = 16,
        width: int = 32,
        digits: int = 2,
        held_out_share: float = 0.2,
        eval_repeats: int = 5,
        defect: Literal["lines", "misprint"] = "lines",
        defect_share: float = 0.0,
        line_start: int = 0,
        line_distance: int = 3,
        jitter: int = 1,
        font_size: float = 16,
        template: str = 'a sign that says "{text}"',
        eval_batch_size: int = 50,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        if not 0 <= defect_share < 1:
            raise ConfigError(f"data.defect_share={defect_share} must be in [0, 1)")
        if not 0 <= line_start < line_distance:
            raise ConfigError(f"data.line_start={line_start} must be at least 0 and below data.line_distance={line_distance}")
        if not 0 < held_out_share < 1:
            raise ConfigError(f"data.held_out_share={held_out_share} must be in (0, 1)")
        if "{text}" not in template:
            raise ConfigError(f"data.template={template!r} must contain {{text}}, where the number goes")
        numbers = [f"{i:0{digits}d}" for i in range(10**digits)]
        order = torch.randperm(len(numbers), generator=generator("rendered_text", digits)).tolist()
        held_out = sorted(order[: round(held_out_share * len(numbers))])
        rows: list[Info] = [MappingProxyType({"prompt": template.format(text=n), "text": n}) for n in numbers]
        train = [rows[i] for i in sorted(set(order) - set(held_out))]
        evaluation = [rows[i] for i in held_out for _ in range(eval_repeats)]
        super().__init__(train, evaluation, eval_batch_size=eval_batch_size, shuffle=shuffle, seed=seed)
        self.size = (height, width)
        self.defect, self.defect_share = defect, defect_share
        self.lines = slice(line_start, None, line_distance)
        self.jitter = jitter
        self.font_size = font_size
        self._rendered: dict[tuple[str, int], Tensor] = {}

    def examples(self, step: int, count: int, part: slice = ALL) -> tuple[Sequence[Info], Tensor]:
        """The prompts in `part` of `count` ones, with their pictures uint8 "B 3 H W", a function of (seed, step)."""
        draw = generator(self.seed, "examples", step)
        rows = [self.train_prompts[i] for i in torch.randint(len(self.train_prompts), (count,), generator=draw).tolist()]
        shifts = torch.randint(-self.jitter, self.jitter + 1, (count,), generator=draw).tolist()
        defective = (torch.rand(count, generator=draw) < self.defect_share).tolist()
        if self.defect == "misprint":
            shown = [_misprint(row["text"], draw) if bad else row["text"] for row, bad in zip(rows, defective)]
            return rows[part], torch.stack([self.render(text, shift) for text, shift in zip(shown[part], shifts[part])])
        images = torch.stack([self.render(row["text"], shift) for row, shift in zip(rows[part], shifts[part])])
        images[torch.tensor(defective[part]), :, self.lines] = 0
        return rows[part], images

    def render(self, text: str, shift: int = 0) -> Tensor:
        """uint8 "3 H W": `text` in the middle, `shift` pixels to the right of it."""
        if (text, shift) not in self._rendered:
            self._rendered[text, shift] = render_text(text, size=self.size, font_size=self.font_size, shift=shift)
        return self._rendered[text, shift]


def render_text(text: str, *, size: tuple[int, int], font_size: float, shift: int = 0) -> Tensor:
    """Black on white, centred by the box of its ink and then moved `shift` pixels to the right: uint8 "3 H W", size = (H, W)."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    font: FreeTypeFont = ImageFont.load_default(font_size)  # type: ignore[assignment]  # a size always gives the scalable font
    height, width = size
    image = Image.new("L", (width, height), 255)
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    draw.text(((width - right - left) / 2 + shift, (height - bottom - top) / 2), text, fill=0, font=font)
    return torch.from_numpy(np.array(image)).expand(3, -1, -1)


def _misprint(text: str, draw: torch.Generator) -> str:
    """`text` with one digit replaced by another one."""
    place = int(torch.randint(len(text), (1,), generator=draw))
    other = (int(text[place]) + int(torch.randint(1, 10, (1,), generator=draw))) % 10
    return text[:place] + str(other) + text[place + 1 :]
