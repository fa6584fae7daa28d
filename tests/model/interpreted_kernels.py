"""Liger's real kernels on a CPU, through Triton's interpreter; run by test_kernels.py in a process of its own.

In float32 only: the interpreter multiplies bfloat16 as if it were integers. Two things that a GPU's compiler does are
done for it here: scalars become tensors (the kernels say eps.to), and rsqrt is not looked up in CUDA's library.
"""

import re

import numpy as np
import pytest
import torch
import triton.language as tl
from liger_kernel.ops import rms_norm
from torch.nn import functional as F
from triton.runtime import interpreter

from midasheng import config
from midasheng.model import adapt, kernels, sources
from midasheng.train import fit
from tests.model import CONFIGS, FIELDS, LLAMA, OMNI, QWEN3, conversation, gradients, packed, tiny_lm

FAMILIES = pytest.mark.parametrize("architecture", [OMNI, QWEN3, LLAMA])
_plain_scalar = interpreter._implicit_cvt


def _scalar(arg):
    if isinstance(arg, float):
        return tl.tensor(interpreter.TensorHandle(np.array([arg], dtype=np.float32), tl.float32), tl.float32)
    return _plain_scalar(arg)


interpreter._implicit_cvt = _scalar
rms_norm.rsqrt = lambda x: tl.rsqrt(x)


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch):
    monkeypatch.setattr(kernels, "_refuse", lambda config, device: None)
    monkeypatch.setattr(kernels, "MANY_ROWS", 3)  # 15 seconds otherwise


def row():
    """Short: the interpreter goes through it slot by slot."""
    return packed(conversation(0), conversation(1, 5_000), tail=2)


def with_lora(lm):
    """The decoder frozen, LoRA on all of its linear layers, with numbers that are not zero."""
    adapt.freeze_all_but(lm, ["audio_encoder.*", "audio_projector.*"])
    adapt.add_lora(lm, adapt.LoraPlan(("all-linear",), 4, 8.0, 0.0), seed=1)
    draw = torch.Generator().manual_seed(2)
    for name, p in lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1, generator=draw)
    return lm


def worst(architecture, *, lora: bool, recompute: bool = False) -> float:
    """Largest relative difference of the losses and of any gradient, with Liger and without."""
    rows, found = [row()], []
    for fused in (False, True):
        lm = tiny_lm(architecture)
        if lora:
            with_lora(lm)
        if recompute:
            lm.recompute(["audio_encoder"] if lora else ["audio_encoder", "decoder"])
        if fused:
            kernels.fuse(lm.decoder.model)
        with torch.no_grad():
            losses = lm(rows[0])[:-1]
        learn = {n for n, p in lm.named_parameters() if p.requires_grad}
        assert any("lora_" in n for n in learn) == lora
        found.append((losses, {n: g for n, g in gradients(lm, rows).items() if n in learn}))
    (losses, wanted), (fused_losses, got) = found
    assert set(got) == set(wanted)
    largest = [((fused_losses - losses).abs() / losses).max()]
    for name, gradient in got.items():
        if name.endswith("k_proj.bias"):
            continue  # softmax is blind to it within a segment: nothing but rounding
        assert gradient is not None, f"{name} gets no gradient"
        largest.append((gradient - wanted[name]).norm() / wanted[name].norm())
    return float(torch.stack(largest).max())


@FAMILIES
@pytest.mark.parametrize("lora", [False, True], ids=["everything learns", "LoRA on a frozen decoder"])
def test_loss_and_gradients_are_those_of_the_plain_decoder(architecture, lora):
    assert worst(architecture, lora=lora) < 1e-5


def test_recomputed_too():
    assert worst(LLAMA, lora=False, recompute=True) < 1e-5


def test_lora_that_is_passed_by_would_be_seen(monkeypatch):
    def without(self, x):
        from liger_kernel.ops import LigerSiLUMulFunction

        gate, up, down = (m.base_layer.weight for m in (self.gate_proj, self.up_proj, self.down_proj))
        return F.linear(LigerSiLUMulFunction.apply(F.linear(x, gate), F.linear(x, up)), down)

    monkeypatch.setattr(kernels, "_mlp", without)
    with pytest.raises(AssertionError, match=r"lora_.* gets no gradient"):
        worst(LLAMA, lora=True)


def test_names_and_tensors_stay_as_they_are():
    plain, fused = with_lora(tiny_lm()), with_lora(tiny_lm())
    kernels.fuse(fused.decoder.model)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in plain.named_modules()]
    for state in (adapt.base_state, adapt.lora_state):
        assert sources.part_digests(state(fused)) == sources.part_digests(state(plain))


@FAMILIES
def test_verified_before_training(architecture):
    assert kernels.verify(architecture, FIELDS[architecture], "cpu", torch.float32) < 1e-5


def no_eps(self, x):
    return rms_norm.LigerRMSNormFunction.apply(x, self.weight, 0.0, 0.0, "llama", False, None)


def exchanged(self, x):
    from liger_kernel.ops import LigerSiLUMulFunction

    return self.down_proj(LigerSiLUMulFunction.apply(self.up_proj(x), self.gate_proj(x)))


def no_gradient(self, x):
    return rms_norm.LigerRMSNormFunction.apply(x.detach(), self.weight, self.variance_epsilon, 0.0, "llama", False, None) + 0 * x  # fmt: skip


def not_a_number(self, x):
    return self.down_proj(self.gate_proj(x) * self.up_proj(x)) * float("nan")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("_norm", no_eps), ("_mlp", exchanged), ("_norm", no_gradient), ("_mlp", not_a_number)],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_verify_sees_a_wrong_kernel(monkeypatch, name, wrong):
    monkeypatch.setattr(kernels, name, wrong)
    with pytest.raises(AssertionError, match="differs from the plain one"):
        kernels.verify(QWEN3, FIELDS[QWEN3], "cpu", torch.float32)


def test_a_frozen_norm_makes_no_weight_gradient(monkeypatch):
    asked, plain = [], rms_norm.rms_norm_backward

    def backward(*args, needs_dw=None):
        asked.append(needs_dw)
        return plain(*args, needs_dw=needs_dw)

    monkeypatch.setattr(rms_norm, "rms_norm_backward", backward)
    lm = with_lora(tiny_lm())
    kernels.fuse(lm.decoder.model)
    found = gradients(lm, [row()])
    assert asked == [False] * kernels.counts(lm.decoder.config)[0]
    assert found["audio_projector.net.0.weight"].any()  # through every norm down to the audio


def test_the_header_of_a_run_names_it():
    stage = config.load(CONFIGS / "stage1_align.yaml", "mini", ["hardware.liger=true"], CONFIGS).stage
    text = fit.verified(stage)
    assert re.search(r"RMSNorm and SwiGLU of the decoder: Liger \(against the plain ones: \d+e-0[678]\); blocks", text)
