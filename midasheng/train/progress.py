"""What a person sees and does while a stage trains: the progress line, Ctrl-C, and the summary at the end."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from tqdm import tqdm

from midasheng.train.listening import answer_table, verdict
from midasheng.train.meter import clock, read_metrics
from midasheng.train.module import StageModule, StopRequest
from midasheng.train.order import is_first


@contextmanager
def stoppable(stop: StopRequest) -> Iterator[None]:
    """Ctrl-C or SIGTERM asks for a stop between steps; a second one ends the process at once."""

    def on_signal(number: int, _: object) -> None:
        if is_first():
            print("\nstopping at the end of a step (again: at once, back to the last checkpoint)", flush=True)
        stop.requested = True
        signal.signal(number, signal.SIG_DFL)

    before = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class ProgressLine(L.Callback):
    """One line that moves: steps, loss of the last row, validation loss; a plain line a row without a terminal."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin at the step of a resume."""
        module = _stage_module(pl_module)
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=module.course.steps, initial=module.done, desc=module.stage.name, unit="step", mininterval=0.5,
            disable=not (trainer.is_global_zero and self.terminal), dynamic_ncols=True,
        )  # fmt: skip
        self.before: dict[str, float] = {}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """What was measured before the first step."""
        self._show(trainer, _stage_module(pl_module))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """One step on."""
        self._show(trainer, _stage_module(pl_module))

    def _show(self, trainer: L.Trainer, module: StageModule) -> None:
        new = {k: v for k, v in module.shown.items() if self.before.get(k) != v}
        if self.terminal:
            self.bar.set_postfix({k: f"{v:.4g}" for k, v in module.shown.items()}, refresh=False)
            self.bar.update(module.done - self.bar.n)
        elif new and trainer.is_global_zero:
            shown = "  ".join(f"{k} {v:.4g}" for k, v in sorted(new.items()))
            print(f"{module.stage.name} step {module.done}/{module.course.steps}  {shown}", flush=True)
        self.before = dict(module.shown)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the line as it is, also after a stop."""
        if hasattr(self, "bar"):
            self.bar.close()


def _stage_module(module: L.LightningModule) -> StageModule:
    assert isinstance(module, StageModule)
    return module


def ending(folder: Path) -> list[str]:
    """What a finished run has to say: steps, time, losses, whether it listens, answers in words."""
    record = json.loads((folder / "weights" / "stage.json").read_text(encoding="utf-8"))
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "val_loss" in row]
    lines = [f"{record['stage']}: {record['steps']} steps in {clock(record['seconds'])}"]
    if rows:
        first, last = rows[0], rows[-1]
        fall = last["val_loss"] / first["val_loss"] - 1
        lines[0] += f", validation loss {first['val_loss']:.3f} -> {last['val_loss']:.3f} ({fall:+.1%})"
        lines += verdict(last)
        for mix, row in last.get("also", {}).items():
            before = first.get("also", {}).get(mix)  # data.also may change with a resume
            change = f"{before['val_loss']:.3f} -> {row['val_loss']:.3f}" if before else f"{row['val_loss']:.3f}"
            lines.append(f"also looked at, mix {mix}: validation loss {change}")
    answers = folder / "answers.jsonl"
    return lines + (answer_table(answers) if answers.is_file() else [])
