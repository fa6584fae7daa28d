"""A folder of anything becomes shards that train: each row accounted for, splits apart, the same bytes after any kill."""

import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from midasheng.config import UserError
from midasheng.curate.prepare import Settings, prepare
from midasheng.curate.sources import MECAT, Item, open_source
from midasheng.data.audio import decode
from midasheng.data.manifest import read_mix
from stages import prepare as stage
from tests.conftest import flac, open_index, tone, training_records
from tests.curate.test_encode import likeness, made, sound
from tests.data.shards import write

# -- helpers -----------------------------------------------------------------------------------------------------------


def go(
    data: Path | str, out: Path, *settings: str, name: str = "mine", prompt: str = "Describe it.", columns: str = ""
):
    """`make prepare`, in this process."""
    return stage.ordered(str(data), name, str(out), "", prompt, columns, " ".join(("workers=1", *settings)))[1]


def written(out: Path, split: str = "*") -> list[tuple[dict, bytes, str]]:
    """(JSON, audio, shard) of every record, in the order of the shards."""
    found = []
    for path in sorted((out / "shards").glob(f"*-{split}-*.tar")):
        with tarfile.open(path) as tar:
            members = [(m.name, tar.extractfile(m).read()) for m in tar]
        for (audio, data), (text, content) in zip(members[::2], members[1::2], strict=True):
            assert audio.rsplit(".", 1)[0] == text.removesuffix(".json")
            found.append((json.loads(content), data, path.name))
    return found


def dropped(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "dropped.jsonl").read_text(encoding="utf-8").splitlines()]


def bytes_of(out: Path) -> dict[str, bytes]:
    """Everything that preparing made, but its journal."""
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()
            and p.name != "journal.jsonl"}  # fmt: skip


def index_of(out: Path, chat, name: str = "mine"):
    """The corpus as a stage opens it, from the card that was written."""
    (card,) = read_mix(name, out / "manifests").cards
    return open_index(card, out / "shards", chat)


# -- the acceptance ----------------------------------------------------------------------------------------------------

