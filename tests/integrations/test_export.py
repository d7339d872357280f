"""torch.export: one program for any number of images, where the stock model has one, and it runs on the kernels."""

import copy

import pytest
import torch
from torch.export import Dim, export

import mimkernels
from mimkernels.nn.sdpa import measured

timm = pytest.importorskip("timm")

from mimkernels.models import MAE, SimMIM  # noqa: E402
from tests.integrations.test_accelerate import MODELS, images, vit  # noqa: E402

BATCH = {0: Dim("images", min=2, max=4096)}
MAE_SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "decoder_depth": 1}
MIM = {
    "mae": lambda: MAE.from_timm("vit_tiny_patch16_224", **MAE_SIZES, decoder_dim=32, decoder_heads=2),
    "simmim": lambda: SimMIM.from_timm("beit_base_patch16_224", img_size=64, embed_dim=48, depth=1, num_heads=3),
}


class Loss(torch.nn.Module):
    """A model's loss for masks that follow from the number of images alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x, seed=0, offset=3).loss


def ops_of(program):
    return {str(node.target) for node in program.graph.nodes if "mimkernels" in str(node.target)}


@pytest.mark.parametrize("kind", ["plain", "eva", "beit", "swin"])
def test_an_accelerated_model_is_exported_for_any_number_of_images(kind):
    model = MODELS[kind][0]()
    mimkernels.accelerate(model)
    program = export(model, (images(4),), dynamic_shapes=(BATCH,))
    assert any("attention" in name for name in ops_of(program))
    for batch in (2, 5):
        torch.testing.assert_close(program.module()(images(batch)), model(images(batch)))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("kind", ["plain", "swin"])
def test_what_is_exported_has_gradients(kind, strict):
    model = MODELS[kind][0]().train()
    ours = copy.deepcopy(model)
    mimkernels.accelerate(ours)
    exported = export(ours, (images(4),), strict=strict).module()
    for one in (exported, model):
        torch.manual_seed(0)  # of stochastic depth
        one(images(4)).square().sum().backward()
    got = dict(exported.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name].grad, parameter.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_blocks_are_exported_as_they_are_for_many_images():
    """In eager mode, streams of so few numbers are timm's."""
    model = vit()
    mimkernels.accelerate(model)
    assert any("add_layer_norm" in name for name in ops_of(export(model, (images(4),), dynamic_shapes=(BATCH,))))


@pytest.mark.parametrize("kind", MIM)
def test_a_loss_is_exported_for_any_number_of_images(kind):
    model, size = Loss(MIM[kind]()).eval(), {"mae": 32, "simmim": 64}[kind]
    program = export(model, (images(4, size),), dynamic_shapes=(BATCH,))
    assert ops_of(program)
    for batch in (2, 5):
        torch.testing.assert_close(program.module()(images(batch, size)), model(images(batch, size)))


def test_an_export_for_any_size_of_images_asks_no_measurement(monkeypatch):
    """Where PyTorch was measured to be faster from some number of tokens on: no branch may depend on that number."""
    model = vit(dynamic_img_size=True)
    mimkernels.accelerate(model)
    slower = ((None, ((20**2, False), (None, True))),)
    monkeypatch.setitem(measured._known, ("cpu", torch.float32), (slower, slower))
    side = Dim("side", min=2, max=64)
    program = export(model, (images(2, 32),), dynamic_shapes=({2: 8 * side, 3: 8 * side},))
    assert any("attention" in name for name in ops_of(program))
    for size in (32, 64):
        torch.testing.assert_close(program.module()(images(2, size)), model(images(2, size)), rtol=1e-4, atol=1e-5)
