"""Weights: every tensor has one origin, every published layout is read, nothing wrong or half-written gets through."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor

from midasheng.model import adapt, sources, weights
from midasheng.model.adapt import LoraPlan, base_state, lora_state
from midasheng.model.audio_lm import AudioLM
from midasheng.model.sources import Source, WeightsError, open_source
from midasheng.model.weights import Start, carry_lora, load
from tests.model import (
    FIELDS,
    OMNI,
    QWEN3,
    TINY,
    conversation,
    logits,
    noise,
    packed,
    reference_encoder,
    tiny_lm,
)

PARTS = ["audio_encoder.*", "audio_projector.*", "decoder.*"]
QV = LoraPlan(("q_proj", "v_proj"), 2, 8.0, 0.1)
ALL = LoraPlan(("all-linear",), 2, 8.0, 0.1)


def held(state: dict[str, Tensor]) -> Source:
    """Weights in memory."""
    return Source("memory", {n: tuple(t.shape) for n, t in state.items()}, state.__getitem__)


def take_all(lm: AudioLM, source: Source, *, merge_lora: bool = False) -> AudioLM:
    load(lm, [Start(source, ("*",))], [], merge_lora=merge_lora)
    return lm


def same(first: AudioLM, second: AudioLM, glob: str = "*") -> bool:
    """Bit for bit."""
    other = base_state(second)
    return all(torch.equal(t, other[n]) for n, t in base_state(first).items() if adapt.matches(n, [glob]))


def row():
    return packed(conversation(0, 16_000), conversation(1), tail=3)


def write(folder: Path, state: dict[str, Tensor]) -> Source:
    folder.mkdir(exist_ok=True)
    save_file({n: t.clone() for n, t in state.items()}, folder / "model.safetensors")
    return open_source(str(folder))


# -- one origin -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("take", "fresh", "message"),
    [
        (PARTS[::2], [], "4 tensors have no origin, the first audio_projector.net.0.weight"),
        (["*"], ["audio_projector.net.0.*"], "2 tensors have two origins.*memory and fresh"),
        ([*PARTS, "audio_encodr.*"], [], "take `audio_encodr.*` from memory matches no tensor"),
        (PARTS, ["audio_projecter.*"], "fresh: `audio_projecter.*` matches no tensor"),
    ],
)
def test_none_or_two_origins_and_misspelled_globs_are_refused(take, fresh, message):
    with pytest.raises(WeightsError, match=message):
        load(tiny_lm(), [Start(held(base_state(tiny_lm(seed=1))), tuple(take))], fresh, merge_lora=False)


def test_each_part_comes_from_its_own_origin():
    lm, first, second = (tiny_lm(seed=seed) for seed in range(3))
    starts = [Start(held(base_state(first)), ("audio_encoder.*",)), Start(held(base_state(second)), ("decoder.*",))]
    table = load(lm, starts, ["audio_projector.*"], merge_lora=False)
    assert same(lm, first, "audio_encoder.*")
    assert same(lm, second, "decoder.*")
    assert same(lm, tiny_lm(seed=0), "audio_projector.*")
    assert set(table) == {("fresh", "audio_projector", 4), ("memory", "audio_encoder", 35), ("memory", "decoder", 27)}


def without(state: dict[str, Tensor]) -> None:
    del state["audio_encoder.blocks.1.attn.qkv.bias"]


def with_more(state: dict[str, Tensor]) -> None:
    state["audio_encoder.blocks.2.attn.qkv.bias"] = torch.zeros(96)


def mistyped(state: dict[str, Tensor]) -> None:
    state["audio_encoder.blocks.1.attn.qvk.bias"] = state.pop("audio_encoder.blocks.1.attn.qkv.bias")


def exchanged(state: dict[str, Tensor]) -> None:
    first, second = (f"decoder.model.layers.0.mlp.{n}_proj.weight" for n in ("gate", "down"))
    state[first], state[second] = state[second], state[first]


def cut_short(state: dict[str, Tensor]) -> None:
    state["decoder.lm_head.weight"] = state["decoder.lm_head.weight"][:-1]


def of_another_size(state: dict[str, Tensor]) -> None:
    state["audio_encoder.time_pos_embed"] = torch.zeros(1, 32, 1, 251)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without, "lacks 1 tensors, the first audio_encoder.blocks.1.attn.qkv.bias"),
        (with_more, "holds 1 tensors that this model has no place for, the first audio_encoder.blocks.2.attn.qkv.bias"),
        (mistyped, "lacks 1 tensors, the first audio_encoder.blocks.1.attn.qkv.bias"),
        (exchanged, r"mlp.down_proj.weight is \(64, 48\), this model wants \(48, 64\)"),
        (cut_short, r"lm_head.weight is \(63, 48\), this model wants \(64, 48\)"),
        (of_another_size, r"time_pos_embed is \(1, 32, 1, 251\), this model wants \(1, 32, 1, 252\)"),
    ],
)
def test_missing_surplus_and_misshaped_tensors_are_refused(spoil: Callable[[dict[str, Tensor]], None], message):
    state = dict(base_state(tiny_lm(seed=1)))
    spoil(state)
    with pytest.raises(WeightsError, match=message):
        take_all(tiny_lm(), held(state))


# -- published layouts ------------------------------------------------------------------------------------------------


def released(name: str) -> str:
    return name


def transformers_4(name: str) -> str:
    return name.replace("decoder.", "thinker.")


def transformers_5(name: str) -> str:
    return name.replace("decoder.model.", "model.language_model.").replace("decoder.lm_head", "lm_head")


def thinker_5(name: str) -> str:
    return "thinker." + transformers_5(name)


def text_model(name: str) -> str:
    return name.removeprefix("decoder.")


def dasheng_of_the_hub(name: str) -> str:
    return name.replace("audio_encoder.", "encoder.").replace("init_bn.", "init_bn.1.")


LAYOUTS = [
    (released, "*", []),
    (transformers_4, "decoder.*", ["thinker.audio_tower.proj.weight", "thinker.visual.x", "talker.model.norm.weight"]),
    (transformers_5, "decoder.*", ["model.audio_tower.proj.weight", "model.visual.patch_embed.proj.weight"]),
    (thinker_5, "decoder.*", ["thinker.model.visual.x", "talker.model.norm.weight"]),
    (text_model, "decoder.*", []),
    (dasheng_of_the_hub, "audio_encoder.*", []),
]


@pytest.mark.parametrize(("name", "part", "others"), LAYOUTS, ids=[layout[0].__name__ for layout in LAYOUTS])
def test_every_published_layout_is_read(name, part, others, tmp_path):
    lm, theirs = tiny_lm(), tiny_lm(seed=1)
    state = {name(n): t for n, t in base_state(theirs).items() if adapt.matches(n, [part])}
    source = write(tmp_path, state | {other: torch.zeros(1) for other in others})
    load(lm, [Start(source, (part,))], [p for p in PARTS if part not in ("*", p)], merge_lora=False)
    assert same(lm, theirs, part)


def test_bf16_weights_are_upcast(tmp_path):
    theirs = tiny_lm(seed=1)
    lm = take_all(tiny_lm(), write(tmp_path, {n: t.bfloat16() for n, t in base_state(theirs).items()}))
    assert all(p.dtype == torch.float32 for p in lm.parameters())
    assert same(lm, theirs.bfloat16())


def test_dashengs_own_checkpoint(tmp_path):
    reference = reference_encoder(TINY, seed=3)
    settings = {"embed_dim": TINY.dim, "depth": TINY.depth, "num_heads": TINY.heads}
    torch.save({"model": reference.state_dict(), "config": settings}, tmp_path / "dasheng.pt")
    lm = tiny_lm().eval()
    source = open_source(str(tmp_path / "dasheng.pt"))
    load(lm, [Start(source, ("audio_encoder.*",))], PARTS[1:], merge_lora=False)
    clip = torch.from_numpy(noise(30_000, 0))
    with torch.no_grad():
        assert (lm.audio_encoder(clip, [30_000]) - reference(clip[None])[0]).abs().max() < 1e-4


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_pt_file_that_is_no_dasheng_is_refused(content, tmp_path):
    path = tmp_path / "dasheng.pt"
    if content is None:
        torch.save({"state": {}}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"dasheng.pt is no Dasheng checkpoint"):
        open_source(str(path))


class Harmful:
    """What a pickle can hold: a call that is made when it is read."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.witness,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["model", "config"])
