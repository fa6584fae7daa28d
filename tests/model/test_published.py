"""Published weights as they come: Dasheng's files, sharded releases, configs that disagree, parts without memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor

from midasheng.model import adapt, sources, weights
from midasheng.model.adapt import LoraPlan, base_state
from midasheng.model.audio_lm import AudioLM
from midasheng.model.sources import Source, WeightsError, open_source
from midasheng.model.weights import Start, load, loaded_parts
from tests.model import (
    CONFIGS,
    FIELDS,
    LLAMA,
    OMNI,
    QWEN3,
    TINY,
    conversation,
    gradients,
    logits,
    mel_tables,
    noise,
    packed,
    reference_encoder,
    tiny_lm,
)

TIME = "audio_encoder.time_pos_embed"
OTHERS = ["audio_projector.*", "decoder.*"]


def empty_lm(architecture: str = OMNI, **fields: object) -> AudioLM:
    """A model whose parameters have no memory yet."""
    return AudioLM(TINY, architecture, FIELDS[architecture] | fields, weights.PARTS)


def same(first: AudioLM, second: AudioLM) -> bool:
    other = base_state(second)
    return all(torch.equal(t, other[n]) for n, t in base_state(first).items())


# -- Dasheng ----------------------------------------------------------------------------------------------------------


def dasheng_state(positions: int = 252) -> tuple[dict[str, Tensor], Any]:
    """State of the dasheng package's own model with that many positions, and the model at 252 that it makes of it."""
    state = reference_encoder(TINY, seed=3).state_dict()
    state["time_pos_embed"] = torch.randn(1, TINY.dim, 1, positions, generator=torch.Generator().manual_seed(positions))
    reference = reference_encoder(TINY, seed=4)
    reference.load_state_dict(dict(state))
    return state, reference


def write_pt(folder: Path, state: dict[str, Tensor], **config: object) -> Source:
    settings = {"embed_dim": TINY.dim, "depth": TINY.depth, "num_heads": TINY.heads} | config
    torch.save({"model": state, "config": settings}, folder / "dasheng.pt")
    return open_source(str(folder / "dasheng.pt"))


def write_hub(folder: Path, state: dict[str, Tensor], **config: object) -> Source:
    """As mispeech/dasheng-* on the hub: prefix `encoder.`, the front end lies in the feature extractor."""
    stored = {f"encoder.{n}": t.clone() for n, t in state.items() if not n.startswith("front_end.")}
    save_file(stored, folder / "model.safetensors")
    sizes = {"embed_dim": TINY.dim, "depth": TINY.depth, "num_heads": TINY.heads}
    content = {"model_type": "dasheng", "name": "dasheng-base", "encoder_kwargs": sizes | config}
    (folder / "config.json").write_text(json.dumps(content))
    return open_source(str(folder))


@pytest.mark.parametrize("form", [write_pt, write_hub])
@pytest.mark.parametrize("positions", [252, 100, 251, 253, 300])
def test_positions_are_cropped_or_interpolated_as_dasheng_does(form, positions, tmp_path):
    state, reference = dasheng_state(positions)
    source = form(tmp_path, state, target_length=4 * positions)
    done = "" if positions == 252 else "cropped from" if positions > 252 else "interpolated from"
    assert (done in source.note) if done else not source.note
    lm = tiny_lm().eval()
    load(lm, [Start(source, ("audio_encoder.*",))], OTHERS, merge_lora=False)
    assert torch.equal(base_state(lm)[TIME], reference.state_dict()["time_pos_embed"])
    clip = torch.from_numpy(noise(200_000, 0))  # more than one window
    with torch.no_grad():
        assert (lm.audio_encoder(clip, [200_000]) - reference(clip[None])[0]).abs().max() < 1e-4


@pytest.mark.parametrize("form", [write_pt, write_hub])
def test_dashengs_head_and_front_end_are_left_out(form, tmp_path):
    state, _ = dasheng_state()
    source = form(tmp_path, state | {"outputlayer.0.weight": torch.zeros(3), "outputlayer.1.bias": torch.zeros(3)})
    assert set(source.shapes) == {n for n in base_state(tiny_lm()) if n.startswith("audio_encoder.")}


def test_positions_of_a_release_are_not_bent(tmp_path):
    """Only Dasheng's are: a release with others is another model."""
    state = {n: t.clone() for n, t in base_state(tiny_lm(seed=1)).items()}
    state[TIME] = torch.zeros(1, TINY.dim, 1, 253)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="time_pos_embed is"):
        load(tiny_lm(), [Start(open_source(str(tmp_path)), ("*",))], [], merge_lora=False)


