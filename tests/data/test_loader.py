"""The loader delivers what was planned, bit for bit, whatever the number of workers, ranks and interruptions; what cannot
be read leaves a hole, a line and a 0 in the ledger."""

import json
import os
import shutil
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from midasheng.data import loader as room
from midasheng.data.audio import decode
from midasheng.data.index import CorpusIndex
from midasheng.data.ledger import Skipped
from midasheng.data.loader import StepBatch, ahead, conversation, first_clips, steps_ahead, train_loader
from midasheng.data.manifest import read_mix
from midasheng.data.plan import ALL, Budget, Planned, Planner, budget
from midasheng.data.storage import Place
from midasheng.sample import NO_TARGET, Pack
from tests.conftest import LANGUAGES, Tiny, open_index

MIXES = ("align", "pretrain", "sft", "text")


class Room:
    """Corpora of a mix with their budget; makes planners and loaders."""

    def __init__(self, tiny: Tiny, chat, mix: str = "pretrain", answers: str = "one") -> None:
        read = read_mix(mix, tiny.manifests)
        self.chat, self.percent = chat, read.percent
        clips = "told" if mix == "text" else "heard"
        self.corpora: list[CorpusIndex] = [
            open_index(replace(card, answers=answers), tiny.shards, chat, clips=clips) for card in read.cards
        ]
        self.budget: Budget = budget(
            self.corpora, self.percent, kind="report", clips_per_step=18, packs_per_step=3, pack_slots=0, pack_frames=0
        )

    def planner(self, state=None) -> Planner:
        made = Planner(self.corpora, self.percent, self.budget, 0)
        if state:
            made.restore(json.loads(json.dumps(state)))
        return made

    def loader(self, planner: Planner, steps: int = 6, *, rank: int = 0, world: int = 1, workers: int = 0, **more):
        return train_loader(planner, self.corpora, self.chat, steps, rank=rank, world=world, workers=workers, **more)

    def batches(self, steps: int = 6, *, state=None, **more) -> list[StepBatch]:
        return list(self.loader(self.planner(state), steps, **more))

    def key(self, planned: Planned) -> str:
        return self.corpora[planned.corpus].key(planned.record)


@pytest.fixture(scope="module")
def data(tiny_data, chat) -> Room:
    return Room(tiny_data, chat)


def same(one: Pack, other: Pack) -> bool:
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(Pack)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def same_batches(one: list[StepBatch], other: list[StepBatch]) -> bool:
    def rest(batch: StepBatch):
        return batch.step, batch.numbers, batch.skipped, batch.state_after, batch.trained.tolist(), batch.checksum

    return len(one) == len(other) and all(
        rest(a) == rest(b) and all(same(p, q) for p, q in zip(a.packs, b.packs, strict=True))
        for a, b in zip(one, other, strict=True)
    )


def together(whole: list[StepBatch], ranks: list[list[StepBatch]]) -> bool:
    """Are the parts of all ranks the steps of one?"""
    for number, batch in enumerate(whole):
        parts = [rank[number] for rank in ranks]
        packs = {n: p for part in parts for n, p in zip(part.numbers, part.packs, strict=True)}
        padding = [p for n, p in packs.items() if n not in batch.numbers]
        rows = sorted(row for part in parts for row in part.trained.tolist())
        good = (
            all(same(p, packs[n]) for n, p in zip(batch.numbers, batch.packs, strict=True))
            and not any(p.keys or sum(p.targets) for p in padding)
            and rows == sorted(batch.trained.tolist())
            and all((part.step, part.state_after) == (batch.step, batch.state_after) for part in parts)
        )
        if not good:
            return False
    return all(len(rank) == len(whole) for rank in ranks)


def checksum(names: list[str]) -> int:
    return zlib.crc32("".join(names).encode())


