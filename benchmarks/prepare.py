"""Preparing shards: `python -m benchmarks.prepare [FILES]`, after `make data`. Ratios, in turn in one run.

bare: the same files decoded, averaged to mono, resampled and encoded as FLAC by as many processes, nothing else.
prepare: the whole way from a CSV to shards, card and report.
"""

import csv
import io
import os
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import soxr
import webdataset

from midasheng.curate.prepare import Settings, fingerprint, prepare
from midasheng.curate.sources import open_source
from midasheng.frames import SAMPLE_RATE

ROUNDS = 5
KINDS = (  # extension, format, subtype, rate, channels
    ("wav", "WAV", "PCM_16", 48_000, 2), ("flac", "FLAC", "PCM_16", 44_100, 2), ("mp3", "MP3", None, 44_100, 1),
    ("ogg", "OGG", "VORBIS", 22_050, 1), ("opus", "OGG", "OPUS", 48_000, 1), ("wav", "WAV", "PCM_16", 8_000, 1),
    ("flac", "FLAC", "PCM_16", 16_000, 1),
)  # fmt: skip


def write_files(folder: Path, count: int) -> Path:
    """`count` files of about 10 s of mini's speech in all KINDS, and their CSV."""
    records = iter(webdataset.WebDataset(sorted(map(str, Path("data/mini/shards").glob("*.tar"))), shardshuffle=False))
    with (folder / "files.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["audio", "caption"])
        for number in range(count):
            parts: list[np.ndarray] = []
            while sum(map(len, parts)) < 10 * SAMPLE_RATE:
                record = next(records, None)
                if record is None:  # a small corpus comes again
                    paths = sorted(map(str, Path("data/mini/shards").glob("*.tar")))
                    records = iter(webdataset.WebDataset(paths, shardshuffle=False))
                    continue
                parts.append(soundfile.read(io.BytesIO(record["flac"]), dtype="float32")[0])
            extension, container, subtype, rate, channels = KINDS[number % len(KINDS)]
            audio = soxr.resample(np.concatenate(parts), SAMPLE_RATE, rate)
            audio = np.stack([audio] * channels, axis=1)
            soundfile.write(folder / f"{number:05d}.{extension}", audio, rate, format=container, subtype=subtype)
            rows.writerow([f"{number:05d}.{extension}", f"speech, number {number}"])
    return folder / "files.csv"


def bare(path: Path) -> int:
    """Decode, average, resample, encode."""
    audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
    mono = soxr.resample(audio.mean(axis=1), rate, SAMPLE_RATE, quality="HQ")
    out = io.BytesIO()
    soundfile.write(out, mono, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return len(mono)


def main() -> None:
    """Measure and print."""
    workers = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        table = write_files(folder, int(sys.argv[1]) if len(sys.argv) > 1 else 1_000)
        paths = sorted(p for p in folder.iterdir() if p.suffix != ".csv")
        settings = Settings("bench", prompts=("Write a general audio caption",))
        hours, times = 0.0, {"bare": [0.0] * ROUNDS, "prepare": [0.0] * ROUNDS}
        for number in range(ROUNDS):
            start = time.perf_counter()
            with ProcessPoolExecutor(workers) as pool:
                hours = sum(pool.map(bare, paths, chunksize=8)) / SAMPLE_RATE / 3600
            times["bare"][number] = time.perf_counter() - start
            out = folder / "out"
            start = time.perf_counter()
            items = open_source(str(table), {}, settings.prompts)
            report = prepare(items, out, settings, fingerprint(str(table), settings, None), workers)
            times["prepare"][number] = time.perf_counter() - start
            assert report.written_rows == len(paths), report.text()
            shutil.rmtree(out)
    print(f"{len(paths)} files, {hours:.2f} h, {workers} processes, {ROUNDS} rounds in turn, medians")
    for name, values in times.items():
        took = statistics.median(values)
        print(f"  {name:8}{took:8.2f} s{3600 * hours / took:9.0f} x real time")
    ratios = [b / p for b, p in zip(times["bare"], times["prepare"], strict=True)]
    print(f"  prepare / bare: {statistics.median(ratios):.3f} as fast ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
