"""What is forecast is what is: memory by part, FLOPs, fill; every line says where it is from."""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.plan import NoChat, columns
from midasheng import config, frames
from midasheng.config import ConfigError, Forecast, UserError
from midasheng.data.assumed import Assumed, known
from midasheng.data.index import open_corpus
from midasheng.data.loader import train_loader
from midasheng.data.manifest import Card
from midasheng.data.plan import Budget, Planner, mean_cost
from midasheng.data.room import read_data
from midasheng.data.shard import Reading, save_columns, side_path
from midasheng.data.storage import list_shards
from midasheng.model import adapt, attention, encoder
from midasheng.model.flops import cost
from midasheng.train import footprint, forecast, optim
from midasheng.train.fit import build
from midasheng.train.memory import Dearest, Memory
from midasheng.train.order import Order
from tests.conftest import CONFIGS, order_for
from tests.model import count, tiny_lm
from tests.model.test_flops import by_segment, counted

MINI = Path("data/mini/shards")
RECORDED = pytest.mark.skipif(not MINI.is_dir(), reason="no recordings: make data")
SMALL = pytest.mark.skipif(not Path("data/small/tokenizer").is_dir(), reason="no data/small: make data SCALE=small")
STAGES = ["stage1_align", "stage2_pretrain", "stage3_sft"]


def stage_of(name: str, scale: str, *settings: str) -> config.Stage:
    return config.load(CONFIGS / f"{name}.yaml", scale, list(settings), CONFIGS).stage


def real(stage: config.Stage):
    """The stage's model with fresh weights."""
    fresh = config.dataclasses.replace(stage, start=[], fresh=["*"])
    return build(Order(config.Loaded(fresh, {}), Path("runs"), "none", "none", "", False), [])[0]


# -- memory ------------------------------------------------------------------------------------------------------------


def memory_is_that_of_a_step(stage: config.Stage, n_frames: int, slots: int, most: Dearest) -> None:
    grown = footprint.growth(stage, most, n_frames, slots)
    lm, packs = real(stage), 2
    memory = Memory(lm, stage, torch.device("cpu"), most, packs, 1)
    memory.tried(n_frames, slots)  # tables that stay
    took, loaded = memory.tried(n_frames, slots)
    shaped = footprint.shaped(stage)
    held = footprint.under_ddp(shaped, stage.optim.name, 1)
    assert held.total == pytest.approx(memory.state, rel=1e-4)
    at = footprint.blocks_of(shaped)
    assert grown.bytes(n_frames, slots, at) == pytest.approx(took - memory.before, rel=0.05)
    assert grown.pack(n_frames, slots, at) == pytest.approx(loaded, rel=0.05)
    assert forecast.needs(held, grown, shaped, n_frames, slots, packs) == pytest.approx(took + packs * loaded, rel=0.05)


@pytest.mark.parametrize(
    ("stage", "recompute"), [("stage1_align", "[]"), ("stage1_align", "[audio_encoder,decoder]"), ("stage3_sft", "[]")]
)
def test_memory_at_mini_is_that_of_a_real_step(stage, recompute):
    memory_is_that_of_a_step(stage_of(stage, "mini", f"hardware.recompute={recompute}"), 450, 320, Dearest(40, 55, 0.3))


@pytest.mark.slow
def test_memory_at_small_is_that_of_a_real_step():
    memory_is_that_of_a_step(stage_of("stage2_pretrain", "small"), 450, 320, Dearest(40, 55, 0.3))


