"""A tiny unpacked package of tones, which the tests of the curate room share."""

import gzip

import av
import numpy as np

from midasheng.curate.asterisk import Source, Voice

COPYRIGHT = """Format: x
Upstream-Name: asterisk-core-sounds
Source: http://example.org/

Files: *
Copyright: 2003, A Voice
License: CC-BY-SA-3.0

Files: it-*
Copyright: 2012, Un Altro
License: CC-BY-3.0
"""
ENGLISH = Voice("en", "English", "woman")


def tone(duration_s, peak=0.3):
    """A 440 Hz tone as mono int16 at 16 kHz."""
    samples = peak * np.sin(2 * np.pi * 440 * np.arange(round(duration_s * 16_000)) / 16_000)
    return (samples * 32_767).astype(np.int16)


def write_g722(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="g722") as container:
        stream = container.add_stream("g722", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = 16_000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


def make_source(folder, lines, audio, voice=ENGLISH):
    """A tiny unpacked package: transcript `lines`, and `audio` by name (None makes an empty file)."""
    folder.mkdir(parents=True)
    (folder / "text.gz").write_bytes(gzip.compress(("\ufeff; a comment\n\n" + "\n".join(lines) + "\n").encode()))
    (folder / "copyright").write_text(COPYRIGHT)
    (folder / "sounds").mkdir()
    for name, samples in audio.items():
        path = folder / "sounds" / f"{name}.g722"
        if samples is None:
            path.parent.mkdir(exist_ok=True)
            path.touch()
        else:
            write_g722(path, samples)
    return Source(voice, folder / "text.gz", folder / "sounds", folder / "copyright", (("pkg", "1.0-1"),))
