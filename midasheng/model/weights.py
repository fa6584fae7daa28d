"""Read weights of every format, start from earlier stages, merge LoRA, hand off: strict, no tensor unaccounted for."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import is_zipfile

import torch
import torch.nn.functional as F
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from midasheng import frames
from midasheng.config import UserError
from midasheng.model.adapt import LoraPlan, base_state, kept_in, lora_state, matches
from midasheng.model.audio_lm import PARTS, AudioLM
from midasheng.model.encoder import LogMel

HEAD, EMBEDDING = "decoder.lm_head.weight", "decoder.model.embed_tokens.weight"
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


# -- reading --------------------------------------------------------------------------------------------------------


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


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of named tensors as float32: tells whether a part is still what it was."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        total.update(name.encode())
        for piece in tensor.detach().flatten().split(PIECE):  # not whole: an embedding in float32 takes gigabytes
            total.update(piece.to("cpu", torch.float32).contiguous().numpy())
    return total.hexdigest()[:16]


def part_digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Part (audio_encoder, audio_projector, decoder) -> digest."""
    return {p: digest((n, t) for n, t in tensors.items() if n.startswith(p + ".")) for p in PARTS}


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
        now = digest((n, source.read(n)) for n in source.shapes if n.startswith(part + "."))
        if now == ends["start"]:
            raise WeightsError(
                f"start: {source.where}: {part} is identical to what stage {source.record['stage']} started from, "
                "though that stage says that it trained it; train it again with FRESH=1"
            )


# -- starting -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """One origin of a stage's tensors."""

    source: Source
    take: tuple[str, ...]


def loaded_parts(starts: Sequence[Start], fresh: Sequence[str]) -> list[str]:
    """Parts that come from sources whole, none of their tensors fresh: they need no memory before they are loaded."""
    asked = [glob for start in starts for glob in start.take]
    return [p for p in PARTS if any(_reaches(g, p) for g in asked) and not any(_reaches(g, p) for g in fresh)]


def _reaches(glob: str, part: str) -> bool:
    """May the glob match a tensor of the part? By what stands before its first wildcard."""
    start = re.split(r"[*?\[]", glob, maxsplit=1)[0]
    return (part + ".").startswith(start) or start.startswith(part + ".")


