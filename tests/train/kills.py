"""Two ranks share a model and die at chosen moments: `python -m tests.train.kills FOLDER TINY` makes FOLDER/whole, a run
nobody disturbs, and FOLDER/killed, which each case resumes where the one before it left it, and prints a row of each.
With `copies` behind it two pairs of ranks share a copy each; with `fsdp` or `ddp` FOLDER/killed is a small disk that
fills up.

Ranks are forks, as in soak.py. Where a case says that one dies, it is -9 from within, at that place and no other.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.train import soak  # first: it sets threads before torch is imported

# isort: split
from midasheng.model import weights
from midasheng.train import checkpoint, shard_files, sharded
from midasheng.train import fit as fit_room
from midasheng.train.module import StageModule

STEPS, EVERY = 8, 2
ENDS_WITHIN_S = 240  # a rank whose neighbour died, on a machine with much else to do
FILE_BYTES = 60_000  # of weights/: several files
SETTINGS = {
    "run__length": f"{STEPS} steps", "run__warmup": "2 steps", "log__checkpoint_every": EVERY, "optim__name": "adamw8bit",
    "hardware__strategy": "fsdp",
}  # fmt: skip
Inject = Callable[[int], None]  # in a rank, before it runs


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def around(room: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """In this process, which is a rank, `room.name` becomes what `make` gives for it."""
    setattr(room, name, make(getattr(room, name)))


@contextlib.contextmanager
def no_room(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: the system's write fails, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


# -- what happens to a rank ------------------------------------------------------------------------------------------


def before_step(at: int, what: Callable[[StageModule], None], *ranks: int) -> Inject:
    """`what` happens on these ranks before step `at` (from 0)."""

    def make(step):
        def stepped(self, batch, number):
            if batch.step == at:
                what(self)
            step(self, batch, number)

        return stepped

    return lambda rank: around(StageModule, "training_step", make) if rank in ranks else None


def behind_checkpoint(step: int) -> Inject:
    """All die one step later."""

    def dies(module: StageModule) -> None:
        module.writer.wait()
        die()

    return before_step(step + 1, dies, *range(4))


def half_a_shard(*ranks: int) -> Inject:
    """Under its own name, and the process is gone."""

    def inject(rank: int) -> None:
        def make(save):
            def half(tensors, path, metadata):
                save(tensors, path, metadata=metadata)
                os.truncate(path, path.stat().st_size // 2)
                die()

            return half

        if rank in ranks:
            around(shard_files, "save_file", make)

    return inject


def before_the_checkpoint(rank: int) -> None:
    """All shards are there, and nothing names them."""
    if rank == 0:
        around(checkpoint, "write", lambda write: lambda *given: die())


def half_a_checkpoint(rank: int) -> None:
    def make(write):
        def half(self, data):
            if not str(self.name).endswith(".part"):  # the weights that ranks have in common
                return write(self, data)
            write(self, data[: len(data) // 2])
            self.flush()
            if self.tell() > 1000:
                die()
            return write(self, data[len(data) // 2 :]) + len(data) // 2

        return half

    if rank == 0:
        around(checkpoint._Telling, "write", make)


def full_disk(rank: int) -> None:
    def make(write):
        def cramped(folder, mine):
            with no_room(5_000):
                return write(folder, mine)

        return cramped

    if rank == 1:
        around(shard_files, "write", make)


def slow_disk(rank: int) -> None:
    """Rank 1 writes its shard of step 4 while steps 5 and 6 are taken; all die when that of step 6 begins."""
    go = threading.Event()

    def slow(write):
        def waits(folder, mine):
            assert rank == 0 or go.wait(600)
            return write(folder, mine)

        return waits

    def make(step):
        def stepped(self, batch, number):
            if rank == 1 and batch.step in (2 * EVERY, 2 * EVERY + 1):
                assert self.writer.thread.is_alive()
            if batch.step == 2 * EVERY + 1:
                go.set()
                self.writer.thread.join()
            step(self, batch, number)

        return stepped

    around(shard_files, "write", slow)
    around(StageModule, "training_step", make)
    around(shard_files, "place", lambda place: lambda at, step: die() if step == 3 * EVERY else place(at, step))


def some_weights(rank: int) -> None:
    """The first file of weights/ is there."""

    def make(save):
        def saved(tensors, path, metadata):
            save(tensors, path, metadata=metadata)
            die()

        return saved

    if rank == 0:
        around(weights, "save_file", make)


def some_tensors(rank: int) -> None:
    """Of those that are gathered for weights/."""
    taken: list[int] = []

    def make(gather):
        def gathers(tensor):
            taken.append(0)
            return die() if len(taken) == 5 else gather(tensor)

        return gathers

    if rank == 1:
        around(sharded, "gather", make)


def full_disk_for_weights(rank: int) -> None:
    def make(hand_off):
        def cramped(*given, **more):
            with no_room(FILE_BYTES // 2):
                return hand_off(*given, **more)

        return cramped

    if rank == 0:
        around(fit_room.weights, "hand_off", make)


# -- the run -----------------------------------------------------------------------------------------------------------


def shard(run: Path) -> Path:
    """Rank 1's of the last checkpoint."""
    named = checkpoint.read(run / "checkpoints" / checkpoint.LAST)["shards"]["folder"]
    return run / "checkpoints" / named / "00001-of-00002.safetensors"


