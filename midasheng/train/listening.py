"""The listening test: do a stage's answers hang on the audio, and are they better than those of a decoder without ears?

A falling loss does not say so: the form of the answers alone makes it fall. So the held-out samples are asked again
with another clip (their loss must rise), and before step 0 of the decoder alone (the stage must end below it).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from midasheng.data.held_out import ALIKE, NONE, OTHER, OWN, HeldOutSet, Question
from midasheng.evaluate.rows import UNREAD, Row
from midasheng.model.adapt import without_lora
from midasheng.model.audio_lm import AudioLM
from midasheng.model.generate import generate
from midasheng.sample import NOT_TOLD
from midasheng.train.answers import exact_match, last_rows
from midasheng.train.meter import read_metrics

Reduce = Callable[[Tensor], Tensor]  # sum over ranks
SURE = 3.0  # standard errors
SHOWN = 8  # open answers printed at the end
LONGEST = 48  # tokens of an answer in words
FINISHED = (UNREAD, "stop", "length")  # why an answer ended; the first: its clip cannot be decoded


@dataclass(frozen=True)
class Paired:
    """A difference of losses over the same samples, nats per target, with its standard error."""

    difference: float
    se: float
    samples: int

    @property
    def sure(self) -> bool:
        """Is the difference above 3 standard errors?"""
        return self.samples > 1 and self.difference > SURE * self.se

    def __str__(self) -> str:
        return f"{self.difference:+.3f} +- {self.se:.3f}"


def paired(low_A2: Tensor, high_A2: Tensor, clusters: Sequence[str]) -> Paired | None:
    """How much higher the losses `high_A2` are than `low_A2`, per target. Rows are (loss sum, targets) of one sample.

    A ratio of sums, as the loss itself is; its standard error by linearisation over clusters: samples of one clip (its
    caption, its transcript) do not count as independent. Samples without targets on either side are left out; None when
    fewer than two clusters remain.
    """
    both = ((low_A2[:, 1] > 0) & (high_A2[:, 1] > 0)).tolist()
    sums: dict[str, list[float]] = {}
    for keep, cluster, low, high in zip(both, clusters, low_A2.tolist(), high_A2.tolist(), strict=True):
        if keep:
            total = sums.setdefault(cluster, [0.0, 0.0])
            total[0] += high[0] - low[0]
            total[1] += low[1]
    if len(sums) < 2:
        return None
    targets = sum(t for _, t in sums.values())
    difference = sum(d for d, _ in sums.values()) / targets
    k = len(sums)
    squares = sum((d - difference * t) ** 2 for d, t in sums.values())
    return Paired(difference, math.sqrt(squares * k / (k - 1)) / targets, sum(both))


class ListeningTest:
    """Asks the held-out sets of a stage. The first set is the stage's own mix; of the others the loss is taken at both
    ends, and their questions are answered at the end.

    `answers`: closed questions of each kind that are answered at the end (data.answers), `few`: questions that are
    answered at every validation (log.answers). Writes below `run` text_only.json: losses and answers of the decoder
    alone, before step 0.
    """

    def __init__(self, sets: Sequence[HeldOutSet], run: Path, answers: int, few: int = 0) -> None:
        self.sets, self.run, self.answers, self.few = sets, run, answers, few
        self._agreed = not answers

    def _agree(self, rank: int) -> None:
        """Which questions are closed: the first rank reads it, once, and tells the others, for all must ask the same,
        whatever one of them could not read."""
        if self._agreed:
            return
        told = [[asked.all_choices() for asked in self.sets] if rank == 0 else None]
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(told)
            for asked, choices in zip(self.sets, told[0] or (), strict=True):
                asked.know(choices)
        self._agreed = True

    def losses(self, model: AudioLM, asked: HeldOutSet, kind: str, rank: int, world: int, reduce: Reduce) -> Tensor:
        """(loss sum, targets) of each asked sample, float64 (A, 2), over all ranks; zeros where it was not asked."""
        sums_A2 = torch.zeros(len(asked.asked), 2, dtype=torch.float64)
        device = next(model.parameters()).device
        for numbers, pack in asked.packs(kind, rank, world):
            loss_S = model(pack.to(device)).double().cpu()
            at = torch.tensor(numbers)  # behind the samples there may be a tail
            sums_A2[at] = torch.stack([loss_S[: len(at)], torch.tensor(pack.targets, dtype=torch.float64)], dim=1)
        return reduce(sums_A2)

    @torch.no_grad()
    def before(self, model: AudioLM, rank: int, world: int, reduce: Reduce) -> None:
        """The decoder as the stage received it, without LoRA and without clips: what text alone can do."""
        told = {}
        self._agree(rank)
        with without_lora(model):
            first = self.sets[0]
            if first.hears:
                sums_A2 = self.losses(model, first, NONE, rank, world, reduce).tolist()
                for a, sums in zip(first.asked, sums_A2, strict=True):
                    told[_name(first, a.corpus, a.record.key, a.variant)] = sums
            answers: dict[str, str | None] = {}
            for asked in self.sets if self.answers else ():
                closed = asked.closed(self.answers)
                found = self._answers(model, asked, closed, NONE, rank, world, reduce)
                answers |= {row.id: row.output for row in found}
        if rank == 0:
            text = json.dumps({"losses": told, "answers": answers}, ensure_ascii=False) + "\n"
            (self.run / "text_only.json").write_text(text, encoding="utf-8")

    @torch.no_grad()
    def row(self, model: AudioLM, rank: int, world: int, reduce: Reduce, *, ends: bool) -> dict[str, Any]:
        """Validation loss and listening difference; `ends`: with all kinds of clips, and the loss of the other sets."""
        first, *others = self.sets
        own = self.losses(model, first, OWN, rank, world, reduce)
        found = {"listening": self.losses(model, first, OTHER, rank, world, reduce)} if first.hears else {}
        if ends and first.hears:
            found["alike"] = self.losses(model, first, ALIKE, rank, world, reduce)
            found["text_only"] = self._text_only(first)
        row = self._row(first, own, found)
        if ends and others:
            row["also"] = {s.name: self._row(s, self.losses(model, s, OWN, rank, world, reduce), {}) for s in others}
        return row

    def _row(self, asked: HeldOutSet, own: Tensor, found: dict[str, Tensor]) -> dict[str, Any]:
        loss, targets = own.sum(0).tolist()
        cards = [corpus.card for corpus in asked.corpora]
        of = {
            "corpora": [cards[a.corpus].name for a in asked.asked],
            "tasks": [cards[a.corpus].task for a in asked.asked],
            "languages": [a.record.language for a in asked.asked],
        }  # fmt: skip
        names = {
            "corpora": [card.name for card in cards], "tasks": dict.fromkeys(card.task for card in cards),
            "languages": sorted(set(of["languages"]), key=lambda name: (name == NOT_TOLD, name)),
        }  # fmt: skip
        whole = torch.ones(len(asked.asked), dtype=torch.bool)
        return {
            "val_loss": loss / max(targets, 1), "targets": int(targets),
            **{kind: self._paired(asked, own, sums, whole) for kind, sums in found.items()},
            **{group: self._by(asked, own, found, names[group], of[group]) for group in of},
        }  # fmt: skip

    def _by(
        self, asked: HeldOutSet, own: Tensor, found: dict[str, Tensor], names: Iterable[str], of: Sequence[str]
    ) -> dict[str, Any]:  # fmt: skip
        """Loss and differences of the samples of each name; `of`: of each sample its name."""
        rows = {}
        for name in names:
            mine = torch.tensor([name == its for its in of], dtype=torch.bool)
            rows[name] = {
                "loss_sum": float(own[mine, 0].sum()), "targets": int(own[mine, 1].sum()),
                **{kind: self._paired(asked, own, sums, mine) for kind, sums in found.items()},
            }  # fmt: skip
        return rows

    def _paired(self, asked: HeldOutSet, own_A2: Tensor, other_A2: Tensor, mine: Tensor) -> dict[str, Any] | None:
        keys = [a.record.key for a, m in zip(asked.asked, mine.tolist(), strict=True) if m]
        found = paired(own_A2[mine], other_A2[mine], keys)
        return None if found is None else vars(found)

    def _text_only(self, asked: HeldOutSet) -> Tensor:
        losses = self._told()["losses"]
        names = [_name(asked, a.corpus, a.record.key, a.variant) for a in asked.asked]
        return torch.tensor([losses.get(name, [0.0, 0.0]) for name in names], dtype=torch.float64).reshape(-1, 2)

    def _told(self) -> dict[str, Any]:
        path = self.run / "text_only.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {"losses": {}, "answers": {}}

    # -- answers in words -------------------------------------------------------------------------------------------

    def _answers(
        self, model: AudioLM, asked: HeldOutSet, questions: Sequence[Question], kind: str, rank: int, world: int,
        reduce: Reduce,
    ) -> list[Row]:  # fmt: skip
        """Greedy answers, shared over the ranks; packs do not depend on their number, so answers do not either."""
        found_AX = torch.zeros(len(questions), 3 + LONGEST, dtype=torch.float64)  # finish, seconds, length, ids
        for numbers, prompts in asked.prompts([q.asked for q in questions], kind, rank, world):
            found = generate(model, prompts, [asked.chat.im_end], LONGEST)
            for number, one in zip(numbers, found, strict=True):
                values = [FINISHED.index(one.finish), one.seconds, len(one.ids), *one.ids]
                found_AX[number, : len(values)] = torch.tensor(values, dtype=torch.float64)
        rows = []
        for (a, choices), (finish, seconds, length, *ids) in zip(questions, reduce(found_AX).tolist(), strict=True):
            output = asked.chat.decode([int(i) for i in ids[: int(length)]]) if finish else None
            rows.append(Row(
                _name(asked, a.corpus, a.record.key, a.variant), asked.corpora[a.corpus].card.task, a.question, choices,
                a.references, output, int(length), FINISHED[int(finish)], round(seconds, 3),
                f"{asked.corpora[a.corpus].card.name}/{a.record.key}",
            ))  # fmt: skip
        return rows

    def questions(self, asked: HeldOutSet, *, end: bool) -> list[Question]:
        """What a validation asks in words: a few questions, the same ones each time; before them, at the end, closed
        ones."""
        closed = asked.closed(self.answers) if end and self.answers else []
        taken = {(q.asked.corpus, q.asked.record.key, q.asked.variant) for q in closed}
        few = []
        for a in asked.open(self.few):
            choices = asked.choices(a.corpus).get(a.question, ()) if self.answers else ()
            if (a.corpus, a.record.key, a.variant) not in taken:
                few.append(Question(a, choices))
        return closed + few

    @torch.no_grad()
    def answer(
        self, model: AudioLM, step: int, rank: int, world: int, reduce: Reduce, *, end: bool
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Greedy answers in words, rows of answers.jsonl: of the stage's own mix, at the `end` of all sets. Beside the
        answer the set, corpus and key of its record, and, where it was asked before step 0, what the decoder alone
        said."""
        self._agree(rank)
        text_only = self._told()["answers"] if end else {}
        rows: list[dict[str, Any]] = []
        for asked in self.sets if end else self.sets[:1]:
            questions = self.questions(asked, end=end)
            answers = self._answers(model, asked, questions, OWN, rank, world, reduce)
            for (a, _), answer in zip(questions, answers, strict=True):
                row = {"step": step, **asdict(answer), "mix": asked.name}
                row |= {"corpus": asked.corpora[a.corpus].card.name, "key": a.record.key}
                rows.append(row | ({"text_only": text_only[answer.id]} if answer.id in text_only else {}))
        return rows


