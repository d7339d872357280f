"""timm's attention layers on ``mimkernels.attention``, and a recorder of what their heads do."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias

try:
    from timm.layers import Attention as TimmAttention
except ImportError as error:
    raise ImportError(
        f"mimkernels.nn.attention needs timm, which cannot be imported ({error}); pip install 'mimkernels[train]'"
    ) from error

from mimkernels.nn._classes import change_class, fused_attn, prepare_scriptable, sdpa_is_replaced
from mimkernels.nn.sdpa import AttentionCall, as_bias, attend, compute_dtype, has_own_rules, is_recomputing
from mimkernels.ops.attention.spec import STATISTICS

__all__ = ["Attention", "HeadRecorder", "LayerHeads", "record_heads", "use_mimkernels_attention"]

_KEPT = ("q", "k", "lse", "output")


class Attention(TimmAttention):
    """timm's ``Attention`` computed by ``mimkernels.attention``: same parameters, same names, same results.

    q, k and v are views of the packed projection and the output is written as the next projection reads it, so that
    nothing is transposed in memory; where q and k have no norms, the projection's gradient is written packed, too.
    Made by ``use_mimkernels_attention``, or built like timm's (``attn_layer=Attention`` of timm's models).

    timm's own code runs with attention dropout (``attn_drop > 0`` in training), after ``fused_attn = False``, for
    tensors with rules of their own (subclasses; torch.fx, which sees timm's nodes), under ``torch.jit.trace``, and
    where somebody replaced ``F.scaled_dot_product_attention``. A layer that had ``fused_attn = False`` before, is fused
    as long as there are no hooks on ``attn_drop``, which see the attention matrix. ``torch.jit.script`` gets timm's
    class.
    """

    __prepare_scriptable__ = prepare_scriptable
    fused_attn = fused_attn
    _slot: _Slot | None = None  # where this layer's heads are recorded, inside `record_heads` only

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """``[B, N, C]`` to ``[B, N, C']``; arguments as timm's. A query that may attend to nothing gets zeros."""
        slot = self._slot
        if slot is not None and not slot.of_this_thread():
            slot = None
        again = is_recomputing()
        settings = _settings_of_recorded_pass(self) if again else slot.settings if slot is not None else _NOTHING
        is_recorded = slot is not None or settings is not _NOTHING
        why = self._reason_against(x, attn_mask)
        if why is not None:
            if is_recorded:
                raise RuntimeError(f"heads cannot be recorded under {why}")
        elif not (self.fused_attn or is_recorded):
            why = "fused_attn is False"
        if why is not None:
            # Arguments only where given: older releases of timm have no is_causal.
            causal = {} if is_causal is False else {"is_causal": is_causal}
            return super().forward(x, attn_mask=attn_mask, **causal)
        batch, tokens, _ = x.shape
        gate = getattr(self, "gate", None)
        packed = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        parts = packed.permute(2, 0, 3, 1, 4).unbind(0)  # [B, H, N, D] each, views
        q, k, v = self.q_norm(parts[0]), self.k_norm(parts[1]), parts[2]
        # Norms may leave q and k wider than v; as scaled_dot_product_attention, run in autocast's dtype.
        dtype = compute_dtype(v)
        as_projected = q is parts[0] and k is parts[1] and v.dtype == dtype
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        bias, key_mask = as_bias(attn_mask, is_causal, q, tokens, q.shape[:2])
        # timm's fused branch knows no scale but this one, whatever `scale` is set to.
        scale = self.scale if self.__dict__["fused_attn"] is None else self.head_dim**-0.5
        made = attend(
            AttentionCall(q, k, v, bias, key_mask, scale, q.shape[:2], packed if as_projected else None),
            num_prefix=settings.num_prefix,
            positions=settings.positions,
            stats=settings.stats,
        )
        y = self.norm(made.out.transpose(1, 2).flatten(2))  # [B, N, H * D], a view
        if gate is not None:
            y = y * gate(x).sigmoid()
        y = self.proj(y)
        if slot is not None and not again:
            slot.fill(LayerHeads(made.stats, scale, q, k, made.lse, y, bias, key_mask))
            _await_backward(self, settings, made.lse)
        return self.proj_drop(y)

    def _reason_against(self, x: Tensor, attn_mask: Tensor | None) -> str | None:
        """Why this call must run timm's own code, whatever ``fused_attn`` says; None if it need not."""
        if self.training and self.attn_drop.p > 0:
            return f"attention dropout (attn_drop = {self.attn_drop.p}): set it to 0, or the model to eval()"
        if torch.jit.is_tracing():
            return "torch.jit.trace, which records PyTorch's own operations"
        for tensor in (x, attn_mask):
            if has_own_rules(tensor) and type(tensor) is not CausalBias:
                return f"the rules of its own that a {type(tensor).__name__} computes by"
        return "another function in the place of F.scaled_dot_product_attention" if sdpa_is_replaced() else None

    def __getstate__(self) -> dict[str, Any]:
        # A copy made inside `record_heads` does not record.
        return {name: value for name, value in self.__dict__.items() if name != "_slot"}


def use_mimkernels_attention(module: nn.Module, *, required: bool = True) -> list[Attention]:
    """Let every timm ``Attention`` in `module`, or `module` itself, compute with ``mimkernels.attention``, in place.

    Parameters, buffers, hooks, modes and state-dict names stay; only the layers' class changes. Subclasses of timm's
    Attention and other kinds (rotary, differential, windowed, ...) are left as they are.

    Args:
        module: any model.
        required: refuse a model that has no such layer.

    Returns:
        the layers that now do, in the model's order, with those that did before.

    Raises:
        ValueError: there is no timm Attention in the model; lists what there is.
    """
    layers = change_class(module, TimmAttention, Attention)
    if required and not layers:
        raise ValueError(f"{type(module).__name__} has no timm.layers.Attention{_other_kinds(module)}")
    return layers


class LayerHeads(NamedTuple):
    """What one layer recorded.

    Attributes:
        stats: each asked statistic, ``[B, H, N]`` fp32 with gradients, by name.
        scale: of the scores.
        q, k: ``[B, H, N, D]`` as given to attention, if kept; else None.
        lse: ``[B, H, N]`` fp32, if kept; else None.
        output: ``[B, N, C]`` after the output projection, before its dropout, if kept; else None.
        bias, key_mask: of the scores, as given to attention, if q and k are kept; mostly None.

    Example::

        received_attention(heads.q, heads.k, heads.lse, **heads.options)
    """

    stats: dict[str, Tensor]
    scale: float
    q: Tensor | None = None
    k: Tensor | None = None
    lse: Tensor | None = None
    output: Tensor | None = None
    bias: Tensor | None = None
    key_mask: Tensor | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What the companion ops and ``HeadStatistics.update`` need besides q, k and lse."""
        return {"bias": self.bias, "key_mask": self.key_mask, "scale": self.scale}


class HeadRecorder:
    """What ``record_heads`` gives: per attention layer, in the model's order, its ``LayerHeads``.

    A sequence: ``heads[3].stats["entropy"]``, ``for layer in heads``. Readable as soon as a layer has run.
    """

    def __init__(self, layers: Sequence[Attention], settings: _Settings, keep: tuple[str, ...]) -> None:
        self._layers = list(layers)
        self._slots = [_Slot(settings, keep, number) for number in range(len(layers))]
        self._with_grad = False

    @property
    def stats(self) -> list[dict[str, Tensor]]:
        """The statistics of every layer, as ``regularization_loss`` takes them."""
        return [heads.stats for heads in self]

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, layer: int) -> LayerHeads:
        slot = self._slots[layer]
        if slot.heads is None:
            raise RuntimeError(f"layer {slot.number} of {len(self)} has not run inside record_heads yet")
        return slot.heads

    def __iter__(self) -> Iterator[LayerHeads]:
        return (self[number] for number in range(len(self)))

    def __enter__(self) -> HeadRecorder:
        if not self._layers:
            raise RuntimeError("this recorder was used before; call record_heads for every forward pass")
        for layer in self._layers:
            if layer._slot is not None:
                raise RuntimeError("these layers are already being recorded: record_heads cannot be nested")
        self._with_grad = torch.is_grad_enabled()
        for layer, slot in zip(self._layers, self._slots, strict=True):
            slot.thread = None if torch.compiler.is_compiling() else get_ident()
            layer._slot = slot
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        layers, self._layers = self._layers, []
        for layer in layers:
            layer._slot = None
        if kind is not None:
            return
        silent = [slot.number for slot in self._slots if slot.heads is None]
        if silent:
            raise RuntimeError(
                f"{len(silent)} of {len(layers)} attention layers recorded nothing ({_listed(silent)}): they did not "
                "run inside record_heads"
            )
        if self._with_grad and any(
            not slot.with_grad and layer.training and any(weight.requires_grad for weight in layer.parameters())
            for layer, slot in zip(layers, self._slots, strict=True)
        ):
            raise RuntimeError(
                "statistics were recorded without gradients: layers ran under no_grad inside record_heads, as "
                "reentrant gradient checkpointing does. Use use_reentrant=False, or put torch.no_grad() around "
                "record_heads if no gradients are wanted"
            )


def record_heads(
    model: nn.Module | Iterable[nn.Module],
    stats: Sequence[str] = (),
    *,
    num_prefix: int = 0,
    positions: Tensor | None = None,
    keep: Sequence[str] = (),
) -> HeadRecorder:
    """Record what the heads of a model do during one forward pass of this thread; a context manager.

    Statistics come out of the attention pass itself and carry gradients, so that they can be terms of the loss. Nothing
    stays behind in the model. Gradient checkpointing must be non-reentrant (timm's and torch's default); two passes
    with different positions may then not wait for their backward passes at once, which is refused.

    Args:
        model: with attention by ``use_mimkernels_attention``; or several modules, such as its blocks.
        stats: row statistics of ``attention`` to record.
        num_prefix: P, leading tokens ([cls], registers) that are no patches.
        positions: patch coordinates ``[N - P, d]`` or ``[B, N - P, d]``, for ``distance``; as in ``attention``.
        keep: what else to keep, of "q", "k", "lse", "output"; such as ``HeadStatistics.inputs``. The companion ops
            need q, k and lse.

    Raises:
        ValueError: an unknown name, or no layer that could record.
        RuntimeError: on leaving, layers that recorded nothing, or without gradients though in training; inside,
            a layer that runs twice, attention dropout, nesting.

    Example::

        use_mimkernels_attention(model)
        with record_heads(model, ["entropy"], num_prefix=1) as heads:
            loss = criterion(model(images), labels)
        loss = loss + regularization_loss({"entropy": 1e-3}, heads.stats, num_prefix=1)
    """
    modules = [model] if isinstance(model, nn.Module) else list(model)
    for part in modules:
        if not isinstance(part, nn.Module):
            raise TypeError(f"record_heads takes a module or several, got {type(part).__name__}")
    found = [layer for part in modules for layer in part.modules() if isinstance(layer, Attention)]
    layers = list(dict.fromkeys(found))
    if not layers:
        if any(isinstance(layer, TimmAttention) for part in modules for layer in part.modules()):
            raise ValueError("the model's attention cannot record; call use_mimkernels_attention(model) first")
        raise ValueError(f"there is no attention layer that can record{_other_kinds(*modules)}")
    for name, given, known in (("stats", stats, STATISTICS), ("keep", keep, _KEPT)):
        if isinstance(given, str):
            raise TypeError(f"{name} must be a sequence of names, got the string {given!r}")
        unknown = [item for item in given if item not in known]
        if unknown:
            raise ValueError(f"unknown {unknown[0]!r} in {name}; known: {', '.join(known)}")
    if "distance" in stats and positions is None:
        raise ValueError("the statistic 'distance' needs positions, got None")
    return HeadRecorder(layers, _Settings(tuple(dict.fromkeys(stats)), num_prefix, positions), tuple(keep))


@dataclass(frozen=True, eq=False)
class _Settings:
    """What every layer of one recorded pass computes."""

    stats: tuple[str, ...] = ()
    num_prefix: int = 0
    positions: Tensor | None = None

    def computes_the_same(self, other: _Settings) -> bool:
        same_places = self.positions is other.positions or "distance" not in self.stats
        return self.stats == other.stats and self.num_prefix == other.num_prefix and same_places


_NOTHING = _Settings()


class _Slot:
    """One layer's place in a recorder."""

    def __init__(self, settings: _Settings, keep: tuple[str, ...], number: int) -> None:
        self.settings = settings
        self.keep = keep
        self.number = number
        self.thread: int | None = None  # the one that records; compiled code cannot tell
        self.heads: LayerHeads | None = None
        self.with_grad = False

    def of_this_thread(self) -> bool:
        """Whether this thread records, as far as that is known."""
        return torch.compiler.is_compiling() or self.thread in (None, get_ident())

    def fill(self, heads: LayerHeads) -> None:
        if self.heads is not None:
            raise RuntimeError(
                f"attention layer {self.number} ran a second time inside record_heads; record each forward pass "
                "by itself"
            )
        keep = self.keep
        scores = "q" in keep or "k" in keep
        self.heads = LayerHeads(
            heads.stats,
            heads.scale,
            heads.q if "q" in keep else None,
            heads.k if "k" in keep else None,
            heads.lse if "lse" in keep else None,
            heads.output if "output" in keep else None,
            heads.bias if scores else None,
            heads.key_mask if scores else None,
        )
        self.with_grad = torch.is_grad_enabled()


# Gradient checkpointing runs a layer again inside the backward pass, when the recorder is long gone, and must save the
# same tensors: so a recorded pass leaves its settings with the autograd node of its lse, for as long as that lives.
_awaiting_backward: weakref.WeakKeyDictionary[Attention, weakref.WeakSet[_Settings]] = weakref.WeakKeyDictionary()


def _await_backward(layer: Attention, settings: _Settings, lse: Tensor) -> None:
    if torch.compiler.is_compiling() or lse.grad_fn is None:
        return
    lse.grad_fn.metadata["mimkernels.recorded"] = settings
    _awaiting_backward.setdefault(layer, weakref.WeakSet()).add(settings)


def _settings_of_recorded_pass(layer: Attention) -> _Settings:
    first, *others = _awaiting_backward.get(layer, ()) or (_NOTHING,)
    if not all(first.computes_the_same(other) for other in others):
        raise RuntimeError(
            "under gradient checkpointing, two passes recorded with different statistics or positions wait for their "
            "backward passes: run each backward pass before the next forward pass"
        )
    return first


def _other_kinds(*modules: nn.Module) -> str:
    names = {type(part).__name__ for module in modules for part in module.modules()}
    names = sorted(name for name in names if "attention" in name.lower())
    return f"; its attention: {', '.join(names)}" if names else ""


def _listed(numbers: Sequence[int], most: int = 8) -> str:
    shown = ", ".join(str(number) for number in numbers[:most])
    return f"{shown}, ..." if len(numbers) > most else shown
