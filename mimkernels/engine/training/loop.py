"""The training loop: forward, backward, step, log, checkpoint. What comes before and after it is in ``run.py``."""

import contextlib
import math
import signal
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator

from mimkernels.data.batches import (
    Batch,
    BatchPlan,
    Pixels,
    PretrainImages,
    all_broken_message,
    derived_seed,
    make_loader,
)
from mimkernels.engine import files
from mimkernels.engine.checkpoint import CheckpointFolder
from mimkernels.engine.command import TrainingError
from mimkernels.engine.progress import Progress
from mimkernels.engine.schedule import learning_rate, scaled_learning_rate
from mimkernels.engine.state import state_of
from mimkernels.engine.stop import StopSignal
from mimkernels.engine.training.config import TrainingConfig
from mimkernels.engine.training.heads import FixedImages, HeadWatch
from mimkernels.engine.training.history import History
from mimkernels.engine.training.masks import Masks, TeacherTargets
from mimkernels.engine.training.method import Moment
from mimkernels.engine.training.validation import Validation, calling

BEST = "best.pth"  # in the run folder: weights of the best validation, of methods that have one
_DROPOUT, _MIX = 4, 5  # streams of the seed; the others are in data/batches.py


class Trainer:
    """One run from ``first_step`` to the end of its schedule, or to a stop request."""

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        images: PretrainImages,
        plan: BatchPlan,
        *,
        peak_lr: float,
        first_step: int,
        seconds: float,
        history: History | None,
        heads: HeadWatch,
        fixed_images: FixedImages | None = None,
        masking: Masks | None,
        features: TeacherTargets | None = None,
        validation: Validation | None = None,
        checkpoints: CheckpointFolder,
        progress: Progress,
        workers: int,
        about: dict[str, Any],
    ) -> None:
        self.config, self.accelerator, self.model, self.optimizer = config, accelerator, model, optimizer
        self.images, self.plan, self.peak_lr = images, plan, peak_lr
        self.history, self.checkpoints, self.progress, self.workers = history, checkpoints, progress, workers
        self.heads, self.masking, self.validation = heads, masking, validation
        self.fixed_images, self.features = fixed_images, features
        self.about = about  # goes into every checkpoint
        self.step = first_step
        self.total_steps = config.epochs * plan.steps_per_epoch
        self.method = config.the_method
        stages = 1 if features is None else features.stages
        self.stage_steps = self.total_steps // stages  # the learning rate begins anew after so many
        self.stage_epochs = config.epochs // stages
        warmup = self.stage_epochs * self.method.warmup_share if config.warmup_epochs is None else config.warmup_epochs
        self.warmup_steps = round(warmup * plan.steps_per_epoch)
        every = max(1.0, config.epochs / 20) if config.val_every is None else config.val_every
        self.val_steps = max(1, round(every * plan.steps_per_epoch)) if every else self.total_steps
        self.save_steps = max(1, round(config.save_every * plan.steps_per_epoch))
        self.analyze_steps = max(1, round(config.analyze_every * plan.steps_per_epoch))
        self.broken: dict[int, str] = {}
        self.seconds_before = seconds
        self.seconds_waiting = 0.0
        self.stopped_by = 0
        self._began = time.perf_counter()
        self._window: list[torch.Tensor] = []  # of every step the loss, then its metrics
        self._metrics: list[str] = []
        self._scheduled: dict[str, float] = {}
        self._validated: dict[str, float] = {}  # of the last validation
        best = [entry[self._best_name] for entry in history.entries if self._best_name in entry] if history else []
        self._best = max(best, default=-math.inf)
        self._window_began = self._began
        self._last_lr = 0.0
        self._grad_norm: torch.Tensor | float = math.nan

    @property
    def _best_name(self) -> str:
        return f"val_{self.method.best}"

    @property
    def seconds(self) -> float:
        """Wall time of the whole run, that of the sessions before included."""
        return self.seconds_before + time.perf_counter() - self._began

    def train(self) -> None:
        """Run to the end. A stop request saves a checkpoint and sets ``stopped_by`` to the signal's number."""
        loader = make_loader(
            self.images,
            self.plan,
            rank=self.accelerator.process_index,
            first_step=self.step,
            last_step=self.total_steps,
            workers=self.workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        self._plain: Any = self.accelerator.unwrap_model(self.model)
        # load_state has left the groups as the settings have them.
        self._decayed = [group for group in self.optimizer.param_groups if group["weight_decay"] > 0]
        self.model.train()
        self._began = self._window_began = time.perf_counter()
        self.progress.start(self.step)
        if self.step == 0:
            self._analyze()
        try:
            with StopSignal() as stop:
                batches = iter(loader)
                while self.step < self.total_steps:
                    if self.features is not None and self.step and self.step % self.stage_steps == 0:
                        self.progress.note(self.features.begin_stage(self.step // self.stage_steps))
                    self._train_step(batches)
                    if self._validation_due(self.step):
                        self._validate()
                    if self.step % self.analyze_steps == 0 or self.step == self.total_steps:
                        self._analyze()
                    # Several processes have to agree to stop, which they do at a log entry; a single one need not wait.
                    alone = self.accelerator.num_processes == 1
                    if (self._log_due(self.step) or (alone and stop.number)) and self._log(stop.number):
                        self.save()
                        return
                    if self.step % self.save_steps == 0 and self.step < self.total_steps:
                        self.save()
        finally:
            self.progress.stop()

    def _train_step(self, batches: Iterator[Batch]) -> None:
        config, accelerator, model = self.config, self.accelerator, self.model
        at = Moment(self.step, self.total_steps, self.plan.steps_per_epoch)
        self._last_lr = self._learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self._last_lr * group.get("lr_scale", 1.0)
        self._scheduled = scheduled = self.method.schedule(config, at)
        for group in self._decayed if "weight_decay" in scheduled else []:
            group["weight_decay"] = scheduled["weight_decay"]
        self.method.before_step(self._plain, scheduled, at)
        stats = self.heads.wanted(self.step + 1)
        total: torch.Tensor | None = None
        for accum in range(config.accum_steps):
            images, targets = self._next_batch(batches)
            piece = self.plan.piece(self.step, accum, accelerator.process_index)
            # Dropout and stochastic depth, too, are a function of the step, so that a resumed run draws the same.
            torch.manual_seed(derived_seed(config.seed, _DROPOUT, piece))
            seed = derived_seed(config.seed, _MIX, piece)
            inputs, arguments = self.method.call(config, images, targets, seed=seed, training=True)
            if self.masking is not None:
                arguments |= self.masking.arguments(inputs, piece)
            if self.features is not None:
                arguments |= self.features.arguments(inputs, arguments.get("mask"))
            if "mask" in arguments and self.method.sees_all:
                arguments["mask"] = arguments["mask"].to(accelerator.device, non_blocking=True)
            if config.compile and "offset" in arguments:
                # A Python integer would be a constant to the compiler, one recompilation per step.
                arguments["offset"] = torch.full((), piece, dtype=torch.int64, device=accelerator.device)
            synchronise = accum == config.accum_steps - 1
            with contextlib.nullcontext() if synchronise else accelerator.no_sync(model):
                out = model(inputs, **arguments, **({"head_stats": stats} if stats else {}))
                loss = out.loss / config.accum_steps
                accelerator.backward(loss + self.heads.penalty(out.head_stats) / config.accum_steps)
            if stats:
                self.heads.see(out.head_stats)
            metrics = getattr(out, "metrics", {})
            self._metrics = list(metrics)
            seen = torch.stack([loss.detach(), *(value.detach() / config.accum_steps for value in metrics.values())])
            total = seen if total is None else total + seen
        assert total is not None
        # Elsewhere this would wait for the device, or only one of several processes would stop: _log looks there.
        if accelerator.device.type == "cpu" and accelerator.num_processes == 1:
            self._require_finite(total[0].item(), self.step)
        self._window.append(total)
        self._clip()
        self.method.before_update(self._plain, scheduled, at)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(self._plain, scheduled, at)
        if self.masking is not None:
            self.masking.follow()
        if self.features is not None:
            self.features.follow(at.share)
        self.step += 1
        recorded = self.heads.collect()
        if recorded is not None and self.history is not None:
            self.history.add_heads(self.step, recorded)

    def _clip(self) -> None:
        """Clip the gradients, where they are to be; measures their norm for the log."""
        clip_grad, each = self.config.value("clip_grad"), self.method.clips_each
        if clip_grad is None and not self._log_due(self.step + 1):
            return
        # Besides the norm, this takes the scale of fp16 out of the gradients.
        whole = math.inf if clip_grad is None or each else clip_grad
        self._grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), whole)
        if clip_grad is not None and each:
            for parameter in self.model.parameters():
                torch.nn.utils.clip_grad_norm_(parameter, clip_grad)

    def _learning_rate(self, step: int) -> float:
        config, batch = self.config, self.plan.effective_batch
        tenth_from = None
        if config.schedule == "step":
            # As SimMIM: after 700 epochs of 800.
            epoch = self.stage_epochs * 7 / 8 if config.step_epoch is None else config.step_epoch
            tenth_from = round(epoch * self.plan.steps_per_epoch)
        return learning_rate(
            step % self.stage_steps,
            self.stage_steps,
            self.warmup_steps,
            self.peak_lr,
            config.min_lr if config.min_blr is None else scaled_learning_rate(config.min_blr, batch),
            start=scaled_learning_rate(config.warmup_blr, batch),
            tenth_from=tenth_from,
        )

    def _next_batch(self, batches: Iterator[Batch]) -> tuple[Pixels, torch.Tensor | None]:
        began = time.perf_counter()
        batch = next(batches)
        self.seconds_waiting += time.perf_counter() - began
        if batch.images is None:
            raise TrainingError(all_broken_message(self.images.source, batch.broken))
        for index, reason in batch.broken:
            if index not in self.broken:
                self.broken[index] = reason
                text = f"cannot read {self.images.source.label(index)}, another image takes its place: {reason}"
                warnings.warn(text, stacklevel=2)
        device = self.accelerator.device
        targets = None if batch.targets is None else batch.targets.to(device, non_blocking=True)
        if isinstance(batch.images, tuple):
            return tuple(view.to(device, non_blocking=True) for view in batch.images), targets
        return batch.images.to(device, non_blocking=True), targets

    def _log_due(self, step: int) -> bool:
        return step % self.config.log_every == 0 or step == self.total_steps or self._validation_due(step)

    def _validation_due(self, step: int) -> bool:
        return self.validation is not None and (step % self.val_steps == 0 or step == self.total_steps)

    def _validate(self) -> None:
        """Measure; the same numbers whenever and wherever the weights are the same, and no effect on training."""
        assert self.validation is not None
        accelerator, began = self.accelerator, time.perf_counter()
        self.model.eval()
        sums = self.validation.sums(
            calling(self.model), accelerator.device, accelerator.process_index, accelerator.num_processes
        )
        self.model.train()
        reduced = accelerator.reduce(torch.stack(list(sums.values())), reduction="sum")
        means = self.validation.values(dict(zip(sums, reduced, strict=True)))
        self._validated = {f"val_{name}": value for name, value in means.items()}
        value = self._validated.get(self._best_name, -math.inf)
        # Only of weights that a process has whole.
        if value > self._best and self.history is not None and accelerator.distributed_type.value != "FSDP":
            self._best = value
            files.save(self.checkpoints.folder.parent / BEST, self.method.content(self._plain))
        self._window_began += time.perf_counter() - began  # the images per second are those of training

    def _analyze(self) -> None:
        """Record the heads on fixed images, where that is wanted; by the first process, with no effect on training."""
        if self.fixed_images is None or self.history is None:
            return
        began = time.perf_counter()
        self._plain.eval()
        with self.accelerator.autocast():
            seen = self.fixed_images.see(self._plain, self.accelerator.device)
        self._plain.train()
        self.history.add_fixed_images(self.step, self.step / self.plan.steps_per_epoch, seen)
        self._window_began += time.perf_counter() - began

    def _log(self, stop_number: int) -> bool:
        """Write a log entry if one is due; True where the processes agree to stop."""
        losses, metrics, stop_asked = self._reduced_losses(stop_number)
        now = time.perf_counter()
        steps_per_second = len(losses) / (now - self._window_began)
        self._window_began = now
        loss = sum(losses) / len(losses)
        images_per_second = steps_per_second * self.plan.effective_batch
        values = {
            "loss": loss,
            **metrics,
            **(self._validated if self._validation_due(self.step) else {}),
            "lr": self._last_lr,
            **self._scheduled,
            "grad_norm": float(self._grad_norm),
            "images_per_second": images_per_second,
            "seconds": self.seconds,
        }
        # Whoever resumes a run that was stopped between two entries finds those of a run that was not.
        if self.history is not None and self._log_due(self.step):
            self.history.add(self.step, values)
        self.progress.update(
            self.step,
            loss=loss,
            lr=self._last_lr,
            images_per_second=images_per_second,
            steps_per_second=steps_per_second,
            metrics={**metrics, **self._validated},
        )
        if stop_asked:
            self.stopped_by = stop_number or signal.SIGTERM
        return stop_asked

    def _reduced_losses(self, stop_number: int) -> tuple[list[float], dict[str, float], bool]:
        """Losses and mean metrics since the last call, over all processes, and whether one was asked to stop.

        The one place that waits for the device. With several processes it is also where they agree: all of them see
        the same losses and the same stop request after the same step.
        """
        asked = torch.tensor([float(stop_number > 0)], device=self._window[0].device)
        message = torch.cat([*self._window, asked])
        message = self.accelerator.reduce(message.float(), reduction="mean")
        window = message[:-1].view(len(self._window), -1)  # [steps, 1 + metrics]
        self._window.clear()
        losses = window[:, 0].tolist()
        metrics = dict(zip(self._metrics, window[:, 1:].mean(0).tolist(), strict=True))
        first = self.step - len(losses)
        for i, loss in enumerate(losses):
            self._require_finite(loss, first + i)
        return losses, metrics, bool(message[-1] > 0)

    def _require_finite(self, loss: float, step: int) -> None:
        if math.isfinite(loss):
            return
        lr = self._learning_rate(step)
        raise TrainingError(
            f"loss became {loss} at step {step + 1} (epoch {step / self.plan.steps_per_epoch:.2f}, "
            f"learning rate {lr:.3g}); {self._advice()}"
        )

    def _advice(self) -> str:
        last = self.checkpoints.latest()
        return (
            f"last good checkpoint: {last}" if last else "no checkpoint had been written yet"
        ) + "; try a lower --blr or --lr, a longer --warmup-epochs, --clip-grad 1, or --precision fp32"

    def save(self, *, final: bool = False) -> dict[str, Any]:
        """Write a checkpoint and return the weights; every process takes part, the first one writes."""
        if self._window:
            self._reduced_losses(0)
        model_state, optimizer_state = state_of(self.model, self.optimizer)
        if self.accelerator.is_main_process:
            self._require_finite_weights(model_state)
            scaler, teacher = self.accelerator.scaler, None if self.masking is None else self.masking.state()
            target_teacher = None if self.features is None else self.features.state()
            path = self.checkpoints.save(
                {
                    **self.about,
                    "step": self.step,
                    "epoch": self.step / self.plan.steps_per_epoch,
                    "seconds": self.seconds,
                    "model": model_state,
                    "optimizer": optimizer_state,
                    "scaler": scaler.state_dict() if scaler is not None else None,
                    **({"teacher": teacher} if teacher is not None else {}),
                    **({"target_teacher": target_teacher} if target_teacher is not None else {}),
                },
                final=final,
            )
            self.progress.note(f"saved {path}")
        self.accelerator.wait_for_everyone()
        return model_state

    def _require_finite_weights(self, state: dict[str, Any]) -> None:
        # A gradient may be infinite where the loss still was not; the next loss would tell, but too late.
        for name, value in state.items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise TrainingError(
                    f"weight {name!r} is no longer finite at step {self.step}, nothing was saved; {self._advice()}"
                )
