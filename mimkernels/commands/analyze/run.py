"""One analysis from its settings to its page. Everything is checked before the first file is written."""

import contextlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from mimkernels.commands.analyze import results
from mimkernels.commands.analyze.config import AnalyzeConfig
from mimkernels.commands.analyze.measure import (
    HEAD_QUANTITIES,
    LEFT_OUT,
    OUTPUT_QUANTITIES,
    STATE_QUANTITIES,
    measure,
)
from mimkernels.commands.analyze.report import AnalysisReport, Size, check_same_size, write_report
from mimkernels.commands.analyze.results import Measured, Model
from mimkernels.data.labelled import LabelledImages
from mimkernels.data.pixels import Decoder
from mimkernels.data.split import open_part
from mimkernels.engine import files
from mimkernels.engine.command import told_failures
from mimkernels.engine.encoder import FrozenEncoder, load_same_encoder
from mimkernels.engine.environment import start_accelerator, versions
from mimkernels.engine.hardware import device_name, loading_workers
from mimkernels.engine.head_history import FIXED_IMAGES, Epochs
from mimkernels.engine.lock import folder_lock
from mimkernels.engine.model_names import ModelChoice, parse_models
from mimkernels.engine.progress import Progress, counted, duration
from mimkernels.engine.published import LoadReport


@dataclass
class AnalysisResult:
    """What an analysis found."""

    models: list[Model]
    report: Path
    numbers: dict[str, Any]  # as --json prints them
    measured: int  # models that ran; the others were kept from before


def analyze(config: AnalyzeConfig, *, overwrite: bool = False, stream: TextIO | None = None) -> AnalysisResult:
    """Check everything, then analyse; the arguments are those of ``AnalyzeRun``.

    Raises:
        ValueError: a setting, the data or a model does not fit; nothing has been written.
        TrainingError: no image can be read, out of memory, disk full.
    """
    return AnalyzeRun(config, overwrite=overwrite, stream=stream).execute()


