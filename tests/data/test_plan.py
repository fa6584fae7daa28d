"""The plan: every record once an epoch, the mix as asked for, full packs, and exact resume on any world."""

import hashlib
import itertools
import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

import numpy as np
import pytest
from numpy.typing import NDArray

from midasheng import frames
from midasheng.config import UserError
from midasheng.data import plan as plan_room
from midasheng.data.index import Columns, Shared, Summary
from midasheng.data.manifest import Card
from midasheng.data.plan import (
    ALL,
    BLOCK,
    WINDOW,
    Budget,
    Planned,
    PlannedStep,
    Planner,
    budget,
    check_fits,
    differences,
    mean_cost,
    steps_of,
)

NOTHING = Shared((), 0.0, 0.0, 0.0, "")
RECORD = Planned._fields.index("record")
WORLDS = (1, 2, 3, 4, 8, 16, 40, 72, 80)


# -- corpora that exist nowhere else -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """What a planner asks of an index, from plain tuples: one of text slots and one of targets for each record."""

    card: Card
    counts: NDArray[np.int64]
    n_samples: NDArray[np.int64]
    slots: tuple[tuple[int, ...], ...]
    targets: tuple[tuple[int, ...], ...]
    common: tuple[int, ...] = ()  # of each record; none where it is empty
    lead: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.slots)

    def columns(self, shard: int) -> Columns:
        first = int(self.counts[:shard].sum())
        here = slice(first, first + int(self.counts[shard]))
        slots, targets = self.slots[here], self.targets[here]
        until = np.cumsum([len(s) for s in slots])
        common = np.array((self.common or (0,) * len(self))[here])
        return Columns(self.n_samples[here], until, np.concatenate(slots), np.concatenate(targets), common)

    def key(self, number: int) -> str:
        return f"record {number}"

    def cost(self, record: int, variant: int, lead: int | None = None) -> tuple[int, int, int]:
        """(slots, frames, targets) of a sample, in plain words; `lead` None where packs share nothing."""
        chosen = range(len(self.slots[record])) if variant == ALL else [variant]
        n_samples = int(self.n_samples[record])
        tokens, n_frames = (frames.audio_tokens(n_samples), frames.frames(n_samples)) if n_samples else (0, 0)
        slots = sum(self.slots[record][v] + tokens for v in chosen)
        told = sum(self.targets[record][v] for v in chosen)
        if lead is None:
            return slots, n_frames * len(chosen), told
        if variant == ALL and self.common and self.common[record]:
            trunk = self.common[record] + tokens
            leaves = [self.slots[record][v] + tokens - trunk for v in chosen]
            return trunk - lead + sum(leaves), n_frames, told
        return slots - lead * len(chosen), n_frames * len(chosen), told

    @cached_property
    def summary(self) -> Summary:
        visits = [
            np.mean([self.cost(r, v)[:2] for v in ([ALL] if self.card.answers == "all" else range(len(s)))], axis=0)
            for r, s in enumerate(self.slots)
        ]
        slots, n_frames = np.mean(visits, axis=0).tolist()
        every = [[ALL] if self.card.answers == "all" else range(len(s)) for s in self.slots]
        once = [
            [np.mean([self.cost(r, v, lead)[:2] for v in of], axis=0) for r, of in enumerate(every)] for lead in (0, 1)
        ]
        (shared_slots, shared_frames), (less, _) = np.mean(once, axis=1).tolist()
        digest = hashlib.sha256(repr(self.common).encode()).hexdigest()[:16]
        shared = Shared(self.lead, shared_slots, shared_frames, shared_slots - less, digest)
        content = (self.counts.tolist(), self.n_samples.tolist(), self.slots, self.targets)
        digest = hashlib.sha256(repr(content).encode()).hexdigest()[:16]
        return Summary(self.n_samples.sum() / frames.SAMPLE_RATE / 3600, slots, n_frames, digest, {}, (), shared)

    def first(self, count: int) -> "Corpus":
        """Its first records, in one shard."""
        return replace(
            self, counts=np.array([count]), n_samples=self.n_samples[:count], slots=self.slots[:count],
            targets=self.targets[:count], common=self.common[:count],
        )  # fmt: skip


def corpus(
    name: str, lengths_s: list[float], *, shards: int | list[int] = 1, variants: int = 2, audio: bool = True,
    answers: str = "one", text: tuple[int, int] = (20, 40),
) -> Corpus:  # fmt: skip
    """Lengths in seconds; text of 20 to 40 slots; `shards`: how many, or the records of each."""
    rng = np.random.default_rng(len(lengths_s))
    each = [len(part) for part in np.array_split(lengths_s, shards)] if isinstance(shards, int) else shards
    assert sum(each) == len(lengths_s)
    slots = rng.integers(*text, (len(lengths_s), variants))
    return Corpus(
        Card(name, "asr", f"{name}*.tar", "none", audio=audio, answers=answers), np.array(each),
        np.array([round(s * frames.SAMPLE_RATE) * audio for s in lengths_s]), tuple(map(tuple, slots.tolist())),
        tuple(map(tuple, (slots - rng.integers(1, 10, slots.shape)).tolist())),
    )  # fmt: skip


def speech(count: int, seed: int = 0) -> list[float]:
    """Lengths like those of speech corpora: many short, a tail to 30 s."""
    return np.clip(np.random.default_rng(seed).lognormal(1.6, 0.7, count), 0.3, 30).tolist()


