"""The scale small with its real text weights, where `make data SCALE=small` has brought them."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from midasheng import config
from midasheng.config import Stage
from midasheng.data.room import open_chat
from midasheng.model.decoder import Decoder
from midasheng.model.sources import open_source
from midasheng.sample import Turn
from tests.conftest import CONFIGS

ROOT = Path(__file__).parent.parent
needs_weights = pytest.mark.skipif(
    not (ROOT / "data/small/prepared.json").is_file(), reason="no text weights; `make data SCALE=small` brings them"
)
TEXTS = (
    "A dog barks twice and then a door closes. Somebody laughs in the next room while rain falls on the roof.",
    "In 1912, the ship struck an iceberg; 1,517 people died in the cold water before help arrived at four o'clock.",
    "To cook rice, rinse it until the water runs clear, add a little more water than rice, and wait 15 minutes.",
)


@pytest.fixture(scope="module")
def stage() -> Stage:
    return config.load(CONFIGS / "stage1_align.yaml", "small", [], CONFIGS).stage


@pytest.fixture(scope="module")
def decoder(stage) -> Decoder:
    """Our decoder with the prepared weights."""
    made = Decoder(stage.model.decoder.architecture, stage.model.decoder.fields).eval()
    source = open_source(str(ROOT / stage.weights.decoder))
    state = {name.removeprefix("decoder."): source.read(name) for name in source.shapes}
    missing, surplus = made.load_state_dict(state, strict=False)
    assert (missing, surplus) == (["lm_head.weight"], [])  # tied
    return made


def test_stage_1_does_not_destroy_the_decoder(stage):
    """The decoder is pretrained: stage 1 moves it less than what starts from nothing. With mini's rates stage 3 costs what
    stage 2 had learned (LOG.md)."""
    assert set(stage.optim.lr_for) == {"audio_encoder.*", "audio_projector.*"}
    assert stage.optim.lr < min(stage.optim.lr_for.values()) / 5
    for name, of_mini in (("stage2_pretrain", 1.0), ("stage3_sft", 0.25)):
        ours, mini = (config.load(CONFIGS / f"{name}.yaml", s, [], CONFIGS).stage for s in ("small", "mini"))
        assert ours.optim.lr_for["*.lora_*"] == of_mini * mini.optim.lr_for["*.lora_*"]
        assert ours.run.precision == "fp32"
    tokens = {stage.tokenizer.audio_bos, stage.tokenizer.audio, stage.tokenizer.audio_eos}
    assert len(tokens) == 3


@needs_weights
def test_the_fields_are_those_of_the_weights(stage):
    theirs = json.loads((ROOT / stage.weights.decoder / "config.json").read_text())
    ours = dict(stage.model.decoder.fields)
    assert theirs["model_type"] == stage.model.decoder.architecture
    assert theirs.pop("rms_norm_eps") == pytest.approx(ours.pop("rms_norm_eps"), rel=1e-6)  # a float32 in the GGUF
    assert {name: theirs[name] for name in ours} == ours


@needs_weights
def test_packed_text_costs_what_it_costs_stock_llama_alone(stage, decoder):
    from transformers import AutoTokenizer, LlamaForCausalLM

    stock = LlamaForCausalLM.from_pretrained(ROOT / stage.weights.decoder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / stage.tokenizer.path)
    rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in TEXTS]
    with torch.no_grad():
        position_T = torch.cat([torch.arange(len(ids)) for ids in rows])
        hidden_TD = decoder(decoder.embed(torch.cat(rows)), position_T, [len(ids) for ids in rows])
        packed = decoder.logits(hidden_TD).split([len(ids) for ids in rows])
        for ids_T, ours in zip(rows, packed, strict=True):
            nats = float(cross_entropy(ours[:-1], ids_T[1:]))
            assert nats == pytest.approx(float(stock(input_ids=ids_T[None], labels=ids_T[None]).loss), abs=1e-4)


@needs_weights
def test_it_answers_in_english(stage, decoder):
    """Greedy, by our packed decoder and our ChatML, without a system turn."""
    chat = open_chat_here(stage)
    question = chat.encode([Turn("user", "What is the capital of France?")], [], answer_follows=True)
    ids = question.ids.tolist()
    with torch.no_grad():
        for _ in range(12):
            row = torch.tensor(ids)
            best = int(decoder.logits(decoder(decoder.embed(row), torch.arange(len(row)), [len(row)])[-1:]).argmax())
            if best == chat.im_end:
                break
            ids.append(best)
    assert chat.decode(ids[len(question.ids) :]) == "The capital of France is Paris."
    assert chat.im_end == 2


@needs_weights
def test_the_tokens_around_audio_differ_from_each_other_and_from_the_start_of_a_turn(stage, decoder):
    """Most reserved tokens of SmolLM2 share one embedding, next to <|im_start|>; the table is frozen in stages 2, 3."""
    chat = open_chat_here(stage)
    around = decoder.embed(torch.tensor([chat.audio_bos, chat.audio_eos, chat.im_start, chat.im_end]))
    alike = cosine_similarity(around[:, None], around[None], dim=-1)
    assert max(alike[0, 1], alike[0, 2], alike[0, 3], alike[1, 2], alike[1, 3]) < 0.95, alike


@needs_weights
def test_the_tokens_of_audio_stand_in_no_text(stage):
    root = ROOT / stage.data.root
    shards = sorted(root.glob("*.tar"))
    assert shards, f"no shards in {root}"
    tokens = (stage.tokenizer.audio_bos, stage.tokenizer.audio, stage.tokenizer.audio_eos)
    found = [(path.name, t) for path in shards for t in tokens if t.encode() in path.read_bytes()]
    assert not found


def open_chat_here(stage: Stage):
    """The chat of small, wherever the tests are called from."""
    import dataclasses

    tokenizer = dataclasses.replace(stage.tokenizer, path=str(ROOT / stage.tokenizer.path))
    return open_chat(dataclasses.replace(stage, tokenizer=tokenizer))
