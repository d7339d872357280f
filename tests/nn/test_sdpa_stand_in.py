"""The stand-in for ``F.scaled_dot_product_attention``, called as the original is."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from mimkernels.nn.sdpa import observing
from mimkernels.nn.sdpa import stand_in as _sdpa
from mimkernels.nn.sdpa.stand_in import scaled_dot_product_attention, stand_in
from tests.integrations.models import Seen


def qkv(*shape, keys=None):
    generator = torch.Generator().manual_seed(0)
    key_shape = shape if keys is None else (*shape[:2], keys, *shape[3:])
    return [torch.randn(sizes, generator=generator) for sizes in (shape, key_shape, key_shape)]


class Tagged(torch.Tensor):
    """A subclass that stays itself in whatever PyTorch computes."""


class Scaled(torch.Tensor):
    """A mask whose data mean nothing: what it does is in its ``__torch_function__``."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        assert func is F.scaled_dot_product_attention
        return args[2] * 3


@pytest.mark.parametrize("place", range(4))
def test_subclasses_are_for_pytorch(place):
    arguments, told = [*qkv(2, 3, 5, 8), torch.zeros(5, 5)], []
    arguments[place] = arguments[place].as_subclass(Tagged)
    made = stand_in(told.extend)(*arguments)
    assert type(made) is Tagged and torch.equal(made, F.scaled_dot_product_attention(*arguments))
    assert len(told) == 1 and "a Tagged, which computes by rules of its own" in told[0]


def test_masks_that_compute_do_so():
    q, k, v = qkv(2, 3, 5, 8)
    for mask in (torch.zeros(5, 5).as_subclass(Scaled), torch.zeros(2, 3, 5, 5).as_subclass(Scaled)):
        assert torch.equal(scaled_dot_product_attention(q, k, v, mask), v * 3)
        assert torch.equal(scaled_dot_product_attention(q, k, v, attn_mask=mask), v * 3)


@pytest.mark.parametrize("sizes", [(16, 16), (6, 16)], ids=str)
@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
def test_causal_biases_run_on_the_kernels(make, sizes):
    q, k, v = qkv(2, 3, sizes[0], 8, keys=sizes[1])
    seen = Seen()
    with observing(seen):
        made = scaled_dot_product_attention(q, k, v, make(*sizes))
    assert len(seen.calls) == 1
    torch.testing.assert_close(made, F.scaled_dot_product_attention(q, k, v, make(*sizes)), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="should not be used with causal=True"):
        scaled_dot_product_attention(q, k, v, make(*sizes), is_causal=True)
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, make(*sizes)), made, rtol=1e-5, atol=1e-6)


def test_the_result_can_be_viewed_as_pytorch_s():
    q, k, v = qkv(2, 3, 5, 8)
    wanted = F.scaled_dot_product_attention(q, k, v).view(6, 5, 8)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v).view(6, 5, 8), wanted)
    compiled = torch.compile(lambda *qkv: scaled_dot_product_attention(*qkv).view(6, 5, 8), fullgraph=True,
                             backend="aot_eager")  # fmt: skip
    torch.testing.assert_close(compiled(q, k, v), wanted)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v)
    assert out.transpose(1, 2).view(2, 5, 24).requires_grad


def test_what_forward_mode_has_no_kernels_for_is_not_remembered():
    _sdpa._known.clear()
    with torch.autograd.forward_ad.dual_level():
        _sdpa.kernels_refuse("cpu", torch.float32, 8)
        assert not _sdpa._known
    assert _sdpa.kernels_refuse("cpu", torch.float32, 8) is None and _sdpa._known


def test_torch_jit_trace_records_pytorch_s_function():
    q, k, v = qkv(2, 3, 5, 8)
    traced = torch.jit.trace(scaled_dot_product_attention, (q, k, v))
    assert "aten::scaled_dot_product_attention" in {node.kind() for node in traced.graph.nodes()}
    assert torch.equal(traced(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_a_mode_sees_the_kernels_and_does_not_prevent_them():
    seen = Seen()
    with observing(seen), torch.device("cpu"):
        scaled_dot_product_attention(*qkv(2, 3, 5, 8))
    assert len(seen.calls) == 1
