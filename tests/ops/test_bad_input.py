"""Bad input is refused before anything runs, by every backend, showing both sides."""

import pytest
import torch

import mimkernels as mk
from mimkernels.testing import DEVICE

HERE = ("cpu", "triton", "reference") if DEVICE == "cpu" else ("triton", "reference")
X = torch.randn(2, 6, 8)
IDS = torch.tensor([[0, 3], [5, 1]])
RESTORE = torch.arange(6).expand(2, -1)
TOKEN = torch.randn(8)
IMAGES = torch.rand(2, 3, 8, 12)
PRED = torch.randn(2, 2, 48)


def gather(**changed):
    return mk.gather_tokens(**{"x": X, "ids": IDS, **changed})


def restore(**changed):
    return mk.restore_tokens(**{"x": X[:, :3], "ids_restore": RESTORE, "mask_token": TOKEN, **changed})


def fill(**changed):
    return mk.fill_mask_tokens(**{"x": X, "mask": torch.ones(2, 6), "mask_token": TOKEN, **changed})


def patchify(**changed):
    return mk.patchify_gather(**{"images": IMAGES, "ids": IDS, "patch_size": 4, **changed})


def loss(**changed):
    return mk.masked_patch_loss(**{"pred": PRED, "images": IMAGES, "ids": IDS, "patch_size": 4, **changed})


def query_pool(**changed):
    return mk.query_pool(**{"x": X, "queries": TOKEN[None], **changed})


def weighted_pool(**changed):
    return mk.weighted_pool(**{"x": X, "scores": X[..., 0], **changed})


def reduce_pool(**changed):
    return mk.reduce_pool(**{"x": X, "kind": "mean", **changed})


def bias_gelu(**changed):
    return mk.bias_gelu(**{"x": X, "bias": TOKEN, **changed})


