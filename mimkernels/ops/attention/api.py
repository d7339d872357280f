from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mimkernels.ops import _checks
from mimkernels.ops._autograd import Context, Run
from mimkernels.ops._memo import by_signature
from mimkernels.ops.attention import reference
from mimkernels.ops.attention.spec import DETACHED, MOST_KEYS, SPEC, STATISTICS, gradients, parts, save


class AttentionOutput(NamedTuple):
    """Attention and what was captured on the way.

    Attributes:
        out: ``[B, H, Nq, D]``, a view of ``[B, Nq, H, D]`` memory: ``out.transpose(1, 2).flatten(2)`` copies nothing.
        lse: ``[B, H, Nq]`` fp32, log-sum-exp of the scores.
        stats: each asked statistic, ``[B, H, Nq]`` fp32 (``argmax``: int64), by name.
    """

    out: Tensor
    lse: Tensor
    stats: dict[str, Tensor]


# By the reference: out, lse and the statistics by name; by kernels: out, lse, lse_low and rows of statistics.
_Outputs = tuple[Tensor, Tensor, dict[str, Tensor]] | tuple[Tensor, Tensor, Tensor, Tensor]
# bias, bias_table, bias_index, key_mask and logit_scale.
_ScoreTensors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
# scale, num_prefix, what the backend knows the asked statistics by, and where each is in the rows of a kernel.
_Options = tuple[float, int, int | tuple[str, ...], dict[str, int]]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    bias_table: Tensor | None = None,
    bias_index: Tensor | None = None,
    key_mask: Tensor | None = None,
    logit_scale: Tensor | None = None,
    scale: float | None = None,
    num_prefix: int = 0,
    positions: Tensor | None = None,
    stats: Sequence[str] = (),
    backend: str = "auto",
) -> AttentionOutput:
    """Exact attention that captures per-head row statistics; the attention matrix never exists in memory.

    With ``S = scale * q k^T + bias + bias_table[bias_index]`` and ``P = softmax(S)``, the statistics of query i are,
    over keys j and over the patch keys T (``j >= num_prefix``) with mass ``M_i``:

    - ``entropy``: ``-sum_j P_ij log P_ij``, nats
    - ``prefix_mass``: ``sum of P_ij over prefix keys``
    - ``self_mass``: ``P_ii``
    - ``distance``: ``sum over T of P_ij |x_i - x_j|``, in the units of ``positions``; 0 for prefix queries
    - ``patch_entropy``: entropy of ``P_ij / M_i`` over T, nats, a difference of two numbers of the size of ``log M_i``,
      to a few of whose roundings it is right; 0, without a gradient, where ``M_i`` is below 1e-30
    - ``peak``: ``max_j P_ij``, detached
    - ``patch_mass``: ``M_i``
    - ``max_score``: ``max_j S_ij``, the largest logit, after scale, biases and mask; what QK-clip (MuonClip) compares
      with its threshold. -inf where nothing may be attended; detached
    - ``argmax``: the key j of the largest ``S_ij``, hence of the largest ``P_ij``; of several the first; -1 where
      nothing may be attended or a score is NaN. int64, without a gradient

    Gradients flow through ``out``, ``lse`` and every statistic but ``peak``, ``max_score`` and ``argmax`` to ``q``,
    ``k``, ``v``, ``bias``, ``bias_table`` and ``logit_scale``.

    Where a CPU multiplies bf16 itself (AVX-512, AMX), its products take subnormal numbers (below 2^-126) for 0, in the
    inputs, their gradients and ``P``.

    Args:
        q: ``[B, H, Nq, D]`` fp32, fp16 or bf16 (fp64 on the reference); any strides, such as views of a packed
            projection. D a multiple of 8, at most 128, for the kernels.
        k, v: ``[B, H, Nk, D]``.
        bias: added to the scores, ``[H or 1, Nq, Nk]`` or ``[W, H or 1, Nq, Nk]``, W a divisor of B: image b takes
            row ``b % W``, as the windows of Swin's shift mask do. Dtype of ``q`` or fp32.
        bias_table: ``[T, H]``, also added to the scores: ``bias_table[bias_index[i, j], h]``, the relative position
            bias of BEiT and Swin, which is never made as ``[H, Nq, Nk]``. Dtype of ``q`` or fp32.
        bias_index: ``[Nq, Nk]`` int64 (or int32), each in ``[0, T)``; given with ``bias_table``.
        key_mask: ``[B, Nk]`` bool, True = may be attended. A query that may attend nothing gets zeros; if it
            holds NaN, zeros or NaN, depending on the backend.
        logit_scale: ``[H]``, of cosine attention, as in Swin V2: ``S = exp(min(logit_scale, ln 100)) * cos(q, k)`` plus
            the biases, where ``cos(q, k)`` is the product of ``q / max(|q|, 1e-12)`` and ``k / max(|k|, 1e-12)``. In
            place of ``scale``.
        scale: of the scores; ``D ** -0.5`` if None.
        num_prefix: P, how many leading tokens ([cls], registers) are not patches.
        positions: patch coordinates ``[N - P, d]`` or ``[B, N - P, d]`` (or with N rows, whose first P are ignored),
            d from 1 to 3; per image for masked encoders. Needed for ``distance`` only; they get no gradient.
        stats: names of the statistics to capture; those not asked for cost nothing.
        backend: ``"auto"`` or a name from ``mimkernels info``. A named backend never falls back.

    Returns:
        ``AttentionOutput(out, lse, stats)``.

    Raises:
        ValueError: shapes or devices disagree, an unknown statistic, ``distance`` without ``positions``, or
            ``self_mass`` or ``distance`` of cross-attention.
        TypeError: a dtype that the op does not take.
        IndexError: ``bias_index`` is out of range (checked on CPU).
        NotImplementedError: no backend takes these inputs; lists each backend's reasons.

    Source: online softmax as in FlashAttention, arXiv:2205.14135; the statistics' sources are in ``mimkernels.heads``.
    """
    tensors = (q, k, v, bias, bias_table, bias_index, key_mask, logit_scale, positions)
    run, ready, (scale, num_prefix, asked, planes) = _checked(tensors, scale, num_prefix, stats or None, backend)
    *others, positions = ready
    return _named(run(*others, scale, num_prefix, positions, asked), planes)


