"""A world of texts: the policy guesses a number, and is told whether it is higher or lower. Halving finds it in log2(most) turns."""

from __future__ import annotations

from random import Random

from lit_rl.envs.actions import Action, ActionError, Kind
from lit_rl.envs.base import Observation, Outcome, World, Worlds
from lit_rl.envs.failures import Limits
from lit_rl.envs.tasks import Task, known_keys
from lit_rl.errors import ConfigError

GUESSES: frozenset[Kind] = frozenset(("type",))


class NumberGame(World):
    """One game. See `NumberGames`."""

    kinds = GUESSES

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self.number, self.low, self.high, self.guesses = 0, 1, 1, 0
        self.said = ""

    async def on_reset(self, task: Task, seed: int) -> str:
        self.low, self.high = 1, greatest(task)
        self.number = Random(f"number game {seed}").randint(1, self.high)
        self.said = f"the number is from 1 to {self.high}"
        return task.instruction or f"find the number from 1 to {self.high}"

    async def on_screenshot(self) -> Observation:
        return Observation(text=self.said, ended=self.said == "found")

    async def on_execute(self, action: Action) -> None:
        if action.kind != "type":
            return
        text = action.text.strip()
        if not (text.isascii() and text.isdecimal() and len(text) < 10):
            raise ActionError(f"{text[:20]!r} is not a number; type digits alone")
        guess = int(text)
        self.guesses += 1
        if guess == self.number:
            self.said = "found"
        elif guess < self.number:
            self.said, self.low = f"higher than {guess}", max(self.low, guess + 1)
        else:
            self.said, self.high = f"lower than {guess}", min(self.high, guess - 1)

    async def on_evaluate(self) -> Outcome:
        found = self.said == "found"
        return Outcome(found, float(found), {"number": self.number, "guesses": self.guesses})

    def oracle(self) -> Action:
        """The middle of what is left, for demonstrations."""
        return Action(kind="done") if self.said == "found" else Action(kind="type", text=str((self.low + self.high) // 2))


def greatest(task: Task) -> int:
    """`params.most`. Raises ConfigError, beginning with the key."""
    known_keys(task.params, ("most",), "params.")
    known_keys(task.evaluator, (), "evaluator.")
    most = task.params.get("most", 100)
    if isinstance(most, bool) or not isinstance(most, int) or not 2 <= most <= 10**6:
        raise ConfigError(f"params.most: {most!r} is not a whole number from 2 to 1000000")
    return most


class NumberGames(Worlds):
    """Games without pictures: `type` a number, read `higher`, `lower` or `found`. A task's `params` may be {"most": 100}.

    Args:
        limits: Seconds that each call to a world may take.
    """

    kinds = GUESSES

    def __init__(self, *, limits: Limits | None = None) -> None:
        super().__init__(limits)

    def check(self, task: Task) -> None:
        greatest(task)

    async def on_open(self) -> NumberGame:
        return NumberGame(self.limits)
