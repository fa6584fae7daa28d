"""The index finds every record of a shard or says what it left out and why; nothing vanishes silently."""

import json
import tarfile
from collections import Counter
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import webdataset

from midasheng.data.index import Record, ShardError, index_corpus, scan
from midasheng.data.manifest import Card, HeldOut, ManifestError
from tests.conftest import flac, tone

SOUND = flac(tone(0.3, 0))
CARD = Card("c", "asr", "*.tar", "none", prompts=["Write."], answer="text")
TEXT_CARD = replace(CARD, audio=False, held_out=HeldOut("source", 0.3, 40))


def content(**changes: object) -> bytes:
    return json.dumps({"source": "s", "text": "a tone", **changes}).encode()


def write(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    return path


def good(*keys: str) -> list[tuple[str, bytes]]:
    return [member for key in keys for member in ((f"{key}.flac", SOUND), (f"{key}.json", content()))]


def keys(path: Path) -> list[str]:
    return list(scan.__wrapped__(str(path), (0, 0)).records)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves the shard open
def test_same_records_as_webdataset(tmp_path):
    path = write(tmp_path / "a.tar", [*good("a", "sub/b", "sub.dir/c"), ("d.FLAC", SOUND), ("d.json", content())])
    shard = scan(str(path), (0, 0))
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert list(shard.records) == [r["__key__"] for r in theirs] == ["a", "sub/b", "sub.dir/c", "d"]
    for record in theirs:
        ours = {extension: place.read() for extension, place in shard.records[record["__key__"]].items()}
        assert ours == {k: v for k, v in record.items() if not k.startswith("__")}


@pytest.mark.parametrize("data", [b"", b"garbage" * 999, b"\x1f\x8b" + b"\0" * 2000], ids=["empty", "garbage", "gzip"])
def test_no_tar_at_all(tmp_path, data):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ShardError, match=r"a\.tar"):
        keys(tmp_path / "a.tar")


def test_shard_cut_anywhere(tmp_path):
    """Whole, or refused: a cut in a member, in a header, or just before the closing blocks."""
    data = write(tmp_path / "a.tar", good("a", "b", "c")).read_bytes()
    end = len(data.rstrip(b"\0"))
    end += -end % 512
    for cut in [*range(0, end, 512), *range(300, end, 2048), end, end + 300]:
        (tmp_path / "a.tar").write_bytes(data[:cut])
        with pytest.raises(ShardError):
            keys(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(data[: end + 512])
    assert keys(tmp_path / "a.tar") == ["a", "b", "c"]


def test_damaged_header_is_never_a_shorter_shard(tmp_path):
    """webdataset would go on without a word, and without the rest of the shard."""
    path = write(tmp_path / "a.tar", good("a", "b", "c"))
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar]
    damages = [(h, 512, b"\0") for h in headers] + [(h, 1024, b"\0") for h in headers[:-1]]
    damages += [(h + byte, 1, bytes([data[h + byte] ^ 1])) for h in headers for byte in range(0, 512, 37)]
    for start, count, value in damages:
        path.write_bytes(data[:start] + value * count + data[start + count :])
        with pytest.raises(ShardError):
            keys(path)


@pytest.mark.parametrize(
    ("order", "says"),
    [
        (["a.flac", "b.flac", "a.json", "b.json"], "members of record a do not lie together"),
        (["a.flac", "a.json", "a.flac", "a.json"], "holds a.flac twice"),
    ],
)
def test_mixed_up_members(tmp_path, order, says):
    members = dict(good("a", "b"))
    with pytest.raises(ShardError, match=says):
        keys(write(tmp_path / "a.tar", [(name, members[name]) for name in order]))


