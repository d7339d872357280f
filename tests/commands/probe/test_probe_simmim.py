"""Encoders of SimMIM, and Swin Transformers, are probed: patch tokens of maps, no [cls] where there is none."""

import json
import re

import pytest
import torch

from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.commands.pretrain.run import pretrain
from mimkernels.commands.probe.config import ProbeConfig
from mimkernels.commands.probe.run import ProbeRun, probe
from mimkernels.engine.encoder import load_encoder
from mimkernels.models import SimMIM

SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 16}
SWIN = {**SMALL, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
VIT = {**SMALL, "depth": 2, "num_heads": 2}
MODELS = {
    "vit": {"name": "vit_tiny_patch16_224", **VIT},
    "beit": {"name": "beit_base_patch16_224", **VIT},
    "swin": {"name": "swin_tiny_patch4_window7_224", **SWIN},
    "swinv2": {"name": "swinv2_tiny_window8_256", **SWIN},
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def saved(kind, folder, **changes):
    """A model with weights that are all different, and the file of its published names."""
    torch.manual_seed(0)
    model = SimMIM.from_timm(**{**MODELS[kind], "mask_unit": 8, **changes})
    with torch.no_grad():
        for weight in model.encoder.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    torch.save({"model": model.simmim_state_dict()}, folder / f"{kind}.pth")
    return model.eval(), folder / f"{kind}.pth"


def arguments(kind):
    options = dict(MODELS[kind])
    return {"arch": options.pop("name"), "img_size": options.pop("img_size"), "model_kwargs": options}


@pytest.mark.parametrize("kind", ["beit", "swin", "swinv2"])
def test_published_files_load_with_arch(kind, tmp_path):
    model, path = saved(kind, tmp_path)
    encoder = load_encoder(ProbeConfig(model=str(path), **arguments(kind)))
    prefix, side = (1, 8) if kind == "beit" else (0, 4)
    assert (encoder.num_prefix, encoder.has_cls_token, encoder.grid) == (prefix, bool(prefix), (side, side))
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    pixels = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    wanted = model.encode(pixels, torch.zeros(2, 8, 8, dtype=torch.bool)).detach()
    torch.testing.assert_close(encoder(images).tokens[:, prefix:], wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=rf"{kind}.pth' has relative positions.*--arch"):
        load_encoder(ProbeConfig(model=str(path)))


def test_the_plain_vit_of_simmim_loads(tmp_path):
    _, path = saved("vit", tmp_path)
    encoder = load_encoder(ProbeConfig(model=str(path), **{**arguments("vit"), "img_size": None,
                           "model_kwargs": {"embed_dim": 16, "depth": 2, "num_heads": 2}}))  # fmt: skip
    assert (encoder.num_prefix, encoder.grid, encoder.dim) == (1, (8, 8), 16)


def test_the_cls_attention_of_beit_has_its_bias(tmp_path):
    model, path = saved("beit", tmp_path)
    with torch.no_grad():
        model.encoder.rel_pos_bias.relative_position_bias_table[-3] = -20.0  # [cls] to every patch
    torch.save({"model": model.simmim_state_dict()}, path)
    encoder = load_encoder(ProbeConfig(model=str(path), **arguments("beit")))
    rows = encoder(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), with_attention=True).cls_attention
    assert rows.shape == (2, 2, 65) and (rows[..., 0] > 0.99).all()


def test_a_window_is_resized_for_a_probe(tmp_path):
    _, path = saved("swin", tmp_path)
    given = arguments("swin")
    given["model_kwargs"] = {**given["model_kwargs"], "window_size": 8}
    encoder = load_encoder(ProbeConfig(model=str(path), **{**given, "img_size": 64}))
    assert encoder.grid == (8, 8) and encoder.model.layers[0].blocks[0].window_size == (8, 8)


def test_a_run_of_swin_is_probed(tmp_path, tiny_settings, capsys):
    own = {"method": "simmim", "model": "swin_tiny_patch4_window7_224", "mask_unit": 4, "patch_size": 2, "pictures": 0,
           "model_kwargs": {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4}}  # fmt: skip
    settings = {name: value for name, value in tiny_settings.items() if not name.startswith("decoder")}
    pretrain(PretrainConfig(**{**settings, **own, "output": str(tmp_path / "run")}))
    config = {"model": str(tmp_path / "run"), "data": "digits", "epochs": 1, "batch_size": 500, "device": "cpu",
              "precision": "fp32", "workers": 0, "output": str(tmp_path / "probe")}  # fmt: skip
    for name in ("cls", "cls+mean", "attn-mn", "topk:k=2"):
        with pytest.raises(
            ValueError, match=rf"pooling '{re.escape(name)}' needs a \[cls\] token, which SimMIM swin.* has not"
        ):
            ProbeRun(ProbeConfig(**config, pooling=f"mean,{name}"))
    with pytest.raises(
        ValueError, match=r"img_size 32 cannot be given with SimMIM swin.* of Vision Transformers alone"
    ):
        ProbeRun(ProbeConfig(**config, img_size=32))
    result = probe(ProbeConfig(**config, pooling="mean,abmilp:positions=true,topk:by=norm", pictures=2))
    assert [one.label for one in result.results] == ["mean", "abmilp:positions=true", "topk:by=norm"]
    assert "16 tokens of 32, frozen" in json.dumps(result.content.run_facts)
