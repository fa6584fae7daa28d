"""A corpus' shards as one index: which records are trained on, which are held out, where each lies and what it costs.

A shard's side file holds this as columns, mapped into memory when asked for. A corpus' table adds them up; it is small,
so that a mix of any size opens at once.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from midasheng import frames
from midasheng.config import UserError
from midasheng.data.audio import Skip
from midasheng.data.chat import agreeing
from midasheng.data.manifest import Card, ManifestError, conversations, excluded_by, spoken
from midasheng.data.shard import Reading, SideFile, index_shard, is_whole, parsed, side_path
from midasheng.data.storage import Place, ShardFile, is_url, list_shards
from midasheng.sample import NOT_TOLD, Turn, unit_hash

OPEN_SIDE_FILES = 512
TABLE = 3  # version of the tables below


class ShardError(UserError):
    """A shard that is not a whole webdataset tar; the message names it."""


class IndexMissing(UserError):
    """Side files that are not there, or are not those of these shards; only the first process makes them."""


# -- a record ----------------------------------------------------------------------------------------------------------


class Variant(NamedTuple):
    """One conversation that a record can become: its turns, its text slots (without audio slots) and its targets."""

    turns: tuple[Turn, ...]
    slots: int
    targets: int


class Record(NamedTuple):
    """One audio with its variants. `n_samples` at 16 kHz; 0 for a text-only corpus."""

    key: str
    audio: Place | None
    n_samples: int
    variants: tuple[Variant, ...]
    alike: str = ""  # value of the card's field `alike`
    common: int = 0  # text slots that all variants have in common before any target; 0 where audio stands behind them
    language: str = NOT_TOLD

    @property
    def frames(self) -> int:
        """Encoder frames."""
        return frames.frames(self.n_samples) if self.audio else 0

    def slots(self, variant: int) -> int:
        """Decoder slots of a variant, audio tokens included."""
        return self.variants[variant].slots + (frames.audio_tokens(self.n_samples) if self.audio else 0)


# -- making side files -------------------------------------------------------------------------------------------------


_JOB: list[Reading] = []  # what a worker process inherits: a tokenizer is not worth sending


def _index_one(job: tuple[Path, ShardFile]) -> None:
    index_shard(job[0], _JOB[-1], job[1])


def make_side_files(folder: Path, reading: Reading, shards: Sequence[ShardFile], workers: int) -> int:
    """Index the shards that have no side file of their present bytes; returns how many. Stopped, it goes on later."""
    jobs = [(path, s) for s in shards if not is_whole(path := side_path(folder, reading, s))]
    bar = tqdm(
        total=len(jobs), desc=f"index {reading.card.name}", unit="shard", disable=None if len(jobs) > 1 else True
    )
    _JOB.append(reading)
    try:
        if workers < 2 or len(jobs) < 2:
            for job in jobs:
                _index_one(job)
                bar.update()
        else:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked below
            with ProcessPoolExecutor(min(workers, len(jobs)), multiprocessing.get_context("fork")) as pool:
                for _ in pool.map(_index_one, jobs):
                    bar.update()
    finally:
        _JOB.pop()
        bar.close()
    return len(jobs)


# -- a corpus ----------------------------------------------------------------------------------------------------------


class Columns(NamedTuple):
    """What the plan knows of the R training records of one shard; Q variants of all of them."""

    n_samples: NDArray[Any]  # (R,) at 16 kHz
    until: NDArray[Any]  # (R,) variants of records up to and including this one
    slots: NDArray[Any]  # (Q,) text slots
    targets: NDArray[Any]  # (Q,)
    common: NDArray[Any]  # (R,) text slots that a record's variants have in common before any target, as in `Record`


@dataclass(frozen=True)
class ShardRow:
    """One line of a corpus' table: a shard, its training and held-out records, and what they sum to."""

    shard: ShardFile
    records: int
    train: int
    held_out: int
    skipped: dict[str, int]
    samples: int  # audio samples of the training records
    slots: float  # what a visit of each training record costs on average, audio tokens included, and in frames
    frames: int
    most_slots: int  # what a visit of the dearest one costs
    most_frames: int
    shared_slots: float  # the same where packs share: what a record's variants have in common costs once,
    shared_frames: int
    begins: int  # and each of so many beginnings costs the mix' lead less
    most_shared_slots: int  # before any lead is taken off
    most_shared_frames: int
    lead: list[int]  # ids that all variants of all usable records begin with
    common: str  # hash of the column
    digest: str
    damage: list[str]

    def most(self, lead: int | None) -> tuple[int, int]:
        """(slots, frames) that no visit exceeds; `lead`: slots of it where packs share, None where they do not."""
        if lead is None:
            return self.most_slots, self.most_frames
        return max(0, self.most_shared_slots - lead), self.most_shared_frames


