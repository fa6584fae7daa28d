"""One shard: what lies in its tar, and the side file of columns that says so."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from webdataset.tariterators import base_plus_ext

from midasheng.config import HEARD
from midasheng.data.audio import Skip, decode, planned_samples
from midasheng.data.chat import Chat, agreeing, lead, trunk
from midasheng.data.manifest import Card, ManifestError, conversations
from midasheng.data.storage import ShardFile, local_copy
from midasheng.sample import NO_TARGET, unit_hash

VERSION = 2  # of side files and tables; raise it when their content changes
MOST_PADDING = 2**20  # zeros that a writer may end a tar with
AUDIO_EXTENSIONS = ("flac", "wav", "mp3", "ogg", "opus")


# -- reading a tar -----------------------------------------------------------------------------------------------------


class Span(NamedTuple):
    """Where bytes lie in a shard."""

    offset: int
    size: int


@dataclass
class Found:
    """One record as it lies in a tar: extension -> span. `reason`: why it cannot be used; empty where it can."""

    key: str
    members: dict[str, Span] = field(default_factory=dict)
    reason: str = ""


def scan(path: str) -> tuple[list[Found], list[str]]:
    """(records in the order of the file, damage) of a local tar.

    tarfile, and webdataset with it, ends silently at a header it cannot read. Here that is damage, listed with its
    place, and reading goes on at the next header. Members of a record that do not lie together, a member that is there
    twice, a link: the record is unusable.
    """
    records: dict[str, Found] = {}
    damage: list[str] = []
    size, previous = os.path.getsize(path), None
    with open(path, "rb") as file:
        for member in _members(file, size, damage):
            key, extension = base_plus_ext(member.name)  # webdataset's rule: the key ends at the first dot
            if not key or not extension:
                continue
            record = records.setdefault(key, Found(key.encode(errors="backslashreplace").decode()))
            if record.key != key:
                record.reason = "name no UTF-8"
            elif not member.isfile():
                record.reason = "a link"
            elif record.members and key != previous:
                record.reason = "members apart"
            elif extension.lower() in record.members:
                record.reason = "member twice"
            else:
                record.members[extension.lower()] = Span(member.offset_data, member.size)
            previous = key
    return list(records.values()), damage


def _members(file: Any, size: int, damage: list[str]) -> Iterator[tarfile.TarInfo]:
    """Every member that is wholly there; what is wrong with the file goes to `damage`."""
    start: int | None = 0
    while start is not None:
        file.seek(start)
        end = start
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.offset_data + member.size > size:
                        damage.append(f"cut off inside {member.name}, at byte {size}")
                        return
                    end = max(end, member.offset_data + -(-member.size // 512) * 512)
                    if not member.isdir():
                        yield member
                end = max(end, tar.offset)
        except tarfile.TarError:
            pass
        start = _next_header(file, end, size, damage)


def _next_header(file: Any, end: int, size: int, damage: list[str]) -> int | None:
    """Where reading goes on behind `end`, where no header could be read; None at a proper end or when none follows."""
    file.seek(end)
    if size - end >= tarfile.BLOCKSIZE and not any(part.strip(b"\0") for part in iter(lambda: file.read(2**20), b"")):
        if size - end > MOST_PADDING:
            damage.append(f"nothing but zeros from byte {end} to {size}, as in a download that broke off")
        return None
    if size - end < tarfile.BLOCKSIZE:
        damage.append(f"cut off at byte {size}")
        return None
    for offset in range(end + tarfile.BLOCKSIZE, size, tarfile.BLOCKSIZE):
        file.seek(offset)
        try:
            tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), tarfile.ENCODING, "surrogateescape")
        except tarfile.HeaderError:
            continue
        damage.append(f"damaged at byte {end}, read on at byte {offset}")
        return offset
    damage.append(f"damaged from byte {end} to the end, at byte {size}")
    return None


# -- side files --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """How a corpus is read: everything that its side files depend on besides the shards."""

    card: Card
    chat: Chat
    clips: str = HEARD
    decode_share: float = 0.0

    @cached_property
    def fingerprint(self) -> str:
        """Hash of it; part of a side file's name, so that one made for another tokenizer or card is never opened."""
        card = self.card
        parts = (
            VERSION, card.audio, card.context, card.prompts, card.answer, card.pairs,
            card.held_out.by if card.held_out else "", card.alike, self.clips, self.decode_share,
            self.chat.fingerprint(), *self.chat.token_ids.values(),
        )  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]

    def row(self, file: Any, found: Found, where: str) -> dict[str, Any]:
        """One record as a row of the side file. Raises ManifestError."""
        row: dict[str, Any] = {
            "key": found.key, "span": Span(0, 0), "json": Span(0, 0), "audio": Span(0, 0), "n_samples": 0,
            "source": unit_hash("held_out:" + found.key), "reason": found.reason, "counts": [], "common": 0,
            "leads": [],
        }  # fmt: skip
        if found.reason:
            return row
        first = min(s.offset for s in found.members.values())
        last = max(s.offset + s.size for s in found.members.values())
        row["span"] = Span(first, last - first)
        try:
            content = self._content(file, found)
            row["json"] = Span(found.members["json"].offset - first, found.members["json"].size)
            by = self.card.held_out.by if self.card.held_out else ""
            for name, wanted in (("held_out.by", by), ("alike", self.card.alike)):
                if wanted and wanted not in content:
                    raise ManifestError(
                        f"{where}: {name} of card {self.card.name} asks for JSON field `{wanted}`; there are "
                        f"{sorted(content)}"
                    )
            if by:
                row["source"] = unit_hash(f"held_out:{content[by]}")
            if self.card.audio and self.clips == HEARD:
                audio = next((found.members[e] for e in AUDIO_EXTENSIONS if e in found.members), None)
                if audio is None:
                    raise Skip("no audio")
                row["audio"] = Span(audio.offset - first, audio.size)
                data = _bytes(file, audio)
                row["n_samples"] = planned_samples(data)
                if unit_hash("decode:" + found.key) < self.decode_share:
                    decode(data, row["n_samples"])
            made = [  # one audio token shows where audio stands
                self.chat.encode(turns, [1] * sum(t.clips for t in turns))
                for turns in conversations(self.card, content, where, self.clips)
            ]
            row["counts"] = [(int((~e.is_audio).sum()), int((e.labels != NO_TARGET).sum())) for e in made]
            row["common"] = int((~made[0].is_audio[: trunk(made)]).sum())
            row["leads"] = [lead(e) for e in made]
        except Skip as skip:
            row["reason"] = skip.reason
        return row

    def _content(self, file: Any, found: Found) -> dict[str, Any]:
        if "json" not in found.members:  # records `a.1` and `a.2` are one record `a` to webdataset
            raise Skip("dotted name" if any("." in extension for extension in found.members) else "no json")
        return parsed(_bytes(file, found.members["json"]))


