"""The weights once a node: its first process builds the model, and all of its processes map one file of it.

Where ranks share the model each needs a part of it, and could say which only when it has the whole. So that a node does
not hold as many copies as it has processes, a file on its own disk is what they have in common: pages that one of them
has read are those of all, and nobody's own memory. It is gone as soon as all have it open, and what is mapped is gone
once the model is shared.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from midasheng.config import UserError
from midasheng.data.loader import give_back_freed_memory
from midasheng.model import weights
from midasheng.model.audio_lm import AudioLM
from midasheng.train import checkpoint
from midasheng.train.world import World

PREFIX = "midasheng-weights-"
LINE = 4 * 2**10  # bytes of a tensor beside its content: its name, its place in the file, what the archive says of it


def fill(model: AudioLM, build: Callable[[], tuple[AudioLM, str]], ranks: World) -> str:
    """Give a model without memory the weights of what `build` makes, which is called by the first process of each node
    alone; every rank calls this. Parameters lie in a file that is mapped, buffers in memory of their own. Returns what
    `build` said, "" where another process called it. Raises UserError."""
    text, path = "", ""
    with contextlib.ExitStack() as until_all_have_it:
        if ranks.rank == ranks.builder:
            _forget(place())
            check_room(model)  # before what may take minutes
            path = str(until_all_have_it.enter_context(_temporary()))
            text = _written(Path(path), build)
            give_back_freed_memory()
        # as long as a builder lives it may take its time; one that fails or dies ends the others here
        told = ranks.gather("the weights", path, for_ever=True)
        take(model, Path(told[ranks.builder]))
        ranks.gather("the weights, mapped")
    return text


# -- the file ----------------------------------------------------------------------------------------------------------


def place() -> Path:
    """The folder for it. Not tempfile's, which goes elsewhere without a word where TMPDIR is missing or full. Raises
    UserError."""
    folder = Path(os.environ.get("TMPDIR") or "/tmp")
    if not folder.is_dir():
        raise UserError(f"TMPDIR is {folder}, which is no folder; set it to one on a disk of this node")
    return folder


def check_room(model: AudioLM) -> str:
    """Will the folder hold the weights? Returns a line that says so. Raises UserError."""
    folder = place()
    tensors = [*model.parameters(), *model.buffers()]
    need, free = sum(t.nbytes + LINE for t in tensors), shutil.disk_usage(folder).free
    if free < need:
        raise UserError(
            f"{folder}: the weights need {need:,} bytes there while ranks that share them start, {free:,} are free; "
            "make room, or set TMPDIR to a folder on another disk of this node"
        )
    return f"  weights are read once a node, through {folder}: {need / 1e9:.2f} GB there, {free / 1e9:.1f} GB are free"


@contextlib.contextmanager
def _temporary() -> Iterator[Path]:
    """A file that is gone afterwards; until then it is locked, by a process that lives."""
    while True:
        handle, path = tempfile.mkstemp(prefix=PREFIX, dir=place())
        fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:  # else another start has taken it, not yet locked, for one that was left
            break
        os.close(handle)
    try:
        yield Path(path)
    finally:
        Path(path).unlink(missing_ok=True)
        os.close(handle)


def _forget(folder: Path) -> None:
    """Remove what processes that were killed have left."""
    for path in folder.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), path.open("rb") as file:  # in use, another user's, or gone by now
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _written(path: Path, build: Callable[[], tuple[AudioLM, str]]) -> str:
    """What `build` makes goes into the file, and nothing of it is left in memory; returns what it said."""
    model, text = build()
    about = described(model)
    tensors = {n: t.detach() for n, t in named(model).items() if about[n][0] == n}
    try:
        checkpoint.save({"about": about, "tensors": tensors}, path)
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}: the weights could not be written there, from where the processes of this "
            "node take them; make room, or set TMPDIR to a folder on another disk of this node"
        ) from error
    del model, tensors
    gc.collect()
    return text


# -- the model ---------------------------------------------------------------------------------------------------------


def named(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of a model, buffers that no state dict holds too; one that has two names under both."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def described(model: nn.Module) -> dict[str, tuple[str, bool, bool, str, tuple[int, ...]]]:
    """Name -> (first name of the same tensor, is it a parameter, does it learn, dtype, shape)."""
    first: dict[int, str] = {}
    return {
        n: (first.setdefault(id(t), n), isinstance(t, nn.Parameter), t.requires_grad, str(t.dtype), tuple(t.shape))
        for n, t in named(model).items()
    }


@torch.no_grad()
def take(model: AudioLM, path: Path) -> None:
    """Let a model's tensors be those of a file, its ties and what learns as where that was made. A parameter's pages
    are read when they are needed; a process that writes into one has a copy. Raises UserError; AssertionError where the
    model is another one."""
    try:
        found: dict[str, Any] = torch.load(path, mmap=True, weights_only=True)
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}: the first process of this node has put the weights there for all of them; set "
            "TMPDIR to a folder on a disk of this node that they all see"
        ) from None
    about = found["about"]
    _hold_to(about, model)
    first: dict[str, Tensor] = {}
    for name, (same, is_parameter, learns, *_) in about.items():
        if not is_parameter:
            model.get_buffer(name).copy_(found["tensors"][same])
            continue
        if same == name:
            first[name] = nn.Parameter(found["tensors"][name], learns)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, first[same])
    _hold_to(about, model)
    weights.check_memory(model)


def _hold_to(about: dict[str, Any], model: AudioLM) -> None:
    here = described(model)
    other = next((n for n in {**about, **here} if about.get(n) != here.get(n)), None)
    assert other is None, f"{other} is {about.get(other)} where it was built, {here.get(other)} here"
