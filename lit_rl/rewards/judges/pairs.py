"""Verdicts on pairs of a group, and what follows from them: win rates, ranks, the share of votes for the picture shown first.

A vote is the share of the first picture of a pair: 1 it wins, 0 it loses, 0.5 a tie, None no vote. Win rates, wins / comparisons, are those
of Pref-GRPO (arXiv 2508.20751).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lit_rl.rewards.judges.dialects import after_thoughts, last_object
from lit_rl.rewards.judges.messages import plain

LABELS = ("Image 1 is better", "Image 2 is better")
WANTED = f"`<answer>{LABELS[0]}</answer>`, or the same with 2"
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.IGNORECASE | re.DOTALL)
_TIE = re.compile(r"\b(equal|equally|tie|tied|draw|the same)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Vote:
    """A verdict on two members of a group; `share` is that of `first`, which was shown first. categories: further shares by name."""

    first: int
    second: int
    share: float | None
    categories: Mapping[str, float] = field(default_factory=dict)


def read_pair(answer: str, *, labels: tuple[str, str] = LABELS) -> float | None:
    """The vote in the `<answer>` behind the thoughts. None where there is no tag, where tags differ, or where both labels stand in one."""
    text = after_thoughts(answer)
    found = {_share(plain(inside), labels) for inside in _ANSWER.findall(text or "")}
    return found.pop() if len(found) == 1 else None


def _share(inside: str, labels: tuple[str, str]) -> float | None:
    first, second = (re.search(rf"\b{re.escape(label)}\b", inside, re.IGNORECASE) is not None for label in labels)
    if first is not second:
        return 1.0 if first else 0.0
    return 0.5 if _TIE.search(inside) and not first else None


def upstream_pair(answer: str, *, labels: tuple[str, str] = LABELS, whole: bool = False) -> float | None:
    """The vote as DeepGen-RL and Pref-GRPO read it: in the first `<answer>`, the first label counts, and case does.

    whole: Case does not count, and where the tag has no label the whole text is searched, as for edited images.
    """
    found = _ANSWER.search(answer) if whole else re.search(r"<answer>(.*?)</answer>", answer, re.DOTALL)
    for text in [*([found[1]] if found else []), *([answer] if whole else [])]:
        text, first, second = (part.lower() if whole else part for part in (text, *labels))
        if first in text or second in text:
            return 1.0 if first in text else 0.0
    return None


def read_categories(answer: str) -> tuple[float | None, dict[str, float]]:
    """UnifiedReward-Flex's JSON: the vote of `winner`, and votes of categories by name from `cat_winner`."""
    told = last_object(after_thoughts(answer) or "")
    if told is None:
        return None, {}
    listed = told.get("categories")
    rows = [row for row in listed if isinstance(row, dict)] if isinstance(listed, list) else []
    votes = {str(row["name"]): share for row in rows if "name" in row and (share := _winner(row.get("cat_winner"))) is not None}
    return _winner(told.get("winner")), votes


def _winner(value: object) -> float | None:
    return {"image 1": 1.0, "image 2": 0.0, "tie": 0.5}.get(str(value).strip().lower())


def win_rates(
    votes: Sequence[Vote], count: int, *, unread: float | None = None, alone: float = math.nan, digits: int | None = None
) -> list[float]:
    """wins / comparisons of each of `count` members, NaN for one that nobody voted on.

    unread: The share that both get of a verdict that cannot be read; None = no vote (upstream 0.5). alone: The value of a member without
    comparisons (upstream 0). digits: Of rounding (upstream 3).
    """
    wins, comparisons = [0.0] * count, [0] * count
    for vote in votes:
        share = unread if vote.share is None else vote.share
        if share is not None:
            for member, won in ((vote.first, share), (vote.second, 1 - share)):
                wins[member] += won
                comparisons[member] += 1
    rates = [won / times if times else alone for won, times in zip(wins, comparisons, strict=True)]
    return rates if digits is None else [round(rate, digits) for rate in rates]


def category_rates(votes: Sequence[Vote], count: int) -> dict[str, list[float]]:
    """Win rates by category, in the order in which categories are first named."""
    names = dict.fromkeys(name for vote in votes for name in vote.categories)
    of = {name: [Vote(v.first, v.second, v.categories[name]) for v in votes if name in v.categories] for name in names}
    return {name: win_rates(own, count) for name, own in of.items()}


def blended(
    overall: Sequence[float],
    categories: Mapping[str, Sequence[float]],
    *,
    overall_weight: float,
    category_weight: float,
    weights: Sequence[float] | None = None,
    last_weight: bool = False,
    digits: int | None = None,
) -> list[float]:
    """(w_o overall + w_c mean of categories) / (w_o + w_c) of each member; one without categories has its overall rate.

    weights: Of the categories in their order, 1 where there are no more. last_weight: w_c is the weight of the last category, as by a
    loop variable of Pref-GRPO's code.
    """
    own = [weights[i] if weights is not None and i < len(weights) else 1.0 for i in range(len(categories))]
    result = []
    for member, rate in enumerate(overall):
        told = [(w, rates[member]) for w, rates in zip(own, categories.values(), strict=True) if not math.isnan(rates[member])]
        if not told:
            result.append(rate)
            continue
        mean = sum(w * value for w, value in told) / sum(w for w, _ in told)
        mean = mean if digits is None else round(mean, digits)
        w = told[-1][0] if last_weight else category_weight
        result.append((overall_weight * rate + w * mean) / (overall_weight + w))
    return result


def ranks(scores: Sequence[float], *, average: bool = True) -> list[float]:
    """(rank - 1) / n in ascending order, in [0, 1); NaN stays.

    average: Equal scores share the mean of their ranks; False keeps their order (upstream).
    """
    known = sorted((score, i) for i, score in enumerate(scores) if not math.isnan(score))
    result = [math.nan] * len(scores)
    for place, (score, i) in enumerate(known):
        tied = [at for at, (other, _) in enumerate(known) if other == score]
        result[i] = (sum(tied) / len(tied) if average else place) / len(known)
    return result


def pairs_of(count: int, *, both: bool, alternate: bool = True) -> list[tuple[int, int]]:
    """All pairs of a group, the one that is shown first leading; every member leads in about half of its pairs.

    both: Each pair in both orders. alternate: False shows the lower number first, as upstream.
    """
    lower = [(i, j) for i in range(count) for j in range(i + 1, count)]
    if both:
        return [pair for i, j in lower for pair in ((i, j), (j, i))]
    return [(j, i) if alternate and (i + j) % 2 == 0 else (i, j) for i, j in lower]


def bias(votes: Sequence[Vote]) -> tuple[float, float]:
    """Share of the picture shown first in all votes, as sum and count: 0.5 is no bias where every picture leads as often as it follows."""
    told = [vote.share for vote in votes if vote.share is not None]
    return sum(told), float(len(told))


def contradictions(votes: Sequence[Vote]) -> tuple[float, float]:
    """Pairs that were judged in both orders with different results, and how many were judged in both."""
    seen = {(vote.first, vote.second): vote.share for vote in votes if vote.share is not None}
    twice = [(share, seen[j, i]) for (i, j), share in seen.items() if i < j and (j, i) in seen]
    return float(sum(share != 1 - other for share, other in twice)), float(len(twice))
