"""Rows -> numbers, on a CPU and without the model: one scorer per kind of task, each with a version.

Every number is a function of sums over rows, so that its bootstrap interval costs one matrix product. An output that is
empty or missing is wrong, for every number but a transcript's whose name says `paper`: the authors' script skips it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from midasheng.evaluate.normalise import need, normaliser, plain
from midasheng.evaluate.rows import MISSING, UNREAD, Row

Floats = NDArray[np.float64]
ROUNDS, SEED = 1_000, 0  # of the bootstrap
CUT_BELOW = 0.85  # words of the reference: a transcript that is shorter, and ends within a sentence, was cut


@dataclass(frozen=True)
class Number:
    """`of` the column sums (..., K) of `rows_NK` -> (...). `n` are the rows that count."""

    rows_NK: Floats
    of: Callable[[Floats], Floats]

    @property
    def value(self) -> float | None:
        """None where no row counts."""
        return _number(self.of(self.rows_NK.sum(0, keepdims=True))[0])

    def interval(self, rounds: int = ROUNDS, seed: int = SEED, clips: Sequence[str] = ()) -> tuple[float, float] | None:
        """95 % of the values that as many clips, drawn with replacement, have; `clips`: that of each row, none where
        each has its own. Rows of one clip are drawn together: five questions about it are not five clips."""
        sums_NK = self.rows_NK
        if clips:
            assert len(clips) == len(self.rows_NK), f"clips of {len(clips)} rows, there are {len(self.rows_NK)}"
            place = {clip: n for n, clip in enumerate(dict.fromkeys(clips))}
            sums_NK = np.zeros((len(place), self.rows_NK.shape[1]))
            np.add.at(sums_NK, [place[clip] for clip in clips], self.rows_NK)
        n = len(sums_NK)
        if n < 2:
            return None
        rng = np.random.default_rng(seed)
        share_N = np.full(n, 1 / n)
        draws = np.concatenate([self.of(rng.multinomial(n, share_N, 50) @ sums_NK) for _ in range(0, rounds, 50)])
        low, high = np.nanpercentile(draws, [2.5, 97.5]) if np.isfinite(draws).any() else (np.nan, np.nan)
        return None if np.isnan(low) else (float(low), float(high))


@dataclass(frozen=True)
class Scored:
    """What a scorer says of a task's rows. The first of `numbers` is the task's value; `paper` names the one that the
    authors' protocol gives, `chance` what one has who hears nothing."""

    scorer: str  # name/version
    normaliser: str
    numbers: dict[str, Number]
    paper: str = ""
    counts: dict[str, int] = field(default_factory=dict)  # of this scorer: unparsed, substitutions, ...
    chance: str = ""


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _ratio(sums: Floats) -> Floats:
    """First column over the second."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], np.nan)


def ratio(over: Sequence[float] | Floats, under: Sequence[float] | Floats | None = None) -> Number:
    """Sum of `over` / sum of `under`; without it the mean."""
    top = np.asarray(over, dtype=np.float64)
    bottom = np.ones_like(top) if under is None else np.asarray(under, dtype=np.float64)
    return Number(np.stack([top, bottom], axis=-1), _ratio)


def counts(rows: Sequence[Row]) -> dict[str, int]:
    """Of every task: rows; no words in the output; nobody answered; audio not read; cut at the limit of new tokens."""
    return {
        "n": len(rows),
        "empty": sum(not row.text.strip() for row in rows),
        "missing": sum(row.finish_reason == MISSING for row in rows),
        "unread": sum(row.finish_reason == UNREAD for row in rows),
        "truncated": sum(row.finish_reason == "length" for row in rows),
    }


# -- transcripts -------------------------------------------------------------------------------------------------------


def looks_cut(output: str, words: int, reference_words: int) -> bool:
    """Does a transcript end within a sentence and lack the rest? For answers whose finish_reason is not known; `words`
    are counted after normalising."""
    ends = re.search(r"""[.?!。？！]["'”’)]?$""", output.strip())
    return bool(output.strip()) and not ends and words < CUT_BELOW * reference_words