GOOD = {
    "r8.wav": ("wav", 8_000), "r24.wav": ("wav24", 22_050), "r48.flac": ("flac", 48_000), "r44.mp3": ("mp3", 44_100),
    "r16.ogg": ("vorbis", 16_000), "r32.ogg": ("vorbis", 32_000), "r48.opus": ("opus", 48_000),
    "r44.m4a": ("m4a", 44_100), "r48.webm": ("webm", 48_000), "r11.aiff": ("aiff", 11_025),
    "Ünï 中.wav": ("wav", 16_000),
}  # fmt: skip
TORN = {"wav": "wav", "flac": "flac", "mp3": "mp3", "ogg": "vorbis", "opus": "opus", "m4a": "m4a", "webm": "webm"}
TEXTS = {1: 'rain, "heavy"', 3: "two\nlines", 10: "雨の音 и гром"}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The folder, its table and what is expected of each row; prepared with a test split."""
    root = tmp_path_factory.mktemp("mixed")
    wave: dict[str, np.ndarray] = {}  # audio -> what it must sound like
    rows: list[tuple[str, str, str]] = []  # audio, text, reason
    for number, (name, (kind, rate)) in enumerate(GOOD.items()):
        (root / name).write_bytes(made(kind, tone(1.5, number, rate), rate))
        wave[name] = tone(1.5, number)
        rows.append((name, TEXTS.get(number, f"sound {number}"), ""))
    for number in range(20, 50):
        (root / f"n{number}.wav").write_bytes(made("wav", tone(0.4, number), 16_000))
        wave[f"n{number}.wav"] = tone(0.4, number)
        rows.append((f"n{number}.wav", f"sound {number}", ""))
    stereo = np.stack([tone(1, 60, 44_100), 0.5 * tone(1, 60, 44_100)], 1)
    others = {
        "stereo.flac": (sound(stereo, 44_100, "FLAC"), ""),
        "loud.wav": (sound(5 * tone(1, 61), 16_000, "WAV", "FLOAT"), ""),
        "long.wav": (made("wav", tone(300, 62, 8_000), 8_000), ""),
        "silent.flac": (sound(np.zeros(16_000), 16_000, "FLAC"), "silent"),
        "nan.wav": (sound(np.full(16_000, np.nan), 16_000, "WAV", "FLOAT"), "not finite"),
        "huge.wav": (sound(20_000 * tone(1, 1), 16_000, "WAV", "FLOAT"), "beyond full scale"),
        "opposite.wav": (sound(np.stack([tone(1, 2), -tone(1, 2)], 1), 16_000, "WAV", "FLOAT"), "channels cancel"),
        "short.wav": (made("wav", tone(0.1, 3), 16_000), "too short"),
        "empty.wav": (b"", "empty file"),
        "text.mp3": (b"this is no sound\n" * 99, "undecodable"),
    }  # fmt: skip
    wave |= {"stereo.flac": 0.75 * tone(1, 60), "loud.wav": np.clip(5 * tone(1, 61), -1, 1), "long.wav": tone(300, 62)}
    for extension, kind in TORN.items():
        data = made(kind, tone(4, 5, 48_000), 48_000)
        others[f"torn.{extension}"] = (data[: len(data) * 6 // 10], "undecodable" if kind == "m4a" else "truncated")
    for name, (data, reason) in others.items():
        (root / name).write_bytes(data)
        rows.append((name, f"sound of {name}", reason))
    rows += [
        ("missing.wav", "gone", "missing file"), ("r8.wav", "sound 0", "duplicate"), ("r16.ogg", "", "empty answer"),
        ("", "nothing", "no audio named"), ("r44.mp3", "another one", ""), ("r44.mp3", "and another", ""),
    ]  # fmt: skip
    text, line, expected = "\ufeffaudio,caption,mood\r\n", 2, {}
    for name, said, reason in rows:
        expected[line] = (name, said, reason)
        quoted = '"' + said.replace('"', '""') + '"' if any(c in said for c in '",\n') else said
        text += f"{name},{quoted},calm\r\n"
        line += 1 + said.count("\n")
    text += "r8.wav,too,many,columns\r\n"
    expected[line] = ("r8.wav", "", "4 columns instead of 3")
    (root / "mine.csv").write_bytes(text.encode())
    report = go(root / "mine.csv", root / "out", "test_share=0.2", "held_out_share=0.1", "shard_mb=0.2")
    return SimpleNamespace(root=root, out=root / "out", wave=wave, expected=expected, report=report)


def test_every_row_is_written_or_dropped_once_with_its_reason_and_line(mixed):
    report, expected = mixed.report, mixed.expected
    drops = dropped(mixed.out)
    assert {int(d["where"].rsplit(" ", 1)[1]): (d["audio"], d["reason"]) for d in drops} == {
        line: (name, reason) for line, (name, _, reason) in expected.items() if reason
    }
    assert len(drops) == len({d["where"] for d in drops})
    assert all(d["where"].startswith(f"{mixed.root}/mine.csv line ") for d in drops)
    said = Counter((content["audio"], a) for content, _, _ in written(mixed.out) for a in content["answers"])
    assert said == Counter((name, text) for name, text, reason in expected.values() if not reason)
    assert report.rows == len(expected) == report.written_rows + sum(report.dropped.values())
    assert report.written_rows == sum(said.values())
    assert report.dropped == Counter(reason for _, _, reason in expected.values() if reason)
    assert (
        sum(report.records.values())
        == len(written(mixed.out))
        == report.written_rows - 1
        == sum(report.lengths.values())
    )
    assert json.loads((mixed.out / "report.json").read_text())["dropped"] == report.dropped
    for reason, where in report.examples.items():
        assert where == next(d["where"] for d in drops if d["reason"] == reason)
        assert f"{reason}; first: {where}" in report.text()
    assert all(content["mood"] == "calm" for content, _, _ in written(mixed.out))


def test_what_was_written_is_the_sound_that_was_there(mixed):
    heard = Counter()
    for content, data, _ in written(mixed.out):
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            n_samples = file.frames
            assert (file.samplerate, file.channels, file.format, file.subtype) == (16_000, 1, "FLAC", "PCM_16")
        name, wanted = content["audio"], mixed.wave[content["audio"]]
        lossy = name.rsplit(".")[-1] in ("mp3", "m4a", "webm")
        assert abs(n_samples - len(wanted)) <= (2_000 if lossy else 2)
        assert content["duration"] == pytest.approx(n_samples / 16_000, abs=0.001)
        assert likeness(decode(data, n_samples), wanted, lag=2_000 if lossy or "opus" in name else 1) > (
            0.9 if lossy else 0.98
        )
        heard[name] += 1
    assert heard == Counter([*mixed.wave, "r44.mp3"])


def test_the_shards_are_read_by_the_index_with_the_card_that_was_written(mixed, chat):
    corpus = index_of(mixed.out, chat)
    assert corpus.summary.damage == ()
    assert list(corpus.summary.reasons) in (["too long"], [])
    train, test = written(mixed.out, "train"), written(mixed.out, "test")
    assert len(corpus) + len(corpus.held_out) + corpus.summary.reasons.get("too long", 0) == len(train)
    assert len(corpus.rows) == len({shard for _, _, shard in train}) > 3
    pieces = [v.turns for r in (*training_records(corpus), *corpus.held_out) for v in r.variants]
    assert {turns[0].text for turns in pieces} == {"Describe it."}
    assert {turns[1].text for turns in pieces} <= {text for _, text, reason in mixed.expected.values() if not reason}
    whole = open_index(replace(corpus.card, shards="mine-*.tar"), mixed.out / "shards", chat)
    assert (whole.summary.damage, whole.summary.reasons) == ((), {"too long": 1})
    assert len(test) == mixed.report.records["test"] > 3
    hours = sum(content["duration"] for content, _, _ in train) / 3600
    assert mixed.report.hours["train"] == pytest.approx(hours, abs=0.001)
    assert corpus.card.hours == pytest.approx(hours, abs=0.01)


def test_nothing_of_one_source_is_trained_on_and_held_out_or_tested(mixed, chat):
    corpus = index_of(mixed.out, chat)
    by_key = {}
    for path in (mixed.out / "shards").glob("*.tar"):
        with tarfile.open(path) as tar:
            for m in tar:
                if m.name.endswith(".json"):
                    by_key[m.name.removesuffix(".json")] = json.load(tar.extractfile(m))["source"]
    trained = {by_key[r.key] for r in training_records(corpus)}
    held_out = {by_key[r.key] for r in corpus.held_out}
    test = {content["source"] for content, _, _ in written(mixed.out, "test")}
    assert len(held_out) >= 2
    assert not trained & held_out
    assert not test & (trained | held_out)


def test_rows_of_one_audio_that_is_of_no_use_are_all_counted(tmp_path):
    little(tmp_path, 3)
    (tmp_path / "t.csv").write_text("audio,text\n1.wav,x\nno.wav,a\nno.wav,b\nno.wav,c\n2.wav,y\n")
    report = go(tmp_path / "t.csv", tmp_path / "out")
    assert (report.rows, report.written_rows, report.dropped) == (5, 2, {"missing file": 3})
    assert [(d["where"], d["rows"]) for d in dropped(tmp_path / "out")] == [(f"{tmp_path}/t.csv line 3", 3)]


def test_a_split_of_which_nothing_is_written_is_accounted_for(tmp_path):
    data, splits = little(tmp_path, 20), Settings("mine", test_share=0.4)
    gone = [n for n in range(20) if splits.split(f"{n}.wav") == "test"]
    for n in gone:
        (tmp_path / f"{n}.wav").unlink()
    report = go(data, tmp_path / "out", "test_share=0.4")
    missing = {*(n for n in gone if n % 7), 0, 7, 14}
    assert len(missing) > 5
    assert (report.rows, report.written_rows, report.dropped) == (20, 20 - len(missing), {"missing file": len(missing)})
    assert len(dropped(tmp_path / "out")) == len(missing)


# -- splits ------------------------------------------------------------------------------------------------------------


def little(root: Path, rows: int = 36, speakers: int = 9) -> Path:
    """A table of short clips of some speakers, a few of them of no use."""
    root.mkdir(parents=True, exist_ok=True)
    text = "audio,text,speaker\n"
    for n in range(rows):
        (root / f"{n}.wav").write_bytes(made("wav", tone(0.25 + 0.01 * n, n), 16_000))
        text += f"{n if n % 7 else 'no'}.wav,clip {n},s{n % speakers}\n"
    path = root / "t.csv"
    path.write_text(text)
    return path


def test_sources_of_a_column_are_kept_whole(tmp_path, chat):
    data = little(tmp_path / "in", 90, 12)
    go(data, tmp_path / "out", "test_share=0.3", "held_out_share=0.1", columns="source=speaker")
    corpus = index_of(tmp_path / "out", chat)
    said = {content["answers"][0]: content["source"] for content, _, _ in written(tmp_path / "out")}
    test = {content["source"] for content, _, _ in written(tmp_path / "out", "test")}
    trained = {said[r.variants[0].turns[1].text] for r in training_records(corpus)}
    held_out = {said[r.variants[0].turns[1].text] for r in corpus.held_out}
    assert all((test, trained, held_out))
    assert len(test) + len(trained) + len(held_out) == len(test | trained | held_out) == 12


@pytest.mark.parametrize(("share", "least", "most"), [("0", 0, 0), ("0.02", 5, 7), ("0.2", 10, 14), ("0.4", 21, 28)])
def test_about_the_share_that_was_asked_for_is_held_out(tmp_path, chat, share, least, most):
    data = little(tmp_path / "in", 80, 80)
    go(data, tmp_path / "out", f"held_out_share={share}", columns="source=speaker")
    assert least <= len(index_of(tmp_path / "out", chat).held_out) <= most


def test_a_source_of_many_records_is_held_out_too(tmp_path, chat):
    """The first source alone is more than a card's usual maximum of held-out records."""
    (tmp_path / "a.wav").write_bytes(made("wav", tone(60, 0), 16_000))
    rows = "".join(f"a.wav,{n},{n / 10},{n / 10 + 0.2},s{n % 3}\n" for n in range(3 * 260 - 200))
    rows += "".join(f"a.wav,{n},{n / 10},{n / 10 + 0.25},s{n % 3}\n" for n in range(210))
    (tmp_path / "t.csv").write_text("audio,text,start,end,speaker\n" + rows)
    report = go(tmp_path / "t.csv", tmp_path / "out", columns="source=speaker")
    assert report.written_rows == 790
    assert len(index_of(tmp_path / "out", chat).held_out) > 256


