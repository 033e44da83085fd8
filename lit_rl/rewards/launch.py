"""Start one reward server per GPU on consecutive ports and keep them running.

    python -m lit_rl.rewards.launch --vlm-model-path FOLDER --port 8000 --gpu-ids 4,5,6,7 [-- more options of lit_rl.rewards.server]

Each server logs to logs/reward_server_gpu_{id}.log. Ctrl+C, SIGTERM and SIGHUP stop all; when the launcher itself is killed, so are they.
"""

from __future__ import annotations

import argparse
import fcntl
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from lit_rl.net.gpus import chosen_ids
from lit_rl.net.gpus import gpus as installed_gpus
from lit_rl.net.sockets import bind
from lit_rl.rewards import server as reward_server
from lit_rl.rewards.server_process import ServerProcess

RESTARTS = 3
STABLE_SECONDS = 60.0
STOP_SECONDS = reward_server.DRAIN_SECONDS + 5


class LaunchError(Exception):
    """A server that does not start, or does not stay up; one sentence for the user."""


def parser() -> argparse.ArgumentParser:
    """Options of the launcher."""
    p = argparse.ArgumentParser(
        prog="python -m lit_rl.rewards.launch",
        allow_abbrev=False,
        description="Start one reward server per GPU.",
        epilog="Options after `--` go to every server: python -m lit_rl.rewards.server --help",
    )
    p.add_argument("--vlm-model-path", help="folder of a Qwen2.5-VL model; without it the servers score by OCR only")
    p.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 lets other machines in, with REWARD_TOKEN or `-- --no-auth` (default: %(default)s)"
    )
    p.add_argument("--port", type=int, default=8000, help="of the first server; the others take the next ones (default: %(default)s)")
    p.add_argument(
        "--gpu-ids",
        default="4,5,6,7",
        help="numbers, UUIDs or all, one server each; on a machine without GPUs the ids only name the logs (default: %(default)s)",
    )
    p.add_argument("--log-dir", type=Path, default=Path("logs"), help="default: %(default)s")
    p.add_argument("--ready-timeout", type=float, default=900.0, help="seconds in which the models must load (default: %(default)s)")
    return p


def plan(args: argparse.Namespace, extra: Sequence[str]) -> list[ServerProcess]:
    """The servers to start. Raises ValueError for whatever can be known to be wrong before the first one is."""
    gpus = chosen_ids(args.gpu_ids, installed_gpus(), option="--gpu-ids")
    if not 1 <= args.port <= 65536 - len(gpus):
        raise ValueError(f"--port is {args.port}; {len(gpus)} servers need ports from 1 to 65535")
    if not args.ready_timeout > 0:
        raise ValueError(f"--ready-timeout is {args.ready_timeout}; give the seconds that loading may take, e.g. 900")
    args.host = args.host.strip().strip("[]")
    options, token = _server_options(args, extra)
    logs = [args.log_dir / f"reward_server_gpu_{gpu.replace('/', '_')}.log" for gpu in gpus]
    if folder := next((log for log in logs if log.is_dir()), None):
        raise ValueError(f"--log-dir {args.log_dir}: {folder} is a folder, and would be the log of a server; move it away")
    servers = [ServerProcess(gpu, args.host, args.port + i, options, log, token=token) for i, (gpu, log) in enumerate(zip(gpus, logs))]
    with ExitStack() as taken:  # all ports at once, then free them for the servers
        for server in servers:
            taken.enter_context(bind(server.host, server.port))
    return servers


def _server_options(args: argparse.Namespace, extra: Sequence[str]) -> tuple[list[str], str | None]:
    """The command-line options of every server, and its token, which goes through the environment: `ps` shows options to everybody."""
    options = [*(["--vlm-model-path", args.vlm_model_path] if args.vlm_model_path else []), *extra]
    for option in ("--host", "--port", "--ready-file"):
        if any(word.partition("=")[0] == option for word in extra):
            raise ValueError(f"{option} stands after `--`, where every server would get it; give --host and --port before `--`")
    parsed = reward_server.parser().parse_args(["--host", args.host, "--port", str(args.port), *options])
    reward_server.check_arguments(parsed)
    shown = [i for i, word in enumerate(options) if word.partition("=")[0] == "--token"]
    hidden = {i for i in shown} | {i + 1 for i in shown if "=" not in options[i]}
    return [word for i, word in enumerate(options) if i not in hidden], parsed.token


