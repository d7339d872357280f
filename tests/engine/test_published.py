"""Published checkpoints by the names and shapes of their weights.

No file is downloaded: each is made here in the published layout. Where the names and shapes come from, by project and
paper (the classes that save them):

- BEiT (arXiv:2106.08254) and BEiT v2 (arXiv:2208.06366): ``VisionTransformerForMaskedImageModeling`` and
  ``...CLS`` of unilm's beit and beit2, pre-trained under ``model``: one shared table, ``gamma_1``, ``q_bias``,
  ``lm_head``; v2 also ``cls_pt_layers``. Pixels of v1 have mean and deviation 0.5, those of v2 ImageNet's.
- DINOv2 (arXiv:2304.07193) and registers (arXiv:2309.16588): ``DinoVisionTransformer``, ``SwiGLUFFN`` and
  ``BlockChunk`` of dinov2: ``mask_token [1, D]``, ``register_tokens``, ``ls1.gamma``, ``mlp.w12``; positions of 37 x 37
  patches; training keeps ``teacher``: ``backbone.``, ``dino_head.``, ``ibot_head.``.
- data2vec 2 (arXiv:2212.07525): ``Data2VecMultiModel``, ``ImageEncoder``, ``AltBlock`` of fairseq: norms behind the
  sums, ``modality_encoders.IMAGE.``, ``_ema`` as a dict in the dict.
- CAPI (arXiv:2502.08769): ``EncoderDecoder`` of capi, under ``backbone.``.
- I-JEPA (arXiv:2301.08243): ``encoder``, ``predictor``, ``target_encoder`` of ijepa's training, each with ``module.``.
- MoCo v3 (arXiv:2104.02057): ``vits.py`` and ``moco/builder.py`` of moco-v3; its ViT-S has 12 heads.
- DINO (arXiv:2104.14294), iBOT (arXiv:2111.07832), MAE (arXiv:2111.06377): see test_encoder.py.
"""

import io
import json
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed, resample_patch_embed

from mimkernels.commands.analyze.config import AnalyzeConfig
from mimkernels.commands.analyze.run import analyze
from mimkernels.commands.probe.config import ProbeConfig
from mimkernels.commands.probe.run import probe
from mimkernels.engine.encoder import load_encoder
from mimkernels.engine.model_names import ModelChoice
from mimkernels.engine.published import LoadReport, read_published
from mimkernels.models.capi import CapiEncoder

D, DEPTH, HEADS, PATCH, GRID = 24, 2, 3, 8, 4
TINY = {"embed_dim": D, "depth": DEPTH, "num_heads": HEADS}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def linear(name, out, inner, bias=True):
    return {f"{name}.weight": (out, inner), **({f"{name}.bias": (out,)} if bias else {})}


def norm(name, dim):
    return linear(name, dim, 1) | {f"{name}.weight": (dim,)}


def block(name, dim, hidden, mlp=("fc1", "fc2"), wide=1):
    return {
        **norm(f"{name}.norm1", dim),
        **linear(f"{name}.attn.qkv", 3 * dim, dim),
        **linear(f"{name}.attn.proj", dim, dim),
        **norm(f"{name}.norm2", dim),
        **linear(f"{name}.mlp.{mlp[0]}", wide * hidden, dim),
        **linear(f"{name}.mlp.{mlp[1]}", dim, hidden),
    }


def blocks(count, dim, hidden, start="blocks.", **options):
    return {k: v for i in range(count) for k, v in block(f"{start}{i}", dim, hidden, **options).items()}


def plain(dim=D, depth=DEPTH, patch=PATCH, grid=GRID, hidden=None, cls=True):
    """Of timm, MAE, DINO, iBOT, MoCo v3; without [cls] of I-JEPA."""
    return {
        **({"cls_token": (1, 1, dim)} if cls else {}),
        "pos_embed": (1, grid * grid + cls, dim),
        "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,),
        **blocks(depth, dim, hidden or 4 * dim),
        **norm("norm", dim),
    }


