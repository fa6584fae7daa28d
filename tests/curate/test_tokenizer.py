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


def test_a_word_is_its_token_only_where_it_stands_alone_and_the_longest_word_wins(tmp_path):
    """The "no" in "note" is none; otherwise a closed answer would share its token with parts of other words."""
    words = ("no", "bass", "bass drum")
    texts = ["A note, no bass; a bass drum, no bassoon. Pizzzza!"] * 20
    save_tokenizer(train_tokenizer(texts, words, 256 + 6 + 3 + 1), tmp_path)  # with room for one merge, of "z"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    no, bass, drum = (tokenizer.convert_tokens_to_ids(word) for word in words)
    assert len({no, bass, drum}) == 3
    for text, expected in {
        "no": [no], "a note": [], "know": [], "nobody, no.": [no], "no-one": [no], "bass drum": [drum], "a bass": [bass],
        "bassoon": [], "bass, bass drum": [bass, drum], "No": [],
    }.items():  # fmt: skip
        ids = tokenizer.encode(text)
        assert [i for i in ids if i in (no, bass, drum)] == expected, text
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("bass drum") == [drum]


def test_no_vocabulary_is_spent_on_merges_inside_words(tmp_path):
    """But "no" cut out of "note" would leave "te" where "note" could have been learned."""
    whole = train_tokenizer(["a note of a piano "] * 50, ("no",), 300).get_vocab()
    assert all(any(word in token for token in whole) for word in ("note", "piano"))
    alone = train_tokenizer(["say no ", "sing bass drum "] * 50, ("no", "bass", "bass drum"), 300).get_vocab()
    assert not any(
        part in token for token in alone if token not in ("no", "bass", "bass drum") for part in ("no", "dru", "bas")
    )


@pytest.mark.parametrize("n_tokens", [100, MAX_TOKENS + 1])
def test_size_out_of_range_is_refused(n_tokens):
    with pytest.raises(UserError, match=str(n_tokens)):
        train_tokenizer(TEXTS, WORDS, n_tokens)
