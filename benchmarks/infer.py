"""How fast a model answers, by the protocol of the report's Table 13 and Figure 7: `make bench-infer`.

30 s of audio and exactly 100 new tokens for each sample, whatever the model would say, in batches that double until
memory ends; then the time to the first token of clips of 2 to 32 s, and the multiply-adds until there. Our generation
(packed prompts, KV cache) in all; the weights are random at a SCALE, or NAME's. What is heard and asked is noise and
random ids: nothing here depends on it.

In turn with ours, in every round, runs the model that the report compares with, as far as it is a matter of layout: the
same encoder and decoder, but an audio slot for each encoder frame (25 Hz), and clips padded to 30 s. Between them
stands 25 Hz without padding, so that one can tell what is whose. Ratios are medians over rounds.

On a GPU: wall time, and memory ends where it ends. On a CPU: CPU time of one thread, and tensors that live may take
`memory_gib` (by default five times the weights, as the report's 80 GB are to its 16.6 GB, and at least .25).
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from benchmarks.record import record
from midasheng import config, frames
from midasheng.config import UserError
from midasheng.inference import load
from midasheng.model import adapt, attention
from midasheng.model.audio_lm import AudioLM
from midasheng.model.encoder import EncoderShape
from midasheng.model.flops import cost
from midasheng.model.generate import generate
from midasheng.sample import NO_TARGET, Pack, Sample, pack
from midasheng.train.memory import GIB, OUT_OF_MEMORY, peak_bytes, size_of
from stages.chat import folder_of

CLIP_S, NEW_TOKENS = 30.0, 100  # Table 13
FIRST_S = (2.0, 4.0, 8.0, 16.0, 32.0)  # Figure 7
BEFORE, AFTER = 4, 11  # text slots: <|im_start|>user\n<|audio_bos|>; <|audio_eos|>, the caption prompt, to the answer
WEIGHTS, LEAST_GIB = 5, 0.25  # memory of a CPU: a multiple of the weights
OURS, EVERY, PADDED = "5 Hz", "25 Hz", "25 Hz in 30 s"
# memory_gib 0: see above; at `most` so many samples in a batch, 0: until memory ends
OPTIONS: dict[str, float] = {"memory_gib": 0.0, "most": 0, "rounds": 3}


# -- what is fed -------------------------------------------------------------------------------------------------------


class FrameProjector(nn.Module):
    """As our projector, without stacking: an encoder frame becomes an audio token."""

    def __init__(self, encoder_dim: int, decoder_dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(encoder_dim, decoder_dim), nn.GELU(), nn.Linear(decoder_dim, decoder_dim))

    def forward(self, frames_FE: Tensor, clip_frames: Sequence[int]) -> Tensor:
        """(frames, E) -> (frames, D)."""
        return self.net(frames_FE[: sum(clip_frames)])


class EveryFrame(AudioLM):
    """The encoder and the decoder of another model, the very same tensors, with 25 audio slots a second."""

    def __init__(self, lm: AudioLM) -> None:
        nn.Module.__init__(self)
        self.audio_encoder, self.decoder, self.compute_dtype = lm.audio_encoder, lm.decoder, lm.compute_dtype
        projector = FrameProjector(lm.audio_encoder.shape.dim, lm.decoder.config.hidden_size)
        self.audio_projector = projector.to(lm.audio_projector.net[0].weight).requires_grad_(False)

    def text(self, pack: Pack) -> Tensor:
        """As AudioLM's, with another number of audio slots."""
        slots, n_frames = len(pack.audio_K), sum(map(frames.frames, pack.clips))
        assert slots == n_frames, f"{slots} audio slots but {n_frames} frames"
        return self.decoder.embed(pack.ids_T.masked_fill(pack.is_audio_T, 0))


