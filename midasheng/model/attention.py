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
from midasheng.sample import bounds, lineages, seen

NAME = "midasheng_segments"


class Segments(Sequence[int]):
    """Lengths of the segments of a packed row, and `bounds` on its device, int32 (segments + 1,): where each begins and
    the last ends, for kernels that must not wait for a copy from the host.

    `parents`, `seen_A`, `seen_bounds`: as in sample.Pack, where some segments continue others; `lines`: for each those
    that its slots see, the eldest first, itself last (none where nothing is shared).

    No tuple: compiled blocks would be compiled again for every other number of segments.
    """

    def __init__(
        self, lengths: Sequence[int], bounds_S: Tensor, parents: Sequence[int] = (), seen_A: Tensor | None = None,
        seen_bounds: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.lengths, self.bounds = tuple(lengths), bounds_S
        self.lines = lineages(parents) if max(parents, default=-1) >= 0 else []
        many = len(self.lengths)
        assert len(self.lines) in (0, many), f"{len(self.lines)} parents for {many} segments"
        self.seen_A, self.seen_bounds = seen_A, seen_bounds
        self._triangle: Tensor | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: Any) -> Any:
        return self.lengths[number]

    def seen(self) -> list[int]:
        """How many slots each segment sees: its ancestors' and its own."""
        return [sum(self.lengths[one] for one in line) for line in self.lines]

    def causal_mask(self, own: int, rows: int, device: torch.device) -> Tensor:
        """bool (own, rows): a segment's own slots are the last of the `rows` that it sees, and see none behind
        themselves. A view of one triangle, which all segments and layers of the pack share."""
        if self._triangle is None or self._triangle.device != device:
            most = max(n for n, line in zip(self.seen(), self.lines, strict=True) if len(line) > 1)
            self._triangle = torch.ones(most, most, dtype=torch.bool, device=device).tril()
        return self._triangle[rows - own : rows, :rows]


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
    """Attention inside each segment of a packed row, over the slots of its ancestors and its own.

    q (heads, slots, head_dim); k, v (kv_heads, slots, head_dim), kv_heads dividing heads; `segments`: lengths in slots
    whose sum is the number of slots; only those with parents have ancestors. Causal: of its own slots each sees those
    before it. Returns (heads, slots, head_dim). Which kernel runs is decided once, by `kernel`: torch's sdpa once per
    segment, or torch's variable-length (Flash) attention; none builds a mask but for sdpa on segments with parents.
    """
    assert sum(segments) == q.shape[1], f"segments hold {sum(segments)} slots, the row {q.shape[1]}"
    grouped = q.shape[0] != k.shape[0]
    lines = segments.lines if isinstance(segments, Segments) else []
    dtype = v.dtype
    if lines:  # gradients of shared slots are sums over all that see them: not in half precision
        k, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (k, v))
    if isinstance(segments, Segments) and kernel(v.device.type, dtype) == VARLEN:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        seen_bounds, longest, window = segments.bounds, max(segments), (-1, 0) if causal else (-1, -1)
        most_seen = longest
        if lines:  # of unequal lengths the last slots lie beside each other: Flash's causal mask is at bottom right
            assert segments.seen_A is not None
            assert segments.seen_bounds is not None
            k, v = (t.index_select(0, segments.seen_A) for t in (k, v))
            seen_bounds, most_seen = segments.seen_bounds, max(segments.seen())
        q, k, v = (t.to(dtype) for t in (q, k, v))  # rotary positions may have made q, k float32
        out = varlen_attn(
            q, k, v, segments.bounds, seen_bounds, longest, most_seen, scale=scale, window_size=window,
            enable_gqa=grouped,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out.transpose(0, 1)
    if v.device.type == "cpu" and dtype.itemsize < 4:  # there sdpa's backward takes 2 to 7 times as long as in float32
        with torch.autocast("cpu", enabled=False):
            return _by_segment(q.float(), k.float(), v.float(), segments, causal, scale).to(dtype)
    return _by_segment(q, k, v, segments, causal, scale)


def _by_segment(q: Tensor, k: Tensor, v: Tensor, segments: Sequence[int], causal: bool, scale: float | None) -> Tensor:
    """torch's sdpa once per segment; shapes as in `segment_attention`."""
    lines = segments.lines if isinstance(segments, Segments) else []
    parts_q, parts_k, parts_v = (t.split(list(segments), dim=1) for t in (q, k, v))
    parts = []
    for number, (q_s, k_s, v_s) in enumerate(zip(parts_q, parts_k, parts_v, strict=True)):
        mask = None
        if lines:
            line = lines[number]
            k_s, v_s = (torch.cat([of[one] for one in line], dim=1).to(q.dtype) for of in (parts_k, parts_v))
            if causal and len(line) > 1:  # is_causal would be at top left
                assert isinstance(segments, Segments)
                mask = segments.causal_mask(q_s.shape[1], k_s.shape[1], q.device)
        parts.append(
            F.scaled_dot_product_attention(
                q_s[None], k_s[None], v_s[None], attn_mask=mask, is_causal=causal and mask is None, scale=scale,
                enable_gqa=q.shape[0] != k.shape[0],
            )[0]
        )  # fmt: skip
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
    number = torch.repeat_interleave(torch.arange(len(segments)), torch.tensor(list(segments)))
    own = number[:, None] == number[None, :]
    mask = own.tril() if causal else own
    lines = segments.lines if isinstance(segments, Segments) else []
    for one, line in enumerate(lines):
        mask = mask | ((number == one)[:, None] & torch.isin(number, torch.tensor(line[:-1]))[None, :])
    mask = mask.to(q.device)
    k, v = (t.repeat_interleave(q.shape[0] // t.shape[0], dim=0) for t in (k, v))
    scores = (q @ k.transpose(-1, -2)) * (scale if scale is not None else q.shape[-1] ** -0.5)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v


def verify(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Largest difference between `segment_attention` and the dense reference in float32 on a small pack, in values and
    gradients, over both towers' forms: bidirectional with as many heads for k and v (encoder), causal with fewer, and
    that with segments that continue others.

    Raises AssertionError above 1e-4 (2e-2 in half precision): a kernel that leaks between segments must not train.
    Raises UserError for one that does not run at all.
    """
    name = kernel(torch.device(device).type, dtype)
    draw = torch.Generator().manual_seed(0)
    lengths, apart = (5, 1, 17, 3, 9, 4, 6), (-1,) * 7
    shared = (4, 4, 5, 5, 5, -1, -1)  # two leaves of a trunk, two of the lead, the trunk, the lead, a dummy
    differences = []
    for causal, kv_heads, parents in ((False, 4, apart), (True, 2, apart), (True, 2, shared)):
        seen_A, seen_bounds = (t.to(device) for t in seen(lengths, parents))
        segments = Segments(lengths, bounds(lengths).to(device), parents, seen_A, seen_bounds)
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
