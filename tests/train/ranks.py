"""One rank of a world: runs stages one after the other in one process group, and keeps the first step's gradients.

python -m tests.train.ranks JOBS.json, with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set; a job is
{"stage", "root", "runs", "name", "settings"}, settings as in conftest.Tiny.settings, and what of the following it needs:
"start_from" a run, "backwards" (see `watched`), "dies": the step before which all ranks die without a warning,
"file_bytes" of weights/.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from midasheng.model import weights
from midasheng.train import module as module_room
from midasheng.train.fit import fit
from midasheng.train.module import StageModule
from midasheng.train.sharded import gather
from midasheng.train.world import StopRequest, World, join
from tests.conftest import Tiny, order_for


@contextlib.contextmanager
def watched(path: Path, backwards: bool = False, dies: int = -1) -> Iterator[None]:
    """Inside, the first complete gradient, before it is clipped, goes into `path`; `backwards`: the packs of a step are
    taken from the last to the first, which changes nothing but the order in which gradients are summed."""
    clip, training_step = module_room.clip, StageModule.training_step

    def step(self, batch, batch_idx):
        if batch.step == dies:
            self.writer.wait()
            raise MemoryError

        def kept(parameters, *rest):
            if batch.step == 0:
                grads = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
                whole = {n: gather(grad).clone() for n, grad in grads.items()}
                if self.trainer.global_rank == 0:
                    torch.save(whole, path)
            return clip(parameters, *rest)

        module_room.clip = kept
        if backwards:
            batch = dataclasses.replace(batch, numbers=batch.numbers[::-1], packs=batch.packs[::-1])
        training_step(self, batch, batch_idx)

    StageModule.training_step = step
    try:
        yield
    finally:
        module_room.clip, StageModule.training_step = clip, training_step


def main() -> None:
    torch.set_num_threads(1)
    ranks = join(StopRequest())
    ranks.begin()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        order = order_for(
            job["stage"], Tiny(Path(job["root"])), Path(job["runs"]), name=job["name"],
            start_from=job.get("start_from", ""), **job["settings"],
        )  # fmt: skip
        order.folder.parent.mkdir(parents=True, exist_ok=True)
        weights.FILE_BYTES = job.get("file_bytes", 5 * 10**9)
        gradients = order.folder.parent / f"{job['name']}.gradients.pt"
        with watched(gradients, job.get("backwards", False), job.get("dies", -1)):
            with contextlib.suppress(MemoryError) if "dies" in job else contextlib.nullcontext():
                ranks.fail = (lambda *_, **__: None) if "dies" in job else partial(World.fail, ranks)  # without a word
                fit(order, ranks)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
    ranks.leave(0)


if __name__ == "__main__":
    main()
