"""A tiny corpus of tones with captions, and the settings that run a stage on it in seconds."""

import io
import json
import os
import shutil
import subprocess
import threading

os.environ["HF_HUB_OFFLINE"] = "1"

import jaxtyping

# shapes are law in tests; before any import of the model room
jaxtyping.install_import_hook("midasheng.model", "beartype.beartype")

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import webdataset
import yaml
from tqdm import tqdm

from midasheng.curate import tokenizer as tokenizer_room
from midasheng.data.chat import Chat
from midasheng.data.index import CorpusIndex, Record, open_corpus
from midasheng.data.ledger import read_ledger
from midasheng.data.manifest import Card
from midasheng.data.shard import Reading

CONFIGS = Path(__file__).parent.parent / "configs"
LANGUAGES = ("English", "Spanish", "French")

# tqdm's own lock is shared by all processes forked from here: a test that kills one under it would hang the next
tqdm.set_lock(threading.RLock())


def tone(seconds: float, seed: int, rate: int = 16_000) -> np.ndarray:
    """A chord in noise: float32 (samples,)."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * rate)) / rate
    wave = sum(np.sin(2 * np.pi * f * t) for f in rng.uniform(100, 3000, 3))
    return (0.1 * wave + 0.01 * rng.standard_normal(len(t))).astype(np.float32)


def flac(wave: np.ndarray, rate: int = 16_000) -> bytes:
    """The bytes of a FLAC file."""
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def record(number: int) -> dict[str, object]:
    """JSON of one record."""
    language = LANGUAGES[number % 3]
    return {
        "source": f"tone {number}", "language_name": language, "language": language[:2].lower(),
        "text": f"tone number {number} of the {language} choir",
        "captions": [f"A tone, number {number}.", f"A {language} tone sounds.", f"Somebody plays tone {number}."],
        "questions": [
            {"question": "Which language?", "answer": language}, {"question": "Is it a tone?", "answer": "yes"},
            {"question": "Is the number even?", "answer": "no" if number % 2 else "yes"},
        ],
    }  # fmt: skip


def write_shard(path: Path, members: list[tuple[str, bytes, dict[str, object]]]) -> None:
    """A webdataset shard of (key, flac bytes, json)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), mtime=0) as tar:
        for key, audio, content in members:
            tar.write({"__key__": key, "flac": audio, "json": content})


@dataclass(frozen=True)
class Tiny:
    """Where the tiny corpus lies."""

    root: Path

    @property
    def shards(self) -> Path:
        return self.root / "shards"

    @property
    def manifests(self) -> Path:
        return self.root / "manifests" / "tiny"

    def settings(self, **more: object) -> list[str]:
        """`key=value` settings that make a stage at scale mini run on this corpus; `more`: lora__rank=4 is lora.rank=4."""
        values: dict[str, object] = {
            "data.root": self.shards, "data.manifests": self.manifests, "tokenizer.path": self.root / "tokenizer",
            "model.encoder.dim": 32, "model.encoder.depth": 2, "model.encoder.heads": 2,
            "model.decoder.fields.hidden_size": 64, "model.decoder.fields.intermediate_size": 96,
            "model.decoder.fields.num_hidden_layers": 2, "model.decoder.fields.num_attention_heads": 2,
            "model.decoder.fields.num_key_value_heads": 1, "model.decoder.fields.vocab_size": 512,
            "model.decoder.fields.rope_parameters.mrope_section": "[4,6,6]",
            "weights.decoder": self.root / "text_decoder",
            "batch.clips_per_step": 6, "batch.packs_per_step": 2, "run.length": "4 steps", "run.warmup": "1 steps",
            "log.every": 1, "log.val_every": 2, "log.checkpoint_every": 2, "log.progress": "false", "log.answers": 0,
            "hardware.workers": 0, "hardware.threads": 1, "data.val_clips": 4, "data.also": "[]", "data.answers": 0,
            "data.probe": "''",
        }  # fmt: skip
        values |= {k.replace("__", "."): v for k, v in more.items()}
        return [f"{k}={v}" for k, v in values.items()]


