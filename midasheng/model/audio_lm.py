"""AudioLM: encode, project, place, decode. Pack -> loss of each segment."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import init_empty_weights
from jaxtyping import Float
from torch import Tensor, nn

from midasheng import frames
from midasheng.config import UserError
from midasheng.model.attention import Segments
from midasheng.model.decoder import Decoder
from midasheng.model.encoder import DashengEncoder, EncoderShape
from midasheng.model.loss import target_loss
from midasheng.model.projector import AudioProjector
from midasheng.sample import Pack, counter_seed

PARTS = ("audio_encoder", "audio_projector", "decoder")


@contextmanager
def _making(part: str, loaded: Collection[str], seed: int) -> Iterator[None]:
    """Inside, a part draws random numbers of its own, whichever others are loaded; a loaded one has parameters on the
    meta device and real buffers: no file holds transformers' rotary tables, and on meta they would be garbage."""
    torch.manual_seed(counter_seed(seed, part) % 2**63)
    with init_empty_weights(include_buffers=False) if part in loaded else nullcontext():
        yield


class AudioLM(nn.Module):
    """The released model's three parts under their released names: audio_encoder, audio_projector, decoder.

    `loaded`: parts whose weights come from files: their parameters have no memory until weights.load sets them. The
    others' random numbers hang on torch's seed.
    `compute_dtype`: autocast dtype of the blocks (None: none); front end, BatchNorm statistics and loss stay float32.
    """

    def __init__(
        self, encoder: EncoderShape, decoder_architecture: str, decoder_fields: Mapping[str, Any],
        loaded: Collection[str] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        seed = torch.initial_seed()
        with _making("audio_encoder", loaded, seed):
            self.audio_encoder = DashengEncoder(encoder)
        with _making("decoder", loaded, seed):
            self.decoder = Decoder(decoder_architecture, decoder_fields)
        self.decoder.tie()  # what has no memory is copied when it is assigned
        with _making("audio_projector", loaded, seed):
            self.audio_projector = AudioProjector(encoder.dim, self.decoder.config.hidden_size)
        self.compute_dtype: torch.dtype | None = None

    def train(self, mode: bool = True) -> AudioLM:
        """Training mode only for what learns: a frozen module stays in eval(), inside or outside a trained one.

        LoRA's dropout has no parameters of its own; it follows the adapter it belongs to.
        """
        super().train(mode)
        if mode:
            for name, module in self.named_modules():
                if "lora_" not in name and not any(p.requires_grad for p in module.parameters()):
                    module.eval()
        return self

    def recompute(self, parts: Sequence[str]) -> None:
        """Keep only what enters each block of these parts (audio_encoder, decoder); the backward pass computes the rest
        again. Same gradients. Raises UserError for another part, or one that is frozen."""
        for part in parts:
            if part not in ("audio_encoder", "decoder"):
                raise UserError(f"hardware.recompute: {part!r}; write audio_encoder or decoder")
            named = getattr(self, part).named_parameters()
            trained = [n for n, p in named if p.requires_grad and ".lora_" not in n and not n.startswith("added.")]
            if not trained:
                raise UserError(
                    f"hardware.recompute: {part} is frozen; computing it again costs half as much again as it costs "
                    "now. Take it out, or make packs smaller"
                )
        self.audio_encoder.recompute = "audio_encoder" in parts
        if "decoder" in parts:
            self.decoder.model.activation_checkpointing_enable({"use_reentrant": False})

    def compile_blocks(self, backend: str = "inductor") -> None:
        """torch.compile every block of both towers. Packs have one shape, so what is compiled at step 0 stays."""
        for block in [*self.audio_encoder.blocks, *self.decoder.model.layers]:
            block.compile(backend=backend)

    def encode(
        self, audio_L: Float[Tensor, " L"], clips: Sequence[int], chunks: Segments | None = None
    ) -> Float[Tensor, "K D"]:
        """Audio tokens of all clips end to end, frames.audio_tokens(n) for a clip of n samples."""
        return self.audio_projector(self.audio_encoder(audio_L, clips, chunks), [frames.frames(n) for n in clips])

    def text(self, pack: Pack) -> Float[Tensor, "T D"]:
        """Embeddings of the text slots; at the audio slots stands what `place` replaces."""
        slots, tokens = len(pack.audio_K), sum(frames.audio_tokens(n) for n in pack.clips)
        assert slots == tokens, f"{slots} audio slots but {tokens} audio tokens in the pack of {', '.join(pack.keys)}"
        # <|AUDIO|> itself is never embedded: its row would be looked up for nothing and may not exist
        return self.decoder.embed(pack.ids_T.masked_fill(pack.is_audio_T, 0))

    def place(self, pack: Pack) -> Float[Tensor, "T D"]:
        """Decoder inputs: text embeddings, with the audio tokens at the audio slots."""
        embeds_TD = self.text(pack)
        if pack.chunks:
            tokens_KD = self.encode(pack.audio_L, pack.clips, Segments(pack.chunks, pack.chunk_bounds))
            # not masked_scatter: its backward asks the device how many there are
            return embeds_TD.index_copy(0, pack.audio_K, tokens_KD.to(embeds_TD.dtype))
        if torch.is_grad_enabled():
            # a rank whose pack holds no audio must still take part in the gradient's all-reduce
            silence = torch.zeros(frames.MIN_SAMPLES, device=embeds_TD.device)
            embeds_TD = embeds_TD + 0.0 * self.encode(silence, [len(silence)]).sum()
        return embeds_TD

    def hidden(self, pack: Pack) -> Float[Tensor, "T D"]:
        """Decoder states of every slot, before the head."""
        device = pack.ids_T.device.type
        with torch.autocast(device, dtype=self.compute_dtype, enabled=self.compute_dtype is not None):
            segments = Segments(pack.segments, pack.segment_bounds, pack.parents, pack.seen_A, pack.seen_bounds)
            return self.decoder(self.place(pack), pack.position_T, segments)

    def forward(self, pack: Pack) -> Float[Tensor, " S"]:
        """Summed cross-entropy of each segment of the pack, float32 (0 for shared ones and the dummy); logits are made
        only where a label stands."""
        hidden_TD = self.hidden(pack)
        losses_N = self.target_losses(hidden_TD, pack)
        number_N = torch.bucketize(pack.target_N, pack.segment_bounds[1:].long(), right=True)
        # hidden_TD[:0].sum() keeps a pack without any target attached to the graph
        zeros_S = losses_N.new_zeros(len(pack.segments)) + hidden_TD[:0].to(losses_N.dtype).sum()
        return zeros_S.index_add(0, number_N, losses_N)

    def target_losses(self, hidden_TD: Float[Tensor, "T D"], pack: Pack) -> Float[Tensor, " N"]:
        """Cross-entropy of each target in the order of target_N, float32."""
        at_N, decoder = pack.target_N, self.decoder
        rows, added = decoder.added.get("head"), slice(decoder.added_ids.start, decoder.added_ids.stop)
        hidden_ND, head_VD = hidden_TD.index_select(0, at_N), decoder.lm_head.weight
        return target_loss(hidden_ND, head_VD, pack.labels_T[at_N], self.compute_dtype, rows, added)
