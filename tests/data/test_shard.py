"""Every record of a shard is found, or it is said what is wrong and where; nothing vanishes silently."""

import os
import tarfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import webdataset

from midasheng.data.manifest import HeldOut, ManifestError
from midasheng.data.shard import Reading, SideFile, index_shard, is_whole, scan, side_path
from midasheng.data.storage import ShardFile, list_shards
from tests.conftest import flac, record, tone, write_shard
from tests.data.shards import CARD, SOUND, content, good, write


def found(path: Path) -> dict[str, str]:
    """Key -> why it cannot be used, of every record."""
    return {f.key: f.reason for f in scan(str(path))[0]}


def damage(path: Path) -> list[str]:
    return scan(str(path))[1]


def headers(path: Path) -> list[int]:
    with tarfile.open(path) as tar:
        return [member.offset for member in tar]


def end_of(data: bytes) -> int:
    """Where the last member ends, its padding included."""
    end = len(data.rstrip(b"\0"))
    return end + -end % 512


# -- whole shards ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves the shard open
def test_same_records_as_webdataset(tmp_path):
    names = ["a", "sub/b", "sub.dir/c", "ключ é 鍵", "x" * 150]
    path = write(tmp_path / "a.tar", [*good(*names), ("d.FLAC", SOUND), ("d.json", content())])
    records, wrong = scan(str(path))
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert wrong == []
    assert [r.key for r in records] == [r["__key__"] for r in theirs] == [*names, "d"]
    data = path.read_bytes()
    for ours, their in zip(records, theirs, strict=True):
        assert ours.reason == ""
        assert {e: data[s.offset : s.offset + s.size] for e, s in ours.members.items()} == {
            k: v for k, v in their.items() if not k.startswith("__")
        }


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_style_of_tar(tmp_path, style):
    keys = ["a", "folder/" * 12 + "k" * 60, "é"]
    with tarfile.open(tmp_path / "a.tar", "w", format=style) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in [*good(*keys), ("README", b"no record"), (".hidden", b"")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if style == tarfile.PAX_FORMAT:
                info.mtime = 1.5  # an extended header before each member, as webdataset writes by default
            tar.addfile(info, BytesIO(data))
    assert found(tmp_path / "a.tar") == dict.fromkeys(keys, "")
    assert damage(tmp_path / "a.tar") == []


def test_a_shard_without_a_record_is_whole(tmp_path):
    assert scan(str(write(tmp_path / "a.tar", []))) == ([], [])


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"garbage" * 999, b"\x1f\x8b" + b"\0" * 2000], ids=["empty", "garbage", "gzip"])
def test_no_tar_at_all(tmp_path, data):
    (tmp_path / "a.tar").write_bytes(data)
    records, wrong = scan(str(tmp_path / "a.tar"))
    assert (records, len(wrong)) == ([], 1)
    assert f"at byte {len(data)}" in wrong[0]


@pytest.mark.parametrize("extended", [False, True], ids=["plain headers", "extended headers"])
def test_shard_cut_anywhere(tmp_path, extended):
    """Whole, or damaged: a cut in a member, in a header, in padding, or just before the closing blocks."""
    path = tmp_path / "a.tar"
    if extended:
        with webdataset.TarWriter(str(path)) as tar:  # its time of day needs an extended header
            for key in "abc":
                tar.write({"__key__": key, "flac": SOUND, "json": content()})
        assert len(headers(path)) * 1024 < path.stat().st_size - 3 * len(SOUND) - 3 * len(content())
    else:
        write(path, good("a", "b", "c"))
    data = path.read_bytes()
    end = end_of(data)
    rng = np.random.default_rng(0)
    edges = [h + more for h in headers(path) for more in (0, 1, 511, 512, 513, 1024, 1536)]
    cuts = {*range(0, end, 512), *(e for e in edges if e < end), *rng.integers(0, end, 40).tolist(), end - 1, end}
    for cut in [*sorted(cuts), end + 1, end + 300, end + 511]:
        path.write_bytes(data[:cut])
        records, wrong = scan(str(path))
        assert wrong, f"cut at {cut} of {end}: {len(records)} records and not a word"
        assert str(cut) in wrong[-1]
        assert all(s.offset + s.size <= cut for r in records for s in r.members.values())
    for cut in (end + 512, end + 700, end + 1024, len(data)):
        path.write_bytes(data[:cut])
        assert (list(found(path)), damage(path)) == (["a", "b", "c"], [])


