"""Start the judge of DeepGen's rewards or of UniGenBench: a vLLM server with the options of the guide's scripts.

    python -m lit_rl.judges {unifiedreward,unigenbench} [--dry-run] [-- more options of `vllm serve`]

It listens on port 18087 or 8000 of this machine, can be sent to sleep (callbacks.judge_sleep.JudgeSleep), and ends with vLLM's exit code.
Signals go on to it. vLLM may live in an environment of its own: name its program with --vllm.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lit_rl.errors import ConfigError
from lit_rl.net.env_file import use_env_file


@dataclass(frozen=True)
class Judge:
    """A model and how it is served. prefix: Of its environment variables; options: Of `vllm serve`, beside those of every judge."""

    model: str
    served: str
    port: int
    prefix: str
    memory: float
    options: Sequence[str] = ()


JUDGES: Mapping[str, Judge] = {
    "unifiedreward": Judge(
        "CodeGoat24/UnifiedReward-Think-qwen3vl-8b", "UnifiedReward", 18087, "UNIFIEDREWARD", 0.9,
        ("--pipeline-parallel-size", "1", "--limit-mm-per-prompt.image", "16", "--enable-prefix-caching"),
    ),
    "unigenbench": Judge(
        "CodeGoat24/UniGenBench-EvalModel-qwen3vl-32b-v1", "UniGenBench-EvalModel-qwen3vl-32b-v1", 8000, "UNIGENBENCH", 0.8
    ),
}  # fmt: skip

FOREIGN = ("PYTHONPATH", "PYTHONHOME", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Variables for this environment's Python, and for its allocator of GPU memory, with which vLLM cannot sleep."""
OWN = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONNOUSERSITE": "1"}
"""vLLM has the routes /sleep and /wake_up in this mode alone."""
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    p = argparse.ArgumentParser(
        prog="python -m lit_rl.judges", allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Variables of the environment: UNIFIEDREWARD_MODEL, UNIFIEDREWARD_PORT, UNIGENBENCH_MODEL, UNIGENBENCH_MODEL_NAME,\n"
        "UNIGENBENCH_PORT, VLLM_PARALLEL_MODE (dp or tp; default dp), VLLM_DATA_PARALLEL_SIZE (8), VLLM_TENSOR_PARALLEL_SIZE,\n"
        "VLLM_GPU_MEMORY_UTILIZATION (0.9 and 0.8). UNIFIEDREWARD_VLLM_PARALLEL_MODE and the like go before those of both judges; for\n"
        "unigenbench, DP_SIZE and GPU_MEMORY_UTILIZATION are read as well.",
    )  # fmt: skip
    p.add_argument("judge", choices=JUDGES, help="unifiedreward judges pairs in training, unigenbench the images of evaluation sets")
    p.add_argument("--dry-run", action="store_true", help="print the line that would be run, and end")
    p.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in, to /sleep too (default: %(default)s)")
    p.add_argument("--port", type=int, help="default: the variable UNIFIEDREWARD_PORT or UNIGENBENCH_PORT, else 18087 or 8000")
    p.add_argument("--vllm", default="vllm", help="vLLM's program, e.g. .venv-vllm/bin/vllm (default: the one on the PATH)")
    return p


