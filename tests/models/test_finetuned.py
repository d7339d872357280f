"""Fine-tuned models: learning rates by layer against the published tables, and weights in and out by timm's names."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

from mimkernels.models.finetuned import Finetuned
from mimkernels.models.masked_encoders import create_masked_encoder

VIT = {"embed_dim": 16, "depth": 3, "num_heads": 2}
BEIT = {**VIT, "use_rel_pos_bias": True, "use_abs_pos_emb": False, "init_values": 0.1}
SWIN = {"embed_dim": 8, "depths": [2, 2, 4, 2], "num_heads": [1, 2, 4, 8], "window_size": 2}
MODELS = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 16, "patch_size": 4, **VIT}),
    "beit": ("beit_base_patch16_224", {"img_size": 16, "patch_size": 4, **BEIT}),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 64, **SWIN}),
    "swinv2": ("swinv2_tiny_window8_256", {"img_size": 64, **SWIN}),
}


def made(family: str, **options) -> Finetuned:
    name, arguments = MODELS[family]
    torch.manual_seed(0)
    return Finetuned.from_timm(name, num_classes=5, in_chans=1, **{**arguments, **options})


def published_vit(name: str, blocks: int) -> int:
    """`get_layer_id_for_vit` of MAE and BEiT, `get_vit_layer` of SimMIM: ids 0 to blocks + 1."""
    if name in ("cls_token", "mask_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks") else blocks + 1


def published_swin(name: str, depths: list[int]) -> int:
    """`get_swin_layer` of SimMIM; there patches are merged at the end of a stage, here at the beginning of the next."""
    if name.startswith("patch_embed"):
        return 0
    if not name.startswith("layers"):
        return sum(depths) + 1
    stage, kind, number = int(name.split(".")[1]), *name.split(".")[2:4]
    if kind == "downsample":
        return sum(depths[:stage])
    return sum(depths[:stage]) + int(number) + 1


@pytest.mark.parametrize("readout", ["mean", "abmilp"])
@pytest.mark.parametrize("family", MODELS)
def test_layers_learn_at_the_published_rates(family, readout):
    model = made(family, readout=readout)
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    shares = {id(weight): group["lr_scale"] for group in groups for weight in group["params"]}
    seen = set()
    for name, weight in model.named_parameters():
        inside, ours = name.removeprefix("encoder."), not name.startswith("encoder.")
        if family in ("vit", "beit"):
            layer, last = (4 if ours else published_vit(inside, 3)), 4
        else:
            layer, last = (11 if ours else published_swin(inside, SWIN["depths"])), 11
        assert shares[id(weight)] == pytest.approx(0.5 ** (last - layer), rel=1e-12), name
        seen.add(layer)
    assert seen == set(range(last + 1))


def test_where_timm_groups_otherwise_the_published_layer_is_taken():
    swin, vit = made("swin"), made("vit", readout="cls")
    for model, name, timms, published in (
        (swin, "layers.1.downsample.reduction.weight", 3, 2),  # timm: with the first block of the stage
        (swin, "norm.weight", 10, 11),  # timm: with the last block
        (vit, "norm.weight", 3, 4),
    ):
        of_timm = timm.models.group_parameters(model.encoder, model.encoder.group_matcher(), reverse=True)
        assert (of_timm[name], model.layer_ids()[f"encoder.{name}"]) == (timms, published)
    shared = made("beit", use_rel_pos_bias=False, use_shared_rel_pos_bias=True)
    table = "rel_pos_bias.relative_position_bias_table"
    of_timm = timm.models.group_parameters(shared.encoder, shared.encoder.group_matcher(), reverse=True)
    assert (of_timm[table], shared.layer_ids()[f"encoder.{table}"]) == (0, 4)


@pytest.mark.parametrize("family", MODELS)
def test_what_is_not_decayed_is_as_published(family):
    model = made(family)
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    decayed = {id(weight) for group in groups if group["weight_decay"] for weight in group["params"]}
    keywords = ("cls_token", "pos_embed", "relative_position_bias_table", "cpb_mlp", "logit_scale")
    for name, weight in model.named_parameters():
        plain = weight.ndim > 1 and not any(word in name for word in keywords)
        assert (id(weight) in decayed) == plain, name


@pytest.mark.parametrize("readout", ["mean", "cls"])
@pytest.mark.parametrize("family", MODELS)
def test_timm_loads_the_model_and_gives_its_logits(family, readout, tmp_path):
    if readout == "cls" and family.startswith("swin"):
        with pytest.raises(ValueError, match="readout 'cls' needs a .cls. token"):
            made(family, readout=readout)
        return
    model = made(family, readout=readout, mean=[0.3], std=[0.2]).eval()
    torch.nn.init.normal_(model.head.weight)
    torch.save({"model": model.timm_state_dict()}, tmp_path / "final.pth")
    arguments = model.timm_arguments()
    ours = timm.create_model(arguments.pop("model_name"), **arguments, checkpoint_path=tmp_path / "final.pth").eval()
    side = model.encoder.patch_embed.img_size[0]
    images = torch.rand(3, 1, side, side)
    with torch.no_grad():
        logits = model(images, targets=torch.zeros(3, dtype=torch.int64)).logits
        torch.testing.assert_close(ours((images - 0.3) / 0.2), logits, rtol=2e-4, atol=2e-4)


def test_encoders_are_copied_whole_and_resampled():
    torch.manual_seed(1)
    source = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, in_chans=1, num_classes=0, **VIT)
    model = made("vit")
    report = model.start_from(source)
    assert report.resized == ("pos_embed: 8 x 8 to 4 x 4 patches",) and report.left == ("norm.weight", "norm.bias")
    assert torch.equal(model.encoder.blocks[2].mlp.fc1.weight, source.blocks[2].mlp.fc1.weight)
    source = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, in_chans=1, **{**VIT, "depth": 2})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="in the model but not in the checkpoint"):
        model.start_from(source)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("readout", ["mean", "abmilp", "ep"])
def test_first_weights_of_the_classifier(readout):
    name, arguments = MODELS["vit"]
    for given, deviation in (({}, 0.02), ({"head_std": 2e-5}, 2e-5)):
        model = Finetuned.from_timm(name, num_classes=1000, in_chans=1, readout=readout, **arguments, **given)
        model.start_from(create_masked_encoder(name, in_chans=1, **arguments))
        assert model.head.weight.std().item() == pytest.approx(deviation, rel=0.1)
        assert not model.head.bias.any()
    for deviation in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="head_std must be a number above 0, got"):
            made("vit", head_std=deviation)


def test_a_shared_table_goes_into_every_block_and_windows_are_resized():
    torch.manual_seed(1)
    options = {**BEIT, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
    source = create_masked_encoder("beit_base_patch16_224", img_size=16, patch_size=4, in_chans=1, **options)
    torch.nn.init.normal_(source.rel_pos_bias.relative_position_bias_table)
    model = made("beit")
    model.start_from(source)
    for block in model.encoder.blocks:
        table = source.rel_pos_bias.relative_position_bias_table
        assert torch.equal(block.attn.relative_position_bias_table, table)
    larger = made("beit", img_size=24)
    assert any("4 x 4 to 6 x 6 tokens" in told for told in larger.start_from(source).resized)
    name, arguments = MODELS["swin"]
    source = timm.create_model(name, **{**arguments, "window_size": 4, "img_size": 128}, in_chans=1, num_classes=0)
    report = made("swin", window_size=3, img_size=96).start_from(source)
    assert "layers.0.blocks.0.attn.relative_position_bias_table: 4 x 4 to 3 x 3 tokens" in report.resized
    assert "norm.weight" in report.loaded


def test_coordinates_of_swin_v2_stay_scaled_by_the_former_windows():
    name, arguments = MODELS["swinv2"]
    source = timm.create_model(name, **{**arguments, "window_size": 4, "img_size": 128}, in_chans=1, num_classes=0)
    model = made("swinv2", window_size=3, img_size=96)
    model.start_from(source)
    again = Finetuned.from_config(model.config)
    for one, other in zip(model.blocks, again.blocks, strict=True):
        assert one.attn.pretrained_window_size == other.attn.pretrained_window_size == (4, 4)
        assert torch.equal(one.attn.relative_coords_table, other.attn.relative_coords_table)


def test_frozen_layers_are_those_below():
    model = made("swin")
    model.freeze(3)
    frozen = {name.removeprefix("encoder.") for name, weight in model.named_parameters() if not weight.requires_grad}
    assert {name.rpartition(".norm1")[0] for name in frozen if ".norm1.weight" in name} == {
        "layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0",
    }  # fmt: skip
    assert "patch_embed.proj.weight" in frozen and "layers.1.downsample.norm.weight" in frozen
    with pytest.raises(ValueError, match="freeze must be 0 to 10"):
        model.freeze(11)
    untouched = made("swin")
    untouched.freeze(0)
    assert all(weight.requires_grad for weight in untouched.parameters())


def test_the_average_is_what_is_evaluated_and_saved():
    model = made("vit", ema=0.9)
    plain = made("vit")
    images, targets = torch.rand(4, 1, 16, 16), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        for weight in [*model.encoder.parameters(), *model.head.parameters()]:
            weight.add_(1.0)
    before = model.timm_state_dict()["head.weight"].clone()
    assert torch.equal(before, plain.head.weight)
    model.eval(), plain.eval()
    assert torch.equal(model(images, targets=targets).logits, plain(images, targets=targets).logits)
    model.follow(step=10)  # decay of a simple average at first: 1 - (1 + 8) ** -2/3
    kept = 1 - 10 ** (-2 / 3)
    torch.testing.assert_close(model.timm_state_dict()["head.weight"], before + (1 - kept))
    assert not any(weight.requires_grad for weight in model.average.parameters())


@pytest.mark.parametrize("readout", ["attn-mn", "attn-lcte", "topk"])
def test_readouts_by_the_attention_of_the_last_block(readout):
    model, images = made("vit", readout=readout, drop_path_rate=0.0), torch.rand(2, 1, 16, 16)
    torch.nn.init.normal_(model.head.weight)
    out = model(images, targets=torch.tensor([0, 1]))
    block = model.encoder.blocks[-1].attn
    seen = []
    handle = block.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    tokens = model.encode(images)
    handle.remove()
    q, k, _ = block.qkv(seen[0]).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    attention = (q[:, :, :1] @ k.transpose(-2, -1) * 8**-0.5).softmax(-1)[:, :, 0]
    torch.testing.assert_close(out.logits, model.head(model.pooling(tokens, cls_attention=attention)))
    out.loss.backward()
    assert all(weight.grad is not None for weight in block.qkv.parameters())
    with pytest.raises(ValueError, match="head statistics are not recorded with readout"):
        model(images, targets=torch.tensor([0, 1]), head_stats=("entropy",))
    with pytest.raises(ValueError, match="needs a .cls. token"):
        made("swin", readout=readout)


def test_readouts_that_cannot_be_are_refused():
    for readout, message in {
        "nothing": "unknown pooling 'nothing'",
        "abmilp:depth=0": "depth",
    }.items():
        with pytest.raises(ValueError, match=message):
            made("vit", readout=readout)
    with pytest.raises(ValueError, match="ema must be at least 0 and below 1, got 1"):
        made("vit", ema=1.0)
    smoothed, plain = made("vit").train(), made("vit", label_smoothing=0.0)
    images, targets = torch.rand(2, 1, 16, 16), torch.tensor([0, 1])
    torch.nn.init.normal_(smoothed.head.weight)
    plain.load_state_dict(smoothed.state_dict())
    assert smoothed(images, targets=targets).loss != plain(images, targets=targets).loss
    assert smoothed.eval()(images, targets=targets).loss == plain.eval()(images, targets=targets).loss
