"""Processes that agree, fail, die and wait: real ones, over a real store and gloo, but without a model."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from midasheng.config import ConfigError, UserError, schema
from midasheng.train import world
from midasheng.train.fit import to_agree_on
from midasheng.train.order import command_line
from midasheng.train.world import LAUNCH, World, code_fingerprint, differing, launched
from tests.conftest import order_for

ROOT = Path(__file__).parent.parent.parent
PROCESS = """
import json, os, signal, sys, time
import torch
from midasheng.config import UserError
from midasheng.train import world
world.TURN_S, world.GRACE_S = 0.2, 5.0
count, still = int(os.environ["WORLD_SIZE"]), json.loads(sys.argv[1])

def body(ranks):
    {body}

def work():
    ranks, status = world.World(), 1
    try:
        ranks = world.join(world.StopRequest())
        ranks.begin()
        body(ranks)
        ranks.of_first("the end", lambda: None)
        status = 0
    except world.Elsewhere:
        pass
    except Exception as error:
        ranks.fail(world.last_line(error), of_a_collective=world.broken_collective(error))
        status = 2 if isinstance(error, UserError) else 1
    finally:
        ranks.leave(status)

assert len(os.listdir("/proc/self/task")) == 1, "a fork would inherit the locks of threads that it lacks"
children = []
for n in range(count):  # torch is imported once
    if not (child := os.fork()):
        os.environ.update(RANK=str(n), LOCAL_RANK=str(n))
        os.dup2(os.open(f"rank{{n}}.log", os.O_WRONLY | os.O_CREAT), 2)
        work()
        sys.exit(0)
    children.append(child)
codes = dict()
for n in sorted(range(count), key=still.count):
    if n in still:
        os.kill(children[n], signal.SIGKILL)
    codes[n] = os.waitstatus_to_exitcode(os.waitpid(children[n], 0)[1])
print(json.dumps([codes[n] for n in range(count)]))
"""
HANGS = """
    torch.distributed.init_process_group("gloo")
    torch.distributed.all_reduce(torch.zeros(1))
    if ranks.rank == {rank}:
        {does}
    torch.distributed.all_reduce(torch.zeros(1))
"""


def several(
    folder: Path, body: str, processes: int = 2, still: Sequence[int] = (), *, agent: bool = True
) -> tuple[list[int], list[str]]:
    """Exit statuses and standard errors of processes. `agent`: this one keeps their store, as torchrun does; else rank 0
    has to. `still`: those that stand still, and are killed once the others have ended."""
    script = folder / "process.py"
    script.write_text(PROCESS.format(body=body))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    if not agent:
        del store  # and its port is free
    env = os.environ | {
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": str(agent), "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(list(still))], cwd=folder, env=env, stdout=subprocess.PIPE, text=True,
        timeout=300, check=True,
    )  # fmt: skip
    return json.loads(done.stdout), [(folder / f"rank{n}.log").read_text() for n in range(processes)]


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
    assert "lost: silent for" in told[0]


def test_rank_0_that_is_stopped_dead_does_not_hang_the_others(tmp_path):
    """A process that stands still is a dead one: its connections stay open, and no collective would ever break."""
    codes, told = several(tmp_path, HANGS.format(rank=0, does="os.kill(os.getpid(), signal.SIGSTOP)"), still=(0,))
    assert codes == [-signal.SIGKILL, 1]
    assert "error: rank 0 (" in told[1]  # rank 0 cannot say it


def test_processes_that_end_well_end_with_0(tmp_path):
    """Rank 0 keeps the store, as in a Slurm job, and no watch is left within it when an interpreter ends."""
    restless = """
    world.TURN_S, world.SILENT_TURNS = 0.0, 10**9
    ranks.gather("here")
    time.sleep(0.5)
"""
    codes, told = several(tmp_path, restless.strip(), 4, agent=False)
    assert (codes, told) == ([0] * 4, [""] * 4)


AGREES = """
    made = ranks.of_first("a value", lambda: (time.sleep(1), {"n": 7})[1])
    assert made == {"n": 7}
    assert ranks.gather("ranks", str(ranks.rank)) == ["0", "1", "2"]
    ranks.alike({"config": "a", "code": "b"})
    ranks.stall_s = 0.5
    if ranks.rank == 2:
        time.sleep(8)
    ranks.gather("the slow place")
    ranks.alike({"config": "a", "code": "b" if ranks.rank != 1 else "c"})
"""


def test_processes_agree_and_the_one_that_differs_is_named(tmp_path):
    codes, told = several(tmp_path, AGREES.strip(), 3)
    assert codes == [2, 2, 2]
    assert "for rank 2 at: the slow place" in told[0]
    assert "the processes differ: rank 1 (" in told[0]
    assert "has another code than most: c, not b" in told[0]


LAUNCHED = """
import fcntl, os, signal, sys, time
from pathlib import Path
from midasheng.train import world
world.TURN_S, world.GRACE_S = 0.2, 1.0
if "RANK" not in os.environ:
    sys.exit(world.start_here(2, lambda rank, text: print(f"told of rank {{rank}}: {{text}}", flush=True)))
