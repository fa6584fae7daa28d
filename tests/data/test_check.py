"""A check of the data before training: what it counts is what a run trains on, and planted mistakes are named."""

import json
import os
import shutil
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from midasheng.data.check import Check, CorpusCheck, check_data
from midasheng.data.plan import Planned
from midasheng.data.room import read_data
from midasheng.data.storage import StorageError
from stages import check_data as command
from tests.conftest import Tiny, flac, order_for, record, tone, write_shard
from tests.data.server import Server


def stage_of(tiny: Tiny, folder: Path, name: str = "stage2_pretrain", **more: object):
    """A stage on a copy of the tiny data that a test may spoil."""
    root = folder / "data"
    if not root.exists():
        shutil.copytree(tiny.shards, root / "shards", ignore=shutil.ignore_patterns(".index"))
        shutil.copytree(tiny.manifests.parent, root / "manifests")
    more = {"data__root": root / "shards", "data__manifests": root / "manifests" / "tiny", **more}
    return order_for(name, tiny, folder / "runs", **more).stage


def changed_card(folder: Path, name: str, **changes: object) -> None:
    path = folder / "data" / "manifests" / "corpora" / f"{name}.yaml"
    card = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({k: v for k, v in (card | changes).items() if v is not None}))


def only(found: Check, *words: str) -> None:
    """One error, with these words."""
    assert len(found.errors) == 1, found.errors
    for word in words:
        assert word in found.errors[0], found.errors


