"""What no op takes, tried on every argument of every op: the refusal is in our words, also after good calls."""

import warnings

import pytest
import torch

import mimkernels as mk

NAN, INF = float("nan"), float("inf")
X = torch.randn(2, 6, 8)
IDS = torch.tensor([[0, 3], [5, 1]])
Q = torch.randn(1, 2, 6, 8)
IMAGES = torch.rand(2, 3, 8, 12)
STATISTICS = {"num_prefix": 1, "positions": torch.rand(5, 2), "stats": ("distance",)}

# Every op with all its tensors and options.
CALLS = {
    mk.gather_tokens: {"x": X, "ids": IDS, "pos": X[0], "prefix": X[0, :1]},
    mk.restore_tokens: {
        "x": X[:, :3],
        "ids_restore": torch.arange(6).expand(2, -1),
        "mask_token": X[0, 0],
        "pos": torch.randn(7, 8),
        "num_prefix": 1,
    },
    mk.fill_mask_tokens: {"x": X, "mask": torch.ones(2, 6), "mask_token": X[0, 0]},
    mk.patchify_gather: {"images": IMAGES, "ids": IDS, "patch_size": 4, "mean": [0.5] * 3, "std": [0.2] * 3},
    mk.masked_patch_loss: {
        "pred": torch.randn(2, 6, 48),
        "images": IMAGES,
        "mask": torch.ones(2, 6),
        "patch_size": 4,
        "norm_pix": False,
        "kind": "smooth_l1",
        "beta": 1.0,
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
    },
    mk.bias_gelu: {"x": X, "bias": X[0, 0]},
    mk.query_pool: {
        "x": X,
        "queries": X[0, :2],
        "values": X.clone(),
        "mask": torch.ones(2, 6).bool(),
        "scale": 1.0,
        "num_prefix": 1,
        "sliced": False,
    },
    mk.weighted_pool: {
        "x": X,
        "scores": X[..., 0],
        "mask": torch.ones(2, 6).bool(),
        "num_prefix": 1,
        "normalize": True,
    },
    mk.reduce_pool: {
        "x": X,
        "kind": "gem",
        "mask": torch.ones(2, 6).bool(),
        "num_prefix": 1,
        "p": torch.tensor([3.0]),
        "eps": 1e-6,
    },
    mk.mask_from_noise: {"noise": torch.rand(2, 6), "keep": 2},
    mk.random_mask: {"batch": 2, "tokens": 6, "keep": 2, "seed": 0, "offset": torch.tensor(1)},
    mk.attention: {
        "q": Q,
        "k": Q.clone(),
        "v": Q.clone(),
        "bias": torch.randn(1, 6, 6),
        "key_mask": torch.ones(1, 6).bool(),
        "scale": 1.0,
        **STATISTICS,
    },
    mk.attention_qkvpacked: {
        "qkv": torch.randn(1, 6, 3, 2, 8),
        "bias": torch.randn(1, 6, 6),
        "key_mask": torch.ones(1, 6).bool(),
        "scale": 1.0,
        **STATISTICS,
    },
}
for companion in (mk.received_attention, mk.head_divergence, mk.attention_rows):
    CALLS[companion] = {"q": Q, "k": Q.clone(), "lse": torch.randn(1, 2, 6), "bias": torch.randn(1, 6, 6), "scale": 1.0}
CALLS[mk.attention_rows]["rows"] = torch.tensor([0, 2])
del CALLS[mk.attention_rows]["lse"]


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


INTEGERS = {"num_prefix", "patch_size", "keep", "batch", "tokens", "seed", "offset"}
FLOATS = {"scale", "beta", "eps", "p"}
SWITCHES = {"norm_pix", "sliced", "normalize"}
WRONG = [
    (INTEGERS, (1.5, True, "1"), TypeError),
    (INTEGERS, (2**63, -1, 2**70), ValueError),
    (FLOATS, (True, "1", [1.0], 1j), TypeError),
    (FLOATS, (NAN, INF, -INF, 10**400), ValueError),
    (SWITCHES, ("x", 1.5, None, 2), TypeError),
]
OPTIONS = [
    (op, name, value, error)
    for op, given in CALLS.items()
    for names, values, error in WRONG
    for value in values
    for name in given
    if name in names
]


@pytest.mark.parametrize(("op", "name", "value", "error"), OPTIONS, ids=lambda v: label(v) or repr(v)[:12])
def test_an_option_of_another_kind_is_refused(op, name, value, error):
    op(**CALLS[op])
    for _ in range(2):
        with pytest.raises(error, match=rf"^{op.__name__}: .*\b{name}\b"):
            op(**{**CALLS[op], name: value})


@pytest.mark.parametrize(
    ("op", "changed", "error", "message"),
    [
        (mk.reduce_pool, {"eps": 0.0}, ValueError, "eps must be positive, got 0.0"),
        (mk.reduce_pool, {"kind": "mean", "eps": NAN}, ValueError, "eps must be finite, got nan"),
        (mk.masked_patch_loss, {"kind": "mse", "beta": NAN}, ValueError, "beta must be finite, got nan"),
        (mk.masked_patch_loss, {"std": [0.2, 0.0, 0.2]}, ValueError, "std must be positive, got 0.0"),
        (mk.patchify_gather, {"mean": [0.5, NAN, 0.5]}, ValueError, "mean must be finite, got nan"),
        (mk.patchify_gather, {"mean": torch.rand(3, requires_grad=True)}, TypeError, "mean gets no gradient"),
        (mk.patchify_gather, {"patch_size": (4, 2.0)}, TypeError, "patch_size must be an int, got float"),
        (mk.attention, {"scale": torch.tensor(1.0, requires_grad=True)}, TypeError, "scale gets no gradient"),
        (mk.attention_rows, {"rows": [0, 1.5]}, TypeError, "a row must be an int, got float"),
        (mk.random_mask, {"device": "nowhere", "offset": 0}, ValueError, "device 'nowhere'"),
        (mk.gather_tokens, {"backend": None}, TypeError, "backend must be a str, got NoneType"),
    ],
    ids=lambda v: label(v),
)
def test_refuses(op, changed, error, message):
    for _ in range(2):
        with pytest.raises(error, match=message):
            op(**{**CALLS[op], **changed})


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_heads_without_dimensions_attend_equally(backend):
    q = torch.zeros(1, 2, 4, 0, requires_grad=True)
    result = mk.attention(q, q, q, stats=("entropy", "self_mass"), backend=backend)
    assert result.out.shape == (1, 2, 4, 0)
    torch.testing.assert_close(result.lse, torch.full((1, 2, 4), 4.0).log())
    torch.testing.assert_close(result.stats["self_mass"], torch.full((1, 2, 4), 0.25))
    result.lse.sum().backward()
    out, weights = mk.query_pool(
        torch.zeros(2, 6, 0), torch.zeros(1, 0), values=X, return_weights=True, backend=backend
    )
    torch.testing.assert_close(out[:, 0], X.mean(1))
    torch.testing.assert_close(weights, torch.full((2, 1, 6), 1 / 6))
