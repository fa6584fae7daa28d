"""One rank of a world: runs stages one after the other in one process group, and keeps the first step's gradients.

python -m tests.train.ranks JOBS.json, with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set; a job is
{"stage", "root", "runs", "name", "settings"}, settings as in conftest.Tiny.settings.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from midasheng.train import module as module_room
from midasheng.train.fit import fit
from midasheng.train.module import Stopped
from tests.conftest import Tiny, order_for

torch.set_num_threads(1)


def keep_gradients(path: Path) -> None:
    """The first complete gradient, before it is clipped, into `path` (rank 0)."""
    clip, training_step = module_room.clip, module_room.StageModule.training_step

    def step(self, batch, batch_idx):
        def kept(parameters, *rest):
            if batch.step == 0:
                whole = {}
                for name, p in self.model.named_parameters():
                    if p.grad is not None:
                        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                        whole[name] = grad.detach().clone()
                if self.trainer.global_rank == 0:
                    torch.save(whole, path)
            return clip(parameters, *rest)

        module_room.clip = kept
        training_step(self, batch, batch_idx)
        module_room.clip = clip

    module_room.StageModule.training_step = step
    keep_gradients.undo = lambda: setattr(module_room.StageModule, "training_step", training_step)


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        order = order_for(job["stage"], Tiny(Path(job["root"])), Path(job["runs"]), name=job["name"], **job["settings"])
        order.folder.parent.mkdir(parents=True, exist_ok=True)
        keep_gradients(order.folder.parent / f"{job['name']}.gradients.pt")
        try:
            fit(order)
        except Stopped:
            print("stopped", flush=True)
        keep_gradients.undo()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()


if __name__ == "__main__":
    assert os.environ["OMP_NUM_THREADS"] == "1"
    main()
