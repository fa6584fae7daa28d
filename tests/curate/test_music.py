"""What is said of music is what was played: facts, balance, equal bytes, and what of mma's library is used."""

import json
import re
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from midasheng.config import UserError

pytest.importorskip("tinysoundfont", reason="the synthesizer does not install here; SCALE=generated needs none")
from midasheng.curate import music
from midasheng.curate.music import CLOSED_WORDS, INSTRUMENTS, KIT, PITCHES, SOUNDS, TEMPOS, Note, Part, Piece

DOWNLOADS = Path(__file__).parents[2] / "data/downloads"
HAS_PACKAGES = all(list(DOWNLOADS.glob(f"{package}_*.deb")) for package in music.PACKAGES)
needs_packages = pytest.mark.skipif(not HAS_PACKAGES, reason=f"no {' or '.join(music.PACKAGES)} in data/downloads")


@pytest.fixture(scope="module")
def planned():
    return [*music._notes(), *music._sounds(), *music._rhythms()]


@pytest.fixture(scope="module")
def source():
    return music.fetch(DOWNLOADS)


def records(pieces):
    asked = music.yes_no(pieces)
    return {piece.key: music.describe(piece, piece.duration_s, asked[piece.key]) for piece in pieces}


def groove_piece(key, source="groove x", **facts):
    known = {"tempo": "slow", "bpm": 60, "instruments": ["piano"], "drums": True, "all": ("drums", "piano")}
    known |= {"complete": True, "beats": 4, "ask_beats": True, "style": "", "description": ""}
    return Piece("music-beats", key, source, "groove", (), 4.0, known | facts)


def test_keys_are_unique_and_name_no_extension(planned):
    assert len({piece.key for piece in planned}) == len(planned) > 900
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", piece.key) for piece in planned)


def test_notes_are_in_the_range_of_the_instrument_and_of_their_class(planned):
    real = {i.name: i for i in INSTRUMENTS}
    for piece in (piece for piece in planned if piece.kind == "note"):
        instrument, (part,) = real[piece.facts["instrument"]], piece.parts
        pitches = [note.pitch for note in part.notes]
        assert part.program == instrument.program
        assert instrument.lowest <= min(pitches) <= max(pitches) <= instrument.highest
        if "pitch" in piece.facts:
            assert piece.source == f"{instrument.name} {pitches[0]}"
            assert pitches[0] in PITCHES[piece.facts["pitch"]]
        else:
            up = piece.facts["direction"] == "rising"
            assert all((b > a) == up and abs(b - a) >= 3 for a, b in pairwise(pitches))
            assert piece.facts["number"] == music.NUMBERS[len(pitches)]
    classes = list(PITCHES.values())
    assert all(b.start - a.stop >= 4 for a, b in pairwise(classes))
    # the pitch alone does not give the instrument away
    for pitches in classes:
        assert sum(len({*range(i.lowest, i.highest + 1)} & {*pitches}) >= 5 for i in INSTRUMENTS) >= 5


def test_sounds_and_rhythms_are_struck_as_often_and_as_fast_as_said(planned):
    keys = {s.name: (s.program, s.keys) for s in SOUNDS}
    for piece in (piece for piece in planned if piece.kind != "note"):
        (part,) = piece.parts
        program, pitches = keys[piece.facts["sound"]]
        assert part.program == program
        assert all(note.pitch in pitches for note in part.notes)
        if "count" in piece.facts:
            assert len(part.notes) == music.COUNTS.index(piece.facts["count"]) + 1
            assert part.notes[-1].start_s + 0.3 < piece.duration_s
        if "tempo" in piece.facts:
            gaps = {round(b.start_s - a.start_s, 6) for a, b in pairwise(part.notes)}
            assert len(gaps) == 1
            assert round(60 / gaps.pop()) in TEMPOS[piece.facts["tempo"]]


