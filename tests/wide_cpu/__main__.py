"""``python -m tests.wide_cpu ISA``: random configurations on the emulated CPU, compared with fp64; or instructions.

``LD_BIND_NOW=1 python -m tests.wide_cpu amx_bf16 --instructions`` counts what attention needs per 16 scores.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable

import torch

import mimkernels
from mimkernels.commands.bench.cases.attention import MEASURED
from tests import test_fuzz
from tests.configurations import configuration
from tests.test_instruction_sets import OF_BF16
from tests.wide_cpu.kernels import ISAS, Kernels

HEADS = 12  # of one image, which share its distances
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


def attention_of(tokens: int, dim: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """One image's calls: forward, with the statistics that are measured, and the backwards of both."""
    q, k, v = (torch.randn(1, HEADS, tokens, dim, dtype=dtype, requires_grad=True) for _ in range(3))
    side = int((tokens - 1) ** 0.5)
    grid = torch.stack(torch.meshgrid(*[torch.arange(float(side))] * 2, indexing="ij"), -1).reshape(-1, 2)
    known = {"num_prefix": tokens - side * side, "positions": grid, "stats": MEASURED}

    def backward(**options) -> Callable[[], object]:
        made = mimkernels.attention(q, k, v, **options)
        outputs = [made.out, *(values for values in made.stats.values() if values.requires_grad)]
        upstream = [torch.ones_like(output) for output in outputs]
        return lambda: torch.autograd.grad(outputs, [q, k, v], upstream)

    return {
        "forward": lambda: mimkernels.attention(q, k, v),
        "statistics": lambda: mimkernels.attention(q, k, v, **known),
        "backward": backward(),
        "of both": backward(**known),
    }


def dtypes_of(isa: str) -> tuple[torch.dtype, ...]:
    return (torch.bfloat16,) if isa in OF_BF16 else (torch.float32, torch.bfloat16)


def instructions(kernels: Kernels, isa: str) -> None:
    print(f"{isa}: instructions per 16 scores of {HEADS} heads")
    print(f"{'tokens':>8}{'dim':>6}{'dtype':>10}{'forward':>10}{'statistics':>12}{'backward':>10}{'of both':>10}")
    for dtype in dtypes_of(isa):
        for tokens, dim in SHAPES:
            calls = attention_of(tokens, dim, dtype)
            forward, statistics, backward, both = (
                16 * kernels.count(call) / (HEADS * tokens**2) for call in calls.values()
            )
            name = str(dtype).removeprefix("torch.")
            counts = f"{forward:10.1f}{statistics:12.1f}{backward:10.1f}{both:10.1f}"
            print(f"{tokens:8}{dim:6}{name:>10}{counts}", flush=True)


def hottest(kernels: Kernels, isa: str, tokens: int, dim: int, call: str) -> None:
    """The functions and the straight runs of which a hundredth of the instructions are."""
    runs = kernels.runs_of(attention_of(tokens, dim, dtypes_of(isa)[0])[call])
    scale = 16 / (HEADS * tokens**2)
    functions: Counter[str] = Counter()
    for times, function, lines in runs:
        functions[function] += times * len(lines)
    total = sum(functions.values())
    print(f"{isa}: {call}, {total * scale:.1f} instructions per 16 scores")
    for function, count in functions.most_common():
        if count >= total / 100:
            print(f"{count * scale:8.2f} {function[:100]}")
    for times, function, lines in runs:
        if times * len(lines) >= total / 100:
            print(f"\n{times * len(lines) * scale:.2f}: {len(lines)} instructions, {times} times, in {function[:80]}")
            print("\n".join(f"    {line}" for line in lines))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.wide_cpu", description=__doc__.splitlines()[0])
    parser.add_argument("isa", choices=ISAS)
    parser.add_argument("--first", type=int, default=0, metavar="NUMBER")
    parser.add_argument("--configurations", type=int, default=60, metavar="N")
    parser.add_argument("--instructions", action="store_true", help="count those of attention instead")
    parser.add_argument(
        "--hottest",
        nargs=3,
        metavar=("TOKENS", "DIM", "CALL"),
        help="show where they are; CALL is a column of --instructions",
    )
    asked = parser.parse_args()
    mimkernels.keep_freed_memory()  # no system calls while kernels run
    kernels = Kernels(asked.isa)
    torch.manual_seed(0)
    if asked.hottest:
        tokens, dim, call = asked.hottest
        hottest(kernels, asked.isa, int(tokens), int(dim), call)
        return 0
    if asked.instructions:
        instructions(kernels, asked.isa)
        return 0
    wrong = compare(asked.isa, asked.first, asked.configurations)
    calls = ", ".join(f"{name} {count}" for name, count in sorted(kernels.calls.items()))
    print(f"{asked.isa}: {calls}; {kernels.counter('tile_instructions')} tile instructions; {wrong} disagreements")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
