"""Every row of a table, a dataset, cuts or tars comes out once: in a record, or with the reason why not."""

import gzip
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from midasheng.config import UserError
from midasheng.curate.encode import encode
from midasheng.curate.sources import MECAT, Item, open_source
from midasheng.sample import unit_hash
from tests.conftest import flac, tone
from tests.data.shards import write

ASK = ("Describe it.",)


def items(path: Path | str, columns: dict[str, str] | None = None, prompts=ASK, root: str = "") -> list[Item]:
    return list(open_source(str(path), columns or {}, prompts, root))


def table(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def answers(found: list[Item]) -> list[list[str] | str]:
    """What each item says, or why it is not used."""
    return [i.reason or i.record.get("answers") or [f"{q['question']} {q['answer']}" for q in i.record["questions"]]
            for i in found]  # fmt: skip


def lines(found: list[Item]) -> list[int]:
    return [int(i.where.rsplit(" ", 1)[1]) for i in found]


def mistake(path: Path | str, columns: dict[str, str] | None = None, prompts=ASK) -> str:
    with pytest.raises(UserError) as caught:
        items(path, columns, prompts)
    return str(caught.value)


# -- tables ------------------------------------------------------------------------------------------------------------

SPREADSHEET = (
    'audio,caption,speaker\r\na.wav,"rain, then ""thunder""",x\r\nb.wav,"two\r\nlines",\r\n\r\n'
    "c.wav,雨の音 и гром,y\r\nd.wav,,y\r\n,lost,y\r\ne.wav,short\r\nf.wav,long,y,z\r\ng.wav,He said \"hi\",y\r\n"
)  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("zipped", [False, True])
def test_a_spreadsheet_with_everything_in_it(tmp_path, encoding, zipped):
    path = table(tmp_path / "t.csv", SPREADSHEET, encoding)
    if zipped:
        path = tmp_path / "t.csv.gz"
        path.write_bytes(gzip.compress(SPREADSHEET.encode(encoding)))
    found = items(path)
    assert answers(found) == [
        ['rain, then "thunder"'], ["two\r\nlines"], ["雨の音 и гром"], "empty answer", "no audio named",
        "2 columns instead of 3", "4 columns instead of 3", ['He said "hi"'],
    ]  # fmt: skip
    assert lines(found) == [2, 3, 6, 7, 8, 9, 10, 11]
    assert found[0].where == f"{path} line 2"
    assert [i.rows for i in found] == [1] * 8
    assert found[0].record == {"speaker": "x", "source": "a.wav", "audio": "a.wav", "answers": ['rain, then "thunder"']}
    assert "speaker" not in found[1].record
    assert found[0].audio == tmp_path / "a.wav"


def test_semicolons_of_a_spreadsheet_with_decimal_commas(tmp_path):
    found = items(table(tmp_path / "t.csv", "audio;caption\na.wav;rain, thunder\n"))
    assert answers(found) == [["rain, thunder"]]


def test_quotes_in_a_tsv_are_letters(tmp_path):
    path = table(tmp_path / "t.tsv", 'audio\ttext\na.wav\t"Stop" he said\nb.wav\t5" nails\nc.wav\t"open\nd.wav\tlast\n')
    assert answers(items(path)) == [['"Stop" he said'], ['5" nails'], ['"open'], ["last"]]


def test_a_tsv_with_a_quoted_header_is_quoted(tmp_path):
    path = table(tmp_path / "t.tsv", '"audio"\t"text"\n"a.wav"\t"one\ttwo"\n')
    assert answers(items(path)) == [["one\ttwo"]]


@pytest.mark.parametrize(
    "text", ['audio,text\na.wav,x\nb.wav,"open\nc.wav,y\n', 'audio,text\na.wav,x\nb.wav,"open\nc.wav,"y"\nd.wav,z\n']
)
def test_a_quote_that_is_never_closed_swallows_no_rows(tmp_path, text):
    said = mistake(table(tmp_path / "t.csv", text))
    assert "t.csv line 4:" in said
    assert "a quote is not closed" in said


def test_not_utf_8_is_said_before_any_work(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"audio,text\n" + b"a.wav,x\n" * 99_999 + "b.wav,sch\u00f6n\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"t\.csv: 'utf-8' codec .* save it as UTF-8"):
        next(open_source(str(path), {}, ASK))
    path = path.rename(tmp_path / "t.jsonl")
    path.write_bytes(b'{"audio": "a.wav", "text": "sch\xf6n"}\n')
    assert "save it as UTF-8" in mistake(path)


@pytest.mark.parametrize(
    ("header", "columns", "says"),
    [
        ("audio,caption,text", {}, "caption and text could each be the answer; say which: COLUMNS=answer=caption"),
        ("path,wav,text", {}, "path and wav could each be the audio"),
        ("audio,text,text", {}, "two columns bear one name"),
        ("sound,text", {}, "no column for the audio (one of audio, "),
        ("audio,words", {}, "no column for the answer (one of answer, "),
        ("audio,text", {"answer": "words"}, "COLUMNS says answer=words; there are audio, text"),
        ("audio,text", {"anser": "text"}, "COLUMNS: 'anser' is no role; there are audio, answer"),
    ],
)
def test_columns_that_are_not_clear(tmp_path, header, columns, says):
    values = ",".join("x" * len(header.split(",")))
    assert says in mistake(table(tmp_path / "t.csv", f"{header}\n{values}\n"), columns)


def test_columns_of_other_names(tmp_path):
    path = table(tmp_path / "t.csv", "clip,audio,what,text\na.wav,7,rain,3\n")
    (one,) = items(path, {"audio": "clip", "answer": "what", "source": "text"})
    assert (one.name, one.source, one.record["answers"]) == ("a.wav", "3", ["rain"])


def test_nothing_to_ask(tmp_path):
    path = table(tmp_path / "t.csv", "audio,text\na.wav,x\n")
    assert "no column for the question" in mistake(path, prompts=())
    assert 'PROMPT="..." or TASK=caption' in mistake(path, prompts=())
    path = table(tmp_path / "t.csv", "audio,text,question\na.wav,x,What?\nb.wav,y,\n")
    assert answers(items(path, prompts=())) == [["What? x"], "empty question"]
    assert answers(items(path)) == [["What? x"], ["Describe it. y"]]


def test_a_prompt_is_filled_or_the_row_is_not_used(tmp_path):
    asr = ("Write <|{language}|>",)
    path = table(tmp_path / "t.csv", "audio,text,language\na.wav,x,de\nb.wav,y,\n")
    found = items(path, prompts=asr)
    assert answers(found) == [["x"], "no language, which the prompt asks for"]
    assert found[0].record["language"] == "de"
    path = table(tmp_path / "t.csv", "audio,text,language,question\na.wav,x,de,\nb.wav,y,,\nc.wav,z,,What?\n")
    assert answers(items(path, prompts=asr)) == [
        ["Write <|de|> x"], "no language, which the prompt asks for", ["What? z"]
    ]  # fmt: skip
    path = table(tmp_path / "t.csv", "audio,text\na.wav,x\n")
    assert "the prompt asks for {language}, and there is no such column" in mistake(path, prompts=asr)
    assert "asks for {text}" in mistake(path, prompts=("Write {text}",))
    assert "a brace itself is written twice" in mistake(path, prompts=("Write }",))


def test_rows_of_one_audio_become_one_record(tmp_path):
    text = "audio,text,lang\na.wav,one,de\na.wav,two,de\na.wav,one,de\na.wav,three,en\nb.wav,one,de\na.wav,one,de\n"
    found = items(table(tmp_path / "t.csv", text))
    assert [(i.name, i.rows, i.reason or i.record["answers"]) for i in found] == [
        ("a.wav", 1, "duplicate"), ("a.wav", 2, ["one", "two"]), ("a.wav", 1, ["three"]), ("b.wav", 1, ["one"]),
        ("a.wav", 1, ["one"]),
    ]  # fmt: skip
    assert sum(i.rows for i in found) == 6
    assert len({i.key for i in found if not i.reason}) == 4
    path = table(tmp_path / "t.csv", "audio,question,answer\na.wav,Who?,he\na.wav,What?,it\na.wav,Who?,he\n")
    (again, one) = items(path, prompts=())
    assert (one.rows, one.record["questions"], again.reason) == (
        2, [{"question": "Who?", "answer": "he"}, {"question": "What?", "answer": "it"}], "duplicate"
    )  # fmt: skip


def test_a_row_that_stands_twice_is_a_duplicate(tmp_path):
    found = items(table(tmp_path / "t.csv", "audio,text\na.wav,one\nb.wav,two\na.wav,one\na.wav,one\n"))
    assert answers(found)[:2] == [["one"], ["two"]]
    assert [i.reason for i in found[2:]] == ["duplicate", "duplicate"]


def test_many_unusable_rows_one_after_the_other(tmp_path):
    text = "audio,text\n" + ",x\n" * 500 + "a.wav,\n" * 500
    assert [i.reason for i in items(table(tmp_path / "t.csv", text))] == ["no audio named"] * 500 + [
        "empty answer"
    ] * 500


def test_segments(tmp_path):
    text = (
        "audio,text,start,end,duration\na.wav,one,1.5,2.5,\na.wav,one,2.5,,0.25\na.wav,one,,3,\na.wav,one,,,\n"
        "a.wav,one,3,2,\na.wav,one,-1,2,\na.wav,one,x,2,\na.wav,one,nan,2,\na.wav,one,0,inf,\n"
    )
    found = items(table(tmp_path / "t.csv", text))
    assert [(i.start_s, i.end_s) for i in found[:4]] == [(1.5, 2.5), (2.5, 2.75), (0.0, 3.0), (0.0, None)]
    assert [i.reason for i in found] == ["", "", "", "", *["ends before it starts"] * 2, *["times are no numbers"] * 3]
    assert len({i.key for i in found[:4]}) == 4
    assert {i.source for i in found} == {"a.wav"}


def test_a_duration_alone_is_that_of_the_file(tmp_path):
    found = items(table(tmp_path / "t.csv", "audio,text,duration\na.wav,one,00:01:20\n"))
    assert (found[0].reason, found[0].start_s, found[0].end_s) == ("", 0.0, None)
    assert "duration" not in found[0].record


def test_a_source_of_ones_own_and_another_root(tmp_path):
    path = table(tmp_path / "t.csv", "audio,text,speaker\nx/a.wav,one,Ann\n/y/b.wav,two,Ann\nc.wav,three,\n")
    found = items(path, {"source": "speaker"}, root="/r")
    assert [(i.source, str(i.audio)) for i in found] == [
        ("Ann", "/r/x/a.wav"),
        ("Ann", "/y/b.wav"),
        ("c.wav", "/r/c.wav"),
    ]
    assert found[0].record["source"] == "Ann"


def test_json_lines_with_broken_ones(tmp_path):
    path = table(
        tmp_path / "t.jsonl",
        '{"audio": "a.wav", "text": ["one", "", null, "two"], "tags": ["x"], "n": 3}\n\n{"audio": \n[1]\nnull\n'
        '{"audio": "b.wav", "text": "\\ud83d"}\n{"audio": "\\ude00", "text": "x"}\n{"text": "x"}\n'
        '{"audio": "c.wav", "text": "\\ud83d\\ude00"}\n{"audio": "d.wav", "text": []}\n',
    )
    found = items(path)
    assert answers(found) == [
        ["one", "two"], *["no JSON object"] * 3, *["half a character"] * 2, "no audio named", ["😀"], "empty answer"
    ]  # fmt: skip
    assert lines(found) == [1, 3, 4, 5, 6, 7, 8, 9, 10]
    assert (found[0].record["tags"], found[0].record["n"]) == (["x"], 3)
    for item in found:
        unit_hash(item.source)
        json.dumps([item.record, item.where, item.name], ensure_ascii=False).encode()
    path = table(tmp_path / "t.jsonl", '{"audio": "a.wav", "text": "x", "start": [1]}\n')
    assert answers(items(path)) == ["times are no numbers"]


def test_inputs_that_are_none(tmp_path):
    assert "is not there" in mistake(tmp_path / "no.csv")
    assert "give a .csv, .tsv or .jsonl" in mistake(table(tmp_path / "t.xlsx", "x"))
    assert "is not there, or empty" in mistake(str(tmp_path / "*.tar"))
    assert "no .tar, .tar.gz or .tgz in it" in mistake(tmp_path)
    assert "no column for the audio" in mistake(table(tmp_path / "t.csv", ""))


def test_keys_fit_into_a_shard(tmp_path):
    names = ["a b.c.wav", "../x/é.wav", "中.wav", "-x.wav", "y" * 200 + ".wav", "a_b_c.wav"]
    found = items(table(tmp_path / "t.csv", "audio,text\n" + "".join(f"{n},x\n" for n in names)))
    keys = [i.key for i in found]
    assert len(set(keys)) == len(names)
    for key in keys:
        assert key.isascii()
        assert key.replace("-", "").replace("_", "").isalnum()
        assert not key.startswith("-")
        assert len(key) < 60


# -- Hugging Face ------------------------------------------------------------------------------------------------------


def test_a_dataset_on_disk_with_its_audio_inside_and_as_paths(tmp_path):
    from datasets import Audio, Dataset

    sounds = [flac(tone(0.3, n)) for n in range(5)]
    (tmp_path / "a.flac").write_bytes(sounds[3])
    rows = [
        {"bytes": sounds[0], "path": "x.wav"}, {"bytes": sounds[1], "path": "x.wav"},
        {"bytes": sounds[2], "path": None},
        {"bytes": None, "path": str(tmp_path / "a.flac")}, None, {"bytes": sounds[4], "path": None},
    ]  # fmt: skip
    texts = ["same", "same", "two", "three", "four", ""]
    data = Dataset.from_dict({"audio": rows, "sentence": texts, "year": [2000] * 6}).cast_column("audio", Audio())
    data.save_to_disk(tmp_path / "data")
    before = {p: p.stat().st_size for p in (tmp_path / "data").rglob("*")}
    found = items(tmp_path / "data")
    assert [i.reason for i in found] == ["", "", "", "", "no audio named", "empty answer"]
    assert [i.audio for i in found[:3]] == sounds[:3]
    assert [encode(i.audio, "flac")[0] for i in found[:4]] == [encode(s, "flac")[0] for s in sounds[:4]]
    assert [i.record["answers"] for i in found[:4]] == [["same"], ["same"], ["two"], ["three"]]
    assert found[0].source == found[1].source == "x.wav"
    assert len({i.source for i in found[2:]}) == 4
    assert found[0].record["year"] == 2000
    assert lines(found) == [0, 1, 2, 3, 4, 5]
    assert {p: p.stat().st_size for p in (tmp_path / "data").rglob("*")} == before


def test_a_dataset_of_paths_with_classes_and_lists(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Sequence, Value

    features = Features({"file": Value("string"), "label": ClassLabel(names=["dog", "cat"])})
    data = Dataset.from_dict({"file": ["a.wav", "b.wav"], "label": [1, 0]}, features=features)
    data.save_to_disk(tmp_path / "data")
    found = items(tmp_path / "data")
    assert answers(found) == [["cat"], ["dog"]]
    assert found[0].audio == tmp_path / "a.wav"
    features = Features({"file": Value("string"), "captions": Sequence(Value("string"))})
    Dataset.from_dict({"file": ["a.wav"], "captions": [["x", "y"]]}, features=features).save_to_disk(tmp_path / "more")
    assert answers(items(tmp_path / "more")) == [["x", "y"]]


def test_a_dataset_with_splits_says_which_folder_to_name(tmp_path):
    from datasets import Dataset, DatasetDict

    one = Dataset.from_dict({"file": ["a.wav"], "text": ["x"]})
    DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "data")
    said = mistake(tmp_path / "data")
    assert "holds the splits train, test; prepare each on its own" in said
    assert f"DATA={tmp_path}/data/train" in said
    assert answers(items(tmp_path / "data" / "train")) == [["x"]]


@pytest.mark.parametrize(
    ("module", "extra"), [("datasets", "midasheng-train[hf]"), ("lhotse.serialization", "midasheng-train[lhotse]")]
)
def test_what_is_not_installed_is_said(tmp_path, monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "state.json").write_text("{}")
    cuts = table(tmp_path / "cuts.jsonl", '{"id": "a", "type": "MonoCut"}\n')
    said = mistake(tmp_path / "data" if module == "datasets" else cuts)
    assert f"pip install '{extra}'" in said


# -- Lhotse ------------------------------------------------------------------------------------------------------------


def recording(path: Path, seconds: float, seed: int, rate: int = 16_000):
    from lhotse import Recording

    soundfile.write(path, tone(seconds, seed, rate), rate, subtype="FLOAT")
    return Recording.from_file(path)


def supervised(cut, text: str | None, **more):
    from lhotse import SupervisionSegment

    where = {"id": f"s-{cut.id}-{text}", "recording_id": cut.id, "start": 0, "duration": cut.duration}
    cut.supervisions.append(SupervisionSegment(**where, text=text, **more))
    return cut


@pytest.mark.parametrize("name", ["cuts.jsonl", "cuts.jsonl.gz"])
def test_cuts(tmp_path, name):
    from lhotse import CutSet

    long = recording(tmp_path / "long.wav", 3, 1)
    cut = long.to_cut().truncate(offset=1.0, duration=0.5).with_id("part")
    supervised(cut, " hello ", language="en", speaker="Ann", custom={"mood": "calm", "deep": {"x": 1}})
    supervised(cut, "world", language="en")
    bare = recording(tmp_path / "bare.wav", 0.4, 2).to_cut()
    silent = supervised(recording(tmp_path / "none.wav", 0.4, 3).to_cut(), None)
    CutSet.from_cuts([cut, bare, silent]).to_file(tmp_path / name)
    found = items(tmp_path / name)
    assert answers(found) == [["hello world"], "empty answer", "empty answer"]
    assert lines(found) == [1, 2, 3]
    about = found[0].record
    assert (about["language"], about["speaker"], about["mood"], about["audio"]) == ("en", "Ann", "calm", "part")
    assert "deep" not in about
    assert found[0].source == "long"
    data, n_samples = encode(found[0].audio, "flac")
    assert n_samples == 8_000
    assert np.abs(soundfile.read(io.BytesIO(data))[0] - tone(3, 1)[16_000:24_000]).max() < 2 / 32_768


def test_perturbed_and_mixed_cuts_stay_with_their_recording(tmp_path):
    from lhotse import CutSet

    one = supervised(recording(tmp_path / "one.wav", 1, 1).to_cut().with_id("cut"), "one")
    noise = recording(tmp_path / "noise.wav", 2, 2).to_cut()
    cuts = [
        one, one.perturb_speed(1.25), one.perturb_volume(0.5), one.mix(noise, snr=10, preserve_id="left"),
        one.pad(1.5), one.resample(8_000), one.perturb_speed(0.9).perturb_volume(2.0),
    ]  # fmt: skip
    cuts = [cut.with_id(f"cut{n}") for n, cut in enumerate(cuts)]
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl")
    found = items(tmp_path / "cuts.jsonl")
    assert [i.source for i in found] == ["one"] * 7
    assert answers(found) == [["one"]] * 7
    lengths = [encode(i.audio, "flac")[1] for i in found]
    assert lengths == [16_000, 12_800, 16_000, 32_000, 24_000, 16_000, pytest.approx(17_778, abs=1)]
    assert encode(found[1].audio, "opus")[1] == 12_800


def test_cuts_without_their_files_and_lines_that_are_none(tmp_path):
    from lhotse import CutSet

    from midasheng.data.audio import Skip

    good, gone = (supervised(recording(tmp_path / f"{n}.wav", 0.5, 1).to_cut(), n) for n in ("good", "gone"))
    mixed = good.mix(gone)
    CutSet.from_cuts([good, gone, mixed]).to_file(tmp_path / "cuts.jsonl")
    (tmp_path / "gone.wav").unlink()
    with (tmp_path / "cuts.jsonl").open("a") as file:
        file.write('{"id": \n{"id": "x", "type": "MonoCut"}\n[]\n')
    found = items(tmp_path / "cuts.jsonl")
    assert answers(found) == [["good"], ["gone"], ["good gone"], "no cut", "no cut", "no cut"]
    assert lines(found) == [1, 2, 3, 4, 5, 6]
    for item in found[1:3]:
        with pytest.raises(Skip, match="missing file"):
            encode(item.audio, "flac")
    assert "no column for the question" in mistake(tmp_path / "cuts.jsonl", prompts=())
    assert "COLUMNS is about tables" in mistake(tmp_path / "cuts.jsonl", {"source": "speaker"})
    assert (
        answers(items(tmp_path / "cuts.jsonl", prompts=("In {language}.",)))[:2]
        == ["no language, which the prompt asks for"] * 2
    )


# -- tars --------------------------------------------------------------------------------------------------------------

SOUND = flac(tone(0.3, 0))


def member(name: str, **content: object) -> list[tuple[str, bytes]]:
    return [(f"{name}.flac", SOUND), (f"{name}.json", json.dumps(content).encode())]


def packed(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A .tar.gz of (name, bytes)."""
    write(path.with_suffix(".plain"), members)
    path.write_bytes(gzip.compress(path.with_suffix(".plain").read_bytes(), 0))
    path.with_suffix(".plain").unlink()
    return path


def test_mecat_captions(tmp_path):
    said = {field: [f"{field} {n}" for n in "abc"] for field in MECAT}
    silent = said | {"speech": ["None", "No one speaks.", "none."], "music": ["None", "None", "None"]}
    write(tmp_path / "train" / "m0.tar", member("0ab/-_YouTubeId_10_20", **said, domain="0M0"))
    write(tmp_path / "train" / "m1.tar", [
        *member("0ab/-_YouTubeId_30_40", **silent, domain=""),
        *member("0ab/empty", **{field: ["None"] * 3 for field in MECAT}),
        *member("0ab/torn", **{field: ["\ud83d"] for field in MECAT}),
    ])  # fmt: skip
    one, two, empty, torn = items(tmp_path, prompts=())
    assert len(one.record["questions"]) == 18
    assert one.record["questions"][0] == {"question": MECAT["short"], "answer": "short a"}
    assert one.record["answers"] == ["short a", "short b", "short c", "long a", "long b", "long c"]
    assert (one.record["domain"], one.source, two.source) == ("0M0", "-_YouTubeId", "-_YouTubeId")
    asked = {q["question"]: q["answer"] for q in two.record["questions"]}
    assert MECAT["music"] not in asked
    assert asked[MECAT["speech"]] == "No one speaks."
    assert len(two.record["questions"]) == 13
    assert [empty.reason, torn.reason] == ["empty answer", "half a character"]
    assert one.audio == SOUND
    assert one.where == f"{tmp_path}/train/m0.tar: 0ab/-_YouTubeId_10_20"


def test_mecat_questions(tmp_path):
    rows = {"category": "scene", "difficulty": "hard", "question": "Where?", "answer": "Outside.", "domain": "00A"}
    write(
        tmp_path / "qa.tar", member("AbCdEfGhIjK_10_20_0123abcd", **rows) + member("AbCdEfGhIjK_10_20_4567cdef", **rows)
    )
    one, two = items(tmp_path / "qa.tar", prompts=())
    assert one.record["questions"] == [{"question": "Where?", "answer": "Outside."}]
    assert (one.record["category"], one.record["difficulty"], one.record["domain"]) == ("scene", "hard", "00A")
    assert one.source == two.source == "AbCdEfGhIjK"
    assert one.key != two.key


def test_xares_llm(tmp_path):
    packed(
        tmp_path / "clotho_00.tar.gz", member("a", caption=["one", "two"], fname="x") + member("b", caption=["three"])
    )
    packed(tmp_path / "clotho_01.tar.gz", member("c", caption="four"))
    found = items(str(tmp_path / "clotho_*.tar.gz"), {"answer": "caption"})
    assert answers(found) == [["one", "two"], ["three"], ["four"]]
    assert [i.source for i in found] == ["a", "b", "c"]
    assert answers(items(tmp_path / "clotho_01.tar.gz")) == [["four"]]
    packed(tmp_path / "vocal.tar.gz", member("a", vocalsound="Laughter", age=3))
    assert "no column for the answer" in mistake(tmp_path / "vocal.tar.gz")
    (one,) = items(tmp_path / "vocal.tar.gz", {"answer": "vocalsound"})
    assert (one.record["answers"], one.record["age"]) == (["Laughter"], 3)


def test_a_clip_in_a_tar_is_cut_already(tmp_path):
    write(tmp_path / "a.tar", member("a", text="x", start=30.0, end=40.0, duration=10.0))
    (one,) = items(tmp_path / "a.tar")
    assert (one.start_s, one.end_s, one.record["start"]) == (0.0, None, 30.0)
    (one,) = items(tmp_path / "a.tar", {"start": "start", "end": "end"})
    assert (one.start_s, one.end_s) == (30.0, 40.0)


def test_members_that_make_no_record(tmp_path):
    members = [
        *member("a", text="one"), ("b.flac", SOUND), ("c.json", b'{"text": "x"}'), ("d.flac", SOUND), ("d.json", b"{"),
        ("e.flac", SOUND), ("e.json", b"[]"), ("f.txt", b""), *member("g", text=""), *member("h", word="x"),
        ("i.m4a", SOUND), ("i.json", b'{"text": "i"}'), ("README", b"x"), *member("k", text="one", source="mine"),
    ]  # fmt: skip
    found = items(write(tmp_path / "a.tar", members))
    assert [(i.name, i.reason) for i in found] == [
        ("a", ""), ("b", "no json"), ("c", "no audio"), ("d", "json unreadable"), ("e", "json unreadable"),
        ("f", "no audio"), ("g", "empty answer"), ("h", "empty answer"), ("i", ""), ("k", ""),
    ]  # fmt: skip
    assert found[-1].source == "mine"


def test_a_name_that_is_no_utf_8(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", encoding="latin-1", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in member("n\u00e9me", text="x"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (one,) = items(path)
    json.dumps([one.where, one.name, one.source, one.record], ensure_ascii=False).encode()
    assert (one.reason, one.name) == ("", "n\\udce9me")


def test_equal_names_in_two_tars_are_two_sounds(tmp_path):
    write(tmp_path / "a.tar", member("x", text="same"))
    write(tmp_path / "b.tar", [("x.flac", flac(tone(0.3, 1))), ("x.json", b'{"text": "same"}')])
    write(tmp_path / "c.tar", member("x", text="same"))
    assert [i.reason for i in items(tmp_path)] == ["", "", "duplicate"]


def test_a_truncated_archive_keeps_what_stands_before_the_cut(tmp_path):
    """Wherever the cut is: inside a member, inside a header, between two members, inside the end."""
    members = [m for n in range(4) for m in member(f"k{n}", text=str(n))]
    whole = packed(tmp_path / "whole.tar.gz", members).read_bytes()
    assert [i.name for i in items(tmp_path / "whole.tar.gz")] == ["k0", "k1", "k2", "k3"]
    plain = gzip.decompress(whole)
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        ends = [(m.name, m.offset_data + m.size) for m in tar]
        heads = [m.offset for m in tar]
    spots = {*range(600, ends[-1][1], 1_777), *heads[1:], *(h + 100 for h in heads[1:]), *(end for _, end in ends)}
    for at in sorted(spots):
        for path, data in (
            (tmp_path / "t.tar", plain[:at]),
            (tmp_path / "t.tar.gz", gzip.compress(plain[:at], 1)[:-9]),
        ):
            path.write_bytes(data)
            found = items(path, {"answer": "text"})
            whole_ones = [n for n in range(4) if at >= ends[2 * n + 1][1]]
            kept = [i.name for i in found if not i.reason]
            assert kept == [f"k{n}" for n in whole_ones][: len(kept)]
            assert len(kept) >= len(whole_ones) - (path.suffix == ".gz")  # its last bytes may be those of a record
            assert found[-1].reason.startswith("archive damaged")
            assert {i.reason.split(" (")[0] for i in found} <= {"", "no json", "archive damaged"}
    (tmp_path / "t.tar.gz").write_bytes(whole[: len(whole) // 2])
    found = items(tmp_path / "t.tar.gz")
    assert [i.name for i in found][:2] == ["k0", "k1"]
    assert found[-1].reason.startswith("archive damaged")
    (tmp_path / "t.tar.gz").write_bytes(b"no archive")
    assert [i.reason.split(" (")[0] for i in items(tmp_path / "t.tar.gz")] == ["archive damaged"]


def test_a_header_that_cannot_be_read_is_not_the_end(tmp_path):
    members = [m for n in range(3) for m in member(f"k{n}", text=str(n))]
    path = write(tmp_path / "a.tar", members)
    data = bytearray(path.read_bytes())
    at = data.index(b"k1.flac")
    data[at + 100 : at + 110] = b"xxxxxxxxxx"
    path.write_bytes(data)
    found = items(path)
    assert [i.name for i in found if not i.reason] == ["k0"]
    assert found[-1].reason.startswith("archive damaged")
