"""(seed, mix, index) -> the packs of every step. Sampling without replacement, two budgets, exact resume on any world.

The order never depends on the number of ranks or workers: two-level shuffle by a counter generator, systematic mixing
in blocks, packing under slots and frames with gap fill; a step's packs are dealt to the ranks afterwards.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from midasheng import frames
from midasheng.config import UserError, length
from midasheng.data.chat import agreeing
from midasheng.data.index import Columns, beginnings
from midasheng.data.manifest import Card
from midasheng.sample import counter_seed

BLOCK = 1024  # samples in which the mix is met to within one sample per corpus
GOLDEN = (5**0.5 - 1) / 2
GROUP = 65_536  # records (in whole shards) that are shuffled together: reads stay near-sequential
WINDOW = 512  # samples that gap fill may choose from
ARRIVAL = 0.8  # up to this fill samples are taken in the order in which they arrive
SLOT_UNIT = 256  # pack_slots that are proposed are a multiple of it
LEAST_FIT = 0.95  # of a corpus' samples must fit a pack: a cap must not quietly take the long clips away
ROOM = 1.02  # frames of a pack over its share by the mix's mean: slots are the dearer ones and must not wait for frames
TRIAL_STEPS = 32  # steps planned in advance to turn clips, hours or epochs into steps
ALL = -1  # as a variant: all variants of the record, together in one pack


class Corpus(Protocol):
    """What the plan asks of a corpus' index."""

    card: Card
    counts: NDArray[Any]  # training records of each shard

    def columns(self, shard: int) -> Columns:
        """Audio samples and token counts of one shard's training records."""

    def key(self, number: int) -> str:
        """Key of a training record."""

    @property
    def summary(self) -> Any:
        """Mean costs and fingerprint."""


class Planned(NamedTuple):
    """One sample of the plan: which variant of which record, and what it will cost. `position`: its place in the order
    of this epoch of its corpus."""

    corpus: int
    epoch: int
    position: int
    record: int
    variant: int
    slots: int
    frames: int
    targets: int


SLOTS, FRAMES = Planned._fields.index("slots"), Planned._fields.index("frames")
Rows = NDArray[np.int64]  # (samples, fields of Planned)


class Unfit(NamedTuple):
    """A sample that was passed over because it fits no pack."""

    corpus: int
    epoch: int
    position: int
    record: int


@dataclass(frozen=True)
class PlannedStep:
    """The packs of one step over all ranks, and the planner's state behind it."""

    number: int  # from 0
    packs: tuple[tuple[Planned, ...], ...]
    skipped: tuple[Unfit, ...]
    state_after: dict[str, Any]

    @property
    def digest(self) -> int:
        """Checksum of the plan up to here: equal on all ranks, or they train on different plans."""
        return int(self.state_after["digest"])

    def share(self, rank: int, world: int) -> tuple[tuple[int, tuple[Planned, ...]], ...]:
        """(pack number, its samples) of one rank: ceil(V / W) packs on every rank, missing ones empty."""
        count = -(-len(self.packs) // world)
        numbers = [rank + world * i for i in range(count)]
        return tuple((n, self.packs[n] if n < len(self.packs) else ()) for n in numbers)


@dataclass(frozen=True)
class Budget:
    """Fixed shape of a pack, and packs per step. `lead`: ids that all samples begin with and that stand once in a
    pack; None where its samples share nothing."""

    pack_slots: int
    pack_frames: int
    packs_per_step: int
    lead: tuple[int, ...] | None = None

    @property
    def lead_slots(self) -> int:
        """Slots of the lead."""
        return len(self.lead or ())

    @property
    def own_slots(self) -> int:
        """Slots of a pack for what its samples do not begin with in common; what a sample costs counts against them."""
        return self.pack_slots - self.lead_slots


class Group(NamedTuple):
    """Records that are shuffled together, in their order: G records."""

    first: int  # position of the first one in the epoch
    record: NDArray[Any]  # (G,) numbers in the corpus
    of: NDArray[Any]  # (G,) the same, as rows of `columns`
    columns: Columns


def _generator(*parts: object) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=counter_seed(*parts)))


