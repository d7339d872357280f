"""``accelerate`` runs what follows attention in the last block for the tokens only that the head reads."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("timm")
import timm
from timm.models.vision_transformer import Block, VisionTransformer

import mimkernels
from tests.products import Products

WIDTH, DEPTH, BATCH, PATCHES = 48, 3, 2, 16
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 3, "num_classes": 5}
MODELS = {
    "cls": ("vit_tiny_patch16_224", {}, 1),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 3}, 1),
    "norm behind pooling": ("vit_tiny_patch16_224", {"fc_norm": True, "no_embed_class": True}, 1),
    "no classifier": ("vit_tiny_patch16_224", {"num_classes": 0}, 1),
    "LayerScale, stochastic depth": ("vit_tiny_patch16_224", {"init_values": 0.5, "drop_path_rate": 0.5}, 1),
    "gated MLP": ("vit_tiny_patch16_224", {"mlp_layer": timm.layers.SwiGLU}, 1),
    "patches dropped": ("vit_tiny_patch16_224", {"patch_drop_rate": 0.5}, 1),
    "images of any size": ("vit_tiny_patch16_224", {"dynamic_img_size": True}, 1),
    "distilled": ("deit_tiny_distilled_patch16_224", {}, 2),
    "timm's RmsNorm": ("vit_tiny_patch16_224", {"norm_layer": timm.layers.RmsNorm, "fc_norm": True}, 1),
    "torch's RMSNorm": ("vit_tiny_patch16_224", {"norm_layer": nn.RMSNorm}, 1),
    "SimpleNorm": ("vit_tiny_patch16_224", {"norm_layer": timm.layers.SimpleNorm, "scale_mlp_norm": True}, 1),
    "norms in fp32": ("vit_tiny_patch16_224", {"norm_layer": timm.layers.RmsNormFp32}, 1),
}  # fmt: skip


def stock(kind="cls", **changes):
    torch.manual_seed(0)
    name, options, _ = MODELS[kind]
    model = timm.create_model(name, **{**TINY, **options, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def accelerated(model, **options):
    ours = copy.deepcopy(model)
    report = mimkernels.accelerate(ours, **options)
    return ours, [change for change in report if change.name == ""]


def images(dtype=torch.float32):
    return torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def operations(model, *args, **options):
    with Products() as products:
        model(images(), *args, **options)
    return products.operations


def saved(tokens=PATCHES, width=WIDTH):
    """Operations of an MLP for so many tokens of every image."""
    return BATCH * tokens * 2 * 8 * width**2


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_results_and_gradients_are_those_of_stock(kind, training):
    plain = stock(kind).double().train(training)
    ours, (change,) = accelerated(plain)
    assert "last block of read tokens" in change.became and "runs for [cls]" in change.reason
    results = []
    for model in (plain, ours):
        torch.manual_seed(3)  # of stochastic depth and patch dropout
        out = model(images(torch.float64))
        out.square().sum().backward()
        results.append((out.detach(), {name: value.grad for name, value in model.named_parameters()}))
    (wanted, expected), (got, grads) = results
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["cls", "registers", "distilled", "LayerScale, stochastic depth", "torch's RMSNorm"])
def test_other_tokens_skip_the_last_mlp(kind):
    model = stock(kind).eval()
    ours, _ = accelerated(model)
    whole, _ = accelerated(model, read_tokens=False)
    unread = model.num_prefix_tokens + PATCHES - MODELS[kind][2]
    assert operations(whole) - operations(ours) == saved(unread) > 0


def all_tokens(model):
    """Whether the last block computes every token, and results are stock's nevertheless."""
    whole = copy.deepcopy(model)
    mimkernels.restore(whole)
    mimkernels.accelerate(whole, read_tokens=False)
    torch.testing.assert_close(model(images()), whole(images()))
    return operations(model) == operations(whole)


def hook(*call):
    return None


class OfItsOwn(nn.GELU):
    pass


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.reset_classifier(5, "avg"),
        lambda m: m.blocks[-1].register_forward_hook(hook),
        lambda m: m.blocks[-1].mlp.fc1.register_forward_hook(hook),
        lambda m: m.blocks[-1].drop_path2.register_forward_hook(hook),
        lambda m: m.norm.register_forward_pre_hook(hook),
        lambda m: m.blocks.register_forward_hook(hook),
        lambda m: m.blocks[-1].__dict__.update(forward=functools.partial(Block.forward, m.blocks[-1])),
        lambda m: setattr(m.blocks[-1].mlp, "act", OfItsOwn()),
        lambda m: setattr(m.blocks[-1].mlp, "norm", nn.BatchNorm1d(17).eval()),
        lambda m: setattr(m.blocks[-1].mlp, "act", nn.PReLU(17)),
        lambda m: setattr(m.blocks[-1].mlp, "act", nn.Softmin(dim=1)),
        lambda m: setattr(m.blocks[-1], "norm2", nn.RMSNorm((17, WIDTH))),
        lambda m: m.set_grad_checkpointing(),
    ],
)
def test_who_looks_later_sees_all_tokens(change):
    ours, _ = accelerated(stock().eval())
    before = operations(ours)
    change(ours)
    assert all_tokens(ours) and operations(ours) > before


