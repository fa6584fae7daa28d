"""A step that is not finite, or jumps, is not taken by any rank, leaves no trace in what learns, and is seen."""

import io
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from midasheng.config import ConfigError, Optim, UserError
from midasheng.data.audit import RunLedger
from midasheng.data.room import read_data
from midasheng.model.audio_lm import AudioLM
from midasheng.train import checkpoint
from midasheng.train import skips as room
from midasheng.train.meter import read_metrics
from midasheng.train.module import StageModule
from midasheng.train.skips import NotFinite, Skips
from tests.conftest import Tiny, ledger_rows, order_for, run_stage, trained_keys
from tests.train.test_resume import on_two, stopped_run

# -- the rules -----------------------------------------------------------------------------------------------------------


def test_a_taken_step_ends_a_row_of_skips_and_too_many_in_a_row_stop():
    skips = Skips(Optim(max_skips=2))
    for finite, too_many in ((False, False), (True, False), (False, False), (False, True)):
        assert skips.because(finite=finite, norm=1.0) == ("" if finite else "not finite")
        assert skips.too_many == too_many
    assert (skips.total, skips.in_a_row) == (3, 2)


def test_counts_go_on_after_a_resume():
    before, after = Skips(Optim(max_skips=3, spike=4.0)), Skips(Optim(max_skips=3, spike=4.0))
    for number in range(room.RECENT + 2):
        before.because(finite=number < room.RECENT, norm=1.0 + number % 3)
    after.restore(json.loads(json.dumps(before.state())))
    assert after.state() == before.state()
    for skips in (before, after):
        assert skips.because(finite=True, norm=9.0) == "spike"
        assert (skips.total, skips.too_many) == (3, True)
        assert skips.row({"loss": 1.0})["skipped"] == 3


def test_a_spike_is_far_above_the_median_and_only_once_the_median_is_known():
    skips = Skips(Optim(spike=4.0))
    draw = np.random.default_rng(0)
    assert not any(skips.because(finite=True, norm=n) for n in (*draw.uniform(0.5, 1.5, room.RECENT - 2), 1e5))
    assert skips.because(finite=True, norm=50.0) == ""  # one norm is missing
    assert skips.because(finite=True, norm=3.0) == ""
    assert skips.because(finite=True, norm=9.0) == "spike"
    assert skips.because(finite=False, norm=math.nan) == "not finite"
    assert skips.because(finite=True, norm=1.0) == ""


def test_a_gradient_that_has_grown_for_good_is_no_spike_for_ever():
    skips = Skips(Optim(spike=4.0))
    found = [skips.because(finite=True, norm=1.0 if n < room.RECENT else 10.0) for n in range(3 * room.RECENT)]
    assert found[room.RECENT] == "spike"
    assert set(found[2 * room.RECENT :]) == {""}


def test_without_a_rule_for_spikes_none_is_one():
    skips = Skips(Optim())
    assert {skips.because(finite=True, norm=1.0 + 1e6 * (n == 150)) for n in range(200)} == {""}


@pytest.mark.parametrize(("key", "value"), [("optim__max_skips", 0), ("optim__spike", 0.5), ("optim__spike", -1.0)])
def test_rules_that_make_no_sense_are_refused(tiny_data, tmp_path, key, value):
    with pytest.raises(ConfigError, match=key.replace("__", ".")):
        order_for("stage1_align", tiny_data, tmp_path, **{key: value})


# -- real audio that overflows -------------------------------------------------------------------------------------------

HUGE = 1e25  # finite in float32, its power is not: what a file of floats holds that was written at a wrong offset
RUN = {"run__length": "5 steps", "optim__name": "adamw8bit", "log__checkpoint_every": 1, "log__val_every": 9}
NAME = "audio_encoder.blocks.0.attn.qkv.weight"
BAD = 2  # the step that holds such a clip


