"""Clips with their JSON, and the numbered tar shards they are written to."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import webdataset
from numpy.typing import NDArray

from midasheng.frames import SAMPLE_RATE
from midasheng.sample import unit_hash

MAX_SHARD_BYTES = 20_000_000
TEST_SHARE = 0.06


@dataclass(frozen=True)
class Clip:
    """One record to be: `samples` mono int16 at 16 kHz; `record` its JSON, whose `source` decides on the split."""

    stem: str  # family of shards, e.g. "asterisk"
    key: str  # letters, digits, _ and -: the key of a webdataset record ends at the first dot
    samples: NDArray[np.int16]
    record: dict[str, Any]
    split: str = ""  # "test" for clips that nothing may be trained on, whatever their source

    @property
    def shards(self) -> str:
        """Name of its shards without number, e.g. "asterisk-train"."""
        return f"{self.stem}-{self.split or split_of(self.record['source'])}"


def split_of(source: str) -> str:
    """The split, test or train, of a source; nothing of one source is in both."""
    return "test" if unit_hash("test:" + source) < TEST_SHARE else "train"


class Shards:
    """Numbered tar shards of at most MAX_SHARD_BYTES or one record, with equal bytes on every run."""

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder, self.stem = folder, stem
        self.n_shards, self.n_bytes = 0, 0
        self.writer: webdataset.TarWriter | None = None

    def write(self, key: str, samples: NDArray[np.int16], record: dict[str, Any]) -> None:
        """Add a record: `samples` are mono int16 at 16 kHz."""
        flac = io.BytesIO()
        soundfile.write(flac, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        text = json.dumps(record, ensure_ascii=False).encode()
        n_bytes = len(flac.getvalue()) + len(text)
        if self.writer is not None and self.n_bytes + n_bytes > MAX_SHARD_BYTES:
            self.close()
        if self.writer is None:
            path = self.folder / f"{self.stem}-{self.n_shards:06d}.tar"
            # A fixed mtime: equal bytes, and no PAX headers, which make reading twice as slow.
            self.writer = webdataset.TarWriter(str(path), encoder=False, mtime=0)
            self.n_shards, self.n_bytes = self.n_shards + 1, 0
        self.writer.write({"__key__": key, "flac": flac.getvalue(), "json": text})
        self.n_bytes += n_bytes

    def close(self) -> None:
        """Finish the shard that is open, if one is."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None
