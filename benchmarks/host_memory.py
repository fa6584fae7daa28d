"""The host's memory that the ranks of a node take until each holds its share of a model: built by each, or once.

python -m benchmarks.host_memory 4 stage1_align small         (processes, a stage, a scale, key=value ...)

All processes are looked at together, every LOOK_S: Pss counts a page that several have mapped once, and what of it lies
in no file cannot be taken back by the system, which drops pages of files when it needs the room.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from midasheng.config import FSDP
from midasheng.data.loader import keep_freed_memory
from midasheng.data.room import open_data
from midasheng.train import once, sharded, world
from midasheng.train.fit import begin, build, open_starts
from midasheng.train.order import command_line

EACH, ONCE = "each", "once"
LOOK_S = 0.02
STAYS_S = 2.0  # with its share, to be looked at


def gigabytes(file: Path, field: str) -> float:
    """A line of a file of /proc that says kB."""
    lines = (line.split() for line in file.read_text().splitlines())
    return next(int(words[1]) for words in lines if words[0] == f"{field}:") * 1024 / 1e9


def rank(how: str, stage: str, scale: str, *settings: str) -> None:
    """Build, share, say what it took."""
    order = command_line(f"configs/{stage}.yaml", ["--scale", scale, *settings])
    keep_freed_memory()  # as in training
    sources = open_data(order.stage, make=False)
    ranks = world.join(world.StopRequest())
    ranks.begin()
    torch.distributed.init_process_group("gloo")
    now = Path("/proc/self/status")
    imported, began = gigabytes(now, "VmRSS"), time.monotonic()
    starts, added = open_starts(order), sources.chat.added
    model = (build(order, starts, added) if how == EACH else begin(order, starts, added, ranks, FSDP))[0]
    whole = sum(p.nbytes for p in model.parameters()) / 1e9
    built, seconds = gigabytes(Path("/proc/self/smaps_rollup"), "Pss_Anon"), time.monotonic() - began
    sharded.shard(model, "cpu")
    share, left = gigabytes(Path("/proc/self/smaps_rollup"), "Pss_Anon"), Path("/proc/self/maps").read_text()
    torch.distributed.barrier()
    time.sleep(STAYS_S)
    print(
        f"  rank {ranks.rank}: weights {whole:.2f} GB; {imported:.2f} GB before, {built:.2f} of its own with the model "
        f"({seconds:.1f} s), {share:.2f} with its share, at most {gigabytes(now, 'VmHWM'):.2f} with what is mapped; "
        f"{left.count(once.PREFIX)} files of weights mapped behind",
        flush=True,
    )
    ranks.leave(0)
    torch.distributed.destroy_process_group()


def node(how: str, processes: int, *asked: str) -> None:
    """Start the ranks and look at all of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "benchmarks.host_memory", how, *asked, f"hardware.devices={processes}",
        f"hardware.strategy={FSDP}",
    ]  # fmt: skip
    print(f"{processes} processes, the model is built by {'each' if how == EACH else 'one'}:", flush=True)
    ranks = [
        subprocess.Popen(command, env=env | {"RANK": str(n), "LOCAL_RANK": str(n)}) for n in range(processes)
    ]  # fmt: skip
    most = dict.fromkeys(("Pss", "Pss_Anon"), 0.0)
    while all(p.poll() is None for p in ranks):
        for field in most:
            files = [Path(f"/proc/{p.pid}/smaps_rollup") for p in ranks]
            try:
                most[field] = max(most[field], sum(gigabytes(f, field) for f in files))
            except (OSError, StopIteration):  # one has ended
                break
        time.sleep(LOOK_S)
    assert not any(p.wait() for p in ranks)
    print(
        f"  together at most {most['Pss']:.2f} GB, of them at most {most['Pss_Anon']:.2f} that no file holds",
        flush=True,
    )


def main() -> None:
    """Both ways, one after the other."""
    first, *asked = sys.argv[1:]
    if first in (EACH, ONCE):
        rank(first, *asked)
        return
    for how in (EACH, ONCE):
        node(how, int(first), *asked)


if __name__ == "__main__":
    main()
