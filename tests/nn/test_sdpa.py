"""Calls of F.scaled_dot_product_attention in terms of mimkernels.attention: the same numbers, or a reason."""

import inspect
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from mimkernels.nn.sdpa import SDPAArguments, StatisticsRequest, as_attention, has_own_rules, refusals, sdpa
from mimkernels.nn.sdpa.stand_in import scaled_dot_product_attention
from mimkernels.testing import ROUNDING


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(shape=(2, 4, 7, 16), key_shape=None, dtype=torch.float32):
    key_shape = key_shape or shape
    return [drawn(*shape, dtype=dtype), drawn(*key_shape, seed=1, dtype=dtype), drawn(*key_shape, seed=2, dtype=dtype)]


def bools(*shape):
    kept = drawn(*shape, seed=3) > -0.3
    kept[..., 0] = True
    return kept


def nothing_for_query_2():
    mask = bools(7, 7)
    mask[2] = False
    return mask


CALLS = {
    "plain": (qkv(), {}),
    "[N, D]": (qkv((7, 16)), {}),
    "[B, N, D]": (qkv((2, 7, 16)), {}),
    "[A, B, H, N, D]": (qkv((3, 2, 4, 7, 16)), {}),
    "cross": (qkv((2, 4, 7, 16), (2, 4, 5, 16)), {}),
    "one query": (qkv((2, 4, 1, 16), (2, 4, 5, 16)), {}),
    "scale": (qkv(), {"scale": 0.3}),
    "causal": (qkv(), {"is_causal": True}),
    "causal, more queries": (qkv((2, 4, 7, 16), (2, 4, 5, 16)), {"is_causal": True}),
    "causal, more keys": (qkv((2, 4, 5, 16), (2, 4, 7, 16)), {"is_causal": True}),
    "keys of one image": (qkv((2, 4, 7, 16), (1, 4, 7, 16)), {}),
    "keys without batch": (qkv((2, 4, 7, 16), (4, 7, 16)), {}),
    "grouped heads": (qkv((2, 4, 7, 16), (2, 2, 7, 16)), {"enable_gqa": True}),
    "one key head": (qkv((2, 4, 7, 16), (2, 1, 7, 16)), {"enable_gqa": True}),
    "grouped heads without batch": (qkv((4, 7, 16), (2, 7, 16)), {"enable_gqa": True}),
    "bool [N, N]": (qkv(), {"attn_mask": bools(7, 7)}),
    "bool [B, 1, 1, N]": (qkv(), {"attn_mask": bools(2, 1, 1, 7)}),
    "bool [1, N]": (qkv(), {"attn_mask": bools(1, 7)}),
    "bool [B, H, N, N]": (qkv(), {"attn_mask": bools(2, 4, 7, 7)}),
    "bool, expanded": (qkv(), {"attn_mask": bools(2, 1, 1, 7).expand(2, 1, 7, 7)}),
    "bool, of one head": (qkv((2, 7, 16)), {"attn_mask": bools(2, 7, 7)}),
    "bool, cross": (qkv((2, 4, 7, 16), (2, 4, 5, 16)), {"attn_mask": bools(2, 1, 7, 5)}),
    "nothing to attend to": (qkv(), {"attn_mask": nothing_for_query_2()}),
    "nothing to attend to, float": (
        qkv(),
        {"attn_mask": torch.zeros(7, 7).masked_fill(~nothing_for_query_2(), float("-inf"))},
    ),
    "float [N, N]": (qkv(), {"attn_mask": drawn(7, 7, seed=4)}),
    "float [H, 1, N]": (qkv(), {"attn_mask": drawn(4, 1, 7, seed=4)}),
    "float [B, 1, N, 1]": (qkv(), {"attn_mask": drawn(2, 1, 7, 1, seed=4)}),
    "float [B, H, N, N]": (qkv(), {"attn_mask": drawn(2, 4, 7, 7, seed=4)}),
    "float, five dims": (qkv((3, 2, 4, 7, 16)), {"attn_mask": drawn(2, 1, 7, 7, seed=4)}),
    "float, one for all of five dims": (qkv((3, 2, 4, 7, 16)), {"attn_mask": drawn(7, 7, seed=4)}),
    "bf16": (qkv(dtype=torch.bfloat16), {}),
    "bf16, fp32 mask": (qkv(dtype=torch.bfloat16), {"attn_mask": drawn(7, 7, seed=4)}),
    "no keys": (qkv((2, 4, 7, 16), (2, 4, 0, 16)), {}),
    "causal, upper left": (qkv(), {"attn_mask": causal_upper_left(7, 7)}),
    "causal, upper left, more keys": (qkv((2, 4, 5, 16), (2, 4, 7, 16)), {"attn_mask": causal_upper_left(5, 7)}),
    "causal, upper left, more queries": (qkv((2, 4, 7, 16), (2, 4, 5, 16)), {"attn_mask": causal_upper_left(7, 5)}),
    "causal, lower right": (qkv(), {"attn_mask": causal_lower_right(7, 7)}),
    "causal, lower right, more keys": (qkv((2, 4, 5, 16), (2, 4, 7, 16)), {"attn_mask": causal_lower_right(5, 7)}),
    "causal bias of one head": (qkv((7, 16)), {"attn_mask": causal_upper_left(7, 7)}),
}


