"""Sums since the last row of metrics.jsonl, over all ranks; and the file itself."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from midasheng import frames
from midasheng.data.ledger import append, drop_after
from midasheng.model.flops import Cost
from midasheng.sample import NOT_TOLD, Pack

Reduce = Callable[[Tensor], Tensor]  # sum over ranks


class Meter:
    """Loss sum and targets of each corpus and again of each language, seconds of audio, slots and frames (real ones, no
    padding), since the last row. One float64 vector, so a row costs one reduction and one read; `languages`: all that
    the cards list, so that it is the same on every rank."""

    def __init__(self, corpora: Sequence[str], languages: Sequence[str]) -> None:
        self.corpora, self.languages = tuple(corpora), (*languages, NOT_TOLD)
        self.groups = len(self.corpora) + len(self.languages)
        self.sums = torch.zeros(2 * self.groups + 3, dtype=torch.float64)

    def add(self, pack: Pack, loss_S: Tensor) -> None:
        """One trained pack and the loss of its segments, shape (S,), on the host."""
        c, n = len(self.corpora), self.groups
        if pack.keys:
            of_corpora = [self.corpora.index(name) for name in pack.corpora]
            of_languages = [c + self.languages.index(name) for name in pack.languages]
            where = torch.tensor(of_corpora + of_languages)
            self.sums.index_add_(0, where, loss_S.double()[: len(pack.keys)].repeat(2))
            self.sums.index_add_(0, n + where, torch.tensor(pack.targets, dtype=torch.float64).repeat(2))
        audio_s = sum(frames.seconds(c) for c in pack.clips)
        slots = sum(pack.real)
        self.sums[2 * n :] += torch.tensor([audio_s, slots, sum(frames.frames(c) for c in pack.clips)])

    def row(self, reduce: Reduce) -> dict[str, Any]:
        """The sums over all ranks as a row; starts again from zero."""
        c, n = len(self.corpora), self.groups
        sums = reduce(self.sums).tolist()
        self.sums = torch.zeros_like(self.sums)
        targets = sum(sums[n : n + c])
        parts = [{"loss_sum": loss, "targets": int(t)} for loss, t in zip(sums[:n], sums[n : 2 * n], strict=True)]
        return {
            "loss": sum(sums[:c]) / targets if targets else math.nan,
            "targets": int(targets),
            "audio_s": round(sums[2 * n], 3),
            "slots": int(sums[2 * n + 1]),
            "frames": int(sums[2 * n + 2]),
            "corpora": dict(zip(self.corpora, parts[:c], strict=True)),
            # there may be a hundred, of which a row met few
            "languages": {name: part for name, part in zip(self.languages, parts[c:], strict=True) if part["targets"]},
        }

    def go_on(self, sums: Tensor, languages: Sequence[str]) -> None:
        """Take back sums that were kept over the same corpora and over `languages`: the last of them NOT_TOLD, or none
        where a version wrote them that did not know any. Where these are others, the sums are of no language."""
        c, n = len(self.corpora), len(self.corpora) + len(languages)
        if tuple(languages) == self.languages:
            self.sums = sums.clone()
            return
        self.sums.zero_()
        self.sums[2 * self.groups :] = sums[2 * n :]
        for mine, theirs in ((0, 0), (self.groups, n)):
            self.sums[mine : mine + c] = sums[theirs : theirs + c]
            self.sums[mine + self.groups - 1] = sums[theirs : theirs + c].sum()


def by_group(kind: str, row: dict[str, Any], tasks: Mapping[str, str]) -> dict[str, float]:
    """Loss per target of each corpus, task and language in a row of training or validation, under names for a tracker:
    KIND_corpus/NAME. `tasks`: of each corpus."""
    of_corpora, of_languages = row["corpora"].items(), row["languages"].items()
    named = [(f"{kind}_corpus/{name}", part) for name, part in of_corpora]
    named += [(f"{kind}_task/{tasks[name]}", part) for name, part in of_corpora]
    named += [(f"{kind}_language/{name}", part) for name, part in of_languages]
    sums: dict[str, list[float]] = {}
    for name, part in named:
        both = sums.setdefault(name, [0.0, 0.0])
        both[0] += part["loss_sum"]
        both[1] += part["targets"]
    return {name: loss / targets for name, (loss, targets) in sums.items() if targets}


class Speed:
    """How fast a run is, on the wall clock: waiting for data, optimizer and checkpoints inside, validation outside.

    Its rows differ from run to run, so they stand in a file of their own (speed.jsonl).
    """

    def __init__(self, cost: Cost, peak: float, devices: int) -> None:
        self.cost, self.peak, self.devices = cost, peak, devices
        self._begin()

    def _begin(self) -> None:
        # useful FLOPs, seconds of audio, slots and all that were computed, frames and all, seconds of waiting
        self.sums = torch.zeros(7, dtype=torch.float64)
        self.since = time.monotonic()

    def add(self, pack: Pack) -> None:
        """One trained pack."""
        useful = sum(self.cost.of(pack).values())
        audio_s = sum(frames.seconds(c) for c in pack.clips)
        slots, n_frames = sum(pack.real), sum(frames.frames(c) for c in pack.clips)
        self.sums[:6] += torch.tensor([useful, audio_s, slots, sum(pack.segments), n_frames, sum(pack.chunks)])

    def waited(self, seconds: float) -> None:
        """Time between two steps, in which the next batch was not yet there."""
        self.sums[6] += seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not training's."""
        began = time.monotonic()
        yield
        self.since += time.monotonic() - began

    def row(self, reduce: Reduce) -> dict[str, float]:
        """Since the last row, over all devices; starts again from zero."""
        seconds = time.monotonic() - self.since
        useful, audio_s, slots, all_slots, n_frames, all_frames, waiting = reduce(self.sums).tolist()
        self._begin()
        return {
            "seconds": seconds,
            "audio_h_per_device_h": audio_s / seconds / self.devices,
            "mfu": useful / seconds / self.devices / self.peak,
            "slots_per_s": slots / seconds,
            "encoder_padding": 1 - n_frames / all_frames if all_frames else 0.0,
            "decoder_padding": 1 - slots / all_slots if all_slots else 0.0,
            "waiting": waiting / seconds / self.devices,
        }


