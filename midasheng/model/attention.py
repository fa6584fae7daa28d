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
from torch.nn.attention.varlen import varlen_attn

from midasheng.config import AUTO, SDPA, VARLEN, UserError
from midasheng.sample import bounds

NAME = "midasheng_segments"


class Segments(Sequence[int]):
    """Lengths of the segments of a packed row, and `bounds` on its device, int32 (segments + 1,): where each begins and
    the last ends, for kernels that must not wait for a copy from the host.

    No tuple: compiled blocks would be compiled again for every other number of segments.
    """

    def __init__(self, lengths: Sequence[int], bounds_S: Tensor) -> None:
        self.lengths, self.bounds = tuple(lengths), bounds_S

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: Any) -> Any:
        return self.lengths[number]


_asked = [AUTO]  # one choice for a process: transformers calls the function below with no room for another argument


def ask(name: str) -> None:
    """Choose the kernel for this process: a value of hardware.attention."""
    _asked[0] = name


def kernel(device: str, dtype: torch.dtype) -> str:
    """The kernel that runs on a kind of device in a dtype: the one asked for; auto: varlen on a GPU in half precision
    (its only form), else sdpa."""
    if _asked[0] != AUTO:
        return _asked[0]
    return VARLEN if device == "cuda" and dtype in (torch.bfloat16, torch.float16) else SDPA


@torch.compiler.disable  # type: ignore[untyped-decorator]  # blocks would be compiled anew for every other lengths
def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Sequence[int], *, causal: bool, scale: float | None = None
) -> Tensor:
    """Attention inside each segment of a packed row.

    q (heads, slots, head_dim); k, v (kv_heads, slots, head_dim), kv_heads dividing heads; `segments`: lengths in slots
    whose sum is the number of slots. Returns (heads, slots, head_dim). No kernel builds a mask, and which one runs is
    decided once, by `kernel`: torch's sdpa once per segment, or torch's variable-length (Flash) attention.
    """
    assert sum(segments) == q.shape[1], f"segments hold {sum(segments)} slots, the row {q.shape[1]}"
    grouped = q.shape[0] != k.shape[0]
    if isinstance(segments, Segments) and kernel(v.device.type, v.dtype) == VARLEN:
        q, k, v = (t.transpose(0, 1).to(v.dtype) for t in (q, k, v))  # rotary positions may have made q, k float32
        longest, window = max(segments), (-1, 0) if causal else (-1, -1)
        out = varlen_attn(
            q, k, v, segments.bounds, segments.bounds, longest, longest, scale=scale, window_size=window,
            enable_gqa=grouped,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out.transpose(0, 1)
    parts = [
        F.scaled_dot_product_attention(
            q_s[None], k_s[None], v_s[None], is_causal=causal, scale=scale, enable_gqa=grouped
        )[0]
        for q_s, k_s, v_s in zip(*(t.split(list(segments), dim=1) for t in (q, k, v)), strict=True)
    ]
    return torch.cat(parts, dim=1)


class Seen(Sequence[slice]):
    """For each slot of a decoding step the stretch of the cache that it sees: the keys of its own answer, itself the
    last."""

    def __init__(self, stretches: Sequence[slice]) -> None:
        self.stretches = tuple(stretches)

    def __len__(self) -> int:
        return len(self.stretches)

    def __getitem__(self, number: Any) -> Any:
        return self.stretches[number]


def cached_attention(q: Tensor, k: Tensor, v: Tensor, seen: Seen, *, scale: float | None = None) -> Tensor:
    """Attention of one new slot of each answer over its own stretch of the cache, copying none of it.

    q (heads, answers, head_dim); k, v (kv_heads, slots of the cache, head_dim). Returns (heads, answers, head_dim).
    """
    assert len(seen) == q.shape[1], f"{len(seen)} stretches of the cache for {q.shape[1]} slots"
    grouped = q.shape[0] != k.shape[0]
    parts = [
        F.scaled_dot_product_attention(
            q[None, :, number : number + 1], k[None, :, keys], v[None, :, keys], scale=scale, enable_gqa=grouped
        )[0]
        for number, keys in enumerate(seen)
    ]
    return torch.cat(parts, dim=1)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Sequence[int], *, causal: bool, scale: float | None = None
) -> Tensor:
    """The same through one dense mask: the reference that tests and the start-up check hold `segment_attention` to."""
    number = torch.repeat_interleave(torch.arange(len(segments)), torch.tensor(list(segments))).to(q.device)
    mask = number[:, None] == number[None, :]
    if causal:
        mask = mask.tril()
    k, v = (t.repeat_interleave(q.shape[0] // t.shape[0], dim=0) for t in (k, v))
    scores = (q @ k.transpose(-1, -2)) * (scale if scale is not None else q.shape[-1] ** -0.5)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


def verify(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Largest difference between `segment_attention` and the dense reference in float32 on a small pack, in values and
    gradients, over both towers' forms: bidirectional with as many heads for k and v (encoder), causal with fewer.

    Raises AssertionError above 1e-4 (2e-2 in half precision): a kernel that leaks between segments must not train.
    Raises UserError for one that does not run at all.
    """
    name = kernel(torch.device(device).type, dtype)
    draw = torch.Generator().manual_seed(0)
    lengths = (5, 1, 17, 9)
    segments = Segments(lengths, bounds(lengths).to(device))
    differences = []
    for causal, kv_heads in ((False, 4), (True, 2)):
        rows = [torch.randn(n, sum(lengths), 64, generator=draw).to(device, dtype) for n in (4, kv_heads, kv_heads)]
        found = []
        for attend, as_dtype in ((segment_attention, dtype), (dense_attention, torch.float32)):
            q, k, v = leaves = [row.detach().to(as_dtype, copy=True).requires_grad_() for row in rows]
            try:
                out = attend(q, k, v, segments, causal=causal)
                out.float().square().sum().backward()
            except (RuntimeError, NotImplementedError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(
                    f"hardware.attention: {name} does not run on {device} in {dtype} ({reason}); write {SDPA}"
                ) from error
            found.append([out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
        for ours, dense in zip(*found, strict=True):
            differences.append((ours.float() - dense).abs().max() / dense.abs().max())
    largest = float(torch.stack(differences).max())  # max() would lose a NaN
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    assert largest < limit, f"packed attention ({name}, {dtype}) differs from the dense reference by {largest}"
    return largest


def _for_transformers(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
    segments: Sequence[int] | Seen, **ignored: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention interface: (1, heads, slots, head_dim) in, (1, slots, heads, head_dim) out."""
    assert query.shape[0] == 1, f"packed rows come one at a time, not {query.shape[0]}"
    assert attention_mask is None, "packed rows come without a mask: their segments say who sees whom"
    if isinstance(segments, Seen):
        out = cached_attention(query[0], key[0], value[0], segments, scale=scaling)
    else:
        out = segment_attention(query[0], key[0], value[0], segments, causal=True, scale=scaling)
    return out.transpose(0, 1)[None], None


def register() -> None:
    """Make `attn_implementation=NAME` known to transformers; calling it again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _for_transformers)
