"""Cards and mixes are read strictly."""

import pytest
import yaml

from midasheng.data.audio import Skip
from midasheng.data.manifest import Card, ManifestError, MixFile, conversations, read_card, read_mix
from tests.conftest import CONFIGS

MANIFESTS = CONFIGS.parent / "data_manifests"
CARD = {"name": "a", "task": "asr", "shards": "a-*.tar", "licence": "none", "prompts": ["Write."], "answer": "text"}
# cards for slices: of known hours, of pairs, of parts; `tongues` leaves 100 - 70 hours to the parts that tell none
SIZED = {
    "a": {}, "bee": {}, "long": {"hours": 300}, "short": {"hours": 100.0},
    "asks": {"n_pairs": 30, "hours": 1000.0}, "doubts": {"n_pairs": 10},
    "tongues": {
        "hours": 100, "parts": {"en": 60, "fr": 10.0, "ko": 0, "other": 0}, "languages": ["en", "fr", "ko", "it"],
        "shards": "t.<part>/t.<part>-{00..11}.tar", "prompts": ["<|{language}|>"],
    },
}  # fmt: skip


@pytest.fixture
def mix(tmp_path):
    """Write a mix beside cards `a` and `bee`, and those of SIZED; returns its reader."""
    (tmp_path / "corpora").mkdir()
    (tmp_path / "m").mkdir()
    for name, more in SIZED.items():
        (tmp_path / "corpora" / f"{name}.yaml").write_text(yaml.safe_dump(CARD | {"name": name} | more))

    def read(corpora: object, name: str = "align", **more: object):
        (tmp_path / "m" / "align.yaml").write_text(yaml.safe_dump({"corpora": corpora, **more}))
        return read_mix(name, tmp_path / "m")

    return read


@pytest.fixture
def card(tmp_path):
    """Write card `a` with changes (None: without the key); returns what is read."""

    def read(**changes: object):
        content = {k: v for k, v in (CARD | changes).items() if v is not None}
        (tmp_path / "a.yaml").write_text(yaml.safe_dump(content))
        return read_card(tmp_path / "a.yaml")

    return read


def test_shares_near_100_are_scaled_and_said_so(mix):
    read = mix({"a": 30.2, "bee": 70.2})
    assert sum(read.percent) == pytest.approx(100)
    assert read.percent[0] == pytest.approx(3020 / 100.4)
    assert "sum to 100.4; scaled" in read.notes[0]
    assert mix({"a": 30, "bee": 70}).notes == ()


@pytest.mark.parametrize(
    ("corpora", "says"),
    [
        ({"a": 30, "bee": 60}, "sum to 90 percent"),
        ({"a": 50, "bee": 51}, "sum to 101 percent"),
        ({"a": 101, "bee": -1}, "bee: -1 is no share"),
        ({"a": 100, "bee": 0}, "bee: 0 is no share"),
        ({"a": 99, "bee": True}, "bee: True is no share"),
        ({"a": 99, "bee": "1"}, "bee: '1' is no share"),
        ({"a": 99, "bee": float("nan")}, "bee: nan is no share"),
        ({"a": 99, "be": 1}, "`be` has no card .*did you mean `bee`"),
        ({"a": 99, 3: 1}, "`3` has no card"),
        ({}, "write `corpora:`"),
        (["a"], "write `corpora:`"),
    ],
)
def test_mistakes_in_a_mix(mix, corpora, says):
    with pytest.raises(ManifestError, match=says):
        mix(corpora)


