"""The length arithmetic, held to published figures and to what torch really returns."""

import pytest
import torch

from midasheng import frames


@pytest.mark.parametrize(("seconds", "tokens"), [(10, 50), (30, 150), (60, 300)])
def test_published_counts(seconds, tokens):
    assert frames.audio_tokens(seconds * frames.SAMPLE_RATE) == tokens


@pytest.mark.parametrize("n_samples", [257, 319, 320, 3039, 3040, 3200, 16_000, 161_119, 161_120])
def test_mel_frames_are_those_of_a_centred_stft(n_samples):
    spectrum = torch.stft(
        torch.randn(n_samples), frames.N_FFT, frames.HOP, window=torch.hann_window(frames.N_FFT), center=True,
        return_complex=True,
    )  # fmt: skip
    assert frames.mel_frames(n_samples) == spectrum.shape[1]


@pytest.mark.parametrize("tokens", [1, 2, 7, 50])
def test_an_audio_token_more_from_exactly_this_sample_on(tokens):
    edge = 3_200 * tokens - 160  # 20 mel frames a token, the first of them centred on sample 0
    assert (frames.audio_tokens(edge - 1), frames.audio_tokens(edge)) == (tokens - 1, tokens)


def test_the_shortest_clip_that_is_trained_on_has_a_token():
    assert frames.audio_tokens(frames.MIN_SAMPLES) == 1
    assert frames.audio_tokens(3_039) == 0


def test_floor_where_the_released_projector_mask_rounds_up():
    assert frames.audio_tokens(round(1.1 * frames.SAMPLE_RATE)) == 5  # the mask of the release has 6


@pytest.mark.parametrize("n_frames", [0, 1, 251, 252, 253, 504, 505, 875])
def test_chunks_cover_every_frame_once(n_frames):
    lengths = frames.chunks(n_frames)
    assert sum(lengths) == n_frames
    assert all(n == frames.CHUNK for n in lengths[:-1])
    assert all(1 <= n <= frames.CHUNK for n in lengths)


def test_a_chunk_is_10_08_seconds():
    assert round(10.08 * frames.SAMPLE_RATE) == frames.CHUNK * frames.PATCH * frames.HOP
    assert frames.seconds(161_280) == 10.08
