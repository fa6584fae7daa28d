"""What an audit says of a run: nothing of an honest one, and the fault of every other."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from midasheng import config
from midasheng.config import UserError
from midasheng.data import plan
from midasheng.data.audit import RunLedger
from midasheng.data.ledger import Steps, encode, frames_of, read_ledger
from midasheng.data.room import DataRoom, read_data
from stages import audit as verb
from tests.conftest import run_stage


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """A stage of 6 steps on two corpora, checkpoints every 2."""
    runs = tmp_path_factory.mktemp("audited")
    run_stage("stage1_align", tiny, runs)
    return run_stage("stage2_pretrain", tiny, runs, run__length="6 steps", log__checkpoint_every=2)


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A copy of the run to spoil: its ledger and config, without weights."""
    for name in ("config.yaml", "skipped.jsonl", "ledger/rank0.bin", "ledger/states.jsonl"):
        if (run / name).is_file():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes((run / name).read_bytes())
    return tmp_path


def room(folder: Path) -> DataRoom:
    return read_data(config.of_run(folder / "config.yaml"), make=False)


def opened(folder: Path) -> RunLedger:
    data = room(folder)
    return RunLedger(folder, data.planner(0), data.corpora)


def change(folder: Path, number: int, **columns: np.ndarray) -> None:
    """Write one frame of the ledger anew."""
    path = folder / "ledger/rank0.bin"
    frames = list(read_ledger(folder))
    frames[number] = frames[number]._replace(**columns)
    path.write_bytes(b"".join(map(encode, frames)))


def test_an_honest_run_has_no_fault_and_its_sums_are_those_of_what_was_trained(run):
    found = opened(run).audit()
    assert found.faults == []
    assert found.text().endswith("no sample twice, none lost, no held-out record")
    assert (found.steps, found.checked_keys) == (6, 6)
    data = room(run)
    planner = data.planner(0)
    planned = [p for _ in range(6) for pack in next(planner).packs for p in pack]
    assert sum(c.samples for c in found.corpora.values()) == len(planned)
    assert sum(c.targets for c in found.corpora.values()) == sum(p.targets for p in planned)
    assert sum(c.hours for c in found.corpora.values()) == pytest.approx(sum(p.frames for p in planned) / 25 / 3600)
    for number, corpus in enumerate(data.corpora):
        mine = found.corpora[corpus.card.name]
        assert mine.samples == sum(p.corpus == number for p in planned)
        assert mine.epochs == mine.samples / len(corpus)
        assert mine.asked == pytest.approx(data.mix.percent[number])


def test_a_sample_trained_on_twice(copy):
    """Once within a frame, once in two steps that a resume did again."""
    first = next(read_ledger(copy))
    rows = first.rows.copy()
    rows[1] = rows[0]
    change(copy, 0, rows=rows)
    faults = "\n".join(opened(copy).audit().faults)
    assert "1 used more than once" in faults
    assert "1 used never, though it was drawn" in faults
    assert "step 0: other records were read than the plan names" in faults


def test_steps_that_were_trained_twice_after_a_resume(copy):
    path = copy / "ledger/rank0.bin"
    (end, *_), *_ = frames_of(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:end] + whole)
    assert "used more than once" in "\n".join(opened(copy).audit().faults)


def test_steps_that_a_resume_skipped(copy):
    path = copy / "ledger/rank0.bin"
    first, second, _ = (end for end, *_ in frames_of(path))
    whole = path.read_bytes()
    path.write_bytes(whole[:first] + whole[second:])
    faults = "\n".join(opened(copy).audit().faults)
    assert "2 steps are not in the ledger, step 2 first" in faults
    assert "used never, though it was drawn" in faults


def test_samples_that_the_plan_has_not_drawn(copy):
    first = next(read_ledger(copy))
    data = room(copy)
    rows = np.concatenate([first.rows, [[0, 99, 3, 1]]])
    samples = first.samples.copy()
    samples[-1] += 1
    change(copy, 0, rows=rows, samples=samples)
    assert f"{data.corpora[0].card.name}, epoch 99: 1 used though it was not drawn yet" in "\n".join(
        opened(copy).audit().faults
    )


def test_other_records_than_planned(copy):
    """The plan names them, but the loader has read others: only the keys' checksum can tell."""
    first = next(read_ledger(copy))
    checksum = first.checksum.copy()
    checksum[1] ^= 1
    change(copy, 0, checksum=checksum)
    assert opened(copy).audit().faults == ["step 1: other records were read than the plan names"]


def test_holes_are_counted_and_are_no_fault(copy):
    first = next(read_ledger(copy))
    ledger = opened(copy)
    keys = ledger.keys(first.rows)
    rows = first.rows.copy()
    rows[0, 3] = 0
    n = int(first.samples[0])
    import zlib

    now = 0
    for key in keys[1:n]:
        now = zlib.crc32(key.encode(), now)
    change(copy, 0, rows=rows, checksum=np.array([now, *first.checksum[1:]]))
    found = opened(copy).audit()
    assert found.faults == []
    assert sum(c.holes for c in found.corpora.values()) == 1
    assert any("not trained on" in line for line in opened(copy).of_step(0))


