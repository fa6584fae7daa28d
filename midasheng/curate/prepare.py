"""Items -> shards, a card, a mix and a report; in parallel, and after a kill from where it stopped, to the same bytes.

OUT/shards/NAME-train-000000.tar   KEY.flac (or .opus, as .ogg) + KEY.json, in the order of the input
OUT/corpora/NAME.yaml              the card
OUT/manifests/NAME.yaml            the mix: this corpus alone
OUT/report.json, dropped.jsonl     every row of the input: in which shard, or why not
OUT/journal.jsonl                  a line per finished shard: up to which item its split is done
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import webdataset
import yaml
from tqdm import tqdm

from midasheng.config import UserError
from midasheng.curate.encode import CODECS, encode
from midasheng.curate.sources import Item, files_of
from midasheng.data.audio import Skip
from midasheng.frames import SAMPLE_RATE
from midasheng.sample import unit_hash

VERSION = 1  # of what is written
CHUNK = 8  # items that a worker takes at once
FEW_HELD_OUT = 16  # records; fewer say nothing
LENGTHS_S = (0, 1, 5, 10, 20, 30, 60, 300, 900)  # of the report's histogram


@dataclass(frozen=True)
class Settings:
    """How a corpus is prepared."""

    name: str
    task: str = "unknown"
    prompts: tuple[str, ...] = ()
    codec: str = "flac"
    shard_bytes: int = 256_000_000
    test_share: float = 0.0  # of the sources, in shards of their own that nothing is trained on
    held_out_share: float = 0.02  # of the training sources, validated on
    licence: str = "unknown"
    languages: tuple[str, ...] = ()

    def split(self, source: str) -> str:
        """test or train; nothing of one source is in both."""
        return "test" if unit_hash("test:" + source) < self.test_share else "train"


@dataclass
class Report:
    """What became of the rows of the input."""

    rows: int = 0
    written_rows: int = 0
    records: dict[str, int] = field(default_factory=dict)  # split -> records
    hours: dict[str, float] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows
    examples: dict[str, str] = field(default_factory=dict)  # reason -> where the first one stands
    lengths: dict[str, int] = field(default_factory=dict)  # "10 to 20 s" -> records
    form: str = ""  # questions or answers: what records hold
    low_hash: float = 1.0  # share of sources that holds the card's held-out records
    first_source: int = 0  # records of the first of them
    languages: list[str] = field(default_factory=list)  # that records name

    def text(self) -> str:
        """The report for people."""
        lines = [f"{self.rows} rows: {self.written_rows} written, {self.rows - self.written_rows} dropped"]
        lines += [f"  {split:6}{n:9} records{self.hours[split]:10.2f} h" for split, n in sorted(self.records.items())]
        if self.lengths:
            lines.append("  lengths: " + ", ".join(f"{n} of {span}" for span, n in self.lengths.items()))
        for reason, n in sorted(self.dropped.items(), key=lambda d: -d[1]):
            lines.append(f"  dropped {n:7}  {reason}; first: {self.examples[reason]}")
        return "\n".join(lines)


@dataclass
class _Line:
    """One line of the journal: a finished shard, or what was dropped behind the last one."""

    split: str
    until: int  # items of the input that are done with in this split
    shard: str = ""
    size: int = 0
    rows: int = 0
    records: int = 0
    samples: int = 0
    form: str = ""
    lengths: dict[str, int] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)  # of those with a low hash -> records
    languages: list[str] = field(default_factory=list)  # that its records name
    dropped: list[dict[str, Any]] = field(default_factory=list)


def fingerprint(path: str, settings: Settings, more: Any) -> str:
    """What the output depends on: settings and the input's files by size, tables by content."""
    parts: list[Any] = [VERSION, asdict(settings), more]
    for file in files_of(path):
        content = "" if ".tar" in file.name or file.suffix in (".tgz", ".arrow") else _sha256(file)
        parts.append((file.name, file.stat().st_size, content))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepare(items: Iterable[Item], out: Path, settings: Settings, mark: str, workers: int) -> Report:
    """Write OUT from `items`, or go on with it; `mark` is the fingerprint. A finished OUT is left as it is.

    Raises UserError when OUT holds something else, or nothing of the input can be used.
    """
    journal = _Journal(out, mark)
    if not journal.finished:
        with _Shards(out / "shards", settings, journal) as shards:
            todo = _todo(items, settings, journal)
            for number, item, made in _encoded(todo, settings.codec, workers):
                shards.add(number, item, made)
        journal.finish(shards.seen)
    report = _report(journal, settings)
    (out / "report.json").write_text(json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    with (out / "dropped.jsonl").open("w", encoding="utf-8") as file:
        for drop in sorted((d for line in journal.lines for d in line.dropped), key=lambda d: d["item"]):
            file.write(json.dumps(drop, ensure_ascii=False) + "\n")
    if not report.records.get("train"):
        raise UserError(f"nothing of the input can be trained on; see {out / 'dropped.jsonl'}\n{report.text()}")
    _write_manifests(out, settings, report)
    return report


# -- what is done ------------------------------------------------------------------------------------------------------


class _Journal:
    """journal.jsonl: its first line the fingerprint, its last one {"finished": items} once all is done."""

    def __init__(self, out: Path, mark: str) -> None:
        self.path = out / "journal.jsonl"
        self.lines: list[_Line] = []
        self.finished = False
        if self.path.is_file():
            self._read(out, mark)
            return
        if out.is_dir() and any(path.suffix != ".part" for path in out.iterdir()):
            raise UserError(f"{out} holds other files; say OUT=another-folder")
        out.mkdir(parents=True, exist_ok=True)
        self._begin(mark)

    def _begin(self, mark: str) -> None:
        part = self.path.with_suffix(".part")  # killed at any moment, there is a journal or nothing
        part.write_text(json.dumps({"input": mark}) + "\n", encoding="utf-8")
        os.replace(part, self.path)

    def _read(self, out: Path, mark: str) -> None:
        text = self.path.read_text(encoding="utf-8")
        if not text.endswith("\n"):  # killed while it wrote
            text = text[: text.rfind("\n") + 1]
            self.path.write_text(text, encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        if len(rows) < 2:  # nothing is done yet
            self._begin(mark)
            return
        if rows[0]["input"] != mark:
            raise UserError(
                f"{out} holds shards of another input, or made with other settings; say OUT=another-folder or delete it"
            )
        self.finished = "finished" in rows[-1]
        self.lines = [_Line(**row) for row in rows[1:] if "split" in row]
        for line in self.lines:
            shard = out / "shards" / line.shard
            if line.shard and (not shard.is_file() or shard.stat().st_size != line.size):
                raise UserError(f"{shard} is gone, or not as it was written; delete {out} and prepare it again")

    def _append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def add(self, line: _Line) -> None:
        """A shard is done."""
        self.lines.append(line)
        self._append(asdict(line))

    def finish(self, items: int) -> None:
        """Everything is done."""
        self._append({"finished": items})
        self.finished = True

    def until(self, split: str) -> int:
        """Items that are done with in a split."""
        return max((line.until for line in self.lines if line.split == split), default=0)


class _Shards:
    """The shards of both splits, each written under another name and moved into place when it is whole."""

    def __init__(self, folder: Path, settings: Settings, journal: _Journal) -> None:
        self.folder, self.settings, self.journal = folder, settings, journal
        self.seen = 0
        self._open: dict[str, tuple[_Line, webdataset.TarWriter | None]] = {}
        self._count = Counter(line.split for line in journal.lines if line.shard)
        self._form = next((line.form for line in journal.lines if line.form), "")

    def __enter__(self) -> _Shards:
        self.folder.mkdir(exist_ok=True)
        named = {line.shard for line in self.journal.lines}
        for torn in (*self.folder.glob("*.part"), *self.folder.glob(f"{self.settings.name}-*.tar")):
            if torn.name not in named:
                torn.unlink()
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        for split, (line, writer) in sorted(self._open.items(), key=lambda o: o[0]):  # the same after any kill
            if kind is None:
                self._close(split, line, writer)
            elif writer is not None:
                writer.close()

    def add(self, number: int, item: Item, made: tuple[bytes, int] | str) -> None:
        """One item, encoded or with the reason why not."""
        self.seen = number + 1
        split = self.settings.split(item.source)
        if isinstance(made, str):
            line, writer = self._open.get(split) or (_Line(split, 0), None)
            line.dropped.append(
                {"item": number, "reason": made, "where": item.where, "audio": item.name, "rows": item.rows}
            )
        else:
            data, n_samples = made
            record = item.record | {"duration": round(n_samples / SAMPLE_RATE, 3)}
            text = json.dumps(record, ensure_ascii=False, default=str).encode()
            size = len(data) + len(text)
            line, writer = self._open.get(split) or (_Line(split, 0), None)
            if writer is not None and line.size + size > self.settings.shard_bytes:
                self._close(split, line, writer)
                line, writer = _Line(split, 0), None
            if writer is None:
                line.shard = f"{self.settings.name}-{split}-{self._count[split]:06d}.tar"
                self._count[split] += 1
                # a fixed mtime: equal bytes, and no PAX headers, which make reading twice as slow
                writer = webdataset.TarWriter(str(self.folder / f"{line.shard}.part"), encoder=False, mtime=0)
            extension = CODECS[self.settings.codec][0]
            writer.write({"__key__": item.key, extension: data, "json": text})
            self._tally(line, item, n_samples)
            line.size += size
        line.until = number + 1
        self._open[split] = line, writer

    def _tally(self, line: _Line, item: Item, n_samples: int) -> None:
        form = "questions" if "questions" in item.record else "answers"
        line.form = self._form = self._form or form
        if form != self._form:
            raise UserError(
                f"some records bring questions of their own, others ({item.where}) do not; prepare them apart"
            )
        line.rows, line.records, line.samples = line.rows + item.rows, line.records + 1, line.samples + n_samples
        language = item.record.get("language")
        if isinstance(language, str) and language not in line.languages:
            line.languages.append(language)
        low = max(s for s in LENGTHS_S if s * SAMPLE_RATE <= n_samples)
        line.lengths[str(low)] = line.lengths.get(str(low), 0) + 1
        low_hash = unit_hash(f"held_out:{item.record['source']}")
        if low_hash < 0.5:
            line.sources[item.record["source"]] = line.sources.get(item.record["source"], 0) + 1

    def _close(self, split: str, line: _Line, writer: webdataset.TarWriter | None) -> None:
        if writer is not None:
            writer.close()
            part = self.folder / f"{line.shard}.part"
            with part.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(part, self.folder / line.shard)
            line.size = (self.folder / line.shard).stat().st_size
        self.journal.add(line)


# -- the work ----------------------------------------------------------------------------------------------------------


def _todo(items: Iterable[Item], settings: Settings, journal: _Journal) -> Iterator[tuple[int, Item]]:
    """The items that no finished shard covers, with their numbers."""
    done = {split: journal.until(split) for split in ("train", "test")}
    for number, item in enumerate(tqdm(items, desc=settings.name, unit="clip", disable=None)):
        if number >= done[settings.split(item.source)]:
            yield number, item


def _end_with(parent: int) -> None:
    """In a worker: Ctrl-C is the parent's to handle, and a parent that is killed does not leave it behind."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def _encode_all(items: Sequence[Item], codec: str) -> list[tuple[bytes, int] | str]:
    made: list[tuple[bytes, int] | str] = []
    for item in items:
        try:
            made.append(item.reason or encode(item.audio, codec, item.start_s, item.end_s))
        except Skip as skip:
            made.append(skip.reason)
    return made


def _encoded(
    todo: Iterable[tuple[int, Item]], codec: str, workers: int
) -> Iterator[tuple[int, Item, tuple[bytes, int] | str]]:
    """Every item with what became of it, in order; a bounded number of chunks is under way."""
    waiting: deque[tuple[list[tuple[int, Item]], Future[list[tuple[bytes, int] | str]]]] = deque()

    def first() -> Iterator[tuple[int, Item, tuple[bytes, int] | str]]:
        chunk, future = waiting.popleft()
        try:
            made = future.result()
        except BrokenProcessPool:
            near = [chunk, *(later for later, _ in itertools.islice(waiting, workers - 1))]
            names = ", ".join(f"{item.where} ({item.name})" for some in near for _, item in some)
            raise UserError(f"a decoder crashed, or memory ran out, at one of these; take it out: {names}") from None
        for (number, item), one in zip(chunk, made, strict=True):
            yield number, item, one

    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, initializer=_end_with, initargs=(os.getpid(),)) as pool:
        try:
            numbered = iter(todo)
            while chunk := list(itertools.islice(numbered, CHUNK)):
                try:
                    future = pool.submit(_encode_all, [item for _, item in chunk], codec)
                except BrokenProcessPool:  # one that was sent before has the crash
                    break
                waiting.append((chunk, future))
                if len(waiting) > 4 * workers:
                    yield from first()
            while waiting:
                yield from first()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# -- what it became ----------------------------------------------------------------------------------------------------


def _report(journal: _Journal, settings: Settings) -> Report:
    report = Report()
    lengths: Counter[int] = Counter()
    sources: Counter[str] = Counter()
    for line in journal.lines:
        report.rows += line.rows
        report.written_rows += line.rows
        if line.records:
            report.records[line.split] = report.records.get(line.split, 0) + line.records
            report.hours[line.split] = report.hours.get(line.split, 0.0) + line.samples / SAMPLE_RATE / 3600
        report.form = report.form or line.form
        lengths.update({int(low): n for low, n in line.lengths.items()})
        report.languages = sorted({*report.languages, *line.languages})
        if line.split == "train":
            sources.update(line.sources)
    for drop in sorted((d for line in journal.lines for d in line.dropped), key=lambda d: d["item"]):
        report.rows += drop["rows"]
        report.dropped[drop["reason"]] = report.dropped.get(drop["reason"], 0) + drop["rows"]
        report.examples.setdefault(drop["reason"], drop["where"])
    ends = dict(zip(LENGTHS_S, [f"to {s} s" for s in LENGTHS_S[1:]] + ["s or more"], strict=True))
    report.lengths = {f"{low} {ends[low]}": n for low, n in sorted(lengths.items())}
    report.first_source = sources[min(sources, key=lambda s: unit_hash(f"held_out:{s}"))] if sources else 0
    report.low_hash = _held_out_share(sources, report.records.get("train", 0), settings.held_out_share)
    return report


def _held_out_share(sources: Counter[str], records: int, share: float) -> float:
    """How much of the sources' hashes keeps about `share` of the records apart, of few records up to a tenth: whole
    sources, one at least where that leaves half of the records to train on, else none (0)."""
    apart, found, wanted = 0, 0.0, max(share * records, min(FEW_HELD_OUT, records / 10))
    for source in sorted(sources, key=lambda s: unit_hash(f"held_out:{s}")):
        apart += sources[source]
        if not share or apart > records / 2 or (found and apart > wanted):
            break
        found = min(0.5, round(unit_hash(f"held_out:{source}") + 1e-6, 6))
    return found


def _write_manifests(out: Path, settings: Settings, report: Report) -> None:
    card: dict[str, Any] = {
        "name": settings.name, "task": settings.task, "languages": list(settings.languages) or report.languages,
        "hours": round(report.hours["train"], 2), "licence": settings.licence,
        "shards": f"{settings.name}-train-*.tar",
    }  # fmt: skip
    if report.form == "questions":
        card["pairs"] = "questions"
    else:
        card |= {"prompts": list(settings.prompts), "answer": "answers"}
    if report.low_hash:
        card["held_out"] = {"by": "source", "share": report.low_hash, "max": max(256, report.first_source)}
    for folder, content in (("corpora", card), ("manifests", {"corpora": {settings.name: 100}})):
        path = out / folder / f"{settings.name}.yaml"
        path.parent.mkdir(exist_ok=True)
        if not path.is_file():
            text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
            part = path.with_suffix(".part")  # half a card would stay for ever
            part.write_text(f"# Written by `make prepare` (../report.json); yours to change.\n{text}", encoding="utf-8")
            os.replace(part, path)
