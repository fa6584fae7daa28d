"""The plan at the size of the real thing, by index alone: `python -m benchmarks.plan [FOLDER]`.

Writes side files of a simulated mix (60 corpora, 10 M records) below
FOLDER, once; then measures opening, planning, restoring, what the fixed shapes cost, and whether packs drift.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from midasheng import frames
from midasheng.data.index import CorpusIndex, open_corpus
from midasheng.data.manifest import Card
from midasheng.data.plan import ROOM, Budget, PlannedStep, Planner, mean_cost
from midasheng.data.shard import Reading, save_columns, side_path
from midasheng.data.storage import list_shards

# share of clips per 1-second bin, from the report's Figure 3; the rest lies below 22 s
REPORT = [
    .2775, .1261, .1358, .1194, .1006, .0772, .0528, .0330, .0206, .0139, .0096, .0071, .0057, .0052, .0051, .0047,
    .0023, .0013, .0010, .0008,
]  # fmt: skip
RECORDS, PER_SHARD = 10_000_000, 10_000
SHARES = 1.1 ** -np.arange(60, dtype=float) / np.sum(1.1 ** -np.arange(60, dtype=float))
PACK_SLOTS, PACKS = 8192, 80
SLOT_COST, FRAME_COST = 4 * 7.07e9, 6 * 0.63e9  # FLOP at 7B: frozen decoder with LoRA, trained encoder


class NoChat:
    """Stands for a tokenizer in the fingerprint; nothing is tokenised here."""

    def fingerprint(self) -> str:
        """Any."""
        return "simulated"

    token_ids: ClassVar[dict[str, int]] = {}


def seconds(kind: str, n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Lengths of `n` clips: "report", the histogram above; "speech", log-normal around 6 s with a tail to 30 s."""
    if kind == "speech":
        return np.clip(rng.lognormal(1.8, 0.7, n), 0.3, 30.0)
    share = np.asarray(REPORT) / np.sum(REPORT)
    return np.maximum(0.2, rng.choice(len(share), n, p=share) + rng.random(n))


def columns(kind: str, n: int, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
    """One shard: about 22 slots of prompt; in answers, 8 to 36 slots ("report") or three words a second ("speech")."""
    length = seconds(kind, n, rng)
    many = rng.integers(1, 4, n)
    answer = rng.integers(8, 37, many.sum()) if kind == "report" else np.repeat(4 * length, many).astype(int) + 3
    keys = b"".join(b"%012d" % k for k in range(n))
    span = np.stack([np.arange(n) * 100_000, np.full(n, 90_000)], axis=1)
    return {
        "span": span, "json": np.full((n, 2), 512, np.uint32), "audio": np.full((n, 2), 1024, np.uint32),
        "n_samples": (length * frames.SAMPLE_RATE).astype(np.int32), "source": rng.random(n),
        "reason": np.zeros(n, np.uint8), "until": np.cumsum(many, dtype=np.int32),
        "slots": (answer + 22).astype(np.int32), "targets": (answer + 1).astype(np.int32),
        "common": np.zeros(n, np.int32),
        "key_until": np.arange(12, 12 * n + 12, 12), "keys": np.frombuffer(keys, np.uint8),
    }  # fmt: skip


def simulate(folder: Path, kind: str) -> list[Reading]:
    """The corpora of a mix, largest first; shards of one byte and their side files are written where there are none."""
    readings = []
    for number, share in enumerate(SHARES):
        card = Card(f"{kind}{number:02}", "asr", f"{kind}{number:02}-*.tar", "none")
        reading = Reading(card, NoChat())  # type: ignore[arg-type]
        rng = np.random.default_rng([number, kind == "speech"])
        left = max(2_000, int(share * RECORDS * 1.01))
        for place in range(-(-left // PER_SHARD)):
            n = min(PER_SHARD, left - place * PER_SHARD)
            path = folder / f"{card.name}-{place:06}.tar"
            if not path.is_file():
                folder.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"0")
                (shard,) = list_shards(str(folder), path.name)
                save_columns(
                    side_path(folder / ".index", reading, shard), columns(kind, n, rng),
                    {"shard": vars(shard), "reasons": [], "damage": [], "lead": []},
                )  # fmt: skip
        readings.append(reading)
    return readings


def opened(folder: Path, readings: list[Reading]) -> list[CorpusIndex]:
    """Their indexes, as a stage opens them."""
    return [open_corpus(r, str(folder), folder / ".index", 30.0, make=True) for r in readings]


def resident() -> float:
    """Memory of this process, MB, files mapped into it left out."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def autocorrelation(x: NDArray[np.float64], lag: int) -> float:
    """Of a series with itself `lag` places later."""
    apart = x - x.mean()
    return float((apart[lag:] * apart[:-lag]).mean() / apart.var())


def report(kind: str, folder: Path, steps: int) -> None:
    """Measure one mix and print it."""
    readings, percent = simulate(folder, kind), (100 * SHARES).tolist()
    opened(folder, readings)  # makes the tables
    before, start = resident(), time.perf_counter()
    corpora = opened(folder, readings)
    took, memory = time.perf_counter() - start, resident() - before
    records = sum(len(c) for c in corpora)
    print(f"{kind}: {records:,} records in {sum(len(c.rows) for c in corpora):,} shards of {len(corpora)} corpora")
    print(f"  opened in {took:.2f} s, {memory:.0f} MB")
    mean_slots, mean_frames = mean_cost(corpora, percent)
    for room in (1.0, ROOM, 1.05):
        shape = Budget(PACK_SLOTS, round(PACK_SLOTS * mean_frames / mean_slots * room), PACKS)
        planner = Planner(corpora, percent, shape, 0)
        next(planner)
        start = time.process_time()
        planned: list[PlannedStep] = [next(planner) for _ in range(steps)]
        cpu = time.process_time() - start
        packs = [p for step in planned for p in step.packs]
        slots, used = (np.array([sum(s[f] for s in p) for p in packs]) for f in (5, 6))
        samples = sum(map(len, packs))
        cost = len(packs) * (SLOT_COST * shape.pack_slots + FRAME_COST * shape.pack_frames)
        useful = SLOT_COST * slots.sum() + FRAME_COST * used.sum()
        length = np.array([np.mean([s.frames for s in p]) for p in packs])
        lags = [autocorrelation(length, lag) for lag in (1, PACKS)]
        again = Planner(corpora, percent, shape, 0)
        start = time.perf_counter()
        again.restore(json.loads(json.dumps(planned[-1].state_after)))
        restored = time.perf_counter() - start
        same = next(again).packs == next(planner).packs
        total = time.perf_counter() - start
        state = len(json.dumps(planned[-1].state_after)) / 1024
        fills = [slots.mean() / shape.pack_slots, used.mean() / shape.pack_frames]
        print(
            f"  frames x {room:.2f}: fixed shapes cost {cost / useful:.4f} of useful; fill {fills[0]:.4f}, "
            f"{fills[1]:.4f}; {samples / len(packs):.0f} samples a pack\n"
            f"    autocorrelation of mean length {lags[0]:+.3f} (next pack), {lags[1]:+.3f} (next step; "
            f"{1 / len(packs) ** 0.5:.3f} is chance); {1e6 * cpu / samples:.1f} us CPU a sample\n"
            f"    restored in {restored:.2f} s (with a step {total:.2f} s), equal: {same}; state {state:.1f} kB"
        )


if __name__ == "__main__":
    where = Path(sys.argv[1] if len(sys.argv) > 1 else "/tmp/midasheng-plan")
    for mix in ("report", "speech"):
        report(mix, where, steps=40)
