"""Decoders without the audio tokens or ChatML: rows are added and they alone learn; other tokens begin and end turns."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import midasheng
from midasheng.config import ConfigError, Hardware, UserError
from midasheng.data.chat import Chat
from midasheng.data.shard import Reading, side_path
from midasheng.data.storage import ShardFile
from midasheng.model import adapt, export
from midasheng.model.adapt import EMBEDDING, HEAD
from midasheng.model.export import Asked, ExportError
from midasheng.sample import NO_TARGET, Turn
from midasheng.train import sharded
from midasheng.train.fit import build, open_starts
from midasheng.train.module import Stopped
from tests.conftest import Tiny, order_for, record, run_stage, tone
from tests.data.test_shard import CARD
from tests.model import LLAMA, tiny_lm
from tests.test_export import licence, same_process, some_trials  # noqa: F401  # a fixture
from tests.train.test_resume import same_run, stop_after

START, END, OF_TEXT = "<|start_header_id|>", "<|eot_id|>", "<|end_of_text|>"
ADDED = ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>")
NAMES = {"audio_bos": ADDED[0], "audio": ADDED[1], "audio_eos": ADDED[2], "turn_start": START, "turn_end": END}


@pytest.fixture(scope="module")
def llama_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that knows neither ChatML nor audio."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=[OF_TEXT, START, END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator([json.dumps(record(n)) for n in range(42)], trainer)
    folder = tmp_path_factory.mktemp("llama_tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token=OF_TEXT).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama_chat(llama_tokenizer: Path) -> Chat:
    return Chat(str(llama_tokenizer), **NAMES, add=ADDED)


def llama_weights(folder: Path, *, known: int, rows: int, tied: bool) -> Path:
    """Text weights as transformers writes them."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=rows, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=4096, tie_word_embeddings=tied, rope_theta=1e6,
        rms_norm_eps=1e-6,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.get_input_embeddings().weight.data += 0.3  # a mean that is not 0
    model.get_input_embeddings().weight.data[known:] = 2.0  # rows that only fill the table
    model.save_pretrained(folder)
    return folder


class Llama:
    """A Llama-like decoder with `spare` rows behind its tokenizer's, and the settings that train it."""

    def __init__(self, root: Path, tiny_data: Tiny, tokenizer: Path, *, tied: bool, spare: int = 0) -> None:
        self.root, self.tiny, self.first = (
            root,
            tiny_data,
            len(Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_vocab()),
        )
        self.tied, self.rows = tied, self.first + spare
        weights = llama_weights(root / "text", known=self.first, rows=self.rows, tied=tied)
        tokens = {f"tokenizer__{name}": token for name, token in NAMES.items()}
        self.settings = tokens | {
            "tokenizer__path": tokenizer, "tokenizer__add": f"[{','.join(ADDED)}]", "weights__decoder": weights,
            "model__decoder__architecture": "llama", "model__decoder__fields__vocab_size": self.rows,
            "model__decoder__fields__tie_word_embeddings": tied, "model__decoder__fields__rms_norm_eps": 1e-6,
        }  # fmt: skip

    def run(self, stage: str, runs: str = "runs", **more: object) -> Path:
        return run_stage(stage, self.tiny, self.root / runs, **self.settings, **more)

    def stored(self, folder: Path) -> dict[str, torch.Tensor]:
        state = load_file(folder / "model.safetensors")
        return {("decoder." + n if not n.startswith(("decoder.", "audio_")) else n): t for n, t in state.items()}


