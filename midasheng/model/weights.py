"""Give a model its weights: start from sources, each tensor from one, and hand off; strict, none unaccounted for."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from midasheng import frames
from midasheng.model.adapt import EMBEDDING, HEAD, LoraPlan, base_state, kept_in, lora_state, matches
from midasheng.model.audio_lm import PARTS, AudioLM
from midasheng.model.sources import FLOATS, Source, WeightsError, digests_of_parts, sha256_file

FILE_BYTES = 5 * 10**9  # of weights/model*.safetensors at most, unless one tensor is larger
Gather = Callable[[Tensor], Tensor]


def on_cpu(tensor: Tensor) -> Tensor:
    """A tensor that lies here whole, as files take it."""
    return tensor.detach().cpu().contiguous()


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
    model: AudioLM, starts: Sequence[Start], fresh: Sequence[str], *, merge_lora: bool, precision: str = "fp32",
    added: range = range(0),
) -> list[tuple[str, str, int]]:  # fmt: skip
    """Give every tensor of a model without LoRA its one origin. Returns the table (origin, part, tensors).

    Loaded parameters are made anew, one after the other, each in the dtype that it is kept in (adapt.kept_in), so a
    model whose parameters have no memory yet takes little more than its weights. `merge_lora`: the LoRA of a source is
    added to the weights it adapts, in float32. `added`: ids of tokens that the tokenizer was given; tables of a source
    that was no run of ours know nothing of them: their rows become the mean of all rows before, and a table that ends
    before them grows.
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
        grown = {n for n in (EMBEDDING, HEAD) if added and n in taken and not source.record}
        for name in sorted(taken):
            if name in grown and _ends_before(source.shapes[name], wanted[name].shape, added):
                continue
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
            if name in grown:
                tensor = _with_means(tensor, wanted[name].shape, added)
            _set(model, name, tensor, precision)
    model.decoder.tie()

    table: dict[tuple[str, str], int] = {}
    for name, (origin,) in origins.items():
        table[origin, name.split(".")[0]] = table.get((origin, name.split(".")[0]), 0) + 1
    return [(origin, part, count) for (origin, part), count in table.items()]


def check_memory(model: AudioLM) -> None:
    """Raises AssertionError where a tensor is left without memory."""
    empty = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    assert not empty, f"{len(empty)} tensors have no memory, the first {empty[0]}"


def _ends_before(there: Sequence[int], wanted: Sequence[int], added: range) -> bool:
    """Has a table all rows but added ones, which are its last?"""
    return there[1:] == tuple(wanted[1:]) and added.start <= there[0] <= added.stop == wanted[0]


def _with_means(table_VD: Tensor, wanted: Sequence[int], added: range) -> Tensor:
    """The table with the mean of all rows before `added` in the rows of `added`; rows behind them stay."""
    grown = table_VD.new_empty(tuple(wanted))
    grown[: len(table_VD)] = table_VD
    known = table_VD[: added.start]
    total = sum(piece.double().sum(0) for piece in known.split(2**14))  # not whole: float64 of 152k rows takes 4 GB
    grown[added.start : added.stop] = (total / len(known)).to(table_VD.dtype)
    return grown


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


def released_config(model: AudioLM, token_ids: Mapping[str, int]) -> dict[str, Any]:
    """config.json in the layout of the released MiDashengLM. `token_ids`: audio_token_id, as released, and beside it
    audio_bos_token_id, audio_eos_token_id, turn_start_token_id and turn_end_token_id, since a decoder may have other
    names for these tokens."""
    shape = model.audio_encoder.shape
    return {
        "model_type": "midashenglm",
        "architectures": ["MiDashengLMModel"],
        "subsample_factor": 5,
        **token_ids,
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
    token_ids: Mapping[str, int], save_tokenizer: Callable[[Path], None], gather: Gather = on_cpu,
) -> dict[str, Any]:  # fmt: skip
    """Write weights/: model*.safetensors under released names, adapter/ in peft's format, tokenizer, config.json and
    stage.json. All or nothing: written beside and renamed. Returns stage.json's content.

    `gather`: makes a tensor whole. Where ranks share the model, the others iterate over `handed_off` and gather each as
    well; nobody holds more than one file of it.
    Raises AssertionError when a part that was trained is bit-identical to what it started from, or LoRA has no effect.
    """
    # LoRA trains the decoder without changing its base
    full = {
        p: any(q.requires_grad and ".lora_" not in n for n, q in getattr(model, p).named_parameters()) for p in PARTS
    }
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    base = base_state(model)
    written = _save_in_files(base, temporary, gather)
    lora = {n: gather(t) for n, t in lora_state(model).items()}

    def read(name: str) -> Tensor:
        with safe_open(temporary / written[name], "pt") as file:
            return file.get_tensor(name)

    ends = digests_of_parts(base, read)
    for part in PARTS:
        assert not full[part] or ends[part] != start_digests[part], f"{part} was trained but did not change"
    if plan is not None:  # a fresh B is zero, and LoRA without effect
        moved = any(bool(t.any()) for n, t in lora.items() if n.endswith(".lora_B.weight"))
        assert moved, "LoRA was trained but every B is still zero"
        _save_adapter(lora, temporary / "adapter", plan)
    save_tokenizer(temporary)
    config = json.dumps(released_config(model, token_ids), indent=2, default=str)
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


def handed_off(model: AudioLM) -> Iterator[Tensor]:
    """What `hand_off` gathers, in its order."""
    yield from base_state(model).values()
    yield from lora_state(model).values()


def _save_in_files(tensors: Mapping[str, Tensor], folder: Path, gather: Gather) -> dict[str, str]:
    """Write safetensors of at most FILE_BYTES each, named and listed as Hugging Face's; returns name -> file. Gathers
    what belongs in one file, in the order of `tensors`, and forgets it."""
    files: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if files[-1] and size + tensor.nbytes > FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += tensor.nbytes
    written: dict[str, str] = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        save_file({n: gather(tensors[n]) for n in names}, folder / file, metadata={"format": "pt"})
        written |= dict.fromkeys(names, file)
    if len(files) > 1:
        total = sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(written.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return written


def _save_adapter(lora: Mapping[str, Tensor], folder: Path, plan: LoraPlan) -> None:
    """peft's own layout, for the whole released model: PeftModel.from_pretrained reads it."""
    folder.mkdir()
    state = {f"base_model.model.{n}": t for n, t in lora.items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    layers = sorted({n.removeprefix("base_model.model.").split(".lora_")[0] for n in state})
    config = {
        "peft_type": "LORA", "task_type": None, "r": plan.rank, "lora_alpha": plan.alpha, "lora_dropout": plan.dropout,
        "target_modules": layers, "bias": "none", "inference_mode": True, "base_model_name_or_path": None,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
