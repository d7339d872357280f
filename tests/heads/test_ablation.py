"""Heads that are taken out: what is left is what the projection makes of the others."""

import pytest
import timm
import torch
from torch import nn

from mimkernels.heads import ablate, capture, head_importance
from mimkernels.nn import use_mimkernels_attention


def vit(ours: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=0
    ).eval()
    if ours:
        use_mimkernels_attention(model)
    return model


IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def without(model: nn.Module, layer: int, heads: list[int], by: str) -> torch.Tensor:
    """The features of a model whose projection's input is changed by a hook."""

    def change(module, args):
        x = args[0].unflatten(-1, (3, 8)).clone()  # [B, N, H, D]
        x[:, :, heads] = 0 if by == "zero" else x[:, :, heads].mean((0, 1), keepdim=True)
        return (x.flatten(2),)

    handle = model.blocks[layer].attn.proj.register_forward_pre_hook(change)
    with torch.no_grad():
        out = model.forward_features(IMAGES)
    handle.remove()
    return out


@pytest.mark.parametrize("by", ["zero", "mean"])
@pytest.mark.parametrize("ours", [False, True])
def test_the_output_of_chosen_heads_is_replaced(ours, by):
    model = vit(ours)
    whole = model.forward_features(IMAGES)
    with torch.no_grad(), ablate(model, {"blocks.1.attn": [2, 0]}, by=by) as layers:
        changed = model.forward_features(IMAGES)
    assert layers == {"blocks.0.attn": 3, "blocks.1.attn": 3}
    torch.testing.assert_close(changed, without(model, 1, [0, 2], by))
    assert (changed - whole).abs().max() > 1e-4
    torch.testing.assert_close(model.forward_features(IMAGES), whole, atol=0, rtol=0)  # nothing stays behind


def test_layers_by_number_and_gradients_of_the_others():
    model = vit()
    with ablate(model, {0: [1]}):
        model.forward_features(IMAGES).square().sum().backward()
    grad = model.blocks[0].attn.proj.weight.grad.unflatten(1, (3, 8)).abs().sum((0, 2))
    assert grad[1] == 0 and (grad[[0, 2]] > 0).all()


def test_statistics_inside_capture_are_those_of_the_model_without_the_heads():
    model = vit()
    with torch.no_grad(), capture(model, "entropy") as plain:
        model.forward_features(IMAGES)
    with torch.no_grad(), capture(model, "entropy") as heads, ablate(model, {0: [0, 1, 2]}):
        model.forward_features(IMAGES)
    first, second = heads[0].stats["entropy"], heads[1].stats["entropy"]
    torch.testing.assert_close(first, plain[0].stats["entropy"])
    assert (second - plain[1].stats["entropy"]).abs().max() > 1e-6
    with pytest.raises(RuntimeError, match="another capture was entered inside ablate"):
        with ablate(model, {0: [0]}), capture(model, "entropy"):
            model.forward_features(IMAGES)


def test_importance_is_none_of_a_head_that_the_projection_ignores():
    model = vit()
    model.blocks[0].attn.proj.weight.data.view(24, 3, 8)[:, 1] = 0
    importance = head_importance(model, lambda: model.forward_features(IMAGES))
    assert list(importance) == ["blocks.0.attn", "blocks.1.attn"]
    assert importance["blocks.0.attn"][1] == pytest.approx(0, abs=1e-6)
    assert (importance["blocks.0.attn"][[0, 2]] > 1e-5).all()
    features = without(model, 1, [2], "zero")
    change = (1 - torch.cosine_similarity(features, model.forward_features(IMAGES), dim=-1)).mean()
    torch.testing.assert_close(importance["blocks.1.attn"][2], change.detach(), atol=1e-6, rtol=1e-3)
    losses = head_importance(model, lambda: model.forward_features(IMAGES).square().mean())
    gain = features.square().mean() - model.forward_features(IMAGES).square().mean()
    torch.testing.assert_close(losses["blocks.1.attn"][2], gain.detach(), atol=1e-6, rtol=1e-3)


def test_refusals_name_the_layer_and_the_head():
    model = vit()
    with pytest.raises(IndexError, match=r"blocks\.0\.attn has 3 heads, from 0 to 2; head 3"), ablate(model, {0: [3]}):
        model.forward_features(IMAGES)
    with pytest.raises(RuntimeError, match=r"no layer 'blocks\.7\.attn' called attention; those that did: blocks\.0"):
        with ablate(model, {"blocks.7.attn": [0]}):
            model.forward_features(IMAGES)
    with pytest.raises(ValueError, match="by must be one of zero, mean, got 'noise'"):
        ablate(model, {0: [0]}, by="noise")
    with pytest.raises(ValueError, match="heads of layer 0 must be numbers from 0"):
        ablate(model, {0: [-1]})
    model.blocks[0].attn.attn_drop.p = 0.5
    model.train()
    with pytest.raises(RuntimeError, match=r"heads of blocks\.0\.attn cannot be taken out: computed as it is: dropout"):
        with ablate(model, {0: [0]}):
            model.forward_features(IMAGES)