class MetricsFile:
    """metrics.jsonl, rows of training (`loss`) and of validation (`val_loss`), and its like; `step` counts finished
    steps. A resume drops what stands behind its step."""

    def __init__(self, path: Path, steps_done: int, *, write: bool) -> None:
        self.path, self.write = path, write
        if write:
            drop_after(path, steps_done + 1)

    def add(self, row: dict[str, Any]) -> None:
        """Append one row."""
        if self.write:
            append(self.path, (json.dumps(row, ensure_ascii=False) + "\n").encode())


def memory_gib(device: torch.device) -> float:
    """The most memory that was taken so far, GiB: on a GPU what torch holds there, elsewhere the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# what can happen to a run between two steps, and what its row in events.jsonl says of it
EVENTS = {
    "start": {"world"},  # training begins, on so many processes
    "resume": {"world", "world_before"},  # it goes on from a checkpoint; None: the checkpoint did not say
    # until it was in place, and how long of them training stood still; is it best.ckpt too?
    "checkpoint": {"seconds", "waited", "bytes", "best"},
    "mix": {"from_step", "percent"},  # the shares change
    "plan restarted": {"because"},  # a new order of data
    # a step was not taken: its number in plan and ledger, how many in a row, and what its packs held (skips.references)
    "step skipped": {"number", "because", "grad_norm", "in_a_row", "packs"},
    "stop": set(),  # somebody asked for it
    # a rank waits for data too long, or fails and the run ends; `step`: of the last checkpoint, where it will go on
    "stall": {"at_step", "rank", "at"},
    "failed": {"at_step", "rank", "error"},
    "handed off": set(),  # weights/ is written
}


def add_event(run: Path, event: dict[str, Any]) -> None:
    """Append a row to events.jsonl: {"step" (finished steps), "event", and the fields that EVENTS names}. The time of
    the clock is added ("time", seconds since 1970)."""
    fields = set(event) - {"step", "event"}
    assert fields == EVENTS[event["event"]], f"{event['event']} has the fields {fields}, not {EVENTS[event['event']]}"
    row = event | {"time": round(time.time(), 3)}
    append(run / "events.jsonl", (json.dumps(row, ensure_ascii=False) + "\n").encode())


def clock(seconds: float) -> str:
    """90.0 -> "1 min 30 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
