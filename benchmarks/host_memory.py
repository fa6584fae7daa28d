"""The host's memory that each rank takes until it holds its share of a model, which every rank builds whole.

python -m benchmarks.host_memory RANKS STAGE SCALE [key=value ...], for example 2 stage1_align small
"""

import os
import socket
import subprocess
import sys
from pathlib import Path


def gigabytes(field: str) -> float:
    """VmRSS (now) or VmHWM (the most so far) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024 / 1e9


def rank(stage: str, scale: str, settings: list[str]) -> None:
    """Build, share, say what it took."""
    import torch

    from midasheng.data.room import open_data
    from midasheng.train import sharded
    from midasheng.train.fit import build, command_line, open_starts

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


def main() -> None:
    """Start the ranks."""
    ranks, *rest = sys.argv[1:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": ranks}
    started = [
        subprocess.Popen([sys.executable, "-m", "benchmarks.host_memory", *rest], env=env | {"RANK": str(n)})
        for n in range(int(ranks))
    ]
    sys.exit(max(abs(one.wait()) for one in started))


if __name__ == "__main__":
    rank(sys.argv[1], sys.argv[2], sys.argv[3:]) if "RANK" in os.environ else main()
