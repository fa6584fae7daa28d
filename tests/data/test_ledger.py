"""The ledger stops a run on rotten data, forgets what is trained again, and counts what was left out."""

import json

import pytest

from midasheng.data.ledger import Ledger, RottenCorpus, Skipped, drop_after


def bad(count: int, corpus: str = "a", reason: str = "undecodable") -> list[Skipped]:
    return [Skipped(corpus, f"key{n}", reason) for n in range(count)]


def good(count: int, corpus: str = "a") -> list[tuple[str, str]]:
    return [(corpus, f"good{n}") for n in range(count)]


@pytest.fixture
def ledger(tmp_path):
    """A ledger whose corpus `a` has a million records."""
    made = Ledger(tmp_path, 0, 0)
    made.indexed("a", 1_000_000, [], write=True)
    return made


def test_a_hundred_bad_ones_in_a_row_stop_the_run(ledger):
    ledger.step(0, [], bad(60))
    with pytest.raises(RottenCorpus, match=r"corpus a: 100 bad records in a row, the last one key39 \(undecodable\)"):
        ledger.step(1, good(3, "b"), bad(40))


def test_a_good_one_begins_a_new_row(ledger):
    for number in range(4):
        ledger.step(number, good(1), bad(60))
    ledger.step(4, [], bad(99))
    assert ledger.reasons["a", "undecodable"] == 339


def test_over_one_percent_bad_stops_the_run(tmp_path):
    made = Ledger(tmp_path, 0, 0)
    made.indexed("a", 1900, [], write=True)
    made.step(0, good(10), bad(19))  # 1 %, but fewer than 20
    with pytest.raises(RottenCorpus, match="20 bad records out of 19"):
        made.step(1, good(10), bad(1))


def test_what_is_left_out_on_purpose_is_not_bad(ledger):
    ledger.step(0, [], bad(500, reason="fits no pack") + bad(500, reason="too long"))
    assert ledger.summary() == "a: fits no pack 500; a: too long 500"


def test_index_time_skips(tmp_path):
    """They stop the run by share only: nobody knows whether they lay in a row."""
    Ledger(tmp_path / "1", 0, 0).indexed("a", 1_000_000, bad(5000), write=True)
    Ledger(tmp_path / "2", 0, 0).indexed("a", 1000, bad(20) + bad(5000, reason="too long"), write=True)
    with pytest.raises(RottenCorpus, match="20 bad records out of 1020"):
        Ledger(tmp_path / "3", 0, 0).indexed("a", 1000, bad(20), write=True)


def test_resume_drops_what_is_trained_again_and_counts_the_rest(tmp_path, ledger):
    ledger.indexed("b", 10, [Skipped("b", "x", "too short")], write=True)
    for number in range(4):
        ledger.step(number, good(2), [Skipped("a", f"line\u2028break{number}", "undecodable")])
    with ledger.trained.open("ab") as file:
        file.write(json.dumps({"step": 1, "keys": ["ä"]}, ensure_ascii=False).encode()[:-4])  # killed while writing
    again = Ledger(tmp_path, 0, 2)
    again.indexed("b", 10, [Skipped("b", "x", "too short")], write=False)
    assert again.summary() == "a: undecodable 2; b: too short 1"
    assert (again.seen["a"], again.bad["a"]) == (6, 2)
    again.step(2, good(2), [])
    for path, steps in ((again.trained, [0, 1, 2]), (again.skipped, [-1, 0, 1])):
        assert [json.loads(line)["step"] for line in path.read_text().strip().split("\n")] == steps


def test_other_ranks_write_their_own_files(tmp_path):
    Ledger(tmp_path, 3, 0).step(0, good(1), bad(1))
    assert sorted(p.name for p in (tmp_path / "ledger").iterdir()) == ["rank3.jsonl", "skipped-rank3.jsonl"]
    assert json.loads((tmp_path / "ledger" / "rank3.jsonl").read_text()) == {"step": 0, "keys": ["a/good0"]}


def test_drop_after_without_a_file(tmp_path):
    assert drop_after(tmp_path / "none.jsonl", 3) == []
