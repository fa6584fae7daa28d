"""Loss curves of all stages of a scale, as one picture and one small table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from midasheng.config import UserError, saved
from midasheng.train.meter import read_metrics


@dataclass(frozen=True)
class Curve:
    """The losses of one run: (steps finished, loss per target)."""

    name: str
    stage: str
    train: tuple[tuple[int, float], ...]
    val: tuple[tuple[int, float], ...]

    @property
    def fall(self) -> float:
        """How far validation loss fell from its start, as a share of the start; 0 without validation."""
        return 1 - self.val[-1][1] / self.val[0][1] if self.val else 0.0


def read_curves(folder: Path) -> list[Curve]:
    """Curves of every run below `folder` (runs/<scale>), by stage. Raises UserError when there is none."""
    curves = []
    for metrics in sorted(folder.glob("*/metrics.jsonl")):
        rows = read_metrics(metrics)
        stage = saved(metrics.parent / "config.yaml")["name"]
        train = tuple((r["step"], r["loss"]) for r in rows if "loss" in r)
        val = tuple((r["step"], r["val_loss"]) for r in rows if "val_loss" in r)
        if train or val:
            curves.append(Curve(metrics.parent.name, stage, train, val))
    if not curves:
        raise UserError(f"no run below {folder} has a metrics.jsonl yet; run `make stage1`")
    return sorted(curves, key=lambda c: (c.stage, c.name))


def table(curves: list[Curve]) -> str:
    """One line a run: steps, validation loss at the start and at the end, its fall."""
    lines = [f"{'run':28}{'stage':18}{'steps':>7}{'train':>9}{'val start':>11}{'val end':>9}{'fall':>8}"]
    for c in curves:
        steps = max(step for step, _ in (*c.train, *c.val))
        train = f"{c.train[-1][1]:.3f}" if c.train else "-"
        start, end = (f"{c.val[i][1]:.3f}" if c.val else "-" for i in (0, -1))
        lines.append(f"{c.name:28}{c.stage:18}{steps:7}{train:>9}{start:>11}{end:>9}{100 * c.fall:7.1f}%")
    return "\n".join(lines)


def draw(curves: list[Curve], path: Path) -> None:
    """One panel a stage: training loss thin, validation loss with dots; runs of one stage share a panel."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = sorted({c.stage for c in curves})
    size = (4.6 * len(stages), 3.6)
    figure, axes = pyplot.subplots(1, len(stages), figsize=size, squeeze=False, layout="constrained")
    for axis, stage in zip(axes[0], stages, strict=True):
        for number, curve in enumerate(c for c in curves if c.stage == stage):
            color = f"C{number}"
            if curve.train:
                steps, losses = zip(*curve.train, strict=True)
                axis.plot(steps, losses, color=color, alpha=0.45, linewidth=1, label=f"{curve.name}, train")
            if curve.val:
                steps, losses = zip(*curve.val, strict=True)
                axis.plot(steps, losses, color=color, marker="o", markersize=3, label=f"{curve.name}, val")
        axis.set(title=stage, xlabel="steps", ylabel="loss per target")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
