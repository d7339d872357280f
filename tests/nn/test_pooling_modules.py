"""Every pooling against its formula in plain PyTorch, in float64; timm's modules where they state the same."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mimkernels.nn import build_pooling, cls_attention, poolings, sincos_positions_2d
from mimkernels.nn.pooling import Pooling

B, P, SIDE, D = 3, 2, 4, 24
N = P + SIDE * SIDE


@pytest.fixture
def tokens():
    torch.manual_seed(0)
    return torch.randn(B, N, D, dtype=torch.float64)


@pytest.fixture
def cls_rows():
    """[cls] attention per head, of heads with clearly different entropies."""
    torch.manual_seed(1)
    return (torch.randn(B, 3, N, dtype=torch.float64) * torch.tensor([0.1, 3.0, 1.0])[:, None]).softmax(2)


def build(name: str, **options) -> Pooling:
    torch.manual_seed(2)
    return build_pooling(name, D, P, **options).double()


def softmax_sum(scores, values):
    """scores [B, N'], values [B, N', D]."""
    return (scores.softmax(1)[:, :, None] * values).sum(1)


def attend(q, k, v, heads):
    """Multi-head attention of q [B or 1, L, D] over k, v [B, N', D]."""
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q.expand(len(k), -1, -1), k, v))
    weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(3)
    return (weights @ v).transpose(1, 2).flatten(2), weights


def plain_self_attention(part, x):
    q, k, v = part.qkv(x).chunk(3, dim=2)
    return part.proj((q @ k.transpose(1, 2) / math.sqrt(D)).softmax(2) @ v)


def plain_map(m, x, rows):
    k, v = m.kv(x[:, P:]).chunk(2, dim=2)
    y = m.proj(attend(m.q(m.latent), k, v, m.num_heads)[0])
    y = y + m.mlp["fc2"](F.gelu(m.mlp["fc1"](m.norm(y))))
    return y[:, 0] if m.pool_type == "token" else y.mean(1)


def plain_aim(m, x, rows):
    x = x[:, P:]
    x = (x - x.mean((0, 1))) / (x.var((0, 1), unbiased=False) + 1e-6).sqrt()
    return attend(m.queries[None], m.k(x), m.v(x), m.num_heads)[0].mean(1)


def plain_cae(m, x, rows):
    x = x[:, P:]
    return m.proj(attend(m.q(m.norm_q(m.query))[None], m.k(m.norm_k(x)), m.v(m.norm_v(x)), m.num_heads)[0]).squeeze(1)


def plain_simpool(m, x, rows):
    x = x[:, P:]
    normed = m.norm(x)
    values = normed if m.gamma is None else (normed - normed.amin(1, keepdim=True) + 1e-6) ** m.gamma
    out = attend(m.q(x.mean(1, keepdim=True)), m.k(normed), values, m.num_heads)[0].squeeze(1)
    return out if m.gamma is None else out ** (1 / m.gamma)


def plain_ep(m, x, rows):
    x = x[:, P:]
    values = m.value(x).chunk(len(m.queries), dim=2)
    return torch.cat([softmax_sum(x @ q / math.sqrt(D), v) for q, v in zip(m.queries, values, strict=True)], dim=1)


def plain_lowest_entropy(m, x, rows):
    share = rows[:, :, P:] / rows[:, :, P:].sum(2, keepdim=True)
    chosen = torch.special.entr(share).sum(2).argmin(1)
    return torch.stack([share[b, chosen[b]] @ x[b, P:] for b in range(B)])


def plain_abmilp(m, x, rows):
    """With all options at once: positions, two hidden layers, self-attention for scores and values."""
    y = plain_self_attention(m.self_attn, x)
    u = y + sincos_positions_2d(D, (SIDE, SIDE), P).double()
    return softmax_sum(m.score(m.hidden(u)).squeeze(2), y)


def most(scores, k):
    return scores >= scores.sort(1, descending=True).values[:, k - 1 : k]


def mean_of(chosen, x):
    return (chosen[:, :, None] * x).sum(1) / chosen.sum(1, keepdim=True)


