"""The three stages in a row on the tiny corpus."""

import json

from tests.conftest import run_stage


def test_three_stages_hand_over(tiny, tmp_path):
    for stage in ("stage1_align", "stage2_pretrain", "stage3_sft"):
        folder = run_stage(stage, tiny, tmp_path)
        record = json.loads((folder / "weights" / "stage.json").read_text())
        assert record["stage"] == stage