@dataclass(frozen=True)
class Shared:
    """What a corpus is where packs share: ids that all its samples begin with; mean costs of a visit with what its
    variants have in common counted once; `begins`: how often, on average, such a visit begins with the lead."""

    lead: tuple[int, ...]
    mean_slots: float
    mean_frames: float
    begins: float
    fingerprint: str  # of what the variants have in common


@dataclass(frozen=True)
class Summary:
    """What the table adds up to."""

    hours: float
    mean_slots: float
    mean_frames: float
    fingerprint: str
    reasons: dict[str, int]
    damage: tuple[str, ...]
    shared: Shared


@dataclass(frozen=True)
class Rule:
    """Which records of a side file are trained on and which are held out."""

    cut: float  # records whose source hashes below it are held out
    max_samples: int
    excluded: frozenset[str] = frozenset()  # keys and sources that are in neither

    def usable(self, side: SideFile) -> tuple[NDArray[Any], NDArray[Any]]:
        """(can be used, is held out) of every record."""
        usable = (side["reason"] == 0) & (side["n_samples"] <= self.max_samples) & ~self._excluded(side)
        return usable, side["source"] < self.cut

    def reasons(self, side: SideFile) -> list[str]:
        """Why each record is left out; empty where it is not."""
        names = ["", *side.about["reasons"]]
        found = [names[code] for code in side["reason"].tolist()]
        for reason, where in (("excluded", self._excluded(side)), ("too long", side["n_samples"] > self.max_samples)):
            for row in np.flatnonzero((side["reason"] == 0) & where).tolist():
                found[row] = reason
        return found

    def _excluded(self, side: SideFile) -> NDArray[np.bool_]:
        hashes = [unit_hash("held_out:" + line) for line in self.excluded]
        found: NDArray[np.bool_] = np.isin(side["source"], hashes)
        if self.excluded:
            found |= [side.key(row) in self.excluded for row in range(len(found))]
        return found


