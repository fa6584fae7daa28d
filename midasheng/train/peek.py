"""A pack as the model sees it, as text and as a page: slots, what is masked, what must be predicted, losses.

What it asks the model for is judged by data/peek.py; here it is shown.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from midasheng import frames
from midasheng.config import Loaded, Stage
from midasheng.data.audio import data_uri
from midasheng.data.chat import Chat
from midasheng.data.peek import Check, Chosen, bounds, clip_slots, name, quoted, visible
from midasheng.data.plan import Budget
from midasheng.model import weights
from midasheng.model.audio_lm import AudioLM
from midasheng.model.sources import open_source
from midasheng.sample import NO_TARGET, Pack
from midasheng.train import checkpoint
from midasheng.train.fit import build, open_starts
from midasheng.train.order import Order

BOLD, DIM, GREEN, CYAN, RED, PLAIN = "\x1b[1m", "\x1b[2m", "\x1b[32m", "\x1b[36m", "\x1b[1;31m", "\x1b[0m"
WIDEST = 44  # columns of a target in the terminal


# -- weights -----------------------------------------------------------------------------------------------------------


def model_of_run(stage: Stage, folder: Path, chat: Chat) -> tuple[AudioLM, str] | None:
    """The model of a run in eval mode, and where its weights come from: weights/ of a finished run, read as the next
    stage reads them, else its last checkpoint; None before the first. Raises UserError."""
    bare = replace(stage.hardware, liger=False, compile=False, recompute=[])
    last = folder / "checkpoints" / checkpoint.LAST
    if (folder / "weights" / "stage.json").is_file():
        own = replace(stage, hardware=bare, start=[], fresh=[], lora=replace(stage.lora, inherit="carry"))
        starts = [weights.Start(open_source(str(folder)), ("*",))]
        weights.check_tokenizer(starts[0], chat.fingerprint())
        model, where = build(_order(own, folder), starts, chat.added)[0], str(folder / "weights")
    elif last.is_file():
        model, saved = started(replace(stage, hardware=bare), folder, chat.added), checkpoint.read(last)
        checkpoint.restore(model, saved, last)
        where = f"{last}, step {saved['step']}"
    else:
        return None
    return model.eval(), where


def started(stage: Stage, folder: Path, added: range) -> AudioLM:
    """The model that a run began with, but for what it calibrates itself. `added` as in fit.build. Raises
    UserError."""
    # what is frozen comes from where the run's own weights came from, under whatever name (FROM) it was asked for
    parents = json.loads((folder / "inputs.json").read_text(encoding="utf-8"))["parents"]
    order = _order(replace(stage, start=[{"from": p["from"], "take": p["take"]} for p in parents]), folder)
    return build(order, open_starts(order), added)[0]


def _order(stage: Stage, folder: Path) -> Order:
    return Order(Loaded(stage, {}), folder.parent.parent, folder.parent.name, folder.name, "", False)


@torch.no_grad()
def losses(model: AudioLM, pack: Pack, device: torch.device | str = "cpu") -> dict[int, float]:
    """Slot -> loss of its target in nats, teacher-forced, as training and validation compute it."""
    model, moved = model.to(device), pack.to(device)
    losses_N = model.target_losses(model.hidden(moved), moved)
    return dict(zip(pack.target_N.tolist(), losses_N.double().cpu().tolist(), strict=True))


# -- what is shown -----------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A stretch of a segment: tokens that make whole characters, or the audio slots of a clip."""

    first: int  # slot
    slots: int
    text: str
    special: bool
    asked: bool  # the slot before must predict it
    instead: str  # what the slot before must predict instead, as it is shown; ""


class Target(NamedTuple):
    """A slot that must predict: what it holds and what it is asked for, as shown; nats, where weights were given."""

    slot: int
    holds: str
    asked: str
    loss: float | None


@dataclass(frozen=True)
class Segment:
    """One segment, ready to be shown. `clips`: numbers of the pack's clips that are heard in it."""

    number: int
    name: str
    task: str
    first: int
    until: int
    clips: tuple[int, ...]
    audio_slots: int
    pieces: tuple[Piece, ...]
    targets: tuple[Target, ...]

    @property
    def title(self) -> str:
        """Its place in the row, and what it holds."""
        heard = f"{self.audio_slots} audio slots, " if self.audio_slots else ""
        return f"slots {self.first}..{self.until - 1} ({self.until - self.first}): {heard}{len(self.targets)} targets"

    @property
    def loss(self) -> str:
        """Loss of the segment in words; "" without weights."""
        known = [t.loss for t in self.targets if t.loss is not None]
        return f"loss {sum(known) / len(known):.3f} nats a target ({sum(known):.3f} in all)" if known else ""


