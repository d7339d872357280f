"""Contract cases of add_layer_norm."""

from __future__ import annotations

import torch

from mimkernels.testing import Case

RICH = "plain"
SPOILED = "x"
PER_IMAGE = ("x", "y", "drop")
PARAMETERS = ("weight", "bias", "scale", "drop")


def add_layer_norm(*size, y=True, affine=True, scale=True, drop=True, offset=0.0, spread=1.0, **options):
    def make(generator):
        def values(*shape):
            return torch.randn(shape, generator=generator)

        columns = size[-1]
        return {
            "x": values(*size) * spread + offset,
            "y": values(*size) * spread if y else None,
            "weight": 1 + 0.5 * values(columns) if affine else None,
            "bias": values(columns) if affine else None,
            "scale": 0.5 + values(columns) if y and scale else None,
            "drop": torch.arange(size[0]) % 3 * 0.625 if y and drop else None,
            **options,
        }

    return make


GRADS = ("x", "y", "weight", "bias", "scale")
INPUTS = {
    "plain": add_layer_norm(3, 17, 48),
    "odd": add_layer_norm(3, 17, 37, eps=1e-6),
    "sum": add_layer_norm(2, 21, 40, scale=False, drop=False),
    "scaled": add_layer_norm(2, 21, 40, drop=False),
    "dropped": add_layer_norm(4, 9, 40, scale=False),
    "norm": add_layer_norm(2, 21, 40, y=False),
    "not-affine": add_layer_norm(2, 21, 40, affine=False),
    "offset": add_layer_norm(2, 21, 64, offset=50.0),
    "small": add_layer_norm(2, 21, 40, spread=1e-3),
    "four-dims": add_layer_norm(2, 3, 5, 24),
    "two-dims": add_layer_norm(6, 24),
    "vector": add_layer_norm(70, drop=False),
    "two-columns": add_layer_norm(3, 7, 2),
    "one-column": add_layer_norm(3, 7, 1),
    "many-rows": add_layer_norm(500, 9, 8),
    "wide": add_layer_norm(2, 3, 1100),
    "wide-in-chunks": add_layer_norm(1, 3, 4112),
    "wide-odd": add_layer_norm(1, 3, 2101),
    "no-rows": add_layer_norm(2, 0, 16),
    "no-images": add_layer_norm(0, 5, 16),
    "no-columns": add_layer_norm(2, 5, 0),
    "to-fp32": add_layer_norm(2, 13, 40, out_dtype=torch.float32),
}
AUTOCAST = {
    "stream-fp32": add_layer_norm(3, 17, 48),
    "stream-fp32-sum": add_layer_norm(2, 13, 37, scale=False, drop=False),
}
CASES = [
    *(Case("add_layer_norm", label, make, GRADS) for label, make in INPUTS.items()),
    # As under autocast: the stream and the parameters are fp32, the branch comes in half precision, and the normalised
    # rows leave in it.
    *(
        Case("add_layer_norm", label, make, GRADS, (torch.bfloat16, torch.float16), ("x", *PARAMETERS))
        for label, make in AUTOCAST.items()
    ),
    *(
        Case("add_layer_norm", f"autocast-{name}", make, GRADS, (dtype,), ("x", *PARAMETERS))
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))
        for make in [add_layer_norm(3, 17, 48, out_dtype=dtype)]
    ),
    Case("add_layer_norm", "fp32-parameters", add_layer_norm(3, 17, 48), GRADS, (torch.bfloat16,), PARAMETERS),
    # The sum, and so the residual, is fp32.
    Case("add_layer_norm", "branch-fp32", add_layer_norm(3, 9, 24), GRADS, (torch.bfloat16,), ("y", *PARAMETERS)),
]
