"""Unbroken and interrupted runs are the same run, bit for bit; on two processes the same run as on one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from midasheng.train import fit as fit_room
from midasheng.train import order as order_room
from midasheng.train.meter import read_metrics
from midasheng.train.module import NotFinite, StageModule, Stopped
from tests.conftest import order_for, run_stage

ROOT = Path(__file__).parent.parent.parent


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """As if Ctrl-C were pressed while step `step` (from 0) runs."""
    training_step = StageModule.training_step

    def pressed(self, batch, batch_idx):
        if batch.step == step:
            self.stop.requested = True
        training_step(self, batch, batch_idx)

    monkeypatch.setattr(StageModule, "training_step", pressed)


def ledger(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "ledger" / "rank0.jsonl").read_text().splitlines()]


def same_run(one: Path, other: Path) -> None:
    assert read_metrics(one / "metrics.jsonl") == read_metrics(other / "metrics.jsonl")
    assert ledger(one) == ledger(other)
    for file in ("weights/model.safetensors", "weights/adapter/adapter_model.safetensors"):
        if (one / file).exists():
            a, b = load_file(one / file), load_file(other / file)
            assert a.keys() == b.keys()
            assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_equals_unbroken_bit_for_bit(tiny, tmp_path, monkeypatch, workers):
    """Two stops, the second between checkpoints and between rows; dropout, fresh encoder, an epoch's wrap."""
    more = {"run__length": "9 steps", "log__every": 2, "hardware__workers": workers, "data__val_clips": 3}
    run_stage("stage1_align", tiny, tmp_path / "whole", **more)
    unbroken = run_stage("stage2_pretrain", tiny, tmp_path / "whole", **more)
    run_stage("stage1_align", tiny, tmp_path / "parts", **more)
    for step in (2, 5):
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(Stopped):
                run_stage("stage2_pretrain", tiny, tmp_path / "parts", **more)
    parts = run_stage("stage2_pretrain", tiny, tmp_path / "parts", **more)
    same_run(unbroken, parts)
    assert [line["step"] for line in ledger(parts)] == list(range(9))


