"""timm's transformer block on ``mimkernels.add_layer_norm``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_exporting
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks

try:
    from timm.layers import Attention as TimmAttention
    from timm.layers import DropPath, LayerScale
    from timm.layers import LayerNorm as TimmLayerNorm
    from timm.layers import Mlp as TimmMlp
    from timm.models.vision_transformer import Block as TimmBlock
except ImportError as error:
    raise ImportError(
        f"mimkernels.nn.block needs timm, which cannot be imported ({error}); pip install 'mimkernels[train]'"
    ) from error

from mimkernels.nn._classes import change_class, every_module_is_heard, is_heard, name_beside, prepare_scriptable
from mimkernels.nn.attention import Attention
from mimkernels.nn.mlp import Mlp
from mimkernels.nn.sdpa import compute_dtype, has_own_rules, is_for_pytorch
from mimkernels.nn.sdpa.translate import autocasts
from mimkernels.ops import add_layer_norm
from mimkernels.ops._autograd import transformed
from mimkernels.ops._registry import FLOATS, backend_in_force, forced
from mimkernels.ops.add_layer_norm.spec import SPEC

__all__ = [
    "SMALL",
    "Block",
    "add_normalised",
    "is_for_timm",
    "normalised",
    "reason_against",
    "reason_against_parts",
    "run_blocks_in_a_row",
    "use_mimkernels_block",
]

# Numbers below which a CPU computes PyTorch's sum and norm faster than one pass of ours: what the pass saves is traffic
# to memory, and small tensors stay in the cache, while the way to a kernel costs some 30 us more than to PyTorch's own.
# A cast that the pass saves besides is traffic, too: the half counts for a norm with its cast, an eighth for all three.
SMALL = 2**20


class Block(TimmBlock):
    """timm's ``Block``: its attention branch joins the stream and is normalised in one pass; same parameters and names.

    LayerScale, stochastic depth (the same images are dropped, for the same random state), the sum and the second norm
    are ``mimkernels.add_layer_norm``, whose backward is one pass, too. Under autocast, both norms give what the linear
    layer after them would cast to. Attention and MLP are whatever they were.

    What that cannot replace (see ``reason_against``), tensors with rules of their own (subclasses; torch.fx), calls for
    which there is no kernel and, unless a backend is named, streams of few numbers on CPUs (``SMALL``) run timm's own
    code, as do ``torch.jit.trace`` and all calls while there are hooks on every module
    (``register_module_forward_hook`` and the like); looked at anew in every call.
    ``torch.jit.script`` gets timm's class.

    Made by ``use_mimkernels_block``, or built like timm's (``block_fn=Block`` of timm's models).
    """

    __prepare_scriptable__ = prepare_scriptable

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """``[B, N, C]`` to ``[B, N, C]``; arguments as timm's."""
        # Arguments only where given: older releases of timm have no is_causal.
        causal: dict[str, Any] = {} if is_causal is False else {"is_causal": is_causal}
        out: Tensor
        if is_for_timm(self, x):
            out = super().forward(x, attn_mask=attn_mask, **causal)
            return out
        return self.joined(*self.branches(normalised(self.norm1, x, self.attn), x, attn_mask=attn_mask, **causal))

    def branches(self, inner: Tensor, x: Tensor, **masks: Any) -> tuple[Tensor, Tensor]:
        """The stream with the attention branch in it, and the MLP's, for ``joined``, of a stream and its first norm."""
        x, inner = add_normalised(x, self.attn(inner, **masks), self.ls1, self.drop_path1, self.norm2, self.mlp)
        return x, self.mlp(inner)

    def joined(self, x: Tensor, branch: Tensor) -> Tensor:
        """The stream with the MLP branch in it."""
        out: Tensor = x + self.drop_path2(self.ls2(branch))
        return out


