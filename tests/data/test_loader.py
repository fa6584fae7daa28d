"""The loader delivers what was planned, bit for bit, whatever the number of workers, ranks and interruptions."""

import shutil
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from midasheng.data import loader as room
from midasheng.data.audio import decode
from midasheng.data.index import CorpusIndex, index_corpus
from midasheng.data.ledger import Skipped
from midasheng.data.loader import StepBatch, first_clips, load_sample, train_loader
from midasheng.data.manifest import read_mix
from midasheng.data.plan import Budget, Planner, budget
from midasheng.sample import NO_TARGET, Pack
from tests.conftest import Tiny

MIXES = ("align", "pretrain", "sft", "text")


class Room:
    """Corpora of a mix with their budget; makes planners and loaders."""

    def __init__(self, tiny: Tiny, chat, mix: str = "pretrain") -> None:
        read = read_mix(mix, tiny.manifests)
        self.chat, self.percent = chat, read.percent
        self.corpora: list[CorpusIndex] = [
            index_corpus(card, tiny.shards, chat, 30.0, "told" if mix == "text" else "heard") for card in read.cards
        ]
        self.budget: Budget = budget(
            self.corpora, self.percent, kind="report", clips_per_step=18, packs_per_step=3, pack_slots=0, pack_frames=0
        )

    def planner(self, state=None) -> Planner:
        made = Planner(self.corpora, self.percent, self.budget, 0)
        if state:
            made.restore(state)
        return made

    def batches(
        self, steps: int = 6, *, state=None, rank: int = 0, world: int = 1, workers: int = 0
    ) -> list[StepBatch]:
        planner = self.planner(state)
        return list(train_loader(planner, self.chat, self.budget, steps, rank=rank, world=world, workers=workers))


@pytest.fixture(scope="module")
def data(tiny_data, chat) -> Room:
    return Room(tiny_data, chat)