def test_questions_are_balanced_and_answers_are_closed_words(planned):
    answers = defaultdict(Counter)
    for record in records(planned).values():
        for asked in record["questions"]:
            answers[asked["question"]][asked["answer"]] += 1
    for question, counts in answers.items():
        assert counts.keys() <= set(CLOSED_WORDS)
        assert len(counts) > 1, f"{question} has one answer only"
        if question.endswith("Answer yes or no."):
            assert counts["yes"] == counts["no"]
        else:
            assert max(counts.values()) <= 2.2 * min(counts.values()), question
    assert len(CLOSED_WORDS) == len(set(CLOSED_WORDS))


def test_a_record_says_what_is_true_and_says_it_three_times(planned):
    facts = {piece.key: piece.facts for piece in planned}
    told = {"note": "instrument", "sound": "sound", "rhythm": "tempo"}
    for key, record in records(planned).items():
        assert len(set(record["captions"])) == 3
        fact = told[record["kind"]]
        assert record[fact] == facts[key][fact]
        assert record["heard"].startswith(record["kind"] + ": ")
        assert record[fact] in record["heard"]
        spoken = {s.name: s.phrase for s in SOUNDS} | {i.name: i.phrase for i in INSTRUMENTS}
        name = record.get("instrument") or record["sound"]
        for caption in record["captions"]:
            assert name in caption.lower() or spoken[name] in caption.lower()
            assert re.fullmatch(r"[A-Z].*\.", caption)
        for asked in record["questions"]:
            if asked["question"].startswith(("Is the instrument", "Do you hear")):
                assert (spoken[name] + "?" in asked["question"]) == (asked["answer"] == "yes")


def test_grooves_deny_nothing_that_might_be_heard():
    pieces = [
        groove_piece("a", instruments=["strings"], all=("strings",), drums=False),
        groove_piece("b", instruments=["guitar"], all=("drums", "guitar", "piano", ""), complete=False),
        groove_piece("c", instruments=["violin", "guitar"], all=("drums", "violin", "guitar")),
    ]
    possible = {piece.key: dict(music._possible(piece)) for piece in pieces}

    def hear(name):
        return f"Do you hear {name} in the music? Answer yes or no."

    assert possible["a"][hear("strings")]
    assert not possible["a"][hear("guitar")]
    assert not possible["a"]["Are there drums? Answer yes or no."]
    assert hear("violin") not in possible["a"]  # there may be one among the strings
    assert hear("piano") not in possible["b"]  # it plays, too softly to be named
    assert hear("organ") not in possible["b"]  # a program without a name may be one
    assert hear("strings") not in possible["c"]
    told = records(pieces)
    assert all("without drums" in caption for caption in told["a"]["captions"])
    assert "drums and guitar" in told["b"]["captions"][0]
    assert {"question": "Which instruments play, drums aside?", "answer": "guitar, violin"} in told["c"]["questions"]
    assert not any("Which instruments" in asked["question"] for asked in told["b"]["questions"])


LIBRARY_FILE = """
Timesig 3 4
DefGroove TestWaltz   A waltz \\
    in two lines.
DefGroove TestWaltzSus  Adds strings.  // a note
DefGroove TestWaltzIntro  A 4 bar introduction.
DefGroove Bare
"""


def test_grooves_that_tell_a_tempo_or_change_meter_are_not_read():
    grooves = music.read_grooves(LIBRARY_FILE, "jazzwaltz")
    assert [(groove.name, groove.description, groove.beats) for groove in grooves] == [
        ("TestWaltz", "A waltz in two lines.", 3),
        ("TestWaltzSus", "Adds strings.", 3),
    ]
    assert music.read_grooves(LIBRARY_FILE, "slowwaltz") == music.read_grooves(LIBRARY_FILE, "blues128") == []
    assert music.read_grooves(LIBRARY_FILE + "Timesig 4 4\n", "waltz") == []
    assert music.read_grooves("Timesig 6 8\nDefGroove March68 A march.", "march") == []
    assert music.style_words("jazzwaltz") == "jazz waltz"
    assert music.style_words("son") == ""


def test_a_part_played_faster_keeps_what_begins_in_time():
    part = Part(0, (Note(0.0, 1.0, 60, 90), Note(2.0, 3.0, 62, 90)))
    assert part.at(2.0, 1.1).notes == (Note(0.0, 0.5, 60, 90), Note(1.0, 1.5, 62, 90))
    assert len(part.at(2.0, 1.0).notes) == 1


