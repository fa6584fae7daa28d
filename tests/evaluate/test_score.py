"""Scorers against numbers that the authors' own scripts give, and against what must hold for any scorer."""

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest

from midasheng.evaluate import normalise
from midasheng.evaluate.rows import MISSING, Row
from midasheng.evaluate.score import (
    Scored,
    choice,
    counts,
    label,
    labels,
    labels_in,
    letter,
    looks_cut,
    ratio,
    token_subset,
    transcripts,
    word_f1,
)

GOLDEN = Path(__file__).parent.parent / "golden"
FSD50K = [[", and ", " and "], [", ", " and "]]  # as the authors' script rewrites outputs


def golden(name: str, reference: str) -> list[Row]:
    with gzip.open(GOLDEN / f"MiDashengLM_{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines]
    return [
        Row(
            f["audio"], name, f["prompt"], tuple(f.get("choices", ())),
            tuple(f[reference]) if isinstance(f[reference], list) else (f[reference],), f["model_output"],
        )
        for f in found
    ]  # fmt: skip


def value(scored: Scored, name: str) -> float:
    found = scored.numbers[name].value
    assert found is not None
    return found


def row(output: str | None, *references: str, choices: tuple[str, ...] = (), number: int = 0) -> Row:
    return Row(f"r{number}", "t", "?", choices, references, output)


# -- golden ------------------------------------------------------------------------------------------------------------


def test_golden_word_error_rate():
    scored = transcripts(golden("LibriSpeech_test-clean", "text"))
    assert value(scored, "wer") == pytest.approx(0.03713062663825454, abs=1e-9)
    assert value(scored, "wer_paper") == pytest.approx(0.03713062663825454, abs=1e-9)
    assert value(scored, "wer_mean_of_rows") == pytest.approx(0.031196894581594477, abs=1e-9)
    told = scored.counts
    assert [told[k] for k in ("substitutions", "deletions", "insertions", "hits")] == [945, 891, 133, 51_193]


def test_golden_truncation_report():
    """The authors' cap cut 34 transcripts in mid-sentence, which hold a third of all errors."""
    scored = transcripts(golden("LibriSpeech_test-clean", "text"))
    assert scored.counts["cut"] == 34
    assert scored.counts["errors_in_cut"] == 681
    assert value(scored, "wer_without_cut") == pytest.approx(0.025450018771364775, abs=1e-9)


def test_golden_empty_outputs_strict_and_paper():
    rows = golden("LibriSpeech_test-clean", "text")
    blank = set(random.Random(0).sample(range(len(rows)), int(0.05 * len(rows))))
    rows = [row if n not in blank else Row(**{**vars(row), "output": ""}) for n, row in enumerate(rows)]
    scored = transcripts(rows)
    assert value(scored, "wer") == pytest.approx(0.08220030549322069, abs=1e-9)
    assert value(scored, "wer_paper") == pytest.approx(0.03745747962977612, abs=1e-9)
    assert counts(rows)["empty"] == scored.counts["left_out_by_paper"] == 131


def test_golden_average_precision():
    scored = labels(golden("FSD50K", "label"), rewrite=FSD50K)
    assert value(scored, "macro_ap") == pytest.approx(0.37577912178191597, abs=1e-9)
    assert value(scored, "micro_ap") == pytest.approx(0.4337798671503926, abs=1e-9)
    assert value(scored, "macro_f1") == pytest.approx(0.542236725776197, abs=1e-9)
    assert value(scored, "macro_ap_of_nothing") == pytest.approx(0.01886228130192552, abs=1e-9)
    assert scored.counts["unknown_labels"] == 478


def test_golden_choices():
    scored = choice(golden("MuChoMusic", "answer"))
    assert value(scored, "token_subset_paper") == pytest.approx(0.7135636057287279, abs=1e-9)
    assert value(scored, "exact") == pytest.approx(0.7076663858466723, abs=1e-9)
    assert value(scored, "token_subset_of_texts") == 0.0
    # every answer has one letter, so parsing and the authors' rule agree
    assert scored.counts["unparsed"] == 0
    assert value(scored, "accuracy") == pytest.approx(0.7135636057287279, abs=1e-9)


# -- what must hold of any scorer --------------------------------------------------------------------------------------

INSTRUMENTS = ("guitar", "acoustic guitar", "violin", "male voice", "female voice")
SETS = [
    ("music", "guitar"),
    ("speech",),
    ("guitar", "acoustic guitar", "music"),
    ("male speech, man speaking",),
    ("music",),
]
OPTIONS = ("Rock", "Jazz and blues", "Blues", "A dog")


def tasks() -> list[tuple[str, object, list[Row]]]:
    """Each scorer with rows that are answered perfectly."""
    words = ["he hoped there would be stew", "turnips and carrots", "two", "mister quilter is the apostle"]
    numbers = ["二零零五年有一百二十人", "今天天气很好"]
    return [
        ("wer", transcripts, [row(t, t, number=n) for n, t in enumerate(words)]),
        ("cer", lambda rows: transcripts(rows, "chinese", "characters"), [row(t, t, number=n) for n, t in enumerate(numbers)]),
        ("contained", label, [row(t, t, number=n) for n, t in enumerate(INSTRUMENTS)]),
        ("macro_ap", labels, [row(";".join(s), *s, number=n) for n, s in enumerate(SETS)]),
        ("accuracy", choice, [row("ABCD"[n % 4], "ABCD"[n % 4], choices=OPTIONS, number=n) for n in range(8)]),
        ("accuracy", choice, [row(OPTIONS[n % 4], OPTIONS[n % 4], choices=OPTIONS, number=n) for n in range(8)]),
    ]  # fmt: skip


KINDS = [name + str(n) for n, (name, _, _) in enumerate(tasks())]
PERFECT = {"wer": 0.0, "cer": 0.0}


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
def test_perfect_answers_score_perfectly(kind):
    name, scorer, rows = tasks()[kind]
    scored = scorer(rows)
    assert next(iter(scored.numbers)) == name
    assert value(scored, name) == value(scored, scored.paper) == PERFECT.get(name, 1.0)
    assert scored.numbers[name].interval() == (PERFECT.get(name, 1.0),) * 2


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
def test_the_order_of_rows_does_not_matter(kind):
    _, scorer, rows = tasks()[kind]
    rng = random.Random(kind)
    outputs = [r.output for r in rows]
    rng.shuffle(outputs)  # so that some are wrong
    rows = [Row(**{**vars(r), "output": o}) for r, o in zip(rows, outputs, strict=True)]
    one = scorer(rows)
    rng.shuffle(rows)
    other = scorer(rows)
    assert one.counts == other.counts
    for name, number in one.numbers.items():
        assert number.value == pytest.approx(other.numbers[name].value, abs=1e-12), name


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=KINDS)
@pytest.mark.parametrize("nothing", ["", "  ", None], ids=["empty", "blank", "missing"])
def test_empty_and_missing_outputs_are_wrong_and_counted(kind, nothing):
    """A model that answers hard questions with nothing must not get better by it."""
    name, scorer, rows = tasks()[kind]
    silent = {"output": nothing, "finish_reason": "stop" if nothing is not None else MISSING}
    rows = [Row(**{**vars(rows[0]), **silent}), *rows[1:]]
    scored = scorer(rows)
    assert len(scored.numbers[name].rows_NK) == len(rows)
    assert (value(scored, name) > 0) if name in PERFECT else (value(scored, name) < 1)
    told = counts(rows)
    assert (told["n"], told["empty"], told["missing"]) == (len(rows), 1, int(nothing is None))
    if name in PERFECT:  # only here, and only where its name says so
        assert value(scored, f"{name}_paper") == 0
        assert scored.counts["left_out_by_paper"] == 1
    assert value(scorer([Row(**{**vars(r), **silent}) for r in rows]), name) == pytest.approx(
        {"wer": 1.0, "cer": 1.0, "macro_ap": value(scored, "macro_ap_of_nothing") if name == "macro_ap" else 0}.get(
            name, 0
        )
    )


