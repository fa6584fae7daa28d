"""Killed again and again, on other numbers of processes and workers, a run is the unbroken one; see soak.py."""

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from midasheng.data.room import read_data
from midasheng.train import checkpoint
from midasheng.train.meter import read_metrics
from tests.conftest import Tiny, ledger_rows
from tests.train import soak

ROOT = Path(__file__).parent.parent.parent


def soaked(tiny: Tiny, folder: Path, rounds: int, seed: int, strategy: str = "ddp") -> str:
    """Runs soak.py, then holds its two runs against each other and against the plan; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.soak", str(folder), str(rounds), str(seed), strategy, str(tiny.root)],
        cwd=ROOT, capture_output=True, text=True, timeout=3000, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    whole, killed = folder / "whole" / soak.RUN, folder / "killed" / soak.RUN
    steps = (rounds + 1) * soak.EVERY
    order = soak.order(tiny, folder / "killed", steps)
    data = read_data(order.stage, make=False)
    aside = next(
        (number, record) for number, corpus in enumerate(data.corpora) for record in range(len(corpus))
        if f"{corpus.card.name}/{corpus.key(record)}\n" == (killed / soak.FILE).read_text()
    )  # fmt: skip
    planned = {
        step.number: sorted(
            (s.corpus, s.epoch, s.position, int((s.corpus, s.record) != aside)) for pack in step.packs for s in pack
        )
        for step in itertools.islice(data.planner(order.stage.run.seed), steps)
    }
    assert any(not row[3] for rows in planned.values() for row in rows)  # the quarantined sample was to come
    assert ledger_rows(killed) == ledger_rows(whole) == planned
    skipped = [
        sorted(line for path in (run / "skipped.jsonl", *run.glob("ledger/*.jsonl")) if path.name != "states.jsonl"
               for line in path.read_text().splitlines())
        for run in (killed, whole)
    ]  # fmt: skip
    assert skipped[0] == skipped[1]
    for a, b in zip(read_metrics(killed / "metrics.jsonl"), read_metrics(whole / "metrics.jsonl"), strict=True):
        assert (a["step"], a.get("targets"), a.get("lr")) == (b["step"], b.get("targets"), b.get("lr"))
        assert a.get("loss", a.get("val_loss")) == pytest.approx(b.get("loss", b.get("val_loss")), rel=1e-5)
    events = [json.loads(line) for line in (killed / "events.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events if e["event"] in ("start", "handed off")] == ["start", "handed off"]
    assert sum(f"round {n}:" in done.stdout for n in range(rounds)) == rounds
    assert not list(killed.rglob("*.part"))
    return done.stdout


def test_in_the_same_world_a_killed_run_is_the_unbroken_one_bit_for_bit(tiny, tmp_path):
    """On four processes gradients are summed in an order that hangs on where they lie in DDP's buckets, which it puts
    together anew behind the first step of every process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.soak", str(tmp_path), "world=4", str(tiny.root)],
        cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    whole, killed = tmp_path / "whole" / soak.RUN, tmp_path / "killed" / soak.RUN
    assert read_metrics(killed / "metrics.jsonl") == read_metrics(whole / "metrics.jsonl")
    a, b = (checkpoint.read(run / "checkpoints" / checkpoint.LAST) for run in (whole, killed))
    for kind in ("learned", "optimizer"):
        ours, theirs = dict(flat(a[kind])), dict(flat(b[kind]))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(t, theirs[n]) for n, t in ours.items())
        assert ours


def flat(tree: dict, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}/")
        elif isinstance(value, torch.Tensor):
            yield prefix + name, value


def test_three_kills_on_other_numbers_of_processes_leave_the_unbroken_run(tiny, tmp_path):
    soaked(tiny, tmp_path, rounds=3, seed=0)


@pytest.mark.slow
def test_kills_on_other_numbers_of_processes_that_share_leave_the_unbroken_run(tiny, tmp_path):
    """1, 2 and 4 processes read each other's shards; whatever was being written when one died."""
    print(soaked(tiny, tmp_path, rounds=6, seed=2, strategy="fsdp"))


@pytest.mark.slow
def test_twenty_kills_leave_the_unbroken_run(tiny, tmp_path):
    print(soaked(tiny, tmp_path, rounds=20, seed=1))
