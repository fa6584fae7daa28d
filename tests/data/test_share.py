"""Packs that share: what samples begin with in common is found, counted and read once, and nothing else changes."""

import json
import zlib
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from midasheng import config, frames
from midasheng.config import ConfigError, UserError
from midasheng.data import index as index_room
from midasheng.data import loader as loader_room
from midasheng.data import shard as shard_room
from midasheng.data.audio import decode
from midasheng.data.audit import RunLedger
from midasheng.data.chat import Encoded, lead, trunk
from midasheng.data.check import _wrong, check_data
from midasheng.data.held_out import HeldOutSet
from midasheng.data.index import CorpusIndex
from midasheng.data.ledger import Ledger
from midasheng.data.loader import conversation, train_loader
from midasheng.data.manifest import Card, HeldOut, conversations
from midasheng.data.plan import ALL, Budget, Planned, Planner, budget, check_fits, lead_of, mean_cost
from midasheng.data.room import Sources, _unfit, open_data, plan_data
from midasheng.sample import NO_TARGET, Sample, Turn, pack
from midasheng.train.order import Order, check_run_folder
from tests.conftest import CONFIGS, flac, order_for, record, tone
from tests.data.shards import opened, write
from tests.data.test_plan import Corpus, corpus, speech

ROOT = Path(__file__).parents[2]
USER = "<|im_start|>user\n"
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"
CAPTION = "Write a general audio caption"
HELD_OUT = HeldOut("source", 0.2, 16)
CARDS = {
    "one": Card("one", "asr", "*.tar", "none", prompts=["Transcribe."], answer="text", held_out=HELD_OUT),
    "some": Card("some", "caption", "*.tar", "none", prompts=[CAPTION], answer="captions", held_out=HELD_OUT),
    "every": Card(
        "every", "caption", "*.tar", "none", prompts=[CAPTION], answer="captions", answers="all", held_out=HELD_OUT
    ),
    "asked": Card("asked", "qa", "*.tar", "none", pairs="questions", answers="all", held_out=HELD_OUT),
    "text": Card(
        "text", "text", "*.tar", "none", audio=False, prompts=["Sing.", "Write."], answer="text", answers="all",
        held_out=HELD_OUT,
    ),
}  # fmt: skip


