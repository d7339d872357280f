"""timm's attention layers on ``mimkernels.attention``."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from timm.layers import Attention as TimmAttention
except ImportError as error:
    raise ImportError(
        f"mimkernels.nn.attention needs timm, which cannot be imported ({error}); pip install 'mimkernels[train]'"
    ) from error

from mimkernels.nn._classes import (
    change_class,
    every_module_is_heard,
    fused_attn,
    is_heard,
    name_beside,
    prepare_scriptable,
    state_without_recorder,
    why_original,
)
from mimkernels.nn.recorder import recorder_of
from mimkernels.nn.relative import RELATIVE
from mimkernels.nn.sdpa import AttentionCall, Recorder, as_bias, attend, compute_dtype, observers
from mimkernels.nn.sdpa.measured import why_torch, why_torch_packed
from mimkernels.ops import attention_qkvpacked

__all__ = ["Attention", "attention_layers", "use_mimkernels_attention"]


class Attention(TimmAttention):
    """timm's ``Attention`` computed by ``mimkernels.attention``: same parameters, same names, same results.

    q, k and v are views of the packed projection and the output is written as the next projection reads it, so that
    nothing is transposed in memory; where q and k have no norms, the projection's gradient is written packed, too.
    Made by ``use_mimkernels_attention``, or built like timm's (``attn_layer=Attention`` of timm's models).

    timm's own code runs with attention dropout (``attn_drop > 0`` in training), after ``fused_attn = False``, for
    tensors with rules of their own (subclasses; torch.fx, which sees timm's nodes), under ``torch.jit.trace``, and
    where somebody replaced ``F.scaled_dot_product_attention``. A layer that had ``fused_attn = False`` before, is fused
    as long as there are no hooks on ``attn_drop``, which see the attention matrix. ``torch.jit.script`` gets timm's
    class. Where PyTorch's attention was measured to be faster (``mimkernels.nn.sdpa.measured``), it computes what
    nobody records or captures.
    """

    __prepare_scriptable__ = prepare_scriptable
    __getstate__ = state_without_recorder
    fused_attn = fused_attn  # type: ignore[misc] # final for TorchScript, which gets timm's class
    _recorder: Recorder | None = None  # by which this layer's heads are recorded, inside `record_heads` only
    _refused: ClassVar[set[str]] = set()  # why calls went to PyTorch that might have run here, for `accelerate`

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """``[B, N, C]`` to ``[B, N, C']``; arguments as timm's. A query that may attend to nothing gets zeros."""
        recorder = recorder_of(self)
        reason = why_original(self, x, attn_mask)
        if reason is not None and recorder is not None:
            raise RuntimeError(f"heads cannot be recorded under {reason}")
        if reason is not None or not (self.fused_attn or recorder is not None):
            # Arguments only where given: older releases of timm have no is_causal.
            causal = {} if is_causal is False else {"is_causal": is_causal}
            return super().forward(x, attn_mask=attn_mask, **causal)
        batch, tokens, _ = x.shape
        gate = getattr(self, "gate", None)
        packed = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        # timm's fused branch knows no scale but this one, whatever `scale` is set to.
        scale = self.scale if self.__dict__["fused_attn"] is None else self.head_dim**-0.5
        if (
            recorder is None
            and attn_mask is None
            and not is_causal
            and _does_nothing(self._modules.get("q_norm"))  # three times as quick as the attribute
            and _does_nothing(self._modules.get("k_norm"))
            and packed.dtype == compute_dtype(packed)
            and not observers()
            and why_torch_packed(packed) is None
        ):  # nothing to do to q and k, nobody to tell: small models feel every step
            out = attention_qkvpacked(packed, scale=scale).out
        else:
            out = self._translated(packed, attn_mask, is_causal, scale, recorder)
        y = self.norm(out.transpose(1, 2).flatten(2))  # [B, N, H * D], a view
        if gate is not None:
            y = y * gate(x).sigmoid()
        y = self.proj(y)
        if recorder is not None:
            recorder.record_projected(y)
        projected: Tensor = self.proj_drop(y)
        return projected

    def _translated(
        self, packed: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float, recorder: Recorder | None
    ) -> Tensor:
        """Attention ``[B, H, N, D]`` of any projection."""
        parts = packed.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D] each, views
        q, k, v = self.q_norm(parts[0]), self.k_norm(parts[1]), parts[2]
        # Norms may leave q and k wider than v; as scaled_dot_product_attention, run in autocast's dtype.
        dtype = compute_dtype(v)
        as_projected = q is parts[0] and k is parts[1] and v.dtype == dtype
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        faster = why_torch(q, k, v, attn_mask) if recorder is None else None
        if faster is not None:
            if not torch.compiler.is_compiling():
                self._refused.add(faster)
            return F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal, scale=scale)
        bias, key_mask = as_bias(attn_mask, is_causal, q, packed.shape[1], q.shape[:2])
        call = AttentionCall(q, k, v, bias, key_mask, scale, q.shape[:2], packed if as_projected else None)
        return attend(call, recorder=recorder).out


# timm's classes and ours.
_KINDS: dict[type[nn.Module], type[nn.Module]] = {TimmAttention: Attention, **RELATIVE}


def use_mimkernels_attention(module: nn.Module, *, required: bool = True) -> list[nn.Module]:
    """Let timm's attention layers in `module`, or `module` itself, compute with ``mimkernels.attention``, in place.

    Taken are timm's ``Attention``, BEiT's, and the ``WindowAttention`` of Swin and of Swin V2. Parameters, buffers,
    hooks, modes and state-dict names stay; only the layers' class changes. Subclasses of these and other kinds (rotary,
    differential, ...) are left as they are.

    Args:
        module: any model.
        required: refuse a model that has no such layer.

    Returns:
        the layers that now do, in the model's order, with those that did before.

    Raises:
        ValueError: there is none in the model; lists what there is.
    """
    for plain, ours in _KINDS.items():
        change_class(module, plain, ours)
    layers = [part for part in module.modules() if isinstance(part, tuple(_KINDS.values()))]
    if required and not layers:
        raise ValueError(
            f"{name_beside(type(module), *_KINDS)} has no timm.layers.Attention, nor that of BEiT, Swin or Swin V2"
            f"{_other_kinds(module)}"
        )
    return layers


def attention_layers(*modules: nn.Module) -> list[nn.Module]:
    """The layers of ours in the modules, whose heads a ``LayerRecorder`` can record, each once, in their order.

    Raises:
        ValueError: there is none; lists what there is.
    """
    layers = [layer for module in modules for layer in module.modules() if hasattr(type(layer), "_recorder")]
    if not layers:
        if any(isinstance(layer, tuple(_KINDS)) for module in modules for layer in module.modules()):
            raise ValueError("the model's attention cannot record; call use_mimkernels_attention(model) first")
        raise ValueError(f"there is no attention layer that can record{_other_kinds(*modules)}")
    return list(dict.fromkeys(layers))


def _does_nothing(norm: nn.Module | None) -> bool:
    return type(norm) is nn.Identity and not is_heard(norm) and not every_module_is_heard()


def _other_kinds(*modules: nn.Module) -> str:
    names = {name_beside(type(part), *_KINDS) for module in modules for part in module.modules()}
    attention = sorted(name for name in names if "attention" in name.lower())
    return f"; its attention: {', '.join(attention)}" if attention else ""
