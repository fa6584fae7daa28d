"""Sums over packs and ranks; token-weighted, never a mean of means."""

import dataclasses

import numpy as np
import pytest
import torch

from midasheng.model.flops import Cost, peak
from midasheng.sample import NO_TARGET, NOT_TOLD, Sample, pack
from midasheng.train import meter as room
from midasheng.train.meter import Meter, MetricsFile, Speed, by_group, read_metrics


def sample(corpus: str, slots: int, targets: int, clip: int = 0, language: str = NOT_TOLD):
    labels = np.full(slots, NO_TARGET)
    labels[:targets] = 1
    clips = (np.zeros(clip, dtype=np.float32),) if clip else ()
    ids, is_audio = np.ones(slots, dtype=np.int64), np.zeros(slots, dtype=bool)
    return Sample(corpus, "k", "t", ids, labels, is_audio, clips, language=language)


def test_rows_are_sums_over_targets_not_means_of_means():
    meter = Meter(["a", "b"], [])
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
    meter, speed = Meter(["a", "b"], []), Speed(COST, peak=1e6, devices=1)
    meter.add(row, torch.tensor([10.0, 4.0, 0.0, 0.0]))
    speed.add(row)
    found = meter.row(lambda t: t)
    assert (found["audio_s"], found["slots"], found["frames"], found["targets"]) == (1.0, 9, 25, 2)
    assert found["corpora"]["b"] == {"loss_sum": 4.0, "targets": 1}
    assert speed.sums[2:4].tolist() == [9, 12]


SPOKEN = [
    pack([sample("a", 5, 1, language="fr"), sample("b", 5, 4), sample("b", 5, 2, language="en")], 16, 0),
    pack([sample("b", 8, 5, language="fr")], 8, 0),
]  # fmt: skip
SPOKEN_LOSS = [torch.tensor([10.0, 4.0, 3.0, 0.0]), torch.tensor([6.0])]


def spoken(languages: list[str]) -> Meter:
    meter = Meter(["a", "b"], languages)
    for one, loss_S in zip(SPOKEN, SPOKEN_LOSS, strict=True):
        meter.add(one, loss_S)
    return meter


def test_a_language_is_summed_over_corpora_and_what_tells_none_apart():
    row = spoken(["de", "en", "fr"]).row(lambda t: t)
    assert row["languages"] == {
        "en": {"loss_sum": 3.0, "targets": 2}, "fr": {"loss_sum": 16.0, "targets": 6},
        "-": {"loss_sum": 4.0, "targets": 4},
    }  # fmt: skip
    assert row["corpora"] == {"a": {"loss_sum": 10.0, "targets": 1}, "b": {"loss_sum": 13.0, "targets": 11}}
    assert (row["loss"], row["targets"]) == (pytest.approx(23 / 12), 12)  # once, not for each kind of group
    assert by_group("train", row, {"a": "asr", "b": "asr"}) == pytest.approx({
        "train_corpus/a": 10, "train_corpus/b": 13 / 11, "train_task/asr": 23 / 12, "train_language/en": 1.5,
        "train_language/fr": 16 / 6, "train_language/-": 1,
    })  # fmt: skip


def test_sums_of_a_checkpoint_are_taken_back_and_those_of_an_older_version_tell_no_language():
    """Before languages were summed a checkpoint held loss and targets of the corpora, and three more."""
    languages = ["de", "en", "fr"]
    kept, whole = spoken(languages).sums, spoken(languages).row(lambda t: t)
    again = Meter(["a", "b"], languages)
    again.go_on(kept, [*languages, "-"])
    assert again.row(lambda t: t) == whole
    before = torch.cat([kept[:2], kept[6:8], kept[-3:]])
    for sums, told in ((before, []), (kept, ["de", "en", "it", "-"])):  # or other cards
        meter = Meter(["a", "b"], languages)
        meter.go_on(sums, told)
        assert meter.row(lambda t: t) == whole | {"languages": {"-": {"loss_sum": 23.0, "targets": 12}}}


def test_reduction_over_ranks_reaches_every_sum():
    meter = Meter(["a"], ["en"])
    meter.add(pack([sample("a", 4, 2, language="en")], 4, 0), torch.tensor([3.0]))
    row = meter.row(lambda t: 2 * t)
    assert row["languages"] == {"en": {"loss_sum": 6.0, "targets": 4}}
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
    # no slot of these samples holds an audio token
    useful = encoder + 10_000 * 18 + (25 + 25 + 64) + 5 * 10
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
