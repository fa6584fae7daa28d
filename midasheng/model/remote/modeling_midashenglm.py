"""MiDashengLM for transformers: audio encoder, projector and a text decoder under the names of the released weights."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniThinkerTextModel

from .configuration_midashenglm import SAMPLE_RATE, MiDashengLMConfig, audio_tokens

N_FFT, HOP, MELS, PATCH = 512, 160, 64, 4
# keys and values of earlier slots: renamed by transformers 5.24
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class LogMel:
    """Log-mel spectrogram of one clip: HTK mel, power, decibels no lower than 120 below the clip's loudest.

    Window and filterbank are made when first used: as buffers, transformers 5 would fill them with garbage on loading.
    """

    def __init__(self):
        self.tables = {}

    def make_tables(self):
        """(window (512,), filterbank (257, 64)), on the CPU whatever device is the default."""
        with torch.device("cpu"):
            highest = 2595.0 * math.log10(1.0 + SAMPLE_RATE / 2 / 700.0)
            corners = 700.0 * (10.0 ** (torch.linspace(0.0, highest, MELS + 2) / 2595.0) - 1.0)
            slopes = corners - torch.linspace(0, SAMPLE_RATE // 2, N_FFT // 2 + 1)[:, None]
            widths = corners[1:] - corners[:-1]
            rising, falling = -1.0 * slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]
            return torch.hann_window(N_FFT), torch.minimum(rising, falling).clamp(min=0.0)

    def __call__(self, clip):
        """(samples,) at 16 kHz -> (64, 1 + samples // 160), float32."""
        if clip.device not in self.tables:
            self.tables[clip.device] = tuple(table.to(clip.device) for table in self.make_tables())
        window, bank = self.tables[clip.device]
        with torch.autocast(clip.device.type, enabled=False):
            spectrum = torch.stft(
                clip.float(), N_FFT, HOP, window=window, center=True, pad_mode="reflect", return_complex=True
            )
            decibel = 10.0 * torch.log10((bank.T @ spectrum.abs().square()).clamp(min=1e-10))
            return decibel.clamp(min=decibel.max() - 120.0)


class Attention(nn.Module):
    """Bidirectional attention inside a chunk."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, mask):
        """x (N, frames, E); mask (N, 1, 1, frames), False on padding."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        """Frame by frame."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.attn = Attention(config.embed_dim, config.num_heads)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.mlp = Mlp(config.embed_dim, int(config.embed_dim * config.mlp_ratio))

    def forward(self, x, mask):
        """Chunks (N, frames, E)."""
        x = x + self.attn(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Conv2d over 64 mel bins by 4 mel frames."""

    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Conv2d(1, dim, kernel_size=(MELS, PATCH), stride=(MELS, PATCH))

    def forward(self, mel):
        """(64, mel frames) -> (frames, E); mel frames that fill no patch are dropped."""
        return self.proj(mel[None, None].to(self.proj.weight.dtype))[0, :, 0].T


class DashengEncoder(nn.Module):
    """Waveforms -> frames at 25 Hz, in chunks of 10.08 s that do not see each other."""

    def __init__(self, config):
        super().__init__()
        self.chunk = config.target_length // PATCH
        self.log_mel = LogMel()
        self.init_bn = nn.BatchNorm2d(MELS)
        self.patch_embed = PatchEmbed(config.embed_dim)
        self.time_pos_embed = nn.Parameter(torch.zeros(1, config.embed_dim, 1, self.chunk))
        self.freq_pos_embed = nn.Parameter(torch.zeros(1, config.embed_dim, 1, 1))
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(config.embed_dim, eps=1e-6)

    def normalised(self, clip):
        """(samples,) -> log-mel (64, mel frames) under the stored statistics, in float32 also in a bf16 model."""
        bn = self.init_bn
        tables = [t.float() for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias)]
        return F.batch_norm(self.log_mel(clip)[None], *tables, training=False, eps=bn.eps)[0]

    def forward(self, input_values, audio_length):
        """(B, L) padded with anything, (B,) -> list of (frames, E), a clip each; nothing depends on the padding."""
        positions = (self.time_pos_embed + self.freq_pos_embed)[0, :, 0].T
        clips = [values[:n] for values, n in zip(input_values, audio_length.flatten().tolist(), strict=True)]
        chunks_of = [self.patch_embed(self.normalised(clip)).split(self.chunk) for clip in clips]
        chunks = [chunk + positions[: len(chunk)] for chunks in chunks_of for chunk in chunks]
        lengths = torch.tensor([len(chunk) for chunk in chunks], device=input_values.device)
        x = pad_sequence(chunks, batch_first=True)
        mask = (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[:, None, None]
        for block in self.blocks:
            x = block(x, mask)
        x = iter([row[:n] for row, n in zip(self.norm(x), lengths.tolist(), strict=True)])
        return [torch.cat([next(x) for _ in chunks]) for chunks in chunks_of]


class AudioProjector(nn.Module):
    """Five frames -> one audio token."""

    def __init__(self, stack, encoder_dim, decoder_dim):
        super().__init__()
        self.stack = stack
        self.net = nn.Sequential(
            nn.Linear(stack * encoder_dim, decoder_dim), nn.GELU(), nn.Linear(decoder_dim, decoder_dim)
        )

    def forward(self, frames):
        """(frames, E) of one clip -> (frames // 5, D); what fills no group is dropped."""
        return self.net(frames[: len(frames) // self.stack * self.stack].reshape(-1, self.net[0].in_features))


class Decoder(nn.Module):
    """A text model of transformers and its head; a tied head is the embedding and no tensor of its own."""

    def __init__(self, config):
        super().__init__()
        if config.model_type == "qwen2_5_omni_text":  # no AutoModel entry
            self.model = Qwen2_5OmniThinkerTextModel._from_config(config)
        else:
            self.model = AutoModel.from_config(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def logits(self, hidden):
        """(..., D) -> (..., V)"""
        return self.lm_head(hidden) if hasattr(self, "lm_head") else F.linear(hidden, self.model.embed_tokens.weight)


class MiDashengLMModel(PreTrainedModel, GenerationMixin):
    """Audio and text in, text out. Inputs as MiDashengLMProcessor makes them."""

    config_class = MiDashengLMConfig
    main_input_name = "input_ids"
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _keep_in_fp32_modules_strict = ["init_bn"]

    def __init__(self, config):
        super().__init__(config)
        encoder, text = config.audio_encoder_config, config.text_config
        self.audio_encoder = DashengEncoder(encoder)
        self.audio_projector = AudioProjector(config.subsample_factor, encoder.embed_dim, text.hidden_size)
        self.decoder = Decoder(text)
        self.post_init()

    def get_input_embeddings(self):
        """The text embedding."""
        return self.decoder.model.embed_tokens

    def set_input_embeddings(self, value):
        """Exchange the text embedding."""
        self.decoder.model.embed_tokens = value

    def place(self, input_ids, input_values, audio_length):
        """Text embeddings (B, T, D) with the audio tokens of all clips, in their order, at the audio slots."""
        is_audio = input_ids == self.config.audio_token_id
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_audio, 0))
        clips = self.audio_encoder(input_values.to(embeds.device), audio_length)
        tokens = torch.cat([self.audio_projector(frames) for frames in clips])
        if int(is_audio.sum()) != len(tokens):
            raise ValueError(f"input_ids hold {int(is_audio.sum())} audio slots, the clips {len(tokens)} audio tokens")
        return embeds.masked_scatter(is_audio[..., None], tokens.to(embeds.dtype))

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        input_values=None, audio_length=None, labels=None, use_cache=None, logits_to_keep=0, cache=None, **kwargs,
    ):  # fmt: skip
        """input_ids, attention_mask (B, T), padded on the left; input_values (clips, L), audio_length (clips,)."""
        cache = past_key_values if cache is None else cache
        begins = cache is None or cache.get_seq_length() == 0
        if inputs_embeds is None:
            if input_values is not None and begins:  # later steps of generate() are text
                inputs_embeds = self.place(input_ids, input_values, audio_length)
            else:
                inputs_embeds = self.get_input_embeddings()(input_ids)
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
        out = self.decoder.model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids,
            use_cache=use_cache, **{CACHE: cache}, **kwargs,
        )  # fmt: skip
        hidden = out.last_hidden_state
        logits = self.decoder.logits(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=out.hidden_states, attentions=out.attentions,
            **{CACHE: getattr(out, CACHE)},
        )  # fmt: skip

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        """Beams and several answers to a prompt: its clips are repeated as a group, not one by one."""
        values, lengths = kwargs.pop("input_values", None), kwargs.pop("audio_length", None)
        if values is not None:
            slots_B = (input_ids == self.config.audio_token_id).sum(1).cumsum(0)
            last_C = audio_tokens(lengths.flatten()).cumsum(0)
            prompt_C = torch.searchsorted(slots_B, last_C.to(slots_B.device))
            order = [c for b in range(len(slots_B)) for c in (prompt_C == b).nonzero().flatten().tolist() * expand_size]
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        if values is not None:
            kwargs |= {"input_values": values[order], "audio_length": lengths[order]}
        return input_ids, kwargs
