"""The schema of a stage: dataclass defaults <- stage YAML (+ include) <- scale <- command line, strict.

Every key has a sentence here (`make keys` prints them), and the layer that set each value is remembered.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


def key(default: Any, doc: str, *, free: bool = False) -> Any:
    """A config key: its default, its sentence, and whether it may change between a run and its resume (`free`:
    hardware, workers, logging: results do not depend on it)."""
    metadata = {"doc": doc, "free": free}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(cls: type, doc: str) -> Any:
    """A nested section of the schema."""
    return field(default_factory=cls, metadata={"doc": doc, "free": False})


AUTO = "auto"  # of batch.pack_slots, hardware.attention and hardware.strategy
DDP, FSDP = "ddp", "fsdp"  # the other values of hardware.strategy
SDPA, VARLEN = KERNELS = ("sdpa", "varlen")  # the other values of hardware.attention
TRACKERS = ("wandb", "mlflow", "trackio")  # what log.trackers may name
HEARD, LEFT_OUT, TOLD = CLIPS = ("heard", "left_out", "told")  # values of data.clips


@dataclass
class Lora:
    """LoRA through peft, on the decoder only."""

    targets: list[str] = key([], "linear layers of the decoder to adapt: names, globs, or [all-linear]; [] is no LoRA")
    rank: int = key(8, "rank of the LoRA matrices (report: 8)")
    alpha: float = key(32.0, "LoRA is scaled by alpha / rank (report: 32)")
    dropout: float = key(0.1, "dropout on the input of LoRA (report: 0.1)")
    inherit: str = key(
        "carry", "the LoRA of the run this one starts from: carry (goes on learning) or merge (into the weights, fp32)"
    )


@dataclass
class Data:
    """What is trained on."""

    mix: str = key("", "name of the mix: a file in data.manifests, without .yaml")
    manifests: str = key("data_manifests/mini", "folder of the mixes; the cards lie in ../corpora beside it")
    root: str = key("data/mini/shards", "folder that the shard patterns of the cards are relative to")
    without: list[str] = key(
        [], "corpora to leave out of the mixes (names or globs, yodas.*); the rest of their slices take their shares"
    )
    max_audio_s: float = key(30.0, "longer clips (seconds) are skipped and counted as `too long`")
    clips: str = key(
        HEARD,
        "heard; left_out: no conversation holds its clip (the text-only control); told: text pretraining, two of "
        "three samples with the card's `context` in words where the clip will stand, the third with nothing",
    )
    index: str = key("", "folder of the shards' index; empty: .index below a local data.root", free=True)
    decode_share: float = key(
        0.01, "share of the clips that are decoded while indexing, to see that headers tell the truth", free=True
    )
    damaged: str = key("refuse", "a shard that is cut off or damaged: refuse, or keep what is whole in it", free=True)
    on_change: str = key(
        "refuse",
        "a resume whose mix, data, batch, seed or length changed: refuse, or restart_plan (a new order)",
        free=True,
    )
    val_clips: int = key(64, "held-out records per corpus that are validated on", free=True)
    also: list[str] = key([], "other mixes to look at, at the start and at the end: their held-out records", free=True)
    probe: str = key(
        "",
        "file of labels that the encoder's mean frames are probed for at the end, beside the encoder it started from; "
        "empty: none",
        free=True,
    )
    answers: int = key(0, "held-out clips per closed question that are answered at the end; 0: none", free=True)


@dataclass
class Optim:
    """Optimizer and schedule."""

    name: str = key("adamw8bit", "adamw8bit (bitsandbytes; tensors below 4,096 elements keep fp32 states) or adamw")
    lr: float = key(1e-4, "peak learning rate (report: stage 2 1e-4, stage 3 1e-5; stage 1 is not published)")
    lr_for: dict[str, float] = key({}, "peak learning rate of tensors that match a glob, instead of optim.lr")
    weight_decay: float = key(0.01, "decoupled; none on norms, biases and position embeddings")
    betas: list[float] = key([0.9, 0.999], "Adam's decay rates of the first and second moment")
    eps: float = key(1e-8, "Adam's epsilon")
    clip_norm: float = key(1.0, "the gradient of a whole step is scaled down to this norm (not published)")
    final_lr: float = key(0.1, "the cosine ends at this share of the peak (report: 10 %)")
    max_skips: int = key(
        10,
        "a step whose loss or gradient is not finite is not taken; this many in a row stop the run (`make bisect`)",
        free=True,
    )
    spike: float = key(
        0.0,
        "a step whose gradient norm is above this multiple of the median of the last 100 is not taken either; 0: none",
    )


@dataclass
class Run:
    """How long, from which seed, in which precision."""

    length: str = key("1 epochs", "length of the run: N steps, N clips, N audio_hours or N epochs (of the whole mix)")
    warmup: str = key("1000 steps", "linear warm-up from 0, in the same units (report: 1,000 steps)")
    seed: int = key(0, "seed of data order, prompts, fresh weights and dropout")
    precision: str = key("bf16", "bf16: trained weights fp32, frozen ones bf16, autocast bf16; fp32: everything fp32")


@dataclass
class Batch:
    """What one optimizer step holds."""

    kind: str = key("report", "report: clips_per_step as published; throughput: packs of pack_slots on every GPU")
    clips_per_step: int = key(256, "kind report: mean clips per step over all GPUs (published: 256, 800, 640)")
    packs_per_step: int = key(8, "packs a step is cut into, whatever the number of GPUs")
    pack_slots: int | str = key(
        8192,
        "kind throughput: decoder slots of a pack; auto: as many as hardware.memory_gib allows, found when a run "
        "begins and kept by it; kind report derives it from the mix's mean",
    )
    pack_frames: int = key(0, "encoder frames of a pack; 0: in the mix's own ratio to pack_slots")
    share: bool = key(
        False,
        "compute once per pack the slots that every sample begins with, and in corpora with `answers: all` those that "
        "a record's conversations begin with, their clip among them; exact, but dropout has one mask for shared slots",
    )


@dataclass
class Encoder:
    """Dasheng sizes: base 768/12/12, 0.6B 1280/32/16, 1.2B 1536/40/24."""

    dim: int = key(1280, "encoder width")
    depth: int = key(32, "encoder blocks")
    heads: int = key(16, "encoder attention heads")


@dataclass
class DecoderModel:
    """The decoder's architecture."""

    architecture: str = key("qwen2_5_omni_text", "model_type of transformers' text model")
    fields: dict[str, Any] = key({}, "fields of its transformers config (hidden_size, num_hidden_layers, ...)")


