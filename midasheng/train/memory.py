"""How much memory a pack takes: a few packs are tried before step 0, a line through them says how large one may be."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from midasheng import config, frames
from midasheng.config import AUTO, FSDP, ConfigError, Stage, UserError
from midasheng.data.plan import SLOT_UNIT, Budget, Planner
from midasheng.data.room import Sources
from midasheng.model.audio_lm import AudioLM
from midasheng.sample import NO_TARGET, Pack, Sample, pack
from midasheng.train import optim, sharded
from midasheng.train.adam8bit import local
from midasheng.train.order import Order
from midasheng.train.world import World

ALLOWED = 0.9  # of the memory: allocators fragment it, and libraries keep workspaces of their own
TRIED = ((0.25, 0.25), (0.25, 0.5), (0.375, 0.375), (0.5, 0.5))  # (frames, slots) as parts of a full pack
LEAST_TRIED = 2048  # slots of a full pack, where its size is to be found
LOOK = 8  # steps of the plan whose packs say how many targets there are
MOST_UNITS, MOST_PACKS = 2**12, 2**12  # of slots, packs of a step: beyond them nothing is proposed
GIB = 2**30
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


# -- measuring ---------------------------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Bytes of the storages that are born while it is on and not yet dead, and their peak; views share a storage. One
    that is resized (FSDP2 keeps what it gathers in storages that it empties) counts as it is, less what it was before.
    Raises MemoryError above `limit`: a CPU's memory has no end that one may try."""

    def __init__(self, limit: float = math.inf) -> None:
        super().__init__()
        self.limit, self.bytes, self.peak, self.operations = limit, 0, 0, 0
        self.met: dict[int, weakref.ref[torch.UntypedStorage]] = {}  # a storage's object lives as long as it does
        self.counted: dict[int, int] = {}  # bytes of each

    def __enter__(self) -> Live:
        self._resize = resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:  # no operation that is dispatched
            before, out = storage.nbytes(), resize(storage, size)
            self._add(storage, storage.nbytes() - before)
            return out

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # tensors without content are asked for it all the time
            return func(*args)
        if any(kind is DTensor for kind in types):  # it has no memory; its operations on the shard come here again
            return NotImplemented
        self.operations += 1
        for tensor in tree_leaves((args, kwargs)):
            self._meet(tensor, born=False)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            self._meet(tensor, born=True)
        return out

    def _meet(self, tensor: object, *, born: bool) -> None:
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        if id(storage) not in self.met:
            self._add(storage, storage.nbytes() if born else 0)

    def _add(self, storage: torch.UntypedStorage, size: int) -> None:
        number = id(storage)

        def gone(_: object) -> None:
            del self.met[number]
            self.bytes -= self.counted.pop(number)

        if number not in self.met:
            self.met[number], self.counted[number] = weakref.ref(storage, gone), 0
        self.counted[number] += size
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        if self.bytes > self.limit:
            raise MemoryError(f"live tensors take {self.bytes} bytes, allowed are {self.limit:.0f}")


