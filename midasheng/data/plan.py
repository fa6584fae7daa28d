"""(seed, mix, index) -> the packs of every step. Sampling without replacement, two budgets, exact resume on any world.

The order never depends on the number of ranks or workers: two-level shuffle by a counter generator, systematic mixing
in blocks, packing under slots and frames with gap fill; a step's packs are dealt to the ranks afterwards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from midasheng.config import UserError, length
from midasheng.data.index import CorpusIndex
from midasheng.sample import counter_seed

BLOCK = 1024  # samples in which the mix is met to within one sample per corpus
GOLDEN = (5**0.5 - 1) / 2
SHARD_GROUP = 32  # shards whose records are shuffled together: reads stay near-sequential
WINDOW = 256  # samples that gap fill may choose from
ARRIVAL = 0.85  # up to this fill samples are taken in the order in which they arrive
LEAST_FIT = 0.95  # of a corpus' samples must fit a pack: a cap must not quietly take the long clips away
TRIAL_STEPS = 32  # steps planned in advance to turn clips, hours or epochs into steps


@dataclass(frozen=True)
class Planned:
    """One sample of the plan: which variant of which record, and what it will cost."""

    corpus: int
    record: int
    epoch: int
    variant: int
    slots: int
    frames: int


@dataclass(frozen=True)
class PlannedStep:
    """The packs of one step over all ranks, and the planner's state behind it."""

    number: int  # from 0
    packs: tuple[tuple[Planned, ...], ...]
    skipped: tuple[tuple[int, int, str], ...]  # (corpus, record, reason)
    state_after: dict[str, Any]

    def share(self, rank: int, world: int) -> tuple[tuple[int, tuple[Planned, ...]], ...]:
        """(pack number, its samples) of one rank: ceil(V / W) packs on every rank, missing ones empty."""
        count = -(-len(self.packs) // world)
        numbers = [rank + world * i for i in range(count)]
        return tuple((n, self.packs[n] if n < len(self.packs) else ()) for n in numbers)


@dataclass(frozen=True)
class Budget:
    """Fixed shape of a pack, and packs per step."""

    pack_slots: int
    pack_frames: int
    packs_per_step: int


@dataclass
class _State:
    step: int = 0
    drawn: int = 0  # samples drawn so far from the mix
    cursors: list[list[int]] = field(default_factory=list)  # per corpus: epoch, position in its order
    carried: list[list[int]] = field(default_factory=list)  # drawn but not yet packed: corpus, record, epoch, variant


def _generator(*parts: object) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=counter_seed(*parts)))


