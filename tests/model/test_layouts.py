"""The padded layouts of benchmarks/compute are the same computation as a pack, so their times may be compared."""

import pytest
import torch

from benchmarks import layouts
from benchmarks.compute import row
from midasheng.model import adapt
from midasheng.sample import pack
from tests.model import VOCAB, conversation, tiny_lm, whole


@pytest.fixture
def samples():
    """Drawn clips, and one in three chunks."""
    long = conversation(0, 640 * 600)
    return [*layouts.draw(5, VOCAB, seed=0), long]


@pytest.mark.parametrize("least_s", [0.0, 30.0])
@pytest.mark.parametrize("full_logits", [True, False])
@pytest.mark.parametrize("lora", [False, True])
def test_a_padded_batch_is_a_pack(samples, least_s, full_logits, lora):
    lm = tiny_lm()
    if lora:
        adapt.freeze_all_but(lm, ["audio_encoder.*", "audio_projector.*"])
        adapt.add_lora(lm, adapt.LoraPlan(("all-linear",), 4, 8.0, 0.0), seed=0)
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    row = pack(samples, sum(len(s.ids) for s in samples) + 3, 0)
    packed = lm(row).sum()
    packed.backward()
    wanted = {n: p.grad for n, p in lm.named_parameters() if p.grad is not None}
    lm.zero_grad()
    with layouts.stock_attention(lm):
        padded = layouts.loss(lm, layouts.collate(samples, least_s), full_logits)
    padded.backward()
    assert float(padded.detach()) == pytest.approx(float(packed.detach()), rel=1e-5)
    got = {n: p.grad for n, p in lm.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys()
    assert max(float((got[n] - g).norm() / g.norm()) for n, g in wanted.items()) < 1e-4
    assert torch.equal(lm(row).sum(), packed)  # our attention is back


@pytest.mark.parametrize(("before", "lead", "asked"), [(22, 4, 1), (22, 14, 1), (22, 22, 1), (5, 5, 3)])
def test_drawn_samples_share_what_the_benchmark_says(before, lead, asked):
    """Their slots are really equal; losses and gradients are those of the samples apart."""
    lm = tiny_lm()
    drawn = layouts.draw(4, VOCAB, seed=0, before=before, questions=asked)
    together, apart = row(drawn, lead), row(whole(drawn))
    assert together.shared == (1 if asked == 1 else 1 + 4)
    saved = 4 * (asked - 1) * before + (asked - 1) * sum(int(s.is_audio.sum()) for s in drawn[::asked]) + 3 * lead
    assert sum(apart.real) - sum(together.real) == saved
    found = []
    for one in (together, apart):
        lm.zero_grad()
        losses = lm(one)[: len(drawn)]
        losses.sum().backward()
        found.append([losses.detach(), *(p.grad for p in lm.parameters())])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


def test_copies_need_no_mask(samples):
    lm = tiny_lm()
    batch = layouts.collate([samples[0]] * 3)
    assert batch.holds_BT.all()
    with layouts.stock_attention(lm):
        three = float(layouts.loss(lm, batch, False).detach())
    assert three == pytest.approx(3 * float(lm(pack(samples[:1], len(samples[0].ids), 0)).sum().detach()), rel=1e-5)
