"""Who made a step not finite: a sample, the precision, several together, the weights, or nobody any more."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from midasheng.model.audio_lm import AudioLM
from midasheng.train import bisect as room
from midasheng.train.bisect import distance
from midasheng.train.skips import NotFinite
from stages import bisect as verb
from tests.conftest import Tiny, order_for, run_stage, trained_keys
from tests.train.test_skips import with_loud

RUN = {"run__length": "5 steps", "log__checkpoint_every": 1, "log__val_every": 9}
BAD = 2  # the step that fails


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run in which nothing happens, and the records that it meets in step BAD only."""
    runs = tmp_path_factory.mktemp("whole")
    folder = run_stage("stage1_align", tiny, runs, **RUN)
    keys = trained_keys(folder, order_for("stage1_align", tiny, runs, **RUN))
    once = [k for k in keys[BAD] if [n for n, of in keys.items() if k in of] == [BAD]]
    assert len(once) > 1
    return folder, once


def ask(monkeypatch: pytest.MonkeyPatch, runs: Path, *more: str) -> int:
    """`make bisect` in this process."""
    monkeypatch.setattr(sys, "argv", ["bisect", "--runs", str(runs), "--name", "stage1_align", *more])
    return verb.main()


def copy(whole: tuple[Path, list[str]], runs: Path) -> Path:
    """The undisturbed run, to be asked about."""
    folder = runs / "mini/stage1_align"
    shutil.copytree(whole[0], folder)
    return folder


def spoil(monkeypatch: pytest.MonkeyPatch, wrong) -> None:
    """`wrong(model, pack)`: factor on the loss of each sample of a pack; a factor that is not finite spoils it."""
    forward = AudioLM.forward

    def spoilt(self, pack):
        loss_S = forward(self, pack)
        return loss_S * torch.tensor([*wrong(self, pack), *[1.0] * (len(loss_S) - len(pack.keys))])

    monkeypatch.setattr(AudioLM, "forward", spoilt)


NAN = float("nan")


def test_from_a_clip_that_overflows_to_a_run_that_goes_on(tiny, whole, tmp_path, monkeypatch, capsys):
    """Training stops, the bisection finds the sample among all of two steps that hold one each, training goes on."""
    keys = [k.split("/")[1] for k in whole[1]]
    bad = with_loud(tiny, tmp_path / "bad", keys[0], keys[-1])
    runs = tmp_path / "runs"
    with pytest.raises(NotFinite):
        run_stage("stage1_align", bad, runs, **RUN, optim__max_skips=1)
    assert ask(monkeypatch, runs) == 0
    out = capsys.readouterr().out
    assert f"last.ckpt, step {BAD}: exactly those that met the step" in out
    lines = (runs / "mini/stage1_align/quarantine.txt").read_text().splitlines()
    assert sorted(line.split("#")[0].strip() for line in lines) == sorted([whole[1][0], whole[1][-1]])
    for line in lines:
        assert f"# step {BAD}, data: not finite in float32 either, but finite with silence in place of its clip" in line
        assert "e+24 (full scale is 1)" in line
    folder = run_stage("stage1_align", bad, runs, **RUN, optim__max_skips=1)
    assert (folder / "weights/stage.json").is_file()
    assert ask(monkeypatch, runs, "--step", str(BAD)) == 1  # nothing is left of it
    assert "finite: it does not happen with these weights" in capsys.readouterr().out


def test_a_sample_that_only_half_precision_spoils_is_numerics(whole, tmp_path, monkeypatch, capsys):
    folder = copy(whole, tmp_path)
    target = whole[1][1]
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("run.precision: fp32", "run.precision: bf16"))
    assert "run.precision: bf16" in (folder / "config.yaml").read_text()
    spoil(
        monkeypatch,
        lambda lm, pack: [NAN if lm.compute_dtype and f"tiny_caption/{k}" == target else 1.0 for k in pack.keys],
    )
    assert ask(monkeypatch, tmp_path, "--step", str(BAD)) == 0
    assert f"{target}: numerics: finite in float32" in capsys.readouterr().out
    assert (folder / "quarantine.txt").read_text().startswith(f"{target}  # step {BAD}, numerics")


