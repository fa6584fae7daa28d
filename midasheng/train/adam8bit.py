"""bitsandbytes' AdamW8bit on the shards of FSDP2, whose DTensors its own step refuses."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.optim import AdamW8bit
from torch import Tensor
from torch.distributed.tensor import DTensor

from midasheng.model.adapt import LARGE

BLOCK = 256  # elements that bitsandbytes scales together
CODES, SCALES, TABLES = ("state1", "state2"), ("absmax1", "absmax2"), ("dynamic", "udynamic")


def local(tensor: Tensor) -> Tensor:
    """What lies on this rank, sharing its memory: the shard of a DTensor, any other tensor itself."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


class ShardedAdamW8bit(AdamW8bit):
    """The same arithmetic on local shards. Whether a tensor's states are 8-bit is decided by its whole size, as without
    shards. Where shards are cut at multiples of BLOCK elements, as all matrices of 3b and 7b are for any number of
    ranks, blocks are the whole tensor's and updates equal bit for bit; elsewhere (1-D tensors, as the encoder's biases
    of 5,120 elements over 80 ranks) a block ends at the cut: finer, never coarser."""

    @torch.no_grad()
    def init_state(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Zeros for the two moments of the local shard of `p`."""
        shard, state = local(p), self.state[p]
        state["step"] = 0
        eight_bit = p.numel() >= LARGE
        for codes, scales, table in zip(CODES, SCALES, TABLES, strict=True):
            state[codes] = torch.zeros_like(shard, dtype=torch.uint8 if eight_bit else torch.float32)
            if eight_bit:
                state[scales] = torch.zeros(-(-shard.numel() // BLOCK), device=shard.device)
                self.name2qmap[table] = self.name2qmap[table].to(shard.device)
                state[codes.replace("state", "qmap")] = self.name2qmap[table]

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """One step of the local shard."""
        state = self.state[p]
        state["step"] += 1
        assert p.grad is not None
        shard, gradient = local(p), local(p.grad).contiguous()
        if not shard.numel():  # fewer rows than ranks
            return
        assert shard.is_contiguous()
        one, two = group["betas"]
        if state["state1"].dtype == torch.float32:
            functional.optimizer_update_32bit(
                "adam", gradient, shard, state["state1"], one, group["eps"], state["step"], group["lr"],
                state["state2"], two, 0.0, 0.0, group["weight_decay"], 1.0, None, max_unorm=0.0, skip_zeros=False,
            )  # fmt: skip
        else:
            functional.optimizer_update_8bit_blockwise(
                "adam", gradient, shard, state["state1"], state["state2"], one, two, 0.0, 0.0, group["eps"],
                state["step"], group["lr"], state["qmap1"], state["qmap2"], state["absmax1"], state["absmax2"],
                group["weight_decay"], gnorm_scale=1.0, skip_zeros=False,
            )  # fmt: skip


def values(codes: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """What 8-bit codes stand for, flat, float32."""
    flat = codes.flatten()
    return table[flat.long()] * scales.repeat_interleave(BLOCK)[: len(flat)]


def quantised(flat: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) of a flat float32 tensor."""
    codes, state = functional.quantize_blockwise(flat, code=table, blocksize=BLOCK)
    return codes, state.absmax
