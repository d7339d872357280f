"""Translation of ``F.scaled_dot_product_attention``: which calls ``mimkernels.attention`` takes, what they become."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mimkernels.ops import AttentionOutput, attention, attention_qkvpacked
from mimkernels.ops._registry import FLOATS
from mimkernels.ops.attention.spec import SPEC

__all__ = [
    "DIM_DIVISOR",
    "MOST_DIMS",
    "TORCH_SDPA",
    "AttentionCall",
    "SDPAArguments",
    "as_attention",
    "as_bias",
    "compute_dtype",
    "has_own_rules",
    "is_for_pytorch",
    "laid_out_as",
    "refusals",
    "tensors_with_own_rules",
    "without_causal_bias",
]

# Head dims of the kernels.
MOST_DIMS = min(impl.limits["head_dim"] for impl in SPEC.impls if impl.limits)
DIM_DIVISOR = max(impl.multiples["head_dim"] for impl in SPEC.impls if impl.multiples)

# PyTorch's own function, whatever a user may have put into torch.nn.functional.
TORCH_SDPA = torch._C._nn.scaled_dot_product_attention

_PLAIN = (Tensor, nn.Parameter, type(None))
_INERT = torch._C._disabled_torch_function_impl  # the __torch_function__ of Parameter, fake tensors and the like


class SDPAArguments(NamedTuple):
    """The arguments of ``F.scaled_dot_product_attention``, in its order, with its names and defaults."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that were given, by name."""
        tensors = {"query": self.query, "key": self.key, "value": self.value}
        return tensors if self.attn_mask is None else {**tensors, "attn_mask": self.attn_mask}


class AttentionCall(NamedTuple):
    """A call of ``F.scaled_dot_product_attention`` as ``mimkernels.attention`` takes it.

    Attributes:
        q, k, v: ``[B, H, N, D]`` in the dtype of the computation; views wherever possible.
        bias: ``[W, H or 1, Nq, Nk]``, W a divisor of B, or None.
        key_mask: ``[B, Nk]`` bool or None.
        scale: of the scores; None of cosine attention.
        leading: sizes before ``[Nq, D]`` of the call's own output.
        packed: ``[B, N, 3, H, D]`` if q, k and v are its three parts and it shall get their gradient as one.
        bias_table, bias_index: ``[T, H]`` and ``[Nq, Nk]``, or None twice.
        logit_scale: ``[H]`` of cosine attention, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    key_mask: Tensor | None
    scale: float | None
    leading: tuple[int, ...]
    packed: Tensor | None = None
    bias_table: Tensor | None = None
    bias_index: Tensor | None = None
    logit_scale: Tensor | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What ``attention`` and its companion ops need besides q, k and v."""
        names = ("bias", "bias_table", "bias_index", "key_mask", "logit_scale", "scale")
        return {name: getattr(self, name) for name in names}

    def compute(self, **options: Any) -> AttentionOutput:
        """``attention`` of q, k and v with ``num_prefix``, ``positions`` and ``stats`` as given.

        Positions ``[W, N, d]`` are of windows, as a bias: image b takes row ``b % W``.

        Raises:
            ValueError: there are as many windows as do not divide the images.
        """
        positions, batch = options.get("positions"), self.q.shape[0]
        windows = positions.shape[0] if positions is not None and positions.dim() == 3 else 1
        if windows not in (0, 1, batch):
            times, rest = divmod(batch, windows)
            if rest:
                raise ValueError(f"positions of {windows} windows, which do not divide the {batch} of a layer")
            assert positions is not None
            options["positions"] = positions.repeat(times, 1, 1)
        if self.packed is None:
            return attention(self.q, self.k, self.v, **self.options, **options)
        return attention_qkvpacked(self.packed, **self.options, **options)


def refusals(arguments: SDPAArguments) -> list[str]:
    """Why the kernels of ``mimkernels.attention`` do not take this call; empty if they do.

    Pure: looks at shapes, dtypes and settings only. Calls that PyTorch itself refuses have reasons, too. Whether a
    kernel is there on this device is not asked: ``mimkernels info`` says, and ``backend="auto"`` decides.
    """
    reasons = [f"{tensor}, which computes by rules of its own" for tensor in tensors_with_own_rules(arguments)]
    if torch.jit.is_tracing():
        reasons.append("torch.jit.trace records the calls of PyTorch")  # and could not replay the choice of a backend
    if reasons:
        return reasons
    query, key, value, attn_mask = arguments[:4]
    tensors = arguments.tensors()
    reasons = [f"{name} is a nested tensor" for name, tensor in tensors.items() if tensor.is_nested]
    if type(attn_mask) is CausalBias:
        del tensors["attn_mask"]  # has a shape in no sense
    reasons += [f"{name} has {tensor.dim()} dims" for name, tensor in tensors.items() if tensor.dim() < 2]
    if reasons:
        return reasons
    if arguments.dropout_p > 0:
        reasons.append(f"dropout_p is {arguments.dropout_p}: attention has no dropout")
    dtypes = [_cast_to(tensor) for tensor in (query, key, value)]
    if len(set(dtypes)) > 1:
        reasons.append(f"dtypes differ: query {dtypes[0]}, key {dtypes[1]}, value {dtypes[2]}")
    elif dtypes[0] not in FLOATS:
        reasons.append(f"the kernels take fp32, bf16 and fp16, got {dtypes[0]}")
    dim = query.shape[-1]
    if not dim == key.shape[-1] == value.shape[-1]:
        reasons.append(f"head dims differ: query {dim}, key {key.shape[-1]}, value {value.shape[-1]}")
    if not 0 < dim <= MOST_DIMS or dim % DIM_DIVISOR:
        reasons.append(f"head dim is {dim}: the kernels take multiples of {DIM_DIVISOR} up to {MOST_DIMS}")
    return reasons + _malformed(arguments)