@dataclass(frozen=True)
class Feed:
    """A way to feed a decoder: the audio slots of a clip of so many samples; shorter clips are padded to `least_s`."""

    name: str
    lm: AudioLM
    slots: Callable[[int], int]
    least_s: float = 0.0

    def prompts(self, audio_s: float, batch: int) -> Pack:
        """So many prompts with a clip of `audio_s` seconds of noise each."""
        draw = np.random.default_rng(0)
        clip = 0.1 * draw.standard_normal(round(audio_s * frames.SAMPLE_RATE), dtype=np.float32)
        clip = np.pad(clip, (0, max(0, round(self.least_s * frames.SAMPLE_RATE) - len(clip))))
        slots = self.slots(len(clip))
        ids = draw.integers(0, self.lm.decoder.config.vocab_size, BEFORE + slots + AFTER)
        is_audio = np.arange(len(ids))
        is_audio = (is_audio >= BEFORE) & (is_audio < BEFORE + slots)
        labels = np.full(len(ids), NO_TARGET, dtype=np.int64)
        samples = [Sample("", str(n), "", ids, labels, is_audio, (clip,)) for n in range(batch)]
        return pack(samples, batch * len(ids), 0)


def feeds(lm: AudioLM) -> list[Feed]:
    """Ours, 25 Hz, and 25 Hz padded to 30 s."""
    every = EveryFrame(lm).eval()
    return [
        Feed(OURS, lm, frames.audio_tokens), Feed(EVERY, every, frames.frames),
        Feed(PADDED, every, frames.frames, CLIP_S),
    ]  # fmt: skip


# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Took:
    """Bytes at the peak, weights included, and the seconds of each round."""

    peak: int
    seconds: list[float]


def answer(lm: AudioLM, prompts: Pack, new_tokens: int) -> None:
    """So many new tokens for each prompt: no id ends an answer."""
    made = [len(one.ids) for one in generate(lm, prompts, (), new_tokens)]
    assert made == [new_tokens] * len(prompts.segments), f"{made} new tokens instead of {new_tokens} each"


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """On a GPU wall time, else CPU time."""
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize(device)
    start = clock()
    run()
    if on_gpu:
        torch.cuda.synchronize(device)
    return clock() - start


def held(lm: AudioLM, prompts: Pack, device: torch.device) -> int:
    """Bytes that are there before a run: weights, and on a CPU the prompts, which need not go anywhere."""
    packed = [t for t in vars(prompts).values() if isinstance(t, Tensor)] if device.type == "cpu" else []
    return size_of([*lm.parameters(), *lm.buffers(), *packed])


def in_turn(
    work: Mapping[str, tuple[AudioLM, Pack]], new_tokens: int, rounds: int, device: torch.device, limit: float
) -> dict[str, Took | None]:
    """All of them once for their memory, which also warms up, then `rounds` times one after the other; None for what
    memory ended in."""
    peaks, took = dict[str, int](), dict[str, list[float]]()
    for number in range(1 + rounds):
        for name, (lm, prompts) in work.items():
            if number and name not in peaks:
                continue

            def run(lm: AudioLM = lm, prompts: Pack = prompts) -> None:
                answer(lm, prompts, new_tokens)

            try:
                if number:
                    took.setdefault(name, []).append(seconds(run, device))
                else:
                    there = held(lm, prompts, device)
                    peaks[name] = there + peak_bytes(run, device, limit - there)
            except OUT_OF_MEMORY:
                peaks.pop(name, None)
            if name not in peaks:
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    return {name: Took(peaks[name], took[name]) if name in peaks else None for name in work}


def faster(ours: Took | None, other: Took | None) -> float | None:
    """How many times as fast is ours: median of the rounds."""
    if ours is None or other is None:
        return None
    return statistics.median(b / a for a, b in zip(ours.seconds, other.seconds, strict=True))


