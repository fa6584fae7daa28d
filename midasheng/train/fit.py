"""The one way to run a stage: check everything, then write, train, hand off."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence, Set
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from midasheng import __version__, config
from midasheng.config import DDP, FSDP, ConfigError, Stage, UserError
from midasheng.data.index import CorpusIndex
from midasheng.data.ledger import Ledger, Skipped, drop_after, trim
from midasheng.data.loader import Loading, first_clips, keep_freed_memory, train_loader
from midasheng.data.plan import Planner, differences
from midasheng.data.quarantine import FILE, quarantined, records
from midasheng.data.room import DataRoom, open_data, plan_data
from midasheng.evaluate import probe
from midasheng.model import adapt, attention, kernels, loss, weights
from midasheng.model.audio_lm import PARTS, AudioLM
from midasheng.model.decoder import with_vocabulary
from midasheng.model.encoder import EncoderShape
from midasheng.model.sources import WeightsError, check_learned, check_stage, open_source
from midasheng.sample import counter_seed
from midasheng.train import checkpoint, memory, once, optim, sharded, trackers, world
from midasheng.train.listening import LONGEST, ListeningTest
from midasheng.train.meter import add_event
from midasheng.train.module import StageModule
from midasheng.train.order import Order, check_run_folder, command_line, empty, held, look_for_others
from midasheng.train.progress import ProgressLine, ending
from midasheng.train.world import Elsewhere, Stopped, World, is_first, stoppable

# adverts and "GPU available: False": the header of a run says what runs
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message=".*(isinstance.treespec, LeafSpec.|smaller than the logging interval).*")
CALIBRATION_CLIPS = 1_000
MAKE_TARGET = {"stage1_align": "make stage1", "stage2_pretrain": "make stage2", "text_decoder": "make data"}


# -- checks before anything is written ---------------------------------------------------------------


def names_stage(origin: str) -> bool:
    """Is a `from` the name of a stage (a run folder below RUNS), and not a path or a hub id?"""
    return "/" not in origin and not origin.endswith(".pt") and not Path(origin).is_dir()


def open_starts(order: Order) -> list[weights.Start]:
    """Open and check every source of `start`. Raises UserError."""
    starts = []
    for entry in order.stage.start:
        origin, take = str(entry["from"]), tuple(str(t) for t in entry["take"])
        if names_stage(origin):
            folder = order.runs / order.scale / (order.start_from or origin)
            if not folder.is_dir():
                first = MAKE_TARGET.get(origin, f"the stage {origin}")
                there = ", ".join(sorted(p.name for p in folder.parent.glob("*/"))) or "none"
                raise WeightsError(
                    f"start: there is no run {folder}; run `{first}` first, or say FROM=NAME (runs there: {there})"
                )
            source = open_source(str(folder))
            check_stage(source, origin)
        else:
            if not Path(origin).exists() and "text_decoder" in origin:
                raise WeightsError(f"start: {origin} does not exist; run `make data` first")
            named = [f"weights.{n}=PATH" for n in ("encoder", "decoder") if getattr(order.stage.weights, n) == origin]
            source = open_source(origin, " ".join(named) or "another `from` in start")
        check_learned(source, take)
        starts.append(weights.Start(source, take))
    if order.start_from and not any(names_stage(str(e["from"])) for e in order.stage.start):
        raise ConfigError(f"FROM={order.start_from}: this stage starts from no other stage")
    return starts


def build(
    order: Order, starts: Sequence[weights.Start], added: range = range(0)
) -> tuple[AudioLM, str, adapt.LoraPlan | None]:
    """The model with its start weights, LoRA and precision, and the text that says what came from where and what
    learns. `added`: ids that tokenizer.add gave the tokenizer. Raises UserError."""
    model, said, table = _assembled(order.stage, starts, added)
    weights.check_memory(model)
    return model, "\n".join(said) + "\n\n" + table + "\n", _lora(order.stage)


def skeleton(stage: Stage, added: range) -> tuple[AudioLM, str]:
    """The same model without memory for its weights, and the table of what learns; its buffers are there. Raises
    UserError."""
    model, _, table = _assembled(stage, None, added)
    return model, table


def begin(
    order: Order, starts: Sequence[weights.Start], added: range, ranks: World, kind: str
) -> tuple[AudioLM, str, adapt.LoraPlan | None]:
    """`build`, as one of `ranks`, which all call it. Where they share the model (`kind`: of sharded.chosen) its weights
    are built once a node (train/once.py), and only there is the text. Raises UserError."""
    if kind != FSDP or ranks.size == 1:
        return build(order, starts, added)
    model, _ = skeleton(order.stage, added)
    return model, once.fill(model, lambda: build(order, starts, added)[:2], ranks), _lora(order.stage)


def _lora(stage: Stage) -> adapt.LoraPlan | None:
    asked = stage.lora
    return adapt.LoraPlan(tuple(asked.targets), asked.rank, asked.alpha, asked.dropout) if asked.targets else None


def _assembled(stage: Stage, starts: Sequence[weights.Start] | None, added: range) -> tuple[AudioLM, list[str], str]:
    """The one way from a stage to its model: (model, lines on what came from where, table of what learns). `starts`:
    None for parameters on the meta device, which came from nowhere."""
    e, d = stage.model.encoder, stage.model.decoder
    torch.manual_seed(counter_seed(stage.run.seed, "fresh", stage.name) % 2**63)
    shape = EncoderShape(e.dim, e.depth, e.heads)
    fields = with_vocabulary(d.architecture, d.fields, added.stop) if added else d.fields
    parts = PARTS if starts is None else weights.loaded_parts(starts, stage.fresh)
    model = AudioLM(shape, d.architecture, fields, parts)
    adapt.freeze_all_but(model, stage.train)
    said = []
    if starts is not None:
        origins = weights.load(
            model, starts, stage.fresh, merge_lora=stage.lora.inherit == "merge", precision=stage.run.precision,
            added=added,
        )  # fmt: skip
        said = [f"{'origin':34}{'part':>18}{'tensors':>8}"] + [f"{o:34}{p:>18}{n:8}" for o, p, n in origins]
        said += [f"{s.source.where}: {s.source.note}" for s in starts if s.source.note]
    plan, adapted = _lora(stage), {}
    if plan is not None:
        with torch.device("meta") if starts is None else nullcontext():
            adapted = adapt.add_lora(model, plan, counter_seed(stage.run.seed, "lora", stage.name) % 2**63)
    if starts is not None and stage.lora.inherit == "carry":
        whole = [s for s in starts if adapt.matches("decoder.model.layers.0.self_attn.q_proj.weight", s.take)]
        if carried := sum(weights.carry_lora(model, s.source, plan) for s in whole):
            said.append(f"LoRA of {carried} layers carried over, the others fresh")
    model.decoder.learn_rows(added)
    optim.groups(model.named_parameters(), stage.optim)  # so that a wrong lr_for is an error before anything is written
    model.recompute(stage.hardware.recompute)
    if stage.hardware.liger:
        kernels.fuse(model.decoder.model)
    if stage.hardware.compile:
        model.compile_blocks()
    adapt.set_precision(model, stage.run.precision)
    table = adapt.learns(model, stage.train, adapted, stage.lora.rank).table(stage.optim.name == "adamw8bit")
    return model, said, table


def parents_of(starts: Sequence[weights.Start]) -> list[dict[str, Any]]:
    """What the run starts from, for stage.json."""
    return [
        {
            "from": s.source.where,
            "take": list(s.take),
            "stage": s.source.record.get("stage"),
            "sha256": s.source.record.get("sha256") or {},
        }
        for s in starts
    ]  # fmt: skip


# -- running ----------------------------------------------------------------------------------


def git_commit() -> str:
    """The commit of the code, with + when it was changed; "unknown" outside a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            capture_output=True, text=True, check=True, cwd=Path(__file__).parent,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def verified(stage: Stage) -> str:
    """The kernels that will run, held to their plain forms on the device. Raises AssertionError, UserError."""
    attention.ask(stage.hardware.attention)
    device, dtype = memory.device_of(stage), torch.bfloat16 if stage.run.precision == "bf16" else torch.float32
    d, norms = stage.model.decoder, "plain"
    if stage.hardware.liger:
        norms = f"Liger (against the plain ones: {kernels.verify(d.architecture, d.fields, device, dtype):.0e})"
    return (
        f"  attention: {attention.kernel(device.type, dtype)} within segments (verified against a dense mask: "
        f"{attention.verify(device, dtype):.0e}); loss: chunked cross-entropy (against the plain one: "
        f"{loss.verify(device, dtype):.0e}); RMSNorm and SwiGLU of the decoder: "
        f"{norms}; blocks {'compiled' if stage.hardware.compile else 'not compiled'}"
    )


