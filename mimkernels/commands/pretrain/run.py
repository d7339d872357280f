"""One pre-training run from its configuration to its report. Everything is checked before the first file is written."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate.utils import broadcast_object_list

from mimkernels.commands.pretrain.config import NO_MASKING, PretrainConfig
from mimkernels.commands.pretrain.features import FeatureReader, FeatureTeachers, load_teachers
from mimkernels.commands.pretrain.masking import Masking
from mimkernels.commands.pretrain.methods.feature_targets import predicts_features, predicts_pixels, stages_of
from mimkernels.commands.pretrain.report import References, Report, write_report
from mimkernels.data.batches import picture_batch
from mimkernels.data.pixels import Decoder
from mimkernels.data.sources import FolderSource, Source, hold_out, is_named, open_held_out, open_source
from mimkernels.data.split import own_split
from mimkernels.data.statistics import measure_statistics
from mimkernels.engine import files
from mimkernels.engine.environment import versions
from mimkernels.engine.head_history import Epochs
from mimkernels.engine.training.history import History
from mimkernels.engine.training.run import RunResult, TrainingRun, backends_of
from mimkernels.models.build import build_model, format_statistics
from mimkernels.models.target_sum import TargetSum


def pretrain(
    config: PretrainConfig,
    *,
    resume: str | None = None,
    overwrite: bool = False,
    stream: TextIO | None = None,
) -> RunResult:
    """Check everything, then train; the arguments are those of ``Run``.

    Raises:
        ValueError: an argument, the data or the checkpoint does not fit, or another run is at work in the folder;
            nothing has been written.
        TrainingError: training could not go on (loss not finite, no image readable, out of memory, disk full).
    """
    return Run(config, resume=resume, overwrite=overwrite, stream=stream).execute()


class Run(TrainingRun):
    """A run of ``mimkernels pretrain``."""

    config: PretrainConfig
    masking: Masking | None

    def _open_data(self) -> tuple[Source, Source | None]:
        """Images to train on, and others to validate on, if there are any."""
        config = self.config
        decoder = Decoder.from_settings(config.max_pixels, config.pixel_range)
        if (parts := own_split(config.data)) is not None:
            both = f"{parts[0].name} and {parts[1].name}"
            remedy = f"--data {parts[0]} --val-data {parts[1]} tells them apart"
            if config.the_method.labelled:
                raise ValueError(f"data {config.data!r}: its folders {both} are no classes; {remedy}")
            told = f"{config.data}: images of its folders {both} are trained on; {remedy}"
            warnings.warn(told, stacklevel=2)
        source = open_source(config.data, config.data_root, decoder)
        if config.val_split is not None:
            return hold_out(source, config.val_split)
        if config.val_data is None:
            return source, open_held_out(config.data, config.data_root)
        if not is_named(config.val_data):
            return source, FolderSource(config.val_data, decoder)
        held_out = open_held_out(config.val_data, config.data_root)
        if held_out is None:
            raise ValueError(f"val_data {config.val_data!r} has no test images")
        return source, held_out

    def _from_data(self) -> PretrainConfig:
        if self.config.the_method.labelled:
            self._count_classes()
        self.config = replace(self.config, pixel_stats=self._pixel_stats())
        self._teachers: list[FeatureReader | None] = []
        if not self.config.the_method.masks:
            return self.config
        self._teachers = load_teachers(self.config)
        widths = TargetSum(self.config.target, self.config.target_dim).widths
        for place, reader in enumerate(self._teachers):
            if reader is None:
                continue
            if widths[place] not in (None, reader.dim):
                raise ValueError(f"target_dim is {widths[place]}, features of {reader.encoder.title} have {reader.dim}")
            widths[place] = reader.dim
        if not widths:
            return self.config
        return replace(self.config, target_dim=widths[0] if len(widths) == 1 else widths)

    def _masking(self) -> Masking | None:
        config = self.config
        if not config.the_method.masks or config.masking == NO_MASKING:
            return None
        return Masking(config, self.model, self.accelerator.autocast)

    def _features(self) -> FeatureTeachers | None:
        if not self._teachers:
            return None
        config = self.config
        before = config if self.start is None else type(config).from_dict(self.start["config"])
        stages = stages_of(config)
        if stages_of(before) != stages:
            raise ValueError(
                f"target {before.target!r} has {stages_of(before)} stages, {config.target!r} has {stages}: their ends "
                "would move, of which some may lie behind; keep the target's stages, or start a new run"
            )
        if stages > 1 and before.epochs != config.epochs:
            raise ValueError(
                f"epochs {before.epochs} -> {config.epochs} would move the ends of the {stages} stages of target "
                f"{config.target!r}, of which some may lie behind: keep --epochs {before.epochs}, or start a new run"
            )
        return FeatureTeachers(self.config, self.model, self._teachers, self.accelerator.autocast)

    def _pixel_stats(self) -> str:
        """``pixel_stats`` without what has to be looked up or measured; a run that is continued keeps what it has."""
        given, in_chans = self.config.pixel_stats, self.config.in_chans
        if given not in ("auto", "data"):
            return given
        if self.start is not None:
            saved: str = self.start["config"].get("pixel_stats", "imagenet")
            if given == "data" and saved == "imagenet":
                raise ValueError(
                    "pixel_stats 'data' cannot be measured for a run that goes on, whose checkpoint has 'imagenet': "
                    "leave it out, or start a new run"
                )
            return saved
        if given == "auto":
            known = self.source.statistics
            return format_statistics([known[0]] * in_chans, [known[1]] * in_chans) if known else "imagenet"
        measured = [""]
        if self.accelerator.is_main_process:
            measured[0] = format_statistics(*measure_statistics(self.source, in_chans))
        return str(broadcast_object_list(measured)[0])

    def _count_classes(self) -> None:
        """Give the settings the number of classes."""
        classes = self.source.targets()[1]
        if self.config.num_classes is None:
            self.config = replace(self.config, num_classes=len(classes))
        assert self.config.num_classes is not None
        if self.config.num_classes < len(classes):
            raise ValueError(
                f"{self.source.name!r} has {len(classes)} classes, num_classes is {self.config.num_classes}: the "
                "model could not name them all"
            )
        if len(classes) < 2:
            raise ValueError(f"{self.source.name!r} has {len(classes)} class: supervised training needs at least 2")

    def _model_facts(self) -> dict[str, str]:
        config = self.config
        parameters = sum(p.numel() for p in self.model.parameters())
        arguments = {**({"patch_size": config.patch_size} if config.patch_size else {}), **config.model_kwargs}
        return {
            "Model": ", ".join(
                [
                    config.model,
                    *(f"{k} {v}" for k, v in arguments.items()),
                    f"{parameters / 1e6:.2g} M parameters"
                    + (" with decoder" if config.the_method.paints(config) else ""),
                ]
            )
        }

    def _finish(self, weights: dict[str, Any], history: History, facts: dict[str, str]) -> tuple[Report, Path]:
        config, device = self.config, self.accelerator.device
        model = build_model(config.to_dict())
        model.load_state_dict(weights)
        files.save(self.output / config.the_method.exported, config.the_method.content(model))
        model.to(device).eval()
        pictures: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        masked_share: float | None = None
        if self.masking is not None:
            share = self.masking.share
            masked_share = config.the_method.masked_share(model) if share is None else share
        if config.pictures and config.the_method.paints(config):
            assert self.masking is not None
            batch, _ = picture_batch(self.held_out or self.source, self.augmentation, config.pictures)
            if len(batch):
                batch = batch.to(device)
                mask = self.masking.for_held_out(batch)
                original, masked, predicted = model.reconstruct(batch, mask=mask, seed=config.seed)
                pictures = (original.cpu(), masked.cpu(), predicted.cpu())
        content = Report(
            config=config,
            run_facts=facts,
            entries=history.entries,
            heads=history.heads.picture(),
            during=Epochs.of(history.during.entries),
            steps_per_epoch=self.plan.steps_per_epoch,
            pictures=pictures,
            pictures_are_new=self.held_out is not None,
            references=self._references(model),
            masked_share=masked_share,
            versions=versions(),
            backends=backends_of(device, self.precision, _ops(config)),
        )
        return content, write_report(self.output / "report.html", content)

    def _references(self, model: torch.nn.Module) -> References | None:
        """What the loss of the trained `model` is to be compared with, on the images of the validation."""
        config, method, device, validation = (
            self.config,
            self.config.the_method,
            self.accelerator.device,
            self.validation,
        )
        if validation is None:
            return None
        torch.manual_seed(config.seed)
        untrained = build_model(config.to_dict()).to(device).eval()
        means = validation.means()
        blind = None
        if method.blind:
            known: list[torch.Tensor | None] = []

            def loss_of_blind(images: Any, arguments: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
                known.append(method.blind_loss(model, images, arguments, means))
                return torch.zeros((), device=device) if known[-1] is None else known[-1], {}

            blind = validation.values(validation.sums(loss_of_blind, device))["loss"]
            blind = None if None in known else blind
        now = validation.measure(model, device)
        return References(method.blind, blind, validation.measure(untrained, device), now)


def _ops(config: PretrainConfig) -> tuple[str, ...]:
    """The ops of a training step."""
    ops = config.the_method.ops
    if not (config.the_method.masks and predicts_features(config)):
        return ops
    kept = ops if predicts_pixels(config) else tuple(op for op in ops if op != "masked_patch_loss")
    return (*kept, "masked_feature_loss")
