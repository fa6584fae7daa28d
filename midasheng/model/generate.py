"""Answers to a pack of prompts, id by id: the prompts are read once, then each step adds one slot to each answer.

No padding: prompts lie end to end as in training, their keys and values each in a stretch of one cache, and an answer
that has ended leaves the rows that are computed. The decoder stays transformers' own, with a layer of its Cache.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from midasheng import frames
from midasheng.config import UserError
from midasheng.model.attention import Seen, Segments
from midasheng.model.audio_lm import AudioLM
from midasheng.sample import Pack, bounds, counter_seed

ROOM = 64  # slots by which the stretch of an answer grows
PIECE = 20 * frames.CHUNK  # encoder frames (201.6 s) that are computed at a time
assert PIECE % frames.STACK == 0, f"audio tokens would lie across pieces of {PIECE} frames"


@dataclass(frozen=True)
class Sampling:
    """How the next id is chosen: the best one (`temperature` 0), or drawn from softmax(logits / temperature), of the
    `top_k` best (0: all) those that make up `top_p` of the probability.

    What is drawn depends on `seed`, the sample's key and the number of the step: not on its neighbours.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UserError for values without meaning."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature={self.temperature}: write 0 (the best token) or a positive number")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: write a share in (0, 1]")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k}: write how many, or 0 for all")


@dataclass(frozen=True)
class Continuation:
    """The answer to one prompt: its ids without the one that ended it; "stop", or "length" at the limit; seconds from
    the start of its pack to its end."""

    ids: tuple[int, ...]
    finish: str
    seconds: float


# -- hearing ----------------------------------------------------------------------------------------------------------