class CorpusIndex:
    """The records of a corpus: those to train on, by number, and, kept apart, `held_out`.

    Opening reads the table alone; side files are mapped when a record of their shard is asked for.
    """

    def __init__(self, reading: Reading, folder: Path, rows: Sequence[ShardRow], rule: Rule) -> None:
        self.reading, self.card, self.folder, self.rows, self.rule = reading, reading.card, folder, tuple(rows), rule
        self.counts = np.asarray([r.train for r in rows], dtype=np.int64)  # training records of each shard
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        self._ends: list[int] = self.starts[1:].tolist()
        self.side = lru_cache(maxsize=OPEN_SIDE_FILES)(self._open_side)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("an index is inherited by forked workers, never sent")

    @cached_property
    def summary(self) -> Summary:
        """Totals of the table."""
        n = max(1, len(self))
        rule = [self.rule.cut, self.rule.max_samples, *sorted(self.rule.excluded)]
        digest = hashlib.sha256(repr([(r.digest, r.train) for r in self.rows] + rule).encode())
        reasons: Counter[str] = Counter()
        for row in self.rows:
            reasons.update(row.skipped)
        filled = [r for r in self.rows if r.train]
        lead = min((r.lead[: agreeing(filled[0].lead, r.lead)] for r in filled), key=len, default=[])
        shared = Shared(
            tuple(lead), sum(r.shared_slots for r in self.rows) / n, sum(r.shared_frames for r in self.rows) / n,
            sum(r.begins for r in self.rows) / n,
            hashlib.sha256(repr([r.common for r in self.rows]).encode()).hexdigest()[:16],
        )  # fmt: skip
        return Summary(
            sum(r.samples for r in self.rows) / frames.SAMPLE_RATE / 3600,
            sum(r.slots for r in self.rows) / n, sum(r.frames for r in self.rows) / n,
            digest.hexdigest()[:16], dict(reasons),
            tuple(f"{r.shard.path}: {d}" for r in self.rows for d in r.damage), shared,
        )  # fmt: skip

    # -- side files

    def _open_side(self, shard: int) -> tuple[SideFile, NDArray[Any], NDArray[Any]]:
        """(columns, rows that are trained on, rows held out)."""
        side = SideFile(side_path(self.folder, self.reading, self.rows[shard].shard))
        usable, apart = self.rule.usable(side)
        return side, np.flatnonzero(usable & ~apart), np.flatnonzero(usable & apart)

    def columns(self, shard: int) -> Columns:
        """What the plan needs of one shard's training records."""
        side, train, _ = self.side(shard)
        until = side["until"]
        first = np.concatenate([[0], until[:-1]]).astype(np.int64)[train]
        many = until[train] - first
        inside = np.repeat(first - np.concatenate([[0], np.cumsum(many)[:-1]]), many) + np.arange(many.sum())
        return Columns(
            side["n_samples"][train], np.cumsum(many), side["slots"][inside], side["targets"][inside],
            side["common"][train],
        )  # fmt: skip

    def _where(self, number: int) -> tuple[int, int]:
        shard = bisect.bisect_right(self._ends, number)
        return shard, int(self.side(shard)[1][number - self.starts[shard]])

    def place(self, number: int) -> Place:
        """Where a training record lies: one range holds its audio and its JSON."""
        shard, row = self._where(number)
        return Place(self.rows[shard].shard.path, *self.side(shard)[0]["span"][row].tolist())

    def key(self, number: int) -> str:
        """Key of a training record."""
        shard, row = self._where(number)
        return self.side(shard)[0].key(row)

    def read(self, number: int, data: bytes | None = None) -> tuple[Record, bytes]:
        """A training record and the bytes of its audio (empty where none is heard), from the bytes of its place.

        Raises Skip("json unreadable"), StorageError, Unreachable.
        """
        return self._record(*self._where(number), self.place(number).read() if data is None else data)

    def place_of_text(self, number: int) -> Place:
        """Where the JSON of a training record lies."""
        shard, row = self._where(number)
        side = self.side(shard)[0]
        (start, _), (text, size) = side["span"][row].tolist(), side["json"][row].tolist()
        return Place(self.rows[shard].shard.path, start + text, size)

    def turns(self, number: int, text: bytes) -> list[tuple[Turn, ...]]:
        """The conversations of a training record, from its JSON alone. Raises Skip."""
        return self._told(*self._where(number), text)[1]

    def _told(self, shard: int, row: int, text: bytes) -> tuple[dict[str, Any], list[tuple[Turn, ...]]]:
        """A record's JSON, and the conversations that it becomes."""
        side, content = self.side(shard)[0], parsed(text)
        where, (first, until) = f"{self.rows[shard].shard.path}: {side.key(row)}.json", side.variants(row)
        turns = conversations(self.card, content, where, self.reading.clips)
        if len(turns) != until - first:
            raise Skip("differs from index")
        return content, turns

    def _record(self, shard: int, row: int, data: bytes) -> tuple[Record, bytes]:
        side, path = self.side(shard)[0], self.rows[shard].shard.path
        (text, text_size), (audio, audio_size) = side["json"][row].tolist(), side["audio"][row].tolist()
        content, turns = self._told(shard, row, data[text : text + text_size])
        key, (first, until) = side.key(row), side.variants(row)
        slots, targets = (side[name][first:until].tolist() for name in ("slots", "targets"))
        start = int(side["span"][row, 0])
        record = Record(
            key, Place(path, start + audio, audio_size) if audio_size else None, int(side["n_samples"][row]),
            tuple(map(Variant, turns, slots, targets)), str(content.get(self.card.alike, "")),
            int(side["common"][row]), spoken(self.card, content),
        )  # fmt: skip
        return record, data[audio : audio + audio_size]

    def find(self, key: str) -> list[int]:
        """Numbers of the training records with this key."""
        found = []
        for shard in range(len(self.rows)):
            side, train, _ = self.side(shard)
            if key.encode() in side["keys"].tobytes():
                found += [int(self.starts[shard]) + i for i, row in enumerate(train.tolist()) if side.key(row) == key]
        return found

    def numbers_at(self, places: Mapping[str, set[int]]) -> NDArray[np.int64]:
        """Numbers of the training records that lie at these places (shard -> offsets)."""
        found = [np.zeros(0, dtype=np.int64)]
        for shard, row in enumerate(self.rows):
            if offsets := places.get(row.shard.path):
                side, train, _ = self.side(shard)
                found.append(self.starts[shard] + np.flatnonzero(np.isin(side["span"][train, 0], list(offsets))))
        return np.concatenate(found)

    def over(self, slots: int, n_frames: int, lead: int | None = None) -> Iterator[tuple[str, int, int]]:
        """(key, slots, frames) of every training record that may cost more than this, where packs share besides a
        `lead` of so many slots (None: nothing); opens only the side files of shards that may hold one."""
        for shard, line in enumerate(self.rows):
            most_slots, most_frames = line.most(lead)
            if most_slots > slots or most_frames > n_frames:
                side, train, _ = self.side(shard)
                most = _most(side, self.card.answers == "all", lead)
                for row in train[(most[0][train] > slots) | (most[1][train] > n_frames)].tolist():
                    yield side.key(row), int(most[0][row]), int(most[1][row])

    # -- apart

    @cached_property
    def held_out(self) -> tuple[Record, ...]:
        """The records that are never trained on, in the order of the shards."""
        found = []
        for shard, line in enumerate(self.rows):
            if line.held_out:
                side, _, apart = self.side(shard)
                for row in apart.tolist():
                    place = Place(line.shard.path, *map(int, side["span"][row]))
                    found.append(self._record(shard, row, place.read())[0])
        return tuple(found)

    def held_out_places(self) -> set[tuple[str, int]]:
        """(shard, offset) of every held-out record."""
        return {
            (line.shard.path, int(side["span"][row][0]))
            for shard, line in enumerate(self.rows) if line.held_out
            for side, _, apart in [self.side(shard)] for row in apart.tolist()
        }  # fmt: skip

    def skipped(self) -> Iterator[tuple[str, str]]:
        """(key, reason) of every record that the index left out."""
        for shard, line in enumerate(self.rows):
            if line.skipped:
                side = self.side(shard)[0]
                for row, reason in enumerate(self.rule.reasons(side)):
                    if reason:
                        yield side.key(row), reason


