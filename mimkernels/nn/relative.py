"""timm's attention with relative position biases on ``mimkernels.attention``: BEiT, Swin and Swin V2."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from timm.models.beit import Attention as TimmBeitAttention
    from timm.models.swin_transformer import WindowAttention as TimmSwinAttention
    from timm.models.swin_transformer_v2 import WindowAttention as TimmSwinV2Attention
except ImportError as error:
    raise ImportError(
        f"mimkernels.nn.relative needs timm, which cannot be imported ({error}); pip install 'mimkernels[train]'"
    ) from error

from mimkernels.nn._classes import (
    STANDS_IN,
    fused_attn,
    matrix_is_seen,
    prepare_scriptable,
    reduce_what_stands_in,
    state_without_recorder,
    why_original,
)
from mimkernels.nn.recorder import recorder_of
from mimkernels.nn.sdpa import (
    AttentionCall,
    Recorder,
    as_bias,
    attend,
    compute_dtype,
    is_for_pytorch,
    is_recomputing,
    keeps_tensors_elsewhere,
    observers,
)
from mimkernels.nn.sdpa.observe import wants_statistics
from mimkernels.nn.sdpa.stand_in import kernels_refuse
from mimkernels.ops._registry import backend_in_force

__all__ = ["RELATIVE", "BeitAttention", "BiasTable", "SwinAttention", "SwinV2Attention"]


class BiasTable(NamedTuple):
    """A relative position bias that is not made as ``[H, N, N]``: the table that it is taken from, and where in it.

    Attributes:
        table: ``[T, H]``.
        rows: ``[N, N]`` int64, the row of the table for every pair of tokens.
    """

    table: Tensor
    rows: Tensor

    def expanded(self) -> Tensor:
        """The bias ``[H, N, N]``."""
        return self.table[self.rows].permute(2, 0, 1)


class BeitAttention(TimmBeitAttention):
    """timm's BEiT ``Attention`` computed by ``mimkernels.attention``: same parameters, same names, same results.

    The relative position bias is read from its table by the kernel, which sums the table's gradient, too; the bias
    ``[H, N, N]`` is not made. Made by ``use_mimkernels_attention``; timm's own code runs where it does in
    ``Attention``, and where no kernel takes the layer.
    """

    __prepare_scriptable__ = prepare_scriptable
    __getstate__ = state_without_recorder
    __reduce_ex__ = reduce_what_stands_in
    fused_attn = fused_attn  # type: ignore[misc] # final for TorchScript, which gets timm's class
    _recorder: Recorder | None = None
    _refused: ClassVar[set[str]] = set()

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | BiasTable | None = None) -> Tensor:
        """``[B, N, C]`` to ``[B, N, C]``, as timm's; the shared bias is ``[H, N, N]``, ``[1, H, N, N]`` or a table."""
        shared = shared_rel_pos_bias
        tensor = None if isinstance(shared, BiasTable) else shared

        def by_timm() -> Tensor:
            bias = shared.expanded() if isinstance(shared, BiasTable) else shared
            return TimmBeitAttention.forward(self, x, shared_rel_pos_bias=bias)

        return _forward(self, x, tensor, by_timm, partial(self._call, x, shared))

    def _call(self, x: Tensor, shared: Tensor | BiasTable | None) -> AttentionCall:
        table, bias = (shared, None) if isinstance(shared, BiasTable) else (None, shared)
        if self.relative_position_bias_table is not None:
            bias = bias if table is None else table.expanded()
            table = _own_table(self)
        packed = _project(self, x)
        bias, _ = as_bias(bias, False, packed[:, :, 0].transpose(1, 2), x.shape[1], (x.shape[0], self.num_heads))
        return _as_call(packed, _scale(self, packed), table, bias)

    def _get_name(self) -> str:
        return TimmBeitAttention.__name__