@by_signature
def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    bias_table: Tensor | None,
    bias_index: Tensor | None,
    key_mask: Tensor | None,
    logit_scale: Tensor | None,
    positions: Tensor | None,
    scale: float | None,
    num_prefix: int,
    stats: Sequence[str] | None,
    backend: str,
) -> tuple[
    Callable[..., _Outputs],
    tuple[Tensor | None, ...],
    _Options,
]:
    op = "attention"
    _check_qk(op, q, k)
    _check_same_kind(op, "v", v, q)
    if v.shape != k.shape:
        raise ValueError(f"{op}: v {_checks.shape(v)} and k {_checks.shape(k)} must have the same shape")
    given = (bias, bias_table, bias_index, key_mask, logit_scale, positions)
    others, options, name = _check_options(op, q, k, *given, scale, num_prefix, stats, backend)
    run = SPEC.runner(name, reference.attention, _checks.needs_grad(q, k, v, bias, bias_table, logit_scale))
    return run, (_checks.rows(q), _checks.rows(k), _checks.rows(v), *others), options


def attention_qkvpacked(
    qkv: Tensor,
    *,
    bias: Tensor | None = None,
    bias_table: Tensor | None = None,
    bias_index: Tensor | None = None,
    key_mask: Tensor | None = None,
    logit_scale: Tensor | None = None,
    scale: float | None = None,
    num_prefix: int = 0,
    positions: Tensor | None = None,
    stats: Sequence[str] = (),
    backend: str = "auto",
) -> AttentionOutput:
    """``attention`` of the packed projection of self-attention, whose gradient is packed, too.

    The same as ``attention`` of ``qkv.permute(2, 0, 3, 1, 4).unbind(0)``, to the bit, but the kernels write the
    gradients of q, k and v into one tensor, where those of three views would be stacked into one afterwards.

    Args:
        qkv: ``[B, N, 3, H, D]``: q, k and v of every token, as ``nn.Linear(C, 3 * H * D)`` makes them. fp32, fp16 or
            bf16 (fp64 on the reference); any strides with a contiguous last dim, others are copied. Its gradient is
            contiguous (on the reference, as autograd makes it).
        bias, bias_table, bias_index, key_mask, logit_scale, scale, num_prefix, positions, stats, backend: as of
            ``attention``, with Nq = Nk = N.

    Returns:
        ``AttentionOutput(out, lse, stats)``.

    Raises:
        ValueError, TypeError, IndexError, NotImplementedError: as ``attention``; ValueError if ``qkv`` does not hold
            three parts.
    """
    tensors = (qkv, bias, bias_table, bias_index, key_mask, logit_scale, positions)
    run, ready, (scale, num_prefix, asked, planes) = _checked_packed(tensors, scale, num_prefix, stats or None, backend)
    *others, positions = ready
    return _named(run(*others, scale, num_prefix, positions, asked), planes)