CORPORA = (corpus("small", speech(7)), corpus("sharded", speech(300, 1), shards=9), corpus("one", speech(80, 2)))
PERCENT = (20.0, 50.0, 30.0)
LONG = Budget(pack_slots=800, pack_frames=1200, packs_per_step=5)  # every record of them fits
TOO_LONG = corpus("some too long", [*speech(40, 3), 200, 200, *speech(38, 4)], shards=3)  # two of 80 fit no pack


def planner(corpora=CORPORA, percent=PERCENT, shape=LONG, seed=0, state=None) -> Planner:
    """A new planner; a state goes through JSON, as in a checkpoint."""
    made = Planner(corpora, percent, shape, seed)
    if state is not None:
        made.restore(json.loads(json.dumps(state)))
    return made


# -- what a plan did ---------------------------------------------------------------------------------------------------


def samples(steps: list[PlannedStep]) -> list[Planned]:
    return [s for step in steps for pack in step.packs for s in pack]


def packs(steps: list[PlannedStep]) -> list[tuple[Planned, ...]]:
    return [pack for step in steps for pack in step.packs]


def waiting(plan: Planner) -> list[Planned]:
    """Drawn and in no pack yet."""
    return [Planned(*row) for row in plan.carried(plan.state()).tolist()]


def visited(plan: Planner, steps: list[PlannedStep]) -> Counter[tuple[int, int, int]]:
    """How often each (corpus, epoch, position) was planned, passed over, or is waiting."""
    passed = [u for step in steps for u in step.skipped]
    return Counter(tuple(s[:3]) for s in [*samples(steps), *passed, *waiting(plan)])


def due(plan: Planner) -> Counter[tuple[int, int, int]]:
    """Every place up to the cursors, once."""
    cursors = enumerate(plan.state()["cursors"])
    sizes = [int(c.counts.sum()) for c in plan.corpora]
    return Counter(
        (c, e, p)
        for c, (epoch, position) in cursors for e in range(epoch + 1) for p in range(sizes[c] if e < epoch else position)
    )  # fmt: skip


def drawn(state: dict, corpora=CORPORA) -> NDArray[np.int64]:
    """Samples drawn of each corpus."""
    return np.array([e * len(c) + p for c, (e, p) in zip(corpora, state["cursors"], strict=True)])


def order(plan: Planner, number: int, epoch: int) -> list[int]:
    """The records of a corpus in the order of an epoch."""
    size = int(plan.corpora[number].counts.sum())
    return plan.rows(number, epoch, np.arange(size))[:, RECORD].tolist()


def fractions(numbers: list[int], count: int) -> NDArray[np.float64]:
    return np.bincount(numbers, minlength=count) / len(numbers)


# -- nothing lost, nothing twice ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("corpora", "shape"),
    [
        (CORPORA, LONG),
        ((*CORPORA, TOO_LONG), LONG),
        ((corpus("uneven", speech(90), shards=[0, 1, 60, 0, 0, 28, 1, 0]),), LONG),
        ((corpus("all", speech(90), answers="all"), CORPORA[0]), LONG),
        ((corpus("text", [1.0] * 90, audio=False), corpus("text 2", [1.0] * 9, audio=False)), Budget(300, 0, 2)),
        ((corpus("one to a pack", [10.0] * 50),), Budget(110, 260, 3)),
    ],
    ids=["speech", "some too long", "uneven and empty shards", "all answers", "text", "one to a pack"],
)
def test_every_record_is_visited_once_an_epoch(corpora, shape):
    """No sample in flight is lost at a pack's boundary and none comes twice: planned + passed over + waiting is what
    was drawn, after every step. Drawing shards with replacement would leave a quarter of them unseen."""
    plan = planner(corpora, (1.0,) * len(corpora), shape)
    steps: list[PlannedStep] = []
    for step in islice(plan, 60):
        steps.append(step)
        if step.number % 10 == 9:
            assert visited(plan, steps) == due(plan)
    while min(epoch for epoch, _ in plan.state()["cursors"]) < 3:
        steps.append(next(plan))
    assert visited(plan, steps) == due(plan)
    seen: dict[tuple[int, int], list[int]] = {}
    passed = [u for step in steps for u in step.skipped]
    for s in [*samples(steps), *passed, *waiting(plan)]:
        seen.setdefault((s.corpus, s.epoch), []).append(s.record)
    for c, (epoch, _) in enumerate(plan.state()["cursors"]):
        for e in range(epoch):
            assert sorted(seen[c, e]) == list(range(len(corpora[c]))), "the records of an epoch are no permutation"


def test_a_planned_sample_can_be_looked_up_by_its_place():
    """rows() gives back what was planned, whatever else was asked for in between; a ledger keeps no more."""
    plan, undisturbed = planner((*CORPORA, TOO_LONG), (20, 40, 20, 20)), planner((*CORPORA, TOO_LONG), (20, 40, 20, 20))
    by_epoch: dict[tuple[int, int], list[Planned]] = {}
    for step in islice(plan, 60):
        assert step == next(undisturbed), "asking for rows has changed the plan"
        plan.rows(1, 17, np.array([5, 299, 0]))
        for s in samples([step]):
            by_epoch.setdefault((s.corpus, s.epoch), []).append(s)
        for c, e, position, record in step.skipped:
            assert plan.rows(c, e, np.array([position]))[0, RECORD] == record
    assert len(by_epoch) > 50
    for (c, e), planned in by_epoch.items():
        assert [Planned(*r) for r in plan.rows(c, e, np.array([s.position for s in planned])).tolist()] == planned
    assert len(plan.rows(0, 0, np.zeros(0, dtype=np.int64))) == 0


