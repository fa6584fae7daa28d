"""Held-out samples, asked with their own clip, with another clip, and with none: validation and the listening test.

Which clip stands in for which depends on the data alone, so that every validation, run and world asks the same.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from midasheng import frames
from midasheng.data.audio import Skip, decode
from midasheng.data.chat import Chat
from midasheng.data.index import CorpusIndex, Record
from midasheng.data.loader import conversation
from midasheng.data.plan import Budget
from midasheng.data.storage import AT_ONCE, ServerLost, StorageError, Unreachable, read_many
from midasheng.sample import Pack, Sample, Turn, pack, unit_hash

OWN, OTHER, ALIKE, NONE = KINDS = ("own", "other", "alike", "none")
MOST_READ = 4_096  # training records that are read to see which questions are closed
MOST_ANSWERS = 12  # a question with more different answers than this in training is not a closed one
TOGETHER = 8  # prompts that are answered together, at most: the same on any number of ranks, and something for each


Choices = dict[str, tuple[str, ...]]  # closed question -> its answers in training


@dataclass(frozen=True)
class Asked:
    """One held-out sample, and the records whose clips stand in for its own; None where there is no such record.

    `other`: the same question has another answer there. `alike`: besides, the card's field `alike` is equal, and of all
    such clips it is the nearest in length, so that neither tells which answer is right.
    """

    corpus: int
    record: Record
    variant: int
    other: Record | None
    alike: Record | None

    @property
    def question(self) -> str:
        """The user's words."""
        return self.record.variants[self.variant].turns[0].text

    @property
    def references(self) -> tuple[str, ...]:
        """The assistant's words, and behind them what else the record answers to the same question."""
        own = self.record.variants[self.variant].turns[-1].text
        return own, *sorted(_answers(self.record, self.question) - {own})


class Question(NamedTuple):
    """What is answered in words. `choices`: the answers in training of a closed question, one that has few of them;
    () where the question is open."""

    asked: Asked
    choices: tuple[str, ...] = ()


def _answers(record: Record, question: str) -> set[str]:
    return {v.turns[-1].text for v in record.variants if v.turns[0].text == question}


