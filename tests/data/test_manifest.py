"""Cards and mixes are read strictly."""

import pytest
import yaml

from midasheng.data.manifest import ManifestError, read_card, read_mix
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
    ],
)
def test_mistakes_in_a_card(card, changes, says):
    with pytest.raises(ManifestError, match=says):
        card(**changes)


def test_card_without_shards(card, tmp_path):
    with pytest.raises(ManifestError, match=r"corpus a: no shard matches .*a-\*.tar"):
        card().shard_paths(tmp_path)


def test_all_manifests_are_read():
    cards = {p.stem: read_card(p) for p in (MANIFESTS / "corpora").glob("*.yaml")}
    mixes = [read_mix(p.stem, p.parent) for p in MANIFESTS.rglob("*.yaml") if p.parent.name != "corpora"]
    assert {c.name for m in mixes for c in m.cards} == cards.keys()
    rules = {(c.shards, c.held_out) for c in cards.values()}
    assert len(rules) == len({shards for shards, _ in rules}), "cards of the same shards hold out different records"
