"""What was really trained on, what was skipped and why; stops the run when a corpus is rotten."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import struct
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from midasheng.config import UserError
from midasheng.data.storage import ServerLost

IN_A_ROW = 100  # bad records of one corpus, one after the other
LOST = 8  # records of one corpus that could not be reached, one after the other: it is not they, but their server
SHARE, AT_LEAST = 0.01, 20  # bad share of a corpus' records, once so many are bad
# data errors
BAD = {
    "undecodable", "length unknown", "length differs", "not finite", "no json", "dotted name", "json unreadable",
    "no audio", "a link", "members apart", "member twice", "shard gone", "unreachable", "differs from index",
}  # fmt: skip
FRAME = struct.Struct("<4sIQQI")  # magic, CRC32 of what follows, first step, last step, bytes of the payload
MAGIC = b"MDL1"


@dataclass(frozen=True)
class Skipped:
    """One record that was not trained on. `place`: (epoch, position) where the plan passed it over."""

    corpus: str
    key: str
    reason: str
    place: tuple[int, int] | None = None


class RottenCorpus(UserError):
    """Too many bad records in one corpus."""


# -- the file ----------------------------------------------------------------------------------------------------------


class Steps(NamedTuple):
    """What one rank trained on in several steps: S steps, N samples."""

    step: NDArray[np.int64]  # (S,)
    samples: NDArray[np.int64]  # (S,) samples of each
    checksum: NDArray[np.int64]  # (S,) CRC32 of the keys that were read
    rows: NDArray[np.int64]  # (N, 4): corpus, epoch, position, trained (0: a hole)


def _thin(numbers: NDArray[np.int64]) -> bytes:
    """Little-endian bytes, lowest ones of all numbers first: small numbers then compress to about a byte."""
    return numbers.astype("<i8").view(np.uint8).reshape(-1, 8).T.tobytes()


def _thick(data: bytes) -> NDArray[np.int64]:
    turned = np.frombuffer(data, dtype=np.uint8).reshape(8, -1).T
    return np.ascontiguousarray(turned).view("<i8").reshape(-1).astype(np.int64)


def _steps_within(corpus: NDArray[np.int64], numbers: NDArray[np.int64], *, back: bool) -> NDArray[np.int64]:
    """Differences to the number before of the same corpus; `back`: from differences to the numbers again."""
    found = numbers.copy()
    for c in np.unique(corpus):
        mine = corpus == c
        found[mine] = np.cumsum(numbers[mine]) if back else np.diff(numbers[mine], prepend=0)
    return found


def encode(steps: Steps) -> bytes:
    """One frame of the ledger, about a byte a sample: places are differences to the corpus' place before."""
    corpus, epoch, position, trained = steps.rows.T
    parts = [_thin(n) for n in (steps.step, steps.samples, steps.checksum, corpus, trained)]
    parts += [_thin(_steps_within(corpus, n, back=False)) for n in (epoch, position)]
    payload = zlib.compress(struct.pack("<II", len(steps.step), len(corpus)) + b"".join(parts), 9)
    head = (int(steps.step[0]), int(steps.step[-1]), len(payload))
    return FRAME.pack(MAGIC, _crc(*head, payload), *head) + payload


def _crc(first: int, last: int, size: int, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(struct.pack("<QQI", first, last, size)))


def _decoded(payload: bytes) -> Steps:
    data = zlib.decompress(payload)
    n_steps, n = struct.unpack_from("<II", data)
    ends = np.cumsum([8, *[8 * n_steps] * 3, *[8 * n] * 4])
    parts = [_thick(data[a:b]) for a, b in itertools.pairwise(ends)]
    step, samples, checksum, corpus, trained = parts[:5]
    epoch, position = (_steps_within(corpus, d, back=True) for d in parts[5:])
    return Steps(step, samples, checksum, np.stack([corpus, epoch, position, trained], axis=1))


def frames_of(path: Path) -> Iterator[tuple[int, int, int, bytes]]:
    """(byte where it ends, first step, last step, payload) of each whole frame; a torn last one is left out."""
    with path.open("rb") as file:
        while len(head := file.read(FRAME.size)) == FRAME.size:
            magic, crc, first, last, size = FRAME.unpack(head)
            payload = file.read(size)
            if magic != MAGIC or len(payload) < size or _crc(first, last, size, payload) != crc:
                return
            yield file.tell(), first, last, payload


