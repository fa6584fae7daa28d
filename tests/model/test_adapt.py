"""What learns is what was asked for: freezing, LoRA on the decoder alone, precision, and the table that proves it."""

from collections.abc import Callable, Iterable

import pytest
import torch

from midasheng.config import Optim, UserError
from midasheng.model import adapt
from midasheng.model.adapt import ADDED, EMBEDDING, HEAD, LoraPlan, base_state
from midasheng.model.audio_lm import AudioLM
from midasheng.model.generate import generate
from midasheng.train.optim import groups
from tests.model import (
    FIELDS,
    LLAMA,
    OMNI,
    QWEN3,
    TINY,
    at_scale,
    conversation,
    count,
    gradients,
    logits,
    packed,
    tiny_lm,
)

TRAIN = ["audio_encoder.*", "audio_projector.*"]
ATTENTION = {f"self_attn.{n}_proj" for n in "qkvo"}
MLP = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
DEEP = 6  # layers: more than 20 targets, from where on peft shortens the list of targets by itself


def adapted_lm(*targets: str, train: list[str] = TRAIN, **fields: object) -> tuple[AudioLM, dict[str, list[str]]]:
    """A tiny model as a stage makes it, and target -> layers."""
    lm = tiny_lm(**fields)
    adapt.freeze_all_but(lm, train)
    return lm, adapt.add_lora(lm, LoraPlan(targets, 2, 8.0, 0.5), seed=1)


def layers(numbers: Iterable[int], linears: set[str]) -> set[str]:
    return {f"layers.{i}.{name}" for i in numbers for name in linears}


# -- LoRA: exactly where asked ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj", "v_proj"], layers(range(DEEP), {"self_attn.q_proj", "self_attn.v_proj"})),
        (["all-linear"], layers(range(DEEP), ATTENTION | MLP)),
        (["*"], layers(range(DEEP), ATTENTION | MLP)),
        (["layers.[0-3].*"], layers(range(4), ATTENTION | MLP)),
        (["layers.5.mlp.*", "o_proj"], layers([5], MLP) | layers(range(DEEP), {"self_attn.o_proj"})),
    ],
    ids=["atoms", "all-linear", "glob of all", "glob of layers", "glob and atom"],
)
def test_lora_sits_on_exactly_these_layers(targets, expected):
    lm, found = adapted_lm(*targets, num_hidden_layers=DEEP)
    assert {name.split(".lora_")[0] for name in adapt.lora_state(lm)} == {f"decoder.model.{n}" for n in expected}
    assert {name for names in found.values() for name in names} == expected
    assert type(lm.audio_encoder.blocks[0].attn.qkv) is torch.nn.Linear
    assert type(lm.audio_encoder.blocks[0].mlp.fc1) is torch.nn.Linear
    assert type(lm.decoder.lm_head) is torch.nn.Linear
    adapt.learns(lm, TRAIN, found, rank=2)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "query"], "`query` names no linear layer of the decoder; there are down_proj.*q_proj.*v_proj"),
        (["qkv"], "`qkv` names no linear layer of the decoder"),  # the encoder's
        (["lm_head"], "`lm_head` names no linear layer"),
        (["q_proj", "layers.0.*"], "name layers.0.self_attn.q_proj more than once"),
        (["all-linear", "v_proj"], "more than once"),
    ],
)
def test_targets_that_name_nothing_or_the_same_twice_are_refused(targets, message):
    with pytest.raises(UserError, match=message):
        adapted_lm(*targets)


def test_lora_on_a_decoder_that_learns_itself_is_refused():
    with pytest.raises(UserError, match="the decoder itself learns"):
        adapted_lm("q_proj", train=["audio_projector.*", "decoder.model.norm.*"])


