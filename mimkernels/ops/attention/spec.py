from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mimkernels.ops import _checks
from mimkernels.ops._autograd import Context, Gradient, Run
from mimkernels.ops._registry import ANY_FLOAT, Impl, OpSpec, register

STATISTICS = (
    *("entropy", "prefix_mass", "self_mass", "distance", "patch_entropy", "peak", "patch_mass"),
    *("max_score", "argmax"),
)
DETACHED = ("peak", "max_score", "argmax")  # of one key, chosen by a maximum: without a gradient
MOST_KEYS = 2**24  # of argmax, which kernels write in fp32 beside the other statistics


def _fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    bias_table: Tensor | None,
    bias_index: Tensor | None,
    key_mask: Tensor | None,
    logit_scale: Tensor | None,
    scale: float,
    num_prefix: int,
    positions: Tensor | None,
    stats: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, length, dim = q.shape
    return (
        q.new_empty((batch, length, heads, dim)),
        q.new_empty((batch, heads, length), dtype=torch.float32),
        q.new_empty((batch, heads, length), dtype=torch.float32),
        q.new_empty((stats.bit_count(), batch, heads, length), dtype=torch.float32),
    )


def _coef(dlse: Tensor | None, rows: Tensor, drows: Tensor | None, stats: int) -> Tensor:
    return rows.new_empty((6, *rows.shape[1:]))


def _bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    bias: Tensor | None,
    bias_table: Tensor | None,
    bias_index: Tensor | None,
    key_mask: Tensor | None,
    logit_scale: Tensor | None,
    scale: float,
    num_prefix: int,
    positions: Tensor | None,
    coef: Tensor | None,
    need_bias: bool,
    need_table: bool,
    need_logit_scale: bool,
    packed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dbias = bias.new_empty(bias.shape) if bias is not None and need_bias else q.new_empty((0,))
    dtable = bias_table.new_empty(bias_table.shape) if bias_table is not None and need_table else q.new_empty((0,))
    needs = logit_scale is not None and need_logit_scale
    dlogit_scale = q.new_empty((q.shape[1] if needs else 0,), dtype=torch.float32)
    return *new_gradients(q, k, packed), dbias, dtable, dlogit_scale


def new_gradients(q: Tensor, k: Tensor, packed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv ``[B, N, H, D]``, to be written; packed, one ``[B, N, 3, H, D]`` for all and two of no elements."""
    batch, heads, length, dim = k.shape
    if packed:
        return q.new_empty((batch, length, 3, heads, dim)), q.new_empty((0,)), q.new_empty((0,))
    dq = q.new_empty((batch, q.shape[2], heads, dim))
    return dq, k.new_empty((batch, length, heads, dim)), k.new_empty((batch, length, heads, dim))


def parts(qkv: Tensor) -> tuple[Tensor, ...]:
    """q, k and v ``[B, H, N, D]`` as views of ``[B, N, 3, H, D]``."""
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def save(
    ctx: Context,
    inputs: tuple[Any, ...],
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Keep what ``gradients`` needs of the inputs of the schema; q, k and v may be one packed tensor and twice None."""
    q, k, v, bias, bias_table, bias_index, key_mask, logit_scale, scale, num_prefix, positions, stats = inputs
    out, lse, lse_low, rows = outputs
    ctx.mark_non_differentiable(lse_low)
    scored = (bias, bias_table, bias_index, key_mask, logit_scale)
    ctx.save_for_backward(q, k, v, out, lse, lse_low, *scored, positions, rows)
    ctx.options = (scale, num_prefix, stats)
    ctx.set_materialize_grads(False)


def gradients(
    ctx: Context, coef: Run, bwd: Run, dout: Tensor | None, dlse: Tensor | None, _: Tensor | None, drows: Tensor | None
) -> dict[str, Tensor | None]:
    """By name; packed, the one of all three is that of q."""
    q, k, v, out, lse, lse_low, *scored, positions, rows = ctx.saved_tensors
    bias, bias_table, *_, logit_scale = scored
    scale, num_prefix, stats = ctx.options
    packed = k is None
    if packed:
        q, k, v = parts(q)
    dout = torch.zeros_like(out) if dout is None else _checks.rows(dout)
    by_score = None if dlse is None and drows is None else coef(dlse, rows, drows, stats)
    need_bias = bias is not None and ctx.needs_input_grad[-9]
    need_table = bias_table is not None and ctx.needs_input_grad[-8]
    need_logit_scale = logit_scale is not None and ctx.needs_input_grad[-5]
    options = (*scored, scale, num_prefix, positions if drows is not None else None)
    needs = (need_bias, need_table, need_logit_scale, packed)
    dq, dk, dv, *others = bwd(dout, q, k, v, out, lse, lse_low, *options, by_score, *needs)
    found = {"q": dq, **dict(zip(("bias", "bias_table", "logit_scale"), others, strict=True))}
    if packed:
        return found
    return {**found, "q": dq.transpose(1, 2), "k": dk.transpose(1, 2), "v": dv.transpose(1, 2)}


SPEC = register(
    OpSpec(
        name="attention",
        schemas={
            # out, lse, lse_low, statistics. lse_low is what rounding took from lse, log N of a row whose scores are all
            # -1e9, say: P = exp((S - lse) - lse_low).
            "attention_fwd": "(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? bias_table, Tensor? bias_index, "
            "Tensor? key_mask, Tensor? logit_scale, float scale, SymInt num_prefix, Tensor? positions, int stats) "
            "-> (Tensor, Tensor, Tensor, Tensor)",
            "attention_coef": "(Tensor? dlse, Tensor rows, Tensor? drows, int stats) -> Tensor",
            "attention_bwd": "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
            "Tensor lse_low, Tensor? bias, Tensor? bias_table, Tensor? bias_index, Tensor? key_mask, "
            "Tensor? logit_scale, float scale, SymInt num_prefix, Tensor? positions, Tensor? coef, bool need_bias, "
            "bool need_table, bool need_logit_scale, bool packed) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        },
        fakes={"attention_fwd": _fwd, "attention_coef": _coef, "attention_bwd": _bwd},
        gradient=Gradient(save, gradients),
        impls=(
            Impl("triton", limits={"head_dim": 128}, multiples={"head_dim": 8}),
            Impl("cuda", limits={"head_dim": 128}, multiples={"head_dim": 8}),
            Impl("cpu", limits={"head_dim": 128}, multiples={"head_dim": 8}),
            Impl("reference", ANY_FLOAT),
        ),
    )
)
