"""Calls of a known signature skip the checks, and nothing but their cost may show it."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import mimkernels as mk
from mimkernels.ops import _memo
from mimkernels.ops._registry import OpSpec
from mimkernels.ops.gather_tokens import api as gather_api
from mimkernels.ops.mask_from_noise import api as noise_api
from mimkernels.ops.masked_patch_loss import api as loss_api
from mimkernels.ops.patchify_gather import api as patchify_api
from mimkernels.ops.query_pool import api as query_api
from mimkernels.ops.reduce_pool import api as reduce_api

X = torch.randn(2, 6, 8)
IDS = torch.tensor([[0, 3], [5, 1]])
POS = torch.randn(1, 6, 8)
IMAGES = torch.rand(2, 3, 8, 12)
PRED = torch.randn(2, 6, 48)
TWICE = range(2)


@pytest.fixture(autouse=True)
def nothing_known():
    for api in (gather_api, noise_api, loss_api, patchify_api, query_api, reduce_api):
        api._checked.known.clear()


@pytest.fixture
def checks(monkeypatch):
    """What the checks resolved, in order: one entry for each call that was checked."""
    names = []
    resolve = OpSpec.resolve

    def recording(spec, *args, **sizes):
        names.append(resolve(spec, *args, **sizes))
        return names[-1]

    monkeypatch.setattr(OpSpec, "resolve", recording)
    return names


def expected(x, ids, pos=None):
    """Written down apart from the library."""
    out = torch.stack([row[i] for row, i in zip(x, ids.long(), strict=True)])
    return out if pos is None else out + pos.reshape(-1, x.shape[2])[ids.long()]


def test_a_known_signature_is_not_checked_again(checks):
    for seed in range(3):
        x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(mk.gather_tokens(x, IDS), expected(x, IDS))
    assert checks == ["cpu"]


@pytest.mark.parametrize(
    ("other", "backend"),
    [
        ({"x": X.bfloat16()}, "cpu"),
        ({"x": X.double()}, "reference"),
        ({"x": X[:, :4], "ids": IDS % 4}, "cpu"),
        ({"ids": IDS.int()}, "cpu"),
        ({"ids": IDS[:, :1]}, "cpu"),
        ({"x": X.transpose(1, 2).contiguous().transpose(1, 2)}, "cpu"),
        ({"x": X.clone().requires_grad_()}, "cpu"),
        ({"x": torch.nn.Parameter(X.clone())}, "cpu"),
        ({"x": X.to("meta"), "ids": IDS.to("meta")}, "reference"),
        ({"backend": "reference"}, "reference"),
    ],
)
def test_other_signatures_are_told_apart(checks, other, backend):
    mk.gather_tokens(X, IDS)
    arguments = {"x": X, "ids": IDS, **other}
    for _ in TWICE:
        out = mk.gather_tokens(**arguments)
        if out.device.type == "cpu":
            assert torch.equal(out, expected(arguments["x"], arguments["ids"]))
        assert out.dtype == arguments["x"].dtype
        assert out.device == arguments["x"].device
        assert out.requires_grad == arguments["x"].requires_grad
    assert checks == ["cpu", backend]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": X.long()}, TypeError, "x must be a floating-point tensor"),
        ({"ids": IDS.float()}, TypeError, "ids must be int64 or int32"),
        ({"ids": IDS[:1]}, ValueError, "has size 1 in dimension 1"),
        ({"ids": IDS.to("meta")}, ValueError, "ids is on meta but x is on cpu"),
        ({"x": [1, 2]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": X.to_sparse()}, TypeError, "x must be a dense tensor, got a tensor of layout sparse_coo"),
        ({"x": X.double(), "backend": "cpu"}, NotImplementedError, "takes float32/bfloat16/float16, got float64"),
        ({"backend": "gpu"}, ValueError, "unknown backend 'gpu'"),
    ],
)
def test_a_bad_call_is_refused_after_good_ones_and_again(changed, error, message):
    mk.gather_tokens(X, IDS)
    mk.gather_tokens(X, IDS, backend="cpu")
    for _ in TWICE:
        with pytest.raises(error, match=message):
            mk.gather_tokens(**{"x": X, "ids": IDS, **changed})
    assert len(gather_api._checked.known) == 2


def test_values_are_looked_at_in_every_call():
    for wrong in (6, -1):
        mk.gather_tokens(X, IDS)
        with pytest.raises(IndexError, match=rf"{wrong}\b.*\[0, 6\)"):
            mk.gather_tokens(X, torch.full_like(IDS, wrong))


def test_options_that_are_equal_but_of_other_types_are_told_apart():
    noise = torch.rand(2, 4)
    mk.mask_from_noise(noise, 1)
    with pytest.raises(TypeError, match="keep must be an int, got bool"):
        mk.mask_from_noise(noise, True)
    mk.patchify_gather(IMAGES, None, (4, 4))
    with pytest.raises((TypeError, RuntimeError)):
        mk.patchify_gather(IMAGES, None, (4.0, 4.0))


def test_an_option_that_may_change_is_not_remembered():
    scale = torch.tensor(1.0)
    first = mk.query_pool(X, X[0, :1], scale=scale)
    scale.zero_()
    assert torch.equal(mk.query_pool(X, X[0, :1], scale=scale), mk.query_pool(X, X[0, :1], scale=0.0))
    assert not torch.equal(mk.query_pool(X, X[0, :1], scale=scale), first)


def test_lists_are_remembered_by_their_values(checks):
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.2, 0.1]
    rows = mk.patchify_gather(IMAGES, None, [4, 4], mean, std)
    assert torch.equal(mk.patchify_gather(IMAGES, None, [4, 4], tuple(mean), std), rows)
    mean[0] = 0.0
    assert not torch.equal(mk.patchify_gather(IMAGES, None, [4, 4], mean, std), rows)
    assert mk.patchify_gather(IMAGES, None, [4, 6], mean, std).shape == (2, 4, 72)
    assert len(checks) == 4


def test_use_backend_inside_and_outside(checks):
    for _ in TWICE:
        mk.gather_tokens(X, IDS)
        with mk.use_backend("reference"):
            mk.gather_tokens(X, IDS)
            mk.gather_tokens(X, IDS, backend="cpu")
    assert checks == ["cpu", "reference", "cpu"]
    with mk.use_backend("cpu"), pytest.raises(NotImplementedError):
        mk.gather_tokens(X.double(), IDS)


def test_layouts_of_one_shape():
    columns = X.transpose(1, 2).contiguous().transpose(1, 2)  # columns contiguous
    packed = torch.cat([X, X], 2)[..., :8]  # rows contiguous, with gaps
    for _ in TWICE:
        for x in (packed, columns, X, columns, packed):
            assert torch.equal(mk.gather_tokens(x, IDS), expected(X, IDS))
            assert torch.equal(mk.gather_tokens(x, IDS.T.contiguous().T), expected(X, IDS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ids", [IDS, IDS.int(), IDS[None], IDS.int().T.contiguous().T], ids=lambda i: str(i.dtype))
def test_conversions_are_done_again_with_their_gradients(checks, dtype, ids):
    """Positions with a leading 1, of another dtype than the tokens, and short ids."""
    wide = X.to(torch.float32)
    for scale in (1.0, 2.0):
        x, pos = wide.clone().requires_grad_(), (scale * POS).to(dtype).requires_grad_()
        out = mk.gather_tokens(x, ids, pos=pos)
        torch.testing.assert_close(out, expected(wide, ids.reshape(2, 2), pos.detach().float()))
        out.sum().backward()
        assert pos.grad.shape == POS.shape
        assert pos.grad.dtype == dtype
        assert pos.grad.sum() == x.grad.sum() == out.numel()
    assert checks == ["cpu"]


def test_float_masks_and_images_with_gradients(checks):
    mask = torch.tensor([[0.0, 2, 0, 0, 1, 0]]).expand(2, 6)
    whole = []
    for images in (IMAGES, IMAGES.clone().requires_grad_()):
        for selected in (mask, mask.roll(1, 1), mask):
            pred = PRED.clone().requires_grad_()
            loss = mk.masked_patch_loss(pred, images, mask=selected, patch_size=4)
            loss.backward()
            assert torch.equal(pred.grad.any(-1), selected != 0)
            whole.append(loss.detach())
    assert images.grad is None
    assert torch.equal(whole[0], whole[2])
    assert torch.equal(whole[0], whole[3])
    assert checks == ["cpu", "cpu"]


def test_an_exponent_may_be_a_number_or_a_tensor():
    x = X.abs()
    for _ in TWICE:
        cubes = mk.reduce_pool(x, "gem", p=3.0)
        for p in (torch.tensor(3.0), torch.tensor([3.0]), torch.tensor([[3.0]], requires_grad=True)):
            assert torch.equal(mk.reduce_pool(x, "gem", p=p), cubes)
        assert not torch.equal(mk.reduce_pool(x, "gem", p=torch.tensor(2.0)), cubes)
        assert torch.equal(mk.reduce_pool(x, "mean", p=torch.tensor(2.0)), mk.reduce_pool(x, "mean"))


@pytest.mark.parametrize("first", ["grad", "no_grad", "inference_mode"])
def test_gradients_reach_what_needs_them_whatever_came_before(first):
    contexts = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    images = IMAGES.clone().requires_grad_()
    normal = {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    for name in (first, *contexts, first):
        with contexts[name]():
            out = mk.patchify_gather(images, None, 4, **normal)
            assert out.requires_grad == (name == "grad")
    images.grad = None
    mk.patchify_gather(images, None, 4, **normal).sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, 5.0))


def test_what_is_no_plain_tensor_is_not_remembered():
    class Labelled(torch.Tensor):
        pass

    out = mk.gather_tokens(X.as_subclass(Labelled), IDS)
    assert torch.equal(out.as_subclass(torch.Tensor), expected(X, IDS))
    with FakeTensorMode() as mode:
        fake = mk.gather_tokens(mode.from_tensor(X), mode.from_tensor(IDS))
    assert isinstance(fake, FakeTensor)
    assert not gather_api._checked.known
    assert torch.equal(mk.gather_tokens(X, IDS), expected(X, IDS))


def test_fake_constants_do_not_stay():
    with FakeTensorMode(allow_non_fake_inputs=True):
        mk.patchify_gather(IMAGES, None, 4, (0.5,) * 3, (0.2,) * 3)
    rows = mk.patchify_gather(IMAGES, None, 4, (0.5,) * 3, (0.2,) * 3)
    torch.testing.assert_close(rows, (mk.patchify_gather(IMAGES, None, 4) - 0.5) / 0.2)
    assert not isinstance(rows, FakeTensor)


def test_constants_of_a_device_stay_with_the_stream_that_fills_them(checks, monkeypatch):
    """And to fill them nothing waits: a wait would come of any other call of torch.cuda."""
    stream, captured = 1, False
    cuda = SimpleNamespace(
        current_stream=lambda device: SimpleNamespace(cuda_stream=stream),
        is_current_stream_capturing=lambda: captured,
    )
    monkeypatch.setattr(_memo.torch, "cuda", cuda)
    monkeypatch.setattr(_memo, "_on_cuda", lambda constant: isinstance(constant, torch.Tensor))

    def checked() -> int:
        checks.clear()
        rows = mk.patchify_gather(IMAGES, None, 4, (0.5,) * 3, (0.2,) * 3, backend="reference")
        torch.testing.assert_close(rows, (mk.patchify_gather(IMAGES, None, 4, backend="reference") - 0.5) / 0.2)
        return checks.count("reference")

    assert checked() == 2  # with constants, and without: the yardstick
    assert checked() == 0
    stream = 2
    assert checked() == 1, "another stream might read them before they are filled"
    assert checked() == 0
    captured = True
    assert [checked(), checked()] == [1, 1], "a graph has its own, which nobody else keeps"
    captured = False
    assert checked() == 0, "those of the stream are still known"


def test_under_functional_transforms():
    def rows(images):
        return mk.patchify_gather(images, None, 4, (0.5,) * 3, (0.2,) * 3, backend="reference")

    expected_rows = (mk.patchify_gather(IMAGES, None, 4) - 0.5) / 0.2
    torch.testing.assert_close(torch.func.functionalize(rows)(IMAGES), expected_rows)
    plain = rows(IMAGES)
    torch.testing.assert_close(plain, expected_rows)
    assert not torch._is_functional_tensor(plain)  # as a constant of the transform would make it
    grad = torch.func.grad(lambda images: rows(images).sum())(IMAGES)
    torch.testing.assert_close(grad, torch.full_like(IMAGES, 5.0))
    stacked = torch.stack([IMAGES, 2 * IMAGES])
    torch.testing.assert_close(torch.func.vmap(rows)(stacked), torch.stack([rows(IMAGES), rows(2 * IMAGES)]))
    torch.testing.assert_close(torch.func.grad(lambda images: rows(images).sum())(IMAGES), grad)


@pytest.mark.parametrize("eager_first", [False, True])
def test_compiled_in_one_graph_before_and_after_eager_calls(eager_first):
    torch._dynamo.reset()
    compiled = torch.compile(mk.gather_tokens, backend="aot_eager", fullgraph=True, dynamic=True)
    for _ in TWICE:
        for images in (2, 3):
            x, ids = torch.randn(images, 6, 8, requires_grad=True), torch.randint(0, 6, (images, 2))
            runs = [compiled, mk.gather_tokens]
            for run in reversed(runs) if eager_first else runs:
                out = run(x, ids, pos=POS)
                torch.testing.assert_close(out, expected(x, ids, POS))
                out.sum().backward()
            assert x.grad.sum() == 2 * out.numel()
    assert len(gather_api._checked.known) == 2  # the eager ones


def test_no_more_than_so_many_are_kept(monkeypatch, checks):
    monkeypatch.setattr(_memo, "MOST", 3)
    for _ in TWICE:
        for kept in range(1, 6):
            ids = IDS[:, :1].expand(2, kept)
            assert torch.equal(mk.gather_tokens(X, ids), expected(X, ids))
            assert 1 <= len(gather_api._checked.known) <= 3
    assert len(checks) == 10


def test_threads(monkeypatch):
    monkeypatch.setattr(_memo, "MOST", 2)

    def work(thread):
        for i in range(200):
            ids = IDS[:, :1].expand(2, 1 + (i + thread) % 4)
            assert torch.equal(mk.gather_tokens(X, ids), expected(X, ids))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
