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
    heard, unheard = ({"difference": d, "se": 0.1, "samples": 9} for d in (0.5, 0.2))
    rows = [
        {"step": 0, "val_loss": 4.0, "listening": None},
        {"step": 5, "loss": 3.0},
        {"step": 10, "loss": 2.5},
        {"step": 10, "val_loss": 3.0, "listening": heard, "text_only": {"difference": 0.25, "se": 0.1, "samples": 9}},
    ]
    write_run(tmp_path / "two", "stage2_pretrain", rows)
    write_run(tmp_path / "one", "stage1_align", rows[:2])
    write_run(tmp_path / "qkvo", "stage2_pretrain", [*rows[:3], rows[3] | {"listening": unheard}])
    (tmp_path / "two/weights").mkdir()
    (tmp_path / "two/weights/stage.json").write_text('{"seconds": 90.2}')
    curves = read_curves(tmp_path)
    assert [c.name for c in curves] == ["one", "qkvo", "two"]
    assert [c.fall for c in curves] == [0, 0.25, 0.25]
    _, one, qkvo, two = table(curves).splitlines()
    assert "unfinished" in one
    assert "4.000 -> 3.000" in two
    assert "3.250" in two
    assert "+0.500 +- 0.100" in two
    assert "1 min 30 s" in two
    assert "DEAF" not in two
    assert "+0.200 +- 0.100 DEAF" in qkvo
    draw(curves, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_nothing_to_draw(tmp_path):
    with pytest.raises(UserError, match="make stage1"):
        read_curves(tmp_path)
