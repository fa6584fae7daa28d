"""What learns: freezing, LoRA through peft on the decoder only, and the table that proves it before step 0."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from midasheng.config import UserError
from midasheng.frames import CHUNK, N_MELS, PATCH, STACK
from midasheng.model.audio_lm import AudioLM
from midasheng.model.decoder import linear_shapes

ALL_LINEAR = "all-linear"
HEAD, EMBEDDING = "decoder.lm_head.weight", "decoder.model.embed_tokens.weight"
ADDED = "decoder.added."  # rows of frozen tables that learn: their own parameters
LARGE = 4096  # bitsandbytes keeps the state of smaller tensors in fp32


@dataclass(frozen=True)
class LoraPlan:
    """LoRA as asked for: `targets` are names or globs of linear layers inside the decoder, or [all-linear]."""

    targets: tuple[str, ...]
    rank: int
    alpha: float
    dropout: float


@dataclass(frozen=True)
class Line:
    """One line of the table of what learns."""

    pattern: str
    modules: int
    tensors: int
    parameters: int
    expected: int | None  # from the architecture alone; None where a glob cuts through a part
    eight_bit: int  # tensors whose optimizer state may be 8-bit


@dataclass(frozen=True)
class Learns:
    """What learns, line by line, and the frozen rest."""

    lines: tuple[Line, ...]
    trained: int
    frozen: int

    def table(self, eight_bit: bool = True) -> str:
        """The table as text. `eight_bit`: does the optimizer keep 8-bit states?"""
        head = f"{'what learns':34}{'modules':>8}{'tensors':>8}{'parameters':>15}{'expected':>15}"
        rows = [
            f"{line.pattern:34}{line.modules:8}{line.tensors:8}{line.parameters:15,}"
            f"{'-' if line.expected is None else f'{line.expected:,}':>15}" + eight_bit * f"{line.eight_bit:14}"
            for line in self.lines
        ]
        head += eight_bit * f"{'8-bit states':>14}"
        total = self.trained + self.frozen
        return "\n".join([head, *rows, f"trained {self.trained:,} of {total:,} parameters; frozen {self.frozen:,}"])


def matches(name: str, globs: Sequence[str]) -> bool:
    """Does a tensor name match one of the globs? `*` crosses dots, as in audio_encoder.*"""
    return any(fnmatchcase(name, glob) for glob in globs)


def decoder_linears(model: AudioLM) -> dict[str, nn.Linear]:
    """Linear layers inside the decoder's blocks by their path below decoder.model; the head is not among them."""
    return {name: m for name, m in model.decoder.model.named_modules() if isinstance(m, nn.Linear)}


def lora_modules(model: AudioLM, targets: Sequence[str]) -> dict[str, list[str]]:
    """Target -> paths of the linear layers it names. Raises UserError when one names nothing, or repeats another."""
    linears = decoder_linears(model)
    found: dict[str, list[str]] = {}
    for target in targets:
        if target == ALL_LINEAR:
            found[target] = list(linears)
        else:
            found[target] = [n for n in linears if n.rsplit(".", 1)[-1] == target or fnmatchcase(n, target)]
        if not found[target]:
            names = ", ".join(sorted({n.rsplit(".", 1)[-1] for n in linears}))
            raise UserError(
                f"lora.targets: `{target}` names no linear layer of the decoder; there are {names}; or a glob such as "
                f"layers.0.*, or {ALL_LINEAR}"
            )
    every = [n for names in found.values() for n in names]
    twice = sorted({n for n in every if every.count(n) > 1})
    if twice:
        raise UserError(f"lora.targets: {list(targets)} name {twice[0]} more than once; drop one of them")
    return found