def midi_file(*events):
    """A MIDI file of one track: (ticks since the last event, status, data...), 96 ticks a beat, 120 beats a minute."""
    body = b"".join(bytes(event) for event in events) + bytes([0, 0xFF, 0x2F, 0])
    head = b"MThd" + (6).to_bytes(4, "big") + bytes([0, 0, 0, 1, 0, 96])
    return head + b"MTrk" + len(body).to_bytes(4, "big") + body


def test_parts_of_a_midi_file_know_program_and_drums():
    raw = midi_file(
        (0, 0xC2, 40), (0, 0xB2, 7, 80), (0, 0x92, 67, 90), (0, 0x99, 38, 70), (48, 0x99, 38, 0), (48, 0x82, 67, 0)
    )  # fmt: skip
    violin, drums = sorted(music.read_parts(raw), key=lambda part: -part.program)
    assert (violin.program, violin.volume, drums.program) == (40, 80, KIT)
    assert violin.notes == (Note(0.0, 0.5, 67, 90),)
    assert [(note.start_s, note.end_s, note.pitch) for note in drums.notes] == [(0.0, 0.25, 38)]


def test_a_folder_without_packages_or_apt_is_a_mistake_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setattr("midasheng.curate.debian.shutil.which", lambda _: None)
    with pytest.raises(UserError, match="mma timgm6mb-soundfont"):
        music.fetch(tmp_path)


@needs_packages
def test_equal_notes_are_equal_samples_whatever_was_played_before(source):
    players = [music.Player(source.soundfont) for _ in range(2)]
    violin, hit = Part(40, (Note(0.0, 0.5, 67, 90),)), Part(KIT, (Note(0.0, 0.5, 49, 127),))
    first = players[0].play(violin, 1.0)
    players[1].play(hit, 0.3)
    assert np.array_equal(first, players[1].play(violin, 1.0))
    # 392 Hz, the G above middle C
    spectrum = np.abs(np.fft.rfft(first[:8_000]))
    assert abs(np.argmax(spectrum[:250]) * 2 - 392) <= 4 or abs(np.argmax(spectrum[:500]) * 2 - 784) <= 6


@needs_packages
def test_clips_are_audible_unclipped_and_of_the_stated_length(source, planned):
    player = music.Player(source.soundfont)
    for piece in planned[::10]:
        samples = music._finished([player.play(part, piece.duration_s) for part in piece.parts], piece.key)
        assert samples.dtype == np.int16
        assert 0.6 <= len(samples) / 16_000 <= piece.duration_s + 1e-3 <= 4.6
        assert -14.1 < 20 * np.log10(np.abs(samples.astype(float)).max() / 32_768) < -3.9


@needs_packages
def test_a_groove_says_what_its_excerpt_plays(source, tmp_path):
    groove = next(g for g in music._chosen_grooves(source) if g.name == "BlueGrass")
    raw = music._midi(source, groove, tmp_path)
    assert raw == music._midi(source, groove, tmp_path)
    parts, player = music.read_parts(raw), music.Player(source.soundfont)
    assert {part.program for part in parts} >= {KIT, 24, 32, 105}  # drums, guitar, bass, banjo
    pieces = [music._groove(groove, parts, tempo, player) for tempo in TEMPOS]
    for piece, bpms in zip(pieces, TEMPOS.values(), strict=True):
        programs = {part.program for part in piece.parts}
        assert piece.facts["drums"] == (KIT in programs)
        assert piece.facts["bpm"] in bpms
        assert set(piece.facts["instruments"]) <= {music.NAMES[program] for program in programs - {KIT}}
        assert all(note.start_s < piece.duration_s - 0.2 for part in piece.parts for note in part.notes)
    assert json.dumps(records(pieces)[pieces[0].key]["questions"])


@needs_packages
def test_licences_name_packages_terms_and_owners(source):
    text = "\n".join(music.licences(source))
    for words in ("mma 2", "timgm6mb-soundfont 1", "GPL-2", "Bob van der Poel", "Tim Brechbill", "Changed here"):
        assert words in text
