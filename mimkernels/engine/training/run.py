"""A training run from its settings to its report. Everything is checked before the first file is written."""

import contextlib
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TextIO

import torch

from mimkernels.data.batches import Augmentation, BatchPlan, PretrainImages, require_readable
from mimkernels.data.sources import Source, class_numbers
from mimkernels.engine import files
from mimkernels.engine.checkpoint import FORMAT, CheckpointFolder
from mimkernels.engine.command import told_failures
from mimkernels.engine.environment import start_accelerator, versions
from mimkernels.engine.hardware import device_name, loading_workers
from mimkernels.engine.head_history import FIXED_IMAGES, TRAINING_STEPS
from mimkernels.engine.lock import folder_lock
from mimkernels.engine.progress import Progress, count, counted, duration
from mimkernels.engine.schedule import parameter_groups, scaled_learning_rate
from mimkernels.engine.settings import changes
from mimkernels.engine.state import check_fits, load_state
from mimkernels.engine.training.config import TrainingConfig
from mimkernels.engine.training.heads import FixedImages, HeadWatch
from mimkernels.engine.training.history import History
from mimkernels.engine.training.loop import BEST, Trainer
from mimkernels.engine.training.masks import Masks, TeacherTargets
from mimkernels.engine.training.resume import check_same_stream, check_same_teachers, check_what_is_left, find_start
from mimkernels.engine.training.validation import Validation
from mimkernels.models.build import build_model
from mimkernels.nn.attention import attention_layers
from mimkernels.nn.windows import window_counts


@dataclass
class RunResult:
    """How a run ended."""

    output: Path
    step: int
    total_steps: int
    stopped_by: int  # number of the signal that ended it early, 0 if it went to its end
    broken_images: int
    report: Path | None = None
    content: Any = None  # what the report shows


