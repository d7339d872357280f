"""xformers' operators by their names, against plain PyTorch statements of them."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from mimkernels.integrations import xformers as xops
from mimkernels.nn.sdpa import observing


def qkv(*shape, keys=None, seed=0):
    torch.manual_seed(seed)
    key_shape = shape if keys is None else (shape[0], keys, *shape[2:])
    tensors = torch.randn(shape), torch.randn(key_shape), torch.randn(key_shape)
    return [tensor.requires_grad_() for tensor in tensors]


def plain(q, k, v, bias=None, scale=None):
    """``[B, M, H, K]`` with the whole attention matrix, in fp64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias.double()
    return (scores.softmax(-1) @ v).transpose(1, 2)


def assert_same(made, wanted, inputs):
    torch.testing.assert_close(made.double(), wanted, atol=2e-6, rtol=2e-5)
    weights = torch.randn(made.shape, generator=torch.Generator().manual_seed(7))
    ours = torch.autograd.grad((made * weights).sum(), inputs, retain_graph=True)
    theirs = torch.autograd.grad((wanted * weights).sum(), inputs)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, atol=5e-6, rtol=5e-5)


class Calls:
    """Counts the calls that mimkernels.attention gets, and their shapes."""

    def __init__(self):
        self.shapes = []

    def run(self, call):
        from mimkernels.ops import attention

        self.shapes.append(tuple(call.q.shape))
        return attention(call.q, call.k, call.v, **call.options)

    def watch(self, call, note=""):
        self.shapes.append(tuple(call.q.shape))


@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_in_bmhk(scale):
    q, k, v = qkv(2, 9, 3, 16, keys=7)
    assert_same(xops.memory_efficient_attention(q, k, v, scale=scale), plain(q, k, v, scale=scale), (q, k, v))


def test_the_result_is_contiguous_and_of_the_asked_dtype():
    q, k, v = qkv(2, 9, 3, 16)
    out = xops.memory_efficient_attention(q, k, v, output_dtype=torch.float64)
    assert out.shape == q.shape and out.is_contiguous() and out.dtype == torch.float64


def test_three_dims_are_one_head():
    q, k, v = qkv(4, 9, 16)
    bias = torch.randn(4, 9, 9)
    wanted = plain(q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2), bias.unsqueeze(1)).squeeze(2)
    assert_same(xops.memory_efficient_attention(q, k, v, bias), wanted, (q, k, v))


def test_a_bias_gets_gradients():
    q, k, v = qkv(2, 9, 3, 16)
    bias = torch.randn(2, 3, 9, 9, requires_grad=True)
    assert_same(xops.memory_efficient_attention(q, k, v, bias), plain(q, k, v, bias), (q, k, v, bias))


def test_views_of_a_packed_projection():
    packed = torch.randn(2, 9, 3, 4, 16, requires_grad=True)
    q, k, v = xops.unbind(packed, 2)
    assert_same(xops.memory_efficient_attention(q, k, v), plain(*packed.unbind(2)), (packed,))


def test_causal():
    q, k, v = qkv(2, 9, 3, 16)
    bias = torch.full((9, 9), float("-inf")).triu(1)
    made = xops.memory_efficient_attention(q, k, v, attn_bias=xops.LowerTriangularMask())
    assert_same(made, plain(q, k, v, bias), (q, k, v))


def test_the_causal_mask_is_written_out_as_it_computes():
    q, k, v = qkv(2, 9, 3, 16, keys=7)
    mask = xops.LowerTriangularMask()
    bias = mask.materialize((2, 3, 9, 7), dtype=torch.float64)
    assert bias.shape == (2, 3, 9, 7) and bias.dtype == torch.float64
    assert torch.equal(bias[1, 2] == 0, torch.ones(9, 7, dtype=torch.bool).tril())
    assert set(bias.unique().tolist()) == {0.0, float("-inf")}
    assert_same(xops.memory_efficient_attention(q, k, v, mask), plain(q, k, v, bias), (q, k, v))