@pytest.mark.parametrize("architecture", [OMNI, QWEN3])
def test_base_names_and_logits_are_those_before_lora(architecture):
    before = tiny_lm(architecture).eval()
    after, _ = adapted_lm("all-linear", architecture=architecture)
    after.eval()
    assert list(base_state(after)) == list(base_state(before)) == list(before.state_dict())
    assert all(torch.equal(t, base_state(before)[n]) for n, t in base_state(after).items())
    row = packed(conversation(0, 5_000), conversation(1))
    assert torch.equal(logits(after, row), logits(before, row))  # B starts at zero


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("architecture", [OMNI, QWEN3])
def test_without_lora_a_model_is_its_base_and_with_it_again_afterwards(architecture):
    """Also after an exception, and whatever alpha and rank are: both scales come back."""
    base = tiny_lm(architecture).eval()
    after, _ = adapted_lm("q_proj", "layers.0.mlp.*", architecture=architecture)
    after.eval()
    with torch.no_grad():
        for name, tensor in adapt.lora_state(after).items():
            if "lora_B" in name:
                tensor += torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
    row = packed(conversation(0, 5_000), conversation(1))
    adapted, expected = logits(after, row), logits(base, row)
    assert (adapted - expected).abs().max() > 0.1
    state = {n: t.clone() for n, t in after.state_dict().items()}
    with adapt.without_lora(after):
        assert torch.equal(logits(after, row), expected)
        first, second = (generate(lm, row, [], 6) for lm in (after, base))
        assert [c.ids for c in first] == [c.ids for c in second]
    assert torch.equal(logits(after, row), adapted)
    with pytest.raises(Interrupted), adapt.without_lora(after):
        raise Interrupted
    assert torch.equal(logits(after, row), adapted)
    assert all(torch.equal(t, state[n]) for n, t in after.state_dict().items())
    with adapt.without_lora(base):  # a stage without LoRA
        assert torch.equal(logits(base, row), expected)


def test_a_tied_head_is_one_tensor_of_the_state():
    assert "decoder.lm_head.weight" not in base_state(tiny_lm(tie_word_embeddings=True))


def test_lora_starts_from_its_seed():
    first, second = (adapt.lora_state(adapted_lm("q_proj")[0]) for _ in range(2))
    assert all(torch.equal(t, second[n]) for n, t in first.items())
    assert all(t.any() == ("lora_A" in n) for n, t in first.items())


# -- counts from the architecture -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "targets", "expected"),
    [
        ("7b", ("q_proj", "v_proj"), 2_523_136), ("7b", ("all-linear",), 20_185_088),
        ("3b", ("q_proj", "v_proj"), 1_843_200), ("3b", ("all-linear",), 14_966_784),
    ],
)  # fmt: skip
def test_published_lora_counts(scale, targets, expected):
    lm = at_scale(scale)
    adapt.freeze_all_but(lm, TRAIN)
    found = adapt.add_lora(lm, LoraPlan(targets, 8, 32.0, 0.1), seed=0)
    assert sum(t.numel() for t in adapt.lora_state(lm).values()) == expected
    learns = adapt.learns(lm, TRAIN, found, rank=8)
    lora = [line for line in learns.lines if line.pattern.startswith("LoRA")]
    assert sum(line.expected for line in lora) == expected
    assert learns.trained == expected + count(lm.audio_encoder) + count(lm.audio_projector)


@pytest.mark.parametrize(
    ("scale", "tied"), [("mini", False), ("0.6b", True), ("3b", False), ("3b", True), ("7b", False)]
)
def test_part_parameters_are_the_real_ones(scale, tied):
    lm = at_scale(scale, f"model.decoder.fields.tie_word_embeddings={str(tied).lower()}")
    assert adapt.part_parameters(lm) == {f"{name}.*": count(part) for name, part in lm.named_children()}


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        (QWEN3, {"attention_bias": True}),
    ],
)
def test_part_parameters_of_other_decoders(architecture, fields):
    sizes = FIELDS[LLAMA] if architecture == "llama" else {k: v for k, v in FIELDS[QWEN3].items() if k != "head_dim"}
    lm = AudioLM(TINY, architecture, sizes | fields)
    assert adapt.part_parameters(lm) == {f"{name}.*": count(part) for name, part in lm.named_children()}
    adapt.freeze_all_but(lm, TRAIN)
    found = adapt.add_lora(lm, LoraPlan(("all-linear",), 2, 8.0, 0.1), seed=0)
    adapt.learns(lm, TRAIN, found, rank=2)


