"""Questions -> answers.jsonl: in batches that depend on the questions alone, over any number of ranks, resumable.

A batch is answered and written whole, so that a run that was killed, or goes on with another number of ranks, ends with
the answers of one that was not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from midasheng.config import UserError
from midasheng.evaluate.rows import UNREAD, Row, read_rows, row_of, write_rows
from midasheng.evaluate.tasks import Question
from midasheng.inference import Listener

BATCH = 16
ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class Batch:
    """Questions of one task that are answered together, with at most `limit` new tokens each."""

    questions: tuple[Question, ...]
    limit: int


def batches(posed: Sequence[tuple[int, Sequence[Question]]], size: int = BATCH) -> list[Batch]:
    """Of (limit, questions) of each task, in order."""
    return [Batch(tuple(qs[at : at + size]), limit) for limit, qs in posed for at in range(0, len(qs), size)]


def answer(listener: Listener, batch: Batch) -> list[Row]:
    """The rows of a batch, greedy; a question whose audio cannot be read has no output and says so."""
    rows = {q.row.id: replace(q.row, finish_reason=UNREAD) for q in batch.questions}
    heard, clips = [], []
    for question in batch.questions:
        try:
            clips.append(list(question.waves()) or None)
            heard.append(question.row)
        except UserError:
            continue
    if heard:
        found = listener.generate(
            clips, [row.prompt for row in heard], max_new_tokens=batch.limit, batch_size=len(heard)
        )
        for row, said in zip(heard, found, strict=True):
            rows[row.id] = replace(
                row, output=said.text, new_tokens=said.new_tokens, finish_reason=said.finish, seconds=said.seconds
            )
    return list(rows.values())


def _whole_lines(path: Path) -> bytes:
    """Of a file that another process may be writing or taking away, or that a kill cut off."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return b""
    return data[: data.rfind(b"\n") + 1]


def answered(folder: Path) -> dict[str, Row]:
    """What has been answered so far, by any rank of any run before."""
    found = {row.id: row for row in (read_rows(folder / ANSWERS) if (folder / ANSWERS).is_file() else ())}
    for part in sorted(folder.glob(f"{ANSWERS}.*-of-*")):
        rows = [row_of(json.loads(line), str(part)) for line in _whole_lines(part).splitlines()]
        found |= {row.id: row for row in rows}
    return found


def generate(
    load: Callable[[], Listener], all_batches: Sequence[Batch], folder: Path, rank: int = 0, world: int = 1,
    said: Callable[[int, int], None] = lambda done, of: None,
) -> bool:  # fmt: skip
    """Answer every `world`-th batch from `rank` on that has not been; `said(done, of)` after each.

    Returns whether answers.jsonl is there, whole and in the order of the questions: the rank that answers last writes
    it. `load` is called where there is something to answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = answered(folder)
    mine = [b for b in all_batches[rank::world] if any(q.row.id not in before for q in b.questions)]
    part = folder / f"{ANSWERS}.{rank}-of-{world}"
    if mine:
        listener = load()
        with part.open("ab") as file:
            file.truncate(len(_whole_lines(part)))  # a kill may have left half a line
            for number, batch in enumerate(mine, 1):
                file.write("".join(row.json() for row in answer(listener, batch)).encode())
                file.flush()
                said(number, len(mine))
    found = answered(folder)
    ids = [q.row.id for b in all_batches for q in b.questions]
    if any(i not in found for i in ids):
        return False
    write_rows(folder / ANSWERS, [found[i] for i in ids])
    for done in folder.glob(f"{ANSWERS}.*-of-*"):
        done.unlink(missing_ok=True)
    return True
