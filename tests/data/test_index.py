"""The index of a corpus finds every record or says what it left out and why; each number is one record for ever."""

import json
import multiprocessing
import os
import pickle
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset

from midasheng import frames
from midasheng.config import UserError
from midasheng.data import storage
from midasheng.data.audio import Skip, decode
from midasheng.data.chat import Chat
from midasheng.data.index import CorpusIndex, IndexMissing, Record, index_folder
from midasheng.data.manifest import Card, HeldOut, ManifestError, excluded_by, read_card
from midasheng.data.storage import Place, StorageError, Unreachable
from midasheng.sample import NO_TARGET
from tests.conftest import flac, record, tone, training_records, write_shard
from tests.data.server import SHORT, Server
from tests.data.shards import CARD, SOUND, content, good, opened, train_keys, write

TEXT_CARD = replace(CARD, audio=False, held_out=HeldOut("source", 0.3, 40))


def side_files(folder: Path) -> dict[str, int]:
    """Name -> when it was written, of every side file."""
    return {p.name: p.stat().st_mtime_ns for p in folder.rglob("*.side")}


def columns(corpus: CorpusIndex) -> list[list[list[int]]]:
    return [[c.tolist() for c in corpus.columns(shard)] for shard in range(len(corpus.counts))]


# -- records -----------------------------------------------------------------------------------------------------------

NO_LENGTH = SOUND[:21] + bytes([SOUND[21] & 0xF0, 0, 0, 0, 0]) + SOUND[26:]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("x.flac", SOUND)], "no json"),
        ([("x.1.flac", SOUND), ("x.1.json", content())], "dotted name"),
        ([("x.flac", SOUND), ("x.json", b'{"text": ')], "json unreadable"),
        ([("x.flac", SOUND), ("x.json", b"\xff\xfe")], "json unreadable"),
        ([("x.flac", SOUND), ("x.json", b"[1]")], "json unreadable"),
        ([("x.json", content())], "no audio"),
        ([("x.txt", SOUND), ("x.json", content())], "no audio"),
        ([("x.flac", b""), ("x.json", content())], "undecodable"),
        ([("x.flac", b"noise" * 99), ("x.json", content())], "undecodable"),
        ([("x.flac", flac(tone(0.19, 0))), ("x.json", content())], "too short"),
        ([("x.flac", flac(tone(1.01, 0))), ("x.json", content())], "too long"),
        ([("x.flac", NO_LENGTH), ("x.json", content())], "length unknown"),
        ([("x.flac", SOUND), ("x.json", content(text=""))], "no text"),
        ([("x.flac", SOUND), ("x.json", content(text=[]))], "no text"),
        ([("x.flac", SOUND), ("x.json", content()), ("x.FLAC", SOUND)], "member twice"),
    ],
)
def test_unusable_record_is_left_out_and_counted(tmp_path, chat, members, reason):
    write(tmp_path / "a.tar", good("a") + members + good("b"))
    corpus = opened(CARD, tmp_path, chat)
    assert train_keys(corpus) == ["a", "b"]
    assert list(corpus.skipped()) == [("x", reason)]
    assert corpus.summary.reasons == {reason: 1}
    assert [r.key for r in training_records(corpus)] == ["a", "b"]
    (tmp_path / "a.tar").unlink()
    write(tmp_path / "b.tar", members)
    alone = opened(CARD, tmp_path, chat)
    assert (len(alone), alone.summary.reasons, alone.held_out) == (0, {reason: 1}, ())
    assert [c.tolist() for c in alone.columns(0)] == [[], [], [], [], []]


