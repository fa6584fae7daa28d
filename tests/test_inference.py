"""Ask a saved model about audio, as a user does: what may be asked with what, and what is said of mistakes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import soundfile
import soxr
import torch
from safetensors.torch import load_file, save_file

import midasheng
from midasheng import frames
from midasheng.config import UserError
from midasheng.data.chat import Chat
from midasheng.inference import Answer, Listener
from midasheng.model import adapt, weights
from midasheng.model.generate import generate
from midasheng.sample import Pack, Turn
from stages import chat as chat_stage
from tests.conftest import tone
from tests.model import LLAMA, OMNI, QWEN3, logits, tiny_lm

WAVE = tone(1.3, 0)
PLAN = adapt.LoraPlan(("all-linear",), 2, 8.0, 0.1)


def hand_off(folder: Path, chat: Chat, architecture: str = OMNI, *, lora: bool = True, **fields: object):
    """weights/ of a model that has learned something; the model itself too."""
    lm = tiny_lm(architecture, vocab_size=512, **fields)
    adapt.freeze_all_but(lm, ["audio_encoder.*", "audio_projector.*"])
    if lora:
        adapt.add_lora(lm, PLAN, seed=1)
        with torch.no_grad():
            for name, parameter in lm.named_parameters():
                if ".lora_B" in name:
                    parameter.normal_(std=0.1)
    weights.hand_off(
        lm, folder, {"stage": "stage3_sft"}, PLAN if lora else None, start_digests=dict.fromkeys(weights.PARTS, ""),
        token_ids=chat.token_ids,
        save_tokenizer=chat.save,
    )  # fmt: skip
    return lm.eval()


@pytest.fixture(scope="module")
def run(chat: Chat, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder."""
    folder = tmp_path_factory.mktemp("run")
    hand_off(folder / "weights", chat)
    return folder


@pytest.fixture(scope="module")
def listener(run: Path) -> Listener:
    return midasheng.load(run)


