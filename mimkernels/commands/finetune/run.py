"""One fine-tuning run from its configuration to its report, on the training loop of ``mimkernels pretrain``."""

from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from timm.optim import param_groups_layer_decay

from mimkernels.commands.finetune.config import FinetuneConfig
from mimkernels.commands.finetune.mistakes import Tested, test_all
from mimkernels.commands.finetune.report import FinetuneReport, write_report
from mimkernels.commands.finetune.source import as_source, choose_labels, load_source
from mimkernels.data.augment import FinetuneAugmentation
from mimkernels.data.batches import Augmentation
from mimkernels.data.labelled import LabelledImages
from mimkernels.data.sources import Source
from mimkernels.data.split import open_split
from mimkernels.engine import files
from mimkernels.engine.encoder import FrozenEncoder
from mimkernels.engine.environment import versions
from mimkernels.engine.head_history import Epochs
from mimkernels.engine.tables import print_table
from mimkernels.engine.training.history import History
from mimkernels.engine.training.loop import BEST
from mimkernels.engine.training.resume import settings_to_continue
from mimkernels.engine.training.run import RunResult, TrainingRun, backends_of
from mimkernels.models.build import build_model, pixel_statistics
from mimkernels.models.finetuned import Finetuned, check_readout
from mimkernels.nn.attention import attention_layers

# Of a run that is continued, whatever was given: they say what its weights are.
_OF_MODEL = ("arch", "patch_size", "img_size", "in_chans", "pixel_stats", "num_classes")


def finetune(
    config: FinetuneConfig, *, resume: str | None = None, overwrite: bool = False, stream: TextIO | None = None
) -> RunResult:
    """Check everything, then train; the arguments are those of ``TrainingRun``.

    Raises:
        ValueError, TrainingError: as of ``mimkernels.commands.pretrain.run.pretrain``.
    """
    return FinetuneRun(config, resume=resume, overwrite=overwrite, stream=stream).execute()


