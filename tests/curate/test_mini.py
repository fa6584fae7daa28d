"""From unpacked packages to shards: whole records, equal bytes; half-finished work is done again."""

import io
import json
import tarfile

import numpy as np
import pytest
import soundfile

from midasheng.curate import mini
from midasheng.curate.asterisk import LANGUAGE_NAMES, licences, normalise
from midasheng.curate.mini import FINISHED, VALIDATION_SHARE, Raw, build, finished, training_text
from midasheng.curate.shards import Clip, split_of
from midasheng.data.manifest import read_card
from midasheng.sample import unit_hash
from stages.data import CARDS, FAMILIES
from tests.curate import make_source, tone

SENTENCES = [f"Please press {n} to hear message number {n}." for n in range(10, 60)]


@pytest.fixture
def source(tmp_path):
    """Fifty good prompts, and a few that must go."""
    lines = [f"m{n}: {text}" for n, text in enumerate(SENTENCES)]
    lines += ["blip: [a blip]", "gone: Text only.", "void: Nothing.", "faint: Hello.", "digits/7: seven"]
    audio = {f"m{n}": tone(3.0) for n in range(len(SENTENCES))}
    audio |= {"blip": tone(0.5), "void": None, "faint": tone(1.0, peak=0.001), "digits/7": tone(0.6)}
    made = make_source(tmp_path / "source", lines, audio)
    clips, dropped = mini._speech([made])
    return Raw(clips, list(licences([made])), LANGUAGE_NAMES, dropped)


def read_shards(out, split):
    records = {}
    for path in sorted((out / "shards").glob(f"asterisk-{split}-*.tar")):
        with tarfile.open(path) as shard:
            for member in shard.getmembers():
                assert not member.pax_headers
                assert member.mtime == 0
                key, extension = member.name.split(".")
                records.setdefault(key, {})[extension] = shard.extractfile(member).read()
    return records


def test_build_writes_whole_records(source, tmp_path):
    out = tmp_path / "mini"
    summary = build(source, out, ["Transcribe the speech into text <|{language}|>"], max_tokens=400)
    train, test = read_shards(out, "train"), read_shards(out, "test")
    assert len(train) + len(test) == 51 == sum(summary.clips["English"].values())
    assert train.keys().isdisjoint(test.keys())
    assert "en_digits_7" in train | test
    sources = [{json.loads(record["json"])["source"] for record in split.values()} for split in (train, test)]
    assert sources[0].isdisjoint(sources[1])
    assert all(sources)
    for record in (train | test).values():
        samples, rate = soundfile.read(io.BytesIO(record["flac"]), dtype="int16")
        assert rate == 16_000
        assert len(samples) / rate == json.loads(record["json"])["duration_s"]
        assert 0.2 < np.abs(samples / 32_768).max() < 0.35
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert {(drop["name"], drop["reason"]) for drop in dropped} == {
        ("blip", "a sound, not speech"),
        ("gone", "no audio"),
        ("void", "empty audio"),
        ("faint", "no sound"),
    }
    assert "pkg 1.0-1" in (out / "LICENCES").read_text()
    assert "licenses/by-sa/3.0" in (out / "LICENCES").read_text()
    assert "1 empty audio" in summary.table()


def test_equal_input_gives_equal_bytes(source, tmp_path):
    for name in ("first", "second"):
        build(source, tmp_path / name, [], max_tokens=400)
    files = sorted(p.relative_to(tmp_path / "first") for p in (tmp_path / "first").rglob("*") if p.is_file())
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file


def test_finished_work_is_left_alone_and_half_finished_work_is_not(source, tmp_path, monkeypatch):
    out = tmp_path / "mini"
    assert finished(out, 400) is None
    with monkeypatch.context() as patch:  # killed after the shards
        patch.setattr(mini, "save_tokenizer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(source, out, [], max_tokens=400)
    assert finished(out, 400) is None
    assert not (out / "shards").exists()

    made = mini.prepare(out, lambda: source, [], max_tokens=400)
    assert finished(out, 400) == made
    assert not (out / ".partial").exists()
    monkeypatch.setattr(mini, "build", lambda *_: pytest.fail("complete data were made again"))
    assert mini.prepare(out, lambda: source, [], max_tokens=400) == made
    assert finished(out, 401) is None, "other settings, other data"

    shard = next((out / "shards").glob("asterisk-train-*.tar"))
    shard.chmod(0o644)
    shard.write_bytes(shard.read_bytes()[:-512])
    assert finished(out, 400) is None, "a shortened shard"
    (out / FINISHED).unlink()
    assert finished(out, 400) is None


def test_split_depends_on_words_only():
    shares = [split_of(normalise(text)) for text in SENTENCES]
    assert shares == [split_of(normalise(text.upper().rstrip("."))) for text in SENTENCES]
    many = [split_of(str(n)) for n in range(5_000)]
    assert 0.05 < many.count("test") / len(many) < 0.07


def test_training_text_keeps_out_test_and_validation():
    records = [{"source": f"word {n}", "text": f"Word {n}.", "captions": [], "questions": []} for n in range(300)]
    clips = [Clip("asterisk", f"k{n}", np.zeros(0, np.int16), record) for n, record in enumerate(records)]
    texts = set(training_text([*clips, Clip("voices", "k", np.zeros(0, np.int16), {"source": "word 0"}, "test")], []))
    for record in records:
        source = record["source"]
        is_kept_out = split_of(source) == "test" or unit_hash("held_out:" + source) < VALIDATION_SHARE
        assert (record["text"] in texts) != is_kept_out


def test_no_card_holds_out_more_than_the_tokenizer_leaves_out():
    families = (family for both in FAMILIES.values() for family in both)
    cards = [read_card(path) for family in families for path in sorted(CARDS.glob(f"{family}.yaml"))]
    assert len(cards) > 10
    assert max(card.held_out.share for card in cards) <= VALIDATION_SHARE


def test_a_prompt_of_another_corpus_does_not_stop_the_tokenizer():
    record = {"source": "a", "captions": [], "questions": [], "language": "en"}
    clip = Clip("asterisk", "k", np.zeros(0, np.int16), record, "train")
    texts = list(training_text([clip], ["Transcribe <|{language}|>", "Sing {melody}"]))
    assert texts == ["user", "assistant", "Transcribe <|en|>"]
