"""One probe from its settings to its report. Everything is checked before the first file is written."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from mimkernels.commands.probe.config import ProbeConfig, parse_poolings
from mimkernels.commands.probe.features import Encoded, Extractor, Features
from mimkernels.commands.probe.report import ProbePictures, ProbeReport, print_results, write_report
from mimkernels.commands.probe.results import PoolingResult, count_tested
from mimkernels.commands.probe.train import (
    Probe,
    ProbeTrainer,
    Stopwatch,
    Trained,
    accuracies,
    build_optimizer,
    knn_accuracy,
)
from mimkernels.data.batches import Augmentation, BatchPlan, derived_seed, make_loader
from mimkernels.data.labelled import EncoderImages, collate_images
from mimkernels.data.split import open_split
from mimkernels.engine import files
from mimkernels.engine.checkpoint import are_tensors
from mimkernels.engine.command import TrainingError, told_failures
from mimkernels.engine.encoder import load_same_encoder
from mimkernels.engine.environment import start_accelerator, versions
from mimkernels.engine.hardware import device_name, loading_workers
from mimkernels.engine.lock import folder_lock
from mimkernels.engine.progress import Progress, counted, duration
from mimkernels.engine.readout import logistic_accuracy
from mimkernels.engine.settings import is_of_type
from mimkernels.models.checkpoint import check_by_name, read_file
from mimkernels.nn import build_pooling
from mimkernels.nn.pooling_choice import PoolingChoice

# Settings that change no number of a pooling's result; the range of the pixels is part of the data's fingerprint.
_FREE = (
    "pooling",
    "output",
    "pictures",
    "title",
    "workers",
    "cache_gib",
    "device",
    "model",
    "data_root",
    "pixel_range",
)
_FREE_WITHOUT_AUGMENT = ("crop_scale",)
_DIGESTS = ("encoder", "training images", "test images")  # of a probe's identity, beside its settings

_PUBLISHED_CROP = 0.08  # smallest area of a crop in MAE's linear probing


@dataclass
class ProbeResult:
    """How a probe ended."""

    output: Path
    results: list[PoolingResult]
    stopped_by: int  # number of the signal that ended it early, 0 if it went to its end
    report: Path | None = None
    content: ProbeReport | None = None  # what the report shows

    @property
    def test_images(self) -> int:
        return count_tested(self.results)


def probe(config: ProbeConfig, *, overwrite: bool = False, stream: TextIO | None = None) -> ProbeResult:
    """Check everything, then probe; the arguments are those of ``ProbeRun``.

    Raises:
        ValueError: an argument, the data or the checkpoint does not fit, or another run is at work in the folder;
            nothing has been written.
        TrainingError: training could not go on (loss not finite, too few images readable, out of memory, disk full).
    """
    return ProbeRun(config, overwrite=overwrite, stream=stream).execute()


class ProbeRun:
    """A probe that has been checked and is ready to start: constructing it locks the folder and writes nothing else.

    A folder that holds results of the same encoder, data and recipe is continued: finished poolings are kept,
    interrupted ones go on where they were. What is damaged of either is said and trained anew.

    Args:
        config: what to probe.
        overwrite: forget what ``config.output`` holds.
        stream: where progress goes (default: standard output).
    """

    def __init__(self, config: ProbeConfig, *, overwrite: bool = False, stream: TextIO | None = None) -> None:
        config.check()
        self.config, self.output = config, Path(config.output)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("a probe runs in one process; start it without torchrun or accelerate launch")
        files.check_writable(config.output)
        files.check_own_folder(self.output, ProbeConfig)
        self.overwrite, self.stream = overwrite, stream
        with contextlib.ExitStack() as held:
            held.enter_context(folder_lock(self.output))
            self._check()
            self._held = held.pop_all()

    def _check(self) -> None:
        """Check everything that can be wrong before training begins."""
        config = self.config
        self.accelerator, self.precision, self.precision_reason = start_accelerator(config.device, config.precision)
        self.encoder = load_same_encoder(config)
        self.choices = parse_poolings(config.pooling)
        self.split = open_split(config, self.encoder.pixel_range)
        self.probes = {choice.label: self._build(choice) for choice in self.choices}
        plan = BatchPlan(len(self.split.train), config.batch_size, 1, 1, config.seed)
        self.steps = config.epochs * plan.steps_per_epoch
        source = self.split.train.source
        usual = source.crop_scale if source.in_memory else _PUBLISHED_CROP
        crop = usual if config.crop_scale is None else config.crop_scale
        self.augmentation = Augmentation(self.encoder.img_size, self.encoder.in_chans, crop, source.mirrored)
        self.encoder.to(self.accelerator.device)
        self.identity = self._identity()
        self.warnings: list[str] = []
        self.left_out: dict[str, None] = {}  # in words, what could not be read
        self.finished = {} if self.overwrite else self._finished_before()
        self.unfinished = None if self.overwrite else self._unfinished_before()
        self.progress = Progress(total_steps=1, steps_per_epoch=1, quiet=False, stream=self.stream)

    def execute(self) -> ProbeResult:
        """Encode, train what is not finished, test, write the report."""
        with (
            self._held,
            told_failures(
                self.output,
                self.accelerator.device,
                "lower --batch-size or --cache-gib",
                lambda: f"the same command goes on with what {self.output} holds",
            ),
        ):
            return self._execute()

    def _execute(self) -> ProbeResult:
        progress = self.progress
        self._clear_folder()
        for text in self.warnings:
            progress.note(f"warning: {text}")
        to_train = [choice for choice in self.choices if choice.label not in self.finished]
        facts = self._facts()
        for name, fact in facts.items():
            progress.note(f"{name:10} {fact}")
        if self.finished:
            kept = [choice.label for choice in self.choices if choice.label in self.finished]
            progress.note(f"kept from {self.output}: {', '.join(kept) or 'none of these'}")
        self.extractor = Extractor(self.encoder, self.accelerator, self.config.batch_size, self._workers(), progress)
        self.extractor.left_out = self.left_out
        stopped_by = self._train(to_train) if to_train else 0
        results = [self.finished[choice.label] for choice in self.choices if choice.label in self.finished]
        report = content = None
        if not stopped_by:
            if self.extractor.encoded:
                images = self.extractor.encoded
                facts["Encoding"] = f"{images:,} images in {duration(self.extractor.seconds)}"
            if self.left_out:
                facts["Left out"] = "; ".join(self.left_out)
            content = self._report(results, facts)
            report = write_report(self.output / "report.html", content)
            print_results(results, self.stream)
            progress.note(f"report: {report}")
        return ProbeResult(self.output, results, stopped_by, report, content)

    def _train(self, choices: list[PoolingChoice]) -> int:
        config, split, device, progress = self.config, self.split, self.accelerator.device, self.progress
        probes = {choice.label: self.probes[choice.label].to(device) for choice in choices}
        fixed = {label: probe.pooling for label, probe in probes.items() if not probe.pooling.num_parameters}
        size = 4 * (len(split.train) + len(split.test)) * self.encoder.num_tokens * self.encoder.dim
        cached = len(fixed) < len(probes) and size <= config.cache_gib * 2**30
        keep_train = cached and not config.augment
        test = self.extractor.features(self._images("test"), fixed, cached, "encoding test images")
        train = Features(split.train)
        if keep_train or fixed:
            train = self.extractor.features(self._images("train"), fixed, keep_train, "encoding training images")
        if keep_train:
            progress.note(f"encoded {len(train.images) + len(test.images):,} images once; "
                          f"{size / 2**20:,.0f} MiB of tokens in memory")  # fmt: skip
        if len(train.images) < config.batch_size:
            raise TrainingError(
                f"{len(train.images)} of {len(split.train)} training images can be read, fewer than batch_size "
                f"{config.batch_size}: mend the files or lower --batch-size"
            )
        plan = BatchPlan(len(train.images), config.batch_size, 1, 1, config.seed)
        state = self.unfinished
        if state is not None and sorted(state["probes"]) != sorted(probes):
            state = None  # of other poolings
        progress = self.progress = Progress(
            total_steps=config.epochs * plan.steps_per_epoch,
            steps_per_epoch=plan.steps_per_epoch,
            quiet=False,
            stream=self.stream,
        )
        in_training = [
            Trained(label, probe, build_optimizer(config, probe, self.steps), Stopwatch(device))
            for label, probe in probes.items()
        ]
        if state is not None:
            for trained in in_training:
                try:
                    trained.load_state_dict(state["probes"][trained.label], device)
                except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as e:
                    raise TrainingError(
                        f"{str(self._state_path)!r} does not fit pooling {trained.label!r}: remove it, or --overwrite"
                    ) from e
            progress.note(f"continuing at step {state['step']:,}")
        # With augmentation every image is new, and vectors pooled before are of no use.
        streamed = config.augment or (not keep_train and len(fixed) < len(probes))
        trainer = ProbeTrainer(
            config,
            in_training,
            plan,
            lambda step: self._batches(train, plan, step, streamed),
            step=0 if state is None else state["step"],
            progress=progress,
            save=lambda content: files.save(self._state_path, {"identity": self.identity, **content}),
        )
        trainer.train()
        if trainer.stopped_by:
            progress.note(f"stopped at step {trainer.step:,}; the same command continues")
            return trainer.stopped_by
        self._test(in_training, train, test)
        return 0

    def _batches(self, train: Features, plan: BatchPlan, first_step: int, streamed: bool) -> Iterator[Encoded]:
        last_step = self.config.epochs * plan.steps_per_epoch
        if not streamed:
            for keys in plan.batches(0, first_step, last_step):
                yield train.batch(torch.tensor([position for _, position in keys]), self.accelerator.device)
            return
        images = EncoderImages(train.images, self.augmentation, self.config.seed, self.config.augment)
        loader = make_loader(
            images,
            plan,
            rank=0,
            first_step=first_step,
            last_step=last_step,
            workers=self._workers(),
            pin_memory=self.accelerator.device.type == "cuda",
            collate_fn=collate_images,
        )
        with_attention = self.config.augment and any(p.pooling.needs_cls_attention for p in self.probes.values())
        for batch in loader:
            if len(batch.positions) < 2:  # the classifier normalises batches
                raise TrainingError(
                    f"{len(batch.positions)} of a batch's {self.config.batch_size} images can be read, 2 are needed; "
                    f"the first that cannot: {batch.broken[0][1]}"
                )
            targets = train.images.targets[batch.positions]
            encoded = self.extractor.encode(batch.images, batch.positions, targets, with_attention)
            assert encoded.tokens is not None
            pooled = {} if self.config.augment else train.batch(batch.positions, encoded.tokens.device).pooled
            yield encoded._replace(pooled=pooled)

    def _test(self, trained: list[Trained], train: Features, test: Features) -> None:
        """Accuracies of what has been trained; saved, with the weights, before anything else is done."""
        device, size = self.accelerator.device, self.config.batch_size
        probes = {one.label: one.probe for one in trained}
        ready = {label: probe for label, probe in probes.items() if label in test.pooled or test.tokens is not None}
        positions = torch.arange(len(test.images)).split(size)
        measured = accuracies(ready, (test.batch(part, device) for part in positions))
        without_features = {label: probe for label, probe in probes.items() if label not in ready}
        if without_features:
            batches = self.extractor.batches(self._images("test"), "encoding test images", False)
            measured |= accuracies(without_features, batches)
        for one in trained:
            label = one.label
            files.save(self._weights_path(label), {"pooling": label, "probe": one.probe.cpu().state_dict()})
            pooling = one.probe.pooling
            by_neighbours = by_regression = None
            fitted, tested = train.pooled.get(label), test.pooled.get(label)
            if fitted is not None and tested is not None:
                vectors = (fitted, train.images.targets, tested, test.images.targets)
                if self.config.knn:
                    by_neighbours = knn_accuracy(*vectors, self.config.knn, len(self.split.classes))
                if self.config.logistic:
                    by_regression = logistic_accuracy(*vectors)
            self.finished[label] = PoolingResult(
                label,
                pooling.description,
                *measured[label],
                by_neighbours,
                by_regression,
                pooling.num_parameters,
                sum(weight.numel() for weight in one.probe.linear.parameters()),
                one.watch.seconds,
                one.losses,
            )
        loading = self.encoder.loading
        saved = {
            "identity": self.identity,
            "loading": None if loading is None else loading._asdict(),
            "left_out": list(self.left_out),
            "results": [asdict(result) for result in self.finished.values()],
        }
        files.write_text(self.output / "config.json", self.config.to_json())
        files.write_text(self.output / "results.json", json.dumps(saved, indent=2) + "\n")
        self._state_path.unlink(missing_ok=True)

    def _build(self, choice: PoolingChoice) -> Probe:
        encoder = self.encoder
        if not encoder.has_cls_token:
            as_if = build_pooling(choice.name, encoder.dim, max(encoder.num_prefix, 1), **choice.options)
            if as_if.needs_cls_token or as_if.needs_cls_attention:
                raise ValueError(
                    f"pooling {choice.label!r} needs a [cls] token, which {encoder.title} has not; take others, such "
                    "as --pooling mean,abmilp,ep"
                )
        # A seed of its own for every pooling: the company that it is trained in changes nothing.
        digest = hashlib.sha256(choice.label.encode()).digest()
        seed = (self.config.seed << 32) ^ int.from_bytes(digest[:4], "little")
        torch.manual_seed(seed if seed < 2**64 else derived_seed(seed))
        options = dict(choice.options)
        if choice.name == "abmilp" and options.get("positions") is True:
            if encoder.grid is None:
                raise ValueError(f"pooling {choice.label!r}: the patches of {encoder.title} form no grid")
            options["positions"] = encoder.grid
        pooling = build_pooling(choice.name, encoder.dim, encoder.num_prefix, **options)
        if pooling.needs_cls_attention:
            encoder.check_attention(f"pooling {choice.label!r}")
        # What only the tokens tell, such as the size of the grid, is refused now as well.
        rows = torch.full((2, 1, encoder.num_tokens), 1 / encoder.num_tokens)
        pooling(torch.randn(2, encoder.num_tokens, encoder.dim), cls_attention=rows)
        for part in pooling.modules():
            if isinstance(part, torch.nn.BatchNorm1d):
                part.reset_running_stats()
        return Probe(pooling, len(self.split.classes))

    def _images(self, part: str) -> EncoderImages:
        return EncoderImages(getattr(self.split, part), self.augmentation, self.config.seed, False)

    def _identity(self) -> dict[str, Any]:
        """What must be equal for results to be comparable: recipe, encoder, data."""
        free = _FREE if self.config.augment else _FREE + _FREE_WITHOUT_AUGMENT
        recipe = {name: value for name, value in self.config.to_dict().items() if name not in free}
        return {
            **recipe,
            "precision": self.precision,
            "encoder": self.encoder.fingerprint(),
            "training images": self.split.train.fingerprint(),
            "test images": self.split.test.fingerprint(),
        }

    def _clear_folder(self) -> None:
        weights = self.output / "probes"
        files.sweep(self.output, weights)
        if self.overwrite:
            # All of it, so that the command given again, without the option, finds nothing of the time before.
            places = [
                self.output / "results.json",
                self._state_path,
                self.output / "report.html",
                *weights.glob("*.pt"),
            ]
            for path in places:
                path.unlink(missing_ok=True)

    def _finished_before(self) -> dict[str, PoolingResult]:
        path = self.output / "results.json"
        if not path.is_file():
            return {}
        try:
            saved = json.loads(path.read_text())
            results = {entry["label"]: PoolingResult.from_entry(entry) for entry in saved["results"]}
            identity = dict(saved["identity"])
            self.left_out.update(dict.fromkeys(map(str, saved.get("left_out", []))))
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise ValueError(f"{str(path)!r} is no result of a probe: replace it with --overwrite") from e
        different = [
            name if name in _DIGESTS else f"{name} {identity.get(name)!r} -> {value!r}"
            for name, value in self.identity.items()
            if identity.get(name) != value
        ]
        if different:
            raise ValueError(
                f"{str(self.output)!r} holds another probe (different: {', '.join(different)}): choose another "
                "--output, or replace it with --overwrite"
            )
        return {label: result for label, result in results.items() if self._weights_are_whole(label)}

    def _weights_are_whole(self, label: str) -> bool:
        """Whether a finished pooling can be used; of one that is not asked for it does not matter."""
        if label not in self.probes:
            return True
        try:
            check_by_name(self.probes[label].state_dict(), self._weights(label), title=f"pooling {label}")
        except (ValueError, FileNotFoundError) as e:
            self.warnings.append(f"{' '.join(str(e).split())}; {label} is trained anew")
            return False
        return True

    def _weights(self, label: str) -> dict[str, torch.Tensor]:
        path = self._weights_path(label)
        content = read_file(path)
        if not isinstance(content, dict) or not are_tensors(content.get("probe")):
            raise ValueError(f"{str(path)!r} holds no weights of a probe")
        return content["probe"]

    def _unfinished_before(self) -> dict[str, Any] | None:
        """The state of an interrupted probe of the same recipe, if there is one."""
        path = self._state_path
        if not path.is_file():
            return None
        try:
            state = read_file(path)
        except ValueError as e:
            self.warnings.append(f"{e}; its poolings are trained anew")
            return None
        if not isinstance(state, dict) or state.get("identity") != self.identity:
            return None
        step: Any = state.get("step")
        probes: Any = state.get("probes")
        if not is_of_type(step, int) or not 0 <= step <= self.steps or not isinstance(probes, dict):
            self.warnings.append(f"{str(path)!r} holds no state of a probe; its poolings are trained anew")
            return None
        return state

    @property
    def _state_path(self) -> Path:
        return self.output / "unfinished.pt"

    def _weights_path(self, label: str) -> Path:
        return self.output / "probes" / f"{re.sub(r'[^A-Za-z0-9+=.-]+', '_', label)}.pt"

    def _workers(self) -> int:
        return loading_workers(self.config.workers, self.accelerator.device.type, self.split.train.source.in_memory)

    def _facts(self) -> dict[str, str]:
        config, split, encoder = self.config, self.split, self.encoder
        rate = (
            f"{config.optimizer}, {counted(config.epochs, 'epoch')}, batch {config.batch_size}, lr {config.peak_lr:.3g}"
        )
        if config.optimizer == "lars":
            rate += f", trust coefficient {config.trust_coefficient(self.steps):.2g}"
        return {
            "Encoder": f"{encoder.title}: {encoder.num_tokens} tokens of {encoder.dim}, frozen",
            **({} if encoder.loading is None else {"Weights": encoder.loading.text}),
            "Data": f"{config.data}: {len(split.train):,} training and {len(split.test):,} test images, "
            f"{len(split.classes)} classes; {split.description}",
            "Recipe": f"pooling, BatchNorm without gain and bias, linear layer; {rate}"
            + (", random crops" if config.augment else ", no augmentation"),
            "Device": device_name(self.accelerator.device),
            "Precision": f"{self.precision} ({self.precision_reason})",
        }

    def _report(self, results: list[PoolingResult], facts: dict[str, str]) -> ProbeReport:
        return ProbeReport(
            config=self.config,
            title=self.config.title or f"Probing {self.encoder.name}",
            run_facts=facts,
            results=results,
            pictures=self._pictures(),
            versions=versions(),
        )

    def _pictures(self) -> ProbePictures | None:
        """Test images spread over the classes, and every pooling's weights on them."""
        if not self.config.pictures or self.encoder.grid is None:
            return None
        weighing = {label: probe for label, probe in self.probes.items() if probe.pooling.gives_weights}
        chosen = self._one_of_every_class(self.config.pictures)
        if not weighing or not chosen:
            return None
        device = self.accelerator.device
        images = torch.stack([image for image, _ in chosen])
        with self.accelerator.autocast():
            encoded = self.encoder(images.to(device), any(p.pooling.needs_cls_attention for p in weighing.values()))
        weights = {}
        for label, probe in weighing.items():
            probe.load_state_dict(self._weights(label))
            probe.to(device).eval()
            with torch.no_grad():
                _, rows = probe.pooling(encoded.tokens, cls_attention=encoded.cls_attention, return_weights=True)
            weights[label] = rows[:, :, self.encoder.num_prefix :].unflatten(2, self.encoder.grid).cpu()
        names = [self.split.classes[int(self.split.test.targets[position])] for _, position in chosen]
        return ProbePictures(images, names, weights)

    def _one_of_every_class(self, count: int) -> list[tuple[torch.Tensor, int]]:
        images, targets = self._images("test"), self.split.test.targets
        classes = targets.unique()
        firsts = [int((targets == number).nonzero()[0]) for number in classes]
        step = max(1, len(firsts) // count)
        read = (images[(0, position)] for position in firsts[::step])
        return [(image, position) for image, position, _ in read if image is not None][:count]
