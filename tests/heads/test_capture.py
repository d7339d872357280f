"""capture: every model's statistics are those of its materialised attention, and the model stays what it was."""

import copy

import pytest
import torch
import torch.nn.functional as F

import mimkernels
from mimkernels.heads import patch_grid_positions
from mimkernels.heads.fused import fused_attention
from tests.integrations import models as m

ROWS = ("entropy", "prefix_mass", "distance")


def materialised(model, run):
    """``(queries, keys, P [B, H, Nq, Nk] fp64)`` of every call of attention, in order."""
    maps = []
    plain = F.scaled_dot_product_attention

    def keep(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        scores = query.double() @ key.double().transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            scores = scores + attn_mask
        maps.append(scores.softmax(-1))
        return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    F.scaled_dot_product_attention = keep
    try:
        with torch.no_grad(), fused_attention(model):
            run(model)
    finally:
        F.scaled_dot_product_attention = plain
    return maps


def rows_of(p, prefix, grid):
    made = {"entropy": -torch.special.xlogy(p, p).sum(-1), "prefix_mass": p[..., :prefix].sum(-1)}
    if p.shape[-2] == p.shape[-1]:
        places = patch_grid_positions(grid).double()
        between = torch.zeros(p.shape[-2:], dtype=torch.float64)
        between[prefix:, prefix:] = torch.cdist(places, places)
        made["distance"] = (p * between).sum(-1)
    return made


def assert_same_output(ours, model, run):
    """At most twice the error of the plain model, and a few roundings, against the model in float64."""
    exact = run(copy.deepcopy(model).double(), torch.float64)
    plain = run(model, torch.float32)
    allowed = 2 * (plain.double() - exact).abs().max() + 8 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert ours.dtype == plain.dtype and (ours.double() - exact).abs().max() <= allowed


def on_images(model, dtype=torch.float32):
    made = model(m.images().to(dtype))
    return made if isinstance(made, torch.Tensor) else made.last_hidden_state


def on_tokens(model, dtype=torch.float32):
    return model(m.tokens().to(dtype))


def padded(model, dtype=torch.float32):
    hidden = torch.zeros(2, 17, dtype=torch.bool)
    hidden[0, 12:] = True
    return model(m.tokens().to(dtype), src_key_padding_mask=hidden)


def mae(model, dtype=torch.float32):
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(0))
    return model(m.images().to(dtype), noise=noise).logits


