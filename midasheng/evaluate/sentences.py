"""How near two sentences are, and whether one is broken: similarity, fluency error and FENSE as three numbers.

FENSE (Zhou et al. 2022) divides the similarity by ten where a classifier finds a broken sentence. What the report calls
FENSE in Tables 7, 8, 11 and 12 is the similarity alone. Both models are folders that somebody has downloaded: for the
report's numbers sentence-transformers' paraphrase-TinyBERT-L6-v2 and FENSE's echecker_clotho_audiocaps_base.ckpt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from midasheng.config import UserError
from midasheng.evaluate.rows import Row
from midasheng.evaluate.score import Scored, ratio, word_f1

ERROR_ABOVE, PENALTY = 0.9, 0.9  # as FENSE's own evaluator
FLUENCY_TOKENS = 64
BATCH = 32
PARTS = ("Transformer", "Pooling", "Normalize")  # of a sentence-transformers model that are understood


def _tokenizer_and_model(folder: Path, what: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise UserError(f"{what}={folder}: no config.json there; write the folder of a transformers encoder")
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


class Embedder:
    """A sentence-transformers folder, or any transformers encoder, whose token states are averaged."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.pooling, self.longest = "mean", 512
        where = folder
        if (folder / "modules.json").is_file():
            modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
            kinds = [m["type"].rpartition(".")[2] for m in modules]
            if odd := [kind for kind in kinds if kind not in PARTS]:
                raise UserError(f"embedder={folder}: its part {odd[0]} is not understood; there are {', '.join(PARTS)}")
            where = folder / modules[0]["path"]
            for module, kind in zip(modules, kinds, strict=True):
                if kind == "Pooling":
                    told = json.loads((folder / module["path"] / "config.json").read_text(encoding="utf-8"))
                    self.pooling = "cls" if told.get("pooling_mode_cls_token") else "mean"
                    if not (told.get("pooling_mode_cls_token") or told.get("pooling_mode_mean_tokens")):
                        raise UserError(f"embedder={folder}: only the mean of tokens and the first one are understood")
            limits = where / "sentence_bert_config.json"
            if limits.is_file():
                self.longest = int(json.loads(limits.read_text(encoding="utf-8")).get("max_seq_length") or 512)
        self.tokenizer, self.model = _tokenizer_and_model(where, "embedder")
        self.longest = min(self.longest, int(getattr(self.model.config, "max_position_embeddings", 512)))

    @torch.no_grad()
    def __call__(self, sentences: Sequence[str]) -> Tensor:
        """Unit vectors (sentences, dim)."""
        found = []
        for at in range(0, len(sentences), BATCH):
            batch = self.tokenizer(
                list(sentences[at : at + BATCH]), padding=True, truncation=True, max_length=self.longest,
                return_tensors="pt",
            )  # fmt: skip
            states = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None].to(states.dtype)
            mean = (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
            found.append(torch.nn.functional.normalize(states[:, 0] if self.pooling == "cls" else mean, dim=-1))
        return torch.cat(found)


class Fluency:
    """FENSE's error detector: an encoder and a linear layer on its first token, whose last output says "broken".

    `checkpoint` as published: {model_type, num_classes, state_dict}; the encoder that model_type names (its config and
    tokenizer) lies in a folder beside it, called as the part of model_type behind the slash.
    """

    def __init__(self, checkpoint: Path) -> None:
        if not checkpoint.is_file():
            raise UserError(f"fluency={checkpoint}: no such file; write FENSE's echecker_*.ckpt")
        told = torch.load(checkpoint, map_location="cpu", weights_only=True)
        base = checkpoint.parent / str(told["model_type"]).rpartition("/")[2]
        self.name = checkpoint.stem
        self.tokenizer, self.encoder = _tokenizer_and_model(base, "fluency")
        self.head = torch.nn.Linear(self.encoder.config.hidden_size, int(told["num_classes"]))
        state = {k: v for k, v in told["state_dict"].items() if not k.endswith("embeddings.position_ids")}
        part = {p: {k[len(p) + 1 :]: v for k, v in state.items() if k.startswith(p + ".")} for p in ("encoder", "clf")}
        self.encoder.load_state_dict(part["encoder"])
        self.head.load_state_dict(part["clf"])

    @torch.no_grad()
    def __call__(self, sentences: Sequence[str]) -> Tensor:
        """Probability that a sentence is broken (sentences,)."""
        found = []
        for at in range(0, len(sentences), BATCH):
            texts = [re.sub(r"[^\w\s]", "", text).lower() for text in sentences[at : at + BATCH]]
            batch = self.tokenizer(
                texts, truncation=True, padding="max_length", max_length=FLUENCY_TOKENS, return_tensors="pt"
            )
            first = self.encoder(**batch).last_hidden_state[:, 0]
            found.append(torch.sigmoid(self.head(first))[:, -1])
        return torch.cat(found)


def captions(rows: Sequence[Row], embedder: Embedder | None, fluency: Fluency | None) -> Scored:
    """Similarity to the references (mean over them), share of broken sentences, FENSE; and the words in common.

    An empty output is near to nothing (0), and broken.
    """
    numbers = {"word_f1": word_f1(rows)}
    if embedder is None:
        return Scored("captions/1", "plain/1", numbers)
    said = [bool(row.text.strip()) for row in rows]
    outputs = embedder([row.text for row in rows])
    references = embedder([text for row in rows for text in row.references])
    similarity, at = [], 0
    for row, vector, words in zip(rows, outputs, said, strict=True):
        near = references[at : at + len(row.references)] @ vector
        similarity.append(float(near.mean()) if words else 0.0)
        at += len(row.references)
    numbers = {"similarity": ratio(similarity), **numbers}
    name = f"captions/1 ({embedder.name}"
    if fluency is not None:
        broken = [float(p) > ERROR_ABOVE or not s for p, s in zip(fluency([r.text for r in rows]), said, strict=True)]
        fense = [s * (1 - PENALTY * b) for s, b in zip(similarity, broken, strict=True)]
        numbers |= {"fluency_error": ratio(broken), "fense": ratio(fense)}
        name += f", {fluency.name}"
    return Scored(name + ")", "none", numbers, "similarity")
