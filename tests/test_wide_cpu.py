"""What is compiled for AVX-512 and AMX runs, instruction by instruction, on CPUs that have neither: in Bochs.

Skipped where ``bochscpu-python`` is not installed, which has wheels for Linux on x86-64 alone.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mimkernels.ops import _native

ROOT = Path(__file__).resolve().parents[1]
# All ops in turn, and attention alone on the sets that are of it.
CONFIGURATIONS = {"avx512": 44, "avx512_bf16": 12, "amx_bf16": 12}


@pytest.mark.skipif(importlib.util.find_spec("bochscpu") is None, reason="bochscpu-python is not installed")
@pytest.mark.parametrize("isa", CONFIGURATIONS)
def test_random_configurations_agree_with_fp64_on_an_emulated_cpu(isa):
    if isa not in _native.library("cpu").build.get("isas", {}):
        pytest.skip(f"this build has no {isa}")
    command = [sys.executable, "-m", "tests.wide_cpu", isa, "--configurations", str(CONFIGURATIONS[isa])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "LD_BIND_NOW": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("MIMKERNELS_CPU_ISA", None)
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 disagreements" in done.stdout and "attention_bwd" in done.stdout
    if isa == "amx_bf16":
        assert " 0 tile instructions" not in done.stdout
