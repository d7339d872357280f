"""Models that read [cls] alone compute what follows attention in the last block for [cls] alone."""

import copy

import pytest
import torch

pytest.importorskip("timm")

from mimkernels.models import DINO, MoCoV3, Supervised
from mimkernels.models.finetuned import Finetuned
from tests.products import Products

NAMES = {"vit": "vit_tiny_patch16_224", "beit": "beit_base_patch16_224"}
SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
DROPPED = {"drop_path_rate": 0.0}
TARGETS = torch.tensor([1, 4, 0])


def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def supervised(name):
    return Supervised.from_timm(name, num_classes=5, **SHAPE, **DROPPED), {"targets": TARGETS}, 1


def finetuned(name):
    return Finetuned.from_timm(name, num_classes=5, readout="cls", **SHAPE, **DROPPED), {"targets": TARGETS}, 1


def dino(name):
    head = {"prototypes": 16, "bottleneck_dim": 8, "mlp_dim": 12}
    return DINO.from_timm(name, **SHAPE, **DROPPED, **head), {}, 4  # two views, student and teacher


def mocov3(name):
    return MoCoV3.from_timm(name, **SHAPE, mlp_dim=24, out_dim=8), {}, 4


def run(model, given):
    """Loss, gradients, and operations of the products forward."""
    model.zero_grad()
    pictures = images() if given else [images(), images().flip(3)]
    with Products() as products:
        loss = model(pictures, **given).loss
    loss.backward()
    grads = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return loss.detach(), grads, products.operations


def all_tokens(model):
    """The same model whose last norms are seen, so that they are given all tokens."""
    seen = copy.deepcopy(model)
    for name, part in seen.named_modules():
        if name.endswith("encoder"):
            part.norm.register_forward_hook(lambda *call: None)
    return seen


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (supervised, "vit"),
        (supervised, "beit"),
        (finetuned, "vit"),
        (finetuned, "beit"),
        (dino, "vit"),
        (mocov3, "vit"),
    ],
)
def test_the_last_mlp_runs_for_cls_alone(build, kind):
    torch.manual_seed(0)
    model, given, passes = build(NAMES[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model = model.double()
    whole = all_tokens(model)
    loss, grads, operations = run(model, given)
    wanted, expected, of_all = run(whole, given)
    assert of_all - operations == passes * 3 * 16 * 2 * 8 * 48**2
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("readout", ["mean", "abmilp"])
def test_other_readouts_have_all_tokens(readout):
    torch.manual_seed(0)
    model = Finetuned.from_timm(NAMES["vit"], num_classes=5, readout=readout, **SHAPE, **DROPPED).double()
    assert run(model, {"targets": TARGETS})[2] == run(all_tokens(model), {"targets": TARGETS})[2]
