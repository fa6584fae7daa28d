"""What a run will cost, before a GPU is rented: from configs, mixes, cards and hardware alone.

Every line begins with where it is from: m measured (an index's real lengths), d derived (by the code that will run:
plan, shapes, counts of bytes and operations), a assumed (a key of `forecast.*`, named in the line).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from midasheng import frames
from midasheng.config import Stage
from midasheng.data.assumed import known
from midasheng.data.index import CorpusIndex
from midasheng.data.manifest import Mix
from midasheng.data.plan import SLOT_UNIT, Budget, Corpus, Planned, Planner, budget, in_steps
from midasheng.data.room import UNKNOWN_SLOTS
from midasheng.model.audio_lm import AudioLM
from midasheng.model.flops import Cost, cost
from midasheng.train import footprint
from midasheng.train.footprint import Growth, Held
from midasheng.train.memory import ALLOWED, GIB, Dearest
from midasheng.train.order import trains
from midasheng.train.sharded import MANY

PACKS = 640  # planned in advance, at least
REPORT, THROUGHPUT = "report", "throughput"
MOST_SLOTS = 2**18  # of a pack: none larger is looked for
LONG_S = 900  # the report's longest clips
BACKWARD = 2 / 3  # of a pack's time, in which gradients can already be sent
PASSES = 32  # bytes that clip and 8-bit AdamW move for each parameter that learns
# the report: audio hours a GPU hour by stage (section 4: 38,662 h three times in a day on 8 GPUs; 19,200 GPU-hours in
# all for 2.006 M h), and audio hours
PUBLISHED = {"stage1_align": (604.0, 116e3), "stage2_pretrain": (99.5, 1.54e6), "stage3_sft": (99.5, 352e3)}
SLOTS, FRAMES, TARGETS = (Planned._fields.index(f) for f in ("slots", "frames", "targets"))
Floats = NDArray[np.float64]


# -- numbers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """A stage's plan under one kind of batch: its first packs, and what follows from them."""

    kind: str
    shape: Budget
    steps: int
    rows: NDArray[np.int64]  # (samples, fields of Planned) in the order of the plan
    packs: int  # that hold them

    @property
    def clips(self) -> float:
        """Samples of a step."""
        return len(self.rows) / self.packs * self.shape.packs_per_step

    @property
    def fill(self) -> tuple[float, float]:
        """Used share of slots and of frames."""
        slots = float(self.rows[:, SLOTS].sum()) / self.packs + self.shape.lead_slots
        n_frames = float(self.rows[:, FRAMES].sum()) / self.packs
        return slots / self.shape.pack_slots, n_frames / max(1, self.shape.pack_frames)

    @property
    def audio_s(self) -> float:
        """Seconds of audio of a step."""
        return frames.frame_seconds(float(self.rows[:, FRAMES].sum())) / self.packs * self.shape.packs_per_step

    @property
    def hours(self) -> float:
        """Audio of the run."""
        return self.steps * self.audio_s / 3600

    @property
    def sample(self) -> Dearest:
        """A mean sample, for packs that are tried."""
        slots, n_frames, targets = self.rows[:, [SLOTS, FRAMES, TARGETS]].mean(0)
        return Dearest(math.ceil(slots), max(1, math.ceil(n_frames)), float(targets / slots), self.shape.lead_slots)


def course(stage: Stage, mix: Mix, corpora: Sequence[Corpus], kind: str) -> Course:
    """Plan the first packs of a stage as if its batches were of this kind. Raises UserError."""
    b = stage.batch
    slots = b.pack_slots if isinstance(b.pack_slots, int) else UNKNOWN_SLOTS
    shape = budget(
        corpora, mix.percent, kind=kind, clips_per_step=b.clips_per_step, packs_per_step=b.packs_per_step,
        pack_slots=slots, pack_frames=b.pack_frames, share=b.share,
    )  # fmt: skip
    planner = Planner(corpora, mix.percent, shape, stage.run.seed)
    trial = list(islice(planner, math.ceil(PACKS / shape.packs_per_step)))
    steps = max(1, in_steps(stage.run.length, "run.length", corpora, trial))
    packs = [pack for step in trial for pack in step.packs]
    return Course(kind, shape, steps, np.array([s for pack in packs for s in pack], dtype=np.int64), len(packs))


