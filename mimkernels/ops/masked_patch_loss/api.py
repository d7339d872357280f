from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mimkernels.ops import _checks
from mimkernels.ops._memo import by_signature
from mimkernels.ops.masked_patch_loss import reference
from mimkernels.ops.masked_patch_loss.spec import KINDS, LOCAL_PATCH, SPEC


def masked_patch_loss(
    pred: Tensor,
    images: Tensor,
    *,
    ids: Tensor | None = None,
    mask: Tensor | None = None,
    patch_size: int | Sequence[int],
    norm_pix: bool = False,
    local_norm: int | None = None,
    kind: str = "mse",
    beta: float = 1.0,
    layout: str = "channels_last",
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Reconstruction loss on masked patches; the targets are read from the images and never stored.

    Args:
        pred: ``[B, L, E]`` predicted pixels, fp32, fp16 or bf16 (fp64 on the reference), E = C * pixels of a patch.
        images: ``[B, C, H, W]`` or ``[B, C, T, H, W]``, uint8 or floating point. They get no gradient.
        ids: ``[B, L]`` int64 or int32: ``pred`` holds these patches only (usually ``ids_masked``), all counted.
        mask: ``[B, N]`` bool, integer or float, nonzero = counted: ``pred`` holds all N patches. Exactly one of
            ``ids`` and ``mask``. Of 4-D images also ``[B, rows, columns]``, finer than the patches: each patch is
            divided into equally many cells, and of a patch the pixels of its nonzero cells count.
        patch_size: pixels per patch side, or ``(height, width)``, or ``(frames, height, width)`` for 5-D images.
        norm_pix: targets of each patch minus their mean, over ``sqrt(unbiased variance + 1e-6)``.
        local_norm: odd; targets are each pixel minus the mean, over ``sqrt(unbiased variance + 1e-6)``, of the box of
            that many pixels a side around it, in its channel and frame. Only pixels inside the image enter. Not
            together with norm_pix.
        kind: ``"mse"``, ``"l1"`` or ``"smooth_l1"``.
        beta: where smooth L1 turns from square to linear.
        layout: order of a patch's pixels in ``pred``: ``"channels_last"`` (T, H, W, C) as in MAE, or
            ``"channels_first"`` (C, T, H, W) as from a convolution (SimMIM).
        mean, std: C floats each, for pixels in [0, 1]: targets are ``(pixel - mean) / std``. uint8 pixels are
            divided by 255 first and need both.
        reduction: ``"mean"`` over what is counted, patches or, of a finer mask, pixels; or ``"none"``.
        backend: ``"auto"`` or a name from ``mimkernels info``. A named backend never falls back.

    Returns:
        fp32 scalar (NaN if nothing is counted); with ``reduction="none"`` fp32 ``[B, L]``, each patch's mean over
        its counted pixels, 0 where none is; fp64 for fp64 ``pred``. The gradient reaches ``pred``.

    Raises:
        ValueError: shapes, devices or normalisation disagree, or the patch does not divide the image.
        TypeError: a dtype that the op does not take.
        IndexError: an id is out of range (checked on CPU; on CUDA only with ``MIMKERNELS_DEBUG=1``, to avoid a sync).
        NotImplementedError: no backend takes these inputs; lists each backend's reasons.

    Source: ``forward_loss`` of MAE, arXiv:2111.06377; L1 as in SimMIM, arXiv:2111.09886; ``local_norm`` is
    ``norm_targets`` of Swin Transformer V2, arXiv:2111.09883, there with 47.
    """
    target = (patch_size, norm_pix, local_norm, kind, beta, layout, mean, std, reduction)
    run, tensors, options = _checked((pred, images, ids, mask), *target, backend)
    return run(*tensors, *options)


@by_signature
def _checked(
    pred: Tensor,
    images: Tensor,
    ids: Tensor | None,
    mask: Tensor | None,
    patch_size: int | Sequence[int],
    norm_pix: bool,
    local_norm: int | None,
    kind: str,
    beta: float,
    layout: str,
    mean: Sequence[float] | Tensor | None,
    std: Sequence[float] | Tensor | None,
    reduction: str,
    backend: str,
) -> tuple[Callable[..., Tensor], tuple[Tensor, Tensor, Tensor | None, Tensor | None], tuple[object, ...]]:
    op = "masked_patch_loss"
    _checks.has_rank(op, "pred", pred, 3)
    _checks.is_float(op, "pred", pred)
    _checks.is_images(op, images)
    _checks.same_device(op, "images", images, "pred", pred)
    patch = _checks.patch_sizes(op, patch_size, images)
    scale, shift = _checks.normalisation(op, images, mean, std)
    _checks.same_size(op, "pred", pred, 0, "images", images, 0)
    pixels = images.shape[1] * patch[0] * patch[1] * patch[2]
    if pred.shape[2] != pixels:
        raise ValueError(
            f"{op}: pred {_checks.shape(pred)} has {pred.shape[2]} pixels per patch but {images.shape[1]} channels "
            f"of patch size {patch_size} have {pixels}"
        )
    frames = images.shape[2] if images.dim() == 5 else 1
    tokens = (frames // patch[0]) * (images.shape[-2] // patch[1]) * (images.shape[-1] // patch[2])
    if (ids is None) == (mask is None):
        raise ValueError(f"{op}: give exactly one of ids and mask, got {'neither' if ids is None else 'both'}")
    if ids is not None:
        ids = _checks.token_ids(op, "ids", ids, (2,), "pred", pred)
        if ids.shape != pred.shape[:2]:
            raise ValueError(f"{op}: ids {_checks.shape(ids)} and pred {_checks.shape(pred)} must agree in [B, L]")
    elif mask is not None:
        if pred.shape[1] != tokens:
            raise ValueError(
                f"{op}: with mask, pred {_checks.shape(pred)} must hold all {tokens} patches of images "
                f"{_checks.shape(images)}, got {pred.shape[1]}; give ids for a part of them"
            )
        mask = (
            _cell_mask(op, mask, pred, images, patch) if _is_fine(mask) else _checks.token_mask(op, mask, "pred", pred)
        )
    if kind not in KINDS:
        raise ValueError(f"{op}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if layout not in ("channels_last", "channels_first"):
        raise ValueError(f"{op}: layout must be 'channels_last' or 'channels_first', got {layout!r}")
    if reduction not in ("mean", "none"):
        raise ValueError(f"{op}: reduction must be 'mean' or 'none', got {reduction!r}")
    norm_pix, beta = _checks.boolean(op, "norm_pix", norm_pix), _checks.positive(op, "beta", beta)
    box = _box(op, local_norm, norm_pix)
    options = (*patch, scale, shift, norm_pix, KINDS.index(kind), beta, layout == "channels_last", reduction == "mean",
               box)  # fmt: skip
    # A kernel takes no fp64 on either side.
    dtype = pred.dtype if images.dtype != torch.float64 else torch.float64
    sizes = {LOCAL_PATCH: pixels} if box else {}
    name = SPEC.resolve(backend, pred.device, dtype, **sizes)
    run = SPEC.runner(name, reference.masked_patch_loss, _checks.needs_grad(pred))
    return run, (_checks.rows(pred), _checks.rows(images.detach()), ids, mask), options


def _is_fine(mask: object) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 3


def _cell_mask(op: str, mask: Tensor, pred: Tensor, images: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """A checked mask ``[B, rows, columns]`` as bool."""
    _checks.is_tensor(op, "mask", mask)
    _checks.is_real(op, "mask", mask)
    _checks.same_device(op, "mask", mask, "pred", pred)
    _checks.same_size(op, "mask", mask, 0, "images", images, 0)
    if images.dim() != 4:
        raise ValueError(f"{op}: mask {_checks.shape(mask)} needs images of 4 dimensions, got {_checks.shape(images)}")
    for axis, name, side in ((1, "rows", patch[1]), (2, "columns", patch[2])):
        cells, length = mask.shape[axis], images.shape[axis + 1]
        patches = length // side
        fits = cells % patches == 0 and cells >= patches and side % (cells // patches) == 0 if patches else cells == 0
        if not fits:
            raise ValueError(
                f"{op}: mask {_checks.shape(mask)} has {cells} {name}; images {_checks.shape(images)} have {patches} "
                f"of patches, each of {side} pixels, which {name} of the mask must divide evenly"
            )
    return _checks.rows(mask if mask.dtype == torch.bool else mask != 0)


def _box(op: str, local_norm: int | None, norm_pix: bool) -> int:
    """The side of the box, 0 for none."""
    if local_norm is None:
        return 0
    side = int(_checks.integer(op, "local_norm", local_norm))
    if side < 3 or side % 2 == 0:
        raise ValueError(f"{op}: local_norm must be an odd number of pixels of at least 3, got {side}")
    if norm_pix:
        raise ValueError(f"{op}: norm_pix normalises targets by their patch and local_norm {side} by a box; give one")
    return side
