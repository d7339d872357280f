"""Draws the picture sheet of masking: ``python -m benchmarks masks``.

For each strategy eight samples and how often each patch is masked, into ``docs/pictures/masks.png``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure

from benchmarks.pictures import PICTURES, save
from mimkernels._palette import CHART, INK, LINE, MUTED, PAPER, SERIES
from mimkernels.data.masks import STRATEGIES, MaskSampler

GRID, FRAMES, SAMPLES, BATCHES = (14, 14), 4, 8, 600
SEED = 0
COLOURS = [PAPER, SERIES[5], SERIES[1]]  # visible, masked, target
OPTIONS = {"multiblock3d": {"blocks": 2, "scale": (0.3, 0.3)}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PICTURES / "masks.png", help="where the picture goes")
    path = parser.parse_args().output
    with matplotlib.rc_context(CHART):
        save(sheet(), path, 700)
    print(f"wrote {path}")
    return 0


def sheet() -> Figure:
    """A row for each strategy: eight samples (of a video: two, four frames each), the frequency of each patch."""
    rows = len(STRATEGIES)
    figure = Figure(figsize=(10.2, 1.04 * rows + 0.5))
    axes = figure.subplots(rows, SAMPLES + 1, gridspec_kw={"width_ratios": [1] * SAMPLES + [1.12]})
    figure.subplots_adjust(left=0.135, right=0.93, top=0.965, bottom=0.02, wspace=0.08, hspace=0.1)
    for row, name in zip(axes, STRATEGIES, strict=True):
        samples, frequency = drawn(name)
        for axis, sample in zip(row, samples, strict=False):
            axis.imshow(sample, cmap=ListedColormap([to_rgb(colour) for colour in COLOURS]), vmin=0, vmax=2)
        heat = row[-1].imshow(frequency, cmap="cividis", vmin=0, vmax=1)
        row[0].set_ylabel(
            f"{name}\n{frequency.mean():.0%}", rotation=0, ha="right", va="center", color=INK, fontsize=10
        )
        for axis in row:
            axis.set(xticks=[], yticks=[])
            for side in axis.spines.values():
                side.set(visible=True, color=LINE)
    axes[0, 0].set_title("eight samples", loc="left", fontsize=10, color=MUTED)
    axes[0, -1].set_title("masked how often", fontsize=10, color=MUTED)
    bar = figure.colorbar(heat, cax=figure.add_axes((0.945, 0.4, 0.012, 0.2)))
    bar.ax.tick_params(labelsize=9)
    return figure


def drawn(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Eight planes (0 visible, 1 masked, 2 a target), and the share of masks in which each patch is masked."""
    video = STRATEGIES[name].dims == 3
    sampler = MaskSampler((FRAMES, *GRID) if video else GRID, name, **OPTIONS.get(name, {}))
    total = np.zeros(GRID)
    first = None
    for batch in range(BATCHES):
        scores = {"scores": attention(batch)} if sampler.needs_scores else {}
        masks = sampler.sample(SAMPLES, SEED, batch, **scores)
        total += masks.mask.float().numpy().reshape(-1, *GRID).mean(0)
        first = first or masks
    planes = first.mask.flatten(1).int()
    if first.targets is not None:
        planes.scatter_(1, first.targets.flatten(1), 2)
    return planes.numpy().reshape(-1, *GRID)[:SAMPLES], total / BATCHES


def attention(batch: int) -> torch.Tensor:
    """``[8, N]``: what a teacher might attend to, a round object somewhere near the middle."""
    generator = torch.Generator().manual_seed(batch)
    centre = 6.5 + 2 * torch.randn(SAMPLES, 2, generator=generator)
    rows, columns = (torch.arange(side, dtype=torch.float32) for side in GRID)
    distance = (rows[:, None] - centre[:, 0, None, None]) ** 2 + (columns - centre[:, 1, None, None]) ** 2
    noise = 0.15 * torch.rand(SAMPLES, *GRID, generator=generator)
    return ((-distance / 18).exp() + noise).flatten(1)


if __name__ == "__main__":
    sys.exit(main())
