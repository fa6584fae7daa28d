"""What was really trained on, what was skipped and why; stops the run when a corpus is rotten."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midasheng.config import UserError

IN_A_ROW = 100  # bad records of one corpus, one after the other
SHARE, AT_LEAST = 0.01, 20  # bad share of a corpus' records, once so many are bad
# data errors
BAD = {
    "undecodable", "length unknown", "length differs", "not finite", "no json", "dotted name", "json unreadable",
    "no audio",
}  # fmt: skip


@dataclass(frozen=True)
class Skipped:
    """One record that was not trained on."""

    corpus: str
    key: str
    reason: str


class RottenCorpus(UserError):
    """Too many bad records in one corpus."""


def trim(folder: Path, from_step: int) -> None:
    """Before a resume at `from_step`: drop later lines of every rank, also of ranks that the new world lacks."""
    for path in (*folder.glob("ledger/*.jsonl"), folder / "skipped.jsonl"):
        drop_after(path, from_step)


class Ledger:
    """Writes `ledger/rank*.jsonl` (step, keys) and `skipped.jsonl` into a run folder, and applies the stop rules.

    A rank sees its own packs; index-time skips are given to rank 0. On a resume, lines of steps that will be trained
    again are dropped first, and the others counted again.
    """

    def __init__(self, folder: Path, rank: int, from_step: int) -> None:
        (folder / "ledger").mkdir(parents=True, exist_ok=True)
        self.trained = folder / "ledger" / f"rank{rank}.jsonl"
        self.skipped = folder / ("skipped.jsonl" if rank == 0 else f"ledger/skipped-rank{rank}.jsonl")
        self.seen: Counter[str] = Counter()
        self.bad: Counter[str] = Counter()
        self.row: defaultdict[str, int] = defaultdict(int)
        self.reasons: Counter[tuple[str, str]] = Counter()
        for line in drop_after(self.trained, from_step):
            self.seen.update(key.split("/")[0] for key in line["keys"])
        for line in drop_after(self.skipped, from_step):
            if line["step"] >= 0:
                self._count(Skipped(line["corpus"], line["key"], line["reason"]))

    def indexed(self, corpus: str, records: int, skipped: Iterable[Skipped], *, write: bool) -> None:
        """What the index left out before step 0 (`write`: on a fresh run only). Raises RottenCorpus."""
        self.seen[corpus] += records
        self._note(-1, list(skipped), {corpus}, write=write)  # not in a row: the good ones between are not listed

    def step(self, number: int, trained: Iterable[tuple[str, str]], skipped: Iterable[Skipped]) -> None:
        """One step of this rank: (corpus, key) of each sample trained on, and the holes. Raises RottenCorpus."""
        good = list(trained)
        with self.trained.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": number, "keys": [f"{c}/{k}" for c, k in good]}, ensure_ascii=False) + "\n")
        self.seen.update(corpus for corpus, _ in good)
        self._note(number, list(skipped), {corpus for corpus, _ in good}, write=True)

    def _note(self, number: int, skipped: list[Skipped], good: set[str], *, write: bool) -> None:
        if write and skipped:
            with self.skipped.open("a", encoding="utf-8") as file:
                for s in skipped:
                    line = {"step": number, "corpus": s.corpus, "key": s.key, "reason": s.reason}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        for s in skipped:
            self._count(s)
        for corpus in good:
            self.row[corpus] = 0
        for last in {s.corpus: s for s in skipped if s.reason in BAD}.values():
            self._stop_rules(last)

    def _count(self, skipped: Skipped) -> None:
        self.reasons[skipped.corpus, skipped.reason] += 1
        self.seen[skipped.corpus] += 1
        if skipped.reason in BAD:
            self.bad[skipped.corpus] += 1
            self.row[skipped.corpus] += 1

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


def drop_after(path: Path, from_step: int) -> list[dict[str, Any]]:
    """Keep the lines of a .jsonl whose "step" is below `from_step`: the others are about to be written again.

    Returns what was kept. A half-written last line is dropped.
    """
    if not path.exists():
        return []
    with path.open(encoding="utf-8", errors="replace") as file:  # half a line may end in half a character
        whole = [(line, json.loads(line)) for line in file if line.endswith("\n")]
    kept = [(line, content) for line, content in whole if content["step"] < from_step]
    path.write_text("".join(line for line, _ in kept), encoding="utf-8")
    return [content for _, content in kept]
