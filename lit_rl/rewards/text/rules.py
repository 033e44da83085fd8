"""Which rule scores which row."""

from __future__ import annotations

import logging
import math as numbers
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.rewards.base import RewardError, TextReward
from lit_rl.rewards.text.gsm8k import gsm8k, gsm8k_robust
from lit_rl.rewards.text.math import math
from lit_rl.rewards.text.math_dapo import math_dapo, math_dapo_boxed
from lit_rl.rewards.text.verdict import Verdict
from lit_rl.types import Info

log = logging.getLogger(__name__)

Rule = Callable[..., Verdict]

RULES: dict[str, Rule] = {
    "gsm8k": gsm8k,
    "gsm8k_flexible": partial(gsm8k, method="flexible"),
    "gsm8k_robust": gsm8k_robust,
    "math": math,
    "math_dapo": math_dapo,
    "math_dapo_boxed": math_dapo_boxed,
}
SOURCES = {
    "gsm8k": "gsm8k",
    "openai/gsm8k": "gsm8k",
    "math": "math",
    "lighteval/MATH": "math",
    "HuggingFaceH4/MATH-500": "math",
    "DigitalLearningGmbH/MATH-lighteval": "math",
    "math_dapo": "math_dapo",
    "aime*": "math_dapo",
}
"""Rule by `data_source`; `*` stands for anything."""
WITH_FORMAT_SCORE = ("gsm8k", "gsm8k_flexible", "gsm8k_robust")
MODEL = "model"
SHOWN = 10


class RuleReward(TextReward):
    """Scores each answer by the rule that its row asks for: `score`, `acc` (1 = right) and `parsed` (1 = something was read as an answer).

    A row is scored by the rule of its `data_source`; where there is none, by `default` if its `reward_model.style` is `rule` and by
    `model` if that is `model`. Rows that nothing scores stop the run before it starts.

    Rules: gsm8k (the number after "#### ", letter for letter), gsm8k_flexible (the last number), gsm8k_robust (compared as numbers),
    math (the last \\boxed{}), math_dapo (what follows "Answer:"; -1 for wrong), math_dapo_boxed.

    Args:
        sources: Rule by `data_source`, in addition to the known names and before them, e.g. {my_set: math, openai/gsm8k: gsm8k_robust}.
        default: Rule for rows of style `rule` whose data source has none.
        model: Scores rows of style `model`; its first score becomes `score`, `acc` and `parsed` are NaN.
        format_score: Of the gsm8k rules, for a wrong number in the right place.
    """

    outputs = ("score", "acc", "parsed")

    def __init__(
        self,
        *,
        sources: dict[str, str] | None = None,
        default: str | None = None,
        model: TextReward | None = None,
        format_score: float = 0.0,
    ) -> None:
        self.sources = (sources or {}) | {name: rule for name, rule in SOURCES.items() if name not in (sources or {})}
        for name, rule in [*self.sources.items(), *([("default", default)] if default else [])]:
            if rule not in RULES:
                raise ConfigError(f"{name}: there is no rule {rule!r}; choose from {', '.join(RULES)}")
        self.default = default
        self.model = model
        self.format_score = format_score

    # ------------------------------------------------------------------ which rule
    def route(self, row: Info) -> str:
        """Name of the rule that scores a row, or `model`. Raises ConfigError where there is none."""
        source, asked = str(row.get("data_source")), row.get("reward_model") or {}
        rule = next((rule for name, rule in self.sources.items() if fnmatchcase(source, name)), None)
        style = asked.get("style")
        if rule is None and style == MODEL and self.model is not None:
            return MODEL
        rule = rule or (self.default if style == "rule" else None)
        if rule is None:
            raise ConfigError(
                f"data_source {source!r} has no rule and reward_model.style is {style!r}: known sources are {', '.join(self.sources)}. "
                + (
                    "Give RuleReward a model, e.g. model: {class_path: lit_rl.rewards.text.model.ModelReward, ...}"
                    if style == MODEL
                    else f"Name one in sources, e.g. {{{source}: gsm8k}}, set default to a rule for rows of style rule, or score by "
                    "lit_rl.rewards.text.function.FunctionReward or lit_rl.rewards.text.model.ModelReward instead"
                )
            )
        if not isinstance(asked.get("ground_truth"), str | int | float) or asked["ground_truth"] == "":
            raise ConfigError(f"reward_model.ground_truth: rule {rule} needs a text or number, found {asked.get('ground_truth')!r}")
        return rule

    def check(self, rows: Iterable[Info]) -> None:
        counts: Counter[str] = Counter()
        problems: list[str] = []
        for row in rows:
            try:
                counts[self.route(row)] += 1
            except ConfigError as error:
                problems.append(f"row {row.get('id', '')}: {error}")
        if problems:
            more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
            raise ConfigError("\n  ".join([f"{len(problems)} prompts whose answers nobody can score", *problems[:SHOWN], *more]))
        log.info("RuleReward scores %s", ", ".join(f"{count} rows by {rule}" for rule, count in counts.items()))

    # ------------------------------------------------------------------ life
    def setup(self, *, rank: int, world_size: int, device: str) -> None:
        if self.model is not None:
            self.model.setup(rank=rank, world_size=world_size, device=device)

    async def close(self) -> None:
        if self.model is not None:
            await self.model.close()

    def counters(self) -> Mapping[str, float]:
        return self.model.counters() if self.model is not None else {}

    # ------------------------------------------------------------------ scores
    def score(self, media: Sequence[str], info: Sequence[Info]) -> Mapping[str, Tensor]:  # type: ignore[override]
        try:
            rules = [self.route(row) for row in info]
        except ConfigError as error:
            raise RewardError(str(error)) from error
        table = torch.full((len(media), 3), numbers.nan, dtype=torch.float64)
        for i, (text, row, rule) in enumerate(zip(media, info, rules, strict=True)):
            if rule != MODEL:
                verdict = self._apply(rule, text, str(row["reward_model"]["ground_truth"]))
                table[i] = torch.tensor([verdict.score, verdict.right, verdict.read is not None])
        asked = [i for i, rule in enumerate(rules) if rule == MODEL]
        if asked and self.model is not None:
            scores = self.model.score([media[i] for i in asked], [info[i] for i in asked])
            table[asked, 0] = next(iter(scores.values())).double()
            self.last_error = self.model.last_error
        return dict(zip(self.outputs, table.unbind(1), strict=True))

    def _apply(self, rule: str, text: str, truth: str) -> Verdict:
        options: dict[str, Any] = {"format_score": self.format_score} if rule in WITH_FORMAT_SCORE else {}
        return RULES[rule](text, truth, **options)
