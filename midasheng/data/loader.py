"""Plan -> Pack tensors, in worker processes that keep no state: a step's share says everything a worker needs."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import queue
import signal
import threading
import time
import zlib
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from midasheng import frames
from midasheng.data.audio import Skip, decode
from midasheng.data.chat import Chat, Encoded, agreeing, lead, trunk
from midasheng.data.index import CorpusIndex, Record
from midasheng.data.ledger import Skipped
from midasheng.data.manifest import Card, ManifestError
from midasheng.data.plan import ALL, Budget, Planned, Planner
from midasheng.data.quarantine import REASON
from midasheng.data.storage import ServerLost, StorageError, Unreachable, read_many
from midasheng.sample import NOT_TOLD, Pack, Sample, Turn, pack

T = TypeVar("T")
STEPS_AHEAD = 2  # that a rank plans outside the training thread, beside those that its workers have in hand


@dataclass(frozen=True)
class Share:
    """One rank's part of a step: (pack number, its samples), and the planner's state behind the whole step."""

    step: int
    packs: tuple[tuple[int, tuple[Planned, ...]], ...]
    skipped: tuple[Skipped, ...]
    state_after: dict[str, Any]


@dataclass(frozen=True)
class StepBatch:
    """One rank's packs of one step, loaded. `numbers`: which of the step's packs they are.

    `trained`: for the ledger, int64 (samples, 4): corpus, epoch, position, and 1 or, for a hole, 0; `checksum`: CRC32
    of the keys that were really read.
    """

    step: int
    numbers: tuple[int, ...]
    packs: tuple[Pack, ...]
    skipped: tuple[Skipped, ...]
    state_after: dict[str, Any]
    trained: NDArray[np.int64]
    checksum: int

    def to(self, *args: Any, **kwargs: Any) -> StepBatch:
        """Tensors moved, as `torch.Tensor.to`; Lightning calls this."""
        return replace(self, packs=tuple(p.to(*args, **kwargs) for p in self.packs))

    def not_taken(self, reason: str) -> StepBatch:
        """For the ledger: the same step when nothing was learned from it. Every sample is a hole with this reason."""
        # the conversations of one record lie side by side
        keys = [one for p in self.packs for one, _ in groupby(zip(p.corpora, p.keys, strict=True))]
        rows = self.trained.copy()
        rows[:, 3] = 0
        return replace(
            self, trained=rows, checksum=0, skipped=(*self.skipped, *(Skipped(c, k, reason) for c, k in keys))
        )


def conversation(
    card: Card, key: str, turns: Sequence[Turn], clips: Sequence[NDArray[np.float32]], chat: Chat, *,
    answered: bool = True, language: str = NOT_TOLD,
) -> Sample:  # fmt: skip
    """Tokenise one conversation with its decoded clips; `answered` False ends it where the last answer begins."""
    tokens = [frames.audio_tokens(len(clip)) for clip in clips]
    encoded = chat.encode(turns if answered else turns[:-1], tokens, answer_follows=not answered)
    return Sample(
        card.name, key, card.task, encoded.ids, encoded.labels, encoded.is_audio, tuple(clips), language=language
    )  # fmt: skip


def ahead(source: Iterator[T], depth: int) -> Iterator[T]:
    """`source`, drawn ahead in a thread of its own: `depth` items, and one in its hand; its errors are raised here."""
    items: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    over = threading.Event()

    def put(kind: str, item: Any) -> None:
        while not over.is_set():
            with contextlib.suppress(queue.Full):
                items.put((kind, item), timeout=0.2)
                return

    def draw() -> None:
        try:
            for item in source:
                put("item", item)
                if over.is_set():
                    return
            put("end", None)
        except BaseException as error:  # raised where the items are asked for
            put("error", error)

    thread = threading.Thread(target=draw, name="plan", daemon=True)
    thread.start()
    try:
        while True:
            kind, item = items.get()
            if kind == "error":
                raise item
            if kind == "end":
                return
            yield item
    finally:
        over.set()
        thread.join()


class _Shares(Sampler[Share]):
    """The planner as a sampler: draws steps in a thread of the training process, hands shares to workers."""

    def __init__(self, planner: Planner, corpora: Sequence[CorpusIndex], steps: int, rank: int, world: int) -> None:
        self.planner, self.corpora, self.steps, self.rank, self.world = planner, corpora, steps, rank, world
        self.first = int(planner.state()["step"])

    def __len__(self) -> int:
        return max(0, self.steps - self.first)

    def __iter__(self) -> Iterator[Share]:
        return ahead(self._drawn(), STEPS_AHEAD)

    def _drawn(self) -> Iterator[Share]:
        for _ in range(len(self)):
            step = next(self.planner)
            skipped = () if self.rank else tuple(
                Skipped(c.card.name, c.key(u.record), "fits no pack", (u.epoch, u.position))
                for u in step.skipped for c in [self.corpora[u.corpus]]
            )  # fmt: skip
            yield Share(step.number, step.share(self.rank, self.world), skipped, step.state_after)


class Notes:
    """What each loader process is at, where the training process can read it: shared memory, a row a process of (step,
    corpus, record, whether its bytes are still awaited, since when); corpus -1 is none."""

    def __init__(self, processes: int) -> None:
        memory = mmap.mmap(-1, max(1, processes) * 5 * 8)  # anonymous: shared with what is forked
        self.rows = np.frombuffer(memory, dtype=np.float64).reshape(-1, 5)
        self.rows[:, 1] = -1

    def write(self, step: int, corpus: int = -1, record: int = -1, *, awaited: bool = False) -> None:
        """This process is now at a record; without one, at none."""
        info = get_worker_info()
        self.rows[info.id if info else 0] = (step, corpus, record, awaited, time.monotonic())

    def where(self, step: int, corpora: Sequence[CorpusIndex]) -> str:
        """The record that holds `step` up; else the oldest one that any process is at."""
        rows = [(n, *row) for n, row in enumerate(self.rows.tolist()) if row[1] >= 0]
        if not rows:
            return "no loader process is at a record"
        number, at, c, record, awaited, since = min(rows, key=lambda row: (row[1] != step, row[5]))
        corpus = corpora[int(c)]
        return (
            f"loader process {number} {'waits for' if awaited else 'is at'} corpus {corpus.card.name}, shard "
            f"{corpus.place(int(record)).path}, key {corpus.key(int(record))} (step {at:.0f}), since "
            f"{time.monotonic() - since:.0f} s"
        )


class Tokenised(NamedTuple):
    """A record, the bytes of its audio, and its conversation (all of them where `answers: all`) tokenised. `common`:
    how many slots, its audio's among them, these share; 0 where each stands for itself."""

    record: Record
    audio: bytes
    encoded: list[Encoded]
    common: int


