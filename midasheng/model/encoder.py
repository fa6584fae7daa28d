"""The Dasheng audio encoder on packed clips: log-mel, stored BatchNorm, patches, ViT blocks in 10.08 s chunks.

Parameter names and arithmetic are those of the released `audio_encoder` (MiDashengLM) and of the `dasheng` package's
model, which the tests hold this file to, clip by clip. No clip is padded: they lie end to end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torchaudio
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from midasheng import frames
from midasheng.config import UserError
from midasheng.model.attention import Segments, segment_attention
from midasheng.sample import bounds

AMIN, TOP_DB = 1e-10, 120.0
PIECE = 16_384  # mel frames (164 s) that are transformed at a time: spectra are large, and each frame has its own


@dataclass(frozen=True)
class EncoderShape:
    """Widths of a Dasheng encoder. Released sizes: base 768/12/12, 0.6B 1280/32/16, 1.2B 1536/40/24."""

    dim: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0


class LogMel:
    """Log-mel spectrogram of single clips in float32, equal to torchaudio's MelSpectrogram and AmplitudeToDB per clip.

    No buffers: the window and the filterbank are made when first used on a device, so no way of loading weights can
    leave them uninitialised (seen in transformers 5). top_db is taken per clip, never over a batch.
    """

    def __init__(self) -> None:
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(window (512,), filterbank (257, 64)) on `device`, float32."""
        if device not in self._tables:
            with torch.device("cpu"):
                window = torch.hann_window(frames.N_FFT, periodic=True)
                bank = torchaudio.functional.melscale_fbanks(
                    n_freqs=frames.N_FFT // 2 + 1, f_min=0.0, f_max=8000.0, n_mels=frames.N_MELS,
                    sample_rate=frames.SAMPLE_RATE, norm=None, mel_scale="htk",
                )  # fmt: skip
            self._tables[device] = window.to(device), bank.to(device)
        return self._tables[device]

    def __call__(self, clip_L: Float[Tensor, " L"]) -> Float[Tensor, "64 M"]:
        """One clip, 16 kHz, at least 257 samples (reflected at its ends) -> decibels (64, mel frames)."""
        window, bank = self.tables(clip_L.device)
        with torch.autocast(clip_L.device.type, enabled=False):
            edge = frames.N_FFT // 2
            padded = F.pad(clip_L.float()[None], (edge, edge), mode="reflect")[0]
            mels, total = [], frames.mel_frames(len(clip_L))
            for start in range(0, total, PIECE):
                last = min(start + PIECE, total) - 1
                samples = padded[start * frames.HOP : last * frames.HOP + frames.N_FFT]
                spectrum = torch.stft(
                    samples, frames.N_FFT, frames.HOP, window=window, center=False, return_complex=True
                )
                mels.append(bank.T @ spectrum.abs().square())
            mel = torch.cat(mels, dim=1)
            decibel = 10.0 * torch.log10(mel.clamp(min=AMIN))
            return decibel.clamp(min=decibel.max() - TOP_DB)


class StoredBatchNorm(nn.Module):
    """BatchNorm over the mel bins that always normalises with its stored statistics, also in training.

    With batch statistics packing would change a clip's features, and a "frozen" encoder would drift. The affine part
    learns. State dict as nn.BatchNorm2d's (`audio_encoder.init_bn.*`).
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    eps = 1e-5

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(bins))
        self.bias = nn.Parameter(torch.zeros(bins))
        self.register_buffer("running_mean", torch.zeros(bins))
        self.register_buffer("running_var", torch.ones(bins))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def forward(self, mel: Float[Tensor, "64 M"]) -> Float[Tensor, "64 M"]:
        """Normalise each bin of (64, mel frames)."""
        with torch.autocast(mel.device.type, enabled=False):
            scale = self.weight.float() * torch.rsqrt(self.running_var.float() + self.eps)
            return (mel - self.running_mean.float()[:, None]) * scale[:, None] + self.bias.float()[:, None]

    @torch.no_grad()
    def calibrate(self, mels: Iterable[Tensor]) -> int:
        """Set the statistics of a fresh encoder from log-mels (64, M) of single clips; returns the number of frames. A
        clip whose power overflows would make every step NaN: it is left out, and told by the step that trains on it."""
        count, total, square = 0, torch.zeros(()), torch.zeros(())
        for mel in filter(lambda mel: bool(mel.isfinite().all()), mels):
            count += mel.shape[1]
            total = total + mel.double().sum(1)
            square = square + mel.double().square().sum(1)
        if count < 2:
            raise UserError("calibration of audio_encoder.init_bn saw no audio; does the mix hold any clip?")
        mean = total / count
        self.running_mean.copy_(mean)
        self.running_var.copy_((square - count * mean.square()) / (count - 1))
        self.num_batches_tracked.fill_(1)
        return count


class Attention(nn.Module):
    """Bidirectional attention inside chunks; joint qkv as in the released checkpoint."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_FE: Float[Tensor, "F E"], chunks: Segments) -> Float[Tensor, "F E"]:
        """Attention inside each of the chunks that lie end to end in x_FE."""
        q, k, v = self.qkv(x_FE).view(len(x_FE), 3, self.heads, -1).permute(1, 2, 0, 3)
        out = segment_attention(q, k, v, chunks, causal=False)
        return self.proj(out.transpose(0, 1).reshape(x_FE.shape))


