"""The lean loss is plain cross-entropy, value and gradients, and never holds all logits."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from midasheng.model import loss
from midasheng.model.loss import target_loss, verify


def made(n: int = 37, width: int = 16, vocabulary: int = 50, dtype=torch.float64, seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, width, generator=draw, dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=draw, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (n,), generator=draw)


def plain(hidden, weight, labels):
    return F.cross_entropy((hidden @ weight.T).double(), labels, reduction="none")


@pytest.mark.parametrize("rows", [1, 5, 36, 37, 100])
@pytest.mark.parametrize(("by_hidden", "by_weight"), [(True, True), (True, False), (False, True), (False, False)])
def test_value_and_gradients_are_those_of_plain_cross_entropy(monkeypatch, rows, by_hidden, by_weight):
    monkeypatch.setattr(loss, "CHUNK", rows * 50)
    hidden, weight, labels = made()
    hidden.requires_grad_(by_hidden)
    weight.requires_grad_(by_weight)
    lean, wanted = target_loss(hidden, weight, labels), plain(hidden, weight, labels)
    torch.testing.assert_close(lean, wanted, rtol=1e-12, atol=1e-12)
    assert lean.requires_grad == (by_hidden or by_weight)
    if not lean.requires_grad:
        return
    of = [t for t in (hidden, weight) if t.requires_grad]
    each = torch.linspace(-1, 2, len(lean), dtype=torch.float64)  # rows may weigh differently
    for got, expected in zip(
        torch.autograd.grad((lean * each).sum(), of), torch.autograd.grad((wanted * each).sum(), of), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 5, 37, 100])
@pytest.mark.parametrize("by_hidden", [True, False])
def test_rows_of_a_frozen_head_learn_alone(monkeypatch, rows, by_hidden):
    """Against plain cross-entropy on the head with these rows put into it."""
    monkeypatch.setattr(loss, "CHUNK", rows * 50)
    hidden, weight, labels = made()
    labels[:5] = torch.arange(46, 51) - 1  # some targets are added tokens
    hidden.requires_grad_(by_hidden)
    weight.requires_grad_(False)
    own = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    lean = target_loss(hidden, weight, labels, None, own, slice(46, 49))
    wanted = plain(hidden, torch.cat([weight[:46], own, weight[49:]]), labels)
    torch.testing.assert_close(lean, wanted, rtol=1e-12, atol=1e-12)
    of = [hidden, own] if by_hidden else [own]
    each = torch.linspace(-1, 2, len(lean), dtype=torch.float64)
    for got, expected in zip(
        torch.autograd.grad((lean * each).sum(), of), torch.autograd.grad((wanted * each).sum(), of), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_large_logits_do_not_overflow():
    hidden, weight, labels = made(dtype=torch.float32)
    lean = target_loss(hidden * 1e3, weight, labels)
    torch.testing.assert_close(lean.double(), plain(hidden * 1e3, weight, labels), rtol=1e-5, atol=1e-2)
    assert torch.autograd.grad(lean.sum(), hidden)[0].isfinite().all()


def test_no_rows():
    hidden, weight, labels = made(0)
    lean = target_loss(hidden, weight, labels)
    assert lean.shape == (0,)
    by_hidden, by_weight = torch.autograd.grad(lean.sum(), (hidden, weight))
    assert by_hidden.shape == (0, 16)
    assert not by_weight.any()


@pytest.mark.parametrize("frozen", [torch.float32, torch.bfloat16])
def test_under_bf16_the_value_is_float32(frozen):
    """Products in bf16, as autocast takes them; the reported loss is not rounded to three digits."""
    hidden, weight, labels = made(200, 64, 500, dtype=torch.float32)
    weight = weight.detach().to(frozen)
    lean = target_loss(hidden, weight, labels, torch.bfloat16)
    assert lean.dtype == torch.float32
    rounded = (hidden.bfloat16() @ weight.bfloat16().T).float()
    torch.testing.assert_close(lean, F.cross_entropy(rounded, labels, reduction="none"), rtol=1e-6, atol=1e-6)
    (slope,) = torch.autograd.grad(lean.sum(), hidden)
    (wanted,) = torch.autograd.grad(plain(hidden, weight.float(), labels).sum(), hidden)
    assert slope.dtype == torch.float32
    assert (slope - wanted).norm() < 0.02 * wanted.norm()


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_all_logits_are_never_there_at_once(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", 8 * 500)
    hidden, weight, labels = made(100, 16, 500)
    for way, bound in ((target_loss, 500 * 16), (plain, 100 * 500)):
        with Largest() as largest:
            way(hidden, weight, labels).sum().backward()
        assert largest.elements == bound, way  # the head itself is the largest thing


def test_the_loss_is_held_to_the_plain_one_before_training(monkeypatch):
    assert verify() < 1e-6
    assert verify(dtype=torch.bfloat16) < 2e-2
    right = loss._loss_and_slope
    monkeypatch.setattr(loss, "_loss_and_slope", lambda x, y: (right(x.clone(), y)[0], x.softmax(1)))
    with pytest.raises(AssertionError, match="chunked loss"):
        verify()
    monkeypatch.setattr(loss, "_loss_and_slope", lambda x, y: (right(x.clone(), y)[0], x * float("nan")))
    with pytest.raises(AssertionError, match="by nan"):
        verify()
