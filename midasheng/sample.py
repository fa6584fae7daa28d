"""Turn, Sample and Pack: the contract between the data rooms and the model, and the legend of shape letters.

Shape letters at the end of a tensor's name:
  T  slots of a pack (text or audio)      S  segments of a pack (conversations, and one dummy tail)
  L  audio samples of a pack, end to end  C  clips of a pack
  F  encoder frames (25 Hz)               K  audio tokens (5 Hz)
  M  mel frames (100 Hz)                  N  targets (slots whose label counts)
  E  encoder width                        D  decoder width                        V  vocabulary
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from midasheng import frames

NO_TARGET = -100  # label of a slot without loss


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone; splits by it are the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") / 2**64


def counter_seed(*parts: object) -> int:
    """A 64-bit seed from a purpose and counters, e.g. `counter_seed(seed, "dropout", step, pack)`.

    All randomness is keyed like this, so no generator state is ever saved (design: exact resume).
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode("utf-8")).digest()[:8], "big")


class Turn(NamedTuple):
    """One turn of a conversation. `clips` audio clips stand before its text (after it where `text_first`).

    `told`: words where a clip will stand, between the same two tokens; for text pretraining.
    """

    role: str  # "system", "user" or "assistant"
    text: str
    clips: int = 0
    text_first: bool = False
    told: str = ""


@dataclass(frozen=True)
class Sample:
    """One conversation, tokenised, with its clips.

    `ids` int64 (slots,); `labels` int64 (slots,): the id that a slot must predict, i.e. already shifted by one, or
    NO_TARGET; `is_audio` bool (slots,); `clips`: float32 (n_samples,) each, 16 kHz mono.
    `common`: leading slots, its clips' among them, that it shares with the samples before it, back to the last one
    with common 0; its `clips` are then () and stand with that one.
    """

    corpus: str
    key: str
    task: str
    ids: np.ndarray
    labels: np.ndarray
    is_audio: np.ndarray
    clips: tuple[np.ndarray, ...]
    common: int = 0


@dataclass(frozen=True)
class Pack:
    """One row of fixed shape: whole conversations end to end, and a dummy segment without loss where slots are left.

    ids_T int64; labels_T int64 (already shifted; NO_TARGET where nothing counts); position_T int64, restarting in each
    segment; is_audio_T bool; audio_L float32, the clips end to end, zeros behind them. `segments` and `clips` are
    lengths (host integers), in slots and in samples; `chunks` are those of the encoder's windows, in frames, the last
    of them dummies where frames are left. `keys`, `corpora`, `tasks` and `targets` (labels that are really there) are
    of the real segments, so they may be one shorter than `segments`.

    What the model would have to look up in tensors, and wait for, stands beside them: target_N and audio_K, the slots
    that have a target and those of audio, int64; segment_bounds and chunk_bounds, int32 (S + 1,), where each begins and
    the last ends.
    """

    ids_T: Tensor
    labels_T: Tensor
    position_T: Tensor
    is_audio_T: Tensor
    audio_L: Tensor
    target_N: Tensor
    audio_K: Tensor
    segment_bounds: Tensor
    chunk_bounds: Tensor
    segments: tuple[int, ...]
    clips: tuple[int, ...]
    chunks: tuple[int, ...]
    keys: tuple[str, ...]
    corpora: tuple[str, ...]
    tasks: tuple[str, ...]
    targets: tuple[int, ...]

    def to(self, *args: Any, **kwargs: Any) -> Pack:
        """The same pack with its tensors moved, as `torch.Tensor.to`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(*args, **kwargs) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def bounds(lengths: Sequence[int]) -> Tensor:
    """Where each of these lengths begins and the last ends: int32 (len + 1,)."""
    return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))


def pack(
    samples: list[Sample], pack_slots: int, pad_id: int, audio_L: NDArray[np.float32] | None = None,
    pack_frames: int = 0, lead: int = 0,
) -> Pack:  # fmt: skip
    """Lay samples end to end in a row of `pack_slots` slots and `pack_frames` encoder frames (0: as many as they have).
    `audio_L`: their clips, where they lie end to end already, with silence behind them as long as those frames can be.

    Raises AssertionError when they do not fit.
    """
    if lead or any(s.common for s in samples):
        raise AssertionError("merge share-model")
    lengths = [len(s.ids) for s in samples]
    tail = pack_slots - sum(lengths)
    assert tail >= 0, f"{sum(lengths)} slots planned into a pack of {pack_slots}"
    segments = lengths + ([tail] if tail else [])
    empty = [np.zeros(0, dtype=np.int64)]
    ids = np.concatenate([*(s.ids for s in samples), np.full(tail, pad_id, dtype=np.int64)])
    labels = np.concatenate([*(s.labels for s in samples), np.full(tail, NO_TARGET, dtype=np.int64)])
    is_audio = np.concatenate([*(s.is_audio for s in samples), np.zeros(tail, dtype=bool)])
    clips = [clip for s in samples for clip in s.clips]
    n_frames = [frames.frames(len(clip)) for clip in clips]
    left = max(pack_frames - sum(n_frames), 0)
    chunks = [length for n in [*n_frames, left] for length in frames.chunks(n)]
    assert left or not pack_frames or sum(chunks) == pack_frames, f"{sum(chunks)} frames in a pack of {pack_frames}"
    if audio_L is None:
        used = sum(map(len, clips))
        filled = frames.waveform(pack_frames) - used if pack_frames else 0
        audio_L = np.concatenate([*clips, np.zeros(filled, dtype=np.float32)])
    target_N = np.flatnonzero(labels != NO_TARGET)
    return Pack(
        ids_T=torch.from_numpy(ids),
        labels_T=torch.from_numpy(labels),
        position_T=torch.from_numpy(np.concatenate([np.arange(n) for n in segments] or empty)),
        is_audio_T=torch.from_numpy(is_audio),
        audio_L=torch.from_numpy(audio_L),
        target_N=torch.from_numpy(target_N),
        audio_K=torch.from_numpy(np.flatnonzero(is_audio)),
        segment_bounds=bounds(segments),
        chunk_bounds=bounds(chunks),
        segments=tuple(segments),
        clips=tuple(len(clip) for clip in clips),
        chunks=tuple(chunks),
        keys=tuple(s.key for s in samples),
        corpora=tuple(s.corpus for s in samples),
        tasks=tuple(s.task for s in samples),
        targets=tuple(np.diff(np.searchsorted(target_N, np.cumsum([0, *lengths]))).tolist()),
    )
