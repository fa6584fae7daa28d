"""What a stage takes of a GPU's memory, by part, from shapes alone: no weights, no GPU.

A step runs for real but on tensors without content (torch's fake tensors), whose bytes are counted as live ones are in
memory.py. Two or three blocks of each tower are enough: every phase of a step grows by the same bytes with each further
block, frame and slot, and what a step takes is its largest phase.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from midasheng import frames
from midasheng.config import VARLEN, Stage
from midasheng.model import adapt, attention, kernels
from midasheng.model.audio_lm import AudioLM
from midasheng.model.encoder import EncoderShape, LogMel
from midasheng.sample import Pack
from midasheng.train import optim, sharded
from midasheng.train.memory import Dearest, Live, full_pack, size_of

FEW = 2  # blocks of a tower in the smallest model that is tried
FULL, HALF = 4, 2  # bytes


# -- a model without content -------------------------------------------------------------------------------------------


def shaped(stage: Stage, blocks: tuple[int, int] | None = None) -> AudioLM:
    """The stage's model on the meta device, frozen, adapted and in the dtypes that it will have; `blocks`: of encoder
    and decoder, instead of its own."""
    e, d = stage.model.encoder, stage.model.decoder
    fields = dict(d.fields)
    if blocks:
        fields |= {"num_hidden_layers": blocks[1]}
    with torch.device("meta"):
        lm = AudioLM(EncoderShape(e.dim, blocks[0] if blocks else e.depth, e.heads), d.architecture, fields)
    adapt.freeze_all_but(lm, stage.train)
    if stage.lora.targets:
        adapt.add_lora(
            lm, adapt.LoraPlan(tuple(stage.lora.targets), stage.lora.rank, stage.lora.alpha, stage.lora.dropout), 0
        )
    lm.recompute(stage.hardware.recompute)
    adapt.set_precision(lm, stage.run.precision)
    return lm


def blocks_of(lm: AudioLM) -> tuple[int, int]:
    """Blocks of encoder and decoder."""
    return len(lm.audio_encoder.blocks), len(lm.decoder.model.layers)


def _imagined(lm: AudioLM, mode: FakeTensorMode) -> None:
    """Fake CPU tensors in place of those on the meta device, which autocast does not know."""
    lm.audio_encoder.log_mel.tables(torch.device("cpu"))  # torchaudio looks into them
    made: dict[int, nn.Parameter] = {}
    kept = []  # ids stay taken
    with mode:
        for module in lm.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                if id(p) not in made:
                    kept.append(p)
                    made[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
                setattr(module, name, made[id(p)])
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    lm.decoder.tie()


# -- what a GPU's kernels keep, where a CPU's keep something else ------------------------------------------------------


def _dropped(self: Any, x: Tensor) -> Tensor:
    """Dropout with a byte a number; a CPU's keeps its input and what it multiplied it by."""
    return torch.native_dropout(x, self.p, True)[0] if self.training and self.p else x


class _Norm(torch.autograd.Function):
    """Keeps what Liger's RMSNorm keeps: its input and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, torch.empty(x.shape[:-1]))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor | None]:
        weight = ctx.saved_tensors[1]
        return torch.empty_like(slope), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


class _SwiGlu(torch.autograd.Function):
    """Keeps what Liger's keeps, gate and up, and writes their gradients in their place."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return gate, up


def _as_liger(lm: AudioLM) -> None:
    """Stand-ins for Liger's kernels, which no tensor without content can run, in the modules that `fuse` gives them."""
    kernels.fuse(lm.decoder.model)
    for module in lm.decoder.model.modules():
        if "forward" not in vars(module) or isinstance(module, nn.Dropout):
            continue
        if hasattr(module, "gate_proj"):
            module.forward = MethodType(
                lambda self, x: self.down_proj(_SwiGlu.apply(self.gate_proj(x), self.up_proj(x))), module
            )
        else:
            module.forward = MethodType(
                lambda self, x: _Norm.apply(x.to(torch.promote_types(x.dtype, self.weight.dtype)), self.weight), module
            )


# -- a step ------------------------------------------------------------------------------------------------------------


