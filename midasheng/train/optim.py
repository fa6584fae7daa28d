"""AdamW in 8 bit or not, its parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from midasheng.config import ConfigError, Optim
from midasheng.model.adapt import LARGE


def learning_rate(step: int, steps: int, warmup: int, final: float) -> float:
    """Factor on the peak rate at `step` (from 0): linear from 0, peak at the end of warm-up, cosine to `final` at the
    last step (report section 4). Nothing to save, so a resume cannot warm up again."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def without_decay(name: str, parameter: nn.Parameter) -> bool:
    """Norms, biases and position embeddings are not decayed (Dasheng's no_weight_decay, and the usual rule)."""
    return parameter.ndim < 2 or name.endswith("pos_embed")


def groups(named: Iterable[tuple[str, nn.Parameter]], optim: Optim) -> list[dict[str, object]]:
    """Parameter groups with keys params, weight_decay, peak_lr. Raises ConfigError for a glob that matches nothing."""
    trained = [(n, p) for n, p in named if p.requires_grad]
    for glob in optim.lr_for:
        if not any(fnmatchcase(n, glob) for n, _ in trained):
            raise ConfigError(f"optim.lr_for: `{glob}` matches no tensor that learns")
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained:
        rate = next((lr for glob, lr in optim.lr_for.items() if fnmatchcase(name, glob)), optim.lr)
        decay = 0.0 if without_decay(name, parameter) else optim.weight_decay
        found.setdefault((rate, decay), []).append(parameter)
    return [{"params": p, "peak_lr": rate, "lr": rate, "weight_decay": decay} for (rate, decay), p in found.items()]


def optimizer(named: Iterable[tuple[str, nn.Parameter]], optim: Optim) -> torch.optim.Optimizer:
    """The optimizer over all that learns."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # 4-bit kernels, which nobody asked for
    from bitsandbytes.optim import AdamW8bit

    from midasheng.train.adam8bit import ShardedAdamW8bit

    named = list(named)
    eight_bit = ShardedAdamW8bit if any(isinstance(p, DTensor) for _, p in named) else AdamW8bit
    kind = {"adamw8bit": eight_bit, "adamw": torch.optim.AdamW}[optim.name]
    made: torch.optim.Optimizer = kind(
        groups(named, optim), lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps
    )
    return made


def state_bytes(parameters: Iterable[nn.Parameter], name: str) -> int:
    """What the optimizer will keep on this rank of these parameters: two moments, of 8 bits with a float32 scale for
    each 256, or as the parameter is; torch's own counts steps in a tensor each."""
    total = 0
    eight_bit = False
    for p in parameters:
        n = (p.to_local() if isinstance(p, DTensor) else p).numel()
        if name == "adamw":
            total += 2 * n * p.element_size() + 4
        elif p.numel() < LARGE:  # the whole tensor
            total += 2 * n * 4
        else:
            total += 2 * (n + 4 * -(-n // 256))
            eight_bit = True
    return total + eight_bit * 2 * 256 * 4  # the tables of what 8 bits stand for, shared by all


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], limit: float, shards: ProcessGroup | None = None) -> torch.Tensor:
    """Scale the complete gradient down to norm `limit`; returns its norm before, over all trained parameters. `shards`:
    the ranks that hold one gradient together."""
    found = [p.grad for p in parameters if p.grad is not None]
    gradients = [g.to_local() if isinstance(g, DTensor) else g for g in found]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    if shards is not None:
        square = norm.square()
        torch.distributed.all_reduce(square, group=shards)
        norm = square.sqrt()
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale)
    return norm
