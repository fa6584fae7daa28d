"""Trains, kills, goes on: `python -m tests.train.soak FOLDER ROUNDS [SEED] [STRATEGY] [TINY]` makes FOLDER/whole, in one
process, and FOLDER/killed, under ddp (the default) or fsdp; `FOLDER world=N [TINY]` both, with one kill, on N processes.

Python, torch and all the rest take longer to come up than a round takes to train. So they are imported once, and every
rank is a fork of this process, which computes nothing itself: behind OpenMP's threads a fork would hang.
"""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before torch is imported

import contextlib
import json
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from midasheng import config
from midasheng.data.quarantine import FILE
from midasheng.data.room import read_data
from midasheng.train import checkpoint
from midasheng.train.fit import run_stage
from midasheng.train.order import Order
from stages import stage1_align
from tests.conftest import CONFIGS, LANGUAGES, Tiny, make_tiny, record
from tests.conftest import run_stage as run_here

LASTS_S = 600  # a round of a few steps, on a machine with much else to do
EVERY = 3  # steps between checkpoints
SAME_WORLD_STEPS = 15
WORLDS, WORKERS = (1, 2, 4), (0, 1, 2)
STAGE = CONFIGS / "stage1_align.yaml"
RUN = Path("mini/stage1_align")  # below RUNS
SETTINGS = {
    "optim__name": "adamw", "batch__packs_per_step": 4, "batch__clips_per_step": 8, "run__warmup": "10 steps",
    "log__val_every": 1000, "log__checkpoint_every": EVERY, "data__val_clips": 1,
}  # fmt: skip


# -- processes ---------------------------------------------------------------------------------------------------------