ranks = world.join(world.StopRequest())
ranks.begin()
{body}
"""


def launched_here(folder: Path, body: str, **how) -> subprocess.Popen[str]:
    """Our launcher, two processes of it."""
    (folder / "launched.py").write_text(LAUNCHED.format(body=body))
    env = {name: value for name, value in os.environ.items() if name not in LAUNCH}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    words = [*how.pop("before", []), str(folder / "launched.py")]
    return subprocess.Popen([sys.executable, *words], cwd=folder, env=env, text=True, **how)


def test_the_launcher_says_what_no_process_lived_to_say(tmp_path):
    """All of them are killed at a time."""
    process = launched_here(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)", stdout=subprocess.PIPE)
    told = process.communicate(timeout=300)[0]
    assert process.returncode == 128 + signal.SIGKILL
    assert re.fullmatch(r"told of rank [01]: lost: it ended by SIGKILL\n", told)


# a session of its own with this terminal; whoever runs the tests may ignore its end (nohup)
IN_TERMINAL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_processes_do_not_outlive_their_launcher_whose_terminal_was_closed(tmp_path):
    """What they print then is an error of its own, which must not end the watch."""
    ours, theirs = os.openpty()
    body = """
file = open(f"rank{ranks.rank}", "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print(os.getpid(), file=file, flush=True)
time.sleep(600)
"""
    process = launched_here(
        tmp_path, body, before=["-c", IN_TERMINAL], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )  # fmt: skip
    os.close(theirs)
    files, until = [tmp_path / f"rank{n}" for n in (0, 1)], time.monotonic() + 300
    while not all(f.exists() and f.read_text() for f in files) and time.monotonic() < until:
        time.sleep(0.05)
    assert [lives(f) for f in files] == [True, True]
    os.close(ours)
    assert process.wait(60) == -signal.SIGHUP
    until = time.monotonic() + 120
    while (left := [f for f in files if lives(f)]) and time.monotonic() < until:
        time.sleep(0.1)
    for file in left:
        os.kill(int(file.read_text()), signal.SIGKILL)
    assert not left


def lives(file: Path) -> bool:
    """Does the process that locked it?"""
    with file.open("r+") as opened:
        try:
            fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


# -- in this process ---------------------------------------------------------------------------------------------------


def test_whom_one_waits_for_is_named(monkeypatch):
    monkeypatch.setattr(world, "JOIN_S", 0.3)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    World(2, 4, store).store.set("a place/1/2", "")  # rank 2 has come
    with pytest.raises(UserError, match=r"rank 0 has waited \d s for rank 1, 3 at: a place"):
        World(0, 4, store).gather("a place")


def test_who_differs_from_most_is_named():
    hosts = ["a", "a", "b", "b"]
    assert differing(hosts, [{"x": "1", "y": "2"}] * 4) == []
    words = [{"x": "1"}, {"x": "1"}, {"x": "2"}, {"x": "1"}]
    assert differing(hosts, words) == ["rank 2 (b) has another x than most: 2, not 1"]
    tied = [{"x": "1"}, {"x": "1"}, {"x": "2"}, {"x": "2"}]
    assert differing(hosts, tied) == ["rank 2, 3 (b) has another x than most: 2, not 1"]  # as many: rank 0 is right
    assert differing(hosts[:2], [{}, {"x": "1"}]) == ["rank 1 (a) has another x than most: 1, not none"]


def test_every_setting_is_compared(tiny, tmp_path):
    """Also those that a resume may change: ranks that validate in different steps wait for each other for ever."""
    order = order_for("stage1_align", tiny, tmp_path)
    mine, other = (
        to_agree_on(o, {"plan": 1, "parents": []}, "new", frozenset())
        for o in (order, order_for("stage1_align", tiny, tmp_path, log__val_every=77))
    )
    assert set(schema()) < mine.keys()
    assert differing(["a", "b"], [mine, other]) == ["rank 1 (b) has another log.val_every than most: 77, not 2"]
    for changed in (
        to_agree_on(order, {"plan": 2, "parents": []}, "new", frozenset()),
        to_agree_on(order, {"plan": 1, "parents": [{}]}, "new", frozenset()),
        to_agree_on(order, {"plan": 1, "parents": []}, "unfinished", frozenset()),
        to_agree_on(order, {"plan": 1, "parents": []}, "new", frozenset({(0, 0)})),
    ):
        assert len(differing(["a", "b"], [mine, changed])) == 1


def test_the_code_is_compared(monkeypatch, tmp_path):
    """Byte for byte, and torch's version."""
    (tmp_path / "train").mkdir()
    monkeypatch.setattr(world, "__file__", str(tmp_path / "train/world.py"))
    (tmp_path / "a.py").write_text("1")
    seen = [code_fingerprint()]
    (tmp_path / "a.py").write_text("2")
    seen.append(code_fingerprint())
    monkeypatch.setattr(world.torch, "__version__", "0")
    assert len({*seen, code_fingerprint()}) == 3


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


def test_signals_outside_of_training_end_at_once_and_in_training_are_counted(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    before = {number: signal.getsignal(number) for number in world.STOPS}
    stop = world.StopRequest()
    with world.stoppable(stop):
        with pytest.raises(world.Stopped) as stopped:
            signal.raise_signal(signal.SIGTERM)
        assert (stopped.value.preempted, stopped.value.voted) == (True, False)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with world.stoppable(stop, voting=True):
            signal.raise_signal(signal.SIGINT)
            assert stop.requested == world.ASKED
            assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # a second Ctrl-C ends the process
            for _ in range(2):  # a launcher passes on what its processes have got already
                signal.raise_signal(signal.SIGUSR1)
                signal.raise_signal(signal.SIGTERM)
            assert stop.requested == world.ASKED_BY_MACHINE > 10**5 * world.ASKED
        with pytest.raises(world.Stopped):
            signal.raise_signal(signal.SIGTERM)
    assert {number: signal.getsignal(number) for number in world.STOPS} == before
