"""Bytes -> 16 kHz mono float32, or Skip(reason)."""

from __future__ import annotations

import base64
import io

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from midasheng import frames


class Skip(Exception):
    """A record that cannot be trained on; `reason` is a short fixed phrase that is counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


UNKNOWN = 2**31  # samples, 37 hours: libsndfile gives 2**63 - 1 frames when the header does not say
SLACK = frames.SAMPLE_RATE // 50  # 20 ms: how far decoded audio may be from its planned length


def announced_samples(data: bytes) -> int:
    """Length in samples at 16 kHz from the header alone. Raises Skip("undecodable") or Skip("length unknown") (a FLAC
    written to a pipe)."""
    try:
        info = soundfile.info(io.BytesIO(data))
    except (soundfile.LibsndfileError, RuntimeError):
        raise Skip("undecodable") from None
    n_samples: int = round(info.frames * frames.SAMPLE_RATE / info.samplerate)
    if n_samples >= UNKNOWN:
        raise Skip("length unknown")
    return n_samples


def planned_samples(data: bytes) -> int:
    """The same of a clip to train on. Raises Skip("too short") too."""
    n_samples = announced_samples(data)
    if n_samples < frames.MIN_SAMPLES:
        raise Skip("too short")
    return n_samples


def decode(data: bytes, n_samples: int, into: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """Decode wav, flac, mp3, ogg or opus to float32 (n_samples,), channels averaged, resampled by soxr HQ.

    Audio within 20 ms of the planned length is trimmed or padded with zeros. `into`: float32 (n_samples,) to write to
    and return, e.g. its place in a pack. Raises Skip("undecodable"), Skip("length differs") or Skip("not finite").
    """
    out = np.empty(n_samples, dtype=np.float32) if into is None else into
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate = file.samplerate
            if abs(file.frames * frames.SAMPLE_RATE / rate - n_samples) > SLACK:
                raise Skip("length differs")  # before reading: a damaged header may announce terabytes
            in_place = (file.channels, rate, file.frames) == (1, frames.SAMPLE_RATE, n_samples)  # nearly always
            audio = file.read(out=out) if in_place else file.read(dtype="float32")
    except (soundfile.LibsndfileError, RuntimeError):
        raise Skip("undecodable") from None
    mono = audio if audio.ndim == 1 else audio.mean(axis=1)
    if rate != frames.SAMPLE_RATE:
        mono = soxr.resample(mono, rate, frames.SAMPLE_RATE, quality="HQ")
    if abs(len(mono) - n_samples) > SLACK:
        raise Skip("length differs")
    if not np.isfinite(mono.sum()):  # infinities and NaN survive a sum
        raise Skip("not finite")
    filled = min(len(mono), n_samples)
    if not in_place:
        out[:filled] = mono[:filled]
    out[filled:] = 0.0
    return out


def data_uri(clip_L: NDArray[np.float32]) -> str:
    """A clip, float32 (n_samples,) at 16 kHz, as a FLAC that can stand inside a page."""
    file = io.BytesIO()
    soundfile.write(file, np.clip(clip_L, -1, 1), frames.SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return "data:audio/flac;base64," + base64.b64encode(file.getvalue()).decode()
