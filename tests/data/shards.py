"""Shards of a test, written member by member, and readings of them."""

import json
import tarfile
from io import BytesIO
from pathlib import Path

from midasheng.data.index import CorpusIndex, open_corpus
from midasheng.data.manifest import Card
from midasheng.data.shard import Reading
from tests.conftest import flac, tone

SOUND = flac(tone(0.3, 0))
CARD = Card("c", "asr", "*.tar", "none", prompts=["Write."], answer="text")


def content(**changes: object) -> bytes:
    """JSON of one record."""
    return json.dumps({"source": "s", "text": "a tone", **changes}).encode()


def write(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar of (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    return path


def good(*keys: str) -> list[tuple[str, bytes]]:
    """Members of records that can be used."""
    return [member for key in keys for member in ((f"{key}.flac", SOUND), (f"{key}.json", content()))]


def opened(
    card: Card, root: Path | str, chat, max_audio_s: float = 1.0, clips: str = "heard", *, decode_share: float = 0.0,
    folder: Path | None = None, make: bool = True, workers: int = 1,
) -> CorpusIndex:  # fmt: skip
    """The index of a corpus, its side files beside its shards."""
    reading = Reading(card, chat, clips, decode_share)
    return open_corpus(reading, str(root), folder or Path(root) / ".index", max_audio_s, make=make, workers=workers)


def train_keys(corpus: CorpusIndex) -> list[str]:
    """Keys of the training records in their order."""
    return [corpus.key(n) for n in range(len(corpus))]
