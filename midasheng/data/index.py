"""One pass over a corpus' shards: where each record lies, how long its audio is, how many tokens each variant has."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from webdataset.tariterators import base_plus_ext

from midasheng import frames
from midasheng.config import HEARD, TOLD, UserError
from midasheng.data.audio import Skip, planned_samples
from midasheng.data.chat import Chat
from midasheng.data.manifest import Card, ManifestError
from midasheng.sample import NO_TARGET, Turn, unit_hash

AUDIO_EXTENSIONS = ("flac", "wav", "mp3", "ogg", "opus")


class ShardError(UserError):
    """A shard that is not a whole webdataset tar; the message names it."""


class Place(NamedTuple):
    """Where a member's bytes lie."""

    shard: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The member's bytes."""
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class Shard:
    """Key -> extension -> place, in the order of the file."""

    path: str
    records: dict[str, dict[str, Place]]


@cache
def scan(path: str, _changed: tuple[int, int]) -> Shard:
    """Read a tar's headers. Raises ShardError for what would otherwise make the rest of a shard vanish silently:
    truncation, a corrupt header in the middle, a record whose members do not lie together."""
    records: dict[str, dict[str, Place]] = {}
    previous, size = None, Path(path).stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                if not member.isfile():
                    raise ShardError(f"{path}: {member.name} is a link or no plain file; write the shard without links")
                key, extension = base_plus_ext(member.name)  # webdataset's rule: the key ends at the first dot
                if not key or not extension:
                    continue
                if key in records and key != previous:
                    raise ShardError(f"{path}: the members of record {key} do not lie together")
                if extension.lower() in records.setdefault(key, {}):
                    raise ShardError(f"{path}: holds {member.name} twice")
                records[key][extension.lower()] = Place(path, member.offset_data, member.size)
                previous = key
            end = tar.offset
    except tarfile.TarError as error:
        raise ShardError(f"{path}: not a readable tar ({error}); copy or write it again") from None
    with open(path, "rb") as file:
        file.seek(min(end, size))
        only_zeros = not any(part.strip(b"\0") for part in iter(lambda: file.read(2**20), b""))
    if size - end < tarfile.BLOCKSIZE or not only_zeros:
        raise ShardError(f"{path}: damaged or cut off at byte {end} of {size}; what follows could not be read")
    return Shard(path, records)


@dataclass(frozen=True)
class Variant:
    """One conversation that a record can become: its turns, its text slots (without audio slots) and its targets."""

    turns: tuple[Turn, ...]
    slots: int
    targets: int


@dataclass(frozen=True)
class Record:
    """One audio with its variants. `n_samples` at 16 kHz; 0 for a text-only corpus."""

    key: str
    audio: Place | None
    n_samples: int
    variants: tuple[Variant, ...]
    alike: str = ""  # value of the card's field `alike`

    @property
    def frames(self) -> int:
        """Encoder frames."""
        return frames.frames(self.n_samples) if self.audio else 0

    def slots(self, variant: int) -> int:
        """Decoder slots of a variant, audio tokens included."""
        return self.variants[variant].slots + (frames.audio_tokens(self.n_samples) if self.audio else 0)


@dataclass(frozen=True)
class CorpusIndex:
    """The records of a corpus: `train` and, kept apart, `held_out`; and what was left out, with reasons."""

    card: Card
    train: tuple[Record, ...]
    held_out: tuple[Record, ...]
    shard_of: np.ndarray  # shard number of each training record
    skipped: tuple[tuple[str, str], ...]  # (key, reason)

    def reasons(self) -> dict[str, int]:
        """Reason -> number of records left out."""
        return dict(Counter(reason for _, reason in self.skipped))

    def fingerprint(self) -> str:
        """Hash of everything the order of training depends on."""
        digest = hashlib.sha256()
        for record in self.train:
            counts = [(v.slots, v.targets) for v in record.variants]
            digest.update(repr((record.key, record.n_samples, counts)).encode())
        digest.update(np.ascontiguousarray(self.shard_of, dtype=np.int64).tobytes())
        return digest.hexdigest()[:16]


