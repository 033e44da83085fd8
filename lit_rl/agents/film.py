"""An episode as one picture: the screens it saw, the actions marked on them, and what was said beneath."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from lit_rl.agents.episodes import Trajectory, Turn
from lit_rl.envs.actions import Action

FRAME = 192
"""Pixels that the shorter side of a screen has at least."""
MARK = (235, 0, 120)
TEXT = 12
LINES = 3


def film_strip(trajectory: Trajectory) -> Image.Image | None:
    """Screens from left to right, the last one as the episode left it; None for a world without pictures.

    A click is a ring around its point, a drag a line to its end. Beneath: the action, or an answer that was none; in red what was wrong.
    """
    looks = [turn.look for turn in trajectory.turns]
    if not looks or looks[0] is None:
        return None
    frames = [_marked(look, turn.action) for look, turn in zip(looks, trajectory.turns, strict=True) if look is not None]
    told = [(_said(turn), turn.error) for turn in trajectory.turns]
    if trajectory.last is not None:
        frames.append(_marked(trajectory.last, None))
        told.append((str(trajectory.status), trajectory.why))
    return _sheet(frames, told, f"{trajectory.task.id}: {trajectory.instruction}")


def _said(turn: Turn) -> str:
    """The action in a few words; the answer where it was none."""
    if turn.action is None:
        return turn.text
    told = [f"({x:.0f}, {y:.0f})" for x, y in turn.action.points]
    return " ".join(filter(None, [turn.action.kind, *told, turn.action.text, turn.action.target, "+".join(turn.action.keys)]))


def _marked(look: Image.Image, action: Action | None) -> Image.Image:
    """The screen, enlarged without smoothing, with its action."""
    factor = max(1, -(-FRAME // min(look.size)))
    frame = look.convert("RGB").resize((look.width * factor, look.height * factor), Image.Resampling.NEAREST)
    points = [((x + 0.5) * factor, (y + 0.5) * factor) for x, y in action.points] if action else []
    pen, radius = ImageDraw.Draw(frame), max(5, min(frame.size) // 24)
    if len(points) == 2:
        pen.line([*points[0], *points[1]], fill=MARK, width=3)
    for x, y in points[:1]:
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline="white", width=5)
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=MARK, width=3)
    return frame


def _sheet(frames: Sequence[Image.Image], told: Sequence[tuple[str, str]], title: str) -> Image.Image:
    font, line = ImageFont.load_default(TEXT), TEXT + 3
    width, height = frames[0].width + 8, frames[0].height
    sheet = Image.new("RGB", (width * len(frames), line + 6 + height + line * LINES + 6), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((4, 2), _cut(pen, font, title, sheet.width - 8), fill="black", font=font)
    for i, (frame, (text, error)) in enumerate(zip(frames, told, strict=True)):
        x, y = i * width + 4, line + 6
        sheet.paste(frame, (x, y))
        rows = [(text, "black"), (error, "#b00020")]
        for n, (words, colour) in enumerate((words, colour) for words, colour in rows if words):
            pen.text((x, y + height + 2 + n * line), _cut(pen, font, " ".join(words.split()), width - 8), fill=colour, font=font)
    return sheet


def _cut(pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str, width: float) -> str:
    """The text, with an ellipsis where it is too long."""
    if pen.textlength(text, font) <= width:
        return text
    while text and pen.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"