def test_mix_that_is_not_there(mix):
    with pytest.raises(ManifestError, match=r"no manifest .*alin.yaml \(there are: align\)"):
        mix({"a": 100}, "alin")
    with pytest.raises(ManifestError, match="nothing else"):
        mix({"a": 100}, seed=3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"propmts": ["x"]}, "unknown key `propmts`; did you mean `prompts`"),
        ({"licence": None}, "missing key `licence`"),
        ({"name": "b"}, "its name is `b`"),
        ({"pairs": "questions"}, "either `prompts` and `answer`, or `pairs`"),
        ({"pairs": "questions", "prompts": None}, "either"),
        ({"prompts": None, "answer": None}, "either"),
        ({"prompts": None}, "either"),
        ({"prompts": []}, "either"),
        ({"answer": None}, "either"),
        ({"prompts": "Write."}, "prompts: 'Write.' is not of type list"),
        ({"audio": "no"}, "audio: 'no' is not of type bool"),
        ({"held_out": 3}, "held_out: 3 is not"),
        ({"held_out": {"by": "source", "share": 0.1}}, "missing key `max`"),
        ({"held_out": {"by": "source", "share": "1e-4", "max": 3}}, "share: '1e-4' is not of type float"),
        ({"held_out": {"by": "source", "share": 8, "max": 3}}, "share 8 lies in 0 to 1"),
        ({"held_out": {"by": "source", "share": 0.1, "max": -3}}, "max is not negative"),
        ({"answers": "both"}, "answers: 'both' is neither `one` nor `all`"),
        ({"hours": "12"}, "hours: '12' is not of type float"),
        ({"n_pairs": 1.5}, "n_pairs: 1.5 is not of type int"),
        ({"parts": {"en": 1}}, "`parts` and <part> in `shards` belong together"),
        ({"shards": "a.<part>-*.tar"}, "`parts` and <part> in `shards` belong together"),
        ({"parts": ["en"], "shards": "<part>.tar"}, r"parts: \['en'\] is not of type dict"),
        ({"parts": {"en": True}, "shards": "<part>.tar"}, "parts: {'en': True} is not of type dict"),
        ({"parts": {False: 1}, "shards": "<part>.tar"}, "parts: {False: 1} is not of type dict"),  # `no: 1` in YAML
        ({"languages": [False]}, r"languages: \[False\] is not of type list"),  # [no]
        ({"audio": False, "alike": "language"}, "`context` and `alike` are about a clip"),
        ({"audio": False, "context": "{text}"}, "`context` and `alike` are about a clip"),
    ],
)
def test_mistakes_in_a_card(card, changes, says):
    with pytest.raises(ManifestError, match=says):
        card(**changes)


def test_all_manifests_are_read():
    """Every card, by its parts where it has any, in some mix; cards of the same shards hold out the same records."""
    cards = {}
    for path in (MANIFESTS / "corpora").glob("*.yaml"):
        for part in yaml.safe_load(path.read_text()).get("parts", {"": 0}):
            card = read_card(path, part)
            cards[card.name] = card
    folders = ("mini", "generated", "report")
    mixes = [read_mix(p.stem, p.parent) for folder in folders for p in (MANIFESTS / folder).glob("*.yaml")]
    assert {c.name for m in mixes for c in m.cards} == cards.keys()
    rules = {(c.shards, c.held_out) for c in cards.values()}
    assert len(rules) == len({shards for shards, _ in rules}), "cards of the same shards hold out different records"


# -- slices ------------------------------------------------------------------------------------------------------------


def shares(mix) -> dict[str, float]:
    return {card.name: pytest.approx(percent) for card, percent in zip(mix.cards, mix.percent, strict=True)}


def test_a_slice_is_shared_by_hours(mix):
    read = mix({"bee": 20, "talk": {"percent": 80, "of": ["short", "long"]}})
    assert shares(read) == {"bee": 20, "short": 20, "long": 60}
    assert read.notes == ()


def test_without_a_share_a_corpus_is_refused_and_not_weighed_by_its_number_of_tars(mix):
    """In a slice too: a part of ten hours in twelve tars has a tenth of what a corpus of a hundred hours in one has."""
    with pytest.raises(ManifestError, match="bee: None is no share"):
        mix({"a": 99, "bee": None})
    with pytest.raises(ManifestError, match="write `corpora:` and below it `NAME: PERCENT`"):
        mix(["a", "bee"])
    assert shares(mix({"s": {"percent": 100, "of": ["tongues.fr", "short"]}})) == {
        "tongues.fr": 1000 / 110, "short": 10_000 / 110
    }  # fmt: skip


def test_a_slice_of_questions_is_shared_by_pairs(mix):
    assert shares(mix({"qa": {"percent": 100, "of": ["asks", "doubts"]}})) == {"asks": 75, "doubts": 25}


def test_a_slice_that_mixes_pairs_and_hours_goes_by_hours_and_needs_them(mix):
    assert shares(mix({"s": {"percent": 100, "of": ["asks", "long"]}})) == {"asks": 100 / 1.3, "long": 30 / 1.3}
    with pytest.raises(ManifestError, match="s: doubts tells no hours"):
        mix({"s": {"percent": 100, "of": ["doubts", "long"]}})