def exact(tensors, options):
    options = {k: v.double() if type(v) is torch.Tensor and v.is_floating_point() else v for k, v in options.items()}
    return F.scaled_dot_product_attention(*(tensor.double() for tensor in tensors), **options)


@pytest.mark.parametrize("name", CALLS)
def test_the_result_is_that_of_pytorch(name):
    tensors, options = CALLS[name]
    arguments = SDPAArguments(*tensors, **options)
    assert refusals(arguments) == []
    made, theirs = sdpa(arguments), F.scaled_dot_product_attention(*tensors, **options)
    right = exact(tensors, options)
    assert made.out.shape == theirs.shape and made.out.dtype == theirs.dtype
    # Largest weight and value bound the terms; twice PyTorch's own error besides.
    allowed = 2 * (theirs.double() - right).abs().max() + 4 * ROUNDING[theirs.dtype] * right.abs().max()
    assert (made.out.double() - right).abs().max() <= allowed


@pytest.mark.parametrize("name", ["grouped heads", "[A, B, H, N, D]", "float [H, 1, N]", "keys of one image", "causal"])
def test_gradients_are_those_of_pytorch(name):
    tensors, options = CALLS[name]

    def grads(function):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        given = dict(options)
        if "attn_mask" in given:
            leaves.append(given["attn_mask"].clone().requires_grad_())
            given["attn_mask"] = leaves[-1]
        function(*leaves[:3], **given).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    ours, theirs = grads(lambda *a, **k: sdpa(SDPAArguments(*a, **k)).out), grads(F.scaled_dot_product_attention)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_masks_of_keys_stay_one_row_per_image():
    q, k, v = qkv()
    for mask in (bools(2, 1, 1, 7), bools(2, 1, 1, 7).expand(2, 4, 7, 7)):
        call = as_attention(SDPAArguments(q, k, v, attn_mask=mask))
        assert call.bias is None and torch.equal(call.key_mask, mask[:, 0, 0])


def test_nothing_is_copied_of_what_the_kernels_can_read():
    packed = drawn(2, 7, 3, 4, 16)
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    call = as_attention(SDPAArguments(q, k, v))
    assert [t.data_ptr() for t in call[:3]] == [t.data_ptr() for t in (q, k, v)]
    one = k[:, :1]
    call = as_attention(SDPAArguments(q, one, one, enable_gqa=True))
    assert call.k.data_ptr() == one.data_ptr() and call.k.stride(1) == 0


def test_autocast_is_followed():
    q, k, v = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        assert refusals(SDPAArguments(q, k.bfloat16(), v)) == []
        assert sdpa(SDPAArguments(q, k.bfloat16(), v)).out.dtype == torch.bfloat16
        assert as_attention(SDPAArguments(q.double(), k.double(), v.double())).q.dtype == torch.float64


