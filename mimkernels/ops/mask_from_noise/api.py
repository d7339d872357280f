from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mimkernels.ops import _checks, _token_mask
from mimkernels.ops._memo import by_signature
from mimkernels.ops._token_mask import TokenMask
from mimkernels.ops.mask_from_noise import reference
from mimkernels.ops.mask_from_noise.spec import SPEC


def mask_from_noise(noise: Tensor, keep: int, *, order: str = "shuffle", backend: str = "auto") -> TokenMask:
    """Masks from given noise: the ``keep`` tokens with the least noise stay visible.

    Equal to the double argsort of MAE's code, without sorting; ties go to the lower index, NaN counts as largest.

    Args:
        noise: ``[B, N]`` floating point, one draw per patch token; any strides.
        keep: K, tokens that stay visible, in ``[1, N]``.
        order: ``"shuffle"`` as in MAE, or ``"sorted"``: kept and removed tokens each in ascending order.
        backend: ``"auto"`` or a name from ``mimkernels info``. A named backend never falls back.

    Returns:
        ``TokenMask(ids_keep [B, K], ids_masked [B, N - K], ids_restore [B, N], mask [B, N])``.

    Raises:
        ValueError: ``noise`` is not 2-D, or ``keep`` is not in ``[1, N]``.
        TypeError: ``noise`` is not floating point.
        NotImplementedError: no backend takes these inputs; lists each backend's reasons.

    Source: random masking of MAE, arXiv:2111.06377.
    """
    run, tensors, options = _checked((noise,), keep, order, backend)
    return _token_mask.from_op(run(*tensors, *options), keep)


@by_signature
def _checked(
    noise: Tensor, keep: int, order: str, backend: str
) -> tuple[Callable[..., tuple[Tensor, Tensor, Tensor]], tuple[Tensor], tuple[int, bool]]:
    in_order = _checks.sorted_order("mask_from_noise", order)
    _checks.has_rank("mask_from_noise", "noise", noise, 2)
    _checks.is_float("mask_from_noise", "noise", noise)
    _checks.keep_count("mask_from_noise", keep, noise.shape[1])
    noise = _checks.rows(noise.detach())
    if noise.dtype in (torch.float16, torch.bfloat16):  # exact, and keeps ties
        noise = noise.float()
    name = SPEC.resolve(backend, noise.device, noise.dtype, tokens=noise.shape[1])
    run = SPEC.runner(name, reference.mask_from_noise, False)
    return run, (noise,), (keep, in_order)
