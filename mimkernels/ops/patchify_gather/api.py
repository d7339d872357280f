from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mimkernels.ops import _checks
from mimkernels.ops._memo import by_signature
from mimkernels.ops._registry import ANY_FLOAT, FLOATS
from mimkernels.ops.patchify_gather import reference
from mimkernels.ops.patchify_gather.spec import SPEC


def patchify_gather(
    images: Tensor,
    ids: Tensor | None,
    patch_size: int | Sequence[int],
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Only the kept patches, as rows of pixels in convolution order: one GEMM away from patch embeddings.

    ``rows @ conv.weight.flatten(1).T + conv.bias`` equals the patch-embedding convolution at those patches.

    Args:
        images: ``[B, C, H, W]`` or ``[B, C, T, H, W]``, uint8, fp32, fp16 or bf16 (fp64 on the reference).
        ids: ``[B, K]`` or ``[M, B, K]`` int64 or int32 in ``[0, N)``, patches counted row by row (frame by frame
            first); None takes all N.
        patch_size: pixels per patch side, or ``(height, width)``, or ``(frames, height, width)`` for 5-D images.
        mean, std: C floats each, for pixels in [0, 1]: rows are ``(pixel - mean) / std``. uint8 pixels are divided
            by 255 first and need both.
        dtype: of the result; default that of ``images``, fp32 for uint8.
        backend: ``"auto"`` or a name from ``mimkernels info``. A named backend never falls back.

    Returns:
        ``[B, K, C * pixels]`` (``[M * B, K, C * pixels]`` for M masks), pixel order (C, T, H, W) within a patch.
        Gradients reach floating-point ``images``.

    Raises:
        ValueError: shapes, devices or normalisation disagree, or the patch does not divide the image.
        TypeError: a dtype that the op does not take.
        IndexError: an id is out of range (checked on CPU; on CUDA only with ``MIMKERNELS_DEBUG=1``, to avoid a sync).
        NotImplementedError: no backend takes these inputs; lists each backend's reasons.

    Source: the patch embedding of ViT, arXiv:2010.11929, on visible patches only.
    """
    run, tensors, options = _checked((images, ids), patch_size, mean, std, dtype, backend)
    return run(*tensors, *options)


@by_signature
def _checked(
    images: Tensor,
    ids: Tensor | None,
    patch_size: int | Sequence[int],
    mean: Sequence[float] | Tensor | None,
    std: Sequence[float] | Tensor | None,
    dtype: torch.dtype | None,
    backend: str,
) -> tuple[
    Callable[..., Tensor], tuple[Tensor, Tensor | None], tuple[int, int, int, Tensor | None, Tensor | None, torch.dtype]
]:
    op = "patchify_gather"
    _checks.is_images(op, images)
    patch = _checks.patch_sizes(op, patch_size, images)
    scale, shift = _checks.normalisation(op, images, mean, std)
    if dtype is None:
        dtype = torch.float32 if images.dtype == torch.uint8 else images.dtype
    if dtype not in ANY_FLOAT:
        raise TypeError(f"{op}: dtype must be floating point, got {dtype}")
    if ids is not None:
        ids = _checks.token_ids(op, "ids", ids, (2, 3), "images", images)
        _checks.one_per_image(op, "ids", ids, "images", images)
    # A kernel must take both dtypes; only the reference takes fp64.
    name = SPEC.resolve(backend, images.device, images.dtype if dtype in FLOATS else dtype)
    run = SPEC.runner(name, reference.patchify_gather, _checks.needs_grad(images))
    return run, (_checks.rows(images), ids), (*patch, scale, shift, dtype)