def test_a_sample_costs_what_its_variant_costs():
    """Slots, frames and targets, with as many variants as a record happens to have."""
    rng = np.random.default_rng(0)
    several = [tuple(rng.integers(5, 60, n).tolist()) for n in rng.integers(1, 6, 120)]
    odd = replace(
        corpus("odd", speech(120), shards=7), slots=tuple(several),
        targets=tuple(tuple(s - 3 for s in many) for many in several),
    )  # fmt: skip
    mixed = (odd, replace(odd, card=replace(odd.card, name="odd all", answers="all")), CORPORA[1])
    shape = Budget(1500, 3500, 4)
    for s in samples(list(islice(planner(mixed, PERCENT, shape), 40))):
        assert (s.slots, s.frames, s.targets) == mixed[s.corpus].cost(s.record, s.variant)


def test_one_variant_a_visit_all_about_equally_and_anew_each_epoch():
    many = corpus("many", [1.0] * 400, variants=4)
    plan = planner((many,), (100,))
    chosen = np.array([plan.rows(0, e, np.arange(400))[:, [RECORD, RECORD + 1]] for e in range(8)])
    by_record = np.array([epoch[epoch[:, 0].argsort(), 1] for epoch in chosen])
    assert np.abs(fractions(by_record.ravel().tolist(), 4) - 0.25).max() < 0.03
    for a, b in itertools.combinations(by_record, 2):
        assert 0.15 < np.mean(a == b) < 0.35, "the draws of two epochs are not independent"
    for step in islice(plan, 20):
        assert {s.variant for s in samples([step])} == {0, 1, 2, 3}


def test_all_answers_of_a_record_are_one_sample():
    """Their slots, frames and targets are sums over the variants, each with the audio of its own."""
    every = corpus("all", speech(60), variants=3, answers="all")
    for s in samples(list(islice(planner((every,), (100,), Budget(900, 2500, 3)), 20))):
        tokens, n_frames = (f(int(every.n_samples[s.record])) for f in (frames.audio_tokens, frames.frames))
        assert s.variant == ALL
        assert s.slots == sum(every.slots[s.record]) + 3 * tokens
        assert s.frames == 3 * n_frames
        assert s.targets == sum(every.targets[s.record])


@pytest.mark.parametrize("count", [1, 30])
def test_a_small_corpus_fills_eighty_ranks(count):
    """One shard, or one record: every rank has its pack, nobody waits for a shard of its own."""
    plan = planner((corpus("tiny", speech(count)),), (100,), replace(LONG, packs_per_step=80))
    steps = list(islice(plan, 3))
    for step in steps:
        for rank in range(80):
            ((number, pack),) = step.share(rank, 80)
            assert number == rank
            assert pack
    assert visited(plan, steps) == due(plan)


# -- order -------------------------------------------------------------------------------------------------------------


def test_order_is_shuffled_anew_each_epoch_and_seed():
    """webdataset's resampled=True ignores the seed. Neighbours in the mix make no difference."""
    plan, other = planner(), planner(seed=1)
    orders = [order(plan, 1, 0), order(plan, 1, 1), order(other, 1, 0), list(range(300))]
    for found in orders:
        assert sorted(found) == list(range(300))
        assert np.mean(np.abs(np.diff(found)) == 1) < 0.05 or found == orders[-1]
    assert len({tuple(found) for found in orders}) == 4
    assert order(planner(), 1, 1) == orders[1]
    assert order(plan, 2, 0) != order(plan, 2, 1), "one shard comes in the same order every epoch"
    assert order(planner((CORPORA[1],), (100,)), 0, 0) == orders[0], "the order of a corpus depends on its neighbours"
    twin = replace(CORPORA[1], card=replace(CORPORA[1].card, name="twin"))
    assert order(planner((CORPORA[1], twin), (50, 50)), 1, 0) != orders[0], "two corpora are in the same order"


@pytest.mark.parametrize("shards", [70, [0, *range(1, 37), 0, 0, 34]], ids=["equal shards", "uneven shards"])
def test_reads_stay_near_sequential(monkeypatch, shards):
    """A corpus much larger than GROUP is read in groups of whole shards, mixed inside a group, each record once."""
    monkeypatch.setattr(plan_room, "GROUP", 50)
    big = corpus("big", [1.0] * 700, shards=shards)
    shard_of = np.repeat(np.arange(len(big.counts)), big.counts)
    plan = planner((big, CORPORA[0]), (90, 10))
    steps: list[PlannedStep] = []
    while plan.state()["cursors"][0][0] < 2:
        steps.append(next(plan))
    assert visited(plan, steps) == due(plan)
    orders = []
    for epoch in (0, 1):
        found = order(plan, 0, epoch)
        assert sorted(found) == list(range(700))
        read = shard_of[found]
        first, last = ({s: f(np.flatnonzero(read == s)) for s in np.unique(read).tolist()} for f in (np.min, np.max))
        # a group ends where no shard is open; it holds about GROUP records
        ends = [p + 1 for p in range(700) if all(first[s] > p or last[s] <= p for s in first)]
        sizes = np.diff([0, *ends])
        assert sizes.max() < 50 + big.counts.max()
        assert len(sizes) > 7
        assert np.mean(read[1:] == read[:-1]) < 0.5, "one shard is read after the other"
        orders.append(found)
    begins = [set(shard_of[found[:50]].tolist()) for found in orders]
    assert begins[0] != begins[1], "each epoch begins with the same shards"


