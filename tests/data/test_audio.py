"""Any format and rate becomes 16 kHz mono of the planned length; what cannot is skipped with a reason."""

import contextlib
import io

import numpy as np
import pytest
import soundfile

from midasheng.data.audio import SLACK, Skip, decode, planned_samples
from tests.conftest import flac, tone

FORMATS = [
    ("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS"), ("OGG", "OPUS"),
]  # fmt: skip


def written(wave: np.ndarray, rate: int, form: str = "WAV", subtype: str = "FLOAT") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=form, subtype=subtype)
    return file.getvalue()


@pytest.mark.parametrize(
    ("form", "subtype", "rate"),
    [(*f, rate) for f in FORMATS for rate in (8_000, 16_000, 44_100, 48_000) if (f[1], rate) != ("OPUS", 44_100)],
)
def test_length_and_sound(form, subtype, rate):
    n = round(1.37 * rate)
    sine = 0.5 * np.sin(2 * np.pi * 440 * np.arange(n) / rate)
    data = written(np.stack([sine, np.zeros(n)], axis=1), rate, form, subtype)
    planned = planned_samples(data)
    assert abs(planned - 1.37 * 16_000) <= SLACK
    wave = decode(data, planned)
    assert (wave.shape, wave.dtype) == ((planned,), np.float32)
    spectrum = np.abs(np.fft.rfft(wave[2_000:18_000]))
    assert spectrum.argmax() == 440  # resampled, not just relabelled
    assert np.abs(wave[2_000:18_000]).max() == pytest.approx(0.25, rel=0.1)  # both channels


def test_trimmed_and_padded_exactly():
    wave = tone(1, 0)
    data = written(wave, 16_000)
    for n in (16_000 - SLACK, 16_000, 16_000 + SLACK):
        got = decode(data, n)
        assert len(got) == n
        assert np.array_equal(got[: min(n, 16_000)], wave[: min(n, 16_000)])
        assert not got[16_000:].any()


@pytest.mark.parametrize("n", [16_000 - SLACK - 1, 16_000 + SLACK + 1])
@pytest.mark.parametrize("form", [("WAV", "FLOAT"), ("MP3", "MPEG_LAYER_III")], ids=lambda f: f[0])
def test_another_length_than_planned(n, form):
    with pytest.raises(Skip, match="length differs"):
        decode(written(tone(1, 0), 16_000, *form), n)


@pytest.mark.parametrize(("form", "subtype"), FORMATS)
def test_file_that_ends_early(form, subtype):
    data = written(tone(1, 0), 16_000, form, subtype)
    with pytest.raises(Skip, match=r"length differs|undecodable"):
        decode(data[: len(data) // 2], 16_000)


@pytest.mark.parametrize(
    "data", [b"", b"RIFF", b"\0" * 4096, np.random.default_rng(0).bytes(4096)], ids=["", "head", "zeros", "noise"]
)
def test_garbage(data):
    with pytest.raises(Skip, match="undecodable"):
        planned_samples(data)
    with pytest.raises(Skip, match="undecodable"):
        decode(data, 16_000)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_not_finite(value):
    wave = tone(1, 0)
    wave[77] = value
    with pytest.raises(Skip, match="not finite"):
        decode(written(wave, 16_000), 16_000)


def test_too_short():
    assert planned_samples(flac(tone(0.2, 0))) == 3_200
    with pytest.raises(Skip, match="too short"):
        planned_samples(flac(tone(0.1999, 0)))


def test_header_without_a_length():
    """What ffmpeg writes to a pipe; it must not be counted as `too long`."""
    data = bytearray(flac(tone(1, 0)))
    data[21:26] = bytes([data[21] & 0xF0, 0, 0, 0, 0])
    with pytest.raises(Skip, match="length unknown"):
        planned_samples(bytes(data))


def test_a_damaged_header_takes_no_memory():
    """36 bits of a FLAC header say how long the clip is; believed, they ask for hundreds of gigabytes."""
    data = bytearray(flac(tone(1, 0)))
    data[21:26] = bytes([data[21] | 0x0F, 255, 255, 255, 255])
    with pytest.raises(Skip, match=r"length differs|undecodable"):
        decode(bytes(data), 16_000)


def test_damaged_bytes_are_skipped_or_decoded():
    """Whatever the damage, a Skip or samples of the planned length come out, no other exception."""
    rng = np.random.default_rng(0)
    for form, subtype in FORMATS[:3]:
        whole = written(tone(1, 0), 16_000, form, subtype)
        for _ in range(60):
            data = bytearray(whole)
            for place in rng.integers(0, 60, 3):
                data[place] = rng.integers(256)
            with contextlib.suppress(Skip):
                planned_samples(bytes(data))
            with contextlib.suppress(Skip):
                assert len(decode(bytes(data), 16_000)) == 16_000
