"""Descriptions say only what is known."""

from midasheng.curate.asterisk import Voice, pair
from midasheng.curate.describe import describe, plain_words
from tests.curate import make_source, tone


def test_descriptions_say_only_what_is_known(tmp_path):
    lines, audio = (
        ["digits/day-1: lunedì", "bye: Il numero H.323 è occupato."],
        {"digits/day-1": tone(1), "bye": tone(3)},
    )
    source = make_source(tmp_path / "s", lines, audio, Voice("it", "Italian", "man"))
    bye, day = (describe(candidate, 1.0) for candidate in pair(source)[0])
    assert (day["source"], day["language"], day["language_name"], day["speaker"]) == (
        "lunedì",
        "it",
        "Italian",
        "man",
    )
    assert len(day["captions"]) == 3
    assert any("lunedì" in caption for caption in day["captions"])
    assert all("Italian" in caption and "man" in caption and "woman" not in caption for caption in day["captions"])
    asked = {pair["question"]: pair["answer"] for pair in day["questions"] + day["instructions"]}
    assert asked["How many words are spoken? Answer with a number."] == "1"
    assert asked["Spell the word, with a space between the letters."] == "l u n e d ì"
    assert "a day of the week" in asked.values()
    assert asked["Is the speaker a man or a woman?"] == "man"
    for question, answer in asked.items():
        if question.startswith("Is the speech in"):
            assert answer == ("yes" if "Italian" in question else "no")
    assert not any("words" in pair["question"] for pair in bye["questions"]), "is H.323 one word?"


def test_plain_words():
    assert plain_words("¿Cómo está, d'accord?") == ["Cómo", "está", "d'accord"]
    assert [plain_words(text) for text in ("press # now", "dial 500", "M I S D", "a IAX")] == [None] * 4
