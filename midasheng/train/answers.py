"""Greedy answers of a run against their references: exact match by question, and a few to look at, with their clips."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from midasheng import config, frames
from midasheng.config import UserError
from midasheng.data.audio import Skip, data_uri, decode
from midasheng.data.index import Record
from midasheng.data.room import mixes, open_chat, open_corpora
from midasheng.data.storage import Unreachable

CLIPS, CLIP_S, CLIPS_BYTES = 24, 12.0, 4_000_000  # players of a run, seconds of each, characters of all


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


def judged(run: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The table of exact matches, and the rows to show: groups in turn, of each wrong and right ones."""
    fields = ("mix", "corpus", "key", "question", "reference", "answer")
    rows = [row for row in rows if all(isinstance(row.get(name), str) for name in fields)]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        kind = row["answers"] if isinstance(row.get("answers"), list) else ["open"]
        groups.setdefault((row["mix"], row["corpus"], *map(str, kind)), []).append(row)
    orders = []
    for group in groups.values():
        wrong, right = ([r for r in group if (r["answer"] == r["reference"]) == good] for good in (False, True))
        pairs = itertools.zip_longest(wrong, right)
        orders.append([row for pair in pairs for row in pair if row is not None])
    turns = itertools.zip_longest(*orders)
    picked = [row for turn in turns for row in turn if row is not None][:CLIPS]
    return {
        "exact": [found._asdict() for found in exact_match([r for r in rows if isinstance(r.get("answers"), list)])],
        "rows": len(rows),
        "shown": [
            {name: row[name] for name in fields} | {
                "text_only": row.get("text_only"), "closed": isinstance(row.get("answers"), list),
                "clip": "/".join((run, row["mix"], row["corpus"], row["key"])),
            }
            for row in picked
        ],
    }  # fmt: skip


def read_clips(run_config: Path, shown: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Audio of the answers that `judged` shows: id -> data URI (FLAC, 16 kHz), or a sentence why there is none.
    `run_config`: config.yaml of their run."""
    found: dict[str, str] = {}
    if not shown:
        return found
    why, left = "", CLIPS_BYTES
    records: dict[tuple[str, str], dict[str, Record]] = {}
    try:
        stage = config.of_run(run_config)
        mix, also = mixes(stage)
        wanted = {(row["mix"], row["corpus"]) for row in shown}
        chat = open_chat(stage)
        for one in (mix, *also.values()):
            cards = [card for card in one.cards if (one.name, card.name) in wanted]
            for corpus in open_corpora(stage, chat, cards, make=False):
                records[one.name, corpus.card.name] = {r.key: r for r in corpus.held_out}
    except (UserError, Skip, Unreachable, OSError) as error:
        why = f"its audio is not there: {error}"
    for row in shown:
        record = records.get((row["mix"], row["corpus"]), {}).get(row["key"])
        if why or record is None:
            found[row["clip"]] = why or "its record is not among the held-out ones"
        elif record.audio is None:
            found[row["clip"]] = "a record without audio"
        elif left <= 0:
            found[row["clip"]] = f"left out: the page holds {CLIPS_BYTES / 1e6:g} MB of audio for a run"
        else:
            try:
                clip_L = decode(record.audio.read(), record.n_samples)[: round(CLIP_S * frames.SAMPLE_RATE)]
            except (UserError, Skip, Unreachable, OSError) as error:
                found[row["clip"]] = f"cannot be read: {error}"
                continue
            found[row["clip"]] = data_uri(clip_L)
            left -= len(found[row["clip"]])
    return found
