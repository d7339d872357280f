"""The biases of Swin and BEiT: those of windows, never expanded over images, and tables of relative positions."""

import pytest
import torch
from timm.models.beit import Attention as BeitAttention
from timm.models.swin_transformer import WindowAttention

from mimkernels import (
    attention,
    attention_qkvpacked,
    attention_rows,
    head_divergence,
    received_attention,
    testing,
)
from mimkernels.testing import DEVICE

HERE = ("cpu", "triton", "cuda-emulated", "reference") if DEVICE == "cpu" else ("triton", "cuda", "reference")


each_backend = pytest.mark.parametrize("backend", [name for name in testing.backends("attention") if name in HERE])


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def tokens(batch, heads=2, length=9, dim=16):
    return [randn(batch, heads, length, dim, seed=seed) for seed in (1, 2, 3)]


def gradients(output, inputs):
    return torch.autograd.grad((output * torch.arange(output.shape[-1], device=DEVICE)).sum(), inputs)


@each_backend
@pytest.mark.parametrize("heads", [1, 2])
def test_image_b_takes_the_row_b_modulo_w(backend, heads):
    q, k, v = tokens(6)
    bias = randn(3, heads, 9, 9).requires_grad_()
    expanded = bias.detach().repeat(2, 1, 1, 1).requires_grad_()
    ours = attention(q, k, v, bias=bias, backend=backend)
    plain = attention(q, k, v, bias=expanded, backend=backend)
    assert torch.equal(ours.out, plain.out)
    assert torch.equal(ours.lse, plain.lse)
    (grad,), (of_images,) = gradients(ours.out, [bias]), gradients(plain.out, [expanded])
    torch.testing.assert_close(grad, of_images.view(2, 3, heads, 9, 9).sum(0))
    received = [received_attention(q, k, ours.lse.detach(), bias=b, backend=backend) for b in (bias, expanded)]
    divergence = [head_divergence(q, k, ours.lse.detach(), bias=b, backend=backend) for b in (bias, expanded)]
    maps = [attention_rows(q, k, [0, 4], bias=b) for b in (bias, expanded)]
    for a, b in (received, divergence, maps):
        assert torch.equal(a, b)


@each_backend
@pytest.mark.parametrize("length", [9, 33])
def test_a_table_is_the_bias_that_it_makes(backend, length):
    q, k, v = tokens(2, length=length)
    table = randn(11, 2).requires_grad_()
    index = torch.arange(length * length, device=DEVICE).view(length, length) * 7 % 11
    bias = table.detach()[index].permute(2, 0, 1).contiguous().requires_grad_()
    ours = attention(q, k, v, bias_table=table, bias_index=index, stats=("entropy",), backend=backend)
    plain = attention(q, k, v, bias=bias, stats=("entropy",), backend=backend)
    assert torch.equal(ours.out, plain.out)
    assert torch.equal(ours.stats["entropy"], plain.stats["entropy"])
    (grad,), (of_scores,) = gradients(ours.out, [table]), gradients(plain.out, [bias])
    expected = torch.zeros(11, 2, device=DEVICE).index_add(0, index.flatten(), of_scores.flatten(1).T)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)
    same = {"bias_table": table, "bias_index": index.int()}
    lse = ours.lse.detach()
    received = [received_attention(q, k, lse, **given, backend=backend) for given in (same, {"bias": bias})]
    divergence = [head_divergence(q, k, lse, **given, backend=backend) for given in (same, {"bias": bias})]
    maps = [attention_rows(q, k, [0, 4], **given) for given in (same, {"bias": bias})]
    for a, b in (received, divergence, maps):
        assert torch.equal(a, b)


