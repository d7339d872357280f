"""timm's MLP on ``mimkernels.bias_gelu``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from timm.layers import Mlp as TimmMlp
    from timm.layers.activations import GELU, GELUTanh
except ImportError as error:
    raise ImportError(
        f"mimkernels.nn.mlp needs timm, which cannot be imported ({error}); pip install 'mimkernels[train]'"
    ) from error

from mimkernels.nn._classes import change_class, every_module_is_heard, is_heard, name_beside, prepare_scriptable
from mimkernels.nn.sdpa import is_for_pytorch
from mimkernels.ops import bias_gelu

__all__ = ["Mlp", "use_mimkernels_mlp"]

_APPROXIMATIONS = {GELU: "none", GELUTanh: "tanh"}


class Mlp(TimmMlp):
    """timm's ``Mlp`` with the first layer's bias and GELU in one pass: same parameters, same names, same results.

    The bias is added by ``mimkernels.bias_gelu``, whose backward pass sums the bias's gradient as well; dropout, norm
    and the second layer are timm's. What that cannot replace (see ``reason_against``) and tensors with rules of their
    own (subclasses; torch.fx) run timm's own code, as do ``torch.jit.trace`` and all calls while there are hooks on
    every module (``register_module_forward_hook`` and the like); looked at anew in every call.
    ``torch.jit.script`` gets timm's class.

    Made by ``use_mimkernels_mlp``, or built like timm's (``mlp_layer=Mlp`` of timm's models).
    """

    __prepare_scriptable__ = prepare_scriptable

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C]`` to ``[..., C']``, as timm's."""
        # The parts once: small models feel every step.
        fc1, act = self.fc1, self.act
        approximate = _approximation(act)
        out: Tensor
        if approximate is None or _reason_against(fc1, act) is not None or every_module_is_heard() or is_for_pytorch(x):
            out = super().forward(x)  # type: ignore[no-untyped-call] # timm's, without annotations
            return out
        hidden = F.linear(x, fc1.weight)  # [..., E]
        bias = fc1.bias
        if bias is not None and bias.dtype not in (hidden.dtype, torch.float32):
            bias = bias.to(hidden.dtype)
        hidden = self.drop1(bias_gelu(hidden, bias, approximate=approximate))
        out = self.drop2(self.fc2(self.norm(hidden)))
        return out


def use_mimkernels_mlp(module: nn.Module, *, required: bool = True) -> list[Mlp]:
    """Let every timm ``Mlp`` in `module`, or `module` itself, compute with ``mimkernels.bias_gelu``, in place.

    Parameters, buffers, hooks, modes and state-dict names stay; only the layers' class changes. Subclasses of timm's
    Mlp and other kinds (gated, convolutional, ...) are left as they are.

    Args:
        module: any model.
        required: refuse a model that has no such layer.

    Returns:
        the layers that now do, in the model's order, with those that did before.

    Raises:
        ValueError: there is no timm Mlp in the model.
    """
    layers = change_class(module, TimmMlp, Mlp)
    if required and not layers:
        raise ValueError(f"{name_beside(type(module), TimmMlp)} has no timm.layers.Mlp")
    return layers


def reason_against(module: TimmMlp) -> str | None:
    """Why a timm ``Mlp`` must run timm's own code, or None: only what a plain linear layer and GELU do is replaced."""
    return _reason_against(module.fc1, module.act)


def _reason_against(fc1: nn.Module, act: nn.Module) -> str | None:
    if is_heard(fc1) or is_heard(act):
        return f"a hook or a forward of its own on {'fc1' if is_heard(fc1) else 'act'}"
    if type(fc1) is not nn.Linear:
        return f"fc1 is {name_beside(type(fc1), nn.Linear)}, not torch.nn.Linear"
    if _approximation(act) is None:
        return f"its activation is {name_beside(type(act), nn.GELU)}, not GELU"
    return None


def _approximation(act: nn.Module) -> str | None:
    """As ``bias_gelu`` takes it; None for what is no GELU. Subclasses may compute anything."""
    if type(act) is nn.GELU:
        return act.approximate
    return _APPROXIMATIONS.get(type(act))