def run_blocks_in_a_row(calls: Iterable[tuple[nn.Module, dict[str, Any]]], x: Tensor) -> Tensor:
    """Blocks, each with its keyword arguments, one after the other: between two, sum and next norm are one pass.

    Wherever somebody sees a block whole, or its parts are not plain, and where timm's own code is faster, it runs as it
    is called.
    """
    before: Any = None  # the block whose MLP branch has yet to join the stream
    branch: Any = None
    for called, options in calls:
        block: Any = called
        if _runs_in_parts(block, x):
            if before is None:
                inner = normalised(block.norm1, x, block.attn)
            else:
                x, inner = add_normalised(x, branch, before.ls2, before.drop_path2, block.norm1, block.attn)
            x, branch = block.branches(inner, x, **options)
            before = block
        else:
            x = block(x if before is None else before.joined(x, branch), **options)
            before = None
    return x if before is None else before.joined(x, branch)


def _runs_in_parts(block: Any, x: Tensor) -> bool:
    return (
        "branches" in type(block).__dict__  # else a subclass, whose forward may be another
        and not is_heard(block)
        and not has_global_hooks()
        and block._compiled_call_impl is None
        and not is_for_timm(block, x)
        and reason_against_parts(norm1=block.norm1, ls2=block.ls2, drop_path2=block.drop_path2) is None
    )


def use_mimkernels_block(module: nn.Module, *, required: bool = True) -> list[Block]:
    """Let every timm ``Block`` in `module`, or `module` itself, use ``mimkernels.add_layer_norm``, in place.

    Parameters, buffers, hooks, modes and state-dict names stay; only the blocks' class changes. Subclasses of timm's
    Block and other kinds (parallel, post-norm, windowed, ...) are left as they are.

    Args:
        module: any model.
        required: refuse a model that has no such block.

    Returns:
        the blocks that now do, in the model's order, with those that did before.

    Raises:
        ValueError: there is no timm Block in the model.
    """
    blocks = change_class(module, TimmBlock, Block)
    if required and not blocks:
        raise ValueError(f"{name_beside(type(module), TimmBlock)} has no timm.models.vision_transformer.Block")
    return blocks


def reason_against(block: TimmBlock) -> str | None:
    """Why a timm ``Block`` must run timm's own code, or None: only what its plain parts do is replaced."""
    return reason_against_parts(norm2=block.norm2, ls1=block.ls1, drop_path1=block.drop_path1)


def is_for_timm(block: TimmBlock, x: Tensor) -> bool:
    """Whether a block must, or had better, run timm's own code on this stream."""
    # In the order of cost: small models feel every step.
    return (
        is_for_pytorch(x)
        or _is_small(x, cast=_autocasts(x))
        or every_module_is_heard()
        or reason_against(block) is not None
    )


def normalised(norm: Any, x: Tensor, reader: nn.Module) -> Tensor:
    """``norm(x)``, under autocast in the dtype in which `reader`, which takes it, multiplies."""
    if not _autocasts(x) or _read_in(reader, x) in (None, torch.float32) or reason_against_parts(norm=norm) is not None:
        out: Tensor = norm(x)
        return out
    return add_normalised(x, None, None, None, norm, reader)[1]


def add_normalised(
    x: Tensor,
    branch: Tensor | None,
    scale: Any,
    drop: Any,
    norm: Any,
    reader: nn.Module,
) -> tuple[Tensor, Tensor]:
    """``x + drop(scale(branch))`` and `norm` of that, in one pass if a kernel takes these tensors.

    Args:
        x: ``[..., C]`` stream.
        branch: what is added to it; None for nothing.
        scale, drop, norm: modules for which ``reason_against`` has no reason; the first two are for `branch`.
        reader: the module that takes the normalised rows: under autocast they get the dtype in which it multiplies, if
            nobody else sees them.
    """
    gamma = scale.gamma if isinstance(scale, LayerScale) else None
    # A norm is fp32 under autocast.
    out_dtype = (_read_in(reader, x) or torch.float32) if _autocasts(x) else None
    cast = out_dtype not in (None, torch.float32)
    if _is_small(x, cast=cast, alone=branch is None) or not _fits(x, branch, gamma, norm):
        if branch is not None:
            x = x + drop(scale(branch))
        return x, norm(x)
    return add_layer_norm(
        x,
        branch,
        norm.weight,
        norm.bias,
        scale=gamma,
        drop=None if branch is None else _factors(drop, branch, gamma),
        eps=norm.eps,
        out_dtype=out_dtype,
    )


