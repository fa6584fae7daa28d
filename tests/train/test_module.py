"""A step of training as a GPU sees it: the host hands over work and waits once."""

from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode

from midasheng.train.module import StageModule
from midasheng.train.world import is_first
from tests.conftest import run_stage

WAITS = {
    "item",
    "tolist",
    "cpu",
    "numpy",
    "__float__",
    "__int__",
    "__bool__",
    "__index__",
    "nonzero",
    "is_nonzero",
    "unique",
}


class Waits(TorchFunctionMode):
    """Counts what would make the host wait for a GPU."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in WAITS or (name == "to" and "cpu" in map(str, args[1:])):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_of_several_packs_waits_for_the_device_once(tiny, tmp_path, monkeypatch):
    """Losses, gradient norm and what was summed over ranks come to the host together, behind the last backward; what is
    read from them afterwards is the host's own. Models, gradients and clipping ask for nothing."""
    step, read = StageModule.training_step, StageModule._read
    seen: list[Counter[str]] = []  # before the losses are read, behind that
    waits = Waits()

    def training_step(self, batch, number):
        seen.clear()
        waits.seen.clear()
        with waits:
            step(self, batch, number)
        assert len(batch.packs) == 3
        assert not seen[0]
        assert seen[1]["cpu"] == 1
        done.append(batch.step)

    def counted_read(self, *args):
        seen.append(Counter(waits.seen))
        found = read(self, *args)
        seen.append(Counter(waits.seen))
        return found

    done: list[int] = []
    monkeypatch.setattr(StageModule, "training_step", training_step)
    monkeypatch.setattr(StageModule, "_read", counted_read)
    run_stage("stage1_align", tiny, tmp_path, batch__packs_per_step=3, run__length="4 steps", log__val_every=99)
    assert done == [0, 1, 2, 3]


def test_what_would_wait_is_counted():
    with Waits() as waits:
        assert float(torch.ones(1)) == 1
        torch.ones(3).nonzero()
        torch.ones(1).to("cpu")
        torch.ones(1).cpu().tolist()
    assert waits.seen == {"__float__": 1, "nonzero": 1, "to": 1, "cpu": 1, "tolist": 1}


@pytest.mark.parametrize(
    ("ranks", "writes"),
    [
        ({}, True), ({"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}, True), ({"RANK": "1"}, False),
        ({"RANK": "8", "LOCAL_RANK": "0", "GROUP_RANK": "1"}, False),
    ],
)  # fmt: skip
def test_one_process_of_all_nodes_writes(ranks, writes, monkeypatch):
    """The first of another node has LOCAL_RANK 0, too."""
    for name in ("RANK", "LOCAL_RANK", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    assert is_first() is writes
