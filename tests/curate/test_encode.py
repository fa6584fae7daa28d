"""Any audio becomes 16 kHz mono of the same sound and length, or is refused with the right reason; equal audio gives
equal bytes, in bounded memory."""

import io
import os
import time
import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from midasheng.curate.encode import encode
from midasheng.data.audio import Skip, decode, planned_samples
from tests.conftest import tone


def sound(wave: np.ndarray, rate: int, form: str, subtype: str | None = None) -> bytes:
    """The bytes of a file that libsndfile writes; wave (samples,) or (samples, channels)."""
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=form, subtype=subtype)
    return file.getvalue()


def through_ffmpeg(wave: np.ndarray, rate: int, codec: str, form: str, **options: str) -> bytes:
    """The bytes of a mono file that libsndfile cannot write."""
    file = io.BytesIO()
    with av.open(file, "w", format=form, options=options) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave[None], dtype=np.float32), "fltp", "mono")
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return file.getvalue()


def made(kind: str, wave: np.ndarray, rate: int) -> bytes:
    """A file of one of the KINDS."""
    if kind in ("m4a", "webm", "caf"):
        form, codec = {"m4a": ("ipod", "aac"), "webm": ("webm", "libopus"), "caf": ("caf", "alac")}[kind]
        return through_ffmpeg(wave, rate, codec, form)
    form, subtype = {
        "wav": ("WAV", "PCM_16"), "wav24": ("WAV", "PCM_24"), "float": ("WAV", "FLOAT"), "flac": ("FLAC", None),
        "aiff": ("AIFF", "PCM_16"), "mp3": ("MP3", None), "vorbis": ("OGG", "VORBIS"), "opus": ("OGG", "OPUS"),
    }[kind]  # fmt: skip
    return sound(wave, rate, form, subtype)


KINDS = ("wav", "wav24", "float", "flac", "aiff", "mp3", "vorbis", "opus", "m4a", "webm")


def samples_of(data: bytes) -> np.ndarray:
    """Float32 (samples,) of a 16 kHz mono file, as the loader reads it."""
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        assert (file.samplerate, file.channels) == (16_000, 1)
    return decode(data, planned_samples(data))


def likeness(a: np.ndarray, b: np.ndarray, lag: int = 1200) -> float:
    """Correlation at the best shift of at most `lag` samples: another pitch or speed has next to none."""
    n = min(len(a), len(b))
    a, b = a[:n] - a[:n].mean(), b[:n] - b[:n].mean()
    size = 2 * n
    product = np.fft.irfft(np.fft.rfft(a, size) * np.conj(np.fft.rfft(b, size)), size)
    best = max(product[: lag + 1].max(), product[size - lag :].max() if lag else -1.0)
    return float(best / np.sqrt((a**2).sum() * (b**2).sum()))


def reason(audio: object, codec: str = "flac", **times: float) -> str:
    with pytest.raises(Skip) as caught:
        encode(audio, codec, **times)
    return caught.value.reason


# -- the same sound ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "rate"),
    [
        (kind, rate) for kind in KINDS for rate in (8_000, 16_000, 22_050, 44_100, 48_000)
        if kind not in ("opus", "webm") or rate not in (22_050, 44_100)
    ],
)  # fmt: skip
def test_every_format_and_rate_keeps_length_and_sound(kind, rate):
    data, n_samples = encode(made(kind, tone(1.5, 7, rate), rate), "flac")
    exact = kind not in ("mp3", "m4a", "webm")  # these pad to whole frames
    assert abs(n_samples - 24_000) <= (2 if exact else 1_700 if rate > 8_000 else 3_000)
    heard = samples_of(data)
    assert len(heard) == n_samples
    assert likeness(heard, tone(1.5, 7), lag=0 if exact and kind != "opus" else 2_400) > (0.98 if exact else 0.9)
    assert likeness(heard, tone(1.5, 8), lag=2_400) < 0.5


@pytest.mark.parametrize("codec", ["flac", "opus"])
def test_a_path_and_its_bytes_are_the_same_in_any_room(tmp_path, codec):
    data = made("vorbis", tone(0.5, 0, 44_100), 44_100)
    (tmp_path / "Lied \u4e2d.bin").write_bytes(data)
    assert encode(tmp_path / "Lied \u4e2d.bin", codec) == encode(data, codec)


def test_resampling_in_blocks_leaves_no_seams():
    """25 s is three blocks: the same as in one go."""
    import soxr

    wave = tone(25, 3, 44_100)
    heard = samples_of(encode(sound(wave, 44_100, "WAV", "FLOAT"), "flac")[0])
    whole = soxr.resample(wave, 44_100, 16_000, quality="HQ")
    assert len(heard) == len(whole) == 400_000
    assert np.abs(heard - whole).max() < 2 / 32_768


