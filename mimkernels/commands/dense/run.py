"""Dense readouts from their settings to their report. Everything is checked before the first file is written."""

import contextlib
import json
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from mimkernels.commands.dense.config import DenseConfig, Readout, parse_layers
from mimkernels.commands.dense.data import DenseData
from mimkernels.commands.dense.features import kept_maps, layer_maps
from mimkernels.commands.dense.report import DenseReport, print_results, write_report
from mimkernels.commands.dense.results import ReadoutResult
from mimkernels.commands.dense.sources import open_source
from mimkernels.commands.dense.tasks import TASKS
from mimkernels.commands.dense.tasks.base import Features, Job
from mimkernels.data.warps import random_warps
from mimkernels.engine import files
from mimkernels.engine.command import TrainingError, told_failures
from mimkernels.engine.encoder import load_same_encoder
from mimkernels.engine.environment import start_accelerator, versions
from mimkernels.engine.hardware import device_name
from mimkernels.engine.lock import folder_lock
from mimkernels.engine.model_names import ModelChoice, parse_models
from mimkernels.engine.progress import Progress, duration
from mimkernels.engine.settings import require

_MIRRORED = {"test": "test mirrored", "whole": "whole mirrored"}  # parts of what is encoded


@dataclass
class DenseResult:
    """How a run ended: what was read, the page, and how many models ran over images."""

    results: list[ReadoutResult]
    report: Path
    encoded: int


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
        overwrite: encode anew what ``config.output`` holds features of, and replace a report of other data.
        stream: where progress goes (default: standard output).
    """

    def __init__(self, config: DenseConfig, *, overwrite: bool = False, stream: TextIO | None = None) -> None:
        config.check()
        self.config, self.overwrite, self.output = config, overwrite, Path(config.output)
        self.stream = stream or sys.stdout
        for name in config.chosen_tasks:
            require(name in TASKS, "tasks", repr(name), f"among {', '.join(TASKS)}")
        self.source = open_source(config)
        names = config.chosen_tasks or [name for name in TASKS if set(TASKS[name].targets) <= set(self.source.targets)]
        self.tasks = [task for name, task in TASKS.items() if name in names]
        for task in self.tasks:
            task.check(self.source)
        if config.copies and not self._learns:
            raise ValueError(
                f"copies are learnt from, got {config.copies}, but the tasks learn nothing: "
                f"{', '.join(task.name for task in self.tasks)}"
            )
        averaged = any({"labels", "depths"} & {*task.targets} for task in self.tasks)
        if config.flip_test and not averaged:
            raise ValueError(
                f"flip_test averages what is read of labels or depths, the tasks are "
                f"{', '.join(task.name for task in self.tasks)}"
            )
        self.mirrors = averaged and (self.source.flip_test if config.flip_test is None else config.flip_test)
        files.check_writable(config.output)
        files.check_own_folder(self.output, DenseConfig)
        self._check_same_data()
        self.accelerator, self.precision, self.precision_reason = start_accelerator(config.device, config.precision)
        self.choices = parse_models(config.models)
        self.readouts: list[list[Readout]] = []
        self.loading: dict[str, str] = {}
        for choice in self.choices:  # one at a time is held later; here each shows that it can be loaded
            encoder = load_same_encoder(choice)
            self.readouts.append(parse_layers(config.layers, encoder.num_layers, choice.name))
            if encoder.loading is not None:
                self.loading[choice.name] = encoder.loading.text
        self.progress = Progress(total_steps=1, steps_per_epoch=1, quiet=False, stream=self.stream)
        with contextlib.ExitStack() as held:
            held.enter_context(folder_lock(self.output))
            self._held = held.pop_all()

    def _check_same_data(self) -> None:
        """A report of other data is not written over, unless that is asked for."""
        saved = {} if self.overwrite else files.saved_settings(self.output) or {}
        for name in ("data", "data_root"):
            there, here = saved.get(name), getattr(self.config, name)
            if there is not None and there != here:
                raise ValueError(
                    f"output {str(self.output)!r} holds a report with {name} {there!r}, these are of {here!r}: choose "
                    "another --output, or replace it with --overwrite"
                )

    def execute(self) -> DenseResult:
        """Encode what is not kept from before, read, and write the page and the numbers."""
        remedy = "lower --encoder-batch or --batch-size"
        with self._held, told_failures(self.output, self.accelerator.device, remedy, self._going_on):
            return self._execute()

    def _going_on(self) -> str:
        return f"the same command goes on with the features that {self.output} holds"

    def _execute(self) -> DenseResult:
        config, note = self.config, self.progress.note
        files.sweep(self.output, self.output / "features")
        began = time.perf_counter()
        data, further = self._load()
        learnt = f"{len(data.train):,} + " if self._learns else ""
        note(f"{learnt}{len(data.test):,} {data.content} in {duration(time.perf_counter() - began)}")
        results: list[ReadoutResult] = []
        encoded = 0
        for choice, readouts in zip(self.choices, self.readouts, strict=True):
            if choice.name in self.loading:
                note(f"{choice.name}: {self.loading[choice.name]}")
            began = time.perf_counter()
            maps, kept = self._maps(choice, readouts, data, further)
            encoded += not kept
            seconds = duration(time.perf_counter() - began)
            note(f"{choice.name}: features {'kept from before' if kept else f'encoded in {seconds}'}")
            for readout in readouts:
                began = time.perf_counter()
                results.append(self._read(choice.name, readout, maps, data))
                note(f"{results[-1].label}: {results[-1].summary} ({duration(time.perf_counter() - began)})")
        report = DenseReport(config, data, results, self._facts(data), versions())
        numbers = {"classes": list(data.classes), "results": [result.numbers for result in results]}
        page = write_report(self.output, report, json.dumps(files.json_numbers(numbers), indent=1))
        print_results(results, len(data.test), self.stream)
        note(f"report: {page}")
        return DenseResult(results, page, encoded)

    def _load(self) -> tuple[DenseData, dict[str, Tensor]]:
        """The data, and further images by the tasks that want them."""
        try:
            data = self.source.load()
            for task in self.tasks:
                task.check_loaded(data)
        except ValueError as e:
            raise TrainingError(str(e)) from e
        if data.left_out:
            warnings.warn(f"{data.left_out}; they are left out", stacklevel=2)
        if not self._learns:
            data.train = data.train.first(0)
        data.test.warps = random_warps(len(data.test), self.config.seed)
        wanted = {task.name: task.further_images(data) for task in self.tasks}
        return data, {name: images for name, images in wanted.items() if images is not None}

    @property
    def _learns(self) -> bool:
        return any(task.targets for task in self.tasks)

    def _maps(
        self, choice: ModelChoice, readouts: list[Readout], data: DenseData, further: dict[str, Tensor]
    ) -> tuple[dict[str, dict[int, Tensor]], bool]:
        """Maps of all layers that are read: of "train" and "test" images, "whole" ones, and further ones by task."""
        encoder = load_same_encoder(choice)
        layers = sorted({layer for readout in readouts for layer in readout.layers})
        key = (
            encoder.fingerprint(), type(encoder.model).__name__, encoder.built_by, layers, self.precision,
            *self.source.key(), self._learns, dict.fromkeys(further, self.config.seed),
            *(["mirrored"] if self.mirrors else []),
        )  # fmt: skip
        parts = {"train": data.train.images, "test": data.test.images, **further}
        if data.whole is not None:
            parts["whole"] = data.whole.windows.images
        if self.mirrors:
            parts |= {_MIRRORED[name]: parts[name].flip(-1) for name in _MIRRORED if name in parts}

        def make() -> dict[int, Tensor]:
            encoder.to(self.accelerator.device)
            return layer_maps(
                encoder, torch.cat(list(parts.values())), layers, self.accelerator, self.config.encoder_batch,
                lambda text: self.progress.note(f"{choice.name}: {text}"),
            )  # fmt: skip

        maps, kept = kept_maps(self.output / "features", key, make, anew=self.overwrite)
        counts = [len(images) for images in parts.values()]
        split = {layer: dict(zip(parts, values.split(counts), strict=True)) for layer, values in maps.items()}
        return {name: {layer: values[name] for layer, values in split.items()} for name in parts}, kept

    def _read(self, model: str, readout: Readout, maps: dict[str, dict[int, Tensor]], data: DenseData) -> ReadoutResult:
        chosen = {name: [part[layer] for layer in readout.layers] for name, part in maps.items()}
        train, test = Features(chosen["train"], data.train), Features(chosen["test"], data.test)
        result = ReadoutResult(
            model, readout, sum(each.shape[1] for each in test.maps), (test.maps[0].shape[2], test.maps[0].shape[3])
        )
        for task in self.tasks:
            torch.manual_seed(self.config.seed)
            job = Job(
                self.config, data, train, test, self.accelerator.device, f"{task.name} of {result.label}",
                whole=chosen.get("whole", []), further=chosen.get(task.name, []),
                mirrored=chosen.get(_MIRRORED["test"], []), whole_mirrored=chosen.get(_MIRRORED["whole"], []),
            )  # fmt: skip
            reading = task.read(job)
            reading.predictions = reading.predictions[: self.config.pictures].clone()
            result.readings[task.name] = reading
        return result

    def _facts(self, data: DenseData) -> dict[str, str]:
        side = self.config.side
        learnt = f"{len(data.train):,} {data.content} to learn from, " if len(data.train) else ""
        windows = "" if data.whole is None else f", whole, by {len(data.whole.windows.images):,} windows"
        mirrored = ", each averaged with its mirror image" if self.mirrors else ""
        return {
            "Data": f"{learnt}{len(data.test):,} {data.content} to test on{windows}{mirrored}, {side} x {side} pixels",
            **({"Left out": data.left_out} if data.left_out else {}),
            "Device": device_name(self.accelerator.device),
            "Precision": f"{self.precision} ({self.precision_reason})",
            **{f"Loading of {name}": text for name, text in self.loading.items()},
        }
