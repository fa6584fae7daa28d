"""The projector: five encoder frames become one audio token of the decoder's width (5 Hz)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from midasheng.frames import STACK


class AudioProjector(nn.Module):
    """Stack STACK frames, Linear, GELU, Linear; names `net.0`, `net.2` as in the released checkpoint.

    35,789,824 parameters at E = 1280, D = 3584 (MiDashengLM-7B).
    """

    def __init__(self, encoder_dim: int, decoder_dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(STACK * encoder_dim, decoder_dim), nn.GELU(), nn.Linear(decoder_dim, decoder_dim)
        )

    def forward(self, frames_FE: Float[Tensor, "F E"], clip_frames: list[int]) -> Float[Tensor, "K D"]:
        """frames_FE: the frames of all clips end to end, `clip_frames` frames each, and whatever fills a fixed
        shape. Groups of five never cross a clip; what does not fill a group at a clip's end is dropped (floor, see
        frames.audio_tokens)."""
        clips = frames_FE[: sum(clip_frames)].split(clip_frames) if clip_frames else [frames_FE[:0]]
        groups = torch.cat([clip[: len(clip) // STACK * STACK] for clip in clips])
        return self.net(groups.reshape(len(groups) // STACK, STACK * frames_FE.shape[1]))