FORMULAS = {
    "cls": ({}, lambda m, x, rows: x[:, 0]),
    "mean": ({}, lambda m, x, rows: x[:, P:].mean(1)),
    "max": ({}, lambda m, x, rows: x[:, P:].amax(1)),
    "gem": ({"p": 2.5}, lambda m, x, rows: (x[:, P:].clamp(min=1e-6) ** m.p).mean(1) ** (1 / m.p)),
    "cls+mean": ({}, lambda m, x, rows: torch.cat((x[:, 0], x[:, P:].mean(1)), 1)),
    "abmilp": ({}, lambda m, x, rows: softmax_sum(m.score(x[:, P:]).squeeze(2), x[:, P:])),
    "abmilp all": ({"content": "all"}, lambda m, x, rows: softmax_sum(m.score(x).squeeze(2), x)),
    "abmilp map": (
        {"self_attention": "map", "depth": 2, "activation": "relu"},
        lambda m, x, rows: softmax_sum(
            m.score(F.relu(m.hidden[0](plain_self_attention(m.self_attn, x[:, P:])))).squeeze(2), x[:, P:]
        ),
    ),
    "abmilp both": ({"content": "all", "self_attention": "both", "depth": 3, "positions": True}, plain_abmilp),
    "attn-mn": (
        {},
        lambda m, x, rows: (
            torch.einsum("bn,bnd->bd", rows[:, :, P:].mean(1), x[:, P:]) / rows[:, :, P:].mean(1).sum(1, keepdim=True)
        ),
    ),
    "attn-lcte": ({}, plain_lowest_entropy),
    "topk": ({"k": 5}, lambda m, x, rows: mean_of(most(rows.mean(1)[:, P:], 5), x[:, P:])),
    "topk norm": ({"by": "norm"}, lambda m, x, rows: mean_of(most(x[:, P:].norm(dim=2), 4), x[:, P:])),
    "ep": ({"num_queries": 6}, plain_ep),
    "ep narrow": ({"num_queries": 4, "out_dim": 12}, plain_ep),
    "map": ({"num_heads": 4}, plain_map),
    "map avg": ({"num_heads": 2, "latent_len": 3, "pool_type": "avg", "norm": True}, plain_map),
    "aim": ({"num_heads": 4, "num_queries": 3}, plain_aim),
    "cae": ({"num_heads": 3}, plain_cae),
    "simpool": ({}, plain_simpool),
    "simpool gamma": ({"num_heads": 4, "gamma": 2.0}, plain_simpool),
}


def randomized(module):
    """Norms start as the identity and would hide a forgotten gain or bias."""
    torch.manual_seed(3)
    for weight in module.parameters():
        weight.data.add_(0.3 * torch.randn_like(weight))
    return module


def test_every_pooling_has_its_formula_here():
    assert {label.partition(" ")[0] for label in FORMULAS} == set(poolings())


@pytest.mark.parametrize("label", FORMULAS)
def test_equals_the_formula_with_gradients(label, tokens, cls_rows):
    options, formula = FORMULAS[label]
    module = randomized(build(label.partition(" ")[0], **options))
    x, y = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    rows = cls_rows if module.needs_cls_attention else None
    out, wanted = module(x, cls_attention=rows), formula(module, y, cls_rows)
    assert out.shape == (B, module.out_dim)
    # The fp32 sine table and attention maps are all that is not fp64.
    tolerance = (
        {"rtol": 1e-6, "atol": 1e-6} if rows is not None or "positions" in options else {"rtol": 1e-9, "atol": 1e-9}
    )
    torch.testing.assert_close(out, wanted, **tolerance)
    direction = torch.randn_like(out)
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    got = torch.autograd.grad((out * direction).sum(), [x, *weights], allow_unused=True)
    expected = torch.autograd.grad((wanted * direction).sum(), [y, *weights], allow_unused=True)
    for one, other in zip(got, expected, strict=True):
        # What cancels in the softmax has no gradient here and one of rounding size there.
        one = torch.zeros_like(other) if one is None else one
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, **tolerance)


@pytest.mark.parametrize(
    "label", [label for label in FORMULAS if build(label.partition(" ")[0], **FORMULAS[label][0]).gives_weights]
)
def test_weights_sum_to_one_over_what_is_pooled(label, tokens, cls_rows):
    options = FORMULAS[label][0]
    module = build(label.partition(" ")[0], **options)
    rows = cls_rows if module.needs_cls_attention else None
    pooled, weights = module(tokens, cls_attention=rows, return_weights=True)
    torch.testing.assert_close(pooled, module(tokens, cls_attention=rows))
    assert weights.shape[::2] == (B, N)
    torch.testing.assert_close(weights.sum(2).double(), torch.ones(weights.shape[:2], dtype=torch.float64))
    assert bool((weights[:, :, :P] == 0).all()) != (options.get("content") == "all")


def test_prefix_tokens_do_not_reach_what_pools_patches(tokens, cls_rows):
    changed = tokens.clone()
    changed[:, :P] = float("nan")
    for name in sorted(set(poolings()) - {"cls", "cls+mean"}):
        module = build(name, **({"num_queries": 6} if name == "ep" else {}))
        rows = cls_rows if module.needs_cls_attention else None
        torch.testing.assert_close(module(changed, cls_attention=rows), module(tokens, cls_attention=rows), msg=name)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("latent_len", "pool_type"), [(1, "token"), (3, "avg")])
def test_map_loads_what_timm_has(norm, latent_len, pool_type, tokens):
    timm_layers = pytest.importorskip("timm.layers")
    theirs = timm_layers.AttentionPoolLatent(
        D,
        num_heads=4,
        mlp_ratio=2.0,
        latent_len=latent_len,
        pool_type=pool_type,
        norm_layer=nn.LayerNorm if norm else None,
    )
    theirs = randomized(theirs.double())
    ours = build("map", num_heads=4, mlp_ratio=2.0, latent_len=latent_len, pool_type=pool_type, norm=norm)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(tokens), theirs(tokens[:, P:]), rtol=1e-9, atol=1e-9)
    assert ours.num_parameters == sum(weight.numel() for weight in theirs.parameters())