def test_adapters_start_unrounded_on_a_bf16_decoder():
    """peft would cast them to the dtype of what they adapt, and their first numbers would be rounded."""
    whole, half = tiny_lm(), tiny_lm()
    for lm in (whole, half):
        adapt.freeze_all_but(lm, TRAIN)
    adapt.set_precision(half, "bf16")
    for lm in (whole, half):
        adapt.add_lora(lm, LoraPlan(("all-linear",), 2, 8.0, 0.1), seed=1)
    other = adapt.lora_state(half)
    assert all(torch.equal(t, other[n]) and other[n].dtype == torch.float32 for n, t in adapt.lora_state(whole).items())
    layer = half.decoder.model.layers[0].self_attn.q_proj
    assert layer.base_layer.weight.dtype == torch.bfloat16
    assert layer.base_layer.weight.shape == (48, 48)


def test_the_table_tells_pattern_and_both_counts():
    lm, found = adapted_lm("q_proj")
    table = adapt.learns(lm, TRAIN, found, rank=2).table()
    row = next(line for line in table.splitlines() if line.startswith("LoRA q_proj"))
    assert row.split()[2:] == ["2", "4", "384", "384", "0"]  # 2 layers x rank 2 x (48 + 48); too small for 8 bit
    total = count(lm)
    trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    assert table.endswith(f"trained {trained:,} of {total:,} parameters; frozen {total - trained:,}")


# -- the table refuses what is not so ---------------------------------------------------------------------------------


def adapter_deleted(lm: AudioLM) -> None:
    attention = lm.decoder.model.layers[1].self_attn
    attention.q_proj = attention.q_proj.base_layer


def adapter_frozen(lm: AudioLM) -> None:
    lm.decoder.model.layers[0].self_attn.v_proj.lora_B.requires_grad_(False)


def encoder_layer_frozen(lm: AudioLM) -> None:
    lm.audio_encoder.blocks[1].mlp.requires_grad_(False)


def head_learns(lm: AudioLM) -> None:
    lm.decoder.lm_head.weight.requires_grad_(True)


@pytest.mark.parametrize("trick", [adapter_deleted, adapter_frozen, encoder_layer_frozen, head_learns])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("all-linear",), ("layers.?.self_attn.*",)])
def test_learns_refuses_a_model_that_was_changed_behind_its_back(trick: Callable[[AudioLM], None], targets):
    lm, found = adapted_lm(*targets)
    adapt.learns(lm, TRAIN, found, rank=2)
    trick(lm)
    with pytest.raises(AssertionError, match="learn"):
        adapt.learns(lm, TRAIN, found, rank=2)


def test_learns_refuses_a_sleeping_tensor_under_any_glob():
    train = ["audio_encoder.blocks.*"]
    lm = tiny_lm()
    adapt.freeze_all_but(lm, train)
    lm.audio_encoder.blocks[1].mlp.requires_grad_(False)
    with pytest.raises(AssertionError, match=r"blocks.1.mlp.\w+.weight does not learn but train asks for it"):
        adapt.learns(lm, train, {}, rank=2)


# -- frozen -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("glob", ["encoder.*", "audio_encoder.block.*", "lora.*"])
def test_a_train_glob_that_matches_nothing_is_refused(glob):
    with pytest.raises(UserError, match="matches no tensor; there are audio_encoder"):
        adapt.freeze_all_but(tiny_lm(), ["audio_projector.*", glob])


def test_frozen_is_no_gradient_and_no_optimizer_and_eval():
    lm, _ = adapted_lm("q_proj", train=["audio_projector.*", "audio_encoder.blocks.1.*"])
    lm.train()
    found = gradients(lm, [packed(conversation(0, 16_000))])
    learning = {n for n in found if n.startswith(("audio_projector.", "audio_encoder.blocks.1.")) or ".lora_" in n}
    assert {n for n, g in found.items() if g is not None} == learning
    grouped = [p for group in groups(lm.named_parameters(), Optim()) for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped})
    assert {id(p) for p in grouped} == {id(p) for n, p in lm.named_parameters() if n in learning}
    for name, module in lm.named_modules():
        if any(p.requires_grad for p in module.parameters()):
            assert module.training, name
        elif ".lora_" not in name:
            assert not module.training, name


def test_loras_dropout_works_in_training_only():
    lm, _ = adapted_lm("all-linear")
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    row = packed(conversation(0, 16_000))

    def twice() -> bool:
        torch.manual_seed(0)
        first = lm(row)
        return torch.equal(first, lm(row))

    lm.train()
    assert not twice()
    lm.eval()
    assert twice()