SPELLINGS = [
    "B", "b", " B ", "(B)", "[B]", "(b)", "B.", "B)", "B:", "**B**", "B) Jazz and blues", "(B) Jazz and blues",
    "B. Jazz and blues", "B Jazz and blues", "b) jazz and blues", "The answer is B", "The answer is (B).", "Answer: B",
    "answer: (B) Jazz and blues", "Option B", "The correct option is B.", "I think it is (B), because of the piano.",
    "Jazz and blues", "jazz and blues.", "It sounds like jazz and blues to me", '"B"', "The answer is B: Jazz and blues",
]  # fmt: skip


@pytest.mark.parametrize("output", SPELLINGS)
def test_letters_in_every_usual_spelling(output):
    assert letter(output, OPTIONS) == "B"
    assert letter(output.replace("Answer", "ANSWER"), OPTIONS) == "B"


@pytest.mark.parametrize(
    ("output", "meant"),
    [
        ("", None), ("E", None), ("A or B", None), ("(A) (C)", None), ("none of them", None), ("rock or jazz and blues", None),
        ("A dog barks", "D"), ("A piano plays", None), ("C", "C"), ("blues", "C"), ("Blues Brothers", "C"), ("Cats", None),
        ("I am sure", None), ("a", "A"), ("answer", None), ("Be quiet", None), ("A Rock", "A"), ("A) jazz", "A"),
    ],
)  # fmt: skip
def test_a_letter_is_never_guessed(output, meant):
    assert letter(output, OPTIONS) == meant


