"""What learns is what was asked for: freezing, LoRA on the decoder alone, precision, and the table that proves it."""

import pytest
import torch

from midasheng.config import Optim, UserError
from midasheng.model import adapt
from midasheng.model.adapt import LoraPlan, base_state
from midasheng.model.audio_lm import AudioLM
from midasheng.train.optim import groups
from tests.model import OMNI, QWEN3, at_scale, conversation, gradients, logits, packed, tiny_lm

TRAIN = ["audio_encoder.*", "audio_projector.*"]
LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
DEEP = 6  # layers: more than 20 targets, from where on peft shortens the list of targets by itself


def adapted_lm(*targets: str, train: list[str] = TRAIN, rank: int = 2, **fields: object):
    """A tiny model as a stage makes it, and target -> layers."""
    lm = tiny_lm(**fields)
    adapt.freeze_all_but(lm, train)
    return lm, adapt.add_lora(lm, LoraPlan(targets, rank, 8.0, 0.5), seed=1)


def adapted_layers(lm: AudioLM) -> set[str]:
    return {name.split(".lora_")[0].removeprefix("decoder.model.") for name in adapt.lora_state(lm)}


def linears(layers: range, names: set[str]) -> set[str]:
    return {
        f"layers.{i}.{'self_attn' if n in ('q_proj', 'k_proj', 'v_proj', 'o_proj') else 'mlp'}.{n}"
        for i in layers for n in names
    }  # fmt: skip


# -- LoRA: exactly where asked ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj", "v_proj"], linears(range(DEEP), {"q_proj", "v_proj"})),
        (["all-linear"], linears(range(DEEP), LINEARS)),
        (["*"], linears(range(DEEP), LINEARS)),
        (["*proj"], linears(range(DEEP), LINEARS)),
        (["layers.[0-3].*"], linears(range(4), LINEARS)),
        (["layers.5.mlp.*", "o_proj"], linears(range(DEEP), {"o_proj"}) | linears(range(5, 6), LINEARS - set("qkvo")) - linears(range(5, 6), {"q_proj", "k_proj", "v_proj", "o_proj"})),
    ],
    ids=str,
)  # fmt: skip
def test_lora_sits_on_exactly_these_layers(targets, expected):
    lm, found = adapted_lm(*targets, num_hidden_layers=DEEP)
    assert adapted_layers(lm) == expected
    assert {name for names in found.values() for name in names} == expected
    assert not [n for n, _ in lm.named_modules() if "lora_" in n and not n.startswith("decoder.model.")]
    assert type(lm.audio_encoder.blocks[0].attn.qkv) is torch.nn.Linear
    assert type(lm.audio_encoder.blocks[0].mlp.fc1) is torch.nn.Linear
    assert type(lm.decoder.lm_head) is torch.nn.Linear
    adapt.learns(lm, TRAIN, found, rank=2)
