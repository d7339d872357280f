"""Measures what live head statistics cost a training step: ``python -m benchmarks live-statistics``.

The trainer itself runs, on random images, and records statistics at every other step; the times of the two kinds of
step are compared. The step includes everything: loading, forward, backward, optimizer, recording.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torchvision.io import write_png

from mimkernels.commands.bench.results import machine
from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.commands.pretrain.run import Run
from mimkernels.engine.training.loop import Trainer

NAMES = "distance,entropy,prefix_mass,self_mass,patch_entropy,peak"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40, help="in all, half of them with statistics")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--stats", default=NAMES)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = step_seconds(Path(folder), options)
    # Step 1 records too, and warms everything up: left out with its successor.
    without, recorded = seconds[2::2], seconds[3::2]
    pairs = [b / a - 1 for a, b in zip(without, recorded, strict=False)]
    about = machine("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{about['device']}, torch {about['torch']}: MAE {options.model}, batch {options.batch}, {options.stats}")
    print(f"a step without statistics {statistics.median(without) * 1e3:.1f} ms, with {_ms(recorded)}; ", end="")
    print(f"of neighbouring steps the one with takes {statistics.median(pairs):+.1%} (median of {len(pairs)})")


def _ms(seconds: list[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.1f} ms"


def step_seconds(folder: Path, options: argparse.Namespace) -> list[float]:
    """Seconds of each training step; even ones (from 0) have an odd number and record nothing, but the first does."""
    images = folder / "images"
    images.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(options.batch):
        image = torch.randint(256, (3, 256, 256), dtype=torch.uint8, generator=generator)
        write_png(image, str(images / f"{number}.png"))
    config = PretrainConfig(
        data=str(images),
        output=str(folder / "run"),
        model=options.model,
        batch_size=options.batch,
        epochs=options.steps,
        precision=options.precision,
        workers=0,
        log_every=1000,
        head_stats=options.stats,
        head_stats_every=2,
        pictures=0,
    )
    seconds: list[float] = []
    plain = Trainer._train_step

    def timed(trainer: Trainer, batches: object) -> None:
        start = time.perf_counter()
        plain(trainer, batches)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)

    Trainer._train_step = timed
    try:
        Run(config, stream=io.StringIO()).execute()
    finally:
        Trainer._train_step = plain
    return seconds