GRID = (4, 4)
GIVEN = {"num_prefix": 1, "positions": GRID}
# model, how it runs, options of capture, prefix tokens, names of the first and last layer
MODELS = {
    "timm vit": (m.vit, on_images, {}, 1, "blocks.0.attn", "blocks.1.attn"),
    "timm vit, plain branch": (
        lambda: not_fused(m.vit()), on_images, {}, 1, "blocks.0.attn", "blocks.1.attn"
    ),
    "timm registers": (
        lambda: m.timm_model("vit_small_patch14_reg4_dinov2", patch_size=8), on_images, {}, 5,
        "blocks.0.attn", "blocks.1.attn",
    ),
    "timm dinov2": (
        lambda: m.timm_model("vit_small_patch14_dinov2", patch_size=8), on_images, {}, 1,
        "blocks.0.attn", "blocks.1.attn",
    ),
    "timm distilled": (
        lambda: m.timm_model("deit_tiny_distilled_patch16_224", patch_size=8), on_images, {}, 2,
        "blocks.0.attn", "blocks.1.attn",
    ),
    "timm siglip": (
        lambda: m.timm_model("vit_base_patch16_siglip_224", patch_size=8), on_images, {}, 0,
        "blocks.0.attn", "attn_pool",
    ),
    "timm swin": (m.swin, on_images, {}, 0, "layers.0.blocks.0.attn", "layers.1.blocks.1.attn"),
    "timm beit": (
        lambda: m.timm_model("beit_base_patch16_224", patch_size=8), on_images, {}, 1,
        "blocks.0.attn", "blocks.1.attn",
    ),
    "timm eva": (
        lambda: m.timm_model("eva02_tiny_patch14_224", patch_size=8), on_images, {}, 1,
        "blocks.0.attn", "blocks.1.attn",
    ),
    "timm rope": (
        lambda: m.timm_model("vit_base_patch16_rope_224", patch_size=8), on_images, {}, 1,
        "blocks.0.attn", "blocks.1.attn",
    ),
    "timm cait": (
        lambda: m.timm_model("cait_xxs24_224", patch_size=8), on_images, {}, 1,
        "blocks_token_only.0.attn", "blocks_token_only.1.attn",
    ),
    "timm relative positions": (
        lambda: m.timm_model("vit_relpos_small_patch16_224", patch_size=8), on_images, {}, 0,
        "blocks.0.attn", "blocks.1.attn",
    ),
    "torchvision vit": (
        m.torchvision_vit, on_images, {}, 1,
        "encoder.layers.encoder_layer_0.self_attention", "encoder.layers.encoder_layer_1.self_attention",
    ),
    "torch encoder": (m.torch_encoder, on_tokens, GIVEN, 1, "layers.0.self_attn", "layers.1.self_attn"),
    "torch encoder, padded": (m.torch_encoder, padded, GIVEN, 1, "layers.0.self_attn", "layers.1.self_attn"),
    "hand-written": (m.hand_written, on_tokens, GIVEN, 1, "blocks.0", "blocks.1"),
    "transformers mae": (
        m.vit_mae, mae, {"layers": "decoder"}, 1,
        "decoder.decoder_layers.0.attention", "decoder.decoder_layers.0.attention",
    ),
    **{
        f"transformers {kind}": (
            lambda name=name, options=options: m.transformers_model(f"{name}Model", f"{name}Config", **options),
            on_images, {}, prefix, first, last,
        )
        for kind, name, options, prefix, first, last in (
            ("vit", "ViT", {}, 1, "layers.0.attention", "layers.1.attention"),
            ("vit, eager", "ViT", {"attention": "eager"}, 1, "layers.0.attention", "layers.1.attention"),
            ("dinov2", "Dinov2", {}, 1, "encoder.layer.0.attention", "encoder.layer.1.attention"),
            (
                "dinov2, registers", "Dinov2WithRegisters", {}, 5,
                "encoder.layer.0.attention", "encoder.layer.1.attention",
            ),
            ("deit", "DeiT", {}, 2, "layers.0.attention", "layers.1.attention"),
            ("ijepa", "IJepa", {}, 0, "layers.0.attention", "layers.1.attention"),
        )
    },
}  # fmt: skip


def not_fused(model):
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
    return model


@pytest.mark.parametrize("name", MODELS)
def test_statistics_are_those_of_the_materialised_map(name):
    make, run, options, prefix, first, last = MODELS[name]
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    settings = [
        (part.training, getattr(part, "fused_attn", None), len(part._forward_hooks)) for part in model.modules()
    ]
    maps = materialised(model, run)
    with torch.no_grad():
        with mimkernels.capture(model, ROWS, **options) as heads:
            out = run(model)
        assert_same_output(out, model, run)
    names = list(heads)
    assert (names[0], names[-1]) == (first, last)
    maps = maps[-len(names) :]  # of ViTMAE, only the decoder's
    for layer, p in zip(heads.values(), maps, strict=True):
        p = p.reshape(-1, *p.shape[-3:])
        assert layer.num_prefix == prefix and (layer.heads, layer.queries, layer.keys) == tuple(p.shape[1:])
        expected = rows_of(p, prefix, GRID)
        assert layer.stats.keys() == expected.keys()
        for key, row in layer.stats.items():
            torch.testing.assert_close(
                row.double(), expected[key], rtol=2e-5, atol=2e-5, msg=lambda s, k=key: f"{k}: {s}"
            )
        assert ("distance" in layer.missing) == (layer.queries != layer.keys)
    # Nothing stays behind.
    assert settings == [
        (part.training, getattr(part, "fused_attn", None), len(part._forward_hooks)) for part in model.modules()
    ]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled()
    if name == "transformers vit, eager":
        assert model.config._attn_implementation == "eager"
