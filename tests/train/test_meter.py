"""Sums over packs and ranks; token-weighted, never a mean of means."""

import numpy as np
import pytest
import torch

from midasheng.sample import NO_TARGET, Sample, pack
from midasheng.train.meter import Meter, MetricsFile, read_metrics


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
