"""The ledger holds every trained sample once, in about a byte, and only whole; it stops a run on rotten data."""

import contextlib
import json
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from midasheng.data.index import Columns
from midasheng.data.ledger import Ledger, RottenCorpus, Skipped, Steps, drop_after, encode, frames_of, read_ledger, trim
from midasheng.data.manifest import Card
from midasheng.data.plan import Budget, Planner
from tests.conftest import Row, ledger_rows
from tests.data.test_loader import Room, replace_shards, spoil_one

NAMES = ("a", "b")


def bad(count: int, corpus: str = "a", reason: str = "undecodable") -> list[Skipped]:
    return [Skipped(corpus, f"key{n}", reason) for n in range(count)]


def rows(good: int = 0, holes: int = 0, corpus: int = 0, start: int = 0) -> np.ndarray:
    """Rows as in StepBatch.trained: so many that were trained on, then so many holes."""
    return np.asarray(
        [(corpus, 0, start + n, int(n < good)) for n in range(good + holes)], dtype=np.int64
    ).reshape(-1, 4)  # fmt: skip


def state(done: int) -> dict[str, Any]:
    return {"step": done}


@pytest.fixture
def ledger(tmp_path):
    """A ledger whose corpus `a` has a million records."""
    made = Ledger(tmp_path, 0, NAMES)
    made.indexed("a", 1_000_000, {}, [])
    return made


# -- the file ------------------------------------------------------------------------------------------------------------


def drawn(seed: int) -> list[tuple[int, np.ndarray, int]]:
    """(step, rows, checksum) of some steps, as wild as they may come: many corpora, epochs, jumps back, holes, nothing."""
    rng = np.random.default_rng(seed)
    corpora = int(rng.choice([1, 3, 60, 1000]))
    highest = int(rng.choice([2, 100, 2**20, 2**45]))
    made = []
    for number in range(int(rng.integers(0, 1000)), int(rng.integers(1001, 1020))):
        n = int(rng.choice([0, 1, 50]))
        made.append((number, np.stack([
            rng.integers(0, corpora, n), rng.integers(0, rng.choice([1, 5, 10**6]), n), rng.integers(0, highest, n),
            rng.integers(0, 2, n),
        ], axis=1), int(rng.integers(0, 2**32))))  # fmt: skip
    return made[-30:]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_read_is_what_was_written(tmp_path, seed):
    steps, rng = drawn(seed), random.Random(seed)
    for rank in (0, 1):
        made = Ledger(tmp_path, rank, [f"c{n}" for n in range(1000)])
        for number, trained, checksum in steps[rank::2]:
            made.step(number, trained, checksum, [])
            if rng.random() < 0.3:
                made.flush(state(number + 1))
        made.flush(state(steps[-1][0] + 1))
    found = list(read_ledger(tmp_path))
    for rank in (0, 1):
        mine = [s for s in found if s.step[0] % 2 == steps[rank][0] % 2]
        assert np.concatenate([s.step for s in mine]).tolist() == [n for n, *_ in steps[rank::2]]
        assert np.concatenate([s.samples for s in mine]).tolist() == [len(t) for _, t, _ in steps[rank::2]]
        assert np.concatenate([s.checksum for s in mine]).tolist() == [c for *_, c in steps[rank::2]]
        assert np.array_equal(np.concatenate([s.rows for s in mine]), np.concatenate([t for _, t, _ in steps[rank::2]]))