# -- the mix -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("percent", [PERCENT, (8.2537, 1.3434, 0.0488, 90.3541), (0.3897, 38.5478, 0.0004, 61.0621)])
def test_every_block_meets_the_mix_within_one_sample(percent):
    corpora = [corpus(str(n), speech(50, n)) for n in range(len(percent))]
    plan = planner(corpora, percent)
    share = np.array(percent) / sum(percent)
    total = np.zeros(len(percent))
    for number in range(400):
        counts = np.bincount(plan.block(number), minlength=len(percent))
        assert counts.sum() == BLOCK
        assert np.abs(counts - share * BLOCK).max() < 1
        total += counts
        assert np.abs(total - share * BLOCK * (number + 1)).max() < 5
    assert not np.array_equal(plan.block(0), plan.block(1))
    assert not np.array_equal(plan.block(0), planner(corpora, percent, seed=1).block(0))


def test_corpora_are_drawn_as_the_blocks_say():
    plan = planner()
    steps: list[PlannedStep] = []
    while plan.state()["block"] < 4:
        steps.append(next(plan))
    asked = np.concatenate([plan.block(n) for n in range(plan.state()["block"])])
    assert drawn(plan.state()).tolist() == np.bincount(asked).tolist()
    # and what is waiting are the last ones of it, apart from what the window gave to a pack earlier
    assert len(asked) == len(samples(steps)) + len(waiting(plan))
    first = asked[: int(len(asked) * 0.7)]
    realised = fractions([s.corpus for s in samples(steps)][: len(first)], 3)
    assert np.abs(realised - fractions(first.tolist(), 3)).max() < 0.02


