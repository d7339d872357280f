"""Choosing a backend: priority, naming, refusing."""

import asyncio
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import mimkernels
from mimkernels.ops import _registry
from mimkernels.ops._registry import Impl, OpSpec
from mimkernels.testing import Watch

X = torch.randn(2, 6, 8)
IDS = torch.tensor([[0, 3], [5, 1]])


def note_backend(op, args):
    if op.namespace == "mimkernels":
        return op._overloadname
    return "reference" if op is torch.ops.aten.gather.default else None


@pytest.fixture
def used():
    """Names of the backends that ran gather_tokens, in order."""
    with Watch(note_backend) as ran:
        yield ran.seen


def test_auto_takes_the_cpu_library_for_cpu_tensors(used):
    mimkernels.gather_tokens(X, IDS)
    assert used == ["cpu"]


def test_auto_falls_back_where_the_library_does_not_take_the_dtype(used):
    mimkernels.gather_tokens(X.double(), IDS)
    assert used == ["reference"]


def test_named_backend_never_falls_back():
    with pytest.raises(NotImplementedError) as refused:
        mimkernels.gather_tokens(X.double(), IDS, backend="cpu")
    text = str(refused.value)
    assert "backend 'cpu' does not take these inputs (device cpu, dtype float64)" in text
    assert "cpu: takes float32/bfloat16/float16, got float64" in text
    assert "triton: takes float32/bfloat16/float16, got float64" in text
    assert "reference: takes them" in text


def test_a_refusal_lists_every_backend_even_those_without_the_op():
    with pytest.raises(NotImplementedError) as refused:
        mimkernels.fill_mask_tokens(X, torch.ones(2, 6), X[0, 0], backend="cuda")
    for name in _registry.BACKENDS:
        assert f"\n  {name}: " in str(refused.value)


def test_use_backend_holds_inside_its_block_only(used):
    with mimkernels.use_backend("reference"):
        mimkernels.gather_tokens(X, IDS)
        with mimkernels.use_backend("cpu"):
            mimkernels.gather_tokens(X, IDS)
        mimkernels.gather_tokens(X, IDS, backend="cpu")
    mimkernels.gather_tokens(X, IDS)
    assert used == ["reference", "cpu", "cpu", "cpu"]


def test_use_backend_does_not_fall_back_and_is_undone_by_an_error():
    with pytest.raises(NotImplementedError), mimkernels.use_backend("cpu"):
        mimkernels.gather_tokens(X.double(), IDS)
    assert mimkernels.gather_tokens(X.double(), IDS).shape == (2, 2, 8)


def test_use_backend_is_of_the_calling_thread(used):
    """Two blocks that overlap in time: neither is seen from the other thread, and none stays when both have ended."""
    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def second():
        first_in.wait()
        mimkernels.gather_tokens(X, IDS)
        with mimkernels.use_backend("cpu"):
            second_in.set()
            first_out.wait()
            with pytest.raises(NotImplementedError):
                mimkernels.gather_tokens(X.double(), IDS)
        return mimkernels.gather_tokens(X.double(), IDS)

    with ThreadPoolExecutor(1) as pool:
        with mimkernels.use_backend("reference"):
            other = pool.submit(second)
            first_in.set()
            second_in.wait()
            mimkernels.gather_tokens(X, IDS)
        first_out.set()
        assert other.result().dtype == torch.float64
    mimkernels.gather_tokens(X, IDS)
    assert used == ["reference", "cpu"]  # of this thread: what is watched is too


def test_use_backend_is_of_the_calling_task(used):
    async def task(name):
        with mimkernels.use_backend(name):
            for _ in range(2):
                await asyncio.sleep(0)
                mimkernels.gather_tokens(X, IDS)

    async def both():
        await asyncio.gather(task("reference"), task("cpu"))

    asyncio.run(both())
    assert used == ["reference", "cpu", "reference", "cpu"]


def test_backward_on_another_thread_runs_on_the_backend_of_its_forward():
    with mimkernels.use_backend("cpu"):
        x = X.clone().requires_grad_()
        out = mimkernels.gather_tokens(x, IDS)
    with mimkernels.use_backend("reference"), ThreadPoolExecutor(1) as pool, Watch(note_backend) as ran:
        pool.submit(out.sum().backward).result()
    assert x.grad.sum() == out.numel()
    assert ran.seen == []
    assert type(out.grad_fn).__name__ == "gather_tokens_fwdBackward"


@pytest.mark.parametrize(
    "enter",
    [
        lambda: mimkernels.gather_tokens(X, IDS, backend="gpu"),
        lambda: mimkernels.use_backend("gpu").__enter__(),
    ],
)
def test_unknown_backend_names_the_known_ones(enter):
    with pytest.raises(ValueError, match="unknown backend 'gpu'; known: auto, triton, cuda, cpu, reference"):
        enter()


def run_with(backend: str) -> subprocess.CompletedProcess:
    code = (
        "import torch, mimkernels\n"
        "from mimkernels.ops.gather_tokens.spec import SPEC\n"
        "print(SPEC.resolve('auto', 'cpu', torch.float32))"
    )
    environment = {**os.environ, "MIMKERNELS_BACKEND": backend}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_environment_variable_names_the_backend():
    assert run_with("reference").stdout.strip() == "reference"
    assert run_with("").stdout.strip() == "cpu"
    refused = run_with("gpu")
    assert refused.returncode != 0
    assert "MIMKERNELS_BACKEND='gpu' is unknown; known: auto, triton, cuda, cpu, reference" in refused.stderr


def test_limits_are_reasons():
    impl = Impl("reference", (torch.float32,), limits={"tokens": 8}, multiples={"head_dim": 8})
    assert impl.reasons("cpu", torch.float32, {"tokens": 8, "head_dim": 16}) == []
    assert impl.reasons("cpu", torch.float32, {"head_dim": 12}) == ["takes head_dim in multiples of 8, got 12"]
    assert impl.reasons("cpu", torch.float16, {"tokens": 9}) == [
        "takes float32, got float16",
        "takes at most 8 tokens, got 9",
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton is compiled, not interpreted")
def test_interpreted_triton_is_taken_by_name_only():
    spec = OpSpec("only_triton", {}, {}, (Impl("triton"),))
    assert spec.resolve("triton", "cpu", torch.float32) == "triton"
    with pytest.raises(NotImplementedError, match="triton: "):
        spec.resolve("auto", "cpu", torch.float32)


def test_adding_a_backend_to_an_op_is_one_row():
    spec = OpSpec("two_rows", {}, {}, (Impl("cpu", (torch.float16,)), Impl("reference")))
    assert spec.resolve("auto", "cpu", torch.float16) == "cpu"
    assert spec.resolve("auto", "cpu", torch.float32) == "reference"
    with pytest.raises(NotImplementedError, match="cpu: takes float16, got float32"):
        spec.resolve("cpu", "cpu", torch.float32)