class Simulated:
    """What the plan asks of a corpus: `n` records in shards of 1,000, with lengths like those of speech."""

    def __init__(self, name: str, n: int) -> None:
        self.card = Card(name, "asr", "", "none")
        self.counts = np.full(n // 1000, 1000)
        self.summary = SimpleNamespace(mean_slots=60.0, mean_frames=150.0, fingerprint=name)

    def columns(self, shard: int) -> Columns:
        rng = np.random.default_rng([shard, len(self.card.name)])
        seconds = np.clip(rng.lognormal(1.6, 0.7, 1000), 0.3, 30)
        return Columns(
            (seconds * 16_000).astype(int),
            np.arange(1, 1001),
            rng.integers(20, 60, 1000),
            np.full(1000, 9),
            np.zeros(1000, int),
        )


def test_a_sample_costs_about_a_byte(tmp_path):
    """A run of a billion samples keeps its ledger in a gigabyte, not in tens of them."""
    sizes = (2_000_000, 600_000, 100_000, 20_000, 1_000)
    plan = Planner([Simulated(f"c{n}", n) for n in sizes], (40.0, 30.0, 15.0, 8.0, 7.0), Budget(8192, 20_000, 4), 0)
    made = Ledger(tmp_path, 0, [c.card.name for c in plan.corpora])
    expected: list[Row] = []
    for step in islice(plan, 100):
        samples = [(p.corpus, p.epoch, p.position, 1) for pack in step.packs for p in pack]
        made.step(step.number, np.asarray(samples), step.digest, [])
        expected += samples
    made.flush(plan.state())
    (found,) = read_ledger(tmp_path)
    assert [tuple(r) for r in found.rows.tolist()] == expected
    each = made.path.stat().st_size / len(expected)
    print(f"{each:.3f} bytes a sample, {len(expected)} samples in 100 steps")
    assert len(expected) > 20_000
    assert any(epoch for _, epoch, *_ in expected)
    assert each < 1.5


def test_many_ranks_write_what_one_would(tmp_path):
    """A rank's part of a step has gaps where the packs of others lie."""
    plan = Planner([Simulated("c", 50_000), Simulated("d", 9_000)], (60.0, 40.0), Budget(4096, 9_000, 5), 0)
    ranks = [Ledger(tmp_path, rank, ("c", "d")) for rank in range(3)]
    expected = {}
    for step in islice(plan, 20):
        for rank, made in enumerate(ranks):
            mine = [(p.corpus, p.epoch, p.position, 1) for _, pack in step.share(rank, 3) for p in pack]
            made.step(step.number, np.asarray(mine).reshape(-1, 4), 0, [])
        expected[step.number] = sorted((p.corpus, p.epoch, p.position, 1) for pack in step.packs for p in pack)
        if step.number % 7 == 0:
            for made in ranks:
                made.flush(step.state_after)
    for made in ranks:
        made.flush(plan.state())
    assert ledger_rows(tmp_path) == expected


def three_frames(folder: Path, rank: int = 0) -> list[int]:
    """Frames of steps 0-3, 4-7 and 8-11, five samples each; returns where each frame ends."""
    made = Ledger(folder, rank, NAMES)
    ends = []
    for number in range(12):
        made.step(number, rows(4, 1, corpus=number % 2, start=5 * number), number, bad(1, NAMES[number % 2]))
        if number % 4 == 3:
            made.flush(state(number + 1))
            ends.append(made.path.stat().st_size)
    return ends


def test_a_torn_last_frame_is_not_there(tmp_path):
    ends = three_frames(tmp_path)
    path = tmp_path / "ledger/rank0.bin"
    whole = path.read_bytes()
    for cut in range(ends[1], ends[2]):
        path.write_bytes(whole[:cut])
        assert list(ledger_rows(tmp_path)) == list(range(8))
    path.write_bytes(whole[: ends[2] - 1])
    trim(tmp_path, 8)  # a resume: what is written behind a torn frame must be read again
    again = Ledger(tmp_path, 0, NAMES)
    again.step(8, rows(3), 0, [])
    again.flush(state(9))
    assert ledger_rows(tmp_path)[8] == [(0, 0, n, 1) for n in range(3)]


def test_a_flipped_byte_is_noticed(tmp_path):
    """Nothing that is read is ever false: of a damaged frame, nothing is."""
    ends = three_frames(tmp_path)
    path = tmp_path / "ledger/rank0.bin"
    whole, expected = path.read_bytes(), ledger_rows(tmp_path)
    fewer = 0
    for place in range(ends[0], ends[1]):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x20]) + whole[place + 1 :])
        found = ledger_rows(tmp_path)
        assert {n: expected[n] for n in found} == found
        assert set(range(4)) <= set(found)
        fewer += len(found) < 12
    assert fewer >= ends[1] - ends[0] - 16  # all but the two step numbers in a frame's head


def test_trim_cuts_inside_a_frame_exactly_at_the_step(tmp_path):
    three_frames(tmp_path)
    whole = ledger_rows(tmp_path)
    for step in (11, 8, 6, 5, 4, 1, 0):
        trim(tmp_path, step)
        assert ledger_rows(tmp_path) == {n: whole[n] for n in range(step)}
    assert (tmp_path / "ledger/rank0.bin").stat().st_size == 0


