"""Two ranks that share a model, killed at chosen moments: what is on the disk is whole, and the run goes on; kills.py."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from midasheng.train.meter import read_metrics
from tests.conftest import ledger_rows
from tests.train.soak import RUN
from tests.train.test_same_run import same_weights

ROOT = Path(__file__).parent.parent.parent
KILLED = -9


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    """Both runs, with rows.jsonl."""
    folder = tmp_path_factory.mktemp("kills")
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.kills", str(folder), str(tiny.root)],
        cwd=ROOT, capture_output=True, text=True, timeout=3000, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr
    (folder / "rows.jsonl").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def rows(folder) -> dict[str, dict]:
    """Of each case: exit codes, what the ranks printed, what is there."""
    return {row["case"]: row for row in map(json.loads, (folder / "rows.jsonl").read_text().splitlines())}


@pytest.mark.parametrize(
    ("case", "dead"),
    [
        ("half a shard of one", [1]), ("half a shard of all", [0, 1]), ("shards and no checkpoint", [0]),
        ("shards and half a checkpoint", [0]),
    ],
)  # fmt: skip
def test_ranks_that_are_killed_while_a_checkpoint_is_written_leave_the_former_one_whole(rows, case, dead):
    """And the other rank ends by itself; the case before it resumed from the same one, and removed what was left."""
    row = rows[case]
    assert (row["step"], row["named"]) == (2, "shards-00000002")
    assert [code for rank, code in enumerate(row["codes"]) if rank in dead] == [KILLED] * len(dead)
    assert all(code > 0 for rank, code in enumerate(row["codes"]) if rank not in dead)  # by itself, within some time
    assert "shards-00000004" in row["there"]
    assert "resuming at step 2 of 8" in row["log"]


def test_all_hear_of_a_disk_that_is_full_for_one(rows):
    """Nobody waits for ever; what was written for nothing is taken away."""
    row = rows["full disk of one"]
    assert row["codes"] == [2, 2]
    words = r"error: rank \d \(.*\): rank 1: the checkpoint of step 4 could not be written to .*: .*File too large.*"
    assert len(re.findall(words + r"last.ckpt of step 2 is whole\. Make room", row["log"])) == 1  # rank 0 says it
    assert [name for name in row["there"] if name.startswith("shards-")] == ["shards-00000002"]


@pytest.mark.parametrize(
    ("case", "words"), [("a shard is missing", "is missing"), ("a shard is another", "is not the file that was written")]
)  # fmt: skip
def test_shards_that_are_not_those_of_the_checkpoint_are_refused_by_all(rows, case, words):
    row = rows[case]
    assert row["codes"] == [2, 2]
    assert row["log"].count(f"00001-of-00002.safetensors {words}") == 1  # rank 0 says it
    assert row["untouched"] or case != "a shard is missing"


def test_a_checkpoint_is_written_beside_the_steps_and_holds_its_own(rows):
    """That of step 4 is on the disk two steps later; what goes on from it is the unbroken run (below)."""
    row = rows["slow disk of one"]
    assert KILLED in row["codes"]
    assert (row["step"], row["named"]) == (4, "shards-00000004")
    assert "resuming at step 4 of 8" in rows["one file of weights"]["log"]


@pytest.mark.parametrize(("case", "dead"), [("one file of weights", 0), ("some tensors of weights", 1)])
def test_ranks_that_are_killed_in_the_hand_off_leave_no_weights_and_hand_off_again(rows, case, dead):
    row = rows[case]
    assert row["step"] == 8
    assert row["codes"][dead] == KILLED
    assert row["codes"][1 - dead] >= 0
    assert row["weights"] == ["weights.part"]


def test_a_disk_that_is_full_for_weights_keeps_no_rank_waiting(rows):
    row = rows["full disk for weights"]
    assert row["codes"][0] == 2
    assert row["codes"][1] >= 0
    assert "RuntimeError" not in row["log"]  # of a connection that broke
    assert "weights could not be written" in row["log"]
    assert row["weights"] == []


def test_behind_all_that_the_run_is_the_unbroken_one(rows, folder):
    assert rows["ends"]["codes"] == [0, 0]
    assert rows["ends"]["there"] == ["last.ckpt", "shards-00000008"]
    whole, killed = folder / "whole" / RUN, folder / "killed" / RUN
    assert read_metrics(killed / "metrics.jsonl") == read_metrics(whole / "metrics.jsonl")
    assert ledger_rows(killed) == ledger_rows(whole)
    same_weights(whole, killed)