class SwinAttention(TimmSwinAttention):
    """timm's ``WindowAttention`` of Swin computed by ``mimkernels.attention``: same parameters, names and results.

    The kernel reads the relative position bias from its table, whose gradient it sums, and the mask of shifted windows
    once for all images. Made by ``use_mimkernels_attention``; timm's own code runs where it does in ``Attention``, and
    where no kernel takes the layer.
    """

    __prepare_scriptable__ = prepare_scriptable
    __getstate__ = state_without_recorder
    __reduce_ex__ = reduce_what_stands_in
    fused_attn = fused_attn  # type: ignore[misc]
    _recorder: Recorder | None = None
    _refused: ClassVar[set[str]] = set()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``[B * nW, N, C]`` to ``[B * nW, N, C]``; mask ``[nW, N, N]``, added to the scores, as timm's."""
        by_timm = partial(TimmSwinAttention.forward, self, x, mask=mask)
        return _forward(self, x, mask, by_timm, partial(self._call, x, mask))

    def _call(self, x: Tensor, mask: Tensor | None) -> AttentionCall:
        packed = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1)
        return _as_call(packed, _scale(self, packed), _own_table(self), _of_windows(mask, x))

    def _get_name(self) -> str:
        return TimmSwinAttention.__name__


class SwinV2Attention(TimmSwinV2Attention):
    """timm's ``WindowAttention`` of Swin V2 computed by ``mimkernels.attention``: same parameters, names and results.

    The kernel makes cosines of the products of q and k as they are; the continuous relative position bias is a table,
    as Swin's. Made by ``use_mimkernels_attention``; timm's own code, which makes the attention matrix, runs where it
    does in ``SwinAttention``, and while there are hooks on ``attn_drop`` or ``softmax``, which see that.
    """

    __prepare_scriptable__ = prepare_scriptable
    __getstate__ = state_without_recorder
    __reduce_ex__ = reduce_what_stands_in
    _recorder: Recorder | None = None
    _refused: ClassVar[set[str]] = set()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``[B * nW, N, C]`` to ``[B * nW, N, C]``; mask ``[nW, N, N]``, added to the scores, as timm's."""
        by_timm = partial(TimmSwinV2Attention.forward, self, x, mask=mask)
        return _forward(self, x, mask, by_timm, partial(self._call, x, mask))

    def _call(self, x: Tensor, mask: Tensor | None) -> AttentionCall:
        packed = _project(self, x)
        biases = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        rows: Any = self.relative_position_index  # a buffer
        table = BiasTable(16 * torch.sigmoid(biases), rows)
        return _as_call(packed, None, table, _of_windows(mask, x), self.logit_scale.flatten())

    def _get_name(self) -> str:
        return TimmSwinV2Attention.__name__


# timm's classes and ours.
RELATIVE: dict[type[nn.Module], type[BeitAttention | SwinAttention | SwinV2Attention]] = {
    TimmBeitAttention: BeitAttention,
    TimmSwinAttention: SwinAttention,
    TimmSwinV2Attention: SwinV2Attention,
}


def _is_for_timm(module: Any, recorder: object, x: Tensor, mask: Tensor | None) -> bool:
    """Whether timm's own code must run, whatever kernels there are."""
    reason = why_original(module, x, mask)
    if reason is not None and recorder is not None:
        raise RuntimeError(f"heads cannot be recorded under {reason}")
    if reason is not None or recorder is not None:
        return reason is not None
    if isinstance(module, SwinV2Attention):  # has no fused branch
        return matrix_is_seen(module)
    return not module.fused_attn


def _own_table(module: Any) -> BiasTable:
    return BiasTable(module.relative_position_bias_table, module.relative_position_index)


def _project(module: Any, x: Tensor) -> Tensor:
    """``[B, N, 3, H, D]``, by timm's linear layer without bias of k."""
    if module.q_bias is None:
        packed = module.qkv(x)
    else:
        bias = torch.cat((module.q_bias, module.k_bias, module.v_bias))
        packed = module.qkv(x) + bias if module.qkv_bias_separate else F.linear(x, module.qkv.weight, bias)
    projected: Tensor = packed.reshape(*x.shape[:2], 3, module.num_heads, -1)
    return projected


