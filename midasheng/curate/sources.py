"""What people have, as items: tables of paths and text, Hugging Face datasets, Lhotse cuts, tars of audio and JSON.

Every row of the input comes out in exactly one item, as part of a record or with the reason why not.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import io
import itertools
import json
import math
import re
import string
import tarfile
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from webdataset.tariterators import base_plus_ext

from midasheng.config import UserError
from midasheng.data.shard import AUDIO_EXTENSIONS

# role -> names that a column may bear, the usual ones first
ROLES = {
    "audio": ("audio", "audio_path", "audio_filepath", "path", "file", "file_name", "filename", "wav"),
    "answer": (
        "answer", "captions", "caption", "text", "transcript", "transcription", "sentence", "label", "labels",
        "long",
    ),
    "question": ("question", "prompt", "instruction"),
    "source": ("source", "recording", "recording_id"),
    "start": ("start", "start_s", "offset"),
    "end": ("end", "end_s"),
    "duration": ("duration",),
}  # fmt: skip
MADE = ("answers", "questions", "source", "audio", "duration")  # JSON fields that preparing writes itself
OTHER_AUDIO = ("m4a", "aac", "mp4", "webm", "wma", "aif", "aiff", "au")  # in tars, beside what shards hold
# Prompts for the fields of MECAT-Caption, as in the report's evaluation (xiaomi-research/dasheng-lm,
# evaluate/prompt.csv); a record holds three paraphrases of each, the first of them "None" where there is none
MECAT = {
    "short": "What is happening in this audio? Provide a brief caption within 15 words.",
    "long": "What is happening in this audio? Provide a detailed caption within 1-2 sentences.",
    "speech": "What is the speech content can be heard in this audio?",
    "music": "What is the musical content in this audio?",
    "sound": "What are the sound effects in this audio?",
    "environment": "What is the acoustic environment and recording quality of this audio?",
}


@dataclass(frozen=True)
class Item:
    """One audio that becomes a record, or, with a `reason`, does not."""

    where: str  # for people: "my.csv line 17"
    name: str  # of the audio, as the input writes it
    source: str  # the recording: nothing of one source is on both sides of a split
    record: dict[str, Any]  # its JSON
    audio: Any = None  # path, bytes of a file, or a Lhotse cut
    start_s: float = 0.0
    end_s: float | None = None
    rows: int = 1
    reason: str = ""

    @property
    def key(self) -> str:
        """Key of the record: the audio's name in letters that every tar reader takes, and a hash of all of it."""
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(self.name).stem)[:40].strip("_")
        text = json.dumps([self.name, self.start_s, self.end_s, self.record], sort_keys=True, default=str)
        content = hashlib.sha256(text.encode())
        if isinstance(self.audio, bytes):  # whose name may be that of many
            content.update(self.audio)
        return f"{stem}-{content.hexdigest()[:12]}".lstrip("-")


def open_source(path: str, columns: Mapping[str, str], prompts: Sequence[str], root: str = "") -> Iterator[Item]:
    """The items of an input: a .csv, .tsv or .jsonl (also .gz), a Lhotse cut manifest, a Hugging Face dataset on disk,
    or tars (a folder, a glob).

    `columns`: role -> column, for columns that bear none of the usual names. `prompts`: asked where a row brings no
    question. `root`: folder that paths are relative to; else the table's own. Raises UserError.
    """
    for role in columns:
        if role not in ROLES:
            raise UserError(f"COLUMNS: {role!r} is no role; there are {', '.join(ROLES)}")
    place = Path(path)
    reading = _Reading(path, dict(columns), tuple(prompts), Path(root) if root else place.parent)
    kind = place.name.removesuffix(".gz").rsplit(".", 1)[-1].lower()
    if place.is_dir() and any((place / f).is_file() for f in ("state.json", "dataset_dict.json")):
        found = reading.hugging_face()
    elif place.is_dir() or kind in ("tar", "tgz") or glob.has_magic(path):
        found = reading.tars()
    elif not place.is_file():
        raise UserError(f"{path} is not there")
    elif kind in ("jsonl", "ndjson"):
        found = reading.lhotse() if reading.is_lhotse() else reading.grouped(reading.json_lines())
    elif kind in ("csv", "tsv"):
        found = reading.grouped(reading.table("\t" if kind == "tsv" else ","))
    else:
        raise UserError(
            f"{path}: give a .csv, .tsv or .jsonl, a Lhotse cuts .jsonl, the folder of a Hugging Face dataset "
            "(save_to_disk), or tars of audio and JSON"
        )
    return _unique(found)


