"""One model over many processes: DDP where little learns, FSDP2 where much does, and shards on disk that any number of
processes reads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, TypeVar

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.distributed import _init_dist_connection
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from midasheng.config import AUTO, DDP, FSDP, ConfigError, Hardware
from midasheng.model.adapt import ADDED
from midasheng.model.audio_lm import AudioLM
from midasheng.train.adam8bit import local

T = TypeVar("T")
MANY = 10**9  # parameters that learn: with gradients and states of all of them on each GPU, 80 GB are full at about 5e9
COPIES, SHARDS = "copies", "shards"  # dimensions of the mesh
BLANK = 0.01  # in place of each weight


# -- which strategy ----------------------------------------------------------------------------------------------------


def chosen(hardware: Hardware, model: nn.Module) -> str:
    """ddp or fsdp, by hardware.strategy; auto: fsdp where more than MANY parameters learn. "" for a single process that
    was not asked to shard. Raises ConfigError."""
    world = hardware.devices * hardware.nodes
    learn = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kind = hardware.strategy
    if kind == AUTO:
        kind = FSDP if learn > MANY and world > 1 else DDP
    if kind != FSDP:
        return DDP if world > 1 else ""
    if hardware.shard and world % hardware.shard:
        raise ConfigError(f"hardware.shard: {hardware.shard} does not divide {world} processes; write a divisor, or 0")
    if hardware.compile:
        raise ConfigError("hardware.compile: compiled blocks under FSDP2 were never run; write hardware.compile=false")
    if any(name.startswith(ADDED) for name, _ in model.named_parameters()):
        raise ConfigError(
            "tokenizer.add: rows that learn in a frozen table are not shared over ranks; write hardware.strategy=ddp, "
            "or name reserved tokens instead"
        )
    return FSDP


def lines(kind: str, hardware: Hardware) -> list[str]:
    """For the header of a run: who holds what."""
    world = hardware.devices * hardware.nodes
    if kind == FSDP:
        share = hardware.shard or world
        return [f"  {world} processes, FSDP2: {share} share one copy of the model"]
    return [f"  {world} processes, DDP: each holds the whole model"] if kind == DDP else []


def strategy(kind: str, hardware: Hardware) -> Strategy | str:
    """Lightning's strategy."""
    if kind == FSDP:  # its own mesh is not used: `shard` makes one
        return ModelParallelStrategy(data_parallel_size=hardware.devices * hardware.nodes, tensor_parallel_size=1)
    return DDPStrategy() if kind == DDP else AUTO


def leave_out_frozen(module: nn.Module) -> None:
    """What is frozen, and buffers, are nothing to DDP: every process has loaded them. `module`: what it will wrap."""
    frozen = [n for n, p in module.named_parameters() if not p.requires_grad]
    names = [*frozen, *(n for n, _ in module.named_buffers())]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


