"""Experiment trackers are told what TensorBoard is, and none of them can end or stop a run."""

import json
import sqlite3
import sys
import threading

import pytest
from lightning.pytorch.loggers import Logger

from midasheng.config import ConfigError
from midasheng.train import trackers
from midasheng.train.meter import read_metrics
from midasheng.train.module import Stopped
from midasheng.train.trackers import Spectator
from tests.conftest import order_for, run_stage
from tests.train.test_resume import stop_after

SHORT = {"run__length": "4 steps", "log__val_every": 2}


class Told(Logger):
    """Remembers what it is told; at the call number `fails` it raises, at `hangs` it waits for `freed`."""

    name, version = "told", ""

    def __init__(self, fails: int = -1, hangs: int = -1) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []
        self.ended: list[str] = []
        self.fails, self.hangs, self.calls, self.freed = fails, hangs, 0, threading.Event()

    def log_hyperparams(self, *args, **kwargs) -> None: ...

    def log_metrics(self, metrics, step=None) -> None:
        self.calls += 1
        if self.calls == self.fails:
            raise ConnectionError("network is down\nand more")
        if self.calls == self.hangs:
            self.freed.wait(120)
        self.rows.append((step, metrics))

    def finalize(self, status: str) -> None:
        self.ended.append(status)


@pytest.fixture
def offered(monkeypatch):
    """A tracker under the name of wandb."""

    def offer(**more) -> Told:
        told = Told(**more)
        monkeypatch.setitem(sys.modules, "wandb", sys)  # it can be imported
        monkeypatch.setitem(trackers.OPEN, "wandb", lambda run, known, settings: (told, known or "run 1"))
        return told

    return offer


def test_a_tracker_is_told_every_scalar_of_a_run(tiny_data, tmp_path, offered):
    told = offered()
    folder = run_stage("text_decoder", tiny_data, tmp_path, log__trackers="[wandb]", **SHORT)
    losses = {step: row["train/loss"] for step, row in told.rows if "train/loss" in row}
    rows = read_metrics(folder / "metrics.jsonl")
    assert losses == {r["step"]: r["loss"] for r in rows if "loss" in r}
    validated = {step: row["val/val_loss"] for step, row in told.rows if "val/val_loss" in row}
    assert validated == {r["step"]: r["val_loss"] for r in rows if "val_loss" in r}
    assert any("speed/mfu" in row for _, row in told.rows)
    groups = {
        f"{k}_{n}" for k in ("train", "val") for n in ("corpus/tiny_asr", "task/asr", "language/en", "language/sp")
    }
    assert groups - {name for _, row in told.rows for name in row} == set()
    assert told.ended == ["success"]
    assert json.loads((folder / "trackers.json").read_text()) == {"wandb": "run 1"}


def test_a_tracker_that_fails_in_mid_run_is_said_once_and_ends_nothing(tiny_data, tmp_path, offered, capsys):
    told = offered(fails=3)
    run_stage("text_decoder", tiny_data, tmp_path, log__trackers="[wandb]", **SHORT)
    out = capsys.readouterr().out
    assert out.count("WARNING: wandb is told nothing more (ConnectionError: network is down); the run goes on") == 1
    assert (told.calls, told.ended) == (3, [])
    assert "text_decoder: 4 steps" in out


def test_a_tracker_that_hangs_holds_nothing_up(monkeypatch, capsys):
    monkeypatch.setattr(trackers, "ENDING_S", 0.2)
    told = Told(hangs=1)
    one = Spectator("wandb", told)
    for step in range(trackers.WAITING + 5):
        one.log_metrics({"loss": 1.0}, step)
    one.finalize("success")
    assert capsys.readouterr().out.count(f"({trackers.WAITING} calls wait for it)") == 1
    two = Spectator("mlflow", slow := Told(hangs=1))
    two.log_metrics({"loss": 1.0}, 1)
    two.finalize("success")
    assert "mlflow is told nothing more (it does not end within 0.2 s)" in capsys.readouterr().out
    told.freed.set()
    slow.freed.set()


def test_what_cannot_be_opened_is_told_before_a_new_run_and_ends_no_resume(tiny_data, tmp_path, monkeypatch, capsys):
    def refuses(*_):
        raise RuntimeError("no key")

    monkeypatch.setitem(sys.modules, "wandb", sys)
    monkeypatch.setitem(trackers.OPEN, "wandb", refuses)
    with pytest.raises(ConfigError, match=r"wandb cannot be opened \(RuntimeError: no key\); see to it, or leave it"):
        run_stage("text_decoder", tiny_data, tmp_path, log__trackers="[wandb]", **SHORT)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stopped):
            run_stage("text_decoder", tiny_data, tmp_path, **SHORT)
    run_stage("text_decoder", tiny_data, tmp_path, log__trackers="[wandb]", **SHORT)
    assert "WARNING: wandb cannot be opened (RuntimeError: no key)" in capsys.readouterr().out


def test_a_missing_package_is_named_before_anything_is_written(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match=r"log.trackers: trackio cannot be imported .*; pip install trackio"):
        run_stage("text_decoder", tiny_data, tmp_path, log__trackers="[trackio]")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match=r"'neptune'.* is not offered; write some of \[wandb, mlflow, trackio\]"):
        order_for("text_decoder", tiny_data, tmp_path, log__trackers="[neptune]")


def stopped_and_resumed(tiny, tmp_path, monkeypatch, name: str):
    """The folder of a run that a tracker was told of over a resume."""
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stopped):
            run_stage("text_decoder", tiny, tmp_path, log__trackers=f"[{name}]", **SHORT)
    return run_stage("text_decoder", tiny, tmp_path, log__trackers=f"[{name}]", **SHORT)


def losses_of(folder) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r}


def test_mlflow_itself(tiny_data, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # its databases need sqlalchemy
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    folder = stopped_and_resumed(tiny_data, tmp_path, monkeypatch, "mlflow")
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'midasheng'")
    (run,) = client.search_runs([experiment.experiment_id])  # one, over the resume
    assert run.info.run_id == json.loads((folder / "trackers.json").read_text())["mlflow"]
    assert {m.step: m.value for m in client.get_metric_history(run.info.run_id, "train/loss")} == losses_of(folder)
    assert (run.info.status, run.info.run_name, run.data.params["name"]) == (
        "FINISHED",
        "mini/text_decoder",
        "text_decoder",
    )


def test_wandb_itself(tiny_data, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = stopped_and_resumed(tiny_data, tmp_path, monkeypatch, "wandb")
    known = json.loads((folder / "trackers.json").read_text())["wandb"]
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert {f.name for f in files} == {f"run-{known}.wandb"}
    assert b"train/loss" in b"".join(f.read_bytes() for f in files)


def test_trackio_itself(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    folder = stopped_and_resumed(tiny_data, tmp_path, monkeypatch, "trackio")
    (file,) = (tmp_path / "trackio").glob("midasheng*.db")
    rows = sqlite3.connect(file).execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert {name for name, *_ in rows} == {json.loads((folder / "trackers.json").read_text())["trackio"]}
    told = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert {step: values["train/loss"] for step, values in told if "train/loss" in values} == losses_of(folder)
