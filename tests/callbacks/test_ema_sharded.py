"""The average of sharded weights is the average of the whole weights: two gloo processes, FSDP2 and ZeRO-3's way of cutting."""

import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forked import ended, forked
from torch import Tensor, nn

from callbacks.ema import EMA
from lit_rl.policies.weights.shards import gather_parts, part, part_of

STEPS = 4


class Policy(nn.Module):
    """Sizes that do not divide by two, a vector and a scalar-like one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1, bias=False))

    def trainable(self) -> Any:
        return self.named_parameters()


def whole_run(decay: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and averages after STEPS edits, unsharded."""
    policy, average = Policy(), EMA(decay)
    trainer, module = SimpleNamespace(global_step=0, is_global_zero=True), SimpleNamespace(policy=policy, warming_up=False)
    average.on_train_start(trainer, module)  # type: ignore[arg-type]
    for step in range(STEPS):
        for _, p in policy.trainable():
            p.data.copy_(edited(p.data, step))
        trainer.global_step += 1
        average.on_train_batch_end(trainer, module, None, None, step)  # type: ignore[arg-type]
    return {n: p.detach().clone() for n, p in policy.trainable()}, average.averaged_weights(trainer, module)  # type: ignore[arg-type]


def edited(weight: Tensor, step: int) -> Tensor:
    """Elementwise, so that it is the same on a shard."""
    return (weight * 3 + step).sin()


def zero3_like(policy: nn.Module) -> None:
    """Cut every parameter as DeepSpeed does: flat, padded to equal pieces, the parameter itself empty."""
    rank, size = dist.get_rank(), dist.get_world_size()
    for _, p in policy.named_parameters():
        each = -(-p.numel() // size)
        flat = torch.cat([p.detach().flatten(), torch.zeros(each * size - p.numel())])
        p.ds_shape, p.ds_numel, p.ds_process_group = p.shape, p.numel(), dist.group.WORLD  # type: ignore[attr-defined]
        p.ds_tensor = flat[rank * each : (rank + 1) * each].clone()  # type: ignore[attr-defined]
        p.data = torch.empty(0)


def shard(policy: nn.Module, how: str) -> None:
    if how == "zero3":
        zero3_like(policy)
    else:
        from torch.distributed.fsdp import fully_shard

        fully_shard(policy.network, mesh=dist.init_device_mesh("cpu", (dist.get_world_size(),)))


def act(policy: nn.Module, how: str) -> None:
    """A rollout: under FSDP2 a forward without backward leaves whole weights where the shards should be."""
    if how == "fsdp2":
        with torch.no_grad():
            policy.network(torch.zeros(1, 5))  # type: ignore[operator]


def sharded_run(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    answers = {}
    for how in ("fsdp2", "zero3"):
        policy, average = Policy(), EMA(0.9)
        shard(policy, how)
        trainer, module = SimpleNamespace(global_step=0, is_global_zero=rank == 0), SimpleNamespace(policy=policy, warming_up=False)
        average.on_train_start(trainer, module)  # type: ignore[arg-type]
        for step in range(STEPS):
            for _, p in policy.trainable():
                part(p).copy_(edited(part(p), step))
            trainer.global_step += 1
            act(policy, how)
            average.on_train_batch_end(trainer, module, None, None, step)  # type: ignore[arg-type]
        checkpoint: dict[str, Any] = {}
        average.on_save_checkpoint(trainer, module, checkpoint)  # type: ignore[arg-type]
        stored = checkpoint["ema"]["weights"]
        before = {n: part(p).clone() for n, p in policy.trainable()}
        act(policy, how)
        average.swap_in(module)  # type: ignore[arg-type]
        evaluated = {n: gather_parts(part(p), p) for n, p in policy.trainable()}
        act(policy, how)
        average.swap_out(module)  # type: ignore[arg-type]

        if how == "fsdp2":  # there all processes read the first one's file, under ZeRO-3 each its own
            dist.broadcast_object_list(sent := [checkpoint], src=0)
            checkpoint = sent[0]
        fresh, again = Policy(), EMA(0.9)
        shard(fresh, how)
        again.on_load_checkpoint(trainer, module, checkpoint)  # type: ignore[arg-type]
        restored = SimpleNamespace(policy=fresh, warming_up=False)
        again.on_train_start(trainer, restored)  # type: ignore[arg-type]
        live = {n: gather_parts(part(p), p) for n, p in policy.trainable()}
        answers[how] = {
            "live": live,
            "stored": stored,
            "evaluated": evaluated,
            "exact": all(torch.equal(part(p), before[n]) for n, p in policy.trainable()),
            "restored": again.averaged_weights(trainer, restored),  # type: ignore[arg-type]
            "inverse": all(
                [torch.equal(gather_parts(part_of(live[n], p), p), live[n]) for n, p in policy.trainable()]
            ),  # a collective: no short cut
        }
    torch.save(answers, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [forked(sharded_run, rank, port, str(folder), folder=folder, log=folder / "log", environment=os.environ) for rank in range(2)]
    assert [ended(rank, 120) for rank in ranks] == [0, 0], (folder / "log").read_text()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp2", "zero3"])
def test_equals_the_unsharded_average(answers: list[dict], how: str) -> None:
    live, average = whole_run(0.9)
    for rank, answer in enumerate(answers):
        for name in average:
            assert torch.equal(answer[how]["live"][name], live[name])
            assert torch.equal(answer[how]["evaluated"][name], average[name])
        assert answer[how]["exact"] and answer[how]["inverse"]
        for kept in (answer[how]["stored"], answer[how]["restored"]):  # on the first process only
            assert kept.keys() == (average.keys() if rank == 0 else set())
            assert all(torch.equal(kept[name], average[name]) for name in kept)