@dataclass
class Model:
    """Sizes."""

    encoder: Encoder = section(Encoder, "the Dasheng audio encoder")
    decoder: DecoderModel = section(DecoderModel, "the text decoder")


@dataclass
class Weights:
    """Named sources that a stage's `start` can refer to as ${weights.NAME}."""

    encoder: str = key("", "pretrained encoder: a Dasheng .pt file or a folder")
    decoder: str = key("", "text weights of the decoder: a folder with safetensors, or a run folder")


@dataclass
class Tokenizer:
    """The decoder's tokenizer and where audio stands in it."""

    path: str = key("", "folder or hub id that transformers' AutoTokenizer reads")
    audio_bos: str = key("<|audio_bos|>", "token before the audio slots (a map for decoders that lack it)")
    audio: str = key("<|AUDIO|>", "token of an audio slot; its embedding is never used")
    audio_eos: str = key("<|audio_eos|>", "token after the audio slots")
    turn_start: str = key("<|im_start|>", "special token before each turn's role (a map for decoders without ChatML)")
    turn_end: str = key("<|im_end|>", "special token that ends a turn; answers end with it")
    add: list[str] = key(
        [],
        "special tokens to add, those above that the tokenizer lacks: tables get rows for them with the mean of all "
        "others, and where a table is frozen these rows alone learn",
    )