@contextlib.contextmanager
def missing(run: Path) -> Iterator[None]:
    path = shard(run)
    path.rename(run / "aside")
    yield
    (run / "aside").rename(path)


@contextlib.contextmanager
def flipped(run: Path) -> Iterator[None]:
    path = shard(run)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    yield
    path.write_bytes(good)


CASES: dict[str, Inject] = {
    "begins": behind_checkpoint(EVERY),
    "half a shard of one": half_a_shard(1),
    "half a shard of all": half_a_shard(0, 1),
    "shards and no checkpoint": before_the_checkpoint,
    "shards and half a checkpoint": half_a_checkpoint,
    "full disk of one": full_disk,
    "a shard is missing": lambda rank: None,
    "a shard is another": lambda rank: None,
    "slow disk of one": slow_disk,
    "one file of weights": some_weights,
    "some tensors of weights": some_tensors,
    "full disk for weights": full_disk_for_weights,
    "ends": lambda rank: None,
}  # fmt: skip
SPOILT = {"a shard is missing": missing, "a shard is another": flipped}


# two copies of the model, of ranks 0 and 1, and 2 and 3; the first one's are those that write. Case: ranks, of which so
# many share a copy (0: all), what happens
COPIES: dict[str, tuple[int, int, Inject]] = {
    "begins": (4, 2, behind_checkpoint(EVERY)),
    "half a shard of one": (4, 2, half_a_shard(1)),
    "one that does not write": (4, 2, before_step(2 * EVERY, lambda module: die(), 3)),
    "goes on": (4, 2, behind_checkpoint(2 * EVERY)),
    "all share": (4, 0, behind_checkpoint(3 * EVERY)),
    "ends": (2, 0, lambda rank: None),
}  # fmt: skip


# -- a disk that is really full ----------------------------------------------------------------------------------------


def fill(run: Path, leave: int) -> None:
    """The disk of a run, but for so many bytes."""
    with (run / "film").open("wb") as film:
        film.write(bytes(max(0, shutil.disk_usage(run).free - leave)))


def room_for_shards(module: StageModule) -> None:
    """And not for the checkpoint that names them."""
    there = module.run.glob("checkpoints/shards-*/*")
    fill(module.run, sum(path.stat().st_size + 4096 for path in there))


def full_for_weights(rank: int) -> None:
    def make(hand_off):
        def cramped(model, folder, *given, **more):
            fill(folder.parent, FILE_BYTES // 2)
            return hand_off(model, folder, *given, **more)

        return cramped

    if rank == 0:
        around(fit_room.weights, "hand_off", make)


FULL: dict[str, Inject] = {
    "begins": behind_checkpoint(EVERY),
    "checkpoint": before_step(2 * EVERY - 1, lambda module: fill(module.run, 8192), 0),
    "name of shards": before_step(2 * EVERY - 1, room_for_shards, 0),
    "rows": before_step(2 * EVERY - 1, lambda module: fill(module.run, 0), 0),
    "weights": full_for_weights,
    "ends": lambda rank: None,
}  # fmt: skip


def main(folder: Path, tiny: soak.Tiny, kind: str = "") -> None:
    weights.FILE_BYTES = FILE_BYTES
    cases = {case: (2, 0, inject) for case, inject in (FULL if kind in ("fsdp", "ddp") else CASES).items()}
    if kind == "copies":
        cases = COPIES
    if kind == "ddp":
        del cases["name of shards"]

    def given(name: str, shard: int, every: int = EVERY) -> list[str]:
        strategy = {"hardware__strategy": "ddp"} if kind == "ddp" else {"hardware__shard": shard}
        return soak.arguments(tiny, folder / name, 0, **SETTINGS | strategy | {"log__checkpoint_every": every})

    log, (world, share, _) = folder / "whole.log", next(iter(cases.values()))
    soak.ends_well(soak.start(world, log, given("whole", share)), log)
    run = folder / "killed" / soak.RUN
    for number, (case, (world, share, inject)) in enumerate(cases.items()):
        log = folder / f"{number}.log"
        (run / "film").unlink(missing_ok=True)
        with (SPOILT if not kind else {}).get(case, contextlib.nullcontext)(run):
            before = {p.name: p.read_bytes() for p in run.glob("*.jsonl")}
            every = STEPS if case == "rows" else EVERY  # enough of them before a checkpoint
            codes = soak.end(soak.start(world, log, given("killed", share, every), inject), ENDS_WITHIN_S)
            row = {"case": case, "codes": codes, "log": log.read_text()}
            row["untouched"] = before == {p.name: p.read_bytes() for p in run.glob("*.jsonl")}
        last = run / "checkpoints" / checkpoint.LAST
        saved = checkpoint.read(last)
        if saved["shards"]:
            shard_files.verify(last.parent, saved["shards"])
        row |= {"step": saved["step"], "named": saved["shards"].get("folder")}
        row |= {"there": sorted(p.name for p in last.parent.iterdir())}
        print(json.dumps(row | {"weights": sorted(p.name for p in run.glob("weights*"))}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), soak.Tiny(Path(sys.argv[2])), *sys.argv[3:])
