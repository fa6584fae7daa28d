"""Corpus cards and mixes: read strictly, so that a typing error is found before any GPU hour."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from midasheng.config import HEARD, TOLD, UserError
from midasheng.data.audio import Skip
from midasheng.sample import Turn


class ManifestError(UserError):
    """A mistake in a card or a mix; the message names the file and says what to write."""


@dataclass(frozen=True)
class HeldOut:
    """Records kept apart for validation: the share with the lowest hash of JSON field `by`, at most `max` records."""

    by: str
    share: float
    max: int


@dataclass(frozen=True)
class Card:
    """One corpus: where its shards are and how a record becomes a conversation.

    Either `prompts` and `answer` (a JSON field: a string, or a list with one variant each; {field} in a prompt is
    filled from the record's JSON), or `pairs` (a JSON field: a list of {question, answer}).
    """

    name: str
    task: str
    shards: str  # relative to the data root, or a URL; {000..127} and * as webdataset and the shell read them
    licence: str
    languages: list[str] = dataclasses.field(default_factory=list)
    hours: float = 0.0
    homepage: str = "unknown"
    audio: bool = True  # False: text only, the conversation holds no clip
    context: str = ""  # what stands for the clip in text pretraining (data.clips=told); {field} as in prompts
    alike: str = ""  # JSON field that must be equal for the harder listening test, e.g. language
    prompts: list[str] = dataclasses.field(default_factory=list)
    answer: str = ""
    pairs: str = ""
    answers: str = "one"  # of a record's prompts, answers or pairs: `one` a visit, or `all` together in one pack
    held_out: HeldOut | None = None


@dataclass(frozen=True)
class Mix:
    """Corpora with their share of samples in percent, summing to 100."""

    name: str
    cards: tuple[Card, ...]
    percent: tuple[float, ...]
    notes: tuple[str, ...] = ()  # what was done to it on reading, to be printed


def conversations(card: Card, content: dict[str, Any], where: str, clips: str = HEARD) -> list[tuple[Turn, ...]]:
    """Every conversation that a record's JSON can become under its card; `clips` as data.clips. Raises ManifestError,
    Skip("no text")."""

    def wanted(field: str) -> Any:
        if field not in content:
            raise ManifestError(f"{where}: card {card.name} asks for JSON field `{field}`; there are {sorted(content)}")
        return content[field]

    def filled(template: str) -> str:
        try:
            return template.format_map(content)
        except KeyError as error:
            raise ManifestError(f"{where}: a prompt of {card.name} asks for JSON field {error}") from None
        except ValueError as error:
            raise ManifestError(f"{where}: a prompt of {card.name}: {error}; a brace itself is written twice") from None

    if card.pairs:
        try:
            asked = [(str(p["question"]), str(p["answer"])) for p in wanted(card.pairs)]
        except (KeyError, TypeError):
            raise ManifestError(f"{where}: `{card.pairs}` is no list of {{question, answer}}") from None
    else:
        answers = wanted(card.answer)
        answers = answers if isinstance(answers, list) else [answers]
        asked = [(filled(p), str(a)) for p in card.prompts for a in answers if a]
    if not asked:
        raise Skip("no text")
    heard = int(card.audio and clips == HEARD)
    made: list[tuple[Turn, ...]] = [
        (Turn("user", question, clips=heard), Turn("assistant", answer)) for question, answer in asked
    ]
    if clips == TOLD and card.context:  # twice, so that the plan draws two of three with the words
        words = filled(card.context)
        made += 2 * [(Turn("user", question, told=words), Turn("assistant", answer)) for question, answer in asked]
    return made


def _mapping(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # no UTF-8; a date that is none
        raise ManifestError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(content, dict):
        raise ManifestError(f"{path}: expected `key: value` lines, found {type(content).__name__}")
    return content


def _strict(cls: type, content: dict[str, Any], path: Path) -> Any:
    known = {f.name: f for f in dataclasses.fields(cls)}
    for name in content:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise ManifestError(f"{path}: unknown key `{name}`" + (f"; did you mean `{near[0]}`?" if near else ""))
    missing = [
        n for n, f in known.items()
        if n not in content and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]  # fmt: skip
    if missing:
        raise ManifestError(f"{path}: missing key `{missing[0]}`")
    for name, wanted in get_type_hints(cls).items():
        if name in content and not _is(content[name], wanted):
            raise ManifestError(f"{path}: {name}: {content[name]!r} is not of type {known[name].type}")
    return cls(**content)


def _is(value: Any, wanted: Any) -> bool:
    if wanted == list[str]:  # a bare string would be read as a list of its letters
        return isinstance(value, list) and all(isinstance(v, str) for v in value)
    if wanted in (int, float):  # YAML 1.1 takes 1e-4 for a string: it wants 1.0e-4
        return isinstance(value, int | wanted) and not isinstance(value, bool)
    return isinstance(value, wanted)


def read_card(path: Path) -> Card:
    """Read one card. Raises ManifestError."""
    content = _mapping(path)
    held_out = content.get("held_out")
    if isinstance(held_out, dict):
        content["held_out"] = held_out = _strict(HeldOut, held_out, path)
        if not (0 <= held_out.share <= 1 and held_out.max >= 0):
            raise ManifestError(f"{path}: held_out: share {held_out.share} lies in 0 to 1, max is not negative")
    card: Card = _strict(Card, content, path)
    if card.name != path.stem:
        raise ManifestError(f"{path}: its name is `{card.name}`; a card bears the name of its file")
    if (bool(card.prompts), bool(card.answer)) != (not card.pairs, not card.pairs):
        raise ManifestError(f"{path}: write either `prompts` and `answer`, or `pairs`")
    if card.answers not in ("one", "all"):
        raise ManifestError(f"{path}: answers: {card.answers!r} is neither `one` nor `all`")
    if (card.context or card.alike) and not card.audio:
        raise ManifestError(f"{path}: `context` and `alike` are about a clip; drop them, or `audio: false`")
    return card


class MixFile:
    """mix.yaml in a run folder: whoever writes it changes the shares of a run that is going on.

    `corpora:` and below it a percentage for each corpus of the run; 0 is allowed. A mistake in it must not end a run of
    days: it is printed, once, and the shares stay as they are.
    """

    def __init__(self, path: Path, corpora: Sequence[str]) -> None:
        self.path, self.corpora = path, tuple(corpora)
        self.seen: tuple[float, ...] | str = ""

    def follow(self, changes: Sequence[Any]) -> None:
        """What the file said last, in a run that goes on: [step, shares] of each change."""
        if changes:
            self.seen = tuple(changes[-1][1])

    def look(self) -> tuple[float, ...] | None:
        """The shares in the order of the corpora, when the file says something new."""
        if not self.path.is_file():
            return None
        try:
            found: tuple[float, ...] | str = self._read()
        except (ManifestError, OSError) as error:
            found = str(error)
        if found == self.seen:
            return None
        self.seen = found
        if isinstance(found, str):
            print(f"not followed: {found}", file=sys.stderr)
            return None
        return found

    def _read(self) -> tuple[float, ...]:
        shares: Any = _mapping(self.path).get("corpora")
        good = isinstance(shares, dict) and all(
            isinstance(p, int | float) and not isinstance(p, bool) and p >= 0 for p in shares.values()
        )
        if not good or set(shares) != set(self.corpora) or not 99.5 <= sum(shares.values()) <= 100.5:
            raise ManifestError(
                f"{self.path}: write `corpora:` and below it a percentage for each of {', '.join(self.corpora)}, "
                "100 in all"
            )
        return tuple(float(shares[c]) for c in self.corpora)


def read_mix(name: str, manifests: Path) -> Mix:
    """Read `manifests`/`name`.yaml and its cards from `manifests`/../corpora. Raises ManifestError."""
    path = manifests / f"{name}.yaml"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in manifests.glob("*.yaml"))) or "none"
        raise ManifestError(
            f"data.mix: no manifest {path} (there are: {there}); for your own set data.manifests, data.mix, data.root"
        )
    content = _mapping(path)
    corpora = content.get("corpora")
    if set(content) != {"corpora"} or not isinstance(corpora, dict) or not corpora:
        raise ManifestError(f"{path}: write `corpora:` and below it `NAME: PERCENT` lines, nothing else")
    for corpus, percent in corpora.items():
        if isinstance(percent, bool) or not isinstance(percent, int | float) or not percent > 0:
            raise ManifestError(f"{path}: {corpus}: {percent!r} is no share; write a percentage above 0")
    total = float(sum(corpora.values()))
    notes: tuple[str, ...] = ()
    if abs(total - 100) > 0.5:
        raise ManifestError(f"{path}: the shares sum to {total:g} percent; they must sum to 100 (within 0.5)")
    if abs(total - 100) > 1e-9:
        notes = (f"{path}: shares sum to {total:g}; scaled to 100",)
    cards = []
    for corpus in corpora:
        card_path = manifests.parent / "corpora" / f"{corpus}.yaml"
        if not card_path.is_file():
            near = difflib.get_close_matches(str(corpus), [p.stem for p in card_path.parent.glob("*.yaml")], n=1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            raise ManifestError(f"{path}: corpus `{corpus}` has no card {card_path}{hint}")
        cards.append(read_card(card_path))
    return Mix(name, tuple(cards), tuple(100 * p / total for p in corpora.values()), notes)
