"""The decoder against stock transformers, and the published sizes and names of every scale without allocating them."""

import copy

import pytest
import torch
from transformers import AutoModel
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniThinkerTextModel

from midasheng.config import UserError
from midasheng.model.decoder import Decoder, linear_shapes
from tests.model import FIELDS, OMNI, QWEN3, VOCAB, at_scale, count, lively

SEGMENTS = (7, 1, 30, 12)
TIED = "model.decoder.fields.tie_word_embeddings=true"


@pytest.mark.parametrize(
    ("scale", "settings", "total"),
    [
        ("7b", (), 8_281_739_904),
        ("3b", (), 4_044_742_784),
        ("3b", (TIED,), 3_733_577_856),
        ("0.6b", (), 686_480_512),
        ("small", (), 222_507_584),
    ],
)
def test_published_parameter_counts(scale, settings, total):
    assert count(at_scale(scale, *settings)) == total


def test_parts_of_the_7b():
    parts = {name: count(part) for name, part in at_scale("7b").named_children()}
    assert parts == {"audio_encoder": 630_333_568, "audio_projector": 35_789_824, "decoder": 7_615_616_512}


def test_tensor_names_of_the_published_7b():
    encoder = {f"init_bn.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    encoder |= {"time_pos_embed", "freq_pos_embed"}
    encoder |= {f"{m}.{n}" for m in ("patch_embed.proj", "norm") for n in ("weight", "bias")}
    layers = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    encoder |= {f"blocks.{i}.{m}.{n}" for i in range(32) for m in layers for n in ("weight", "bias")}
    decoder = {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"}
    for i in range(28):
        decoder |= {f"model.layers.{i}.self_attn.{m}_proj.{n}" for m in "qkv" for n in ("weight", "bias")}
        decoder |= {f"model.layers.{i}.self_attn.o_proj.weight"}
        decoder |= {f"model.layers.{i}.mlp.{m}_proj.weight" for m in ("gate", "up", "down")}
        decoder |= {f"model.layers.{i}.{m}_layernorm.weight" for m in ("input", "post_attention")}
    assert (len(encoder), len(decoder)) == (395, 339)
    names = {f"audio_encoder.{n}" for n in encoder} | {f"decoder.{n}" for n in decoder}
    names |= {f"audio_projector.net.{i}.{n}" for i in (0, 2) for n in ("weight", "bias")}
    assert set(at_scale("7b").state_dict()) == names


@pytest.mark.parametrize("scale", ["7b", "3b", "0.6b"])
def test_linear_shapes_from_the_config_are_the_real_ones(scale):
    decoder = at_scale(scale).decoder
    linears = {n: m for n, m in decoder.model.layers[0].named_modules() if isinstance(m, torch.nn.Linear)}
    real = {n.rsplit(".")[-1]: (m.in_features, m.out_features) for n, m in linears.items()}
    assert real == linear_shapes(decoder.config)


# -- against stock transformers ---------------------------------------------------------------------------------------


def stock(decoder: Decoder, architecture: str, implementation: str) -> torch.nn.Module:
    """transformers' model as it comes, with our decoder's weights."""
    settings = copy.deepcopy(decoder.config)
    if architecture == OMNI:
        model = Qwen2_5OmniThinkerTextModel._from_config(settings, attn_implementation=implementation)
    else:
        model = AutoModel.from_config(settings, attn_implementation=implementation)
    model.load_state_dict(decoder.model.state_dict())
    return model.eval()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", [OMNI, QWEN3])
def test_packed_logits_are_stock_transformers_one_by_one(architecture, implementation):
    torch.manual_seed(0)
    decoder = Decoder(architecture, FIELDS[architecture]).eval()
    lively(decoder, 0)
    reference = stock(decoder, architecture, implementation)
    ids_T = torch.randint(0, VOCAB, (sum(SEGMENTS),))
    position_T = torch.cat([torch.arange(n) for n in SEGMENTS])
    with torch.no_grad():
        ours = decoder.logits(decoder(decoder.embed(ids_T), position_T, SEGMENTS))
        alone = [reference(input_ids=ids[None]).last_hidden_state[0] for ids in ids_T.split(SEGMENTS)]
        theirs = torch.cat(alone) @ decoder.lm_head.weight.T
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_tied_head_is_the_embedding():
    tied = Decoder(QWEN3, FIELDS[QWEN3] | {"tie_word_embeddings": True})
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    untied = Decoder(QWEN3, FIELDS[QWEN3])
    assert count(untied) - count(tied) == tied.lm_head.weight.numel()


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [("qwen9", {}, "transformers knows no 'qwen9'"), (QWEN3, {"hiden_size": 8}, "hiden_size.*not fields")],
)
def test_unknown_architecture_or_field_is_the_users_mistake(architecture, fields, message):
    with pytest.raises(UserError, match=message):
        Decoder(architecture, fields)
