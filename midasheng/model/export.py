"""Hand a run to the world: the published MiDashengLM layout with its own code, or an adapter, each with a certificate.

`export` writes beside the final name and renames at the end, so that what bears the name has passed its certificate.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from midasheng import frames
from midasheng.config import Stage
from midasheng.model import adapt
from midasheng.model.adapt import EMBEDDING, base_state
from midasheng.model.audio_lm import PARTS, AudioLM
from midasheng.model.certificate import ExportError, Trial, check_inputs, compare, demand, listen, reload
from midasheng.model.decoder import with_vocabulary
from midasheng.model.encoder import EncoderShape
from midasheng.model.sources import Source, digest, open_source, sha256_file
from midasheng.model.weights import Start, carry_lora, load, released_config

REMOTE = Path(__file__).parent / "remote"
FORMATS = ("hf", "base", "adapter")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TARGETS = ("transformers", "vllm", "sglang")
OMNI = "qwen2_5_omni_text"
PUBLISHED_TOKENS = ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")
SHARD = "5GB"
CERTIFICATE = "EXPORT.json"

# ChatML as in training: a line break between turns, clips and words in the order in which they are given
TEMPLATE = """{%- for message in messages %}
    {%- if not loop.first %}{{ '\\n' }}{% endif %}
    {{- 'TURN_START' + message['role'] + '\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'audio' %}
                {{- 'AUDIO_BOS' + 'AUDIO' + 'AUDIO_EOS' }}
            {%- elif part['type'] == 'text' %}
                {{- part['text'] }}
            {%- else %}
                {{- raise_exception('content is of type audio or text, not ' + part['type']) }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- 'TURN_END' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '\\n' + 'TURN_START' + 'assistant\\n' }}{% endif %}"""


@dataclass(frozen=True)
class Asked:
    """What is asked for: a folder `to`; `form` hf (LoRA merged), base (without it) or adapter (it alone); dtype fp32 or
    bf16; `target`: a server that must be able to run it, or ""; `fresh`: an export that is there may be thrown away."""

    to: Path
    form: str = "hf"
    dtype: str = "fp32"
    target: str = ""
    fresh: bool = False


def serves(stage: Stage, form: str) -> dict[str, str]:
    """Target -> "yes", or "no: " and the reason.

    vLLM and SGLang were read, not run: vllm/model_executor/models/midashenglm.py and transformers_utils/configs at
    0280a057, python/sglang/srt/models/midashenglm.py at d2f8f6f3.
    """
    decoder, tokens = stage.model.decoder, stage.tokenizer
    no = ""
    if decoder.architecture != OMNI:
        no = f"no: its MiDashengLM has the text model of Qwen2.5-Omni only, this decoder is {decoder.architecture}"
    elif (tokens.audio_bos, tokens.audio, tokens.audio_eos) != PUBLISHED_TOKENS:
        no = f"no: it knows the audio tokens as {' '.join(PUBLISHED_TOKENS)} only, tokenizer.* names others"
    elif rope_theta(decoder.fields) != 1e6:
        no = (
            f"no: it takes rope_theta 1000000 whatever the config says, this decoder has {rope_theta(decoder.fields):g}"
        )
    if form == "adapter":
        alone = no or "no: its MiDashengLM takes no LoRA; merge it (FORMAT=hf)"
        return {"transformers": "yes (peft.PeftModel on the base)", "vllm": alone, "sglang": alone}
    biases = "no: its MiDashengLM has a projector without biases and drops the stored ones (audio_projector.net.*.bias)"
    mel = "yes (not run here; its front end rounds to bf16, and in a batch its encoder attends to the padding of clips)"
    return {"transformers": "yes", "vllm": no or mel, "sglang": no or biases}


def rope_theta(fields: Mapping[str, Any]) -> float:
    """The base of the rotary positions in a decoder's fields; Qwen2.5-Omni's where they say nothing."""
    return float((fields.get("rope_parameters") or {}).get("rope_theta", fields.get("rope_theta", 1e6)))


# -- checks before anything is written --------------------------------------------------------------------------------


def check(asked: Asked, stage: Stage) -> None:
    """Raises ExportError for something that cannot be asked for, or would overwrite what is no export of ours."""
    for name, value, known in (("FORMAT", asked.form, FORMATS), ("DTYPE", asked.dtype, DTYPES)):
        if value not in known:
            raise ExportError(f"{name}={value}: write {', '.join(known)}")
    if asked.target:
        if asked.target not in TARGETS:
            raise ExportError(f"TARGET={asked.target}: write {', '.join(TARGETS)}")
        answer = serves(stage, asked.form)[asked.target]
        if not answer.startswith("yes"):
            raise ExportError(f"TARGET={asked.target}: {answer}")
    if asked.to.exists():
        if not asked.fresh:
            raise ExportError(f"{asked.to} is there already; say another TO=, or FRESH=1 to replace it")
        if not (asked.to / CERTIFICATE).is_file():
            raise ExportError(f"{asked.to} holds no {CERTIFICATE}, so it is no export: take it away yourself")


def check_adapter_base(source: Source) -> None:
    """Raises ExportError when the run has no adapter, or its frozen decoder is not what the run started from."""
    if source.lora_plan is None:
        raise ExportError(f"{source.where} has no adapter (its stage trained without LoRA); say FORMAT=hf")
    ends = source.record["parts"]["decoder"]
    if ends["trained"]:
        raise ExportError(
            f"{source.where}: the rows of added tokens (tokenizer.add) learned beside the adapter, which would come "
            "without them; say FORMAT=hf"
        )
    names = [n for n in source.shapes if n.startswith("decoder.")]
    now = digest(names, source.read)
    if not ends["start"] == ends["end"] == now:
        raise ExportError(
            f"{source.where}: the decoder below the adapter is not the one that the run started from (started from "
            f"{ends['start']}, handed off {ends['end']}, now {now}); an adapter goes with its base alone"
        )


def content_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash of all tensors of a model as float32, whatever its shards: the identity of a base."""
    total = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        total.update(f"{name} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return total.hexdigest()


# -- models -----------------------------------------------------------------------------------------------------------


def model_of(stage: Stage, source: Source, *, merge: bool) -> AudioLM:
    """The run's model in float32: its LoRA merged, or attached as it was trained."""
    e, d = stage.model.encoder, stage.model.decoder
    fields = with_vocabulary(d.architecture, d.fields, source.shapes[EMBEDDING][0])  # tokenizer.add makes it larger
    model = AudioLM(EncoderShape(e.dim, e.depth, e.heads), d.architecture, fields, PARTS)
    load(model, [Start(source, ("*",))], [], merge_lora=merge)
    adapt.freeze_all_but(model, stage.train)
    if source.lora_plan is not None and not merge:
        plan = adapt.LoraPlan(tuple(stage.lora.targets), stage.lora.rank, stage.lora.alpha, stage.lora.dropout)
        layers = len({name for names in adapt.add_lora(model, plan, 0).values() for name in names})
        carried = carry_lora(model, source, plan)
        assert carried == layers, f"LoRA of {carried} layers is stored, the run asks for {layers}"
    return model.eval()


def cast(state: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Tensors as they are written: init_bn stays float32, as in training."""
    return {
        name: (t.to(DTYPES[dtype]) if t.is_floating_point() and ".init_bn." not in name else t).cpu().contiguous()
        for name, t in state.items()
    }


# -- files ------------------------------------------------------------------------------------------------------------


def config_json(model: AudioLM, token_ids: Mapping[str, int], dtype: str) -> dict[str, Any]:
    """config.json of the export: the released keys, where the code lies, and rotary positions in the words of both
    transformers 4 (vLLM reads them too) and 5."""
    from transformers import PretrainedConfig

    said, common = model.decoder.config.to_dict(), PretrainedConfig().to_dict()
    text = {k: v for k, v in said.items() if k not in common or v != common[k]}  # what every config says, left out
    text |= {"use_cache": True, "tie_word_embeddings": said["tie_word_embeddings"], "model_type": said["model_type"]}
    rope = dict(text.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", None)
    if theta is not None:
        text |= {"rope_theta": theta, "rope_scaling": rope if set(rope) != {"rope_type"} else None}
    name = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    for key in ("transformers_version", "dtype", "torch_dtype", "_name_or_path", "architectures"):
        text.pop(key, None)
    return released_config(model, token_ids) | {
        "text_config": text | {"dtype": name}, "dtype": name, "torch_dtype": name, "tie_word_embeddings": False,
        "auto_map": {
            "AutoConfig": "configuration_midashenglm.MiDashengLMConfig",
            "AutoModelForCausalLM": "modeling_midashenglm.MiDashengLMModel",
            "AutoProcessor": "processing_midashenglm.MiDashengLMProcessor",
        },
    }  # fmt: skip


def tokenizer_config(stored: dict[str, Any], template: str) -> dict[str, Any]:
    """tokenizer_config.json as transformers 4 reads it too: pads on the left, special tokens under their older name."""
    config = {k: v for k, v in stored.items() if k not in ("backend", "is_local", "local_files_only")}
    more = config.pop("extra_special_tokens", None)
    if isinstance(more, list):
        config["additional_special_tokens"] = more
    elif more:
        config["extra_special_tokens"] = more
    if config.get("tokenizer_class") in (None, "TokenizersBackend"):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    return config | {"padding_side": "left", "processor_class": "MiDashengLMProcessor", "chat_template": template}


def remote_code() -> dict[str, str]:
    """The three files that travel with the model: name -> text."""
    return {p.name: p.read_text(encoding="utf-8") for p in sorted(REMOTE.glob("*_midashenglm.py"))}


def write_model(
    folder: Path, model: AudioLM, stage: Stage, weights: Path, dtype: str, shard: str
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """Everything transformers needs, the card excepted. Returns what was written: tensor name -> shape."""
    folder.mkdir(parents=True)
    tokens = stage.tokenizer
    template = TEMPLATE
    for place in ("audio_bos", "audio_eos", "audio", "turn_start", "turn_end"):
        template = template.replace(f"'{place.upper()}'", repr(getattr(tokens, place)))
    state = cast(base_state(model), dtype)
    save_torch_state_dict(state, folder, max_shard_size=shard)
    for path in weights.iterdir():  # the tokenizer's files, whatever they are called
        ours = path.name in ("config.json", "stage.json") or path.name.startswith("model")
        if path.is_file() and not ours:
            shutil.copyfile(path, folder / path.name)
    stored = json.loads((weights / "tokenizer_config.json").read_text(encoding="utf-8"))
    stored["pad_token"] = stored.get("pad_token") or tokens.turn_end  # Llama's has none, and its processor must pad
    vocabulary = vocabulary_of(folder / "tokenizer.json")
    named = {
        "audio_token_id": tokens.audio,
        "audio_bos_token_id": tokens.audio_bos,
        "audio_eos_token_id": tokens.audio_eos,
        "turn_start_token_id": tokens.turn_start,
        "turn_end_token_id": tokens.turn_end,
    }
    token_ids = {name: vocabulary[token] for name, token in named.items()}
    end = token_ids["turn_end_token_id"]
    pad = vocabulary.get(str(stored.get("pad_token")), end)
    files: dict[str, Any] = {
        "config.json": config_json(model, token_ids, dtype),
        "generation_config.json": {
            "eos_token_id": sorted({end, pad}), "pad_token_id": pad, "do_sample": False, "max_new_tokens": 256,
            "suppress_tokens": [token_ids["audio_token_id"]],  # no clip can be said
        },
        "preprocessor_config.json": {
            "feature_extractor_type": "Wav2Vec2FeatureExtractor", "feature_size": 1,
            "sampling_rate": frames.SAMPLE_RATE, "padding_value": 0.0, "padding_side": "right",
            "do_normalize": False, "return_attention_mask": False,
            "processor_class": "MiDashengLMProcessor",
            "auto_map": {"AutoProcessor": "processing_midashenglm.MiDashengLMProcessor"},
        },
        "processor_config.json": {
            "processor_class": "MiDashengLMProcessor", "audio_token": tokens.audio, "audio_bos_token": tokens.audio_bos,
            "audio_eos_token": tokens.audio_eos,
            "auto_map": {"AutoProcessor": "processing_midashenglm.MiDashengLMProcessor"},
        },
        "tokenizer_config.json": tokenizer_config(stored, template),
    }  # fmt: skip
    for name, content in files.items():
        _write_json(folder / name, content)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    for name, text in remote_code().items():
        (folder / name).write_text(text, encoding="utf-8")
    return {name: tuple(t.shape) for name, t in state.items()}


def vocabulary_of(tokenizer: Path) -> dict[str, int]:
    """Special tokens of a tokenizer.json: text -> id."""
    added = json.loads(tokenizer.read_text(encoding="utf-8"))["added_tokens"]
    return {t["content"]: int(t["id"]) for t in added}


def write_adapter(folder: Path, weights: Path, base_sha256: str) -> None:
    """The run's adapter in peft's format, with the hash of its base in the metadata of its file."""
    folder.mkdir(parents=True, exist_ok=True)
    state = load_file(weights / "adapter" / "adapter_model.safetensors")
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt", "base_sha256": base_sha256})
    config = json.loads((weights / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    _write_json(folder / "adapter_config.json", config)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


# -- where it comes from ----------------------------------------------------------------------------------------------


def lineage(weights: Path, scale_folder: Path) -> list[dict[str, Any]]:
    """stage.json of the run and of all it descends from, as far as they can be found, the nearest first; what cannot be
    found stands in it with `missing`. A parent that was trained again since is no parent."""
    found: list[dict[str, Any]] = []
    waiting: list[tuple[Path, dict[str, Any]]] = [(weights, {})]
    while waiting:
        folder, recorded = waiting.pop(0)
        here = [f for f in (folder, scale_folder / folder.parent.name / "weights") if (f / "stage.json").is_file()]
        records = [json.loads((f / "stage.json").read_text(encoding="utf-8")) for f in here]
        same = [r for r in records if not recorded or r["sha256"] == recorded.get("sha256")]
        if not same:
            if any(f.get("from") == str(folder) for f in found):
                continue
            why = (
                "trained again since"
                if records
                else "not there any more"
                if recorded.get("stage")
                else "no run of ours"
            )
            found.append({"from": str(folder), "stage": recorded.get("stage"), "missing": why})
            continue
        if any(same[0]["sha256"] == f.get("sha256") for f in found):
            continue
        found.append(same[0])
        waiting += [(Path(parent["from"]), parent) for parent in same[0]["parents"]]
    return found


def card(
    chain: Sequence[Mapping[str, Any]], licences: Callable[[str], str], asked: Asked, served: Mapping[str, str],
    proof: Mapping[str, Any],
) -> str:  # fmt: skip
    """README.md: how to use it, where it comes from, what it was trained on under which licences, what was proved."""
    lines = ["---", "library_name: transformers" if asked.form != "adapter" else "library_name: peft"]
    lines += ["pipeline_tag: audio-text-to-text", "license: other", "---", f"# {chain[0]['name']}", ""]
    if asked.form == "adapter":
        lines += [
            f"A LoRA adapter; the sha256 of the content of its base is `{proof['base_sha256']}` (`content_sha256` in "
            f"the {CERTIFICATE} of a FORMAT=base export in fp32 of the same run).",
            "", "```python", "from peft import PeftModel", "model = PeftModel.from_pretrained(base, ADAPTER)", "```",
        ]  # fmt: skip
    else:
        lines += [
            "An audio encoder, a projector and a text decoder in the layout of MiDashengLM. The folder's own code runs "
            "when you say `trust_remote_code=True`: three files, torch and transformers only.", "", "```python",
            "from transformers import AutoModelForCausalLM, AutoProcessor",
            "model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)",
            "processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)",
            'messages = [{"role": "user", "content": [{"type": "audio", "path": "clip.wav"},',
            '                                         {"type": "text", "text": "Write a general audio caption"}]}]',
            "prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)",
            'inputs = processor(text=prompt, audio=["clip.wav"])  # or arrays: float, 16 kHz, one channel',
            'answer = model.generate(**inputs)[:, inputs["input_ids"].shape[1]:]',
            "print(processor.batch_decode(answer, skip_special_tokens=True))", "```",
        ]  # fmt: skip
    lines += ["", "## Where it can run", ""] + [f"- {target}: {answer}" for target, answer in served.items()]
    lines += [
        "",
        "## Where it comes from",
        "",
        "| stage | run | steps | commit | config | learned |",
        "|---|---|---|---|---|---|",
    ]
    mixes = []
    for record in chain:
        if "missing" in record:
            lines.append(f"| {record['stage'] or 'weights'} | {record['from']}: {record['missing']} | | | | |")
            continue
        learned = ", ".join([*record["trained"], *(f"LoRA {t}" for t in record["lora"])])
        lines.append(
            f"| {record['stage']} | {record['name']} ({record['scale']}) | {record['steps']} | "
            f"{record['git_commit']} | {record['config_hash']} | {learned} |"
        )
        shares = record["plan"]["mix"].items()
        mixes += [f"| {record['stage']} | {corpus} | {p:.4g} | {licences(corpus)} |" for corpus, p in shares]
    lines += [
        "",
        "## Data",
        "",
        "Percent of samples; `unknown`: no licence could be established. Weights that are no run of ours, or are not "
        "there any more, bring data and licences of their own that stand nowhere here.",
        "",
    ]
    lines += ["| stage | corpus | percent | licence |", "|---|---|---|---|", *mixes, "", "## Proved at export", ""]
    lines += [f"- {name}: {value}" for name, value in proof.items()]
    return "\n".join(lines) + "\n"


# -- the export -------------------------------------------------------------------------------------------------------


def export(
    run: Path, stage: Stage, asked: Asked, trials: Sequence[Trial], heard: str, licences: Callable[[str], str],
    commit: str, shard: str = SHARD,
) -> dict[str, Any]:  # fmt: skip
    """Export the run folder `run` as asked, with a certificate over `trials` (`heard`: what they are, in words).
    Returns the content of EXPORT.json. Raises ExportError; nothing lies under `asked.to` then that did not before."""
    check(asked, stage)
    source = open_source(str(run))
    if not source.record:
        raise ExportError(f"{run} is no finished run (it has no weights/stage.json)")
    weights = Path(source.where)
    if asked.form == "adapter":
        check_adapter_base(source)
    part = asked.to.with_name(asked.to.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            proof = _write_and_prove(part, source, stage, asked, trials, Path(scratch), shard)
        served = serves(stage, asked.form)
        chain = lineage(weights, run.parent)
        proof = {"trials": len(trials), "clips": sum(len(t.clips) for t in trials), "audio": heard} | proof
        record = {
            "format": asked.form, "dtype": asked.dtype, "run": str(run), "stage": source.record["stage"],
            "made_by": commit, "torch": str(torch.__version__), "transformers": _transformers(), "serves": served,
            "certificate": proof, "lineage": chain,
        }  # fmt: skip
        (part / "README.md").write_text(card(chain, licences, asked, served, proof), encoding="utf-8")
        files = sorted(p for p in part.rglob("*") if p.is_file())
        for path in files:
            path.chmod(0o644)  # safetensors writes 0600
        record["sha256"] = {str(p.relative_to(part)): sha256_file(p) for p in files}
        _write_json(part / CERTIFICATE, record)
        if asked.to.exists():
            shutil.rmtree(asked.to)
        os.replace(part, asked.to)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return record


def _write_and_prove(
    part: Path, source: Source, stage: Stage, asked: Asked, trials: Sequence[Trial], scratch: Path, shard: str
) -> dict[str, Any]:  # fmt: skip
    """Write the export into `part` and hold it to the live model; one model in memory at a time, since 7B in float32
    takes 33 GB. Returns what was found. Raises ExportError."""
    weights = Path(source.where)
    audio_id = int(json.loads((weights / "config.json").read_text(encoding="utf-8"))["audio_token_id"])
    live = model_of(stage, source, merge=False)
    with nullcontext() if asked.form != "base" else adapt.without_lora(live):
        as_trained = listen(live, trials)
    adapt.set_precision(live, asked.dtype)
    with nullcontext() if asked.form != "base" else adapt.without_lora(live):
        expected = listen(live, trials)
    proof: dict[str, Any] = {}
    del live  # rounded to bf16 by now, perhaps
    written = model_of(stage, source, merge=asked.form == "hf")
    if source.lora_plan is not None and asked.form != "base":
        merged = written if asked.form == "hf" else model_of(stage, source, merge=True)
        proof["adapter against merged, fp32"] = compare(as_trained.logits, listen(merged, trials).logits)
        demand("adapter against merged", proof["adapter against merged, fp32"], "fp32")
        del merged
    folder = part if asked.form != "adapter" else scratch / "base"
    proof["tensors"] = len(write_model(folder, written, stage, weights, asked.dtype, shard))
    proof["content_sha256" if asked.form != "adapter" else "base_sha256"] = content_sha256(base_state(written))
    del written
    if asked.form == "adapter":
        write_adapter(part, weights, proof["base_sha256"])
    made = reload(folder, part if asked.form == "adapter" else None, trials, scratch)
    check_inputs(made, trials, as_trained, audio_id)
    proof["front end"] = "equal to the bit"
    proof["audio tokens"] = "as the published formula says, for every clip"
    proof["reloaded against live"] = compare(expected.logits, [made[f"logits_{i}"] for i in range(len(trials))])
    demand(f"reloaded against live, {asked.dtype}", proof["reloaded against live"], asked.dtype)
    return proof


def _transformers() -> str:
    import transformers

    return str(transformers.__version__)
