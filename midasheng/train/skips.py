"""Steps that are not taken, because loss or gradient is not finite or the gradient jumps: which, and how many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from midasheng.config import Optim, UserError
from midasheng.sample import Pack

NOT_FINITE, SPIKE = "not finite", "spike"  # why a step is not taken
RECENT = 100  # steps whose gradient norms a spike is held against


class NotFinite(UserError):
    """Too many steps in a row could not be taken; the message says how to find out why."""


class Skips:
    """Counts what is not taken. Every rank asks with the same two numbers, which are sums over all ranks, so that every
    rank gets the same answer; what is counted travels in the checkpoint."""

    def __init__(self, optim: Optim) -> None:
        self.most, self.spike = optim.max_skips, optim.spike
        self.total = self.in_a_row = 0
        self._since_row = self._not_finite_since_row = 0
        self._norms: list[float] = []  # of the last RECENT steps that were finite, taken or not

    def because(self, *, finite: bool, norm: float) -> str:
        """Why this step is not to be taken, or "" where it is. `norm`: of the gradient, before clipping."""
        found = "" if finite else NOT_FINITE
        if finite and self.spike:
            # spikes are among the norms: where the gradient has become larger for good, it is no spike before long
            if len(self._norms) == RECENT and norm > self.spike * median(self._norms):
                found = SPIKE
            self._norms = [*self._norms, norm][-RECENT:]
        self.in_a_row = self.in_a_row + 1 if found else 0
        self.total += bool(found)
        self._since_row += bool(found)
        self._not_finite_since_row += found == NOT_FINITE
        return found

    @property
    def too_many(self) -> bool:
        """Is it time to stop?"""
        return self.in_a_row >= self.most

    def row(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row of metrics.jsonl with how many of its steps were not taken. Where one of them was not finite the loss
        is NaN, so that a curve shows it; the sums of corpora are of what was taken. The next row begins."""
        loss = {"loss": math.nan} if self._not_finite_since_row else {}
        found = row | loss | {"skipped": self._since_row}
        self._since_row = self._not_finite_since_row = 0
        return found

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "total": self.total, "in_a_row": self.in_a_row, "norms": list(self._norms),
            "since_row": [self._since_row, self._not_finite_since_row],
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        self.total, self.in_a_row, self._norms = state["total"], state["in_a_row"], list(state["norms"])
        self._since_row, self._not_finite_since_row = state["since_row"]


def references(
    numbers: Sequence[int], packs: Sequence[Pack], losses: Sequence[Sequence[float]]
) -> list[dict[str, Any]]:
    """What a rank's packs held, for events.jsonl; `losses`: of each pack's segments. In `not_finite` stand the samples
    whose own loss is not; none where only the gradient is not finite. Packs without samples are left out."""
    found = []
    for number, pack, loss_S in zip(numbers, packs, losses, strict=True):
        keys = [f"{corpus}/{key}" for corpus, key in zip(pack.corpora, pack.keys, strict=True)]
        wrong = [key for key, loss in zip(keys, loss_S, strict=False) if not math.isfinite(loss)]
        if keys:
            unique = {"keys": list(dict.fromkeys(keys)), "not_finite": list(dict.fromkeys(wrong))}
            found.append({"pack": number, **unique})
    return found
