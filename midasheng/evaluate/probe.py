"""Does a frozen encoder's mean frame tell what a clip is? A linear head and nearest neighbours, in X-ARES's manner.

As X-ARES (xares 0.1.3, task.py, trainer.py): the mean over frames; a LayerNorm and a linear layer, Adam at 1e-3 with a
cosine to a tenth over 10 epochs of batches of 32, the best epoch by validation; 10 neighbours by cosine, weighted by
softmax(similarity / 0.07). Ours: clips are encoded alone, without the padding of a batch; intervals, over sources; a
third head, ridge regression, that is trained to its end.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import braceexpand
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from midasheng import config, frames
from midasheng.config import UserError
from midasheng.data.audio import Skip, announced_samples, decode
from midasheng.data.shard import AUDIO_EXTENSIONS, scan
from midasheng.evaluate.score import Number, ratio
from midasheng.model.audio_lm import PARTS, AudioLM
from midasheng.model.encoder import DashengEncoder, EncoderShape
from midasheng.model.sources import open_source, part_digests
from midasheng.sample import counter_seed, unit_hash

NEIGHBOURS, TEMPERATURE = 10, 0.07
EPOCHS, BATCH, RATE, FINAL_RATE, SEED = 10, 32, 1e-3, 0.1, 42
VALID_SHARE = 0.1  # of the sources that are trained on, where no validation shards are named
ENCODED_S = 60  # seconds of audio that are encoded at a time
MEL = "log-mel"  # the mean log-mel frame: what an encoder has to be better than


# -- tasks -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One label to be told. Shards are patterns ({1..5} and *) below the root: `train` and `test`, or `folds`, a
    pattern for each, tested in turn, where the tested fold chooses the epoch too, as X-ARES does. `held_out`: the share
    of the sources in `train` that is tested instead: a card's `held_out.share` keeps what no stage was trained on."""

    name: str
    label: str  # JSON field
    train: tuple[str, ...] = ()
    valid: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    folds: tuple[str, ...] = ()
    held_out: float = 0.0
    source: str = "source"  # JSON field: clips of one source are on one side, and count as one for intervals
    most: int = 0  # clips to train the heads on, by hash; 0: all


def read_tasks(path: Path, root: Path) -> tuple[list[Task], Path]:
    """The tasks of a file, and the folder that their shards lie in: its `root`, or the one given. Raises UserError."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), dict):
        raise UserError(f"{path}: write `tasks:`, below it a name for each, below that its keys (and `root:`)")
    root = Path(content.get("root") or root)
    known = {f.name for f in dataclasses.fields(Task)} - {"name"}
    tasks = []
    for name, keys in content["tasks"].items():
        for key in keys:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                raise UserError(
                    f"{path}: {name}: unknown key `{key}`" + (f"; did you mean `{near[0]}`?" if near else "")
                )
        lists = {k: tuple([v] if isinstance(v, str) else v) for k, v in keys.items() if k in PATTERNS}
        lists |= {"folds": tuple(p for text in lists.get("folds", ()) for p in braceexpand.braceexpand(text))}
        if "label" not in keys or bool(lists["folds"]) == bool(lists.get("train")):
            raise UserError(f"{path}: {name}: write `label:` and either `train:` or `folds:`")
        task = Task(**{"name": name, **keys, **lists})
        if not task.folds and not task.test and not task.held_out:
            raise UserError(f"{path}: {name}: nothing to test on; write `test:` or `held_out:`")
        for pattern in (*task.train, *task.valid, *task.test, *task.folds):
            shards(root, pattern)
        tasks.append(task)
    return tasks, root


PATTERNS = ("train", "valid", "test", "folds")


def shards(root: Path, pattern: str) -> list[Path]:
    """The shards of a pattern. Raises UserError when there is none."""
    found = sorted(p for text in braceexpand.braceexpand(pattern) for p in root.glob(text))
    if not found:
        raise UserError(f"{root} holds no {pattern}")
    return found


@dataclass(frozen=True)
class Labelled:
    """A clip: shard and key, its label and its source."""

    shard: Path
    key: str
    label: str
    source: str


@dataclass(frozen=True)
class Split:
    """What is trained on, validated on and tested."""

    train: list[Labelled]
    valid: list[Labelled]
    test: list[Labelled]


def records(path: Path) -> Iterator[tuple[str, dict[str, Any], bytes]]:
    """(key, JSON, audio file) of a shard's records that have both."""
    found, damage = scan(str(path))
    if damage:
        raise UserError(f"{path}: {damage[0]}")
    with path.open("rb") as file:
        for record in found:
            extension = next((e for e in AUDIO_EXTENSIONS if e in record.members), None)
            if extension and "json" in record.members and not record.reason:
                parts = []
                for name in ("json", extension):
                    file.seek(record.members[name].offset)
                    parts.append(file.read(record.members[name].size))
                yield record.key, json.loads(parts[0]), parts[1]