def here() -> tuple[int, int]:
    """Number of this process, and of how many."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def of_all(mine: T) -> list[T]:
    """What each process brings to this place, by number; all of them call it."""
    if here()[1] == 1:
        return [mine]
    found: list[Any] = [None] * here()[1]
    torch.distributed.all_gather_object(found, mine)
    return found


def most(numbers: Sequence[float], device: torch.device) -> list[float]:
    """Of each number the largest of all processes; all of them call it. Exact up to 2 ** 53."""
    found = torch.tensor(numbers, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    largest: list[float] = found.tolist()
    return largest


def join(device: torch.device, processes: int) -> None:
    """The process group, as Lightning makes it, which takes over one that is there."""
    if torch.distributed.is_initialized():
        return
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.set_device(device)
    place = TorchElasticEnvironment() if processes > 1 else LightningEnvironment()
    _init_dist_connection(
        place, "nccl" if gpu else "gloo", timeout=default_pg_timeout, device_id=device if gpu else None
    )


@contextlib.contextmanager
def imagined(processes: int) -> Iterator[None]:
    """Inside, this process is the first of so many whose collectives do nothing."""
    torch.distributed.init_process_group("fake", rank=0, world_size=processes)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


# -- FSDP2 -------------------------------------------------------------------------------------------------------------


def shard(model: AudioLM, device: str, share: int = 0) -> None:
    """FSDP2, in place: a block of either tower is a group, its norms are another, all else is the root's. `share`: how
    many ranks hold one copy (0: all); more ranks hold more copies.

    Weights are kept, and gradients reduced, in float32. Blocks are gathered in the model's compute dtype, which
    autocast would round their products to; what autocast leaves in float32 is gathered as it is kept: norms, and what
    the root holds, front end, patches, positions, projector, embedding, head. The residual stream is not cast. The
    head's weight is used without its forward, and a tied one is the embedding: so both must be the root's, whose group
    stays gathered from the forward pass to the end of the backward pass.
    """
    mesh = _mesh(torch.distributed.group.WORLD, device, share)
    blocks = MixedPrecisionPolicy(model.compute_dtype, torch.float32, cast_forward_inputs=False)
    rest = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in [*model.audio_encoder.blocks, *model.decoder.model.layers]:
        fully_shard(norms(block), mesh=mesh, mp_policy=rest, reshard_after_forward=True)
        fully_shard(block, mesh=mesh, mp_policy=blocks, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, mp_policy=rest, reshard_after_forward=False)


@cache
def _mesh(group: ProcessGroup, device: str, share: int) -> DeviceMesh:
    """Of all processes. Made once in a group: a GPU's communicators take memory that a second mesh would take again."""
    share = share or group.size()
    mesh = init_device_mesh(device, (group.size() // share, share), mesh_dim_names=(COPIES, SHARDS))
    return mesh if share < group.size() else mesh[SHARDS]


@torch.no_grad()
def blank(model: AudioLM, device: torch.device, share: int) -> None:
    """`shard` a model whose parameters have no memory, and give it numbers that are no weights: what a step takes does
    not depend on them. Its buffers keep what they hold."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    shard(model, device.type, share)
    model.to_empty(device=device)
    for p in model.parameters():
        local(p).fill_(BLANK)  # what memory holds by chance may be slow to compute with, or not finite
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


def norms(block: nn.Module) -> list[nn.Module]:
    """Modules of a block that hold no matrix, in the order in which they run."""
    own = [(m, list(m.parameters(recurse=False))) for m in block.modules()]
    return [m for m, held in own if held and all(p.ndim == 1 for p in held)]


def groups(model: nn.Module) -> list[FSDPModule]:
    """Modules whose weights are gathered before they run, the root first; none without FSDP2."""
    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def shards_group(model: nn.Module) -> ProcessGroup | None:
    """The ranks that share one copy of the model; None without FSDP2."""
    for p in model.parameters():
        if isinstance(p, DTensor):
            return p.device_mesh.get_group(SHARDS)
    return None


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Inside, every rank holds all weights in the dtype that they are gathered in, so that ranks may compute different
    things, or nothing. Entered by every rank; without FSDP2 it changes nothing."""
    parts = groups(model)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for number, part in enumerate(parts):
            part.reshard()
            part.set_reshard_after_forward(number > 0, recurse=False)


def sync(model: nn.Module, last: bool) -> None:
    """Whether the next backward pass ends with reduced gradients: only that of a step's last pack."""
    for part in groups(model)[:1]:
        part.set_requires_gradient_sync(last)


def rows(n: int, parts: int, part: int) -> tuple[int, int]:
    """First and last + 1 of the rows of a tensor of `n` that rank `part` of `parts` holds: all but the last ranks as
    many, as torch.chunk cuts."""
    each = -(-n // parts)
    return min(n, part * each), min(n, (part + 1) * each)


def cut(tensor: Tensor) -> tuple[int, int]:
    """Which elements of the flattened tensor lie here: first, last + 1."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.numel()
    mesh = tensor.device_mesh
    first, last = rows(tensor.shape[0], mesh.size(mesh.ndim - 1), mesh.get_local_rank(SHARDS))
    row = tensor.numel() // tensor.shape[0]
    assert (last - first) * row == local(tensor).numel(), f"{tuple(tensor.shape)} is cut otherwise than in rows"
    return first * row, last * row


def gather(tensor: Tensor) -> Tensor:
    """A whole tensor on the CPU; every rank calls it, with the same one."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu().contiguous()


@contextlib.contextmanager
def gathering(tensors: Iterable[Tensor]) -> Iterator[Callable[[Tensor], Tensor]]:
    """Inside, `gather` for the rank that writes, which takes these tensors in this order, as all ranks do; where it
    fails between two, it still takes the rest: the others wait in there, and would not hear of it."""
    left = iter(tensors)

    def next_one(tensor: Tensor) -> Tensor:
        assert next(left).shape == tensor.shape
        return gather(tensor)

    try:
        yield next_one
    except Exception:
        for tensor in left:
            gather(tensor)
        raise
