"""The same run on any number of processes, under DDP and FSDP2: gradients, losses, resumes, what is written."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from midasheng.model import weights
from midasheng.model.adapt import base_state
from midasheng.train import checkpoint
from midasheng.train.fit import build, fit, open_starts
from midasheng.train.meter import read_metrics
from tests.conftest import Tiny, order_for
from tests.train.ranks import watched

ROOT = Path(__file__).parent.parent.parent
STAGES = ("stage1_align", "stage2_pretrain", "stage3_sft")
FROM = {"stage2_pretrain": "stage1_align-ref", "stage3_sft": "stage2_pretrain-ref"}
KINDS = ("ddp", "fsdp")
SHARDED = {"hardware__strategy": "fsdp"}
COMMON = {
    "batch__packs_per_step": 4, "batch__clips_per_step": 12, "optim__name": "adamw", "log__val_every": 1000,
    "log__checkpoint_every": 1000, "data__val_clips": 2,
}  # fmt: skip
FILE_BYTES = 100_000


def job(tiny: Tiny, runs: Path, stage: str, name: str, steps: int, world: int = 1, **more: object) -> dict[str, object]:
    """A job of tests/train/ranks.py; settings are those with two underscores."""
    settings = COMMON | {"run__length": f"{steps} steps", "hardware__devices": world}
    settings |= {k: str(v) if isinstance(v, Path) else v for k, v in more.items() if "__" in k}
    rest = {k: v for k, v in more.items() if "__" not in k}
    where = {"stage": stage, "root": str(tiny.root), "runs": str(runs), "name": f"{stage}-{name}"}
    return {**where, "settings": settings, "start_from": FROM.get(stage, ""), **rest}


def on_ranks(world: int, folder: Path, jobs: list[dict[str, object]]) -> None:
    """Run jobs one after the other in one process group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / f"jobs{world}.json").write_text(json.dumps(jobs))
    env = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.train.ranks", str(folder / f"jobs{world}.json")]
    logs = [folder / f"rank{rank}-of-{world}.log" for rank in range(world)]
    ranks = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            mine = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=mine, stdout=file, stderr=subprocess.STDOUT))
    try:
        codes = [rank.wait(timeout=1200) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * world, "\n".join(log.read_text()[-3000:] for log in logs)


def here(tiny: Tiny, one: dict[str, object]) -> Path:
    """Run a job in this process, alone."""
    order = order_for(
        one["stage"], tiny, Path(one["runs"]), name=one["name"], start_from=one["start_from"], **one["settings"]
    )
    order.folder.parent.mkdir(parents=True, exist_ok=True)
    with watched(order.folder.parent / f"{one['name']}.gradients.pt", one.get("backwards", False)):
        fit(order)
    return order.folder


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def resumed_at(folder: Path) -> list[int]:
    return [row["step"] for row in read_metrics(folder / "events.jsonl") if row["event"] == "resume"]


def farthest(one: Path, other: Path, last: int | None = None) -> float:
    """Between the losses of two runs, up to step `last`."""
    a, b = losses(one), losses(other)
    assert len(a) == len(b) > 1
    return max(abs(x - y) for x, y in zip(a[:last], b[:last], strict=True))


def same_first_step(one: Path, other: Path) -> None:
    assert abs(losses(one)[0] - losses(other)[0]) < 1e-6
    a, b = (torch.load(folder.with_name(f"{folder.name}.gradients.pt")) for folder in (one, other))
    assert a.keys() == b.keys()
    assert sum(bool(gradient.any()) for gradient in a.values()) > 20  # of fresh LoRA that of A is zero
    for name, gradient in a.items():
        assert (gradient - b[name]).norm() <= 1e-5 * gradient.norm(), name


def same_weights(one: Path, other: Path) -> None:
    """Bit for bit, file by file."""
    a, b = (sorted(p.relative_to(f) for p in f.rglob("*.safetensors")) for f in (one / "weights", other / "weights"))
    assert a == b
    for file in a:
        x, y = load_file(one / "weights" / file), load_file(other / "weights" / file)
        assert x.keys() == y.keys()
        assert all(torch.equal(x[n], y[n]) for n in x)


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory) -> Path:
    """All runs of the short tests: those of two ranks in one process group, the references in this process."""
    runs = tmp_path_factory.mktemp("same")
    folder, two = runs / "mini", []
    for stage in STAGES:
        here(tiny, job(tiny, runs, stage, "ref", 8))
        two += [job(tiny, runs, stage, "ddp", 8, 2), job(tiny, runs, stage, "fsdp", 8, 2, **SHARDED)]
    often = SHARDED | {"log__checkpoint_every": 2, "optim__name": "adamw8bit", "file_bytes": FILE_BYTES}
    first = STAGES[0]
    two += [
        job(tiny, runs, first, "whole", 7, 2, **often),
        job(tiny, runs, first, "killed", 7, 2, **often, dies=5),
        job(tiny, runs, first, "moved", 7, 2, **often, dies=5),
        job(tiny, runs, first, "killed", 7, 2, **often),
        job(tiny, runs, first, "from_ddp", 8, 2, log__checkpoint_every=3, dies=5),
        job(tiny, runs, first, "from_ddp", 8, 2, log__checkpoint_every=3, **SHARDED),
        job(tiny, runs, first, "shared_by_one", 4, 2, **SHARDED, hardware__shard=1, hardware__recompute="[decoder]"),
    ]
    half = {"run__precision": "bf16", "optim__name": "adamw8bit"}
    here(tiny, job(tiny, runs, first, "half-ref", 3, **half))
    recomputed = half | SHARDED | {"hardware__recompute": "[audio_encoder,decoder]"}
    two += [job(tiny, runs, first, "half", 3, 2, **recomputed)]
    on_ranks(2, runs, two)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_are_one(runs, stage, kind):
    one, two = runs / f"{stage}-ref", runs / f"{stage}-{kind}"
    same_first_step(one, two)
    assert farthest(one, two) < 1e-5
    assert json.loads((two / "weights" / "stage.json").read_text())["steps"] == 8


