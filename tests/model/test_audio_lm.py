"""A packed row gives each conversation what it would get alone: loss, logits, gradients, and its audio in its place."""

import dataclasses
import subprocess
import sys
from functools import partial

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
    questions,
    shared_pack,
    tiny_lm,
    whole,
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


def in_float64(lm: AudioLM) -> AudioLM:
    """Also what is always float32 otherwise: RMSNorm rounds gradients, alone before they are summed over samples and
    shared behind it."""
    bn = lm.double().audio_encoder.init_bn

    def forward(mel):
        scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
        return (mel.double() - bn.running_mean[:, None]) * scale[:, None] + bn.bias[:, None]

    def normed(norm, x):
        return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)

    bn.forward = forward
    for module in lm.decoder.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = partial(normed, module)
    return lm


@pytest.mark.parametrize("architecture", [OMNI, QWEN3, LLAMA])
@pytest.mark.parametrize("recompute", [(), ("audio_encoder", "decoder")], ids=["kept", "recomputed"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_packed_is_one_by_one(architecture, recompute, training):
    """Loss and every gradient, in float64 to 1e-12: what differs in float32 is rounding and nothing else."""
    lm = tiny_lm(architecture)
    lm.recompute(recompute)
    assert difference_to_one_by_one(lm.train(training)) < 3e-6
    assert difference_to_one_by_one(in_float64(lm)) < 1e-12


# -- what samples have in common, once ----------------------------------------------------------------------------------


def family(lead: int) -> list[Sample]:
    """Runs of 2 to 5 with their clip in the trunk, one of them in two chunks, and two runs without; between them samples
    for themselves, with two clips and with none. In the row every trunk stands behind all leaves."""
    runs = [(3, 5_000), (1, 33_333, 3_200), (1,), (2, 640 * 260), (2,), (5, 9_000), (4,)]
    return [s for seed, (count, *clips) in enumerate(runs) for s in questions(seed, count, *clips, lead=lead)]


Found = tuple[torch.Tensor, dict[str, torch.Tensor]]


def found_in(lm: AudioLM, rows: list[Pack]) -> Found:
    """Losses of the samples of all rows, gradients of their sum."""
    lm.zero_grad()
    losses = []
    for row in rows:
        loss_S = lm(row)
        loss_S.sum().backward()
        losses.append(loss_S.detach()[: len(row.keys)])
        assert not loss_S[len(row.keys) :].any()
    assert not [n for n, p in lm.named_parameters() if p.grad is None]
    return torch.cat(losses), {n: p.grad for n, p in lm.named_parameters()}


def apart(found: Found, wanted: Found) -> tuple[float, float]:
    """Largest relative difference of a loss and of a gradient (norms)."""
    losses = ((found[0] - wanted[0]).abs() / wanted[0]).max()
    gradients = [(found[1][name] - g).norm() / g.norm() for name, g in wanted[1].items()]
    return float(losses), float(torch.stack(gradients).max())


@pytest.mark.parametrize("lead", [0, 4, 14, 22])
@pytest.mark.parametrize("architecture", [OMNI, QWEN3, LLAMA])
def test_what_is_shared_changes_no_loss_and_no_gradient(architecture, lead):
    """Against each sample alone, in training and in eval(), activations kept and computed again. In float32 the same
    samples in one pack without sharing are as far from each one alone: up to 3e-6 in a gradient."""
    samples = family(lead)
    row, alone = shared_pack(samples, lead, tail=7), [packed(s) for s in whole(samples)]
    assert row.shared == 5 + bool(lead)
    lm = tiny_lm(architecture)
    losses, gradients = apart(found_in(lm, [row]), found_in(lm, alone))
    assert losses < 1e-6
    assert gradients < 4e-6
    wanted = found_in(in_float64(lm), alone)
    for parts in ((), ("audio_encoder", "decoder")):
        lm.recompute(parts)
        for training in (True, False):
            assert max(apart(found_in(lm.train(training), [row]), wanted)) < 1e-12


def test_unshared_packs_are_what_they_were():
    lm = tiny_lm()
    row = packed(*whole(family(4)), tail=7)
    assert (row.shared, set(row.parents), len(row.seen_A)) == (0, {-1}, 0)
    plain = attention.Segments(row.segments, row.segment_bounds)
    assert torch.equal(lm.decoder(lm.place(row), row.position_T, plain), lm.hidden(row))


def rebuilt(parents):
    """Attention as if the segments had other parents."""

    def attend(q, k, v, segments, *, causal, scale=None):
        own = parents(segments)
        return dense_attention(q, k, v, attention.Segments(segments, segments.bounds, own), causal=causal, scale=scale)

    return attend


def sees_the_leaf_before(segments):
    own = [line[-2] if len(line) > 1 else -1 for line in segments.lines]
    return [own[0], 0, *own[2:]]


def first_leaf_without_parent(segments):
    own = [line[-2] if len(line) > 1 else -1 for line in segments.lines]
    return [-1, *own[1:]]


def trunks_without_lead(segments):
    first = min(line[-2] for line in segments.lines if len(line) > 1)
    own = [line[-2] if len(line) > 1 else -1 for line in segments.lines]
    return [p if n < first else -1 for n, p in enumerate(own)]


def top_left(q, k, v, segments, *, causal, scale=None):
    parts = [[t.split(list(segments), dim=1) for t in (k, v)], q.split(list(segments), dim=1)]
    out = []
    for q_s, line in zip(parts[1], segments.lines, strict=True):
        k_s, v_s = (torch.cat([of[one] for one in line], dim=1) for of in parts[0])
        out.append(F.scaled_dot_product_attention(q_s[None], k_s[None], v_s[None], is_causal=True, scale=scale, enable_gqa=True)[0])  # fmt: skip
    return torch.cat(out, dim=1)


def one_leaf_teaches_the_trunk(q, k, v, segments, *, causal, scale=None):
    k_parts, v_parts = (t.split(list(segments), dim=1) for t in (k, v))
    out, taught = [], set()
    for q_s, line in zip(q.split(list(segments), dim=1), segments.lines, strict=True):
        both = []
        for of in (k_parts, v_parts):
            both.append(torch.cat([of[one].detach() if one in taught else of[one] for one in line], dim=1))
        taught |= set(line[:-1])
        mask = torch.ones(q_s.shape[1], both[0].shape[1], dtype=torch.bool).tril(both[0].shape[1] - q_s.shape[1])
        out.append(F.scaled_dot_product_attention(q_s[None], both[0][None], both[1][None], attn_mask=mask, scale=scale, enable_gqa=True)[0])  # fmt: skip
    return torch.cat(out, dim=1)


@pytest.mark.parametrize(
    "broken",
    [rebuilt(sees_the_leaf_before), rebuilt(first_leaf_without_parent), rebuilt(trunks_without_lead), top_left,
     one_leaf_teaches_the_trunk],
)  # fmt: skip
def test_attention_that_shares_wrongly_would_be_seen(broken, monkeypatch):
    lm, samples = in_float64(tiny_lm()), family(4)
    wanted = found_in(lm, [packed(s) for s in whole(samples)])
    monkeypatch.setattr(attention, "segment_attention", broken)
    assert max(apart(found_in(lm, [shared_pack(samples, 4)]), wanted)) > 1e-4


def in_slot_order(row: Pack) -> Pack:
    return dataclasses.replace(row, audio_K=row.audio_K.sort().values)


def restarting(row: Pack) -> Pack:
    return dataclasses.replace(row, position_T=torch.cat([torch.arange(n) for n in row.segments]))


@pytest.mark.parametrize("broken", [in_slot_order, restarting])
def test_a_row_that_shares_wrongly_would_be_seen(broken):
    lm, samples = in_float64(tiny_lm()), family(4)
    wanted = found_in(lm, [packed(s) for s in whole(samples)])
    assert max(apart(found_in(lm, [broken(shared_pack(samples, 4))]), wanted)) > 1e-4


def test_shared_slots_have_one_dropout_mask():
    """The same question twice: under dropout its leaves differ, what they see of their trunk does not."""
    lm, (first, second) = tiny_lm(), questions(0, 2, 5_000, lead=4)
    adapt.freeze_all_but(lm, [])
    adapt.add_lora(lm, adapt.LoraPlan(("v_proj",), 4, 8.0, 0.5), seed=0)
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    row = shared_pack([first, dataclasses.replace(second, ids=first.ids, labels=first.labels)], 4)
    with torch.no_grad():
        one, two, *_ = lm.train()(row).tolist()
        assert abs(one - two) > 1e-4
        one, two, *_ = lm.eval()(row).tolist()
        assert one == pytest.approx(two, rel=1e-5)


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


def fixed_and_shared() -> Pack:
    row = shared_pack(family(4), 4, tail=20, n_frames=900)
    assert row.shared == 6
    return row


ROWS = pytest.mark.parametrize("made", [lambda: fixed(*talks()), fixed_and_shared], ids=["apart", "shared"])


@BOTH
@ROWS
@pytest.mark.parametrize("recompute", [(), ("audio_encoder", "decoder")])
def test_forward_and_backward_read_nothing_from_the_device(architecture, recompute, made):
    """Tensors without content: an .item(), a nonzero, a boolean index or a masked_select would raise."""
    row = made()
    with FakeTensorMode():
        lm = fake_lm(architecture, "cpu")
        lm.recompute(recompute)
        lm(faked(row, "cpu")).sum().backward()
        assert all(p.grad is not None for p in lm.parameters())
        with pytest.raises(DataDependentOutputException):
            lm(faked(row, "cpu")).sum().item()


COUNTS = {"aten::nonzero", "aten::masked_select", "aten::_local_scalar_dense", "aten::item", "aten::_unique2"}


@BOTH
@ROWS
def test_no_operation_asks_inside_for_a_count(architecture, made):
    """What tensors without content do not show: masked_scatter's backward selects by mask, and waits for the number."""
    lm, row = tiny_lm(architecture), made()
    lm(row)  # tables of the front end are made once
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        lm(row).sum().backward()
    names = {event.name for event in seen.events()}
    assert "aten::index_copy" in names
    assert not names & COUNTS


@BOTH
@ROWS
@pytest.mark.parametrize("kernel", KERNELS)
def test_on_a_gpu_nothing_stays_on_the_host(architecture, kernel, made):
    row = made()
    attention.ask(kernel)
    try:
        with FakeTensorMode():
            assert fake_lm(architecture, "cuda")(faked(row, "cuda")).device.type == "cuda"
    finally:
        attention.ask("auto")


COMPILED = """
import torch
from tests.model import conversation, gradients, tiny_lm
from tests.model import shared_pack
from tests.model.test_audio_lm import family, fixed, talks
plain, lm = tiny_lm({0!r}), tiny_lm({0!r})
lm.compile_blocks("eager")
many = [fixed(*talks()), fixed(conversation(5, 64_000)), fixed(conversation(6), conversation(7, 3_200, 9_000))]
many += [shared_pack(family(lead), lead, len(many[0].ids_T) - sum(shared_pack(family(lead), lead).real), 900) for lead in (0, 9)]
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