def audio_tokens(lm: AudioLM, audio_L: Float[Tensor, " L"], clips: Sequence[int]) -> Float[Tensor, "K D"]:
    """What AudioLM.encode gives, in pieces of whole chunks, so that an hour takes no more memory than minutes."""
    encoder, tokens = lm.audio_encoder, []
    waiting: list[Tensor] = []  # log-mels

    def flush() -> None:
        if waiting:
            n_frames = [mel.shape[1] // frames.PATCH for mel in waiting]
            lengths = [length for n in n_frames for length in frames.chunks(n)]
            frames_FE = encoder.encode(torch.cat(waiting, 1), Segments(lengths, bounds(lengths).to(audio_L.device)))
            tokens.append(lm.audio_projector(frames_FE, n_frames))
            waiting.clear()

    for clip in audio_L[: sum(clips)].split(list(clips)):
        whole = frames.frames(len(clip)) * frames.PATCH
        for mel in encoder.log_mel(clip)[:, :whole].split(PIECE * frames.PATCH, dim=1):
            if sum(m.shape[1] for m in [*waiting, mel]) > PIECE * frames.PATCH:
                flush()
            waiting.append(mel)
    flush()
    return torch.cat(tokens)


# -- the cache --------------------------------------------------------------------------------------------------------


class Stretches:
    """Where in the cache the slots of each answer lie: `starts`, `lengths` and `rooms` in slots, one for each answer
    that goes on. `new_T`: the places of the slots that the running pass computes."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths, self.device = list(lengths), device
        self.rooms = [n + ROOM for n in lengths]
        self.prompts = True  # the pass reads whole prompts, not one slot of each answer
        self._lay([(start, n) for start, n in zip(self.starts, lengths, strict=True)])

    @property
    def starts(self) -> list[int]:
        """Where each stretch begins."""
        return torch.tensor([0, *self.rooms]).cumsum(0)[:-1].tolist()

    def _lay(self, new: Sequence[tuple[int, int]]) -> None:
        self.new_T = torch.cat([torch.arange(start, start + n) for start, n in new]).to(self.device)

    def advance(self) -> None:
        """One more slot for each answer; there must be room."""
        self.prompts = False
        self._lay([(start + n, 1) for start, n in zip(self.starts, self.lengths, strict=True)])
        self.lengths = [n + 1 for n in self.lengths]
        assert all(n <= room for n, room in zip(self.lengths, self.rooms, strict=True)), (self.lengths, self.rooms)

    @property
    def seen(self) -> Seen:
        """What each answer's newest slot attends to."""
        return Seen([slice(start, start + n) for start, n in zip(self.starts, self.lengths, strict=True)])


class PackedLayer(CacheLayerMixin):
    """Keys and values of one decoder layer, (kv_heads, slots, head_dim): the stretches of all answers end to end."""

    def __init__(self, stretches: Stretches) -> None:
        super().__init__()
        self.stretches = stretches

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room, in the dtype of the values: rotary positions may have made keys float32."""
        slots = sum(self.stretches.rooms)
        self.keys, self.values = (
            value_states.new_empty(t.shape[1], slots, t.shape[3]) for t in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Keep what the pass computed; return what attention looks at: the prompts themselves, then the whole cache."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.keys.index_copy_(1, self.stretches.new_T, key_states[0].to(self.keys.dtype))
        self.values.index_copy_(1, self.stretches.new_T, value_states[0])
        if self.stretches.prompts:
            return key_states, value_states
        return self.keys[None], self.values[None]

    def move(self, kept: Sequence[slice], rooms: Sequence[int]) -> None:
        """Lay these stretches anew, each at the beginning of its new room."""
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = (self._moved(t, kept, rooms) for t in (self.keys, self.values))

    @staticmethod
    def _moved(rows: Tensor, kept: Sequence[slice], rooms: Sequence[int]) -> Tensor:
        out = rows.new_empty(rows.shape[0], sum(rooms), rows.shape[2])
        for part, stretch in zip(out.split(list(rooms), dim=1), kept, strict=True):
            part[:, : stretch.stop - stretch.start] = rows[:, stretch]
        return out

    def get_seq_length(self) -> int:
        """The longest answer with its prompt."""
        return max(self.stretches.lengths)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """No mask is ever built; what stands in the cache."""
        return sum(self.stretches.rooms), 0

    def get_max_length(self) -> int:
        """None."""
        return -1


# -- decoding ---------------------------------------------------------------------------------------------------------


class Decoding:
    """The answers to a pack of prompts in the making.

    `rows`: numbers of the segments whose answer goes on; logits_RV: what comes next in each, float32. The model must be
    in eval mode; `prompts` may lie on the host and has no tail.
    """

    def __init__(self, lm: AudioLM, prompts: Pack) -> None:
        assert not lm.training, "a model that generates is in eval mode"
        assert not prompts.shared, f"{prompts.shared} shared segments: each prompt has a cache of its own"
        self.lm, self.device = lm, lm.decoder.lm_head.weight.device
        prompts = prompts.to(self.device)
        self.rows = list(range(len(prompts.segments)))
        self.stretches = Stretches(prompts.segments, self.device)
        self.cache = Cache(layers=[PackedLayer(self.stretches) for _ in lm.decoder.model.layers])
        with self._running():
            embeds_TD = lm.text(prompts)
            if prompts.clips:
                tokens_KD = audio_tokens(lm, prompts.audio_L, prompts.clips)
                embeds_TD = embeds_TD.index_copy(0, prompts.audio_K, tokens_KD.to(embeds_TD.dtype))
            segments = Segments(prompts.segments, prompts.segment_bounds)
            hidden_TD = lm.decoder.extend(embeds_TD, prompts.position_T, segments, self.cache)
            last_R = prompts.segment_bounds[1:].long() - 1
            self.logits_RV = lm.decoder.logits(hidden_TD.index_select(0, last_R)).float()

    def _running(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        dtype = self.lm.compute_dtype
        stack.enter_context(torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None))
        # blocks compiled for the one shape of training would be compiled anew for every step
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        return stack

    def append(self, chosen: dict[int, int]) -> None:
        """Row -> the id that it takes; rows that are not named have ended and leave."""
        places = [self.rows.index(row) for row in chosen]
        assert places == sorted(places), f"rows {list(chosen)} out of order"
        full = any(self.stretches.lengths[at] == self.stretches.rooms[at] for at in places)
        if full or len(places) < len(self.rows):
            self._move(places)
        self.rows = list(chosen)
        with self._running():
            position_R = torch.tensor(self.stretches.lengths, device=self.device)
            self.stretches.advance()
            ids_R = torch.tensor(list(chosen.values()), device=self.device)
            hidden_RD = self.lm.decoder.extend(
                self.lm.decoder.embed(ids_R), position_R, self.stretches.seen, self.cache
            )
            self.logits_RV = self.lm.decoder.logits(hidden_RD).float()

    def _move(self, places: Sequence[int]) -> None:
        """Keep the stretches of these rows only, with room for what comes."""
        seen, lengths = self.stretches.seen, [self.stretches.lengths[at] for at in places]
        kept, rooms = [seen[at] for at in places], [n + ROOM for n in lengths]
        for layer in self.cache.layers:
            assert isinstance(layer, PackedLayer)
            layer.move(kept, rooms)
        self.stretches.lengths, self.stretches.rooms = lengths, rooms


def choose(logits_RV: Float[Tensor, "R V"], sampling: Sampling, keys: Sequence[str], step: int) -> list[int]:
    """The next id of each row; `keys` name the rows' samples."""
    if sampling.temperature == 0:
        return logits_RV.argmax(-1).tolist()
    scaled_RV = logits_RV.double() / sampling.temperature
    if 0 < sampling.top_k < scaled_RV.shape[1]:
        best = scaled_RV.topk(sampling.top_k)
        scaled_RV = torch.full_like(scaled_RV, -math.inf).scatter(1, best.indices, best.values)
    share_RV = scaled_RV.softmax(-1)
    if sampling.top_p < 1:
        ordered = share_RV.sort(descending=True, stable=True)
        beyond = ordered.values.cumsum(-1) - ordered.values >= sampling.top_p  # those before it are enough
        share_RV = share_RV.scatter(1, ordered.indices, ordered.values.masked_fill(beyond, 0.0))
    # one number a row, against shares in the order of ids: rounding that swaps two neighbours in rank changes nothing
    drawn = [(counter_seed(sampling.seed, "answer", key, step) >> 12) / 2**52 for key in keys]
    sums_RV = share_RV.cumsum(-1)
    at_R1 = torch.tensor(drawn, dtype=torch.float64, device=sums_RV.device)[:, None] * sums_RV[:, -1:]
    return torch.searchsorted(sums_RV, at_R1, right=True)[:, 0].tolist()


def steps(lm: AudioLM, prompts: Pack, stops: Sequence[int], limit: int, sampling: Sampling) -> Iterator[dict[int, int]]:
    """Segment -> its next id, step by step, the one of `stops` that ends it too; at most `limit` steps."""
    decoding = Decoding(lm, prompts)
    for number in range(limit):
        keys = [prompts.keys[row] for row in decoding.rows]
        chosen = dict(zip(decoding.rows, choose(decoding.logits_RV, sampling, keys, number), strict=True))
        yield chosen
        going = {row: one for row, one in chosen.items() if one not in stops}
        if not going or number == limit - 1:
            return
        decoding.append(going)


def generate(
    lm: AudioLM, prompts: Pack, stops: Sequence[int], limit: int, sampling: Sampling = Sampling()
) -> list[Continuation]:  # fmt: skip
    """Continuations of the segments of a pack without tail: at most `limit` ids each. The model stays in its mode."""
    was_training, start_s = lm.training, time.monotonic()
    ids: list[list[int]] = [[] for _ in prompts.segments]
    ended: dict[int, float] = {}
    lm.eval()
    try:
        for chosen in steps(lm, prompts, stops, limit, sampling):
            for row, one in chosen.items():
                if one in stops:
                    ended[row] = time.monotonic() - start_s
                else:
                    ids[row].append(one)
    finally:
        lm.train(was_training)
    whole_s = time.monotonic() - start_s
    return [
        Continuation(tuple(own), "stop" if row in ended else "length", ended.get(row, whole_s))
        for row, own in enumerate(ids)
    ]
