"""benchmarks/infer keeps its protocol: what is fed, exactly so many tokens, out of memory as a row, GMACs as counted."""

import json
import statistics

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import infer, record
from benchmarks.infer import EVERY, OURS, PADDED, Took, answer, batches, feeds, first_tokens, gmacs, in_turn
from midasheng.model import attention, encoder, generate
from tests.model import OMNI, QWEN3, tiny_lm
from tests.model.test_flops import by_segment
from tests.test_inference import hand_off

CPU, TEXT = torch.device("cpu"), infer.BEFORE + infer.AFTER


@pytest.fixture
def lm():
    return tiny_lm().requires_grad_(False).eval()


@pytest.mark.parametrize(
    ("audio_s", "slots"),
    [(2.0, (10, 50, 750)), (8.0, (40, 200, 750)), (30.0, (150, 750, 750)), (32.0, (160, 800, 800))],
)
def test_25_hz_is_five_times_the_slots_and_pads_to_30_s(lm, monkeypatch, audio_s, slots):
    """Counted where the decoder reads its prompts, and in the model's own weights."""
    extend, read = type(lm.decoder).extend, []

    def spied(self, embeds_TD, *rest):
        read.append((self, len(embeds_TD)))
        return extend(self, embeds_TD, *rest)

    monkeypatch.setattr(type(lm.decoder), "extend", spied)
    for feed, n in zip(feeds(lm), slots, strict=True):
        prompts = feed.prompts(audio_s, 2)
        assert len(prompts.audio_K) == 2 * n
        answer(feed.lm, prompts, 1)
        assert read.pop() == (lm.decoder, 2 * (TEXT + n))
        assert feed.lm.audio_encoder is lm.audio_encoder
    ours, every, padded = (feed.prompts(audio_s, 1) for feed in feeds(lm))
    clip_L = ours.audio_L
    assert torch.equal(every.audio_L, clip_L)
    assert torch.equal(padded.audio_L[: len(clip_L)], clip_L)
    assert padded.clips == (max(480_000, len(clip_L)),)
    assert not padded.audio_L[len(clip_L) :].any()


def test_each_frame_is_a_token_of_25_hz(lm):
    every = feeds(lm)[1]
    prompts = every.prompts(11.0, 1)  # two chunks
    tokens_KD = generate.audio_tokens(every.lm, prompts.audio_L, prompts.clips)
    frames_FE = lm.audio_encoder(prompts.audio_L, prompts.clips)
    torch.testing.assert_close(tokens_KD, every.lm.audio_projector.net(frames_FE), rtol=1e-4, atol=1e-5)


def test_an_answer_has_all_its_tokens_even_of_a_model_that_stops(lm, monkeypatch):
    lm.decoder.lm_head.weight.zero_()  # says id 0 for ever
    prompts = feeds(lm)[0].prompts(1.0, 3)
    assert [one.ids for one in generate.generate(lm, prompts, (0,), 9)] == [()] * 3
    made = []

    def kept(*args):
        made.extend(generate.generate(*args))
        return made

    monkeypatch.setattr(infer, "generate", kept)
    answer(lm, prompts, 9)
    assert [one.ids for one in made] == [(0,) * 9] * 3
    monkeypatch.setattr(infer, "generate", lambda lm, prompts, _, limit: generate.generate(lm, prompts, (0,), limit))
    with pytest.raises(AssertionError, match=r"new tokens instead of 9 each"):
        answer(lm, prompts, 9)


def test_out_of_memory_is_a_row_and_later_rows_stay(lm):
    """By the peaks of a run without a limit: the padded feed ends at 4, ours goes on until its own memory ends."""
    free = list(batches(lm, CPU, float("inf"), rounds=1, most=2, clip_s=2.0, new_tokens=2))
    assert [row["batch"] for row in free] == [1, 2]
    for row in free:
        assert row[OURS]["samples_per_s"] > 0
        assert row[PADDED]["peak_gib"] > row[OURS]["peak_gib"]
    limit = free[-1][PADDED]["peak_gib"] * 2**30 + 1
    rows = list(batches(lm, CPU, limit, rounds=1, clip_s=2.0, new_tokens=2))
    sizes = [row["batch"] for row in rows]
    assert len(rows) > 4
    assert sizes == [2**n for n in range(len(rows))]
    assert [name for name in (OURS, PADDED) for row in rows if row.get(name) == {"out_of_memory": True}] == [
        OURS,
        PADDED,
    ]
    assert rows[2][PADDED] == {"out_of_memory": True}
    assert rows[-1][OURS] == {"out_of_memory": True}
    assert all(row[OURS]["samples_per_s"] > 0 and row[OURS]["peak_gib"] * 2**30 <= limit for row in rows[:-1])
    assert not any(PADDED in row for row in rows[3:])
    lines = list(infer.batches_table(rows))
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {n}" for n in sizes]
    assert lines[4].split(" | ")[2:4] == ["out of memory", "-"]
    assert lines[5].split(" | ")[2] == "-"


@pytest.mark.parametrize("at", [0, 2])
def test_an_accelerator_s_error_ends_that_feed_alone_and_no_other_error_is_swallowed(lm, monkeypatch, at):
    """While memory is measured, or in a round behind that."""
    seen = []

    def broken(error):
        def run(lm, *rest):
            if isinstance(lm, infer.EveryFrame):
                seen.append(1)
                if len(seen) > at:
                    raise error("all gone")
            return generate.generate(lm, *rest)

        return run

    monkeypatch.setattr(infer, "generate", broken(torch.OutOfMemoryError))
    rows = list(batches(lm, CPU, float("inf"), rounds=3, most=2, clip_s=1.0, new_tokens=1))
    assert rows[0][PADDED] == {"out_of_memory": True}
    assert rows[0]["faster"] is None
    assert all(len(row[OURS]["seconds"]) == 3 for row in rows)
    assert len(seen) == at + 1  # tried no more
    seen.clear()
    monkeypatch.setattr(infer, "generate", broken(RuntimeError))
    with pytest.raises(RuntimeError, match="all gone"):
        list(batches(lm, CPU, float("inf"), rounds=3, most=1, clip_s=1.0, new_tokens=1))