def part_parameters(model: AudioLM) -> dict[str, int]:
    """Parameters of the three parts from their sizes alone (proved on the released 7B: 8,281,739,904 in all)."""
    shape = model.audio_encoder.shape
    e, depth, ffn = shape.dim, shape.depth, int(shape.dim * shape.mlp_ratio)
    block = 4 * e + (3 * e * e + 3 * e) + (e * e + e) + (2 * e * ffn + ffn + e)
    encoder = 2 * N_MELS + (N_MELS * PATCH + 1) * e + CHUNK * e + e + depth * block + 2 * e
    c = model.decoder.config
    d = c.hidden_size
    parts = {"audio_encoder.*": encoder, "audio_projector.*": STACK * e * d + d + d * d + d}
    if c.model_type in ("qwen2_5_omni_text", "qwen2", "qwen3", "llama", "mistral"):
        shapes = linear_shapes(c)
        attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
        biased: tuple[str, ...] = attention[:3] if c.model_type in ("qwen2_5_omni_text", "qwen2") else ()
        biased += attention if getattr(c, "attention_bias", False) else ()
        biased += mlp if getattr(c, "mlp_bias", False) else ()
        biases = sum(shapes[name][1] for name in biased)
        norms = 2 * d + (2 * c.head_dim if c.model_type == "qwen3" else 0)
        layer = sum(i * o for i, o in shapes.values()) + biases + norms
        heads = 1 if c.tie_word_embeddings else 2
        parts["decoder.*"] = heads * c.vocab_size * d + c.num_hidden_layers * layer + d
    return parts


def freeze_all_but(model: AudioLM, train: Sequence[str]) -> None:
    """Only parameters that match `train` get a gradient. Raises UserError for a glob that matches none."""
    names = [name for name, _ in model.named_parameters()]
    for glob in train:
        if not any(fnmatchcase(name, glob) for name in names):
            parts = ", ".join(f"{p}.*" for p, _ in model.named_children())
            raise UserError(f"train: `{glob}` matches no tensor; there are {parts} (names as in the released weights)")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(matches(name, train))


def add_lora(model: AudioLM, plan: LoraPlan, seed: int) -> dict[str, list[str]]:
    """Adapt the decoder's linear layers in place; returns target -> layers. The adapters are float32 and trained."""
    found = lora_modules(model, plan.targets)
    if any(p.requires_grad for p in model.decoder.parameters()):
        raise UserError("lora.targets: the decoder itself learns (train has decoder.*); LoRA adapts a frozen one")
    config = LoraConfig(
        r=plan.rank, lora_alpha=plan.alpha, lora_dropout=plan.dropout, bias="none",
        target_modules=[name for names in found.values() for name in names],
    )  # fmt: skip
    linears = decoder_linears(model)
    held = {linears[name]: linears[name].weight for names in found.values() for name in names}
    for layer in held:  # peft gives an adapter the dtype of what it adapts: its first numbers would be rounded to bf16
        layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    torch.manual_seed(seed)
    inject_adapter_in_model(config, model.decoder.model)
    for layer, weight in held.items():
        layer.weight = weight
    for name, parameter in model.decoder.named_parameters():
        if "lora_" in name:
            assert parameter.dtype == torch.float32, f"{name} is {parameter.dtype}, not float32"
            parameter.requires_grad_(True)
    return found


@contextmanager
def without_lora(model: AudioLM) -> Iterator[None]:
    """The model as if it had no LoRA, for as long as the context lasts."""
    layers = [m for m in model.decoder.modules() if isinstance(m, LoraLayer)]
    for layer in layers:
        layer.set_scale("default", 0.0)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale("default", 1.0)


