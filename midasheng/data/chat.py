"""Turns -> token ids, labels and audio slots, in ChatML. The tokenizer lives here and nowhere else."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer

from midasheng.config import UserError
from midasheng.sample import NO_TARGET, Sample, Turn


@dataclass(frozen=True)
class Encoded:
    """A conversation as arrays of one entry per slot: ids, labels (already shifted by one), is_audio."""

    ids: np.ndarray
    labels: np.ndarray
    is_audio: np.ndarray


def lead(conversation: Encoded) -> NDArray[np.int64]:
    """The ids (slots,) that come before its first audio slot and its first slot with a target: what conversations on
    other clips may begin with too."""
    own = conversation.is_audio | (conversation.labels != NO_TARGET)
    return conversation.ids[: int(own.argmax()) if own.any() else None]


def agreeing(one: Sequence[int] | NDArray[np.int64], other: Sequence[int] | NDArray[np.int64]) -> int:
    """How many ids two rows begin with in common."""
    n = min(len(one), len(other))
    differ = np.flatnonzero(np.asarray(one[:n]) != np.asarray(other[:n]))
    return int(differ[0]) if len(differ) else n


def trunk(conversations: Sequence[Encoded | Sample]) -> int:
    """How many slots all conversations on one clip begin with in common, before any target. 0 for a single one, and
    where audio stands behind them: only what comes before an audio slot can be shared with it."""
    first, *others = (np.where(c.is_audio, -1, c.ids) for c in conversations)
    k = min((agreeing(first, ids) for ids in others), default=0)
    k = min([k, *(int(targets[0]) for c in conversations if len(targets := np.flatnonzero(c.labels != NO_TARGET)))])
    return 0 if any(c.is_audio[k:].any() for c in conversations) else k


class Chat:
    """ChatML with audio slots: `<|im_start|>user\\n<|audio_bos|><|AUDIO|> x K<|audio_eos|>PROMPT<|im_end|>\\n...`.

    Labels stand on the text of every assistant turn and on the `<|im_end|>` that closes it. Text is never read as a
    special token: a transcript that holds the characters "<|im_end|>" cannot end a turn.

    The five tokens are given by name or by id; im_start and im_end are whatever stands for them (`turn_start`,
    `turn_end`). Those in `add` are appended to the tokenizer; `added`: their ids. Raises UserError when the tokenizer
    cannot be read, lacks one, or has one already that is to be added.
    """

    def __init__(
        self, path: str, audio_bos: str | int, audio: str | int, audio_eos: str | int,
        turn_start: str | int = "<|im_start|>", turn_end: str | int = "<|im_end|>", add: Sequence[str] = (),
    ) -> None:  # fmt: skip
        from transformers import AutoTokenizer

        self.path = path
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise UserError(f"tokenizer.path: {path!r} cannot be read ({first}); at mini, run `make data`") from None
        if not hasattr(self.tokenizer, "backend_tokenizer"):
            raise UserError(f"tokenizer.path: {path!r} holds no tokenizer.json; save it from a fast tokenizer")
        self.added = self._add(add)
        # transformers' own call costs as much as decoding the clip; this copy is what it calls inside, three times
        # faster, set never to read a special token in plain text
        self._plain = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        self._plain.encode_special_tokens = True
        self._plain.no_padding()
        self._plain.no_truncation()
        self.im_start, self.im_end = (self._special_id(t) for t in (turn_start, turn_end))
        self.audio_bos, self.audio, self.audio_eos = (self._id(t) for t in (audio_bos, audio, audio_eos))
        self.pad = self.im_end
        self.text = lru_cache(maxsize=65536)(self._encode_text)  # ids of plain text, as they stand in a turn
        self.spell = lru_cache(maxsize=65536)(self._spell)  # one token as text

    def _id(self, token: str | int) -> int:
        vocabulary = self.tokenizer.get_vocab()
        number = vocabulary.get(token) if isinstance(token, str) else token
        if number is None or number not in vocabulary.values():
            raise UserError(
                f"tokenizer {self.path} has no token {token}; name one of its reserved tokens instead with "
                "tokenizer.audio_bos / audio / audio_eos / turn_start / turn_end, or add it with tokenizer.add"
            )
        return int(number)

    def _special_id(self, token: str | int) -> int:
        number = self._id(token)
        known = self.tokenizer.added_tokens_decoder.get(number)
        if known is None or not known.special:
            names = [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special]
            raise UserError(
                f"tokenizer {self.path}: {token} is no special token: text could begin or end a turn; for "
                f"tokenizer.turn_start / turn_end name one of {', '.join(names[:20]) or 'none'}, or add some with "
                "tokenizer.add"
            )
        return number

    def _add(self, tokens: Sequence[str]) -> range:
        """Append special tokens; their ids, which follow on all others."""
        vocabulary = self.tokenizer.get_vocab()
        for token in tokens:
            if token in vocabulary:
                raise UserError(f"tokenizer.add: {self.path} has {token} already; take it out of the list")
        first = max(vocabulary.values()) + 1
        new = [AddedToken(token, special=True, normalized=False) for token in tokens]
        self.tokenizer.add_tokens(new, special_tokens=True)
        got = [self.tokenizer.get_vocab()[token] for token in tokens]
        assert got == list(range(first, first + len(tokens))), f"added tokens got ids {got}, not {first} and on"
        return range(first, first + len(tokens))

    def _encode_text(self, text: str) -> tuple[int, ...]:
        return tuple(self._plain.encode(text, add_special_tokens=False).ids)

    @property
    def token_ids(self) -> dict[str, int]:
        """The five tokens, under their names in a model's config.json."""
        return {
            "audio_token_id": self.audio, "audio_bos_token_id": self.audio_bos, "audio_eos_token_id": self.audio_eos,
            "turn_start_token_id": self.im_start, "turn_end_token_id": self.im_end,
        }  # fmt: skip

    def fingerprint(self) -> str:
        """Hash of the whole tokenizer: token counts and weights made under another one are refused."""
        content = self.tokenizer.backend_tokenizer.to_str()
        return hashlib.sha256(content.encode("utf-8")).hexdigest()[:16]

    def encode(self, turns: Sequence[Turn], clip_tokens: Sequence[int], *, answer_follows: bool = False) -> Encoded:
        """Encode a conversation whose clips have `clip_tokens` audio tokens, in the order in which they stand.

        `answer_follows`: end with an opened assistant turn (for generation). The clips that the turns announce and
        `clip_tokens` must agree in number.
        """
        ids: list[int] = []
        targets: list[slice] = []  # where tokens count, and where audio stands
        audio: list[slice] = []

        def add(tokens: Sequence[int], spans: list[slice] | None = None) -> None:
            ids.extend(tokens)
            if spans is not None:
                spans.append(slice(len(ids) - len(tokens), len(ids)))

        clips = list(clip_tokens)
        announced = sum(t.clips for t in turns)
        assert announced == len(clips), f"{announced} clips announced, {len(clips)} given"
        for number, turn in enumerate(turns):
            if number:
                add(self.text("\n"))
            add((self.im_start, *self.text(f"{turn.role}\n")))
            own = targets if turn.role == "assistant" else None
            if turn.text_first:
                add(self.text(turn.text), own)
            for _ in range(turn.clips):
                add((self.audio_bos,))
                add((self.audio,) * clips.pop(0), audio)
                add((self.audio_eos,))
            if turn.told:
                add((self.audio_bos, *self.text(turn.told), self.audio_eos))
            if not turn.text_first:
                add(self.text(turn.text), own)
            add((self.im_end,), own)
        if answer_follows:
            add((*self.text("\n"), self.im_start, *self.text("assistant\n")))
        ids_T = np.array(ids, dtype=np.int64)
        labels, is_audio = np.full(len(ids), NO_TARGET, dtype=np.int64), np.zeros(len(ids), dtype=bool)
        for span in targets:  # slot i must predict token i + 1; shifted here, no segment predicts another's first token
            labels[span.start - 1 : span.stop - 1] = ids_T[span]
        for span in audio:
            is_audio[span] = True
        return Encoded(ids_T, labels, is_audio)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids of an answer back to text."""
        # cleaning up would take back spaces that a stream has said already
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @property
    def special(self) -> frozenset[int]:
        """Tokens that plain text never becomes."""
        own = {self.im_start, self.im_end, self.audio_bos, self.audio, self.audio_eos}
        return frozenset(own | set(self.tokenizer.all_special_ids))

    def _spell(self, token: int) -> str:
        named = {self.audio_bos: "<|audio_bos|>", self.audio: "<|AUDIO|>", self.audio_eos: "<|audio_eos|>"}
        if token in named:  # whichever reserved tokens stand for them
            return named[token]
        text = self.join([token])
        # rows that only fill a table are nothing, parts of a character are no text: their number says which
        return text if text and "\ufffd" not in text else f"\ufffd#{token}"

    def join(self, ids: Sequence[int]) -> str:
        """Ids as text, special tokens by name. Half a character (of UTF-8) is U+FFFD."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into `folder`."""
        self.tokenizer.save_pretrained(folder)