@dataclass
class Hardware:
    """Where it runs; may change between a run and its resume."""

    accelerator: str = key("auto", "cpu, gpu or auto", free=True)
    devices: int = key(1, "processes (GPUs) per node (make: GPUS=)", free=True)
    nodes: int = key(1, "nodes (make: NODES=)", free=True)
    stall_s: float = key(
        60.0, "seconds that a rank waits for its data before rank 0's log says which record holds it up", free=True
    )
    strategy: str = key(
        AUTO,
        "ddp: each rank holds the whole model; fsdp: ranks share weights, gradients and optimizer states (FSDP2); "
        "auto: fsdp where more than 1e9 parameters learn",
        free=True,
    )
    shard: int = key(
        0, "fsdp: ranks that share one copy of the model, as the GPUs of a node; 0: all ranks share one", free=True
    )
    workers: int = key(2, "loader processes per rank; 0 loads in the training process", free=True)
    prefetch: int = key(2, "steps that each loader process loads ahead", free=True)
    recompute: list[str] = key(
        [],
        "trained parts whose blocks compute their activations again in the backward pass instead of keeping them: "
        "audio_encoder, decoder (less memory, a third more arithmetic)",
        free=True,
    )
    memory_gib: float = key(
        0.0,
        "memory of each device, or of each process on CPUs; packs may take 90 % of it. 0: what a GPU has; on a CPU "
        "memory is not looked at",
        free=True,
    )
    attention: str = key(AUTO, "sdpa, varlen (half precision on a GPU), or auto: varlen where it runs", free=True)
    compile: bool = key(False, "torch.compile the blocks of both towers (a GPU; it made CPUs slower)", free=True)
    liger: bool = key(
        False, "Liger's fused RMSNorm and SwiGLU in the decoder (GPU; pip install 'midasheng-train[liger]')", free=True
    )
    threads: int = key(0, "torch CPU threads per process; 0 leaves torch's own choice", free=True)


@dataclass
class Log:
    """What is written how often; may change between a run and its resume."""

    every: int = key(10, "steps between rows of metrics.jsonl", free=True)
    val_every: int = key(100, "steps between validations; one is always made at step 0 and at the end", free=True)
    checkpoint_every: int = key(500, "steps between checkpoints; one is always made at the end or on Ctrl-C", free=True)
    answers: int = key(
        8,
        "held-out questions of the mix that are answered in words at each validation, in 48 tokens at most, always the "
        "same ones (answers.jsonl); at the end of data.also too. 0: none",
        free=True,
    )
    keep_best: bool = key(
        False, "also keep checkpoints/best.ckpt, that of the lowest validation loss (after step 0)", free=True
    )
    progress: bool = key(True, "progress bar", free=True)
    trackers: list[str] = key(
        [],
        "experiment trackers that are told what TensorBoard is: wandb, mlflow, trackio (pip install them)",
        free=True,
    )


@dataclass
class Forecast:
    """What `make forecast` assumes; nothing that trains reads it."""

    gpus: int = key(0, "GPUs of the run; 0: hardware.devices x hardware.nodes", free=True)
    device: str = key("H100 SXM, 80 GB", "what a GPU is called in a forecast", free=True)
    memory_gib: float = key(80.0, "its memory; packs may take 90 % of it", free=True)
    peak_tflops: float = key(989.0, "its dense peak in the run's precision (data sheet), TFLOP/s", free=True)
    mfu: float = key(
        0.40, "share of the peak at which arithmetic runs, padding's included (NeMo Automodel publishes .43)", free=True
    )
    host_us: float = key(8.0, "microseconds of the host for each operation that it starts", free=True)
    memory_gb_s: float = key(3350.0, "bandwidth of a GPU's memory, GB/s (data sheet)", free=True)
    gpus_per_node: int = key(8, "GPUs that a fast link joins; FSDP2 shards inside a node", free=True)
    link_gb_s: float = key(350.0, "of a GPU to those of its node, each way, GB/s as reached (NVLink: 450)", free=True)
    network_gb_s: float = key(40.0, "of a GPU to other nodes, each way, GB/s as reached (400 Gbit/s: 50)", free=True)
    clip_share: list[float] = key(
        [.2775, .1261, .1358, .1194, .1006, .0772, .0528, .0330, .0206, .0139, .0096, .0071, .0057, .0052, .0051,
         .0047, .0023, .0013, .0010, .0008, .0001, .0001],
        "share of clips by length, one number a second from 0 s, where no index says (report, Figure 3)", free=True,
    )  # fmt: skip
    clip_s: dict[str, float] = key(
        {"acavcaps": 10.0}, "corpora (names or globs) whose clips all have one length, in seconds", free=True
    )
    prompt_slots: int = key(22, "slots of template and prompt of a sample where no index says", free=True)
    answer_slots: int = key(22, "slots of an answer, mean, where no index says", free=True)
    bytes_per_audio_s: float = key(16_000.0, "of stored audio (FLAC, 16 kHz) where no index says", free=True)
    decode_ms: float = key(0.36, "one core, a second of stored audio (FLAC: 3.6 ms for 10 s)", free=True)
    sample_ms: float = key(0.19, "one core, a sample beside its audio: reading, text, plan, place in a pack", free=True)


