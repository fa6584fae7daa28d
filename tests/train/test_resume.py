"""Unbroken and interrupted runs are the same run, bit for bit; on two processes the same run as on one."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from midasheng.config import ConfigError
from midasheng.data import plan as plan_room
from midasheng.data.ledger import frames_of, read_ledger
from midasheng.data.loader import steps_ahead
from midasheng.data.room import read_data
from midasheng.train import checkpoint
from midasheng.train import fit as fit_room
from midasheng.train import order as order_room
from midasheng.train.meter import add_event, read_metrics
from midasheng.train.module import StageModule, Stopped
from tests.conftest import (
    Row,
    Tiny,
    flac,
    ledger_rows,
    order_for,
    record,
    run_stage,
    tone,
    write_shard,
)

ROOT = Path(__file__).parent.parent.parent


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """As if Ctrl-C were pressed while step `step` (from 0) runs."""
    training_step = StageModule.training_step

    def pressed(self, batch, batch_idx):
        if batch.step == step:
            self.stop.requested = True
        training_step(self, batch, batch_idx)

    monkeypatch.setattr(StageModule, "training_step", pressed)


def stopped_run(tiny: Tiny, runs: Path, monkeypatch: pytest.MonkeyPatch, step: int, **more: object) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(Stopped):
            run_stage("stage1_align", tiny, runs, **more)


def ledger(folder: Path) -> list[tuple[int, int, list[list[int]]]]:
    """(step, checksum of the keys, rows in their order) of a run of one process, whatever frames they lie in."""
    found = []
    for steps in read_ledger(folder):
        parts = np.split(steps.rows, np.cumsum(steps.samples)[:-1])
        found += zip(steps.step.tolist(), steps.checksum.tolist(), (p.tolist() for p in parts), strict=True)
    return found


def said(run: Path) -> list[dict]:
    """Rows of answers.jsonl, but for how long an answer took."""
    path = run / "answers.jsonl"
    return [row | {"seconds": None} for row in read_metrics(path)] if path.exists() else []


def same_run(one: Path, other: Path) -> None:
    assert read_metrics(one / "metrics.jsonl") == read_metrics(other / "metrics.jsonl")
    assert said(one) == said(other)
    assert ledger(one) == ledger(other)
    assert ledger(one)
    for file in ("weights/model.safetensors", "weights/adapter/adapter_model.safetensors"):
        if (one / file).exists():
            a, b = load_file(one / file), load_file(other / file)
            assert a.keys() == b.keys()
            assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_equals_unbroken_bit_for_bit(tiny, tmp_path, monkeypatch, workers):
    """Two stops, the second between checkpoints and between rows; dropout, fresh encoder, an epoch's wrap."""
    more = {"run__length": "9 steps", "log__every": 2, "hardware__workers": workers, "data__val_clips": 3}
    more |= {"log__answers": 2}
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
    assert len(said(parts)) == 2 * 6  # validations behind steps 0, 2, 4, 6, 8, 9
    assert [step for step, *_ in ledger(parts)] == list(range(9))


def test_a_checkpoint_from_before_languages_were_summed_goes_on(tiny, tmp_path, monkeypatch):
    """In the middle of a row: what it had trained is of no language, all else is as in an unbroken run."""
    more = {"log__every": 4, "log__val_every": 4}
    unbroken = read_metrics(run_stage("stage1_align", tiny, tmp_path / "unbroken", **more) / "metrics.jsonl")
    stopped_run(tiny, tmp_path, monkeypatch, 1, **more)
    path = tmp_path / "mini/stage1_align/checkpoints/last.ckpt"
    saved = checkpoint.read(path)
    n, languages = len(saved["corpora"]), saved.pop("languages")
    sums, groups = saved["sums"], n + len(languages)
    saved["sums"] = torch.cat([sums[:n], sums[groups : groups + n], sums[-3:]])
    checkpoint.write(saved, path.parent, [path.name])
    rows = read_metrics(run_stage("stage1_align", tiny, tmp_path, **more) / "metrics.jsonl")
    found, expected = (next(r for r in of if "loss" in r) for of in (rows, unbroken))
    assert found | {"languages": 0} == expected | {"languages": 0}
    assert expected["languages"].keys() == {"en", "fr", "sp"}
    assert found["languages"]["-"]["targets"] == int(sums[groups : groups + n].sum())
    assert sum(part["targets"] for part in found["languages"].values()) == found["targets"]


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


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def death() -> None:
    raise MemoryError


