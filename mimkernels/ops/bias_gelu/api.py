from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mimkernels.ops import _checks
from mimkernels.ops._memo import by_signature
from mimkernels.ops.bias_gelu import reference
from mimkernels.ops.bias_gelu.spec import SPEC


def bias_gelu(x: Tensor, bias: Tensor | None = None, *, approximate: str = "none", backend: str = "auto") -> Tensor:
    """``gelu(x + bias)`` in one pass; backward gives both gradients in one pass over x and the output's gradient.

    Args:
        x: ``[..., E]``, fp32, fp16 or bf16 (fp64 on the reference); any strides. What a linear layer without its bias
            gives.
        bias: ``[E]`` in the dtype of `x` or fp32, or None. An fp32 bias beside half-precision `x`, as under autocast,
            is read in fp32, and its gradient is fp32.
        approximate: ``"none"`` (by erf) or ``"tanh"``, as in ``torch.nn.functional.gelu``.
        backend: ``"auto"`` or a name from ``mimkernels info``. A named backend never falls back.

    Returns:
        ``[..., E]``, dtype of `x`. The sum and GELU are computed in fp32 and rounded once.

    Raises:
        ValueError: shapes or devices disagree, or an unknown `approximate`; the message shows both sides.
        TypeError: a dtype that the op does not take.
        NotImplementedError: no backend takes these inputs; lists each backend's reasons.

    Source: GELU, arXiv:1606.08415; the fusion and its name are Megatron-LM's, arXiv:1909.08053.
    """
    run, (x, bias), (tanh,) = _checked((x, bias), approximate, backend)
    if x.dim() == 3:  # [A, R, E], as the kernels take it
        return run(x, bias, tanh)
    rows = x.flatten(0, -3) if x.dim() > 3 else x[None] if x.dim() == 2 else x[None, None]
    return run(rows, bias, tanh).view(x.shape)


@by_signature
def _checked(
    x: Tensor, bias: Tensor | None, approximate: str, backend: str
) -> tuple[Callable[..., Tensor], tuple[Tensor, Tensor | None], tuple[bool]]:
    op = "bias_gelu"
    _checks.is_tensor(op, "x", x)
    _checks.is_float(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least 1 dimension, got 0 ([])")
    if bias is not None:
        _checks.has_rank(op, "bias", bias, 1)
        if bias.dtype not in (x.dtype, torch.float32):
            wanted = " or ".join(str(dtype) for dtype in dict.fromkeys((x.dtype, torch.float32)))
            raise TypeError(f"{op}: bias must be {wanted}, got {bias.dtype}")
        _checks.same_device(op, "bias", bias, "x", x)
        _checks.same_size(op, "bias", bias, 0, "x", x, x.dim() - 1)
        bias = _checks.rows(bias)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{op}: approximate must be 'none' or 'tanh', got {approximate!r}")
    name = SPEC.resolve(backend, x.device, x.dtype)
    run = SPEC.runner(name, reference.bias_gelu, _checks.needs_grad(x, bias))
    return run, (_checks.rows(x), bias), (approximate == "tanh",)