def _bytes(file: Any, span: Span) -> bytes:
    file.seek(span.offset)
    return bytes(file.read(span.size))


def parsed(data: bytes) -> dict[str, Any]:
    """A record's JSON. Raises Skip("json unreadable")."""
    try:
        content = orjson.loads(data)
    except ValueError:  # so do NaN, which Python writes, and half a character, which no tokenizer takes
        try:
            content = json.loads(data)
            json.dumps(content, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            content = None
    if not isinstance(content, dict):
        raise Skip("json unreadable")
    return content


def write_side_file(path: Path, shard: ShardFile, rows: Sequence[dict[str, Any]], damage: Sequence[str]) -> None:
    """Write the columns of one shard, whole or not at all. Its `lead`: the ids that all conversations of its usable
    records begin with."""
    reasons = sorted({r["reason"] for r in rows if r["reason"]})
    keys = [r["key"].encode() for r in rows]
    counts = np.asarray([c for r in rows for c in r["counts"]], dtype=np.int32).reshape(-1, 2)
    leads = [ids for r in rows if not r["reason"] for ids in r["leads"]]
    shared = min((agreeing(leads[0], ids) for ids in leads), default=0)
    columns: dict[str, NDArray[Any]] = {
        "span": np.asarray([r["span"] for r in rows], dtype=np.int64).reshape(-1, 2),
        "json": np.asarray([r["json"] for r in rows], dtype=np.uint32).reshape(-1, 2),
        "audio": np.asarray([r["audio"] for r in rows], dtype=np.uint32).reshape(-1, 2),
        "n_samples": np.asarray([r["n_samples"] for r in rows], dtype=np.int32),
        "source": np.asarray([r["source"] for r in rows], dtype=np.float64),
        "reason": np.asarray([1 + reasons.index(r["reason"]) if r["reason"] else 0 for r in rows], dtype=np.uint8),
        "until": np.cumsum([len(r["counts"]) for r in rows], dtype=np.int32),
        "slots": np.ascontiguousarray(counts[:, 0]),
        "targets": np.ascontiguousarray(counts[:, 1]),
        "common": np.asarray([r["common"] for r in rows], dtype=np.int32),
        "key_until": np.cumsum([len(k) for k in keys], dtype=np.int64),
        "keys": np.frombuffer(b"".join(keys), dtype=np.uint8),
    }
    about = {"shard": asdict(shard), "reasons": reasons, "damage": list(damage)}
    save_columns(path, columns, about | {"lead": leads[0][:shared].tolist() if leads else []})


def save_columns(path: Path, columns: dict[str, NDArray[Any]], about: dict[str, Any]) -> None:
    """A side file from its columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    with part.open("wb") as file:
        file.write(save(columns, {"about": json.dumps(about)}))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


class SideFile:
    """The columns of one shard, mapped into memory. Column letters: R records, Q variants of all records."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            self.about: dict[str, Any] = json.loads(file.metadata()["about"])
            self._columns = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._columns[name]

    def key(self, row: int) -> str:
        """Key of a record."""
        until = self["key_until"]
        return self["keys"][until[row - 1] if row else 0 : until[row]].tobytes().decode()

    def variants(self, row: int) -> tuple[int, int]:
        """(first, last + 1) of a record's variants among those of all records."""
        until = self["until"]
        return int(until[row - 1]) if row else 0, int(until[row])


def side_path(folder: Path, reading: Reading, shard: ShardFile) -> Path:
    """Where a shard's side file lies: folder/corpus/shard's name-hash of its path, size and stamp.fingerprint.side.

    A shard that has changed has another side file, so that one of other bytes is never opened.
    """
    name = Path(shard.path).name.removesuffix(".tar")
    apart = hashlib.sha256(repr(shard).encode()).hexdigest()[:12]
    return folder / reading.card.name / f"{name}-{apart}.{reading.fingerprint}.side"


def index_shard(path: Path, reading: Reading, shard: ShardFile) -> None:
    """One pass over a shard. Raises ManifestError, StorageError."""
    with local_copy(shard) as local:
        records, damage = scan(local)
        with open(local, "rb") as file:
            rows = [reading.row(file, found, f"{shard.path}: {found.key}.json") for found in records]
    write_side_file(path, shard, rows, damage)


def is_whole(path: Path) -> bool:
    """Is there a side file that can be read?"""
    try:
        SideFile(path)
    except (OSError, SafetensorError):
        return False
    return True