def read_ledger(folder: Path) -> Iterator[Steps]:
    """Everything that all ranks of a run trained on."""
    for path in sorted(folder.glob("ledger/rank*.bin")):
        for *_, payload in frames_of(path):
            yield _decoded(payload)


def _cut_after(path: Path, from_step: int) -> None:
    """Drop the steps from `from_step` on: they are about to be trained again."""
    end, kept = 0, None
    for until, first, last, payload in frames_of(path):
        if last >= from_step:
            if first < from_step:
                kept = _before(_decoded(payload), from_step)
            break
        end = until
    with path.open("r+b") as file:
        file.truncate(end)
        if kept is not None:
            file.seek(end)
            file.write(encode(kept))


def _before(steps: Steps, from_step: int) -> Steps:
    few = int((steps.step < from_step).sum())
    rows = steps.rows[: int(steps.samples[:few].sum())]
    return Steps(steps.step[:few], steps.samples[:few], steps.checksum[:few], rows)


def trim(folder: Path, from_step: int) -> None:
    """Before a resume at `from_step`: drop later steps of every rank, also of ranks that the new world lacks."""
    for path in folder.glob("ledger/rank*.bin"):
        _cut_after(path, from_step)
    for path in (*folder.glob("ledger/*.jsonl"), folder / "skipped.jsonl"):
        drop_after(path, from_step)


# -- writing it --------------------------------------------------------------------------------------------------------


