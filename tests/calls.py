"""Small calls of every public op, collected from ``tests/ops/<op>/calls.py``.

An op's file defines

``CALL``
    the arguments of a good call: every tensor and every option;

and, where they apply,

``NUMBERS``
    good numbers for arguments that are tensors in ``CALL``;
``VARIANTS``
    changes of ``CALL`` by label, for tests that differentiate and trace the op (default: ``CALL`` itself);
``LEAST``
    the arguments of a good call that gives only what is required;
``REFUSED``
    changes of ``LEAST``, each with the error and the message that it gets.
"""

from __future__ import annotations

import torch
from torch import Tensor

import mimkernels
from mimkernels.testing import named
from tests.cases import ops_with, part_of, rich

OPS = ops_with("calls")
CALLS = {getattr(mimkernels, op): part_of(op, "calls").CALL for op in OPS}
LEAST = {op: part_of(op, "calls").LEAST for op in OPS if hasattr(part_of(op, "calls"), "LEAST")}
# The label of a variant -> (op, its arguments).
VARIANTS = {
    label: (op, {**part_of(op, "calls").CALL, **changes})
    for op in OPS
    for label, changes in getattr(part_of(op, "calls"), "VARIANTS", {op: {}}).items()
}


def numbers(op: str) -> dict[str, float]:
    """``NUMBERS`` of the op."""
    return getattr(part_of(op, "calls"), "NUMBERS", {})


def refusals() -> list[tuple]:
    """(Op, changed arguments, error, message) of every refusal."""
    return [(op, *refusal) for op in LEAST for refusal in getattr(part_of(op, "calls"), "REFUSED", ())]


def differentiated(label: str) -> list[str]:
    """Names of the tensors of a variant that get gradients."""
    op, arguments = VARIANTS[label]
    grads = rich(op).grads if op in ops_with("cases") else ()
    return [name for name in grads if isinstance(arguments.get(name), Tensor)]


def tensors(label: str, *leading: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The tensors of a variant that get gradients, slightly changed, in stacks if there are leading dimensions."""
    generator = torch.Generator().manual_seed(1)
    given = [VARIANTS[label][1][name] for name in differentiated(label)]
    return [
        (tensor + 0.5 * torch.randn(*leading, *tensor.shape, generator=generator)).to(dtype).requires_grad_()
        for tensor in given
    ]


def floating(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def function(label: str, backend: str = "auto"):
    """A variant as a function of the tensors that get gradients: its outputs in one vector, or the only output."""
    op, arguments = VARIANTS[label]
    names = differentiated(label)

    def call(*tensors: Tensor) -> Tensor:
        dtype = tensors[0].dtype
        others = {name: value.to(dtype) if floating(value) else value for name, value in arguments.items()}
        result = getattr(mimkernels, op)(**{**others, **dict(zip(names, tensors, strict=True))}, backend=backend)
        outputs = list(named(result).values())
        return outputs[0] if len(outputs) == 1 else torch.cat([output.flatten() for output in outputs])

    return call