@dataclass
class Stage:
    """One stage of training, whole. Everything a run depends on is in here, in the data and in the start weights."""

    name: str = key("", "which stage this is; scale files override by it, stage.json records it")
    start: list[Any] = key([], "origins: [{from: STAGE or path, take: [globs]}]; each tensor has exactly one origin")
    fresh: list[str] = key([], "globs of tensors that start from fresh random weights")
    train: list[str] = key([], "globs of what learns; all else is frozen. One that matches nothing is an error")
    lora: Lora = section(Lora, "LoRA on the decoder")
    data: Data = section(Data, "what is trained on")
    optim: Optim = section(Optim, "optimizer and schedule")
    run: Run = section(Run, "length, seed, precision")
    batch: Batch = section(Batch, "what a step holds")
    model: Model = section(Model, "sizes")
    weights: Weights = section(Weights, "named sources of weights")
    tokenizer: Tokenizer = section(Tokenizer, "tokenizer")
    hardware: Hardware = section(Hardware, "where it runs")
    log: Log = section(Log, "what is written how often")
    forecast: Forecast = section(Forecast, "what `make forecast` assumes")


DASHENG = {768: "dasheng_base.pt", 1280: "dasheng_06b.pt", 1536: "dasheng_12b.pt"}  # its files by encoder width


class UserError(ValueError):
    """A mistake in files or settings: shown without a traceback. The message says what is there and what to write."""


class ConfigError(UserError):
    """A mistake in a config file or on the command line."""


@dataclass(frozen=True)
class Loaded:
    """A stage and where each of its values came from (dotted key -> layer)."""

    stage: Stage
    origin: dict[str, str]

    def yaml(self) -> str:
        """The config as YAML, each line followed by the layer that set it."""
        lines = []
        for name, value in flat(dataclasses.asdict(self.stage)).items():
            # as YAML 1.1 reads it back: JSON's 1e-05 would come back as a string
            text = yaml.safe_dump([value], default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**9)
            text = text.strip()[1:-1]
            lines.append(f"{name}: {text}".ljust(64) + f"  # {self.origin.get(name, 'default')}")
        return "\n".join(lines) + "\n"


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"lora": {"rank": 8}} -> {"lora.rank": 8}; open dictionaries (no fixed keys) count as one value."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict) and path not in OPEN:
            out |= flat(value, f"{path}.")
        else:
            out[path] = value
    return out


def schema(cls: type = Stage, prefix: str = "") -> dict[str, dataclasses.Field[Any]]:
    """Dotted key -> dataclass field, for every key that may be set."""
    out: dict[str, dataclasses.Field[Any]] = {}
    for item in dataclasses.fields(cls):
        nested = item.default_factory
        if isinstance(nested, type) and dataclasses.is_dataclass(nested):
            out |= schema(nested, f"{prefix}{item.name}.")
        else:
            out[prefix + item.name] = item
    return out


OPEN = {"optim.lr_for", "model.decoder.fields", "forecast.clip_s"}  # dictionaries whose keys are the user's


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # omegaconf passes on whatever its YAML reader raises
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found {type(loaded).__name__}")
    return {str(k): v for k, v in loaded.items()}


