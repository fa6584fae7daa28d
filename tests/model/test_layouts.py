"""The padded layouts of benchmarks/compute are the same computation as a pack, so their times may be compared."""

import pytest
import torch

from benchmarks import layouts
from midasheng.model import adapt
from midasheng.sample import pack
from tests.model import VOCAB, conversation, tiny_lm


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


def test_copies_need_no_mask(samples):
    lm = tiny_lm()
    batch = layouts.collate([samples[0]] * 3)
    assert batch.holds_BT.all()
    with layouts.stock_attention(lm):
        three = float(layouts.loss(lm, batch, False).detach())
    assert three == pytest.approx(3 * float(lm(pack(samples[:1], len(samples[0].ids), 0)).sum().detach()), rel=1e-5)
