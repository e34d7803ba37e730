"""The steps of a run, and what is done between them: log, test, write, stop."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import distribute_bn
from torch import Tensor, nn

from spherify.train.checkpoint import has_checkpoint, write_checkpoint
from spherify.train.conduct import Conduct, Fitted
from spherify.train.display import display_for
from spherify.train.evaluate import Evaluation, evaluate
from spherify.train.health import NotFiniteError, first_non_finite, has_finite_weights, is_finite
from spherify.train.history import History, Row
from spherify.train.interrupt import StopWish, noting_signals
from spherify.train.loaders import Loaders
from spherify.train.meter import Meter
from spherify.train.objective import total_loss
from spherify.train.order import Batch
from spherify.train.prefetch import prefetched
from spherify.train.random_state import take_down
from spherify.train.run import Run

STEPS_BETWEEN_CHECKS = 10  # of several processes' wishes to stop, and of a loss on a GPU: each check waits for it


class Loop:
    """The steps of a run, and what is done between them."""

    def __init__(
        self,
        run: Run,
        loaders: Loaders,
        conduct: Conduct,
        folder: Path | None,
        on_step: Sequence[Callable[[int, int], None]],
        rows: list[Row],
        notes: list[str],
    ) -> None:
        self.run, self.loaders, self.conduct, self.folder, self.on_step = run, loaders, conduct, folder, on_step
        self.accelerator, self.recipe = run.accelerator, run.recipe
        self.is_main = self.accelerator.is_main_process
        self.history = History(folder if self.is_main else None, rows, tensorboard=conduct.tensorboard)
        self.display = display_for(run.total, run.step, quiet=conduct.quiet or not self.is_main)
        self.notes, self.wish = notes, StopWish()
        self.meter = Meter()
        self.start = time.monotonic() - (self.history.last("seconds") or 0.0)
        self.written_at, self.written_step = time.monotonic(), run.step
        self.evaluation: Evaluation | None = None

    def to_the_end(self) -> Fitted:
        run = self.run
        with noting_signals() as self.wish, self.display, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Grad strides do not match")  # DDP, of depthwise weights; harmless
            for note in self.notes:
                self.display.say(note)
            if run.step and run.step % run.updates == 0 and run.tested != run.step:
                self.test_and_write()  # stopped between an epoch and its test
            while run.step < run.total and not self.is_stopping():
                for batches in self.steps_of_epoch():
                    self.one_step(batches)
                    if self.after_step():
                        break
            is_whole = run.step == run.total and run.tested == run.step
            stopped_by = None if is_whole else self.wish.name or "another process"
            self.end(stopped_by)
            if is_whole and self.evaluation is None:
                self.tested()  # the run was whole already when it was resumed
        return Fitted(
            model=run.model if run.average is None else run.average.module,
            rows=self.history.rows,
            step=run.step,
            stopped_by=stopped_by,
            evaluation=self.evaluation,
        )

    def steps_of_epoch(self) -> Iterator[list[Batch]]:
        """The batches of one step after the other, from where the run stands to the end of its epoch."""
        size = self.recipe.grad_accum_steps
        first = self.run.step % self.run.updates
        source = prefetched(
            batches_from(self.loaders.train, self.run.epoch, first * size),
            self.accelerator.device,
            channels_last=self.recipe.channels_last,
        )
        for _ in range(first, min(self.run.updates, first + self.run.total - self.run.step)):
            yield [next(source) for _ in range(size)]

    def one_step(self, batches: list[Batch]) -> None:
        run, recipe = self.run, self.recipe
        for callback in self.on_step:
            callback(run.step, run.total)
        if run.mixup is not None:
            run.mixup.mixup_enabled = not 0 < recipe.mixup_off_epoch <= run.epoch
        for images, labels in batches:
            inputs, targets = (images, labels) if run.mixup is None else run.mixup(images, labels)
            with self.accelerator.accumulate(run.wrapped):
                if run.sees is not None:
                    run.sees(inputs)
                outputs = run.wrapped(inputs)
                loss = total_loss(run.objective(outputs, targets), run.penalty)
                self.check(loss, inputs)
                self.accelerator.backward(loss)
                if recipe.clip_grad is not None and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(run.wrapped.parameters(), recipe.clip_grad)
                run.optimizer.step()
                run.optimizer.zero_grad()
            classes = getattr(run.objective, "num_classes", None)
            self.meter.add(loss, outputs, labels if targets is labels else None, len(labels), classes)
        run.step += 1
        if run.scheduler is not None:
            run.scheduler.step_update(run.step)
        if run.moves_on is not None:
            run.moves_on()
        if run.average is not None:
            run.average.update(run.model, step=run.step)

    def check(self, loss: Tensor, inputs: Tensor) -> None:
        """Stop at a loss that is no number; on a GPU only now and then, since to ask is to wait."""
        is_due = loss.device.type == "cpu" or self.run.step % STEPS_BETWEEN_CHECKS == 0
        if is_due and not is_finite(loss):
            self.stop_at_non_finite(loss, inputs)

    def stop_at_non_finite(self, loss: Tensor, inputs: Tensor) -> None:
        layer = first_non_finite(self.run.model, inputs)
        where = f"{layer} is the first layer with an output that is not finite" if layer else "every layer is finite"
        kept = "no checkpoint was written yet"
        if self.folder is not None and has_checkpoint(self.folder):
            kept = f"the last good checkpoint in {self.folder} is kept"
        raise NotFiniteError(
            f"the loss is {float(loss.detach())} at step {self.run.step}: {where}; {kept}. "
            "Try a lower --lr, or --clip-grad 1."
        )

    def after_step(self) -> bool:
        """Log, test, write; true where the epoch is over or somebody wishes to stop."""
        run = self.run
        is_epoch_over = run.step % run.updates == 0 or run.step == run.total
        if run.step % self.conduct.log_interval == 0 and not is_epoch_over:
            self.log({})
        self.show()
        if is_epoch_over:
            is_test_due = run.step == run.total or run.epoch % self.conduct.val_interval == 0
            if is_test_due and not self.is_stopping():
                self.test_and_write()
            elif self.is_checkpoint_due():
                self.write()
            return True
        if self.is_checkpoint_due():
            self.write()
        return self.is_stopping()

    def show(self) -> None:
        if time.monotonic() - self.meter.shown_at > 0.2:
            self.meter.shown_at = time.monotonic()
            self.display.step(self.run.step, self.meter.recent_loss(), self.run.lr, self.meter.speed(self.world))

    @property
    def world(self) -> int:
        return int(self.accelerator.num_processes)

    def log(self, tested: Row) -> None:
        """A row of the log: what was measured since the row before, over all processes."""
        run = self.run
        row: Row = {"step": run.step, "epoch": round(run.step / run.updates, 4), "lr": run.lr}
        row |= self.meter.means(self.accelerator)
        self.meter = Meter()
        row |= {**tested, "seconds": round(time.monotonic() - self.start, 2)}
        self.history.add(row)
        self.display.row(row)

    def test_and_write(self) -> None:
        """Test the model, and the average where there is one; log it; write a checkpoint."""
        tested = self.tested()
        if tested is None:
            return  # stopped while testing; the checkpoint is written at the end
        self.run.tested = self.run.step
        self.log(tested)
        self.meter = Meter()  # the time of the test is not that of training
        self.write()

    def tested(self) -> Row | None:
        run = self.run
        if self.loaders.test is None:
            return {}
        if self.world > 1:  # BatchNorm statistics of the other processes are their own
            distribute_bn(run.model, self.world, reduce=False)
        now = self.evaluated(run.model)
        if now is None:
            return None
        row: Row = {"test_loss": now.loss, "test_top1": now.top1, "test_top5": now.top5}
        self.evaluation = now
        if run.average is not None:
            if self.world > 1:
                distribute_bn(run.average.module, self.world, reduce=False)
            average = self.evaluated(run.average.module)
            if average is None:
                return None
            self.evaluation = average
            row["average_top1"] = average.top1
        return row

    def evaluated(self, model: nn.Module) -> Evaluation | None:
        assert self.loaders.test is not None
        return evaluate(
            model,
            self.loaders.test,
            classes=self.loaders.classes,
            device=self.accelerator.device,
            channels_last=self.recipe.channels_last,
            autocast=self.accelerator.autocast,
            is_stopped=lambda: self.world == 1 and self.wish.is_asked,  # several must end together
        )

    def is_stopping(self) -> bool:
        """Whether somebody asked this process, or one of several, to stop; all of them answer alike."""
        if self.world == 1:
            return self.wish.is_asked
        return self.agreed(self.wish.is_asked) if self.run.step % STEPS_BETWEEN_CHECKS == 0 else False

    def is_checkpoint_due(self) -> bool:
        every = self.conduct.checkpoint_steps
        if every is not None and self.run.step % every == 0:
            return True
        is_late = time.monotonic() - self.written_at > 60 * self.conduct.checkpoint_minutes
        if self.world == 1:
            return is_late
        return self.run.step % STEPS_BETWEEN_CHECKS == 0 and self.agreed(is_late)

    def agreed(self, wish: bool) -> bool:
        """Whether any process wishes it."""
        votes = torch.tensor(int(wish), device=self.accelerator.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes.item())

    def write(self) -> None:
        """Write a checkpoint, in the main process; not of weights that are not finite."""
        self.written_at, self.written_step = time.monotonic(), self.run.step
        if self.folder is None:
            return
        states = [take_down()]
        if self.world > 1:
            gathered: list[Any] = [None] * self.world
            dist.all_gather_object(gathered, states[0])
            states = gathered
        if not self.is_main:
            return
        if not has_finite_weights(self.run.model):
            raise NotFiniteError(
                f"weights are not finite at step {self.run.step}; the last good checkpoint in {self.folder} is kept."
            )
        write_checkpoint(self.folder, self.run.taken_down(self.history.rows, states))

    def end(self, stopped_by: str | None) -> None:
        if self.folder is not None and self.written_step != self.run.step:
            self.write()
        self.history.close()
        if stopped_by:
            place = f"; go on with --resume auto (folder {self.folder})" if self.folder is not None else ""
            self.display.say(f"Stopped by {stopped_by} after step {self.run.step} of {self.run.total}{place}.")


def batches_from(train: Any, epoch: int, first: int) -> Iterator[Batch]:
    """The batches of an epoch from one on; a loader that cannot begin in the middle is run through up to there."""
    if hasattr(train, "batches"):
        yield from train.batches(epoch, first)
        return
    for holder in (train, getattr(train, "sampler", None)):
        set_epoch = getattr(holder, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
    for number, batch in enumerate(train):
        if number >= first:
            yield batch