def in_place(path: Path, offset: int, data: bytes) -> None:
    """Other bytes in a shard whose size and time stay: what bit rot and a careless copy look like."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def member(path: Path, name: str) -> tarfile.TarInfo:
    with tarfile.open(path) as tar:
        return tar.getmember(name)


def ends(stage) -> list[str]:
    """Keys of the first and last training record of every shard of the first corpus."""
    corpus = read_data(stage, make=False).corpora[0]
    return [corpus.key(int(n)) for s in range(len(corpus.rows)) for n in (corpus.starts[s], corpus.starts[s + 1] - 1)]


# -- what it counts ----------------------------------------------------------------------------------------------------


def test_what_is_expected_is_what_the_run_trains_on(tiny, tmp_path):
    """Over a whole short run the forecast is no forecast: samples, audio, targets, epochs, fills are those of the plan."""
    stage = stage_of(tiny, tmp_path, run__length="40 steps", run__seed=7, data__max_audio_s=1.8)
    found = check_data(stage)
    assert not found.errors
    data = read_data(stage, make=False)
    planner = data.planner(stage.run.seed)
    steps = [next(planner) for _ in range(40)]
    samples: list[Planned] = [s for step in steps for chosen in step.packs for s in chosen]
    assert (found.steps, found.samples_a_step) == (40, len(samples) / 40)
    n_packs = 40 * data.budget.packs_per_step
    assert found.fill_slots == pytest.approx(sum(s.slots for s in samples) / (n_packs * data.budget.pack_slots))
    assert found.fill_frames == pytest.approx(sum(s.frames for s in samples) / (n_packs * data.budget.pack_frames))
    for number, corpus in enumerate(data.corpora):
        row, mine = found.corpora[corpus.card.name], [s for s in samples if s.corpus == number]
        assert row.records == len(corpus) > 0
        assert row.held_out == len(corpus.held_out) > 0
        assert row.hours == pytest.approx(sum(corpus.read(n)[0].n_samples for n in range(len(corpus))) / 16_000 / 3_600)
        assert row.skipped == corpus.summary.reasons
        assert set(row.skipped) == {"too long"}
        assert row.asked == {"tiny_asr": 60, "tiny_caption": 40}[corpus.card.name]
        assert row.samples == pytest.approx(100 * len(mine) / len(samples))
        assert row.audio == pytest.approx(100 * sum(s.frames for s in mine) / sum(s.frames for s in samples))
        assert row.targets == pytest.approx(100 * sum(s.targets for s in mine) / sum(s.targets for s in samples))
        assert row.epochs == pytest.approx(len(mine) / len(corpus))
        assert row.slots == pytest.approx(sum(s.slots for s in mine) / len(mine))
        assert row.seconds == pytest.approx(sum(s.frames for s in mine) / 25 / len(mine))
        assert row.fits_no_pack == sum(u.corpus == number for step in steps for u in step.skipped)


def test_a_long_run_is_forecast_from_its_first_steps(tiny, tmp_path):
    stage = stage_of(tiny, tmp_path, run__length="200000 steps", run__warmup="10 steps")
    found = check_data(stage)
    assert found.steps == 200_000
    for row in found.corpora.values():
        drawn = row.samples / 100 * found.samples_a_step * found.steps
        assert row.epochs == pytest.approx(drawn / row.records)
        assert row.samples == pytest.approx(row.asked, abs=0.5)
    assert sum("times in this run" in r for r in found.remarks) == 2  # tens of thousands of epochs are worth a word


def test_the_text_says_each_number_under_its_name():
    row = CorpusCheck(1, 2.5, 3, 4, 5, {"too long": 6}, 7, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0)
    found = Check("one", "two", {"c": row, "d": CorpusCheck()}, 15, 16.0, 17, 18, 19, 0.2, 0.21, ["wrong"], ["odd"])
    title, head, first, second, plan, *rest = found.text().splitlines()
    assert title == "one, mix two:"
    said = "corpus records hours held out slots asked samples audio targets epochs left out"
    assert " ".join(head.split()) == said
    assert first.split()[:10] == ["c", "1", "2.50", "3", "8", "10.00%", "11.00%", "12.00%", "13.00%", "14.00"]
    assert first.endswith("  7 fits no pack, 6 too long")
    assert second.endswith("  none")
    assert plan.split(maxsplit=1)[1] == (
        "steps of 16.0 samples in 17 packs of 18 slots (20.0 % full) and 19 frames (21.0 %)"
    )  # fmt: skip
    assert rest == ["  remark: odd", "  ERROR: wrong"]


def test_clean_data_has_no_errors_in_any_stage(tiny, tmp_path, monkeypatch, capsys):
    """The command: all stages, status 0, and a machine-readable copy."""
    stage_of(tiny, tmp_path)
    monkeypatch.chdir(Path(__file__).parent.parent.parent)
    data = tmp_path / "data"
    settings = tiny.settings(data__root=data / "shards", data__manifests=data / "manifests" / "tiny")
    monkeypatch.setattr("sys.argv", ["check", "--runs", str(tmp_path / "runs"), *settings])
    assert command.main() == 0
    written = json.loads((tmp_path / "runs" / "mini" / "check-data.json").read_text())
    assert [c["stage"] for c in written] == ["stage1_align", "stage2_pretrain", "stage3_sft"]
    assert [c["errors"] for c in written] == [[], [], []]
    assert set(written[1]["corpora"]) == {"tiny_asr", "tiny_caption"}
    assert "nothing wrong" in capsys.readouterr().out
    (data / "shards" / "tiny-000000.tar").unlink()
    (data / "shards" / "tiny-000001.tar").unlink()
    assert command.main() == 1
    assert "no shard matches" in capsys.readouterr().out
    assert json.loads((tmp_path / "runs" / "mini" / "check-data.json").read_text())[0]["errors"]
    # CONFIG: this stage alone
    monkeypatch.setattr("sys.argv", [*sys.argv, "--config", "configs/stage1_align.yaml"])
    assert command.main() == 1
    assert len(json.loads((tmp_path / "runs" / "mini" / "check-data.json").read_text())) == 1
    monkeypatch.setattr("sys.argv", [*sys.argv, "data.mix=nosuch"])
    assert command.main() == 2
    assert capsys.readouterr().err.startswith("error: data.mix: no manifest")


def test_one_stage_that_is_wrong_is_enough(tiny, tmp_path, monkeypatch, capsys):
    """Status 1, also where the last stage is clean."""
    stage_of(tiny, tmp_path)
    changed_card(tmp_path, "tiny_asr", shards="nothing-*.tar")  # stage 2 alone
    monkeypatch.chdir(Path(__file__).parent.parent.parent)
    data = tmp_path / "data"
    settings = tiny.settings(data__root=data / "shards", data__manifests=data / "manifests" / "tiny")
    monkeypatch.setattr("sys.argv", ["check", "--runs", str(tmp_path / "runs"), *settings])
    assert command.main() == 1
    assert "1 errors" in capsys.readouterr().out


# -- planted mistakes --------------------------------------------------------------------------------------------------


def test_a_record_that_was_exchanged_after_indexing(tiny, tmp_path):
    """The index is not believed: both ends of every shard are read again, and a middle one is not."""
    stage = stage_of(tiny, tmp_path)
    read_data(stage, make=True)
    keys = ends(stage)
    shard = tmp_path / "data" / "shards" / "tiny-000001.tar"
    at = member(shard, f"{keys[3]}.json")
    content = json.dumps(record(7)).encode().ljust(at.size)[: at.size]
    in_place(shard, at.offset_data, content)
    found = check_data(stage)
    assert any(str(shard) in e and keys[3] in e for e in found.errors), found.errors
    assert found.corpora["tiny_asr"].opened == 1
    assert found.corpora["tiny_asr"].shards == 2


def test_every_variant_of_an_end_is_read(tiny, tmp_path):
    stage = stage_of(tiny, tmp_path, "stage1_align")
    read_data(stage, make=True)
    key = ends(stage)[0]
    shard = tmp_path / "data" / "shards" / "tiny-000000.tar"
    at = member(shard, f"{key}.json")
    content = record(int(key.removeprefix("tone")))
    content["captions"] = [*content["captions"][:2], "Who?"]  # as many, the last one is another
    in_place(shard, at.offset_data, json.dumps(content).encode().ljust(at.size))
    only(check_data(stage), key, "when it was indexed")


def test_a_shard_that_cannot_be_read_any_more(tiny, tmp_path, monkeypatch):
    from midasheng.data import check

    stage = stage_of(tiny, tmp_path, "stage1_align")
    monkeypatch.setattr(check, "read_many", lambda places: [StorageError("shard gone") for _ in places])
    found = check_data(stage)
    assert len(found.errors) == 2  # one a shard
    assert all("gone" in e for e in found.errors)


def test_many_mistakes_are_counted_and_the_first_ones_shown(tiny, tmp_path):
    stage = stage_of(tiny, tmp_path, "stage1_align")
    shards = [tmp_path / "data" / "shards" / f"more-{n}.tar" for n in range(5)]
    for n, shard in enumerate(shards):
        members = [(f"{n}-{i}", flac(tone(0.5, i)), record(i) | {"source": f"s{n}{i}"}) for i in range(6)]
        write_shard(shard, members)
    changed_card(tmp_path, "tiny_caption", shards="more-*.tar")
    read_data(stage, make=True)
    for shard, key in zip(shards, ends(stage)[::2], strict=True):
        at = member(shard, f"{key}.flac")
        in_place(shard, at.offset_data, b"\0" * at.size)
    found = check_data(stage)
    assert [str(s) in e for s, e in zip(shards, found.errors[:3], strict=False)] == [True] * 3
    assert found.errors[3:] == ["corpus tiny_caption: 5 shards in all have such an end"]
    for shard in shards:
        shard.write_bytes(shard.read_bytes()[:-12_000])
    found = check_data(stage)
    assert sum("damaged shard" in e for e in found.errors) == 3
    assert sum("2 more damages" in r for r in found.remarks) == 1


def test_a_corpus_without_a_record_to_train_on(tiny, tmp_path):
    found = check_data(stage_of(tiny, tmp_path, "stage1_align", data__max_audio_s=0.21))
    only(found, "tiny_caption: no record can be trained on", "too long")


def test_audio_that_rotted_after_indexing(tiny, tmp_path):
    stage = stage_of(tiny, tmp_path)
    read_data(stage, make=True)
    keys = ends(stage)
    shard = tmp_path / "data" / "shards" / "tiny-000000.tar"
    at = member(shard, f"{keys[0]}.flac")
    in_place(shard, at.offset_data, b"\0" * at.size)
    found = check_data(stage)
    assert len(found.errors) == 2  # for each corpus of these shards
    assert all(str(shard) in e and keys[0] in e and "undecodable" in e for e in found.errors)


def test_a_shard_that_is_damaged(tiny, tmp_path):
    stage = stage_of(tiny, tmp_path, "stage1_align")
    shard = tmp_path / "data" / "shards" / "tiny-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-30_000])
    only(check_data(stage), "tiny_caption", str(shard), "cut off")
    kept = check_data(stage_of(tiny, tmp_path, "stage1_align", data__damaged="keep"))
    assert not kept.errors
    assert any(str(shard) in r for r in kept.remarks)
    assert kept.corpora["tiny_caption"].records > 0


def test_one_corpus_without_shards_does_not_hide_the_others(tiny, tmp_path):
    stage = stage_of(tiny, tmp_path)
    changed_card(tmp_path, "tiny_asr", shards="nothing-*.tar")
    found = check_data(stage)
    only(found, "tiny_asr", "no shard matches", "nothing-*.tar")
    assert found.corpora["tiny_caption"].records > 0
    assert found.steps == 0  # there is nothing to plan with


def test_a_corpus_that_is_not_there_can_be_left_out(tiny, tmp_path):
    stage_of(tiny, tmp_path)
    changed_card(tmp_path, "tiny_asr", shards="nothing-*.tar")
    found = check_data(stage_of(tiny, tmp_path, data__without="[tiny_a*]"))
    assert not found.errors
    assert list(found.corpora) == ["tiny_caption"]
    assert found.corpora["tiny_caption"].asked == found.corpora["tiny_caption"].samples == 100
    assert any("without tiny_asr" in r for r in found.remarks)


def test_a_card_that_asks_for_a_field_that_is_not_there(tiny, tmp_path):
    stage = stage_of(tiny, tmp_path)
    changed_card(tmp_path, "tiny_asr", answer="transcript")
    only(check_data(stage), "tiny_asr", "`transcript`", "captions")


def test_too_many_bad_records(tiny, tmp_path):
    """What would stop a run at the start is an error now."""
    stage = stage_of(tiny, tmp_path, "stage1_align")
    bad = [(f"bad{n}", b"no audio at all", record(n)) for n in range(25)]
    write_shard(tmp_path / "data" / "shards" / "tiny-000002.tar", bad)
    found = check_data(stage)
    only(found, "tiny_caption", "25 of 67 records are bad", "undecodable")
    assert found.corpora["tiny_caption"].skipped == {"undecodable": 25}
    silent = [(f"bad{n}", flac(tone(0.5, n)), record(n) | {"captions": []}) for n in range(25)]
    write_shard(tmp_path / "data" / "shards" / "tiny-000002.tar", silent)
    found = check_data(stage)  # nothing is wrong with a record that has no answer
    assert (found.errors, found.corpora["tiny_caption"].skipped) == ([], {"no text": 25})


def test_clips_that_fit_no_pack(tiny, tmp_path):
    stage = stage_of(tiny, tmp_path, "stage1_align", batch__kind="throughput", batch__pack_slots=30)
    only(check_data(stage), "fit no pack")


def test_a_few_samples_that_fit_no_pack_are_counted_for_their_corpus(tiny, tmp_path):
    stage = stage_of(tiny, tmp_path, batch__kind="throughput", batch__pack_slots=400, batch__pack_frames=400)
    talk = record(0) | {"captions": ["tone " * 600], "source": "a talk"}
    write_shard(tmp_path / "data" / "shards" / "tiny-000002.tar", [("talk", flac(tone(0.5, 0)), talk)])
    found = check_data(stage)
    assert not found.errors
    assert found.corpora["tiny_asr"].fits_no_pack == 0
    assert found.corpora["tiny_caption"].fits_no_pack > 0


def test_a_held_out_record_that_another_card_trains_on(tiny, tmp_path):
    stage = stage_of(tiny, tmp_path)
    changed_card(tmp_path, "tiny_asr", held_out=None)
    found = check_data(stage)
    n_apart = found.corpora["tiny_caption"].held_out
    only(found, f"{n_apart} held-out records of tiny_caption are trained on by tiny_asr")
    assert any("tiny_asr: no record is held out" in r for r in found.remarks)
    assert not any("bear the key" in r for r in found.remarks)  # said once
    again = check_data(stage_of(tiny, tmp_path, data__also="[align]"))  # a corpus that both mixes name
    assert again.errors == found.errors


def test_a_held_out_set_that_is_only_looked_at_counts_too(tiny, tmp_path):
    """data.also asks about another mix: its held-out records are no test if this mix trains on them."""
    stage = stage_of(tiny, tmp_path, "stage1_align", data__also="[sft]")
    changed_card(tmp_path, "tiny_qa", held_out={"by": "source", "share": 0.5, "max": 30})
    only(check_data(stage), "held-out records of tiny_qa are trained on by tiny_caption")
    changed_card(tmp_path, "tiny_qa", held_out=None)  # looked at: nothing trains on it
    assert not check_data(stage).errors
    changed_card(tmp_path, "tiny_qa", shards="nothing-*.tar")
    found = check_data(stage)
    only(found, "tiny_qa", "no shard matches")
    assert found.steps == 0  # a run would not begin


def test_a_key_of_a_held_out_record_in_another_shard_is_remarked(tiny, tmp_path):
    """The same recording shipped twice would leak, but keys may also count from zero in each shard."""
    stage = stage_of(tiny, tmp_path, "stage1_align")
    apart = read_data(stage, make=True).corpora[0].held_out[0].key
    again = (apart, flac(tone(1.0, 3)), record(99) | {"source": "another source"})
    write_shard(tmp_path / "data" / "shards" / "tiny-000002.tar", [again])
    found = check_data(stage)
    assert not found.errors
    assert [r for r in found.remarks if "bear the key" in r and apart in r and r.startswith("1 ")]


def test_a_key_of_a_held_out_record_in_another_corpus_is_remarked(tiny, tmp_path):
    stage = stage_of(tiny, tmp_path)
    for n in (0, 1):
        shutil.copy(*(tmp_path / "data" / "shards" / f"{name}-00000{n}.tar" for name in ("tiny", "copy")))
    changed_card(tmp_path, "tiny_asr", shards="copy-*.tar", held_out=None)
    found = check_data(stage)
    assert not found.errors
    (said,) = [r for r in found.remarks if "bear the key" in r]
    assert said.startswith(f"{found.corpora['tiny_caption'].held_out} training records of tiny_asr")


def test_a_mix_that_does_not_sum_to_100_is_remarked(tiny, tmp_path):
    stage = stage_of(tiny, tmp_path)
    mix = tmp_path / "data" / "manifests" / "tiny" / "pretrain.yaml"
    mix.write_text(yaml.safe_dump({"corpora": {"tiny_asr": 60.2, "tiny_caption": 40}}))
    found = check_data(stage)
    assert not found.errors
    assert any("sum to 100.2" in r for r in found.remarks)
    assert found.corpora["tiny_asr"].asked == pytest.approx(60.2 / 1.002)


# -- what it costs -----------------------------------------------------------------------------------------------------


def test_shards_are_opened_once_and_again_when_they_change(tiny, tmp_path, monkeypatch):
    """Thousands of shards: a second check opens only what is new, what was wrong, or what has changed."""
    from midasheng.data import check

    opened: list[int] = []
    real = check._ends
    monkeypatch.setattr(check, "_ends", lambda shards: opened.extend(shards) or real(shards))
    stage = stage_of(tiny, tmp_path, "stage1_align")
    check_data(stage)
    assert opened == [0, 1]
    opened.clear()
    assert not check_data(stage).errors
    assert opened == []
    keys = ends(stage)
    shard = tmp_path / "data" / "shards" / "tiny-000001.tar"
    whole = shard.read_bytes()
    os.utime(shard)  # copied anew: indexed anew, opened anew
    read_data(stage, make=True)
    at = member(shard, f"{keys[3]}.flac")
    in_place(shard, at.offset_data, b"\0" * at.size)
    for _ in range(2):  # what is wrong is not remembered as good
        opened.clear()
        only(check_data(stage), keys[3])
        assert opened == [1]
    in_place(shard, 0, whole)
    opened.clear()
    found = check_data(stage)
    assert (found.errors, opened, found.corpora["tiny_caption"].opened) == ([], [1], 2)
    # other ends, and another reading of the same bytes
    changed_card(tmp_path, "tiny_caption", held_out={"by": "source", "share": 0.5, "max": 40})
    for _ in range(2):
        check_data(stage)
        assert opened == [1, 0, 1]
    opened.clear()
    changed_card(tmp_path, "tiny_caption", prompts=["What is heard?"])
    check_data(stage)
    assert opened == [0, 1]


def test_many_processes_find_the_same(tiny, tmp_path, monkeypatch):
    from midasheng.data import check

    monkeypatch.setattr(check, "AT_ONCE", 1)
    stage = stage_of(tiny, tmp_path, "stage1_align")
    read_data(stage, make=True)
    keys = ends(stage)
    for number, key in enumerate((keys[0], keys[3])):
        shard = tmp_path / "data" / "shards" / f"tiny-00000{number}.tar"
        at = member(shard, f"{key}.flac")
        in_place(shard, at.offset_data, b"\0" * at.size)
    alone = check_data(stage)
    together = check_data(stage_of(tiny, tmp_path, "stage1_align", hardware__workers=2))
    assert len(alone.errors) == 2
    assert alone == together


def test_over_http(tiny, tmp_path):
    stage_of(tiny, tmp_path, "stage1_align")
    server = Server(tmp_path / "data" / "shards")
    try:
        changed_card(tmp_path, "tiny_caption", shards="tiny-{000000..000001}.tar")
        more = {"data__root": server.url, "data__index": tmp_path / "index"}
        found = check_data(stage_of(tiny, tmp_path, "stage1_align", **more))
        local = check_data(stage_of(tiny, tmp_path, "stage1_align"))
    finally:
        server.close()
    assert not found.errors
    assert found.corpora == local.corpora