def test_weights_count_samples_not_shards():
    """Weights in proportion to the number of tars: nine shards and one shard with equal shares are drawn equally."""
    plan = planner((CORPORA[1], CORPORA[2]), (50, 50))
    assert np.bincount(plan.block(3)).tolist() == [BLOCK // 2] * 2
    steps = list(islice(plan, 60))
    assert drawn(plan.state(), plan.corpora).tolist() == [BLOCK // 2 * plan.state()["block"]] * 2
    assert fractions([s.corpus for s in samples(steps)], 2) == pytest.approx([0.5, 0.5], abs=0.02)


# -- a mix that changes ------------------------------------------------------------------------------------------------


CHANGED = (5.0, 15.0, 80.0)


def test_changed_shares_hold_from_their_step_on():
    plan, usual = planner(), list(islice(planner(), 30))
    before = list(islice(plan, 4))
    plan.change(30, CHANGED)
    before += islice(plan, 26)
    assert packs(before) == packs(usual), "the change acts before its step"
    after = list(islice(plan, 120))
    first, last = before[-1].state_after, after[-1].state_after
    blocks = last["block"] - first["block"]
    assert blocks >= 4
    assert np.abs(drawn(last) - drawn(first) - np.array(CHANGED) / 100 * BLOCK * blocks).max() < 3
    asked = [np.bincount(plan.block(first["block"] + n, CHANGED), minlength=3) for n in range(blocks)]
    assert (drawn(last) - drawn(first)).tolist() == np.sum(asked, axis=0).tolist()
    realised = fractions([s.corpus for s in samples(after[40:])], 3)
    assert np.abs(realised - np.array(CHANGED) / 100).max() < 0.02
    assert visited(plan, before + after) == due(plan)


@pytest.mark.parametrize("at", [3, 29, 30, 31, 60, 89])
def test_a_change_survives_a_resume(at):
    """Whether it is still to come, or holds already; then another one, from the present step on."""

    def follow(plan: Planner, steps: int) -> list[PlannedStep]:
        found = []
        for _ in range(steps):
            if plan.state()["step"] == 2:
                plan.change(30, CHANGED)
            if plan.state()["step"] == 60:
                plan.change(60, PERCENT)
            found.append(next(plan))
        return found

    whole = follow(planner(), 100)
    assert [s.packs for s in whole[40:]] != [s.packs for s in islice(planner(), 40, 100)]
    resumed = planner(state=whole[at - 1].state_after)
    assert follow(resumed, 100 - at) == whole[at:]
    assert resumed.present() == PERCENT


def test_a_step_that_is_planned_already_cannot_change():
    plan = planner()
    steps = list(islice(plan, 5))
    with pytest.raises(AssertionError, match=r"step 4 is planned already \(next is 5\)"):
        plan.change(4, CHANGED)
    plan.change(5, CHANGED)
    assert plan.present() == CHANGED
    resumed = planner(state=steps[2].state_after)
    with pytest.raises(AssertionError, match="planned already"):
        resumed.change(2, CHANGED)
    resumed.change(3, CHANGED)


@pytest.mark.parametrize("zero", [0, 4, 10])
def test_a_share_may_become_zero(zero):
    """What is drawn of it is still trained on, then none of it comes; its records go on later where they were."""
    corpora = [corpus(f"c{n}", speech(20 + n, n)) for n in range(11)]
    none = [10.0] * 11  # ten times a tenth is a little less than 1 in floating point
    none[zero] = 0.0
    plan = planner(corpora, [100 / 11] * 11)
    plan.change(0, none)
    steps = list(islice(plan, 40))
    assert plan.state()["block"] >= 2
    assert drawn(plan.state(), corpora)[zero] == 0
    plan.change(40, [100 / 11] * 11)
    steps += islice(plan, 40)
    until = drawn(plan.state(), corpora)[zero]
    assert until > 0
    plan.change(80, none)
    steps += islice(plan, 60)
    assert drawn(plan.state(), corpora)[zero] == until
    assert sum(s.corpus == zero for s in samples(steps)) == until
    assert zero not in {s.corpus for s in samples(steps[-20:])}
    assert visited(plan, steps) == due(plan)


def test_a_restarted_plan_has_an_order_of_its_own():
    """data.on_change=restart_plan: step numbers go on, everything is drawn from the beginning in a new order."""
    plan, old, later = planner(), planner(), planner()
    plan.restart(40)
    later.restart(41)
    assert len({tuple(order(p, 1, 0)) for p in (plan, old, later)}) == 3
    assert len({tuple(p.block(0).tolist()) for p in (plan, old, later)}) == 3
    whole = list(islice(plan, 40))
    assert [s.number for s in whole] == list(range(40, 80))
    assert visited(plan, whole) == due(plan)
    assert packs(whole) != packs(list(islice(old, 40)))
    again = planner()
    order(again, 0, 0)  # and nothing of the old order is remembered
    again.restart(40)
    assert list(islice(again, 40)) == whole
    for at in (0, 7, 33):
        assert list(islice(planner(state=whole[at].state_after), 5)) == whole[at + 1 : at + 6]


# -- any world, any interruption ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("count", [5, 80])
def test_every_world_takes_the_same_steps(world, count):
    """Another number of ranks neither skips nor repeats a sample: shares add up to the step, as many on each rank."""
    for step in islice(planner(shape=replace(LONG, packs_per_step=count)), 3):
        shares = [step.share(rank, world) for rank in range(world)]
        assert {len(share) for share in shares} == {-(-count // world)}
        by_number = {number: pack for share in shares for number, pack in share}
        assert len(by_number) == world * -(-count // world), "a pack on two ranks"
        assert tuple(by_number[n] for n in range(count)) == step.packs
        assert all(not pack for number, pack in by_number.items() if number >= count)


MANY = (*CORPORA, TOO_LONG, corpus("all", speech(30, 5), answers="all"))
MANY_PERCENT = (20.0, 30.0, 20.0, 20.0, 10.0)


def test_every_resume_goes_on_exactly_also_the_second_and_third():
    """The second resume starts from zero: here every step is planned by a planner of its own, from the state that the
    resumed one before it has left."""
    whole = list(islice(planner(MANY, MANY_PERCENT), 60))
    state, resumed = None, []
    for _ in whole:
        plan = planner(MANY, MANY_PERCENT, state=state)
        assert state is None or plan.state() == state
        resumed.append(next(plan))
        state = resumed[-1].state_after
        assert state == plan.state()
    assert resumed == whole


def test_a_resume_takes_up_every_sample_in_flight():
    """Shuffle buffer lost, dropped or duplicated: what was drawn and not yet packed comes after the resume, once."""
    before = list(islice(planner(), 7))
    plan = planner(state=before[-1].state_after)
    carried = waiting(plan)
    assert len(carried) > 100
    after: list[PlannedStep] = []
    while not {s[:3] for s in carried} <= {s[:3] for s in samples(after)}:
        after.append(next(plan))
    assert visited(plan, before + after) == due(plan)
    assert [s for s in carried if s not in set(samples(after))] == []


def test_resume_after_an_epochs_wrap_goes_on_exactly():
    """At every step around the end of an epoch of the largest corpus, several steps long."""
    whole = list(islice(planner(), 80))
    epochs = [step.state_after["cursors"][1][0] for step in whole]
    wraps = [n for n in range(1, len(epochs)) if epochs[n] > epochs[n - 1]]
    assert len(wraps) > 2
    for at in {n + d for n in wraps for d in (-1, 0, 1) if n + d < 75}:
        assert list(islice(planner(state=whole[at].state_after), 5)) == whole[at + 1 : at + 6]
    # a state exactly at an epoch's end
    small = (corpus("as long as a block", [1.0] * BLOCK),)
    steps = list(islice(planner(small, (100,)), 30))
    assert steps[0].state_after["cursors"] == [[0, BLOCK]]
    assert list(islice(planner(small, (100,), state=steps[0].state_after), 29)) == steps[1:]


def test_state_is_not_changed_by_going_on():
    plan = planner()
    step = next(plan)
    before = json.dumps(step.state_after)
    plan.change(9, CHANGED)
    later = list(islice(plan, 40))  # blocks are drawn
    assert later[-1].state_after["cursors"] != step.state_after["cursors"]
    assert json.dumps(step.state_after) == before


@dataclass(frozen=True)
class Huge(Corpus):
    """Any number of records of one slot each."""

    def columns(self, shard: int) -> Columns:
        few = np.ones(self.counts[shard], dtype=np.int16)
        return Columns(0 * few, np.arange(1, len(few) + 1, dtype=np.int32), few, few, 0 * few)

    @cached_property
    def summary(self) -> Summary:
        return Summary(0.0, 1.0, 0.0, hashlib.sha256(self.card.name.encode()).hexdigest()[:16], {}, (), NOTHING)


@pytest.mark.parametrize(("clips", "most"), [(5000, 900), (100, 1400)])
def test_state_is_small(monkeypatch, clips, most):
    """300 corpora of 500 M records, far into them, as many samples waiting as there can be, and changes of the mix."""
    monkeypatch.setattr(plan_room, "GROUP", 1)  # one shard: the memory of this test, not of the state
    like = corpus("", [1.0], audio=False)
    names = [f"a_corpus_of_some_language_{n}" for n in range(300)]
    corpora = [Huge(replace(like.card, name=name), np.full(25_000, 20_000), like.n_samples, (), ()) for name in names]
    rng = np.random.default_rng(0)
    shares, *changes = (100 * rng.dirichlet(np.ones(300), 4)).tolist()
    plan = planner(corpora, shares, Budget(clips, 0, 1))
    state = plan.state()
    state["cursors"] = [[int(rng.integers(100)), int(p)] for p in rng.integers(4e8, 5e8, 300)]
    plan.restore(state)
    for step, percent in enumerate(changes):
        plan.change(step, [round(p, 4) for p in percent])
    states = []
    for step in islice(plan, 9):
        assert len(step.packs[0]) > 0.85 * clips
        states.append(step.state_after)
    assert max(len(plan.carried(s)) for s in states) > most
    assert max(len(json.dumps(s)) for s in states) < 65_536
    assert planner(corpora, shares, plan.budget, state=plan.state()).state() == plan.state()


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"percent": (20, 49, 31)}, "mix was .*50.0.* and is .*49"),
        (
            {"corpora": (CORPORA[0], CORPORA[2], CORPORA[1]), "percent": (20.0, 30.0, 50.0)},
            "mix was .*small.*sharded.*one.* and is .*small.*one.*sharded",
        ),
        ({"corpora": CORPORA[:2], "percent": (40, 60)}, "mix was .*one.* and is "),
        ({"corpora": (*CORPORA, TOO_LONG), "percent": (*PERCENT, 1)}, "mix was .* and is .*some too long"),
        ({"shape": replace(LONG, pack_slots=801)}, r"budget was \[800, 1200, 5\] and is \[801, 1200, 5\]"),
        ({"shape": replace(LONG, pack_frames=1201)}, r"budget was \[800, 1200, 5\] and is \[800, 1201, 5\]"),
        ({"shape": replace(LONG, packs_per_step=6)}, r"budget was \[800, 1200, 5\] and is \[800, 1200, 6\]"),
        ({"corpora": (*CORPORA[:2], CORPORA[2].first(79))}, "index: the records, .* of one have changed"),
        (
            {"corpora": (CORPORA[0], replace(CORPORA[1], counts=np.array([100, 200])), CORPORA[2])},
            "index: the records, .* of sharded have changed",
        ),
        (
            {"corpora": (replace(CORPORA[0], card=replace(CORPORA[0].card, answers="all")), *CORPORA[1:])},
            "index: the records, .* of small have changed",
        ),
    ],
    ids=[
        "another seed", "shares", "order of corpora", "a corpus less", "a corpus more", "another token budget", "frames",
        "packs", "a record less", "other shards", "all answers",
    ],
)  # fmt: skip
def test_resume_under_another_plan_is_refused(other, says):
    """With another seed or another token budget others go on, in silence. The message names what changed, only that."""
    state = next(planner()).state_after
    plan = planner(**other)
    with pytest.raises(UserError, match=f"the checkpoint's plan was made otherwise: {says}[^;]*$"):
        plan.restore(json.loads(json.dumps(state)))
    assert next(plan) == next(planner(**other)), "a refused state has been taken up in part"


def test_resume_under_other_rules_is_refused(monkeypatch):
    state = next(planner()).state_after
    for name in ("BLOCK", "GROUP", "WINDOW", "ARRIVAL"):
        with monkeypatch.context() as patched:
            patched.setattr(plan_room, name, getattr(plan_room, name) / 2)
            with pytest.raises(UserError, match="rules was"):
                planner(state=state)
    assert differences(state["fingerprint"], planner().fingerprint()) == ""


def test_several_differences_are_all_named():
    found = differences(planner().fingerprint(), planner((*CORPORA[:2], CORPORA[2].first(9)), seed=3).fingerprint())
    assert found == (
        "seed was 0 and is 3; index: the records, shards or token counts of one have changed"
    )  # fmt: skip


# -- digest ------------------------------------------------------------------------------------------------------------


def test_equal_plans_have_equal_digests_and_no_other():
    """Ranks compare it every step: another sample, order, variant or cost shows in the step where it first differs."""
    steps = list(islice(planner(), 40))
    digests = [s.digest for s in steps]
    assert digests == [s.digest for s in islice(planner(), 40)]
    assert len(set(digests)) == 40
    assert digests == [s.state_after["digest"] for s in steps]
    # a slot more of one variant of one record
    record = steps[3].packs[0][0].record if steps[3].packs[0][0].corpus == 1 else steps[3].packs[0][1].record
    longer = tuple(tuple(t + 1 for t in many) if r == record else many for r, many in enumerate(CORPORA[1].targets))
    others = list(islice(planner((CORPORA[0], replace(CORPORA[1], targets=longer), CORPORA[2])), 40))
    differ = [a.packs != b.packs for a, b in zip(steps, others, strict=True)]
    first = differ.index(True)
    assert first <= 3
    assert [a.digest == b.digest for a, b in zip(steps, others, strict=True)] == [n < first for n in range(40)]


def test_digest_knows_the_order_and_the_packs():
    """The same records in another order; the same samples in the same order, cut into other packs."""
    alike = (corpus("alike", [1.0] * 4, audio=False, text=(100, 101), variants=1),)
    shape = Budget(400, 0, 1)
    found = {}
    for seed in range(20):
        step = next(planner(alike, (100,), shape, seed))
        assert sorted(s.record for s in step.packs[0]) == [0, 1, 2, 3]
        found.setdefault(tuple(s.record for s in step.packs[0]), set()).add(step.digest)
    assert len(found) > 5
    assert len(set.union(*found.values())) == len(found)
    assert all(len(digests) == 1 for digests in found.values()), "equal packs, other digests"
    wide, narrow = (next(planner(alike, (100,), s)) for s in (Budget(200, 0, 1), Budget(100, 0, 2)))
    assert samples([wide]) == samples([narrow])
    assert wide.packs != narrow.packs
    assert wide.digest != narrow.digest


def test_digest_is_chained_over_steps_and_resumes():
    """Equal steps after a step that differed: their digests still differ, also after a resume."""
    steps = list(islice(planner(), 6))
    state = dict(steps[1].state_after)
    state["digest"] ^= 1  # as if a former step had been another one
    for step, other in zip(steps[2:], planner(state=state), strict=False):
        assert step.packs == other.packs
        assert step.digest != other.digest
    assert next(planner(state=steps[1].state_after)).digest == steps[2].digest


# -- what does not fit -------------------------------------------------------------------------------------------------


def test_what_fits_no_pack_is_passed_over_and_counted_once():
    """Long clips silently dropped by a token cap: each visit of one is in exactly one step's list, also over a sequence
    of resumes; the others fill the corpus' share."""
    corpora, percent = (*CORPORA[:2], TOO_LONG), (10, 40, 50)
    whole = list(islice(planner(corpora, percent), 120))
    steps, state = [], None
    while len(steps) < 120:  # stopped after every 1 to 9 steps
        part = list(islice(planner(corpora, percent, state=state), min(1 + len(steps) % 9, 120 - len(steps))))
        steps, state = steps + part, part[-1].state_after
    assert steps == whole
    plan = planner(corpora, percent, state=state)
    passed = Counter(u for step in steps for u in step.skipped)
    epoch, position = state["cursors"][2]
    assert epoch > 5
    too_long = {40, 41}
    rows = [r for e in range(epoch + 1) for r in plan.rows(2, e, np.arange(80 if e < epoch else position)).tolist()]
    assert passed == Counter(tuple(r[:4]) for r in rows if r[RECORD] in too_long)
    assert not too_long & {s.record for s in samples(steps) if s.corpus == 2}
    assert all(s.slots <= LONG.pack_slots and s.frames <= LONG.pack_frames for s in waiting(plan))
    taken = np.bincount([s.corpus for s in [*samples(steps), *waiting(plan)]])
    asked = np.bincount(np.concatenate([plan.block(n) for n in range(state["block"])]))
    assert taken.tolist() == asked.tolist(), "a corpus with long clips has less than its share"


def test_corpus_that_fits_no_pack_is_an_error():
    """Long clips silently dropped by a token cap: a handful is counted, more than 5 % stop the run before it begins."""
    shape = Budget(400, 600, 5)
    for lengths in ([40.0] * 5, [40.0] * 6 + [1.0] * 94):
        long = corpus("long", lengths)
        with pytest.raises(UserError) as error:
            check_fits(planner((CORPORA[0].first(1), long), (50, 50), shape))
        assert re.fullmatch(
            f"corpus long: {lengths.count(40)} of {len(lengths)} samples fit no pack of 400 slots and 600 frames and "
            r"would never be trained on; the longest, record [0-5], is 40.0 s and 2\d\d slots. Lower "
            "batch.packs_per_step or data.max_audio_s, or write batch.pack_frames=1000",
            str(error.value),
        )
    check_fits(planner((corpus("long", [40.0] * 5 + [1.0] * 95),), (100,), shape))
    check_fits(planner())
    # text alone can be too long, and so can all answers together
    wordy = corpus("wordy", [1.0] * 50, text=(390, 397))
    with pytest.raises(UserError, match="corpus wordy: 50 of 50"):
        check_fits(planner((wordy,), (100,), Budget(390, 600, 5)))
    check_fits(planner((wordy,), (100,), Budget(402, 600, 5)))
    with pytest.raises(UserError, match="corpus wordy: 50 of 50"):
        check_fits(planner((replace(wordy, card=replace(wordy.card, answers="all")),), (100,), Budget(402, 600, 5)))


def test_looking_whether_samples_fit_does_not_use_up_the_plan():
    plan = planner()
    check_fits(plan)
    assert list(islice(plan, 3)) == list(islice(planner(), 3))


@pytest.mark.parametrize("count", [1, 700])
def test_corpus_of_which_nothing_fits_does_not_loop_for_ever(count):
    long = corpus("far too long", [200.0] * count)
    with pytest.raises(AssertionError, match="nothing of far too long fits"):
        next(planner((CORPORA[0], long), (50, 50)))
    # one in a thousand is enough to go on
    rare = corpus("rare", [200.0] * 300 + [1.0])
    steps = list(islice(planner((CORPORA[0], rare), (90, 10)), 2))
    assert {s.record for s in samples(steps) if s.corpus == 1} == {300}


# -- packs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("corpora", "shape"),
    [
        (CORPORA, LONG),
        (CORPORA, Budget(150, 1500, 3)),  # slots are short
        (CORPORA, Budget(2000, 800, 3)),  # frames are short
        ((corpus("text", [1.0] * 500, audio=False),), Budget(900, 0, 3)),
        ((corpus("exact", [4.0] * 50, text=(30, 31)),), Budget(200, 400, 2)),  # four samples of (50, 100)
    ],
    ids=["both", "slots", "frames", "text", "exact"],
)
def test_budgets_are_never_exceeded(corpora, shape):
    for step in islice(planner(corpora, PERCENT[: len(corpora)], shape), 40):
        assert len(step.packs) == shape.packs_per_step
        for pack in step.packs:
            assert 0 < sum(s.slots for s in pack) <= shape.pack_slots
            assert sum(s.frames for s in pack) <= shape.pack_frames
            for s in pack:
                assert (s.slots, s.frames, s.targets) == corpora[s.corpus].cost(s.record, s.variant)
            assert corpora[0].card.name != "exact" or len(pack) == 4, "a pack that is exactly full is refused"