def course(stage: Stage, data: DataRoom) -> str:
    """How long, in what packs, how fast it learns: a line."""
    b, c = data.budget, data.course
    return (
        f"{c.steps} steps ({c.warmup} of warm-up), {b.packs_per_step} packs a step of {b.pack_slots} slots and "
        f"{b.pack_frames} frames; {stage.optim.name}, lr {stage.optim.lr:g}, {stage.run.precision}"
    )


def header(order: Order, data: DataRoom, kernels: str, memory_lines: Sequence[str]) -> str:
    """What this run is, for the terminal and the run folder."""
    b, stage = data.budget, order.stage
    lines = [f"{stage.name} at {order.scale} -> {order.folder}", *data.mix.notes]
    for corpus, percent in zip(data.corpora, data.mix.percent, strict=True):
        left_out = ", ".join(f"{n} {reason}" for reason, n in corpus.summary.reasons.items()) or "none"
        lines.append(
            f"  {corpus.card.name:24}{percent:6.1f} %{len(corpus):8} records{corpus.summary.hours:8.2f} h"
            f"{sum(r.held_out for r in corpus.rows):6} held out; left out: {left_out}"
        )
    lines.append(f"  {course(stage, data)}")
    if b.lead is not None:
        lines.append(f"  {shared(b.lead_slots, data.corpora)}")
    few, asked = len(data.held_out[0].open(stage.log.answers)), len(data.held_out[0].asked)
    words = f", {few} of them answered in words (at most {LONGEST} tokens each)" if few else ""
    lines.append(f"  validation every {stage.log.val_every} steps and at both ends: {asked} held-out samples{words}")
    lines += [f"  note: {note}" for note in data.notes]
    return "\n".join([*lines, kernels, *memory_lines]) + "\n"


