"""Liger's fused RMSNorm and SwiGLU in the decoder's blocks, held to the plain ones before anything trains with them.

Liger patches transformers' classes by architecture and has nothing for Qwen2.5-Omni; here single instances get another
`forward`. Parameters, modules and names stay as they are, so LoRA, hand-off and export know nothing of it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from midasheng.config import UserError
from midasheng.model.decoder import text_model

NORMS = {"qwen2_5_omni_text": 2, "qwen2": 2, "qwen3": 4, "llama": 2, "mistral": 2}  # of a block, by model_type
ROWS = 64
# Liger has a second kernel for rows of at most 256 numbers when there are this many: the norms of heads in a full pack
NARROW, MANY_ROWS = 256, 4096 * 8


def _norm(self: Any, x: Tensor) -> Tensor:
    from liger_kernel.ops import LigerRMSNormFunction

    # Liger answers in the dtype of its input, the plain norm in that of input and weight together
    x = x.to(torch.promote_types(x.dtype, self.weight.dtype))
    # in_place=False: True would write into a gradient that others may hold
    return LigerRMSNormFunction.apply(x, self.weight, self.variance_epsilon, 0.0, "llama", False, None)


def _mlp(self: Any, x: Tensor) -> Tensor:
    from liger_kernel.ops import LigerSiLUMulFunction

    # its backward pass overwrites gate and up, which nobody else keeps: a graph is gone through once
    return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))


def _fused(module: nn.Module) -> Any:
    """The function that runs instead of the module's own forward, if one does."""
    return getattr(vars(module).get("forward"), "__func__", None)


def counts(config: Any) -> tuple[int, int]:
    """(RMSNorms, SwiGLUs) of a text model, from its config alone."""
    return config.num_hidden_layers * NORMS[config.model_type] + 1, config.num_hidden_layers


def fuse(model: Any) -> None:
    """Let every RMSNorm and SwiGLU of transformers' text `model` run Liger's kernels, in place.

    Raises AssertionError unless they are as many as the config says: a layer that is left out would go unnoticed.
    """
    projections = {"gate_proj", "up_proj", "down_proj"}
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            module.forward = MethodType(_norm, module)
        elif kind.endswith("MLP") and projections <= {name for name, _ in module.named_children()}:
            module.forward = MethodType(_mlp, module)
    running = [_fused(module) for module in model.modules()]
    found, wanted = (running.count(_norm), running.count(_mlp)), counts(model.config)
    assert found == wanted, f"Liger runs in {found} (RMSNorm, SwiGLU) of the decoder, the config says {wanted}"


def _refuse(config: Any, device: torch.device) -> None:
    """Raise UserError where Liger cannot run, or would compute something else."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise UserError(
            "hardware.liger: liger-kernel is not installed; run `pip install 'midasheng-train[liger]'`, or write "
            "hardware.liger=false"
        )
    if device.type != "cuda":
        raise UserError(f"hardware.liger: Liger's kernels need a GPU, this run is on {device}; write false")
    if config.model_type not in NORMS:
        raise UserError(
            f"hardware.liger: the norms of {config.model_type} are not known here (those of {', '.join(NORMS)} are); "
            "write false"
        )
    if config.hidden_act != "silu":
        raise UserError(f"hardware.liger: hidden_act is {config.hidden_act}, Liger's SwiGLU computes silu; write false")


def verify(architecture: str, fields: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype) -> float:
    """Largest difference between fused and plain modules on random rows, in values and gradients, each row relative to
    its largest number. `architecture`, `fields`: the decoder, as decoder.text_model takes them; a block of its real
    widths is made on the device, its norms and MLP run in every pairing of dtypes that a run in `dtype` may have.

    Raises UserError where Liger cannot run; AssertionError above 1e-4 (2e-2 in half precision), and where it would run
    in more or fewer modules than the config has.
    """
    device = torch.device(device)
    with init_empty_weights(include_buffers=False):
        model = text_model(architecture, fields)
    _refuse(model.config, device)
    fuse(model)
    draw = torch.Generator(device).manual_seed(0)
    half, full = dtype, torch.float32
    # (rows, weights, learn): what is frozen is kept in half precision, what learns in full
    pairings = dict.fromkeys([(half, half, False), (full, half, False), (half, full, True), (full, full, True)])
    running = [module for module in (*model.layers[0].modules(), model.norm) if _fused(module)]
    parts = {(_fused(module), sum(p.numel() for p in module.parameters())): module for module in running}  # each once
    largest = 0.0
    for (forward, _), part in parts.items():
        part.to_empty(device=device)
        for p in part.parameters():
            nn.init.normal_(p, std=p.shape[-1] ** -0.5 if p.ndim > 1 else 1.0, generator=draw)
        narrow = forward is _norm and part.weight.numel() <= NARROW
        for rows in (ROWS, MANY_ROWS) if narrow else (ROWS,):
            for pairing in pairings:
                largest = max(largest, _difference(part, rows, pairing, dtype, draw))
        part.to_empty(device="meta")  # a block of 7B is not small
    return largest


def _difference(
    part: Any, rows: int, pairing: tuple[torch.dtype, torch.dtype, bool], dtype: torch.dtype, draw: torch.Generator
) -> float:
    """Of one module, between its class's forward and the one that runs."""
    of_rows, of_weights, learn = pairing
    part.to(of_weights).requires_grad_(learn)
    width = part.weight.numel() if hasattr(part, "weight") else part.gate_proj.in_features
    x = torch.randn(rows, width, generator=draw, device=draw.device)
    x[::2] *= 1e-3  # as small as the square root of eps: it must be there
    x = x.to(of_rows).requires_grad_()
    found, slope = [], None
    for forward in (part.forward, MethodType(type(part).forward, part)):
        with torch.autocast(draw.device.type, dtype=dtype, enabled=dtype != torch.float32):
            out = forward(x)
        slope = torch.randn(out.shape, generator=draw, device=draw.device).to(out.dtype) if slope is None else slope
        found.append([out.detach(), *torch.autograd.grad(out, [x, *(p for p in part.parameters() if learn)], slope)])
    worst, limit = 0.0, 1e-4 if dtype == torch.float32 else 2e-2
    for fused, plain in zip(*found, strict=True):
        assert fused.dtype == plain.dtype, f"Liger's {type(part).__name__} gives {fused.dtype}, not {plain.dtype}"
        scale = plain.float().abs().amax(-1).clamp_min(1e-30)
        difference = float(((fused.float() - plain.float()).abs().amax(-1) / scale).max())
        assert difference < limit, (  # not through max(): it would lose a NaN
            f"Liger's {type(part).__name__} ({rows} rows of {width}, {of_rows}; weights {of_weights}) differs from the "
            f"plain one by {difference}"
        )
        worst = max(worst, difference)
    return worst
