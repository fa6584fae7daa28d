"""Turn, Sample and Pack: the contract between the data rooms and the model, and the legend of shape letters.

Shape letters at the end of a tensor's name:
  T  slots of a pack (text or audio)      S  segments of a pack (conversations, and one dummy tail)
  L  audio samples of a pack, end to end  C  clips of a pack
  F  encoder frames (25 Hz)               K  audio tokens (5 Hz)
  M  mel frames (100 Hz)                  N  targets (slots whose label counts)
  E  encoder width                        D  decoder width                        V  vocabulary
  A  slots that segments attend to: of each one its ancestors' and its own, end to end
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
NOT_TOLD = "-"  # language of a sample of which neither record nor card tells one


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
    NO_TARGET; `is_audio` bool (slots,); `clips`: float32 (n_samples,) each, 16 kHz mono. All three are of the whole
    conversation, also where `common` says that a pack holds part of it once for several.

    `common`: leading slots, its clips' among them, that it shares with the samples before it, back to the last one with
    common 0; its `clips` are then () and stand with that one.
    """

    corpus: str
    key: str
    task: str
    ids: np.ndarray
    labels: np.ndarray
    is_audio: np.ndarray
    clips: tuple[np.ndarray, ...]
    common: int = 0
    language: str = NOT_TOLD


