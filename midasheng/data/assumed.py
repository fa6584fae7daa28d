"""Corpora that are known by their cards alone: as many records as their hours say, of lengths that are assumed."""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import cached_property

import numpy as np

from midasheng import frames
from midasheng.config import Forecast, Stage, UserError
from midasheng.data.index import Columns, CorpusIndex, Shared, Summary, index_folder
from midasheng.data.manifest import Card, ManifestError, Mix
from midasheng.data.plan import Corpus
from midasheng.data.room import mixes, open_chat, open_corpora
from midasheng.sample import counter_seed

DRAWN = 4096  # records whose lengths are drawn; a corpus has as many of each as it needs
SPREAD = 14 / 22  # answers are that much shorter and longer than their mean (benchmarks/plan.py: 8 to 36 slots)


class Assumed:
    """A corpus as the plan asks for it, without shards."""

    def __init__(self, card: Card, asked: Forecast) -> None:
        self.card = card
        rng = np.random.default_rng(counter_seed("assumed", card.name))
        fixed = next((s for glob, s in asked.clip_s.items() if fnmatchcase(card.name, glob)), 0.0)
        share = np.asarray(asked.clip_share) / np.sum(asked.clip_share)
        length = rng.choice(len(share), DRAWN, p=share) + rng.random(DRAWN)
        n_samples = (np.maximum(0.2, length if not fixed else fixed + 0 * length) * frames.SAMPLE_RATE).astype(np.int64)
        low, high = (round(asked.answer_slots * (1 + side * SPREAD)) for side in (-1, 1))
        answer = rng.integers(max(1, low), high + 1, DRAWN)
        ones = np.arange(1, DRAWN + 1)
        self.drawn = Columns(n_samples, ones, answer + asked.prompt_slots, answer + 1, np.zeros(DRAWN, dtype=np.int64))
        mean_s = float(n_samples.mean()) / frames.SAMPLE_RATE
        records = round(card.n_pairs or card.hours * 3600 / mean_s)
        if not records:
            raise ManifestError(
                f"card {card.name} says neither hours nor n_pairs, and no index of it is there; run `make data` or "
                "`make index`, or write its hours"
            )
        self.counts = np.full(-(-records // DRAWN), DRAWN, dtype=np.int64)
        self.counts[-1] = records - DRAWN * (len(self.counts) - 1)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def columns(self, shard: int) -> Columns:
        """The same lengths in every shard; the last may have fewer."""
        n = int(self.counts[shard])
        return Columns(*(of[:n] for of in self.drawn))

    def key(self, number: int) -> str:
        """A name of a record that nobody has."""
        return f"assumed{number}"

    @cached_property
    def summary(self) -> Summary:
        """Means of what was drawn."""
        n_samples, _, slots, _, _ = self.drawn
        mean_slots = float((slots + frames.audio_tokens(n_samples)).mean())
        mean_frames = float(frames.frames(n_samples).mean())
        hours = len(self) * float(n_samples.mean()) / frames.SAMPLE_RATE / 3600
        shared = Shared((), mean_slots, mean_frames, 1.0, "assumed")
        return Summary(hours, mean_slots, mean_frames, "assumed", {}, (), shared)


def known(stage: Stage) -> tuple[Mix, tuple[Corpus, ...], int]:
    """The stage's mix, its corpora, and how many of them are read from their index; the others are assumed. Raises
    UserError."""
    mix, _ = mixes(stage)
    found: list[Corpus] = []
    for card in mix.cards:
        index = _indexed(stage, card)
        found.append(index if index is not None else Assumed(card, stage.forecast))
    return mix, tuple(found), sum(isinstance(corpus, CorpusIndex) for corpus in found)


def _indexed(stage: Stage, card: Card) -> CorpusIndex | None:
    """The corpus, if all of it has been indexed and holds something."""
    try:
        if not index_folder(stage.data.index, stage.data.root).is_dir():  # nor is a tokenizer asked for, on the hub
            return None
        (corpus,) = open_corpora(stage, open_chat(stage), [card], make=False)
    except UserError:
        return None
    return corpus if len(corpus) else None
