"""The encoder against the dasheng package's own model and torchaudio, clip by clip and packed."""

import numpy as np
import pytest
import torch
from torchaudio.transforms import AmplitudeToDB, MelSpectrogram

from midasheng import frames
from midasheng.config import UserError
from midasheng.model.encoder import DashengEncoder, EncoderShape, LogMel, StoredBatchNorm
from tests.model import TINY, lively, noise, our_encoder, reference_encoder

SMALL = EncoderShape(96, 3, 2)
# one sample below and on every edge: a mel frame (160), a patch (640), an audio token (3200), a chunk (252 patches)
EDGES = [3_040, 3_200, 3_360, 3_680, 6_240, 16_000, 640 * 252 - 160, 640 * 253 - 160, 640 * 504 - 160, 640 * 505 - 160]
TORCHAUDIO = torch.nn.Sequential(
    MelSpectrogram(sample_rate=16_000, n_fft=512, win_length=512, hop_length=160, f_min=0, f_max=8_000, n_mels=64),
    AmplitudeToDB(top_db=120),
)
LENGTHS = [n for edge in EDGES for n in (edge - 1, edge)] + [161_280, 30 * 16_000, 35 * 16_000]


def one_by_one(encoder: DashengEncoder, clips: list[np.ndarray]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [encoder(torch.from_numpy(c), [len(c)]) for c in clips]


def all_in_one_pack(encoder: DashengEncoder, clips: list[np.ndarray]) -> list[torch.Tensor]:
    lengths = [len(c) for c in clips]
    with torch.no_grad():
        whole = encoder(torch.from_numpy(np.concatenate(clips)), lengths)
    return list(whole.split([frames.frames(n) for n in lengths]))


@pytest.fixture(scope="module")
def parity():
    """Our encoder, clips of all LENGTHS, and the reference's frames of each."""
    reference = reference_encoder(SMALL)
    clips = [noise(n, seed=n) for n in LENGTHS]
    with torch.no_grad():
        wanted = [reference(torch.from_numpy(c)[None])[0] for c in clips]
    return our_encoder(reference, SMALL), clips, wanted


@pytest.mark.parametrize("encode", [one_by_one, all_in_one_pack])
def test_equal_to_dasheng_at_every_rounding(parity, encode):
    encoder, clips, wanted = parity
    for n, ours, theirs in zip(LENGTHS, encode(encoder, clips), wanted, strict=True):
        assert ours.shape == theirs.shape, n
        assert (ours - theirs).abs().max() < 1e-4, n


def test_equal_to_dasheng_at_the_size_of_dasheng_base():
    base = EncoderShape(768, 12, 12)
    reference = reference_encoder(base)
    clips = [noise(n, seed=n) for n in (5_000, 640 * 253 - 160)]
    with torch.no_grad():
        wanted = [reference(torch.from_numpy(c)[None])[0] for c in clips]
    for ours, theirs in zip(all_in_one_pack(our_encoder(reference, base), clips), wanted, strict=True):
        assert (ours - theirs).abs().max() < 1e-4


def test_layer_norms_have_dashengs_eps():
    """It hides in parity: a tenfold eps moves the frames by less than 1e-4."""
    eps = [
        {n: m.eps for n, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm)}
        for model in (DashengEncoder(TINY), reference_encoder(TINY))
    ]
    assert eps[0] == eps[1]


def test_no_look_across_chunks():
    encoder = DashengEncoder(TINY).eval()
    lively(encoder, 0)
    wave = noise(640 * 300, seed=0)
    changed = wave.copy()
    changed[640 * 260 :] *= 0.5  # frames 260 on: in the second chunk; frames before 252 must not know
    first, second = (one_by_one(encoder, [w])[0] for w in (wave, changed))
    assert torch.equal(first[:252], second[:252])
    assert (first[252:] - second[252:]).abs().min(dim=0).values.max() > 1e-4


# -- log-mel ----------------------------------------------------------------------------------------------------------


LOUD_THEN_SILENT = np.concatenate([noise(16_000, 2, 1.0), np.zeros(16_000, np.float32)])  # here top_db cuts


