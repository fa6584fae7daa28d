"""Cards and mixes are read strictly."""

import pytest
import yaml

from midasheng.data.manifest import ManifestError, MixFile, read_card, read_mix
from tests.conftest import CONFIGS

MANIFESTS = CONFIGS.parent / "data_manifests"
CARD = {"name": "a", "task": "asr", "shards": "a-*.tar", "licence": "none", "prompts": ["Write."], "answer": "text"}


@pytest.fixture
def mix(tmp_path):
    """Write a mix beside cards `a` and `bee`; returns its reader."""
    (tmp_path / "corpora").mkdir()
    (tmp_path / "m").mkdir()
    for name in ("a", "bee"):
        (tmp_path / "corpora" / f"{name}.yaml").write_text(yaml.safe_dump(CARD | {"name": name}))

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
        ({"pairs": "questions", "answer": None}, "either"),
        ({"pairs": "questions", "prompts": None}, "either"),
        ({"prompts": None, "answer": None}, "either"),
        ({"answer": None}, "either"),
        ({"prompts": "Write."}, "prompts: 'Write.' is not of type list"),
        ({"audio": "no"}, "audio: 'no' is not of type bool"),
        ({"held_out": 3}, "held_out: 3 is not"),
        ({"held_out": {"by": "source", "share": 0.1}}, "missing key `max`"),
        ({"held_out": {"by": "source", "share": "1e-4", "max": 3}}, "share: '1e-4' is not of type float"),
        ({"held_out": {"by": "source", "share": 8, "max": 3}}, "share 8 lies in 0 to 1"),
        ({"held_out": {"by": "source", "share": 0.1, "max": -3}}, "max is not negative"),
        ({"answers": "both"}, "answers: 'both' is neither `one` nor `all`"),
        ({"audio": False, "alike": "language"}, "`context` and `alike` are about a clip"),
        ({"audio": False, "context": "{text}"}, "`context` and `alike` are about a clip"),
    ],
)
def test_mistakes_in_a_card(card, changes, says):
    with pytest.raises(ManifestError, match=says):
        card(**changes)


def test_all_manifests_are_read():
    cards = {p.stem: read_card(p) for p in (MANIFESTS / "corpora").glob("*.yaml")}
    mixes = [read_mix(p.stem, p.parent) for p in MANIFESTS.rglob("*.yaml") if p.parent.name != "corpora"]
    assert {c.name for m in mixes for c in m.cards} == cards.keys()
    rules = {(c.shards, c.held_out) for c in cards.values()}
    assert len(rules) == len({shards for shards, _ in rules}), "cards of the same shards hold out different records"


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
