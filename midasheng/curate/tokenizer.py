"""The mini decoder's own tokenizer: a small byte-level BPE trained on the training text of the corpora."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from midasheng.config import UserError

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
AUDIO, AUDIO_START, AUDIO_END = "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, AUDIO, AUDIO_START, AUDIO_END)
DEFAULT_TOKENS = 1_500
MAX_TOKENS = 4_096  # the table of the mini decoder is small on purpose
N_BYTES = 256


def train_tokenizer(texts: Iterable[str], words: Sequence[str], max_tokens: int = DEFAULT_TOKENS) -> Tokenizer:
    """Train a byte-level BPE on `texts`; the same texts in the same order give the same tokenizer.

    `words` become one token each wherever they stand as whole words, also after a space. The vocabulary holds at most
    `max_tokens` tokens: special tokens, the 256 bytes, `words` and merges, so that any text round-trips.
    Raises UserError when `max_tokens` is over 4,096 or leaves no room for merges.
    """
    least = N_BYTES + len(SPECIAL_TOKENS) + len(words)
    if not least < max_tokens <= MAX_TOKENS:
        raise UserError(f"tokenizer of {max_tokens} tokens: ask for {least + 1} to {MAX_TOKENS}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max_tokens - len(words),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_without(texts, words), trainer)
    # normalized=False: found in the text as it stands; single_word: the "no" in "note" is none
    tokenizer.add_tokens([AddedToken(word, normalized=False, single_word=True) for word in words])
    return tokenizer


def _without(texts: Iterable[str], words: Sequence[str]) -> Iterator[str]:
    """Cut `words` out of the text: merges inside them could never be used and would waste vocabulary."""
    if not words:
        yield from texts
        return
    longest_first = sorted(words, key=len, reverse=True)  # "bass drum" before "bass"
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(re.escape(word) for word in longest_first)})(?!\w)")
    for text in texts:
        yield from filter(None, pattern.split(text))


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json as transformers.PreTrainedTokenizerFast reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [t for t in SPECIAL_TOKENS if t not in (END_OF_TEXT, TURN_END)],
        "clean_up_tokenization_spaces": False,  # otherwise decoding eats the spaces before punctuation
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
