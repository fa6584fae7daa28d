"""The report page's data: nothing lost, nothing that a run's files hold can break or run in the page."""

import csv
import json
import shutil
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from midasheng.config import UserError
from midasheng.train.answers import CLIPS, EARLIER
from midasheng.train.curves import draw, read_curves, write_csv
from midasheng.train.report import Report
from midasheng.train.run_folder import Run, kept, smoothed
from midasheng.train.watch import open_server

EVIL = "</script><img src=x onerror=alert(1)>"
PAIR = {"difference": 0.5, "se": 0.1, "samples": 9}


def train_row(step: int, loss: float, **more: object) -> dict:
    half = {"loss_sum": 10 * loss, "targets": 10}
    return {
        "step": step, "loss": loss, "lr": 1e-3, "grad_norm": 1.0, "targets": 20, "audio_s": 36.0, "slots": 9,
        "frames": 9, "corpora": {"a": half, "b": half}, "languages": {"fr": half, "-": half}, **more,
    }  # fmt: skip


def val_row(step: int, loss: float) -> dict:
    part = {"loss_sum": 30 * loss, "targets": 30, "listening": PAIR}
    return {
        "step": step, "val_loss": loss, "targets": 60, "listening": PAIR, "text_only": PAIR,
        "corpora": {"a": part, "b": part}, "languages": {"fr": part, "-": part},
    }  # fmt: skip


def speed_row(step: int) -> dict:
    return {
        "step": step, "seconds": 1800.0, "audio_h_per_device_h": 5.0, "mfu": 0.3, "slots_per_s": 9.0,
        "encoder_padding": 0.1, "decoder_padding": 0.2, "waiting": 0.01, "memory_gib": 1.5,
    }  # fmt: skip


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def write_run(folder: Path, stage: str = "stage1_align", steps: int = 40) -> Path:
    """A run folder as a stage leaves it, without weights and data."""
    rows = [val_row(0, 4.0), *(train_row(s, 4 - s / 20) for s in range(1, steps + 1)), val_row(steps, 2.0)]
    write_rows(folder / "metrics.jsonl", rows)
    peak = {"step": 0, "peak_flops_per_s": 1e12, "peak": "measured"}
    write_rows(folder / "speed.jsonl", [peak, *(speed_row(s) for s in range(10, steps + 1, 10))])
    (folder / "config.yaml").write_text(f'name: {stage}\ndata.mix: "none"  # stage\noptim.lr: 0.001\n')
    (folder / "trainable.txt").write_text(f"{stage}\n  {steps} steps (2 of warm-up), 2 packs a step\n")
    (folder / "inputs.json").write_text('{"plan": {"mix": {"a": 60.0, "b": 40.0}}, "parents": []}')
    write_rows(folder / "skipped.jsonl", [{"step": -1, "corpus": "a", "key": EVIL, "reason": "too long"}])
    events = [
        {"step": 0, "event": "start", "world": 1, "time": 1.7e9},
        {"step": 10, "event": "checkpoint", "seconds": 0.1, "time": 1.7e9},
        {"step": 10, "event": "resume", "world": 2, "world_before": 1, "time": 1.7e9},
    ]
    write_rows(folder / "events.jsonl", events)
    return folder


def data_of(folder: Path) -> dict:
    run = Run(folder)
    run.follow()
    return run.data()