def segments(pack: Pack, chat: Chat, nats: Mapping[int, float] | None) -> list[Segment]:
    """The segments of a pack, the dummy tail among them; `nats`: loss of each target slot."""
    ids, labels, is_audio = pack.ids_T.tolist(), pack.labels_T.tolist(), pack.is_audio_T.tolist()
    heard = [run[0] for run in clip_slots(pack)]
    found = []
    for number, (first, until) in enumerate(bounds(pack)):
        targets = [
            Target(s, quoted(chat, ids[s]), quoted(chat, labels[s]), nats.get(s) if nats else None)
            for s in range(first, until) if labels[s] != NO_TARGET
        ]  # fmt: skip
        keyed = number < len(pack.keys)
        pieces = (
            _pieces(chat, ids, labels, is_audio, first, until)
            if number < len(pack.real) or not _is_filler(ids, first, until)
            else []
        )
        clips = tuple(c for c, slot in enumerate(heard[: len(pack.clips)]) if first <= slot < until)
        found.append(
            Segment(
                number, name(pack, number), pack.tasks[number] if keyed else "", first, until, clips,
                sum(is_audio[first:until]), tuple(pieces), tuple(targets),
            )
        )  # fmt: skip
    return found


def _is_filler(ids: Sequence[int], first: int, until: int) -> bool:
    return len(set(ids[first:until])) == 1


def _pieces(
    chat: Chat, ids: Sequence[int], labels: Sequence[int], is_audio: Sequence[bool], first: int, until: int
) -> list[Piece]:  # fmt: skip
    """The tokens of a segment; those that differ in what is asked of them stand apart."""

    def asked(slot: int) -> int:
        return labels[slot - 1] if slot > first else NO_TARGET

    def alone(slot: int) -> bool:
        return is_audio[slot] or ids[slot] in chat.special or asked(slot) not in (NO_TARGET, ids[slot])

    found, slot = [], first
    while slot < until:
        end = slot + 1
        if is_audio[slot] and asked(slot) == NO_TARGET:
            while end < until and is_audio[end] and asked(end) == NO_TARGET:
                end += 1
            text = chat.spell(ids[slot]) + (f" x {end - slot}" if end - slot > 1 else "")
        elif alone(slot):
            text = chat.spell(ids[slot])
        else:
            while end < until and not alone(end) and (asked(end) == NO_TARGET) == (asked(slot) == NO_TARGET):
                end += 1
            text = chat.join(ids[slot:end])
        label = asked(slot)
        instead = quoted(chat, label) if label not in (NO_TARGET, ids[slot]) else ""
        special = is_audio[slot] or ids[slot] in chat.special
        found.append(Piece(slot, end - slot, text, special, label != NO_TARGET, instead))
        slot = end
    if labels[until - 1] != NO_TARGET:  # nothing of the segment follows
        found.append(Piece(until, 0, "", False, True, quoted(chat, labels[until - 1])))
    return found


@dataclass(frozen=True)
class Look:
    """A pack with all that is said about it."""

    title: str
    notes: tuple[str, ...]
    chosen: Chosen
    budget: Budget
    segments: tuple[Segment, ...]
    verdict: tuple[Check, ...]
    weights: str  # where the losses come from; ""

    @property
    def wrong(self) -> int:
        """Checks that failed."""
        return sum(bool(c.found) for c in self.verdict)

    def counts(self) -> list[str]:
        """Fill of both budgets and what the pack holds."""
        pack = self.chosen.pack
        real = sum(pack.real)
        used, total = sum(frames.frames(n) for n in pack.clips), sum(pack.chunks)
        fill = f"{real} of {sum(pack.segments)} slots ({real / max(1, sum(pack.segments)):.1%})"
        heard = f"{used} of {total} frames ({used / total:.1%})" if total else "no frames"
        lines = [
            f"fill: {fill}, {heard}; dummy tails: {sum(pack.segments) - real} slots, {total - used} frames",
            f"{len(pack.keys)} segments: {len(pack.target_N)} targets, {len(pack.audio_K)} audio tokens, "
            f"{len(pack.clips)} clips of {frames.seconds(sum(pack.clips)):.2f} s",
        ]
        lines += [f"left out: {hole.corpus}/{hole.key}: {hole.reason}" for hole in self.chosen.holes]
        known = [t.loss for s in self.segments for t in s.targets if t.loss is not None]
        if known:
            mean = sum(known) / len(known)
            lines.append(f"loss of the pack {mean:.3f} nats a target, with {self.weights}, in eval mode")
        return lines

    def ending(self) -> str:
        """The verdict in a line."""
        if self.wrong:
            return f"{self.wrong} of {len(self.verdict)} checks say that something is WRONG with this pack"
        return f"all {len(self.verdict)} checks hold"


