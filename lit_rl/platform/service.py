"""What the routes of one server share."""

from __future__ import annotations

import fcntl
import os
from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from lit_rl.platform.records import Records
from lit_rl.platform.settings import Settings
from lit_rl.platform.store import Store


class Service:
    """The parts of a server on a data folder. Raises ValueError where another server works there."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        settings.data.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(settings.data / "server.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise ValueError(f"another server works in --data {settings.data}: stop it, or choose another folder") from error
        self.store = Store(settings.data)
        self.records = Records(self.store, settings.data.resolve() / "runs")

    def close(self) -> None:
        """Close the files, so that another server may begin."""
        self.store.close()
        os.close(self._lock)


def service_of(connection: HTTPConnection) -> Service:
    """The service that a request is for."""
    service = connection.app.state.service
    assert isinstance(service, Service)
    return service


Here = Annotated[Service, Depends(service_of)]