def command(args: argparse.Namespace, more: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The line that serves a judge. Raises ConfigError for a variable of the environment that is no number or mode."""
    judge = JUDGES[args.judge]

    def told(*names: str, default: str) -> tuple[str, str]:
        """The first variable that is set, and its value."""
        return next(((name, value) for name in names if (value := environment.get(name, "").strip())), ("", default))

    def own(name: str) -> tuple[str, str]:
        return f"{judge.prefix}_VLLM_{name}", f"VLLM_{name}"

    scripts = ("DP_SIZE", "GPU_MEMORY_UTILIZATION") if args.judge == "unigenbench" else ()
    size = _number(*told(*own("DATA_PARALLEL_SIZE"), *scripts[:1], default="8"))
    mode_name, mode = told(*own("PARALLEL_MODE"), default="dp")
    if mode not in ("dp", "tp"):
        raise ConfigError(f"{mode_name}={mode} in the environment must be dp (copies of the model) or tp (one model over the GPUs)")
    tensor = _number(*told(*own("TENSOR_PARALLEL_SIZE"), default=str(size)))
    memory = told(*own("GPU_MEMORY_UTILIZATION"), *scripts[1:], default=str(judge.memory))
    served = told("UNIGENBENCH_MODEL_NAME", default=judge.served)[1] if args.judge == "unigenbench" else judge.served
    return [
        args.vllm, "serve", told(f"{judge.prefix}_MODEL", default=judge.model)[1],
        "--host", args.host, "--port", str(port_of(args, environment)), "--served-model-name", served,
        "--gpu-memory-utilization", str(_number(*memory, share=True)),
        *(("--tensor-parallel-size", str(tensor)) if mode == "tp" else ("--data-parallel-size", str(size))),
        *judge.options, "--enable-sleep-mode", *more,
    ]  # fmt: skip


def port_of(args: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """The port of a judge. Raises ConfigError for what is none."""
    judge = JUDGES[args.judge]
    name = f"{judge.prefix}_PORT"
    given = str(args.port) if args.port is not None else environment.get(name, "").strip() or str(judge.port)
    if not given.isdecimal() or not 1 <= int(given) <= 65535:
        source = "--port" if args.port is not None else f"{name} in the environment"
        raise ConfigError(f"{source} is {given}; ports are 1 to 65535")
    return int(given)


def _number(name: str, text: str, *, share: bool = False) -> float:
    """A count above 0, or a share in (0, 1]."""
    try:
        value = float(text) if share else int(text)
    except ValueError:
        value = 0
    if not 0 < value <= (1 if share else 1024):
        raise ConfigError(
            f"{name}={text} in the environment must be {'a share above 0 and up to 1' if share else 'a whole number above 0'}"
        )
    return value


def environment_of(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of vLLM."""
    return {name: value for name, value in environment.items() if name not in FOREIGN} | OWN


def printed(line: Sequence[str]) -> str:
    """The line as a shell takes it, with the variables that it needs."""
    return " ".join([*(f"{name}={value}" for name, value in OWN.items()), shlex.join(line)])


def check(line: Sequence[str], *, host: str, port: int) -> None:
    """Raise ConfigError where vLLM is missing, or where another process has the port: it is named."""
    from lit_rl.net.sockets import bind

    if shutil.which(line[0]) is None:
        raise ConfigError(
            f"there is no program {line[0]!r} here: install vLLM, best in an environment of its own, and name its program with "
            "--vllm FOLDER/bin/vllm"
        )
    try:
        bind(host, port).close()
    except ValueError as error:
        raise ConfigError(str(error).replace(" (0: any free one)", ", and tell the run its address")) from error


def serve(line: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run vLLM, send signals on to it, and return its exit code: 128 + N where signal N ended it."""
    from lit_rl.rewards.server_process import die_with_parent

    early: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def forward(number: int, _: object) -> None:
        early.append(number) if process is None else process.send_signal(number)

    for number in FORWARDED:
        signal.signal(number, forward)
    process = subprocess.Popen(
        line,
        env=dict(environment),
        start_new_session=True,  # Ctrl+C reaches this process alone, which sends it on once
        preexec_fn=die_with_parent(),
    )
    for received in early:  # they came while it was started
        process.send_signal(received)
    code = process.wait()
    return code if code >= 0 else 128 - code


def main(argv: Sequence[str] | None = None) -> int:
    """Start a judge; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    args = parser().parse_args(words[:cut])
    try:
        use_env_file()
        line = command(args, words[cut + 1 :], os.environ)
        if args.dry_run:
            print(printed(line))
            return 0
        check(line, host=args.host, port=port_of(args, os.environ))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(printed(line), flush=True)
    return serve(line, environment_of(os.environ))


if __name__ == "__main__":
    sys.exit(main())
