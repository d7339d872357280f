"""Head statistics recorded over a training run, one JSON line per recorded step, and what is drawn of them."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from markupsafe import Markup
from torch import Tensor

from mimkernels._palette import CHART, LINE, SERIES
from mimkernels.engine import files
from mimkernels.engine.figures import bare_map, colour_bar, data_address, named_panel, panel, svg
from mimkernels.heads import HeadStatistics, plot_overview

TRAINING_STEPS = "heads.jsonl"  # of the images and masks of the steps themselves
FIXED_IMAGES = "during.jsonl"  # of the same whole images every time
# What is recorded on fixed images; encoders without a [cls] token go without its quantities.
QUANTITIES = ("distance", "entropy", "head_divergence", "nmi", "cls_cls_attention", "cls_pos_entropy")


class HeadHistory:
    """Recorded head statistics of a run in a file of its folder.

    Args:
        first_step: of the session; what was recorded after it is dropped.
        name: of the file.
    """

    def __init__(self, folder: Path, first_step: int, name: str = TRAINING_STEPS) -> None:
        self.path = folder / name
        self.entries = [entry for entry in _read(self.path) if entry["step"] <= first_step]
        if self.path.is_file():
            files.write_text(self.path, "".join(map(files.json_line, self.entries)))

    def add(self, step: int, seen: HeadStatistics, **facts: float) -> None:
        self.entries.append({"step": step, **facts, "heads": seen.to_dict()})
        with self.path.open("a") as file:
            file.write(files.json_line(self.entries[-1]))

    def picture(self) -> str | None:
        """First and last recorded step side by side as a PNG ``data:`` address; None if nothing was recorded.

        The first is that with the last one's quantities: a run that is continued may record others. Layers are numbered
        from 1, as in the maps of ``strips`` on the same page.
        """
        if not self.entries:
            return None
        last = self.entries[-1]
        names = set(last["heads"]["quantities"])
        first = next(entry for entry in self.entries if names <= set(entry["heads"]["quantities"]))
        chosen = [first] if first is last else [first, last]
        recorded = {f"step {entry['step']:,}": _numbered_from_one(entry["heads"]) for entry in chosen}
        buffer = io.BytesIO()
        plot_overview(recorded).savefig(buffer, format="png", dpi=130)
        return data_address(buffer.getvalue())


class Epochs(NamedTuple):
    """Statistics on the same images at several epochs of one run.

    Attributes:
        epochs: ``[E]`` fp64, rising; 0 is before the first step.
        seen: statistics at each.
    """

    epochs: Tensor
    seen: list[HeadStatistics]

    @classmethod
    def of(cls, entries: Sequence[Mapping[str, Any]]) -> "Epochs | None":
        """From the entries of a history; None without any."""
        by_epoch = {float(entry["epoch"]): HeadStatistics.from_dict(entry["heads"]) for entry in entries}
        epochs = sorted(by_epoch)
        return cls(torch.tensor(epochs, dtype=torch.float64), [by_epoch[epoch] for epoch in epochs]) if epochs else None

    @classmethod
    def read(cls, folder: Path) -> "Epochs | None":
        """What the run of a folder recorded; None if it recorded nothing."""
        return cls.of([entry for entry in _read(folder / FIXED_IMAGES) if isinstance(entry.get("epoch"), int | float)])

    @property
    def names(self) -> list[str]:
        """Quantities that every epoch has."""
        return [name for name in QUANTITIES if all(name in seen.names for seen in self.seen)]

    def by_layer(self, quantity: str) -> Tensor:
        """``[L, E]``: means over heads and images."""
        return torch.stack([seen.layer_mean(quantity) for seen in self.seen], 1)

    def quarters(self, quantity: str) -> tuple[Tensor, Tensor]:
        """``[E]`` each: means over the first and over the last quarter of the layers, at least one."""
        layers = self.by_layer(quantity)
        count = max(1, -(-len(layers) // 4))
        return layers[:count].nanmean(0), layers[-count:].nanmean(0)


class Strip(NamedTuple):
    """One quantity over the epochs of one or several runs.

    Attributes:
        maps: a map for each run, a column for each recorded epoch, a row for each layer; all on one scale.
        curves: lines of all runs in one panel.
    """

    title: str
    text: str
    maps: list[Markup]
    curves: Markup

    @property
    def panels(self) -> list[Markup]:
        return [*self.maps, self.curves]


STRIP_WORDS = (
    "Maps have a column for each recorded epoch, 0 being the untrained encoder, and a row for each layer, the first at "
    "the bottom; values are means over heads and images. Curves are of the last quarter of the layers (strong) and of "
    "the first (dashed)."
)
_SHOWN = {
    "distance": ("Attention distance", "distance (pixels)", "How far away the patches are that a patch attends to."),
    "entropy": ("Entropy", "entropy (nats)", "How widely a patch spreads its attention."),
    "head_divergence": ("Difference between heads", "KL divergence (nats)", "How much a head differs from the others "
                        "of its layer."),
    "nmi": ("Dependence on the query", "mutual information", "0 where every patch attends alike, 1 where each attends "
            "to a patch of its own."),
    "cls_cls_attention": ("[cls] to itself", "share of attention", "What [cls] keeps for itself."),
    "cls_pos_entropy": ("Entropy of [cls] over patches", "entropy (nats)", "How evenly [cls] looks at the patches."),
}  # fmt: skip


def strips(runs: Mapping[str, Epochs], colours: Mapping[str, str] | None = None) -> list[Strip]:
    """A strip for each quantity that a run has, in the order of ``QUANTITIES``.

    Args:
        runs: by name; one without a name gets no title.
        colours: of the lines, by name.
    """
    colours = colours or {name: SERIES[number % len(SERIES)] for number, name in enumerate(runs)}
    drawn = []
    for quantity in QUANTITIES:
        having = {name: run for name, run in runs.items() if quantity in run.names}
        if having:
            title, label, text = _SHOWN[quantity]
            drawn.append(Strip(title, text, _maps(having, quantity, label), _curves(having, quantity, label, colours)))
    return drawn


def _maps(runs: Mapping[str, Epochs], quantity: str, label: str) -> list[Markup]:
    import matplotlib

    values = torch.cat([run.by_layer(quantity).flatten() for run in runs.values()])
    values = values[values.isfinite()]
    low, high = (values.min().item(), values.max().item()) if len(values) else (0.0, 1.0)
    drawn = []
    for name, run in runs.items():
        with matplotlib.rc_context(CHART):
            axes = panel((4.3, 3.0), bar=True)
            layers = run.by_layer(quantity)
            rows = (torch.arange(len(layers) + 1) + 0.5).numpy()
            image = axes.pcolormesh(_edges(run.epochs).numpy(), rows, layers.numpy(), cmap="magma", vmin=low, vmax=high,
                                    edgecolors="face", linewidth=0.7)  # fmt: skip
            axes.set_title(name, loc="left", fontweight="bold")
            axes.set_xlabel("epoch")
            axes.set_ylabel("layer")
            bare_map(axes)
            axes.set_xticks(_ticks_of(run.epochs, axes.get_xticks().tolist()))
            colour_bar(axes, image, label)
            drawn.append(svg(axes.figure))  # type: ignore[arg-type]
    return drawn


def _curves(runs: Mapping[str, Epochs], quantity: str, label: str, colours: Mapping[str, str]) -> Markup:
    import matplotlib

    with matplotlib.rc_context(CHART):
        named = {name: colours[name] for name in runs}
        axes = named_panel((4.3, 3.0), named) if len(runs) > 1 else panel((4.3, 3.0))
        for name, run in runs.items():
            first, last = run.quarters(quantity)
            axes.plot(run.epochs, first, color=colours[name], linewidth=1.2, linestyle=(0, (4, 2)))
            axes.plot(run.epochs, last, color=colours[name], linewidth=2.0, marker="o", markersize=3)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.grid(True, axis="y", color=LINE, linewidth=0.6, alpha=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        return svg(axes.figure)  # type: ignore[arg-type]


def _edges(epochs: Tensor) -> Tensor:
    """``[E + 1]``: half way between epochs, and as far beyond the first and the last."""
    if len(epochs) == 1:
        return torch.cat((epochs - 0.5, epochs + 0.5))
    middles = (epochs[1:] + epochs[:-1]) / 2
    return torch.cat((2 * epochs[:1] - middles[:1], middles, 2 * epochs[-1:] - middles[-1:]))


def _ticks_of(epochs: Tensor, ticks: Sequence[float]) -> list[float]:
    """Those from the first to the last epoch: the outer columns reach beyond, below 0 too."""
    low, high = epochs[0].item(), epochs[-1].item()
    return [tick for tick in ticks if low <= tick <= high] or [low]


def _numbered_from_one(heads: Mapping[str, Any]) -> HeadStatistics:
    layers = {str(int(number) + 1): layer for number, layer in heads["layers"].items()}
    return HeadStatistics.from_dict({**heads, "layers": layers})


def _read(path: Path) -> list[dict[str, Any]]:
    return files.read_entries(path, _has_statistics)


def _has_statistics(entry: Mapping[str, Any]) -> bool:
    try:
        HeadStatistics.from_dict(entry["heads"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return True
