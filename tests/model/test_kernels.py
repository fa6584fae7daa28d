"""Liger in the decoder: refused where it cannot run, in every layer or not at all, and equal to the plain modules."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from midasheng import config
from midasheng.config import ConfigError, UserError
from midasheng.model import kernels
from midasheng.train import fit
from tests.conftest import order_for, run_stage
from tests.model import CONFIGS, FIELDS, LLAMA, OMNI, QWEN3, tiny_lm

THERE = importlib.util.find_spec("liger_kernel") is not None
NEEDED = pytest.mark.skipif(not THERE, reason="liger-kernel is not installed: pip install 'midasheng-train[liger]'")
ROOT = Path(__file__).parents[2]


@NEEDED
@pytest.mark.slow
def test_the_real_kernels_on_a_cpu():
    """TRITON_INTERPRET counts when Triton is imported: a process of its own."""
    tests = ROOT / "tests/model/interpreted_kernels.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests)],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


@pytest.mark.parametrize(("architecture", "counts"), [(OMNI, (5, 2)), (QWEN3, (9, 2)), (LLAMA, (5, 2))])
def test_every_norm_and_mlp_of_the_decoder_is_replaced_and_no_other(architecture, counts):
    lm = tiny_lm(architecture)
    kernels.fuse(lm.decoder.model)
    replaced = [name for name, module in lm.named_modules() if "forward" in vars(module)]
    assert kernels.counts(lm.decoder.config) == counts
    assert len(replaced) == sum(counts)
    assert all(name.startswith("decoder.model.") and name.endswith(("norm", "mlp")) for name in replaced)
    assert not any("forward" in vars(module) for module in tiny_lm(architecture).modules())  # no class was changed


def test_a_layer_that_is_left_out_is_noticed(monkeypatch):
    lm = tiny_lm(QWEN3)
    layer = lm.decoder.model.layers[1]

    class Other(type(layer.mlp)):
        """Bears a name that is not looked for."""

    layer.mlp.__class__ = Other
    with pytest.raises(AssertionError, match=r"Liger runs in \(9, 1\) .* the config says \(9, 2\)"):
        kernels.fuse(lm.decoder.model)
    lm = tiny_lm(QWEN3)
    lm.decoder.model.layers[0].self_attn.q_norm = nn.Identity()
    with pytest.raises(AssertionError, match=r"\(8, 2\) .* \(9, 2\)"):
        kernels.fuse(lm.decoder.model)


def verify(architecture: str = QWEN3, device: str = "cuda", **fields: object) -> float:
    return kernels.verify(architecture, FIELDS[architecture] | fields, device, torch.float32)


def test_it_is_refused_where_it_is_not_installed(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "liger_kernel" else found(name))
    with pytest.raises(UserError, match=r"not installed; run `pip install 'midasheng-train\[liger\]'`"):
        verify()


@NEEDED
def test_it_is_refused_where_it_cannot_run_or_would_compute_something_else():
    with pytest.raises(UserError, match=r"hardware.liger: Liger's kernels need a GPU, this run is on cpu; write false"):
        verify(device="cpu")
    with pytest.raises(UserError, match=r"hidden_act is gelu, Liger's SwiGLU computes silu; write false"):
        verify(hidden_act="gelu")
    with pytest.raises(UserError, match=r"norms of gemma are not known here .*write false"):
        kernels.verify("gemma", FIELDS[LLAMA] | {"head_dim": 16}, "cuda", torch.float32)


def test_it_is_one_of_liger_and_compiled_blocks_and_may_change_at_a_resume():
    settings = ["hardware.liger=true", "hardware.compile=true"]
    with pytest.raises(ConfigError, match=r"write one of hardware.liger and hardware.compile"):
        config.load(CONFIGS / "stage1_align.yaml", "mini", settings, CONFIGS)
    fields = {f.name: f for f in dataclasses.fields(config.Hardware)}
    assert fields["liger"].metadata["free"]
    assert config.load(CONFIGS / "stage1_align.yaml", "mini", [], CONFIGS).stage.hardware.liger is False


def test_nothing_but_a_run_that_asks_needs_it():
    code = (
        "import sys; sys.modules['liger_kernel'] = None\n"
        "import midasheng, midasheng.inference, midasheng.model.export, midasheng.model.kernels, midasheng.train.fit\n"
        "assert midasheng.load"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)


def test_a_run_that_asks_trains_with_it_and_one_that_does_not_is_plain(tiny, tmp_path):
    for asked in (True, False):
        order = order_for("stage1_align", tiny, tmp_path, hardware__liger=str(asked).lower())
        model = fit.build(order, fit.open_starts(order))[0]
        assert sum("forward" in vars(m) for m in model.modules()) == asked * sum(kernels.counts(model.decoder.config))


@NEEDED
def test_a_run_without_a_gpu_is_refused_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(UserError, match=r"hardware.liger: Liger's kernels need a GPU, this run is on cpu; write false"):
        run_stage("stage1_align", tiny, tmp_path / "runs", hardware__liger="true", hardware__accelerator="cpu")
    assert not (tmp_path / "runs").exists()
