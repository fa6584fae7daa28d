"""From a run to its table on tiny data: questions, answers that survive kills and ranks, and what is said of both."""

import csv
import gzip
import http.server
import json
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import soundfile
import torch
import yaml

import midasheng
from midasheng import config
from midasheng.config import UserError
from midasheng.evaluate import generate as generate_room
from midasheng.evaluate import results as results_room
from midasheng.evaluate.generate import ANSWERS, answered, batches, generate
from midasheng.evaluate.handover import lmms_eval, mecat, vllm
from midasheng.evaluate.judge import Judge, scores_of
from midasheng.evaluate.results import Means, date, results, rows_of
from midasheng.evaluate.rows import MISSING, UNREAD, Row, read_rows, write_rows
from midasheng.evaluate.score import choice, ratio
from midasheng.evaluate.sentences import Embedder, Fluency, captions
from midasheng.evaluate.tasks import Benchmarks, Question, Task, options, prompted, read_suite, read_tasks
from stages import evaluate as stage
from tests.conftest import Tiny, run_stage, tone

ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / "tests" / "golden"
MANIFESTS = ROOT / "data_manifests"


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/ with one short run, which has looked at all mixes."""
    folder = tmp_path_factory.mktemp("runs")
    run_stage("stage1_align", tiny, folder, name="one", data__also="[pretrain,sft]", run__length="2 steps")
    return folder


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks and a suite on the tiny corpus, and on files."""
    folder = tmp_path_factory.mktemp("manifests")
    held_out = {
        "dataset": "tiny", "limit": 6, "score": {"by": "label"},
        "tasks": {
            "language": {"mix": "sft", "corpus": "tiny_qa", "closed": "French"},
            "words": {"mix": "pretrain", "corpus": "tiny_asr", "score": {"by": "transcripts"}},
            "captions": {"mix": "align", "corpus": "tiny_caption", "score": {"by": "captions"}},
        },
    }  # fmt: skip
    files = {
        "dataset": "Files", "homepage": "https://example.org", "limit": 5, "prompt": "{question}\n{options}\nLetter:",
        "choices": "choices", "reference": "answer", "score": {"by": "choice"}, "file": "files/test.jsonl",
        "tasks": {"files": {}, "files_odd": {"where": {"kind": ["odd"]}}, "gone": {"file": "gone/test.jsonl"}},
    }  # fmt: skip
    for place, content in (
        ("tasks/held_out", held_out), ("tasks/files", files),
        ("suites/tiny", {"tasks": ["language", "words", "captions", "files", "gone"]}),
    ):  # fmt: skip
        path = folder / f"{place}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of benchmarks with one of them; one of its files is no audio."""
    root = tmp_path_factory.mktemp("benchmarks")
    lines = []
    (root / "files").mkdir()
    for n in range(20):
        if n != 7:
            soundfile.write(root / "files" / f"{n}.wav", tone(0.3 + 0.05 * n, n), 16_000)
        kind = "odd" if n % 2 else "even"
        lines.append({"audio": f"{n}.wav", "question": "Which?", "choices": ["x", "y"], "answer": "B", "kind": kind})
    (root / "files" / "7.wav").write_bytes(b"no audio")
    (root / "files" / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def make(runs: Path, manifests: Path, benchmarks: Path, *more: str, suite: str = "tiny") -> int:
    """`make evaluate NAME=one SUITE=tiny`."""
    argv = ["evaluate", "--scale", "mini", "--runs", str(runs), "--name", "one", "--suite", suite]
    argv += [f"root={benchmarks}", f"manifests={manifests}", *more]
    old, sys.argv = sys.argv, argv
    try:
        return stage.main()
    finally:
        sys.argv = old


def lines_of(folder: Path) -> list[Row]:
    """Answers without their seconds."""
    return [replace(row, seconds=0.0) for row in read_rows(folder / ANSWERS)]


@pytest.fixture(scope="module")
def whole(runs: Path, manifests: Path, benchmarks: Path) -> Path:
    """The folder of an unbroken evaluation."""
    assert make(runs, manifests, benchmarks) == 0
    return runs / "mini" / "one" / "evaluate" / "tiny"


# -- the whole way -----------------------------------------------------------------------------------------------------


def test_a_run_becomes_a_table(whole, capsys):
    told = json.loads((whole / "results.json").read_text())
    assert list(told["tasks"]) == ["language", "words", "captions", "files"]
    assert told["absent"]["gone"].startswith("gone: no ")
    assert "put Files (from https://example.org) there" in told["absent"]["gone"]
    files = told["tasks"]["files"]
    assert (files["n"], files["unread"], files["number"]) == (20, 1, "accuracy")
    assert files["empty"] >= 1  # what cannot be heard is wrong
    for name, task in told["tasks"].items():
        assert task["n"] > 1, name
        assert task["missing"] == 0, name
        assert {"value", "low", "high"} <= task["numbers"][task["number"]].keys()
        assert len(task["prompts"]) == len(task["data"]) == 64
        assert task["scorer"]
        assert task["normaliser"]
    assert len(told["made"]["weights"]) == 64
    assert told["tasks"]["captions"]["lacking"] == "similarity needs SET=embedder=FOLDER"
    assert told["tasks"]["words"]["counts"]["hits"] + told["tasks"]["words"]["counts"]["deletions"] > 0
    table = (whole / "results.md").read_text()
    assert table.count("\n| ") == 5
    assert "- gone: no " in table
    assert f"model {told['made']['model']}; weights {told['made']['weights'][:16]}; " in table
    # untrained answers do not end by themselves: all are cut, and the table says so
    rows = read_rows(whole / ANSWERS)
    assert max(r.new_tokens for r in rows if r.task == "files") == told["tasks"]["files"]["limit"] == 5
    assert max(r.new_tokens for r in rows if r.task != "files") == told["tasks"]["words"]["limit"] == 6
    assert told["tasks"]["words"]["truncated"] == sum(r.finish_reason == "length" for r in rows if r.task == "words")


def test_rows_hold_all_that_scoring_needs(whole):
    row = next(r for r in read_rows(whole / ANSWERS) if r.task == "files")
    assert vars(row).keys() == {
        "id", "task", "prompt", "choices", "references", "output", "new_tokens", "finish_reason", "seconds",
        "clip",
    }  # fmt: skip
    assert row.prompt == "Which?\n(A) x\n(B) y\nLetter:"
    assert row.references == ("B",)
    (unread,) = [r for r in read_rows(whole / ANSWERS) if r.finish_reason == UNREAD]
    assert unread.output is None
    assert unread.id == "files/7.wav"


def test_scoring_again_needs_no_model_and_gives_the_same(whole, runs, manifests, benchmarks, monkeypatch, tmp_path):
    before = json.loads((whole / "results.json").read_text())
    monkeypatch.setattr(midasheng, "load", lambda *a: pytest.fail("scoring loaded a model"))
    assert make(runs, manifests, tmp_path, "--only", "score") == 0
    after = json.loads((whole / "results.json").read_text())
    assert after["tasks"] == before["tasks"]
    assert after["made"] == before["made"]
    # from answers.jsonl alone, as somebody else's
    shutil.copy(whole / ANSWERS, tmp_path / ANSWERS)
    alone = results(read_suite("tiny", manifests), tmp_path, Means(), {}, "tiny")
    assert {n: t["numbers"] for n, t in alone["tasks"].items()} == {n: t["numbers"] for n, t in before["tasks"].items()}


def test_a_prompt_is_answered_as_the_run_s_own_test_asks(runs, whole):
    """The clips and words of held-out records reach the model as in training's own test."""
    from midasheng.data.held_out import OWN
    from midasheng.model.generate import generate as model_generate

    run = runs / "mini" / "one"
    found = Benchmarks(Path("/nowhere"), config.of_run(run / "config.yaml"))
    task = Task("captions", "tiny", 6, {"by": "captions"}, mix="align", corpus="tiny_caption")
    asked = found.questions(task)
    listener = midasheng.load(run)
    held_out = found._set(task)
    ((_, pack), *_) = held_out.prompts(held_out.asked[:1], OWN)
    (own,) = model_generate(listener.lm, pack, [held_out.chat.im_end], 6)
    row = next(r for r in read_rows(whole / ANSWERS) if r.id == asked[0].row.id)
    assert row.output == held_out.chat.decode(own.ids)
    assert row.clip == held_out.asked[0].record.key
    assert len(set(row.references)) == 3  # all captions of the clip, not the one that was drawn


# -- answering ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def listener(runs: Path) -> midasheng.inference.Listener:
    return midasheng.load(runs / "mini" / "one")


def many(n: int = 37, limit: int = 6) -> list[generate_room.Batch]:
    """Batches of questions on tones."""

    class Tone(Question):
        def waves(self):
            return [tone(0.3 + 0.03 * len(self.row.prompt), len(self.row.prompt))]

    asked = [Tone(Row(f"t/{k}", "t", "?" * (k + 1), (), ("x",), None, 0, MISSING), ()) for k in range(n)]
    return batches([(limit, asked)])


class Killed(Exception):
    pass


def test_a_generation_that_was_killed_ends_with_the_same_file(listener, tmp_path, monkeypatch):
    """Killed behind any batch, or within the writing of one; then continued by another number of ranks."""
    everything = many()
    assert [len(b.questions) for b in everything] == [16, 16, 5]
    assert generate(lambda: listener, everything, tmp_path / "whole")
    wanted = lines_of(tmp_path / "whole")
    for stop in (1, 2):
        folder = tmp_path / f"killed{stop}"

        def kill(done: int, of: int, stop: int = stop) -> None:
            if done == stop:
                raise Killed

        with pytest.raises(Killed):
            generate(lambda: listener, everything, folder, said=kill)
        assert not (folder / ANSWERS).exists()
        part = folder / f"{ANSWERS}.0-of-1"
        assert len(answered(folder)) == 16 * stop
        with part.open("ab") as file:
            file.write(b'{"id": "t/3", "task"')  # half a line
        again = []
        monkeypatch.setattr(generate_room, "answer", lambda lm, b, again=again: again.append(b) or ANSWER(lm, b))
        assert generate(lambda: listener, everything, folder)
        assert len(again) == 3 - stop  # what was answered is not answered again
        assert lines_of(folder) == wanted
        assert [p.name for p in folder.iterdir()] == [ANSWERS]


ANSWER = generate_room.answer


def test_ranks_share_the_questions_and_end_with_the_same_file(listener, tmp_path):
    everything = many(53)  # so that the first of three ranks answers the last batch too
    generate(lambda: listener, everything, tmp_path / "one")
    ends = [generate(lambda: listener, everything, tmp_path / "three", rank, 3) for rank in (2, 0, 1)]
    assert ends == [False, False, True]
    assert lines_of(tmp_path / "three") == lines_of(tmp_path / "one")
    # one rank of three is killed, and two go on
    for rank in (0, 2):
        generate(lambda: listener, everything, tmp_path / "two", rank, 3)
    assert len(answered(tmp_path / "two")) == 37
    assert [generate(lambda: listener, everything, tmp_path / "two", rank, 2) for rank in (0, 1)] == [False, True]
    assert lines_of(tmp_path / "two") == lines_of(tmp_path / "one")


def test_batches_of_one_and_of_sixteen_answer_the_same(listener):
    """Where the two best logits differ by more than 1e-3: nearer ones may change place with the order of sums."""
    from midasheng.model.generate import steps

    together = {row.id: row for b in many(32, 8) for row in ANSWER(listener, b)}
    alone, near = {}, set()
    for batch in many(32, 8):
        for question in batch.questions:
            (row,) = ANSWER(listener, replace(batch, questions=(question,)))
            alone[row.id] = row
            if row.output != together[row.id].output and closest(listener, question, 8) < 1e-3:
                near.add(row.id)
    assert steps
    assert len(near) <= 3
    for name, row in alone.items():
        if name not in near:
            assert (row.output, row.new_tokens) == (together[name].output, together[name].new_tokens), name


def closest(listener, question: Question, limit: int) -> float:
    """Smallest difference of the two best logits on the way of an answer."""
    from tests.model import logits

    least, said = np.inf, []
    for _ in range(limit):
        sample = listener._sample(question.waves(), question.row.prompt, "", False, ())
        ids = np.concatenate([sample.ids, np.asarray(said, dtype=sample.ids.dtype)])
        more = np.zeros(len(said), dtype=sample.is_audio.dtype)
        sample = sample._replace(
            ids=ids, labels=np.full(len(ids), sample.labels[0]), is_audio=np.concatenate([sample.is_audio, more])
        )
        two = logits(listener.lm, listener._pack([sample]))[-1].topk(2)
        least = min(least, float(two.values[0] - two.values[1]))
        said.append(int(two.indices[0]))
    return least


def test_answers_to_something_else_are_refused(whole, runs, manifests, benchmarks, tmp_path, capsys):
    """Other weights, prompts, audio or limits in a folder that holds answers; tasks may be added."""
    folder = tmp_path / "evaluate"
    assert make(runs, manifests, benchmarks, f"to={folder}", suite="files") == 0
    other = tmp_path / "manifests"
    shutil.copytree(manifests, other)
    path = other / "tasks" / "files.yaml"
    told = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(told | {"prompt": "{question} Letter?\n{options}"}))
    assert make(runs, other, benchmarks, f"to={folder}", suite="files") == 2
    assert "holds answers made with files.prompts" in capsys.readouterr().err
    path.write_text(yaml.safe_dump(told | {"limit": 7}))
    assert make(runs, other, benchmarks, f"to={folder}", suite="files") == 2
    assert "files.limit 5, now it is 7" in capsys.readouterr().err
    audio = tmp_path / "benchmarks"
    shutil.copytree(benchmarks, audio)
    soundfile.write(audio / "files" / "3.wav", tone(0.5, 99), 16_000)
    assert make(runs, manifests, audio, f"to={folder}", suite="files") == 2
    assert "files.data" in capsys.readouterr().err
    asked = json.loads((folder / "asked.json").read_text())
    (folder / "asked.json").write_text(json.dumps(asked | {"made": asked["made"] | {"weights": "others"}}))
    assert make(runs, manifests, benchmarks, f"to={folder}", suite="files") == 2
    assert "made.weights others" in capsys.readouterr().err
    assert make(runs, manifests, audio, f"to={folder}", "--fresh", suite="files") == 0
    assert make(runs, manifests, audio, f"to={folder}", suite="files_odd") == 0  # added
    assert {r.task for r in read_rows(folder / "questions.jsonl")} == {"files", "files_odd"}


