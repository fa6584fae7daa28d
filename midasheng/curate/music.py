"""Sampled music and sounds with true descriptions: what is said of a clip is what it was rendered from.

fetch           packages -> MusicSource             mma, which writes accompaniments, and a General MIDI soundfont
_notes          instrument, pitches                 single notes, and two or three that rise or fall
_sounds         drum or effect, count               struck once, twice or three times
_rhythms        drum, tempo                         one drum at an even pace
_grooves        mma groove, tempo                   accompaniment at a tempo of its own, with or without drums
clips           MusicSource -> Clip                 all of them, with captions and questions (describe, yes_no)
licences        MusicSource -> lines                whose the samples and grooves are, and under which terms
"""

import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tinysoundfont
from numpy.typing import NDArray
from tinysoundfont import midi

from midasheng.config import UserError
from midasheng.curate import debian
from midasheng.curate.describe import Chooser
from midasheng.curate.shards import Clip
from midasheng.frames import SAMPLE_RATE, seconds
from midasheng.sample import unit_hash

PACKAGES = ("mma", "timgm6mb-soundfont")
KNOWN_VERSIONS = "mma 21.09-1 and timgm6mb-soundfont 1.3-5 are known to work"

# Middle C is 60. Between the classes lie four semitones that no single note is taken from.
PITCHES = {"low": range(43, 55), "middle": range(59, 69), "high": range(73, 84)}
TEMPOS = {"slow": range(60, 76), "medium": range(100, 116), "fast": range(150, 176)}  # beats a minute
COUNTS = ("once", "twice", "three times")
NUMBERS = {2: "two", 3: "three", 4: "four"}
TEMPO_QUESTION = "Is the tempo slow, medium or fast?"
LEVELS_DB = (-14.0, -4.0)  # peaks of the clips, of full scale: a level says nothing about what plays
AUDIBLE_DB = -20.0  # of a part beside the whole: below it a part is not named
BEATS = 14  # of a groove that are needed: 4.5 s at 175 a minute
STRUCK, SHORT, EFFECT, RING = "struck", "short", "effect", "ring"


@dataclass(frozen=True)
class Instrument:
    """A General MIDI program (from 0) with the pitches that the real instrument has."""

    name: str
    phrase: str
    program: int
    lowest: int
    highest: int


INSTRUMENTS = (
    Instrument("piano", "a piano", 0, 21, 108),
    Instrument("organ", "a church organ", 19, 36, 96),
    Instrument("guitar", "an acoustic guitar", 24, 40, 83),
    Instrument("violin", "a violin", 40, 55, 103),
    Instrument("choir", "a choir", 52, 43, 81),
    Instrument("trumpet", "a trumpet", 56, 54, 84),
    Instrument("saxophone", "a saxophone", 65, 49, 80),
    Instrument("flute", "a flute", 73, 60, 96),
)


@dataclass(frozen=True)
class Sound:
    """A key of the drum kit, or a General MIDI sound effect with the keys at which it is still that sound."""

    name: str
    phrase: str
    kind: str  # STRUCK; SHORT where even fast hits do not ring into each other; EFFECT; RING: one that goes on and on
    program: int
    keys: tuple[int, ...]