def load(
    model: AudioLM, starts: Sequence[Start], fresh: Sequence[str], *, merge_lora: bool, precision: str = "fp32"
) -> list[tuple[str, str, int]]:
    """Give every tensor of a model without LoRA its one origin. Returns the table (origin, part, tensors).

    Loaded parameters are made anew, one after the other, each in the dtype that it is kept in (adapt.kept_in), so a
    model whose parameters have no memory yet takes little more than its weights. `merge_lora`: the LoRA of a source is
    added to the weights it adapts, in float32.
    Raises WeightsError when a tensor has no origin or two, when a source lacks, adds or misshapes one, or holds one
    that is no float16, bfloat16 or float32, and when its config says that it computes something else.
    """
    wanted = base_state(model)
    tied = model.decoder.config.tie_word_embeddings
    origins: dict[str, list[str]] = {name: [] for name in wanted}
    for start in starts:
        for name in wanted:
            if matches(name, start.take):
                origins[name].append(start.source.where)
    for glob in fresh:
        if not any(fnmatchcase(name, glob) for name in wanted):
            raise WeightsError(f"fresh: `{glob}` matches no tensor")
    for name in wanted:
        if matches(name, fresh):
            origins[name].append("fresh")
    none = [n for n, o in origins.items() if not o]
    if none:
        raise WeightsError(f"{len(none)} tensors have no origin, the first {none[0]}: name it in `start` or `fresh`")
    two = [n for n, o in origins.items() if len(o) > 1]
    if two:
        raise WeightsError(f"{len(two)} tensors have two origins, the first {two[0]}: {' and '.join(origins[two[0]])}")

    for start in starts:
        source = start.source
        for glob in start.take:
            if not any(fnmatchcase(name, glob) for name in wanted):
                raise WeightsError(f"start: take `{glob}` from {source.where} matches no tensor of the model")
        taken = {n for n in wanted if matches(n, start.take)}
        offered = {n for n in source.shapes if matches(n, start.take)}
        if tied and HEAD in offered:
            offered.remove(HEAD)
            if EMBEDDING in offered and not torch.equal(source.read(HEAD), source.read(EMBEDDING)):
                raise WeightsError(
                    f"start: {source.where} has a head of its own, this model ties it to the embedding; write "
                    "model.decoder.fields.tie_word_embeddings: false"
                )
        if missing := sorted(taken - offered):
            raise WeightsError(f"start: {source.where} lacks {len(missing)} tensors, the first {missing[0]}")
        if surplus := sorted(offered - taken):
            raise WeightsError(
                f"start: {source.where} holds {len(surplus)} tensors that this model has no place for, the first "
                f"{surplus[0]}; is SCALE the one they were made for?"
            )
        for name in sorted(taken):
            if source.shapes[name] != tuple(wanted[name].shape):
                raise WeightsError(
                    f"start: {source.where}: {name} is {source.shapes[name]}, this model wants "
                    f"{tuple(wanted[name].shape)}"
                )
        check_config(model, source, taken)
        if not tied and {HEAD, EMBEDDING} <= taken and _same(source.read(HEAD), source.read(EMBEDDING)):
            raise WeightsError(
                f"start: {source.where} ties its head to the embedding, this model has one of its own; write "
                "model.decoder.fields.tie_word_embeddings: true"
            )
        merged = _lora_deltas(source) if merge_lora else {}
        for name in sorted(taken):
            tensor = source.read(name)
            # init_bn's counter is cast along with the rest in some files, and nothing reads it
            good = FLOATS if wanted[name].is_floating_point() else (wanted[name].dtype, *FLOATS)
            if tensor.dtype not in good:
                raise WeightsError(
                    f"start: {source.where}: {name} is {tensor.dtype}, this model wants {' or '.join(map(str, good))}; "
                    "quantised weights cannot be trained on: take the original ones"
                )
            if name in merged:
                tensor = tensor.float() + merged[name]
            _set(model, name, tensor, precision)
    model.decoder.tie()

    table: dict[tuple[str, str], int] = {}
    for name, (origin,) in origins.items():
        table[origin, name.split(".")[0]] = table.get((origin, name.split(".")[0]), 0) + 1
    return [(origin, part, count) for (origin, part), count in table.items()]


def _same(head: Tensor, embedding: Tensor) -> bool:
    """Equal? By a few rows first: nearly always those say no, and the rest need not be read."""
    return torch.equal(head[:64], embedding[:64]) and torch.equal(head, embedding)


def _set(model: AudioLM, name: str, tensor: Tensor, precision: str) -> None:
    place, _, leaf = name.rpartition(".")
    owner = model.get_submodule(place)
    old = getattr(owner, leaf)
    with torch.no_grad():
        if isinstance(old, nn.Parameter):
            # never the tensor itself, which is the file mapped into memory: it would change when the file does
            new = torch.empty(old.shape, dtype=kept_in(old, precision)).copy_(tensor)
            setattr(owner, leaf, nn.Parameter(new, requires_grad=old.requires_grad))
        else:
            old.copy_(tensor)


# -- the config of a source -------------------------------------------------------------------------------------------