def test_choices_that_read_alike_are_not_told_apart_by_their_text():
    assert letter("rock", ("Rock", "rock!", "Jazz")) is None
    assert letter("B", ("Rock", "rock!", "Jazz")) == "B"


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ("female voice", {"female voice"}), ("a male voice", {"male voice"}), ("acoustic guitar", {"acoustic guitar"}),
        ("an acoustic guitar and a guitar", {"acoustic guitar", "guitar"}), ("guitars", set()), ("Guitar.", {"guitar"}),
        ("guitar guitar guitar", {"guitar"}), ("VIOLIN; guitar", {"violin", "guitar"}), ("", set()),
    ],
)  # fmt: skip
def test_a_label_within_another_is_not_found(output, found):
    assert labels_in(output, INSTRUMENTS) == found


def test_a_label_within_another_is_no_right_answer():
    """The authors' rule takes "female" for "male": a model that always says female is right about every man."""
    rows = [row("female", "male", number=n) for n in range(3)] + [row("female", "female", number=3)]
    scored = label(rows)
    assert value(scored, "contained") == value(scored, "strict") == 0.25
    assert value(scored, "contained_paper") == 1.0
    chatty = label([row("It is a female voice.", "female"), row("male or female", "male"), row("x", "male")])
    assert value(chatty, "contained") == pytest.approx(1 / 3)
    assert value(chatty, "strict") == 0
    assert (chatty.counts["unparsed"], chatty.counts["several"]) == (1, 1)


def test_average_precision_is_that_of_scikit_learn():
    """Against its definition, label by label: precision at each threshold, weighted by the rise in recall."""
    rng = np.random.default_rng(0)
    names = [f"l{k}" for k in range(6)]
    rows = []
    for n in range(40):
        true = [x for x in names if rng.random() < 0.4] or ["l0"]
        said = [x for x in [*names, "other"] if rng.random() < 0.4]
        rows.append(row(";".join(said), *true, number=n))
    each = []
    for name in names:
        true = np.array([name in r.references for r in rows])
        said = np.array([name in (r.output or "").split(";") for r in rows])
        ap = before = 0.0
        for threshold in (1, 0):
            at = said >= threshold
            recall = (true & at).sum() / true.sum()
            ap += (recall - before) * (true & at).sum() / max(at.sum(), 1)
            before = recall
        each.append(ap)
    assert value(labels(rows), "macro_ap") == pytest.approx(np.mean(each), abs=1e-12)


