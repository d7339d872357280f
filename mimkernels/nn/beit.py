"""timm's BEiT attention on ``mimkernels.attention``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from timm.models.beit import Attention as TimmBeitAttention
except ImportError as error:
    raise ImportError(
        f"mimkernels.nn.beit needs timm, which cannot be imported ({error}); pip install 'mimkernels[train]'"
    ) from error

from mimkernels.nn._classes import change_class, fused_attn, prepare_scriptable
from mimkernels.nn.attention import Attention
from mimkernels.nn.recorder import recorder_of
from mimkernels.nn.sdpa import AttentionCall, Recorder, as_bias, attend, compute_dtype

__all__ = ["BeitAttention", "use_mimkernels_beit_attention"]


class BeitAttention(TimmBeitAttention):
    """timm's BEiT ``Attention`` computed by ``mimkernels.attention``: same parameters, same names, same results.

    The relative position bias, the layer's own and the model's shared one, is one bias ``[1, H, N, N]`` for all images;
    its gradient is summed over the images by the kernel. Made by ``use_mimkernels_beit_attention``; timm's own code
    runs where it does in ``Attention``.
    """

    __prepare_scriptable__ = prepare_scriptable
    __getstate__ = Attention.__getstate__
    _reason_against: Any = Attention._reason_against  # reads what both kinds have
    fused_attn = fused_attn  # type: ignore[misc] # final for TorchScript, which gets timm's class
    _recorder: Recorder | None = None

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """``[B, N, C]`` to ``[B, N, C]``, as timm's; the shared bias is ``[H, N, N]`` or ``[1, H, N, N]``."""
        recorder = recorder_of(self)
        reason = self._reason_against(x, shared_rel_pos_bias)
        if reason is not None and recorder is not None:
            raise RuntimeError(f"heads cannot be recorded under {reason}")
        if reason is not None or not (self.fused_attn or recorder is not None):
            return super().forward(x, shared_rel_pos_bias=shared_rel_pos_bias)
        batch, tokens, _ = x.shape
        packed = self._project(x).reshape(batch, tokens, 3, self.num_heads, -1)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D] each, views
        dtype = compute_dtype(v)
        as_projected = v.dtype == dtype
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        bias, _ = as_bias(self._bias(shared_rel_pos_bias), False, q, tokens, q.shape[:2])
        # timm's fused branch knows no scale but this one, whatever `scale` is set to.
        scale = self.scale if self.__dict__["fused_attn"] is None else q.shape[-1] ** -0.5
        call = AttentionCall(q, k, v, bias, None, scale, q.shape[:2], packed if as_projected else None)
        out = attend(call, recorder=recorder).out
        y = self.proj(out.transpose(1, 2).flatten(2))  # of [B, N, H * D], a view
        if recorder is not None:
            recorder.record_projected(y)
        projected: Tensor = self.proj_drop(y)
        return projected

    def _project(self, x: Tensor) -> Tensor:
        if self.q_bias is None:
            unbiased: Tensor = self.qkv(x)
            return unbiased
        k_bias: Any = self.k_bias  # a buffer, which timm declares as None
        bias = torch.cat((self.q_bias, k_bias, self.v_bias))
        if self.qkv_bias_separate:
            biased: Tensor = self.qkv(x) + bias
            return biased
        return F.linear(x, self.qkv.weight, bias)

    def _bias(self, shared: Tensor | None) -> Tensor | None:
        if self.relative_position_bias_table is None:
            return shared
        own: Tensor = self._get_rel_pos_bias()
        return own if shared is None else own + shared


def use_mimkernels_beit_attention(module: nn.Module) -> list[BeitAttention]:
    """Let every attention layer of timm's BEiT in `module` compute with ``mimkernels.attention``, in place.

    Returns:
        the layers that now do, in the model's order, with those that did before.
    """
    return change_class(module, TimmBeitAttention, BeitAttention)
