"""Bytes of local files and of any URL that fsspec opens: which shards there are, and ranged reads with retry."""

from __future__ import annotations

import asyncio
import contextlib
import glob
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fsspec
from aiohttp import ClientError
from braceexpand import braceexpand
from fsspec.asyn import AsyncFileSystem, sync

from midasheng.config import UserError

T = TypeVar("T")
DEADLINE_S = 120.0  # of one read, all its attempts together
ATTEMPT_S = 30.0  # of one attempt; a server that accepts and then says nothing must not hang a worker
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0  # between attempts, doubled each time
AT_ONCE = 16  # ranged reads under way in one process
COPY_BYTES = 2**23  # of one range when a whole shard is copied
TRANSIENT = (OSError, asyncio.TimeoutError, ClientError)
STAMPS = ("ETag", "etag", "mtime", "LastModified", "Last-Modified", "last_modified", "updated", "md5Hash")


class StorageError(UserError):
    """A shard or folder that is not there; the message names it."""


class Unreachable(Exception):
    """A range that could not be read before the deadline; the message says what the last attempt met."""


class ServerLost(UserError):
    """Where shards lie cannot be reached any more; the run ends before it goes on without them."""


@dataclass(frozen=True)
class ShardFile:
    """One shard as its storage lists it. `stamp` changes when its bytes do; empty where the storage says nothing."""

    path: str
    size: int
    stamp: str


class Place(NamedTuple):
    """A range of bytes of a local file or URL."""

    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes. Raises StorageError when the file is gone, Unreachable after the deadline."""
        return _patiently(self._remote if is_url(self.path) else self._local, self.path, DEADLINE_S)

    def _local(self) -> bytes:
        try:
            data = os.pread(_descriptor(self.path).fileno(), self.size, self.offset)
        except OSError:
            _descriptor.cache_clear()  # a network mount that comes back has other handles
            raise
        if len(data) < self.size:
            raise Unreachable(f"{self.path}: ends before byte {self.offset + self.size}; it was longer when indexed")
        return data

    def _remote(self) -> bytes:
        end = self.offset + self.size
        data = bytes(_ask(self.path, "cat_file", start=self.offset, end=end))
        if len(data) != self.size:
            raise OSError(f"{len(data)} bytes came for a range of {self.size}")
        return data


def is_url(path: str) -> bool:
    """Does fsspec open it, and not the operating system?"""
    return "://" in path


@lru_cache(maxsize=256)
def _descriptor(path: str) -> Any:
    return open(path, "rb", buffering=0)


@lru_cache(maxsize=4096)
def _opened(path: str) -> tuple[Any, str]:
    system, inside = fsspec.core.url_to_fs(path)
    return system, str(inside)


os.register_at_fork(after_in_child=_opened.cache_clear)  # the parent's event loop does not live on in a worker


def _ask(url: str, what: str, **options: Any) -> Any:
    """One attempt of a file system's method, of at most ATTEMPT_S where it can be stopped."""
    system, inside = _opened(url)
    if isinstance(system, AsyncFileSystem):
        return sync(system.loop, getattr(system, f"_{what}"), inside, timeout=ATTEMPT_S, **options)
    return getattr(system, what)(inside, **options)


def _mount_gone(path: str) -> bool:
    """Is a local file missing together with everything beside it? That is a mount that went away, and may come back."""
    folder = os.path.dirname(path)
    return not is_url(path) and not (os.path.isdir(folder) and os.listdir(folder))


def _patiently(attempt: Callable[[], T], path: str, deadline_s: float) -> T:
    """Try again with growing pauses until the deadline."""
    until, pause = time.monotonic() + deadline_s, FIRST_PAUSE_S
    while True:
        try:
            return attempt()
        except TRANSIENT as error:
            # fsspec's http says FileNotFoundError for all that went wrong while it asked for a size; the cause tells
            cause = error.__cause__ if isinstance(error.__cause__, TRANSIENT) else error
            status = getattr(cause, "status", None)
            if status in (404, 410) or (isinstance(cause, FileNotFoundError) and not _mount_gone(path)):
                raise StorageError(f"{path} is not there") from None
            if isinstance(cause, PermissionError) or status in (401, 403):
                raise StorageError(f"{path}: not allowed ({cause}); look at the credentials of this storage") from None
            if time.monotonic() + pause > until:
                raise Unreachable(f"{path}: {type(cause).__name__} {cause}") from None
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)


