"""Attention over packed segments: one function for both towers.

`segment_attention` is registered with transformers under NAME, so the decoder stays the stock class. Stock packing
through position_ids leaks between segments without an error in some forms (2-D ids, a default cache, an all-ones mask:
measured on Qwen2.5-Omni's text model); here segment lengths are the only thing that decides who sees whom.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NAME = "midasheng_segments"


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Sequence[int], *, causal: bool, scale: float | None = None
) -> Tensor:
    """Attention inside each segment of a packed row.

    q (heads, slots, head_dim); k, v (kv_heads, slots, head_dim), kv_heads dividing heads; `segments`: lengths in slots
    whose sum is the number of slots. Returns (heads, slots, head_dim). Runs torch's sdpa once per segment, so no
    segment can see another and no mask is built.
    """
    assert sum(segments) == q.shape[1], f"segments hold {sum(segments)} slots, the row {q.shape[1]}"
    grouped = q.shape[0] != k.shape[0]
    parts = [
        F.scaled_dot_product_attention(
            q_s[None], k_s[None], v_s[None], is_causal=causal, scale=scale, enable_gqa=grouped
        )[0]
        for q_s, k_s, v_s in zip(*(t.split(list(segments), dim=1) for t in (q, k, v)), strict=True)
    ]
    return torch.cat(parts, dim=1)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Sequence[int], *, causal: bool, scale: float | None = None
) -> Tensor:
    """The same through one dense mask: the reference that tests and the start-up check hold `segment_attention` to."""
    number = torch.repeat_interleave(torch.arange(len(segments)), torch.tensor(segments)).to(q.device)
    mask = number[:, None] == number[None, :]
    if causal:
        mask = mask.tril()
    k, v = (t.repeat_interleave(q.shape[0] // t.shape[0], dim=0) for t in (k, v))
    scores = (q @ k.transpose(-1, -2)) * (scale if scale is not None else q.shape[-1] ** -0.5)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


@torch.no_grad()
def verify(device: torch.device | str = "cpu") -> float:
    """Largest difference between `segment_attention` and the dense reference on a small pack on `device`, over both
    towers' forms: bidirectional with as many heads for k and v (encoder), causal with fewer (decoder).

    Raises AssertionError above 1e-4 (float32): a kernel that leaks between segments must not train.
    """
    draw = torch.Generator().manual_seed(0)
    segments = (5, 1, 17, 9)
    largest = 0.0
    for causal, kv_heads in ((False, 4), (True, 2)):
        q, k, v = (torch.randn(n, sum(segments), 8, generator=draw).to(device) for n in (4, kv_heads, kv_heads))
        fast = segment_attention(q, k, v, segments, causal=causal)
        largest = max(largest, float((fast - dense_attention(q, k, v, segments, causal=causal)).abs().max()))
    assert largest < 1e-4, f"packed attention differs from the dense reference by {largest}"
    return largest


def _for_transformers(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
    segments: Sequence[int], **ignored: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface: (1, heads, slots, head_dim) in, (1, slots, heads, head_dim) out."""
    assert query.shape[0] == 1, f"packed rows come one at a time, not {query.shape[0]}"
    assert attention_mask is None, "packed rows come without a mask: their segments say who sees whom"
    out = segment_attention(query[0], key[0], value[0], segments, causal=True, scale=scaling)
    return out.transpose(0, 1)[None], None


def register() -> None:
    """Make `attn_implementation=NAME` known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _for_transformers)