@by_signature
def _checked_packed(
    qkv: Tensor,
    bias: Tensor | None,
    bias_table: Tensor | None,
    bias_index: Tensor | None,
    key_mask: Tensor | None,
    logit_scale: Tensor | None,
    positions: Tensor | None,
    scale: float | None,
    num_prefix: int,
    stats: Sequence[str] | None,
    backend: str,
) -> tuple[
    Callable[..., _Outputs],
    tuple[Tensor | None, ...],
    _Options,
]:
    op = "attention_qkvpacked"
    _checks.has_rank(op, "qkv", qkv, 5)
    _checks.is_float(op, "qkv", qkv)
    if qkv.shape[2] != 3:
        raise ValueError(f"{op}: qkv {_checks.shape(qkv)} must be [B, N, 3, H, D]")
    q, k, _ = parts(qkv)
    given = (bias, bias_table, bias_index, key_mask, logit_scale, positions)
    others, options, name = _check_options(op, q, k, *given, scale, num_prefix, stats, backend)
    tracked = _checks.needs_grad(qkv, bias, bias_table, logit_scale)
    ops = SPEC.plain_ops(name) if tracked else None
    if ops is None:
        run = _of_packed(SPEC.runner(name, reference.attention, tracked))
    else:
        run = partial(_Packed.apply, *ops)
    return run, (_checks.rows(qkv), *others), options


def _of_packed(run: Run) -> Run:
    def unpacked(qkv: Tensor, *others: Any) -> Any:
        return run(*parts(qkv), *others)

    return unpacked


def _named(outputs: _Outputs, planes: dict[str, int]) -> AttentionOutput:
    """``planes`` says where each statistic is in the rows of a kernel."""
    if len(outputs) == 3:  # of the reference
        return AttentionOutput(*outputs)
    out, lse, _, rows = outputs
    out = out.transpose(1, 2)
    if not planes:
        return AttentionOutput(out, lse, {})
    by_plane = rows.unbind(0)
    made = {name: by_plane[plane] for name, plane in planes.items()}
    if rows.requires_grad:
        made |= {name: made[name].detach() for name in DETACHED if name in made}
    if "argmax" in made:
        made["argmax"] = made["argmax"].to(torch.int64)
    return AttentionOutput(out, lse, made)