def make_tiny(root: Path, clips: int = 42) -> Tiny:
    """Write corpus, cards, mixes and tokenizer under `root`."""
    tiny = Tiny(root)
    rng = np.random.default_rng(0)
    members = [(f"tone{n}", flac(tone(float(rng.uniform(0.3, 2.0)), n)), record(n)) for n in range(clips)]
    half = clips // 2
    write_shard(tiny.shards / "tiny-000000.tar", members[:half])
    write_shard(tiny.shards / "tiny-000001.tar", members[half:])
    held_out = {"by": "source", "share": 0.2, "max": 16}
    common = {"shards": "tiny-*.tar", "licence": "none", "languages": ["en", "sp", "fr"], "held_out": held_out}
    clip = {"context": "{language_name}, tone: {text}", "alike": "language"}
    cards = {
        "tiny_caption": {"task": "caption", "prompts": ["Write a general audio caption"], "answer": "captions", **clip},
        "tiny_asr": {
            "task": "asr", "prompts": ["Transcribe the speech into text <|{language}|>"], "answer": "text", **clip,
        },
        "tiny_qa": {"task": "qa", "pairs": "questions", **clip},
        "tiny_text": {"task": "text", "audio": False, "prompts": ["Write a sentence."], "answer": "text"},
    }  # fmt: skip
    corpora = root / "manifests" / "corpora"
    corpora.mkdir(parents=True)
    tiny.manifests.mkdir(parents=True)
    for name, card in cards.items():
        (corpora / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, **common, **card}))
    mixes = {
        "align": {"tiny_caption": 100}, "pretrain": {"tiny_asr": 60, "tiny_caption": 40}, "sft": {"tiny_qa": 100},
        "text": {"tiny_caption": 40, "tiny_asr": 20, "tiny_qa": 20, "tiny_text": 20},
    }  # fmt: skip
    for name, mix in mixes.items():
        (tiny.manifests / f"{name}.yaml").write_text(yaml.safe_dump({"corpora": mix}))
    return tiny


def open_index(
    card: Card, root: Path, chat: Chat, max_audio_s: float = 30.0, clips: str = "heard", decode_share: float = 0.0
) -> CorpusIndex:
    """The index of a corpus; its side files lie beside the folder of its shards."""
    reading = Reading(card, chat, clips, decode_share)
    return open_corpus(reading, str(root), root.parent / "index", max_audio_s, make=True)


def training_records(corpus: CorpusIndex) -> list[Record]:
    """All of them, by number."""
    return [corpus.read(number)[0] for number in range(len(corpus))]


Row = tuple[int, int, int, int]  # of the ledger: corpus, epoch, position, trained


def ledger_rows(folder: Path) -> dict[int, list[Row]]:
    """Step -> what all ranks trained on, sorted; every rank has a part of every step."""
    found: dict[int, list[Row]] = {}
    for steps in read_ledger(folder):
        ends = np.cumsum(steps.samples).tolist()
        assert ends[-1] == len(steps.rows)
        for number, end, count in zip(steps.step.tolist(), ends, steps.samples.tolist(), strict=True):
            found.setdefault(number, []).extend(tuple(row) for row in steps.rows[end - count : end].tolist())
    return {number: sorted(rows) for number, rows in sorted(found.items())}


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The tiny corpus with its tokenizer, made once."""
    made = make_tiny(tmp_path_factory.mktemp("tiny"))
    texts = [json.dumps(record(n), ensure_ascii=False) for n in range(42)]
    tokenizer_room.save_tokenizer(
        tokenizer_room.train_tokenizer(texts, LANGUAGES, max_tokens=400), made.root / "tokenizer"
    )
    return made


@pytest.fixture(scope="session")
def chat(tiny_data: Tiny) -> Chat:
    """The tokenizer of the tiny corpus."""
    return Chat(str(tiny_data.root / "tokenizer"), "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")


@pytest.fixture(scope="session")
def tiny(tiny_data: Tiny) -> Tiny:
    """The tiny corpus with text weights too."""
    run_stage("text_decoder", tiny_data, tiny_data.root, name="text_decoder", scale_folder=False)
    return tiny_data


def order_for(
    stage: str, tiny: Tiny, runs: Path, *, name: str = "", start_from: str = "", fresh: bool = False, config: str = "",
    **more: object,
):  # fmt: skip
    """The Order of a stage on the tiny corpus."""
    from midasheng import config as config_room
    from midasheng.train.order import Order

    path = Path(config) if config else CONFIGS / f"{stage}.yaml"
    loaded = config_room.load(path, "mini", tiny.settings(**more), CONFIGS)
    return Order(loaded, runs, "mini", name or stage, start_from, fresh)


def trained_keys(folder: Path, order) -> dict[int, list[str]]:
    """Step -> CORPUS/KEY of what a run's ledger says it trained on; `order` as the run was asked for."""
    from midasheng.data.plan import Planned
    from midasheng.data.room import read_data

    data = read_data(order.stage, make=False)
    plan = data.planner(order.stage.run.seed)
    found: dict[int, list[str]] = {}
    for number, rows in ledger_rows(folder).items():
        samples = [Planned(*plan.rows(c, e, np.asarray([p]))[0].tolist()) for c, e, p, good in rows if good]
        found[number] = [f"{data.corpora[s.corpus].card.name}/{data.corpora[s.corpus].key(s.record)}" for s in samples]
    return found


def run_stage(stage: str, tiny: Tiny, runs: Path, *, scale_folder: bool = True, **more: object) -> Path:
    """Run a stage in this process; returns its run folder."""
    import dataclasses

    from midasheng.train.fit import fit

    order = order_for(stage, tiny, runs, **more)
    if not scale_folder:
        order = dataclasses.replace(order, scale="")
    fit(order)
    return order.folder


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Bit-equality is promised for a fixed number of threads."""
    torch.set_num_threads(1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB, the folder `killed`."""
    place = tmp_path / "killed"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)
