"""Asked to stop, a run ends with 143 and a checkpoint from which it ends as if it had not been asked."""

import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from forked import end_group, ended, forked_script
from lightning.pytorch.callbacks import ModelCheckpoint
from toy import ToyData, toy_method, toy_trainer

from callbacks.graceful_stop import GracefulStop
from callbacks.rng_state import RngState
from lit_rl.checkpoints.files import AtomicCheckpointIO, resolve_checkpoint

SCRIPT = Path(__file__).with_name("stoppable_run.py")


class Ask(L.Callback):
    """Asks, in one of the ways, when minibatch `batch` of epoch `epoch` begins, or at a hook."""

    def __init__(self, how: Any, *, epoch: int = 1, batch: int = 1, hook: str = "on_train_batch_start") -> None:
        self.how, self.at = how, (epoch, batch)
        self.asked = self.batches_after = 0
        if hook != "on_train_batch_start":
            setattr(self, hook, self.ask)

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.batches_after += self.asked > 0
        if (trainer.current_epoch, batch_idx) == self.at:
            self.ask(trainer)

    def ask(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.current_epoch >= self.at[0] and not self.asked:
            self.asked = 1
            if self.how == "STOP":
                (Path(trainer.default_root_dir) / "STOP").touch()
            else:
                os.kill(os.getpid(), self.how)


def train(
    folder: Path,
    *callbacks: L.Callback,
    resume: str | None = None,
    accumulate: int = 1,
    last: bool = True,
    every: int = 1,
    epochs: int = 3,
    **kwargs: Any,
) -> Any:
    keep = ModelCheckpoint(dirpath=folder / "ckpt", save_last=last, every_n_epochs=every, save_on_train_epoch_end=True)
    trainer = toy_trainer(
        folder, callbacks=[GracefulStop(), RngState(), *callbacks, keep], max_epochs=epochs, enable_checkpointing=True,
        accumulate_grad_batches=accumulate, **kwargs,
    )  # fmt: skip
    AtomicCheckpointIO.install(trainer)
    module = toy_method(updates_per_iteration=4 // accumulate, dropout=0.2)
    L.seed_everything(1, verbose=False)
    trainer.fit(module, ToyData(), ckpt_path=resolve_checkpoint(resume, [folder / "ckpt"]) if resume else None)
    return module, trainer


def same_end(a: Any, b: Any) -> bool:
    (one, first), (other, second) = a, b
    states = [trainer.optimizers[0].state_dict()["state"] for trainer in (first, second)]
    moments = all(torch.equal(states[0][i][key], states[1][i][key]) for i in states[0] for key in states[0][i])
    return moments and all(torch.equal(x, y) for x, y in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def stopped(folder: Path, ask: Ask, **kwargs: Any) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.raises(SystemExit) as left:
        train(folder, ask, **kwargs)
    assert left.value.code == 143
    assert {number: signal.getsignal(number) for number in before} == before
    assert not (folder / "STOP").exists()


# ---------------------------------------------------------------------- where a run can be asked
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, "STOP"])
def test_stops_at_once_and_continues_exactly(tmp_path: Path, how: Any) -> None:
    """Mid-epoch: nothing after the optimizer step is done, and the rollout is continued where it was."""
    ask = Ask(how)
    stopped(tmp_path, ask)
    assert ask.batches_after == 0
    assert same_end(train(tmp_path, resume="last"), train(tmp_path / "unbroken"))


def test_waits_for_the_optimizer_step(tmp_path: Path) -> None:
    """Asked in the first of two accumulated minibatches: a partial gradient would be lost, so the second one is still done."""
    ask = Ask(signal.SIGTERM, batch=2)
    stopped(tmp_path, ask, accumulate=2)
    assert ask.batches_after == 1
    assert same_end(train(tmp_path, resume="last", accumulate=2), train(tmp_path / "unbroken", accumulate=2))


@pytest.mark.parametrize(
    "ask, epochs",
    [
        (Ask(signal.SIGTERM, batch=-1, hook="on_rollout_chunk"), 1),
        (Ask(signal.SIGTERM, batch=3), 2),
        (Ask(signal.SIGTERM, batch=-1, hook="on_validation_batch_end"), 2),
        (Ask(signal.SIGTERM, batch=-1, hook="on_train_epoch_end"), 2),
    ],
    ids=["in the rollout", "in the last minibatch", "in the evaluation", "at the end of the epoch"],
)
def test_anywhere_in_an_epoch(tmp_path: Path, ask: Ask, epochs: int) -> None:
    """Epoch 1 is finished, with its evaluation, when only that is left of it; a rollout is not thrown away, but trained on once only."""
    evaluate = dict(limit_val_batches=1.0)
    stopped(tmp_path, ask, **evaluate)
    assert ask.batches_after == (epochs == 1)
    progress = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)["loops"]["fit_loop"]["epoch_progress"]["current"]
    assert progress["completed"] == epochs
    assert same_end(train(tmp_path, resume="last", **evaluate), train(tmp_path / "unbroken", **evaluate))


def test_before_training_nothing_is_written(tmp_path: Path) -> None:
    ask = Ask(signal.SIGTERM, epoch=0, batch=-1, hook="on_sanity_check_end")
    stopped(tmp_path, ask, limit_val_batches=1.0, num_sanity_val_steps=1)
    assert not (tmp_path / "ckpt").exists()