@dataclass(frozen=True)
class Pack:
    """One row of fixed shape: whole conversations end to end, and a dummy segment without loss where slots are left.

    ids_T int64; labels_T int64 (already shifted; NO_TARGET where nothing counts); position_T int64, restarting in each
    segment; is_audio_T bool; audio_L float32, the clips end to end, zeros behind them. `segments` and `clips` are
    lengths (host integers), in slots and in samples; `chunks` are those of the encoder's windows, in frames, the last
    of them dummies where frames are left. `keys`, `corpora`, `tasks`, `languages` and `targets` (labels that are really
    there) are of the samples, whose segments are the first ones.

    What samples have in common may stand once, behind them and before the dummy: `shared` segments without targets.
    `parents`: of each segment the number of the one that it continues, or -1; its positions count on from there, and
    its slots see all of that one and of its parents. Exact but for dropout, of which shared slots have one mask.

    What the model would have to look up in tensors, and wait for, stands beside them: target_N and audio_K, the slots
    that have a target, ascending, and those of audio, in the order of the clips, int64; segment_bounds and
    chunk_bounds, int32 (S + 1,), where each begins and the last ends; seen_A int64 and seen_bounds int32 (S + 1,), the
    slots that each segment sees, both empty where nothing is shared.
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
    seen_A: Tensor
    seen_bounds: Tensor
    segments: tuple[int, ...]
    parents: tuple[int, ...]
    shared: int
    clips: tuple[int, ...]
    chunks: tuple[int, ...]
    keys: tuple[str, ...]
    corpora: tuple[str, ...]
    tasks: tuple[str, ...]
    languages: tuple[str, ...]
    targets: tuple[int, ...]

    @property
    def real(self) -> tuple[int, ...]:
        """Lengths of the segments that hold something: the samples' own and the shared ones, without the dummy."""
        return self.segments[: len(self.keys) + self.shared]

    def to(self, *args: Any, **kwargs: Any) -> Pack:
        """The same pack with its tensors moved, as `torch.Tensor.to`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {k: v.to(*args, **kwargs) for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def bounds(lengths: Sequence[int]) -> Tensor:
    """Where each of these lengths begins and the last ends: int32 (len + 1,)."""
    return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))


def lineages(parents: Sequence[int]) -> list[tuple[int, ...]]:
    """For each segment the numbers of those that its slots see: the eldest first, itself last."""

    def line(number: int) -> tuple[int, ...]:
        return (*(line(parents[number]) if parents[number] >= 0 else ()), number)

    return [line(number) for number in range(len(parents))]


def seen(lengths: Sequence[int], parents: Sequence[int]) -> tuple[Tensor, Tensor]:
    """seen_A and seen_bounds of a Pack for segments of these lengths; empty where none has a parent."""
    if max(parents, default=-1) < 0:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32)
    slots = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
    each = [np.concatenate([slots[number] for number in line]) for line in lineages(parents)]
    return torch.from_numpy(np.concatenate(each)), bounds([len(one) for one in each])


class _Segment(NamedTuple):
    """Slots start..stop of a sample, behind what `parent` holds. `turn`: its place in the order of the clips."""

    sample: Sample
    start: int
    stop: int
    parent: int
    turn: float


def _check_shared(s: Sample, shared: Sequence[tuple[Sample, int]]) -> None:
    """`shared`: the samples that stand for its lead and for its run, and how many slots of theirs."""
    (_, lead), (_, common) = shared
    start = max(lead, common)
    assert s.common in (0, common), f"{s.key} shares {s.common} slots, its run {common}"
    assert start < len(s.ids), f"{s.key}: {start} shared slots, {len(s.ids)} in all"
    assert (s.labels[:start] == NO_TARGET).all(), f"{s.key} has a target among {start} shared slots"
    assert not s.is_audio[:lead].any(), f"{s.key} has audio among the {lead} slots that all samples share"
    own = bool(s.clips) or bool(s.is_audio[start:].any())
    assert not (s.common and own), f"{s.key} shares {s.common} slots and has audio of its own"
    for other, n in shared:
        same = np.array_equal(s.ids[:n], other.ids[:n]) and np.array_equal(s.is_audio[:n], other.is_audio[:n])
        assert same, f"{s.key} and {other.key} differ in their first {n} slots"


def _segments(samples: Sequence[Sample], lead: int) -> list[_Segment]:
    """The segments of a row, without the dummy: a leaf of each sample, the trunks of runs, the lead."""
    following = [*(s.common for s in samples[1:]), 0]
    heads = [n for n, s in enumerate(samples) if not s.common and following[n] > lead]
    root = len(samples) + len(heads) if lead and samples else -1
    trunks = {head: len(samples) + n for n, head in enumerate(heads)}
    leaves = []
    assert not samples or not samples[0].common, f"{samples[0].key} shares {samples[0].common} slots with none before"
    for number, s in enumerate(samples):
        if not s.common:
            head, common = number, following[number]
            assert not common or common >= lead, f"{s.key}: a run shares {common} slots, all samples share {lead}"
        start = max(lead, common)
        if start:
            _check_shared(s, ((samples[0], lead), (samples[head], common)))
        leaves.append(_Segment(s, start, len(s.ids), trunks.get(head, root), number))
    behind = [_Segment(samples[head], lead, following[head], root, head - 0.5) for head in heads]
    return [*leaves, *behind, *([_Segment(samples[0], 0, lead, -1, -1)] if root >= 0 else [])]


def pack(
    samples: list[Sample], pack_slots: int, pad_id: int, audio_L: NDArray[np.float32] | None = None,
    pack_frames: int = 0, lead: int = 0,
) -> Pack:  # fmt: skip
    """Lay samples end to end in a row of `pack_slots` slots and `pack_frames` encoder frames (0: as many as they have).
    `audio_L`: their clips, where they lie end to end already, with silence behind them as long as those frames can be.

    `lead`: leading slots that all samples have in common. The row: of each sample its own slots, then once what runs
    of samples share (`Sample.common`) behind the lead, then once the lead. Dropout has one mask for a shared slot.

    Raises AssertionError when they do not fit, or differ in what they are said to share.
    """
    laid = _segments(samples, lead)
    lengths = [one.stop - one.start for one in laid]
    tail = pack_slots - sum(lengths)
    assert tail >= 0, f"{sum(lengths)} slots planned into a pack of {pack_slots}"
    segments = lengths + ([tail] if tail else [])
    parents = [one.parent for one in laid] + ([-1] if tail else [])
    empty = [np.zeros(0, dtype=np.int64)]
    ids = np.concatenate([*(s.ids[start:stop] for s, start, stop, *_ in laid), np.full(tail, pad_id, dtype=np.int64)])
    labels = np.concatenate(
        [*(s.labels[start:stop] for s, start, stop, *_ in laid), np.full(tail, NO_TARGET, dtype=np.int64)]
    )
    is_audio = np.concatenate([*(s.is_audio[start:stop] for s, start, stop, *_ in laid), np.zeros(tail, dtype=bool)])
    audio_K, positions = np.flatnonzero(is_audio), [np.arange(n) for n in segments]
    for one, position in zip(laid, positions[: len(laid)], strict=True):
        position += one.start
    if len(laid) > len(samples):  # a trunk stands behind all leaves, its clip does not stand behind all clips
        turns = np.repeat([one.turn for one in laid], lengths)
        audio_K = audio_K[np.argsort(turns[audio_K], kind="stable")]
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
    seen_A, seen_bounds = seen(segments, parents)
    return Pack(
        ids_T=torch.from_numpy(ids),
        labels_T=torch.from_numpy(labels),
        position_T=torch.from_numpy(np.concatenate(positions or empty)),
        is_audio_T=torch.from_numpy(is_audio),
        audio_L=torch.from_numpy(audio_L),
        target_N=torch.from_numpy(target_N),
        audio_K=torch.from_numpy(audio_K),
        segment_bounds=bounds(segments),
        chunk_bounds=bounds(chunks),
        seen_A=seen_A,
        seen_bounds=seen_bounds,
        segments=tuple(segments),
        parents=tuple(parents),
        shared=len(laid) - len(samples),
        clips=tuple(len(clip) for clip in clips),
        chunks=tuple(chunks),
        keys=tuple(s.key for s in samples),
        corpora=tuple(s.corpus for s in samples),
        tasks=tuple(s.task for s in samples),
        languages=tuple(s.language for s in samples),
        targets=tuple(np.diff(np.searchsorted(target_N, np.cumsum([0, *lengths[: len(samples)]]))).tolist()),
    )
