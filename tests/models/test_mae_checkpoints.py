"""Published checkpoints load by name and save back; another architecture's is refused whole."""

import argparse
import pickle

import pytest
import torch

pytest.importorskip("timm")
from mimkernels.models import MAE

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
DECODER = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 4}


def build(**overrides):
    return MAE.from_timm(**{"name": "vit_tiny_patch16_224", **SMALL, **DECODER, **overrides})


def published_names(depth, decoder_depth):
    """Names and shapes that the published code saves, for the sizes of `build`."""

    def blocks(stem, count, dim):
        shapes = {
            "norm1.weight": (dim,), "norm1.bias": (dim,),
            "attn.qkv.weight": (3 * dim, dim), "attn.qkv.bias": (3 * dim,),
            "attn.proj.weight": (dim, dim), "attn.proj.bias": (dim,),
            "norm2.weight": (dim,), "norm2.bias": (dim,),
            "mlp.fc1.weight": (4 * dim, dim), "mlp.fc1.bias": (4 * dim,),
            "mlp.fc2.weight": (dim, 4 * dim), "mlp.fc2.bias": (dim,),
        }  # fmt: skip
        return {f"{stem}.{i}.{name}": shape for i in range(count) for name, shape in shapes.items()}

    encoder = {
        "cls_token": (1, 1, 48), "pos_embed": (1, 17, 48),
        "patch_embed.proj.weight": (48, 3, 8, 8), "patch_embed.proj.bias": (48,),
        **blocks("blocks", depth, 48),
        "norm.weight": (48,), "norm.bias": (48,),
    }  # fmt: skip
    decoder = {
        "mask_token": (1, 1, 32), "decoder_pos_embed": (1, 17, 32),
        "decoder_embed.weight": (32, 48), "decoder_embed.bias": (32,),
        **blocks("decoder_blocks", decoder_depth, 32),
        "decoder_norm.weight": (32,), "decoder_norm.bias": (32,),
        "decoder_pred.weight": (192, 32), "decoder_pred.bias": (192,),
    }  # fmt: skip
    return encoder, decoder


def published(*parts):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for part in parts for name, shape in part.items()}


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_published_training_checkpoint_loads_and_saves_back(tmp_path):
    weights = published(*published_names(2, 1))
    path = tmp_path / "checkpoint-799.pth"
    args = argparse.Namespace(lr=1.5e-4, model="mae_vit_tiny", resume="")
    torch.save({"model": weights, "epoch": 799, "optimizer": {"state": {}}, "scaler": {}, "args": args}, path)
    model = build()
    report = model.load_checkpoint(path)
    assert set(report.loaded) == set(weights) and report.missing == ()
    saved = model.mae_state_dict()
    assert saved.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(saved[name], tensor), name
    assert torch.equal(model.encoder.blocks[1].attn.qkv.weight, weights["blocks.1.attn.qkv.weight"])
    assert torch.equal(model.decoder_blocks[0].mlp.fc2.bias, weights["decoder_blocks.0.mlp.fc2.bias"])


def test_an_encoder_checkpoint_leaves_the_decoder_and_says_so(tmp_path):
    encoder, decoder = published_names(2, 1)
    weights = published(encoder)
    path = tmp_path / "mae_pretrain_vit_tiny.pth"
    torch.save({"model": weights}, path)
    model = build()
    before = snapshot(model)
    report = model.load_checkpoint(str(path))
    assert set(report.loaded) == set(encoder) and set(report.missing) == set(decoder)
    for name, tensor in model.mae_state_dict().items():
        assert torch.equal(tensor, weights[name] if name in weights else before[name]), name


@pytest.mark.parametrize("form", ["published", "bare", "state_dict"])
@pytest.mark.parametrize(
    "variant",
    [
        {"name": "vit_tiny_patch16_224"},
        {"name": "vit_small_patch14_reg4_dinov2"},
        {"name": "vit_tiny_patch16_224", "qk_norm": True, "class_token": False},
    ],
    ids=["plain", "registers", "qk_norm"],
)
def test_round_trip_is_exact(tmp_path, variant, form):
    model, other = build(**variant), build(**variant)
    weights = model.state_dict() if form == "state_dict" else model.mae_state_dict()
    path = tmp_path / "mae.pth"
    torch.save({"model": weights} if form == "published" else weights, path)
    assert other.load_checkpoint(path).missing == ()
    assert_unchanged(other, model.state_dict())


def test_another_architecture_is_refused_with_both_sides_and_nothing_loaded():
    model = build(depth=3)
    before = snapshot(model)
    weights = published(*published_names(2, 1))
    weights["norm.weight"] = torch.randn(64)
    weights["head.weight"] = torch.randn(10, 48)
    with pytest.raises(ValueError) as caught:
        model.load_checkpoint({"model": weights})
    text = str(caught.value)
    assert "nothing was loaded" in text and "vit_tiny_patch16_224, 48 wide, 3 blocks" in text
    assert "norm.weight: checkpoint [64], model [48]" in text
    assert "in the model but not in the checkpoint (12): blocks.2.norm1.weight" in text
    assert "in the checkpoint but not in the model (1): head.weight [10, 48]" in text
    assert_unchanged(model, before)


def test_half_a_decoder_is_not_an_encoder_checkpoint():
    encoder, decoder = published_names(2, 1)
    weights = published(encoder, decoder)
    del weights["decoder_pred.bias"]
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"not in the checkpoint \(1\): decoder_pred.bias"):
        model.load_checkpoint(weights)
    assert_unchanged(model, before)


def test_integer_weights_are_refused():
    weights = published(*published_names(2, 1))
    weights["norm.bias"] = weights["norm.bias"].to(torch.int8)
    with pytest.raises(ValueError, match=r"not floating-point values \(1\): norm.bias: torch.int8"):
        build().load_checkpoint(weights)


class Dangerous:
    def __reduce__(self):
        return (pytest.fail, ("code from a checkpoint was run",))


@pytest.mark.parametrize("content", ["text", "truncated", "code", "list", "not tensors", "empty"])
def test_files_that_are_no_checkpoints_are_refused(tmp_path, content):
    path = tmp_path / "weights.pth"
    if content == "text":
        path.write_text("<html>404</html>")
    elif content == "truncated":
        torch.save({"model": published(*published_names(2, 1))}, path)
        path.write_bytes(path.read_bytes()[:5000])
    elif content == "code":
        path.write_bytes(pickle.dumps({"model": Dangerous()}, protocol=2))
    elif content == "list":
        torch.save([torch.zeros(3)], path)
    elif content == "not tensors":
        torch.save({"state": {"epoch": 3}}, path)
    else:
        torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match=r"weights\.pth"):
        build().load_checkpoint(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        build().load_checkpoint(tmp_path / "nowhere.pth")


def test_loading_keeps_dtype_and_trainability():
    model = build().bfloat16()
    weights = published(*published_names(2, 1))
    model.load_checkpoint(weights)
    assert torch.equal(model.mask_token, weights["mask_token"].bfloat16())
    assert model.mask_token.requires_grad and not model.encoder.pos_embed.requires_grad
