"""Heads taken out of a model for a while, and how much each of them matters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from mimkernels.heads.arrange import arranged
from mimkernels.heads.calls import Calls, unwrapped
from mimkernels.heads.fused import untraced
from mimkernels.heads.intercept import FunctionObserver, intercepted
from mimkernels.nn.sdpa import AttentionCall, Patches
from mimkernels.ops import AttentionOutput

__all__ = ["Ablation", "ablate", "head_importance"]

REPLACEMENTS = ("zero", "mean")


def ablate(model: nn.Module, heads: Mapping[str | int, Sequence[int]], *, by: str = "zero") -> Ablation:
    """Take heads out of a model inside the block: what they give to the output projection is replaced.

    Takes what ``capture`` takes, and attention stays fused: the output of the chosen heads is replaced behind the
    kernel. Nothing stays behind in the model. Inside ``capture`` it must be the inner one of the two; the statistics
    are then those of attention in the model without the heads.

    Args:
        model: called inside the block, as a whole or in parts, any number of times.
        heads: numbers of heads by layer: its name, as ``capture`` gives it (``"blocks.0.attn"``), or its number in the
            order of calls. Layers that are not named stay as they are.
        by: "zero", or "mean": the mean of the head's output over images and tokens of the call, which keeps what the
            head always adds.

    Returns:
        a context manager; entered, it gives the number of heads of every layer that has run, by name.

    Raises:
        ValueError, TypeError: an unknown replacement, or heads that are no numbers from 0.
        IndexError: inside, a layer that does not have the head.
        RuntimeError: inside, a chosen layer whose attention is not computed by the kernels (says why); on leaving, a
            layer that never ran.

    Example::

        with mimkernels.heads.ablate(model, {"blocks.1.attn": [0, 2], 0: [1]}):
            features = model.forward_features(images)

    Source: Michel et al. 2019, arXiv:1905.10650 (zero).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"ablate takes a module, got {type(model).__name__}")
    if by not in REPLACEMENTS:
        raise ValueError(f"by must be one of {', '.join(REPLACEMENTS)}, got {by!r}")
    if not isinstance(heads, Mapping):
        raise TypeError(f"heads must be numbers of heads by layer, such as {{0: [1]}}, got {type(heads).__name__}")
    for layer, chosen in heads.items():
        several = isinstance(chosen, Iterable) and not isinstance(chosen, str)
        if not several or not all(type(head) is int and head >= 0 for head in chosen):
            raise ValueError(f"heads of layer {layer!r} must be numbers from 0, got {chosen!r}")
    return Ablation(unwrapped(model), {layer: sorted(set(chosen)) for layer, chosen in heads.items()}, by)


class Ablation(FunctionObserver):
    """What ``ablate`` returns: enter it once."""

    def __init__(self, model: nn.Module, heads: dict[str | int, list[int]], by: str) -> None:
        self._model, self._heads, self._by = model, heads, by
        self._calls = Calls(model, self, lambda module, args, named, output: None)
        self._layers: dict[str, int] = {}
        self._met: set[str | int] = set()
        self._open: ExitStack | None = None

    @untraced
    def __enter__(self) -> dict[str, int]:
        if self._open is not None:
            raise RuntimeError("this ablation was used before; call ablate again")
        self._open = intercepted(self._model, self, self._calls.followed())
        return self._layers

    @untraced
    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        assert self._open is not None
        self._open.close()
        unmet = [layer for layer in self._heads if layer not in self._met]
        if kind is None and unmet:
            ran = ", ".join(self._layers) or "none"
            raise RuntimeError(f"no layer {', '.join(map(repr, unmet))} called attention; those that did: {ran}")

    # As an observer of `mimkernels.nn.sdpa`

    def run(self, call: AttentionCall) -> AttentionOutput:
        name, chosen = self._chosen()
        if not name:
            return call.compute()
        here = arranged(call, self._calls.modules[0])
        count = self._layers[name] = here.call.q.shape[1]
        output = here.call.compute()
        if not chosen:
            return here.restored(output, call)
        if chosen[-1] >= count:
            raise IndexError(f"{name} has {count} heads, from 0 to {count - 1}; head {chosen[-1]} cannot be taken out")
        out = output.out.clone()
        out[:, chosen] = 0 if self._by == "zero" else output.out[:, chosen].mean((0, 2), keepdim=True)
        return here.restored(output._replace(out=out), call)

    def watch(self, call: AttentionCall | None, note: str = "") -> None:
        name, chosen = self._chosen()
        if chosen:
            why = note or "another capture was entered inside ablate, or gradient checkpointing runs it"
            raise RuntimeError(f"heads of {name} cannot be taken out: {why}")

    def see_patches(self, embedding: nn.Module, patches: Patches) -> None: ...

    # What `Interception` tells

    @property
    def runs(self) -> bool:
        return bool(self._calls.modules)

    def note(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> None: ...

    def _chosen(self) -> tuple[str, list[int]]:
        """Name and chosen heads of the layer that calls now; no name outside the model."""
        if not self._calls.modules:
            return "", []
        name, index = self._calls.count()
        found = [layer for layer in (name, index) if layer in self._heads]
        self._met.update(found)
        return name, sorted({head for layer in found for head in self._heads[layer]})


@torch.no_grad()
def head_importance(model: nn.Module, forward: Callable[[], Tensor], *, by: str = "zero") -> dict[str, Tensor]:
    """How much every head matters: what changes when it alone is taken out. One pass for each head, and one.

    Args:
        model: whose heads are taken out.
        forward: runs the model, the same way every time, and gives its features, ``[..., D]``, or a loss, one number.
        by: as of ``ablate``.

    Returns:
        ``[H]`` fp32 of every layer: the mean of 1 - cosine of features with and without the head, from 0 for one that
        does nothing; or by how much the loss grows.

    Example::

        head_importance(model, lambda: model.forward_features(images))
    """
    if not callable(forward):
        raise TypeError(f"head_importance: forward must run the model, got {type(forward).__name__}")
    with ablate(model, {}) as layers:
        whole = forward().float()
    importance = {}
    for name, count in layers.items():
        changes = []
        for head in range(count):
            with ablate(model, {name: [head]}, by=by):
                without = forward().float()
            if whole.dim() == 0:
                changes.append(without - whole)
            else:
                changes.append((1 - torch.cosine_similarity(whole, without, dim=-1)).mean().clamp(min=0))
        importance[name] = torch.stack(changes).cpu()
    return importance
