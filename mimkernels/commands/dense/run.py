"""Dense readouts from their settings to their report. Everything is checked before the first file is written."""

import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from mimkernels.commands.dense.config import DenseConfig, Readout, parse_layers
from mimkernels.commands.dense.features import kept_maps, layer_maps
from mimkernels.commands.dense.heads import LinearDepth, LinearSegmentation, NearestPatches, predict, train
from mimkernels.commands.dense.metrics import confusion, depth_scores, segmentation_scores
from mimkernels.commands.dense.report import DenseReport, print_results, write_report
from mimkernels.commands.dense.results import Pictured, ReadoutResult
from mimkernels.data.scenes import CLASSES, DEPTHS, Scenes, make_scenes
from mimkernels.engine import files
from mimkernels.engine.command import told_failures
from mimkernels.engine.encoder import load_same_encoder
from mimkernels.engine.environment import start_accelerator, versions
from mimkernels.engine.hardware import device_name
from mimkernels.engine.lock import folder_lock
from mimkernels.engine.model_names import ModelChoice, parse_models
from mimkernels.engine.progress import Progress, duration


@dataclass
class DenseResult:
    """How a run ended: what was read, the page, and how many models ran over images."""

    results: list[ReadoutResult]
    report: Path
    encoded: int


@dataclass
class Split:
    """Images as tensors, with what is true of their pixels."""

    images: Tensor  # [n, 3, S, S] uint8
    labels: Tensor  # [n, S, S] uint8
    depths: Tensor  # [n, S, S] fp32

    @classmethod
    def of(cls, scenes: Scenes) -> "Split":
        return cls(*map(torch.from_numpy, scenes))


def dense(config: DenseConfig, *, overwrite: bool = False, stream: TextIO | None = None) -> DenseResult:
    """Check everything, then read; the arguments are those of ``DenseRun``.

    Raises:
        ValueError: an argument or a model does not fit, or another run is at work in the folder; nothing has been
            written.
        TrainingError: training could not go on (loss not finite, out of memory, disk full).
    """
    return DenseRun(config, overwrite=overwrite, stream=stream).execute()


