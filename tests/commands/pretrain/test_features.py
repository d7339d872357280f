"""``pretrain --target features:MODEL`` and ``--target ema``: a teacher's features take the place of pixels."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from mimkernels.commands.pretrain.run import pretrain
from mimkernels.engine.checkpoint import load
from mimkernels.models import MAE, SimMIM
from mimkernels.models.build import build_model
from tests.commands.pretrain.test_run import assert_same_bits, losses, stop_after

QUICK = {"batch_size": 750, "val_images": 8, "val_masks": 1, "pictures": 1}
OTHERS = {"decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16}  # the defaults, of other methods
DENSE = {**QUICK, **OTHERS, "method": "simmim", "mask_unit": 4}


@pytest.fixture(scope="module")
def teacher(tiny_settings, tmp_path_factory):
    """A run whose encoder is wider than the student's."""
    from mimkernels.commands.pretrain.config import PretrainConfig

    output = tmp_path_factory.mktemp("runs") / "teacher"
    model = {"embed_dim": 24, "depth": 3, "num_heads": 2}
    pretrain(PretrainConfig(**{**tiny_settings, **QUICK, "model_kwargs": model, "output": str(output)}))
    return output


@pytest.fixture
def seen(monkeypatch):
    """Images and arguments of every call of a model in training."""
    calls = []
    for model in (MAE, SimMIM):

        def recorded(self, images, forward=model.forward, **arguments):
            if self.training:
                calls.append((images, arguments))
            return forward(self, images, **arguments)

        monkeypatch.setattr(model, "forward", recorded)
    return calls


def block_outputs(folder, images):
    """Patch tokens of all blocks of a run's encoder and, last, what it gives."""
    content = load(folder / "checkpoints" / "final.pt")
    model = build_model(content["config"])
    model.load_state_dict(content["model"])
    encoder, outputs = model.encoder.eval(), []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (model.mean, model.std))
    with torch.no_grad():
        outputs.append(encoder.forward_features((images / 255 - mean) / std))
    return [output[:, 1:] for output in outputs]


def test_a_run_teaches_simmim(tiny, teacher, seen, tmp_path):
    target = f"features:{teacher}:beta=0.5"
    result = pretrain(tiny(**DENSE, target=target, output=str(tmp_path / "student")))
    images, arguments = seen[0]
    torch.testing.assert_close(arguments["features"], block_outputs(teacher, images)[-1])
    assert result.content.run_facts["Target"] == (
        f"features of MAE vit_tiny_patch16_224 (embed_dim 24, depth 3, num_heads 2) from "
        f"{teacher / 'checkpoints' / 'final.pt'}: last layer, LayerNorm without gain; smooth-l1 on masked tokens"
    )
    assert result.content.backends["masked_feature_loss"] and result.content.references.blind is None
    assert "Smooth L1 loss of the hidden tokens against the features" in result.report.read_text()
    final = load(result.output / "checkpoints" / "final.pt")
    assert final["config"]["target_dim"] == 24 and "target_teacher" not in final
    assert final["model"]["decoder.weight"].shape == (24, 16)
    student = build_model(final["config"])  # opens no teacher
    exported = torch.load(result.output / "simmim_checkpoint.pth")
    student.load_checkpoint(exported)
    assert_same_bits(dict(student.state_dict()), final["model"])


