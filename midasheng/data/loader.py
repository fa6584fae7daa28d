"""Plan -> Pack tensors, in worker processes that keep no state: a step's share says everything a worker needs."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from midasheng import frames
from midasheng.data.audio import Skip, decode
from midasheng.data.chat import Chat
from midasheng.data.index import CorpusIndex, Record
from midasheng.data.ledger import Skipped
from midasheng.data.manifest import Card
from midasheng.data.plan import Budget, Planned, Planner
from midasheng.sample import Pack, Sample, pack


@dataclass(frozen=True)
class Share:
    """One rank's part of a step: (pack number, its samples), and the planner's state behind the whole step."""

    step: int
    packs: tuple[tuple[int, tuple[Planned, ...]], ...]
    skipped: tuple[Skipped, ...]
    state_after: dict[str, Any]


@dataclass(frozen=True)
class StepBatch:
    """One rank's packs of one step, loaded. `numbers`: which of the step's packs they are."""

    step: int
    numbers: tuple[int, ...]
    packs: tuple[Pack, ...]
    skipped: tuple[Skipped, ...]
    state_after: dict[str, Any]

    def to(self, *args: Any, **kwargs: Any) -> StepBatch:
        """Tensors moved, as `torch.Tensor.to`; Lightning calls this."""
        return replace(self, packs=tuple(p.to(*args, **kwargs) for p in self.packs))


def load_sample(
    card: Card, record: Record, variant: int, chat: Chat, clip_of: Record | None = None, *, heard: bool = True,
    answered: bool = True,
) -> Sample:  # fmt: skip
    """Read, decode and tokenise one conversation. Raises Skip.

    For the listening test: `clip_of`, another record whose clip is heard instead; `heard` False leaves the clip out;
    `answered` False ends where the last answer begins.
    """
    turns, heard_record = record.variants[variant].turns, clip_of or record
    if not heard:
        turns = tuple(replace(turn, clips=0) for turn in turns)
    clips = (decode(heard_record.audio.read(), heard_record.n_samples),) if heard and heard_record.audio else ()
    tokens = [frames.audio_tokens(len(clip)) for clip in clips]
    encoded = chat.encode(turns if answered else turns[:-1], tokens, answer_follows=not answered)
    return Sample(card.name, record.key, card.task, encoded.ids, encoded.labels, encoded.is_audio, clips)


class _Shares(Sampler[Share]):
    """The planner as a sampler: draws steps in the training process, hands shares to workers."""

    def __init__(self, planner: Planner, corpora: Sequence[CorpusIndex], steps: int, rank: int, world: int) -> None:
        self.planner, self.corpora, self.steps, self.rank, self.world = planner, corpora, steps, rank, world
        self.first = int(planner.state()["step"])

    def __len__(self) -> int:
        return max(0, self.steps - self.first)

    def __iter__(self) -> Iterator[Share]:
        for _ in range(len(self)):
            step = next(self.planner)
            names = [(self.corpora[c].card.name, self.corpora[c].train[r].key, why) for c, r, why in step.skipped]
            skipped = tuple(Skipped(*n) for n in names) if self.rank == 0 else ()
            yield Share(step.number, step.share(self.rank, self.world), skipped, step.state_after)


class Loading(Dataset[StepBatch]):
    """Share -> StepBatch. A record that cannot be decoded leaves a hole in its pack and a line in the ledger."""

    def __init__(self, corpora: Sequence[CorpusIndex], chat: Chat, budget: Budget) -> None:
        self.corpora, self.chat, self.budget = corpora, chat, budget

    def __getitem__(self, share: Share) -> StepBatch:  # the sampler yields shares, not numbers
        skipped = list(share.skipped)
        packs = []
        for _, planned in share.packs:
            samples = []
            for p in planned:
                corpus = self.corpora[p.corpus]
                record = corpus.train[p.record]
                try:
                    samples.append(load_sample(corpus.card, record, p.variant, self.chat))
                except Skip as skip:
                    skipped.append(Skipped(corpus.card.name, record.key, skip.reason))
            packs.append(pack(samples, self.budget.pack_slots, self.chat.pad))
        return StepBatch(share.step, tuple(n for n, _ in share.packs), tuple(packs), tuple(skipped), share.state_after)


def _worker_init(_: int) -> None:
    """Ctrl-C belongs to the training process, which still needs its workers; one thread each, as many workers run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def train_loader(
    planner: Planner, chat: Chat, budget: Budget, steps: int, *, rank: int, world: int, workers: int
) -> DataLoader[StepBatch]:
    """Loader from the planner's present step to `steps` (exclusive); one item is this rank's share of one step."""
    return DataLoader(
        Loading(planner.corpora, chat, budget), sampler=_Shares(planner, planner.corpora, steps, rank, world),
        batch_size=None, num_workers=workers, worker_init_fn=_worker_init, prefetch_factor=2 if workers else None,
        multiprocessing_context="fork" if workers else None,
    )  # fmt: skip


def first_clips(planner: Planner, count: int) -> Iterator[np.ndarray]:
    """The first `count` clips of the plan, decoded: float32 (n_samples,) at 16 kHz. Undecodable ones are left out."""
    records: dict[tuple[int, int], Record] = {}
    for _ in range(count):  # at most: a step brings one clip or more, and a small corpus repeats
        before = len(records)
        for p in (p for chosen in next(planner).packs for p in chosen):
            records[p.corpus, p.record] = planner.corpora[p.corpus].train[p.record]
        if len(records) >= count or len(records) == before:
            break
    for record in list(records.values())[:count]:
        if record.audio:
            with contextlib.suppress(Skip):
                yield decode(record.audio.read(), record.n_samples)
