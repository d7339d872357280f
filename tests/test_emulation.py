"""The emulation of CUDA on the host: it finds the faults planted in tests/emulation, and its numbers are right."""

import ctypes
import json
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from mimkernels.ops import _native
from mimkernels.ops._registry import SPECS

LIBRARY = _native.FOLDER / "libmimkernels_emulation_tests.so"
SOURCES = Path(__file__).resolve().parent / "emulation"
FLOATS16 = [(torch.float16, "half"), (torch.bfloat16, "bfloat16")]
# These need AddressSanitizer, which knows where each allocation ends.
BOUNDS = (
    "global_past_the_end",
    "global_store_past_the_end",
    "copy_from_past_the_end",
    "left_rows_past_the_end",
)


@pytest.fixture(scope="module")
def kernels():
    library = ctypes.CDLL(str(LIBRARY))  # make build
    library.fault_count.restype = ctypes.c_int
    for name in ("fault_name", "run_fault", "run_refused"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def called(function, *arguments) -> str:
    """The error text of an exported function; tensors are handed over by their address."""
    function.restype = ctypes.c_char_p
    passed = [
        ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else ctypes.c_int64(a) if type(a) is int else a
        for a in arguments
    ]
    return function(*passed).decode()


def planted_faults() -> dict[str, set[str]]:
    """The kernels with faults, and the lines that are marked in each, as messages name them."""
    found, name = {}, None
    for file in ("faults.cu", "attention_faults.cuh"):
        for number, line in enumerate((SOURCES / file).read_text().splitlines(), 1):
            if kernel := re.match(r"__global__ void (\w+)\(", line):
                name = kernel[1]
                found[name] = set()
            if line.endswith("// fault"):
                found[name].add(f"{file}:{number}")
    return found


FAULTS = planted_faults()
SHARED = {
    "missing_barrier": "shared memory, which no thread of the block has written so far",
    "missing_barrier_before_write": "which another thread read, with no barrier between them",
    "two_writers": "which thread 0 wrote, with no barrier between them",
    "missing_warp_barrier": "which no thread of the block has written so far",
    "warp_barrier_for_a_block": "which no thread of the block has written so far",
    "half_a_warp_barrier": "which thread 16 wrote, with no barrier between them",
    "missing_link": "which thread 0 wrote, with no barrier between them",
    "shuffle_for_a_barrier": "which thread 1 wrote, with no barrier between them",
    "warp_barrier_before_write": "which thread 0 wrote, with no barrier between them",
    "shared_past_the_end": "writes 4 bytes at 256 of shared memory of which the launch has 256 bytes",
    "shared_before_the_start": "writes 4 bytes at -4 of shared memory of which the launch has 256 bytes",
    "shared_not_written": "thread 5: reads 4 bytes at 20 of shared memory, which no thread",
    "shared_of_the_block_before": "block (1, 0, 0), thread 0: reads 4 bytes at 0 of shared memory, which no thread",
    "copy_not_waited_for": "to which an asynchronous copy of thread 0 is under way",
    "copy_waited_for_too_little": "at 16 of shared memory, to which an asynchronous copy of thread 0 is under way",
    "copy_not_committed": "to which an asynchronous copy of thread 0 is under way",
    "copy_without_barrier": "which no thread of the block has written so far",
    "copy_overwritten": "to which an asynchronous copy of thread 0 is under way",
    "copy_over_what_is_read": "to which an asynchronous copy of thread 0 is under way",
    "group_read_too_early": "wrote, with no barrier between them",
    "group_stored_over": "with no barrier between them",
    "columns_read_too_early": "which no thread of the block has written so far",
    "left_rows_not_waited_for": "to which an asynchronous copy of thread 0 is under way",
}
MEETINGS = {
    "divergent_barrier": "waits at __syncthreads, but thread 40 has exited",
    "two_kinds_of_barrier": "thread 32: waits at __syncthreads_or, but thread 0 waits at __syncthreads",
    "barrier_in_half_a_warp": "waits at __syncwarp (mask 0xffffffff), but thread 16 waits at __syncthreads",
    "lane_missing_in_a_shuffle": "waits at __shfl_xor_sync (mask 0xffffffff), but thread 7 has exited",
    "lane_missing_in_a_product": "waits at multiply_add_tf32 (mask 0xffffffff), but thread 7 has exited",
    "lane_at_another_collective": "waits at __shfl_xor_sync (mask 0xffffffff), but thread 7 waits at a vote",
    "masks_that_differ": "but thread 3 waits at __shfl_xor_sync (mask 0x0000ffff)",
    "own_lane_not_in_the_mask": "thread 31: calls a vote with a mask without its own lane",
    "shuffle_from_outside_the_mask": "__shfl_sync reads lane 16, which is not in the mask",
}
ADDRESSES = {
    "misaligned_load": "does not lie on 16 bytes",
    "misaligned_store": "does not lie on 16 bytes",
    "misaligned_copy": "copy_async with an address that does not lie on 16 bytes",
    "null_pointer": "a null pointer",
    "index_past_a_local_array": "past the end of an",
    "two_threads_write": "global memory, which thread 0 wrote, with no barrier between them",
    "two_blocks_write": "block (1, 0, 0), thread 0: writes 4 bytes",
    "read_of_another_blocks_write": "which another block of this launch wrote",
    "write_over_another_blocks_read": "which another block of this launch read",
}
STRIPS = {
    "rows_not_waited_for": "to which an asynchronous copy of thread",
    "rows_past_their_place": "at 1280 of shared memory of which the launch has 1280 bytes",
    "rows_over_fragments": "read, with no barrier between them",
    "keys_without_barrier": "which no thread of the block has written so far",
    "values_without_barrier": "which no thread of the block has written so far",
    "strip_stored_too_early": "which no thread of the block has written so far",
    "points_without_barrier": "which no thread of the block has written so far",
}
EXPECTED = {**SHARED, **MEETINGS, **ADDRESSES, **STRIPS}


def test_every_planted_fault_is_tested(kernels):
    names = [kernels.fault_name(which).decode() for which in range(kernels.fault_count())]
    assert names == list(FAULTS)
    assert set(names) == {*EXPECTED, *BOUNDS}


def run(kernels, name: str, right: bool) -> str:
    given = torch.arange(256, dtype=torch.float32)
    taken = torch.zeros(256)
    return called(kernels.run_fault, list(FAULTS).index(name), ctypes.c_bool(right), given, taken)


def named_lines(text: str) -> set[str]:
    """The lines of these files where the fault is, or that call the function of the kernels' headers where it is."""
    first = text.split("\n  the other at ")[0]
    return set(re.findall(r"^ +(?:at|inlined into) tests/emulation/(\w+\.cuh?:\d+) in ", first, re.M))


@pytest.mark.parametrize("name", EXPECTED)
def test_a_fault_is_found_and_its_line_named(kernels, name):
    text = run(kernels, name, right=False)
    assert re.match(rf"kernel \S*( namespace\)::)?{name}\(.*\), block \(\d, 0, 0\), thread \d+: ", text), text
    assert EXPECTED[name] in text
    assert named_lines(text) & FAULTS[name], text


@pytest.mark.parametrize("name", EXPECTED)
def test_the_kernel_without_the_fault_passes(kernels, name):
    assert run(kernels, name, right=True) == ""


def test_a_fault_leaves_nothing_behind(kernels):
    for name in EXPECTED:
        assert run(kernels, name, right=False)
        assert run(kernels, name, right=True) == ""


def test_accesses_past_an_allocation_are_found_under_address_sanitizer():
    preloaded = []
    for name in ("libasan.so", "libstdc++.so.6"):  # the second, because Python has no exceptions of C++ to intercept
        found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        preloaded.append(found.stdout.strip())
        assert os.path.isabs(preloaded[-1]), f"g++ has no {name}"
    code = (
        "import ctypes, json, sys\n"
        "kernels = ctypes.CDLL(sys.argv[1])\n"
        "kernels.run_fault.restype = ctypes.c_char_p\n"
        "malloc = ctypes.CDLL(None).malloc\n"
        "malloc.restype = ctypes.c_void_p\n"
        "memory = [ctypes.c_void_p(malloc(512)) for _ in range(2)]\n"
        "texts = [kernels.run_fault(ctypes.c_int64(int(which)), ctypes.c_bool(right), *memory).decode()\n"
        "         for which in sys.argv[2:] for right in (False, True)]\n"
        "print(json.dumps(texts))\n"
    )
    numbers = [str(list(FAULTS).index(name)) for name in BOUNDS]
    environment = {**os.environ, "LD_PRELOAD": " ".join(preloaded), "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sys.executable, "-c", code, LIBRARY, *numbers], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    texts = json.loads(done.stdout.splitlines()[-1])
    for name, wrong, right in zip(BOUNDS, texts[::2], texts[1::2], strict=True):
        assert right == ""
        assert "of global memory, which no allocation holds" in wrong
        assert named_lines(wrong) & FAULTS[name], wrong


@pytest.mark.parametrize(
    ("threads", "shared_bytes", "text"),
    [
        (2048, 0, "invalid configuration argument"),
        (0, 0, "invalid configuration argument"),
        (32, 128 * 1024, "invalid argument"),
    ],
)
def test_a_launch_that_no_device_takes_is_refused(kernels, threads, shared_bytes, text):
    memory = torch.zeros(256)
    assert called(kernels.run_refused, threads, shared_bytes, memory, memory) == text


def truncate(exact: torch.Tensor) -> torch.Tensor:
    """fp64 to fp32 towards zero."""
    near = exact.float()
    return torch.where(near.double().abs() > exact.abs(), torch.nextafter(near, torch.zeros(())), near)


@pytest.mark.parametrize(("dtype", "name"), FLOATS16)
def test_products_of_fragments_are_those_of_the_matrices(kernels, dtype, name):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        a = torch.randn(16, 16, generator=generator).to(dtype)
        b = torch.randn(16, 8, generator=generator).to(dtype)
        d = torch.randn(16, 8, generator=generator)
        expected = truncate(a.double() @ b.double() + d.double())
        assert not called(getattr(kernels, f"product_{name}"), a, b, d)
        torch.testing.assert_close(d, expected, rtol=2.0**-23, atol=1e-30)


def test_products_round_towards_zero(kernels):
    a, b = torch.zeros(16, 16, dtype=torch.float16), torch.zeros(16, 8, dtype=torch.float16)
    a[:, 0], b[0, :] = 0.75 * 2.0**-10, 2.0**-13  # 3/4 of the last bit of 1
    d = torch.ones(16, 8)
    assert not called(kernels.product_half, a, b, d)
    assert (d == 1).all()


@pytest.mark.parametrize(("dtype", "name"), FLOATS16)
def test_a_group_stored_by_one_warp_is_transposed_for_another(kernels, dtype, name):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(16, 16, generator=generator)
    b = torch.randn(16, 8, generator=generator).to(dtype)
    d = torch.randn(16, 8, generator=generator)
    expected = truncate(w.to(dtype).double().T @ b.double() + d.double())
    assert not called(getattr(kernels, f"transposed_group_{name}"), w, b, d)
    torch.testing.assert_close(d, expected, rtol=2.0**-23, atol=1e-30)


@pytest.mark.parametrize("rounded", [False, True])
def test_products_of_tf32_drop_the_low_bits(kernels, rounded):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, 8, generator=generator), torch.randn(8, 8, generator=generator)
    d = torch.randn(16, 8, generator=generator)

    def operand(x):
        bits = x.view(torch.int32) + (0x1000 if rounded else 0)
        return (bits & ~0x1FFF).view(torch.float32).double()

    expected = truncate(operand(a) @ operand(b) + d.double())
    assert not called(kernels.product_tf32, a, b, d, ctypes.c_bool(rounded))
    torch.testing.assert_close(d, expected, rtol=2.0**-23, atol=1e-30)


@pytest.mark.parametrize("transposed", [False, True])
def test_loaded_fragments_hold_the_elements_they_should(kernels, transposed):
    matrices = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    out = torch.empty(4, 32, 2, dtype=torch.int16)
    assert not called(kernels.fragments, matrices, out, ctypes.c_bool(transposed))
    lanes = torch.arange(32)
    rows, columns = lanes // 4, 2 * (lanes % 4)
    for element in (0, 1):
        places = (columns + element, rows) if transposed else (rows, columns + element)
        assert torch.equal(out[:, :, element], matrices[:, places[0], places[1]])


def test_collectives(kernels):
    threads = 64
    out = torch.empty(8, threads, dtype=torch.int32)
    assert not called(kernels.collectives, out, threads)
    t = torch.arange(threads)
    warp, lane = t // 32 * 32, t % 32
    third = t % 3 == 0
    assert torch.equal(out[0], 100 + warp + (35 - t % 3) % 32)
    assert torch.equal(out[1], 100 + torch.where(lane % 8 < 3, t, t - 3))
    assert torch.equal(out[2], 100 + torch.where(lane % 16 > 12, t, t + 3))
    assert torch.equal(out[3], 100 + (t ^ 5))
    ballots = [sum(1 << bit for bit in range(32) if third[first + bit]) for first in (0, 32)]
    assert [value & 0xFFFFFFFF for value in out[4].tolist()] == [ballots[0]] * 32 + [ballots[1]] * 32
    assert (out[5] == third.sum()).all()
    assert (out[6] == 2).all()
    assert out[7].tolist() == [1] * 32 + [2] * 32


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0, 1e30, -1e30), b.nan_to_num(0, 1e30, -1e30))