def peak_bytes(run: Callable[[], object], device: torch.device | str = "cpu", limit: float = math.inf) -> int:
    """The most that live tensors grow by while `run` runs, in bytes; on a GPU, by the allocator's own count. Raises
    out-of-memory errors: beyond `limit` bytes on a CPU, on a GPU where its memory ends."""
    if torch.device(device).type != "cuda":
        with Live(limit) as live:
            run()
        return live.peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def size_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of tensors on this rank, what they share counted once."""
    storages = [local(t).untyped_storage() for t in tensors]
    return sum({s._cdata: s.nbytes() for s in storages}.values())


# -- a pack that costs most --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dearest:
    """The largest that a mix has: slots and frames of one sample, share of the slots of a pack's samples that are
    targets; `lead`: the slots that stand once in a pack, beside those of its samples."""

    slots: int
    frames: int
    targets: float
    lead: int = 0


def dearest(sources: Sources, planner: Planner) -> Dearest:
    """What packs are to be tried with. `planner` is at its beginning and is used up."""
    slots, n_frames = sources.most(planner.budget.lead)
    packs = [chosen for step in islice(planner, LOOK) for chosen in step.packs]
    share = max(sum(s.targets for s in chosen) for chosen in packs) / planner.budget.own_slots
    return Dearest(slots, n_frames, share, planner.budget.lead_slots)


def full_pack(n_frames: int, slots: int, most: Dearest, vocabulary: int) -> Pack:
    """A pack of noise without any room left, in as few conversations as the dearest sample allows."""
    lead = min(most.lead, slots - 1)
    left = slots - lead
    many = max(1, -(-left // max(1, most.slots)), -(-n_frames // max(1, most.frames)))
    if lead:  # each has a slot of its own
        many = min(many, left)
    draw = np.random.default_rng(0)
    begin = draw.integers(0, vocabulary, lead)
    samples = []
    for i in range(many):
        own = left * (i + 1) // many - left * i // many
        heard = n_frames * (i + 1) // many - n_frames * i // many
        heard = min(heard, max(0, own - 2) * frames.STACK + frames.STACK - 1)
        tokens = heard // frames.STACK
        clips = [0.1 * draw.standard_normal(frames.most_samples(heard), dtype=np.float32)] if tokens else []
        place = np.arange(-lead, own)
        is_audio = (place >= 0) & (place < tokens)
        targets = min(round(own * most.targets), own - tokens)
        labels = np.where(place < own - targets, NO_TARGET, draw.integers(0, vocabulary, lead + own))
        ids = np.concatenate([begin, draw.integers(0, vocabulary, own)])
        samples.append(Sample("tried", f"tried{i}", "tried", ids, labels, is_audio, tuple(clips)))
    return pack(samples, slots, 0, None, n_frames, lead)


# -- what a pack takes -------------------------------------------------------------------------------------------------


class Fit(NamedTuple):
    """Lines in (1, frames, slots) of a full pack: peak bytes of a step beside the packs that lie ready, and bytes of
    such a pack; `residual`: of the tried pack that the first misses most."""

    step: NDArray[np.float64]
    loaded: NDArray[np.float64]
    residual: float


class Memory:
    """Steps of one process on its device. `packs`: how many of a step it runs; `world`: processes.

    Where ranks share the model (FSDP2), all of them do the same in here, and each number is that of the rank that needs
    most, or may take least: so they come to the same end.
    """

    def __init__(self, lm: AudioLM, stage: Stage, device: torch.device, most: Dearest, packs: int, world: int) -> None:
        self.lm, self.device, self.most, self.packs, self.world = lm, device, most, packs, world
        self.shared = bool(sharded.groups(lm))
        self.limit = -self._most(-allowed(stage, device))[0]
        self.learn = [p for p in lm.parameters() if p.requires_grad]
        # the first pack of a step makes the gradients, the others find them: whole, also where a rank keeps a part
        self.gradients = sum(p.nbytes for p in self.learn)
        mine = sum(local(p).nbytes for p in self.learn)
        # DDP keeps a copy of them to send
        self.beside = optim.state_bytes(self.learn, stage.optim.name)
        self.beside += mine if world > 1 and not self.shared else 0
        state = size_of([*lm.parameters(), *lm.buffers()]) + mine + self.beside
        self.before = state - (0 if packs > 1 and not self.shared else mine)  # of what `tried` runs
        self.state = int(self._most(state)[0])

    def _most(self, *numbers: float) -> list[float]:
        return sharded.most(numbers, self.device) if self.shared else list(numbers)

    def step(self, n_frames: int, slots: int) -> int:
        """Peak bytes of a step whose packs are full, by running one forward and backward."""
        pack, loaded = self.tried(n_frames, slots)
        return pack + self.packs * loaded

    def tried(self, n_frames: int, slots: int) -> tuple[int, int]:
        """(peak bytes of a step beside the packs that lie ready, bytes of such a pack). Leaves no trace: gradients,
        modes and random generators are as they were."""
        row = full_pack(n_frames, slots, self.most, self.lm.decoder.config.vocab_size)
        loaded = size_of([t for t in vars(row).values() if isinstance(t, Tensor)])
        row = row.to(self.device)
        found = [p.grad for p in self.learn]
        modes = [(module, module.training) for module in self.lm.modules()]
        devices = [self.device] if self.device.type == "cuda" else []
        # compiled, blocks would be compiled for every size that is tried
        with torch.random.fork_rng(devices), torch.compiler.set_stance("force_eager"):
            try:
                self.lm.train()
                for p in self.learn:
                    p.grad = torch.zeros_like(p) if self.packs > 1 and not self.shared else None
                grown = peak_bytes(lambda: self._passes(row), self.device)
                took = self._most(self.before + grown, loaded)
                return int(took[0]), int(took[1])
            finally:
                for p, gradient in zip(self.learn, found, strict=True):
                    p.grad = gradient
                for module, mode in modes:
                    module.training = mode

    def _passes(self, row: Pack) -> None:
        """Forward and backward of a step's last pack. Behind another one whose gradients stay whole until then, where
        ranks share the model: only FSDP2 itself can put them there."""
        for last in (False, True) if self.packs > 1 and self.shared else (True,):
            sharded.sync(self.lm, last)
            self.lm(row).sum().backward()

    def fit(self, shape: Budget) -> Fit:
        """Try parts of a full pack and fit them."""
        sizes = [(int(shape.pack_frames * f), max(1, int(shape.pack_slots * s))) for f, s in TRIED]
        self.tried(*sizes[0])  # tables and workspaces that stay
        took = np.array([self.tried(*size) for size in sizes], dtype=np.float64)
        known = np.array([(1.0, *size) for size in sizes])
        found = np.linalg.lstsq(known, took, rcond=None)[0]
        return Fit(found[:, 0], found[:, 1], float(np.abs(known @ found - took)[:, 0].max()))

    def needs(self, fit: Fit, shape: Budget) -> float:
        """Peak bytes of a step by the fit, its residual on top; also with another number of packs."""
        packs = -(-shape.packs_per_step // self.world)
        full = float((fit.step + packs * fit.loaded) @ (1, shape.pack_frames, shape.pack_slots))
        return full + fit.residual + (self.gradients if packs > 1 and self.packs == 1 else 0)

    def largest(self, fit: Fit, stage: Stage, shape: Budget, limit: float) -> Budget | None:
        """The largest budget that fits among those a user could choose instead of `shape`: other slots of a pack, or
        (kind report, where the slots of a step are given) another number of packs. None where none does."""
        report = stage.batch.kind == "report"
        low, high = 0, MOST_PACKS if report else MOST_UNITS

        def choice(number: int) -> Budget:  # from small to large
            packs = MOST_PACKS + 1 - number if report else shape.packs_per_step
            once = shape.lead_slots
            slots = once - (-shape.own_slots * shape.packs_per_step // packs) if report else number * SLOT_UNIT
            n_frames = -(-max(0, slots - once) * shape.pack_frames // shape.own_slots)
            return dataclasses.replace(
                shape, pack_slots=slots, pack_frames=stage.batch.pack_frames or n_frames, packs_per_step=packs
            )

        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.needs(fit, choice(middle)) <= limit else (low, middle - 1)
        return choice(low) if low else None

    def worst(self, shape: Budget) -> int:
        """Peak bytes of a full pack, run with all that will stand beside it. Raises out-of-memory errors."""
        ballast = torch.empty(self.beside if self.device.type == "cuda" else 0, dtype=torch.uint8, device=self.device)
        try:
            return self.step(shape.pack_frames, shape.pack_slots)
        finally:
            del ballast


# -- a run -------------------------------------------------------------------------------------------------------------


def device_of(stage: Stage) -> torch.device:
    """The device that this process will train on."""
    if stage.hardware.accelerator != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def allowed(stage: Stage, device: torch.device) -> float:
    """Bytes that a step may take; 0 where the memory is not known."""
    total = stage.hardware.memory_gib * GIB
    if not total and device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
    return ALLOWED * total


@contextlib.contextmanager
def measured(lm: AudioLM, order: Order, sources: Sources, shape: Budget, ranks: World) -> Iterator[Memory]:
    """`lm` on its device for as long as the context lasts; out of memory is a UserError. One without content is shared:
    every rank comes here, and one that fails ends the others as at any other place."""
    stage, device = order.stage, device_of(order.stage)
    world = stage.hardware.devices * stage.hardware.nodes
    most = dearest(sources, Planner(sources.corpora, sources.mix.percent, shape, stage.run.seed))
    shared = sharded.chosen(stage.hardware, lm) == FSDP
    try:
        if shared:
            gc.collect()  # one whose trial failed: FSDP2's hooks hold it in circles
            ranks.alike({"pack to try": f"{shape.pack_slots} slots, {shape.pack_frames} frames, {most}"})
            sharded.join(device, world)
            sharded.blank(lm, device, stage.hardware.shard)
        else:
            lm.to(device)
        yield Memory(lm, stage, device, most, -(-shape.packs_per_step // world), world)
        if shared:
            lm.to_empty(device="meta")
    except OUT_OF_MEMORY as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{_budget(shape)}: out of memory ({first}); {remedy(order, shape, None)}") from None
    finally:
        if not shared:
            lm.to("cpu")
        if device.type == "cuda":
            torch.cuda.empty_cache()


def pack_slots(order: Order, sources: Sources, measurable: Callable[[], AudioLM], ranks: World, kind: str) -> Order:
    """The order with a number for batch.pack_slots=auto: that of the run folder; for a new run, what memory allows on
    the first process, or on each of those that share the model. `measurable`: as in `check`; `kind`: of strategy.
    Raises UserError."""
    stage, saved = order.stage, order.folder / "config.yaml"
    if stage.batch.pack_slots != AUTO:
        return order

    def kept() -> Any:
        return config.saved(saved)["batch.pack_slots"] if saved.is_file() and not order.fresh else None

    def found() -> int:
        if not allowed(stage, device_of(stage)):
            raise ConfigError(f"batch.pack_slots={AUTO}: on a CPU say how much there is: hardware.memory_gib=...")
        shape = sources.shape(stage, LEAST_TRIED)
        with measured(measurable(), order, sources, shape, ranks) as memory:
            for _ in range(2):  # the second time near what is asked
                fits = memory.largest(memory.fit(shape), stage, shape, memory.limit)
                if fits is None:
                    told = _too_much(order, shape, memory.state, memory.limit, None)
                    raise UserError(f"batch.pack_slots={AUTO}: {told}")
                shape = fits
        return shape.pack_slots

    if kind == FSDP:
        slots = ranks.of_first("the size of a pack", kept) or found()
    else:
        slots = ranks.of_first("the size of a pack", lambda: kept() or found())
    batch = dataclasses.replace(stage.batch, pack_slots=slots)
    origin = order.loaded.origin | {"batch.pack_slots": f"{AUTO}: what memory allowed"}
    return dataclasses.replace(order, loaded=config.Loaded(dataclasses.replace(stage, batch=batch), origin))


def check(order: Order, lm: AudioLM, sources: Sources, shape: Budget, ranks: World) -> list[str]:
    """Fit, compare, run the worst pack: lines for the header of the run. Where the memory is not known the worst pack
    is run all the same: what fails in it fails before step 0. `lm`: where ranks share the model, one without content,
    and every rank comes here. Raises UserError where a step of this run does not fit.
    """
    stage = order.stage
    with measured(lm, order, sources, shape, ranks) as memory:
        limit = memory.limit
        if not limit:
            took = memory.worst(shape)
            return [
                f"  memory: a step takes {took / GIB:.4g} GiB with the worst pack, which was run once, of it "
                f"{memory.state / GIB:.4g} state; how much there is is not known (hardware.memory_gib)"
            ]
        fit = memory.fit(shape)
        needs = memory.needs(fit, shape)
        fits = memory.largest(fit, stage, shape, limit)
        if needs > limit:
            raise UserError(_too_much(order, shape, needs, limit, fits))
        took = memory.worst(shape)
        if took > limit:
            raise UserError(_too_much(order, shape, took, limit, fits))
    return [
        f"  memory: a step takes {took / GIB:.4g} GiB with the worst pack, which was run once, of it "
        f"{memory.state / GIB:.4g} state; {_limit(limit)}",
        f"  memory: {needs / GIB:.4g} GiB by a fit of {len(TRIED)} smaller packs (off by "
        f"{fit.residual / GIB:.4g} at most); the largest that fits: {_budget(fits) if fits else 'none'}",
    ]


# -- in words ----------------------------------------------------------------------------------------------------------


def _budget(shape: Budget) -> str:
    return f"packs of {shape.pack_slots} slots and {shape.pack_frames} frames"


def _limit(limit: float) -> str:
    return f"allowed are {limit / GIB:.4g} ({100 * ALLOWED:.0f} % of {limit / ALLOWED / GIB:.4g})"


def _too_much(order: Order, shape: Budget, needs: float, limit: float, fits: Budget | None) -> str:
    return (
        f"{_budget(shape)}: a step takes {needs / GIB:.4g} GiB of memory, {_limit(limit)}; {remedy(order, shape, fits)}"
    )


def remedy(order: Order, shape: Budget, fits: Budget | None) -> str:
    """What to write when a pack takes too much. A run that has begun keeps its packs."""
    stage = order.stage
    if stage.batch.kind == "report":
        write = [f"batch.packs_per_step={fits.packs_per_step if fits else 2 * shape.packs_per_step}"]
    else:
        write = [f"batch.pack_slots={fits.pack_slots if fits else shape.pack_slots // 2}"]
    if (order.folder / "config.yaml").is_file() and not order.fresh:
        write = [f"NAME=... for another run with {write[0]}"]
    parts = [p for p in ("audio_encoder", "decoder") if any(g.startswith((p, "*")) for g in stage.train)]
    if more := [p for p in parts if p not in stage.hardware.recompute]:
        write.append(f"hardware.recompute=[{','.join([*stage.hardware.recompute, *more])}]")
    found = f"{_budget(fits)} would fit" if fits else "no pack is known to fit"
    return f"{found}; write {' or '.join(write)}"