def as_attention(arguments: SDPAArguments) -> AttentionCall:
    """A call in the terms of ``mimkernels.attention``; ``dropout_p`` is ignored.

    ``[N, D]`` and ``[B, N, D]`` are one head; of more than four dims, all before heads are images (Swin's windows).
    Fewer key heads (``enable_gqa``) are repeated; as views if there is one. Bool masks that are the same for all heads
    and queries become key masks, others biases of 0 and -inf. Under autocast, q, k and v become its dtype.

    ``torch.nn.attention.bias.CausalBias`` becomes the causal mask that it stands for; other tensors with rules of their
    own are for PyTorch (see ``refusals``).

    A query that may attend to nothing gets zeros in both (in PyTorch since 2.5, on every backend).

    Raises:
        ValueError: PyTorch refuses the call, too.
    """
    malformed = _malformed(arguments)
    if malformed:
        raise ValueError("; ".join(malformed))
    query, key, value, attn_mask, _, is_causal, scale, enable_gqa = arguments
    q, k, v = (tensor.to(_cast_to(tensor)) for tensor in (query, key, value))
    if enable_gqa:
        k, v = (_with_heads(tensor, q.shape[-3]) for tensor in (k, v))
    leading = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, k, v = (_four_dims(tensor, leading) for tensor in (q, k, v))
    bias, key_mask = as_bias(attn_mask, is_causal, q, k.shape[2], leading)
    return AttentionCall(q, k, v, bias, key_mask, query.shape[-1] ** -0.5 if scale is None else scale, tuple(leading))


def laid_out_as(out: Tensor, query: Tensor) -> Tensor:
    """`out` in the order in memory in which PyTorch's own attention leaves it, copied if it is not.

    That is the order of `query` where its kernels write the result, which callers may rely on to ``view`` it, and
    contiguous where it computes step by step.
    """
    dims = out.dim()
    if dims > 4 or out.shape != query.shape or query.is_contiguous() or query.stride(-1) != 1:
        return out.contiguous()
    steps = query.stride()
    if dims == 4 and steps[0] >= steps[2] >= steps[1]:  # [B, N, H, D], as attention writes it
        return out
    order = sorted(range(dims), key=query.stride, reverse=True)
    return out.permute(order).contiguous().permute([order.index(dim) for dim in range(dims)])


def is_for_pytorch(*values: object) -> bool:
    """Whether PyTorch's own code must compute these: under ``torch.jit.trace``, or for what has rules of its own."""
    return torch.jit.is_tracing() or any(map(has_own_rules, values))


def has_own_rules(value: object) -> bool:
    """Whether operations on a tensor, or on what stands for one, are computed by its class.

    True for subclasses with a ``__torch_function__``, tensors made of others, such as DTensor, and torch.fx's Proxy.
    Modes, such as the one of ``torch.set_default_device``, do not count: they see what is computed either way.
    """
    kind = type(value)
    if kind in _PLAIN:
        return False
    return getattr(kind, "__torch_function__", _INERT) is not _INERT or is_traceable_wrapper_subclass(value)


