"""Useful floating-point operations of a pack, forward and backward: no padding, no recomputation.

A matrix product of N rows with a weight costs 2 N in out forward, the same again for the gradient of its input where
one is wanted, and again for that of the weight where it is trained. So a frozen decoder that a gradient passes through
costs 4 a parameter and slot, a trained one 6, and nothing is counted below the lowest thing that learns.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from midasheng import frames
from midasheng.model.audio_lm import AudioLM
from midasheng.sample import Pack, lineages

# dense FLOP/s of the tensor cores in bf16 and of the cores in fp32 (TF32 off), NVIDIA's data sheets
PEAKS = {
    "H200": (989e12, 67e12), "H100": (989e12, 67e12), "H800": (989e12, 67e12), "A100": (312e12, 19.5e12),
    "A800": (312e12, 19.5e12), "L40S": (362e12, 91.6e12),
}  # fmt: skip


def peak(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """(FLOP/s of a device, where the number is from): a data sheet, else the best of a few matrix products."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, (bf16, fp32) in PEAKS.items():
            if known in name:
                return (fp32 if dtype == torch.float32 else bf16), f"data sheet of {known}, {dtype}"
    n, best = 8192 if device.type == "cuda" else 1024, float("inf")
    a, b = (torch.rand(n, n, device=device, dtype=dtype) for _ in range(2))
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * n**3 / best, f"measured, product of {n} x {n} {dtype}"


@dataclass(frozen=True)
class Cost:
    """FLOPs of one more of each; a pack's are linear in them."""

    frame: float  # encoder
    chunk_squared: float  # encoder attention, of a chunk's frames squared
    token: float  # projector, of an audio token
    slot: float  # decoder
    segment_squared: float  # decoder attention, of a slot and one it may see (causal counts as the full square)
    target: float  # head

    def of(self, pack: Pack) -> dict[str, float]:
        """Part -> useful FLOPs of a pack: its real segments, shared ones once, the slots that have a target."""
        n_frames = [frames.frames(n) for n in pack.clips]
        squares = sum(length**2 for n in n_frames for length in frames.chunks(n))
        real = pack.real
        lines = lineages(pack.parents[: len(real)])
        pairs = sum(n * sum(real[i] for i in line) for n, line in zip(real, lines, strict=True))
        return {
            "encoder": self.frame * sum(n_frames) + self.chunk_squared * squares,
            "projector": self.token * len(pack.audio_K),
            "decoder": self.slot * sum(real) + self.segment_squared * pairs,
            "head": self.target * sum(pack.targets),
        }


def cost(lm: AudioLM) -> Cost:
    """What training costs with the parts that learn now, and the LoRA that is there."""
    frame, square, grad = _encoder(lm.audio_encoder)
    token = 0.0
    for layer in (lm.audio_projector.net[0], lm.audio_projector.net[2]):
        flops, grad = _linear(layer, grad)
        token += flops
    embeds = _learns(lm.decoder.model.embed_tokens) or "embedding" in lm.decoder.added
    slot, segment, grad = _decoder(lm.decoder.model, grad or embeds)
    target, _ = _linear(lm.decoder.lm_head, grad)
    return Cost(frame, square, token, slot, segment, target)


def _learns(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _linear(layer: Any, grad: bool) -> tuple[float, bool]:
    """(FLOPs of a row, does its output want a gradient) of a linear layer, with its LoRA; `grad`: does its input?"""
    base = getattr(layer, "base_layer", layer)
    flops = 2.0 * base.weight.numel() * (1 + grad + base.weight.requires_grad)
    out = grad or _learns(base)
    for adapter in getattr(layer, "lora_A", {}):
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        flops += 2.0 * down.numel() * (1 + grad + down.requires_grad)
        middle = grad or down.requires_grad
        flops += 2.0 * up.numel() * (1 + middle + up.requires_grad)
        out = out or middle or up.requires_grad
    return flops, out


def _attention(width: int, q: bool, k: bool, v: bool) -> float:
    """FLOPs per squared length of attention with heads of `width` in all; which of its inputs want a gradient."""
    return 2.0 * width * (2 + (q or k) + v + q + k)


def _encoder(encoder: Any) -> tuple[float, float, bool]:
    """(FLOPs a frame, a squared chunk, does the output want a gradient)."""
    per_frame = 2.0 * frames.PATCH * frames.N_MELS * (frames.N_FFT // 2 + 1)  # the mel filterbank, never backward
    per_square = 0.0
    grad = _learns(encoder.init_bn)
    weight = encoder.patch_embed.proj.weight
    per_frame += 2.0 * weight.numel() * (1 + grad + weight.requires_grad)
    grad = grad or _learns(encoder.patch_embed)
    grad = grad or encoder.time_pos_embed.requires_grad or encoder.freq_pos_embed.requires_grad
    for block in encoder.blocks:
        flops, heads = _linear(block.attn.qkv, grad or _learns(block.norm1))
        per_frame += flops
        per_square += _attention(encoder.shape.dim, heads, heads, heads)
        flops, out = _linear(block.attn.proj, heads)
        per_frame, grad = per_frame + flops, grad or out
        flops, middle = _linear(block.mlp.fc1, grad or _learns(block.norm2))
        per_frame += flops
        flops, out = _linear(block.mlp.fc2, middle)
        per_frame, grad = per_frame + flops, grad or out
    return per_frame, per_square, grad or _learns(encoder.norm)


def _decoder(model: Any, grad: bool) -> tuple[float, float, bool]:
    """(FLOPs a slot, a squared segment, does the output want a gradient) of a Llama-like text model."""
    per_slot = per_square = 0.0
    for layer in model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        inner = grad or _learns(layer.input_layernorm)
        wants = {}
        for name in ("q", "k", "v"):
            flops, wants[name] = _linear(getattr(attention, f"{name}_proj"), inner)
            norm = getattr(attention, f"{name}_norm", None)  # Qwen3
            wants[name] = wants[name] or (norm is not None and _learns(norm))
            per_slot += flops
        width = getattr(attention.o_proj, "base_layer", attention.o_proj).in_features
        per_square += _attention(width, wants["q"], wants["k"], wants["v"])
        flops, out = _linear(attention.o_proj, any(wants.values()))
        per_slot, grad = per_slot + flops, grad or out
        inner = grad or _learns(layer.post_attention_layernorm)
        gate, gate_wants = _linear(mlp.gate_proj, inner)
        up, up_wants = _linear(mlp.up_proj, inner)
        down, out = _linear(mlp.down_proj, gate_wants or up_wants)
        per_slot, grad = per_slot + gate + up + down, grad or out
    return per_slot, per_square, grad or _learns(model.norm)