def test_links(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("b.flac")
        link.type, link.linkname = tarfile.LNKTYPE, "a.flac"
        tar.addfile(link)
    with pytest.raises(ShardError, match=r"b\.flac is a link"):
        keys(tmp_path / "a.tar")


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
    ],
)
def test_unusable_record_is_left_out_and_counted(tmp_path, chat, members, reason):
    write(tmp_path / "a.tar", good("a") + members + good("b"))
    index = index_corpus(CARD, tmp_path, chat, 1.0)
    assert [r.key for r in index.train] == ["a", "b"]
    assert index.skipped == (("x", reason),)
    assert index.reasons() == {reason: 1}
    (tmp_path / "a.tar").unlink()
    write(tmp_path / "b.tar", members)
    with pytest.raises(ManifestError, match=rf"no record can be trained on \(left out: {{'{reason}': 1}}"):
        index_corpus(CARD, tmp_path, chat, 1.0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"answer": "caption"}, "asks for JSON field `caption`; there are"),
        ({"prompts": ["Write {lang}."]}, "asks for JSON field 'lang'"),
        ({"prompts": ["Write {}."]}, "a brace itself is written twice"),
        ({"prompts": [], "answer": "", "pairs": "text"}, "`text` is no list of {question, answer}"),
        ({"prompts": [], "answer": "", "pairs": "halves"}, "`halves` is no list of {question, answer}"),
        ({"held_out": HeldOut("speaker", 0.1, 9)}, "held_out.by of c asks for JSON field `speaker`"),
    ],
)
def test_card_that_does_not_fit_its_records(tmp_path, chat, changes, says):
    write(tmp_path / "a.tar", [("a.flac", SOUND), ("a.json", content(halves=[{"question": "?"}]))])
    with pytest.raises(ManifestError, match=says):
        index_corpus(replace(CARD, **changes), tmp_path, chat, 1.0)


def test_variants(tmp_path, chat):
    pairs = [{"question": "A?", "answer": "yes"}, {"question": "Is it so?", "answer": "no"}]
    write(tmp_path / "a.tar", [("a.flac", SOUND), ("a.json", content(captions=["one", "", "two"], pairs=pairs))])
    card = replace(CARD, prompts=["Write {source}.", "{{}}"], answer="captions")
    (record,) = index_corpus(card, tmp_path, chat, 1.0).train
    said = [(v.turns[0].text, v.turns[1].text) for v in record.variants]
    assert said == [("Write s.", "one"), ("Write s.", "two"), ("{}", "one"), ("{}", "two")]
    assert all(v.turns[0].clips == 1 for v in record.variants)
    (record,) = index_corpus(replace(CARD, prompts=[], answer="", pairs="pairs"), tmp_path, chat, 1.0).train
    assert [(v.turns[0].text, v.turns[1].text) for v in record.variants] == [("A?", "yes"), ("Is it so?", "no")]


# -- clips heard, left out or told ------------------------------------------------------------------------------------

TOLD_CARD = replace(CARD, context="{source}: {text}")


def said(record: Record) -> list[tuple[str, str, str]]:
    """(words that stand for the clip, question, answer) of each variant."""
    return [(v.turns[0].told, v.turns[0].text, v.turns[1].text) for v in record.variants]


def test_told_is_every_conversation_both_with_its_context_in_words_and_without(tmp_path, chat):
    write(tmp_path / "a.tar", [("a.flac", SOUND), ("a.json", content(captions=["one", "two"]))])
    card = replace(TOLD_CARD, prompts=["Write.", "Say {source}."], answer="captions")
    bare = [("", question, answer) for question in ("Write.", "Say s.") for answer in ("one", "two")]
    (record,) = index_corpus(card, tmp_path, chat, 1.0, "told").train
    assert sorted(said(record)) == sorted(bare + 2 * [("s: a tone", q, a) for _, q, a in bare])  # two of three
    (record,) = index_corpus(replace(card, context=""), tmp_path, chat, 1.0, "told").train
    assert said(record) == bare  # a card that has no words for its clip