NO_EFFECT = {  # on what is computed here; the head's tie is read from the tensors, sizes are too
    "attention_dropout", "bos_token_id", "eos_token_id", "initializer_range", "max_window_layers", "pad_token_id",
    "pretraining_tp", "tie_word_embeddings", "use_cache", "use_sliding_window", "vocab_size",
}  # fmt: skip
OMNI_IS = {"qwen2_5_omni_text": "qwen2"}  # the same arithmetic, as text and audio share their three rotary rows
FRONT = {  # what this encoder is built for, by the released model's names and Dasheng's
    "n_fft": frames.N_FFT, "win_length": frames.N_FFT, "win_size": frames.N_FFT, "hop_length": frames.HOP,
    "hop_size": frames.HOP, "n_mels": frames.N_MELS, "f_min": 0, "f_max": 8000, "center": True,
    "sample_rate": frames.SAMPLE_RATE, "sampling_rate": frames.SAMPLE_RATE, "top_db": 120, "qkv_bias": True,
    "init_values": None, "input_channels": 1, "patch_size": [frames.N_MELS, frames.PATCH],
    "patch_stride": [frames.N_MELS, frames.PATCH],
}  # fmt: skip


def check_config(model: AudioLM, source: Source, taken: Collection[str]) -> None:
    """Raises WeightsError when the source's config says that its weights, which fit, compute something else in the
    parts that are taken: other rotary angles, norms, heads, activations, mel front end."""
    found: list[tuple[str, object, object, str]] = []
    if any(name.startswith("decoder.") for name in taken):
        found += _text_differences(model, source)
    if any(name.startswith("audio_encoder.") for name in taken):
        found += _encoder_differences(model, source)
    stack = source.config.get("subsample_factor", frames.STACK)
    if stack != frames.STACK and any(name.startswith("audio_projector.") for name in taken):
        found.append(("subsample_factor", stack, frames.STACK, ""))
    for name, theirs, ours, key in found:
        write = f"write {key}: {json.dumps(theirs, default=str)[:200]}" if key else "such a model cannot be built here"
        raise WeightsError(
            f"start: {source.where}: its config.json has {name} {str(theirs)[:200]}, this model {str(ours)[:200]}. The "
            f"weights fit, but would compute something else; {write}"
        )


def _text_differences(model: AudioLM, source: Source) -> Iterator[tuple[str, object, object, str]]:
    """(field, theirs, ours, key to write) of the decoder; what the source does not say is transformers' default."""
    from transformers import AutoConfig

    inner = source.config.get("thinker_config", source.config)
    text = inner.get("text_config", inner)
    ours = model.decoder.config
    if not text.get("model_type") and text is source.config:  # no model's config
        return
    family = text.get("model_type", ours.model_type)
    if OMNI_IS.get(family, family) != OMNI_IS.get(ours.model_type, ours.model_type):
        yield "model_type", family, ours.model_type, "model.decoder.architecture"
        return
    try:
        theirs = AutoConfig.for_model(family, **{k: v for k, v in text.items() if k != "model_type"})
    except Exception as error:  # transformers' checks raise whatever they like
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(f"start: {source.where}: config.json is none of a {family}: {reason}") from None
    there, here = _changes_results(theirs), _changes_results(ours)
    for name in sorted(there.keys() | here.keys()):
        in_both = name in there and name in here
        if (in_both or name.startswith("rope_parameters.")) and not _equal(there.get(name), here.get(name)):
            yield name, there.get(name), here.get(name), f"model.decoder.fields.{name}"


def _equal(theirs: object, ours: object) -> bool:
    """As float32 they are: a config that was read from one writes 1e-5 as 9.999999747378752e-06."""
    if isinstance(theirs, float) and isinstance(ours, float):
        return math.isclose(theirs, ours, rel_tol=1e-6)
    return theirs == ours


def _changes_results(config: Any) -> dict[str, Any]:
    """Fields of a text model's config that its results depend on, those of its rotary positions one by one."""
    from transformers import PretrainedConfig

    skipped = NO_EFFECT | set(PretrainedConfig().to_dict())
    fields = {name: value for name, value in config.to_dict().items() if name not in skipped}
    rope = dict(fields.pop("rope_parameters", None) or {})
    if rope.get("rope_type") in ("default", "mrope", None):  # mrope: the same angles where the three rows are equal
        rope["rope_type"] = "default"
        fields.pop("max_position_embeddings", None)
    if rope.get("partial_rotary_factor") == 1.0:
        del rope["partial_rotary_factor"]
    rest = {k: v for k, v in rope.items() if k not in ("type", "mrope_section") and v is not None}
    return fields | {f"rope_parameters.{name}": value for name, value in rest.items()}


