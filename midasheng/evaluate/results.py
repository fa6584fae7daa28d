"""Answers -> results.json and a Markdown table: every number with its spread, its protocol and what it came from."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from midasheng.config import UserError
from midasheng.evaluate import score
from midasheng.evaluate.generate import ANSWERS, BATCH, answered
from midasheng.evaluate.handover import mecat_key
from midasheng.evaluate.judge import Judge
from midasheng.evaluate.rows import Row, read_rows, write_rows
from midasheng.evaluate.score import Scored
from midasheng.evaluate.sentences import Embedder, Fluency, captions
from midasheng.evaluate.tasks import Question, Task
from midasheng.model.sources import open_source, sha256_file

ASKED, QUESTIONS, RESULTS, TABLE = "asked.json", "questions.jsonl", "results.json", "results.md"


# -- what is asked, of which weights -----------------------------------------------------------------------------------


def weights_digest(model: str) -> str:
    """SHA-256 over names and contents of the safetensors that `midasheng.load(model)` reads, adapter included."""
    folder = Path(open_source(model).where)
    files = sorted(folder.rglob("*.safetensors"))
    assert files, f"no safetensors in {folder}"
    lines = [f"{sha256_file(path)}  {path.relative_to(folder)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def asked_of(task: Task, questions: Sequence[Question]) -> dict[str, Any]:
    """What an answer depends on, beside the weights."""
    prompts, data = hashlib.sha256(), hashlib.sha256()
    for question in questions:
        prompts.update(json.dumps([question.row.id, question.row.prompt]).encode())
        data.update(question.digest())
    return {"n": len(questions), "limit": task.limit, "prompts": prompts.hexdigest(), "data": data.hexdigest()}


def ask(
    folder: Path, made: dict[str, Any], posed: dict[str, tuple[dict[str, Any], Sequence[Question]]], rank: int = 0
) -> None:
    """Rank 0 writes asked.json and questions.jsonl; `made`: weights and how they are run. Raises UserError, on every
    rank, where the folder holds answers to something else; tasks may be added."""
    now = {"made": made, "tasks": {name: asked for name, (asked, _) in posed.items()}}
    path = folder / ASKED
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        pairs = {f"made.{key}": (before["made"].get(key), value) for key, value in made.items() if key != "model"}
        for name, asked in now["tasks"].items():
            for key, value in before["tasks"].get(name, {}).items():
                pairs[f"{name}.{key}"] = (value, asked[key])
        for name, (one, other) in pairs.items():
            if one != other:
                raise UserError(
                    f"{folder} holds answers made with {name} {one}, now it is {other}; FRESH=1 answers all anew"
                )
        now["tasks"] = before["tasks"] | now["tasks"]
    if rank:
        return
    folder.mkdir(parents=True, exist_ok=True)
    old = read_rows(folder / QUESTIONS) if (folder / QUESTIONS).is_file() else []
    rows = {row.id: row for row in old} | {q.row.id: q.row for _, questions in posed.values() for q in questions}
    write_rows(folder / QUESTIONS, rows.values())
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")
    beside.replace(path)


# -- scoring -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Means:
    """What some scorers need beside the answers; empty: they say what is missing."""

    embedder: str = ""  # folder of a sentence encoder
    fluency: str = ""  # FENSE's echecker_*.ckpt, its encoder's folder beside it
    judge: str = ""  # URL of an OpenAI-compatible endpoint, up to /v1
    judge_model: str = ""
    mecat: str = ""  # the Python of an environment that holds the package mecat

    @cached_property
    def _embedder(self) -> Embedder | None:
        return Embedder(Path(self.embedder)) if self.embedder else None

    @cached_property
    def _fluency(self) -> Fluency | None:
        return Fluency(Path(self.fluency)) if self.fluency else None

    def scored(self, task: Task, rows: Sequence[Row], folder: Path) -> tuple[Scored, str]:
        """(the scorer's numbers, what is missing for others). Raises UserError."""
        by, keys = task.score["by"], {key: value for key, value in task.score.items() if key not in ("by", "date")}
        if by == "captions":
            lacking = "" if self.embedder else "similarity needs SET=embedder=FOLDER"
            return captions(rows, self._embedder, self._fluency), lacking
        if by == "judge":
            if not self.judge:
                return Scored("judge", "none", {}), 'needs SET="judge=URL judge_model=NAME"'
            return Judge(self.judge, self.judge_model, folder / "judged.jsonl")(rows), ""
        return SCORERS[by](rows, **keys), ""


SCORERS: dict[str, Callable[..., Scored]] = {
    "transcripts": score.transcripts, "label": score.label, "labels": score.labels, "choice": score.choice,
}  # fmt: skip

DATE = """
import json, sys
from mecat import evaluate
told = json.load(sys.stdin)
found = evaluate(predicted_data={told["subtask"]: told["answers"]}, task="caption", metrics=["date"])
print(found.to_json(orient="records"))
"""


def date(python: str, subtask: str, rows: Sequence[Row]) -> dict[str, float]:
    """DATE (similarity and how well an answer tells its clip from others) by the authors' package, in its own process:
    it needs other versions of nearly everything. Group -> DATE. Raises UserError."""
    answers = {mecat_key(row): row.text for row in rows}
    try:
        done = subprocess.run(
            [python, "-c", DATE], input=json.dumps({"subtask": subtask, "answers": answers}),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"mecat={python} does not run: {error}") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise UserError(
            f"mecat={python}: {last}; mecat is not on PyPI: make an environment of its own (it wants torch 2.2), and "
            "there pip install git+https://github.com/xiaomi-research/mecat"
        )
    groups = json.loads(done.stdout.strip().splitlines()[-1])
    return {str(group["subtask"]): float(group["date"]) for group in groups if group["date"] is not None}


def rows_of(folder: Path) -> dict[str, list[Row]]:
    """Task -> its rows: answers, and the questions that nobody answered."""
    found = answered(folder)
    if not found:
        read_rows(folder / ANSWERS)  # says that there are none
    asked = {row.id: row for row in read_rows(folder / QUESTIONS)} if (folder / QUESTIONS).is_file() else {}
    by_task: dict[str, list[Row]] = {}
    for row in (asked | found).values():
        by_task.setdefault(row.task, []).append(row)
    return by_task


def results(tasks: Sequence[Task], folder: Path, means: Means, absent: dict[str, str], suite: str) -> dict[str, Any]:
    """Score what `folder` holds answers to, and write results.json and results.md. Raises UserError."""
    rows = rows_of(folder)
    asked = json.loads((folder / ASKED).read_text(encoding="utf-8")) if (folder / ASKED).is_file() else {}
    told: dict[str, Any] = {
        "suite": suite, "made": asked.get("made", {}) | {"batch": BATCH},
        "interval": f"95 %, bootstrap over clips, {score.ROUNDS} rounds, seed {score.SEED}", "tasks": {}, "absent": {},
    }  # fmt: skip
    for task in tasks:
        if task.name in rows:
            told["tasks"][task.name] = _of_task(
                task, rows[task.name], asked.get("tasks", {}).get(task.name, {}), means, folder
            )
        else:
            told["absent"][task.name] = absent.get(task.name, f"{task.name}: not asked yet")
    for name, content in ((RESULTS, json.dumps(told, indent=2, ensure_ascii=False) + "\n"), (TABLE, table(told))):
        (folder / (name + ".part")).write_text(content, encoding="utf-8")
        (folder / (name + ".part")).replace(folder / name)
    return told


def _of_task(task: Task, rows: Sequence[Row], asked: dict[str, Any], means: Means, folder: Path) -> dict[str, Any]:
    scored, lacking = means.scored(task, rows, folder)
    numbers, clips = {}, [row.clip or row.id for row in rows]
    for name, number in scored.numbers.items():
        low, high = number.interval(clips=clips) or (None, None)
        numbers[name] = {"value": number.value, "low": low, "high": high}
    if means.mecat and task.score.get("date"):
        numbers |= {f"date_{g}": {"value": v} for g, v in date(means.mecat, task.score["date"], rows).items()}
    return {
        "dataset": task.dataset, "table": task.table, "published": task.published,
        "number": next(iter(scored.numbers), None), "paper": scored.paper or None,
        "chance": scored.chance or None, "numbers": numbers,
        "clips": len(set(clips)), **score.counts(rows), "unparsed": scored.counts.get("unparsed"),
        "counts": {key: value for key, value in scored.counts.items() if key != "unparsed"},
        "scorer": scored.scorer, "normaliser": scored.normaliser, "lacking": lacking or None,
        "limit": task.limit, "seconds": round(sum(row.seconds for row in rows), 3),
        "prompts": asked.get("prompts"), "data": asked.get("data"),
    }  # fmt: skip


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def table(told: dict[str, Any]) -> str:
    """Markdown; numbers in percent."""
    counted = ["n", "empty", "missing", "truncated", "unparsed"]
    columns = ["task", "number", "value", "interval", "chance", "paper", "published", *counted, "scorer, normaliser"]
    lines = [
        f"# {told['suite']}", "",
        "; ".join(f"{key} {value[:16] if key == 'weights' else value}" for key, value in told["made"].items()) + ".",
        f"In percent; interval: {told['interval']}. `chance` is had without hearing, `paper` follows",
        "the authors' protocol, `published` is what they report of their 7B. All else is in results.json.", "",
        "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|",
    ]  # fmt: skip
    for name, task in told["tasks"].items():
        found = task["numbers"].get(task["number"], {})
        low, high = found.get("low"), found.get("high")
        spread = "-" if low is None else f"{_percent(low)} to {_percent(high)}"
        chance, paper = (
            _percent(task["numbers"][task[kind]]["value"]) if task[kind] else "-" for kind in ("chance", "paper")
        )
        published = "-" if task["published"] is None else f"{task['published']:g}"
        gone = task["missing"] + task["unread"]
        unparsed = "-" if task["unparsed"] is None else task["unparsed"]
        lines.append(
            f"| {name} | {task['number'] or '-'} | {_percent(found.get('value'))} | {spread} | {chance} | {paper} "
            f"| {published} | {task['n']} | {task['empty']} | {gone} | {task['truncated']} | {unparsed} "
            f"| {task['scorer']}, {task['normaliser']} |"
        )
    lines += ["", *(f"- {name}: {task['lacking']}" for name, task in told["tasks"].items() if task["lacking"])]
    lines += [f"- {sentence}" for sentence in told["absent"].values()]
    return "\n".join(lines).rstrip() + "\n"