def transcripts(rows: Sequence[Row], normalise: str = "english", unit: str = "words") -> Scored:
    """Word (or `unit: characters`) error rate of the corpus: all edits over all reference units, `strict`.

    `paper`: rows whose output or reference is empty after normalising are left out, as the authors' script does; of a
    model that says nothing to hard clips it makes a better one.
    """
    version = need("jiwer")
    import jiwer

    function, name = normaliser(normalise)

    def units(text: str) -> list[str]:
        text = function(re.sub(r"<\|.*?\|>", " ", text))
        return list(text.replace(" ", "")) if unit == "characters" else text.split()

    references = [units(row.references[0]) for row in rows]
    outputs = [units(row.text) for row in rows]
    edits_N4 = np.zeros((len(rows), 4))  # substitutions, deletions, insertions, hits
    if rows:
        found = jiwer.process_words([" ".join(r) for r in references], [" ".join(o) for o in outputs])
        columns = {"substitute": 0, "delete": 1, "insert": 2, "equal": 3}
        for n, chunks in enumerate(found.alignments):
            for c in chunks:
                edits_N4[n, columns[c.type]] += max(c.ref_end_idx - c.ref_start_idx, c.hyp_end_idx - c.hyp_start_idx)
    errors, lengths = edits_N4[:, :3].sum(1), np.array([len(r) for r in references], dtype=np.float64)
    said = np.array([bool(r) and bool(o) for r, o in zip(references, outputs, strict=True)], dtype=bool)
    whole = ~np.array(
        [looks_cut(row.text, len(o), len(r)) for row, r, o in zip(rows, references, outputs, strict=True)], dtype=bool
    )
    rate = "cer" if unit == "characters" else "wer"
    each = errors / np.maximum(lengths, 1)
    sums = edits_N4.sum(0).astype(int)
    return Scored(
        f"{rate}/1 (jiwer {version})", name,
        {
            rate: ratio(errors, lengths), f"{rate}_paper": ratio(errors * said, lengths * said),
            f"{rate}_mean_of_rows": ratio(each), f"{rate}_without_cut": ratio(errors * whole, lengths * whole),
        },
        f"{rate}_paper",
        {
            "substitutions": int(sums[0]), "deletions": int(sums[1]), "insertions": int(sums[2]), "hits": int(sums[3]),
            "cut": int((~whole).sum()), "errors_in_cut": int((errors * ~whole).sum()),
            "left_out_by_paper": int((~said).sum()),
        },
    )  # fmt: skip


# -- answers of few words ----------------------------------------------------------------------------------------------


def exact(output: str | None, references: Sequence[str]) -> bool:
    """Is an output one of the references, to the character? Training's validation counts with it too."""
    return output in references


def most_frequent(references: Sequence[str]) -> Number:
    """What always giving the most frequent reference gets."""
    most = Counter(references).most_common(1)
    return ratio([reference == most[0][0] for reference in references])


# -- one label ---------------------------------------------------------------------------------------------------------


def labels_in(output: str, labels: Sequence[str]) -> set[str]:
    """The labels (plain) that stand in a text as whole words, and not only within a longer one that does: "female" says
    nothing of "male", "acoustic guitar" nothing of "guitar"."""
    text = f" {plain(output)} "
    found = set()
    for label in sorted({plain(label) for label in labels} - {""}, key=lambda label: (-len(label), label)):
        while f" {label} " in text:
            found.add(label)
            text = text.replace(f" {label} ", " | ")
    return found


