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
from midasheng.evaluate.score import exact

CLIPS, CLIP_S, CLIPS_BYTES = 24, 12.0, 4_000_000  # players of a run, seconds of each, characters of all
EARLIER = 8  # validations of which an answer is shown


class Matched(NamedTuple):
    """Exact match of the answers to one closed question of a corpus, as shares; None where nothing was answered."""

    mix: str
    corpus: str
    choices: tuple[str, ...]
    clips: int
    exact: float | None
    chance: float  # as if the most frequent reference were always given
    text_only: float | None  # the decoder alone


def last_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the last validation."""
    last = max((row["step"] for row in rows), default=None)
    return [row for row in rows if row["step"] == last]


def exact_match(rows: Sequence[dict[str, Any]]) -> list[Matched]:
    """By corpus and set of choices; open questions are left out."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["choices"]:
            groups.setdefault((row["mix"], row["corpus"], *row["choices"]), []).append(row)

    def share(group: Sequence[dict[str, Any]], field: str) -> float | None:
        given = [r for r in group if field == "output" or r.get(field) is not None]  # text alone is not always asked
        return sum(exact(r[field], r["references"]) for r in given) / len(given) if given else None

    return [
        Matched(
            mix, corpus, tuple(choices), len(group), share(group, "output"),
            Counter(r["references"][0] for r in group).most_common(1)[0][1] / len(group), share(group, "text_only"),
        )
        for (mix, corpus, *choices), group in groups.items()
    ]  # fmt: skip


def _whole(row: dict[str, Any]) -> bool:
    """Has a row all that is shown of it?"""
    words = all(isinstance(row.get(name), str) for name in ("id", "mix", "corpus", "key", "prompt", "output"))
    lists = [row.get(name) for name in ("references", "choices")]
    strings = all(isinstance(some, list) and all(isinstance(s, str) for s in some) for some in lists)
    return words and strings and bool(row["references"]) and isinstance(row.get("step"), int)


def judged(run: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The table of exact matches at the last validation, and the rows of it to show: groups in turn, of each wrong and
    right ones, with what was answered before."""
    rows = [row for row in rows if _whole(row)]
    earlier: dict[str, dict[int, str]] = {}
    for row in rows:
        earlier.setdefault(row["id"], {})[row["step"]] = row["output"]
    rows = last_rows(rows)
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["mix"], row["corpus"], *row["choices"]), []).append(row)
    orders = []
    for group in groups.values():
        wrong, right = ([r for r in group if exact(r["output"], r["references"]) == good] for good in (False, True))
        pairs = itertools.zip_longest(wrong, right)
        orders.append([row for pair in pairs for row in pair if row is not None])
    turns = itertools.zip_longest(*orders)
    picked = [row for turn in turns for row in turn if row is not None][:CLIPS]
    return {
        "exact": [found._asdict() for found in exact_match(rows)],
        "rows": len(rows), "step": rows[0]["step"] if rows else None,
        "shown": [
            {name: row[name] for name in ("corpus", "key", "prompt", "references", "choices", "output")} | {
                "right": exact(row["output"], row["references"]), "cut": row.get("finish_reason") == "length",
                "text_only": row.get("text_only"), "mix": row["mix"],
                "clip": "/".join((run, row["mix"], row["corpus"], row["key"])),
                "earlier": _some([pair for pair in sorted(earlier[row["id"]].items()) if pair[0] < row["step"]]),
            }
            for row in picked
        ],
    }  # fmt: skip


def _some(pairs: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
    """The first, the last and some between."""
    here = sorted({round(n * (len(pairs) - 1) / (EARLIER - 1)) for n in range(EARLIER)} if pairs else ())
    return [pairs[n] for n in here]


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
