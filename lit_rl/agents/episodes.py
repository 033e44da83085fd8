"""One episode: an agent and a world take turns, until one of them ends it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_rl.agents.codecs import Codec
from lit_rl.agents.desk import Desk
from lit_rl.agents.screens import Screen
from lit_rl.envs.actions import Action, ActionError
from lit_rl.envs.base import Observation, World
from lit_rl.envs.failures import Status
from lit_rl.envs.tasks import Task
from lit_rl.policies.base import Message, TokenPolicy
from lit_rl.rollouts.base import Request, Sample
from lit_rl.seeding import Key


@dataclass(frozen=True, kw_only=True)
class Manner:
    """Settings of one episode: its length, what its prompts show, and its limits.

    Args:
        max_turns: Actions of an episode at most; a task may name its own.
        history: Earlier turns that a prompt shows as text.
        screenshots: Pictures that a prompt shows, the present one among them.
        max_prompt_tokens: A longer prompt leaves out its oldest turns; None = no limit.
        max_parse_errors: Answers in a row that are no action, after which an episode ends.
        max_repeats: Times in a row that the same action may be taken on the same screen, after which an episode ends; 0 = no limit.
        parse_penalty: Taken off the reward for each answer that is no action.
        turn_s: Seconds that an answer may take.
        episode_s: Seconds of an episode, from its first look on.
        action_delay_s: Seconds between an action and the look at its effect.
    """

    max_turns: int = 15
    history: int = 5
    screenshots: int = 1
    max_prompt_tokens: int | None = None
    max_parse_errors: int = 3
    max_repeats: int = 5
    parse_penalty: float = 0.0
    turn_s: float = 600.0
    episode_s: float = 3600.0
    action_delay_s: float = 0.0


@dataclass(frozen=True)
class Shown:
    """A prompt: its conversation, its pictures uint8 "3 H W", both as the model reads them, and the screen on which points are."""

    messages: Sequence[Message]
    pictures: Sequence[Tensor]
    ids: list[int]
    media: Sequence[Tensor]
    screen: Screen | None


@dataclass
class Turn:
    """One answer, what it was to, and what became of it."""

    shown: Shown
    sample: Sample
    text: str
    state: str  # name of the state that it was to
    look: Image.Image | None
    action: Action | None = None
    error: str = ""


@dataclass
class Trajectory:
    """An episode that has ended.

    reward: NaN where the infrastructure failed; the parse penalty is not in it. seed: of the world. temperature: of its answers, where
    siblings have different ones.
    """

    task: Task
    group: int
    number: int
    seed: int
    attempt: int = 0
    instruction: str = ""
    status: Status = Status.CANCELLED
    reward: float = math.nan
    turns: list[Turn] = field(default_factory=list)
    last: Image.Image | None = None
    seconds: float = 0.0
    why: str = ""
    temperature: float | None = None

    @property
    def parse_errors(self) -> int:
        """Answers that were no action."""
        return sum(turn.action is None for turn in self.turns)

    @property
    def success(self) -> bool:
        """The task was done."""
        return self.status is Status.SUCCESS


class Episode:
    """Plays one episode of a task in a world that was just opened."""

    def __init__(self, policy: TokenPolicy, codec: Codec, manner: Manner, desk: Desk, *, key: tuple[Key, ...]) -> None:
        self.policy, self.codec, self.manner, self.desk, self.key = policy, codec, manner, desk, key

    async def play(self, world: World, trajectory: Trajectory) -> Trajectory:
        """The trajectory, completed. Raises WorldError and RolloutError, which are not the policy's fault."""
        task, began = trajectory.task, time.monotonic()
        trajectory.instruction = await world.reset(task, trajectory.seed)
        seen = await world.screenshot()
        try:
            async with asyncio.timeout(self.manner.episode_s) as limit:
                status = await self._turns(world, trajectory, seen)
        except TimeoutError:
            if not limit.expired():
                raise
            status = Status.TASK_TIMEOUT
        outcome = await world.evaluate()
        judged = status in (Status.MAX_TURNS, Status.TASK_TIMEOUT, Status.FAILURE)
        trajectory.status = Status.SUCCESS if judged and outcome.success else status
        trajectory.reward = outcome.reward if judged else 0.0
        trajectory.seconds = time.monotonic() - began
        return trajectory

    async def _turns(self, world: World, trajectory: Trajectory, seen: Observation) -> Status:
        """Play all turns and return how the episode ended; FAILURE stands for whatever the world's evaluation says."""
        wrong = repeats = 0
        before: tuple[str, str] | None = None
        for number in range(trajectory.task.max_turns or self.manner.max_turns):
            turn = await self._turn(world, trajectory, seen, number)
            trajectory.turns.append(turn)
            wrong = 0 if turn.action else wrong + 1
            if wrong >= self.manner.max_parse_errors:
                return Status.PARSE_ERROR
            if self.manner.action_delay_s:
                await asyncio.sleep(self.manner.action_delay_s)
            seen = await world.screenshot()
            trajectory.last = seen.image
            if seen.ended:
                return Status.FAILURE
            same = (turn.state, turn.text)
            repeats, before = (repeats + 1 if same == before else 1), same
            if self.manner.max_repeats and repeats > self.manner.max_repeats:
                return Status.FAILURE
        return Status.MAX_TURNS

    async def _turn(self, world: World, trajectory: Trajectory, seen: Observation, number: int) -> Turn:
        shown = self.prompt(world, trajectory, seen)
        key, row = (*self.key, trajectory.attempt, number), {"prompt": list(shown.messages)}
        request = Request(shown.ids, key, shown.media, row, trajectory.temperature)
        async with asyncio.timeout(self.manner.turn_s):
            sample = await self.answer(world, request, shown)
        text = self.policy.decode(sample.ids)
        turn = Turn(shown, sample, text, seen.key, seen.image)
        try:
            turn.action = self.codec.read(text, shown.screen)
            await world.execute(turn.action)
        except ActionError as error:
            turn.error = str(error)
        return turn

    async def answer(self, world: World, request: Request, shown: Shown) -> Sample:
        """The policy's answer."""
        return await self.desk.answer(request)

    # ------------------------------------------------------------------ what the policy is shown
    def prompt(self, world: World, trajectory: Trajectory, seen: Observation) -> Shown:
        """The prompt of the present turn."""
        screen = self._screen(seen.image)
        for kept in range(min(self.manner.history, len(trajectory.turns)), -1, -1):
            messages, pictures = self._messages(world, trajectory, seen, screen, kept)
            sizes = [(picture.shape[1], picture.shape[2]) for picture in pictures]
            ids = self.policy.encode(messages)
            ids, _ = self.policy.with_pictures(ids, [False] * len(ids), sizes)
            if self.manner.max_prompt_tokens is None or len(ids) <= self.manner.max_prompt_tokens or not kept:
                break
        return Shown(messages, pictures, ids, self.policy.media(pictures), screen)

    def _screen(self, image: Image.Image | None) -> Screen | None:
        if image is None:
            return None
        read = self.policy.media([_pixels(image)])[0]
        return Screen(image.size, (read.shape[2], read.shape[1]))

    def _messages(
        self, world: World, trajectory: Trajectory, seen: Observation, screen: Screen | None, kept: int
    ) -> tuple[list[Message], list[Tensor]]:
        """The conversation with the last `kept` turns: answers as they were, pictures of the newest alone."""
        limit = trajectory.task.max_turns or self.manner.max_turns
        messages: list[Message] = []
        if system := self.codec.system(world.kinds, screen, limit):
            messages.append({"role": "system", "content": system})
        turns = trajectory.turns[len(trajectory.turns) - kept :]
        looks = [*(turn.look for turn in turns), seen.image]
        shown = len(looks) - self.manner.screenshots
        pictures = []
        for i, image in enumerate(looks):
            said = trajectory.instruction if i == 0 else ""
            if i and turns[i - 1].error:
                said = turns[i - 1].error
            if i == len(looks) - 1 and seen.text:
                said = f"{said}\n{seen.text}".strip()
            content: list[dict[str, str]] = [{"type": "text", "text": said}] if said else []
            if image is not None and i >= shown:
                pictures.append(_pixels(image))
                content.insert(0, {"type": "image"})
            messages.append({"role": "user", "content": content or ""})
            if i < len(turns):
                messages.append({"role": "assistant", "content": turns[i].text})
        return messages, pictures


def _pixels(image: Image.Image) -> Tensor:
    """uint8 "3 H W"."""
    return torch.from_numpy(np.asarray(image.convert("RGB")).copy()).permute(2, 0, 1).contiguous()