def learns(model: AudioLM, train: Sequence[str], lora: dict[str, list[str]], rank: int) -> Learns:
    """The table of what really learns, read off the model, beside what the architecture says it should be.

    Raises AssertionError when they differ: the run must not start with LoRA on fewer layers than asked for.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    expected_parts = part_parameters(model)
    lines = []
    for glob in train:
        named = {n: p for n, p in trained.items() if fnmatchcase(n, glob)}
        lines.append(_line(glob, named, expected_parts.get(glob)))
    shapes, layers = linear_shapes(model.decoder.config), model.decoder.config.num_hidden_layers
    for target, paths in lora.items():
        inside = tuple(f"decoder.model.{path}.lora_" for path in paths)
        named = {n: p for n, p in trained.items() if n.startswith(inside)}
        if target == ALL_LINEAR:
            expected = layers * rank * sum(i + o for i, o in shapes.values())
        elif target in shapes:
            expected = layers * rank * sum(shapes[target])
        else:  # a glob cuts through layers: count the layers it names
            expected = rank * sum(sum(shapes[path.rsplit(".", 1)[-1]]) for path in paths)
        lines.append(_line(f"LoRA {target}", named, expected))
    rows = {n: p for n, p in trained.items() if n.startswith(ADDED)}
    if added := len(model.decoder.added_ids):
        c, tables = model.decoder.config, [model.decoder.model.embed_tokens.weight]
        tables += [] if c.tie_word_embeddings else [model.decoder.lm_head.weight]
        frozen = sum(not t.requires_grad for t in tables)  # one that learns, learns all its rows
        lines.append(_line(f"rows of {added} added tokens", rows, frozen * added * c.hidden_size))
    for line in lines:
        assert line.expected in (None, line.parameters), (
            f"{line.pattern}: {line.parameters:,} parameters learn, the architecture says {line.expected:,}"
        )
    outside = [n for n in trained if not matches(n, train) and ".lora_" not in n and n not in rows]
    assert not outside, f"{outside[0]} learns but nothing asked for it"
    asleep = [n for n, p in model.named_parameters() if matches(n, train) and not p.requires_grad]
    assert not asleep, f"{asleep[0]} does not learn but train asks for it"
    total = sum(p.numel() for n, p in model.named_parameters() if not n.startswith(ADDED))  # they are in the tables
    count = sum(p.numel() for p in trained.values())
    return Learns(tuple(lines), count, total - count)


def _line(pattern: str, named: dict[str, nn.Parameter], expected: int | None) -> Line:
    modules = {n.split(".lora_")[0] if ".lora_" in n else n.rsplit(".", 1)[0] for n in named}
    return Line(
        pattern, len(modules), len(named), sum(p.numel() for p in named.values()), expected,
        sum(p.numel() >= LARGE for p in named.values()),
    )  # fmt: skip


def kept_in(parameter: nn.Parameter, precision: str) -> torch.dtype:
    """The dtype a parameter is kept in: what learns float32, what is frozen bf16 where `precision` is "bf16"."""
    return torch.bfloat16 if precision == "bf16" and not parameter.requires_grad else torch.float32


def set_precision(model: AudioLM, precision: str) -> None:
    """What learns stays float32; "bf16" makes frozen weights bf16 and autocasts, "fp32" keeps everything float32.

    Statistics of init_bn stay float32 in either.
    """
    model.compute_dtype = torch.bfloat16 if precision == "bf16" else None
    for parameter in model.parameters():
        parameter.data = parameter.data.to(kept_in(parameter, precision))


def lora_state(model: AudioLM) -> dict[str, Tensor]:
    """LoRA tensors by released names: decoder.model.layers.0.self_attn.q_proj.lora_A.weight, (rank, in)."""
    return {name.replace(".default.", "."): p.detach() for name, p in model.named_parameters() if ".lora_" in name}


def base_state(model: AudioLM, *, rows: bool = True) -> dict[str, Tensor]:
    """All other tensors by released names, as if there were no LoRA; a tied head appears once, as the embedding. Rows
    that learned stand in their table; without `rows` it is as it was frozen."""
    decoder, tied = model.decoder, model.decoder.config.tie_word_embeddings
    state = {
        name.replace(".base_layer.", "."): t.detach()
        for name, t in model.state_dict().items()
        if ".lora_" not in name and not name.startswith(ADDED) and not (tied and name == HEAD)
    }
    if not rows:
        return state
    state[EMBEDDING] = decoder.with_rows("embedding", state[EMBEDDING])
    return state if tied else state | {HEAD: decoder.with_rows("head", state[HEAD])}