@pytest.mark.parametrize(("tied", "spare"), [(False, 0), (True, 5)])
@pytest.mark.usefixtures("same_process")
def test_added_tokens_learn_alone_and_go_all_the_way(tied, spare, llama_tokenizer, tiny_data, tmp_path):
    llama = Llama(tmp_path, tiny_data, llama_tokenizer, tied=tied, spare=spare)
    text = llama.stored(tmp_path / "text")
    before = llama.stored(llama.run("stage1_align") / "weights")  # all of the decoder learns here
    tables = [EMBEDDING] if tied else [EMBEDDING, HEAD]
    first, until = llama.first, llama.first + len(ADDED)
    assert all(len(before[t]) == max(llama.rows, until) for t in tables)
    assert not torch.equal(before[EMBEDDING][:first], text[EMBEDDING][:first])

    second = llama.run("stage2_pretrain", log__val_every=1)
    said = (second / "trainable.txt").read_text()
    count = len(tables) * len(ADDED) * 64
    assert f"rows of {len(ADDED)} added tokens" in said
    assert f"{count:,}" in next(line for line in said.splitlines() if line.startswith("rows of"))
    after = llama.stored(second / "weights")
    for table in tables:
        means = text[table][:first].double().mean(0).float()
        assert torch.equal(after[table][:first], text[table][:first]), f"{table}: a frozen row moved"
        assert torch.equal(after[table][until:], text[table][until:])
        for row in (first, first + 2):  # what stands around the audio
            moved = (after[table][row] - means).abs().max()
            assert 0 < moved < 0.01
    assert not torch.equal(after[EMBEDDING][first], after[EMBEDDING][first + 2])

    third = llama.run("stage3_sft")  # from what stage 2 learned, not from the means again
    last = llama.stored(third / "weights")
    for table in tables:
        assert torch.equal(last[table][:first], text[table][:first])
        moved = (last[table][first:until] - after[table][first:until]).abs().max()
        assert 0 < moved < (after[table][first] - text[table][:first].mean(0)).abs().max() + 0.05
    order = order_for("stage3_sft", tiny_data, tmp_path / "runs", **llama.settings)
    begun = build(order, open_starts(order), range(first, until))[0]
    assert all(torch.equal(adapt.base_state(begun)[t], after[t]) for t in tables)

    listener = midasheng.load(third)
    assert listener.chat.added == range(max(listener.chat.tokenizer.get_vocab().values()) + 1, until)[:0]
    assert listener.stops == (listener.chat.im_end, listener.chat.tokenizer.eos_token_id)
    assert listener.chat.join([listener.chat.im_end]) == END
    with pytest.raises(ExportError, match="rows of added tokens"):
        export.export(third, order.stage, Asked(tmp_path / "adapter", "adapter"), [], "", licence, "me")
    chat = Chat(str(third / "weights"), **NAMES)
    to = tmp_path / f"to_{tied}_{spare}"
    found = export.export(third, order.stage, Asked(to), some_trials(order.stage, chat), "tones", licence, "me")
    assert found["certificate"]["reloaded against live"]["max"] < 1e-4
    assert f"{{{{- '{START}' + message['role']" in (to / "chat_template.jinja").read_text()
    assert END in (to / "chat_template.jinja").read_text()
    assert "im_start" not in (to / "chat_template.jinja").read_text()
    assert listener.chat.im_end in json.loads((to / "generation_config.json").read_text())["eos_token_id"]
    exported = midasheng.load(to)
    assert {n: exported.chat.token_ids[n] for n in listener.chat.token_ids} == listener.chat.token_ids
    asked = [tone(1.1, 3), "Which language?"]
    assert exported.generate(*asked, max_new_tokens=8).text == listener.generate(*asked, max_new_tokens=8).text


def test_ranks_that_share_the_model_refuse_added_rows():
    """Their tables are cut over ranks: rows put into them would be lost or misplaced."""
    lm = tiny_lm(LLAMA)
    adapt.freeze_all_but(lm, ["audio_encoder.*", "audio_projector.*"])
    assert sharded.chosen(Hardware(devices=2, strategy="fsdp"), lm) == "fsdp"
    lm.decoder.learn_rows(range(60, 63))
    with pytest.raises(ConfigError, match=r"tokenizer\.add: .*hardware\.strategy=ddp"):
        sharded.chosen(Hardware(devices=2, strategy="fsdp"), lm)
    assert sharded.chosen(Hardware(devices=2), lm) == "ddp"