def test_corpora_can_be_left_out(mix, tmp_path):
    """Nobody has all corpora of the report: the others of a slice share it, and what goes is said."""
    lines = {
        "bee": 40,
        "talk": {"percent": 40, "of": ["short", "long"]},
        "qa": {"percent": 20, "of": ["asks", "doubts"]},
    }
    whole = mix(lines)
    assert (whole.left_out, whole.notes) == ((), ())
    read = read_mix("align", tmp_path / "m", ["long", "as*"])
    assert shares(read) == {"bee": 40, "short": 40, "doubts": 20}
    assert set(read.left_out) == {"long", "asks"}
    assert len(read.notes) == 1
    assert "without asks, long; 0 of 100 percent go with slices" in read.notes[0]
    read = read_mix("align", tmp_path / "m", ["asks", "doubts"])
    assert shares(read) == {"bee": 50, "short": 12.5, "long": 37.5}
    assert "20 of 100 percent go with slices" in read.notes[0]
    assert "sum to 80; scaled to 100" in read.notes[1]
    with pytest.raises(ManifestError, match=r"data\.without leaves nothing"):
        read_mix("align", tmp_path / "m", ["*"])


def test_slices_are_scaled_with_the_rest(mix):
    read = mix({"bee": 50.1, "talk": {"percent": 50.1, "of": ["short", "long"]}})
    assert shares(read) == {"bee": 50, "short": 12.5, "long": 37.5}
    assert "sum to 100.2; scaled to 100" in read.notes[0]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"percent": 1, "of": ["long", "bee"]}, "s: bee tells no hours, so it cannot share by them"),
        ({"percent": 1, "of": ["long", "short", "long"]}, "s names a corpus twice"),
        ({"percent": 1, "of": ["lng"]}, "`lng` has no card .*did you mean `long`"),
        ({"percent": 1, "of": []}, "a slice is written"),
        ({"percent": 1, "of": "long"}, "a slice is written"),
        ({"percent": 1, "of": {"long": 1}}, "a slice is written"),
        ({"percent": 1, "of": [False]}, "a slice is written"),
        ({"percent": 1}, "a slice is written"),
        ({"of": ["long"]}, "a slice is written"),
        ({"percents": 1, "of": ["long"]}, "a slice is written"),
        ({"percent": 1, "off": ["long"]}, "a slice is written"),
        ({"percent": 1, "of": ["long"], "by": "hours"}, "a slice is written"),
        ({}, "a slice is written"),
        (["long"], r"s: \['long'\] is no share"),
        ({"percent": 0, "of": ["long"]}, "s: 0 is no share"),
        ({"percent": -1, "of": ["long"]}, "s: -1 is no share"),
        ({"percent": True, "of": ["long"]}, "s: True is no share"),
        ({"percent": "1", "of": ["long"]}, "s: '1' is no share"),
        ({"percent": float("nan"), "of": ["long"]}, "s: nan is no share"),
        ({"percent": 3, "of": ["long"]}, "sum to 102 percent"),
    ],
)
def test_mistakes_in_a_slice(mix, line, says):
    with pytest.raises(ManifestError, match=says):
        mix({"a": 99, "s": line})


@pytest.mark.parametrize(
    "corpora",
    [
        {"long": 50, "s": {"percent": 50, "of": ["short", "long"]}},
        {"s": {"percent": 50, "of": ["short", "long"]}, "long": 50},
        {"s": {"percent": 50, "of": ["short", "long"]}, "t": {"percent": 50, "of": ["long"]}},
        {"s": {"percent": 50, "of": ["tongues.en", "long"]}, "tongues.en": 50},
    ],
)
def test_a_corpus_has_one_share_also_when_a_slice_holds_it(mix, corpora):
    with pytest.raises(ManifestError, match=r"corpus `(long|tongues.en)` stands in it twice"):
        mix(corpora)


# -- parts -------------------------------------------------------------------------------------------------------------


