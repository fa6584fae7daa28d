"""Turns -> token ids, labels and audio slots, in ChatML. The tokenizer lives here and nowhere else."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from midasheng.config import UserError
from midasheng.sample import NO_TARGET, Turn


@dataclass(frozen=True)
class Encoded:
    """A conversation as arrays of one entry per slot: ids, labels (already shifted by one), is_audio."""

    ids: np.ndarray
    labels: np.ndarray
    is_audio: np.ndarray


class Chat:
    """ChatML with audio slots: `<|im_start|>user\\n<|audio_bos|><|AUDIO|> x K<|audio_eos|>PROMPT<|im_end|>\\n...`.

    Labels stand on the text of every assistant turn and on the `<|im_end|>` that closes it. Text is never read as a
    special token: a transcript that holds the characters "<|im_end|>" cannot end a turn.

    Raises UserError when the tokenizer cannot be read or lacks one of the tokens.
    """

    def __init__(self, path: str, audio_bos: str, audio: str, audio_eos: str) -> None:
        from transformers import AutoTokenizer

        self.path = path
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise UserError(f"tokenizer.path: {path!r} cannot be read ({first}); at mini, run `make data`") from None
        self.im_start, self.im_end = self._id("<|im_start|>"), self._id("<|im_end|>")
        self.audio_bos, self.audio, self.audio_eos = (self._id(t) for t in (audio_bos, audio, audio_eos))
        self.pad = self.im_end
        self.text = lru_cache(maxsize=65536)(self._encode_text)  # ids of plain text, as they stand in a turn

    def _id(self, token: str) -> int:
        number = self.tokenizer.get_vocab().get(token)
        if number is None:
            raise UserError(
                f"tokenizer {self.path} has no token {token}; name one of its reserved tokens instead with "
                "tokenizer.audio_bos / audio / audio_eos"
            )
        return int(number)

    def _encode_text(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def fingerprint(self) -> str:
        """Hash of the whole tokenizer: token counts and weights made under another one are refused."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        content = backend.to_str() if backend is not None else str(sorted(self.tokenizer.get_vocab().items()))
        return hashlib.sha256(content.encode("utf-8")).hexdigest()[:16]

    def encode(self, turns: Sequence[Turn], clip_tokens: Sequence[int], *, answer_follows: bool = False) -> Encoded:
        """Encode a conversation whose clips have `clip_tokens` audio tokens, in the order in which they stand.

        `answer_follows`: end with an opened assistant turn (for generation). The clips that the turns announce and
        `clip_tokens` must agree in number.
        """
        ids: list[int] = []
        target: list[bool] = []
        is_audio: list[bool] = []

        def add(tokens: Sequence[int], *, counts: bool = False, audio: bool = False) -> None:
            ids.extend(tokens)
            target.extend([counts] * len(tokens))
            is_audio.extend([audio] * len(tokens))

        clips = list(clip_tokens)
        announced = sum(t.clips for t in turns)
        assert announced == len(clips), f"{announced} clips announced, {len(clips)} given"
        for number, turn in enumerate(turns):
            if number:
                add(self.text("\n"))
            add([self.im_start, *self.text(f"{turn.role}\n")])
            own = turn.role == "assistant"
            if turn.text_first:
                add(self.text(turn.text), counts=own)
            for _ in range(turn.clips):
                add([self.audio_bos])
                add([self.audio] * clips.pop(0), audio=True)
                add([self.audio_eos])
            if turn.told:
                add([self.audio_bos, *self.text(turn.told), self.audio_eos])
            if not turn.text_first:
                add(self.text(turn.text), counts=own)
            add([self.im_end], counts=own)
        if answer_follows:
            add([*self.text("\n"), self.im_start, *self.text("assistant\n")])
        ids_T = np.asarray(ids, dtype=np.int64)
        # slot i must predict token i + 1; shifted here, no segment of a pack predicts another's first token
        shifted = np.where(target, ids_T, NO_TARGET)
        labels = np.append(shifted[1:], NO_TARGET) if len(ids) else shifted
        return Encoded(ids_T, labels.astype(np.int64), np.asarray(is_audio, dtype=bool))

    def decode(self, ids: Sequence[int]) -> str:
        """Ids of an answer back to text."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into `folder`."""
        self.tokenizer.save_pretrained(folder)
