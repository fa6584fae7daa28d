"""Packed rows against the same clips one by one: seconds per step, as a ratio in one run.

    .venv/bin/python benchmarks/packing.py [rounds]

Stage 1 at mini on the real clips of `make data`, forward and backward, fp32. Rounds are interleaved, so the ratio
holds on a noisy machine.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from midasheng import frames
from midasheng.data.loader import load_sample
from midasheng.model.audio_lm import AudioLM
from midasheng.model.encoder import EncoderShape
from midasheng.sample import Pack, pack
from midasheng.train.fit import read_data
from midasheng.train.order import command_line


def seconds(model: AudioLM, packs: list[Pack]) -> float:
    """Wall seconds of forward and backward over `packs`."""
    begin = time.perf_counter()
    for one in packs:
        model(one).sum().backward()
    return time.perf_counter() - begin


def main() -> None:
    """Print the median ratio and its range."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    stage = command_line("configs/stage1_align.yaml", []).stage
    data = read_data(stage)
    planned = next(data.planner(stage.run.seed)).packs
    card = data.corpora[0].card
    samples = [
        [load_sample(card.name, card.task, data.corpora[0].train[p.record], p.variant, data.chat) for p in chosen]
        for chosen in planned
    ]
    packed = [pack(chosen, data.budget.pack_slots, data.chat.pad) for chosen in samples]
    alone = [pack([s], len(s.ids), data.chat.pad) for chosen in samples for s in chosen]
    e, d = stage.model.encoder, stage.model.decoder
    model = AudioLM(EncoderShape(e.dim, e.depth, e.heads), d.architecture, d.fields)
    times = [(seconds(model, packed), seconds(model, alone)) for _ in range(rounds + 1)][1:]
    ratios = [a / b for a, b in times]
    audio_s = sum(frames.seconds(c) for p in packed for c in p.clips)
    spread = f"from {min(ratios):.2f} to {max(ratios):.2f}, {rounds} rounds, {torch.get_num_threads()} threads"
    print(f"{len(alone)} clips, {audio_s:.0f} s of audio, {len(packed)} packs of {data.budget.pack_slots} slots")
    print(f"packed / one by one = {statistics.median(ratios):.2f} ({spread})")


if __name__ == "__main__":
    main()
