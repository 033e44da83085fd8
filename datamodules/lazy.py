"""Prompts whose images are read when somebody asks for them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from torch import Tensor

from lit_rl.errors import ConfigError
from lit_rl.types import Info

Reader = partial[Tensor]
"""Reads one image; equal `func` and `args` give the same pixels. `keywords` only serve the error message."""


class ImageCache:
    """The images last asked for, as many as fit in `limit` bytes, and at least one. Threads may share it."""

    def __init__(self, limit: int = 256 << 20) -> None:
        self.limit = limit
        self.held: OrderedDict[object, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, reader: Reader) -> Tensor:
        """The image of a reader, read once while it is held."""
        key = reader.func, reader.args
        with self._lock:
            if key in self.held:
                self.held.move_to_end(key)
                return self.held[key]
        image = reader()  # outside the lock: another thread may wait for something that is held
        with self._lock:
            self.held[key] = image
            while len(self.held) > 1 and sum(kept.nbytes for kept in self.held.values()) > self.limit:
                self.held.popitem(last=False)
        return image

    def __reduce__(self) -> tuple[object, ...]:
        return ImageCache, (self.limit,)  # a lock does not travel to another process, and images need not


class LazyRow(Info):
    """A read-only prompt: plain `values`, and `images` that are read on access. Equal only to itself, as policies condition by identity.

    `LazyRow(mapping)` holds what the mapping holds: Lightning rebuilds the mappings of a batch so under some precisions.
    """

    def __init__(self, values: Info, images: Mapping[str, Reader] | None = None, cache: ImageCache | None = None) -> None:
        self._values, self._images = dict(values), dict(images or {})
        self._cache = cache or ImageCache()

    def __getitem__(self, key: str) -> object:
        return self._values[key] if key in self._values else self._cache.read(self._images[key])

    def __contains__(self, key: object) -> bool:
        return key in self._values or key in self._images

    def __iter__(self) -> Iterator[str]:
        yield from self._values
        yield from self._images

    def __len__(self) -> int:
        return len(self._values) + len(self._images)

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"LazyRow({self._values}, images={list(self._images)})"

    def readers(self) -> list[Reader]:
        """The readers of its images."""
        return list(self._images.values())

    def but(self, **values: object) -> LazyRow:
        """Another row with these values beside the same images."""
        return LazyRow(self._values | values, self._images, self._cache)


def unreadable(readers: Iterable[Reader]) -> list[str]:
    """Reads every image once and says of each that cannot be read what is wrong. Some threads; nothing is kept."""

    def tried(reader: Reader) -> str | None:
        try:
            reader()
        except ConfigError as error:
            return str(error)
        return None

    once = {(reader.func, reader.args): reader for reader in readers}
    with ThreadPoolExecutor() as threads:
        return [problem for problem in threads.map(tried, once.values()) if problem is not None]
