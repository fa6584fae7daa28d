"""Stage 2: a frozen decoder learns to listen, through LoRA; `make stage2`.

Takes the encoder of stage 1 and nothing else of it, a fresh projector and the pretrained decoder, trains encoder,
projector and LoRA on the large mix, and hands the whole model to stage 3.
"""

import sys

from midasheng.config import Stage
from midasheng.train.fit import run_stage
from midasheng.train.order import require, trains


def contract(stage: Stage) -> None:
    """What must hold for this to be stage 2."""
    require(stage.name == "stage2_pretrain", f"name: {stage.name!r} is not stage 2; CONFIG= must be a stage 2 file")
    require(
        not trains(stage, "decoder"),
        "train: the decoder is frozen in stage 2; drop decoder.* and adapt it by lora",
    )
    require(bool(stage.lora.targets), "lora.targets: empty; name layers of the decoder, e.g. [q_proj,v_proj]")


if __name__ == "__main__":
    sys.exit(run_stage("configs/stage2_pretrain.yaml", contract))
