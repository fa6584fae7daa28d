"""The same clips as public fine-tuning tools lay them out: padded batches, on the weights of an AudioLM.

Batched encoder with a key mask in its 10.08-s chunks, the stock decoder of transformers on its own sdpa with an
attention mask (padding on the right), logits of every slot. Exact: losses and gradients are those of the packs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.plan import seconds
from midasheng import frames
from midasheng.model import attention
from midasheng.model.audio_lm import AudioLM
from midasheng.model.encoder import AMIN, TOP_DB, DashengEncoder
from midasheng.model.loss import target_loss
from midasheng.sample import NO_TARGET, Sample

PAD, AUDIO, PROMPT = 0, 1, 22


def draw(count: int, vocabulary: int, seed: int, before: int = PROMPT, questions: int = 1) -> list[Sample]:
    """Clips of noise with the lengths of the report's Figure 3, one of each of `count` equal shares of it in random
    order; 22 slots of prompt, 8 to 36 answered.

    `before`: how many slots of the prompt stand before the audio, equal in all samples. `questions`: conversations
    about each clip, a run that shares all up to the audio's end.
    """
    rng = np.random.default_rng(seed)
    prompt = np.random.default_rng(99).integers(2, vocabulary, PROMPT)
    lengths = np.sort(seconds("report", 100 * count, rng))[50::100]
    samples = []
    for number, length in enumerate(rng.permutation(lengths)):
        clip = (0.1 * rng.standard_normal(int(length * frames.SAMPLE_RATE))).astype(np.float32)
        tokens = frames.audio_tokens(len(clip))
        for question in range(questions):
            answer = int(rng.integers(8, 37))
            ids = rng.integers(2, vocabulary, PROMPT + tokens + answer)
            ids[:before] = prompt[:before]
            ids[before : before + tokens] = AUDIO
            labels = np.append(ids[1:], NO_TARGET)
            labels[: len(ids) - answer - 1] = NO_TARGET
            clips, common = ((), before + tokens) if question else ((clip,), 0)
            key = f"{number}.{question}"
            samples.append(Sample("noise", key, "caption", ids, labels, ids == AUDIO, clips, common))
    return samples


@dataclass(frozen=True)
class Padded:
    """A batch of one clip each, padded to the longest or to a fixed length; what holds something, per row or slot."""

    wave_BL: Tensor  # reflected at both ends of each clip, as centred windows want; zeros behind
    mels_B: Tensor
    ids_BT: Tensor
    labels_BT: Tensor
    is_audio_BT: Tensor
    holds_BT: Tensor


def collate(samples: Sequence[Sample], least_s: float = 0.0) -> Padded:
    """`least_s`: every clip is padded to at least so many seconds, its audio slots too."""
    clips = [torch.from_numpy(s.clips[0]) for s in samples]
    longest = max(int(least_s * frames.SAMPLE_RATE), *map(len, clips))
    text = max(len(s.ids) - int(s.is_audio.sum()) for s in samples)
    slots = text + frames.audio_tokens(longest) if least_s else max(len(s.ids) for s in samples)
    wave_BL = torch.zeros(len(clips), longest + frames.N_FFT)
    for row, clip in zip(wave_BL, clips, strict=True):
        row[: len(clip) + frames.N_FFT] = F.pad(clip[None], (frames.N_FFT // 2,) * 2, mode="reflect")[0]

    def rows(values: list[Any], fill: int) -> Tensor:
        return torch.stack([F.pad(torch.as_tensor(v), (0, slots - len(v)), value=fill) for v in values])

    return Padded(
        wave_BL, torch.tensor([frames.mel_frames(len(c)) for c in clips]), rows([s.ids for s in samples], PAD),
        rows([s.labels for s in samples], NO_TARGET), rows([s.is_audio for s in samples], 0),
        rows([np.ones(len(s.ids), bool) for s in samples], 0),
    )  # fmt: skip


def first(counts_B: Tensor, size: int) -> Tensor:
    """(rows, size) bool: the first `counts_B` of each row."""
    return torch.arange(size) < counts_B[:, None]


def encode(encoder: DashengEncoder, batch: Padded) -> Tensor:
    """Frames (batch, frames, width); those behind a clip's end hold nothing of use."""
    window, bank = encoder.log_mel.tables(batch.wave_BL.device)
    spectrum = torch.stft(
        batch.wave_BL, frames.N_FFT, frames.HOP, window=window, center=False, return_complex=True
    )  # fmt: skip
    decibel = 10.0 * torch.log10((bank.T @ spectrum.abs().square()).clamp(min=AMIN))
    outside = ~first(batch.mels_B, decibel.shape[2])
    loudest = decibel.masked_fill(outside[:, None], -torch.inf).amax((1, 2), keepdim=True)
    decibel = decibel.maximum(loudest - TOP_DB)[..., : decibel.shape[2] // frames.PATCH * frames.PATCH]
    mel = encoder.init_bn(decibel.transpose(0, 1).flatten(1))
    x = encoder.patch_embed(mel).unflatten(0, (len(batch.wave_BL), -1))
    positions = (encoder.time_pos_embed + encoder.freq_pos_embed)[0, :, 0].T
    x = x + positions.index_select(0, torch.arange(x.shape[1]) % frames.CHUNK)
    seen = first(batch.mels_B // frames.PATCH, x.shape[1])
    masks: list[Tensor | None] = [None] * len(frames.chunks(x.shape[1]))
    if not seen.all():  # a clip that ends before a chunk sees its first frame there, so that no softmax is empty
        masks = [(m | first(torch.ones(len(m)), m.shape[1]))[:, None, None] for m in seen.split(frames.CHUNK, dim=1)]
    for block in encoder.blocks:
        qkv = block.attn.qkv(block.norm1(x)).view(*x.shape[:2], 3, block.attn.heads, -1).permute(2, 0, 3, 1, 4)
        parts = [
            F.scaled_dot_product_attention(*part, attn_mask=mask)
            for part, mask in zip(qkv.split(frames.CHUNK, dim=3), masks, strict=True)
        ]
        x = x + block.attn.proj(torch.cat(parts, dim=2).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x).flatten(0, 1)).view_as(x)
    out: Tensor = encoder.norm(x)
    return out


def loss(lm: AudioLM, batch: Padded, full_logits: bool = True) -> Tensor:
    """Summed cross-entropy of the batch. `full_logits`: of every slot, as stock models make them, else our head.

    Wants `stock_attention`.
    """
    x = encode(lm.audio_encoder, batch)
    groups = x[:, : x.shape[1] // frames.STACK * frames.STACK].reshape(len(x), -1, frames.STACK * x.shape[2])
    tokens = lm.audio_projector.net(groups)[first(batch.mels_B // frames.PATCH // frames.STACK, groups.shape[1])]
    embeds = lm.decoder.model.embed_tokens(batch.ids_BT.masked_fill(batch.is_audio_BT, 0))
    hidden = lm.decoder.model(
        inputs_embeds=embeds.masked_scatter(batch.is_audio_BT[..., None], tokens), use_cache=False,
        attention_mask=None if batch.holds_BT.all() else batch.holds_BT.long(),
    ).last_hidden_state  # fmt: skip
    if full_logits:
        logits = lm.decoder.lm_head(hidden)
        return F.cross_entropy(logits.flatten(0, 1), batch.labels_BT.flatten(), reduction="sum")
    asked = batch.labels_BT != NO_TARGET
    return target_loss(hidden[asked], lm.decoder.lm_head.weight, batch.labels_BT[asked]).sum()


@contextmanager
def stock_attention(lm: AudioLM) -> Iterator[None]:
    """The decoder as transformers ships it, on torch's sdpa, for as long as the context lasts."""
    lm.decoder.model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        lm.decoder.model.set_attn_implementation(attention.NAME)
