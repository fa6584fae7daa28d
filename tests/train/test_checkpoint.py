"""Checkpoints: what they hold, that they are read strictly, and that no death and no full disk costs one."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from midasheng import config
from midasheng.config import Optim, UserError
from midasheng.data.ledger import append
from midasheng.model import adapt
from midasheng.model.audio_lm import AudioLM
from midasheng.train import checkpoint
from midasheng.train import fit as fit_room
from midasheng.train.checkpoint import BEST, LAST, CheckpointError, Writer
from midasheng.train.meter import read_metrics
from midasheng.train.module import StageModule
from midasheng.train.optim import optimizer
from tests.conftest import CONFIGS, run_stage
from tests.model import at_scale, tiny_lm
from tests.train.test_resume import all_events, ledger, same_run, stopped_run

ROOT = Path(__file__).parent.parent.parent
LORA = adapt.LoraPlan(("q_proj", "v_proj"), 4, 8.0, 0.0)


# -- what it holds -----------------------------------------------------------------------------------------------------


def with_lora(lm: AudioLM) -> AudioLM:
    adapt.freeze_all_but(lm, ["audio_encoder.*", "audio_projector.*"])
    adapt.add_lora(lm, LORA, seed=1)
    return lm


def trained(lm: AudioLM, name: str = "adamw8bit", steps: int = 1) -> torch.optim.Optimizer:
    """An optimizer that took some steps."""
    adam = optimizer(lm.named_parameters(), Optim(name=name))
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for p in lm.parameters():
            p.grad = torch.randn(p.shape, generator=draw) if p.requires_grad else None
        adam.step()
    return adam


def content(lm: AudioLM, adam: torch.optim.Optimizer, step: int = 1) -> dict:
    return checkpoint.copied({
        "format": checkpoint.FORMAT, "step": step, "shards": {}, "base": checkpoint.base_digests(lm),
        "learned": checkpoint.learned(lm), "optimizer": checkpoint.optimizer_state(lm, adam),
    })  # fmt: skip


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_it_holds_what_learns_and_its_size_is_known_before(tmp_path, name):
    lm = with_lora(tiny_lm())
    saved = content(lm, trained(lm, name))
    learns = {n for n, p in lm.named_parameters() if p.requires_grad}
    statistics = {f"audio_encoder.init_bn.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}
    assert saved["learned"].keys() == learns | statistics
    assert not any(n.startswith("decoder.") and ".lora_" not in n for n in learns)
    assert saved["optimizer"]["state"].keys() == learns
    size = checkpoint.write(saved, tmp_path, [LAST])
    assert size == (tmp_path / LAST).stat().st_size
    assert size < checkpoint.size_bytes(lm, name) < size + 1.2 * 2**20


def test_one_of_the_7b_in_stage_2_is_about_4_gb():
    """From shapes alone: 19 GB with the frozen decoder in it."""
    stage = config.load(CONFIGS / "stage2_pretrain.yaml", "7b", [], CONFIGS).stage
    lm = at_scale("7b")
    adapt.freeze_all_but(lm, stage.train)
    with torch.device("meta"):
        plan = adapt.LoraPlan(tuple(stage.lora.targets), stage.lora.rank, stage.lora.alpha, stage.lora.dropout)
        adapt.add_lora(lm, plan, seed=0)
    adapt.set_precision(lm, stage.run.precision)
    assert stage.optim.name == "adamw8bit"
    numbers = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    size = checkpoint.size_bytes(lm, stage.optim.name)
    assert size == pytest.approx(numbers * (4 + 2 * (1 + 4 / 256)), rel=0.005)  # fp32, two 8-bit moments with scales
    assert 3.8e9 < size < 4.2e9
    frozen = sum(p.nbytes for p in lm.parameters() if not p.requires_grad)
    assert frozen > 15e9


# -- reading -----------------------------------------------------------------------------------------------------------


def test_what_was_written_is_given_back(tmp_path):
    one, other = with_lora(tiny_lm(seed=1)), with_lora(tiny_lm(seed=1))
    adam = trained(one, steps=2)
    checkpoint.write(content(one, adam), tmp_path, [LAST])
    saved = checkpoint.read(tmp_path / LAST)
    again = optimizer(other.named_parameters(), Optim())
    checkpoint.restore(other, saved, tmp_path)
    checkpoint.restore_optimizer(other, again, saved, tmp_path)
    for lm, of in ((one, adam), (other, again)):  # one more step each
        for n, p in enumerate(lm.parameters()):
            p.grad = torch.full_like(p, 0.1 * (n % 3 - 1)) if p.requires_grad else None
        of.step()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


NAME = "audio_projector.net.0.weight"


def lacks(saved: dict) -> None:
    del saved["learned"][NAME]


def surplus(saved: dict) -> None:
    saved["learned"]["decoder.model.norm.weight"] = torch.zeros(48)


def misshaped(saved: dict) -> None:
    saved["learned"][NAME] = saved["learned"][NAME].T


def rounded(saved: dict) -> None:
    saved["learned"][NAME] = saved["learned"][NAME].bfloat16()


def other_base(saved: dict) -> None:
    saved["base"]["decoder"] = checkpoint.base_digests(with_lora(tiny_lm(seed=2)))["decoder"]


def other_parameters(saved: dict) -> None:
    saved["optimizer"]["param_groups"][0]["params"].reverse()


def other_state(saved: dict) -> None:
    state = saved["optimizer"]["state"][NAME]
    state["exp_avg"] = state["exp_avg"][:1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lacks, f"lacks 1 tensors that learn here, the first {NAME}"),
        (surplus, "holds 1 tensors that do not learn here, the first decoder.model.norm.weight"),
        (misshaped, f"{NAME} is torch.float32 .*, this model's torch.float32"),
        (rounded, f"{NAME} is torch.bfloat16 .*, this model's torch.float32"),
        (other_base, "what is frozen in decoder is not what this run was trained on"),
        (other_parameters, "its optimizer holds other parameters, or in other groups"),
        (other_state, f"{NAME}: its optimizer state .*exp_avg.* does not fit"),
    ],
)
def test_one_that_does_not_fit_is_refused_by_name(change, message):
    lm = with_lora(tiny_lm())
    adam = trained(lm, "adamw")
    saved = content(lm, adam)
    change(saved)
    before = {n: t.clone() for n, t in checkpoint.learned(lm).items()}

    def give_back() -> None:
        checkpoint.restore(lm, saved, Path("last.ckpt"))
        checkpoint.restore_optimizer(lm, adam, saved, Path("last.ckpt"))

    with pytest.raises(CheckpointError, match=message):
        give_back()
    assert all(torch.equal(t, before[n]) for n, t in checkpoint.learned(lm).items())


def test_a_checkpoint_of_an_older_version_is_refused_in_a_sentence(tmp_path):
    torch.save({"state_dict": {}, "midasheng": {"step": 3}, "pytorch-lightning_version": "2.6.6"}, tmp_path / LAST)
    with pytest.raises(
        CheckpointError, match=r"older version of this code, which kept the frozen weights too: .*FRESH=1"
    ):
        checkpoint.read(tmp_path / LAST)


def test_a_damaged_one_is_refused_by_name_and_the_best_one_goes_on(tiny, tmp_path, monkeypatch):
    """Cut off, a flipped bit, empty. What is left of the run is untouched, and the best one is a checkpoint like any."""
    more = {"run__length": "6 steps", "log__val_every": 2, "log__keep_best": "true", "log__checkpoint_every": 1}
    unbroken = run_stage("stage1_align", tiny, tmp_path / "whole", **more)
    stopped_run(tiny, tmp_path / "run", monkeypatch, 4, **more)
    folder = tmp_path / "run/mini/stage1_align"
    last = folder / "checkpoints" / LAST
    good, metrics = last.read_bytes(), (folder / "metrics.jsonl").read_bytes()
    middle = len(good) // 2
    for bad in (good[:middle], good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :], b""):
        last.write_bytes(bad)
        with pytest.raises(CheckpointError, match=f"{re.escape(str(last))} is damaged .*`cp .*best.ckpt .*last.ckpt`"):
            run_stage("stage1_align", tiny, tmp_path / "run", **more)
        assert (folder / "metrics.jsonl").read_bytes() == metrics
    assert checkpoint.read(folder / "checkpoints" / BEST)["step"] == 4
    shutil.copy(folder / "checkpoints" / BEST, last)
    same_run(unbroken, run_stage("stage1_align", tiny, tmp_path / "run", **more))


def test_the_best_one_is_that_of_the_lowest_validation_loss_over_resumes(tiny, tmp_path, monkeypatch):
    """With a rate so high that the loss rises again; a resume remembers what the best was."""
    more = {
        "run__length": "8 steps", "log__val_every": 1, "log__keep_best": "true", "log__checkpoint_every": 3,
        "optim__lr": 0.1, "optim__name": "adamw",
    }  # fmt: skip
    stopped_run(tiny, tmp_path, monkeypatch, 5, **more)
    folder = run_stage("stage1_align", tiny, tmp_path, **more)
    losses = {
        r["step"]: r["val_loss"] for r in read_metrics(folder / "metrics.jsonl") if r.get("val_loss") and r["step"]
    }
    best = min(losses, key=losses.__getitem__)
    assert best < 6 < 8
    saved = checkpoint.read(folder / "checkpoints" / BEST)
    assert (saved["step"], saved["best"]) == (best, {"step": best, "val_loss": losses[best]})
    bests = [e["step"] for e in all_events(folder) if e["event"] == "checkpoint" and e["best"]]
    so_far = [n for n in losses if losses[n] == min(losses[k] for k in losses if k <= n)]
    assert bests == so_far
    assert checkpoint.read(folder / "checkpoints" / LAST)["step"] == 8


# -- writing -----------------------------------------------------------------------------------------------------------


KILLED = """
import sys, time, torch
from pathlib import Path
from midasheng.train import checkpoint
folder, write = Path(sys.argv[1]), checkpoint._Telling.write
def content(step):
    return {"format": checkpoint.FORMAT, "step": step, "shards": {}, "learned": {"a": torch.full((400_000,), float(step))}}
