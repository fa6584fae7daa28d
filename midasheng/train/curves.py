"""Loss and listening curves of all stages of a scale, as one picture and one small table."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from midasheng.config import UserError, saved
from midasheng.train.listening import Paired
from midasheng.train.meter import clock, read_metrics


@dataclass(frozen=True)
class Curve:
    """The curves of one run: (steps finished, loss per target), (steps finished, listening difference)."""

    name: str
    stage: str
    train: tuple[tuple[int, float], ...]
    val: tuple[tuple[int, float], ...]
    listening: tuple[tuple[int, Paired], ...]
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
        rows = read_metrics(metrics)
        stage, done = saved(metrics.parent / "config.yaml")["name"], metrics.parent / "weights" / "stage.json"
        val_rows = [r for r in rows if "val_loss" in r]
        alone = [r["val_loss"] + r["text_only"]["difference"] for r in val_rows if r.get("text_only")]
        curve = Curve(
            metrics.parent.name,
            stage,
            train=tuple((r["step"], r["loss"]) for r in rows if "loss" in r),
            val=tuple((r["step"], r["val_loss"]) for r in val_rows),
            listening=tuple((r["step"], Paired(**r["listening"])) for r in val_rows if r.get("listening")),
            text_only=alone[-1] if alone else None,
            seconds=json.loads(done.read_text(encoding="utf-8"))["seconds"] if done.is_file() else None,
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


def draw(curves: list[Curve], path: Path) -> None:
    """A column a stage. Above: training loss thin, validation loss with dots, the decoder alone as a line. Below: the
    listening difference, with bars of 3 standard errors. Runs of one stage share a column."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = sorted({c.stage for c in curves})
    figure, axes = pyplot.subplots(
        2, len(stages), figsize=(4.6 * len(stages), 5.6), squeeze=False, sharex="col", layout="constrained",
        height_ratios=(3, 2),
    )  # fmt: skip
    for (above, below), stage in zip(axes.T, stages, strict=True):
        for number, curve in enumerate(c for c in curves if c.stage == stage):
            color = f"C{number}"
            if curve.train:
                above.plot(*zip(*curve.train, strict=True), color=color, alpha=0.45, linewidth=1, label="train")
            if curve.val:
                label = f"{curve.name}, validation"
                above.plot(*zip(*curve.val, strict=True), color=color, marker="o", markersize=3, label=label)
            if curve.text_only is not None:
                above.axhline(curve.text_only, color=color, linestyle=":", linewidth=1.2, label="decoder alone")
            if curve.listening:
                steps, heard = zip(*curve.listening, strict=True)
                bars = [3 * h.se for h in heard]
                below.errorbar(
                    steps, [h.difference for h in heard], bars, color=color, marker="o", markersize=3, capsize=2
                )
        above.set(title=stage, ylabel="loss per target")
        below.set(xlabel="steps", ylabel="listening difference")
        below.axhline(0, color="black", linewidth=0.8)
        above.legend(fontsize=8)
        for axis in (above, below):
            axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
