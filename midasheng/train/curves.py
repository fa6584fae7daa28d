"""Loss and listening curves of all stages of a scale: a picture for papers, its numbers, and one small table."""

from __future__ import annotations

import csv
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midasheng.config import UserError, saved
from midasheng.train.listening import Paired
from midasheng.train.meter import clock
from midasheng.train.run_folder import Grown, read_json


@dataclass(frozen=True)
class Curve:
    """The curves of one run: (steps finished, loss per target), (steps finished, listening difference)."""

    name: str
    stage: str
    train: tuple[tuple[int, float], ...]
    val: tuple[tuple[int, float], ...]
    listening: tuple[tuple[int, Paired], ...]
    audio_s: tuple[tuple[int, float], ...]  # (steps finished, seconds of audio since the last row)
    text_only: float | None  # validation loss of the decoder alone, without clips
    seconds: float | None  # of training; None while it runs

    @property
    def fall(self) -> float:
        """How far validation loss fell from its start, as a share of the start; 0 without validation."""
        return 1 - self.val[-1][1] / self.val[0][1] if self.val else 0.0


def read_curves(folder: Path) -> list[Curve]:
    """Curves of every run below `folder` (runs/<scale>), by stage. Raises UserError when there is none."""
    curves = []
    for metrics in sorted(folder.glob("*/metrics.jsonl")):
        file = Grown(metrics)
        rows = [r for r in file.rows() if isinstance(r.get("step"), int)]
        stage = saved(metrics.parent / "config.yaml")["name"]
        val_rows = [r for r in rows if "val_loss" in r]
        alone = [r["val_loss"] + r["text_only"]["difference"] for r in val_rows if r.get("text_only")]
        curve = Curve(
            metrics.parent.name,
            stage,
            train=tuple((r["step"], r["loss"]) for r in rows if "loss" in r),
            val=tuple((r["step"], r["val_loss"]) for r in val_rows),
            audio_s=tuple((r["step"], r.get("audio_s", 0.0)) for r in rows if "loss" in r),
            listening=tuple((r["step"], Paired(**r["listening"])) for r in val_rows if r.get("listening")),
            text_only=alone[-1] if alone else None,
            seconds=read_json(metrics.parent / "weights" / "stage.json").get("seconds"),
        )
        if curve.train or curve.val:
            curves.append(curve)
    if not curves:
        raise UserError(f"no run below {folder} has a metrics.jsonl yet; run `make stage1`")
    return sorted(curves, key=lambda c: (c.stage, c.name))


def table(curves: list[Curve]) -> str:
    """One line a run: steps, validation loss from start to end, the decoder's alone, listening difference, time."""
    width = max(len(c.name) for c in curves) + 2
    head = f"{'run':{width}}{'stage':18}{'steps':>6}   {'validation loss':18}{'text only':>10}   "
    lines = [head + f"{'listening difference':24}{'time':>12}"]
    for c in curves:
        steps = max(step for step, _ in (*c.train, *c.val))
        loss = f"{c.val[0][1]:.3f} -> {c.val[-1][1]:.3f}" if c.val else "-"
        alone = "-" if c.text_only is None else f"{c.text_only:.3f}"
        heard = f"{c.listening[-1][1]}{'' if c.listening[-1][1].sure else ' DEAF'}" if c.listening else "-"
        time = "unfinished" if c.seconds is None else clock(c.seconds)
        lines.append(f"{c.name:{width}}{c.stage:18}{steps:6}   {loss:18}{alone:>10}   {heard:24}{time:>12}")
    return "\n".join(lines)


def write_csv(curves: list[Curve], path: Path) -> None:
    """Every number of the picture: a line for each run and step that has a row of training or of validation."""
    head = ("run", "stage", "step", "audio_h", "loss", "val_loss", "listening", "listening_se", "text_only")
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(head)
        for c in curves:
            loss, val, listening = dict(c.train), dict(c.val), dict(c.listening)
            heard_s = dict(zip((s for s, _ in c.audio_s), itertools.accumulate(a for _, a in c.audio_s), strict=True))
            audio_s = 0.0
            for step in sorted({*loss, *val}):
                audio_s = heard_s.get(step, audio_s)
                heard = listening.get(step)
                out.writerow((
                    c.name, c.stage, step, f"{audio_s / 3600:.6g}", loss.get(step), val.get(step),
                    heard.difference if heard else None, heard.se if heard else None,
                    c.text_only if step == max(val, default=None) else None,
                ))  # fmt: skip


PAPER: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 10, "legend.fontsize": 7.5, "legend.frameon": False, "axes.spines.top": False,
    "axes.spines.right": False, "svg.fonttype": "none", "svg.hashsalt": "curves",
}  # fmt: skip
# Okabe and Ito's colours, told apart by everybody; black is the zero line's
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def draw(curves: list[Curve], *paths: Path) -> None:
    """A column a stage. Above: training loss thin, validation loss with dots, the decoder alone as a line. Below: the
    listening difference, with bars of 3 standard errors. Runs of one stage share a column. Text in an SVG stays text.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    stages = sorted({c.stage for c in curves})
    with matplotlib.rc_context(PAPER):
        figure, axes = pyplot.subplots(
            2, len(stages), figsize=(3.4 * len(stages), 5.2), squeeze=False, sharex="col", layout="constrained",
            height_ratios=(3, 2),
        )  # fmt: skip
        for (above, below), stage in zip(axes.T, stages, strict=True):
            for number, curve in enumerate(c for c in curves if c.stage == stage):
                _draw_one(curve, above, below, COLORS[number % len(COLORS)])
            above.set(title=stage, ylabel="loss (nats per target)")
            below.set(xlabel="steps", ylabel="listening difference")
            below.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
            below.axhline(0, color="black", linewidth=0.8)
            # below, where it hides no curve
            below.legend(*above.get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, -0.32))
            for axis in (above, below):
                axis.grid(alpha=0.3, linewidth=0.5)
        for path in paths:
            # without the date of the day, so that the same curves are the same file
            figure.savefig(path, dpi=300, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)


def _draw_one(curve: Curve, above: Any, below: Any, color: str) -> None:
    if curve.train:
        label = f"{curve.name}, train"
        above.plot(*zip(*curve.train, strict=True), color=color, alpha=0.45, linewidth=0.8, label=label)
    if curve.val:
        above.plot(
            *zip(*curve.val, strict=True), color=color, marker="o", markersize=3, linewidth=1.3,
            label=f"{curve.name}, validation",
        )  # fmt: skip
    if curve.text_only is not None:
        above.axhline(curve.text_only, color=color, linestyle=":", linewidth=1.2, label=f"{curve.name}, decoder alone")
    if curve.listening:
        steps, heard = zip(*curve.listening, strict=True)
        bars = [3 * h.se for h in heard]
        below.errorbar(steps, [h.difference for h in heard], bars, color=color, marker="o", markersize=3, capsize=2)
