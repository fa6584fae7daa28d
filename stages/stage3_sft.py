"""Stage 3: supervised fine-tuning; LoRA widens to all linear layers of the decoder; `make stage3`.

Takes the whole model of stage 2, its LoRA carried over into the wider one, and trains on questions and instructions.
"""

import sys

from midasheng.config import Stage
from midasheng.train.fit import run_stage
from midasheng.train.order import require, trains


def contract(stage: Stage, name: str = "stage3_sft") -> None:
    """What must hold for this to be stage 3."""
    require(stage.name == name, f"name: {stage.name!r} is not {name}; CONFIG= must be a file of that stage")
    require(
        not trains(stage, "decoder"),
        "train: the decoder is frozen in stage 3; drop decoder.* and adapt it by lora",
    )
    require(bool(stage.lora.targets), "lora.targets: empty; name layers of the decoder, e.g. [all-linear]")


if __name__ == "__main__":
    sys.exit(run_stage("configs/stage3_sft.yaml", contract))