checkpoint.write(content(1), folder, ["last.ckpt", "best.ckpt"])
written = 0
def stalls(self, data):
    global written
    written += write(self, data)
    if written > 1_000_000:
        self.flush()
        print("in the middle", flush=True)
        time.sleep(600)
    return len(data)
checkpoint._Telling.write = stalls
checkpoint.write(content(2), folder, ["last.ckpt", "best.ckpt"])
"""


def test_a_process_that_is_killed_while_it_writes_leaves_the_former_one_whole(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "in the middle\n"
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    assert any(p.stat().st_size > 1_000_000 for p in tmp_path.iterdir() if p.name not in (LAST, BEST))
    for name in (LAST, BEST):
        saved = checkpoint.read(tmp_path / name)
        assert saved["step"] == 1
        assert bool((saved["learned"]["a"] == 1).all())
    checkpoint.write({"format": checkpoint.FORMAT, "step": 3, "shards": {}}, tmp_path, [LAST])
    assert {p.name for p in tmp_path.iterdir()} == {LAST, BEST}


def test_training_goes_on_while_one_is_written_and_the_run_ends_behind_it(tiny, tmp_path, monkeypatch):
    """The first checkpoint reaches the disk two steps later, and holds the state of its own step all the same: the run
    that goes on from it is the unbroken one. The second waits for the first, the hand-off for the last."""
    more = {"run__length": "8 steps", "log__checkpoint_every": 3, "hardware__workers": 0}
    unbroken = run_stage("stage1_align", tiny, tmp_path / "whole", **more)
    write, step, go, order = checkpoint.write, StageModule.training_step, threading.Event(), []

    def slow(content, folder, names):
        if content["step"] == 3:
            assert go.wait(300)
        order.append(("written", content["step"]))
        return write(content, folder, names)

    def stepped(self, batch, number):
        step(self, batch, number)
        order.append(("step", batch.step + 1))
        if batch.step + 1 == 5:
            go.set()
            with pytest.MonkeyPatch.context() as inner:  # as if it were killed here, the first one on the disk
                inner.setattr(checkpoint.Writer, "check", lambda self: None)
                self.writer.wait()
            shutil.copytree(self.run, tmp_path / "killed/mini/stage1_align")

    monkeypatch.setattr(checkpoint, "write", slow)
    monkeypatch.setattr(StageModule, "training_step", stepped)
    hand_off = fit_room.weights.hand_off
    monkeypatch.setattr(
        fit_room.weights, "hand_off", lambda *a, **k: (order.append(("hand-off", 8)), hand_off(*a, **k))[1]
    )
    run_stage("stage1_align", tiny, tmp_path / "run", **more)
    assert order.index(("step", 5)) < order.index(("written", 3)) < order.index(("step", 6))
    assert order[-3:] == [("step", 8), ("written", 8), ("hand-off", 8)]
    monkeypatch.undo()
    killed = tmp_path / "killed"
    assert checkpoint.read(killed / "mini/stage1_align/checkpoints" / LAST)["step"] == 3
    same_run(unbroken, run_stage("stage1_align", tiny, killed, **more))


def test_any_error_of_the_writer_reaches_the_run(tmp_path):
    writer = Writer(tmp_path, [], 5)
    with pytest.raises(CheckpointError, match=r"checkpoint of step 6 could not .*last.ckpt of step 5 is whole"), writer:
        writer.write(
            {"step": 6, "shards": {}, "what": lambda: None}, [LAST], lambda size: None
        )  # a function is nothing to save
    with pytest.raises(KeyError), writer:  # the run's own error is not hidden by it
        raise KeyError


# -- disks that are full -----------------------------------------------------------------------------------------------


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, what) -> None:
    """`what` happens before step `step` (from 0)."""
    training_step = StageModule.training_step

    def watched(self, batch, number):
        if batch.step == step:
            what(self.run)
        training_step(self, batch, number)

    monkeypatch.setattr(StageModule, "training_step", watched)


@pytest.fixture
def limit() -> Iterator:
    """No file of this process may grow beyond so many bytes: as on a full disk or quota, the error is EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


