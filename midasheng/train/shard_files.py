"""Shards of a training state on disk: each rank writes what lies on it, any number of ranks reads what it needs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bitsandbytes.optim.optimizer import Optimizer2State
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from midasheng.config import UserError
from midasheng.model.sources import sha256_file
from midasheng.train.adam8bit import BLOCK, CODES, SCALES, TABLES, local, quantised, values
from midasheng.train.sharded import COPIES, SHARDS, cut, here, of_all

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
PREFIX = "shards-"


class ShardError(UserError):
    """Shards that cannot be read, or do not fit the run."""


class Piece(NamedTuple):
    """Elements `start` to `stop` of a flattened tensor, and how to read some of what is kept of them: key, first and
    last + 1 counted from the piece's own beginning, in its own units (SCALES: blocks)."""

    start: int
    stop: int
    read: Callable[[str, int, int], Tensor]


class Saved(NamedTuple):
    """Of each tensor that learns its pieces, end to end, and the optimizer's steps."""

    where: str
    pieces: dict[str, list[Piece]]
    steps: dict[str, int]

    def elements(self, name: str, key: str, start: int, stop: int) -> Tensor:
        """What is kept of elements `start` to `stop` of the flattened tensor."""
        found = [
            p.read(key, max(start, p.start) - p.start, min(stop, p.stop) - p.start)
            for p in self._over(name, start, stop)
        ]
        return torch.cat(found) if found else torch.empty(0)

    def eight_bit(self, name: str, number: int, start: int, stop: int, table: Tensor) -> tuple[Tensor, Tensor]:
        """(codes, scales) of one of the two moments. As they were saved where blocks are the same; else what they stand
        for is quantised anew, in blocks that begin at `start`."""
        codes, scales = CODES[number], SCALES[number]
        over = self._over(name, start, stop)
        if start % BLOCK == 0 and all(p.start % BLOCK == 0 for p in over):
            blocks = [
                p.read(scales, (max(start, p.start) - p.start) // BLOCK, -(-(min(stop, p.stop) - p.start) // BLOCK))
                for p in over
            ]
            return self.elements(name, codes, start, stop), torch.cat(blocks) if blocks else torch.empty(0)
        found = []
        for p in over:
            whole = values(
                p.read(codes, 0, p.stop - p.start), p.read(scales, 0, -(-(p.stop - p.start) // BLOCK)), table
            )
            found.append(whole[max(start, p.start) - p.start : min(stop, p.stop) - p.start])
        return quantised(torch.cat(found), table)

    def _over(self, name: str, start: int, stop: int) -> list[Piece]:
        return [p for p in self.pieces[name] if p.start < stop and start < p.stop]


# -- writing -----------------------------------------------------------------------------------------------------------


def kept(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor, dict[str, Tensor], int]]:
    """(name, parameter, what is kept of it on this rank, the optimizer's step) of each parameter that learns."""
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        state = optimizer.state[p]
        tensors = {key: local(state[key]) for key in (*MOMENTS, *CODES, *SCALES) if key in state}
        yield name, p, {WEIGHT: local(p), **tensors}, int(state.get("step", 0))  # 0: no step was taken yet


class Mine(NamedTuple):
    """What lies on this rank, copied to the host, as its file takes it."""

    file: str
    tensors: dict[str, Tensor]
    about: dict[str, str]


def mine(model: nn.Module, optimizer: torch.optim.Optimizer) -> Mine | None:
    """What this rank has to write; None where a rank of another copy of the model writes the same."""
    mesh = next(p.device_mesh for p in model.parameters() if isinstance(p, DTensor))
    if COPIES in (mesh.mesh_dim_names or ()) and mesh.get_local_rank(COPIES):
        return None
    tensors: dict[str, Tensor] = {}
    cuts, steps = {}, {}
    for name, p, state, step in kept(model, optimizer):
        # a copy: the next step changes what lies there while this is being written
        tensors |= {f"{key}/{name}": t.flatten().to("cpu", copy=True) for key, t in state.items()}
        cuts[name], steps[name] = (*cut(p), p.numel()), step
    number, of = mesh.get_local_rank(SHARDS), mesh[SHARDS].size()
    about = {"cuts": json.dumps(cuts), "steps": json.dumps(steps)}
    return Mine(f"{number:05d}-of-{of:05d}.safetensors", tensors, about)


def place(folder: Path, step: int) -> str:
    """Make a folder for the shards of a step, below that of the checkpoints; returns its name. What a run that was
    killed while it wrote has left is removed first."""
    forget(folder)
    name = f"{PREFIX}{step:08d}"
    while (folder / name).exists():
        name += "+"  # best.ckpt names that one; a kill left last.ckpt at an earlier step, from which the run came again
    (folder / name).mkdir()
    return name


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(folder: Path, mine: Mine) -> dict[str, tuple[int, str]]:
    """Write one rank's file, to the disk itself; returns its name, bytes and hash, as a checkpoint names it. Raises
    OSError, SafetensorError."""
    path = folder / mine.file
    save_file(mine.tensors, path, metadata=mine.about)
    sync(path)
    sync(folder)
    return {mine.file: (path.stat().st_size, sha256_file(path))}


def forget(folder: Path) -> None:
    """Remove the shards that no checkpoint in the folder names."""
    checkpoints = [torch.load(path, mmap=True, weights_only=True) for path in folder.glob("*.ckpt")]
    named = [c["shards"]["folder"] for c in checkpoints if c["shards"]]
    for path in folder.glob(f"{PREFIX}*"):
        if path.name not in named:
            shutil.rmtree(path, ignore_errors=True)


# -- reading -----------------------------------------------------------------------------------------------------------


def opened(folder: Path, named: Mapping[str, Any]) -> Saved:
    """The shards that a checkpoint in this folder names. Raises ShardError where one is missing or cut off, or they do
    not make up whole tensors; what is in them, `verify` looks at."""
    files = [folder / named["folder"] / name for name in named["files"]]
    if not files:
        raise ShardError(f"{folder / named['folder']}: no shards are named")
    pieces: dict[str, list[Piece]] = {}
    sizes: dict[str, int] = {}
    steps: dict[str, int] = {}
    for path, (size, _) in zip(files, named["files"].values(), strict=True):
        if not path.is_file():
            raise ShardError(f"{path} is missing, one of {len(files)} shards")
        if path.stat().st_size != size:
            raise ShardError(f"{path} is damaged: it has {path.stat().st_size:,} bytes, {size:,} were written")
    for path in files:
        try:
            file = safe_open(path, "pt")
        except Exception as error:  # safetensors raises an error of its own kind
            raise ShardError(f"{path} is damaged: {error}") from None
        about = file.metadata()
        for name, (start, stop, size) in json.loads(about["cuts"]).items():
            if stop > start or not size:
                pieces.setdefault(name, []).append(Piece(start, stop, _reader(file, name)))
            sizes[name] = size
        for name, step in json.loads(about["steps"]).items():
            if steps.setdefault(name, step) != step:
                raise ShardError(f"{path}: {name} is of another step than in other shards, {step} and {steps[name]}")
    for name, size in sizes.items():
        pieces[name].sort(key=lambda p: p.start)
        ends = [0, *(p.stop for p in pieces[name])]
        if [p.start for p in pieces[name]] != ends[:-1] or ends[-1] != size:
            raise ShardError(f"{files[0].parent}: the shards of {name} do not make up its {size} elements")
    return Saved(str(files[0].parent), pieces, steps)


def verify(folder: Path, named: Mapping[str, Any]) -> None:
    """Are the shards those that the checkpoint was written with, to the bit? Each rank reads its part of them, and all
    call it. Raises ShardError on all ranks."""
    (rank, world), wrong = here(), ""
    for name, (_, expected) in list(named["files"].items())[rank::world]:
        path = folder / named["folder"] / name
        try:
            found = sha256_file(path)
        except OSError as error:  # whatever it is, the others wait to hear of it
            found = str(error)
        if found != expected:
            wrong = wrong or f"{path} is not the file that was written: damaged, or of another step or run ({found})"
    if any(said := of_all(wrong)):
        raise ShardError(next(filter(None, said)))


def _reader(file: Any, name: str) -> Callable[[str, int, int], Tensor]:
    return lambda key, start, stop: file.get_slice(f"{key}/{name}")[start:stop]


def held(where: str, learned: Mapping[str, Tensor], states: Mapping[str, Mapping[str, Any]]) -> Saved:
    """The same of a checkpoint that holds whole tensors. `states`: name -> the optimizer's state of it, flat; empty
    where no step was taken yet."""
    pieces = {}
    for name, tensor in learned.items():
        kept_of = {WEIGHT: tensor} | {k: t for k, t in states.get(name, {}).items() if isinstance(t, Tensor)}
        pieces[name] = [Piece(0, tensor.numel(), _slicer(kept_of))]
    return Saved(where, pieces, {name: int(states.get(name, {}).get("step", 0)) for name in learned})


def _slicer(tensors: Mapping[str, Tensor]) -> Callable[[str, int, int], Tensor]:
    return lambda key, start, stop: tensors[key].flatten()[start:stop]


@torch.no_grad()
def restore_weights(model: nn.Module, saved: Saved) -> None:
    """Give the model back what of it belongs here, whether it is sharded or not. Raises ShardError when other tensors
    learn here, or have another size."""
    ours = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if missing := sorted(ours.keys() - saved.pieces.keys()):
        raise ShardError(f"{saved.where} lacks {len(missing)} tensors that learn here, the first {missing[0]}")
    if surplus := sorted(saved.pieces.keys() - ours.keys()):
        raise ShardError(f"{saved.where} holds {len(surplus)} tensors that do not learn here, the first {surplus[0]}")
    for name, p in ours.items():
        if (size := saved.pieces[name][-1].stop) != p.numel():
            raise ShardError(f"{saved.where}: {name} has {size} elements, this model's {p.numel()}")
        local(p).view(-1).copy_(saved.elements(name, WEIGHT, *cut(p)))


@torch.no_grad()
def restore(model: nn.Module, optimizer: torch.optim.Optimizer, saved: Saved) -> None:
    """The same, and the optimizer's state."""
    restore_weights(model, saved)
    names = {id(p): n for n, p in model.named_parameters()}
    optimizer.state.clear()
    for g, group in enumerate(optimizer.param_groups):
        for k, p in enumerate(group["params"]):
            if saved.steps[names[id(p)]]:
                _restore_state(optimizer, g, k, p, saved, names[id(p)])


def _restore_state(optimizer: torch.optim.Optimizer, g: int, k: int, p: Tensor, saved: Saved, name: str) -> None:
    start, stop = cut(p)
    if not isinstance(optimizer, Optimizer2State):
        optimizer.state[p] = {"step": torch.tensor(float(saved.steps[name]))}
        for key in MOMENTS:
            optimizer.state[p][key] = torch.zeros_like(p)
            local(optimizer.state[p][key]).view(-1).copy_(saved.elements(name, key, start, stop))
        return
    optimizer.init_state(optimizer.param_groups[g], p, g, k)
    state = optimizer.state[p]
    state["step"] = saved.steps[name]
    for number, (codes, scales, table) in enumerate(zip(CODES, SCALES, TABLES, strict=True)):
        if scales not in state:
            state[codes].view(-1).copy_(saved.elements(name, codes, start, stop))
        elif stop > start:
            table_of = optimizer.name2qmap[table].cpu()
            for key, found in zip((codes, scales), saved.eight_bit(name, number, start, stop, table_of), strict=True):
                state[key].view(-1).copy_(found)