REFUSED = [
    (gather, {"x": X[0]}, ValueError, r"x must have 3 dimensions, got 2 \(\[6, 8\]\)"),
    (gather, {"x": [1, 2]}, TypeError, "x must be a torch.Tensor, got list"),
    (gather, {"x": X.long()}, TypeError, "x must be a floating-point tensor, got torch.int64"),
    (gather, {"ids": IDS.float()}, TypeError, "ids must be int64 or int32, got torch.float32"),
    (gather, {"ids": IDS[0]}, ValueError, "ids must have 2 or 3 dimensions, got 1"),
    (
        gather,
        {"ids": IDS[:1]},
        ValueError,
        r"ids \[1, 1, 2\] has size 1 in dimension 1 but x \[2, 6, 8\] has 2",
    ),
    (
        gather,
        {"pos": X[0, :5]},
        ValueError,
        r"pos \[5, 8\] has size 5 in dimension 0 but x \[2, 6, 8\] has 6",
    ),
    (
        gather,
        {"pos": X[0, :, :7]},
        ValueError,
        r"pos \[6, 7\] has size 7 in dimension 1 but x \[2, 6, 8\] has 8",
    ),
    (gather, {"prefix": X[0, :, :7]}, ValueError, r"prefix \[6, 7\] has size 7 in dimension 1"),
    (gather, {"pos": X}, ValueError, r"pos must have 2 dimensions, got 3 \(\[2, 6, 8\]\)"),
    (gather, {"ids": IDS.to("meta")}, ValueError, "ids is on meta but x is on cpu"),
    (restore, {"x": X[0]}, ValueError, "x must have 3 dimensions, got 2"),
    (restore, {"num_prefix": 4}, ValueError, r"num_prefix is 4 but there are 3 tokens"),
    (restore, {"num_prefix": -1}, ValueError, "num_prefix is -1 but there are 3 tokens"),
    (restore, {"x": torch.randn(2, 7, 8)}, ValueError, "x has 7 visible tokens .* restores only 6"),
    (restore, {"mask_token": TOKEN[:7]}, ValueError, r"mask_token \[7\] has size 7 in dimension 0 but x"),
    (
        restore,
        {"ids_restore": RESTORE[:1]},
        ValueError,
        r"ids_restore \[1, 6\] has size 1 in dimension 0 but x",
    ),
    (restore, {"pos": X[0, :5]}, ValueError, r"pos \[5, 8\] must have num_prefix 0 \+ 6 patches .* = 6 rows"),
    (fill, {"mask": torch.ones(2, 5)}, ValueError, r"mask \[2, 5\] and x \[2, 6, 8\] must agree in \[B, N\]"),
    (fill, {"mask_token": X}, ValueError, "mask_token must have 1 dimensions, got 3"),
    (
        fill,
        {"mask_token": TOKEN.long()},
        TypeError,
        "mask_token must be a floating-point tensor, got torch.int64",
    ),
    (
        patchify,
        {"images": IMAGES[0]},
        ValueError,
        r"images must have 4 or 5 dimensions, got 3 \(\[3, 8, 12\]\)",
    ),
    (
        patchify,
        {"images": IMAGES.long()},
        TypeError,
        "images must be uint8 or floating point, got torch.int64",
    ),
    (
        patchify,
        {"patch_size": 5},
        ValueError,
        r"patch height 5 does not divide the image height 8 \(\[2, 3, 8, 12\]\)",
    ),
    (patchify, {"patch_size": (4, 5)}, ValueError, "patch width 5 does not divide the image width 12"),
    (patchify, {"patch_size": 0}, ValueError, r"patch_size must be positive, got \(0, 0\)"),
    (patchify, {"patch_size": (1, 4, 4)}, ValueError, r"patch_size must be an int or \(height, width\)"),
    (patchify, {"images": IMAGES.byte()}, ValueError, "uint8 images need mean and std"),
    (patchify, {"mean": [0.5] * 3}, ValueError, "mean is given but std is None"),
    (
        patchify,
        {"mean": [0.5], "std": [0.5]},
        ValueError,
        r"mean has shape \[1\] but the images have 3 channels",
    ),
    (patchify, {"dtype": torch.int64}, TypeError, "dtype must be floating point, got torch.int64"),
    (loss, {"pred": PRED[:1]}, ValueError, r"pred \[1, 2, 48\] has size 1 in dimension 0 but images"),
    (
        loss,
        {"pred": PRED[..., :47]},
        ValueError,
        "has 47 pixels per patch but 3 channels of patch size 4 have 48",
    ),
    (loss, {"mask": torch.ones(2, 6)}, ValueError, "give exactly one of ids and mask, got both"),
    (loss, {"ids": None}, ValueError, "give exactly one of ids and mask, got neither"),
    (loss, {"ids": IDS[:, :1]}, ValueError, r"ids \[2, 1\] and pred \[2, 2, 48\] must agree"),
    (loss, {"ids": None, "mask": torch.ones(2, 6)}, ValueError, "must hold all 6 patches of images .* got 2"),
    (loss, {"kind": "l2"}, ValueError, "kind must be one of mse, l1, smooth_l1, got 'l2'"),
    (loss, {"layout": "nchw"}, ValueError, "layout must be 'channels_last' or 'channels_first', got 'nchw'"),
    (loss, {"reduction": "sum"}, ValueError, "reduction must be 'mean' or 'none', got 'sum'"),
    (loss, {"kind": "smooth_l1", "beta": 0.0}, ValueError, "beta must be positive, got 0.0"),
    (loss, {"images": IMAGES.byte()}, ValueError, "uint8 images need mean and std"),
    (loss, {"patch_size": 3}, ValueError, "patch height 3 does not divide the image height 8"),
    (query_pool, {"x": X[0]}, ValueError, r"x must have 3 dimensions, got 2 \(\[6, 8\]\)"),
    (query_pool, {"x": X.long()}, TypeError, "x must be a floating-point tensor, got torch.int64"),
    (query_pool, {"queries": TOKEN}, ValueError, r"queries must have 2 or 3 dimensions, got 1"),
    (query_pool, {"queries": TOKEN[None, :7]}, ValueError, r"queries \[1, 7\] has size 7 in dimension 1 but x"),
    (query_pool, {"queries": X[:1]}, ValueError, r"queries \[1, 6, 8\] has size 1 in dimension 0 but x"),
    (query_pool, {"values": X[:, :5]}, ValueError, r"values \[2, 5, 8\] has size 5 in dimension 1 but x"),
    (query_pool, {"values": X.bfloat16()}, TypeError, "values are torch.bfloat16 but x is torch.float32"),
    (query_pool, {"queries": X[0, :3], "sliced": True}, ValueError, "3 queries do not cut the 8 columns"),
    (query_pool, {"num_prefix": 7}, ValueError, "num_prefix is 7 but there are 6 tokens"),
    (query_pool, {"num_prefix": -1}, ValueError, "num_prefix is -1 but there are 6 tokens"),
    (query_pool, {"mask": torch.ones(2, 6)}, TypeError, "mask must be bool .True = may be pooled., got torch.float32"),
    (query_pool, {"mask": torch.ones(2, 5).bool()}, ValueError, r"mask \[2, 5\] and x \[2, 6, 8\] must agree"),
    (weighted_pool, {"scores": X[:1, :, 0]}, ValueError, r"scores \[1, 6\] has size 1 in dimension 0 but x"),
    (weighted_pool, {"scores": X[:, :5, 0]}, ValueError, r"scores \[2, 5\] has size 5 in dimension 1 but x"),
    (weighted_pool, {"scores": X[0, 0]}, ValueError, "scores must have 2 or 3 dimensions, got 1"),
    (weighted_pool, {"scores": IDS}, TypeError, "scores must be a floating-point tensor, got torch.int64"),
    (reduce_pool, {"kind": "sum"}, ValueError, "kind must be one of mean, max, gem, got 'sum'"),
    (reduce_pool, {"kind": "gem", "p": 0.0}, ValueError, "p must be positive, got 0.0"),
    (reduce_pool, {"kind": "gem", "p": TOKEN}, ValueError, r"p must have one element, got shape \[8\]"),
    (reduce_pool, {"kind": "gem", "eps": 0.0}, ValueError, "eps must be positive, got 0.0"),
    (reduce_pool, {"num_prefix": 7}, ValueError, "num_prefix is 7 but there are 6 tokens"),
    (bias_gelu, {"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    (bias_gelu, {"x": X.long()}, TypeError, "x must be a floating-point tensor, got torch.int64"),
    (bias_gelu, {"x": X[0, 0, 0]}, ValueError, r"x must have at least 1 dimension, got 0 \(\[\]\)"),
    (bias_gelu, {"bias": X[0]}, ValueError, r"bias must have 1 dimensions, got 2 \(\[6, 8\]\)"),
    (bias_gelu, {"bias": TOKEN[:7]}, ValueError, r"bias \[7\] has size 7 in dimension 0 but x \[2, 6, 8\] has 8"),
    (bias_gelu, {"bias": TOKEN.half()}, TypeError, "bias must be torch.float32, got torch.float16"),
    (bias_gelu, {"x": X.bfloat16(), "bias": TOKEN.half()}, TypeError, "bias must be torch.bfloat16 or torch.float32"),
    (bias_gelu, {"bias": TOKEN.to("meta")}, ValueError, "bias is on meta but x is on cpu"),
    (bias_gelu, {"approximate": "erf"}, ValueError, "approximate must be 'none' or 'tanh', got 'erf'"),
]


@pytest.mark.parametrize(
    ("op", "changed", "error", "message"),
    REFUSED,
    ids=[f"{op.__name__}-{'-'.join(c)}-{i}" for i, (op, c, *_) in enumerate(REFUSED)],
)
def test_refuses(op, changed, error, message):
    with pytest.raises(error, match=message):
        op(**changed)


@pytest.mark.parametrize("wrong", [-1, 6, 2**40, -(2**62)])
@pytest.mark.parametrize("op", [gather, restore, patchify, loss], ids=lambda op: op.__name__)
@pytest.mark.parametrize("backend", HERE if DEVICE == "cpu" else ("reference",))
def test_an_id_out_of_range_is_an_index_error(backend, op, wrong):
    name = "ids_restore" if op is restore else "ids"
    ids = (RESTORE if op is restore else IDS).clone()
    ids[1, 1] = wrong
    with pytest.raises(IndexError, match=rf"{wrong}\b.*\[0, 6\)"):
        op(**{name: ids}, backend=backend)


@pytest.mark.parametrize("wrong", [-1, 6, 2**40, -(2**62)])
@pytest.mark.parametrize("op", [gather, restore, patchify, loss], ids=lambda op: op.__name__)
@pytest.mark.skipif(DEVICE == "cuda", reason="these inputs are on the CPU")
def test_cuda_kernels_check_ids_in_debug_mode_and_read_nothing_for_wrong_ones_elsewhere(op, wrong, monkeypatch):
    name = "ids_restore" if op is restore else "ids"
    ids = (RESTORE if op is restore else IDS).clone()
    ids[1, 1] = wrong
    monkeypatch.setenv("MIMKERNELS_DEBUG", "1")
    with pytest.raises(IndexError, match=rf"{wrong}\b.*\[0, 6\)"):
        op(**{name: ids}, backend="cuda-emulated")
    monkeypatch.setenv("MIMKERNELS_DEBUG", "0")
    options = {"reduction": "none"} if op is loss else {}
    out = op(**{name: ids}, **options, backend="cuda-emulated")
    assert not out[1, 1].any()
    assert out[1, 0].any()


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_compiled_graph_refuses_a_wild_id_too(backend):
    torch._dynamo.reset()
    compiled = torch.compile(lambda ids: gather(ids=ids, backend=backend), backend="aot_eager", fullgraph=True)
    assert compiled(IDS).shape == (2, 2, 8)
    with pytest.raises(IndexError, match=r"77\b.*\[0, 6\)"):
        compiled(torch.full_like(IDS, 77))


def test_small_parameters_follow_the_dtype_of_x():
    pos = torch.randn(1, 6, 8, requires_grad=True)
    out = gather(x=X.bfloat16(), pos=pos, prefix=torch.randn(1, 1, 8))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert pos.grad.dtype == torch.float32
    assert pos.grad.shape == pos.shape


def test_int32_ids():
    assert torch.equal(gather(ids=IDS.int()), gather())
