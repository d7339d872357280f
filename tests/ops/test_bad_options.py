"""What no op takes, tried on every argument of every op: the refusal is in our words, also after good calls."""

import warnings

import pytest
import torch

import mimkernels as mk
from tests.calls import CALLS, numbers

NAN, INF = float("nan"), float("inf")


def jagged(t):
    return torch.nested.nested_tensor([t.float(), t.float()], layout=torch.jagged)


def mkldnn(t):
    return t.float().to_mkldnn()


KINDS = {
    "sparse": torch.Tensor.to_sparse,
    "sparse_csr": lambda t: t.float().reshape(1, -1).to_sparse_csr(),
    "nested": lambda t: torch.nested.nested_tensor([t.float(), t.float()]),
    "jagged": jagged,
    "mkldnn": mkldnn,
    "complex": lambda t: t.to(torch.complex64),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "meta": lambda t: t.to("meta"),
    "numpy": lambda t: t.numpy(),
}
TENSORS = [
    (op, name, kind)
    for op, given in CALLS.items()
    for name, value in given.items()
    for kind in KINDS
    if isinstance(value, torch.Tensor)
    and not (kind in ("mkldnn", "jagged") and value.dim() == 0)  # torch has none
    and not (kind == "meta" and name in ("noise", "offset"))  # then all is on meta
    and not (kind == "numpy" and name == "rows")  # a sequence of ints
]


def label(value):
    return getattr(value, "__name__", None)


@pytest.mark.parametrize("op", CALLS, ids=label)
def test_the_calls_are_good(op):
    for _ in range(2):
        op(**CALLS[op])


@pytest.mark.parametrize(("op", "name", "kind"), TENSORS, ids=label)
def test_a_tensor_of_another_kind_is_refused(op, name, kind):
    given = CALLS[op]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong = KINDS[kind](given[name])
    op(**given)
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=rf"^{op.__name__}: .*\b({name}|is on)\b"):
            op(**{**given, name: wrong})


# By the type of a good value: bad ones, and the error that they get.
WRONG = {
    int: [((1.5, True, "1"), TypeError), ((2**63, -1, 2**70), ValueError)],
    float: [((True, "1", [1.0], 1j), TypeError), ((NAN, INF, -INF, 10**400, 1e39), ValueError)],
    bool: [(("x", 1.5, None, 2), TypeError)],
}
OPTIONS = [
    (op, name, value, error)
    for op, given in CALLS.items()
    for name, good in {**given, **numbers(op.__name__)}.items()
    for values, error in WRONG.get(type(good), ())
    for value in values
    if not (name == "ignore_index" and value == -1)  # any number that is no class
]


@pytest.mark.parametrize(("op", "name", "value", "error"), OPTIONS, ids=lambda v: label(v) or repr(v)[:12])
def test_an_option_of_another_kind_is_refused(op, name, value, error):
    op(**CALLS[op])
    for _ in range(2):
        with pytest.raises(error, match=rf"^{op.__name__}: .*\b{name}\b"):
            op(**{**CALLS[op], name: value})


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, given in CALLS.items() for name in ("eps", "beta", "p") if name in given]
)
def test_a_positive_number_that_fp32_does_not_hold_is_refused(op, name):
    for value in (1e-46, torch.finfo(torch.float64).tiny):
        with pytest.raises(ValueError, match=rf"^{op.__name__}: {name} must be at least 1.4012985e-45.*, got {value}"):
            op(**{**CALLS[op], name: value})


@pytest.mark.parametrize(("op", "name"), [(mk.attention, "stats"), (mk.attention_rows, "rows")])
def test_a_number_in_place_of_a_sequence_is_refused(op, name):
    for _ in range(2):
        with pytest.raises(TypeError, match=rf"^{op.__name__}: {name} must be .*, got 5"):
            op(**{**CALLS[op], name: 5})


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_heads_without_dimensions_attend_equally(backend):
    q = torch.zeros(1, 2, 4, 0, requires_grad=True)
    result = mk.attention(q, q, q, stats=("entropy", "self_mass"), backend=backend)
    assert result.out.shape == (1, 2, 4, 0)
    torch.testing.assert_close(result.lse, torch.full((1, 2, 4), 4.0).log())
    torch.testing.assert_close(result.stats["self_mass"], torch.full((1, 2, 4), 0.25))
    result.lse.sum().backward()
    values = torch.randn(2, 6, 8)
    out, weights = mk.query_pool(
        torch.zeros(2, 6, 0), torch.zeros(1, 0), values=values, return_weights=True, backend=backend
    )
    torch.testing.assert_close(out[:, 0], values.mean(1))
    torch.testing.assert_close(weights, torch.full((2, 1, 6), 1 / 6))
