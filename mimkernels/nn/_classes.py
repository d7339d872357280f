"""A change of class: modules become modules of a subclass of what they were, in place, and back.

For layers whose forward is written anew, because more changes than one call: timm's ``Attention`` (the packed
projection is read and its gradient written as one; heads are recorded) and that of BEiT, Swin and Swin V2 (biases are
read from tables), ``Mlp`` and ``Block``, timm's patch dropout, and models that read few tokens.
Parameters, buffers, hooks and state-dict names stay, for the object stays; ``torch.compile``, copies and pickles see an
ordinary class. The two other ways change the call of ``F.scaled_dot_product_attention`` alone: rewriting
(``mimkernels.integrations._reroute``), for forwards that are not written here, whose classes are changed by this module
nevertheless, and a function mode (``mimkernels.heads.intercept``), which leaves the model as it is and ends with its
block.
"""

from __future__ import annotations

import copyreg
import warnings
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.nn.attention.bias import CausalBias
from torch.nn.modules import module as torch_modules
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks

from mimkernels.nn.sdpa import TORCH_SDPA, has_own_rules
from mimkernels.nn.sdpa.observe import wants_statistics

Ours = TypeVar("Ours", bound=nn.Module)

STANDS_IN = "_stands_in"  # in the __dict__ of every module that `capture` changed for its time
MARK = "_before_acceleration"  # in the __dict__ of every module that `accelerate` changed: its class
PARTS = "_accelerated_parts"  # of a model that was changed: what it computes otherwise
FOLLOWING: set[int] = set()  # ids of the hooks on every module by which captures follow models


def change_class(module: nn.Module, plain: type[nn.Module], ours: type[Ours]) -> list[Ours]:
    """Let `module` and its parts that are of class `plain`, not of its subclasses, be of class `ours`.

    Returns:
        all that are of class `ours` now, in the module's order.
    """
    layers = []
    for part in module.modules():
        if type(part) is plain:
            become(part, ours)
        if isinstance(part, ours):
            layers.append(part)
    return layers


def become(module: nn.Module, ours: type[nn.Module]) -> None:
    """Let `module` be of class `ours`, whose first base is the class that it has."""
    module.__class__ = ours
    if module.__dict__.get("fused_attn") is False:
        module.__dict__["fused_attn"] = None


def change_back(module: nn.Module) -> None:
    """Let `module` be of the class that it had before ``become``."""
    module.__class__ = module.__dict__.pop(MARK, None) or type(module).__bases__[0]
    module.__dict__.pop(PARTS, None)
    if module.__dict__.get("fused_attn", False) is None:
        module.__dict__["fused_attn"] = False


def prepare_scriptable(module: nn.Module) -> nn.Module:
    """What ``torch.jit.script`` compiles: the module with the class that it had, which it keeps.

    Used as ``__prepare_scriptable__`` of a class. TorchScript puts what this returns into the model that is scripted,
    so that a copy would take the module's place there.

    Raises:
        NotImplementedError: the class is derived from one of ours.
    """
    kind = type(module)
    if "__prepare_scriptable__" not in kind.__dict__:
        raise NotImplementedError(
            f"torch.jit.script cannot compile {kind.__name__}, which is built on {kind.__bases__[0].__name__} of "
            "mimkernels: TorchScript does not know its kernels; torch.jit.trace does"
        )
    warnings.warn(
        "torch.jit.script compiles the original classes of accelerated layers, and gives the layers of this model "
        "their classes back; call mimkernels.accelerate(model) again to go on with it, or script a copy",
        stacklevel=2,
    )
    change_back(module)
    return module


def _get_fused_attn(module: nn.Module) -> bool:
    try:
        value: bool | None = module.__dict__["fused_attn"]
    except KeyError:
        raise AttributeError("fused_attn") from None
    if value is None:
        return not matrix_is_seen(module) and not is_fx_symbolic_tracing()
    return value


def _set_fused_attn(module: nn.Module, value: Any) -> None:
    module.__dict__["fused_attn"] = value