def _encoder_differences(model: AudioLM, source: Source) -> Iterator[tuple[str, object, object, str]]:
    """(field, theirs, ours, key to write, "" where there is none) of the encoder; only what the source says."""
    dasheng = source.config.get("model_type") == "dasheng"
    theirs = source.config.get("audio_encoder_config", {})
    if dasheng:  # of the hub: sizes stand in encoder_kwargs
        theirs = source.config | source.config.get("encoder_kwargs", {})
    shape = model.audio_encoder.shape
    ours: dict[str, tuple[object, str]] = {
        "embed_dim": (shape.dim, "model.encoder.dim"), "depth": (shape.depth, "model.encoder.depth"),
        "num_heads": (shape.heads, "model.encoder.heads"), "mlp_ratio": (shape.mlp_ratio, ""),
        **{name: (value, "") for name, value in FRONT.items()},
    }  # fmt: skip
    if not dasheng:  # Dasheng's position embedding is brought to the length
        ours["target_length"] = (frames.CHUNK * frames.PATCH, "")
    for name, (value, key) in ours.items():
        if name not in theirs:
            continue
        said = list(theirs[name]) if isinstance(theirs[name], tuple) else theirs[name]
        if said != value:
            yield name, said, value, key


def _lora_deltas(source: Source) -> dict[str, Tensor]:
    """Weight name -> scaled B A of the source's LoRA, float32."""
    if source.lora_plan is None:
        return {}
    scale = source.lora_plan.alpha / source.lora_plan.rank
    deltas = {}
    for name, a in source.lora.items():
        if name.endswith(".lora_A.weight"):
            b = source.lora[name.replace(".lora_A.", ".lora_B.")]
            deltas[name.replace(".lora_A.weight", ".weight")] = scale * (b.float() @ a.float())
    return deltas


def carry_lora(model: AudioLM, source: Source, plan: LoraPlan | None) -> int:
    """Copy the source's LoRA into the model's, which may adapt more layers. Returns the number of layers carried.

    Raises WeightsError when some of it would be lost or would act differently; `lora.inherit: merge` is the way then.
    """
    if source.lora_plan is None:
        return 0
    old = source.lora_plan
    way = "; write lora.inherit: merge to add the old LoRA to the weights instead"
    if plan is None:
        raise WeightsError(f"start: {source.where} comes with LoRA, but this stage has no lora.targets{way}")
    if (old.rank, old.alpha / old.rank) != (plan.rank, plan.alpha / plan.rank):
        raise WeightsError(
            f"start: LoRA of {source.where} has rank {old.rank}, alpha {old.alpha:g}; this stage rank {plan.rank}, "
            f"alpha {plan.alpha:g}: it cannot be carried over{way}"
        )
    own = {n.replace(".default.", "."): p for n, p in model.named_parameters() if ".lora_" in n}
    if lost := sorted(set(source.lora) - set(own)):
        layer = lost[0].split(".lora_")[0]
        raise WeightsError(f"start: {source.where} adapts {layer}, which lora.targets leaves out{way}")
    with torch.no_grad():
        for name, tensor in source.lora.items():
            own[name].copy_(tensor)
    return len(source.lora) // 2


def check_tokenizer(start: Start, fingerprint: str) -> None:
    """Raises WeightsError when decoder weights of ours were made under another tokenizer than the one in use."""
    made_under = start.source.record.get("tokenizer", fingerprint)
    if made_under != fingerprint and matches("decoder.model.embed_tokens.weight", start.take):
        raise WeightsError(
            f"start: the decoder of {start.source.where} was trained with another tokenizer ({made_under}) than "
            f"tokenizer.path holds now ({fingerprint}); restore it, or train those weights again with FRESH=1"
        )


# -- handing off ----------------------------------------------------------------------------------------------------