def conversations(card: Card, content: dict[str, Any], where: str, clips: str = HEARD) -> list[tuple[Turn, ...]]:
    """Every conversation that a record's JSON can become under its card; `clips` as data.clips. Raises ManifestError,
    Skip("no text")."""

    def wanted(field: str) -> Any:
        if field not in content:
            raise ManifestError(f"{where}: card {card.name} asks for JSON field `{field}`; there are {sorted(content)}")
        return content[field]

    def filled(template: str) -> str:
        try:
            return template.format_map(content)
        except KeyError as error:
            raise ManifestError(f"{where}: a prompt of {card.name} asks for JSON field {error}") from None
        except ValueError as error:
            raise ManifestError(f"{where}: a prompt of {card.name}: {error}; a brace itself is written twice") from None

    if card.pairs:
        try:
            asked = [(str(p["question"]), str(p["answer"])) for p in wanted(card.pairs)]
        except (KeyError, TypeError):
            raise ManifestError(f"{where}: `{card.pairs}` is no list of {{question, answer}}") from None
    else:
        answers = wanted(card.answer)
        answers = answers if isinstance(answers, list) else [answers]
        asked = [(filled(p), str(a)) for p in card.prompts for a in answers if a]
    if not asked:
        raise Skip("no text")
    heard = int(card.audio and clips == HEARD)
    made: list[tuple[Turn, ...]] = [
        (Turn("user", question, clips=heard), Turn("assistant", answer)) for question, answer in asked
    ]
    if clips == TOLD and card.context:  # twice, so that the plan draws two of three with the words
        words = filled(card.context)
        made += 2 * [(Turn("user", question, told=words), Turn("assistant", answer)) for question, answer in asked]
    return made


def _held_out_sources(card: Card, sources: list[str]) -> set[str]:
    """Whole groups of equal source, lowest hash first, up to the card's share and maximum."""
    if card.held_out is None:
        return set()
    chosen: set[str] = set()
    number = 0
    for source, count in sorted(Counter(sources).items(), key=lambda item: unit_hash("held_out:" + item[0])):
        if unit_hash("held_out:" + source) >= card.held_out.share or number + count > card.held_out.max:
            break
        chosen.add(source)
        number += count
    return chosen


def index_corpus(
    card: Card, root: Path, chat: Chat, max_audio_s: float, clips: str = HEARD, *, trains: bool = True
) -> CorpusIndex:
    """Index one corpus, with its `clips` heard, left out or told. Records that cannot be used are listed in `skipped`.

    Raises ManifestError and ShardError. `trains`: it is an error when no record is left to train on.
    """
    found: list[tuple[int, str, Record]] = []
    skipped: list[tuple[str, str]] = []
    sources: list[str] = []  # of every record, usable or not: cards of the same shards must keep the same ones apart
    for number, path in enumerate(card.shard_paths(root)):
        changed = path.stat()
        shard = scan(str(path), (changed.st_mtime_ns, changed.st_size))
        for key, members in shard.records.items():
            try:
                where, content = _content(key, members)
                sources.append(_source(card, key, where, content))
                record = _record(card, key, members, where, content, chat, max_audio_s, clips)
                found.append((number, sources[-1], record))
            except Skip as skip:
                skipped.append((key, skip.reason))
    apart = _held_out_sources(card, sources)
    train = [(number, record) for number, source, record in found if source not in apart]
    if trains and not train:
        why = dict(Counter(reason for _, reason in skipped))
        raise ManifestError(f"corpus {card.name}: no record can be trained on (left out: {why})")
    return CorpusIndex(
        card,
        train=tuple(record for _, record in train),
        held_out=tuple(record for _, source, record in found if source in apart),
        shard_of=np.asarray([number for number, _ in train]),
        skipped=tuple(skipped),
    )


def _content(key: str, members: dict[str, Place]) -> tuple[str, dict[str, Any]]:
    """(name for messages, a record's JSON)."""
    if "json" not in members:  # records `a.1` and `a.2` are one record `a` to webdataset
        raise Skip("dotted name" if any("." in extension for extension in members) else "no json")
    try:
        content = json.loads(members["json"].read())
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise Skip("json unreadable")
    return f"{members['json'].shard}: {key}.json", content


def _source(card: Card, key: str, where: str, content: dict[str, Any]) -> str:
    """What the held-out rule groups by."""
    if not card.held_out:
        return key
    if card.held_out.by not in content:
        raise ManifestError(f"{where}: held_out.by of {card.name} asks for JSON field `{card.held_out.by}`")
    return str(content[card.held_out.by])


def _record(
    card: Card, key: str, members: dict[str, Place], where: str, content: dict[str, Any], chat: Chat,
    max_audio_s: float, clips: str,
) -> Record:  # fmt: skip
    audio, n_samples = None, 0
    if card.audio and clips == HEARD:
        audio = next((members[e] for e in AUDIO_EXTENSIONS if e in members), None)
        if audio is None:
            raise Skip("no audio")
        n_samples = planned_samples(audio.read())
        if frames.seconds(n_samples) > max_audio_s:
            raise Skip("too long")
    variants = []
    for turns in conversations(card, content, where, clips):
        encoded = chat.encode(turns, [0] * sum(t.clips for t in turns))
        variants.append(Variant(turns, len(encoded.ids), int((encoded.labels != NO_TARGET).sum())))
    if card.alike and card.alike not in content:
        raise ManifestError(
            f"{where}: card {card.name} asks for JSON field `{card.alike}`; there are {sorted(content)}"
        )
    return Record(key, audio, n_samples, tuple(variants), str(content[card.alike]) if card.alike else "")