REFUSED = {
    "dropout": (qkv(), {"dropout_p": 0.1}, "dropout_p is 0.1"),
    "head dim": (qkv((1, 1, 3, 20)), {}, "head dim is 20"),
    "wide": (qkv((1, 1, 3, 136)), {}, "head dim is 136"),
    "fp64": (qkv(dtype=torch.float64), {}, "float64"),
    "dtypes": ([*qkv()[:2], qkv()[2].bfloat16()], {}, "dtypes differ"),
    "width of v": ([*qkv()[:2], drawn(2, 4, 7, 8)], {}, "head dims differ: query 16, key 16, value 8"),
    "mask and causal": (qkv(), {"attn_mask": bools(7, 7), "is_causal": True}, "got both"),
    "mask's shape": (qkv(), {"attn_mask": bools(5, 7)}, r"broadcast to \[2, 4, 7, 7\], got \[5, 7\]"),
    "mask's dtype": (qkv(), {"attn_mask": torch.ones(7, 7, dtype=torch.int)}, "bool or floating-point"),
    "a double mask": (qkv(), {"attn_mask": torch.ones(7, 7, dtype=torch.float64)}, "bool, fp32 or of query's dtype"),
    "a half mask": (qkv(), {"attn_mask": torch.ones(7, 7, dtype=torch.float16)}, "torch.float32, got torch.float16"),
    "no head dim": (qkv((1, 1, 3, 0)), {}, "head dim is 0"),
    "key heads": (qkv((2, 4, 7, 16), (2, 3, 7, 16)), {"enable_gqa": True}, "must be a multiple"),
    "batches": (qkv((2, 4, 7, 16), (3, 4, 7, 16)), {}, "do not fit"),
    "lengths": ([*qkv()[:2], drawn(2, 4, 5, 16)], {}, "differ in length"),
    "one dim": ([drawn(16)] * 3, {}, "query has 1 dims"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_what_was_given(name):
    import re

    tensors, options, message = REFUSED[name]
    found = refusals(SDPAArguments(*tensors, **options))
    assert found and re.search(message, "; ".join(found))


def test_dropout_is_never_dropped_silently():
    with pytest.raises(ValueError, match="no dropout"):
        sdpa(SDPAArguments(*qkv(), dropout_p=0.1))


class Tagged(torch.Tensor):
    """A subclass that stays itself in whatever PyTorch computes."""


@pytest.mark.parametrize("place", range(4))
def test_tensors_with_rules_of_their_own_are_refused(place):
    tensors = [*qkv(), drawn(7, 7)]
    assert refusals(SDPAArguments(*tensors)) == []
    tensors[place] = tensors[place].as_subclass(Tagged)
    name = ("query", "key", "value", "attn_mask")[place]
    assert refusals(SDPAArguments(*tensors)) == [f"{name} is a Tagged, which computes by rules of its own"]


def test_what_has_rules_of_its_own():
    from torch._subclasses.fake_tensor import FakeTensorMode

    plain = torch.ones(2)
    fake = FakeTensorMode().from_tensor(plain)
    with torch.device("cpu"):  # a mode
        for value in (None, plain, torch.nn.Parameter(plain), torch.nn.Buffer(plain), fake):
            assert not has_own_rules(value)
    assert has_own_rules(plain.as_subclass(Tagged)) and has_own_rules(causal_upper_left(2, 2))
    assert has_own_rules(torch.nested.nested_tensor([plain], layout=torch.jagged))
    assert has_own_rules(torch.fx.Proxy(torch.fx.Graph().placeholder("x"), torch.fx.Tracer()))


def test_causal_biases_are_refused_where_pytorch_refuses_them():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="should not be used with causal=True"):
        F.scaled_dot_product_attention(q, k, v, causal_upper_left(7, 7), is_causal=True)
    assert "got both" in refusals(SDPAArguments(q, k, v, causal_upper_left(7, 7), is_causal=True))[0]
    with pytest.raises(ValueError, match="got both"):
        sdpa(SDPAArguments(q, k, v, causal_upper_left(7, 7), is_causal=True))
    assert "must broadcast to [2, 4, 7, 7], got [5, 6]" in refusals(SDPAArguments(q, k, v, causal_lower_right(5, 6)))[0]


ORDERS = [order for order in permutations(range(4)) if order[3] == 3] + [(0, 1, 3, 2), (3, 2, 1, 0)]


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("mask", [None, drawn(7, 7, seed=4)], ids=["no mask", "mask"])
def test_the_result_lies_in_memory_as_pytorch_s(order, mask):
    shape = (2, 4, 7, 16)
    q, k, v = (t.permute([order.index(dim) for dim in range(4)]) for t in qkv(tuple(shape[dim] for dim in order)))
    assert q.shape == shape
    made, theirs = sdpa(SDPAArguments(q, k, v, mask)).out, F.scaled_dot_product_attention(q, k, v, mask)
    assert made.stride() == theirs.stride()
    torch.testing.assert_close(made, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["packed", "sliced", "one image", "other dtype", "three dims", "five dims"])
def test_the_result_of_views_lies_in_memory_as_pytorch_s(kind):
    q = {
        "packed": lambda: drawn(2, 7, 3, 4, 16).permute(2, 0, 3, 1, 4)[0],
        "sliced": lambda: drawn(2, 4, 9, 32)[:, :, 1:8, :16],
        "one image": lambda: drawn(1, 7, 4, 16).transpose(1, 2),
        "other dtype": lambda: drawn(2, 7, 4, 16).transpose(1, 2),
        "three dims": lambda: drawn(7, 2, 16).transpose(0, 1),
        "five dims": lambda: drawn(3, 2, 7, 4, 16).transpose(2, 3),
    }[kind]()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "other dtype"):
        made, theirs = sdpa(SDPAArguments(q, q, q)).out, F.scaled_dot_product_attention(q, q, q)
    assert made.shape == theirs.shape and made.dtype == theirs.dtype
    assert [step for step, size in zip(made.stride(), made.shape, strict=True) if size > 1] == [
        step for step, size in zip(theirs.stride(), theirs.shape, strict=True) if size > 1
    ]


