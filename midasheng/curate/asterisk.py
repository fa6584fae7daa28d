"""The Asterisk core sounds: telephone prompts in five languages, as Debian packages them.

fetch           packages -> Source                  transcripts, sounds and copyright of one voice
pair            Source -> Candidate, Dropped        transcript lines with .g722 files; what cannot be trusted goes
decode_g722     Candidate -> samples                audio_problem says which of them go too
licences        Source -> lines                     whose the recordings are, and under which terms
"""

import gzip
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from midasheng.config import UserError
from midasheng.curate import debian
from midasheng.frames import MIN_SAMPLES, seconds

MAX_CLIP_S = 40.0
MAX_LETTERS_PER_S = 25.0  # faster than anyone speaks: the audio is cut or the text belongs elsewhere
MIN_LETTERS_PER_S = 4.0  # of a text of MANY_LETTERS or more: the audio says more than the text
MANY_LETTERS = 20
MIN_PEAK = 0.01  # of full scale; below it nobody speaks


@dataclass(frozen=True)
class Voice:
    """Who reads the prompts of one language."""

    language: str  # as in the package name
    language_name: str
    speaker: str  # "woman" or "man"

    @property
    def packages(self) -> tuple[str, str]:
        """The Debian packages with the transcripts and with the 16 kHz audio."""
        return f"asterisk-core-sounds-{self.language}", f"asterisk-core-sounds-{self.language}-g722"


VOICES = (
    Voice("en", "English", "woman"),
    Voice("es", "Spanish", "woman"),
    Voice("fr", "French", "woman"),
    Voice("it", "Italian", "man"),
    Voice("ru", "Russian", "woman"),
)
LANGUAGE_NAMES = tuple(voice.language_name for voice in VOICES)

# Sounds whose transcript is a description, in one of the languages without the usual brackets.
SOUNDS = {"beep", "beeperr", "ascending-2tone", "descending-2tone"}
SOUNDS |= {"confbridge-join", "confbridge-leave", "tt-monkeys"}
# Transcripts that are not what is said: h-80 has the text of h-70; "eeks" is a joke about IAX2; the Spanish
# vm-mismatch would be half as fast again as anything else by that voice (the French one goes by its rate).
WRONG_TEXTS = {("fr", "digits/h-80"), ("fr", "spy-iax2"), ("es", "vm-mismatch")}


@dataclass(frozen=True)
class Source:
    """The unpacked packages of one voice."""

    voice: Voice
    transcripts: Path  # lines `name: text`, plain or gzip
    sounds: Path  # folder with NAME.g722
    copyright: Path
    versions: tuple[tuple[str, str], ...]  # (package, version)


@dataclass(frozen=True)
class Candidate:
    """A transcript with its audio file, not yet listened to."""

    source: Source
    name: str
    text: str
    is_part: bool  # the transcript marks it with dots as a part of a longer sentence
    audio: Path

    @property
    def key(self) -> str:
        """KEY of the record in its shard; the key of a webdataset record ends at the first dot."""
        return f"{self.source.voice.language}_" + re.sub(r"[^A-Za-z0-9-]", "_", self.name)


@dataclass(frozen=True)
class Dropped:
    """A prompt that did not become a record, and why."""

    name: str
    language: str
    reason: str


# -- packages ------------------------------------------------------------------------------------------------


def fetch(voices: Sequence[Voice], downloads: Path) -> list[Source]:
    """Download and unpack the packages of `voices` into `downloads`, reusing what is there.

    Raises UserError naming what is missing: a Debian tool, the network, or a readable package.
    """
    packages = [package for voice in voices for package in voice.packages]
    debs = dict(zip(packages, debian.download(packages, downloads), strict=True))
    return [
        _unpacked_source(voice, *(debs[package] for package in voice.packages))
        for voice in tqdm(voices, desc="unpack", leave=False, disable=None)
    ]