@pytest.mark.parametrize(("dtype", "name"), FLOATS16)
def test_every_16_bit_float_becomes_the_right_fp32(kernels, dtype, name):
    narrow = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    wide = torch.empty(2**16)
    assert not called(getattr(kernels, f"convert_{name}"), None, narrow, wide, wide.numel())
    assert torch.equal(wide.view(torch.int32)[~wide.isnan()], narrow.float().view(torch.int32)[~narrow.isnan()])
    assert same(wide, narrow.float())


@pytest.mark.parametrize(("dtype", "name"), FLOATS16)
def test_fp32_rounds_to_the_nearest_16_bit_float(kernels, dtype, name):
    """Every 16-bit value, every middle between two, their neighbours, and random bits."""
    narrow = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    narrow = narrow[narrow.isfinite()].sort().values
    middles = ((narrow[1:].double() + narrow[:-1].double()) / 2).float()
    around = [torch.nextafter(middles, torch.tensor(side * torch.inf)) for side in (-1, 1)]
    random = torch.randint(-(2**31), 2**31, (2**16,), generator=torch.Generator().manual_seed(0)).int()
    most = torch.finfo(dtype).max
    extremes = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 65520.0, 65519.9, most, 3.4e38, 1e-45])
    wide = torch.cat([narrow, middles, *around, random.view(torch.float32), extremes])
    made, back = torch.empty(wide.numel(), dtype=dtype), torch.empty_like(wide)
    assert not called(getattr(kernels, f"convert_{name}"), wide, made, back, wide.numel())
    numbers = ~wide.isnan()
    assert torch.equal(made.view(torch.int16)[numbers], wide.to(dtype).view(torch.int16)[numbers])
    assert made[~numbers].isnan().all()