def hold_logs(servers: Sequence[ServerProcess], held: ExitStack) -> None:
    """Lock the servers' logs for this launcher. Raises ValueError where another one writes them."""
    for server in servers:
        file = held.enter_context(server.log.open("ab"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{server.log} is the log of another launcher that is running; give this one another --log-dir") from error


def wait_ready(servers: Sequence[ServerProcess], *, timeout: float, stopped: Callable[[], bool]) -> None:
    """Return when every server is healthy, or a signal came. A server that ends before that is not restarted: its options are wrong."""
    end = time.monotonic() + timeout
    for server in servers:
        while not stopped():
            if server.healthy():
                server.ready_since = time.monotonic()
                print(f"Launching {server.name} ✓", flush=True)
                break
            for other in servers:
                assert other.process is not None
                if (code := other.process.poll()) is not None:
                    raise LaunchError(f"The {other.name} ended with code {code} while starting: {other.last_words()} (log: {other.log})")
            if time.monotonic() > end:
                raise LaunchError(f"The {server.name} was not ready within {timeout:g} s (--ready-timeout); log: {server.log}")
            time.sleep(0.1)


def keep_alive(server: ServerProcess) -> None:
    """Restart a dead server after 1, 2, 4 seconds; raise LaunchError when it dies a fourth time within a minute of being healthy."""
    now = time.monotonic()
    if server.process is None:
        if now >= server.start_at:
            server.start()
    elif (code := server.process.poll()) is not None:
        if server.restarts == RESTARTS:
            raise LaunchError(
                f"The {server.name} ended with code {code} after {RESTARTS} restarts: {server.last_words()} (log: {server.log})"
            )
        server.restarts += 1
        server.start_at, server.process = now + 2 ** (server.restarts - 1), None
        print(f"The {server.name} ended with code {code}; restarting it ({server.restarts} of {RESTARTS}, log: {server.log})", flush=True)
    elif server.ready_since is None:
        if server.healthy():
            server.ready_since = now
            print(f"The {server.name} is back.", flush=True)
    elif now - server.ready_since > STABLE_SECONDS:
        server.restarts = 0


def stop_all(servers: Sequence[ServerProcess], *, hurry: Callable[[], bool]) -> None:
    """SIGTERM to all, SIGKILL to those that have not finished their work in time or when the user insists."""
    running = [s.process for s in servers if s.process is not None and s.process.poll() is None]
    for process in running:
        process.terminate()
    end = time.monotonic() + STOP_SECONDS
    while any(process.poll() is None for process in running) and time.monotonic() < end and not hurry():
        time.sleep(0.05)
    for process in running:
        if process.poll() is None:
            process.kill()
        process.wait()


def run(servers: Sequence[ServerProcess], *, timeout: float) -> None:
    """Start, watch and finally stop the servers. Returns after a signal."""
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, frame: signals.append(received))
    try:
        for server in servers:
            server.start()
        wait_ready(servers, timeout=timeout, stopped=lambda: bool(signals))
        if not signals:
            print("Press Ctrl+C to stop all servers.", flush=True)
        while not signals:
            for server in servers:
                keep_alive(server)
            time.sleep(0.2)
    finally:
        count = len(signals)
        stop_all(servers, hurry=lambda: len(signals) > max(1, count))


def main(argv: Sequence[str] | None = None) -> int:
    """Start the servers and keep them running; the exit code."""
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal without ✓ must not stop the servers
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    args = parser().parse_args(words[:cut])
    with ExitStack() as held:
        try:
            servers = plan(args, words[cut + 1 :])
            if not installed_gpus():
                print(f"This machine has no NVIDIA GPU: the servers compute on the CPU, --gpu-ids {args.gpu_ids} only names their logs.")
            args.log_dir.mkdir(parents=True, exist_ok=True)
            hold_logs(servers, held)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        try:
            run(servers, timeout=args.ready_timeout)
        except LaunchError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print("All servers are stopped.", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