@pytest.mark.parametrize("gamma", [None, 1.25])
def test_simpool_loads_what_timm_has(gamma, tokens):
    timm_layers = pytest.importorskip("timm.layers")
    if not hasattr(timm_layers, "SimPool1d"):
        pytest.skip("this timm has no SimPool1d")
    theirs = randomized(timm_layers.SimPool1d(D, num_heads=3, gamma=gamma).double())
    ours = build("simpool", num_heads=3, gamma=gamma, norm_eps=1e-5)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(tokens), theirs(tokens[:, P:]), rtol=1e-9, atol=1e-9)


def test_cls_attention_is_the_first_row_of_the_softmax():
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, 7, 8).unbind(0)
    wanted = (q @ k.transpose(2, 3) / math.sqrt(8)).softmax(3)[:, :, 0]
    torch.testing.assert_close(cls_attention(q, k), wanted)


def test_the_last_block_of_a_timm_model_gives_the_attention():
    timm = pytest.importorskip("timm")
    from mimkernels.heads import record_heads
    from mimkernels.nn import use_mimkernels_attention

    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=D, num_heads=2, num_classes=0
    ).eval()
    seen = []
    block = model.blocks[-1].attn
    block.fused_attn = False
    block.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted_tokens = model.forward_features(images)
        use_mimkernels_attention(model.blocks[-1])
        with record_heads(model.blocks[-1], keep=("q", "k")) as heads:
            tokens = model.forward_features(images)
    rows = cls_attention(heads[0].q, heads[0].k, **heads[0].options)
    torch.testing.assert_close(rows, seen[0][:, :, 0])
    torch.testing.assert_close(tokens, wanted_tokens)
    assert build_pooling("attn-lcte", D, 1)(tokens, cls_attention=rows).shape == (2, D)


@pytest.mark.parametrize(
    ("label", "parameters"),
    [("cls", 0), ("attn-mn", 0), ("gem", 1), ("abmilp", D), ("ep", 24 * D + D * D), ("simpool", 2 * D + 2 * D * D)],
)
def test_parameters_are_counted(label, parameters):
    module = build(label, **({"num_queries": 24} if label == "ep" else {}))
    assert module.num_parameters == parameters
    assert str(parameters) in repr(module)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("attn", {}, "unknown pooling 'attn'; known: cls, mean, max, gem"),
        ("abmlip", {}, "did you mean 'abmilp'"),
        ("abmilp", {"queries": 3}, "has no option 'queries'; it has depth, activation, content"),
        ("mean", {"p": 3}, "has no option 'p'; it has none"),
        ("abmilp", {"activation": "gelu"}, "activation must be one of tanh, relu, got 'gelu'"),
        ("abmilp", {"depth": 0}, "depth must be at least 1"),
        ("ep", {"num_queries": 7}, "num_queries must divide the 24 columns of the result, got 7"),
        ("map", {"num_heads": 5}, "num_heads must divide the 24 columns of a token, got 5"),
        ("topk", {"k": 0}, "k must be a positive"),
        ("ep", {"num_queries": "x"}, "pooling 'ep': num_queries must be int or None, got 'x'"),
        ("ep", {"num_queries": True}, "num_queries must be int or None, got True"),
        ("gem", {"p": "3"}, "p must be float, got '3'"),
        ("gem", {"p": math.nan}, "p must be finite, got nan"),
        ("gem", {"p": 0.0}, "p must be positive, got 0.0"),
        ("map", {"mlp_ratio": math.inf}, "mlp_ratio must be finite, got inf"),
        ("map", {"latent_len": 0}, "latent_len must be positive, got 0"),
        ("simpool", {"gamma": -1.0}, "gamma must be positive, got -1.0"),
        ("abmilp", {"positions": "grid"}, "positions must be bool or Sequence, got 'grid'"),
    ],
)
def test_refusals_name_what_would_work(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)


def test_efficient_probing_fits_its_queries_to_the_width():
    for dim, queries in ((768, 32), (48, 24), (192, 32), (7, 7)):
        assert len(build_pooling("ep", dim, 1).queries) == queries


def test_tokens_and_attention_are_checked(tokens, cls_rows):
    with pytest.raises(ValueError, match=r"tokens must be \[B, N, 24\]"):
        build("mean")(tokens[..., :5])
    with pytest.raises(ValueError, match="attn-mn needs cls_attention"):
        build("attn-mn")(tokens)
    with pytest.raises(ValueError, match=r"cls_attention must be \[3, H, 18\], got \[3, 3, 17\]"):
        build("attn-mn")(tokens, cls_attention=cls_rows[:, :, 1:])
    with pytest.raises(ValueError, match="has no weights to return"):
        build("max")(tokens, return_weights=True)
    with pytest.raises(ValueError, match=r"needs a \[cls\] token"):
        build_pooling("cls+mean", D, 0)
    with pytest.raises(ValueError, match="a grid of 3 x 5, but there are 16 patches"):
        build("abmilp", positions=(3, 5))(tokens)
    with pytest.raises(ValueError, match="k = 17, but there are 16 patches"):
        build("topk", k=17)(tokens, cls_attention=cls_rows)