def test_blocks_beyond_those_that_were_tried_are_as_if_they_had_been():
    """On a GPU, as which nothing runs here: the whole depth on tensors without content, twice as large."""
    few = ("model.encoder.depth=9", "model.decoder.fields.num_hidden_layers=8", "model.decoder.fields.vocab_size=2000")
    stage = stage_of("stage1_align", "0.6b", *few, "hardware.recompute=[audio_encoder,decoder]")
    grown = footprint.growth(stage, Dearest(9999, 9999, 0.4), 500, 400)
    deep, frozen = footprint.shaped(stage), footprint.FakeTensorMode(allow_non_fake_inputs=True)
    footprint._imagined(deep, frozen)
    with footprint._kernel(stage), frozen:
        tried = footprint._run(deep.train(), footprint.full_pack(1000, 800, Dearest(9999, 9999, 0.4), 2000))
    assert grown.bytes(1000, 800, (9, 8)) == pytest.approx(max(tried.phases), rel=0.02)


def test_liger_and_recomputation_take_less_and_dropout_keeps_a_byte():
    small = (
        "model.encoder.depth=2",
        "model.decoder.fields.num_hidden_layers=2",
        "model.decoder.fields.vocab_size=2000",
    )

    def slot(*settings: str) -> float:
        stage = stage_of("stage2_pretrain", "0.6b", *small, *settings)
        return float(footprint.growth(stage, Dearest(9999, 9999, 0.4), 500, 400).lines[0, 6])  # of a slot and block

    plain, fused, dry = slot(), slot("hardware.liger=true"), slot("lora.dropout=0.0")
    assert plain - dry == pytest.approx(2 * 1024)  # q and v are adapted, their input is 1,024 wide
    # silu(gate), 3,072 numbers of two bytes, and what norms keep in float32
    assert plain - fused > 2 * 3072


