from __future__ import annotations

import torch
from torch import Tensor

from mimkernels.ops._autograd import Context, Gradient, Run
from mimkernels.ops._registry import ANY_FLOAT, Impl, OpSpec, register

_OPTIONS = "Tensor? weight, int ignore_index, bool align_corners, float label_smoothing"


def _fwd(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    align_corners: bool,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    def new(*size: int) -> Tensor:
        return logits.new_empty(size, dtype=torch.float32)

    return new(), new(2, *labels.shape), new(2)


def _bwd(grad: Tensor, logits: Tensor, *others: object) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Context, inputs: tuple[object, ...], outputs: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, weight, *options = inputs
    _, statistics, totals = outputs
    ctx.mark_non_differentiable(statistics, totals)
    ctx.save_for_backward(logits, labels, weight, statistics, totals)
    ctx.options = options


def _gradients(ctx: Context, bwd: Run, grad: Tensor, *_: Tensor | None) -> dict[str, Tensor | None]:
    logits, labels, weight, statistics, totals = ctx.saved_tensors
    return {"logits": bwd(grad, logits, labels, statistics, totals, weight, *ctx.options)}


SPEC = register(
    OpSpec(
        name="upsample_cross_entropy",
        schemas={
            # The loss; the largest logit of every label pixel and the sum of exp(logit - largest), [2, B, H, W]; the
            # weights of the counted pixels' labels, summed, and those of the classes.
            "upsample_cross_entropy_fwd": f"(Tensor logits, Tensor labels, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
            "upsample_cross_entropy_bwd": "(Tensor grad, Tensor logits, Tensor labels, Tensor statistics, "
            f"Tensor totals, {_OPTIONS}) -> Tensor",
        },
        fakes={"upsample_cross_entropy_fwd": _fwd, "upsample_cross_entropy_bwd": _bwd},
        gradient=Gradient(_save, _gradients),
        impls=(Impl("triton"), Impl("cuda"), Impl("cpu"), Impl("reference", ANY_FLOAT)),
    )
)