@pytest.mark.parametrize("name", ["mel_scale.fb", "spectrogram.window", "more"])
@pytest.mark.parametrize("pt", [True, False])
def test_another_front_end_than_ours_is_refused(name, pt, tmp_path):
    """Its tables are stored, and were dropped unseen."""
    tables = mel_tables()
    tables[f"audio_encoder.front_end.0.{name}"] = tables.get(f"audio_encoder.front_end.0.{name}", torch.ones(4)) * 1.01
    words = f"audio_encoder.front_end.0.{name}"
    if pt:
        state, _ = dasheng_state()
        with pytest.raises(WeightsError, match=words):
            write_pt(tmp_path, state | {n.removeprefix("audio_encoder."): t for n, t in tables.items()})
    else:
        save_file({n: t.clone() for n, t in (base_state(tiny_lm()) | tables).items()}, tmp_path / "model.safetensors")
        with pytest.raises(WeightsError, match=words):
            open_source(str(tmp_path))


# -- configs that disagree --------------------------------------------------------------------------------------------


def text_config(lm: AudioLM) -> dict[str, Any]:
    return {"model_type": lm.decoder.config.model_type} | lm.decoder.config.to_diff_dict()


def write_released(
    folder: Path, lm: AudioLM, text: dict[str, Any] | None = None, audio: dict[str, Any] | None = None, **more: object
) -> Source:
    """A release of `lm` whose config.json says what is given."""
    folder.mkdir(exist_ok=True)
    save_file({n: t.clone() for n, t in base_state(lm).items()}, folder / "model.safetensors")
    config = weights.released_config(lm, {"audio_token_id": 1})
    config["text_config"] = (text_config(lm) if text is None else text) | {}
    config["audio_encoder_config"] |= audio or {}
    (folder / "config.json").write_text(json.dumps(config | more, default=str))
    return open_source(str(folder))


ROPE = {"rope_type": "default", "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("architecture", "field", "value", "words"),
    [
        (QWEN3, "rope_parameters", ROPE | {"rope_theta": 1e6}, "rope_parameters.rope_theta: 1000000.0"),
        (LLAMA, "rope_parameters", ROPE | {"rope_theta": 5e5}, "rope_parameters.rope_theta: 500000.0"),
        (OMNI, "rope_parameters", ROPE | {"rope_theta": 5e5}, "rope_parameters.rope_theta: 500000.0"),
        (QWEN3, "rope_parameters", LINEAR, 'rope_parameters.(factor: 2.0|rope_type: "linear")'),
        (OMNI, "rms_norm_eps", 1e-5, "rms_norm_eps: 1e-05"),
        (LLAMA, "rms_norm_eps", 1e-5, "rms_norm_eps: 1e-05"),
        (OMNI, "hidden_act", "gelu", 'hidden_act: "gelu"'),
        (QWEN3, "head_dim", 24, "head_dim: 24"),
        (OMNI, "num_attention_heads", 6, "num_attention_heads: 6"),
        (LLAMA, "num_key_value_heads", 3, "num_key_value_heads: 3"),
        (QWEN3, "model_type", "llama", 'model.decoder.architecture: "llama"'),
        (LLAMA, "model_type", "granite", 'model.decoder.architecture: "granite"'),
        (QWEN3, "layer_types", ["sliding_attention", "full_attention"], "layer_types"),
    ],
)  # fmt: skip
def test_weights_that_fit_and_compute_something_else_are_refused(architecture, field, value, words, tmp_path):
    lm = tiny_lm(architecture, seed=1)
    text = text_config(lm)
    load(empty_lm(architecture), [Start(write_released(tmp_path, lm, text), ("*",))], [], merge_lora=False)
    source = write_released(tmp_path, lm, text | {field: value})
    with pytest.raises(WeightsError, match=f"config.json has .*this model .*write .*{words}"):
        load(empty_lm(architecture), [Start(source, ("*",))], [], merge_lora=False)
    load(tiny_lm(architecture), [Start(source, ("audio_encoder.*",))], OTHERS, merge_lora=False)  # not its business


def test_a_config_that_was_read_from_float32_is_the_same(tmp_path):
    lm = tiny_lm(LLAMA, seed=1, rms_norm_eps=1e-5)
    source = write_released(tmp_path, lm, text_config(lm) | {"rms_norm_eps": float(torch.tensor(1e-5))})
    load(empty_lm(LLAMA, rms_norm_eps=1e-5), [Start(source, ("*",))], [], merge_lora=False)


