"""Benchmarks as data: YAML -> tasks -> questions with their audio. A data set that is not there is one line.

A task asks either the lines of `file` (JSONL in the form in which the authors of MiDashengLM publish their answers:
`audio`, a path beside the file or a list of such, and fields for references, question, choices), or held-out records of
one of the run's own mixes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from midasheng.config import Stage, UserError
from midasheng.data.audio import Skip, decode
from midasheng.data.held_out import HeldOutSet
from midasheng.data.index import Record
from midasheng.data.manifest import read_mix
from midasheng.data.plan import Budget
from midasheng.data.room import open_chat, open_corpora
from midasheng.data.storage import StorageError, Unreachable
from midasheng.evaluate.rows import MISSING, Row
from midasheng.evaluate.score import LETTERS
from midasheng.inference import waveform

MOST_HELD_OUT = 10_000  # of a corpus, where a task says no `most`
ANY_LENGTH = Budget(2**31, 2**31, 1)
SCORERS = {  # name -> its keys
    "transcripts": {"normalise", "unit"}, "label": {"labels"}, "labels": {"separator", "rewrite"}, "choice": set[str](),
    "captions": {"date"}, "judge": set[str](),
}  # fmt: skip


class TaskError(UserError):
    """A mistake in a task or suite, or its data are not there."""


@dataclass(frozen=True)
class Task:
    """One number of a table. In prompts {question} and {options} are filled from the line, nothing else is."""

    name: str
    dataset: str  # as the report calls it
    limit: int  # new tokens of an answer
    score: dict[str, Any]  # by: a scorer's name, and its keys
    table: str = ""  # where the number stands: "7" of the report, "aero"
    published: float | None = None  # of the authors' 7B model, in percent, by the paper's protocol
    homepage: str = ""
    file: str = ""  # below the folder of benchmarks
    where: dict[str, list[str]] = field(default_factory=dict)  # field of a line -> values that are asked
    prompt: str = ""
    question: str = "question"  # fields of a line
    choices: str = ""
    reference: str = ""  # a string or a list of them
    join: str = ""  # pattern of the audio's name; what its group matches is joined to one clip and one transcript
    mix: str = ""  # of the run, for held-out records
    corpus: str = ""
    closed: str = ""  # an answer of the closed question; without it all records are asked, one variant each
    most: int = MOST_HELD_OUT

    def __post_init__(self) -> None:
        by = self.score.get("by")
        if by not in SCORERS:
            raise TaskError(f"task {self.name}: score.by is {by}; write one of {', '.join(SCORERS)}")
        if unknown := self.score.keys() - {"by"} - SCORERS[by]:
            raise TaskError(
                f"task {self.name}: {by} knows no {', '.join(sorted(unknown))}; it has {sorted(SCORERS[by])}"
            )
        needed = ("mix", "corpus") if self.mix else ("file", "prompt", "reference")
        if gone := [name for name in needed if not getattr(self, name)]:
            raise TaskError(f"task {self.name}: {gone[0]} is missing")


@dataclass(frozen=True)
class Question:
    """What is asked: a row without its answer, and the clips of its prompt; `joined` to one clip."""

    row: Row
    clips: tuple[Path | Record, ...]
    joined: bool = False

    def waves(self) -> list[NDArray[np.float32]]:
        """The clips as the model hears them, float32 (samples,). Raises UserError, which names what cannot be read."""
        waves = []
        for clip in self.clips:
            if isinstance(clip, Path):
                waves.append(waveform(clip))
                continue
            assert clip.audio is not None
            try:
                waves.append(waveform(decode(clip.audio.read(), clip.n_samples)))
            except (Skip, StorageError, Unreachable) as error:
                raise UserError(f"{self.row.id}: {error}") from None
        return [np.concatenate(waves)] if self.joined else waves

    def digest(self) -> bytes:
        """SHA-256 of references and of the audio's bytes. What cannot be read is a constant: it will be said."""
        found = hashlib.sha256(json.dumps([self.row.id, self.row.references, self.row.choices]).encode())
        for clip in self.clips:
            try:
                data = clip.read_bytes() if isinstance(clip, Path) else clip.audio.read() if clip.audio else b""
            except (OSError, StorageError, Unreachable):
                data = b"unread"
            found.update(hashlib.sha256(data).digest())
        return found.digest()


