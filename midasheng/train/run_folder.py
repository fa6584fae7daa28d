"""What a run folder says of its run, as one plain structure: curves, mix, skips, events, answers with their clips.

Everything is read as it lies: a half-written last line waits, a damaged one is counted, a file that is missing is said.
"""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from midasheng import config
from midasheng.config import ConfigError, Stage, UserError
from midasheng.data.ledger import read_ledger
from midasheng.data.manifest import Card
from midasheng.data.room import mixes
from midasheng.sample import NOT_TOLD
from midasheng.train.answers import judged, read_clips

POINTS, POINTS_OF_A_GROUP = 2_000, 600  # of a curve on the page, at most
SPEED = ("audio_h_per_device_h", "mfu", "encoder_padding", "decoder_padding", "waiting", "memory_gib")
VALIDATION = ("validation_s", "answers_s")
PAIRED = ("listening", "alike", "text_only")
Floats = NDArray[np.float64]


# -- files that may still be written -------------------------------------------------------------------------------


class Grown:
    """A .jsonl that a run may still be writing."""

    def __init__(self, path: Path) -> None:
        self.path, self.damaged = path, 0
        self._at, self._inode = 0, -1

    def rewritten(self) -> bool:
        """Is it another file than was read so far (a resume drops rows), or shorter? Then `rows` begins again."""
        try:
            found = self.path.stat()
        except OSError:
            return False
        if found.st_ino == self._inode and found.st_size >= self._at:
            return False
        self._at, self._inode, self.damaged = 0, found.st_ino, 0
        return True

    def rows(self) -> Iterator[dict[str, Any]]:
        """The whole lines since the last time; what is no JSON object is counted in `damaged`."""
        try:
            file = self.path.open("rb")
        except OSError:
            return
        with file:
            file.seek(self._at)
            for line in file:
                if not line.endswith(b"\n"):  # being written, or cut off
                    return
                self._at += len(line)
                row = _parsed(line)
                if row is None:
                    self.damaged += 1
                else:
                    yield row


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A row; None when it is none."""
    row: Any = None
    try:
        row = orjson.loads(line)
    except ValueError:
        try:  # NaN is no JSON, but Python writes it
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()
        except ValueError:
            return None
    return row if isinstance(row, dict) else None


def _rows(path: Path) -> list[dict[str, Any]]:
    file = Grown(path)
    file.rewritten()
    return list(file.rows())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file; empty when there is none or half of one."""
    try:
        return _parsed(path.read_bytes()) or {}
    except OSError:
        return {}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else float("nan")


# -- curves --------------------------------------------------------------------------------------------------------