def test_killed_after_training_before_the_hand_off(tiny, tmp_path, monkeypatch):
    unbroken = run_stage("stage1_align", tiny, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(fit_room.weights, "hand_off", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_stage("stage1_align", tiny, tmp_path / "parts")
    same_run(unbroken, run_stage("stage1_align", tiny, tmp_path / "parts"))


def test_killed_without_warning_goes_back_to_the_last_checkpoint(tiny, tmp_path, monkeypatch):
    """Steps after the checkpoint are trained again and stand once in metrics and ledger."""
    unbroken = run_stage("stage1_align", tiny, tmp_path / "whole", run__length="6 steps", log__checkpoint_every=3)
    training_step = StageModule.training_step

    def dies(self, batch, batch_idx):
        if batch.step == 5:
            raise MemoryError
        training_step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(StageModule, "training_step", dies)
        with pytest.raises(MemoryError):
            run_stage("stage1_align", tiny, tmp_path / "parts", run__length="6 steps", log__checkpoint_every=3)
    parts = run_stage("stage1_align", tiny, tmp_path / "parts", run__length="6 steps", log__checkpoint_every=3)
    same_run(unbroken, parts)


def test_killed_before_the_first_checkpoint_begins_anew(tiny, tmp_path, monkeypatch):
    """Nothing of the first try stands twice."""
    unbroken = run_stage("stage1_align", tiny, tmp_path / "whole", data__max_audio_s=1.8)
    with monkeypatch.context() as patch:
        patch.setattr(StageModule, "training_step", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            run_stage("stage1_align", tiny, tmp_path / "parts", data__max_audio_s=1.8)
    parts = run_stage("stage1_align", tiny, tmp_path / "parts", data__max_audio_s=1.8)
    same_run(unbroken, parts)
    assert (parts / "skipped.jsonl").read_text() == (unbroken / "skipped.jsonl").read_text() != ""


def test_a_resume_in_another_plan_is_refused(tiny, tmp_path, monkeypatch):
    """The data changed under a run that was stopped: going on would repeat and skip samples."""
    stop_after(monkeypatch, 1)
    with pytest.raises(Stopped):
        run_stage("stage1_align", tiny, tmp_path)
    fingerprint = fit_room.Planner.fingerprint
    monkeypatch.setattr(fit_room.Planner, "fingerprint", lambda self: fingerprint(self) + "other")
    with pytest.raises(ValueError, match="other data"):
        run_stage("stage1_align", tiny, tmp_path)


def test_a_checkpoint_that_is_there_is_used(tiny, tmp_path, monkeypatch, capsys):
    """Others print "no checkpoint found, starting from step 0" with one present."""
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stopped):
            run_stage("stage1_align", tiny, tmp_path)
    run_stage("stage1_align", tiny, tmp_path)
    assert "resuming at step 2 of 4" in capsys.readouterr().out


def test_nan_stops_the_run_and_names_the_sample(tiny, tmp_path, monkeypatch):
    """NaN must not be averaged away in the curve, and the step must not be taken."""
    from midasheng.model.audio_lm import AudioLM

    forward = AudioLM.forward

    def poisoned(self, pack):
        loss_S = forward(self, pack)
        bad = torch.tensor([float("nan") if k == target else 0.0 for k in (*pack.keys, "tail")][: len(loss_S)])
        return loss_S + bad

    target = json.loads(
        (run_stage("stage1_align", tiny, tmp_path / "look") / "ledger/rank0.jsonl").read_text().splitlines()[1]
    )
    target = target["keys"][0].split("/")[1]
    monkeypatch.setattr(AudioLM, "forward", poisoned)
    with pytest.raises(NotFinite, match=target):
        run_stage("stage1_align", tiny, tmp_path / "run")


def command(stage: str, tiny, runs: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", f"stages.{stage}", "--runs", str(runs), *more, *tiny.settings()]


def test_ctrl_c_saves_says_how_to_go_on_and_goes_on(tiny, tmp_path):
    """The real signal to the real process, with loader workers; the same command goes on."""
    unbroken = run_stage("stage1_align", tiny, tmp_path / "whole", run__length="40 steps", hardware__workers=1)
    args = [*command("stage1_align", tiny, tmp_path / "parts"), "run.length=40 steps", "hardware.workers=1"]
    process = subprocess.Popen(
        args, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    metrics = tmp_path / "parts/mini/stage1_align/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"step": 3' in metrics.read_text()) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group, workers too
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "the same command goes on from there" in output
    done = torch.load(tmp_path / "parts/mini/stage1_align/checkpoints/last.ckpt", weights_only=True)["midasheng"][
        "step"
    ]
    assert 3 <= done < 40
    again = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"resuming at step {done} of 40" in again.stdout
    same_run(unbroken, tmp_path / "parts/mini/stage1_align")


def test_two_processes_are_the_same_run_as_one(tiny, tmp_path):
    """Plain DDP over gloo, three packs a step on two ranks (one pack is a dummy), fp32 AdamW, dropout keyed by pack:
    losses and weights within float noise, same samples; the mean of rank means would be far off."""
    more = {"batch__packs_per_step": 3, "optim__name": "adamw", "run__length": "4 steps"}
    run_stage("stage1_align", tiny, tmp_path / "one", **more)
    one = run_stage("stage2_pretrain", tiny, tmp_path / "one", **more)
    settings = [f"{k.replace('__', '.')}={v}" for k, v in more.items()]
    run_stage("stage1_align", tiny, tmp_path / "two", **more)
    args = [*command("stage2_pretrain", tiny, tmp_path / "two"), *settings, "hardware.devices=2"]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    two = tmp_path / "two/mini/stage2_pretrain"
    for a, b in zip(read_metrics(one / "metrics.jsonl"), read_metrics(two / "metrics.jsonl"), strict=True):
        assert a["step"] == b["step"]
        assert a["targets"] == b["targets"]
        assert a.get("loss", a.get("val_loss")) == pytest.approx(b.get("loss", b.get("val_loss")), rel=1e-5)
        assert a.get("grad_norm", 0) == pytest.approx(b.get("grad_norm", 0), rel=1e-4)
        for kind in ("listening", "alike", "text_only"):
            assert (a.get(kind) or {}) == pytest.approx(b.get(kind) or {}, rel=1e-3, abs=1e-4)
    trained = [json.loads(line) for r in (0, 1) for line in (two / f"ledger/rank{r}.jsonl").read_text().splitlines()]
    for line in ledger(one):
        both = [k for t in trained if t["step"] == line["step"] for k in t["keys"]]
        assert sorted(both) == sorted(line["keys"])
    a, b = load_file(one / "weights/model.safetensors"), load_file(two / "weights/model.safetensors")
    assert max(float((a[n].float() - b[n].float()).abs().max()) for n in a) < 1e-4


def test_world_size_two_resumes_a_run_of_one(tiny, tmp_path, monkeypatch):
    """Another number of processes goes on with exactly the same samples."""
    more = {"optim__name": "adamw"}
    one = run_stage("stage1_align", tiny, tmp_path / "one", **more)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stopped):
            run_stage("stage1_align", tiny, tmp_path / "two", **more)
    args = [*command("stage1_align", tiny, tmp_path / "two"), "optim.name=adamw", "hardware.devices=2"]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    two = tmp_path / "two/mini/stage1_align"
    for a, b in zip(read_metrics(one / "metrics.jsonl"), read_metrics(two / "metrics.jsonl"), strict=True):
        assert (a["step"], a["targets"]) == (b["step"], b["targets"])
        assert a.get("loss", a.get("val_loss")) == pytest.approx(b.get("loss", b.get("val_loss")), rel=1e-5)


def test_order_for_is_what_the_command_line_gives(tiny, tmp_path):
    """The helper of these tests reads configs as the command does."""
    by_hand = order_for("stage1_align", tiny, tmp_path)
    by_command = order_room.command_line(
        str(ROOT / "configs/stage1_align.yaml"), ["--runs", str(tmp_path), *tiny.settings()]
    )
    assert by_hand.stage == by_command.stage
    assert by_hand.folder == by_command.folder
