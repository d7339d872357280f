"""Tunes block sizes of the Triton attention kernels.

They are timed on this GPU, and the fastest are written into the committed table.

    python -m benchmarks tune-attention                        # everything; the better part of an hour
    python -m benchmarks tune-attention --kernels forward --tokens 64 256 --statistics no

The table is written after each entry, so that a run may be cut short. Block sizes that spill registers in a forward
kernel are left out. Where the two-kernel backward is faster than the fused one, the fused entry is removed.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from triton.runtime.errors import OutOfResources

from mimkernels.ops import _triton
from mimkernels.ops.attention import triton as attention
from mimkernels.ops.attention import triton_configs, triton_table
from mimkernels.ops.attention.triton_blocks import architecture
from mimkernels.ops.received_attention import triton as received

# What stands for a bucket of the table: lengths of ViTs on visible and on all patches, head dims of ViT-B, -H and -7B.
TOKENS = {64: (50, 64), 128: (99,), 256: (197, 256), triton_configs.ANY: (577, 1025)}
HEAD_DIMS = {64: (64,), 128: (80, 128)}
DEVICE = "cuda"
TOKENS_IN_ALL = 128 * 197 * 12  # tokens times heads of one call: enough to fill any GPU
KERNELS = {
    "forward": "attention_fwd_kernel",
    "masked": "attention_fwd_kernel",
    "dq": "attention_dq_kernel",
    "dkv": "attention_dkv_kernel",
    "fused": "attention_bwd_kernel",  # after the two that it is compared with
    "companion": "received_attention_kernel",
}
DTYPES = {"half": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}


def candidates(kernel: str, precision: str, length: int) -> Iterator[tuple[int, int, int, int]]:
    """(BLOCK_M, BLOCK_N, warps, stages) worth a try."""
    if kernel == "fused":
        rows = (length,)
    else:
        rows = (16, 32, 64) if precision == "fp32" else (32, 64, 128)
    cols = (16, 32, 64) if precision == "fp32" else (32, 64, 128, 256)
    for block_m, block_n, warps, stages in itertools.product(rows, cols, (4, 8, 16), (1, 2, 3)):
        tile = block_m * block_n
        one_pass = kernel in ("forward", "masked") and length <= block_n
        if block_n >= 2 * length or (block_n > 128 and not one_pass) or (one_pass and stages > 1):
            continue
        if 512 <= tile // warps <= 4096:  # scores per warp: neither idle nor hopeless
            yield block_m, block_n, warps, stages


def recorded(run: Callable[[], object], kernel: str) -> Callable[[], object]:
    """The launch of one kernel among those that a call makes."""
    launches = []
    before, _triton.launch = _triton.launch, lambda *args, **options: launches.append((args, options))
    try:
        run()
    finally:
        _triton.launch = before
    (jit, programs, _, *args), options = next(one for one in launches if one[0][0].__name__ == KERNELS[kernel])
    return lambda: jit[(programs,)](*args, **options)


def calls(kernel: str, precision: str, dim: int, tokens: int, extra: bool) -> Callable[[], object]:
    """A call of the op on a packed projection, one prefix token, with all statistics or none."""
    heads = 12
    batch = max(1, TOKENS_IN_ALL // (tokens * heads))
    dtype = DTYPES[precision]
    q, k, v = torch.randn(batch, tokens, 3, heads, dim, device=DEVICE, dtype=dtype).permute(2, 0, 3, 1, 4)
    scale = dim**-0.5
    positions = torch.rand(1, tokens, 2, device=DEVICE) if extra else None
    if kernel in ("forward", "masked"):
        bias = torch.randn(1, heads, tokens, tokens, device=DEVICE, dtype=dtype) if kernel == "masked" else None
        key_mask = torch.ones(batch, tokens, dtype=torch.bool, device=DEVICE) if kernel == "masked" else None
        return lambda: attention.attention_fwd(
            q, k, v, bias, None, None, key_mask, None, scale, 1, positions, 127 if extra else 0
        )
    out, lse, low, _ = attention.attention_fwd(q, k, v, *[None] * 5, scale, 1, None, 0)
    if kernel == "companion":
        return lambda: received.received_attention_fwd(q, k, lse, *[None] * 5, scale)
    coef = torch.randn(6, *lse.shape, device=DEVICE) if extra else None
    dout = torch.randn_like(out)
    return lambda: attention.attention_bwd(
        dout, q, k, v, out, lse, low, *[None] * 5, scale, 1, positions, coef, *[False] * 4
    )


def seconds(run: Callable[[], object], rounds: int = 20) -> float:
    """Median of GPU times."""
    run()
    taken = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) * 1e-3)
    return statistics.median(taken)


def timed(entry: tuple, blocks: tuple | None) -> float:
    """Seconds of an entry's kernel with the given block sizes, summed over what stands for its bucket.

    None times the table as it is. Block sizes that do not fit, or spill where they may not, take forever.
    """
    kernel, _, precision, most_dim, length, extra = entry
    before = triton_table.TABLE.get(entry)
    if blocks is not None:
        triton_table.TABLE[entry] = blocks
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    total = 0.0
    try:
        for dim, tokens in itertools.product(HEAD_DIMS[most_dim], TOKENS[length]):
            launch = recorded(calls(kernel, precision, dim, tokens, extra), kernel)
            if kernel in ("forward", "masked", "companion") and launch().n_spills:
                return float("inf")
            total += seconds(launch)
        return total
    except OutOfResources:
        return float("inf")
    finally:
        if before is None:
            triton_table.TABLE.pop(entry, None)
        else:
            triton_table.TABLE[entry] = before


def split_seconds(entry: tuple) -> float:
    """Seconds of the two-kernel backward where the fused entry would serve."""
    _, _, precision, most_dim, length, extra = entry
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    before = triton_table.TABLE.pop(entry, None)
    try:
        return sum(
            seconds(recorded(calls("dq", precision, dim, tokens, extra), kernel))
            for kernel in ("dq", "dkv")
            for dim, tokens in itertools.product(HEAD_DIMS[most_dim], TOKENS[length])
        )
    finally:
        if before is not None:
            triton_table.TABLE[entry] = before


def tune(entry: tuple) -> None:
    """Put the fastest block sizes of one entry into the table."""
    kernel, _, precision, _, length, _ = entry
    times = {blocks: timed(entry, blocks) for blocks in candidates(kernel, precision, length)}
    blocks = min(times, key=times.get)
    committed = triton_table.TABLE.get(entry)
    line = f"{entry}: {blocks} {times[blocks] * 1e6:.1f} us"
    if committed in times:
        line += f", was {committed} {times[committed] * 1e6:.1f} us"
    print(line, flush=True)
    if kernel == "fused" and split_seconds(entry) < times[blocks]:
        print("  two kernels are faster")
        triton_table.TABLE.pop(entry, None)
    else:
        triton_table.TABLE[entry] = blocks


def rendered(table: dict) -> str:
    """The text of ``triton_table.py``."""
    lines = []
    for entry, blocks in sorted(table.items()):
        *first, length, extra = entry
        first = ", ".join(f'"{part}"' if isinstance(part, str) else str(part) for part in first)
        lines.append(f"    ({first}, {'ANY' if length == triton_configs.ANY else length}, {extra}): {blocks},\n")
    text = Path(triton_table.__file__).read_text()
    return text[: text.index("TABLE = {\n")] + "TABLE = {\n" + "".join(lines) + "}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=["half"])
    parser.add_argument("--dims", nargs="+", type=int, choices=HEAD_DIMS, default=list(HEAD_DIMS))
    parser.add_argument("--tokens", nargs="+", type=int, help="the table's buckets: 64, 128, 256; 0 for longer")
    parser.add_argument("--statistics", choices=("no", "yes", "both"), default="both")
    given = parser.parse_args()
    arch = architecture(torch.device(DEVICE, torch.cuda.current_device()))
    print(f"{torch.cuda.get_device_name()}: entries of sm_{arch}")
    extras = {"no": (False,), "yes": (True,), "both": (False, True)}[given.statistics]
    for kernel, precision, dim in itertools.product(given.kernels, given.precisions, given.dims):
        for length, extra in itertools.product(triton_configs.LENGTHS[kernel], extras):
            if given.tokens and (0 if length == triton_configs.ANY else length) not in given.tokens:
                continue
            if kernel == "companion" and extra:
                continue
            tune((kernel, arch if precision == "half" else 0, precision, dim, length, extra))
            Path(triton_table.__file__).write_text(rendered(triton_table.TABLE))
