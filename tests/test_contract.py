"""Every op on every backend: the float64 oracle, gradients, determinism, opcheck, torch.compile."""

import re
from pathlib import Path

import pytest
import torch

import mimkernels
from mimkernels import testing
from mimkernels.ops._registry import BACKENDS, SPECS, backend_state
from mimkernels.testing import DEVICE
from tests.cases import OPS, cases, ops_with, part_of, rich, stated

ON_DEVICE = {
    "cpu": ("cpu", "triton", "cuda-emulated", "reference"),
    "cuda": ("triton", "cuda", "reference"),
}[DEVICE]
CASES = cases()
RICH_CASES = [rich(op) for op in OPS]
INTERPRETED = DEVICE == "cpu"  # what Triton is then, at a thousandth of the speed
HALF = torch.float16  # the interpreter's bf16 products are wrong
OF_CPU = ("table-too-large-to-keep",)  # beyond a limit that only the CPU's kernels have
ONCE = ("length-197", "length-257", "table-many-images")  # interpreted, in one dtype
LONG = (*ONCE, "length-256", "length-1025", "empty-positions-long", "long")


def backends(op: str) -> list[str]:
    return [name for name in testing.backends(op) if name in ON_DEVICE]


def kernels(op: str) -> list[str]:
    return [name for name in backends(op) if name != "reference"]


def runs(case: testing.Case, backend: str) -> list[tuple[torch.dtype, str]]:
    """The dtypes and layouts in which a case is compared with the oracle.

    Layouts other than the contiguous are the launcher's matter and the same for all cases of an op: rows apart are
    strides, a last dim that is not contiguous is copied before the kernel. One case is enough for each.
    """
    if INTERPRETED and backend == "triton":
        return interpreted_runs(case)
    if backend == "cuda-emulated" and case.label in OF_CPU:
        return []
    made = [(dtype, "contiguous") for dtype in case.dtypes]
    if backend == "cuda-emulated" and case.label == "length-1025":
        return made[:1]
    return made + [(case.dtypes[0], layout) for layout in ("strided", "permuted") if case in RICH_CASES]


def interpreted_runs(case: testing.Case) -> list[tuple[torch.dtype, str]]:
    """fp32; fp16 where it takes other products; of 16 bits and of other layouts one case each."""
    products = stated(case.op, "MATRIX_PRODUCTS", False)
    dtypes = [dtype for dtype in case.dtypes if dtype != torch.bfloat16 or not products]
    if case.label in (*LONG, *OF_CPU):
        return [(dtypes[0], "contiguous")] if case.label in ONCE else []
    if case in RICH_CASES:
        return [(dtype, "contiguous") for dtype in dtypes] + [(dtypes[0], "strided"), (dtypes[0], "permuted")]
    return [(dtype, "contiguous") for dtype in (dtypes if products else dtypes[:1])]


def note_ours(op, args):
    return (op, args) if op.namespace == "mimkernels" else None


@pytest.mark.parametrize("backend", ON_DEVICE)
def test_backend_is_here(backend):
    assert backend in BACKENDS, f"required here, but not built: {backend}"
    assert backend_state(backend) is None, f"required here: {backend_state(backend)}"


def registered() -> set[str]:
    """Names of the torch ops that have a kernel of some backend, such as ``gather_tokens_fwd.cpu``."""
    keys = ("CPU", "CUDA", "CompositeExplicitAutograd")
    names = [name for key in keys for name in torch._C._dispatch_get_registrations_for_dispatch_key(key)]
    return {name.removeprefix("mimkernels::") for name in names if re.match(r"mimkernels::\w+\.\w+", name)}


@pytest.mark.parametrize("op", sorted({*SPECS, *(re.sub(r"_[a-z]+\.\w+", "", name) for name in registered())}))
def test_every_kernel_has_a_row_and_every_row_its_kernels(op):
    spec = SPECS[op]
    ops_of_rows = {
        f"{schema}.{backend.replace('-', '_')}"
        for backend in testing.backends(op)
        if backend == "triton" or (backend != "reference" and backend_state(backend) is None)
        for schema in spec.schemas
    }
    assert {name for name in registered() if re.fullmatch(rf"{op}_[a-z]+\.\w+", name)} == ops_of_rows
    file = Path(mimkernels.__file__).parent / "ops" / op / "triton.py"
    assert file.exists() == ("triton" in testing.backends(op))


@pytest.mark.parametrize("op", SPECS)
def test_the_last_resort_is_the_reference(op):
    rows = SPECS[op].impls
    names = [impl.backend for impl in rows if impl.backend != "cuda-emulated"]
    assert names[-1] == "reference", f"{op}: the reference must come last, got {names}"
    assert set(rows[len(names) - 1].dtypes) >= {dtype for impl in rows for dtype in impl.dtypes}


def test_every_public_op_has_cases_calls_and_known_answers():
    public = {name for name in mimkernels.ops.__all__ if callable(getattr(mimkernels, name)) and name.islower()}
    public.remove("use_backend")
    with_backends = {op for op in public if testing.folder(op) in SPECS}
    assert set(OPS) == with_backends
    assert set(SPECS) == {testing.spec(op).name for op in OPS}
    assert set(ops_with("test_known_answers")) == set(ops_with("calls")) == public
    for op in OPS:
        assert callable(part_of(op, "test_known_answers").definition)


