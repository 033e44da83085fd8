"""Answers from vLLM or SGLang servers that take over the trainer's weights before each rollout."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_rl.errors import ConfigError
from lit_rl.net.addresses import parse_urls, servers_of_rank
from lit_rl.policies.base import TokenPolicy
from lit_rl.ranks import gather_objects
from lit_rl.rollouts.base import Request, RolloutError, Sample, Sampling
from lit_rl.rollouts.connection import Again, Call, Connection, Forgotten
from lit_rl.rollouts.dialects import DIALECTS, served_models
from lit_rl.rollouts.probe import disagreement, trainer_logprobs
from lit_rl.rollouts.served_weights import ServedWeights
from lit_rl.seeding import seed_of

PROBE = "Question: what is 12 + 34? Answer: 46. Every weight that moves moves the probability of this sentence."

SAME_DISTRIBUTION = (
    "Check that it reports log-probabilities of the whole distribution at the sampling temperature: vLLM with --logprobs-mode "
    "processed_logprobs, which are those of top_p and top_k too (with sampling.top_p or top_k draw at temperature 1 and use raw_logprobs); "
    "that its dtype is the trainer's; and that its prefix cache is reset with each push (SGLang does so; vLLM with VLLM_SERVER_DEV_MODE=1)"
)
RESTORES = 3
"""Times in one call that servers which have lost the weights are given them again."""
LOOKED_AT = 4
"""Answers of a rollout, to different prompts, that are compared with the trainer."""


def distinct(requests: Sequence[Request], most: int) -> list[int]:
    """Places of requests with different prompts, the longest prompt first: what a server kept of old weights shows in long prompts."""
    first: dict[tuple[int, ...], int] = {}
    for i, request in enumerate(requests):
        first.setdefault(tuple(request.prompt), i)
    return [place for _, place in sorted(first.items(), key=lambda item: -len(item[0]))][:most]


class HTTPEngine(ServedWeights):
    """Tokens to tokens over HTTP. Each request is one answer with a seed of its own, whatever the server does with it.

    Weights that changed are written to `sync_dir` and loaded by all servers: the adapter under a new name where the policy trains LoRA,
    the whole model otherwise. Then the servers' log-probabilities of `probe` must be the trainer's, and in each rollout those of the first
    answers too, of different prompts. A server that was restarted is given its weights again, and what it answered without them is asked
    anew. Exact on resume as far as the server draws the same answer for the same seed.

    Args:
        urls: `http://host:port`, bare `host:port`, or a range of ports `host:8000-8003`. A process asks every `world_size`-th of them.
        sync_dir: Folder that the servers can read.
        dialect: openai (vLLM's /v1/completions) or sglang (/generate).
        model: Name under which vLLM serves the base model; None = the first that it lists.
        server_sync_dir: `sync_dir` as the servers see it; None = under the same path.
        keep: Pushes that stay loaded (adapters) and on disk.
        concurrency: Requests in flight of each process.
        timeout_s: Of one try.
        deadline_s: Of one request with all its tries, see `Connection`.
        down_s: A server at whose address nothing listens for so long is dead, and ends the run; longer than a restart takes, where
            something restarts servers.
        health_s: Patience until the servers are ready at the start.
        probe: Text whose log-probabilities are compared after each push.
        probe_tolerance: Mean difference that is still rounding. Of a server in bfloat16 expect 0.01 to 0.02; in float32 1e-4 will do.
        token_env: Environment variable with a bearer token; unset = none.
    """

    has_copy = True

    def __init__(
        self,
        urls: str | list[str],
        sync_dir: str,
        dialect: Literal["openai", "sglang"] = "openai",
        model: str | None = None,
        server_sync_dir: str | None = None,
        keep: int = 2,
        concurrency: int = 64,
        timeout_s: float = 600.0,
        deadline_s: float = 1800.0,
        down_s: float = 60.0,
        health_s: float = 600.0,
        probe: str = PROBE,
        probe_tolerance: float = 0.05,
        token_env: str = "ROLLOUT_TOKEN",
    ) -> None:
        counts = {"keep": keep, "concurrency": concurrency}
        times = {
            "timeout_s": timeout_s,
            "deadline_s": deadline_s,
            "down_s": down_s,
            "health_s": health_s,
            "probe_tolerance": probe_tolerance,
        }
        for name, value in {**counts, **times}.items():
            if not value > 0:
                raise ConfigError(f"engine.{name}={value} must be positive")
        if dialect not in DIALECTS:
            raise ConfigError(f"engine.dialect={dialect!r}: choose one of {', '.join(DIALECTS)}")
        self.urls = [url.removesuffix("/v1") for url in parse_urls(urls)]
        self.dialect = DIALECTS[dialect]
        self.sync_dir = Path(sync_dir).expanduser()
        self.server_sync_dir = server_sync_dir or str(self.sync_dir.absolute())
        self.given_model, self.keep, self.health_s = model, keep, health_s
        self.probe, self.probe_tolerance = probe, probe_tolerance
        self.connection = Connection(
            concurrency=concurrency, timeout_s=timeout_s, deadline_s=deadline_s, down_s=down_s, token_env=token_env
        )
        self._forget()

    # ------------------------------------------------------------------ life
    def setup(self, policy: TokenPolicy, *, rank: int, world_size: int) -> None:
        """Wait for the servers and look at the models that they serve. Collective."""
        super().setup(policy, rank=rank, world_size=world_size)
        self.rank, self.world_size = rank, world_size
        self.own = servers_of_rank(self.urls, rank=rank, world_size=world_size, mapping="auto")
        self.adapter = not getattr(policy, "full", True)
        self.probe_ids = policy.encode(self.probe)
        if len(self.probe_ids) < 2:
            raise ConfigError(f"engine.probe={self.probe!r} is {len(self.probe_ids)} tokens to this model; give a text of at least 2")
        self._forget()
        self.connection.wait_healthy(self.urls if rank == 0 else self.own, patience_s=self.health_s)
        self.base = self._base_model() if self.dialect.tells_models else ""

    def _base_model(self) -> str:
        told = self.connection.run([Call([self.own[0]], "/v1/models", None, served_models)])[0]
        listed = list(told)
        if self.given_model is not None and self.given_model not in listed:
            raise ConfigError(
                f"engine.model={self.given_model!r} is not served at {self.own[0]}, which has {', '.join(listed)}; name one of them"
            )
        self.aliases = frozenset(listed)
        name = self.given_model or listed[0]
        self.max_model_len = told[name] if isinstance(told[name], int) else None
        return name

    # ------------------------------------------------------------------ answers
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Sample]:
        """Answers of the servers; those of the first rollout are compared with the trainer."""
        samples = self._answers(self._calls(requests, sampling))
        if self.unseen and sampling.temperature:
            chosen = distinct(requests, LOOKED_AT)
            self._look_at([requests[i] for i in chosen], [samples[i] for i in chosen], sampling)
            self.unseen = False
        return samples

    def begin(self, requests: Sequence[Request], sampling: Sampling) -> Future[list[Sample]]:
        """Ask in a thread, and return the answers to come."""
        future: Future[list[Sample]] = Future()
        calls = self._calls(requests, sampling)

        def work() -> None:
            try:
                future.set_result(self._answers(calls))
            except BaseException as error:  # raised where the answers are asked for
                future.set_exception(error)

        threading.Thread(target=work, daemon=True, name="answers ahead").start()  # a run that stops does not wait for it
        return future

    def _answers(self, calls: Sequence[Call[Sample]]) -> list[Sample]:
        """All answers, by servers that held the weights before and after. Raises RolloutError, Forgotten where they lose them each time."""
        for left in reversed(range(RESTORES)):
            try:
                samples = self.connection.run(calls)
                self._check_held()
                return samples
            except Forgotten:
                if not left:
                    raise
            rank_zero_warn("an inference server has lost the weights (it was restarted?): it is given them again, and asked anew")
            self._load(self.model, self.own, self.expected)
        raise AssertionError("the last try returns or raises")

    def _calls(self, requests: Sequence[Request], sampling: Sampling) -> list[Call[Sample]]:
        if any(not request.prompt for request in requests):
            raise ConfigError("a prompt has no token, so there is nothing to continue: leave it out of the data")
        longest = max((len(request.prompt) for request in requests), default=0)
        if self.max_model_len is not None and longest + sampling.max_new_tokens > self.max_model_len:
            raise ConfigError(
                f"a prompt of {longest} tokens and max_new_tokens={sampling.max_new_tokens} are more than the {self.max_model_len} that "
                "the inference server takes: start it with a larger --max-model-len, or lower sampling.max_new_tokens or "
                "data.max_prompt_length"
            )
        place: dict[tuple[int, ...], int] = {}
        calls = []
        for request in requests:
            first = place.setdefault(tuple(request.prompt), len(place)) % len(self.own)  # siblings share a server's prefix
            urls = [*self.own[first:], *self.own[:first]]
            stops, model = self.policy.stop_ids, self._asked_for(self.model)
            route, body = self.dialect.ask(request.prompt, sampling, seed=seed_of(*request.key), stops=stops, model=model)
            calls.append(Call(urls, route, body, self._sample, forgotten=self.dialect.forgotten(model) if self.adapter else None))
        return calls

    def _sample(self, body: object) -> Sample:
        """Raises Again, and Forgotten where other weights answered."""
        answer = self.dialect.read(body)
        if answer.finish == "abort":
            raise Again("the server aborted the answer")
        expected = self._asked_for(self.model) if self.dialect.tells_models else self.model
        known = answer.echo is None or answer.echo == expected or {answer.echo, expected} <= self.aliases
        if not known and (self.dialect.tells_models or not self.adapter):
            raise Forgotten(
                f"{answer.echo!r} answered where {expected!r} was asked for, each time that the server was given these weights: "
                "something else loads weights into it"
            )
        return Sample(answer.ids, answer.logprobs, "stop" if answer.finish == "stop" else "length", [self.version] * len(answer.ids))

    def _look_at(self, requests: Sequence[Request], samples: Sequence[Sample], sampling: Sampling) -> None:
        """Raise RolloutError unless the trainer gives these answers the same log-probabilities. Collective: one forward everywhere."""
        rows = [(request.prompt, sample.ids) for request, sample in zip(requests, samples)]
        mine = trainer_logprobs(self.policy, rows or [(self.probe_ids[:1], self.probe_ids[1:])], temperature=sampling.temperature)
        kept = mine if rows else []
        wrong = disagreement(samples, kept, temperature=sampling.temperature, tolerance=self.probe_tolerance)
        for rank, told in enumerate(gather_objects(wrong)):
            if told:
                raise RolloutError(f"inference server of process {rank} ({', '.join(self.own)}): {told}. {SAME_DISTRIBUTION}")
