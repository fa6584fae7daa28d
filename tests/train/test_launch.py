"""Runs of several processes: the same on one machine, over torchrun and in a Slurm job; what goes wrong ends clearly."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from midasheng.config import UserError
from midasheng.data import loader as loader_room
from midasheng.data import storage
from midasheng.data.storage import ServerLost
from midasheng.train import checkpoint, fit
from midasheng.train.module import StageModule
from tests.conftest import Tiny, ledger_rows, run_stage
from tests.data.server import Server
from tests.train.test_resume import all_events, same_run

ROOT = Path(__file__).parent.parent.parent
STAGE = """
import os, signal, sys, time
from pathlib import Path
from midasheng.data.loader import Loading
from midasheng.train import fit
from midasheng.train.module import StageModule
from stages.stage2_pretrain import contract
rank, folder = int(os.environ["RANK"]) if "RANK" in os.environ else -1, Path(__file__).parent
{patch}
sys.exit(fit.run_stage("configs/stage2_pretrain.yaml", contract))
"""
STANDS_STILL = """
text = Loading._text
def stands_still(self, p, read):
    if rank == 1 and self.notes.rows[0, 0] == 3 and not (folder / "still").exists():
        metrics = folder / "mini/stage2_pretrain/metrics.jsonl"
        while '"step": 3, "loss"' not in metrics.read_text():  # what was loaded before is trained on
            time.sleep(0.05)
        (folder / "still.part").write_text(str(os.getpid()))
        os.rename(folder / "still.part", folder / "still")
        os.kill(os.getpid(), signal.SIGSTOP)
    return text(self, p, read)
Loading._text = stands_still
"""
PREEMPTS = """
step = StageModule.training_step
def preempts(self, batch, batch_idx):
    if batch.step == 1 and rank == 0 and os.environ["SLURM_RESTART_COUNT"] == "0":
        os.kill(int(os.environ["BATCH_PID"]), signal.SIGUSR1)
        while not self.stop.requested:
            time.sleep(0.02)
    step(self, batch, batch_idx)
StageModule.training_step = preempts
"""
# whom `folder/victim` names dies before a step
DIES = """
step = StageModule.training_step
def dies(self, batch, batch_idx):
    victims, at = (folder / "victim").read_text().split(":")
    if batch.step == int(at):
        self.writer.wait()
        if str(rank) in victims:
            os.kill(os.getpid(), signal.SIGKILL)
        if victims == "launcher":
            (folder / f"rank{rank}").write_text(str(os.getpid()))
            time.sleep(600)
    step(self, batch, batch_idx)