def test_a_pt_file_runs_no_code(where, zipped, tmp_path, monkeypatch):
    """Whatever the environment says: it can undo torch's default, on which the dasheng package relies."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    content = {"model": {}, "config": {}} | {where: {"embed_dim": Harmful(tmp_path / "witness")}}
    torch.save(content, tmp_path / "dasheng.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        WeightsError, match=r"dasheng.pt is no Dasheng checkpoint: it holds something else than tensors"
    ):
        open_source(str(tmp_path / "dasheng.pt"))
    assert not (tmp_path / "witness").exists()


def test_shards_with_an_index_and_a_missing_one(tmp_path):
    theirs = tiny_lm(seed=1)
    save_torch_state_dict(base_state(theirs), tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert same(take_all(tiny_lm(), open_source(str(tmp_path))), theirs)
    shards[1].unlink()
    with pytest.raises(WeightsError, match=f"names {shards[1].name}, which is not there"):
        open_source(str(tmp_path))


def listed(folder: Path) -> tuple[Path, dict[str, str]]:
    """Weights in shards: the index and its map."""
    save_torch_state_dict(base_state(tiny_lm(seed=1)), folder, max_shard_size="60KB")
    index = folder / "model.safetensors.index.json"
    return index, json.loads(index.read_text())["weight_map"]


def in_another_shard(folder: Path) -> str:
    index, places = listed(folder)
    name = "audio_encoder.norm.weight"
    places[name] = next(f for f in places.values() if f != places[name])
    index.write_text(json.dumps({"weight_map": places}))
    return f"{places[name]} does not hold {name}, though model.safetensors.index.json says so"


def in_no_shard(folder: Path) -> str:
    index, places = listed(folder)
    places["audio_encoder.cls_token"] = places["audio_encoder.norm.weight"]
    index.write_text(json.dumps({"weight_map": places}))
    return "does not hold audio_encoder.cls_token"


def not_in_the_index(folder: Path) -> str:
    index, places = listed(folder)
    del places["audio_encoder.norm.weight"]
    index.write_text(json.dumps({"weight_map": places}))
    return "holds audio_encoder.norm.weight, which model.safetensors.index.json does not place there"


def beside_an_older_model(folder: Path) -> str:
    listed(folder)
    save_file({"audio_encoder.norm.weight": torch.zeros(32)}, folder / "model.safetensors")
    return "holds model.safetensors, which model.safetensors.index.json does not name"


def with_a_broken_index(folder: Path) -> str:
    index, _ = listed(folder)
    index.write_text(index.read_text()[:-20])
    return "index.json cannot be read as JSON"


def with_an_empty_index(folder: Path) -> str:
    index, _ = listed(folder)
    index.write_text("{}")
    return "holds no weight_map"


def with_a_broken_config(folder: Path) -> str:
    listed(folder)
    (folder / "config.json").write_text('{"model_type": ')
    return "config.json cannot be read as JSON"


def cut_in_mid_shard(folder: Path) -> str:
    listed(folder)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    return f"{shard.name} cannot be read"


@pytest.mark.parametrize(
    "spoil",
    [
        in_another_shard, in_no_shard, not_in_the_index, beside_an_older_model, with_a_broken_index,
        with_an_empty_index, with_a_broken_config, cut_in_mid_shard,
    ],
)  # fmt: skip
def test_shards_and_an_index_that_disagree_are_refused_by_name(spoil: Callable[[Path], str], tmp_path):
    words = spoil(tmp_path)
    with pytest.raises(WeightsError, match=re.escape(words)):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn, torch.float64, torch.bool]
)
def test_a_tensor_of_no_usable_dtype_is_refused_by_name(dtype, tmp_path):
    state = dict(base_state(tiny_lm(seed=1)))
    name = "decoder.model.layers.1.mlp.up_proj.weight"
    state[name] = state[name].to(dtype)
    with pytest.raises(WeightsError, match=rf"{name} is {dtype}, this model wants torch.float32 or"):
        take_all(tiny_lm(), write(tmp_path, state))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loaded_tensor_has_the_dtype_that_it_is_kept_in(dtype, precision, tmp_path):
    """What learns in float32, what is frozen as run.precision says, statistics in float32; all of them rounded once."""
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in base_state(tiny_lm(seed=1)).items()}
    lm = AudioLM(TINY, OMNI, FIELDS[OMNI], weights.PARTS)
    adapt.freeze_all_but(lm, PARTS[:2])
    load(lm, [Start(write(tmp_path, state), ("*",))], [], merge_lora=False, precision=precision)
    for name, tensor in base_state(lm).items():
        half = precision == "bf16" and name.startswith("decoder.")
        kept = torch.bfloat16 if half else torch.float32 if tensor.is_floating_point() else torch.int64
        assert tensor.dtype == kept, name
        assert torch.equal(tensor, state[name].to(kept)), name
    assert {n for n, p in lm.named_parameters() if not p.requires_grad} == {
        n for n in state if n.startswith("decoder.")
    }


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickled_weights_are_never_taken_instead(name, tmp_path):
    torch.save(base_state(tiny_lm()), tmp_path / name)
    with pytest.raises(WeightsError, match=f"{name} and no safetensors. A pickle can run code.*save_pretrained"):
        open_source(str(tmp_path))
    if name != "model.pt":
        with pytest.raises(WeightsError, match="is a file; write the folder"):
            open_source(str(tmp_path / name))


def test_loaded_weights_do_not_change_when_their_file_does(tmp_path):
    """safetensors maps a file into memory; a stage that is trained again writes over it."""
    source = write(tmp_path, base_state(tiny_lm(seed=1)))
    lm = take_all(tiny_lm(), source)
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        opened.write(bytes(file.stat().st_size // 2))
    assert same(lm, tiny_lm(seed=1))


def test_a_cut_off_file_is_refused(tmp_path):
    write(tmp_path, base_state(tiny_lm()))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="cannot be read"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("path", ["nowhere/at/all", "runs/mini", "some-org/no-such-model"])
def test_a_path_that_is_not_there_is_the_users_mistake(path):
    with pytest.raises(WeightsError, match=path):
        open_source(path)


def test_a_run_that_is_not_finished_is_refused(tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(WeightsError, match="is not finished"):
        open_source(str(tmp_path))


def test_a_tied_model_takes_weights_without_a_head_of_their_own(tmp_path):
    theirs = tiny_lm(QWEN3, 1, tie_word_embeddings=True)
    state = base_state(theirs)
    twice = state | {"decoder.lm_head.weight": state["decoder.model.embed_tokens.weight"]}
    for there in (state, twice):
        assert same(take_all(tiny_lm(QWEN3, tie_word_embeddings=True), write(tmp_path, there)), theirs)
    own = base_state(tiny_lm(QWEN3, 1))
    with pytest.raises(WeightsError, match="has a head of its own, this model ties it"):
        take_all(tiny_lm(QWEN3, tie_word_embeddings=True), write(tmp_path, own))
    with pytest.raises(WeightsError, match=r"lacks 1 tensors, the first decoder\.lm_head\.weight"):
        take_all(tiny_lm(QWEN3), write(tmp_path, state))


# -- handing off ------------------------------------------------------------------------------------------------------


def nothing(folder: Path) -> None:
    """No tokenizer."""


def hand_off(
    folder: Path, lm: AudioLM, plan: LoraPlan | None = None, save_tokenizer: Callable[[Path], None] = nothing,
    start: AudioLM | None = None,
) -> Path:  # fmt: skip
    """weights/ of a stage that started from `start` (another model unless said)."""
    weights.hand_off(
        lm, folder, {"stage": "stage1_align"}, plan, token_ids={"audio_token_id": 1, "audio_bos_token_id": 2, "audio_eos_token_id": 3},
        save_tokenizer=save_tokenizer,
        start_digests=sources.part_digests(base_state(start or tiny_lm(seed=77))),
    )  # fmt: skip
    return folder


def with_lora(plan: LoraPlan, seed: int = 0, **fields: object) -> AudioLM:
    """A model whose LoRA has learned something."""
    lm = tiny_lm(seed=seed, **fields)
    adapt.freeze_all_but(lm, PARTS[:2])
    adapt.add_lora(lm, plan, seed=1)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.1)
    return lm.eval()


@pytest.mark.parametrize("architecture", [OMNI, QWEN3])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_to_the_bit(architecture, tied, tmp_path):
    theirs = tiny_lm(architecture, 1, tie_word_embeddings=tied)
    folder = hand_off(tmp_path / "weights", theirs)
    lm = take_all(tiny_lm(architecture, tie_word_embeddings=tied), open_source(str(tmp_path)))
    assert same(lm, theirs)
    shape = json.loads((folder / "config.json").read_text())
    assert shape["model_type"] == "midashenglm"
    assert shape["audio_encoder_config"]["embed_dim"] == TINY.dim
    assert shape["text_config"]["tie_word_embeddings"] == tied


def cut(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def changed(folder: Path) -> None:
    save_file({"audio_encoder.norm.bias": torch.zeros(32)}, folder / "model.safetensors")


def without_adapter(folder: Path) -> None:
    (folder / "adapter" / "adapter_model.safetensors").unlink()


def with_a_stranger(folder: Path) -> None:
    save_file({"audio_encoder.more": torch.zeros(1)}, folder / "model-2.safetensors")


@pytest.mark.parametrize(
    ("trick", "message"),
    [
        (cut, "model.safetensors is missing; stage.json lists it"), (changed, "its sha256 differs"),
        (without_adapter, "adapter_model.safetensors is missing"), (with_a_stranger, "stage.json does not list it"),
    ],
)  # fmt: skip
def test_files_that_are_not_those_of_the_stage_are_refused(trick: Callable[[Path], None], message, tmp_path):
    folder = hand_off(tmp_path / "weights", with_lora(QV), QV)
    open_source(str(tmp_path))
    trick(folder)
    with pytest.raises(WeightsError, match=message):
        open_source(str(tmp_path))


def test_weights_of_another_stage_are_refused(tmp_path):
    source = open_source(str(hand_off(tmp_path / "weights", tiny_lm())))
    sources.check_stage(source, "stage1_align")
    with pytest.raises(WeightsError, match="of stage stage1_align, but `stage2_pretrain` is asked for"):
        sources.check_stage(source, "stage2_pretrain")
    with pytest.raises(WeightsError, match="unknown"):
        sources.check_stage(held(base_state(tiny_lm())), "stage1_align")


def test_a_part_that_was_trained_but_is_what_it_started_from_is_refused(tmp_path):
    start, lm = tiny_lm(), tiny_lm(seed=1)
    lm.audio_encoder.load_state_dict(start.audio_encoder.state_dict())
    with pytest.raises(AssertionError, match="audio_encoder was trained but did not change"):
        hand_off(tmp_path / "weights", lm, start=start)
    lm.audio_encoder.requires_grad_(False)
    source = open_source(str(hand_off(tmp_path / "weights", lm, start=start)))
    sources.check_learned(source, ["*"])  # it was frozen
    source.record["parts"]["audio_encoder"]["trained"] = True  # as if weights/ had been put together by hand
    sources.check_learned(source, ["decoder.*"])
    with pytest.raises(WeightsError, match="audio_encoder is identical to what stage stage1_align started from"):
        sources.check_learned(source, ["audio_encoder.*"])


def fails(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    raise OSError("disk full")


def test_an_interrupted_hand_off_leaves_the_old_weights_whole(tmp_path):
    old, new = tiny_lm(), tiny_lm(seed=1)
    folder = hand_off(tmp_path / "weights", old)
    with pytest.raises(OSError, match="disk full"):
        hand_off(folder, new, save_tokenizer=fails)
    assert same(take_all(tiny_lm(seed=2), open_source(str(tmp_path))), old)
    hand_off(folder, new)
    assert same(take_all(tiny_lm(seed=2), open_source(str(tmp_path))), new)
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]


def test_a_first_hand_off_that_is_interrupted_leaves_no_weights(tmp_path):
    with pytest.raises(OSError, match="disk full"):
        hand_off(tmp_path / "weights", tiny_lm(), save_tokenizer=fails)
    assert not (tmp_path / "weights").exists()


# -- LoRA from stage to stage -----------------------------------------------------------------------------------------


def start_from(source: Source, plan: LoraPlan | None, *, merge: bool) -> AudioLM:
    """The next stage's model, as train/fit.py builds it."""
    lm = take_all(tiny_lm(seed=9), source, merge_lora=merge)
    adapt.freeze_all_but(lm, PARTS[:2])
    if plan is not None:
        adapt.add_lora(lm, plan, seed=2)
    if not merge:
        carry_lora(lm, source, plan)
    return lm.eval()