def labelled(task: Task, root: Path, patterns: Sequence[str]) -> list[Labelled]:
    """The records of these shards that have the label, in the order of their hash. Raises UserError for a list."""
    found = []
    for path in [p for pattern in patterns for p in shards(root, pattern)]:
        for key, content, _ in records(path):
            if (label := content.get(task.label)) is None:
                continue
            if isinstance(label, list | dict):
                raise UserError(
                    f"{path}: {key}: `{task.label}` is a {type(label).__name__}; one label a clip is probed"
                )
            found.append(Labelled(path, key, str(label), str(content.get(task.source, key))))
    return sorted(found, key=lambda r: unit_hash(f"probe:{r.key}"))


def splits(task: Task, root: Path) -> list[Split]:
    """One, or one for each fold."""
    if task.folds:
        folds = [labelled(task, root, [pattern]) for pattern in task.folds]
        return [
            Split([r for j, other in enumerate(folds) if j != k for r in other], fold, fold)
            for k, fold in enumerate(folds)
        ]
    there, valid = labelled(task, root, task.train), labelled(task, root, task.valid)
    kept = [r for r in there if unit_hash("held_out:" + r.source) < task.held_out]  # the cards' own rule
    train = [r for r in there if unit_hash("held_out:" + r.source) >= task.held_out]
    train = train[: task.most or None]
    if not task.valid:
        valid = [r for r in train if unit_hash("probe valid:" + r.source) < VALID_SHARE]
        train = [r for r in train if unit_hash("probe valid:" + r.source) >= VALID_SHARE]
    return [Split(train, valid, kept + labelled(task, root, task.test))]


# -- features ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def means(encoders: Mapping[str, DashengEncoder], clips: Sequence[Tensor]) -> dict[str, Tensor]:
    """Encoder -> mean frame (clips, dim) of each clip, and of the log-mels; one pass over all of them."""
    n = [len(clip) for clip in clips]
    n_frames = [frames.frames(samples) for samples in n]
    found = {
        name: torch.stack([part.float().mean(0) for part in encoder(torch.cat(list(clips)), n).split(n_frames)])
        for name, encoder in encoders.items()
    }
    log_mel = next(iter(encoders.values())).log_mel
    return found | {MEL: torch.stack([log_mel(clip).mean(1) for clip in clips])}


def features(
    encoders: Mapping[str, DashengEncoder], wanted: set[tuple[Path, str]]
) -> dict[str, dict[tuple[Path, str], Tensor]]:
    """Encoder -> (shard, key) -> mean frame. Clips that cannot be decoded are missing; those below 0.2 s are
    padded, as in generation."""
    found: dict[str, dict[tuple[Path, str], Tensor]] = {name: {} for name in (MEL, *encoders)}
    waiting: dict[tuple[Path, str], Tensor] = {}

    def flush() -> None:
        if waiting:
            for name, rows in means(encoders, list(waiting.values())).items():
                found[name] |= dict(zip(waiting, rows, strict=True))
            waiting.clear()

    for path in sorted({path for path, _ in wanted}):
        for key, _, audio in records(path):
            if (path, key) not in wanted:
                continue
            try:
                clip = torch.from_numpy(decode(audio, announced_samples(audio)))
            except Skip:
                continue
            clip = F.pad(clip, (0, max(0, frames.MIN_SAMPLES - len(clip))))
            waiting[path, key] = clip
            if sum(len(w) for w in waiting.values()) > ENCODED_S * frames.SAMPLE_RATE:
                flush()
    flush()
    return found


# -- heads -------------------------------------------------------------------------------------------------------------


