"""MoCo v3 against a plain statement of it around timm's models: same weights, same numbers."""

import copy
import math
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

from mimkernels.models import MoCoV3
from tests.models import mocov3_processes as processes
from tests.models.mocov3_processes import VIT, build, views

BEIT = {
    "name": "beit_base_patch16_224", "img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2,
}  # fmt: skip
SWIN = {
    "name": "swin_tiny_patch4_window7_224", "img_size": 16, "patch_size": 2, "embed_dim": 16, "depths": (2, 2),
    "num_heads": (2, 2), "window_size": 4,
}  # fmt: skip


def mlp(layers, width, hidden, out):
    parts = []
    for layer in range(layers):
        last = layer == layers - 1
        inner, outer = width if layer == 0 else hidden, out if last else hidden
        parts += [nn.Linear(inner, outer, bias=False), nn.BatchNorm1d(outer, affine=not last)]
        parts += [] if last else [nn.ReLU()]
    return nn.Sequential(*parts)


class Published(nn.Module):
    """The method as published, line by line, with its own names."""

    def __init__(self, name, **arguments):
        super().__init__()
        self.base_encoder = timm.create_model(name, num_classes=5, global_pool="token", **arguments)
        self.base_encoder.head = mlp(3, 16, 24, 8)
        self.momentum_encoder = copy.deepcopy(self.base_encoder)
        self.predictor = mlp(2, 8, 24, 8)

    def update(self, m):
        with torch.no_grad():
            pairs = zip(self.momentum_encoder.parameters(), self.base_encoder.parameters(), strict=True)
            for average, parameter in pairs:
                average.copy_(m * average + (1 - m) * parameter)

    def contrast(self, q, k, temperature):
        loss = 0.0
        for image, query in enumerate(q):
            similar = torch.stack([query @ key / query.norm() / key.norm() / temperature for key in k])
            loss = loss + similar.logsumexp(0) - similar[image]
        return 2 * temperature * loss / len(q)

    def forward(self, x1, x2, m, temperature):
        q1, q2 = self.predictor(self.base_encoder(x1)), self.predictor(self.base_encoder(x2))
        self.update(m)
        with torch.no_grad():
            k1, k2 = self.momentum_encoder(x1), self.momentum_encoder(x2)
        return self.contrast(q1, k2, temperature) + self.contrast(q2, k1, temperature)


@pytest.mark.parametrize(
    "changes", [{}, {"reg_tokens": 2}, {"stop_grad_conv1": False, "sincos_positions": False}], ids=str
)
def test_loss_and_every_gradient_are_those_of_the_published_method(changes):
    model = build(**changes).double()
    shape = {key: value for key, value in VIT.items() if key != "name"}
    plain = Published(
        VIT["name"], **shape, **{key: value for key, value in changes.items() if key == "reg_tokens"}
    ).double()
    plain.load_state_dict({name.removeprefix("module."): value for name, value in model.mocov3_state_dict().items()})
    x1, x2 = (view.double() for view in views())
    expected = plain(x1, x2, 0.9, 0.2)
    model.follow(0.9)
    out = model((x1, x2))
    torch.testing.assert_close(out.loss, expected, rtol=1e-10, atol=0)
    out.loss.backward()
    expected.backward()
    # Weights, averages and running statistics after the step, by their published names.
    state = model.mocov3_state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state[f"module.{name}"], value, rtol=1e-10, atol=1e-12, msg=name)
    frozen = () if changes.get("stop_grad_conv1", True) is False else ("patch_embed.proj.", "pos_embed")
    for name, parameter in model.named_parameters():
        if name.startswith("momentum_") or name.removeprefix("encoder.").startswith(frozen):
            assert parameter.grad is None and not parameter.requires_grad, name
            continue
        published = name.replace("projector.", "base_encoder.head.").replace("encoder.", "base_encoder.", 1)
        published = published.replace("base_base_", "base_")
        theirs = plain.get_parameter(published).grad
        torch.testing.assert_close(parameter.grad, theirs, rtol=1e-7, atol=1e-10, msg=name)


def test_the_average_moves_by_its_formula_and_keys_by_the_average_alone():
    model = build().double()
    x = tuple(view.double() for view in views())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.follow(0.75)
    for name, value in model.state_dict().items():
        if name.startswith("momentum_") and "running" not in name and "tracked" not in name:
            trained = before[name.removeprefix("momentum_")]
            torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * trained, rtol=1e-14, atol=1e-15)
        else:
            assert torch.equal(value, before[name]), name
    model.follow(0.0)
    assert torch.equal(model.momentum_projector[0].weight, model.projector[0].weight)
    model.eval()
    loss = model(x).loss
    with torch.no_grad():
        model.momentum_projector[0].weight.add_(torch.randn_like(model.projector[0].weight))
    assert model(x).loss != loss