def test_added_rows_resume_to_the_bit(llama_tokenizer, tiny_data, tmp_path, monkeypatch):
    llama = Llama(tmp_path, tiny_data, llama_tokenizer, tied=True)
    llama.run("stage1_align", "whole")
    whole = llama.run("stage2_pretrain", "whole", optim__name="adamw8bit")
    llama.run("stage1_align", "parts")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            llama.run("stage2_pretrain", "parts", optim__name="adamw8bit")
    same_run(whole, llama.run("stage2_pretrain", "parts", optim__name="adamw8bit"))


# -- other tokens around turns ----------------------------------------------------------------------------------------


def test_turns_stand_between_the_mapped_tokens(llama_chat):
    turns = [
        Turn("system", "Be short."), Turn("user", f"{END} or <|im_end|>?", clips=1), Turn("assistant", "yes"),
        Turn("user", "Sure?"), Turn("assistant", "no"),
    ]  # fmt: skip
    encoded = llama_chat.encode(turns, [2])
    assert llama_chat.join(encoded.ids) == (
        f"{START}system\nBe short.{END}\n{START}user\n<|audio_bos|><|AUDIO|><|AUDIO|><|audio_eos|>{END} or <|im_end|>?"
        f"{END}\n{START}assistant\nyes{END}\n{START}user\nSure?{END}\n{START}assistant\nno{END}"
    )
    # as the text holds it, it ends no turn
    assert encoded.ids.tolist().count(llama_chat.im_end) == 5
    at = np.flatnonzero(encoded.labels != NO_TARGET)
    assert llama_chat.join(encoded.labels[at]) == f"yes{END}no{END}"
    assert (encoded.labels[at] == encoded.ids[at + 1]).all()
    assert llama_chat.added == range(len(llama_chat.tokenizer) - 3, len(llama_chat.tokenizer))
    assert not llama_chat.special & set(llama_chat.text(f"{START}{END}<|AUDIO|>"))
    assert llama_chat.decode(encoded.labels[at]) == "yesno"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"add": ADDED[:2]}, r"has no token <\|audio_eos\|>.*tokenizer.add"),
        ({"add": (*ADDED, END)}, r"has <\|eot_id\|> already"),
        ({"add": ADDED, "turn_end": "yes"}, "has no token yes|yes is no special token"),
        ({"add": ADDED, "turn_end": "a"}, rf"a is no special token.*{OF_TEXT[2:-2]}"),
    ],
)
def test_tokens_that_cannot_do_it_are_refused(more, message, llama_tokenizer):
    with pytest.raises(UserError, match=message):
        Chat(str(llama_tokenizer), **(NAMES | more))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer__turn_end": "<|AUDIO|>"}, "each needs a token of its own"),
        ({"tokenizer__add": "['<|noise|>']"}, r"tokenizer.add: '<\|noise\|>' must be"),
        ({"tokenizer__add": "['<|AUDIO|>','<|AUDIO|>']"}, "must be there once"),
    ],
)
def test_settings_without_sense_are_refused(settings, message, tiny_data, tmp_path):
    with pytest.raises(ConfigError, match=message):
        order_for("stage2_pretrain", tiny_data, tmp_path, **settings)


def test_a_side_file_is_not_read_with_other_tokens(llama_tokenizer, llama_chat, tmp_path):
    """It holds the ids that conversations begin with."""
    other = Chat(str(llama_tokenizer), **(NAMES | {"turn_start": END, "turn_end": START}), add=ADDED)
    assert other.fingerprint() == llama_chat.fingerprint()
    shard = ShardFile("/data/a.tar", 10, "1")
    assert side_path(tmp_path, Reading(CARD, other), shard) != side_path(tmp_path, Reading(CARD, llama_chat), shard)


def test_a_table_that_lacks_rows_of_known_tokens_is_refused(llama_tokenizer, tiny_data, tmp_path):
    llama = Llama(tmp_path, tiny_data, llama_tokenizer, tied=True)
    llama_weights(tmp_path / "text", known=llama.first, rows=llama.first - 1, tied=True)
    with pytest.raises(UserError, match=r"embed_tokens.weight is \(\d+, 64\), this model wants"):
        llama.run("stage1_align")
