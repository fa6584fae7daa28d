"""The report page in a real headless Chromium: every chart, axis and run, a clip that plays, a run that is followed."""

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from midasheng.config import load
from midasheng.train import watch
from midasheng.train.report import Report
from tests.conftest import CONFIGS
from tests.train.test_report import EVIL, speed_row, train_row, val_row, write_rows, write_run

pytestmark = pytest.mark.browser
PATIENCE_MS = int(os.environ.get("PATIENCE_MS", "200000"))  # of a machine that does much else


@pytest.fixture(scope="module")
def chromium() -> Iterator[object]:
    """A browser; without one the tests are skipped."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not path:
        pytest.skip("no chromium (apt-get install chromium, or CHROMIUM=path)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # a container's root has no sandbox of its own; the pages are ours
        args = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        browser = driver.chromium.launch(executable_path=path, args=args)
        yield browser
        browser.close()


class Opened:
    """A page and everything that it complained of."""

    def __init__(self, browser, width: int = 1600, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.page.set_default_navigation_timeout(PATIENCE_MS)
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda e: self.complaints.append(str(e)))
        self.page.on("dialog", lambda d: (self.complaints.append(f"dialog {d.message}"), d.dismiss()))
        self.page.on("request", lambda r: self.asked.append(r.url))

    def open(self, url: str):
        self.page.goto(url)
        self.page.wait_for_selector("html[data-ready=yes]", state="attached")
        return self.page


@pytest.fixture
def opened(chromium) -> Iterator[Opened]:
    found = Opened(chromium)
    yield found
    found.context.close()


@pytest.fixture(scope="module")
def runs(tiny_data, tmp_path_factory) -> Path:
    """Two stages; the second has answered about clips of the tiny corpus, and its words are hostile."""
    folder = tmp_path_factory.mktemp("runs") / "mini"
    write_run(folder / "one")
    two = write_run(folder / "two", stage="stage3_sft")
    settings = tiny_data.settings(data__answers=4)
    loaded = load(CONFIGS / "stage3_sft.yaml", "mini", settings, CONFIGS)
    (two / "config.yaml").write_text(loaded.yaml())
    from midasheng.data.room import open_data

    corpus = open_data(loaded.stage, make=True).corpora[0]
    rows = [
        {
            "step": step, "id": record.key, "mix": loaded.stage.data.mix, "corpus": corpus.card.name, "key": record.key,
            "prompt": EVIL, "references": ["yes"], "output": EVIL, "text_only": "no", "choices": ["no", "yes"],
        }
        for step in (20, 40)
        for record in corpus.held_out[:3]
    ]  # fmt: skip
    write_rows(two / "answers.jsonl", rows)
    return folder


def until(page, what: str) -> None:
    """Wait until a JavaScript expression is true. (Playwright's own wait is an eval, which the page's policy forbids.)"""
    end = time.monotonic() + PATIENCE_MS / 1000
    while not page.evaluate(what):
        assert time.monotonic() < end, f"never true: {what}"
        time.sleep(0.1)


def written(folder: Path, to: Path) -> str:
    report = Report(folder)
    report.follow()
    to.write_text(report.page(), encoding="utf-8")
    return to.as_uri()


CHARTS = "figure[data-chart]"
DRAWN = "figure[data-chart][data-drawn=yes]"


@pytest.mark.parametrize(("width", "scheme"), [(1600, "light"), (360, "dark")])
def test_every_chart_is_drawn_and_nothing_overflows(chromium, runs, tmp_path, width, scheme):
    opened = Opened(chromium, width, scheme)
    page = opened.open(written(runs, tmp_path / "report.html"))
    charts = page.locator(CHARTS).evaluate_all("found => found.map(f => f.dataset.chart)")
    expected = {"loss:stage1_align", "loss:stage3_sft", "listening:stage1_align", "listening:stage3_sft"}
    expected |= {f"{kind}:{what}" for kind in ("corpus", "language") for what in ("val", "listening")}
    expected |= {"corpus:train", "language:train", "lr", "grad_norm", "audio_h_per_device_h", "mfu", "encoder_padding"}
    expected |= {"decoder_padding", "waiting", "memory_gib"}
    assert expected <= set(charts)
    assert page.locator(DRAWN).count() == len(charts)
    page.locator("#marks").select_option("none")  # axes are grey; what has a colour now is a curve
    inked = page.evaluate("""() => [...document.querySelectorAll("figure canvas")].every(c => {
        const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
        let n = 0;
        for (let i = 0; i < d.length; i += 4) if (d[i + 3] > 200 && Math.max(d[i], d[i + 1], d[i + 2]) - Math.min(d[i], d[i + 1], d[i + 2]) > 60) n++;
        return n > 30;
    })""")
    assert inked
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    overlaps = page.evaluate("""() => {
        const boxes = [...document.querySelectorAll("figure, figure *:not(canvas):not(.u-wrap *):not(option)")].filter(e => e.parentElement.closest("figure") || e.tagName === "FIGURE");
        return boxes.filter(e => e.tagName !== "FIGURE" && !e.closest(".scroll") && e.getBoundingClientRect().right > e.closest("figure").getBoundingClientRect().right + 1).length;
    }""")
    assert overlaps == 0
    assert opened.complaints == []
    assert [u for u in opened.asked if not u.startswith(("file:", "data:", "blob:"))] == []
    opened.context.close()


def test_axis_runs_and_curves_are_switched_by_the_keyboard(opened, runs, tmp_path):
    page = opened.open(written(runs, tmp_path / "report.html"))
    loss = page.locator('[data-chart="loss:stage1_align"] .plot')

    def right_end() -> float:
        loss.focus()
        page.keyboard.press("Escape")
        for _ in range(2):
            page.keyboard.press("Shift+ArrowRight")
        return page.locator('[data-chart="loss:stage1_align"] output').inner_text()

    assert right_end().startswith("steps ")
    page.locator("input[value=step]").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("input[value=audio_h]").is_checked()
    assert right_end().startswith("audio hours 0.")
    page.locator('#runs input[value="one"]').press("Space")
    assert page.locator('[data-chart="loss:stage1_align"]').count() == 0
    assert page.locator('[data-chart="loss:stage3_sft"]').count() == 1
    page.locator('#runs input[value="one"]').press("Space")
    page.locator("#detail").select_option("one")
    assert page.locator('[data-chart="corpus:val"] figcaption').inner_text().startswith("one: validation loss")
    button = page.locator('[data-chart="loss:stage1_align"] .legend button').first
    button.press("Enter")
    assert button.get_attribute("aria-pressed") == "false"
    table = page.locator('[data-chart="loss:stage1_align"] details')
    table.locator("summary").press("Enter")
    table.locator("td", has_text="2.5").first.wait_for()
    assert opened.complaints == []


def test_markup_shows_as_text_and_a_clip_plays(opened, runs, tmp_path):
    page = opened.open(written(runs, tmp_path / "report.html"))
    page.locator("#detail").select_option("two")
    answer = page.locator("article.answer").first
    assert answer.locator("dd").first.inner_text() == EVIL
    assert page.locator("img").count() == 0
    page.evaluate("document.querySelector('audio').play()")
    until(page, "document.querySelector('audio').currentTime > 0.02")
    assert page.evaluate("document.querySelector('audio').duration") > 0.2
    assert opened.complaints == []


def test_a_running_stage_is_followed_without_losing_what_was_chosen(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "POLL_S", 0.3)
    folder = write_run(tmp_path / "mini/one")
    server = watch.open_server(tmp_path / "mini", [], 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        page = opened.open(server.address)
        page.locator("input[value=targets]").check()
        page.locator("#lines").select_option("raw")
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(train_row(41, 2.0)) + "\n" + json.dumps(val_row(41, 1.25)) + "\n")
        page.locator("#overview-text td", has_text="4 → 1.25").wait_for()
        until(
            page,
            """document.querySelector('[data-chart="loss:stage1_align"] .plot').getAttribute("aria-label").includes("to 1.25")""",
        )
        assert page.locator("input[value=targets]").is_checked()
        assert page.locator("#lines").input_value() == "raw"
        write_run(tmp_path / "mini/later", stage="stage2_pretrain")
        page.locator('[data-chart="loss:stage2_pretrain"]').wait_for()
        assert opened.complaints == []
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_two_hundred_thousand_rows_open_in_time(opened, tmp_path):
    """What the page itself computes until every chart is drawn, on the browser's clock of its own thread."""
    folder = write_run(tmp_path / "mini/one")
    losses = np.random.default_rng(0).normal(2, 0.1, 200_000).tolist()
    with (folder / "metrics.jsonl").open("w") as file:
        for step, loss in enumerate(losses, 1):
            corpora = {c: {"loss_sum": 10 * loss, "targets": 10} for c in "abcdef"}
            file.write(json.dumps(train_row(step, loss) | {"corpora": corpora}) + "\n")
            if step % 2_000 == 0:
                file.write(json.dumps(val_row(step, loss)) + "\n")
    write_rows(folder / "speed.jsonl", [speed_row(s) for s in range(1, 200_001, 4)])
    url = written(tmp_path / "mini", tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 15e6
    session = opened.context.new_cdp_session(opened.page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    page = opened.open(url)
    metrics = {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}
    wall = page.evaluate("performance.now()") / 1000
    print(f"opened: {metrics['TaskDuration']:.2f} s of the page's thread, {wall:.2f} s on the wall")
    assert page.locator(DRAWN).count() == page.locator(CHARTS).count() > 10
    assert metrics["TaskDuration"] < 3
    assert opened.complaints == []
