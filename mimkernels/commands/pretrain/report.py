"""What a pre-training run shows on its page: numbers, the loss, pictures, heads, and what was run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from markupsafe import Markup

from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.commands.pretrain.methods.feature_targets import follows_encoder, stages_of
from mimkernels.engine.figures import loss_curve, png_address
from mimkernels.engine.head_history import STRIP_WORDS, Epochs, Strip, strips
from mimkernels.engine.page import write_page
from mimkernels.engine.progress import count, counted, duration

_PICTURE_WIDTH = 128  # pixels on the page that a small picture is enlarged to, at least
_LEARNED, _RISEN = 0.02, 0.02  # shares of a loss that count as a difference
_PICTURE_LABELS = ("original", "masked", "reconstruction")


class References(NamedTuple):
    """What a loss is to be compared with; all on the same validation images.

    Attributes:
        blind_words, blind: the best answer that looks at no image, and its loss; None where a method has none.
        untrained: loss and metrics of the model before its first step.
        now: those of the trained one.
    """

    blind_words: str
    blind: float | None
    untrained: dict[str, float]
    now: dict[str, float]


@dataclass
class Report:
    """What the templates show of a run.

    Attributes:
        run_facts: what was run, by name.
        entries: log entries; empty where their file was lost.
        heads: picture of the head statistics as a data address.
        during: what the heads do on the same images, over the epochs; None if that was not recorded.
        pictures: originals, masked images and reconstructions, each ``[n, C, S, S]`` in [0, 1].
        pictures_are_new: whether they were not trained on.
        references: what the loss is to be compared with; None without images to validate on.
        masked_share: of the patches, on average; None where none are masked.
    """

    config: PretrainConfig
    run_facts: dict[str, str]
    entries: list[dict[str, float]]
    heads: str | None
    during: Epochs | None
    steps_per_epoch: int
    pictures: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    pictures_are_new: bool
    references: References | None
    masked_share: float | None
    versions: dict[str, str]
    backends: dict[str, str]

    @property
    def title(self) -> str:
        config = self.config
        method = config.the_method.title
        return config.title or f"{method[0].upper()}{method[1:]} pre-training of {config.model} on {config.data}"

    @property
    def lead(self) -> str:
        return self.config.the_method.lead(self.config, self.masked_share)

    @property
    def loss_words(self) -> str:
        words = self.config.the_method.loss_words(self.config)
        if not self.stage_ends:
            return words
        return (
            f"{words}. Dashed lines end a stage: the encoder becomes the teacher, and the model begins anew, so that "
            "losses of two stages do not compare"
        )

    @property
    def stage_ends(self) -> list[float]:
        """Epochs at which a stage ends and another begins."""
        stages = stages_of(self.config) if self.config.the_method.masks else 1
        return [self.config.epochs / stages * number for number in range(1, stages)]

    @property
    def picture_words(self) -> str:
        return self.config.the_method.picture_words(self.config)

    @property
    def tiles(self) -> list[tuple[str, str]]:
        """The run in a few numbers, each with its label."""
        if not self.entries:
            return []
        last = self.entries[-1]
        rates = sorted(entry["images_per_second"] for entry in self.entries)
        tiles = [
            (f"{last['loss']:.4g}", f"training loss, from {self.entries[0]['loss']:.4g}"),
            (count(rates[len(rates) // 2]), "images per second, median"),
            (
                duration(last["seconds"]),
                f"for {counted(self.config.epochs, 'epoch')}, {counted(int(last['step']), 'step')}",
            ),
        ]
        if self.held_out_loss is not None:
            tiles.insert(1, (f"{self.held_out_loss:.4g}", "loss on new images"))
        accuracy = None if self.references is None else self.references.now.get("accuracy")
        if accuracy is not None:
            tiles.insert(2, (f"{accuracy:.1%}", "of new images named correctly"))
        if "feature_std" in last:
            tiles.append((f"{last['feature_std']:.2f}", "spread of the features; 0: the model has collapsed"))
        return tiles

    @property
    def held_out_loss(self) -> float | None:
        """The trained model's loss on images that were not trained on."""
        return None if self.references is None else self.references.now["loss"]

    @property
    def comparisons(self) -> list[tuple[str, str]]:
        """Losses that this one is to be compared with: what of, and the number."""
        references = self.references
        if references is None:
            return []
        rows = [("the untrained model, on new images", references.untrained["loss"])]
        if references.blind is not None:
            rows.append((f"{references.blind_words}, on new images", references.blind))
        rows.append(("the trained model, on new images", references.now["loss"]))
        for name, loss in references.now.items():
            if name.startswith("loss_"):
                part = name.removeprefix("loss_").replace("_", " ")
                rows.append((f"the trained model, on new images, {part} alone", loss))
        if self.entries:
            rows.append(("the trained model, on training images", self.entries[-1]["loss"]))
        return [(words, f"{loss:.4g}") for words, loss in rows]

    @property
    def verdict(self) -> str:
        """What these comparisons say, in sentences."""
        references = self.references
        if references is None:
            return ""
        method, now, sentences = self.config.the_method, references.now["loss"], []
        own = method.verdict(self.config, references.untrained, references.now)
        if own:
            sentences.append(own)
        if references.blind == 0:  # flat images under normalised targets, labels of one class
            sentences.append(
                f"The loss of {references.blind_words} is 0 on these images, which cannot tell whether the model has "
                "learned: validate on others."
            )
        elif references.blind is not None:
            below = 1 - now / references.blind
            sentences.append(
                f"The loss is {below:.0%} below that of {references.blind_words}: the model uses what it sees."
                if below >= _LEARNED
                else f"The loss is not below that of {references.blind_words}: the model has not learned to use what "
                "it sees yet. Train longer, or look at the learning rate."
            )
        seen = [(entry["step"], entry["val_loss"]) for entry in self.entries if "val_loss" in entry]
        moves = method.target_moves or follows_encoder(self.config)
        if len(seen) > 1 and not moves:
            step, lowest = min(seen, key=lambda pair: pair[1])
            last = seen[-1][1]
            if last > lowest + _RISEN * abs(lowest):
                sentences.append(
                    f"On new images it was lowest, {lowest:.4g}, at epoch {step / self.steps_per_epoch:.3g} and has "
                    f"risen to {last:.4g} since: the model overfits."
                )
            elif (seen[0][1] - last) > _RISEN * abs(last) and seen[-2][1] - last > _RISEN / 4 * abs(last):
                sentences.append("On new images it is still falling.")
        sentences.append("Losses of other targets, masks or images are not comparable.")
        return " ".join(sentences)

    @property
    def curve(self) -> Markup:
        return loss_curve(self.entries, self.steps_per_epoch, ends=self.stage_ends)

    @property
    def strips(self) -> list[Strip]:
        """The heads over the epochs, a strip for each quantity."""
        return [] if self.during is None else strips({"": self.during})

    @property
    def strip_words(self) -> str:
        return STRIP_WORDS

    @property
    def picture_side(self) -> int:
        """Pixels on the page: a whole multiple, which keeps the pixels of small images square and equal."""
        return self._size * max(1, -(-_PICTURE_WIDTH // self._size))

    @property
    def enlarged(self) -> bool:
        return self.picture_side > self._size

    @property
    def cards(self) -> list[list[tuple[str, str]]]:
        """For every image its three pictures: label and data address."""
        return [
            [(label, png_address(picture)) for label, picture in zip(_PICTURE_LABELS, triple, strict=True)]
            for triple in zip(*(self.pictures or ()), strict=True)
        ]

    @property
    def facts(self) -> dict[str, str]:
        names = sorted(set(self.backends.values()))
        kernels = (f"{name}: {', '.join(op for op in self.backends if self.backends[op] == name)}" for name in names)
        versions = (f"{name} {version}" for name, version in self.versions.items())
        return {**self.run_facts, "Kernels": "; ".join(kernels), "Versions": ", ".join(versions)}

    @property
    def settings(self) -> str:
        return json.dumps(self.config.to_dict(), indent=2)

    @property
    def _size(self) -> int:
        assert self.pictures is not None
        return self.pictures[0].shape[-1]


def write_report(path: Path, report: Report) -> Path:
    return write_page(path, "commands/pretrain/templates/report.html", title=report.title, report=report)
