"""Run NAME -> a table of numbers one can trust: `make evaluate NAME=stage3_sft SUITE=mini` (or SUITE=one task's name).

Answers what the suite asks (resumable; under torchrun the ranks share the questions), then scores. ONLY=score scores
answers that are there, without model, audio or GPU. FOR=lmms-eval, mecat or vllm hands them over instead. NAME may be a
folder (with a /) of weights in the published layout. A data set that is not there is one line; the rest runs.
Settings (SET="key=value ..."): see MEANS and WHERE below.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

import midasheng
from midasheng import config
from midasheng.config import Stage, UserError
from midasheng.evaluate import handover
from midasheng.evaluate.generate import batches, generate
from midasheng.evaluate.results import TABLE, Means, ask, asked_of, results, rows_of, weights_digest
from midasheng.evaluate.tasks import Benchmarks, Question, Task, TaskError, read_suite
from stages.chat import folder_of

MEANS = [f.name for f in fields(Means)]  # what scorers need: see midasheng/evaluate/results.py
WHERE = {
    "root": "data/benchmarks", "manifests": "data_manifests", "to": "", "device": "auto", "dtype": "auto",
}  # the benchmarks; tasks and suites; where answers go (by default RUN/evaluate/SUITE); as midasheng.load  # fmt: skip


def posed(tasks: Sequence[Task], found: Benchmarks) -> tuple[dict[str, list[Question]], dict[str, str]]:
    """(questions of each task, a sentence for each whose data are not there)."""
    questions: dict[str, list[Question]] = {}
    absent: dict[str, str] = {}
    for task in tasks:
        try:
            questions[task.name] = found.questions(task)
        except UserError as error:
            absent[task.name] = str(error)
    return questions, absent


def evaluate(a: argparse.Namespace, rank: int, world: int) -> int:
    """Answer and score. Raises UserError."""
    set_ = WHERE | config.settings_of(a.settings, dict.fromkeys([*WHERE, *MEANS], str))
    means = Means(**{name: set_[name] for name in MEANS if name in set_})
    tasks = read_suite(a.suite, Path(set_["manifests"]))
    run = folder_of(Path(a.runs), a.scale, a.name)
    folder = Path(set_["to"]) if set_["to"] else run / "evaluate" / a.suite
    stage: Stage | None = config.of_run(run / "config.yaml") if (run / "config.yaml").is_file() else None
    absent: dict[str, str] = {}
    if a.only != "score" or a.format == "vllm":
        questions, absent = posed(tasks, Benchmarks(Path(set_["root"]), stage))
        if rank == 0:
            for sentence in absent.values():
                print(sentence)
        if not questions:
            raise TaskError(f"{a.suite}: none of its {len(tasks)} data sets is there")
        if a.format == "vllm":
            for name, asked in questions.items():
                print(handover.vllm(folder / "vllm", name, asked))
            return 0
        if a.fresh and world > 1:
            raise UserError(f"FRESH=1 is for one process; delete {folder} before several begin")
        if a.fresh:
            shutil.rmtree(folder, ignore_errors=True)
        by_name = {task.name: task for task in tasks}
        device, dtype = set_["device"], set_["dtype"]
        if device == "auto":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        if dtype == "auto":
            dtype = "float32" if device == "cpu" else "bfloat16"
        made = {"model": str(run), "weights": weights_digest(str(run)), "dtype": dtype}
        made["device"] = device.partition(":")[0]
        ask(folder, made, {name: (asked_of(by_name[name], asked), asked) for name, asked in questions.items()}, rank)
        all_batches = batches([(by_name[name].limit, asked) for name, asked in questions.items()])
        whole = generate(
            lambda: midasheng.load(run, device, dtype), all_batches, folder, rank, world,
            lambda done, of: print(f"\r  batch {done} of {of}", end="\n" if done == of else "", flush=True),
        )  # fmt: skip
        if not whole:
            print(f"rank {rank} of {world} is done; the last one writes the table")
            return 0
    if a.format:
        write = {"lmms-eval": handover.lmms_eval, "mecat": handover.mecat}[a.format]
        for name, rows in rows_of(folder).items():
            print(write(folder / a.format, name, rows))
        return 0
    results(tasks, folder, means, absent, a.suite)
    print((folder / TABLE).read_text(encoding="utf-8"))
    print(f"{folder}: answers.jsonl, results.json, {TABLE}")
    return 0


def main() -> int:
    """Evaluate one run on one suite."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--scale", default="mini")
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--name", default="stage3_sft")
    parser.add_argument("--suite", default="mini")
    parser.add_argument("--only", default="", choices=("", "score"))
    parser.add_argument("--format", default="", choices=("", *handover.FORMATS))
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("settings", nargs="*")
    a = parser.parse_intermixed_args()
    try:
        return evaluate(a, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