StageModule.training_step = dies
"""
# three packs on two ranks: one of rank 1's holds nothing but dummy frames; a folder of their own for the index, which
# rank 0 makes while rank 1 waits
MORE = {
    "batch.packs_per_step": 3, "optim.name": "adamw", "run.length": "5 steps", "log.checkpoint_every": 2,
    "data.val_clips": 2, "hardware.stall_s": 2,
}  # fmt: skip


def script(folder: Path, tiny: Tiny, patch: str = "") -> list[str]:
    """The words behind `python` that run stage 2 below `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "stage2.py").write_text(STAGE.format(patch=patch))
    (folder / "mini").mkdir(exist_ok=True)
    if not (folder / "mini/stage1_align").exists():
        (folder / "mini/stage1_align").symlink_to(folder.parent / "first/mini/stage1_align")
    settings = [f"{name}={value}" for name, value in MORE.items()]
    return [str(folder / "stage2.py"), "--runs", str(folder), *tiny.settings(), *settings, f"data.index={folder}/index"]


def environment(**more: str) -> dict[str, str]:
    here = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    return here | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def finished(*started: subprocess.Popen[str]) -> str:
    """What processes have said, once all of them have ended well."""
    said = [process.communicate(timeout=400)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(said)
    return "".join(said)


def start(args: list[str], **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        args, cwd=ROOT, env=environment(**more), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory) -> Path:
    """Stage 1, and stage 2 on two processes that one command started on this machine, unbroken."""
    folder = tmp_path_factory.mktemp("launch")
    run_stage("stage1_align", tiny, folder / "first", run__length="2 steps")
    finished(start([sys.executable, *script(folder / "one", tiny), "hardware.devices=2"]))
    return folder


@pytest.mark.slow
def test_a_loader_that_stands_still_is_named_killed_it_ends_all_and_two_nodes_go_on_as_one(runs, tiny):
    """On one machine first: rank 1's loader process stops dead; rank 0's log names it with its record, long before any
    collective would time out. It is killed: a clear error, all processes gone, the checkpoint whole. Then the same
    command on two nodes, by torchrun, takes the run to the weights of the unbroken one, digit for digit."""
    words = script(runs / "two", tiny, STANDS_STILL)
    process = start([sys.executable, *words, "hardware.devices=2", "hardware.workers=1"])
    run, still = runs / "two/mini/stage2_pretrain", runs / "two/still"

    def stalls() -> list[dict]:
        found = all_events(run) if (run / "events.jsonl").exists() else []
        return [e for e in found if (e["event"], e.get("at_step")) == ("stall", 3)]

    until = time.monotonic() + 300
    while not stalls() and time.monotonic() < until:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    pid = int(still.read_text())
    os.kill(pid, signal.SIGKILL)
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 2, said
    stall = stalls()[0]
    assert (stall["step"], stall["rank"]) == (2, 1)
    where = r"corpus tiny_(asr|caption), shard .*/tiny-00000[01].tar, key tone\d+ \(step 3\)"
    assert re.search(rf"rank 1 has waited \d+ s for the data of step 3: loader process 0 .* {where}", stall["at"])
    assert f"STALL: {stall['at']}" in said
    assert said.count("error: ") == 1
    assert re.search(rf"\): step 3: a loader process was killed \(DataLoader worker .*\b{pid}\b", said)
    failed = all_events(run)[-1]
    assert (failed["event"], failed["step"], failed["rank"]) == ("failed", 2, 1)
    assert checkpoint.read(run / "checkpoints" / checkpoint.LAST)["step"] == 2

    port = free_port()
    nodes = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1"]
    said = finished(
        *(start([sys.executable, *nodes, "--master-port", port, "--node-rank", rank, *words]) for rank in ("0", "1"))
    )
    assert "resuming at step 2 of 5" in said
    same_run(runs / "one/mini/stage2_pretrain", run)
    assert [e["event"] for e in all_events(run) if e["event"] in ("failed", "resume", "handed off")] == [
        "failed", "resume", "handed off"
    ]  # fmt: skip


@pytest.mark.slow
def test_whoever_is_killed_under_our_own_launcher_the_run_ends_and_goes_on(runs, tiny):
    """Rank 1, rank 0, the launcher: one run, each start from where the one before left it. What is left of it once its
    launcher is dead ends by itself; the same command, given at once, waits for that."""
    words = [sys.executable, *script(runs / "killed", tiny, DIES), "hardware.devices=2"]
    run, victim = runs / "killed/mini/stage2_pretrain", runs / "killed/victim"

    def failed() -> list[tuple]:
        return [(e["rank"], e["step"], e["error"]) for e in all_events(run) if e["event"] == "failed"]

    for rank in (1, 0):
        victim.write_text(f"{rank}:3")
        process = start(words)
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 128 + signal.SIGKILL, said
        told = re.findall(r"error: (rank \d .*)", said)
        assert re.fullmatch(rf"rank {rank} \(.*\): lost: it ended by SIGKILL", told[0])
        assert (len(told), failed()[-1]) == (1, (rank, 2, told[0]))

    victim.write_text("launcher:4")
    launcher = start(words)
    until, files = time.monotonic() + 300, [runs / f"killed/rank{n}" for n in (0, 1)]
    while not all(f.exists() and f.read_text() for f in files) and time.monotonic() < until:
        time.sleep(0.05)
    other = int(files[1].read_text())
    os.kill(other, signal.SIGSTOP)  # the last one to end
    launcher.kill()
    victim.write_text("none:-1")
    again = start(words)
    assert again.stdout is not None
    while "is held by" not in (line := again.stdout.readline()):
        assert line
    assert re.search(r"is held by process \d+ on .*; waiting 60 s for its end", line)
    os.kill(other, signal.SIGCONT)
    assert "resuming at step 4 of 5" in finished(again)
    assert "error: rank 0 (" in launcher.communicate(timeout=60)[0]
    assert (len(failed()), failed()[-1][:2]) == (3, (0, 4))
    assert "lost: its launcher is gone" in failed()[-1][2]
    same_run(runs / "one/mini/stage2_pretrain", run)


# -- Slurm, as far as it goes without Slurm ----------------------------------------------------------------------------


SRUN = """#!{python}
import os, signal, subprocess, sys
words, n = sys.argv[1:], int(os.environ["SLURM_NTASKS"])
while words[0].startswith("--"):
    words.pop(0)
tasks = [subprocess.Popen(words, env=os.environ | dict(
    SLURM_PROCID=str(i), SLURM_LOCALID=str(i % (n // int(os.environ["SLURM_NNODES"]))),
    SLURM_NODEID=str(i // (n // int(os.environ["SLURM_NNODES"]))))) for i in range(n)]
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
  "show hostnames") printf '127.0.0.1\\n127.0.0.1\\n' ;;
  "show job") echo "JobId=$3 JobState=${{STATE:-RUNNING}}" ;;
  "requeue "*) echo "$2" >> "{folder}/requeued" ;;
esac
"""


def test_the_batch_script_and_make_submit_are_what_slurm_reads(tmp_path):
    """Of every option that sbatch is given, and of the script's own."""
    assert subprocess.run(["bash", "-n", "configs/cluster/slurm.sh"], cwd=ROOT, check=False).returncode == 0
    told = (ROOT / "configs/cluster/slurm.sh").read_text()
    for option in ("--requeue", "--signal=B:USR1@300", "--open-mode=append"):
        assert f"#SBATCH {option}\n" in told
    (tmp_path / "sbatch").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "sbatch").chmod(0o755)
    made = subprocess.run(
        ["make", "-o", "setup", "submit", "VERB=stage2", "SCALE=7b", "NODES=10", "GPUS=8", f"RUNS={tmp_path}",
         "SBATCH=--partition=a", "SET=optim.lr=2e-4 run.seed=1"],
        cwd=ROOT, capture_output=True, text=True, check=True, env=environment(PATH=f"{tmp_path}:{os.environ['PATH']}"),
    )  # fmt: skip
    words = made.stdout.split()
    assert words[: words.index("configs/cluster/slurm.sh")] == [
        "--job-name", "stage2", "--nodes", "10", "--ntasks-per-node", "8", "--gpus-per-node", "8", "--output",
        f"{tmp_path}/7b/slurm-%j.log", "--partition=a",
    ]  # fmt: skip
    assert words[words.index("configs/cluster/slurm.sh") + 1 :] == [
        "stages.stage2_pretrain", "--scale", "7b", "--runs", str(tmp_path), "optim.lr=2e-4", "run.seed=1"
    ]  # fmt: skip
    wrong = subprocess.run(
        ["make", "-o", "setup", "submit"], cwd=ROOT, capture_output=True, text=True, check=False, env=environment()
    )
    assert wrong.returncode == 2
    assert "make submit VERB=stage2" in wrong.stdout


@pytest.mark.slow
def test_a_preempted_job_is_queued_again_and_goes_on_by_itself_on_the_nodes_it_gets(runs, tiny):
    """The real batch script; srun, which really starts the tasks, and scontrol are stand-ins. SIGUSR1 comes to the
    script in step 1: all ranks save, the job is queued again; then one node has become two, and the run ends as the
    unbroken one, learning rate and plan included."""
    folder = runs / "slurm"
    words = script(folder, tiny, PREEMPTS)
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL.format(folder=folder))):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "slurm_stage.py").write_text((folder / "stage2.py").read_text())

    def job(nodes: int, again: int) -> subprocess.Popen[str]:
        # exec: the batch script's own process is what Slurm signals
        line = 'BATCH_PID=$$; export BATCH_PID; exec bash configs/cluster/slurm.sh "$@"'
        return start(
            ["bash", "-c", line, "batch", "slurm_stage", *words[1:], "--fresh"],
            PATH=f"{folder}:{os.environ['PATH']}", PYTHONPATH=f"{folder}:{ROOT}", SLURM_JOB_ID="77",
            SLURM_JOB_NODELIST="x", SLURM_NNODES=str(nodes), SLURM_NTASKS="2", SLURM_RESTART_COUNT=str(again),
            MASTER_PORT=free_port(),
        )  # fmt: skip

    first = job(1, 0)
    said = first.communicate(timeout=400)[0]
    assert first.returncode == 75, said
    assert "stopped; " in said
    assert (folder / "requeued").read_text() == "77\n"
    run = folder / "mini/stage2_pretrain"
    assert checkpoint.read(run / "checkpoints" / checkpoint.LAST)["step"] == 2
    said = finished(job(2, 1))
    assert "resuming at step 2 of 5" in said
    assert (folder / "requeued").read_text() == "77\n"
    same_run(runs / "one/mini/stage2_pretrain", run)


# -- one process -------------------------------------------------------------------------------------------


def test_sigterm_in_a_step_saves_and_asks_to_be_started_again(tiny, tmp_path, monkeypatch):
    """Of the machine, so twice does not end it; and it never reaches Lightning's handler, which sends a broadcast
    whatever the other ranks are in."""
    step = StageModule.training_step

    def preempted(self, batch, batch_idx):
        if batch.step == 1:
            assert signal.getsignal(signal.SIGTERM) == self.stop.on_signal
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        step(self, batch, batch_idx)

    monkeypatch.setattr(StageModule, "training_step", preempted)
    args = ["--runs", str(tmp_path), *tiny.settings(log__checkpoint_every=100)]
    assert fit.run_stage("configs/stage1_align.yaml", lambda stage: None, args) == 75
    run = tmp_path / "mini/stage1_align"
    assert checkpoint.read(run / "checkpoints" / checkpoint.LAST)["step"] == 2
    assert all_events(run)[-1]["event"] == "stop"


def test_out_of_memory_in_a_step_is_said_and_the_same_command_goes_on(tiny, tmp_path, monkeypatch):
    """The allocator's own error, of more than any machine has."""
    more = {"run__length": "5 steps", "log__checkpoint_every": 2}
    unbroken = run_stage("stage1_align", tiny, tmp_path / "whole", **more)
    step = StageModule.training_step

    def hungry(self, batch, batch_idx):
        if batch.step == 3:
            torch.empty(2**55)
        step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(StageModule, "training_step", hungry)
        with pytest.raises(
            UserError, match=r"step 3: out of memory .*can't allocate memory.*; the same command goes on"
        ):
            run_stage("stage1_align", tiny, tmp_path / "parts", **more)
    run = tmp_path / "parts/mini/stage1_align"
    assert checkpoint.read(run / "checkpoints" / checkpoint.LAST)["step"] == 2
    failed = all_events(run)[-1]
    assert (failed["event"], failed["step"], failed["at_step"]) == ("failed", 2, 3)
    same_run(unbroken, run_stage("stage1_align", tiny, tmp_path / "parts", **more))
    assert "failed" in [e["event"] for e in all_events(run)]  # a resume keeps what it went on from


def test_a_lost_shard_server_ends_the_run_before_it_goes_on_without_its_samples(tiny, tmp_path, monkeypatch):
    """In the middle of training, and at a validation; when it is back, the same command ends as the unbroken run."""
    monkeypatch.setattr(storage, "DEADLINE_S", 0.3)
    server = Server(tiny.shards)
    more = {
        "run__length": "6 steps", "log__checkpoint_every": 2, "log__val_every": 4, "batch__clips_per_step": 12,
        "data__root": f"{server.url}", "data__index": tmp_path / "index",
    }  # fmt: skip
    try:
        unbroken = run_stage("stage1_align", tiny, tmp_path / "whole", **more)
        fetch, validate = loader_room.read_many, StageModule._validate

        def lost_in_step(places):
            calls.append(1)
            server.always = 503 if len(calls) > 4 else None  # two packs a step: from step 2 on
            return fetch(places)

        def lost_at_validation(self, *, ends):
            server.always = 503 if self.done == 4 else None
            return validate(self, ends=ends)

        calls: list[int] = []
        run = tmp_path / "parts/mini/stage1_align"
        with monkeypatch.context() as patch:
            patch.setattr(loader_room, "read_many", lost_in_step)
            with pytest.raises(ServerLost, match=r"corpus tiny_caption: 8 records in a row could not be read"):
                run_stage("stage1_align", tiny, tmp_path / "parts", **more)
        assert all_events(run)[-1]["event"] == "failed"
        server.always = None
        with monkeypatch.context() as patch:
            patch.setattr(StageModule, "_validate", lost_at_validation)
            with pytest.raises(ServerLost, match="a held-out record cannot be read"):
                run_stage("stage1_align", tiny, tmp_path / "parts", **more)
        server.always = None
        assert checkpoint.read(run / "checkpoints" / checkpoint.LAST)["step"] == 2
        same_run(unbroken, run_stage("stage1_align", tiny, tmp_path / "parts", **more))
        assert all(good for rows in ledger_rows(run).values() for *_, good in rows)
    finally:
        server.close()