def wav(path: Path, wave: np.ndarray = WAVE, rate: int = 16_000) -> Path:
    soundfile.write(path, wave, rate, subtype="FLOAT")
    return path


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [OMNI, QWEN3, LLAMA])
@pytest.mark.parametrize("tied", [False, True])
def test_what_was_trained_answers_with_its_lora_merged(architecture, tied, chat, tmp_path):
    lm = hand_off(tmp_path / "weights", chat, architecture, tie_word_embeddings=tied)
    loaded = midasheng.load(tmp_path)
    assert not [n for n, t in [*loaded.lm.named_parameters(), *loaded.lm.named_buffers()] if t.is_meta]
    assert not [n for n, p in loaded.lm.named_parameters() if "lora" in n or p.requires_grad]
    row = loaded._pack([loaded._sample([WAVE], "Which language?", "", False, ())])
    wanted = logits(lm, row)
    assert (logits(loaded.lm, row) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    (found,) = generate(lm, row, loaded.stops, 20)
    answer = loaded.generate(WAVE, "Which language?", max_new_tokens=20)
    assert isinstance(answer, Answer)
    assert (answer.text, answer.new_tokens, answer.finish) == (chat.decode(found.ids), len(found.ids), found.finish)
    assert str(answer) == answer.text


def test_weights_are_loaded_without_anything_of_training(run, tmp_path):
    """In a process of its own, from a folder of four files; importing midasheng alone takes nothing heavy."""
    bare = tmp_path / "bare"
    shutil.copytree(run / "weights", bare)
    (bare / "stage.json").unlink()
    code = f"""
import sys
import midasheng
assert not {{"torch", "transformers", "omegaconf"}} & set(sys.modules), "importing midasheng is no longer light"
listener = midasheng.load({str(bare)!r})
print(listener.generate(None, "Which language?", max_new_tokens=5).new_tokens)
print(sorted({{"lightning", "webdataset", "midasheng.train", "midasheng.curate"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[1] == "[]"
    assert not done.stderr  # nor anything said that nobody asked


def test_an_adapter_beside_published_weights_is_merged(run, listener, tmp_path):
    """Without stage.json, as somebody else would put it there."""
    bare = tmp_path / "bare"
    shutil.copytree(run / "weights", bare)
    (bare / "stage.json").unlink()
    loaded = midasheng.load(bare)
    for (name, ours), other in zip(loaded.lm.state_dict().items(), listener.lm.state_dict().values(), strict=True):
        assert torch.equal(ours, other), name
    config = bare / "adapter" / "adapter_config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps(told | {"use_dora": True}))
    with pytest.raises(UserError, match=r"adapter: use_dora is not understood here"):
        midasheng.load(bare)
    config.write_text(json.dumps(told))
    file = bare / "adapter" / "adapter_model.safetensors"
    save_file({n.replace("q_proj", "wq"): t for n, t in load_file(file).items()}, file)
    with pytest.raises(UserError, match=r"self_attn.wq.lora_A.weight adapts no layer"):
        midasheng.load(bare)


def test_half_precision_is_asked_for_by_name(run, listener):
    half = midasheng.load(run, dtype="bfloat16")
    assert {p.dtype for p in half.lm.parameters()} == {torch.bfloat16}
    assert half.lm.audio_encoder.init_bn.running_var.dtype == torch.float32
    row = half._pack([half._sample([WAVE], "Which language?", "", False, ())])
    difference = (logits(half.lm, row) - logits(listener.lm, row)).abs().max()
    assert 0 < difference < 0.05 * logits(listener.lm, row).abs().max()
    with pytest.raises(UserError, match="dtype=float16: write float32 or bfloat16"):
        midasheng.load(run, dtype="float16")
    with pytest.raises(UserError, match=r"device=gpu: .*write auto, cpu or cuda"):
        midasheng.load(run, device="gpu")


def test_a_config_of_older_transformers_means_the_same(run, listener, tmp_path):
    """rope_theta beside rope_scaling, and fields that are none of the architecture's."""
    shutil.copytree(run / "weights", tmp_path / "old")
    (tmp_path / "old" / "stage.json").unlink()
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    text, rope = config["text_config"], config["text_config"].pop("rope_parameters")
    text |= {
        "rope_theta": rope["rope_theta"], "torch_dtype": "bfloat16", "init_std": 0.02,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": rope["mrope_section"]},
    }  # fmt: skip
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    old = midasheng.load(tmp_path / "old")
    rotary = [lm.decoder.model.rotary_emb.inv_freq for lm in (old.lm, listener.lm)]
    assert torch.equal(*rotary)
    assert (
        old.generate(WAVE, "Which?", max_new_tokens=9).text == listener.generate(WAVE, "Which?", max_new_tokens=9).text
    )


def test_audio_tokens_of_other_names_are_found_again(chat, tmp_path):
    """Decoders without audio tokens of their own reuse reserved ones: config.json says which."""
    named = Chat(chat.path, "<|AUDIO|>", "<|audio_eos|>", "<|audio_bos|>")
    hand_off(tmp_path / "weights", named)
    loaded = midasheng.load(tmp_path).chat
    assert (loaded.audio_bos, loaded.audio, loaded.audio_eos) == (named.audio_bos, named.audio, named.audio_eos)
    assert loaded.audio_bos == chat.audio


def changed(run: Path, folder: Path, **values: object) -> Path:
    """The run's weights with other values in config.json; dots go down."""
    shutil.copytree(run / "weights", folder)
    config = json.loads((folder / "config.json").read_text())
    for name, value in values.items():
        *path, last = name.split("__")
        place = config
        for part in path:
            place = place[part]
        if value is None:
            del place[last]
        else:
            place[last] = value
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "stage.json").unlink()
    return folder


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"audio_encoder_config": None}, "config.json: audio_encoder_config is missing"),
        ({"audio_encoder_config__depth": None}, "config.json: audio_encoder_config.depth is missing"),
        ({"audio_token_id": None}, "config.json: audio_token_id is missing"),
        ({"audio_encoder_config__hop_length": 320}, "hop_length 320, this model 160"),
        ({"audio_encoder_config__target_length": 1024}, "target_length 1024, this model 1008"),
        ({"subsample_factor": 4}, "subsample_factor 4, this model 5"),
        ({"text_config__model_type": "qwen9"}, "config.json: text_config: transformers knows no text model .* 'qwen9'"),
        ({"audio_encoder_config__depth": 3}, "lacks 12 tensors, the first audio_encoder.blocks.2"),
        ({"text_config__hidden_size": 96}, "this model wants"),
        ({"audio_bos_token_id": 99_999}, "has no token 99999"),
    ],
)
def test_a_config_that_describes_another_model_is_refused(values, message, run, tmp_path):
    with pytest.raises(UserError, match=message):
        midasheng.load(changed(run, tmp_path / "changed", **values))