def test_trim_reaches_every_file_of_every_rank(tmp_path):
    """Ranks that the new world lacks would bring their steps a second time."""
    for rank in (0, 1, 7):
        three_frames(tmp_path, rank)
    trim(tmp_path, 6)
    for path in (tmp_path / "ledger").glob("*.bin"):
        frames = [(first, last) for _, first, last, _ in frames_of(path)]
        assert frames == [(0, 3), (4, 5)], path
    for path, steps in {
        "skipped.jsonl": range(6), "ledger/skipped-rank1.jsonl": range(6), "ledger/skipped-rank7.jsonl": range(6),
        "ledger/states.jsonl": [3],
    }.items():  # fmt: skip
        assert [json.loads(line)["step"] for line in (tmp_path / path).read_text().splitlines()] == list(steps), path


def test_a_state_lies_behind_each_flush_and_of_the_first_rank_only(tmp_path):
    three_frames(tmp_path)
    three_frames(tmp_path, 1)
    lines = [json.loads(line) for line in (tmp_path / "ledger/states.jsonl").read_text().splitlines()]
    assert lines == [{"step": n - 1, "plan": {"step": n}} for n in (4, 8, 12)]


def test_nothing_is_written_between_flushes(tmp_path, ledger):
    """A frame a step would cost more than its samples; and what no checkpoint covers is trained again anyway."""
    ledger.step(0, rows(3), 0, [])
    assert list(read_ledger(tmp_path)) == []
    ledger.flush(state(1))
    ledger.flush(state(1))
    assert ledger_rows(tmp_path) == {0: [(0, 0, n, 1) for n in range(3)]}


def test_a_frame_is_the_same_whoever_wrote_it():
    steps = Steps(
        np.asarray([3, 4]), np.asarray([2, 1]), np.asarray([9, 8]), np.concatenate([rows(2), rows(1, start=7)])
    )
    assert encode(steps) == encode(Steps(*(s.copy() for s in steps)))


# -- stop rules ----------------------------------------------------------------------------------------------------------


def test_a_hundred_bad_ones_in_a_row_stop_the_run(ledger):
    ledger.step(0, rows(holes=60), 0, bad(60))
    with pytest.raises(RottenCorpus, match=r"corpus a: 100 bad records in a row, the last one key39 \(undecodable\)"):
        ledger.step(1, np.concatenate([rows(3, corpus=1), rows(holes=40)]), 0, bad(40))


def test_a_good_one_begins_a_new_row(ledger):
    for number in range(4):
        ledger.step(number, rows(1, 60), 0, bad(60))
    ledger.step(4, rows(holes=99), 0, bad(99))
    assert ledger.reasons["a", "undecodable"] == 339


def test_a_good_one_of_another_corpus_does_not(ledger):
    ledger.step(0, rows(holes=99), 0, bad(99))
    with pytest.raises(RottenCorpus, match="100 bad records in a row"):
        ledger.step(1, np.concatenate([rows(5, corpus=1), rows(holes=1)]), 0, bad(1))


def test_over_one_percent_bad_stops_the_run(tmp_path):
    made = Ledger(tmp_path, 0, NAMES)
    made.indexed("a", 1900, {}, [])
    made.step(0, rows(10, 19), 0, bad(19))  # 1 %, but fewer than 20
    with pytest.raises(RottenCorpus, match="20 bad records out of 1940"):
        made.step(1, rows(10, 1), 0, bad(1))


def test_one_percent_is_not_over_it(tmp_path):
    made = Ledger(tmp_path, 0, NAMES)
    made.indexed("a", 1980, {}, [])
    made.step(0, rows(0, 20), 0, bad(20))
    with pytest.raises(RottenCorpus, match="21 bad records out of 2001"):
        made.step(1, rows(0, 1), 0, bad(1))


def test_what_is_left_out_on_purpose_is_not_bad(ledger):
    ledger.step(0, rows(1), 0, bad(500, reason="fits no pack") + bad(500, reason="too long"))
    assert ledger.summary() == "a: fits no pack 500; a: too long 500"


def test_a_shard_that_went_away_is_bad_data(ledger):
    with pytest.raises(RottenCorpus, match=r"the last one key99 \(shard gone\)"):
        ledger.step(0, rows(holes=100), 0, bad(100, reason="shard gone"))