def files_of(path: str) -> list[Path]:
    """The files an input is made of, sorted. Raises UserError when there are none."""
    place = Path(path)
    if place.is_dir():
        found = [p for p in place.rglob("*") if p.is_file()]
    else:
        found = [Path(p) for p in glob.glob(path, recursive=True)] if glob.has_magic(path) else [place]
    if not found or not all(p.is_file() for p in found):
        raise UserError(f"{path} is not there, or empty")
    return sorted(found)


def _unique(items: Iterator[Item]) -> Iterator[Item]:
    seen: set[str] = set()
    for item in items:
        if not item.reason:
            if item.key in seen:
                item = replace(item, reason="duplicate")
            seen.add(item.key)
        yield item


class _Reading:
    def __init__(self, path: str, columns: Mapping[str, str], prompts: Sequence[str], root: Path) -> None:
        self.path, self.columns, self.prompts, self.root = path, dict(columns), tuple(prompts), root

    # -- rows

    def roles(self, names: Sequence[str], needed: Sequence[str] = ("audio", "answer")) -> dict[str, str]:
        """Role -> column, for the whole input, from its header or first row. Raises UserError where a role that is
        needed has no column, or two that could be it, or where there is nothing to ask."""
        found = dict(self.columns)
        for role, column in found.items():
            if column not in names:
                raise UserError(f"{self.path}: COLUMNS says {role}={column}; there are {', '.join(names)}")
        for role, usual in ROLES.items():
            here = [n for n in usual if n in names]
            if role in found or not here:
                continue
            if len(here) > 1 and here[0] != role:
                raise UserError(
                    f"{self.path}: {' and '.join(here)} could each be the {role}; say which: COLUMNS={role}={here[0]}"
                )
            found[role] = here[0]
        for role in needed:
            if role not in found:
                raise UserError(
                    f"{self.path}: no column for the {role} (one of {', '.join(ROLES[role])}); there are "
                    f"{', '.join(names)}. Say COLUMNS={role}=..."
                )
        self.must_ask(found)
        if "question" not in found:
            for name in self.asked_for():
                if name not in ({*names, "source", "audio", "duration"} - {found["answer"]}):
                    raise UserError(
                        f"{self.path}: the prompt asks for {{{name}}}, and there is no such column; there are "
                        f"{', '.join(names)}. A brace itself is written twice"
                    )
        return found

    def asked_for(self) -> set[str]:
        """Fields that the prompts ask for. Raises UserError."""
        try:
            return {field for p in self.prompts for _, field, _, _ in string.Formatter().parse(p) if field is not None}
        except ValueError as error:
            raise UserError(f"PROMPT: {error}; a brace itself is written twice") from None

    def must_ask(self, roles: Mapping[str, str]) -> None:
        """Raises UserError where there is neither a question nor a prompt."""
        if "question" not in roles and not self.prompts:
            raise UserError(
                f"{self.path}: no column for the question ({', '.join(ROLES['question'])}); say what to ask, "
                'PROMPT="..." or TASK=caption'
            )

    def item(self, where: str, row: Mapping[str, Any], roles: Mapping[str, str]) -> Item:
        """One row as an item."""
        value = {role: row.get(column) for role, column in roles.items()}
        extra = {
            k: v for k, v in row.items() if k not in roles.values() and k not in MADE and v is not None and v != ""
        }
        audio = value["audio"]
        name = str(audio or "").strip()
        source = str(value.get("source") or "").strip() or name
        item = Item(where, name, source, extra | {"source": source, "audio": name}, self.root / name)
        if _is_torn(row):
            return Item(where, "", where, {}, reason="half a character")
        if not name:
            return replace(item, reason="no audio named")
        texts = [str(a).strip() for a in _listed(value.get("answer")) if a is not None and str(a).strip()]
        if not texts:
            return replace(item, reason="empty answer")
        question = str(value.get("question") or "").strip()
        if not question and not self.prompts:
            return replace(item, reason="empty question")
        known = item.record if "question" in roles else {"duration": ""} | item.record  # written to it later
        if not question and (lacking := sorted(self.asked_for() - set(known))):
            return replace(item, reason=f"no {lacking[0]}, which the prompt asks for")
        if "question" in roles:
            asked = [question] if question else [p.format_map(known) for p in self.prompts]
            item.record["questions"] = [{"question": q, "answer": a} for q in asked for a in texts]
        else:
            item.record["answers"] = texts
        if "start" in roles or "end" in roles:  # else a duration is that of the whole file
            try:
                start, end, length = (_seconds(value.get(role)) for role in ("start", "end", "duration"))
            except (ValueError, TypeError):
                return replace(item, reason="times are no numbers")
            end = end if end is not None else None if length is None else (start or 0.0) + length
            if (start or 0.0) < 0 or (end is not None and end <= (start or 0.0)):
                return replace(item, reason="ends before it starts")
            item = replace(item, start_s=start or 0.0, end_s=end)
        return item

    def grouped(self, items: Iterator[Item]) -> Iterator[Item]:
        """Rows of one audio that follow each other, and differ in question and answer alone, as one record."""

        def same(item: Item) -> Any:
            about = {k: v for k, v in item.record.items() if k not in ("answers", "questions")}
            if item.reason:
                return id(item)
            held = item.audio if isinstance(item.audio, bytes) else b""  # under a name that many may bear
            return item.name, item.start_s, item.end_s, held, json.dumps(about, sort_keys=True, default=str)

        for _, several in itertools.groupby(items, same):
            kept: Item | None = None
            for item in several:
                if kept is None:
                    kept = item
                    continue
                text = "answers" if "answers" in item.record else "questions"
                new = [t for t in item.record[text] if t not in kept.record[text]]
                if not new:
                    yield replace(item, reason="duplicate")
                    continue
                kept.record[text].extend(new)
                kept = replace(kept, rows=kept.rows + 1)
            assert kept is not None
            yield kept

    # -- tables

    def _text(self) -> io.TextIOBase:
        """The file as text: UTF-8 with or without a byte-order mark, or UTF-16 with one."""
        with open(self.path, "rb") as file:
            mark = file.read(4)
        zipped = mark[:2] == b"\x1f\x8b"
        if zipped:
            with gzip.open(self.path) as packed:
                mark = packed.read(4)
        encoding = "utf-16" if mark[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
        opened: Any = gzip.open(self.path, "rb") if zipped else open(self.path, "rb")  # noqa: SIM115
        return io.TextIOWrapper(opened, encoding=encoding, newline="")

    def table(self, delimiter: str) -> Iterator[Item]:
        """Rows of a .csv or .tsv with a header line. Raises UserError."""
        csv.field_size_limit(2**31 - 1)
        with self._text() as file:
            try:
                first = file.readline()
                file.seek(0)
                if delimiter == "," and "," not in first and ";" in first:
                    delimiter = ";"  # as spreadsheets write it where the comma is the decimal point
                bare = delimiter == "\t" and '"' not in first  # a quote in a .tsv is a letter like others
                quoting: Any = csv.QUOTE_NONE if bare else csv.QUOTE_MINIMAL
                reader = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
                deque(reader, maxlen=0)  # a quote that is never closed is found before hours of work
                file.seek(0)
                reader = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
                names = [n.strip() for n in next(reader, [])]
                if len(set(names)) < len(names):
                    raise UserError(f"{self.path}: two columns bear one name: {', '.join(names)}")
                roles = self.roles(names)
                begins = reader.line_num + 1
                for row in reader:
                    where, begins = f"{self.path} line {begins}", reader.line_num + 1
                    if not row or (len(row) == 1 and not row[0].strip()):
                        continue  # an empty line
                    if len(row) != len(names):
                        yield Item(where, row[0], row[0], {}, reason=f"{len(row)} columns instead of {len(names)}")
                        continue
                    yield self.item(where, dict(zip(names, row, strict=True)), roles)
            except UnicodeDecodeError as error:
                raise UserError(f"{self.path}: {error}; save it as UTF-8") from None
            except csv.Error as error:
                raise UserError(
                    f"{self.path} line {reader.line_num}: {error}; a quote is not closed, or not doubled inside quotes"
                ) from None

    def _lines(self) -> Iterator[tuple[str, str]]:
        """(where, text) of every line that is not empty. Raises UserError."""
        with self._text() as file:
            try:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{self.path} line {number}", line
            except UnicodeDecodeError as error:
                raise UserError(f"{self.path}: {error}; save it as UTF-8") from None

    def json_lines(self) -> Iterator[Item]:
        """Rows of a .jsonl; the first one says which columns there are."""
        roles: dict[str, str] = {}
        for where, line in self._lines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                yield Item(where, "", where, {}, reason="no JSON object")
                continue
            roles = roles or self.roles(list(row))
            yield self.item(where, row, roles)

    # -- other people's formats

    def hugging_face(self) -> Iterator[Item]:
        """Rows of a dataset that `save_to_disk` wrote; its audio column is read as it lies, not decoded."""
        try:
            from datasets import Audio, ClassLabel, DatasetDict, load_from_disk
        except ImportError as error:
            raise UserError(
                f"{self.path} is a Hugging Face dataset: pip install 'midasheng-train[hf]' ({error})"
            ) from None
        data = load_from_disk(self.path)
        if isinstance(data, DatasetDict):
            raise UserError(
                f"{self.path} holds the splits {', '.join(data)}; prepare each on its own, e.g. "
                f"DATA={self.path}/{next(iter(data))}"
            )
        names = list(data.column_names)
        roles = self.roles(names)
        if isinstance(data.features[roles["audio"]], Audio):
            data = data.cast_column(roles["audio"], Audio(decode=False))

        classes = data.features[roles["answer"]]  # numbers in the file, names in words

        def rows() -> Iterator[Item]:
            for number, row in enumerate(data):
                if isinstance(classes, ClassLabel) and row[roles["answer"]] is not None:
                    row[roles["answer"]] = classes.int2str(row[roles["answer"]])
                audio = row[roles["audio"]]
                held = audio if isinstance(audio, dict) else {"path": audio, "bytes": None}
                # rows without a path must not become one recording
                row[roles["audio"]] = held["path"] or (f"{number:09d}" if held["bytes"] else "")
                item = self.item(f"{self.path} row {number}", row, roles)
                yield replace(item, audio=held["bytes"]) if held["bytes"] else item

        return self.grouped(rows())

    def is_lhotse(self) -> bool:
        """Is the .jsonl a manifest of Lhotse cuts?"""
        with self._text() as file:
            try:
                row = json.loads(next((line for line in file if line.strip()), ""))
            except (ValueError, RecursionError):
                return False
        return isinstance(row, dict) and str(row.get("type", "")).endswith("Cut")

    def lhotse(self) -> Iterator[Item]:
        """The cuts of a manifest; a cut's text is that of its supervisions, one after the other."""
        try:
            from lhotse.serialization import deserialize_item
        except ImportError as error:
            raise UserError(f"{self.path} holds Lhotse cuts: pip install 'midasheng-train[lhotse]' ({error})") from None
        if self.columns:
            raise UserError(f"{self.path}: COLUMNS is about tables; Lhotse cuts have fields of their own")
        self.must_ask({})
        for where, line in self._lines():
            try:
                cut = deserialize_item(json.loads(line))
                assert all(hasattr(cut, name) for name in ("load_audio", "supervisions"))
            except Exception:  # whatever a line that is no cut makes it raise
                yield Item(where, "", where, {}, reason="no cut")
                continue
            yield self._cut(where, cut)

    def _cut(self, where: str, cut: Any) -> Item:
        texts = [s.text.strip() for s in cut.supervisions if s.text and s.text.strip()]
        source = _cut_source(cut)
        about: dict[str, Any] = {}
        for supervision in cut.supervisions:
            for field in ("language", "speaker", "gender"):
                if value := getattr(supervision, field, None):
                    about.setdefault(field, value)
            about |= supervision.custom or {}
        about |= {k: v for k, v in (getattr(cut, "custom", None) or {}).items() if _plain(v)}
        about = {k: v for k, v in about.items() if k not in MADE and _plain(v)}
        item = Item(where, str(cut.id), source, about | {"source": source, "audio": str(cut.id)}, cut)
        if _is_torn(item.record | {"text": texts}):
            return Item(where, "", where, {}, reason="half a character")
        if not texts:
            return replace(item, reason="empty answer")
        if lacking := sorted(self.asked_for() - set(item.record) - {"duration"}):
            return replace(item, reason=f"no {lacking[0]}, which the prompt asks for")
        item.record["answers"] = [" ".join(texts)]
        return item

    def tars(self) -> Iterator[Item]:
        """KEY.flac (wav, mp3, ogg, opus, ...) and KEY.json in .tar or .tar.gz: MECAT, ACAVCaps, xares-llm, shards."""
        paths = [p for p in files_of(self.path) if re.search(r"\.(tar(\.\w+)?|tgz)$", p.name)]
        if not paths:
            raise UserError(f"{self.path}: no .tar, .tar.gz or .tgz in it")
        roles: dict[str, str] = {}
        for path in paths:
            yield from self._tar(path, roles)

    def _tar(self, path: Path, roles: dict[str, str]) -> Iterator[Item]:
        key, members = "", dict[str, bytes]()
        damage = ""
        try:
            with tarfile.open(path, "r|*", tarinfo=_Header) as tar:
                for member in tar:
                    name, extension = base_plus_ext(member.name)
                    if not member.isfile() or not name or not extension:
                        continue
                    if name != key and members:
                        yield self._pair(path, key, members, roles)
                        members = {}
                    key = name
                    file = tar.extractfile(member)
                    assert file is not None
                    members[extension.lower()] = file.read()
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            damage = f"archive damaged ({error})"
        if members:  # each of them whole
            yield self._pair(path, key, members, roles)
        if damage:
            yield Item(f"{path}", f"{path}", f"{path}", {}, reason=damage)

    def _pair(self, path: Path, key: str, members: Mapping[str, bytes], roles: dict[str, str]) -> Item:
        """One record of a tar; `roles` are filled by the first one."""
        key = key.encode(errors="backslashreplace").decode()  # a name that is no UTF-8
        where, source = f"{path}: {key}", _recording(Path(key).name)
        empty = Item(where, key, source, {})
        audio = next((members[e] for e in (*AUDIO_EXTENSIONS, *OTHER_AUDIO) if e in members), None)
        if audio is None or "json" not in members:
            return replace(empty, reason="no audio" if audio is None else "no json")
        try:
            row = json.loads(members["json"])
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            return replace(empty, reason="json unreadable")
        if _is_torn(row):
            return replace(empty, reason="half a character")
        if set(MECAT) <= set(row):
            asked = [
                {"question": prompt, "answer": text.strip()}
                for field, prompt in MECAT.items() for text in map(str, _listed(row[field]))
                if text.strip() and not re.match(r"none\b", text.strip(), re.IGNORECASE)
            ]  # fmt: skip
            captions = [a["answer"] for a in asked if a["question"] in (MECAT["short"], MECAT["long"])]
            record = {"questions": asked, "answers": captions, "source": source, "audio": key}
            if row.get("domain"):
                record["domain"] = row["domain"]
            return replace(empty, record=record, audio=audio, reason="" if captions else "empty answer")
        row |= {"audio": key} | ({} if "source" in row else {"source": source})
        if not roles:  # a clip in a tar is cut already: its times are those in what it comes from, unless said
            found = self.roles(list(row))
            roles |= {r: c for r, c in found.items() if r in self.columns or r not in ("start", "end", "duration")}
        item = self.item(where, row, roles)
        return replace(item, audio=audio)


class _Header(tarfile.TarInfo):
    """A header that says when there is none: tarfile takes one it cannot read, or a missing one, for the end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Any:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tar.offset}") from None


def _recording(key: str) -> str:
    """Where a key is YouTube's id with start and end, or such a key with a hash (MECAT-QA): the id alone."""
    clip = re.fullmatch(r"(.{11})_\d+(?:_\d+)?_\d+(?:_\d+)?(?:_[0-9a-f]{8})?", key)
    return clip[1] if clip else key


def _cut_source(cut: Any) -> str:
    """Recording of a Lhotse cut, of the first one in a mix, as it was before it was perturbed."""
    cuts = [cut, *(track.cut for track in getattr(cut, "tracks", ()))]
    source = next((str(c.recording.id) for c in cuts if getattr(c, "recording", None)), str(cut.id))
    return re.sub(r"(_(sp|tp|vp|cl|ln)-?\d+(\.\d+)?|_rvb|_wpe|_nb_\w+)+$", "", source)


def _is_torn(content: Any) -> bool:
    """Is there half a character in it (a lone surrogate), which cannot be written as UTF-8?"""
    try:
        json.dumps(content, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return True
    return False


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | list)


def _seconds(value: Any) -> float | None:
    if value is None or value == "":
        return None
    if not math.isfinite(seconds := float(value)):
        raise ValueError(value)
    return seconds