# -- YAML --------------------------------------------------------------------------------------------------------------


def _yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise TaskError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise TaskError(f"{path} is no mapping")
    return content


def read_tasks(folder: Path) -> dict[str, Task]:
    """All tasks of the benchmarks in `folder`: a file's keys hold for its `tasks`, which may say otherwise. Raises
    TaskError."""
    known = {f.name for f in fields(Task)} - {"name"}
    found: dict[str, Task] = {}
    for path in sorted(folder.glob("*.yaml")):
        content = _yaml(path)
        common = {key: value for key, value in content.items() if key != "tasks"}
        tasks = content.get("tasks")
        if not isinstance(tasks, dict) or not tasks:
            raise TaskError(f"{path}: write `tasks:` and below it NAME: {{...}}")
        for name, own in tasks.items():
            values = common | (own or {})
            if unknown := values.keys() - known:
                raise TaskError(
                    f"{path}: {name}: no key {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}"
                )
            if name in found:
                raise TaskError(f"{path}: a second task {name}")
            try:
                found[name] = Task(name=name, **values)
            except TypeError as error:
                raise TaskError(f"{path}: {name}: {error}") from None
    return found


def read_suite(name: str, folder: Path) -> list[Task]:
    """The tasks of `folder`/suites/`name`.yaml, or the one task of that name. Raises TaskError."""
    tasks = read_tasks(folder / "tasks")
    if name in tasks:
        return [tasks[name]]
    path = folder / "suites" / f"{name}.yaml"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in (folder / "suites").glob("*.yaml"))) or "none"
        raise TaskError(f"no suite or task {name}; suites: {there}; tasks: {', '.join(sorted(tasks)) or 'none'}")
    names = _yaml(path).get("tasks")
    if not isinstance(names, list) or not names:
        raise TaskError(f"{path}: write `tasks: [NAME, ...]`")
    if unknown := [n for n in names if n not in tasks]:
        raise TaskError(f"{path}: no task {unknown[0]}; there are {', '.join(sorted(tasks))}")
    return [tasks[n] for n in names]


# -- questions ---------------------------------------------------------------------------------------------------------


def options(choices: Sequence[str]) -> str:
    """As the published prompts write them: (A) first, one a line."""
    return "\n".join(f"({LETTERS[n]}) {text}" for n, text in enumerate(choices))


def prompted(template: str, question: str, choices: Sequence[str]) -> str:
    """A task's prompt for one question, in one pass: a question that holds "{options}" stays as it is."""
    values = {"{question}": question, "{options}": options(choices)}
    return re.sub(r"\{(?:question|options)\}", lambda found: values[found[0]], template)


class Benchmarks:
    """Where questions come from: `root`, the folder of benchmarks, and the held-out records of a run's `stage`."""

    def __init__(self, root: Path, stage: Stage | None) -> None:
        self.root, self.stage = root, stage
        self._held_out: dict[str, HeldOutSet] = {}

    def questions(self, task: Task) -> list[Question]:
        """In the order of the file or corpus. Raises TaskError where the data are not there: one line that says what is
        expected where."""
        found = _of_records(task, self._set(task)) if task.mix else _of_file(task, self.root)
        if not found:
            raise TaskError(f"{task.name}: there is nothing to ask ({task.file or task.mix + '/' + task.corpus})")
        twice = [name for name, count in Counter(q.row.id for q in found).items() if count > 1]
        if twice:
            raise TaskError(f"{task.name}: two questions are called {twice[0]}")
        return found

    def _set(self, task: Task) -> HeldOutSet:
        if self.stage is None:
            raise TaskError(f"{task.name}: held-out records belong to a run; say NAME=... of one, not MODEL=...")
        if task.mix not in self._held_out:
            chat = open_chat(self.stage)
            cards = read_mix(task.mix, Path(self.stage.data.manifests)).cards
            corpora = open_corpora(self.stage, chat, cards, make=False)
            self._held_out[task.mix] = HeldOutSet(task.mix, corpora, chat, ANY_LENGTH, MOST_HELD_OUT)
        return self._held_out[task.mix]