# -- what ranks hold ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "parts"), [("adamw8bit", 8), ("adamw8bit", 80), ("adamw", 3)])
def test_shards_are_what_chunks_of_the_tensors_are(name, parts):
    lm = tiny_lm()
    adapt.freeze_all_but(lm, ["audio_encoder.*", "decoder.lm_head.*"])
    adapt.set_precision(lm, "bf16")
    held = [footprint.shard_bytes(lm, name, parts, part) for part in range(parts)]
    for part in (0, parts // 2, parts - 1):
        chunks = [(p, p.chunk(parts)[part].numel() if part < len(p.chunk(parts)) else 0) for p in lm.parameters()]
        assert held[part].weights == sum(n * p.element_size() for p, n in chunks)
        assert held[part].gradients == sum(4 * n for p, n in chunks if p.requires_grad)
    assert sum(h.weights for h in held) == sum(p.numel() * p.element_size() for p in lm.parameters())
    whole = footprint.shard_bytes(lm, name, 1)
    learn = [p for p in lm.parameters() if p.requires_grad]
    assert whole.optimizer == optim.state_bytes(learn, name)
    assert max(h.total for h in held) == held[0].total


# -- FLOPs -------------------------------------------------------------------------------------------------------------


def flops_are_those_of_the_packs(stage: config.Stage, monkeypatch, steps: int) -> None:
    lm, data = real(stage), read_data(stage, make=True)
    mix, corpora, indexed = known(stage)
    assert indexed == len(corpora)
    useful = forecast.useful(cost(footprint.shaped(stage)), forecast.course(stage, mix, corpora, "report"))
    loader = train_loader(
        data.planner(stage.run.seed), data.corpora, data.chat, steps, rank=0, world=1, workers=0, prefetch=1
    )
    packs = [pack for batch in loader for pack in batch.packs]
    meant = {part: np.mean([cost(lm).of(pack)[part] for pack in packs]) for part in useful}
    assert sum(useful.values()) == pytest.approx(sum(meant.values()), rel=0.05)
    for room in (attention, encoder):
        monkeypatch.setattr(room, "segment_attention", by_segment)
    # torch counts the padding too
    at = forecast.course(stage, mix, corpora, "report")
    really = np.mean([counted(lm, pack) for pack in packs[:6]]) * sum(meant.values())
    of_those = np.mean([sum(cost(lm).of(pack).values()) for pack in packs[:6]])
    assert forecast.computed(cost(lm), at) == pytest.approx(really / of_those, rel=0.05)


@RECORDED
def test_flops_at_mini_are_those_of_real_packs(monkeypatch):
    flops_are_those_of_the_packs(stage_of("stage2_pretrain", "mini"), monkeypatch, 60)


@RECORDED
@SMALL
@pytest.mark.slow
def test_flops_at_small_are_those_of_real_packs(monkeypatch):
    flops_are_those_of_the_packs(stage_of("stage2_pretrain", "small"), monkeypatch, 60)


# -- fill --------------------------------------------------------------------------------------------------------------


@RECORDED
@pytest.mark.parametrize("stage", STAGES)
def test_fill_at_mini_is_that_of_the_whole_plan(stage):
    asked = stage_of(stage, "mini")
    data = read_data(asked, make=True)
    mix, corpora, indexed = known(asked)
    assert indexed == len(corpora)
    at = forecast.course(asked, mix, corpora, "report")
    assert (at.shape, at.steps) == (data.budget, data.course.steps)
    steps = itertools.islice(data.planner(asked.run.seed), data.course.steps)
    packs = [pack for step in steps for pack in step.packs]
    for fill, field, room in zip(
        at.fill, ("slots", "frames"), (data.budget.pack_slots, data.budget.pack_frames), strict=True
    ):
        assert fill == pytest.approx(np.mean([sum(getattr(s, field) for s in p) for p in packs]) / room, abs=0.01)


def test_fill_from_cards_is_that_of_a_real_index_of_such_lengths(tmp_path):
    """benchmarks/plan.py's simulated shards, read as any index; and the same lengths known by a card alone."""
    card = Card("simulated", "asr", "simulated-*.tar", "none", hours=30.0)
    (tmp_path / "simulated-0.tar").write_bytes(b"0")
    reading = Reading(card, NoChat())
    (shard,) = list_shards(str(tmp_path), "simulated-0.tar")
    save_columns(
        side_path(tmp_path / "index", reading, shard),
        columns("report", 30_000, np.random.default_rng(0)),
        {"shard": vars(shard), "reasons": [], "damage": [], "lead": []},
    )
    index = open_corpus(reading, str(tmp_path), tmp_path / "index", 30.0, make=True)
    fills, shapes = [], []
    for corpus in (index, Assumed(card, Forecast())):
        slots, n_frames = mean_cost([corpus], [100.0])
        shape = Budget(2048, round(2048 * n_frames / slots * 1.02), 8)
        packs = [p for step in itertools.islice(Planner([corpus], [100.0], shape, 0), 40) for p in step.packs]
        fills.append([np.mean([sum(s[i] for s in p) for p in packs]) for i in (5, 6)])
        fills[-1] = [fills[-1][0] / shape.pack_slots, fills[-1][1] / shape.pack_frames]
        shapes.append(shape.pack_frames)
    assert fills[1] == pytest.approx(fills[0], abs=0.01)
    assert shapes[1] == pytest.approx(shapes[0], rel=0.05)
    assert len(Assumed(card, Forecast())) == pytest.approx(30 * 3600 / 3.43, rel=0.02)


def test_what_a_card_does_not_say_is_asked_for():
    with pytest.raises(UserError, match="card c says neither hours nor n_pairs"):
        Assumed(Card("c", "asr", "c-*.tar", "none"), Forecast())
    pairs = Assumed(Card("acavcaps", "qa", "c-*.tar", "none", n_pairs=10_000), Forecast())
    assert (len(pairs), len(pairs.columns(2).slots)) == (10_000, 10_000 - 2 * 4096)
    assert set(pairs.columns(0).n_samples.tolist()) == {160_000}  # forecast.clip_s


def test_padding_of_random_batches_by_hand():
    rows = np.zeros((4, 8), dtype=np.int64)
    rows[:, forecast.SLOTS], rows[:, forecast.FRAMES], rows[:, forecast.TARGETS] = (10, 20, 30, 40), (5, 5, 5, 5), 1
    at = forecast.Course("report", Budget(100, 20, 1), 1, rows, 1)
    found = forecast.padded(cost(tiny_lm()), at, 4, 1)
    assert (found.slots, found.frames) == (1 - 100 / 160, 0.0)
    assert found.mean == found.slowest > 1.3
    assert at.fill == (1.0, 1.0)
    c, half = cost(tiny_lm()), forecast.Course("report", Budget(200, 40, 1), 1, rows, 1)
    assert forecast.computed(c, half) - sum(forecast.useful(c, half).values()) == 100 * c.slot + 20 * c.frame
    assert forecast.computed(c, at) == sum(forecast.useful(c, at).values())


# -- the page ----------------------------------------------------------------------------------------------------------


def value(page: str, what: str, column: int) -> float:
    line = next(line for line in page.splitlines() if line[5:].startswith(what))
    return float(re.findall(r"[\d,]+\.?\d*(?:e[+-]?\d+)?", line[36:])[column].replace(",", ""))


@pytest.fixture(scope="module")
def no_activations():
    return footprint.Growth(np.zeros((6, 7)), 0)


@pytest.mark.parametrize("stage", STAGES)
def test_the_page_of_a_7b_says_where_each_line_is_from(stage, monkeypatch, no_activations):
    """Steps that are tried have tests of their own."""
    monkeypatch.setattr(footprint, "growth", lambda *_: no_activations)
    page = forecast.page(stage_of(stage, "7b"), "7b")
    lines = page.splitlines()[1:]
    assert all(re.match(r" \S|  [mda]  \S|  [mda]    \S", line) for line in lines), lines
    assert "8,281,739,904 learn" in page if stage == "stage1_align" else "LoRA" in page
    assert len(lines) < 70
    assert max(map(len, lines)) <= 130
    half = forecast.page(stage_of(stage, "7b", "forecast.mfu=0.2", "forecast.host_us=0"), "7b")
    assert value(half, "arithmetic a pack", 1) == pytest.approx(2 * value(page, "arithmetic a pack", 1), rel=0.01)
    assert value(half, "GPU-hours", 2) > 1.8 * value(page, "GPU-hours", 2)


def test_gpu_hours_of_7b_by_hand(monkeypatch, no_activations):
    """Stage 2 with the lengths of the report's histogram alone: compute.md's 1.98 TFLOP a clip, 739 h at MFU .43."""
    monkeypatch.setattr(footprint, "growth", lambda *_: no_activations)
    asked = ("batch.kind=throughput", "forecast.mfu=0.43", "forecast.clip_s.acavcaps=0", "forecast.memory_gb_s=1e9")
    page = forecast.page(stage_of("stage2_pretrain", "7b", *asked), "7b")
    assert value(page, "audio hours a GPU-hour", 2) == pytest.approx(739, rel=0.04)
    # 0.669 G gradients in float32, there and back around 80 GPUs
    assert value(page, "sent a step, DDP", 1) == pytest.approx(2 * 79 / 80 * 0.6686 * 4, rel=0.01)


def test_a_stage_on_the_tiny_corpus(tiny_data, tmp_path, capsys):
    stage = order_for("stage1_align", tiny_data, tmp_path).stage
    read_data(stage, make=True)
    page = forecast.page(stage, "mini")
    assert "2 by their index" in page or "1 by their index" in page
    assert "  a  mix" not in page
    assert value(page, "steps", 0) == 4


def test_a_list_of_shares_that_is_none_is_refused():
    with pytest.raises(ConfigError):
        stage_of("stage1_align", "mini", "forecast.mfu=lots")
    assert math.isclose(sum(Forecast().clip_share), 1.0, abs_tol=0.01)
    assert all(f.metadata["free"] for f in config.dataclasses.fields(Forecast))
    assert count(footprint.shaped(stage_of("stage1_align", "7b"))) == 8_281_739_904
    assert frames.frames(900 * 16_000) == 22_500
