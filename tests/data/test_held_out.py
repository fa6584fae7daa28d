"""Held-out samples stand once, and the clip that stands in for their own is fair: another answer, evenly used, in budget."""

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from midasheng import frames
from midasheng.data import held_out as held_out_room
from midasheng.data.audio import Skip
from midasheng.data.chat import Chat
from midasheng.data.held_out import ALIKE, KINDS, MOST_ANSWERS, NONE, OTHER, OWN, Asked, HeldOutSet
from midasheng.data.index import CorpusIndex, Record
from midasheng.data.manifest import Card, HeldOut, read_mix
from midasheng.data.plan import Budget, budget
from midasheng.data.storage import AT_ONCE, Place
from midasheng.sample import NO_TARGET, Pack, unit_hash
from tests.conftest import Tiny, flac, open_index, write_shard
from tests.data.test_loader import Room, same

MIXES = ("align", "pretrain", "sft", "text")
WIDE = Budget(10_000, 10_000, 1)


def held_out(tiny: Tiny, chat: Chat, mix: str = "pretrain", most: int = 1000, **cap: int) -> HeldOutSet:
    """The held-out set of a mix of the tiny corpus."""
    read = read_mix(mix, tiny.manifests)
    clips = "told" if mix == "text" else "heard"
    corpora = [open_index(card, tiny.shards, chat, clips=clips) for card in read.cards]
    shape = budget(
        corpora, read.percent, kind="report", clips_per_step=18, packs_per_step=3, pack_slots=0, pack_frames=0
    )
    return HeldOutSet(mix, corpora, chat, replace(shape, **cap), most)


def packs(asked: HeldOutSet, kind: str = OWN) -> list[Pack]:
    return [p for _, p in asked.packs(kind)]


def samples(asked: HeldOutSet, kind: str) -> dict[int, dict[str, object]]:
    """Number in `asked` -> what its segment of a pack holds."""
    found: dict[int, dict[str, object]] = {}
    for numbers, p in asked.packs(kind):
        clips, audio = list(p.clips), list(p.audio_L[: sum(p.clips)].split(p.clips))
        start = 0
        for place, (number, slots) in enumerate(zip(numbers, p.segments, strict=False)):
            inside = slice(start, start + slots)
            heard = bool(p.is_audio_T[inside].any())
            assert number not in found
            found[number] = {
                "key": p.keys[place], "corpus": p.corpora[place], "ids": p.ids_T[inside].tolist(),
                "labels": p.labels_T[inside].tolist(), "audio slots": int(p.is_audio_T[inside].sum()),
                "clip": clips.pop(0) if heard else 0, "wave": audio.pop(0).sum().item() if heard else None,
            }  # fmt: skip
            start += slots
        assert not clips
    return found


# -- corpora that are made up -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MadeUp:
    """One record to be written: silence of so many samples, and what is asked about it."""

    key: str
    n_samples: int
    pairs: list[tuple[str, str]]
    alike: str = ""


@lru_cache
def silence(n_samples: int) -> bytes:
    return flac(np.zeros(n_samples, dtype=np.float32))


Write = Callable[..., CorpusIndex]
HELD, TRAIN = sorted(("one", "other"), key=lambda s: unit_hash("held_out:" + s))  # the lower hash is held out


@pytest.fixture
def corpus(chat: Chat, tmp_path: Path) -> Write:
    """Writes a shard of records to hold out and to train on, and opens its index."""

    def write(held: Sequence[MadeUp], train: Sequence[MadeUp] = (), name: str = "c") -> CorpusIndex:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        members = [
            (r.key, silence(r.n_samples), {
                "set": to, "alike": r.alike, "pairs": [{"question": q, "answer": a} for q, a in r.pairs],
            })
            for to, records in ((HELD, held), (TRAIN, train)) for r in records
        ]  # fmt: skip
        write_shard(folder / "shards" / "c.tar", members)
        split = HeldOut("set", unit_hash("held_out:" + TRAIN), 10_000)
        card = Card(name, "qa", "c.tar", "none", alike="alike", pairs="pairs", held_out=split)
        made = open_index(card, folder / "shards", chat)
        assert (len(made.held_out), len(made)) == (len(held), len(train))
        return made

    return write


