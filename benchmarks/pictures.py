"""Makes the pictures of the site: ``python -m benchmarks pictures`` (some minutes on two cores).

One of each head statistic of a small MAE of handwritten digits, which is trained in ``runs/pictures`` unless it is
there; screenshots of the reports that commands write, where chromium is found and ``runs/demo`` holds a demo.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from mimkernels.commands.demo.run import demo_config
from mimkernels.commands.pretrain.run import Run
from mimkernels.data.sources import DigitsSource
from mimkernels.heads import CKA, QUANTITIES, HeadStatistics, capture, plot_cka, plot_heads, plot_overview
from mimkernels.models import MAE

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "pictures"
ENCODER = {"embed_dim": 96, "depth": 8, "num_heads": 6}
SIDE = 32
MEAN, STD = 0.449, 0.226  # of grey images, as `mimkernels pretrain` takes them
OVERVIEW = ("distance", "entropy", "head_divergence", "prefix_mass")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "pictures", help="run folder of the small MAE")
    parser.add_argument("--demo", type=Path, default=ROOT / "runs" / "demo", help="run folder of `mimkernels demo`")
    options = parser.parse_args()
    draw_statistics(trained(options.run), PICTURES / "heads")
    reports = {"demo": options.demo / "report.html", "probe": options.demo / "probe" / "report.html"}
    return take_screenshots({name: path for name, path in reports.items() if path.is_file()})


def trained(folder: Path) -> nn.Module:
    """The encoder of the small MAE; trained first where the folder does not hold it."""
    weights = folder / "mae_checkpoint.pth"
    config = replace(demo_config(str(folder)), model_kwargs=ENCODER, head_stats="", title="MAE for the pictures")
    if not weights.is_file():
        Run(config, resume="auto").execute()
    model = MAE.from_timm(
        config.model,
        img_size=config.img_size,
        in_chans=config.in_chans,
        patch_size=config.patch_size,
        decoder_dim=config.decoder_dim,
        decoder_depth=config.decoder_depth,
        decoder_heads=config.decoder_heads,
        **ENCODER,
    )
    model.load_checkpoint(weights)
    return model.encoder.eval()


@torch.no_grad()
def draw_statistics(encoder: nn.Module, output: Path) -> None:
    """One picture of every quantity, of several together, and of CKA between layers."""
    output.mkdir(parents=True, exist_ok=True)
    images = held_out_digits()
    magnitudes = [name for name, quantity in QUANTITIES.items() if {"tokens", "output"} & set(quantity.inputs)]
    others = [name for name in QUANTITIES if name not in magnitudes]
    statistics = HeadStatistics(quantities=magnitudes, num_prefix=1)
    with inputs_and_outputs(encoder) as layers, capture(encoder, others, accumulate=True, unit="patch") as heads:
        encoder.forward_features(images)
    for layer, (tokens, attended) in enumerate(layers):
        statistics.update(layer, {}, tokens=tokens, output=attended)
    for name in QUANTITIES:
        figure = plot_heads(statistics if name in magnitudes else heads.statistics, name)
        figure.set_size_inches(5.2, 3.9)
        save(figure, output / f"{name}.png", 375)
    save(plot_overview(heads.statistics, OVERVIEW, title=""), PICTURES / "overview.png", 900)
    cka = CKA(tokens="patch", num_prefix=1)
    cka.update([tokens for tokens, _ in layers])
    save(plot_cka(cka.result()), output / "cka.png", 440)


def held_out_digits() -> Tensor:
    """``[297, 1, 32, 32]``, normalised as in pre-training."""
    source = DigitsSource(train=False)
    images = torch.stack([source.read(index) for index in range(len(source))]).float()  # [297, 1, 8, 8]
    images = nn.functional.interpolate(images, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 255)
    return (images / 255 - MEAN) / STD


@contextmanager
def inputs_and_outputs(encoder: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Per block, its input and attention's output after the projection, of the pass inside."""
    tokens, attended, layers = [], [], []
    hooks = [block.register_forward_pre_hook(lambda _, args: tokens.append(args[0])) for block in encoder.blocks]
    hooks += [block.attn.register_forward_hook(lambda _, args, out: attended.append(out)) for block in encoder.blocks]
    yield layers
    for hook in hooks:
        hook.remove()
    layers += zip(tokens, attended, strict=True)


def save(figure, path: Path, width: int) -> None:
    """The figure as PNG of twice ``width`` pixels at most, with few colours."""
    figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.08)
    with Image.open(path) as picture:
        shrink(picture, 2 * width).save(path, optimize=True)


def shrink(picture: Image.Image, width: int) -> Image.Image:
    if picture.width > width:
        size = (width, round(picture.height * width / picture.width))
        picture = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    return picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)


def take_screenshots(pages: dict[str, Path]) -> int:
    """Screenshots of reports from their beginning; the exit status."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        print("no chromium: the gallery's screenshots stay as they are", file=sys.stderr)
        return 0
    for name, page in pages.items():
        with tempfile.TemporaryDirectory() as folder:
            shot = Path(folder) / "shot.png"
            options = ["--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1100,1500"]
            command = [browser, *options, f"--user-data-dir={folder}/profile", f"--screenshot={shot}"]
            command.append(page.resolve().as_uri())
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            with Image.open(shot) as picture:
                shrink(picture, 1100).save(PICTURES / f"report-{name}.png", optimize=True)
        print(f"wrote {PICTURES / f'report-{name}.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
