"""Captions, questions and instructions: nothing that language, voice, name, text and length do not say."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from midasheng.curate.asterisk import LANGUAGE_NAMES, Candidate, Voice, normalise
from midasheng.sample import unit_hash

MANY_WORDS = 20  # nobody counts more by ear, and an answer should stay short


def describe(candidate: Candidate, duration_s: float) -> dict[str, Any]:
    """The JSON of a record: its text and true statements about it as captions, questions and instructions."""
    voice, text = candidate.source.voice, candidate.text
    source = normalise(text)
    pick = Chooser(candidate.key)
    form = _form(candidate)
    captions = _captions(pick, voice, form, text)
    words = plain_words(text)
    return {
        "source": source,
        "language": voice.language,
        "language_name": voice.language_name,
        "speaker": voice.speaker,
        "text": text,
        "duration_s": duration_s,
        "captions": captions,
        "questions": _questions(pick, voice, candidate.name, words, duration_s),
        "instructions": _instructions(voice, form, text, words),
    }


@dataclass(frozen=True)
class Chooser:
    """Choices that look random and depend on the key of the record only."""

    key: str

    def share(self, purpose: str) -> float:
        """A number in [0, 1)."""
        return unit_hash(f"{purpose}:{self.key}")

    def order(self, purpose: str, options: Sequence[str]) -> list[str]:
        """`options` shuffled."""
        return sorted(options, key=lambda option: unit_hash(f"{purpose}:{self.key}:{option}"))


# What the file name says about what is spoken: (pattern, form, answer to KINDS).
KINDS = "Which of these is spoken: a number, a letter, a day of the week or a month?"
NAMED_FORMS = (
    (r"letters/(\w|zed)", "the name of a letter", "a letter"),
    (r"digits/\d+[fmn]?", "a number", "a number"),
    (r"digits/h-\d+", "an ordinal number", ""),
    (r"digits/day-\d", "a day of the week", "a day of the week"),
    (r"digits/mon-\d+", "the name of a month", "a month"),
    (r"phonetic/\w_p", "a code word of a spelling alphabet", ""),
)


def _named(name: str) -> tuple[str, str]:
    """Form and answer to KINDS that the file name gives away; empty where it does not."""
    for pattern, form, answer in NAMED_FORMS:
        if re.fullmatch(pattern, name, re.IGNORECASE):
            return form, answer
    return "", ""


def _form(candidate: Candidate) -> str:
    form, _ = _named(candidate.name)
    words = normalise(candidate.text).split()
    if form:
        return form
    if len(words) == 1:
        return "one word"
    if all(len(word) == 1 for word in words):
        return "a few letters"
    if len(re.findall(r"[^\W\d_]{2,}[.!?](?:\s|$)", candidate.text)) > 1:
        return "several sentences"
    if len(words) <= 4:
        return "a short phrase"
    if candidate.is_part:
        return "part of a sentence"
    if len(words) > MANY_WORDS:
        return "a long sentence"
    return "a sentence" if candidate.text.endswith((".", "!", "?")) else "a phrase"


def _captions(pick: Chooser, voice: Voice, form: str, text: str) -> list[str]:
    """Three captions; on average half of them quote the transcript, a long one by its beginning."""
    who, language = f"A {voice.speaker}", voice.language_name
    words = text.replace('"', "'").split()
    quote = f'"{" ".join(words)}"' if len(words) <= MANY_WORDS else f'"{" ".join(words[:10])} ..."'
    plain = [
        f"{who} speaks {language}, {form}, recorded in a studio for a telephone system.",
        f"A studio-recorded telephone prompt: {form} in {language}, spoken by a {voice.speaker}.",
        f"{who} reads {form} in {language} for a telephone system.",
        f"Speech in {language}: {form}, read by a {voice.speaker} in a studio.",
    ]
    quoting = [
        f"{who} speaks {language}, {form}: {quote}",
        f"A telephone prompt in {language}, read by a {voice.speaker}: {quote}",
        f"{form[0].upper()}{form[1:]} in {language}, spoken by a {voice.speaker}: {quote}",
    ]
    n_quoting = 1 if pick.share("quotes") < 0.5 else 2
    return pick.order("quoting", quoting)[:n_quoting] + pick.order("plain", plain)[: 3 - n_quoting]


def plain_words(text: str) -> list[str] | None:
    """The words of `text` without punctuation; None where it is open how many they are ("28.8", "#")."""
    if re.search(r"\b[A-ZА-Я]{2}|\b[A-ZА-Я] [A-ZА-Я]\b", text):
        return None  # initials: one word or several?
    tokens = [token.strip(".,;:!?¡¿…«»“”\"'-–—") for token in text.split()]
    tokens = [token for token in tokens if token]
    is_word = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|\d")
    return tokens if tokens and all(is_word.fullmatch(token) for token in tokens) else None


def _asked(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"question": question, "answer": answer} for question, answer in pairs]


def _questions(
    pick: Chooser, voice: Voice, name: str, words: Sequence[str] | None, duration_s: float
) -> list[dict[str, str]]:
    others = pick.order("other language", [other for other in LANGUAGE_NAMES if other != voice.language_name])
    asked_language = voice.language_name if pick.share("is it") < 0.5 else others[0]
    asked_speaker = pick.order("who", ["man", "woman"])[0]
    options = pick.order("options", [voice.language_name, *others[:2]])
    letter = "ABC"[options.index(voice.language_name)]
    listed = ", ".join(f"({name}) {option}" for name, option in zip("ABC", options, strict=True))
    questions = _asked(
        ("Which language does the speaker use?", voice.language_name),
        ("Is the speaker a man or a woman?", voice.speaker),
        (
            f"Is the speech in {asked_language}? Answer yes or no.",
            _yes(asked_language == voice.language_name),
        ),
        (f"Is the speaker a {asked_speaker}? Answer yes or no.", _yes(asked_speaker == voice.speaker)),
        (f"Which language is spoken: {listed}? Answer with the letter.", letter),
    )
    # 1.5 s is near the median, so that yes and no are even; at the line nobody can tell.
    if abs(duration_s - 1.5) > 0.1:
        questions += _asked(("Is the recording longer than 1.5 seconds? Answer yes or no.", _yes(duration_s > 1.5)))
    if words is not None and len(words) <= MANY_WORDS:
        questions += _asked(("How many words are spoken? Answer with a number.", str(len(words))))
    if words is not None and len(words) > 1:
        questions += _asked(("What is the first word?", words[0]), ("What is the last word?", words[-1]))
    _, kind = _named(name)
    if kind:
        questions += _asked((KINDS, kind))
    return questions


def _yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


def _instructions(voice: Voice, form: str, text: str, words: Sequence[str] | None) -> list[dict[str, str]]:
    who, language = f"a {voice.speaker}", voice.language_name
    instructions = _asked(
        ("Answer in one word: which language is this?", language),
        ("Describe the recording in one sentence.", f"A {voice.speaker} reads {form} in {language}."),
        (
            "Say who speaks and in which language, in at most five words.",
            f"{who.capitalize()} speaks {language}.",
        ),
        (
            "Answer in JSON with the keys language and speaker.",
            json.dumps({"language": language, "speaker": voice.speaker}),
        ),
    )
    if len(text.split()) <= 2 * MANY_WORDS:
        instructions += _asked(
            ("Write down what is said, in capital letters.", text.upper()),
            ("Name the language, then write down what is said.", f"{language}: {text}"),
        )
    if words is not None and len(words) > 1:
        instructions += _asked(("Repeat the last word.", words[-1]), ("Repeat the first word.", words[0]))
    if words is not None and 1 < len(words) <= 2 * MANY_WORDS:
        lower = " ".join(words).lower()
        instructions += _asked(("Write down what is said in lower case, without punctuation.", lower))
    if words is not None and len(words) > 4:
        instructions += _asked(("Write down the first three words only.", " ".join(words[:3])))
    if words is not None and len(words) == 1 and len(words[0]) > 1 and words[0].isalpha():
        instructions += _asked(("Spell the word, with a space between the letters.", " ".join(words[0].lower())))
    return instructions