def test_killed_ranks_go_on_bit_for_bit(runs):
    """8-bit states in shards; the run is unbroken but for the steps behind its checkpoint."""
    whole, killed = (runs / f"stage1_align-{name}" for name in ("whole", "killed"))
    assert losses(whole) == losses(killed)
    same_weights(whole, killed)
    assert resumed_at(killed) == [4]


def test_what_no_checkpoint_names_is_removed(runs):
    """Shards of steps 2, 4 and 6 are gone."""
    there = sorted(p.name for p in (runs / "stage1_align-killed" / "checkpoints").iterdir())
    assert there == ["last.ckpt", "shards-00000007"]


def test_one_process_goes_on_from_shards(runs, tiny):
    """Another world size; 8-bit states are put together from their shards."""
    settings = {"log__checkpoint_every": 2, "optim__name": "adamw8bit"}
    moved = here(tiny, job(tiny, runs.parent, "stage1_align", "moved", 7, **settings))
    assert farthest(runs / "stage1_align-whole", moved) < 1e-5
    assert not list((moved / "checkpoints").glob("shards-*"))


def test_who_reads_a_checkpoint_reads_its_shards(runs, tiny):
    """make peek and make bisect look at the weights that were trained, not at those of the start."""
    order = order_for("stage1_align", tiny, runs.parent, name="stage1_align-whole", **COMMON)
    model, last = build(order, open_starts(order))[0], order.folder / "checkpoints" / checkpoint.LAST
    checkpoint.restore(model, checkpoint.read(last), last)
    trained = {}
    for file in (order.folder / "weights").glob("*.safetensors"):
        trained |= load_file(file)
    found = base_state(model)
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[n], t) for n, t in trained.items())


def test_ranks_that_share_go_on_from_a_whole_checkpoint(runs):
    assert farthest(runs / "stage1_align-ref", runs / "stage1_align-from_ddp") < 1e-5
    assert resumed_at(runs / "stage1_align-from_ddp") == [3]


def test_weights_written_shard_by_shard_are_those_of_one_process(runs, tiny, monkeypatch):
    """A run that ended is handed off again by one process, from its shards: the same files, bit for bit."""
    again = runs / "stage1_align-again"
    shutil.copytree(runs / "stage1_align-whole", again)
    shutil.rmtree(again / "weights")
    monkeypatch.setattr(weights, "FILE_BYTES", FILE_BYTES)
    settings = {"log__checkpoint_every": 2, "optim__name": "adamw8bit"}
    here(tiny, job(tiny, runs.parent, "stage1_align", "again", 7, **settings))
    whole = runs / "stage1_align-whole"
    assert len(list((whole / "weights").glob("model-*-of-*.safetensors"))) > 3
    same_weights(whole, again)
    of = [json.loads((run / "weights" / "stage.json").read_text())["sha256"] for run in (whole, again)]
    assert of[0] == of[1]


def test_in_half_precision_shards_compute_what_one_process_does(runs):
    """Blocks are gathered in bf16, norms in float32, gradients are summed in float32; with recomputation."""
    one, two = (runs / f"stage1_align-{name}" for name in ("half-ref", "half"))
    same_first_step(one, two)
    assert farthest(one, two) < 1e-2  # a rounding to bf16 that falls on the other side


def test_copies_that_nobody_shares_and_recomputation(runs):
    """hardware.shard=1: each rank holds a copy; blocks are computed again in the backward pass."""
    one, two = runs / "stage1_align-ref", runs / "stage1_align-shared_by_one"
    a, b = (torch.load(f.with_name(f"{f.name}.gradients.pt")) for f in (one, two))
    assert all(float((a[n] - b[n]).norm() / a[n].norm()) < 1e-5 for n in a)


# -- longer, and on four ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def longer(tiny, tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("longer")
    four, eight_bit = [], {"optim__name": "adamw8bit"}
    for stage in STAGES:
        here(tiny, job(tiny, runs, stage, "ref", 30))
        four += [job(tiny, runs, stage, "ddp", 30, 4), job(tiny, runs, stage, "fsdp", 30, 4, **SHARDED)]
    four.append(job(tiny, runs, STAGES[0], "nodes", 30, 4, **SHARDED, hardware__shard=2))
    here(tiny, job(tiny, runs, STAGES[0], "ref8", 60, **eight_bit))
    here(tiny, job(tiny, runs, STAGES[0], "control8", 60, **eight_bit, backwards=True))
    four += [job(tiny, runs, STAGES[0], f"{kind}8", 60, 4, **eight_bit, hardware__strategy=kind) for kind in KINDS]
    on_ranks(4, runs, four)
    return runs / "mini"


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "kind"), [*((s, k) for s in STAGES for k in KINDS), (STAGES[0], "nodes")])
def test_four_ranks_are_one(longer, stage, kind):
    """nodes: two copies of the model, each shared by two ranks."""
    one, four = longer / f"{stage}-ref", longer / f"{stage}-{kind}"
    same_first_step(one, four)
    assert farthest(one, four) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_8_bit_states_drift_no_farther_than_by_another_order_of_summation(longer, kind):
    one, control, four = (longer / f"stage1_align-{name}8" for name in ("ref", "control", kind))
    assert farthest(one, four, last=10) < 1e-5
    assert farthest(one, four) < max(2e-3, 2 * farthest(one, control))