def test_what_a_config_leaves_out_is_transformers_default(tmp_path):
    """rope_theta 10,000 and eps 1e-6 of Qwen3's config class, if the file does not say."""
    lm = tiny_lm(QWEN3, seed=1, rms_norm_eps=1e-5)
    text = {k: v for k, v in text_config(lm).items() if k not in ("rms_norm_eps", "rope_parameters")}
    source = write_released(tmp_path, lm, text)
    with pytest.raises(WeightsError, match="rms_norm_eps 1e-06, this model 1e-05"):
        load(empty_lm(QWEN3, rms_norm_eps=1e-5), [Start(source, ("*",))], [], merge_lora=False)
    load(empty_lm(QWEN3), [Start(source, ("*",))], [], merge_lora=False)


@pytest.mark.parametrize("wrap", ["text_config", "thinker_config", "top"])
def test_the_text_config_is_found_where_each_family_keeps_it(wrap, tmp_path):
    """In transformers 4's words: rope_theta and rope_scaling beside each other, sizes nobody uses."""
    lm = tiny_lm(OMNI, seed=1)
    text = {k: v for k, v in text_config(lm).items() if k != "rope_parameters"}
    text |= {
        "rope_theta": 1e4, "rope_scaling": {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"},
        "sliding_window": 32768, "max_window_layers": 70, "use_cache": True, "torch_dtype": "bfloat16",
        "max_position_embeddings": 99, "init_std": 0.02, "attention_dropout": 0.1,
    }  # fmt: skip
    for theta, good in ((1e4, True), (1e6, False)):
        inner = text | {"rope_theta": theta}
        config = {
            "text_config": {"model_type": "midashenglm", "text_config": inner},
            "thinker_config": {
                "model_type": "qwen2_5_omni", "talker_config": {"rope_theta": 3.0},
                "thinker_config": {"model_type": "qwen2_5_omni_thinker", "text_config": inner},
            },
            "top": inner,
        }[wrap]  # fmt: skip
        save_file({n.removeprefix("decoder."): t.clone() for n, t in base_state(lm).items() if n.startswith("decoder.")},
                  tmp_path / "model.safetensors")  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config))
        starts = [Start(open_source(str(tmp_path)), ("decoder.*",))]
        fresh = ["audio_encoder.*", "audio_projector.*"]
        if good:
            load(tiny_lm(), starts, fresh, merge_lora=False)
        else:
            with pytest.raises(WeightsError, match=r"rope_theta 1000000.0, this model 10000.0"):
                load(tiny_lm(), starts, fresh, merge_lora=False)


def test_qwen2_is_a_decoder_for_the_text_model_of_omni(tmp_path):
    """The same arithmetic: text and audio have one rotary position."""
    lm = tiny_lm(OMNI, seed=1)
    text = {k: v for k, v in text_config(lm).items() if k != "rope_parameters"} | {
        "model_type": "qwen2",
        "rope_theta": 1e4,
    }
    source = write_released(tmp_path, lm, text)
    load(empty_lm(), [Start(source, ("*",))], [], merge_lora=False)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_heads", 4, "write model.encoder.heads: 4"), ("mlp_ratio", 3.0, "cannot be built here"),
        ("target_length", 1012, "has target_length 1012, this model 1008"), ("hop_length", 320, "has hop_length 320"),
        ("n_mels", 128, "n_mels 128"), ("f_max", 7600, "f_max 7600"), ("center", False, "center False"),
        ("patch_stride", [64, 2], "patch_stride"), ("init_values", 1e-5, "init_values"), ("qkv_bias", False, "qkv_bias"),
    ],
)  # fmt: skip
def test_an_encoder_that_would_hear_something_else_is_refused(field, value, words, tmp_path):
    lm = tiny_lm(seed=1)
    source = write_released(tmp_path, lm, audio={field: value})
    with pytest.raises(WeightsError, match=words):
        load(empty_lm(), [Start(source, ("*",))], [], merge_lora=False)


@pytest.mark.parametrize("form", [write_pt, write_hub])
def test_dashengs_own_config_is_compared_too(form, tmp_path):
    state, _ = dasheng_state()
    source = form(tmp_path, state, num_heads=4)
    with pytest.raises(WeightsError, match=r"num_heads 4, this model 2.*write model.encoder.heads: 4"):
        load(tiny_lm(), [Start(source, ("audio_encoder.*",))], OTHERS, merge_lora=False)


def test_a_projector_of_other_groups_is_refused(tmp_path):
    source = write_released(tmp_path, tiny_lm(seed=1), subsample_factor=4)
    with pytest.raises(WeightsError, match="subsample_factor 4, this model 5"):
        load(empty_lm(), [Start(source, ("*",))], [], merge_lora=False)