KIT = -1  # stands for the drum kit where a program is asked for
SOUNDS = (
    Sound("bass drum", "a bass drum", SHORT, KIT, (36,)),
    Sound("snare drum", "a snare drum", SHORT, KIT, (38,)),
    Sound("hand clap", "a hand clap", SHORT, KIT, (39,)),
    Sound("tom", "a tom", STRUCK, KIT, (45,)),
    Sound("cymbal", "a cymbal", STRUCK, KIT, (49,)),
    Sound("tambourine", "a tambourine", SHORT, KIT, (54,)),
    Sound("cowbell", "a cowbell", SHORT, KIT, (56,)),
    Sound("bongo", "a bongo", SHORT, KIT, (60,)),
    Sound("maracas", "maracas", SHORT, KIT, (70,)),
    Sound("whistle", "a whistle", STRUCK, KIT, (71,)),
    Sound("guiro", "a guiro", STRUCK, KIT, (73,)),
    Sound("claves", "claves", SHORT, KIT, (75,)),
    Sound("triangle", "a triangle", STRUCK, KIT, (81,)),
    Sound("waves", "waves of the sea", EFFECT, 122, (50, 52, 54, 56, 58, 60, 62)),
    Sound("bird", "a bird", EFFECT, 123, (43, 44, 45, 46, 47, 48, 49)),
    Sound("telephone", "a telephone", RING, 124, (43, 44, 45, 46, 47, 48, 49)),
    Sound("helicopter", "a helicopter", EFFECT, 125, (52, 54, 56, 58, 60, 62, 64)),
    Sound("applause", "applause", EFFECT, 126, (52, 54, 56, 58, 60, 62, 64)),
    Sound("gunshot", "a gunshot", EFFECT, 127, (54, 56, 58, 60, 62, 64, 66)),
)
# What to call the General MIDI programs of the grooves; the other programs are not named.
FAMILIES = {
    "piano": (0, 1, 2, 3), "harpsichord": (6,), "vibraphone": (11,), "marimba": (12,), "organ": (16, 17, 18, 19, 20),
    "accordion": (21, 23), "harmonica": (22,), "guitar": (24, 25, 26, 27, 28, 29, 30, 31), "bass": tuple(range(32, 40)),
    "violin": (40, 110), "strings": (44, 48, 49), "harp": (46,), "choir": (52, 53), "trumpet": (56, 59),
    "trombone": (57,), "brass": (61,), "saxophone": (64, 65, 66, 67), "clarinet": (71,), "flute": (73,),
    "banjo": (105,),
}  # fmt: skip
# Where one sounds, the other can be neither heard nor denied.
ALIKE = {"strings": ("violin",), "violin": ("strings",), "brass": ("trumpet", "trombone"), "trumpet": ("brass",)}
ALIKE |= {"trombone": ("brass",)}
NAMES = {program: name for name, programs in FAMILIES.items() for program in programs}

_PLAYERS = (*(instrument.name for instrument in INSTRUMENTS), *FAMILIES, *(sound.name for sound in SOUNDS), "drums")
_SAID = (*PITCHES, *TEMPOS, "rising", "falling", *NUMBERS.values(), *COUNTS, "yes", "no")
CLOSED_WORDS: tuple[str, ...] = tuple(dict.fromkeys((*_PLAYERS, *_SAID)))  # the answers


@dataclass(frozen=True)
class MusicSource:
    """The unpacked packages."""

    mma: Path  # folder that holds bin/ and share/
    soundfont: Path
    copyrights: tuple[Path, ...]
    versions: tuple[tuple[str, str], ...]  # (package, version)
    work: Path  # where mma may write


def fetch(downloads: Path) -> MusicSource:
    """Download and unpack the packages into `downloads`, reusing what is there.

    Raises UserError naming what is missing: a Debian tool, the network, or a readable package.
    """
    debs = debian.download(PACKAGES, downloads)
    roots = [debian.unpack(deb).resolve() / "usr" for deb in debs]
    fonts = sorted((roots[1] / "share/sounds/sf2").glob("*.sf2"))
    if len(fonts) != 1 or not (roots[0] / "bin/mma").is_file():
        raise UserError(f"{debs[0].name} or {debs[1].name} is not laid out as expected; {KNOWN_VERSIONS}")
    copyrights = tuple(root / "share/doc" / name / "copyright" for root, name in zip(roots, PACKAGES, strict=True))
    versions = tuple((name, debian.version(deb)) for name, deb in zip(PACKAGES, debs, strict=True))
    return MusicSource(roots[0], fonts[0], copyrights, versions, downloads.resolve())


