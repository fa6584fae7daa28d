"""The plan: every record once an epoch, the mix as asked for, full packs, and exact resume on any world."""

import json
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from midasheng import frames
from midasheng.config import UserError
from midasheng.data.index import CorpusIndex, Place, Record, Variant
from midasheng.data.manifest import Card
from midasheng.data.plan import BLOCK, Budget, PlannedStep, Planner, budget, mean_cost, steps_of

BUDGET = Budget(pack_slots=400, pack_frames=600, packs_per_step=5)


def corpus(name: str, lengths_s: list[float], *, shards: int = 1, variants: int = 2, audio: bool = True) -> CorpusIndex:
    """An index of records that exist nowhere else: lengths in seconds, text of 20 to 40 slots."""
    rng = np.random.default_rng(len(lengths_s))
    records = [
        Record(
            f"{name}{n}", Place("none", 0, 0) if audio else None, round(length * frames.SAMPLE_RATE) if audio else 0,
            tuple(Variant((), int(slots), 5) for slots in rng.integers(20, 40, variants)),
        )
        for n, length in enumerate(lengths_s)
    ]  # fmt: skip
    card = Card(name, "asr", f"{name}*.tar", "none", audio=audio)
    return CorpusIndex(card, tuple(records), (), np.sort(np.arange(len(records)) % shards), ())


def speech(count: int, seed: int = 0) -> list[float]:
    """Lengths like those of speech corpora: many short, a tail to 30 s."""
    return np.clip(np.random.default_rng(seed).lognormal(1.6, 0.7, count), 0.3, 30).tolist()


def shorter(index: CorpusIndex) -> CorpusIndex:
    """Without the last record."""
    return replace(index, train=index.train[:-1], shard_of=index.shard_of[:-1])


CORPORA = (corpus("small", speech(7)), corpus("sharded", speech(300, 1), shards=9), corpus("one", speech(80, 2)))
PERCENT = (20.0, 50.0, 30.0)
LONG = Budget(pack_slots=800, pack_frames=1200, packs_per_step=5)


def planner(corpora=CORPORA, percent=PERCENT, shape=LONG, seed=0, state=None) -> Planner:
    made = Planner(corpora, percent, shape, seed)
    if state is not None:
        made.restore(json.loads(json.dumps(state)))
    return made


def trained(steps: list[PlannedStep]) -> list[tuple[int, int, int]]:
    """(corpus, record, epoch) of all samples."""
    return [(s.corpus, s.record, s.epoch) for step in steps for pack in step.packs for s in pack]


# -- nothing lost, nothing twice ---------------------------------------------------------------------------------------


def test_every_drawn_sample_is_trained_on_once():
    """Over many steps and epochs: planned + waiting + skipped is what was drawn; no sample is lost between packs."""
    corpora = (*CORPORA[:2], replace(CORPORA[2], train=(*CORPORA[2].train[:-2], *corpus("long", [200, 200]).train)))
    plan = planner(corpora)
    steps = list(islice(plan, 60))
    state = plan.state()
    seen = Counter(trained(steps)) + Counter((c, r, e) for c, r, e, _ in state["carried"])
    assert max(seen.values()) == 1
    assert sum(seen.values()) == state["drawn"]
    assert seen == Counter(trained(list(islice(planner(corpora), 60)))) + Counter(
        (c, r, e) for c, r, e, _ in state["carried"]
    )
    skipped = Counter((c, r) for step in steps for c, r, _ in step.skipped)
    for c, (epoch, position) in enumerate(state["cursors"]):
        assert epoch > 0
        records = len(corpora[c].train)
        drawn = sum(number == c for number, *_ in seen) + sum(n for (number, _), n in skipped.items() if number == c)
        assert drawn == epoch * records + position
        for e in range(epoch):
            assert {r for number, r, ee in seen if (number, ee) == (c, e)} == set(range(78 if c == 2 else records))
    assert {(*k, why) for k in skipped for step in steps for *_, why in step.skipped} == {
        (2, record, "fits no pack") for record in (78, 79)
    }


def test_no_sample_waits_for_ever():
    """The first of the window is always taken: a long clip goes into the next pack, not into the last."""
    plan = planner()
    before: list[list[int]] = []
    for step in islice(plan, 30):
        inside = [[s.corpus, s.record, s.epoch, s.variant] for s in step.packs[0]]
        assert not before or before[0] in inside
        before = step.state_after["carried"]


