"""The picture and the table of all runs of a scale."""

import json

import pytest

from midasheng.config import UserError
from midasheng.train.curves import draw, read_curves, table


def write_run(folder, stage, rows):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f'name: "{stage}"\n')
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_table_and_picture(tmp_path):
    rows = [
        {"step": 0, "val_loss": 4.0},
        {"step": 5, "loss": 3.0},
        {"step": 10, "loss": 2.5},
        {"step": 10, "val_loss": 3.0},
    ]
    write_run(tmp_path / "two", "stage2_pretrain", rows)
    write_run(tmp_path / "one", "stage1_align", rows[:2])
    write_run(tmp_path / "qkvo", "stage2_pretrain", rows)
    curves = read_curves(tmp_path)
    assert [c.name for c in curves] == ["one", "qkvo", "two"]
    text = table(curves)
    assert "25.0%" in text.splitlines()[2]
    draw(curves, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_nothing_to_draw(tmp_path):
    with pytest.raises(UserError, match="make stage1"):
        read_curves(tmp_path)