class DenseRun:
    """Dense readouts that have been checked and are ready to start.

    Args:
        config: what to read, and from which models.
        overwrite: encode anew what ``config.output`` holds features of.
        stream: where progress goes (default: standard output).
    """

    def __init__(self, config: DenseConfig, *, overwrite: bool = False, stream: TextIO | None = None) -> None:
        config.check()
        self.config, self.overwrite, self.output = config, overwrite, Path(config.output)
        self.stream = stream or sys.stdout
        files.check_writable(self.output)
        self.accelerator, self.precision, self.precision_reason = start_accelerator(config.device, config.precision)
        self.choices = parse_models(config.models)
        self.readouts: list[list[Readout]] = []
        self.loading: dict[str, str] = {}
        for choice in self.choices:  # one at a time is held later; here each shows that it can be loaded
            encoder = load_same_encoder(choice)
            self.readouts.append(parse_layers(config.layers, encoder.num_layers))
            if encoder.loading is not None:
                self.loading[choice.name] = encoder.loading.text
        self.progress = Progress(total_steps=1, steps_per_epoch=1, quiet=False, stream=self.stream)
        with contextlib.ExitStack() as held:
            held.enter_context(folder_lock(self.output))
            self._held = held.pop_all()

    def execute(self) -> DenseResult:
        """Encode what is not kept from before, read, and write the page and the numbers."""
        with self._held, told_failures(self.output, self.accelerator.device, "lower --encoder-batch or --batch-size"):
            return self._execute()

    def _execute(self) -> DenseResult:
        config, note = self.config, self.progress.note
        files.sweep(self.output, self.output / "features")
        began = time.perf_counter()
        # Other numbers than those of the training images, whatever their count.
        parts = [
            Split.of(make_scenes(count, config.side, seed))
            for count, seed in ((config.train_images, 2 * config.seed), (config.test_images, 2 * config.seed + 1))
        ]
        note(f"{config.train_images:,} + {config.test_images:,} scenes in {duration(time.perf_counter() - began)}")
        results: list[ReadoutResult] = []
        encoded = 0
        for choice, readouts in zip(self.choices, self.readouts, strict=True):
            if choice.name in self.loading:
                note(f"{choice.name}: {self.loading[choice.name]}")
            began = time.perf_counter()
            maps, kept = self._maps(choice, readouts, parts)
            encoded += not kept
            seconds = duration(time.perf_counter() - began)
            note(f"{choice.name}: features {'kept from before' if kept else f'encoded in {seconds}'}")
            for readout in readouts:
                began = time.perf_counter()
                results.append(self._read(choice.name, readout, maps, parts))
                note(f"{results[-1].label}: {results[-1].summary} ({duration(time.perf_counter() - began)})")
        shown = slice(0, config.pictures)
        pictured = Pictured(*(part[shown] for part in (parts[1].images, parts[1].labels, parts[1].depths)))
        report = DenseReport(config, list(CLASSES), results, pictured, self._facts(), versions())
        page = write_report(self.output / "report.html", report)
        numbers = {"classes": list(CLASSES), "results": [result.numbers for result in results]}
        files.write_text(self.output / "numbers.json", json.dumps(numbers, indent=1) + "\n")
        files.write_text(self.output / "config.json", config.to_json())
        print_results(results, config.test_images, self.stream)
        note(f"report: {page}")
        return DenseResult(results, page, encoded)

    def _maps(self, choice: ModelChoice, readouts: list[Readout], parts: list[Split]) -> tuple[dict[int, Tensor], bool]:
        """Maps of all layers that are read, of training and test images after each other."""
        config = self.config
        encoder = load_same_encoder(choice)
        layers = sorted({layer for readout in readouts for layer in readout.layers})
        key = (
            encoder.fingerprint(), type(encoder.model).__name__, choice.model_kwargs, layers, self.precision,
            config.data, config.side, config.seed, config.train_images, config.test_images,
        )  # fmt: skip

        def make() -> dict[int, Tensor]:
            encoder.to(self.accelerator.device)
            images = torch.cat([part.images for part in parts])
            return layer_maps(
                encoder, images, layers, self.accelerator, config.encoder_batch,
                lambda text: self.progress.note(f"{choice.name}: {text}"),
            )  # fmt: skip

        return kept_maps(self.output / "features", key, make, anew=self.overwrite)

    def _read(self, model: str, readout: Readout, maps: dict[int, Tensor], parts: list[Split]) -> ReadoutResult:
        config, device, (fitted, tested) = self.config, self.accelerator.device, parts
        count = config.train_images
        chosen = [maps[layer] for layer in readout.layers]
        train_maps, test_maps = [each[:count] for each in chosen], [each[count:] for each in chosen]
        channels, size = sum(each.shape[1] for each in chosen), (config.side, config.side)
        result = ReadoutResult(model, readout, channels, (chosen[0].shape[2], chosen[0].shape[3]))

        def keep(task: str, reads: Callable[[Tensor, tuple[int, int]], Tensor]) -> Tensor:
            predicted = predict(reads, test_maps, size, device)
            result.predictions[task] = predicted[: config.pictures].clone()
            return predicted

        for task in config.chosen_tasks:
            torch.manual_seed(config.seed)
            what = f"{task} of {result.label}"
            if task == "depth":
                depth = LinearDepth(channels, *DEPTHS, config.depth_bins)
                decay = config.weight_decay / 10
                result.losses[task] = train(depth, train_maps, fitted.depths, config, decay, device, what)
                result.depth = depth_scores(keep(task, depth.eval().predict), tested.depths, *DEPTHS)
                continue
            if task == "segmentation":
                linear = LinearSegmentation(channels, len(CLASSES), config.dropout)
                result.losses[task] = train(
                    linear, train_maps, fitted.labels, config, config.weight_decay, device, what
                )
                predicted = keep(task, linear.eval().predict)
                result.segmentation = segmentation_scores(confusion(predicted, tested.labels, len(CLASSES)))
            else:
                nearest = NearestPatches(
                    train_maps, fitted.labels, len(CLASSES), config.neighbours, config.seed, device
                )
                predicted = keep(task, nearest.predict)
                result.knn = segmentation_scores(confusion(predicted, tested.labels, len(CLASSES)))
        return result

    def _facts(self) -> dict[str, str]:
        config = self.config
        return {
            "Data": f"{config.train_images:,} rooms to learn from, {config.test_images:,} to test on, {config.side} x "
            f"{config.side} pixels",
            "Device": device_name(self.accelerator.device),
            "Precision": f"{self.precision} ({self.precision_reason})",
            **{f"Loading of {name}": text for name, text in self.loading.items()},
        }
