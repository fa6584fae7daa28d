"""Two ranks that share a model, killed at chosen moments: what is on the disk is whole, and the run goes on; kills.py."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from midasheng.train.meter import read_metrics
from tests.conftest import Tiny, ledger_rows
from tests.train.soak import RUN
from tests.train.test_same_run import same_weights

ROOT = Path(__file__).parent.parent.parent
KILLED = -9


def run_kills(folder: Path, tiny: Tiny, *kind: str) -> dict[str, dict]:
    """Makes both runs in `folder`; returns of each case exit codes, what the ranks printed, what is there."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.kills", str(folder), str(tiny.root), *kind],
        cwd=ROOT, capture_output=True, text=True, timeout=3000, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr
    return {row["case"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """For both runs."""
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def rows(folder, tiny) -> dict[str, dict]:
    """What happened in each case."""
    return run_kills(folder, tiny)


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
    same_rows_and_weights(folder)


def same_rows_and_weights(folder: Path) -> None:
    whole, killed = folder / "whole" / RUN, folder / "killed" / RUN
    assert read_metrics(killed / "metrics.jsonl") == read_metrics(whole / "metrics.jsonl")
    assert ledger_rows(killed) == ledger_rows(whole)
    same_weights(whole, killed)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_a_disk_that_is_really_full_costs_several_ranks_no_checkpoint(tmp_path, small_disk, tiny, strategy):
    """ENOSPC itself, where a process could be ended by a signal instead: for a checkpoint or its shards, for last.ckpt
    that names them, for what is logged (TensorBoard hides it behind another error), for weights/."""
    rows = run_kills(tmp_path, tiny, strategy)
    last = ["last.ckpt"] + ["shards-00000002"] * (strategy == "fsdp")
    for case in ("checkpoint", "name of shards", "rows")[:: 1 if strategy == "fsdp" else 2]:
        row = rows[case]
        assert (row["step"], row["there"]) == (2, last)
        assert row["codes"][0] == 2
        assert row["codes"][1] > 0
        words = r"error: rank \d \(.*No space left on device.*last.ckpt of step 2 is whole\. Make room"
        assert len(re.findall(words, row["log"])) == len(re.findall(r"error: rank", row["log"])) == 1, row["log"]
        assert "resuming at step 2 of 8" in row["log"]
    row = rows["weights"]
    assert (row["step"], row["weights"], row["codes"][0]) == (8, [], 2)
    assert re.search(r"weights could not be written: .*No space left on device.*last.ckpt is whole", row["log"])
    assert rows["ends"]["codes"] == [0, 0]
    same_rows_and_weights(tmp_path)


@pytest.mark.slow
def test_copies_of_a_model_that_ranks_share_are_killed_and_go_on_as_one_pair(tmp_path, tiny):
    """hardware.shard=2 of four ranks. A rank of either copy dies while the first one writes; then four share one model,
    then two. Up to there the run is the unbroken one bit for bit."""
    rows = run_kills(tmp_path, tiny, "copies")
    assert [rows[case]["step"] for case in rows] == [2, 2, 2, 4, 6, 8]
    for case, dead in (("half a shard of one", 1), ("one that does not write", 3)):
        codes = rows[case]["codes"]
        assert codes.pop(dead) == KILLED
        assert all(code > 0 for code in codes)
        assert "resuming at step 2 of 8" in rows[case]["log"]
        assert f"error: rank {dead} (" in rows[case]["log"]
    assert rows["ends"]["codes"] == [0, 0]
    whole, killed = tmp_path / "whole" / RUN, tmp_path / "killed" / RUN
    ours, theirs = (read_metrics(run / "metrics.jsonl") for run in (killed, whole))
    assert [row for row in ours if row["step"] <= 4] == [row for row in theirs if row["step"] <= 4]
    for a, b in zip(ours, theirs, strict=True):
        assert (a["step"], a.get("targets"), a.get("lr")) == (b["step"], b.get("targets"), b.get("lr"))
        assert a.get("loss", a.get("val_loss")) == pytest.approx(b.get("loss", b.get("val_loss")), rel=1e-5)
    assert ledger_rows(killed) == ledger_rows(whole)
