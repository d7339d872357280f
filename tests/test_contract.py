"""Every op on every backend: the float64 oracle, gradients, determinism, opcheck, torch.compile."""

import pytest
import torch

from mimkernels import testing
from mimkernels.ops._registry import BACKENDS, SPECS, backend_state
from mimkernels.testing import DEVICE

ON_DEVICE = {
    "cpu": ("cpu", "triton", "cuda-emulated", "reference"),
    "cuda": ("triton", "cuda", "reference"),
}[DEVICE]
CASES = testing.cases()
INTERPRETED = DEVICE == "cpu"
HALF = torch.float16  # the interpreter's bf16 products are wrong
ATTENTION = ("attention", "attention_qkvpacked", "received_attention", "head_divergence")


def backends(op: str) -> list[str]:
    return [name for name in testing.backends(op) if name in ON_DEVICE]


def kernels(op: str) -> list[str]:
    return [name for name in backends(op) if name != "reference"]


def takes_minutes(backend: str, case: testing.Case, dtype: torch.dtype, layout: str) -> bool:
    """Emulated, the longest sequence is run once; interpreted, a long one on either side of one block of keys."""
    once = dtype == torch.float32 and layout == "contiguous"
    if backend == "cuda-emulated":
        return case.label == "length-1025" and not once
    long = case.label in ("length-197", "length-256", "length-257", "length-1025")
    if not (INTERPRETED and backend == "triton" and long):
        return False
    return case.label in ("length-256", "length-1025") or not once


def one_case_per_op() -> list[testing.Case]:
    return [case for case in CASES if case.label in ("mae", "plain") and _is_richest(case)]


def _is_richest(case: testing.Case) -> bool:
    return case.label == "mae" or not any(other.op == case.op and other.label == "mae" for other in CASES)


def note_ours(op, args):
    return (op, args) if op.namespace == "mimkernels" else None


@pytest.mark.parametrize("backend", ON_DEVICE)
def test_backend_is_here(backend):
    assert backend in BACKENDS, f"required here, but not built: {backend}"
    assert backend_state(backend) is None, f"required here: {backend_state(backend)}"


@pytest.mark.parametrize("op", SPECS)
def test_every_op_has_every_required_backend(op):
    assert set(testing.backends(op)) >= {"reference", "cpu", "triton"}


@pytest.mark.parametrize(
    ("case", "backend", "dtype", "layout"),
    [
        pytest.param(case, backend, dtype, layout, id=f"{case}-{backend}-{str(dtype)[6:]}-{layout}")
        for case in CASES
        for backend in backends(case.op)
        for dtype in case.dtypes
        for layout in testing.LAYOUTS
        if (dtype == torch.float32 or layout == "contiguous")
        and not takes_minutes(backend, case, dtype, layout)
        and not (INTERPRETED and backend == "triton" and dtype == torch.bfloat16 and case.op in ATTENTION)
    ],
)
def test_matches_the_float64_oracle(case, backend, dtype, layout, poisoned):
    outputs, grads = testing.check(case, backend, dtype, DEVICE, layout)
    again, grads_again = testing.run(case, case.inputs(dtype, DEVICE, layout), backend)
    for name, out in outputs.items():
        assert torch.equal(out.nan_to_num(), again[name].nan_to_num()), f"two runs gave different bits of {name}"
    for name, grad in grads.items():
        assert torch.equal(grad, grads_again[name]), f"two runs gave different gradients of {name}"


@pytest.mark.parametrize("case", [c for c in CASES if c.grads and "no-" not in c.label], ids=str)
def test_reference_gradients_are_the_numerical_ones(case):
    inputs = testing.doubled(case.inputs(torch.float64))
    names = [name for name in case.grads if inputs.get(name) is not None]
    leaves = [inputs[name].requires_grad_() for name in names]
    torch.autograd.gradcheck(
        lambda *args: tuple(
            out.nan_to_num(neginf=0.0)  # the lse of a query that may attend nothing
            for out in testing.call(case, {**inputs, **dict(zip(names, args, strict=True))}, "reference").values()
            if out.requires_grad
        ),
        leaves,
        fast_mode=sum(leaf.numel() for leaf in leaves) > 1000,
    )


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        pytest.param(case, backend, id=f"{case}-{backend}")
        for case in CASES
        for backend in kernels(case.op)
        if (backend != "triton" or case in one_case_per_op())
        and (backend, case.label) != ("cuda-emulated", "length-1025")
        and case.label != "no-images"  # opcheck itself stumbles over views of nothing
    ],
)
def test_opcheck(case, backend):
    with testing.Watch(note_ours) as recorded:
        testing.run(case, case.inputs(torch.float32, DEVICE), backend)
    names = {op._schema.name.removeprefix(f"mimkernels::{testing.spec(case.op).name}_") for op, _ in recorded.seen}
    assert names >= ({"fwd", "bwd"} if case.grads else {"fwd"}), names
    for op, args in recorded.seen:
        args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        torch.library.opcheck(op, args)