class FinetuneRun(TrainingRun):
    """A run of ``mimkernels finetune``."""

    pages = ("report.html", "results.json")
    config: FinetuneConfig
    model: Finetuned

    def _check(self, resume: str | None, overwrite: bool, stream: TextIO | None) -> None:
        check_readout(self.config.readout)
        if resume is not None and self.config.num_classes is None:
            saved = settings_to_continue(resume, self.config.output, FinetuneConfig)
            self.config = self.config.completed(saved) if saved else self.config
        super()._check(resume, overwrite, stream)
        if self.config.ema and self.accelerator.distributed_type.value == "FSDP":
            raise ValueError("the moving average of sharded weights is not kept: leave --ema out, or train by DDP")

    def _open_data(self) -> tuple[Source, Source | None]:
        config = self.config
        self.encoder: FrozenEncoder | None = None
        if self.start is None:
            self.encoder, told = load_source(config)
            config = replace(config, **told)
        else:
            # Its weights and its settings are all that it needs; what it started from may be gone.
            saved = self.start["config"]
            config = replace(config, **{name: saved[name] for name in _OF_MODEL})
            config.model_kwargs["drop_path_rate"] = config.drop_path
            if config.pixel_range == "auto":  # as at the start of a run: what the encoder was pre-trained with
                config = replace(config, pixel_range=saved["pixel_range"])
        split = open_split(config)
        self.classes, self.split = split.classes, split
        if self.start is not None and len(split.classes) != config.num_classes:
            shown = ", ".join(split.classes[:5]) + (", ..." if len(split.classes) > 5 else "")
            raise ValueError(
                f"the data have {len(split.classes)} classes ({shown}), the checkpoint's run had {config.num_classes}; "
                "give the data that it had, or start a new run of these from its weights (--model)"
            )
        source = choose_labels(split.train, config.labels, config.seed, split.classes)
        open_values = config.filled(len(source), len(split.classes), len(split.test), source.in_memory)
        self.config = replace(config, **open_values)
        self.config.check()
        return source, as_source(split.test)

    def _from_data(self) -> FinetuneConfig:
        return self.config

    def _new_model(self) -> Finetuned:
        model: Finetuned = build_model(self.config.to_dict())
        self.loaded = ""
        if self.encoder is not None and not self.config.from_scratch:
            report = model.start_from(self.encoder.model)
            self.loaded = ", ".join(
                [
                    f"{len(report.loaded)} tensors loaded",
                    *([f"{len(report.left)} left ({', '.join(report.left[:4])})"] if report.left else []),
                    *([f"resized: {'; '.join(report.resized[:3])}"] if report.resized else []),
                ]
            )
            assert model.config is not None
            former = model.config.get("pretrained_window_sizes")
            if former is not None:  # of Swin V2: what its coordinates are scaled by belongs to the architecture
                self.config.model_kwargs["pretrained_window_sizes"] = former
        model.freeze(self.config.freeze)
        try:
            attention_layers(model.encoder)
        except ValueError:
            self.config = replace(self.config, analyze_every=0.0)
        return model

    def _augmentation(self) -> Augmentation:
        config = self.config
        assert config.auto_augment is not None
        return FinetuneAugmentation(
            config.img_size,
            config.in_chans,
            self.source.crop_scale if config.crop_scale is None else config.crop_scale,
            self.source.mirrored if config.hflip is None else config.hflip,
            auto_augment=config.auto_augment,
            mean=pixel_statistics(config.pixel_stats, config.in_chans)[0],
            test_crop=config.test_crop,
        )

    def _parameter_groups(self) -> list[dict[str, Any]]:
        config = self.config
        assert config.layer_decay is not None
        return param_groups_layer_decay(
            self.model, config.value("weight_decay"), self.model.no_weight_decay(), layer_decay=config.layer_decay
        )

    def _model_facts(self) -> dict[str, str]:
        config = self.config
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        start = f"the architecture of {config.model}, random weights" if config.from_scratch else config.model
        scale = f"{config.layer_decay:g} per layer" if config.layer_decay != 1 else "the same for all layers"
        images = [name for name in ("mixup", "cutmix") if getattr(config, name)]
        images += [f"random erasing {config.erasing:g}"] if config.erasing else []
        images += [str(config.auto_augment)] if config.auto_augment != "none" else []
        return {
            "Model": f"{config.arch}, {sum(w.numel() for w in weights) / 1e6:.2g} M parameters trained"
            + (f", {config.freeze} blocks frozen" if config.freeze else "")
            + f"; readout {config.readout}, {config.num_classes} classes"
            + (f"; moving average of {config.ema:g}" if config.ema else ""),
            "From": f"{start}" + (f": {self.loaded}" if self.loaded else ""),
            "Labels": f"{_labels_in_words(config.labels)}{len(self.source):,} of {len(self.split.train):,} images, "
            f"seed {config.seed}; {self.split.description}",
            "Images": f"crops from {self.augmentation.crop_scale:g} of the area"
            + (", mirrored" if self.augmentation.hflip else "")
            + "".join(f", {name}" for name in images),
            "Rates": scale,
        }

    def layer_rows(self) -> list[list[str]]:
        """The groups that learn at one rate: layer, its share of the rate, the rate, decay, tensors, weights, names."""
        ids = self.model.layer_ids()
        named = {id(weight): name for name, weight in self.model.named_parameters()}
        rows = []
        for group in self._parameter_groups():
            names = [named[id(weight)] for weight in group["params"]]
            shown = [name.removeprefix("encoder.") for name in names]
            rows.append(
                (
                    (ids[names[0]], -group["weight_decay"]),
                    [
                        str(ids[names[0]]),
                        f"{group['lr_scale']:.4g}",
                        f"{self.peak_lr * group['lr_scale']:.3g}",
                        f"{group['weight_decay']:g}",
                        str(len(names)),
                        f"{sum(weight.numel() for weight in group['params']):,}",
                        ", ".join(shown[:2]) + (", ..." if len(shown) > 2 else ""),
                    ],
                )
            )
        return [row for _, row in sorted(rows)]

    def show(self, stream: TextIO | None = None) -> None:
        """Print what would be trained, layer by layer, and leave the folder as it was."""
        with self._held:
            for name, fact in self._facts().items():
                self.progress.note(f"{name:10} {fact}")
            columns = ["layer", "share", "rate", "decay", "tensors", "weights", "such as"]
            print_table(columns, self.layer_rows(), title="Learning rates by layer", left=(0, 6), stream=stream)

    def _finish(self, weights: dict[str, Any], history: History, facts: dict[str, str]) -> tuple[Any, Path]:
        config, device = self.config, self.accelerator.device
        model: Finetuned = build_model(config.to_dict())
        model.load_state_dict(weights)
        exported = self.output / config.the_method.exported
        files.save(exported, config.the_method.content(model))
        model.to(device).eval()
        tested = self._test(model)
        files.write_text(self.output / "results.json", tested.to_json(self.classes))
        content = FinetuneReport(
            config=config,
            run_facts=facts,
            entries=history.entries,
            steps_per_epoch=self.plan.steps_per_epoch,
            heads=history.during.picture(),
            during=Epochs.of(history.during.entries),
            layers=self.layer_rows(),
            tested=tested,
            classes=self.classes,
            pictures=tested.mistakes(config.pictures, self.split.test, self.augmentation),
            arguments=model.timm_arguments(),
            files=[exported, *([self.output / BEST] if (self.output / BEST).is_file() else [])],
            versions=versions(),
            backends=backends_of(device, self.precision, config.the_method.ops),
        )
        self.progress.note(f"{content.result}")
        return content, write_report(self.output / "report.html", content)

    def _test(self, model: Finetuned) -> Tested:
        images: LabelledImages = self.split.test
        with self.accelerator.autocast():
            return test_all(
                model, images, self.augmentation, self.config.batch_size, self._workers(), self.accelerator.device
            )


def _labels_in_words(labels: str) -> str:
    """The setting, before what came of it."""
    return "" if labels == "all" else f"{labels}, " if labels.endswith("%") else f"{labels} of each class, "