def kept(y_N: Floats, most: int) -> NDArray[np.int64]:
    """Numbers of the points that are drawn, at most `most`: of each stretch its lowest and its highest, so that a spike
    of one row stays."""
    n = len(y_N)
    if n <= most:
        return np.flatnonzero(np.isfinite(y_N))
    size = -(-n // (most // 2))
    filled = np.concatenate([y_N, np.full(-n % size, np.nan)])
    start = np.arange(0, n, size)
    low = start + np.where(np.isfinite(filled), filled, np.inf).reshape(-1, size).argmin(1)
    high = start + np.where(np.isfinite(filled), filled, -np.inf).reshape(-1, size).argmax(1)
    found = np.unique(np.concatenate([low, high]))
    found = found[found < n]
    return found[np.isfinite(y_N[found])]


def smoothed(loss_sum_N: Floats, targets_N: Floats) -> Floats:
    """Loss per target over the last rows (a fiftieth of all, at least 5): of sums, not a mean of means."""
    width = max(5, len(targets_N) // 50)
    good = np.isfinite(loss_sum_N) & (targets_N > 0)
    sums = [np.concatenate([[0.0], np.cumsum(np.where(good, part, 0.0))]) for part in (loss_sum_N, targets_N)]
    end = np.arange(1, len(targets_N) + 1)
    begin = np.maximum(0, end - width)
    loss, targets = (s[end] - s[begin] for s in sums)
    return np.where(targets > 0, loss / np.maximum(targets, 1), np.nan)


def _short(values: Floats) -> list[float | None]:
    return [float(f"{v:.6g}") if np.isfinite(v) else None for v in values.tolist()]


def _curve(step: Floats, y: Floats, most: int = POINTS) -> dict[str, Any]:
    here = kept(y, most)
    return {"x": step[here].astype(int).tolist(), "y": _short(y[here])}


class _Columns:
    """Numbers of rows, a column a name."""

    def __init__(self) -> None:
        self.columns: dict[str, array[float]] = {}

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.columns.setdefault(name, array("d")).append(value)

    def __getitem__(self, name: str) -> Floats:
        column = self.columns.get(name)
        return np.asarray(column, dtype=np.float64) if column is not None else np.zeros(0)


class Run:
    """One run folder; `follow` reads what is new in it, `data` says all that is known."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics, self.speeds = Grown(folder / "metrics.jsonl"), Grown(folder / "speed.jsonl")
        self._seen: dict[str, Any] = {}
        self._known: dict[str, tuple[Any, Any]] = {}
        self._begin_metrics()
        self._begin_speeds()

    def _begin_metrics(self) -> None:
        self.train, self.corpora, self.languages = _Columns(), dict[str, _Columns](), dict[str, _Columns]()
        self.untold = 0  # rows of training that an older version wrote, without languages
        self.validations: list[dict[str, Any]] = []

    def _begin_speeds(self) -> None:
        self.speed, self.validated, self.peak = _Columns(), _Columns(), ""

    def follow(self) -> bool:
        """Read what is new; was there anything?"""
        found = {str(p.relative_to(self.folder)): _stamp(p) for p in self._files()}
        if found == self._seen:
            return False
        self._seen = found
        if self.metrics.rewritten():
            self._begin_metrics()
        for row in self.metrics.rows():
            self._take(row)
        if self.speeds.rewritten():
            self._begin_speeds()
        for row in self.speeds.rows():
            if "validation_s" in row:
                self.validated.add(**{name: _number(row.get(name)) for name in ("step", *VALIDATION)})
            elif "peak" in row:
                self.peak = f"{row['peak']}: {_number(row.get('peak_flops_per_s')) / 1e12:.3g} TFLOP/s"
            else:
                self.speed.add(**{name: _number(row.get(name)) for name in ("step", "seconds", *SPEED)})
        return True

    def _files(self) -> list[Path]:
        names = ("*.jsonl", "*.yaml", "*.txt", "*.json", "ledger/*", "weights/stage.json")
        return [path for name in names for path in self.folder.glob(name)]

    def _take(self, row: dict[str, Any]) -> None:
        if "val_loss" in row:
            self.validations.append(row)
        elif "loss" in row:
            number = len(self.train["step"])
            names = ("step", "loss", "lr", "grad_norm", "targets", "audio_s")
            self.train.add(**{name: _number(row.get(name)) for name in names})
            self.untold += "languages" not in row
            for kind, parts in (("corpora", self.corpora), ("languages", self.languages)):
                for name, sums in _mapping(row.get(kind)).items():
                    if isinstance(sums, dict) and sums.get("targets"):
                        part = parts.setdefault(name, _Columns())
                        part.add(row=number, loss_sum=_number(sums.get("loss_sum")), targets=_number(sums["targets"]))

    def _once(self, name: str, files: Sequence[Path], read: Callable[[], Any]) -> Any:
        """What `read` gives; again only when one of the files changed."""
        stamp = [_stamp(path) for path in files]
        if name not in self._known or self._known[name][0] != stamp:
            self._known[name] = (stamp, read())
        return self._known[name][1]

    # -- what is known ----------------------------------------------------------------------------------------------

    def data(self) -> dict[str, Any]:
        """The run for the page: JSON, every curve thinned."""
        notes: list[str] = []
        settings = self._settings(notes)
        record = read_json(self.folder / "weights" / "stage.json")
        header = self._text("trainable.txt")
        planned = re.search(r"^ +(\d+) steps \(", header, re.MULTILINE)
        cards = self._cards(notes)
        for file in (self.metrics, self.speeds):
            if file.damaged:
                notes.append(f"{file.path.name}: {file.damaged} lines cannot be read and are left out")
        if self.untold:
            notes.append(f"{self.untold} rows of training tell no languages: an older version of this code wrote them")
        events = [_brief(row) for row in _rows(self.folder / "events.jsonl")]
        steps = [*self.train["step"][-1:], *[_number(v.get("step")) for v in self.validations[-1:]]]
        done = int(max([s for s in steps if np.isfinite(s)], default=0))
        return {
            "name": self.folder.name, "stage": str(settings.get("name", self.folder.name)),
            "done": done, "planned": int(planned[1]) if planned else None,
            "finished": bool(record), "seconds": record.get("seconds"), "commit": record.get("git_commit"),
            "axes": self._axes(), "train": self._train(), "speed": self._speed(), "peak": self.peak,
            "val": self._val(), "also": self._also(), "groups": self._groups(cards), "events": events,
            "mix": self._mix(cards, events, done, notes), "skips": self._skips(), "learns": header,
            "config": {name: json.dumps(value, ensure_ascii=False) for name, value in settings.items()},
            "answers": self._answers(), "notes": notes,
        }  # fmt: skip

    def _text(self, name: str) -> str:
        try:
            return (self.folder / name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def _settings(self, notes: list[str]) -> dict[str, Any]:
        try:
            return config.saved(self.folder / "config.yaml")
        except ConfigError as error:
            notes.append(str(error))
            return {}

    def _stage(self) -> Stage:
        return config.of_run(self.folder / "config.yaml")

    def _cards(self, notes: list[str]) -> dict[str, Card]:
        def read() -> dict[str, Card] | str:
            try:
                mix, also = mixes(self._stage())
            except (UserError, OSError) as error:
                return f"no cards, so no tasks, languages and licences: {error}"
            return {card.name: card for m in (*also.values(), mix) for card in m.cards}

        found = self._once("cards", [self.folder / "config.yaml"], read)
        if isinstance(found, str):
            notes.append(found)
            return {}
        return dict(found)

    def _axes(self) -> dict[str, Any]:
        """Audio hours, targets and hours of training at a thousand steps; between them the page goes straight."""
        step = self.train["step"]
        columns = {
            "audio_h": np.nancumsum(self.train["audio_s"]) / 3600, "targets": np.nancumsum(self.train["targets"]),
        }  # fmt: skip
        at, seconds = self.speed["step"], np.nancumsum(self.speed["seconds"])
        if len(at):
            columns["hours"] = np.interp(step, np.concatenate([[0.0], at]), np.concatenate([[0.0], seconds])) / 3600
        here = np.unique(np.linspace(0, len(step) - 1, min(len(step), 1_000)).round().astype(int))
        axes = {name: [0.0, *_short(column[here])] for name, column in columns.items()}
        return {"step": [0, *step[here].astype(int).tolist()], **axes}

    def _train(self) -> dict[str, Any]:
        t, step = self.train, self.train["step"]
        return {
            "raw": _curve(step, t["loss"]), "smooth": _curve(step, smoothed(t["loss"] * t["targets"], t["targets"])),
            "lr": _curve(step, t["lr"]), "grad_norm": _curve(step, t["grad_norm"]),
        }  # fmt: skip

    def _speed(self) -> dict[str, Any]:
        curves = {name: _curve(self.speed["step"], self.speed[name]) for name in SPEED}
        curves |= {name: _curve(self.validated["step"], self.validated[name]) for name in VALIDATION}
        return {name: curve for name, curve in curves.items() if curve["x"]}

    def _val(self) -> dict[str, Any]:
        found = _validation(self.validations, lambda row: row)
        found["loss"] = {
            "x": [row.get("step") for row in self.validations],
            "y": [_finite(row.get("val_loss")) for row in self.validations],
        }  # fmt: skip
        alone = [
            _number(row.get("val_loss")) + _number(row["text_only"].get("difference"))
            for row in self.validations if isinstance(row.get("text_only"), dict)
        ]  # fmt: skip
        return found | {"alone": _finite(alone[-1]) if alone else None}

    def _also(self) -> dict[str, Any]:
        found: dict[str, dict[str, list[Any]]] = {}
        for row in self.validations:
            for mix, other in _mapping(row.get("also")).items():
                curve = found.setdefault(mix, {"x": [], "y": []})
                curve["x"].append(row.get("step"))
                curve["y"].append(_finite(other.get("val_loss")))
        return found

    def _groups(self, cards: dict[str, Card]) -> dict[str, dict[str, Any]]:
        """Curves by corpus, task and language."""
        last = self.validations[-1] if self.validations else {}
        in_rows = {kind: list(_mapping(last.get(kind))) for kind in ("corpora", "languages")}
        corpora = list(dict.fromkeys([*in_rows["corpora"], *self.corpora]))  # in the order of the mix
        tasks: dict[str, list[str]] = {}
        for corpus in corpora:
            if card := cards.get(corpus):
                tasks.setdefault(card.task, []).append(corpus)
        found: dict[str, dict[str, Any]] = {"corpus": {}, "task": {}, "language": {}}
        for corpus in corpora:
            about = cards.get(corpus)
            curves = self._group(self.corpora, [corpus]) | _validation(self.validations, _part("corpora", corpus))
            said = {"task": about.task, "languages": about.languages} if about else {"task": "", "languages": []}
            found["corpus"][corpus] = curves | said
        for task, of in tasks.items():
            curves = self._group(self.corpora, of)
            found["task"][task] = curves | _validation(self.validations, _part("tasks", task))
        for language in sorted({*self.languages, *in_rows["languages"]}, key=lambda name: (name == NOT_TOLD, name)):
            curves = self._group(self.languages, [language])
            found["language"][language] = curves | _validation(self.validations, _part("languages", language))
        return found

    def _group(self, parts: dict[str, _Columns], names: Sequence[str]) -> dict[str, Any]:
        """Training loss of some corpora, or languages, together."""
        step = self.train["step"]
        sums = np.zeros((2, len(step)))
        for name in names:
            part = parts.get(name)
            if part:
                for column, of in zip(sums, ("loss_sum", "targets"), strict=True):
                    np.add.at(column, part["row"].astype(int), part[of])
        if not sums[1].any():
            return {}
        here = np.flatnonzero(sums[1] > 0)
        loss, targets = sums[:, here]
        curves = {"raw": loss / targets, "smooth": smoothed(loss, targets)}
        return {name: _curve(step[here], y, POINTS_OF_A_GROUP) for name, y in curves.items()}

    # -- mix, skips, answers ------------------------------------------------------------------------------------------

    def _mix(
        self, cards: dict[str, Card], events: Sequence[dict[str, Any]], done: int, notes: list[str]
    ) -> list[dict[str, Any]]:  # fmt: skip
        """What was asked for and what was had, since the plan began (a restarted one begins at its step)."""
        asked = _mapping(_mapping(read_json(self.folder / "inputs.json").get("plan")).get("mix"))
        if not asked:
            notes.append("inputs.json is not there or has no plan: the mix that was asked for is not known")
            return []
        begins = max([int(e["step"]) for e in events if e.get("event") == "plan restarted"], default=0)
        shares = _asked(asked, events, begins, done)
        ledgers = sorted(self.folder.glob("ledger/rank*.bin"))
        samples, holes, until = self._once("ledger", ledgers, lambda: _counted(self.folder))
        notes.append(f"samples are counted in the ledger, which is written with each checkpoint: up to step {until}")
        audited = read_json(self.folder / "audit.json").get("corpora", {})
        rows = []
        for number, corpus in enumerate(asked):
            part, card = self.corpora.get(corpus), cards.get(corpus)
            late = self.train["step"][part["row"].astype(int)] > begins if part else np.zeros(0, dtype=bool)
            rows.append({
                "corpus": corpus, "task": card.task if card else "", "licence": card.licence if card else "",
                "languages": card.languages if card else [], "asked": round(shares[corpus], 3),
                "samples": samples[number], "holes": holes[number],
                "targets": int(np.nansum(part["targets"][late])) if part else 0,
                "hours": _finite(audited.get(corpus, {}).get("hours")),
                "epochs": _finite(audited.get(corpus, {}).get("epochs")),
            })  # fmt: skip
        if not audited:
            notes.append(f"hours and epochs of a corpus are known after `make audit NAME={self.folder.name}`")
        return rows

    def _skips(self) -> list[dict[str, Any]]:
        files = [self.folder / "skipped.jsonl", *sorted(self.folder.glob("ledger/skipped-rank*.jsonl"))]

        def read() -> list[dict[str, Any]]:
            counts = Counter(
                (str(row.get("corpus")), str(row.get("reason")), _number(row.get("step")) < 0)
                for path in files for row in _rows(path)
            )  # fmt: skip
            return [
                {"corpus": corpus, "reason": reason, "before": before, "records": n}
                for (corpus, reason, before), n in counts.most_common()
            ]

        return list(self._once("skips", files, read))

    def _answers(self) -> dict[str, Any]:
        """Exact match of the closed questions, and a few answers of the last validation."""
        path = self.folder / "answers.jsonl"
        return dict(self._once("answers", [path], lambda: judged(self.folder.name, _rows(path))))

    def clips(self) -> dict[str, str]:
        """Audio of the answers that are shown: id -> data URI (FLAC, 16 kHz), or a sentence why there is none."""
        path, shown = self.folder / "answers.jsonl", self._answers()["shown"]
        return dict(self._once("clips", [path], lambda: read_clips(self.folder / "config.yaml", shown)))


def _brief(event: dict[str, Any]) -> dict[str, Any]:
    """An event for the page: of a skipped step's packs the first samples whose loss is not finite."""
    packs = [_mapping(pack) for pack in event.get("packs") or ()]
    wrong = [key for pack in packs for key in pack.get("not_finite") or ()]
    return {k: v for k, v in event.items() if k != "packs"} | ({"not_finite": wrong[:8]} if wrong else {})


def _stamp(path: Path) -> Any:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _finite(value: Any) -> float | None:
    number = _number(value)
    return float(f"{number:.6g}") if np.isfinite(number) else None


def _part(kind: str, name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A validation row -> what it says of a group."""
    return lambda row: _mapping(_mapping(row.get(kind)).get(name))


def _validation(rows: Sequence[dict[str, Any]], read: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Loss and paired differences over the validations."""
    found: dict[str, Any] = {"loss": {"x": [], "y": []}}
    for row in rows:
        part, step = read(row), row.get("step")
        targets = _number(part.get("targets"))
        if "loss_sum" in part and targets > 0:
            found["loss"]["x"].append(step)
            found["loss"]["y"].append(_finite(_number(part["loss_sum"]) / targets))
        for kind in PAIRED:
            pair = part.get(kind)
            if isinstance(pair, dict):
                curve = found.setdefault(kind, {"x": [], "y": [], "se": []})
                curve["x"].append(step)
                curve["y"].append(_finite(pair.get("difference")))
                curve["se"].append(_finite(pair.get("se")))
    return found


def _asked(mix: dict[str, Any], events: Sequence[dict[str, Any]], begins: int, done: int) -> dict[str, float]:
    """Percent of each corpus over the steps so far, with the changes of the mix."""
    changes: list[tuple[int, dict[str, Any]]] = [(begins, mix)]
    changes += [(int(e["from_step"]), e["percent"]) for e in events if e.get("event") == "mix" and e["step"] >= begins]
    until = [step for step, _ in changes[1:]] + [max(done, changes[-1][0] + (len(changes) == 1))]
    total = dict.fromkeys(mix, 0.0)
    for (step, percent), end in zip(changes, until, strict=True):
        weight = max(0, min(end, max(done, begins + 1)) - step) / sum(map(_number, percent.values()))
        for corpus in total:
            total[corpus] += weight * _number(percent.get(corpus, 0))
    whole = sum(total.values()) or 1.0
    return {corpus: 100 * share / whole for corpus, share in total.items()}


def _counted(folder: Path) -> tuple[Counter[int], Counter[int], int]:
    """(samples trained on, holes) by number of the corpus, and the steps that the ledger holds."""
    samples, holes, until = Counter[int](), Counter[int](), 0
    for part in read_ledger(folder):
        until = max(until, int(part.step.max(initial=-1)) + 1)
        for good, counts in ((1, samples), (0, holes)):
            corpora, n = np.unique(part.rows[part.rows[:, 3] == good, 0], return_counts=True)
            counts.update(dict(zip(corpora.tolist(), n.tolist(), strict=True)))
    return samples, holes, until