def neighbours(train_ND: Tensor, labels_N: Tensor, test_MD: Tensor, classes: int) -> Tensor:
    """The class of each test row (M,), by its nearest rows in training."""
    similar_MN = F.normalize(test_MD, dim=1) @ F.normalize(train_ND, dim=1).T
    nearest = similar_MN.topk(min(NEIGHBOURS, len(train_ND)))
    votes_MK1 = F.softmax(nearest.values / TEMPERATURE, 1)[..., None]
    return (F.one_hot(labels_N[nearest.indices], classes) * votes_MK1).sum(1).argmax(1)


def linear(train: tuple[Tensor, Tensor], valid: tuple[Tensor, Tensor], test_MD: Tensor, classes: int) -> Tensor:
    """The class of each test row (M,), by the head of the epoch that is best in validation."""
    (x_ND, y_N), draw = train, torch.Generator().manual_seed(SEED)
    width = x_ND.shape[1]
    head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))
    with torch.no_grad():  # nn.Linear's own rule, with our generator
        for parameter in head[1].parameters():
            parameter.uniform_(-(width**-0.5), width**-0.5, generator=draw)
    adam = torch.optim.Adam(head.parameters(), RATE)
    best, kept = -1.0, {n: t.clone() for n, t in head.state_dict().items()}
    for epoch in range(EPOCHS):
        share = 0.5 * (1 + math.cos(math.pi * epoch / EPOCHS))
        adam.param_groups[0]["lr"] = RATE * (FINAL_RATE + (1 - FINAL_RATE) * share)
        for rows in torch.randperm(len(x_ND), generator=draw).split(BATCH):
            adam.zero_grad()
            F.cross_entropy(head(x_ND[rows]), y_N[rows]).backward()
            adam.step()
        with torch.no_grad():
            right = float((head(valid[0]).argmax(1) == valid[1]).double().mean()) if len(valid[1]) else float(epoch)
        if right > best:
            best, kept = right, {n: t.clone() for n, t in head.state_dict().items()}
    head.load_state_dict(kept)
    with torch.no_grad():
        return head(test_MD).argmax(1)


def ridge(train: tuple[Tensor, Tensor], valid: tuple[Tensor, Tensor], test_MD: Tensor, classes: int) -> Tensor:
    """The class of each test row (M,) by ridge regression on standardised features, solved: what a linear head would
    tell that was trained to its end, which X-ARES's is not on a few hundred clips. The penalty is chosen by
    validation."""
    (x_ND, y_N), (mean_D, std_D) = train, (train[0].double().mean(0), train[0].double().std(0) + 1e-8)
    z_ND, v_VD, t_MD = ((t.double() - mean_D) / std_D for t in (x_ND, valid[0], test_MD))
    one_hot_NC = F.one_hot(y_N, classes).double()
    base_C = one_hot_NC.mean(0)
    best, weight_DC = -1.0, torch.zeros(x_ND.shape[1], classes, dtype=torch.float64)
    for penalty in (1e-3, 1e-2, 0.1, 1.0, 10.0):
        gram_DD = z_ND.T @ z_ND + penalty * len(z_ND) * torch.eye(z_ND.shape[1], dtype=torch.float64)
        solved_DC = torch.linalg.solve(gram_DD, z_ND.T @ (one_hot_NC - base_C))
        right = float(((v_VD @ solved_DC + base_C).argmax(1) == valid[1]).double().mean()) if len(valid[1]) else penalty
        if right > best:
            best, weight_DC = right, solved_DC
    return (t_MD @ weight_DC + base_C).argmax(1)


HEADS = ("knn", "linear", "ridge")


# -- probing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """One task's tested clips: which were told right, by (encoder, head) (clips,), and what each belongs to."""

    task: Task
    right: dict[tuple[str, str], Tensor]
    sources: list[str]
    labels: list[str]
    trained: int  # clips the heads were trained on; of the first fold
    classes: int

    def number(self, head: str, encoder: str, minus: str = "") -> Number:
        """Share of the clips that are told right, or how much larger it is than that of another encoder; its interval
        is over sources, whose clips resemble each other."""
        score = self.right[encoder, head].double()
        if minus:
            score = score - self.right[minus, head].double()
        sums: dict[str, list[float]] = {}
        for source, value in zip(self.sources, score.tolist(), strict=True):
            pair = sums.setdefault(source, [0.0, 0.0])
            pair[0], pair[1] = pair[0] + value, pair[1] + 1
        return ratio(*map(list, zip(*sums.values(), strict=True)))

    @property
    def chance(self) -> float:
        """As if the most frequent label of the tested clips were always told."""
        return Counter(self.labels).most_common(1)[0][1] / len(self.labels)


