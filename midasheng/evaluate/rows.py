"""One question asked and answered, as a line of answers.jsonl: all that a scorer needs, without model or audio."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from midasheng.config import UserError

MISSING = "missing"  # finish_reason of a question that nobody answered
UNREAD = "unread"  # ... and of one whose audio cannot be read


@dataclass(frozen=True)
class Row:
    """`output` is None where nothing was generated. `finish_reason`: stop, length (cut at the limit), missing, unread,
    or "" where it is not known (answers of others). `seconds` from the start of its batch. `clip`: what is asked about,
    the same for all questions on one clip; "": nothing that others ask about."""

    id: str
    task: str
    prompt: str
    choices: tuple[str, ...]
    references: tuple[str, ...]
    output: str | None
    new_tokens: int = 0
    finish_reason: str = ""
    seconds: float = 0.0
    clip: str = ""

    def __post_init__(self) -> None:
        assert self.references, f"{self.id} of {self.task} has no reference"

    @property
    def text(self) -> str:
        """The output; empty where there is none, which is wrong for every scorer."""
        return self.output or ""

    def json(self) -> str:
        """Its line."""
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


def row_of(fields: dict[str, Any], where: str) -> Row:
    """A line of answers.jsonl. Raises UserError."""
    try:
        lists = {name: tuple(map(str, fields[name])) for name in ("choices", "references")}
        return Row(**{**fields, **lists})
    except (KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{where} is no answer: {error}; a line holds {', '.join(Row.__dataclass_fields__)}") from None


def read_rows(path: Path) -> list[Row]:
    """All lines. Raises UserError."""
    if not path.is_file():
        raise UserError(f"no answers at {path}; `make evaluate NAME=...` makes them")
    rows = []
    # of bytes: a str has other ends of lines too, which JSON leaves as they are within a text
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            fields = json.loads(line)
        except ValueError:
            raise UserError(f"{path}, line {number} is not JSON: was it cut off?") from None
        rows.append(row_of(fields, f"{path}, line {number}"))
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """All of them or nothing."""
    beside = path.with_name(path.name + ".part")
    beside.write_text("".join(row.json() for row in rows), encoding="utf-8")
    beside.replace(path)