FULL = {"run__length": "6 steps", "log__checkpoint_every": 2}


def test_a_disk_that_fills_up_costs_no_checkpoint(tiny, tmp_path, monkeypatch, limit):
    """The former one stays whole, half of the new one is taken away, and the run ends by a UserError."""
    unbroken = run_stage("stage1_align", tiny, tmp_path / "whole", **FULL)
    folder = tmp_path / "run/mini/stage1_align"
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda run: limit((run / "checkpoints" / LAST).stat().st_size // 2))
        with pytest.raises(
            CheckpointError, match=r"of step 4 could not .* File too large; .*last.ckpt of step 2 is whole"
        ):
            run_stage("stage1_align", tiny, tmp_path / "run", **FULL)
    limit(resource.RLIM_INFINITY)
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [LAST]
    assert checkpoint.read(folder / "checkpoints" / LAST)["step"] == 2
    same_run(unbroken, run_stage("stage1_align", tiny, tmp_path / "run", **FULL))


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "ledger/rank0.bin", "ledger/states.jsonl"])
def test_a_file_of_the_run_that_takes_no_more_ends_it_by_name_without_a_gap(tiny, tmp_path, monkeypatch, name):
    unbroken = run_stage("stage1_align", tiny, tmp_path / "whole", **FULL)
    aside = tmp_path / "aside"

    def full(run: Path) -> None:
        (run / name).rename(aside)
        (run / name).symlink_to("/dev/full")

    with monkeypatch.context() as patch:
        at_step(patch, 3, full)
        with pytest.raises(CheckpointError, match=rf"No space left on device.*{name}|{name}.*No space left on device"):
            run_stage("stage1_align", tiny, tmp_path / "run", **FULL)
    file = tmp_path / "run/mini/stage1_align" / name
    file.unlink()
    aside.rename(file)
    parts = run_stage("stage1_align", tiny, tmp_path / "run", **FULL)
    same_run(unbroken, parts)
    assert [n for n, *_ in ledger(parts)] == list(range(6))


