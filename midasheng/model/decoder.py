"""The decoder: a causal LM from transformers, stock, made to take packed rows through its attention interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from midasheng.config import UserError
from midasheng.model import attention
from midasheng.model.attention import Seen


def text_model(architecture: str, fields: Mapping[str, Any]) -> Any:
    """The bare text model (no head) of transformers for a `model_type`, randomly initialised, without dropout or cache.

    `architecture`: "qwen2_5_omni_text" (the text model of Qwen2.5-Omni's thinker), or any model_type whose AutoModel
    takes transformers' attention interface and whose blocks are llama's ("qwen3", "qwen2", "llama", "mistral").
    `fields`: its config. Raises UserError for an unknown architecture or field, and for what would be left out here
    without an error: windows and caps of attention, and whatever a family does to its logits.
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
    _check_arithmetic(config)
    if architecture == "qwen2_5_omni_text":  # no AutoModel entry of its own
        model = Qwen2_5OmniThinkerTextModel._from_config(config, attn_implementation=attention.NAME)
    else:
        model = AutoModel.from_config(config, attn_implementation=attention.NAME)
    _check_layers(model, config)
    return model


# done to attention or logits in some families; our attention function and our head know nothing of them
LEFT_OUT = ("attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "logits_scaling")


def _check_arithmetic(config: Any) -> None:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if kinds - {"full_attention"} or (window and not getattr(config, "layer_types", None)):
        raise UserError(
            f"model.decoder: {config.model_type} looks back {window} slots at most in some layers, attention here has "
            "no window; where the weights need none, write model.decoder.fields.sliding_window: null"
        )
    for name in LEFT_OUT:
        if (value := getattr(config, name, None)) not in (None, 1.0):
            raise UserError(
                f"model.decoder: {config.model_type} has {name} {value}, which is not computed here; write another "
                "model.decoder.architecture, such as qwen2_5_omni_text, qwen3 or llama"
            )


def _check_layers(model: Any, config: Any) -> None:
    """Are the blocks those that LoRA, counts and FLOPs are written for?"""
    layers = list(getattr(model, "layers", []))
    known = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers")
    there = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    good = bool(layers) and hasattr(model, "embed_tokens") and all(hasattr(config, name) for name in known)
    for layer in layers if good else []:
        linears = {n.rsplit(".", 1)[-1]: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        good = good and {n: (m.in_features, m.out_features) for n, m in linears.items()} == linear_shapes(config)
    if not good:
        raise UserError(
            f"model.decoder.architecture: the blocks of {config.model_type} are not made of q_proj, k_proj, v_proj, "
            f"o_proj, gate_proj, up_proj and down_proj ({', '.join(sorted(there)) or 'no linear layer'} are there); "
            "write qwen2_5_omni_text, qwen2, qwen3, llama or another one like them"
        )


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


def with_vocabulary(architecture: str, fields: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The fields with tables of at least `size` rows."""
    from transformers import AutoConfig

    own = fields.get("vocab_size") or AutoConfig.for_model(architecture).vocab_size
    return {**fields, "vocab_size": max(own, size)}


class Decoder(nn.Module):
    """`model` and `lm_head`, the names of the released checkpoint. 7B: 7,615,616,512 parameters."""

    def __init__(self, architecture: str, fields: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = text_model(architecture, fields)
        self.config = self.model.config
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=self.config.initializer_range)
        self.tie()
        self.added = nn.ParameterDict()  # "embedding", "head": rows of a frozen table that learn
        self.added_ids = range(0)

    def tie(self) -> None:
        """Make the head the embedding, one parameter, where the config says so; again after either was replaced."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def learn_rows(self, ids: range) -> None:
        """Let these rows of the frozen tables learn: parameters of their own, (rows, hidden_size) float32, that stand
        in for the table's. So no gradient, optimizer state or decay ever reaches another row, and a frozen table needs
        no memory of a trained one. A table that learns itself has none."""
        self.added_ids = ids
        for name, table in (("embedding", self.model.embed_tokens), ("head", self.lm_head)):
            if ids and not table.weight.requires_grad:
                tied = name == "head" and table.weight is self.model.embed_tokens.weight
                rows = self.added["embedding"] if tied else nn.Parameter(self._rows(table.weight).float().clone())
                self.added[name] = rows

    def _rows(self, table_VD: Tensor) -> Tensor:
        return table_VD.detach()[self.added_ids.start : self.added_ids.stop]

    def with_rows(self, name: str, table_VD: Float[Tensor, "V D"]) -> Float[Tensor, "V D"]:
        """A table ("embedding" or "head") with the rows that learned in its place, as it is handed on."""
        if name not in self.added:
            return table_VD
        table_VD = table_VD.clone()
        self._rows(table_VD).copy_(self.added[name].detach())
        return table_VD

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
            inputs_embeds=embeds_TD[None], position_ids=position_T[None], cache=cache, use_cache=True,
            segments=segments,
        ).last_hidden_state[0]  # fmt: skip

    def logits(self, hidden_ND: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """Logits of the slots that are given; never of a whole row in training."""
        logits_NV = self.lm_head(hidden_ND)
        if "head" not in self.added:
            return logits_NV
        own_NA = F.linear(hidden_ND, self.added["head"].to(self.lm_head.weight.dtype))
        first, until = self.added_ids.start, self.added_ids.stop
        return torch.cat([logits_NV[:, :first], own_NA, logits_NV[:, until:]], 1)

    def embed(self, ids_T: Int[Tensor, " T"]) -> Float[Tensor, "T D"]:
        """Embeddings of text slots."""
        embeds_TD = self.model.embed_tokens(ids_T)
        if "embedding" not in self.added:
            return embeds_TD
        place_T = ids_T - self.added_ids.start
        row_T = place_T.clamp(0, len(self.added_ids) - 1)
        own_TD = F.embedding(row_T, self.added["embedding"]).to(embeds_TD.dtype)
        return torch.where((row_T == place_T)[:, None], own_TD, embeds_TD)


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