def shared(lead: int, corpora: Sequence[CorpusIndex]) -> str:
    """What packs compute once, for the header."""
    parts = [f"{lead} leading slots are computed once per pack"]
    for corpus in corpora:
        s, name = corpus.summary, corpus.card.name
        if corpus.card.answers == "all" and s.shared.mean_slots < s.mean_slots:
            parts.append(
                f"`answers: all` of {name} shares what a record's conversations begin with: {s.shared.mean_slots:.0f} "
                f"slots and {s.shared.mean_frames:.0f} frames a visit instead of {s.mean_slots:.0f} and "
                f"{s.mean_frames:.0f}"
            )
        elif corpus.card.answers == "all":
            parts.append(f"`answers: all` of {name} shares nothing besides")
    return "; ".join(parts)


def to_agree_on(order: Order, inputs: dict[str, Any], state: str, without: Set[tuple[int, int]]) -> dict[str, str]:
    """What all processes of a run must see alike: what -> it, or its fingerprint."""
    settings = config.flat(dataclasses.asdict(order.stage))
    return {
        "code": world.code_fingerprint(), **{name: json.dumps(value) for name, value in settings.items()},
        "index or plan": world.fingerprint(inputs["plan"]),
        "weights to start from": world.fingerprint(inputs["parents"]),
        "state of the run folder": state, "quarantine": world.fingerprint(sorted(without)),
    }  # fmt: skip


