"""The decoder: a causal LM from transformers, stock, made to take packed rows through its attention interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from midasheng.config import UserError
from midasheng.model import attention
from midasheng.model.attention import Seen


def text_model(architecture: str, fields: Mapping[str, Any]) -> Any:
    """The bare text model (no head) of transformers for a `model_type`, randomly initialised, without dropout or cache.

    `architecture`: "qwen2_5_omni_text" (the text model of Qwen2.5-Omni's thinker), or any model_type whose AutoModel
    takes transformers' attention interface ("qwen3", "qwen2", "llama"). `fields`: its config. Raises UserError for an
    unknown architecture or field.
    """
    from transformers import AutoConfig, AutoModel
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniThinkerTextModel

    attention.register()
    try:
        config = AutoConfig.for_model(architecture)
    except ValueError:
        raise UserError(
            f"model.decoder.architecture: transformers knows no {architecture!r}; write qwen2_5_omni_text or qwen3"
        ) from None
    unknown = [name for name in fields if not hasattr(config, name)]
    if unknown:
        raise UserError(f"model.decoder: {unknown} are not fields of transformers' {type(config).__name__}")
    config = AutoConfig.for_model(architecture, **fields)
    config.use_cache = False
    if architecture == "qwen2_5_omni_text":  # no AutoModel entry of its own
        return Qwen2_5OmniThinkerTextModel._from_config(config, attn_implementation=attention.NAME)
    return AutoModel.from_config(config, attn_implementation=attention.NAME)


def text_fields(text_config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(architecture, fields) of a published text_config, as `text_model` takes them.

    Read by transformers, which knows the spellings of its older versions (rope_theta beside rope_scaling); what is no
    field of the architecture, as torch_dtype, is left out. Raises UserError for an unknown architecture.
    """
    from transformers import AutoConfig

    fields = dict(text_config)
    architecture = str(fields.pop("model_type", ""))
    try:
        default = AutoConfig.for_model(architecture)
    except ValueError:
        raise UserError(f"text_config: transformers knows no text model of model_type {architecture!r}") from None
    of_no_use = ("model_type", "transformers_version", "dtype", "torch_dtype", "architectures")
    read = AutoConfig.for_model(architecture, **fields).to_diff_dict()
    return architecture, {k: v for k, v in read.items() if hasattr(default, k) and k not in of_no_use}


class Decoder(nn.Module):
    """`model` and `lm_head`, the names of the released checkpoint. 7B: 7,615,616,512 parameters."""

    def __init__(self, architecture: str, fields: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = text_model(architecture, fields)
        self.config = self.model.config
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=self.config.initializer_range)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, embeds_TD: Float[Tensor, "T D"], position_T: Int[Tensor, " T"], segments: Sequence[int]
    ) -> Float[Tensor, "T D"]:
        """Hidden states of a packed row, before the head; `segments`: lengths in slots, attention never crosses them.

        Rotary positions are one-dimensional: Qwen2.5-Omni's three mRoPE rows are equal for text and audio.
        """
        return self.model(
            inputs_embeds=embeds_TD[None], position_ids=position_T[None], use_cache=False, segments=segments
        ).last_hidden_state[0]

    def extend(
        self, embeds_TD: Float[Tensor, "T D"], position_T: Int[Tensor, " T"], segments: Sequence[int] | Seen, cache: Any
    ) -> Float[Tensor, "T D"]:
        """The same, and what the layers make of these slots goes into transformers' `cache`. `segments` as above for
        the prompts; then, for one slot of each answer, what it sees of the cache."""
        return self.model(
            inputs_embeds=embeds_TD[None], position_ids=position_T[None], past_key_values=cache, use_cache=True,
            segments=segments,
        ).last_hidden_state[0]  # fmt: skip

    def logits(self, hidden_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Logits of the slots that are given; never of a whole row in training."""
        return self.lm_head(hidden_ND)

    def embed(self, ids_T: Int[Tensor, " T"]) -> Float[Tensor, "T D"]:
        """Embeddings of text slots."""
        return self.model.embed_tokens(ids_T)


def linear_shapes(config: Any) -> dict[str, tuple[int, int]]:
    """(in, out) of the linear layers of one decoder block by their name, from the config alone.

    adapt.py holds what peft really adapted to this, so the expectation does not come from the modules themselves.
    """
    width, ffn = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    heads, kv_heads = config.num_attention_heads * head, config.num_key_value_heads * head
    return {
        "q_proj": (width, heads), "k_proj": (width, kv_heads), "v_proj": (width, kv_heads), "o_proj": (heads, width),
        "gate_proj": (width, ffn), "up_proj": (width, ffn), "down_proj": (ffn, width),
    }  # fmt: skip
