"""The host's memory that each rank takes until it holds its share of a model, which every rank builds whole.

torchrun --nproc-per-node 2 -m benchmarks.host_memory stage1_align small         (a stage, a scale, key=value ...)
"""

import sys
from pathlib import Path

import torch

from midasheng.data.room import open_data
from midasheng.train import sharded
from midasheng.train.fit import build, open_starts
from midasheng.train.order import command_line


def gigabytes(field: str) -> float:
    """VmRSS (now) or VmHWM (the most so far) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024 / 1e9


def main() -> None:
    """Build, share, say what it took."""
    stage, scale, *settings = sys.argv[1:]
    order = command_line(f"configs/{stage}.yaml", ["--scale", scale, *settings])
    sources = open_data(order.stage, make=False)
    torch.distributed.init_process_group("gloo")
    imported = gigabytes("VmRSS")
    model = build(order, open_starts(order), sources.chat.added)[0]
    whole = sum(p.nbytes for p in model.parameters()) / 1e9
    built = gigabytes("VmRSS")
    sharded.shard(model, "cpu")
    print(
        f"rank {sharded.here()[0]}: weights {whole:.2f} GB; {imported:.2f} GB before, {built:.2f} built, "
        f"{gigabytes('VmRSS'):.2f} shared, at most {gigabytes('VmHWM'):.2f}"
    )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
