"""Accelerated models in the hands of those who look into them: what they find is what the stock model shows."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

import mimkernels

timm = pytest.importorskip("timm")
from timm.utils import AttentionExtract  # noqa: E402

from tests.integrations.test_accelerate import accelerated, calls_of, images, swin, swin_v2, vit  # noqa: E402

KINDS = {
    "plain": vit,
    "eva": lambda **kwargs: vit("eva02_tiny_patch14_224", **kwargs),
    "beit": lambda **kwargs: vit("beit_base_patch16_224", **kwargs),
    "swin": lambda: swin(),
}


def attentions(model):
    return [part for part in model.modules() if hasattr(part, "fused_attn")]


def told(model, fused):
    """The model, whose attention was told to be fused or not before it is accelerated."""
    for part in attentions(model):
        part.fused_attn = fused
    return model


def maps_of(model, x):
    """What hooks on ``attn_drop`` see."""
    seen = []
    handles = [part.attn_drop.register_forward_hook(lambda *args: seen.append(args[2])) for part in attentions(model)]
    model(x)
    for handle in handles:
        handle.remove()
    return seen


def assert_close(made, wanted):
    assert len(made) == len(wanted) > 0
    for a, b in zip(made, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# Hooks on every module


SEEN = {
    "whole": lambda: vit(init_values=0.5),
    "patches dropped": lambda: vit(patch_drop_rate=0.5),
    "not fused": lambda: told(vit(), False),
    "swin": swin,
    "swin v2": swin_v2,
}


@pytest.mark.parametrize("kind", SEEN)
def test_hooks_on_every_module_see_and_change_what_they_do_in_the_stock_model(monkeypatch, kind):
    monkeypatch.setattr("mimkernels.nn.block.SMALL", 0)
    model = SEEN[kind]().train()
    ours, _ = accelerated(model)

    def output_and_calls(m):
        names, called = {part: name for name, part in m.named_modules()}, []

        def double_the_gelu(module, args, out):
            called.append((names[module], tuple(out.shape)))
            return out * 2 if isinstance(module, nn.GELU) else None

        torch.manual_seed(1)
        handle = register_module_forward_hook(double_the_gelu)
        try:
            return m(images()), called
        finally:
            handle.remove()

    wanted, calls = output_and_calls(model)
    made, ours_calls = output_and_calls(ours)
    assert ours_calls == calls
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)


# fused_attn, and hooks on what sees the matrix


@pytest.mark.parametrize("kind", KINDS)
def test_fused_attn_can_be_switched_off_and_on_afterwards(kind):
    model = told(KINDS[kind](), True)
    ours, _ = accelerated(model)
    assert maps_of(ours, images()) == maps_of(model, images()) == []
    told(ours, False), told(model, False)
    assert calls_of(ours, images()) == [] and not any(part.fused_attn for part in attentions(ours))
    assert_close(maps_of(ours, images()), maps_of(model, images()))
    assert torch.equal(ours(images()), accelerated(model, attention=False)[0](images()))
    told(ours, True)
    assert len(calls_of(ours, images())) == len(attentions(ours)) and maps_of(ours, images()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_that_see_the_matrix_get_it_where_timm_was_not_fused(kind):
    model = told(KINDS[kind](), False)
    ours, _ = accelerated(model)
    assert len(calls_of(ours, images())) == len(attentions(ours))  # as long as nobody looks
    assert all(part.fused_attn for part in attentions(ours))
    assert_close(maps_of(ours, images()), maps_of(model, images()))
    assert len(calls_of(ours, images())) == len(attentions(ours))
    again = copy.deepcopy(ours)
    assert_close(maps_of(again, images()), maps_of(model, images()))
    mimkernels.restore(ours)
    assert not any(part.fused_attn for part in attentions(ours))


def test_a_part_that_takes_the_place_of_attn_drop_gets_the_matrix():
    class Keeps(nn.Module):
        def forward(self, x):
            self.seen = x
            return x

    ours, _ = accelerated(told(vit(), False))
    ours.blocks[1].attn.attn_drop = Keeps()
    assert len(calls_of(ours, images())) == 1 and ours.blocks[1].attn.attn_drop.seen.shape == (2, 2, 17, 17)


@pytest.mark.parametrize("kind", ["plain", "swin"])
def test_nothing_in_the_place_of_attn_drop_drops_nothing(kind):
    model = told(KINDS[kind](), False)
    for part in attentions(model):
        part.attn_drop = nn.Identity()
    ours, report = accelerated(model)
    assert "mimkernels.attention" in {change.became for change in report.accelerated}
    outputs = []
    for m in (ours, model):
        torch.manual_seed(1)  # of stochastic depth
        outputs.append(m.train()(images()))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_a_part_that_takes_the_place_of_softmax_runs():
    model = swin()
    ours, _ = accelerated(model)
    for m in (model, ours):
        for part in attentions(m):
            part.softmax = nn.Identity()
    torch.testing.assert_close(ours(images()), model(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_models_with_quantised_layers_compute_as_before():
    model = vit()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    ours, report = accelerated(quantised)
    assert {change.kind: change.became for change in report}["Attention"] == "mimkernels.attention"
    torch.testing.assert_close(ours(images()), quantised(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["hook", "fx"])
def test_timm_extracts_attention_maps(method):
    model = told(vit(), False)
    ours, _ = accelerated(model)
    made, wanted = (AttentionExtract(m, method=method)(images()) for m in (ours, model))
    assert list(made) == list(wanted)
    assert_close(list(made.values()), list(wanted.values()))


def test_a_model_that_was_not_fused_compiles_whole():
    torch._dynamo.reset()
    for kind in ("plain", "beit"):
        model = told(KINDS[kind](depth=1), False)
        ours, _ = accelerated(model)
        with torch.no_grad():
            made = torch.compile(ours, fullgraph=True, backend="aot_eager")(images())
            torch.testing.assert_close(made, model(images()), rtol=1e-4, atol=1e-5)


def test_what_was_told_afterwards_stays_after_restore():
    ours, _ = accelerated(told(vit(), True))
    told(ours, False)
    mimkernels.restore(ours)
    assert [part.fused_attn for part in attentions(ours)] == [False, False]


def test_restore_refuses_classes_that_were_changed_since():
    model = swin()
    stock = copy.deepcopy(model)
    mimkernels.accelerate(model)
    layer = model.layers[0].blocks[0].attn
    register_parametrization(layer, "relative_position_bias_table", nn.Identity())
    classes = [type(part) for part in model.modules()]
    with pytest.raises(NotImplementedError, match=r"layers.0.blocks.0.attn became a Parametrized"):
        mimkernels.restore(model)
    assert [type(part) for part in model.modules()] == classes
    remove_parametrizations(layer, "relative_position_bias_table")
    mimkernels.restore(model)
    assert [type(part) for part in model.modules()] == [type(part) for part in stock.modules()]
    assert_close([model(images())], [stock(images())])


def test_a_layer_with_a_parametrization_of_its_own_stays():
    model = swin()
    stock = copy.deepcopy(model)
    layer = model.layers[0].blocks[0].attn
    register_parametrization(layer, "relative_position_bias_table", nn.Identity())
    report = mimkernels.accelerate(model)
    lines = {change.name: change for change in report.changes}
    assert lines["layers.0.blocks.0.attn"].reason == "a parameter of its own is parametrized: do that after accelerate"
    assert lines["layers.1.blocks.0.attn"].became == "mimkernels.attention"
    remove_parametrizations(layer, "relative_position_bias_table")
    assert type(layer) is type(stock.layers[0].blocks[0].attn)
    assert_close([model(images())], [stock(images())])


def test_weights_are_made_once_by_a_parametrization():
    model, x = vit(patch_drop_rate=0.5).train(), images()
    ours, _ = accelerated(model)
    for part in (model, ours):
        torch.manual_seed(0)
        spectral_norm(part.patch_embed.proj)  # turns its estimate further each time
    outs = []
    for part in (model, ours):
        torch.manual_seed(1)
        outs.append(part(x))
    assert_close(outs[1:], outs[:1])
    estimates = [part.patch_embed.proj.parametrizations.weight[0]._u for part in (model, ours)]
    torch.testing.assert_close(*estimates)


def test_a_scale_that_is_changed_counts_where_it_does_in_timm():
    for fused in (True, False):
        for change_first in (True, False):
            model, ours = (told(vit(), fused) for _ in range(2))
            if not change_first:
                mimkernels.accelerate(ours)
            for part in (*attentions(ours), *attentions(model)):
                part.scale = 0.9
            mimkernels.accelerate(ours)
            assert len(calls_of(ours, images())) == 2
            torch.testing.assert_close(ours(images()), model(images()), rtol=1e-4, atol=1e-5)


def test_a_plain_branch_that_alone_heeds_the_scale_stays():
    model = told(vit("vit_relpos_small_patch16_224"), False)
    model.blocks[0].attn.scale = 0.9
    ours, report = accelerated(model, mlp=False)
    assert [change.reason for change in report] == ["its scale, 0.9, counts in its plain branch only", ""]
    torch.testing.assert_close(ours(images()), model(images()), rtol=1e-4, atol=1e-5)


# What changes after acceleration


def test_a_function_in_the_place_of_sdpa_is_called(monkeypatch):
    original, seen = F.scaled_dot_product_attention, []

    def watched(*args, **kwargs):
        seen.append(args)
        return original(*args, **kwargs)

    models = [told(kind(), True) for kind in KINDS.values()]
    for model in models:
        mimkernels.accelerate(model)
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    for model in models:
        seen.clear()
        model(images())
        assert len(seen) == len(attentions(model))


def test_patch_embeddings_that_are_changed_see_every_patch():
    class Adapted(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) + 1

    def adapted(model):
        proj = model.patch_embed.proj
        model.patch_embed.proj = Adapted(3, 32, 8, 8)
        model.patch_embed.proj.load_state_dict(proj.state_dict())

    def replaced(model):
        forward = model.patch_embed.forward
        model.patch_embed.forward = lambda x: forward(x) + 1

    def dropped(model):
        model.pos_drop.p = 0.4

    for change in (adapted, replaced, dropped):
        model = vit(patch_drop_rate=0.5).train()
        ours, report = accelerated(model, attention=False, mlp=False, read_tokens=False)
        assert "mimkernels.patchify_gather" in [line.became for line in report]
        change(ours), change(model)
        made = []
        for part in (ours, model):
            torch.manual_seed(1)
            made.append(part(images()))
        torch.testing.assert_close(*made, rtol=1e-5, atol=1e-5)


# Tensors with rules of their own


class Tagged(torch.Tensor):
    """A subclass that stays itself in whatever PyTorch computes, as MONAI's and torchvision's do."""


@pytest.mark.parametrize("kind", KINDS)
def test_subclasses_of_tensors_stay_what_they_are(kind):
    model = KINDS[kind]()
    ours, _ = accelerated(model)
    x = images().as_subclass(Tagged)
    made = ours(x)
    assert type(made) is type(model(x)) is Tagged
    torch.testing.assert_close(made, model(x), rtol=1e-5, atol=1e-5)
    assert calls_of(ours, x) == []
    model = vit(patch_drop_rate=0.5).train()
    ours, _ = accelerated(model)
    for part in (ours, model):
        torch.manual_seed(1)
        assert type(part(x)) is Tagged


@pytest.mark.parametrize("make", [causal_upper_left, causal_lower_right])
def test_causal_biases_of_torch_mean_what_they_mean(make):
    model = timm.layers.Attention(32, num_heads=2).eval()
    ours, _ = accelerated(model)
    x, bias = torch.randn(2, 16, 32), make(16, 16)
    torch.testing.assert_close(ours(x, attn_mask=bias), model(x, attn_mask=bias), rtol=1e-5, atol=1e-5)
    assert len(calls_of(lambda x: ours(x, attn_mask=bias), x)) == 1
    for layer in (ours, model):
        with pytest.raises(ValueError, match=r"attn_mask or is_causal=True|should not be used with causal=True"):
            layer(x, attn_mask=bias, is_causal=True)


def test_a_default_device_is_no_rule_of_its_own():
    ours, _ = accelerated(vit())
    with torch.device("cpu"):
        assert len(calls_of(ours, images())) == 2


def test_heads_cannot_be_recorded_of_what_computes_by_its_own_rules():
    ours, _ = accelerated(vit())
    with (
        pytest.raises(RuntimeError, match="cannot be recorded under the rules of its own that a Tagged computes by"),
        mimkernels.heads.record_heads(ours, ["entropy"], num_prefix=1),
    ):
        ours(images().as_subclass(Tagged))


# torch.fx and TorchScript


@pytest.mark.parametrize("kind", ["plain", "eva", "beit"])
def test_torch_fx_traces_the_original_code(kind):
    model = KINDS[kind]()
    ours, _ = accelerated(model)
    graphs = [torch.fx.symbolic_trace(m) for m in (ours, model)]
    operations = [[(node.op, str(node.target)) for node in graph.graph.nodes] for graph in graphs]
    assert operations[0] == operations[1]
    assert torch.equal(graphs[0](images()), model(images()))
    assert len(calls_of(ours, images())) == len(attentions(ours))  # the model itself stays accelerated


@pytest.mark.parametrize("source", ["torchvision.models.feature_extraction", "timm.models._features_fx"])
@pytest.mark.parametrize("kind", ["plain", "eva", "beit"])
def test_features_are_extracted_from_inside_layers(kind, source):
    extraction = pytest.importorskip(source)
    model = KINDS[kind]()
    ours, _ = accelerated(model)
    assert extraction.get_graph_node_names(ours) == extraction.get_graph_node_names(model)
    nodes = ["blocks.0.attn.proj", "blocks.1.attn", "blocks.1.mlp.fc1", "blocks.1.mlp.act"]
    made, wanted = (extraction.create_feature_extractor(m, nodes)(images()) for m in (ours, model))
    assert list(made) == nodes
    assert_close(list(made.values()), list(wanted.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_torch_jit_trace_records_the_original_code(kind):
    model = KINDS[kind]()
    ours, _ = accelerated(model)
    traced = torch.jit.trace(ours, images())
    assert "mimkernels" not in {str(node.kind()).partition("::")[0] for node in traced.inlined_graph.nodes()}
    torch.testing.assert_close(traced(images()), model(images()), rtol=1e-5, atol=1e-5)
    assert len(calls_of(ours, images())) == len(attentions(ours))  # the model itself stays accelerated


SCRIPTED = {**KINDS, "patch dropout": lambda: vit(patch_drop_rate=0.5), "not fused": lambda: told(vit(), False)}


@pytest.mark.parametrize("kind", SCRIPTED)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_torchscript_gets_the_original_classes(kind, train):
    model = SCRIPTED[kind]().train(train)
    ours, report = accelerated(model)
    with pytest.warns(UserWarning, match=r"call mimkernels.accelerate\(model\) again"):
        scripted = torch.jit.script(ours)
    # Unoptimized: in which order rewritten graphs draw random numbers depends on what this process ran before.
    with torch.jit.optimized_execution(False):
        for part, stock in ((scripted, torch.jit.script(model)), (ours, model)):
            torch.manual_seed(2)
            made = part(images())
            torch.manual_seed(2)
            assert torch.equal(made, stock(images()))
    # The model is what it was before, and can be accelerated again.
    assert [type(part) for part in ours.modules()] == [type(part) for part in model.modules()]
    assert mimkernels.restore(ours) == 0
    assert str(mimkernels.accelerate(ours)) == str(report)


def test_torchscript_says_what_it_cannot_compile():
    class Mine(mimkernels.nn.Attention):
        pass

    with pytest.raises(NotImplementedError, match="cannot compile Mine, which is built on Attention of mimkernels"):
        torch.jit.script(Mine(32, num_heads=2))


def test_accelerating_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours, _ = accelerated(told(vit(), False))
        ours(images())
