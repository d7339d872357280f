from __future__ import annotations

import torch
from torch import Tensor

from mimkernels.ops._registry import ANY_FLOAT, Impl, OpSpec, register

STATISTICS = ("entropy", "prefix_mass", "self_mass", "distance", "patch_entropy", "peak", "patch_mass")


def _fwd(q, k, v, bias, key_mask, scale, num_prefix, positions, stats):
    batch, heads, length, dim = q.shape
    return (
        q.new_empty((batch, length, heads, dim)),
        q.new_empty((batch, heads, length), dtype=torch.float32),
        q.new_empty((batch, heads, length), dtype=torch.float32),
        q.new_empty((stats.bit_count(), batch, heads, length), dtype=torch.float32),
    )


def _coef(lse, dlse, rows, drows, stats):
    return lse.new_empty((6, *lse.shape))


def _bwd(dout, q, k, v, out, lse, lse_low, bias, key_mask, scale, num_prefix, positions, coef, need_bias, packed):
    dbias = bias.new_empty(bias.shape) if need_bias else q.new_empty((0,))
    return *new_gradients(q, k, packed), dbias


def new_gradients(q: Tensor, k: Tensor, packed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv ``[B, N, H, D]``, to be written; packed, one ``[B, N, 3, H, D]`` for all and two of no elements."""
    batch, heads, length, dim = k.shape
    if packed:
        return q.new_empty((batch, length, 3, heads, dim)), q.new_empty((0,)), q.new_empty((0,))
    dq = q.new_empty((batch, q.shape[2], heads, dim))
    return dq, k.new_empty((batch, length, heads, dim)), k.new_empty((batch, length, heads, dim))


SPEC = register(
    OpSpec(
        name="attention",
        schemas={
            # out, lse, lse_low, statistics. lse_low is what rounding took from lse, log N of a row whose scores are all
            # -1e9, say: P = exp((S - lse) - lse_low).
            "attention_fwd": "(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? key_mask, float scale, "
            "SymInt num_prefix, Tensor? positions, int stats) -> (Tensor, Tensor, Tensor, Tensor)",
            "attention_coef": "(Tensor lse, Tensor? dlse, Tensor rows, Tensor? drows, int stats) -> Tensor",
            "attention_bwd": "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
            "Tensor lse_low, Tensor? bias, Tensor? key_mask, float scale, SymInt num_prefix, Tensor? positions, Tensor? coef, bool need_bias, "
            "bool packed) -> (Tensor, Tensor, Tensor, Tensor)",
        },
        fakes={"attention_fwd": _fwd, "attention_coef": _coef, "attention_bwd": _bwd},
        impls=(
            Impl("triton", limits={"head_dim": 128}, multiples={"head_dim": 8}),
            Impl("cuda", limits={"head_dim": 128}, multiples={"head_dim": 8}),
            Impl("cpu", limits={"head_dim": 128}, multiples={"head_dim": 8}),
            Impl("reference", ANY_FLOAT),
        ),
    )
)
