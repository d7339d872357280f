"""``F.scaled_dot_product_attention`` by ``mimkernels.attention``: which calls it takes, and what they become."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from threading import get_ident
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias, CausalVariant
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mimkernels.ops import AttentionOutput, attention, attention_qkvpacked
from mimkernels.ops._registry import FLOATS
from mimkernels.ops.attention.spec import SPEC

__all__ = ["AttentionCall", "as_attention", "refusals", "sdpa"]

# Head dims of the kernels.
MOST_DIMS = min(impl.limits["head_dim"] for impl in SPEC.impls if impl.limits)
DIM_DIVISOR = max(impl.multiples["head_dim"] for impl in SPEC.impls if impl.multiples)

# PyTorch's own function, whatever a user may have put into torch.nn.functional.
TORCH_SDPA = torch._C._nn.scaled_dot_product_attention

_PLAIN = (Tensor, nn.Parameter, type(None))
_INERT = torch._C._disabled_torch_function_impl  # the __torch_function__ of Parameter, fake tensors and the like


class AttentionCall(NamedTuple):
    """A call of ``F.scaled_dot_product_attention`` as ``mimkernels.attention`` takes it.

    Attributes:
        q, k, v: ``[B, H, N, D]`` in the dtype of the computation; views wherever possible.
        bias: ``[B or 1, H or 1, Nq, Nk]`` or None.
        key_mask: ``[B, Nk]`` bool or None.
        scale: of the scores.
        leading: sizes before ``[Nq, D]`` of the call's own output.
        packed: ``[B, N, 3, H, D]`` if q, k and v are its three parts and it shall get their gradient as one.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    key_mask: Tensor | None
    scale: float
    leading: tuple[int, ...]
    packed: Tensor | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What ``attention`` and its companion ops need besides q, k and v."""
        return {"bias": self.bias, "key_mask": self.key_mask, "scale": self.scale}

    def compute(self, **options: Any) -> AttentionOutput:
        """``attention`` of q, k and v with ``num_prefix``, ``positions`` and ``stats`` as given."""
        if self.packed is None:
            return attention(self.q, self.k, self.v, **self.options, **options)
        return attention_qkvpacked(self.packed, **self.options, **options)


def refusals(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> list[str]:
    """Why the kernels of ``mimkernels.attention`` do not take this call; empty if they do.

    Pure: looks at shapes, dtypes and settings only. Calls that PyTorch itself refuses have reasons, too. Whether a
    kernel is there on this device is not asked: ``mimkernels info`` says, and ``backend="auto"`` decides.

    Args:
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa: as of ``F.scaled_dot_product_attention``.
    """
    tensors = {"query": query, "key": key, "value": value}
    if attn_mask is not None:
        tensors["attn_mask"] = attn_mask
    found = [
        f"{name} is a {type(tensor).__name__}, which computes by rules of its own"
        for name, tensor in tensors.items()
        if has_own_rules(tensor) and type(tensor) is not CausalBias
    ]
    if torch.jit.is_tracing():
        found.append("torch.jit.trace records the calls of PyTorch")  # and could not replay the choice of a backend
    if found:
        return found
    found = [f"{name} is a nested tensor" for name, tensor in tensors.items() if tensor.is_nested]
    if type(attn_mask) is CausalBias:
        del tensors["attn_mask"]  # has a shape in no sense
    found += [f"{name} has {tensor.dim()} dims" for name, tensor in tensors.items() if tensor.dim() < 2]
    if found:
        return found
    if dropout_p > 0:
        found.append(f"dropout_p is {dropout_p}: attention has no dropout")
    dtypes = [_cast_to(tensor) for tensor in (query, key, value)]
    if len(set(dtypes)) > 1:
        found.append(f"dtypes differ: query {dtypes[0]}, key {dtypes[1]}, value {dtypes[2]}")
    elif dtypes[0] not in FLOATS:
        found.append(f"the kernels take fp32, bf16 and fp16, got {dtypes[0]}")
    dim = query.shape[-1]
    if not dim == key.shape[-1] == value.shape[-1]:
        found.append(f"head dims differ: query {dim}, key {key.shape[-1]}, value {value.shape[-1]}")
    if dim > MOST_DIMS or dim % DIM_DIVISOR:
        found.append(f"head dim is {dim}: the kernels take multiples of {DIM_DIVISOR} up to {MOST_DIMS}")
    return found + _malformed(query, key, value, attn_mask, is_causal, enable_gqa)


def as_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    """A call in the terms of ``mimkernels.attention``.

    ``[N, D]`` and ``[B, N, D]`` are one head; of more than four dims, all before heads are images (Swin's windows).
    Fewer key heads (``enable_gqa``) are repeated; as views if there is one. Bool masks that are the same for all heads
    and queries become key masks, others biases of 0 and -inf. Under autocast, q, k and v become its dtype.

    ``torch.nn.attention.bias.CausalBias`` becomes the causal mask that it stands for; other tensors with rules of their
    own are for PyTorch (see ``refusals``).

    A query that may attend to nothing gets zeros in both (in PyTorch since 2.5, on every backend).

    Args:
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa: as of ``F.scaled_dot_product_attention``;
            ``dropout_p`` is ignored.

    Raises:
        ValueError: PyTorch refuses the call, too.
    """
    wrong = _malformed(query, key, value, attn_mask, is_causal, enable_gqa)
    if wrong:
        raise ValueError("; ".join(wrong))
    q, k, v = (tensor.to(_cast_to(tensor)) for tensor in (query, key, value))
    if enable_gqa:
        k, v = (_with_heads(tensor, q.shape[-3]) for tensor in (k, v))
    leading = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    q, k, v = (_four_dims(tensor, leading) for tensor in (q, k, v))
    bias, key_mask = as_bias(attn_mask, is_causal, q, k.shape[2], leading)
    return AttentionCall(q, k, v, bias, key_mask, query.shape[-1] ** -0.5 if scale is None else scale, tuple(leading))


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    num_prefix: int = 0,
    positions: Tensor | None = None,
    stats: Sequence[str] = (),
) -> AttentionOutput:
    """``F.scaled_dot_product_attention`` by ``mimkernels.attention``: the same arguments, the same result in ``out``.

    Args:
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa: as of ``F.scaled_dot_product_attention``.
        num_prefix, positions, stats: as of ``mimkernels.attention``.

    Returns:
        ``out`` in the shape that PyTorch gives; ``lse`` and ``stats`` are ``[B, H, Nq]``, see ``as_attention``.

    Raises:
        ValueError: a call that PyTorch refuses, too, or dropout.
        NotImplementedError, TypeError: what ``refusals`` tells of; ask it first.
    """
    if dropout_p > 0:
        raise ValueError(f"attention has no dropout, got dropout_p = {dropout_p}")
    call = as_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    made = attend(call, num_prefix=num_prefix, positions=positions, stats=stats)
    return made._replace(out=laid_out_as(made.out.reshape(*call.leading, *made.out.shape[2:]), query))


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


def attend(
    call: AttentionCall, *, num_prefix: int = 0, positions: Tensor | None = None, stats: Sequence[str] = ()
) -> AttentionOutput:
    """``attention`` of a call; whoever observes is told. Every module and integration calls attention by this."""
    options = {"num_prefix": num_prefix, "positions": positions, "stats": stats}
    aside = observers()
    if not aside or is_recomputing():
        return call.compute(**options)
    if stats or keeps_tensors_elsewhere():
        made = call.compute(**options)
    else:
        *aside, innermost = aside
        made = innermost.run(call)
    for observer in aside:
        observer.watch(call)
    return made


class Observer(Protocol):
    """Sees every attention that its context computes while it observes."""

    def run(self, call: AttentionCall) -> AttentionOutput:
        """Compute the call, and what is observed from the same pass."""

    def watch(self, call: AttentionCall, note: str = "") -> None:
        """Observe a call that is computed elsewhere."""

    def see_patches(self, embedding: nn.Module, patches: Patches) -> None:
        """Know which patches the module `embedding` turned into tokens."""


class Patches(NamedTuple):
    """What images became at a patch embedding.

    Attributes:
        batch: number of images.
        grid: patches per axis.
        patch_size: pixels per patch and axis, or None if that is not known.
        ids: ``[B, K]`` the patches that were kept, in the order of their tokens; None if that is all of them.
    """

    batch: int
    grid: tuple[int, ...]
    patch_size: tuple[int, ...] | None = None
    ids: Tensor | None = None


# Who observes, the innermost last. Each with its thread, because a context may be copied into another thread: what runs
# there at the same time would be mixed up with what runs here.
_observers: ContextVar[tuple[tuple[int, Observer], ...]] = ContextVar("mimkernels_observers", default=())


def observers() -> tuple[Observer, ...]:
    """Those who observe this thread and asyncio task now, the innermost last; nobody observes compiled code.

    Threads of autograd, which run backward passes and the recomputation of gradient checkpointing, have none.
    """
    if torch.compiler.is_compiling():
        return ()
    known = _observers.get()
    return tuple(observer for thread, observer in known if thread == get_ident()) if known else ()


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Show the observer every attention that this thread and asyncio task compute inside the block."""
    _observers.set((*_observers.get(), (get_ident(), observer)))
    try:
        yield
    finally:
        # Not reset by a token, which another context would refuse: a block may be left in another one, as in notebooks.
        _observers.set(tuple(item for item in _observers.get() if item[1] is not observer))


def tell_patches(embedding: nn.Module, patches: Patches) -> None:
    """Tell all who observe of patches that were embedded by something else than the module's own forward."""
    for observer in observers():
        observer.see_patches(embedding, patches)


def is_recomputing() -> bool:
    """Whether this runs inside a backward pass, as gradient checkpointing's second forward pass does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def keeps_tensors_elsewhere() -> bool:
    """Whether saved tensors are hooked: gradient checkpointing must save the same ones in its second pass."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """What scaled_dot_product_attention computes such a tensor in: its own dtype, or autocast's."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
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


def _malformed(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> list[str]:
    """What PyTorch would refuse about the shapes, too."""
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
    wanted = [*together, query.shape[-2], key.shape[-2]]
    mask = list(attn_mask.shape)
    fits = len(mask) <= len(wanted) and all(
        size in (1, full) for size, full in zip(reversed(mask), reversed(wanted), strict=False)
    )
    return [] if fits else [f"attn_mask must broadcast to {wanted}, got {mask}"]