def loud(data: bytes) -> bytes:
    """The same clip as a WAV of floats beyond all bounds."""
    wave, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    file = io.BytesIO()
    soundfile.write(file, HUGE * wave, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def with_loud(tiny: Tiny, root: Path, *keys: str) -> Tiny:
    """The tiny corpus with records as long and in the same order; the clips of these keys overflow."""
    made = Tiny(root)
    made.shards.mkdir(parents=True)
    for part in ("manifests", "tokenizer", "text_decoder"):
        (root / part).symlink_to(tiny.root / part)
    for path in sorted(tiny.shards.glob("*.tar")):
        with tarfile.open(path) as old, tarfile.open(made.shards / path.name, "w") as new:
            for member in old:
                data = old.extractfile(member).read()
                key, _, kind = member.name.partition(".")
                if key in keys and kind == "flac":
                    data, member.name = loud(data), f"{key}.wav"
                member.size = len(data)
                new.addfile(member, io.BytesIO(data))
    return made


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run in which nothing happens, and a record that it meets in step BAD only."""
    runs = tmp_path_factory.mktemp("whole")
    folder = run_stage("stage1_align", tiny, runs, **RUN)
    keys = trained_keys(folder, order_for("stage1_align", tiny, runs, **RUN))
    once = [k for k in keys[BAD] if [n for n, of in keys.items() if k in of] == [BAD]]
    return folder, once[0].split("/")[1]


@pytest.fixture(scope="module")
def bad(tiny: Tiny, whole: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return with_loud(tiny, tmp_path_factory.mktemp("bad") / "tiny", whole[1])


def all_events(folder: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == kind]


def kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[int, list[torch.Tensor]]:
    """Fills with: steps done -> copies of all weights, buffers and optimizer states at that time."""
    found: dict[int, list[torch.Tensor]] = {}
    training_step = StageModule.training_step

    def looked_at(self, batch, batch_idx):
        training_step(self, batch, batch_idx)
        optimizer = self.trainer.optimizers[0]
        states = [v for p in self.parameters() for v in optimizer.state.get(p, {}).values()]
        found[self.done] = [t.detach().clone() for t in [*self.state_dict().values(), *states] if torch.is_tensor(t)]

    monkeypatch.setattr(StageModule, "training_step", looked_at)
    return found


def test_a_step_with_audio_that_overflows_leaves_no_trace_in_what_learns(bad, whole, tmp_path, monkeypatch):
    """Weights, statistics and 8-bit states are those of before; rate and order of the steps behind are as planned."""
    unbroken, key = whole
    seen = kept(tmp_path, monkeypatch)
    folder = run_stage("stage1_align", bad, tmp_path, **RUN)
    (event,) = all_events(folder, "step skipped")
    assert (event["step"], event["number"], event["because"], event["in_a_row"]) == (BAD + 1, BAD, "not finite", 1)
    assert not math.isfinite(float(event["grad_norm"]))
    assert [k for pack in event["packs"] for k in pack["not_finite"]] == [f"tiny_caption/{key}"]
    assert sorted(k for pack in event["packs"] for k in pack["keys"]) == sorted(
        trained_keys(unbroken, order_for("stage1_align", bad, tmp_path, **RUN))[BAD]
    )
    before, after = seen[BAD], seen[BAD + 1]
    assert len(before) == len(after)
    assert any(t.dtype == torch.uint8 for t in before)  # states of 8 bits are among them
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(after, seen[BAD + 2], strict=True))
    rates = [
        [r["lr"] for r in read_metrics(run / "metrics.jsonl") if "lr" in r] for run in (unbroken, folder)
    ]  # fmt: skip
    assert rates[0] == rates[1]


def test_a_skipped_step_is_seen_wherever_one_looks(bad, whole, tmp_path, capsys):
    folder = run_stage("stage1_align", bad, tmp_path, **RUN, log__progress="true", log__every=2)
    rows = [r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
    assert [(r["step"], r["skipped"], math.isnan(r["loss"])) for r in rows] == [
        (2, 0, False),
        (4, 1, True),
        (5, 0, False),
    ]
    assert all(math.isfinite(r["corpora"]["tiny_caption"]["loss_sum"]) for r in rows)
    out = capsys.readouterr().out
    lines = {line.split()[2]: line for line in out.splitlines() if line.startswith("stage1_align step ")}
    assert "SKIPPED" not in lines["2/5"]
    assert "STEPS SKIPPED 1" in lines["3/5"]  # at once, not with the next row
    assert "loss nan  STEPS SKIPPED 1" in lines["4/5"]
    assert "1 steps were NOT TAKEN" in out
    skipped = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert {r["reason"] for r in skipped if r["step"] == BAD} == {"step not taken"}
    rows_of = ledger_rows(folder)
    assert {row[3] for row in rows_of[BAD]} == {0}
    assert {row[3] for step, of in rows_of.items() if step != BAD for row in of} == {1}
    assert [r[:3] for r in rows_of[BAD]] == [r[:3] for r in ledger_rows(whole[0])[BAD]]
    record = json.loads((folder / "weights/stage.json").read_text())
    assert record["steps_skipped"] == 1


def test_a_stop_behind_a_skipped_step_changes_nothing(bad, tmp_path, monkeypatch):
    """What was counted since the last row, and in a row, goes on."""
    more = RUN | {"log__every": 2}
    unbroken = run_stage("stage1_align", bad, tmp_path / "whole", **more)
    stopped_run(bad, tmp_path / "parts", monkeypatch, BAD, **more)
    parts = run_stage("stage1_align", bad, tmp_path / "parts", **more)
    for name in ("metrics.jsonl", "skipped.jsonl"):
        assert (parts / name).read_text() == (unbroken / name).read_text()
    assert len(all_events(parts, "step skipped")) == 1
    assert torch.equal(*(load_file(run / "weights/model.safetensors")[NAME] for run in (parts, unbroken)))


def test_too_many_in_a_row_stop_the_run_with_the_sample_and_what_to_write(bad, whole, tmp_path):
    message = (
        rf"step {BAD}: not finite, gradient norm nan; the loss of tiny_caption/{whole[1]} is not finite. 1 steps .*"
    )
    for _ in range(2):  # the same command does not slip past it
        with pytest.raises(NotFinite, match=message + "`make bisect SCALE=mini NAME=stage1_align`"):
            run_stage("stage1_align", bad, tmp_path, **RUN, optim__max_skips=1)
    folder = tmp_path / "mini/stage1_align"
    assert len(all_events(folder, "step skipped")) == 1
    saved = checkpoint.read(folder / "checkpoints/last.ckpt")
    assert saved["step"] == BAD


INFINITE = """
from midasheng.model.audio_lm import AudioLM
forward = AudioLM.forward
def infinite(self, pack):
    loss_S = forward(self, pack)
    return loss_S + torch.tensor([float("inf") * (key == "{key}") if key == "{key}" else 0.0 for key in
                                  (*pack.keys, *[""] * (len(loss_S) - len(pack.keys)))])
AudioLM.forward = infinite
"""


def test_all_ranks_skip_alike_also_where_only_one_of_them_knows(bad, whole, tmp_path):
    """Step BAD has a clip that overflows, on one rank; step 3 a loss that is infinite on one rank while the gradient is
    finite on both. Two processes are the same run as one; else the ranks would part, or wait for each other for ever."""
    order = order_for("stage1_align", bad, tmp_path / "look", **RUN)
    keys = trained_keys(whole[0], order)
    key = next(k for k in keys[3] if [n for n, of in keys.items() if k in of] == [3]).split("/")[1]
    more = RUN | {"optim__name": "adamw", "log__every": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AudioLM, "forward", AudioLM.forward)  # put back behind it
        exec(INFINITE.format(key=key), {"torch": torch})
        one = run_stage("stage1_align", bad, tmp_path / "one", **more)
    (tmp_path / "two").mkdir()
    done = on_two(tmp_path / "two", bad, "import torch\n" + INFINITE.format(key=key), **more)
    assert done.returncode == 0, done.stdout + done.stderr
    two = tmp_path / "two/mini/stage1_align"
    for run in (one, two):
        events = all_events(run, "step skipped")
        assert [(e["number"], e["in_a_row"]) for e in events] == [(BAD, 1), (3, 2)]
        named = [[k for pack in e["packs"] for k in pack["not_finite"]] for e in events]
        assert named == [[f"tiny_caption/{whole[1]}"], [f"tiny_caption/{key}"]]
        assert [math.isfinite(float(e["grad_norm"])) for e in events] == [False, True]
        assert {pack["pack"] for pack in events[0]["packs"]} == {0, 1}
    assert {pack["rank"] for e in all_events(two, "step skipped") for pack in e["packs"]} == {0, 1}
    assert ledger_rows(one) == ledger_rows(two)
    for a, b in zip(*(read_metrics(run / "metrics.jsonl") for run in (one, two)), strict=True):
        assert (a["step"], a.get("targets"), a.get("skipped")) == (b["step"], b.get("targets"), b.get("skipped"))
        for name in ("loss", "val_loss", "grad_norm"):
            assert a.get(name, 0.0) == pytest.approx(b.get(name, 0.0), rel=1e-4, nan_ok=True)
    a, b = (load_file(run / "weights/model.safetensors")[NAME] for run in (one, two))
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


# -- quarantine ----------------------------------------------------------------------------------------------------------


def test_a_resume_trains_on_all_but_what_is_quarantined(bad, whole, tmp_path):
    """One hole where the sample stood, everything else in its place; the run that could not go on goes on."""
    order = order_for("stage1_align", bad, tmp_path, **RUN, optim__max_skips=1)
    with pytest.raises(NotFinite):
        run_stage("stage1_align", bad, tmp_path, **RUN, optim__max_skips=1)
    name = f"tiny_caption/{whole[1]}"
    (order.folder / "quarantine.txt").write_text(f"# by hand\n{name}  # too loud\n")
    run_stage("stage1_align", bad, tmp_path, **RUN, optim__max_skips=1)
    planned, found = (trained_keys(folder, order) for folder in (whole[0], order.folder))
    assert found == {step: [k for k in keys if k != name] for step, keys in planned.items()}
    assert planned[BAD] != found[BAD]
    rows = [
        [row[:3] for row in of] for folder in (whole[0], order.folder) for of in ledger_rows(folder).values()
    ]  # fmt: skip
    assert rows[:5] == rows[5:]
    assert [e["step"] for e in all_events(order.folder, "step skipped")] == []  # the step was trained in the end
    assert all(math.isfinite(r.get("loss", 0)) for r in read_metrics(order.folder / "metrics.jsonl"))
    skipped = [json.loads(line) for line in (order.folder / "skipped.jsonl").read_text().splitlines()]
    assert [r for r in skipped if r["step"] >= 0] == [
        {"step": BAD, "corpus": "tiny_caption", "key": whole[1], "reason": "quarantined"}
    ]
    data = read_data(order.stage, make=False)
    audit = RunLedger(order.folder, data.planner(0), data.corpora).audit()
    assert (audit.holes, audit.faults) == ({"quarantined": 1}, [])
    assert "1 holes (1 quarantined)" in audit.text()


def test_skipped_steps_are_no_fault_of_an_audit(bad, tmp_path):
    folder = run_stage("stage1_align", bad, tmp_path, **RUN)
    data = read_data(order_for("stage1_align", bad, tmp_path, **RUN).stage, make=False)
    audit = RunLedger(folder, data.planner(0), data.corpora).audit()
    holes = [row for row in ledger_rows(folder)[BAD] if not row[3]]
    assert (audit.holes, audit.faults) == ({"step not taken": len(holes)}, [])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tiny_caption/tone999", "corpus tiny_caption has no training record tone999"),
        ("tone1", "in no corpus of the mix .there are: tiny_caption"),
        ("tiny_qa/tone1", "in no corpus of the mix"),
    ],
)
def test_a_line_that_names_no_sample_is_refused(tiny, tmp_path, line, message):
    """It would be trained on."""
    (tmp_path / "mini/stage1_align").mkdir(parents=True)
    (tmp_path / "mini/stage1_align/quarantine.txt").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        run_stage("stage1_align", tiny, tmp_path)
    assert [p.name for p in (tmp_path / "mini/stage1_align").iterdir()] == ["quarantine.txt"]