def label(rows: Sequence[Row], labels: Sequence[str] = ()) -> Scored:
    """One label of a set.

    `contained`: of all labels the reference alone stands in the output. `strict`: it is the output, but for case and
    punctuation; `exact`: to the character. `contained_paper`, the authors' rule: the reference's characters stand
    somewhere in the output's.

    The set is `labels`, or else all references and choices of the task.
    """
    known = sorted({*labels, *(text for row in rows for text in (*row.references, *row.choices))})
    found = [labels_in(row.text, known) for row in rows]
    return Scored(
        "label/1", normaliser("plain")[1],
        {
            "contained": ratio([f == {plain(row.references[0])} for f, row in zip(found, rows, strict=True)]),
            "strict": ratio([plain(row.text) == plain(row.references[0]) for row in rows]),
            "exact": ratio([exact(row.output, row.references) for row in rows]),
            "contained_paper": ratio([row.references[0].lower().strip() in row.text.lower().strip() for row in rows]),
            "most_frequent": most_frequent([row.references[0] for row in rows]),
        },
        "contained_paper",
        {"unparsed": sum(not f for f in found), "several": sum(len(f) > 1 for f in found), "labels": len(known)},
        "most_frequent",
    )  # fmt: skip


# -- several labels ----------------------------------------------------------------------------------------------------