def _mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A counter generator over whole arrays (splitmix64; Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = numbers * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))


def _fits(rows: Rows, budget: Budget) -> NDArray[np.bool_]:
    """Which samples alone fit a pack."""
    fits: NDArray[np.bool_] = (rows[:, SLOTS] <= budget.own_slots) & (rows[:, FRAMES] <= budget.pack_frames)
    return fits


class Planner:
    """Iterator over PlannedStep. Its state is a small dictionary; a new planner given it goes on exactly there."""

    def __init__(self, corpora: Sequence[Corpus], percent: Sequence[float], budget: Budget, seed: int) -> None:
        self.corpora, self.percent, self.budget, self.seed = tuple(corpora), tuple(percent), budget, seed
        self.group = lru_cache(maxsize=len(corpora) + 16)(self._make_group)
        self.groups = lru_cache(maxsize=2 * len(corpora))(self._make_groups)
        self._step = self._block = self._digest = 0
        self._cursors = [(0, 0)] * len(corpora)  # of each corpus: epoch, position
        self._pool: Rows = np.zeros((0, len(Planned._fields)), dtype=np.int64)  # drawn and not yet packed
        self._events: list[tuple[int, tuple[float, ...]]] = []  # (step, percent from there on)
        self._restarted = 0  # the step at which this plan took the place of another one
        self._skipped: list[Unfit] = []

    def fingerprint(self) -> dict[str, Any]:
        """Everything the plan depends on, by name; a resume under another one is refused."""
        lead = self.budget.lead
        share = {} if lead is None else {
            "share": {"lead": list(lead), "common": {c.card.name: c.summary.shared.fingerprint for c in self.corpora}}
        }  # fmt: skip
        return {
            "seed": self.seed, "mix": {c.card.name: p for c, p in zip(self.corpora, self.percent, strict=True)},
            "budget": [self.budget.pack_slots, self.budget.pack_frames, self.budget.packs_per_step],
            "index": {c.card.name: [c.summary.fingerprint, c.card.answers] for c in self.corpora},
            "rules": [BLOCK, GROUP, WINDOW, ARRIVAL],
        } | share  # fmt: skip

    @property
    def _key(self) -> object:
        """What all of its randomness is keyed by: a plan that was restarted has an order of its own."""
        return (self.seed, self._restarted) if self._restarted else self.seed

    # -- order --------------------------------------------------------------------------------------------------

    def _make_groups(self, corpus: int, epoch: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """(shards in the order of an epoch, where in them each group ends, its last position + 1)."""
        index = self.corpora[corpus]
        filled = np.flatnonzero(index.counts)
        shards = _generator(self._key, "shards", index.card.name, epoch).permutation(filled)
        until = np.cumsum(index.counts[shards])
        ends = np.flatnonzero(np.diff((until - index.counts[shards]) // GROUP, append=-1)) + 1
        return shards, ends, until[ends - 1]

    def _make_group(self, corpus: int, epoch: int, number: int) -> Group:
        index = self.corpora[corpus]
        shards, ends, until = self.groups(corpus, epoch)
        start = int(ends[number - 1]) if number else 0
        inside = shards[start : ends[number]]
        parts = [index.columns(int(s)) for s in inside]
        starts = np.cumsum(index.counts) - index.counts
        records = np.concatenate([np.arange(starts[s], starts[s] + index.counts[s]) for s in inside])
        order = _generator(self._key, "records", index.card.name, epoch, number).permutation(len(records))
        before = np.cumsum([0, *(len(p.slots) for p in parts)])
        columns = Columns(
            np.concatenate([p.n_samples for p in parts]),
            np.concatenate([p.until + b for p, b in zip(parts, before[:-1], strict=True)]),
            np.concatenate([p.slots for p in parts]), np.concatenate([p.targets for p in parts]),
            np.concatenate([p.common for p in parts]),
        )  # fmt: skip
        return Group(int(until[number - 1]) if number else 0, records[order], order, columns)

    def _at(self, corpus: int, epoch: int, position: int) -> Group:
        """The group that holds a position."""
        until = self.groups(corpus, epoch)[2]
        return self.group(corpus, epoch, int(np.searchsorted(until, position, side="right")))

    def position_of(self, corpus: int, epoch: int, record: int) -> int:
        """Where a record stands in the order of an epoch."""
        shards, ends, _ = self.groups(corpus, epoch)
        shard = int(np.searchsorted(np.cumsum(self.corpora[corpus].counts), record, side="right"))
        number = int(np.searchsorted(ends, np.flatnonzero(shards == shard)[0], side="right"))
        group = self.group(corpus, epoch, number)
        return group.first + int(np.flatnonzero(group.record == record)[0])

    def rows(self, corpus: int, epoch: int, positions: NDArray[Any]) -> Rows:
        """The samples at these places of an epoch of a corpus, whether they fit a pack or not."""
        found = np.zeros((len(positions), len(Planned._fields)), dtype=np.int64)
        todo = np.arange(len(positions))
        while len(todo):
            group = self._at(corpus, epoch, int(positions[todo[0]]))
            near = positions[todo] - group.first
            here = (near >= 0) & (near < len(group.record))
            assert here.any(), f"position {positions[todo[0]]} of epoch {epoch} is in no group of shards"
            found[todo[here]] = self._samples(corpus, epoch, group, near[here])
            todo = todo[~here]
        return found

    def _samples(self, corpus: int, epoch: int, group: Group, near: NDArray[Any]) -> Rows:
        """The samples at `near` places of a group."""
        card, columns, of = self.corpora[corpus].card, group.columns, group.of[near]
        until = columns.until[of]
        first = np.where(of > 0, columns.until[of - 1], 0)
        heard = card.audio & (columns.n_samples[of] > 0)
        n_samples = columns.n_samples[of]
        tokens, n_frames = heard * frames.audio_tokens(n_samples), heard * frames.frames(n_samples)
        begins = np.ones(len(of), dtype=np.int64)
        if card.answers == "all":
            many = begins = until - first
            sums = [np.concatenate([[0], np.cumsum(c, dtype=np.int64)]) for c in (columns.slots, columns.targets)]
            slots, targets = (total[until] - total[first] for total in sums)
            if self.budget.lead is not None:
                begins = beginnings(many, columns.common[of])
                slots = slots - (many - begins) * columns.common[of]
            variant, tokens, n_frames = np.full(len(of), ALL), tokens * begins, n_frames * begins
        else:
            base = np.uint64(counter_seed(self._key, "variant", card.name, epoch))
            draw = _mixed(_mixed(group.record[near].astype(np.uint64) + np.uint64(1)) ^ base)
            variant = (draw % (until - first).astype(np.uint64)).astype(np.int64)
            slots, targets = columns.slots[first + variant], columns.targets[first + variant]
        slots = slots + tokens - begins * self.budget.lead_slots
        fixed = np.full((2, len(of)), [[corpus], [epoch]])
        columns_of = (near + group.first, group.record[near], variant, slots, n_frames, targets)
        return np.stack([*fixed, *columns_of], axis=1).astype(np.int64)

    # -- mix ----------------------------------------------------------------------------------------------------

    def block(self, number: int, percent: Sequence[float] | None = None) -> NDArray[Any]:
        """Corpus of each of the BLOCK samples of one block: systematic shares, shuffled inside the block."""
        until_share = np.cumsum(percent or self.percent)
        edges = np.concatenate([[0.0], until_share / until_share[-1]])  # exactly 1 also before last shares of 0
        # an offset that goes round by the golden ratio: never off by one sample in a block, nor by more than a few ever
        offset = number * GOLDEN % 1
        until = np.floor(edges * BLOCK + offset).astype(np.int64)
        counts = until[1:] - until[:-1]
        return _generator(self._key, "mix", number).permutation(np.repeat(np.arange(len(counts)), counts))

    def change(self, from_step: int, percent: Sequence[float]) -> None:
        """From `from_step` on draw in these shares. What was drawn before is still trained on first."""
        assert from_step >= self._step, f"step {from_step} is planned already (next is {self._step})"
        assert len(percent) == len(self.corpora)
        self._events.append((from_step, tuple(float(p) for p in percent)))

    def changes(self) -> list[list[Any]]:
        """[step, percent from there on] of every change, as in the state; also those that are still to come."""
        return [[step, list(percent)] for step, percent in self._events]

    def present(self) -> tuple[float, ...]:
        """The shares in which the next step draws."""
        return next((p for step, p in reversed(self._events) if step <= self._step), self.percent)

    def _draw_block(self) -> None:
        """Draw BLOCK samples of the mix into the pool; those that fit no pack are passed over and counted."""
        asked = self.block(self._block, self.present())
        drawn: Rows = np.zeros((BLOCK, len(Planned._fields)), dtype=np.int64)
        for corpus in np.unique(asked).tolist():
            places = np.flatnonzero(asked == corpus)
            drawn[places] = self._take(corpus, len(places))
        self._pool = np.concatenate([self._pool, drawn])
        self._block += 1

    def _take(self, corpus: int, count: int) -> Rows:
        """The next `count` samples of a corpus that fit a pack; its cursor moves on."""
        parts: list[Rows] = []
        fitless = 0
        while count:
            epoch, position = self._cursors[corpus]
            if position == self.corpora[corpus].counts.sum():
                self._cursors[corpus] = (epoch + 1, 0)
                continue
            group = self._at(corpus, epoch, position)
            near = np.arange(position, min(position + count, group.first + len(group.record))) - group.first
            assert len(near), f"{self.corpora[corpus].card.name}: position {position} lies in no group of shards"
            rows = self._samples(corpus, epoch, group, near)
            fits = _fits(rows, self.budget)
            self._skipped += [Unfit(*row[:4]) for row in rows[~fits].tolist()]
            self._cursors[corpus] = (epoch, position + len(near))
            parts.append(rows[fits])
            count -= int(fits.sum())
            fitless = 0 if fits.any() else fitless + len(near)
            assert fitless <= 2 * self.corpora[corpus].counts.sum(), f"nothing of {self.corpora[corpus].card.name} fits"
        return np.concatenate(parts)

    # -- packs --------------------------------------------------------------------------------------------------

    def _pack(self) -> Rows:
        """Fill one pack from the pool: in the order of arrival up to ARRIVAL of a budget, then from a window."""
        limit = np.array([self.budget.own_slots, max(1, self.budget.pack_frames)])
        while True:
            used = np.cumsum(self._pool[:, [SLOTS, FRAMES]], axis=0)
            full = np.any((used > limit) | (used - self._pool[:, [SLOTS, FRAMES]] >= ARRIVAL * limit), axis=1)
            arrived = int(full.argmax()) if full.any() else len(full)
            look = max(WINDOW, arrived // 2)  # a pack of thousands has more than WINDOW left to fill
            if len(self._pool) >= arrived + look:
                break
            self._draw_block()
        window = self._pool[arrived : arrived + look]
        cost = window[:, [SLOTS, FRAMES]] / limit
        fill = used[arrived - 1] / limit if arrived else np.zeros(2)
        free = np.ones(len(window), dtype=bool)
        level = 1 if self.budget.pack_frames else 0
        while True:
            after = fill + cost
            fits = free & (after[:, 0] <= 1) & (after[:, 1] <= 1)
            if not fits.any():
                break
            # the earliest of those that keep both fills level
            best = int(np.where(fits, np.minimum(after[:, 0], after[:, level]), -1.0).argmax())
            free[best] = False
            fill = after[best]
        chosen = np.concatenate([self._pool[:arrived], window[~free]])
        self._pool = np.concatenate([window[free], self._pool[arrived + look :]])
        return chosen

    def __iter__(self) -> Iterator[PlannedStep]:
        return self

    def __next__(self) -> PlannedStep:
        """Plan one step."""
        self._skipped = []
        packs = [self._pack() for _ in range(self.budget.packs_per_step)]
        self._step += 1
        for pack in packs:
            self._digest = zlib.crc32(len(pack).to_bytes(8, "little") + pack.tobytes(), self._digest)
        made = tuple(tuple(map(Planned._make, pack.tolist())) for pack in packs)
        return PlannedStep(self._step - 1, made, tuple(self._skipped), self.state())

    # -- state --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything needed to go on: fingerprint, step, cursors, carried samples, changes of the mix. JSON, below
        64 kB."""
        carried = np.ascontiguousarray(self._pool[:, :3].T).tobytes()
        return {
            "fingerprint": self.fingerprint(), "step": self._step, "block": self._block, "digest": self._digest,
            "cursors": [list(c) for c in self._cursors], "events": self.changes(),
            "restarted": self._restarted, "carried": base64.b64encode(zlib.compress(carried)).decode(),
        }  # fmt: skip

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on where `saved` was taken. Raises UserError when seed, mix, budget or data differ."""
        changed = differences(saved["fingerprint"], self.fingerprint())
        if changed:
            raise UserError(
                f"the checkpoint's plan was made otherwise: {changed}. Going on would repeat and skip samples. Restore "
                "it, begin anew with FRESH=1 or NAME=..., or train on in a new order with data.on_change=restart_plan"
            )
        self._step, self._block, self._digest = saved["step"], saved["block"], saved["digest"]
        self._cursors = [(epoch, position) for epoch, position in saved["cursors"]]
        self._events = [(step, tuple(percent)) for step, percent in saved["events"]]
        self._begin_orders(saved["restarted"])
        self._pool = self.carried(saved)

    def restart(self, step: int) -> None:
        """Begin at `step` with an order of its own: what was trained on before under another plan may come again."""
        self._step = step
        self._begin_orders(step)

    def _begin_orders(self, restarted: int) -> None:
        self._restarted = restarted
        self.group.cache_clear()
        self.groups.cache_clear()

    def carried(self, saved: dict[str, Any]) -> Rows:
        """The samples that a state holds as drawn and not yet packed."""
        flat = np.frombuffer(zlib.decompress(base64.b64decode(saved["carried"])), dtype=np.int64).reshape(3, -1)
        pool: Rows = np.zeros((flat.shape[1], len(Planned._fields)), dtype=np.int64)
        for corpus, epoch in np.unique(flat[:2], axis=1).T.tolist():
            here = np.flatnonzero((flat[0] == corpus) & (flat[1] == epoch))
            pool[here] = self.rows(corpus, epoch, flat[2][here])
        return pool


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two fingerprints, in words; empty when nothing does."""
    found = []
    for name in ("seed", "mix", "budget", "rules"):
        if before[name] != now[name] or (name == "mix" and list(before[name]) != list(now[name])):
            found.append(f"{name} was {before[name]} and is {now[name]}")
    for corpus in [c for c in before["index"] if c in now["index"]]:
        if before["index"][corpus] != now["index"][corpus]:
            found.append(f"index: the records, shards or token counts of {corpus} have changed")
    was, is_ = before.get("share"), now.get("share")
    if bool(was) != bool(is_):
        found.append(f"batch.share was {bool(was)} and is {bool(is_)}")
    elif was and is_ and was["lead"] != is_["lead"]:
        found.append(f"the lead that all samples share was {was['lead']} and is {is_['lead']}")
    elif was and is_ and was["common"] != is_["common"]:
        found.append("index: what the conversations of a record have in common has changed")
    return "; ".join(found)


def check_fits(planner: Planner) -> None:
    """Look at the first group of each corpus: raises UserError where more than 5 % of its samples fit no pack."""
    shape = planner.budget
    for number, corpus in enumerate(planner.corpora):
        group = planner.group(number, 0, 0)
        rows = planner._samples(number, 0, group, np.arange(len(group.record)))
        fits = _fits(rows, shape)
        if fits.mean() < LEAST_FIT:
            need = rows[~fits][:, [SLOTS, FRAMES]] / [max(1, shape.own_slots), max(1, shape.pack_frames)]
            longest = Planned._make(rows[~fits][need.max(axis=1).argmax()].tolist())
            raise UserError(
                f"corpus {corpus.card.name}: {(~fits).sum()} of {len(fits)} samples fit no pack of "
                f"{shape.pack_slots} slots and {shape.pack_frames} frames and would never be trained on; "
                + named(corpus.key(longest.record), longest.slots, longest.frames, shape)
            )


def named(key: str, slots: int, n_frames: int, shape: Budget) -> str:
    """The dearest of the samples that fit no pack, and what to write about them."""
    slots += shape.lead_slots  # as it would stand in a pack alone
    larger = [f"batch.pack_slots={-(-slots // SLOT_UNIT) * SLOT_UNIT} (kind throughput)"] * (slots > shape.pack_slots)
    larger += [f"batch.pack_frames={n_frames}"] * (n_frames > shape.pack_frames)
    return (
        f"the longest, {key}, is {frames.frame_seconds(n_frames):.1f} s and {slots} slots. Lower batch.packs_per_step "
        f"or data.max_audio_s, or write {' and '.join(larger)}"
    )


def lead_of(corpora: Sequence[Corpus]) -> tuple[int, ...]:
    """The ids that all samples of these corpora begin with."""
    first, *others = (c.summary.shared.lead for c in corpora)
    return tuple(first[: min((agreeing(first, lead) for lead in others), default=len(first))])


def mean_cost(
    corpora: Sequence[Corpus], percent: Sequence[float], lead: tuple[int, ...] | None = None
) -> tuple[float, float]:
    """Mean (slots, frames) of a sample of the mix, all variants alike; `lead` as in Budget."""
    share = np.asarray(percent) / np.sum(percent)
    if lead is None:
        means = np.asarray([(c.summary.mean_slots, c.summary.mean_frames) for c in corpora])
    else:
        shared = [c.summary.shared for c in corpora]
        means = np.asarray([(s.mean_slots - s.begins * len(lead), s.mean_frames) for s in shared])
    slots, n_frames = share @ means
    return float(slots), float(n_frames)


def budget(
    corpora: Sequence[Corpus], percent: Sequence[float], *, kind: str, clips_per_step: int, packs_per_step: int,
    pack_slots: int, pack_frames: int, share: bool = False,
) -> Budget:  # fmt: skip
    """Shape of a pack. kind "report": as many slots as `clips_per_step` samples need on average; "throughput":
    `pack_slots` as given. `pack_frames` 0: in the mix's own ratio of frames to slots, with ROOM. `share`: what samples
    begin with in common stands once in a pack."""
    lead = lead_of(corpora) if share else None
    once = len(lead or ())
    mean_slots, mean_frames = mean_cost(corpora, percent, lead)
    if kind == "report":
        pack_slots = -(-round(clips_per_step * mean_slots) // packs_per_step) + once
    if not pack_frames and mean_frames:
        pack_frames = round(max(0, pack_slots - once) * mean_frames / mean_slots * ROOM)
    return Budget(pack_slots, pack_frames, packs_per_step, lead)


def steps_of(text: str, name: str, planner: Planner) -> int:
    """A length ("300 steps", "1.4 epochs", "20 audio_hours", "40000 clips") in steps.

    An epoch is as many samples as the mix's corpora have records together. Clips and hours per step are the mean of the
    first TRIAL_STEPS steps of the plan. `planner` must stand at its beginning and is used up.
    """
    number, unit = length(text, name)
    if unit == "steps":
        return round(number)
    trial = [next(planner) for _ in range(TRIAL_STEPS)]
    return in_steps(text, name, planner.corpora, trial)


def in_steps(text: str, name: str, corpora: Sequence[Corpus], trial: Sequence[PlannedStep]) -> int:
    """The same by a plan's first steps."""
    number, unit = length(text, name)
    samples = [s for step in trial for pack in step.packs for s in pack]
    clips = len(samples) / len(trial)
    hours = frames.frame_seconds(sum(s.frames for s in samples)) / 3600 / len(trial)
    if unit == "audio_hours" and not hours:
        raise UserError(f"{name}: `{text}` in a mix without audio; write steps, clips or epochs")
    if unit == "steps":
        return round(number)
    if unit == "epochs":
        return round(number * sum(int(c.counts.sum()) for c in corpora) / clips)
    return round(number / (clips if unit == "clips" else hours))