def test_the_interval_holds_what_it_says():
    """Of 200 samples of a known mean about 95 % of the intervals hold it; the same seed gives the same interval."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        number = ratio((rng.random(80) < 0.3).astype(float))
        low, high = number.interval(400)
        held += low <= 0.3 <= high
    assert 0.89 <= held / 200 <= 0.99
    assert number.interval() == number.interval()
    finer = ratio(rng.random(80))
    assert finer.interval(seed=1) != finer.interval(seed=2)
    assert ratio([1.0]).interval() is None  # one row says nothing of spread
    assert ratio([0.0], [0.0]).value is None


def test_the_interval_draws_clips_and_not_rows():
    """Five questions about a clip, all right or all wrong: as wide as of the clips, whatever the order of the rows; drawn
    by rows it would be narrower by more than half and hold the mean in two of three samples."""
    rng = np.random.default_rng(2)
    held = {"clips": 0, "rows": 0}
    for _ in range(200):
        right = (rng.random(40) < 0.3).astype(float)
        rows, names = ratio(np.repeat(right, 5)), [f"clip{n}" for n in range(40) for _ in range(5)]
        for way, clips in (("clips", names), ("rows", [])):
            low, high = rows.interval(400, clips=clips)
            held[way] += low <= 0.3 <= high
    assert 0.89 <= held["clips"] / 200 <= 0.99
    assert held["rows"] / 200 < 0.75
    assert rows.interval(clips=names) == ratio(right).interval()
    one_by_one = ratio(np.tile(right, 5)).interval(clips=[f"clip{n}" for _ in range(5) for n in range(40)])
    assert one_by_one == ratio(right).interval()
    assert rows.interval(clips=[str(n) for n in range(200)]) == rows.interval()
    assert rows.interval(clips=["the only clip"] * 200) is None
    errors, words = rng.integers(0, 5, 200).astype(float), rng.integers(5, 9, 200).astype(float)
    summed = [v.reshape(40, 5).sum(1) for v in (errors, words)]
    assert ratio(errors, words).interval(clips=names) == ratio(*summed).interval()


def test_mmau_rule_needs_all_words_and_none_of_other_choices():
    assert token_subset("Jazz and blues", "jazz and blues, I think", OPTIONS)
    assert not token_subset("Blues", "jazz blues", OPTIONS)
    assert not token_subset("Jazz and blues", "jazz", OPTIONS)
    assert not token_subset("Jazz", "", OPTIONS)


def test_a_whole_transcript_is_not_cut():
    assert looks_cut("and then he", 3, 9)
    assert not looks_cut("and then he left.", 4, 9)
    assert not looks_cut('"and then he left."', 4, 9)
    assert not looks_cut("and then he left", 9, 9)
    assert not looks_cut("", 0, 9)  # empty is empty


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("120", "一百二十"), ("10", "十"), ("2005", "二千零五"), ("2005年", "二零零五年"), ("3.14", "三点一四"), ("50%", "百分之五十"),
        ("007", "零零七"), ("13800138000", "一三八零零一三八零零零"), ("１２", "十二"), ("10,000", "一万"), ("100200", "十万零二百"),
        ("20000000", "二千万"), ("0", "零"), ("1010", "一千零一十"), ("你好，世界！", "你好世界"), ("ＡＢ c", "abc"), ("<|zh|>好", "好"),
        ("一〇一", "一零一"), ("110 个", "一百一十个"), ("15", "十五"), ("315", "三百一十五"), ("10010", "一万零一十"),
    ],
)  # fmt: skip
def test_chinese_numbers_are_words(text, words):
    assert normalise.chinese(text) == words


def test_a_normaliser_is_named_with_its_version():
    assert normalise.normaliser("chinese")[1] == f"chinese/{normalise.CHINESE_VERSION}"
    assert "whisper-normalizer 0." in normalise.normaliser("english")[1]


def test_word_f1():
    assert word_f1([row("a dog barks", "a dog barks", "a cat")]).value == 1
    assert word_f1([row("a dog", "the dog barks loudly"), row("", "x")]).value == pytest.approx((2 * 1 / 6) / 2)
