"""Answers from vLLM or SGLang servers that take over the trainer's weights before each rollout."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.net.addresses import parse_urls, servers_of_rank
from lit_rl.policies.base import TokenPolicy
from lit_rl.ranks import gather_objects
from lit_rl.rollouts.base import Request, RolloutEngine, RolloutError, Sample, Sampling
from lit_rl.rollouts.connection import Again, Call, Connection
from lit_rl.rollouts.dialects import DIALECTS, Unusable, served_models
from lit_rl.rollouts.probe import ProbeHistory, disagreement, trainer_logprobs
from lit_rl.rollouts.push import digest, fingerprint, gather, write
from lit_rl.seeding import seed_of

PROBE = "Question: what is 12 + 34? Answer: 46. Every weight that moves moves the probability of this sentence."

SAME_WEIGHTS = (
    "Check that the server was started on model.policy.pretrained itself (base model, revision, dtype), that nothing else loads weights "
    "into it, and that engine.sync_dir is one folder for both (engine.server_sync_dir, where the server sees it under another path)"
)
SAME_DISTRIBUTION = (
    "Check that it reports log-probabilities of the whole distribution at the sampling temperature: vLLM with --logprobs-mode "
    "processed_logprobs, which are those of top_p and top_k too (keep sampling.top_p=1 and top_k=0); and that its dtype is the trainer's"
)


class HTTPEngine(RolloutEngine):
    """Tokens to tokens over HTTP. Each request is one answer with a seed of its own, whatever the server does with it.

    Weights that changed are written to `sync_dir` and loaded by all servers: the adapter under a new name where the policy trains LoRA,
    the whole model otherwise. Then the servers' log-probabilities of `probe` must be the trainer's, and in each rollout those of the first
    answers too. Exact on resume as far as the server draws the same answer for the same seed.

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
        health_s: float = 600.0,
        probe: str = PROBE,
        probe_tolerance: float = 0.05,
        token_env: str = "ROLLOUT_TOKEN",
    ) -> None:
        counts = {"keep": keep, "concurrency": concurrency}
        times = {"timeout_s": timeout_s, "deadline_s": deadline_s, "health_s": health_s, "probe_tolerance": probe_tolerance}
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
        self.connection = Connection(concurrency=concurrency, timeout_s=timeout_s, deadline_s=deadline_s, token_env=token_env)
        self._forget()

    def _forget(self) -> None:
        """The state before the first push."""
        self.pushed: tuple[int, ...] | None = None  # fingerprint of what the servers hold
        self.names: list[str] = []  # of the pushes that are kept, the newest last
        self.model = ""  # that requests name
        self.history = {url: ProbeHistory() for url in self.urls}
        self.unseen = False  # whether no answer was looked at since `update_weights`

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
        name = self.given_model or listed[0]
        self.max_model_len = told[name] if isinstance(told[name], int) else None
        return name

    # ------------------------------------------------------------------ weights
    def update_weights(self, version: int) -> None:
        """Push the weights where they changed, and compare log-probabilities of the probe. Collective."""
        self.version, self.unseen = version, True
        mine = fingerprint(self.policy)
        if not any(gather_objects(mine != self.pushed)):
            return
        weights = gather(self.policy, keep=self.rank == 0)
        expected = trainer_logprobs(self.policy, [(self.probe_ids[:1], self.probe_ids[1:])], temperature=1.0)[0]
        told: tuple[str, str] = ("", "")
        if self.rank == 0:
            try:
                told = self._push(weights, version, expected), ""
            except (ConfigError, RolloutError) as error:  # the others are waiting, and end with the same sentence
                told = "", str(error)
        name, wrong = gather_objects(told)[0]
        if wrong:
            raise RolloutError(wrong)
        self.pushed, self.model = mine, name

    def _push(self, weights: dict[str, Tensor], version: int, expected: Sequence[float]) -> str:
        """Write, have it loaded by all servers, and compare. The name it is known by from now on."""
        name = f"policy-v{version}-{digest(weights)}"  # the contents too: a run that was resumed may have other weights of the same version
        if not (self.adapter and name in self.names):
            self._forget_pushes(down_to=self.keep - 1)
            folder = self.sync_dir / name
            write(self.policy, weights, folder)
            seen = f"{self.server_sync_dir.rstrip('/')}/{name}"
            route, body = (self.dialect.load_adapter if self.adapter else self.dialect.load_weights)(name, seen)
            self._everywhere_load(route, body, done="already" if self.adapter else None)
        self.names = [n for n in self.names if n != name] + [name]
        self._compare(self._asked_for(name), name, expected)
        return name

    def _forget_pushes(self, *, down_to: int) -> None:
        """Unload the oldest ones, before the next is loaded: servers have a limit."""
        while len(self.names) > down_to:
            oldest = self.names.pop(0)
            if self.adapter:
                self._everywhere_load(*self.dialect.unload_adapter(oldest), done="")  # a server that has forgotten it may say so
            shutil.rmtree(self.sync_dir / oldest)

    def _everywhere_load(self, route: str, body: Mapping[str, object], *, done: str | None) -> None:
        try:
            self.connection.run([Call([url], route, body, self.dialect.read_load, done=done) for url in self.urls])
        except RolloutError as error:
            raise RolloutError(
                f"pushing weights failed: {error}. Loading adapters needs vLLM with --enable-lora, a --max-lora-rank of at least "
                "model.policy.lora.rank and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, or SGLang with --enable-lora; exchanging all weights "
                "needs SGLang, or vLLM started by AReaL's areal.engine.vllm_ext.areal_vllm_server"
            ) from error

    def _asked_for(self, name: str) -> str:
        """The model name in a request that the weights of that push answer."""
        return name if self.adapter else self.base

    def _compare(self, model: str, name: str, expected: Sequence[float]) -> None:
        read = partial(self.dialect.read_logprobs, ids=self.probe_ids)
        route, body = self.dialect.logprobs(self.probe_ids, model=model)
        found = self.connection.run([Call([url], route, body, read) for url in self.urls])
        for url, theirs in zip(self.urls, found):
            if wrong := self.history[url].compare(theirs, expected, tolerance=self.probe_tolerance):
                raise RolloutError(f"inference server {url}, after it loaded {name}, answers with {wrong}. {SAME_WEIGHTS}")

    # ------------------------------------------------------------------ answers
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Sample]:
        """Answers of the servers; those of the first rollout are compared with the trainer."""
        samples = self.connection.run(self._calls(requests, sampling))
        if self.unseen and sampling.temperature:
            self._look_at(requests[:4], samples[:4], sampling)
            self.unseen = False
        return samples

    def begin(self, requests: Sequence[Request], sampling: Sampling) -> Future[list[Sample]]:
        """Ask in a thread, and return the answers to come."""
        future: Future[list[Sample]] = Future()
        calls = self._calls(requests, sampling)

        def work() -> None:
            try:
                future.set_result(self.connection.run(calls))
            except BaseException as error:  # raised where the answers are asked for
                future.set_exception(error)

        threading.Thread(target=work, daemon=True, name="answers ahead").start()  # a run that stops does not wait for it
        return future

    def _calls(self, requests: Sequence[Request], sampling: Sampling) -> list[Call[Sample]]:
        if any(not request.prompt for request in requests):
            raise ConfigError("a prompt has no token, so there is nothing to continue: leave it out of the data")
        place: dict[tuple[int, ...], int] = {}
        calls = []
        for request in requests:
            first = place.setdefault(tuple(request.prompt), len(place)) % len(self.own)  # siblings share a server's prefix
            urls = [*self.own[first:], *self.own[:first]]
            stops, model = self.policy.stop_ids, self._asked_for(self.model)
            route, body = self.dialect.ask(request.prompt, sampling, seed=seed_of(*request.key), stops=stops, model=model)
            calls.append(Call(urls, route, body, self._sample))
        return calls

    def _sample(self, body: object) -> Sample:
        """Raises Again, and Unusable where other weights answered."""
        answer = self.dialect.read(body)
        if answer.finish == "abort":
            raise Again("the server aborted the answer")
        expected = self._asked_for(self.model) if self.dialect.tells_models else self.model
        if answer.echo is not None and answer.echo != expected and (self.dialect.tells_models or not self.adapter):
            raise Unusable(
                f"{answer.echo!r} answered where {expected!r} was asked for: the server was restarted, or something else loads weights "
                "into it. Continue the run with --ckpt_path, which pushes its weights again"
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