def test_a_part_is_a_card_of_its_own(mix):
    en, ko, other = mix({"tongues.en": 50, "tongues.ko": 30, "tongues.other": 20}).cards
    assert (en.name, en.hours, en.languages) == ("tongues.en", 60, ["en"])
    assert en.shards == "t.en/t.en-{00..11}.tar"
    assert en.parts == {}
    assert (en.task, en.prompts, en.licence) == ("asr", ["<|{language}|>"], "none")
    assert (ko.hours, ko.languages, ko.shards) == (15, ["ko"], "t.ko/t.ko-{00..11}.tar")  # (100 - 70) / 2
    assert (other.hours, other.languages) == (15, ["en", "fr", "ko", "it"])  # no language is called `other`


def test_parts_share_a_slice_by_their_hours(mix):
    read = mix({"s": {"percent": 100, "of": ["tongues.fr", "tongues.ko", "tongues.other", "long", "tongues.en"]}})
    assert shares(read) == {
        "tongues.fr": 2.5, "tongues.ko": 3.75, "tongues.other": 3.75, "long": 75, "tongues.en": 15,
    }  # fmt: skip


def test_parts_share_evenly_where_none_tells_hours(tmp_path):
    parts = {"parts": {"en": 0, "fr": 0}, "shards": "<part>.tar"}
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(CARD | parts | {"hours": 7}))
    assert [read_card(path, p).hours for p in ("en", "fr")] == [3.5, 3.5]
    path.write_text(yaml.safe_dump(CARD | parts))
    assert read_card(path, "en").hours == 0


@pytest.mark.parametrize(
    ("corpus", "says"),
    [
        ("tongues", "cannot name tongues; there is tongues.en, tongues.fr, tongues.ko, tongues.other"),
        ("tongues.it", "cannot name tongues.it; there is tongues.en"),
        ("tongues.en.fr", "cannot name tongues.en.fr; there is"),
        ("long.en", "cannot name long.en; there is long alone"),
        ("long.", "`long.` has no card .*did you mean `long`"),
        ("tonges.en", "`tonges.en` has no card .*tonges.yaml; did you mean `tongues`"),
    ],
)
def test_parts_that_are_not_there(mix, corpus, says):
    for corpora in ({corpus: 100}, {"s": {"percent": 100, "of": [corpus]}}):
        with pytest.raises(ManifestError, match=says):
            mix(corpora)


def test_a_card_whose_own_name_holds_a_dot_is_no_part(mix, tmp_path):
    """`make prepare NAME=long.en` writes one."""
    more = {"name": "long.en", "hours": 3}
    (tmp_path / "corpora" / "long.en.yaml").write_text(yaml.safe_dump(CARD | more))
    assert shares(mix({"long.en": 40, "long": 60})) == {"long.en": 40, "long": 60}


# -- prompts that wrap pairs -------------------------------------------------------------------------------------------

ASKED = {
    "question": "of the record",
    "language": "en",
    "questions": [
        {"question": "What sings?", "answer": "A bird.", "options": "(A) bird\n(B) frog"},
        {"question": "Is it {loud}?", "answer": "yes", "options": "(A) yes\n(B) no"},
    ],
}


def turns(content: dict, **changes: object) -> list[tuple[str, str]]:
    """(question, answer) of every conversation of a card of pairs."""
    made = conversations(Card("a", "qa", "a.tar", "none", pairs="questions", **changes), content, "here")
    assert all((ask.role, ask.clips, say.role, say.clips) == ("user", 1, "assistant", 0) for ask, say in made)
    return [(ask.text, say.text) for ask, say in made]


def test_pairs_may_have_prompts_and_need_none(card):
    assert card(pairs="questions", answer=None).prompts == ["Write."]
    assert card(pairs="questions", answer=None, prompts=None).prompts == []
    assert turns(ASKED) == [("What sings?", "A bird."), ("Is it {loud}?", "yes")]


def test_a_prompt_wraps_every_pair_with_its_own_fields(card):
    asked = turns(ASKED, prompts=["{question}\n{options}\nAnswer with a single Letter:"])
    assert asked == [
        ("What sings?\n(A) bird\n(B) frog\nAnswer with a single Letter:", "A bird."),
        ("Is it {loud}?\n(A) yes\n(B) no\nAnswer with a single Letter:", "yes"),
    ]