def _of_file(task: Task, root: Path) -> list[Question]:
    path = root / task.file
    if not path.is_file():
        where = f" (from {task.homepage})" if task.homepage else ""
        raise TaskError(f"{task.name}: no {path}; put {task.dataset}{where} there, one JSON line for each question")
    try:
        lines = [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
    except ValueError as error:
        raise TaskError(f"{task.name}: {path} is no JSONL: {error}") from None
    used = ["audio", task.reference, *([task.choices] if task.choices else []), *task.where]
    used += [task.question] if "{question}" in task.prompt else []
    found, seen = [], dict[str, int]()
    for number, line in enumerate(lines, 1):
        if gone := [name for name in used if name not in line]:
            raise TaskError(f"{task.name}: {path}, line {number} has no field {gone[0]}; there are {sorted(line)}")
        if any(str(line[name]) not in map(str, values) for name, values in task.where.items()):
            continue
        audio = line["audio"] if isinstance(line["audio"], list) else [line["audio"]]
        references = line[task.reference] if isinstance(line[task.reference], list) else [line[task.reference]]
        choices = tuple(map(str, line[task.choices])) if task.choices else ()
        prompt = prompted(task.prompt, str(line.get(task.question, "")), choices)
        heard = "+".join(audio)
        name = str(line.get("id", heard))
        seen[name] = seen.get(name, 0) + 1  # several questions on one clip
        name += f"#{seen[name]}" if seen[name] > 1 else ""
        row = Row(
            f"{task.name}/{name}", task.name, prompt, choices, tuple(map(str, references)), None, 0, MISSING, clip=heard
        )
        found.append(Question(row, tuple(path.parent / a for a in audio)))
    return _joined(task, found) if task.join else found


def _joined(task: Task, found: list[Question]) -> list[Question]:
    """Long-form: the clips of a group end to end in the order of their names, and their transcripts likewise."""
    groups: dict[str, list[Question]] = {}
    for question in found:
        name = question.row.id.partition("/")[2]
        match = re.match(task.join, name)
        if match is None:
            raise TaskError(f"{task.name}: {name} does not match join: {task.join}")
        groups.setdefault(match[1], []).append(question)
    joined = []
    for name, group in groups.items():
        group.sort(key=lambda q: q.row.id)
        text = " ".join(q.row.references[0] for q in group)
        row = Row(f"{task.name}/{name}", task.name, group[0].row.prompt, (), (text,), None, 0, MISSING)
        joined.append(Question(row, tuple(clip for q in group for clip in q.clips), joined=True))
    return joined


def _of_records(task: Task, held_out: HeldOutSet) -> list[Question]:
    names = [corpus.card.name for corpus in held_out.corpora]
    if task.corpus not in names:
        raise TaskError(f"{task.name}: the mix {task.mix} has no corpus {task.corpus}; it has {', '.join(names)}")
    number = names.index(task.corpus)
    found: list[tuple[Record, int, str, tuple[str, ...], tuple[str, ...]]] = []
    if task.closed:
        for a, choices in held_out.closed(task.most):
            if a.corpus == number and task.closed in choices:
                found.append((a.record, a.variant, a.question, a.references, choices))
    else:
        for a in [a for a in held_out.asked if a.corpus == number][: task.most]:
            found.append((a.record, a.variant, a.question, a.references, ()))
    return [
        Question(
            Row(
                f"{task.name}/{record.key}/{variant}", task.name, prompt, choices, references, None, 0, MISSING,
                clip=record.key,
            ),
            (record,) if record.audio else (),
        )
        for record, variant, prompt, references, choices in found
    ]  # fmt: skip
