"""The analytic count of useful FLOPs is what torch counts, for every pattern of trained and frozen parts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from midasheng.model import adapt, attention, encoder
from midasheng.model.audio_lm import AudioLM
from midasheng.model.flops import cost
from tests.model import OMNI, QWEN3, at_scale, conversation, packed, questions, shared_pack, tiny_lm, whole

LORA = {"q, v": ("q_proj", "v_proj"), "all": ("all-linear",), "o": ("o_proj",), "": ()}


def by_segment(q, k, v, segments, *, causal, scale=None):
    """The dense reference inside each segment: torch counts no FLOPs in a CPU's fused attention."""
    parts_q, *parts = (t.split(list(segments), dim=1) for t in (q, k, v))
    lines = getattr(segments, "lines", None) or [(number,) for number in range(len(segments))]
    out = []
    for q_s, line in zip(parts_q, lines, strict=True):
        k_s, v_s = (torch.cat([of[one] for one in line], dim=1) for of in parts)
        k_s, v_s = (t.repeat_interleave(q.shape[0] // t.shape[0], dim=0) for t in (k_s, v_s))
        scores = (q_s @ k_s.transpose(-1, -2)) * (scale if scale is not None else q.shape[-1] ** -0.5)
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(k_s.shape[1] - q_s.shape[1])
        out.append((scores.masked_fill(~mask, float("-inf")) if causal else scores).softmax(-1) @ v_s)
    return torch.cat(out, dim=1)


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


@pytest.mark.parametrize("architecture", [OMNI, QWEN3])
@pytest.mark.parametrize("lead", [0, 14])
def test_what_is_shared_is_counted_once(architecture, lead):
    """Runs with long trunks, so that forgotten ancestors would be seen among the products with weights."""
    lm = tiny_lm(architecture)
    samples = [*questions(0, 5, 640 * 505, lead=lead, words=200), *questions(1, 2, lead=lead, words=300)]
    row = shared_pack(samples, lead, tail=3)
    assert sum(cost(lm).of(row).values()) == pytest.approx(counted(lm, shared_pack(samples, lead)), rel=0.01)
    leaves = sum(len(s.ids) for s in samples) - 5 * samples[1].common - 2 * samples[6].common
    assert sum(row.real) == leaves + samples[1].common + samples[6].common - lead
    apart = cost(lm).of(packed(*whole(samples)))
    of_row = cost(lm).of(row)
    assert apart["encoder"] == 5 * of_row["encoder"]
    assert apart["head"] == of_row["head"]


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
