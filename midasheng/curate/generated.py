"""The generated corpus: tones, single sounds and rhythms with true descriptions, where no recordings can be had.

plan            what each clip will be                  by key; labels dealt out evenly, not drawn
melody          -> Clip of generated-tones              text: its tones, which stands in for a transcript
single_sound    -> Clip of generated-sounds             sound: one of ten
rhythm          -> Clip of generated-beats              tempo: slow, medium or fast
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from midasheng.curate.shards import Clip
from midasheng.frames import SAMPLE_RATE, seconds
from midasheng.sample import counter_seed

Wave = NDArray[np.float64]

PITCHES = {"low": (180.0, 260.0), "middle": (430.0, 620.0), "high": (1_000.0, 1_500.0)}  # Hz
TAKES = {2: 8, 3: 5, 4: 2, 5: 1}  # tones of a melody -> clips of each: there are 9 melodies of two, 243 of five
COUNTS = {2: "two", 3: "three", 4: "four", 5: "five"}
SOUNDS = {
    "sine": "a pure sine tone",
    "square": "a square wave",
    "sawtooth": "a sawtooth wave",
    "hiss": "a bright hiss",
    "rumble": "a deep rumble",
    "rising": "a rising tone",
    "falling": "a falling tone",
    "tremolo": "a tone with tremolo",
    "clicks": "a train of clicks",
    "bell": "a ringing bell",
}
STEPS, TAKES_OF_SOUND = 25, 2  # a sound is made at 25 pitches (or rates, or colours), a semitone apart
TEMPOS = {"slow": range(60, 76), "medium": range(100, 116), "fast": range(150, 176)}  # beats per minute
MATERIALS = ("clicks", "beeps", "bursts")
TAKES_OF_RHYTHM = 48  # of each tempo and material
LEVELS = {"loud": (0.35, 0.8), "quiet": (0.03, 0.07)}  # peak, of full scale
LENGTHS = {"short": (0.7, 1.2), "long": (1.8, 3.0)}  # s
KINDS = ("melody", "rhythm", "sound")
BACKGROUND_DB = (25.0, 40.0)  # below the clip, both as RMS
FADE = SAMPLE_RATE // 100

CLOSED_WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        [*PITCHES, *COUNTS.values(), *SOUNDS, *TEMPOS, *MATERIALS, *LEVELS, *LENGTHS, *KINDS, "yes", "no"]
    )  # clicks are both a sound and a material
)


def clips() -> Iterator[Clip]:
    """Every clip; equal bytes on every run."""
    for key, make in plan().items():
        yield make(np.random.default_rng(counter_seed("generated", key)))


def plan() -> dict[str, Callable[[np.random.Generator], Clip]]:
    """Key -> what makes the clip out of a random generator."""
    planned: dict[str, Callable[[np.random.Generator], Clip]] = {}
    for n_tones, takes in TAKES.items():
        for tones, take in itertools.product(itertools.product(PITCHES, repeat=n_tones), range(takes)):
            key = f"tones_{'-'.join(tones)}_{take}"
            planned[key] = partial(melody, key, tones, len(planned))
    for sound, step, take in itertools.product(SOUNDS, range(STEPS), range(TAKES_OF_SOUND)):
        key = f"sound_{sound}_{step}_{take}"
        planned[key] = partial(single_sound, key, sound, step, take * STEPS + step)
    for tempo, material, take in itertools.product(TEMPOS, MATERIALS, range(TAKES_OF_RHYTHM)):
        key = f"beat_{tempo}_{material}_{take}"
        planned[key] = partial(rhythm, key, tempo, material, take)
    return planned


# -- clips ---------------------------------------------------------------------------------------------------


def melody(key: str, tones: Sequence[str], number: int, rng: np.random.Generator) -> Clip:
    """Tones one after the other, each at its own pitch within its name's range, in one timbre."""
    level, count, text = _level(rng), COUNTS[len(tones)], " ".join(tones)
    period, sounding, timbre = rng.uniform(0.38, 0.52), rng.uniform(0.55, 0.75), rng.uniform(0, 0.4, 4)
    lead = rng.uniform(0.03, 0.2)
    least_s = lead + period * len(tones)
    wave = np.zeros(round(rng.uniform(least_s, min(3, least_s + 1)) * SAMPLE_RATE))  # length hardly tells the number
    for place, name in enumerate(tones):
        n_samples = round(period * sounding * rng.uniform(0.85, 1.15) * SAMPLE_RATE)
        tone = _faded(_harmonics(rng.uniform(*PITCHES[name]), [1.0, *timbre], n_samples))
        _add(wave, tone, round((lead + period * place) * SAMPLE_RATE))
    questions = {
        "How many tones are played?": count,
        "Is the first tone low, middle or high?": tones[0],
        "Is the last tone low, middle or high?": tones[-1],
        **_yes_and_no("Is the first tone {}? Answer yes or no.", tones[0], {name: name for name in PITCHES}, number),
    }
    if tones[0] != tones[-1]:  # as many melodies end above their first tone as under it
        above = list(PITCHES).index(tones[-1]) > list(PITCHES).index(tones[0])
        questions["Does the last tone lie above the first? Answer yes or no."] = "yes" if above else "no"
    captions = (
        f"{count.capitalize()} {level} tones: {', '.join(tones)}.",
        f"A {level} melody of {count} tones goes {text}.",
        f"First a {tones[0]} tone, then {', then '.join(tones[1:])}, all of them {level}.",
        f"A synthesizer plays {count} tones, {level}: {text}.",
    )
    record = _record(rng, f"melody: {'/'.join(tones)}", "melody", level, f"{level} melody: {text}", captions, questions)
    return _clip("generated-tones", key, wave, record | {"text": text}, rng)


