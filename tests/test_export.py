"""Exports: proved from audio files, key for key what servers load, and nothing under a name that has not passed."""

import json
import math
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from braceexpand import braceexpand
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from midasheng import config, frames
from midasheng.config import Stage
from midasheng.data import trials as trials_room
from midasheng.data.chat import Chat
from midasheng.model import adapt, certificate, export, sources, weights
from midasheng.model.adapt import LoraPlan, base_state
from midasheng.model.certificate import ExportError, Trial, compare, demand, listen, published_tokens
from midasheng.model.export import Asked, content_sha256, lineage, serves
from midasheng.model.remote import configuration_midashenglm as travelling
from midasheng.model.remote import reload as reload_script
from midasheng.model.sources import open_source
from midasheng.model.weights import Start
from tests.conftest import order_for
from tests.model import FIELDS, LLAMA, OMNI, QWEN3, TINY, at_scale, tiny_lm

ROOT = Path(__file__).parents[1]
PARTS = ["audio_encoder.*", "audio_projector.*", "decoder.*"]
QV = LoraPlan(("q_proj", "v_proj"), 2, 8.0, 0.1)
SHORT = (3_200, 40_123, 5_000, 170_000, 1_000)


def stage_of(architecture: str, fields: dict[str, object], lora: bool) -> Stage:
    stage = Stage(name="stage3_sft")
    stage.model.encoder = config.Encoder(TINY.dim, TINY.depth, TINY.heads)
    stage.model.decoder = config.DecoderModel(architecture, fields)
    stage.train = PARTS[:2] if lora else PARTS
    if lora:
        stage.lora = config.Lora(list(QV.targets), QV.rank, QV.alpha, QV.dropout)
    return stage


def finished_run(run: Path, chat: Chat, architecture: str = OMNI, *, lora: bool = True, **fields: object) -> Stage:
    """A run folder with weights/ as a stage leaves it; its LoRA has learned something."""
    fields = FIELDS[architecture] | {"vocab_size": len(chat.tokenizer)} | fields
    lm = tiny_lm(architecture, **fields)
    start = sources.part_digests(base_state(lm)) | {"audio_encoder": "0", "audio_projector": "0"}
    stage = stage_of(architecture, fields, lora)
    adapt.freeze_all_but(lm, stage.train)
    if lora:
        adapt.add_lora(lm, QV, seed=1)
        with torch.no_grad():
            for name, parameter in lm.named_parameters():
                if ".lora_B" in name:
                    parameter.normal_(std=0.1)
    else:
        start["decoder"] = "0"
    record = {
        "stage": "stage3_sft", "name": run.name, "scale": "tiny", "steps": 4, "parents": [], "git_commit": "abc",
        "plan": {"mix": {"songs": 60.0, "talks": 40.0}}, "config_hash": "def", "trained": stage.train,
        "lora": stage.lora.targets,
    }  # fmt: skip
    weights.hand_off(
        lm, run / "weights", record, QV if lora else None, start_digests=start, token_ids=chat.token_ids,
        save_tokenizer=chat.save,
    )  # fmt: skip
    return stage


def some_trials(stage: Stage, chat: Chat) -> list[Trial]:
    return [Trial(*made) for made in trials_room.conversations(stage, chat, SHORT)[0]]


def licence(corpus: str) -> str:
    return {"songs": "CC-BY-4.0"}.get(corpus, "unknown")


class Bench:
    """A finished run, and exports of it."""

    def __init__(self, root: Path, chat: Chat, architecture: str = OMNI, **more: object) -> None:
        self.root, self.chat, self.run = root, chat, root / "runs" / "tiny" / "sft"
        self.stage = finished_run(self.run, chat, architecture, **more)

    def export(self, name: str = "", *, shard: str = "5GB", **asked: object) -> Path:
        to = self.root / (name or f"{self.root.name}_export")
        trials = some_trials(self.stage, self.chat)
        export.export(self.run, self.stage, Asked(to, **asked), trials, "generated", licence, "me", shard)
        return to


