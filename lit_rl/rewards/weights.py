"""Weights of named scores in the total reward."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from lit_rl.errors import ConfigError


def resolve_weights(names: Mapping[str, Sequence[str]], given: Mapping[str, float] | None, *, complete: bool) -> dict[str, float]:
    """Weight of every named score: the given one, else 0. Where nothing is given and there is one reward, 1 for its main score.

    names: by label of the reward; complete: these are all. Raises ConfigError when two rewards share a name, a weight has no score,
    or several rewards have no weights.
    """
    owner: dict[str, str] = {}
    for label, outputs in names.items():
        for name in outputs:
            if name in owner:
                raise ConfigError(
                    f"rewards {owner[name]} and {label} both give a score named {name}; rename one, "
                    f"e.g. by HTTPReward's outputs: {{{name}_2: {name}}}"
                )
            owner[name] = label
    if not complete:
        return {name: float(weight) for name, weight in (given or {}).items()}
    mains = {main_score(outputs): 1.0 for outputs in names.values() if outputs}
    if given is None and len(mains) > 1:
        raise ConfigError(
            f"{len(names)} rewards give {len(owner)} scores, {sorted(owner)}; set weights to say how much each counts, e.g. {mains}"
        )
    if unknown := sorted(set(given or {}) - set(owner)):
        near = [match for name in unknown for match in difflib.get_close_matches(name, owner, n=1)]
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"weights name {unknown}, but the rewards give {sorted(owner)}{meant}")
    return {name: float((mains if given is None else given).get(name, 0.0)) for name in owner}


def check_rows(places: Mapping[str, str], weights: Mapping[str, float]) -> None:
    """Raise ConfigError where rows of the data name a score that no reward gives. places: Where each name stands, `file: key`."""
    for name, place in places.items():
        if name not in weights:
            near = difflib.get_close_matches(name, weights, n=1)
            meant = f"; did you mean {near[0]}?" if near else "."
            raise ConfigError(
                f"{place} names the reward {name!r}, but the rewards of the run give {sorted(weights)}{meant} Add a reward that gives it "
                "to RewardScoring's `rewards`"
            )


def main_score(outputs: Sequence[str]) -> str:
    """The score of a reward that counts where a run gives no weights: `score`, else the first."""
    return "score" if "score" in outputs else outputs[0]