def dinov2(dim=D, depth=DEPTH, patch=PATCH, grid=GRID, registers=0, hidden=None, chunks=0):
    """`hidden`: of SwiGLU, in ViT-g. `chunks`: blocks in each list of blocks, in training."""
    mlp = {"mlp": ("w12", "w3"), "wide": 2} if hidden else {}
    names = {
        **{name: shape for name, shape in plain(dim, depth, patch, grid).items() if not name.startswith("blocks.")},
        "mask_token": (1, dim),
        **({"register_tokens": (1, registers, dim)} if registers else {}),
    }
    for i in range(depth):
        name = f"blocks.{i // chunks}.{i}" if chunks else f"blocks.{i}"
        names |= {
            **block(name, dim, hidden or 4 * dim, **mlp),
            f"{name}.ls1.gamma": (dim,),
            f"{name}.ls2.gamma": (dim,),
        }
    return names


def beit(dim=D, depth=DEPTH, patch=PATCH, grid=GRID, heads=HEADS, shared=True, second=False):
    names = {
        "cls_token": (1, 1, dim),
        "mask_token": (1, 1, dim),
        "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,),
        **norm("norm", dim),
        **linear("lm_head", 11, dim),
    }
    table, index = ((2 * grid - 1) ** 2 + 3, heads), (grid * grid + 1, grid * grid + 1)
    places = ["rel_pos_bias"] if shared else [f"blocks.{i}.attn" for i in range(depth)]
    for place in places:
        names |= {f"{place}.relative_position_bias_table": table, f"{place}.relative_position_index": index}
    for start, count in (("blocks.", depth), ("cls_pt_layers.", 2 if second else 0)):
        own = blocks(count, dim, 4 * dim, start)
        for i in range(count):
            own.pop(f"{start}{i}.attn.qkv.bias")
            own |= {f"{start}{i}.{name}": (dim,) for name in ("gamma_1", "gamma_2", "attn.q_bias", "attn.v_bias")}
        names |= own
    return names


