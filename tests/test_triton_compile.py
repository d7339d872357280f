"""Every Triton kernel compiles ahead of time for each GPU generation, without spills, atomics or narrow accesses.

The launchers run on meta tensors of real sizes and hand over the very specialisations that a GPU would compile. That
happens in subprocesses, one per architecture, because the rest of the tests may hold an interpreting Triton.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable

import pytest
import torch

from tests import triton_kernels

pytestmark = pytest.mark.xdist_group("compile")  # what is compiled once serves all of them

ARCHITECTURES = (80, 90, 100)
# 168 registers a thread leave room for 12 warps on a multiprocessor, enough loads in flight to fill its bandwidth.
MOST_REGISTERS = 168
BF16, FP16, FP32, U8, BOOL, I64 = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.uint8,
    torch.bool,
    torch.int64,
)


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def gather(op, dtype=BF16, batch=64, masks=1, dim=768, pos=True):
    ids = meta(masks, batch, 49, dtype=I64)
    pos = meta(196, dim, dtype=dtype) if pos else None
    op.gather_tokens_fwd(
        meta(batch, 196, dim, dtype=dtype), ids, pos, None if pos is None else meta(1, dim, dtype=dtype)
    )


def gather_bwd(op, dtype=BF16, batch=64, masks=1, dim=768, need_pos=False):
    ids = meta(masks, batch, 49, dtype=I64)
    op.gather_tokens_bwd(meta(masks * batch, 50, dim, dtype=dtype), ids, 196, 1, True, need_pos, need_pos)


def restore(op, dtype=BF16, batch=64, dim=512, pos=True):
    token, pos = meta(dim, dtype=dtype), meta(197, dim, dtype=dtype) if pos else None
    op.restore_tokens_fwd(meta(batch, 50, dim, dtype=dtype), meta(batch, 196, dtype=I64), token, pos, 1)


def restore_bwd(op, dtype=BF16, batch=64, dim=512, need_pos=False):
    op.restore_tokens_bwd(meta(batch, 197, dim, dtype=dtype), meta(batch, 196, dtype=I64), 49, 1, True, True, need_pos)


def fill(op, dtype=BF16, dim=768):
    x, mask = meta(64, 196, dim, dtype=dtype), meta(64, 196, dtype=BOOL)
    op.fill_mask_tokens_fwd(x, mask, meta(dim, dtype=dtype))
    op.fill_mask_tokens_bwd(x, mask, True, True)
    op.fill_mask_tokens_bwd(x, mask, True, False)


def gelu(op, dtype=BF16, width=3072, bias=FP32, tanh=False):
    x, bias = meta(64, 196, width, dtype=dtype), None if bias is None else meta(width, dtype=bias)
    op.bias_gelu_fwd(x, bias, tanh)
    op.bias_gelu_bwd(x, x, bias, tanh, True, True)
    op.bias_gelu_bwd(x, x, bias, tanh, True, False)


def patchify(op, images=U8, dtype=BF16, patch=(1, 16, 16), frames=1, ids=True):
    scale = meta(3, dtype=FP32)
    ids = meta(1, 64, 49, dtype=I64) if ids else None
    op.patchify_gather_fwd(meta(64, 3, frames, 224, 224, dtype=images), ids, *patch, scale, scale, dtype)


def patchify_bwd(op, dtype=BF16, patch=(1, 16, 16), frames=1, ids=True):
    rows = frames // patch[0] * (224 // patch[1]) * (224 // patch[2])
    pixels = 3 * patch[0] * patch[1] * patch[2]
    grad, ids = meta(64, 49 if ids else rows, pixels, dtype=dtype), meta(1, 64, 49, dtype=I64) if ids else None
    op.patchify_gather_bwd(grad, ids, 64, 3, frames, 224, 224, *patch, meta(3, dtype=FP32), dtype)


def loss(op, images=U8, dtype=BF16, side=16, ids=True, norm=True, kind=0, channels_last=True):
    rows = 147 if ids else 196
    pixels, scale = 3 * side * side, meta(3, dtype=FP32) if images == U8 else None
    ids, mask = (meta(64, rows, dtype=I64), None) if ids else (None, meta(64, rows, dtype=BOOL))
    target = (meta(64, 3, 1, 14 * side, 14 * side, dtype=images), ids, mask, 1, side, side, scale, scale)
    arguments = (meta(64, rows, pixels, dtype=dtype), *target, norm, kind, 1.0, channels_last, True)
    op.masked_patch_loss_fwd(*arguments)
    op.masked_patch_loss_bwd(meta(dtype=FP32), *arguments)


def random(op, tokens=196, in_order=False, step=False):
    op.random_mask_fwd(7, 5, meta(dtype=I64) if step else None, 64, tokens, 49, in_order, torch.device("meta"))


def noise(op, in_order=False):
    op.mask_from_noise_fwd(meta(64, 196, dtype=FP32), 49, in_order)


def query_pool(op, dtype=BF16, batch=64, dim=768, groups=1, width=None, sliced=False, mask=False):
    x, queries = meta(batch, 196, dim, dtype=dtype), meta(groups, dim, dtype=dtype)
    values = None if width is None else meta(batch, 196, width, dtype=dtype)
    mask = meta(batch, 196, dtype=BOOL) if mask else None
    op.query_pool_fwd(x, queries, values, mask, 0.125, 0, sliced)


def query_pool_bwd(op, dtype=BF16, batch=64, dim=768, groups=1, width=None, sliced=False, mask=False):
    x, queries = meta(batch, 196, dim, dtype=dtype), meta(groups, dim, dtype=dtype)
    values = None if width is None else meta(batch, 196, width, dtype=dtype)
    mask = meta(batch, 196, dtype=BOOL) if mask else None
    columns = (dim if width is None else width) // (groups if sliced else 1)
    dout, weights = meta(batch, groups, columns, dtype=dtype), meta(batch, groups, 196, dtype=FP32)
    op.query_pool_bwd(dout, weights, x, queries, values, weights, mask, 0.125, 0, sliced, True, True, True)


def weighted_pool(op, dtype=BF16, groups=1, normalize=True):
    x, scores = meta(64, 196, 768, dtype=dtype), meta(64, groups, 196, dtype=FP32)
    op.weighted_pool_fwd(x, scores, None, normalize, 1)
    op.weighted_pool_bwd(meta(64, groups, 768, dtype=dtype), None, x, scores, None, normalize, 1, True, True)


def reduce_pool(op, kind, dtype=BF16, mask=False, dim=768):
    x, mask, p = meta(64, 196, dim, dtype=dtype), meta(64, 196, dtype=BOOL) if mask else None, meta(1, dtype=FP32)
    saved = op.reduce_pool_fwd(x, mask, kind, 1, p, 1e-6)[1]
    op.reduce_pool_bwd(meta(64, dim, dtype=dtype), x, saved, mask, kind, 196, 1, p, 1e-6, True, kind == 2)


# name -> (op, launches, arguments, whether 16-byte accesses are possible)
CASES: dict[str, tuple[str, Callable, dict, bool]] = {
    "random_mask": ("random_mask", random, {}, False),
    "random_mask-step-sorted-2048": ("random_mask", random, {"tokens": 2048, "in_order": True, "step": True}, False),
    "mask_from_noise": ("mask_from_noise", noise, {}, False),
    "mask_from_noise-sorted": ("mask_from_noise", noise, {"in_order": True}, False),
    "gather": ("gather_tokens", gather, {}, True),
    "gather-fp32-no-pos": ("gather_tokens", gather, {"dtype": FP32, "pos": False}, True),
    "gather-fp16-small": ("gather_tokens", gather, {"dtype": FP16, "batch": 2, "dim": 192, "masks": 2}, True),
    "gather-odd-width": ("gather_tokens", gather, {"dim": 203}, False),
    "gather-bwd": ("gather_tokens", gather_bwd, {}, True),
    "gather-bwd-pos-prefix": ("gather_tokens", gather_bwd, {"masks": 2, "need_pos": True}, True),
    "gather-bwd-fp32": ("gather_tokens", gather_bwd, {"dtype": FP32, "need_pos": True}, True),
    "restore": ("restore_tokens", restore, {}, True),
    "restore-fp32-no-pos": ("restore_tokens", restore, {"dtype": FP32, "pos": False}, True),
    "restore-one-image": ("restore_tokens", restore, {"batch": 1}, True),
    "restore-bwd": ("restore_tokens", restore_bwd, {}, True),
    "restore-bwd-pos": ("restore_tokens", restore_bwd, {"need_pos": True}, True),
    "restore-bwd-fp32": ("restore_tokens", restore_bwd, {"dtype": FP32, "need_pos": True}, True),
    "fill": ("fill_mask_tokens", fill, {}, True),
    "fill-fp32": ("fill_mask_tokens", fill, {"dtype": FP32}, True),
    "gelu": ("bias_gelu", gelu, {"bias": BF16}, True),
    "gelu-fp32-bias-tanh": ("bias_gelu", gelu, {"tanh": True}, True),
    "gelu-fp32": ("bias_gelu", gelu, {"dtype": FP32}, True),
    "gelu-odd-width-no-bias": ("bias_gelu", gelu, {"width": 203, "bias": None}, False),
    "patchify-uint8": ("patchify_gather", patchify, {}, True),
    "patchify-fp32": ("patchify_gather", patchify, {"images": FP32, "dtype": FP32}, True),
    "patchify-video": ("patchify_gather", patchify, {"frames": 16, "patch": (2, 16, 16)}, True),
    "patchify-14-all": ("patchify_gather", patchify, {"patch": (1, 14, 14), "ids": False}, False),
    "patchify-bwd": ("patchify_gather", patchify_bwd, {}, True),
    "patchify-bwd-14-fp32-all": (
        "patchify_gather",
        patchify_bwd,
        {"dtype": FP32, "patch": (1, 14, 14), "ids": False},
        False,
    ),
    "loss-uint8-ids": ("masked_patch_loss", loss, {}, True),
    "loss-fp32-mask-l1": (
        "masked_patch_loss",
        loss,
        {"images": FP32, "dtype": FP32, "ids": False, "norm": False, "kind": 1, "channels_last": False},
        True,
    ),
    "loss-bf16-14": ("masked_patch_loss", loss, {"images": BF16, "side": 14, "ids": False, "kind": 2}, False),
    "loss-32": ("masked_patch_loss", loss, {"side": 32, "images": FP16, "dtype": FP16}, True),
    "loss-chunked": ("masked_patch_loss", loss, {"side": 48, "ids": False}, True),
    "query-pool": ("query_pool", query_pool, {}, True),
    "query-pool-fp32-masked": ("query_pool", query_pool, {"dtype": FP32, "mask": True}, True),
    "query-pool-wide-one-image": ("query_pool", query_pool, {"dim": 1536, "batch": 1, "groups": 4}, True),
    "query-pool-values": ("query_pool", query_pool, {"groups": 12, "width": 1024}, True),
    "query-pool-efficient-probing": ("query_pool", query_pool, {"groups": 32, "width": 768, "sliced": True}, True),
    "query-pool-odd-width": ("query_pool", query_pool, {"dim": 203, "groups": 2}, False),
    "query-pool-bwd": ("query_pool", query_pool_bwd, {}, True),
    "query-pool-bwd-fp32-masked": ("query_pool", query_pool_bwd, {"dtype": FP32, "mask": True, "groups": 8}, True),
    "query-pool-bwd-efficient-probing": (
        "query_pool",
        query_pool_bwd,
        {"groups": 32, "width": 768, "sliced": True},
        True,
    ),
    "query-pool-bwd-sliced": ("query_pool", query_pool_bwd, {"groups": 12, "sliced": True}, True),
    "weighted-pool": ("weighted_pool", weighted_pool, {}, True),
    "weighted-pool-fp32-as-given": (
        "weighted_pool",
        weighted_pool,
        {"dtype": FP32, "groups": 12, "normalize": False},
        True,
    ),
    "reduce-pool-mean": ("reduce_pool", reduce_pool, {"kind": 0}, True),
    "reduce-pool-max-masked": ("reduce_pool", reduce_pool, {"kind": 1, "mask": True}, True),
    "reduce-pool-gem": ("reduce_pool", reduce_pool, {"kind": 2}, True),
    "reduce-pool-gem-fp32-odd-width": ("reduce_pool", reduce_pool, {"kind": 2, "dtype": FP32, "dim": 203}, False),
}


def compile_case(name: str, architecture: int) -> list[dict]:
    """Resources of each kernel that a case launches: registers, stack and shared bytes, PTX facts."""
    import importlib

    from mimkernels.ops import _triton

    op, launches, arguments, _ = CASES[name]
    recorded = []
    _triton.launch = lambda kernel, programs, on, *args, **options: recorded.append((kernel, args, options))
    launches(importlib.import_module(f"mimkernels.ops.{op}.triton"), **arguments)
    return [resources(*launched, architecture) for launched in recorded]


def resources(kernel, args: tuple, options: dict, architecture: int) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel, *specialisation(kernel, args, options))
    launch_options = {key: value for key, value in options.items() if key in ("num_warps", "maxnreg")}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch_options)
    cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "kernel": kernel.__name__,
        "cubin": len(cubin),
        "registers": found["REG"],
        "stack": found["STACK"] + found["LOCAL"],
        "shared": compiled.metadata.shared,
        "wide": bool(re.search(r"(ld|st)\.global\S*\.v4\.[bfu]32|cp\.async\.cg\.[^;]*, 0x10,", ptx)),
        "atomics": bool(re.search(r"\b(atom|red)\.", ptx)),
    }


def specialisation(kernel, args: tuple, options: dict) -> tuple[dict, dict, dict]:
    """What Triton's own launcher makes of these arguments: signature, constants, known divisibility by 16."""
    names = {BF16: "bf16", FP16: "fp16", FP32: "fp32", U8: "u8", BOOL: "i1", I64: "i64", torch.int32: "i32"}
    signature, constants, attributes = {}, {}, {}
    given = iter(args)
    for index, parameter in enumerate(kernel.params):
        value = options[parameter.name] if parameter.name in options else next(given)
        whole = isinstance(value, int) and not isinstance(value, bool) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (whole and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + names[value.dtype]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (whole and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    assert next(given, None) is None, f"{kernel.__name__}: more arguments than parameters"
    return signature, constants, attributes


@pytest.fixture(scope="module")
def compiled() -> dict[int, dict[str, list[dict] | str]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    workers = {
        architecture: subprocess.Popen(
            [sys.executable, __file__, str(architecture)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for architecture in ARCHITECTURES
    }
    results = {}
    for architecture, worker in workers.items():
        output, errors = worker.communicate(timeout=600)
        assert worker.returncode == 0, errors
        results[architecture] = json.loads(output.splitlines()[-1])
    return results


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES)
def test_kernels_compile_within_their_resources(compiled, case, architecture):
    kernels = compiled[architecture][case]
    assert not isinstance(kernels, str), kernels
    assert kernels
    for kernel in kernels:
        assert kernel["cubin"] > 0
        assert kernel["stack"] == 0, f"spills: {kernel}"
        assert kernel["registers"] <= MOST_REGISTERS, kernel
        assert not kernel["atomics"], kernel


@pytest.mark.parametrize("case", [name for name, row in CASES.items() if row[3]])
def test_memory_bound_kernels_move_16_bytes_at_a_time(compiled, case):
    for architecture in ARCHITECTURES:
        kernels = compiled[architecture][case]
        assert any(kernel["wide"] for kernel in kernels), kernels


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_of_every_op_is_compiled(compiled, architecture):
    seen = {kernel["kernel"] for case in compiled[architecture].values() for kernel in case}
    assert seen == triton_kernels.kernels(attention=False)


def main() -> None:
    architecture, results = int(sys.argv[1]), {}
    for name in CASES:
        try:
            results[name] = compile_case(name, architecture)
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(results))


if __name__ == "__main__":
    main()
