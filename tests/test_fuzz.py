"""Random configurations of every op agree with fp64 on every backend, by the rule of mimkernels.testing.

`pytest tests/test_fuzz.py --configurations 10000` draws more of them. Each runs in a process of its own, so that a
crash is a result. A disagreement is printed with the command that repeats it, such as

    python -m tests.test_fuzz cpu attention 1234
"""

from __future__ import annotations

import argparse
import os
import sys

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

from mimkernels import testing
from mimkernels.ops import _native
from mimkernels.ops._registry import BACKENDS
from mimkernels.testing import DEVICE
from tests.configurations import OPS, Configuration, configuration


def configurations(backend: str, first: int, count: int):
    """Numbers ``first`` to ``first + count`` of those that a backend takes, of all ops in turn."""
    ops = [op for op in OPS if backend in testing.backends(op)]
    for number in range(first, first + count):
        yield ops[number % len(ops)], number // len(ops)


def disagreement(backend: str, op: str, number: int) -> str | None:
    """What is wrong with one configuration, or None."""
    case = configuration(op, number, small=backend not in ("cpu", "reference"))
    (dtype,) = case.dtypes
    if not takes(backend, case):
        return None
    try:
        if case.non_finite and "attention" in op:
            outputs, _ = testing.run(case, case.inputs(dtype, DEVICE), backend)
            exact, _ = testing.oracle(case, case.inputs(dtype, DEVICE))
            assert torch.equal(outputs["out"].isfinite(), exact["out"].isfinite()), "out: NaN in other places"
        else:
            testing.check(case, backend, dtype, DEVICE)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        testing.plain_errors.cache_clear()
    return None


def takes(backend: str, case: Configuration) -> bool:
    """Interpreted, bf16 products are wrong."""
    interpreted = backend == "triton" and DEVICE == "cpu"
    return not (interpreted and case.dtypes[0] == torch.bfloat16 and testing.spec(case.op).name in PRODUCTS)


PRODUCTS = ("attention", "received_attention", "head_divergence")


def to_repeat(backend: str, op: str, number: int) -> str:
    """The command that runs one configuration again."""
    isa = _native.library("cpu").isa if backend == "cpu" else None
    return (f"MIMKERNELS_CPU_ISA={isa} " if isa else "") + f"python -m tests.test_fuzz {backend} {op} {number}"


def describe(backend: str, op: str, number: int) -> str:
    """The arguments of a configuration."""
    case = configuration(op, number, small=backend not in ("cpu", "reference"))
    lines = [f"{op}({case.dtypes[0]}), gradients of {', '.join(case.grads) or 'nothing'}; {case.notes}"]
    for name, value in case.inputs(case.dtypes[0], DEVICE).items():
        if isinstance(value, torch.Tensor):
            finite = value[value.isfinite()]
            least, most = (finite.min().item(), finite.max().item()) if finite.numel() else (None, None)
            value = (
                f"{list(value.shape)} {str(value.dtype)[6:]}, strides {list(value.stride())}, from {least} to {most}, "
                f"{value.numel() - finite.numel()} not finite"
            )
        lines.append(f"  {name}: {value}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare random configurations with fp64.")
    parser.add_argument("backend", choices=BACKENDS)
    parser.add_argument("op", nargs="?", choices=OPS, help="with a number: one configuration")
    parser.add_argument("number", nargs="?", type=int)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--configurations", type=int, default=1000)
    asked = parser.parse_args()
    some = [(asked.op, asked.number)]
    if asked.op is None:
        some = configurations(asked.backend, asked.first, asked.configurations)
    elif asked.number is None:
        some = ((asked.op, number) for number in range(asked.first, asked.first + asked.configurations))
    else:
        print(describe(asked.backend, asked.op, asked.number))
    wrong = 0
    for op, number in some:
        print(to_repeat(asked.backend, op, number), end="\r", file=sys.stderr, flush=True)
        found = disagreement(asked.backend, op, number)
        if found is not None:
            wrong += 1
            print(f"{found}  # {to_repeat(asked.backend, op, number)} {configuration(op,number,False).notes}", flush=True)
    print(f"{wrong} disagreements")
    return wrong > 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
