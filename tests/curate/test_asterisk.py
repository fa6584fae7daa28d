"""What is kept of the transcripts and clips, what is dropped and why."""

import shutil
import subprocess

import pytest

from midasheng.config import UserError
from midasheng.curate.asterisk import (
    Voice,
    audio_problem,
    clean_text,
    fetch,
    licences,
    normalise,
    pair,
    read_transcripts,
)
from tests.curate import COPYRIGHT, ENGLISH, make_source, tone


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
    assert kept == []
    assert [(drop.name, drop.reason) for drop in dropped] == [(name, reason)]


def test_prompts_dropped_by_audio():
    assert audio_problem(tone(1.0), "One moment, please.") is None
    assert audio_problem(tone(0.199), "a") == "too short"
    assert audio_problem(tone(40.1), "a" * 400) == "too long"
    assert audio_problem(tone(1.0, peak=0.001), "Hello.") == "no sound"
    assert audio_problem(tone(1.0), "One moment, please, we are busy.") == "too much text for the audio"
    assert audio_problem(tone(9.0), "One moment, please, we are busy.") == "too little text for the audio"


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="builds real packages")
def test_downloaded_packages_are_used(tmp_path):
    voice, downloads = ENGLISH, tmp_path / "downloads"
    downloads.mkdir()
    made = make_source(tmp_path / "made", ["hello: Hello."], {"hello": tone(1.0)})
    for package, content in zip(voice.packages, ("doc", "sounds"), strict=True):
        root = tmp_path / package
        (root / "DEBIAN").mkdir(parents=True)
        control = f"Package: {package}\nVersion: 1\nArchitecture: all\nMaintainer: x <x@y.z>\nDescription: x\n"
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


def test_licences_name_terms_and_versions_of_each_voice(tmp_path):
    italian = make_source(tmp_path / "it", [], {}, Voice("it", "Italian", "man"))
    text = "\n".join(licences([make_source(tmp_path / "en", [], {}), italian]))
    english, italian_terms = text.split("== English")[1].split("== Italian")
    assert "pkg 1.0-1" in english
    assert "licenses/by-sa/3.0" in english
    assert "licenses/by/3.0" in italian_terms
    assert "Un Altro" in italian_terms
    italian.copyright.write_text(COPYRIGHT.replace("License: CC-BY-3.0", ""))
    with pytest.raises(UserError, match="no licence for it"):
        list(licences([italian]))
