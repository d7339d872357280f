from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mimkernels.ops import _checks
from mimkernels.ops._memo import by_signature
from mimkernels.ops._registry import ANY_FLOAT, FLOATS
from mimkernels.ops.add_layer_norm import reference
from mimkernels.ops.add_layer_norm.spec import SPEC

_Tensors = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class AddLayerNormOutput(NamedTuple):
    """The residual stream after a branch, and what the next branch takes.

    Attributes:
        residual: ``[..., C]``, ``x + drop * scale * y``; `x` itself without `y`.
        normalised: ``[..., C]``, its LayerNorm.
    """

    residual: Tensor
    normalised: Tensor


def add_layer_norm(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    drop: Tensor | None = None,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> AddLayerNormOutput:
    """``residual = x + drop * scale * y`` and its LayerNorm, in one pass; backward in one pass, too.

    What a pre-norm transformer block does between two branches: the stream takes a branch's output, scaled by
    LayerScale and perhaps dropped, and the next branch takes the stream normalised, in the dtype of its first product.

    Args:
        x: ``[..., C]`` residual stream, fp32, fp16 or bf16 (fp64 on the reference); any strides.
        y: ``[..., C]`` branch output, of the same shape, any of these dtypes; or None for LayerNorm alone.
        weight, bias: ``[C]`` of LayerNorm, any dtype up to fp32, read in fp32; or None for ones and zeros.
        scale: ``[C]`` LayerScale's gamma, likewise; or None.
        drop: ``[B]``, a factor for each image, of which `x` is ``[B, ..., C]``: stochastic depth's 0 or 1 / keep rate;
            likewise, without a gradient; or None.
        eps: added to the variance.
        out_dtype: of the normalised rows; that of the residual if None. Under autocast, autocast's dtype saves the
            linear layer that follows its cast.
        backend: ``"auto"`` or a name from ``mimkernels info``. A named backend never falls back.

    Returns:
        ``AddLayerNormOutput(residual, normalised)``. The residual has the dtype of ``x + y``, to which it is rounded
        before it is normalised. Mean and variance are computed in fp32, in two passes over a row, the mean
        to the last place; each result is rounded once.

    Raises:
        ValueError: shapes or devices disagree, or eps is not positive; the message shows both sides.
        TypeError: a dtype that the op does not take.
        NotImplementedError: no backend takes these inputs; lists each backend's reasons.

    Source: LayerNorm, arXiv:1607.06450; LayerScale, arXiv:2103.17239; stochastic depth, arXiv:1603.09382.
    """
    run, tensors, options = _checked((x, y, weight, bias, scale, drop), eps, out_dtype, backend)
    stream, branch, *parameters = tensors
    residual, normalised, *_ = run(_rows(stream), None if branch is None else _rows(branch), *parameters, *options)
    return AddLayerNormOutput(x if y is None else residual.view(x.shape), normalised.view(x.shape))


def _rows(tensor: Tensor) -> Tensor:
    """``[B, R, C]``, the R rows of each image."""
    dims = tensor.dim()
    if dims == 3:
        return tensor
    return tensor.flatten(1, -2) if dims > 3 else tensor[:, None] if dims == 2 else tensor[None, None]


@by_signature
def _checked(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    drop: Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
    backend: str,
) -> tuple[Callable[..., tuple[Tensor, ...]], _Tensors, tuple[float, torch.dtype]]:
    op = "add_layer_norm"
    _checks.is_tensor(op, "x", x)
    _checks.is_float(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least 1 dimension, got 0 ([])")
    dtype = x.dtype
    if y is not None:
        _checks.is_tensor(op, "y", y)
        _checks.is_float(op, "y", y)
        _checks.same_device(op, "y", y, "x", x)
        if y.shape != x.shape:
            raise ValueError(f"{op}: y {_checks.shape(y)} and x {_checks.shape(x)} must have the same shape")
        dtype = torch.promote_types(dtype, y.dtype)
    else:
        for name, value in (("scale", scale), ("drop", drop)):
            if value is not None:
                raise ValueError(f"{op}: {name} is given but y, which it scales, is None")
    channels = {"weight": weight, "bias": bias, "scale": scale}
    weight, bias, scale = (_parameter(op, name, value, -1, x, dtype) for name, value in channels.items())
    if drop is not None:
        if x.dim() == 1:
            raise ValueError(f"{op}: drop has a factor for each image, but x has 1 dimension ({_checks.shape(x)})")
        if isinstance(drop, Tensor) and drop.requires_grad:
            raise TypeError(f"{op}: drop gets no gradient but is a tensor that requires one; detach it")
        drop = _parameter(op, "drop", drop, 0, x, dtype)
    eps = _checks.positive(op, "eps", eps)
    if out_dtype is None:
        out_dtype = dtype
    if out_dtype not in ANY_FLOAT:
        raise TypeError(f"{op}: out_dtype must be floating point, got {out_dtype}")
    # A kernel must take both dtypes; only the reference takes fp64.
    name = SPEC.resolve(backend, x.device, dtype if out_dtype in FLOATS else out_dtype, columns=x.shape[-1])
    run = SPEC.runner(name, reference.add_layer_norm, _checks.needs_grad(x, y, weight, bias, scale))
    x, y = _checks.rows(x.to(dtype)), None if y is None else _checks.rows(y)
    return run, (x, y, weight, bias, scale, drop), (eps, out_dtype)


def _parameter(op: str, name: str, value: Tensor | None, dim: int, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A vector as long as dimension `dim` of `x`, in the dtype in which sums of `dtype` are computed."""
    if value is None:
        return None
    _checks.has_rank(op, name, value, 1)
    _checks.is_float(op, name, value)
    _checks.same_device(op, name, value, "x", x)
    _checks.same_size(op, name, value, 0, "x", x, dim % x.dim())
    wide = torch.promote_types(dtype, torch.float32)
    if torch.promote_types(value.dtype, wide) != wide:
        raise TypeError(f"{op}: {name} must be at most {wide} beside {dtype} tokens, got {value.dtype}")
    return _checks.rows(value.to(wide))
