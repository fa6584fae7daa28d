"""Ask a trained model about audio: `midasheng.load("runs/mini/stage3_sft").generate("x.wav", "What is heard?")`.

Needs a folder of weights with its config.json and tokenizer, and nothing of training. Here text and audio meet the
model: above both `data` (which makes prompts) and `model` (which continues them).
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from midasheng import frames
from midasheng.config import UserError
from midasheng.data.audio import Skip, announced_samples, decode
from midasheng.data.chat import Chat
from midasheng.sample import NO_TARGET, Pack, Sample, Turn, pack

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it warns of kernels that nobody asked

from midasheng.model import adapt, attention, weights  # noqa: E402
from midasheng.model.audio_lm import PARTS, AudioLM  # noqa: E402
from midasheng.model.decoder import text_fields  # noqa: E402
from midasheng.model.encoder import EncoderShape  # noqa: E402
from midasheng.model.generate import Sampling, generate, steps  # noqa: E402
from midasheng.model.sources import Source, open_source  # noqa: E402

Clip: TypeAlias = "str | Path | bytes | NDArray[Any] | torch.Tensor | tuple[NDArray[Any] | torch.Tensor, int]"
Audio: TypeAlias = "Clip | Sequence[Clip] | None"
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
FULL_SCALE = 100.0  # of an array that was scaled to integers; a clipped recording goes little beyond 1


@dataclass(frozen=True)
class Answer:
    """What the model says: its text, why it ended ("stop": by itself; "length": at max_new_tokens), the number of its
    tokens, seconds from the start of its batch to its end, and the number of its prompt's tokens, audio tokens among
    them."""

    text: str
    finish: str
    new_tokens: int
    seconds: float
    prompt_tokens: int

    def __str__(self) -> str:
        return self.text


# -- audio ------------------------------------------------------------------------------------------------------------


def waveform(clip: Clip, name: str = "audio") -> NDArray[np.float32]:
    """A path, a file's bytes, an array or (array, sample rate) as the model hears it: 16 kHz mono float32, at least
    MIN_SAMPLES long.

    Raises UserError that begins with `name`, or with the path.
    """
    if isinstance(clip, str | Path):
        name = str(clip)
        wave = _decoded(_file(Path(clip)), name)
    elif isinstance(clip, bytes):
        wave = _decoded(clip, name)
    elif isinstance(clip, tuple):
        if len(clip) != 2 or isinstance(clip[1], bool) or not isinstance(clip[1], int | np.integer) or clip[1] <= 0:
            raise UserError(f"{name}: a tuple is (array, sample rate in Hz); write several clips as a list")
        wave = _array(clip[0], name)
        if clip[1] != frames.SAMPLE_RATE:
            file = io.BytesIO()
            soundfile.write(file, wave, int(clip[1]), format="WAV", subtype="FLOAT")
            wave = _decoded(file.getvalue(), name)
    else:
        wave = _array(clip, name)
    if not len(wave):
        raise UserError(f"{name} is empty: 0 samples")
    # as vLLM does: shorter ones have no audio token
    return np.pad(wave, (0, max(0, frames.MIN_SAMPLES - len(wave))))


def _file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such audio file (looked for in {Path.cwd()})") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _decoded(data: bytes, name: str) -> NDArray[np.float32]:
    try:
        return decode(data, announced_samples(data))
    except Skip as skip:
        if skip.reason == "not finite":
            raise UserError(f"{name} holds values that are not finite (NaN or infinity)") from None
        raise UserError(
            f"{name} is no audio that can be read ({skip.reason}): write wav, flac, mp3, ogg or opus; "
            "`ffmpeg -i FILE -ac 1 -ar 16000 out.wav` makes one of nearly everything"
        ) from None


def _array(array: object, name: str) -> NDArray[np.float32]:
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = array.float().numpy() if array.is_floating_point() else array.numpy()
    if not isinstance(array, np.ndarray):
        raise UserError(f"{name} is a {type(array).__name__}; write a path, an array, or (array, sample rate)")
    if array.dtype.kind != "f":
        hint = f"; divide by {-np.iinfo(array.dtype).min}" if array.dtype.kind == "i" else ""
        raise UserError(f"{name} has dtype {array.dtype}; write float32 within [-1, 1]{hint}")
    if array.ndim != 1:
        raise UserError(f"{name} has shape {array.shape}; write (samples,): mono; of channels take the mean")
    wave = array.astype(np.float32, copy=False)
    if not np.isfinite(wave.sum(dtype=np.float64)):
        raise UserError(f"{name} holds values that are not finite (NaN or infinity)")
    if len(wave) and (loudest := float(np.abs(wave).max())) > FULL_SCALE:
        raise UserError(f"{name} goes up to {loudest:g}; full scale is 1: were integers cast? divide by 32768")
    return wave


def _clips(audio: Audio, name: str) -> list[NDArray[np.float32]]:
    """The clips of one prompt."""
    if audio is None:
        return []
    if not isinstance(audio, list):
        return [waveform(audio, name)]  # type: ignore[arg-type]  # refused there
    return [waveform(clip, f"{name}, clip {number}") for number, clip in enumerate(audio, 1)]


# -- asking -----------------------------------------------------------------------------------------------------------


class Listener:
    """A trained model with its tokenizer, in eval mode, all weights frozen."""

    def __init__(self, lm: AudioLM, chat: Chat) -> None:
        self.lm, self.chat = lm, chat
        eos = chat.tokenizer.eos_token_id
        self.stops = (chat.im_end,) if eos is None else (chat.im_end, int(eos))

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a Sequence[str] to mypy
        self, audio: Audio, prompt: str, *, system: str = "", text_first: bool = False,
        history: Sequence[tuple[str, str]] = (), max_new_tokens: int = 256, temperature: float = 0.0,
        top_p: float = 1.0, top_k: int = 0, seed: int = 0, batch_size: int = 16,
    ) -> Answer: ...  # fmt: skip

    @overload
    def generate(
        self, audio: Sequence[Audio] | None, prompt: Sequence[str], *, system: str = "", text_first: bool = False,
        history: Sequence[tuple[str, str]] = (), max_new_tokens: int = 256, temperature: float = 0.0,
        top_p: float = 1.0, top_k: int = 0, seed: int = 0, batch_size: int = 16,
    ) -> list[Answer]: ...  # fmt: skip

    def generate(
        self, audio: Any, prompt: Any, *, system: str = "", text_first: bool = False,
        history: Sequence[tuple[str, str]] = (), max_new_tokens: int = 256, temperature: float = 0.0,
        top_p: float = 1.0, top_k: int = 0, seed: int = 0, batch_size: int = 16,
    ) -> Answer | list[Answer]:  # fmt: skip
        """The answer to a prompt about audio; to a list of prompts, each with its own audio, a list of answers.

        `audio`: a path; an array of 16 kHz mono float32 (samples,); (array, sample rate); a list of several such clips
        for the one prompt; None for a question without audio. With a list of prompts: a list of these, as long. Clips
        stand before the prompt (after it where `text_first`), those of a conversation in its first turn: `history` is
        what was asked and answered before. `system`: a system turn in front. Text is never read as special tokens.

        Temperature 0 takes the best token; else tokens are drawn, and a prompt draws the same ones from the same
        `seed`, whatever else is in its batch. At most `max_new_tokens` each, `batch_size` prompts at a time.
        Raises UserError.
        """
        one = isinstance(prompt, str)
        prompts, audios = _asked(audio, prompt)
        sampling = Sampling(float(temperature), float(top_p), top_k, seed)
        _at_least_one(max_new_tokens=max_new_tokens, batch_size=batch_size)
        names = ["audio" if one else f"audio of prompt {number}" for number in range(1, len(prompts) + 1)]
        clips = [_clips(a, name) for a, name in zip(audios, names, strict=True)]  # so that mistakes are found first
        answers: list[Answer] = []
        for at in range(0, len(prompts), batch_size):
            some = slice(at, at + batch_size)
            samples = [
                self._sample(c, p, system, text_first, history) for c, p in zip(clips[some], prompts[some], strict=True)
            ]
            all_found = generate(self.lm, self._pack(samples), self.stops, max_new_tokens, sampling)
            for found, sample in zip(all_found, samples, strict=True):
                text = self.chat.decode(found.ids)
                answers.append(Answer(text, found.finish, len(found.ids), found.seconds, len(sample.ids)))
        return answers[0] if one else answers

    def stream(
        self, audio: Audio, prompt: str, *, system: str = "", text_first: bool = False,
        history: Sequence[tuple[str, str]] = (), max_new_tokens: int = 256, temperature: float = 0.0,
        top_p: float = 1.0, top_k: int = 0, seed: int = 0,
    ) -> Generator[str, None, Answer]:  # fmt: skip
        """The same answer to one prompt in pieces of text, as it is made. No piece cuts a character, and joined they
        are the whole answer, which the generator returns at its end. Raises UserError, at once."""
        sampling = Sampling(float(temperature), float(top_p), top_k, seed)
        _at_least_one(max_new_tokens=max_new_tokens)
        if not isinstance(prompt, str):
            raise UserError(f"prompt is a {type(prompt).__name__}; a stream answers one prompt: write a string")
        sample = self._sample(_clips(audio, "audio"), prompt, system, text_first, history)
        return self._pieces(self._pack([sample]), max_new_tokens, sampling)

    def _pieces(self, prompts: Pack, limit: int, sampling: Sampling) -> Generator[str, None, Answer]:
        ids: list[int] = []
        said, text, finish, begun = "", "", "length", time.monotonic()
        for chosen in steps(self.lm, prompts, self.stops, limit, sampling):
            if chosen[0] in self.stops:
                finish = "stop"
                break
            ids.append(chosen[0])
            text = self.chat.decode(ids)
            whole = text.rstrip("\ufffd")  # the rest of a character may still come
            if len(whole) > len(said):
                yield whole[len(said) :]
                said = whole
        if len(text) > len(said):
            yield text[len(said) :]
        return Answer(text, finish, len(ids), time.monotonic() - begun, len(prompts.ids_T))

    def _sample(
        self, clips: Sequence[NDArray[np.float32]], prompt: str, system: str, text_first: bool,
        history: Sequence[tuple[str, str]],
    ) -> Sample:  # fmt: skip
        turns = [Turn("system", system)] if system else []
        for question, answer in history:
            turns += [Turn("user", question), Turn("assistant", answer)]
        turns.append(Turn("user", prompt))
        first = next(number for number, turn in enumerate(turns) if turn.role == "user")
        turns[first] = turns[first]._replace(clips=len(clips), text_first=text_first)
        encoded = self.chat.encode(turns, [frames.audio_tokens(len(c)) for c in clips], answer_follows=True)
        content = hashlib.sha256(encoded.ids.tobytes())
        for clip in clips:
            content.update(clip.tobytes())
        labels = np.full(len(encoded.ids), NO_TARGET, dtype=np.int64)
        return Sample("", content.hexdigest(), "", encoded.ids, labels, encoded.is_audio, tuple(clips))

    def _pack(self, samples: list[Sample]) -> Pack:
        return pack(samples, sum(len(s.ids) for s in samples), self.chat.pad)


def _asked(audio: Any, prompt: Any) -> tuple[list[str], list[Audio]]:
    """Prompts and the audio of each."""
    if isinstance(prompt, str):
        return [prompt], [audio]
    if not isinstance(prompt, Sequence) or not all(isinstance(p, str) for p in prompt):
        raise UserError(f"prompt is a {type(prompt).__name__}; write a string, or a list of strings for a batch")
    if audio is None:
        return list(prompt), [None] * len(prompt)
    if not isinstance(audio, list) or len(audio) != len(prompt):
        there = f"a list of {len(audio)}" if isinstance(audio, list) else f"a {type(audio).__name__}"
        raise UserError(f"{len(prompt)} prompts need a list of as many audios, and audio is {there}; None is no audio")
    return list(prompt), audio


def _at_least_one(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name}={count}: write at least 1")


# -- loading ----------------------------------------------------------------------------------------------------------


def load(path: str | Path, device: str = "auto", dtype: str = "auto") -> Listener:
    """See midasheng.load."""
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else _device(device)
    if dtype == "auto":
        dtype = "float32" if where.type == "cpu" else "bfloat16"
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype}: write {' or '.join(DTYPES)}, or auto")
    try:
        source = open_source(str(path), _instead(Path(path)))
        folder = Path(source.where)
        config = _config(folder)
        chat = _chat(folder, config)
        source = _adapted(source, folder)
        lm = _lm(config, folder)
        weights.load(lm, [weights.Start(source, ("*",))], [], merge_lora=True, precision=DTYPES[dtype])
    except UserError as error:
        raise type(error)(str(error).removeprefix("start: ")) from None
    attention.verify(where, torch.float32 if dtype == "float32" else torch.bfloat16)
    adapt.set_precision(lm, DTYPES[dtype])
    return Listener(lm.to(where).eval(), chat)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device={name}: {str(error).splitlines()[0]}; write auto, cpu or cuda") from None
    return device


def _instead(path: Path) -> str:
    there = sorted(p.name for p in path.parent.glob("*/")) if path.parent.is_dir() else []
    return f"a run folder, its weights/, an export, or a hub id ({path.parent} holds {', '.join(there) or 'none'})"


def _config(folder: Path) -> dict[str, Any]:
    """config.json, as far as it describes a model of the published form."""
    file = folder / "config.json"
    if not file.is_file():
        there = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise UserError(f"{folder} holds no config.json (but {there}); write a run folder or its weights/")
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from None
    needed = {"": ("audio_token_id", "text_config", "audio_encoder_config")}
    needed["audio_encoder_config"] = ("embed_dim", "depth", "num_heads")
    for part, names in needed.items():
        place = config[part] if part else config
        for name in names:
            if name not in place:
                raise UserError(f"{file}: {part}{'.' if part else ''}{name} is missing; it needs the published form")
    return config


def _chat(folder: Path, config: Mapping[str, Any]) -> Chat:
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} holds no tokenizer.json; put the model's tokenizer there")
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it does not know the model's own type, and says so
    try:
        return Chat(
            str(folder), config.get("audio_bos_token_id", "<|audio_bos|>"), int(config["audio_token_id"]),
            config.get("audio_eos_token_id", "<|audio_eos|>"), config.get("turn_start_token_id", "<|im_start|>"),
            config.get("turn_end_token_id", "<|im_end|>"),
        )  # fmt: skip
    except UserError as error:
        raise UserError(
            f"{folder}: {error} (here: audio_bos_token_id, audio_token_id, audio_eos_token_id, turn_start_token_id, "
            "turn_end_token_id in config.json)"
        ) from None
    finally:
        transformers_logging.set_verbosity(level)


def _adapted(source: Source, folder: Path) -> Source:
    """With the LoRA that lies in adapter/ beside weights that are not handed off by a stage."""
    adapter = folder / "adapter"
    if source.lora_plan is None and adapter.is_dir():
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        special = [name for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern") if config.get(name)]
        if special:
            raise UserError(f"{adapter}: {special[0]} is not understood here; merge it into the weights with peft")
        targets = config["target_modules"]
        plan = adapt.LoraPlan(
            tuple([targets] if isinstance(targets, str) else targets), config["r"], config["lora_alpha"], 0.0
        )
        lora = {
            n.removeprefix("base_model.model."): t for n, t in load_file(adapter / "adapter_model.safetensors").items()
        }
        source = dataclasses.replace(source, lora=lora, lora_plan=plan)
    for name in source.lora:
        layer, _, side = name.rpartition(".lora_")
        if side not in ("A.weight", "B.weight") or f"{layer}.weight" not in source.shapes:
            raise UserError(f"{adapter}: {name} adapts no layer of the weights in {folder}")
    return source


def _lm(config: Mapping[str, Any], folder: Path) -> AudioLM:
    """The model of a config.json, without memory for its weights."""
    encoder = config["audio_encoder_config"]
    try:
        architecture, fields = text_fields(config["text_config"])
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None
    shape = EncoderShape(encoder["embed_dim"], encoder["depth"], encoder["num_heads"], encoder.get("mlp_ratio", 4.0))
    return AudioLM(shape, architecture, fields, PARTS).requires_grad_(False)
