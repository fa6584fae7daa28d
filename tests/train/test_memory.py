"""Memory of a step: counted to the byte, fitted, held against what there is; long clips are named or go through whole."""

import json
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch.distributed import TCPStore

from benchmarks.compute import allocated
from midasheng import config, frames
from midasheng.config import ConfigError, Optim, UserError
from midasheng.data.check import check_data
from midasheng.data.manifest import read_card
from midasheng.data.plan import Budget
from midasheng.data.room import open_data, read_data
from midasheng.model import adapt
from midasheng.model.audio_lm import AudioLM
from midasheng.model.encoder import EncoderShape
from midasheng.sample import Pack
from midasheng.train import fit as fit_room
from midasheng.train import memory, optim
from midasheng.train.memory import GIB, Dearest, Fit, Memory, full_pack, peak_bytes
from midasheng.train.meter import read_metrics
from midasheng.train.module import StageModule, Stopped
from midasheng.train.world import World
from tests.conftest import (
    Tiny,
    flac,
    ledger_rows,
    open_index,
    order_for,
    record,
    run_stage,
    tone,
    training_records,
    write_shard,
)
from tests.model import FIELDS, OMNI, VOCAB, tiny_lm
from tests.train.test_resume import on_two, same_run, stop_after

LOTS = {"hardware__memory_gib": 1}


# -- the peak, to the byte ---------------------------------------------------------------------------------------------


def test_peak_of_live_tensors_by_hand():
    """Floats of 4 bytes; what was there before does not count, views do not count again, the dead do not count."""
    before = torch.zeros(1000)

    def lives() -> None:
        a = before + 1  # 4,000
        b = a.view(10, 100).T[3:]  # its storage again
        c = torch.empty(500)  # 6,000
        del a, c  # b keeps the first 4,000
        d = b.double()  # 97 x 10 of 8 bytes: 11,760
        before.add_(1)
        del b
        torch.empty(100)  # 8,160
        del d

    assert peak_bytes(lives) == 4000 + 97 * 10 * 8
    assert peak_bytes(lambda: before.mul_(2).view(-1)[:7]) == 0
    assert peak_bytes(lambda: (torch.empty(10), torch.empty(20))) == 120
    assert peak_bytes(lambda: [len(torch.empty(10)), len(torch.empty(20))]) == 80
    assert peak_bytes(lambda: torch.empty(10), limit=40) == 40
    with pytest.raises(MemoryError, match="live tensors take 44 bytes, allowed are 40"):
        peak_bytes(lambda: torch.empty(11), limit=40)


def test_peak_of_a_backward_pass_by_hand():
    """y = exp(x) is kept; then 2y is summed and dead; backward, one slope, times 2, times y."""
    x = torch.zeros(1000, requires_grad=True)
    for _ in range(2):  # gradients of before are added to in place
        assert peak_bytes(lambda: x.exp().mul(2.0).sum().backward()) == 3 * 4000 + 2 * 4
    assert float(x.grad.sum()) == 4000


