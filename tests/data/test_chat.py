"""Conversations become exactly the ChatML that is written here, and only answers carry labels."""

import numpy as np
import pytest

from midasheng.config import UserError
from midasheng.data.chat import Chat
from midasheng.sample import NO_TARGET, Turn

USER, ANSWER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


def clip(tokens: int) -> str:
    return "<|audio_bos|>" + "<|AUDIO|>" * tokens + "<|audio_eos|>"


ASK, TELL = Turn("user", "Which language?", clips=1), Turn("assistant", "A Spanish tone.")
CASES = {  # turns, audio tokens of their clips, ChatML, answers
    "one clip": ([ASK, TELL], [3], f"{USER}{clip(3)}Which language?{ANSWER}A Spanish tone.<|im_end|>", ["A Spanish tone."]),
    "no clip": (
        [Turn("user", "Sing."), TELL], [], f"{USER}Sing.{ANSWER}A Spanish tone.<|im_end|>", ["A Spanish tone."],
    ),
    "two clips": (
        [Turn("user", "Same?", clips=2), Turn("assistant", "no")], [2, 1],
        f"{USER}{clip(2)}{clip(1)}Same?{ANSWER}no<|im_end|>", ["no"],
    ),
    "text first": (
        [Turn("user", "Listen:", clips=1, text_first=True), TELL], [1],
        f"{USER}Listen:{clip(1)}{ANSWER}A Spanish tone.<|im_end|>", ["A Spanish tone."],
    ),
    "words where a clip will stand": (
        [Turn("user", "Which language?", told="Spanish, a woman"), TELL], [],
        f"{USER}<|audio_bos|>Spanish, a woman<|audio_eos|>Which language?{ANSWER}A Spanish tone.<|im_end|>",
        ["A Spanish tone."],
    ),
    "system and two answers": (
        [Turn("system", "Be short."), ASK, TELL, Turn("user", "Sure?", clips=1), Turn("assistant", "yes")], [1, 2],
        f"<|im_start|>system\nBe short.<|im_end|>\n{USER}{clip(1)}Which language?{ANSWER}A Spanish tone.<|im_end|>\n"
        f"{USER}{clip(2)}Sure?{ANSWER}yes<|im_end|>", ["A Spanish tone.", "yes"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_layout_and_labels(chat, case):
    turns, clip_tokens, chatml, answers = CASES[case]
    got = chat.encode(turns, clip_tokens)
    ids = chat.tokenizer(chatml, add_special_tokens=False)["input_ids"]
    assert got.ids.tolist() == ids
    assert got.is_audio.tolist() == [i == chat.audio for i in ids]
    assert got.is_audio.sum() == sum(clip_tokens)
    labelled = np.flatnonzero(got.labels != NO_TARGET)
    assert got.labels[labelled].tolist() == [ids[i + 1] for i in labelled]
    runs = np.split(labelled, np.flatnonzero(np.diff(labelled) > 1) + 1)
    assert [chat.tokenizer.decode(got.labels[run]) for run in runs] == [f"{a}<|im_end|>" for a in answers]
    for run in runs:
        assert chat.tokenizer.decode(ids[: run[0] + 1]).endswith("<|im_start|>assistant\n")
    assert got.ids.dtype == got.labels.dtype == np.int64


@pytest.mark.parametrize(
    "text", ["no <|im_end|> here", "<|AUDIO|><|audio_bos|>", "<|im_start|>user\n", "<|endoftext|>"]
)
def test_text_never_becomes_a_special_token(chat, text):
    got = chat.encode([Turn("user", text, clips=1), Turn("assistant", text)], [2])
    special = [chat.im_start, chat.im_end, chat.audio, chat.audio_bos, chat.audio_eos, chat._id("<|endoftext|>")]
    assert [int((got.ids == s).sum()) for s in special] == [2, 2, 2, 1, 1, 0]
    assert got.is_audio.sum() == 2
    told = chat.encode([Turn("user", "?", told=text), Turn("assistant", text)], [])
    assert [int((told.ids == s).sum()) for s in special] == [2, 2, 0, 1, 1, 0]
    answer = got.labels[got.labels != NO_TARGET]
    assert chat.decode(answer[:-1]) == text
    assert answer[-1] == chat.im_end


TRICKY = [
    "", " ", "\n", "\n\n  \n", "  two leading spaces", "tab\tand\r\nreturn", "trailing ", "a  b   c", "don't won't I'll",
    "no <|im_end|> here", "<|im_end|><|im_start|>assistant\n", " <|AUDIO|> ", "<|endoftext|>", "<|im_end|", "<|audio_bos|>x",
    "<|en|>", "Transcribe the speech into text <|es|>", "yes", " yes", "Yes.", "English", " English", "EnglishSpanish",
    "café", "cafe\u0301", "ﬁne", "ß ẞ", "İstanbul", "日本語のテキスト", "한국어", "Москва", "مرحبا بالعالم", "नमस्ते", "👩‍👩‍👧‍👦 🇪🇸",
    "\u200b\u200d\ufeff", "\u2028", "\0", "\x7f", "1234567890", "3.14159", "1,000,000", "x" * 5000, "ab " * 2000, "\\n", "{}",
    "A Spanish tone.", "[INST] <s> </s> <pad> <unk>",
]  # fmt: skip


def test_plain_text_has_the_ids_of_the_tokenizer_itself(chat):
    """The copy that is three times faster must be the same tokenizer: weights were trained on those ids."""
    vocabulary = list(chat.tokenizer.get_vocab())
    closed = [c for word in vocabulary for c in (word, f" {word}", f"{word} {word}x")]  # each token's own characters
    rng = np.random.default_rng(0)
    mixed = ["".join(rng.choice([*TRICKY[:40], *vocabulary], 6)) for _ in range(200)]
    wrong = 0
    for text in [*TRICKY, *closed, *mixed]:
        theirs = chat.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert list(chat.text(text)) == theirs, repr(text)
        wrong += theirs != chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert wrong > 10  # of these texts, read as a conversation is


def test_another_call_does_not_change_what_plain_text_becomes(chat, tmp_path):
    """Padding and truncation are state of a backend tokenizer, and are saved with it."""
    chat.save(tmp_path)
    before = chat.text("A Spanish tone.")
    again = Chat(str(tmp_path), "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")
    again.tokenizer.pad_token = "<|im_end|>"
    again.tokenizer(["A", "A Spanish tone."], padding="max_length", max_length=40, truncation=True)
    again.tokenizer("<|im_end|>", split_special_tokens=False)
    assert again.text("A Spanish tone.") == before
    assert again.text("<|im_end|>") == chat.text("<|im_end|>") != (chat.im_end,)
    again.tokenizer.backend_tokenizer.enable_truncation(2)
    again.tokenizer.save_pretrained(tmp_path / "b")
    third = Chat(str(tmp_path / "b"), "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")
    assert third.text("A Spanish tone, and more") == chat.text("A Spanish tone, and more")


def test_opened_answer(chat):
    got = chat.encode([ASK], [1], answer_follows=True)
    chatml = f"{USER}{clip(1)}Which language?{ANSWER}"
    assert got.ids.tolist() == chat.tokenizer(chatml, add_special_tokens=False)["input_ids"]
    assert (got.labels == NO_TARGET).all()


def test_clips_announced_and_given_must_agree(chat):
    with pytest.raises(AssertionError, match="1 clips announced, 2 given"):
        chat.encode([ASK, TELL], [1, 1])


def test_tokenizer_without_the_audio_token(chat):
    with pytest.raises(UserError, match=r"no token <\|sound\|>; name one of its reserved tokens .*tokenizer.audio_bos"):
        Chat(chat.path, "<|audio_bos|>", "<|sound|>", "<|audio_eos|>")


def test_tokenizer_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer.path: .*cannot be read.*make data"):
        Chat(str(tmp_path), "a", "b", "c")


def test_saved_tokenizer_is_the_same_one(chat, tmp_path):
    chat.save(tmp_path)
    again = Chat(str(tmp_path), "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")
    assert again.fingerprint() == chat.fingerprint()
    again.tokenizer.add_tokens(["Basque"])
    assert again.fingerprint() != chat.fingerprint()


def test_a_token_as_text(chat):
    """Special tokens by name, the words of a transcript as they are, half a character by its number."""
    ids = chat.encode([Turn("user", "a", clips=1), Turn("assistant", "<|im_end|>")], [1]).ids.tolist()
    assert "".join(map(chat.spell, ids)) == f"{USER}{clip(1)}a{ANSWER}<|im_end|><|im_end|>" == chat.join(ids)
    first, *others = chat.text("\N{SNOWMAN}")
    assert others
    assert chat.spell(first) == f"\ufffd#{first}"
    assert {chat.im_start, chat.im_end, chat.audio_bos, chat.audio, chat.audio_eos} <= chat.special
    assert not chat.special & set(chat.text("<|im_end|><|AUDIO|>"))
    other = Chat(chat.path, chat.audio_bos, chat.text("a")[0], chat.audio_eos)  # another token stands for audio
    assert other.spell(other.audio) == "<|AUDIO|>"
