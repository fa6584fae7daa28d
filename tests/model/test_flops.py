"""The analytic count of useful FLOPs is what torch counts, for every pattern of trained and frozen parts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from midasheng.model import adapt, attention, encoder
from midasheng.model.attention import dense_attention
from midasheng.model.audio_lm import AudioLM
from midasheng.model.flops import cost
from tests.model import OMNI, QWEN3, at_scale, conversation, packed, tiny_lm

LORA = {"q, v": ("q_proj", "v_proj"), "all": ("all-linear",), "o": ("o_proj",), "": ()}


def by_segment(q, k, v, segments, *, causal, scale=None):
    """The dense reference inside each segment: torch counts no FLOPs in a CPU's fused attention."""
    parts = zip(*(t.split(list(segments), dim=1) for t in (q, k, v)), strict=True)
    return torch.cat([dense_attention(*one, [one[0].shape[1]], causal=causal, scale=scale) for one in parts], dim=1)


def counted(lm: AudioLM, pack) -> float:
    """What torch counts in one step; forward alone where nothing learns."""
    with FlopCounterMode(display=False) as counter:
        loss = lm(pack).sum()
        if loss.requires_grad:
            loss.backward()
    return float(counter.get_total_flops())


@pytest.fixture(autouse=True)
def _dense(monkeypatch):
    for room in (attention, encoder):
        monkeypatch.setattr(room, "segment_attention", by_segment)


@pytest.mark.parametrize("architecture", [OMNI, QWEN3])
@pytest.mark.parametrize(
    ("train", "lora"),
    [
        (["*"], ""), (["audio_encoder.*", "audio_projector.*"], "q, v"), (["audio_encoder.*", "audio_projector.*"], "all"),
        (["audio_projector.*"], "q, v"), (["audio_projector.*"], ""), (["decoder.*"], ""), ([], "q, v"), ([], "all"),
        ([], "o"), (["audio_encoder.blocks.1.*"], ""), (["audio_encoder.norm.*"], ""), (["audio_encoder.init_bn.*"], ""),
        (["decoder.model.layers.1.*"], ""), (["decoder.lm_head.*"], ""), (["decoder.model.norm.*"], ""),
        (["decoder.model.layers.0.self_attn.k_proj.*"], ""), (["decoder.model.layers.1.mlp.up_proj.*"], ""), ([], ""),
    ],
)  # fmt: skip
def test_it_is_what_torch_counts(architecture, train, lora):
    lm = tiny_lm(architecture)
    adapt.freeze_all_but(lm, train)
    if LORA[lora]:
        adapt.add_lora(lm, adapt.LoraPlan(LORA[lora], 4, 8.0, 0.0), seed=0)
    clips = [(640 * 505,), (5_000, 33_333), (16_000,)]  # one in three chunks, two, one
    pack = packed(*(conversation(n, *lengths, answer=5 + n) for n, lengths in enumerate(clips)))
    assert sum(cost(lm).of(pack).values()) == pytest.approx(counted(lm, pack), rel=0.01)


def test_each_part_is_counted_for_itself():
    """The sum could hide two mistakes."""
    lm = tiny_lm()
    adapt.freeze_all_but(lm, [])  # torch counts a backward under whatever part ran last
    pack = packed(conversation(0, 640 * 300, answer=40))
    with FlopCounterMode(lm, display=False, depth=4) as counter:
        lm(pack)
    torch_counts = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    ours = cost(lm).of(pack)
    names = {"encoder": "audio_encoder", "projector": "audio_projector", "decoder": "decoder.model"}
    theirs = {part: torch_counts[f"AudioLM.{name}"] for part, name in names.items()}
    theirs["head"] = torch_counts["AudioLM"] - sum(theirs.values())
    for part, flops in theirs.items():
        assert ours[part] == pytest.approx(flops, rel=0.01), part


def test_padding_is_not_useful():
    lm = tiny_lm()
    samples = [conversation(0, 16_000, answer=4), conversation(1, answer=6)]
    assert cost(lm).of(packed(*samples, tail=50)) == cost(lm).of(packed(*samples))
    assert set(cost(lm).of(packed(tail=50)).values()) == {0.0}


@pytest.mark.parametrize(
    ("scale", "stage", "tera"), [("3b", 2, 1.04), ("7b", 2, 1.98), ("3b", 1, 1.40), ("7b", 1, 2.81)]
)
def test_a_mean_clip_at_the_published_sizes(scale, stage, tera):
    """Worked out apart from this code, from the report's lengths: 87 frames, 17 audio tokens, 22 prompt and 22 answer
    slots (stage 2: encoder and projector learn, LoRA q, v on the frozen decoder)."""
    lm = at_scale(scale)
    if stage == 2:
        adapt.freeze_all_but(lm, ["audio_encoder.*", "audio_projector.*"])
        adapt.add_lora(lm, adapt.LoraPlan(("q_proj", "v_proj"), 8, 32.0, 0.1), seed=0)
    c = cost(lm)
    slots = 17 + 22 + 22
    flops = 87 * c.frame + 87**2 * c.chunk_squared + 17 * c.token + slots * c.slot + slots**2 * c.segment_squared
    assert (flops + 22 * c.target) / 1e12 == pytest.approx(tera, rel=0.02)
