"""All that a stage's start checks, without training: what is right, what is wrong, what this machine cannot tell."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from midasheng.config import DDP, FSDP, Stage, UserError
from midasheng.data.quarantine import quarantined, records
from midasheng.data.room import DataRoom, Sources, mixes, open_data, plan_data
from midasheng.data.storage import StorageError, is_url, list_shards
from midasheng.model import weights
from midasheng.model.audio_lm import AudioLM
from midasheng.train import checkpoint, fit, memory, once, sharded
from midasheng.train.order import Order, check_run_folder
from midasheng.train.world import World

T = TypeVar("T")
CORPORA = 12  # that are shown: one screen
RIGHT, WRONG, UNKNOWN = "ok", "WRONG", "not checked"


@dataclass
class Preflight:
    """The findings on one stage, in the order in which its start checks them."""

    title: str
    items: list[tuple[str, str, str]] = field(default_factory=list)  # what, state, in words

    def add(self, what: str, state: str, text: str) -> None:
        """One more."""
        self.items.append((what, state, text))

    def checked(self, what: str, check: Callable[[], T], text: Callable[[T], str], *, here: str = "") -> T | None:
        """Run a check of the start. What goes wrong is WRONG; where `here` names what this machine lacks, it is not."""
        if here:
            self.add(what, UNKNOWN, here)
            return None
        try:
            found = check()
        except (UserError, AssertionError) as error:
            self.add(what, WRONG, str(error))
            return None
        self.add(what, RIGHT, text(found))
        return found

    @property
    def wrong(self) -> int:
        """How many checks failed."""
        return sum(state == WRONG for _, state, _ in self.items)

    def text(self) -> str:
        """One screen."""
        lines = [self.title]
        for what, state, text in self.items:
            first, *more = text.splitlines()
            lines += [f"{state:>12}  {what:14} {first}", *(f"{'':29}{line}" for line in more)]
        unknown = [what for what, state, _ in self.items if state == UNKNOWN]
        verdict = f"{self.wrong} WRONG" if self.wrong else "nothing wrong"
        return "\n".join([*lines, verdict + (f"; not checked here: {', '.join(unknown)}" if unknown else "")])


def preflight(order: Order) -> Preflight:
    """Check one stage as its start does, as far as this machine allows; trains nothing, and writes nothing but an index
    of shards that is missing."""
    stage = order.stage
    found = Preflight(f"{stage.name} at {order.scale} -> {order.folder}, code {fit.git_commit()}")
    gpu = stage.hardware.accelerator == "gpu" or stage.run.precision == "bf16"
    device = memory.device_of(stage)
    no_gpu = "no GPU here" if gpu and device.type == "cpu" else ""
    found.checked(
        "kernels", lambda: fit.verified(stage), lambda t: f"on {device.type}: {t.strip()}".replace("; ", "\n")
    )
    absent = _absent_weights(order)
    starts = found.checked("weights", lambda: fit.open_starts(order), _sources, here=absent)
    sources = found.checked(
        "data", lambda: open_data(stage, make=True), lambda s: f"mix {s.mix.name}, {len(s.corpora)} corpora",
        here=_absent_data(stage),
    )  # fmt: skip
    if starts and sources:
        for start in starts:
            found.checked(
                "tokenizer", lambda s=start: weights.check_tokenizer(s, sources.chat.fingerprint()),  # type: ignore[misc]
                lambda _, s=start: f"that of {s.source.where}",  # type: ignore[misc]
            )  # fmt: skip
    model = shape = None
    added = sources.chat.added if sources else range(0)
    if starts is not None:
        built = found.checked(
            "what learns", lambda: fit.build(order, starts, added), lambda b: b[1].split("\n\n")[1].strip()
        )
        model = shape = built[0] if built else None
    else:
        made = found.checked("what learns", lambda: fit.skeleton(stage, added), lambda m: m[1].strip())
        shape = made[0] if made else None
    _plan(found, order, sources, starts)
    if shape is not None:
        found.checked("disk", lambda: checkpoint.check_room(order.folder, shape, stage), str.strip)
    shared = shape is not None and sharded.chosen(stage.hardware, shape) == FSDP
    if shape is not None and shared:
        found.checked("TMPDIR", lambda: once.check_room(shape), str.strip)
    if shared and sources is not None and not no_gpu:
        found.checked("largest pack", lambda: _dry_shared(order, sources), "\n".join)
    elif model is not None and sources is not None and not no_gpu:
        found.checked("largest pack", lambda: _dry(order, lambda: model, sources, DDP), "\n".join)
    else:
        lacks = [no_gpu, "" if model or shared else "no weights", "" if sources else "no data"]
        why = ", ".join(lack for lack in lacks if lack)
        found.add("largest pack", UNKNOWN, f"{why}: so neither memory nor a dry forward and backward")
    world = stage.hardware.devices * stage.hardware.nodes
    if world > 1:
        found.add(
            "ranks alike", UNKNOWN, f"one process here; all {world} compare code, config, index, weights at start"
        )
    return found


def _dry(order: Order, measurable: Callable[[], AudioLM], sources: Sources, kind: str) -> list[str]:
    order = memory.pack_slots(order, sources, measurable, World(), kind)
    slots = order.stage.batch.pack_slots
    assert isinstance(slots, int)
    shape = sources.shape(order.stage, slots)
    return [line.strip() for line in memory.check(order, measurable(), sources, shape, World())]


def _dry_shared(order: Order, sources: Sources) -> list[str]:
    """As the first of the ranks that will share the model, which holds as much of it as any other."""
    world = order.stage.hardware.devices * order.stage.hardware.nodes
    with sharded.imagined(world):
        lines = _dry(order, lambda: fit.skeleton(order.stage, sources.chat.added)[0], sources, FSDP)
    return [*lines, f"rank 0 of {world} that share the model; the others are imagined, and so is what they send"]


def _plan(found: Preflight, order: Order, sources: Sources | None, starts: list[weights.Start] | None) -> None:
    """Plan, length, and the run folder."""
    if sources is None:
        found.add("plan", UNKNOWN, "no data")
        found.add("run folder", UNKNOWN, "it is held against plan and weights")
        return
    data = found.checked("plan", lambda: plan_data(order.stage, sources), lambda d: _course(order.stage, d))
    if data is None or starts is None:
        found.add("run folder", UNKNOWN, "it is held against plan and weights")
        return
    inputs = {"plan": data.planner(order.stage.run.seed).fingerprint(), "parents": fit.parents_of(starts)}
    found.checked("run folder", lambda: "new" if order.fresh else check_run_folder(order, inputs), _state)
    names = [] if order.fresh else quarantined(order.folder)
    if names:
        found.checked("quarantine", lambda: records(names, data.corpora), lambda n: f"{len(n)} samples are left out")


def _course(stage: Stage, data: DataRoom) -> str:
    rows = [
        f"{corpus.card.name:24}{percent:6.1f} %{len(corpus):9} records{corpus.summary.hours:9.2f} h"
        for corpus, percent in zip(data.corpora, data.mix.percent, strict=True)
    ]
    more = [f"and {len(rows) - CORPORA} corpora more"] if len(rows) > CORPORA else []
    return "\n".join([fit.course(stage, data), *rows[:CORPORA], *more, *data.notes])


def _state(state: str) -> str:
    return {"new": "begins at step 0", "unfinished": "goes on from its last checkpoint"}.get(state, state)


def _sources(starts: list[weights.Start]) -> str:
    return "\n".join(f"{', '.join(s.take)} from {s.source.where}" for s in starts) or "all fresh"


def _absent_weights(order: Order) -> str:
    """Weights to start from that are named and not on this machine, or not named yet; "" where all are here."""
    lacks = []
    for entry in order.stage.start:
        origin = str(entry["from"])
        if not origin:
            lacks.append(f"{entry['take']}: none named (weights.encoder=PATH, weights.decoder=PATH)")
        elif fit.names_stage(origin):
            folder = order.runs / order.scale / (order.start_from or origin)
            if not (folder / "weights").is_dir():
                lacks.append(f"{folder}: that run has no weights yet")
        elif not _here(origin):
            lacks.append(f"{origin} is not here")
    return "; ".join(lacks)


def _here(path: str) -> bool:
    """Is it on this machine, or can a hub be asked for it?"""
    return Path(path).exists() or (path.count("/") == 1 and not os.environ.get("HF_HUB_OFFLINE"))


def _absent_data(stage: Stage) -> str:
    """What of the data is not on this machine. A mix of which some shards are here and others not is wrong instead."""
    lacks = []
    root, path = stage.data.root, stage.tokenizer.path
    if not is_url(root) and not any(_shards(root, card.shards) for card in mixes(stage)[0].cards):
        lacks.append(f"no shard of mix {stage.data.mix} below data.root {root}")
    if not path or not _here(path):
        lacks.append(f"tokenizer.path {path or 'is not named'}{' is not here' if path else ''}")
    return "; ".join(lacks)


def _shards(root: str, pattern: str) -> bool:
    try:
        return bool(list_shards(root, pattern))
    except StorageError:
        return False