def test_index_time_skips(tmp_path):
    """They stop the run by share only: nobody knows whether they lay in a row."""
    made = Ledger(tmp_path / "1", 0, NAMES)
    made.indexed("a", 1_000_000, {"undecodable": 5000}, bad(5000))
    made.step(0, rows(holes=99), 0, bad(99))
    assert len((tmp_path / "1/skipped.jsonl").read_text().splitlines()) == 5099
    Ledger(tmp_path / "2", 0, NAMES).indexed("a", 1980, {"undecodable": 20, "too long": 5000}, [])
    Ledger(tmp_path / "2", 0, NAMES).indexed("a", 10, {"too long": 5000}, [])
    with pytest.raises(RottenCorpus, match=r"20 bad records out of 1020, the last one the index \(undecodable\)"):
        Ledger(tmp_path / "3", 0, NAMES).indexed("a", 1000, {"undecodable": 20}, [])


# -- resumes -------------------------------------------------------------------------------------------------------------


def test_resume_drops_what_is_trained_again_and_counts_the_rest(tmp_path, ledger):
    ledger.indexed("b", 10, {"too short": 1}, [Skipped("b", "x", "too short")])
    for number in range(4):
        ledger.step(number, rows(2, 1, start=3 * number), 0, [Skipped("a", f"line\u2028break{number}", "undecodable")])
    ledger.flush(state(4))
    with ledger.skipped.open("ab") as file:
        file.write(json.dumps({"step": 1, "key": "ä"}, ensure_ascii=False).encode()[:-3])  # killed while writing
    trim(tmp_path, 2)
    again = Ledger(tmp_path, 0, NAMES)
    again.indexed("b", 10, {"too short": 1}, [])
    assert again.summary() == "a: undecodable 2; b: too short 1"
    assert (again.seen["a"], again.bad["a"]) == (6, 2)
    again.step(2, rows(2, start=6), 0, [])
    again.flush(state(3))
    assert list(ledger_rows(tmp_path)) == [0, 1, 2]
    assert [json.loads(line)["step"] for line in again.skipped.read_text().strip().split("\n")] == [-1, 0, 1]


def test_the_stop_rule_counts_on_after_a_resume(tmp_path):
    """Nineteen, a resume, one more: a run that is stopped every hour would never find its corpus rotten."""
    first = Ledger(tmp_path, 0, NAMES)
    first.indexed("a", 1900, {}, [])
    first.step(0, rows(10, 19), 0, bad(19))
    first.flush(state(1))
    trim(tmp_path, 1)
    again = Ledger(tmp_path, 0, NAMES)
    again.indexed("a", 1900, {}, [])
    assert (again.seen["a"], again.bad["a"]) == (1929, 19)
    with pytest.raises(RottenCorpus, match="20 bad records out of 1940"):
        again.step(1, rows(10, 1), 0, bad(1))


def test_bad_records_of_before_a_resume_are_not_in_a_row(tmp_path):
    """The good ones between them are not listed."""
    first = Ledger(tmp_path, 0, NAMES)
    first.indexed("a", 1_000_000, {}, [])
    for number in range(99):
        first.step(number, rows(1, 1, start=2 * number), 0, bad(1))
    first.flush(state(99))
    again = Ledger(tmp_path, 0, NAMES)
    again.indexed("a", 1_000_000, {}, [])
    again.step(99, rows(0, 1), 0, bad(1))
    assert again.bad["a"] == 100


def test_other_ranks_write_their_own_files(tmp_path):
    made = Ledger(tmp_path, 3, NAMES)
    made.step(0, rows(1, 1), 0, bad(1))
    made.flush(state(1))
    assert sorted(p.name for p in (tmp_path / "ledger").iterdir()) == ["rank3.bin", "skipped-rank3.jsonl"]
    assert not (tmp_path / "skipped.jsonl").exists()
    assert ledger_rows(tmp_path) == {0: [(0, 0, 0, 1), (0, 0, 1, 0)]}


def test_drop_after_without_a_file(tmp_path):
    drop_after(tmp_path / "none.jsonl", 3)
    assert not (tmp_path / "none.jsonl").exists()