def test_a_cut_shard_keeps_the_records_before_the_cut(tmp_path):
    path = write(tmp_path / "a.tar", good("a", "b", "c"))
    data, start = path.read_bytes(), headers(path)[4]  # c.flac
    path.write_bytes(data[: start + 700])
    assert found(path) == {"a": "", "b": ""}
    assert damage(path) == [f"cut off inside c.flac, at byte {start + 700}"]


def test_reading_goes_on_behind_a_damaged_header_and_the_damage_names_the_byte(tmp_path):
    """webdataset would go on without a word, and without the rest of the shard."""
    path = write(tmp_path / "a.tar", good("a", "b", "c", "d"))
    data, starts = path.read_bytes(), headers(path)
    path.write_bytes(data[: starts[2]] + b"\xff" * 512 + data[starts[2] + 512 :])  # b.flac
    assert damage(path) == [f"damaged at byte {starts[2]}, read on at byte {starts[3]}"]
    members = {f.key: sorted(f.members) for f in scan(str(path))[0]}
    assert members == {"a": ["flac", "json"], "b": ["json"], "c": ["flac", "json"], "d": ["flac", "json"]}
    both = data[: starts[2]] + b"\xff" * 512 + data[starts[2] + 512 : starts[5]] + b"\0" * 512 + data[starts[5] + 512 :]
    path.write_bytes(both)  # and c.json
    assert damage(path) == [
        f"damaged at byte {starts[2]}, read on at byte {starts[3]}",
        f"damaged at byte {starts[5]}, read on at byte {starts[6]}",
    ]
    assert [f.key for f in scan(str(path))[0]] == ["a", "b", "c", "d"]
    path.write_bytes(data[: starts[6]] + b"\xff" * (len(data) - starts[6]))
    assert damage(path) == [f"damaged from byte {starts[6]} to the end, at byte {len(data)}"]
    assert list(found(path)) == ["a", "b", "c"]


def test_a_damaged_header_is_never_a_shorter_shard(tmp_path):
    path = write(tmp_path / "a.tar", good("a", "b", "c"))
    data, starts = path.read_bytes(), headers(path)
    damages = [(h, 512, b"\0") for h in starts] + [(h, 1024, b"\0") for h in starts[:-1]]
    damages += [(h + byte, 1, bytes([data[h + byte] ^ 1])) for h in starts for byte in range(0, 512, 37)]
    for start, count, value in damages:
        path.write_bytes(data[:start] + value * count + data[start + count :])
        assert damage(path), f"byte {start}"


@pytest.mark.parametrize("extended", [False, True], ids=["plain headers", "extended headers"])
def test_no_flipped_bytes_make_the_scan_fail_or_lose_a_record_silently(tmp_path, extended):
    """A flip in a sound is found when it is decoded; one in a header is damage, or the record is still there."""
    path = tmp_path / "a.tar"
    rng = np.random.default_rng(1)
    with tarfile.open(path, "w") as tar:
        for name, data in [(k, b"x" * 40) for key in "abcd" for k in (f"{key}.flac", f"{key}.json")]:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1.5 if extended else 0
            tar.addfile(info, BytesIO(data))
    data = path.read_bytes()
    end = end_of(data)
    whole = {f.key: f.members for f in scan(str(path))[0]}
    for _ in range(400):
        broken = bytearray(data)
        for at in rng.integers(0, end, rng.integers(1, 4)).tolist():
            broken[at] = rng.integers(0, 256)
        path.write_bytes(broken)
        records, wrong = scan(str(path))
        assert wrong or {f.key: f.members for f in records} == whole