@pytest.mark.parametrize("clips", ["left_out", "told"])
def test_a_clip_that_is_not_heard_leaves_no_slots_and_is_not_even_read(tmp_path, chat, clips):
    """Also where it would be too long, broken or not there: the text is all there is."""
    members = [("b.flac", flac(tone(1.5, 0))), ("b.json", content()), ("c.flac", b"x" * 99), ("c.json", content())]
    write(tmp_path / "a.tar", [*good("a"), *members, ("d.json", content())])
    index = index_corpus(TOLD_CARD, tmp_path, chat, 1.0, clips)
    assert [r.key for r in index.train] == ["a", "b", "c", "d"]
    for record in index.train:
        assert (record.audio, record.n_samples, record.frames) == (None, 0, 0)
        expected = [("", "Write.", "a tone"), *2 * [("s: a tone", "Write.", "a tone")]]
        assert said(record) == (expected if clips == "told" else expected[:1])
        for number, variant in enumerate(record.variants):
            assert [t.clips for t in variant.turns] == [0, 0]
            encoded = chat.encode(variant.turns, [])
            assert len(encoded.ids) == variant.slots == record.slots(number)
            assert not encoded.is_audio.any()
            assert chat.audio not in encoded.ids
            assert (chat.audio_bos in encoded.ids) == bool(number)
            assert variant.targets == record.variants[0].targets


def test_heard_is_what_it_was_whatever_the_context(tmp_path, chat):
    write(tmp_path / "a.tar", good("a", "b"))
    plain, with_context = (index_corpus(card, tmp_path, chat, 1.0) for card in (CARD, TOLD_CARD))
    assert plain.train == with_context.train == index_corpus(TOLD_CARD, tmp_path, chat, 1.0, "heard").train
    assert plain.fingerprint() == with_context.fingerprint()
    assert said(plain.train[0]) == [("", "Write.", "a tone")]
    assert plain.train[0].variants[0].turns[0].clips == 1
    assert plain.train[0].slots(0) > plain.train[0].variants[0].slots
    prints = {index_corpus(TOLD_CARD, tmp_path, chat, 1.0, clips).fingerprint() for clips in ("left_out", "told")}
    assert len(prints | {plain.fingerprint()}) == 3  # a resume under another data.clips would be another plan


def test_the_same_records_are_held_out_whatever_is_heard(tmp_path, chat):
    """Text pretraining must not see the words of what is validated on later."""
    (tmp_path / "a").mkdir()
    members = [(f"{n}.{e}", b) for n in range(40) for e, b in (("flac", SOUND), ("json", content(source=f"s{n % 20}")))]
    write(tmp_path / "a" / "a.tar", members)
    card = replace(TOLD_CARD, held_out=HeldOut("source", 0.4, 40))
    out = [
        {r.key for r in index_corpus(card, tmp_path / "a", chat, 1.0, clips).held_out}
        for clips in ("heard", "left_out", "told")
    ]
    assert out[0] == out[1] == out[2] != set()


def test_the_field_that_must_be_alike_is_kept_and_must_be_there(tmp_path, chat):
    write(tmp_path / "a.tar", [("a.flac", SOUND), ("a.json", content(language="en", number=7))])
    for field, value in {"": "", "language": "en", "number": "7"}.items():
        (record,) = index_corpus(replace(CARD, alike=field), tmp_path, chat, 1.0).train
        assert record.alike == value
    with pytest.raises(ManifestError, match=r"a.json: card c asks for JSON field `voice`; there are .*'language'"):
        index_corpus(replace(CARD, alike="voice"), tmp_path, chat, 1.0)
    with pytest.raises(ManifestError, match=r"asks for JSON field 'voice'"):
        index_corpus(replace(CARD, context="{voice}"), tmp_path, chat, 1.0, "told")


def test_a_corpus_that_is_only_looked_at_may_be_held_out_as_a_whole(tmp_path, chat):
    write(tmp_path / "a.tar", good("a", "b"))
    card = replace(CARD, held_out=HeldOut("source", 1.0, 100))
    with pytest.raises(ManifestError, match="no record can be trained on"):
        index_corpus(card, tmp_path, chat, 1.0)
    index = index_corpus(card, tmp_path, chat, 1.0, trains=False)
    assert ([r.key for r in index.held_out], index.train) == (["a", "b"], ())


# -- held out ---------------------------------------------------------------------------------------------------------


