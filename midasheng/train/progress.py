"""What a person sees while a stage trains: the progress line, and the summary at the end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from tqdm import tqdm

from midasheng.train.listening import answer_table, verdict
from midasheng.train.meter import clock, read_metrics
from midasheng.train.module import StageModule

SAID = (  # values of a row -> how they are said; what comes first is seen in a narrow terminal too
    (("loss",), "loss {:.3f}"),
    (("skipped",), "STEPS SKIPPED {:.0f}"),
    (("val_loss",), "val {:.3f}"),
    (("listening",), "listening {:+.3f}"),
    (("validation_s", "answers_s"), "validated in {:.1f} s, {:.1f} of it for answers"),
    (("audio_h_per_device_h",), "{:.3g} audio-h/h"),
    (("mfu",), "MFU {:.1%}"),
    (("decoder_padding", "encoder_padding"), "padding {:.1%}/{:.1%}"),
    (("waiting",), "wait {:.1%}"),
)
VALIDATION = ("val_loss", "listening", "validation_s", "answers_s")


def words(values: Mapping[str, float], devices: int = 1) -> list[str]:
    """The values of metrics.jsonl and speed.jsonl that a line has room for, each with its name or unit."""
    known = [(names, form) for names, form in SAID if all(name in values for name in names)]
    said = [form.format(*(values[name] for name in names)) for names, form in known]
    return [w + " a device" if devices > 1 and w.endswith("audio-h/h") else w for w in said]


class ProgressLine(L.Callback):
    """One line that moves: steps, time left, loss, validation loss, audio-hours an hour, MFU, padding of slots/frames,
    wait; where it is not a terminal a plain line a row."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin at the step of a resume."""
        module = _stage_module(pl_module)
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=module.course.steps, initial=module.done, desc=module.stage.name, mininterval=0.5,
            disable=not (trainer.is_global_zero and self.terminal), dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}% |{bar:6}| {n_fmt}/{total_fmt}{postfix}",
        )  # fmt: skip
        self.before: dict[str, float] = {}
        self.first, self.since = module.done, 0.0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """What was measured before the first step; the clock runs from here."""
        self.since = self.since or time.monotonic()
        self._show(trainer, _stage_module(pl_module))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """One step on."""
        self._show(trainer, _stage_module(pl_module))

    def left(self, done: int, steps: int) -> list[str]:
        """The time left, as the steps of this process went, validation inside; nothing before the first."""
        if done == self.first:
            return []
        return [f"{clock((time.monotonic() - self.since) / (done - self.first) * (steps - done))} left"]

    def _show(self, trainer: L.Trainer, module: StageModule) -> None:
        shown, steps = module.shown, module.course.steps
        new = {k for k, v in shown.items() if str(self.before.get(k)) != str(v)}  # NaN is not new each time
        if self.terminal:
            brief = {k: v for k, v in shown.items() if k not in VALIDATION[1:]}
            line = self.left(module.done, steps) + words(brief, trainer.world_size)
            self.bar.set_postfix_str(", ".join(line), refresh=False)
            self.bar.update(module.done - self.bar.n)
        elif new and trainer.is_global_zero:
            validated, trained = new & {*VALIDATION}, new - {*VALIDATION}
            rows = {k: v for k, v in shown.items() if (validated if k in VALIDATION else trained)}
            line = words(rows, trainer.world_size) + self.left(module.done, steps)
            print(f"{module.stage.name} step {module.done}/{steps}  {'  '.join(line)}", flush=True)
        self.before = dict(shown)

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
    if skipped := record.get("steps_skipped"):
        lines.append(f"{skipped} steps were NOT TAKEN: loss or gradient was not finite, or jumped (events.jsonl)")
    lines += speed(folder)
    if rows:
        lines += verdict(last)
        for mix, row in last.get("also", {}).items():
            before = first.get("also", {}).get(mix)  # data.also may change with a resume
            change = f"{before['val_loss']:.3f} -> {row['val_loss']:.3f}" if before else f"{row['val_loss']:.3f}"
            lines.append(f"also looked at, mix {mix}: validation loss {change}")
    answers = folder / "answers.jsonl"
    return lines + (answer_table(answers) if answers.is_file() else [])


def speed(folder: Path) -> list[str]:
    """Audio heard and how fast, over the whole run: each row of speed.jsonl counts by what it stands for."""
    path = folder / "speed.jsonl"
    all_rows = read_metrics(path) if path.is_file() else []
    rows, validations = ([r for r in all_rows if name in r] for name in ("seconds", "validation_s"))
    seconds = sum(r["seconds"] for r in rows)
    if not seconds:
        return []
    heard = sum(r.get("audio_s", 0.0) for r in read_metrics(folder / "metrics.jsonl")) / 3600

    def over(name: str) -> float:
        return float(sum(r[name] * r["seconds"] for r in rows) / seconds)

    def padding(useful: str, padded: str) -> float:
        there = [(r[useful] * r["seconds"], r[padded]) for r in rows]
        computed = sum(n / (1 - share) for n, share in there if share < 1)
        return 1 - sum(n for n, _ in there) / computed if computed else 0.0

    took, answered = (sum(r[name] for r in validations) for name in ("validation_s", "answers_s"))
    looked = [
        f"besides, {len(validations)} validations took {clock(took)}, {clock(answered)} of it for answers in words"
    ]
    slots, n_frames = (
        padding("slots_per_s", "decoder_padding"), padding("audio_h_per_device_h", "encoder_padding")
    )  # fmt: skip
    return [
        f"{heard:.2f} audio-hours trained on; on a device {over('audio_h_per_device_h'):.3g} audio-hours an hour, MFU "
        f"{over('mfu'):.1%}; padding {slots:.1%} of the slots, {n_frames:.1%} of the frames; {over('waiting'):.1%} of "
        "the time waiting for data",
        *(looked if validations else []),
    ]