def _cut(card: Card, sides: Iterator[SideFile]) -> float:
    """Records whose source hashes below this are held out: whole groups of equal source, lowest hash first, up to the
    card's share and maximum. Unusable records count too: cards of the same shards must keep the same ones apart."""
    if card.held_out is None:
        return 0.0
    low = [s[s < card.held_out.share] for s in (side["source"] for side in sides)]
    hashes, counts = np.unique(np.concatenate([*low, np.zeros(0)]), return_counts=True)
    over = np.flatnonzero(np.cumsum(counts) > card.held_out.max)
    return float(hashes[over[0]]) if len(over) else card.held_out.share


def beginnings(many: NDArray[Any], common: NDArray[Any]) -> NDArray[Any]:
    """How often a visit of all `many` variants of a record begins anew where packs share: once where they have slots
    in `common` that hold its clip, else each of them does."""
    return np.where(common > 0, np.minimum(many, 1), many)


def _most(side: SideFile, together: bool, lead: int | None) -> tuple[NDArray[Any], NDArray[Any]]:
    """(slots, frames) that a visit of each record costs at most: its longest variant, or all of them `together`; where
    packs share, besides a `lead` of so many slots (None: nothing)."""
    until, heard = side["until"].astype(np.int64), side["audio"][:, 1] > 0
    many = np.diff(until, prepend=0)
    text, told = np.zeros(len(until), dtype=np.int64), many > 0
    if told.any():
        text[told] = (np.add if together else np.maximum).reduceat(side["slots"], (until - many)[told])
    visit = many if together else np.minimum(many, 1)
    if lead is not None:
        begins = beginnings(visit, side["common"])
        text = text - (visit - begins) * side["common"] - begins * lead
        visit = begins
    visit = visit * heard
    return text + visit * frames.audio_tokens(side["n_samples"]), visit * frames.frames(side["n_samples"])


