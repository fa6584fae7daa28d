"""One pack as training gets it, made by its own planner and loader, and plain checks of what it asks the model for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from midasheng import frames
from midasheng.config import UserError
from midasheng.data.chat import Chat
from midasheng.data.ledger import Skipped
from midasheng.data.loader import train_loader
from midasheng.data.plan import Planner
from midasheng.data.room import DataRoom
from midasheng.sample import NO_TARGET, Pack, lineages


@dataclass(frozen=True)
class Chosen:
    """A pack of the plan, loaded. `planned`: (corpus/key, targets) of each sample that was read; `holes`: the samples
    that could not be."""

    step: int
    number: int
    pack: Pack
    planned: tuple[tuple[str, int], ...]
    holes: tuple[Skipped, ...]


# -- choosing ----------------------------------------------------------------------------------------------------------


def planner_before(data: DataRoom, seed: int, step: int, run: Path | None = None) -> Planner:
    """A planner whose next step is `step`; `run`: with that run's changes of the mix, from its nearest saved state.

    Raises UserError when the run has no such step, or its data have changed since.
    """
    if not 0 <= step < data.course.steps:
        raise UserError(f"STEP={step}: the run has steps 0 to {data.course.steps - 1}")
    planner = data.planner(seed)
    path = run / "ledger" / "states.jsonl" if run else None
    lines = path.read_text(encoding="utf-8").splitlines() if path and path.is_file() else []
    states = [json.loads(line)["plan"] for line in lines]
    if states:
        last = states[-1]
        if step < last["restarted"]:
            raise UserError(f"STEP={step}: this run's order of data begins at step {last['restarted']} (events.jsonl)")
        before = [s for s in states if s["step"] <= step and s["restarted"] == last["restarted"]]
        if before:
            planner.restore({**before[-1], "events": last["events"]})
        else:
            if last["restarted"]:
                planner.restart(last["restarted"])
            for from_step, percent in last["events"]:
                planner.change(from_step, percent)
    for _ in range(step - int(planner.state()["step"])):
        next(planner)
    return planner


def find(data: DataRoom, planner: Planner, wanted: str) -> tuple[int, int]:
    """(step, pack) in which `key` or `corpus/key` comes next. Raises UserError when it does not come any more."""
    records: set[tuple[int, int]] = set()
    for c, corpus in enumerate(data.corpora):
        name, _, key = wanted.rpartition("/")
        for corpus_name, own in ((name, key), ("", wanted)):  # a key may hold a slash itself
            if corpus_name in ("", corpus.card.name):
                records |= {(c, number) for number in corpus.find(own)}
    if not records:
        raise UserError(f"KEY={wanted}: no training record has this key; it may be held out, left out or misspelled")
    first = int(planner.state()["step"])
    for _ in range(first, data.course.steps):
        step = next(planner)
        for number, planned in enumerate(step.packs):
            if any((p.corpus, p.record) in records for p in planned):
                return step.number, number
    raise UserError(f"KEY={wanted}: not trained on from step {first} to the run's last, {data.course.steps - 1}")


def choose(data: DataRoom, planner: Planner, number: int) -> Chosen:
    """Pack `number` of the planner's next step, through the loader that trains. Raises UserError."""
    packs = data.budget.packs_per_step
    if not 0 <= number < packs:
        raise UserError(f"PACK={number}: a step has packs 0 to {packs - 1}")
    state = planner.state()
    planned = next(planner).packs[number]
    planner.restore(state)
    # as if each pack had a rank of its own: only this one is read
    loader = train_loader(
        planner, data.corpora, data.chat, state["step"] + 1, rank=number, world=packs, workers=0
    )  # fmt: skip
    (batch,) = loader
    assert batch.numbers == (number,), f"pack {number} asked for, {batch.numbers} loaded"
    read = [p for p, good in zip(planned, batch.trained[:, 3], strict=True) if good]
    names = [(f"{c.card.name}/{c.key(p.record)}", p.targets) for p in read for c in [data.corpora[p.corpus]]]
    holes = tuple(s for s in batch.skipped if s.place is None)  # with a place: the plan passed it over
    return Chosen(batch.step, number, batch.packs[0], tuple(names), holes)


# -- reading -----------------------------------------------------------------------------------------------------------


def bounds(pack: Pack) -> list[tuple[int, int]]:
    """(first slot, last slot + 1) of each segment."""
    return list(pairwise(np.cumsum([0, *pack.segments]).tolist()))