@pytest.mark.parametrize("dims", [3, 4])
@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
def test_causal_biases_of_torch(make, dims):
    q, k, v = qkv(2, 6, 3, 16, keys=9)
    if dims == 3:
        q, k, v = (x[:, :, 0] for x in (q, k, v))
    made = xops.memory_efficient_attention(q, k, v, attn_bias=make(6, 9))
    bias = torch.zeros(6, 9).masked_fill(~torch.ones(6, 9, dtype=torch.bool).tril(0 if "upper" in str(make) else 3),
                                         float("-inf"))  # fmt: skip
    q, k, v = (x.unsqueeze(2) if dims == 3 else x for x in (q, k, v))
    torch.testing.assert_close(made.double().reshape(q.shape), plain(q, k, v, bias), rtol=1e-5, atol=1e-5)


def test_masks_that_are_tensors_and_can_be_written_out_are():
    class Mask(torch.Tensor):
        def materialize(self, shape, dtype, device):
            return torch.full(shape, 2.0, dtype=dtype, device=device).tril()

    q, k, v = qkv(2, 9, 3, 16)
    made = xops.memory_efficient_attention(q, k, v, torch.zeros(9, 9).as_subclass(Mask))
    torch.testing.assert_close(made.double(), plain(q, k, v, torch.full((9, 9), 2.0).tril()), rtol=1e-5, atol=1e-5)


def test_dropout_goes_to_pytorch():
    q, k, v = qkv(2, 9, 3, 16)
    torch.manual_seed(3)
    made = xops.memory_efficient_attention(q, k, v, p=0.4)
    torch.manual_seed(3)
    wanted = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), dropout_p=0.4).transpose(1, 2)
    assert torch.equal(made, wanted) and not torch.allclose(made, plain(q, k, v).float())


@pytest.mark.parametrize(
    "lengths, batches",
    [
        ([5, 5, 5, 3, 3], [(3, 5), (2, 3)]),  # side by side, as DINOv2 packs its crops
        ([5, 3, 5, 3, 5], [(3, 5), (2, 3)]),  # interleaved
        ([4], [(1, 4)]),
        ([2, 7, 1, 6], [(1, 2), (1, 7), (1, 1), (1, 6)]),
        ([3, 0, 3], [(2, 3)]),
    ],
    ids=str,
)
def test_packed_sequences_attend_to_themselves_only(lengths, batches):
    q, k, v = qkv(1, sum(lengths), 2, 16)
    mask = xops.fmha.BlockDiagonalMask.from_seqlens(lengths)
    calls = Calls()
    with observing(calls):
        made = xops.memory_efficient_attention(q, k, v, attn_bias=mask)
    bias = mask.materialize((1, 2, sum(lengths), sum(lengths)))
    assert (bias == 0).sum() == 2 * sum(length**2 for length in lengths)
    assert_same(made, plain(q, k, v, bias), (q, k, v))
    assert sorted((b, n) for b, _, n, _ in calls.shapes) == sorted(batches)  # equal lengths in one call


def test_packed_cross_attention():
    queries, keys = [4, 2, 4], [3, 6, 3]
    q, k, v = qkv(1, 10, 2, 16, keys=12)
    mask = xops.BlockDiagonalMask.from_seqlens(queries, keys)
    assert_same(
        xops.memory_efficient_attention(q, k, v, mask), plain(q, k, v, mask.materialize((1, 2, 10, 12))), (q, k, v)
    )


def test_pack_and_split_are_inverse():
    tensors = [torch.randn(3, 5, 8), torch.randn(2, 4, 8), torch.randn(1, 5, 8)]
    mask, packed = xops.BlockDiagonalMask.from_tensor_list(tensors)
    assert packed.shape == (1, 28, 8) and mask.q_seqlen == [5, 5, 5, 4, 4, 5]
    for part, tensor in zip(mask.split(packed), tensors, strict=True):
        assert torch.equal(part, tensor)
    # As DINOv2 does it.
    again = xops.BlockDiagonalMask.from_seqlens([5, 5, 5, 4, 4, 5])
    assert [part.shape[1] for part in again.split(packed)] == [5, 5, 5, 4, 4, 5]
    again._batch_sizes = [3, 2, 1]
    assert [tuple(part.shape) for part in again.split(packed)] == [(3, 5, 8), (2, 4, 8), (1, 5, 8)]


