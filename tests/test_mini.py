"""The three stages for real, on recordings and on generated sounds, with the sizes and files of mini: in short in
`make test`, which prepares the data; whole, until the model listens, as the slow test."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from midasheng import config
from midasheng.train.fit import fit
from midasheng.train.listening import Paired
from midasheng.train.meter import read_metrics
from midasheng.train.order import Order

ROOT = Path(__file__).parent.parent
SHORT = ["log.val_every=1000", "data.val_clips=16", "run.warmup=5 steps"]
STAGES = ("stage1_align", "stage2_pretrain", "stage3_sft")


def run(stage: str, scale: str, runs: Path, *settings: str) -> list[dict]:
    """Train a stage; returns its validation rows, from step 0."""
    settings = ("log.progress=false", "hardware.workers=0", *settings)
    loaded = config.load(ROOT / f"configs/{stage}.yaml", scale, list(settings), ROOT / "configs")
    order = Order(loaded, runs, scale, stage, "", False)
    fit(order)
    return [r for r in read_metrics(order.folder / "metrics.jsonl") if "val_loss" in r]


def needs_data(scale: str) -> None:
    """Recordings need apt-get; what `make test` could prepare must be there."""
    if scale == "mini" and shutil.which("apt-get") is None:
        pytest.skip("recordings come as Debian packages, and there is no apt-get")
    assert (ROOT / "data" / scale / "prepared.json").is_file(), f"no data/{scale} yet; `make test` prepares it"


# once is enough for `make test`
ONCE = pytest.param("generated", marks=[pytest.mark.slow] if shutil.which("apt-get") else [])


@pytest.mark.parametrize("scale", ["mini", ONCE])
def test_three_stages_on_real_data_in_short(tmp_path, monkeypatch, scale):
    """Each stage learns in a few steps from what the one before handed over, and says whether it listens."""
    needs_data(scale)
    monkeypatch.chdir(ROOT)  # paths in configs are relative to the checkout, as under make
    torch.set_num_threads(2)
    falls = {}
    run("text_decoder", scale, tmp_path, *SHORT, "run.length=60 steps", "batch.clips_per_step=24")
    decoder = f"weights.decoder={tmp_path / scale / 'text_decoder'}"
    for stage, steps in zip(STAGES, (40, 30, 30), strict=True):
        rows = run(stage, scale, tmp_path, *SHORT, decoder, f"run.length={steps} steps", "data.answers=2")
        falls[stage] = 1 - rows[-1]["val_loss"] / rows[0]["val_loss"]
        assert {"listening", "alike", "text_only"} <= rows[-1].keys()
    # two seeds of a whole stage end 0.003 apart (LOG.md); a stage that does not learn does not fall at all
    assert falls["stage1_align"] > 0.05, falls
    assert min(falls.values()) > 0.01, falls
    told = json.loads((tmp_path / scale / "stage3_sft/weights/stage.json").read_text())
    assert told["parents"][0]["stage"] == "stage2_pretrain"
    assert (tmp_path / scale / "stage3_sft/answers.jsonl").read_text()


@pytest.mark.slow
def test_the_mini_model_listens(tmp_path, monkeypatch):
    """The whole of `make stages`: every stage uses its audio and beats the decoder alone; answers are right."""
    scale = "mini"
    needs_data(scale)
    monkeypatch.chdir(ROOT)
    torch.set_num_threads(2)
    run("text_decoder", scale, tmp_path)
    decoder = f"weights.decoder={tmp_path / scale / 'text_decoder'}"
    for stage in STAGES:
        last = run(stage, scale, tmp_path, decoder)[-1]
        for kind in ("listening", "text_only"):
            assert Paired(**last[kind]).sure, (stage, kind, last[kind])
    answers = [json.loads(line) for line in (tmp_path / scale / "stage3_sft/answers.jsonl").read_text().splitlines()]
    for word in ("Italian", "violin"):
        asked = [a for a in answers if a["mix"] == "sft" and word in a["choices"]]
        right = sum(a["output"] in a["references"] for a in asked) / len(asked)
        alone = sum(a.get("text_only") in a["references"] for a in asked) / len(asked)
        assert len(asked) >= 40
        assert right > 0.7 > 2 * alone, (word, right, alone)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_files_that_the_documents_name_are_there(name):
    """A README command that points at a missing file is a silent failure of the field."""
    import re

    text = (ROOT / name).read_text()
    named = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r"CONFIG=([a-z0-9_/.]+\.yaml)", text)
    named += [m for m in re.findall(r"`([a-z_]+(?:/[a-z0-9_.]+)*/?)`", text) if m.endswith((".py", ".md", ".yaml"))]
    assert named
    for path in named:
        found = (ROOT / path).exists() or (ROOT / "midasheng" / path).exists() or path in RUN_FILES
        assert found, f"{name} names {path}, which is not there"


RUN_FILES = {"config.yaml"}


def test_make_help_tells_every_verb():
    """Each .PHONY target of the Makefile has its line in `make help`."""
    import subprocess

    text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    makefile = (ROOT / "Makefile").read_text()
    verbs = next(line for line in makefile.splitlines() if line.startswith(".PHONY:")).split()[1:]
    assert {"setup", "data", "stage1", "stage2", "stage3", "stages", "curves", "keys", "test", "lint", "help"} <= set(
        verbs
    )
    for verb in verbs:
        assert f"make {verb} " in text


def test_the_table_of_silent_failures_names_tests_that_exist():
    rows = [line for line in (ROOT / "tests/silent_failures.md").read_text().splitlines() if "::" in line]
    assert len(rows) > 50
    for row in rows:
        path, name = row.split("|")[2].strip().split("::")
        assert f"def {name}(" in (ROOT / path).read_text(), row
