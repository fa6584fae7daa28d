"""Two starts of one run at the same time: the second one is refused."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from midasheng.config import UserError
from midasheng.train import order as order_room
from midasheng.train.order import LOCK, held
from midasheng.train.world import World
from tests.conftest import run_stage
from tests.train.test_resume import same_run

ROOT = Path(__file__).parent.parent.parent
MORE = {"run__length": "4 steps", "log__checkpoint_every": 2}
ALIVE = """
import os, signal, sys, time
from pathlib import Path
from midasheng.data.loader import Loading
from midasheng.train.module import StageModule
from tests.conftest import Tiny, run_stage
root, runs, step = Path(sys.argv[1]), Path(sys.argv[2]), StageModule.training_step
def stands(self, batch, batch_idx):
    if batch.step == 3:
        self.writer.wait()
        print("in step 3", flush=True)
        time.sleep(600)
    step(self, batch, batch_idx)
StageModule.training_step = stands
text = Loading._text
def worker(self, p, read):
    (runs / "worker").write_text(str(os.getpid()))
    return text(self, p, read)
Loading._text = worker
run_stage("stage1_align", Tiny(root), runs, hardware__workers=1, %s)
"""


def test_a_second_start_of_a_run_is_refused_while_the_first_one_lives(tiny, tmp_path, monkeypatch):
    """Also by FRESH=1, which would throw away what the other one writes. Once it is killed the same command goes on, even
    if a loader process of it, frozen, is still there."""
    monkeypatch.setattr(order_room, "ENDS_S", 0.0)
    unbroken = run_stage("stage1_align", tiny, tmp_path / "whole", **MORE)
    runs = tmp_path / "runs"
    runs.mkdir()
    settings = ", ".join(f"{name}={value!r}" for name, value in MORE.items())
    process = subprocess.Popen(
        [sys.executable, "-c", ALIVE % settings, str(tiny.root), str(runs)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while process.stdout.readline() not in ("in step 3\n", ""):
        pass
    worker, folder = int((runs / "worker").read_text()), runs / "mini/stage1_align"
    try:
        os.kill(worker, signal.SIGSTOP)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        words = rf"{re.escape(str(folder))}: this run is going on already: process {process.pid} on .*{folder / LOCK}"
        for fresh in (False, True):
            with pytest.raises(UserError, match=words):
                run_stage("stage1_align", tiny, runs, fresh=fresh, **MORE)
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        process.kill()
        process.wait(60)
        same_run(unbroken, run_stage("stage1_align", tiny, runs, **MORE))
    finally:
        os.kill(worker, signal.SIGKILL)
        process.kill()
        process.communicate()


HOLDS = """
import sys, time
from pathlib import Path
from midasheng.train.order import _locked, _sign
with _locked(Path(sys.argv[1]), alone={alone}) as handle:
    if {alone}:
        _sign(handle)
    print("held", flush=True)
    time.sleep(600)
"""


def holder(folder: Path, alone: bool) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS.format(alone=alone), str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_run_counts_as_alive_while_any_of_its_processes_is(tmp_path, monkeypatch):
    """The first one is dead, another one not yet; and a start that was refused does not release what others hold."""
    monkeypatch.setattr(order_room, "ENDS_S", 0.0)
    first = holder(tmp_path, alone=True)
    other = holder(tmp_path, alone=False)
    try:
        first.kill()
        first.wait()
        for _ in range(2):
            with pytest.raises(UserError, match=f"process {first.pid} on .*, or another of its processes"):
                with held(tmp_path, World()):
                    pass
    finally:
        other.kill()
        other.communicate()
        first.communicate()
    with held(tmp_path, World()):
        assert f"process {os.getpid()} on" in (tmp_path / LOCK).read_text()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_prevents_no_run(tmp_path, monkeypatch, capsys, number):
    def lockf(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(order_room.fcntl, "lockf", lockf)
    began = time.monotonic()
    with held(tmp_path, World()):
        assert time.monotonic() - began < order_room.ENDS_S
    said = capsys.readouterr().err
    assert f"note: {tmp_path / LOCK} cannot be locked ({os.strerror(number)})" in said
