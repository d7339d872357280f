"""``pretrain --masking attention_guided``: patches with the most [cls] attention of a teacher are masked."""

import math
from pathlib import Path

import pytest
import torch

from mimkernels.commands.pretrain.run import pretrain
from mimkernels.commands.pretrain.teacher import Teacher
from mimkernels.engine.checkpoint import load
from mimkernels.engine.command import TrainingError
from mimkernels.models import MAE
from mimkernels.models.build import build_model
from tests.commands.pretrain.test_run import assert_same_bits, losses, stop_after

GUIDED = {"masking": "attention_guided", "batch_size": 500, "pictures": 1}


def cls_attention(model, images):
    """``[B, N]``: the last block's [cls] row without its own entry, mean over heads, from the whole matrix."""
    seen = []
    block = model.encoder.blocks[-1]
    handle = block.attn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (model.mean, model.std))
    with torch.no_grad():
        model.encoder.eval().forward_features((images / 255 - mean) / std)
    handle.remove()
    qkv = block.attn.qkv(seen[0]).unflatten(2, (3, block.attn.num_heads, -1))
    q, k = qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)
    rows = (q[:, :, :1] @ k.transpose(2, 3) * block.attn.scale).softmax(-1)
    return rows[:, :, 0, 1:].mean(1).detach()


@pytest.fixture
def seen(monkeypatch):
    """Images and masks of every call of the model in training."""
    calls = []
    forward = MAE.forward

    def recorded(self, images, **arguments):
        if self.training:
            calls.append((images, arguments.get("mask")))
        return forward(self, images, **arguments)

    monkeypatch.setattr(MAE, "forward", recorded)
    return calls


def assert_the_most_attended_are_masked(model, images, mask, count):
    scores, mask = cls_attention(model, images), mask.flatten(1)
    assert mask.sum(1).tolist() == [count] * len(mask)
    lowest_masked = scores.masked_fill(~mask, torch.inf).amin(1)
    highest_visible = scores.masked_fill(mask, -torch.inf).amax(1)
    assert (lowest_masked >= highest_visible - 1e-6).all()


def test_the_moving_average_chooses(tiny, seen):
    config = tiny(**GUIDED, mask_ratio=0.5)
    result = pretrain(config)
    torch.manual_seed(config.seed)
    first = build_model(config.to_dict())  # what the average begins with
    assert_the_most_attended_are_masked(first, *seen[0], count=8)
    assert result.content.masked_share == 0.5 and result.content.held_out_loss is not None
    assert "by the [cls] attention of the encoder's moving average" in result.content.run_facts["Masks"]
    final = load(result.output / "checkpoints" / "final.pt")
    assert final["teacher"].keys() == first.encoder.state_dict().keys()
    name = "blocks.0.attn.qkv.weight"
    between = (final["teacher"][name] - first.encoder.state_dict()[name]).norm()
    assert 0 < between < 0.02 * (final["model"][f"encoder.{name}"] - first.encoder.state_dict()[name]).norm()


def test_attention_that_is_no_number_ends_the_run_in_a_line(tiny, monkeypatch):
    patches = math.prod(build_model(tiny(**GUIDED).to_dict()).grid_size)
    monkeypatch.setattr(Teacher, "scores", lambda self, images: torch.full((len(images), patches), math.nan))
    with pytest.raises(TrainingError, match="scores that are numbers, got NaN .*: the attention of the enc"):
        pretrain(tiny(**GUIDED))


def test_another_run_chooses_and_stays_as_it_is(tiny, seen, tmp_path):
    pretrain(tiny(batch_size=500, output=str(tmp_path / "teacher"), pictures=0))
    seen.clear()
    config = tiny(**GUIDED, teacher=str(tmp_path / "teacher"), seed=3, output=str(tmp_path / "student"))
    result = pretrain(config)
    content = load(tmp_path / "teacher" / "checkpoints" / "final.pt")
    teacher = build_model(content["config"])
    teacher.load_state_dict(content["model"])
    for images, mask in seen:
        assert_the_most_attended_are_masked(teacher, images, mask, count=7)  # 0.4 of 16, rounded as MAE does
    assert "teacher" not in load(result.output / "checkpoints" / "final.pt")
    assert "by the [cls] attention of MAE vit_tiny" in result.content.run_facts["Masks"]


def test_the_average_moves_by_its_momentum(tiny):
    config = tiny(**GUIDED, teacher_momentum=0.75)
    model = build_model(config.to_dict())
    teacher = Teacher(config, model)
    before = [weight.clone() for weight in teacher.encoder.model.parameters()]
    with torch.no_grad():
        for weight in model.encoder.parameters():
            weight.add_(1.0)
    teacher.follow()
    for ours, old in zip(teacher.encoder.model.parameters(), before, strict=True):
        torch.testing.assert_close(ours, old + 0.25)


def test_an_interrupted_run_continues_with_the_same_masks(tiny, tmp_path, monkeypatch):
    settings = {**GUIDED, "epochs": 2, "teacher_momentum": 0.5}
    whole = pretrain(tiny(**settings, output=str(tmp_path / "whole"))).output
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        part = tiny(**settings, output=str(tmp_path / "part"))
        assert pretrain(part).stopped_by
    pretrain(part, resume="auto")
    assert losses(whole) == losses(tmp_path / "part")
    one, other = (load(tmp_path / name / "checkpoints" / "final.pt") for name in ("whole", "part"))
    assert_same_bits(one["model"], other["model"])
    assert_same_bits(one["teacher"], other["teacher"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"masking": "block", "teacher": "x"}, "for masking 'attention_guided', got teacher 'x'.* and masking 'block'"),
        ({"teacher_momentum": 0.9}, "for masking 'attention_guided', got .* masking 'random'"),
        ({**GUIDED, "teacher_momentum": 1.0}, "teacher_momentum must be at least 0 and below 1, got 1.0"),
        ({**GUIDED, "teacher": "nothing.pth"}, "'nothing.pth' does not exist"),
        ({**GUIDED, "teacher": "vit_tini"}, "neither a file.*close names"),
        ({**GUIDED, "model_kwargs": {"embed_dim": 16, "depth": 1, "num_heads": 2, "class_token": False}},
         r"follows the attention of a \[cls\] token, which the encoder vit_tiny_patch16_224 has not"),
    ],
)  # fmt: skip
def test_a_teacher_that_does_not_fit_is_refused(tiny, settings, message):
    config = tiny(**settings)
    with pytest.raises(ValueError, match=message):
        pretrain(config)
    assert not Path(config.output).exists()


def test_a_teacher_of_other_patches_is_refused_with_both_sides(tiny, tmp_path):
    pretrain(tiny(batch_size=1500, patch_size=8, output=str(tmp_path / "teacher"), pictures=0))
    with pytest.raises(ValueError, match=r"has patches \(2, 2\), the model \(4, 4\)"):
        pretrain(tiny(**GUIDED, teacher=str(tmp_path / "teacher"), output=str(tmp_path / "student")))
