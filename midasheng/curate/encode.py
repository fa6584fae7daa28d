"""Any audio file -> 16 kHz mono FLAC or OPUS, in blocks, so that hours of audio take no more memory than seconds."""

from __future__ import annotations

import contextlib
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from midasheng.data.audio import Skip
from midasheng.frames import MIN_SAMPLES, SAMPLE_RATE

BLOCK_S = 10
# codec -> extension in a shard, libsndfile's format and subtype; to libsndfile OPUS is a kind of Ogg file
CODECS = {"flac": ("flac", "FLAC", "PCM_16"), "opus": ("ogg", "OGG", "OPUS")}
LOUDEST = 4.0  # of full scale; beyond it the samples are not in -1 to 1 at all, and clipping would leave noise
Blocks = Iterator[NDArray[np.float32]]  # (samples, channels) each


def encode(audio: Any, codec: str, start_s: float = 0.0, end_s: float | None = None) -> tuple[bytes, int]:
    """(file, samples at 16 kHz) of a path, the bytes of a file, or a Lhotse cut; channels are averaged.

    Equal audio gives equal bytes. Raises Skip with one of: missing file, unreadable file, empty file, undecodable,
    truncated, rate changes, starts behind its end, not finite, beyond full scale, channels cancel, silent, too short.
    """
    _, file_format, subtype = CODECS[codec]
    out = io.BytesIO()
    n_samples, peak, channel_peak = 0, 0, 0.0
    with contextlib.ExitStack() as stack:
        rate, blocks = _open(audio, start_s, end_s, stack)
        stream = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1, "float32", "HQ")
        with soundfile.SoundFile(out, "w", SAMPLE_RATE, 1, subtype, format=file_format) as file:
            for block, last in _with_last(blocks):
                mono = block.mean(axis=1)
                if not np.isfinite(mono.sum()):
                    raise Skip("not finite")
                channel_peak = max(channel_peak, float(np.abs(block).max(initial=0.0)))
                if channel_peak > LOUDEST:
                    raise Skip("beyond full scale")
                if stream is not None:
                    mono = stream.resample_chunk(mono, last=last)
                whole = np.clip(np.rint(mono * 32_768), -32_768, 32_767).astype(np.int16)
                peak = max(peak, int(np.abs(whole.astype(np.int32)).max(initial=0)))
                file.write(whole)
                n_samples += len(whole)
    if n_samples < MIN_SAMPLES:
        raise Skip("too short")
    if peak <= 1:
        raise Skip("channels cancel" if channel_peak > 0.001 else "silent")
    data = out.getvalue()
    return (_same_serial(data) if codec == "opus" else data), n_samples


def _with_last(blocks: Blocks) -> Iterator[tuple[NDArray[np.float32], bool]]:
    before = next(blocks, None)
    if before is None:
        return
    for block in blocks:
        yield before, False
        before = block
    yield before, True


def _open(audio: Any, start_s: float, end_s: float | None, stack: contextlib.ExitStack) -> tuple[int, Blocks]:
    """(sample rate, blocks)."""
    if hasattr(audio, "load_audio"):  # a Lhotse cut, which may be mixed, perturbed, fetched from anywhere
        try:
            samples = audio.load_audio()
        except Exception:  # whatever its many backends raise
            raise Skip("missing file" if _lacks_a_file(audio) else "undecodable") from None
        return int(audio.sampling_rate), iter([np.atleast_2d(samples).T.astype(np.float32)])
    if isinstance(audio, Path):
        try:
            if not audio.is_file():
                raise Skip("missing file")
            size = audio.stat().st_size
            opened: Any = stack.enter_context(audio.open("rb"))
        except OSError:  # not ours to read, a name that is too long
            raise Skip("unreadable file") from None
    else:
        size, opened = len(audio), io.BytesIO(audio)
    if not size:
        raise Skip("empty file")
    if _is_cut_off(opened, size):
        raise Skip("truncated")
    opened.seek(0)
    try:
        file = stack.enter_context(soundfile.SoundFile(opened))
    except soundfile.LibsndfileError:
        opened.seek(0)
        return _open_with_av(opened, start_s, end_s, stack)
    if file.frames > 2**62:  # a flac written to a pipe does not say
        opened.seek(0)
        return _open_with_av(opened, start_s, end_s, stack)
    first = round(start_s * file.samplerate)
    if first and first >= file.frames:
        raise Skip("starts behind its end")
    until = file.frames if end_s is None else min(file.frames, round(end_s * file.samplerate))
    return file.samplerate, _sound_blocks(file, first, until)


