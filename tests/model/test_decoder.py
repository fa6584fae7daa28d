"""The decoder against stock transformers, and the published sizes and names of every scale without allocating them."""

import copy
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModel
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniThinkerTextModel

from midasheng.config import UserError
from midasheng.model.adapt import base_state
from midasheng.model.decoder import Decoder, linear_shapes
from tests.model import FIELDS, LLAMA, OMNI, QWEN3, VOCAB, at_scale, count, lively, mel_tables

SMALL = {
    "vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1,
}  # fmt: skip
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


def published_7b() -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the 0804-fp32 release."""
    found: dict[str, tuple[int, ...]] = {}
    for line in (Path(__file__).parent / "midashenglm-7b.txt").read_text().splitlines():
        name, *sizes = line.split()
        if name == "#":
            continue
        before, _, rest = name.partition("{")
        count, _, after = rest.partition("}")
        for one in [f"{before}{i}{after}" for i in range(int(count))] if rest else [name]:
            assert one not in found
            found[one] = tuple(map(int, sizes))
    return found


def test_tensors_of_the_published_7b():
    """Names and shapes of all 740; a module that is renamed here could not read or write the release."""
    published = published_7b()
    per_part = Counter(name.split(".")[0] for name in published)
    assert per_part == {"audio_encoder": 395 + 2, "audio_projector": 4, "decoder": 339}
    tables = {name for name in published if name.startswith("audio_encoder.front_end.")}
    statistics = {name for name in published if "init_bn.running" in name or name.endswith("num_batches_tracked")}
    assert len(published) == 740
    parameters = sum(math.prod(s) for name, s in published.items() if name not in tables | statistics)
    assert parameters == 8_281_739_904
    ours = {name: tuple(t.shape) for name, t in at_scale("7b").state_dict().items()}
    assert ours == {name: shape for name, shape in published.items() if name not in tables}
    assert {n: tuple(t.shape) for n, t in mel_tables().items()} == {n: published[n] for n in tables}


@pytest.mark.parametrize(
    ("scale", "settings", "encoder", "decoder"),
    # encoder: 12 tensors a block and 11 others; decoder: omni 12 a layer (three biases), qwen3 11 (two norms of heads)
    [("3b", (), 12 * 32 + 11, 12 * 36 + 3), ("3b", (TIED,), 12 * 32 + 11, 12 * 36 + 2), ("0.6b", (), 155, 11 * 28 + 2)],
)
def test_tensors_of_the_other_scales_are_counted(scale, settings, encoder, decoder):
    names = Counter(name.split(".")[0] for name in base_state(at_scale(scale, *settings)))
    assert names == {"audio_encoder": encoder, "audio_projector": 4, "decoder": decoder}


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
@pytest.mark.parametrize("architecture", [OMNI, QWEN3, LLAMA])
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


@pytest.mark.parametrize(
    ("architecture", "fields", "words"),
    [
        ("phi3", {"pad_token_id": 0}, "the blocks of phi3 are not made of q_proj.*qkv_proj"),
        ("gpt2", {}, "the blocks of gpt2 are not made of q_proj"),
        ("qwen3_moe", {}, "the blocks of qwen3_moe"),
        ("gemma2", {}, "gemma2 looks back 4096 slots at most"),
        ("mistral", {}, "mistral looks back 4096 slots at most.*sliding_window: null"),
        ("granite", {"logits_scaling": 8.0}, "granite has logits_scaling 8.0, which is not computed here"),
        (QWEN3, {"use_sliding_window": True, "max_window_layers": 1}, "qwen3 looks back 4096 slots"),
    ],
)
def test_a_family_that_would_be_computed_wrong_is_refused(architecture, fields, words):
    """Windows, caps and scales that our attention and head do not know; blocks that LoRA and counts do not."""
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 3, "vocab_size": 64} if architecture == "gpt2" else SMALL
    with pytest.raises(UserError, match=words):
        Decoder(architecture, sizes | fields)


def test_mistral_without_its_window_is_taken():
    Decoder("mistral", SMALL | {"sliding_window": None})
