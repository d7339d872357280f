"""The contract on every instruction set that this CPU runs; that of this process has all of tests/test_contract.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mimkernels import testing
from mimkernels.ops import _native
from tests.cases import cases

ROOT = Path(__file__).resolve().parents[1]

ISAS = ("portable", "avx2", "avx2_bf16", "avx2_amx", "amx_emulated", "avx512", "avx512_bf16", "amx_bf16")
# Builds of attention alone, which has products of bf16; their other ops are those of avx2 or avx512.
OF_ATTENTION = frozenset(ISAS) - {"portable", "avx2", "avx512"}
NOT_HERE = ("does not support it", "is not an instruction set of this library")


def on_an_instruction_set(isa: str | None, *command: str) -> subprocess.CompletedProcess:
    """Run Python in a process whose kernels are those of one instruction set, if named; skip where there is none."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    if isa is not None:
        environment["MIMKERNELS_CPU_ISA"] = isa
    done = subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode and any(words in done.stderr for words in NOT_HERE):
        pytest.skip(f"this CPU or this build has no {isa}")
    return done


def is_of(op: str, isa: str | None) -> bool:
    """Whether an instruction set has a kernel of its own for an op."""
    return isa not in OF_ATTENTION or op in ("attention", "attention_qkvpacked")


@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != _native.library("cpu").isa])
def test_every_instruction_set_meets_the_contract(isa):
    done = on_an_instruction_set(isa, "-m", "tests.test_instruction_sets", isa)
    assert done.returncode == 0, done.stdout + done.stderr


def main() -> int:
    """Every case of an instruction set's own kernels in every dtype; prints those that fail."""
    isa = sys.argv[1]
    assert torch.ops.mimkernels.cpu_isa() == isa
    failed = 0
    for case in (case for case in cases() if "cpu" in testing.backends(case.op) and is_of(case.op, isa)):
        for dtype in case.dtypes:
            try:
                testing.check(case, "cpu", dtype)
            except AssertionError as error:
                failed += 1
                print(f"{case} {dtype}: {error}")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