def path(pack: Pack, number: int) -> list[int]:
    """The slots of the conversation that ends in a segment, in the order of its tokens."""
    return [slot for one in lineages(pack.parents)[number] for slot in range(*bounds(pack)[one])]


def name(pack: Pack, number: int) -> str:
    """corpus/key of a segment; of one without key, what it is."""
    if number < len(pack.keys):
        return f"{pack.corpora[number]}/{pack.keys[number]}"
    return "shared, computed once" if number < len(pack.real) else "dummy tail"


def clip_slots(pack: Pack) -> list[list[int]]:
    """The audio slots of each clip: an unbroken run each, in the order of the clips."""
    runs: list[list[int]] = []
    for slot in pack.audio_K.tolist():
        if runs and slot == runs[-1][-1] + 1:
            runs[-1].append(slot)
        else:
            runs.append([slot])
    return runs


class Spoken(NamedTuple):
    """One turn, found in the tokens of a conversation: where its header begins, where its words do, and its
    `<|im_end|>` (None: never closed), as places in the conversation."""

    role: str
    start: int
    words: int
    end: int | None


def turns(ids: list[int], chat: Chat) -> Iterator[Spoken]:
    """The turns of a conversation: between `<|im_start|>` and `<|im_end|>`, a role up to the end of a line."""
    starts = [p for p, i in enumerate(ids) if i == chat.im_start]
    for start, until in pairwise([*starts, len(ids)]):
        end = next((p for p in range(start, until) if ids[p] == chat.im_end), None)
        role, words = "", start + 1
        while "\n" not in role and words < (until if end is None else end):
            role += chat.spell(ids[words])
            words += 1
        yield Spoken(role.strip(), start, words, end)


# -- checks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """What should hold of a pack, and what was found instead; "" where it holds."""

    name: str
    found: str


SHIFTED = "labels are shifted by exactly one: each slot must predict the token that follows it"
PLACE = "targets stand only on assistant turns and their <|im_end|>"
ALL_OF = "every assistant turn has targets, on every word of it"
CLOSED = "the <|im_end|> of every assistant turn is a target"
NO_AUDIO = "no audio slot is a target"
HEADER = "the first target of an assistant turn follows its header"
PLANNED = "there are as many targets as planned"
TOKENS = "each clip has as many audio slots as the encoder makes tokens"
READ = "the model reads exactly these labels and audio slots (target_N, audio_K)"
FILLED = "what fills the pack up has no target and no audio"


