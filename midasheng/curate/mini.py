"""The mini corpus: telephone prompts in five languages, from Debian packages to shards and a tokenizer.

debian          apt-get download, dpkg -x                 no root; data/downloads
  | asterisk    transcript lines with .g722 files         what cannot be trusted is dropped, with a reason
  | describe    captions, questions, instructions         only from what the source says
  | mini        KEY.flac + KEY.json in shuffled shards    test records in shards of their own
data/mini       shards/ tokenizer/ LICENCES dropped.jsonl, and prepared.json, written last
"""

import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
import webdataset
from numpy.typing import NDArray
from tqdm import tqdm

from midasheng.curate.asterisk import (
    LANGUAGE_NAMES,
    VOICES,
    Candidate,
    Dropped,
    Source,
    audio_problem,
    decode_g722,
    fetch,
    licences,
    pair,
)
from midasheng.curate.describe import describe
from midasheng.curate.tokenizer import DEFAULT_TOKENS, save_tokenizer, train_tokenizer
from midasheng.frames import SAMPLE_RATE, seconds
from midasheng.sample import unit_hash

VERSION = 1  # of what is written: raise it when records change (also by describe.py), so that old output is made anew
FINISHED = "prepared.json"  # the finish marker
MAX_SHARD_BYTES = 20_000_000
TEST_SHARE = 0.06
VALIDATION_SHARE = 0.08  # as `held_out` of the cards says; such text must not reach the tokenizer
ROLES = ("user", "assistant")  # stand in every conversation


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

    `prompts` are the prompts of the corpus cards, for the tokenizer only. Raises UserError when packages
    cannot be had or unpacked, and for an impossible `max_tokens`.
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


def build(sources: Sequence[Source], out: Path, prompts: Sequence[str], max_tokens: int = DEFAULT_TOKENS) -> Summary:
    """Make the corpus from unpacked packages, replacing whatever stands in `out` by the same names.

    Everything is written into `out`/.partial, moved into place, and marked finished at the very end.
    """
    work = out / ".partial"
    shutil.rmtree(work, ignore_errors=True)
    (work / "shards").mkdir(parents=True)
    candidates: list[Candidate] = []
    dropped: list[Dropped] = []
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
    save_tokenizer(train_tokenizer(training_text(records, prompts), LANGUAGE_NAMES, max_tokens), work / "tokenizer")

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


def _summarise(sources: Sequence[Source], records: Sequence[dict[str, Any]], dropped: Sequence[Dropped]) -> Summary:
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


# -- shards --------------------------------------------------------------------------------------------------


def split_of(source: str) -> str:
    """The split, test or train, of a normalised transcript; no text is in both, whatever language says it."""
    return "test" if unit_hash("test:" + source) < TEST_SHARE else "train"


def _write_shards(candidates: Sequence[Candidate], folder: Path) -> tuple[list[dict[str, Any]], list[Dropped]]:
    """Decode and write the records in the order given; returns their JSON and what was dropped."""
    records: list[dict[str, Any]] = []
    dropped: list[Dropped] = []
    shards = {split: Shards(folder, f"asterisk-{split}") for split in ("train", "test")}
    for candidate in tqdm(candidates, desc="decode", unit="clip", disable=None):
        try:
            samples = decode_g722(candidate.audio)
        except av.error.FFmpegError:
            reason: str | None = "unreadable audio"
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

    def write(self, key: str, samples: NDArray[np.int16], record: dict[str, Any]) -> None:
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


# -- text for the tokenizer ----------------------------------------------------------------------------------


def training_text(records: Iterable[dict[str, Any]], prompts: Sequence[str]) -> Iterator[str]:
    """Every text the mini decoder may see in training: neither test nor validation records."""
    for record in records:
        source = record["source"]
        if split_of(source) == "test" or unit_hash("held_out:" + source) < VALIDATION_SHARE:
            continue
        yield from ROLES
        yield record["text"]
        yield from record["captions"]
        for asked in record["questions"] + record["instructions"]:
            yield asked["question"]
            yield asked["answer"]
        yield from (prompt.format_map(record) for prompt in prompts)