# -- the same bytes ----------------------------------------------------------------------------------------------------

MANY = ("test_share=0.4", "shard_mb=0.03")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A little table, and what an unbroken run with two splits and tiny shards makes of it."""
    root = tmp_path_factory.mktemp("unbroken")
    data = little(root / "in", 60, 20)
    go(data, root / "out", *MANY, columns="source=speaker")
    whole = bytes_of(root / "out")
    assert len([n for n in whole if "-test-" in n]) > 2
    assert len([n for n in whole if "-train-" in n]) > 5
    return SimpleNamespace(data=data, out=root / "out", whole=whole, journal=(root / "out/journal.jsonl").read_bytes())


@pytest.mark.parametrize("codec", ["flac", "opus"])
def test_any_number_of_workers_writes_the_same_bytes(tmp_path, codec):
    data = little(tmp_path / "in", 40)
    for workers in (1, 3):
        go(data, tmp_path / str(workers), *MANY, f"codec={codec}", f"workers={workers}")
    assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "3")
    assert (tmp_path / "1/journal.jsonl").read_bytes() == (tmp_path / "3/journal.jsonl").read_bytes()


@pytest.mark.parametrize("seed", range(6))
def test_killed_at_any_moment_the_same_command_ends_in_the_same_bytes(tmp_path, unbroken, seed):
    context, rng, out = multiprocessing.get_context("fork"), random.Random(seed), tmp_path / "out"
    journal = out / "journal.jsonl"

    def run() -> None:
        go(unbroken.data, out, *MANY, "workers=2", columns="source=speaker")
        os._exit(0)

    kills = 0
    for lines in sorted(rng.sample(range(unbroken.journal.count(b"\n")), 3)):
        process = context.Process(target=run)
        process.start()
        while process.is_alive() and (not journal.is_file() or journal.read_bytes().count(b"\n") < lines):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += not journal.is_file() or b"finished" not in journal.read_bytes()
    assert kills > 0
    process = context.Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert bytes_of(out) == unbroken.whole


@pytest.mark.parametrize("share", [0.0, 0.03, 0.2, 0.5, 0.8, 0.97, 0.999])
def test_a_journal_that_ends_anywhere_is_gone_on_with(tmp_path, unbroken, share):
    """What a kill can leave: half a line, a shard that no line names, half a shard, no report and no card yet."""
    shutil.copytree(unbroken.out, tmp_path / "out")
    (tmp_path / "out/journal.jsonl").write_bytes(unbroken.journal[: int(share * len(unbroken.journal))])
    shard = next((tmp_path / "out/shards").glob("*-000002.tar"))
    Path(f"{shard}.part").write_bytes(shard.read_bytes()[:999])
    for folder in ("corpora", "manifests", "report.json", "dropped.jsonl"):
        if share > 0.4:
            path = tmp_path / "out" / folder
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    go(unbroken.data, tmp_path / "out", *MANY, columns="source=speaker")
    assert bytes_of(tmp_path / "out") == unbroken.whole


@pytest.mark.parametrize("lines", range(1, 12))
def test_a_kill_behind_any_shard_loses_and_doubles_nothing(tmp_path, unbroken, lines):
    """Also where the first item that is left belongs to the other split."""
    shutil.copytree(unbroken.out, tmp_path / "out")
    kept = unbroken.journal.splitlines(keepends=True)[:lines]
    (tmp_path / "out/journal.jsonl").write_bytes(b"".join(kept))
    go(unbroken.data, tmp_path / "out", *MANY, columns="source=speaker")
    assert bytes_of(tmp_path / "out") == unbroken.whole


def test_nothing_of_a_run_that_was_killed_at_once_stays_under_other_settings(tmp_path, unbroken):
    """Here two shards were in place before their first line was written."""
    shutil.copytree(unbroken.out, tmp_path / "out")
    (tmp_path / "out/journal.jsonl").write_bytes(unbroken.journal.splitlines(keepends=True)[0])
    for path in ("corpora/mine.yaml", "manifests/mine.yaml"):
        (tmp_path / "out" / path).unlink()
    go(unbroken.data, tmp_path / "out", "codec=opus", columns="source=speaker")
    go(unbroken.data, tmp_path / "apart", "codec=opus", columns="source=speaker")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "apart")


def test_a_second_run_of_what_is_finished_changes_nothing(tmp_path, unbroken):
    shutil.copytree(unbroken.out, tmp_path / "out")
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "out").rglob("*.tar")}
    go(unbroken.data, tmp_path / "out", *MANY, columns="source=speaker")
    assert bytes_of(tmp_path / "out") == unbroken.whole
    assert (tmp_path / "out/journal.jsonl").read_bytes() == unbroken.journal
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "out").rglob("*.tar")} == before


def test_a_card_of_ones_own_hand_is_kept(tmp_path, unbroken):
    shutil.copytree(unbroken.out, tmp_path / "out")
    for folder in ("corpora", "manifests"):
        (tmp_path / "out" / folder / "mine.yaml").write_text("mine: own\n")
    go(unbroken.data, tmp_path / "out", *MANY, columns="source=speaker")
    assert [p.read_text() for p in (tmp_path / "out").rglob("mine.yaml")] == ["mine: own\n"] * 2


@pytest.mark.parametrize("setting", ["codec=opus", "test_share=0.5", "shard_mb=0.04", "held_out_share=0.1", "root=/x"])
def test_other_settings_are_refused(unbroken, setting):
    with pytest.raises(
        UserError, match="another input, or made with other settings; say OUT=another-folder or delete it"
    ):
        go(unbroken.data, unbroken.out, *MANY, setting, columns="source=speaker")
    with pytest.raises(UserError, match="another input, or made with other settings"):
        go(unbroken.data, unbroken.out, *MANY)
    with pytest.raises(UserError, match="another input, or made with other settings"):
        go(unbroken.data, unbroken.out, *MANY, columns="source=speaker", prompt="What?")
    assert bytes_of(unbroken.out) == unbroken.whole


def test_a_changed_input_and_a_folder_of_others_are_refused(tmp_path):
    data = little(tmp_path / "in", 8)
    go(data, tmp_path / "out")
    before = bytes_of(tmp_path / "out")
    data.write_text(data.read_text().replace("clip 3", "clip 4"))
    with pytest.raises(UserError, match="another input"):
        go(data, tmp_path / "out")
    assert bytes_of(tmp_path / "out") == before
    with pytest.raises(UserError, match="in holds other files; say OUT="):
        go(data, tmp_path / "in")
    write(tmp_path / "tars" / "a.tar", [("a.flac", flac(tone(0.3, 0))), ("a.json", b'{"text": "x"}')])
    go(tmp_path / "tars", tmp_path / "from_tars")
    write(tmp_path / "tars" / "b.tar", [("b.flac", flac(tone(0.3, 0))), ("b.json", b'{"text": "y"}')])
    with pytest.raises(UserError, match="another input"):
        go(tmp_path / "tars", tmp_path / "from_tars")


@pytest.mark.parametrize("change", [Path.unlink, lambda shard: shard.write_bytes(shard.read_bytes()[:-512])])
def test_a_shard_that_is_gone_or_another_is_noticed(tmp_path, unbroken, change):
    shutil.copytree(unbroken.out, tmp_path / "out")
    change(tmp_path / "out/shards/mine-train-000001.tar")
    with pytest.raises(UserError, match=r"mine-train-000001\.tar is gone, or not as it was written; delete"):
        go(unbroken.data, tmp_path / "out", *MANY, columns="source=speaker")


# -- processes ---------------------------------------------------------------------------------------------------------


class Crash:
    """Audio whose decoder ends the process, as a bug in a library in C does."""

    def load_audio(self) -> None:
        os._exit(9)


def clips(count: int) -> list[Item]:
    data = flac(tone(0.3, 0))
    return [
        Item(f"row {n}", f"a{n}", f"a{n}", {"answers": [f"{n}"], "source": f"a{n}", "audio": f"a{n}"}, data)
        for n in range(count)
    ]


@pytest.mark.parametrize("at", [3, 150])
def test_a_decoder_that_crashes_is_named(tmp_path, at):
    def items() -> Iterator[Item]:
        for number, item in enumerate(clips(400)):
            if number == at + 20:
                time.sleep(0.3)  # the crash is known before the next ones are sent
            yield replace(item, audio=Crash()) if number == at else item

    with pytest.raises(UserError, match=rf"a decoder crashed, .* one of these; take it out: .*row {at} \(a{at}\)"):
        prepare(items(), tmp_path / "out", Settings("mine"), "mark", 2)


def test_workers_of_a_run_that_was_killed_end_too(tmp_path):
    def slow() -> Iterator[Item]:
        for item in clips(1_000):
            time.sleep(0.02)
            yield item

    def run() -> None:
        prepare(slow(), tmp_path / "out", Settings("mine"), "mark", 2)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    found: list[str] = []
    until = time.monotonic() + 10
    while len(found) < 2 and time.monotonic() < until:
        time.sleep(0.05)
        tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
        found = [pid for task in tasks for pid in task.read_text().split()]
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(found) == 2

    def alive(pid: str) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    until = time.monotonic() + 5
    while any(map(alive, found)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(alive, found))


# -- other inputs, to the end ------------------------------------------------------------------------------------------


def test_opus_shards_are_read_by_the_index(tmp_path, chat):
    data = little(tmp_path / "in", 20)
    go(data, tmp_path / "out", "codec=opus")
    corpus = index_of(tmp_path / "out", chat)
    assert (corpus.summary.damage, corpus.summary.reasons) == ((), {})
    assert len(corpus) + len(corpus.held_out) == 17
    for number in range(len(corpus)):
        record, audio = corpus.read(number)
        seed = int(record.variants[0].turns[1].text.split()[1])
        assert likeness(decode(audio, record.n_samples), tone(0.25 + 0.01 * seed, seed), lag=0) > 0.95


def test_questions_of_a_table_become_pairs(tmp_path, chat):
    little(tmp_path / "in", 8)
    text = "".join(f"{n}.wav,Which?,{n}\n{n}.wav,Is it?,yes\n" for n in range(8))
    (tmp_path / "in" / "q.csv").write_text("audio,question,answer\n" + text)
    report = go(tmp_path / "in" / "q.csv", tmp_path / "out", prompt="")
    assert (report.rows, report.written_rows, report.records) == (16, 16, {"train": 8})
    corpus = index_of(tmp_path / "out", chat)
    assert {v.turns[0].text for r in training_records(corpus) for v in r.variants} == {"Which?", "Is it?"}


@pytest.mark.parametrize(("said", "told"), [("", ["en", "no"]), ("languages=de", ["de"])])
def test_languages_that_records_name_stand_in_the_card(tmp_path, chat, said, told):
    little(tmp_path / "in", 6)
    lines = [f"{n}.wav,tone {n},{('en', 'no', '')[n % 3]}" for n in range(6)]
    (tmp_path / "in" / "q.csv").write_text("\n".join(["audio,answer,language", *lines]))
    go(tmp_path / "in" / "q.csv", tmp_path / "out", *said.split())
    corpus = index_of(tmp_path / "out", chat)
    assert corpus.card.languages == told
    records = [*training_records(corpus), *corpus.held_out]
    assert {r.language for r in records} == ({"de"} if said else {"en", "no", "-"})


@pytest.mark.parametrize("shard_mb", [1, 0.001])
def test_records_with_questions_and_without_are_not_mixed(tmp_path, shard_mb):
    mecat = json.dumps({field: ["a", "b", "c"] for field in MECAT}).encode()
    write(tmp_path / "in" / "a.tar", [("a.flac", flac(tone(0.3, 0))), ("a.json", mecat)])
    write(tmp_path / "in" / "b.tar", [("b.flac", flac(tone(0.3, 0))), ("b.json", b'{"text": "x"}')])
    with pytest.raises(UserError, match=r"some records bring questions of their own, others .* do not"):
        go(tmp_path / "in", tmp_path / "out", f"shard_mb={shard_mb}")


def test_a_dataset_and_cuts_to_the_end(tmp_path, chat):
    from datasets import Audio, Dataset
    from lhotse import CutSet

    from tests.curate.test_sources import recording, supervised

    sounds = [{"bytes": made("mp3", tone(0.5, n, 44_100), 44_100), "path": "x.mp3"} for n in range(12)]
    data = Dataset.from_dict({"audio": sounds, "sentence": ["same"] * 12, "who": [f"w{n % 6}" for n in range(12)]})
    data.cast_column("audio", Audio()).save_to_disk(tmp_path / "hf")
    for _ in range(2):
        report = go(tmp_path / "hf", tmp_path / "out_hf", "workers=2", columns="source=who")
        assert (report.rows, report.written_rows, report.dropped) == (12, 12, {})
    corpus = index_of(tmp_path / "out_hf", chat)
    assert len(corpus) + len(corpus.held_out) == 12
    cuts = [supervised(recording(tmp_path / f"{n}.wav", 0.5, n, 22_050).to_cut(), f"cut {n}") for n in range(9)]
    CutSet.from_cuts([*cuts, *(c.perturb_speed(1.1) for c in cuts)]).to_file(tmp_path / "cuts.jsonl")
    report = go(tmp_path / "cuts.jsonl", tmp_path / "out_cuts", "workers=2", "test_share=0.3")
    assert (report.rows, report.written_rows, report.dropped) == (18, 18, {})
    test, train = ({c["source"] for c, _, _ in written(tmp_path / "out_cuts", s)} for s in ("test", "train"))
    assert test
    assert not test & train
    corpus = index_of(tmp_path / "out_cuts", chat)
    assert (corpus.summary.damage, corpus.summary.reasons) == ((), {})


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_says_what_became_of_it(tmp_path, monkeypatch, capsys, chat):
    little(tmp_path / "in", 8).rename(tmp_path / "in" / "birds.csv")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sys.argv", ["prepare", "--data", "in/birds.csv", "--task", "caption", "workers=1", "codec=flac"]
    )
    assert stage.main() == 0
    said = capsys.readouterr().out
    assert "8 rows: 6 written, 2 dropped" in said
    assert "2  missing file; first: in/birds.csv line 2" in said
    assert 'SET="data.root=data/birds/shards data.manifests=data/birds/manifests data.mix=birds data.also=[]"' in said
    assert "make finetune DATA=data/birds" in said
    (card,) = read_mix("birds", Path("data/birds/manifests")).cards
    assert (card.task, card.prompts) == ("caption", ["Write a general audio caption"])
    assert len(index_of(Path("data/birds"), chat, "birds")) > 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "no.csv", "--prompt", "x"], "no.csv is not there"),
        (["--data", "t.csv"], "no column for the question"),
        (["--data", "t.csv", "--task", "sing"], "TASK=sing: there are asr, caption"),
        (["--data", "t.csv", "--task", "asr"], "the prompt asks for {language}"),
        (["--data", "t.csv", "--prompt", "x", "codec=mp3"], "codec=mp3; there are flac, opus"),
        (["--data", "t.csv", "--prompt", "x", "shards=3"], "SET: `shards=3`; write NAME=VALUE with codec"),
        (["--data", "t.csv", "--prompt", "x", "test_share=1"], "test_share lies in 0 to 1"),
        (["--data", "t.csv", "--prompt", "x", "workers=all"], "could not convert string to float"),
        (
            ["--data", "t.csv", "--prompt", "x", "--name", "my.big.corpus"],
            "NAME=my.big.corpus: letters, digits, _ and -",
        ),
        (["--data", "t.csv", "--prompt", "x", "--columns", "audio"], "COLUMNS: `audio=`; write NAME=VALUE"),
        (["--data", "t.csv", "--prompt", "x"], "nothing of the input can be trained on; see data/t/dropped.jsonl"),
    ],
)
def test_a_mistake_ends_in_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text("audio,text\nno.wav,x\n")
    monkeypatch.setattr("sys.argv", ["prepare", *arguments])
    assert stage.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert says in said


def test_items_come_from_one_door_only(tmp_path):
    """What `make prepare` numbers is what open_source brings: the journal counts on it being the same each time."""
    data = little(tmp_path / "in", 20)
    first, second = (list(open_source(str(data), {}, ("x",))) for _ in range(2))
    assert first == second
