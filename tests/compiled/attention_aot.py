"""The launches of the Triton attention kernels that are compiled ahead of time, one entry per distinct binary."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator

import torch
from triton.compiler import ASTSource

from mimkernels.ops import _triton
from mimkernels.ops.attention import triton_configs
from mimkernels.ops.attention.triton_table import TABLE

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.int64: "i64", torch.bool: "i1"}
ALL_STATISTICS = 127  # but max_score and argmax
WITH_ARGMAX = 511
# The head dims compiled for an entry: its largest, and in the forward kernel one made of two pieces.
HEAD_DIMS = {("forward", 64): (64,), ("forward", 128): (128, 80), ("masked", 128): (128, 80)}


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
        for kernel, dims in (("dbias", (64, 128)), ("coef", (64,)), ("argmax", (64,)))
        for arch, precision in targets
        for dim in dims
    ]
    # Windows of 7 x 7 and of 16 x 16 tokens.
    found += [("windows", *target, 32, tokens, True) for target in targets for tokens in (49, 256)]
    found += [("cosine", *target, 32, None, False) for target in targets]
    # Of the widest heads, and of fused gradients, where GPUs are as small as those of 80 and otherwise compiled for.
    kernels = (("forward", 128, None), ("forward", 64, 256), ("dq", 128, None), ("dkv", 128, None), ("fused", 64, 128))
    return found + [(kernel, 120, "half", dim, tokens, True) for kernel, dim, tokens in kernels]


def launches(entry: tuple) -> list[tuple[ASTSource, int, dict]]:
    """Source, architecture and compiler options of each kernel that an entry launches."""
    kernel, arch, precision, dim, length, extra = entry
    blocks_of = 80 if arch == 120 else arch
    found = recorded(kernel, blocks_of, precision, dim, length or triton_configs.ANY, extra)
    return [(source, arch, options) for source, options in (specialised(*launch) for launch in found)]


@contextlib.contextmanager
def recorded_launches(arch: int, module: object) -> Iterator[list]:
    """Launches are noted instead of run, with the block sizes of the given architecture."""
    found: list[tuple] = []
    before = _triton.launch, module.architecture
    _triton.launch = lambda kernel, programs, on, *args, **options: found.append((kernel, args, options))
    module.architecture = lambda device: arch
    try:
        yield found
    finally:
        _triton.launch, module.architecture = before


def recorded(kernel: str, arch: int, precision: str, dim: int, length: int, extra: bool) -> list[tuple]:
    """What the launchers run for one entry of the table: views of a packed projection, one prefix token."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    dtype = torch.float16 if precision == "half" else torch.float32
    tokens = min(length, 1025)
    q, k, v = torch.empty(1, tokens, 3, 2, dim, dtype=dtype).permute(2, 0, 3, 1, 4)
    out, lse = torch.empty(1, tokens, 2, dim, dtype=dtype), torch.empty(1, 2, tokens)
    scale = dim**-0.5
    positions = torch.empty(1, tokens, 2) if extra else None
    # Swin V2's cosine attention beside a shift mask and a table.
    bias, table = torch.empty(1, 1, tokens, tokens), torch.empty(99, 2)
    in_windows = (bias, table, torch.zeros(tokens, tokens, dtype=torch.int64), None, lse[0, :, 0])
    if kernel in ("companion", "cosine"):
        found = []
        for op in ("received_attention", "head_divergence"):
            module = importlib.import_module(f"mimkernels.ops.{op}.triton")
            with recorded_launches(arch, module) as some:
                getattr(module, f"{op}_fwd")(q, k, lse, *(in_windows if kernel == "cosine" else [None] * 5), scale)
            found += [
                launch for launch in some if launch[0].__name__ not in ("sum_partials_kernel", "cosine_factors_kernel")
            ]
        return found
    module = importlib.import_module("mimkernels.ops.attention.triton")
    if kernel == "coef":
        rows = torch.empty(7, 1, 2, tokens)
        with recorded_launches(arch, module) as found:
            importlib.import_module("mimkernels.ops.attention.triton_coef").attention_coef(
                lse, rows, rows, ALL_STATISTICS
            )
        return found
    if kernel == "windows":  # forward and backward
        with recorded_launches(arch, module) as found:
            module.attention_fwd(*(q, k, v, *in_windows, 1.0, 1, positions, ALL_STATISTICS if extra else 0))
            needs = (False, True, True, False)
            module.attention_bwd(out, q, k, v, out, *(lse, lse, *in_windows, 1.0, 1, None, None, *needs))
        return [launch for launch in found if launch[0].__name__ != "sum_partials_kernel"]
    if kernel == "dbias":  # of a bias that the heads share
        bias, coef = torch.empty(1, 1, tokens, tokens, dtype=dtype), torch.empty(6, 1, 2, tokens)
        with recorded_launches(arch, module) as found:
            module.attention_bwd(
                out, q, k, v, out, *(lse, lse, bias, *[None] * 4, scale, 1, positions, coef, True, *[False] * 3)
            )
        return found[-1:]
    with recorded_launches(arch, module) as found:
        if kernel in ("forward", "masked", "argmax"):
            stats = WITH_ARGMAX if kernel == "argmax" else ALL_STATISTICS
            bias = torch.empty(1, 2, tokens, tokens, dtype=dtype) if kernel == "masked" else None
            key_mask = torch.empty(1, tokens, dtype=torch.bool) if kernel == "masked" else None
            module.attention_fwd(
                *(q, k, v, bias, None, None, key_mask, None, scale, 1, positions, stats if extra else 0)
            )
        else:
            coef = torch.empty(6, 1, 2, tokens) if extra else None
            module.attention_bwd(out, q, k, v, out, *(lse, lse, *[None] * 5, scale, 1, positions, coef, *[False] * 4))
    forward = "attention_fwd_kernel"
    name = {**dict.fromkeys(("forward", "masked", "argmax"), forward), "fused": "attention_bwd_kernel"}.get(
        kernel, f"attention_{kernel}_kernel"
    )
    return [launch for launch in found if launch[0].__name__ == name]


def specialised(kernel, args: tuple, options: dict) -> tuple[ASTSource, dict]:
    """A launch as Triton compiles it, and the options that are the compiler's."""
    options = dict(options)
    compile_options = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
    signature, constants, attributes = {}, {}, {}
    given = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
    for index, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):  # aligned, as torch allocates
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    return ASTSource(kernel, signature, constants, attributes), compile_options