def arranged(kind: str, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The same conversation with a system turn, or with its clip behind the words: no card can say so yet."""
    if "text first" in kind:
        turns = tuple(t._replace(text_first=True) if t.clips else t for t in turns)
    return (Turn("system", "Be short."), *turns) if "system" in kind else turns


@pytest.fixture
def arrange(monkeypatch):
    """Arrange conversations everywhere; a function of the kind, and of the cards it is for."""

    def change(kind: str, only: str = "") -> None:
        def made(card, content, where, clips="heard"):
            found = conversations(card, content, where, clips)
            return [arranged(kind, turns) for turns in found] if only in ("", card.name) else found

        for room in (shard_room, index_room):
            monkeypatch.setattr(room, "conversations", made)

    return change


def shards(root: Path, count: int = 18) -> Path:
    """Records with one to three captions and questions, in two shards."""
    rng = np.random.default_rng(0)
    members = []
    for number in range(count):
        content = record(number)
        for name in ("captions", "questions"):
            content[name] = content[name][: 1 + number % 3]
        sound = flac(tone(float(rng.uniform(0.3, 2.0)), number))
        members.append([(f"r{number}.flac", sound), (f"r{number}.json", json.dumps(content).encode())])
    for place, half in enumerate((members[: count // 2], members[count // 2 :])):
        write(root / f"{place}.tar", [m for two in half for m in two])
    return root


def corpora_of(root: Path, chat, *names: str, clips: str = "heard") -> tuple[CorpusIndex, ...]:
    return tuple(opened(CARDS[name], root, chat, 30.0, clips) for name in names)


def shape_of(corpora, percent, share: bool = True) -> Budget:
    return budget(
        corpora, percent, kind="report", clips_per_step=18, packs_per_step=3, pack_slots=0, pack_frames=0, share=share
    )


def ids_of(chat, text: str) -> list[int]:
    return chat.tokenizer(text, add_special_tokens=False)["input_ids"]


def every_row(planner: Planner, number: int = 0) -> list[Planned]:
    count = len(planner.corpora[number])
    return [Planned(*row) for row in planner.rows(number, 0, np.arange(count)).tolist()]


# -- what samples begin with -------------------------------------------------------------------------------------------


def encoded(ids: list[int], audio: tuple[int, ...] = (), targets: tuple[int, ...] = (-1,)) -> Encoded:
    place = np.arange(len(ids))
    on_targets = np.isin(place, [t % len(ids) for t in targets])
    return Encoded(np.array(ids), np.where(on_targets, 7, NO_TARGET), np.isin(place, audio))


def test_what_conversations_have_in_common():
    a = [1, 2, 3, 9, 9, 4, 5]
    assert trunk([encoded(a, (3, 4)), encoded([*a[:6], 6], (3, 4))]) == 6
    assert trunk([encoded(a, (3, 4)), encoded([*a[:6], 6, 8], (3, 4)), encoded([*a[:5], 6, 8, 8], (3, 4))]) == 5
    # not into the first target of any of them, though the ids go on alike
    assert trunk([encoded(a, (1,), (5, 6)), encoded(a, (1,), (6,))]) == 5
    assert trunk([encoded(a, (1,), (6,)), encoded(a, (1,), (5, 6))]) == 5
    # audio, or a part of it, that stands behind
    assert trunk([encoded(a, (3, 4)), encoded([1, 2, 8, 9, 9, 4, 5], (3, 4))]) == 0
    assert trunk([encoded(a, (3, 4)), encoded([1, 2, 3, 9, 8, 4, 5], (3,))]) == 0
    # text that looks like an audio slot is none
    assert trunk([encoded(a), encoded(a, (3, 4))]) == 0
    assert trunk([encoded(a, (1,))]) == 0
    assert trunk([encoded(a), encoded([1, 2, 8, 5, 5])]) == 2


def test_the_lead_ends_before_audio_and_before_targets():
    a = [1, 2, 3, 9, 9, 4, 5]
    assert lead(encoded(a, (3, 4))).tolist() == [1, 2, 3]
    assert lead(encoded(a, (3, 4), (2, 6))).tolist() == [1, 2]
    assert lead(encoded(a, (), (5, 6))).tolist() == [1, 2, 3, 9, 9]
    assert lead(encoded(a, (0,))).tolist() == []


COMMON = {  # kind, card, clips -> what all conversations of a record have in common, without its audio slots
    ("", "one", "heard"): "",  # a single one
    ("", "every", "heard"): f"{USER}<|audio_bos|><|audio_eos|>{CAPTION}{ANSWER}",
    ("", "asked", "heard"): f"{USER}<|audio_bos|><|audio_eos|>",
    ("system", "asked", "heard"): f"<|im_start|>system\nBe short.<|im_end|>\n{USER}<|audio_bos|><|audio_eos|>",
    ("text first", "asked", "heard"): "",  # the clip stands behind the questions
    ("text first", "every", "heard"): f"{USER}{CAPTION}<|audio_bos|><|audio_eos|>{ANSWER}",
    ("", "text", "heard"): USER,
    ("", "every", "left_out"): f"{USER}{CAPTION}{ANSWER}",
    ("", "asked", "left_out"): USER,
}


@pytest.mark.parametrize("case", COMMON, ids=str)
def test_the_index_says_what_a_record_s_conversations_have_in_common(tmp_path, chat, arrange, case):
    kind, name, clips = case
    arrange(kind)
    (found,) = corpora_of(shards(tmp_path), chat, name, clips=clips)
    wanted = len(ids_of(chat, COMMON[case]))
    wanted -= COMMON[case].endswith(ANSWER)  # its last slot tells the first word
    seen = set()
    for number in range(len(found)):
        one = found.read(number)[0]
        seen.add(len(one.variants))
        assert one.common == (wanted if len(one.variants) > 1 else 0), one.key
    assert max(seen) == (1 if name == "one" else 2 if name == "text" else 3)
    assert [c for s in (0, 1) for c in found.columns(s).common.tolist()] == [
        found.read(n)[0].common for n in range(len(found))
    ]


SYSTEM = "<|im_start|>system\nBe short.<|im_end|>\n"
LEADS = {  # kind (and the only card it is for), cards, clips -> what all samples of the mix begin with
    ("", "", ("one", "every", "asked"), "heard"): f"{USER}<|audio_bos|>",
    ("", "", ("one", "text", "asked"), "heard"): USER,
    ("system", "", ("one", "every"), "heard"): f"{SYSTEM}{USER}<|audio_bos|>",
    ("system", "", ("text", "every"), "heard"): f"{SYSTEM}{USER}",
    ("system", "one", ("one", "every"), "heard"): "<|im_start|>",  # the leads of the two differ
    ("system", "every", ("one", "every"), "heard"): "<|im_start|>",
    ("text first", "", ("every",), "heard"): f"{USER}{CAPTION}<|audio_bos|>",
    ("", "", ("one", "every"), "left_out"): USER,
    ("", "", ("some",), "left_out"): f"{USER}{CAPTION}{ANSWER}",  # up to the slot that tells the first word
}


@pytest.mark.parametrize("case", LEADS, ids=str)
def test_the_lead_of_a_mix_is_what_all_its_samples_begin_with(tmp_path, chat, arrange, case):
    """Up to audio and targets, and no longer than in the corpus that has least."""
    kind, only, names, clips = case
    arrange(kind, only)
    found = corpora_of(shards(tmp_path), chat, *names, clips=clips)
    wanted = ids_of(chat, LEADS[case])
    assert list(lead_of(found)) == (wanted[:-1] if LEADS[case].endswith(ANSWER) else wanted)
    assert shape_of(found, [100 / len(names)] * len(names)).lead == lead_of(found)


def test_a_shard_without_a_usable_record_does_not_shorten_the_lead(tmp_path, chat):
    root = shards(tmp_path)
    write(root / "2.tar", [("x.json", b'{"source": "x"}')])
    assert list(lead_of(corpora_of(root, chat, "every"))) == ids_of(chat, f"{USER}<|audio_bos|>")


def test_a_record_that_cannot_be_used_does_not_shorten_the_lead(tmp_path, chat):
    root = shards(tmp_path)
    members = [("x.flac", flac(tone(0.5, 1))), *((f"{key}.json", json.dumps(record(1)).encode()) for key in "xy")]
    write(root / "2.tar", members)
    (found,) = corpora_of(root, chat, "every")
    assert found.rows[2].records == 2
    assert found.rows[2].skipped
    assert list(lead_of([found])) == found.rows[2].lead == ids_of(chat, f"{USER}<|audio_bos|>")


@pytest.mark.parametrize("odd", ["0.tar", "1.tar"])
def test_the_lead_of_a_corpus_is_that_of_all_its_shards(tmp_path, chat, monkeypatch, odd):
    def made(card, content, where, clips="heard"):
        return [arranged("system" if odd in where else "", t) for t in conversations(card, content, where, clips)]

    for room in (shard_room, index_room):
        monkeypatch.setattr(room, "conversations", made)
    corpora = corpora_of(shards(tmp_path), chat, "every")
    assert list(lead_of(corpora)) == ids_of(chat, "<|im_start|>")
    assert all(len(row.lead) > 1 for row in corpora[0].rows)
    for laid, batch in emitted(monkeypatch, corpora, Planner(corpora, [100], shape_of(corpora, [100]), 0), chat, 1):
        assert batch.skipped == ()
        assert all(check_agreement(row) for _, row in laid)


# -- what the loader emits, against what was planned -------------------------------------------------------------------


class Laid(NamedTuple):
    """What `pack` was asked to lay together."""

    samples: list[Sample]
    audio: np.ndarray
    lead: int


def emitted(monkeypatch, corpora, planner: Planner, chat, steps: int = 3, rank: int = 0, world: int = 1):
    """(what a pack was asked for, its rows of the ledger, holes) of each pack of one rank, step by step."""
    laid: list[Laid] = []

    def seen(samples, pack_slots, pad_id, audio_L=None, pack_frames=0, lead=0):
        laid.append(Laid(samples, audio_L, lead))
        return pack([], pack_slots, pad_id, audio_L, pack_frames)

    found = []
    with monkeypatch.context() as patched:
        patched.setattr(loader_room, "pack", seen)
        for batch in train_loader(planner, corpora, chat, steps, rank=rank, world=world, workers=0):
            found.append((list(zip(batch.numbers, laid, strict=True)), batch))
            laid.clear()
    return found


def computed(laid: Laid) -> int:
    """Slots of a pack by the words of the contract: the lead once, each trunk once, and what stands behind."""
    slots, previous = laid.lead, 0
    for after, sample in zip([*laid.samples[1:], None], laid.samples, strict=True):
        trunk = sample.common or (after.common if after else 0)
        if trunk and not sample.common:
            slots += trunk - laid.lead
        if sample.common:
            assert sample.common == previous, "one run, two trunks"
        slots += len(sample.ids) - (trunk or laid.lead)
        previous = trunk
    return slots


def check_agreement(laid: Laid) -> int:
    """What shares slots must agree in them; returns how many samples continue another one."""
    continuing, first = 0, None
    for s in laid.samples:
        assert s.ids[: laid.lead].tolist() == laid.samples[0].ids[: laid.lead].tolist()
        assert (s.labels[: laid.lead] == NO_TARGET).all()
        assert not s.is_audio[: laid.lead].any()
        assert len(s.ids) > laid.lead
        if s.common:
            continuing += 1
            assert s.key == first.key
            assert laid.lead < s.common < len(s.ids)
            assert s.clips == ()
            assert s.is_audio[: s.common].sum() == s.is_audio.sum()
            for other in (s, first):
                assert (other.ids[: s.common] == s.ids[: s.common]).all()
                assert (other.is_audio[: s.common] == s.is_audio[: s.common]).all()
                assert (other.labels[: s.common] == NO_TARGET).all()
        else:
            first = s
            assert len(s.clips) == int(s.is_audio.any())
    return continuing


MIXES = {  # names -> do any of their samples continue another one?
    ("one",): False, ("some",): False, ("every",): True, ("asked",): True, ("text",): False,
    ("one", "some", "every", "asked", "text"): True,
}  # fmt: skip
CASES = [
    *((names, "", True) for names in MIXES),
    *((names, "text first", True) for names in MIXES if len(names) == 1 and MIXES[names]),
    *((tuple(CARDS), kind, share) for kind in ("system", "system, text first") for share in (True, False)),
]


@pytest.mark.parametrize(("names", "kind", "share"), CASES, ids=str)
def test_a_pack_costs_what_was_planned(tmp_path, chat, arrange, monkeypatch, names, kind, share):
    """A lead counted twice, frames counted for each answer, a clip encoded for each: planned or done, and the other
    not. Every sample is the whole conversation, with its own clip or that of the one before it."""
    arrange(kind)
    corpora = corpora_of(shards(tmp_path), chat, *names)
    percent = [100 / len(names)] * len(names)
    shape = shape_of(corpora, percent, share)
    check_fits(Planner(corpora, percent, shape, 0))
    assert (shape.lead is not None) == share
    continuing = 0
    planner = Planner(corpora, percent, shape, 0)
    steps = emitted(monkeypatch, corpora, planner, chat)
    for (laid, batch), step in zip(steps, Planner(corpora, percent, shape, 0), strict=False):
        assert batch.skipped == ()
        for number, row in laid:
            planned = step.packs[number]
            assert row.lead == shape.lead_slots
            continuing += check_agreement(row)
            assert computed(row) == row.lead + sum(p.slots for p in planned) <= shape.pack_slots
            clips = [clip for s in row.samples for clip in s.clips]
            assert sum(frames.frames(len(c)) for c in clips) == sum(p.frames for p in planned) <= shape.pack_frames
            used = sum(map(len, clips))
            assert np.array_equal(row.audio[:used], np.concatenate([*clips, np.zeros(0, np.float32)]))
            assert not row.audio[used:].any()
            whole = [s for p in planned for s in alone(corpora[p.corpus], p, chat)]
            assert len(whole) == len(row.samples)
            heard = None
            for s, other in zip(row.samples, whole, strict=True):
                for name in ("ids", "labels", "is_audio"):
                    assert np.array_equal(getattr(s, name), getattr(other, name))
                heard = s.clips or heard if s.common else s.clips
                assert len(heard) == len(other.clips)
                assert all(map(np.array_equal, heard, other.clips))
    together = MIXES[names] and not (names == ("asked",) and "text first" in kind)
    assert bool(continuing) == (share and together)


def alone(corpus: CorpusIndex, p: Planned, chat) -> list[Sample]:
    """A planned sample's conversations, each for itself."""
    one, audio = corpus.read(p.record)
    clips = [decode(audio, one.n_samples)] if one.audio else []
    chosen = one.variants if p.variant == ALL else one.variants[p.variant : p.variant + 1]
    return [conversation(corpus.card, one.key, v.turns, clips, chat) for v in chosen]


def test_every_world_emits_the_same_samples(tmp_path, chat, monkeypatch):
    names, percent = ("one", "every", "asked", "text"), [25.0] * 4
    corpora = corpora_of(shards(tmp_path), chat, *names)
    shape = shape_of(corpora, percent)

    def told(laid: Laid) -> list[tuple]:
        return [(s.key, s.ids.tolist(), s.common, [c.tobytes() for c in s.clips]) for s in laid.samples]

    def of(rank: int, world: int) -> list[dict[int, tuple]]:
        found = emitted(monkeypatch, corpora, Planner(corpora, percent, shape, 0), chat, 2, rank, world)
        return [{n: (told(row), row.lead) for n, row in step} for step, _ in found]

    whole = of(0, 1)
    for world in (2, 3):
        parts = [of(rank, world) for rank in range(world)]
        for number, step in enumerate(whole):
            merged = {n: row for part in parts for n, row in part[number].items()}
            assert {n: merged[n] for n in step} == step
            assert all(row == ([], 0) for n, row in merged.items() if n not in step)  # nothing to share: no lead


def test_a_record_that_begins_otherwise_leaves_a_hole(tmp_path, chat, monkeypatch, arrange):
    """Exchanged under the run: as many slots, and another beginning, or a clip that can no longer be shared."""
    corpora = corpora_of(shards(tmp_path), chat, "asked")
    shape = shape_of(corpora, [100])
    wrong = replace(shape, lead=(*shape.lead[:-1], shape.lead[-1] + 1))
    for other, kind in ((wrong, ""), (shape, "text first")):
        arrange(kind)
        for laid, batch in emitted(monkeypatch, corpora, Planner(corpora, [100], other, 0), chat, 1):
            assert {s.reason for s in batch.skipped} == {"differs from index"}
            assert all(row.samples == [] and row.lead == 0 for _, row in laid)
            assert not batch.trained[:, 3].any()


def test_a_record_that_shares_less_than_planned_leaves_a_hole(tmp_path, chat, monkeypatch, arrange):
    """It begins as all do and has as many slots; only its clip is no longer where it could be shared."""
    corpora = corpora_of(shards(tmp_path), chat, "asked", "text")
    shape = shape_of(corpora, [50, 50])
    assert list(shape.lead) == ids_of(chat, USER)
    arrange("text first", "asked")
    for laid, batch in emitted(monkeypatch, corpora, Planner(corpora, [50, 50], shape, 0), chat, 1):
        assert {(s.corpus, s.reason) for s in batch.skipped} == {("asked", "differs from index")}
        assert {s.corpus for _, row in laid for s in row.samples} == {"asked", "text"}  # of one question: as planned
        assert all(computed(row) <= shape.pack_slots and not check_agreement(row) for _, row in laid)


def test_held_out_samples_share_nothing(tmp_path, chat):
    corpora = corpora_of(shards(tmp_path), chat, "every", "asked")
    shape = replace(shape_of(corpora, [50, 50]), pack_slots=200, pack_frames=200)
    sets = [HeldOutSet("m", corpora, chat, s, 8) for s in (shape, replace(shape, lead=None))]
    rows = [[(n, p.segments, p.clips) for n, p in s.packs("own")] for s in sets]
    assert rows[0] == rows[1] != []


@pytest.mark.parametrize("kind", ["", "system"])
@pytest.mark.parametrize("stage", ["stage1_align", "stage2_pretrain", "stage3_sft"])
def test_a_pack_at_mini_has_the_slots_that_were_planned(tmp_path, monkeypatch, arrange, stage, kind):
    """Both halves on real data, every card with all its answers."""
    if not (ROOT / "data/mini/prepared.json").is_file():
        pytest.skip("no data/mini; `make data` prepares it")
    monkeypatch.chdir(ROOT)
    arrange(kind)
    settings = [f"data.index={tmp_path}", "batch.share=true", "data.val_clips=2"]
    loaded = config.load(CONFIGS / f"{stage}.yaml", "mini", settings, CONFIGS).stage
    read = index_room.open_corpus

    def together(reading, *args, **more):
        return read(replace(reading, card=replace(reading.card, answers="all")), *args, **more)

    monkeypatch.setattr("midasheng.data.room.open_corpus", together)
    data = plan_data(loaded, open_data(loaded, make=True))
    assert data.budget.lead_slots >= (14 if kind else 4)
    runs = 0
    loader = train_loader(data.planner(0), data.corpora, data.chat, 4, rank=0, world=1, workers=0)
    for step, batch in zip(data.planner(0), loader, strict=False):
        assert {s.reason for s in batch.skipped} <= {"fits no pack"}
        for planned, row in zip(step.packs, batch.packs, strict=True):
            real = len(row.keys) + row.shared
            assert sum(row.segments[:real]) == data.budget.lead_slots + sum(p.slots for p in planned)
            assert sum(row.segments) == len(row.ids_T) == data.budget.pack_slots
            assert sum(frames.frames(n) for n in row.clips) == sum(p.frames for p in planned)
            assert sum(row.targets) == sum(p.targets for p in planned)
            runs += row.shared - 1
    assert runs > 10


# -- costs, budgets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["", "system", "text first"])
@pytest.mark.parametrize("name", CARDS)
def test_the_table_s_sums_are_those_of_the_visits(tmp_path, chat, arrange, name, kind):
    """Means size the packs, the dearest visit is tried before step 0, records over the budget are named."""
    arrange(kind)
    (found,) = corpora_of(shards(tmp_path), chat, name)
    for once in (None, (), lead_of([found])[:2], lead_of([found])):
        shape = Budget(10_000, 10_000, 1, once)
        several = CARDS[name].answers == "one" and name == "some"
        rows = every_row(Planner([found], [100], shape, 0))
        if several:  # any variant may be drawn
            rows = [
                Planned(0, 0, 0, n, v, one.slots(v) - shape.lead_slots, one.frames, 0)
                for n in range(len(found)) for one in [found.read(n)[0]] for v in range(len(one.variants))
            ]  # fmt: skip
        by_record: dict[int, list[Planned]] = {}
        for row in rows:
            by_record.setdefault(row.record, []).append(row)
        means = np.mean([np.mean([(r.slots, r.frames) for r in of], axis=0) for of in by_record.values()], axis=0)
        assert mean_cost([found], [100], once) == pytest.approx(tuple(means))
        dearest = {n: (max(r.slots for r in of), max(r.frames for r in of)) for n, of in by_record.items()}
        number = None if once is None else len(once)
        most = max(s for s, _ in dearest.values()), max(f for _, f in dearest.values())
        bound = Sources(None, chat, (found,), {}).most(once)
        assert bound[1] == most[1]
        # a visit of several that share nothing saves the lead each, so that it is a bound there
        assert bound[0] == most[0] or (once and most[0] < bound[0] <= most[0] + 2 * len(once))
        exact = {(found.key(n), *cost) for n, cost in dearest.items()}
        for limit in ((0, 0), (60, 10_000), (10_000, 20), most, (most[0] - 1, most[1])):
            assert set(found.over(*limit, number)) == {e for e in exact if e[1] > limit[0] or e[2] > limit[1]}


def sharing(name: str, lengths: list[float], once: tuple[int, ...], common: int, **more) -> Corpus:
    """A corpus of the plan alone, whose conversations begin alike."""
    return replace(corpus(name, lengths, **more), common=(common,) * len(lengths), lead=once)


LEAD = (5, 6, 7, 8)
PLANNED = (
    sharing("one", speech(300), LEAD, 9),
    sharing("all", speech(200, 1), (*LEAD, 9), 9, variants=3, answers="all"),
    sharing("apart", speech(200, 2), LEAD, 0, variants=2, answers="all"),
    sharing("text", [1.0] * 90, (*LEAD[:3], 1), 7, audio=False, answers="all"),
)


def test_a_plan_costs_what_its_records_do():
    """The lead that one corpus has is not applied to another, and none is counted twice."""
    shape = Budget(900, 2000, 3, lead_of(PLANNED))
    assert shape.lead == LEAD[:3]
    seen = set()
    for step in islice(Planner(PLANNED, [25.0] * 4, shape, 0), 20):
        for chosen in step.packs:
            assert sum(s.slots for s in chosen) + 3 <= 900
            for s in chosen:
                assert (s.slots, s.frames, s.targets) == PLANNED[s.corpus].cost(s.record, s.variant, 3)
                seen.add(s.corpus)
    assert seen == {0, 1, 2, 3}


def test_a_budget_leaves_room_for_the_lead():
    asked = {"clips_per_step": 60, "packs_per_step": 4, "pack_slots": 700, "pack_frames": 0}
    plain, shared = (budget(PLANNED, [25.0] * 4, kind="report", **asked, share=share) for share in (False, True))
    slots, n_frames = mean_cost(PLANNED, [25.0] * 4, shared.lead)
    assert shared.own_slots == shared.pack_slots - 3 == pytest.approx(15 * slots, abs=1)
    assert shared.pack_slots < 0.9 * plain.pack_slots
    assert shared.pack_frames == pytest.approx(1.02 * shared.own_slots * n_frames / slots, abs=1)
    given = budget(PLANNED, [25.0] * 4, kind="throughput", **asked, share=True)
    assert (given.pack_slots, given.own_slots) == (700, 697)
    exact = sharing("exact", [4.0] * 50, LEAD, 0, text=(30, 31), variants=1)  # 50 slots, 46 beside the lead
    check_fits(Planner([exact], [100], Budget(50, 100, 1, LEAD), 0))
    with pytest.raises(UserError, match=r"fit no pack of 49 slots .* is 4.0 s and 50 slots.*batch.pack_slots=256"):
        check_fits(Planner([exact], [100], Budget(49, 100, 1, LEAD), 0))
    full = next(Planner([exact], [100], Budget(4 + 46 * 3, 300, 1, LEAD), 0)).packs[0]
    assert len(full) == 3, "a pack that is exactly full is refused, or its lead is counted twice"


def test_packs_that_share_are_as_full():
    percent, fills = [40.0, 30.0, 20.0, 10.0], {}
    many = [replace(c, counts=c.counts) for c in PLANNED]
    for share in (False, True):
        shape = budget(
            many, percent, kind="report", clips_per_step=240, packs_per_step=4, pack_slots=0, pack_frames=0, share=share
        )
        rows = [chosen for step in islice(Planner(many, percent, shape, 0), 25) for chosen in step.packs]
        slots, used = (np.mean([sum(getattr(s, w) for s in chosen) for chosen in rows]) for w in ("slots", "frames"))
        fills[share] = (slots + shape.lead_slots) / shape.pack_slots, used / shape.pack_frames
        assert np.mean([len(chosen) for chosen in rows]) == pytest.approx(60, rel=0.03)
    assert min(fills[True]) > 0.96
    assert fills[True] == pytest.approx(fills[False], abs=0.01)


# -- the same plan where nothing is shared, another one where something is ------------------------------------------------


def fixed(name: str, count: int, many: int, answers: str, audio: bool = True) -> Corpus:
    """A corpus made by arithmetic alone."""
    return Corpus(
        Card(name, "asr", f"{name}*.tar", "none", audio=audio, answers=answers), np.array([count - count // 3, count // 3]),
        np.array([round(((7 * i % 29) * 0.4 + 0.3) * 16_000) * audio for i in range(count)]),
        tuple(tuple(20 + (5 * i + 3 * v) % 17 for v in range(many)) for i in range(count)),
        tuple(tuple(3 + (i + v) % 5 for v in range(many)) for i in range(count)), (20,) * count, LEAD,
    )  # fmt: skip


def test_without_sharing_the_plan_is_what_it_always_was():
    """The number is what the code before sharing gave."""
    mix = (fixed("one", 90, 2, "one"), fixed("all", 60, 3, "all"), fixed("text", 40, 2, "all", False))
    *_, last = islice(Planner(mix, (50.0, 30.0, 20.0), Budget(600, 800, 3), 7), 12)
    assert last.digest == 3_898_487_765
    assert "share" not in last.state_after["fingerprint"]
    *_, last = islice(Planner(mix, (50.0, 30.0, 20.0), Budget(600, 800, 3, LEAD), 7), 12)
    assert last.digest != 3_898_487_765


def test_a_resume_with_another_share_is_refused_by_name():
    plain, shared = Budget(900, 2000, 3), Budget(900, 2000, 3, LEAD)

    def of(shape: Budget, corpora=PLANNED[:2]) -> Planner:
        return Planner(corpora, [50.0, 50.0], shape, 0)

    other = (PLANNED[0], replace(PLANNED[1], common=(8,) * 200))
    for before, now, says in (
        (of(plain), of(shared), "batch.share was False and is True"),
        (of(shared), of(plain), "batch.share was True and is False"),
        (of(plain), of(replace(plain, lead=())), "batch.share was False and is True"),
        (of(shared), of(replace(shared, lead=LEAD[:3])), r"the lead .* was \[5, 6, 7, 8\] and is \[5, 6, 7\]"),
        (of(shared), of(shared, other), "index: what the conversations .* in common has changed"),
    ):
        state = json.loads(json.dumps(next(before).state_after))
        with pytest.raises(UserError, match=f"the checkpoint's plan was made otherwise: {says}[^;]*$"):
            now.restore(state)
    again = of(shared)
    steps = list(islice(of(shared), 4))
    again.restore(json.loads(json.dumps(steps[1].state_after)))
    assert [next(again), next(again)] == steps[2:]


def test_a_resume_whose_records_share_otherwise_is_refused(tmp_path, chat, arrange):
    """As many slots and targets as before, in the same order, behind the same lead."""
    plans = []
    for kind in ("", "text first"):
        arrange(kind, "asked")
        corpora = corpora_of(shards(tmp_path / f"now {kind}"), chat, "asked", "text")
        plans.append(Planner(corpora, [50, 50], Budget(400, 600, 2, lead_of(corpora)), 0))
    with pytest.raises(UserError, match="otherwise: index: what the conversations of a record have in common has"):
        plans[1].restore(next(plans[0]).state_after)


def test_a_run_folder_of_another_share_is_refused_and_one_from_before_goes_on(tmp_path):
    order = Order(config.load(CONFIGS / "stage1_align.yaml", "mini", [], CONFIGS), tmp_path, "mini", "r", "", False)
    share = config.load(CONFIGS / "stage1_align.yaml", "mini", ["batch.share=true"], CONFIGS)
    inputs = {"plan": Planner(PLANNED[:1], [100], Budget(900, 2000, 3), 0).fingerprint(), "parents": []}
    order.folder.mkdir(parents=True)
    (order.folder / "inputs.json").write_text(json.dumps(inputs))
    text = order.loaded.yaml()
    for written in (text, "".join(line for line in text.splitlines(True) if not line.startswith("batch.share"))):
        (order.folder / "config.yaml").write_text(written)
        assert check_run_folder(order, inputs) == "unfinished"
        with pytest.raises(ConfigError, match=r"holds a run with batch.share = false, this one has true"):
            check_run_folder(replace(order, loaded=share), inputs)


# -- what is said about it ---------------------------------------------------------------------------------------------


def test_hours_are_those_that_are_encoded(tmp_path, chat):
    """A clip that answers three questions and is encoded once is heard once."""
    corpora = corpora_of(shards(tmp_path), chat, "asked")
    hours = {}
    for once in (None, lead_of(corpora)):
        folder, shape = tmp_path / f"run{once}", Budget(400, 600, 2, once)
        plan, heard = Planner(corpora, [100], shape, 0), 0.0
        ledger = Ledger(folder, 0, ["asked"])
        for step in islice(plan, 3):
            chosen = [p for row in step.packs for p in row]
            keys = [corpora[0].key(p.record) for p in chosen]
            for p in chosen:
                one = corpora[0].read(p.record)[0]
                heard += frames.frame_seconds(one.frames * (1 if once else len(one.variants))) / 3600
            rows = np.array([(p.corpus, p.epoch, p.position, 1) for p in chosen])
            ledger.step(step.number, rows, zlib.crc32("".join(f"asked/{k}" for k in keys).encode()), [])
            ledger.flush(step.state_after)
        found = RunLedger(folder, Planner(corpora, [100], shape, 0), corpora).audit()
        assert found.faults == []
        assert found.corpora["asked"].hours == pytest.approx(heard)
        hours[once] = found.corpora["asked"].hours / found.corpora["asked"].samples
    assert hours[lead_of(corpora)] < 0.7 * hours[None]


def test_a_check_sees_full_packs_and_a_beginning_that_differs(tiny_data, tmp_path, chat, arrange):
    stage = order_for("stage3_sft", tiny_data, tmp_path, batch__share="true", data__index=tmp_path / "index").stage
    found = check_data(stage)
    assert found.errors == []
    data = plan_data(stage, open_data(stage, make=False))
    loader = train_loader(data.planner(0), data.corpora, data.chat, found.steps, rank=0, world=1, workers=0)
    real = [sum(p.real) for batch in loader for p in batch.packs]
    assert data.budget.lead_slots
    assert found.fill_slots == pytest.approx(np.mean(real) / data.budget.pack_slots)
    assert 0.9 < found.fill_slots <= 1
    assert 0.5 < found.fill_frames <= 1
    (asked,) = corpora_of(shards(tmp_path / "shards"), chat, "asked")
    number = next(n for n in range(len(asked)) if asked.read(n)[0].common)
    assert _wrong(asked, number, asked.place(number).read()) == ""
    arrange("text first")  # as many slots
    assert "0 text slots in common" in _wrong(asked, number, asked.place(number).read())


def test_the_largest_that_is_tried_before_training_is_that_of_packs_that_share(tmp_path, chat):
    from midasheng.train.memory import dearest

    corpora = corpora_of(shards(tmp_path), chat, "every")
    for share in (False, True):
        shape = shape_of(corpora, [100], share)
        most = dearest(Sources(None, chat, corpora, {}), Planner(corpora, [100], shape, 0))
        rows = every_row(Planner(corpora, [100], shape, 0))
        assert (most.slots, most.frames) == (max(r.slots for r in rows), max(r.frames for r in rows))
        assert most.lead == shape.lead_slots
        assert bool(most.lead) == share
        packs = [chosen for step in islice(Planner(corpora, [100], shape, 0), 8) for chosen in step.packs]
        assert most.targets * shape.own_slots == pytest.approx(max(sum(s.targets for s in chosen) for chosen in packs))


def test_the_header_says_what_is_shared(tmp_path, chat):
    from midasheng.train.fit import shared

    corpora = corpora_of(shards(tmp_path), chat, "one", "asked", "text")
    asked = corpora[1].summary
    text = shared(4, corpora)
    assert text.startswith("4 leading slots are computed once per pack; `answers: all` of asked shares")
    assert f"{asked.shared.mean_frames:.0f} frames a visit instead of {asked.mean_slots:.0f}" in text
    assert "of one" not in text
    assert f"{asked.shared.mean_slots:.0f} slots and" in text
    assert _unfit(corpora, Budget(10_000, 10_000, 1, (1,))) == ()
    slots, _ = Sources(None, chat, corpora[:1], {}).most((1,))
    assert _unfit(corpora[:1], Budget(slots + 1, 10_000, 1, (1,))) == ()
    assert "may fit no pack" in _unfit(corpora[:1], Budget(slots, 10_000, 1, (1,)))[0]