def _unpacked_source(voice: Voice, text_deb: Path, audio_deb: Path) -> Source:
    text_root, audio_root = debian.unpack(text_deb), debian.unpack(audio_deb)
    doc = text_root / "usr/share/doc" / voice.packages[0]
    transcripts = sorted(doc.glob(f"core-sounds-{voice.language}.txt*"))
    sounds = sorted((audio_root / "usr/share/asterisk/sounds").glob(f"{voice.language}_*"))
    if len(transcripts) != 1 or len(sounds) != 1:
        raise UserError(
            f"{text_deb.name} and {audio_deb.name} hold {len(transcripts)} transcripts and {len(sounds)} "
            f"voices in {voice.language_name}, expected one of each; version 1.6.1 is known to work"
        )
    versions = tuple(
        (package, debian.version(deb)) for package, deb in zip(voice.packages, (text_deb, audio_deb), strict=True)
    )
    return Source(voice, transcripts[0], sounds[0], doc / "copyright", versions)


def licences(sources: Sequence[Source]) -> Iterator[str]:
    """Lines of the LICENCES file: what the recordings are, whose, under which terms, and what was changed.

    Raises UserError when a copyright file does not say so.
    """
    yield "The recordings and transcripts in shards/ come from these Debian packages and keep their licences."
    yield "Changed here: G.722 audio decoded, a part of it coded as GSM at 8 kHz and decoded, stored as FLAC;"
    yield "transcripts cleaned; both cut into records; prompts dropped as dropped.jsonl lists; captions, questions"
    yield "and instructions composed from language, voice and text."
    for source in sources:
        paragraphs = source.copyright.read_text(encoding="utf-8").split("\n\n")
        terms = _terms(paragraphs, source.voice.language)
        licence = next(line.split(":")[1].strip() for line in terms.splitlines() if line.startswith("License:"))
        kind, _, version = licence.removeprefix("CC-").rpartition("-")
        yield ""
        yield f"== {source.voice.language_name}"
        yield from (f"{package} {version}" for package, version in source.versions)
        yield f"{licence}: https://creativecommons.org/licenses/{kind.lower()}/{version}/"
        yield from paragraphs[0].splitlines()[1:3]  # upstream name and source
        yield from terms.splitlines()[1:]


def _terms(paragraphs: Sequence[str], language: str) -> str:
    """The paragraph of a Debian copyright file on the files of `language`, else the one on all files."""
    patterns = (f"Files: {language}-*", "Files: *")
    found = (p.strip() for pattern in patterns for p in paragraphs if p.lstrip().startswith(pattern))
    terms = next(found, "")
    if "\nLicense:" not in terms:
        raise UserError(f"the copyright file names no licence for {language}; version 1.6.1 is known to work")
    return terms


# -- transcripts ---------------------------------------------------------------------------------------------


def read_transcripts(raw: bytes, names: Collection[str]) -> dict[str, list[str]]:
    """Texts by name from lines `name: text`; a name found twice with different texts has both.

    `names` are the audio files there are: a name in the wrong case finds its file, and a line that swallowed
    the next one (`... text. other-name: text`) is taken apart.
    """
    by_lower = {name.lower(): name for name in names}
    assert len(by_lower) == len(names), "audio names differ in case only"
    texts: dict[str, list[str]] = {}
    for line in _decode(raw).splitlines():
        if line.startswith(";") or ":" not in line:
            continue
        for name, text in _entries(line, by_lower):
            given = texts.setdefault(by_lower.get(name.lower(), name), [])
            if text and text not in given:
                given.append(text)
    return texts


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")  # one of the files begins with a byte order mark
    except UnicodeDecodeError:
        return raw.decode("cp1252")


def _entries(line: str, by_lower: Collection[str]) -> Iterator[tuple[str, str]]:
    name, rest = line.split(":", 1)
    start = 0
    for match in re.finditer(r"(?<![\w-])([A-Za-z]\w*(?:-\w+)+):\s", rest):
        if match[1].lower() in by_lower:
            yield name.strip(), _spaced(rest[start : match.start()])
            name, start = match[1], match.end()
    yield name.strip(), _spaced(rest[start:])