# ---------------------------------------------------------------------- files
def test_the_checkpoint_takes_the_place_of_the_last_one(tmp_path: Path) -> None:
    """Stopped in the second epoch; ModelCheckpoint had written `last.ckpt` after the first, and goes on with it afterwards."""
    stopped(tmp_path, Ask(signal.SIGTERM))
    assert sorted(p.name for p in (tmp_path / "ckpt").iterdir()) == ["epoch=0-step=4.ckpt", "last.ckpt"]
    assert torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)["global_step"] == 6
    train(tmp_path, resume="last")
    assert sorted(p.name for p in (tmp_path / "ckpt").glob("last*")) == ["last.ckpt"]


@pytest.mark.parametrize(("every", "files"), [(2, ["epoch=1-step=8.ckpt", "last.ckpt"]), (9, ["last.ckpt"])])
def test_the_last_iteration_is_kept_whatever_the_interval(tmp_path: Path, every: int, files: list[str]) -> None:
    """Three epochs of four steps, saved every second one or never; continued from the third, the run goes on as if it had not ended."""
    train(tmp_path, every=every)
    assert sorted(p.name for p in (tmp_path / "ckpt").iterdir()) == files
    assert torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)["global_step"] == 12
    assert same_end(train(tmp_path, resume="last", epochs=4, every=every), train(tmp_path / "unbroken", epochs=4, every=every))


def test_the_checkpoint_of_another_run_is_left_alone(tmp_path: Path) -> None:
    """A fresh run in the same folder, stopped before its first checkpoint, must not overwrite `last.ckpt`."""
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt" / "last.ckpt").write_bytes(b"somebody's")
    stopped(tmp_path, Ask(signal.SIGTERM, epoch=0))
    assert (tmp_path / "ckpt" / "last.ckpt").read_bytes() == b"somebody's"
    assert resolve_checkpoint("last", [tmp_path / "ckpt"]) == str(tmp_path / "ckpt" / "last-v1.ckpt")


@pytest.mark.parametrize("last", [False, "link"])
def test_other_ways_to_keep_a_last_checkpoint(tmp_path: Path, last: Any) -> None:
    """Without save_last `last.ckpt` is ours; a link is replaced, not written through."""
    stopped(tmp_path, Ask(signal.SIGTERM), last=last)
    assert torch.load(tmp_path / "ckpt" / "epoch=0-step=4.ckpt", weights_only=True)["global_step"] == 4
    assert torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)["global_step"] == 6
    stopped(tmp_path, Ask(signal.SIGTERM, epoch=2), last=last, resume="last")
    assert sorted(p.name for p in (tmp_path / "ckpt").glob("last*")) == ["last.ckpt"]


def test_an_old_stop_file_is_removed_and_ignored(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    os.utime(tmp_path / "STOP", (0, 0))
    train(tmp_path)
    assert not (tmp_path / "STOP").exists()


def test_a_second_interrupt_is_immediate(tmp_path: Path) -> None:
    class Twice(Ask):
        def ask(self, trainer: L.Trainer, *_: Any) -> None:
            super().ask(trainer)
            os.kill(os.getpid(), signal.SIGINT)

    ask = Twice(signal.SIGINT)
    with pytest.raises(SystemExit) as left:
        train(tmp_path, ask)
    assert left.value.code == 1
    assert torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)["global_step"] == 4


def test_a_forked_child_dies_of_the_signal(tmp_path: Path) -> None:
    """Loader workers and the like inherit the handler; for them SIGTERM means what it always means."""

    class Fork(L.Callback):
        code: int | None = None

        def on_train_epoch_start(self, trainer: L.Trainer, module: Any) -> None:
            child = os.fork()
            if child == 0:
                os.kill(os.getpid(), signal.SIGTERM)
                os._exit(0)
            self.code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    fork = Fork()
    train(tmp_path, fork)
    assert fork.code == -signal.SIGTERM


# ---------------------------------------------------------------------- processes
def start(folder: Path, processes: int, *checkpoint: str) -> BaseProcess:
    words = [str(SCRIPT), str(folder), str(processes), *checkpoint]
    return forked_script(*words, folder=folder, environment=os.environ | {"GLOO_SOCKET_IFNAME": "lo"})


def wait_until_ready(folder: Path, run: BaseProcess, processes: int) -> None:
    deadline = time.monotonic() + 120
    while not all((folder / f"ready.{rank}").exists() for rank in range(processes)):
        assert time.monotonic() < deadline and run.exitcode is None, (folder / "log").read_text()
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["leader", "group"])
def test_two_processes_agree(tmp_path: Path, whom: str) -> None:
    """Where Lightning's own handler hangs: the signal reaches one process, or both at different places."""
    run = start(tmp_path, 2)
    try:
        wait_until_ready(tmp_path, run, 2)
        (os.kill if whom == "leader" else os.killpg)(run.pid, signal.SIGTERM)
        assert ended(run, 60) == 143, (tmp_path / "log").read_text()
        deadline = time.monotonic() + 20
        while alive(run.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not alive(run.pid), "the second process is still there"
    finally:
        end_group(run)
    log = (tmp_path / "log").read_text()
    assert log.count("stopping after this optimizer step") == 1 and log.count("continue with --ckpt_path") == 1
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 5 and len(saved["rollout"]["ranks"]) == 2
    if whom == "leader":
        assert ended(start(tmp_path, 2, "last"), 120) == 0
        unbroken = toy_method(updates_per_iteration=3)
        toy_trainer(tmp_path / "unbroken", max_epochs=3).fit(unbroken, ToyData())
        for name, weight in torch.load(tmp_path / "final.pt", weights_only=True).items():
            torch.testing.assert_close(weight, unbroken.state_dict()[name], rtol=0, atol=1e-6)


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