def a_language_quiz(records: int = 40, seed: int = 0) -> list[MadeUp]:
    """Records with a question of three answers, one of two, one of many, and captions of which some are shared."""
    rng = random.Random(seed)
    made = []
    for n in range(records):
        language, loud = rng.choice("EEESF"), rng.choice(["yes", "no"])
        captions = [f"A {language} voice.", f"Somebody says {rng.randrange(8)}.", f"Clip {n}."]
        pairs = [("Which?", language), ("Loud?", loud), ("Write.", f"{n}"), *(("Caption?", c) for c in captions)]
        if n % 7 == 0:  # not every record is asked everything
            pairs = pairs[3:]
        rng.shuffle(pairs)
        made.append(MadeUp(f"k{n}", rng.randrange(4_000, 60_000), pairs, language + loud))
    return made


def answers(record: Record, question: str) -> set[str]:
    return {v.turns[1].text for v in record.variants if v.turns[0].text == question}


# -- which samples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", MIXES)
def test_held_out_records_stand_once_and_are_never_trained_on(tiny_data, chat, mix):
    asked, room = held_out(tiny_data, chat, mix), Room(tiny_data, chat, mix)
    pairs = [pair for p in packs(asked) for pair in zip(p.corpora, p.keys, strict=True)]
    assert len(pairs) > 4
    assert sorted(pairs) == sorted((c.card.name, r.key) for c in asked.corpora for r in c.held_out)
    validated = {key for _, key in pairs}
    trained = {key for batch in room.batches(20) for p in batch.packs for key in p.keys}
    assert not validated & trained
    assert all(sum(p.targets) > 0 for p in packs(asked))


def test_held_out_up_to_a_number_per_corpus(tiny_data, chat):
    found = packs(held_out(tiny_data, chat, most=2))
    assert [c for p in found for c in p.corpora] == ["tiny_asr"] * 2 + ["tiny_caption"] * 2
    assert packs(held_out(tiny_data, chat, most=0)) == []


@pytest.mark.parametrize("cap", ["pack_slots", "pack_frames"])
def test_held_out_record_beyond_the_budget_makes_no_empty_pack(tiny_data, chat, cap):
    records = [(n, r) for c in held_out(tiny_data, chat).corpora for n, r in enumerate(c.held_out)]
    costs = [r.frames if cap == "pack_frames" else r.slots(n % len(r.variants)) for n, r in records]
    second = sorted(set(costs))[-2]
    found = packs(held_out(tiny_data, chat, **{cap: second}))
    assert sum(len(p.keys) for p in found) == sum(cost <= second for cost in costs)
    assert all(p.keys for p in found)


def test_held_out_variants_go_round(tiny_data, chat):
    found = packs(held_out(tiny_data, chat, "align"))
    said = "".join(chat.decode(p.labels_T[p.labels_T != NO_TARGET]) for p in found)
    assert all(form in said for form in ("A tone, number", "tone sounds", "Somebody plays"))


@pytest.mark.parametrize("mix", ["pretrain", "sft"])
def test_numbers_name_the_sample_of_each_segment(tiny_data, chat, mix):
    """Losses are filed under them: a shift by one would pair the losses of different samples."""
    asked = held_out(tiny_data, chat, mix)
    for kind in KINDS:
        for number, found in samples(asked, kind).items():
            a = asked.asked[number]
            assert (found["key"], found["corpus"]) == (a.record.key, asked.corpora[a.corpus].card.name)
            text = [label for label in found["labels"] if label != NO_TARGET]
            assert chat.decode(text) == a.references[0]  # whatever is heard, the reference is the sample's own


# -- which clip stands in ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_other_clip_is_of_a_record_whose_answers_to_the_question_all_differ(chat, corpus, seed):
    index = corpus(a_language_quiz(seed=seed))
    records, asked = index.held_out, HeldOutSet("m", [index], chat, WIDE, 1000).asked
    assert len(asked) == len(records)
    for a in asked:
        right = answers(a.record, a.question)
        assert a.references[0] in right
        good = [r for r in records if answers(r, a.question) and not answers(r, a.question) & right]
        assert a.record not in good
        assert (a.other is None) == (not good)
        assert a.other is None or a.other in good
    assert sum(a.other is not None for a in asked) > 30