def _spaced(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def clean_text(text: str) -> str:
    """What is spoken: without glosses of symbols ("at [@]"), stray quotes, and dots that mark a fragment."""
    text = _spaced(re.sub(r"\[\W*\]", "", text))
    if re.fullmatch(r'["“].*["”]', text):
        text = text[1:-1]
    elif text.count('"') % 2:
        text = text.strip('"')
    return re.sub(r"^(?:\.{2,}|…)|(?:\.{2,}|…)$", "", text.strip()).strip(" ,:;")


def normalise(text: str) -> str:
    """The words of a transcript and nothing else: lower case, without punctuation, single spaces."""
    return " ".join(re.sub(r"[\W_]+", " ", unicodedata.normalize("NFC", text).casefold()).split())


def pair(source: Source) -> tuple[list[Candidate], list[Dropped]]:
    """Match the transcripts of a voice with its audio files; drop what its text makes untrustworthy."""
    audio = {str(p.relative_to(source.sounds).with_suffix("")): p for p in sorted(source.sounds.rglob("*.g722"))}
    raw = source.transcripts.read_bytes()
    texts = read_transcripts(gzip.decompress(raw) if source.transcripts.suffix == ".gz" else raw, audio.keys())
    kept, dropped = [], []
    for name in sorted(audio.keys() | texts.keys()):
        given = texts.get(name, [])
        reason = _text_problem(source.voice.language, name, given)
        if reason is None and name not in audio:
            reason = "no audio"
        if reason is None and audio[name].stat().st_size == 0:
            reason = "empty audio"
        if reason is not None:
            dropped.append(Dropped(name, source.voice.language, reason))
            continue
        is_part = re.search(r"^\W*(?:\.{2,}|…)|(?:\.{2,}|…)\W*$", given[0]) is not None
        kept.append(Candidate(source, name, clean_text(given[0]), is_part, audio[name]))
    return kept, dropped


def _text_problem(language: str, name: str, given: Sequence[str]) -> str | None:
    if name.startswith("silence/"):
        return "silence"
    if name in SOUNDS or any(re.fullmatch(r"[\[(<].*[\])>]", text) for text in given):
        return "a sound, not speech"
    if len(given) > 1:
        return "two texts"
    if not given or not normalise(clean_text(given[0])):
        return "no text"
    if (language, name) in WRONG_TEXTS:
        return "wrong text"
    if re.search(r"[\[\](){}<>]", clean_text(given[0])):
        return "a note in the text"  # spoken or not? the source does not say
    if language == "ru" and not re.search(r"[а-яё]", given[0].lower()):
        return "not in the language"
    return None


# -- audio ---------------------------------------------------------------------------------------------------


def decode_g722(path: Path) -> NDArray[np.int16]:
    """The mono 16 kHz int16 samples of a raw G.722 file at 64 kbit/s. Raises av.error.FFmpegError."""
    with av.open(str(path), format="g722") as container:
        parts = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    samples = np.concatenate(parts) if parts else np.zeros(0, np.int16)
    assert samples.dtype == np.int16, f"{path}: decoded to {samples.dtype}"
    return samples


def audio_problem(samples: NDArray[np.int16], text: str) -> str | None:
    """Why this audio should not be trained on with this text; None when it may be."""
    n_letters, duration_s = len(normalise(text)), seconds(len(samples))
    if len(samples) < MIN_SAMPLES:
        return "too short"
    if duration_s > MAX_CLIP_S:
        return "too long"
    if np.abs(samples.astype(np.int32)).max() < MIN_PEAK * 32_768:
        return "no sound"
    if n_letters > MAX_LETTERS_PER_S * duration_s:
        return "too much text for the audio"
    if n_letters >= MANY_LETTERS and n_letters < MIN_LETTERS_PER_S * duration_s:
        return "too little text for the audio"
    return None
