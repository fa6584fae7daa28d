"""Why a step was not finite: the step made again, its packs halved down to the sample; data, numerics or weights?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from midasheng.config import Stage, UserError
from midasheng.data.loader import Loading, Share
from midasheng.data.plan import Planned, PlannedStep
from midasheng.data.room import DataRoom
from midasheng.model import attention
from midasheng.model.audio_lm import AudioLM
from midasheng.sample import Pack, counter_seed
from midasheng.train import checkpoint
from midasheng.train.fit import calibrate
from midasheng.train.peek import started
from midasheng.train.skips import NOT_FINITE

ENOUGH = 8  # samples that fail alone, none passing, until it is the weights


class Tried(NamedTuple):
    """What some samples gave, forward and backward. `wrong`: CORPUS/KEY of those whose own loss is not finite."""

    finite: bool
    norm: float
    wrong: frozenset[str]


@dataclass(frozen=True)
class Culprit:
    """A sample that alone is not finite, as the run trains. `exact`: is it finite in float32; `silent`: with silence in
    place of its clip (None: it has no clip). `peak`: its clip's largest value, 1.0 is full scale."""

    name: str
    exact: bool
    silent: bool | None
    peak: float

    @property
    def verdict(self) -> str:
        """What is at fault, in words."""
        heard = f"; its clip reaches {self.peak:.3g} (full scale is 1)" if self.silent is not None else ""
        if self.exact:
            return f"numerics: finite in float32, not finite in the precision of the run{heard}"
        if self.silent:
            return f"data: not finite in float32 either, but finite with silence in place of its clip{heard}"
        return f"data: not finite in float32 either{', nor with silence in place of its clip' if heard else ''}{heard}"


@dataclass(frozen=True)
class Found:
    """What became of one step. `together`: sets that were not finite though both halves were."""

    step: int
    culprits: tuple[Culprit, ...]
    together: tuple[tuple[str, ...], ...]
    weights: str  # what is wrong with the weights; ""
    tried: int

    @property
    def reproduced(self) -> bool:
        """Did it fail again?"""
        return bool(self.culprits or self.together or self.weights)

    def lines(self) -> Iterator[str]:
        """The findings."""
        yield f"step {self.step}, in {self.tried} tries:"
        if self.weights:
            yield f"  weights: {self.weights}; no sample is to blame"
        for culprit in self.culprits:
            yield f"  {culprit.name}: {culprit.verdict}"
        for names in self.together:
            shown = ", ".join(names[:ENOUGH]) + (f" and {len(names) - ENOUGH} more" if len(names) > ENOUGH else "")
            yield f"  numerics: finite in parts, not finite together: {shown}"
        if not self.reproduced:
            yield "  finite: it does not happen with these weights"


