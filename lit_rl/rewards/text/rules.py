"""Rules by data source."""

from __future__ import annotations

import difflib
import logging
import math as numbers
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.rewards.base import RewardError, TextReward
from lit_rl.rewards.text.gsm8k import gsm8k, gsm8k_robust, number
from lit_rl.rewards.text.math import math
from lit_rl.rewards.text.math_dapo import math_dapo, math_dapo_boxed
from lit_rl.rewards.text.truth import accepted_texts, is_number
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
    "hiyouga/geometry3k": "math",
    "math_dapo": "math_dapo",
    "aime*": "math_dapo",
}
"""Rule by `data_source`; `*` stands for anything, `?` for one letter."""
WRITTEN = {
    "gsm8k": "#### {}",
    "gsm8k_flexible": "{}",
    "gsm8k_robust": "#### {}",
    "math": "\\boxed{{{}}}",
    "math_dapo": "Answer: {}",
    "math_dapo_boxed": "\\boxed{{{}}}",
}
"""The form in which each rule finds an answer."""
WITH_FORMAT_SCORE = ("gsm8k", "gsm8k_flexible", "gsm8k_robust")
GSM8K_NUMBER = re.compile(r"-?[.,]*[0-9][0-9.,]*")
"""Letters of which the gsm8k rules make an answer."""
MODEL = "model"
SHOWN = 10


class RuleReward(TextReward):
    """Scores each answer by the rule that its row asks for: `score`, `acc` (1 = right) and `parsed` (1 = something was read as an answer).

    A row is scored by the rule of its `data_source`; where there is none, by `default` if its `reward_model.style` is `rule` and by
    `model` if that is `model`. Rows that nothing scores stop the run before it starts.

    Rules: gsm8k (the number after "#### ", letter for letter), gsm8k_flexible (the last number), gsm8k_robust (compared as numbers),
    math (the last \\boxed{}), math_dapo (what follows "Answer:"; -1 for wrong), math_dapo_boxed.

    reward_model.ground_truth is a text, a number, or a list of which any is right: see `accepted_texts`.

    Args:
        sources: Rule by `data_source`, in addition to the known names and before them, e.g. {my_set: math, openai/gsm8k: gsm8k_robust}.
            A name may hold `*` and `?`: the equal name comes first, then the first pattern in the order of the file that fits.
        default: Rule for rows of style `rule` whose data source has none.
        model: Scores rows of style `model`; its first score becomes `score`, `acc` and `parsed` are NaN.
        format_score: Of the gsm8k rules, for a wrong number in the right place.
    """

    outputs = ("score", "acc", "parsed")
    highest = MappingProxyType({"score": 1.0, "acc": 1.0})

    def __init__(
        self,
        *,
        sources: dict[str, str] | None = None,
        default: str | None = None,
        model: TextReward | None = None,
        format_score: float = 0.0,
    ) -> None:
        self.own = sources or {}
        self.sources = self.own | {name: rule for name, rule in SOURCES.items() if name not in self.own}
        for name, rule in [*self.sources.items(), *([("default", default)] if default else [])]:
            if rule not in RULES:
                raise ConfigError(f"{name}: there is no rule {rule!r}; choose from {', '.join(RULES)}")
        self.default = default
        self.model = model
        self.format_score = format_score

    # ------------------------------------------------------------------ which rule
    def route(self, row: Info) -> str:
        """Name of the rule that scores a row, or `model`. Raises ConfigError where there is none."""
        source, spec = str(row.get("data_source")), row.get("reward_model") or {}
        rule = self._rule_of(source)
        style = spec.get("style")
        if rule is None and style == MODEL and self.model is not None:
            return MODEL
        rule = rule or (self.default if style == "rule" else None)
        if rule is None:
            raise ConfigError(
                f"data_source {source!r} has no rule and reward_model.style is {style!r}: known sources are {', '.join(self.sources)}. "
                + "".join(f"Did you mean {name}? " for name in difflib.get_close_matches(source, self.sources, n=1, cutoff=0.8))
                + (
                    "Give RuleReward a model, e.g. model: {class_path: lit_rl.rewards.text.model.ModelReward, ...}"
                    if style == MODEL
                    else f"Name one in sources, e.g. {{{source}: gsm8k}}, set default to a rule for rows of style rule, or score by "
                    "lit_rl.rewards.text.function.FunctionReward or lit_rl.rewards.text.model.ModelReward instead"
                )
            )
        truths(rule, spec.get("ground_truth"))
        return rule

    def _rule_of(self, source: str) -> str | None:
        """The rule of a data source: of the run's own names, then of the known ones, the equal name, else the first pattern that fits."""
        for names in (self.own, SOURCES):
            if source in names:
                return names[source]
            for pattern, rule in names.items():
                if fits(source, pattern):
                    return rule
        return None

    def check(self, rows: Iterable[Info]) -> None:
        """Raises ConfigError that names the rows that no rule scores."""
        counts: Counter[str] = Counter()
        problems: list[str] = []
        unused = set(self.own)
        for row in rows:
            source = str(row.get("data_source"))
            unused -= {source} if source in unused else {name for name in unused if fits(source, name)}
            try:
                counts[self.route(row)] += 1
            except ConfigError as error:
                problems.append(f"{row.get('place') or 'row ' + str(row.get('id', ''))}: {error}")
        if problems:
            more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
            raise ConfigError("\n  ".join([f"{len(problems)} prompts whose answers nobody can score", *problems[:SHOWN], *more]))
        if unused:
            log.warning("RuleReward: no row has the data_source %s that sources names", ", ".join(sorted(unused)))
        log.info("RuleReward scores %s", ", ".join(f"{count} rows by {rule}" for rule, count in counts.items()))

    # ------------------------------------------------------------------ life
    def setup(self, *, rank: int, world_size: int, device: str) -> None:
        """Load the model, if there is one."""
        if self.model is not None:
            self.model.setup(rank=rank, world_size=world_size, device=device)

    async def close(self) -> None:
        """Close the model, if there is one."""
        if self.model is not None:
            await self.model.close()

    def counters(self) -> Mapping[str, float]:
        """The model's, if there is one."""
        return self.model.counters() if self.model is not None else {}

    # ------------------------------------------------------------------ scores
    def score(self, media: Sequence[str], info: Sequence[Info]) -> Mapping[str, Tensor]:
        """The verdict of each row on its answer. Raises RewardError for a row that no rule scores."""
        try:
            rules = [self.route(row) for row in info]
        except ConfigError as error:
            raise RewardError(str(error)) from error
        table = torch.full((len(media), 3), numbers.nan, dtype=torch.float64)
        for i, (text, row, rule) in enumerate(zip(media, info, rules, strict=True)):
            if rule != MODEL:
                verdict = self._apply(rule, text, row["reward_model"]["ground_truth"])
                table[i] = torch.tensor([verdict.score, verdict.right, verdict.read is not None])
        by_model = [i for i, rule in enumerate(rules) if rule == MODEL]
        if by_model and self.model is not None:
            scores = self.model.score([media[i] for i in by_model], [info[i] for i in by_model])
            table[by_model, 0] = next(iter(scores.values())).double()
            self.last_error = self.model.last_error
        return dict(zip(self.outputs, table.unbind(1), strict=True))

    def _apply(self, rule: str, text: str, truth: object) -> Verdict:
        """The verdict on the accepted answer that the text gives, else on the first. A number is also compared as one: 18.50 is 18.5."""
        options: dict[str, float] = {"format_score": self.format_score} if rule in WITH_FORMAT_SCORE else {}
        accepted = truths(rule, truth)
        best = max((RULES[rule](text, form, **options) for form in accepted), key=lambda verdict: verdict.right)
        if not best.right and best.read is not None and is_number(truth) and number(best.read) == number(accepted[0]):
            return RULES[rule](text, best.read, **options)
        return best