def probe(encoders: Mapping[str, DashengEncoder], tasks: Sequence[Task], root: Path) -> list[Told]:
    """Every encoder, and the log-mels, on every task. Raises UserError for a task with nothing to train or test on."""
    all_splits = {task.name: splits(task, root) for task in tasks}
    wanted = {(r.shard, r.key) for each in all_splits.values() for s in each for r in (*s.train, *s.valid, *s.test)}
    rows = features(encoders, wanted)
    told = []
    for task in tasks:
        right: dict[tuple[str, str], list[Tensor]] = {(e, h): [] for e in rows for h in HEADS}
        tested: list[Labelled] = []
        counts = []
        for split in all_splits[task.name]:
            train, valid, test = (
                [r for r in part if (r.shard, r.key) in rows[MEL]] for part in (split.train, split.valid, split.test)
            )
            classes = {label: number for number, label in enumerate(sorted({r.label for r in train}))}
            if len(classes) < 2 or not test:
                raise UserError(
                    f"{task.name}: {len(train)} clips with {len(classes)} labels to train on, {len(test)} to test"
                )
            counts.append((len(train), len(classes)))
            tested += test

            def xy(part: Sequence[Labelled], name: str, ids: Mapping[str, int] = classes) -> tuple[Tensor, Tensor]:
                # a label that training lacks is class -1, which nobody tells
                width = next(iter(rows[name].values())).shape[0]
                x = torch.stack([rows[name][r.shard, r.key] for r in part]) if part else torch.empty(0, width)
                return x, torch.tensor([ids.get(r.label, -1) for r in part], dtype=torch.long)

            for name in rows:
                rows_of, by = xy(train, name), xy(valid, name)
                x_MD, y_M = xy(test, name)
                right[name, "knn"].append(neighbours(*rows_of, x_MD, len(classes)) == y_M)
                right[name, "linear"].append(linear(rows_of, by, x_MD, len(classes)) == y_M)
                right[name, "ridge"].append(ridge(rows_of, by, x_MD, len(classes)) == y_M)
        told.append(
            Told(
                task, {k: torch.cat(v) for k, v in right.items()}, [r.source for r in tested],
                [r.label for r in tested], *counts[0],
            )
        )  # fmt: skip
    return told


# -- encoders of a run -------------------------------------------------------------------------------------------------


def encoder_of(weights: str) -> DashengEncoder:
    """The encoder of a run, of a folder in the published layout, of a Dasheng .pt or a hub id. Raises UserError."""
    source = open_source(weights)
    said = source.config.get("audio_encoder_config", source.config | source.config.get("encoder_kwargs", {}))
    if "num_heads" not in said:
        raise UserError(f"{weights}: its config does not say the encoder's num_heads")
    encoder = DashengEncoder(EncoderShape(said["embed_dim"], said["depth"], said["num_heads"]))
    _fill(encoder, {n: source.read(n) for n in source.shapes if n.startswith(PART)}, weights)
    return encoder


PART = "audio_encoder."


def _fill(encoder: DashengEncoder, state: Mapping[str, Tensor], where: str) -> None:
    own = {n.removeprefix(PART): t.float() if t.is_floating_point() else t for n, t in state.items()}
    try:
        encoder.load_state_dict(own)
    except RuntimeError as error:
        raise UserError(f"{where}: {' '.join(str(error).split())[:300]}") from None
    encoder.requires_grad_(False).eval()


