"""What is asked for on the command line, and whether the run folder allows it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midasheng import config
from midasheng.config import ConfigError, Loaded, Stage
from midasheng.data.plan import differences
from midasheng.train.world import launched


@dataclass(frozen=True)
class Order:
    """One stage to run, as asked for on the command line."""

    loaded: Loaded
    runs: Path
    scale: str
    name: str
    start_from: str  # run name instead of the stage's own in `start: [{from: STAGE}]`; "" for the stage's own
    fresh: bool

    @property
    def stage(self) -> Stage:
        """The config."""
        return self.loaded.stage

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.runs / self.scale / self.name


def command_line(default: str, argv: Sequence[str] | None = None) -> Order:
    """Read a stage's command line; `default` is its config file. Raises ConfigError."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--scale", default="mini")
    parser.add_argument("--config", default=default)
    parser.add_argument("--name", default="")
    parser.add_argument("--from", dest="start_from", default="")
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    a = parser.parse_intermixed_args(argv)
    path = Path(a.config or default)
    loaded = config.load(path, a.scale, a.settings)
    if at := launched():  # the launcher has decided
        for name, value in (("devices", at.here), ("nodes", at.nodes)):
            asked = getattr(loaded.stage.hardware, name)
            if loaded.origin.get(f"hardware.{name}") == "command line" and asked != value:
                raise ConfigError(f"hardware.{name}={asked}: {at.size} processes were started, {at.here} on a node")
        started = [f"hardware.devices={at.here}", f"hardware.nodes={at.nodes}"]
        loaded = config.load(path, a.scale, [*a.settings, *started])
    return Order(loaded, Path(a.runs), a.scale, a.name or path.stem, a.start_from, a.fresh)


def require(good: bool, message: str) -> None:
    """A stage's contract. Raises ConfigError."""
    if not good:
        raise ConfigError(message)


def trains(stage: Stage, part: str) -> bool:
    """Does the stage train tensors of this part (audio_encoder, audio_projector, decoder) themselves, not by LoRA?"""
    return any(glob.split(".")[0] in (part, "*") for glob in stage.train)


def check_run_folder(order: Order, inputs: dict[str, Any]) -> str:
    """ "new", "unfinished" or "finished". Raises ConfigError when the folder holds a run with other settings."""
    folder = order.folder
    if not (folder / "config.yaml").is_file():
        return "new"
    before, now = config.saved(folder / "config.yaml"), config.binding(order.stage)
    new_plan = order.stage.data.on_change == "restart_plan"
    for name in sorted(set(now) | set(before) - config.free_keys()):
        if new_plan and (name.split(".")[0] in ("data", "batch") or name in ("run.length", "run.warmup", "run.seed")):
            continue
        if before.get(name) != now.get(name):
            raise ConfigError(
                f"{folder} holds a run with {name} = {json.dumps(before.get(name))}, this one has "
                f"{json.dumps(now.get(name))}; keep both with NAME=..., or write over it with FRESH=1"
            )
    was = json.loads((folder / "inputs.json").read_text(encoding="utf-8"))
    remedy = "train this stage again with FRESH=1, or keep both with NAME=..."
    changed = differences(was["plan"], inputs["plan"])
    if changed and not new_plan:
        raise ConfigError(
            f"{folder} was trained on other data: {changed}; {remedy}, or go on in a new order with "
            "data.on_change=restart_plan"
        )
    if was["parents"] != inputs["parents"]:
        other = next(p["from"] for p in [*inputs["parents"], *was["parents"]] if p not in was["parents"])
        raise ConfigError(f"{folder} started from {other} when its weights were others (trained again since); {remedy}")
    return "finished" if (folder / "weights" / "stage.json").is_file() else "unfinished"
