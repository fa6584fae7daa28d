"""Samples that a run does not train on any more: quarantine.txt in its folder, one CORPUS/KEY a line.

The order of the data stays: where such a sample would stand a pack has a hole, and skipped.jsonl a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from midasheng.config import UserError
from midasheng.data.index import CorpusIndex

FILE, REASON = "quarantine.txt", "quarantined"


def quarantined(folder: Path) -> list[str]:
    """CORPUS/KEY of each line of a run's quarantine.txt; what follows a # is a remark."""
    path = folder / FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [name for line in lines if (name := line.split("#")[0].strip())]


def records(names: Sequence[str], corpora: Sequence[CorpusIndex]) -> frozenset[tuple[int, int]]:
    """(corpus, record) of each CORPUS/KEY. Raises UserError for one that is no training record: a slip of the pen would
    be trained on."""
    numbers = {corpus.card.name: number for number, corpus in enumerate(corpora)}
    found: set[tuple[int, int]] = set()
    for name in names:
        corpus, _, key = name.partition("/")
        if corpus not in numbers:
            raise UserError(f"{FILE}: `{name}` is in no corpus of the mix (there are: {', '.join(numbers)})")
        number = numbers[corpus]
        here = corpora[number].find(key)
        if not here:
            raise UserError(f"{FILE}: corpus {corpus} has no training record {key}; write CORPUS/KEY")
        found.update((number, record) for record in here)
    return frozenset(found)


def quarantine(folder: Path, names: Sequence[str], why: str) -> list[str]:
    """Add samples to a run's quarantine.txt; returns those that were not yet there."""
    new = [name for name in names if name not in quarantined(folder)]
    if new:
        with (folder / FILE).open("a", encoding="utf-8") as file:
            file.writelines(f"{name}  # {why}\n" for name in new)
    return new
