"""The three stages for real on real speech (`make test` prepares it): few steps, the sizes and files of SCALE=mini."""

import json
from pathlib import Path

import pytest
import torch

from midasheng import config
from midasheng.train.fit import fit
from midasheng.train.meter import read_metrics
from midasheng.train.order import Order

ROOT = Path(__file__).parent.parent
SHORT = ["log.val_every=1000", "log.progress=false", "data.val_clips=48", "hardware.workers=0", "run.warmup=5 steps"]


def run(stage: str, runs: Path, steps: int, *settings: str) -> list[float]:
    """Train a stage at mini; returns its validation losses, from step 0."""
    loaded = config.load(
        ROOT / f"configs/{stage}.yaml", "mini", [*SHORT, f"run.length={steps} steps", *settings], ROOT / "configs"
    )
    order = Order(loaded, runs, "mini", stage, "", False)
    fit(order)
    return [r["val_loss"] for r in read_metrics(order.folder / "metrics.jsonl") if "val_loss" in r]


def test_three_stages_on_real_speech(tmp_path, monkeypatch):
    """Each stage learns in a few steps from what the one before handed over."""
    monkeypatch.chdir(ROOT)  # paths in configs are relative to the checkout, as under make
    torch.set_num_threads(2)
    assert (ROOT / "data/mini/prepared.json").is_file(), "no data/mini yet; `make test` prepares it"
    falls = {}
    run("text_decoder", tmp_path, 60, "batch.clips_per_step=24")
    decoder = f"weights.decoder={tmp_path / 'mini/text_decoder'}"
    for stage, steps in (("stage1_align", 40), ("stage2_pretrain", 30), ("stage3_sft", 30)):
        losses = run(stage, tmp_path, steps, decoder)
        falls[stage] = 1 - losses[-1] / losses[0]
    # two seeds of a whole stage end 0.003 apart (LOG.md); a stage that does not learn does not fall at all
    assert falls["stage1_align"] > 0.1, falls
    assert min(falls.values()) > 0.01, falls
    told = json.loads((tmp_path / "mini/stage3_sft/weights/stage.json").read_text())
    assert told["parents"][0]["stage"] == "stage2_pretrain"


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