def fits(source: str, pattern: str) -> bool:
    """True when a data source matches a pattern: `*` and `?` as in file names, [ ] literally or as a choice of letters."""
    return fnmatchcase(source, pattern) or fnmatchcase(source, pattern.replace("[", "[[]"))


def truths(rule: str, value: object) -> tuple[str, ...]:
    """The texts that a rule accepts for a ground truth. Raises ConfigError for one that no answer can give."""
    try:
        accepted = accepted_texts(value)
    except ConfigError as error:
        raise ConfigError(f"reward_model.ground_truth: rule {rule} needs {error}") from None
    if rule in WITH_FORMAT_SCORE and not any(GSM8K_NUMBER.fullmatch(text) for text in accepted):
        raise ConfigError(
            f"reward_model.ground_truth: rule {rule} reads numbers, found {value!r}; name a rule that reads texts for this data_source in "
            "sources, e.g. math (\\boxed{}) or math_dapo (Answer: ...)"
        )
    if not any(RULES[rule](WRITTEN[rule].format(text), text).right for text in accepted):
        raise ConfigError(
            f"reward_model.ground_truth: rule {rule} counts no answer as right where the truth is {str(value)[:80]!r}, not even "
            f"{WRITTEN[rule].format(accepted[0])[:100]!r}; write it as the rule reads it (72.5 for 72,5; one line; closed braces)"
        )
    return accepted