# timm's attribute of this name: False computes the attention matrix step by step. A layer that had False before it ran
# on the kernels stores None until the attribute is set again, and reads True, unless somebody looks at the matrix or
# torch.fx traces the layer.
fused_attn = property(_get_fused_attn, _set_fused_attn)


def matrix_is_seen(module: nn.Module) -> bool:
    """Whether the attention matrix of a timm layer that makes one is wanted now.

    Hooks on every module see it, too, but where statistics of it are wanted: those are ours alone.
    """
    return shows_its_matrix(module) is not None or (every_module_is_heard() and not wants_statistics())


def shows_its_matrix(module: nn.Module) -> str | None:
    """Why the attention matrix of a timm layer is wanted, whose ``fused_attn`` is False; None if it is not."""
    for name, kinds in (("attn_drop", (nn.Dropout, nn.Identity)), ("softmax", (nn.Softmax,))):
        part = getattr(module, name, None)
        if isinstance(part, nn.Module):
            if is_heard(part):
                return f"a hook on its {name} reads the attention matrix"
            if type(part) not in kinds:
                return f"its {name}, a {name_beside(type(part), *kinds)}, reads the attention matrix"
    return None


def why_original(module: Any, x: Tensor, attn_mask: Tensor | None) -> str | None:
    """Why a call of a timm attention layer must run timm's own code, whatever ``fused_attn`` says; None if not."""
    dropout = getattr(module.attn_drop, "p", 0.0)  # nn.Identity may stand in its place
    if module.training and dropout > 0:
        return f"attention dropout (attn_drop = {dropout}): set it to 0, or the model to eval()"
    if torch.jit.is_tracing():
        return "torch.jit.trace, which records PyTorch's own operations"
    for tensor in (x, attn_mask):
        if has_own_rules(tensor) and type(tensor) is not CausalBias:
            return f"the rules of its own that a {type(tensor).__name__} computes by"
    return "another function in the place of F.scaled_dot_product_attention" if sdpa_is_replaced() else None


def state_without_recorder(module: nn.Module) -> dict[str, Any]:
    """As ``__getstate__`` of a layer that can record: a copy made inside ``record_heads`` does not record."""
    return {name: value for name, value in module.__dict__.items() if name not in ("_recorder", STANDS_IN)}


def reduce_what_stands_in(module: nn.Module, protocol: Any) -> Any:
    """As ``__reduce_ex__``: a copy or pickle made inside ``capture`` has the class that the module has outside."""
    if STANDS_IN not in module.__dict__:
        return object.__reduce_ex__(module, protocol)
    state = module.__getstate__()
    if state.get("fused_attn", False) is None:
        state["fused_attn"] = False
    # A function of the standard library, so that such pickles need no mimkernels.
    return copyreg._reconstructor, (type(module).__bases__[0], object, None), state  # type: ignore[attr-defined]


def is_heard(module: nn.Module) -> bool:
    """Whether somebody sees or changes what a module computes: by hooks, or by a ``forward`` of this object's own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def every_module_is_heard() -> bool:
    """Whether somebody has hooks on every module of the process; those by which captures follow models do not count."""
    return bool(has_global_hooks()) and not (
        FOLLOWING.issuperset(torch_modules._global_forward_hooks)
        and FOLLOWING.issuperset(torch_modules._global_forward_pre_hooks)
        and FOLLOWING.issuperset(torch_modules._global_backward_hooks)
        and FOLLOWING.issuperset(torch_modules._global_backward_pre_hooks)
    )


def name_beside(kind: type, *wanted: type) -> str:
    """The name of a class in a message that names the classes `wanted`: with its module where it is called as one."""
    if kind.__name__ in (other.__name__ for other in wanted):
        return f"{kind.__module__}.{kind.__name__}"
    return kind.__name__


def sdpa_is_replaced() -> bool:
    """Whether somebody has put a function of their own in the place of ``F.scaled_dot_product_attention``."""
    return F.scaled_dot_product_attention is not TORCH_SDPA
