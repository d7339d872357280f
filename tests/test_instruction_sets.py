"""The contract on every instruction set that this CPU runs; that of this process has all of tests/test_contract.py."""

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mimkernels import testing
from mimkernels.ops import _native
from tests.cases import cases
from tests.once import once

ROOT = Path(__file__).resolve().parents[1]

ISAS = ("portable", "avx2", "avx2_bf16", "avx2_amx", "amx_emulated", "avx512", "avx512_bf16", "amx_bf16")
# Builds of attention of bf16 alone, whose products they have; all else is that of avx2 or avx512.
OF_BF16 = frozenset(ISAS) - {"portable", "avx2", "avx512"}
NOT_HERE = ("does not support it", "is not an instruction set of this library")
WIDE = ("avx512", "avx512_bf16", "amx_bf16")


def skip_what_is_too_wide(isa: str | None) -> None:
    """Skip an instruction set that this CPU does not have, as far as this process knows.

    The library takes the best set of the CPU: where that is narrower than AVX-512, none of ``WIDE`` is here.
    """
    if isa in WIDE and "MIMKERNELS_CPU_ISA" not in os.environ and _native.library("cpu").isa in ("portable", "avx2"):
        pytest.skip(f"this CPU or this build has no {isa}")


def on_an_instruction_set(isa: str | None, *command: str) -> subprocess.CompletedProcess:
    """Run Python in a process whose kernels are those of one instruction set, if named; skip where there is none."""
    skip_what_is_too_wide(isa)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    if isa is not None:
        environment["MIMKERNELS_CPU_ISA"] = isa
    done = subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode and any(words in done.stderr for words in NOT_HERE):
        pytest.skip(f"this CPU or this build has no {isa}")
    return done


def is_of(op: str, isa: str | None) -> bool:
    """Whether an instruction set has a kernel of its own for an op."""
    return isa not in OF_BF16 or op in ("attention", "attention_qkvpacked")


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != _native.library("cpu").isa])
def test_every_instruction_set_meets_the_contract(isa, plain_errors, tmp_path):
    (tmp_path / "plain.pickle").write_bytes(pickle.dumps(plain_errors))
    done = on_an_instruction_set(isa, "-m", "tests.test_instruction_sets", isa, str(tmp_path / "plain.pickle"))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def plain_errors(tmp_path_factory) -> dict:
    """What the kernels' errors are compared with first: torch's in one draw, the same beside all instruction sets."""

    def measure() -> dict:
        return {
            (str(case), dtype): testing.plain_errors(case, dtype, "cpu", "contiguous", 1)
            for case, dtype in of_kernels()
        }

    return once(tmp_path_factory, "plain-errors", measure)


def of_kernels(isa: str | None = None) -> Iterator[tuple[testing.Case, torch.dtype]]:
    """Every case of an instruction set, or of all, in every dtype; where bf16 alone is its own, one case in others."""
    seen = set()
    for case in (case for case in cases() if "cpu" in testing.backends(case.op) and is_of(case.op, isa)):
        for dtype in case.dtypes:
            if isa not in OF_BF16 or dtype == torch.bfloat16 or case.op not in seen:
                yield case, dtype
        seen.add(case.op)


def main() -> int:
    """Compares every case of an instruction set with the oracle; prints those that fail."""
    isa, file = sys.argv[1:]
    assert torch.ops.mimkernels.cpu_isa() == isa
    known = pickle.loads(Path(file).read_bytes())
    measured = testing.plain_errors

    def plain_errors(case: testing.Case, dtype: torch.dtype, device: str, layout: str, draws: int) -> dict[str, float]:
        return known[str(case), dtype] if draws == 1 else measured(case, dtype, device, layout, draws)

    testing.plain_errors = plain_errors
    failed = 0
    for case, dtype in of_kernels(isa):
        try:
            testing.check(case, "cpu", dtype)
        except AssertionError as error:
            failed += 1
            print(f"{case} {dtype}: {error}")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
