"""Supervised models against timm's own models with a head: same weights, same numbers."""

import pytest
import timm
import torch
import torch.nn.functional as F

from mimkernels.models import Supervised

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
MODELS = {
    "vit": ({"name": "vit_tiny_patch16_224", **VIT}, {"global_pool": "token"}),
    "vit, registers": ({"name": "vit_tiny_patch16_224", **VIT, "reg_tokens": 2}, {"global_pool": "token"}),
    "vit without [cls]": ({"name": "vit_tiny_patch16_224", **VIT, "class_token": False}, {"global_pool": "avg"}),
    "beit": (
        {"name": "beit_base_patch16_224", **VIT},
        {"global_pool": "token", "use_abs_pos_emb": False, "use_shared_rel_pos_bias": True, "use_rel_pos_bias": False,
         "init_values": 0.1},
    ),
    "swin": (
        {"name": "swin_tiny_patch4_window7_224", "img_size": 32, "patch_size": 4, "embed_dim": 16, "depths": (2, 2),
         "num_heads": (2, 4), "window_size": 4},
        {"global_pool": "avg"},
    ),
}  # fmt: skip


def build(model, **changes):
    arguments, timms = MODELS[model]
    torch.manual_seed(0)
    made = Supervised.from_timm(**{**arguments, "num_classes": 5, **changes})
    with torch.no_grad():  # zeros and ones of a fresh model would hide swapped or forgotten parameters
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    name, given = arguments["name"], {key: value for key, value in arguments.items() if key != "name"}
    plain = timm.create_model(name, num_classes=5, **{**given, **timms})
    if "without" in model:  # timm would put the last norm behind the pooling
        plain.norm, plain.fc_norm = torch.nn.LayerNorm(48, eps=1e-6), torch.nn.Identity()
    return made.eval(), plain.eval()


def timms_name(name, model):
    return name.replace("head.", "head.fc.") if model == "swin" else name


@pytest.mark.parametrize("model", MODELS)
def test_loss_and_gradients_are_those_of_timm(model):
    made, plain = build(model)
    plain.load_state_dict({timms_name(name, model): value for name, value in made.timm_state_dict().items()})
    images, targets = torch.randn(3, 3, 32, 32), torch.tensor([4, 0, 2])
    out = made(images, targets=targets)
    logits = plain(images)
    torch.testing.assert_close(out.logits, logits, rtol=1e-4, atol=1e-5)
    smooth = F.one_hot(targets, 5) * 0.9 + 0.1 / 5
    expected = -(smooth * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(out.loss, expected)
    assert out.metrics["accuracy"] == (logits.argmax(1) == targets).float().mean()
    out.loss.backward()
    expected.backward()
    wanted = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in made.named_parameters():
        other = wanted.pop(timms_name(name.removeprefix("encoder."), model))
        torch.testing.assert_close(parameter.grad, other, rtol=1e-3, atol=1e-5, msg=name)
    assert not wanted


def test_shares_of_classes_are_targets_too():
    made, _ = build("vit", label_smoothing=0.0)
    images = torch.randn(2, 3, 32, 32)
    shares = torch.tensor([[0.0, 0.25, 0.75, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]])
    out = made(images, targets=shares)
    torch.testing.assert_close(out.loss, -(shares * out.logits.log_softmax(1)).sum(1).mean())
    assert out.metrics["accuracy"] == (out.logits.argmax(1) == torch.tensor([2, 0])).float().mean()


def test_heads_are_recorded_over_all_tokens():
    made, _ = build("vit")
    out = made(torch.randn(2, 3, 32, 32), targets=torch.tensor([1, 2]), head_stats=("entropy", "distance"))
    assert [layer["entropy"].shape for layer in out.head_stats] == [(2, 3, 17)] * 2


def test_weights_come_back_by_timms_names(tmp_path):
    made, _ = build("vit")
    torch.save({"model": made.timm_state_dict()}, tmp_path / "model.pth")
    other = Supervised.from_config(made.config)
    report = other.load_checkpoint(tmp_path / "model.pth")
    assert not report.missing and "head.weight" in report.loaded
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in made.state_dict().items())
    with pytest.raises(ValueError, match=r"head.weight: checkpoint \[5, 48\], model \[7, 48\]"):
        Supervised.from_config({**made.config, "num_classes": 7}).load_checkpoint(tmp_path / "model.pth")


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ([1, 2], TypeError, "targets must be a torch.Tensor, got list"),
        (torch.tensor([1]), ValueError, r"targets must be \[2\] int64 or \[2, 5\] floating point, got \[1\]"),
        (torch.rand(2, 4), ValueError, r"targets must be .*got \[2, 4\] torch.float32"),
        (torch.tensor([1, 5]), IndexError, "targets must be 0 to 4, got 1 to 5"),
    ],
)
def test_targets_that_do_not_fit_are_refused(targets, error, message):
    made, _ = build("vit")
    with pytest.raises(error, match=message):
        made(torch.randn(2, 3, 32, 32), targets=targets)