def data2vec2(dim=D, depth=DEPTH, patch=PATCH, grid=GRID, before=0):
    """`before`: blocks of the modality, in front of the others."""
    image = "modality_encoders.IMAGE."
    return {
        f"{image}extra_tokens": (1, 1, dim),
        **{f"{image}local_encoder.proj.{part}": shape for part, shape in
           (("weight", (dim, 3, patch, patch)), ("bias", (dim,)))},
        f"{image}fixed_positional_encoder.positions": (1, grid * grid, dim),
        **blocks(before, dim, 4 * dim, f"{image}context_encoder.blocks."),
        **norm(f"{image}context_encoder.norm", dim),
        f"{image}decoder.blocks.0.0.weight": (dim, dim // 8, 3, 3),
        f"{image}decoder.blocks.0.0.bias": (dim,),
        **linear(f"{image}decoder.proj", dim, dim),
        **blocks(depth - before, dim, 4 * dim),
    }  # fmt: skip


def capi(dim=D, depth=DEPTH, patch=PATCH, heads=HEADS):
    names = {"mask_token": (1, dim), "registers": (1, 16, dim), "patch_embed.weight": (dim, 3, patch, patch),
             "patch_embed.bias": (dim,)}  # fmt: skip
    for part in ("encoder", "decoder"):
        for i in range(depth):
            one, two = (f"{part}.blocks.{i}.residual{n}" for n in (1, 2))
            names |= {f"{one}.norm.weight": (dim,), f"{two}.norm.weight": (dim,)}
            names |= {f"{one}.fn.{key}.weight": (dim, dim) for key in ("q_proj", "k_proj", "v_proj", "proj")}
            names |= {f"{one}.fn.rope.freqs": (2, dim // heads)}
            names |= {f"{two}.fn.fc1.weight": (4 * dim, dim), f"{two}.fn.fc2.weight": (dim, 4 * dim)}
    return names


def filled(shapes, seed=0):
    torch.manual_seed(seed)
    return {
        name: torch.zeros(shape, dtype=torch.long) if name.endswith("index") else 0.3 * torch.randn(shape)
        for name, shape in shapes.items()
    }


def empty(shapes):
    """Of full size: memory that nobody touches costs nothing."""
    return {name: torch.empty(shape, dtype=torch.float16) for name, shape in shapes.items()}


def under(prefix, weights):
    return {prefix + name: tensor for name, tensor in weights.items()}


W = filled(plain())


@pytest.fixture
def loaded(tmp_path):
    """Load a file of `content` as tests give it."""

    def load(content, arch="vit_tiny_patch16_224", img_size=None, **options):
        torch.save(content, tmp_path / "file.pth")
        kwargs = {**TINY, **options} if arch else options
        return load_encoder(ModelChoice("x", str(tmp_path / "file.pth"), arch, kwargs, img_size=img_size))

    return load


def images_and_pixels(side=PATCH * GRID, mean=IMAGENET[0], std=IMAGENET[1]):
    torch.manual_seed(3)
    images = torch.randint(256, (2, 3, side, side), dtype=torch.uint8)
    return images, (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def patches(weights, pixels, name):
    x = F.conv2d(pixels, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=PATCH)
    return x.flatten(2).transpose(1, 2)


def layer_norm(weights, name, x):
    return F.layer_norm(x, (D,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)


def dense(weights, name, x):
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def attention(weights, name, x):
    q, k, v = dense(weights, f"{name}.qkv", x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    a = (q @ k.transpose(2, 3) / (D / HEADS) ** 0.5).softmax(-1)
    return dense(weights, f"{name}.proj", (a @ v).transpose(1, 2).flatten(2))


def mlp(weights, name, x):
    if f"{name}.w12.weight" in weights:
        gate, value = dense(weights, f"{name}.w12", x).chunk(2, -1)
        return dense(weights, f"{name}.w3", F.silu(gate) * value)
    return dense(weights, f"{name}.fc2", F.gelu(dense(weights, f"{name}.fc1", x)))


@pytest.mark.parametrize("registers, hidden, chunks", [(0, None, 0), (4, None, 0), (0, 16, 0), (4, 16, 1)])
def test_dinov2_is_what_its_forward_pass_says(loaded, registers, hidden, chunks):
    w = filled(dinov2(registers=registers, hidden=hidden, chunks=chunks))
    encoder = loaded({"teacher": {**under("backbone.", w), "dino_head.mlp.0.weight": torch.ones(2),
                                  "ibot_head.mlp.0.weight": torch.ones(2)}})  # fmt: skip
    images, pixels = images_and_pixels()
    x = torch.cat((w["cls_token"].expand(2, -1, -1), patches(w, pixels, "patch_embed.proj")), 1) + w["pos_embed"]
    if registers:
        x = torch.cat((x[:, :1], w["register_tokens"].expand(2, -1, -1), x[:, 1:]), 1)
    for i in range(DEPTH):
        name = f"blocks.{i // chunks}.{i}" if chunks else f"blocks.{i}"
        x = x + w[f"{name}.ls1.gamma"] * attention(w, f"{name}.attn", layer_norm(w, f"{name}.norm1", x))
        x = x + w[f"{name}.ls2.gamma"] * mlp(w, f"{name}.mlp", layer_norm(w, f"{name}.norm2", x))
    torch.testing.assert_close(encoder(images).tokens, layer_norm(w, "norm", x), rtol=1e-4, atol=1e-5)
    assert (encoder.num_prefix, encoder.has_cls_token, encoder.grid) == (1 + registers, True, (GRID, GRID))
    report = encoder.loading
    assert report.family == "DINOv2" + (" with registers" if registers else "")
    assert report.found == "teacher.backbone." and report.loaded == len(encoder.model.state_dict())
    assert report.left_out == {"mask_token": 1, "teacher.dino_head": 1, "teacher.ibot_head": 1}
    assert any("register_tokens to reg_token (1)" in one for one in report.renamed) == bool(registers)
    assert report.missing == () and "teacher.dino_head (1)" in report.text


@pytest.mark.parametrize("before", [0, 1])
def test_data2vec_2_is_what_its_forward_pass_says(loaded, before):
    w = filled(data2vec2(before=before))
    encoder = loaded({"cfg": {"model": {"_name": "data2vec_multi"}}, "model": {**w, "_ema": filled(data2vec2(), 1)}})
    images, pixels = images_and_pixels()
    image = "modality_encoders.IMAGE."
    x = patches(w, pixels, f"{image}local_encoder.proj") + w[f"{image}fixed_positional_encoder.positions"]
    x = torch.cat((w[f"{image}extra_tokens"].expand(2, -1, -1), x), 1)
    x = layer_norm(w, f"{image}context_encoder.norm", x)
    names = [f"{image}context_encoder.blocks.{i}" for i in range(before)]
    for name in [*names, *(f"blocks.{i}" for i in range(DEPTH - before))]:
        x = layer_norm(w, f"{name}.norm1", x + attention(w, f"{name}.attn", x))
        x = layer_norm(w, f"{name}.norm2", x + mlp(w, f"{name}.mlp", x))
    given = encoder(images, with_attention=True)
    torch.testing.assert_close(given.tokens, x, rtol=1e-4, atol=1e-5)
    assert given.cls_attention.shape == (2, HEADS, 1 + GRID * GRID) and encoder.has_cls_token
    assert encoder.loading.left_out == {"_ema": len(data2vec2()), f"{image}decoder": 4}
    assert any(f"{image}extra_tokens to cls_token (1)" == one for one in encoder.loading.renamed)


def test_beit_behind_encoder_is_no_simmim():
    kinds = {"BEiT": beit(), "BEiT v2": beit(second=True)}
    kinds["SimMIM"] = {name: shape for name, shape in beit().items() if not name.startswith("lm_head")}
    for family, names in kinds.items():
        published = read_published({"model": under("encoder.", filled(names))}, "x")
        assert (published.family, published.found, published.grid) == (family, "model.encoder.", GRID)
        assert published.pixels[0][0] == (0.5 if family == "BEiT" else 0.485)


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("shared", [True, False])
def test_beit_is_timms_with_the_same_weights(loaded, second, shared):
    w = filled(beit(second=second, shared=shared))
    arch = "beitv2_base_patch16_224" if second else "beit_base_patch16_224"
    encoder = loaded({"model": w, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}, arch)
    size = {**TINY, "img_size": PATCH * GRID, "patch_size": PATCH, "num_classes": 0, "global_pool": ""}
    theirs = timm.create_model(arch, **size, use_rel_pos_bias=not shared, use_shared_rel_pos_bias=shared)
    own = {name: w[name] for name in theirs.state_dict()}
    theirs.load_state_dict(own)
    images, pixels = images_and_pixels(*(() if second else (PATCH * GRID, (0.5,) * 3, (0.5,) * 3)))
    torch.testing.assert_close(encoder(images).tokens, theirs.eval()(pixels).detach(), rtol=1e-4, atol=1e-5)
    assert encoder.loading.family == ("BEiT v2" if second else "BEiT") and encoder.loading.loaded == len(own)
    left = encoder.loading.left_out
    assert left["optimizer"] == left["mask_token"] == 1 and left["lm_head"] == 2 and ("cls_pt_layers" in left) == second
    assert sum(left.values()) + len(own) == len(w) + 1


def test_capi_is_what_its_forward_pass_says(loaded):
    heads, side = 2, 3
    w = filled(capi(heads=heads))
    encoder = loaded({**under("backbone.", w), "head.last_layer.weight": torch.ones(2)}, None, side * PATCH)
    images, pixels = images_and_pixels(side * PATCH)
    places = [(0, 0), (0.25, 0), (0.5, 0), (0.75, 0), (1, 0), (1, 0.25), (1, 0.5), (1, 0.75),
              (1, 1), (0.75, 1), (0.5, 1), (0.25, 1), (0, 1), (0, 0.75), (0, 0.5), (0, 0.25)]  # fmt: skip
    places = torch.tensor([*places, *((i / 2, j / 2) for i in range(side) for j in range(side))])

    def rms(x, weight=1.0):
        return weight * x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()

    x = torch.cat((w["registers"].expand(2, -1, -1), patches(w, pixels, "patch_embed")), 1)
    for i in range(DEPTH):
        name = f"encoder.blocks.{i}.residual1"
        inner = rms(x, w[f"{name}.norm.weight"])
        q, k, v = ((inner @ w[f"{name}.fn.{part}_proj.weight"].T).unflatten(2, (heads, -1)).transpose(1, 2)
                   for part in "qkv")  # fmt: skip
        # Channel c and c + half are a complex number, turned by the angle of the place.
        turn = torch.exp(1j * (places @ w[f"{name}.fn.rope.freqs"]))
        half = D // heads // 2

        def turned(part, turn=turn, half=half):
            first, second = part[..., :half], part[..., half:]
            cos, sin = turn.real, turn.imag
            one, two = first * cos[:, :half] - second * sin[:, :half], second * cos[:, half:] + first * sin[:, half:]
            return torch.cat((one, two), -1)

        a = (turned(q) @ turned(k).transpose(2, 3) / (D / heads) ** 0.5).softmax(-1)
        x = x + (a @ v).transpose(1, 2).flatten(2) @ w[f"{name}.fn.proj.weight"].T
        name = f"encoder.blocks.{i}.residual2"
        inner = F.gelu(rms(x, w[f"{name}.norm.weight"]) @ w[f"{name}.fn.fc1.weight"].T)
        x = x + inner @ w[f"{name}.fn.fc2.weight"].T
    torch.testing.assert_close(encoder(images).tokens, rms(x), rtol=1e-4, atol=1e-5)
    assert (encoder.num_prefix, encoder.has_cls_token, encoder.grid) == (16, False, (side, side))
    report = encoder.loading
    assert (report.family, report.found) == ("CAPI", "backbone.")
    assert report.left_out == {"mask_token": 1, "decoder": 9 * DEPTH, "head": 1}


def test_capi_in_the_registers_own_places_and_sizes():
    with pytest.raises(ValueError, match="come in fours, got 6"):
        CapiEncoder(32, 8, 24, 1, 3, 6)
    with pytest.raises(ValueError, match="patch size 8 does not divide image size 30"):
        CapiEncoder(30, 8, 24, 1, 3, 4)
    assert torch.equal(CapiEncoder(8, 8, 24, 1, 3, 4).places, torch.zeros(5, 2))  # one patch, and registers upon it


def test_ijepa_is_timms_without_cls(loaded):
    w = filled(plain(cls=False))
    encoder = loaded({
        "encoder": under("module.", filled(plain(cls=False), 1)),
        "predictor": {"module.mask_token": torch.ones(3), "module.predictor_norm.weight": torch.ones(3)},
        "target_encoder": under("module.", w),
        "opt": {"state": {}}, "scaler": None, "epoch": 3,
    })  # fmt: skip
    theirs = timm.create_model("vit_tiny_patch16_224", **TINY, img_size=PATCH * GRID, patch_size=PATCH, num_classes=0,
                               global_pool="", class_token=False)  # fmt: skip
    theirs.load_state_dict(w)
    images, pixels = images_and_pixels()
    torch.testing.assert_close(encoder(images).tokens, theirs.eval()(pixels).detach(), rtol=1e-4, atol=1e-5)
    report = encoder.loading
    assert (report.family, report.found, report.renamed) == ("I-JEPA", "target_encoder.module.", ())
    assert report.left_out == {"encoder": len(w), "predictor": 2}


def test_moco_v3_is_its_base_encoder(loaded):
    encoder = loaded({"epoch": 1, "optimizer": {"state": {}}, "state_dict": {
        **under("module.base_encoder.", {**W, "head.0.weight": torch.ones(2)}),
        **under("module.momentum_encoder.", filled(plain(), 1)),
        "module.predictor.0.weight": torch.ones(2),
    }})  # fmt: skip
    assert torch.equal(encoder.model.cls_token, W["cls_token"])
    report = encoder.loading
    assert (report.family, report.found) == ("MoCo v3", "state_dict.module.base_encoder.")
    outer = {"state_dict.module.momentum_encoder": len(W), "state_dict.module.predictor": 1}
    assert report.left_out == {"head": 1, **outer}


SIZES = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16), "huge": (1280, 32, 16)}


def published_sizes():
    for size in ("small", "base", "large"):
        dim, depth, heads = SIZES[size]
        yield f"dinov2-{size}", {"model": dinov2(dim, depth, 14, 37)}, f"vit_{size}_patch14_dinov2", heads
        yield f"dinov2-{size}-reg", dinov2(dim, depth, 14, 37, 4), f"vit_{size}_patch14_reg4_dinov2", heads
    yield "dinov2-giant", dinov2(1536, 40, 14, 37, hidden=4096), "vit_giant_patch14_dinov2", 24
    yield "dinov2-giant-reg", dinov2(1536, 40, 14, 37, 4, 4096), "vit_giant_patch14_reg4_dinov2", 24
    for size in ("base", "large"):
        dim, depth, heads = SIZES[size]
        for version in ("", "v2"):
            names = {"model": beit(dim, depth, 16, 14, heads, second=bool(version))}
            yield f"beit{version}-{size}", names, f"beit{version}_{size}_patch16_224", heads
        yield f"data2vec2-{size}", {"model": data2vec2(dim, depth, 16, 14)}, f"vit_{size}_patch16_224", heads
        yield f"mae-{size}", {"model": plain(dim, depth, 16, 14)}, f"vit_{size}_patch16_224", heads
    for size, heads in (("small", 12), ("base", 12)):
        dim, depth, _ = SIZES[size]
        names = {"state_dict": under("module.base_encoder.", plain(dim, depth, 16, 14))}
        yield f"mocov3-{size}", names, f"vit_{size}_patch16_224", heads
    words = "CAPI's ViT, 1024 wide, 24 blocks of 16 heads, patches of 14"
    yield "capi-large", under("backbone.", capi(1024, 24, 14, 16)), words, 16
    names = {name: shape for name, shape in beit(768, 12, 16, 14, 12).items() if not name.startswith("lm_head")}
    names = {"model": {**under("encoder.", names), "decoder.0.weight": (3072, 768, 1, 1), "decoder.0.bias": (3072,)}}
    yield "simmim-base", names, "beit_base_patch16_224", 12
    yield "data2vec2-huge", {"model": data2vec2(1280, 32, 14, 16)}, "vit_huge_patch14_224", 16
    yield "ijepa-huge", {"target_encoder": plain(1280, 32, 14, 16, cls=False)}, "vit_huge_patch14_224", 16
    yield "ijepa-giant", {"target_encoder": plain(1408, 40, 16, 14, 6144, cls=False)}, "vit_giant_patch14_224", 16
    yield "dino-small", {"teacher": under("backbone.", plain(384, 12, 8, 28))}, "vit_small_patch16_224", 6


FULL = {name: rest for name, *rest in published_sizes()}


@pytest.mark.parametrize("name", FULL)
def test_published_sizes_are_known_without_arch(name):
    names, arch, heads = FULL[name]
    content = {part: empty(shapes) for part, shapes in names.items()} if len(names) == 1 else empty(names)
    published = read_published(content, name)
    assert published.arch == arch
    with torch.device("meta"):
        if published.build is not None:
            model = published.build(224)
        else:
            size = {"img_size": published.grid * published.patch, "patch_size": published.patch}
            model = timm.create_model(arch, **{**size, "num_classes": 0, "global_pool": "", **published.options})
    theirs = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in published.weights.items()} == theirs
    assert model.blocks[0].attn.num_heads == heads


PLACES = {
    "": W,
    "module.": under("module.", W),
    "backbone.": under("backbone.", W),
    "module.encoder.": under("module.encoder.", W),
    "model.backbone.": {"model": under("backbone.", W)},
    "model.module.encoder.": {"model": under("module.encoder.", W), "epoch": 2},
    "teacher.module.backbone.": {"student": under("module.backbone.", W), "teacher": under("module.backbone.", W)},
    "state_dict.teacher.": {"state_dict": {**under("student.", filled(plain(), 1)), **under("teacher.", W)}},
    "model.teacher.backbone.": {"model": {"student": {"backbone": filled(plain(), 1)}, "teacher": {"backbone": W}}},
    "target_encoder.module.": {"encoder": filled(plain(), 1), "target_encoder": under("module.", W)},
    "student.": {"student": W},
    "state_dict_ema.": {"arch": "vit", "state_dict": filled(plain(), 1), "state_dict_ema": W, "epoch": 2},
    "state_dict_ema.module.": {
        "state_dict": under("module.", filled(plain(), 1)),
        "state_dict_ema": under("module.", W),
    },
    "_orig_mod.model.": under("_orig_mod.model.", W),
}


@pytest.mark.parametrize("found", PLACES)
def test_prefixes_nested_and_combined(loaded, found):
    encoder = loaded(PLACES[found])
    assert encoder.loading.found == found
    for name, tensor in encoder.model.state_dict().items():
        assert torch.equal(tensor, W[name]), name


def test_weights_that_are_not_finite_are_told(loaded):
    """With how many numbers; sums beyond fp32 are no infinity."""
    weights = {name: tensor.clone() for name, tensor in W.items()}
    weights["blocks.0.attn.qkv.weight"][0, :3] = float("nan")
    weights["norm.bias"][:2] = torch.tensor([float("inf"), -float("inf")])
    weights["cls_token"][...] = 3e38
    told = loaded(weights).loading
    assert told.not_finite == (f"blocks.0.attn.qkv.weight (3 of {3 * D * D:,})", f"norm.bias (2 of {D})")
    assert "weights loaded; warning: NaN or infinity in blocks.0.attn.qkv.weight (3 of 1,728), norm.bias" in told.text
    assert loaded(W).loading.not_finite == () and "warning" not in loaded(W).loading.text
    assert (
        "in a (1), b (1), c (1), d (1), e (1), f (1) and 1 more;"
        in told._replace(not_finite=tuple(f"{name} (1)" for name in "abcdefg")).text
    )


def test_two_encoders_of_one_rank_are_refused(loaded):
    with pytest.raises(ValueError, match=r"holds 2 encoders, under 'model.one.', 'model.two.'"):
        loaded({"model": {**under("one.", W), **under("two.", W)}})


def test_positions_and_patches_are_resampled_as_published(loaded):
    w = filled(dinov2(registers=4))
    encoder = loaded(w, img_size=48, patch_size=12)
    state = encoder.model.state_dict()
    torch.testing.assert_close(
        state["patch_embed.proj.weight"], resample_patch_embed(w["patch_embed.proj.weight"], [12, 12])
    )
    torch.testing.assert_close(state["pos_embed"], w["pos_embed"][:, 1:])
    assert encoder.loading.resampled == ("patch_embed.proj: 8 x 8 to 12 x 12 pixels",)
    larger = loaded(W, img_size=56)
    torch.testing.assert_close(larger.model.pos_embed, resample_abs_pos_embed(W["pos_embed"], [7, 7], [4, 4]))
    assert larger.loading.resampled == ("pos_embed: 4 x 4 to 7 x 7 patches",) and larger.grid == (7, 7)
    finer = loaded(W, patch_size=4)
    assert finer.img_size == 32 and finer.grid == (8, 8) and len(finer.loading.resampled) == 2


def test_tables_of_beit_are_resized(loaded):
    encoder = loaded({"model": filled(beit())}, "beit_base_patch16_224", 48)
    assert encoder.grid == (6, 6) and encoder.model.rel_pos_bias.relative_position_bias_table.shape == (124, HEADS)
    assert encoder.loading.resampled == (
        "rel_pos_bias.relative_position_bias_table: 4 x 4 to 6 x 6 tokens",
    )  # fmt: skip


def test_fine_tuned_norms_behind_the_pooling(loaded):
    w = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: value for name, value in W.items()}
    w["head.weight"] = torch.ones(2, D)
    fine_tuned, other = loaded({"model": w}), loaded(W)
    images, _ = images_and_pixels()
    torch.testing.assert_close(fine_tuned(images).tokens, other(images).tokens)


def changed(**changes):
    return {name: tensor for name, tensor in {**W, **changes}.items() if tensor is not None}


REFUSED = {
    "missing": (changed(**{"blocks.1.mlp.fc2.bias": None}), r"not in the checkpoint \(1\): blocks.1.mlp.fc2"),
    "unknown": (changed(extra=torch.ones(2)), r"in the checkpoint but not in the model \(1\): extra \[2\]"),
    "shape": (changed(**{"norm.bias": torch.ones(9)}), r"norm.bias: checkpoint \[9\], model \[24\]"),
    "whole numbers": (changed(**{"norm.bias": torch.ones(D, dtype=torch.long)}), "not floating-point values"),
    "positions": (changed(pos_embed=torch.ones(1, 12, D)), "12 positions with 1 prefix tokens, which are of no square"),
    "rotary": (changed(pos_embed=None), "positions are of another kind"),
    "patches": (changed(**{"patch_embed.proj.weight": torch.ones(D, 3, 8, 4)}), r"shape \[24, 3, 8, 4\], so it is not"),
    "grey": (changed(**{"patch_embed.proj.weight": torch.ones(D, 1, 8, 8)}), "images of 1 channels"),
    "not stored": (changed(pos_embed=torch.ones(1, 1, 1).expand(1, 10**6, D)), "does not store 1 of its weights whole"),
    "sparse": (changed(cls_token=torch.ones(1, 1, D).to_sparse()), "does not store 1 of its weights whole"),
    "registers": ({**filled(dinov2(registers=4)), "register_tokens": torch.ones(4)}, r"model \(1\): reg_token \[4\]"),
    "two for one": (changed(**{"blocks.0.1.norm1.bias": torch.ones(D)}), r"two tensors for timm's blocks.1.norm1.bias"),
    "data2vec, norm": ({**filled(data2vec2()), "norm.weight": torch.ones(D)}, r"not in the model \(1\): norm.weight"),
    "capi": (under("backbone.", filled(capi())), "arch cannot be given with a checkpoint of CAPI, of which timm"),
    "no encoder": ({"model": {"fc.weight": torch.ones(2, 3)}}, "no patch_embed.proj.weight.*begin with fc.weight"),
    "nothing": ({"epoch": 3}, "is not a dict of named tensors"),
    "a list": ([1, 2], "holds a list"),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_not_whole_is_refused_with_both_sides(loaded, why):
    content, told = REFUSED[why]
    with pytest.raises(ValueError, match=told):
        loaded(content)


def test_a_size_that_nobody_published_needs_arch(loaded):
    with pytest.raises(ValueError, match=r"\(DINOv2\) is 24 wide with 2 blocks, which is no published size.*--arch"):
        loaded(filled(dinov2()), arch=None)
    # Fine-tuned BEiT is of a published size, but so is SimMIM's, whose pixels are normalised otherwise.
    assert read_published(empty(beit(768, 12, 16, 14, 12, shared=False)), "x").arch is None
    with pytest.raises(ValueError, match=r"tables in every block are of a fine-tuned BEiT, BEiT v2 or SimMIM"):
        loaded({"model": filled(beit(shared=False))}, arch=None)


class Runs:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_in_a_file_is_run_or_opened(loaded, tmp_path):
    with pytest.raises(ValueError, match="not unpickled because that could run code"):
        loaded({"model": W, "args": Runs(tmp_path / "ran")})
    (tmp_path / "file.pth").write_bytes(pickle.dumps({"model": Runs(tmp_path / "ran")}))
    with pytest.raises(ValueError, match="cannot be read"):
        load_encoder(ModelChoice("x", str(tmp_path / "file.pth")))
    assert not (tmp_path / "ran").exists()


def test_a_dict_that_holds_itself_ends(loaded):
    content = {"model": W}
    for _ in range(60):
        content = {"a": content, "b": content}
    content["c"] = content
    assert loaded(content).loading.loaded == len(W)


def test_both_commands_tell_the_report(tmp_path):
    torch.save({"model": {**filled(dinov2(registers=4)), "head.weight": torch.ones(2)}}, tmp_path / "dinov2.pth")
    arch = "arch=vit_tiny_patch16_224:embed_dim=24:depth=2:num_heads=3"
    stream = io.StringIO()
    torch.save(under("backbone.", filled(capi())), tmp_path / "capi.pth")
    models = [f"d={tmp_path}/dinov2.pth:{arch}", f"c={tmp_path}/capi.pth:img_size=32"]
    analyze(AnalyzeConfig(models=models, images=12, batch_size=12, device="cpu", workers=0,
                          output=str(tmp_path / "a")), stream=stream)  # fmt: skip
    told = "DINOv2 with registers under 'model.'"
    assert f"d: {told}" in stream.getvalue() and "left out mask_token (1), head (1)" in stream.getvalue()
    page = (tmp_path / "a" / "report.html").read_text()
    assert "Weights of d" in page and "register_tokens to reg_token (1)" in page
    numbers = json.loads((tmp_path / "a" / "numbers.json").read_text())
    assert "c: CAPI under 'backbone.'" in stream.getvalue() and "was not seen" not in stream.getvalue()
    facts = numbers["models"][1]["runs"][0]["facts"]
    assert (facts["layers"], facts["heads"], facts["prefix"], facts["tokens"]) == (2, 3, 16, 32)
    of_cls = [
        [key for key in model["runs"][0]["heads"]["quantities"] if key.startswith("cls_")]
        for model in numbers["models"]
    ]
    assert of_cls[0] and not of_cls[1]  # registers are no [cls]
    report = LoadReport(**numbers["models"][0]["runs"][0]["facts"]["loading"])
    assert report.left_out == {"mask_token": 1, "head": 1} and report.found == "model."

    stream = io.StringIO()
    probe(ProbeConfig(model=str(tmp_path / "dinov2.pth"), arch="vit_tiny_patch16_224", model_kwargs=TINY, data="digits",
                      pooling="mean", epochs=1, batch_size=500, device="cpu", precision="fp32", workers=0, pictures=0,
                      output=str(tmp_path / "p")), stream=stream)  # fmt: skip
    assert told in stream.getvalue() and told.replace("'", "&#39;") in (tmp_path / "p" / "report.html").read_text()
    saved = json.loads((tmp_path / "p" / "results.json").read_text())
    assert saved["loading"]["left_out"] == report.left_out