def test_a_head_that_is_the_embedding_is_not_taken_for_one_of_its_own(tmp_path):
    """A tied checkpoint that stores both: an untied model would train them apart."""
    theirs = tiny_lm(QWEN3, 1, tie_word_embeddings=True)
    state = dict(base_state(theirs))
    state["decoder.lm_head.weight"] = state["decoder.model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"ties its head.*write model.decoder.fields.tie_word_embeddings: true"):
        load(empty_lm(QWEN3), [Start(open_source(str(tmp_path)), ("*",))], [], merge_lora=False)


# -- parts without memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("takes", "fresh", "loaded"),
    [
        (["*"], [], {"audio_encoder", "audio_projector", "decoder"}),
        (["audio_encoder.*", "decoder.*"], ["audio_projector.*"], {"audio_encoder", "decoder"}),
        (["decoder.*"], ["audio_*"], {"decoder"}),
        (["audio_encoder.norm.*", "decoder.*"], ["audio_encoder.blocks.*"], {"decoder"}),
        (["audio_encoder.*"], ["*.bias"], set()),
        ([], ["*"], set()),
    ],
)
def test_what_is_loaded_whole_takes_no_memory_before(takes, fresh, loaded):
    starts = [Start(Source("memory", {}, {}.__getitem__), tuple(takes))]
    assert set(loaded_parts(starts, fresh)) == loaded


@pytest.mark.parametrize("architecture", [OMNI, QWEN3, LLAMA])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_have_no_memory_and_buffers_do(architecture, tied):
    """transformers' rotary tables are in no file: on the meta device, or filled later, they would be garbage."""
    lm, whole = empty_lm(architecture, tie_word_embeddings=tied), tiny_lm(architecture, tie_word_embeddings=tied)
    assert all(p.is_meta for p in lm.parameters())
    assert [n for n, _ in lm.named_parameters()] == [n for n, _ in whole.named_parameters()]
    dim = 16
    expected = 1e4 ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    for model in (lm, whole):
        tables = {n: b for n, b in model.named_buffers() if n.endswith("inv_freq")}
        assert len(tables) == 2
        for table in tables.values():
            assert torch.allclose(table, expected, rtol=1e-6)
    load(lm, [Start(Source("memory", *held(whole)), ("*",))], [], merge_lora=False)
    assert not any(t.is_meta for t in [*lm.parameters(), *lm.buffers()])
    assert (lm.decoder.lm_head.weight is lm.decoder.model.embed_tokens.weight) == tied
    row = packed(conversation(0, 16_000), conversation(1), tail=3)
    assert torch.equal(logits(lm.eval(), row), logits(whole.eval(), row))


def held(lm: AudioLM) -> tuple[dict[str, tuple[int, ...]], Any]:
    state = base_state(lm)
    return {n: tuple(t.shape) for n, t in state.items()}, state.__getitem__


@pytest.mark.parametrize("architecture", [OMNI, QWEN3])
@pytest.mark.parametrize("loaded", [("decoder",), ("audio_encoder", "decoder"), ("audio_encoder",)])
def test_fresh_parts_draw_the_same_numbers_whatever_is_loaded(architecture, loaded):
    torch.manual_seed(5)
    whole = AudioLM(TINY, architecture, FIELDS[architecture])
    after = torch.rand(3)
    torch.manual_seed(5)
    lm = AudioLM(TINY, architecture, FIELDS[architecture], loaded)
    assert torch.equal(torch.rand(3), after)
    for name, parameter in lm.named_parameters():
        if name.split(".")[0] in loaded:
            assert parameter.is_meta
        else:
            assert torch.equal(parameter, whole.get_parameter(name)), name