def test_empty_batches_are_split_to_what_they_were():
    tensors = [torch.randn(0, 3, 8), torch.randn(2, 4, 8), torch.randn(0, 5, 8)]
    mask, packed = xops.BlockDiagonalMask.from_tensor_list(tensors)
    assert [part.shape for part in mask.split(packed)] == [tensor.shape for tensor in tensors]
    mask, packed = xops.BlockDiagonalMask.from_tensor_list(tensors[:1])
    assert packed.shape == (1, 0, 8) and [part.shape for part in mask.split(packed)] == [(0, 3, 8)]


@pytest.mark.parametrize("with_values", [True, False])
def test_queries_keys_and_values_are_packed_together(with_values):
    queries = [torch.randn(2, 5, 2, 16), torch.randn(0, 7, 2, 16), torch.randn(1, 4, 2, 16)]
    keys, values = ([torch.randn(b, n, 2, 16) for b, n in ((2, 3), (0, 1), (1, 6))] for _ in range(2))
    mask, q, k, v = xops.fmha.BlockDiagonalMask.from_tensor_lists_qkv(queries, keys, values if with_values else None)
    assert (mask.q_seqlen, mask.kv_seqlen) == ([5, 5, 4], [3, 3, 6])
    assert (q.shape, k.shape) == ((1, 14, 2, 16), (1, 12, 2, 16)) and (v is not None) == with_values
    out = mask.split(xops.memory_efficient_attention(q, k, v if with_values else k, mask))
    for made, one, key, value in zip(out, queries, keys, values if with_values else keys, strict=True):
        wanted = xops.memory_efficient_attention(one, key, value) if len(one) else one
        torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)


def test_lists_that_do_not_belong_together_are_refused():
    q, k = [torch.randn(2, 5, 8)], [torch.randn(2, 3, 8)]
    with pytest.raises(ValueError, match=r"tensors_k .*\[\].*\[\[2\]\]"):
        xops.BlockDiagonalMask.from_tensor_lists_qkv(q, [])
    with pytest.raises(ValueError, match=r"tensors_k .*\[\[3\]\].*\[\[2\]\]"):
        xops.BlockDiagonalMask.from_tensor_lists_qkv(q, [torch.randn(3, 5, 8)])
    with pytest.raises(ValueError, match=r"tensors_v .*\[\[2, 4\]\].*\[\[2, 3\]\]"):
        xops.BlockDiagonalMask.from_tensor_lists_qkv(q, k, [torch.randn(2, 4, 8)])


def test_masks_of_xformers_itself():
    attn_bias = pytest.importorskip("xformers.ops.fmha.attn_bias")
    q, k, v = qkv(1, 12, 2, 16)
    theirs = attn_bias.BlockDiagonalMask.from_seqlens([5, 4, 3], device=torch.device("cpu"))
    made = xops.memory_efficient_attention(q, k, v, theirs)
    assert torch.equal(made, xops.memory_efficient_attention(q, k, v, xops.BlockDiagonalMask.from_seqlens([5, 4, 3])))
    # Derived masks mean something else: they are written out.
    for other in (theirs.make_causal(), attn_bias.LowerTriangularMask()):
        wanted = plain(q, k, v, other.materialize((1, 2, 12, 12)))
        assert_same(xops.memory_efficient_attention(q, k, v, other), wanted, (q, k, v))


def test_index_select_cat():
    torch.manual_seed(0)
    sources = [torch.randn(6, 4, requires_grad=True), torch.randn(3, 10, requires_grad=True)]
    for indices in ([torch.tensor([4, 0, 2]), torch.tensor([2])], [torch.randperm(6), torch.randperm(3)]):
        made = xops.index_select_cat(sources, indices)
        wanted = torch.cat([s.double()[i].flatten() for s, i in zip(sources, indices, strict=True)])
        assert_same(made, wanted, sources)