def test_what_is_above_8_khz_does_not_come_back_as_another_pitch():
    high = 0.5 * np.sin(2 * np.pi * 11_000 * np.arange(48_000) / 48_000)
    low = 0.05 * np.sin(2 * np.pi * 500 * np.arange(48_000) / 48_000)
    heard = samples_of(encode(sound(high + low, 48_000, "WAV"), "flac")[0])
    spectrum = np.abs(np.fft.rfft(heard)) / len(heard) * 2
    assert spectrum[500] == pytest.approx(0.05, rel=0.02)
    assert np.delete(spectrum, range(490, 511)).max() < 0.001


@pytest.mark.parametrize("channels", [2, 6])
def test_channels_are_averaged(channels):
    parts = np.stack([tone(0.5, n) for n in range(channels)], axis=1)
    heard = samples_of(encode(sound(parts, 16_000, "WAV", "FLOAT"), "flac")[0])
    assert np.abs(heard - parts.mean(axis=1)).max() < 1 / 32_768


def test_what_is_beyond_full_scale_is_clipped_not_wrapped():
    wave = 1.5 * np.sin(2 * np.pi * 100 * np.arange(16_000) / 16_000)
    heard = samples_of(encode(sound(wave, 16_000, "WAV", "FLOAT"), "flac")[0])
    assert np.abs(heard - np.clip(wave, -1, 1)).max() < 2 / 32_768


def test_16_bits_stay_as_they_are():
    wave = np.random.default_rng(0).integers(-32_768, 32_768, 16_000).astype(np.int16)
    data, _ = encode(sound(wave, 16_000, "WAV"), "flac")
    assert np.array_equal(soundfile.read(io.BytesIO(data), dtype="int16")[0], wave)


@pytest.mark.parametrize("kind", ["wav", "flac", "aiff", "vorbis", "mp3", "m4a"])
def test_a_segment_is_cut_where_it_says(kind):
    whole = tone(3, 5)
    data, n_samples = encode(made(kind, whole, 16_000), "flac", start_s=1.0001, end_s=2.5)
    assert n_samples == 40_000 - 16_002
    heard, wanted = samples_of(data), whole[16_002:40_000]
    if kind in ("wav", "flac", "aiff"):
        assert np.abs(heard - wanted).max() < 2 / 32_768
    else:  # to the sample where the decoder knows its delay, else within it
        assert likeness(heard, wanted, lag=0 if kind == "vorbis" else 2_400) > 0.9


def test_a_segment_of_another_rate_is_cut_at_its_own_samples():
    wave = tone(2, 5, 48_000)
    data, n_samples = encode(made("wav", wave, 48_000), "flac", start_s=0.5, end_s=1.25)
    assert n_samples == 12_000
    assert data == encode(made("wav", wave[24_000:60_000], 48_000), "flac")[0]


def test_a_file_written_to_a_pipe_does_not_know_its_length():
    wave = tone(0.5, 1)
    wav, flac = made("wav", wave, 16_000), made("flac", wave, 16_000)
    for said in (0, 2**31 - 2**12, 2**32 - 1):  # ffmpeg, sox and arecord write such
        size = said.to_bytes(4, "little")
        assert encode(wav[:4] + size + wav[8:40] + (2**32 - 1).to_bytes(4, "little") + wav[44:], "flac")[1] == 8_000
    data, n_samples = encode(flac[:21] + bytes([flac[21] & 0xF0, 0, 0, 0, 0]) + flac[26:], "flac")
    assert n_samples == 8_000
    assert likeness(samples_of(data), wave, lag=0) > 0.999


def test_a_rate_that_changes_under_way_is_not_played_at_another_speed():
    one, two = (through_ffmpeg(tone(1, 6, rate), rate, "aac", "adts") for rate in (24_000, 48_000))
    assert encode(two, "flac")[1] == pytest.approx(16_000, abs=1_500)
    assert reason(one + two) == "rate changes"