@pytest.mark.parametrize("op", OPS)
def test_every_optional_tensor_is_given_empty_somewhere(op):
    """An empty tensor has no address: it must not be taken for one that is not given."""
    spec = testing.spec(op)
    optional = set(re.findall(r"Tensor\? (\w+)", spec.schemas[f"{spec.name}_fwd"])) - set(stated(op, "NEVER_EMPTY", ()))
    public = {schema: name for name, schema in stated(op, "SCHEMA_NAMES", {}).items()}
    given = [case.inputs(case.dtypes[0]) for case in cases(op)]
    for name in (public.get(name, name) for name in optional):
        values = [inputs[name] for inputs in given if inputs.get(name) is not None]
        assert any(value.numel() == 0 if isinstance(value, torch.Tensor) else not value for value in values), name


@pytest.mark.parametrize(
    ("case", "backend", "dtype", "layout"),
    [
        pytest.param(case, backend, dtype, layout, id=f"{case}-{backend}-{str(dtype)[6:]}-{layout}")
        for case in CASES
        for backend in kernels(case.op)
        for dtype, layout in runs(case, backend)
    ],
)
def test_matches_the_float64_oracle(case, backend, dtype, layout, poisoned):
    outputs, grads = testing.check(case, backend, dtype, DEVICE, layout)
    if INTERPRETED and backend in ("triton", "cuda-emulated"):  # one program after the other, twice the same
        return
    again, grads_again = testing.run(case, case.inputs(dtype, DEVICE, layout), backend)
    for name, out in outputs.items():
        assert torch.equal(out.nan_to_num(), again[name].nan_to_num()), f"two runs gave different bits of {name}"
    for name, grad in grads.items():
        assert torch.equal(grad, grads_again[name]), f"two runs gave different gradients of {name}"


@pytest.mark.parametrize("case", [case for case in CASES if case.grads], ids=str)
def test_reference_gradients_are_the_numerical_ones(case):
    inputs = testing.doubled(case.inputs(torch.float64))
    names = [name for name in case.grads if inputs.get(name) is not None and inputs[name].numel()]
    if not names:  # shapes of nothing, which the oracle's gradients are compared with
        return
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
        if backend == "cpu" or case in RICH_CASES  # shape functions are shared by the backends
        # opcheck itself stumbles over views of no images, and takes NaN for different from NaN.
        if case.label not in ("no-images", *stated(case.op, "NO_OPCHECK", ()))
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


def compilers(op: str, backend: str) -> tuple[str, ...]:
    """Backends of torch.compile.

    A kernel of any backend is the same call to it, of the same shapes: once per op is enough, by Inductor, which
    begins as aot_eager does, and for two ops each of the others. What the schemas of a backend say of themselves,
    test_opcheck asks. Of the reference Inductor sees ops of torch alone.
    """
    if backend in ("cpu", "cuda") or DEVICE == "cuda":
        return ("inductor",)
    return ("aot_eager",) if backend == "reference" or op in ("attention", "gather_tokens") else ()


@pytest.mark.parametrize(
    ("case", "backend", "compiler"),
    [
        pytest.param(case, backend, compiler, id=f"{case}-{backend}-{compiler}")
        for case in RICH_CASES
        for backend in backends(case.op)
        for compiler in compilers(case.op, backend)
    ],
)
def test_compiles_in_one_graph_with_dynamic_shapes(case, backend, compiler):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda inputs: testing.call(case, inputs, backend), backend=compiler, fullgraph=True, dynamic=True
    )
    for copies in (1, 2):  # the second batch must not need another graph
        inputs = case.inputs(torch.float32, DEVICE)
        inputs.update((k, more_images(inputs[k], copies)) for k in stated(case.op, "PER_IMAGE") if k in inputs)
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


def more_images(value, copies):
    """A tensor of a larger batch, or the larger batch size."""
    if isinstance(value, int):
        return value * copies
    return value if value is None else torch.cat([value] * copies)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("op", "backend"), [(op, backend) for op in OPS if stated(op, "SPOILED") for backend in backends(op)]
)
def test_nan_and_infinity_reach_the_output(op, backend, value):
    case, spoiled = rich(op), stated(op, "SPOILED")
    inputs = case.inputs(torch.float32, DEVICE)
    if "ids" in inputs:
        inputs["ids"][0, 0] = 0  # so that the first element is one of those that count
    inputs[spoiled][(0,) * inputs[spoiled].dim()] = value
    exact, _ = testing.oracle(case, inputs)
    outputs, _ = testing.run(case, inputs, backend)
    assert not next(iter(outputs.values())).isfinite().all()
    for name, out in outputs.items():
        assert torch.equal(out.isfinite(), exact[name].isfinite()), name


@pytest.mark.parametrize(
    ("case", "backend"),
    [pytest.param(c, b, id=f"{c}-{b}") for c in RICH_CASES for b in backends(c.op)],
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