@pytest.mark.parametrize(
    "wave", [noise(16_000, 0), noise(50_001, 1, 1e-4), np.zeros(3_200, np.float32), LOUD_THEN_SILENT],
    ids=["noise", "quiet", "silence", "loud, then silence"],
)  # fmt: skip
def test_mel_is_torchaudios(wave):
    clip = torch.from_numpy(wave)
    assert (LogMel()(clip) - TORCHAUDIO(clip)).abs().max() < 1e-4  # decibels


def test_a_loud_clip_does_not_change_a_quiet_one():
    quiet, loud = noise(16_000, 0, 1e-6), noise(16_000, 1, 1.0)
    batch = TORCHAUDIO(torch.from_numpy(np.stack([quiet, loud])))
    assert (batch[0] - TORCHAUDIO(torch.from_numpy(quiet))).abs().max() > 10  # over a batch top_db lifts the quiet one
    encoder = DashengEncoder(TINY).eval()
    lively(encoder, 0)
    packed = all_in_one_pack(encoder, [quiet, loud])
    alone = one_by_one(encoder, [quiet, loud])
    for a, b in zip(packed, alone, strict=True):
        assert (a - b).abs().max() < 1e-5


def test_mel_keeps_no_tables_in_the_state():
    encoder = DashengEncoder(TINY)
    assert not [n for n in encoder.state_dict() if "mel" in n or "window" in n or "front_end" in n]
    assert len(encoder.state_dict()) == 5 + 2 + 2 + 12 * TINY.depth + 2  # as in the release: 395 at depth 32


# -- init_bn ----------------------------------------------------------------------------------------------------------


def test_statistics_stand_still_in_training_and_features_are_those_of_eval():
    encoder = DashengEncoder(TINY)
    lively(encoder, 0)
    before = {n: b.clone() for n, b in encoder.named_buffers()}
    clip = torch.from_numpy(noise(20_000, 0))
    encoder.train()
    scale = encoder.init_bn.weight.detach().clone()
    for _ in range(3):
        encoder.zero_grad()
        encoder(clip, [len(clip)]).square().sum().backward()
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter -= 1e-4 * parameter.grad
    assert before
    assert all(torch.equal(b, before[n]) for n, b in encoder.named_buffers())
    assert not torch.equal(encoder.init_bn.weight, scale)  # the affine part does learn
    with torch.no_grad():
        assert torch.equal(encoder.train()(clip, [len(clip)]), encoder.eval()(clip, [len(clip)]))


def test_calibration_is_mean_and_variance_of_all_mel_frames():
    mels = [LogMel()(torch.from_numpy(noise(n, n))) for n in (3_200, 16_000, 40_000)]
    norm = StoredBatchNorm(64)
    raw = norm(mels[0])
    every = torch.cat(mels, dim=1).numpy().astype(np.float64)
    assert norm.calibrate(iter(mels)) == every.shape[1]
    np.testing.assert_allclose(norm.running_mean, every.mean(1), rtol=1e-5)
    np.testing.assert_allclose(norm.running_var, every.var(1, ddof=1), rtol=1e-4)
    normal = torch.cat([norm(m) for m in mels], dim=1).detach()
    assert normal.mean().abs() < 1e-3
    assert (normal.var() - 1).abs() < 1e-2
    assert raw.mean().abs() > 5  # without calibration decibels pass through


def test_calibration_without_audio_is_refused():
    with pytest.raises(UserError, match="saw no audio"):
        StoredBatchNorm(64).calibrate(iter([]))


def test_init_bn_equals_torchs_in_eval():
    theirs = torch.nn.BatchNorm2d(64).eval()
    lively(theirs, 0)
    ours = StoredBatchNorm(64)
    ours.load_state_dict(theirs.state_dict())
    mel = 30 * torch.randn(64, 50) - 20
    assert (ours(mel) - theirs(mel[None, :, None])[0, :, 0]).abs().max() < 1e-5


def test_gradients_are_equal_on_every_run_also_with_two_threads():
    """An indexed lookup adds its gradient in the order in which threads arrive: no two runs would be the same."""
    torch.manual_seed(0)
    encoder = DashengEncoder(EncoderShape(192, 1, 3))
    clips = [32_000] * 12
    audio_L = torch.randn(sum(clips))
    torch.set_num_threads(2)
    gradients = []
    for _ in range(8):
        encoder.zero_grad()
        encoder(audio_L, clips).square().sum().backward()
        gradients.append(encoder.time_pos_embed.grad.clone())
    assert all(torch.equal(gradients[0], g) for g in gradients[1:])
