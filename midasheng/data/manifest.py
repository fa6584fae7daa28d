"""Corpus cards and mixes: read strictly, so that a typing error is found before any GPU hour."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from midasheng.config import HEARD, TOLD, UserError
from midasheng.data.audio import Skip
from midasheng.sample import NOT_TOLD, Turn


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
    filled from the record's JSON), or `pairs` (a JSON field: a list of {question, answer}), which `prompts` may wrap:
    "{question} Answer with 1-2 sentences". A corpus with `parts` goes into a mix part by part, as NAME.PART.
    """

    name: str
    task: str
    shards: str  # relative to the data root, or a URL; {000..127} and * as webdataset and the shell read them
    licence: str
    dataset: str = ""  # what the report calls it; several cards may be one dataset, a task each
    languages: list[str] = dataclasses.field(default_factory=list)  # of several, a record's JSON says in `language`
    hours: float = 0.0
    n_pairs: int = 0  # of questions and answers, where the report counts them instead of hours
    parts: dict[str, float] = dataclasses.field(default_factory=dict)  # part -> hours (0: not known), <part> in shards
    homepage: str = "unknown"
    audio: bool = True  # False: text only, the conversation holds no clip
    context: str = ""  # what stands for the clip in text pretraining (data.clips=told); {field} as in prompts
    alike: str = ""  # JSON field that must be equal for the harder listening test, e.g. language
    prompts: list[str] = dataclasses.field(default_factory=list)
    answer: str = ""
    pairs: str = ""
    answers: str = "one"  # of a record's prompts, answers or pairs: `one` a visit, or `all` together in one pack
    held_out: HeldOut | None = None
    exclude: list[str] = dataclasses.field(default_factory=list)  # files of keys or sources never used, beside the card


@dataclass(frozen=True)
class Mix:
    """Corpora with their share of samples in percent, summing to 100."""

    name: str
    cards: tuple[Card, ...]
    percent: tuple[float, ...]
    notes: tuple[str, ...] = ()  # what was done to it on reading, to be printed
    left_out: tuple[str, ...] = ()  # corpora that were asked to be


def spoken(card: Card, content: dict[str, Any]) -> str:
    """The language of a record: its card's only one; of several the one that its JSON says in `language`, as prompts
    know it; NOT_TOLD where that is none of the card's."""
    if len(card.languages) == 1:
        return card.languages[0]
    said = content.get("language")
    return said if said in card.languages else NOT_TOLD


def conversations(card: Card, content: dict[str, Any], where: str, clips: str = HEARD) -> list[tuple[Turn, ...]]:
    """Every conversation that a record's JSON can become under its card; `clips` as data.clips. Raises ManifestError,
    Skip("no text")."""

    def wanted(field: str) -> Any:
        if field not in content:
            raise ManifestError(f"{where}: card {card.name} asks for JSON field `{field}`; there are {sorted(content)}")
        return content[field]

    def filled(template: str, values: dict[str, Any]) -> str:
        try:
            return template.format_map(values)
        except KeyError as error:
            raise ManifestError(f"{where}: a prompt of {card.name} asks for JSON field {error}") from None
        except ValueError as error:
            raise ManifestError(f"{where}: a prompt of {card.name}: {error}; a brace itself is written twice") from None

    if card.pairs:
        pairs = wanted(card.pairs)
        try:
            asked = [(str(p["question"]), str(p["answer"])) for p in pairs]
            if card.prompts:
                asked = [
                    (filled(t, content | p), a) for p, (_, a) in zip(pairs, asked, strict=True) for t in card.prompts
                ]
        except (KeyError, TypeError):
            raise ManifestError(f"{where}: `{card.pairs}` is no list of {{question, answer}}") from None
    else:
        answers = wanted(card.answer)
        answers = answers if isinstance(answers, list) else [answers]
        asked = [(q, str(a)) for q in [filled(p, content) for p in card.prompts] for a in answers if a]
    if not asked:
        raise Skip("no text")
    heard = int(card.audio and clips == HEARD)
    made: list[tuple[Turn, ...]] = [
        (Turn("user", question, clips=heard), Turn("assistant", answer)) for question, answer in asked
    ]
    if clips == TOLD and card.context:  # twice, so that the plan draws two of three with the words
        words = filled(card.context, content)
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
    if wanted == dict[str, float]:
        return isinstance(value, dict) and all(isinstance(k, str) and _is(v, float) for k, v in value.items())
    if wanted == list[str]:  # a bare string would be read as a list of its letters
        return isinstance(value, list) and all(isinstance(v, str) for v in value)
    if wanted in (int, float):  # YAML 1.1 takes 1e-4 for a string: it wants 1.0e-4
        return isinstance(value, int | wanted) and not isinstance(value, bool)
    return isinstance(value, wanted)


def read_card(path: Path, part: str = "") -> Card:
    """Read one card, or a part of it. Raises ManifestError."""
    content = _mapping(path)
    held_out = content.get("held_out")
    if isinstance(held_out, dict):
        content["held_out"] = held_out = _strict(HeldOut, held_out, path)
        if not (0 <= held_out.share <= 1 and held_out.max >= 0):
            raise ManifestError(f"{path}: held_out: share {held_out.share} lies in 0 to 1, max is not negative")
    card: Card = _strict(Card, content, path)
    card = dataclasses.replace(card, exclude=[str(path.parent / name) for name in card.exclude])
    if card.name != path.stem:
        raise ManifestError(f"{path}: its name is `{card.name}`; a card bears the name of its file")
    if bool(card.answer) == bool(card.pairs) or (card.answer and not card.prompts):
        raise ManifestError(f"{path}: write either `prompts` and `answer`, or `pairs`")
    if ("<part>" in card.shards) != bool(card.parts):
        raise ManifestError(f"{path}: `parts` and <part> in `shards` belong together")
    if card.answers not in ("one", "all"):
        raise ManifestError(f"{path}: answers: {card.answers!r} is neither `one` nor `all`")
    if (card.context or card.alike) and not card.audio:
        raise ManifestError(f"{path}: `context` and `alike` are about a clip; drop them, or `audio: false`")
    return _part(card, part, path)


