"""The mini corpus: telephone prompts in five languages, from Debian packages to shards and a tokenizer.

packages        apt-get download, dpkg -x                  no root; data/downloads
  | pair        transcript lines with .g722 files          what cannot be trusted is dropped, with a reason
  | describe    captions, questions, instructions          only from what the source says
  | write       KEY.flac + KEY.json in shuffled shards     test records in shards of their own
data/mini       shards/ tokenizer/ LICENCES dropped.jsonl, and prepared.json, written last
"""

import gzip
import io
import json
import os
import re
import shutil
import subprocess
import time
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import unquote

import av
import numpy as np
import soundfile
import webdataset
from tqdm import tqdm

from midasheng.curate.tokenizer import DEFAULT_TOKENS, save_tokenizer, train_tokenizer
from midasheng.frames import MIN_SAMPLES, SAMPLE_RATE, seconds
from midasheng.sample import unit_hash

VERSION = 1  # of what this file writes: raise it when records change, so that old output is made anew
FINISHED = "prepared.json"  # the finish marker
MAX_SHARD_BYTES = 20_000_000
TEST_SHARE = 0.06
VALIDATION_SHARE = 0.08  # as `held_out` of the cards says; such text must not reach the tokenizer
MAX_CLIP_S = 40.0
MAX_LETTERS_PER_S = 25.0  # faster than anyone speaks: the audio is cut or the text belongs elsewhere
MIN_LETTERS_PER_S = 4.0  # of a text of MANY_LETTERS or more: the audio says more than the text
MANY_LETTERS = 20
MANY_WORDS = 20  # nobody counts more by ear, and an answer should stay short
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


@dataclass(frozen=True)
class Summary:
    """What was prepared: clips and hours per language and split, and the drops by reason."""

    clips: dict[str, dict[str, int]]  # language -> split -> clips
    hours: dict[str, dict[str, float]]
    dropped: dict[str, dict[str, int]]  # reason -> language -> prompts

    def table(self) -> str:
        """The summary as lines of text."""
        lines = [f"{'':34s}" + "".join(f"{column:>9s}" for column in [*self.clips, "all"])]
        for split in ("train", "test"):
            clips = [by_split[split] for by_split in self.clips.values()]
            hours = [by_split[split] for by_split in self.hours.values()]
            lines.append(f"{split + ', clips':34s}" + "".join(f"{n:9d}" for n in [*clips, sum(clips)]))
            lines.append(f"{split + ', hours':34s}" + "".join(f"{h:9.2f}" for h in [*hours, sum(hours)]))
        for reason, counts in sorted(self.dropped.items()):
            counted = [counts.get(language, 0) for language in self.clips]
            lines.append(f"{'dropped: ' + reason:34s}" + "".join(f"{n:9d}" for n in [*counted, sum(counted)]))
        return "\n".join(lines)


def prepare(out: Path, downloads: Path, prompts: Sequence[str], max_tokens: int = DEFAULT_TOKENS) -> Summary:
    """Make the mini corpus in `out` from Debian packages kept in `downloads`; nothing to do when it is there.

    `prompts` are the prompts of the corpus cards, for the tokenizer only. Raises RuntimeError when packages
    cannot be had or unpacked, ValueError for an impossible `max_tokens`.
    """
    return finished(out, max_tokens) or build(fetch(VOICES, downloads), out, prompts, max_tokens)


