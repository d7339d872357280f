"""Bad input is refused before anything runs, by every backend, showing both sides."""

import pytest
import torch

import mimkernels as mk
from mimkernels import testing
from mimkernels.testing import DEVICE
from tests.calls import LEAST, refusals

HERE = ("cpu", "triton", "reference") if DEVICE == "cpu" else ("reference",)
REFUSED = refusals()
# By the op that takes ids: the name of that argument.
IDS = {op: name for op in LEAST for name in ("ids", "ids_restore") if name in LEAST[op]}


def call(op, **changed):
    return getattr(mk, op)(**{**LEAST[op], **changed})


@pytest.mark.parametrize(
    ("op", "changed", "error", "message"),
    REFUSED,
    ids=[f"{op}-{'-'.join(changed)}-{i}" for i, (op, changed, *_) in enumerate(REFUSED)],
)
def test_refuses(op, changed, error, message):
    for _ in range(2):
        with pytest.raises(error, match=message):
            call(op, **changed)


@pytest.mark.parametrize("wrong", [-1, 6, 2**40, -(2**62)])
@pytest.mark.parametrize(
    ("backend", "op"),
    [
        (name, op)
        for name in (HERE if DEVICE == "cpu" else ("reference",))
        for op in IDS
        if name in testing.backends(op)
    ],
)
def test_an_id_out_of_range_is_an_index_error(backend, op, wrong):
    name = IDS[op]
    ids = LEAST[op][name].clone()
    ids[1, 1] = wrong
    with pytest.raises(IndexError, match=rf"{wrong}\b.*\[0, 6\)"):
        call(op, **{name: ids}, backend=backend)


@pytest.mark.parametrize("wrong", [-1, 6, 2**40, -(2**62)])
@pytest.mark.parametrize("op", [op for op in IDS if "cuda" in testing.backends(op)])
@pytest.mark.skipif(DEVICE == "cuda", reason="these inputs are on the CPU")
def test_cuda_kernels_check_ids_in_debug_mode_and_read_nothing_for_wrong_ones_elsewhere(op, wrong, monkeypatch):
    name = IDS[op]
    ids = LEAST[op][name].clone()
    ids[1, 1] = wrong
    monkeypatch.setenv("MIMKERNELS_DEBUG", "1")
    with pytest.raises(IndexError, match=rf"{wrong}\b.*\[0, 6\)"):
        call(op, **{name: ids}, backend="cuda-emulated")
    monkeypatch.setenv("MIMKERNELS_DEBUG", "0")
    options = {"reduction": "none"} if op.endswith("_loss") else {}
    out = call(op, **{name: ids}, **options, backend="cuda-emulated")
    assert not out[1, 1].any()
    assert out[1, 0].any()


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_compiled_graph_refuses_a_wild_id_too(backend):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda ids: call("gather_tokens", ids=ids, backend=backend), backend="aot_eager", fullgraph=True
    )
    ids = LEAST["gather_tokens"]["ids"]
    assert compiled(ids).shape == (2, 2, 8)
    with pytest.raises(IndexError, match=r"77\b.*\[0, 6\)"):
        compiled(torch.full_like(ids, 77))


def test_small_parameters_follow_the_dtype_of_x():
    pos = torch.randn(1, 6, 8, requires_grad=True)
    out = call("gather_tokens", x=LEAST["gather_tokens"]["x"].bfloat16(), pos=pos, prefix=torch.randn(1, 1, 8))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert pos.grad.dtype == torch.float32
    assert pos.grad.shape == pos.shape


def test_int32_ids():
    ids = LEAST["gather_tokens"]["ids"].int()
    assert torch.equal(call("gather_tokens", ids=ids), call("gather_tokens"))