# -- records that cannot be used ---------------------------------------------------------------------------------------


def test_members_that_do_not_lie_together(tmp_path):
    """One range of bytes must hold a record: it is read whole."""
    members = dict(good("a", "b", "c"))
    order = ["a.flac", "b.flac", "a.json", "b.json", "c.flac", "c.json"]
    path = write(tmp_path / "a.tar", [(name, members[name]) for name in order])
    assert found(path) == {"a": "members apart", "b": "members apart", "c": ""}
    assert damage(path) == []


def test_a_member_that_is_there_twice(tmp_path):
    path = write(tmp_path / "a.tar", [*good("a"), ("a.FLAC", SOUND), *good("b")])
    assert found(path) == {"a": "member twice", "b": ""}


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE])
def test_a_link(tmp_path, kind):
    """tarfile follows it to another member; the bytes at its place are not its own."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in [*good("a"), ("b.flac", None), ("b.json", content()), *good("c")]:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type, info.linkname = kind, "a.flac"
            else:
                info.size = len(data)
            tar.addfile(info, BytesIO(data or b""))
    assert found(tmp_path / "a.tar") == {"a": "", "b": "a link", "c": ""}


# -- side files --------------------------------------------------------------------------------------------------------


def side_of(tmp_path: Path, reading: Reading) -> tuple[SideFile, Path]:
    (shard,) = list_shards(str(tmp_path), "a.tar")
    path = side_path(tmp_path / "index", reading, shard)
    index_shard(path, reading, shard)
    return SideFile(path), path


def test_the_columns_of_every_record_are_those_of_its_conversations(tmp_path, chat):
    """Also behind records that are left out, with or without variants of their own: none leaks into its neighbour."""
    members = []
    for n in range(9):
        if n in (2, 5):
            members += [(f"{n}.json", b"{")]
        elif n in (3, 6):
            members += [(f"{n}.flac", b"noise"), (f"{n}.json", content(captions=["never"] * 4))]
        else:
            said = [f"caption {k} of {n}" * (k + 1) for k in range(n % 4 + 1)]
            members += [(f"{n}.flac", flac(tone(0.3 + n / 20, n))), (f"{n}.json", content(captions=said))]
    write(tmp_path / "a.tar", members)
    card = replace(CARD, prompts=["Write.", "Say it."], answer="captions")
    side, _ = side_of(tmp_path, Reading(card, chat))
    until = side["until"]
    for n in range(9):
        counts = [(int(s), int(t)) for s, t in zip(side["slots"], side["targets"], strict=True)]
        own = counts[until[n - 1] if n else 0 : until[n]]
        assert side.key(n) == str(n)
        if n in (2, 3, 5, 6):
            assert (own, side["reason"][n] > 0) == ([], True)
        else:
            words = [f"caption {k} of {n}" * (k + 1) for k in range(n % 4 + 1)]
            assert own == [
                (len(chat.text("user\n")) + 6 + len(chat.text(p)) + 2 * len(chat.text("\n")) - 1
                 + len(chat.text("assistant\n")) + len(chat.text(w)), len(chat.text(w)) + 1)
                for p in card.prompts for w in words
            ]  # fmt: skip
            assert side["n_samples"][n] == round((0.3 + n / 20) * 16_000)
    assert until[-1] == len(side["slots"])


def test_a_place_holds_the_json_and_the_audio(tmp_path, chat):
    path = write(
        tmp_path / "a.tar", [*good("a"), ("b.json", content(text="first")), ("b.txt", b"y"), ("b.flac", SOUND)]
    )
    side, _ = side_of(tmp_path, Reading(CARD, chat))
    data = path.read_bytes()
    for n, text in enumerate([content(), content(text="first")]):
        start, size = side["span"][n]
        whole = data[start : start + size]
        assert [whole[o : o + s] for o, s in (side["json"][n], side["audio"][n])] == [text, SOUND]


def test_a_side_file_is_named_after_all_it_depends_on(tmp_path, chat):
    """Made for another tokenizer, card or hearing it would be columns of other conversations."""
    shard = ShardFile("/data/a.tar", 10, "1")
    same = side_path(tmp_path, Reading(CARD, chat), shard)
    changes = [
        {"prompts": ["Say."]}, {"answer": "captions"}, {"prompts": [], "answer": "", "pairs": "qa"}, {"context": "{text}"},
        {"audio": False}, {"alike": "language"}, {"held_out": HeldOut("source", 0.1, 9)},
    ]  # fmt: skip
    others = {side_path(tmp_path, Reading(replace(CARD, **c), chat), shard) for c in changes}
    others |= {side_path(tmp_path, Reading(CARD, chat, clips), shard) for clips in ("told", "left_out")}
    others |= {side_path(tmp_path, Reading(CARD, _other(chat, tmp_path)), shard)}
    others |= {side_path(tmp_path, Reading(replace(CARD, name="d"), chat), shard)}
    others |= {side_path(tmp_path, Reading(CARD, chat), ShardFile(p, 10, "1")) for p in ("/b/a.tar", "http://h/a.tar")}
    assert len(others | {same}) == len(changes) + 7
    unrelated = [{"hours": 9.0}, {"licence": "x"}, {"languages": ["en"]}, {"answers": "all"}, {"shards": "a*.tar"}]
    assert {side_path(tmp_path, Reading(replace(CARD, **c), chat), shard) for c in unrelated} == {same}
    rules = [HeldOut("source", 0.9, 1), HeldOut("source", 0.1, 9)]
    assert len({side_path(tmp_path, Reading(replace(CARD, held_out=r), chat), shard) for r in rules}) == 1


def _other(chat, tmp_path: Path):
    from midasheng.data.chat import Chat

    chat.save(tmp_path / "tokenizer")
    other = Chat(str(tmp_path / "tokenizer"), "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")
    other.tokenizer.add_tokens(["Basque"])
    return other


def test_a_side_file_is_of_the_bytes_that_it_was_made_of(tmp_path, chat):
    write(tmp_path / "a.tar", good("a"))
    _, path = side_of(tmp_path, Reading(CARD, chat))
    (shard,) = list_shards(str(tmp_path), "a.tar")
    assert is_whole(path)
    others = (replace(shard, size=shard.size + 1), replace(shard, stamp="1"), replace(shard, path="/b/a.tar"))
    paths = {side_path(tmp_path / "index", Reading(CARD, chat), s) for s in (shard, *others)}
    assert len(paths) == 4
    assert not any(is_whole(p) for p in paths - {path})


@pytest.mark.parametrize("kept", [0, 1, 100, 0.9])
def test_a_torn_side_file_is_none(tmp_path, chat, kept):
    """A machine that lost its power, a full disk: the shard is indexed again."""
    write(tmp_path / "a.tar", good("a"))
    _, path = side_of(tmp_path, Reading(CARD, chat))
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    assert not is_whole(path)


def test_a_side_file_is_there_whole_or_not_at_all(tmp_path, chat, monkeypatch):
    write(tmp_path / "a.tar", good("a"))
    (shard,) = list_shards(str(tmp_path), "a.tar")
    path = side_path(tmp_path / "index", Reading(CARD, chat), shard)

    def torn(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", torn)
    with pytest.raises(OSError, match="no space"):
        index_shard(path, Reading(CARD, chat), shard)
    monkeypatch.undo()
    assert not path.exists()
    assert not is_whole(path)
    index_shard(path, Reading(CARD, chat), shard)
    assert SideFile(path).key(0) == "a"


def test_damage_stands_in_the_side_file(tmp_path, chat):
    path = write(tmp_path / "a.tar", good("a", "b"))
    path.write_bytes(path.read_bytes()[: headers(path)[3]])
    side, _ = side_of(tmp_path, Reading(CARD, chat))
    assert side.about["damage"] == damage(path) != []
    assert [side.key(n) for n in range(2)] == ["a", "b"]
    assert [["", *side.about["reasons"]][code] for code in side["reason"]] == ["", "no json"]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_shard_of_webdataset_is_indexed_with_the_same_bytes(tmp_path, chat):
    write_shard(tmp_path / "a.tar", [(f"tone{n}", flac(tone(0.3, n)), record(n)) for n in range(5)])
    card = replace(CARD, prompts=[], answer="", pairs="questions")
    side, _ = side_of(tmp_path, Reading(card, chat))
    data = (tmp_path / "a.tar").read_bytes()
    for n, theirs in enumerate(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)):
        whole = data[side["span"][n][0] :]
        assert side.key(n) == theirs["__key__"]
        assert [whole[o : o + s] for o, s in (side["json"][n], side["audio"][n])] == [theirs["json"], theirs["flac"]]


# -- names and texts that are no good UTF-8 ------------------------------------------------------------------------------


def test_a_name_that_is_no_utf8_is_a_record_like_any_other_or_is_left_out(tmp_path, chat):
    """Old archives name their files in Latin-1; one such name must not end the indexing of a corpus."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, data in good("a", "caf\u00e9", "b"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    side, _ = side_of(tmp_path, Reading(CARD, chat))
    assert [side.key(n) for n in (0, 2)] == ["a", "b"]