class Ledger:
    """Writes `ledger/rank*.bin` (what each step trained on) and `skipped.jsonl` into a run folder, and applies the stop
    rules. A rank sees its own packs; what the index left out is given to rank 0.

    Steps are written at `flush`, which belongs before every checkpoint: a run goes on from a checkpoint, and what came
    after it is trimmed first.
    """

    def __init__(self, folder: Path, rank: int, corpora: Sequence[str]) -> None:
        (folder / "ledger").mkdir(parents=True, exist_ok=True)
        self.corpora = tuple(corpora)
        self.path = folder / "ledger" / f"rank{rank}.bin"
        self.skipped = folder / ("skipped.jsonl" if rank == 0 else f"ledger/skipped-rank{rank}.jsonl")
        self.waiting: list[tuple[int, int, NDArray[np.int64]]] = []
        self.seen: Counter[str] = Counter()
        self.bad: Counter[str] = Counter()
        self.row: defaultdict[str, int] = defaultdict(int)
        self.away: Counter[str] = Counter()  # unreachable records of a corpus since one was read
        self.reasons: Counter[tuple[str, str]] = Counter()
        if self.path.is_file():  # a resume; already trimmed
            for *_, payload in frames_of(self.path):
                self._see(_decoded(payload).rows)
        for line in _lines(self.skipped):
            if line["step"] >= 0:
                self._count(Skipped(line["corpus"], line["key"], line["reason"]))

    def indexed(self, corpus: str, records: int, reasons: dict[str, int], skipped: Iterable[Skipped]) -> None:
        """What the index left out before step 0: its counts, and (on a fresh run) the records. Raises RottenCorpus."""
        self.seen[corpus] += records
        self._write(-1, list(skipped))
        for reason, count in reasons.items():
            self._count(Skipped(corpus, "", reason), count)
        self.row[corpus] = 0  # the good ones between are not listed
        if any(reason in BAD for reason in reasons):
            self._stop_rules(Skipped(corpus, "the index", ", ".join(r for r in reasons if r in BAD)))

    def reachable(self, trained: NDArray[np.int64], skipped: Sequence[Skipped]) -> None:
        """Before a step is taken: raises ServerLost when its holes are no bad records, but a server that is gone. Each
        of them was tried for two minutes; to train on without it would spend the corpus unseen."""
        holes = iter([s for s in skipped if s.place is None])  # as their rows stand in `trained`
        for number, *_, good in trained.tolist():
            corpus = self.corpora[number]
            hole = None if good else next(holes)
            self.away[corpus] = self.away[corpus] + 1 if hole and hole.reason == "unreachable" else 0
            if hole and self.away[corpus] >= LOST:
                raise ServerLost(
                    f"corpus {corpus}: {self.away[corpus]} records in a row could not be read, last {hole.key}: "
                    "the server or mount of its shards is gone. When it is back, the same command goes on from the "
                    "last checkpoint"
                )

    def step(self, number: int, trained: NDArray[np.int64], checksum: int, skipped: Iterable[Skipped]) -> None:
        """One step of this rank: rows as in StepBatch, and the holes. Raises RottenCorpus."""
        self.waiting.append((number, checksum, trained))
        self._see(trained)
        holes = list(skipped)
        self._write(number, holes)
        for s in holes:
            self._count(s)
        for corpus in np.unique(trained[trained[:, 3] > 0, 0]).tolist():
            self.row[self.corpora[corpus]] = 0
        for last in {s.corpus: s for s in holes if s.reason in BAD}.values():
            self._stop_rules(last)

    def flush(self, plan: dict[str, Any]) -> None:
        """Write the steps since the last flush, to the disk itself, and (rank 0) the planner's state behind them."""
        if not self.waiting:
            return
        numbers, checksums, rows = zip(*self.waiting, strict=True)
        steps = Steps(
            np.asarray(numbers), np.asarray([len(r) for r in rows]), np.asarray(checksums), np.concatenate(rows)
        )
        append(self.path, encode(steps), sync=True)
        if self.path.stem == "rank0":
            state = json.dumps({"step": plan["step"] - 1, "plan": plan}) + "\n"
            append(self.path.parent / "states.jsonl", state.encode(), sync=True)
        self.waiting = []

    def _see(self, rows: NDArray[np.int64]) -> None:
        for corpus, count in enumerate(np.bincount(rows[rows[:, 3] > 0, 0]).tolist()):
            if count:
                self.seen[self.corpora[corpus]] += count

    def _write(self, number: int, skipped: list[Skipped]) -> None:
        if skipped:
            lines = [
                {"step": number, "corpus": s.corpus, "key": s.key, "reason": s.reason}
                | ({"place": s.place} if s.place else {})
                for s in skipped
            ]
            append(self.skipped, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())

    def _count(self, skipped: Skipped, times: int = 1) -> None:
        self.reasons[skipped.corpus, skipped.reason] += times
        self.seen[skipped.corpus] += times
        if skipped.reason in BAD:
            self.bad[skipped.corpus] += times
            self.row[skipped.corpus] += times

    def _stop_rules(self, last: Skipped) -> None:
        corpus = last.corpus
        why = ""
        if self.row[corpus] >= IN_A_ROW:
            why = f"{self.row[corpus]} bad records in a row"
        elif self.bad[corpus] >= AT_LEAST and self.bad[corpus] > SHARE * self.seen[corpus]:
            why = f"{self.bad[corpus]} bad records out of {self.seen[corpus]}"
        if why:
            raise RottenCorpus(
                f"corpus {corpus}: {why}, the last one {last.key} ({last.reason}). See {self.skipped}; mend the shards "
                "or take the corpus out of the mix"
            )

    def summary(self) -> str:
        """One line: skips by corpus and reason."""
        parts = [f"{corpus}: {reason} {count}" for (corpus, reason), count in sorted(self.reasons.items())]
        return "; ".join(parts) or "none"


def append(path: Path, data: bytes, *, sync: bool = False) -> None:
    """Add to a file all of `data`, or nothing: half a line on a full disk would be damage in mid-file later. `sync`: to
    the disk itself. Raises OSError that names the file."""
    with path.open("ab", buffering=0) as file:
        end, written = file.tell(), 0
        try:
            while written < len(data):
                written += file.write(data[written:])
            if sync:
                os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise OSError(error.errno, error.strerror, str(path)) from None


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", errors="replace") as file:  # half a line may end in half a character
        return [json.loads(line) for line in file if line.endswith("\n")]


def drop_after(path: Path, from_step: int) -> None:
    """Keep the lines of a .jsonl whose "step" is below `from_step`: the others are about to be written again.

    A half-written last line is dropped.
    """
    if path.exists():
        kept = [line for line in _lines(path) if line["step"] < from_step]
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept), encoding="utf-8")
        os.replace(part, path)
