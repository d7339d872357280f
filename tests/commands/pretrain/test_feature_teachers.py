"""Teachers of every kind and precision that ``pretrain --target features:MODEL`` and ``--target ema`` take."""

import functools
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.commands.pretrain.features import FeatureReader, FeatureTeacher, load_teacher, load_teachers
from mimkernels.commands.pretrain.masking import Masking
from mimkernels.commands.pretrain.run import Run, pretrain
from mimkernels.engine.encoder import FrozenEncoder
from mimkernels.models import SimMIM
from mimkernels.models.build import build_model
from mimkernels.models.targets import parse_target
from tests.commands.pretrain.test_features import DENSE
from tests.commands.pretrain.test_run import losses, stop_after

VIT = "vit_tiny_patch16_224:pretrained=false,patch_size=8,embed_dim=24,depth=3,num_heads=2"
SWIN = (
    "swin_tiny_patch4_window7_224:pretrained=false,embed_dim=8,depths=[1,2],num_heads=[1,2],window_size=2,patch_size=2"
)
# Mean and deviation of the pixels of timm's vit_tiny_patch16_224, and of its swin_tiny and others.
HALF, IMAGENET = ([0.5] * 3, [0.5] * 3), ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def digits(batch=3):
    return torch.randint(256, (batch, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def teacher_of(config, **options) -> FeatureTeacher:
    reader = load_teacher(config, config.target)
    if reader is not None:
        config = replace(config, target_dim=reader.dim)
    return FeatureTeacher(config, build_model(config.to_dict()), config.target, config.target_dim, reader, **options)


def as_seen(images, statistics):
    """Normalised pixels as an encoder of three channels takes them."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    return (images.expand(-1, 3, -1, -1) / 255 - mean) / std


def test_a_timm_name_of_other_patches_teaches(tiny):
    config = tiny(**DENSE, target=f"features:{VIT}")
    teacher = teacher_of(config)
    model: nn.Module = teacher.encoder.model
    assert (teacher.encoder.img_size, teacher.reader.grid, teacher.grid) == (16, (2, 2), (4, 4))
    kwargs = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "img_size": 16, "num_classes": 0}
    plain = timm.create_model("vit_tiny_patch16_224", **kwargs).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        tokens = plain.forward_features(as_seen(digits(), HALF))[:, 1:]
    maps = F.interpolate(tokens.transpose(1, 2).unflatten(2, (2, 2)), (4, 4), mode="bilinear")
    torch.testing.assert_close(teacher.features(digits()), maps.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)
    assert teacher.told.endswith("resampled from 2 x 2 tokens") and "with random weights" in teacher.told
    # Weights that nobody has trained are the same in every process and whenever a run goes on.
    torch.manual_seed(7)
    assert (
        load_teacher(config, config.target).encoder.fingerprint() == teacher.encoder.fingerprint() == teacher.identity
    )


def test_a_teacher_of_several_targets_is_loaded_once(tiny):
    target = f"features:{VIT},layer=0 + 0.5*features:{VIT},layer=2 + features:{VIT},img_size=32"
    one, two, larger = load_teachers(tiny(**DENSE, target=target))
    assert one.encoder is two.encoder and larger.encoder is not one.encoder
    assert (one.numbers, two.numbers, larger.encoder.img_size) == ([0], [2], 32)


def test_a_teacher_sees_images_of_the_size_that_the_target_says(tiny):
    teacher = teacher_of(tiny(**DENSE, target=f"features:{VIT},img_size=32"))
    assert (teacher.encoder.img_size, teacher.reader.grid) == (32, (4, 4))
    seen = []
    teacher.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    teacher.features(digits())
    larger = F.interpolate(digits().float().expand(-1, 3, -1, -1), (32, 32), mode="bilinear", antialias=True)
    assert torch.equal(seen[0], larger)


def test_a_swin_teaches_its_last_stage_or_a_block_of_another(tiny):
    teacher = teacher_of(tiny(**DENSE, target=f"features:{SWIN}"))
    assert (teacher.reader.grid, teacher.reader.dim) == ((4, 4), 16)
    model = teacher.encoder.model
    outputs = []
    for stage in model.layers:
        for block in stage.blocks:
            block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        last = model.forward_features(as_seen(digits(), IMAGENET))
    torch.testing.assert_close(teacher.features(digits()), last.flatten(1, 2))
    first, second, third = (output.flatten(1, 2) for output in outputs[:3])
    earlier = teacher_of(tiny(**DENSE, target=f"features:{SWIN},layer=0"))
    assert (earlier.reader.grid, earlier.reader.dim) == ((8, 8), 8)
    halved = F.interpolate(first.transpose(1, 2).unflatten(2, (8, 8)), (4, 4), mode="bilinear")
    torch.testing.assert_close(earlier.features(digits()), halved.flatten(2).transpose(1, 2))
    # A mean is over blocks of one stage.
    mean = teacher_of(tiny(**DENSE, target=f"features:{SWIN},layers=10"))
    wanted = (F.layer_norm(second, (16,)) + F.layer_norm(third, (16,))) / 2
    torch.testing.assert_close(mean.features(digits()), wanted, rtol=1e-4, atol=1e-5)
    assert "mean of the last 2 blocks, each normalised" in mean.told
    with pytest.raises(ValueError, match="wants block 3, swin_tiny.* has 3 blocks, 0 to 2"):
        load_teacher(tiny(**DENSE), f"features:{SWIN},layer=3")


def test_the_average_of_a_swin_teaches_itself(tiny):
    kwargs = {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 2}
    swin = {**DENSE, "model": "swin_tiny_patch4_window7_224", "model_kwargs": kwargs, "patch_size": 2}
    teacher = teacher_of(tiny(**swin, target="ema"))
    assert teacher.features(digits()).shape == (3, 16, 16) and "MLPs of the last 2 blocks" in teacher.told
    with pytest.raises(ValueError, match="have 8 values, the model predicts 16: give --target-dim 8"):
        teacher_of(tiny(**swin, target="ema:layer=0,layers=1"))


def test_registers_of_a_checkpoint_are_left_out(tiny, tmp_path):
    torch.manual_seed(0)
    kwargs = {"patch_size": 4, "embed_dim": 64, "depth": 1, "num_heads": 1, "reg_tokens": 3, "num_classes": 0}
    plain = timm.create_model("vit_tiny_patch16_224", img_size=16, **kwargs).eval()
    torch.save(plain.state_dict(), tmp_path / "teacher.pth")
    target = f"features:{tmp_path / 'teacher.pth'}:arch=vit_tiny_patch16_224,embed_dim=64,depth=1,num_heads=1"
    teacher = teacher_of(tiny(**DENSE, target=target))
    assert teacher.encoder.num_prefix == 4
    with torch.no_grad():
        tokens = plain.forward_features(as_seen(digits(), IMAGENET))
    torch.testing.assert_close(teacher.features(digits()), tokens[:, 4:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init_values", ["0.1", "null"])
def test_what_the_mlps_add_is_read(tiny, init_values):
    """As data2vec: of the last blocks, behind LayerScale."""
    teacher = teacher_of(tiny(**DENSE, target=f"features:{VIT},init_values={init_values},layers=2,part=mlp"))
    added, model = [], teacher.encoder.model
    for block in model.blocks[1:]:
        block.norm2.register_forward_hook(
            lambda module, inputs, output, block=block: added.append(block.ls2(block.mlp(output)))
        )
    with torch.no_grad():
        model.forward_features(as_seen(digits(), HALF))
    assert len(added) == 2
    mean = sum(F.layer_norm(each[:, 1:], (24,)) for each in added) / 2
    maps = F.interpolate(mean.transpose(1, 2).unflatten(2, (2, 2)), (4, 4), mode="bilinear")
    torch.testing.assert_close(teacher.features(digits()), maps.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)
    assert parse_target("ema").features.part == "mlp" and parse_target("features:x").features.part == "block"


def test_in_bf16_features_are_bf16_and_near(tiny):
    config = tiny(**DENSE, target=f"features:{VIT}")
    exact = teacher_of(config).features(digits())
    near = teacher_of(config, autocast=functools.partial(torch.autocast, "cpu", torch.bfloat16)).features(digits())
    assert exact.dtype == torch.float32 and near.dtype == torch.bfloat16
    difference = (near.float() - exact).norm() / exact.norm()
    assert 2**-12 < difference < 2**-6  # computed in bf16, not only rounded


def test_in_fp16_features_keep_a_range_that_fp16_has_not(tiny):
    config = tiny(**DENSE, target=f"features:{VIT},layer=2,norm=none,loss=cosine")
    teacher = teacher_of(config, autocast=functools.partial(torch.autocast, "cpu", torch.float16))
    with torch.no_grad():
        teacher.encoder.model.blocks[0].mlp.fc2.bias[0] = 6e4
        teacher.encoder.model.blocks[1].mlp.fc2.bias[0] = 6e4
    features = teacher.features(digits())
    assert features.dtype == torch.float32 and features.isfinite().all() and features.max() > 1e5


def test_scaled_gradients_of_fp16_are_those_of_fp32(tiny):
    config = tiny(**DENSE, target=f"features:{VIT}", target_dim=24)
    torch.manual_seed(0)
    model = build_model(config.to_dict())
    autocast = functools.partial(torch.autocast, "cpu", torch.float16)
    gradients = []
    for precision in (functools.partial(torch.autocast, "cpu", enabled=False), autocast):
        teacher = FeatureTeacher(config, model, config.target, 24, load_teacher(config, config.target), precision)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=precision is autocast)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        optimizer.zero_grad()
        with precision():
            loss = model(digits(), seed=0, offset=1, **teacher.arguments(digits(), None)).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    assert gradients[0].norm() > 0 and (gradients[1] - gradients[0]).norm() < 0.02 * gradients[0].norm()


def test_validation_asks_the_teacher_in_the_precision_of_training(tiny, monkeypatch):
    seen = set()
    forward = SimMIM.forward

    def recorded(self, images, **arguments):
        seen.add((self.training, arguments["features"].dtype))
        return forward(self, images, **arguments)

    monkeypatch.setattr(SimMIM, "forward", recorded)
    run = Run(tiny(**{**DENSE, "batch_size": 1500, "pictures": 0}, target=f"features:{VIT}", precision="bf16"))
    with run._held:
        images = digits()
        run.model.eval()
        run.validation.sums(lambda images, arguments: (run.model(images, **arguments).loss, {}), images.device)
    assert seen == {(False, torch.bfloat16)}


def test_guided_masks_ask_their_teacher_in_the_precision_of_training(tiny):
    config = tiny(masking="attention_guided", batch_size=4)
    entered = []

    def autocast():
        entered.append(True)
        return torch.autocast("cpu", torch.bfloat16)

    masking = Masking(config, build_model(config.to_dict()), autocast)
    masks = masking.arguments(digits(), 0)["mask"]
    assert entered and masks.dtype == torch.bool and masks.shape == (3, 4, 4)


def test_a_compiled_student_has_the_losses_of_an_eager_one(tiny):
    config = tiny(**DENSE, target=f"features:{VIT}", masking="block", mask_ratio=0.4)
    teacher = teacher_of(config)
    model = build_model({**config.to_dict(), "target_dim": 24})
    masking = Masking(config, model)

    def results(offset):
        given = masking.arguments(digits(), offset)
        return model(digits(), **given, **teacher.arguments(digits(), given["mask"])).loss

    eager = [results(offset).item() for offset in range(2)]
    model.compile(backend="eager")
    assert [results(offset).item() for offset in range(2)] == pytest.approx(eager, rel=1e-5)


def test_a_run_with_a_teacher_goes_on_bit_for_bit_and_with_that_one_alone(tiny, tmp_path, monkeypatch):
    settings = {**DENSE, "pictures": 0, "batch_size": 500, "target": f"features:{VIT}"}
    whole = pretrain(tiny(**settings, output=str(tmp_path / "whole"))).output
    part = tiny(**settings, output=str(tmp_path / "part"))
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        assert pretrain(part).stopped_by
    with monkeypatch.context() as patch:
        patch.setattr(FrozenEncoder, "fingerprint", lambda self: "another")
        with pytest.raises(ValueError, match="target's teacher is not that of the checkpoint: [0-9a-f]{32} .* another"):
            pretrain(part, resume="auto")
    pretrain(part, resume="auto")
    assert losses(tmp_path / "part") == losses(whole)


def test_a_checkpoint_alone_fetches_no_teacher():
    saved = PretrainConfig(method="simmim", target="features:hf-hub:someone/model").to_dict()
    with pytest.raises(ValueError, match="names a teacher that is fetched, target 'features:hf-hub:someone/model'"):
        PretrainConfig.continued(saved, {"epochs": 5})
    again = PretrainConfig.continued(saved, {"target": saved["target"]})
    assert again.target == saved["target"]
    with pytest.raises(ValueError, match="teacher 'local-dir:x': give --teacher again"):
        PretrainConfig.continued(PretrainConfig(teacher="local-dir:x").to_dict(), {})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("checkpoint_path=evil.pth", "an option must be .* or an argument of the timm model, got 'checkpoint_path"),
        ("pretrained=maybe", "got 'pretrained=maybe'"),
        ("img_size=0", "img_size must be at least 1, got 0"),
        ("depth=100000", "'depth' must be a whole number up to"),
        ("part=head", r"part=block\|mlp, arch=NAME.* got 'part=head'"),
    ],
)
def test_options_of_a_teacher_that_are_none_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        parse_target(f"features:vit_tiny_patch16_224:{option}")


def test_lists_are_options_and_a_moving_average_takes_no_model():
    target = parse_target("features:swin:depths=[1,2],num_heads=[1,2],loss=l1").features
    assert dict(target.model_kwargs) == {"depths": [1, 2], "num_heads": [1, 2]} and target.loss == "l1"
    with pytest.raises(ValueError, match="got 'pretrained=false'"):
        parse_target("ema:pretrained=false")


def test_a_model_without_such_mlps_is_refused():
    block = nn.Sequential(nn.Identity())
    encoder = FrozenEncoder.__new__(FrozenEncoder)
    nn.Module.__init__(encoder)
    encoder.model = nn.Module()
    encoder.model.blocks = nn.ModuleList([block])
    encoder.title = "mine"
    with pytest.raises(ValueError, match="part=mlp reads the MLPs of timm's blocks, Sequential has none to read"):
        FeatureReader(encoder, parse_target("features:x:part=mlp").features, "features:x:part=mlp")