@contextmanager
def _kernel(stage: Stage) -> Iterator[None]:
    """Inside, the kernel that the run would have; outside what the config asks for."""
    if stage.hardware.accelerator != "cpu" and stage.run.precision == "bf16":
        attention.ask(VARLEN)
    try:
        yield
    finally:
        attention.ask(stage.hardware.attention)


@dataclass(frozen=True)
class Tried:
    """A step of one pack: the most live bytes beside the weights in each phase (encoder and decoder forward, head,
    decoder backward, encoder backward), bytes of the pack, and operations that were started."""

    phases: tuple[int, ...]
    pack: int
    operations: int


def _run(lm: AudioLM, row: Pack) -> Tried:
    """One forward and backward, with gradients that are there already as behind a step's first pack."""
    learn = [p for p in lm.parameters() if p.requires_grad]
    peaks: list[int] = []
    with Live() as live:

        def phase(*_: object) -> None:
            peaks.append(live.peak)
            live.peak = live.bytes

        def heard(_module: object, _args: object, tokens_KD: Tensor) -> None:
            tokens_KD.register_hook(phase)

        handle = lm.audio_projector.register_forward_hook(heard)
        for p in learn:
            p.grad = torch.zeros_like(p)
        gradients, operations = live.bytes, live.operations
        live.peak = live.bytes
        hidden_TD = lm.hidden(row)
        phase()
        losses_N = lm.target_losses(hidden_TD, row)
        del hidden_TD
        phase()
        losses_N.sum().backward()
        phase()
        handle.remove()
    for p in learn:
        p.grad = None
    assert len(peaks) == 4, f"{len(peaks)} phases: does a gradient reach the projector once?"
    loaded = size_of([t for t in vars(row).values() if isinstance(t, Tensor)])
    return Tried(tuple(peak - gradients for peak in peaks), loaded, live.operations - operations)


@dataclass(frozen=True)
class Growth:
    """A step as lines in (1, frames, slots, blocks of the encoder, of the decoder, frames x blocks, slots x blocks),
    one of each row: phases, then bytes of the pack, then operations."""

    lines: NDArray[np.float64]  # (6, 7)
    clip: int  # operations of a clip's spectrum, beside the others

    def _at(self, n_frames: float, slots: float, blocks: tuple[int, int]) -> NDArray[np.float64]:
        e, d = blocks
        found: NDArray[np.float64] = self.lines @ (1, n_frames, slots, e, d, n_frames * e, slots * d)
        return found

    def bytes(self, n_frames: float, slots: float, blocks: tuple[int, int]) -> float:
        """Most live bytes beside weights, gradients and optimizer."""
        return float(self._at(n_frames, slots, blocks)[:4].max())

    def pack(self, n_frames: float, slots: float, blocks: tuple[int, int]) -> float:
        """Bytes of a pack that lies ready."""
        return float(self._at(n_frames, slots, blocks)[4])

    def operations(self, n_frames: float, slots: float, clips: float, blocks: tuple[int, int]) -> float:
        """Operations of a pack, forward and backward."""
        return float(self._at(n_frames, slots, blocks)[5]) + self.clip * clips

    def without_copies(self) -> Growth:
        """Under FSDP2 blocks are gathered in the dtype they compute in: autocast keeps no copies of their weights."""
        lines = self.lines.copy()
        lines[:4, 3:5] = 0
        return Growth(lines, self.clip)


