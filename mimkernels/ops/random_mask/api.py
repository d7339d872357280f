from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mimkernels.ops import _checks, _token_mask
from mimkernels.ops._memo import by_signature
from mimkernels.ops._token_mask import TokenMask
from mimkernels.ops.random_mask import reference
from mimkernels.ops.random_mask.spec import SPEC


def random_mask(
    batch: int,
    tokens: int,
    keep: int,
    seed: int,
    offset: int | Tensor = 0,
    *,
    order: str = "shuffle",
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> TokenMask:
    """Random masks that are the same integers on every backend.

    Token i of image b draws word ``i % 4`` of Philox4x32-10 with key ``seed`` and counter
    ``(i // 4, b, offset)``; the ``keep`` tokens with the smallest draws stay visible.

    Args:
        batch: B, number of images.
        tokens: N, patch tokens per image.
        keep: K, tokens that stay visible, in ``[1, N]``.
        seed: in ``[0, 2^63)``.
        offset: usually the training step, in ``[0, 2^63)``; or a 0-d int64 tensor on ``device``, read by the
            kernel without waiting for it, so that a captured CUDA graph draws new masks at each replay.
        order: ``"shuffle"`` as in MAE, or ``"sorted"``: kept and removed tokens each in ascending order.
        device: where the result lives; torch's default device if None.
        backend: ``"auto"`` or a name from ``mimkernels info``. A named backend never falls back.

    Returns:
        ``TokenMask(ids_keep [B, K], ids_masked [B, N - K], ids_restore [B, N], mask [B, N])``.

    Raises:
        ValueError: ``keep`` is not in ``[1, tokens]``, or a negative size, seed or offset.
        NotImplementedError: no backend takes these inputs; lists each backend's reasons.

    Source: random masking of MAE, arXiv:2111.06377; Philox of Salmon et al., SC 2011.
    """
    step, offset = (offset, 0) if isinstance(offset, Tensor) else (None, offset)
    if device is None and step is not None:
        device = step.device
    elif device is None:  # torch.compile traces no get_default_device
        device = torch.empty(0).device if torch.compiler.is_compiling() else torch.get_default_device()
    run, (step,), options = _checked((step,), batch, tokens, keep, order, device, backend)
    # These change from call to call.
    _checks.count("random_mask", "seed", seed)
    _checks.count("random_mask", "offset", offset)
    return _token_mask.from_op(run(seed, offset, step, *options), keep)


@by_signature
def _checked(
    step: Tensor | None, batch: int, tokens: int, keep: int, order: str, device: torch.device | str, backend: str
) -> tuple[
    Callable[..., tuple[Tensor, Tensor, Tensor]], tuple[Tensor | None], tuple[int, int, int, bool, torch.device]
]:
    in_order = _checks.sorted_order("random_mask", order)
    _checks.count("random_mask", "batch", batch)
    _checks.count("random_mask", "tokens", tokens)
    _checks.keep_count("random_mask", keep, tokens)
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"random_mask: device {device!r} is none: {error}") from None
    if step is not None:
        _checks.is_tensor("random_mask", "offset", step)
        if step.dim() != 0 or step.dtype != torch.int64:
            raise ValueError(f"random_mask: an offset tensor must be 0-d int64, got {_checks.shape(step)} {step.dtype}")
        if step.device.type != device.type or device.index not in (None, step.device.index):
            raise ValueError(f"random_mask: offset is on {step.device} but device is {device}")
    name = SPEC.resolve(backend, device, torch.float32, tokens=tokens)
    run = SPEC.runner(name, reference.random_mask, False)
    return run, (step,), (batch, tokens, keep, in_order, device)
