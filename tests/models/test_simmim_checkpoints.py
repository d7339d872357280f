"""Published checkpoints of SimMIM load by name and save back; those of another architecture or window are refused."""

import pickle
import sys
import types

import pytest
import torch

pytest.importorskip("timm")
from mimkernels.models import SimMIM
from mimkernels.models.checkpoint import read_file

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "mask_unit": 16}
SWIN = {
    "img_size": 64, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "mask_unit": 16,
}  # fmt: skip
MODELS = {
    "vit": {"name": "beit_base_patch16_224", **VIT},
    "swin": {"name": "swin_tiny_patch4_window7_224", **SWIN},
    "swinv2": {"name": "swinv2_tiny_window8_256", **SWIN},
}


def build(kind, **changes):
    torch.manual_seed(0)
    return SimMIM.from_timm(**{**MODELS[kind], **changes})


def norm(dim):
    return {"weight": (dim,), "bias": (dim,)}


def linear(inner, outer, bias=True):
    return {"weight": (outer, inner), **({"bias": (outer,)} if bias else {})}


def under(stem, **parts):
    return {f"{stem}.{part}.{name}": shape for part, shapes in parts.items() for name, shape in shapes.items()}


def vit_names():
    """Names and shapes that the published code saves for the ViT of `MODELS`; buffers apart."""
    weights = {
        "encoder.mask_token": (1, 1, 48), "encoder.cls_token": (1, 1, 48),
        "encoder.patch_embed.proj.weight": (48, 3, 8, 8), "encoder.patch_embed.proj.bias": (48,),
        "encoder.rel_pos_bias.relative_position_bias_table": (7 * 7 + 3, 3),
        "encoder.norm.weight": (48,), "encoder.norm.bias": (48,),
        "decoder.0.weight": (8 * 8 * 3, 48, 1, 1), "decoder.0.bias": (8 * 8 * 3,),
    }  # fmt: skip
    for i in range(2):
        stem = f"encoder.blocks.{i}"
        weights |= {f"{stem}.{name}": (48,) for name in ("gamma_1", "gamma_2", "attn.q_bias", "attn.v_bias")}
        weights |= under(stem, norm1=norm(48), norm2=norm(48))
        weights |= under(f"{stem}.attn", qkv=linear(48, 144, bias=False), proj=linear(48, 48))
        weights |= under(f"{stem}.mlp", fc1=linear(48, 192), fc2=linear(192, 48))
    return weights, {"encoder.rel_pos_bias.relative_position_index": (17, 17)}