def test_blocks_of_another_grid_teach_mae(tiny, tiny_settings, teacher, seen, tmp_path):
    target = f"features:{teacher}:layer=1,layers=2,norm=instance,loss=mse"
    config = tiny(**QUICK, target=target, patch_size=8, decoder_dim=8, output=str(tmp_path / "student"))
    result = pretrain(config)
    images, arguments = seen[0]
    first, second = (F.layer_norm(x, x.shape[-1:]) for x in block_outputs(teacher, images)[:2])
    mean = (first + second) / 2
    mean = (mean - mean.mean(1, keepdim=True)) / (mean.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    coarse = F.avg_pool2d(mean.transpose(1, 2).unflatten(2, (4, 4)), 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(arguments["features"], coarse, atol=1e-5, rtol=1e-4)
    assert result.content.run_facts["Target"].endswith(
        "mean of blocks 0 to 1, each normalised, normalised over each image's tokens; mse on masked tokens, "
        "resampled from 4 x 4 tokens"
    )


def test_without_masks_all_tokens_are_compared(tiny, teacher, seen, tmp_path):
    target = f"features:{teacher}:tokens=all,loss=cosine"
    unmasked = {**DENSE, "val_masks": 4, "masking": "none"}
    result = pretrain(tiny(**unmasked, target=target, output=str(tmp_path / "student")))
    _, arguments = seen[0]
    assert not arguments["mask"].any() and "ids" not in arguments
    assert result.content.masked_share is None and "sees whole images" in result.content.lead


def test_the_moving_average_teaches(tiny, seen, tmp_path):
    config = tiny(**DENSE, target="ema", momentum=0.9, output=str(tmp_path / "run"))
    result = pretrain(config)
    torch.manual_seed(config.seed)
    first = build_model(config.to_dict())
    final = load(result.output / "checkpoints" / "final.pt")
    name = "blocks.0.attn.qkv.weight"
    between = (final["target_teacher"][name] - first.encoder.state_dict()[name]).norm()
    assert 0 < between < 0.2 * (final["model"][f"encoder.{name}"] - first.encoder.state_dict()[name]).norm()
    assert "moving average: MLP of block 0, normalised, LayerNorm without gain" in result.content.run_facts["Target"]


def test_an_interrupted_run_continues_bit_for_bit(tiny, tmp_path, monkeypatch):
    settings = {**DENSE, "epochs": 2, "momentum": 0.5, "target": "ema:layers=1", "masking": "block"}
    whole = pretrain(tiny(**settings, output=str(tmp_path / "whole"))).output
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        part = tiny(**settings, output=str(tmp_path / "part"))
        assert pretrain(part).stopped_by
    pretrain(part, resume="auto")
    assert losses(whole) == losses(tmp_path / "part")
    one, other = (load(tmp_path / name / "checkpoints" / "final.pt") for name in ("whole", "part"))
    assert_same_bits(one["model"], other["model"])
    assert_same_bits(one["target_teacher"], other["target_teacher"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**DENSE, "target": "features:nothing.pth"}, "target 'features:nothing.pth': .*'nothing.pth' does not exist"),
        ({**DENSE, "target": "features:"}, "target must be pixels, .* got 'features:'"),
        ({**DENSE, "target": "ema:layer=3"}, "wants block 3, the encoder .* has 1 blocks"),
        ({**DENSE, "target": "ema:norm=l2"}, r"an option must be .*norm=ln\|instance\|none.* got 'norm=l2'"),
        ({**DENSE, "target": "ema", "loss": "mse"}, "loss is that of pixels, got 'mse' and target 'ema'"),
        ({**DENSE, "momentum": 0.9}, "momentum is that of target ema, got 0.9 and target 'pixels'"),
        ({**DENSE, "target_dim": 8}, "target_dim is the width of a teacher's features, got 8 and target 'pixels'"),
        ({**DENSE, "masking": "none"}, "masking none leaves no masked token to compare.* got 'pixels'"),
        ({**QUICK, "target": "ema:tokens=all", "masking": "none"}, "masking none is for methods whose encoder sees"),
        (
            {**QUICK, "target": "patch-norm"},
            "target of mae must be pixels, features:MODEL, ema or bootstrap, got",
        ),
        ({**QUICK, **OTHERS, "method": "mocov3", "target": "ema"}, "target is an option of MAE and SimMIM, got 'ema'"),
    ],
)
def test_what_cannot_be_a_target_is_refused(tiny, settings, message):
    config = tiny(**settings)
    with pytest.raises(ValueError, match=message):
        pretrain(config)
    assert not Path(config.output).exists()
