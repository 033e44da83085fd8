"""What a server of the tests holds and draws: a miniature with adapters, our own random numbers, and faults."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from peft import PeftConfig, PeftModel
from rewards.fault_proxy import Fault, LocalServer
from transformers import AutoModelForCausalLM

from lit_rl.samplers.tokens import draw_tokens

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
BASE = "miniature"


class Holding(LocalServer):
    """Each question for an answer takes the next of `faults`: those of `Fault`'s kinds status, drop, hang, slow, garbage, and abort, nan.

    stale: Says that it took the weights and did not. raw: Log-probabilities at temperature 1 of all tokens, as vLLM's default has them.
    processed: Those of the tokens that top_k and top_p leave, as vLLM's processed_logprobs are. backwards: The first of `backwards`
    questions is answered last. slow: Seconds that an answer to a prompt takes. held: So many others are answered before it.
    """

    def __init__(
        self,
        folder: Path,
        faults: Iterable[Fault] = (),
        *,
        raw: bool = False,
        processed: bool = False,
        backwards: int = 0,
        token: str = "",
        dtype: torch.dtype = torch.float32,
        max_rank: int = 32,
    ) -> None:
        super().__init__()
        self.folder, self.dtype, self.max_rank = folder, dtype, max_rank
        self.faults, self.raw, self.processed, self.backwards, self.token = iter(faults), raw, processed, backwards, token
        self.stale = self.refuses_loads = False
        self.tells_settings = True
        self.bases = [BASE]  # names of the base model: answers say the first, whichever was asked for
        self.resets = 0
        self.slow: dict[tuple[int, ...], float] = {}
        self.held: dict[tuple[int, ...], int] = {}
        self.restarts_before = 0  # the question before which it is restarted
        self.max_model_len = 512
        self.loads: list[str] = []  # names or folders, in order
        self.asked: list[Mapping[str, Any]] = []  # bodies of questions for answers
        self.at_once = self.most_at_once = self.answered = 0  # of these questions
        self.health: list[int] = []  # statuses before 200
        self.forget()

    def forget(self) -> None:
        """Load what it was started on, as a restart does."""
        self.load_model(self.folder)
        self.adapters: list[str] = []
        self.chosen = ""
        self.weights_version, self.dead = "default", False

    # ------------------------------------------------------------------ what it holds
    def load_model(self, folder: Path | str) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype).eval()

    def add_adapter(self, name: str, folder: str) -> None:
        """Raises ValueError for a rank beyond its limit."""
        self.loads.append(name)
        if (rank := getattr(PeftConfig.from_pretrained(folder), "r", 0)) > self.max_rank:
            raise ValueError(f"LoRA rank {rank} is greater than max_lora_rank {self.max_rank}.")
        if self.stale and self.adapters:
            folder = self.last
        self.last = folder
        if isinstance(self.model, PeftModel):
            self.model.load_adapter(folder, adapter_name=name)
        else:
            self.model = PeftModel.from_pretrained(self.model, folder, adapter_name=name).eval()
        self.adapters.append(name)

    def remove_adapter(self, name: str) -> None:
        self.adapters.remove(name)
        if self.adapters:
            self.model.delete_adapter(name)
        else:
            self.model = self.model.unload()

    def choose(self, adapter: str) -> None:
        """Answer with that adapter; with the base where it is ''."""
        self.chosen = adapter
        if adapter:
            self.model.set_adapter(adapter)

    # ------------------------------------------------------------------ what it says
    async def answer(
        self,
        request: web.Request,
        body: Mapping[str, Any],
        prompt: list[int],
        settings: Mapping[str, Any],
        count: int,
        seed: int,
        say: Callable[[list[int], list[float], str], Any],
    ) -> web.StreamResponse:
        assert settings["repetition_penalty"] == 1.0 and settings["min_p"] == 0.0
        self.asked.append(body)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self._answer(request, prompt, settings, count, seed, say)
        finally:
            self.at_once -= 1
            self.answered += 1

    async def _answer(
        self,
        request: web.Request,
        prompt: list[int],
        settings: Mapping[str, Any],
        count: int,
        seed: int,
        say: Callable[[list[int], list[float], str], Any],
    ) -> web.StreamResponse:
        fault, order = next(self.faults, Fault("ok")), len(self.asked)
        if fault.kind == "status":
            headers = {"Retry-After": fault.retry_after} if fault.retry_after else {}
            return web.json_response({"error": "injected"}, status=fault.status, headers=headers)
        if fault.kind == "drop":
            assert request.transport is not None
            request.transport.abort()
        if fault.kind == "hang":
            await self._bye.wait()
        if fault.kind == "garbage":
            return web.Response(text="<html>502 but says 200</html>")
        ids, logprobs, finish = self.draw(prompt, settings, count, seed)
        if fault.kind == "abort":
            ids, logprobs, finish = ids[:1], logprobs[:1], "abort"
        if fault.kind == "nan":
            logprobs[-1] = math.nan
        said = web.json_response(say(ids, logprobs, finish))
        if tuple(prompt) in self.held:
            while self.answered < self.held[tuple(prompt)]:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)  # the others are read first
        wait = 0.02 * max(0, self.backwards - order) + self.slow.get(tuple(prompt), 0.0) + 0.001 * len(ids)
        await asyncio.sleep(fault.seconds + wait)
        return said

    # ------------------------------------------------------------------ the miniature
    def prompt_with(self, ids: list[int], urls: Sequence[str]) -> list[int]:
        """A prompt with its images, which this miniature cannot read."""
        assert not urls
        return ids

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        bare = isinstance(self.model, PeftModel) and not self.chosen
        with self.model.disable_adapter() if bare else nullcontext():
            return self.model(input_ids=torch.tensor([ids])).logits[0].float()

    def score(self, ids: list[int]) -> list[tuple[int, float]]:
        values = self.logits(ids)[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        return list(zip(ids[1:], values.tolist()))

    def draw(self, prompt: list[int], settings: Mapping[str, Any], count: int, seed: int) -> tuple[list[int], list[float], str]:
        """As the engines in process do: one uniform number for each token, from the seed of the answer."""
        uniform = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        banned = [int(token) for token in settings.get("logit_bias", ())]
        shape = {"temperature": float(settings["temperature"]), "top_p": float(settings["top_p"]), "top_k": max(0, settings["top_k"])}
        ids: list[int] = []
        logprobs: list[float] = []
        for number in uniform:
            row = self.logits([*prompt, *ids])[-1:]
            token, logprob = draw_tokens(row, number[None], banned=banned, **shape)
            ids.append(int(token))
            logprobs.append(self._told(row[0], int(token), float(logprob), shape))
            if ids[-1] in settings["stop_token_ids"]:
                return ids, logprobs, "stop"
        return ids, logprobs, "length"

    def _told(self, row: torch.Tensor, token: int, logprob: float, shape: Mapping[str, Any]) -> float:
        if self.raw:
            return float(row.log_softmax(-1)[token])
        if self.processed:
            scaled = (row / shape["temperature"]).sort(descending=True).values[: shape["top_k"] or None]
            probabilities = scaled.softmax(-1)
            kept = scaled[probabilities.cumsum(0) - probabilities < shape["top_p"]]
            return float(row[token] / shape["temperature"] - kept.logsumexp(0))
        return logprob