def test_folders_that_are_no_model_are_refused_by_name(run, tmp_path):
    with pytest.raises(
        UserError, match=r"^.*stage9 does not exist; write a run folder, .* or a hub id \(.* holds none\)"
    ):
        midasheng.load(tmp_path / "stage9")
    (tmp_path / "begun").mkdir()
    with pytest.raises(UserError, match=r"^.*begun holds neither stage.json nor model\*.safetensors"):
        midasheng.load(tmp_path / "begun")
    (tmp_path / "begun" / "config.yaml").touch()
    with pytest.raises(UserError, match=r"the run .*begun is not finished"):
        midasheng.load(tmp_path / "begun")
    shutil.copytree(run / "weights", tmp_path / "deaf")
    for name in ("tokenizer.json", "stage.json"):
        (tmp_path / "deaf" / name).unlink()
    with pytest.raises(UserError, match=r"deaf holds no tokenizer.json; put the model's tokenizer there"):
        midasheng.load(tmp_path / "deaf")
    shutil.copytree(run / "weights", tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"^.*cut/model.safetensors is not the file that stage.json describes"):
        midasheng.load(tmp_path / "cut")


def test_a_hub_id_is_loaded_from_the_cache(run, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--acme--hears" / "snapshots" / ("0" * 40)
    shutil.copytree(run / "weights", cached)
    (cached / "stage.json").unlink()  # the hub's copy is no hand-off of ours
    (cached.parent.parent / "refs").mkdir()
    (cached.parent.parent / "refs" / "main").write_text("0" * 40)
    (asked,) = midasheng.load("acme/hears").generate([None], ["Hello?"], max_new_tokens=4)
    (wanted,) = midasheng.load(run).generate([None], ["Hello?"], max_new_tokens=4)
    assert asked.text == wanted.text
    with pytest.raises(UserError, match=r"^acme/deaf is no folder here, and the hub does not give it; write a run"):
        midasheng.load("acme/deaf")


def test_code_in_a_folder_is_never_run(run, tmp_path):
    folder = changed(run, tmp_path / "hostile", auto_map={"AutoConfig": "evil.C", "AutoTokenizer": ["evil.T", None]})
    told = json.loads((folder / "tokenizer_config.json").read_text())
    told |= {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "T"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\nclass C: pass\n")
    with pytest.raises(UserError, match="hostile"):
        midasheng.load(folder)
    assert not (tmp_path / "ran").exists()


# -- asking -----------------------------------------------------------------------------------------------------------


def spied(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> list[Pack]:
    """The packs that the listener asks the model about."""
    seen: list[Pack] = []

    def keeping(lm, prompts, *rest):
        seen.append(prompts)
        return generate(lm, prompts, *rest)

    monkeypatch.setattr("midasheng.inference.generate", keeping)
    return seen


def test_every_form_of_a_clip_is_heard_the_same(listener, monkeypatch, tmp_path):
    seen = spied(listener, monkeypatch)
    at_48k = soxr.resample(WAVE, 16_000, 48_000)
    path = wav(tmp_path / "x.wav")
    forms = [path, str(path), WAVE, torch.from_numpy(WAVE), WAVE.astype(np.float64), (WAVE, 16_000), [path], [WAVE]]
    for form in forms:
        listener.generate(form, "Which?", max_new_tokens=1)
        assert torch.equal(seen[-1].audio_L, torch.from_numpy(WAVE))
    stereo = wav(tmp_path / "stereo.wav", np.stack([at_48k, at_48k], 1), 48_000)
    for form in [(at_48k, 48_000), stereo]:
        listener.generate(form, "Which?", max_new_tokens=1)
        assert len(seen[-1].audio_L) == len(WAVE)
        assert (seen[-1].audio_L - torch.from_numpy(WAVE)).abs()[200:-200].max() < 0.02


def test_prompts_are_those_of_training(listener, chat, monkeypatch):
    """Audio first, no system turn; or what is asked for."""
    seen, two = spied(listener, monkeypatch), [WAVE, tone(0.5, 1)]
    tokens = [frames.audio_tokens(len(clip)) for clip in two]
    cases = [
        ({}, [Turn("user", "Which?", clips=2)]),
        ({"text_first": True}, [Turn("user", "Which?", clips=2, text_first=True)]),
        ({"system": "Be short."}, [Turn("system", "Be short."), Turn("user", "Which?", clips=2)]),
        (
            {"history": [("Who?", "A woman.")], "system": "S"},
            [Turn("system", "S"), Turn("user", "Who?", clips=2), Turn("assistant", "A woman."), Turn("user", "Which?")],
        ),
    ]
    for keywords, turns in cases:
        listener.generate(two, "Which?", max_new_tokens=1, **keywords)
        assert seen[-1].ids_T.tolist() == chat.encode(turns, tokens, answer_follows=True).ids.tolist()
        assert seen[-1].clips == tuple(map(len, two))
    listener.generate(None, "Which?", max_new_tokens=1)
    assert seen[-1].clips == ()


def test_special_tokens_in_a_prompt_are_plain_text(listener, chat, monkeypatch):
    seen = spied(listener, monkeypatch)
    listener.generate(
        None, "<|im_end|><|AUDIO|>", max_new_tokens=1, system="<|im_start|>", history=[("<|im_end|>", "")]
    )
    ids = seen[-1].ids_T.tolist()
    assert ids.count(chat.audio) == 0
    assert (ids.count(chat.im_start), ids.count(chat.im_end)) == (5, 4)  # five turns, the last is open
    assert chat.decode([i for i in ids if i not in (chat.im_start, chat.im_end)]).count("<|im_end|>") == 2


def test_a_clip_too_short_for_an_audio_token_is_padded_with_silence(listener, monkeypatch):
    seen = spied(listener, monkeypatch)
    listener.generate(WAVE[:100], "Which?", max_new_tokens=1)
    assert seen[-1].clips == (3_200,)
    assert torch.equal(seen[-1].audio_L[:100], torch.from_numpy(WAVE[:100]))
    assert not seen[-1].audio_L[100:].any()
    assert len(seen[-1].audio_K) == 1


def test_a_batch_answers_as_one_by_one_in_its_own_order(listener, monkeypatch):
    audio = [WAVE, None, [tone(0.4, 2), tone(2.2, 3)], (tone(0.3, 4), 8_000), tone(0.1, 5)]
    prompts = ["Which language?", "Sing.", "Are they the same?", "Who?", "Is the number even?"]
    alone = [listener.generate(a, p, max_new_tokens=12) for a, p in zip(audio, prompts, strict=True)]
    assert len({a.text for a in alone}) > 2
    for size in (1, 2, 16):
        seen = spied(listener, monkeypatch)
        together = listener.generate(audio, prompts, max_new_tokens=12, batch_size=size)
        assert [a.text for a in together] == [a.text for a in alone]
        assert [a.new_tokens for a in together] == [a.new_tokens for a in alone]
        assert [len(pack.segments) for pack in seen] == {1: [1] * 5, 2: [2, 2, 1], 16: [5]}[size]
    drawn = {"temperature": 1.2, "top_p": 0.9, "seed": 7, "max_new_tokens": 12}
    alone = [listener.generate(a, p, **drawn).text for a, p in zip(audio, prompts, strict=True)]
    assert [a.text for a in listener.generate(audio, prompts, **drawn)] == alone
    assert listener.generate([], []) == []


def byte_by_byte(listener: Listener, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the listener say this text, one byte a token, as a byte-level tokenizer may."""
    ids = list(listener.chat.text(text))
    monkeypatch.setattr("midasheng.inference.steps", lambda *_: ({0: one} for one in [*ids, listener.chat.im_end]))


@pytest.mark.parametrize(
    "text", ["Plain words.", "你好，世界 — ça va? 🎵🎶", " a  b , c . ", "�x�", "𝄞" * 5, "", "x 你"[:2]]
)
def test_a_stream_cuts_no_character_and_joins_to_the_whole(text, listener, monkeypatch):
    ids = listener.chat.text(text)
    byte_by_byte(listener, text, monkeypatch)
    pieces = list(listener.stream(WAVE, "Which?"))
    assert "".join(pieces) == listener.chat.decode(ids) == text
    assert all(pieces)
    if "�" not in text:
        assert not [p for p in pieces if "�" in p]
    assert len(pieces) > 1 or len(text) < 3


def test_a_character_that_is_never_completed_is_in_the_stream_as_in_the_answer(listener, monkeypatch):
    cut = listener.chat.text("a你")[:-1]
    assert len(cut) > 1
    monkeypatch.setattr("midasheng.inference.steps", lambda *_: ({0: one} for one in cut))
    pieces = list(listener.stream(WAVE, "Which?"))
    assert "".join(pieces) == listener.chat.decode(cut)
    assert pieces[0] == "a"


def test_a_stream_is_the_answer(listener):
    for keywords in ({}, {"temperature": 1.5, "seed": 3}):
        pieces = list(listener.stream(WAVE, "Which language?", max_new_tokens=30, **keywords))
        whole = listener.generate(WAVE, "Which language?", max_new_tokens=30, **keywords)
        assert isinstance(whole, Answer)
        assert "".join(pieces) == whole.text
        assert len(pieces) > 1


# -- mistakes ---------------------------------------------------------------------------------------------------------

NAN = np.where(np.arange(5_000) == 77, np.nan, 0.0).astype(np.float32)


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (np.zeros((2, 16_000), np.float32), r"audio has shape \(2, 16000\); write \(samples,\): mono"),
        (np.zeros(16_000, np.int16), "audio has dtype int16; write float32 within .*; divide by 32768"),
        (torch.zeros(16_000, dtype=torch.int32), "audio has dtype int32.*divide by 2147483648"),
        (20_000 * WAVE / np.abs(WAVE).max(), "audio goes up to 20000; full scale is 1"),
        (np.zeros(0, np.float32), "audio is empty: 0 samples"),
        ((np.zeros(0, np.float32), 8_000), "audio is empty: 0 samples"),
        (NAN, "audio holds values that are not finite"),
        ((NAN, 8_000), "audio holds values that are not finite"),
        ([WAVE, NAN], "audio, clip 2 holds values that are not finite"),
        ((WAVE, 0), "audio: a tuple is"),
        ((WAVE, 22_050.0), "audio: a tuple is"),
        ((WAVE, WAVE), "audio: a tuple is .* write several clips as a list"),
        ([[0.0] * 5_000], "audio, clip 1 is a list; write a path, an array"),
        (bytearray(b"RIFF"), "audio is a bytearray; write a path"),
        ("missing.wav", "missing.wav: no such audio file"),
        (Path("/"), "/ cannot be read"),
    ],
)
def test_audio_of_no_use_is_refused_by_name(audio, message, listener):
    with pytest.raises(UserError, match=message):
        listener.generate(audio, "Which?")
    with pytest.raises(UserError, match=message):
        listener.stream(audio, "Which?")  # at once, not at its first piece
    with pytest.raises(
        UserError, match=message.replace("audio", "audio of prompt 2", 1) if message[:5] == "audio" else message
    ):
        listener.generate([WAVE, audio], ["Which?", "Who?"])


def test_files_of_no_use_are_refused_by_name(listener, tmp_path):
    (tmp_path / "text.wav").write_text("no audio")
    with pytest.raises(UserError, match=r"text.wav is no audio that can be read \(undecodable\)"):
        listener.generate(tmp_path / "text.wav", "Which?")
    with pytest.raises(UserError, match=r"nan.wav holds values that are not finite"):
        listener.generate(wav(tmp_path / "nan.wav", NAN), "Which?")
    with pytest.raises(UserError, match=r"empty.wav is empty"):
        listener.generate(wav(tmp_path / "empty.wav", WAVE[:0]), "Which?")


@pytest.mark.parametrize(
    ("audio", "prompt", "keywords", "message"),
    [
        (WAVE, ["a", "b"], {}, "2 prompts need a list of as many audios, and audio is a ndarray"),
        ([WAVE], ["a", "b"], {}, "2 prompts need a list of as many audios, and audio is a list of 1"),
        (WAVE, 7, {}, "prompt is a int; write a string"),
        (WAVE, ["a", 7], {}, "prompt is a list; write a string"),
        (WAVE, "a", {"max_new_tokens": 0}, "max_new_tokens=0: write at least 1"),
        ([WAVE], ["a"], {"batch_size": 0}, "batch_size=0: write at least 1"),
        (WAVE, "a", {"temperature": -1}, "temperature=-1.0: write 0"),
    ],
)
def test_questions_without_meaning_are_refused(audio, prompt, keywords, message, listener):
    with pytest.raises(UserError, match=message):
        listener.generate(audio, prompt, **keywords)


# -- make chat --------------------------------------------------------------------------------------------------------


def chatted(monkeypatch, run: Path, *arguments: str, typed: str = "") -> int:
    import io

    monkeypatch.setattr(sys, "argv", ["chat", "--runs", str(run.parent.parent), "--scale", run.parent.name, *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    return chat_stage.main()


def test_chat_answers_a_prompt_or_each_line_that_is_typed(run, listener, monkeypatch, capsys, tmp_path):
    first, second = wav(tmp_path / "a b.wav"), wav(tmp_path / "c.wav", tone(0.5, 9))
    name = ["--name", run.name, "--audio", str(first), str(second)]
    asked = {"max_new_tokens": 8}
    answers = [listener.generate([first, second], p, **asked).text for p in ("Which?", "Who?")]
    assert chatted(monkeypatch, run, *name, "--prompt", "Which?", "--", "max_new_tokens=8") == 0
    assert capsys.readouterr().out == answers[0] + "\n"
    assert chatted(monkeypatch, run, *name, "--", "max_new_tokens=8", typed="Which?\nWho?\n\nnever\n") == 0
    assert capsys.readouterr().out == "\n".join(answers) + "\n"


def test_chat_says_what_is_wrong_in_one_line(run, monkeypatch, capsys, tmp_path):
    good = str(wav(tmp_path / "a.wav"))
    (tmp_path / "b.wav").write_text("no audio")
    for arguments, message in [
        (["--name", run.name, "--audio", "none.wav"], "none.wav: no such audio file"),
        (["--name", run.name, "--audio", str(tmp_path / "b.wav")], "b.wav is no audio that can be read"),
        (["--name", "stage9", "--audio", good], f"finished runs of {run.parent.name}: "),
        (
            ["--name", run.name, "--audio", good, "--", "temprature=1"],
            "`temprature=1`: write key=value; there are system",
        ),
        (["--name", run.name, "--audio", good, "--", "top_k=many"], "top_k=many is no int"),
        (["--name", run.name, "--audio", good, "--", "top_p=2"], "top_p=2.0: write a share"),
        (["--name", str(tmp_path), "--audio", good], "holds neither stage.json"),
    ]:
        assert chatted(monkeypatch, run, "--prompt", "Which?", *arguments) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert message in err
        assert err.count("\n") == 1