class Replay:
    """One step of a run, made again from given weights, whole or in parts; the weights do not change."""

    def __init__(
        self, model: AudioLM, stage: Stage, data: DataRoom, without: frozenset[tuple[int, int]], device: torch.device
    ) -> None:
        self.model, self.stage, self.data, self.without = model.to(device), stage, data, without
        self.device, self.tries, self.passed = device, 0, 0
        self.model.train()

    def name(self, p: Planned) -> str:
        """CORPUS/KEY."""
        corpus = self.data.corpora[p.corpus]
        return f"{corpus.card.name}/{corpus.key(p.record)}"

    def packs(self, step: int, packs: Sequence[tuple[int, Sequence[Planned]]], *, small: bool = True) -> list[Pack]:
        """These samples, read and laid as training does; `small`: in packs no larger than they need."""
        found: list[Pack] = []
        for number, planned in packs:
            shape = self.data.budget
            if small:
                slots = sum(p.slots for p in planned) + shape.lead_slots
                shape = replace(shape, pack_slots=slots, pack_frames=sum(p.frames for p in planned))
            share = Share(step, ((number, tuple(planned)),), (), {})
            found += Loading(self.data.corpora, self.data.chat, shape, without=self.without)[share].packs
        return found

    def tried(self, step: int, numbers: Sequence[int], packs: Sequence[Pack]) -> Tried:
        """Forward and backward of packs, their gradients added up as in a step."""
        self.tries += 1
        targets = max(1, sum(sum(pack.targets) for pack in packs))
        self.model.zero_grad(set_to_none=True)
        wrong: set[str] = set()
        finite = True
        for number, pack in zip(numbers, packs, strict=True):
            torch.manual_seed(counter_seed(self.stage.run.seed, "dropout", self.stage.name, step, number))
            loss_S = self.model(pack.to(self.device))
            (loss_S.sum() / targets).backward()
            bad = (~loss_S.detach().isfinite()).tolist()
            finite = finite and not any(bad)
            wrong |= {f"{c}/{k}" for c, k, b in zip(pack.corpora, pack.keys, bad, strict=False) if b}
        norms = [p.grad.norm() for p in self.model.parameters() if p.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.stack(norms)))
        self.model.zero_grad(set_to_none=True)
        finite = finite and norm < float("inf")
        self.passed += finite
        return Tried(finite, norm, frozenset(wrong))

    def bisect(self, step: PlannedStep, said: Callable[[str], None]) -> Found:
        """Find what is not finite in a step. Changes the precision of the model when something is."""
        self.tries = self.passed = 0
        if broken := [n for n, t in self.model.named_parameters() if not t.isfinite().all()]:
            return Found(step.number, (), (), f"{len(broken)} tensors are not finite, the first {broken[0]}", 0)
        alone: list[tuple[int, Planned]] = []
        together: list[list[Planned]] = []
        whole = [(n, self.packs(step.number, [(n, planned)], small=False)[0]) for n, planned in enumerate(step.packs)]
        for (number, pack), planned in zip(whole, step.packs, strict=True):
            tried = self.tried(step.number, [number], [pack])
            said(f"pack {number}: {len(planned)} samples, {_words(tried)}")
            if not tried.finite:
                one, many = self._search(step.number, number, list(planned), tried)
                alone += [(number, p) for p in one]
                together += many
        if not alone and not together and len(whole) > 1:
            tried = self.tried(step.number, [n for n, _ in whole], [pack for _, pack in whole])
            said(f"all packs together: {_words(tried)}")
            if not tried.finite:
                together.append([p for planned in step.packs for p in planned])
        if len(alone) >= ENOUGH and not self.passed:
            every = f"not finite with each of {len(alone)} samples alone"
            return Found(step.number, (), (), every, self.tries)
        culprits = self._culprits(step.number, alone)
        sets = tuple(tuple(self.name(p) for p in many) for many in together)
        return Found(step.number, culprits, sets, "", self.tries)

    def _search(
        self, step: int, number: int, planned: list[Planned], tried: Tried
    ) -> tuple[list[Planned], list[list[Planned]]]:
        """Of samples that failed: those that fail alone, and the sets that fail though their halves do not."""
        if len(planned) == 1:
            return planned, []
        named = [p for p in planned if self.name(p) in tried.wrong]
        rest = [p for p in planned if self.name(p) not in tried.wrong]
        half = len(planned) // 2
        alone: list[Planned] = []
        together: list[list[Planned]] = []
        failed = False
        for part in (named, rest) if named and rest else (planned[:half], planned[half:]):
            if len(alone) >= ENOUGH and not self.passed:
                break
            again = self.tried(step, [number], self.packs(step, [(number, part)]))
            if not again.finite:
                failed = True
                one, many = self._search(step, number, part, again)
                alone += one
                together += many
        return (alone, together) if failed else ([], [planned])

    def _culprits(self, step: int, alone: Sequence[tuple[int, Planned]]) -> tuple[Culprit, ...]:
        """Each sample that fails alone, in float32 and without its clip."""
        compute, kinds = self.model.compute_dtype, {n: p.dtype for n, p in self.model.named_parameters()}
        self.model.float()
        self.model.compute_dtype = None
        found = []
        for number, p in alone:
            (pack,) = self.packs(step, [(number, [p])])
            silence = replace(pack, audio_L=torch.zeros_like(pack.audio_L))
            exact = self.tried(step, [number], [pack]).finite
            silent = self.tried(step, [number], [silence]).finite if pack.clips else None
            peak = float(pack.audio_L.abs().max()) if pack.clips else 0.0
            found.append(Culprit(self.name(p), exact, silent, peak))
        for name, parameter in self.model.named_parameters():  # a bf16 tensor comes back from float32 as it was
            parameter.data = parameter.data.to(kinds[name])
        self.model.compute_dtype = compute
        return tuple(found)


def _words(tried: Tried) -> str:
    if tried.finite:
        return f"finite, gradient norm {tried.norm:.3g}"
    return f"NOT finite, gradient norm {tried.norm}" + (f", loss of {len(tried.wrong)} samples" if tried.wrong else "")


# -- which step, which weights -----------------------------------------------------------------------------------------


def skipped_steps(folder: Path) -> list[dict[str, Any]]:
    """The rows of events.jsonl on steps that were not finite."""
    path = folder / "events.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines if '"step skipped"' in line]
    return [row for row in rows if row["because"] == NOT_FINITE]


def last_row(events: Sequence[dict[str, Any]], folder: Path) -> list[int]:
    """The numbers of the steps that were skipped one after the other at last. Raises UserError where none was."""
    if not events:
        raise UserError(
            f"{folder}: no step was skipped for want of a finite loss (events.jsonl); say STEP=n to try one"
        )
    row = events[-events[-1]["in_a_row"] :]
    last = events[-1]["number"]
    return [e["number"] for e in row if last - e["number"] < len(row)]


def distance(at: int, step: int, skipped: Sequence[int]) -> int:
    """Steps that were taken between a checkpoint at `at` and the step: negative where it is behind the step, 0 where
    its weights are exactly those that met the step."""
    between = [n for n in range(min(at, step), max(at, step)) if n not in skipped]
    return len(between) if at <= step else -len(between)


def model_before(stage: Stage, folder: Path, data: DataRoom, step: int, skipped: Sequence[int]) -> tuple[AudioLM, str]:
    """The model with weights as near as there are to those that met `step`, from a checkpoint of the run or from its
    start, and which they are. Raises UserError."""
    attention.ask(stage.hardware.attention)
    model = started(replace(stage, hardware=replace(stage.hardware, compile=False)), folder, data.chat.added)
    paths = [p for name in (checkpoint.LAST, checkpoint.BEST) if (p := folder / "checkpoints" / name).is_file()]
    there = {p: int(checkpoint.read(p)["step"]) for p in paths}
    # the nearest one, rather before the step than behind it
    near = min(paths, key=lambda p: ((d := distance(there[p], step, skipped)) < 0, abs(d)), default=None)
    if near is None:
        calibrate(model, stage, data)
        return model, _which("the start of the run", distance(0, step, skipped))
    checkpoint.restore(model, checkpoint.read(near), near)
    return model, _which(f"{near}, step {there[near]}", distance(there[near], step, skipped))


def _which(where: str, off: int) -> str:
    if not off:
        return f"{where}: exactly those that met the step"
    return f"{where}: {abs(off)} steps were taken between them and the step" + (", which is BEFORE them" * (off < 0))