def fit(order: Order, ranks: World | None = None) -> None:
    """Run one stage to its end or to a stop, as one of `ranks`. Nothing is written before every check has passed.

    Raises UserError for mistakes of the user, Stopped after Ctrl-C (a checkpoint is there then).
    """
    ranks = ranks or World()
    folder, first = order.folder, ranks.first
    asked = order.stage.hardware.devices * order.stage.hardware.nodes
    assert ranks.size == asked, f"{ranks.size} processes, hardware.devices x hardware.nodes is {asked}"
    ranks.stall_s = order.stage.hardware.stall_s
    config.check_start(order.stage)
    if first:
        look_for_others(folder)
    trackers.check(order.stage.log.trackers)
    kernels = verified(order.stage)  # first: memory is measured with them
    if order.stage.hardware.threads:
        torch.set_num_threads(order.stage.hardware.threads)
    keep_freed_memory()  # what a step computes is as large as what the last one freed
    starts = open_starts(order)  # before data: an index of many shards takes long
    if first:
        sources = open_data(order.stage, make=True)
    ranks.of_first("the index", lambda: None)  # is made
    if not first:
        sources = open_data(order.stage, make=False)
    for start in starts:
        weights.check_tokenizer(start, sources.chat.fingerprint())
    stage, added = order.stage, sources.chat.added
    kind = sharded.chosen(stage.hardware, skeleton(stage, added)[0])

    def measurable() -> AudioLM:
        return skeleton(stage, added)[0] if kind == FSDP else build(order, starts, added)[0]

    order = memory.pack_slots(order, sources, measurable, ranks, kind)
    stage = order.stage
    data = plan_data(stage, sources)
    planner = data.planner(stage.run.seed)
    inputs = {"plan": planner.fingerprint(), "parents": parents_of(starts)}
    state = "new" if order.fresh else check_run_folder(order, inputs)
    without = records([] if order.fresh else quarantined(folder), data.corpora)
    ranks.alike(to_agree_on(order, inputs, state, without))  # so that all go the same way from here on
    if state == "finished":
        if first:
            print(f"{folder} is finished (NAME=... for another run, FRESH=1 to train it again)")
        return
    # before there is a model, where its memory would be taken twice
    measured = memory.check(order, measurable(), sources, data.budget, ranks) if kind == FSDP else []
    model, table, plan = begin(order, starts, added, ranks, kind)
    measured = measured or memory.check(order, model, sources, data.budget, ranks)
    lines = [*sharded.lines(kind, stage.hardware), *measured, checkpoint.check_room(folder, model, stage)]
    text = header(order, data, kernels, lines) + "\n" + table
    if stage.data.probe:  # so that a mistake in it is found now
        try:
            probe.read_tasks(Path(stage.data.probe), Path(stage.data.root))
        except UserError as error:
            raise ConfigError(f"data.probe: {error}; or write data.probe='' for none") from None
    ranks.gather("the checks")  # are passed
    if first:
        folder.mkdir(parents=True, exist_ok=True)
    with held(folder, ranks):
        if first:
            print(text)
            if order.fresh:
                empty(folder)
            (folder / "checkpoints").mkdir(exist_ok=True)
            (folder / "trainable.txt").write_text(text, encoding="utf-8")
            (folder / "inputs.json").write_text(json.dumps(inputs, indent=2) + "\n", encoding="utf-8")
            # last: from here on the folder is a run
            (folder / "config.yaml").write_text(order.loaded.yaml(), encoding="utf-8")
        ranks.gather("the run folder")  # is made
        train(order, data, planner, model, plan, inputs, ranks, without)


