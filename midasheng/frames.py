"""How long is it? Samples, mel frames, frames and audio tokens: the only file with this arithmetic.

Source: MiDashengLM report section 3 and the released processor; see `audio_tokens` for the one place where the
published code disagrees with itself.
"""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Count = TypeVar("Count", int, NDArray[np.int64])  # one length, or an array of them

SAMPLE_RATE = 16_000  # Hz; everything behind data/audio.py is mono float32 at this rate
HOP = 160  # samples from one mel frame to the next: 100 mel frames a second
N_FFT = 512  # samples under one (periodic Hann) window
N_MELS = 64
PATCH = 4  # mel frames under one encoder frame: 25 frames a second
STACK = 5  # encoder frames stacked into one audio token: 5 audio tokens a second
CHUNK = 252  # encoder frames that see each other: 10.08 s, the length Dasheng was pretrained on
MIN_SAMPLES = 3_200  # 0.2 s; shorter clips have no audio token and are skipped in training


def mel_frames(n_samples: Count) -> Count:
    """Mel frames (100 Hz) of a clip of `n_samples` samples, centred windows as in torchaudio."""
    return 1 + n_samples // HOP


def frames(n_samples: Count) -> Count:
    """Encoder frames (25 Hz) of a clip of `n_samples` samples; the remainder of the mel frames is dropped."""
    return mel_frames(n_samples) // PATCH


def most_samples(n_frames: int) -> int:
    """The longest clip in samples that still has `n_frames` frames."""
    return ((n_frames + 1) * PATCH - 1) * HOP - 1


def waveform(n_frames: int) -> int:
    """The most samples that clips of `n_frames` frames in all, each with an audio token, can have."""
    return most_samples(n_frames) + (n_frames // STACK) * most_samples(0)


def audio_tokens(n_samples: Count) -> Count:
    """Audio tokens (5 Hz) of a clip of `n_samples` samples; floor, as the released processor counts placeholders.

    The released projector mask rounds up instead (any of five frames), which only shows when clips are padded into a
    batch; clips are never padded here.
    """
    return frames(n_samples) // STACK


def chunks(n_frames: int) -> list[int]:
    """Lengths in frames of the windows a clip of `n_frames` frames is encoded in; the last may be short."""
    return [min(CHUNK, n_frames - start) for start in range(0, n_frames, CHUNK)]


def frame_seconds(n_frames: float) -> float:
    """Duration in seconds of `n_frames` encoder frames."""
    return n_frames * PATCH * HOP / SAMPLE_RATE


def seconds(n_samples: int) -> float:
    """Duration in seconds of `n_samples` samples."""
    return n_samples / SAMPLE_RATE