def single_sound(key: str, sound: str, step: int, number: int, rng: np.random.Generator) -> Clip:
    """One of SOUNDS; `step` sets its pitch, its rate or its colour."""
    level, length = _level(rng), list(LENGTHS)[rng.integers(2)]
    wave = _faded(_sound(sound, step / (STEPS - 1), round(rng.uniform(*LENGTHS[length]) * SAMPLE_RATE), rng))
    questions = {
        "What sound is this?": sound,
        "Is the sound short or long?": length,
        **_yes_and_no("Is this {}? Answer yes or no.", sound, SOUNDS, number),
    }
    what = SOUNDS[sound]
    captions = (
        f"{what.capitalize()}, {level} and {length}.",
        f"A {length} clip of {what}, {level}.",
        f"The clip holds {what}; it is {level} and {length}.",
        f"A {level} sound, {length}: {what}.",
    )
    record = _record(
        rng, f"sound {sound} {step}", "sound", level, f"{level} {length} sound: {sound}", captions, questions
    )
    return _clip("generated-sounds", key, wave, record | {"sound": sound}, rng)


def rhythm(key: str, tempo: str, material: str, number: int, rng: np.random.Generator) -> Clip:
    """A pulse repeated at a steady tempo; the length of the clip says nothing about the tempo."""
    level, bpm = _level(rng), TEMPOS[tempo][number % len(TEMPOS[tempo])]
    wave = np.zeros(round(rng.uniform(2.5, 3.5) * SAMPLE_RATE))
    n_pulse = round(rng.uniform(0.06, 0.09) * SAMPLE_RATE)
    if material == "beeps":
        pulse = _faded(_harmonics(rng.uniform(500, 1_500), [1.0, *rng.uniform(0, 0.3, 2)], n_pulse))
    else:
        pulse = _click(rng) if material == "clicks" else _faded(_noise(n_pulse, rng.uniform(-0.5, 0), rng))
    for start in np.arange(rng.uniform(0.03, 0.3), seconds(len(wave)), 60 / bpm):
        _add(wave, pulse * rng.uniform(0.8, 1), round(start * SAMPLE_RATE))
    questions = {
        "Is the tempo slow, medium or fast?": tempo,
        "Is the rhythm made of clicks, beeps or bursts?": material,
        **_yes_and_no("Is the tempo {}? Answer yes or no.", tempo, {name: name for name in TEMPOS}, number),
    }
    captions = (
        f"A {tempo} rhythm of {level} {material}.",
        f"{level.capitalize()} {material} repeat at a {tempo} tempo.",
        f"A steady beat in a {tempo} tempo, made of {material}, {level}.",
        f"The {material} come at a {tempo} pace and are {level}.",
    )
    heard = f"{level} {tempo} rhythm of {material}"
    record = _record(rng, f"{material}, {bpm} bpm", "rhythm", level, heard, captions, questions)
    return _clip("generated-beats", key, wave, record | {"tempo": tempo}, rng)


# -- facts ---------------------------------------------------------------------------------------------------


def _level(rng: np.random.Generator) -> str:
    return list(LEVELS)[rng.integers(len(LEVELS))]


def _yes_and_no(question: str, right: str, names: Mapping[str, str], number: int) -> dict[str, str]:
    """`question` of what it is and of one thing it is not, in turn: of every text half the answers are yes."""
    options = list(names)
    wrong = options[(options.index(right) + 1 + number % (len(options) - 1)) % len(options)]
    return {question.format(names[right]): "yes", question.format(names[wrong]): "no"}


def _record(
    rng: np.random.Generator,
    source: str,
    kind: str,
    level: str,
    heard: str,
    captions: Sequence[str],
    questions: Mapping[str, str],
) -> dict[str, Any]:
    of_all = {"Is this a melody, a rhythm or a single sound?": kind, "Is it loud or quiet?": level}
    return {
        "source": source,
        "kind": kind,
        "level": level,
        "heard": heard,
        "captions": [captions[i] for i in rng.permutation(len(captions))[:3]],
        "questions": [{"question": q, "answer": a} for q, a in {**of_all, **questions}.items()],
    }