@pytest.fixture
def same_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """remote/reload.py runs here instead of in a process of its own: seconds instead of tens of them."""

    def run(command: list[str], **ignored: object) -> subprocess.CompletedProcess[str]:
        try:
            reload_script.main(Path(command[-2]), Path(command[-1]))
        except Exception:
            return subprocess.CompletedProcess(command, 1, "", traceback.format_exc())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(certificate.subprocess, "run", run)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "modules"), *sys.path])
    for name in [n for n in sys.modules if n.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)


def loaded(folder: Path):
    from transformers import AutoModelForCausalLM, AutoProcessor

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return model.eval(), AutoProcessor.from_pretrained(folder, trust_remote_code=True)


# -- the whole way -------------------------------------------------------------------------------------------------


def test_an_export_in_a_fresh_process_is_the_model_that_was_trained(chat, tmp_path):
    bench = Bench(tmp_path, chat)
    to = bench.export(shard="60KB")
    record = json.loads((to / "EXPORT.json").read_text())
    proof = record["certificate"]
    assert proof["adapter against merged, fp32"]["max"] < 1e-4
    assert proof["reloaded against live"]["max"] < 1e-4
    assert proof["reloaded against live"]["slots"] > 60
    assert (proof["clips"], proof["front end"]) == (len(SHORT) + 2, "equal to the bit")
    assert set(record["sha256"]) == {str(p.relative_to(to)) for p in to.rglob("*") if p.name != "EXPORT.json"}
    assert len(list(to.glob("model-*.safetensors"))) > 1
    assert (to / "model.safetensors.index.json").is_file()
    card = (to / "README.md").read_text()
    assert "| stage3_sft | songs | 60 | CC-BY-4.0 |" in card
    assert "| stage3_sft | talks | 40 | unknown |" in card
    assert not list(tmp_path.glob("*.part"))

    # and back: a start like any other
    merged = export.model_of(bench.stage, open_source(str(bench.run)), merge=True)
    again = tiny_lm(seed=5, **bench.stage.model.decoder.fields)
    weights.load(again, [Start(open_source(str(to)), ("*",))], [], merge_lora=False)
    assert content_sha256(base_state(again)) == content_sha256(base_state(merged)) == proof["content_sha256"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", [OMNI, QWEN3, LLAMA])
@pytest.mark.usefixtures("same_process")
def test_every_decoder_is_exported(architecture, tied, chat, tmp_path):
    bench = Bench(tmp_path, chat, architecture, lora=tied, tie_word_embeddings=tied)
    record = json.loads((bench.export() / "EXPORT.json").read_text())
    assert record["serves"]["transformers"] == "yes"
    assert record["serves"]["vllm"].startswith("no: ")


@pytest.mark.usefixtures("same_process")
def test_bf16_keeps_the_statistics_in_float32(chat, tmp_path, monkeypatch):
    # a random model is often undecided; what bf16 does to a trained one is in LOG.md
    monkeypatch.setattr(certificate, "LEAST_AGREEMENT", 0.5)
    to = Bench(tmp_path, chat).export(dtype="bf16")
    state = load_file(to / "model.safetensors")
    kept = {n for n, t in state.items() if t.is_floating_point() and t.dtype != torch.bfloat16}
    assert kept == {f"audio_encoder.init_bn.{n}" for n in ("weight", "bias", "running_mean", "running_var")}
    model, _ = loaded(to)
    assert model.audio_encoder.init_bn.running_mean.dtype == torch.float32
    assert model.decoder.model.norm.weight.dtype == torch.bfloat16


# -- planted bugs ---------------------------------------------------------------------------------------------------


def wrong_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    right = weights._lora_deltas
    monkeypatch.setattr(weights, "_lora_deltas", lambda source: {n: t / 4 for n, t in right(source).items()})


def no_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_lora_deltas", lambda source: {})


def spoiled(name: str, how: Callable[[torch.Tensor], torch.Tensor | None]):
    """A tensor that is written otherwise, or not at all."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        def save(state, folder, **more):
            state = state | {name: how(state[name])}
            save_torch_state_dict({n: t for n, t in state.items() if t is not None}, folder, **more)

        monkeypatch.setattr(export, "save_torch_state_dict", save)

    return plant


def other_code(old: str, new: str):
    """Code that travels is changed."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        right = export.remote_code()
        assert any(old in text for text in right.values()), old
        monkeypatch.setattr(export, "remote_code", lambda: {n: t.replace(old, new) for n, t in right.items()})

    return plant


def other_template(old: str, new: str):
    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        assert old in export.TEMPLATE
        monkeypatch.setattr(export, "TEMPLATE", export.TEMPLATE.replace(old, new))

    return plant


def normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    right = export._write_json

    def write(path, content):
        right(path, content | {"do_normalize": True} if "do_normalize" in content else content)

    monkeypatch.setattr(export, "_write_json", write)


PLANTED = {
    "merged at another scale": (wrong_merge, "adapter against merged: logits differ"),
    "not merged": (no_merge, "adapter against merged: logits differ"),
    "a tensor transposed": (
        spoiled("audio_projector.net.2.weight", lambda t: t.T.contiguous()), "reloaded against live, fp32: logits"
    ),
    "a bias dropped": (spoiled("audio_encoder.blocks.1.attn.proj.bias", lambda t: None), "not loaded as stored"),
    "a bias zero": (spoiled("audio_encoder.blocks.1.attn.proj.bias", torch.zeros_like), "reloaded against live"),
    "statistics lost": (spoiled("audio_encoder.init_bn.running_mean", torch.zeros_like), "reloaded against live"),
    "NaN": (spoiled("decoder.model.norm.weight", lambda t: t * float("nan")), "reloaded against live"),
    "another window": (other_code("torch.hann_window(N_FFT)", "torch.hann_window(N_FFT, periodic=False)"), "front end"),
    "another floor": (other_code("decibel.max() - 120.0", "decibel.max() - 80.0"), "front end"),
    "another mel scale": (other_code("2595.0", "2595.5"), "front end"),
    "token count rounded up": (other_code("mel_frames // 4 // 5", "-(-(mel_frames // 4) // 5)"), "audio slots, the clips"),
    "clips padded to whole tokens": (
        other_code("max(0, MIN_SAMPLES - len(clip))", "-len(clip) % MIN_SAMPLES"), "audio tokens, the published formula"
    ),
    "short clips not padded": (other_code("max(0, MIN_SAMPLES - len(clip))", "0"), "."),
    "audio normalised": (normalised, "front end"),
    "attention into the padding": (other_code("attn_mask=mask", "attn_mask=None"), "reloaded against live"),
    "attention across chunks": (other_code("config.target_length // PATCH", "2 * config.target_length // PATCH"), "."),
    "padding before the prompt is seen": (
        other_code("attention_mask=attention_mask,", "attention_mask=None,"), "reloaded against live"
    ),
    "tanh GELU": (other_code("F.gelu(self.fc1(x))", 'F.gelu(self.fc1(x), approximate="tanh")'), "reloaded against"),
    "LayerNorm of another eps": (other_code("eps=1e-6", "eps=1e-3"), "reloaded against live"),
    "frames in another order": (
        other_code("next(x) for _ in", "next(x).flip(0) for _ in"), "reloaded against live"
    ),
    "another template": (other_template("{{ '\\n' }}{% endif %}\n    {{- 'TURN_START'", "{% endif %}\n    {{- 'TURN_START'"), "tokens are not those"),
    "words before the clip": (other_template("== 'audio'", "== 'sound'"), "."),
}  # fmt: skip


@pytest.mark.parametrize("bug", PLANTED)
@pytest.mark.usefixtures("same_process")
def test_a_wrong_export_fails_and_leaves_nothing_under_its_name(bug, chat, tmp_path, monkeypatch):
    plant, message = PLANTED[bug]
    bench = Bench(tmp_path, chat)
    before = set(tmp_path.iterdir())
    plant(monkeypatch)
    with pytest.raises(ExportError, match=message):
        bench.export()
    assert {p for p in tmp_path.iterdir() if p.name != "modules"} == before


def test_limits():
    for rms, most in ((0.1, "0.0001"), (12.0, "0.0012")):  # small's logits, of pretrained text weights, have 12.4
        found = {"rms": rms, "max": 0.9 * float(most), "mean": 0.0, "top1": 1.0}
        demand("x", found, "fp32")
        with pytest.raises(ExportError, match=f"at most {most} may"):
            demand("x", found | {"max": 1.1 * float(most)}, "fp32")
    with pytest.raises(ExportError, match=r"98\.90% of the slots"):
        demand("x", {"rms": 1.0, "max": 0.0, "mean": 0.0, "top1": 0.989}, "bf16")
    with pytest.raises(ExportError, match="at most"):
        demand("x", compare([torch.full((1, 2), float("nan"))], [torch.zeros(1, 2)]), "fp32")
    assert compare([torch.tensor([[1.0, 0.0], [0.0, 3.0]])], [torch.tensor([[0.0, 0.5], [0.0, 1.0]])]) == {
        "slots": 2, "rms": math.sqrt(2.5), "max": 2.0, "mean": 3.5 / 4, "top1": 0.5,
    }  # fmt: skip


# -- lengths, names ---------------------------------------------------------------------------------------------------


def test_the_length_arithmetic_is_the_published_one_for_every_length():
    lengths = np.arange(480_001)
    published = (np.floor(1 + lengths / 160).astype(np.int64) // 4) // 5
    assert (frames.audio_tokens(lengths) == published).all()
    assert (travelling.audio_tokens(torch.from_numpy(lengths)).numpy() == published).all()
    assert [published_tokens(n) for n in range(0, 480_001, 997)] == [
        max(1, published[max(n, 3200)]) for n in range(0, 480_001, 997)
    ]
    assert (travelling.MIN_SAMPLES, travelling.SAMPLE_RATE) == (frames.MIN_SAMPLES, frames.SAMPLE_RATE)


def released_names(encoder_blocks: int = 32, decoder_layers: int = 28) -> set[str]:
    text = (ROOT / "tests" / "released_7b_names.txt").read_text()
    text = text.replace("{0..31}", f"{{0..{encoder_blocks - 1}}}").replace("{0..27}", f"{{0..{decoder_layers - 1}}}")
    return {name for line in text.splitlines() if not line.startswith("#") for name in braceexpand(line)}


def test_the_7b_has_the_names_that_servers_load():
    names = released_names()
    assert len(names) == 738
    assert set(base_state(at_scale("7b"))) == names


@pytest.mark.usefixtures("same_process")
def test_an_export_holds_the_names_that_servers_load_and_no_other(chat, tmp_path):
    to = Bench(tmp_path, chat).export()
    with safe_open(to / "model.safetensors", "pt") as opened:
        assert set(opened.keys()) == released_names(2, 2)
        assert opened.metadata()["format"] == "pt"


@pytest.mark.usefixtures("same_process")
def test_the_config_says_rotary_positions_in_the_words_of_transformers_4_and_5(chat, tmp_path):
    to = Bench(tmp_path, chat).export()
    text = json.loads((to / "config.json").read_text())["text_config"]
    assert (text["rope_theta"], text["rope_scaling"]["mrope_section"]) == (1e4, [2, 3, 3])
    assert text["rope_parameters"]["rope_theta"] == 1e4
    assert loaded(to)[0].config.text_config.rope_parameters["rope_theta"] == 1e4


# -- who can serve it -------------------------------------------------------------------------------------------------


def test_a_target_that_cannot_serve_the_model_is_refused_with_the_reason(tmp_path):
    fields = {"rope_parameters": {"rope_theta": 1e6}}
    omni, qwen3 = stage_of(OMNI, fields, True), stage_of(QWEN3, fields, True)
    assert {t: answer.split()[0] for t, answer in serves(omni, "hf").items()} == {
        "transformers": "yes", "vllm": "yes", "sglang": "no:",
    }  # fmt: skip
    mapped = stage_of(OMNI, fields, True)
    mapped.tokenizer.audio = "<|reserved_1|>"
    for stage, target, form, message in (
        (qwen3, "vllm", "hf", "Qwen2.5-Omni only, this decoder is qwen3"),
        (qwen3, "sglang", "hf", "Qwen2.5-Omni only"),
        (omni, "sglang", "hf", "drops the stored ones"),
        (omni, "vllm", "adapter", "takes no LoRA; merge it"),
        (mapped, "vllm", "hf", "tokenizer.* names others"),
        (stage_of(OMNI, {"rope_parameters": {"rope_theta": 1e4}}, True), "vllm", "hf", "this decoder has 10000"),
        (omni, "ollama", "hf", "TARGET=ollama: write transformers, vllm, sglang"),
    ):
        with pytest.raises(ExportError, match=message):
            export.check(Asked(tmp_path / "to", form, target=target), stage)
    export.check(Asked(tmp_path / "to", target="vllm"), omni)
    with pytest.raises(ExportError, match="FORMAT=gguf: write hf, base, adapter"):
        export.check(Asked(tmp_path / "to", "gguf"), omni)
    with pytest.raises(ExportError, match="DTYPE=fp8: write fp32, bf16"):
        export.check(Asked(tmp_path / "to", dtype="fp8"), omni)


# -- what is there already --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("same_process")
def test_an_export_replaces_only_an_export_and_only_when_asked(chat, tmp_path, monkeypatch):
    bench = Bench(tmp_path, chat)
    to = bench.export()
    old = (to / "EXPORT.json").read_text()
    with pytest.raises(ExportError, match="is there already; say another TO=, or FRESH=1"):
        bench.export()
    no_merge(monkeypatch)
    with pytest.raises(ExportError, match="adapter against merged"):
        bench.export(fresh=True)
    assert (to / "EXPORT.json").read_text() == old
    mine = tmp_path / "thesis"
    mine.mkdir()
    with pytest.raises(ExportError, match="so it is no export: take it away yourself"):
        bench.export("thesis", fresh=True)
    assert mine.is_dir()


# -- the adapter ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("same_process")
def test_an_adapter_names_its_base_and_peft_loads_it_there(chat, tmp_path):
    bench = Bench(tmp_path, chat)
    base, adapter = bench.export("base_of_it", form="base"), bench.export("adapter_of_it", form="adapter")
    assert sorted(p.name for p in adapter.iterdir()) == [
        "EXPORT.json", "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    with safe_open(adapter / "adapter_model.safetensors", "pt") as opened:
        named = opened.metadata()["base_sha256"]
    assert named == json.loads((base / "EXPORT.json").read_text())["certificate"]["content_sha256"]
    from peft import PeftModel

    model, processor = loaded(base)
    trial = some_trials(bench.stage, chat)[1]
    prompt = processor.apply_chat_template(certificate.messages(trial, ["a.wav"]), tokenize=False)
    inputs = processor(text=prompt, audio=list(trial.clips))
    with torch.no_grad():
        without = model(**inputs).logits[0]
        adapted = PeftModel.from_pretrained(model, adapter)(**inputs).logits[0]
    live = listen(export.model_of(bench.stage, open_source(str(bench.run)), merge=False), [trial]).logits[0]
    text = torch.from_numpy(~trial.sample.is_audio)
    assert (adapted[text] - live).abs().max() < 1e-4
    assert (without[text] - live).abs().max() > 1e-2


def test_an_adapter_without_its_base_is_refused(chat, tmp_path):
    whole = Bench(tmp_path / "whole", chat, lora=False)
    with pytest.raises(ExportError, match="has no adapter"):
        whole.export(form="adapter")
    bench = Bench(tmp_path / "lora", chat)
    path = bench.run / "weights" / "stage.json"
    record = json.loads(path.read_text())
    record["parts"]["decoder"]["start"] = "of another decoder"
    path.write_text(json.dumps(record))
    with pytest.raises(ExportError, match="is not the one that the run started from"):
        bench.export(form="adapter")


# -- what travels -----------------------------------------------------------------------------------------------------


@pytest.fixture
def travelled(chat, tmp_path, same_process):
    """(model, processor) of an export."""
    return loaded(Bench(tmp_path, chat).export())


def asked_of(processor, clips: int, text: str) -> str:
    content = [{"type": "audio", "path": "x.wav"}] * clips + [{"type": "text", "text": text}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )


def test_answers_in_a_batch_are_those_of_prompts_alone(travelled):
    model, processor = travelled
    clips = [trials_room.tone(n, n) for n in (16_000, 50_000, 3_200, 200_000)]
    rows = [
        ("Which language?", [0]),
        ("Is it the same tone, or is it another one?", [1, 2]),
        ("Sing.", []),
        ("Is it?", [3]),
    ]
    texts = [asked_of(processor, len(used), words) for words, used in rows]
    inputs = processor(text=texts, audio=clips)
    assert inputs["input_values"].shape == (4, 200_000)
    assert inputs["audio_length"].tolist() == [16_000, 50_000, 3_200, 200_000]
    assert not inputs["input_values"][2, 3_200:].any()  # audio pads right with zeros
    assert inputs["attention_mask"][:, -1].all()  # text pads left

    def answers(given, **more):
        made = model.generate(**given, max_new_tokens=8, **more)
        return processor.batch_decode(made[:, given["input_ids"].shape[1] :])

    def alone(number: int, **more):
        used = rows[number][1]
        return answers(processor(text=texts[number], audio=[clips[i] for i in used] or None), **more)

    together = [a.replace(processor.tokenizer.pad_token, "") for a in answers(inputs)]
    assert together == [alone(i)[0].replace(processor.tokenizer.pad_token, "") for i in range(4)]
    # beams repeat the clips of a prompt as a group
    _, beams = model._expand_inputs_for_generation(expand_size=2, **inputs)
    one, two, three, four = 16_000, 50_000, 3_200, 200_000
    assert beams["audio_length"].tolist() == [one, one, two, three, two, three, four, four]
    assert torch.equal(beams["input_values"][4], inputs["input_values"][1])
    assert len(answers(inputs, num_beams=2, num_return_sequences=2)) == 8


def test_a_clip_changes_what_is_said_after_it(travelled):
    """The order of clips and prompts matters, so that a mix-up would show in the test above."""
    model, processor = travelled
    clips = [trials_room.tone(n, n) for n in (50_000, 50_000 + 160)]
    text = asked_of(processor, 2, "Is it?")
    with torch.no_grad():
        one, other = (model(**processor(text=text, audio=order)).logits for order in (clips, clips[::-1]))
    assert (one[0, -1] - other[0, -1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("audio", "more", "message"),
    [
        ([np.zeros(8_000, dtype=np.int16)], {}, "int16; give floats"),
        ([np.zeros((2, 8_000), dtype=np.float32)], {}, "one channel"),
        ([np.zeros(0, dtype=np.float32)], {}, "shape"),
        ([np.full(8_000, np.nan, dtype=np.float32)], {}, "NaN"),
        ([np.zeros(8_000, dtype=np.float32)] * 2, {}, "holds 1 <|AUDIO|>, but there are 2 clips"),
        (None, {}, "but there are 0 clips"),
        ([np.zeros(8_000, dtype=np.float32)], {"truncation": True, "max_length": 8}, "would cut off audio"),
        ([np.zeros(8_000, dtype=np.float32)], {"sampling_rate": 44_100}, "sampling rate"),
    ],
)
def test_audio_that_is_not_what_it_should_be_is_refused(audio, more, message, travelled):
    _, processor = travelled
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        processor(text=asked_of(processor, 1, "Is it?"), audio=audio, **more)


def test_slots_and_clips_that_disagree_are_refused_by_the_model(travelled):
    model, processor = travelled
    inputs = processor(text=asked_of(processor, 1, "Is it?"), audio=trials_room.tone(16_000, 0))
    inputs["audio_length"] = inputs["audio_length"] - 3_200
    with pytest.raises(ValueError, match="hold 5 audio slots, the clips 4 audio tokens"):
        model(**inputs)


def test_the_code_of_an_export_runs_only_when_the_user_says_so(chat, tmp_path):
    """Our own loaders read an export without running what lies in it."""
    folder = tmp_path / "stranger"
    finished_run(tmp_path / "run", chat)
    shutil.copytree(tmp_path / "run" / "weights", folder, ignore=shutil.ignore_patterns("stage.json", "adapter"))
    (folder / "config.json").write_text(json.dumps({
        "model_type": "midashenglm",
        "auto_map": {"AutoConfig": "bomb.Config", "AutoTokenizer": ["bomb.Tokenizer", None]},
    }))  # fmt: skip
    (folder / "bomb.py").write_text(f"open({str(tmp_path / 'went_off')!r}, 'w')\n")
    open_source(str(folder))
    Chat(str(folder), "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")
    assert not (tmp_path / "went_off").exists()
    said = [p for p in (ROOT / "midasheng").rglob("*.py") if "trust_remote_code=True)" in p.read_text()]
    # the fresh process, on what was just written; and the words of the card
    assert {p.name for p in said} == {"reload.py", "export.py"}


# -- trials and where a run comes from --------------------------------------------------------------------------------


def test_trials_are_held_out_recordings_of_every_length(chat, tiny_data, tmp_path):
    lengths = trials_room.LENGTHS
    real = [n for n in lengths if 3_200 <= n <= 960_000]
    assert len(real) >= 32
    assert (min(real), max(real)) == (3_200, 960_000)
    assert len({n % 160 for n in real}) > 20
    stage = order_for("stage3_sft", tiny_data, tmp_path).stage
    trials_room.open_data(stage, make=True)
    made, heard = trials_room.conversations(stage, chat, (3_200, 64_000, 1_000))
    assert "held-out recordings of the run's mix `sft`" in heard
    recording = trials_room.recordings(stage)[0]
    assert np.array_equal(made[0][1][0], recording[1][:3_200])
    assert made[0][0] == recording[0]
    assert [len(c) for _, clips, _ in made for c in clips] == [3_200, 64_000, 1_000, 3_205, 48_000]
    assert [len(c) for _, _, s in made for c in s.clips] == [3_200, 64_000, 3_200, 3_205, 48_000]
    made, heard = trials_room.conversations(replace(stage, data=config.Data()), chat, (3_200,))
    assert heard.startswith("generated chords in noise, since there are no recordings (")


def test_the_card_names_the_chain_and_a_parent_that_was_trained_again_is_none(chat, tmp_path):
    runs = tmp_path / "runs" / "tiny"
    finished_run(runs / "align", chat, initializer_range=0.3)
    finished_run(runs / "sft", chat)
    parent = json.loads((runs / "align" / "weights" / "stage.json").read_text())
    child = runs / "sft" / "weights" / "stage.json"
    record = json.loads(child.read_text())
    record["parents"] = [
        {"from": "elsewhere/tiny/align/weights", "take": ["*"], "stage": "stage1_align", "sha256": parent["sha256"]},
        {"from": "gone/weights", "take": ["decoder.*"], "stage": "text_decoder", "sha256": {}},
    ]
    child.write_text(json.dumps(record))
    chain = lineage(child.parent, runs)
    assert [r.get("name") or r["missing"] for r in chain] == ["sft", "align", "not there any more"]
    finished_run(runs / "align", chat, initializer_range=0.1)
    assert lineage(child.parent, runs)[1]["missing"] == "trained again since"