def grouped(path: Path, order: list[int], shards: int = 2, *, text: str = "a tone") -> None:
    """Records without audio; record n is of source n // 4."""
    path.mkdir()
    for shard in range(shards):
        records = {n: content(source=f"source {n // 4}", text=text, long=n % 3) for n in order[shard::shards]}
        write(path / f"{shard}.tar", [(f"{n}.json", record) for n, record in records.items()])


def held_out(card: Card, path: Path, chat) -> set[str]:
    index = index_corpus(card, path, chat, 1.0)
    out, train = {r.key for r in index.held_out}, {r.key for r in index.train}
    assert not out & train
    assert len(out | train) + len(index.skipped) == 200
    return out


def test_held_out_are_whole_groups_up_to_the_maximum(tmp_path, chat):
    grouped(tmp_path / "a", list(range(200)))
    groups = {}
    for share, most in ((0.3, 1000), (0.3, 40), (0.3, 42), (0.0, 40)):
        out = held_out(replace(TEXT_CARD, held_out=HeldOut("source", share, most)), tmp_path / "a", chat)
        assert len(out) <= most
        assert set(Counter(int(k) // 4 for k in out).values()) <= {4}, "a source on both sides"
        groups[share, most] = out
    assert 40 < len(groups[0.3, 1000]) < 80
    assert groups[0.3, 40] == groups[0.3, 42] < groups[0.3, 1000]
    assert len(groups[0.3, 40]) == 40
    assert not groups[0.0, 40]


def test_held_out_do_not_depend_on_order_or_shards(tmp_path, chat):
    grouped(tmp_path / "a", list(range(200)))
    grouped(tmp_path / "b", np.random.default_rng(0).permutation(200).tolist(), shards=5)
    assert held_out(TEXT_CARD, tmp_path / "a", chat) == held_out(TEXT_CARD, tmp_path / "b", chat)


def test_cards_of_the_same_shards_hold_out_the_same_records(tmp_path, chat):
    """Also where one of them can use fewer records: otherwise one corpus trains on what the other validates on."""
    grouped(tmp_path / "a", list(range(200)))
    for n in (0, 1):  # for one card a third of the records has no answer
        with tarfile.open(tmp_path / "a" / f"{n}.tar") as tar:
            records = [(m.name, json.loads(tar.extractfile(m).read())) for m in tar]
        write(tmp_path / "a" / f"{n}.tar", [(k, content(**r, few="yes" if r["long"] else "")) for k, r in records])
    many, few = TEXT_CARD, replace(TEXT_CARD, name="few", answer="few")
    all_out, few_out = (held_out(card, tmp_path / "a", chat) for card in (many, few))
    train = {r.key for r in index_corpus(few, tmp_path / "a", chat, 1.0).train}
    assert few_out < all_out
    assert not all_out & train


# -- fingerprint ------------------------------------------------------------------------------------------------------


def test_fingerprint_changes_with_whatever_the_order_depends_on(tmp_path, chat):
    same = list(range(200))
    variations = {
        "first": {"order": same}, "again": {"order": same}, "fewer": {"order": same[:-1]}, "order": {"order": same[::-1]},
        "counts": {"order": same, "text": "a longer tone"},
    }  # fmt: skip
    prints = {}
    for name, kwargs in variations.items():
        grouped(tmp_path / name, **kwargs)
        prints[name] = index_corpus(TEXT_CARD, tmp_path / name, chat, 1.0).fingerprint()
    assert prints.pop("again") == prints["first"]
    assert len(set(prints.values())) == len(prints)


def test_fingerprint_changes_with_shards_and_audio(tmp_path, chat):
    """Records are shuffled shard by shard: the same records in other shards come in another order."""
    prints = set()
    for name, shards in {"one": ["ab"], "two": ["a", "b"], "three": ["", "ab"]}.items():
        (tmp_path / name).mkdir()
        for number, inside in enumerate(shards):
            write(tmp_path / name / f"{number}.tar", good(*inside))
        index = index_corpus(CARD, tmp_path / name, chat, 1.0)
        prints.add(index.fingerprint())
    longer = tuple(replace(r, n_samples=r.n_samples + 1) for r in index.train)
    assert len(prints | {replace(index, train=longer).fingerprint()}) == 4