# -- in the terminal ---------------------------------------------------------------------------------------------------


def text(look: Look, *, colour: bool, width: int) -> str:
    """The pack as text. `colour`: targets in colour, else in brackets; `width`: columns."""

    def paint(code: str, words: str) -> str:
        return f"{code}{words}{PLAIN}" if colour else words

    mark = "green" if colour else "[in brackets]"
    lines = [paint(BOLD, look.title), *look.notes]
    lines += [f"what is {mark} must be predicted by the slot before it; all else is masked", ""]
    for segment in look.segments:
        seconds = ", ".join(f"{frames.seconds(look.chosen.pack.clips[c]):.2f} s" for c in segment.clips)
        head = f"{segment.name}  {segment.task}" if segment.task else segment.name
        lines.append(
            paint(BOLD, f"{segment.number}  {head}") + f"  {segment.title}" + (f"; heard: {seconds}" if seconds else "")
        )
        lines += [f"    {line}" for line in _flow(segment, colour)]
        if segment.targets:
            lines += [f"  {line}" for line in _grid(segment, width - 2)]
        if segment.loss:
            lines.append(f"  {segment.loss}")
        lines.append("")
    lines += [*look.counts(), ""]
    for c in look.verdict:
        lines.append(paint(RED, f"WRONG  {c.name}: {c.found}") if c.found else f"ok     {c.name}")
    return "\n".join([*lines, paint(RED if look.wrong else BOLD, look.ending())])


def _flow(segment: Segment, colour: bool) -> list[str]:
    """The tokens of a segment as lines; a line of the conversation is a line here."""
    out = ""
    for piece in segment.pieces:
        parts = piece.text.split("\n")
        for n, part in enumerate(parts):
            last = n == len(parts) - 1
            words = visible(part, plain=not piece.special) + ("" if last else "\\n")
            if not colour and not piece.special:
                words = words.replace("[", "\\[").replace("]", "\\]")
            if piece.asked and (words or piece.instead):
                wanted = f" (asked: {piece.instead})" if piece.instead else ""
                words = f"{RED if wanted else GREEN}{words}{wanted}{PLAIN}" if colour else f"[{words}{wanted}]"
            elif colour and words:
                words = f"{CYAN if piece.special else DIM}{words}{PLAIN}"
            out += words + ("" if last else "\n")
    return out.removesuffix("\n").split("\n") if out else []


