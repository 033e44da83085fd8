"""Listening sockets, and who holds a port that is taken."""

from __future__ import annotations

import socket

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def bind(host: str, port: int, *, option: str = "--port") -> socket.socket:
    """A listening socket. Raises ValueError naming the port, its owner where known, and the way out by `option`."""
    if not 0 <= port < 1 << 16:
        raise ValueError(f"cannot listen on {host}:{port}: ports are 0 to 65535; choose another with {option} (0: any free one)")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sets TCP_NODELAY only where the protocol is named
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(512)
    except OSError as error:
        sock.close()
        if isinstance(error, PermissionError) or not port:
            raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        raise ValueError(
            f"cannot listen on {host}:{port}: {error.strerror}{owner(port)}; choose another with {option} (0: any free one)"
        ) from error
    return sock


def owner(port: int) -> str:
    """` by NAME (pid N)` of the process of ours that listens on a port, else nothing."""
    import psutil

    for process in psutil.process_iter(["name"]):
        try:
            if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in process.net_connections("tcp")):
                return f" by {process.info['name']} (pid {process.pid})"
        except psutil.Error:  # somebody else's process, or gone
            continue
    return ""


def url_of(sock: socket.socket) -> str:
    """The address of a listening socket as a URL without a path."""
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