def test_nothing_is_copied_of_a_result_that_lies_right():
    q, k, v = drawn(2, 7, 3, 4, 16).permute(2, 0, 3, 1, 4).unbind(0)
    out = sdpa(SDPAArguments(q, k, v)).out
    assert out.transpose(1, 2).is_contiguous() and out._base is not None


def test_statistics_come_with_the_result():
    made = sdpa(SDPAArguments(*qkv((3, 2, 4, 7, 16))), StatisticsRequest(("entropy", "prefix_mass"), num_prefix=2))
    assert made.out.shape == (3, 2, 4, 7, 16) and made.stats["entropy"].shape == (6, 4, 7) == made.lse.shape
    q, k, _ = qkv((3, 2, 4, 7, 16))
    p = (q @ k.transpose(-2, -1) / 4).softmax(-1).flatten(0, 1)
    torch.testing.assert_close(made.stats["entropy"], -(p * p.log()).sum(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made.stats["prefix_mass"], p[..., :2].sum(-1), rtol=1e-4, atol=1e-5)


def test_the_arguments_are_those_of_pytorch():
    """Names and order; its own defaults are not told by the function, which is not written in Python."""
    q, k, v = qkv()
    expected = F.scaled_dot_product_attention(q, k, v, bools(7, 7), 0.0, False, scale=0.3, enable_gqa=False)
    arguments = SDPAArguments(q, k, v, bools(7, 7), scale=0.3)
    assert torch.equal(F.scaled_dot_product_attention(**arguments._asdict()), expected)
    parameters = inspect.signature(scaled_dot_product_attention).parameters
    assert {name: p.default for name, p in parameters.items() if p.default is not p.empty} == (
        SDPAArguments._field_defaults
    )
    assert tuple(parameters) == SDPAArguments._fields