# -- precision --------------------------------------------------------------------------------------------------------


def test_bf16_keeps_what_learns_and_the_statistics_in_fp32():
    lm, _ = adapted_lm("q_proj", train=["audio_projector.*"])
    adapt.set_precision(lm, "bf16")
    for name, parameter in lm.named_parameters():
        learns = name.startswith("audio_projector.") or ".lora_" in name
        assert parameter.requires_grad == learns, name
        assert parameter.dtype == (torch.float32 if learns else torch.bfloat16), name
    statistics = lm.audio_encoder.init_bn
    assert statistics.running_mean.dtype == statistics.running_var.dtype == torch.float32
    assert lm.compute_dtype == torch.bfloat16
    row = packed(conversation(0, 16_000), conversation(1))
    assert lm(row).dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in gradients(lm, [row]).values() if g is not None)


def test_bf16_computes_what_fp32_does():
    whole, half = (adapted_lm("q_proj")[0].eval() for _ in range(2))
    adapt.set_precision(whole, "fp32")
    adapt.set_precision(half, "bf16")
    assert all(p.dtype == torch.float32 for p in whole.parameters())
    assert whole.compute_dtype is None
    row = packed(conversation(0, 16_000), conversation(1))
    with torch.no_grad():
        assert not torch.equal(whole(row), half(row))
        assert (whole(row) / half(row) - 1).abs().max() < 0.05


def test_the_front_end_stays_in_fp32_under_autocast():
    encoder = tiny_lm().audio_encoder
    clip = torch.from_numpy(conversation(0, 16_000).clips[0])
    normal = encoder.init_bn(encoder.log_mel(clip))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder.init_bn(encoder.log_mel(clip)), normal)


# -- rows of added tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("ids", [range(0, 2), range(20, 40), range(61, 64)])
def test_rows_that_learn_act_as_rows_of_the_table_and_no_other_learns(tied, ids):
    """Losses, logits and gradients against a model whose whole tables learn and hold these rows; targets among them."""
    lm = tiny_lm(LLAMA, tie_word_embeddings=tied)
    adapt.freeze_all_but(lm, TRAIN)
    lm.decoder.learn_rows(ids)
    with torch.no_grad():
        for rows in lm.decoder.added.values():
            rows += torch.randn(rows.shape, generator=torch.Generator().manual_seed(3))
    adapt.learns(lm, TRAIN, {}, 8)
    other = tiny_lm(LLAMA, seed=4, tie_word_embeddings=tied)
    other.load_state_dict(base_state(lm), strict=not tied)
    row = packed(*(conversation(n, 5_000, answer=9) for n in range(4)), tail=3)
    assert {*row.ids_T.tolist()} & {*ids}
    torch.testing.assert_close(logits(lm, row), logits(other, row))
    torch.testing.assert_close(lm(row), other(row))
    got, wanted = gradients(lm, [row]), gradients(other, [row])
    for name, table in (("embedding", EMBEDDING), ("head", HEAD)):
        if not (tied and name == "head"):
            torch.testing.assert_close(got[f"{ADDED}{name}"], wanted[table][ids.start : ids.stop])
            assert got[table] is None


def test_a_count_of_rows_that_is_not_the_tables_is_an_error():
    lm = tiny_lm(LLAMA)
    adapt.freeze_all_but(lm, ["audio_projector.*"])
    lm.decoder.learn_rows(range(60, 63))
    table = adapt.learns(lm, ["audio_projector.*"], {}, 8)
    assert table.lines[-1].parameters == table.lines[-1].expected == 2 * 3 * 48
    assert table.trained + table.frozen == count(tiny_lm(LLAMA))
    lm.decoder.added.pop("head")
    with pytest.raises(AssertionError, match="rows of 3 added tokens: 144 parameters learn, the architecture says 288"):
        adapt.learns(lm, ["audio_projector.*"], {}, 8)


def test_frozen_beside_added_rows_the_decoder_is_not_computed_twice():
    lm = tiny_lm(LLAMA)
    adapt.freeze_all_but(lm, ["audio_projector.*"])
    lm.decoder.learn_rows(range(60, 63))
    with pytest.raises(UserError, match="decoder is frozen"):
        lm.recompute(["decoder"])
