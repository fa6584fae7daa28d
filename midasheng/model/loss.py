"""Next-token cross-entropy of the slots that have a target, without ever holding all of their logits."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

CHUNK = 2**25  # logits at once: 134 MB in float32, 220 slots of a vocabulary of 152k


class _TargetLoss(torch.autograd.Function):
    """Rows in chunks. The gradient of the hidden states is made in the forward pass, while a chunk's logits are there;
    that of a trained head in the backward pass, from logits made again (a frozen head, as in stages 2 and 3, pays
    nothing twice)."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, dtype: torch.dtype, added_AD: Tensor,
        added: slice,
    ) -> Tensor:  # fmt: skip
        rows = max(1, CHUNK // len(weight_VD))
        weight, own = weight_VD.to(dtype), added_AD.to(dtype)
        losses_N = hidden_ND.new_empty(len(hidden_ND), dtype=torch.promote_types(hidden_ND.dtype, torch.float32))
        wants = hidden_ND.requires_grad
        slope_ND = torch.empty_like(hidden_ND) if wants else hidden_ND.new_empty(0)
        slope_NA = losses_N.new_empty(len(hidden_ND), len(own))
        for start in range(0, len(hidden_ND), rows):
            here = slice(start, start + rows)
            hidden = hidden_ND[here].to(dtype)
            logits = (hidden @ weight.T).to(losses_N.dtype)
            if len(own):
                logits[:, added] = (hidden @ own.T).to(logits.dtype)
            losses_N[here], slope = _loss_and_slope(logits, labels_N[here])
            if len(own):
                slope_NA[here] = slope[:, added]
                slope[:, added] = 0
            if wants:
                slope_ND[here] = slope.to(dtype) @ weight + (slope_NA[here].to(dtype) @ own if len(own) else 0)
            del logits, slope  # before the next chunk's are made
        ctx.save_for_backward(hidden_ND, weight_VD, labels_N, slope_ND, slope_NA)
        ctx.dtype, ctx.rows, ctx.added_dtype = dtype, rows, added_AD.dtype
        return losses_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, labels_N, slope_ND, slope_NA = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        by_hidden = slope_ND * grad_N[:, None].to(slope_ND.dtype) if wants_hidden else None
        by_weight = None
        if wants_weight:
            weight, by_weight = weight_VD.to(ctx.dtype), torch.zeros_like(weight_VD)
            for start in range(0, len(hidden_ND), ctx.rows):
                here = slice(start, start + ctx.rows)
                hidden = hidden_ND[here].to(ctx.dtype)
                logits = (hidden @ weight.T).to(grad_N.dtype)
                slope = _loss_and_slope(logits, labels_N[here])[1].mul_(grad_N[here, None])
                by_weight += (slope.to(ctx.dtype).T @ hidden).to(by_weight.dtype)
                del logits, slope
        by_added = None
        if ctx.needs_input_grad[4]:
            slope_NA = (slope_NA * grad_N[:, None]).to(ctx.dtype)
            by_added = (slope_NA.T @ hidden_ND.to(ctx.dtype)).to(ctx.added_dtype)
        return by_hidden, by_weight, None, None, by_added, None


def _loss_and_slope(logits: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each row, and its gradient for the logits in their place: logsumexp would hold them twice."""
    at_label = logits.gather(1, labels_N[:, None])
    most = logits.amax(1, keepdim=True)
    total = logits.sub_(most).exp_().sum(1, keepdim=True)
    slope = logits.div_(total)
    slope[torch.arange(len(slope), device=slope.device), labels_N] -= 1
    return (most - at_label + total.log())[:, 0], slope


def target_loss(
    hidden_ND: Float[Tensor, "N D"], weight_VD: Float[Tensor, "V D"], labels_N: Int[Tensor, " N"],
    dtype: torch.dtype | None = None, added_AD: Float[Tensor, "A D"] | None = None, added: slice = slice(0, 0),
) -> Float[Tensor, " N"]:  # fmt: skip
    """Cross-entropy of each row, in float32 (float64 for float64). `labels_N`: a class for every row, none ignored.
    `added_AD`: learns in place of the rows `added` of a frozen head.

    `dtype`: of the products with the head, as autocast would choose it; by default that of the hidden states. Equal to
    F.cross_entropy(hidden @ weight.T, labels) in value and gradient; holds CHUNK logits at most.
    """
    assert added_AD is None or not weight_VD.requires_grad, "rows of their own in a head that learns"
    added_AD = weight_VD.new_empty(0, weight_VD.shape[1]) if added_AD is None else added_AD
    return _TargetLoss.apply(hidden_ND, weight_VD, labels_N, dtype or hidden_ND.dtype, added_AD, added)


def verify(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Largest relative difference between `target_loss` and F.cross_entropy in float32 on a few rows, in values and
    gradients. Raises AssertionError above 1e-4 (2e-2 in half precision)."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=draw).to(device, dtype) for n in (9, 101))
    labels = torch.arange(9, device=device) * 11
    found = []
    for plain in (False, True):
        h, w = ((t.float() if plain else t.clone()).requires_grad_() for t in (hidden, weight))
        losses = F.cross_entropy(h @ w.T, labels, reduction="none") if plain else target_loss(h, w, labels, dtype)
        losses.square().sum().backward()
        found.append([losses.detach(), *(t.grad for t in (h, w) if t.grad is not None)])
    differences = [(a.float() - b).abs().max() / b.abs().max() for a, b in zip(*found, strict=True)]
    largest = float(torch.stack(differences).max())  # max() would lose a NaN
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    assert largest < limit, f"the chunked loss ({dtype}) differs from the plain one by {largest}"
    return largest