def test_weights_have_a_hash_of_what_is_in_them(runs, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(runs / "mini" / "one" / "weights", copy)
    (copy / "stage.json").unlink()  # which would refuse what was changed
    digest = results_room.weights_digest(str(copy))
    assert digest == results_room.weights_digest(str(runs / "mini" / "one"))
    (path,) = copy.glob("model*.safetensors")
    tensors = load_file(path)
    name = next(n for n in tensors if n.startswith("decoder"))
    tensors[name] = tensors[name] + 1
    save_file(tensors, path, metadata={"format": "pt"})
    assert results_room.weights_digest(str(copy)) != digest


def test_questions_that_nobody_answered_count_as_wrong(whole, manifests, tmp_path):
    """Half of the answers are lost: the table counts them, and no number gets better."""
    shutil.copy(whole / "questions.jsonl", tmp_path / "questions.jsonl")
    rows = [replace(r, output="B") if r.task == "files" else r for r in read_rows(whole / ANSWERS)]
    write_rows(tmp_path / ANSWERS, [r for n, r in enumerate(rows) if n % 2])
    told = results(read_suite("tiny", manifests), tmp_path, Means(), {}, "tiny")
    assert told["tasks"]["files"]["n"] == 20
    assert told["tasks"]["files"]["missing"] == 10
    assert told["tasks"]["files"]["numbers"]["accuracy"]["value"] == 0.5
    assert sum(t["n"] for t in told["tasks"].values()) == len(rows)


def test_an_answer_with_odd_ends_of_lines_stays_one_answer(tmp_path):
    """JSON leaves U+2028 and U+0085 as they are, and Python's str.splitlines cuts there."""
    rows = [Row(str(n), "t", "?", (), ("x",), f"a{end}b") for n, end in enumerate("\u2028\u2029\x85\x0b\x0c\x1e\r\n")]
    write_rows(tmp_path / ANSWERS, rows)
    assert read_rows(tmp_path / ANSWERS) == rows
    assert list(answered(tmp_path).values()) == rows


# -- tasks as data -----------------------------------------------------------------------------------------------------


def test_golden_prompts_byte_for_byte():
    """The prompts of the tasks are those that the authors asked, of every line of what they published."""
    tasks = read_tasks(MANIFESTS / "tasks")
    for file, name in (
        ("LibriSpeech_test-clean", "librispeech_test_clean"),
        ("FSD50K", "fsd50k"),
        ("MuChoMusic", "muchomusic"),
    ):
        with gzip.open(GOLDEN / f"MiDashengLM_{file}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line in map(json.loads, lines):
                own = prompted(tasks[name].prompt, line.get("question", ""), line.get("choices", ()))
                assert own == line["prompt"], name


def test_golden_prompts_of_the_published_table():
    """Each prompt of prompt.csv is that of a task in the suite of the report; typing errors are the authors'."""
    asked = {task.prompt for task in read_suite("report", MANIFESTS)}
    with (GOLDEN / "prompt.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30
    for row in rows:
        prompt = row["MiDashengLM"]
        if prompt.startswith("(Question in the data)\\n"):  # the published outputs say how this is really written
            prompt = "{question}\n{options}\nAnswer with a single Letter: "
        assert prompt.replace("(Question in the data)", "{question}") in asked, row["Dataset"]
    assert "Transcribe the speech in to text <|vi|>" in asked


def test_golden_files_are_benchmarks(tmp_path):
    """What the authors publish of a benchmark is what a task reads: same prompts, references, order."""
    (tmp_path / "muchomusic").mkdir()
    with gzip.open(GOLDEN / "MiDashengLM_MuChoMusic.jsonl.gz") as file:
        (tmp_path / "muchomusic" / "test.jsonl").write_bytes(file.read())
    lines = [json.loads(line) for line in (tmp_path / "muchomusic" / "test.jsonl").read_text().splitlines()]
    (task,) = read_suite("muchomusic", MANIFESTS)
    asked = Benchmarks(tmp_path, None).questions(task)
    assert [q.row.prompt for q in asked] == [line["prompt"] for line in lines]
    rows = [replace(q.row, output=line["model_output"]) for q, line in zip(asked, lines, strict=True)]
    assert choice(rows).numbers["token_subset_paper"].value == pytest.approx(task.published / 100, abs=1e-4)


def test_the_suites_name_every_row_of_the_tables():
    report = read_suite("report", MANIFESTS)
    tables = {t: [task for task in report if task.table == t] for t in ("7", "8", "9", "10", "11", "12")}
    assert {t: len(tasks) for t, tasks in tables.items()} == {"7": 5, "8": 9, "9": 10, "10": 9, "11": 7, "12": 6}
    assert all(task.published is not None and task.homepage.startswith("https://") for task in report)
    aero = {task.dataset for task in read_suite("aero", MANIFESTS)}
    assert {
        "AMI", "Earnings22", "LibriSpeech", "SPGISpeech", "TED-LIUM 3", "AIR-Bench", "MMAU", "OpenHermes-Audio", "Alpaca-Audio",
    } <= aero  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": {"by": "bleu"}}, "score.by is bleu; write one of"), ({"scor": {}}, "no key scor"),
        ({"score": {"by": "choice", "unit": "words"}}, "choice knows no unit"), ({"prompt": ""}, "prompt is missing"),
        ({"tasks": {}}, "write `tasks:`"), ({"limit": None}, "limit"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_task_is_said(change, message, tmp_path):
    (tmp_path / "tasks").mkdir()
    told = {
        "dataset": "d", "limit": 5, "prompt": "?", "reference": "r", "file": "f", "score": {"by": "choice"},
        "tasks": {"t": {}},
    } | change  # fmt: skip
    told = {key: value for key, value in told.items() if value is not None}
    (tmp_path / "tasks" / "t.yaml").write_text(yaml.safe_dump(told))
    with pytest.raises(UserError, match=message):
        read_suite("t", tmp_path)


def test_long_form_joins_audio_and_text_by_speaker_and_chapter(tmp_path):
    """In the order of the utterances, whatever the order of the lines."""
    names = ["1-10-0001", "1-10-0000", "1-11-0000", "2-10-0000"]
    waves = {name: tone(0.4 + 0.1 * n, n) for n, name in enumerate(names)}
    (tmp_path / "librispeech").mkdir()
    for name, wave in waves.items():
        soundfile.write(tmp_path / "librispeech" / f"{name}.flac", wave, 16_000, subtype="PCM_24")
    lines = [{"audio": f"{name}.flac", "text": f"WORDS OF {name}"} for name in names]
    (tmp_path / "librispeech" / "test-clean.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (task,) = read_suite("librispeech_test_clean_long", MANIFESTS)
    asked = Benchmarks(tmp_path, None).questions(task)
    assert [q.row.id.partition("/")[2] for q in asked] == ["1-10", "1-11", "2-10"]
    assert asked[0].row.references == ("WORDS OF 1-10-0000 WORDS OF 1-10-0001",)
    (wave,) = asked[0].waves()
    assert np.abs(wave - np.concatenate([waves["1-10-0000"], waves["1-10-0001"]])).max() < 1e-5
    assert len(Benchmarks(tmp_path, None).questions(read_suite("librispeech_test_clean", MANIFESTS)[0])) == 4


def test_a_line_without_a_field_is_said(tmp_path, manifests):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "test.jsonl").write_text(json.dumps({"audio": "x.wav", "question": "?"}))
    (task,) = read_suite("files", manifests)
    with pytest.raises(UserError, match=r"line 1 has no field answer; there are \['audio', 'question'\]"):
        Benchmarks(tmp_path, None).questions(task)


def test_words_of_a_question_are_not_filled(manifests):
    assert prompted("{question} {options}", "What is {options}?", ["a"]) == "What is {options}? (A) a"
    assert options(["x", "y"]) == "(A) x\n(B) y"


def test_several_questions_on_one_clip_have_names_of_their_own(tmp_path, manifests):
    (tmp_path / "files").mkdir()
    line = {"audio": "x.wav", "question": "?", "choices": ["a", "b"], "answer": "A", "kind": "odd"}
    (tmp_path / "files" / "test.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line))
    asked = Benchmarks(tmp_path, None).questions(read_suite("files", manifests)[0])
    assert [q.row.id for q in asked] == ["files/x.wav", "files/x.wav#2"]


@pytest.mark.parametrize("named", [False, True])
def test_intervals_of_a_table_are_drawn_by_clip(named, tmp_path, manifests):
    """Eight clips with five questions each, all right or all wrong, also where every question has an id of its own."""
    (tmp_path / "files").mkdir()
    lines = [
        {"audio": f"{n // 5}.wav", "question": "?", "choices": ["a", "b"], "answer": "A"} | ({"id": n} if named else {})
        for n in range(40)
    ]
    (tmp_path / "files" / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    asked = Benchmarks(tmp_path, None).questions(read_suite("files", manifests)[0])
    assert [q.row.clip for q in asked] == [f"{n // 5}.wav" for n in range(40)]
    rows = [replace(q.row, output="AB"[n // 5 % 2], finish_reason="stop") for n, q in enumerate(asked)]
    write_rows(tmp_path / ANSWERS, rows)
    told = results(read_suite("files", manifests), tmp_path, Means(), {}, "files")
    found = told["tasks"]["files"]
    assert (found["n"], found["clips"]) == (40, 8)
    assert "over clips" in told["interval"]
    number = found["numbers"]["accuracy"]
    assert (number["low"], number["high"]) == ratio([1.0, 0.0] * 4).interval()
    # answers without their clips, as of others: each row is its own
    write_rows(tmp_path / ANSWERS, [replace(row, clip="") for row in rows])
    alone = results(read_suite("files", manifests), tmp_path, Means(), {}, "files")["tasks"]["files"]
    assert alone["clips"] == 40
    assert alone["numbers"]["accuracy"]["low"] > number["low"]


# -- hand over ---------------------------------------------------------------------------------------------------------


def test_answers_in_the_forms_of_others(whole, tmp_path):
    rows = rows_of(whole)["files"]
    lines = [json.loads(line) for line in lmms_eval(tmp_path, "files", rows).read_text().splitlines()]
    assert [line["doc_id"] for line in lines] == list(range(20))
    assert lines[3]["resps"] == [[rows[3].text]]
    assert (lines[3]["target"], lines[3]["arguments"]) == ("B", [rows[3].prompt])
    lines = [json.loads(line) for line in mecat(tmp_path, "files", rows).read_text().splitlines()]
    assert lines[3] == {"3": rows[3].text}
    assert len(lines) == 20


def test_requests_for_vllm_bench(runs, manifests, benchmarks, tmp_path, capsys):
    """A file as it is; a clip in a shard as a file of its own, with the same sound."""
    assert make(runs, manifests, benchmarks, "--format", "vllm", f"to={tmp_path}") == 0
    lines = [json.loads(line) for line in (tmp_path / "vllm" / "files.jsonl").read_text().splitlines()]
    assert lines[3] == {"prompt": "Which?\n(A) x\n(B) y\nLetter:", "audio": str(benchmarks / "files" / "3.wav")}
    lines = [json.loads(line) for line in (tmp_path / "vllm" / "words.jsonl").read_text().splitlines()]
    found = Benchmarks(benchmarks, config.of_run(runs / "mini" / "one" / "config.yaml"))
    asked = found.questions(read_suite("words", manifests)[0])
    assert [line["prompt"] for line in lines] == [q.row.prompt for q in asked]
    for line, question in zip(lines, asked, strict=True):
        wave, rate = soundfile.read(line["audio"], dtype="float32")
        assert rate == 16_000
        assert np.abs(wave - question.waves()[0]).max() < 1e-4


def test_vllm_takes_one_clip(tmp_path):
    for n in (0, 1):
        soundfile.write(tmp_path / f"{n}.wav", tone(0.3, n), 16_000)
    row = Row("t/1", "t", "?", (), ("x",), None)
    question = Question(row, (tmp_path / "0.wav", tmp_path / "1.wav"))
    with pytest.raises(UserError, match="2 clips; vLLM's custom_audio takes one"):
        vllm(tmp_path, "t", [question])
    assert len(question.waves()) == 2


# -- sentences, a judge, DATE ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of nothing learned, as sentence-transformers and FENSE keep theirs."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("sentences") / "tiny"
    folder.mkdir()
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *["a", "dog", "barks", "cat", "meows", "in", "the", "rain", "music", "plays"],
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(shape, add_pooling_layer=True).save_pretrained(folder)
    return folder


def test_similarity_is_that_of_averaged_tokens(encoder):
    from transformers import AutoModel, AutoTokenizer

    embed = Embedder(encoder)
    sentences = ["a dog barks", "a cat meows in the rain", "music"]
    tokenizer, model = AutoTokenizer.from_pretrained(encoder), AutoModel.from_pretrained(encoder).eval()
    for sentence, vector in zip(sentences, embed(sentences), strict=True):  # in one batch: padding takes no part
        with torch.no_grad():
            states = model(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0]
        wanted = states.mean(0) / states.mean(0).norm()
        assert (vector - wanted).abs().max() < 1e-5
    assert embed(sentences).norm(dim=1) == pytest.approx(np.ones(3), abs=1e-5)


def fluency(encoder: Path, folder: Path, bias: float) -> Fluency:
    """FENSE's detector with a last output that is `bias` for every sentence."""
    from transformers import AutoModel

    state = {f"encoder.{k}": v for k, v in AutoModel.from_pretrained(encoder).state_dict().items()}
    state |= {"clf.weight": torch.zeros(6, 16), "clf.bias": torch.tensor([0, 0, 0, 0, 0, bias])}
    path = encoder.parent / f"echecker{bias:g}.ckpt"
    torch.save({"model_type": "somebody/tiny", "num_classes": 6, "state_dict": state}, path)
    return Fluency(path)


def test_similarity_fluency_and_fense_are_three_numbers(encoder, tmp_path):
    rows = [
        Row("1", "t", "?", (), ("a dog barks", "the dog barks"), "a dog barks"), Row("2", "t", "?", (), ("a cat",), ""),
        Row("3", "t", "?", (), ("a cat",), None),
    ]  # fmt: skip
    embed = Embedder(encoder)
    near = float((embed(["a dog barks"]) @ embed(["a dog barks", "the dog barks"]).T).mean())
    plain = captions(rows, embed, None)
    assert list(plain.numbers) == ["similarity", "word_f1"]
    assert plain.numbers["similarity"].value == pytest.approx(near / 3, abs=1e-6)
    assert "tiny" in plain.scorer
    broken = captions(rows, embed, fluency(encoder, tmp_path, 9.0))
    assert broken.numbers["fluency_error"].value == 1
    assert broken.numbers["fense"].value == pytest.approx(near / 3 / 10, abs=1e-6)
    fine = captions(rows, embed, fluency(encoder, tmp_path, -9.0))
    assert fine.numbers["fluency_error"].value == pytest.approx(2 / 3)  # of nothing said
    assert fine.numbers["fense"].value == pytest.approx(near / 3, abs=1e-6)
    assert list(captions(rows, None, None).numbers) == ["word_f1"]


def test_a_sentence_model_of_unknown_parts_is_refused(encoder, tmp_path):
    folder = tmp_path / "st"
    shutil.copytree(encoder, folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    parts = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    parts.append({"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"})
    (folder / "modules.json").write_text(json.dumps(parts))
    assert (
        Embedder(folder)(["a dog"]) - Embedder(encoder)(["a dog"])
    ).abs().max() > 1e-3  # the first token, not the mean
    parts.append({"path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(parts))
    with pytest.raises(UserError, match="its part Dense is not understood"):
        Embedder(folder)
    with pytest.raises(UserError, match=r"no config\.json there"):
        Embedder(tmp_path)


class Endpoint(http.server.BaseHTTPRequestHandler):
    """A judge that likes the first of two, and answers with "right" in them."""

    asked: ClassVar[list[dict]] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body | {"path": self.path, "key": self.headers.get("Authorization")})
        text = body["messages"][1]["content"]
        if "unreadable" in text:
            reply = "Both are fine."
        else:
            answers = [text.split(f"[Answer {k}]\n")[1].split(f"\n[End of answer {k}]")[0] for k in (1, 2)]
            first, second = (6 if "right" in a else 2 for a in answers)
            reply = f"{first + 2} {second}"
        data = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint():
    Endpoint.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_a_judge_is_asked_in_both_orders_and_named(endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    rows = [
        Row("1", "t", "What?", (), ("right, says the reference",), "right too"),
        Row("2", "t", "What {first}?", (), ("right, says the reference",), "wrong"),
        Row("3", "t", "What?", (), ("right, says the reference",), ""),
        Row("4", "t", "What?", (), ("right, says the reference",), "unreadable"),
    ]  # fmt: skip
    scored = Judge(endpoint, "some-judge", tmp_path / "judged.jsonl")(rows)
    assert "some-judge" in scored.scorer
    # (6 + 8) / 2 and (2 + 4) / 2 of 10, an empty one 0; the unread one is left out and counted
    assert scored.numbers["judged"].value == pytest.approx((7 + 3 + 0) / 30)
    assert scored.numbers["beside_reference"].value == pytest.approx((7 + 3 + 0) / (7 + 7 + 10))
    one_row = Judge(endpoint, "some-judge", tmp_path / "judged.jsonl")(rows[1:2])
    assert one_row.numbers["judged"].value == pytest.approx(3 / 10)  # not the reference's
    assert scored.numbers["first_wins"].value == pytest.approx(3 / 4)
    assert scored.counts == {"unjudged": 1}
    assert len(Endpoint.asked) == 6  # nobody is asked about nothing
    assert {a["path"] for a in Endpoint.asked} == {"/v1/chat/completions"}
    assert {a["key"] for a in Endpoint.asked} == {"Bearer secret"}
    assert {a["model"] for a in Endpoint.asked} == {"some-judge"}
    one, other = (a["messages"][1]["content"] for a in Endpoint.asked[2:4])
    assert one.index("wrong") > one.index("[Answer 2]")
    assert other.index("wrong") < other.index("[Answer 2]")
    assert "What {first}?" in one
    again = Judge(endpoint, "some-judge", tmp_path / "judged.jsonl")(rows)
    assert len(Endpoint.asked) == 6  # kept
    assert again.numbers["judged"].value == scored.numbers["judged"].value
    assert "secret" not in (tmp_path / "judged.jsonl").read_text()


def test_a_judge_that_is_not_there_or_not_named_is_said(tmp_path):
    row = Row("1", "t", "What?", (), ("x",), "y")
    with pytest.raises(UserError, match=r"judge m at http://127\.0\.0\.1:9/v1 does not answer"):
        Judge("http://127.0.0.1:9/v1/", "m", tmp_path / "judged.jsonl")([row])
    with pytest.raises(UserError, match="judge_model=NAME"):
        Judge("http://127.0.0.1:9/v1", "", tmp_path / "judged.jsonl")


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("8 7", (8, 7)), ("8, 7", (8, 7)), (" 8.5\n7 ", (8.5, 7)), ("8/10 7/10", (8, 7)), ("8 7.", (8, 7)), ("8", None),
        ("11 3", None), ("0 3", None), ("Answer 1: 8", None), ("1: 8, 2: 7", None), ("", None), ("8 7 6", None),
    ],
)  # fmt: skip
def test_scores_of_a_judge_are_read_strictly(reply, scores):
    assert scores_of(reply) == scores


def test_date_runs_in_a_process_of_its_own_or_says_how(tmp_path, monkeypatch):
    rows = [Row("mecat_content_long/abc_0_10.flac", "t", "?", (), ("x",), "a dog")]
    with pytest.raises(UserError, match=r"No module named 'mecat'.*pip install git\+https"):
        date(sys.executable, "long", rows)
    with pytest.raises(UserError, match="does not run"):
        date(str(tmp_path / "python"), "long", rows)
    # the package's own call and the columns of its table, as its README and evaluate.py write them
    (tmp_path / "mecat.py").write_text(
        "class Table:\n"
        "    def to_json(self, orient):\n"
        "        assert orient == 'records'\n"
        '        return \'[{"subtask": "content_long", "num_samples": 1, "date": 0.5}]\'\n'
        "def evaluate(predicted_data, task, metrics):\n"
        "    assert (task, metrics) == ('caption', ['date'])\n"
        "    assert predicted_data == {'long': {'abc_0_10': 'a dog'}}\n"
        "    print('said on the way')\n"
        "    return Table()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert date(sys.executable, "long", rows) == {"content_long": 0.5}
