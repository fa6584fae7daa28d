"""What a run was really trained on: repeats, gaps, shares, epochs, held-out records; the samples of a step, a key.

The ledger says which place of which epoch of which corpus each step trained on, and a checksum of the keys that were
read. The plan says which record stands there. An audit brings both together and believes neither.
"""

from __future__ import annotations

import json
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midasheng import frames
from midasheng.config import UserError
from midasheng.data.index import CorpusIndex
from midasheng.data.ledger import Steps, read_ledger
from midasheng.data.plan import Planned, Planner

EXAMPLES = 5  # of each finding
CORPUS, EPOCH, POSITION, TRAINED = range(4)  # columns of Steps.rows
RECORD, FRAMES, TARGETS = (Planned._fields.index(name) for name in ("record", "frames", "targets"))


@dataclass
class CorpusAudit:
    """What one corpus gave. `asked`: percent of the samples; `epochs`: visits per training record."""

    licence: str
    asked: float
    samples: int = 0
    hours: float = 0.0
    targets: int = 0
    holes: int = 0
    epochs: float = 0.0


@dataclass
class Audit:
    """The findings; an honest run has no `faults`."""

    steps: int = 0
    corpora: dict[str, CorpusAudit] = field(default_factory=dict)
    holes: dict[str, int] = field(default_factory=dict)  # why a planned sample was not trained on -> how many
    passed_over: int = 0  # fit no pack
    waiting: int = 0  # drawn, not yet packed
    checked_keys: int = 0
    faults: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The findings as a table."""
        samples, hours, targets = (
            max(1e-9, sum(getattr(c, name) for c in self.corpora.values())) for name in ("samples", "hours", "targets")
        )
        why = f" ({', '.join(f'{n} {reason}' for reason, n in self.holes.items())})" if self.holes else ""
        lines = [
            f"{self.steps} steps, {samples:.0f} samples, {hours:.2f} h heard, {targets:.0f} targets; "
            f"{sum(c.holes for c in self.corpora.values())} holes{why}, {self.passed_over} fitted no pack, "
            f"{self.waiting} drawn and not yet packed; keys of {self.checked_keys} steps compared",
            f"{'corpus':26}{'asked':>8}{'samples':>9}{'hours':>8}{'targets':>9}{'epochs':>9}   licence",
        ]
        rows = [(name, [c], f"{c.epochs:9.3f}   {c.licence}") for name, c in self.corpora.items()]
        by_licence: defaultdict[str, list[CorpusAudit]] = defaultdict(list)
        for c in self.corpora.values():
            by_licence[c.licence].append(c)
        rows += [("of one licence:", group, f"{'':9}   {name}") for name, group in by_licence.items()]
        for name, group, rest in rows:
            shares = [
                100 * sum(getattr(c, what) for c in group) / total
                for what, total in (("samples", samples), ("hours", hours), ("targets", targets))
            ]
            asked = sum(c.asked for c in group)
            lines.append(f"{name:26}{asked:7.2f}%{shares[0]:8.2f}%{shares[1]:7.2f}%{shares[2]:8.2f}%{rest}")
        lines += [f"FAULT {fault}" for fault in self.faults] or ["no sample twice, none lost, no held-out record"]
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """The findings as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class RunLedger:
    """The ledger of a run folder beside the plan that it was made from.

    Raises UserError when the data are no longer those of the run.
    """

    def __init__(self, folder: Path, planner: Planner, corpora: Sequence[CorpusIndex]) -> None:
        self.folder, self.planner, self.corpora = folder, planner, corpora
        states = folder / "ledger" / "states.jsonl"
        lines = states.read_text(encoding="utf-8").splitlines() if states.is_file() else []
        if not lines:
            raise UserError(f"{folder}: no ledger yet; it is written with each checkpoint")
        self.state: dict[str, Any] = json.loads(lines[-1])["plan"]
        planner.restore(self.state)

    def steps(self) -> Iterator[Steps]:
        """What all ranks trained on, up to the last state."""
        return read_ledger(self.folder)

    def keys(self, rows: NDArray[np.int64]) -> list[str]:
        """corpus/key of ledger rows."""
        found = [""] * len(rows)
        for (c, epoch), here in _by_corpus_and_epoch(rows):
            records = self.planner.rows(c, epoch, rows[here, POSITION])[:, RECORD].tolist()
            for place, record in zip(here.tolist(), records, strict=True):
                found[place] = f"{self.corpora[c].card.name}/{self.corpora[c].key(record)}"
        return found

    def of_step(self, number: int) -> list[str]:
        """The samples of one step: corpus/key, epoch, and whether it was a hole."""
        lines = []
        for part in self.steps():
            of = np.repeat(part.step, part.samples)
            rows = part.rows[of == number]
            for key, row in zip(self.keys(rows), rows.tolist(), strict=True):
                lines.append(
                    f"{key}  epoch {row[EPOCH]}" + ("" if row[TRAINED] else "  (not trained on: skipped.jsonl)")
                )
        return sorted(lines)

    def of_key(self, wanted: str) -> list[str]:
        """Where a record was used: `key` or `corpus/key`. Raises UserError when there is no such record."""
        found: list[tuple[int, int]] = []
        for c, corpus in enumerate(self.corpora):
            name, _, key = wanted.rpartition("/")
            if name in ("", corpus.card.name):
                found += [(c, number) for number in corpus.find(key)]
        if not found:
            raise UserError(f"no training record has the key {wanted}; it may be held out, left out or misspelled")
        lines = []
        for c, record in found:
            epochs = range(self.state["cursors"][c][0] + 1)
            places = {e: self.planner.position_of(c, e, record) for e in epochs}
            for part in self.steps():
                of = np.repeat(part.step, part.samples)
                for e, position in places.items():
                    hit = (part.rows[:, :3] == (c, e, position)).all(1)
                    lines += [
                        f"{self.corpora[c].card.name}/{self.corpora[c].key(record)}  step {s}  epoch {e}"
                        for s in of[hit]
                    ]
        return sorted(lines) or [f"{wanted} was not used yet"]

    # -- the audit --------------------------------------------------------------------------------------------------

    def audit(self, held_out: Sequence[CorpusIndex] = ()) -> Audit:
        """Everything; `held_out`: corpora that are validated on, besides the trained ones."""
        found = Audit(steps=self.state["step"] - self.state["restarted"])
        asked = self._asked()
        for c, corpus in enumerate(self.corpora):
            found.corpora[corpus.card.name] = CorpusAudit(corpus.card.licence, float(asked[c]))
        uses: dict[tuple[int, int], NDArray[np.uint8]] = {}  # (corpus, epoch) -> uses of each position
        steps_seen: set[int] = set()
        for part in self.steps():
            steps_seen.update(part.step.tolist())
            self._add(found, uses, part)
            self._compare_keys(found, part)
        numbers = {corpus.card.name: c for c, corpus in enumerate(self.corpora)}
        first = self.state["restarted"]
        absent = sorted(set(range(first, self.state["step"])) - steps_seen)
        if absent:
            found.faults.append(f"{len(absent)} steps are not in the ledger, step {absent[0]} first")
        for row in self._skipped():
            if "place" in row:
                epoch, position = row["place"]
                found.passed_over += 1
                self._count(uses, numbers[row["corpus"]], epoch, np.asarray([position]))
            else:
                found.holes[row["reason"]] = found.holes.get(row["reason"], 0) + 1
        carried = self.planner.carried(self.state)
        found.waiting = len(carried)
        for (c, epoch), here in _by_corpus_and_epoch(carried[:, [0, 1, 2]]):
            self._count(uses, c, epoch, carried[here, 2])
        self._every_place_once(found, uses)
        self._held_out(found, uses, held_out)
        for corpus in self.corpora:
            audited = found.corpora[corpus.card.name]
            audited.epochs = audited.samples / max(1, len(corpus))
        return found

    def _asked(self) -> NDArray[np.float64]:
        """Percent asked for, over all steps of the run with the changes of the mix."""
        changes = [(self.state["restarted"], list(self.planner.percent)), *map(tuple, self.state["events"])]
        until = [step for step, _ in changes[1:]] + [self.state["step"]]
        total = np.zeros(len(self.corpora))
        for (step, percent), end in zip(changes, until, strict=True):
            total += np.asarray(percent) / np.sum(percent) * max(0, end - step)
        return np.asarray(100 * total / max(1e-9, total.sum()))

    def _count(
        self, uses: dict[tuple[int, int], NDArray[np.uint8]], c: int, epoch: int, positions: NDArray[np.int64]
    ) -> None:
        counts = uses.setdefault((c, epoch), np.zeros(len(self.corpora[c]), dtype=np.uint8))
        np.add.at(counts, positions, 1)

    def _add(self, found: Audit, uses: dict[tuple[int, int], NDArray[np.uint8]], part: Steps) -> None:
        for (c, epoch), here in _by_corpus_and_epoch(part.rows):
            rows = part.rows[here]
            self._count(uses, c, epoch, rows[:, POSITION])
            trained = rows[rows[:, TRAINED] > 0]
            planned = self.planner.rows(c, epoch, trained[:, POSITION])
            corpus = found.corpora[self.corpora[c].card.name]
            corpus.samples += len(trained)
            corpus.holes += len(rows) - len(trained)
            corpus.hours += frames.frame_seconds(float(planned[:, FRAMES].sum())) / 3600
            corpus.targets += int(planned[:, TARGETS].sum())

    def _compare_keys(self, found: Audit, part: Steps) -> None:
        """The keys that the plan names must be those that were read."""
        until = np.cumsum(part.samples)
        keys = self.keys(part.rows)
        for step, end, count, checksum in zip(part.step, until, part.samples, part.checksum, strict=True):
            places = [i for i in range(end - count, end) if part.rows[i, TRAINED]]
            now = 0
            for place in places:
                now = zlib.crc32(keys[place].encode(), now)
            found.checked_keys += 1
            if now != checksum:
                found.faults.append(f"step {step}: other records were read than the plan names")

    def _skipped(self) -> Iterator[dict[str, Any]]:
        """What was skipped in the steps that the ledger holds, on all ranks."""
        for path in (self.folder / "skipped.jsonl", *sorted(self.folder.glob("ledger/skipped-rank*.jsonl"))):
            for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
                row = json.loads(line)
                if self.state["restarted"] <= row["step"] < self.state["step"]:
                    yield row

    def _every_place_once(self, found: Audit, uses: dict[tuple[int, int], NDArray[np.uint8]]) -> None:
        """What was drawn is trained on, a hole, passed over or waiting: exactly one of them, and nothing else is."""
        for c, corpus in enumerate(self.corpora):
            last, position = self.state["cursors"][c]
            for epoch in range(max([last, *(e for n, e in uses if n == c)]) + 1):
                drawn = len(corpus) if epoch < last else position if epoch == last else 0
                counts = uses.get((c, epoch), np.zeros(len(corpus), dtype=np.uint8))
                for what, places in (
                    ("more than once", np.flatnonzero(counts > 1)),
                    ("never, though it was drawn", np.flatnonzero(counts[:drawn] == 0)),
                    ("though it was not drawn yet", drawn + np.flatnonzero(counts[drawn:] > 0)),
                ):
                    if len(places):
                        records = self.planner.rows(c, epoch, places[:EXAMPLES])[:, RECORD].tolist()
                        keys = ", ".join(corpus.key(r) for r in records)
                        found.faults.append(f"{corpus.card.name}, epoch {epoch}: {len(places)} used {what}: {keys}")

    def _held_out(
        self, found: Audit, uses: dict[tuple[int, int], NDArray[np.uint8]], others: Sequence[CorpusIndex]
    ) -> None:
        apart: defaultdict[str, set[int]] = defaultdict(set)
        for corpus in (*self.corpora, *others):
            for path, offset in corpus.held_out_places():
                apart[path].add(offset)
        for c, corpus in enumerate(self.corpora):
            leaks = corpus.numbers_at(apart)
            for epoch in sorted(e for n, e in uses if n == c) if len(leaks) else ():
                positions = np.flatnonzero(uses[c, epoch])
                used = np.intersect1d(self.planner.rows(c, epoch, positions)[:, RECORD], leaks)
                if len(used):
                    keys = ", ".join(corpus.key(int(r)) for r in used[:EXAMPLES])
                    found.faults.append(f"{corpus.card.name}, epoch {epoch}: {len(used)} held-out records used: {keys}")


def _by_corpus_and_epoch(rows: NDArray[np.int64]) -> Iterator[tuple[tuple[int, int], NDArray[np.int64]]]:
    """((corpus, epoch), numbers of its rows)."""
    for c, epoch in np.unique(rows[:, :2], axis=0).tolist():
        yield (c, epoch), np.flatnonzero((rows[:, 0] == c) & (rows[:, 1] == epoch))