def labels(rows: Sequence[Row], separator: str = ";", rewrite: Sequence[Sequence[str]] = ()) -> Scored:
    """Average precision of binary labels, mean over the labels that references name, as scikit-learn computes it; F1
    beside it, and what predicting nothing gets.

    `rewrite`: pairs (from, to) that bring an output's labels to the references' spelling. A label that no reference
    names is no label: counted, and of no effect, as in the authors' script.
    """
    wanted = [{text.lower().strip() for text in row.references} for row in rows]
    names = sorted(set().union(*wanted))
    column = {name: k for k, name in enumerate(names)}
    number, n = len(names), len(rows)
    rows_NK = np.zeros((n, 3 * number + 1))  # by label: hit, said, true; then 1
    rows_NK[:, -1] = 1
    unknown = unparsed = 0
    for place, (row, true) in enumerate(zip(rows, wanted, strict=True)):
        said = set()
        for text in row.text.lower().split(separator):
            text = text.strip()
            for old, new in rewrite:
                text = text.replace(old, new)
            if text:
                said.add(text)
                unknown += text not in column
        unparsed += not said & column.keys()
        for name in said & column.keys():
            rows_NK[place, column[name]] = name in true
            rows_NK[place, number + column[name]] = 1
        for name in true:
            rows_NK[place, 2 * number + column[name]] = 1

    def parts(sums: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        return sums[..., :number], sums[..., number : 2 * number], sums[..., 2 * number : -1], sums[..., -1:]

    def precision(hit: Floats, said: Floats, true: Floats, of: Floats) -> Floats:
        # two thresholds: the label said; everything
        with np.errstate(invalid="ignore", divide="ignore"):
            recall = hit / true  # nan where a draw holds no row with the label
            return recall * np.where(said > 0, hit / np.maximum(said, 1), 0) + (1 - recall) * true / of

    def macro(sums: Floats) -> Floats:
        return np.nanmean(precision(*parts(sums)), axis=-1)

    def micro(sums: Floats) -> Floats:
        hit, said, true, of = (p.sum(-1) for p in parts(sums))
        return precision(hit, said, true, of * number)

    def f1(sums: Floats) -> Floats:
        hit, said, true, _ = parts(sums)
        return np.nanmean(np.where(said + true > 0, 2 * hit / np.maximum(said + true, 1), np.nan), axis=-1)

    def nothing(sums: Floats) -> Floats:
        hit, said, true, of = parts(sums)
        return np.nanmean(precision(hit * 0, said * 0, true, of), axis=-1)

    functions = {"macro_ap": macro, "micro_ap": micro, "macro_f1": f1, "macro_ap_of_nothing": nothing}
    return Scored(
        "labels/1", "lower case", {name: Number(rows_NK, f) for name, f in functions.items()}, "macro_ap",
        {"labels": number, "unknown_labels": unknown, "unparsed": unparsed}, "macro_ap_of_nothing",
    )  # fmt: skip


# -- one of several choices --------------------------------------------------------------------------------------------

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def letter(output: str, choices: Sequence[str]) -> str | None:
    """The letter that an output means, or None: never a guess.

    Understood: the letter alone ("b", "(B)", "B.", "**B**"), before its choice ("B) Rock", "B Rock"), behind "answer",
    "option" or "choice", in parentheses anywhere, or the one choice whose words stand in the output.
    """
    valid = LETTERS[: len(choices)] if choices else LETTERS
    text = re.sub(r"[*_`\"“”]", "", output).strip()
    one = f"[{valid}{valid.lower()}]"
    alone = re.fullmatch(rf"[(\[]?({one})[)\]]?[.:,;]?", text)
    if alone:
        return alone[1].upper()
    names = [plain(choice) for choice in choices]
    if names.count(plain(text)) == 1:
        return valid[names.index(plain(text))]
    first = re.match(rf"(?:[(\[]({one})[)\]]|({one})[).:\]]|([{valid}])(?=\s))\s*", text)
    stated = set(re.findall(rf"[(\[]([{valid}])[)\]]", text))
    before = r"(?i:answer|option|choice)\s*(?i:is|:|=)?\s*(?:(?i:option|choice)\s*)?"
    stated |= set(re.findall(rf"{before}([{valid}])\b", text))
    if first:
        said, rest = next(g for g in first.groups() if g).upper(), plain(text[first.end() :])
        bare = first[3] is not None  # "A dog barks" begins with no letter
        if not bare or (names and rest.startswith(names[valid.index(said)])):
            stated.add(said)
    if len(stated) == 1:
        return stated.pop()
    if stated:
        return None
    found = labels_in(text, choices)
    if len(found) == 1 and names.count(next(iter(found))) == 1:
        return valid[names.index(found.pop())]
    return None


def token_subset(reference: str, output: str, choices: Sequence[str]) -> bool:
    """MMAU's rule: all words of the reference are in the output, and no word that only other choices have."""

    def words(text: str) -> set[str]:
        return set(re.findall(r"\b\w+\b", text.lower()))

    said, right = words(output), words(reference)
    if not said:
        return False
    wrong = set().union(*(words(choice) - right for choice in choices if words(choice) != right))
    return right <= said and not said & wrong


def choice(rows: Sequence[Row]) -> Scored:
    """One of several choices, whose reference is its letter or its text.

    `accuracy` by the letter that the output means, `exact` (the output is the reference), and MMAU's rule, with the
    reference as it stands (`token_subset_paper`) and with its text: letters never match texts, which makes a model that
    answers with letters look like nothing.
    """
    right, texts = [], []
    for row in rows:
        reference = row.references[0].strip()
        names = [plain(c) for c in row.choices]
        is_letter = reference in LETTERS[: len(row.choices) or None] and len(reference) == 1
        right.append(reference if is_letter else letter(reference, row.choices) or "?")
        assert right[-1] != "?", f"{row.id}: the reference {reference!r} is none of {row.choices}"
        texts.append(row.choices[LETTERS.index(right[-1])] if names else reference)
    meant = [letter(row.text, row.choices) for row in rows]
    return Scored(
        "choice/1", normaliser("plain")[1],
        {
            "accuracy": ratio([m == r for m, r in zip(meant, right, strict=True)]),
            "exact": ratio([row.text.strip() == row.references[0].strip() for row in rows]),
            "token_subset_paper": ratio([token_subset(row.references[0], row.text, row.choices) for row in rows]),
            "token_subset_of_texts": ratio(
                [token_subset(t, row.text, row.choices) for t, row in zip(texts, rows, strict=True)]
            ),
            "most_frequent": most_frequent(right),
        },
        "token_subset_paper", {"unparsed": sum(m is None for m in meant)}, "most_frequent",
    )  # fmt: skip


# -- captions and open answers -----------------------------------------------------------------------------------------


def word_f1(rows: Sequence[Row]) -> Number:
    """Words (plain) that output and reference share, as F1 with the best reference: crude, and needs no model."""
    each = []
    for row in rows:
        said, best = plain(row.text).split(), 0.0
        for reference in row.references:
            words = plain(reference).split()
            common = sum(min(said.count(w), words.count(w)) for w in set(said) & set(words))
            best = max(best, 2 * common / (len(said) + len(words)) if common else 0.0)
        each.append(best)
    return ratio(each)
