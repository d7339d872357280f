"""Plots and pictures as text that a page can hold: SVG for curves, PNG data addresses for images."""

import base64
import functools
import io
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from mimkernels._palette import ACCENT, CHART, INK, LINE, SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PICTURE_SIDE = 128  # pixels that small images are enlarged to, at least


def png_address(image: Tensor) -> str:
    """A ``[3 or 1, H, W]`` image in [0, 1] as a ``data:`` address, at its own resolution."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG", optimize=True)
    return data_address(buffer.getvalue())


def data_address(png: bytes) -> str:
    """The content of a PNG file as a ``data:`` address."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def overlay(image: Tensor, weights: Tensor) -> Tensor:
    """`image` ``[3, S, S]`` in [0, 1] under the colours of `weights` ``[rows, columns]``; enlarged, RGB."""
    import matplotlib

    image = enlarged(image)
    scaled = weights.float() / weights.max().clamp(min=torch.finfo(torch.float32).tiny)
    scaled = F.interpolate(scaled[None, None], size=image.shape[-2:], mode="nearest")[0, 0]
    colours = torch.from_numpy(matplotlib.colormaps["viridis"](scaled.numpy())[..., :3]).permute(2, 0, 1).float()
    grey = image.mean(0, keepdim=True)
    return 0.45 * grey + 0.55 * colours


def as_colour(image: Tensor) -> Tensor:
    """An image, uint8 ``[1 or 3, S, S]`` to ``[3, S, S]`` in [0, 1]."""
    return (image.float() / 255).expand(3, -1, -1)


