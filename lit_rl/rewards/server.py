"""Reward server: scores images and texts over HTTP, apart from the training process.

    python -m lit_rl.rewards.server --port 8000 --scorers ocr
    python -m lit_rl.rewards.server --port 8000 --scorers rules,format

Nothing heavy is imported before the arguments are checked and the port is taken; the scorers load while /health already answers `loading`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import socket
import sys
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_rl.net.env_file import use_env_file
from lit_rl.net.sockets import LOOPBACK, bind, url_of
from lit_rl.own_code import use_working_folder

if TYPE_CHECKING:
    from lit_rl.rewards.service.app import RewardApp

DRAIN_SECONDS = 30.0


def parser() -> argparse.ArgumentParser:
    """Options of the server."""
    p = argparse.ArgumentParser(  # abbreviations would hide `--tok SECRET` and `--por 9000` from the launcher, which looks for whole names
        prog="python -m lit_rl.rewards.server", description="Score images and texts over HTTP.", allow_abbrev=False
    )
    p.add_argument("--host", default="127.0.0.1", help="address to listen on; any other than loopback needs a token (default: %(default)s)")
    p.add_argument("--port", type=int, default=8000, help="0 picks a free one (default: %(default)s)")
    p.add_argument(
        "--scorers",
        help="comma list, for images of ocr, quoted (DeepGen-RL's OCR), vlm, clip, pickscore, jpeg, for texts of rules, function, "
        "reward_model, format, repetition, for both of pseudo, or dotted paths (default: ocr; with a VLM: ocr,vlm)",
    )
    p.add_argument("--vlm-model-path", help="folder of a Qwen2.5-VL model")
    p.add_argument(
        "--scorer-args",
        type=json.loads,
        default={},
        help="""JSON of constructor options, e.g. '{"ocr": {"detect": false}}' for pictures or masks that hold one line of text (faster)""",
    )
    p.add_argument("--device", help="where models run (default: cuda if there is one, else cpu)")
    p.add_argument("--max-batch", type=int, default=32, help="images or texts per call of the scorers (default: %(default)s)")
    p.add_argument(
        "--max-queue-images", type=int, default=256, help="images or texts waiting before 429 is answered (default: %(default)s)"
    )
    p.add_argument("--max-body-mb", type=int, default=64, help="largest request in MiB (default: %(default)s)")
    p.add_argument("--max-pixels", type=int, default=2048**2, help="largest image (default: %(default)s)")
    p.add_argument("--body-seconds", type=float, default=10.0, help="time in which a body must arrive (default: %(default)s)")
    p.add_argument(
        "--token",
        default=os.environ.get("REWARD_TOKEN"),
        help="wanted as `Authorization: Bearer` (default: $REWARD_TOKEN, which `ps` does not show to others)",
    )
    p.add_argument("--no-auth", action="store_true", help="listen beyond loopback without a token")
    p.add_argument("--ready-file", type=Path, help="file that receives the server's URL once it is ready")
    return p


def check_arguments(args: argparse.Namespace) -> None:
    """Fill in the scorers. Raises ValueError with one sentence for everything that can be wrong before loading."""
    from lit_rl.rewards.service import scorers

    for name in ("max_batch", "max_queue_images", "max_body_mb", "max_pixels", "body_seconds"):
        if not getattr(args, name) > 0:  # NaN is not
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be positive")
    if not 0 <= args.port <= 65535:
        raise ValueError(f"--port is {args.port}; ports are 1 to 65535, or 0 for a free one")
    args.host = args.host.strip().strip("[]")
    if not args.host:
        raise ValueError("--host is empty; give 127.0.0.1 for this machine alone, or 0.0.0.0 to let other machines in")
    args.token = (args.token or "").strip() or None
    if args.token and not all("!" <= letter <= "~" for letter in args.token):
        raise ValueError("the token holds white space, or letters other than those of ASCII, which no request can carry; choose another")
    if args.host not in LOOPBACK and not args.token and not args.no_auth:
        raise ValueError(
            f"--host {args.host} lets other machines in; give --token or set REWARD_TOKEN, or say --no-auth if the network is private"
        )
    if not isinstance(args.scorer_args, dict) or not all(isinstance(v, dict) for v in args.scorer_args.values()):
        raise ValueError("""--scorer-args must map scorers to options, e.g. '{"ocr": {"detect": false}}'""")
    default = "ocr,vlm" if args.vlm_model_path else "ocr"
    args.scorers = [name for name in map(str.strip, (args.scorers or default).split(",")) if name]
    if args.vlm_model_path:
        args.scorer_args.setdefault("vlm", {})["model_path"] = args.vlm_model_path
    scorers.check(args.scorers, args.scorer_args)


async def serve(args: argparse.Namespace, sock: socket.socket) -> int:
    """Run until a signal or a failed load; 0 after a clean drain."""
    from aiohttp import web

    from lit_rl.rewards.service.app import Limits, RewardApp, make_runner

    limits = Limits(
        max_batch=args.max_batch,
        max_queue_images=args.max_queue_images,
        max_body_bytes=args.max_body_mb << 20,
        max_held_bytes=max(1 << 30, args.max_body_mb << 20),
        max_pixels=args.max_pixels,
        body_seconds=args.body_seconds,
    )
    app = RewardApp(limits, token=args.token)
    runner = make_runner(app)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await runner.setup()
    await web.SockSite(runner, sock).start()
    try:
        if not await _load(args, app, stop):
            return 0 if stop.is_set() else 1
        _announce(args, sock)
        await stop.wait()
        if await app.batcher.drain(DRAIN_SECONDS):
            return 0
        print(f"Gave up on {app.batcher.images} images that were not scored within {DRAIN_SECONDS:g} s.", file=sys.stderr)
        return 1
    finally:
        await runner.cleanup()
        if args.ready_file:
            args.ready_file.unlink(missing_ok=True)


async def _load(args: argparse.Namespace, app: RewardApp, stop: asyncio.Event) -> bool:
    """Load the scorers in a thread while /health answers. False when a signal came first, or when loading failed (said on stderr)."""
    from lit_rl.rewards.service import scorers

    loop = asyncio.get_running_loop()
    loaded: asyncio.Future[list[Any]] = loop.create_future()

    def work() -> None:
        try:
            rewards = scorers.build(args.scorers, args.scorer_args, device=args.device)
        except Exception as error:
            logging.exception("loading the scorers failed")
            loop.call_soon_threadsafe(loaded.set_exception, error)
        else:
            loop.call_soon_threadsafe(loaded.set_result, rewards)

    threading.Thread(target=work, name="load", daemon=True).start()
    stopped: asyncio.Future[Any] = asyncio.ensure_future(stop.wait())
    await asyncio.wait([loaded, stopped], return_when=asyncio.FIRST_COMPLETED)
    if stop.is_set():
        return False
    stopped.cancel()
    if (error := loaded.exception()) is not None:
        print(f"The scorers {', '.join(args.scorers)} could not be loaded: {error}", file=sys.stderr)
        return False
    rewards = loaded.result()
    app.highest = {name: value for reward in rewards for name, value in reward.highest.items()}
    app.outputs = [name for reward in rewards for name in reward.outputs] if all(reward.outputs for reward in rewards) else None
    app.media = scorers.media_of(rewards)
    app.batcher.start(partial(scorers.score_samples, rewards))
    return True


def _announce(args: argparse.Namespace, sock: socket.socket) -> None:
    url = url_of(sock)
    print(
        f"Reward server ready at {url} (scorers: {', '.join(args.scorers)}; batches of up to {args.max_batch}, "
        f"queue of {args.max_queue_images} images)",
        flush=True,
    )
    if args.host not in LOOPBACK and not args.token:
        print(f"Warning: anybody who can reach {url} can use it (--no-auth).", flush=True)
    if args.ready_file:
        partial_file = args.ready_file.with_name(args.ready_file.name + ".partial")
        partial_file.write_text(url)
        partial_file.replace(args.ready_file)


def main(argv: list[str] | None = None) -> int:
    """Run a server until a signal comes; the exit code."""
    use_working_folder()
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        use_env_file()
        check_arguments(args)
        sock = bind(args.host, args.port)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return asyncio.run(serve(args, sock))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not `sys.exit`: a model thread that hangs must not keep the process and its GPU memory
