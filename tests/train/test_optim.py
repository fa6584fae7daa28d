"""Learning rate, parameter groups, clipping."""

import itertools
import math

import pytest
import torch
from torch import nn

from midasheng.config import ConfigError, Optim
from midasheng.train.optim import clip, groups, learning_rate, optimizer


def test_warm_up_from_zero_then_cosine_to_ten_percent():
    rates = [learning_rate(s, steps=100, warmup=10, final=0.1) for s in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (s + 1) for s in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[10 + 44] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 44 / 89)))


def test_a_run_without_warm_up_starts_at_the_peak():
    assert learning_rate(0, steps=5, warmup=0, final=0.1) == 1.0
    assert learning_rate(0, steps=1, warmup=0, final=0.1) == 1.0


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.time_pos_embed = nn.Parameter(torch.zeros(1, 4, 1, 2))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def test_no_decay_on_norms_biases_and_position_embeddings_and_nothing_frozen():
    tower = Tower()
    made = groups(tower.named_parameters(), Optim(lr=1.0, weight_decay=0.5))
    decayed = [p for g in made if g["weight_decay"] for p in g["params"]]
    assert len(decayed) == 1
    assert decayed[0] is tower.fc.weight
    every = {id(p) for g in made for p in g["params"]}
    assert every == {id(p) for p in tower.parameters() if p.requires_grad}


def test_lr_for_takes_the_first_glob_and_refuses_one_that_matches_nothing():
    made = groups(Tower().named_parameters(), Optim(lr=1.0, lr_for={"fc.*": 3.0}))
    assert sorted({g["peak_lr"] for g in made}) == [1.0, 3.0]
    with pytest.raises(ConfigError, match=r"frozen\.\*"):
        groups(Tower().named_parameters(), Optim(lr_for={"frozen.*": 1.0}))


def test_clip_is_the_norm_of_the_whole_gradient():
    tower = Tower()
    for p in tower.parameters():
        if p.requires_grad:
            p.grad = torch.full_like(p, 2.0)
    count = sum(p.numel() for p in tower.parameters() if p.requires_grad)
    assert float(clip(tower.parameters(), 1.0)) == pytest.approx(2 * math.sqrt(count), rel=1e-6)
    left = math.sqrt(sum(float(p.grad.square().sum()) for p in tower.parameters() if p.grad is not None))
    assert left == pytest.approx(1.0, rel=1e-4)
    small = {n: p.grad.clone() for n, p in tower.named_parameters() if p.grad is not None}
    clip(tower.parameters(), 5.0)  # below the limit nothing is scaled up
    assert all(torch.equal(small[n], p.grad) for n, p in tower.named_parameters() if p.grad is not None)


def test_adamw8bit_is_bitsandbytes_and_moves_what_learns():
    """The 8-bit optimizer runs on CPU tensors; large tensors have 8-bit states, small ones fp32."""
    layer = nn.Linear(128, 128)
    adam = optimizer(layer.named_parameters(), Optim(name="adamw8bit", lr=1e-2))
    assert type(adam).__module__.startswith("bitsandbytes")
    before = layer.weight.detach().clone()
    layer(torch.ones(1, 128)).sum().backward()
    adam.step()
    assert not torch.equal(before, layer.weight)
    assert adam.state[layer.weight]["state1"].dtype == torch.uint8
    assert adam.state[layer.bias]["state1"].dtype == torch.float32
