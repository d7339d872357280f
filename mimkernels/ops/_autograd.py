"""Gradients that belong to the torch ops, and the short way past the dispatcher for calls that need none of it.

Every overload gets a kernel for autograd and a rule for vmap, so that ``torch.ops.mimkernels.*`` is differentiated
wherever it is called: in eager mode, under torch.compile and under the transforms of torch.func. Such kernels are in
Python, and cost more than a small op. A plain call therefore enters below them, after the same decision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.compiler import is_compiling

# A torch op, or Python that runs in its place: its schema states what it takes and returns.
Run: TypeAlias = Callable[..., Any]
# The ctx of torch.autograd.Function, to which forward may give any attribute.
Context: TypeAlias = Any

_below_autograd = torch._C._AutoDispatchBelowAutograd
_in_torch_func = torch._C._are_functorch_transforms_active


@dataclass(frozen=True)
class Gradient:
    """How to differentiate an op, given its other ops (backward and what else its schemas name).

    Attributes:
        save: ``save(ctx, inputs, outputs)`` keeps on ``ctx`` what backward needs.
        backward: ``backward(ctx, *ops, *grads)`` returns gradients by argument; ``ctx.needs_input_grad`` says which
            arguments need one. An argument that it never names has none.
    """

    save: Callable[[Context, Any, Any], None]
    backward: Callable[..., dict[str, Tensor | None]]


@dataclass(frozen=True)
class Kernel:
    """The ways to run one overload.

    Attributes:
        dispatched: the torch op, right in every context.
        direct: the same for a plain call in which nothing needs a gradient.
        tracked: the same for a plain call in which something does.
        inference: the same for a plain call in inference mode, which keeps autograd out itself.
    """

    dispatched: torch._ops.OpOverload
    direct: Run
    tracked: Run
    inference: Run

    def backward(self, *args: Any) -> Any:
        """The op as backward calls it: directly unless that is to be differentiated again."""
        plain = not (transformed() or torch.is_grad_enabled())
        return (self.direct if plain else self.dispatched)(*args)


def transformed() -> bool:
    """Whether torch.compile traces this call, or a transform of torch.func or forward-mode AD may act on it."""
    return is_compiling() or _in_torch_func() or forward_ad._current_level >= 0


def forward_mode() -> bool:
    """Whether tensors may carry forward-mode gradients."""
    return not is_compiling() and forward_ad._current_level >= 0


def attach(
    library: torch.library.Library,
    overload: torch._ops.OpOverload,
    fake: Run,
    gradient: Gradient | None,
    others: Sequence[Kernel],
) -> Kernel:
    """Register the autograd kernel and the vmap rule of an overload.

    Args:
        library: where the overload was defined.
        overload: the torch op.
        fake: its shape function.
        gradient: how it is differentiated; None if its outputs carry no gradient, as those of argsort.
        others: the kernels of the ops that ``gradient.backward`` takes first.
    """
    op, run = f"{overload._opname}.{overload._overloadname}", overload._op
    torch.library.register_vmap(overload, _one_by_one(overload, fake), lib=library)
    if gradient is None:
        library.impl(overload, torch.library.fallthrough_kernel, "Autograd")
        return Kernel(overload, run, run, run)
    names = [argument.name for argument in overload._schema.arguments]
    backward_ops = [other.backward for other in others]

    def direct(*args: Any) -> Any:
        with _below_autograd():
            return run(*args)

    def forward(ctx: Context, *args: Any) -> Any:
        if _in_torch_func():
            # Autograd switches gradients off in here, but the levels below may want theirs.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                outputs = direct(*args)
        else:
            outputs = direct(*args)
        gradient.save(ctx, args, outputs)
        return outputs

    def backward(ctx: Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = gradient.backward(ctx, *backward_ops, *grads)
        wanted = []
        for name, needed in zip(names, ctx.needs_input_grad, strict=True):
            if needed and name not in found:
                raise NotImplementedError(f"{op}: {name} gets no gradient; detach it")
            wanted.append(found[name] if needed else None)
        return tuple(wanted)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(overload._opname, (torch.autograd.Function,), methods)
    one_level: Any = type(overload._opname, (_SingleLevelFunction,), methods)

    def autograd(*args: Any) -> Any:
        tensors = [argument for argument in args if isinstance(argument, Tensor)]
        if forward_mode() and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
            raise NotImplementedError(
                f"{op} has no forward-mode gradients (torch.func.jvp, jacfwd and hessian, torch.autograd.forward_ad); "
                "backend='reference' has them"
            )
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
            return direct(*args)
        if not _in_torch_func():
            return function.apply(*args)
        # The dispatcher has chosen the transform, here is one level of it: what torch.autograd.Function would do for
        # all levels is left to the dispatcher.
        with enable_single_level_autograd_function():
            return one_level.apply(*args)

    library.impl(overload, autograd, "Autograd")
    return Kernel(overload, direct, function.apply, run)


def refused(op: str) -> Gradient:
    """Of backward itself: an error, where None would read as zeros."""

    def backward(ctx: Context, *grads: Tensor | None) -> dict[str, Tensor | None]:
        raise NotImplementedError(
            f"{op} cannot be differentiated (double backward); backend='reference' has second derivatives"
        )

    return Gradient(lambda ctx, inputs, outputs: None, backward)


def _one_by_one(overload: torch._ops.OpOverload, fake: Run) -> Run:
    """The vmap rule: the op of each slice, so that every slice has its gradient too."""
    single = len(overload._schema.returns) == 1

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        def call(run: Run, take: Callable[[Tensor, int], Tensor]) -> Any:
            return run(*(arg if dim is None else take(arg, dim) for arg, dim in zip(args, in_dims, strict=True)))

        if info.batch_size == 0:
            shaped = call(fake, lambda arg, dim: arg.new_empty(arg.shape[:dim] + arg.shape[dim + 1 :]))
            stacked = tuple(output.new_empty((0, *output.shape)) for output in _as_tuple(shaped))
        else:
            runs = [_as_tuple(call(overload, partial(torch.select, index=i))) for i in range(info.batch_size)]
            stacked = tuple(map(torch.stack, zip(*runs, strict=True)))
        return (stacked[0], 0) if single else (stacked, (0,) * len(stacked))

    return rule


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
