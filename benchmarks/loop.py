"""The whole loop of stage 2 at mini against its bare steps: `python -m benchmarks.loop`, after `make stage1`.

In one process, with the data loaded in it: after each step of the loop (data, training, meter, ledger, logging) the
same packs go through a bare step (forward, backward, clipping, optimizer). CPU time of the one over that of the other.
"""

import tempfile
import time
from pathlib import Path

import torch

from midasheng.data.loader import StepBatch
from midasheng.train.fit import run_stage
from midasheng.train.module import StageModule
from midasheng.train.optim import clip
from stages.stage2_pretrain import contract

STEPS, SKIPPED = 120, 20


def main() -> None:
    """Train, and print the ratio."""
    step, bare, marks = StageModule.training_step, [], []

    def both(self: StageModule, batch: StepBatch, number: int) -> None:
        step(self, batch, number)
        marks.append(time.process_time())
        adam = self.optimizers()
        adam.zero_grad()
        for pack in batch.packs:
            self.manual_backward(self.model(pack).sum() / sum(pack.targets))
        clip(self.model.parameters(), 1.0)
        adam.step()
        bare.append(time.process_time() - marks[-1])

    StageModule.training_step = both
    settings = [
        f"run.length={STEPS} steps", "run.warmup=2 steps", "hardware.workers=0", "hardware.threads=1",
        "hardware.accelerator=cpu", "log.val_every=9999", "data.val_clips=1", "data.also=[]", "data.answers=0",
        "log.progress=false",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as runs:
        (Path(runs) / "mini").mkdir()
        (Path(runs) / "mini/stage1_align").symlink_to(Path("runs/mini/stage1_align").resolve())
        code = run_stage("configs/stage2_pretrain.yaml", contract, ["--scale", "mini", "--runs", runs, *settings])
    assert code == 0, code
    alone = sum(bare[SKIPPED:-1])
    whole = marks[-2] - marks[SKIPPED - 1] - sum(bare[SKIPPED - 1 : -2])
    print(f"stage 2 at mini, {len(bare) - 1 - SKIPPED} steps, {torch.__version__}, one thread, loading included")
    print(f"bare steps / whole loop: {alone / whole:.3f} (CPU time {alone:.1f} s / {whole:.1f} s)")


if __name__ == "__main__":
    main()
