"""What is done inside ``capture`` lasts, and nothing of ``capture`` does."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks

import mimkernels
from tests.integrations import models as m


def beit():
    return m.timm_model("beit_base_patch16_224", patch_size=8)


def swin_v2():
    return m.timm_model(
        "swinv2_tiny_window8_256", window_size=4, embed_dim=24, depths=(2, 2), num_heads=(3, 3), depth=None
    )


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_is_left(fails):
    """Not in the tables beside the hooks either, by which PyTorch calls every module of the process the slow way."""
    model = m.vit()
    assert not has_global_hooks()
    try:
        with torch.no_grad(), mimkernels.capture(model, ["entropy"]):
            model(m.images())
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert not has_global_hooks()


@pytest.mark.parametrize("make", [beit, m.swin, swin_v2])
def test_accelerate_inside_stays(make):
    model = make()
    kinds = [type(part) for part in model.modules()]
    with torch.no_grad(), mimkernels.capture(model, ["entropy"]) as heads:
        report = mimkernels.accelerate(model)
        model(m.images())
    attention = [change for change in report if "ttention" in change.kind]
    assert len(attention) == len(heads) and all(change.became == "mimkernels.attention" for change in attention)
    again = mimkernels.accelerate(model)
    assert {change.reason for change in again if "ttention" in change.kind} == {"already"}
    assert mimkernels.restore(model) > 0
    assert [type(part) for part in model.modules()] == kinds


@pytest.mark.parametrize("make", [beit, m.swin, swin_v2])
def test_copies_made_inside_have_the_classes_of_outside(make):
    model = make()
    kinds = [type(part) for part in model.modules()]
    with torch.no_grad(), mimkernels.capture(model, ["entropy"]):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        model(m.images())
    with torch.no_grad():
        expected = model(m.images())
        for other in copies:
            assert [type(part) for part in other.modules()] == kinds
            assert torch.equal(other(m.images()), expected)
    accelerated = copy.deepcopy(model)
    mimkernels.accelerate(accelerated)
    assert [type(part) for part in copy.deepcopy(accelerated).modules()] == [
        type(part) for part in accelerated.modules()
    ]


def test_transforms_of_torch_func_are_told_of():
    """Tensors of a transform are worth nothing behind it."""
    model = m.vit()
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match="(?s)no layer has any of the statistics.*transform of torch.func"),
        mimkernels.capture(model, ["entropy"], num_prefix=1),
    ):
        vmap(lambda image: model(image[None]))(m.images())
    with torch.no_grad(), mimkernels.capture(model, ["entropy"]) as heads:
        functional_call(model, dict(model.named_parameters()), (m.images(),))
    assert heads[0].stats["entropy"].shape == (2, 3, 17)


def test_a_layer_that_two_blocks_share_is_captured_twice():
    model = m.vit()
    model.blocks[1].attn = model.blocks[0].attn
    seen = []
    handle = model.blocks[0].attn.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad(), mimkernels.capture(model, ["entropy"]) as heads:
        model(m.images())
    handle.remove()
    assert list(heads) == ["blocks.0.attn", "blocks.0.attn#1"]
    with torch.no_grad(), mimkernels.capture(nn.ModuleList([model.blocks[0].attn]), ["entropy"], num_prefix=1) as one:
        for x in seen:
            model.blocks[0].attn(x)
    rows = one[0].stats["entropy"]
    torch.testing.assert_close(torch.cat([layer.stats["entropy"] for layer in heads.values()]), rows)