class _Packed(torch.autograd.Function):
    """Of q, k and v in one tensor, whose gradient the kernels write as one."""

    @staticmethod
    def forward(ctx: Context, fwd: Run, coef: Run, bwd: Run, qkv: Tensor, *options: Any) -> Any:
        outputs = fwd(*parts(qkv), *options)
        save(ctx, (qkv, None, None, *options), outputs)
        ctx.ops = (coef, bwd)
        return outputs

    @staticmethod
    def backward(ctx: Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = gradients(ctx, *ctx.ops, *grads)
        inputs = ("q", "bias", "bias_table", None, None, "logit_scale", None, None, None, None)
        wanted = zip(inputs, ctx.needs_input_grad[3:], strict=True)
        return *(None,) * 3, *(found[name] if needed and name else None for name, needed in wanted)


def checked_scores(
    op: str,
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    bias_table: Tensor | None,
    bias_index: Tensor | None,
    key_mask: Tensor | None,
    logit_scale: Tensor | None,
    scale: float | None,
) -> tuple[_ScoreTensors, float]:
    """Checks of the ops that need scores alone: the tensors beside q and k and the scale as kernels take them."""
    _check_qk(op, q, k)
    scale = _check_scale(op, scale, logit_scale, q)
    tensors = _check_score_tensors(op, q, k, bias, bias_table, bias_index, key_mask, logit_scale)
    return tensors, scale


def _check_score_tensors(
    op: str,
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    bias_table: Tensor | None,
    bias_index: Tensor | None,
    key_mask: Tensor | None,
    logit_scale: Tensor | None,
) -> _ScoreTensors:
    bias = _check_bias(op, bias, q, k)
    bias_table, bias_index = _check_table(op, bias_table, bias_index, q, k)
    return bias, bias_table, bias_index, _check_key_mask(op, key_mask, k), _check_logit_scale(op, logit_scale, q)


def checked_lse(op: str, lse: Tensor, q: Tensor) -> Tensor:
    """lse as kernels take it."""
    _checks.has_rank(op, "lse", lse, 3)
    _checks.is_float(op, "lse", lse)
    _checks.same_device(op, "lse", lse, "q", q)
    if lse.shape != q.shape[:3]:
        raise ValueError(f"{op}: lse {_checks.shape(lse)} must be [B, H, Nq] of q {_checks.shape(q)}")
    return _checks.rows(lse.to(torch.promote_types(q.dtype, torch.float32)))


def _check_options(
    op: str,
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    bias_table: Tensor | None,
    bias_index: Tensor | None,
    key_mask: Tensor | None,
    logit_scale: Tensor | None,
    positions: Tensor | None,
    scale: float | None,
    num_prefix: int,
    stats: Sequence[str] | None,
    backend: str,
) -> tuple[tuple[Tensor | None, ...], _Options, str]:
    """Of both ops: the tensors beside q, k and v, the other options of what runs, and the backend's name."""
    (_, _, length, dim), keys = q.shape, k.shape[2]
    planes, bits = _asked(op, stats, length, keys)
    _checks.prefix_count(op, num_prefix, keys, "keys")
    scale = _check_scale(op, scale, logit_scale, q)
    scored = _check_score_tensors(op, q, k, bias, bias_table, bias_index, key_mask, logit_scale)
    positions = _check_positions(op, positions, "distance" in planes, num_prefix, q)
    name = SPEC.resolve(backend, q.device, q.dtype, head_dim=dim)
    asked = tuple(planes) if name == "reference" else bits
    return (*scored, positions), (scale, num_prefix, asked, planes), name


def _check_qk(op: str, q: Tensor, k: Tensor) -> None:
    _checks.has_rank(op, "q", q, 4)
    _checks.is_float(op, "q", q)
    _check_same_kind(op, "k", k, q)
    for dim in (0, 1, 3):
        _checks.same_size(op, "k", k, dim, "q", q, dim)


def _check_same_kind(op: str, name: str, tensor: Tensor, q: Tensor) -> None:
    _checks.has_rank(op, name, tensor, 4)
    _checks.same_device(op, name, tensor, "q", q)
    if tensor.dtype != q.dtype:
        raise TypeError(f"{op}: {name} is {tensor.dtype} but q is {q.dtype}")


def _asked(op: str, stats: Sequence[str] | None, queries: int, keys: int) -> tuple[dict[str, int], int]:
    """Where each asked statistic is in the op's rows, and the op's bits."""
    if isinstance(stats, str):
        raise TypeError(f"{op}: stats must be a sequence of names, got the string {stats!r}")
    try:
        names = tuple(stats or ())
    except TypeError:
        raise TypeError(f"{op}: stats must be a sequence of names, got {stats!r}") from None
    for name in names:
        if name not in STATISTICS:
            raise ValueError(f"{op}: unknown statistic {name!r}; known: {', '.join(STATISTICS)}")
    # The gradient of patch_entropy needs M_i.
    computed = {*names, "patch_mass"} if "patch_entropy" in names else {*names}
    order = [name for name in STATISTICS if name in computed]
    planes = {name: order.index(name) for name in names}
    bits = sum(1 << STATISTICS.index(name) for name in order)
    if queries != keys:
        for name in ("self_mass", "distance"):
            if name in planes:
                raise ValueError(f"{op}: {name} needs self-attention, got {queries} queries and {keys} keys")
    if "argmax" in planes and keys > MOST_KEYS:
        raise ValueError(f"{op}: argmax is of at most {MOST_KEYS} keys, got {keys}")
    return planes, bits


def _check_positions(op: str, positions: Tensor | None, needed: bool, num_prefix: int, q: Tensor) -> Tensor | None:
    """fp32 (or fp64) ``[N or N - P, d]`` or one of those per image, or None where no statistic needs it."""
    if not needed:
        return None
    if positions is None:
        raise ValueError(f"{op}: the statistic 'distance' needs positions, got None")
    _checks.has_rank(op, "positions", positions, 2, 3)
    _checks.is_real(op, "positions", positions)
    _checks.same_device(op, "positions", positions, "q", q)
    batch, tokens = q.shape[0], q.shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if positions.requires_grad or positions.dtype != wide:
        positions = positions.detach().to(wide)
    *images, places, dims = positions.shape
    if images not in ([], [1], [batch]) or places not in (tokens, tokens - num_prefix) or not 1 <= dims <= 3:
        raise ValueError(
            f"{op}: positions {_checks.shape(positions)} must be [N - P, d] or [B, N - P, d] with B = {batch}, "
            f"N = {tokens}, P = {num_prefix} and d from 1 to 3"
        )
    return _checks.rows(positions)


def _check_bias(op: str, bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The bias as 4-D, of one head or of all, in the dtype of q or fp32."""
    if bias is None:
        return None
    _checks.has_rank(op, "bias", bias, 3, 4)
    _checks.is_float(op, "bias", bias)
    _checks.same_device(op, "bias", bias, "q", q)
    if bias.dim() == 3:
        bias = bias.unsqueeze(0)
    batch, heads, length, _ = q.shape
    windows = bias.shape[0]
    wanted = ((1, heads), (length,), (k.shape[2],))
    if any(size not in allowed for size, allowed in zip(bias.shape[1:], wanted, strict=True)):
        raise ValueError(
            f"{op}: bias {_checks.shape(bias)} must be [W, H or 1, Nq, Nk] for q {_checks.shape(q)} and "
            f"k {_checks.shape(k)}"
        )
    if windows not in (1, batch) and (windows == 0 or batch % windows):
        raise ValueError(
            f"{op}: bias {_checks.shape(bias)} has {windows} windows, which do not divide the {batch} images of q "
            f"{_checks.shape(q)}"
        )
    return _checks.rows(bias if bias.dtype in (q.dtype, torch.float32) else bias.to(q.dtype))


def _check_table(
    op: str, bias_table: Tensor | None, bias_index: Tensor | None, q: Tensor, k: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The table in the dtype of q or fp32 and the index as int64, or None twice."""
    if bias_table is None and bias_index is None:
        return None, None
    if bias_table is None or bias_index is None:
        given, missing = ("bias_table", "bias_index") if bias_index is None else ("bias_index", "bias_table")
        raise ValueError(f"{op}: {given} is given but {missing} is None; give both or neither")
    _checks.has_rank(op, "bias_table", bias_table, 2)
    _checks.is_float(op, "bias_table", bias_table)
    _checks.same_device(op, "bias_table", bias_table, "q", q)
    if bias_table.shape[1] != q.shape[1]:
        raise ValueError(f"{op}: bias_table {_checks.shape(bias_table)} must be [T, H] for q {_checks.shape(q)}")
    bias_index = _checks.token_ids(op, "bias_index", bias_index, (2,), "q", q)
    if bias_index.shape[0] != q.shape[2] or bias_index.shape[1] != k.shape[2]:
        raise ValueError(
            f"{op}: bias_index {_checks.shape(bias_index)} must be [Nq, Nk] for q {_checks.shape(q)} and "
            f"k {_checks.shape(k)}"
        )
    if bias_table.dtype not in (q.dtype, torch.float32):
        bias_table = bias_table.to(q.dtype)
    return _checks.rows(bias_table), bias_index


def _check_key_mask(op: str, key_mask: Tensor | None, k: Tensor) -> Tensor | None:
    if key_mask is None:
        return None
    _checks.has_rank(op, "key_mask", key_mask, 2)
    _checks.same_device(op, "key_mask", key_mask, "k", k)
    if key_mask.dtype != torch.bool:
        raise TypeError(f"{op}: key_mask must be bool (True = may be attended), got {key_mask.dtype}")
    if key_mask.shape[0] != k.shape[0] or key_mask.shape[1] != k.shape[2]:
        raise ValueError(f"{op}: key_mask {_checks.shape(key_mask)} must be [B, Nk] for k {_checks.shape(k)}")
    return _checks.rows(key_mask)


def _check_scale(op: str, scale: float | None, logit_scale: Tensor | None, q: Tensor) -> float:
    """What multiplies the products of q and k, or the cosines beside ``logit_scale``."""
    if logit_scale is None:
        return _checks.head_scale(op, scale, q.shape[3])
    if scale is not None:
        raise ValueError(f"{op}: scale {scale} and logit_scale are both given; logit_scale is the scale of the cosines")
    return 1.0


def _check_logit_scale(op: str, logit_scale: Tensor | None, q: Tensor) -> Tensor | None:
    """``[H]`` in fp32 (or fp64)."""
    if logit_scale is None:
        return None
    _checks.has_rank(op, "logit_scale", logit_scale, 1)
    _checks.is_float(op, "logit_scale", logit_scale)
    _checks.same_device(op, "logit_scale", logit_scale, "q", q)
    if logit_scale.shape[0] != q.shape[1]:
        raise ValueError(f"{op}: logit_scale {_checks.shape(logit_scale)} must be [H] for q {_checks.shape(q)}")
    return _checks.rows(logit_scale.to(torch.promote_types(q.dtype, torch.float32)))
