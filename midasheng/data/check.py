"""A stage's data before any GPU hour: opened with the training code, counted, planned ahead; what is wrong is named.

An index says what a shard held when it was made; a check opens the first and last record of every shard again, exactly
as the loader does, and plans the first steps of the run to see what the mix will really give.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from midasheng.config import AUTO, Stage, UserError
from midasheng.data.audio import Skip, decode
from midasheng.data.chat import trunk
from midasheng.data.index import CorpusIndex, index_folder
from midasheng.data.ledger import AT_LEAST, BAD, SHARE
from midasheng.data.loader import conversation
from midasheng.data.manifest import ManifestError
from midasheng.data.plan import TRIAL_STEPS, Planned
from midasheng.data.room import UNKNOWN_SLOTS, DataRoom, mixes, open_chat, open_corpora, read_data
from midasheng.data.storage import StorageError, Unreachable, read_many
from midasheng.frames import frame_seconds

LEAST_SAMPLES = 20_000  # planned in advance
AT_ONCE = 32  # shards that one process opens together
MANY_EPOCHS = 10  # of one corpus in one run: worth a remark
EXAMPLES = 3  # of each problem
CORPUS, SLOTS, FRAMES, TARGETS = (Planned._fields.index(f) for f in ("corpus", "slots", "frames", "targets"))


@dataclass
class CorpusCheck:
    """One corpus. Shares in percent: `asked` of the samples; the others are what the plan's first steps really give."""

    records: int = 0
    hours: float = 0.0
    held_out: int = 0
    shards: int = 0
    opened: int = 0  # shards whose first and last record were opened, now or before
    skipped: dict[str, int] = field(default_factory=dict)
    fits_no_pack: int = 0  # among the samples planned in advance
    slots: float = 0.0  # a sample, mean
    seconds: float = 0.0
    asked: float = 0.0
    samples: float = 0.0
    audio: float = 0.0
    targets: float = 0.0
    epochs: float = 0.0  # visits per record in the whole run


