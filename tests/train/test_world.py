"""Processes that agree, fail, die and wait: real ones, over a real store and gloo, but without a model."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from midasheng.config import ConfigError, UserError
from midasheng.train import world
from midasheng.train.order import command_line
from midasheng.train.world import LAUNCH, World, differing, launched

ROOT = Path(__file__).parent.parent.parent
PROCESS = """
import os, signal, sys, time
import torch
from midasheng.config import UserError
from midasheng.train import world
world.TURN_S, world.SILENT_S, world.GRACE_S = 0.2, 6.0, 3.0

def body(ranks):
    {body}

ranks, status = world.World(), 1
try:
    ranks = world.join(world.StopRequest())
    body(ranks)
    ranks.of_first("the end", lambda: None)
    status = 0
except world.Elsewhere:
    pass
except Exception as error:
    ranks.fail(world.last_line(error), of_a_collective=world.broken_collective(error))
    status = 2 if isinstance(error, UserError) else 1
ranks.leave(status)
"""
HANGS = """
    torch.distributed.init_process_group("gloo")
    torch.distributed.all_reduce(torch.zeros(1))
    if ranks.rank == {rank}:
        {does}
    torch.distributed.all_reduce(torch.zeros(1))
"""


def several(folder: Path, body: str, processes: int = 2) -> tuple[list[int], list[str]]:
    """Exit statuses and standard errors of processes that this one started and keeps the store of."""
    script = folder / "process.py"
    script.write_text(PROCESS.format(body=body))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = os.environ | {
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, str(script)], cwd=ROOT, env=env | {"RANK": str(n), "LOCAL_RANK": str(n)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for n in range(processes)
    ]  # fmt: skip
    told = [process.communicate(timeout=300)[1] for process in started]
    return [process.returncode for process in started], told


def test_an_error_reaches_rank_0_and_ends_those_that_hang_in_a_collective(tmp_path):
    codes, told = several(tmp_path, HANGS.format(rank=1, does='raise ValueError("a long story\\nits last line")'))
    assert codes == [1, 1]
    assert told[0].count("error: ") == 1
    assert "error: rank 1 (" in told[0]
    assert "): ValueError: its last line" in told[0]


def test_a_killed_process_ends_the_others_and_is_named(tmp_path):
    """Of three, so that one hangs without a broken connection to the dead one of its own making."""
    codes, told = several(tmp_path, HANGS.format(rank=2, does="os.kill(os.getpid(), signal.SIGKILL)"), 3)
    assert codes == [1, 1, -signal.SIGKILL]
    assert "error: rank 2 (" in told[0]
    assert "killed, or its machine is lost" in told[0]


def test_rank_0_that_is_stopped_dead_does_not_hang_the_others(tmp_path):
    """A process that stands still is a dead one: its connections stay open, and no collective would ever break."""
    does = "os.system(f'(sleep 20; kill -9 {os.getpid()}) >/dev/null 2>&1 &'); os.kill(os.getpid(), signal.SIGSTOP)"
    codes, _ = several(tmp_path, HANGS.format(rank=0, does=does))
    assert codes == [-signal.SIGKILL, 1]


AGREES = """
    made = ranks.of_first("a value", lambda: (time.sleep(1), {"n": 7})[1])
    assert made == {"n": 7}
    assert ranks.gather("ranks", str(ranks.rank)) == ["0", "1", "2"]
    ranks.alike({"config": "a", "code": "b"})
    ranks.stall_s = 0.5
    if ranks.rank == 2:
        time.sleep(3)
    ranks.meet("the slow place")
    ranks.alike({"config": "a", "code": "b" if ranks.rank != 1 else "c"})
"""


def test_processes_agree_and_the_one_that_differs_is_named(tmp_path):
    codes, told = several(tmp_path, AGREES.strip(), 3)
    assert codes == [2, 2, 2]
    assert "for rank 2 at: the slow place" in told[0]
    assert "the processes differ: rank 1 (" in told[0]
    assert "has another code than most: c, not b" in told[0]


# -- in this process ---------------------------------------------------------------------------------------------------


def test_whom_one_waits_for_is_named(monkeypatch):
    monkeypatch.setattr(world, "JOIN_S", 0.3)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    World(2, 4, store).store.set("a place/1/2", "")  # rank 2 has come
    with pytest.raises(UserError, match=r"rank 0 has waited \d s for rank 1, 3 at: a place"):
        World(0, 4, store).meet("a place")


def test_who_differs_from_most_is_named():
    hosts = ["a", "a", "b", "b"]
    assert differing(hosts, [{"x": "1", "y": "2"}] * 4) == []
    words = [{"x": "1"}, {"x": "1"}, {"x": "2"}, {"x": "1"}]
    assert differing(hosts, words) == ["rank 2 (b) has another x than most: 2, not 1"]
    tied = [{"x": "1"}, {"x": "1"}, {"x": "2"}, {"x": "2"}]
    assert differing(hosts, tied) == ["rank 2, 3 (b) has another x than most: 2, not 1"]  # as many: rank 0 is right
    assert differing(hosts[:2], [{}, {"x": "1"}]) == ["rank 1 (a) has another x than most: 1, not none"]


def test_the_launcher_decides_how_many_there_are(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert launched() is None
    order = str(ROOT / "configs/stage1_align.yaml")
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(UserError, match="RANK is set, but not LOCAL_RANK, WORLD_SIZE"):
        launched()
    for name, value in zip(LAUNCH, ("3", "1", "6", "2", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    hardware = command_line(order, tiny.settings()).stage.hardware
    assert (hardware.devices, hardware.nodes) == (2, 3)
    with pytest.raises(ConfigError, match=r"hardware.nodes=2: 6 processes were started, 2 on a node"):
        command_line(order, [*tiny.settings(), "hardware.nodes=2"])


def test_signals_before_training_end_at_once_and_in_training_are_counted():
    stop = world.StopRequest()
    with world.stoppable(stop):
        with pytest.raises(world.Stopped) as stopped:
            signal.raise_signal(signal.SIGTERM)
        assert (stopped.value.preempted, stopped.value.voted) == (True, False)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        stop.training = True
        signal.raise_signal(signal.SIGINT)
        assert stop.requested == world.ASKED
        signal.raise_signal(signal.SIGUSR1)
        assert stop.requested == world.PREEMPTED > 10**5 * world.ASKED
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL  # the second one ends the process
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