def test_what_fits_no_pack_is_passed_over_and_not_lost(tiny, tmp_path, monkeypatch):
    """Long clips that fit no pack are drawn, passed over, and accounted for, also over a resume."""
    monkeypatch.setattr(plan, "LEAST_FIT", 0.5)
    folder = run_stage(
        "stage1_align", tiny, tmp_path, run__length="8 steps", log__checkpoint_every=3, batch__kind="throughput",
        batch__pack_slots=150, batch__pack_frames=40, batch__packs_per_step=2,
    )  # fmt: skip
    found = opened(folder).audit()
    assert found.faults == []
    assert found.passed_over > 0


def test_a_held_out_record_that_another_card_of_the_same_shards_trains_on(run):
    """Two cards with different held-out rules: what one validates on the other trains on."""
    data = room(run)
    other = data.corpora[1]
    loose = replace(other.card, name="loose", held_out=replace(other.card.held_out, share=1.0, max=30))
    from midasheng.data.index import open_corpus

    reading = replace(other.reading, card=loose)
    corpus = open_corpus(reading, config.of_run(run / "config.yaml").data.root, other.folder, 30.0, make=True)
    assert len(corpus.held_out_places() - other.held_out_places()) > 0
    faults = opened(run).audit([corpus]).faults
    assert faults
    assert all("held-out records used" in fault for fault in faults)


def test_the_samples_of_a_step_and_the_uses_of_a_key(run):
    ledger, data = opened(run), room(run)
    planner = data.planner(0)
    steps = [next(planner) for _ in range(6)]
    for step in (0, 3, 5):
        names = sorted(
            f"{data.corpora[p.corpus].card.name}/{data.corpora[p.corpus].key(p.record)}  epoch {p.epoch}"
            for pack in steps[step].packs for p in pack
        )  # fmt: skip
        assert ledger.of_step(step) == names
    assert ledger.of_step(6) == []
    p = steps[4].packs[0][0]
    name, key = data.corpora[p.corpus].card.name, data.corpora[p.corpus].key(p.record)
    assert f"{name}/{key}  step 4  epoch {p.epoch}" in ledger.of_key(f"{name}/{key}")
    uses = sum(q.corpus == p.corpus and q.record == p.record for step in steps for pack in step.packs for q in pack)
    assert len(ledger.of_key(f"{name}/{key}")) == uses
    assert set(ledger.of_key(f"{name}/{key}")) <= set(ledger.of_key(key))
    with pytest.raises(UserError, match="no training record has the key nobody"):
        ledger.of_key("nobody")


def test_asked_shares_follow_the_changes_of_the_mix(copy):
    states = copy / "ledger/states.jsonl"
    lines = [json.loads(line) for line in states.read_text().splitlines()]
    lines[-1]["plan"]["events"] = [[3, [10.0, 90.0]]]  # the second half of six steps
    states.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = [c.asked for c in opened(copy).audit().corpora.values()]
    before = room(copy).mix.percent
    assert asked == pytest.approx([(before[0] + 10) / 2, (before[1] + 90) / 2])


def test_data_that_are_no_longer_those_of_the_run_are_refused(copy):
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("run.seed: 0", "run.seed: 1"))
    data = room(copy)
    with pytest.raises(UserError, match="seed was 0 and is 1"):
        RunLedger(copy, data.planner(1), data.corpora)


def test_the_verb(run, copy, monkeypatch, capsys):
    def said(*more: str, name: str = run.name, runs: Path = run.parent.parent) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["audit", "--runs", str(runs), "--name", name, *more])
        status = verb.main()
        out = capsys.readouterr()
        return status, out.out + out.err

    status, text = said()
    assert (status, "no sample twice, none lost, no held-out record" in text) == (0, True)
    assert json.loads((run / "audit.json").read_text())["faults"] == []
    assert said("--step", "2")[1].splitlines() == opened(run).of_step(2)
    status, text = said(name="nothing")
    assert status == 2
    assert "runs there: stage1_align, stage2_pretrain" in text
    spoilt = copy / "runs/mini/spoilt"
    (spoilt / "ledger").mkdir(parents=True)
    for name in ("config.yaml", "ledger/rank0.bin", "ledger/states.jsonl"):
        (spoilt / name).write_bytes((copy / name).read_bytes())
    part = next(read_ledger(copy))
    (spoilt / "ledger/rank0.bin").write_bytes(encode(Steps(part.step, part.samples, part.checksum, part.rows)))
    status, text = said(name="spoilt", runs=copy / "runs")
    assert status == 1
    assert "FAULT" in text