def reason_against_parts(**parts: Any) -> str | None:
    """Why these parts of a block are not plain, or None; ``norm1`` and the like are norms, ``ls1`` scales."""
    for name, part in parts.items():
        kind = type(part)
        if is_heard(part):
            return f"a hook or a forward of its own on {name}"
        if name.startswith("norm"):
            if kind not in (TimmLayerNorm, nn.LayerNorm) or len(part.normalized_shape) != 1:
                return f"its {name} is {name_beside(kind, nn.LayerNorm)}, not LayerNorm of the last dimension"
            if getattr(part, "_fast_norm", False):
                return f"its {name} is told to be timm's fast norm"
        elif kind is not nn.Identity:
            wanted = LayerScale if name.startswith("ls") else DropPath
            if kind is not wanted:
                return f"its {name} is {name_beside(kind, wanted)}, not {wanted.__name__}"
            if getattr(part, "inplace", False):
                return f"its {name} works in place"
    return None


def _is_small(x: Tensor, *, cast: bool, alone: bool = False) -> bool:
    """Whether PyTorch is faster with a stream (see ``SMALL``): its norm cast or not, alone or with a sum.

    What is exported must hold for any number of images, and so none counts.
    """
    if is_exporting():
        return False
    fewest = SMALL // (2 if alone else 8) if cast else SMALL
    return x.is_cpu and x.numel() < fewest and backend_in_force() == "auto"


def _autocasts(x: Tensor) -> bool:
    return autocasts(x.device.type)


def _fits(x: Tensor, branch: Tensor | None, gamma: Tensor | None, norm: Any) -> bool:
    """Whether a kernel takes these tensors and gives what PyTorch would give, dtypes too."""
    if x.dim() < 2 or tuple(norm.normalized_shape) != x.shape[-1:]:
        return False
    dtype = x.dtype
    if branch is not None:
        if has_own_rules(branch) or branch.shape != x.shape or branch.device != x.device:
            return False
        dtype = torch.promote_types(dtype, branch.dtype)
        if gamma is not None and (gamma.shape != x.shape[-1:] or torch.promote_types(dtype, gamma.dtype) != dtype):
            return False
    parameters = [value for value in (norm.weight, norm.bias, gamma) if value is not None]
    if any(has_own_rules(value) or value.device != x.device for value in parameters):
        return False
    allowed = FLOATS if _autocasts(x) else (dtype,)
    if any(value.dtype not in allowed for value in (norm.weight, norm.bias) if value is not None):
        return False
    return _has_kernel(x.device, dtype, x.shape[-1])  # without one, PyTorch's own code is as fast


# functools.cache would be seen through, and warned of, by torch.compile.
_known: dict[tuple[str, torch.device, torch.dtype, int], bool] = {}


def _has_kernel(device: torch.device, dtype: torch.dtype, columns: int) -> bool:
    if transformed():  # where a backend may count that does not elsewhere
        return SPEC.resolve("auto", device, dtype, columns=columns) != "reference"
    key = forced.get(), device, dtype, columns
    found = _known.get(key)
    if found is None:
        found = _known[key] = SPEC.resolve("auto", device, dtype, columns=columns) != "reference"
    return found


def _read_in(reader: nn.Module, x: Tensor) -> torch.dtype | None:
    """The dtype in which a module multiplies what it takes, if it does nothing else with it; else None."""
    if type(reader) in (TimmMlp, Mlp):
        layers: list[Any] = [reader.fc1]
    elif type(reader) in (TimmAttention, Attention):
        layers = [reader.qkv, getattr(reader, "gate", None)]
    else:
        return None
    if is_heard(reader):
        return None
    for layer in layers:
        if layer is not None and (type(layer) is not nn.Linear or is_heard(layer)):
            return None
    return compute_dtype(x)


def _factors(drop: nn.Module, branch: Tensor, gamma: Tensor | None) -> Tensor | None:
    """A factor for each image, as timm's ``drop_path`` draws them from the same random state."""
    if not isinstance(drop, DropPath) or drop.drop_prob == 0 or not drop.training:
        return None
    dtype = branch.dtype if gamma is None else torch.promote_types(branch.dtype, gamma.dtype)
    keep = 1 - drop.drop_prob
    factors = branch.new_empty(branch.shape[:1], dtype=dtype).bernoulli_(keep)
    return factors.div_(keep) if keep > 0 and drop.scale_by_keep else factors