def train(
    order: Order, data: DataRoom, planner: Planner, model: AudioLM, plan: adapt.LoraPlan | None, inputs: dict[str, Any],
    ranks: World, without: Set[tuple[int, int]] = frozenset(),
) -> None:  # fmt: skip
    """Train from step 0 or from the checkpoint, then write weights/. `without`: what is quarantined."""
    stage, folder, hardware = order.stage, order.folder, order.stage.hardware
    resume = folder / "checkpoints" / checkpoint.LAST
    saved = checkpoint.read(resume) if resume.is_file() else None
    changed = differences(saved["plan"]["fingerprint"], planner.fingerprint()) if saved else ""
    if saved and changed and stage.data.on_change == "restart_plan":
        restart_plan(folder, planner, saved["step"], changed)
    elif saved:
        planner.restore(saved["plan"])
    else:
        calibrate(model, stage, data)
    module = StageModule(
        model, stage, data.course, [c.card for c in data.corpora],
        ListeningTest(data.held_out, folder, stage.data.answers, stage.log.answers), folder, ranks.stop, saved,
    )  # fmt: skip
    # behind it nobody reads any more what the first process is about to trim
    ranks.alike(
        {"weights": world.fingerprint([module.start_digests, module.base]), "checkpoint": f"step {module.done}"}
    )
    ranks.tell, ranks.waits, steps_done = partial(tell, module), module.waits, module.done
    told: list[Logger] = []
    if ranks.first:
        settings = config.flat(dataclasses.asdict(stage))
        told = trackers.open_trackers(stage.log.trackers, folder, settings, resumed=saved is not None)
    kind = sharded.chosen(hardware, model)
    if kind == DDP:
        sharded.leave_out_frozen(module)
    trainer = L.Trainer(
        accelerator=hardware.accelerator, devices=hardware.devices, num_nodes=hardware.nodes,
        strategy=sharded.strategy(kind, hardware),
        max_epochs=1, use_distributed_sampler=False, precision="32-true", limit_val_batches=0, num_sanity_val_steps=0,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
        callbacks=[Fails(ranks), *([ProgressLine()] if stage.log.progress else [])],
        plugins=[TorchElasticEnvironment() if ranks.size > 1 else LightningEnvironment()],
        logger=[TensorBoardLogger(folder, name="", version="tensorboard"), *told],
    )  # fmt: skip
    # its handler of SIGTERM broadcasts within the signal, whatever collective the others are in
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    if ranks.first:
        trim(folder, steps_done if saved else -1)
        drop_after(folder / "events.jsonl", steps_done + 1 if saved else -1)
        if not saved:  # killed before its first checkpoint
            for name in ("metrics.jsonl", "speed.jsonl", "answers.jsonl"):
                (folder / name).unlink(missing_ok=True)
    ranks.gather("the trimmed run folder")
    module.planner = planner
    module.ledger = Ledger(folder, trainer.global_rank, [c.card.name for c in data.corpora])
    for corpus in data.corpora:
        writes = trainer.global_rank == 0 and not saved
        left_out = [Skipped(corpus.card.name, *s) for s in corpus.skipped()] if writes else []
        module.ledger.indexed(corpus.card.name, len(corpus), corpus.summary.reasons, left_out)
    if ranks.first:
        begins = {"step": steps_done, "event": "resume" if saved else "start", "world": trainer.world_size}
        add_event(folder, begins | ({"world_before": saved.get("world")} if saved else {}))
    if saved and ranks.first:
        aside = f"; {len(without)} samples are in {folder / FILE}" if without else ""
        print(f"resuming at step {steps_done} of {data.course.steps}{aside}")
    # else it was killed between its last step and the hand-off; shards are read when the ranks are there
    if steps_done < data.course.steps or (saved and saved["shards"]):
        loader = train_loader(
            planner, data.corpora, data.chat, data.course.steps, rank=trainer.global_rank, world=trainer.world_size,
            workers=hardware.workers, prefetch=hardware.prefetch, without=without,
        )  # fmt: skip
        assert isinstance(loader.dataset, Loading)
        module.data_at = partial(loader.dataset.notes.where, corpora=data.corpora)
        del saved
        with stoppable(ranks.stop, voting=True), module.writer:
            try:
                trainer.fit(module, loader)
            except Exception as error:
                if (explained := in_words(error, module)) is error:
                    raise
                raise explained from error
        module.restore_rest()  # where no step was left to train
    if ranks.first:
        record = {
            "stage": stage.name, "name": order.name, "scale": order.scale, "steps": module.done,
            "parents": inputs["parents"], "plan": planner.fingerprint(),
            "git_commit": git_commit(), "config_hash": config.fingerprint(stage), "midasheng": __version__,
            "torch": str(torch.__version__), "trained": list(stage.train), "lora": list(stage.lora.targets),
            "tokenizer": data.chat.fingerprint(), "skipped": module.ledger.summary(),
            "steps_skipped": module.skips.total, "seconds": round(module.seconds, 1),
        }  # fmt: skip
        with checkpoint.handing_off(folder / "weights"), sharded.gathering(weights.handed_off(model)) as gather:
            weights.hand_off(
                model, folder / "weights", record, plan, start_digests=module.start_digests,
                token_ids=data.chat.token_ids, save_tokenizer=data.chat.save, gather=gather,
            )  # fmt: skip
        add_event(folder, {"step": module.done, "event": "handed off"})
        print("\n".join([*ending(folder), f"skipped: {module.ledger.summary()}; weights in {folder / 'weights'}"]))
        if stage.data.probe:
            print(probe.of_runs([folder], *probe.read_tasks(Path(stage.data.probe), Path(stage.data.root))))
    elif kind == FSDP:
        for tensor in weights.handed_off(model):
            sharded.gather(tensor)


