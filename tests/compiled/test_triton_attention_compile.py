"""The Triton attention kernels compile ahead of time for every architecture, within stated registers and memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from mimkernels.ops.attention import triton_configs
from tests.compiled import attention_aot, triton_kernels, triton_resources
from tests.once import once

ENTRIES = attention_aot.entries()
# Bytes of shared memory per block. The block sizes of 80 are also what 8.6, 8.9 and 12.0 get, which have no more.
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# Bytes that a thread of a backward kernel may spill, and of one whose block sizes are another architecture's. Other
# forward kernels and companions spill nothing.
SPILLS = json.loads((Path(__file__).parent / "triton_attention_spills.json").read_text())


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, list[dict] | str]:
    return once(tmp_path_factory, "triton-resources", triton_resources.read)


@pytest.mark.parametrize("entry", ENTRIES, ids=triton_resources.attention_name)
def test_committed_block_sizes_fit_and_spill_no_more_than_stated(entry, compiled):
    kernel, arch, *_ = entry
    name = triton_resources.attention_name(entry)
    assert not isinstance(compiled[name], str), compiled[name]
    assert compiled[name], "the launcher does not run this entry's kernel"
    for launch in compiled[name]:
        forward = kernel in ("forward", "masked", "companion") or launch["kernel"] == "attention_fwd_kernel"
        allowed = 0 if forward and arch != 120 else SPILLS.get(name, 0)
        assert launch["stack"] <= allowed, f"{launch} spills more than {allowed} bytes"
        assert launch["shared"] <= SHARED[arch], f"{launch} needs more shared memory than {SHARED[arch]}"


def test_every_kernel_is_compiled(compiled):
    launches = [launch for entry in ENTRIES for launch in compiled[triton_resources.attention_name(entry)]]
    assert {launch["kernel"] for launch in launches} == triton_kernels.kernels(attention=True)


def test_every_call_finds_block_sizes():
    for arch in triton_configs.ARCHITECTURES:
        for precision in triton_configs.PRECISIONS:
            for kernel in ("forward", "masked", "dq", "dkv", "companion"):
                for length in (0, 1, 64, 65, 200, 257, 10**6):
                    for extra in (False,) if kernel == "companion" else (False, True):
                        assert triton_configs.config(kernel, arch, precision, 128, length, extra) is not None