def test_half_a_character_in_a_json_does_not_end_the_indexing(tmp_path, chat):
    r"""json takes "\ud83d" for a character; no tokenizer does."""
    broken = [("b.flac", SOUND), ("b.json", b'{"source": "s", "text": "\\ud83d"}')]
    write(tmp_path / "a.tar", [*good("a"), *broken, *good("c")])
    side, _ = side_of(tmp_path, Reading(CARD, chat))
    assert [code > 0 for code in side["reason"]] == [False, True, False]
    card = replace(CARD, held_out=HeldOut("source", 0.1, 9))
    write(tmp_path / "a.tar", [("b.flac", SOUND), ("b.json", b'{"source": "\\ud83d", "text": "x"}'), *good("c")])
    side, _ = side_of(tmp_path, Reading(card, chat))
    assert side.key(1) == "c"


@pytest.mark.parametrize("hours", [40, 1100])
def test_a_header_that_announces_days_is_a_record_left_out(tmp_path, chat, hours):
    """2**31 samples are 37 hours; a damaged header says anything."""
    samples = hours * 3600 * 16_000
    header = bytes([SOUND[21] & 0xF0 | samples >> 32]) + (samples & 2**32 - 1).to_bytes(4, "big")
    write(tmp_path / "a.tar", [*good("a"), ("b.flac", SOUND[:21] + header + SOUND[26:]), ("b.json", content())])
    side, _ = side_of(tmp_path, Reading(CARD, chat))
    assert side["reason"][0] == 0
    assert side["reason"][1] > 0 or side["n_samples"][1] >= 2**31 - 1  # then data.max_audio_s leaves it out


def test_deeply_nested_json_is_unreadable(tmp_path, chat):
    deep = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    write(tmp_path / "a.tar", [("a.flac", SOUND), ("a.json", deep), *good("b")])
    side, _ = side_of(tmp_path, Reading(CARD, chat))
    assert side.about["reasons"] == ["json unreadable"]


def test_a_card_that_does_not_fit_names_shard_and_record(tmp_path, chat):
    write(tmp_path / "a.tar", good("a"))
    with pytest.raises(ManifestError, match=r"a\.tar: a\.json: card c asks for JSON field `caption`"):
        side_of(tmp_path, Reading(replace(CARD, answer="caption"), chat))