class Scratch(torch.autograd.Function):
    """x squared, with a tensor of its own in either pass."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        own = torch.ones(5000)
        return x * x * own[: len(x)]

    @staticmethod
    def backward(ctx, slope):
        own = torch.ones(9000)
        return 2 * ctx.saved_tensors[0] * slope * own[: len(slope)]


def test_peak_inside_an_autograd_function_by_hand():
    x = torch.zeros(1000, requires_grad=True)
    assert peak_bytes(lambda: Scratch.apply(x)) == 4 * 5000 + 2 * 4000
    # the function's own, 2x times slope, and that times its own; the sum and its slope
    assert peak_bytes(lambda: Scratch.apply(x).sum().backward()) == 4 * 9000 + 2 * 4000 + 2 * 4


@pytest.mark.parametrize("recompute", [[], ["decoder"]])
def test_peak_of_a_pack_is_what_the_allocator_says(recompute):
    """No kernel's own memory stands at the peak. (Fourier transforms and the convolution's backward take some, 16 kB a
    frame, when few activations live: in a narrower model than this it would be the peak.)"""
    torch.manual_seed(0)
    lm = AudioLM(EncoderShape(96, 4, 2), OMNI, FIELDS[OMNI])
    lm.recompute(recompute)
    row = full_pack(500, 400, Dearest(40, 25, 0.4), VOCAB)
    lm(row).sum().backward()
    peak = peak_bytes(lambda: lm(row).sum().backward())
    assert peak == pytest.approx(allocated(lambda: lm(row).sum().backward()), rel=1e-3)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_state_of_the_optimizer_is_that_of_one_that_has_stepped(name):
    sizes = [(3,), (64, 63), (64, 64), (4097,), (100, 77)]  # around 4,096 elements and blocks of 256
    parameters = {f"p{i}": torch.nn.Parameter(torch.zeros(size)) for i, size in enumerate(sizes)}
    adam = optim.optimizer(parameters.items(), Optim(name=name))
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    adam.step()
    kept = [t for state in adam.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    assert memory.size_of(kept) == optim.state_bytes(parameters.values(), name)
    small = list(parameters.values())[:2]
    assert optim.state_bytes(small, "adamw8bit") == 8 * (3 + 64 * 63)  # kept in float32


# -- the packs that are tried ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_frames", "slots", "most", "segments"),
    [(900, 400, Dearest(400, 300, 0.3), 3), (300, 400, Dearest(100, 300, 0.3), 4), (0, 90, Dearest(90, 0, 0.5), 1),
     (22_500, 4_600, Dearest(4_550, 22_500, 0.01), 2), (0, 1, Dearest(5, 9, 1.0), 1)],
)  # fmt: skip
def test_a_full_pack_is_full_in_as_few_segments_as_can_be(n_frames, slots, most, segments):
    row = full_pack(n_frames, slots, most, VOCAB)
    assert (len(row.ids_T), sum(row.segments), len(row.segments)) == (slots, slots, segments)
    assert sum(frames.frames(n) for n in row.clips) == n_frames
    assert max(row.segments) <= most.slots
    assert all(frames.frames(n) <= most.frames for n in row.clips)
    assert int(row.is_audio_T.sum()) == sum(frames.audio_tokens(n) for n in row.clips)
    assert sum(row.targets) == pytest.approx(min(slots * most.targets, int((~row.is_audio_T).sum())), abs=segments)
    assert not (row.is_audio_T & (row.labels_T != -100)).any()
    assert sum(row.chunks) == n_frames
    assert len(row.audio_L) == (frames.waveform(n_frames) if n_frames else 0)  # as the loader's packs


def test_more_frames_than_slots_can_hold_are_cut():
    """A user's pack_frames may be beyond what any pack of so many slots can hear."""
    row = full_pack(10_000, 100, Dearest(100, 500, 0.3), VOCAB)
    assert (sum(row.segments), len(row.keys)) == (100, 20)
    assert int(row.is_audio_T.sum()) == sum(frames.audio_tokens(n) for n in row.clips) == 100 - 2 * 20
    assert sum(row.chunks) == 10_000  # the encoder runs over them all the same


def test_a_full_pack_that_shares_holds_its_lead_once(monkeypatch):
    laid = []
    monkeypatch.setattr(memory, "pack", lambda *args: laid.append(args))
    full_pack(900, 400, Dearest(400, 300, 0.3, 14), VOCAB)
    full_pack(900, 16, Dearest(400, 300, 0.3, 14), VOCAB)
    full_pack(0, 10, Dearest(400, 300, 0.3, 14), VOCAB)
    for (samples, slots, _, _, n_frames, lead), many in zip(laid, (3, 2, 1), strict=True):
        assert len(samples) == many
        assert lead == min(14, slots - 1)
        assert lead + sum(len(s.ids) - lead for s in samples) == slots
        assert len({tuple(s.ids[:lead]) for s in samples}) == 1
        for s in samples:
            assert len(s.ids) > lead
            assert not s.is_audio[:lead].any()
            assert (s.labels[:lead] == -100).all()
            assert sum(frames.audio_tokens(len(c)) for c in s.clips) == s.is_audio.sum()
        assert sum(frames.frames(len(c)) for s in samples for c in s.clips) <= n_frames


