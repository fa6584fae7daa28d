"""What is wrong is found before step 0, by the code of the start; what a machine cannot tell is not called right."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from midasheng.model.audio_lm import AudioLM
from midasheng.train import checkpoint
from midasheng.train.preflight import RIGHT, UNKNOWN, WRONG, Preflight, preflight
from stages import preflight as verb
from tests.conftest import Tiny, order_for, run_stage

ALL = ["kernels", "weights", "data", "tokenizer", "what learns", "plan", "run folder", "disk", "largest pack"]


def states(found: Preflight) -> dict[str, str]:
    return {what: state for what, state, _ in found.items}


def said(found: Preflight, what: str) -> str:
    return next(text for name, _, text in found.items if name == what)


def test_a_stage_that_can_start_is_right_and_nothing_is_written(tiny, tmp_path):
    order = order_for("stage1_align", tiny, tmp_path)
    found = preflight(order)
    assert states(found) == dict.fromkeys(ALL, RIGHT)
    assert not order.folder.exists()
    assert "worst pack, which was run once" in said(found, "largest pack")
    assert "4 steps (1 of warm-up), 2 packs a step" in said(found, "plan")
    assert found.text().endswith("nothing wrong")
    assert len(found.text().splitlines()) <= 40  # one screen


def test_the_start_runs_the_largest_pack_before_anything_is_written(tiny, tmp_path, monkeypatch):
    """Also where nobody said how much memory there is: what fails in it would fail in some later step."""
    forward = AudioLM.forward

    def fails(self, pack):
        if pack.keys and pack.keys[0].startswith("tried"):
            raise RuntimeError("out of memory, as an allocator says it")
        return forward(self, pack)

    monkeypatch.setattr(AudioLM, "forward", fails)
    with pytest.raises(Exception, match="out of memory"):
        run_stage("stage1_align", tiny, tmp_path)
    assert not (tmp_path / "mini/stage1_align").exists()


def test_what_is_not_on_this_machine_is_not_called_right(tiny, tmp_path):
    """Weights of a stage that is yet to run, a mix that lies elsewhere, more processes: the rest is checked."""
    found = preflight(order_for("stage2_pretrain", tiny, tmp_path, hardware__devices=4))
    unknown = {"weights", "run folder", "largest pack", "ranks alike"}
    assert {what for what, state in states(found).items() if state == UNKNOWN} == unknown
    assert found.wrong == 0
    assert "LoRA q_proj" in said(found, "what learns")
    empty = tmp_path / "nothing"
    empty.mkdir()
    found = preflight(order_for("stage1_align", tiny, tmp_path, data__root=empty))
    assert states(found)["data"] == states(found)["plan"] == UNKNOWN
    assert f"below data.root {empty}" in said(found, "data")
    assert "nothing wrong; not checked here: data, plan, run folder, largest pack" in found.text()


@pytest.mark.parametrize("auto", [False, True])
def test_the_largest_pack_of_ranks_that_share_is_tried_as_one_of_them(tiny, tmp_path, auto):
    """Without weights, as the first among imagined ones, of whatever number, one stage after the other."""
    more = {"hardware__strategy": "fsdp", "hardware__memory_gib": 0.03}
    more |= {"batch__kind": "throughput", "batch__pack_slots": "auto"} if auto else {}
    for devices in (2, 80):
        found = preflight(order_for("stage2_pretrain", tiny, tmp_path, hardware__devices=devices, **more))
        assert states(found)["largest pack"] == RIGHT, said(found, "largest pack")
        assert "worst pack, which was run once" in said(found, "largest pack")
        assert f"rank 0 of {devices} that share the model; the others are imagined" in said(found, "largest pack")
        assert not torch.distributed.is_initialized()
    more["hardware__memory_gib"] = 0.002
    found = preflight(order_for("stage2_pretrain", tiny, tmp_path, hardware__devices=2, **more))
    assert states(found)["largest pack"] == WRONG
    assert "GiB of memory, allowed are 0.0018" in said(found, "largest pack")
    assert not torch.distributed.is_initialized()
    assert found.wrong == 1


def test_what_learns_without_weights_is_what_learns_with_them(tiny, tmp_path):
    run_stage("stage1_align", tiny, tmp_path)
    without, with_ = (preflight(order_for("stage2_pretrain", tiny, runs)) for runs in (tmp_path / "no", tmp_path))
    assert states(without)["weights"] == UNKNOWN
    assert states(with_)["weights"] == RIGHT
    assert said(without, "what learns") == said(with_, "what learns")
    assert said(without, "disk").split(";")[0] == said(with_, "disk").split(";")[0]


def test_rows_of_added_tokens_learn_also_where_there_are_no_weights_yet(tiny, tmp_path):
    """A table for more tokens than the config names, and its new rows among what learns."""
    more = {"tokenizer__audio_bos": "<|hm|>", "tokenizer__add": "['<|hm|>']", "model__decoder__fields__vocab_size": 64}
    found = preflight(order_for("stage2_pretrain", tiny, tmp_path, **more))
    assert (states(found)["weights"], states(found)["what learns"]) == (UNKNOWN, RIGHT)
    assert "rows of 1 added tokens" in said(found, "what learns")


@pytest.mark.parametrize(
    ("more", "what", "text"),
    [
        ({"train": "[audio_encoders.*]"}, "what learns", "audio_encoders"),
        ({"run__warmup": "9 steps"}, "plan", "run.warmup"),
        ({"hardware__memory_gib": 0.001}, "largest pack", "allowed are"),
        ({"data__max_audio_s": 0.1}, "data", "no record can be trained on"),
    ],
)
def test_what_would_stop_the_start_is_wrong(tiny, tmp_path, more, what, text):
    found = preflight(order_for("stage1_align", tiny, tmp_path, **more))
    assert states(found)[what] == WRONG
    assert text in said(found, what)
    assert "1 WRONG" in found.text()


def test_a_full_disk_and_a_run_with_other_settings_are_wrong(tiny, tmp_path, monkeypatch):
    run_stage("stage1_align", tiny, tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    shutil.rmtree(tmp_path / "mini/stage1_align/weights")
    shutil.rmtree(tmp_path / "mini/stage1_align/checkpoints")
    found = preflight(order_for("stage1_align", tiny, tmp_path, optim__lr=0.5))
    assert {what for what, state in states(found).items() if state == WRONG} == {"disk", "run folder"}


def test_a_sample_in_quarantine_that_is_none_is_wrong(tiny, tmp_path):
    (tmp_path / "mini/stage1_align").mkdir(parents=True)
    (tmp_path / "mini/stage1_align/quarantine.txt").write_text("tiny_caption/nobody\n")
    assert states(preflight(order_for("stage1_align", tiny, tmp_path)))["quarantine"] == WRONG


def test_the_verb_says_all_three_stages_and_its_status(tiny: Tiny, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["preflight", "--runs", str(tmp_path), *tiny.settings()])
    assert verb.main() == 0
    out = capsys.readouterr().out
    assert out.count("nothing wrong") == 3
    monkeypatch.setattr(sys, "argv", [*sys.argv, "run.warmup=9 steps"])
    assert verb.main() == 1
    assert capsys.readouterr().out.count("1 WRONG") == 3
