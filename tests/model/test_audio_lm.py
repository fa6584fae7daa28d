"""A packed row gives each conversation what it would get alone: loss, logits, gradients, and its audio in its place."""

import dataclasses
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from midasheng import frames
from midasheng.config import KERNELS, UserError
from midasheng.model import adapt, attention, encoder
from midasheng.model.attention import dense_attention
from midasheng.model.audio_lm import AudioLM
from midasheng.sample import NO_TARGET, Pack, Sample, pack
from tests.model import (
    AUDIO,
    FIELDS,
    LLAMA,
    OMNI,
    PAD,
    QWEN3,
    TINY,
    VOCAB,
    conversation,
    gradients,
    logits,
    packed,
    tiny_lm,
)

BOTH = pytest.mark.parametrize("architecture", [OMNI, QWEN3])


def talks() -> list[Sample]:
    """Without a clip, with one that is cut into three chunks, with two, with a short one."""
    clips = [(), (640 * 505,), (5_000, 33_333), (3_200,)]
    return [conversation(number, *lengths, answer=3 + number) for number, lengths in enumerate(clips)]


def difference_to_one_by_one(lm: AudioLM) -> float:
    """Largest relative difference of losses and of any gradient (norms) between one pack and four."""
    samples = talks()
    row, alone = packed(*samples, tail=11), [packed(s) for s in samples]
    with torch.no_grad():
        losses = torch.cat([lm(one) for one in alone])
        worst = ((lm(row)[:-1] - losses).abs() / losses).max()
    wanted = gradients(lm, alone)
    for name, gradient in gradients(lm, [row]).items():
        other = wanted[name]
        assert gradient is not None, name
        assert other is not None, name
        if name.endswith("k_proj.bias") and "qwen2_5" in lm.decoder.config.model_type:
            continue  # softmax is blind to it within a segment: nothing but rounding
        worst = max(worst, (gradient - other).norm() / other.norm())
    return float(worst)


