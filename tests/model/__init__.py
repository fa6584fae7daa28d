"""Small models, conversations and packs that the tests of the model room share."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchaudio
from dasheng.pretrained.pretrained import Dasheng
from torch import Tensor, nn

from midasheng import config, frames
from midasheng.model.audio_lm import AudioLM
from midasheng.model.encoder import DashengEncoder, EncoderShape
from midasheng.sample import NO_TARGET, Pack, Sample, pack

CONFIGS = Path(__file__).parents[2] / "configs"
OMNI, QWEN3, LLAMA = "qwen2_5_omni_text", "qwen3", "llama"
TINY = EncoderShape(32, 2, 2)
VOCAB, PAD, AUDIO, BOS, EOS = 64, 0, 1, 2, 3
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "max_position_embeddings": 512, "tie_word_embeddings": False,
    "initializer_range": 0.2,  # at the usual 0.02 attention is so flat that a leak would drown in rounding
}  # fmt: skip
FIELDS: dict[str, dict[str, Any]] = {
    OMNI: COMMON | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    QWEN3: COMMON | {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    LLAMA: COMMON | {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
}


@torch.no_grad()
def lively(module: nn.Module, seed: int) -> None:
    """Shake what starts at exactly 0 or 1 (biases, norms), so that a forgotten one shows; statistics of real mels."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter += 0.2 * torch.randn(parameter.shape, generator=draw)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(-20 + 10 * torch.rand(buffer.shape, generator=draw))
        if name.endswith("running_var"):
            buffer.copy_(100 + 300 * torch.rand(buffer.shape, generator=draw))


def tiny_lm(architecture: str = OMNI, seed: int = 0, **fields: object) -> AudioLM:
    """A whole AudioLM of about 100,000 parameters, everything learning, in training mode."""
    torch.manual_seed(seed)
    lm = AudioLM(TINY, architecture, FIELDS[architecture] | fields)
    lively(lm, seed)
    return lm


def mel_tables() -> dict[str, Tensor]:
    """The two tables of the mel front end that the 0804-fp32 release stores, as torchaudio makes them."""
    front_end = torchaudio.transforms.MelSpectrogram(
        16_000, n_fft=512, win_length=512, hop_length=160, f_min=0, f_max=8000, n_mels=64
    )
    return {f"audio_encoder.front_end.0.{name}": table for name, table in front_end.state_dict().items()}


def at_scale(scale: str, *settings: str) -> AudioLM:
    """The model of a scale on the meta device: shapes and names, no memory."""
    model = config.load(CONFIGS / "stage2_pretrain.yaml", scale, list(settings), CONFIGS).stage.model
    with torch.device("meta"):
        shape = EncoderShape(model.encoder.dim, model.encoder.depth, model.encoder.heads)
        return AudioLM(shape, model.decoder.architecture, model.decoder.fields)


def count(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def reference_encoder(shape: EncoderShape, seed: int = 0) -> Dasheng:
    """The dasheng package's own model with random weights, in eval mode."""
    torch.manual_seed(seed)
    reference = Dasheng(embed_dim=shape.dim, depth=shape.depth, num_heads=shape.heads)
    lively(reference, seed)
    return reference.eval()


def our_encoder(reference: Dasheng, shape: EncoderShape) -> DashengEncoder:
    """Our encoder with the reference's weights."""
    encoder = DashengEncoder(shape)
    state = {n.replace("init_bn.1.", "init_bn."): t for n, t in reference.state_dict().items()}
    encoder.load_state_dict({n: t for n, t in state.items() if not n.startswith("front_end.")})
    return encoder.eval()


def noise(n_samples: int, seed: int, loudness: float = 0.1) -> np.ndarray:
    """A clip of noise whose loudness rises and falls: float32 (n_samples,)."""
    wave = np.random.default_rng(seed).standard_normal(n_samples) * (1 + np.sin(np.arange(n_samples) / 3000))
    return (loudness * wave).astype(np.float32)


def conversation(seed: int, *clips: int, prompt: int = 4, answer: int = 5) -> Sample:
    """Clips of these lengths in samples, then `prompt` text slots, then `answer` slots that are targets."""
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    for n in clips:
        ids += [BOS, *[AUDIO] * frames.audio_tokens(n), EOS]
    ids += rng.integers(4, VOCAB, prompt + answer).tolist()
    labels = [*ids[1:], NO_TARGET]  # already shifted: the last slot of the prompt predicts the first of the answer
    labels[: len(ids) - answer - 1] = [NO_TARGET] * (len(ids) - answer - 1)
    array = np.array(ids)
    waves = tuple(noise(n, 100 * seed + i) for i, n in enumerate(clips))
    return Sample("tiny", f"sample{seed}", "caption", array, np.array(labels), array == AUDIO, waves)


def questions(seed: int, count: int, *clips: int, lead: int = 0, words: int = 3) -> list[Sample]:
    """`count` conversations about the same clips, as a run: `lead` slots that are equal whatever the seed, the clips,
    `words` slots of prompt; then each one's own prompt and answer, of lengths of their own."""
    rng = np.random.default_rng(seed)
    trunk = np.random.default_rng(99).integers(4, VOCAB, 22)[:lead].tolist()
    for n in clips:
        trunk += [BOS, *[AUDIO] * frames.audio_tokens(n), EOS]
    trunk += rng.integers(4, VOCAB, words).tolist()
    waves = tuple(noise(n, 100 * seed + i) for i, n in enumerate(clips))
    samples = []
    for number in range(count):
        prompt, answer = 1 + (seed + number) % 3, 3 + number
        ids = np.array([*trunk, *rng.integers(4, VOCAB, prompt + answer).tolist()])
        labels = np.append(ids[1:], NO_TARGET)
        labels[: len(ids) - answer - 1] = NO_TARGET
        later = {"clips": (), "common": len(trunk)} if number else {"clips": waves}
        samples.append(Sample("tiny", f"sample{seed}-{number}", "caption", ids, labels, ids == AUDIO, **later))
    return samples


def whole(samples: Sequence[Sample]) -> list[Sample]:
    """The same conversations, each with its own clips and nothing in common."""
    found: list[Sample] = []
    for s in samples:
        found.append(replace(s, clips=found[-1].clips, common=0) if s.common else s)
    return found


def shared_pack(samples: Sequence[Sample], lead: int, tail: int = 0, n_frames: int = 0) -> Pack:
    """The samples in one pack, what they have in common once."""
    room = sum(len(s.ids) for s in samples)
    used = sum(pack(list(samples), room, PAD, None, 0, lead).real)
    return pack(list(samples), used + tail, PAD, None, n_frames, lead)


def packed(*samples: Sample, tail: int = 0, pad: int = PAD) -> Pack:
    """The samples in one pack with a dummy tail of `tail` slots."""
    return pack(list(samples), sum(len(s.ids) for s in samples) + tail, pad)


@torch.no_grad()
def logits(lm: AudioLM, row: Pack) -> Tensor:
    """Logits (slots, vocabulary) of every slot."""
    return lm.decoder.logits(lm.hidden(row)).float()


def gradients(lm: AudioLM, rows: Sequence[Pack]) -> dict[str, Tensor | None]:
    """Gradient of the summed loss of all rows, by parameter."""
    lm.zero_grad()
    for row in rows:
        lm(row).sum().backward()
    return {n: p.grad for n, p in lm.named_parameters()}