class HeldOutSet:
    """The first `most` held-out records of each corpus of a mix, one variant each; variants go round, so that every
    prompt and question form is asked."""

    def __init__(self, name: str, corpora: Sequence[CorpusIndex], chat: Chat, budget: Budget, most: int) -> None:
        self.name, self.corpora, self.chat, self.budget = name, corpora, chat, budget
        self.asked: list[Asked] = []
        self.reading: tuple[str, float] | None = None  # a record whose bytes are awaited, and since when (monotonic)
        self._choices: dict[int, Choices] = {}
        for number, corpus in enumerate(corpora):
            used: Counter[str] = Counter()
            for place, record in enumerate(corpus.held_out[:most]):
                variant = place % len(record.variants)
                if self._fits(record, variant, record):
                    self.asked.append(self._with_clips(number, record, variant, used))

    def _fits(self, record: Record, variant: int, clip_of: Record) -> bool:
        slots = record.variants[variant].slots + frames.audio_tokens(clip_of.n_samples) * bool(clip_of.audio)
        return slots <= self.budget.pack_slots and clip_of.frames <= self.budget.pack_frames

    def _with_clips(self, number: int, record: Record, variant: int, used: Counter[str]) -> Asked:
        turns = record.variants[variant].turns
        right = _answers(record, turns[0].text)
        others = [
            other for other in self.corpora[number].held_out
            if (answers := _answers(other, turns[0].text)) and not answers & right
            and record.audio and self._fits(record, variant, other)
        ]  # fmt: skip
        if not others:
            return Asked(number, record, variant, None, None)
        # the least used first: a clip that stands in everywhere would make one voice the whole test
        other = min(others, key=lambda o: (used[o.key], unit_hash(f"other:{record.key}:{o.key}")))
        used[other.key] += 1
        alike = [o for o in others if o.alike == record.alike]
        nearest = min(alike, key=lambda o: (abs(o.n_samples - record.n_samples), o.key), default=None)
        return Asked(number, record, variant, other, nearest)

    def packs(self, kind: str, rank: int = 0, world: int = 1) -> Iterator[tuple[tuple[int, ...], Pack]]:
        """(numbers in `asked`, their pack), asked with the `kind` of clip; every world-th pack from `rank` on.

        Decoded when it is asked for; a record that cannot be decoded is left out.
        """
        return self._packed(self.asked, kind, rank, world, answered=True)

    def prompts(
        self, asked: Sequence[Asked], kind: str, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[tuple[int, ...], Pack]]:  # fmt: skip
        """(numbers in `asked`, the pack of their prompts, each ending where the answer begins), for `generate`; every
        world-th pack from `rank` on."""
        return self._packed(asked, kind, rank, world, answered=False)

    def _packed(
        self, all_asked: Sequence[Asked], kind: str, rank: int, world: int, *, answered: bool
    ) -> Iterator[tuple[tuple[int, ...], Pack]]:
        rows: list[list[int]] = []
        left = (0, 0)
        for number, asked in enumerate(all_asked):
            clip_of = self._clip_of(asked, kind)
            if clip_of is None:
                continue
            heard = kind != NONE and clip_of.audio is not None
            slots = asked.record.variants[asked.variant].slots + heard * frames.audio_tokens(clip_of.n_samples)
            many = bool(rows) and not answered and len(rows[-1]) == TOGETHER
            if slots > left[0] or clip_of.frames > left[1] or many:
                rows.append([])
                left = (self.budget.pack_slots, self.budget.pack_frames)
            rows[-1].append(number)
            left = (left[0] - slots, left[1] - clip_of.frames)
        for row in rows[rank::world]:
            loaded = {}
            for number in row:
                try:
                    with contextlib.suppress(Skip, StorageError):
                        loaded[number] = self.sample(all_asked[number], kind, answered=answered)
                except Unreachable as error:  # a validation over fewer records would look like any other
                    raise ServerLost(f"a held-out record cannot be read: {error}; the same command goes on") from None
            samples = list(loaded.values())
            if samples:
                slots = self.budget.pack_slots if answered else sum(len(s.ids) for s in samples)
                # in the shape of training, for which blocks may be compiled; silence alone is not encoded
                n_frames = self.budget.pack_frames if answered and kind != NONE else 0
                yield tuple(loaded), pack(samples, slots, self.chat.pad, None, n_frames)

    def _clip_of(self, asked: Asked, kind: str) -> Record | None:
        return {OWN: asked.record, OTHER: asked.other, ALIKE: asked.alike, NONE: asked.record}[kind]

    def sample(self, asked: Asked, kind: str, *, answered: bool = True) -> Sample:
        """One sample with the `kind` of clip; `answered` False ends it where the answer begins. Raises Skip."""
        record, clip_of = asked.record, self._clip_of(asked, kind)
        turns, card = record.variants[asked.variant].turns, self.corpora[asked.corpus].card
        clips = []
        if kind == NONE:
            turns = tuple(turn._replace(clips=0) for turn in turns)
        elif clip_of is not None and clip_of.audio:
            place = clip_of.audio
            self.reading = (f"corpus {card.name}, shard {place.path}, key {clip_of.key}", time.monotonic())
            try:
                clips = [decode(place.read(), clip_of.n_samples)]
            finally:
                self.reading = None
        return conversation(card, record.key, turns, clips, self.chat, answered=answered, language=record.language)

    @property
    def hears(self) -> bool:
        """Does any sample hold a clip?"""
        return any(a.record.audio for a in self.asked)

    def choices(self, number: int) -> Choices:
        """The closed ones of the questions that held-out records of a corpus ask. Reads training records, once, as long
        as one of these may be closed: of a corpus that asks for captions a few."""
        if number not in self._choices:
            corpus = self.corpora[number]
            asked: dict[str, Counter[str]] = {v.turns[0].text: Counter() for r in corpus.held_out for v in r.variants}
            for conversations in self._training(corpus) if asked else ():
                for turns in conversations:
                    if (answers := asked.get(turns[0].text)) is not None:
                        answers[turns[-1].text] += 1
                        if len(answers) > MOST_ANSWERS:
                            del asked[turns[0].text]
                if not asked:
                    break
            self._choices[number] = {
                q: tuple(sorted(c)) for q, c in asked.items()
                # an answer that comes once says nothing of how many there could be
                if len(c) >= 2 and c.total() >= 2 * len(c)
            }  # fmt: skip
        return self._choices[number]

    def all_choices(self) -> list[Choices]:
        """Those of every corpus."""
        return [self.choices(number) for number in range(len(self.corpora))]

    def know(self, choices: Sequence[Choices]) -> None:
        """Take `all_choices` from a process that has read them."""
        self._choices = dict(enumerate(choices))

    def closed(self, most: int) -> list[Question]:
        """Closed questions of held-out clips, at most `most` for each corpus and set of answers, one for each clip."""
        found = []
        for number, corpus in enumerate(self.corpora):
            groups: dict[tuple[str, ...], list[Question]] = {}
            for record in sorted(corpus.held_out, key=lambda r: unit_hash("closed:" + r.key)):
                variants = sorted(range(len(record.variants)), key=lambda v: unit_hash(f"closed:{record.key}:{v}"))
                taken = set()
                for v in variants:
                    answers = self.choices(number).get(record.variants[v].turns[0].text)
                    if answers is None or not self._fits(record, v, record):
                        continue
                    group = groups.setdefault(answers, [])
                    if answers not in taken and len(group) < most:
                        taken.add(answers)
                        group.append(Question(Asked(number, record, v, None, None), answers))
            found += [question for group in groups.values() for question in group]
        return found

    def _training(self, corpus: CorpusIndex) -> Iterator[Sequence[tuple[Turn, ...]]]:
        """The conversations of training records, from their JSON alone: of at most MOST_READ, evenly spread; of the
        held-out ones of a mix that is only asked about."""
        if not len(corpus):
            yield from ([variant.turns for variant in record.variants] for record in corpus.held_out)
        numbers = range(0, len(corpus), max(1, -(-len(corpus) // MOST_READ)))
        for first in range(0, len(numbers), AT_ONCE):
            some = numbers[first : first + AT_ONCE]
            for number, text in zip(some, read_many([corpus.place_of_text(n) for n in some]), strict=True):
                if isinstance(text, bytes):
                    with contextlib.suppress(Skip):
                        yield corpus.turns(number, text)

    def open(self, most: int) -> list[Asked]:
        """The first few asked samples of each corpus in turn, at most `most` in all."""
        of = [[a for a in self.asked if a.corpus == number] for number in range(len(self.corpora))]
        turns = [row[i] for i in range(most) for row in of if i < len(row)]
        return turns[:most]