def test_budgets_are_never_exceeded():
    for shape in (LONG, Budget(900, 0, 3)):
        corpora = CORPORA if shape.pack_frames else (corpus("text", [1.0] * 500, audio=False),)
        for step in islice(planner(corpora, PERCENT[: len(corpora)], shape), 40):
            assert len(step.packs) == shape.packs_per_step
            for pack in step.packs:
                assert 0 < sum(s.slots for s in pack) <= shape.pack_slots
                assert sum(s.frames for s in pack) <= shape.pack_frames
                for s in pack:
                    record = corpora[s.corpus].train[s.record]
                    assert (s.slots, s.frames) == (record.slots(s.variant), record.frames)


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


def test_corpora_are_drawn_as_the_blocks_say():
    plan = planner()
    while plan.state()["drawn"] < 3 * BLOCK:
        next(plan)
    drawn = plan.state()["drawn"]
    asked = np.concatenate([plan.block(n) for n in range(drawn // BLOCK + 1)])[:drawn]
    cursors = zip(CORPORA, plan.state()["cursors"], strict=True)
    assert [epoch * len(c.train) + position for c, (epoch, position) in cursors] == np.bincount(asked).tolist()


def test_weights_count_samples_not_shards():
    """A corpus of nine shards and one of a single shard with equal shares are drawn equally often."""
    plan = planner((CORPORA[1], CORPORA[2]), (50, 50))
    assert np.bincount(plan.block(3)).tolist() == [BLOCK // 2] * 2


def test_order_is_shuffled_anew_each_epoch_and_seed():
    plan, other = planner(), planner(seed=1)
    orders = [plan.order(1, 0), plan.order(1, 1), other.order(1, 0), np.arange(300)]
    for order in orders:
        assert sorted(order) == list(range(300))
    assert len({tuple(order) for order in orders}) == 4
    assert np.array_equal(planner().order(1, 1), orders[1])
    alone = planner((CORPORA[1],), (100,))
    assert np.array_equal(alone.order(0, 0), orders[0]), "the order of a corpus depends on its neighbours"


def test_reads_stay_near_sequential():
    """Records of a group of 32 shards come before those of the next group."""
    big = corpus("big", [1.0] * 700, shards=70)
    order = planner((big,), (100,)).order(0, 0)
    first, second, third = (set(big.shard_of[order[a:b]].tolist()) for a, b in ((0, 320), (320, 640), (640, 700)))
    assert (len(first), len(second), len(third)) == (32, 32, 6)
    assert not first & second
    assert not first & third


def test_all_variants_are_used():
    many = corpus("many", speech(400), variants=4)
    chosen = Counter(s.variant for step in islice(planner((many,), (100,)), 40) for p in step.packs for s in p)
    assert set(chosen) == {0, 1, 2, 3}
    assert min(chosen.values()) > 0.8 * sum(chosen.values()) / 4


# -- any world, any interruption ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 4, 80])
def test_every_world_takes_the_same_steps(world):
    for step in islice(planner(), 5):
        shares = [step.share(rank, world) for rank in range(world)]
        assert {len(share) for share in shares} == {-(-5 // world)}
        by_number = {number: pack for share in shares for number, pack in share}
        assert len(by_number) == world * -(-5 // world), "a pack on two ranks"
        assert tuple(by_number[n] for n in range(5)) == step.packs
        assert all(not pack for number, pack in by_number.items() if number >= 5)


def test_resume_goes_on_exactly_also_the_second_time():
    """At every step, within and after the first epochs of the small corpus, and from a resumed run again."""
    whole = list(islice(planner(), 30))
    assert whole[1].state_after["cursors"][0][0] > 0, "no epoch has gone round"
    for at in range(24):
        first = planner(state=whole[at].state_after)
        assert first.state() == whole[at].state_after
        assert list(islice(first, 3)) == whole[at + 1 : at + 4]
        second = planner(state=first.state())
        assert list(islice(second, 2)) == whole[at + 4 : at + 6]


def test_state_is_not_changed_by_going_on():
    plan = planner()
    step = next(plan)
    before = json.dumps(step.state_after)
    next(plan)
    assert json.dumps(step.state_after) == before


def test_state_is_small():
    many = [corpus(f"corpus number {n}", speech(3, n)) for n in range(300)]
    for step in islice(planner(many, [1] * 300), 5):
        assert len(json.dumps(step.state_after)) < 65536
    state = step.state_after  # as large as it can become: 300 corpora, 500 M records, a window full of samples
    state["cursors"] = [[99, 500_000_000]] * 300
    state["carried"] = [[299, 500_000_000, 99, 9]] * 256
    assert len(json.dumps(state)) < 65536


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"percent": (20, 49, 31)},
        {"shape": replace(LONG, pack_slots=801)},
        {"shape": replace(LONG, packs_per_step=6)},
        {"corpora": (CORPORA[0], CORPORA[2], CORPORA[1])},
        {"corpora": (*CORPORA[:2], shorter(CORPORA[2]))},
        {"corpora": (CORPORA[0], replace(CORPORA[1], shard_of=np.sort(CORPORA[1].shard_of // 2)), CORPORA[2])},
    ],
    ids=["seed", "mix", "slots", "packs", "order of corpora", "a record less", "other shards"],
)
def test_resume_under_another_plan_is_refused(other):
    state = next(planner()).state_after
    with pytest.raises(UserError, match="other data, another mix, seed or budget"):
        planner(**other, state=state)


# -- what does not fit --------------------------------------------------------------------------------------------------


def test_corpus_that_fits_no_pack_is_an_error():
    """Dropping long clips must be seen: a handful is counted, more than 5 % stop the run before it begins."""
    for lengths in ([40.0] * 5, [40.0] * 6 + [1.0] * 94):
        long = corpus("long", lengths)
        says = f"{2 * lengths.count(40)} of its {2 * len(lengths)} samples fit no pack of 400 slots and 600 frames"
        with pytest.raises(UserError, match=f"corpus long: {says}"):
            planner((*CORPORA[:1], long), (50, 50), BUDGET)
    planner((corpus("long", [40.0] * 4 + [1.0] * 96),), (100,), BUDGET)


def test_one_record_is_a_corpus():
    steps = list(islice(planner((corpus("one", [3.0]),), (100,)), 3))
    assert sorted(e for *_, e in trained(steps)) == list(range(len(trained(steps))))


# -- fill and order ----------------------------------------------------------------------------------------------------


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
    corpora = (corpus("a", lengths, shards=40, audio=audio), corpus("b", lengths[::2], audio=audio))
    mix = (70.0, 30.0)
    shape = budget(corpora, mix, kind="report", clips_per_step=clips * 2, packs_per_step=2, pack_slots=0, pack_frames=0)
    shape = replace(shape, pack_frames=round(shape.pack_frames / 1.05))  # without its room both must be full
    packs = [pack for step in islice(planner(corpora, mix, shape), 50 if audio else 5) for pack in step.packs]
    slots, used = (np.array([sum(getattr(s, what) for s in pack) for pack in packs]) for what in ("slots", "frames"))
    assert slots.mean() / shape.pack_slots > 0.97
    assert np.mean([len(pack) for pack in packs]) == pytest.approx(clips, rel=0.03)
    if audio:
        assert used.mean() / shape.pack_frames > 0.97
        mean_length = np.array([np.mean([s.frames for s in pack]) for pack in packs])
        apart = mean_length - mean_length.mean()
        assert abs((apart[1:] * apart[:-1]).mean() / apart.var()) < 0.3  # 100 packs: chance alone gives 0.1


def test_budget_kinds():
    slots, frame = mean_cost(CORPORA, PERCENT)
    values = {"clips_per_step": 30, "packs_per_step": 5, "pack_slots": 700, "pack_frames": 0}
    report, throughput = (budget(CORPORA, PERCENT, kind=kind, **values) for kind in ("report", "throughput"))
    assert report.pack_slots == pytest.approx(6 * slots, abs=1)
    assert throughput.pack_slots == 700
    for shape in (report, throughput):
        assert shape.pack_frames / shape.pack_slots == pytest.approx(1.05 * frame / slots, rel=0.01)
    assert budget(CORPORA, PERCENT, kind="throughput", **values | {"pack_frames": 9}).pack_frames == 9
    text = [corpus("text", [1.0] * 50, audio=False)]
    assert budget(text, [100], kind="report", **values).pack_frames == 0


def test_length_in_any_unit():
    plan = list(islice(planner(), 200))
    samples = trained(plan)
    hours = sum(frames.seconds(CORPORA[c].train[r].n_samples) for c, r, _ in samples) / 3600
    records = sum(len(c.train) for c in CORPORA)
    for text, expected in {
        "200 steps": 200, "0 steps": 0, f"{len(samples)} clips": 200, f"{hours} audio_hours": 200,
        f"{len(samples) / records} epochs": 200,
    }.items():  # fmt: skip
        assert steps_of(text, "run.length", planner()) == pytest.approx(expected, rel=0.05), text
    text = Budget(400, 0, 2)
    with pytest.raises(UserError, match="in a mix without audio"):
        steps_of("3 audio_hours", "run.length", planner([corpus("text", [1.0] * 50, audio=False)], [100], text))
