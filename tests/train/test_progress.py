"""A line that says what matters, with the time left, on a terminal and off it; a summary weighted by what rows stand for."""

import json
import re
from types import SimpleNamespace

from midasheng.train import progress as room
from midasheng.train.module import StageModule
from midasheng.train.progress import ProgressLine, speed, words
from tests.conftest import run_stage

ROW = {
    "loss": 1.23456, "audio_h_per_device_h": 84.21, "mfu": 0.0712, "slots_per_s": 900.0, "encoder_padding": 0.113,
    "decoder_padding": 0.05, "waiting": 0.004,
}  # fmt: skip
SAID = "loss 1.235  84.2 audio-h/h  MFU 7.1%  padding 5.0%/11.3%  wait 0.4%"


class Run:
    """A stage of 300 steps that steps when it is told, and a clock that goes on by ten seconds a step."""

    def __init__(self, monkeypatch, *, terminal: bool, done: int = 0, devices: int = 1) -> None:
        self.now = 1000.0
        monkeypatch.setattr(room.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(room.sys.stderr, "isatty", lambda: terminal, raising=False)
        self.module = StageModule.__new__(StageModule)
        self.module.__dict__.update(
            done=done, shown={}, course=SimpleNamespace(steps=300), stage=SimpleNamespace(name="s")
        )
        self.trainer = SimpleNamespace(is_global_zero=True, world_size=devices)
        self.line = ProgressLine()
        self.line.on_train_start(self.trainer, self.module)
        self.now += 500  # validation before the first step is not a step's time
        self.line.on_train_batch_start(self.trainer, self.module)

    def step(self, **shown: float) -> None:
        self.now += 10
        self.module.__dict__["done"] += 1
        self.module.shown.update(shown)
        self.line.on_train_batch_end(self.trainer, self.module)


def test_plain_lines_off_a_terminal(monkeypatch, capsys):
    run = Run(monkeypatch, terminal=False)
    run.step()
    assert capsys.readouterr().out == ""  # a line a row, not a line a step
    run.step(**ROW)
    assert capsys.readouterr().out == f"s step 2/300  {SAID}  49 min 40 s left\n"
    run.step(**(ROW | {"loss": 1.0}))  # a row like the last but for one value is a whole row
    assert capsys.readouterr().out == f"s step 3/300  {SAID.replace('1.235', '1.000')}  49 min 30 s left\n"
    run.step(val_loss=1.5, listening=0.25)
    assert capsys.readouterr().out == "s step 4/300  val 1.500  listening +0.250  49 min 20 s left\n"


def test_one_line_on_a_terminal(monkeypatch, capsys):
    run = Run(monkeypatch, terminal=True)
    run.step(**ROW, val_loss=1.5, listening=0.25)
    said = SAID.replace("  84.2", ", val 1.500, 84.2").replace("  ", ", ")
    assert run.line.bar.postfix == f"49 min 50 s left, {said}"
    assert capsys.readouterr().out == ""
    assert str(run.line.bar).startswith("s   0% |")
    assert "1/300, 49 min 50 s left, loss 1.235" in str(run.line.bar)


def test_the_time_left_after_a_resume_is_that_of_this_process(monkeypatch, capsys):
    run = Run(monkeypatch, terminal=False, done=290)
    run.step(loss=1.0)
    assert capsys.readouterr().out == "s step 291/300  loss 1.000  1 min 30 s left\n"


def test_several_devices_are_said():
    assert words(ROW, 8)[1] == "84.2 audio-h/h a device"


def test_the_summary_is_weighted(tmp_path):
    rows = [
        {"step": 0, "peak_flops_per_s": 1e12, "peak": "x"},
        # 60 s of 100 slots a second, no padding; 20 s of 300, half of what was computed
        {"step": 1, "seconds": 60.0, "audio_h_per_device_h": 10.0, "mfu": 0.1, "slots_per_s": 100.0,
         "encoder_padding": 0.0, "decoder_padding": 0.0, "waiting": 0.0},
        {"step": 2, "seconds": 20.0, "audio_h_per_device_h": 30.0, "mfu": 0.3, "slots_per_s": 300.0,
         "encoder_padding": 0.25, "decoder_padding": 0.5, "waiting": 0.4},
        {"step": 0, "validation_s": 40.0, "answers_s": 3.0}, {"step": 2, "validation_s": 50.0, "answers_s": 4.4},
    ]  # fmt: skip
    (tmp_path / "speed.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    metrics = [
        {"step": 1, "loss": 1.0, "audio_s": 3600.0},
        {"step": 1, "val_loss": 1.0},
        {"step": 2, "audio_s": 1800.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in metrics))
    assert speed(tmp_path) == [
        "1.50 audio-hours trained on; on a device 15 audio-hours an hour, MFU 15.0%; padding 33.3% of the slots, 14.3% of "
        "the frames; 10.0% of the time waiting for data",
        "besides, 2 validations took 1 min 30 s, 7 s of it for answers in words",
    ]
    (tmp_path / "speed.jsonl").unlink()
    assert speed(tmp_path) == []


def test_a_run_says_it_all(tiny_data, tmp_path, capsys):
    """What the module shows is what the line looks for: a name that changes there would go unsaid."""
    run_stage("text_decoder", tiny_data, tmp_path, log__progress="true", run__length="2 steps", log__val_every=9)
    out = capsys.readouterr().out
    number = r"[\d.e+]+"
    took = rf"validated in {number} s, {number} of it for answers"
    rows = rf"step 2/2  loss {number}  val {number}  {took}  {number} audio-h/h  MFU {number}%  "
    assert re.search(rows + rf"padding {number}%/{number}%  wait {number}%  0 s left", out), out
    assert re.search(rf"step 0/2  val {number}  {took}", out), out
    assert re.search(rf"{number} audio-hours trained on; on a device {number} audio-hours an hour, MFU", out)
