"""Triton compiles every kernel with whatever the contract gives it: what its interpreter runs may not compile."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.compiled import triton_kernels

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_case_of_the_contract_compiles():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.compiled.front_end"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    failed, kernels = json.loads(done.stdout)
    assert not failed, "\n".join(f"{case}: {message}" for case, message in failed.items())
    assert set(kernels) == triton_kernels.kernels(attention=True) | triton_kernels.kernels(attention=False)