def tensors_with_own_rules(arguments: SDPAArguments) -> list[str]:
    """The tensors that only PyTorch's own code may compute with, such as "attn_mask is a DTensor".

    ``CausalBias`` is none of them: what it stands for is known.
    """
    tensors = arguments.tensors().items()
    return [f"{name} is a {type(t).__name__}" for name, t in tensors if has_own_rules(t) and type(t) is not CausalBias]


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device; meta tensors know none."""
    return any_autocast() and device != "meta" and torch.is_autocast_enabled(device)


def any_autocast() -> bool:
    """Whether autocast may be on for any device; compiled code looks at its own."""
    return is_compiling() or torch._C._is_any_autocast_enabled()


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """What PyTorch's matrix products compute such a tensor in: its own dtype, or autocast's, if its device has one."""
    if not any_autocast():  # before any other look: small models feel every step
        return tensor.dtype
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not autocasts(device):
        return tensor.dtype
    return torch.get_autocast_dtype(device)


def as_bias(
    attn_mask: Tensor | None, is_causal: bool, q: Tensor, keys: int, leading: Sequence[int]
) -> tuple[Tensor | None, Tensor | None]:
    """A mask (bool, True = attend, or added to the scores) as bias ``[B or 1, H or 1, Nq, Nk]`` or ``[B, Nk]`` bool."""
    batch, _, queries, _ = q.shape
    attn_mask, is_causal = without_causal_bias(attn_mask, is_causal, q.device)
    if is_causal:
        if attn_mask is not None:
            raise ValueError("attention takes either attn_mask or is_causal=True, got both")
        attn_mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril()
    if attn_mask is None:
        return None, None
    if attn_mask.dim() > len(leading) + 2:
        raise ValueError(
            f"attn_mask must broadcast to {[*leading, queries, keys]}, got {list(attn_mask.shape)}: too many dims"
        )
    mask = attn_mask[(None,) * (len(leading) + 2 - attn_mask.dim())]
    if len(leading) > 2 and any(size != 1 for size in mask.shape[:-3]):
        mask = mask.expand(*leading[:-1], -1, -1, -1)
    mask = _four_dims(mask, mask.shape[:-2])
    if mask.dtype == torch.bool:
        if _same_along(mask, 1) and _same_along(mask, 2):
            return None, mask[:, 0, 0].expand(batch, keys)
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, float("-inf"))
    return mask.expand(-1, -1, queries, keys), None


def without_causal_bias(
    attn_mask: Tensor | None, is_causal: bool, device: torch.device | str
) -> tuple[Tensor | None, bool]:
    """The same ``attn_mask`` and ``is_causal`` without a ``CausalBias``, of which PyTorch makes these two."""
    if type(attn_mask) is not CausalBias or is_causal:
        return attn_mask, is_causal
    queries, keys = attn_mask.seq_len_q, attn_mask.seq_len_kv
    if attn_mask.variant == CausalVariant.UPPER_LEFT or queries == keys:
        return None, True
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries), False


def _same_along(mask: Tensor, dim: int) -> bool:
    return mask.shape[dim] == 1 or (mask.shape[dim] > 0 and mask.stride(dim) == 0)


def _cast_to(tensor: Tensor) -> torch.dtype:
    return compute_dtype(tensor) if tensor.is_floating_point() else tensor.dtype


def _four_dims(tensor: Tensor, leading: Sequence[int]) -> Tensor:
    """``[*leading, N, D]`` as ``[B, H, N, D]``."""
    if tensor.shape[:-2] != leading:
        tensor = tensor.expand(*leading, -1, -1)
    if tensor.dim() == 4:
        return tensor
    if tensor.dim() > 4:
        return tensor.flatten(0, -4)
    return tensor.unsqueeze(-3) if tensor.dim() == 3 else tensor[None, None]


def _with_heads(tensor: Tensor, heads: int) -> Tensor:
    """Every head of keys or values as often as it takes to have as many as queries."""
    times = heads // tensor.shape[-3]
    repeated = tensor.unsqueeze(-3).expand(*tensor.shape[:-2], times, *tensor.shape[-2:])
    return tensor if times == 1 else repeated.flatten(-4, -3)


def _malformed(arguments: SDPAArguments) -> list[str]:
    """What PyTorch would refuse about the shapes, too."""
    query, key, value, attn_mask, _, is_causal, _, enable_gqa = arguments
    shapes = f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"
    if key.shape[-2] != value.shape[-2]:
        return [f"key and value differ in length: {shapes}"]
    leading = [list(tensor.shape[:-2]) for tensor in (query, key, value)]
    if enable_gqa:
        if any(not sizes for sizes in leading):
            return [f"enable_gqa needs heads: {shapes}"]
        heads = leading[0][-1]
        if any(sizes[-1] == 0 or heads % sizes[-1] for sizes in leading[1:]):
            return [f"query heads must be a multiple of key and value heads: {shapes}"]
        leading = [[*sizes[:-1], heads] for sizes in leading]
    try:
        together = torch.broadcast_shapes(*leading)
    except RuntimeError:
        return [f"sizes before the last two do not fit each other: {shapes}"]
    attn_mask, is_causal = without_causal_bias(attn_mask, is_causal, "meta")
    if attn_mask is None:
        return []
    if is_causal:
        return ["attention takes either attn_mask or is_causal=True, got both"]
    if not (attn_mask.dtype == torch.bool or attn_mask.is_floating_point()):
        return [f"attn_mask must be bool or floating-point, got {attn_mask.dtype}"]
    if attn_mask.is_floating_point() and _cast_to(attn_mask) not in (torch.float32, _cast_to(query)):
        return [f"attn_mask must be bool, fp32 or of query's dtype {_cast_to(query)}, got {_cast_to(attn_mask)}"]
    wanted = [*together, query.shape[-2], key.shape[-2]]
    mask = list(attn_mask.shape)
    fits = len(mask) <= len(wanted) and all(
        size in (1, full) for size, full in zip(reversed(mask), reversed(wanted), strict=False)
    )
    return [] if fits else [f"attn_mask must broadcast to {wanted}, got {mask}"]
