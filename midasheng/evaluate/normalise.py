"""What two texts must share to count as equal: normalisers by name, each with the version that a result carries."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cache
from importlib import metadata

from midasheng.config import UserError

CHINESE_VERSION = 1  # raise it with every change of `chinese`: numbers of different versions do not compare
PLAIN_VERSION = 1  # ... and of `plain`

Normaliser = Callable[[str], str]


def plain(text: str) -> str:
    """Lower case, compatibility forms, punctuation as spaces: for labels and letters."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if unicodedata.category(c)[0] in "LNM" else " " for c in text).split())


# -- Chinese -----------------------------------------------------------------------------------------------------------

DIGITS = "零一二三四五六七八九"
UNITS = ("", "十", "百", "千")
GROUPS = ("", "万", "亿", "万亿")
LONGEST_NUMBER = 8  # digits; longer ones are read digit by digit, as telephone numbers are


def _digits(number: str) -> str:
    return "".join(DIGITS[int(d)] for d in number)


def _group(value: int) -> str:
    """1 to 9999 in words, with one 零 for each gap."""
    words, gap = "", False
    for place in (3, 2, 1, 0):
        digit = value // 10**place % 10
        if digit:
            words += ("零" if gap and words else "") + DIGITS[digit] + UNITS[place]
        gap = digit == 0
    return words


def chinese_number(number: str) -> str:
    """A run of ASCII digits as it is read: 120 -> 一百二十, 2005 -> 二千零五, 10 -> 十; leading zeros, and more than
    LONGEST_NUMBER digits, digit by digit."""
    if len(number) > LONGEST_NUMBER or (number[0] == "0" and len(number) > 1):
        return _digits(number)
    value, groups = int(number), []
    while value:
        groups.append(value % 10_000)
        value //= 10_000
    words = ""
    for place in range(len(groups) - 1, -1, -1):
        if groups[place]:
            gap = words and groups[place] < 1_000
            words += ("零" if gap else "") + _group(groups[place]) + GROUPS[place]
    return re.sub("^一十", "十", words) or DIGITS[0]


def chinese(text: str) -> str:
    """Numbers in words, no tags, no punctuation, no spaces, lower case; full-width letters as ASCII. Traditional
    characters stay."""
    text = re.sub(r"<\|.*?\|>", "", unicodedata.normalize("NFKC", text))
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    text = re.sub(r"(\d+(?:\.\d+)?)%", r"百分之\1", text)
    text = re.sub(r"(\d{4})(?=年)", lambda m: _digits(m[1]), text)
    text = re.sub(r"(\d+)\.(\d+)", lambda m: chinese_number(m[1]) + "点" + _digits(m[2]), text)
    text = re.sub(r"\d+", lambda m: chinese_number(m[0]), text)
    return "".join(c for c in text.lower() if unicodedata.category(c)[0] in "LNM").replace("〇", "零")


# -- by name -----------------------------------------------------------------------------------------------------------


def need(package: str) -> str:
    """The version of a package of the extra `evaluate`. Raises UserError where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise UserError(f"scoring transcripts needs {package}: pip install -e '.[evaluate]'") from None


@cache
def normaliser(name: str) -> tuple[Normaliser, str]:
    """(function, name with version), of english, basic, chinese or plain. Raises UserError."""
    if name == "chinese":
        return chinese, f"chinese/{CHINESE_VERSION}"
    if name == "plain":
        return plain, f"plain/{PLAIN_VERSION}"
    if name not in ("english", "basic"):
        raise UserError(f"no normaliser {name}; there are english, basic, chinese, plain")
    version = need("whisper-normalizer")
    if name == "english":
        from whisper_normalizer.english import EnglishTextNormalizer

        return EnglishTextNormalizer(), f"english (whisper-normalizer {version})"
    from whisper_normalizer.basic import BasicTextNormalizer

    return BasicTextNormalizer(), f"basic (whisper-normalizer {version})"