def released_config(model: AudioLM, audio_ids: Mapping[str, int]) -> dict[str, Any]:
    """config.json in the layout of the released MiDashengLM. `audio_ids`: audio_token_id, as released, and beside it
    audio_bos_token_id and audio_eos_token_id, since a decoder may have other names for these tokens."""
    shape = model.audio_encoder.shape
    return {
        "model_type": "midashenglm",
        "architectures": ["MiDashengLMModel"],
        "subsample_factor": 5,
        **audio_ids,
        "audio_encoder_config": {
            "model_type": "midashenglm_dasheng_encoder", "embed_dim": shape.dim, "depth": shape.depth,
            "num_heads": shape.heads, "mlp_ratio": shape.mlp_ratio, "n_fft": 512, "win_length": 512, "hop_length": 160,
            "n_mels": 64, "f_min": 0, "f_max": 8000, "center": True, "sample_rate": 16000, "target_length": 1008,
            "qkv_bias": True, "init_values": None, "drop_rate": 0.0, "attn_drop_rate": 0.0, "input_channels": 1,
            "patch_size": [64, 4], "patch_stride": [64, 4],
        },
        "text_config": model.decoder.config.to_diff_dict(),
    }  # fmt: skip


def hand_off(
    model: AudioLM, folder: Path, record: dict[str, Any], plan: LoraPlan | None, *, start_digests: dict[str, str],
    audio_ids: Mapping[str, int], save_tokenizer: Callable[[Path], None],
) -> dict[str, Any]:  # fmt: skip
    """Write weights/: model*.safetensors under released names, adapter/ in peft's format, tokenizer, config.json and
    stage.json. All or nothing: written beside and renamed. Returns stage.json's content.

    Raises AssertionError when a part that was trained is bit-identical to what it started from, or LoRA has no effect.
    """
    base = {n: t.cpu().contiguous() for n, t in base_state(model).items()}
    trained = {p: any(q.requires_grad for q in getattr(model, p).parameters()) for p in PARTS}
    ends = part_digests(base)
    # LoRA trains the decoder without changing its base
    full = {p: trained[p] and not (p == "decoder" and plan is not None) for p in PARTS}
    for part in PARTS:
        assert not full[part] or ends[part] != start_digests[part], f"{part} was trained but did not change"
    if plan is not None:  # a fresh B is zero, and LoRA without effect
        moved = any(bool(t.any()) for n, t in lora_state(model).items() if n.endswith(".lora_B.weight"))
        assert moved, "LoRA was trained but every B is still zero"
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_torch_state_dict(base, temporary, max_shard_size="5GB")
    if plan is not None:
        _save_adapter(model, temporary / "adapter", plan)
    save_tokenizer(temporary)
    config = json.dumps(released_config(model, audio_ids), indent=2, default=str)
    (temporary / "config.json").write_text(config + "\n", encoding="utf-8")
    files = sorted(p for p in temporary.rglob("*") if p.is_file())
    for path in files:
        path.chmod(0o644)  # safetensors writes 0600; the next stage may be another user's
    record = record | {
        "parts": {p: {"trained": full[p], "start": start_digests[p], "end": ends[p]} for p in PARTS},
        "sha256": {str(p.relative_to(temporary)): sha256_file(p) for p in files},
    }
    (temporary / "stage.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    return record


def _save_adapter(model: AudioLM, folder: Path, plan: LoraPlan) -> None:
    """peft's own layout, for the whole released model: PeftModel.from_pretrained reads it."""
    folder.mkdir()
    state = {f"base_model.model.{n}": t.cpu().contiguous() for n, t in lora_state(model).items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    layers = sorted({n.removeprefix("base_model.model.").split(".lora_")[0] for n in state})
    config = {
        "peft_type": "LORA", "task_type": None, "r": plan.rank, "lora_alpha": plan.alpha, "lora_dropout": plan.dropout,
        "target_modules": layers, "bias": "none", "inference_mode": True, "base_model_name_or_path": None,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
