"""timm's attention layers on mimkernels.attention: the same numbers, the same names, in the same objects."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("timm")
import timm
from timm.layers import Attention as TimmAttention
from torch.utils.checkpoint import checkpoint

from mimkernels.heads import record_heads
from mimkernels.nn import Attention, use_mimkernels_attention
from mimkernels.testing import Watch
from tests.nn.timm_layers import assert_same_as_timm as assert_close_to_timm
from tests.nn.timm_layers import run

HEADS = 3


def layer(seed=0, dim=48, **options):
    torch.manual_seed(seed)
    options = {"qkv_bias": True, **options}
    made = TimmAttention(dim, num_heads=HEADS, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return made


def ours_of(module):
    module = copy.deepcopy(module)
    use_mimkernels_attention(module)
    return module


def tokens(batch=2, length=17, dim=48, seed=1):
    return torch.randn(batch, length, dim, generator=torch.Generator().manual_seed(seed))


def assert_same_as_timm(plain_layer, x, **arguments):
    ours, plain = run(ours_of(plain_layer), x, **arguments), run(plain_layer, x, **arguments)
    exact = run(plain_layer, x.double(), **arguments)
    # What all keys share moves no softmax: the gradient of that bias is 0, and its error that of its terms.
    assert_close_to_timm(ours, plain, exact, terms={"k_norm.bias": "q_norm.bias"})


NORMS = {"qk_norm": True, "norm_layer": nn.LayerNorm}
LAYERS = {
    "plain": {},
    "no bias": {"qkv_bias": False, "proj_bias": False},
    "qk-norm": NORMS,
    "qk-norm and scale norm": {**NORMS, "scale_norm": True},
}
if "gated" in inspect.signature(TimmAttention).parameters:
    LAYERS["gated"] = {"gated": True}
    LAYERS["heads narrower than the model"] = {"attn_head_dim": 8, "dim_out": 24}


@pytest.mark.parametrize("fused", [True, False], ids=["sdpa", "plain softmax"])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
def test_output_and_gradients_are_timm_s(options, fused):
    plain = layer(**options)
    plain.fused_attn = fused
    assert_same_as_timm(plain, tokens())


@pytest.mark.parametrize("name", ["q_norm", "k_norm"])
def test_hooks_on_the_places_of_norms_see_and_change_what_passes(name):
    plain = layer()
    getattr(plain, name).register_forward_hook(lambda module, args, out: 2 * out)
    changed = run(ours_of(plain), tokens())
    assert not torch.allclose(changed["out"], run(ours_of(layer()), tokens())["out"])
    torch.testing.assert_close(changed["out"], run(plain, tokens())["out"], rtol=1e-5, atol=1e-5)


def test_gradients_change_no_number():
    ours, x = ours_of(layer()), tokens()
    with torch.no_grad():
        without = ours(x)
    with torch.inference_mode():
        assert torch.equal(ours(x), without)
    assert torch.equal(ours(x), without)


MASKS = {
    "keys": lambda: (torch.rand(2, 1, 1, 17) < 0.7).index_fill(3, torch.tensor([0]), True),
    "keys, one for all": lambda: (torch.rand(1, 1, 1, 17) < 0.7).index_fill(3, torch.tensor([0]), True),
    "pairs": lambda: (torch.rand(17, 17) < 0.5) | torch.eye(17, dtype=torch.bool),
    "pairs per image": lambda: (torch.rand(2, 1, 17, 17) < 0.5) | torch.eye(17, dtype=torch.bool),
    "bias": lambda: torch.randn(17, 17),
    "bias per head": lambda: torch.randn(1, HEADS, 17, 17),
    "bias per head, three dims": lambda: torch.randn(HEADS, 17, 17),
    "bias per key": lambda: torch.randn(2, 1, 1, 17),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_masks_mean_what_they_mean_to_timm(mask):
    torch.manual_seed(3)
    assert_same_as_timm(layer(), tokens(), attn_mask=mask())


@pytest.mark.skipif("is_causal" not in inspect.signature(TimmAttention.forward).parameters, reason="older timm")
def test_causal_attention():
    assert_same_as_timm(layer(), tokens(), is_causal=True)
    with pytest.raises(ValueError, match="either attn_mask or is_causal"):
        ours_of(layer())(tokens(), attn_mask=torch.ones(17, 17), is_causal=True)


def test_the_scale_of_the_layer_counts():
    plain = layer()
    plain.fused_attn = False
    plain.scale = 0.7
    assert_same_as_timm(plain, tokens())


def test_attention_dropout_in_training_is_timm_s():
    plain = layer(attn_drop=0.4, proj_drop=0.2)
    ours = ours_of(plain)
    for fused in (True, False):
        plain.fused_attn = ours.fused_attn = fused
        made = []
        for module in (plain, ours):
            torch.manual_seed(5)
            made.append(module(tokens()))
        assert torch.equal(*made)
    torch.testing.assert_close(ours.eval()(tokens()), plain.eval()(tokens()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, NORMS], ids=["plain", "qk-norm"])
def test_autocast_gives_timm_s_dtype_and_values(options):
    plain = layer(**options)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = ours_of(plain)(tokens()), plain(tokens())
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), plain(tokens()), rtol=0.05, atol=0.05)


def test_nothing_is_transposed_in_memory():
    ours = ours_of(layer())
    seen = {}
    ours.proj.register_forward_pre_hook(lambda _, args: seen.update(projected=args[0]))
    ours.qkv.register_forward_hook(lambda _, args, out: seen.update(packed=out))
    ours.q_norm.register_forward_pre_hook(lambda _, args: seen.update(q=args[0]))
    ours(tokens())
    assert seen["q"].data_ptr() == seen["packed"].data_ptr() and seen["q"].stride() == (17 * 144, 16, 144, 1)
    assert seen["projected"].is_contiguous()


@pytest.mark.parametrize(("options", "stacks"), [({}, 0), (NORMS, 1)], ids=["plain", "qk-norm"])
def test_the_gradient_of_the_projection_is_written_in_place(options, stacks):
    out = ours_of(layer(**options))(tokens().requires_grad_())
    with Watch(lambda op, args: op.overloadpacket) as watch:
        out.sum().backward()
    ran, aten = watch.seen, torch.ops.aten
    assert aten.mm in ran or aten.addmm in ran  # the projections' backward was seen
    assert ran.count(aten.stack) == stacks
    if not stacks:
        assert not {aten.cat, aten.clone, aten.copy_} & set(ran)


def vit(**options):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": HEADS, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **sizes, **options)


def images(batch=2):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(4))


def test_a_model_keeps_its_parameters_names_hooks_and_modes():
    model = vit()
    model.blocks[1].eval()
    before = {name: (tensor, tensor.data_ptr()) for name, tensor in model.state_dict().items()}
    parameters = list(model.parameters())
    expected = model(images())
    calls = []
    model.blocks[0].attn.register_forward_hook(lambda *_: calls.append("old"))
    layers = use_mimkernels_attention(model)
    model.blocks[0].attn.register_forward_hook(lambda *_: calls.append("new"))
    assert layers == [block.attn for block in model.blocks] and all(type(part) is Attention for part in layers)
    assert isinstance(layers[0], TimmAttention)
    assert list(model.state_dict()) == list(before)
    assert all(tensor.data_ptr() == before[name][1] for name, tensor in model.state_dict().items())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert [block.attn.training for block in model.blocks] == [True, False, True]
    torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-5)
    assert calls == ["old", "new"]
    assert use_mimkernels_attention(model) == layers
    vit().load_state_dict(model.state_dict())
    model.load_state_dict(vit().state_dict())


def test_copies_and_pickles_of_a_model_compute_the_same():
    model = vit()
    use_mimkernels_attention(model)
    expected = model(images())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(type(block.attn) is Attention for block in other.blocks)
        assert torch.equal(other(images()), expected)


def test_timm_builds_models_with_it_directly():
    if "attn_layer" not in inspect.signature(timm.models.vision_transformer.VisionTransformer).parameters:
        pytest.skip("older timm")
    built, swapped = vit(attn_layer=Attention), vit()
    use_mimkernels_attention(swapped)
    assert torch.equal(built(images()), swapped(images()))


def test_other_attention_is_left_alone_and_a_model_without_any_is_refused():
    class Own(TimmAttention):
        pass

    module = nn.Sequential(Own(48, num_heads=HEADS), nn.MultiheadAttention(48, HEADS))
    with pytest.raises(ValueError, match=r"no timm.layers.Attention, nor .*; its attention: MultiheadAttention"):
        use_mimkernels_attention(nn.Sequential(nn.MultiheadAttention(48, HEADS)))
    with pytest.raises(ValueError, match=r"no timm.layers.Attention, nor that of BEiT, Swin or Swin V2$"):
        use_mimkernels_attention(module[:1])
    assert use_mimkernels_attention(module, required=False) == [] and type(module[0]) is Own


def test_a_model_compiles_into_one_graph():
    model = vit()
    use_mimkernels_attention(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        expected = model(images(batch))
        expected.sum().backward()
        grad = model.blocks[0].attn.qkv.weight.grad.clone()
        model.zero_grad()
        out = compiled(images(batch))
        out.sum().backward()
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.blocks[0].attn.qkv.weight.grad, grad, rtol=1e-4, atol=1e-5)
        model.zero_grad()


def test_torch_fx_sees_timm_s_nodes():
    from timm.models import create_feature_extractor
    from timm.models._features_fx import get_graph_node_names

    model, plain = vit().eval(), vit().eval()
    use_mimkernels_attention(model)
    assert get_graph_node_names(model) == get_graph_node_names(plain)
    nodes = ["blocks.1.attn", "blocks.1.attn.qkv"]
    for made, wanted in zip(
        *(create_feature_extractor(m, nodes)(images()).values() for m in (model, plain)), strict=True
    ):
        torch.testing.assert_close(made, wanted, rtol=1e-5, atol=1e-5)


def test_timm_s_plain_branch_runs_where_it_is_asked_for():
    plain = layer()
    ours = ours_of(plain)
    seen = []
    for module in (plain, ours):
        module.fused_attn = False
        module.attn_drop.register_forward_hook(lambda module, args, out: seen.append(out))
    assert torch.equal(ours(tokens()), plain(tokens())) and torch.equal(*seen)
    ours.fused_attn = True
    ours(tokens())
    assert len(seen) == 2


def test_a_recorder_comes_before_the_plain_branch():
    ours = ours_of(layer())
    ours.fused_attn = False
    with record_heads(ours, ["entropy"]) as heads:
        made = ours(tokens().requires_grad_())
    assert heads[0].stats["entropy"].shape == (2, HEADS, 17)
    torch.testing.assert_close(made, ours(tokens()), rtol=1e-5, atol=1e-5)
    # Checkpointing computes again after the recorder is gone, and must compute the same.
    with record_heads(ours, ["entropy"]) as heads:
        made = checkpoint(ours, tokens().requires_grad_(), use_reentrant=False)
    (made.sum() + heads[0].stats["entropy"].sum()).backward()


def test_torchscript_compiles_timm_s_class():
    plain = layer()
    ours = ours_of(plain)
    with pytest.warns(UserWarning, match="original classes"):
        scripted = torch.jit.script(ours)
    assert torch.equal(scripted(tokens()), plain(tokens())) and type(ours) is TimmAttention