def test_every_prompt_wraps_every_pair_and_may_name_fields_of_the_record(card):
    assert turns(ASKED, prompts=["{question} ({language})", "{question}!"]) == [
        ("What sings? (en)", "A bird."), ("What sings?!", "A bird."),
        ("Is it {loud}? (en)", "yes"), ("Is it {loud}?!", "yes"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("{question} {choices}", "here: a prompt of a asks for JSON field 'choices'"),
        ("{qestion}", "here: a prompt of a asks for JSON field 'qestion'"),
        ("{question} {", "here: a prompt of a: .*a brace itself is written twice"),
    ],
)
def test_a_prompt_that_asks_for_what_a_pair_has_not(prompt, says):
    with pytest.raises(ManifestError, match=says):
        turns(ASKED, prompts=["{question}", prompt])


@pytest.mark.parametrize("prompts", [[], ["{question} Answer with 1-2 sentences"]])
@pytest.mark.parametrize("pairs", ["What?", ["What?"], [{"question": "What?"}], [{"answer": "It."}], None, 3])
def test_pairs_that_are_none(prompts, pairs):
    with pytest.raises(ManifestError, match=r"here: `questions` is no list of \{question, answer\}"):
        turns({"questions": pairs}, prompts=prompts)
    with pytest.raises(Skip, match="no text"):
        turns({"questions": []}, prompts=prompts)


# -- mix.yaml of a run that is going on --------------------------------------------------------------------------------


@pytest.fixture
def live(tmp_path):
    """(the file, who follows it) of a run on corpora `bee` and `a`."""
    return tmp_path / "mix.yaml", MixFile(tmp_path / "mix.yaml", ["bee", "a"])


def test_shares_are_followed_once_each_in_the_order_of_the_run(live):
    path, mix = live
    assert mix.look() is None  # nobody has written one
    path.write_text("corpora: {a: 30, bee: 70}")
    assert mix.look() == (70.0, 30.0)
    assert mix.look() is None
    path.write_text("corpora:\n  bee: 70.0  # touched, not changed\n  a: 30.0\n")
    assert mix.look() is None
    path.write_text("corpora: {a: 100, bee: 0}")
    assert mix.look() == (0.0, 100.0)
    path.unlink()
    assert mix.look() is None
    path.write_text("corpora: {a: 30, bee: 70}")
    assert mix.look() == (70.0, 30.0)


MISTAKES = {
    "corpora: {a: 30, bee: 60}": "100 in all",
    "corpora: {a: 30, bee: 70, c: 0}": "a percentage for each of bee, a",
    "corpora: {a: 100}": "a percentage for each of bee, a",
    "corpora: {a: 101, bee: -1}": "100 in all",
    "corpora: {a: .nan, bee: 100}": "100 in all",
    "corpora: {a: '30', bee: 70}": "100 in all",
    "corpora: {a: 99, bee: true}": "100 in all",
    "corpora: [a, bee]": "write `corpora:`",
    "a: 30": "write `corpora:`",
    "corpora: {a: 30": "cannot be read as YAML",
    "": "expected `key: value` lines",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_in_the_shares_of_a_run_is_said_once_and_the_run_goes_on(live, capsys, text):
    path, mix = live
    path.write_text("corpora: {a: 30, bee: 70}")
    mix.look()
    path.write_text(text)
    assert [mix.look(), mix.look(), mix.look()] == [None] * 3
    said = capsys.readouterr().err
    assert said.count("not followed: ") == 1
    assert MISTAKES[text] in said
    assert str(path) in said
    path.write_text("corpora: {a: 40, bee: 60}")
    assert mix.look() == (60.0, 40.0)


@pytest.mark.parametrize(
    "data", [b"corpora: {a: 30, bee: 70} # caf\xe9", b"corpora: {a: 2024-13-45, bee: 1}", b"\xff\xfe\0"]
)
def test_what_no_mistake_was_thought_of_does_not_end_the_run_either(live, capsys, data):
    path, mix = live
    path.write_bytes(data)
    assert mix.look() is None
    assert "not followed: " in capsys.readouterr().err


def test_a_file_that_goes_away_while_it_is_looked_at_does_not_end_the_run(live, monkeypatch, capsys):
    """An editor moves its new file over the old one."""
    path, mix = live
    path.write_text("corpora: {a: 30, bee: 70}")
    there = type(path).is_file

    def gone(self):
        found = there(self)
        path.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(type(path), "is_file", gone)
    assert mix.look() is None
