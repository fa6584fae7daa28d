"""From packages to shards: what is kept, what is dropped and why; half-finished work is done again."""

import gzip
import io
import json
import shutil
import subprocess
import tarfile

import av
import numpy as np
import pytest
import soundfile

from midasheng.curate import asterisk
from midasheng.curate.asterisk import (
    FINISHED,
    VALIDATION_SHARE,
    Source,
    Voice,
    audio_problem,
    build,
    clean_text,
    describe,
    fetch,
    finished,
    normalise,
    pair,
    plain_words,
    read_transcripts,
    split_of,
    training_text,
)
from midasheng.sample import unit_hash

COPYRIGHT = """Format: x
Upstream-Name: asterisk-core-sounds
Source: http://example.org/

Files: *
Copyright: 2003, A Voice
License: CC-BY-SA-3.0

Files: it-*
Copyright: 2012, Un Altro
License: CC-BY-3.0
"""
ENGLISH = Voice("en", "English", "woman")
SENTENCES = [f"Please press {n} to hear message number {n}." for n in range(10, 60)]


def tone(duration_s, peak=0.3):
    """A 440 Hz tone as mono int16 at 16 kHz."""
    samples = peak * np.sin(2 * np.pi * 440 * np.arange(round(duration_s * 16_000)) / 16_000)
    return (samples * 32_767).astype(np.int16)