def _scale(module: nn.Module, packed: Tensor) -> float:
    # timm's fused branch knows no scale but this one, whatever `scale` is set to.
    own: Any = module.scale
    return float(own) if module.__dict__["fused_attn"] is None else packed.shape[-1] ** -0.5


def _of_windows(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """timm's mask of windows as the bias that all heads share."""
    if mask is not None and (mask.dim() != 3 or mask.shape[0] == 0 or x.shape[0] % mask.shape[0]):
        raise ValueError(f"mask {list(mask.shape)} must be [nW, N, N], nW a divisor of the {x.shape[0]} windows of x")
    return None if mask is None else mask.unsqueeze(1)


def _as_call(
    packed: Tensor,
    scale: float | None,
    table: BiasTable | None,
    bias: Tensor | None,
    logit_scale: Tensor | None = None,
) -> AttentionCall:
    """The attention of a projection ``[B, N, 3, H, D]``."""
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D] each, views
    dtype = compute_dtype(v)
    whole = packed if v.dtype == dtype else None
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    biases, rows = (None, None) if table is None else table
    return AttentionCall(q, k, v, bias, None, scale, q.shape[:2], whole, biases, rows, logit_scale)


def _forward(
    module: Any,
    x: Tensor,
    attn_mask: Tensor | None,
    by_timm: Callable[[], Tensor],
    call: Callable[[], AttentionCall],
) -> Tensor:
    """What a layer makes of its input: ``[B, N, C]``.

    Args:
        attn_mask: what is added to the scores of all images or windows, as it was given.
        by_timm: timm's own code.
        call: the same attention by ours.
    """
    recorder = recorder_of(module)
    if recorder is None and STANDS_IN in module.__dict__ and keeps_tensors_elsewhere():
        return by_timm() if is_for_pytorch(x, attn_mask) else _watched(module, by_timm, call)
    if _is_for_timm(module, recorder, x, attn_mask) or _no_kernel(module, x, recorder):
        return by_timm()
    out = attend(call(), recorder=recorder).out
    y = module.proj(out.transpose(1, 2).flatten(2))  # of [B, N, H * D], a view
    if recorder is not None:
        recorder.record_projected(y)
    projected: Tensor = module.proj_drop(y)
    return projected


def _watched(module: Any, by_timm: Callable[[], Tensor], call: Callable[[], AttentionCall]) -> Tensor:
    """timm's own output, which gradient checkpointing computes again when ours no longer stands in."""
    fused = module.__dict__.get("fused_attn", False)
    if fused:  # by a call of SDPA, which captures see
        return by_timm()
    if not is_recomputing():
        with torch.no_grad():
            seen = call()
        for observer in observers():
            observer.watch(seen, "computed as it is: saved tensors are hooked, as in gradient checkpointing")
    if fused is None:  # as it was
        module.__dict__["fused_attn"] = False
    try:
        return by_timm()
    finally:
        if fused is None:
            module.__dict__["fused_attn"] = None


def head_dim(module: Any) -> int | None:
    """Of a layer of these kinds, as far as its projection tells."""
    features = getattr(module.qkv, "out_features", None)
    return features // (3 * module.num_heads) if isinstance(features, int) else None


def _no_kernel(module: Any, x: Tensor, recorder: object) -> bool:
    """Whether timm's own code must compute this call, because no kernel does; for the report, why.

    Plain PyTorch would compute it for us, but no better than timm's code: that is for those who want statistics or have
    named a backend.
    """
    if recorder is not None or backend_in_force() != "auto" or wants_statistics():
        return False
    missing = kernels_refuse(x.device.type, compute_dtype(x), head_dim(module))
    if missing is None:
        return False
    if not torch.compiler.is_compiling():
        type(module)._refused.add(missing)
    return True
