"""Masks that are no plain tensors: statistics of the mask that they stand for, or none and a reason."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import mimkernels
from tests.integrations import models as m

# Whatever a mask's own memory holds must not matter.
MASKS = {
    "upper left": (causal_upper_left, 16, 16),
    "lower right": (causal_lower_right, 16, 16),
    "upper left, more keys": (causal_upper_left, 5, 9),
    "lower right, more keys": (causal_lower_right, 5, 9),
    "upper left, more queries": (causal_upper_left, 9, 5),
}


class Masked(nn.Module):
    def forward(self, q, k, v, **options):
        return F.scaled_dot_product_attention(q, k, v, **options)


def qkv(queries, keys, dim=16):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, n, dim, generator=generator) for n in (queries, keys, keys)]


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["", "with dropout"])
@pytest.mark.parametrize("name", MASKS)
def test_causal_biases_of_torch(name, dropout):
    kind, queries, keys = MASKS[name]
    q, k, v = qkv(queries, keys)
    mask, model = kind(queries, keys), Masked()
    torch.manual_seed(3)
    expected = model(q, k, v, attn_mask=mask, dropout_p=dropout)
    torch.manual_seed(3)
    with mimkernels.capture(model, ["entropy", "prefix_mass"], num_prefix=1) as heads:
        out = model(q, k, v, attn_mask=mask, dropout_p=dropout)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    allowed = torch.ones(queries, keys, dtype=torch.bool).tril(0 if kind is causal_upper_left else keys - queries)
    p = (q.double() @ k.double().transpose(-2, -1) / 4).masked_fill(~allowed, float("-inf")).softmax(-1)
    rows = {"entropy": -torch.special.xlogy(p, p).sum(-1), "prefix_mass": p[..., 0]}
    for statistic, row in rows.items():
        torch.testing.assert_close(heads[0].stats[statistic].double(), row, rtol=2e-5, atol=2e-5)
    assert [note[:14] for note in heads[0].notes] == (["computed as it"] if dropout else [])


class Doubled(torch.Tensor):
    """A mask that computes attention itself: twice the result."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return 2 * func(*args[:3])
        return super().__torch_function__(func, types, args, kwargs or {})


def test_masks_of_unknown_classes_go_to_torch_with_a_note():
    q, k, v = qkv(16, 16)
    mask = torch.zeros(16, 16).as_subclass(Doubled)
    model = nn.ModuleList([Masked(), Masked()])
    with mimkernels.capture(model, ["entropy"], num_prefix=1) as heads:
        out = model[0](q, k, v, attn_mask=mask)
        model[1](q, k, v)
    assert torch.equal(out, 2 * F.scaled_dot_product_attention(q, k, v))
    assert heads["0"].stats == {} and heads["0"].notes == ["computed as it is: attn_mask is a Doubled; no statistics"]
    assert "attn_mask is a Doubled" in heads.table() and heads["1"].stats["entropy"].shape == (2, 3, 16)
    with (
        pytest.raises(RuntimeError, match="(?s)no layer has any of the statistics.*attn_mask is a Doubled"),
        mimkernels.capture(model[0], ["entropy"], num_prefix=1),
    ):
        model[0](q, k, v, attn_mask=mask)


def test_layers_of_torch_that_get_such_tensors_are_told_of():
    layer = nn.MultiheadAttention(48, 3, batch_first=True)
    x = m.tokens(length=16)
    mask = torch.zeros(16, 16).as_subclass(Doubled)
    with (
        pytest.raises(RuntimeError, match="(?s)no layer has any of the statistics.*attn_mask is a Doubled"),
        mimkernels.capture(layer, ["entropy"], num_prefix=1),
    ):
        layer(x, x, x, attn_mask=mask, need_weights=False)


def test_torch_s_own_refusal_passes():
    q, k, v = qkv(16, 16)
    model = Masked()
    with (
        pytest.raises(ValueError, match="should not be used with causal=True"),
        mimkernels.capture(model, ["entropy"], num_prefix=1),
    ):
        model(q, k, v, attn_mask=causal_upper_left(16, 16), is_causal=True)


@pytest.fixture
def distributed(tmp_path):
    """Makes DTensors, of one process."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    if torch.distributed.is_initialized():
        pytest.skip("a process group is there already")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    mesh = DeviceMesh("cpu", [0])
    yield lambda tensor: distribute_tensor(tensor, mesh, [Replicate()])
    torch.distributed.destroy_process_group()


def test_distributed_tensors_go_to_torch_with_a_note(distributed):
    q, k, v = qkv(16, 16)
    model = nn.ModuleList([Masked(), Masked()])
    with mimkernels.capture(model, ["entropy"], num_prefix=1) as heads:
        out = model[0](*map(distributed, (q, k, v)))
        model[1](q, k, v)
    torch.testing.assert_close(out.full_tensor(), F.scaled_dot_product_attention(q, k, v))
    assert heads["0"].stats == {} and heads["1"].stats["entropy"].shape == (2, 3, 16)
    [note] = heads["0"].notes
    assert note.startswith("computed as it is: query is a DTensor") and note.endswith("; no statistics")


def test_layers_of_torch_with_distributed_weights_are_told_of(distributed):
    layer = nn.MultiheadAttention(48, 3, batch_first=True)
    for name, parameter in list(layer.named_parameters()):
        owner = layer.get_submodule(name.rpartition(".")[0])
        setattr(owner, name.rpartition(".")[2], nn.Parameter(distributed(parameter.detach())))
    x = distributed(m.tokens(length=16))
    with (
        pytest.raises(RuntimeError, match="(?s)no layer has any of the statistics.*is a DTensor; no statistics"),
        mimkernels.capture(layer, ["entropy"], num_prefix=1),
    ):
        layer(x, x, x, need_weights=False)


@pytest.mark.parametrize(
    ("queries", "dim", "reason"),
    [(0, 16, "no queries"), (5, 0, "no statistics of heads without dims")],
    ids=["no queries", "no head dim"],
)
def test_empty_attention_is_computed_and_told_of(queries, dim, reason):
    q, k, v = qkv(queries, 7, dim)
    model = Masked()
    with pytest.raises(RuntimeError, match=f"(?s)no layer has any of the statistics.*{reason}"):
        with mimkernels.capture(model, ["entropy"], num_prefix=1):
            out = model(q, k, v)
    assert torch.equal(out, model(q, k, v))


def test_a_mask_of_another_dtype_is_refused_as_by_torch():
    q, k, v = qkv(16, 16)
    model = Masked()
    with (
        pytest.raises(RuntimeError, match="Expected attn_mask dtype"),
        mimkernels.capture(model, ["entropy"], num_prefix=1),
    ):
        model(q, k, v, attn_mask=torch.zeros(16, 16, dtype=torch.float64))