class Planner:
    """Iterator over PlannedStep. Its state is a small dictionary; a new planner given it goes on exactly there."""

    def __init__(self, corpora: Sequence[CorpusIndex], percent: Sequence[float], budget: Budget, seed: int) -> None:
        self.corpora, self.percent, self.budget, self.seed = corpora, np.asarray(percent), budget, seed
        self._state = _State(cursors=[[0, 0] for _ in corpora])
        self._skipped: list[tuple[int, int, str]] = []
        self.order = lru_cache(maxsize=2 * len(corpora))(self._order)
        self.block = lru_cache(maxsize=2)(self._block)
        for corpus in corpora:
            fits = [self._fits(corpus, r, v) for r, e in enumerate(corpus.train) for v in range(len(e.variants))]
            if np.mean(fits) < LEAST_FIT:
                raise UserError(
                    f"corpus {corpus.card.name}: {fits.count(False)} of its {len(fits)} samples fit no pack of "
                    f"{budget.pack_slots} slots and {budget.pack_frames} frames and would never be trained on; lower "
                    "batch.packs_per_step or data.max_audio_s (kind throughput: raise batch.pack_slots)"
                )
        self._fingerprint = self._hash()

    def _fits(self, corpus: CorpusIndex, record: int, variant: int) -> bool:
        entry = corpus.train[record]
        return entry.slots(variant) <= self.budget.pack_slots and entry.frames <= self.budget.pack_frames

    def fingerprint(self) -> str:
        """Hash of everything the plan depends on; a resume under another one is refused."""
        return self._fingerprint

    def _hash(self) -> str:
        parts = (
            self.seed, self.percent.tolist(), self.budget, [(c.card.name, c.fingerprint()) for c in self.corpora],
            BLOCK, SHARD_GROUP, WINDOW, ARRIVAL,
        )  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    # -- order --------------------------------------------------------------------------------------------------

    def _order(self, corpus: int, epoch: int) -> np.ndarray:
        """Records of one epoch of a corpus: shards shuffled, then the records of each group of shards."""
        index = self.corpora[corpus]
        rng = _generator(self.seed, "order", index.card.name, epoch)
        shards = rng.permutation(np.unique(index.shard_of))
        groups = []
        for start in range(0, len(shards), SHARD_GROUP):
            inside = np.flatnonzero(np.isin(index.shard_of, shards[start : start + SHARD_GROUP]))
            groups.append(rng.permutation(inside))
        return np.concatenate(groups)

    def _block(self, number: int) -> np.ndarray:
        """Corpus of each of the BLOCK samples of one block: systematic shares, shuffled inside the block."""
        edges = np.concatenate([[0.0], np.cumsum(self.percent / self.percent.sum())])
        edges[-1] = 1.0
        # an offset that goes round by the golden ratio: never off by one sample in a block, nor by more than a few ever
        offset = number * GOLDEN % 1
        until = np.floor(edges * BLOCK + offset).astype(np.int64)
        counts = until[1:] - until[:-1]
        return _generator(self.seed, "mix", number).permutation(np.repeat(np.arange(len(counts)), counts))

    def _draw(self) -> Planned:
        """The next sample of the mix that fits a pack; those that do not are skipped and counted."""
        state = self._state
        corpus = int(self.block(state.drawn // BLOCK)[state.drawn % BLOCK])
        state.drawn += 1
        index = self.corpora[corpus]
        while True:
            epoch, position = state.cursors[corpus]
            if position == len(index.train):
                state.cursors[corpus] = [epoch + 1, 0]
                continue
            state.cursors[corpus] = [epoch, position + 1]
            record = int(self.order(corpus, epoch)[position])
            key = (self.seed, "variant", index.card.name, index.train[record].key, epoch)
            variant = counter_seed(*key) % len(index.train[record].variants)
            if self._fits(index, record, variant):
                return self._planned(corpus, record, epoch, variant)
            self._skipped.append((corpus, record, "fits no pack"))

    def _planned(self, corpus: int, record: int, epoch: int, variant: int) -> Planned:
        entry = self.corpora[corpus].train[record]
        return Planned(corpus, record, epoch, variant, entry.slots(variant), entry.frames)

    # -- packs --------------------------------------------------------------------------------------------------

    def _pack(self, window: list[Planned]) -> tuple[Planned, ...]:
        """Fill one pack from the window, which holds WINDOW samples until gap fill begins."""
        limit = np.array([self.budget.pack_slots, max(1, self.budget.pack_frames)])
        while len(window) < WINDOW:
            window.append(self._draw())
        used = np.zeros(2, dtype=np.int64)
        chosen: list[Planned] = []

        def take(position: int) -> None:
            sample = window.pop(position)
            used[:] += (sample.slots, sample.frames)
            chosen.append(sample)

        while (used < ARRIVAL * limit).all() and (used + np.array([window[0].slots, window[0].frames]) <= limit).all():
            take(0)
            window.append(self._draw())
        while window:
            cost = np.array([(s.slots, s.frames) for s in window])
            fill = (used + cost) / limit
            level = np.where((fill <= 1).all(1), fill.min(1) if self.budget.pack_frames else fill[:, 0], -1.0)
            best = int(level.argmax())  # the earliest of those that keep both fills level
            if level[best] < 0:
                break
            take(best)
        return tuple(chosen)

    def __iter__(self) -> Iterator[PlannedStep]:
        return self

    def __next__(self) -> PlannedStep:
        """Plan one step."""
        state, self._skipped = self._state, []
        window = [self._planned(*carried) for carried in state.carried]
        packs = tuple(self._pack(window) for _ in range(self.budget.packs_per_step))
        state.carried = [[s.corpus, s.record, s.epoch, s.variant] for s in window]
        state.step += 1
        return PlannedStep(state.step - 1, packs, tuple(self._skipped), self.state())

    # -- state --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything needed to go on: fingerprint, step, cursors, carried samples. JSON, below 64 kB."""
        state = self._state
        return {
            "fingerprint": self.fingerprint(), "step": state.step, "drawn": state.drawn,
            "cursors": [list(c) for c in state.cursors], "carried": [list(c) for c in state.carried],
        }  # fmt: skip

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on where `saved` was taken. Raises UserError when seed, mix, budget or data differ."""
        if saved["fingerprint"] != self.fingerprint():
            raise UserError(
                "the checkpoint's plan was made from other data, another mix, seed or budget: going on would repeat "
                "and skip samples. Restore the data, or begin anew with FRESH=1 or NAME=..."
            )
        self._state = _State(
            saved["step"], saved["drawn"], [list(c) for c in saved["cursors"]], [list(c) for c in saved["carried"]]
        )


def mean_cost(corpora: Sequence[CorpusIndex], percent: Sequence[float]) -> tuple[float, float]:
    """Mean (slots, frames) of a sample of the mix, all variants alike."""
    share = np.asarray(percent) / np.sum(percent)
    slots = [np.mean([np.mean([r.slots(v) for v in range(len(r.variants))]) for r in c.train]) for c in corpora]
    frames = [np.mean([r.frames for r in c.train]) for c in corpora]
    return float(share @ slots), float(share @ frames)


def budget(
    corpora: Sequence[CorpusIndex], percent: Sequence[float], *, kind: str, clips_per_step: int, packs_per_step: int,
    pack_slots: int, pack_frames: int,
) -> Budget:  # fmt: skip
    """Shape of a pack. kind "report": as many slots as `clips_per_step` samples need on average; "throughput":
    `pack_slots` as given. `pack_frames` 0: in the mix's own ratio of frames to slots, with 5 % of room."""
    mean_slots, mean_frames = mean_cost(corpora, percent)
    if kind == "report":
        pack_slots = -(-round(clips_per_step * mean_slots) // packs_per_step)
    if not pack_frames and mean_frames:
        pack_frames = round(pack_slots * mean_frames / mean_slots * 1.05)
    return Budget(pack_slots, pack_frames, packs_per_step)


def steps_of(text: str, name: str, planner: Planner) -> int:
    """A length ("300 steps", "1.4 epochs", "20 audio_hours", "40000 clips") in steps.

    An epoch is as many samples as the mix's corpora have records together. Clips and hours per step are the mean of the
    first TRIAL_STEPS steps of the plan. `planner` must stand at its beginning and is used up.
    """
    number, unit = length(text, name)
    if unit == "steps":
        return round(number)
    trial = [next(planner) for _ in range(TRIAL_STEPS)]
    samples = [s for step in trial for pack in step.packs for s in pack]
    clips = len(samples) / TRIAL_STEPS
    hours = sum(s.frames for s in samples) / 25 / 3600 / TRIAL_STEPS
    if unit == "audio_hours" and not hours:
        raise UserError(f"{name}: `{text}` in a mix without audio; write steps, clips or epochs")
    if unit == "epochs":
        return round(number * sum(len(c.train) for c in planner.corpora) / clips)
    return round(number / (clips if unit == "clips" else hours))
