"""Triton kernels that are compiled once serve every batch: none stalls a training at a short last batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


def test_a_change_of_batch_or_mask_ratio_compiles_nothing():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.compiled.sizes_aot"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    binaries = json.loads(done.stdout)
    assert len(binaries) >= 26 and all(number == 1 for number in binaries.values()), binaries