@pytest.mark.parametrize("share", [1.0, 0.0])
def test_a_sound_that_is_not_what_its_header_says(tmp_path, chat, share):
    """Found where data.decode_share looks; the loader finds the rest."""
    file = BytesIO()
    soundfile.write(file, tone(0.9, 0), 16_000, format="MP3", subtype="MPEG_LAYER_III")
    half = file.getvalue()[: len(file.getvalue()) // 2]
    members = [("b.mp3", half), ("b.json", content()), ("c.flac", SOUND[:3000]), ("c.json", content())]
    write(tmp_path / "a.tar", [*good("a"), *members, *good("d")])
    corpus = opened(CARD, tmp_path, chat, decode_share=share)
    assert corpus.summary.reasons == ({"length differs": 1, "undecodable": 1} if share else {})
    assert train_keys(corpus) == (["a", "d"] if share else ["a", "b", "c", "d"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"answer": "caption"}, "asks for JSON field `caption`; there are"),
        ({"prompts": ["Write {lang}."]}, "asks for JSON field 'lang'"),
        ({"prompts": ["Write {}."]}, "a brace itself is written twice"),
        ({"prompts": [], "answer": "", "pairs": "text"}, "`text` is no list of {question, answer}"),
        ({"prompts": [], "answer": "", "pairs": "halves"}, "`halves` is no list of {question, answer}"),
        ({"held_out": HeldOut("speaker", 0.1, 9)}, "held_out.by of card c asks for JSON field `speaker`"),
        ({"alike": "voice"}, "alike of card c asks for JSON field `voice`"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_card_that_does_not_fit_its_records(tmp_path, chat, changes, says, workers):
    for name in "ab":
        write(tmp_path / f"{name}.tar", [("a.flac", SOUND), ("a.json", content(halves=[{"question": "?"}]))])
    with pytest.raises(ManifestError, match=rf"[ab]\.tar: a\.json.*{says}"):
        opened(replace(CARD, **changes), tmp_path, chat, workers=workers)


def test_no_shard_at_all(tmp_path, chat):
    for make in (True, False):
        with pytest.raises(
            ManifestError, match=r"corpus c: no shard matches .*/\*\.tar; write it .*`make data`.*data.without=\[c\]"
        ):
            opened(CARD, tmp_path, chat, make=make)


def test_variants(tmp_path, chat):
    pairs = [{"question": "A?", "answer": "yes"}, {"question": "Is it so?", "answer": "no"}]
    write(tmp_path / "a.tar", [("a.flac", SOUND), ("a.json", content(captions=["one", "", "two"], pairs=pairs))])
    card = replace(CARD, prompts=["Write {source}.", "{{}}"], answer="captions")
    (one,) = training_records(opened(card, tmp_path, chat))
    said = [(v.turns[0].text, v.turns[1].text) for v in one.variants]
    assert said == [("Write s.", "one"), ("Write s.", "two"), ("{}", "one"), ("{}", "two")]
    assert all(v.turns[0].clips == 1 for v in one.variants)
    (one,) = training_records(opened(replace(CARD, prompts=[], answer="", pairs="pairs"), tmp_path, chat))
    assert [(v.turns[0].text, v.turns[1].text) for v in one.variants] == [("A?", "yes"), ("Is it so?", "no")]


def mixed(root: Path, shards: int = 3, each: int = 7) -> dict[str, dict]:
    """Shards with records of every kind; (key -> JSON) of all whose JSON can be read."""
    said = {}
    for shard in range(shards):
        members: list[tuple[str, bytes]] = []
        for n in range(each):
            key = f"{'ключ' if n % 2 else 'sub/k'}-{shard}-{n}"
            text = content(
                source=f"s{shard}{n // 2}", captions=[f"{key} " * (k + 1) for k in range(1 + (n + shard) % 3)]
            )
            sound = {1: b"noise", 4: flac(tone(1.5, n))}.get(n, flac(tone(0.3 + n / 50 + shard / 10, n)))
            said[key] = json.loads(text)
            order = [(f"{key}.flac", sound), (f"{key}.json", text)]
            members += order if n % 3 else order[::-1]
        if shard == 1:
            members = [("dead.json", b"{")]  # a shard without a record, between others
        write(root / f"{shard}.tar", members)
    return said


MIXED = replace(CARD, prompts=["Write.", "Say {source}."], answer="captions", held_out=HeldOut("source", 0.3, 40))


def test_what_the_plan_knows_of_a_record_is_what_the_loader_will_read(tmp_path, chat):
    """Slots and targets of each variant by chat.encode, samples by decoding; no column of a record that is left out
    leaks into the next one."""
    said = mixed(tmp_path)
    corpus = opened(MIXED, tmp_path, chat)
    assert corpus.held_out
    assert {"undecodable", "too long", "json unreadable"} == set(corpus.summary.reasons)
    assert (corpus.counts > 0).tolist() == [True, False, True]
    number = 0
    for shard in range(3):
        known = corpus.columns(shard)
        assert len(known.n_samples) == len(known.until) == corpus.counts[shard]
        assert len(known.slots) == len(known.targets) == (known.until[-1] if len(known.until) else 0)
        for row in range(corpus.counts[shard]):
            first = known.until[row - 1] if row else 0
            one, audio = corpus.read(number)
            content_ = said[one.key]
            expected = [(p, a) for p in ("Write.", f"Say {content_['source']}.") for a in content_["captions"]]
            assert [(v.turns[0].text, v.turns[1].text) for v in one.variants] == expected
            assert one.key == corpus.key(number)
            assert one.n_samples == known.n_samples[row]
            assert audio == one.audio.read()
            assert len(decode(audio, one.n_samples)) == soundfile.info(BytesIO(audio)).frames == one.n_samples
            clip = frames.audio_tokens(one.n_samples)
            for variant in range(len(one.variants)):
                encoded = chat.encode(one.variants[variant].turns, [clip])
                slots, targets = int(known.slots[first + variant]), int(known.targets[first + variant])
                assert len(encoded.ids) == slots + clip == one.slots(variant)
                assert (encoded.labels != NO_TARGET).sum() == targets == one.variants[variant].targets
            assert first + len(one.variants) == known.until[row]
            number += 1
    assert number == len(corpus)


def test_numbers_go_through_the_shards_in_their_order(tmp_path, chat):
    for number, keys in enumerate(["ab", "", "c", "", "def"]):
        write(tmp_path / f"{number}.tar", good(*keys))
    corpus = opened(CARD, tmp_path, chat)
    assert corpus.counts.tolist() == [2, 0, 1, 0, 3]
    assert train_keys(corpus) == list("abcdef")
    for number, key in enumerate("abcdef"):
        place, (one, audio) = corpus.place(number), corpus.read(number)
        assert place.path == str(tmp_path / f"{[0, 0, 2, 4, 4, 4][number]}.tar")
        assert (one.key, audio) == (key, SOUND)
        again = corpus.read(number, place.read())
        assert again == (one, audio)
    with pytest.raises(IndexError):
        corpus.place(6)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves the shard open
def test_a_shard_of_webdataset_reads_as_webdataset_reads_it(tmp_path, chat):
    write_shard(tmp_path / "a.tar", [(f"sub/tone{n}", flac(tone(0.3, n)), record(n)) for n in range(6)])
    corpus = opened(replace(CARD, prompts=["?"], answer="captions"), tmp_path, chat)
    theirs = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert train_keys(corpus) == [r["__key__"] for r in theirs]
    for number, their in enumerate(theirs):
        data = corpus.place(number).read()
        assert their["json"] in data
        one, audio = corpus.read(number, data)
        assert audio == their["flac"] == one.audio.read()
        assert [v.turns[1].text for v in one.variants] == json.loads(their["json"])["captions"]


def test_many_prompts_of_one_record_and_records_of_one_prompt(tmp_path, chat):
    """The mean costs of the table are those of the records: they size the steps of a plan."""
    mixed(tmp_path)
    for answers in ("one", "all"):
        corpus = opened(replace(MIXED, answers=answers), tmp_path, chat)
        records = training_records(corpus)
        visits = [len(r.variants) if answers == "all" else 1 for r in records]
        slots = [
            np.mean([r.slots(v) for v in range(len(r.variants))]) * k for r, k in zip(records, visits, strict=True)
        ]
        assert corpus.summary.mean_slots == pytest.approx(np.mean(slots))
        assert corpus.summary.mean_frames == pytest.approx(
            np.mean([r.frames * k for r, k in zip(records, visits, strict=True)])
        )
        assert corpus.summary.hours == pytest.approx(sum(r.n_samples for r in records) / 16_000 / 3600)


# -- clips heard, left out or told ------------------------------------------------------------------------------------

TOLD_CARD = replace(CARD, context="{source}: {text}")


def said(record: Record) -> list[tuple[str, str, str]]:
    """(words that stand for the clip, question, answer) of each variant."""
    return [(v.turns[0].told, v.turns[0].text, v.turns[1].text) for v in record.variants]


def test_told_is_every_conversation_both_with_its_context_in_words_and_without(tmp_path, chat):
    write(tmp_path / "a.tar", [("a.flac", SOUND), ("a.json", content(captions=["one", "two"]))])
    card = replace(TOLD_CARD, prompts=["Write.", "Say {source}."], answer="captions")
    bare = [("", question, answer) for question in ("Write.", "Say s.") for answer in ("one", "two")]
    (one,) = training_records(opened(card, tmp_path, chat, clips="told"))
    assert sorted(said(one)) == sorted(bare + 2 * [("s: a tone", q, a) for _, q, a in bare])  # two of three
    (one,) = training_records(opened(replace(card, context=""), tmp_path, chat, clips="told"))
    assert said(one) == bare  # a card that has no words for its clip


@pytest.mark.parametrize("clips", ["left_out", "told"])
def test_a_clip_that_is_not_heard_leaves_no_slots_and_is_not_even_read(tmp_path, chat, clips):
    """Also where it would be too long, broken or not there: the text is all there is."""
    members = [("b.flac", flac(tone(1.5, 0))), ("b.json", content()), ("c.flac", b"x" * 99), ("c.json", content())]
    write(tmp_path / "a.tar", [*good("a"), *members, ("d.json", content())])
    corpus = opened(TOLD_CARD, tmp_path, chat, clips=clips)
    assert train_keys(corpus) == ["a", "b", "c", "d"]
    for number, one in enumerate(training_records(corpus)):
        assert (one.audio, one.n_samples, one.frames) == (None, 0, 0)
        assert corpus.read(number)[1] == b""
        expected = [("", "Write.", "a tone"), *2 * [("s: a tone", "Write.", "a tone")]]
        assert said(one) == (expected if clips == "told" else expected[:1])
        for variant_number, variant in enumerate(one.variants):
            assert [t.clips for t in variant.turns] == [0, 0]
            encoded = chat.encode(variant.turns, [])
            assert len(encoded.ids) == variant.slots == one.slots(variant_number)
            assert not encoded.is_audio.any()
            assert chat.audio not in encoded.ids
            assert (chat.audio_bos in encoded.ids) == bool(variant_number)
            assert variant.targets == one.variants[0].targets


def test_heard_is_what_it_was_whatever_the_context(tmp_path, chat):
    write(tmp_path / "a.tar", good("a", "b"))
    plain, with_context = (opened(card, tmp_path, chat) for card in (CARD, TOLD_CARD))
    records = training_records(plain)
    assert (
        records == training_records(with_context) == training_records(opened(TOLD_CARD, tmp_path, chat, clips="heard"))
    )
    assert plain.summary.fingerprint == with_context.summary.fingerprint
    assert said(records[0]) == [("", "Write.", "a tone")]
    assert records[0].variants[0].turns[0].clips == 1
    assert records[0].slots(0) > records[0].variants[0].slots
    prints = {opened(TOLD_CARD, tmp_path, chat, clips=clips).summary.fingerprint for clips in ("left_out", "told")}
    assert len(prints | {plain.summary.fingerprint}) == 3  # a resume under another data.clips would be another plan


def test_the_same_records_are_held_out_whatever_is_heard(tmp_path, chat):
    """Text pretraining must not see the words of what is validated on later."""
    members = [(f"{n}.{e}", b) for n in range(40) for e, b in (("flac", SOUND), ("json", content(source=f"s{n % 20}")))]
    write(tmp_path / "a.tar", members)
    card = replace(TOLD_CARD, held_out=HeldOut("source", 0.4, 40))
    out = [
        {r.key for r in opened(card, tmp_path, chat, clips=clips).held_out} for clips in ("heard", "left_out", "told")
    ]
    assert out[0] == out[1] == out[2] != set()


def test_the_field_that_must_be_alike_is_kept_and_must_be_there(tmp_path, chat):
    write(tmp_path / "a.tar", [("a.flac", SOUND), ("a.json", content(language="en", number=7))])
    for field, value in {"": "", "language": "en", "number": "7"}.items():
        (one,) = training_records(opened(replace(CARD, alike=field), tmp_path, chat))
        assert one.alike == value
    with pytest.raises(ManifestError, match=r"a.json: alike of card c asks for JSON field `voice`; .*'language'"):
        opened(replace(CARD, alike="voice"), tmp_path, chat)
    with pytest.raises(ManifestError, match=r"asks for JSON field 'voice'"):
        opened(replace(CARD, context="{voice}"), tmp_path, chat, clips="told")


def test_the_language_of_a_record_is_its_cards_only_one_or_the_one_it_says(tmp_path, chat):
    contents = {"a": content(language="en"), "b": content(language="it"), "c": content(), "d": content(language=["en"])}
    write(
        tmp_path / "a.tar",
        [(f"{k}.{e}", b) for k, text in contents.items() for e, b in (("flac", SOUND), ("json", text))],
    )
    for languages, told in {("de",): ["de"] * 4, ("en", "fr"): ["en", "-", "-", "-"], (): ["-"] * 4}.items():
        corpus = opened(replace(CARD, languages=list(languages)), tmp_path, chat)
        assert [r.language for r in training_records(corpus)] == told


def test_a_corpus_that_is_only_looked_at_may_be_held_out_as_a_whole(tmp_path, chat):
    write(tmp_path / "a.tar", good("a", "b"))
    corpus = opened(replace(CARD, held_out=HeldOut("source", 1.0, 100)), tmp_path, chat)
    assert ([r.key for r in corpus.held_out], len(corpus)) == (["a", "b"], 0)


# -- held out ----------------------------------------------------------------------------------------------------------


def grouped(path: Path, order: list[int], shards: int = 2, *, text: str = "a tone") -> None:
    """Records without audio; record n is of source n // 4."""
    for shard in range(shards):
        records = {n: content(source=f"source {n // 4}", text=text, long=n % 3) for n in order[shard::shards]}
        write(path / f"{shard}.tar", [(f"{n}.json", r) for n, r in records.items()])


def held_out(card: Card, path: Path, chat) -> set[str]:
    corpus = opened(card, path, chat)
    out, train = {r.key for r in corpus.held_out}, set(train_keys(corpus))
    assert not out & train
    assert len(out | train) + len(list(corpus.skipped())) == 200
    assert corpus.held_out_places().isdisjoint((p.path, p.offset) for p in map(corpus.place, range(len(corpus))))
    assert len(corpus.held_out_places()) == len(out)
    return out


def test_held_out_are_whole_groups_up_to_the_maximum(tmp_path, chat):
    grouped(tmp_path, list(range(200)))
    groups = {}
    for share, most in ((0.3, 1000), (0.3, 40), (0.3, 42), (0.3, 3), (0.0, 40), (1.0, 200)):
        out = held_out(replace(TEXT_CARD, held_out=HeldOut("source", share, most)), tmp_path, chat)
        assert len(out) <= most
        assert set(Counter(int(k) // 4 for k in out).values()) <= {4}, "a source on both sides"
        groups[share, most] = out
    assert 40 < len(groups[0.3, 1000]) < 80
    assert groups[0.3, 40] == groups[0.3, 42] < groups[0.3, 1000]
    assert len(groups[0.3, 40]) == 40
    assert not groups[0.0, 40]
    assert not groups[0.3, 3]
    assert len(groups[1.0, 200]) == 200


def test_excluded_keys_and_sources_are_in_neither(tmp_path, chat):
    """Decontamination: what a benchmark asks about is not trained on, and not validated on."""
    grouped(tmp_path, list(range(200)))
    card = replace(CARD, audio=False, held_out=HeldOut("source", 0.3, 100))
    whole = opened(card, tmp_path, chat)
    before, apart = set(train_keys(whole)), held_out(card, tmp_path, chat)
    key = train_keys(whole)[0]
    source = int(sorted(apart)[0]) // 4  # a whole recording that was held out
    (tmp_path / "keys.txt").write_text(f" {key} \n\nnot in this corpus\n")
    (tmp_path / "sources.txt").write_text(f"source {source}\n")
    gone = {key} | {str(4 * source + i) for i in range(4)}
    files = [str(tmp_path / "keys.txt"), str(tmp_path / "sources.txt")]
    clean = opened(replace(card, exclude=files), tmp_path, chat, make=False)  # shards are not read again
    assert set(train_keys(clean)) == before - gone
    assert {r.key for r in clean.held_out} == apart - gone
    assert dict(clean.skipped()) == dict.fromkeys(gone, "excluded")
    assert clean.summary.reasons == {"excluded": 5}
    assert clean.summary.fingerprint != whole.summary.fingerprint  # a resume with another list is refused
    (tmp_path / "keys.txt").write_text(f"{train_keys(clean)[0]}\n")  # as many of each shard, but others
    other = opened(replace(card, exclude=files), tmp_path, chat, make=False)
    assert [r.train for r in other.rows] == [r.train for r in clean.rows]
    assert other.summary.fingerprint != clean.summary.fingerprint
    (tmp_path / "keys.txt").write_text("")  # the list, not its file's name, is what counts
    assert set(train_keys(opened(replace(card, exclude=files), tmp_path, chat))) == before - gone | {key}
    (tmp_path / "keys.txt").unlink()
    with pytest.raises(ManifestError, match=r"card c: exclude: .*keys\.txt"):
        opened(replace(card, exclude=files), tmp_path, chat)


def test_excluded_files_lie_beside_the_card(tmp_path):
    """Wherever the command runs."""
    (tmp_path / "c.yaml").write_text(
        "{name: c, task: asr, shards: '*.tar', licence: none, prompts: [Write.], answer: text, exclude: [keys.txt]}"
    )
    (tmp_path / "keys.txt").write_text("a\n")
    assert excluded_by(read_card(tmp_path / "c.yaml")) == {"a"}


def test_held_out_do_not_depend_on_order_or_shards(tmp_path, chat):
    grouped(tmp_path / "a", list(range(200)))
    grouped(tmp_path / "b", np.random.default_rng(0).permutation(200).tolist(), shards=5)
    assert held_out(TEXT_CARD, tmp_path / "a", chat) == held_out(TEXT_CARD, tmp_path / "b", chat) != set()


def test_cards_of_the_same_shards_hold_out_the_same_records(tmp_path, chat):
    """Also where one of them can use fewer records: otherwise one corpus trains on what the other validates on."""
    grouped(tmp_path, list(range(200)))
    for n in (0, 1):  # for one card a third of the records has no answer
        with tarfile.open(tmp_path / f"{n}.tar") as tar:
            records = [(m.name, json.loads(tar.extractfile(m).read())) for m in tar]
        write(tmp_path / f"{n}.tar", [(k, content(**r, few="yes" if r["long"] else "")) for k, r in records])
    many, few = TEXT_CARD, replace(TEXT_CARD, name="few", answer="few")
    all_out, few_out = (held_out(card, tmp_path, chat) for card in (many, few))
    assert few_out < all_out
    assert not all_out & set(train_keys(opened(few, tmp_path, chat)))


# -- side files --------------------------------------------------------------------------------------------------------


def test_the_second_opening_reads_no_shard(tmp_path, chat):
    """Only columns, and without them where they are not asked for."""
    mixed(tmp_path)
    first = opened(MIXED, tmp_path, chat)
    known, written = columns(first), side_files(tmp_path)
    for shard in tmp_path.glob("*.tar"):  # the same to the index, and not to be read
        stat = shard.stat()
        shard.write_bytes(b"\xff" * stat.st_size)
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = opened(MIXED, tmp_path, chat, make=False)
    assert columns(again) == known
    assert again.summary == first.summary
    assert side_files(tmp_path) == written


def test_another_process_than_the_first_makes_no_side_file(tmp_path, chat):
    mixed(tmp_path)
    with pytest.raises(
        IndexMissing,
        match=r"corpus c: 3 of 3 shards have no index of their present bytes, .*/0\.tar first; run `make index`",
    ):
        opened(MIXED, tmp_path, chat, make=False)
    assert side_files(tmp_path) == {}
    made = opened(MIXED, tmp_path, chat)
    assert columns(opened(MIXED, tmp_path, chat, make=False)) == columns(made)


@pytest.mark.parametrize("change", ["longer", "same size", "only its date"])
def test_the_index_of_a_shard_that_has_changed_is_never_used(tmp_path, chat, change):
    write(tmp_path / "0.tar", good("a"))
    path = write(tmp_path / "1.tar", good("b"))
    opened(CARD, tmp_path, chat)
    before, stat = side_files(tmp_path), path.stat()
    write(path, good("c", "d") if change == "longer" else good("c" if change == "same size" else "b"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(IndexMissing, match=rf"1 of 2 shards .*{path} first; run `make index`"):
        opened(CARD, tmp_path, chat, make=False)
    assert train_keys(opened(CARD, tmp_path, chat)) == ["a", *{"longer": "cd", "same size": "c"}.get(change, "b")]
    after = side_files(tmp_path)
    assert before.items() < after.items(), "a shard that has not changed was read again"
    assert len(after) == 3


def test_a_shard_that_changes_and_changes_back_is_read_as_it_is(tmp_path, chat):
    """A copy put aside and moved back keeps its date: the table of the first day must not meet columns of the second."""
    path = write(tmp_path / "0.tar", good("a", "b"))
    shutil.copy2(path, tmp_path / "aside")
    opened(CARD, tmp_path, chat)
    write(path, [("c.flac", flac(tone(0.9, 1))), ("c.json", content(text="another tone")), *good("d")])
    os.utime(path, (2_000_000_000, 2_000_000_000))
    assert train_keys(opened(CARD, tmp_path, chat)) == ["c", "d"]
    os.replace(tmp_path / "aside", path)
    try:
        corpus = opened(CARD, tmp_path, chat, make=False)
    except IndexMissing:
        corpus = opened(CARD, tmp_path, chat)
    assert train_keys(corpus) == ["a", "b"]
    assert [r.key for r in training_records(corpus)] == ["a", "b"]


def test_side_files_that_were_deleted_are_made_again(tmp_path, chat):
    mixed(tmp_path)
    known = columns(opened(MIXED, tmp_path, chat))
    for path in (tmp_path / ".index").rglob("*.side"):
        path.unlink()
    with pytest.raises(IndexMissing, match="make index"):
        columns(opened(MIXED, tmp_path, chat, make=False))
    assert columns(opened(MIXED, tmp_path, chat)) == known


@pytest.mark.parametrize("what", ["tokenizer", "prompt", "hearing"])
def test_the_index_of_another_reading_is_never_used(tmp_path, chat, what):
    mixed(tmp_path)
    reading = {"card": MIXED, "chat": chat, "clips": "heard"}
    opened(MIXED, tmp_path, chat)
    if what == "tokenizer":
        chat.save(tmp_path / "tokenizer")
        reading["chat"] = Chat(str(tmp_path / "tokenizer"), "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")
        reading["chat"].tokenizer.add_tokens(["Basque"])
    elif what == "prompt":
        reading["card"] = replace(MIXED, prompts=["Write it all down.", "Say {source}."])
    else:
        reading["clips"] = "left_out"
    with pytest.raises(IndexMissing, match=r"3 of 3 shards .*/0\.tar first; run `make index`"):
        opened(root=tmp_path, make=False, **reading)
    before = side_files(tmp_path)
    assert len(opened(root=tmp_path, **reading))
    assert len(side_files(tmp_path)) == 2 * len(before)
    assert columns(opened(MIXED, tmp_path, chat, make=False)) == columns(opened(MIXED, tmp_path, chat))


def test_another_maximal_length_needs_no_new_side_files(tmp_path, chat):
    mixed(tmp_path)
    short = opened(MIXED, tmp_path, chat, 1.0)
    written = side_files(tmp_path)
    long = opened(MIXED, tmp_path, chat, 2.0, make=False)
    assert side_files(tmp_path) == written
    assert (short.summary.reasons["too long"], "too long" in long.summary.reasons) == (2, False)
    assert len(long) + len(long.held_out) == len(short) + len(short.held_out) + 2
    assert short.summary.fingerprint != long.summary.fingerprint
    assert {r.key for r in short.held_out} <= {r.key for r in long.held_out}
    assert train_keys(opened(MIXED, tmp_path, chat, 1.0, make=False)) == train_keys(short)


def test_indexing_that_was_stopped_goes_on_where_it_was(tmp_path, chat):
    """Shards that are done are not read again; a torn file of the stopped process is no side file."""
    for n in range(4):
        write(tmp_path / f"{n}.tar", good(f"a{n}", f"b{n}"))
    bad = replace(CARD, prompts=["Write {text}."])
    write(tmp_path / "2.tar", [("x.flac", SOUND), ("x.json", b'{"source": "s"}')])
    with pytest.raises(ManifestError):  # stops at the third shard
        opened(bad, tmp_path, chat)
    done = side_files(tmp_path)
    assert len(done) == 2
    assert not list(tmp_path.rglob("table.*.json"))
    folder = tmp_path / ".index" / "c"
    torn = (folder / next(iter(done))).read_bytes()[:100]
    (folder / next(iter(done)).replace(".side", ".77.part").replace("0-", "3-")).write_bytes(torn)
    write(tmp_path / "2.tar", good("x"))
    with pytest.raises(IndexMissing, match=r"2 of 4 shards .*/2\.tar first"):
        opened(bad, tmp_path, chat, make=False)
    corpus = opened(bad, tmp_path, chat)
    after = side_files(tmp_path)
    assert {name: after[name] for name in done} == done
    assert len(after) == 4
    assert train_keys(corpus) == ["a0", "b0", "a1", "b1", "x", "a3", "b3"]


def _index_for_ever(root: Path, chat, folder: Path) -> None:
    while True:
        opened(CARD, root, chat, folder=folder)
        shutil.rmtree(folder)


def test_a_killed_process_leaves_no_side_file_that_is_not_whole(tmp_path, chat):
    for n in range(3):
        write(tmp_path / f"{n}.tar", good(*(f"{n}-{k}" for k in range(20))))
    known = columns(opened(CARD, tmp_path, chat, folder=tmp_path / "good"))
    context = multiprocessing.get_context("fork")
    for wait in (0.02, 0.05, 0.11, 0.16, 0.23):
        folder = tmp_path / f"killed-{wait}"
        child = context.Process(target=_index_for_ever, args=(tmp_path, chat, folder))
        child.start()
        child.join(wait)
        child.kill()
        child.join()
        assert columns(opened(CARD, tmp_path, chat, folder=folder)) == known


def test_parallel_workers_make_the_same_index(tmp_path, chat):
    mixed(tmp_path, shards=5)
    one = opened(MIXED, tmp_path, chat, folder=tmp_path / "one")
    two = opened(MIXED, tmp_path, chat, folder=tmp_path / "two", workers=2)
    assert columns(one) == columns(two)
    assert one.summary == two.summary
    assert (train_keys(one), one.held_out, list(one.skipped())) == (train_keys(two), two.held_out, list(two.skipped()))
    names = [sorted(p.relative_to(tmp_path / f) for p in (tmp_path / f).rglob("*.*")) for f in ("one", "two")]
    assert names[0] == names[1]


def test_shards_of_the_same_name_do_not_share_a_side_file(tmp_path, chat):
    write(tmp_path / "a" / "0.tar", good("a"))
    write(tmp_path / "b" / "0.tar", good("b"))
    for n in "ab":  # also of the same size and date
        os.utime(tmp_path / n / "0.tar", (1_900_000_000, 1_900_000_000))
    both = opened(replace(CARD, shards="{a,b}/0.tar"), tmp_path, chat)
    assert train_keys(both) == ["a", "b"]
    assert len(side_files(tmp_path)) == 2
    alone = [opened(replace(CARD, shards="0.tar"), tmp_path / n, chat, folder=tmp_path / "index") for n in "ab"]
    assert [train_keys(c) for c in alone] == [["a"], ["b"]]


def test_an_index_is_never_sent_to_another_process(tmp_path, chat):
    write(tmp_path / "0.tar", good("a"))
    with pytest.raises(TypeError, match="inherited by forked workers, never sent"):
        pickle.dumps(opened(CARD, tmp_path, chat))


def test_where_the_index_of_a_root_lies(tmp_path):
    assert index_folder("", str(tmp_path)) == tmp_path / ".index"
    assert index_folder("/x", "http://h/data") == Path("/x")
    with pytest.raises(UserError, match=r"data\.index: name a local folder for the index of http://h/data"):
        index_folder("", "http://h/data")


# -- damage ------------------------------------------------------------------------------------------------------------


def test_damage_is_named_with_its_shard_and_the_rest_is_there(tmp_path, chat):
    write(tmp_path / "0.tar", good("a", "b"))
    data = write(tmp_path / "1.tar", good("c", "d")).read_bytes()
    (tmp_path / "1.tar").write_bytes(data[: len(data.rstrip(b"\0")) - 100])
    (tmp_path / "2.tar").write_bytes(b"no tar at all" * 100)
    for make in (True, False):  # from the shards, then from the table
        corpus = opened(CARD, tmp_path, chat, make=make)
        assert train_keys(corpus) == ["a", "b", "c"]
        assert corpus.summary.reasons == {"no json": 1}
        cut, none = corpus.summary.damage
        assert cut.startswith(f"{tmp_path / '1.tar'}: cut off ")
        assert none == f"{tmp_path / '2.tar'}: damaged from byte 0 to the end, at byte 1300"


def test_a_shard_that_changes_under_a_run_is_a_hole_and_no_wrong_record(tmp_path, chat):
    path = write(tmp_path / "0.tar", good("a", "b"))
    corpus = opened(CARD, tmp_path, chat)
    place = corpus.place(1)
    data = path.read_bytes()
    path.write_bytes(data[: place.offset] + b"\0" * place.size + data[place.offset + place.size :])
    with pytest.raises(Skip, match="json unreadable"):
        corpus.read(1)
    two = b'{"source":"s","text":["a","b"]}'  # another number of answers, in as many bytes
    with pytest.raises(Skip, match="differs from index"):
        corpus.read(1, data[place.offset : place.offset + place.size - len(content())] + two.ljust(len(content())))
    path.write_bytes(data[: place.offset + 10])
    with pytest.raises(Unreachable, match=r"0\.tar: ends before byte"):
        corpus.read(1)
    path.unlink()
    corpus.read(0)  # of the open file
    storage._descriptor.cache_clear()
    with pytest.raises(StorageError, match=r"0\.tar is not there"):
        corpus.read(0)


# -- over HTTP ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(storage, "DEADLINE_S", 2.0)
    mixed(tmp_path / "data")
    made = Server(tmp_path / "data")
    yield made
    made.close()


@pytest.mark.parametrize("pattern", ["*.tar", "{0..2}.tar"])
@pytest.mark.parametrize("workers", [1, 2])
def test_an_index_over_http_reads_equal_to_the_local_one(server, tmp_path, chat, pattern, workers):
    card = replace(MIXED, shards=pattern)
    local = opened(card, server.root, chat, folder=tmp_path / "local")
    remote = opened(card, server.url, chat, folder=tmp_path / "remote", workers=workers)
    assert columns(remote) == columns(local)
    assert remote.summary.fingerprint == local.summary.fingerprint
    assert list(remote.skipped()) == list(local.skipped())
    for number in range(len(local)):
        place = remote.place(number)
        assert place == local.place(number)._replace(path=place.path)
        assert place.path.startswith(server.url)
        (ours, ours_audio), (theirs, theirs_audio) = local.read(number), remote.read(number)
        assert (ours_audio, ours.key, ours.variants) == (theirs_audio, theirs.key, theirs.variants)
        assert theirs.audio.read() == ours_audio
    assert [r.key for r in remote.held_out] == [r.key for r in local.held_out]
    assert all(r for m, p, r in server.asked if m == "GET" and p.endswith(".tar"))  # ranges only
    again = opened(card, server.url, chat, folder=tmp_path / "remote", make=False)
    assert columns(again) == columns(local)


def test_a_copy_that_came_short_is_not_the_damage_of_a_shard(server, tmp_path, chat):
    """Written down, it would be refused for ever, or with data.damaged=keep train on half of the shard."""
    card = replace(MIXED, shards="0.tar")
    server.faulty = ("GET",)
    server.faults = [SHORT]
    try:
        corpus = opened(card, server.url, chat, folder=tmp_path / "remote")
    except StorageError:
        corpus = opened(card, server.url, chat, folder=tmp_path / "remote")
    assert corpus.summary.damage == ()
    assert columns(corpus) == columns(opened(card, server.root, chat, folder=tmp_path / "local"))


def test_a_shard_that_changed_on_its_server_is_indexed_anew(server, tmp_path, chat):
    card = replace(CARD, shards="0.tar")
    write(server.root / "0.tar", good("a"))
    opened(card, server.url, chat, folder=tmp_path / "remote")
    write(server.root / "0.tar", good("b"))
    os.utime(server.root / "0.tar", (2_000_000_000, 2_000_000_000))
    with pytest.raises(IndexMissing, match=rf"{server.url}/0\.tar first; run `make index`"):
        opened(card, server.url, chat, folder=tmp_path / "remote", make=False)
    assert train_keys(opened(card, server.url, chat, folder=tmp_path / "remote")) == ["b"]


def test_a_range_that_never_comes_is_unreachable(server, tmp_path, chat):
    corpus = opened(replace(MIXED, shards="0.tar"), server.url, chat, folder=tmp_path / "remote")
    place: Place = corpus.place(0)
    server.always = 500
    with pytest.raises(Unreachable, match=place.path):
        corpus.read(0)


# -- fingerprint -------------------------------------------------------------------------------------------------------


def test_fingerprint_changes_with_whatever_the_order_depends_on(tmp_path, chat):
    same = list(range(200))
    variations = {
        "first": {"order": same}, "again": {"order": same}, "fewer": {"order": same[:-1]}, "order": {"order": same[::-1]},
        "counts": {"order": same, "text": "a longer tone"},
    }  # fmt: skip
    prints = {}
    for name, kwargs in variations.items():
        grouped(tmp_path / name, **kwargs)
        prints[name] = opened(TEXT_CARD, tmp_path / name, chat).summary.fingerprint
    prints["held out"] = opened(
        replace(TEXT_CARD, held_out=HeldOut("source", 0.3, 20)), tmp_path / "first", chat
    ).summary.fingerprint
    assert prints.pop("again") == prints["first"]
    assert len(set(prints.values())) == len(prints)


def test_fingerprint_changes_with_shards_and_audio(tmp_path, chat):
    """Records are shuffled shard by shard: the same records in other shards come in another order."""
    prints = set()
    for name, shards in {"one": ["ab"], "two": ["a", "b"], "three": ["", "ab"]}.items():
        for number, inside in enumerate(shards):
            write(tmp_path / name / f"{number}.tar", good(*inside))
        prints.add(opened(CARD, tmp_path / name, chat).summary.fingerprint)
    longer = [(f"{k}.{e}", d) for k in "ab" for e, d in (("flac", flac(tone(0.4, 0))), ("json", content()))]
    write(tmp_path / "four" / "0.tar", longer)
    assert len(prints | {opened(CARD, tmp_path / "four", chat).summary.fingerprint}) == 4
