"""All that is known of a stage's data before a model exists: mix, tokenizer, indexes, budget, length, held-out sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from midasheng.config import ConfigError, Stage
from midasheng.data.chat import Chat
from midasheng.data.held_out import HeldOutSet
from midasheng.data.index import CorpusIndex, ShardError, index_folder, open_corpus
from midasheng.data.manifest import Card, ManifestError, Mix, read_mix
from midasheng.data.plan import Budget, Planner, budget, check_fits, named, steps_of
from midasheng.data.shard import Reading

UNKNOWN_SLOTS = 8192  # of a pack, where only a run can find out how many its memory holds


@dataclass(frozen=True)
class Course:
    """How long a run is: steps in all, and of warm-up."""

    steps: int
    warmup: int


@dataclass(frozen=True)
class Sources:
    """What a stage is to be trained on, before it is known how much of it a pack holds."""

    mix: Mix
    chat: Chat
    corpora: tuple[CorpusIndex, ...]
    also: dict[str, tuple[CorpusIndex, ...]]

    def shape(self, stage: Stage, pack_slots: int) -> Budget:
        """The budget that `pack_slots` would give; kind "report" derives its own."""
        b = stage.batch
        return budget(
            self.corpora, self.mix.percent, kind=b.kind, clips_per_step=b.clips_per_step,
            packs_per_step=b.packs_per_step, pack_slots=pack_slots, pack_frames=b.pack_frames, share=b.share,
        )  # fmt: skip

    def most(self, lead: tuple[int, ...] | None = None) -> tuple[int, int]:
        """(slots, frames) of the dearest samples; `lead` as in Budget."""
        most = [row.most(None if lead is None else len(lead)) for corpus in self.corpora for row in corpus.rows]
        return max(slots for slots, _ in most), max(n_frames for _, n_frames in most)


@dataclass(frozen=True)
class DataRoom:
    """Everything a stage needs of its data."""

    mix: Mix
    chat: Chat
    corpora: tuple[CorpusIndex, ...]
    budget: Budget
    course: Course
    held_out: tuple[HeldOutSet, ...]  # of the mix, then of data.also
    notes: tuple[str, ...] = ()  # on samples that fit no pack

    def planner(self, seed: int) -> Planner:
        """A planner at step 0."""
        return Planner(self.corpora, self.mix.percent, self.budget, seed)


def open_chat(stage: Stage) -> Chat:
    """The stage's tokenizer. Raises UserError."""
    t = stage.tokenizer
    return Chat(t.path, t.audio_bos, t.audio, t.audio_eos, t.turn_start, t.turn_end, t.add)


def mixes(stage: Stage) -> tuple[Mix, dict[str, Mix]]:
    """The stage's mix, and those of data.also by name. Raises ManifestError."""
    d = stage.data
    mix, *others = (read_mix(name, Path(d.manifests), d.without) for name in (d.mix, *d.also))
    gone = {corpus for m in (mix, *others) for corpus in m.left_out}
    for glob in d.without:
        if not any(fnmatchcase(corpus, glob) for corpus in gone):
            raise ManifestError(f"data.without: `{glob}` names no corpus of {d.mix}; there are {_names(mix)}")
    return mix, dict(zip(d.also, others, strict=True))


def _names(mix: Mix) -> str:
    return ", ".join(card.name for card in mix.cards)


def open_corpora(stage: Stage, chat: Chat, cards: Sequence[Card], *, make: bool) -> tuple[CorpusIndex, ...]:
    """The index of each corpus; `make` what is missing of it. Raises UserError."""
    d = stage.data
    folder = index_folder(d.index, d.root)
    return tuple(
        open_corpus(
            Reading(card, chat, d.clips, d.decode_share), d.root, folder, d.max_audio_s, make=make,
            workers=stage.hardware.workers,
        )
        for card in cards
    )  # fmt: skip


def _check(corpora: Sequence[CorpusIndex], damaged: str, *, trains: bool) -> None:
    """Raises ShardError for damaged shards (unless data.damaged says keep), and where `trains` ManifestError for a
    corpus without a record to train on."""
    for corpus in corpora:
        damage = corpus.summary.damage
        if damage and damaged != "keep":
            more = f" and {len(damage) - 1} more (`make index` lists them)" if len(damage) > 1 else ""
            raise ShardError(
                f"corpus {corpus.card.name}: {damage[0]}{more}; copy or write the shard again, take it away, or train "
                "on what is whole in it with data.damaged=keep"
            )
        if trains and not len(corpus):
            reasons = corpus.summary.reasons
            raise ManifestError(f"corpus {corpus.card.name}: no record can be trained on (left out: {reasons})")


def _unfit(corpora: Sequence[CorpusIndex], shape: Budget) -> tuple[str, ...]:
    """For each corpus with records that may fit no pack: how many, and the longest by name."""
    notes = []
    for corpus in corpora:
        lead = None if shape.lead is None else shape.lead_slots
        over = list(corpus.over(shape.own_slots, shape.pack_frames, lead))
        if over:
            limits = max(1, shape.own_slots), max(1, shape.pack_frames)
            key, slots, n_frames = max(over, key=lambda o: max(o[1] / limits[0], o[2] / limits[1]))
            notes.append(
                f"corpus {corpus.card.name}: {len(over)} of {len(corpus)} records may fit no pack (then skipped); "
                + named(key, slots, n_frames, shape)
            )
    return tuple(notes)


def read_data(stage: Stage, *, make: bool) -> DataRoom:
    """Read mix, cards, shards and tokenizer; `make` what is missing of the index. Raises UserError."""
    return plan_data(stage, open_data(stage, make=make))


def open_data(stage: Stage, *, make: bool) -> Sources:
    """Everything up to the budget. Raises UserError."""
    d = stage.data
    (mix, looked_at), chat = mixes(stage), open_chat(stage)
    corpora = open_corpora(stage, chat, mix.cards, make=make)
    also = {name: open_corpora(stage, chat, other.cards, make=make) for name, other in looked_at.items()}
    _check(corpora, d.damaged, trains=True)
    for others in also.values():
        _check(others, d.damaged, trains=False)
    return Sources(mix, chat, corpora, also)


def plan_data(stage: Stage, sources: Sources) -> DataRoom:
    """The budget and all that follows from it. Raises UserError."""
    mix, chat, corpora = sources.mix, sources.chat, sources.corpora
    asked = stage.batch.pack_slots
    shape = sources.shape(stage, asked if isinstance(asked, int) else UNKNOWN_SLOTS)

    def planner() -> Planner:
        return Planner(corpora, mix.percent, shape, stage.run.seed)

    check_fits(planner())
    length = max(1, steps_of(stage.run.length, "run.length", planner()))
    course = Course(length, steps_of(stage.run.warmup, "run.warmup", planner()))
    if course.warmup >= course.steps:
        raise ConfigError(
            f"run.warmup: {course.warmup} steps of warm-up in a run of {course.steps} steps "
            f"(run.length: {stage.run.length}); lower it, or raise run.length"
        )
    held_out = tuple(
        HeldOutSet(name, asked_of, chat, shape, stage.data.val_clips)
        for name, asked_of in ((mix.name, corpora), *sources.also.items())
    )
    return DataRoom(mix, chat, corpora, shape, course, held_out, _unfit(corpora, shape))
