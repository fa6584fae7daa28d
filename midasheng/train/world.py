"""The processes of a run: how they start, what they must agree on, and how all learn of one that fails, dies or waits.

A launcher gives each process RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT: torchrun, the
batch script of `make submit`, or, on one machine, `start_here`. They speak over a store at that address, beside the
collectives: a process that hangs in a collective still hears that another one has failed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # no __all__

from midasheng.config import UserError

T = TypeVar("T")
LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TURN_S = 1.0  # between two looks of the watch
JOIN_S = 600.0  # for all processes to come to the same place
SILENT_TURNS = 25  # looks that find no new beat of a process: it is dead, or its machine is
BROKEN_TURNS = 5  # the same once a collective has broken, so that one must be dead
GRACE_S = 15.0  # to end by itself, a checkpoint written, once another one has failed; then it is ended
ALL_GONE_S = 45.0  # for the others, once one process of this machine has failed; then they are killed
INTERRUPTED, PREEMPTED = 130, 75  # exit statuses: Ctrl-C; the machine wants it back (EX_TEMPFAIL): start it again
FAILED, SAID, BROKEN = "failed", "said", "broken"  # keys: the first error; it has been said; a collective broke
STARTED_BY = "MIDASHENG_STARTED_BY"  # the process that `start_here` runs in; its ranks end with it
GONE = "its launcher is gone"
LOST = "lost"  # how the error of a process begins that cannot speak any more


# -- starting ----------------------------------------------------------------------------------------------------------


class Launched(NamedTuple):
    """What a launcher said of this process."""

    rank: int
    size: int
    here: int  # processes on this machine

    @property
    def nodes(self) -> int:
        """Machines."""
        return self.size // self.here


def launched() -> Launched | None:
    """None where no launcher started this process. Raises UserError for half of a launcher's environment."""
    if "RANK" not in os.environ:
        return None
    lacking = [name for name in LAUNCH if name not in os.environ]
    if lacking:
        raise UserError(
            f"RANK is set, but not {', '.join(lacking)}: start with GPUS=, torchrun or make submit, or unset RANK"
        )
    found = Launched(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")))
    if found.size % found.here:
        raise UserError(f"{found.size} processes were started, {found.here} of them here; start as many on every node")
    return found


def is_first() -> bool:
    """Is this the process that writes? Every launcher sets RANK; LOCAL_RANK is 0 on each node."""
    return int(os.environ.get("RANK", "0")) == 0


def start_here(processes: int, tell: Callable[[int, str], None]) -> int:
    """Start this very command `processes` times on this machine, wait, pass signals on; returns the exit status.
    `tell`: what to do with the first error, a rank and what happened to it, where no process lived to say it."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = os.environ | {
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        STARTED_BY: str(os.getpid()),
    }  # fmt: skip
    env.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does
    children = [
        # a session of their own: a terminal's Ctrl-C reaches them once, from here
        subprocess.Popen(
            [sys.executable, *sys.orig_argv[1:]], env=env | {"RANK": str(n), "LOCAL_RANK": str(n)},
            start_new_session=True,
        )
        for n in range(processes)
    ]  # fmt: skip

    def pass_on(number: int, _: object) -> None:
        for child in children:
            child.send_signal(number)

    for number in STOPS:
        signal.signal(number, pass_on)
    said, until = _prefixed(store), float("inf")
    codes: list[int | None] = [None] * processes
    while None in codes:
        time.sleep(0.1)
        codes = [child.poll() for child in children]
        for n, code in enumerate(codes):
            if code not in (None, 0, INTERRUPTED, PREEMPTED):  # where it could still speak, it has
                how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
                said.compare_set(FAILED, "", _told(n, f"{LOST}: it ended {how}"))
        if said.check([FAILED]):
            until = min(until, time.monotonic() + ALL_GONE_S)
        if time.monotonic() > until:
            for child in children:
                child.kill()
    guilty = []
    if said.check([FAILED]):
        first = json.loads(said.get(FAILED))
        guilty = [codes[first["rank"]]]
        if not said.check([SAID]):
            tell(first["rank"], first["text"])
    status = next((code for code in [*guilty, *codes] if code), 0)
    return 128 - status if status < 0 else int(status)


def _prefixed(store: Store) -> PrefixStore:
    return PrefixStore(f"midasheng/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _told(rank: int, text: str) -> str:
    return json.dumps({"rank": rank, "text": text})


def say(text: str) -> None:
    """On standard error, if anybody still reads it: a terminal that was closed must not end the watch."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # RuntimeError: in the middle of another print
        print(text, file=sys.stderr, flush=True)


# -- stopping ----------------------------------------------------------------------------------------------------------


PREEMPTS = (signal.SIGTERM, signal.SIGUSR1)
STOPS = (signal.SIGINT, *PREEMPTS)
ASKED, ASKED_BY_MACHINE = 1, 2**20  # what a process adds to the vote on stopping; more ranks than that there are not


class Stopped(BaseException):
    """This process stops because somebody asked. `preempted`: the machine, which is to start the run again; `voted`:
    between two steps, by all ranks, behind a checkpoint; else outside of training, where there is nothing to save."""

    def __init__(self, *, preempted: bool, voted: bool) -> None:
        super().__init__()
        self.preempted, self.voted = preempted, voted


@dataclass
class StopRequest:
    """Somebody wants the run to stop. In training all ranks vote on it between two steps; outside of it the process
    stops where it is."""

    requested: int = 0  # ASKED (Ctrl-C) or ASKED_BY_MACHINE (SIGTERM, SIGUSR1)
    voting: bool = False

    def on_signal(self, number: int, _: object) -> None:
        """A second Ctrl-C ends the process at once. What the machine sends comes twice where both a launcher and its
        processes get it: only its kill, which will follow, is the end."""
        machine = number in PREEMPTS
        if not self.voting:
            if machine:
                raise Stopped(preempted=True, voted=False)
            raise KeyboardInterrupt
        self.requested = max(self.requested, ASKED_BY_MACHINE if machine else ASKED)
        if not machine:
            signal.signal(number, signal.SIG_DFL)
        if is_first():
            with contextlib.suppress(RuntimeError, OSError):  # it came in the middle of another print; nobody reads it
                again = "" if machine else " (again: at once, back to the last checkpoint)"
                print(f"\nstopping at the end of a step{again}", flush=True)


@contextlib.contextmanager
def stoppable(stop: StopRequest, *, voting: bool = False) -> Iterator[None]:
    """Signals are `stop`'s for as long as this lasts."""
    before, voted = {number: signal.getsignal(number) for number in STOPS}, stop.voting
    stop.voting = voting
    for number in STOPS:
        signal.signal(number, stop.on_signal)
    try:
        yield
    finally:
        stop.voting = voted
        for number, handler in before.items():
            signal.signal(number, handler)


# -- among the others --------------------------------------------------------------------------------------------------


class Elsewhere(Exception):
    """Another process has failed, and this one ends for it; rank 0 has said why."""


class Waiting(NamedTuple):
    """What the training thread waits for, since when (monotonic seconds), and which record holds it up."""

    what: str
    since: float
    where: Callable[[], str]


class World:
    """This process among those of the run; alone it has no store, and waits for nobody."""

    def __init__(self, rank: int = 0, size: int = 1, store: TCPStore | None = None) -> None:
        self.rank, self.size = rank, size
        self.hosts = [socket.gethostname()] * size
        self.store = _prefixed(store) if store else None
        self.stop = StopRequest()
        self.stall_s = 60.0
        self.waits: Callable[[], Waiting | None] = lambda: None
        self.tell: Callable[[dict[str, Any]], None] = lambda event: None  # to events.jsonl
        self.failed, self.guilty = "", -1  # the first error of any process, as rank 0 says it, and whose it is
        self._turn: Counter[str] = Counter()
        self._over = threading.Event()
        self._parent = os.getppid()
        self._heard: dict[int, tuple[bytes, int]] = {}  # rank -> its last beat, and looks since it was new
        self._stalls: dict[int, float] = {}  # rank -> when its stall was last said
        self._own = _prefixed(store.clone()) if store else None  # of the watch: a call on the other one may wait
        self._watch = threading.Thread(target=self._look_after, name="watch", daemon=True)

    @property
    def first(self) -> bool:
        """Is this the process that writes?"""
        return self.rank == 0

    @property
    def builder(self) -> int:
        """The first process of this machine; every launcher numbers those of a machine one after the other."""
        return self.rank - int(os.environ.get("LOCAL_RANK", "0"))

    # -- agreeing

    def begin(self) -> None:
        """Watch, and wait for the others. Raises UserError."""
        if self.store is not None:
            self._beat(self.store, 0, "")  # so that one that dies at once is missed
        self._watch.start()
        self.hosts = self.gather("the start", socket.gethostname())

    def gather(self, what: str, mine: str = "", *, for_ever: bool = False) -> list[str]:
        """What every rank brings to this place, by rank; nobody goes on before all are here. Raises UserError, which
        names whom it waited for; not where it may be waited for as long as it lives (`for_ever`)."""
        if self.store is None:
            return [mine]
        self._turn[what] += 1
        keys = [f"{what}/{self._turn[what]}/{rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], mine)
        self._await(what, keys, float("inf") if for_ever else JOIN_S)
        return [value.decode() for value in self.store.multi_get(keys)]

    def of_first(self, what: str, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0 (as JSON), to all; it may take hours, as long as rank 0 lives."""
        if self.store is None:
            return make()
        self._turn[what] += 1
        key = f"{what}/{self._turn[what]}/first"
        if self.first:
            made = make()
            self.store.set(key, json.dumps(made))
            return made
        self._await(what, [key], float("inf"))
        return json.loads(self.store.get(key))

    def alike(self, words: Mapping[str, str]) -> None:
        """Do all ranks see the same? `words`: what -> its fingerprint. Raises UserError, which names the ranks."""
        found = [json.loads(seen) for seen in self.gather("comparison", json.dumps(dict(words)))]
        if told := differing(self.hosts, found):
            raise UserError("the processes differ: " + "; ".join(told))

    def _await(self, what: str, keys: Sequence[str], most_s: float) -> None:
        assert self.store is not None
        began = said = time.monotonic()
        pause = 0.01
        while not self.store.check(list(keys)):
            if self.failed:
                raise Elsewhere(self.failed)
            now = time.monotonic()
            if now - said > self.stall_s or now - began > most_s:
                missing = [n for n, key in enumerate(keys) if not self.store.check([key])]
                text = f"rank {self.rank} has waited {now - began:.0f} s for rank {_names(missing)} at: {what}"
                if now - began > most_s:
                    raise UserError(text)
                say(text)
                said = now
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    # -- failing

    def fail(self, text: str, *, of_a_collective: bool = False) -> None:
        """Let all know that this process fails. Where a collective broke, another one died first: it is looked for."""
        if self.failed:
            return
        if self.store is None:
            self.failed, self.guilty = text, self.rank
            self._tell_failed()
            return
        with contextlib.suppress(DistError):
            if of_a_collective:
                self.store.set(BROKEN, "")
                self._until(lambda: bool(self.failed), 2 * BROKEN_TURNS * TURN_S)
            self.guilty = json.loads(self.store.compare_set(FAILED, "", _told(self.rank, text)))["rank"]
            store = self.store
            self._until(lambda: store.check([SAID]), 5 * TURN_S)

    def leave(self, status: int) -> None:
        """The end of this process. One that failed ends here and now: nothing is to hang in what others broke."""
        if (store := self.store) is not None:
            others = [f"left/{rank}" for rank in range(1, self.size) if rank != self.guilty]
            with contextlib.suppress(DistError):
                store.set(f"left/{self.rank}", "")
                if self.first:  # it may keep the store, and says what the others have to say
                    self._until(
                        lambda: store.check(others) or bool(self.failed and not status),
                        GRACE_S / 2 if status else JOIN_S,
                    )  # fmt: skip
        self._over.set()
        if self._watch.is_alive():  # within the store when the interpreter ends, it would abort the process
            self._watch.join(5 * TURN_S)
        if store is not None and (status or self.failed or self._watch.is_alive()):
            _exit(status or int(bool(self.failed)))

    @staticmethod
    def _until(done: Callable[[], bool], most_s: float) -> None:
        until = time.monotonic() + most_s
        while not done() and time.monotonic() < until:
            time.sleep(0.05)

    # -- the watch, in a thread of its own

    def _look_after(self) -> None:
        store, number = self._own, 0
        while not self._over.wait(TURN_S):
            if store is None:
                self._say_stall(0, self._stall())
                continue
            number += 1
            try:
                why = self._look(store, number, self._stall())
            except DistError:
                why = (0, f"{LOST}: {GONE if self.first else 'neither it nor its launcher answers'}")
            except Exception as error:  # a watch that ends without a word would end the run half a minute later
                why = (self.rank, f"its watch failed: {last_line(error)}")
            if why and not self._over.is_set():
                self._end(store, *why)

    def _look(self, store: Store, number: int, stall: str) -> tuple[int, str] | None:
        """One look; returns the rank that failed, and how, if one did."""
        if os.getppid() != self._parent:  # first: its store is gone too
            return self.rank, f"{LOST}: {GONE}"
        self._beat(store, number, stall)
        most = BROKEN_TURNS if store.check([BROKEN]) else SILENT_TURNS
        for rank in range(1, self.size) if self.first else [0]:
            if (looks := self._silent(store, rank)) > most:
                text = f"{LOST}: silent for {looks * TURN_S:.0f} s, so it was killed, or its machine is gone"
                store.compare_set(FAILED, "", _told(rank, text))
        if not store.check([FAILED]):
            return None
        told = json.loads(store.get(FAILED))
        return told["rank"], told["text"]

    def _beat(self, store: Store, number: int, stall: str) -> None:
        store.set(f"beat/{self.rank}", json.dumps([number, stall]))

    def _silent(self, store: Store, rank: int) -> int:
        """Looks since a rank's last beat. Looks and not seconds: a machine that stood still took all processes along.
        0 before the first beat and where it has left."""
        key = f"beat/{rank}"
        if not store.check([key]) or store.check([f"left/{rank}"]):
            return 0
        beat = store.get(key)
        last, looks = self._heard.get(rank, (b"", 0))
        self._heard[rank] = (beat, looks + 1 if beat == last else 0)
        if beat != last:
            self._say_stall(rank, json.loads(beat)[1])
        return self._heard[rank][1]

    def _stall(self) -> str:
        """What the training thread has waited for too long; empty where it has not."""
        waiting = self.waits()
        waited = time.monotonic() - waiting.since if waiting else 0.0
        if waiting is None or waited < self.stall_s:
            return ""
        return f"rank {self.rank} has waited {waited:.0f} s for {waiting.what}: {waiting.where()}"

    def _say_stall(self, rank: int, text: str) -> None:
        now = time.monotonic()
        if self.first and text and now - self._stalls.get(rank, -1e9) >= self.stall_s:
            self._stalls[rank] = now
            say(f"\nSTALL: {text}")
            self.tell({"event": "stall", "rank": rank, "at": text})

    def _end(self, store: Store, rank: int, text: str) -> None:
        """The run has failed: rank 0 says so, or rank 1 for it, and this process has a while to end by itself."""
        if not self.failed:
            self.failed, self.guilty = f"rank {rank} ({self.hosts[rank]}): {text}", rank
            if self.first or (self.rank == 1 and rank == 0 and text.startswith(LOST)):
                say(f"\nerror: {self.failed}")
                self._tell_failed()
                with contextlib.suppress(DistError):
                    store.set(SAID, "")
        if not self._over.wait(GRACE_S):
            _exit(1)

    def _tell_failed(self) -> None:
        with contextlib.suppress(OSError):  # a full disk may be what it failed of
            self.tell({"event": "failed", "rank": self.guilty, "error": self.failed})


def _exit(status: int) -> None:
    """At once, whatever other threads hang in; files are written so that this may happen at any time."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def join(stop: StopRequest) -> World:
    """Come together with the other processes that were started; alone where there are none. Raises UserError."""
    at = launched()
    if at is None or at.size == 1:
        world = World()
    else:
        if os.environ.get(STARTED_BY, str(os.getppid())) != str(os.getppid()):
            raise UserError(f"rank {at.rank}: {LOST}: its launcher is gone")
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        keeps = at.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            store = TCPStore(
                address, port, is_master=keeps, timeout=timedelta(seconds=JOIN_S), wait_for_workers=False,
                multi_tenant=True,
            )  # fmt: skip
        except DistError as error:
            raise UserError(
                f"rank {at.rank}: nobody answered at MASTER_ADDR:MASTER_PORT {address}:{port} for {JOIN_S:g} s; start "
                f"rank 0 there, or name the node where it runs ({str(error).splitlines()[0]})"
            ) from None
        world = World(at.rank, at.size, store)
    world.stop = stop
    return world


# -- what must be alike ------------------------------------------------------------------------------------------------


def code_fingerprint() -> str:
    """Hash of the library's own source files, and torch's version."""
    root, digest = Path(__file__).parent.parent, hashlib.sha256(torch.__version__.encode())
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def fingerprint(value: object) -> str:
    """Hash of anything that JSON can say."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def differing(hosts: Sequence[str], words: Sequence[Mapping[str, str]]) -> list[str]:
    """For each word that the ranks do not share, who has another one than most. `hosts`, `words`: by rank."""
    told = []
    for what in dict.fromkeys(name for mine in words for name in mine):
        values = [mine.get(what, "none") for mine in words]
        if len(set(values)) > 1:
            usual = max(values, key=lambda v: (values.count(v), v == values[0]))
            odd = [n for n, value in enumerate(values) if value != usual]
            where = ", ".join(dict.fromkeys(hosts[n] for n in odd))
            told.append(f"rank {_names(odd)} ({where}) has another {what} than most: {values[odd[0]]}, not {usual}")
    return told


def _names(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


# -- errors in words ---------------------------------------------------------------------------------------------------


def broken_collective(error: BaseException) -> bool:
    """Is this what the end of another process looks like from here?"""
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def last_line(error: BaseException) -> str:
    """An error as the last line of its traceback says it."""
    lines = str(error).strip().splitlines()
    if isinstance(error, UserError):
        return " ".join(lines)
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"