@pytest.mark.parametrize("index", [[4, 1], [0, 1, 2, 3, 4], []], ids=["some", "all", "none"])
@pytest.mark.parametrize("scaled", [True, False])
def test_scaled_index_add(index, scaled):
    torch.manual_seed(0)
    x, source = torch.randn(5, 3, 4, requires_grad=True), torch.randn(len(index), 3, 4, requires_grad=True)
    scaling = torch.randn(4, requires_grad=True) if scaled else None
    index = torch.tensor(index, dtype=torch.int64)
    start = x * 1
    made = xops.scaled_index_add(start, index, source, scaling, alpha=2.5)
    assert made is start  # in place
    factor = scaling.double() if scaled else 1.0
    wanted = torch.index_add(x.double(), 0, index, factor * source.double(), alpha=2.5)
    assert_same(made, wanted, (x, source, scaling) if scaled else (x, source))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scaled_index_add_rounds_its_gradients_once(dtype):
    torch.manual_seed(0)
    x, source, scaling = torch.randn(5, 7, 64), torch.randn(3, 7, 64), torch.randn(64)
    x, source, scaling = (tensor.to(dtype).requires_grad_() for tensor in (x, source, scaling))
    index, weights = torch.tensor([4, 0, 1]), torch.randn(5, 7, 64).to(dtype)
    made = xops.scaled_index_add(x * 1, index, source, scaling, alpha=0.7)
    assert made.dtype == dtype
    product = (source.double() * scaling.double() * 0.7).to(dtype)
    assert torch.equal(made, (x * 1).index_add(0, index, product))
    got = torch.autograd.grad((made * weights).sum(), (source, scaling))
    upstream = weights[index].double()
    wanted = upstream * scaling.double() * 0.7, (upstream * source.double() * 0.7).sum((0, 1))
    assert got[0].dtype == got[1].dtype == dtype
    assert torch.equal(got[0], wanted[0].to(dtype))
    torch.testing.assert_close(got[1], wanted[1].to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


def test_a_block_of_dinov2_with_stochastic_depth():
    """The steps of its nested block on crops of two sizes, keeping every image: equal to running each size alone."""
    torch.manual_seed(0)
    linear, proj, gamma = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32), torch.rand(32)
    crops = [torch.randn(2, 10, 32), torch.randn(4, 5, 32)]

    def attend(x, mask):
        packed = linear(x).reshape(*x.shape[:2], 3, 2, 16)
        out = xops.memory_efficient_attention(*xops.unbind(packed, 2), attn_bias=mask)
        return proj(out.flatten(2))

    kept = [torch.randperm(2), torch.randperm(4)]
    mask = xops.fmha.BlockDiagonalMask.from_seqlens([10] * 2 + [5] * 4)
    mask._batch_sizes = [2, 4]
    packed = xops.index_select_cat([crop.flatten(1) for crop in crops], kept).view(1, -1, 32)
    residuals = mask.split(attend(packed, mask))
    for crop, ids, residual in zip(crops, kept, residuals, strict=True):
        made = xops.scaled_index_add(crop.clone(), ids, residual, scaling=gamma, alpha=1.0)
        torch.testing.assert_close(made, crop + gamma * attend(crop, None), atol=1e-5, rtol=1e-5)


def test_refusals_name_what_is_wrong():
    q, k, v = qkv(1, 9, 3, 16)
    mask = xops.BlockDiagonalMask.from_seqlens([4, 4])
    with pytest.raises(ValueError, match=r"query \[1, 9, 3, 16\] must be \[1, 8, H, K\]"):
        xops.memory_efficient_attention(q, k, v, mask)
    with pytest.raises(ValueError, match=r"\[1, 9, 3, 16\] must be \[1, 8, ...\]"):
        mask.split(q)
    with pytest.raises(ValueError, match="2 lengths of queries but 1 of keys"):
        xops.BlockDiagonalMask.from_seqlens([4, 4], [8])
    with pytest.raises(TypeError, match="must be a tensor or a mask, got str"):
        xops.memory_efficient_attention(q, k, v, "causal")
    with pytest.raises(NotImplementedError, match=r"\[B, M, H, K\] or \[B, M, K\], got \[1, 9, 1, 3, 16\]"):
        xops.memory_efficient_attention(*(x.unsqueeze(2) for x in (q, k, v)))
    with pytest.raises(NotImplementedError, match="op must be None"):
        xops.memory_efficient_attention(q, k, v, op=object())


def test_xformers_is_not_imported():
    code = "import sys, mimkernels.integrations.xformers; sys.exit('xformers' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
