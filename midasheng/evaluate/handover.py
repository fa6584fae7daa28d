"""Questions and answers for the programs of others: lmms-eval's samples, mecat's predictions, requests for vLLM."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import soundfile

from midasheng import frames
from midasheng.config import UserError
from midasheng.evaluate.rows import Row
from midasheng.evaluate.tasks import Question

FORMATS = ("lmms-eval", "mecat", "vllm")


def _write(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def lmms_eval(folder: Path, task: str, rows: Sequence[Row]) -> Path:
    """samples_TASK.jsonl, as lmms-eval's --log_samples writes: what it reads to score and to compare models."""
    lines = []
    for number, row in enumerate(rows):
        doc = {"id": row.id, "question": row.prompt, "choices": list(row.choices), "answer": list(row.references)}
        target = row.references[0] if len(row.references) == 1 else list(row.references)
        lines.append({
            "doc_id": number, "doc": doc, "target": target, "arguments": [row.prompt],
            "resps": [[row.text]], "filtered_resps": [row.text],
            "doc_hash": _hash(json.dumps(doc, sort_keys=True, ensure_ascii=False)), "prompt_hash": _hash(row.prompt),
            "target_hash": _hash(str(target)),
        })  # fmt: skip
    path = folder / f"samples_{task}.jsonl"
    _write(path, lines)
    return path


def mecat_key(row: Row) -> str:
    """The key of the record that a row of a MECAT task asks about: its audio's name without folder and ending."""
    return Path(row.id).stem


def mecat(folder: Path, task: str, rows: Sequence[Row]) -> Path:
    """TASK.jsonl of {key: answer} lines, for `python -m mecat.evaluate --prediction TASK.jsonl --subtask ...`."""
    path = folder / f"{task}.jsonl"
    _write(path, [{mecat_key(row): row.text} for row in rows])
    return path


def vllm(folder: Path, task: str, questions: Sequence[Question]) -> Path:
    """TASK.jsonl for `vllm bench serve --dataset-name custom_audio`: prompt and audio file. A clip that is no file of
    its own (in a shard, joined of several) is written beside it as 16 kHz FLAC. Raises UserError for several clips."""
    lines = []
    for number, question in enumerate(questions):
        line: dict[str, Any] = {"prompt": question.row.prompt}
        clips = question.clips
        if len(clips) == 1 and isinstance(clips[0], Path):
            line["audio"] = str(clips[0].resolve())
        elif clips:
            waves = question.waves()
            if len(waves) > 1:
                raise UserError(f"{question.row.id} has {len(waves)} clips; vLLM's custom_audio takes one")
            audio = folder / "audio" / task / f"{number:06}.flac"
            audio.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(audio, waves[0], frames.SAMPLE_RATE, format="FLAC", subtype="PCM_16")
            line["audio"] = str(audio.resolve())
        lines.append(line)
    path = folder / f"{task}.jsonl"
    _write(path, lines)
    return path