def restart_plan(folder: Path, planner: Planner, step: int, changed: str) -> None:
    """Go on training at `step` in a new order; the ledger of the old one is put aside."""
    planner.restart(step)
    if is_first():
        aside = folder / f"ledger.until-step-{step}"
        if aside.is_dir():  # killed before its first checkpoint, and begun again
            shutil.rmtree(folder / "ledger", ignore_errors=True)
        else:
            trim(folder, step)
            os.replace(folder / "ledger", aside)
        add_event(folder, {"step": step, "event": "plan restarted", "because": changed})
        print(f"data.on_change=restart_plan: {changed}; a new order from step {step} on, the old ledger is in {aside}")


def calibrate(model: AudioLM, stage: Stage, data: DataRoom) -> None:
    """One pass for the statistics of init_bn where a fresh encoder will hear audio; a loaded one brings them."""
    fresh = adapt.matches("audio_encoder.init_bn.running_mean", stage.fresh)
    if fresh and any(c.summary.mean_frames for c in data.corpora):
        clips = first_clips(data.planner(stage.run.seed), data.corpora, CALIBRATION_CLIPS)
        model.audio_encoder.init_bn.calibrate(model.audio_encoder.log_mel(torch.from_numpy(c)) for c in clips)


class OutOfMemory(UserError, MemoryError):
    """A step did not fit."""


def in_words(error: Exception, module: StageModule) -> Exception:
    """An error of a machine as one that says what to do; any other as it is."""
    text, goes_on, step = str(error), "the same command goes on from the last checkpoint", module.done
    if isinstance(error, UserError):
        return error
    if full := checkpoint.full_disk(error):
        return module.writer.no_room(full)
    if isinstance(error, memory.OUT_OF_MEMORY) or "can't allocate memory" in text:
        return OutOfMemory(
            f"step {step}: out of memory ({world.last_line(error)}); {goes_on}, with less of it: "
            "hardware.recompute=[audio_encoder,decoder], more devices, fewer hardware.workers"
        )
    if "DataLoader worker" in text and ("killed by signal" in text or "exited unexpectedly" in text):
        return UserError(
            f"step {step}: a loader process was killed ({text.splitlines()[0]}), most often for want of memory; "
            f"{goes_on}, hardware.workers may be lower"
        )
    return error


