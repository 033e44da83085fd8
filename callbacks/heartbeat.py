"""Processes that tell each other that they are there: a frozen process or a lost node ends the others within a minute, by its name."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import lightning as L
import psutil
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed import DistError, TCPStore

from callbacks.base import RLCallback, callbacks_of
from lit_rl.checkpoints.choosing import go_on
from lit_rl.errors import LEFT_BY_ANOTHER, ConfigError
from lit_rl.ranks import gather_objects, lost_contact

OVER, LEFT = "over", "left"


class Member(NamedTuple):
    """A process of the run."""

    rank: int
    host: str
    pid: int
    born: float
    node: int

    def __str__(self) -> str:
        return f"process {self.rank} (pid {self.pid} on {self.host})"

    def kill(self) -> None:
        """SIGKILL, unless its number belongs to another process by now."""
        try:
            process = psutil.Process(self.pid)
            if process.create_time() == self.born:
                process.kill()
        except psutil.NoSuchProcess:
            pass


class Heartbeat(RLCallback):
    """Ends this process when another one of the run has said nothing for `seconds`: it is frozen, has ended, or its node is lost.

    A thread of each process counts in a store of the first process (`torch.distributed.TCPStore`) and reads the counts of the others. A
    process that works, samples or waits goes on counting; one that is stopped, that sits in a call which never returns to Python, or
    whose machine is off does not. The others then name it, end those on their own node that are frozen, and leave with exit code 75:
    the collective that they wait in could not be left otherwise. A run of a single process has no thread.

    Args:
        seconds: A process may be silent for so long, at least 2.
    """

    def __init__(self, seconds: float = 40.0) -> None:
        if not seconds >= 2:
            raise ConfigError(f"seconds={seconds} of callbacks.heartbeat.Heartbeat: give at least 2; 40 is usual")
        self.seconds = seconds
        self._pulse: Pulse | None = None

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Begin to count. Collective."""
        if trainer.world_size > 1 and self._pulse is None:
            keepers = callbacks_of(trainer, ModelCheckpoint)
            folders = [str(keeper.dirpath) for keeper in keepers if keeper.dirpath] if stage == "fit" else []
            self._pulse = Pulse(trainer, self.seconds, folders)

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Say that this process is done, and listen no longer."""
        if self._pulse is not None:
            self._pulse.end()
            self._pulse = None

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Find out who was lost, where a collective has failed, and note it on the exception. No longer count: this process ends."""
        pulse, self._pulse = self._pulse, None
        if pulse is None:
            return
        if isinstance(exception, SystemExit):  # all have agreed to stop
            pulse.end()
            return
        if lost_contact(exception) and not (TorchElasticEnvironment.detect() and trainer.num_nodes == 1):  # whose agent names it
            pulse.state = LEFT
            if silent := pulse.first_silent():
                exception.add_note(", ".join(map(str, silent)))
        pulse.halt()


class Pulse:
    """The counts of all processes, as this one has heard them."""

    def __init__(self, trainer: L.Trainer, seconds: float, folders: list[str]) -> None:
        self.trainer, self.seconds, self.folders = trainer, seconds, folders
        self.interval = min(2.0, seconds / 8)
        me = psutil.Process()
        self.members = gather_objects(Member(trainer.global_rank, socket.gethostname(), me.pid, me.create_time(), trainer.node_rank))
        self.me = self.members[trainer.global_rank]
        self.store = self._store()
        now = time.monotonic()
        self.state = ""
        self.counts = [""] * len(self.members)
        self.heard = [now] * len(self.members)
        self.answered = now
        self._end, self._wake = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=work, name="heartbeat", daemon=True) for work in (self._count, self._watch)]
        for thread in self._threads:
            thread.start()

    def _store(self) -> TCPStore:
        """One of its own: that of the process group waits for minutes, and is busy while a group is made."""
        environment = getattr(self.trainer.strategy, "cluster_environment", None)
        host, first = getattr(environment, "main_address", "127.0.0.1"), self.me.rank == 0
        patience = timedelta(seconds=self.seconds)
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=patience) if first else None
        port = gather_objects(store.port if store else 0)[0]
        store = store or TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=patience)
        store.set(str(self.me.rank), "0")
        gather_objects(None)  # all have their key
        return store

    # ------------------------------------------------------------------ two threads
    def _count(self) -> None:
        """Count and hear the others, until this process is over or the store is gone, whose process has ended then."""
        keys, count = [str(member.rank) for member in self.members], 0
        while not self._end.is_set():
            count, state = count + 1, self.state
            try:
                self.store.set(str(self.me.rank), state or str(count))
                if state == OVER:
                    return
                counts = [value.decode() for value in self.store.multi_get(keys)]
            except (DistError, RuntimeError):
                return
            now = time.monotonic()
            self.heard = [then if old == new else now for then, old, new in zip(self.heard, self.counts, counts)]
            self.counts, self.answered = counts, now
            self._wake.wait(self.interval)

    def _watch(self) -> None:
        """Looks at the clock: a call of the store may wait for a frozen process for ever."""
        before = time.monotonic()
        while not self._end.wait(self.interval / 2):
            now = time.monotonic()
            if now - before > self.seconds / 2:  # it was this process that stood still
                self.heard, self.answered = [now] * len(self.members), now
            before = now
            if silent := self.silent(self.seconds):
                self._leave(silent)

    def silent(self, seconds: float) -> list[Member]:
        """The others that have said nothing for so long; the first process alone, where it does not answer."""
        now = time.monotonic()
        if self.me.rank and now - self.answered > seconds:
            return [] if self.counts[0] == OVER else self.members[:1]
        found = zip(self.members, self.heard, self.counts)
        return [one for one, heard, count in found if one != self.me and count not in (OVER, LEFT) and now - heard > seconds]

    def first_silent(self) -> list[Member]:
        """The first that fall silent, waiting for them for some seconds. None of the others did in that time: an empty list."""
        end = time.monotonic() + 5 * self.interval
        while time.monotonic() < end:
            if found := self.silent(2.5 * self.interval):
                return found
            time.sleep(self.interval / 8)
        return []

    # ------------------------------------------------------------------ leaving
    def end(self) -> None:
        """Say that this process is done. The store stays until it ends."""
        self.state = OVER
        self._wake.set()
        self._threads[0].join(2 * self.interval)
        self.halt()

    def halt(self) -> None:
        """Neither count nor listen any longer: if this process does not end now, the others find it silent."""
        self._end.set()
        self._wake.set()

    def _leave(self, silent: list[Member]) -> None:
        """End this process, and what is frozen on its node. One process of a node says why."""
        names = ", ".join(map(str, silent))
        here = [one for one in self.members if one.node == self.me.node and one not in silent]
        if self.me == here[0]:
            further = f"; {go_on([Path(folder) for folder in self.folders])}" if self.folders else ""
            sys.stderr.write(f"error: {names} has not answered for {self.seconds:g} s (frozen, or its node is lost), so all end{further}\n")
            sys.stderr.flush()
        for one in silent:
            if one.node == self.me.node:
                one.kill()
        if self.me.rank == 0 and (launcher := getattr(self.trainer.strategy, "launcher", None)) is not None:
            launcher.kill(signal.SIGKILL)
        os._exit(LEFT_BY_ANOTHER)