@pytest.mark.parametrize("name", ["forward", "forward_features", "forward_head", "pool"])
@pytest.mark.parametrize("kind", ["cls", "distilled"])
def test_a_method_that_somebody_replaces_gets_what_timm_gives_it(kind, name, monkeypatch):
    ours, _ = accelerated(stock(kind).eval())
    shapes = []
    timms = getattr(type(stock(kind)), name)

    def replaced(self, x, **given):
        shapes.append(x.shape[1])
        return timms(self, x, **given)

    with monkeypatch.context() as patch:
        patch.setattr(type(stock(kind)), name, replaced)
        ours(images())
    ours.__dict__[name] = functools.partial(replaced, ours)
    ours(images())
    tokens = 3 if name in ("forward", "forward_features") else PATCHES + ours.num_prefix_tokens  # or colours
    assert set(shapes) == ({tokens} if (kind, name) != ("distilled", "pool") else set())


def test_norms_over_more_than_a_token_see_all():
    ours, _ = accelerated(stock())
    ours.norm = nn.LayerNorm((17, WIDTH))
    assert all_tokens(ours.eval())


def test_dropout_in_the_mlp_draws_as_in_stock():
    plain = stock(proj_drop_rate=0.3).train()
    ours, (change,) = accelerated(plain)
    assert change.reason.endswith("[cls] alone, not in training: dropout in the MLP")
    out = []
    for model in (plain, ours):
        torch.manual_seed(3)
        out.append(model(images()))
    torch.testing.assert_close(*out)
    ours.eval()
    assert not all_tokens(ours)


def test_tokens_of_a_model_are_those_of_stock():
    plain = stock().eval()
    ours, _ = accelerated(plain)
    torch.testing.assert_close(ours.forward_features(images()), plain.forward_features(images()))
    torch.testing.assert_close(ours.forward_intermediates(images())[0], plain.forward_intermediates(images())[0])
    mask = torch.zeros(17, 17).masked_fill(torch.eye(17, dtype=torch.bool), float("-inf"))
    torch.testing.assert_close(ours(images(), attn_mask=mask), plain(images(), attn_mask=mask))
    tokens = []
    handle = ours.norm.register_forward_hook(lambda *call: tokens.append(call[-1].shape))
    ours(images())
    assert tokens == [(BATCH, 17, WIDTH)]
    handle.remove()


def test_heads_of_every_token_are_captured():
    plain = stock().eval()
    ours, _ = accelerated(plain)
    recorded = []
    for model in (ours, plain):
        with mimkernels.capture(model, ["entropy", "distance"]) as heads:
            model(images())
        recorded.append(heads)
    for layer in range(DEPTH):
        got, wanted = (heads[f"blocks.{layer}.attn"].stats for heads in recorded)
        for name in ("entropy", "distance"):
            assert got[name].shape == (BATCH, 3, 17)
            torch.testing.assert_close(got[name], wanted[name])


class NormOfItsOwn(nn.LayerNorm):
    pass


def theirs(kind):
    """A class of somebody else, called as one of timm's."""
    return type(kind.__name__, (kind,), {"__module__": "theirs"})


@pytest.mark.parametrize(
    ("changes", "mlp", "reason"),
    [
        ({"block_fn": timm.models.vision_transformer.ResPostBlock}, None, "its last block is ResPostBlock"),
        ({}, timm.layers.GlobalResponseNormMlp, "its MLP is GlobalResponseNormMlp"),
        ({"norm_layer": NormOfItsOwn}, None, "its norm is NormOfItsOwn, not known to act on the last dimension alone"),
        ({"block_fn": theirs(timm.models.vision_transformer.Block)}, None, "its last block is theirs.Block"),
        ({}, theirs(timm.layers.Mlp), "its MLP is theirs.Mlp"),
        ({"norm_layer": theirs(nn.LayerNorm)}, None, "its norm is theirs.LayerNorm, not known to act on the last"),
    ],
)
def test_the_report_says_why_not(changes, mlp, reason):
    model = stock(**changes)
    if mlp is not None:
        model.blocks[-1].mlp = mlp(WIDTH)
    ours, (change,) = accelerated(model)
    assert change.became == "" and reason in change.reason
    assert type(ours) is VisionTransformer


@pytest.mark.parametrize(
    "changes", [{"global_pool": "avg"}, {"global_pool": "map"}, {"class_token": False, "global_pool": "avg"}]
)
def test_models_that_read_all_tokens_stay_as_they_are(changes):
    _, lines = accelerated(stock(**changes))
    assert lines == []


def test_options_choose_what_is_taken():
    model = stock("patches dropped")
    assert accelerated(model, read_tokens=False)[1][0].became == "mimkernels.patchify_gather"
    assert accelerated(model, patch_embed=False)[1][0].became == "last block of read tokens"
    assert accelerated(model, patch_embed=False, read_tokens=False)[1] == []


def test_copies_and_pickles_do_it_too_until_restored():
    ours, _ = accelerated(stock().eval())
    fewer = operations(ours)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert operations(other) == fewer
        mimkernels.restore(other)
        assert type(other) is VisionTransformer and vars(other).keys() == vars(stock()).keys()
        assert operations(other) - fewer == saved()


@pytest.mark.parametrize("kind", ["cls", "patches dropped"])
def test_it_compiles_whole_and_traces_as_stock(kind):
    plain = stock(kind).eval()
    ours, _ = accelerated(plain)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), plain(images()))
    traced = torch.jit.trace(copy.deepcopy(ours), images(), check_trace=False)
    torch.testing.assert_close(traced(images()), plain(images()))
