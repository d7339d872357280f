from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mimkernels.ops import _checks
from mimkernels.ops._memo import by_signature
from mimkernels.ops.fill_mask_tokens import reference
from mimkernels.ops.fill_mask_tokens.spec import SPEC


def fill_mask_tokens(x: Tensor, mask: Tensor, mask_token: Tensor, *, backend: str = "auto") -> Tensor:
    """Masked tokens replaced by the mask token.

    Args:
        x: ``[B, N, D]`` tokens, fp32, fp16 or bf16 (fp64 on the reference); any strides.
        mask: ``[B, N]`` bool, integer or float, nonzero = masked.
        mask_token: ``[D]`` or ``[1, 1, D]``.
        backend: ``"auto"`` or a name from ``mimkernels info``. A named backend never falls back.

    Returns:
        ``[B, N, D]``, dtype of ``x``. Gradients reach ``x`` and ``mask_token``.

    Raises:
        ValueError: shapes or devices disagree; the message shows both sides.
        TypeError: a dtype that the op does not take.
        NotImplementedError: no backend takes these inputs; lists each backend's reasons.

    Source: the mask-token substitution of SimMIM, arXiv:2111.09886, and BEiT, arXiv:2106.08254. A selection, where
    those multiply by 0 and 1: NaN under the mask does not spread.
    """
    run, tensors, _ = _checked((x, mask, mask_token), backend)
    return run(*tensors)


@by_signature
def _checked(
    x: Tensor, mask: Tensor, mask_token: Tensor, backend: str
) -> tuple[Callable[..., Tensor], tuple[Tensor, Tensor, Tensor], tuple[()]]:
    op = "fill_mask_tokens"
    _checks.has_rank(op, "x", x, 3)
    _checks.is_float(op, "x", x)
    mask = _checks.token_mask(op, mask, "x", x)
    mask_token = _checks.parameter(op, "mask_token", mask_token, 1, "x", x)
    _checks.same_size(op, "mask_token", mask_token, 0, "x", x, 2)
    name = SPEC.resolve(backend, x.device, x.dtype)
    run = SPEC.runner(name, reference.fill_mask_tokens, _checks.needs_grad(x, mask_token))
    return run, (_checks.rows(x), mask, mask_token), ()
