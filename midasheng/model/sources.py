"""Open weights of every format under released names: a Source says what is there, and reads a tensor when asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from midasheng import frames
from midasheng.config import UserError
from midasheng.model.adapt import LoraPlan, matches
from midasheng.model.audio_lm import PARTS
from midasheng.model.encoder import LogMel

TIME = "audio_encoder.time_pos_embed"
FRONT_END = "audio_encoder.front_end."  # two buffers of the 0804-fp32 release that are computed here
INDEX = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PIECE = 2**24  # elements that are hashed at a time


class WeightsError(UserError):
    """Weights that are missing, damaged, of another stage, or do not fit; the message says which and what to do."""


@dataclass(frozen=True)
class Source:
    """Weights to start from, under released names. `read` maps a name to its tensor."""

    where: str
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    lora: dict[str, Tensor] = field(default_factory=dict)
    lora_plan: LoraPlan | None = None
    record: dict[str, Any] = field(default_factory=dict)  # stage.json, when one of our stages made them
    config: dict[str, Any] = field(default_factory=dict)  # config.json, or the config of a Dasheng .pt; {} for none
    note: str = ""  # what was done to its tensors, for the table of origins


def open_source(path: str, instead: str = "another path") -> Source:
    """Open weights: a run folder or its weights/ folder, a Dasheng .pt, a folder with safetensors in the released or in
    transformers' layout, or a hub id. Nothing is unpickled but tensors and plain values. `instead`: what to write where
    there is nothing. Raises WeightsError."""
    local = Path(path)
    if local.is_file() and local.suffix == ".pt":
        return _dasheng(local)
    if local.is_file():
        raise WeightsError(f"start: {path} is a file; write the folder that it lies in (only Dasheng's own is one .pt)")
    if not local.exists():
        if path.count("/") == 1 and not path.startswith((".", "/", "data/", "runs/")):
            return _hub(path, instead)
        raise WeightsError(f"start: {path} does not exist; write {instead}")
    folder = local / "weights" if (local / "weights").is_dir() else local
    if (folder / "stage.json").is_file():
        return _handed_off(folder)
    if (local / "config.yaml").is_file():
        raise WeightsError(f"start: the run {path} is not finished (it has no weights/ yet); finish it first")
    return _safetensors(folder)


def _hub(name: str, instead: str) -> Source:
    try:
        cached = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:  # huggingface_hub's errors are all one or the other
        reason = " ".join(str(error).split())[:300]
        raise WeightsError(
            f"start: {name} is no folder here, and the hub does not give it; write {instead} ({reason})"
        ) from None
    if not list(cached.glob("model*.safetensors")):
        raise WeightsError(f"start: {name} on the hub has no model*.safetensors; its other files are not read")
    return _safetensors(cached)


def released_name(name: str) -> str:
    """Name of a tensor of transformers' or Dasheng's layout in the released layout; others pass unchanged.

    Qwen2.5-Omni: thinker.model.X (transformers 4) and thinker.model.language_model.X (5); text models: model.X. Its
    other towers, model.audio_tower.X and model.visual.X in 5, are not the decoder's.
    """
    name = name.removeprefix("thinker.")
    if name.startswith(("model.language_model.", "language_model.")):
        return "decoder.model." + name.split("language_model.", 1)[1]
    if name.startswith("model.") and not name.startswith(("model.audio_tower.", "model.visual.")):
        return "decoder." + name
    if name.startswith("lm_head."):
        return "decoder." + name
    if name.startswith("encoder."):  # Hugging Face dasheng-*
        return "audio_" + name.replace("encoder.init_bn.1.", "encoder.init_bn.")
    return name


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"start: {path} cannot be read as JSON ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise WeightsError(f"start: {path} holds no JSON object; copy it again")
    return content


def _safetensors(folder: Path) -> Source:
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        if pickled := sorted(p.name for glob in PICKLED for p in folder.glob(glob)):
            raise WeightsError(
                f"start: {folder} holds {pickled[0]} and no safetensors. A pickle can run code when it is read, so it "
                "is not; write it again as safetensors where you trust it: model.save_pretrained(FOLDER)"
            )
        raise WeightsError(f"start: {folder} holds neither stage.json nor model*.safetensors")
    listed = _listed(folder, files) if (folder / INDEX).is_file() else None  # stored name -> file name
    place: dict[str, tuple[Path, str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    front_end: dict[str, Tensor] = {}
    note = ""
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                stored_names = set(opened.keys())
                if listed is not None:
                    _check_listed(file, stored_names, listed)
                for stored in sorted(stored_names):
                    name = released_name(stored)
                    if name.startswith(FRONT_END):
                        front_end[name] = opened.get_tensor(stored)
                        continue
                    if _of_dasheng(stored) and name.startswith("audio_encoder.outputlayer"):
                        continue
                    if name in place:
                        raise WeightsError(f"start: {folder}: {name} is there twice")
                    place[name] = (file, stored)
                    shapes[name] = tuple(opened.get_slice(stored).get_shape())
        except SafetensorError as error:
            raise WeightsError(f"start: {file} cannot be read ({error}); copy it again") from None
    if TIME in place and _of_dasheng(place[TIME][1]):
        shapes[TIME], note = _resized(shapes[TIME])
    _check_front_end(str(folder), front_end)

    def read(name: str) -> Tensor:
        file, stored = place[name]
        with safe_open(file, "pt") as opened:  # opened for each, so that no more than one tensor is mapped
            tensor: Tensor = opened.get_tensor(stored)
        return _at_chunk(tensor) if name == TIME and _of_dasheng(stored) else tensor

    config = _json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return Source(str(folder), shapes, read, config=config, note=note)


def _listed(folder: Path, files: Sequence[Path]) -> dict[str, str]:
    """The index: stored name -> file name; every file that it names and no other must be there."""
    listed = _json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict):
        raise WeightsError(f"start: {folder / INDEX} holds no weight_map; copy it again")
    there, named = {f.name for f in files}, set(map(str, listed.values()))
    if missing := sorted(named - there):
        raise WeightsError(f"start: {folder}: {INDEX} names {missing[0]}, which is not there")
    if stray := sorted(there - named):
        raise WeightsError(f"start: {folder} holds {stray[0]}, which {INDEX} does not name; take one of them away")
    return {str(name): str(file) for name, file in listed.items()}


def _check_listed(file: Path, stored: Collection[str], listed: dict[str, str]) -> None:
    expected = {name for name, where in listed.items() if where == file.name}
    if missing := sorted(expected - set(stored)):
        raise WeightsError(f"start: {file} does not hold {missing[0]}, though {INDEX} says so; copy both again")
    if surplus := sorted(set(stored) - expected):
        raise WeightsError(f"start: {file} holds {surplus[0]}, which {INDEX} does not place there; copy both again")


def _of_dasheng(stored: str) -> bool:
    return stored.startswith("encoder.")  # Hugging Face dasheng-*


def _resized(shape: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
    """(shape at CHUNK positions, what that takes in words); other than (1, dim, 1, positions) is left to be refused."""
    if len(shape) != 4 or shape[2] != 1 or shape[3] == frames.CHUNK:
        return shape, ""
    done = "cropped" if shape[3] > frames.CHUNK else "interpolated"
    return (*shape[:3], frames.CHUNK), f"{TIME} {done} from {shape[3]} to {frames.CHUNK} positions, as Dasheng does"


def _at_chunk(embed: Tensor) -> Tensor:
    """Dasheng's position embedding (1, E, 1, positions) at CHUNK positions, as change_pos_embedding in dasheng."""
    if embed.ndim != 4 or embed.shape[2] != 1 or embed.shape[3] == frames.CHUNK:
        return embed
    if embed.shape[3] > frames.CHUNK:
        return embed[..., : frames.CHUNK]
    return F.interpolate(embed, size=(1, frames.CHUNK), mode="bilinear", align_corners=False)


