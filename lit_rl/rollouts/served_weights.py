"""The trainer's weights on inference servers: written, loaded by all of them, and compared by the log-probabilities of a probe."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.policies.language_model import TOWER
from lit_rl.ranks import gather_objects
from lit_rl.rollouts.base import RolloutEngine, RolloutError
from lit_rl.rollouts.connection import Call, Connection, Forgotten
from lit_rl.rollouts.dialects import Dialect, served_dtype, weight_version
from lit_rl.rollouts.pictures import asked_of, check_prompt
from lit_rl.rollouts.probe import Probe, ProbeHistory, trainer_logprobs
from lit_rl.rollouts.push import digest, fingerprint, gather, write
from lit_rl.rollouts.start_check import adapters_that_matter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

SAME_WEIGHTS = (
    "Check that the server was started on model.policy.pretrained itself (base model, revision, dtype), that nothing else loads weights "
    "into it, and that engine.sync_dir is one folder for both (engine.server_sync_dir, where the server sees it under another path)"
)
SAME_PICTURES = (
    "Its answers to text are right. Check that it has the trainer's preprocessor_config.json and no --mm-processor-kwargs, and, where "
    "model.policy.train_vision gives the vision tower an adapter, that vLLM was started with --enable-tower-connector-lora (it leaves that "
    "adapter out in silence otherwise)"
)


class ServedWeights(RolloutEngine):
    """An engine whose servers take over the weights. What they hold after a push is named in `model`."""

    urls: list[str]
    own: list[str]  # those that this process asks
    connection: Connection
    dialect: Dialect
    adapter: bool
    rank: int
    base: str
    sync_dir: Path
    server_sync_dir: str
    keep: int
    push_dtype: torch.dtype | None  # None: as they are
    probes: list[Probe]
    probe_tolerance: float

    def _forget(self) -> None:
        """The state before the first push."""
        self.pushed: tuple[int, ...] | None = None  # fingerprint of what the servers hold
        self.names: list[str] = []  # of the pushes that are kept, the newest last
        self.model = ""  # that requests name
        self.expected: Sequence[Sequence[float]] = ()  # the trainer's log-probabilities of the probes at the last push
        self.aliases: frozenset[str] = frozenset()  # names of the base model: the server answers under any of them
        self.history: dict[tuple[str, int], ProbeHistory] = {}  # by server and probe
        self.unseen = False  # whether no answer was looked at since `update_weights`

    def _agreed_dtype(self, given: str | None) -> torch.dtype | None:
        """The dtype in which whole weights are pushed: the given one, or else that which all servers tell. Collective."""
        route = self.dialect.settings_route
        told: tuple[str | None, str] = given, ""
        if self.rank == 0 and given is None and route is not None and not self.adapter:
            try:
                found = self.connection.run([Call([url], route, None, served_dtype, done="") for url in self.urls])
                told = found[0] if len(set(found)) == 1 else None, ""
            except RolloutError as error:  # the others are waiting, and end with the same sentence
                told = None, str(error)
        name, wrong = gather_objects(told)[0]
        if wrong:
            raise RolloutError(wrong)
        return None if name is None or self.adapter else DTYPES[name]

    def update_weights(self, version: int) -> None:
        """Push the weights where they changed, and compare log-probabilities of the probes. Collective.

        Adapters begin at 0, where a vision tower's that a server leaves out would not be seen: the first push is of one that matters.
        """
        self.version, self.unseen = version, True
        if self.pushed is None and self.adapter and any(f".{TOWER}." in name for name, _ in self.policy.trainable()):
            with adapters_that_matter(self.policy, within=TOWER):
                self._exchange(version)
        self._exchange(version)

    def _exchange(self, version: int) -> None:
        mine = fingerprint(self.policy)
        told_by_all = gather_objects((mine, mine != self.pushed))
        if not any(changed for _, changed in told_by_all):
            return
        contents = digest([found for found, _ in told_by_all])
        weights = gather(self.policy, self.push_dtype)
        media = [probe.request.media for probe in self.probes]
        expected = trainer_logprobs(self.policy, [probe.row for probe in self.probes], temperature=1.0, media=media)
        told: tuple[str, str] = ("", "")
        if self.rank == 0:
            try:
                told = self._push(weights, f"policy-v{version}-{contents}", expected), ""
            except (ConfigError, RolloutError) as error:  # the others are waiting, and end with the same sentence
                told = "", str(error)
        name, wrong = gather_objects(told)[0]
        if wrong:
            raise RolloutError(wrong)
        self.pushed, self.model, self.expected = mine, name, expected

    def _push(self, weights: dict[str, Tensor], name: str, expected: Sequence[Sequence[float]]) -> str:
        """Write, have it loaded by all servers, and compare. name: the contents too, for a resumed run may have others of that version."""
        if name not in self.names:
            self._forget_pushes(down_to=self.keep - 1)
            write(self.policy, weights, self.sync_dir / name)
        self.names = [n for n in self.names if n != name] + [name]
        self._load(name, self.urls, expected)
        return name

    def _load(self, name: str, urls: Sequence[str], expected: Sequence[Sequence[float]]) -> None:
        """Have servers load the push of that name, and compare."""
        seen = f"{self.server_sync_dir.rstrip('/')}/{name}"
        steps = [self.dialect.load_adapter(name, seen)] if self.adapter else self.dialect.load_weights(name, seen)
        for route, body in steps:
            self._everywhere_load(route, body, urls, done="already" if self.adapter else None)
        self._compare(self._asked_for(name), name, urls, expected)

    def _forget_pushes(self, *, down_to: int) -> None:
        """Unload the oldest ones, before the next is loaded: servers have a limit."""
        while len(self.names) > down_to:
            oldest = self.names.pop(0)
            if self.adapter:
                self._everywhere_load(*self.dialect.unload_adapter(oldest), self.urls, done="")  # a server that has forgotten it may say so
            shutil.rmtree(self.sync_dir / oldest)

    def _everywhere_load(self, route: str, body: Mapping[str, object], urls: Sequence[str], *, done: str | None) -> None:
        try:
            self.connection.run([Call([url], route, body, self.dialect.read_load, done=done) for url in urls])
        except RolloutError as error:
            raise RolloutError(
                f"pushing weights failed: {error}. Loading adapters needs vLLM with --enable-lora, a --max-lora-rank of at least "
                "model.policy.lora.rank and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, or SGLang with --enable-lora; exchanging all weights "
                "needs SGLang, or vLLM with VLLM_SERVER_DEV_MODE=1"
            ) from error

    def _asked_for(self, name: str) -> str:
        """The model name in a request that the weights of that push answer."""
        return name if self.adapter else self.base

    def _compare(self, model: str, name: str, urls: Sequence[str], expected: Sequence[Sequence[float]]) -> None:
        for i, (probe, mine) in enumerate(zip(self.probes, expected, strict=True)):
            route, body = self.dialect.logprobs(asked_of(probe.request, self.policy), first=probe.first, model=model)
            found = self.connection.run([Call([url], route, body, partial(self._probed, probe)) for url in urls])
            how, remedy = ("to an image ", SAME_PICTURES) if probe.request.media else ("", SAME_WEIGHTS)
            for url, theirs in zip(urls, found):
                history = self.history.setdefault((url, i), ProbeHistory())
                if wrong := history.compare(theirs, mine, tolerance=self.probe_tolerance):
                    raise RolloutError(f"inference server {url}, after it loaded {name}, answers {how}with {wrong}. {remedy}")

    def _probed(self, probe: Probe, body: object) -> list[float]:
        check_prompt(probe.request, self.dialect.prompt_of(body), self.policy)
        return self.dialect.read_logprobs(body, probe.request.prompt, first=probe.first)

    def _check_held(self) -> None:
        """Raise Forgotten where a server says that its whole weights are of another version. Where answers tell, `_sample` looks."""
        route = self.dialect.version_route
        if self.adapter or route is None or not self.model:
            return
        for url, told in zip(self.own, self.connection.run([Call([url], route, None, weight_version) for url in self.own])):
            if told != self.model:
                raise Forgotten(f"inference server {url} holds the weights {told!r} in place of {self.model!r}")
