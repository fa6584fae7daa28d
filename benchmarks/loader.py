"""Reading real shards: `python -m benchmarks.loader [CLIPS]`, after `make data`. Ratios, all ways in turn in one run.

bare: read the same clips' bytes and decode them, nothing else. loader: read, decode, tokenise, pack, in the plan's
order, as a stage does. stream: webdataset with a shuffle buffer of 1,000, decoding and tokenising the same records.
Once with mini's own clips, once with clips of about 10 s that are joined from them. With CLIPS, also: memory of the
loader's process over so many clips.
"""

import io
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile
import torch
import webdataset

from midasheng import config
from midasheng.data.audio import decode, planned_samples
from midasheng.data.index import open_corpus
from midasheng.data.loader import conversation, keep_freed_memory, train_loader
from midasheng.data.manifest import conversations
from midasheng.data.plan import Budget, mean_cost
from midasheng.data.room import DataRoom, read_data
from midasheng.data.shard import Reading
from midasheng.frames import SAMPLE_RATE

ROUNDS, CLIPS, JOINED_S = 9, 1_500, 10.0
PACK_SLOTS, PACKS = 8192, 1
SETTINGS = [
    "batch.kind=throughput", f"batch.pack_slots={PACK_SLOTS}", f"batch.packs_per_step={PACKS}", "run.length=9 steps",
    "run.warmup=1 steps", "data.val_clips=1",
]  # fmt: skip


def resident() -> float:
    """Anonymous memory of this process, MB."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024


def joined(data: DataRoom, folder: Path) -> DataRoom:
    """The same room with clips of about JOINED_S: neighbours in a shard end to end, with the text of the first."""
    corpora = []
    for corpus in data.corpora:
        writer = webdataset.TarWriter(str(folder / f"{corpus.card.name}.tar"), encoder=False, mtime=0)
        parts: list[np.ndarray] = []
        urls = [row.shard.path for row in corpus.rows]
        for record in webdataset.WebDataset(urls, shardshuffle=False):
            parts.append(soundfile.read(io.BytesIO(record["flac"]), dtype="int16")[0])
            if sum(map(len, parts)) >= JOINED_S * SAMPLE_RATE:
                file = io.BytesIO()
                soundfile.write(file, np.concatenate(parts), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
                writer.write({"__key__": record["__key__"], "flac": file.getvalue(), "json": record["json"]})
                parts = []
        writer.close()
        card = replace(corpus.card, shards=f"{corpus.card.name}.tar")
        corpora.append(open_corpus(Reading(card, data.chat), str(folder), folder / ".index", 60.0, make=True))
    frames = round(PACK_SLOTS * 1.02 * np.divide(*mean_cost(corpora, data.mix.percent)[::-1]))
    return replace(data, corpora=tuple(corpora), budget=Budget(PACK_SLOTS, frames, PACKS))


def steps(data: DataRoom, clips: int) -> int:
    """Steps that hold about so many clips."""
    planner = data.planner(0)
    drawn = itertools.accumulate(sum(map(len, step.packs)) for step in planner)
    return next(n for n, total in enumerate(drawn, 1) if total >= clips)


def compare(data: DataRoom) -> None:
    """Time the three ways and print the ratios."""
    n_steps = steps(data, CLIPS)
    planner = data.planner(0)
    chosen = [p for _ in range(n_steps) for pack in next(planner).packs for p in pack]
    places = [(r.audio, r.n_samples) for r in (data.corpora[p.corpus].read(p.record)[0] for p in chosen) if r.audio]
    mean_s = sum(n for _, n in places) / SAMPLE_RATE / len(places)

    def bare() -> None:
        for place, n_samples in places:
            decode(place.read(), n_samples)

    def loader() -> None:
        loader = train_loader(data.planner(0), data.corpora, data.chat, n_steps, rank=0, world=1, workers=0)
        assert sum(len(batch.trained) for batch in loader) == len(places)

    def stream() -> None:
        cards = {row.shard.path: c.card for c in data.corpora for row in c.rows}
        urls = itertools.cycle(cards)  # a small corpus comes again
        shuffled = webdataset.WebDataset(itertools.islice(urls, 99 * len(cards)), shardshuffle=False).shuffle(1000)
        for record in itertools.islice(shuffled, len(places)):
            card, audio = cards[record["__url__"]], record["flac"]
            turns = conversations(card, json.loads(record["json"]), record["__key__"])
            conversation(card, record["__key__"], turns[0], [decode(audio, planned_samples(audio))], data.chat)

    ways: dict[str, Callable[[], None]] = {"bare": bare, "loader": loader, "stream": stream}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            start = time.process_time()
            way()
            cpu[name].append((time.process_time() - start) / len(places))
    print(
        f"{len(places)} clips of {mean_s:.2f} s on average; CPU time of one process, {ROUNDS} rounds in turn, medians"
    )
    for name, values in cpu.items():
        took = statistics.median(values)
        print(f"  {name:8}{1e3 * took:8.3f} ms a clip{mean_s / took:9.0f} x real time")
    for base in ("bare", "stream"):
        ratios = [b / v for b, v in zip(cpu[base], cpu["loader"], strict=True)]
        print(f"  loader / {base}: {statistics.median(ratios):.3f} as fast ({min(ratios):.3f} to {max(ratios):.3f})")


def memory(data: DataRoom, clips: int) -> None:
    """Print how the loader's process grows over many clips."""
    loader = train_loader(data.planner(0), data.corpora, data.chat, 10**9, rank=0, world=1, workers=0)
    seen, sizes = 0, []
    for batch in loader:
        seen += len(batch.trained)
        sizes.append((seen, resident()))
        if seen >= clips:
            break
    late = [size for n, size in sizes if n > clips / 10]
    print(
        f"memory over {seen} clips: {late[0]:.0f} MB after a tenth of them, {late[-1]:.0f} MB at the end, "
        f"{max(late):.0f} MB at most"
    )


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as in a worker
    data = read_data(config.load(Path("configs/stage1_align.yaml"), "mini", SETTINGS).stage, make=True)
    compare(data)
    with tempfile.TemporaryDirectory() as folder:
        compare(joined(data, Path(folder)))
    if len(sys.argv) > 1:
        memory(data, int(sys.argv[1]))


if __name__ == "__main__":
    main()