def read_many(places: Sequence[Place]) -> Iterator[bytes | StorageError | Unreachable]:
    """The bytes of each place in order, or what went wrong; remote ones are fetched side by side."""

    def one(place: Place) -> bytes | StorageError | Unreachable:
        try:
            return place.read()
        except (StorageError, Unreachable) as error:
            return error

    if not any(is_url(p.path) for p in places):
        yield from map(one, places)  # a thread costs more than a local read
        return
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield from pool.map(one, places)


@contextlib.contextmanager
def local_copy(shard: ShardFile) -> Iterator[str]:
    """A local path with the bytes of a shard: its own, or a temporary copy of what a URL names.

    Raises StorageError when it is gone, has another size than listed, or cannot be read before the deadline.
    """
    if not is_url(shard.path):
        if os.path.getsize(shard.path) != shard.size:
            raise StorageError(f"{shard.path} changes while it is read; index it when it is written")
        yield shard.path
        return
    parts = [
        Place(shard.path, start, min(COPY_BYTES, shard.size - start)) for start in range(0, shard.size, COPY_BYTES)
    ]
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/shard.tar", "wb") as copy:
            for first in range(0, len(parts), AT_ONCE):
                for data in read_many(parts[first : first + AT_ONCE]):
                    if not isinstance(data, bytes):
                        raise StorageError(f"cannot copy {data}")
                    copy.write(data)
        yield copy.name


def list_shards(root: str, pattern: str) -> list[ShardFile]:
    """The shards below `root` (a folder or URL) that match `pattern`, sorted by path.

    Braces are expanded as webdataset does (`part-{000000..000127}.tar`), then `*`, `[...]` and, but for http, `?`
    are globs; a pattern that is a URL itself stands for itself. Raises StorageError when a named file is not there, or
    a URL cannot be listed; empty when a glob finds none.
    """
    found: dict[str, ShardFile] = {}
    for one in braceexpand(pattern):
        url = one if is_url(one) else f"{root.rstrip('/')}/{one}" if is_url(root) else ""
        for shard in _listed_urls(url) if url else _listed_files(root, one):
            found[shard.path] = shard
    return sorted(found.values(), key=lambda s: s.path)


def _listed_files(root: str, pattern: str) -> Iterator[ShardFile]:
    named = not glob.has_magic(pattern)
    for name in [pattern] if named else glob.glob(pattern, root_dir=root, recursive=True):
        path = Path(root) / name
        if not path.is_file():
            raise StorageError(f"shard {path} is not there, or no plain file")
        stat = path.stat()
        yield ShardFile(str(path), stat.st_size, str(stat.st_mtime_ns))


def _listed_urls(url: str) -> list[ShardFile]:
    def look() -> list[ShardFile]:
        system, inside = _opened(url)
        asks = not inside.startswith("http")  # there a ? begins the query
        is_glob = any(c in inside for c in "*[") or (asks and "?" in inside)
        details = _ask(url, "glob", detail=True) if is_glob else {inside: {}}
        shards = []
        for name, known in sorted(details.items()):
            path = system.unstrip_protocol(name)
            info = known if known.get("size") is not None else _ask(path, "info")
            if info.get("size") is None:
                raise StorageError(f"{path}: its server tells no size, so it cannot be read in ranges")
            stamp = next((str(info[k]) for k in STAMPS if info.get(k)), "")
            shards.append(ShardFile(path, int(info["size"]), stamp))
        return shards

    try:
        return _patiently(look, url, ATTEMPT_S)
    except Unreachable as error:
        raise StorageError(f"cannot list {error}") from None
