"""``python -m tests.wide_cpu ISA``: random configurations on the emulated CPU, compared with fp64; or instructions.

``LD_BIND_NOW=1 python -m tests.wide_cpu amx_bf16 --instructions`` counts what attention needs per 16 scores.
"""

from __future__ import annotations

import argparse
import sys

import torch

import mimkernels
from mimkernels.commands.bench.cases.attention import MEASURED
from tests import test_fuzz
from tests.configurations import configuration
from tests.test_instruction_sets import OF_BF16
from tests.wide_cpu.kernels import ISAS, Kernels

SHAPES = ((50, 64), (197, 64), (197, 32), (577, 64), (1025, 64))


def compare(isa: str, first: int, count: int) -> int:
    wrong = 0
    for op, number in test_fuzz.configurations("cpu", first, count):
        case = configuration(op, number, small=True, dtype=torch.bfloat16 if isa in OF_BF16 else None)
        found = test_fuzz.disagreement("cpu", case)
        if found is not None:
            wrong += 1
            print(f"{found}\n  {op} {number} on {isa}  # {case.notes}", flush=True)
    return wrong


def instructions(kernels: Kernels, isa: str) -> None:
    """A table of instructions of one head: forward, with the statistics that are measured, backward."""
    print(f"{isa}: instructions per 16 scores")
    print(f"{'tokens':>8}{'dim':>6}{'dtype':>10}{'forward':>10}{'statistics':>12}{'backward':>10}")
    for dtype in (torch.bfloat16,) if isa in OF_BF16 else (torch.float32, torch.bfloat16):
        for tokens, dim in SHAPES:
            q, k, v = (torch.randn(1, 1, tokens, dim, dtype=dtype, requires_grad=True) for _ in range(3))
            side = int((tokens - 1) ** 0.5)
            grid = torch.stack(torch.meshgrid(*[torch.arange(float(side))] * 2, indexing="ij"), -1).reshape(-1, 2)
            known = {"num_prefix": tokens - side * side, "positions": grid, "stats": MEASURED}
            done = []
            counts = [
                kernels.count(lambda: done.append(mimkernels.attention(q, k, v).out)),  # noqa: B023
                kernels.count(lambda: mimkernels.attention(q, k, v, **known)),  # noqa: B023
                kernels.count(lambda: done[0].backward(torch.ones_like(done[0]))),  # noqa: B023
            ]
            forward, statistics, backward = (16 * count / tokens**2 for count in counts)
            name = str(dtype).removeprefix("torch.")
            print(f"{tokens:8}{dim:6}{name:>10}{forward:10.1f}{statistics:12.1f}{backward:10.1f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.wide_cpu", description=__doc__.splitlines()[0])
    parser.add_argument("isa", choices=ISAS)
    parser.add_argument("--first", type=int, default=0, metavar="NUMBER")
    parser.add_argument("--configurations", type=int, default=60, metavar="N")
    parser.add_argument("--instructions", action="store_true", help="count them instead")
    asked = parser.parse_args()
    mimkernels.keep_freed_memory()  # no system calls while kernels run
    kernels = Kernels(asked.isa)
    torch.manual_seed(0)
    if asked.instructions:
        instructions(kernels, asked.isa)
        return 0
    wrong = compare(asked.isa, asked.first, asked.configurations)
    calls = ", ".join(f"{name} {count}" for name, count in sorted(kernels.calls.items()))
    print(f"{asked.isa}: {calls}; {kernels.counter('tile_instructions')} tile instructions; {wrong} disagreements")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