# -- what was planned ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", MIXES)
def test_a_sample_has_the_slots_and_targets_that_were_planned(tiny_data, chat, mix):
    for corpus in Room(tiny_data, chat, mix).corpora:
        train = [corpus.read(n) for n in range(len(corpus))]
        for record, audio in (*train, *((r, r.audio.read() if r.audio else b"") for r in corpus.held_out)):
            clips = [decode(audio, record.n_samples)] if record.audio else []
            for number, variant in enumerate(record.variants):
                sample = conversation(corpus.card, record.key, variant.turns, clips, chat)
                assert len(sample.ids) == len(sample.labels) == len(sample.is_audio) == record.slots(number)
                assert (sample.labels != NO_TARGET).sum() == variant.targets
                assert [len(c) for c in sample.clips] == ([record.n_samples] if mix != "text" else [])


@pytest.mark.parametrize("mix", MIXES)
def test_batches_are_the_plan(tiny_data, chat, mix):
    data = Room(tiny_data, chat, mix)
    for step, batch in zip(data.planner(), data.batches(), strict=False):
        assert (batch.step, batch.state_after, batch.numbers) == (step.number, step.state_after, (0, 1, 2))
        for planned, pack in zip(step.packs, batch.packs, strict=True):
            assert pack.keys == tuple(data.key(p) for p in planned)
            assert pack.corpora == tuple(data.corpora[p.corpus].card.name for p in planned)
            assert pack.segments[: len(planned)] == tuple(p.slots for p in planned)
            assert sum(pack.segments) == len(pack.ids_T) == data.budget.pack_slots
            assert pack.targets == tuple(p.targets for p in planned)
            assert pack.languages == tuple(LANGUAGES[int(k.removeprefix("tone")) % 3][:2].lower() for k in pack.keys)
        samples = [p for planned in step.packs for p in planned]
        assert batch.trained.tolist() == [[p.corpus, p.epoch, p.position, 1] for p in samples]
        assert batch.checksum == checksum([f"{data.corpora[p.corpus].card.name}/{data.key(p)}" for p in samples])


def test_all_answers_of_a_record_stand_together_in_order_each_with_its_clip(tiny_data, chat):
    """Card.answers: all. Ten questions of a clip cost one visit, and none of them is lost at the end of a pack."""
    data = Room(tiny_data, chat, "sft", "all")
    records = {r.key: r for r, _ in (data.corpora[0].read(n) for n in range(len(data.corpora[0])))}
    waves = {k: torch.from_numpy(decode(r.audio.read(), r.n_samples)) for k, r in records.items()}
    seen = 0
    for step, batch in zip(data.planner(), data.batches(), strict=False):
        for planned, pack in zip(step.packs, batch.packs, strict=True):
            expected = [(data.key(p), v) for p in planned for v in range(len(records[data.key(p)].variants))]
            assert all(p.variant == ALL for p in planned)
            assert pack.keys == tuple(key for key, _ in expected)
            parts = zip(
                *(t.split(pack.segments) for t in (pack.ids_T, pack.labels_T, pack.position_T)),
                pack.audio_L[: sum(pack.clips)].split(pack.clips), strict=False,  # the tail has no clip
            )  # fmt: skip
            for (key, variant), (ids_T, labels_T, position_T, audio_L) in zip(expected, parts, strict=True):
                record = records[key]
                turns = record.variants[variant].turns
                alone = conversation(data.corpora[0].card, key, turns, [waves[key].numpy()], chat)
                assert ids_T.tolist() == alone.ids.tolist()
                assert labels_T.tolist() == alone.labels.tolist()
                assert position_T.tolist() == list(range(record.slots(variant)))
                assert torch.equal(audio_L, waves[key])
                seen += variant > 0
            for p in planned:
                many = records[data.key(p)]
                assert p.slots == sum(many.slots(v) for v in range(len(many.variants)))
                assert p.frames == len(many.variants) * many.frames
        assert len(batch.trained) == sum(len(planned) for planned in step.packs)  # a record is one row of the ledger
    assert seen > 50