def started_from(run: Path) -> tuple[DashengEncoder, str]:
    """(the encoder that a finished run's stage started from, where it came from): its parent's, or the fresh one, made
    again from the seed and proved by the hash that stage.json holds. Raises UserError."""
    source, stage = open_source(str(run)), config.of_run(run / "config.yaml")
    before = source.record["parts"]["audio_encoder"]["start"]
    shape = EncoderShape(stage.model.encoder.dim, stage.model.encoder.depth, stage.model.encoder.heads)
    parents = [
        p["from"] for p in source.record["parents"] if any(fnmatchcase(f"{PART}norm.weight", g) for g in p["take"])
    ]
    if parents:
        where = str(parents[0])
        parent = open_source(where)
        encoder = DashengEncoder(shape)
        _fill(encoder, {n: parent.read(n) for n in parent.shapes if n.startswith(PART)}, where)
    else:
        where = "untrained"
        torch.manual_seed(counter_seed(stage.run.seed, "fresh", stage.name) % 2**63)  # as fit.build
        d, others = stage.model.decoder, [p for p in PARTS if not PART.startswith(p)]
        encoder = AudioLM(shape, d.architecture, d.fields, others).audio_encoder.requires_grad_(False).eval()
        # calibrated before step 0 and stored since: training never moves them
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            getattr(encoder.init_bn, name).copy_(source.read(f"{PART}init_bn.{name}"))
    now = part_digests({PART + n: t for n, t in encoder.state_dict().items()})["audio_encoder"]
    if now != before:
        raise UserError(
            f"{run}: the encoder of {where} is not the one it started from (hash {now}, stage.json says {before}): "
            "trained again since, or made by another version of torch"
        )
    return encoder, where


def of_runs(runs: Sequence[Path], tasks: Sequence[Task], root: Path) -> str:
    """Probe the encoders of finished runs, each beside what it started from; write probe.json into each run's folder.
    Returns the table. Raises UserError."""
    began = time.monotonic()
    encoders: dict[str, DashengEncoder] = {}
    before: dict[str, str] = {}
    names: dict[str, str] = {}  # hash of an encoder that was started from -> its column
    for run in runs:
        if not (run / "weights" / "stage.json").is_file():
            raise UserError(f"{run} is no finished run (it has no weights/stage.json)")
        encoder, where = started_from(run)
        digest = part_digests({PART + n: t for n, t in encoder.state_dict().items()})["audio_encoder"]
        column = names.setdefault(digest, where if where not in encoders else f"{where} ({digest[:4]})")
        encoders.setdefault(column, encoder)
        before[run.name], encoders[run.name] = column, encoder_of(str(run))
    told = probe(encoders, tasks, root)
    for run in runs:
        shown = (MEL, before[run.name], run.name)
        content = {
            "protocol": {
                "knn": {"neighbours": NEIGHBOURS, "temperature": TEMPERATURE},
                "linear": {"epochs": EPOCHS, "batch": BATCH, "rate": RATE, "final_rate": FINAL_RATE, "seed": SEED},
                "ridge": "solved, on standardised features; penalty by validation; not X-ARES's",
                "interval": "95 %, bootstrap over sources",
            },
            "root": str(root), "seconds": round(time.monotonic() - began, 1),
            "tasks": {
                t.task.name: {
                    "clips": len(t.labels), "sources": len(set(t.sources)), "labels": t.classes,
                    "trained_on": t.trained, "chance": t.chance,
                    "right": {name: {h: _value(t.number(h, name)) for h in HEADS} for name in shown},
                    "gained": {h: _value(t.number(h, run.name, before[run.name])) for h in HEADS},
                } for t in told
            },
        }  # fmt: skip
        (run / "probe.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return table(told, list(encoders), before) + f"\n{time.monotonic() - began:.0f} s"


def _value(number: Number) -> dict[str, Any]:
    return {"value": number.value, "interval": number.interval()}


def table(told: Sequence[Told], encoders: Sequence[str], before: Mapping[str, str]) -> str:
    """Task by task: each encoder's shares by both heads, and what each run gained over what it started from."""
    lines = [f"{'mean frame tells (' + ' / '.join(HEADS) + ', %)':40}{'clips':>6}{'labels':>7}{'chance':>8}"]
    for t in told:
        lines.append(f"{t.task.name:40}{len(t.labels):6}{t.classes:7}{t.chance:8.1%}")
        for name in (MEL, *encoders):
            shares = [f"{_percent(t.number(h, name)):>22}" for h in HEADS]
            gained = ""
            if name in before:
                gained = "   gained " + " / ".join(_percent(t.number(h, name, before[name]), "+") for h in HEADS)
            lines.append(f"    {name:30}{''.join(shares)}{gained}")
    return "\n".join(lines)


def _percent(number: Number, sign: str = "") -> str:
    value, interval = number.value, number.interval()
    assert value is not None
    ends = f" [{100 * interval[0]:{sign}.1f}, {100 * interval[1]:{sign}.1f}]" if interval else ""
    return f"{100 * value:{sign}.1f}{ends}"