@each_backend
@pytest.mark.parametrize("shifted", [False, True])
def test_the_window_attention_of_swin(backend, shifted):
    torch.manual_seed(0)
    layer = WindowAttention(48, 3, window_size=4).to(DEVICE)
    torch.nn.init.normal_(layer.relative_position_bias_table)
    x = randn(8, 16, 48)
    mask = torch.where(randn(4, 16, 16) > 0.5, -100.0, 0.0) if shifted else None
    expected = layer(x, mask=mask)
    qkv = layer.qkv(x).view(8, 16, 3, 3, 16)
    given = {
        "bias": None if mask is None else mask[:, None],
        "bias_table": layer.relative_position_bias_table,
        "bias_index": layer.relative_position_index,
    }
    made = attention_qkvpacked(qkv, **given, backend=backend).out
    ours = layer.proj(made.transpose(1, 2).flatten(2))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    parameters = [layer.relative_position_bias_table, layer.qkv.weight]
    for a, b in zip(gradients(ours, parameters), gradients(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-3)


@each_backend
def test_the_attention_of_beit(backend):
    torch.manual_seed(0)
    layer = BeitAttention(32, num_heads=2, qkv_bias=True, window_size=(3, 4)).to(DEVICE)
    torch.nn.init.normal_(layer.relative_position_bias_table)
    x = randn(2, 13, 32)
    expected = layer(x)
    bias = torch.cat((layer.q_bias, layer.k_bias, layer.v_bias))
    qkv = torch.nn.functional.linear(x, layer.qkv.weight, bias).view(2, 13, 3, 2, 16)
    given = {"bias_table": layer.relative_position_bias_table, "bias_index": layer.relative_position_index}
    made = attention_qkvpacked(qkv, **given, backend=backend).out
    ours = layer.proj(made.transpose(1, 2).flatten(2))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    table = [layer.relative_position_bias_table]
    torch.testing.assert_close(gradients(ours, table), gradients(expected, table), rtol=1e-3, atol=1e-3)


@each_backend
def test_compiles_in_one_graph_for_any_number_of_images(backend):
    torch._dynamo.reset()
    bias, table = randn(2, 1, 9, 9).requires_grad_(), randn(11, 2).requires_grad_()
    index = torch.arange(81, device=DEVICE).view(9, 9) % 11

    def call(q, k, v):
        return attention(q, k, v, bias=bias, bias_table=table, bias_index=index, backend=backend).out

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (4, 8):
        given = tokens(batch)
        torch.testing.assert_close(compiled(*given), call(*given))
        ours, plain = (gradients(function(*given), [bias, table]) for function in (compiled, call))
        torch.testing.assert_close(ours, plain)


@pytest.mark.skipif(DEVICE != "cpu", reason="counts the threads of the CPU")
def test_gradients_of_table_and_windows_are_the_same_for_any_number_of_threads():
    index = torch.arange(81).view(9, 9) % 11
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            bias, table = randn(5, 1, 9, 9).requires_grad_(), randn(11, 2).requires_grad_()
            out = attention(*tokens(40), bias=bias, bias_table=table, bias_index=index, backend="cpu").out
            found.append(gradients(out, [bias, table]))
    finally:
        torch.set_num_threads(before)
    for grads in found[1:]:
        assert all(map(torch.equal, grads, found[0]))


@pytest.mark.skipif(DEVICE != "cpu", reason="kernels of GPUs check indices in debug mode alone")
def test_a_raw_op_refuses_a_wild_index_forward_and_backward():
    q = randn(2, 2, 4, 8)
    table, index = randn(3, 2), torch.zeros(4, 4).long()
    index[2, 1] = 3
    given = (None, table, index, None, None, 1.0, 0, None)
    with pytest.raises(IndexError, match=r"bias_index\[2, 1\] = 3 is out of range \[0, 3\)"):
        torch.ops.mimkernels.attention_fwd.cpu(q, q, q, *given, 0)
    rows = q.transpose(1, 2).contiguous()
    with pytest.raises(IndexError, match=r"bias_index\[2, 1\] = 3"):
        torch.ops.mimkernels.attention_bwd.cpu(
            rows, q, q, q, rows, q[..., 0], q[..., 0], *given, None, False, True, False, False
        )
