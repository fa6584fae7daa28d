"""Conversations to try an export on: clips of given lengths, cut and joined from held-out recordings or generated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from midasheng import frames
from midasheng.config import Stage, UserError
from midasheng.data.audio import Skip, decode
from midasheng.data.chat import Chat
from midasheng.data.room import open_data
from midasheng.data.storage import StorageError, Unreachable
from midasheng.sample import Sample, Turn

Clip = NDArray[np.float32]
Conversation = tuple[tuple[Turn, ...], tuple[Clip, ...], Sample]

# 0.2 s to 60 s at odd remainders, both sides of an audio token's edge, of a chunk's (10.08 s), and too short ones
LENGTHS = (
    *(int(n) + 37 * i % 160 for i, n in enumerate(np.geomspace(frames.MIN_SAMPLES, 959_000, 30))),
    960_000, 161_279, 161_280, 163_839, 163_840, 3_199, 1_000,
)  # fmt: skip
GENERATED = (Turn("user", "Write a general audio caption", clips=1), Turn("assistant", "A chord sounds in noise."))


def tone(n_samples: int, seed: int) -> Clip:
    """A chord in noise: float32 (n_samples,)."""
    rng = np.random.default_rng(seed)
    t = np.arange(n_samples) / frames.SAMPLE_RATE
    wave = sum(np.sin(2 * np.pi * f * t) for f in rng.uniform(100, 3000, 3))
    return np.asarray(0.1 * wave + 0.01 * rng.standard_normal(n_samples), dtype=np.float32)


def recordings(stage: Stage) -> list[tuple[tuple[Turn, ...], Clip]]:
    """(turns, clip) of the stage's held-out records, the corpora in turn. Raises UserError without its data."""
    found: list[list[tuple[tuple[Turn, ...], Clip]]] = []
    for corpus in open_data(stage, make=False).corpora:
        rows = []
        for place, record in enumerate(corpus.held_out[:16]):
            asked = [v.turns for v in record.variants if v.turns[0].clips == 1]
            try:
                if asked and record.audio:
                    rows.append((asked[place % len(asked)], decode(record.audio.read(), record.n_samples)))
            except (Skip, StorageError, Unreachable):
                continue
        found.append(rows)
    return [row[i] for i in range(16) for row in found if i < len(row)]


def conversations(stage: Stage, chat: Chat, lengths: Sequence[int] = LENGTHS) -> tuple[list[Conversation], str]:
    """One conversation for each length (samples), then one with two clips; and in words what they are made of."""
    try:
        held_out, reason = recordings(stage), "the run holds out no recording"
    except UserError as error:
        held_out, reason = [], str(error)
    if held_out:
        from_where = f"{len(held_out)} held-out recordings of the run's mix `{stage.data.mix}`, cut and joined"
        stream = np.concatenate([clip for _, clip in held_out])
    else:
        from_where = f"generated chords in noise, since there are no recordings ({reason})"
        stream = tone(frames.SAMPLE_RATE * 40, 0)

    def clip(place: int, n: int) -> Clip:
        return np.take(stream, np.arange(place, place + n), mode="wrap")

    made, place = [], 0
    for number, wanted in enumerate([(n,) for n in lengths] + [(frames.MIN_SAMPLES + 5, 48_000)]):
        turns = held_out[number % len(held_out)][0] if held_out else GENERATED
        turns = (turns[0]._replace(clips=len(wanted)), *turns[1:])
        clips = tuple(clip(place + sum(wanted[:i]), n) for i, n in enumerate(wanted))
        place += sum(wanted)
        padded = tuple(np.pad(c, (0, max(0, frames.MIN_SAMPLES - len(c)))) for c in clips)
        encoded = chat.encode(turns, [frames.audio_tokens(len(c)) for c in padded])
        sample = Sample("trial", f"trial{number}", "trial", encoded.ids, encoded.labels, encoded.is_audio, padded)
        made.append((turns, clips, sample))
    return made, from_where