def gmacs(lm: AudioLM, prompts: Pack) -> dict[str, float]:
    """10^9 multiply-adds until the first token of each prompt, by our count (causal attention as the full square):
    encoder with projector; decoder, with the head for one slot of each prompt."""
    assert not any(p.requires_grad for p in lm.parameters()), "what learns would be counted backward too"
    count = cost(lm)
    flops = count.of(prompts)
    decoder = flops["decoder"] + count.target * len(prompts.segments)
    return {"encoder": (flops["encoder"] + flops["projector"]) / 2e9, "decoder": decoder / 2e9}


def batches(
    lm: AudioLM, device: torch.device, limit: float, *, rounds: int, most: int = 0, clip_s: float = CLIP_S,
    new_tokens: int = NEW_TOKENS,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Table 13: a row for each batch, until no feed has memory left, or at most `most` samples. A feed whose memory has
    ended is tried no more."""
    left = {feed.name: feed for feed in feeds(lm) if feed.name != EVERY}  # at 30 s there is nothing to pad
    batch = 1
    while left and (not most or batch <= most):
        work = {name: (feed.lm, feed.prompts(clip_s, batch)) for name, feed in left.items()}
        found = in_turn(work, new_tokens, rounds, device, limit)
        ours, padded = found.get(OURS), found.get(PADDED)
        row: dict[str, Any] = {"batch": batch, "faster": faster(ours, padded)}
        row["more_memory"] = padded.peak / ours.peak if ours and padded else None
        for name, one in found.items():
            row[name] = {"out_of_memory": True}
            if one is None:
                del left[name]
            else:
                rate = batch / min(one.seconds)
                row[name] = {"samples_per_s": rate, "seconds": one.seconds, "peak_gib": one.peak / GIB}
        yield row
        batch *= 2


def first_tokens(
    lm: AudioLM, device: torch.device, limit: float, *, rounds: int, clips_s: Sequence[float] = FIRST_S
) -> Iterator[dict[str, Any]]:
    """Figure 7: a row for each length of a clip."""
    for clip_s in clips_s:
        work = {feed.name: (feed.lm, feed.prompts(clip_s, 1)) for feed in feeds(lm)}
        found = in_turn(work, 1, rounds, device, limit)
        row: dict[str, Any] = {"audio_s": clip_s}
        for name, one in found.items():
            row[name] = {"slots": len(work[name][1].audio_K), "gmacs": gmacs(*work[name])}
            if one is None:
                row[name]["out_of_memory"] = True
            else:
                row[name] |= {"seconds": one.seconds, "peak_gib": one.peak / GIB}
                row[name]["faster"] = faster(found[OURS], one)
        yield row


# -- tables ------------------------------------------------------------------------------------------------------------


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(of: Mapping[str, Any] | None, text: Callable[[Mapping[str, Any]], str]) -> str:
    if of is None:
        return "-"
    return "out of memory" if of.get("out_of_memory") else text(of)


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def batches_table(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown, in the form of Table 13, with the memory at the peak, weights included."""
    names = (OURS, PADDED)
    head = ["batch size", *(f"{name} (samples/s)" for name in names), "speedup"]
    head += [*(f"{name} (GiB)" for name in names), "memory"]
    yield _line(head)
    yield "|---" * len(head) + "|"
    for row in rows:
        rates = [_cell(row.get(name), lambda one: f"{one['samples_per_s']:.3g}") for name in names]
        peaks = [_cell(row.get(name), lambda one: f"{one['peak_gib']:.3g}") for name in names]
        yield _line([str(row["batch"]), *rates, _times(row["faster"]), *peaks, _times(row["more_memory"])])


def first_tokens_table(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Markdown: what Figure 7 draws. GMACs as encoder + decoder."""
    names = (OURS, EVERY, PADDED)
    head = ["audio (s)", *(f"{name} (ms)" for name in names), *(f"speedup to {name}" for name in names[1:])]
    head += [f"{name} (GMACs)" for name in names]
    yield _line(head)
    yield "|---" * len(head) + "|"
    for row in rows:
        cells = [f"{row['audio_s']:g}"]
        cells += [_cell(row[name], lambda one: f"{1e3 * min(one['seconds']):.4g}") for name in names]
        cells += [_times(row[name].get("faster")) for name in names[1:]]
        cells += ["{encoder:.4g} + {decoder:.4g}".format(**row[name]["gmacs"]) for name in names]
        yield _line(cells)


def shown(
    table: Callable[[Iterable[dict[str, Any]]], Iterator[str]], rows: Iterable[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Print a table row by row as they are measured, and keep them."""
    kept = []

    def each() -> Iterator[dict[str, Any]]:
        for row in rows:
            kept.append(row)
            yield row

    for line in table(each()):
        print(line, flush=True)
    return kept


# -- the model, and the run --------------------------------------------------------------------------------------------


def random_model(scale: str, device: torch.device, dtype: str) -> AudioLM:
    """A scale's shapes, random weights. Raises UserError."""
    model = config.load(Path("configs/stage1_align.yaml"), scale, []).stage.model
    shape = EncoderShape(model.encoder.dim, model.encoder.depth, model.encoder.heads)
    torch.manual_seed(0)
    lm = AudioLM(shape, model.decoder.architecture, model.decoder.fields).requires_grad_(False)
    adapt.set_precision(lm, "fp32" if dtype == "float32" else "bf16")
    attention.verify(device, getattr(torch, dtype))
    return lm.to(device).eval()


def bench(a: argparse.Namespace) -> None:
    """Measure, print, write. Raises UserError."""
    set_ = OPTIONS | config.settings_of(a.settings, {name: type(value) for name, value in OPTIONS.items()})
    rounds, most = int(set_["rounds"]), int(set_["most"])
    if rounds < 1:
        raise UserError(f"SET: rounds={rounds}: write 1 or more")
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    dtype = "float32" if device.type == "cpu" else "bfloat16"
    torch.set_num_threads(1)
    if a.name:
        lm = load(folder_of(Path(a.runs), a.scale, a.name), str(device), dtype).lm
    else:
        lm = random_model(a.scale, device, dtype)
    own, limit = size_of([*lm.parameters(), *lm.buffers()]), set_["memory_gib"] * GIB
    if device.type == "cpu":
        name, limit = f"{platform.machine()} CPU, one thread", limit or max(WEIGHTS * own, LEAST_GIB * GIB)
    else:
        name, total = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[1]
        if limit:
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
        limit = limit or total
    told: dict[str, Any] = {
        "weights": a.name or f"random, {a.scale}", "parameters": sum(p.numel() for p in lm.parameters()),
        "weights_gib": own / GIB, "device": name, "memory_gib": limit / GIB, "dtype": dtype,
        "kernels": f"prompts {attention.kernel(device.type, getattr(torch, dtype))}, answers sdpa one by one",
        "software": f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}" + (f", CUDA {torch.version.cuda}" if device.type == "cuda" else ""),
        "time": "wall" if device.type == "cuda" else "CPU", "audio_s": CLIP_S, "new_tokens": NEW_TOKENS,
        "text_slots": BEFORE + AFTER, "rounds": rounds, "most": most,
    }  # fmt: skip
    print(
        "; ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in told.items())
    )
    print(f"\n{CLIP_S:g} s of audio, {NEW_TOKENS} new tokens\n")
    told["batches"] = shown(batches_table, batches(lm, device, limit, rounds=rounds, most=most))
    print("\nto the first token, one clip\n")
    told["first_tokens"] = shown(first_tokens_table, first_tokens(lm, device, limit, rounds=rounds))
    record(f"{told['weights']} on {name}", told, "infer.json")


def main() -> int:
    """Measure one model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--scale", default="mini")
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--name", default="")
    parser.add_argument("settings", nargs="*")
    try:
        bench(parser.parse_intermixed_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