def _part(card: Card, part: str, path: Path) -> Card:
    """One part of a corpus as a card of its own. Raises ManifestError."""
    if not card.parts and not part:
        return card
    if part not in card.parts:
        there = ", ".join(f"{card.name}.{p}" for p in card.parts) or f"{card.name} alone"
        raise ManifestError(f"{path}: a mix cannot name {card.name}{part and '.'}{part}; there is {there}")
    unknown = [p for p, hours in card.parts.items() if not hours]
    evenly = (card.hours - sum(card.parts.values())) / max(1, len(unknown))
    return dataclasses.replace(
        card, name=f"{card.name}.{part}", shards=card.shards.replace("<part>", part), parts={},
        hours=card.parts[part] or evenly, languages=[part] if part in card.languages else card.languages,
    )  # fmt: skip


def excluded_by(card: Card) -> frozenset[str]:
    """The keys and sources that a card's `exclude` files name, one a line. Raises ManifestError."""
    try:
        lines = [line for name in card.exclude for line in Path(name).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ManifestError(f"card {card.name}: exclude: {error}") from None
    return frozenset(line.strip() for line in lines if line.strip())


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


def read_mix(name: str, manifests: Path, without: Sequence[str] = ()) -> Mix:
    """Read `manifests`/`name`.yaml and its cards from `manifests`/../corpora, `without` corpora that match these globs:
    the others of a slice share all of it, and a slice with none left shrinks the mix. Raises ManifestError."""
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
    shares: dict[str, float] = {}
    left_out: list[str] = []
    whole = 0.0
    for name_of, value in corpora.items():
        percent, of = _line(path, str(name_of), value)
        whole += percent
        kept = [c for c in of if not any(fnmatchcase(c, glob) for glob in without)]
        left_out += [c for c in of if c not in kept]
        for corpus, share in _shared(path, str(name_of), percent, kept).items():
            if corpus in shares:
                raise ManifestError(f"{path}: corpus `{corpus}` stands in it twice; it has one share")
            shares[corpus] = share
    if abs(whole - 100) > 0.5:
        raise ManifestError(f"{path}: the shares sum to {whole:g} percent; they must sum to 100 (within 0.5)")
    if not shares:
        raise ManifestError(f"{path}: data.without leaves nothing of it")
    total = float(sum(shares.values()))
    notes = []
    if left_out:
        notes.append(f"{path}: without {', '.join(left_out)}; {whole - total:.3g} of {whole:g} percent go with slices")
    if abs(total - 100) > 1e-9:
        notes.append(f"{path}: shares sum to {total:g}; scaled to 100")
    cards = tuple(_card_of(path, corpus) for corpus in shares)
    return Mix(name, cards, tuple(100 * p / total for p in shares.values()), tuple(notes), tuple(left_out))


def _card_of(path: Path, corpus: str) -> Card:
    """The card of a corpus, or part of one, that the mix at `path` names. Raises ManifestError."""
    name, dot, part = corpus.partition(".")
    whole = path.parent.parent / "corpora" / f"{corpus}.yaml"  # a name may hold a dot: `make prepare NAME=yodas.en`
    if whole.is_file():
        return read_card(whole)
    card_path = whole.with_name(f"{name}.yaml")
    if not card_path.is_file() or (dot and not part):
        near = difflib.get_close_matches(name, [p.stem for p in card_path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        raise ManifestError(f"{path}: corpus `{corpus}` has no card {card_path}{hint}")
    return read_card(card_path, part)


def _line(path: Path, name: str, value: Any) -> tuple[float, list[str]]:
    """(percent, corpora) of one line of a mix: a corpus, or a slice {percent, of}. Raises ManifestError."""
    of, percent = [name], value
    if isinstance(value, dict):
        if set(value) != {"percent", "of"} or not _is(value["of"], list[str]) or not value["of"]:
            raise ManifestError(f"{path}: {name}: a slice is written {{percent: NUMBER, of: [corpora]}}")
        of, percent = value["of"], value["percent"]
    if isinstance(percent, bool) or not isinstance(percent, int | float) or not percent > 0:
        raise ManifestError(f"{path}: {name}: {percent!r} is no share; write a percentage above 0")
    if len(set(of)) < len(of):
        raise ManifestError(f"{path}: {name} names a corpus twice")
    return float(percent), of


def _shared(path: Path, name: str, percent: float, of: Sequence[str]) -> dict[str, float]:
    """corpus -> percent: several share by the hours of their cards, by pairs where all count these. Raises
    ManifestError."""
    if len(of) < 2:
        return dict.fromkeys(of, percent)
    cards = [_card_of(path, corpus) for corpus in of]
    pairs = all(card.n_pairs for card in cards)
    sizes = [card.n_pairs if pairs else card.hours for card in cards]
    if not all(size > 0 for size in sizes):
        unknown = ", ".join(c.name for c, size in zip(cards, sizes, strict=True) if not size > 0)
        raise ManifestError(
            f"{path}: {name}: {unknown} tells no hours, so it cannot share by them; give it its own line"
        )
    return {corpus: percent * size / sum(sizes) for corpus, size in zip(of, sizes, strict=True)}