def write_g722(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="g722") as container:
        stream = container.add_stream("g722", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = 16_000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


def make_source(folder, lines, audio, voice=ENGLISH):
    """A tiny unpacked package: transcript `lines`, and `audio` by name (None makes an empty file)."""
    folder.mkdir(parents=True)
    (folder / "text.gz").write_bytes(
        gzip.compress(("\ufeff; a comment\n\n" + "\n".join(lines) + "\n").encode())
    )
    (folder / "copyright").write_text(COPYRIGHT)
    (folder / "sounds").mkdir()
    for name, samples in audio.items():
        path = folder / "sounds" / f"{name}.g722"
        if samples is None:
            path.parent.mkdir(exist_ok=True)
            path.touch()
        else:
            write_g722(path, samples)
    return Source(voice, folder / "text.gz", folder / "sounds", folder / "copyright", (("pkg", "1.0-1"),))


@pytest.fixture
def source(tmp_path):
    """Fifty good prompts, and a few that must go."""
    lines = [f"m{n}: {text}" for n, text in enumerate(SENTENCES)]
    lines += ["blip: [a blip]", "gone: Text only.", "void: Nothing.", "faint: Hello.", "digits/7: seven"]
    audio = {f"m{n}": tone(3.0) for n in range(len(SENTENCES))}
    audio |= {"blip": tone(0.5), "void": None, "faint": tone(1.0, peak=0.001), "digits/7": tone(0.6)}
    return make_source(tmp_path / "source", lines, audio)


def read_shards(out, split):
    records = {}
    for path in sorted((out / "shards").glob(f"asterisk-{split}-*.tar")):
        with tarfile.open(path) as shard:
            for member in shard.getmembers():
                assert not member.pax_headers and member.mtime == 0
                key, extension = member.name.split(".")
                records.setdefault(key, {})[extension] = shard.extractfile(member).read()
    return records


def test_transcripts_with_mark_comment_wrong_case_and_swallowed_line():
    lines = ["\ufeff; name: comment", "", "hello: Hello: you.", "LETTERS/O: o"]
    raw = "\n".join([*lines, "vm-one: vm-one: One. vm-two: Two.", "vm-two: 2"]).encode()
    texts = read_transcripts(raw, {"hello", "letters/o", "vm-one", "vm-two"})
    assert texts == {
        "hello": ["Hello: you."],
        "letters/o": ["o"],
        "vm-one": ["One."],
        "vm-two": ["Two.", "2"],
    }
    assert read_transcripts("ne: zéro".encode("cp1252"), {"ne"}) == {"ne": ["zéro"]}


def test_clean_text_and_normalise():
    assert clean_text("...  to   leave the menu...") == "to leave the menu"
    assert clean_text('participants..."') == "participants"
    assert clean_text("[!] punto  esclamativo") == "punto esclamativo"
    assert clean_text('a polite "no" menu.') == 'a polite "no" menu.'
    assert normalise("L'Échec,  d'un  TEST!") == normalise("l’échec d un test") == "l échec d un test"


@pytest.mark.parametrize(
    ("name", "line", "reason"),
    [
        ("blip", "blip: <beep ascending>", "a sound, not speech"),
        ("beep", "beep: un suono", "a sound, not speech"),
        ("silence/1", "silence/1: (1 second of silence)", "silence"),
        ("empty", "empty:", "no text"),
        ("note", "note: Pour (emphase)", "a note in the text"),
        ("twice", "twice: one\ntwice: two", "two texts"),
        ("absent", "absent: Hello.", "no audio"),
        ("void", "void: Hello.", "empty audio"),
    ],
)
def test_prompts_dropped_by_text(tmp_path, name, line, reason):
    audio = {} if name == "absent" else {name: None}
    kept, dropped = pair(make_source(tmp_path / "s", line.split("\n"), audio))
    assert kept == [] and [(drop.name, drop.reason) for drop in dropped] == [(name, reason)]


def test_prompts_dropped_by_audio():
    assert audio_problem(tone(1.0), "One moment, please.") is None
    assert audio_problem(tone(0.199), "a") == "too short"
    assert audio_problem(tone(40.1), "a" * 400) == "too long"
    assert audio_problem(tone(1.0, peak=0.001), "Hello.") == "no sound"
    assert audio_problem(tone(1.0), "One moment, please, we are busy.") == "too much text for the audio"
    assert audio_problem(tone(9.0), "One moment, please, we are busy.") == "too little text for the audio"


def test_build_writes_whole_records(source, tmp_path):
    out = tmp_path / "mini"
    summary = build([source], out, ["Transcribe the speech into text <|{language}|>"], max_tokens=400)
    train, test = read_shards(out, "train"), read_shards(out, "test")
    assert len(train) + len(test) == 51 == sum(summary.clips["en"].values())
    assert train.keys().isdisjoint(test.keys()) and "en_digits_7" in train | test
    sources = [{json.loads(record["json"])["source"] for record in split.values()} for split in (train, test)]
    assert sources[0].isdisjoint(sources[1]) and all(sources)
    for record in (train | test).values():
        samples, rate = soundfile.read(io.BytesIO(record["flac"]), dtype="int16")
        assert rate == 16_000 and len(samples) / rate == json.loads(record["json"])["duration_s"]
        assert 0.25 < np.abs(samples / 32_768).max() < 0.35
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert {(drop["name"], drop["reason"]) for drop in dropped} == {
        ("blip", "a sound, not speech"),
        ("gone", "no audio"),
        ("void", "empty audio"),
        ("faint", "no sound"),
    }
    assert (
        "pkg 1.0-1" in (out / "LICENCES").read_text()
        and "licenses/by-sa/3.0" in (out / "LICENCES").read_text()
    )
    assert "dropped: empty audio" in summary.table()


def test_equal_input_gives_equal_bytes(source, tmp_path):
    for name in ("first", "second"):
        build([source], tmp_path / name, [], max_tokens=400)
    files = sorted(p.relative_to(tmp_path / "first") for p in (tmp_path / "first").rglob("*") if p.is_file())
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file


def test_finished_work_is_left_alone_and_half_finished_work_is_not(source, tmp_path, monkeypatch):
    out = tmp_path / "mini"
    assert finished(out, 400) is None
    with monkeypatch.context() as patch:  # killed after the shards
        patch.setattr(asterisk, "save_tokenizer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build([source], out, [], max_tokens=400)
    assert finished(out, 400) is None and not (out / "shards").exists()

    monkeypatch.setattr(asterisk, "fetch", lambda *_: [source])
    made = asterisk.prepare(out, tmp_path / "downloads", [], max_tokens=400)
    assert finished(out, 400) == made and not (out / ".partial").exists()
    monkeypatch.setattr(asterisk, "build", lambda *_: pytest.fail("complete data were made again"))
    assert asterisk.prepare(out, tmp_path / "downloads", [], max_tokens=400) == made
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


def test_descriptions_say_only_what_is_known(tmp_path):
    lines, audio = (
        ["digits/day-1: lunedì", "bye: Il numero H.323 è occupato."],
        {"digits/day-1": tone(1), "bye": tone(3)},
    )
    source = make_source(tmp_path / "s", lines, audio, Voice("it", "Italian", "man"))
    bye, day = (describe(candidate, 1.0) for candidate in pair(source)[0])
    assert (day["source"], day["language"], day["language_name"], day["speaker"]) == (
        "lunedì",
        "it",
        "Italian",
        "man",
    )
    assert len(day["captions"]) == 3 and any("lunedì" in caption for caption in day["captions"])
    assert all(
        "Italian" in caption and "man" in caption and "woman" not in caption for caption in day["captions"]
    )
    asked = {pair["question"]: pair["answer"] for pair in day["questions"] + day["instructions"]}
    assert asked["How many words are spoken? Answer with a number."] == "1"
    assert asked["Spell the word, with a space between the letters."] == "l u n e d ì"
    assert "a day of the week" in asked.values() and asked["Is the speaker a man or a woman?"] == "man"
    for question, answer in asked.items():
        if question.startswith("Is the speech in"):
            assert answer == ("yes" if "Italian" in question else "no")
    assert not any("words" in pair["question"] for pair in bye["questions"]), "is H.323 one word?"


def test_plain_words():
    assert plain_words("¿Cómo está, d'accord?") == ["Cómo", "está", "d'accord"]
    assert [plain_words(text) for text in ("press # now", "dial 500", "M I S D", "a IAX")] == [None] * 4


def test_training_text_keeps_out_test_and_validation():
    empty = {"captions": [], "questions": [], "instructions": []}
    records = [{"source": f"word {n}", "text": f"Word {n}."} | empty for n in range(300)]
    texts = set(training_text(records, []))
    for record in records:
        source = record["source"]
        is_kept_out = split_of(source) == "test" or unit_hash("held_out:" + source) < VALIDATION_SHARE
        assert (record["text"] in texts) != is_kept_out


def test_fetch_names_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(asterisk.shutil, "which", lambda _: None)
    with pytest.raises(RuntimeError, match=r"apt-get is not installed.*asterisk-core-sounds-en-g722"):
        fetch([ENGLISH], tmp_path)


def test_apt_falls_back_to_private_package_lists(tmp_path, monkeypatch):
    commands = []

    def run(command, folder):
        commands.append(" ".join(command))
        has_lists = "Dir::State=" in commands[-1]
        if "download" in command and has_lists:
            (folder / "asterisk-core-sounds-en_1_all.deb").write_bytes(b"deb")
        return subprocess.CompletedProcess(
            command, 0 if has_lists else 100, "", "E: Unable to locate package"
        )

    monkeypatch.setattr(asterisk, "_run", run)
    monkeypatch.setattr(asterisk.shutil, "which", lambda name: name)
    asterisk._apt_download(["asterisk-core-sounds-en"], tmp_path)
    assert (tmp_path / "asterisk-core-sounds-en_1_all.deb").read_bytes() == b"deb"
    assert len(commands) == 3 and commands[1].endswith("update") and str(tmp_path / "apt") in commands[1]
    monkeypatch.setattr(
        asterisk, "_run", lambda command, _: subprocess.CompletedProcess(command, 100, "", "no route")
    )
    monkeypatch.setattr(asterisk.time, "sleep", lambda _: None)
    with pytest.raises(RuntimeError, match=r"(?s)could not download other.*no route"):
        asterisk._apt_download(["other"], tmp_path)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="builds real packages")
def test_downloaded_packages_are_used(tmp_path):
    voice, downloads = ENGLISH, tmp_path / "downloads"
    downloads.mkdir()
    made = make_source(tmp_path / "made", ["hello: Hello."], {"hello": tone(1.0)})
    for package, content in zip(voice.packages, ("doc", "sounds"), strict=True):
        root = tmp_path / package
        (root / "DEBIAN").mkdir(parents=True)
        control = (
            f"Package: {package}\nVersion: 1\nArchitecture: all\nMaintainer: x <x@y.z>\nDescription: x\n"
        )
        (root / "DEBIAN/control").write_text(control)
        if content == "doc":
            doc = root / "usr/share/doc" / package
            doc.mkdir(parents=True)
            shutil.copy(made.transcripts, doc / "core-sounds-en.txt.gz")
            shutil.copy(made.copyright, doc / "copyright")
        else:
            shutil.copytree(made.sounds, root / "usr/share/asterisk/sounds/en_US_f_Someone")
        deb = downloads / f"{package}_1_all.deb"
        subprocess.run(["dpkg-deb", "-b", str(root), str(deb)], check=True, capture_output=True)
    (source,) = fetch([voice], downloads)
    assert source.versions == ((voice.packages[0], "1"), (voice.packages[1], "1"))
    assert [candidate.text for candidate in pair(source)[0]] == ["Hello."]

    (downloads / f"{voice.packages[0]}_2_all.deb").write_bytes(b"not a package")
    with pytest.raises(RuntimeError, match="does not unpack; delete it"):
        fetch([voice], downloads)
