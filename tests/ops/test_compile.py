"""torch.compile, torch.jit.trace and meta tensors: what traces an op sees what eager mode runs."""

import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import grad, vmap

import mimkernels as mk
from mimkernels.testing import named
from tests.calls import VARIANTS

IDS = torch.tensor([[0, 3], [5, 1]])
X = torch.randn(2, 6, 8)
Q = torch.randn(2, 2, 6, 8)
QUERY = torch.randn(1, 8)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


def whole(function, **options):
    return torch.compile(function, backend="aot_eager", fullgraph=True, **options)


def kernels(graphs):
    """A backend of torch.compile that notes what the graphs run."""

    def backend(graph, inputs):
        names = [str(node.target) for node in graph.graph.nodes if node.op in ("call_function", "call_method")]
        graphs.append(["reference" if name == "gather" else name for name in names if "gather" in name])
        return graph

    return backend


def test_random_masks_without_a_device():
    assert torch.equal(whole(lambda: mk.random_mask(2, 6, 3, 7).ids_keep)(), mk.random_mask(2, 6, 3, 7).ids_keep)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("call", "tensor"),
    [
        (lambda q: mk.attention(q, q, q).out, Q),
        (lambda q: mk.attention(q, q, q, stats=("entropy",)).stats["entropy"], Q),
        (lambda x: mk.query_pool(x, QUERY, values=x), X),
        (lambda x: mk.query_pool(x, x, values=x), X),
        (lambda x: mk.weighted_pool(x, x[..., 0]), X),
        (lambda x: mk.bias_gelu(x, x[0, 0]), X),
    ],
)
def test_one_tensor_given_twice(call, tensor, dynamic):
    leaf = tensor.clone().requires_grad_()
    out, expected = whole(call, dynamic=dynamic)(leaf), call(leaf)
    torch.testing.assert_close(out, expected)
    (ours,), (exact,) = (torch.autograd.grad(t.square().sum(), leaf) for t in (out, expected))
    torch.testing.assert_close(ours, exact)


def test_transforms_inside_a_compiled_function():
    stacked = torch.randn(3, 2, 6, 8)

    def pooled(x):
        return mk.reduce_pool(x, "mean", num_prefix=1)

    torch.testing.assert_close(whole(vmap(pooled))(stacked), torch.stack([pooled(x) for x in stacked]))
    compiled = whole(lambda x: grad(lambda t: pooled(t).square().sum())(x))(X)
    torch.testing.assert_close(compiled, grad(lambda t: pooled(t).square().sum())(X))


def test_compiled_code_follows_use_backend():
    graphs = []
    compiled = torch.compile(lambda x: mk.gather_tokens(x, IDS), backend=kernels(graphs), fullgraph=True)
    for _ in range(2):
        compiled(X)
        with mk.use_backend("reference"):
            compiled(X)
    assert graphs == [["mimkernels.gather_tokens_fwd.cpu"], ["reference"]]


def test_use_backend_inside_a_compiled_function():
    graphs = []

    def twice(x):
        with mk.use_backend("reference"):
            with mk.use_backend("cpu"), mk.use_backend("reference"):
                pass
            first = mk.gather_tokens(x, IDS)
        return first + mk.gather_tokens(x, IDS)

    out = torch.compile(twice, backend=kernels(graphs), fullgraph=True)(X)
    assert graphs == [["reference", "mimkernels.gather_tokens_fwd.cpu"]]
    torch.testing.assert_close(out, 2 * mk.gather_tokens(X, IDS))


@pytest.mark.skipif(torch.__version__ < "2.14", reason="torch.compile reads context variables since torch 2.14")
def test_compiled_code_does_not_follow_the_block_of_another_thread():
    graphs, entered, leave = [], threading.Event(), threading.Event()

    def elsewhere():
        with mk.use_backend("reference"):
            entered.set()
            leave.wait()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    entered.wait()
    torch.compile(lambda x: mk.gather_tokens(x, IDS), backend=kernels(graphs), fullgraph=True)(X)
    leave.set()
    thread.join()
    assert graphs == [["mimkernels.gather_tokens_fwd.cpu"]]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    ("call", "tensor"),
    [
        (lambda x: mk.reduce_pool(x, "mean"), X),
        (lambda x: mk.gather_tokens(x, IDS), X),
        (lambda x: mk.query_pool(x, QUERY), X),
        (lambda q: mk.attention(q, q, q).out, Q),
    ],
)
def test_a_traced_op_runs_where_it_was_traced_for(call, tensor):
    traced = torch.jit.trace(call, (tensor,))
    torch.testing.assert_close(traced(2 * tensor), call(2 * tensor))
    assert "mimkernels::" not in str(traced.graph)
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace records no overloads"), mk.use_backend("cpu"):
        torch.jit.trace(call, (tensor,))
    torch.testing.assert_close(call(tensor), traced(tensor))  # and later calls are not touched


@pytest.mark.parametrize("label", VARIANTS)
def test_meta_tensors_give_shapes(label):
    op, given = VARIANTS[label]

    def meta(name, value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.to("meta").requires_grad_(value.is_floating_point() and name not in ("positions", "drop"))

    def outputs(arguments):
        return named(getattr(mk, op)(**arguments))

    arguments = {name: meta(name, value) for name, value in given.items()}
    out, expected = outputs(arguments), outputs(given)
    assert out.keys() == expected.keys()
    for name, value in out.items():
        assert value.device.type == "meta"
        assert value.shape == expected[name].shape
        assert value.dtype == expected[name].dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [value.dtype for value in outputs(arguments).values()] == [value.dtype for value in expected.values()]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("label", VARIANTS)
def test_fake_tensors_give_shapes(label, backend):
    """Also where the reference would look at the ids, which have no values then."""
    op, given = VARIANTS[label]
    named_backend = {} if op == "attention_rows" else {"backend": backend}
    expected = named(getattr(mk, op)(**given, **named_backend))
    with FakeTensorMode() as mode:
        arguments = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for name, value in given.items()
        }
        out = named(getattr(mk, op)(**arguments, **named_backend))
    assert out.keys() == expected.keys()
    for name, value in out.items():
        assert isinstance(value, FakeTensor)
        assert (value.shape, value.dtype) == (expected[name].shape, expected[name].dtype)


def test_random_masks_have_a_meta_device_too():
    mask, expected = mk.random_mask(2, 6, 3, 0, device="meta").mask, mk.random_mask(2, 6, 3, 0).mask
    assert mask.device.type == "meta"
    assert (mask.shape, mask.dtype) == (expected.shape, expected.dtype)