# -- waves ---------------------------------------------------------------------------------------------------


def _clip(stem: str, key: str, wave: Wave, record: dict[str, Any], rng: np.random.Generator) -> Clip:
    """Add a background, bring the peak to the record's level, round to int16."""
    rms = np.sqrt(np.mean(wave**2))
    background = _noise(len(wave), rng.uniform(-0.8, 0), rng)
    wave = wave + background * rms * 10 ** (-rng.uniform(*BACKGROUND_DB) / 20) / np.sqrt(np.mean(background**2))
    peak = rng.uniform(*LEVELS[record["level"]])
    samples = np.round(wave * (peak * 32_767 / np.abs(wave).max())).astype(np.int16)
    return Clip(stem, key, samples, record | {"duration_s": round(seconds(len(samples)), 4)})


def _sound(sound: str, share: float, n_samples: int, rng: np.random.Generator) -> Wave:
    """One of SOUNDS; `share` in 0 to 1 sets its pitch within two octaves, or its rate, or its colour."""
    pitch, t = 220 * 4**share * rng.uniform(0.99, 1.01), np.arange(n_samples) / SAMPLE_RATE
    if sound in ("sine", "tremolo"):
        wave = _harmonics(pitch, [1.0], n_samples)
        depth = 0.9 if sound == "tremolo" else 0.0
        return wave * (1 - depth / 2 * (1 + np.sin(2 * np.pi * rng.uniform(4, 8) * t)))
    if sound in ("square", "sawtooth"):
        return _harmonics(pitch, [(k % 2 or sound == "sawtooth") / k for k in range(1, 36)], n_samples)
    if sound in ("hiss", "rumble"):
        return _noise(n_samples, share / 2 if sound == "hiss" else -1 - share / 2, rng)
    if sound in ("rising", "falling"):
        octaves = rng.uniform(1.2, 2) * t / t[-1]
        octaves = octaves if sound == "rising" else octaves[::-1]
        return np.sin(2 * np.pi * np.cumsum(pitch * 2**octaves) / SAMPLE_RATE)
    if sound == "clicks":
        wave, click = np.zeros(n_samples), _click(rng)
        for start in np.arange(0.02, seconds(n_samples), 1 / (8 * 2.5**share)):  # 8 to 20 a second
            _add(wave, click, round(start * SAMPLE_RATE))
        return wave
    assert sound == "bell", sound
    partials = np.array([1, 2, 2.4, 3, 4.5, 5.3]) * rng.uniform(0.99, 1.01, 6)  # roughly those of a church bell
    ringing = [np.exp(-2 * r * t) * np.sin(2 * np.pi * pitch * r * t) / np.sqrt(r) for r in partials]
    return np.sum(ringing, axis=0)


def _harmonics(pitch: float, weights: Sequence[float], n_samples: int) -> Wave:
    """Sines at the multiples of `pitch`, without those above half the sample rate, which would fold back."""
    wave, phase = np.zeros(n_samples), np.arange(n_samples) * (2 * np.pi * pitch / SAMPLE_RATE)
    for number, weight in enumerate(weights, start=1):
        if weight and number * pitch < SAMPLE_RATE / 2:
            wave += weight * np.sin(number * phase)
    return wave


def _noise(n_samples: int, slope: float, rng: np.random.Generator) -> Wave:
    """Noise whose amplitude goes with frequency to the power of `slope`: 0 is white, -1 brown."""
    span = -(-n_samples // 1_600) * 1_600  # many small factors: the transform is fast
    frequencies = np.fft.rfftfreq(span, 1 / SAMPLE_RATE)
    weights = (frequencies > 40) * np.maximum(frequencies, 40) ** slope  # brown noise is mostly inaudible otherwise
    parts = rng.standard_normal((2, len(frequencies)))
    return np.fft.irfft(weights * (parts[0] + 1j * parts[1]), span)[:n_samples]


def _click(rng: np.random.Generator) -> Wave:
    t = np.arange(SAMPLE_RATE // 100) / SAMPLE_RATE
    return rng.standard_normal(len(t)) * np.exp(-t / rng.uniform(0.001, 0.002))


def _faded(wave: Wave) -> Wave:
    """Ramps at both ends: a tone that starts at full level starts with a click."""
    ramp = np.minimum(1, np.arange(1, len(wave) + 1) / FADE)
    return wave * ramp * ramp[::-1]


def _add(wave: Wave, part: Wave, start: int) -> None:
    """Add `part` at sample `start`; what would stand behind the end is cut."""
    room = wave[start : start + len(part)]
    room += part[: len(room)]