def test_weights_that_find_no_room_leave_the_checkpoint_and_are_written_later(tiny, tmp_path, monkeypatch, limit):
    unbroken = run_stage("stage1_align", tiny, tmp_path / "whole", **FULL)
    hand_off = fit_room.weights.hand_off

    def cramped(*given, **more):
        limit(50_000)
        try:
            return hand_off(*given, **more)
        finally:
            limit(resource.RLIM_INFINITY)

    folder = tmp_path / "run/mini/stage1_align"
    with monkeypatch.context() as patch:
        patch.setattr(fit_room.weights, "hand_off", cramped)
        with pytest.raises(CheckpointError, match=r"weights could not be written: .*; .*last.ckpt is whole"):
            run_stage("stage1_align", tiny, tmp_path / "run", **FULL)
    assert not list(folder.glob("weights*"))
    same_run(unbroken, run_stage("stage1_align", tiny, tmp_path / "run", **FULL))


def test_too_little_room_is_said_before_anything_is_written(tiny, small_disk):
    (small_disk / "film").write_bytes(bytes(12 * 2**20))
    with pytest.raises(UserError, match=r"checkpoints and weights/ need 0.0\d GB, there are 0.00 GB.*RUNS=FOLDER"):
        run_stage("stage1_align", tiny, small_disk)
    assert [p.name for p in small_disk.iterdir()] == ["film"]