def interrupt_behind_pack(monkeypatch: pytest.MonkeyPatch, number: int, interruption: Callable[[], None]) -> None:
    """When pack `number` (from 1, since the start or resume) has added its gradients, and before the next one has."""
    backward, packs = StageModule.manual_backward, itertools.count(1)

    def interrupted(self, loss):
        backward(self, loss)
        if next(packs) == number:
            interruption()

    monkeypatch.setattr(StageModule, "manual_backward", interrupted)


def test_interrupted_in_the_middle_of_an_accumulation_equals_unbroken(tiny, tmp_path, monkeypatch):
    """When two of a step's three packs are accumulated: Ctrl-C lets the step be finished, a death goes back to the last
    checkpoint. No pack counts twice, and no half of a gradient or of a row is kept."""
    more = {"batch__packs_per_step": 3, "run__length": "8 steps", "log__checkpoint_every": 5, "log__every": 2}
    unbroken = run_stage("stage1_align", tiny, tmp_path / "whole", **more)
    for interruption, pack, raised in ((ctrl_c, 3 + 2, Stopped), (death, 3 * 3 + 2, MemoryError)):
        with monkeypatch.context() as patch:
            interrupt_behind_pack(patch, pack, interruption)
            with pytest.raises(raised):
                run_stage("stage1_align", tiny, tmp_path / "parts", **more)
    same_run(unbroken, run_stage("stage1_align", tiny, tmp_path / "parts", **more))


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
    shards = tmp_path / "shards"
    shutil.copytree(tiny.shards, shards, ignore=shutil.ignore_patterns(".index"))
    stopped_run(tiny, tmp_path, monkeypatch, 1, data__root=shards)
    write_shard(shards / "tiny-000002.tar", [("new", flac(tone(1.0, 99)), record(60))])
    with pytest.raises(ConfigError, match=r"other data: .*index: the records, shards or token counts of tiny_caption"):
        run_stage("stage1_align", tiny, tmp_path, data__root=shards)
    (shards / "tiny-000002.tar").unlink()
    run_stage("stage1_align", tiny, tmp_path, data__root=shards)  # nothing was spoilt by the refusal


def test_a_checkpoint_that_is_there_is_used(tiny, tmp_path, monkeypatch, capsys):
    """Others print "no checkpoint found, starting from step 0" with one present."""
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stopped):
            run_stage("stage1_align", tiny, tmp_path)
    run_stage("stage1_align", tiny, tmp_path)
    assert "resuming at step 2 of 4" in capsys.readouterr().out


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
    done = checkpoint.read(tmp_path / "parts/mini/stage1_align/checkpoints/last.ckpt")["step"]
    assert 3 <= done < 40
    again = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"resuming at step {done} of 40" in again.stdout
    same_run(unbroken, tmp_path / "parts/mini/stage1_align")


