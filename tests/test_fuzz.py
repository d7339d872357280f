"""Random configurations of every op agree with fp64 on every backend, by the rule of mimkernels.testing.

`pytest tests/test_fuzz.py --configurations 10000` draws more of them. They run in processes of their own, so that a
crash is a result, too. A disagreement is printed with the command that repeats it and shows its arguments:

    MIMKERNELS_CPU_ISA=avx2 python -m tests.test_fuzz cpu attention 1234
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

from mimkernels import testing
from mimkernels.ops import _native
from mimkernels.ops._registry import BACKENDS, backend_state
from mimkernels.testing import DEVICE
from tests.cases import OPS as CONTRACT_OPS
from tests.cases import stated
from tests.configurations import OPS, Configuration, configuration
from tests.interpreter import quicken_interpreter
from tests.test_instruction_sets import ISAS, OF_BF16, is_of, on_an_instruction_set

# How many of each are drawn where --configurations does not say it: about a minute of one core for the CPU and one for
# the backends of GPUs.
FEW = {"cpu": 500, "cuda-emulated": 750, "triton": 120, "cuda": 2000}
FEW_OF_BF16 = 26  # on an instruction set that has no kernels of other types
# Numbers that found a fault: what rounding took of dS in bf16 added up in the gradient of logit_scale.
FOUND = {"attention": (62,), "attention_qkvpacked": (14,)}
CHUNK = 1000  # in one process
MANY = 400  # draws of a configuration that seems to disagree


def pytest_generate_tests(metafunc):
    if "first" not in metafunc.fixturenames:
        return
    asked = metafunc.config.getoption("--configurations")
    runs = []
    for backend in ("cpu", "triton", "cuda-emulated") if DEVICE == "cpu" else ("triton", "cuda"):
        given = os.environ.get("MIMKERNELS_CPU_ISA")
        for isa in ((given,) if given else ISAS) if backend == "cpu" else (None,):
            total = asked or (FEW_OF_BF16 if isa in OF_BF16 else FEW[backend])
            runs += [(backend, isa, first, min(CHUNK, total - first)) for first in range(0, total, CHUNK)]
    metafunc.parametrize(("backend", "isa", "first", "count"), runs)


def test_random_configurations_agree_with_fp64(backend, isa, first, count):
    command = ("-m", "tests.test_fuzz", backend, "--first", str(first), "--configurations", str(count))
    done = on_an_instruction_set(isa, *command)
    running = done.stderr.rpartition("\r")[0].rpartition("\r")[2]
    crash = f"{signal.strsignal(-done.returncode)}: {running}" if done.returncode < 0 else ""
    assert done.returncode == 0, f"{done.stdout}{crash or done.stderr[-2000:]}"


def test_every_op_has_random_configurations():
    assert OPS == CONTRACT_OPS


def configurations(backend: str, first: int, count: int) -> Iterator[tuple[str, int]]:
    """Numbers ``first`` to ``first + count`` of those that a backend takes, of all ops of its own in turn."""
    isa = _native.library("cpu").isa if backend == "cpu" else None
    ops = [op for op in OPS if backend in testing.backends(op) and is_of(op, isa)]
    for op in ops if first == 0 else ():
        yield from ((op, number) for number in FOUND.get(op, ()))
    for number in range(first, first + count):
        yield ops[number % len(ops)], number // len(ops)


def drawn(backend: str, op: str, number: int) -> Configuration:
    """A configuration, in bf16 where that is all the kernels are of; where Triton is interpreted, not in bf16, whose
    products are wrong there."""
    if backend == "cpu" and _native.library("cpu").isa in OF_BF16:
        return configuration(op, number, small=False, dtype=torch.bfloat16)
    case = configuration(op, number, small=backend not in ("cpu", "reference"))
    if (
        backend == "triton"
        and DEVICE == "cpu"
        and stated(op, "MATRIX_PRODUCTS", False)
        and case.dtypes == (torch.bfloat16,)
    ):
        return configuration(op, number, small=True, dtype=torch.float16)
    return case


def disagreement(backend: str, case: Configuration) -> str | None:
    """What is wrong with one configuration, or None."""
    (dtype,) = case.dtypes
    try:
        if case.non_finite and stated(case.op, "MATRIX_PRODUCTS", False):
            # Which statistics and gradients of a row of NaN are NaN is nobody's promise.
            inputs = case.inputs(dtype, DEVICE)
            out, exact = (
                made["out"].isfinite() for made, _ in (testing.run(case, inputs, backend), testing.oracle(case, inputs))
            )
            assert torch.equal(out, exact), "out: finite in other places than the oracle"
        else:
            check(case, backend, dtype)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        testing.plain_errors.cache_clear()
    return None


def check(case: Configuration, backend: str, dtype: torch.dtype) -> None:
    """The rule of mimkernels.testing; what a few draws refuse is asked of many.

    Of rows that attend one key, say, few draws have none with an error, and the plain expression seems to be exact.
    """
    try:
        testing.check(case, backend, dtype, DEVICE)
    except AssertionError:
        testing.plain_errors.cache_clear()
        testing.check(replace(case, draws=MANY), backend, dtype, DEVICE)


def to_repeat(backend: str, op: str, number: int) -> str:
    """The command that runs one configuration again."""
    isa = f"MIMKERNELS_CPU_ISA={_native.library('cpu').isa} " if backend == "cpu" else ""
    return f"{isa}python -m tests.test_fuzz {backend} {op} {number}"


def describe(case: Configuration) -> str:
    """The arguments of a configuration."""
    (dtype,) = case.dtypes
    lines = [
        f"{case.op} in {dtype}, gradients of {', '.join(case.grads) or 'nothing'}; {case.notes or 'plain numbers'}"
    ]
    for name, value in case.inputs(dtype, DEVICE).items():
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
    parser.add_argument("op", nargs="?", choices=OPS, help="one op instead of all in turn")
    parser.add_argument("number", nargs="?", type=int, help="one configuration of that op, whose arguments are shown")
    parser.add_argument("--first", type=int, default=0, metavar="NUMBER")
    parser.add_argument("--configurations", type=int, default=CHUNK, metavar="N")
    asked = parser.parse_args()
    if (missing := backend_state(asked.backend)) is not None:
        parser.exit(1, f"{missing}\n")
    if asked.backend == "triton" and DEVICE == "cpu":
        quicken_interpreter()
    if asked.number is not None:
        print(describe(drawn(asked.backend, asked.op, asked.number)))
        some = [(asked.op, asked.number)]
    elif asked.op is not None:
        some = [(asked.op, number) for number in range(asked.first, asked.first + asked.configurations)]
    else:
        some = configurations(asked.backend, asked.first, asked.configurations)
    wrong = 0
    for op, number in some:
        case, command = drawn(asked.backend, op, number), to_repeat(asked.backend, op, number)
        print(command, end="\r", file=sys.stderr, flush=True)
        found = disagreement(asked.backend, case)
        if found is not None:
            wrong += 1
            print(f"{found}\n  {command}  # {case.notes}", flush=True)
    print(f"{wrong} disagreements", file=sys.stderr)
    return wrong > 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fresh tensors hold NaN: an element that nobody wrote shows
    sys.exit(main())
