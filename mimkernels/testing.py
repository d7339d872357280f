"""What every implementation is tested against: cases, the float64 oracle, the one tolerance table.

A kernel passes when its error against the oracle is at most twice that of the plain PyTorch expression in the
same dtype, plus one rounding band of the result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mimkernels
from mimkernels.ops._registry import SPECS, OpSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where the tests run

# One rounding band: how far the nearest representable value may be, relative to the result.
ROUNDING = {
    torch.float32: 2.0**-23,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-10,
    torch.float64: 2.0**-52,
}
# Below this a result of that dtype is compared absolutely (the least normal number, with room for sums).
SMALLEST = {torch.float32: 1e-30, torch.bfloat16: 1e-30, torch.float16: 1e-7, torch.float64: 1e-300}
TIMES_PLAIN = 2.0
DRAWS = 4  # of the inputs, over which the plain expression's error is taken


@dataclass(frozen=True)
class Case:
    """One call of one op: how its inputs are made, and which of them get gradients."""

    op: str
    label: str
    make: Callable[[torch.Generator], dict]
    grads: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = field(default=(torch.float32, torch.bfloat16, torch.float16))
    parameters: tuple[str, ...] = ()  # inputs that stay fp32 whatever the dtype of the others, as under autocast
    draws: int = DRAWS
    # Outputs that are compared by other numbers than their own, made of the inputs (in fp64) and of them.
    compared: dict[str, Callable[[dict, Tensor], Tensor]] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return f"{self.op}-{self.label}"

    def inputs(self, dtype: torch.dtype, device: str = "cpu", layout: str = "contiguous", seed: int = 0) -> dict:
        """Keyword arguments of the op; floating-point tensors rounded to ``dtype``."""
        arguments = self.make(torch.Generator().manual_seed(seed))
        if "device" in arguments:
            arguments["device"] = device
        return {
            name: _placed(value, torch.float32 if name in self.parameters else dtype, device, layout)
            for name, value in arguments.items()
        }

    def upstream(self, name: str, out: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor | None:
        """The gradient that reaches an output, rounded to ``dtype``; None where the output is not used."""
        return torch.randn(out.shape, generator=generator).to(dtype).to(out)


def _placed(value, dtype: torch.dtype, device: str, layout: str):
    if not isinstance(value, Tensor):
        return value
    value = value.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype)
    if layout == "strided" and value.dim() >= 2:  # rows further apart than they are long
        wide = torch.zeros((*value.shape[:-1], value.shape[-1] + 3), dtype=value.dtype, device=device)
        wide[..., : value.shape[-1]] = value
        return wide[..., : value.shape[-1]]
    if layout == "permuted" and value.dim() >= 2:  # the last dim is not contiguous
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    return value


def call(case: Case, inputs: dict, backend: str) -> dict[str, Tensor]:
    """The op's outputs by name."""
    return named(getattr(mimkernels, case.op)(**inputs, backend=backend))