def test_two_processes_are_the_same_run_as_one(tiny, tmp_path):
    """Plain DDP over gloo, three packs a step on two ranks (one pack is a dummy), fp32 AdamW, dropout keyed by pack:
    losses and weights within float noise, same samples; the mean of rank means would be far off."""
    more = {"batch__packs_per_step": 3, "optim__name": "adamw", "run__length": "4 steps"}
    more |= {"log__answers": 20, "data__val_clips": 20}
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
        for kind in ("corpora", "languages"):
            assert list(a[kind]) == list(b[kind])
            for name, part in a[kind].items():
                assert part["targets"] == b[kind][name]["targets"]
                assert part["loss_sum"] == pytest.approx(b[kind][name]["loss_sum"], rel=1e-4)
            for what in ("loss_sum", "targets"):
                whole = sum(part[what] for part in a["corpora"].values())
                assert sum(part[what] for part in a[kind].values()) == pytest.approx(whole, rel=1e-9)
        for kind in ("listening", "alike", "text_only"):
            assert (a.get(kind) or {}) == pytest.approx(b.get(kind) or {}, rel=1e-3, abs=1e-4)
    assert said(two) == said(one)
    assert [row["step"] for row in said(one)][:: len(said(one)) // 3] == [0, 2, 4]
    assert ledger_rows(two) == ledger_rows(one)
    assert {p.name for p in (two / "ledger").iterdir()} == {"rank0.bin", "rank1.bin", "states.jsonl"}
    a, b = load_file(one / "weights/model.safetensors"), load_file(two / "weights/model.safetensors")
    assert max(float((a[n].float() - b[n].float()).abs().max()) for n in a) < 1e-4


PATCHED = """
import os, sys
from midasheng.data import plan
from midasheng.train import fit
from midasheng.train.module import StageModule
from stages.stage1_align import contract
{patch}
sys.exit(fit.run_stage("configs/stage1_align.yaml", contract))
"""
STOPS = """
training_step = StageModule.training_step
def pressed(self, batch, batch_idx):
    self.stop.requested = batch.step == {step} and self.trainer.global_rank == 1
    training_step(self, batch, batch_idx)
StageModule.training_step = pressed
"""
OTHER_PLAN = """
train = fit.train
def other(order, data, planner, *rest):
    planner.seed += os.environ.get("LOCAL_RANK") == "1"
    train(order, data, planner, *rest)
fit.train = other
"""
SMALL_BLOCKS = "plan.BLOCK, plan.WINDOW = 64, 32"


def on_two(folder: Path, tiny: Tiny, patch: str = "", **more: object) -> subprocess.CompletedProcess[str]:
    """Stage 1 on two processes; `patch` is run in both before it."""
    script = folder / "stage1.py"
    script.write_text(PATCHED.format(patch=patch))
    settings = [f"{k.replace('__', '.')}={v}" for k, v in more.items()]
    return subprocess.run(
        [sys.executable, str(script), "--runs", str(folder), *tiny.settings(), *settings, "hardware.devices=2"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def optimizer_groups(path: Path) -> list[dict]:
    return checkpoint.read(path)["optimizer"]["param_groups"]


@pytest.fixture(scope="module")
def elastic(tiny, tmp_path_factory) -> tuple[Path, Path, list[dict]]:
    """An unbroken run of one process; the same one on one process, on two, and on one again, stopped in the warm-up and
    behind it; and the optimizer's groups where the two stopped. In blocks so small that each draws its own samples."""
    runs = tmp_path_factory.mktemp("elastic")
    more = {
        "optim__name": "adamw", "run__length": "9 steps", "run__warmup": "4 steps", "batch__packs_per_step": 3
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_room, "BLOCK", 8)
        patch.setattr(plan_room, "WINDOW", 4)
        unbroken = run_stage("stage1_align", tiny, runs / "unbroken", **more)
        stopped_run(tiny, runs, patch, 1, **more)
        done = on_two(runs, tiny, "plan.BLOCK, plan.WINDOW = 8, 4" + STOPS.format(step=4), **more)
        assert done.returncode == 130, done.stdout + done.stderr
        assert "resuming at step 2 of 9" in done.stdout
        run = runs / "mini/stage1_align"
        assert list(ledger_rows(run)) == [0, 1, 2, 3, 4]
        of_two = optimizer_groups(run / "checkpoints/last.ckpt")
        run_stage("stage1_align", tiny, runs, **more)
    return unbroken, run, of_two


def test_on_one_process_then_two_then_one_a_run_takes_the_samples_of_an_unbroken_one_step_for_step(elastic):
    """Three packs a step are accumulated on one rank, or dealt to two: equal ledgers, losses within float noise."""
    unbroken, run, _ = elastic
    assert list(ledger_rows(run)) == list(range(9))
    assert ledger_rows(run) == ledger_rows(unbroken)
    assert [len(list(frames_of(run / f"ledger/rank{rank}.bin"))) for rank in (0, 1)] == [6, 2]
    for a, b in zip(read_metrics(unbroken / "metrics.jsonl"), read_metrics(run / "metrics.jsonl"), strict=True):
        assert (a["step"], a.get("targets")) == (b["step"], b.get("targets"))
        assert a.get("loss", a.get("val_loss")) == pytest.approx(b.get("loss", b.get("val_loss")), rel=1e-5)


def test_another_number_of_processes_neither_warms_up_the_learning_rate_again_nor_rescales_it(elastic):
    """The rates in the optimizer itself, not only the one in the curve."""
    unbroken, run, of_two = elastic
    rates = {r["step"]: r["lr"] for r in read_metrics(unbroken / "metrics.jsonl") if "lr" in r}
    assert rates == {r["step"]: r["lr"] for r in read_metrics(run / "metrics.jsonl") if "lr" in r}
    assert len(set(rates.values())) > 4
    last = [g["lr"] for g in optimizer_groups(unbroken / "checkpoints/last.ckpt")]
    assert [g["lr"] for g in optimizer_groups(run / "checkpoints/last.ckpt")] == last
    assert [g["lr"] for g in of_two] == pytest.approx([lr * rates[5] / rates[9] for lr in last])


def test_a_resume_says_on_how_many_processes_it_went_on(elastic):
    _, run, _ = elastic
    worlds = [(r["step"], r["world_before"], r["world"]) for r in all_events(run) if r["event"] == "resume"]
    assert worlds == [(2, 1, 2), (5, 2, 1)]


def test_ranks_on_different_plans_end_the_run(tiny, tmp_path):
    """Samples twice and others never, and nothing else would notice: every loss is finite."""
    done = on_two(tmp_path, tiny, OTHER_PLAN)
    assert done.returncode not in (0, 2, 130)
    # whichever of the two comes first ends both
    assert re.search("AssertionError: step 0: rank [01] trains on another plan than others", done.stderr)
    assert not (tmp_path / "mini/stage1_align/checkpoints/last.ckpt").exists()


# -- a mix that changes while the run goes on ---------------------------------------------------------------------------


LIVE = {
    "data__mix": "pretrain", "run__length": "40 steps", "log__val_every": 100, "log__checkpoint_every": 8,
    "data__val_clips": 1,
}  # fmt: skip
SHARES = {"tiny_asr": 0.0, "tiny_caption": 100.0}


@pytest.fixture
def small_blocks(monkeypatch) -> None:
    """A change of the mix shows after ten steps instead of two hundred."""
    monkeypatch.setattr(plan_room, "BLOCK", 64)
    monkeypatch.setattr(plan_room, "WINDOW", 32)


def write_mix(monkeypatch: pytest.MonkeyPatch, texts: dict[int, str]) -> None:
    """As if the user wrote mix.yaml into the run folder while step N (from 0) runs."""
    training_step = StageModule.training_step

    def written(self, batch, batch_idx):
        if batch.step in texts:
            (self.run / "mix.yaml").write_text(texts[batch.step])
        training_step(self, batch, batch_idx)

    monkeypatch.setattr(StageModule, "training_step", written)


def all_events(folder: Path) -> list[dict]:
    """Rows of events.jsonl without the time of the clock."""
    rows = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert all(row.pop("time") > 1.6e9 for row in rows)
    return rows


def events(folder: Path) -> list[dict]:
    """What happened to the order of the data."""
    return [row for row in all_events(folder) if row["event"] in ("mix", "plan restarted")]


def planned(order, steps: int, *changes: tuple[int, tuple[float, ...]], restart: int = 0) -> dict[int, list[Row]]:
    """Step -> rows of the plan by itself, as `ledger_rows`."""
    planner = read_data(order.stage, make=False).planner(order.stage.run.seed)
    if restart:
        planner.restart(restart)
    for change in changes:
        planner.change(*change)
    return {
        step.number: sorted((s.corpus, s.epoch, s.position, 1) for pack in step.packs for s in pack)
        for step in itertools.islice(planner, steps - restart)
    }


def yaml_of(shares: dict[str, float]) -> str:
    return yaml.safe_dump({"corpora": shares})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mix_written_during_the_run_is_followed_from_the_announced_step_on(
    tiny, tmp_path, monkeypatch, small_blocks, workers
):
    write_mix(monkeypatch, {5: yaml_of(SHARES)})
    order = order_for("stage1_align", tiny, tmp_path, **LIVE)
    folder = run_stage("stage1_align", tiny, tmp_path, **LIVE, hardware__workers=workers)
    (event,) = events(folder)
    assert event == {"step": 6, "event": "mix", "from_step": 6 + steps_ahead(workers, 2), "percent": SHARES}
    found, before = ledger_rows(folder), planned(order, 40)
    assert found == planned(order, 40, (event["from_step"], tuple(SHARES.values())))
    changed = [n for n in found if found[n] != before[n]]
    assert changed[0] >= event["from_step"]
    assert {c for c, *_ in found[39]} == {1}
    assert {c for c, *_ in before[39]} == {0, 1}


BROKEN = (
    "corpora: {tiny_asr: 50}", "corpora: [", "tiny_asr: 100", "corpora: {tiny_asr: 120, tiny_caption: -20}",
    "corpora: {tiny_asr: 30, tiny_caption: 30}", "corpora: {tiny_asr: 50, tiny_captions: 50}",
)  # fmt: skip


@pytest.mark.parametrize("text", BROKEN)
def test_a_mix_with_a_mistake_is_told_once_and_not_followed(tiny, tmp_path, monkeypatch, small_blocks, capsys, text):
    """A typing error must not end a run of days."""
    more = LIVE | {"run__length": "24 steps"}
    write_mix(monkeypatch, {1: text})
    order = order_for("stage1_align", tiny, tmp_path, **more)
    folder = run_stage("stage1_align", tiny, tmp_path, **more)
    err = capsys.readouterr().err
    assert err.count("not followed: ") == err.count("mix.yaml") == 1
    assert events(folder) == []
    assert ledger_rows(folder) == planned(order, 24)


def test_a_mended_mix_is_followed(tiny, tmp_path, monkeypatch, small_blocks):
    write_mix(monkeypatch, {1: BROKEN[0], 3: yaml_of(SHARES)})
    order = order_for("stage1_align", tiny, tmp_path, **LIVE)
    folder = run_stage("stage1_align", tiny, tmp_path, **LIVE)
    assert [e["from_step"] for e in events(folder)] == [14]
    assert ledger_rows(folder) == planned(order, 40, (14, tuple(SHARES.values())))


@pytest.mark.parametrize("stop", [6, 12, 25])
def test_a_changed_mix_survives_a_resume(tiny, tmp_path, monkeypatch, small_blocks, stop):
    """Stopped between the announcement and its step, or behind it; with mix.yaml taken away meanwhile."""
    order = order_for("stage1_align", tiny, tmp_path, **LIVE)
    with monkeypatch.context() as patch:
        write_mix(patch, {5: yaml_of(SHARES)})
        stop_after(patch, stop)
        with pytest.raises(Stopped):
            run_stage("stage1_align", tiny, tmp_path, **LIVE)
    announced = events(order.folder)
    assert [e["from_step"] for e in announced] == [16]
    (order.folder / "mix.yaml").unlink()
    run_stage("stage1_align", tiny, tmp_path, **LIVE)
    assert ledger_rows(order.folder) == planned(order, 40, (16, tuple(SHARES.values())))
    assert events(order.folder) == announced


def test_a_resume_does_not_announce_the_same_mix_again(tiny, tmp_path, monkeypatch, small_blocks):
    order = order_for("stage1_align", tiny, tmp_path, **LIVE)
    with monkeypatch.context() as patch:
        write_mix(patch, {5: yaml_of(SHARES)})
        stop_after(patch, 25)
        with pytest.raises(Stopped):
            run_stage("stage1_align", tiny, tmp_path, **LIVE)
    run_stage("stage1_align", tiny, tmp_path, **LIVE)
    assert ledger_rows(order.folder) == planned(order, 40, (16, tuple(SHARES.values())))
    assert [e["from_step"] for e in events(order.folder)] == [16]


def test_all_ranks_follow_a_mix_from_the_same_step_on(tiny, tmp_path, monkeypatch, small_blocks):
    """Only the first looks at the file; the others must hear of it in time."""
    more = LIVE | {"optim__name": "adamw"}
    order = order_for("stage1_align", tiny, tmp_path, **more)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stopped):
            run_stage("stage1_align", tiny, tmp_path, **more)
    (order.folder / "mix.yaml").write_text(yaml_of(SHARES))
    done = on_two(tmp_path, tiny, SMALL_BLOCKS, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    (event,) = events(order.folder)
    assert event["from_step"] == 3 + steps_ahead(0, 2)
    assert ledger_rows(order.folder) == planned(order, 40, (event["from_step"], tuple(SHARES.values())))


# -- going on in a new order ----------------------------------------------------------------------------------------------


@pytest.fixture
def owned(tiny, tmp_path) -> dict[str, Path]:
    """Settings for shards and manifests of its own, which a test may change."""
    shutil.copytree(tiny.shards, tmp_path / "shards", ignore=shutil.ignore_patterns(".index"))
    shutil.copytree(tiny.manifests.parent, tmp_path / "manifests")
    return {"data__root": tmp_path / "shards", "data__manifests": tmp_path / "manifests" / "tiny"}


def other_seed(_: Path) -> dict[str, object]:
    return {"run__seed": 7}


def other_mix(folder: Path) -> dict[str, object]:
    (folder / "manifests/tiny/pretrain.yaml").write_text(yaml_of({"tiny_asr": 20, "tiny_caption": 80}))
    return {}


def more_data(folder: Path) -> dict[str, object]:
    members = [(f"new{n}", flac(tone(1.0, n)), record(n)) for n in range(50, 60)]
    write_shard(folder / "shards/tiny-000002.tar", members)
    return {}


def other_packs(_: Path) -> dict[str, object]:
    return {"batch__packs_per_step": 3}


CHANGES = [
    pytest.param(other_seed, r"run.seed = 0, this one has 7", "seed was 0 and is 7", id="seed"),
    pytest.param(other_mix, r"other data: mix was .*60.* and is .*20.*on_change=restart_plan", "mix was", id="mix"),
    pytest.param(
        more_data, r"other data: .*index: the records, shards .* of tiny_asr", "index: the records", id="data"
    ),
    pytest.param(other_packs, r"batch.packs_per_step = 2, this one has 3", "budget was", id="packs"),
]
RESTART = {"data__mix": "pretrain", "run__length": "8 steps"}


@pytest.mark.parametrize(("change", "refusal", "because"), CHANGES)
def test_going_on_in_a_new_order_when_asked_for(tiny, tmp_path, monkeypatch, owned, change, refusal, because):
    """Refused without data.on_change. With it: weights and optimizer go on, the old ledger is put aside, and the new
    order is exact over the next resume too."""
    runs, more = tmp_path / "runs", RESTART | owned
    before = order_for("stage1_align", tiny, runs, **more)
    stopped_run(tiny, runs, monkeypatch, 2, **more)
    old = planned(before, 3)
    saved = checkpoint.read(before.folder / "checkpoints/last.ckpt")
    more |= change(tmp_path)
    with pytest.raises(ConfigError, match=refusal):
        run_stage("stage1_align", tiny, runs, **more)
    seen = []
    training_step = StageModule.training_step

    def watched(self, batch, batch_idx):
        if not seen:
            state = checkpoint.optimizer_state(self.model, self.optimizers().optimizer)["state"]
            seen.append((batch.step, {n: t.clone() for n, t in checkpoint.learned(self.model).items()}))
            assert {int(s["step"]) for s in state.values()} == {3}
            assert state.keys() == saved["optimizer"]["state"].keys()
        training_step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(StageModule, "training_step", watched)
        stopped_run(tiny, runs, patch, 5, **more, data__on_change="restart_plan")
    step, weights = seen[0]
    assert step == 3
    assert weights.keys() == saved["learned"].keys()
    assert all(torch.equal(weights[n], t) for n, t in saved["learned"].items())
    order = order_for("stage1_align", tiny, runs, **more)
    folder = run_stage("stage1_align", tiny, runs, **more)  # the new order is now the run's own
    assert ledger_rows(folder) == planned(order, 8, restart=3)
    assert list(ledger_rows(folder)) == [3, 4, 5, 6, 7]
    aside = folder / "ledger.until-step-3"
    assert {p.name for p in aside.iterdir()} == {"rank0.bin", "states.jsonl"}
    (tmp_path / "look").mkdir()
    shutil.copytree(aside, tmp_path / "look/ledger")
    assert ledger_rows(tmp_path / "look") == old
    (event,) = events(folder)
    assert (event["step"], event["event"]) == (3, "plan restarted")
    assert because in event["because"]
    assert [r["step"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r] == list(range(1, 9))


def test_a_new_order_is_another_one(tiny, tmp_path, owned):
    """Restarted without another seed it would bring the same samples once more first."""
    order = order_for("stage1_align", tiny, tmp_path, **RESTART, **owned)
    read_data(order.stage, make=True)
    again, old = planned(order, 8, restart=3), planned(order, 8)
    assert [again[n] for n in range(3, 8)] != [old[n] for n in range(5)]
    assert all(again[n] != old[n] for n in range(3, 8))


def test_a_new_order_that_was_killed_before_its_first_checkpoint_begins_again(tiny, tmp_path, monkeypatch, owned):
    runs, more = tmp_path / "runs", RESTART | owned
    stopped_run(tiny, runs, monkeypatch, 2, **more)
    more |= {"run__seed": 7, "data__on_change": "restart_plan"}
    with monkeypatch.context() as patch:
        patch.setattr(StageModule, "training_step", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            run_stage("stage1_align", tiny, runs, **more)
    folder = run_stage("stage1_align", tiny, runs, **more)
    assert ledger_rows(folder) == planned(order_for("stage1_align", tiny, runs, **more), 8, restart=3)


def test_a_new_order_may_have_other_corpora(tiny, tmp_path, monkeypatch, owned):
    runs, more = tmp_path / "runs", RESTART | owned | {"log__every": 2}
    stopped_run(tiny, runs, monkeypatch, 2, **more)
    more |= {"data__mix": "align", "data__on_change": "restart_plan"}
    folder = run_stage("stage1_align", tiny, runs, **more)
    assert ledger_rows(folder) == planned(order_for("stage1_align", tiny, runs, **more), 8, restart=3)
    rows = [r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
    assert rows[-1]["corpora"].keys() == {"tiny_caption"}


def test_order_for_is_what_the_command_line_gives(tiny, tmp_path):
    """The helper of these tests reads configs as the command does."""
    by_hand = order_for("stage1_align", tiny, tmp_path)
    by_command = order_room.command_line(
        str(ROOT / "configs/stage1_align.yaml"), ["--runs", str(tmp_path), *tiny.settings()]
    )
    assert by_hand.stage == by_command.stage
    assert by_hand.folder == by_command.folder


def happened(folder: Path) -> list[tuple[int, str]]:
    return [(row["step"], row["event"]) for row in all_events(folder)]


def test_what_happens_to_a_run_stands_in_events_once(tiny, tmp_path, monkeypatch):
    """A stop, a kill behind the next checkpoint, the end: what came after the checkpoint that a resume begins at is
    about to happen again, and is dropped."""
    more = {"run__length": "8 steps", "log__checkpoint_every": 3}
    stopped_run(tiny, tmp_path, monkeypatch, 1, **more)
    folder = tmp_path / "mini/stage1_align"
    assert happened(folder) == [(0, "start"), (2, "checkpoint"), (2, "stop")]
    saved, seen = StageModule.save, []

    def dies_while_saving(self, **more):
        if self.done == 6:
            seen.extend(happened(folder))
            add_event(folder, {"step": 6, "event": "checkpoint", "seconds": 1, "waited": 0, "bytes": 1, "best": False})
            raise MemoryError
        saved(self, **more)

    with monkeypatch.context() as patch:
        patch.setattr(StageModule, "save", dies_while_saving)
        with pytest.raises(MemoryError):
            run_stage("stage1_align", tiny, tmp_path, **more)
    first = [(0, "start"), (2, "checkpoint"), (2, "stop"), (2, "resume"), (3, "checkpoint")]
    assert seen == first
    run_stage("stage1_align", tiny, tmp_path, **more)
    end = [(3, "failed"), (3, "resume"), (6, "checkpoint"), (8, "checkpoint"), (8, "handed off")]
    assert happened(folder) == first + end
    rows = all_events(folder)
    assert [r for r in rows if r["event"] == "resume"] == [
        {"step": n, "event": "resume", "world": 1, "world_before": 1} for n in (2, 3)
    ]
    run_stage("stage1_align", tiny, tmp_path, **more, fresh=True)
    saved_at = [(n, "checkpoint") for n in (3, 6, 8)]
    assert happened(folder) == [(0, "start"), *saved_at, (8, "handed off")]
