"""One of two ranks that share tiny models: `python -m tests.train.shares FOLDER TINY`, with RANK and the like set, writes
FOLDER/RANK.json: for each run below FOLDER how it ended; for each case what was tried of a model without content, and what
a step of a real one then took."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.compute import allocated
from midasheng import config
from midasheng.config import UserError
from midasheng.data.plan import Budget
from midasheng.model import adapt
from midasheng.model.audio_lm import AudioLM
from midasheng.train import memory, optim, sharded
from midasheng.train.adam8bit import local
from midasheng.train.fit import fit
from midasheng.train.memory import Dearest, Memory, full_pack
from midasheng.train.world import StopRequest, World, join
from tests.conftest import Tiny, order_for
from tests.model import VOCAB, tiny_lm

SLOTS, FRAMES, MOST = 400, 504, Dearest(40, 25, 0.4)
ODD = {"vocab_size": VOCAB + 5, "intermediate_size": 65}  # not the same on both ranks
GIBS = (3.0, 2.0)  # of memory that the ranks have
CPU = torch.device("cpu")


def all_of(half: bool) -> AudioLM:
    lm = tiny_lm(**ODD)
    lm.recompute(["audio_encoder"])
    adapt.set_precision(lm, "bf16" if half else "fp32")
    return lm


def encoder_of(half: bool) -> AudioLM:
    """The decoder is frozen."""
    lm = tiny_lm(**ODD)
    adapt.freeze_all_but(lm, ["audio_encoder.*", "audio_projector.*"])
    adapt.set_precision(lm, "bf16" if half else "fp32")
    return lm


CASES: dict[str, tuple[Callable[[bool], AudioLM], bool, int, str]] = {  # half precision, packs of a step, optimizer
    "all, one pack": (all_of, True, 1, "adamw8bit"), "all, two packs": (all_of, True, 2, "adamw8bit"),
    "encoder, one pack": (encoder_of, False, 1, "adamw"), "encoder, two packs": (encoder_of, False, 2, "adamw"),
}  # fmt: skip


def without_content(lm: AudioLM) -> AudioLM:
    """Parameters on the meta device, as those of fit.skeleton."""
    for module in lm.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad))
    lm.decoder.tie()
    return lm


def stage(name: str, rank: int) -> config.Stage:
    found = config.Stage(name="tried", train=["*"])
    found.optim.name = name
    found.hardware.memory_gib = GIBS[rank]
    return found


def tried(
    make: Callable[[bool], AudioLM], half: bool, packs: int, name: str, rank: int, world: int = 2
) -> dict[str, Any]:
    """What Memory says on this rank. In a process group, real or imagined."""
    lm = without_content(make(half))
    sharded.blank(lm, CPU, 0)
    step = Memory(lm, stage(name, rank), CPU, MOST, packs, world)
    fit = step.fit(shape := Budget(SLOTS, FRAMES, packs * world))
    said = {"state": step.state, "before": step.before, "limit": step.limit, "step": step.step(FRAMES, SLOTS)}
    said |= {"needs": step.needs(fit, shape), "residual": fit.residual}
    said |= {"needs of two packs": step.needs(fit, Budget(SLOTS, FRAMES, 2 * world))}
    said["mine"] = sum(local(t).untyped_storage().nbytes() for t in [*lm.parameters(), *lm.buffers()])
    lm.to_empty(device="meta")
    return said


def really(make: Callable[[bool], AudioLM], half: bool, packs: int, name: str) -> int:
    """The most that torch's allocator gives out in a whole second step, over nothing."""
    lm = make(half)
    sharded.shard(lm, "cpu")
    lm.train()
    adam = optim.optimizer(lm.named_parameters(), config.Optim(name=name))
    rows = [full_pack(FRAMES, SLOTS, MOST, int(lm.decoder.config.vocab_size)) for _ in range(packs)]

    def step() -> None:
        for number, row in enumerate(rows):
            sharded.sync(lm, number == packs - 1)
            lm(row).sum().backward()
        optim.clip(lm.parameters(), 1.0, sharded.shards_group(lm))
        adam.step()
        adam.zero_grad()

    step()
    states = [local(t) for of in adam.state.values() for t in of.values() if isinstance(t, torch.Tensor)]
    packs_of = [t for row in rows for t in vars(row).values() if isinstance(t, torch.Tensor)]
    kept = [*lm.parameters(), *lm.buffers(), *states, *packs_of]
    return memory.size_of(kept) + allocated(step)


# -- runs --------------------------------------------------------------------------------------------------------------

SHARED = {"hardware__strategy": "fsdp", "batch__kind": "throughput", "hardware__devices": 2}
AUTO = SHARED | {"batch__pack_slots": "auto", "hardware__memory_gib": 0.02}


def runs(folder: Path, tiny: Tiny, ranks: World) -> dict[str, str]:
    """Of each the error, or "ran"."""
    said = {}

    def run(name: str, at: str, **settings: object) -> None:
        try:
            fit(order_for("stage1_align", tiny, folder / at, **settings), ranks)
            said[name] = "ran"
        except UserError as error:
            said[name] = str(error)

    run("auto", "auto", **AUTO)
    found = config.saved(folder / "auto/mini/stage1_align/config.yaml")["batch.pack_slots"]
    check, dearest = memory.check, memory.dearest
    memory.check = lambda *given: []  # nothing is tried
    run("number", "number", **AUTO | {"batch__pack_slots": found})
    memory.check = check
    if ranks.first:
        shutil.rmtree(folder / "auto/mini/stage1_align/weights")  # not finished
    ranks.gather("a run to resume")
    run("less", "auto", **AUTO | {"hardware__memory_gib": 0.005})
    run("refused", "refused", **SHARED, batch__pack_slots=1200, hardware__memory_gib=0.02)
    memory.dearest = lambda *given: dataclasses.replace(dearest(*given), slots=20 + ranks.rank)
    run("sizes", "sizes", **SHARED, batch__pack_slots=300)
    memory.dearest = dearest
    return said


def main(folder: Path, tiny: Tiny) -> None:
    torch.set_num_threads(1)
    ranks = join(StopRequest())
    ranks.begin()
    said: dict[str, Any] = runs(folder, tiny, ranks)
    said |= {case: tried(*of, ranks.rank) | {"really": really(*of)} for case, of in CASES.items()}
    (folder / f"{ranks.rank}.json").write_text(json.dumps(said))
    ranks.leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Tiny(Path(sys.argv[2])))
