"""The encoder of a run in the protocol of the xares package: `MIDASHENG=runs/mini/stage1_align python -m xares.run
midasheng/evaluate/xares.py TASKS/*.py` (pip install 'midasheng-train[xares]'; tasks come with its repository)."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midasheng import frames
from midasheng.config import UserError
from midasheng.evaluate.probe import encoder_of


class MidashengEncoder(nn.Module):
    """What xares asks for: (B, samples) at 16 kHz -> (B, frames, output_dim), 25 frames a second. `weights`: a run, a
    folder in the published layout, a Dasheng .pt or a hub id; by default what the variable MIDASHENG names, since xares
    makes its encoder without arguments."""

    def __init__(self, weights: str = "") -> None:
        super().__init__()
        weights = weights or os.environ.get("MIDASHENG", "")
        if not weights:
            raise UserError("MIDASHENG is not set; write MIDASHENG=runs/mini/stage1_align, or another run or folder")
        self.encoder = encoder_of(weights)
        self.sampling_rate = frames.SAMPLE_RATE
        self.output_dim = self.encoder.shape.dim
        self.hop_size_in_ms = 1000 * frames.PATCH * frames.HOP // frames.SAMPLE_RATE

    @torch.no_grad()
    def forward(self, audio: Tensor) -> Tensor:
        """All clips of a batch have one length here; xares pads them."""
        clips_BL = torch.atleast_2d(audio)
        clips_BL = F.pad(clips_BL, (0, max(0, frames.MIN_SAMPLES - clips_BL.shape[1])))
        n_frames = frames.frames(clips_BL.shape[1])
        frames_FE: Tensor = self.encoder(clips_BL.flatten(), [clips_BL.shape[1]] * len(clips_BL))
        return frames_FE.unflatten(0, (len(clips_BL), n_frames))
