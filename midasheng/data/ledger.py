"""What was really trained on, what was skipped and why; stops the run when a corpus is rotten."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

IN_A_ROW = 100  # bad records of one corpus, one after the other
SHARE, AT_LEAST = 0.01, 20  # bad share of a corpus' records, once so many are bad
BAD = {"undecodable", "length differs", "not finite", "no json", "json unreadable", "no audio"}  # data errors


@dataclass(frozen=True)
class Skipped:
    """One record that was not trained on."""

    corpus: str
    key: str
    reason: str

from midasheng.config import UserError


class RottenCorpus(UserError):
    """Too many bad records in one corpus."""


class Ledger:
    """Writes `ledger/rank*.jsonl` (step, keys) and `skipped.jsonl` into a run folder, and applies the stop rules.

    A rank sees its own packs; index-time skips are given to rank 0. On a resume, lines of steps that will be trained
    again are dropped first.
    """

    def __init__(self, folder: Path, rank: int, from_step: int) -> None:
        (folder / "ledger").mkdir(parents=True, exist_ok=True)
        self.trained = folder / "ledger" / f"rank{rank}.jsonl"
        self.skipped = folder / ("skipped.jsonl" if rank == 0 else f"ledger/skipped-rank{rank}.jsonl")
        for path in (self.trained, self.skipped):
            drop_after(path, from_step)
        self.seen: Counter[str] = Counter()
        self.bad: Counter[str] = Counter()
        self.row: defaultdict[str, int] = defaultdict(int)
        self.reasons: Counter[tuple[str, str]] = Counter()

    def indexed(self, corpus: str, records: int, skipped: Iterable[Skipped], *, write: bool) -> None:
        """What the index left out before step 0 (`write`: on a fresh run only). Raises RottenCorpus."""
        self.seen[corpus] += records
        self._note(-1, list(skipped), write=write)

    def step(self, number: int, trained: Iterable[tuple[str, str]], skipped: Iterable[Skipped]) -> None:
        """One step of this rank: (corpus, key) of each sample trained on, and the holes. Raises RottenCorpus."""
        good = list(trained)
        with self.trained.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": number, "keys": [f"{c}/{k}" for c, k in good]}, ensure_ascii=False) + "\n")
        for corpus, _ in good:
            self.row[corpus] = 0
            self.seen[corpus] += 1
        self._note(number, list(skipped), write=True)

    def _note(self, number: int, skipped: list[Skipped], *, write: bool) -> None:
        if write and skipped:
            with self.skipped.open("a", encoding="utf-8") as file:
                for s in skipped:
                    line = {"step": number, "corpus": s.corpus, "key": s.key, "reason": s.reason}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        for s in skipped:
            self.reasons[s.corpus, s.reason] += 1
            self.seen[s.corpus] += 1
            if s.reason in BAD:
                self.bad[s.corpus] += 1
                self.row[s.corpus] += 1
                self._stop_rules(s)

    def _stop_rules(self, last: Skipped) -> None:
        corpus = last.corpus
        why = ""
        if self.row[corpus] >= IN_A_ROW:
            why = f"{IN_A_ROW} bad records in a row"
        elif self.bad[corpus] >= AT_LEAST and self.bad[corpus] > SHARE * self.seen[corpus]:
            why = f"{self.bad[corpus]} bad records out of {self.seen[corpus]}"
        if why:
            raise RottenCorpus(
                f"corpus {corpus}: {why}, the last one {last.key} ({last.reason}). See {self.skipped}; mend the shards or "
                "take the corpus out of the mix"
            )

    def summary(self) -> str:
        """One line: skips by corpus and reason."""
        parts = [f"{corpus}: {reason} {count}" for (corpus, reason), count in sorted(self.reasons.items())]
        return "; ".join(parts) or "none"


def drop_after(path: Path, from_step: int) -> None:
    """Keep the lines of a .jsonl whose "step" is below `from_step`: the others are about to be written again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < from_step]
    path.write_text("".join(kept), encoding="utf-8")
