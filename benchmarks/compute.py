"""What a training step costs in each layout, its loss head, its memory: `python -m benchmarks.compute [ROUNDS]`.

One process, one thread, fp32, CPU time. 64 clips of noise with the report's lengths, the same weights, all layouts in
turn: ROUNDS times (3) in stage 2, once less elsewhere; minima, and medians of the ratios of each round. Every
pass is held to the packed one (loss 1e-5, gradients 1e-4): all of them are the same computation.

padded to 30 s: batches of 16, with as many audio slots. random 16: padded to the longest, logits of every slot, as
public fine-tuning tools run; the reference. buckets: by length, batches of 8, the longest in batches of 4. packed: our
rows. limit: a clip in a batch of 16 of itself, a 16th of the time, with our head; nothing padded, nothing packed.
roofline: the step's useful FLOPs at the rate of bare matrix products of the model's own sizes.

shared 4, 14, 22: packed, and so many of the slots that all samples begin with (a text-first prompt of 22) computed once
a pack. Five questions per audio: encoder and decoder in the proportion of the 0.6B scale, each question with a clip of
its own against one clip and one prompt for all five.
"""

from __future__ import annotations

import itertools
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import layouts
from benchmarks.layouts import Padded, collate
from benchmarks.record import record
from midasheng import config, frames
from midasheng.config import Stage
from midasheng.data.loader import keep_freed_memory
from midasheng.model import adapt
from midasheng.model.audio_lm import AudioLM
from midasheng.model.encoder import EncoderShape
from midasheng.model.flops import cost
from midasheng.model.loss import CHUNK, target_loss
from midasheng.sample import NO_TARGET, Pack, Sample, pack
from midasheng.train.optim import clip, optimizer