def swin_names(version):
    """Those of Swin (1) and Swin V2 (2): stages of 16 and 8 tokens a side, windows of 4."""
    weights = {
        "encoder.mask_token": (1, 1, 16),
        **under("encoder", norm=norm(32)), **under("encoder.patch_embed", norm=norm(16)),
        "encoder.patch_embed.proj.weight": (16, 3, 4, 4), "encoder.patch_embed.proj.bias": (16,),
        "encoder.layers.0.downsample.reduction.weight": (32, 64),
        **under("encoder.layers.0.downsample", norm=norm(64 if version == 1 else 32)),
        "decoder.0.weight": (8 * 8 * 3, 32, 1, 1), "decoder.0.bias": (8 * 8 * 3,),
    }  # fmt: skip
    buffers = {}
    for stage, (dim, heads, side) in enumerate(((16, 2, 16), (32, 4, 8))):
        for k in range(2):
            stem = f"encoder.layers.{stage}.blocks.{k}"
            weights |= under(stem, norm1=norm(dim), norm2=norm(dim))
            weights |= under(f"{stem}.attn", qkv=linear(dim, 3 * dim, bias=version == 1), proj=linear(dim, dim))
            weights |= under(f"{stem}.mlp", fc1=linear(dim, 4 * dim), fc2=linear(4 * dim, dim))
            if version == 1:
                weights[f"{stem}.attn.relative_position_bias_table"] = (49, heads)
            else:
                weights |= {f"{stem}.attn.q_bias": (dim,), f"{stem}.attn.v_bias": (dim,)}
                weights[f"{stem}.attn.logit_scale"] = (heads, 1, 1)
                weights[f"{stem}.attn.cpb_mlp.0.weight"], weights[f"{stem}.attn.cpb_mlp.0.bias"] = (512, 2), (512,)
                weights[f"{stem}.attn.cpb_mlp.2.weight"] = (heads, 512)
                buffers[f"{stem}.attn.relative_coords_table"] = (1, 7, 7, 2)
            buffers[f"{stem}.attn.relative_position_index"] = (16, 16)
            if k % 2:
                buffers[f"{stem}.attn_mask"] = ((side // 4) ** 2, 16, 16)
    return weights, buffers


NAMES = {"vit": vit_names, "swin": lambda: swin_names(1), "swinv2": lambda: swin_names(2)}


def published(kind):
    generator = torch.Generator().manual_seed(0)
    shapes, buffers = NAMES[kind]()
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    index = {name: torch.zeros(shape, dtype=torch.int64 if "index" in name else torch.float32)
             for name, shape in buffers.items()}  # fmt: skip
    return weights, index


class Config:
    """Takes the place of yacs, which need not be installed to read a file and is not to write one here."""

    def __init__(self, monkeypatch):
        class CfgNode(dict):
            def __init__(self, values):
                super().__init__(values)
                self.__dict__["__immutable__"] = True

        CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
        package, module = types.ModuleType("yacs"), types.ModuleType("yacs.config")
        module.CfgNode, package.config = CfgNode, module
        monkeypatch.setitem(sys.modules, "yacs", package)
        monkeypatch.setitem(sys.modules, "yacs.config", module)
        self.node = CfgNode


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", MODELS)
def test_the_published_training_checkpoint_loads_and_saves_back(kind, tmp_path):
    weights, buffers = published(kind)
    path = tmp_path / "ckpt_epoch_799.pth"
    with pytest.MonkeyPatch.context() as patch:
        node = Config(patch).node
        config = node({"DATA": node({"MASK_RATIO": 0.6}), "BASE": ["", 1], "TAG": "simmim"})
        extra = {"optimizer": {"state": {}}, "lr_scheduler": {"t": [1]}, "max_accuracy": 0.0, "epoch": 799}
        torch.save({"model": {**weights, **buffers}, **extra, "config": config}, path)
    assert "yacs" not in sys.modules
    assert read_file(path)["config"]["DATA"]["MASK_RATIO"] == 0.6
    model = build(kind)
    report = model.load_checkpoint(path)
    assert set(report.loaded) == set(weights) and report.missing == () and set(report.left) == set(buffers)
    saved = model.simmim_state_dict()
    assert saved.keys() == {**weights, **buffers}.keys()
    for name, tensor in weights.items():
        assert torch.equal(saved[name], tensor), name
    for name, tensor in buffers.items():
        assert saved[name].shape == tensor.shape, name


@pytest.mark.parametrize("kind", MODELS)
def test_every_pixel_is_predicted_by_the_published_channel(kind):
    weights, _ = published(kind)
    model = build(kind)
    model.load_checkpoint(weights)
    side = model.encoder_stride[0]
    for row, column, colour in ((0, 0, 0), (0, 1, 2), (side - 1, 3, 1)):
        ours, theirs = (row * side + column) * 3 + colour, colour * side * side + row * side + column
        assert torch.equal(model.decoder.weight[ours], weights["decoder.0.weight"][theirs, :, 0, 0])
        assert model.decoder.bias[ours] == weights["decoder.0.bias"][theirs]


@pytest.mark.parametrize("kind", ["swin", "swinv2"])
def test_patches_are_merged_where_timm_does_it(kind):
    weights, _ = published(kind)
    model = build(kind)
    model.load_checkpoint(weights)
    merged = model.encoder.layers[1].downsample.reduction.weight
    assert torch.equal(merged, weights["encoder.layers.0.downsample.reduction.weight"])


@pytest.mark.parametrize("kind", MODELS)
def test_an_encoder_loads_alone_and_the_report_says_what_is_left(kind):
    weights, _ = published(kind)
    bare = {name.removeprefix("encoder."): tensor for name, tensor in weights.items() if "decoder" not in name}
    del bare["mask_token"]
    bare |= {"head.weight": torch.zeros(10, 48), "head.bias": torch.zeros(10)}
    model = build(kind)
    report = model.load_checkpoint(bare)
    assert set(report.missing) == {"encoder.mask_token", "decoder.0.weight", "decoder.0.bias"}
    assert set(report.left) == {"encoder.head.weight", "encoder.head.bias"}
    assert len(report.loaded) == len(weights) - 3
    assert torch.equal(model.encoder.norm.weight, weights["encoder.norm.weight"])


@pytest.mark.parametrize("kind", MODELS)
def test_weights_of_another_model_of_ours_load(kind, tmp_path):
    model, other = build(kind), build(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    torch.save(model.state_dict(), tmp_path / "state.pth")
    assert not other.load_checkpoint(tmp_path / "state.pth").missing
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    timm_names = model.encoder.state_dict()
    third = build(kind)
    assert third.load_checkpoint(timm_names).missing
    assert all(torch.equal(value, timm_names[name]) for name, value in third.encoder.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("encoder.norm.weight"), r"in the model but not in the checkpoint \(1\): encoder.norm.weight"),
        (lambda w: w.update({"encoder.pos_embed": torch.zeros(1, 17, 48)}), r"not in the model.*encoder.pos_embed"),
        (lambda w: w.update({"decoder.0.weight": torch.zeros(768, 48, 1, 1)}), r"\[768, 48, 1, 1\].*\[192, 48, 1, 1\]"),
        (lambda w: w.pop("encoder.mask_token"), r"in the model but not in the checkpoint \(1\): encoder.mask_token"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_refused_whole(change, message):
    weights, _ = published("vit")
    change(weights)
    model = build("vit")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        model.load_checkpoint(weights)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_checkpoint_of_mae_is_refused():
    from mimkernels.models import MAE

    other = MAE.from_timm("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)
    with pytest.raises(ValueError, match="the checkpoint is not of this model"):
        build("vit").load_checkpoint(other.mae_state_dict())


def test_settings_that_would_run_code_are_not_read(tmp_path, monkeypatch):
    ran = []
    Config(monkeypatch)
    module = sys.modules["yacs.config"]

    def load_cfg(text):
        ran.append(text)

    load_cfg.__module__, load_cfg.__qualname__ = "yacs.config", "load_cfg"
    module.load_cfg = load_cfg

    class Settings:
        def __reduce__(self):
            return (load_cfg, ("A: 1",))

    torch.save({"model": published("vit")[0], "config": Settings()}, tmp_path / "evil.pth", pickle_module=pickle)
    with pytest.raises(ValueError, match=r"more than tensors and plain values \(yacs.config.load_cfg\)"):
        build("vit").load_checkpoint(tmp_path / "evil.pth")
    assert not ran