def test_a_death_while_lines_are_dropped_loses_none_of_those_before(tmp_path):
    """A disk that is full, or a kill -9, in the middle of a resume's first act."""
    three_frames(tmp_path)
    before = (tmp_path / "skipped.jsonl").read_text()

    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        trim(tmp_path, 8)

    process = multiprocessing.get_context("fork").Process(target=no_room)
    process.start()
    process.join()
    assert process.exitcode
    after = (tmp_path / "skipped.jsonl").read_text()
    assert after
    assert before.startswith(after)
    assert after.count("\n") >= 8


# -- kill -9 -------------------------------------------------------------------------------------------------------------


LENGTH, EVERY, KILLS = 450, 3, 20


def train(data: Room, folder: Path, world: int, workers: int) -> None:
    """A run of LENGTH steps as train/module.py makes it, without a model: from the saved state, or from step 0.

    The ranks run in step, as a real step's reduction makes them.
    """
    if multiprocessing.parent_process():
        os.setsid()
    saved = json.loads((folder / "state.json").read_text()) if (folder / "state.json").exists() else None
    trim(folder, saved["step"] if saved else -1)
    ledgers = [Ledger(folder, rank, [c.card.name for c in data.corpora]) for rank in range(world)]
    for made in ledgers:
        for corpus in data.corpora:
            made.indexed(corpus.card.name, 1_000_000, {}, [])  # one bad record of forty would be rotten
    loaders = [data.loader(data.planner(saved), LENGTH, rank=r, world=world, workers=workers) for r in range(world)]
    for batches in zip(*loaders, strict=True):
        for made, batch in zip(ledgers, batches, strict=True):
            made.step(batch.step, batch.trained, batch.checksum, batch.skipped)
        after = batches[0].state_after
        if after["step"] % EVERY == 0:
            for made in ledgers:
                made.flush(after)
                time.sleep(0.005)
            part = folder / "state.part"
            time.sleep(0.02)  # a checkpoint takes its time: most kills come while one is written
            part.write_text(json.dumps(after))
            os.replace(part, folder / "state.json")


def worlds() -> Iterator[tuple[int, int]]:
    """(world, workers), never the same twice running."""
    while True:
        yield from [(1, 0), (2, 1), (3, 0), (1, 3), (2, 2), (5, 0), (3, 1), (1, 2)]


def test_killed_at_any_moment_every_planned_sample_stands_once(tiny_data, chat, tmp_path):
    """SIGKILL 20 times over, to real processes, each resume in another world with other workers."""
    data = Room(replace_shards(tiny_data, tmp_path), chat)
    key, folder, rng = spoil_one(data), tmp_path / "run", random.Random(0)
    fork, tried, reached = multiprocessing.get_context("fork"), worlds(), []
    file = folder / "state.json"
    for kill in range(KILLS):
        before = file.stat().st_mtime_ns if file.exists() else 0
        process = fork.Process(target=train, args=(data, folder, *next(tried)))
        process.start()
        if kill % 3:  # else at any time after its start
            deadline = time.monotonic() + 30
            while process.is_alive() and time.monotonic() < deadline:
                if file.exists() and file.stat().st_mtime_ns != before:
                    break
                time.sleep(0.005)
        time.sleep(rng.random() * 0.2)
        process.kill()  # it alone: its workers end by themselves, or read on for nobody
        process.join()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        assert process.exitcode == -signal.SIGKILL, f"ended before kill {kill}, behind {reached}"
        reached.append(json.loads(file.read_text())["step"] if file.exists() else 0)
    assert len(set(reached)) > KILLS / 2
    train(data, folder, 2, 0)
    planned = {
        s.number: sorted((p.corpus, p.epoch, p.position, int(data.key(p) != key)) for pack in s.packs for p in pack)
        for s in islice(data.planner(), LENGTH)
    }  # fmt: skip
    assert ledger_rows(folder) == planned
    states = [json.loads(line)["step"] for line in (folder / "ledger/states.jsonl").read_text().splitlines()]
    assert states == list(range(EVERY - 1, LENGTH, EVERY))
    lines = [json.loads(t) for f in folder.rglob("skipped*.jsonl") for t in f.read_text().splitlines()]
    holes = [number for number, found in planned.items() for *_, good in found if not good]
    assert sorted(line["step"] for line in lines) == holes
    assert {(line["key"], line["reason"]) for line in lines} == {(key, "undecodable")}
    assert len(holes) > 100