def _table_row(side: SideFile, shard: ShardFile, rule: Rule, together: bool) -> ShardRow:
    usable, apart = rule.usable(side)
    train = np.flatnonzero(usable & ~apart)
    n_samples, until = side["n_samples"], side["until"].astype(np.int64)
    many = np.diff(until, prepend=0)
    until_slots = np.concatenate([[0], np.cumsum(side["slots"], dtype=np.int64)])
    text = (until_slots[until] - until_slots[until - many]) / np.maximum(many, 1)
    heard = side["audio"][:, 1] > 0
    tokens, n_frames = heard * frames.audio_tokens(n_samples), heard * frames.frames(n_samples)
    visit = many if together else 1
    begins = beginnings(many, side["common"]) if together else np.minimum(many, 1)
    once = (visit - begins) * (side["common"] + tokens)  # what is computed more than once where packs do not share
    most_slots, most_frames = (int(most[train].max(initial=0)) for most in _most(side, together, None))
    most_shared_slots, most_shared_frames = (int(most[train].max(initial=0)) for most in _most(side, together, 0))
    digest = hashlib.sha256()
    for name in ("n_samples", "source", "reason", "until", "slots", "targets", "keys"):
        digest.update(side[name].tobytes())
    skipped = Counter(r for r in rule.reasons(side) if r)
    return ShardRow(
        shard, records=len(n_samples), train=len(train), held_out=int((usable & apart).sum()), skipped=dict(skipped),
        samples=int(n_samples[train].sum()), slots=float(((text + tokens) * visit)[train].sum()),
        frames=int((n_frames * visit)[train].sum()), most_slots=most_slots, most_frames=most_frames,
        shared_slots=float(((text + tokens) * visit - once)[train].sum()),
        shared_frames=int((n_frames * begins)[train].sum()), begins=int(begins[train].sum()),
        most_shared_slots=most_shared_slots, most_shared_frames=most_shared_frames, lead=side.about["lead"],
        common=hashlib.sha256(side["common"].tobytes()).hexdigest()[:16],
        digest=digest.hexdigest()[:16], damage=side.about["damage"],
    )  # fmt: skip


def open_corpus(
    reading: Reading, root: str, folder: Path, max_audio_s: float, *, make: bool, workers: int = 1
) -> CorpusIndex:
    """The index of one corpus below `root`, with its side files in `folder`. `make`: index what is not yet indexed.

    Raises ManifestError, StorageError, and IndexMissing where `make` is False and side files are missing or stale.
    """
    card = reading.card
    shards = list_shards(root, card.shards)
    if not shards:
        raise ManifestError(
            f"corpus {card.name}: no shard matches {root}/{card.shards}; write it (`make prepare NAME={card.name}`, at "
            f"mini `make data`), set data.root, or leave it out with data.without=[{card.name}]"
        )
    max_samples = round(max_audio_s * frames.SAMPLE_RATE)
    excluded = excluded_by(card)
    held_out = asdict(card.held_out) if card.held_out else None
    parts = (TABLE, reading.fingerprint, held_out, max_samples, card.answers, sorted(excluded), shards)
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
    path = folder / card.name / f"table.{key}.json"
    sides = [side_path(folder, reading, s) for s in shards]
    missing = [s for s, side in zip(shards, sides, strict=True) if not side.is_file()]
    if missing and not make:
        raise IndexMissing(
            f"corpus {card.name}: {len(missing)} of {len(shards)} shards have no index of their present bytes, "
            f"{missing[0].path} first; run `make index`"
        )
    if missing or not path.is_file():
        make_side_files(folder, reading, shards, workers)
        rule = Rule(_cut(card, (SideFile(s) for s in sides)), max_samples, excluded)
        together = card.answers == "all"
        rows = [_table_row(SideFile(s), shard, rule, together) for s, shard in zip(sides, shards, strict=True)]
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({"cut": rule.cut, "rows": [asdict(r) for r in rows]}), encoding="utf-8")
        os.replace(part, path)
    table = json.loads(path.read_text(encoding="utf-8"))
    rows = [ShardRow(ShardFile(**r.pop("shard")), **r) for r in table["rows"]]
    return CorpusIndex(reading, folder, rows, Rule(table["cut"], max_samples, excluded))


def index_folder(configured: str, root: str) -> Path:
    """Where side files lie: data.index, or `.index` below a local root. Raises UserError."""
    if not configured and is_url(root):
        raise UserError(f"data.index: name a local folder for the index of {root}")
    return Path(configured or f"{root}/.index")