class Loading(Dataset[StepBatch]):
    """Share -> StepBatch. A record that cannot be read or decoded leaves a hole in its pack and a line in the
    ledger."""

    def __init__(
        self, corpora: Sequence[CorpusIndex], chat: Chat, budget: Budget, without: Set[tuple[int, int]] = frozenset(),
        processes: int = 0,
    ) -> None:  # fmt: skip
        """`without`: (corpus, record) of what is quarantined; `processes`: that will load."""
        self.corpora, self.chat, self.budget, self.without = corpora, chat, budget, without
        self.notes = Notes(processes)

    def __getitem__(self, share: Share) -> StepBatch:  # the sampler yields shares, not numbers
        skipped, packs = list(share.skipped), []
        trained, checksum = [], 0
        for _, planned in share.packs:
            samples: list[Sample] = []
            audio = np.empty(frames.waveform(self.budget.pack_frames), dtype=np.float32)
            used = 0
            # all texts of a pack, then all clips: in turn, each puts the other out of the processor's caches
            for p, text in list(zip(planned, self._texts(share.step, planned), strict=True)):
                corpus = self.corpora[p.corpus]
                self.notes.write(share.step, p.corpus, p.record)
                good = 1
                try:
                    made = self._samples(p, text, audio[used:])  # clips are decoded to where they stay
                    samples += made
                    used += sum(len(clip) for s in made for clip in s.clips)
                    checksum = zlib.crc32(f"{corpus.card.name}/{made[0].key}".encode(), checksum)
                except Skip as skip:
                    skipped.append(Skipped(corpus.card.name, corpus.key(p.record), skip.reason))
                    good = 0
                trained.append((p.corpus, p.epoch, p.position, good))
            audio[used:] = 0.0
            shared = self.budget.lead_slots if samples else 0  # nothing but holes shares nothing
            packs.append(pack(samples, self.budget.pack_slots, self.chat.pad, audio, self.budget.pack_frames, shared))
        self.notes.write(share.step)
        rows = np.asarray(trained, dtype=np.int64).reshape(-1, 4)
        numbers = tuple(n for n, _ in share.packs)
        return StepBatch(share.step, numbers, tuple(packs), tuple(skipped), share.state_after, rows, checksum)

    def _texts(self, step: int, planned: Sequence[Planned]) -> Iterator[Tokenised | Skip]:
        """Each planned sample, tokenised, as its bytes come."""
        data = read_many([self.corpora[p.corpus].place(p.record) for p in planned])
        for p in planned:
            self.notes.write(step, p.corpus, p.record, awaited=True)
            yield self._text(p, next(data))

    def _text(self, p: Planned, read: bytes | StorageError | Unreachable) -> Tokenised | Skip:
        """One planned sample, tokenised; or why it cannot be used."""
        if (p.corpus, p.record) in self.without:
            return Skip(REASON)
        if not isinstance(read, bytes):
            return Skip("shard gone" if isinstance(read, StorageError) else "unreachable")
        try:
            record, data = self.corpora[p.corpus].read(p.record, read)
        except ManifestError:  # the index has seen its fields: it is another record now
            return Skip("differs from index")
        except Skip as skip:
            return skip
        chosen = record.variants if p.variant == ALL else record.variants[p.variant : p.variant + 1]
        tokens = [frames.audio_tokens(record.n_samples)] if record.audio else []
        encoded = [self.chat.encode(variant.turns, tokens) for variant in chosen]
        common = 0
        if self.budget.lead is not None:
            if any(agreeing(lead(e), self.budget.lead) < len(self.budget.lead) for e in encoded):
                return Skip("differs from index")
            if (common := trunk(encoded)) <= self.budget.lead_slots:  # no trunk beside the lead
                common = 0
        begins = 1 if common else len(encoded)
        slots = sum(len(e.ids) for e in encoded) - (len(encoded) - begins) * common - begins * self.budget.lead_slots
        if slots != p.slots:
            return Skip("differs from index")  # the shard was written anew under the run
        return Tokenised(record, data, encoded, common)

    def _samples(self, p: Planned, text: Tokenised | Skip, into: NDArray[np.float32]) -> list[Sample]:
        """The conversations of one planned sample, each with its clip, or the first of them with the clip that they
        share; clips lie end to end in `into`. Raises Skip."""
        if isinstance(text, Skip):
            raise text
        record, data, encoded, common = text
        card, length = self.corpora[p.corpus].card, record.n_samples
        if record.audio:
            decode(data, length, into[:length])
        samples = []
        for number, e in enumerate(encoded):
            continues = common if number else 0
            clips = (into[number * length : (number + 1) * length],) if record.audio and not continues else ()
            if clips and number:
                clips[0][:] = into[:length]
            samples.append(Sample(
                card.name, record.key, card.task, e.ids, e.labels, e.is_audio, clips, continues, record.language
            ))  # fmt: skip
        return samples