def _stage_layers(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """The file's layers, what it includes first."""
    if path in seen:
        raise ConfigError(f"{path}: includes itself through {' -> '.join(map(str, seen))}")
    content = _read(path)
    include = content.pop("include", None)
    below = _stage_layers((path.parent / str(include)).resolve(), (*seen, path)) if include else []
    return [*below, (path.name, content)]


def _check_keys(layer: str, content: dict[str, Any]) -> None:
    known = schema()
    for name in flat(content):
        inside_open = any(name == o or name.startswith(o + ".") for o in OPEN)
        if name in known or inside_open:
            continue
        sections = {k.rsplit(".", i)[0] for k in known for i in range(1, k.count(".") + 1)}
        if name in sections:
            raise ConfigError(f"{layer}: {name} is a section; write {name}.KEY=VALUE (`make keys` lists the keys)")
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        raise ConfigError(f"{layer}: unknown key `{name}`{hint} (`make keys` lists all keys)")


def _per_stage(layer: str, stages: Any, configs: Path) -> dict[str, dict[str, Any]]:
    """A scale's overrides by stage; the name of no stage would never be read, so it is an error."""
    known = [p.stem for p in sorted(configs.glob("*.yaml"))]
    if not isinstance(stages, dict) or not all(isinstance(values, dict) for values in stages.values()):
        raise ConfigError(f"{layer}: write `stages:`, below it a stage's name, below that its keys")
    for name in stages:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean `{near[0]}`?" if near else ""
            raise ConfigError(f"{layer}: stages.{name} is no stage{hint} (there are: {', '.join(known)})")
    return stages


def scales(configs: Path) -> list[str]:
    """Names of the scales there are."""
    return sorted(p.stem for p in (configs / "scale").glob("*.yaml"))


def load(config: Path, scale: str, settings: list[str], configs: Path = Path("configs")) -> Loaded:
    """Read a stage. `settings`: "key=value" strings of the command line. Raises ConfigError."""
    if not config.is_file():
        there = ", ".join(str(p) for p in sorted(configs.rglob("*.yaml")) if "scale" not in p.parts)
        raise ConfigError(f"{config}: no such stage file; there are {there}")
    if scale not in scales(configs):
        near = difflib.get_close_matches(scale, scales(configs), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"SCALE={scale}: unknown scale{hint} (there are: {', '.join(scales(configs))})")
    layers = _stage_layers(config.resolve())
    name = next((c["name"] for _, c in reversed(layers) if c.get("name")), "")
    scale_path = configs / "scale" / f"{scale}.yaml"
    for layer, content in _stage_layers(scale_path):  # a scale may include another one, as a stage file may
        per_stage = _per_stage(layer, content.pop("stages", None) or {}, configs)
        layers.append((layer, content))
        if name in per_stage:
            layers.append((f"{layer} (stages.{name})", per_stage[name]))
    for setting in settings:
        if "=" not in setting or setting.startswith("="):
            raise ConfigError(f"SET: `{setting}` is not of the form key=value")
    if settings:
        nothing = [f"{name}=" for name, value in flat(dataclasses.asdict(Stage())).items() if value == ""]
        settings = [f"{s}''" if s in nothing else s for s in settings]  # what a shell leaves of key=''
        try:
            command_line: Any = OmegaConf.to_container(OmegaConf.from_dotlist(settings), resolve=False)
        except Exception as error:  # omegaconf passes on whatever its YAML reader raises
            raise ConfigError(f"SET: {' '.join(settings)}: {' '.join(str(error).split())}") from None
        layers.append(("command line", {str(k): v for k, v in command_line.items()}))

    merged: Any = OmegaConf.structured(Stage)
    origin: dict[str, str] = {}
    for layer, values in layers:
        _check_keys(layer, values)
        try:
            merged = OmegaConf.merge(merged, values)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{layer}: {_explained(error)}") from None
        origin |= dict.fromkeys(flat(values), layer)
    try:
        stage = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{config.name}: {_explained(error)}") from None
    assert isinstance(stage, Stage)
    _check_values(stage)
    return Loaded(stage, origin)


def _explained(error: OmegaConfBaseException) -> str:
    """omegaconf's message in words that name the key and what to write."""
    name, first = error.full_key or "", str(error).splitlines()[0]
    if "is not a ListConfig" in first:
        return f"{name}: write a list, e.g. {name}=[...]"
    if "'None'" in first:
        return f"{name}: is empty; give it a value or leave it out"
    return f"{name}: {first}"


def length(text: str, name: str) -> tuple[float, str]:
    """ "1.4 epochs" -> (1.4, "epochs"); units: steps, clips, audio_hours, epochs."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?(?:e[0-9]+)?)\s*(steps|clips|audio_hours|epochs)\s*", text)
    if not match:
        raise ConfigError(
            f"{name}: `{text}` is no length; write e.g. `1000 steps`, `1.4 epochs`, `20 audio_hours`, `9 clips`"
        )
    return float(match[1]), match[2]


def _check_values(stage: Stage) -> None:
    """Values that no type can rule out."""

    def require(good: bool, message: str) -> None:
        if not good:
            raise ConfigError(message)

    for name, value in flat(dataclasses.asdict(stage)).items():
        require(not isinstance(value, float) or math.isfinite(value), f"{name}: {value} is no number")
    require(bool(stage.name), "name: a stage file must say which stage it is, e.g. `name: stage1_align`")
    require(bool(stage.train or stage.lora.targets), "train: nothing learns; name what does, e.g. [audio_encoder.*]")
    for position, start in enumerate(stage.start):
        good = isinstance(start, dict) and set(start) == {"from", "take"} and isinstance(start["take"], list)
        require(good, f"start[{position}]: write {{from: STAGE or path, take: [globs]}}, not {start}")
    require(
        stage.run.precision in ("bf16", "fp32"),
        f"run.precision: {stage.run.precision!r} is not offered; write bf16 (trained weights in fp32, frozen ones and "
        "compute in bf16) or fp32. With weights in bf16 a weight of 0.02 does not move at a learning rate of 1e-5",
    )
    clips = stage.data.clips
    unknown = [name for name in stage.log.trackers if name not in TRACKERS]
    require(not unknown, f"log.trackers: {unknown[:1]} is not offered; write some of [{', '.join(TRACKERS)}]")
    require(clips in CLIPS, f"data.clips: {clips!r}; write {HEARD}, {LEFT_OUT} or {TOLD}")
    require(stage.optim.name in ("adamw8bit", "adamw"), f"optim.name: {stage.optim.name!r}; write adamw8bit or adamw")
    require(stage.lora.inherit in ("carry", "merge"), f"lora.inherit: {stage.lora.inherit!r}; write carry or merge")
    require(stage.lora.rank > 0, f"lora.rank: {stage.lora.rank}; a rank is at least 1 (no LoRA is `lora.targets: []`)")
    for name, value, allowed in (
        ("data.damaged", stage.data.damaged, ("refuse", "keep")),
        ("data.on_change", stage.data.on_change, ("refuse", "restart_plan")),
        ("batch.kind", stage.batch.kind, ("report", "throughput")),
        ("hardware.attention", stage.hardware.attention, (AUTO, *KERNELS)),
        ("hardware.strategy", stage.hardware.strategy, (AUTO, DDP, FSDP)),
    ):
        require(value in allowed, f"{name}: {value!r}; write {', '.join(allowed[:-1])} or {allowed[-1]}")
    require(
        not (stage.hardware.liger and stage.hardware.compile),
        "hardware.liger: compiled blocks fuse their norms themselves; write one of hardware.liger and hardware.compile",
    )
    kind = stage.batch.kind
    slots, gib = stage.batch.pack_slots, stage.hardware.memory_gib
    good = slots == AUTO or (isinstance(slots, int) and slots > 0)
    require(good, f"batch.pack_slots: {slots!r}; write a number of slots, or {AUTO}")
    require(
        slots != AUTO or kind == "throughput",
        f"batch.pack_slots: {AUTO} is for batch.kind=throughput; kind {kind} derives it from clips_per_step",
    )
    require(gib >= 0, f"hardware.memory_gib: {gib}; write GiB of memory, or 0 for what the GPU has")
    require(stage.batch.packs_per_step > 0, f"batch.packs_per_step: {stage.batch.packs_per_step}; at least 1")
    t = stage.tokenizer
    five = (t.audio_bos, t.audio, t.audio_eos, t.turn_start, t.turn_end)
    require(len(set(five)) == len(five), f"tokenizer: {', '.join(five)}: each needs a token of its own")
    for token in t.add:
        require(
            token in five and t.add.count(token) == 1,
            f"tokenizer.add: {token!r} must be there once and be one of tokenizer.audio_bos, audio, audio_eos, "
            "turn_start and turn_end",
        )
    require(len(stage.optim.betas) == 2, f"optim.betas: {stage.optim.betas}; two numbers")
    require(min(stage.log.every, stage.log.val_every, stage.log.checkpoint_every) > 0, "log.*: steps are at least 1")
    optim = stage.optim
    for name, low, value, high in (
        ("lora.dropout", 0, stage.lora.dropout, 1), ("optim.lr", 0, optim.lr, 1e3), ("optim.eps", 0, optim.eps, 1),
        ("optim.weight_decay", 0, optim.weight_decay, 1e3), ("optim.final_lr", 0, optim.final_lr, 1),
        ("optim.clip_norm", 0, optim.clip_norm, 1e9), ("run.seed", 0, stage.run.seed, 2**63),
        *((f"optim.betas[{i}]", 0, b, 1) for i, b in enumerate(optim.betas)),
        *((f"optim.lr_for[{glob}]", 0, lr, 1e3) for glob, lr in optim.lr_for.items()),
    ):  # fmt: skip
        require(low <= value <= high, f"{name}: {value} is not between {low} and {high:g}")
    require(optim.max_skips > 0, f"optim.max_skips: {optim.max_skips}; at least 1, which stops at once")
    require(optim.spike == 0 or optim.spike > 1, f"optim.spike: {optim.spike}; write a multiple above 1, or 0 for none")
    require(stage.lora.dropout < 1 and optim.clip_norm > 0, "lora.dropout must be below 1, optim.clip_norm above 0")
    require(length(stage.run.length, "run.length")[0] > 0, f"run.length: `{stage.run.length}` trains nothing")
    length(stage.run.warmup, "run.warmup")


def check_start(stage: Stage) -> None:
    """Are the weights named that training starts from? Data can be checked without them. Raises ConfigError."""
    for position, start in enumerate(stage.start):
        if not start["from"]:
            encoder = DASHENG.get(stage.model.encoder.dim, "dasheng.pt")
            decoder = Path(stage.weights.decoder or "DECODER").name
            raise ConfigError(
                f"start[{position}].from is empty: this scale needs pretrained weights for {start['take']}, a Dasheng "
                f'.pt file, a folder with safetensors or a hub id; e.g. SET="weights.encoder=PATH/{encoder} '
                f'weights.decoder=PATH/{decoder}"'
            )


def saved(path: Path) -> dict[str, Any]:
    """Dotted key -> value of a run folder's config.yaml (as `Loaded.yaml` wrote it); a key that came later has its
    default. Raises ConfigError."""
    return flat(dataclasses.asdict(Stage())) | _read(path)


def of_run(path: Path) -> Stage:
    """The stage of a run folder's config.yaml. Raises ConfigError, which says what runs there are beside it."""
    if not path.is_file():
        there = ", ".join(sorted(p.parent.name for p in path.parent.parent.glob("*/config.yaml"))) or "none"
        raise ConfigError(f"no run {path.parent} (runs there: {there}); say NAME=...")
    nested: dict[str, Any] = {}
    for name, value in _read(path).items():
        *sections, last = name.split(".")
        inner = nested
        for part in sections:
            inner = inner.setdefault(part, {})
        inner[last] = value
    _check_keys(str(path), nested)
    try:
        stage = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Stage), nested))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_explained(error)}") from None
    assert isinstance(stage, Stage)
    return stage


