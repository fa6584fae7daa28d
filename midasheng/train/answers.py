"""Greedy answers of a run against their references: exact match by question, beside chance and the decoder alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple


class Matched(NamedTuple):
    """Exact match of the answers to one closed question of a corpus, as shares; None where nothing was answered."""

    mix: str
    corpus: str
    answers: tuple[str, ...]
    clips: int
    exact: float | None
    chance: float  # as if the most frequent reference were always given
    text_only: float | None  # the decoder alone


def exact_match(rows: Sequence[dict[str, Any]]) -> list[Matched]:
    """By corpus and set of answers; open questions are left out."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if "answers" in row:
            groups.setdefault((row["mix"], row["corpus"], *row["answers"]), []).append(row)

    def share(group: Sequence[dict[str, Any]], field: str) -> float | None:
        given = [r for r in group if r[field] is not None]
        return sum(r[field] == r["reference"] for r in given) / len(given) if given else None

    return [
        Matched(
            mix, corpus, tuple(answers), len(group), share(group, "answer"),
            Counter(r["reference"] for r in group).most_common(1)[0][1] / len(group), share(group, "text_only"),
        )
        for (mix, corpus, *answers), group in groups.items()
    ]  # fmt: skip
