"""Is an export the model that was trained? Logits from audio files in a fresh process, against the live model."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from midasheng import frames
from midasheng.config import UserError
from midasheng.model.audio_lm import AudioLM
from midasheng.sample import Sample, Turn, pack

RELOAD = Path(__file__).parent / "remote" / "reload.py"
MOST_DIFFERENCE = 1e-4  # of two logits in float32; times their root mean square where that is above 1, as rounding is
LEAST_AGREEMENT = 0.99  # top-1, bf16
BATCH = 4


class ExportError(UserError):
    """An export that is refused, or that is not the model that was trained."""


@dataclass(frozen=True)
class Trial:
    """One conversation to try an export on: its turns, its clips as they lie in a file (float32, 16 kHz, possibly
    shorter than frames.MIN_SAMPLES), and the same as our own pipeline makes it."""

    turns: tuple[Turn, ...]
    clips: tuple[NDArray[np.float32], ...]
    sample: Sample


@dataclass(frozen=True)
class Heard:
    """What a model makes of the trials: logits (text slots, V) of each, float32, and the log-mels of their clips."""

    logits: list[Tensor]
    mels: list[Tensor]


@torch.no_grad()
def listen(model: AudioLM, trials: Sequence[Trial]) -> Heard:
    """Our own forward pass, one conversation at a time."""
    was_training = model.training
    model.eval()
    logits, mels = [], []
    for trial in trials:
        row = pack([trial.sample], len(trial.sample.ids), 0)
        logits.append(model.decoder.logits(model.hidden(row)[~row.is_audio_T]).float())
        mels += [model.audio_encoder.log_mel(torch.from_numpy(clip)) for clip in trial.sample.clips]
    model.train(was_training)
    return Heard(logits, mels)


def compare(first: Sequence[Tensor], second: Sequence[Tensor]) -> dict[str, int | float]:
    """Slots, root mean square of the first's logits, largest and mean |difference|, and the share of slots whose best
    token is the same."""
    assert len(first) == len(second), f"{len(first)} trials against {len(second)}"
    for a, b in zip(first, second, strict=True):
        assert a.shape == b.shape, f"logits {tuple(a.shape)} against {tuple(b.shape)}"
    if not all(bool(t.isfinite().all()) for t in (*first, *second)):
        return {"slots": 0, "rms": float("inf"), "max": float("inf"), "mean": float("inf"), "top1": 0.0}
    differences = [(a - b).abs() for a, b in zip(first, second, strict=True)]
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(first, second, strict=True)])
    numbers = sum(d.numel() for d in differences)
    return {
        "slots": sum(len(d) for d in differences),
        "rms": math.sqrt(sum(float(a.double().square().sum()) for a in first) / numbers),
        "max": max(float(d.max()) for d in differences),
        "mean": sum(float(d.double().sum()) for d in differences) / numbers,
        "top1": float(same.float().mean()),
    }


def published_tokens(n_samples: int) -> int:
    """Audio tokens as vLLM's model of the published weights counts them, at least one and shorter clips padded; written
    out here so that no arithmetic of ours proves itself."""
    padded = max(n_samples, 3200)
    return max(1, int(1 + (padded + 512 - 512) / 160) // 4 // 5)


def messages(trial: Trial, paths: Sequence[str]) -> list[dict[str, Any]]:
    """The conversation as a chat template takes it."""
    left, said = list(paths), []
    for turn in trial.turns:
        sounds = [{"type": "audio", "path": left.pop(0)} for _ in range(turn.clips)]
        words = [{"type": "text", "text": turn.text}]
        content = words + sounds if turn.text_first else sounds + words
        said.append({"role": turn.role, "content": content})
    return said


def reload(folder: Path, adapter: Path | None, trials: Sequence[Trial], scratch: Path) -> dict[str, Tensor]:
    """What remote/reload.py makes of the trials, from audio files below `scratch`, in a fresh process that runs the
    folder's own code. Raises ExportError when it ends in an error."""
    asked = []
    for i, trial in enumerate(trials):
        paths = [scratch / f"clip{i}_{j}.wav" for j in range(len(trial.clips))]
        for path, clip in zip(paths, trial.clips, strict=True):
            soundfile.write(path, clip, frames.SAMPLE_RATE, subtype="FLOAT")
        asked.append({"messages": messages(trial, [str(path) for path in paths])})
    job, out = scratch / "job.json", scratch / "reloaded.safetensors"
    what = {"folder": str(folder), "adapter": str(adapter or ""), "batch": BATCH, "trials": asked,
            "threads": torch.get_num_threads()}  # fmt: skip
    job.write_text(json.dumps(what), encoding="utf-8")
    # -I: nothing of ours is importable from the working directory; its own cache of the folder's code
    ran = subprocess.run(
        [sys.executable, "-I", str(RELOAD), str(job), str(out)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        env=os.environ | {"HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if ran.returncode:
        raised = re.findall(r"^[\w.]*(?:Error|Exception|Exit)\b.*", ran.stderr, flags=re.MULTILINE)
        raise ExportError(
            f"the export does not run in a fresh process: {raised[-1][:500] if raised else ran.stderr[-500:]}"
        )
    return load_file(out)


def check_inputs(made: dict[str, Tensor], trials: Sequence[Trial], live: Heard, audio_id: int) -> None:
    """Raises ExportError when the processor of the export makes other ids, token counts or log-mels than training."""
    mels = iter(live.mels)
    for i, trial in enumerate(trials):
        ids = made[f"ids_{i}"]
        counted, told = int((ids == audio_id).sum()), sum(published_tokens(len(clip)) for clip in trial.clips)
        if counted != told:
            lengths = ", ".join(str(len(clip)) for clip in trial.clips)
            raise ExportError(
                f"trial {i} (clips of {lengths} samples): the processor makes {counted} audio tokens, the published "
                f"formula {told}"
            )
        if ids.tolist() != trial.sample.ids.tolist():
            raise ExportError(f"trial {i}: the processor's tokens are not those of training")
        for j in range(len(trial.clips)):
            mel, ours = made[f"mel_{i}_{j}"], next(mels)
            if not torch.equal(mel, ours):
                far = float((mel - ours).abs().max()) if mel.shape == ours.shape else float("inf")
                raise ExportError(
                    f"trial {i}: its front end differs from ours by {far:g} dB; it must be equal to the bit"
                )


def demand(what: str, found: dict[str, int | float], dtype: str) -> None:
    """Raises ExportError when two models are too far apart: by largest difference in fp32, by top-1 in bf16."""
    most = MOST_DIFFERENCE * max(1.0, found["rms"])
    if dtype == "fp32" and not found["max"] <= most < math.inf:
        raise ExportError(
            f"{what}: logits differ by {found['max']:.2g} (mean {found['mean']:.2g}, root mean square of the logits "
            f"{found['rms']:.2g}, top-1 {found['top1']:.1%}); at most {most:.2g} may be: this is not the model "
            "that was trained"
        )
    if dtype == "bf16" and not found["top1"] >= LEAST_AGREEMENT:
        raise ExportError(
            f"{what}: top-1 is the same on {found['top1']:.2%} of the slots; at least {LEAST_AGREEMENT:.0%} must be"
        )