@pytest.mark.parametrize(("dtype", "name"), FLOATS16)
def test_arithmetic_of_16_bit_floats_rounds_once(kernels, dtype, name):
    bits = torch.randint(-(2**15), 2**15, (3, 2**11), generator=torch.Generator().manual_seed(0)).short()
    x, y, z = bits.view(dtype)
    wide = [v.float().contiguous() for v in (x, y, z)]
    out = torch.empty(5, x.numel(), dtype=dtype)
    assert not called(getattr(kernels, f"arithmetic_{name}"), *wide, out, x.numel())
    a, b, c = (v.double() for v in wide)
    assert same(out[0], x + y)
    assert same(out[1], x * y)
    assert same(out[2], x / y)
    assert same(out[3], rounded_once(a, b, c, dtype))
    assert same(out[4], torch.where(x.isnan(), y, torch.where(y.isnan(), x, torch.maximum(x, y))))


def rounded_once(a, b, c, dtype):
    """a b + c, exactly, then rounded to nearest even: the best of the double-rounded value's neighbours."""
    near = (a * b + c).to(dtype)
    steps = torch.stack([near.view(torch.int16) + step for step in (-1, 0, 1)], 1).view(dtype)
    values = []
    for p, q, r, candidates in zip(a.tolist(), b.tolist(), c.tolist(), steps, strict=True):
        if candidates.isfinite().all():
            exact = Fraction(p) * Fraction(q) + Fraction(r)
            best = min(candidates, key=lambda x: (abs(Fraction(x.item()) - exact), x.view(torch.int16).item() & 1))
            values.append(best)
        else:
            values.append(candidates[1])
    return torch.stack(values)