def tell(module: StageModule, event: dict[str, Any]) -> None:
    """A row of events.jsonl at the last checkpoint, where a resume begins: it keeps what stands there."""
    saved = module.saved_steps if is_first() else checkpoint.step_there(module.run)
    add_event(module.run, {"step": saved, "at_step": module.done} | event)


def tell_of_the_dead(folder: Path, rank: int, text: str) -> None:
    """From the launcher, once all processes have ended and none has said why; how far they were, none can say."""
    print(f"error: rank {rank}: {text}", file=sys.stderr)
    if (folder / "config.yaml").is_file():
        saved = checkpoint.step_there(folder)
        row = {"step": saved, "at_step": saved, "rank": rank, "error": f"rank {rank}: {text}"}
        with suppress(OSError):
            add_event(folder, {"event": "failed"} | row)


class Fails(L.Callback):
    """Says an error to the other ranks before anything is torn down, where it might hang."""

    def __init__(self, ranks: World) -> None:
        self.ranks = ranks

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """A stop is none: all ranks have voted for it."""
        assert isinstance(pl_module, StageModule)
        if isinstance(exception, Exception):
            explained = in_words(exception, pl_module)
            self.ranks.fail(world.last_line(explained), of_a_collective=world.broken_collective(exception))


def run_stage(
    default: str, contract: Callable[[Stage], None], argv: Sequence[str] | None = None,
    prepare: Callable[[], list[str]] | None = None,
) -> int:  # fmt: skip
    """A stage's whole main. `prepare`: done first by one process; the settings that it gives are those of all.

    Exit status: 2 with one clear line for mistakes of the user, 130 for Ctrl-C, 75 for a stop that SIGTERM or SIGUSR1
    asked for, 1 where another process failed. Where the config asks for several processes and no launcher has started
    them, they are started here.
    """
    ranks, status = World(), 1
    try:
        with stoppable(ranks.stop):
            order = command_line(default, argv)
            contract(order.stage)
            hardware = order.stage.hardware
            if hardware.devices * hardware.nodes > 1 and world.launched() is None:
                if hardware.nodes > 1:
                    raise UserError(
                        f"hardware.nodes={hardware.nodes}: give the same command on every node, with "
                        f"NODES={hardware.nodes} GPUS={hardware.devices} NODE_RANK=0 (1, 2, ...) "
                        "MASTER_ADDR=first-node, or `make submit`"
                    )
                config.check_start(order.stage)
                open_starts(order)  # once, before so many processes do: a mistake is said at once, a hub asked once
                status = world.start_here(hardware.devices, partial(tell_of_the_dead, order.folder))
                return status
            ranks = world.join(ranks.stop)
            ranks.begin()
            if prepare:
                rest = sys.argv[1:] if argv is None else argv
                order = command_line(default, [*ranks.of_first("the data", prepare), *rest])
            fit(order, ranks)
            ranks.of_first("the end", lambda: None)
        status = 0
    except Elsewhere:
        pass
    except UserError as error:
        status = 2
        ranks.fail(world.last_line(error))
        if ranks.size == 1:
            print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        status = world.INTERRUPTED
        ranks.fail("interrupted outside a step")
        if ranks.first:
            print("interrupted outside a step; the same command goes on, or begins again", file=sys.stderr)
    except Stopped as stopped:
        status = world.PREEMPTED if stopped.preempted else world.INTERRUPTED
        if not stopped.voted:
            ranks.fail("a signal stopped it outside of training")
        else:
            if ranks.first:
                saved = order.folder / "checkpoints" / checkpoint.LAST
                print(f"stopped; {saved} holds everything: the same command goes on from there")
            with suppress(Elsewhere):  # a launcher that sees one process end may end rank 0, which writes
                ranks.of_first("the end", lambda: None)
    except BaseException as error:
        ranks.fail(world.last_line(error), of_a_collective=world.broken_collective(error))
        if ranks.size == 1:
            raise
        if ranks.guilty in (-1, ranks.rank):
            traceback.print_exception(error)
    finally:
        ranks.leave(status)
    return status