def keep_freed_memory() -> None:
    """Let glibc give freed arrays out again. By default it returns them, and the system clears each page anew: 5 to 8 %
    of a worker's time on the machine of LOG.md, a fifth of a training step's on its CPU. Other C libraries stay as
    they are."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def give_back_freed_memory() -> None:
    """Let glibc return all that is free to the system, whatever it was told to keep."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _once(number: int, _: object) -> None:
    signal.signal(number, signal.SIG_DFL)


def _worker_init(_: int) -> None:
    """A signal to stop belongs to the training process, which still needs its workers: Slurm sends it to every process
    of a job. Only a second SIGTERM ends a worker. One thread each, as many workers run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _once)
    torch.set_num_threads(1)
    keep_freed_memory()


def train_loader(
    planner: Planner, corpora: Sequence[CorpusIndex], chat: Chat, steps: int, *, rank: int, world: int, workers: int,
    prefetch: int = 2, without: Set[tuple[int, int]] = frozenset(),
) -> DataLoader[StepBatch]:  # fmt: skip
    """Loader from the planner's present step to `steps` (exclusive); one item is this rank's share of one step."""
    return DataLoader(
        Loading(corpora, chat, planner.budget, without, workers),
        sampler=_Shares(planner, corpora, steps, rank, world),
        batch_size=None, num_workers=workers, worker_init_fn=_worker_init,
        prefetch_factor=prefetch if workers else None, multiprocessing_context="fork" if workers else None,
    )  # fmt: skip


def steps_ahead(workers: int, prefetch: int) -> int:
    """How many steps beyond the present one a rank may have planned, at most, with room for one that is slower."""
    return STEPS_AHEAD + prefetch * workers + 8


def first_clips(planner: Planner, corpora: Sequence[CorpusIndex], count: int) -> Iterator[NDArray[np.float32]]:
    """The first `count` clips of the plan, decoded: float32 (n_samples,) at 16 kHz. Undecodable ones are left out.
    Raises ServerLost."""
    found: dict[tuple[int, int], None] = {}
    for _ in range(count):  # at most: a step brings one clip or more, and a small corpus repeats
        before = len(found)
        found |= dict.fromkeys((p.corpus, p.record) for chosen in next(planner).packs for p in chosen)
        if len(found) >= count or len(found) == before:
            break
    for corpus, number in list(found)[:count]:
        try:
            with contextlib.suppress(Skip, StorageError):
                record, data = corpora[corpus].read(number)
                if record.audio:
                    yield decode(data, record.n_samples)
        except Unreachable as error:
            raise ServerLost(f"one of the first clips cannot be read: {error}; the same command goes on") from None
