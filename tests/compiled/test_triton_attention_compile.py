"""The Triton attention kernels compile ahead of time for every architecture, within stated registers and memory.

The first run compiles (minutes on two cores); Triton's cache makes later ones take seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from mimkernels.ops.attention import triton_configs
from mimkernels.ops.attention.triton_table import TABLE
from tests.compiled import triton_kernels
from tests.once import once

HERE = Path(__file__).parent
# Bytes of shared memory per block. 80 is also what consumer GPUs of compute capability 8.6, 8.9 and 12.0 get.
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# The head dims compiled for an entry: its largest, and in the forward kernel one made of two pieces.
HEAD_DIMS = {("forward", 64): (64,), ("forward", 128): (128, 80), ("masked", 128): (128, 80)}
# Bytes that a thread of a backward kernel may spill. Forward kernels and companions spill nothing.
SPILLS = json.loads((HERE / "triton_attention_spills.json").read_text())


def entries() -> list[tuple]:
    """Each distinct binary that the table leads to: (kernel, arch, precision, head dim, tokens or None, extra).

    Where calls with and without statistics share block sizes, those with all statistics stand for both.
    """
    found: dict[tuple, tuple] = {}
    for (kernel, arch, precision, most_dim, length, extra), blocks in TABLE.items():
        # fp32 and TF32 block sizes serve all architectures; those of most GPUs are compiled.
        for target in (arch,) if arch else (80, 90):
            for dim in HEAD_DIMS.get((kernel, most_dim), (most_dim,)):
                one_pass = kernel in ("forward", "masked") and length <= blocks[1]
                entry = (kernel, target, precision, dim, None if length == triton_configs.ANY else length, extra)
                binary = (kernel, target, precision, dim, blocks, one_pass)
                if extra or binary not in found:
                    found[binary] = entry
    return [*found.values(), *beside_the_table()]


def beside_the_table() -> list[tuple]:
    """Kernels that take the block sizes of "dq", or always the same."""
    targets = ((80, "half"), (90, "half"), (100, "half"), (80, "fp32"), (80, "tf32"))
    found = [
        (kernel, arch, precision, dim, None, True)
        for kernel, dims in (("dbias", (64, 128)), ("coef", (64,)))
        for arch, precision in targets
        for dim in dims
    ]
    # Windows of 7 x 7 and of 16 x 16 tokens.
    return found + [("windows", *target, 32, tokens, True) for target in targets for tokens in (49, 256)]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[tuple, list[dict]]:
    return once(tmp_path_factory, "triton-attention-compile", compile_all)


def compile_all() -> dict[tuple, list[dict]]:
    """What every entry takes, by entry."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), environment.get("PYTHONPATH", "")])
    workers = min(4, os.cpu_count() or 1)
    running = []
    for first in range(workers):
        process = subprocess.Popen(
            [sys.executable, HERE / "attention_aot.py"],
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": environment, "text": True},
        )
        process.stdin.write("".join(json.dumps(entry) + "\n" for entry in entries()[first::workers]))
        process.stdin.close()
        process.stdin = None
        running.append(process)
    found: dict[tuple, list[dict]] = {}
    for process in running:
        made, _ = process.communicate()
        assert process.returncode == 0, "a kernel does not compile; its error is above"
        for line in made.splitlines():
            result = json.loads(line)
            found.setdefault(tuple(result.pop("entry")), []).append(result)
    return found


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: "-".join(str(part) for part in entry))
def test_committed_block_sizes_fit_and_spill_no_more_than_stated(entry, compiled):
    kernel, arch, *_ = entry
    assert compiled[entry], "the launcher does not run this entry's kernel"
    for launch in compiled[entry]:
        forward = kernel in ("forward", "masked", "companion") or launch["kernel"] == "attention_fwd_kernel"
        allowed = 0 if forward else SPILLS.get("-".join(str(part) for part in entry), 0)
        assert launch["spilled"] <= allowed, f"{launch} spills more than {allowed} bytes"
        assert launch["shared"] <= SHARED[arch], f"{launch} needs more shared memory than {SHARED[arch]}"


def test_every_kernel_is_compiled(compiled):
    seen = {launch["kernel"] for launches in compiled.values() for launch in launches}
    assert seen == triton_kernels.kernels(attention=True)


def test_every_call_finds_block_sizes():
    for arch in triton_configs.ARCHITECTURES:
        for precision in triton_configs.PRECISIONS:
            for kernel in ("forward", "masked", "dq", "dkv", "companion"):
                for length in (0, 1, 64, 65, 200, 257, 10**6):
                    for extra in (False,) if kernel == "companion" else (False, True):
                        assert triton_configs.config(kernel, arch, precision, 128, length, extra) is not None
