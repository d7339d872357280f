"""Cosine attention, as Swin V2 has it."""

import math

import pytest
import torch
from timm.models.swin_transformer_v2 import WindowAttention
from torch.nn.functional import normalize

from mimkernels import attention, attention_qkvpacked, attention_rows, head_divergence, received_attention
from mimkernels.testing import DEVICE
from tests.ops.attention.test_windows import each_backend, gradients, randn, tokens


@each_backend
@pytest.mark.parametrize("shifted", [False, True])
def test_the_window_attention_of_swin_v2(backend, shifted):
    torch.manual_seed(0)
    layer = WindowAttention(48, window_size=(4, 4), num_heads=3).to(DEVICE)
    with torch.no_grad():
        layer.logit_scale.copy_(torch.tensor([1.0, 3.0, 5.0]).view(3, 1, 1))  # the last is capped
        layer.q_bias.normal_()
        layer.v_bias.normal_()
    x = randn(8, 16, 48)
    mask = torch.where(randn(4, 16, 16) > 0.5, -100.0, 0.0) if shifted else None
    expected = layer(x, mask=mask)
    bias = torch.cat((layer.q_bias, layer.k_bias, layer.v_bias))
    qkv = torch.nn.functional.linear(x, layer.qkv.weight, bias).view(8, 16, 3, 3, 16)
    table = 16 * torch.sigmoid(layer.cpb_mlp(layer.relative_coords_table)).view(-1, 3)
    positions = table[layer.relative_position_index.view(-1)].view(16, 16, 3).permute(2, 0, 1)
    scores = positions if mask is None else positions + mask[:, None]
    made = attention_qkvpacked(qkv, bias=scores, logit_scale=layer.logit_scale.flatten(), backend=backend).out
    ours = layer.proj(made.transpose(1, 2).flatten(2))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    parameters = [layer.logit_scale, layer.qkv.weight, layer.q_bias, layer.cpb_mlp[0].weight]
    found = gradients(ours, parameters)
    for a, b in zip(found, gradients(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-3)
    assert found[0][2] == 0
    assert found[0][:2].all()


@each_backend
def test_is_attention_of_unit_vectors(backend):
    q, k, v = tokens(2)
    levels = torch.tensor([0.5, 6.0], device=DEVICE)
    given = {"bias_table": randn(11, 2), "bias_index": torch.arange(81, device=DEVICE).view(9, 9) % 11}
    ours = attention(q, k, v, **given, logit_scale=levels, stats=("entropy",), backend=backend)
    scales = torch.tensor([math.exp(0.5), 100.0], device=DEVICE)
    units = normalize(q, dim=-1) * scales[:, None, None], normalize(k, dim=-1)
    plain = attention(*units, v, **given, scale=1.0, stats=("entropy",), backend=backend)
    torch.testing.assert_close(ours.out, plain.out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.lse, plain.lse, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.stats["entropy"], plain.stats["entropy"], rtol=1e-3, atol=1e-4)
    cosine = {**given, "logit_scale": levels}
    pairs = (
        (received_attention(q, k, ours.lse, **cosine, backend=backend), ours.lse, received_attention),
        (head_divergence(q, k, ours.lse, **cosine, backend=backend), ours.lse, head_divergence),
    )
    for found, lse, op in pairs:
        torch.testing.assert_close(found, op(*units, lse, **given, scale=1.0, backend=backend), rtol=1e-4, atol=1e-5)
    maps = attention_rows(q, k, [0, 4], **cosine)
    torch.testing.assert_close(maps, attention_rows(*units, [0, 4], **given, scale=1.0), rtol=1e-4, atol=1e-5)


@each_backend
def test_vectors_of_length_0_have_cosine_0(backend):
    q, k, v = tokens(1)
    q[:, :, 0] = 0.0
    k[:, :, 1] = 0.0
    levels = torch.tensor([2.0, 3.0], device=DEVICE)
    given = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    out = attention(*given, logit_scale=levels, backend=backend).out
    torch.testing.assert_close(out[:, :, 0], v.mean(2))
    for grad in gradients(out, given):
        assert grad.isfinite().all()


@each_backend
def test_gradients_leave_the_lengths_of_rows_alone(backend):
    q, k, v = (tensor.requires_grad_() for tensor in tokens(2))
    out = attention(q, k, v, logit_scale=torch.tensor([2.0, 3.0], device=DEVICE), backend=backend).out
    for tensor, grad in zip((q, k), gradients(out, [q, k]), strict=True):
        along = (tensor * grad).sum(-1)
        assert along.abs().max() < 1e-4 * grad.norm(dim=-1).max()


@each_backend
@pytest.mark.parametrize("mask", [-1e4, -1e9, torch.finfo(torch.float32).min])
def test_a_row_hidden_by_a_finite_mask_leaves_the_scale_its_gradient(backend, mask):
    q, k, v = tokens(2)
    bias = torch.zeros(9, 9, device=DEVICE)
    bias[4] = mask
    found = []
    for of in (backend, "reference"):
        levels = torch.tensor([2.0, 3.0], device=DEVICE, requires_grad=True)
        out = attention(q, k, v, bias=bias.expand(2, 9, 9), logit_scale=levels, backend=of).out
        found += torch.autograd.grad(out.square().sum(), levels)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


@each_backend
@pytest.mark.parametrize(("images", "queries", "keys"), [(0, 5, 5), (2, 0, 5), (2, 5, 0), (2, 0, 0), (0, 0, 0)])
def test_a_scale_without_scores_has_gradient_0(backend, images, queries, keys, poisoned):
    q, k, v = randn(images, 2, queries, 8), randn(images, 2, keys, 8), randn(images, 2, keys, 8)
    levels = torch.ones(2, device=DEVICE, requires_grad=True)
    out = attention(q, k, v, logit_scale=levels, backend=backend).out
    assert torch.autograd.grad(out.sum(), levels)[0].tolist() == [0.0, 0.0]


@pytest.mark.skipif(DEVICE != "cpu", reason="counts the threads of the CPU")
def test_gradients_are_the_same_for_any_number_of_threads():
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            given = [*(tensor.requires_grad_() for tensor in tokens(2, length=300)), torch.ones(2).requires_grad_()]
            out = attention(*given[:3], logit_scale=given[3], backend="cpu").out
            found.append(gradients(out, given))
    finally:
        torch.set_num_threads(before)
    for grads in found[1:]:
        assert all(map(torch.equal, grads, found[0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rounding_of_out_does_not_reach_gradients_over_several_blocks_of_keys(dtype):
    """dS is P (dP - delta): of values of one sign, out as it was rounded would make delta wrong by much of dS."""
    q, k, v, upstream = (randn(1, 2, length, 16).cpu().to(dtype) for length in (20, 700, 700, 20))
    v, scale = v + 20, torch.tensor([1.0, 2.0])

    def computed(backend, kind):
        inputs = [x.detach().to(kind).requires_grad_() for x in (q, k, v)]
        inputs.append(scale.to(torch.promote_types(kind, torch.float32)).requires_grad_())
        out = attention(*inputs[:3], logit_scale=inputs[3], backend=backend).out
        return torch.autograd.grad(out, inputs, upstream.to(kind))

    found, exact = computed("cpu", dtype), computed("reference", torch.float64)
    for name, bound, a, b in zip(("q", "k", "v", "logit_scale"), (5e-3, 5e-3, 5e-3, 1e-3), found, exact, strict=True):
        assert (a.double() - b).norm() < bound * b.norm(), name