class TrainingRun:
    """A run that has been checked and is ready to start: constructing it locks the folder and writes nothing else.

    A subclass says what is trained, on what, and what is reported.

    Args:
        config: what to train.
        resume: None to start anew, ``"auto"`` to continue the newest checkpoint of ``config.output`` if there is one,
            or the path of a checkpoint or run folder.
        overwrite: replace a run that ``config.output`` holds already.
        stream: where progress goes (default: standard output).

    Attributes:
        pages: files of its results in the folder, besides weights.
    """

    pages: ClassVar[tuple[str, ...]] = ("report.html",)

    def __init__(
        self,
        config: TrainingConfig,
        *,
        resume: str | None = None,
        overwrite: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        config.check()
        self.config = config
        self.output = Path(config.output)
        self.checkpoints = CheckpointFolder(self.output / "checkpoints", config.keep_checkpoints)
        files.check_writable(config.output)
        files.check_own_folder(self.output, type(config))
        with contextlib.ExitStack() as held:
            if os.environ.get("RANK", "0") == "0":  # of several processes the first one writes
                held.enter_context(folder_lock(self.output))
            self._check(resume, overwrite, stream)
            self._held = held.pop_all()

    def _check(self, resume: str | None, overwrite: bool, stream: TextIO | None) -> None:
        """Check everything that can be wrong before training begins."""
        config = self.config
        start = find_start(config, self.checkpoints, resume, overwrite)
        self.start = start.content if start.path else None
        self.start_path, self.damaged = start.path, start.damaged
        self.accelerator, self.precision, self.precision_reason = start_accelerator(config.device, config.precision)
        device = self.accelerator.device
        if device.type == "cpu" and _asked_to_shard() and self.accelerator.distributed_type.value != "FSDP":
            # accelerate would fall back to DDP without a word.
            raise ValueError("FSDP was asked for, but accelerate shards on accelerators only and the device is 'cpu'")
        method = config.the_method
        with self.accelerator.local_main_process_first():  # one process per machine downloads
            self.source, self.held_out = self._open_data()
        self.config = config = self._from_data()
        targets = self.source.targets()[0] if method.labelled else None
        torch.manual_seed(config.seed)
        self.model = self._new_model()
        if self.start is not None:
            check_fits(self.model, self.start["model"], self.start["optimizer"], str(self.start_path))
        self.heads = HeadWatch(config, getattr(self.model.encoder, "num_prefix_tokens", 0))
        if self.heads.names or self.heads.weights or config.analyze_every:
            layers = attention_layers(self.model.encoder)  # refuses a model whose heads cannot be recorded
            self.heads.windows = window_counts((self.model.encoder,), layers)
        self.masking = self._masking()
        self.features = self._features()
        #: Digests of the teachers that stay as they are, by what they teach.
        self.teachers = {} if self.features is None else dict(self.features.identities)
        if self.masking is not None and (identity := self.masking.identity):
            self.teachers["masking"] = identity
        if self.start is not None:
            check_same_teachers(self.start, self.teachers)
        follows = self.masking is not None and self.masking.state() is not None
        follows = follows or (self.features is not None and self.features.moves)
        if follows and self.accelerator.distributed_type.value == "FSDP":
            raise ValueError(
                "the moving average of sharded weights is not kept: give --teacher or --target a run, or train by DDP"
            )
        self.augmentation = self._augmentation()
        views = method.views(config, self.augmentation)
        self.images = PretrainImages(self.source, views, config.seed, targets)
        self.validation: Validation | None = None
        if self.held_out is not None:
            classes = [] if targets is None else self.source.targets()[1]
            self.validation = Validation(
                config,
                self.held_out,
                augmentation=self.augmentation,
                views=views,
                masking=self.masking,
                features=self.features,
                model=self.model,
                targets=None if targets is None else class_numbers(self.held_out, self.source.name, classes),
            )
            self.validation.require_readable()
        processes = self.accelerator.num_processes
        self.plan = BatchPlan(len(self.source), config.batch_size, config.accum_steps, processes, config.seed)
        require_readable(self.images)
        self.fixed_images: FixedImages | None = None
        if config.analyze_every:
            if self.accelerator.distributed_type.value == "FSDP":
                raise ValueError("analyze_every needs whole weights, which FSDP shards: leave it out, or train by DDP")
            self.fixed_images = FixedImages(self.held_out or self.source, self.augmentation)
        if self.start is not None:
            check_same_stream(self.start, self.source, self.plan)
            check_what_is_left(self.start, config, self.plan)
        self.peak_lr = config.lr or scaled_learning_rate(config.value("blr"), self.plan.effective_batch)
        self.progress = Progress(
            total_steps=config.epochs * self.plan.steps_per_epoch,
            steps_per_epoch=self.plan.steps_per_epoch,
            quiet=not self.accelerator.is_main_process,
            stream=stream,
        )

    def _open_data(self) -> tuple[Source, Source | None]:
        """Images to train on, and others to validate on, if there are any."""
        raise NotImplementedError

    def _from_data(self) -> TrainingConfig:
        """The settings, with what the data alone can tell."""
        raise NotImplementedError

    def _new_model(self) -> Any:
        """The model before its first step; the seed has been set."""
        return build_model(self.config.to_dict())

    def _augmentation(self) -> Augmentation:
        config = self.config
        return Augmentation(
            config.img_size,
            config.in_chans,
            next(scale for scale in (config.value("crop_scale"), self.source.crop_scale) if scale is not None),
            self.source.mirrored if config.hflip is None else config.hflip,
        )

    def _masking(self) -> Masks | None:
        """Of a method that masks."""
        return None

    def _features(self) -> TeacherTargets | None:
        """Of a method whose targets come from a teacher."""
        return None

    def _parameter_groups(self) -> list[dict[str, Any]]:
        config, method = self.config, self.config.the_method
        return parameter_groups(
            self.model.named_parameters(), config.value("weight_decay"), lambda name: method.undecayed(config, name)
        )

    def _model_facts(self) -> dict[str, str]:
        """What the model is, by name, and what else comes before the facts of every run."""
        raise NotImplementedError

    def _finish(self, weights: dict[str, Any], history: History, facts: dict[str, str]) -> tuple[Any, Path]:
        """Export the weights, write the report; on the first process. Returns what the report shows, and its file."""
        raise NotImplementedError

    def execute(self) -> RunResult:
        """Train to the end of the schedule or to a stop request, then write weights, pictures and the report."""
        config = self.config
        with (
            self._held,
            told_failures(
                self.output,
                self.accelerator.device,
                f"lower --batch-size {config.batch_size} and raise --accum-steps by the same factor",
                self._going_on,
            ),
        ):
            return self._execute()

    def _going_on(self) -> str:
        newest = self.checkpoints.latest()
        return f"--output {self.output} --resume goes on from {newest}" if newest else "nothing had been saved yet"

    def _to_continue(self) -> str:
        return f"continue with --output {self.output} --resume"

    def _execute(self) -> RunResult:
        config, accelerator, progress = self.config, self.accelerator, self.progress
        first_step = 0 if self.start is None else self.start["step"]
        facts = self._facts()
        for line in [*self._continuation_notes(), *(f"{name:10} {fact}" for name, fact in facts.items())]:
            progress.note(line)
        model, optimizer = self._prepare()
        history = self._open_folder(first_step) if accelerator.is_main_process else None
        trainer = Trainer(
            config,
            accelerator,
            model,
            optimizer,
            self.images,
            self.plan,
            peak_lr=self.peak_lr,
            first_step=first_step,
            seconds=0.0 if self.start is None else self.start["seconds"],
            history=history,
            heads=self.heads,
            fixed_images=self.fixed_images,
            masking=self.masking,
            features=self.features,
            validation=self.validation,
            checkpoints=self.checkpoints,
            progress=progress,
            workers=self._workers(),
            about=self._about(),
        )
        report = content = None
        try:
            trainer.train()
            if trainer.stopped_by:
                progress.note(f"stopped at step {trainer.step}; {self._to_continue()}")
            else:
                weights = trainer.save(final=True)
                if accelerator.is_main_process:
                    facts["Time"] = _time_facts(trainer, first_step)
                    if trainer.broken:
                        facts["Broken"] = (
                            f"{len(trainer.broken)} image files could not be read; others took their place"
                        )
                    assert history is not None
                    content, report = self._finish(weights, history, facts)
                    progress.note(f"{counted(config.epochs, 'epoch')} in {duration(trainer.seconds)}; report: {report}")
            accelerator.wait_for_everyone()
        finally:
            if history is not None:
                history.close()
            accelerator.free_memory()
        return RunResult(
            self.output, trainer.step, trainer.total_steps, trainer.stopped_by, len(trainer.broken), report, content
        )

    def _prepare(self) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        """Build the optimizer, wrap it and the model for the processes there are, load the checkpoint."""
        config, method = self.config, self.config.the_method
        _name_sharded_blocks(self.accelerator, self.model, method.blocks(self.model))
        if self.config.compile:
            self.model.compile()
        optimizer = torch.optim.AdamW(
            self._parameter_groups(),
            lr=self.peak_lr,
            betas=(0.9, config.value("beta2")),
            fused=True,
        )
        if self.accelerator.num_processes > 1 and self.accelerator.device.type == "cuda":
            # As published where there are such norms; on the CPU each process has statistics of its own.
            self.model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        model, optimizer = self.accelerator.prepare(self.model, optimizer)
        if self.start is not None:
            # Popped: the loaded copies are of no use afterwards, and as large as what is trained.
            load_state(model, optimizer.optimizer, self.start.pop("model"), self.start.pop("optimizer"))
            if self.start["scaler"] is not None and self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(self.start["scaler"])
            if self.masking is not None:
                self.masking.load(self.start.pop("teacher", None))
            if self.features is not None:
                self.features.load(self.start.pop("target_teacher", None))
        return model, optimizer

    def _open_folder(self, first_step: int) -> History:
        files.sweep(self.output, self.checkpoints.folder)
        if self.start is None:
            self.checkpoints.clear()
            for path in [
                self.output / "metrics.jsonl",
                self.output / TRAINING_STEPS,
                self.output / FIXED_IMAGES,
                self.output / BEST,
                *self._results_before(),
                *(self.output / "tensorboard").glob("events.out.tfevents.*"),
            ]:
                path.unlink(missing_ok=True)
        else:
            self.checkpoints.reopen(first_step, self.damaged)
        files.write_text(self.output / "config.json", self.config.to_json())
        return History(self.output, first_step)

    def _results_before(self) -> list[Path]:
        """Weights and results of a run that is replaced, which would pass for this one's if it ended before its own."""
        if not (self.output / "config.json").is_file():  # nobody's: files of such names are not a run's
            return []
        names = [method.exported for method in self.config.methods.values()]
        return [self.output / name for name in (*names, *self.pages)]

    def _about(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "method": self.config.method,
            "model_config": _plain(self.model.config),
            "config": self.config.to_dict(),
            "data": self.source.fingerprint(),
            "effective_batch": self.plan.effective_batch,
            "versions": versions(),
            **({"teachers": self.teachers} if self.teachers else {}),
            **({"validation": self.validation.fingerprint()} if self.validation else {}),
        }

    def _facts(self) -> dict[str, str]:
        config, plan = self.config, self.plan
        processes = self.accelerator.num_processes
        return {
            **self._model_facts(),
            "Data": f"{self.source.name}, {len(self.source):,} images, {config.img_size} x {config.img_size} pixels",
            **({"Validation": self.validation.told()} if self.validation else {}),
            **({"Target": self.features.told} if self.features else {}),
            **({"Masks": self.masking.told()} if self.masking and self.masking.sampler else {}),
            "Device": device_name(self.accelerator.device)
            + (f", {processes} processes ({_sharing(self.accelerator)})" if processes > 1 else ""),
            "Precision": f"{self.precision} ({self.precision_reason})",
            "Schedule": f"{counted(config.epochs, 'epoch')} of {counted(plan.steps_per_epoch, 'step')}, effective "
            f"batch {plan.effective_batch}, peak learning rate {self.peak_lr:.3g}",
        }

    def _continuation_notes(self) -> list[str]:
        if self.start is None:
            return []
        notes = [f"warning: {reason}" for reason in self.damaged.values()]
        notes.append(
            f"continuing at step {self.start['step']} (epoch {self.start['epoch']:.1f})"
            + (f" from {self.start_path}, which is whole" if notes else "")
        )
        different = changes(type(self.config).from_dict(self.start["config"]), self.config, self.config.results)
        if different:
            notes.append(f"settings that differ from the checkpoint's: {'; '.join(different)}")
        before = self.start.get("validation")  # what the checkpoints of before have not
        if before is not None and self.validation is not None and before != self.validation.fingerprint():
            notes.append(
                f"warning: the images to validate on are not those of the checkpoint: {before} in the checkpoint, "
                f"{self.validation.fingerprint()} now; validations before and after do not compare"
            )
        if self.start["step"] >= self.config.epochs * self.plan.steps_per_epoch:
            notes.append("the checkpoint is at the end of its schedule: nothing is left to train (more with --epochs)")
        return notes

    def _workers(self) -> int:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return loading_workers(self.config.workers, self.accelerator.device.type, self.source.in_memory, processes)


def backends_of(device: torch.device, precision: str, ops: tuple[str, ...]) -> dict[str, str]:
    """Which backend each op of the training step runs on."""
    from mimkernels.ops._registry import SPECS

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    # Masks are drawn and losses summed in fp32 whatever the tokens are.
    return {op: SPECS[op].resolve("auto", device, torch.float32 if op == "random_mask" else dtype) for op in ops}


def _time_facts(trainer: Trainer, first_step: int) -> str:
    images = (trainer.step - first_step) * trainer.plan.effective_batch
    session = trainer.seconds - trainer.seconds_before
    waiting = trainer.seconds_waiting / max(session, 1e-9)
    peak = (
        torch.cuda.max_memory_allocated()
        if trainer.accelerator.device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    )
    return (
        f"{duration(trainer.seconds)}, {count(images / max(session, 1e-9))} images/s over all, "
        f"{waiting:.0%} of it waiting for data; peak memory {peak / 2**30:.1f} GiB"
    )


def _name_sharded_blocks(accelerator: Any, model: Any, blocks: list[Any]) -> None:
    """Tell FSDP2 to shard transformer block by block, unless the launch command named classes itself."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.transformer_cls_names_to_wrap:
        return
    # accelerate looks here for the classes, as transformers' models declare them.
    model._no_split_modules = sorted({type(block).__name__ for block in blocks})


def _asked_to_shard() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _sharing(accelerator: Any) -> str:
    """How several processes share the work: ``DDP``, ``FSDP2`` ..."""
    kind = accelerator.distributed_type.value
    return f"FSDP{accelerator.state.fsdp_plugin.fsdp_version}" if kind == "FSDP" else kind.replace("MULTI_", "DDP on ")


def _plain(value: Any) -> Any:
    """Lists, dicts and scalars only: what ``torch.load(weights_only=True)`` reads back."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