def _name(asked: HeldOutSet, corpus: int, key: str, variant: int) -> str:
    return f"{asked.name}/{asked.corpora[corpus].card.name}/{key}/{variant}"


# -- what is printed at the end --------------------------------------------------------------------------------------


def verdict(row: dict[str, Any]) -> list[str]:
    """The last row of a stage in words, with a warning for a stage that does not listen."""
    if "listening" not in row:  # a stage without clips
        return []
    heard, alike, text = (row.get(kind) for kind in ("listening", "alike", "text_only"))
    if heard is None:
        return ["WARNING: no listening test: no held-out question has another answer for another clip"]
    test = Paired(**heard)
    lines = [f"listening: with another clip the same answers cost {test} nats a target ({test.samples} samples)"]
    if alike:
        lines.append(f"  with a clip as long and alike (language, where the card says so): {Paired(**alike)}")
    if text:
        below = text["difference"] / (row["val_loss"] + text["difference"])
        lines.append(f"  the decoder alone, without any clip: {Paired(**text)}, so the stage is {below:.1%} below it")
    for name, corpus in row["corpora"].items():
        parts = [f"{label} {Paired(**corpus[kind])}" for kind, label in LABELS.items() if corpus.get(kind)]
        loss = corpus["loss_sum"] / max(corpus["targets"], 1)
        lines.append(f"    {name:24} loss {loss:.3f}   " + "   ".join(parts))
    if not test.sure:
        lines.append(
            f"WARNING: THIS STAGE DOES NOT LISTEN. {test} is below {SURE:g} standard errors: its answers do not hang "
            "on the audio, however far the loss fell"
        )
    elif text and not Paired(**text).sure:
        lines.append("WARNING: this stage answers no better than the decoder alone, without any clip")
    return lines


LABELS = {"listening": "other clip", "alike": "alike", "text_only": "text only"}


def answer_table(path: Path) -> list[str]:
    """Exact match of the closed questions that an answers.jsonl ends with, and the open answers.

    Beside it chance (as if the most frequent reference were always given) and the decoder alone.
    """
    rows = last_rows(read_metrics(path))
    groups = exact_match(rows)
    head = f"{'exact match of greedy answers':72}{'clips':>6}{'exact':>8}{'chance':>8}{'text only':>11}"
    lines = [head] if groups else []
    for g in groups:
        label = f"{g.mix}: {g.corpus}: {' / '.join(g.choices)}"
        label = label if len(label) < 71 else label[:67] + " ..."
        exact, text_only = ("-" if share is None else f"{share:.1%}" for share in (g.exact, g.text_only))
        lines.append(f"{label:72}{g.clips:6}{exact:>8}{g.chance:8.1%}{text_only:>11}")
    for row in [r for r in rows if not r["choices"]][:SHOWN]:
        lines += [row["prompt"], f"    reference  {row['references'][0]}", f"    answer     {row['output'] or ''}"]
    return lines
