"""A layer of timm beside the one that computes on mimkernels: what both are run for, and how far they may differ."""

import copy

import torch


def run(module, x, **options):
    """Output, and gradients of the input and of all parameters."""
    module, x = copy.deepcopy(module).to(x.dtype), x.clone().requires_grad_()
    torch.manual_seed(4)
    out = module(x, **options)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out))
    return {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}


def assert_same_as_timm(ours, plain, exact):
    """What `run` gives of ours, of timm's and of timm's in fp64: ours may err twice as much as timm's, and 8 eps."""
    assert ours.keys() == plain.keys() == exact.keys()
    for name, value in ours.items():
        assert value.dtype == plain[name].dtype and value.shape == plain[name].shape
        allowed = 2 * (plain[name].double() - exact[name]).abs().max()
        allowed = allowed + 8 * torch.finfo(torch.float32).eps * exact[name].abs().max()
        error = (value.double() - exact[name]).abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