def comparable(case: Case, inputs: dict, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs as they are compared."""
    return {
        name: case.compared[name](doubled(inputs), out) if name in case.compared else out
        for name, out in outputs.items()
    }


def named(result: Tensor | tuple) -> dict[str, Tensor]:
    """What an op returns, by name: that of a named tuple, or ``output`` and ``weights``; each statistic by its own."""
    if isinstance(result, Tensor):
        return {"output": result}
    if not hasattr(result, "_asdict"):
        return dict(zip(("output", "weights"), result, strict=True))
    outputs = result._asdict()
    statistics = outputs.pop("stats", {})
    return {**outputs, **statistics}


def narrowest(inputs: dict) -> torch.dtype:
    """The floating-point dtype of the fewest digits, of the tensors and of the result where it is asked for."""
    given = [value.dtype for value in inputs.values() if isinstance(value, Tensor) and value.is_floating_point()]
    given += [value for value in inputs.values() if isinstance(value, torch.dtype)]
    return max(given, key=ROUNDING.__getitem__, default=torch.float32)


def run(
    case: Case, inputs: dict, backend: str, dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs of a differentiable op, and the gradients of all outputs together, each with its own drawn upstream.

    The upstream gradients are numbers of ``dtype``, so that the oracle has the same; that of the inputs if None.
    """
    leaves = {name: inputs[name].detach().requires_grad_() for name in case.grads if inputs.get(name) is not None}
    outputs = call(case, {**inputs, **leaves}, backend)
    detached = {name: out.detach() for name, out in outputs.items()}
    if not leaves:
        return detached, {}
    generator = torch.Generator().manual_seed(1)
    upstream = {name: case.upstream(name, out, dtype or narrowest(inputs), generator) for name, out in outputs.items()}
    used = [name for name, out in outputs.items() if out.requires_grad and upstream[name] is not None]
    if not used:
        return detached, {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    grads = torch.autograd.grad(
        [outputs[name] for name in used],
        list(leaves.values()),
        [upstream[name] for name in used],
        materialize_grads=True,
    )
    return detached, dict(zip(leaves, grads, strict=True))


def doubled(inputs: dict) -> dict:
    """The same inputs in float64, and a result in it, too, where its dtype is among them."""

    def double(value):
        if isinstance(value, torch.dtype):
            return torch.float64
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: double(value) for name, value in inputs.items()}


def oracle(case: Case, inputs: dict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The reference in float64 on the same (already rounded) inputs."""
    return run(case, doubled(inputs), "reference", narrowest(inputs))


@functools.lru_cache(maxsize=8)  # the dtypes and layouts of one case, for backend after backend
def _exact(
    case: Case, dtype: torch.dtype, device: str, layout: str, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the oracle gives for one draw of the inputs, in the form that is compared."""
    inputs = case.inputs(dtype, device, layout, seed)
    outputs, grads = oracle(case, inputs)
    return comparable(case, inputs, outputs), grads


@functools.cache
def plain_errors(case: Case, dtype: torch.dtype, device: str, layout: str, draws: int) -> dict[str, float]:
    """Largest error of the plain expression in ``dtype`` against the oracle, of every output and gradient.

    Over the first `draws` draws of the inputs: of a small result, one draw may be right by luck to the last bit.
    """
    worst = dict(plain_errors(case, dtype, device, layout, draws - 1)) if draws > 1 else {}
    inputs = case.inputs(dtype, device, layout, draws - 1)
    plain_outputs, plain_grads = run(case, inputs, "reference")
    plain_outputs = comparable(case, inputs, plain_outputs)
    exact_outputs, exact_grads = _exact(case, dtype, device, layout, draws - 1)
    for prefix, plain, exact in (("", plain_outputs, exact_outputs), ("gradient of ", plain_grads, exact_grads)):
        for name in plain:
            error = (plain[name].double() - exact[name]).abs()
            error = error[error.isfinite()]
            largest = error.max().item() if error.numel() else 0.0
            worst[prefix + name] = max(worst.get(prefix + name, 0.0), largest)
    return worst


def check(
    case: Case, backend: str, dtype: torch.dtype, device: str = "cpu", layout: str = "contiguous"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients of the case on one backend, after comparing all of them with the oracle.

    The plain expression's error is taken over ``case.draws`` draws of the inputs. It only grows with their number, so
    that what passes by fewer needs no more.
    """
    inputs = case.inputs(dtype, device, layout)
    outputs, grads = run(case, inputs, backend)
    exact, exact_grads = _exact(case, dtype, device, layout, 0)
    assert list(outputs) == list(exact)
    assert list(grads) == list(exact_grads)
    compared = comparable(case, inputs, outputs)
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
    for draws in range(1, case.draws + 1):
        plain = plain_errors(case, dtype, device, layout, draws)
        try:
            for name, out in compared.items():
                assert_as_good_as_plain(name, out, plain[name], exact[name])
            for name, grad in grads.items():
                assert_as_good_as_plain(f"gradient of {name}", grad, plain[f"gradient of {name}"], exact_grads[name])
        except AssertionError:
            if draws == case.draws:
                raise
        else:
            break
    return outputs, grads


def assert_as_good_as_plain(name: str, got: Tensor, plain_error: float, exact: Tensor) -> None:
    """Fail unless ``got`` is as near to ``exact`` as the rule of this module asks."""
    assert got.shape == exact.shape, f"{name}: shape {list(got.shape)}, expected {list(exact.shape)}"
    if not got.is_floating_point():
        assert torch.equal(got, exact), f"{name}: other integers than the reference"
        return
    exact = representable(exact, got.dtype)
    assert torch.equal(got.isnan(), exact.isnan()), f"{name}: NaN in other places than the oracle"
    finite = exact.isfinite()
    same_infinities = torch.equal(got.double()[~finite].nan_to_num(), exact[~finite].nan_to_num())
    assert same_infinities, f"{name}: infinities differ from the oracle"
    error = (got.double() - exact)[finite].abs()
    if error.numel() == 0:
        return
    allowed = TIMES_PLAIN * plain_error + ROUNDING[got.dtype] * exact[finite].abs() + SMALLEST[got.dtype]
    excess = (error - allowed).max().item()
    assert excess <= 0, (
        f"{name}: error {error.max().item():.3e} against the oracle, plain PyTorch has {plain_error:.3e} "
        f"({got.dtype}); beyond the allowance by {excess:.3e}"
    )


def representable(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Infinity for what is beyond the largest number of the dtype, as rounding has it."""
    return torch.where(exact.to(dtype).isinf(), exact.sign() * float("inf"), exact)


class Watch(TorchDispatchMode):
    """``seen`` collects what `note` makes of each torch op that runs, forward and backward, and of its arguments.

    Ops of which it makes None are left out.
    """

    def __init__(self, note: Callable[[torch._ops.OpOverload, tuple], Any]) -> None:
        super().__init__()
        self.note = note
        self.seen: list[Any] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        noted = self.note(op, args)
        if noted is not None:
            self.seen.append(noted)
        return op(*args, **(kwargs or {}))


def folder(op: str) -> str:
    """The folder of a public op in ``mimkernels/ops``, which is the name of its spec."""
    return getattr(mimkernels, op).__module__.split(".")[2]


def spec(op: str) -> OpSpec:
    """The spec of a public op; the packed one runs the kernels of attention."""
    return SPECS[folder(op)]


def backends(op: str) -> list[str]:
    """Names of the backends that the op has, by priority."""
    return [impl.backend for impl in spec(op).impls]
