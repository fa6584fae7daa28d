"""The one way to run a stage: check everything, then write, train, hand off."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from midasheng import __version__, config
from midasheng.config import AUTO, DDP, FSDP, ConfigError, Stage, UserError
from midasheng.data.index import CorpusIndex
from midasheng.data.ledger import Ledger, Skipped, drop_after, trim
from midasheng.data.loader import first_clips, keep_freed_memory, train_loader
from midasheng.data.plan import Planner, differences
from midasheng.data.quarantine import FILE, quarantined, records
from midasheng.data.room import DataRoom, open_data, plan_data
from midasheng.evaluate import probe
from midasheng.model import adapt, attention, kernels, loss, weights
from midasheng.model.audio_lm import AudioLM
from midasheng.model.decoder import with_vocabulary
from midasheng.model.encoder import EncoderShape
from midasheng.model.sources import WeightsError, check_learned, check_stage, open_source
from midasheng.sample import counter_seed
from midasheng.train import checkpoint, memory, optim, sharded, trackers
from midasheng.train.listening import LONGEST, ListeningTest
from midasheng.train.meter import add_event
from midasheng.train.module import StageModule, Stopped, StopRequest
from midasheng.train.order import Order, check_run_folder, command_line, is_first
from midasheng.train.progress import ProgressLine, ending, stoppable

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
    stage = order.stage
    e, d = stage.model.encoder, stage.model.decoder
    torch.manual_seed(counter_seed(stage.run.seed, "fresh", stage.name) % 2**63)
    shape = EncoderShape(e.dim, e.depth, e.heads)
    fields = with_vocabulary(d.architecture, d.fields, added.stop) if added else d.fields
    model = AudioLM(shape, d.architecture, fields, weights.loaded_parts(starts, stage.fresh))
    adapt.freeze_all_but(model, stage.train)
    origins = weights.load(
        model, starts, stage.fresh, merge_lora=stage.lora.inherit == "merge", precision=stage.run.precision,
        added=added,
    )  # fmt: skip
    plan, adapted = None, {}
    if stage.lora.targets:
        plan = adapt.LoraPlan(tuple(stage.lora.targets), stage.lora.rank, stage.lora.alpha, stage.lora.dropout)
        adapted = adapt.add_lora(model, plan, counter_seed(stage.run.seed, "lora", stage.name) % 2**63)
    carried = 0
    if stage.lora.inherit == "carry":
        whole = [s for s in starts if adapt.matches("decoder.model.layers.0.self_attn.q_proj.weight", s.take)]
        carried = sum(weights.carry_lora(model, s.source, plan) for s in whole)
    model.decoder.learn_rows(added)
    optim.groups(model.named_parameters(), stage.optim)  # so that a wrong lr_for is an error before anything is written
    model.recompute(stage.hardware.recompute)
    if stage.hardware.liger:
        kernels.fuse(model.decoder.model)
    if stage.hardware.compile:
        model.compile_blocks()
    adapt.set_precision(model, stage.run.precision)
    empty = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    assert not empty, f"{len(empty)} tensors have no memory, the first {empty[0]}"
    table = adapt.learns(model, stage.train, adapted, stage.lora.rank).table(stage.optim.name == "adamw8bit")
    lines = [f"{'origin':34}{'part':>18}{'tensors':>8}"] + [f"{o:34}{p:>18}{n:8}" for o, p, n in origins]
    lines += [f"{s.source.where}: {s.source.note}" for s in starts if s.source.note]
    if carried:
        lines.append(f"LoRA of {carried} layers carried over, the others fresh")
    return model, "\n".join(lines) + "\n\n" + table + "\n", plan


def measurable(order: Order, starts: Sequence[weights.Start], added: range) -> AudioLM:
    """The model, to try packs with on one device before step 0. Raises ConfigError where ranks will share it."""
    model = build(order, starts, added)[0]
    if sharded.chosen(order.stage.hardware, model) == FSDP:
        raise ConfigError(
            f"batch.pack_slots={AUTO}: packs are tried on one device, and here ranks share the model (fsdp); write a "
            "number, as `make forecast` proposes it"
        )
    return model


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


def fit(order: Order) -> None:
    """Run one stage to its end or to a stop. Nothing is written before every check has passed.

    Raises UserError for mistakes of the user, Stopped after Ctrl-C (a checkpoint is there then).
    """
    folder, first = order.folder, is_first()
    config.check_start(order.stage)
    trackers.check(order.stage.log.trackers)
    kernels = verified(order.stage)  # first: memory is measured with them
    if order.stage.hardware.threads:
        torch.set_num_threads(order.stage.hardware.threads)
    keep_freed_memory()  # what a step computes is as large as what the last one freed
    starts = open_starts(order)  # before data: an index of many shards takes long
    sources = open_data(order.stage, make=first)
    for start in starts:
        weights.check_tokenizer(start, sources.chat.fingerprint())
    order = memory.pack_slots(order, sources, lambda: measurable(order, starts, sources.chat.added))
    stage = order.stage
    data = plan_data(stage, sources)
    planner = data.planner(stage.run.seed)
    inputs = {"plan": planner.fingerprint(), "parents": parents_of(starts)}
    state = "new" if order.fresh else check_run_folder(order, inputs)
    without = records([] if order.fresh else quarantined(folder), data.corpora)
    if state == "finished":
        print(f"{folder} is finished (NAME=... for another run, FRESH=1 to train it again)")
        return
    model, table, plan = build(order, starts, sources.chat.added)
    kind = sharded.chosen(stage.hardware, model)
    measured = [] if kind == FSDP else memory.check(order, model, sources, data.budget)
    lines = [*sharded.lines(kind, stage.hardware), *measured, checkpoint.check_room(folder, model, stage)]
    text = header(order, data, kernels, lines) + "\n" + table
    if stage.data.probe:  # so that a mistake in it is found now
        try:
            probe.read_tasks(Path(stage.data.probe), Path(stage.data.root))
        except UserError as error:
            raise ConfigError(f"data.probe: {error}; or write data.probe='' for none") from None
    if first:
        print(text)
        if order.fresh:
            shutil.rmtree(folder, ignore_errors=True)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "trainable.txt").write_text(text, encoding="utf-8")
        (folder / "inputs.json").write_text(json.dumps(inputs, indent=2) + "\n", encoding="utf-8")
        # last: from here on the folder is a run
        (folder / "config.yaml").write_text(order.loaded.yaml(), encoding="utf-8")
    train(order, data, planner, model, plan, inputs, without)


def train(
    order: Order, data: DataRoom, planner: Planner, model: AudioLM, plan: adapt.LoraPlan | None, inputs: dict[str, Any],
    without: Set[tuple[int, int]] = frozenset(),
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
    stop = StopRequest()
    module = StageModule(
        model, stage, data.course, [c.card for c in data.corpora],
        ListeningTest(data.held_out, folder, stage.data.answers, stage.log.answers), folder, stop, saved,
    )  # fmt: skip
    told: list[Logger] = []
    if is_first():
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
        callbacks=[ProgressLine()] if stage.log.progress else [],
        logger=[TensorBoardLogger(folder, name="", version="tensorboard"), *told],
    )  # fmt: skip
    steps_done = saved["step"] if saved else 0
    if is_first():
        trim(folder, steps_done if saved else -1)
        drop_after(folder / "events.jsonl", steps_done + 1 if saved else -1)
        if not saved:  # killed before its first checkpoint
            for name in ("metrics.jsonl", "speed.jsonl", "answers.jsonl"):
                (folder / name).unlink(missing_ok=True)
    module.planner = planner
    module.ledger = Ledger(folder, trainer.global_rank, [c.card.name for c in data.corpora])
    for corpus in data.corpora:
        writes = trainer.global_rank == 0 and not saved
        left_out = [Skipped(corpus.card.name, *s) for s in corpus.skipped()] if writes else []
        module.ledger.indexed(corpus.card.name, len(corpus), corpus.summary.reasons, left_out)
    if is_first():
        begins = {"step": steps_done, "event": "resume" if saved else "start", "world": trainer.world_size}
        add_event(folder, begins | ({"world_before": saved.get("world")} if saved else {}))
    if saved and is_first():
        aside = f"; {len(without)} samples are in {folder / FILE}" if without else ""
        print(f"resuming at step {steps_done} of {data.course.steps}{aside}")
    # else it was killed between its last step and the hand-off; shards are read when the ranks are there
    if steps_done < data.course.steps or (saved and saved["shards"]):
        loader = train_loader(
            planner, data.corpora, data.chat, data.course.steps, rank=trainer.global_rank, world=trainer.world_size,
            workers=hardware.workers, prefetch=hardware.prefetch, without=without,
        )  # fmt: skip
        del saved
        with stoppable(stop), module.writer:
            trainer.fit(module, loader)
        module.restore_rest()  # where no step was left to train
    if trainer.is_global_zero:
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


def run_stage(default: str, contract: Callable[[Stage], None], argv: Sequence[str] | None = None) -> int:
    """A stage's whole main: mistakes of the user end in one clear line and exit status 2, a stop in 130."""
    try:
        order = command_line(default, argv)
        contract(order.stage)
        fit(order)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted outside a step; the same command goes on, or begins again", file=sys.stderr)
        return 130
    except Stopped:
        if is_first():
            saved = order.folder / "checkpoints" / checkpoint.LAST
            print(f"stopped; {saved} holds everything: the same command goes on from there")
        return 130
    return 0