def test_a_model_that_gives_all_images_the_same_has_the_loss_of_chance_and_no_spread():
    model = build().eval()
    image = torch.randn(1, 3, 16, 16).expand(6, -1, -1, -1)
    out = model((image, image))
    assert out.loss.item() == pytest.approx(4 * 0.2 * math.log(6), rel=1e-5)
    assert out.metrics["feature_std"] == pytest.approx(0, abs=1e-5)
    assert model(views()).metrics["feature_std"] > 0.05


def test_a_fresh_vit_is_initialised_as_published():
    model = MoCoV3.from_timm(**{**VIT, "embed_dim": 64}, mlp_dim=24, out_dim=8)
    encoder = model.encoder
    bound = math.sqrt(6 / (64 + 64))
    assert 0.98 * bound < encoder.blocks[0].attn.qkv.weight.abs().max() <= bound
    bound = math.sqrt(6 / (3 * 8 * 8 + 64))
    assert 0.98 * bound < encoder.patch_embed.proj.weight.abs().max() <= bound
    assert encoder.cls_token.std() < 1e-5 and not encoder.blocks[0].mlp.fc1.bias.any()
    position = encoder.pos_embed[0, 1 + 1 * 2 + 0]  # row 1, column 0
    angles = 10000.0 ** (-torch.arange(16) / 16)
    torch.testing.assert_close(position, torch.cat((angles.sin(), angles.cos(), torch.zeros(16), torch.ones(16))))
    assert not encoder.pos_embed[0, 0].any()
    for ours, theirs in zip(model.momentum_encoder.parameters(), encoder.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert [type(part).__name__ for part in model.predictor] == [
        "Linear",
        "BatchNorm1d",
        "ReLU",
        "Linear",
        "BatchNorm1d",
    ]
    assert len(model.projector) == 8 and not model.projector[-1].affine and model.projector[0].bias is None


@pytest.mark.parametrize("arguments", [BEIT, SWIN], ids=lambda arguments: arguments["name"])
def test_other_encoders_train_every_weight(arguments):
    model = MoCoV3.from_timm(**arguments, mlp_dim=24, out_dim=8)
    out = model(views(), head_stats=("entropy",))
    assert len(out.head_stats) == len(model.blocks) // 2
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), name


def test_heads_are_recorded_over_all_tokens_of_both_views():
    out = build()(views(), head_stats=("entropy", "distance"))
    assert [layer["entropy"].shape for layer in out.head_stats] == [(12, 2, 5)] * 2


@pytest.mark.parametrize("content", [lambda state: {"state_dict": state, "epoch": 3}, lambda state: {"model": state}])
def test_weights_come_back_by_their_published_names(tmp_path, content):
    model = build()
    torch.save(content(model.mocov3_state_dict()), tmp_path / "model.pth")
    other = MoCoV3.from_config(model.config)
    report = other.load_checkpoint(tmp_path / "model.pth")
    assert not report.missing and "momentum_encoder.head.7.running_var" in report.loaded
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"predictor.3.weight: checkpoint \[8, 24\], model \[9, 24\]"):
        MoCoV3.from_config({**model.config, "out_dim": 9}).load_checkpoint(tmp_path / "model.pth")


def test_uint8_views_are_normalised_inside():
    statistics = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    model = build(**statistics).eval()
    pixels = tuple(torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8) for _ in range(2))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics.values())
    plain = build(mean=None, std=None).eval()
    wanted = plain(tuple((view.float() / 255 - mean) / std for view in pixels)).loss
    torch.testing.assert_close(model(pixels).loss, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (torch.zeros(2, 3, 16, 16), TypeError, "views must be a tuple of two batches of images, got Tensor"),
        ((torch.zeros(2, 3, 16, 16),), ValueError, "views must be two batches of the same images, got 1"),
        ((torch.zeros(2, 3, 16, 16), torch.zeros(3, 3, 16, 16)), ValueError, r"both views .*got \[2, .* \[3, "),
        ((torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 32, 32)), ValueError, r"takes images .*got \[2, 3, 32, 32\]"),
    ],
)
def test_views_that_do_not_fit_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        build()(given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"temperature": 0.0}, "temperature must be positive"), ({"out_dim": 0}, "out_dim must be at least 1, got 0")],
)
def test_arguments_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_two_processes_with_half_the_images_each_train_as_one(tmp_path):
    store = f"file://{tmp_path}/store"
    arguments = [sys.executable, "-m", processes.__name__, store]
    started = [subprocess.Popen([*arguments, str(rank)]) for rank in (0, 1)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