def lora_lm() -> AudioLM:
    """As in stage 2: encoder and projector learn, and LoRA with dropout."""
    lm = tiny_lm()
    adapt.freeze_all_but(lm, ["audio_encoder.*", "audio_projector.*"])
    adapt.add_lora(lm, adapt.LoraPlan(("q_proj", "v_proj"), 2, 4.0, 0.5), seed=0)
    return lm


def memory_of(lm: AudioLM, packs: int = 2, world: int = 1) -> Memory:
    stage = config.Stage(name="tried", train=["*"])
    return Memory(lm, stage, torch.device("cpu"), Dearest(40, 25, 0.4), packs, world)


@pytest.mark.parametrize("packs", [1, 2])
@pytest.mark.parametrize("held", [False, True])
def test_trying_leaves_no_trace(packs, held):
    lm = lora_lm()
    lm.eval()
    lm.audio_encoder.train()  # some module by itself
    if held:
        for p in lm.parameters():
            p.grad = torch.full_like(p, 7.0) if p.requires_grad else None
    modes = [m.training for m in lm.modules()]
    weights = {n: t.clone() for n, t in lm.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    memory_of(lm, packs).step(252, 120)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in lm.modules()] == modes
    assert all(torch.equal(t, weights[n]) for n, t in lm.state_dict().items())
    if held:
        assert all(bool((p.grad == 7).all()) for p in lm.parameters() if p.requires_grad)
    else:
        assert all(p.grad is None for p in lm.parameters())


def test_trying_compiles_nothing():
    """Blocks that have met four sizes would be compiled for any size."""
    met: list[object] = []
    lm = tiny_lm()
    for block in [*lm.audio_encoder.blocks, *lm.decoder.model.layers]:
        block.compile(backend=lambda graph, inputs: met.append(graph) or graph.forward)
    memory_of(lm).step(252, 120)
    assert not met
    lm(full_pack(252, 120, Dearest(40, 25, 0.4), VOCAB))
    assert met