def licences(source: MusicSource) -> Iterator[str]:
    """Lines of the LICENCES file: what the music is made from, whose, under which terms, and what was changed.

    Raises UserError when a copyright file does not say so.
    """
    yield "The music and sounds in shards/ were made here with these Debian packages, whose licences they keep: notes"
    yield "and sounds are played on the samples of the soundfont, grooves are written by mma from its library."
    yield "Changed here: notes, chords, tempos and levels chosen, some grooves without their drums; cut to a few"
    yield "seconds, 16 kHz, mono, FLAC; captions and questions composed from what was played."
    for path, (package, version) in zip(source.copyrights, source.versions, strict=True):
        paragraphs = path.read_text(encoding="utf-8").split("\n\n")
        upstream = [p.strip() for p in paragraphs if "Files:" in p and "Files: debian" not in p and "\nLicense:" in p]
        if not upstream:
            raise UserError(f"the copyright file of {package} names no licence; {KNOWN_VERSIONS}")
        yield ""
        yield f"== {package} {version}"
        yield from paragraphs[0].strip().splitlines()[1:]  # upstream name and source
        yield from upstream[0].splitlines()


# -- playing -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Note:
    """A key held from `start_s` to `end_s`."""

    start_s: float
    end_s: float
    pitch: int
    velocity: int


@dataclass(frozen=True)
class Part:
    """What one program, or the KIT, plays."""

    program: int
    notes: tuple[Note, ...]
    volume: int = 127  # MIDI controller 7
    tuning: float = 0.0  # semitones

    def at(self, speed: float, until_s: float) -> "Part":
        """The notes that begin before `until_s` when played `speed` times as fast."""
        notes = (replace(note, start_s=note.start_s / speed, end_s=note.end_s / speed) for note in self.notes)
        return replace(self, notes=tuple(note for note in notes if note.start_s < until_s))


