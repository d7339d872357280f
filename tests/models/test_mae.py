"""MAE against the published algorithm, stated in plain PyTorch: same weights and noise, same numbers."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mimkernels.nn import sincos_positions_2d
from mimkernels.ops import patchify_gather
from mimkernels.testing import Watch

pytest.importorskip("timm")
from timm.layers import Mlp as TimmMlp
from timm.models.vision_transformer import Block as TimmBlock

from mimkernels.models import MAE
from mimkernels.models.decoder import DecoderBlock, FusedDecoderBlock
from mimkernels.nn import Block, Mlp

SMALL = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "decoder_dim": 32,
    "decoder_depth": 2,
    "decoder_heads": 4,
}
VARIANTS = {
    "vit_tiny": {"name": "vit_tiny_patch16_224"},
    "registers and LayerScale": {
        "name": "vit_small_patch14_reg4_dinov2",
        "reg_tokens": 2,
        "init_values": 0.3,
        "no_embed_class": True,
    },
    "registers with positions": {"name": "vit_tiny_patch16_224", "reg_tokens": 3},
    "no prefix": {"name": "vit_tiny_patch16_224", "class_token": False},
    "pre-norm, no patch bias": {"name": "vit_base_patch16_clip_224"},
    "oblong": {"name": "vit_tiny_patch16_224", "img_size": (32, 16), "patch_size": (8, 4)},
    "one channel, final norm behind pooling": {
        "name": "vit_tiny_patch16_224",
        "in_chans": 1,
        "global_pool": "avg",
        "decoder_depth": 1,
    },
}


def build(seed=0, **overrides):
    torch.manual_seed(seed)
    model = MAE.from_timm(**{"name": "vit_tiny_patch16_224", **SMALL, **overrides})
    with torch.no_grad():  # zeros and ones of a fresh model would hide swapped or forgotten parameters
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def batch(model, size=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    height, width = model.encoder.patch_embed.img_size
    images = torch.randn(size, model.in_chans, height, width, generator=generator)
    noise = torch.rand(size, model.encoder.patch_embed.num_patches, generator=generator)
    return images, noise


def attention(x, w, name, heads):
    batch, tokens, dim = x.shape
    qkv = F.linear(x, w[f"{name}.qkv.weight"], w.get(f"{name}.qkv.bias"))
    q, k, v = qkv.reshape(batch, tokens, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
    weights = ((q @ k.transpose(-2, -1)) * (dim // heads) ** -0.5).softmax(dim=-1)
    x = (weights @ v).transpose(1, 2).reshape(batch, tokens, dim)
    return F.linear(x, w[f"{name}.proj.weight"], w[f"{name}.proj.bias"])


def norm(x, w, name, eps=1e-6):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def block(x, w, name, heads, eps=1e-6, act=F.gelu):
    y = attention(norm(x, w, f"{name}.norm1", eps), w, f"{name}.attn", heads)
    x = x + y * w.get(f"{name}.ls1.gamma", 1.0)
    y = act(F.linear(norm(x, w, f"{name}.norm2", eps), w[f"{name}.mlp.fc1.weight"], w[f"{name}.mlp.fc1.bias"]))
    y = F.linear(y, w[f"{name}.mlp.fc2.weight"], w[f"{name}.mlp.fc2.bias"])
    return x + y * w.get(f"{name}.ls2.gamma", 1.0)


def patchify(images, patch):
    batch, channels, height, width = images.shape
    rows, columns = height // patch[0], width // patch[1]
    x = images.reshape(batch, channels, rows, patch[0], columns, patch[1])
    return torch.einsum("nchpwq->nhwpqc", x).reshape(batch, rows * columns, -1)


def random_masking(x, mask_ratio, noise):
    batch, tokens, dim = x.shape
    keep = int(tokens * (1 - mask_ratio))
    ids_shuffle = torch.argsort(noise, dim=1)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    x = torch.gather(x, 1, ids_shuffle[:, :keep, None].repeat(1, 1, dim))
    mask = torch.ones(batch, tokens, dtype=x.dtype)
    mask[:, :keep] = 0
    return x, torch.gather(mask, 1, ids_restore), ids_restore


def published_mae(w, images, noise, *, patch, heads, decoder_heads, depths, mask_ratio, norm_pix, encoder_eps=1e-6):
    """The algorithm of arXiv:2111.06377 on named weights; registers, if any, are treated as [cls] is."""
    x = F.conv2d(images, w["patch_embed.proj.weight"], w.get("patch_embed.proj.bias"), stride=patch)
    x = x.flatten(2).transpose(1, 2)
    prefix = [w[name] for name in ("cls_token", "reg_token") if name in w]
    prefix = torch.cat(prefix, dim=1) if prefix else x.new_zeros(1, 0, x.shape[-1])
    num_prefix = prefix.shape[1]
    pos = w["pos_embed"]
    if pos.shape[1] == num_prefix + x.shape[1]:
        prefix = prefix + pos[:, :num_prefix]
        pos = pos[:, num_prefix:]
    x, mask, ids_restore = random_masking(x + pos, mask_ratio, noise)
    x = torch.cat((prefix.expand(x.shape[0], -1, -1), x), dim=1)
    if "norm_pre.weight" in w:
        x = norm(x, w, "norm_pre", encoder_eps)
    for i in range(depths[0]):
        x = block(x, w, f"blocks.{i}", heads, encoder_eps)
    x = norm(x, w, "norm" if "norm.weight" in w else "fc_norm", encoder_eps)

    x = F.linear(x, w["decoder_embed.weight"], w["decoder_embed.bias"])
    gaps = ids_restore.shape[1] + num_prefix - x.shape[1]
    tokens = torch.cat((x[:, num_prefix:], w["mask_token"].repeat(x.shape[0], gaps, 1)), dim=1)
    tokens = torch.gather(tokens, 1, ids_restore[:, :, None].repeat(1, 1, x.shape[2]))
    x = torch.cat((x[:, :num_prefix], tokens), dim=1) + w["decoder_pos_embed"]
    for i in range(depths[1]):
        x = block(x, w, f"decoder_blocks.{i}", decoder_heads)
    x = F.linear(norm(x, w, "decoder_norm"), w["decoder_pred.weight"], w["decoder_pred.bias"])
    pred = x[:, num_prefix:]

    target = patchify(images, patch)
    if norm_pix:
        target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6) ** 0.5
    loss = ((pred - target) ** 2).mean(dim=-1)
    return (loss * mask).sum() / mask.sum(), pred, mask


def published_with_gradients(model, images, noise, dtype):
    weights = {
        name: tensor.detach().to(dtype).requires_grad_(not name.endswith("pos_embed"))
        for name, tensor in model.mae_state_dict().items()
    }
    block = model.encoder.blocks[0]
    loss, pred, mask = published_mae(
        weights,
        images.to(dtype),
        noise,
        patch=model.patch_size,
        heads=block.attn.num_heads,
        decoder_heads=model.decoder_blocks[0].attn.num_heads,
        depths=(len(model.encoder.blocks), len(model.decoder_blocks)),
        mask_ratio=model.mask_ratio,
        norm_pix=model.norm_pix_loss,
        encoder_eps=block.norm1.eps,
    )
    loss.backward()
    return (
        loss.detach(),
        pred.detach(),
        mask,
        {name: w.grad for name, w in weights.items() if w.requires_grad},
    )


def assert_as_good(ours, plain, exact, what):
    """At most twice the error of plain fp32 PyTorch, plus a rounding of the largest element."""
    allowed = 2 * (plain.double() - exact).abs().max() + 8 * torch.finfo(torch.float32).eps * exact.abs().max()
    error = (ours.double() - exact).abs().max()
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm_pix", "raw pixels"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_loss_and_every_gradient_are_the_published_ones(variant, norm_pix):
    model = build(**variant, norm_pix_loss=norm_pix)
    images, noise = batch(model)
    out = model(images, noise=noise)
    out.loss.backward()

    loss, _, mask, grads = published_with_gradients(model, images, noise, torch.float32)
    exact_loss, _, _, exact_grads = published_with_gradients(model, images, noise, torch.float64)
    assert torch.equal(out.mask.mask, mask)
    assert out.loss.dtype == torch.float32 and out.loss.shape == ()
    assert_as_good(out.loss.detach(), loss, exact_loss, "loss")
    ours = {name.removeprefix("encoder."): p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert ours.keys() == grads.keys()
    for name, grad in ours.items():
        assert grad is not None, name
        assert_as_good(grad, grads[name], exact_grads[name], name)


@pytest.mark.parametrize("variant", ["vit_tiny", "registers and LayerScale"])
def test_full_prediction_changes_no_result(variant):
    model = build(**VARIANTS[variant])
    images, noise = batch(model)
    results = []
    for full in (False, True):
        model.zero_grad()
        out = model(images, noise=noise, full_prediction=full)
        out.loss.backward()
        results.append((out.loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (loss, grads), (full_loss, full_grads) = results
    torch.testing.assert_close(full_loss, loss, rtol=1e-6, atol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(full_grads[name], grad, rtol=1e-4, atol=1e-6 * float(grad.abs().max()), msg=name)
    _, pred, _, _ = published_with_gradients(model, images, noise, torch.float32)
    assert model(images, noise=noise).pred is None
    torch.testing.assert_close(out.pred, pred, rtol=1e-4, atol=1e-5)


def test_only_visible_patches_are_embedded_and_only_masked_ones_predicted():
    model = build()
    seen = {}
    for name in ("encoder.blocks.0", "decoder_blocks.1.attn", "decoder_blocks.1.mlp", "decoder_pred"):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: seen.__setitem__(name, args[0].shape[1])
        )
    images, _ = batch(model)
    model(images)
    assert seen == {
        "encoder.blocks.0": 1 + 4,
        "decoder_blocks.1.attn": 1 + 16,
        "decoder_blocks.1.mlp": 12,
        "decoder_pred": 12,
    }


def test_encoder_of_all_patches_is_the_timm_model():
    model = build(reg_tokens=2, init_values=0.1)
    images, _ = batch(model)
    ids = torch.arange(16).expand(3, 16)
    torch.testing.assert_close(model.encode(images, ids), model.encoder(images), rtol=1e-5, atol=1e-5)


def test_dynamic_image_size_resamples_positions_as_timm_does():
    model = build(dynamic_img_size=True)
    images = torch.randn(2, 3, 24, 48)
    ids = torch.arange(18).expand(2, 18)
    torch.testing.assert_close(model.encode(images, ids), model.encoder(images), rtol=1e-5, atol=1e-5)
    out = model(images, full_prediction=True)
    assert out.pred.shape == (2, 18, 192) and out.loss.isfinite()


def test_the_published_code_s_positions():
    def along_axis(dim, coordinates):
        omega = 1.0 / 10000 ** (np.arange(dim // 2, dtype=np.float64) / (dim / 2.0))
        angles = np.einsum("m,d->md", coordinates.reshape(-1), omega)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    rows, columns = 3, 5
    grid = np.stack(np.meshgrid(np.arange(columns, dtype=np.float32), np.arange(rows, dtype=np.float32)), axis=0)
    table = np.concatenate([along_axis(12, grid[0]), along_axis(12, grid[1])], axis=1)
    positions = sincos_positions_2d(24, (rows, columns), num_prefix=2)
    assert positions.shape == (1, 2 + 15, 24) and positions.dtype == torch.float32
    assert not positions[0, :2].any()
    np.testing.assert_allclose(positions[0, 2:].numpy(), table, rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match="multiple of 4, got 30"):
        sincos_positions_2d(30, (2, 2))


def test_initialisation_is_the_published_one():
    model = MAE.from_timm("vit_tiny_patch16_224", img_size=224, decoder_dim=128, decoder_depth=1, decoder_heads=4)
    assert torch.equal(model.encoder.pos_embed, sincos_positions_2d(192, (14, 14), 1))
    assert torch.equal(model.decoder_pos_embed, sincos_positions_2d(128, (14, 14), 1))
    assert not model.encoder.pos_embed.requires_grad and not model.decoder_pos_embed.requires_grad
    for weight, fans in (
        (model.encoder.patch_embed.proj.weight, 768 + 192),
        (model.encoder.blocks[3].attn.qkv.weight, 192 + 576),
        (model.decoder_blocks[0].mlp.fc1.weight, 128 + 512),
        (model.decoder_pred.weight, 128 + 768),
    ):
        bound = (6 / fans) ** 0.5
        assert weight.abs().max() <= bound and weight.abs().max() > 0.99 * bound
    assert not model.encoder.blocks[0].attn.qkv.bias.any() and not model.decoder_embed.bias.any()
    for token in (model.encoder.cls_token, model.mask_token):
        assert 0.015 < token.std() < 0.025


def test_uint8_images_give_the_loss_of_normalised_float_images():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    by_kernel, plain = build(mean=mean, std=std), build()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    scaled = images.float() / 255
    normalised = (scaled - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    expected = plain(normalised).loss
    for given in (images, scaled):
        torch.testing.assert_close(by_kernel(given).loss, expected, rtol=1e-5, atol=0)


def test_seed_and_offset_choose_the_masks():
    model = build()
    images, _ = batch(model)
    masks = [model(images, seed=s, offset=o).mask.ids_restore for s, o in ((0, 0), (0, 1), (1, 0))]
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    again = model(images, seed=0, offset=torch.tensor(1)).mask.ids_restore
    assert torch.equal(again, masks[1])


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_perfect_prediction_reconstructs_the_image(norm_pix, channels):
    statistics = {"mean": [0.4] * channels, "std": [0.2] * channels}
    model = build(in_chans=channels, norm_pix_loss=norm_pix, **statistics)
    images = torch.randint(0, 256, (2, channels, 32, 32), dtype=torch.uint8)
    target = patchify((images.float() / 255 - 0.4) / 0.2, (8, 8))
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    model.decoder_pred.register_forward_hook(lambda *_: target)
    original, masked, reconstruction = model.reconstruct(images, seed=3)
    assert original.shape == masked.shape == reconstruction.shape == (2, 3, 32, 32)
    torch.testing.assert_close(original, (images / 255).expand(2, 3, 32, 32))
    torch.testing.assert_close(reconstruction, original, rtol=0, atol=1e-5)
    hidden = patchify(masked - 0.4, (8, 8)).abs().amax(-1) < 1e-6
    assert torch.equal(hidden, model.draw_mask(images, seed=3).mask.bool())


def test_reconstruct_keeps_visible_patches_the_range_and_the_mode():
    model = build(drop_path_rate=0.5)
    model.encoder.blocks[0].eval()
    images, noise = batch(model)
    with torch.no_grad():
        model.decoder_pred.weight.mul_(100)
    first, second = model.reconstruct(images, noise=noise), model.reconstruct(images, noise=noise)
    assert torch.equal(first.reconstruction, second.reconstruction)
    assert 0 <= first.reconstruction.min() and first.reconstruction.max() <= 1
    visible = model(images, noise=noise).mask.ids_keep
    kept = [patchify_gather(picture, visible, 8) for picture in (images.clamp(0, 1), first.reconstruction)]
    assert torch.equal(*kept)
    assert model.training and not model.encoder.blocks[0].training and model.encoder.blocks[1].training


def test_config_rebuilds_the_model():
    model = build(name="vit_small_patch14_reg4_dinov2", mean=(0.5,) * 3, std=(0.5,) * 3, norm_pix_loss=False)
    other = MAE.from_config(model.config)
    other.load_state_dict(model.state_dict())
    images, noise = batch(model)
    assert torch.equal(other(images, noise=noise).loss, model(images, noise=noise).loss)
    assert other.config == model.config


def test_both_mlps_give_the_same_model():
    ours, timm_s = build(), build(mlp="timm")
    for model, kind in ((ours, Mlp), (timm_s, TimmMlp)):
        assert {type(block.mlp) for block in [*model.encoder.blocks, *model.decoder_blocks]} == {kind}
    assert list(ours.state_dict()) == list(timm_s.state_dict())
    timm_s.load_state_dict(ours.state_dict())
    images, noise = batch(ours)
    made = []
    for model in (ours, timm_s):
        loss = model(images, noise=noise).loss
        loss.backward()
        made.append((loss.detach(), [p.grad for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(*made, rtol=1e-4, atol=1e-6)


def test_config_remembers_the_mlp():
    for mlp in ("mimkernels", "timm"):
        model = build(mlp=mlp)
        assert model.config["mlp"] == mlp
        assert type(MAE.from_config(model.config).encoder.blocks[0].mlp) is type(model.encoder.blocks[0].mlp)
    old = {name: value for name, value in build().config.items() if name != "mlp"}
    assert type(MAE.from_config(old).decoder_blocks[0].mlp) is Mlp
    with pytest.raises(ValueError, match="mlp must be one of mimkernels, timm, got 'fused'"):
        build(mlp="fused")


@pytest.mark.parametrize("options", [{}, {"init_values": 0.5, "drop_path_rate": 0.3}], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.usefixtures("fused_at_any_size")
def test_both_blocks_give_the_same_model(full, autocast, options):
    ours, timm_s = build(**options), build(block="timm", **options)
    for model, kinds in ((ours, (Block, FusedDecoderBlock)), (timm_s, (TimmBlock, DecoderBlock))):
        assert {type(block) for block in model.encoder.blocks} == {kinds[0]}
        assert {type(block) for block in model.decoder_blocks} == {kinds[1]}
    assert list(ours.state_dict()) == list(timm_s.state_dict())
    timm_s.load_state_dict(ours.state_dict())
    images, noise = batch(ours)
    made, counts = [], []
    for model in (ours, timm_s):
        torch.manual_seed(3)
        with Watch(lambda op, args: "add_layer_norm" in op.name() or None) as reached:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = model(images, noise=noise, full_prediction=full)
            out.loss.backward()
        counts.append(len(reached.seen))
        made.append((out.loss.detach(), [p.grad for p in model.parameters() if p.requires_grad]))
    blocks = len(ours.encoder.blocks) + len(ours.decoder_blocks)
    # Forward and backward of all norms; those that add nothing only under autocast: the first of encoder and decoder,
    # and the last, of the tokens that the loss reads.
    assert counts == [2 * (2 * blocks - (0 if autocast else 2 + (not full))), 0]
    if not autocast:
        torch.testing.assert_close(*made, rtol=1e-4, atol=1e-6)
        return
    torch.testing.assert_close(made[0][0], made[1][0], rtol=1e-2, atol=1e-2)
    for got, wanted in zip(made[0][1], made[1][1], strict=True):
        assert (got - wanted).norm() <= 0.05 * wanted.norm() + 1e-4


def fused_calls(model, images, noise):
    with Watch(lambda op, args: "add_layer_norm_fwd" in op.name() or None) as reached:
        loss = model(images, noise=noise).loss
    loss.backward()
    return len(reached.seen), loss.detach(), [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("seen", ["hook on a block", "hook on its first norm", "hook on the blocks", "checkpointing"])
@pytest.mark.usefixtures("fused_at_any_size")
def test_blocks_that_somebody_sees_whole_run_whole(seen):
    model, calls = build(), []
    images, noise = batch(model)
    count, *wanted = fused_calls(copy.deepcopy(model), images, noise)
    joints = len(model.encoder.blocks) - 1
    if seen == "checkpointing":
        model.set_grad_checkpointing()
        joints += len(model.decoder_blocks) - 1
    else:
        blocks = model.encoder.blocks
        part = {"hook on a block": blocks[0], "hook on its first norm": blocks[1].norm1, "hook on the blocks": blocks}
        part[seen].register_forward_hook(lambda module, args, out: calls.append(out.shape))
        joints = joints if part[seen] is blocks else 1
    whole, *made = fused_calls(model, images, noise)
    assert whole == count - joints and len(calls) == (seen != "checkpointing")
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-6)


def test_config_remembers_the_block():
    for block in ("mimkernels", "timm"):
        model = build(block=block)
        assert model.config["block"] == block
        again = MAE.from_config(model.config)
        assert type(again.encoder.blocks[0]) is type(model.encoder.blocks[0])
        assert type(again.decoder_blocks[0]) is type(model.decoder_blocks[0])
    old = {name: value for name, value in build().config.items() if name != "block"}
    assert type(MAE.from_config(old).encoder.blocks[0]) is Block
    with pytest.raises(ValueError, match="block must be one of mimkernels, timm, got 'fused'"):
        build(block="fused")


def test_hooks_on_the_decoder_s_norms_see_timm_s_values():
    seen = []
    ours, timm_s = build(), build(block="timm")
    timm_s.load_state_dict(ours.state_dict())
    images, noise = batch(ours)
    for model in (ours, timm_s):
        for block in model.decoder_blocks:
            block.norm2.register_forward_hook(lambda module, args, out: seen.append(out))
        model(images, noise=noise)
    half = len(seen) // 2
    assert half == len(ours.decoder_blocks)
    for got, wanted in zip(seen[:half], seen[half:], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_and_drop_path_run_as_in_timm():
    images, noise = batch(build())
    losses, grads = [], []
    for enable in (False, True):
        model = build()
        model.set_grad_checkpointing(enable)
        loss = model(images, noise=noise).loss
        loss.backward()
        losses.append(loss)
        grads.append(model.encoder.blocks[0].attn.qkv.weight.grad)
    assert torch.equal(*losses) and torch.equal(*grads)
    model = build(drop_path_rate=0.5)
    assert model(images, noise=noise).loss != model.eval()(images, noise=noise).loss


def test_bf16_autocast_trains():
    model = build(depth=1, decoder_depth=1)
    images, noise = batch(model, size=2)
    full = model(images, noise=noise).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images, noise=noise).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, full, rtol=0.02, atol=0)
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name


def test_a_bf16_model_normalises_with_exact_statistics():
    model = build(depth=1, decoder_depth=1, mean=(0.485,) * 3, std=(0.229,) * 3).bfloat16()
    loss = model(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)).loss
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert model._pixel_mean.dtype == torch.float32 and model._pixel_mean[0] == torch.tensor(0.485)


@pytest.mark.parametrize(
    ("backend", "offsets"),
    [
        ("aot_eager", (0, 5, 9)),
        pytest.param("inductor", (torch.tensor(0), torch.tensor(5)), marks=pytest.mark.slow),
    ],
    ids=["aot_eager, offset as int", "inductor, offset on the device"],
)
def test_compiles_into_one_graph(backend, offsets):
    model = build(depth=1, decoder_depth=1, mean=(0.5,) * 3, std=(0.5,) * 3)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for offset in offsets:
        expected = model(images, offset=offset)
        expected.loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        model.zero_grad()
        out = compiled(images, offset=offset)
        out.loss.backward()
        assert torch.equal(out.mask.ids_restore, expected.mask.ids_restore)
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=0)
        for name, grad in grads.items():
            mine = model.get_parameter(name).grad
            torch.testing.assert_close(mine, grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max()), msg=name)
        model.zero_grad()


@pytest.mark.parametrize("dynamic_size", [False, True])
def test_compiles_into_one_graph_for_any_number_of_images(dynamic_size):
    model = build(depth=1, decoder_depth=1, dynamic_img_size=dynamic_size)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (4, 7):
        images = torch.rand(count, 3, 32, 32)
        # The first number of images compiles, and no other.
        with nullcontext() if count == 4 else torch.compiler.set_stance("fail_on_recompile"):
            loss = compiled(images).loss
        torch.testing.assert_close(loss, model(images).loss, rtol=1e-5, atol=0)