def really(lm: AudioLM, packs: int) -> int:
    """Peak of a whole second step with its optimizer, over nothing."""
    rows = [full_pack(504, 400, Dearest(40, 25, 0.4), VOCAB) for _ in range(packs)]
    adam = optim.optimizer(lm.named_parameters(), Optim())
    kept: list[torch.Tensor] = []

    def step() -> None:
        adam.zero_grad()
        for row in rows:
            lm(row).sum().backward()
        optim.clip(lm.parameters(), 1.0)
        adam.step()

    lm.train()
    step()
    adam.zero_grad()
    kept = [t for state in adam.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    kept += [*lm.parameters(), *lm.buffers(), *(t for row in rows for t in vars(row).values() if torch.is_tensor(t))]
    return memory.size_of(kept) + peak_bytes(step)


@pytest.mark.parametrize("packs", [1, 3])
@pytest.mark.parametrize("make", [tiny_lm, lora_lm])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_a_step_takes_what_was_predicted(make, packs, recompute, half):
    """Measured on a full pack: to 1 %. By the fit over packs of at most half its size: to 3 %."""
    lm = make()
    if recompute:
        lm.recompute(["audio_encoder"])
    if half:
        adapt.set_precision(lm, "bf16")
    took = really(lm, packs)
    lm.zero_grad()
    tried = memory_of(lm, packs)
    assert tried.step(504, 400) == pytest.approx(took, rel=0.01)
    fit = tried.fit(Budget(400, 504, packs))
    assert tried.needs(fit, Budget(400, 504, packs)) == pytest.approx(took, rel=0.03)
    assert 0 < fit.residual < 0.01 * took
    assert min(fit.step[1:]) > 0
    assert 4 * 640 <= fit.loaded[1] < 4 * 800  # samples
    assert 25 <= fit.loaded[2] < 40  # ids, labels, positions, is_audio, and some indices
    other = memory_of(lm, 5)
    assert tried.needs(fit, Budget(400, 504, 5)) == pytest.approx(other.step(504, 400), rel=0.03)


def test_what_is_counted_beside_a_pack():
    lm = lora_lm()
    gradients = 4 * sum(p.numel() for p in lm.parameters() if p.requires_grad)
    one, many, two = memory_of(lm, 1), memory_of(lm, 2), memory_of(lm, 2, world=2)
    assert many.before - one.before == gradients  # found by the second pack
    assert two.before - many.before == gradients  # DDP's copy
    assert many.step(252, 120) - one.step(252, 120) > gradients / 2
    parameters = sum(p.numel() * p.element_size() for p in lm.parameters())
    assert one.state >= parameters + gradients + one.beside


@pytest.mark.parametrize("packs", [1, 3])
@pytest.mark.parametrize("kind", ["report", "throughput"])
def test_the_largest_budget_is_the_last_that_fits(kind, packs):
    """The next larger one does not: 256 slots more of a pack, or one pack less that has them all."""
    stage = config.Stage(batch=config.Batch(kind=kind))
    shape, step = Budget(1000, 500, packs), memory_of(lora_lm(), packs)
    fit = Fit(np.array([1000.0, 2.0, 10.0]), np.array([0.0, 0.5, 0.25]), 50.0)
    assert step.needs(fit, shape) == step.needs(fit._replace(residual=0.0), shape) + 50
    chosen = []
    more_packs = step.gradients if packs == 1 and kind == "report" else 0
    for limit in (2_000, 5_000, 16_000, 40_000, 80_000):
        best = step.largest(fit, stage, shape, limit + more_packs)
        if best is None:
            continue
        chosen.append(best)
        more = best.packs_per_step
        assert best.pack_frames == -(-best.pack_slots // 2)
        if kind == "report":
            assert best.pack_slots == -(-1000 * packs // more)
            next_one = (
                Budget(-(-1000 * packs // (more - 1)), -(-500 * packs // (more - 1)), more - 1) if more > 1 else None
            )
        else:
            assert (best.pack_slots % 256, more) == (0, packs)
            next_one = Budget(best.pack_slots + 256, -(-(best.pack_slots + 256) // 2), packs)

        def by_hand(b: Budget) -> float:
            each = 1050 + 2 * b.pack_frames + 10 * b.pack_slots
            again = b.packs_per_step * (0.5 * b.pack_frames + 0.25 * b.pack_slots)
            return each + again - (step.gradients if packs == 1 and b.packs_per_step == 1 and kind == "report" else 0)

        assert by_hand(best) <= limit
        assert next_one is None or by_hand(next_one) > limit
    assert len({b.pack_slots for b in chosen}) >= 2
    assert step.largest(fit, stage, shape, 1_049) is None
    # where packs share, each has its lead besides: twice as many have half of the rest
    shared = step.largest(fit, stage, Budget(1000 + 20, 500, packs, (1,) * 20), limit + more_packs)
    each = 1000 * packs / shared.packs_per_step if kind == "report" else shared.pack_slots - 20
    assert shared.own_slots == pytest.approx(each, abs=1)
    assert shared.pack_frames == pytest.approx(shared.own_slots / 2, abs=1)
    stage.batch.pack_frames = 77
    assert step.largest(fit, stage, shape, 1e9).pack_frames == 77


# -- a run -------------------------------------------------------------------------------------------------------------


def written(folder: Path) -> dict[str, float]:
    """Every file below a folder with its time of change."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def tried(monkeypatch: pytest.MonkeyPatch, events: list[object]) -> None:
    """Note what is tried and trained, in order."""
    step, training_step = Memory.step, StageModule.training_step

    def seen_step(self, n_frames, slots):
        events.append((slots, n_frames))
        return step(self, n_frames, slots)

    def seen_training_step(self, batch, batch_idx):
        events.append(f"step {batch.step}")
        training_step(self, batch, batch_idx)

    monkeypatch.setattr(Memory, "step", seen_step)
    monkeypatch.setattr(StageModule, "training_step", seen_training_step)


def test_results_do_not_depend_on_what_was_tried(tiny, tmp_path):
    """Dropout, a fresh encoder, and a hand-over: equal bit for bit, and the header says what was found."""
    for stage in ("stage1_align", "stage2_pretrain"):
        plain = run_stage(stage, tiny, tmp_path / "plain")
        known = run_stage(stage, tiny, tmp_path / "known", **LOTS)
        same_run(plain, known)
        assert "how much there is is not known" in (plain / "trainable.txt").read_text()
        text = (known / "trainable.txt").read_text()
        assert "allowed are 0.9 (90 % of 1)" in text
        assert "by a fit of 4 smaller packs" in text


def test_the_worst_pack_runs_before_the_first_step_and_before_a_resume(tiny, tmp_path, monkeypatch):
    events: list[object] = []
    data = read_data(order_for("stage1_align", tiny, tmp_path).stage, make=True)
    full = (data.budget.pack_slots, data.budget.pack_frames)
    with monkeypatch.context() as patch:
        tried(patch, events)
        stop_after(patch, 1)
        with pytest.raises(Stopped):
            run_stage("stage1_align", tiny, tmp_path, **LOTS)
    assert events.count(full) == 1
    assert events[events.index(full) + 1 :] == ["step 0", "step 1"]
    del events[:]
    with monkeypatch.context() as patch:
        tried(patch, events)
        run_stage("stage1_align", tiny, tmp_path, **LOTS)
    assert events[-3:] == [full, "step 2", "step 3"]
    assert events.count(full) == 1


@pytest.mark.parametrize("kind", ["report", "throughput"])
def test_packs_that_do_not_fit_are_an_error_before_anything_is_written(tiny, tmp_path, kind, monkeypatch):
    """Without running one, and what the error says to write runs."""
    more = {"hardware__memory_gib": 0.02, "batch__kind": kind, "batch__pack_slots": 1200, "batch__clips_per_step": 60}
    with monkeypatch.context() as patch:
        patch.setattr(Memory, "worst", lambda self, shape: pytest.fail("run"))
        with pytest.raises(UserError) as error:
            run_stage("stage1_align", tiny, tmp_path / "runs", **more)
    assert not (tmp_path / "runs").exists()
    number, written_ = r"(\d\.\d+)", {"report": "batch.packs_per_step", "throughput": "batch.pack_slots"}[kind]
    found = re.fullmatch(
        rf"packs of (\d+) slots and (\d+) frames: a step takes {number} GiB of memory, allowed are 0.018 \(90 % of "
        rf"0.02\); packs of (\d+) slots and (\d+) frames would fit; write {written_}=(\d+) or "
        r"hardware.recompute=\[audio_encoder,decoder\]",
        str(error.value),
    )
    assert found, str(error.value)
    assert float(found[3]) > 0.018
    if kind == "throughput":
        assert found[6] == found[4]
        assert int(found[4]) % 256 == 0
    more[written_.replace(".", "__")] = int(found[6])
    run_stage("stage1_align", tiny, tmp_path / "runs", run__length="2 steps", **more)


def test_state_that_alone_does_not_fit(tiny, tmp_path):
    with pytest.raises(UserError, match=r"no pack is known to fit; write batch.packs_per_step=4 or hardware.recompute"):
        run_stage("stage1_align", tiny, tmp_path, hardware__memory_gib=0.001)
    auto = {"batch__kind": "throughput", "batch__pack_slots": "auto"}
    with pytest.raises(UserError, match=r"^batch.pack_slots=auto: packs of 2048 slots .* takes 0.0015"):
        run_stage("stage1_align", tiny, tmp_path, hardware__memory_gib=0.001, **auto)


@pytest.mark.parametrize("what", [torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), MemoryError()])
def test_out_of_memory_names_the_budget(tiny, tmp_path, monkeypatch, what):
    full = read_data(order_for("stage1_align", tiny, tmp_path).stage, make=True).budget.pack_slots
    forward = AudioLM.forward

    def full_only(self, row):
        if len(row.ids_T) == full:
            raise what
        return forward(self, row)

    monkeypatch.setattr(AudioLM, "forward", full_only)
    with pytest.raises(
        UserError, match=rf"^packs of {full} slots and \d+ frames: out of memory \(\w.*write batch.packs_"
    ):
        run_stage("stage1_align", tiny, tmp_path / "runs", **LOTS)
    assert not (tmp_path / "runs").exists()


def test_a_worst_pack_that_is_worse_than_the_fit_is_an_error(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Memory, "worst", lambda self, shape: 2 * GIB)
    with pytest.raises(UserError, match=r"a step takes 2 GiB of memory, allowed are 0.9 \("):
        run_stage("stage1_align", tiny, tmp_path / "runs", **LOTS)


def test_a_resume_where_there_is_less_memory(tiny, tmp_path, monkeypatch):
    """Refused by name, nothing lost: with more memory, or less of it used, it goes on."""
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stopped):
            run_stage("stage1_align", tiny, tmp_path, **LOTS)
    before = written(tmp_path)
    with pytest.raises(
        UserError, match=r"allowed are 0.0036 .* write NAME=... for another run with batch.packs_per_step"
    ):
        run_stage("stage1_align", tiny, tmp_path, hardware__memory_gib=0.004)
    assert written(tmp_path) == before
    run_stage("stage1_align", tiny, tmp_path)


# -- batch.pack_slots=auto ---------------------------------------------------------------------------------------------

AUTO = {"batch__kind": "throughput", "batch__pack_slots": "auto", "optim__name": "adamw"}


def slots_of(run: Path) -> object:
    return config.saved(run / "config.yaml")["batch.pack_slots"]


def test_auto_is_as_many_slots_as_fit_and_stays(tiny, tmp_path, monkeypatch):
    """A resume keeps it on any hardware; the same run with the number written out."""
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stopped):
            run_stage("stage1_align", tiny, tmp_path / "auto", hardware__memory_gib=0.02, **AUTO)
    folder = tmp_path / "auto/mini/stage1_align"
    slots = slots_of(folder)
    assert slots % 256 == 0
    text = (folder / "trainable.txt").read_text()
    assert f"packs a step of {slots} slots" in text
    assert f"the largest that fits: packs of {slots} slots" in text
    assert "what memory allowed" in (folder / "config.yaml").read_text()
    with pytest.raises(UserError, match=rf"packs of {slots} slots .* NAME=... for another run"):
        run_stage("stage1_align", tiny, tmp_path / "auto", hardware__memory_gib=0.01, **AUTO)
    run_stage("stage1_align", tiny, tmp_path / "auto", hardware__memory_gib=1, **AUTO)
    assert slots_of(folder) == slots
    number = AUTO | {"batch__pack_slots": slots}
    same_run(folder, run_stage("stage1_align", tiny, tmp_path / "number", **number))
    run_stage("stage1_align", tiny, tmp_path / "auto", **number)  # finished, and the same run
    run_stage("stage1_align", tiny, tmp_path / "auto", **AUTO)  # nothing is looked for
    read = read_data(config.of_run(folder / "config.yaml"), make=False)  # as audit does
    assert read.budget.pack_slots == slots
    run_stage("stage1_align", tiny, tmp_path / "auto", hardware__memory_gib=0.03, fresh=True, **AUTO)
    assert slots_of(folder) > slots


def test_auto_asks_for_what_it_needs(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"on a CPU say how much there is: hardware.memory_gib="):
        run_stage("stage1_align", tiny, tmp_path, **AUTO)
    for more, message in (
        ({"batch__pack_slots": "auto"}, "auto is for batch.kind=throughput"),
        ({"batch__pack_slots": "lots"}, "'lots'; write a number of slots, or auto"),
        ({"batch__pack_slots": 0}, "0; write a number of slots, or auto"),
        ({"batch__pack_slots": 1.5}, "pack_slots: 1.5|'1.5'"),
        ({"hardware__memory_gib": -1}, "hardware.memory_gib: -1.0; write GiB"),
    ):
        with pytest.raises(ConfigError, match=message):
            order_for("stage1_align", tiny, tmp_path, **more)


def test_two_processes_train_with_what_the_first_found(tiny, tmp_path):
    done = on_two(tmp_path, tiny, hardware__memory_gib=0.02, **AUTO)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "mini/stage1_align"
    assert list(ledger_rows(folder)) == [0, 1, 2, 3]
    assert slots_of(folder) % 256 == 0


def test_another_process_waits_for_the_first(tiny, tmp_path):
    """It never decides, also where the folder of a former run is to be written over."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    first, other = World(0, 2, store), World(1, 2, store)
    order = order_for("stage1_align", tiny, tmp_path, fresh=True, **AUTO)
    sources = open_data(order.stage, make=True)
    order.folder.mkdir(parents=True)
    (order.folder / "config.yaml").write_text("batch.pack_slots: 512\n")  # of a former run
    timer = threading.Timer(0.7, lambda: first.of_first("the size of a pack", lambda: 768))
    timer.start()
    settled = memory.pack_slots(order, sources, lambda: pytest.fail("built a model"), other, "ddp")
    timer.join()
    assert settled.stage.batch.pack_slots == 768


def test_data_of_a_stage_with_auto_can_be_checked(tiny, tmp_path):
    stage = order_for("stage1_align", tiny, tmp_path, **AUTO).stage
    found = check_data(stage)
    assert not found.errors
    assert any("planned here with 8192 slots" in remark for remark in found.remarks)


# -- clips that fit no pack, and long ones that do ---------------------------------------------------------------------


def with_talk(tiny: Tiny, folder: Path, seconds: float, share: float = 50.0, others: int = 42) -> dict[str, object]:
    """Settings for the tiny data beside a corpus of one long talk, and a few of tones."""
    root = folder / "data"
    shutil.copytree(tiny.manifests.parent, root / "manifests")
    shutil.copytree(tiny.shards, root / "shards", ignore=shutil.ignore_patterns(".index"))
    talks = [("talk", flac(np.tile(tone(30.0, 5), round(seconds / 30 + 0.5))[: round(seconds * 16_000)]), record(0))]
    talks += [(f"short{n}", flac(tone(0.5, n)), record(n)) for n in range(others)]
    write_shard(root / "shards" / "talk-000000.tar", talks)
    card = yaml.safe_load((root / "manifests/corpora/tiny_caption.yaml").read_text())
    card |= {"name": "talks", "shards": "talk-*.tar"}
    del card["held_out"]
    (root / "manifests/corpora/talks.yaml").write_text(yaml.safe_dump(card))
    for mix in ("align", "pretrain"):
        corpora = {"tiny_caption": 100 - share, "talks": share}
        (root / "manifests/tiny" / f"{mix}.yaml").write_text(yaml.safe_dump({"corpora": corpora}))
    return {"data__root": root / "shards", "data__manifests": root / "manifests/tiny", "batch__kind": "throughput"}


def test_a_clip_that_fits_no_pack_is_named_before_training(tiny, tmp_path, capsys):
    """One of 43: said before step 0, with what to write; then it fits. The note stands in the run folder."""
    more = with_talk(tiny, tmp_path, 20.0) | {"run__length": "2 steps", "data__max_audio_s": 30}
    run = run_stage("stage1_align", tiny, tmp_path / "runs", batch__pack_slots=100, batch__pack_frames=450, **more)
    note = next(line for line in (run / "trainable.txt").read_text().splitlines() if "note:" in line)
    assert "corpus talks: 1 of 43 records may fit no pack" in note
    assert "the longest, talk, is 20.0 s and " in note
    assert note in capsys.readouterr().out
    assert note.endswith("or write batch.pack_slots=256 (kind throughput) and batch.pack_frames=500")
    larger = order_for("stage1_align", tiny, tmp_path, batch__pack_slots=256, batch__pack_frames=500, **more)
    assert not read_data(larger.stage, make=False).notes


def test_long_clips_that_fit_no_pack_are_an_error_that_names_the_longest(tiny, tmp_path):
    more = with_talk(tiny, tmp_path, 20.0, others=3)
    order = order_for("stage1_align", tiny, tmp_path, batch__pack_slots=100, batch__pack_frames=450, **more)
    with pytest.raises(
        UserError, match=r"corpus talks: 1 of 4 .* the longest, talk, is 20.0 s and 1\d\d slots. .*data.max"
    ):
        fit_room.fit(order)
    assert not order.folder.exists()


def test_records_over_a_size_are_those_that_cost_more(tiny_data, chat):
    """Of every shard, with the longest variant or with all together, against the records themselves."""
    for name, together in (("tiny_caption", False), ("tiny_qa", True), ("tiny_text", False)):
        card = replace(
            read_card(tiny_data.manifests.parent / "corpora" / f"{name}.yaml"), answers="all" if together else "one"
        )
        corpus = open_index(card, tiny_data.shards, chat)
        costs = {}
        for r in training_records(corpus):
            of = [r.slots(v) for v in range(len(r.variants))]
            costs[r.key] = (sum(of), r.frames * len(of)) if together else (max(of), r.frames)
        for most in ((60, 10_000), (10_000, 30), (100, 60), (0, 0), (10_000, 10_000)):
            over = {key: (slots, n) for key, slots, n in corpus.over(*most)}
            assert over == {k: c for k, c in costs.items() if c[0] > most[0] or c[1] > most[1]}
        rows = corpus.rows
        assert max(r.most_slots for r in rows) == max(c[0] for c in costs.values())
        assert max(r.most_frames for r in rows) == max(c[1] for c in costs.values())


def test_a_clip_of_15_minutes_goes_through_stage_2_in_one_piece(tiny, tmp_path, monkeypatch):
    """4,500 audio tokens in one segment; where packs are too small, it is named with what to write instead."""
    more = with_talk(tiny, tmp_path, 900.0) | {"data__max_audio_s": 1000}
    run_stage("stage1_align", tiny, tmp_path / "runs", **more | {"data__max_audio_s": 10, "batch__pack_slots": 300})
    more |= {"run__length": "2 steps", "batch__packs_per_step": 1, "log__val_every": 100, "data__val_clips": 2}
    small = order_for("stage2_pretrain", tiny, tmp_path / "runs", batch__pack_slots=4096, **more)
    note = read_data(small.stage, make=True).notes
    assert len(note) == 1
    assert "the longest, talk, is 900.0 s and 45" in note[0]
    slots = int(re.search(r"batch.pack_slots=(\d+) \(kind throughput\) and batch.pack_frames=22500$", note[0])[1])
    more["batch__pack_frames"] = 22_500
    rows: list[Pack] = []
    forward = AudioLM.forward

    def seen(self, row):
        if self.training:
            rows.append(row)
        return forward(self, row)

    monkeypatch.setattr(AudioLM, "forward", seen)
    run = run_stage("stage2_pretrain", tiny, tmp_path / "runs", batch__pack_slots=slots, **more)
    losses = [row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    assert np.isfinite(losses).all()
    long = [row for row in rows if "talk" in row.keys]
    assert long
    for row in long:
        segment = row.keys.index("talk")
        start = sum(row.segments[:segment])
        inside = row.is_audio_T[start : start + row.segments[segment]]
        assert int(inside.sum()) == 4500
        assert 900 * 16_000 in row.clips
    kept = json.loads((run / "weights" / "stage.json").read_text())["skipped"]
    assert "fits no pack" not in str(kept)