def _sound_blocks(file: Any, first: int, until: int) -> Blocks:
    try:
        if first:
            file.seek(first)
        left = until - first
        while left > 0:
            block = file.read(min(left, BLOCK_S * file.samplerate), dtype="float32", always_2d=True)
            if not len(block) and left > file.samplerate // 10:  # 0.1 s: mp3 headers count the encoder's padding
                raise Skip("truncated")
            if not len(block):
                return
            left -= len(block)
            yield block
    except soundfile.LibsndfileError:  # it could be opened: flac says so when it meets the end
        raise Skip("truncated") from None


def _open_with_av(opened: Any, start_s: float, end_s: float | None, stack: contextlib.ExitStack) -> tuple[int, Blocks]:
    """What libsndfile does not know (m4a, aac, wma, webm, amr, ...), through FFmpeg."""
    try:
        container = stack.enter_context(av.open(opened))
        if not container.streams.audio:
            raise Skip("undecodable")
        rate = int(container.streams.audio[0].rate)
        length_s = _said_length(container)
    except (av.FFmpegError, ValueError):
        raise Skip("undecodable") from None

    def blocks() -> Blocks:
        convert = av.AudioResampler(format="fltp")
        first, until = round(start_s * rate), None if end_s is None else round(end_s * rate)
        at = 0
        try:
            for frame in container.decode(audio=0):
                if frame.sample_rate != rate:
                    raise Skip("rate changes")
                for part in convert.resample(frame):
                    samples = part.to_ndarray().T.astype(np.float32)
                    begin, at = at, at + len(samples)
                    kept = samples[max(0, first - begin) : None if until is None else max(0, until - begin)]
                    if len(kept):
                        yield kept
                    if until is not None and at >= until:
                        return
        except (av.FFmpegError, ValueError):
            raise Skip("truncated" if at else "undecodable") from None
        if at < (length_s - 0.1) * rate:
            raise Skip("truncated")
        if first and first >= at:
            raise Skip("starts behind its end")

    return rate, blocks()


def _said_length(container: Any) -> float:
    """Seconds of audio by the header of a file, 0.0 where it does not say; FFmpeg guesses for other formats."""
    if not any(name in container.format.name for name in ("mov", "matroska", "asf")):
        return 0.0
    stream = container.streams.audio[0]
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / 1e6 if len(container.streams) == 1 else 0.0


def _lacks_a_file(cut: Any) -> bool:
    cuts = [cut, *(track.cut for track in getattr(cut, "tracks", ()))]
    sources = [s for c in cuts for s in getattr(getattr(c, "recording", None), "sources", ())]
    return any(s.type == "file" and not Path(s.source).is_file() for s in sources)


def _is_cut_off(file: Any, size: int) -> bool:
    """Does the file end before its own header says? libsndfile takes what there is of wav, aiff and ogg for the
    whole."""
    head = file.read(12)
    if head[:4] in (b"RIFF", b"FORM"):
        said = int.from_bytes(head[4:8], "little" if head[:4] == b"RIFF" else "big")
        return 0 < said < 2**31 - 2**16 and size < said + 8 - 1  # writers to a pipe do not know; padding
    if head[:4] == b"OggS":
        file.seek(max(0, size - 2**17))
        tail = file.read()
        page = tail[tail.rfind(b"OggS") :]
        if len(page) < 27 or page[:4] != b"OggS" or not page[5] & 4:  # the last one bears the end-of-stream flag
            return True
        return len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]])
    return False


_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_crc(page: bytes) -> int:
    """CRC32 as Ogg has it (RFC 3533): zlib's with all bits in the other order, from 0, not inverted."""
    crc = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{crc:032b}"[::-1], 2)


def _same_serial(data: bytes) -> bytes:
    """An Ogg file with serial number 1: libogg's writers draw one, and equal audio must give equal bytes."""
    out, at = bytearray(data), 0
    while at < len(out):
        assert out[at : at + 4] == b"OggS", f"no Ogg page at byte {at}"
        n_segments = out[at + 26]
        end = at + 27 + n_segments + sum(out[at + 27 : at + 27 + n_segments])
        out[at + 14 : at + 18] = (1).to_bytes(4, "little")
        out[at + 22 : at + 26] = bytes(4)
        out[at + 22 : at + 26] = _ogg_crc(bytes(out[at:end])).to_bytes(4, "little")
        at = end
    return bytes(out)
