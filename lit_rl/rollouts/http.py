"""Answers from vLLM or SGLang servers that take over the trainer's weights before each rollout."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_rl.errors import ConfigError
from lit_rl.net.addresses import parse_urls, servers_of_rank
from lit_rl.policies.base import TokenPolicy
from lit_rl.ranks import gather_objects
from lit_rl.rollouts.base import Request, RolloutError, Sample, Sampling, temperatures
from lit_rl.rollouts.connection import Again, Call, Connection, Forgotten
from lit_rl.rollouts.dialects import Dialect, served_models
from lit_rl.rollouts.pictures import asked_of, check_prompt
from lit_rl.rollouts.probe import disagreement, distinct, probe_ids, probes_of, trainer_logprobs
from lit_rl.rollouts.served_weights import DTYPES, ServedWeights
from lit_rl.rollouts.sglang import SGLang
from lit_rl.rollouts.vllm import Generate, OpenAI
from lit_rl.seeding import seed_of

DIALECTS: Mapping[str, Dialect] = {"openai": OpenAI(), "vllm": Generate(), "sglang": SGLang()}
PROBE = "Question: what is 12 + 34? Answer: 46. Every weight that moves moves the probability of this sentence."

SAME_DISTRIBUTION = (
    "Check that it reports log-probabilities of the whole distribution at the sampling temperature: vLLM with --logprobs-mode "
    "processed_logprobs, which are those of top_p and top_k too (with sampling.top_p or top_k draw at temperature 1 and use raw_logprobs); "
    "that its dtype is the trainer's; and that its prefix cache is reset with each push (SGLang does so; vLLM with VLLM_SERVER_DEV_MODE=1)"
)
URL, SYNC_DIR = "localhost:8000", "/dev/shm/lit-rl-weights"
RESTORES = 3
"""Times in one call that servers which have lost the weights are given them again."""
LOOKED_AT = 4
"""Answers of a rollout, to different prompts, that are compared with the trainer."""


class HTTPEngine(ServedWeights):
    """Tokens to tokens over HTTP. Each request is one answer with a seed of its own, whatever the server does with it.

    Weights that changed are written to `sync_dir` and loaded by all servers: the adapter under a new name where the policy trains LoRA,
    the whole model otherwise. Then the servers' log-probabilities of `probe` must be the trainer's, and in each rollout those of the first
    answers too, of different prompts. A server that was restarted is given its weights again, and what it answered without them is asked
    anew. Exact on resume as far as the server draws the same answer for the same seed.

    Args:
        urls: `http://host:port[/v1]`, bare `host:port`, or a range of ports `host:8000-8003`. A process asks every `world_size`-th of them.
            None = the environment's VLLM_API_BASE, else localhost:8000.
        sync_dir: Folder that the servers can read.
        dialect: openai (vLLM's /v1/completions, and /v1/chat/completions with images), vllm (its /inference/v1/generate: started with
            --enable-scale-out, it tells the version of the weights with each answer) or sglang (/generate).
        model: Name under which vLLM serves the base model; None = the first that it lists.
        server_sync_dir: `sync_dir` as the servers see it; None = under the same path.
        dtype: In which whole weights are pushed: bfloat16 halves what is written and read; None = as the servers say that they hold
            theirs (vLLM with VLLM_SERVER_DEV_MODE=1), or else as they are trained, in float32.
        keep: Pushes that stay loaded (adapters) and on disk.
        concurrency: Requests in flight of each process.
        timeout_s: Of the first try; they double after each one that took too long.
        deadline_s: Of one request with all its tries, see `Connection`.
        down_s: A server at whose address nothing listens for so long is dead, and ends the run; longer than a restart takes, where
            something restarts servers.
        health_s: Patience until the servers are ready at the start.
        probe: Text whose log-probabilities are compared after each push, alone and, where the policy reads images, behind one.
        probe_tolerance: Mean difference that is still rounding. Of a server in bfloat16 expect 0.01 to 0.02; in float32 1e-4 will do.
        token_env: Environment variable with a bearer token; unset = none.
    """

    has_copy = True

    def __init__(
        self,
        urls: str | list[str] | None = None,
        sync_dir: str = SYNC_DIR,
        dialect: Literal["openai", "vllm", "sglang"] = "openai",
        model: str | None = None,
        server_sync_dir: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
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
        for name, chosen, known in (("dialect", dialect, DIALECTS), ("dtype", dtype or "float32", DTYPES)):
            if chosen not in known:
                raise ConfigError(f"engine.{name}={chosen!r}: choose one of {', '.join(known)}")
        self.urls = [url.removesuffix("/v1") for url in parse_urls(URL if urls is None else urls)]
        self.dialect = DIALECTS[dialect]
        self.sync_dir = Path(sync_dir).expanduser()
        self.server_sync_dir = server_sync_dir or str(self.sync_dir.absolute())
        self.given_model, self.given_dtype, self.keep, self.health_s = model, dtype, keep, health_s
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
        self._forget()
        probe_ids(policy, self.probe)  # before anybody waits for a server
        self.connection.wait_healthy(self.urls if rank == 0 else self.own, patience_s=self.health_s)
        self.base = self._base_model() if self.dialect.tells_models else ""
        self.push_dtype = self._agreed_dtype(self.given_dtype)
        self.probes = probes_of(policy, self.probe, most=self.max_model_len)

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
        [(_, samples)] = self.stream([requests], sampling)
        return samples

    def stream(self, chunks: Sequence[Sequence[Request]], sampling: Sampling) -> Iterator[tuple[int, list[Sample]]]:
        """(place, answers) of each chunk as soon as they are there. All are under way at once: a slow answer holds its own chunk alone."""
        found: dict[int, list[Sample]] = {}
        for place, samples in self._answers(self._calls(chunks, sampling)):
            found[place] = samples
            yield place, samples
        if self.unseen and sampling.temperature:
            pairs = [pair for place, chunk in enumerate(chunks) for pair in zip(chunk, found[place], strict=True)]
            chosen = [pairs[i] for i in distinct([request for request, _ in pairs], LOOKED_AT)]
            self._look_at([request for request, _ in chosen], [sample for _, sample in chosen], sampling)
            self.unseen = False

    def begin(self, requests: Sequence[Request], sampling: Sampling) -> Future[list[Sample]]:
        """Ask in a thread, and return the answers to come."""
        future: Future[list[Sample]] = Future()
        calls = self._calls([requests], sampling)

        def work() -> None:
            try:
                [(_, samples)] = self._answers(calls)
                future.set_result(samples)
            except BaseException as error:  # raised where the answers are asked for
                future.set_exception(error)

        threading.Thread(target=work, daemon=True, name="answers ahead").start()  # a run that stops does not wait for it
        return future

    def _answers(self, chunks: Sequence[Sequence[Call[Sample]]]) -> Iterator[tuple[int, list[Sample]]]:
        """Answers by servers that held the weights before and after. Raises RolloutError, Forgotten where they lose them each time.

        Chunks that were yielded before the servers lost the weights were drawn with them; all others are asked anew.
        """
        waiting = list(range(len(chunks)))
        for left in reversed(range(RESTORES)):
            places = list(waiting)
            try:
                for i, samples in self.connection.stream([chunks[place] for place in places]):
                    self._check_held()
                    waiting.remove(places[i])
                    yield places[i], samples
                return
            except Forgotten:
                if not left:
                    raise
            rank_zero_warn("an inference server has lost the weights (it was restarted?): it is given them again, and asked anew")
            self._load(self.model, self.own, self.expected)

    def _calls(self, chunks: Sequence[Sequence[Request]], sampling: Sampling) -> list[list[Call[Sample]]]:
        requests = [request for chunk in chunks for request in chunk]
        if any(not request.prompt for request in requests):
            raise ConfigError("a prompt has no token, so there is nothing to continue: leave it out of the data")
        longest = max((len(request.prompt) for request in requests), default=0)
        if self.max_model_len is not None and longest + sampling.max_new_tokens > self.max_model_len:
            raise ConfigError(
                f"a prompt of {longest} tokens and max_new_tokens={sampling.max_new_tokens} are more than the {self.max_model_len} of the "
                "server: start it with a larger --max-model-len, or lower sampling.max_new_tokens or data.max_prompt_length"
            )
        place: dict[tuple[int, ...], int] = {}

        def call(request: Request) -> Call[Sample]:
            first = place.setdefault(tuple(request.prompt), len(place)) % len(self.own)  # siblings share a server's prefix
            urls = [*self.own[first:], *self.own[:first]]
            asked, model = asked_of(request, self.policy), self._asked_for(self.model)
            lost = self.dialect.forgotten(model) if self.adapter else None
            own, seed = request.sampling(sampling), seed_of(*request.key)
            route, body = self.dialect.ask(asked, own, seed=seed, stops=self.policy.stop_ids, model=model)
            return Call(urls, route, body, partial(self._sample, request), forgotten=lost)

        return [[call(request) for request in chunk] for chunk in chunks]

    def _sample(self, request: Request, body: object) -> Sample:
        """Raises Again, Unusable where the server reads another prompt, and Forgotten where other weights answered."""
        answer = self.dialect.read(body)
        if answer.finish == "abort":
            raise Again("the server aborted the answer")
        check_prompt(request, answer.prompt, self.policy)
        wanted = self._asked_for(self.model)
        if answer.model is not None and answer.model != wanted and not {answer.model, wanted} <= self.aliases:
            raise _of_others(answer.model, wanted)
        for version in answer.versions:
            if not self.adapter and version != self.model:
                raise _of_others(version, self.model)
        return Sample(answer.ids, answer.logprobs, "stop" if answer.finish == "stop" else "length", [self.version] * len(answer.ids))

    def _look_at(self, requests: Sequence[Request], samples: Sequence[Sample], sampling: Sampling) -> None:
        """Raise RolloutError unless the trainer gives these answers the same log-probabilities. Collective: one forward everywhere."""
        answered: list[tuple[Sequence[int], Sequence[int]]] = [(request.prompt, sample.ids) for request, sample in zip(requests, samples)]
        rows = answered or [self.probes[0].row]
        temperature = temperatures(requests, sampling, self.policy.device)
        mine = trainer_logprobs(self.policy, rows, temperature=temperature, media=[request.media for request in requests])
        wrong = disagreement(samples, mine if requests else [], temperature=temperature, tolerance=self.probe_tolerance)
        for rank, told in enumerate(gather_objects(wrong)):
            if told:
                raise RolloutError(f"inference server of process {rank} ({', '.join(self.own)}): {told}. {SAME_DISTRIBUTION}")


def _of_others(answered: str, wanted: str) -> Forgotten:
    return Forgotten(
        f"{answered!r} answered where {wanted!r} was asked for, each time that the server was given these weights: something else loads "
        "weights into it"
    )