class Player:
    """A synthesizer of which every call returns equal samples for equal notes."""

    def __init__(self, soundfont: Path) -> None:
        self.synth = tinysoundfont.Synth(samplerate=SAMPLE_RATE)
        self.font = self.synth.sfload(str(soundfont))

    def play(self, part: Part, duration_s: float) -> NDArray[np.float32]:
        """Mono samples of `part`, from its beginning."""
        is_kit = part.program == KIT
        self.synth.program_select(0, self.font, 128 if is_kit else 0, 0 if is_kit else part.program, is_kit)
        self.synth.control_change(0, 7, part.volume)
        self.synth.set_tuning(0, part.tuning)
        # at equal times keys are let go before they are struck
        moves = [(note.start_s, note.velocity, note.pitch) for note in part.notes]
        moves += [(note.end_s, 0, note.pitch) for note in part.notes]
        blocks, done, end = [], 0, round(duration_s * SAMPLE_RATE)
        for time_s, velocity, pitch in sorted(moves):
            until = round(time_s * SAMPLE_RATE)
            if until >= end:
                break
            blocks.append(self._next(until - done))
            done = until
            if velocity:
                self.synth.noteon(0, pitch, velocity)
            else:
                self.synth.noteoff(0, pitch)
        blocks.append(self._next(end - done))
        self.synth.sounds_off(0)
        self._next(SAMPLE_RATE // 10)  # stopped voices fade; none may reach into the next clip
        return np.concatenate(blocks)

    def _next(self, n_samples: int) -> NDArray[np.float32]:
        if n_samples == 0:
            return np.zeros(0, np.float32)
        stereo = np.frombuffer(bytes(self.synth.generate(n_samples)), np.float32).reshape(-1, 2)
        mono: NDArray[np.float32] = stereo.mean(axis=1)
        return mono


def _finished(waves: Sequence[NDArray[np.float32]], key: str) -> NDArray[np.int16]:
    """The mix of `waves` without the silence at its end, faded out, and at a level of its own."""
    wave: NDArray[np.float32] = np.stack(waves).sum(axis=0)
    loud = np.flatnonzero(np.abs(wave) > 0.003 * np.abs(wave).max())
    end = min(len(wave), max(int(loud[-1]) + SAMPLE_RATE // 20, round(0.6 * SAMPLE_RATE)))
    wave = wave[:end]
    n_fade = SAMPLE_RATE // 20
    wave[-n_fade:] *= np.linspace(1, 0, n_fade, dtype=np.float32)
    low, high = LEVELS_DB
    peak = 10 ** ((low + (high - low) * unit_hash("level:" + key)) / 20)
    return np.round(wave * (peak * 32_767 / np.abs(wave).max())).astype(np.int16)


# -- what is played ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A clip to be described: its parts are mixed into one wave of at most `duration_s`."""

    stem: str
    key: str
    source: str
    kind: str
    parts: tuple[Part, ...]
    duration_s: float
    facts: dict[str, Any]


def _notes() -> Iterator[Piece]:
    """Single notes, two of every pitch, and phrases that are played once rising and once falling."""
    for instrument in INSTRUMENTS:
        can_play = range(instrument.lowest, instrument.highest + 1)
        for pitch_class, pitches in PITCHES.items():
            for pitch in [pitch for pitch in pitches if pitch in can_play]:
                for variant in range(2):
                    key = f"{instrument.name}-{pitch}-{variant}"
                    hold_s = 0.5 + 0.4 * variant + 0.4 * unit_hash("hold:" + key)
                    velocity = 70 + int(50 * unit_hash("velocity:" + key))
                    part = Part(instrument.program, (Note(0.0, hold_s, pitch, velocity),))
                    facts = {"instrument": instrument.name, "phrase": instrument.phrase, "pitch": pitch_class}
                    source = f"{instrument.name} {pitch}"
                    yield Piece("music-notes", key, source, "note", (part,), min(2.0, hold_s + 0.5), facts)
        for number in range(10):
            seed = f"{instrument.name}-phrase-{number}"
            pitches_up = _phrase(seed, max(instrument.lowest, 43), min(instrument.highest, 83))
            for direction in ("rising", "falling"):
                key = f"{seed}-{direction}"
                step_s = 0.35 + 0.2 * unit_hash("step:" + seed)
                up_or_down = pitches_up if direction == "rising" else pitches_up[::-1]
                notes = tuple(Note(i * step_s, (i + 1) * step_s, p, 95) for i, p in enumerate(up_or_down))
                facts = {"instrument": instrument.name, "phrase": instrument.phrase, "direction": direction}
                facts["number"] = NUMBERS[len(notes)]
                parts = (Part(instrument.program, notes),)
                yield Piece("music-notes", key, seed, "note", parts, min(2.0, len(notes) * step_s + 0.4), facts)


def _phrase(seed: str, lowest: int, highest: int) -> tuple[int, ...]:
    """Two or three rising pitches, three to seven semitones apart."""
    number = 2 + (unit_hash("number:" + seed) < 0.5)
    steps = [3 + int(5 * unit_hash(f"step {i}:{seed}")) for i in range(number - 1)]
    start = lowest + int((highest - lowest - sum(steps) + 1) * unit_hash("start:" + seed))
    return tuple(start + sum(steps[:i]) for i in range(number))


def _sounds() -> Iterator[Piece]:
    """Every drum one to three times at five tunings, every effect at several keys and lengths."""
    for sound in SOUNDS:
        facts = {"sound": sound.name, "phrase": sound.phrase}
        for tuning in range(-2, 3) if sound.program == KIT else ():
            for count, counted in enumerate(COUNTS, start=1):
                key = f"{sound.name.replace(' ', '-')}-{tuning + 2}-{count}"
                gap_s = 0.4 + 0.15 * unit_hash("gap:" + key)
                velocity = 75 + int(50 * unit_hash("velocity:" + key))
                part = _hits(sound, count, gap_s, velocity, float(tuning))
                duration_s = min(2.0, count * gap_s + 0.8)
                source = f"{sound.name} {tuning}"
                yield Piece("music-sounds", key, source, "sound", (part,), duration_s, facts | {"count": counted})
        for number, pitch in enumerate(sound.keys if sound.program != KIT else ()):
            for variant in range(2):
                key = f"{sound.name}-{number}-{variant}"
                duration_s = 1.1 + 0.9 * unit_hash("length:" + key)
                velocity = 80 + int(45 * unit_hash("velocity:" + key))
                hold_s = 0.5 if sound.kind == RING else duration_s
                starts = [i * hold_s for i in range(math.ceil(duration_s / hold_s))]
                notes = tuple(Note(start_s, start_s + hold_s, pitch, velocity) for start_s in starts)
                part = Part(sound.program, notes)
                yield Piece("music-sounds", key, f"{sound.name} {pitch}", "sound", (part,), duration_s, facts)


def _hits(sound: Sound, count: int, gap_s: float, velocity: int, tuning: float) -> Part:
    notes = tuple(Note(i * gap_s, (i + 0.9) * gap_s, sound.keys[0], velocity) for i in range(count))
    return Part(sound.program, notes, tuning=tuning)


def _rhythms() -> Iterator[Piece]:
    """One short sound on every beat."""
    for sound in SOUNDS:
        for tempo, bpms in TEMPOS.items() if sound.kind == SHORT else ():
            for variant in range(5):
                key = f"rhythm-{sound.name.replace(' ', '-')}-{tempo}-{variant}"
                beat_s = 60 / _bpm(bpms, key)
                duration_s = 3.5 + unit_hash("length:" + key)
                tuning = variant - 2
                part = _hits(sound, int(duration_s / beat_s) + 1, beat_s, 100, float(tuning))
                facts = {"sound": sound.name, "phrase": sound.phrase, "tempo": tempo}
                yield Piece("music-beats", key, f"{sound.name} {tuning}", "rhythm", (part,), duration_s, facts)


def _bpm(bpms: Sequence[int], key: str) -> int:
    return bpms[int(len(bpms) * unit_hash("bpm:" + key))]


# -- grooves -------------------------------------------------------------------------------------------------

LIBRARY = "share/mma/lib/stdlib"
GROOVES_PER_STYLE = 2
BASE_BPM = 120  # what mma is asked for; the renderings are this fast and that slow
# A word about speed would be false at other tempos than the library's; "128" is 12/8 written as 4/4.
NOT_A_STYLE = re.compile(r"slow|fast|quick|ballad|lullaby|light|easy|128|metronome|^none$")
NOT_A_GROOVE = re.compile(r"(Intro|End|Fill)\w*$", re.IGNORECASE)
CHORDS = ("C", "Am", "F", "G7")
LEFT_OUT = {47, *range(112, 128)}  # programs that somebody might call drums, and noises
MANY = 3  # instruments that are named; nobody tells more apart in a few seconds
STYLES = (
    "waltz", "blues", "bluegrass", "rock", "jazz", "swing", "polka", "tango", "samba", "salsa", "bossanova", "bolero",
    "march", "country", "folk", "funk", "ragtime", "mambo", "rhumba", "beguine", "merengue", "calypso",
)  # fmt: skip


@dataclass(frozen=True)
class Groove:
    """An accompaniment of mma's library."""

    style: str  # name of the library file
    name: str
    description: str  # by its author
    beats: int  # in a bar: 3 or 4


def read_grooves(text: str, style: str) -> list[Groove]:
    """The grooves that a library file describes, if it is in 3/4 or in 4/4 throughout and its name tells no tempo."""
    text = re.sub(r"\s*\\\n\s*", " ", text)
    meters = {" ".join(found.split()) for found in re.findall(r"^\s*timesig\s+(.*?)\s*(?://.*)?$", text, re.I | re.M)}
    if meters not in ({"3 4"}, {"4 4"}) or NOT_A_STYLE.search(style):
        return []
    defined = re.findall(r"^\s*defgroove\s+(\S+)[ \t]+(\S.*?)\s*(?://.*)?$", text, re.I | re.M)
    beats = int(min(meters)[0])
    return [
        Groove(style, name, " ".join(said.split()), beats) for name, said in defined if not NOT_A_GROOVE.search(name)
    ]


def _chosen_grooves(source: MusicSource) -> list[Groove]:
    """Of every style the first groove, which is its plainest, and another one."""
    chosen: list[Groove] = []
    for path in sorted((source.mma / LIBRARY).glob("*.mma")):
        found = read_grooves(path.read_text(encoding="utf-8", errors="replace"), path.stem)
        others = sorted(found[1:], key=lambda groove: unit_hash(f"choose:{groove.name}"))
        chosen += found[:1] + others[: GROOVES_PER_STYLE - 1]
    if not chosen:
        raise UserError(f"{source.mma / LIBRARY} holds no grooves; {KNOWN_VERSIONS}")
    return chosen


def _midi(source: MusicSource, groove: Groove, folder: Path) -> bytes:
    """A few bars of a groove as a MIDI file, by mma as it was unpacked: it finds itself by MMA_HOME."""
    script, made = folder / f"{groove.name}.mma", folder / f"{groove.name}.mid"
    bars = [f"{i + 1} {CHORDS[i % len(CHORDS)]}" for i in range(-(-BEATS // groove.beats))]
    # naming the library file spares mma the database of all grooves, which it would write into its own folder
    lines = ["RndSeed 1", f"Tempo {BASE_BPM}", f"Groove stdlib/{groove.style}:{groove.name}", *bars]
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    env = {"MMA_HOME": str(source.mma / "share/mma"), "HOME": str(folder), "PYTHONHASHSEED": "0"}
    env |= {"PYTHONPYCACHEPREFIX": str(folder), "PATH": os.environ.get("PATH", "")}
    command = [sys.executable, str(source.mma / "bin/mma"), "-f", str(made), str(script)]
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    if result.returncode != 0 or not made.is_file():
        raise UserError(
            f"mma did not write the groove {groove.name}; {KNOWN_VERSIONS}:\n{result.stdout}{result.stderr}"
        )
    return made.read_bytes()


def read_parts(raw: bytes) -> list[Part]:
    """The parts of a MIDI file, one for each program of each channel."""
    programs, volumes = dict.fromkeys(range(16), 0), dict.fromkeys(range(16), 127)
    sounding: dict[tuple[int, int], tuple[float, int, int]] = {}
    notes: dict[tuple[int, int, int], list[Note]] = {}  # by channel, program, volume
    for event in midi.load_memory(raw):
        channel, action = event.channel, event.action
        if isinstance(action, midi.ProgramChange):
            programs[channel] = action.program
        elif isinstance(action, midi.ControlChange) and action.control == 7:
            volumes[channel] = action.control_value
        elif isinstance(action, midi.NoteOn | midi.NoteOff):
            if (channel, action.key) in sounding:
                start_s, velocity, program = sounding.pop((channel, action.key))
                held = Note(start_s, event.t, action.key, velocity)
                notes.setdefault((channel, program, volumes[channel]), []).append(held)
            if isinstance(action, midi.NoteOn) and action.velocity:
                program = KIT if channel == 9 else programs[channel]
                sounding[channel, action.key] = (event.t, action.velocity, program)
    return [Part(program, tuple(played), volume) for (_, program, volume), played in notes.items()]


def _grooves(source: MusicSource, player: Player) -> Iterator[Piece]:
    """Every chosen groove at two of the three tempos, about half of them without their drums."""
    grooves = _chosen_grooves(source)
    with tempfile.TemporaryDirectory(dir=source.work) as folder, ThreadPoolExecutor(2) as pool:
        files = pool.map(lambda groove: _midi(source, groove, Path(folder)), grooves)
        for number, (groove, raw) in enumerate(zip(grooves, files, strict=True)):
            parts = read_parts(raw)
            for tempo in [tempo for i, tempo in enumerate(TEMPOS) if i != number % len(TEMPOS)]:
                piece = _groove(groove, parts, tempo, player)
                if piece is not None:
                    yield piece


def _groove(groove: Groove, parts: Sequence[Part], tempo: str, player: Player) -> Piece | None:
    """A groove at a tempo, with what is heard of it; None where nothing that has a name is."""
    key = "groove-" + re.sub(r"[^A-Za-z0-9]", "", groove.name) + "-" + tempo
    bpm = _bpm(TEMPOS[tempo], key)
    duration_s = 3.5 + unit_hash("length:" + key)
    wanted = [part.at(bpm / BASE_BPM, duration_s - 0.2) for part in parts]
    with_drums = unit_hash("drums:" + key) < 0.55
    wanted = [p for p in wanted if p.notes and p.program not in LEFT_OUT and (with_drums or p.program != KIT)]
    shares = _shares_db(wanted, duration_s, player)
    if shares.get("drums", 0.0) < AUDIBLE_DB:  # are they heard? nobody can tell, so they are left out
        wanted = [part for part in wanted if part.program != KIT]
        shares = _shares_db(wanted, duration_s, player)
    heard = [name for name, share in shares.items() if share >= AUDIBLE_DB and name not in ("", "drums")]
    if not heard:
        return None
    facts: dict[str, Any] = {"tempo": tempo, "bpm": bpm, "instruments": heard[:MANY], "drums": "drums" in shares}
    facts |= {"all": tuple(shares), "complete": len(heard[:MANY]) + ("drums" in shares) == len(shares)}
    # there are few waltzes: as many others are asked for their meter
    facts["ask_beats"] = groove.beats == 3 or unit_hash("beats:" + key) < 0.13
    facts |= {"beats": groove.beats, "style": style_words(groove.style), "description": groove.description}
    return Piece("music-beats", key, f"groove {groove.style}", "groove", tuple(wanted), duration_s, facts)


def _shares_db(parts: Sequence[Part], duration_s: float, player: Player) -> dict[str, float]:
    """How loud each name is beside the whole, the loudest first; "" stands for all programs without a name."""
    waves: dict[str, NDArray[np.float32]] = {}
    for part in parts:
        name = "drums" if part.program == KIT else NAMES.get(part.program, "")
        waves[name] = waves.get(name, np.float32(0)) + player.play(part, duration_s)
    whole = np.square(np.sum(list(waves.values()), axis=0)).mean() + 1e-12
    shares = {name: float(10 * np.log10(np.square(wave).mean() / whole + 1e-9)) for name, wave in waves.items()}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def style_words(style: str) -> str:
    """The plain names of styles in the name of a library file, e.g. "jazz waltz"; empty if there are none."""
    found = sorted((style.index(name), name) for name in STYLES if name in style)
    return " ".join(name.replace("bossanova", "bossa nova") for _, name in found)


# -- what is said --------------------------------------------------------------------------------------------


def clips(source: MusicSource) -> Iterator[Clip]:
    """All clips, with equal bytes on every run. Raises UserError when mma fails."""
    player = Player(source.soundfont)
    pieces = [*_notes(), *_sounds(), *_rhythms(), *_grooves(source, player)]
    asked = yes_no(pieces)
    for piece in pieces:
        samples = _finished([player.play(part, piece.duration_s) for part in piece.parts], piece.key)
        yield Clip(piece.stem, piece.key, samples, describe(piece, seconds(len(samples)), asked[piece.key]))


def yes_no(pieces: Sequence[Piece]) -> dict[str, list[tuple[str, str]]]:
    """Questions with their answers by key of the piece; each question is answered yes as often as no."""
    asked: dict[str, list[tuple[str, str]]] = {piece.key: [] for piece in pieces}
    true: dict[str, list[str]] = {}
    false: dict[str, list[str]] = {}
    for piece in pieces:
        for question, is_so in _possible(piece):
            (true if is_so else false).setdefault(question, []).append(piece.key)
    for question in sorted(true.keys() & false.keys()):
        n_each = min(len(true[question]), len(false[question]))
        for answer, keys in (("yes", true[question]), ("no", false[question])):
            for key in sorted(keys, key=lambda key: unit_hash(f"{question}:{key}"))[:n_each]:
                asked[key].append((question, answer))
    return asked


def _possible(piece: Piece) -> Iterator[tuple[str, bool]]:
    """Every yes-or-no question that has a certain answer."""
    facts = piece.facts
    if piece.kind == "note":
        for i in INSTRUMENTS:
            yield f"Is the instrument {i.phrase}? Answer yes or no.", i.name == facts["instrument"]
    elif piece.kind == "groove":
        yield "Are there drums? Answer yes or no.", facts["drums"]
        for name in FAMILIES:
            # too soft, maybe among the programs without a name, or one of the strings: not certain
            if name in facts["instruments"] or not ({name, "", *ALIKE.get(name, ())} & {*facts["all"]}):
                yield f"Do you hear {name} in the music? Answer yes or no.", name in facts["instruments"]
    else:
        for s in SOUNDS:
            if piece.kind == "sound" or s.kind == SHORT:
                yield f"Do you hear {s.phrase}? Answer yes or no.", s.name == facts["sound"]


def describe(piece: Piece, duration_s: float, asked: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The JSON of a record."""
    say = {"note": _say_note, "sound": _say_sound, "rhythm": _say_rhythm, "groove": _say_groove}[piece.kind]
    heard, captions, questions = say(piece.facts)
    captions = Chooser(piece.key).order("captions", captions)[:3]
    kept = ("instrument", "sound", "tempo", "bpm", "style", "description")
    return {
        "source": piece.source,
        "kind": piece.kind,
        "heard": f"{piece.kind}: {heard}",
        "captions": [caption[0].upper() + caption[1:] for caption in captions],
        "questions": [{"question": question, "answer": answer} for question, answer in (*questions, *asked)],
        "duration_s": round(duration_s, 4),
    } | {name: piece.facts[name] for name in kept if name in piece.facts}


Said = tuple[str, list[str], list[tuple[str, str]]]  # heard, captions, questions with answers


def _say_note(facts: dict[str, Any]) -> Said:
    name, phrase = facts["instrument"], facts["phrase"]
    which = ("Which instrument plays?", name)
    if "pitch" in facts:
        pitch = facts["pitch"]
        note = "a note of middle pitch" if pitch == "middle" else f"a {pitch} note"
        captions = [f"{note} from {phrase}.", f"{phrase} sounds {note}.", f"the sound of {phrase}: {note}."]
        captions += [f"one {name} note of {pitch} pitch."]
        return f"{name}, {pitch}", captions, [which, ("Is the note low, middle or high?", pitch)]
    direction, number = facts["direction"], facts["number"]
    captions = [f"{number} {direction} notes from {phrase}.", f"{phrase} sounds {number} notes, {direction} in pitch."]
    captions += [f"a {direction} phrase of {number} notes from {phrase}."]
    captions += [f"the sound of {phrase}: {number} {direction} notes."]
    questions = [which, ("Are the notes rising or falling?", direction), ("How many notes are played?", number)]
    return f"{name}, {direction}, {number} notes", captions, questions


def _say_sound(facts: dict[str, Any]) -> Said:
    name, phrase = facts["sound"], facts["phrase"]
    which = ("What makes the sound?", name)
    if "count" not in facts:
        captions = [f"the sound of {phrase}.", f"a sound effect: {phrase}.", f"one hears {phrase}."]
        return name, [*captions, f"this is {phrase}."], [which]
    count = facts["count"]
    captions = [f"the sound of {phrase}, {count}.", f"{phrase}, heard {count}.", f"one hears {phrase} {count}."]
    captions += [f"{count}: the sound of {phrase}."]
    return f"{name}, {count}", captions, [which, ("How many times is it heard?", count)]


def _say_rhythm(facts: dict[str, Any]) -> Said:
    name, phrase, tempo = facts["sound"], facts["phrase"], facts["tempo"]
    captions = [f"{phrase} at a {tempo} tempo.", f"a steady {tempo} beat of {phrase}."]
    captions += [f"{phrase}, again and again at a {tempo} tempo.", f"a rhythm of {phrase}; the tempo is {tempo}."]
    return f"{name}, {tempo}", captions, [("What makes the sound?", name), (TEMPO_QUESTION, tempo)]


def _say_groove(facts: dict[str, Any]) -> Said:
    tempo, names = facts["tempo"], facts["instruments"]
    players = ["drums", *names] if facts["drums"] else [*names]
    band = " and ".join([", ".join(players[:-1]), players[-1]]) if len(players) > 1 else players[0]
    band += "" if facts["drums"] else ", without drums"
    style = f"{facts['style']} accompaniment".strip()
    meter = f"in {facts['beats']}/4 time"
    captions = [f"music at a {tempo} tempo with {band}.", f"a {tempo} groove with {band}."]
    captions += [f"the tempo is {tempo}; one hears {band}.", f"{tempo} {style} {meter} with {band}."]
    questions = [(TEMPO_QUESTION, tempo)]
    if facts["ask_beats"]:
        questions.append(("How many beats are in a bar?", NUMBERS[facts["beats"]]))
    if facts["complete"]:
        questions.append(("Which instruments play, drums aside?", ", ".join(sorted(names))))
    return ", ".join([tempo, "drums" if facts["drums"] else "no drums", *names]), captions, questions