# -- workers, ranks, interruptions ---------------------------------------------------------------------------------------


def test_workers_change_nothing(data):
    assert same_batches(data.batches(workers=0), data.batches(workers=2))


def test_ranks_share_the_packs_of_a_step(data):
    whole = data.batches()
    for world in (2, 5):
        ranks = [data.batches(rank=rank, world=world) for rank in range(world)]
        assert together(whole, ranks)
        assert {len(b.packs) for rank in ranks for b in rank} == {-(-3 // world)}  # as many backwards on every rank


@pytest.mark.parametrize("workers", [0, 1, 3, 8])
def test_every_world_with_every_number_of_workers_brings_the_same_steps(data, workers):
    whole = data.batches(4)
    for world in (1, 2, 3):
        assert together(whole, [data.batches(4, rank=r, world=world, workers=workers) for r in range(world)])


@pytest.mark.parametrize("prefetch", [1, 5])
def test_how_far_workers_load_ahead_changes_nothing(data, prefetch):
    assert same_batches(data.batches(), data.batches(workers=2, prefetch=prefetch))


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_goes_on_at_the_step_of_the_planner(data, workers):
    whole = data.batches(6)
    assert [b.step for b in whole] == list(range(6))
    again = data.batches(6, state=whole[2].state_after, workers=workers)
    assert same_batches(again, whole[3:])
    assert data.batches(6, state=whole[5].state_after) == []


def test_a_resume_behind_any_step_goes_on_exactly_in_another_world(data):
    """Beyond an epoch's end, and with a mix that was changed before the state was taken."""
    planner = data.planner()
    planner.change(4, (10.0, 90.0))
    whole = list(data.loader(planner, 12))
    assert whole[-1].state_after["cursors"][0][0] > 0
    for done, (world, workers) in zip(range(1, 12), [(1, 2), (2, 0), (3, 1), (2, 3)] * 3, strict=False):
        state = whole[done - 1].state_after
        ranks = [data.batches(12, state=state, rank=r, world=world, workers=workers) for r in range(world)]
        assert together(whole[done:], ranks)


# -- planned ahead -------------------------------------------------------------------------------------------------------


def counted(drawn: list[int], until: int = 100_000) -> Iterator[int]:
    for number in range(until):
        drawn.append(number)
        yield number
    raise ZeroDivisionError(f"at {until}")


def settled(drawn: list[int]) -> int:
    """How many were drawn, once the thread has stopped drawing."""
    before = -1
    while before != len(drawn):
        before = len(drawn)
        time.sleep(0.1)
    return before


def planning() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "plan"]


def test_ahead_brings_every_item_in_order():
    assert list(ahead(iter(range(100)), 3)) == list(range(100))
    assert list(ahead(iter(()), 1)) == []
    assert planning() == []


@pytest.mark.parametrize("depth", [1, 4])
def test_ahead_draws_so_far_and_no_further(depth):
    """A thread without an end would plan the whole run into memory. One item more is in its hand."""
    drawn: list[int] = []
    items = ahead(counted(drawn), depth)
    for taken in range(1, 6):
        assert next(items) == taken - 1
        assert taken < settled(drawn) <= taken + depth + 1
    items.close()


def test_an_error_in_the_thread_reaches_whoever_waits_after_the_items_before_it():
    items, found = ahead(counted([], until=3), 2), []
    with pytest.raises(ZeroDivisionError, match="at 3"):
        found.extend(items)
    assert found == [0, 1, 2]
    assert planning() == []


def test_the_thread_ends_with_a_consumer_that_stops_early():
    drawn: list[int] = []
    items = ahead(counted(drawn), 2)
    next(items)
    assert len(planning()) == 1
    items.close()
    assert planning() == []
    before = len(drawn)
    assert settled(drawn) == before


@pytest.mark.parametrize("workers", [0, 2])
def test_planning_happens_outside_the_training_thread(data, workers):
    """A plan that takes long now and then must not hold up a step."""
    threads = []

    class Watched(Planner):
        def __next__(self):
            threads.append(threading.current_thread())
            return super().__next__()

    watched = Watched(data.corpora, data.percent, data.budget, 0)
    assert same_batches(list(data.loader(watched, workers=workers)), data.batches())
    assert len(threads) == 6
    assert threading.main_thread() not in threads


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mistake_in_the_plan_reaches_the_training_thread(data, workers):
    class Broken(Planner):
        def __next__(self):
            step = super().__next__()
            if step.number == 2:
                raise AssertionError("a mistake of the plan")
            return step

    batches = iter(data.loader(Broken(data.corpora, data.percent, data.budget, 0), workers=workers, prefetch=1))
    found = []
    with pytest.raises(AssertionError, match="a mistake of the plan"):
        found.extend(batch.step for batch in batches)
    assert found == ([] if workers else [0, 1])  # torch asks for the next share before it hands out a batch
    del batches
    assert planning() == []


@pytest.mark.parametrize(("workers", "prefetch"), [(0, 2), (2, 1), (3, 3)])
def test_no_rank_plans_further_ahead_than_is_reckoned_with(data, workers, prefetch):
    """A change of the mix is announced `steps_ahead` steps beforehand: a rank beyond it would take other samples."""
    drawn: list[int] = []

    class Counted(Planner):
        def __next__(self):
            step = super().__next__()
            drawn.append(step.number)
            return step

    batches = iter(
        data.loader(Counted(data.corpora, data.percent, data.budget, 0), 60, workers=workers, prefetch=prefetch)
    )
    for _ in range(3):
        batch = next(batches)
        settled(drawn)
        assert batch.step < drawn[-1] < batch.step + steps_ahead(workers, prefetch)
    del batches


# -- holes ---------------------------------------------------------------------------------------------------------------


def replace_shards(tiny: Tiny, folder: Path) -> Tiny:
    shutil.copytree(tiny.shards, folder / "shards")
    shutil.copytree(tiny.manifests.parent, folder / "manifests")
    return Tiny(folder)


@pytest.fixture
def copied(tiny_data, chat, tmp_path) -> tuple[Room, Room]:
    """The corpora, and the same in shards of its own that a test may damage."""
    return Room(tiny_data, chat), Room(replace_shards(tiny_data, tmp_path), chat)


def overwrite(place: Place, data: bytes) -> None:
    assert len(data) == place.size
    with Path(place.path).open("r+b") as file:
        file.seek(place.offset)
        file.write(data)


def spoil_one(data: Room) -> str:
    """Noise instead of the audio of a record; returns its key."""
    first = next(data.planner()).packs[0][1]
    record, audio = data.corpora[first.corpus].read(first.record)
    overwrite(record.audio, np.random.default_rng(0).bytes(len(audio)))
    return record.key


@pytest.fixture
def damaged(copied) -> tuple[Room, Room, str]:
    """The corpora, the same with one record's bytes gone bad after indexing, and that record's key."""
    whole, copy = copied
    return whole, copy, spoil_one(copy)


def same_but_for(whole: list[StepBatch], found: list[StepBatch], bad: dict[str, str]) -> int:
    """Checks that of `whole` exactly the keys of `bad` are missing in `found`, with their reasons; returns how many."""
    holes = 0
    for good, after in zip(whole, found, strict=True):
        lines, names, rows = [], [], []
        for before, pack in zip(good.packs, after.packs, strict=True):
            slots = np.split(np.arange(sum(before.segments)), np.cumsum(before.segments)[:-1])
            clips = np.split(np.arange(sum(before.clips)), np.cumsum(before.clips)[:-1])
            kept = [n for n, k in enumerate(before.keys) if k not in bad]
            pairs = list(zip(before.corpora, before.keys, strict=True))
            lines += [Skipped(c, k, bad[k]) for c, k in pairs if k in bad]
            names += [f"{c}/{k}" for c, k in pairs if k not in bad]
            rows += [int(k not in bad) for k in before.keys]
            assert pack.keys == tuple(before.keys[n] for n in kept)
            inside = np.concatenate([np.zeros(0, int), *(slots[n] for n in kept)])
            for name in ("ids_T", "labels_T", "position_T", "is_audio_T"):
                assert torch.equal(getattr(pack, name)[: len(inside)], getattr(before, name)[inside])
            heard = np.concatenate([np.zeros(0, int), *(clips[n] for n in kept)])
            assert torch.equal(pack.audio_L[: len(heard)], before.audio_L[heard])
            assert not pack.audio_L[len(heard) :].any()  # what was decoded there, and was a hole in the end
            assert len(pack.audio_L) == len(before.audio_L)
            assert sum(pack.chunks) == sum(before.chunks)
            assert len(pack.ids_T) == len(before.ids_T)
            assert sum(pack.targets) == int((pack.labels_T != NO_TARGET).sum())
            assert len(kept) == len(before.keys) or sum(pack.targets) < sum(before.targets)
        assert list(after.skipped) == lines
        assert after.trained.tolist() == [
            [*row[:3], good] for row, good in zip(good.trained.tolist(), rows, strict=True)
        ]
        assert after.checksum == checksum(names)
        assert after.state_after == good.state_after  # the plan does not depend on what can be read
        holes += len(lines)
    return holes


@pytest.mark.parametrize("workers", [0, 2])
def test_undecodable_record_leaves_a_hole_and_a_line(damaged, workers):
    whole, copy, key = damaged
    assert same_but_for(whole.batches(2), copy.batches(2, workers=workers), {key: "undecodable"})


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_goes_away_under_the_run_leaves_holes(copied, workers):
    whole, copy = copied
    gone = Path(copy.corpora[0].rows[1].shard.path)
    keys = {c.key(n) for c in copy.corpora for n in range(len(c)) if c.place(n).path == str(gone)}
    gone.unlink()
    found = same_but_for(whole.batches(3), copy.batches(3, workers=workers), dict.fromkeys(keys, "shard gone"))
    assert 10 < found < sum(len(b.trained) for b in whole.batches(3))


def test_a_shard_that_is_cut_under_the_run_leaves_holes_behind_the_cut(copied):
    whole, copy = copied
    shard = copy.corpora[0].rows[0].shard
    cut = shard.size // 2
    places = {c.key(n): c.place(n) for c in copy.corpora for n in range(len(c))}
    bad = {k for k, p in places.items() if p.path == shard.path and p.offset + p.size > cut}
    os.truncate(shard.path, cut)
    assert same_but_for(whole.batches(3), copy.batches(3), dict.fromkeys(bad, "unreachable")) > 3
    assert bad < {k for k, p in places.items() if p.path == shard.path}


def rewritten(data: Room, planned: Planned, change) -> str:
    """Puts other JSON of the same size in the place of a planned record's; returns its key."""
    corpus = data.corpora[planned.corpus]
    place, record = corpus.place(planned.record), corpus.read(planned.record)[0]
    bytes_ = place.read()
    start = bytes_.index(b'{"source"')
    text = bytes_[start : bytes_.index(b"}]}") + 3]
    content = json.dumps(change(json.loads(text))).encode()
    assert len(content) <= len(text)
    overwrite(Place(place.path, place.offset + start, len(text)), content.ljust(len(text)))
    return record.key


def longer(content: dict[str, object]) -> dict[str, object]:
    """Other words, so that every conversation has another length."""
    words = "zq " * 4
    return content | {"captions": [words] * 3, "questions": [], "text": words}


def fewer(content: dict[str, object]) -> dict[str, object]:
    """A caption less: variant 2 is no longer there, and variant 1 may be another one."""
    return content | {"captions": content["captions"][1:]}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("change", [longer, fewer], ids=["other words", "a caption less"])
def test_a_record_exchanged_under_the_run_is_not_trained_on_as_another(copied, change, workers):
    """Same size, same audio: only the plan knows that it was another conversation."""
    whole, copy = copied
    chosen = next(p for p in next(copy.planner()).packs[1] if copy.corpora[p.corpus].card.name == "tiny_caption")
    key = rewritten(copy, chosen, change)
    heard_as_speech = {
        p.keys[n] for b in whole.batches(2) for p in b.packs for n, c in enumerate(p.corpora) if c == "tiny_asr"
    }
    found = [s for b in copy.batches(2, workers=workers) for s in b.skipped]
    assert Skipped("tiny_caption", key, "differs from index") in found
    assert {s.key for s in found} == {key}
    if key not in heard_as_speech:
        assert same_but_for(whole.batches(2), copy.batches(2), {key: "differs from index"})


def test_unreadable_json_leaves_a_hole(copied):
    whole, copy = copied
    planned = next(copy.planner()).packs[2][0]
    corpus = copy.corpora[planned.corpus]
    place = corpus.place(planned.record)
    overwrite(place, place.read().replace(b'{"source"', b'["source"'))
    assert same_but_for(whole.batches(2), copy.batches(2), {corpus.key(planned.record): "json unreadable"})


def test_json_that_lost_its_field_under_the_run_leaves_a_hole(copied):
    _, copy = copied
    planned = next(copy.planner()).packs[0][0]
    corpus = copy.corpora[planned.corpus]
    place = corpus.place(planned.record)
    overwrite(place, place.read().replace(b'"captions"', b'"Captions"').replace(b'"text"', b'"Text"'))
    found = [s for b in copy.batches(2) for s in b.skipped]
    assert {(s.key, s.reason) for s in found} == {(corpus.key(planned.record), "differs from index")}


@pytest.mark.parametrize("workers", [0, 1])
def test_programming_errors_are_not_swallowed(data, monkeypatch, workers):
    def broken(*_):
        raise TypeError("a mistake of ours")

    monkeypatch.setattr(room, "decode", broken)
    with pytest.raises(TypeError, match="a mistake of ours"):
        data.batches(1, workers=workers)


def test_skips_of_the_plan_are_reported_once(tiny_data, chat):
    """They are the same on every rank, so only the first writes them down."""
    data = Room(tiny_data, chat)
    data.budget = replace(data.budget, pack_frames=44)  # a few clips are longer
    planned = [
        Skipped(data.corpora[u.corpus].card.name, data.corpora[u.corpus].key(u.record), "fits no pack", (u.epoch, u.position))
        for step in islice(data.planner(), 3) for u in step.skipped
    ]  # fmt: skip
    assert len(planned) > 5
    ranks = [[s for b in data.batches(3, rank=rank, world=2) for s in b.skipped] for rank in (0, 1)]
    assert ranks == [planned, []]


def test_first_clips(damaged):
    whole, copy, key = damaged
    planned: dict[tuple[int, int], None] = {}
    for step in islice(whole.planner(), 6):
        planned |= {(s.corpus, s.record): None for pack in step.packs for s in pack}
    records = [whole.corpora[c].read(r)[0] for c, r in list(planned)[:12]]
    assert key in [r.key for r in records]
    waves = [decode(r.audio.read(), r.n_samples) for r in records]
    found = list(first_clips(whole.planner(), whole.corpora, 12))
    assert all(np.array_equal(a, b) for a, b in zip(found, waves, strict=True))
    without = [wave for r, wave in zip(records, waves, strict=True) if r.key != key]
    found = list(first_clips(copy.planner(), copy.corpora, 12))
    assert all(np.array_equal(a, b) for a, b in zip(found, without, strict=True))
    every = len(list(first_clips(whole.planner(), whole.corpora, 10_000)))
    assert 30 < every <= sum(len(c) for c in whole.corpora)