@pytest.mark.skipif("libasan" not in os.environ.get("LD_PRELOAD", ""), reason="make sanitize runs it")
def test_tensors_of_torch_have_red_zones():
    x, ids = torch.randn(1, 16, 32), torch.arange(16)[None, None]
    x.untyped_storage().resize_(x.nbytes - 64)  # the tensor ends behind its memory
    with pytest.raises(RuntimeError, match="global memory, which no allocation holds"):
        torch.ops.mimkernels.gather_tokens_fwd.cuda_emulated(x, ids, None, None)


def test_the_backend_is_taken_by_name_only():
    for spec in SPECS.values():
        rows = [impl.backend for impl in spec.impls]
        assert ("cuda-emulated" in rows) == ("cuda" in rows)
    spec = SPECS["gather_tokens"]
    assert spec.resolve("cuda-emulated", "cpu", torch.float32) == "cuda-emulated"
    rows = [impl for impl in spec.impls if impl.backend == "cuda-emulated"]
    assert rows[0].reasons("cpu", torch.float32, {}) and not rows[0].reasons("cpu", torch.float32, {}, named=True)
    with pytest.raises(NotImplementedError, match="cuda-emulated: runs on cpu, the inputs are on cuda"):
        spec.resolve("cuda-emulated", "cuda", torch.float32)


def test_a_fault_in_an_op_is_a_runtime_error():
    x, ids = torch.randn(1, 16, 32), torch.arange(16)[None, None]
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"kernel .*GatheredRows.*a null pointer\n  at csrc/cuda/"):
        torch.ops.mimkernels.gather_tokens_fwd.cuda_emulated(x, ids, None, None)


def test_the_runtime_is_told_once_how_much_shared_memory_a_kernel_may_have():
    library = ctypes.CDLL(str(LIBRARY))
    calls = library.shared_limit_calls
    calls.argtypes = 5 * [ctypes.c_int64]
    kernel, other, size = 0x1000, 0x2000, 64 * 1024
    assert calls(kernel, 0, size, 8, 0) == 1
    assert calls(kernel, 0, size, 8, 0) == calls(kernel, 0, size - 1, 8, 0) == 0
    assert calls(kernel, 1, size, 8, 0) == 1, "another device"
    assert calls(other, 0, size, 8, 0) == 1, "another kernel"
    assert calls(kernel, 0, size + 1, 8, 0) == 1, "more than before"
    assert calls(other, 1, size, 2, 1) == 200, "what failed is not remembered"
    assert calls(other, 1, size, 2, 0) == 1