# Inductor on top of an interpreted kernel would add minutes and show nothing that aot_eager does not.
@pytest.mark.parametrize(
    ("case", "backend", "compiler"),
    [
        pytest.param(case, backend, compiler, id=f"{case}-{backend}-{compiler}")
        for case in one_case_per_op()
        for backend in backends(case.op)
        for compiler in ("aot_eager", "inductor")
        if compiler == "aot_eager" or backend != "triton" or DEVICE == "cuda"
    ],
)
def test_compiles_in_one_graph_with_dynamic_shapes(case, backend, compiler):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda inputs: testing.call(case, inputs, backend), backend=compiler, fullgraph=True, dynamic=True
    )
    for copies in (1, 2):  # the second batch must not need another graph
        inputs = case.inputs(torch.float32, DEVICE)
        inputs = {k: _more_images(k, v, copies) for k, v in inputs.items()}
        leaves = {k: inputs[k].requires_grad_() for k in case.grads if inputs.get(k) is not None}
        eager = testing.call(case, inputs, backend)
        out = compiled(inputs)
        torch.testing.assert_close(out, eager)
        tracked = [name for name in eager if eager[name].requires_grad]
        if not tracked:
            continue
        upstream = [torch.randn_like(eager[name]) for name in tracked]
        expected = torch.autograd.grad([eager[name] for name in tracked], list(leaves.values()), upstream)
        got = torch.autograd.grad([out[name] for name in tracked], list(leaves.values()), upstream)
        for name, a, b in zip(leaves, got, expected, strict=True):
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def _more_images(name, value, copies):
    per_image = ("x", "ids", "ids_restore", "images", "pred", "mask", "q", "k", "v", "qkv", "lse", "key_mask")
    per_image += ("values", "scores")  # queries are shared
    if not isinstance(value, torch.Tensor) or name not in per_image:
        return value
    return torch.cat([value] * copies)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("case", "backend"),
    [pytest.param(c, b, id=f"{c}-{b}") for c in one_case_per_op() if c.grads for b in backends(c.op)],
)
def test_nan_and_infinity_reach_the_output(case, backend, value):
    inputs = case.inputs(torch.float32, DEVICE)
    if "ids" in inputs:
        inputs["ids"][0, 0] = 0  # so that the first element is one of those that count
    inputs[case.grads[0]][(0,) * inputs[case.grads[0]].dim()] = value
    exact, _ = testing.oracle(case, inputs)
    outputs, _ = testing.run(case, inputs, backend)
    assert not next(iter(outputs.values())).isfinite().all()
    for name, out in outputs.items():
        assert torch.equal(out.isfinite(), exact[name].isfinite()), name


@pytest.mark.parametrize(
    ("case", "backend"),
    [pytest.param(c, b, id=f"{c}-{b}") for c in one_case_per_op() for b in backends(c.op)],
)
def test_autocast_changes_nothing(case, backend):
    inputs = case.inputs(HALF, DEVICE)
    plain, _ = testing.run(case, inputs, backend)
    with torch.autocast(DEVICE, dtype=HALF):
        under, _ = testing.run(case, inputs, backend)
    for name, out in under.items():
        assert out.dtype == plain[name].dtype
        assert torch.equal(out, plain[name])


@pytest.mark.parametrize("backend", ["reference"] + [b for b in ON_DEVICE if b != "reference"])
def test_double_backward_is_refused_not_wrong(backend):
    case = next(c for c in CASES if str(c) == "gather_tokens-plain")
    inputs = case.inputs(torch.float32, DEVICE)
    x = inputs["x"].requires_grad_()
    (grad,) = torch.autograd.grad(testing.call(case, inputs, backend)["output"].square().sum(), x, create_graph=True)
    if backend == "reference":
        grad.sum().backward()
        assert x.grad.isfinite().all()
    else:
        with pytest.raises(RuntimeError, match="double backward"):
            grad.sum().backward()