def finished(out: Path, max_tokens: int = DEFAULT_TOKENS) -> Summary | None:
    """The summary of a complete `out` made by this version with these settings, else None."""
    try:
        marker = json.loads((out / FINISHED).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if marker.get("settings") != _settings(max_tokens):
        return None
    for name, n_bytes in marker["files"].items():
        path = out / name
        if not path.is_file() or path.stat().st_size != n_bytes:
            return None
    return Summary(**marker["summary"])


def build(
    sources: Sequence[Source], out: Path, prompts: Sequence[str], max_tokens: int = DEFAULT_TOKENS
) -> Summary:
    """Make the corpus from unpacked packages, replacing whatever stands in `out` by the same names.

    Everything is written into `out`/.partial, moved into place, and marked finished at the very end.
    """
    work = out / ".partial"
    shutil.rmtree(work, ignore_errors=True)
    (work / "shards").mkdir(parents=True)
    candidates, dropped = [], []
    for source in sources:
        paired, unpaired = pair(source)
        candidates += paired
        dropped += unpaired
    # A fixed shuffle: every shard has all languages, and every run the same shards.
    candidates.sort(key=lambda candidate: unit_hash("order:" + candidate.key))
    keys = {candidate.key for candidate in candidates}
    assert len(keys) == len(candidates), f"{len(candidates)} prompts have {len(keys)} keys"

    records, unusable = _write_shards(candidates, work / "shards")
    dropped += unusable
    dropped.sort(key=lambda drop: (drop.language, drop.name))
    _write_lines(work / "dropped.jsonl", (json.dumps(asdict(d), ensure_ascii=False) for d in dropped))
    _write_lines(work / "LICENCES", licences(sources))
    save_tokenizer(
        train_tokenizer(training_text(records, prompts), LANGUAGE_NAMES, max_tokens), work / "tokenizer"
    )

    summary = _summarise(sources, records, dropped)
    _publish(work, out, {"settings": _settings(max_tokens), "summary": asdict(summary)})
    return summary


def _settings(max_tokens: int) -> dict[str, int]:
    return {"version": VERSION, "max_tokens": max_tokens}


def _publish(work: Path, out: Path, marker: dict[str, object]) -> None:
    """Move what `work` holds into `out`, then write the finish marker."""
    files = {str(p.relative_to(work)): p.stat().st_size for p in sorted(work.rglob("*")) if p.is_file()}
    (out / FINISHED).unlink(missing_ok=True)  # from here to the last line `out` is unfinished
    for made in sorted(work.iterdir()):
        place = out / made.name
        if place.is_dir():
            shutil.rmtree(place)  # with the index files of its old shards
        os.replace(made, place)
    work.rmdir()
    text = json.dumps(marker | {"files": files}, indent=2, ensure_ascii=False) + "\n"
    unready = out / (FINISHED + ".partial")
    unready.write_text(text, encoding="utf-8")
    os.replace(unready, out / FINISHED)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _summarise(sources: Sequence[Source], records: Sequence[dict], dropped: Sequence[Dropped]) -> Summary:
    languages = [source.voice.language for source in sources]
    clips = {language: {"train": 0, "test": 0} for language in languages}
    hours = {language: {"train": 0.0, "test": 0.0} for language in languages}
    reasons: dict[str, dict[str, int]] = {}
    for record in records:
        clips[record["language"]][split_of(record["source"])] += 1
        hours[record["language"]][split_of(record["source"])] += record["duration_s"] / 3_600
    for drop in dropped:
        counts = reasons.setdefault(drop.reason, {})
        counts[drop.language] = counts.get(drop.language, 0) + 1
    return Summary(clips, hours, reasons)


# ---- packages ----------------------------------------------------------------------------------------


def fetch(voices: Sequence[Voice], downloads: Path) -> list[Source]:
    """Download and unpack the packages of `voices` into `downloads`, reusing what is there.

    Raises RuntimeError naming what is missing: a Debian tool, the network, or a readable package.
    """
    downloads.mkdir(parents=True, exist_ok=True)
    wanted = [package for voice in voices for package in voice.packages]
    missing = [package for package in wanted if _newest(package, downloads) is None]
    if missing:
        _apt_download(missing, downloads)
    return [
        _unpacked_source(voice, downloads) for voice in tqdm(voices, desc="unpack", leave=False, disable=None)
    ]


def _newest(package: str, downloads: Path) -> Path | None:
    """The last of the downloaded versions of `package`, by file name."""
    return max(downloads.glob(f"{package}_*.deb"), default=None)


def _apt_download(packages: Sequence[str], downloads: Path, attempts: int = 4) -> None:
    """Fetch `packages` with apt-get, by private package lists where the machine's own do not serve."""
    if shutil.which("apt-get") is None:
        raise RuntimeError(
            f"apt-get is not installed here. Download these Debian packages elsewhere "
            f"(https://packages.debian.org) and put the .deb files into {downloads}: {' '.join(packages)}"
        )
    incoming = downloads / "incoming"
    incoming.mkdir(exist_ok=True)
    download = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", *packages]
    result = _run(download, incoming)
    for attempt in range(attempts - 1):
        if result.returncode == 0:
            break
        time.sleep(2**attempt - 1)
        private = _private_apt(downloads / "apt")
        result = _run(["apt-get", "-qq", *private, "update"], incoming)
        if result.returncode == 0:
            result = _run([*download[:1], *private, *download[1:]], incoming)
    if result.returncode != 0:
        raise RuntimeError(
            f"apt-get could not download {' '.join(packages)} in {attempts} attempts:\n"
            f"{result.stderr.strip()}\n"
            f"Check the network and the Debian sources here, or put the .deb files into {downloads}."
        )
    for deb in sorted(incoming.glob("*.deb")):
        os.replace(deb, downloads / deb.name)  # only now: a file here is a whole file
    shutil.rmtree(incoming)


def _private_apt(folder: Path) -> list[str]:
    """Options that keep apt's lists and cache in `folder`, so that `apt-get update` needs no root."""
    folder = folder.resolve()
    for name in ("state/lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    places = {"Dir::State": "state", "Dir::State::lists": "state/lists", "Dir::Cache": "cache"}
    options = [f"{option}={folder / name}" for option, name in places.items()]
    return [word for option in ["APT::Sandbox::User=root", *options] for word in ("-o", option)]


def _run(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"LC_ALL": "C"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def _unpacked_source(voice: Voice, downloads: Path) -> Source:
    text_deb, audio_deb = (_newest(package, downloads) for package in voice.packages)
    assert text_deb and audio_deb, f"{voice.packages} are not in {downloads}"
    text_root, audio_root = unpack(text_deb), unpack(audio_deb)
    doc = text_root / "usr/share/doc" / voice.packages[0]
    transcripts = sorted(doc.glob(f"core-sounds-{voice.language}.txt*"))
    sounds = sorted((audio_root / "usr/share/asterisk/sounds").glob(f"{voice.language}_*"))
    if len(transcripts) != 1 or len(sounds) != 1:
        raise RuntimeError(
            f"{text_deb.name} and {audio_deb.name} hold {len(transcripts)} transcripts and {len(sounds)} "
            f"voices in {voice.language_name}, expected one of each; version 1.6.1 is known to work"
        )
    versions = tuple(
        (deb.name.split("_")[0], unquote(deb.name.split("_")[1])) for deb in (text_deb, audio_deb)
    )
    return Source(voice, transcripts[0], sounds[0], doc / "copyright", versions)


def unpack(deb: Path) -> Path:
    """Unpack a .deb next to itself, once; returns the folder. Raises RuntimeError for a damaged package."""
    folder = deb.parent / "unpacked" / deb.name.removesuffix(".deb")
    if folder.is_dir():
        return folder
    if shutil.which("dpkg") is None:
        raise RuntimeError(
            f"dpkg is not installed here, and {deb.name} must be unpacked: install the package dpkg"
        )
    unready = folder.with_name(folder.name + ".partial")
    shutil.rmtree(unready, ignore_errors=True)
    unready.mkdir(parents=True)
    result = _run(["dpkg", "-x", str(deb.resolve()), str(unready.resolve())], deb.parent)
    if result.returncode != 0:
        raise RuntimeError(f"{deb} does not unpack; delete it and run again:\n{result.stderr.strip()}")
    os.replace(unready, folder)
    return folder


def licences(sources: Sequence[Source]) -> Iterator[str]:
    """Lines of the LICENCES file: what the recordings are, whose, under which terms, and what was changed."""
    yield "The recordings and transcripts in shards/ come from these Debian packages and keep their licences."
    yield "Changed here: G.722 audio decoded and stored as FLAC, transcripts cleaned, both cut into records;"
    yield "prompts dropped as dropped.jsonl lists; captions, questions and instructions composed from"
    yield "language, voice and text."
    for source in sources:
        paragraphs = source.copyright.read_text(encoding="utf-8").split("\n\n")
        terms = _terms(paragraphs, source.voice.language)
        licence = next(
            line.split(":")[1].strip() for line in terms.splitlines() if line.startswith("License:")
        )
        kind, _, version = licence.removeprefix("CC-").rpartition("-")
        yield ""
        yield f"== {source.voice.language_name}"
        yield from (f"{package} {version}" for package, version in source.versions)
        yield f"{licence}: https://creativecommons.org/licenses/{kind.lower()}/{version}/"
        yield from paragraphs[0].splitlines()[1:3]  # upstream name and source
        yield from terms.splitlines()[1:]


def _terms(paragraphs: Sequence[str], language: str) -> str:
    """The paragraph of a Debian copyright file on the files of `language`, else the one on all files."""
    for pattern in (f"Files: {language}-*", "Files: *"):
        for paragraph in paragraphs:
            if paragraph.lstrip().startswith(pattern):
                return paragraph.strip()
    raise RuntimeError(f"the copyright file says nothing on {language}: its licence is unknown")


# ---- transcripts -------------------------------------------------------------------------------------


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


def split_of(source: str) -> str:
    """The split, test or train, of a normalised transcript; no text is in both, whatever language says it."""
    return "test" if unit_hash("test:" + source) < TEST_SHARE else "train"


def pair(source: Source) -> tuple[list[Candidate], list[Dropped]]:
    """Match the transcripts of a voice with its audio files; drop what its text makes untrustworthy."""
    audio = {
        str(p.relative_to(source.sounds).with_suffix("")): p for p in sorted(source.sounds.rglob("*.g722"))
    }
    raw = source.transcripts.read_bytes()
    texts = read_transcripts(
        gzip.decompress(raw) if source.transcripts.suffix == ".gz" else raw, audio.keys()
    )
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


# ---- audio -------------------------------------------------------------------------------------------


def decode_g722(path: Path) -> np.ndarray:
    """The mono 16 kHz int16 samples of a raw G.722 file at 64 kbit/s. Raises av.error.FFmpegError."""
    with av.open(str(path), format="g722") as container:
        parts = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
    samples = np.concatenate(parts) if parts else np.zeros(0, np.int16)
    assert samples.dtype == np.int16, f"{path}: decoded to {samples.dtype}"
    return samples


def audio_problem(samples: np.ndarray, text: str) -> str | None:
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


def _write_shards(candidates: Sequence[Candidate], folder: Path) -> tuple[list[dict], list[Dropped]]:
    """Decode and write the records in the order given; returns their JSON and what was dropped."""
    records, dropped = [], []
    shards = {split: Shards(folder, f"asterisk-{split}") for split in ("train", "test")}
    for candidate in tqdm(candidates, desc="decode", unit="clip", disable=None):
        try:
            samples = decode_g722(candidate.audio)
        except av.error.FFmpegError:
            reason = "unreadable audio"
        else:
            reason = audio_problem(samples, candidate.text)
        if reason is not None:
            dropped.append(Dropped(candidate.name, candidate.source.voice.language, reason))
            continue
        record = describe(candidate, round(seconds(len(samples)), 4))
        shards[split_of(record["source"])].write(candidate.key, samples, record)
        records.append(record)
    for shard in shards.values():
        shard.close()
    return records, dropped


class Shards:
    """Numbered tar shards of at most MAX_SHARD_BYTES or one record, with equal bytes on every run."""

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder, self.stem = folder, stem
        self.n_shards, self.n_bytes = 0, 0
        self.writer: webdataset.TarWriter | None = None

    def write(self, key: str, samples: np.ndarray, record: dict) -> None:
        """Add a record: `samples` are mono int16 at 16 kHz."""
        flac = io.BytesIO()
        soundfile.write(flac, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        text = json.dumps(record, ensure_ascii=False).encode()
        n_bytes = len(flac.getvalue()) + len(text)
        if self.writer is not None and self.n_bytes + n_bytes > MAX_SHARD_BYTES:
            self.close()
        if self.writer is None:
            path = self.folder / f"{self.stem}-{self.n_shards:06d}.tar"
            # A fixed mtime: equal bytes, and no PAX headers, which make reading twice as slow.
            self.writer = webdataset.TarWriter(str(path), encoder=False, mtime=0)
            self.n_shards, self.n_bytes = self.n_shards + 1, 0
        self.writer.write({"__key__": key, "flac": flac.getvalue(), "json": text})
        self.n_bytes += n_bytes

    def close(self) -> None:
        """Finish the shard that is open, if one is."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None


# ---- descriptions: nothing that language, voice, name, text and length do not say --------------------


def describe(candidate: Candidate, duration_s: float) -> dict:
    """The JSON of a record: its text and true statements about it as captions, questions and instructions."""
    voice, text = candidate.source.voice, candidate.text
    source = normalise(text)
    pick = Chooser(candidate.key)
    form = _form(candidate)
    captions = _captions(pick, voice, form, text)
    words = plain_words(text)
    return {
        "source": source,
        "language": voice.language,
        "language_name": voice.language_name,
        "speaker": voice.speaker,
        "text": text,
        "duration_s": duration_s,
        "captions": captions,
        "questions": _questions(pick, voice, candidate.name, words, duration_s),
        "instructions": _instructions(pick, voice, form, text, words),
    }


@dataclass(frozen=True)
class Chooser:
    """Choices that look random and depend on the key of the record only."""

    key: str

    def share(self, purpose: str) -> float:
        """A number in [0, 1)."""
        return unit_hash(f"{purpose}:{self.key}")

    def order(self, purpose: str, options: Sequence[str]) -> list[str]:
        """`options` shuffled."""
        return sorted(options, key=lambda option: unit_hash(f"{purpose}:{self.key}:{option}"))


# What the file name says about what is spoken: (pattern, form, answer to KINDS).
KINDS = "Which of these is spoken: a number, a letter, a day of the week or a month?"
NAMED_FORMS = (
    (r"letters/(\w|zed)", "the name of a letter", "a letter"),
    (r"digits/\d+[fmn]?", "a number", "a number"),
    (r"digits/h-\d+", "an ordinal number", ""),
    (r"digits/day-\d", "a day of the week", "a day of the week"),
    (r"digits/mon-\d+", "the name of a month", "a month"),
    (r"phonetic/\w_p", "a code word of a spelling alphabet", ""),
)


def _named(name: str) -> tuple[str, str]:
    """Form and answer to KINDS that the file name gives away; empty where it does not."""
    for pattern, form, answer in NAMED_FORMS:
        if re.fullmatch(pattern, name, re.IGNORECASE):
            return form, answer
    return "", ""


def _form(candidate: Candidate) -> str:
    form, _ = _named(candidate.name)
    words = normalise(candidate.text).split()
    if form:
        return form
    if len(words) == 1:
        return "one word"
    if all(len(word) == 1 for word in words):
        return "a few letters"
    if len(re.findall(r"[^\W\d_]{2,}[.!?](?:\s|$)", candidate.text)) > 1:
        return "several sentences"
    if len(words) <= 4:
        return "a short phrase"
    if candidate.is_part:
        return "part of a sentence"
    if len(words) > MANY_WORDS:
        return "a long sentence"
    return "a sentence" if candidate.text.endswith((".", "!", "?")) else "a phrase"


def _captions(pick: Chooser, voice: Voice, form: str, text: str) -> list[str]:
    """Three captions; on average half of them quote the transcript, a long one by its beginning."""
    who, language = f"A {voice.speaker}", voice.language_name
    words = text.replace('"', "'").split()
    quote = f'"{" ".join(words)}"' if len(words) <= MANY_WORDS else f'"{" ".join(words[:10])} ..."'
    plain = [
        f"{who} speaks {language}, {form}, recorded in a studio for a telephone system.",
        f"A studio-recorded telephone prompt: {form} in {language}, spoken by a {voice.speaker}.",
        f"{who} reads {form} in {language} for a telephone system.",
        f"Speech in {language}: {form}, read by a {voice.speaker} in a studio.",
    ]
    quoting = [
        f"{who} speaks {language}, {form}: {quote}",
        f"A telephone prompt in {language}, read by a {voice.speaker}: {quote}",
        f"{form[0].upper()}{form[1:]} in {language}, spoken by a {voice.speaker}: {quote}",
    ]
    n_quoting = 1 if pick.share("quotes") < 0.5 else 2
    return pick.order("quoting", quoting)[:n_quoting] + pick.order("plain", plain)[: 3 - n_quoting]


def plain_words(text: str) -> list[str] | None:
    """The words of `text` without punctuation; None where it is open how many they are ("28.8", "#")."""
    if re.search(r"\b[A-ZА-Я]{2}|\b[A-ZА-Я] [A-ZА-Я]\b", text):
        return None  # initials: one word or several?
    tokens = [token.strip(".,;:!?¡¿…«»“”\"'-–—") for token in text.split()]
    tokens = [token for token in tokens if token]
    is_word = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|\d")
    return tokens if tokens and all(is_word.fullmatch(token) for token in tokens) else None


def _asked(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"question": question, "answer": answer} for question, answer in pairs]


def _questions(
    pick: Chooser, voice: Voice, name: str, words: Sequence[str] | None, duration_s: float
) -> list[dict[str, str]]:
    others = pick.order("other language", [other for other in LANGUAGE_NAMES if other != voice.language_name])
    asked_language = voice.language_name if pick.share("is it") < 0.5 else others[0]
    asked_speaker = pick.order("who", ["man", "woman"])[0]
    options = pick.order("options", [voice.language_name, *others[:2]])
    letter = "ABC"[options.index(voice.language_name)]
    listed = ", ".join(f"({name}) {option}" for name, option in zip("ABC", options, strict=True))
    questions = _asked(
        ("Which language does the speaker use?", voice.language_name),
        ("Is the speaker a man or a woman?", voice.speaker),
        (
            f"Is the speech in {asked_language}? Answer yes or no.",
            _yes(asked_language == voice.language_name),
        ),
        (f"Is the speaker a {asked_speaker}? Answer yes or no.", _yes(asked_speaker == voice.speaker)),
        (f"Which language is spoken: {listed}? Answer with the letter.", letter),
    )
    if (
        abs(duration_s - 1.5) > 0.1
    ):  # near the median, so that yes and no are even; at the line nobody can tell
        questions += _asked(
            ("Is the recording longer than 1.5 seconds? Answer yes or no.", _yes(duration_s > 1.5))
        )
    if words is not None and len(words) <= MANY_WORDS:
        questions += _asked(("How many words are spoken? Answer with a number.", str(len(words))))
    if words is not None and len(words) > 1:
        questions += _asked(("What is the first word?", words[0]), ("What is the last word?", words[-1]))
    _, kind = _named(name)
    if kind:
        questions += _asked((KINDS, kind))
    return questions


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


def _instructions(
    pick: Chooser, voice: Voice, form: str, text: str, words: Sequence[str] | None
) -> list[dict[str, str]]:
    who, language = f"a {voice.speaker}", voice.language_name
    instructions = _asked(
        ("Answer in one word: which language is this?", language),
        ("Describe the recording in one sentence.", f"A {voice.speaker} reads {form} in {language}."),
        (
            "Say who speaks and in which language, in at most five words.",
            f"{who.capitalize()} speaks {language}.",
        ),
        (
            "Answer in JSON with the keys language and speaker.",
            json.dumps({"language": language, "speaker": voice.speaker}),
        ),
    )
    if len(text.split()) <= 2 * MANY_WORDS:
        instructions += _asked(
            ("Write down what is said, in capital letters.", text.upper()),
            ("Name the language, then write down what is said.", f"{language}: {text}"),
        )
    if words is not None and len(words) > 1:
        instructions += _asked(("Repeat the last word.", words[-1]), ("Repeat the first word.", words[0]))
    if words is not None and 1 < len(words) <= 2 * MANY_WORDS:
        lower = " ".join(words).lower()
        instructions += _asked(("Write down what is said in lower case, without punctuation.", lower))
    if words is not None and len(words) > 4:
        instructions += _asked(("Write down the first three words only.", " ".join(words[:3])))
    if words is not None and len(words) == 1 and len(words[0]) > 1 and words[0].isalpha():
        instructions += _asked(
            ("Spell the word, with a space between the letters.", " ".join(words[0].lower()))
        )
    return instructions


ROLES = ("user", "assistant")  # stand in every conversation


def training_text(records: Iterable[dict], prompts: Sequence[str]) -> Iterator[str]:
    """Every text the mini decoder may see in training: neither test nor validation records."""
    for record in records:
        source = record["source"]
        if split_of(source) == "test" or unit_hash("held_out:" + source) < VALIDATION_SHARE:
            continue
        yield from ROLES
        yield record["text"]
        yield from record["captions"]
        for pair in record["questions"] + record["instructions"]:
            yield pair["question"]
            yield pair["answer"]
        yield from (prompt.format_map(record) for prompt in prompts)