def test_a_run_is_read_whole(tmp_path):
    found = data_of(write_run(tmp_path / "one"))
    assert (found["stage"], found["done"], found["planned"], found["finished"]) == ("stage1_align", 40, 40, False)
    assert found["train"]["raw"]["x"] == list(range(1, 41))
    assert found["train"]["raw"]["y"][9] == pytest.approx(3.5)
    assert found["train"]["smooth"]["y"][9] == pytest.approx(3.6)  # of five rows
    assert found["val"]["loss"] == {"x": [0, 40], "y": [4.0, 2.0]}
    assert found["val"]["alone"] == 2.5
    assert found["val"]["listening"] == {"x": [0, 40], "y": [0.5, 0.5], "se": [0.1, 0.1]}
    axes = found["axes"]
    assert [axes[a][-1] for a in ("step", "audio_h", "targets", "hours")] == pytest.approx([40, 0.4, 800, 2.0])
    assert axes["hours"][20] == pytest.approx(1.0)
    assert found["groups"]["corpus"]["a"]["loss"]["y"] == [4.0, 2.0]
    assert found["groups"]["language"]["fr"]["listening"]["y"] == [0.5, 0.5]
    assert list(found["groups"]["language"]) == ["fr", "-"]
    assert found["speed"]["memory_gib"]["y"] == [1.5] * 4
    assert found["skips"] == [{"corpus": "a", "reason": "too long", "before": True, "records": 1}]
    assert [(r["corpus"], r["asked"], r["targets"]) for r in found["mix"]] == [("a", 60.0, 400), ("b", 40.0, 400)]
    assert [e["event"] for e in found["events"]] == ["start", "checkpoint", "resume"]
    assert any("manifest" in note for note in found["notes"])  # no cards, and it says so


def test_training_by_language_is_drawn_from_the_rows_and_where_they_tell_none_that_is_said(tmp_path):
    folder = write_run(tmp_path / "one")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows[1:9]:  # as an older version wrote them
        del row["languages"]
    rows[20]["languages"]["it"] = {"loss_sum": 12.0, "targets": 4}
    write_rows(folder / "metrics.jsonl", rows)
    found = data_of(folder)
    languages = found["groups"]["language"]
    assert list(languages) == ["fr", "it", "-"]
    assert languages["fr"]["raw"] == {"x": list(range(9, 41)), "y": found["train"]["raw"]["y"][8:]}
    assert languages["it"]["raw"] == {"x": [20], "y": [3.0]}
    assert "8 rows of training tell no languages: an older version of this code wrote them" in found["notes"]


def test_a_changed_mix_is_asked_for_by_its_steps(tmp_path):
    folder = write_run(tmp_path / "one")
    rows = [{"step": 5, "event": "mix", "from_step": 10, "percent": {"a": 0.0, "b": 100.0}, "time": 1.7e9}]
    write_rows(folder / "events.jsonl", rows)
    assert [r["asked"] for r in data_of(folder)["mix"]] == [15.0, 85.0]  # 10 steps of 60, 30 of 0


def test_smoothing_is_over_targets_and_not_a_mean_of_means():
    loss = smoothed(np.asarray([10.0, 0.0]), np.asarray([1.0, 99.0]))
    assert loss.tolist() == pytest.approx([10.0, 0.1])


def test_a_spike_of_one_row_stays():
    rng = np.random.default_rng(0)
    for at in rng.integers(0, 199_999, 20).tolist():
        y = rng.normal(2, 0.01, 200_000)
        y[at] += 5
        y[(at + 50_000) % 200_000] -= 5
        here = kept(y, 2_000)
        assert len(here) <= 2_000
        assert {at, (at + 50_000) % 200_000} <= set(here.tolist())


@pytest.mark.parametrize("n", [0, 1, 1_999, 2_000, 2_001, 4_003])
def test_thinning_keeps_order_and_what_is_finite(n):
    y = np.arange(n, dtype=float)
    y[1::7] = np.nan
    here = kept(y, 2_000)
    assert (np.diff(here) > 0).all()
    assert np.isfinite(y[here]).all()
    assert len(here) <= 2_000


@pytest.mark.parametrize("cut", [b'{"step": 99, "lo', b'{"step": 99, "loss": 1.0}', '{"é'.encode()[:-1]])
def test_a_truncated_file_opens_with_what_is_there(tmp_path, cut):
    folder = write_run(tmp_path / "one")
    whole = data_of(folder)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(cut)
    (folder / "weights").mkdir()
    (folder / "weights/stage.json").write_text('{"seco')
    assert data_of(folder) == whole
    assert read_curves(tmp_path)[0].val == ((0, 4.0), (40, 2.0))


