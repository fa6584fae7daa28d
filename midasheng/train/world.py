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
SILENT_S = 30.0  # a process that says nothing for so long is dead, or its machine is
GRACE_S = 10.0  # to end by itself once another one has failed, then it is ended
ALL_GONE_S = 45.0  # for the others, once one process of this machine has failed; then they are killed
PREEMPTS = (signal.SIGTERM, signal.SIGUSR1)
FAILED = "failed"  # key of the first error
ASKED, PREEMPTED = 1, 2**20  # what a process adds to the vote on stopping; more ranks than that there are not


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
    """Is this the process that writes?"""
    return int(os.environ.get("RANK", "0")) == 0


def start_here(processes: int) -> int:
    """Start this very command `processes` times on this machine, wait, pass signals on; returns the exit status."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = os.environ | {
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    env.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does
    children = [
        # a session of their own: a terminal's Ctrl-C reaches them once, from here
        subprocess.Popen(sys.orig_argv, env=env | {"RANK": str(n), "LOCAL_RANK": str(n)}, start_new_session=True)
        for n in range(processes)
    ]

    def pass_on(number: int, _: object) -> None:
        for child in children:
            child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, pass_on)
    said, until = _prefixed(store), None
    while None in (codes := [child.poll() for child in children]):
        for n, code in enumerate(codes):
            if code is not None and code < 0:
                said.compare_set(FAILED, "", _told(n, f"the process was ended by {signal.Signals(-code).name}"))
        if until is None and said.check([FAILED]):
            until = time.monotonic() + ALL_GONE_S
        if until is not None and time.monotonic() > until:
            for child in children:
                child.kill()
        time.sleep(0.1)
    guilty = [codes[json.loads(said.get(FAILED))["rank"]]] if said.check([FAILED]) else []
    status = next((code for code in [*guilty, *codes] if code), 0)
    return 128 - status if status < 0 else int(status)


def _prefixed(store: Store) -> PrefixStore:
    return PrefixStore(f"midasheng/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _told(rank: int, text: str) -> str:
    return json.dumps({"rank": rank, "host": socket.gethostname(), "text": text})


# -- stopping ----------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """This process stops because somebody asked. `preempted`: the machine, which is to start the run again; `voted`:
    between two steps, by all ranks, behind a checkpoint; else before training, where there is nothing to save."""

    def __init__(self, *, preempted: bool, voted: bool) -> None:
        super().__init__()
        self.preempted, self.voted = preempted, voted


@dataclass
class StopRequest:
    """Somebody wants the run to stop between two steps: ASKED (Ctrl-C) or PREEMPTED (SIGTERM, SIGUSR1), as it counts in
    the vote of all ranks. Before training the process stops at once; a second signal ends it in any case."""

    requested: int = 0
    training: bool = False

    def listen(self) -> None:
        """Take the signals over; to be called again behind Lightning, which answers SIGTERM by a collective."""
        for number in (signal.SIGINT, *PREEMPTS):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: object) -> None:
        if not self.training:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise Stopped(preempted=True, voted=False)
        if is_first():
            print("\nstopping at the end of a step (again: at once, back to the last checkpoint)", flush=True)
        self.requested = max(self.requested, PREEMPTED if number in PREEMPTS else ASKED)
        signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def stoppable(stop: StopRequest) -> Iterator[None]:
    """Signals are `stop`'s for as long as this lasts."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *PREEMPTS)}
    stop.listen()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- among the others --------------------------------------------------------------------------------------------------


class Elsewhere(Exception):
    """Another process has failed, and this one ends for it; rank 0 has said why."""


@dataclass(frozen=True)
class Waiting:
    """What the training thread waits for, since when (monotonic seconds), and what holds it up."""

    what: str
    since: float
    where: Callable[[], str]


