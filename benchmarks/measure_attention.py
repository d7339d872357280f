"""Measures attention against PyTorch's, and writes the table of where ours is left to it.

``python -m benchmarks measure-attention`` takes up to three minutes, in which nothing else should run. It replaces the
rows of this device and instruction set in ``mimkernels/nn/sdpa/measured.json``; ``MIMKERNELS_CPU_ISA`` chooses another
instruction set than the best.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mimkernels.commands.bench.cases.attention import Shape, attention_case
from mimkernels.commands.bench.timing import measure, prepare
from mimkernels.engine.hardware import device_name
from mimkernels.nn.sdpa.measured import PASSES, TABLE, checked, instruction_set

# Visible and all patches of 224 pixels, 384 and 512 pixels; images of a call, so that calls take about as long.
CPU_BATCHES = {50: 8, 197: 8, 577: 2, 1025: 1}
CUDA_BATCHES = {tokens: 32 * images for tokens, images in CPU_BATCHES.items()}
HEAD_DIMS = (32, 64, 128)
HEADS = 12
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}


def measured(device: str, dtype: str, dims: Sequence[int], seconds: float) -> Iterator[tuple[str, list]]:
    """Pass and [tokens, head dim, time of ours without statistics over that of PyTorch's], shape by shape."""
    for dim in dims:
        for tokens, images in (CUDA_BATCHES if device == "cuda" else CPU_BATCHES).items():
            for kind in PASSES:
                shape = Shape(images, HEADS, tokens, dim)
                case = attention_case(shape, getattr(torch, dtype), device, backward=kind == "training")
                versions = {"ours": case.versions["bare"], "sdpa": case.versions["sdpa"]}
                # The checks of bench compute materialised attention, which would take longest here. By the host's clock
                # on a CPU, whose memory is then not measured.
                case = replace(case, versions=versions, flops=None, check=lambda: None, on_host=device == "cpu")
                timing = measure(case, device, dtype, seconds)
                yield kind, [tokens, dim, round(timing.median["ours"] / timing.median["sdpa"], 2)]


def replaced(table: dict, row: dict) -> dict:
    """The table with a row in the place of that of its device, instruction set and dtype, in order."""

    def place(one: dict) -> tuple[str, str, str]:
        return one["device"], one["instruction_set"], one["dtype"]

    others = [one for one in table["measured"] if place(one) != place(row)]
    return {**table, "measured": sorted([*others, row], key=place)}


def rendered(table: dict) -> str:
    """The text of ``measured.json``: measurements of a head dim in one line."""
    rows = []
    for row in table["measured"]:
        fields = [f"   {json.dumps(name)}: {json.dumps(row[name])}" for name in row if name not in PASSES]
        for kind in PASSES:
            dims = sorted({point[1] for point in row[kind]})
            lines = [", ".join(json.dumps(point) for point in sorted(row[kind]) if point[1] == dim) for dim in dims]
            fields.append(f"   {json.dumps(kind)}: [" + ",".join(f"\n    {line}" for line in lines) + "]")
        rows.append("  {\n" + ",\n".join(fields) + "\n  }")
    head = {name: value for name, value in table.items() if name != "measured"}
    text = "".join(f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in head.items())
    return "{\n" + text + ' "measured": [\n' + ",\n".join(rows) + "\n ]\n}\n"


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES[device], default=list(DTYPES[device]))
    parser.add_argument("--dims", nargs="+", type=int, default=list(HEAD_DIMS), help="head dims")
    parser.add_argument("--seconds", type=float, default=1.0, help="measuring time of each shape (default 1)")
    parser.add_argument("--comment", default="", help="kept with the measurements")
    parser.add_argument("--table", type=Path, default=TABLE, help="the file to change")
    options = parser.parse_args()
    isa = instruction_set(device)
    try:
        if isa is None:
            raise ValueError(f"there are no kernels for {device}: `mimkernels info` tells why")
        table = json.loads(options.table.read_text())
        checked(table, str(options.table))
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    prepare()
    for dtype in options.dtypes:
        row = {
            "device": device,
            "instruction_set": isa,
            "dtype": dtype,
            "machine": f"{device_name(torch.device(device))}, {torch.get_num_threads()} threads",
            "torch": torch.__version__.partition("+")[0],
            "comment": options.comment,
            **{kind: [] for kind in PASSES},
        }
        for kind, point in measured(device, dtype, options.dims, options.seconds):
            row[kind].append(point)
            tokens, dim, ratio = point
            kept = ": left to PyTorch" if ratio > 1 else ""
            print(f"{isa} {dtype:8} {kind:8} N={tokens:<4} D={dim:<3} {ratio:.2f}{kept}", flush=True)
        table = replaced(table, row)
        checked(table, str(options.table))
        options.table.write_text(rendered(table))
    return 0
