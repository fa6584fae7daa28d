"""Stage 1: the audio encoder learns what can be heard, by captioning; `make stage1`.

Takes a pretrained Dasheng encoder and a pretrained text decoder (at mini: a fresh encoder), trains both and the
projector between them on general audio captions, and hands its encoder to stage 2.
"""

import sys

from midasheng.config import Stage
from midasheng.train.fit import run_stage
from midasheng.train.order import require, trains


def contract(stage: Stage) -> None:
    """What must hold for this to be stage 1; the report's ablations (frozen decoder, LoRA, transcripts) all do."""
    require(stage.name == "stage1_align", f"name: {stage.name!r} is not stage 1; CONFIG= must be a stage 1 file")
    require(trains(stage, "audio_encoder"), "train: stage 1 exists to train the encoder; add audio_encoder.*")


if __name__ == "__main__":
    sys.exit(run_stage("configs/stage1_align.yaml", contract))