class World:
    """This process among those of the run; alone it has no store, and waits for nobody."""

    def __init__(self, rank: int = 0, size: int = 1, store: TCPStore | None = None) -> None:
        self.rank, self.size = rank, size
        self.store = _prefixed(store) if store else None
        self._turn: Counter[str] = Counter()
        self.failed = ""  # the first error of any process, as rank 0 says it
        self.mine = False  # is it this one's?
        self.stop = StopRequest()
        self.waits: Callable[[], Waiting | None] = lambda: None
        self.stall_s = 60.0
        self.tell: Callable[[dict[str, Any]], None] = lambda event: None  # to events.jsonl
        self._over = threading.Event()
        self._parent = os.getppid()
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._stalls: dict[int, float] = {}  # rank -> when its stall was last said
        self._own = _prefixed(store.clone()) if store else None  # of the watch: a call on the other one may wait
        self._watch = threading.Thread(target=self._look_after, name="watch", daemon=True)

    @property
    def first(self) -> bool:
        """Is this the process that writes?"""
        return self.rank == 0

    # -- agreeing

    def gather(self, what: str, mine: str) -> list[str]:
        """What every rank brings to this place, by rank. Raises UserError, which names whom it waited for."""
        if self.store is None:
            return [mine]
        self._turn[what] += 1
        keys = [f"{what}/{self._turn[what]}/{rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], mine)
        self._await(what, keys, JOIN_S)
        return [value.decode() for value in self.store.multi_get(keys)]

    def meet(self, what: str) -> None:
        """Go on when all have come here."""
        self.gather(what, "")

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
        seen = self.gather("comparison", json.dumps([socket.gethostname(), dict(words)]))
        hosts, found = zip(*map(json.loads, seen), strict=True)
        if told := differing(hosts, found):
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
                print(text, file=sys.stderr, flush=True)
                said = now
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    # -- failing

    def fail(self, text: str, *, of_a_collective: bool = False) -> None:
        """Let all know that this process fails. Where a collective broke, another one died first: it is looked for."""
        if self.failed:
            return
        if self.store is None:
            self.failed, self.mine = text, True
            self.tell({"event": "failed", "rank": self.rank, "error": text})
            return
        until = time.monotonic() + (SILENT_S + 3 * TURN_S if of_a_collective else 0)
        while not self.failed and time.monotonic() < until and not self.stop.requested:
            time.sleep(0.1)
        with contextlib.suppress(DistError):
            mine = _told(self.rank, text)
            self.mine = self.store.compare_set(FAILED, "", mine).decode() == mine
            until = time.monotonic() + GRACE_S / 2
            while time.monotonic() < until and not self.store.check(["said"]):
                time.sleep(0.05)

    def leave(self, status: int) -> None:
        """The end of this process. One that failed ends here and now: nothing is to hang in what others broke."""
        if self.store is not None:
            with contextlib.suppress(DistError):
                self.store.set(f"left/{self.rank}", str(status))
                # rank 0 may keep the store, and says what the others have to say
                until = time.monotonic() + (GRACE_S / 2 if status else JOIN_S)
                others = [f"left/{rank}" for rank in range(1, self.size)]
                while self.first and not self.store.check(others) and time.monotonic() < until and not self.failed:
                    time.sleep(0.05)
            if status or self.failed:
                _exit(status or 1)
        self._over.set()

    # -- the watch, in a thread of its own

    def _look_after(self) -> None:
        number = 0
        while not self._over.wait(TURN_S):
            number += 1
            stall = self._stall()
            if self._own is None:
                self._say_stall(0, stall)
                continue
            try:
                why = self._look(number, stall)
            except DistError:
                why = "" if self._over.is_set() else "rank 0 or its launcher is gone"
            if why:
                self._end(why)

    def _look(self, number: int, stall: str) -> str:
        """One look; returns why this process must end, if so."""
        assert self._own is not None
        self._own.set(f"beat/{self.rank}", json.dumps([number, stall]))
        if os.getppid() != self._parent:
            return "the launcher of this process is gone"
        for rank in range(1, self.size) if self.first else [0]:
            if text := self._silent(rank):
                self._own.compare_set(FAILED, "", _told(rank, text))
        if not self._own.check([FAILED]):
            return ""
        told = json.loads(self._own.get(FAILED))
        return f"rank {told['rank']} ({told['host']}): {told['text']}"

    def _silent(self, rank: int) -> str:
        """Why a rank counts as dead; empty where it does not."""
        assert self._own is not None
        key, now = f"beat/{rank}", time.monotonic()
        if not self._own.check([key]) or self._own.check([f"left/{rank}"]):
            return ""
        beat = self._own.get(key)
        if beat != self._heard.get(rank, (b"", 0.0))[0]:
            self._heard[rank] = (beat, now)
            self._say_stall(rank, json.loads(beat)[1])
        silent = now - self._heard[rank][1]
        return f"silent for {silent:.0f} s: killed, or its machine is lost" if silent > SILENT_S else ""

    def _stall(self) -> str:
        """What the training thread has waited for too long; empty where it has not."""
        waiting = self.waits()
        waited = time.monotonic() - waiting.since if waiting else 0.0
        if waiting is None or waited < self.stall_s:
            return ""
        return f"rank {self.rank} has waited {waited:.0f} s for {waiting.what}: {waiting.where()}"

    def _say_stall(self, rank: int, text: str) -> None:
        if not self.first:
            return
        now = time.monotonic()
        if text and now - self._stalls.get(rank, -1e9) >= self.stall_s:
            self._stalls[rank] = now
            print(f"\nSTALL: {text}", file=sys.stderr, flush=True)
            self.tell({"event": "stall", "rank": rank, "at": text})

    def _end(self, why: str) -> None:
        if not self.failed:
            self.failed = why
            if self.first:
                print(f"\nerror: {why}", file=sys.stderr, flush=True)
                rank = int(why.split()[1]) if why.startswith("rank ") else 0
                self.tell({"event": "failed", "rank": rank, "error": why})
                with contextlib.suppress(DistError):
                    self._own.set("said", "1")  # type: ignore[union-attr]
        if not self._over.wait(GRACE_S):
            _exit(1)


def _exit(status: int) -> None:
    """At once, whatever other threads hang in; files are written so that this may happen at any time."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def join(stop: StopRequest) -> World:
    """Come together with the other processes that were started; alone where there are none. Raises UserError."""
    at = launched()
    if at is None or at.size == 1:
        world = World()
    else:
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
    world._watch.start()
    world.meet("the start")
    return world


# -- what must be alike ------------------------------------------------------------------------------------------------


def code_fingerprint() -> str:
    """Hash of the library's own source files."""
    root, digest = Path(__file__).parent.parent, hashlib.sha256(torch.__version__.encode())
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def short(value: object) -> str:
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