@dataclass
class Check:
    """What was found for one stage. `errors` would stop or spoil the run; `remarks` are for a person to judge."""

    stage: str
    mix: str
    corpora: dict[str, CorpusCheck] = field(default_factory=dict)
    steps: int = 0
    samples_a_step: float = 0.0
    packs_a_step: int = 0
    pack_slots: int = 0
    pack_frames: int = 0
    fill_slots: float = 0.0
    fill_frames: float = 0.0
    errors: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The findings for people."""
        lines = [f"{self.stage}, mix {self.mix}:"]
        if self.corpora:
            lines.append(
                f"  {'corpus':26}{'records':>10}{'hours':>11}{'held out':>9}{'slots':>7}{'asked':>9}{'samples':>9}"
                f"{'audio':>8}{'targets':>9}{'epochs':>8}  left out"
            )
        for name, c in self.corpora.items():
            skipped = c.skipped | ({"fits no pack": c.fits_no_pack} if c.fits_no_pack else {})
            left_out = ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items())) or "none"
            lines.append(
                f"  {name:26}{c.records:10}{c.hours:11.2f}{c.held_out:9}{c.slots:7.0f}{c.asked:8.2f}%{c.samples:8.2f}%"
                f"{c.audio:7.2f}%{c.targets:8.2f}%{c.epochs:8.2f}  {left_out}"
            )
        if self.steps:
            lines.append(
                f"  {self.steps} steps of {self.samples_a_step:.1f} samples in {self.packs_a_step} packs of "
                f"{self.pack_slots} slots ({100 * self.fill_slots:.1f} % full) and {self.pack_frames} frames "
                f"({100 * self.fill_frames:.1f} %)"
            )
        lines += [f"  remark: {r}" for r in self.remarks] + [f"  ERROR: {e}" for e in self.errors]
        return "\n".join(lines)


def check_data(stage: Stage) -> Check:
    """Check the data of one stage; indexes what is not yet indexed. Raises UserError where mix or tokenizer cannot be
    read at all; what is wrong with a corpus is among the errors."""
    found = Check(stage.name, stage.data.mix)
    (mix, looked_at), chat = mixes(stage), open_chat(stage)
    found.remarks += mix.notes
    if stage.batch.pack_slots == AUTO:
        found.remarks.append(f"batch.pack_slots={AUTO} is found by a run; planned here with {UNKNOWN_SLOTS} slots")
    trained, usable = {}, True
    for card, percent in zip(mix.cards, mix.percent, strict=True):
        found.corpora[card.name] = CorpusCheck(asked=percent)
        try:
            (corpus,) = open_corpora(stage, chat, [card], make=True)
        except UserError as error:
            found.errors.append(str(error))
            usable = False
            continue
        trained[card.name] = corpus
        usable &= _count(corpus, found, damaged=stage.data.damaged)
    others = {}
    for card in (c for other in looked_at.values() for c in other.cards if c.name not in found.corpora):
        try:
            (others[card.name],) = open_corpora(stage, chat, [card], make=True)
        except UserError as error:
            found.errors.append(str(error))
            usable = False
    folder = index_folder(stage.data.index, stage.data.root)
    for corpus in trained.values():
        _open(corpus, folder, found, stage.hardware.workers)
    _overlap(list(trained.values()), [*trained.values(), *others.values()], found)
    if usable:
        try:
            _plan(read_data(stage, make=False), stage, found)
        except UserError as error:
            found.errors.append(str(error))
    return found


def _count(corpus: CorpusIndex, found: Check, *, damaged: str) -> bool:
    """What the index says of a corpus; can a run begin with it?"""
    name, summary, row = corpus.card.name, corpus.summary, found.corpora[corpus.card.name]
    row.records, row.hours, row.shards = len(corpus), summary.hours, len(corpus.rows)
    row.held_out, row.skipped = sum(r.held_out for r in corpus.rows), dict(summary.reasons)
    for text in summary.damage[:EXAMPLES]:
        (found.errors if damaged != "keep" else found.remarks).append(f"corpus {name}: damaged shard {text}")
    if len(summary.damage) > EXAMPLES:
        found.remarks.append(f"corpus {name}: {len(summary.damage) - EXAMPLES} more damages (`make index` lists them)")
    bad = {reason: n for reason, n in summary.reasons.items() if reason in BAD}
    records = sum(r.records for r in corpus.rows)
    if sum(bad.values()) >= AT_LEAST and sum(bad.values()) > SHARE * records:
        found.errors.append(
            f"corpus {name}: {sum(bad.values())} of {records} records are bad ({bad}); a run would stop"
        )
    if not len(corpus):
        found.errors.append(f"corpus {name}: no record can be trained on (left out: {summary.reasons})")
    if not row.held_out:
        found.remarks.append(f"corpus {name}: no record is held out, so it is not validated on (card: held_out)")
    return bool(len(corpus)) and (damaged == "keep" or not summary.damage)


# -- the first and last record of every shard --------------------------------------------------------------------------


_CORPUS: list[CorpusIndex] = []  # what a worker process inherits


def _open(corpus: CorpusIndex, folder: Path, found: Check, workers: int) -> None:
    """Open both ends of every shard that has not been opened since it was indexed."""
    name = corpus.card.name
    cache = folder / name / f"opened.{corpus.reading.fingerprint}.json"
    known = set(json.loads(cache.read_text(encoding="utf-8"))) if cache.is_file() else set()
    # another max_audio_s, held_out or exclude makes other records the ends
    stamps = [f"{r.shard.path}:{r.shard.size}:{r.shard.stamp}:{r.train}:{r.samples}" for r in corpus.rows]
    todo = [
        i for i, (stamp, row) in enumerate(zip(stamps, corpus.rows, strict=True)) if row.train and stamp not in known
    ]
    jobs = [todo[i : i + AT_ONCE] for i in range(0, len(todo), AT_ONCE)]
    problems: dict[int, str] = {}
    _CORPUS.append(corpus)
    try:
        if workers < 2 or len(jobs) < 2:
            for job in jobs:
                problems |= _ends(job)
        else:
            with ProcessPoolExecutor(min(workers, len(jobs)), multiprocessing.get_context("fork")) as pool:
                for some in pool.map(_ends, jobs):
                    problems |= some
    finally:
        _CORPUS.pop()
    for shard in sorted(problems)[:EXAMPLES]:
        found.errors.append(f"corpus {name}: {problems[shard]}")
    if len(problems) > EXAMPLES:
        found.errors.append(f"corpus {name}: {len(problems)} shards in all have such an end")
    good = known & set(stamps) | {stamps[i] for i in todo if i not in problems}
    found.corpora[name].opened = len(good)
    if todo:
        part = cache.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(sorted(good)), encoding="utf-8")
        os.replace(part, cache)


def _ends(shards: Sequence[int]) -> dict[int, str]:
    """Shard -> what is wrong with its first or last training record."""
    corpus = _CORPUS[-1]
    numbers = [n for s in shards for n in {int(corpus.starts[s]), int(corpus.starts[s + 1]) - 1}]
    of = np.searchsorted(corpus.starts, numbers, side="right") - 1
    problems = {}
    for number, shard, data in zip(numbers, of.tolist(), read_many([corpus.place(n) for n in numbers]), strict=True):
        if wrong := _wrong(corpus, number, data):
            problems[shard] = f"{corpus.rows[shard].shard.path}: {corpus.key(number)}: {wrong}"
    return problems


def _wrong(corpus: CorpusIndex, number: int, data: bytes | StorageError | Unreachable) -> str:
    """What is wrong with a record, read as the loader reads it; empty where nothing is."""
    if not isinstance(data, bytes):
        return str(data)
    try:
        record, audio = corpus.read(number, data)
        clips = [decode(audio, record.n_samples)] if record.audio else []
        made = [conversation(corpus.card, record.key, v.turns, clips, corpus.reading.chat) for v in record.variants]
        for i, sample in enumerate(made):
            if len(sample.ids) != record.slots(i):
                return f"{len(sample.ids)} slots, {record.slots(i)} when it was indexed"
        common = int((~made[0].is_audio[: trunk(made)]).sum())
        if common != record.common:
            return f"{common} text slots in common, {record.common} when it was indexed"
    except (Skip, ManifestError) as error:
        return error.reason if isinstance(error, Skip) else str(error)
    return ""


# -- held out and trained on -------------------------------------------------------------------------------------------


def _overlap(trained: Sequence[CorpusIndex], everything: Sequence[CorpusIndex], found: Check) -> None:
    """Is a held-out record trained on, as the same bytes under another card or under the same key elsewhere?"""
    places: dict[tuple[str, int], list[str]] = {}  # of held-out records -> the cards that hold them out
    keys: dict[bytes, list[str]] = {}
    for kept in everything:
        for place in kept.held_out_places():
            places.setdefault(place, []).append(kept.card.name)
        for key in _held_out_keys(kept):
            keys.setdefault(key, []).append(kept.card.name)
    for other in trained:
        same, again = _among(other, places, keys)
        for name, numbers in same.items():
            found.errors.append(
                f"{len(numbers)} held-out records of {name} are trained on by {other.card.name}, e.g. "
                f"{other.key(numbers[0])}; give both cards the same held_out"
            )
        for name, numbers in again.items():
            found.remarks.append(
                f"{len(numbers)} training records of {other.card.name} bear the key of a held-out one of {name}, e.g. "
                f"{other.key(numbers[0])}; are they the same recordings?"
            )


def _held_out_keys(corpus: CorpusIndex) -> set[bytes]:
    found = set()
    for shard, row in enumerate(corpus.rows):
        if row.held_out:
            side, _, apart = corpus.side(shard)
            found |= {side.key(r).encode() for r in apart.tolist()}
    return found


def _among(
    corpus: CorpusIndex, places: Mapping[tuple[str, int], list[str]], keys: Mapping[bytes, list[str]]
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:  # fmt: skip
    """Card -> numbers of this corpus' training records that it holds out: by place, and else by key (a key may count
    from zero in each shard, so the same key elsewhere need not be the same record)."""
    same: dict[str, list[int]] = {}
    again: dict[str, list[int]] = {}
    for shard, row in enumerate(corpus.rows if keys else ()):
        if not row.train:
            continue
        side, train, _ = corpus.side(shard)
        blob, until = side["keys"].tobytes(), side["key_until"]
        starts, ends = np.concatenate([[0], until[:-1]])[train].tolist(), until[train].tolist()
        for i, key in enumerate(map(blob.__getitem__, map(slice, starts, ends))):
            if key in keys:
                number, offset = int(corpus.starts[shard]) + i, int(side["span"][train[i], 0])
                here = places.get((row.shard.path, offset), [])
                for name in here:
                    same.setdefault(name, []).append(number)
                for name in keys[key]:
                    if name not in here:
                        again.setdefault(name, []).append(number)
    return same, again


# -- the plan ----------------------------------------------------------------------------------------------------------


def _plan(data: DataRoom, stage: Stage, found: Check) -> None:
    """Plan the first steps: what the mix gives, how full packs are, how often each record comes in the whole run."""
    found.remarks += data.notes
    planner = data.planner(stage.run.seed)
    samples: list[Planned] = []
    steps = 0
    for step in planner:
        samples += [p for chosen in step.packs for p in chosen]
        for unfit in step.skipped:
            found.corpora[data.corpora[unfit.corpus].card.name].fits_no_pack += 1
        steps += 1
        if steps >= data.course.steps or (steps >= TRIAL_STEPS and len(samples) >= LEAST_SAMPLES):
            break
    rows = np.asarray(samples, dtype=np.int64)
    sums = rows[:, [SLOTS, FRAMES, TARGETS]].sum(axis=0)
    packs = steps * data.budget.packs_per_step
    found.steps, found.samples_a_step = data.course.steps, len(samples) / steps
    found.packs_a_step, found.pack_slots, found.pack_frames = (
        data.budget.packs_per_step, data.budget.pack_slots, data.budget.pack_frames,
    )  # fmt: skip
    found.fill_slots = (float(sums[0]) + packs * data.budget.lead_slots) / (packs * data.budget.pack_slots)
    found.fill_frames = float(sums[1]) / (packs * data.budget.pack_frames) if data.budget.pack_frames else 0.0
    for number, corpus in enumerate(data.corpora):
        mine, row = rows[rows[:, CORPUS] == number], found.corpora[corpus.card.name]
        slots, n_frames, targets = mine[:, [SLOTS, FRAMES, TARGETS]].sum(axis=0).tolist() if len(mine) else (0, 0, 0)
        row.slots = slots / max(1, len(mine))
        row.seconds = frame_seconds(n_frames) / max(1, len(mine))
        row.samples = 100 * len(mine) / len(samples)
        row.audio = 100 * n_frames / max(1, int(sums[1]))
        row.targets = 100 * targets / max(1, int(sums[2]))
        row.epochs = len(mine) / steps * data.course.steps / max(1, len(corpus))
        if row.epochs > MANY_EPOCHS:
            found.remarks.append(
                f"corpus {corpus.card.name}: every record {row.epochs:.1f} times in this run; is its share meant so?"
            )


def write(found: Sequence[Check], path: Path) -> None:
    """The machine-readable copy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content: list[dict[str, Any]] = [asdict(f) for f in found]
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
