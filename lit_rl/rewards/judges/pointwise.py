"""Judges that look at one picture: marks by name, a rubric of the user's, and reading text."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.rewards.judges.client import Judge
from lit_rl.rewards.judges.dialects import WANTED, Dialect, read_mark, read_points
from lit_rl.rewards.judges.messages import Part, harmless, question
from lit_rl.rewards.judges.reward import JudgeReward, column
from lit_rl.rewards.quotes import check_targets, find_target
from lit_rl.types import Info

EVALUATE = "Please evaluate this image based on the prompt: {prompt}"
READ = (
    "Task: Evaluate how accurately the image renders the expected text specified by the prompt.\n"
    "Steps (brief): infer expected_text from the prompt, read recognized_text from the image, then output JSON.\n"
    "PROMPT:\n{prompt}\n"
)
READER = (
    "You read text in images. Compare the text that the image shows with the text that the prompt asks for: wrong, missing, doubled or "
    'additional characters lower the score. Answer with one JSON object: {"expected_text": "...", "recognized_text": "...", "score": X}, '
    "X from 0 (nothing of it can be read) to 1 (exactly this text)."
)


def template(given: str) -> str:
    """A text with `{prompt}` in it: the given one, or that of the file at this path. Raises ConfigError."""
    if "{prompt}" in given:
        return given
    path = Path(given).expanduser()
    if "\n" in given or not path.is_file():
        raise ConfigError(f"instruction: {given[:200]!r} neither holds {{prompt}} nor is the path of a file that does")
    text = path.read_text(encoding="utf-8")
    if "{prompt}" not in text:
        raise ConfigError(f"{path}: the instruction must hold {{prompt}}, where the prompt of the picture goes")
    return text


class _Pointwise(JudgeReward):
    """One question about each picture."""

    instruction: str
    system: str | None = None
    wanted: str

    @abstractmethod
    def read(self, answer: str) -> Mapping[str, float] | None:
        """The scores in an answer, by output; None where it has none."""

    async def score_async(self, media: Tensor, info: Sequence[Info]) -> Mapping[str, Tensor]:
        """Scores Float64 "B" by output."""
        parts = await self.pictures(media)
        rows = await asyncio.gather(*(self._ask(part, row) for part, row in zip(parts, info, strict=True)))
        self.last_error = self.client.last_error
        return {name: column([None if row is None else row[name] for row in rows]) for name in self.outputs}

    async def _ask(self, part: Part, row: Info) -> Mapping[str, float] | None:
        if not self.shows(row):
            return None
        text = self.instruction.replace("{prompt}", harmless(str(row["prompt"])))
        reply = await self.client.ask(question(text, part, system=self.system))
        if reply.text is None:
            return None
        if (scores := self.read(reply.text)) is None:
            self.client.note_unreadable(reply.text, self.wanted)
        return scores


class UnifiedReward(_Pointwise):
    """`unifiedreward` = the mean of two marks, `unifiedreward_alignment` and `unifiedreward_style`; all three NaN where one is missing.

    Args:
        judge: Its address and settings. Default: $UNIFIEDREWARD_THINK_URL, else localhost:18087, model `UnifiedReward`.
        scale: `unit` maps marks 1 to 5 to 0 to 1, `raw` leaves them, as DeepGen-RL does.
        instruction: Text of the question, or the path of a file with it; `{prompt}` is replaced by the prompt. The judge has to answer
            with `Alignment Score (1-5): X` and `Style Score (1-5): X`.
    """

    variable, port, model = "UNIFIEDREWARD_THINK_URL", 18087, "UnifiedReward"
    outputs = ("unifiedreward", "unifiedreward_alignment", "unifiedreward_style")
    wanted = "`Alignment Score (1-5): X` and `Style Score (1-5): X`"

    def __init__(self, judge: Judge | None = None, *, scale: Literal["unit", "raw"] = "unit", instruction: str = EVALUATE) -> None:
        super().__init__(judge)
        self.scale, self.instruction = scale, template(instruction)
        self.highest = MappingProxyType(dict.fromkeys(self.outputs, 1.0 if scale == "unit" else 5.0))

    def read(self, answer: str) -> Mapping[str, float] | None:
        if (marks := read_points(answer)) is None:
            return None
        alignment, style = (mark if self.scale == "raw" else (mark - 1) / 4 for mark in (marks["alignment"], marks["style"]))
        return dict(zip(self.outputs, ((alignment + style) / 2, alignment, style), strict=True))


class RubricReward(_Pointwise):
    """A mark by a rubric of yours, mapped from [low, high] to [0, 1].

    Args:
        instruction: Path of a file with the rubric, which says how to answer, or the text itself; `{prompt}` is replaced by the prompt.
        name: Of the score.
        judge: Its address and settings. Default: $JUDGE_URL, else localhost:8000; `judge.model` is the name it is served under.
        dialect: How it gives its mark: `final_score` (`Final Score: 4`), `tag` (`<score>4</score>`), `json` (`{"score": 4}`).
        low: The lowest mark, which becomes 0.
        high: The highest mark, which becomes 1.
        system: System message; none by default.
    """

    def __init__(
        self,
        instruction: str,
        *,
        name: str = "rubric",
        judge: Judge | None = None,
        dialect: Dialect = "final_score",
        low: float = 1.0,
        high: float = 5.0,
        system: str | None = None,
    ) -> None:
        super().__init__(judge)
        if not low < high:
            raise ConfigError(f"low={low}, high={high}: the lowest mark must be below the highest")
        self.instruction, self.system = template(instruction), system
        self.outputs, self.dialect, self.low, self.high = (name,), dialect, low, high
        self.highest = MappingProxyType({name: 1.0})
        self.wanted = f"{WANTED[dialect]} with X from {low:g} to {high:g}"

    def read(self, answer: str) -> Mapping[str, float] | None:
        mark = read_mark(answer, dialect=self.dialect, low=self.low, high=self.high)
        return None if mark is None else {self.outputs[0]: (mark - self.low) / (self.high - self.low)}


class VLMReader(_Pointwise):
    """`ocr_vllm` in [0, 1]: a vision-language model reads the picture and says how much of the wanted text it shows.

    A prompt without a text in quotes has no score; `check` names such prompts before a run.

    Args:
        judge: Its address and settings. Default: $OCR_VLLM_URL, else $UNIFIEDREWARD_THINK_URL, else localhost:18087; model `OCR-VLM`.
        system: What it is told to do, or the path of a file with it. It has to answer with `{"score": X}`.
        instruction: Text of the question, or the path of a file with it; `{prompt}` is replaced by the prompt.
    """

    port, model = 18087, "OCR-VLM"
    outputs = ("ocr_vllm",)
    highest = MappingProxyType({"ocr_vllm": 1.0})
    wanted = f"{WANTED['json']} with X from 0 to 1"

    def __init__(self, judge: Judge | None = None, *, system: str = READER, instruction: str = READ) -> None:
        import os

        self.variable = "OCR_VLLM_URL" if os.environ.get("OCR_VLLM_URL") else "UNIFIEDREWARD_THINK_URL"
        super().__init__(judge)
        path = Path(system).expanduser() if "\n" not in system and len(system) < 256 else None
        self.system = path.read_text(encoding="utf-8") if path is not None and path.is_file() else system
        self.instruction = template(instruction)

    def check(self, rows: Iterable[Info]) -> None:
        """Raises ConfigError for prompts without a wanted text, and for those that speak as a judge does."""
        check_targets(rows := list(rows))
        super().check(rows)

    def shows(self, row: Info) -> bool:
        if find_target(row) is None:
            self.client.note_failure(f"the prompt {str(row['prompt'])[:80]!r} asks for no text")
            return False
        return super().shows(row)

    def read(self, answer: str) -> Mapping[str, float] | None:
        mark = read_mark(answer, dialect="json", low=0.0, high=1.0)
        return None if mark is None else {"ocr_vllm": mark}
