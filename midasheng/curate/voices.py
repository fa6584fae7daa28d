"""Other voices in known languages: does the model tell languages, or the five voices it was trained on?

The Asterisk core sounds have one voice a language, so who knows the voice knows the language. These clips are asked
about and never trained on: other speakers of three of the languages, as recorded for the telephone (GSM at 8 kHz), and
for a fair comparison test clips of the known voices, as they are and through the same codec.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from midasheng.config import UserError
from midasheng.curate import debian
from midasheng.curate.asterisk import SOUNDS, VOICES, audio_problem
from midasheng.curate.shards import Clip
from midasheng.frames import SAMPLE_RATE, seconds
from midasheng.sample import unit_hash

# package -> (language, folder of its sounds); speakers as the packages name them: July E. Jimenez (Avatar Ltda.),
# Armelle Desjardins, Paola Dal Zot
OTHERS = {
    "asterisk-prompt-es-co": ("es", "es"),
    "asterisk-prompt-fr-armelle": ("fr", "fr"),
    "asterisk-prompt-it-menardi-gsm": ("it", "it_IT_f_Menardi"),
}
CLIPS_EACH = 60
MIN_CLIP_S = 1.0  # of less, nobody tells the language
PHONE_RATE = 8_000
NAMES = {voice.language: voice.language_name for voice in VOICES}


def fetch(downloads: Path) -> dict[str, Path]:
    """Package -> unpacked folder. Raises UserError as `debian.download`."""
    return {p: debian.unpack(deb) for p, deb in zip(OTHERS, debian.download(list(OTHERS), downloads), strict=True)}


def licences(folders: dict[str, Path]) -> Iterator[str]:
    """Lines of the LICENCES file: each package's own words."""
    yield "== other voices (changed here: GSM audio decoded, resampled to 16 kHz and stored as FLAC)"
    for package, folder in folders.items():
        yield f"-- {folder.name}"
        text = (folder / "usr/share/doc" / package / "copyright").read_text(encoding="utf-8", errors="replace")
        yield from (line.rstrip() for line in text.splitlines())


def other_voices(folders: dict[str, Path]) -> Iterator[Clip]:
    """Up to 60 clips of each other voice. Raises UserError when a package has no sounds where they should be."""
    for package, folder in folders.items():
        language, name = OTHERS[package]
        sounds = folder / "usr/share/asterisk/sounds" / name
        found = 0
        for path in sorted(sounds.rglob("*.gsm"), key=lambda p: unit_hash(str(p.relative_to(sounds)))):
            prompt = str(path.relative_to(sounds).with_suffix(""))
            if prompt.startswith("silence/") or prompt in SOUNDS:
                continue
            samples = from_phone(path.read_bytes())
            if seconds(len(samples)) < MIN_CLIP_S or audio_problem(samples, text=""):
                continue
            key = f"{package.removeprefix('asterisk-prompt-')}_{prompt}".replace("/", "_").replace(".", "_")
            yield Clip("voices-other-phone", key, samples, _record(key, language, samples), "test")
            found += 1
            if found == CLIPS_EACH:
                break
        if not found:
            raise UserError(f"{package}: no .gsm files below {sounds}; delete {folder} and run again")


def known_voices(clips: Iterable[Clip]) -> Iterator[Clip]:
    """The test clips among `clips` of the core sounds, as they are and through the telephone's codec."""
    for clip in clips:
        if clip.shards.endswith("-test") and seconds(len(clip.samples)) >= MIN_CLIP_S:
            record = _record(clip.key, clip.record["language"], clip.samples)
            yield Clip("voices-known", clip.key, clip.samples, record, "test")
            yield Clip("voices-known-phone", clip.key, from_phone(to_phone(clip.samples)), record, "test")


def _record(key: str, language: str, samples: NDArray[np.int16]) -> dict[str, object]:
    duration_s = round(seconds(len(samples)), 4)
    return {"source": key, "language": language, "language_name": NAMES[language], "duration_s": duration_s}


def to_phone(samples: NDArray[np.int16]) -> bytes:
    """16 kHz int16 -> raw GSM 06.10 at 8 kHz."""
    file = io.BytesIO()
    narrow = soxr.resample(samples, SAMPLE_RATE, PHONE_RATE)
    soundfile.write(file, narrow, PHONE_RATE, format="RAW", subtype="GSM610")
    return file.getvalue()


def from_phone(raw: bytes) -> NDArray[np.int16]:
    """Raw GSM 06.10 at 8 kHz -> 16 kHz int16, with nothing above 4 kHz."""
    narrow, _ = soundfile.read(
        io.BytesIO(raw), samplerate=PHONE_RATE, channels=1, format="RAW", subtype="GSM610", dtype="int16"
    )
    return np.asarray(soxr.resample(narrow, PHONE_RATE, SAMPLE_RATE), dtype=np.int16)