class Mlp(nn.Module):
    """Linear, erf GELU, Linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x_FE: Float[Tensor, "F E"]) -> Float[Tensor, "F E"]:
        """Frame by frame."""
        return self.fc2(F.gelu(self.fc1(x_FE)))


class Block(nn.Module):
    """Pre-norm transformer block, LayerNorm eps 1e-6."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.dim, eps=1e-6)
        self.attn = Attention(shape.dim, shape.heads)
        self.norm2 = nn.LayerNorm(shape.dim, eps=1e-6)
        self.mlp = Mlp(shape.dim, int(shape.dim * shape.mlp_ratio))

    def forward(self, x_FE: Float[Tensor, "F E"], chunks: Segments) -> Float[Tensor, "F E"]:
        """Frames of all clips end to end, cut into `chunks`."""
        x_FE = x_FE + self.attn(self.norm1(x_FE), chunks)
        return x_FE + self.mlp(self.norm2(x_FE))


class PatchEmbed(nn.Module):
    """Conv2d over (64 mel bins, 4 mel frames), both as kernel and stride."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        patch = (frames.N_MELS, frames.PATCH)
        self.proj = nn.Conv2d(1, dim, kernel_size=patch, stride=patch)

    def forward(self, mel: Float[Tensor, "64 M"]) -> Float[Tensor, "F E"]:
        """(64, mel frames) -> frames; as a matrix product, since the convolution's backward on a CPU takes ten times as
        long."""
        patches = mel.unflatten(1, (-1, frames.PATCH)).transpose(0, 1).flatten(1)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class DashengEncoder(nn.Module):
    """Waveforms -> frames at 25 Hz. 630,333,568 parameters at 1280/32/16 (Dasheng-0.6B)."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.recompute = False  # activations of the blocks in the backward pass
        self.log_mel = LogMel()
        self.init_bn = StoredBatchNorm(frames.N_MELS)
        self.patch_embed = PatchEmbed(shape.dim)
        self.time_pos_embed = nn.Parameter(torch.randn(1, shape.dim, 1, frames.CHUNK) * 0.02)
        self.freq_pos_embed = nn.Parameter(torch.randn(1, shape.dim, 1, 1) * 0.02)
        self.blocks = nn.ModuleList([Block(shape) for _ in range(shape.depth)])
        self.norm = nn.LayerNorm(shape.dim, eps=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):  # as dasheng/train/models.py
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(
        self, audio_L: Float[Tensor, " L"], clips: Sequence[int], chunks: Segments | None = None
    ) -> Float[Tensor, "F E"]:
        """audio_L: clips of `clips` samples end to end. Returns the frames of all clips end to end; clip i has
        frames.frames(clips[i]) of them, and none depends on any other clip. `chunks`: the windows of all clips in
        frames, and behind them dummies for frames of silence that fill a fixed shape."""
        n_frames = [frames.frames(n) for n in clips]
        if chunks is None:
            lengths = [length for n in n_frames for length in frames.chunks(n)]
            chunks = Segments(lengths, bounds(lengths).to(audio_L.device))
        total = sum(chunks)
        mels = [
            self.log_mel(clip)[:, : n * frames.PATCH]
            for clip, n in zip(audio_L[: sum(clips)].split(list(clips)), n_frames, strict=True)
        ]
        empty = audio_L.new_zeros(frames.N_MELS, (total - sum(n_frames)) * frames.PATCH)
        return self.encode(torch.cat([*mels, empty], dim=1), chunks)

    def encode(self, mel: Float[Tensor, "64 M"], chunks: Segments) -> Float[Tensor, "F E"]:
        """Log-mels of whole frames end to end -> frames; none depends on any other chunk."""
        x_FE = self.patch_embed(self.init_bn(mel))
        total = len(x_FE)
        starts_F = torch.repeat_interleave(chunks.bounds[:-1], chunks.bounds.diff(), output_size=total)
        place = torch.arange(total, device=mel.device) - starts_F
        positions = (self.time_pos_embed + self.freq_pos_embed)[0, :, 0].T
        # not positions[place]: its backward adds in the order in which CPU threads arrive, so no two runs are equal
        x_FE = x_FE + positions.index_select(0, place)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x_FE = checkpoint(block, x_FE, chunks, use_reentrant=False)
            else:
                x_FE = block(x_FE, chunks)
        return self.norm(x_FE)
