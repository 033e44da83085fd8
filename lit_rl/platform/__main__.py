"""The job service and its page, in one process.

    python -m lit_rl.platform --data outputs/platform --port 8000 --page-port 5173

It listens on this machine alone. Its own user needs no token; others send the one in DATA/token.
"""

from __future__ import annotations

import argparse
import socket
import sys
from pathlib import Path

from lit_rl.net.sockets import LOOPBACK, bind, url_of
from lit_rl.platform.settings import Settings

END_SECONDS = 5
"""Time that open connections have when the server ends."""


def parser() -> argparse.ArgumentParser:
    """Options of the server."""
    p = argparse.ArgumentParser(prog="python -m lit_rl.platform", description="Start, watch and compare runs.", allow_abbrev=False)
    p.add_argument("--data", type=Path, default=Path("outputs/platform"), help="folder of database and runs (default: %(default)s)")
    p.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; others than loopback let in whoever has the token (default: %(default)s)",
    )
    p.add_argument("--port", type=int, default=8000, help="of the service; 0 picks a free one (default: %(default)s)")
    p.add_argument("--page-port", type=int, default=5173, help="a second port of the same service, for the page (default: %(default)s)")
    p.add_argument("--allowed-hosts", default="", help="comma list of names by which browsers reach this machine, e.g. gpu7.example.org")
    p.add_argument("--ready-file", type=Path, help="file that receives the service's URL once it listens")
    return p


def main(argv: list[str] | None = None) -> int:
    """Serve until a signal comes; the exit code."""
    args = parser().parse_args(argv)
    try:
        sockets = listening(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    url = url_of(sockets[0])
    names = tuple(filter(None, (name.strip() for name in args.allowed_hosts.split(","))))
    return serve(Settings(data=args.data, url=url.replace("0.0.0.0", "127.0.0.1"), allowed_hosts=names), sockets, args.ready_file)


def listening(args: argparse.Namespace) -> list[socket.socket]:
    """The sockets of the service and of the page; none where one of the ports is taken. Raises ValueError."""
    first = bind(args.host, args.port)
    try:
        return [first, bind(args.host, args.page_port, option="--page-port")]
    except ValueError:
        first.close()
        raise


def serve(settings: Settings, sockets: list[socket.socket], ready: Path | None) -> int:
    """Run the service on sockets that listen."""
    import uvicorn

    from lit_rl.platform.app import create_app
    from lit_rl.platform.patience import PatientProtocol

    try:
        app = create_app(settings)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=END_SECONDS, timeout_keep_alive=75,
        ws_max_size=1 << 16, ws_ping_interval=20.0, lifespan="on", http=PatientProtocol, loop="asyncio",
    )  # fmt: skip
    print(f"Platform ready: service {url_of(sockets[0])}, page {url_of(sockets[1])}, data {settings.data}", flush=True)
    if sockets[0].getsockname()[0] not in LOOPBACK:
        print(f"Other machines may enter with the token in {settings.token_file}; it starts programs as you.", flush=True)
    if ready is not None:
        ready.write_text(url_of(sockets[0]))
    uvicorn.Server(config).run(sockets=sockets)
    return 0


if __name__ == "__main__":
    sys.exit(main())