def test_damaged_lines_are_counted_and_the_others_read(tmp_path):
    folder = write_run(tmp_path / "one")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[5:5] = ["\0\0\0\0", "[1, 2]", '{"step": 5, "loss": NaN, "corpora": 3}', '{"step": 5, "loss": "x"}']
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = data_of(folder)
    assert "metrics.jsonl: 2 lines cannot be read and are left out" in found["notes"]
    assert found["train"]["raw"]["x"] == list(range(1, 41))
    json.loads(Report(tmp_path).page().split('id="data">')[1].split("</script>")[0])


@pytest.mark.parametrize("name", ["config.yaml", "inputs.json", "speed.jsonl", "trainable.txt", "skipped.jsonl"])
def test_a_missing_or_half_written_file_takes_nothing_else_away(tmp_path, name):
    folder = write_run(tmp_path / "one")
    (folder / name).write_bytes((folder / name).read_bytes()[:9])
    assert data_of(folder)["train"]["raw"]["x"] == list(range(1, 41))
    (folder / name).unlink()
    assert data_of(folder)["train"]["raw"]["x"] == list(range(1, 41))


def test_a_running_stage_is_followed_and_a_resume_that_drops_rows_too(tmp_path):
    folder = write_run(tmp_path / "one")
    run = Run(folder)
    assert run.follow()
    assert not run.follow()
    path = folder / "metrics.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(train_row(41, 9.0)) + "\n" + '{"step": 42')
    assert run.follow()
    assert run.data()["train"]["raw"]["y"][-1] == 9.0
    with path.open("a") as file:
        file.write(', "loss": 8.0}\n')
    assert run.follow()
    assert run.data()["train"]["raw"]["x"][-2:] == [41, 42]
    write_rows(tmp_path / "new.jsonl", [val_row(0, 4.0), train_row(1, 3.0)])
    shutil.move(tmp_path / "new.jsonl", path)
    assert run.follow()
    assert run.data()["train"]["raw"] == {"x": [1], "y": [3.0]}


