"""The one LightningModule: a batch is a rank's packs of one step; manual optimisation over them."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from midasheng.config import Stage
from midasheng.data.ledger import Ledger
from midasheng.data.loader import StepBatch, steps_ahead
from midasheng.data.manifest import Card, MixFile
from midasheng.data.plan import Planner
from midasheng.data.room import Course
from midasheng.model import adapt
from midasheng.model.audio_lm import AudioLM
from midasheng.model.flops import cost, peak
from midasheng.model.sources import part_digests
from midasheng.sample import counter_seed
from midasheng.train import checkpoint, shard_files, sharded
from midasheng.train.listening import ListeningTest
from midasheng.train.meter import Meter, MetricsFile, Speed, add_event, by_group, memory_gib
from midasheng.train.optim import clip, learning_rate, optimizer
from midasheng.train.skips import NotFinite, Skips, references
from midasheng.train.world import ASKED_BY_MACHINE, Stopped, StopRequest, Waiting, is_first


class Read(NamedTuple):
    """What the host learns of a step, all at once: losses of the segments of this rank's packs; and the same on all
    ranks: the gradient's norm, whether it and all losses are finite, how many want to stop, the sum of plan digests,
    how many have written their shards of a checkpoint, how many could not write one."""

    losses: list[Tensor]
    norm: float
    finite: bool
    stop: float
    digests: float
    written: float
    unwritten: float


class StageModule(L.LightningModule):
    """Trains AudioLM for one stage.

    `done` counts finished steps; it, the plan's state and the sums since the last row travel in the checkpoint
    (train/checkpoint.py), which is ours and not Lightning's: a resume is a new fit whose loader begins at step `done`,
    so none of Lightning's restart rules can repeat or skip a batch.
    """

    def __init__(
        self, model: AudioLM, stage: Stage, course: Course, cards: Sequence[Card], test: ListeningTest,
        run: Path, stop: StopRequest, saved: dict[str, Any] | None,
    ) -> None:  # fmt: skip
        """`cards`: of the corpora, in the order of the mix. `saved`: the checkpoint that the run goes on from."""
        super().__init__()
        corpora = [card.name for card in cards]
        self.automatic_optimization = False
        self.model = model
        self.stage, self.course, self.run = stage, course, run
        self.test, self.stop = test, stop
        self.meter = Meter(corpora, sorted({language for card in cards for language in card.languages}))
        self.tasks, self.skips = {card.name: card.task for card in cards}, Skips(stage.optim)
        self.done, self.saved_steps = 0, 0  # finished steps; those that the last checkpoint of this process holds
        self.began, self.seconds = time.monotonic(), 0.0  # training up to the last checkpoint, over all resumes
        self.plan_state: dict[str, Any] = {}
        self.planner: Planner | None = None
        self.mix_file = MixFile(run / "mix.yaml", corpora)
        self.shown: dict[str, float] = {}  # for the progress line
        self.ledger: Ledger | None = None
        self.best: dict[str, float] | None = None  # step and val_loss of the lowest validation loss
        self.data_at: Callable[[int], str] = lambda step: "?"  # which record holds the data of a step up
        self.left: float | None = None  # when the training thread went to fetch the next batch
        self.base = checkpoint.base_digests(model)
        self.optimizer_saved: dict[str, Any] | None = None  # until the optimizer is there
        if saved is None:
            self.start_digests = part_digests(adapt.base_state(model))
        else:
            self._go_on(saved)
        files = ("metrics.jsonl", "speed.jsonl", "answers.jsonl", "events.jsonl", "skipped.jsonl")
        beside = [run / name for name in files]
        self.writer = checkpoint.Writer(run / "checkpoints", beside, self.done if saved else None)

    # -- Lightning's hooks ------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Share the model among the ranks where the strategy is FSDP2."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy) and not sharded.groups(self.model):
            sharded.shard(self.model, strategy.root_device.type, self.stage.hardware.shard)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over what learns."""
        return optimizer(self.model.named_parameters(), self.stage.optim)

    def on_train_start(self) -> None:
        """Open the files; validate at step 0."""
        rank = self.trainer.global_rank
        assert self.planner is not None
        self.restore_rest()
        wrapper = self.trainer.strategy.model
        if isinstance(wrapper, DistributedDataParallel):
            checkpoint.settle_buckets(wrapper)
        self.mix_file.follow(self.planner.changes())
        self.metrics = MetricsFile(self.run / "metrics.jsonl", self.done, write=rank == 0)
        self.speeds = MetricsFile(self.run / "speed.jsonl", self.done, write=rank == 0)
        self.answers = MetricsFile(self.run / "answers.jsonl", self.done, write=rank == 0)
        assert self.ledger is not None
        self.model.train()
        at, how = peak(self.device, self.model.compute_dtype or torch.float32)
        self.speeds.add({"step": self.done, "peak_flops_per_s": at, "peak": how})
        self.speed = Speed(cost(self.model), at, self.trainer.world_size)
        if self.done == 0:
            self.model.eval()
            with sharded.whole(self.model):
                self.test.before(self.model, *self._world())
            self._validate(ends=True)
        self.left = time.monotonic()

    def on_train_end(self) -> None:
        """The last checkpoint is in place before the hand-off."""
        self.writer.wait()

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        """One optimizer step over this rank's packs. The loss is the sum of token losses over the targets of the whole
        global step: actual counts, summed before the first backward and left on the device until its end."""
        assert self.ledger is not None
        assert batch.step == self.done, f"step {self.done} expected, the loader brought {batch.step}"
        assert self.left is not None
        self.speed.waited(time.monotonic() - self.left)
        self.left = None
        self.ledger.reachable(batch.trained, batch.skipped)
        world, digest = self.trainer.world_size, float(batch.state_after["digest"])
        counts = [sum(sum(p.targets) for p in batch.packs), self.stop.requested, digest, *self.writer.votes]
        sums_5 = self._reduced(torch.tensor(counts, dtype=torch.float64, device=self.device))
        # DDP takes the mean over ranks: x world makes it the sum
        scale = world / sums_5[0].clamp(min=1)
        adam = self.optimizers()
        assert isinstance(adam, LightningOptimizer)
        rate = learning_rate(self.done, self.course.steps, self.course.warmup, self.stage.optim.final_lr)
        for group in adam.param_groups:
            group["lr"] = group["peak_lr"] * rate
        adam.zero_grad()
        losses = []
        for number, pack in zip(batch.numbers, batch.packs, strict=True):
            torch.manual_seed(counter_seed(self.stage.run.seed, "dropout", self.stage.name, batch.step, number))
            with self._gradients_stay_here(unless=number == batch.numbers[-1]):
                loss_S = self.model(pack)
                self.manual_backward(loss_S.sum() * scale)
            losses.append(loss_S.detach())
        norm = clip(self.model.parameters(), self.stage.optim.clip_norm, self.shards)
        read = self._read(losses, norm, sums_5)
        if read.digests != world * digest:  # CRC32: its multiples are exact in float64
            raise AssertionError(
                f"step {batch.step}: rank {self.trainer.global_rank} trains on another plan than others"
            )
        for pack in batch.packs:
            self.speed.add(pack)
        if because := self.skips.because(finite=read.finite, norm=read.norm):
            batch = self._not_taken(batch, read, because)
        else:
            adam.step()
            for pack, loss_S in zip(batch.packs, read.losses, strict=True):
                self.meter.add(pack, loss_S)
        self.done, self.plan_state = batch.step + 1, batch.state_after
        self.writer.count(read.written, read.unwritten)
        self._after_step(batch, read.norm, self.stage.optim.lr * rate, read.stop)
        self.left = time.monotonic()

    def waits(self) -> Waiting | None:
        """For the watch: what the training thread waits for, a batch or a held-out record."""
        if (left := self.left) is not None and self.done < self.course.steps:
            return Waiting(f"the data of step {self.done}", left, lambda: self.data_at(self.done))
        for asked in self.test.sets:
            if (reading := asked.reading) is not None:
                return Waiting("a held-out record", reading[1], partial(str, reading[0]))
        return None

    # -- inside a step ----------------------------------------------------------------------------------------------

    def _gradients_stay_here(self, *, unless: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are reduced only with the last pack of a step."""
        sharded.sync(self.model, unless)
        wrapper = self.trainer.strategy.model
        if unless or not isinstance(wrapper, DistributedDataParallel):
            return contextlib.nullcontext()
        return wrapper.no_sync()

    def _reduced(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place, where the tensor lies."""
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return tensor
        return self._reduced(tensor.to(self.device, copy=True)).cpu()

    def _read(self, losses: Sequence[Tensor], norm: Tensor, sums_5: Tensor) -> Read:
        """Losses, gradient norm and sums over the ranks, read from the device at once: until here the host waited for
        nothing. Whether a step is taken hangs on what is summed over the ranks here: a loss that is infinite on one of
        them may have a gradient that is finite on all."""
        good = torch.stack([norm.isfinite(), *(loss_S.isfinite().all() for loss_S in losses)]).all()
        verdict_2 = self._reduced(torch.stack([norm.double(), (~good).double()]))
        found = torch.cat([*losses, verdict_2, sums_5[1:]]).cpu()
        *loss_rows, sums_6 = found.split([*(len(loss_S) for loss_S in losses), 6])
        norms, bad, *others = sums_6.tolist()
        return Read(loss_rows, norms / self.trainer.world_size, bad == 0, *others)

    def _not_taken(self, batch: StepBatch, read: Read, because: str) -> StepBatch:
        """Say what the step held and go on to the next one, whose learning rate and packs are as planned. Returns the
        step as the ledger is to have it. Raises NotFinite where too many were skipped in a row."""
        skips, rank = self.skips, self.trainer.global_rank
        held = references(batch.numbers, batch.packs, [loss_S.tolist() for loss_S in read.losses])
        everywhere = sharded.of_all([{"rank": rank, **pack} for pack in held])  # all ranks are here
        packs = [pack for of_rank in everywhere for pack in of_rank]
        if rank == 0:
            why = {"number": batch.step, "because": because, "grad_norm": f"{read.norm}", "in_a_row": skips.in_a_row}
            add_event(self.run, {"step": batch.step + 1, "event": "step skipped", **why, "packs": packs})
        self.shown["skipped"] = skips.total
        if skips.too_many:
            self.writer.wait()
            wrong = [key for pack in packs for key in pack["not_finite"]]
            samples = f"the loss of {', '.join(wrong[:8])} is not finite" if wrong else "each sample's loss is finite"
            raise NotFinite(
                f"step {batch.step}: {because}, gradient norm {read.norm}; {samples}. {skips.in_a_row} steps in a row "
                f"were not taken (optim.max_skips={skips.most}). `make bisect SCALE={self.run.parent.name} "
                f"NAME={self.run.name}` says whether it is the data and which sample; then the same command goes on"
            )
        return batch.not_taken("step not taken")

    def _after_step(self, batch: StepBatch, norm: float, lr: float, stop: float) -> None:
        """Files, validation, checkpoint, stop: all between steps."""
        assert self.ledger is not None
        self.ledger.step(batch.step, batch.trained, batch.checksum, batch.skipped)
        last = self.done == self.course.steps
        log, best = self.stage.log, False
        if self.done % log.every == 0 or last:
            row = self.skips.row(self.meter.row(self._sum_over_ranks))
            self.metrics.add({"step": self.done, "loss": row["loss"], "lr": lr, "grad_norm": norm, **row})
            groups = by_group("train", row, self.tasks)
            self._log({"train/loss": row["loss"], "train/lr": lr, "train/grad_norm": norm}, groups)
            speed = self.speed.row(self._sum_over_ranks) | {"memory_gib": memory_gib(self.device)}
            self.speeds.add({"step": self.done, **speed})
            self._log({f"speed/{name}": value for name, value in speed.items()})
            self._follow_mix_file()
        if self.done % log.val_every == 0 or last:
            best = self._validate(ends=last) and log.keep_best
        if self.done % log.checkpoint_every == 0 or last or stop or best:
            self.save(best=best)
        if stop and not last:
            self.writer.wait()
            if self.trainer.global_rank == 0:
                add_event(self.run, {"step": self.done, "event": "stop"})
            raise Stopped(preempted=stop >= ASKED_BY_MACHINE, voted=True)

    def _follow_mix_file(self) -> None:
        """When the user has written mix.yaml into the run folder: draw in its shares, on all ranks from one step on."""
        assert self.planner is not None
        found = [self.mix_file.look() if self.trainer.global_rank == 0 else None]
        if self.trainer.world_size > 1:
            torch.distributed.broadcast_object_list(found)
        if found[0] is None:
            return
        from_step = self.done + steps_ahead(self.stage.hardware.workers, self.stage.hardware.prefetch)
        self.planner.change(from_step, found[0])
        if self.trainer.global_rank == 0:
            shares = dict(zip(self.meter.corpora, found[0], strict=True))
            add_event(self.run, {"step": self.done, "event": "mix", "from_step": from_step, "percent": shares})

    def _log(self, values: dict[str, float], groups: dict[str, float] | None = None) -> None:
        """Tell trackers and the progress line; `groups`: trackers alone."""
        for logger in self.loggers:
            logger.log_metrics(values | (groups or {}), step=self.done)
        too_much = ("lr", "grad_norm", "seconds", "memory_gib")  # for one line
        self.shown |= {name: v for k, v in values.items() if (name := k.split("/")[1]) not in too_much}

    def _world(self) -> tuple[int, int, Callable[[Tensor], Tensor]]:
        return self.trainer.global_rank, self.trainer.world_size, self._sum_over_ranks

    def _validate(self, *, ends: bool) -> bool:
        """Held-out loss, listening difference and answers in words; `ends`: at the start and the end of the stage, all
        that is asked. Is the loss the lowest of the run so far, the start left out?"""
        self.model.eval()
        began, last = time.monotonic(), self.done == self.course.steps
        with self.speed.paused(), sharded.whole(self.model):
            row = self.test.row(self.model, *self._world(), ends=ends)
            looked = time.monotonic()
            answers = self.test.answer(self.model, self.done, *self._world(), end=last)
            ended = time.monotonic()
        self.model.train()
        self.metrics.add({"step": self.done, **row})
        for answer in answers:
            self.answers.add(answer)
        took = {"validation_s": round(ended - began, 3), "answers_s": round(ended - looked, 3)}
        self.speeds.add({"step": self.done, **took})
        heard = {"val/listening": row["listening"]["difference"]} if row.get("listening") else {}
        values = {"val/val_loss": row["val_loss"], **heard, **{f"val/{name}": s for name, s in took.items()}}
        self._log(values, by_group("val", row, self.tasks))
        best = self.done > 0 and row["val_loss"] < (self.best["val_loss"] if self.best else math.inf)
        if best:
            self.best = {"step": self.done, "val_loss": row["val_loss"]}
        return best

    # -- checkpoints ------------------------------------------------------------------------------------------------

    @property
    def last(self) -> Path:
        """Where a run resumes from."""
        return self.run / "checkpoints" / checkpoint.LAST

    def save(self, *, best: bool = False) -> None:
        """Begin to write checkpoints/last.ckpt, and best.ckpt; the steps that follow do not wait for the disk."""
        assert self.ledger is not None
        assert self.planner is not None
        began = time.monotonic()
        self.writer.wait()
        # a change that was announced after this step was planned must not be forgotten by a resume
        self.plan_state = {**self.plan_state, "events": self.planner.changes()}
        self.ledger.flush(self.plan_state)
        sums = self._sum_over_ranks(self.meter.sums)  # behind it all ranks' ledgers are on the disk
        self.seconds, self.began = self.seconds + began - self.began, began
        shared, optimizer = self.shards is not None, self._optimizer()
        mine = shard_files.mine(self.model, optimizer) if shared else None
        content: dict[str, Any] = {
            "format": checkpoint.FORMAT, "step": self.done, "plan": self.plan_state, "sums": sums,
            "corpora": list(self.meter.corpora), "languages": list(self.meter.languages),
            "seconds": self.seconds, "world": self.trainer.world_size,
            "start_digests": self.start_digests, "base": self.base, "best": self.best,
            "skips": self.skips.state(), "shards": {},
        }  # fmt: skip
        event = {"step": self.done, "event": "checkpoint", "best": best}
        if self.trainer.global_rank == 0:
            content["learned"] = checkpoint.learned(self.model, parameters=not shared)
            content["optimizer"] = {} if shared else checkpoint.optimizer_state(self.model, optimizer)
            content = checkpoint.copied(content)
        waited = round(time.monotonic() - began, 3)

        def written(size: int) -> None:
            seconds, self.saved_steps = round(time.monotonic() - began, 3), content["step"]
            add_event(self.run, event | {"seconds": seconds, "waited": waited, "bytes": size})
            shard_files.forget(self.last.parent)

        names = [checkpoint.LAST, *([checkpoint.BEST] if best else [])]
        if shared:
            self.writer.write_shards(mine, content, names, written)
        elif self.trainer.global_rank == 0:
            self.writer.write(content, names, written)

    def _go_on(self, saved: dict[str, Any]) -> None:
        """Take back what a checkpoint holds, but for the optimizer, which Lightning makes later, and shards."""
        checkpoint.restore(self.model, saved, self.last, shards=False)
        self.optimizer_saved = saved
        self.done, self.plan_state, self.start_digests = saved["step"], saved["plan"], saved["start_digests"]
        self.saved_steps, self.seconds, self.best = self.done, saved["seconds"], saved["best"]
        self.skips.restore(saved["skips"])
        # the sums were reduced: one rank carries them on; with other corpora (a restarted plan) they begin again
        if is_first() and saved["corpora"] == list(self.meter.corpora):
            self.meter.go_on(saved["sums"], saved.get("languages", ()))

    def restore_rest(self) -> None:
        """Take back what could not be read before the optimizer was there, and ranks shared the model; once."""
        self.shards = sharded.shards_group(self.model)
        saved, self.optimizer_saved = self.optimizer_saved, None
        if saved is None:
            return
        if saved["shards"]:
            pieces = checkpoint.shards_of(saved, self.last, verify=True)
            shard_files.restore(self.model, self._optimizer(), pieces)
        elif self.shards is not None:
            states = {name: dict(checkpoint.flat(of)) for name, of in saved["optimizer"]["state"].items()}
            weights = {name: saved["learned"][name] for name, p in self.model.named_parameters() if p.requires_grad}
            pieces = shard_files.held(str(self.last), weights, states)
            shard_files.restore(self.model, self._optimizer(), pieces)
        else:
            checkpoint.restore_optimizer(self.model, self._optimizer(), saved, self.last)

    def _optimizer(self) -> torch.optim.Optimizer:
        wrapped = self.optimizers()
        assert isinstance(wrapped, LightningOptimizer)
        return wrapped.optimizer
