"""Repeats the demo's probes with several seeds: ``python -m benchmarks probe-seeds``.

Pre-trains and probes the demo's encoder once per seed (weights, order, masks, and those of the probes), on the same
split of the digits, and gives mean and spread of every pooling's accuracy. Writes JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import statistics
import tempfile
from pathlib import Path

import torch

from mimkernels.commands.bench.results import machine
from mimkernels.commands.demo.run import demo_config, demo_probe_config
from mimkernels.commands.pretrain.run import Run
from mimkernels.commands.probe.run import ProbeResult, ProbeRun

RESULT = Path(__file__).parent / "results" / "probe-digits.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=None, help="of pre-training (default: the demo's)")
    parser.add_argument("--pooling", default=None, help="as of `mimkernels probe` (default: the demo's)")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    accuracy: dict[str, list[float]] = {}
    parameters: dict[str, int] = {}
    for seed in range(options.seeds):
        probed = probe_demo(seed, options.epochs, options.pooling)
        for result in probed.results:
            accuracy.setdefault(result.label, []).append(result.accuracy)
            parameters[result.label] = result.pooling_parameters
        print(f"seed {seed}: " + ", ".join(f"{r.label} {r.accuracy:.1%}" for r in probed.results), flush=True)
    rows = {
        label: {
            "accuracy": values,
            "mean": statistics.mean(values),
            "spread": statistics.stdev(values) if len(values) > 1 else 0.0,
            "parameters": parameters[label],
        }
        for label, values in accuracy.items()
    }
    print(f"\n{'pooling':16} {'accuracy':>16}  {'parameters':>10}   mean and sd of {options.seeds} seeds")
    for label, row in rows.items():
        print(f"{label:16} {row['mean']:>9.1%} ± {row['spread']:.1%}  {row['parameters']:>10,}")
    content = {
        "what": "accuracy of linear probes on a MAE of handwritten digits, one run per seed",
        "test_images": probed.test_images,
        "torch": torch.__version__,
        "device": machine("cuda" if torch.cuda.is_available() else "cpu")["device"],
        "poolings": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nwritten to {options.output}")


def probe_demo(seed: int, epochs: int | None, pooling: str | None) -> ProbeResult:
    """The demo with another seed, in a folder that does not stay."""
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(demo_config(folder, epochs), seed=seed, head_stats="", pictures=0)
        Run(config, stream=io.StringIO()).execute()
        probe = dataclasses.replace(demo_probe_config(folder), seed=seed, pictures=0)
        if pooling:
            probe = dataclasses.replace(probe, pooling=pooling)
        return ProbeRun(probe, stream=io.StringIO()).execute()