def test_whatever_stands_in_the_files_is_text(tmp_path):
    folder = write_run(tmp_path / "one", stage=f'"{EVIL}"')
    answer = {"step": 1, "id": EVIL, "mix": "m", "corpus": EVIL, "key": EVIL, "prompt": EVIL, "output": EVIL}
    answer |= {"references": [EVIL], "choices": []}
    write_rows(folder / "answers.jsonl", [answer])
    rows = [train_row(1, 1.0, corpora={EVIL: {"loss_sum": 1.0, "targets": 1}})]
    write_rows(folder / "metrics.jsonl", rows)
    report = Report(tmp_path)
    report.follow()
    page = report.page()
    assert "<img" not in page
    assert page.count("</script>") == 4
    blocks = [page.split(f'id="{name}">')[1].split("</script>")[0] for name in ("data", "clips")]
    assert json.loads(blocks[0])["runs"][0]["answers"]["shown"][0]["output"] == EVIL
    policy = page.split('Content-Security-Policy" content="')[1].split('"')[0]
    assert "default-src 'none'; script-src 'sha256-" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]
    code = (Path(__file__).parents[2] / "midasheng/train/report.js").read_text()
    assert not [word for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write") if word in code]


def test_answers_without_their_data_are_shown_with_the_reason(tmp_path):
    folder = write_run(tmp_path / "one")
    row = {"mix": "m", "corpus": "a", "prompt": "Which?", "references": ["yes"], "text_only": None}
    closed = [
        row | {"key": f"k{n}", "id": f"a{n}", "output": "no" if n % 10 else "yes", "choices": ["no", "yes"]}
        for n in range(90)
    ]  # fmt: skip
    asked = [*closed, row | {"key": "open", "id": "b", "output": "so", "corpus": "b", "choices": []}]
    before = [{"step": s, **a, "output": f"said at {s}"} for s in range(20) for a in asked[:2]]
    damaged = [{"step": 20, **asked[0], "references": "yes"}, {"step": 20, **asked[0], "output": None}]
    write_rows(folder / "answers.jsonl", [*before, *({"step": 20} | a for a in asked), *damaged])
    report = Report(tmp_path)
    report.follow()
    found = report.data()["runs"][0]["answers"]
    assert (found["rows"], found["step"], len(found["shown"])) == (91, 20, CLIPS)
    earlier = {r["key"]: r["earlier"] for r in found["shown"]}
    assert (earlier["k0"][0], earlier["k0"][-1]) == ((0, "said at 0"), (19, "said at 19"))
    assert len(earlier["k0"]) == EARLIER
    assert earlier["open"] == []
    assert {"open", "k0", "k1"} <= {r["key"] for r in found["shown"]}  # every question, wrong ones and right ones
    (exact,) = found["exact"]
    assert (exact["clips"], exact["exact"], exact["chance"]) == (90, 0.1, 1.0)
    assert all("not there" in why for why in report.clips().values())


def test_two_hundred_thousand_rows_are_read_and_small(tmp_path):
    """The page's opening is measured in a browser; here its size, and that a spike is in it."""
    folder = write_run(tmp_path / "one")
    with (folder / "metrics.jsonl").open("w") as file:
        half, rng = {"targets": 10}, np.random.default_rng(0).normal(2, 0.1, 200_000)
        for step, loss in enumerate(rng.tolist(), 1):
            loss = 77.0 if step == 123_457 else loss
            corpora = {c: half | {"loss_sum": 10 * loss} for c in "abcdef"}
            file.write(json.dumps(train_row(step, loss) | {"corpora": corpora}) + "\n")
    began = time.process_time()
    report = Report(tmp_path)
    report.follow()
    page = report.page()
    assert len(page) < 3e6
    assert time.process_time() - began < 60
    raw = report.data()["runs"][0]["train"]["raw"]
    assert raw["y"][raw["x"].index(123_457)] == 77.0


def test_names_choose_runs_and_a_wrong_one_is_told(tmp_path):
    for name in ("one", "two"):
        write_run(tmp_path / "scale" / name)
    report = Report(tmp_path / "scale", ["two", str(tmp_path / "scale/one")])
    report.follow()
    assert {r["name"] for r in report.data()["runs"]} == {"one", "two"}
    with pytest.raises(UserError, match="runs there: one, two"):
        Report(tmp_path / "scale", ["three"]).follow()


def test_watch_answers_only_here_and_only_what_is_new(tmp_path):
    folder = write_run(tmp_path / "one")
    server = open_server(tmp_path, [], 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        assert server.address.startswith("http://127.0.0.1:")

        def ask(path: str, **headers: str) -> tuple[int, bytes]:
            request = urllib.request.Request(server.address + path, headers=headers)
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()

        assert b'data-live="yes"' in ask("")[1]
        first = json.loads(ask("data.json")[1])
        assert ask(f"data.json?known={first['version']}")[0] == 204
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(train_row(41, 9.0)) + "\n")
        status, body = ask(f"data.json?known={first['version']}")
        assert (status, json.loads(body)["runs"][0]["done"]) == (200, 41)
        for path, headers, code in (("", {"Host": "evil.example"}, 403), ("../etc/passwd", {}, 404)):
            with pytest.raises(urllib.error.HTTPError) as refused:
                ask(path, **headers)
            assert refused.value.code == code
        with pytest.raises(UserError, match="PORT=0"):
            open_server(tmp_path, [], server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_curves_for_a_paper(tmp_path):
    write_run(tmp_path / "one")
    write_run(tmp_path / "two", steps=20)
    write_run(tmp_path / "three", stage="stage2_pretrain")
    curves = read_curves(tmp_path)
    draw(curves, tmp_path / "curves.png", tmp_path / "curves.svg")
    svg = (tmp_path / "curves.svg").read_text()
    assert "<text" in svg
    assert all(f">{name}, validation<" in svg for name in ("one", "two", "three"))
    write_csv(curves, tmp_path / "curves.csv")
    with (tmp_path / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 41 + 21 + 41
    last = next(r for r in rows if r["run"] == "one" and r["step"] == "40")
    assert {k: float(v) for k, v in last.items() if k not in ("run", "stage")} == {
        "step": 40, "audio_h": 0.4, "loss": 2.0, "val_loss": 2.0, "listening": 0.5, "listening_se": 0.1,
        "text_only": 2.5,
    }  # fmt: skip
    draw(curves, tmp_path / "curves.png", tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").read_text() == svg  # the same curves are the same file
