"""Four ranks that share a model, as two nodes of two: `python -m tests.train.nodes FOLDER TINY` starts them once for each
case, and prints a row of what came of it. What happens to a rank happens while the weights go from one to the others.

Ranks are forks, as in soak.py.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.train import soak  # first: it sets threads before torch is imported

# isort: split
import torch

from midasheng.model.sources import WeightsError
from midasheng.train import checkpoint, once, sharded, world
from midasheng.train import fit as fit_room
from tests.train.kills import ENDS_WITHIN_S, Inject, around, die, no_room

SETTINGS = {"run__length": "2 steps", "run__warmup": "1 steps", "hardware__strategy": "fsdp"}


def mapped() -> int:
    """Pieces of this process' memory that are a file of weights."""
    return Path("/proc/self/maps").read_text().count(once.PREFIX)


def watched(folder: Path) -> Inject:
    """FOLDER/rankN.pt has all tensors before they are shared, rankN.json how often this rank built them, and how much
    of a file is mapped before and behind."""

    def inject(rank: int) -> None:
        saw: dict[str, int] = {"built": 0}

        def builds(build):
            def built(*given: Any) -> Any:
                saw["built"] += 1
                return build(*given)

            return built

        def shares(shard):
            def shared(model, *rest):
                torch.save({n: t.detach() for n, t in once.named(model).items()}, folder / f"rank{rank}.pt")
                saw["mapped"] = mapped()
                shard(model, *rest)
                saw["mapped_behind"] = mapped()
                (folder / f"rank{rank}.json").write_text(json.dumps(saw))

            return shared

        around(fit_room, "build", builds)
        around(sharded, "shard", shares)

    return inject


def wrong_weights(rank: int) -> None:
    def refuses(*given: Any) -> Any:
        raise WeightsError("start: these weights are not those")

    if rank == 2:
        fit_room.build = refuses


def full_disk(rank: int) -> None:
    def make(save):
        def cramped(content, path):
            with no_room(10_000):
                return save(content, path)

        return cramped

    if rank == 2:
        around(checkpoint, "save", make)


def killed_while_it_writes(rank: int) -> None:
    def make(save):
        def half(content, path):
            save(content, path)
            os.truncate(path, path.stat().st_size // 2)
            die()

        return half

    if rank == 2:
        around(checkpoint, "save", make)


def killed_before_it_reads(rank: int) -> None:
    if rank == 3:
        around(once, "take", lambda take: lambda model, path: die())


def main(folder: Path, tiny: soak.Tiny) -> None:
    temporary = folder / "temporary"
    temporary.mkdir()
    cases: dict[str, Inject] = {
        "wrong weights": wrong_weights,
        "full disk": full_disk,
        "killed while it writes": killed_while_it_writes,
        "killed before it reads": killed_before_it_reads,
        "ends": watched(folder),
    }

    for number, (case, happens) in enumerate(cases.items()):

        def inject(rank: int, happens: Inject = happens) -> None:
            os.environ["TMPDIR"] = str(temporary)
            world.TURN_S = 0.2  # who was killed is missed sooner
            happens(rank)

        log = folder / f"{number}.log"
        ranks = soak.start(4, log, soak.arguments(tiny, folder, 0, **SETTINGS), inject, nodes=2)
        codes = soak.end(ranks, ENDS_WITHIN_S)
        left = sorted(p.name for p in temporary.iterdir())
        print(json.dumps({"case": case, "codes": codes, "log": log.read_text(), "left": left}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), soak.Tiny(Path(sys.argv[2])))
