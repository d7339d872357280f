"""What one pass of a model over the images gives, and where it is kept."""

import hashlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from mimkernels.engine import files
from mimkernels.heads import HeadStatistics
from mimkernels.models.checkpoint import read_file

FORMAT = 2


@dataclass
class Measured:
    """What one model does on the images.

    Attributes:
        facts: sizes of the model, by name.
        heads: statistics of its attention layers, as ``HeadStatistics.to_dict`` gives them.
        states, outputs: statistics of tokens before the first block and after every block, and of attention's outputs;
            None where its blocks give no tokens.
        grams: ``[states, B, B]`` Gram matrices of the patch tokens of every batch, before the first block and after
            every block; for CKA with other models.
        accuracy: of a linear classifier on every state; empty where images have no classes.
        importance: ``[layers][heads]`` change of the features without one head; empty where it was not asked for.
        maps: attention rows of a few images, fields of ``Maps``.
        notes: what could not be measured, and why.
        pooled: of every pooling that was trained, by name: ``weights [I, rows, columns]`` on the images of `maps`,
            ``accuracy`` on images that it was not trained on, and how many ``images`` it was trained on.
    """

    facts: dict[str, Any]
    heads: dict[str, Any]
    states: dict[str, Any] | None = None
    outputs: dict[str, Any] | None = None
    grams: list[Tensor] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    importance: list[list[float]] = field(default_factory=list)
    maps: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    pooled: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def in_windows(self) -> bool:
        """Attention of a layer runs in windows of the image, as Swin's."""
        return max(self.facts["windows"]) > 1

    def statistics(self, part: str = "heads") -> HeadStatistics | None:
        """Those of "heads", "states" or "outputs"."""
        kept = getattr(self, part)
        return None if kept is None else HeadStatistics.from_dict(kept)


@dataclass
class Model:
    """A model of the report: its name, and what each of its runs (seeds) does."""

    name: str
    runs: list[Measured]


def key_of(*parts: Any) -> str:
    """The name under which a pass is kept: a hash of everything that its numbers depend on."""
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True, default=str).encode()).hexdigest()[:32]


def save(path: Path, measured: Measured) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.save(path, {"format": FORMAT, **vars(measured)})


def load(path: Path) -> Measured | None:
    """What ``save`` wrote; None if there is nothing, or it cannot be read."""
    if not path.is_file():
        return None
    try:
        content = read_file(path)
    except (ValueError, OSError):
        return None
    names = [item.name for item in fields(Measured)]
    if not isinstance(content, dict) or content.get("format") != FORMAT or not set(names) <= content.keys():
        return None
    return Measured(**{name: content[name] for name in names})