def check(chosen: Chosen, chat: Chat) -> list[Check]:
    """The verdict on a pack's loss mask and audio slots, from the pack's own tokens: the turns are looked for in them,
    nothing is asked of the code that made them but its tokenizer's names."""
    pack = chosen.pack
    ids, labels, is_audio = pack.ids_T.tolist(), pack.labels_T.tolist(), pack.is_audio_T.tolist()
    wrong: dict[str, list[str]] = {
        n: [] for n in (SHIFTED, PLACE, ALL_OF, CLOSED, NO_AUDIO, HEADER, PLANNED, TOKENS, READ, FILLED)
    }

    def at(slot: int, number: int) -> str:
        return f"slot {slot} of {name(pack, number)}"

    for number in range(len(pack.keys)):
        slots = path(pack, number)
        own = [ids[s] for s in slots]
        asks = [labels[s] != NO_TARGET for s in slots]
        allowed = set()  # places that must have been asked for: words of answers and what closes them
        for turn in turns(own, chat):
            if turn.role != "assistant":
                continue
            end = len(own) if turn.end is None else turn.end
            allowed |= {*range(turn.words, end + 1)}
            for p in range(turn.words, end):
                if not asks[p - 1]:
                    wrong[ALL_OF].append(f"{at(slots[p - 1], number)} need not predict {quoted(chat, own[p])}")
            if turn.end is None:
                wrong[CLOSED].append(f"the answer of {name(pack, number)} is never closed")
            elif not asks[turn.end - 1]:
                wrong[CLOSED].append(f"{at(slots[turn.end - 1], number)} need not predict it")
            first = next((p for p in range(turn.start, end + 1) if p < len(own) and asks[p]), None)
            if first != turn.words - 1:
                where = "there is none" if first is None else f"the first is {at(slots[first], number)}"
                wrong[HEADER].append(f"{where}, the header ends in {at(slots[turn.words - 1], number)}")
        for p in [p for p, asked in enumerate(asks) if asked]:
            follows = own[p + 1] if p + 1 < len(own) else None
            label = labels[slots[p]]
            if label != follows:
                then = "nothing in its segment" if follows is None else quoted(chat, follows)
                wrong[SHIFTED].append(
                    f"{at(slots[p], number)} ({quoted(chat, own[p])}) must predict {quoted(chat, label)}, and {then} "
                    "follows"
                )
            if p + 1 not in allowed:
                wrong[PLACE].append(f"{at(slots[p], number)} must predict {quoted(chat, label)}")
            if is_audio[slots[p]] or label == chat.audio:
                wrong[NO_AUDIO].append(f"{at(slots[p], number)} must predict {quoted(chat, label)}")
    for number in range(len(pack.keys), len(pack.segments)):
        for slot in range(*bounds(pack)[number]):
            if labels[slot] != NO_TARGET or (is_audio[slot] and number >= len(pack.real)):
                wrong[FILLED].append(at(slot, number))
    wrong[PLANNED] += list(_against_plan(chosen))
    made, runs = [frames.audio_tokens(n) for n in pack.clips], clip_slots(pack)
    if len(runs) != len(made):
        wrong[TOKENS].append(f"{len(made)} clips, {len(runs)} runs of audio slots")
    wrong[TOKENS] += [
        f"clip {c} ({frames.seconds(pack.clips[c]):.2f} s): {len(run)} slots from slot {run[0]}, {tokens} tokens"
        for c, (run, tokens) in enumerate(zip(runs, made, strict=False)) if len(run) != tokens
    ]  # fmt: skip
    asked = [s for s, label in enumerate(labels) if label != NO_TARGET]
    heard = [s for s, audio in enumerate(is_audio) if audio]
    marked = [s for s, i in enumerate(ids) if i == chat.audio]
    for what, read, there in (
        ("targets", pack.target_N.tolist(), asked), ("audio slots", sorted(pack.audio_K.tolist()), heard),
        ("slots of <|AUDIO|>", heard, marked),
    ):  # fmt: skip
        differ = sorted(set(read) ^ set(there))
        if differ or len(read) != len(there):
            wrong[READ].append(f"{len(read)} {what} are read and {len(there)} stand there, slot {differ[:1]} first")
    hint = _unshifted(ids, labels)
    return [Check(n, _told(found, hint if n == SHIFTED else "")) for n, found in wrong.items()]


def quoted(chat: Chat, token: int) -> str:
    """A token as it is shown: a special one by its name, others in quotes."""
    return visible(chat.spell(token)) if token in chat.special else f'"{visible(chat.spell(token), plain=True)}"'


def visible(text: str, *, plain: bool = False) -> str:
    """Text without a character that a terminal would obey, lines in one. `plain`: `<|` is written `<\\|`, so that the
    words of a transcript never look like a special token."""
    text = text.replace("\\", "\\\\")
    if plain:
        text = text.replace("<|", "<\\|")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _told(found: list[str], hint: str) -> str:
    """The first of what is wrong, and how much more there is."""
    if not found:
        return ""
    return found[0] + (f", and {len(found) - 1} more" if len(found) > 1 else "") + hint


def _unshifted(ids: list[int], labels: list[int]) -> str:
    """How far labels are off, where all are off by the same."""
    asked = [s for s, label in enumerate(labels) if label != NO_TARGET]
    off = {0: "; no label is shifted: each slot is asked for its own token", 2: "; all labels are shifted by two"}
    for distance, told in off.items():
        if all(s + distance < len(ids) and labels[s] == ids[s + distance] for s in asked):
            return told
    return ""


def _against_plan(chosen: Chosen) -> Iterator[str]:
    pack = chosen.pack
    there: Counter[str] = Counter()
    for number, (first, until) in enumerate(bounds(pack)[: len(pack.keys)]):
        there[name(pack, number)] += int((pack.labels_T[first:until] != NO_TARGET).sum())
    planned: Counter[str] = Counter()
    for key, targets in chosen.planned:
        planned[key] += targets
    for key in sorted(there.keys() | planned.keys()):
        if there[key] != planned[key]:
            yield f"{key}: {there[key]} targets, {planned[key]} planned"
    if sum(pack.targets) != sum(there.values()):
        yield f"{sum(there.values())} targets, the pack says {sum(pack.targets)}"