# -- a release of several shards: in, a step, out, in again -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 7])
def test_a_release_goes_in_learns_goes_out_and_comes_back(dtype, shards, tmp_path):
    """0804-fp32 with its two tables, later ones in bf16 without; one step of LoRA, handed off, merged at the way in."""
    theirs = tiny_lm(seed=1)
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in base_state(theirs).items()}
    state |= {n: t.clone() for n, t in mel_tables().items()} if dtype == torch.float32 else {}
    size = sum(t.nbytes for t in state.values())
    (tmp_path / "release").mkdir()
    save_torch_state_dict(state, tmp_path / "release", max_shard_size=size if shards == 1 else size // 6)
    assert len(list((tmp_path / "release").glob("*.safetensors"))) == shards
    config = weights.released_config(theirs, {"audio_token_id": 1}) | {
        "auto_map": {"AutoConfig": "configuration_midashenglm.MiDashengLMConfig"}
    }
    (tmp_path / "release" / "config.json").write_text(json.dumps(config, default=str))

    lm = empty_lm()
    adapt.freeze_all_but(lm, ["audio_encoder.*", "audio_projector.*"])
    release = open_source(str(tmp_path / "release"))
    start = sources.part_digests({n: release.read(n) for n in release.shapes})
    load(lm, [Start(release, ("*",))], [], merge_lora=False)
    for name, tensor in base_state(lm).items():
        assert torch.equal(tensor, state[name].to(tensor.dtype)), name
    plan = LoraPlan(("all-linear",), 2, 8.0, 0.0)
    adapt.add_lora(lm, plan, seed=2)
    row = packed(conversation(0, 16_000), conversation(1), tail=3)
    untrained = logits(lm.eval(), row)
    optimizer = torch.optim.AdamW([p for p in lm.parameters() if p.requires_grad], lr=1e-2)
    gradients(lm.train(), [row])
    optimizer.step()
    lm.eval()
    trained = logits(lm, row)
    scale = trained.abs().max()
    assert (trained - untrained).abs().max() > 1e-2 * scale
    weights.hand_off(
        lm, tmp_path / "run" / "weights", {"stage": "finetune"}, plan, start_digests=start, token_ids={"audio_token_id": 1},
        save_tokenizer=lambda folder: None,
    )  # fmt: skip
    again = empty_lm()
    load(again, [Start(open_source(str(tmp_path / "run")), ("*",))], [], merge_lora=True)
    assert (logits(again.eval(), row) - trained).abs().max() < 1e-5 * scale


# -- memory -----------------------------------------------------------------------------------------------------------

MEASURE = """
import json, re, sys
from pathlib import Path
import torch
from midasheng import config
from midasheng.model import adapt
from midasheng.train import fit
from midasheng.train.order import Order
from tests.model import tiny_lm

def status(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

torch.set_num_threads(1)
small = tiny_lm()  # for what it imports
adapt.freeze_all_but(small, ["audio_encoder.*"])
adapt.add_lora(small, adapt.LoraPlan(("all-linear",), 8, 32.0, 0.1), 0)
for precision in ("bf16", "fp32"):
    settings = [*sys.argv[1:], f"run.precision={precision}"]
    order = Order(config.load(Path("configs/finetune.yaml"), "mini", settings), Path("runs"), "mini", "x", "", False)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = status("VmRSS")
    lm, _, _ = fit.build(order, fit.open_starts(order))
    weights = sum(p.numel() * p.element_size() for p in lm.parameters())
    print(json.dumps({"precision": precision, "gb": weights / 1e9, "peak": (status("VmHWM") - before) / weights}))
    del lm
"""
WIDE = {
    "vocab_size": 8192, "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 6,
    "num_attention_heads": 12, "num_key_value_heads": 4, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 24, 24]},
}  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's high-water mark of memory")
def test_a_model_is_built_in_little_more_memory_than_its_weights(tmp_path):
    """Random numbers that are written over, a second copy in float32, or the whole file mapped: each would double it."""
    with torch.device("meta"):
        lm = AudioLM(TINY, OMNI, WIDE)
    tile = torch.randn(4096).bfloat16()
    state = {
        n: tile.repeat(-(-t.numel() // 4096))[: t.numel()].reshape(t.shape).clone()
        if t.is_floating_point()
        else torch.tensor(1)
        for n, t in base_state(lm).items()
    }
    state["decoder.lm_head.weight"] *= 2  # not the embedding
    save_torch_state_dict(state, tmp_path, max_shard_size="150MB")
    del state
    fields = [f"model.decoder.fields.{n}={v}" for n, v in WIDE.items() if n != "rope_parameters"]
    fields += [f"model.decoder.fields.rope_parameters.{n}={v}" for n, v in WIDE["rope_parameters"].items()]
    fields += [f"model.encoder.{n}={v}" for n, v in (("dim", TINY.dim), ("depth", TINY.depth), ("heads", TINY.heads))]
    fields += [f"start=[{{from: {tmp_path}, take: ['*']}}]"]
    told = subprocess.run([sys.executable, "-c", MEASURE, *fields], capture_output=True, text=True, cwd=CONFIGS.parent)
    assert told.returncode == 0, told.stderr
    half, whole = (json.loads(line) for line in told.stdout.splitlines() if line.startswith("{"))
    assert half["gb"] > 0.45
    assert whole["gb"] > 0.9
    assert max(half["peak"], whole["peak"]) < 1.15, (half, whole)
