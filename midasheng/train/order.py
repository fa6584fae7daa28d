"""What is asked for on the command line, and whether the run folder allows it."""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midasheng import config
from midasheng.config import ConfigError, Loaded, Stage, UserError
from midasheng.data.plan import differences
from midasheng.train.world import World, launched

LOCK = "lock"  # in a run folder
ENDS_S = 60.0  # for the ranks of a launcher that was killed to end by themselves


@dataclass(frozen=True)
class Order:
    """One stage to run, as asked for on the command line."""

    loaded: Loaded
    runs: Path
    scale: str
    name: str
    start_from: str  # run name instead of the stage's own in `start: [{from: STAGE}]`; "" for the stage's own
    fresh: bool

    @property
    def stage(self) -> Stage:
        """The config."""
        return self.loaded.stage

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.runs / self.scale / self.name


def command_line(default: str, argv: Sequence[str] | None = None) -> Order:
    """Read a stage's command line; `default` is its config file. Raises ConfigError."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--scale", default="mini")
    parser.add_argument("--config", default=default)
    parser.add_argument("--name", default="")
    parser.add_argument("--from", dest="start_from", default="")
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    a = parser.parse_intermixed_args(argv)
    path = Path(a.config or default)
    loaded = config.load(path, a.scale, a.settings)
    if at := launched():  # the launcher has decided
        for name, value in (("devices", at.here), ("nodes", at.nodes)):
            asked = getattr(loaded.stage.hardware, name)
            if loaded.origin.get(f"hardware.{name}") == "command line" and asked != value:
                raise ConfigError(f"hardware.{name}={asked}: {at.size} processes were started, {at.here} on a node")
        started = [f"hardware.devices={at.here}", f"hardware.nodes={at.nodes}"]
        loaded = config.load(path, a.scale, [*a.settings, *started])
    return Order(loaded, Path(a.runs), a.scale, a.name or path.stem, a.start_from, a.fresh)


def require(good: bool, message: str) -> None:
    """A stage's contract. Raises ConfigError."""
    if not good:
        raise ConfigError(message)


def trains(stage: Stage, part: str) -> bool:
    """Does the stage train tensors of this part (audio_encoder, audio_projector, decoder) themselves, not by LoRA?"""
    return any(glob.split(".")[0] in (part, "*") for glob in stage.train)


def check_run_folder(order: Order, inputs: dict[str, Any]) -> str:
    """ "new", "unfinished" or "finished". Raises ConfigError when the folder holds a run with other settings."""
    folder = order.folder
    if not (folder / "config.yaml").is_file():
        return "new"
    before, now = config.saved(folder / "config.yaml"), config.binding(order.stage)
    new_plan = order.stage.data.on_change == "restart_plan"
    for name in sorted(set(now) | set(before) - config.free_keys()):
        if new_plan and (name.split(".")[0] in ("data", "batch") or name in ("run.length", "run.warmup", "run.seed")):
            continue
        if before.get(name) != now.get(name):
            raise ConfigError(
                f"{folder} holds a run with {name} = {json.dumps(before.get(name))}, this one has "
                f"{json.dumps(now.get(name))}; keep both with NAME=..., or write over it with FRESH=1"
            )
    was = json.loads((folder / "inputs.json").read_text(encoding="utf-8"))
    remedy = "train this stage again with FRESH=1, or keep both with NAME=..."
    changed = differences(was["plan"], inputs["plan"])
    if changed and not new_plan:
        raise ConfigError(
            f"{folder} was trained on other data: {changed}; {remedy}, or go on in a new order with "
            "data.on_change=restart_plan"
        )
    if was["parents"] != inputs["parents"]:
        other = next(p["from"] for p in [*inputs["parents"], *was["parents"]] if p not in was["parents"])
        raise ConfigError(f"{folder} started from {other} when its weights were others (trained again since); {remedy}")
    return "finished" if (folder / "weights" / "stage.json").is_file() else "unfinished"


# -- one run at a time -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def held(folder: Path, ranks: World) -> Iterator[None]:
    """Inside, no other start of the same run writes into its folder: the first process looks for others, then all hold
    a lock, so that a run counts as alive while any of them is. The system releases it, whatever they die of. Raises
    UserError."""
    with contextlib.ExitStack() as holding:
        ranks.of_first("the lock of the run folder", lambda: _sign(holding.enter_context(_locked(folder, alone=True))))
        if not ranks.first:
            holding.enter_context(_locked(folder, alone=False))
        yield


def empty(folder: Path) -> None:
    """Throw away all that is in a run folder, but for its lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK:
            with contextlib.suppress(OSError):
                path.unlink()


def look_for_others(folder: Path) -> None:
    """Raises UserError where a run is going on in this folder; nothing is written."""
    if (folder / LOCK).exists():
        with _locked(folder, alone=True):
            pass


@contextlib.contextmanager
def _locked(folder: Path, *, alone: bool) -> Iterator[int]:
    """The open file, -1 where there is none. `alone`: where nobody else has it. POSIX locks, and not flock's: forked
    loader processes do not inherit them, and network file systems know them; where one does not, the run goes on
    without."""
    path = folder / LOCK
    handle = -1
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _take(handle, folder, alone)
    except OSError as error:
        print(f"note: {path} cannot be locked ({error.strerror}): a second start would not be noticed", file=sys.stderr)
    try:
        yield handle
    finally:
        if handle >= 0:
            os.close(handle)


def _sign(handle: int) -> None:
    """Who holds it."""
    about = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
    with contextlib.suppress(OSError):  # a full disk; no file
        os.truncate(handle, 0)
        os.pwrite(handle, about.encode(), 0)


def _take(handle: int, folder: Path, alone: bool) -> None:
    """Raises UserError where others hold it for too long, OSError where files cannot be locked."""
    until, said = time.monotonic() + ENDS_S, False
    while True:
        try:
            if alone:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.lockf(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        who = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
        if time.monotonic() > until:
            raise UserError(
                f"{folder}: this run is going on already: {who}, or another of its processes. Two that write into one "
                "folder would spoil it: wait for it, end it, or train another run with NAME=... If its machine is gone "
                f"and this stays, remove {folder / LOCK}"
            )
        if not said:
            print(f"{folder} is held by {who}; waiting {ENDS_S:.0f} s for its end", file=sys.stderr, flush=True)
            said = True
        time.sleep(0.5)
