"""timm models on the kernels: the same results, and nothing else changed."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mimkernels
from mimkernels.nn.sdpa import observing

timm = pytest.importorskip("timm")
from timm.layers import Attention, PatchDropout, PatchDropoutWithIndices  # noqa: E402
from timm.models.vision_transformer import Block  # noqa: E402

from mimkernels.heads import record_heads  # noqa: E402
from mimkernels.integrations._reroute import calls_sdpa, rerouted  # noqa: E402
from mimkernels.nn import Mlp, use_mimkernels_attention, use_mimkernels_block, use_mimkernels_mlp  # noqa: E402
from tests.integrations.models import Seen  # noqa: E402

pytestmark = pytest.mark.usefixtures("fused_at_any_size")


def made(name, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kwargs)
    with torch.no_grad():  # what starts at zero hides what it multiplies
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def vit(name="vit_tiny_patch16_224", **kwargs):
    return made(name, **{"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, **kwargs})


def swin(**kwargs):
    sizes = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 2)}
    return made("swin_tiny_patch4_window7_224", **{**sizes, **kwargs})


def swin_v2(**kwargs):
    sizes = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 1), "num_heads": (2, 2)}
    return made("swinv2_tiny_window8_256", **{**sizes, **kwargs})


def images(batch=2, size=32):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(3))


def results(model, x, seed=5):
    """Output and all gradients, by name, of a copy; the same random numbers every time."""
    model, x = copy.deepcopy(model).to(x.dtype), x.clone().requires_grad_()
    torch.manual_seed(seed)
    out = model(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
    (out * weights.to(out.dtype)).sum().backward()
    return {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


def assert_equal_results(ours, stock, x):
    """At most twice the error of the stock model against fp64, and a rounding: the rule of mimkernels.testing."""
    got, wanted = results(ours, x), results(stock, x)
    exact = wanted if stock.training else results(stock, x.double())  # in training, fp64 draws other random numbers
    assert got.keys() == wanted.keys()
    largest = max(value.abs().max().item() for value in exact.values() if value is not None)
    for name, value in got.items():
        if wanted[name] is None:
            assert value is None, name
            continue
        # Some gradients are zero by nature, such as of a bias that is the same for all scores.
        size = max(exact[name].double().abs().max().item(), 1e-2 * largest)
        error, error_of_stock = ((r.double() - exact[name]).abs().max() / size for r in (value, wanted[name]))
        assert error <= 2 * error_of_stock + 5e-6, f"{name}: {error:.1e}, stock {error_of_stock:.1e}"


def accelerated(model, **options):
    ours = copy.deepcopy(model)
    return ours, mimkernels.accelerate(ours, **options)


def calls_of(model, x):
    seen = Seen()
    with observing(seen):
        model(x)
    return seen.calls


MODELS = {
    "plain": (vit, 2),
    "qk_norm": (lambda: vit(qk_norm=True), 2),
    "eva": (lambda: vit("eva02_tiny_patch14_224"), 2),
    "rope": (lambda: vit("vit_small_patch16_rope_mixed_224"), 2),
    "beit": (lambda: vit("beit_base_patch16_224"), 2),
    "relpos": (lambda: vit("vit_relpos_small_patch16_224"), 2),
    "beit_shared": (lambda: vit("beit_base_patch16_224", use_shared_rel_pos_bias=True, use_rel_pos_bias=False), 2),
    "swin": (swin, 3),
    "swin_v2": (swin_v2, 3),
    "attention_pool": (lambda: vit("vit_base_patch16_siglip_224"), 3),
}


@pytest.mark.parametrize("kind", MODELS)
def test_results_and_gradients_stay(kind):
    build, layers = MODELS[kind]
    model, x = build(), images()
    ours, report = accelerated(model)
    became = [change.became for change in report if change.kind not in ("Block", "Mlp") and change.name]
    assert became == ["mimkernels.attention"] * layers
    assert len(calls_of(ours, x)) == layers  # and it is so
    assert_equal_results(ours, model, x)


def test_nothing_else_changes():
    model = vit("vit_base_patch16_siglip_224")
    names, classes = [name for name, _ in model.named_modules()], [type(part) for part in model.modules()]
    before = {id(value): name for name, value in model.state_dict(keep_vars=True).items()}
    text, ran = repr(model), []
    model.blocks[0].attn.register_forward_hook(lambda module, args, out: ran.append(module))
    mimkernels.accelerate(model)
    assert repr(model) == text
    assert [name for name, _ in model.named_modules()] == names
    assert {id(value): name for name, value in model.state_dict(keep_vars=True).items()} == before
    assert all(isinstance(part, kind) for part, kind in zip(model.modules(), classes, strict=True))
    model(images())
    assert ran == [model.blocks[0].attn]
    assert model.train().blocks[0].attn.training and not model.eval().blocks[0].attn.training


@pytest.mark.parametrize("build", [swin, swin_v2, lambda: vit("eva02_tiny_patch14_224", patch_drop_rate=0.5), vit])
def test_restore_is_exact(build):
    model = build()
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
    before = [(type(part), dict(part.__dict__)) for part in model.modules()]
    report = mimkernels.accelerate(model)
    assert [type(part) for part in model.modules()] != [kind for kind, _ in before]
    assert mimkernels.restore(model) == len(report.accelerated) > 0
    assert [(type(part), part.__dict__) for part in model.modules()] == before
    assert mimkernels.restore(model) == 0


def test_layers_that_were_ours_before_stay_so():
    model = vit()
    use_mimkernels_attention(model.blocks[0])
    report = mimkernels.accelerate(model, read_tokens=False)
    assert [change.reason for change in report] == ["", "already", "", "", "", ""]
    mimkernels.restore(model)
    assert [type(block.attn) is Attention for block in model.blocks] == [False, True]


def test_twice_changes_nothing_and_is_reported():
    model = vit("eva02_tiny_patch14_224")
    mimkernels.accelerate(model)
    classes = [type(part) for part in model.modules()]
    again = mimkernels.accelerate(model)
    assert [type(part) for part in model.modules()] == classes
    assert [change.reason for change in again] == ["already"] * 2


def test_the_report_is_a_table():
    model = nn.ModuleDict({"a": vit(depth=1), "b": vit(depth=1, embed_dim=40), "c": nn.MultiheadAttention(32, 2)})
    report = mimkernels.accelerate(model)
    lines = str(report).splitlines()
    assert lines[0].split() == ["module", "class", "now", "remarks"]
    read = "last block of read tokens  what follows attention in its last block runs for [cls] alone".split()
    assert lines[1].split() == ["a", "VisionTransformer", *read]
    assert lines[2].split() == ["a.blocks.0", "Block", "mimkernels.add_layer_norm"]
    assert lines[3].split() == ["a.blocks.0.attn", "Attention", "mimkernels.attention"]
    assert lines[4].split() == ["a.blocks.0.mlp", "Mlp", "mimkernels.bias_gelu"]
    assert lines[5].split() == ["b", "VisionTransformer", *read]
    assert lines[6].split() == ["b.blocks.0", "Block", "mimkernels.add_layer_norm"]
    assert lines[7].startswith("b.blocks.0.attn  Attention") and "head_dim in multiples of 8, got 20" in lines[7]
    assert lines[8].split() == ["b.blocks.0.mlp", "Mlp", "mimkernels.bias_gelu"]
    assert lines[9].split()[:3] == ["c", "MultiheadAttention", "-"]
    assert lines[10] == "7 of 9 on mimkernels"
    assert [change.name for change in report.left] == ["b.blocks.0.attn", "c"] and len(report.accelerated) == 7


def test_parts_can_be_left_out():
    model = vit("vit_base_patch16_siglip_224", patch_drop_rate=0.5)
    kinds = {
        "attention": {"Attention"},
        "pool": {"AttentionPoolLatent"},
        "mlp": {"Mlp"},
        "block": {"Block"},
        "patch_embed": {"VisionTransformer"},
        "patch_drop": {"PatchDropout", "VisionTransformer"},
    }
    everything = {change.kind for change in accelerated(model)[1]}
    assert everything == set.union(*kinds.values())
    for part, without in kinds.items():
        assert {change.kind for change in accelerated(model, **{part: False})[1]} == everything - without


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_attention_dropout_keeps_its_own_path_in_training(name):
    model = vit(name, attn_drop_rate=0.3).train()
    ours, report = accelerated(model, mlp=False, block=False, read_tokens=False)
    assert {change.reason for change in report} == {"not in training: attention dropout 0.3"}
    assert torch.equal(results(ours, images())["out"], results(model, images())["out"])
    assert calls_of(ours, images()) == []
    assert len(calls_of(ours.eval(), images())) == 2


def test_refused_calls_go_to_pytorch_and_are_told_of():
    model = vit("vit_dwee_patch16_reg1_gap_256")
    ours, report = accelerated(model)
    assert_equal_results(ours, model, images())
    assert "head dims differ" in report.refused["DiffAttention"][0] and "DiffAttention" in str(report)


def test_a_hook_on_the_attention_matrix_keeps_it():
    model = vit("eva02_tiny_patch14_224")
    layer, maps = model.blocks[0].attn, []
    layer.fused_attn = False
    layer.attn_drop.register_forward_hook(lambda module, args, out: maps.append(out))
    report = mimkernels.accelerate(model)
    assert report.left[0].reason == "a hook on its attn_drop reads the attention matrix"
    model(images())
    assert maps[0].shape == (2, 2, 17, 17) and len(report.accelerated) == 1


def test_what_cannot_be_taken_is_reported():
    class Parent(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x)

    class Child(Parent):
        def forward(self, x):
            return super().forward(x) * 2

    class LinearAttention(nn.Linear):
        pass

    model = nn.ModuleList([Child(), LinearAttention(4, 4), nn.MultiheadAttention(8, 1), nn.Linear(4, 4)])
    assert [change.reason for change in mimkernels.accelerate(model)] == [
        "its forward calls that of a parent class, which calls SDPA",
        "its forward does not call scaled_dot_product_attention",
        "torch's own layer, with a fused path of its own",
    ]


def test_a_device_without_kernels_is_named():
    with pytest.raises(NotImplementedError, match="the model is on meta, where attention has no kernels"):
        mimkernels.accelerate(vit().to("meta"))
    with pytest.raises(TypeError, match="accelerate takes a module, got str"):
        mimkernels.accelerate("vit_tiny_patch16_224")


# MLPs


def test_mlps_are_taken_and_those_that_cannot_be_are_reported():
    class Mine(timm.layers.Mlp):
        pass

    model = vit(depth=4)
    model.blocks[1].mlp.fc1.register_forward_hook(lambda module, args, out: out + 1)
    model.blocks[2].mlp.act = nn.SiLU()
    model.blocks[3].mlp = Mine(32, 64)
    ours, report = accelerated(model, attention=False, block=False, read_tokens=False)
    assert [(change.name, change.became, change.reason) for change in report] == [
        ("blocks.0.mlp", "mimkernels.bias_gelu", ""),
        ("blocks.1.mlp", "", "a hook or a forward of its own on fc1"),
        ("blocks.2.mlp", "", "its activation is SiLU, not GELU"),
        ("blocks.3.mlp", "", "a class of its own"),
    ]
    assert [type(block.mlp) for block in ours.blocks] == [Mlp, timm.layers.Mlp, timm.layers.Mlp, Mine]
    assert_equal_results(ours, model, images())
    assert mimkernels.restore(ours) == 1 and type(ours.blocks[0].mlp) is timm.layers.Mlp


def test_mlps_that_were_ours_before_stay_so():
    model = vit()
    use_mimkernels_mlp(model.blocks[0])
    report = mimkernels.accelerate(model, attention=False, block=False, read_tokens=False)
    assert [change.reason for change in report] == ["already", ""]
    mimkernels.restore(model)
    assert [type(block.mlp) is Mlp for block in model.blocks] == [True, False]


# Blocks


def test_blocks_are_taken_and_those_that_cannot_be_are_reported():
    class Mine(Block):
        pass

    class Attends(Block):
        def forward(self, x, attn_mask=None, is_causal=False):
            return x + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]

    model = vit(depth=6, drop_path_rate=0.3, init_values=0.5)
    model.blocks[1].norm2.register_forward_hook(lambda module, args, out: out + 1)
    model.blocks[2].norm2 = timm.layers.RmsNorm(32)
    model.blocks[3].drop_path1 = nn.Dropout(0.0)
    for block, kind in zip(model.blocks[4:], (Mine, Attends), strict=True):
        block.__class__ = kind
    ours, report = accelerated(model, attention=False, mlp=False, read_tokens=False)
    assert [(change.name, change.became, change.reason) for change in report] == [
        ("blocks.0", "mimkernels.add_layer_norm", ""),
        ("blocks.1", "", "a hook or a forward of its own on norm2"),
        ("blocks.2", "", "its norm2 is RmsNorm, not LayerNorm of the last dimension"),
        ("blocks.3", "", "its drop_path1 is Dropout, not DropPath"),
        ("blocks.4", "", "a class of its own"),
    ]
    assert [type(block) for block in ours.blocks] == [mimkernels.nn.Block, Block, Block, Block, Mine, Attends]
    assert_equal_results(ours, model, images())
    assert_equal_results(ours.train(), model.train(), images(8))
    assert mimkernels.restore(ours) == 1 and type(ours.blocks[0]) is Block
    (change,) = [change for change in mimkernels.accelerate(model, mlp=False) if change.name == "blocks.5"]
    assert change.became == "mimkernels.attention"  # as before: its forward calls SDPA


@pytest.mark.parametrize(("small", "remark"), [
    (5000, "timm's own is faster, and kept, for less than 10 images, under autocast 2"),
    (544, ""),
])  # fmt: skip
def test_the_report_says_how_few_images_are_left_to_timm_s_block(small, remark, monkeypatch):
    monkeypatch.setattr("mimkernels.nn.block.SMALL", small)
    model = vit(depth=1)  # 17 tokens of 32 numbers
    report = mimkernels.accelerate(model, attention=False, mlp=False, read_tokens=False)
    assert [(change.became, change.reason) for change in report] == [("mimkernels.add_layer_norm", remark)]


def test_blocks_that_were_ours_before_stay_so():
    model = vit()
    use_mimkernels_block(model.blocks[0])
    report = mimkernels.accelerate(model, attention=False, mlp=False, read_tokens=False)
    assert [change.reason for change in report] == ["already", ""]
    mimkernels.restore(model)
    assert [type(block) is Block for block in model.blocks] == [False, True]


# Parts of a user's own, called as those that are wanted


def named(name, *bases):
    return type(name, bases, {"__module__": "theirs"})


@pytest.mark.parametrize(("part", "kind", "reason"), [
    ("mlp.fc1", nn.Linear, "fc1 is theirs.Linear, not torch.nn.Linear"),
    ("mlp.act", nn.GELU, "its activation is theirs.GELU, not GELU"),
    ("norm2", nn.LayerNorm, "its norm2 is theirs.LayerNorm, not LayerNorm of the last dimension"),
    ("drop_path1", timm.layers.DropPath, "its drop_path1 is theirs.DropPath, not DropPath"),
])  # fmt: skip
def test_a_class_that_is_called_as_the_wanted_one_is_named_with_its_module(part, kind, reason):
    model = vit(depth=1, drop_path_rate=0.1)
    model.blocks[0].get_submodule(part).__class__ = named(kind.__name__, kind)
    report = mimkernels.accelerate(model, attention=False, read_tokens=False)
    assert reason in [change.reason for change in report]


def test_a_part_that_is_called_as_the_wanted_one_compiles_whole():
    model = vit(depth=1, drop_path_rate=0.1)
    mimkernels.accelerate(model)
    block = model.blocks[0]
    block.mlp.fc1.__class__, block.norm2.__class__ = named("Linear", nn.Linear), named("LayerNorm", nn.LayerNorm)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images()), model(images()))


# Patch dropout


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("kind", [PatchDropout, PatchDropoutWithIndices])
def test_the_same_patches_are_dropped(kind, ordered, prefix):
    drop = kind(0.4, num_prefix_tokens=prefix, ordered=ordered)
    ours, report = accelerated(drop)
    assert report.accelerated[0].kind == kind.__name__
    x = torch.randn(3, 12 + prefix, 8, requires_grad=True)
    made = []
    for module in (ours, drop):
        torch.manual_seed(2)
        out = module(x)
        tensors = out if isinstance(out, tuple) else (out,)
        (gradient,) = torch.autograd.grad(tensors[0].square().sum(), x)
        made.append((*tensors, gradient))
    for got, wanted in zip(*made, strict=True):
        assert torch.equal(got, wanted) and got.dtype == wanted.dtype
    assert made[0][0].shape == (3, 7 + prefix, 8)
    assert (ours.eval()(x)[0] if kind is PatchDropoutWithIndices else ours.eval()(x)) is x


@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}, {"no_embed_class": True},
                                     {"reg_tokens": 2}, {"dynamic_img_size": True}], ids=str)  # fmt: skip
def test_only_kept_patches_are_embedded_in_training(options):
    model = vit(patch_drop_rate=0.5, **options)
    ours, report = accelerated(model)
    assert report.accelerated[0].became.split(", ")[0] == "mimkernels.patchify_gather"
    ran = []
    ours.norm_pre.register_forward_hook(lambda module, args, out: ran.append(out.shape[1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(ours.patch_embed), "forward", lambda self, x: pytest.fail("every patch was embedded"))
        ours.train()(images())
        assert ran == [8 + model.num_prefix_tokens]
    assert_equal_results(ours, model.train(), images())
    assert_equal_results(ours.eval(), model.eval(), images())


def test_hooks_on_the_embedding_still_run():
    model = vit(patch_drop_rate=0.5).train()
    ours, _ = accelerated(model)
    ran = []
    ours.patch_embed.register_forward_hook(lambda module, args, out: ran.append(out.shape))
    assert_equal_results(ours, model, images())
    assert ran == [(2, 16, 32)]


def test_position_dropout_keeps_the_embedding():
    report = mimkernels.accelerate(vit(patch_drop_rate=0.5, pos_drop_rate=0.1))
    assert report.left[0].reason == "embeds every patch: position dropout comes before patch dropout"


# Other tools


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_copies_and_pickles(name):
    ours = vit(name, patch_drop_rate=0.5)
    mimkernels.accelerate(ours)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert [type(part) for part in again.modules()] == [type(part) for part in ours.modules()]
        assert torch.equal(again(images()), ours(images()))
        assert mimkernels.restore(again) == mimkernels.restore(copy.deepcopy(ours)) == {"v": 8, "e": 3}[name[0]]


def test_second_derivatives_are_refused_by_kernels_and_computed_by_the_reference():
    model = swin_v2().eval()
    ours, _ = accelerated(model)

    def second(of):
        x = images().requires_grad_()
        (first,) = torch.autograd.grad(of(x)[:, 0].sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    with pytest.raises(NotImplementedError, match="backend='reference' has second derivatives"):
        second(ours)
    with mimkernels.use_backend("reference"):
        torch.testing.assert_close(second(ours), second(model), rtol=1e-3, atol=1e-6)


def test_the_model_compiles_whole():
    model = vit("eva02_tiny_patch14_224", depth=1)
    ours, _ = accelerated(model)
    with torch.no_grad():
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")(images())
        torch.testing.assert_close(compiled, model(images()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dynamic", [None, True])
def test_training_with_patch_dropout_compiles(dynamic):
    ours = vit(depth=1, patch_drop_rate=0.5).train()
    mimkernels.accelerate(ours)
    torch._dynamo.reset()
    out = torch.compile(ours, fullgraph=True, dynamic=dynamic, backend="aot_eager")(images())
    out.sum().backward()
    assert ours.patch_embed.proj.weight.grad.abs().sum() > 0


def test_features_by_fx():
    from timm.models._features_fx import create_feature_extractor

    model = vit("beit_base_patch16_224")
    ours, _ = accelerated(model)
    got, wanted = (create_feature_extractor(m, ["blocks.0", "norm"])(images()) for m in (ours, model))
    assert len(got) == 2
    for a, b in zip(got.values(), wanted.values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", [vit, swin])
def test_an_accelerated_model_moves_to_the_meta_device(build):
    ours, _ = accelerated(build())
    assert ours.to("meta")(images().to("meta")).shape == build()(images()).shape


def test_autocast():
    model = vit("eva02_tiny_patch14_224")
    ours, _ = accelerated(model)
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = ours(images()), model(images())
        assert calls_of(ours, images())[0].q.dtype == torch.bfloat16
    assert got.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(got, wanted, atol=0.05, rtol=0.05)


def test_heads_are_recorded_and_captured():
    ours = vit()
    mimkernels.accelerate(ours)
    with record_heads(ours, ["entropy"], num_prefix=1) as heads:
        ours(images())
    with mimkernels.capture(ours, ["entropy"]) as captured:
        ours(images())
    assert list(captured) == ["blocks.0.attn", "blocks.1.attn"]
    for layer, recorded in zip(captured.values(), heads.values(), strict=True):
        assert torch.equal(layer.stats["entropy"], recorded.stats["entropy"])
    other = vit("beit_base_patch16_224")
    mimkernels.accelerate(other)
    with mimkernels.capture(other, ["entropy"]) as captured:
        other(images())
    assert [layer.stats["entropy"].shape for layer in captured.values()] == [(2, 2, 17)] * 2


def test_lightly_masked_vision_transformer():
    modules = pytest.importorskip("lightly.models.modules")
    model = modules.MaskedVisionTransformerTIMM(vit(), mask_token=nn.Parameter(torch.randn(1, 1, 32)))
    ours, report = accelerated(model)
    assert len(report.accelerated) == 4
    kept = torch.tensor([[0, 3, 5, 9], [0, 16, 2, 1]])
    mask = torch.zeros(2, 17, dtype=torch.bool)
    mask[:, 4:9] = True
    for options in ({"idx_keep": kept}, {"mask": mask}):
        got, wanted = ours.encode(images(), **options), model.encode(images(), **options)
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)


# The mechanism


class Outer(nn.Module):
    def forward(self, x):
        return x + 1


def test_a_rerouted_function_keeps_its_surroundings():
    factor = 3.0

    class Inner(Outer):
        def forward(self, x, shift: "NotDefined" = 2.0, *, times=(1.0,)):  # noqa: F821
            attended = [torch.nn.functional.scaled_dot_product_attention(x, x, x) * t for t in times]
            return super().forward(sum(attended)) * factor + shift

    seen = []

    def attention_instead(q, k, v):
        seen.append(q)
        return q

    assert calls_sdpa(Inner.forward) and not calls_sdpa(Outer.forward)
    new = rerouted(Inner.forward, attention_instead)
    x = torch.ones(1, 1, 2, 8)
    assert torch.equal(new(Inner(), x), (x + 1) * 3 + 2) and torch.equal(new(Inner(), x, 0.0, times=(2.0,)), x * 9)
    assert len(seen) == 2 and not calls_sdpa(new) and calls_sdpa(Inner.forward)
    assert (new.__code__.co_filename, new.__name__, new.__qualname__) == (
        __file__,
        "forward",
        Inner.forward.__qualname__,
    )
    lines = [{line for *_, line in f.__code__.co_lines() if line} for f in (new, Inner.forward)]
    assert max(lines[0]) == max(lines[1])


def test_a_class_without_source_is_left_with_the_reason():
    space = {"nn": nn, "F": F}
    exec(
        "class Made(nn.Module):\n    def forward(self, x):\n        return F.scaled_dot_product_attention(x, x, x)",
        space,
    )
    (change,) = mimkernels.accelerate(space["Made"]())
    assert not change.became and change.reason.startswith("its source cannot be read")


def test_importing_mimkernels_offers_it_without_timm():
    shows = "print('timm' in sys.modules)"
    code = f"import sys, mimkernels; {shows}; mimkernels.accelerate; {shows}"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"]
