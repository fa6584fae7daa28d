"""The mini tokenizer: any text round-trips, equal texts give equal bytes, language names are one token."""

import pytest
from transformers import PreTrainedTokenizerFast

from midasheng.config import UserError
from midasheng.curate.tokenizer import MAX_TOKENS, SPECIAL_TOKENS, save_tokenizer, train_tokenizer

WORDS = ("English", "Russian")
TEXTS = ["A woman speaks English: one moment, please.", "Женщина говорит: одну минуту, пожалуйста."] * 20


def test_any_text_round_trips(tmp_path):
    save_tokenizer(train_tokenizer(TEXTS, WORDS, 400), tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in (
        "  two  spaces , and\ttabs\n",
        "日本語 😀 ñ",
        "<|im_start|>user\nRussian?<|im_end|>",
        "",
        "A Russian.",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_equal_texts_give_equal_bytes(tmp_path):
    for name in ("first", "second"):
        save_tokenizer(train_tokenizer(TEXTS, WORDS, 400), tmp_path / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_language_names_and_special_tokens_are_one_token(tmp_path):
    save_tokenizer(train_tokenizer(TEXTS, WORDS, 400), tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert len(tokenizer) <= 400
    for word in (*WORDS, *SPECIAL_TOKENS):
        assert tokenizer.encode(word) == [tokenizer.convert_tokens_to_ids(word)]
    russian = tokenizer.convert_tokens_to_ids("Russian")
    assert russian in tokenizer.encode("She speaks Russian.")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    # An answer must survive the usual way of printing it: language names are words, not control tokens.
    assert tokenizer.decode([russian], skip_special_tokens=True) == "Russian"


@pytest.mark.parametrize("n_tokens", [100, MAX_TOKENS + 1])
def test_size_out_of_range_is_refused(n_tokens):
    with pytest.raises(UserError, match=str(n_tokens)):
        train_tokenizer(TEXTS, WORDS, n_tokens)