def _samples(c: Cost, slots: Floats, n_frames: Floats, targets: Floats, lead: int = 0) -> dict[str, float]:
    """Part -> FLOPs of samples that lie as they are given: padded where they are padded. Samples of `answers: all` that
    share a clip are taken as one segment each; attention is below 2 % of a step."""
    whole, rest = np.divmod(n_frames, frames.CHUNK)
    squares = whole * frames.CHUNK**2 + rest**2
    return {
        "encoder": float((c.frame * n_frames + c.chunk_squared * squares).sum()),
        "projector": float((c.token * (n_frames // frames.STACK)).sum()),
        "decoder": float((c.slot * slots + c.segment_squared * slots * (slots + lead)).sum()),
        "head": float((c.target * targets).sum()),
    }


def useful(c: Cost, at: Course) -> dict[str, float]:
    """Part -> useful FLOPs of a mean pack."""
    slots, n_frames, targets = at.rows[:, [SLOTS, FRAMES, TARGETS]].T.astype(np.float64)
    parts = _samples(c, slots, n_frames, targets, at.shape.lead_slots)
    return {
        name: flops / at.packs + (name == "decoder") * c.slot * at.shape.lead_slots for name, flops in parts.items()
    }


def computed(c: Cost, at: Course) -> float:
    """FLOPs of a pack with its padding."""
    slots, n_frames = (1 - fill for fill in at.fill)
    return (
        sum(useful(c, at).values()) + c.slot * at.shape.pack_slots * slots + c.frame * at.shape.pack_frames * n_frames
    )


@dataclass(frozen=True)
class PaddedBatches:
    """The report's way: random batches on each GPU, each padded to its longest. Shares of slots and frames that are
    padding; FLOPs over useful ones, of a mean GPU and of the slowest of a step."""

    slots: float
    frames: float
    mean: float
    slowest: float


def padded(c: Cost, at: Course, batch: int, world: int) -> PaddedBatches:
    """`at`'s samples in batches of `batch` on `world` GPUs; logits of every slot, as public tools make them."""
    rows = np.random.default_rng(0).permutation(at.rows[:, [SLOTS, FRAMES, TARGETS]].astype(np.float64))
    n = max(1, len(rows) // batch)
    batch = min(batch, len(rows))
    rows = rows[: n * batch].reshape(n, batch, 3)
    most = rows.max(axis=1, keepdims=True).repeat(batch, axis=1)
    flops = [sum(_samples(c, m[:, 0], m[:, 1], m[:, 0]).values()) for m in most]
    whole = sum(_samples(c, *rows.reshape(-1, 3).T).values()) / n
    steps = max(1, n // world)
    slowest = np.mean([max(flops[i * world : (i + 1) * world]) for i in range(steps)])
    filled = rows.sum((0, 1)) / np.maximum(1, most.sum((0, 1)))
    return PaddedBatches(1 - filled[0], 1 - filled[1], float(np.mean(flops)) / whole, float(slowest) / whole)


@dataclass(frozen=True)
class Times:
    """Seconds of a step: arithmetic and the host's part of one pack; packs of a GPU; sending, and what of it no
    backward pass hides; optimizer."""

    arithmetic: float
    host: float
    packs: int
    sending: float
    waiting: float
    optimizer: float

    @property
    def step(self) -> float:
        """All of it."""
        return self.packs * max(self.arithmetic, self.host) + self.waiting + self.optimizer


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends in a step: for each pack, and once."""

    each: float
    once: float
    seconds_each: float
    seconds_once: float


def sent(stage: Stage, lm: AudioLM, fsdp: bool) -> Sent:
    """By ring: (N - 1) / N of a tensor for a gathering or a reduce-scatter, twice that for an all-reduce. DDP reduces
    gradients in float32, by the network where there are several nodes. FSDP2 shares inside a node; its copies reduce
    their shards over the network."""
    f = stage.forecast
    world, parts = gpus(stage), min(gpus(stage), f.gpus_per_node)
    link, network = f.link_gb_s * 1e9, f.network_gb_s * 1e9
    g = footprint.gathered(lm)
    if not fsdp:
        once = 2 * (world - 1) / world * g.gradients
        return Sent(0.0, once, 0.0, once / (network if world > f.gpus_per_node else link))
    inside, copies = (parts - 1) / parts, max(1, world // parts)
    each, once = inside * 2 * g.blocks, inside * (g.root + g.gradients)
    across = 2 * (copies - 1) / copies * g.gradients / parts
    return Sent(each, once + across, each / link, once / link + across / network)


def times(stage: Stage, lm: AudioLM, c: Cost, grown: Growth, at: Course, fsdp: bool, slower: float = 0.0) -> Times:
    """Of a step of `at`; `slower`: FLOPs over useful ones, instead of those of its packs."""
    f = stage.forecast
    shape, s = at.shape, sent(stage, lm, fsdp)
    packs = -(-shape.packs_per_step // gpus(stage))
    flops = slower * sum(useful(c, at).values()) if slower else computed(c, at)
    arithmetic = flops / (f.peak_tflops * 1e12 * f.mfu)
    host = (
        grown.operations(shape.pack_frames, shape.pack_slots, len(at.rows) / at.packs, footprint.blocks_of(lm))
        * f.host_us
        / 1e6
    )
    learn = sum(p.numel() for p in lm.parameters() if p.requires_grad) / (min(gpus(stage), f.gpus_per_node) ** fsdp)
    pack_s = max(arithmetic, host)
    waiting = max(0.0, s.seconds_once - BACKWARD * pack_s) + packs * max(0.0, s.seconds_each - pack_s)
    sending = packs * s.seconds_each + s.seconds_once
    return Times(arithmetic, host, packs, sending, waiting, PASSES * learn / (f.memory_gb_s * 1e9))


def gpus(stage: Stage) -> int:
    """Of the run."""
    return stage.forecast.gpus or stage.hardware.devices * stage.hardware.nodes


def needs(held: Held, grown: Growth, lm: AudioLM, n_frames: float, slots: float, packs: int = 1) -> float:
    """Peak bytes of a step with packs of this size."""
    at = footprint.blocks_of(lm)
    return held.total + grown.bytes(n_frames, slots, at) + packs * grown.pack(n_frames, slots, at)


def largest(stage: Stage, held: Held, grown: Growth, lm: AudioLM, shape: Budget) -> tuple[int, int]:
    """(slots, frames) of the largest pack in the mix's proportion that fits; (0, 0) where none does."""
    limit, ratio = ALLOWED * stage.forecast.memory_gib * GIB, shape.pack_frames / shape.pack_slots
    low, high = 0, MOST_SLOTS // SLOT_UNIT
    while low < high:
        middle = (low + high + 1) // 2
        fits = needs(held, grown, lm, ratio * middle * SLOT_UNIT, middle * SLOT_UNIT) <= limit
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * SLOT_UNIT, round(ratio * low * SLOT_UNIT)


# -- in words ----------------------------------------------------------------------------------------------------------


def _n(number: float) -> str:
    """Three digits that count: 1,234 for a thousand, 5.13 M for millions."""
    for unit, of in (("G", 1e9), ("M", 1e6)):
        if abs(number) >= of:
            return f"{number / of:.4g} {unit}"
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def _gib(size: float) -> str:
    return f"{size / GIB:.3g}" if size < 100 * GIB else f"{size / GIB:.0f}"


def _share(part: float) -> str:
    return f"{100 * part:.1f} %"


class Page:
    """Lines of a stage, each with where it is from."""

    def __init__(self, title: str) -> None:
        self.lines = [title]

    def add(self, how: str, what: str, *values: str) -> None:
        """`values`: one, or a column each."""
        columns = values[0] if len(values) == 1 else "".join(f"{v:>26}" for v in values).rstrip()
        self.lines.append(f"  {how:2} {what:31} {columns}")

    def head(self, title: str, *columns: str) -> None:
        """A section."""
        self.lines.append(f" {title:35}" + "".join(f"{c:>26}" for c in columns))


def page(stage: Stage, scale: str) -> str:
    """The forecast of one stage as text. Raises UserError."""
    f = stage.forecast
    mix, corpora, indexed = known(stage)
    at = {kind: course(stage, mix, corpora, kind) for kind in (REPORT, THROUGHPUT)}
    lm = footprint.shaped(stage)
    c, fsdp = cost(lm), sum(p.numel() for p in lm.parameters() if p.requires_grad) > MANY and gpus(stage) > 1
    own = at[REPORT if stage.hardware.accelerator == "cpu" else THROUGHPUT]
    fits = variants(stage, own)
    grown = next(iter(fits.values()))
    out = Page(f"{stage.name} at {scale}: {gpus(stage)} x {f.device}")
    _data(out, stage, mix, corpora, indexed, at)
    _model(out, stage, lm)
    took = {kind: times(stage, lm, c, grown, course_, fsdp) for kind, course_ in at.items()}
    _batches(out, stage, lm, c, grown, at, took, fsdp)
    _memory(out, stage, lm, fits, own, c)
    _rest(out, stage, lm, corpora, at, took)
    _long(out, stage, lm, c, fits, fsdp)
    return "\n".join(out.lines)


def variants(stage: Stage, own: Course) -> dict[str, Growth]:
    """How a step grows as it is configured; with Liger's kernels on a GPU; with all that may be computed again."""
    hardware = stage.hardware
    more = [p for p in ("audio_encoder", "decoder") if trains(stage, p)]
    asked = {"as configured": hardware}
    if hardware.accelerator != "cpu" and not hardware.liger:
        asked["hardware.liger=true"] = dataclasses.replace(hardware, liger=True)
    if set(more) - set(hardware.recompute):
        asked[f"hardware.recompute=[{','.join(more)}]"] = dataclasses.replace(hardware, recompute=more)
    size, most = (own.shape.pack_frames, own.shape.pack_slots), own.sample
    if hardware.accelerator != "cpu":  # the variable-length kernel keeps as much of one segment as of many
        size, most = (size[0] // 2, size[1] // 2), dataclasses.replace(most, slots=MOST_SLOTS, frames=MOST_SLOTS)
    return {name: footprint.growth(dataclasses.replace(stage, hardware=h), most, *size) for name, h in asked.items()}


def _data(out: Page, stage: Stage, mix: Mix, corpora: Sequence[Corpus], indexed: int, at: dict[str, Course]) -> None:
    records, hours = sum(int(c.counts.sum()) for c in corpora), sum(c.summary.hours for c in corpora)
    how = "m" if indexed == len(corpora) else "a"
    rows = at[REPORT].rows[:, [SLOTS, FRAMES, TARGETS]].mean(0)
    out.head("data")
    out.add(
        how,
        f"mix {mix.name}",
        f"{len(corpora)} corpora, {indexed} by their index; {_n(records)} records, {_n(hours)} h",
    )
    where = "" if how == "m" else " (forecast.clip_*, *_slots)"
    out.add(
        how,
        "a mean sample",
        f"{frames.frame_seconds(rows[1]):.2f} s, {rows[0]:.1f} slots, {rows[2]:.1f} targets{where}",
    )


def _model(out: Page, stage: Stage, lm: AudioLM) -> None:
    totals = [0, 0]
    lora = f" (LoRA {','.join(stage.lora.targets)})" if stage.lora.targets else ""
    out.head("model")
    for part, module in lm.named_children():
        many = sum(p.numel() for p in module.parameters())
        learn = sum(p.numel() for p in module.parameters() if p.requires_grad)
        out.add("d", part, f"{many:>16,} parameters, {learn:>14,} learn{lora if part == 'decoder' else ''}")
        totals = [totals[0] + many, totals[1] + learn]
    out.add("d", "all", "{:>16,} parameters, {:>14,} learn".format(*totals))


def _batches(
    out: Page,
    stage: Stage,
    lm: AudioLM,
    c: Cost,
    grown: Growth,
    at: dict[str, Course],
    took: dict[str, Times],
    fsdp: bool,
) -> None:
    f, b, world = stage.forecast, stage.batch, gpus(stage)
    each = max(1, b.clips_per_step // b.packs_per_step)
    old = padded(c, at[REPORT], each, b.packs_per_step)
    both = list(at.values())
    done = [sum(useful(c, one).values()) for one in both]
    out.head("a step and the run", f"padded, {each} a GPU", *(f"batch.kind={one.kind}" for one in both))

    def add(how: str, what: str, first: str, values: Sequence[str]) -> None:
        out.add(how, what, first, *values)

    add("d", "clips a step", str(each * b.packs_per_step), [f"{one.clips:,.0f}" for one in both])
    add("d", "steps", "-", [f"{one.steps:,}" for one in both])
    add("d", "packs a step: slots x frames", "-",
        [f"{o.shape.packs_per_step}: {o.shape.pack_slots:,} x {o.shape.pack_frames:,}" for o in both])  # fmt: skip
    for number, what in enumerate(("slots that are padding", "frames that are padding")):
        add("d", what, _share((old.slots, old.frames)[number]), [_share(1 - one.fill[number]) for one in both])
    add(
        "d",
        "computed / useful FLOPs",
        f"{old.mean:.2f}",
        [f"{computed(c, o) / d:.3f}" for o, d in zip(both, done, strict=True)],
    )
    add("d", "the same, slowest of all GPUs", f"{old.slowest:.2f}", ["as all", "as all"])
    add("d", "useful TFLOP: a pack", "-", [f"{d / 1e12:.4g}" for d in done])
    totals = [d * o.shape.packs_per_step * o.steps for o, d in zip(both, done, strict=True)]
    add("d", "useful FLOPs of the run", "-", [f"{t:.3g}" for t in totals])
    runs = [took[o.kind] for o in both]
    add("a", f"arithmetic a pack, MFU {f.mfu:g}", "-", [f"{1e3 * t.arithmetic:.4g} ms" for t in runs])
    add("a", f"host a pack, {f.host_us:g} us an operation", "-", [f"{1e3 * t.host:.1f} ms" for t in runs])
    s = sent(stage, lm, fsdp)
    each_gb = [t.packs * s.each + s.once for t in runs]
    name = f"sent a step, {'FSDP2' if fsdp else 'DDP'}, GB a GPU"
    if world > 1:
        add("d", name, "-", [f"{g / 1e9:.3g}" for g in each_gb])
        add("a", f"sending at {f.link_gb_s:g}, {f.network_gb_s:g} GB/s", "-", [
            f"{1e3 * t.sending:.0f} ms, {1e3 * t.waiting:.0f} waits" for t in runs])  # fmt: skip
    add("a", "optimizer", "-", [f"{1e3 * t.optimizer:.1f} ms" for t in runs])
    add("a", "a step", "-", [f"{1e3 * t.step:.4g} ms ({t.packs} a GPU)" for t in runs])
    mfu = [d * t.packs / t.step / (f.peak_tflops * 1e12) for d, t in zip(done, runs, strict=True)]
    add("a", "useful MFU", "-", [f"{m:.3f}" for m in mfu])
    hours = [t.step * o.steps * world / 3600 for t, o in zip(runs, both, strict=True)]
    slow = times(stage, lm, c, grown, both[0], fsdp, old.slowest).step * both[0].steps * world / 3600
    add("a", "GPU-hours", _n(slow), [_n(h) for h in hours])
    add("a", "days", f"{slow / world / 24:.3g}", [f"{h / world / 24:.3g}" for h in hours])
    rates = [o.hours / h for o, h in zip(both, hours, strict=True)]
    add("a", "audio hours a GPU-hour", f"{both[0].hours / slow:,.0f}", [f"{r:,.0f}" for r in rates])
    if stage.data.manifests.endswith("report") and stage.name in PUBLISHED:
        rate, audio = PUBLISHED[stage.name]
        out.add(
            "m", "the report's run", f"{audio / rate:,.0f} GPU-hours, {rate:.0f} audio hours a GPU-hour, {_n(audio)} h"
        )


def _memory(out: Page, stage: Stage, lm: AudioLM, fits: dict[str, Growth], own: Course, c: Cost) -> None:
    f, world = stage.forecast, gpus(stage)
    parts = min(world, f.gpus_per_node)
    packs = -(-own.shape.packs_per_step // world)
    ddp = footprint.under_ddp(lm, stage.optim.name, world)
    shards = footprint.under_fsdp(lm, stage.optim.name, parts, packs) if world > 1 else ddp
    both = {"DDP" if world > 1 else "one process": ddp} | ({f"FSDP2 over {parts}": shards} if world > 1 else {})
    size = own.shape.pack_frames, own.shape.pack_slots
    out.head(f"memory of a GPU, GiB ({own.shape.pack_slots:,} slots)", *both)
    parts_of = {"weights": "weights", "gradients": "gradients", "optimizer": f"optimizer ({stage.optim.name})"}
    for name, what in (parts_of | {"sent": "gradients sent, or gathered"}).items():
        out.add("d", what, *(_gib(getattr(held, name)) for held in both.values()), "")
    at = footprint.blocks_of(lm)
    limit = ALLOWED * f.memory_gib
    for name, grown in fits.items():
        kept = [grown if held is ddp else grown.without_copies() for held in both.values()]
        out.add("d", f"activations {name}"[:31] if name == "as configured" else name.removeprefix("hardware.")[:31],
                *(_gib(g.bytes(*size, at) + packs * g.pack(*size, at)) for g in kept), "")  # fmt: skip
        all_of = [needs(held, g, lm, *size, packs) for held, g in zip(both.values(), kept, strict=True)]
        out.add(
            "d",
            f"  all (limit {limit:g})",
            *(f"{_gib(n)}{'' if n <= limit * GIB else ' TOO MUCH'}" for n in all_of),
            "",
        )
        found = [largest(stage, held, g, lm, own.shape) for held, g in zip(both.values(), kept, strict=True)]
        out.add("d", "  largest pack: slots x frames", *(f"{s:,} x {n:,}" if s else "none" for s, n in found), "")
    if not trains(stage, "decoder"):
        flops = useful(c, own)
        more = 0.5 * flops["decoder"] / sum(flops.values())
        out.add(
            "d",
            "decoder computed again",
            f"never: it is frozen; the step would cost {_share(more)} more; refused",
        )


def _rest(
    out: Page, stage: Stage, lm: AudioLM, corpora: Sequence[Corpus], at: dict[str, Course], took: dict[str, Times]
) -> None:
    f = stage.forecast
    stored = [c for c in corpora if isinstance(c, CorpusIndex)]
    size, how = f.bytes_per_audio_s, "a"
    hours: float = sum(c.summary.hours for c in stored)
    if len(stored) == len(corpora) and hours:
        size = sum(r.shard.size for c in stored for r in c.rows) / 3600 / hours
        how = "m"
    out.head("data and disk", *(f"batch.kind={kind}" for kind in at))
    seconds = [one.audio_s / took[kind].step for kind, one in at.items()]
    clips = [one.clips / took[kind].step for kind, one in at.items()]
    out.add(how, f"reading, {size / 1e3:.1f} kB a second", *(f"{r * size / 1e6:,.3g} MB/s" for r in seconds), "")
    cores = [(r * f.decode_ms + n * f.sample_ms) / 1e3 / gpus(stage) for r, n in zip(seconds, clips, strict=True)]
    out.add("a", "cores for loading, a GPU", *(f"{n:.2f}" for n in cores), "")
    ddp = footprint.under_ddp(lm, stage.optim.name, 1)
    learn = sum(p.numel() * p.element_size() for p in lm.parameters() if p.requires_grad)
    out.add(
        "d",
        "disk: a checkpoint",
        f"{(learn + ddp.optimizer) / 1e9:.2f} GB (what learns and its states; twice that while one is written)",
    )
    out.add("d", "disk: weights/ handed on", f"{ddp.weights / 1e9:.2f} GB")


def _long(out: Page, stage: Stage, lm: AudioLM, c: Cost, fits: dict[str, Growth], fsdp: bool) -> None:
    f, world = stage.forecast, gpus(stage)
    n_frames = frames.frames(LONG_S * frames.SAMPLE_RATE)
    slots = frames.audio_tokens(LONG_S * frames.SAMPLE_RATE) + f.prompt_slots + f.answer_slots
    slots = -(-slots // SLOT_UNIT) * SLOT_UNIT
    held = footprint.under_ddp(lm, stage.optim.name, world)
    if fsdp:
        held = footprint.under_fsdp(lm, stage.optim.name, min(world, f.gpus_per_node), 1)
    limit = ALLOWED * f.memory_gib * GIB
    flops = sum(_samples(c, *np.array([[slots], [n_frames], [f.answer_slots]], dtype=np.float64)).values())
    out.head("a clip of 15 minutes")
    out.add("d", "in one piece, alone in a pack", f"{n_frames:,} frames, {slots:,} slots, {flops / 1e12:.3g} TFLOP")
    for name, grown in fits.items():
        size = needs(held, grown.without_copies() if fsdp else grown, lm, n_frames, slots)
        verdict = "fits" if size <= limit else f"above {_gib(limit)}"
        out.add(
            "d",
            f"  {name.removeprefix('hardware.')}"[:31],
            f"{_gib(size)} GiB under {'FSDP2' if fsdp else 'DDP'}: {verdict}",
        )
    out.add(
        "d",
        "  write",
        f"data.max_audio_s={LONG_S} batch.kind=throughput batch.pack_slots={slots} batch.pack_frames={n_frames}",
    )
