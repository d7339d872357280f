"""SimMIM against the published algorithm, stated in plain PyTorch: same weights and mask, same numbers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("timm")
import timm

import mimkernels
from mimkernels.models import SimMIM

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "mask_unit": 16}
# Stages of 8 x 8 and 4 x 4 tokens; the second block of a stage shifts its windows.
SWIN = {
    "img_size": 32, "patch_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4,
    "mask_unit": 8,
}  # fmt: skip
SHIFTED = {**SWIN, "img_size": 64, "mask_unit": 16}  # both stages have several windows: 16 x 16 and 8 x 8 tokens
MODELS = {
    "vit": {"name": "vit_tiny_patch16_224", **VIT},
    "vit, registers, norm behind pooling": {
        "name": "vit_tiny_patch16_224", **VIT, "reg_tokens": 2, "global_pool": "avg",
    },
    "vit, unit is the patch": {"name": "vit_tiny_patch16_224", **VIT, "mask_unit": 8},
    "beit": {"name": "beit_base_patch16_224", **VIT},
    "beit, bias per block, positions": {
        "name": "beit_base_patch16_224", **VIT, "use_shared_rel_pos_bias": False, "use_rel_pos_bias": True,
        "use_abs_pos_emb": True,
    },
    "beit, oblong": {"name": "beit_base_patch16_224", **VIT, "img_size": (32, 48)},
    "swin": {"name": "swin_tiny_patch4_window7_224", **SWIN},
    "swin, shifted in both stages": {"name": "swin_tiny_patch4_window7_224", **SHIFTED},
    "swin, unit below the stride": {"name": "swin_tiny_patch4_window7_224", **SWIN, "mask_unit": 4},
    "swinv2": {"name": "swinv2_tiny_window8_256", **SWIN},
    "swinv2, unit below the stride": {"name": "swinv2_tiny_window8_256", **SWIN, "mask_unit": 4},
    "swinv2, shifted in both stages": {"name": "swinv2_tiny_window8_256", **SHIFTED},
}  # fmt: skip
ONE_OF_EACH = ("vit", "beit", "swin", "swinv2")


def build(model="vit", seed=0, **changes):
    torch.manual_seed(seed)
    made = SimMIM.from_timm(**{**MODELS[model], **changes})
    with torch.no_grad():  # zeros and ones of a fresh model would hide swapped or forgotten parameters
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return made


def batch(model, size=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, model.in_chans, *model.encoder.patch_embed.img_size, generator=generator)


class Plain(nn.Module):
    """The published algorithm around a model of timm's that mimkernels has not touched."""

    def __init__(self, model):
        super().__init__()
        names = {key: value for key, value in model.config.items() if key not in (
            "mask_unit", "mask_ratio", "target", "loss", "mean", "std", "attention", "mlp")}  # fmt: skip
        if names["name"].startswith("beit"):
            names = {"use_abs_pos_emb": False, "use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, **names}
            names["init_values"] = 0.1
        names = {key: value for key, value in names.items() if value is not None}
        self.encoder = timm.create_model(names.pop("name"), **{"num_classes": 0, "global_pool": "", **names})
        self.encoder.load_state_dict(model.encoder.state_dict())
        self.mask_token = nn.Parameter(model.mask_token.detach().clone())
        self.stride = model.encoder_stride
        weight, bias = (model.simmim_state_dict()[f"decoder.0.{name}"].detach().clone() for name in ("weight", "bias"))
        self.decoder = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
        self.decoder.load_state_dict({"weight": weight, "bias": bias})
        self.encoder.patch_embed.register_forward_hook(self.fill)
        self.eval()

    def fill(self, module, inputs, tokens):
        mask = self.mask.float()
        mask = mask[..., None] if tokens.dim() == 4 else mask.flatten(1)[..., None]
        return tokens * (1 - mask) + self.mask_token * mask

    def forward(self, x, mask, target=None, distance=F.l1_loss):
        self.mask = mask
        z = self.encoder.forward_features(x)
        if z.dim() == 3:
            if hasattr(self.encoder, "fc_norm"):
                z = self.encoder.fc_norm(z)
            rows = [side // step for side, step in zip(x.shape[2:], self.stride, strict=True)]
            z = z[:, -rows[0] * rows[1] :].unflatten(1, rows)
        y = F.pixel_shuffle(self.decoder(z.movedim(-1, 1)), self.stride[0])
        pixels = mask.float()
        for axis in (1, 2):
            pixels = pixels.repeat_interleave(x.shape[axis + 1] // mask.shape[axis], axis)
        pixels = pixels.unsqueeze(1)
        error = distance(y, x if target is None else target, reduction="none")
        return (error * pixels).sum() / (pixels.sum() + 1e-5) / x.shape[1], y


def plain_gradients(plain, model):
    """Gradients of the statement by the names of ours."""
    published = {
        "encoder.mask_token": plain.mask_token.grad,
        "decoder.0.weight": plain.decoder.weight.grad,
        "decoder.0.bias": plain.decoder.bias.grad,
    }
    from mimkernels.models.simmim_names import from_published

    encoder = {f"encoder.{name}": parameter.grad for name, parameter in plain.encoder.named_parameters()}
    return {**encoder, **from_published(published, model.encoder_stride)}


def assert_gradients_agree(model, plain):
    wanted = plain_gradients(plain, model)
    assert wanted.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        expected = wanted[name]
        assert expected is not None, name
        torch.testing.assert_close(parameter.grad, expected, atol=2e-6, rtol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("img_size", "patch_size", "unit"), [(64, 16, 32), ((32, 96), 8, 32), (32, 8, 8), (48, 8, 8), (24, (4, 6), 12)]
)
def test_units_are_the_published_ones_where_they_fit(
    img_size: int | tuple[int, int], patch_size: int | tuple[int, int], unit: int
) -> None:
    model = SimMIM.from_timm("vit_tiny_patch16_224", img_size=img_size, patch_size=patch_size, depth=1)
    assert model.mask_unit == unit
    assert SimMIM.from_config(model.config).mask_unit == unit


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_every_gradient_equal_the_plain_statement(name):
    model = build(name).eval()
    plain = Plain(model)
    images = batch(model)
    out = model(images, seed=3, offset=5, full_prediction=True)
    loss, pixels = plain(images, out.mask)
    torch.testing.assert_close(out.loss, loss, atol=1e-6, rtol=1e-5)
    own = F.pixel_shuffle(
        out.pred.unflatten(-1, (*model.encoder_stride, -1)).permute(0, 4, 2, 3, 1).flatten(1, 3)
        .unflatten(2, [side // step for side, step in zip(images.shape[2:], model.encoder_stride, strict=True)]),
        model.encoder_stride[0],
    )  # fmt: skip
    torch.testing.assert_close(own, pixels, atol=1e-5, rtol=1e-5)
    out.loss.backward()
    loss.backward()
    assert_gradients_agree(model, plain)

    model.zero_grad()
    trained = model(images, seed=3, offset=5)  # the masked tokens alone
    torch.testing.assert_close(trained.loss, loss, atol=1e-6, rtol=1e-5)
    trained.loss.backward()
    assert_gradients_agree(model, plain)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_mask_of_single_patches_is_counted_pixel_by_pixel(name):
    model = build(name).eval()
    plain = Plain(model)
    images = batch(model)
    mask = torch.rand(len(images), *model.grid_size, generator=torch.Generator().manual_seed(4)) < 0.4
    out = model(images, mask=mask)
    loss, _ = plain(images, mask)
    torch.testing.assert_close(out.loss, loss, atol=1e-6, rtol=1e-5)
    out.loss.backward()
    loss.backward()
    assert_gradients_agree(model, plain)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_uint8_images_are_normalised_as_floats_are(name):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    model = build(name, mean=mean, std=std).eval()
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (2, 3, *model.encoder.patch_embed.img_size), generator=generator, dtype=torch.uint8)
    mask = model.draw_mask(images, seed=1)
    shift, scale = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    loss, _ = Plain(model)((images / 255 - shift) / scale, mask)
    torch.testing.assert_close(model(images, seed=1).loss, loss, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("loss", "distance"), [("l1", F.l1_loss), ("mse", F.mse_loss), ("smooth-l1", F.smooth_l1_loss)]
)
def test_every_kind_of_loss(loss, distance):
    model = build("beit", loss=loss).eval()
    images = batch(model)
    out = model(images)
    torch.testing.assert_close(out.loss, Plain(model)(images, out.mask, distance=distance)[0], atol=1e-6, rtol=1e-5)


def published_local_norm(x, size):
    """``norm_targets`` as the published code computes it."""
    padding = size // 2
    mask = torch.ones_like(x)
    mean = F.avg_pool2d(x, size, 1, padding, count_include_pad=False)
    square = F.avg_pool2d(x**2, size, 1, padding, count_include_pad=False)
    count = F.avg_pool2d(mask, size, 1, padding, count_include_pad=True) * size**2
    variance = torch.clamp((square - mean**2) * (count / (count - 1)), min=0.0)
    return (x - mean) / (variance + 1e-6) ** 0.5


def patch_norm(x, size):
    patches = F.unfold(x, size, stride=size)
    patches = (patches - patches.mean(1, keepdim=True)) / (patches.var(1, keepdim=True) + 1e-6) ** 0.5
    return F.fold(patches, x.shape[2:], size, stride=size)


@pytest.mark.parametrize("name", ["beit", "swinv2", "swin, unit below the stride"])
@pytest.mark.parametrize("target", ["local-norm:7", "patch-norm"])
def test_normalised_targets(name, target):
    model = build(name, target=target).eval()
    images = batch(model)
    out = model(images)
    wanted = published_local_norm(images, 7) if target == "local-norm:7" else patch_norm(images, 8)
    torch.testing.assert_close(out.loss, Plain(model)(images, out.mask, wanted)[0], atol=1e-5, rtol=1e-5)


def test_masks_are_whole_units_of_the_published_number():
    model = build("swin", mask_unit=16, img_size=64, mask_ratio=0.6)
    mask = model.draw_mask(batch(model, 50), seed=2)
    units = mask.unflatten(1, (4, 4)).unflatten(3, (4, 4))  # [B, row, y, column, x]
    assert (units.amax((2, 4)) == units.amin((2, 4))).all()
    assert (units[:, :, 0, :, 0].flatten(1).sum(1) == 10).all()  # ceil(0.6 * 16)
    assert torch.equal(mask, model.draw_mask(batch(model, 50), seed=2))
    assert not torch.equal(mask, model.draw_mask(batch(model, 50), seed=2, offset=1))


@pytest.mark.parametrize("ratio, count", [(0.6, 22), (0.5, 18), (0.01, 1)])
def test_the_published_share_is_rounded_up(ratio, count):
    model = SimMIM.from_timm("vit_tiny_patch16_224", img_size=192, embed_dim=24, depth=1, mask_ratio=ratio)
    assert (model.draw_mask(torch.zeros(2, 3, 192, 192)).flatten(1).sum(1) == 4 * count).all()


def test_beit_is_built_and_initialised_as_the_published_vit():
    torch.manual_seed(0)
    model = SimMIM.from_timm("beit_base_patch16_224", **{key: VIT[key] for key in VIT if key != "mask_unit"},
                             mask_unit=16)  # fmt: skip
    encoder = model.encoder
    assert encoder.pos_embed is None
    assert encoder.rel_pos_bias.relative_position_bias_table.shape == (7 * 7 + 3, 3)
    assert not encoder.rel_pos_bias.relative_position_bias_table.any()
    for number, block in enumerate(encoder.blocks, 1):
        assert block.attn.relative_position_bias_table is None
        assert (block.gamma_1 == 0.1).all() and (block.gamma_2 == 0.1).all()
        assert not block.attn.q_bias.any() and not block.attn.v_bias.any()
        assert block.attn.qkv.weight.abs().max() <= 0.02 < block.attn.qkv.weight.abs().max() * 1.01
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.abs().max() <= 0.02 / (2 * number) ** 0.5 < weight.abs().max() * 1.01
    assert model.mask_token.abs().max() <= 0.02
    assert encoder.patch_embed.proj.weight.abs().max() <= 0.02


def test_swin_v2_norms_behind_the_branches_begin_at_zero():
    model = SimMIM.from_timm(**MODELS["swinv2"])
    for block in (block for stage in model.encoder.layers for block in stage.blocks):
        assert not block.norm1.weight.any() and not block.norm2.weight.any()


@pytest.mark.parametrize("name", ["vit", "beit"])
def test_head_statistics_of_every_block_with_gradients(name):
    model = build(name)
    out = model(batch(model), head_stats=("entropy", "distance"))
    assert len(out.head_stats) == 2
    for stats in out.head_stats:
        assert stats["entropy"].shape == stats["distance"].shape == (3, 3, 17)
    sum(stats["entropy"].mean() for stats in out.head_stats).backward()
    assert model.encoder.blocks[0].attn.qkv.weight.grad.any()


@pytest.mark.parametrize("name", ["swin, shifted in both stages", "swinv2, shifted in both stages"])
def test_head_statistics_of_windows_are_those_of_capture(name):
    model = build(name)
    images = batch(model)
    out = model(images, head_stats=("entropy", "distance"))
    # Windows of 4 x 4 tokens: 16 per image in the first stage, 4 in the second.
    assert [stats["entropy"].shape for stats in out.head_stats] == [(48, 2, 16)] * 2 + [(12, 4, 16)] * 2
    sum(stats["entropy"].mean() for stats in out.head_stats).backward()
    for stage in model.encoder.layers:
        assert all(block.attn.qkv.weight.grad.any() for block in stage.blocks)
    with mimkernels.capture(model, ["entropy", "distance"]) as heads:
        model(images)
    for stats, layer in zip(out.head_stats, heads.values(), strict=True):
        for name, rows in stats.items():
            torch.testing.assert_close(rows, layer.stats[name])


@pytest.mark.parametrize("name", ["swin", "swinv2"])
def test_heads_of_timm_s_windows_cannot_be_recorded(name):
    model = build(name, attention="timm")
    with pytest.raises(ValueError, match="the model's attention cannot record"):
        model(batch(model), head_stats=("entropy",))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_timm_and_mimkernels_compute_the_same(name):
    ours, theirs = build(name).eval(), build(name, attention="timm", mlp="timm").eval()
    images = batch(ours)
    torch.testing.assert_close(ours(images).loss, theirs(images).loss, atol=1e-6, rtol=1e-5)
    ours(images).loss.backward()
    theirs(images).loss.backward()
    for (key, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=2e-6, rtol=2e-4, msg=lambda m, n=key: f"{n}: {m}")


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_recomputing_activations_changes_nothing(name):
    plain, saving = build(name), build(name)
    saving.set_grad_checkpointing()
    images = batch(plain)
    for model in (plain, saving):
        model(images).loss.backward()
    for (key, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda m, n=key: f"{n}: {m}")


@pytest.mark.parametrize("name", ONE_OF_EACH)
@pytest.mark.parametrize("target", ["pixels", "patch-norm", "local-norm:7"])
def test_reconstructions_of_a_perfect_prediction_are_the_images(name, target):
    model = build(name, target=target, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    size = model.encoder.patch_embed.img_size
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(3))
    shift, scale = model._pixel_mean.view(-1, 1, 1), model._pixel_std.view(-1, 1, 1)
    normalised = (images - shift) / scale
    wanted = {
        "pixels": lambda: normalised,
        "patch-norm": lambda: patch_norm(normalised, 8),
        "local-norm:7": lambda: published_local_norm(normalised, 7),
    }[target]()
    patches = F.unfold(wanted, 8, stride=8).unflatten(1, (3, 64)).permute(0, 3, 2, 1).flatten(2)
    model.decoder = Constant(patches)
    pictures = model.reconstruct(images, seed=1)
    torch.testing.assert_close(pictures.reconstruction, images, atol=1e-4, rtol=1e-4)
    hidden = (pictures.masked != pictures.original).any(1)
    mask = model.draw_mask(images, seed=1)
    for axis in (1, 2):
        mask = mask.repeat_interleave(images.shape[axis + 1] // mask.shape[axis], axis)
    assert torch.equal(hidden, mask)


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


def test_a_configuration_builds_the_same_model():
    for name in ONE_OF_EACH:
        model = build(name)
        again = SimMIM.from_config(model.config)
        assert {key: value.shape for key, value in again.state_dict().items()} == {
            key: value.shape for key, value in model.state_dict().items()
        }


def test_a_copy_computes_the_same():
    model = build("beit").eval()
    images = batch(model)
    assert torch.equal(copy.deepcopy(model)(images).loss, model(images).loss)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("vit", {"mask_unit": 12}, r"mask_unit must be a multiple of the patch size 8 x 8, got 12"),
        ("vit", {"mask_unit": 24}, r"mask_unit 24 does not divide images of 32 x 32 pixels"),
        ("swin", {"mask_unit": 6}, r"mask_unit must be a multiple of the patch size 4 x 4, got 6"),
        ("vit", {"mask_ratio": 0.0}, r"mask_ratio must lie between 0 and 1.*4 units of 16 pixels.*got 0.0"),
        ("vit", {"mask_ratio": 1.0}, r"mask_ratio must lie between 0 and 1.*got 1.0"),
        ("vit", {"mask_ratio": 0.9}, r"leave some of the 4 units of 16 pixels visible.*got 0.9 \(4 masked\)"),
        (
            "vit",
            {"img_size": 8, "patch_size": 1, "in_chans": 1, "mask_unit": 1, "target": "patch-norm"},
            r"patch-norm divides by the deviation of .* a single value",
        ),
        ("swin", {"window_size": 3}, r"windows of 3 x 3 tokens do not divide the 8 x 8 tokens"),
        ("swinv2", {"window_size": 3}, r"windows of 3 x 3 tokens do not divide the 8 x 8 tokens"),
        ("swin", {"img_size": 36}, r"stride of 8 x 8 pixels does not divide images of 36 x 36"),
        ("vit", {"name": "convnext_tiny"}, r"'convnext_tiny' cannot be the encoder"),
        ("vit", {"name": "vit_no_such_thing"}, r"timm has no model 'vit_no_such_thing'"),
        ("vit", {"loss": "huber"}, r"loss must be one of l1, mse, smooth-l1, got 'huber'"),
        ("vit", {"target": "local-norm:8"}, r"target must be .*got 'local-norm:8'"),
        ("vit", {"mean": (0.5,) * 3}, r"give mean and std together"),
        ("vit", {"patch_drop_rate": 0.5}, r"patch_drop_rate"),
    ],
)
def test_what_cannot_work_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        SimMIM.from_timm(**{**MODELS[name], **changes})


def test_masks_that_do_not_fit_are_refused():
    model = build("vit")
    images = batch(model)
    with pytest.raises(ValueError, match=r"mask must be \[3, 4, 4\].*got \[3, 16\]"):
        model(images, mask=torch.zeros(3, 16, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"bool tensor \[3, 4, 4\].*torch.float32"):
        model(images, mask=torch.zeros(3, 4, 4))