def same(one: Pack, other: Pack) -> bool:
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(Pack)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def same_batches(one: list[StepBatch], other: list[StepBatch]) -> bool:
    def rest(batch: StepBatch):
        return batch.step, batch.numbers, batch.skipped, batch.state_after

    return len(one) == len(other) and all(
        rest(a) == rest(b) and all(same(p, q) for p, q in zip(a.packs, b.packs, strict=True))
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("mix", MIXES)
def test_a_sample_has_the_slots_and_targets_that_were_planned(tiny_data, chat, mix):
    for corpus in Room(tiny_data, chat, mix).corpora:
        for record in (*corpus.train, *corpus.held_out):
            for number, variant in enumerate(record.variants):
                sample = load_sample(corpus.card, record, number, chat)
                assert len(sample.ids) == len(sample.labels) == len(sample.is_audio) == record.slots(number)
                assert (sample.labels != NO_TARGET).sum() == variant.targets
                assert [len(c) for c in sample.clips] == ([record.n_samples] if mix != "text" else [])


def test_batches_are_the_plan(data):
    for step, batch in zip(data.planner(), data.batches(), strict=False):
        assert (batch.step, batch.state_after, batch.numbers) == (step.number, step.state_after, (0, 1, 2))
        for planned, pack in zip(step.packs, batch.packs, strict=True):
            assert pack.keys == tuple(data.corpora[p.corpus].train[p.record].key for p in planned)
            assert pack.segments[: len(planned)] == tuple(p.slots for p in planned)
            assert sum(pack.segments) == len(pack.ids_T) == data.budget.pack_slots


def test_workers_change_nothing(data):
    assert same_batches(data.batches(workers=0), data.batches(workers=2))


def test_ranks_share_the_packs_of_a_step(data):
    whole = data.batches()
    for world in (2, 5):
        ranks = [data.batches(rank=rank, world=world) for rank in range(world)]
        for number, batch in enumerate(whole):
            packs = {n: p for share in ranks for n, p in zip(share[number].numbers, share[number].packs, strict=True)}
            assert all(same(pack, packs[n]) for n, pack in enumerate(batch.packs))
            assert all(pack.targets == 0 and not pack.keys for n, pack in packs.items() if n >= 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_goes_on_at_the_step_of_the_planner(data, workers):
    whole = data.batches(6)
    assert [b.step for b in whole] == list(range(6))
    again = data.batches(6, state=whole[2].state_after, workers=workers)
    assert same_batches(again, whole[3:])
    assert data.batches(6, state=whole[5].state_after) == []


@pytest.fixture
def damaged(tiny_data, chat, tmp_path) -> tuple[Room, Room, str]:
    """The corpora, the same with one record's bytes gone bad after indexing, and that record's key."""
    whole = Room(tiny_data, chat)
    copy = Room(replace_shards(tiny_data, tmp_path), chat)
    first = next(copy.planner()).packs[0][1]
    record = copy.corpora[first.corpus].train[first.record]
    with Path(record.audio.shard).open("r+b") as file:
        file.seek(record.audio.offset)
        file.write(np.random.default_rng(0).bytes(record.audio.size))
    return whole, copy, record.key


def replace_shards(tiny: Tiny, folder: Path) -> Tiny:
    shutil.copytree(tiny.shards, folder / "shards")
    shutil.copytree(tiny.manifests.parent, folder / "manifests")
    return Tiny(folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_undecodable_record_leaves_a_hole_and_a_line(damaged, workers):
    whole, copy, key = damaged
    holes = 0
    for good, bad in zip(whole.batches(2), copy.batches(2, workers=workers), strict=True):
        for before, after in zip(good.packs, bad.packs, strict=True):
            slots = np.split(np.arange(sum(before.segments)), np.cumsum(before.segments)[:-1])
            clips = np.split(np.arange(len(before.audio_L)), np.cumsum(before.clips)[:-1])
            kept = [n for n, k in enumerate(before.keys) if k != key]
            holes += len(before.keys) - len(kept)
            assert after.keys == tuple(before.keys[n] for n in kept)
            inside = np.concatenate([slots[n] for n in kept])
            for name in ("ids_T", "labels_T", "position_T", "is_audio_T"):
                assert torch.equal(getattr(after, name)[: len(inside)], getattr(before, name)[inside])
            assert torch.equal(after.audio_L, before.audio_L[np.concatenate([clips[n] for n in kept])])
            assert len(after.ids_T) == len(before.ids_T)
            assert after.targets == int((after.labels_T != NO_TARGET).sum())
            assert len(kept) == len(before.keys) or after.targets < before.targets
        missing = sum(p.keys.count(key) for p in good.packs)
        assert [(s.key, s.reason) for s in bad.skipped] == [(key, "undecodable")] * missing
    assert holes


@pytest.mark.parametrize("workers", [0, 1])
def test_programming_errors_are_not_swallowed(data, monkeypatch, workers):
    def broken(*_):
        raise TypeError("a mistake of ours")

    monkeypatch.setattr(room, "decode", broken)
    with pytest.raises(TypeError, match="a mistake of ours"):
        data.batches(1, workers=workers)


def test_skips_of_the_plan_are_reported_once(data, monkeypatch):
    """They are the same on every rank, so only the first writes them down."""
    planner = data.planner()
    step = replace(next(planner), skipped=((1, 0, "fits no pack"),))
    monkeypatch.setattr(Planner, "__next__", lambda _: step)
    line = Skipped("tiny_caption", data.corpora[1].train[0].key, "fits no pack")
    assert [data.batches(1, rank=rank, world=2)[0].skipped for rank in (0, 1)] == [(line,), ()]


def test_first_clips(damaged):
    whole, copy, key = damaged
    planned: dict[tuple[int, int], None] = {}
    for step in islice(whole.planner(), 6):
        planned |= {(s.corpus, s.record): None for pack in step.packs for s in pack}
    records = [whole.corpora[c].train[r] for c, r in list(planned)[:12]]
    assert key in [r.key for r in records]
    waves = [decode(r.audio.read(), r.n_samples) for r in records]
    assert all(np.array_equal(a, b) for a, b in zip(first_clips(whole.planner(), 12), waves, strict=True))
    without = [wave for r, wave in zip(records, waves, strict=True) if r.key != key]
    assert all(np.array_equal(a, b) for a, b in zip(first_clips(copy.planner(), 12), without, strict=True))
    every = len(list(first_clips(whole.planner(), 10_000)))
    assert 30 < every <= sum(len(c.train) for c in whole.corpora)
