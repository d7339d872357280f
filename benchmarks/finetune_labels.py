"""Fine-tunes with few labels, pre-trained and from scratch: ``python -m benchmarks finetune-labels``.

A small MAE is pre-trained on the images of Fashion-MNIST once per seed, without labels, then fine-tuned with shares of
the labels, and the same architecture trained with these labels from random weights. What is finished is kept, and what
was interrupted goes on: the same command may be given again. Writes JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.studies import plan
from mimkernels.commands.bench.results import machine
from mimkernels.commands.finetune.config import FinetuneConfig
from mimkernels.commands.finetune.run import FinetuneRun
from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.commands.pretrain.run import Run

RESULT = Path(__file__).parent / "results" / "finetune-labels.json"
LR = 1e-3  # of AdamW at its peak, of both: from random weights all layers learn at it
STARTS = ("pre-trained", "from scratch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", default="1%,10%", help="shares of the labels")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20, help="of pre-training on the 60,000 images")
    parser.add_argument("--finetune-epochs", type=int, default=0, help="0: the command's default")
    parser.add_argument("--models", nargs="*", help="runs to start from, one for each seed, in place of pre-training")
    parser.add_argument("--data", default=plan.DATA)
    parser.add_argument("--folder", type=Path, default=Path("runs/finetune-labels"))
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    seeds = len(options.models) if options.models else options.seeds
    accuracy: dict[str, dict[str, list[float]]] = {}
    for seed in range(seeds):
        model = options.models[seed] if options.models else str(pretrained(options, seed))
        for labels in options.labels.split(","):
            for start in STARTS:
                folder = options.folder / f"{start.replace(' ', '-')}-{labels.strip('%')}-seed-{seed}"
                values = fine_tuned(options, folder, model, labels, seed, start == STARTS[1])
                accuracy.setdefault(labels, {}).setdefault(start, []).append(values["accuracy"])
                print(f"seed {seed}, {labels} of the labels, {start}: {values['accuracy']:.2%}", flush=True)
    for labels, by_start in accuracy.items():
        for start, seen in by_start.items():
            spread = statistics.stdev(seen) if len(seen) > 1 else 0.0
            print(f"{labels:>5} {start:12} {statistics.mean(seen):.2%} ± {spread:.2%}  of {len(seen)} seeds")
    content = {
        "what": "accuracy on the test images, fine-tuned with a share of the labels, one run per seed",
        "data": options.data,
        "epochs": {"pre-training": None if options.models else options.epochs, "fine-tuning": options.finetune_epochs},
        "torch": torch.__version__,
        "device": machine("cuda" if torch.cuda.is_available() else "cpu")["device"],
        "accuracy": accuracy,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {options.output}")


def pretrained(options: argparse.Namespace, seed: int) -> Path:
    """A MAE of the study's encoder, pre-trained without labels; what is finished is kept."""
    folder: Path = options.folder / f"mae-seed-{seed}"
    if not (folder / "checkpoints" / "final.pt").is_file():
        config = PretrainConfig(
            data=options.data, img_size=plan.IMG_SIZE, in_chans=1, patch_size=plan.PATCH_SIZE,
            model_kwargs=dict(plan.ENCODER), decoder_dim=64, decoder_depth=2, decoder_heads=4, epochs=options.epochs,
            batch_size=plan.BATCH_SIZE, lr=plan.LR, seed=seed, output=str(folder),
        )  # fmt: skip
        Run(config, resume="auto").execute()
    return folder


def fine_tuned(
    options: argparse.Namespace, folder: Path, model: str, labels: str, seed: int, from_scratch: bool
) -> dict[str, Any]:
    """The numbers of one run; what is finished is kept."""
    if not (folder / "results.json").is_file():
        config = FinetuneConfig(
            model=model, from_scratch=from_scratch, data=options.data, labels=labels, seed=seed, lr=LR,
            epochs=options.finetune_epochs, output=str(folder),
        )  # fmt: skip
        FinetuneRun(config, resume="auto").execute()
    values: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return values


if __name__ == "__main__":
    main()
