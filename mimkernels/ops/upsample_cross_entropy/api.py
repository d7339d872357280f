from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mimkernels.ops import _checks
from mimkernels.ops._memo import by_signature
from mimkernels.ops.upsample_cross_entropy import reference
from mimkernels.ops.upsample_cross_entropy.spec import SPEC

_LABELS = (torch.uint8, torch.int16, torch.int32, torch.int64)


def upsample_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = 255,
    align_corners: bool = False,
    label_smoothing: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Mean cross-entropy of logits resized bilinearly to their labels, which are never stored at that size.

    ``F.cross_entropy(F.interpolate(logits, labels.shape[1:], mode="bilinear"), labels)`` in one pass over the pixels
    of the labels, and its gradient in another; beside the logits, eight bytes per pixel are kept.

    Args:
        logits: ``[B, C, h, w]``, fp32, fp16 or bf16 (fp64 on the reference); any strides; C, h and w at least 1.
        labels: ``[B, H, W]`` uint8, int16, int32 or int64, each ``ignore_index`` or in ``[0, C)``. H and W may be
            larger or smaller than h and w (then without antialiasing), in any ratio.
        weight: ``[C]``, of any float dtype: a factor for each class, as in ``F.cross_entropy``; or None. It gets no
            gradient.
        ignore_index: pixels with this label count nothing, not in the mean either.
        align_corners: the centres of the corner pixels coincide, else the outer edges, as in ``F.interpolate``.
        label_smoothing: in [0, 1]: this share of the target is spread evenly over the classes.
        backend: ``"auto"`` or a name from ``mimkernels info``. A named backend never falls back.

    Returns:
        fp32 scalar, computed in fp32 whatever the dtype of ``logits`` (fp64 for fp64 logits); NaN, with zero gradient,
        if no pixel counts. The gradient reaches ``logits``.

    Raises:
        ValueError: shapes or devices disagree, or an option is out of range; the message shows both sides.
        TypeError: a dtype that the op does not take.
        IndexError: a label is out of range (checked on CPU; on CUDA only with ``MIMKERNELS_DEBUG=1``, to avoid a sync;
            otherwise such pixels are ignored).
        NotImplementedError: no backend takes these inputs; lists each backend's reasons.

    Source: the loss of linear segmentation heads and of FCN, arXiv:1411.4038.
    """
    run, tensors, options = _checked((logits, labels, weight), ignore_index, align_corners, label_smoothing, backend)
    loss: Tensor = run(*tensors, *options)[0]
    return loss


@by_signature
def _checked(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    label_smoothing: float,
    backend: str,
) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, Tensor, Tensor | None], tuple[int, bool, float]]:
    op = "upsample_cross_entropy"
    _checks.has_rank(op, "logits", logits, 4)
    _checks.is_float(op, "logits", logits)
    _checks.has_rank(op, "labels", labels, 3)
    if labels.dtype not in _LABELS:
        raise TypeError(f"{op}: labels must be uint8, int16, int32 or int64, got {labels.dtype}")
    _checks.same_device(op, "labels", labels, "logits", logits)
    _checks.same_size(op, "labels", labels, 0, "logits", logits, 0)
    if 0 in logits.shape[1:]:
        raise ValueError(f"{op}: logits must have at least one class, row and column, got {_checks.shape(logits)}")
    if weight is not None:
        _checks.has_rank(op, "weight", weight, 1)
        _checks.is_float(op, "weight", weight)
        _checks.same_device(op, "weight", weight, "logits", logits)
        _checks.same_size(op, "weight", weight, 0, "logits", logits, 1)
        weight = _checks.rows(weight.detach().to(torch.promote_types(logits.dtype, torch.float32)))
    ignore_index = _checks.integer(op, "ignore_index", ignore_index)
    smoothing = _checks.number(op, "label_smoothing", label_smoothing)
    if not 0 <= smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}")
    options = (ignore_index, _checks.boolean(op, "align_corners", align_corners), smoothing)
    name = SPEC.resolve(backend, logits.device, logits.dtype)
    run = SPEC.runner(name, reference.upsample_cross_entropy, _checks.needs_grad(logits))
    return run, (_checks.rows(logits), _checks.rows(labels.long()), weight), options