@pytest.mark.parametrize("shape", [replace(LONG, packs_per_step=1), Budget(2000, 800, 1)])
def test_no_sample_waits_for_ever(shape):
    """The first one that waits goes into the next pack, and nobody is put behind one who came later."""
    plan = planner(shape=shape)
    before: list[Planned] = []
    for step in islice(plan, 150):
        assert not before or before[0] in step.packs[0]
        packed = set(step.packs[0])
        still = [s for s in before if s not in packed]
        before = waiting(plan)
        assert before[: len(still)] == still
        assert WINDOW // 2 < len(before) < WINDOW + BLOCK + 1


@pytest.mark.parametrize(
    ("lengths", "clips", "audio"),
    [
        (speech(6000), 60, True),
        ([10.0, 10.0, 10.0, 10.0, 9.0, 6.5] * 1000, 60, True),  # most caption corpora: 10 s, nearly all
        ([1.0] * 6000, 600, False),  # more samples in a pack than the window holds
    ],
    ids=["speech", "captions", "text"],
)
def test_packs_are_full_and_not_sorted_by_length(lengths, clips, audio):
    """Sorting packers make packs of like lengths; next-fit leaves a few percent of each pack empty."""
    corpora = (corpus("a", lengths, shards=40, audio=audio), corpus("b", lengths[::2], audio=audio))
    mix = (70.0, 30.0)
    shape = budget(corpora, mix, kind="report", clips_per_step=clips * 2, packs_per_step=2, pack_slots=0, pack_frames=0)
    shape = replace(shape, pack_frames=round(shape.pack_frames / plan_room.ROOM))  # without it both must be full
    made = packs(list(islice(planner(corpora, mix, shape), 50 if audio else 5)))
    slots, used = (np.array([sum(getattr(s, what) for s in pack) for pack in made]) for what in ("slots", "frames"))
    assert slots.mean() / shape.pack_slots > 0.97
    assert np.mean([len(pack) for pack in made]) == pytest.approx(clips, rel=0.03)
    if audio:
        assert used.mean() / shape.pack_frames > 0.97
        mean_length = np.array([np.mean([s.frames for s in pack]) for pack in made])
        apart = mean_length - mean_length.mean()
        for lag in (1, 2, 5):  # 100 packs: chance alone gives 0.1
            assert abs((apart[lag:] * apart[:-lag]).mean() / apart.var()) < 0.3
        assert np.std([s.frames for s in made[0]]) > 0.5 * np.std([s.frames for pack in made for s in pack])


