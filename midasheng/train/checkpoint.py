"""Checkpoints to resume from: what training changes and a hash of the rest, written beside the steps, whole or not."""

from __future__ import annotations

import errno
import io
import os
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from midasheng.config import Stage, UserError
from midasheng.model import adapt
from midasheng.model.audio_lm import AudioLM
from midasheng.model.sources import part_digests
from midasheng.train import shard_files, sharded
from midasheng.train.optim import state_bytes

LAST, BEST = "last.ckpt", "best.ckpt"
# the disk, a quota or a limit lets no more be written
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
AGAIN = "Make room, or mend what is in the way, and give the same command again"
FORMAT = 2  # 1 held all weights, frozen ones too, and bore no number


class CheckpointError(UserError):
    """A checkpoint that cannot be read, does not fit the run, or could not be written."""


def full_disk(error: BaseException) -> OSError | None:
    """The error of a disk that takes nothing more, where one is behind this; a logger gives it a name of its own."""
    found: BaseException | None = error
    while found is not None and not (isinstance(found, OSError) and found.errno in FULL):
        found = found.__cause__
    return found


# -- what is in it -----------------------------------------------------------------------------------------------------


def learned(model: AudioLM, *, parameters: bool = True) -> dict[str, Tensor]:
    """What a resume cannot get anywhere else: parameters that learn, and buffers (init_bn is calibrated before step 0).
    The tensors are the model's own. `parameters`: not where they lie in shards (train/shard_files.py)."""
    kept = model.state_dict().keys()
    found = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad and parameters}
    return found | {n: b for n, b in model.named_buffers() if n in kept}


def base_digests(model: AudioLM) -> dict[str, str]:
    """Part -> hash of its tensors that a checkpoint does not hold: they come from `start` again, and must be equal."""
    held = {n.replace(".base_layer.", ".") for n in learned(model)}
    return part_digests({n: t for n, t in adapt.base_state(model, rows=False).items() if n not in held})


