"""Sums over packs and ranks; token-weighted, never a mean of means."""

import dataclasses

import numpy as np
import pytest
import torch

from midasheng.model.flops import Cost, peak
from midasheng.sample import NO_TARGET, Sample, pack
from midasheng.train import meter as room
from midasheng.train.meter import Meter, MetricsFile, Speed, read_metrics


def sample(corpus: str, slots: int, targets: int, clip: int = 0):
    labels = np.full(slots, NO_TARGET)
    labels[:targets] = 1
    clips = (np.zeros(clip, dtype=np.float32),) if clip else ()
    return Sample(corpus, "k", "t", np.ones(slots, dtype=np.int64), labels, np.zeros(slots, dtype=bool), clips)


def test_rows_are_sums_over_targets_not_means_of_means():
    meter = Meter(["a", "b"])
    meter.add(pack([sample("a", 5, 1, 16_000), sample("b", 5, 4)], 16, 0), torch.tensor([10.0, 4.0, 0.0]))
    meter.add(pack([sample("b", 8, 5, 32_000)], 8, 0), torch.tensor([6.0]))
    row = meter.row(lambda t: t)
    assert row["loss"] == pytest.approx(20 / 10)
    assert row["corpora"] == {"a": {"loss_sum": 10.0, "targets": 1}, "b": {"loss_sum": 10.0, "targets": 9}}
    assert (row["audio_s"], row["slots"], row["frames"]) == (3.0, 18, 25 + 50)  # the tail of 6 slots does not count
    assert meter.row(lambda t: t)["targets"] == 0  # since the last row


def test_what_samples_share_is_counted_once():
    """Two questions on a clip: 3 shared slots, 1 and 5 of their own."""
    long, short = sample("a", 8, 0, 16_000), sample("b", 4, 0)
    short = dataclasses.replace(short, common=3)
    for s in (long, short):
        s.labels[-1] = 1
    row = pack([long, short], 12, 0)
    meter, speed = Meter(["a", "b"]), Speed(COST, peak=1e6, devices=1)
    meter.add(row, torch.tensor([10.0, 4.0, 0.0, 0.0]))
    speed.add(row)
    found = meter.row(lambda t: t)
    assert (found["audio_s"], found["slots"], found["frames"], found["targets"]) == (1.0, 9, 25, 2)
    assert found["corpora"]["b"] == {"loss_sum": 4.0, "targets": 1}
    assert speed.sums[2:4].tolist() == [9, 12]


def test_reduction_over_ranks_reaches_every_sum():
    meter = Meter(["a"])
    meter.add(pack([sample("a", 4, 2)], 4, 0), torch.tensor([3.0]))
    row = meter.row(lambda t: 2 * t)
    assert row["targets"] == 4
    assert row["loss"] == pytest.approx(1.5)
    assert row["slots"] == 8


def test_a_resume_drops_rows_that_come_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0, write=True)
    for step in range(1, 6):
        file.add({"step": step, "loss": 1.0})
    path.write_text(path.read_text() + '{"step": 6, "lo')  # a kill while writing
    MetricsFile(path, 3, write=True)
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]
    MetricsFile(path, 0, write=False).add({"step": 9})
    assert len(read_metrics(path)) == 3


COST = Cost(frame=1000.0, chunk_squared=10.0, token=100.0, slot=10_000.0, segment_squared=1.0, target=5.0)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told."""
    now = [100.0]
    monkeypatch.setattr(room.time, "monotonic", lambda: now[0])
    return now


def test_speed_is_useful_work_over_the_whole_wall_clock(clock):
    """Waiting, optimizer and checkpoints are inside; what validation takes is not; the tail of a pack is padding."""
    speed = Speed(COST, peak=1e6, devices=2)
    packs = [pack([sample("a", 5, 1, 16_000), sample("b", 5, 4)], 16, 0), pack([sample("b", 8, 5, 32_000)], 8, 0)]
    for one in packs:
        speed.add(one)
    speed.waited(1.5)
    with speed.paused():
        clock[0] += 1000
    clock[0] += 10
    row = speed.row(lambda t: t)
    encoder = 1000 * (25 + 50) + 10 * (25**2 + 50**2)
    useful = encoder + 100 * (5 + 10) + 10_000 * 18 + (25 + 25 + 64) + 5 * 10
    assert row == pytest.approx(
        {
            "seconds": 10, "audio_h_per_device_h": 3 / 10 / 2, "mfu": useful / 10 / 2 / 1e6, "slots_per_s": 1.8,
            "encoder_padding": 0, "decoder_padding": 6 / 24, "waiting": 0.15 / 2,
        }
    )  # fmt: skip
    clock[0] += 5
    assert speed.row(lambda t: t) == {
        "seconds": 5, "audio_h_per_device_h": 0, "mfu": 0, "slots_per_s": 0, "encoder_padding": 0,
        "decoder_padding": 0, "waiting": 0
    }  # fmt: skip


@pytest.mark.parametrize(("real", "padded"), [(16, 0.0), (4, 0.75), (0, 1.0)])
def test_padding_is_the_padded_share_and_not_its_complement(clock, real, padded):
    speed = Speed(COST, peak=1e6, devices=1)
    speed.add(pack([sample("a", real, 1)] if real else [], 16, 0))
    clock[0] += 1
    assert speed.row(lambda t: t)["decoder_padding"] == padded


def test_padding_of_the_encoder_is_what_it_computes_and_no_clip_has(clock):
    speed = Speed(COST, 1e6, 1)
    speed.add(pack([sample("a", 5, 1, 16_000)], 8, 0, None, 40))
    clock[0] += 1
    row = speed.row(lambda t: t)
    assert (row["encoder_padding"], row["decoder_padding"]) == (pytest.approx(15 / 40), pytest.approx(3 / 8))


def test_speed_adds_up_over_ranks(clock):
    """Two ranks with the same work in the same time are twice as fast together, and as busy each."""
    one, two = (Speed(COST, 1e6, devices) for devices in (1, 2))
    for speed in (one, two):
        speed.add(pack([sample("a", 5, 1, 16_000)], 8, 0))
        speed.waited(1.0)
    clock[0] += 4
    alone, together = one.row(lambda t: t), two.row(lambda t: 2 * t)
    assert together == alone | {"slots_per_s": 2 * alone["slots_per_s"]}


def test_the_peak_of_a_cpu_is_measured_and_says_so():
    flops, how = peak(torch.device("cpu"), torch.float32)
    assert flops > 1e9
    assert "measured" in how
    assert "float32" in how