def test_rounds_are_interleaved_and_ratios_are_of_a_round(lm, monkeypatch):
    order = []
    monkeypatch.setattr(infer, "seconds", lambda run, device: order.append(run.__defaults__[0]) or float(len(order)))
    work = {feed.name: (feed.lm, feed.prompts(1.0, 1)) for feed in feeds(lm)}
    found = in_turn(work, 1, 2, CPU, float("inf"))
    assert order == [work[name][0] for name in (OURS, EVERY, PADDED)] * 2
    assert [found[name].seconds for name in (OURS, EVERY, PADDED)] == [[1, 4], [2, 5], [3, 6]]
    assert infer.faster(found[OURS], found[PADDED]) == statistics.median([3 / 1, 6 / 4])
    assert infer.faster(Took(1, [2.0, 1.0, 4.0]), Took(1, [4.0, 9.0, 4.0])) == 2.0


@pytest.mark.parametrize("architecture", [OMNI, QWEN3])
def test_gmacs_are_what_torch_counts(architecture, monkeypatch):
    """Until the first token, each part for itself, of one clip and of three."""
    for room in (attention, encoder):
        monkeypatch.setattr(room, "segment_attention", by_segment)
    lm = tiny_lm(architecture, vocab_size=20_000).requires_grad_(False).eval()  # so that a forgotten head shows
    for feed in feeds(lm):
        for batch in (1, 3):
            prompts = feed.prompts(12.0, batch)
            with FlopCounterMode(display=False) as hearing, torch.no_grad():
                generate.audio_tokens(feed.lm, prompts.audio_L, prompts.clips)
            with FlopCounterMode(display=False) as whole:
                generate.Decoding(feed.lm, prompts)
            ours = gmacs(feed.lm, prompts)
            heard = hearing.get_total_flops()
            assert ours["encoder"] == pytest.approx(heard / 2e9, rel=0.01)
            assert ours["decoder"] == pytest.approx((whole.get_total_flops() - heard) / 2e9, rel=0.01)


def test_first_tokens_of_all_lengths(lm):
    rows = list(first_tokens(lm, CPU, float("inf"), rounds=2))
    assert [row["audio_s"] for row in rows] == [2, 4, 8, 16, 32]
    assert [[row[name]["slots"] for name in (OURS, EVERY, PADDED)] for row in rows[::4]] == [
        [10, 50, 750], [160, 800, 800],
    ]  # fmt: skip
    for row in rows:
        assert all(len(row[name]["seconds"]) == 2 and min(row[name]["seconds"]) > 0 for name in (OURS, EVERY, PADDED))
    assert rows[0][PADDED]["gmacs"] == rows[3][PADDED]["gmacs"]
    assert rows[0][OURS]["gmacs"]["decoder"] < rows[3][OURS]["gmacs"]["decoder"]
    tight = list(first_tokens(lm, CPU, rows[0][OURS]["peak_gib"] * 2**30 + 1, rounds=1, clips_s=(2.0,)))
    assert "samples_per_s" not in tight[0][PADDED]
    assert tight[0][PADDED]["out_of_memory"]
    assert list(infer.first_tokens_table(tight))[-1].split(" | ")[3] == "out of memory"


@pytest.mark.parametrize("named", [False, True])
def test_what_is_printed_and_written(named, lm, chat, monkeypatch, tmp_path, capsys):
    """Of random weights, and of a run's."""
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(infer, "random_model", lambda *_: lm)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    record.record("another", {"kept": 1}, "infer.json")
    if named:
        hand_off(tmp_path / "run/weights", chat)
    name = ["--name", f"{tmp_path}/run"] if named else []
    monkeypatch.setattr("sys.argv", ["infer", "--scale", "mini", *name, "most=1", "rounds=1", "memory_gib=3"])
    assert infer.main() == 0
    told = json.loads((tmp_path / "results/infer.json").read_text())
    assert told.pop("another") == {"kept": 1}
    (own,) = told.values()
    assert own["weights"] == (f"{tmp_path}/run" if named else "random, mini")
    assert own["memory_gib"] == 3
    assert own["new_tokens"] == 100
    assert own["kernels"] == "prompts sdpa, answers sdpa one by one"
    assert torch.__version__ in own["software"]
    assert "CPU" in own["device"]
    assert [row["batch"] for row in own["batches"]] == [1]
    assert len(own["first_tokens"]) == 5
    printed = capsys.readouterr().out
    assert "| batch size | 5 Hz (samples/s) | 25 Hz in 30 s (samples/s) | speedup |" in printed
    assert printed.count("\n|---") == 2


def test_a_scale_s_random_model_is_frozen_and_of_its_shapes():
    lm = infer.random_model("mini", CPU, "float32")
    assert not lm.training
    assert not any(p.requires_grad for p in lm.parameters())
    assert (lm.audio_encoder.shape.dim, lm.decoder.config.hidden_size) == (192, 192)


@pytest.mark.parametrize("given", ["speed=3", "most", "rounds=many", "rounds=0"])
def test_settings_that_mean_nothing_are_refused(given, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["infer", given])
    assert infer.main() == 2
    assert "error: SET: " in capsys.readouterr().err
