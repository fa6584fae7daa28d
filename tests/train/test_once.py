"""The weights of ranks that share a model: built once a node, and on every rank those that were built; nodes.py."""

import fcntl
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from midasheng.config import UserError
from midasheng.model.adapt import EMBEDDING, HEAD
from midasheng.model.audio_lm import AudioLM
from midasheng.train import once
from midasheng.train.fit import build, open_starts, skeleton
from midasheng.train.world import World
from tests.conftest import order_for
from tests.train.test_kills import KILLED

ROOT = Path(__file__).parent.parent.parent
NORM, BIAS = "audio_encoder.norm.weight", "audio_encoder.norm.bias"
LORA = {"train": "[audio_encoder.*,audio_projector.*]", "lora__targets": "[q_proj,v_proj]"}
APART = {"model__decoder__fields__tie_word_embeddings": "false"}


class Made(NamedTuple):
    """A model with memory, and how to make the same one without."""

    built: AudioLM
    blank: Callable[[], AudioLM]


def made(tiny, tmp_path, stage: str = "stage1_align", **more: object) -> Made:
    order = order_for(stage, tiny, tmp_path, **more)
    return Made(build(order, open_starts(order))[0], lambda: skeleton(order.stage, range(0))[0])


@pytest.fixture(scope="module")
def aligned(tiny, tmp_path_factory) -> Made:
    """That of stage 1, which nobody changes."""
    return made(tiny, tmp_path_factory.mktemp("aligned"))


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch) -> Path:
    """An empty TMPDIR."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def same(one: AudioLM, other: AudioLM) -> None:
    """Bit for bit, buffers that no state dict holds too."""
    assert once.described(one) == once.described(other)
    a, b = once.named(one), once.named(other)
    assert all(torch.equal(t, b[n]) for n, t in a.items())
    assert [n for n in a if n not in one.state_dict()], "the decoder's rotary tables are in no state dict"


@pytest.mark.parametrize(
    ("stage", "more"),
    [("stage1_align", {}), ("stage1_align", LORA | {"run__precision": "bf16"}), ("text_decoder", APART)],
)
def test_what_is_mapped_is_what_was_built(tiny, tmp_path, temporary, stage, more):
    found = made(tiny, tmp_path, stage, **more)
    blank = found.blank()
    assert all(p.is_meta for p in blank.parameters())
    found.built.audio_encoder.init_bn.running_mean.fill_(-40.0)  # as a loaded encoder brings it
    assert once.fill(blank, lambda: (found.built, "said"), World()) == "said"
    same(blank, found.built)
    tied = blank.decoder.lm_head.weight is blank.decoder.model.embed_tokens.weight
    assert tied == (more != APART)
    assert not list(temporary.iterdir())


def test_processes_have_the_file_in_common_and_what_they_write_alone(aligned, temporary):
    """init_bn is calibrated by each rank for itself, before the model is shared."""
    found, path = aligned, temporary / "file"
    once._written(path, lambda: (found.built, ""))
    one, other = found.blank(), found.blank()
    for model in (one, other):
        once.take(model, path)
    path.unlink()
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert {line.split()[1] for line in maps if str(path) in line} == {"rw-p"}  # nobody's own until it is written to
    one.audio_encoder.init_bn.running_mean.fill_(7.0)
    with torch.no_grad():
        one.get_parameter(NORM).fill_(7.0)
    same(other, found.built)
    del one, other, model
    assert str(path) not in Path("/proc/self/maps").read_text()


def left_blank(told: dict) -> None:
    told["tensors"][NORM] = told["tensors"][NORM].to("meta")


def of_another_dtype(told: dict) -> None:
    told["tensors"][NORM] = told["tensors"][NORM].bfloat16()


def of_another_shape(told: dict) -> None:
    told["tensors"][NORM] = told["tensors"][NORM][:1]


def built_in_another_dtype(told: dict) -> None:
    same, parameter, learns, _, shape = told["about"][NORM]
    told["about"][NORM] = (same, parameter, learns, "torch.bfloat16", shape)
    of_another_dtype(told)


def frozen(told: dict) -> None:
    same, parameter, _, *rest = told["about"][NORM]
    told["about"][NORM] = (same, parameter, False, *rest)


def untied(told: dict) -> None:
    told["about"][HEAD] = (HEAD, *told["about"][HEAD][1:])
    told["tensors"][HEAD] = told["tensors"][EMBEDDING].clone()


def missing(told: dict) -> None:
    del told["about"][NORM], told["tensors"][NORM]


def surplus(told: dict) -> None:
    told["about"]["audio_encoder.norm.scale"] = ("audio_encoder.norm.scale", *told["about"][NORM][1:])
    told["tensors"]["audio_encoder.norm.scale"] = told["tensors"][NORM]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (left_blank, f"1 tensors have no memory, the first {NORM}"),
        (of_another_dtype, f"{NORM} is .*float32.* where it was built, .*bfloat16.* here"),
        (of_another_shape, rf"{NORM} is .*\(32,\).* where it was built, .*\(1,\).* here"),
        (built_in_another_dtype, f"{NORM} is .*bfloat16.* where it was built, .*float32.* here"),
        (frozen, f"{NORM} is .*True, False.* where it was built, .*True, True.* here"),
        (untied, f"{HEAD} is .*{HEAD}.* where it was built, .*{EMBEDDING}.* here"),
        (missing, f"{NORM} is None where it was built"),
        (surplus, "audio_encoder.norm.scale is .* where it was built, None here"),
    ],
)  # fmt: skip
def test_another_model_is_refused_by_the_tensor(aligned, temporary, change, words):
    """Not one number of it may come from nowhere."""
    found, path = aligned, temporary / "file"
    once._written(path, lambda: (found.built, ""))
    told = torch.load(path)
    change(told)
    torch.save(told, path)
    with pytest.raises(AssertionError, match=words):
        once.take(found.blank(), path)


def test_a_folder_without_room_is_named_before_anything_is_built(aligned, temporary, monkeypatch):
    found, usage = aligned, once.shutil.disk_usage(temporary)
    monkeypatch.setattr(once.shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    least = sum(p.nbytes for p in found.built.parameters())
    with pytest.raises(UserError) as error:
        once.fill(found.blank(), lambda: pytest.fail("it was built"), World())
    need, free = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) (?:bytes|are free)", str(error.value)))
    assert least < need < 2 * least + 10**6
    assert free == 1000
    assert str(error.value).startswith(f"{temporary}: ")
    assert "set TMPDIR to" in str(error.value)
    monkeypatch.setenv("TMPDIR", str(temporary / "none"))  # tempfile would take another one without a word
    with pytest.raises(UserError, match=f"TMPDIR is {temporary / 'none'}, which is no folder"):
        once.fill(found.blank(), lambda: pytest.fail("it was built"), World())


def test_what_a_killed_process_left_is_removed_and_what_is_in_use_is_not(temporary):
    left, used, other = (temporary / name for name in (f"{once.PREFIX}left", f"{once.PREFIX}used", "other"))
    for path in (left, used, other):
        path.write_bytes(b"")
    with used.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with once._temporary() as own:
            once._forget(temporary)
            assert set(temporary.iterdir()) == {own, used, other}


def test_a_file_that_is_not_there_for_all_is_told(aligned, temporary):
    with pytest.raises(UserError, match=r"No such file or directory: the first process of this node has put .* TMPDIR"):
        once.take(aligned.blank(), temporary / "elsewhere")


# -- two nodes of two ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    """What nodes.py makes, with rows.jsonl."""
    folder = tmp_path_factory.mktemp("nodes")
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.nodes", str(folder), str(tiny.root)],
        cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr
    (folder / "rows.jsonl").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def rows(folder) -> dict[str, dict]:
    """Of each case: exit codes, what the ranks printed, what is left of their files."""
    return {row["case"]: row for row in map(json.loads, (folder / "rows.jsonl").read_text().splitlines())}


def test_each_node_builds_once_and_behind_the_cut_nothing_is_mapped(rows, folder):
    row = rows["ends"]
    assert row["codes"] == [0] * 4, row["log"][-3000:]
    saw = [json.loads((folder / f"rank{n}.json").read_text()) for n in range(4)]
    assert [s["built"] for s in saw] == [1, 0, 1, 0]
    assert all(s["mapped"] > 0 and s["mapped_behind"] == 0 for s in saw)
    assert row["left"] == []
    assert row["log"].count("what learns") == 1


def test_every_rank_shares_what_one_process_would_build(rows, folder, tiny, tmp_path):
    order = order_for("stage1_align", tiny, tmp_path)
    built = once.named(build(order, open_starts(order))[0])
    ranks = [torch.load(folder / f"rank{n}.pt") for n in range(4)]
    heard = {"audio_encoder.init_bn." + name for name in ("running_mean", "running_var", "num_batches_tracked")}
    for found in ranks:
        assert found.keys() == built.keys()
        assert all(torch.equal(t, found[n]) for n, t in built.items() if n not in heard)
        assert all(torch.equal(ranks[0][n], found[n]) and not torch.equal(built[n], found[n]) for n in heard)


@pytest.mark.parametrize(
    ("case", "codes", "words"),
    [
        ("wrong weights", [1, 1, 2, 1], "error: rank 2 (.*): start: these weights are not those"),
        ("full disk", [1, 1, 2, 1], f"error: rank 2 .*{once.PREFIX}.*: File too large: .*; make room, or set TMPDIR"),
        ("killed while it writes", [1, 1, KILLED, 1], "error: rank 2 .*: lost: silent for"),
        ("killed before it reads", [1, 1, 1, KILLED], "error: rank 3 .*: lost: silent for"),
    ],
)  # fmt: skip
def test_who_fails_on_the_way_ends_all_in_its_own_words(rows, case, codes, words):
    row = rows[case]
    assert row["codes"] == codes
    assert len(re.findall(words, row["log"])) == row["log"].count("error: ") == 1


def test_no_file_is_left(rows):
    """But by a kill; the next start, which ends badly too, has removed it."""
    left = {case: row["left"] for case, row in rows.items()}
    assert len(left.pop("killed while it writes")) == 1
    assert set(map(tuple, left.values())) == {()}