class AnalyzeRun:
    """An analysis that has been checked and is ready to start.

    Args:
        config: what to analyse.
        overwrite: run every model anew.
        stream: where progress goes (default: standard output, or standard error with `as_json`).
        as_json: print every number to standard output.
    """

    def __init__(
        self, config: AnalyzeConfig, *, overwrite: bool = False, stream: TextIO | None = None, as_json: bool = False
    ) -> None:
        config.check()
        self.config, self.overwrite, self.as_json = config, overwrite, as_json
        self.output = Path(config.output)
        files.check_writable(config.output)
        files.check_own_folder(self.output, AnalyzeConfig)
        self.accelerator, self.precision, self.precision_reason = start_accelerator(config.device, config.precision)
        self.choices = parse_models(config.models)
        self.images = open_images(config)
        self.epochs = self._epochs() if config.during else {}
        # One at a time is held later; here each shows that it can be loaded.
        self.keys: list[str] = []
        self.loading: list[LoadReport | None] = []
        sizes: dict[str, list[Size]] = {}
        for choice in self.choices:
            encoder = load_same_encoder(choice)
            self.keys.append(self._key(encoder))
            self.loading.append(encoder.loading)
            sizes.setdefault(choice.name, []).append(_size(encoder))
        for name, found in sizes.items():
            check_same_size(name, found)
        stream = stream or (sys.stderr if as_json else sys.stdout)
        self.progress = Progress(total_steps=1, steps_per_epoch=1, quiet=False, stream=stream)
        with contextlib.ExitStack() as held:
            held.enter_context(folder_lock(self.output))
            self._held = held.pop_all()

    def execute(self) -> AnalysisResult:
        """Run each model that is not kept from before, and write the page and the numbers."""
        with self._held, told_failures(self.output, self.accelerator.device, "lower --batch-size", self._going_on):
            return self._execute()

    def _going_on(self) -> str:
        if not any((self.output / "models").glob("*")):
            return "no model was finished, and nothing is kept"
        return f"the same command goes on with the models that {self.output} holds"

    def _execute(self) -> AnalysisResult:
        files.sweep(self.output, self.output / "models")
        models: dict[str, Model] = {}
        ran = 0
        for choice, key, loading in zip(self.choices, self.keys, self.loading, strict=True):
            if loading is not None:
                self.progress.note(f"{choice.name}: {loading.text}")
            path = self.output / "models" / f"{key}.pt"
            measured = None if self.overwrite else results.load(path)
            if measured is None:
                measured = self._measure(choice)
                results.save(path, measured)
                ran += 1
            else:
                self.progress.note(f"{choice.name}: kept from {path}")
            measured.facts["loading"] = None if loading is None else loading._asdict()
            models.setdefault(choice.name, Model(choice.name, [])).runs.append(measured)
        report = AnalysisReport(self.config, list(models.values()), self.epochs, self._facts(), versions())
        numbers = report.numbers
        text = json.dumps(numbers, indent=1)
        page = write_report(self.output, report, text)
        for finding in report.findings:
            self.progress.note(f"- {finding}")
        self.progress.note(f"report: {page}")
        if self.as_json:
            print(text)
        return AnalysisResult(report.models, page, numbers, ran)

    def _measure(self, choice: ModelChoice) -> Measured:
        encoder = load_same_encoder(choice)
        began = noted = time.perf_counter()

        def note(text: str) -> None:
            nonlocal noted
            if time.perf_counter() - noted > 10:
                noted = time.perf_counter()
                self.progress.note(f"{choice.name}: {text}")

        measured = measure(encoder, self.images, self.config, self.accelerator, self._workers(), note)
        seconds = time.perf_counter() - began
        self.progress.note(f"{choice.name}: {measured.facts['images']:,} images in {duration(seconds)}")
        for line in measured.notes:
            if line.endswith(LEFT_OUT):
                self.progress.note(f"{choice.name}: {line}")
        return measured

    def _key(self, encoder: FrozenEncoder) -> str:
        config = self.config
        heads = [getattr(part, "num_heads", None) for part in encoder.modules()]
        quantities = (HEAD_QUANTITIES, STATE_QUANTITIES, OUTPUT_QUANTITIES)
        options = (config.unit, config.batch_size, self.precision, config.pixel_range, config.depth_probe,
                   config.importance, config.viewer_images, quantities)  # fmt: skip
        model = (type(encoder.model).__name__, heads, encoder.fingerprint(), encoder.built_by)
        return results.key_of(model, self.images.fingerprint(), options)

    def _epochs(self) -> dict[str, list[Epochs]]:
        """What the runs of each model recorded while they were trained; models without are left out."""
        recorded: dict[str, list[Epochs]] = {}
        for choice in self.choices:
            path = Path(choice.model)
            epochs = Epochs.read(path if path.is_dir() else path.parent.parent)
            if epochs is not None:
                recorded.setdefault(choice.name, []).append(epochs)
        if not recorded:
            raise ValueError(
                f"during: none of {', '.join(choice.model for choice in self.choices)} is a run that recorded its "
                f"heads ({FIXED_IMAGES} in its folder): train with `mimkernels pretrain --analyze-every EPOCHS`"
            )
        return recorded

    def _workers(self) -> int:
        return loading_workers(self.config.workers, self.accelerator.device.type, self.images.source.in_memory)

    def _facts(self) -> dict[str, str]:
        return {
            "Data": f"{self.config.data}: {len(self.images):,} images of {len(self.images.source):,}",
            "Device": device_name(self.accelerator.device),
            "Precision": f"{self.precision} ({self.precision_reason})",
        }


def _size(encoder: FrozenEncoder) -> Size:
    """What the facts of its pass will say."""
    blocks = [block for stage in encoder.stages for block in stage]
    heads = max((getattr(getattr(block, "attn", None), "num_heads", 0) for block in blocks), default=0)
    return Size(len(blocks), heads, encoder.dim, encoder.num_prefix, encoder.grid)


def open_images(config: AnalyzeConfig) -> LabelledImages:
    """Images spread evenly over the part of the set that is wanted; class -1 where they have none."""
    decoder = Decoder.from_settings(config.max_pixels, config.pixel_range)
    source = open_part(config.data, config.data_root, test=config.split == "test", decoder=decoder)
    try:
        numbers, _ = source.targets()
    except ValueError:
        numbers = [-1] * len(source)
    if len(source) < 4:
        raise ValueError(f"{source.name!r} has {counted(len(source), 'image')}; CKA needs at least 4")
    chosen = np.linspace(0, len(source) - 1, min(config.images, len(source))).round().astype(int)
    return LabelledImages(source, chosen, torch.tensor(numbers, dtype=torch.int64)[torch.from_numpy(chosen)])