@pytest.mark.parametrize("architecture", [OMNI, QWEN3, LLAMA])
@pytest.mark.parametrize("recompute", [(), ("audio_encoder", "decoder")], ids=["kept", "recomputed"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_packed_is_one_by_one(architecture, recompute, training):
    """Loss and every gradient, in float64 to 1e-12: what differs in float32 is rounding and nothing else."""
    lm = tiny_lm(architecture)
    lm.recompute(recompute)
    assert difference_to_one_by_one(lm.train(training)) < 3e-6
    bn = lm.double().audio_encoder.init_bn  # always float32 otherwise

    def in_float64(mel):
        scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
        return (mel.double() - bn.running_mean[:, None]) * scale[:, None] + bn.bias[:, None]

    bn.forward = in_float64
    assert difference_to_one_by_one(lm) < 1e-12


def ignores_segments(q, k, v, segments, *, causal, scale=None):
    return dense_attention(q, k, v, [q.shape[1]], causal=causal, scale=scale)


@pytest.mark.parametrize("tower", [encoder, attention], ids=["encoder", "decoder"])
def test_a_leak_in_either_tower_would_be_seen(tower, monkeypatch):
    monkeypatch.setattr(tower, "segment_attention", ignores_segments)
    assert difference_to_one_by_one(tiny_lm()) > 1e-3


Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def others(lm: AudioLM, first: list[Sample], second: list[Sample], changed: int) -> Pairs:
    """Logits of the unchanged samples in the two packs."""
    rows = [packed(*samples, tail=3) for samples in (first, second)]
    split = [logits(lm.eval(), row).split(row.segments) for row in rows]
    return [(a, b) for i, (a, b) in enumerate(zip(*split, strict=True)) if i not in (changed, len(first))]


@BOTH
@pytest.mark.parametrize("changed", [1, 2])
def test_another_sample_of_the_same_lengths_changes_no_bit_of_the_others(architecture, changed):
    lm, first = tiny_lm(architecture), talks()
    lengths = [len(clip) for clip in first[changed].clips]
    second = list(first)
    second[changed] = conversation(99, *lengths, answer=3 + changed)
    assert len(second[changed].ids) == len(first[changed].ids)
    for a, b in others(lm, first, second, changed):
        assert torch.equal(a, b)


@BOTH
def test_another_sample_of_other_lengths_changes_the_others_by_rounding_only(architecture):
    lm, first = tiny_lm(architecture), talks()
    second = [first[0], conversation(99, 20_000, 7_777, answer=17), *first[2:]]
    for a, b in others(lm, first, second, 1):
        assert (a - b).abs().max() < 1e-5 * a.abs().max()


def test_the_dummy_tail_has_no_influence_and_no_loss():
    lm = tiny_lm()
    tails = [packed(*talks(), tail=20, pad=pad) for pad in (0, 7)]
    first, second = (logits(lm, row)[:-20] for row in tails)
    assert torch.equal(first, second)
    assert lm(tails[0])[-1] == 0
    without = lm(packed(*talks()))
    assert (lm(tails[0])[:-1] - without).abs().max() < 1e-5 * without.max()


@BOTH
def test_a_pack_without_audio_gives_zero_gradients_to_the_audio_side(architecture):
    lm = tiny_lm(architecture)
    found = gradients(lm, [packed(conversation(0), conversation(1))])
    assert not [name for name, gradient in found.items() if gradient is None]
    audio = [g for name, g in found.items() if name.startswith("audio_")]
    assert audio
    assert not any(g.any() for g in audio)
    assert found["decoder.lm_head.weight"].any()


def test_a_pack_without_targets_gives_zero_gradients():
    sample = conversation(0, 5_000)
    silent = dataclasses.replace(sample, labels=sample.labels * 0 + NO_TARGET)
    lm = tiny_lm()
    assert not lm(packed(silent)).any()
    assert not [name for name, g in gradients(lm, [packed(silent)]).items() if g is None or g.any()]


def test_loss_is_the_cross_entropy_of_the_labels_and_of_nothing_else():
    lm, samples = tiny_lm(), talks()
    first = samples[1].labels.copy()
    first[0] = 9  # a segment may begin with a slot that has a target
    samples[1] = dataclasses.replace(samples[1], labels=first)
    row = packed(*samples, tail=5)
    every = F.cross_entropy(logits(lm, row), row.labels_T, ignore_index=NO_TARGET, reduction="none")
    wanted = torch.stack([part.sum() for part in every.split(row.segments)])
    assert row.targets == (3, 5, 5, 6)  # the answers, not the prompts
    assert (lm(row) - wanted).abs().max() < 1e-5 * wanted.max()


def test_audio_tokens_stand_at_their_own_slots_in_order():
    lm, samples = tiny_lm(), talks()
    with torch.no_grad():
        row = packed(*samples)
        placed = lm.place(row)
        alone = [lm.encode(torch.from_numpy(clip), [len(clip)]) for s in samples for clip in s.clips]
        text = lm.decoder.embed(row.ids_T)
    assert (placed[row.is_audio_T] - torch.cat(alone)).abs().max() < 1e-5
    assert torch.equal(placed[~row.is_audio_T], text[~row.is_audio_T])


def test_the_audio_token_itself_is_never_embedded():
    lm, row = tiny_lm(), packed(*talks())
    beyond = dataclasses.replace(row, ids_T=row.ids_T.masked_fill(row.is_audio_T, 10 * VOCAB))  # has no row at all
    assert torch.equal(logits(lm, row), logits(lm, beyond))
    assert not gradients(lm, [row])["decoder.model.embed_tokens.weight"][AUDIO].any()


def test_slots_and_tokens_must_be_equal_and_the_samples_are_named():
    good = conversation(5, 16_000)
    short = dataclasses.replace(good, clips=(good.clips[0][:12_000],))
    with pytest.raises(AssertionError, match="5 audio slots but 3 audio tokens in the pack of sample5"):
        tiny_lm()(packed(short))


# -- memory ------------------------------------------------------------------------------------------------------------


def kept(lm: AudioLM, row: Pack) -> int:
    """Bytes that a forward pass keeps for the backward pass, parameters aside."""
    lm.zero_grad()
    own = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    found: dict[int, int] = {}

    def pack_hook(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda t: t):
        loss = lm(row).sum()
    loss.backward()
    return sum(found.values())


@BOTH
@pytest.mark.parametrize("parts", [["audio_encoder"], ["decoder"], ["audio_encoder", "decoder"]])
def test_recomputed_activations_give_the_same_gradients_in_less_memory(architecture, parts):
    row = packed(*talks(), tail=11)
    lm = tiny_lm(architecture)
    wanted, before = gradients(lm, [row]), kept(lm, row)
    lm.recompute(parts)
    for name, gradient in gradients(lm, [row]).items():
        assert torch.equal(gradient, wanted[name]), name
    assert kept(lm, row) < (0.85 if len(parts) == 1 else 0.5) * before
    assert difference_to_one_by_one(lm) < 1e-5


def test_a_frozen_part_is_not_recomputed():
    """It would cost half as much again, for nothing that was asked for."""
    lm = tiny_lm()
    adapt.freeze_all_but(lm, ["audio_encoder.*"])
    adapt.add_lora(lm, adapt.LoraPlan(("q_proj",), 2, 4.0, 0.0), seed=0)
    lm.recompute(["audio_encoder"])
    with pytest.raises(UserError, match="decoder is frozen"):
        lm.recompute(["decoder"])
    with pytest.raises(UserError, match="'encoder'; write audio_encoder or decoder"):
        lm.recompute(["encoder"])


# -- one shape for every pack, and nothing that the host waits for ------------------------------------------------------


def fixed(*samples: Sample, slots: int = 400, n_frames: int = 900) -> Pack:
    return pack(list(samples), slots, PAD, None, n_frames)


@BOTH
def test_dummy_frames_change_nothing(architecture):
    """Talks of 682 frames in a pack of 900: loss and gradients are those of the clips alone."""
    lm = tiny_lm(architecture)
    plain, filled = packed(*talks(), tail=9), pack(talks(), len(packed(*talks(), tail=9).ids_T), PAD, None, 900)
    assert (sum(plain.chunks), sum(filled.chunks)) == (sum(frames.frames(n) for n in plain.clips), 900)
    assert (lm(plain) - lm(filled)).abs().max() < 1e-5 * lm(plain).max()
    wanted = gradients(lm, [plain])
    for name, gradient in gradients(lm, [filled]).items():
        if not name.endswith("k_proj.bias"):
            assert (gradient - wanted[name]).abs().max() <= 1e-5 * wanted[name].abs().max(), name


def test_a_pack_of_dummy_frames_alone_gives_zero_gradients_to_the_audio_side():
    lm = tiny_lm()
    found = gradients(lm, [fixed(conversation(0), conversation(1))])
    audio = [g for name, g in found.items() if name.startswith("audio_")]
    assert not [name for name, g in found.items() if g is None]
    assert not any(g.any() for g in audio)


def faked(row: Pack, device: str) -> Pack:
    """The pack with tensors that have a shape and a device, and no content."""
    tensors = {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
    empty = {
        k: torch.empty(t.shape, dtype=t.dtype, device=device) for k, t in tensors.items() if isinstance(t, torch.Tensor)
    }
    return dataclasses.replace(row, **empty)


def fake_lm(architecture: str, device: str) -> AudioLM:
    with torch.device(device):
        lm = AudioLM(TINY, architecture, FIELDS[architecture])
    tables = torch.empty(512, device=device), torch.empty(257, 64, device=device)
    lm.audio_encoder.log_mel.tables = lambda _: tables  # made once, at the first clip
    return lm


@BOTH
@pytest.mark.parametrize("recompute", [(), ("audio_encoder", "decoder")])
def test_forward_and_backward_read_nothing_from_the_device(architecture, recompute):
    """Tensors without content: an .item(), a nonzero, a boolean index or a masked_select would raise."""
    row = fixed(*talks())
    with FakeTensorMode():
        lm = fake_lm(architecture, "cpu")
        lm.recompute(recompute)
        lm(faked(row, "cpu")).sum().backward()
        assert all(p.grad is not None for p in lm.parameters())
        with pytest.raises(DataDependentOutputException):
            lm(faked(row, "cpu")).sum().item()


COUNTS = {"aten::nonzero", "aten::masked_select", "aten::_local_scalar_dense", "aten::item", "aten::_unique2"}


@BOTH
def test_no_operation_asks_inside_for_a_count(architecture):
    """What tensors without content do not show: masked_scatter's backward selects by mask, and waits for the number."""
    lm, row = tiny_lm(architecture), fixed(*talks())
    lm(row)  # tables of the front end are made once
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        lm(row).sum().backward()
    names = {event.name for event in seen.events()}
    assert "aten::index_copy" in names
    assert not names & COUNTS


@BOTH
@pytest.mark.parametrize("kernel", KERNELS)
def test_on_a_gpu_nothing_stays_on_the_host(architecture, kernel):
    row = fixed(*talks())
    attention.ask(kernel)
    try:
        with FakeTensorMode():
            assert fake_lm(architecture, "cuda")(faked(row, "cuda")).device.type == "cuda"
    finally:
        attention.ask("auto")


COMPILED = """
import torch
from tests.model import conversation, gradients, tiny_lm
from tests.model.test_audio_lm import fixed, talks
plain, lm = tiny_lm({0!r}), tiny_lm({0!r})
lm.compile_blocks("eager")
many = [fixed(*talks()), fixed(conversation(5, 64_000)), fixed(conversation(6), conversation(7, 3_200, 9_000))]
found, wanted = gradients(lm, many[:1]), gradients(plain, many[:1])
assert all((found[n] - g).abs().max() <= 1e-4 * g.abs().max() + 1e-6 for n, g in wanted.items())
compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
with torch._dynamo.config.patch(error_on_recompile=True):
    for row in many:
        assert (lm(row) - plain(row)).abs().max() < 1e-5 * plain(row).max()
        gradients(lm, [row])
print("compiled once:", compiled)
"""


@BOTH
def test_compiled_blocks_are_compiled_once_for_all_packs_of_a_shape(architecture):
    """In a process of its own: type checks of the tests are not to be compiled."""
    ran = subprocess.run([sys.executable, "-c", COMPILED.format(architecture)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout.split("compiled once:")[1]) > 0
