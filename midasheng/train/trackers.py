"""Experiment trackers beside TensorBoard, through Lightning's loggers: asked for by log.trackers, imported only then.

A tracker is a spectator: its calls are made in a thread of its own, in their order, and one that fails or hangs is said
once and asked nothing more. All that it is told stands in the run folder too.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import threading
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from lightning.pytorch.loggers import Logger

from midasheng.config import ConfigError

PROJECT = "midasheng"  # where the tracker's own environment variable names none
WAITING = 1_000  # calls that may wait for a slow one
ENDING_S = 60.0  # that the end of a run waits for it
Call = Callable[[Logger], None]


def check(names: Sequence[str]) -> None:
    """Are their packages there? Raises ConfigError with what to install."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"log.trackers: {name} cannot be imported ({error}); pip install {name}") from None


def open_trackers(names: Sequence[str], run: Path, settings: Mapping[str, Any], *, resumed: bool) -> list[Logger]:
    """A logger each. What a run is called there is kept in trackers.json, so that a resume goes on with it. One that
    cannot be opened is said; before a new run it raises ConfigError."""
    path = run / "trackers.json"
    known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found: list[Logger] = []
    for name in names:
        try:
            logger, known[name] = OPEN[name](run, known.get(name, ""), settings)
        except Exception as error:  # each raises its own
            why = f"{name} cannot be opened ({_first_line(error)})"
            if not resumed:
                raise ConfigError(f"log.trackers: {why}; see to it, or leave it out") from None
            print(f"WARNING: {why} and is told nothing; the run goes on", flush=True)
            continue
        path.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        found.append(Spectator(name, logger))
    return found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


class Spectator(Logger):
    """Hands what is logged to `logger` in a thread of its own: training never waits for it, until the end."""

    def __init__(self, name: str, logger: Logger) -> None:
        super().__init__()
        self._name, self._logger = name, logger
        self._calls: queue.Queue[Call | None] = queue.Queue(WAITING)
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        """The tracker."""
        return self._name

    @property
    def version(self) -> str:
        """None."""
        return ""

    def _work(self) -> None:
        try:
            while (call := self._calls.get()) is not None:
                call(self._logger)
        except Exception as error:  # whatever it raises, the run is not about it
            self._lose(_first_line(error))

    def _lose(self, why: str) -> None:
        if not self._lost.is_set():
            self._lost.set()
            print(f"WARNING: {self._name} is told nothing more ({why}); the run goes on", flush=True)

    def _tell(self, call: Call) -> None:
        if not self._lost.is_set():
            try:
                self._calls.put_nowait(call)
            except queue.Full:
                self._lose(f"{WAITING} calls wait for it")

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Some values of a step."""
        self._tell(lambda logger: logger.log_metrics(metrics, step))

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: it knows the settings since it was opened."""

    def finalize(self, status: str) -> None:
        """The end of a run, "success" or "failed": waits a while for what is on its way."""
        if self._lost.is_set() or not self._thread.is_alive():
            return
        self._tell(lambda logger: logger.finalize(status))
        with contextlib.suppress(queue.Full):
            self._calls.put(None, timeout=ENDING_S)
        self._thread.join(ENDING_S)
        if self._thread.is_alive():
            self._lose(f"it does not end within {ENDING_S:g} s")


# -- each of them ------------------------------------------------------------------------------------------------------


def _wandb(run: Path, known: str, settings: Mapping[str, Any]) -> tuple[Logger, str]:
    from lightning.pytorch.loggers import WandbLogger

    class Wandb(WandbLogger):
        """Ends its run with ours, not with the process."""

        def finalize(self, status: str) -> None:
            super().finalize(status)
            self.experiment.finish(exit_code=int(status != "success"))

    known = known or uuid4().hex[:8]
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    made = Wandb(name=_called(run), id=known, project=project, save_dir=run)
    made.log_hyperparams(dict(settings))
    return made, known


def _mlflow(run: Path, known: str, settings: Mapping[str, Any]) -> tuple[Logger, str]:
    from lightning.pytorch.loggers import MLFlowLogger

    # where none is named, what `mlflow ui --backend-store-uri` opens, beside the runs
    where = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.parent.resolve() / 'mlflow.db'}"
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    made = MLFlowLogger(experiment, run_name=_called(run), tracking_uri=where, run_id=known or None)
    if not known:  # a value that is told twice must be the same
        made.log_hyperparams(dict(settings))
    return made, str(made.run_id)


class _Trackio(Logger):
    """Lightning has none for it. `run`: what trackio.init gave."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.run = run

    @property
    def name(self) -> str:
        """The tracker."""
        return "trackio"

    @property
    def version(self) -> str:
        """The run's name."""
        return str(self.run.name)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: init took them."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Some values of a step."""
        self.run.log(dict(metrics), step=step)

    def finalize(self, status: str) -> None:
        """Sends what is left."""
        self.run.finish()


def _trackio(run: Path, known: str, settings: Mapping[str, Any]) -> tuple[Logger, str]:
    import trackio

    known = known or f"{_called(run)} {uuid4().hex[:8]}"  # there a run is known by its name
    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    return _Trackio(trackio.init(project, name=known, config=dict(settings), resume="allow", embed=False)), known


def _called(run: Path) -> str:
    return f"{run.parent.name}/{run.name}"


OPEN = {"wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio}