def _names(model: AudioLM, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Names of each group's parameters."""
    names = {id(p): n for n, p in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def optimizer_state(model: AudioLM, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state_dict with parameters under their names, not numbers."""
    saved, names = optimizer.state_dict(), _names(model, optimizer)
    by_number = dict(zip(chain.from_iterable(g["params"] for g in saved["param_groups"]), chain(*names), strict=True))
    groups = [group | {"params": n} for group, n in zip(saved["param_groups"], names, strict=True)]
    return {"state": {by_number[k]: v for k, v in saved["state"].items()}, "param_groups": groups}


def copied(value: Any) -> Any:
    """A copy on the host that the next step does not change; each tensor with memory of its own size."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, dict):
        return {key: copied(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(v) for v in value)
    return value


def size_bytes(model: AudioLM, optimizer: str) -> int:
    """What a checkpoint of this model takes on the disk, from its shapes alone, rounded up."""
    trained = [p for p in model.parameters() if p.requires_grad]
    tensors = sum(t.nbytes for t in learned(model).values()) + state_bytes(trained, optimizer)
    # of each tensor its name, its place in the file and what the archive says of it, of the model and of two moments
    return tensors + 2**20 + 4 * 2**10 * len(trained)


# -- reading it --------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    """A whole checkpoint. Raises CheckpointError for one that is damaged, or that an older version wrote."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()  # torch does not look at the checksums that it writes
        if bad:
            raise zipfile.BadZipFile(f"{bad} in it is not what was written")
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, RuntimeError, OSError) as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{path} is damaged ({path.stat().st_size:,} bytes: {why}); {instead(path)}") from None
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} was written by an older version of this code, which kept the frozen weights too: end that run "
            "with the version that began it, or train it again with FRESH=1"
        )
    if isinstance(saved["shards"], str) and saved["shards"]:
        raise CheckpointError(f"{path} was written by an older version, without hashes of its shards; {instead(path)}")
    if saved["shards"]:  # before anything of the run is touched
        shards_of(saved, path)
    return saved


def step_there(run: Path) -> int:
    """The step of a run's last checkpoint, as far as its head says; 0 where none can be read."""
    with suppress(Exception):
        return int(torch.load(run / "checkpoints" / LAST, map_location="cpu", mmap=True, weights_only=True)["step"])
    return 0


def instead(path: Path) -> str:
    """What to do where a checkpoint cannot be read."""
    best, way = path.with_name(BEST), "FRESH=1 begins anew"
    return f"`cp {best} {path}` goes on from the best one, or {way}" if best.is_file() and best != path else way


def shards_of(saved: dict[str, Any], path: Path, *, verify: bool = False) -> shard_files.Saved:
    """The shards that the checkpoint names. `verify`: they are read once more, each by one rank, and all ranks call it.
    Raises CheckpointError."""
    try:
        if verify:
            shard_files.verify(path.parent, saved["shards"])
        return shard_files.opened(path.parent, saved["shards"])
    except shard_files.ShardError as error:
        raise CheckpointError(f"{path}: {error}; {instead(path)}") from None


def restore(model: AudioLM, saved: dict[str, Any], path: Path, *, shards: bool = True) -> None:
    """Give the model back what it had learned. `shards`: also what lies in shards, whole; not where ranks will share
    the model and each reads its own. Raises CheckpointError when key sets, shapes, dtypes or the frozen rest are not
    those of the checkpoint, ShardError for shards."""
    ours, theirs = learned(model, parameters=not saved["shards"]), saved["learned"]
    if missing := sorted(ours.keys() - theirs.keys()):
        raise CheckpointError(f"{path} lacks {len(missing)} tensors that learn here, the first {missing[0]}")
    if surplus := sorted(theirs.keys() - ours.keys()):
        raise CheckpointError(f"{path} holds {len(surplus)} tensors that do not learn here, the first {surplus[0]}")
    for name, tensor in theirs.items():
        there, here = (f"{t.dtype} {tuple(t.shape)}" for t in (tensor, ours[name]))
        if there != here:
            raise CheckpointError(f"{path}: {name} is {there}, this model's {here}")
    for part, digest in base_digests(model).items():
        if saved["base"][part] != digest:
            raise CheckpointError(
                f"{path}: what is frozen in {part} is not what this run was trained on: its `start` holds other "
                "weights now. Put the former ones back, or train this stage again with FRESH=1"
            )
    with torch.no_grad():
        for name, tensor in theirs.items():
            ours[name].copy_(tensor)
    if shards and saved["shards"]:
        shard_files.restore_weights(model, shards_of(saved, path, verify=True))


def restore_optimizer(model: AudioLM, optimizer: torch.optim.Optimizer, saved: dict[str, Any], path: Path) -> None:
    """Give the optimizer back its state. Raises CheckpointError when it was over other parameters, or their state has
    another size."""
    state, names = saved["optimizer"]["state"], _names(model, optimizer)
    parameters = dict(model.named_parameters())
    if [group["params"] for group in saved["optimizer"]["param_groups"]] != names:
        raise CheckpointError(f"{path}: its optimizer holds other parameters, or in other groups, than this run's")
    if surplus := sorted(state.keys() - set(chain(*names))):
        raise CheckpointError(f"{path}: state of {surplus[0]}, which the optimizer does not hold")
    for name, of in state.items():
        moments = {k: t for k, t in flat(of) if k in ("exp_avg", "exp_avg_sq", "state1", "state2")}
        wrong = [k for k, t in moments.items() if t.shape != parameters[name].shape]
        if wrong or len(moments) != 2:
            raise CheckpointError(f"{path}: {name}: its optimizer state {wrong or sorted(of)} does not fit this run's")
    number = {name: n for n, name in enumerate(chain(*names))}
    groups = [group | {"params": [number[n] for n in group["params"]]} for group in saved["optimizer"]["param_groups"]]
    optimizer.load_state_dict({"state": {number[n]: of for n, of in state.items()}, "param_groups": groups})


def flat(state: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    """(key, value) of an optimizer's state of one parameter."""
    for key, value in state.items():
        if isinstance(value, dict):  # bitsandbytes puts its 8-bit states one deeper
            yield from flat(value)
        else:
            yield key, value


# -- writing it --------------------------------------------------------------------------------------------------------


class _Telling(io.BufferedWriter):
    """A file that remembers why it could not be written: torch says "unexpected pos" where no space was left."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """As ever."""
        try:
            return super().write(data)
        except OSError as error:
            self.error = self.error or error
            raise


def save(content: dict[str, Any], path: Path) -> int:
    """torch.save, which says why it failed. Returns the bytes. Raises OSError."""
    with _Telling(io.FileIO(path, "w")) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            raise (file.error or error) from None
        file.flush()
        return file.tell()


def write(content: dict[str, Any], folder: Path, names: Sequence[str]) -> int:
    """Write a checkpoint under these names, each all or nothing: beside, to the disk itself, and renamed. Returns its
    bytes. Raises OSError."""
    part = folder / "checkpoint.part"
    try:
        size = save(content, part)
        shard_files.sync(part)
        for name in names[1:]:
            other = folder / f"{name}.part"
            other.unlink(missing_ok=True)
            try:
                os.link(part, other)
            except OSError:  # a file system without hard links
                shutil.copyfile(part, other)
                shard_files.sync(other)
            os.replace(other, folder / name)
        os.replace(part, folder / names[0])
        shard_files.sync(folder)
    except BaseException:
        for path in folder.glob("*.part"):  # its space may be what is missing
            path.unlink(missing_ok=True)
        raise
    return size


class Pending(NamedTuple):
    """A checkpoint whose shards are being written; nothing names them yet."""

    content: dict[str, Any]  # on the first rank
    names: Sequence[str]
    written: Callable[[int], None]
    shards: str  # their folder


class Writer:
    """Writes checkpoints into a folder beside the steps that follow, one at a time; around a run, as a context.

    `beside`: files that a resume goes on with; they are brought to the disk before the checkpoint takes its place, so
    none of them is behind it. An error of the writing thread reaches the run at its next step, the next checkpoint or
    its end, as a CheckpointError.

    The first rank writes. Where ranks share the model each has its shards to write, and the checkpoint that names them
    follows when all are on the disk: what no checkpoint names is none, whoever was killed when. That they are, or that
    one could not write, all learn between the same two steps, by `votes`, which a step sums over the ranks anyway.
    """

    def __init__(self, folder: Path, beside: Sequence[Path], whole: int | None) -> None:
        self.folder, self.beside = folder, tuple(beside)
        self.whole = whole  # step of last.ckpt
        self.thread: threading.Thread | None = None
        self.failed: CheckpointError | None = None
        self.pending: Pending | None = None
        self.files: dict[str, tuple[int, str]] = {}  # of the shards that this rank has written

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        self._join()
        if error is None:
            self.check()

    def write(self, content: dict[str, Any], names: Sequence[str], written: Callable[[int], None]) -> None:
        """Begin to write `content`, which nobody may change any more; `written` is called with its bytes when it is in
        place, in the writer's thread. Only behind `wait`."""
        self._begin(int(content["step"]), partial(self._write, content, names, written))

    def write_shards(
        self, mine: shard_files.Mine | None, content: dict[str, Any], names: Sequence[str],
        written: Callable[[int], None],
    ) -> None:  # fmt: skip
        """Begin to write `mine`; the rest, for the first rank, as in `write`. Every rank calls it. Raises
        CheckpointError on all of them."""
        step, name = int(content["step"]), ""
        if sharded.here()[0] == 0:
            with self._told(step):
                name = shard_files.place(self.folder, step)
        name = self._agree(name)[0]
        self.files, self.pending = {}, Pending(content, names, written, name)
        if mine is not None:
            self._begin(step, partial(self._write_shard, self.folder / name, mine))

    @property
    def votes(self) -> tuple[float, float]:
        """Is what this rank had to write for a pending checkpoint on the disk? Could it not write?"""
        there = self.pending is not None and not (self.thread and self.thread.is_alive())
        return float(there and self.failed is None), float(self.failed is not None)

    def count(self, ready: float, failed: float) -> None:
        """What the sums of votes over the ranks ask for. Raises CheckpointError on all ranks."""
        if failed:
            self._agree()
        if ready == sharded.here()[1]:
            self._name_shards()

    def wait(self) -> None:
        """Until the checkpoint that is being written is in place; every rank calls it. Raises CheckpointError on all of
        them."""
        if self.pending is not None:
            self._name_shards()
        self._agree()

    def check(self) -> None:
        """Raises CheckpointError when this rank could not write a checkpoint."""
        if self.failed is not None:
            raise self.failed

    def no_room(self, error: OSError) -> CheckpointError:
        """A disk that takes nothing more of any other file of the run, in words."""
        return CheckpointError(f"{error.filename or self.folder.parent}: {error.strerror}; {self.former}. {AGAIN}")

    @property
    def former(self) -> str:
        """What a resume finds, for a message."""
        return f"{self.folder / LAST} of step {self.whole} is whole" if self.whole is not None else "no checkpoint yet"

    def _begin(self, step: int, work: Callable[[], None]) -> None:
        assert self.thread is None or not self.thread.is_alive(), f"step {step}: the former checkpoint is not written"

        def told() -> None:
            with self._told(step):
                work()

        self.thread = threading.Thread(target=told, name="checkpoint")
        self.thread.start()

    def _join(self) -> None:
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    @contextmanager
    def _told(self, step: int) -> Iterator[None]:
        """An error inside is one of the run."""
        try:
            yield
        except Exception as error:  # whatever it is, it must reach the run
            self.failed = CheckpointError(
                f"the checkpoint of step {step} could not be written to {self.folder}: {error}; {self.former}. {AGAIN}"
            )
            self.failed.__cause__ = error

    def _agree(self, mine: Any = None) -> list[Any]:
        """What each rank brings, once its thread is done; all call it. Raises CheckpointError on all of them when one
        could not write."""
        self._join()
        texts, values = zip(*sharded.of_all((str(self.failed or ""), mine)), strict=True)
        rank = next((n for n, text in enumerate(texts) if text), None)
        if rank is None:
            return list(values)
        if sharded.here()[0] == 0:  # the space of what is not named may be what is missing
            with suppress(Exception):
                shard_files.forget(self.folder)
        raise CheckpointError(f"rank {rank}: {texts[rank]}" if len(texts) > 1 else texts[rank]) from self.failed

    def _name_shards(self) -> None:
        """Behind the shards of all ranks: the first one writes the checkpoint. Every rank calls it."""
        self._join()
        files = self._agree(self.files)
        assert self.pending is not None
        content, names, written, folder = self.pending
        self.pending = None
        if sharded.here()[0]:
            self.whole = int(content["step"])
            return
        named = {name: list(of) for files_of_rank in files for name, of in sorted(files_of_rank.items())}
        size = sum(size for size, _ in named.values())
        content = content | {"shards": {"folder": folder, "files": named}}
        self.write(content, names, lambda rest: written(size + rest))

    def _write_shard(self, folder: Path, mine: shard_files.Mine) -> None:
        self.files = shard_files.write(folder, mine)

    def _write(self, content: dict[str, Any], names: Sequence[str], written: Callable[[int], None]) -> None:
        if content["shards"]:
            shard_files.opened(self.folder, content["shards"])  # as a resume will find them
        for path in self.beside:
            if path.is_file():
                shard_files.sync(path)
        size = write(content, self.folder, names)
        self.whole = int(content["step"])
        written(size)


@contextmanager
def handing_off(weights: Path) -> Iterator[None]:
    """Around the writing of weights/: a full disk is a CheckpointError, and half of them is taken away."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(weights.with_name(weights.name + ".part"), ignore_errors=True)
        last = weights.parent / "checkpoints" / LAST
        raise CheckpointError(f"{weights} could not be written: {error}; {last} is whole. {AGAIN}") from error


# -- before step 0 -----------------------------------------------------------------------------------------------------


def check_room(folder: Path, model: AudioLM, stage: Stage) -> str:
    """Will the disk hold what this run writes? Returns a line that says so. Raises UserError.

    A new checkpoint lies beside the former ones until it is whole, and weights/ beside the last checkpoint.
    """
    one = size_bytes(model, stage.optim.name)
    weights = sum(t.nbytes for t in chain(adapt.base_state(model).values(), adapt.lora_state(model).values()))
    need = one * (1 + stage.log.keep_best) + max(one, weights)
    there = sum(
        p.stat().st_size for sub in ("checkpoints", "weights") for p in (folder / sub).rglob("*") if p.is_file()
    )
    place = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(place).free
    if free + there < need:
        raise UserError(
            f"{folder}: checkpoints and weights/ need {need / 1e9:.2f} GB, there are {(free + there) / 1e9:.2f} GB: a "
            f"checkpoint is {one / 1e9:.2f} GB ({2 + stage.log.keep_best} of them while one is written), weights/ "
            f"{weights / 1e9:.2f} GB. Make room, or write RUNS=FOLDER on another disk"
        )
    return f"  a checkpoint takes {one / 1e9:.2f} GB, weights/ {weights / 1e9:.2f} GB; {free / 1e9:.1f} GB are free"


def settle_buckets(wrapper: DistributedDataParallel) -> None:
    """Let DDP find its final buckets of gradients before the first step.

    It puts gradients together in the order in which the first backward pass brings them, so from the second step of a
    process on it sums in another order than in the first: a run that was killed and goes on would not be bit-equal to
    one that was not. A backward pass of zeros, the same whatever the data, takes the place of the first.
    """
    from lightning.pytorch.overrides.distributed import prepare_for_backward

    trained = [p for p in wrapper.module.parameters() if p.requires_grad]
    loss = torch.stack([0 * p.sum() for p in trained]).sum()
    prepare_for_backward(wrapper, loss)
    loss.backward()
    for parameter in trained:
        parameter.grad = None