def _check_front_end(where: str, stored: dict[str, Tensor]) -> None:
    """Stored tables of the mel front end must be those that are computed here, under released names."""
    window, bank = LogMel().tables(torch.device("cpu"))
    ours = {FRONT_END + "0.mel_scale.fb": bank, FRONT_END + "0.spectrogram.window": window}
    for name, table in stored.items():
        if name not in ours:
            raise WeightsError(f"start: {where} holds {name}, which this front end does not have")
        rounding = 1e-6 if table.dtype == torch.float32 else 4e-3
        if table.shape != ours[name].shape or not torch.allclose(table.float(), ours[name], rtol=0, atol=rounding):
            raise WeightsError(f"start: {where}: {name} is not the table of this front end; its features would differ")


def _dasheng(path: Path) -> Source:
    """Dasheng's own checkpoint {"model", "config"}."""
    try:
        # not through the dasheng package: it leaves to torch's default, and so to the environment, what is unpickled
        dumped = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
        tensors, config = dumped["model"], dict(dumped["config"])
        stored = {f"audio_encoder.{n.replace('init_bn.1.', 'init_bn.')}": t for n, t in tensors.items()}
        shapes = {n: tuple(t.shape) for n, t in stored.items()}
    except UnpicklingError:
        raise WeightsError(
            f"start: {path} is no Dasheng checkpoint: it holds something else than tensors and plain values, and "
            "reading that could run code"
        ) from None
    except (RuntimeError, AttributeError, KeyError, TypeError, ValueError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise WeightsError(f"start: {path} is no Dasheng checkpoint: {reason}") from None
    _check_front_end(str(path), {n: t for n, t in stored.items() if n.startswith(FRONT_END)})
    kept = {n: s for n, s in shapes.items() if not n.startswith((FRONT_END, "audio_encoder.outputlayer"))}
    note = ""
    if TIME in kept:
        kept[TIME], note = _resized(kept[TIME])

    def read(name: str) -> Tensor:
        return _at_chunk(stored[name]) if name == TIME else stored[name]

    return Source(str(path), kept, read, config={"model_type": "dasheng", **config}, note=note)


def sha256_file(path: Path) -> str:
    """Hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(names: Iterable[str], read: Callable[[str], Tensor]) -> str:
    """Hash of named tensors as float32: tells whether a part is still what it was. Holds one of them at a time."""
    total = hashlib.sha256()
    for name in sorted(names):
        total.update(name.encode())
        for piece in read(name).detach().flatten().split(PIECE):  # not whole: an embedding in float32 takes gigabytes
            total.update(piece.to("cpu", torch.float32).contiguous().numpy())
    return total.hexdigest()[:16]


def part_digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Part (audio_encoder, audio_projector, decoder) -> digest."""
    return digests_of_parts(tensors, tensors.__getitem__)


def digests_of_parts(names: Collection[str], read: Callable[[str], Tensor]) -> dict[str, str]:
    """The same of tensors that are read one after the other."""
    return {p: digest((n for n in names if n.startswith(p + ".")), read) for p in PARTS}


def _handed_off(folder: Path) -> Source:
    """weights/ of one of our stages: files must be those that stage.json lists, to the bit."""
    record = _json(folder / "stage.json")
    for name, expected in record["sha256"].items():
        if not (folder / name).is_file():
            raise WeightsError(f"start: {folder / name} is missing; stage.json lists it")
        if sha256_file(folder / name) != expected:
            raise WeightsError(
                f"start: {folder / name} is not the file that stage.json describes (its sha256 differs): it was "
                "changed or damaged; train that stage again with FRESH=1"
            )
    for file in sorted(folder.rglob("*.safetensors")):
        if str(file.relative_to(folder)) not in record["sha256"]:
            raise WeightsError(f"start: {file} is not of this run: stage.json does not list it; take it away")
    base = _safetensors(folder)
    adapter = folder / "adapter"
    if not adapter.is_dir():
        return replace(base, record=record)
    config = json.loads((adapter / "adapter_config.json").read_text())
    plan = LoraPlan(tuple(config["target_modules"]), config["r"], config["lora_alpha"], config["lora_dropout"])
    prefix = "base_model.model."
    lora = {n.removeprefix(prefix): t for n, t in load_file(adapter / "adapter_model.safetensors").items()}
    return replace(base, lora=lora, lora_plan=plan, record=record)


def check_stage(source: Source, wanted: str) -> None:
    """Raises WeightsError unless `source` was made by stage `wanted` and what it says it trained has changed."""
    stage = source.record.get("stage")
    if stage != wanted:
        raise WeightsError(
            f"start: {source.where} holds weights of stage {stage or 'unknown (no stage.json)'}, but `{wanted}` is "
            "asked for"
        )


def check_learned(source: Source, take: Sequence[str]) -> None:
    """Raises WeightsError when a part that the source says it trained is identical to what it started from.

    The part is hashed again here, so a weights/ folder assembled by hand is seen too.
    """
    for part, ends in source.record.get("parts", {}).items():
        if not ends["trained"] or not any(matches(n, take) for n in source.shapes if n.startswith(part + ".")):
            continue
        now = digest((n for n in source.shapes if n.startswith(part + ".")), source.read)
        if now == ends["start"]:
            raise WeightsError(
                f"start: {source.where}: {part} is identical to what stage {source.record['stage']} started from, "
                "though that stage says that it trained it; train it again with FRESH=1"
            )