CLIPS, BATCH, COPIED = 64, 16, 4
PACKED, THIRTY, REFERENCE, LIMIT, ROOFLINE = "packed", "padded to 30 s", f"random {BATCH}", "limit", "roofline"
WIDTH, DEPTH, FFN, VOCABULARY = 256, 6, 1376, 4096  # the head is 14 % of the decoder; 8 % in the 7B, 11 % in the 3B
LEADS, QUESTIONS, ASKED, TEMPLATE = (4, 14, 22), 5, 16, 5  # clips that are asked about; slots before their audio
# Dasheng-0.6B's 630 M parameters on Qwen3-0.6B's 440 M without embeddings, ffn three times the width; its head is
# 35 % of its blocks, as here
ENCODER_DEPTH, DECODER_DEPTH, ASKED_FFN, ASKED_VOCABULARY, PROPORTION = 10, 7, 768, 7552, 630 / 440
STAGES = ("stage2_pretrain", "stage1_align", "stage3_sft")
HEAD_VOCABULARY, HEAD_SLOTS, ANSWERED, PACK_SLOTS = 151_936, 2048, 0.36, 8192
MEMORY_SLOTS, SWEEP_SLOTS = (2048, 4096, 8192, 16384), (512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Pass:
    """A forward pass: its loss, the samples it is the loss of, how much of a step it stands for."""

    loss: Callable[[], Tensor]
    samples: Sequence[int]
    weight: float = 1.0


def model(
    stage: Stage, depth: int = DEPTH, layers: int | None = None, ffn: int = FFN, vocabulary: int = VOCABULARY
) -> AudioLM:
    """`depth` blocks in the encoder, `layers` (as many) in the decoder. Random weights; frozen and adapted as the stage
    file says, but without dropout, so that layouts can be equal.
    """
    torch.manual_seed(0)
    fields = {
        "vocab_size": vocabulary, "hidden_size": WIDTH, "intermediate_size": ffn, "num_hidden_layers": layers or depth,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        "tie_word_embeddings": False,
    }  # fmt: skip
    lm = AudioLM(EncoderShape(WIDTH, depth, 4), "qwen2_5_omni_text", fields)
    adapt.freeze_all_but(lm, stage.train)
    if stage.lora.targets:
        adapt.add_lora(lm, adapt.LoraPlan(tuple(stage.lora.targets), stage.lora.rank, stage.lora.alpha, 0.0), seed=0)
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:  # at zero, A has no gradient to compare
                nn.init.normal_(parameter, std=0.02)
    lm.train()
    return lm


def row(samples: Sequence[Sample], lead: int = 0) -> Pack:
    """One pack, the first `lead` slots of all samples once; its slots rounded up, as fixed shapes leave some."""
    deaf = [replace(s, clips=()) for s in samples]
    loose = pack(deaf, sum(len(s.ids) for s in samples), layouts.PAD, lead=lead)
    return pack(list(samples), -(-sum(loose.real) // 64) * 64, layouts.PAD, lead=lead)


def shared(lead: int) -> str:
    """Name of the layout."""
    return f"{PACKED}, shared {lead}"


def passes(
    samples: Sequence[Sample], useful: Callable[[Pack], float], packed: Callable[[Pack], Tensor],
    padded: Callable[[Padded, bool], Tensor],
) -> dict[str, list[Pass]]:  # fmt: skip
    """One step in each layout. `packed`: losses of a pack by sample; `padded`: of a batch, with all logits or ours."""

    def batches(order: Sequence[int], size: int) -> list[Pass]:
        groups = [order[start : start + size] for start in range(0, len(order), size)]
        return [Pass(partial(padded, collate([samples[i] for i in g]), True), g) for g in groups]

    every, by_length = range(len(samples)), sorted(range(len(samples)), key=lambda i: len(samples[i].ids))
    # all batches of 30 s cost the same: one is run
    thirty = partial(padded, collate(samples[:BATCH], least_s=30.0), True)
    few = [by_length[int((n + 0.5) * len(samples) / COPIED)] for n in range(COPIED)]
    share = useful(row(samples)) / sum(useful(row([samples[i]])) for i in few) / BATCH
    return {
        PACKED: [Pass(partial(packed, row(samples)), every)],
        THIRTY: [Pass(thirty, every[:BATCH], len(samples) / BATCH)],
        REFERENCE: batches(every, BATCH),
        "buckets": batches(by_length[:-BATCH], 8) + batches(by_length[-BATCH:], 4),
        LIMIT: [Pass(partial(padded, collate([samples[i]] * BATCH), False), [i] * BATCH, share) for i in few],
    }


def encoder_passes(lm: AudioLM, samples: Sequence[Sample]) -> dict[str, list[Pass]]:
    """Of the encoder alone; the loss is some sum over its frames."""
    direction_E = torch.linspace(-1, 1, WIDTH)

    def packed(one: Pack) -> Tensor:
        sums_F = lm.audio_encoder(one.audio_L, one.clips) @ direction_E
        return torch.stack([s.sum() for s in sums_F.split([frames.frames(n) for n in one.clips])])

    def padded(batch: Padded, full_logits: bool) -> Tensor:
        sums_BF = layouts.encode(lm.audio_encoder, batch) @ direction_E
        return sums_BF[layouts.first(batch.mels_B // frames.PATCH, sums_BF.shape[1])].sum()

    return passes(samples, lambda one: cost(lm).of(one)["encoder"], packed, padded)


def step_passes(lm: AudioLM, samples: Sequence[Sample], leads: Sequence[int] = ()) -> dict[str, list[Pass]]:
    """Of the whole model; also packed with so many leading slots once."""

    def padded(batch: Padded, full_logits: bool) -> Tensor:
        with layouts.stock_attention(lm):
            return layouts.loss(lm, batch, full_logits)

    ways = passes(samples, lambda one: sum(cost(lm).of(one).values()), lm, padded)
    return ways | {shared(lead): [Pass(partial(lm, row(samples, lead)), range(len(samples)))] for lead in leads}


def roofline(lm: AudioLM, one: Pack, parts: Sequence[str]) -> float:
    """Seconds of the parts' useful FLOPs at the rate of their matrix products, each with its two gradients."""
    rows = {
        "audio_encoder": sum(map(frames.frames, one.clips)),
        "audio_projector": sum(map(frames.audio_tokens, one.clips)),
        "decoder.model": len(one.ids_T),
        "decoder.lm_head": len(one.target_N),
    }
    shapes = [
        (next(n for part, n in rows.items() if name.startswith(part)), layer.in_features, layer.out_features)
        for name, layer in lm.named_modules()
        if isinstance(layer, nn.Linear) and "lora_" not in name and name.startswith(tuple(rows)[: len(parts)])
    ]
    flops = took = 0.0
    for n, wide, out in set(shapes):
        x, weight, slope = torch.randn(n, wide), torch.randn(out, wide), torch.randn(n, out)
        best = float("inf")
        for _ in range(2):
            start = time.process_time()
            torch.mm(x, weight.T), torch.mm(slope, weight), torch.mm(slope.T, x)
            best = min(best, time.process_time() - start)
        took += best * shapes.count((n, wide, out))
        flops += 6.0 * n * wide * out * shapes.count((n, wide, out))
    return sum(cost(lm).of(one)[part] for part in parts) * took / flops


def updating(lm: AudioLM, stage: Stage) -> Callable[[], None]:
    """The stage's update of the weights, at a rate of 0."""
    adam = optimizer(lm.named_parameters(), replace(stage.optim, lr=0.0, lr_for={}))

    def update() -> None:
        clip(lm.parameters(), stage.optim.clip_norm)
        adam.step()

    return update


def compare(
    lm: AudioLM, ways: dict[str, list[Pass]], bare: Callable[[], float], update: Callable[[], object], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each layout in each round, every pass checked. `bare`: seconds of the roofline; `update`: the weights,
    at a rate of 0."""
    (first,) = ways[PACKED]
    losses_S = first.loss()  # also warms up
    losses_S.sum().backward()
    gradients = {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}
    lm.zero_grad()
    took: dict[str, list[float]] = {name: [] for name in (*ways, ROOFLINE)}
    for number in range(rounds):
        for name, of_step in ways.items():
            if name == THIRTY and number:  # far from all others: once is enough
                continue
            seconds = 0.0
            for one in of_step:
                start = time.process_time()
                loss = one.loss().sum()
                loss.backward()
                seconds += one.weight * (time.process_time() - start)
                wanted = losses_S[list(one.samples)].detach()
                off = float((loss.detach() - wanted.sum()).abs() / wanted.abs().sum())
                assert off < 1e-5, f"{name}: loss {float(loss.detach())} instead of {float(wanted.sum())}"
            if sorted(i for one in of_step for i in one.samples) == list(range(len(losses_S))):
                here = {n: p.grad for n, p in lm.named_parameters() if p.grad is not None}
                apart = {n: float((here[n] - g).norm() / g.norm()) for n, g in gradients.items()}
                worst = max(apart, key=lambda n: apart[n])
                assert apart[worst] < 1e-4, f"{name}: gradient of {worst} differs by {apart[worst]}"
            start = time.process_time()
            update()
            took[name].append(seconds + time.process_time() - start)
            lm.zero_grad()
        took[ROOFLINE].append(bare())
    return took


def table(title: str, took: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Print and return: least seconds, its ratio to that of the reference and of the limit, the median ratio."""
    rows = {}
    print(f"\n{title:28}{'CPU s':>8}{'/ ' + REFERENCE:>12}{'(median)':>10}{'/ limit':>9}{'/ roofline':>11}")
    for name, seconds in took.items():
        ratios = [a / b for a, b in zip(seconds, took[REFERENCE], strict=False)]  # what is padded to 30 s ran once
        least = {other: min(seconds) / min(took[other]) for other in (REFERENCE, LIMIT, ROOFLINE)}
        rows[name] = {"seconds": min(seconds), "median": statistics.median(ratios)} | least
        print(
            f"  {name:26}{min(seconds):8.2f}{least[REFERENCE]:12.3f}{rows[name]['median']:10.3f}{least[LIMIT]:9.2f}"
            f"{least[ROOFLINE]:11.2f}"
        )
    return rows


def five_questions(stage: Stage, rounds: int) -> dict[str, Any]:
    """The same conversations with a clip each and with one clip and prompt for five."""
    lm = model(stage, ENCODER_DEPTH, DECODER_DEPTH, ASKED_FFN, ASKED_VOCABULARY)
    encoder, decoder = (
        sum(p.numel() for n, p in part.named_parameters() if "lora_" not in n and "embed" not in n)
        for part in (lm.audio_encoder, lm.decoder.model)
    )
    assert abs(encoder / decoder / PROPORTION - 1) < 0.1, f"encoder / decoder {encoder / decoder}, not {PROPORTION}"
    runs = layouts.draw(ASKED, ASKED_VOCABULARY, seed=4, before=TEMPLATE, questions=QUESTIONS)
    apart = [replace(s, clips=runs[n // QUESTIONS * QUESTIONS].clips, common=0) for n, s in enumerate(runs)]
    together = row(runs, TEMPLATE)
    ways = {
        PACKED: [Pass(partial(lm, row(apart)), range(len(runs)))],
        "shared": [Pass(partial(lm, together), range(len(runs)))],
    }
    took = compare(lm, ways, lambda: 0.0, updating(lm, stage), rounds)
    faster = min(took[PACKED]) / min(took["shared"])
    shapes = (
        f"{ASKED} clips, {len(runs)} conversations; encoder {ENCODER_DEPTH} x {WIDTH} ({encoder / 1e6:.2f} M), decoder "
        f"{DECODER_DEPTH} x {WIDTH}, ffn {ASKED_FFN} ({decoder / 1e6:.2f} M without embeddings), proportion "
        f"{encoder / decoder:.2f} (0.6b: {PROPORTION:.2f}), vocabulary {ASKED_VOCABULARY}; slots "
        f"{sum(row(apart).real)} and {sum(together.real)}, frames {sum(row(apart).chunks)} and {sum(together.chunks)}"
    )
    print(f"\nfive questions per audio: {shapes}")
    print(f"  a clip for each {min(took[PACKED]):.2f} s, shared {min(took['shared']):.2f} s: {faster:.2f} x as fast")
    return {"shapes": shapes, "apart": took[PACKED], "shared": took["shared"], "faster": faster}


def allocated(work: Callable[[], object]) -> int:
    """The most that torch's allocator gives out beyond what was there before, bytes: unlike train/memory.py, with what
    kernels take for themselves, since some of those that are compared here are others' own."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def heads(rounds: int) -> dict[str, dict[str, float]]:
    """The loss alone: logits, cross-entropy and the gradient of the hidden states; time and peak of full logits. The
    peak of a whole pack is on the line through those of half the slots and of all."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(HEAD_SLOTS, WIDTH), torch.randn(HEAD_VOCABULARY, WIDTH) * 0.02
    labels = torch.randint(HEAD_VOCABULARY, (HEAD_SLOTS,)).masked_fill(torch.rand(HEAD_SLOTS) > ANSWERED, NO_TARGET)
    chunked = nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK // HEAD_VOCABULARY)  # as large as ours
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "full logits": lambda h, y: F.cross_entropy(h @ weight.T, y, reduction="sum"),
        "answer slots": lambda h, y: F.cross_entropy(h[y >= 0] @ weight.T, y[y >= 0], reduction="sum"),
        "ours": lambda h, y: target_loss(h[y >= 0], weight, y[y >= 0]).sum(),
        "torch's chunked": lambda h, y: F.linear_cross_entropy(
            h[y >= 0], weight, y[y >= 0], reduction="sum", options=chunked
        ),
    }

    def run(way: Callable[[Tensor, Tensor], Tensor], slots: int = HEAD_SLOTS) -> Tensor:
        leaf = hidden[:slots].clone().requires_grad_()
        way(leaf, labels[:slots]).backward()
        assert leaf.grad is not None
        return leaf.grad

    peaks, whole = dict[str, int](), dict[str, float]()
    for name, way in ways.items():
        half, peaks[name] = (allocated(partial(run, way, n)) for n in (HEAD_SLOTS // 2, HEAD_SLOTS))
        whole[name] = half + (peaks[name] - half) * (PACK_SLOTS / (HEAD_SLOTS // 2) - 1)
    took: dict[str, list[float]] = {name: [] for name in ways}
    reference = run(ways["answer slots"])
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            slope = run(way)
            took[name].append(time.process_time() - start)
            assert (slope - reference).norm() < 1e-4 * reference.norm(), name
    title = f"loss head, {HEAD_SLOTS} slots, {int((labels >= 0).sum())} answered, {HEAD_VOCABULARY} x {WIDTH}"
    print(f"\n{title:54}{'time':>8}{'memory':>8}{f'at {PACK_SLOTS}':>9}, of full logits")
    rows = {}
    for name, seconds in took.items():
        least, memory = min(seconds) / min(took["full logits"]), peaks[name] / peaks["full logits"]
        at_pack = whole[name] / whole["full logits"]
        rows[name] = {
            "seconds": min(seconds), "bytes": peaks[name], "time": least, "memory": memory, "memory_of_pack": at_pack
        }  # fmt: skip
        print(
            f"  {name:52}{least:8.3f}{memory:8.3f}{at_pack:9.3f}   {min(seconds):.2f} s, {peaks[name] / 2**20:.0f} MiB"
        )
    return rows


def fill(stream: list[Sample], slots: int) -> list[Sample]:
    """The clips from the front of the stream that fit a row, in order; they leave the stream."""
    chosen: list[Sample] = []
    while sum(len(s.ids) for s in chosen) + len(stream[0].ids) <= slots:
        chosen.append(stream.pop(0))
    return chosen


def forward_and_backward(lm: AudioLM, one: Pack) -> None:
    """A step without its update."""
    lm(one).sum().backward()


def memory(stage: Stage) -> dict[str, Any]:
    """Peak of forward and backward over the length of the pack, and the line through it."""
    lm, stream = model(stage, depth=2), layouts.draw(600, VOCABULARY, seed=1)
    peaks = []
    for slots in MEMORY_SLOTS:
        one = pack(fill(stream, slots), slots, layouts.PAD)
        lm.zero_grad()
        peaks.append(allocated(partial(forward_and_backward, lm, one)))
    slope, base = np.polyfit(MEMORY_SLOTS, peaks, 1)
    off = max(abs(base + slope * n - p) / p for n, p in zip(MEMORY_SLOTS, peaks, strict=True))
    print(f"\npeak memory of a step, 2 + 2 layers: {base / 2**20:.1f} MiB + {slope / 2**10:.1f} KiB a slot")
    print(f"  off by {off:.1%} at most; MiB at {MEMORY_SLOTS}: {[round(peak / 2**20) for peak in peaks]}")
    return {"slots": MEMORY_SLOTS, "bytes": peaks, "base": base, "per_slot": slope, "off": off}


def sweep(stage: Stage) -> dict[str, Any]:
    """Rows of each length, packed and as one padded batch of as many slots: clips a second, of the best."""
    lm, rate = model(stage, depth=2), dict[str, list[float]](packed=[], padded=[])
    mean = sum(cost(lm).of(row(layouts.draw(1000, VOCABULARY, seed=2))).values()) / 1000
    for slots in SWEEP_SLOTS:
        for way, found in rate.items():
            stream, flops, took = layouts.draw(400, VOCABULARY, seed=3), 0.0, 0.0
            for _ in range(max(1, 2048 // slots)):
                if way == "packed":
                    chosen = fill(stream, slots)
                    one = pack(chosen, slots, layouts.PAD)
                    loss: Callable[[], Tensor] = partial(lm, one)
                else:
                    longest = itertools.accumulate((len(s.ids) for s in stream), max)
                    size = next(n for n, most in enumerate(longest) if (n + 1) * most > slots)
                    chosen, stream = stream[:size], stream[size:]
                    loss = partial(layouts.loss, lm, collate(chosen))
                flops += sum(cost(lm).of(row(chosen)).values())
                start = time.process_time()
                if way == "packed":
                    loss().sum().backward()
                else:
                    with layouts.stock_attention(lm):
                        loss().backward()
                took += time.process_time() - start
            found.append(flops / mean / took)  # of clips of the mean cost: short ones are not counted as speed
    best = max(itertools.chain(*rate.values()))
    print("\n2 + 2 layers, rows of " + "".join(f"{n:8}" for n in SWEEP_SLOTS))
    for way, values in rate.items():
        print(f"  {way + ', clips/s':20}" + "".join(f"{v / best:8.2f}" for v in values) + f"   of {best:.1f}")
    return {"slots": SWEEP_SLOTS, "clips_per_second": rate}


def reached(step: dict[str, dict[str, float]], head: dict[str, float], faster: float) -> None:
    """Print the aims of compute.md that a CPU can show, each with what was measured."""
    for what, aim, got in (
        ("packed / random padded 16, full logits", 0.46, step[PACKED][REFERENCE]),
        (f"packed + shared prefix of {LEADS[-1]} / the same", 0.41, step[shared(LEADS[-1])][REFERENCE]),
        ("packed / per-clip limit", 1.0, step[PACKED][LIMIT]),
        ("five questions per audio, shared / apart", 1 / 1.8, 1 / faster),
        ("packed / GEMM roofline, fp32", 1.5, step[PACKED][ROOFLINE]),
        ("loss head, time of full logits", 0.45, head["time"]),
        (f"loss head, memory at {PACK_SLOTS} slots, by the line", 0.03, head["memory_of_pack"]),
    ):
        print(f"  {what:46} {got:.3f}, aim {aim:.2f}: {'reached' if got <= aim else 'NOT reached'}")


def main() -> None:
    """Measure, print, write."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    torch.set_num_threads(1)
    keep_freed_memory()  # as in training
    stages = {name: config.load(Path(f"configs/{name}.yaml"), "mini", []).stage for name in STAGES}
    samples = layouts.draw(CLIPS, VOCABULARY, seed=0)
    lengths_s = [frames.seconds(len(s.clips[0])) for s in samples]
    slots, targets = len(row(samples).ids_T), sum(row(samples).targets)
    shapes = (
        f"{CLIPS} clips of {np.mean(lengths_s):.2f} s ({min(lengths_s):.1f} to {max(lengths_s):.1f}), {slots} slots, "
        f"{targets} targets; encoder and decoder {DEPTH} x {WIDTH}, vocabulary {VOCABULARY}"
    )
    print(f"{shapes}; torch {torch.__version__}, 1 thread, {platform.machine()}, {rounds} rounds")
    layers: dict[str, Any] = {}
    for number, (name, stage) in enumerate(stages.items()):
        lm = model(stage)
        parts = ("encoder", "projector", "decoder", "head")
        bare = partial(roofline, lm, row(samples), parts)
        ways = step_passes(lm, samples, () if number else LEADS)
        took = compare(lm, ways, bare, updating(lm, stage), max(1, rounds - bool(number)))
        layers[name] = table(f"{name}, {stage.optim.name}", took)
        if not number:
            bare = partial(roofline, lm, row(samples), parts[:1])
            took = compare(lm, encoder_passes(lm, samples), bare, lambda: None, max(1, rounds - 1))
            layers["encoder"] = table("encoder alone", took)
    first, head = stages[STAGES[0]], heads(max(1, rounds - 1))
    asked = five_questions(first, max(1, rounds - 1))
    values = {
        "shapes": shapes, "torch": torch.__version__, "threads": 1, "rounds": rounds, "machine": platform.machine(),
        "layouts": layers, "heads": head, "five_questions": asked, "memory": memory(first), "sweep": sweep(first),
    }  # fmt: skip
    record("compute", values)
    print("\naims (stage 2)")
    reached(layers[STAGES[0]], head["ours"], asked["faster"])


if __name__ == "__main__":
    main()