def test_an_answer_shared_in_another_form_of_the_caption_rules_a_clip_out(chat, corpus):
    """Two clips of one voice: the caption asked for differs, another one is equal, so it may be true of both."""
    one = MadeUp("one", 9_000, [("Caption?", "A dog."), ("Caption?", "Clip 1.")])
    two = MadeUp("two", 9_000, [("Caption?", "Clip 2."), ("Caption?", "A dog.")])
    alone = HeldOutSet("m", [corpus([one, two])], chat, WIDE, 9).asked
    assert [a.other for a in alone] == [None, None]
    three = MadeUp("three", 9_000, [("Caption?", "A cat.")])
    asked = HeldOutSet("m", [corpus([one, two, three])], chat, WIDE, 9).asked
    assert [a.other.key for a in asked[:2]] == ["three", "three"]


@pytest.mark.parametrize("seed", range(3))
def test_the_alike_clip_is_alike_in_its_field_and_the_nearest_in_length(chat, corpus, seed):
    index = corpus([replace(r, alike=r.alike[0]) for r in a_language_quiz(seed=seed)])
    records, asked = index.held_out, HeldOutSet("m", [index], chat, WIDE, 1000).asked
    for a in asked:
        right = answers(a.record, a.question)
        good = [r for r in records if answers(r, a.question) and not answers(r, a.question) & right]
        good = [r for r in good if r.alike == a.record.alike]
        assert (a.alike is None) == (not good)
        if a.alike:
            assert a.alike in good
            nearest = min(abs(r.n_samples - a.record.n_samples) for r in good)
            assert abs(a.alike.n_samples - a.record.n_samples) == nearest
    assert sum(a.alike is not None for a in asked) > 10
    assert any(a.other and not a.alike for a in asked)


def test_other_clips_are_used_evenly(chat, corpus):
    """One clip that stands in everywhere would make its voice the whole test."""
    records = [MadeUp(f"k{n}", 9_000, [("Which?", "A" if n % 4 else "B")]) for n in range(40)]
    asked = HeldOutSet("m", [corpus(records)], chat, WIDE, 1000).asked
    used = Counter(a.other.key for a in asked)
    assert [used[f"k{n}"] for n in range(0, 40, 4)] == [3] * 10  # the ten of B stand in for thirty of A
    assert sorted(used[r.key] for n, r in enumerate(records) if n % 4) == [0] * 20 + [1] * 10


def test_a_clip_stands_in_within_its_corpus_only(chat, corpus):
    first = [MadeUp(f"a{n}", 9_000, [("Which?", "A")]) for n in range(4)]
    second = [MadeUp(f"b{n}", 9_000, [("Which?", "B")]) for n in range(4)]
    asked = HeldOutSet("m", [corpus(first), corpus(second, name="d")], chat, WIDE, 1000).asked
    assert [a.other for a in asked] == [None] * 8


def test_a_clip_that_would_not_fit_with_the_question_does_not_stand_in(chat, corpus):
    short = MadeUp("short", 9_000, [("Which? " + "word " * 30, "A")])
    long = MadeUp("long", 90_000, [("Which? " + "word " * 30, "B")])
    fitting = MadeUp("fitting", 30_000, [("Which? " + "word " * 30, "B")])
    index = corpus([short, long, fitting])
    text = index.held_out[0].variants[0].slots
    for cap in ({"pack_slots": text + frames.audio_tokens(30_000)}, {"pack_frames": frames.frames(30_000)}):
        made = HeldOutSet("m", [index], chat, replace(WIDE, **cap), 9)
        assert [(a.record.key, a.other.key) for a in made.asked] == [("short", "fitting"), ("fitting", "short")]


def test_text_has_no_other_clip(tiny_data, chat):
    asked = held_out(tiny_data, chat, "text")
    assert not asked.hears
    assert all(a.other is a.alike is None for a in asked.asked)
    assert packs(asked, OTHER) == packs(asked, ALIKE) == []
    assert held_out(tiny_data, chat, "sft").hears


def test_the_choice_depends_on_the_data_alone(tiny_data, chat):
    """Every validation, run and world asks the same."""
    one, two = (held_out(tiny_data, chat, "pretrain") for _ in range(2))
    assert one.asked == two.asked
    assert [a for a in one.asked if a.corpus == 1] == [
        replace(a, corpus=1) for a in held_out(tiny_data, chat, "align", **vars(one.budget)).asked
    ]  # nor on the corpora beside it


# -- packs -------------------------------------------------------------------------------------------------------------


