"""A layer of timm beside the one that computes on mimkernels: what both are run for, and how far they may differ."""

import copy

import torch


def run(module, x, attn_mask=None, **options):
    """Output, and gradients of the input, of a mask that has one, and of all parameters."""
    module, x = copy.deepcopy(module).to(x.dtype), x.clone().requires_grad_()
    if attn_mask is not None:
        if attn_mask.is_floating_point():
            attn_mask = attn_mask.detach().to(x.dtype, copy=True).requires_grad_()
        options["attn_mask"] = attn_mask
    torch.manual_seed(4)
    out = module(x, **options)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out))
    made = {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}
    return made if attn_mask is None or attn_mask.grad is None else {**made, "attn_mask": attn_mask.grad}


def assert_same_as_timm(ours, plain, exact, terms=None):
    """What `run` gives of ours, of timm's and of timm's in fp64: ours may err twice as much as timm's, and 8 eps.

    `terms` names for a gradient the one whose size the 8 eps are of, if that is not its own.
    """
    assert ours.keys() == plain.keys() == exact.keys()
    for name, value in ours.items():
        assert value.dtype == plain[name].dtype and value.shape == plain[name].shape
        allowed = 2 * (plain[name].double() - exact[name]).abs().max()
        size = exact[(terms or {}).get(name, name)].abs().max()
        allowed = allowed + 8 * torch.finfo(torch.float32).eps * size
        error = (value.double() - exact[name]).abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
