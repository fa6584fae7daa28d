"""Read weights of every format, start from earlier stages, merge LoRA, hand off: strict, no tensor unaccounted for."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from midasheng.config import UserError
from midasheng.model.adapt import LoraPlan, base_state, lora_state, matches
from midasheng.model.audio_lm import AudioLM

PARTS = ("audio_encoder", "audio_projector", "decoder")
HEAD, EMBEDDING = "decoder.lm_head.weight", "decoder.model.embed_tokens.weight"
FRONT_END = "audio_encoder.front_end."  # two buffers of the 0804-fp32 release that are computed here


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


# -- reading --------------------------------------------------------------------------------------------------------


def open_source(path: str) -> Source:
    """Open weights: a run folder or its weights/ folder, a Dasheng .pt, a folder with safetensors in the released or in
    transformers' layout, or a hub id. Raises WeightsError."""
    local = Path(path)
    if local.is_file() and local.suffix == ".pt":
        return _dasheng(local)
    if not local.exists():
        if path.count("/") == 1 and not path.startswith((".", "/", "data/", "runs/")):
            try:
                cached = snapshot_download(path, allow_patterns=["*.json", "*.safetensors"])
            except (OSError, ValueError) as error:  # huggingface_hub's errors are all one or the other
                reason = " ".join(str(error).split())[:300]
                raise WeightsError(f"start: {path} is no folder here, and the hub does not give it: {reason}") from None
            return _safetensors(Path(cached))
        raise WeightsError(f"start: {path} does not exist")
    folder = local / "weights" if (local / "weights").is_dir() else local
    if (folder / "stage.json").is_file():
        return _handed_off(folder)
    if (local / "config.yaml").is_file():
        raise WeightsError(f"start: the run {path} is not finished (it has no weights/ yet); finish it first")
    return _safetensors(folder)


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


def _safetensors(folder: Path) -> Source:
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise WeightsError(f"start: {folder} holds neither stage.json nor model*.safetensors")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(named - {f.name for f in files})
        if missing:
            raise WeightsError(f"start: {folder}: {index.name} names {missing[0]}, which is not there")
        files = [f for f in files if f.name in named]
    place: dict[str, tuple[Path, str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for stored in opened.keys():  # noqa: SIM118  # not a dict
                    name = released_name(stored)
                    if name.startswith(FRONT_END):
                        continue
                    if name in place:
                        raise WeightsError(f"start: {folder}: {name} is there twice")
                    place[name] = (file, stored)
                    shapes[name] = tuple(opened.get_slice(stored).get_shape())
        except SafetensorError as error:
            raise WeightsError(f"start: {file} cannot be read ({error}); copy it again") from None

    def read(name: str) -> Tensor:
        file, stored = place[name]
        with safe_open(file, "pt") as opened:
            return opened.get_tensor(stored)

    return Source(str(folder), shapes, read)


def _dasheng(path: Path) -> Source:
    """Dasheng's own checkpoint {"model", "config"}, read and checked by the dasheng package itself."""
    from dasheng.pretrained.pretrained import Dasheng

    try:
        dumped = Dasheng.from_pretrained(str(path)).state_dict()
    except (RuntimeError, KeyError, TypeError, EOFError, UnpicklingError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise WeightsError(f"start: {path} is no Dasheng checkpoint: {reason}") from None
    state = {}
    for name, tensor in dumped.items():
        if not name.startswith(("front_end.", "outputlayer")):
            state["audio_encoder." + name.replace("init_bn.1.", "init_bn.")] = tensor
    return Source(str(path), {n: tuple(t.shape) for n, t in state.items()}, state.__getitem__)


def sha256_file(path: Path) -> str:
    """Hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of named tensors as float32: tells whether a part is still what it was."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        total.update(name.encode())
        total.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def part_digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Part (audio_encoder, audio_projector, decoder) -> digest."""
    return {p: digest((n, t) for n, t in tensors.items() if n.startswith(p + ".")) for p in PARTS}


def _handed_off(folder: Path) -> Source:
    """weights/ of one of our stages: files must be those that stage.json lists, to the bit."""
    record = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
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
        return Source(base.where, base.shapes, base.read, record=record)
    config = json.loads((adapter / "adapter_config.json").read_text())
    plan = LoraPlan(tuple(config["target_modules"]), config["r"], config["lora_alpha"], config["lora_dropout"])
    prefix = "base_model.model."
    lora = {n.removeprefix(prefix): t for n, t in load_file(adapter / "adapter_model.safetensors").items()}
    return Source(base.where, base.shapes, base.read, lora, plan, record)


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


def load(
    model: AudioLM, starts: Sequence[Start], fresh: Sequence[str], *, merge_lora: bool
) -> list[tuple[str, str, int]]:
    """Give every tensor of a model without LoRA its one origin. Returns the table (origin, part, tensors).

    Raises WeightsError when a tensor has no origin or two, or when a source lacks, adds or misshapes one. `merge_lora`:
    the LoRA of a source is added to the weights it adapts, in float32.
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
        merged = _lora_deltas(source) if merge_lora else {}
        for name in sorted(taken):
            if source.shapes[name] != tuple(wanted[name].shape):
                raise WeightsError(
                    f"start: {source.where}: {name} is {source.shapes[name]}, this model wants "
                    f"{tuple(wanted[name].shape)}"
                )
            tensor = source.read(name)
            if name in merged:
                tensor = tensor.float() + merged[name]
            with torch.no_grad():
                wanted[name].copy_(tensor)

    table: dict[tuple[str, str], int] = {}
    for name, (origin,) in origins.items():
        table[origin, name.split(".")[0]] = table.get((origin, name.split(".")[0]), 0) + 1
    return [(origin, part, count) for (origin, part), count in table.items()]


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


def released_config(
    model: AudioLM, audio_token_id: int, audio_bos_token_id: int, audio_eos_token_id: int
) -> dict[str, Any]:  # fmt: skip
    """config.json in the layout of the released MiDashengLM, and the two tokens around the audio, whose names a decoder
    may lack."""
    shape = model.audio_encoder.shape
    return {
        "model_type": "midashenglm",
        "architectures": ["MiDashengLMModel"],
        "subsample_factor": 5,
        "audio_token_id": audio_token_id,
        "audio_bos_token_id": audio_bos_token_id,
        "audio_eos_token_id": audio_eos_token_id,
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
    audio_token_id: int, audio_bos_token_id: int, audio_eos_token_id: int, save_tokenizer: Callable[[Path], None],
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
    released = released_config(model, audio_token_id, audio_bos_token_id, audio_eos_token_id)
    config = json.dumps(released, indent=2, default=str)
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