def _grid(segment: Segment, width: int) -> list[str]:
    """Targets side by side: slot, what it holds -> what it must predict, nats."""
    cells = [f"{t.slot} {t.holds} -> {t.asked}" + ("" if t.loss is None else f" {t.loss:.3f}") for t in segment.targets]
    wide = min(WIDEST, max(map(_columns, cells)))
    each = max(1, (width + 3) // (wide + 3))
    padded = [c + " " * max(0, wide - _columns(c)) for c in cells]
    return ["   ".join(padded[i : i + each]).rstrip() for i in range(0, len(padded), each)]


def _columns(words: str) -> int:
    """Columns that a terminal gives to a text."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in words)


# -- as a page ---------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --soft: #57606a; --line: #d0d7de; --card: #f6f8fa;
  --ask: #d3f0d8; --ask-ink: #0a3d1a; --bad: #b3261e; --special: #0550ae; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --soft: #9aa4af; --line: #30363d;
  --card: #161b22; --ask: #12432a; --ask-ink: #c9f7d6; --bad: #ff8a80; --special: #79c0ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 90rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
p { margin: .25rem 0; overflow-wrap: anywhere; }
.soft { color: var(--soft); }
ul { list-style: none; margin: 1rem 0; padding: 0; }
li.wrong { color: var(--bad); font-weight: 600; }
article, .verdict { border: 1px solid var(--line); border-radius: .5rem; background: var(--card); padding: .75rem;
  margin: 1rem 0; }
audio { display: block; width: 100%; max-width: 30rem; margin: .5rem 0; }
.flow { font: 15px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0;
  color: var(--soft); }
.special { color: var(--special); }
mark { background: var(--ask); color: var(--ask-ink); border-radius: .2rem; padding: .1rem 0; }
mark.wrong { outline: 2px solid var(--bad); }
mark.wrong b { color: var(--bad); }
ol { list-style: none; display: flex; flex-wrap: wrap; gap: .35rem; padding: 0; margin: .5rem 0;
  font: 13px/1.4 ui-monospace, monospace; }
ol li { border: 1px solid var(--line); border-radius: .3rem; padding: .15rem .4rem; white-space: pre-wrap;
  overflow-wrap: anywhere; max-width: 100%; background: var(--paper); }
ol li span { color: var(--soft); }
"""


def page(look: Look) -> str:
    """The pack as one HTML file that needs nothing beside it: the same as the text, and each clip to listen to."""
    # nothing in a transcript could load or run anything, even if it were not escaped
    policy = "default-src 'none'; style-src 'unsafe-inline'; media-src data:"
    clips = np.split(look.chosen.pack.audio_L.numpy(), np.cumsum(look.chosen.pack.clips))
    checks = "".join(
        f'<li class="wrong">WRONG: {escape(c.name)}: {escape(c.found)}</li>'
        if c.found
        else f"<li>ok: {escape(c.name)}</li>"
        for c in look.verdict
    )
    said = "".join(f"<p>{escape(line)}</p>" for line in (*look.notes, *look.counts()))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(look.title)}</title><style>{STYLE}</style></head><body>\n"
        f'<h1>{escape(look.title)}</h1>{said}\n<section class="verdict"><h2>{escape(look.ending())}</h2>'
        f'<ul>{checks}</ul></section>\n<p class="soft">What is <mark>marked</mark> must be predicted by the slot '
        "before it; all else is masked. Below it, for each target: slot, what it holds -> what it must predict"
        f"{', loss in nats' if look.weights else ''}. Clips are what the model hears, 16 kHz mono (here in 16 bits)."
        "</p>\n" + "\n".join(_article(segment, clips) for segment in look.segments) + "\n</body></html>\n"
    )


def _article(segment: Segment, clips: Sequence[np.ndarray]) -> str:
    heard = "".join(
        f'<audio controls preload="metadata" aria-label="clip {c} of {escape(segment.name)}" '
        f'src="{data_uri(clips[c])}"></audio>'
        for c in segment.clips
    )
    flow = "".join(map(_span, segment.pieces))
    cells = "".join(
        f"<li><span>{t.slot}</span> {escape(t.holds)} -> {escape(t.asked)}"
        + ("" if t.loss is None else f" <b>{t.loss:.3f}</b>")
        + "</li>"
        for t in segment.targets
    )
    seconds = ", ".join(f"{frames.seconds(len(clips[c])):.2f} s" for c in segment.clips)
    return (
        f'<article><h2>{segment.number}&ensp;{escape(segment.name)}&ensp;<span class="soft">{escape(segment.task)}'
        f'</span></h2><p class="soft">{escape(segment.title)}{f"; heard: {seconds}" if seconds else ""}</p>{heard}'
        + (f'<div class="flow">{flow}</div>' if flow else "")
        + (f"<ol>{cells}</ol>" if cells else "")
        + (f"<p>{segment.loss}</p>" if segment.loss else "")
        + "</article>"
    )


def _span(piece: Piece) -> str:
    lines = [escape(visible(part, plain=not piece.special)) for part in piece.text.split("\n")]
    words = "\\n\n".join(lines)
    if piece.special:
        words = f'<span class="special">{words}</span>'
    if piece.instead:
        return f'<mark class="wrong">{words}<b> (asked: {escape(piece.instead)})</b></mark>'
    return f"<mark>{words}</mark>" if piece.asked else words