def test_samples_that_fail_only_together_are_nobodys_fault(whole, tmp_path, monkeypatch, capsys):
    """Their gradients overflow in sum: no sample is put away for it."""
    folder = copy(whole, tmp_path)
    pair = None
    forward = AudioLM.forward

    def together(self, pack):
        nonlocal pair
        pair = pair or pack.keys[-2:]
        loss_S = forward(self, pack)
        return loss_S.sum() * NAN + loss_S if set(pair) <= set(pack.keys) else loss_S

    monkeypatch.setattr(AudioLM, "forward", together)
    assert ask(monkeypatch, tmp_path, "--step", str(BAD)) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "not finite together" in line]
    named = line.split(": ")[-1].split(", ")
    assert {f"tiny_caption/{k}" for k in pair} <= set(named)
    assert len(named) == 2  # halved down to them
    assert not (folder / "quarantine.txt").exists()


def test_packs_whose_gradients_overflow_only_in_sum(whole, tmp_path, monkeypatch, capsys):
    """Each pack's is finite: only the step as a whole shows it."""
    folder = copy(whole, tmp_path)
    manyfold = 0

    def hooked(gradient):
        return gradient * (1e30 if manyfold else 1.0)

    tried = room.Replay.tried

    def counted(self, step, numbers, packs):
        nonlocal manyfold
        manyfold = len(packs) > 1
        handles = [p.register_hook(hooked) for p in self.model.parameters() if p.requires_grad]
        try:
            return tried(self, step, numbers, packs)
        finally:
            for handle in handles:
                handle.remove()

    monkeypatch.setattr(room.Replay, "tried", counted)
    assert ask(monkeypatch, tmp_path, "--step", str(BAD)) == 0
    out = capsys.readouterr().out
    assert "all packs together: NOT finite" in out
    assert out.count("finite in parts, not finite together") == 1
    assert not (folder / "quarantine.txt").exists()


def test_broken_weights_are_said_and_no_sample_is_put_away(tiny, whole, tmp_path, monkeypatch, capsys):
    folder = copy(whole, tmp_path)
    path = folder / "checkpoints/last.ckpt"
    saved = torch.load(path, weights_only=True)
    name = next(n for n, t in saved["learned"].items() if t.is_floating_point() and t.ndim > 1)
    saved["learned"][name].view(-1)[3] = float("inf")
    torch.save(saved, path)
    assert ask(monkeypatch, tmp_path, "--step", str(BAD)) == 0
    out = capsys.readouterr().out
    assert f"weights: 1 tensors are not finite, the first {name}; no sample is to blame" in out
    assert not (folder / "quarantine.txt").exists()


def test_weights_that_no_sample_survives_are_the_weights_fault(whole, tmp_path, monkeypatch, capsys):
    folder = copy(whole, tmp_path)
    monkeypatch.setattr(room, "ENOUGH", 3)
    spoil(monkeypatch, lambda lm, pack: [NAN for _ in pack.keys])
    assert ask(monkeypatch, tmp_path, "--step", str(BAD)) == 0
    assert "weights: not finite with each of" in capsys.readouterr().out
    assert not (folder / "quarantine.txt").exists()


def test_a_run_without_skipped_steps_says_what_to_write(whole, tmp_path, monkeypatch, capsys):
    copy(whole, tmp_path)
    assert ask(monkeypatch, tmp_path) == 2
    assert "no step was skipped for want of a finite loss (events.jsonl); say STEP=n" in capsys.readouterr().err


def test_which_weights_are_exactly_those_of_the_step():
    """A skipped step changes none; a checkpoint behind it has them too."""
    assert distance(5, 5, []) == distance(3, 5, [3, 4]) == distance(7, 5, [5, 6]) == 0
    assert (distance(3, 5, [4]), distance(7, 5, [5])) == (1, -1)


def test_weights_before_the_first_checkpoint_are_those_of_the_start(tiny, whole, tmp_path, monkeypatch, capsys):
    """With the statistics that the run calibrated."""
    folder = copy(whole, tmp_path)
    shutil.rmtree(folder / "checkpoints")
    seen = []
    bisect = room.Replay.bisect

    def looked(self, step, said):
        seen.append(self.model.audio_encoder.init_bn.running_mean.clone())
        return bisect(self, step, said)

    monkeypatch.setattr(room.Replay, "bisect", looked)
    assert ask(monkeypatch, tmp_path, "--step", "0") == 1
    assert "the start of the run: exactly those that met the step" in capsys.readouterr().out
    saved = torch.load(whole[0] / "checkpoints/last.ckpt", weights_only=True)["learned"]
    assert torch.equal(seen[0], saved["audio_encoder.init_bn.running_mean"])