def test_the_same_sample_is_heard_with_each_kind_of_clip(tiny_data, chat):
    asked = held_out(tiny_data, chat, "sft")
    of = {kind: samples(asked, kind) for kind in KINDS}
    assert of[OWN].keys() == of[NONE].keys() == set(range(len(asked.asked)))
    assert of[OTHER].keys() == {n for n, a in enumerate(asked.asked) if a.other}
    assert of[ALIKE].keys() == {n for n, a in enumerate(asked.asked) if a.alike}
    assert len(of[ALIKE]) > 1
    for number, a in enumerate(asked.asked):
        clip_of = {OWN: a.record, OTHER: a.other, ALIKE: a.alike}
        whole = of[OWN][number]
        for kind, record in clip_of.items():
            if record is not None:
                found = of[kind][number]
                assert found["clip"] == record.n_samples
                assert found["audio slots"] == frames.audio_tokens(record.n_samples)
                assert kind == OWN or found["wave"] != whole["wave"]
                without = [i for i in found["ids"] if i != chat.audio]
                assert without == [i for i in whole["ids"] if i != chat.audio]


@pytest.mark.parametrize("mix", ["pretrain", "text"])
def test_without_a_clip_there_are_no_audio_slots(tiny_data, chat, mix):
    asked = held_out(tiny_data, chat, mix)
    for numbers, p in asked.packs(NONE):
        assert not p.is_audio_T.any()
        assert len(p.audio_L) == len(p.clips) == 0
        assert not (p.ids_T == chat.audio).any()
        if mix != "text":  # where they frame the words that stand for the clip
            assert not torch.isin(p.ids_T, torch.tensor([chat.audio_bos, chat.audio_eos])).any()
        assert sum(p.targets) == sum(asked.asked[n].record.variants[asked.asked[n].variant].targets for n in numbers)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_share_the_packs(tiny_data, chat, kind):
    asked = held_out(tiny_data, chat, pack_frames=80)
    whole = list(asked.packs(kind))
    assert len(whole) > 3
    for world in (2, 3, 50):
        ranks = [list(asked.packs(kind, rank, world)) for rank in range(world)]
        assert sum(len(r) for r in ranks) == len(whole)
        for number, (numbers, p) in enumerate(whole):
            theirs, other = ranks[number % world][number // world]
            assert theirs == numbers
            assert same(p, other)


def test_packs_have_the_shape_of_training_and_nothing_is_encoded_for_text_alone(tiny_data, chat):
    asked = held_out(tiny_data, chat, pack_frames=80)
    for kind in KINDS:
        shapes = {(len(p.ids_T), len(p.audio_L), sum(p.chunks)) for _, p in asked.packs(kind)}
        n_frames = 0 if kind == NONE else 80
        assert shapes == {(asked.budget.pack_slots, frames.waveform(n_frames) if n_frames else 0, n_frames)}


@pytest.mark.parametrize("cap", ["pack_slots", "pack_frames"])
def test_packs_keep_both_budgets_whatever_is_heard(tiny_data, chat, cap):
    """At many tight budgets, where a donor is longer or shorter than the sample's own clip."""
    free = held_out(tiny_data, chat, "sft", pack_slots=10_000, pack_frames=10_000)
    records = [r for c in free.corpora for r in c.held_out]
    longest = frames.audio_tokens(max(r.n_samples for r in records))
    if cap == "pack_slots":
        least = max(v.slots for r in records for v in r.variants) + longest
    else:
        least = max(r.frames for r in records)
    full = 0
    for more in range(0, 40, 3):
        asked = HeldOutSet("sft", free.corpora, chat, replace(free.budget, **{cap: least + more}), 1000)
        for kind in KINDS:
            found = list(asked.packs(kind))
            expected = sum(asked._clip_of(a, kind) is not None for a in asked.asked)
            assert sum(len(numbers) for numbers, _ in found) == expected
            for numbers, p in found:
                assert len(p.ids_T) == asked.budget.pack_slots
                assert sum(frames.frames(n) for n in p.clips) <= asked.budget.pack_frames
                full += len(numbers) > 1
    assert full > 50


def undecodable(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> None:
    """Clips whose number of samples is `bad` cannot be decoded."""
    decode = held_out_room.decode

    def broken(data: bytes, n_samples: int) -> np.ndarray:
        if bad(n_samples):
            raise Skip("undecodable")
        return decode(data, n_samples)

    monkeypatch.setattr(held_out_room, "decode", broken)


def test_undecodable_held_out_record_is_left_out(tiny_data, chat, monkeypatch):
    undecodable(monkeypatch, lambda n: True)
    asked = held_out(tiny_data, chat)
    assert packs(asked, OWN) == packs(asked, OTHER) == packs(asked, ALIKE) == []
    assert len(samples(asked, NONE)) == len(asked.asked)


@pytest.mark.parametrize("kind", [OWN, OTHER, ALIKE])
def test_an_undecodable_clip_is_left_out_and_shifts_no_other_sample(tiny_data, chat, monkeypatch, kind):
    asked = held_out(tiny_data, chat, "pretrain")
    whole = samples(asked, kind)
    donor = asked._clip_of(asked.asked[sorted(whole)[1]], kind)
    hit = {n for n in whole if asked._clip_of(asked.asked[n], kind).n_samples == donor.n_samples}
    assert 0 < len(hit) < len(whole)
    undecodable(monkeypatch, lambda n: n == donor.n_samples)
    assert samples(asked, kind) == {n: s for n, s in whole.items() if n not in hit}


# -- closed and open questions -----------------------------------------------------------------------------------------


def quiz(counts: dict[str, dict[str, int]], key: str, n_samples: int = 9_000) -> list[MadeUp]:
    """Records of one question each: question -> answer -> how many."""
    asked = [(q, a) for q, by in counts.items() for a, n in by.items() for _ in range(n)]
    return [MadeUp(f"{key}{n}", n_samples, [pair]) for n, pair in enumerate(asked)]


def test_closed_questions_are_those_with_few_answers_in_training(chat, corpus):
    train = {
        "Which?": {"A": 5, "B": 9, "C": 1}, "Always?": {"yes": 9}, "Write.": {f"text {n}": 1 for n in range(9)},
        "Twelve?": {f"{n}": 2 for n in range(MOST_ANSWERS)}, "Thirteen?": {f"{n}": 2 for n in range(MOST_ANSWERS + 1)},
        "Rare?": {"yes": 1, "no": 1},
    }  # fmt: skip
    held = {q: {"A": 3} if q == "Which?" else dict.fromkeys(list(by)[:2], 1) for q, by in train.items()}
    held["Never trained?"] = {"yes": 2, "no": 2}
    made = HeldOutSet("m", [corpus(quiz(held, "h"), quiz(train, "t"))], chat, WIDE, 0)
    closed = made.closed(100)
    assert Counter(c.asked.question for c in closed) == {"Which?": 3, "Twelve?": 2}
    assert {c.choices for c in closed if c.asked.question == "Which?"} == {("A", "B", "C")}  # those of training
    assert {c.asked.references[0] for c in closed if c.asked.question == "Which?"} == {"A"}
    assert all(c.asked.record in made.corpora[0].held_out for c in closed)


def test_closed_questions_of_a_mix_that_is_all_held_out(chat, corpus):
    made = HeldOutSet("m", [corpus(quiz({"Which?": {"A": 5, "B": 9}}, "h"))], chat, WIDE, 0)
    closed = made.closed(100)
    assert len(closed) == 14
    assert {c.choices for c in closed} == {("A", "B")}


def test_closed_questions_are_found_in_the_text_alone_and_in_no_more_of_it_than_that_takes(chat, corpus, monkeypatch):
    """Of a corpus that asks all for a text of their own a few records; else all, and never what they sound like."""
    texts = [MadeUp(f"w{n}", 9_000, [("Write.", f"{n}")]) for n in range(200)]
    names = quiz({"Which?": {"A": 50, "B": 50}}, "n")
    made = [HeldOutSet("m", [corpus(part[:3], part[3:])], chat, WIDE, 0) for part in (texts, names)]
    read, of_place = [], Place.read
    monkeypatch.setattr(Place, "read", lambda self: read.append(of_place(self)) or read[-1])
    assert made[0].closed(9) == []
    assert MOST_ANSWERS < len(read) <= MOST_ANSWERS + 1 + AT_ONCE
    assert {c.choices for c in made[1].closed(9)} == {("A", "B")}
    assert len(read) <= MOST_ANSWERS + 1 + AT_ONCE + len(names) - 3
    assert all("pairs" in json.loads(text) for text in read)


def test_closed_questions_up_to_a_number_for_each_corpus_and_set_of_answers_one_for_a_clip(chat, corpus):
    pairs = [("Loud?", "yes"), ("Long?", "no"), ("Which?", "A")]
    other = [("Loud?", "no"), ("Long?", "yes"), ("Which?", "B")]
    train = [MadeUp(f"t{n}", 9_000, other if n % 2 else pairs) for n in range(20)]
    held = [MadeUp(f"h{n}", 9_000, other if n % 2 else pairs) for n in range(10)]
    two = [corpus(held, train), corpus(held[:3], train, "d")]
    closed = HeldOutSet("m", two, chat, WIDE, 0).closed(4)
    of = Counter((c.asked.corpus, c.choices) for c in closed)
    assert of == {(0, ("no", "yes")): 4, (0, ("A", "B")): 4, (1, ("no", "yes")): 3, (1, ("A", "B")): 3}
    clips = Counter((c.asked.corpus, c.choices, c.asked.record.key) for c in closed)
    assert set(clips.values()) == {1}
    every = HeldOutSet("m", two, chat, WIDE, 0).closed(100)
    assert len(every) == 2 * (10 + 3)
    assert {c.asked.question for c in every} == {"Loud?", "Long?", "Which?"}  # each form comes to its turn
    assert {c.asked.record.key for c in closed if c.asked.corpus == 0} != {
        "h0",
        "h1",
        "h2",
        "h3",
    }  # nor the first clips
    assert every == HeldOutSet("m", two, chat, WIDE, 0).closed(100)


def test_closed_questions_that_fit_no_pack_are_left_out(chat, corpus):
    train = quiz({"Which?": {"A": 5, "B": 9}}, "t")
    held = quiz({"Which?": {"A": 2}}, "long", 90_000) + quiz({"Which?": {"A": 2}}, "short", 9_000)
    made = HeldOutSet("m", [corpus(held, train)], chat, replace(WIDE, pack_frames=frames.frames(9_000)), 0)
    assert sorted(c.asked.record.key for c in made.closed(100)) == ["short0", "short1"]


def test_open_questions_are_of_each_corpus_in_turn(chat, corpus):
    one, two = (quiz({"Write.": {f"{n}": 1 for n in range(9)}}, key) for key in "ab")
    made = HeldOutSet("m", [corpus(one), corpus(two[:2], name="d")], chat, WIDE, 100)
    assert [a.record.key for a in made.open(6)] == ["a0", "b0", "a1", "b1", "a2", "a3"]
    assert len(made.open(100)) == 11
    assert made.open(0) == []


# -- prompts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [OWN, OTHER, NONE])
def test_a_prompt_is_exactly_what_stood_before_the_answer_in_training(tiny_data, chat, kind):
    """No reference in it, and the answer opened as in training: slot for slot what stands before the first target."""
    asked = held_out(tiny_data, chat, "sft")
    questions = [a for a in asked.asked if a.other][::-1]
    seen = []
    for numbers, prompts in asked.prompts(questions, kind):
        assert sum(prompts.segments) == len(prompts.ids_T)  # no tail
        clips = list(prompts.audio_L.split(prompts.clips))
        rows = zip(*(t.split(prompts.segments) for t in (prompts.ids_T, prompts.is_audio_T)), strict=True)
        for number, (ids_T, is_audio_T) in zip(numbers, rows, strict=True):
            sample = asked.sample(questions[number], kind)
            before = int(np.flatnonzero(sample.labels != NO_TARGET)[0]) + 1
            assert ids_T.tolist() == sample.ids[:before].tolist()
            assert is_audio_T.tolist() == sample.is_audio[:before].tolist()
            assert all(torch.equal(clips.pop(0), torch.from_numpy(s)) for s in sample.clips)
            assert questions[number].references[0] not in chat.decode(ids_T)
            assert is_audio_T.any() == (kind != NONE)
            seen.append(number)
        assert not clips
    assert seen == list(range(len(questions)))


def test_a_prompt_whose_clip_cannot_be_decoded_is_left_out(tiny_data, chat, monkeypatch):
    asked = held_out(tiny_data, chat, "sft")
    first = asked.asked[0].record.n_samples
    undecodable(monkeypatch, lambda n: n == first)
    left = [n for numbers, _ in asked.prompts(asked.asked, OWN) for n in numbers]
    assert left == [n for n, a in enumerate(asked.asked) if a.record.n_samples != first]


def test_question_and_answer_are_of_the_variant(corpus):
    (record,) = corpus([MadeUp("k", 9_000, [("Which?", "A"), ("Loud?", "no")])]).held_out
    assert [(Asked(0, record, v, None, None).question, Asked(0, record, v, None, None).references[0]) for v in (0, 1)] == [
        ("Which?", "A"), ("Loud?", "no"),
    ]  # fmt: skip