def enlarged(image: Tensor) -> Tensor:
    """An image ``[C, S, S]`` of at least ``PICTURE_SIDE`` pixels a side, every pixel a square."""
    # Whole multiples keep the pixels of small images square and equal.
    times = max(1, -(-PICTURE_SIDE // image.shape[-1]))
    return image.repeat_interleave(times, 1).repeat_interleave(times, 2)


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Running mean over ``width`` entries, over fewer at the ends; the same length."""
    if width <= 1 or len(values) < 3:
        return values
    kernel = np.ones(min(width, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def panel(size: tuple[float, float], *, top: float = 0.36, bar: bool = False) -> "Axes":
    """Axes alone in a figure of so many inches, with margins for labels and, above, `top`; those of a row line up.

    Fixed margins: a layout that measures all labels takes most of the time of drawing.

    Args:
        bar: leave room for ``colour_bar`` at the right.
    """
    from matplotlib.figure import Figure

    (width, height), left, bottom, right = size, 0.78, 0.56, 1.02 if bar else 0.14
    place = (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
    # An object of its own instead of pyplot: the caller's backend and figures stay as they are.
    return Figure(figsize=size).add_axes(place)


def named_panel(size: tuple[float, float], colours: Mapping[str, str]) -> "Axes":
    """A ``panel`` with the names of its lines above it, in rows; `size` is that with one row."""
    from matplotlib.lines import Line2D

    width, height = size
    widest = 0.5 + 0.095 * max(len(name) for name in colours)  # inches, at the size of the text below
    columns = max(1, int((width - 0.2) / widest))
    rows = -(-len(colours) // columns)
    axes = panel((width, height + 0.24 * (rows - 1)), top=0.14 + 0.24 * rows)
    handles = [Line2D([], [], color=colour, linewidth=2.4, label=name) for name, colour in colours.items()]
    axes.figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.0, 1.0), ncols=columns, frameon=False, labelcolor=INK,
        fontsize=10, handlelength=1.4, handletextpad=0.5, columnspacing=1.2, labelspacing=0.3,
    )  # fmt: skip
    return axes


def colour_bar(axes: "Axes", image: Any, label: str) -> None:
    """What the colours of a map in a ``panel`` mean, at its right."""
    figure: Any = axes.figure
    place = axes.get_position()
    inch = 1 / figure.get_figwidth()
    bar = figure.colorbar(image, cax=figure.add_axes((place.x1 + 0.12 * inch, place.y0, 0.12 * inch, place.height)))
    bar.set_label(label)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)


def bare_map(axes: "Axes") -> None:
    """Axes of a map: whole numbers, no frame, no ticks."""
    from matplotlib.ticker import MaxNLocator

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def loss_curve(entries: list[dict[str, float]], steps_per_epoch: int, *, ends: Sequence[float] = ()) -> Markup:
    """Loss over epochs (below) and steps (above), as SVG; strips of their own show what else was logged, as accuracy.

    Entries with ``val_`` and a name have what was measured on new images, a second line in the same axes. Dashed lines
    mark `ends`, the epochs at which a stage of the training ends.
    """
    import matplotlib

    # An object of its own instead of pyplot: the caller's backend and figures stay as they are.
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    step = np.array([entry["step"] for entry in entries], dtype=float)
    loss = np.array([entry["loss"] for entry in entries])
    epoch = step / steps_per_epoch
    with matplotlib.rc_context(CHART):
        strips = _strips(entries)
        figure = Figure(figsize=(10, 4.9 + 1.3 * len(strips)), layout="constrained")
        top, *others, bottom = figure.subplots(
            2 + len(strips), 1, sharex=True, height_ratios=(4, *[1.3] * len(strips), 1)
        )
        top.plot(epoch, loss, color=ACCENT, alpha=0.28, linewidth=1)
        top.plot(epoch, smoothed(loss, max(1, len(loss) // 40)), color=ACCENT, linewidth=2.2)
        val_epoch, val_loss = _known(entries, "val_loss", steps_per_epoch)
        low, high = (pick(pick(of) for of in (loss, val_loss) if len(of)) for pick in (min, max))
        # The first steps are far above all that follow; on a log scale they do not flatten the rest.
        if low > 0 and high / low > 8:
            top.set_yscale("log")
            top.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            top.yaxis.set_minor_formatter(
                FuncFormatter(lambda value, _: f"{value:.2g}" if f"{value:.0e}"[0] in "25" else "")
            )
        else:
            top.set_ylim(max(0.0, low - 0.08 * (high - low)), high + 0.05 * (high - low + 1e-12))
        top.set_ylabel("loss")
        above = not len(val_loss) or loss[-1] >= val_loss[-1]  # the label of the training loss
        top.annotate(
            f"{loss[-1]:.4g}", (epoch[-1], loss[-1]), xytext=(0, 9 if above else -16), textcoords="offset points",
            ha="right", color=ACCENT, fontweight="bold",
            bbox={"facecolor": top.get_facecolor(), "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )  # fmt: skip
        if len(val_loss):
            top.plot(val_epoch, val_loss, color=SERIES[1], linewidth=1.8, marker="o", markersize=3.5, clip_on=False)
            top.annotate(
                f"{val_loss[-1]:.4g} on new images", (val_epoch[-1], val_loss[-1]), xytext=(0, -16 if above else 9),
                textcoords="offset points", ha="right", color=SERIES[1], fontweight="bold",
            )  # fmt: skip
        for axes, name in zip(others, strips, strict=True):
            for key, colour in ((name, ACCENT), (f"val_{name}", SERIES[1])):
                axes.plot(*_known(entries, key, steps_per_epoch), color=colour, linewidth=1.8)
            axes.set_ylabel(name.replace("_", "\n"))
        bottom.fill_between(epoch, [entry["lr"] for entry in entries], color=LINE)
        bottom.set_ylabel("learning\nrate")
        highest = max(entry["lr"] for entry in entries)
        bottom.set_ylim(0, 1.15 * highest if highest > 0 else 1)
        bottom.set_yticks([0, highest], ["0", f"{highest:.2g}"])
        bottom.set_xlabel("epoch")
        bottom.set_xlim(0, max(epoch[-1], 1e-9))
        steps = top.secondary_xaxis("top", functions=(lambda x: x * steps_per_epoch, lambda x: x / steps_per_epoch))
        steps.set_xlabel("optimizer step", labelpad=8)
        steps.tick_params(length=0)
        steps.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        for axes in (top, *others, bottom):
            axes.grid(True, color=LINE, linewidth=0.6, alpha=0.7)
            axes.set_axisbelow(True)
            axes.tick_params(which="both", length=0)
            for epoch_of_end in ends:
                axes.axvline(epoch_of_end, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        for number, epoch_of_end in enumerate(ends, 1):
            # At its left, where the loss has fallen.
            top.annotate(
                f"end of stage {number}", (epoch_of_end, 1), xycoords=top.get_xaxis_transform(), xytext=(-5, -5),
                textcoords="offset points", ha="right", va="top", color=INK, fontsize=10,
            )  # fmt: skip
        return svg(figure)


def _strips(entries: list[dict[str, float]]) -> list[str]:
    """What was logged besides what every run logs."""
    known = {"step", "loss", "lr", "grad_norm", "images_per_second", "seconds"}
    return [name for name in entries[-1] if name not in known and not name.startswith("val_")]


def _known(entries: list[dict[str, float]], name: str, steps_per_epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and values of the entries that have `name`."""
    have = [entry for entry in entries if name in entry]
    return np.array([entry["step"] / steps_per_epoch for entry in have]), np.array([entry[name] for entry in have])


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def svg(figure: "Figure", *, fitted: bool = False) -> Markup:
    """A chart as SVG, from the root element on: an HTML page takes no XML prologue.

    Args:
        fitted: as large as what is drawn, which a layout cannot foresee where axes keep their aspect.
    """
    buffer = io.StringIO()
    box = "tight" if fitted else None
    with warnings.catch_warnings(record=True) as told:
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True, bbox_inches=box)
    for message in dict.fromkeys(str(warning.message) for warning in told):
        _warn_once(message)  # a name with a letter that the font lacks stands in many charts
    return Markup(buffer.getvalue()[buffer.getvalue().index("<svg") :])