def growth(stage: Stage, most: Dearest, n_frames: int, slots: int) -> Growth:
    """How a step grows around packs of half and whole `n_frames` and `slots`, filled as `full_pack` does with `most`;
    on a CPU as the run itself computes there, else as on a GPU."""
    gpu = stage.hardware.accelerator != "cpu"
    half, whole = (n_frames // 2, slots // 2), (n_frames, slots)
    other_frames, other_slots = (whole[0], half[1]), (half[0], whole[1])
    sizes = {
        (FEW, FEW): (half, other_frames, other_slots), (FEW + 1, FEW): (half, other_frames),
        (FEW, FEW + 1): (half, other_slots),
    }  # fmt: skip
    vocabulary = int(shaped(stage, (1, 1)).decoder.config.vocab_size)
    rows = {size: full_pack(*size, most, vocabulary) for size in (half, other_frames, other_slots)}
    with Live() as live:  # spectra are made clip by clip
        LogMel()(torch.zeros(frames.SAMPLE_RATE))
    known, found = [], []
    for (e, d), asked in sizes.items():
        lm, mode = shaped(stage, (e, d)), FakeTensorMode(allow_non_fake_inputs=True)
        _imagined(lm, mode)
        if gpu:
            for module in lm.modules():
                if isinstance(module, nn.Dropout):
                    module.forward = MethodType(_dropped, module)  # type: ignore[method-assign]
            if stage.hardware.liger:
                _as_liger(lm)
        lm.train()
        with _kernel(stage), mode, torch.compiler.set_stance("force_eager"), torch.random.fork_rng([]):
            for size in asked:
                tried = _run(lm, rows[size])
                f, s = size
                known.append((1.0, f, s, e, d, f * e, s * d))
                found.append((*tried.phases, tried.pack, tried.operations - live.operations * len(rows[size].clips)))
    lines = np.linalg.solve(np.array(known, dtype=np.float64), np.array(found, dtype=np.float64)).T
    return Growth(lines, live.operations)


# -- what a rank holds -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """Bytes that a rank holds all the time; `sent`: DDP's copy of the gradients, or what FSDP2 holds gathered."""

    weights: int
    gradients: int
    optimizer: int
    sent: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.sent


def shard_bytes(lm: AudioLM, name: str, parts: int, part: int = 0) -> Held:
    """What rank `part` of `parts` holds of weights, gradients and states of optimizer `name` under FSDP2, each tensor
    cut in rows. Whether a state is 8-bit is decided by the whole tensor; blocks of 256 are the shard's."""
    weights = gradients = states = 0
    eight_bit = False
    for p in lm.parameters():
        first, last = sharded.rows(p.shape[0], parts, part)
        n = (last - first) * math.prod(p.shape[1:])
        weights += n * p.element_size()
        if not p.requires_grad:
            continue
        gradients += n * FULL
        if name == "adamw":
            states += 2 * n * p.element_size() + 4
        elif p.numel() < adapt.LARGE:
            states += 2 * n * FULL
        else:
            states += 2 * (n + FULL * -(-n // 256))
            eight_bit = True
    return Held(weights, gradients, states + eight_bit * 2 * 256 * FULL)


def under_ddp(lm: AudioLM, name: str, world: int) -> Held:
    """What each rank holds with all of the model."""
    learn = [p for p in lm.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in learn)
    weights = size_of([*lm.parameters(), *lm.buffers()])
    return Held(weights, gradients, optim.state_bytes(learn, name), gradients if world > 1 else 0)


@dataclass(frozen=True)
class Gathered:
    """What FSDP2 sends for one pack, in bytes of whole tensors: blocks in the dtype they compute in, the root's tensors
    as they are kept (both towers' ends, embedding, head), gradients in float32."""

    blocks: int
    largest: int  # block
    largest_learns: int  # parameters of that block that learn
    root: int
    gradients: int
    root_gradients: int


def gathered(lm: AudioLM) -> Gathered:
    """From the model's shapes."""
    own = HALF if lm.compute_dtype is not None else FULL
    sizes, ids = [], set[int]()
    for block in [*lm.audio_encoder.blocks, *lm.decoder.model.layers]:
        parameters = list(block.parameters())
        ids |= {id(p) for p in parameters}
        sizes.append((own * sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)))
    rest = [p for p in lm.parameters() if id(p) not in ids]
    learn = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    root_learns = sum(p.numel() for p in rest if p.requires_grad)
    return Gathered(
        sum(size for size, _ in sizes), *max(sizes), sum(p.numel() * p.element_size() for p in rest), FULL * learn,
        FULL * root_learns,
    )  # fmt: skip


def under_fsdp(lm: AudioLM, name: str, parts: int, packs: int) -> Held:
    """The fullest rank of those that share one copy: its shards, and gathered the root's tensors with their gradients,
    two blocks (one is computed, the next is on its way) and a block's gradients before and in the reduction. Where a
    rank runs several `packs` a step, gradients stay whole until the last of them."""
    held, sent = shard_bytes(lm, name, parts), gathered(lm)
    whole = sent.gradients if packs > 1 else sent.root_gradients + (FULL + HALF) * sent.largest_learns
    return dataclasses.replace(held, sent=sent.root + 2 * sent.largest + whole)
