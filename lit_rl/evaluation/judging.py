"""The judge of an evaluation set is asked about each image as soon as it is there, beside the rendering of the next ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from torch import Tensor

from lit_rl.evaluation.instructions import instruction
from lit_rl.evaluation.unigenbench import Verdict, read_verdict
from lit_rl.rewards.background import Background
from lit_rl.rewards.judges.client import Judge, JudgeClient
from lit_rl.rewards.judges.messages import picture, question

MODEL = "UniGenBench-EvalModel-qwen3vl-32b-v1"
FORM = "`<analysis>[...]</analysis>` and `<score>[...]</score>` with a 0 or 1 for each testpoint"


@dataclass(frozen=True)
class Question:
    """An image's place in its set, and what is asked about it."""

    verdict: Verdict
    template: str
    descriptions: Sequence[str]

    @property
    def text(self) -> str:
        """The instruction."""
        asked = self.verdict
        return instruction(self.template, prompt=asked.prompt, testpoints=asked.testpoints, descriptions=self.descriptions)


class Judging:
    """Asks one judge on a loop of its own; verdicts come in the order of the questions."""

    def __init__(self, client: JudgeClient) -> None:
        self.client = client
        self._background: Background | None = None
        self._under_way: list[Future[Verdict]] = []

    def submit(self, image: Tensor, asked: Question) -> None:
        """Ask about an image uint8 "3 H W"; returns at once."""
        if self._background is None or self._background.pid != os.getpid():
            self._background, self._under_way = Background(), []
        self._under_way.append(self._background.run(self._ask(image, asked)))

    def gather(self) -> list[Verdict]:
        """Wait for the verdicts on all that was submitted since the last call."""
        waiting, self._under_way = self._under_way, []
        return [future.result() for future in waiting]

    def close(self) -> None:
        """Cancel what is under way, and end the loop."""
        background, self._background, self._under_way = self._background, None, []
        if background is not None and background.pid == os.getpid():
            background.close([self.client])

    async def _ask(self, image: Tensor, asked: Question) -> Verdict:
        reply = await self.client.ask(question(asked.text, picture(image, self.client.judge.encoding)))
        if reply.text is None:
            return replace(asked.verdict, status="no_answer", reason=reply.reason)
        found = read_verdict(reply.text, asked.verdict.testpoints)
        if found is None:
            self.client.note_unreadable(reply.text, FORM)
            return replace(asked.verdict, status="unreadable", reason=self.client.last_error)
        return replace(asked.verdict, status="judged", scores=found[0], analysis=found[1], reason="")


def unigenbench_judge() -> Judge:
    """UniGenBench asks its model so: the server's own temperature."""
    return Judge(temperature=None, concurrency=16, body={"do_sample": False})


def judge_client(judge: Judge) -> JudgeClient:
    """The client of UniGenBench's judge, with the environment's UNIGENBENCH_MODEL_NAME where the judge has no name."""
    model = os.environ.get("UNIGENBENCH_MODEL_NAME", "").strip() or MODEL
    return JudgeClient(judge, variable="UNIGENBENCH_API_URL", port=8000, model=model)