# -- reasons -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("audio", "why"),
    [
        (b"", "empty file"),
        (b"no sound at all " * 99, "undecodable"),
        (b"RIFF", "undecodable"),
        (b"OggS", "truncated"),
        (sound(tone(0.19, 0), 16_000, "WAV"), "too short"),
        (sound(np.zeros(0), 16_000, "WAV"), "too short"),
        (sound(np.zeros(16_000), 16_000, "FLAC"), "silent"),
        (sound(np.full(16_000, 0.7 / 32_768), 16_000, "WAV", "FLOAT"), "silent"),
        (sound(np.stack([tone(1, 0), -tone(1, 0)], 1), 16_000, "WAV", "FLOAT"), "channels cancel"),
        (sound(np.where(np.arange(16_000) == 9_000, np.nan, tone(1, 0)), 16_000, "WAV", "FLOAT"), "not finite"),
        (sound(np.where(np.arange(16_000) == 9_000, np.inf, tone(1, 0)), 16_000, "WAV", "FLOAT"), "not finite"),
        (sound(30_000 * tone(1, 0), 16_000, "WAV", "FLOAT"), "beyond full scale"),
    ],
)
@pytest.mark.parametrize("codec", ["flac", "opus"])
def test_audio_of_no_use_is_refused_with_its_reason(audio, why, codec):
    assert reason(audio, codec) == why


def test_files_that_are_not_there(tmp_path):
    assert reason(tmp_path / "no.wav") == reason(tmp_path) == "missing file"
    assert reason(tmp_path / ("x" * 5_000)) == "unreadable file"
    (tmp_path / "empty.mp3").touch()
    assert reason(tmp_path / "empty.mp3") == "empty file"


def test_a_segment_outside_its_file():
    for kind in ("wav", "m4a"):
        assert reason(made(kind, tone(1, 0), 16_000), start_s=5.0, end_s=6.0) == "starts behind its end"
        assert reason(made(kind, tone(1, 0), 16_000), start_s=0.5, end_s=0.6) == "too short"


@pytest.mark.parametrize("share", [0.97, 0.8, 0.5, 0.1])
@pytest.mark.parametrize("kind", [*KINDS, "caf"])
def test_a_truncated_file_is_never_taken_for_a_whole_one(kind, share):
    data = made(kind, tone(4, 2, 48_000), 48_000)
    assert encode(data, "flac")[1] == pytest.approx(64_000, abs=1_700)
    assert reason(data[: int(share * len(data))]) in ("truncated", "undecodable")


@pytest.mark.parametrize("kind", ["vorbis", "opus", "wav", "flac"])
def test_a_file_that_lacks_its_last_bytes_is_truncated(kind):
    """Also where the cut is inside the head of an Ogg page."""
    data = made(kind, tone(2, 2), 16_000)
    for lacking in (20, 300):
        assert reason(data[:-lacking]) == "truncated"
    if kind in ("vorbis", "opus"):
        last = data.rfind(b"OggS")
        for size in (last, last + 4, last + 5, last + 6, last + 26, last + 27, len(data) - 3):
            assert reason(data[:size]) == "truncated"


# -- bytes and memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["flac", "opus"])
def test_equal_audio_gives_equal_bytes_also_later(codec):
    audio = made("wav", tone(12, 1, 44_100), 44_100)
    first = encode(audio, codec)
    time.sleep(1.1)
    assert encode(audio, codec) == first


def test_opus_is_whole_and_sounds_the_same():
    """libsndfile checks the CRC of every page: one wrong bit and it reads less."""
    wave = tone(12, 4)
    data, n_samples = encode(made("wav", wave, 16_000), "opus")
    assert n_samples == planned_samples(data) == 192_000
    assert likeness(samples_of(data), wave, lag=0) > 0.98
    assert len(data) < 192_000 / 4
    at, pages = 0, 0
    while at < len(data):
        end = at + 27 + data[at + 26] + sum(data[at + 27 : at + 27 + data[at + 26]])
        page = data[at:end]
        assert int.from_bytes(page[22:26], "little") == ogg_crc(page[:22] + bytes(4) + page[26:])
        at, pages = end, pages + 1
    assert pages > 5


def ogg_crc(page: bytes) -> int:
    """Bit by bit, as RFC 3533 defines it."""
    crc = 0
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x04C11DB7 if crc >> 31 else 0)) & 0xFFFFFFFF
    return crc


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "m4a"])
def test_memory_does_not_grow_with_length(tmp_path: Path, kind):
    def peak(seconds: int) -> float:
        """MB on top of the file that is made."""
        path = tmp_path / f"{seconds}.{kind}"
        path.write_bytes(made(kind, tone(seconds, 0, 16_000), 16_000))
        tracemalloc.start()
        before = resident()
        data, n_samples = encode(path, "flac")
        grown = max(tracemalloc.get_traced_memory()[1] / 1e6, resident() - before)
        tracemalloc.stop()
        assert n_samples == pytest.approx(seconds * 16_000, abs=2_000)
        return grown - 3 * len(data) / 1e6

    peak(1)
    assert peak(300) < peak(30) + 8  # all of it as float32 is 19 MB


def resident() -> float:
    """MB that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