def test_a_real_disk_that_fills_up_while_the_run_goes_on(tiny, tmp_path, small_disk, monkeypatch):
    unbroken = run_stage("stage1_align", tiny, tmp_path / "whole", **FULL)

    def fill(run: Path) -> None:
        free = shutil.disk_usage(run).free - 200_000
        (small_disk / "film").write_bytes(bytes(free))

    with monkeypatch.context() as patch:
        at_step(patch, 3, fill)
        with pytest.raises(CheckpointError, match=r"No space left on device.*last.ckpt of step 2 is whole"):
            run_stage("stage1_align", tiny, small_disk, **FULL)
    (small_disk / "film").unlink()
    same_run(unbroken, run_stage("stage1_align", tiny, small_disk, **FULL))


@pytest.mark.parametrize("keep_best", [False, True])
def test_room_counts_what_lies_beside_what_and_what_will_be_replaced(tmp_path, monkeypatch, keep_best):
    """A second checkpoint beside the first, one more with keep_best; weights/, where larger, beside the last."""
    stage = config.load(CONFIGS / "stage2_pretrain.yaml", "mini", [f"log.keep_best={keep_best}"], CONFIGS).stage
    for lm in (
        tiny_lm(),
        with_lora(tiny_lm(hidden_size=480, num_attention_heads=30)),
    ):  # the larger part learns, or not
        one = checkpoint.size_bytes(lm, "adamw8bit")
        weights = sum(t.nbytes for t in [*adapt.base_state(lm).values(), *adapt.lora_state(lm).values()])
        need, folder = one * (1 + keep_best) + max(one, weights), tmp_path / str(one)
        (folder / "checkpoints").mkdir(parents=True)
        for there in (0, 1000):
            (folder / "checkpoints" / LAST).write_bytes(bytes(there))
            for free, enough in ((need - there, True), (need - there - 1, False)):
                monkeypatch.setattr(
                    checkpoint.shutil, "disk_usage", lambda _, free=free: shutil._ntuple_diskusage(9, 9, free)
                )
                if enough:
                    assert f"a checkpoint takes {one / 1e9:.2f} GB" in checkpoint.check_room(folder, lm, stage)
                else:
                    with pytest.raises(UserError, match=f"need {need / 1e9:.2f} GB"):
                        checkpoint.check_room(folder, lm, stage)


def test_half_a_line_is_taken_back(tmp_path, limit):
    """What a full disk left of it would be damage in mid-file, once there is room again."""
    path = tmp_path / "rows.jsonl"
    append(path, b'{"step": 1}\n')
    limit(20)
    with pytest.raises(OSError, match=r"rows\.jsonl"):
        append(path, b'{"step": 2}\n')
    limit(resource.RLIM_INFINITY)
    append(path, b'{"step": 3}\n')
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'
