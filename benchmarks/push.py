"""The cost of a push of whole weights under FSDP2: the search for a change, the gathering on the first process, the files.

    python -m benchmarks.push [--hidden 768 --layers 6 --vocabulary 16384]

Two processes on this machine, connected by gloo, hold a Qwen2 from a configuration in shards. The peer gathers as torch does it,
`get_model_state_dict(full_state_dict=True, cpu_offload=True)`, finds a change by a hash over all that is trained, and writes float32.
Ours sums the bits of each shard, converts each shard to the server's dtype and sends it to the first process alone. Every arm is a pair of
processes of its own. Prints CPU seconds of both processes together, the size of the files, and how much memory each process has at most
beyond its shards while it gathers and while it writes.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lit_rl.miniatures.lm import build_lm
from lit_rl.policies.causal_lm import CausalLM
from lit_rl.policies.weights.shards import reshard
from lit_rl.rollouts.push import fingerprint, gather, write

ARMS: Mapping[str, torch.dtype | None] = {"torch, float32": None, "ours, float32": torch.float32, "ours, bfloat16": torch.bfloat16}
Figures = dict[str, float]


def sharded(folder: Path) -> CausalLM:
    policy = CausalLM(str(folder))
    policy.load()
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for module in (*policy.blocks(policy.network), policy.network):
        fully_shard(module, mesh=mesh)
    return policy


def gathered_by_torch(policy: CausalLM) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    reshard(policy)
    return get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def hashed(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=4)
    for tensor in weights.values():
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def peak_mib() -> float:
    """The highest resident memory since the last call."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def measure(arm: str, model: Path, out: Path) -> Figures:
    policy, first, figures = sharded(model), torch.distributed.get_rank() == 0, dict[str, float]()
    gc.collect()
    peak_mib()
    held = peak_mib()

    def took(name: str, work: Callable[[], object]) -> object:
        torch.distributed.barrier()
        began = time.process_time()
        found = work()
        figures[name], figures[f"{name}_mib"] = time.process_time() - began, peak_mib() - held
        return found

    ours = arm.startswith("ours")
    if ours:
        took("change", lambda: fingerprint(policy))
    weights = took("gather", lambda: gather(policy, ARMS[arm]) if ours else gathered_by_torch(policy))
    assert isinstance(weights, dict)
    if not ours:
        took("change", lambda: hashed(weights) if first else None)
    took("write", lambda: write(policy, weights, out / "push") if first else None)
    figures["files_mib"] = sum(file.stat().st_size for file in (out / "push").glob("*.safetensors")) / 2**20 if first else 0.0
    return figures


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_pair(arm: str, model: Path) -> list[Figures]:
    """The figures of both processes."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "benchmarks.push", "--arm", arm, "--model", str(model), "--out", out]
        both = [subprocess.Popen(command, env=os.environ | common | {"RANK": str(rank)}, stdout=subprocess.PIPE) for rank in range(2)]
        said = [process.communicate()[0] for process in both]
    return [json.loads(text.splitlines()[-1]) for text in said]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        torch.distributed.init_process_group("gloo")
        print(json.dumps(measure(args.arm, args.model, args.out)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = build_lm(Path(folder) / "model", hidden=args.hidden, layers=args.layers, vocab_size=args.vocabulary, heads=12, kv_heads=4)
        print(f"{'arm':16} find a change  gather   write    files  memory: gathering  writing  second process")
        for arm in ARMS:
            first, second = run_pair(arm, model)
            change, gathering, writing = (first[name] + second[name] for name in ("change", "gather", "write"))
            print(
                f"{arm:16} {change:11.2f} s {gathering:5.2f} s {writing:5.2f} s {first['files_mib']:4.0f} MiB"
                f" {first['gather_mib']:14.0f} {first['write_mib']:8.0f} {second['gather_mib']:9.0f} MiB"
            )


if __name__ == "__main__":
    main()
