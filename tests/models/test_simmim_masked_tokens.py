"""SimMIM computes what only masked tokens need for these alone, and the same numbers as for all."""

import math

import pytest
import torch

pytest.importorskip("timm")

from mimkernels.models import SimMIM
from tests.products import Products

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "mask_unit": 8}
NAMES = {
    "vit": "vit_tiny_patch16_224",
    "beit": "beit_base_patch16_224",
    "swin": "swin_tiny_patch4_window7_224",
    "swinv2": "swinv2_tiny_window8_256",
}
WINDOWS = {
    "img_size": 32, "patch_size": 4, "embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4), "window_size": 4,
    "mask_unit": 8,
}  # fmt: skip
ALIKE = ("vit", "beit", "swin", "swinv2")
HALVES = ("vit", "beit")


def build(kind, **changes):
    torch.manual_seed(0)
    model = SimMIM.from_timm(NAMES[kind], **{**(WINDOWS if kind.startswith("swin") else SHAPE), **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def images(size=3):
    return torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def counted(model, pictures, **options):
    with Products() as products:
        model(pictures, seed=2, **options)
    return products.operations


def saved(model, pictures, *, mlp):
    """Operations of the products that visible tokens do not need: of the decoder, and of one MLP."""
    visible = len(pictures) * math.prod(size // step for size, step in zip(
        pictures.shape[2:], model.encoder_stride, strict=True)) - int(model.draw_mask(pictures, seed=2).sum()) // (
        math.prod(model.encoder_stride) // math.prod(model.patch_size))  # fmt: skip
    width = model.encoder.num_features
    prefix = len(pictures) * getattr(model.encoder, "num_prefix_tokens", 0)
    return 2 * visible * width * model.decoder.out_features + mlp * 2 * (visible + prefix) * 8 * width**2


@pytest.mark.parametrize("kind", ALIKE)
@pytest.mark.parametrize("target", ["pixels", "patch-norm", "local-norm:7", "features:TEACHER", "pixels + 0.5*ema"])
def test_loss_and_gradients_are_those_of_all_tokens(kind, target):
    model = build(kind, target=target, drop_path_rate=0.5).double()
    pictures = images().double()
    given = {}
    if "features" in target or "ema" in target:
        given["features"] = torch.randn(
            3, math.prod(model.grid_size) // math.prod(model._steps), model.encoder.num_features, dtype=torch.float64
        )
    results = []
    for full in (False, True):
        model.zero_grad()
        torch.manual_seed(5)  # of stochastic depth
        out = model(pictures, seed=2, full_prediction=full, **given)
        out.loss.backward()
        results.append((out.loss.detach(), {name: value.grad for name, value in model.named_parameters()}))
    (loss, grads), (wanted, expected) = results
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", HALVES)
def test_the_last_mlp_and_the_decoder_run_for_masked_tokens_only(kind):
    model = build(kind)
    less = counted(model, images(), full_prediction=True) - counted(model, images())
    assert less == saved(model, images(), mlp=1) > 0


@pytest.mark.parametrize("kind", ["swin", "swinv2"])
def test_of_windows_the_decoder_runs_for_masked_tokens_only(kind):
    model = build(kind)
    less = counted(model, images(), full_prediction=True) - counted(model, images())
    assert less == saved(model, images(), mlp=0) > 0


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("part", ["blocks.2", "blocks.2.mlp", "blocks.2.norm2", "norm", "blocks.2.drop_path2"])
def test_who_looks_sees_all_tokens(kind, part):
    model = build(kind)
    tokens = []
    handle = model.encoder.get_submodule(part).register_forward_hook(lambda *call: tokens.append(call[-1].shape[1]))
    less = counted(model, images(), full_prediction=True) - counted(model, images())
    assert tokens == [17, 17]
    assert less == saved(model, images(), mlp=0)
    handle.remove()
    assert counted(model, images(), full_prediction=True) - counted(model, images()) == saved(model, images(), mlp=1)


@pytest.mark.parametrize("kind", HALVES)
def test_heads_are_recorded_of_all_tokens(kind):
    model = build(kind)
    recorded, of_all = (
        model(images(), seed=2, full_prediction=full, head_stats=("entropy", "distance")).head_stats
        for full in (False, True)
    )
    assert len(recorded) == 3
    for layer, other in zip(recorded, of_all, strict=True):
        for name, values in layer.items():
            assert values.shape == (3, 3, 17)
            torch.testing.assert_close(values, other[name])


def test_activations_that_are_recomputed_are_those_of_all_tokens():
    for kind in HALVES:
        model = build(kind)
        model.set_grad_checkpointing()
        assert counted(model, images(), full_prediction=True) - counted(model, images()) == saved(
            model, images(), mlp=0
        )


@pytest.mark.parametrize("kind", ["beit", "swin"])
def test_it_compiles_whole(kind):
    model = build(kind)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images(), seed=2).loss, model(images(), seed=2).loss)