def fork(log: Path, work: Callable[[], int], env: dict[str, str] | None = None) -> int:
    """`work` in a process of its own, which prints into `log` and ends with its exit status; returns its id."""
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would inherit the locks of threads that it lacks"
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setpgid(0, 0)  # with the loader's workers, to be ended together
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.environ |= env or {}
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(
    world: int, log: Path, arguments: Sequence[str], inject: Callable[[int], None] = lambda rank: None, nodes: int = 1
) -> list[int]:
    """All ranks of a stage, with what torchrun would tell them; returns their ids. `inject`: called in each before.
    `nodes`: how many this machine stands for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": (here := world // nodes), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }  # fmt: skip
    ranks = [
        {**common, "RANK": n, "LOCAL_RANK": n % here, "NODE_RANK": n // here, "GROUP_RANK": n // here}
        if world > 1
        else {}
        for n in range(world)
    ]
    arguments = [*arguments, f"hardware.devices={here}", f"hardware.nodes={nodes}"]

    def work(rank: int) -> int:
        inject(rank)
        return run_stage(str(STAGE), stage1_align.contract, arguments)

    return [fork(log, partial(work, n), {k: str(v) for k, v in env.items()}) for n, env in enumerate(ranks)]


def alive(children: Sequence[int]) -> bool:
    """Are all still there?"""
    return not any(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) for child in children)


def end(children: Sequence[int], within_s: float) -> list[int]:
    """Exit statuses, behind some time for them to end by themselves; then what is left is killed, workers too."""
    until, codes = time.monotonic() + within_s, dict[int, int]()
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            if (found := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(found[1])
            elif time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    for child in children:  # workers whose parent died
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
    return [codes[child] for child in children]


def ends_well(children: Sequence[int], log: Path) -> None:
    codes = end(children, LASTS_S)
    assert set(codes) == {0}, f"{codes}\n{log.read_text()[-4000:]}"


# -- runs --------------------------------------------------------------------------------------------------------------


def arguments(tiny: Tiny, runs: Path, workers: int, **more: object) -> list[str]:
    return ["--runs", str(runs), *tiny.settings(**SETTINGS | {"hardware__workers": workers} | more)]


def steps_done(run: Path) -> int:
    """Where a resume would begin. Raises CheckpointError where what it would read is not whole."""
    last = run / "checkpoints" / checkpoint.LAST
    if not last.is_file():
        return 0
    saved = checkpoint.read(last)
    if saved["shards"]:
        checkpoint.shards_of(saved, last, verify=True)
    return int(saved["step"])


def killed(
    runs: Path, world: int, given: Sequence[str], log: Path, *, at: int, later_s: float, victim: int | None
) -> str:
    """A run that goes on until step `at` is in its metrics, and a moment more; then a rank, or all (None), get -9.
    `at` 0: it is killed while it starts."""
    metrics = runs / RUN / "metrics.jsonl"
    began = time.time_ns()  # a resume writes the file anew, without the later rows; an inode's number may come again
    children, deadline = start(world, log, given), time.monotonic() + LASTS_S
    while at and alive(children) and time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):  # a run that begins anew takes the old one away
            if metrics.stat().st_mtime_ns > began:
                rows = metrics.read_bytes().split(b"\n")[:-1]
                if rows and json.loads(rows[-1])["step"] >= at:
                    break
        time.sleep(0.002)
    time.sleep(later_s)
    there = alive(children)
    for child in children if victim is None else [children[victim]]:
        os.kill(child, signal.SIGKILL)
    codes = end(children, within_s=0 if victim is None else 30)
    assert there, f"it ended before it was killed: {codes}\n{log.read_text()[-4000:]}"
    return f"exit {codes}"


def prepared(folder: Path, given: str = "") -> Tiny:
    """The tiny corpus with text weights, made by a process of its own where it is not given."""
    if given:
        return Tiny(Path(given))

    def make() -> int:
        from midasheng.curate.tokenizer import save_tokenizer, train_tokenizer

        tiny = make_tiny(folder / "tiny")
        texts = [json.dumps(record(n), ensure_ascii=False) for n in range(42)]
        save_tokenizer(train_tokenizer(texts, LANGUAGES, max_tokens=400), tiny.root / "tokenizer")
        run_here("text_decoder", tiny, tiny.root, name="text_decoder", scale_folder=False)
        return 0

    log = folder / "tiny.log"
    ends_well([fork(log, make)], log)
    return Tiny(folder / "tiny")


def order(tiny: Tiny, runs: Path, steps: int) -> Order:
    given = tiny.settings(**SETTINGS, run__length=f"{steps} steps")
    return Order(config.load(STAGE, "mini", given, CONFIGS), runs, "mini", "stage1_align", "", False)


def soak(folder: Path, rounds: int, seed: int, strategy: str, tiny: Tiny) -> None:
    """An unbroken run, and one that is killed `rounds` times, each with the same sample in quarantine."""
    steps = rounds * EVERY + EVERY
    for runs in (folder / "whole", folder / "killed"):
        (runs / RUN).mkdir(parents=True)
    length = {"run__length": f"{steps} steps"}
    log = folder / "whole.log"

    def set_aside() -> int:
        corpus = read_data(order(tiny, folder, steps).stage, make=True).corpora[0]
        for runs in (folder / "whole", folder / "killed"):
            (runs / RUN / FILE).write_text(f"{corpus.card.name}/{corpus.key(0)}\n")
        return 0

    ends_well([fork(log, set_aside)], log)
    ends_well(start(1, log, arguments(tiny, folder / "whole", 0, **length)), log)
    draw, runs = random.Random(seed), folder / "killed"
    length["hardware__strategy"] = strategy
    for number in range(rounds):
        world, workers = draw.choice(WORLDS), draw.choice(WORKERS)
        done = steps_done(runs / RUN)
        # by round n about EVERY * n steps are done; each sixth is killed while it starts
        at = (
            0
            if draw.random() < 1 / 6
            else min(steps - 1, max(done + 1, EVERY * number + draw.randint(0, 2 * EVERY - 1)))
        )
        victim = draw.choice([None, draw.randrange(world)])
        later_s = draw.uniform(0, 1.0 if at == 0 else 0.05)
        log = folder / f"round{number}.log"
        said = killed(runs, world, arguments(tiny, runs, workers, **length), log, at=at, later_s=later_s, victim=victim)
        whom = "all" if victim is None else f"rank {victim}"
        print(
            f"round {number}: from step {done} on {world} processes, {workers} workers; {whom} killed "
            f"{f'at step {at}' if at else 'while it starts'}; {said}; last.ckpt at {steps_done(runs / RUN)}",
            flush=True,
        )
    log = folder / "last.log"
    ends_well(start(draw.choice(WORLDS), log, arguments(tiny, runs, draw.choice(WORKERS), **length)), log)


def same_world(folder: Path, world: int, tiny: Tiny) -> None:
    """An unbroken run, whose first process makes the index while the others wait, and one that is killed behind its first
    checkpoint; both on as many processes."""
    length, log = {"run__length": f"{SAME_WORLD_STEPS} steps"}, folder / "whole.log"
    ends_well(start(world, log, arguments(tiny, folder / "whole", 0, **length)), log)
    given, log = arguments(tiny, folder / "killed", 0, **length), folder / "killed.log"
    # behind the second checkpoint's step: the first one is in place by then, however slow the disk
    killed(folder / "killed", world, given, log, at=2 * EVERY + 1, later_s=0.0, victim=None)
    assert 0 < steps_done(folder / "killed" / RUN) < SAME_WORLD_STEPS
    ends_well(start(world, log, given), log)


if __name__ == "__main__":
    where, how_often, *rest = sys.argv[1:]
    to = Path(where)
    to.mkdir(parents=True, exist_ok=True)
    if how_often.startswith("world="):
        same_world(to, int(how_often.removeprefix("world=")), prepared(to, *rest))
    else:
        seed, strategy, *rest = [*rest, *["0", "ddp"][len(rest) :]]
        soak(to, int(how_often), int(seed), strategy, prepared(to, *rest))