def binding(stage: Stage) -> dict[str, Any]:
    """The values that results depend on (dotted key -> value): what a resume must not change."""
    return {name: value for name, value in flat(dataclasses.asdict(stage)).items() if name not in free_keys()}


def free_keys() -> set[str]:
    """Keys that may differ between a run and its resume."""
    return {name for name, item in schema().items() if item.metadata["free"]}


def fingerprint(stage: Stage) -> str:
    """Hash of `binding`: two runs with the same one are the same run."""
    return hashlib.sha256(json.dumps(binding(stage), sort_keys=True).encode()).hexdigest()[:16]


def settings_of(given: Sequence[str], kinds: Mapping[str, type]) -> dict[str, Any]:
    """The "key=value" strings of a verb that reads no stage file, each of the kind of its key. Raises UserError."""
    found: dict[str, Any] = {}
    for setting in given:
        name, equals, text = setting.partition("=")
        kind = kinds.get(name)
        if not equals or kind is None:
            raise UserError(f"SET: `{setting}`: write key=value; there are {', '.join(kinds)}")
        value = text if kind is str else yaml.safe_load(text)
        value = float(value) if kind is float and type(value) is int else value
        if type(value) is not kind:
            raise UserError(f"SET: {name}={text} is no {kind.__name__}")
        found[name] = value
    return found


def keys_table() -> str:
    """All keys with default and sentence, for `make keys`."""
    defaults = flat(dataclasses.asdict(Stage()))
    lines = [
        f"{name:26} {json.dumps(defaults[name]):28} {item.metadata['doc']}{' [free]' if item.metadata['free'] else ''}"
        for name, item in schema().items()
    ]
    return "\n".join([*lines, "[free]: may change between a run and its resume; every other key may not"])
