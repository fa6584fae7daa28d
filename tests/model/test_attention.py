"""Packed attention: equal to a dense mask and to segments alone; a kernel that leaks is refused before training."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from midasheng.config import SDPA, VARLEN, UserError
from midasheng.model import attention
from midasheng.model.attention import Segments, ask, dense_attention, kernel, segment_attention, verify
from midasheng.sample import bounds, seen

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


PARENTS = (2, -1, 3, -1)


def shared() -> Segments:
    """The first continues the third, which continues the fourth."""
    return Segments(SEGMENTS, bounds(SEGMENTS), PARENTS, *seen(SEGMENTS, PARENTS))


@pytest.mark.parametrize(("causal", "kv_heads"), FORMS)
@pytest.mark.parametrize("attend", [segment_attention, dense_attention])
def test_a_segment_sees_all_of_its_ancestors_and_nothing_else(causal, kv_heads, attend):
    q, k, v = draw(kv_heads)
    found = attend(q, k, v, shared(), causal=causal).split(SEGMENTS, dim=1)
    parts = [t.split(SEGMENTS, dim=1) for t in (q, k, v)]
    for number, line in enumerate([(3, 2, 0), (1,), (3, 2), (3,)]):
        ordered = [torch.cat([of[one] for one in line], dim=1) for of in parts]
        if causal:  # as one row in which the ancestors stand before
            wanted = dense_attention(*ordered, [ordered[0].shape[1]], causal=True)[:, -SEGMENTS[number] :]
        else:
            k_s, v_s = (t.repeat_interleave(4 // kv_heads, dim=0) for t in ordered[1:])
            wanted = (parts[0][number] @ k_s.transpose(1, 2) * 8**-0.5).softmax(-1) @ v_s
        assert (found[number] - wanted).abs().max() < 1e-12


def test_one_triangle_serves_all_segments_and_layers():
    segments = shared()
    masks = [segments.causal_mask(own, rows, torch.device("cpu")) for own, rows in ((5, 31), (17, 26), (5, 31))]
    assert len({m.untyped_storage().data_ptr() for m in masks}) == 1
    assert masks[0][0].tolist() == [True] * 27 + [False] * 4
    assert masks[1][-1].all()


def test_gradients_of_shared_slots_are_not_summed_in_half_precision():
    """200 leaves of one trunk: in bf16 every sum would be rounded 200 times."""
    lengths, parents = [1] * 200 + [3], [200] * 200 + [-1]
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(2, 203, 8, generator=generator).bfloat16() for _ in range(3)]
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        q, k, v = (r.to(dtype, copy=True).requires_grad_() for r in rows)
        segments = Segments(lengths, bounds(lengths), parents, *seen(lengths, parents))
        segment_attention(q, k, v, segments, causal=True).sum().backward()
        found.append(v.grad[:, 200:].double())
    assert (found[0] - found[1]).norm() / found[1].norm() < 3e-3


def test_segments_that_do_not_fill_the_row_are_an_error():
    q, k, v = draw(4)
    with pytest.raises(AssertionError, match="segments hold 31 slots, the row 32"):
        segment_attention(q, k, v, (5, 1, 17, 8), causal=True)


def test_verify_accepts_ours():
    assert verify() < 1e-5


def ignores_segments(q, k, v, segments, *, causal, scale=None):
    return dense_attention(q, k, v, [q.shape[1]], causal=causal, scale=scale)


def gives_no_number(q, k, v, segments, *, causal, scale=None):
    return dense_attention(q, k, v, segments, causal=causal, scale=scale) * float("nan")


def ignores_causality(q, k, v, segments, *, causal, scale=None):
    return dense_attention(q, k, v, segments, causal=False, scale=scale)


def always_causal(q, k, v, segments, *, causal, scale=None):
    return dense_attention(q, k, v, segments, causal=True, scale=scale)


def mixes_up_heads(q, k, v, segments, *, causal, scale=None):
    k, v = (t.repeat(q.shape[0] // t.shape[0], 1, 1) for t in (k, v))  # not repeat_interleave
    return dense_attention(q, k, v, segments, causal=causal, scale=scale)


def ignores_parents(q, k, v, segments, *, causal, scale=None):
    return dense_attention(q, k, v, tuple(segments), causal=causal, scale=scale)


def mask_at_top_left(q, k, v, segments, *, causal, scale=None):
    if not segments.lines:
        return dense_attention(q, k, v, segments, causal=causal, scale=scale)
    parts_q, *parts = (t.split(tuple(segments), dim=1) for t in (q, k, v))
    out = []
    for q_s, line in zip(parts_q, segments.lines, strict=True):
        rows = (t[None] for t in (q_s, *(torch.cat([of[one] for one in line], dim=1) for of in parts)))
        out.append(F.scaled_dot_product_attention(*rows, is_causal=True, scale=scale, enable_gqa=True)[0])
    return torch.cat(out, dim=1)


@pytest.mark.parametrize(
    "broken",
    [ignores_segments, ignores_causality, always_causal, mixes_up_heads, gives_no_number, ignores_parents,
     mask_at_top_left],
)  # fmt: skip
def test_verify_refuses_a_broken_kernel(broken, monkeypatch):
    monkeypatch.setattr(attention, "segment_attention", broken)
    with pytest.raises(AssertionError, match="differs from the dense reference"):
        verify()


@pytest.fixture
def asked():
    yield
    ask("auto")


def test_the_kernel_is_the_one_that_was_asked_for_and_auto_goes_by_device_and_dtype(asked):
    assert kernel("cuda", torch.bfloat16) == VARLEN
    assert kernel("cuda", torch.float32) == kernel("cpu", torch.bfloat16) == SDPA
    ask("sdpa")
    assert kernel("cuda", torch.bfloat16) == SDPA


def test_a_kernel_that_does_not_run_here_is_an_error_and_never_replaced(asked):
    ask("varlen")
    with pytest.raises(
        UserError, match=r"hardware.attention: varlen does not run on cpu in torch.float32 .*; write sdpa"
    ):
        verify()


def test_varlen_gets_what_it_needs_to_keep_segments_apart(asked, monkeypatch):
    """torch's kernel runs on GPUs alone; this stands for it by its documentation, so that what we hand over is held to
    the dense mask here too."""

    def documented(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert cu_q.dtype == torch.int32
        assert (q.shape[0], k.shape[0]) == (cu_q[-1], cu_k[-1])
        assert max_q == cu_q.diff().max()
        assert max_k == cu_k.diff().max()
        assert enable_gqa == (q.shape[1] != k.shape[1])
        causal = {(-1, 0): True, (-1, -1): False}[window_size]
        out = []
        for (q0, q1), (k0, k1) in zip(*(itertools.pairwise(cu.tolist()) for cu in (cu_q, cu_k)), strict=True):
            mask = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
            mask = mask.tril(k1 - k0 - (q1 - q0)) if causal else mask  # the last slots lie beside each other
            rows = (t.transpose(0, 1)[None] for t in (q[q0:q1], k[k0:k1], v[k0:k1]))
            out.append(F.scaled_dot_product_attention(*rows, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)[0])
        return torch.cat(out, dim=1).transpose(0, 1)

    monkeypatch.setattr(attention, "varlen_attn", documented)
    ask("varlen")
    assert verify() < 1e-5
    q, k, v = draw(2)
    for segments in (Segments(SEGMENTS, bounds(SEGMENTS)), shared()):
        found = segment_attention(q, k, v, segments, causal=True, scale=0.7)
        assert (found - dense_attention(q, k, v, segments, causal=True, scale=0.7)).abs().max() < 1e-12


def test_verify_sees_a_wrong_gradient(monkeypatch):
    def detached(q, k, v, segments, *, causal, scale=None):
        return dense_attention(q, k.detach() + 0 * k, v, segments, causal=causal, scale=scale)

    monkeypatch.setattr(attention, "segment_attention", detached)
    with pytest.raises(AssertionError, match="differs from the dense reference"):
        verify()


def test_verify_holds_half_precision_to_float32():
    assert verify(dtype=torch.bfloat16) < 1e-2
