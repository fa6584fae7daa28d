"""Packed attention: equal to a dense mask and to segments alone; a kernel that leaks is refused before training."""

import pytest
import torch

from midasheng.model import attention
from midasheng.model.attention import dense_attention, segment_attention, verify

SEGMENTS = (5, 1, 17, 9)
FORMS = [(True, 4), (True, 2), (False, 4), (False, 2)]


def draw(kv_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, sum(SEGMENTS), 8, generator=generator, dtype=torch.float64) for n in (4, kv_heads, kv_heads)]


@pytest.mark.parametrize(("causal", "kv_heads"), FORMS)
@pytest.mark.parametrize("scale", [None, 0.7])
def test_equal_to_a_dense_mask(causal, kv_heads, scale):
    q, k, v = draw(kv_heads)
    fast = segment_attention(q, k, v, SEGMENTS, causal=causal, scale=scale)
    assert (fast - dense_attention(q, k, v, SEGMENTS, causal=causal, scale=scale)).abs().max() < 1e-12


@pytest.mark.parametrize(("causal", "kv_heads"), FORMS)
def test_the_dense_mask_is_each_segment_alone(causal, kv_heads):
    q, k, v = draw(kv_heads)
    dense = dense_attention(q, k, v, SEGMENTS, causal=causal)
    alone = []
    for parts in zip(*(t.split(list(SEGMENTS), dim=1) for t in (q, k, v)), strict=True):
        alone.append(dense_attention(*parts, [parts[0].shape[1]], causal=causal))
    assert (dense - torch.cat(alone, dim=1)).abs().max() < 1e-12


def test_the_first_slot_of_a_causal_segment_sees_itself_alone():
    q, k, v = draw(4)
    out = segment_attention(q, k, v, SEGMENTS, causal=True)
    starts = [0, 5, 6, 23]
    assert (out[:, starts] - v[:, starts]).abs().max() < 1e-12


def test_segments_that_do_not_fill_the_row_are_an_error():
    q, k, v = draw(4)
    with pytest.raises(AssertionError, match="segments hold 31 slots, the row 32"):
        segment_attention(q, k, v, (5, 1, 17, 8), causal=True)


def test_verify_accepts_ours():
    assert verify() < 1e-5


def ignores_segments(q, k, v, segments, *, causal, scale=None):
    return dense_attention(q, k, v, [q.shape[1]], causal=causal, scale=scale)


def ignores_causality(q, k, v, segments, *, causal, scale=None):
    return dense_attention(q, k, v, segments, causal=False, scale=scale)


def always_causal(q, k, v, segments, *, causal, scale=None):
    return dense_attention(q, k, v, segments, causal=True, scale=scale)


def mixes_up_heads(q, k, v, segments, *, causal, scale=None):
    k, v = (t.repeat(q.shape[0] // t.shape[0], 1, 1) for t in (k, v))  # not repeat_interleave
    return dense_attention(q, k, v, segments, causal=causal, scale=scale)


@pytest.mark.parametrize("broken", [ignores_segments, ignores_causality, always_causal, mixes_up_heads])
def test_verify_refuses_a_broken_kernel(broken, monkeypatch):
    monkeypatch.setattr(attention, "segment_attention", broken)
    with pytest.raises(AssertionError, match="differs from the dense reference"):
        verify()
