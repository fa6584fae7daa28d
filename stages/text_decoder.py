"""Text weights for a decoder that has none: a short text-only training; part of `make data` at mini.

LoRA cannot adapt a frozen random decoder, so stages 1 and 2 both start from these weights; at other scales
`weights.decoder` names a pretrained model instead.
"""

import sys

from midasheng.config import Stage
from midasheng.train.fit import run_stage
from midasheng.train.order import require, trains


def contract(stage: Stage) -> None:
    """What must hold for this to be text-only pretraining."""
    require(trains(stage, "decoder") and not trains(stage, "audio_encoder"), "train: only decoder.* learns from text")
    require(not stage.start, "start: text weights are made from nothing; write fresh: ['*']")


if __name__ == "__main__":
    sys.exit(run_stage("configs/text_decoder.yaml", contract))