@pytest.mark.parametrize(("plan", "merge"), [(ALL, False), (QV, False), (ALL, True), (None, True)])
def test_logits_are_the_same_before_and_after_carrying_or_merging(plan, merge, tmp_path):
    before = with_lora(QV)
    source = open_source(str(hand_off(tmp_path / "weights", before, QV)))
    after = start_from(source, plan, merge=merge)
    wanted, scale = logits(before, row()), logits(before, row()).abs().max()
    assert (logits(after, row()) - wanted).abs().max() < 1e-5 * scale
    bare = take_all(tiny_lm(), source).eval()
    assert (logits(bare, row()) - wanted).abs().max() > 1e-2 * scale  # the LoRA does matter


def test_carried_lora_is_counted_and_the_new_layers_are_fresh(tmp_path):
    source = open_source(str(hand_off(tmp_path / "weights", with_lora(QV), QV)))
    lm = start_from(source, ALL, merge=False)
    assert carry_lora(lm, source, ALL) == 4  # q and v of two layers
    for name, tensor in lora_state(lm).items():
        if name in source.lora:
            assert torch.equal(tensor, source.lora[name])
        elif ".lora_B." in name:
            assert not tensor.any()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (None, "comes with LoRA, but this stage has no lora.targets"),
        (LoraPlan(("all-linear",), 4, 16.0, 0.1), "rank 2, alpha 8; this stage rank 4"),
        (LoraPlan(("all-linear",), 2, 16.0, 0.1), "alpha 16: it cannot be carried"),
        (LoraPlan(("q_proj",), 2, 8.0, 0.1), r"adapts decoder.*v_proj, which lora.targets leaves out"),
    ],
)
def test_lora_that_would_be_lost_or_act_differently_is_refused(plan, message, tmp_path):
    source = open_source(str(hand_off(tmp_path / "weights", with_lora(QV), QV)))
    with pytest.raises(WeightsError, match=message) as raised:
        start_from(source, plan, merge=False)
    assert "lora.inherit: merge" in str(raised.value)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("all-linear",), ("layers.[0-3].*",)], ids=str)
def test_peft_reads_the_adapter(targets, tmp_path):
    plan, deep = LoraPlan(targets, 2, 8.0, 0.1), {"num_hidden_layers": 6}
    theirs = with_lora(plan, **deep)
    folder = hand_off(tmp_path / "weights", theirs, plan)
    fresh = take_all(tiny_lm(seed=9, **deep), open_source(str(folder)))
    read = PeftModel.from_pretrained(fresh, folder / "adapter").eval()
    assert set(lora_state(read.base_model.model)) == set(lora_state(theirs))
    ours = logits(theirs, row())
    assert (logits(read.base_model.model, row()) - ours).abs().max() < 1e-5 * ours.abs().max()