# -- budget and length -------------------------------------------------------------------------------------------------


def test_budget_kinds():
    slots, frame = mean_cost(CORPORA, PERCENT)
    values = {"clips_per_step": 30, "packs_per_step": 5, "pack_slots": 700, "pack_frames": 0}
    report, throughput = (budget(CORPORA, PERCENT, kind=kind, **values) for kind in ("report", "throughput"))
    assert report.pack_slots == pytest.approx(6 * slots, abs=1)
    assert throughput.pack_slots == 700
    for shape in (report, throughput):
        assert shape.packs_per_step == 5
        assert shape.pack_frames / shape.pack_slots == pytest.approx(plan_room.ROOM * frame / slots, rel=0.01)
    assert budget(CORPORA, PERCENT, kind="throughput", **values | {"pack_frames": 9}).pack_frames == 9
    text = [corpus("text", [1.0] * 50, audio=False)]
    assert budget(text, [100], kind="report", **values).pack_frames == 0


def test_mean_cost_is_that_of_the_plan():
    """Also where one corpus gives all answers at once."""
    corpora = (corpus("one", speech(200)), corpus("all", speech(150, 1), variants=3, answers="all"))
    found = samples(list(islice(planner(corpora, (50, 50), Budget(4000, 9000, 4)), 30)))
    share = 100 * fractions([s.corpus for s in found], 2)
    planned = np.mean([(s.slots, s.frames) for s in found], axis=0)
    assert planned == pytest.approx(mean_cost(corpora, share), rel=0.03)


def test_length_in_any_unit():
    found = samples(list(islice(planner(), 200)))
    hours = sum(frames.seconds(int(CORPORA[s.corpus].n_samples[s.record])) for s in found) / 3600
    records = sum(len(c) for c in CORPORA)
    for text, expected in {
        "200 steps": 200, "0 steps": 0, f"{len(found)} clips": 200, f"{hours} audio_hours": 200,
        f"{len(found) / records} epochs": 200,
    }.items():  # fmt: skip
        assert steps_of(text, "run.length", planner()) == pytest.approx(expected, rel=0.05), text
    text = Budget(400, 0, 2)
    with pytest.raises(UserError, match="in a mix without audio"):
        steps_of("3 audio_hours", "run.length", planner([corpus("text", [1.0] * 50, audio=False)], [100], text))
