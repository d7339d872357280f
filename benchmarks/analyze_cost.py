"""Measures what ``mimkernels analyze`` costs beyond a plain pass: ``python -m benchmarks analyze-cost``.

Both read the same images, in the same batches, by the same loader; the rounds take turns. An analysis has everything:
statistics of heads and tokens, CKA, accuracy by depth, the rows of the viewer. The memory that it adds is that of the
first round, in a process that has run the plain pass. ``--img-size`` of two runs shows how it grows with the tokens.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable

from mimkernels.commands.analyze.config import AnalyzeConfig
from mimkernels.commands.analyze.measure import measure
from mimkernels.commands.analyze.run import open_images
from mimkernels.commands.bench.results import machine
from mimkernels.data.batches import Augmentation
from mimkernels.data.labelled import EncoderImages, in_order
from mimkernels.engine.encoder import load_encoder
from mimkernels.engine.environment import start_accelerator
from mimkernels.engine.hardware import loading_workers
from mimkernels.engine.model_names import parse_models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_base_patch16_224:pretrained=false")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    config = AnalyzeConfig(
        models=[f"{options.model}:img_size={options.img_size}"], data=options.data, images=options.images,
        batch_size=options.batch, device=options.device, precision=options.precision,
    )  # fmt: skip
    config.check()
    accelerator, precision, _ = start_accelerator(config.device, config.precision)
    device = accelerator.device
    encoder, images = load_encoder(parse_models(config.models)[0]).to(device), open_images(config)
    workers = loading_workers(None, device.type, images.source.in_memory)

    def plain() -> None:
        augmentation = Augmentation(encoder.img_size, encoder.in_chans, 1.0, False)
        loaded = EncoderImages(images, augmentation, 0, False)
        for batch in in_order(loaded, config.batch_size, workers, device.type == "cuda"):
            with accelerator.autocast():
                tokens = encoder(batch.images.to(device, non_blocking=True)).tokens
        tokens.sum().item()

    def analysis() -> None:
        measure(encoder, images, config, accelerator, workers, lambda text: None)

    plain()
    before = _peak()
    ratios, seconds = [], []
    for number in range(options.rounds):
        seconds.append([_seconds(plain), _seconds(analysis)])
        ratios.append(seconds[-1][1] / seconds[-1][0])
        if number == 0:
            added = _peak() - before
    shown = " and ".join(f"{statistics.median(times):.1f} s" for times in zip(*seconds, strict=True))
    about = machine(device.type)
    print(f"{about['device']}, torch {about['torch']}: {config.models[0]}, {precision}, {options.images} images")
    print(f"plain pass and analysis {shown}, {statistics.median(ratios):.2f} times ({len(ratios)} rounds: "
          f"{', '.join(f'{ratio:.2f}' for ratio in ratios)}); {added:.0f} MB of memory added")  # fmt: skip


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _peak() -> float:
    """MB of main memory that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
