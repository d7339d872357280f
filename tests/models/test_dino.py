"""DINO against a plain statement of the published algorithm around timm's model: loss, gradients, teacher, centre."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from mimkernels.models import DINO

VIT = {"img_size": 16, "in_chans": 1, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
HEAD = {"prototypes": 11, "mlp_dim": 20, "bottleneck_dim": 7}


def build(**changes):
    torch.manual_seed(0)
    made = DINO.from_timm("vit_tiny_patch16_224", **{**VIT, **HEAD, "drop_path_rate": 0.0, **changes})
    with torch.no_grad():  # a fresh model would hide swapped or forgotten parameters, and a teacher that is the student
        for name, parameter in made.named_parameters():
            if not name.endswith("weight_g"):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        made.center.normal_()
    return made


def views(batch=3, local=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    sizes = [16, 16, *[8] * local]
    return tuple(torch.randn(batch, 1, size, size, generator=generator) for size in sizes)


class Plain(nn.Module):
    """Encoder and head as published, under the published names; the encoder is timm's."""

    def __init__(self):
        super().__init__()
        kwargs = {"num_classes": 0, "global_pool": "token", "dynamic_img_size": True}
        self.backbone = timm.create_model("vit_tiny_patch16_224", **VIT, **kwargs)
        self.head = nn.Module()
        self.head.mlp = nn.Sequential(nn.Linear(24, 20), nn.GELU(), nn.Linear(20, 20), nn.GELU(), nn.Linear(20, 7))
        self.head.last_layer = nn.Module()
        self.head.last_layer.weight_g = nn.Parameter(torch.ones(11, 1))
        self.head.last_layer.weight_v = nn.Parameter(torch.ones(11, 7))

    def forward(self, view):
        x = self.head.mlp(self.backbone(view))
        x = x / x.norm(dim=1, keepdim=True)
        v, g = self.head.last_layer.weight_v, self.head.last_layer.weight_g
        return x @ (g * v / v.norm(dim=1, keepdim=True)).T


def plain_networks(made):
    student, teacher = Plain(), Plain()
    published = made.dino_state_dict()
    student.load_state_dict({name.removeprefix("module."): value for name, value in published["student"].items()})
    teacher.load_state_dict(published["teacher"])
    return student, teacher


def plain_loss(student, teacher, center, crops, student_temp=0.1, teacher_temp=0.04):
    """Loss and entropy of the teacher, view by view."""
    with torch.no_grad():
        targets = [F.softmax((teacher(crop) - center) / teacher_temp, dim=1) for crop in crops[:2]]
    terms = []
    for number, target in enumerate(targets):
        for other, crop in enumerate(crops):
            if other != number:
                log_prob = F.log_softmax(student(crop) / student_temp, dim=1)
                terms.append(-(target * log_prob).sum(1).mean())
    both = torch.cat(targets)
    return sum(terms) / len(terms), -(both * both.log().clamp(min=-1e3)).sum(1).mean()


@pytest.mark.parametrize(("local", "temp"), [(0, 0.04), (3, 0.07)])
def test_loss_and_gradients_are_those_of_a_plain_statement(local, temp):
    made = build()
    made.teacher_temp = temp
    student, teacher = plain_networks(made)
    out = made(views(local=local))
    expected, entropy = plain_loss(student, teacher, made.center, views(local=local), teacher_temp=temp)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.metrics["teacher_entropy"], entropy, rtol=1e-4, atol=1e-5)
    assert 0 < out.metrics["feature_std"] < 1.01
    out.loss.backward()
    expected.backward()
    wanted = {name: parameter.grad for name, parameter in student.named_parameters()}
    compared = 0
    for name, parameter in made.named_parameters():
        if name.startswith("teacher.") or name.endswith("weight_g"):
            assert parameter.grad is None and not parameter.requires_grad
            continue
        other = wanted[name.replace("encoder.", "backbone.", 1)]
        torch.testing.assert_close(parameter.grad, other, rtol=1e-3, atol=1e-5, msg=name)
        compared += 1
    assert compared == len(wanted) - 1


def test_local_views_of_several_sizes_count_alike():
    made = build()
    crops = (*views(local=1), torch.randn(3, 1, 12, 12), *views(local=1, seed=2)[2:])
    expected, _ = plain_loss(*plain_networks(made), made.center, crops)
    torch.testing.assert_close(made(crops).loss, expected)


def test_a_fresh_teacher_is_the_student():
    made = DINO.from_timm("vit_tiny_patch16_224", **VIT, **HEAD)
    published = made.dino_state_dict()
    for name, value in published["teacher"].items():
        assert torch.equal(published["student"][f"module.{name}"], value), name
        assert published["student"][f"module.{name}"].data_ptr() != value.data_ptr()
    assert not made.center.any() and torch.equal(made.head.last_layer.weight_g, torch.ones(11, 1))


def test_teacher_and_centre_follow_a_step():
    made = build(center_momentum=0.8)
    _, teacher = plain_networks(made)
    pieces = views(batch=3), views(batch=5, seed=2)  # two forward passes of one optimizer step
    center, before = made.center.clone(), copy.deepcopy(made.teacher.state_dict())
    for piece in pieces:
        made(piece)
    made.eval()(views(seed=3))  # moves nothing
    assert torch.equal(made.center, center)
    made.update_teacher(0.9)
    outputs = torch.cat([teacher(crop) for piece in pieces for crop in piece[:2]])
    torch.testing.assert_close(made.center, 0.8 * center + 0.2 * outputs.mean(0, keepdim=True))
    state = made.state_dict()
    for name, value in before.items():
        torch.testing.assert_close(state[f"teacher.{name}"], 0.9 * value + 0.1 * state[name], rtol=1e-6, atol=1e-7)
    center = made.center.clone()
    made.update_teacher(1.0)
    assert torch.equal(made.center, center)


def test_the_teacher_has_no_stochastic_depth():
    made = build(drop_path_rate=0.9).train()
    assert made.encoder.training and not made.teacher.encoder.training
    made(views())
    _, teacher = plain_networks(made)
    torch.testing.assert_close(made._sum, torch.cat([teacher(crop) for crop in views()[:2]]).sum(0, keepdim=True))


def test_a_collapsed_teacher_shows():
    made = build()
    with torch.no_grad():
        made.teacher.encoder.norm.weight.zero_()  # the same features for every image
        made.center.copy_(made.teacher.head(made.teacher.encoder.norm.bias[None]))
    metrics = made(views()).metrics
    assert metrics["teacher_entropy"] == pytest.approx(math.log(11), rel=1e-4)
    assert metrics["feature_std"] == pytest.approx(0, abs=1e-5)


def _half(rank, folder):
    """What one of two processes ends with that takes half of the images; also in a file."""
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        made = build()
        wrapped = nn.parallel.DistributedDataParallel(made)
        state = _step(made, wrapped, tuple(view.chunk(2)[rank] for view in views(batch=4)))
    finally:
        torch.distributed.destroy_process_group()
    torch.save(state, f"{folder}/{rank}.pth")
    return state


def _step(made, model, crops):
    optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        loss = model(crops).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        made.update_teacher(0.9)
    return {"loss": loss.detach(), **made.state_dict()}


def test_two_processes_with_half_the_images_are_one_with_all(tmp_path):
    other = torch.multiprocessing.get_context("spawn").Process(target=_half, args=(1, str(tmp_path)))
    other.start()
    halves = [_half(0, str(tmp_path))]
    other.join()
    halves.append(torch.load(tmp_path / "1.pth"))
    made = build()
    whole = _step(made, made, views(batch=4))
    torch.testing.assert_close((halves[0].pop("loss") + halves[1].pop("loss")) / 2, whole.pop("loss"))
    for name, value in whole.items():
        torch.testing.assert_close(halves[0][name], value, rtol=1e-4, atol=1e-6, msg=name)
        assert torch.equal(halves[0][name], halves[1][name]), name


def test_heads_are_recorded_over_the_global_views():
    out = build()(views(), head_stats=("entropy", "distance"))
    assert [layer["entropy"].shape for layer in out.head_stats] == [(6, 2, 17)] * 2


def test_weights_come_back_by_published_names(tmp_path):
    made = build()
    published = made.dino_state_dict()
    assert {"module.backbone.cls_token", "module.head.mlp.4.bias", "module.head.last_layer.weight_v"} <= set(
        published["student"]
    )
    assert set(published["teacher"]) == {name.removeprefix("module.") for name in published["student"]}
    torch.save(published, tmp_path / "whole.pth")
    other = DINO.from_config(made.config)
    assert not other.load_checkpoint(tmp_path / "whole.pth").missing
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in made.state_dict().items())

    other = DINO.from_config(made.config)  # the teacher's alone goes into both
    other.load_checkpoint(published["teacher"])
    for encoder in (other.encoder, other.teacher.encoder):
        assert torch.equal(encoder.cls_token, made.teacher.encoder.cls_token)
    with pytest.raises(ValueError, match=r"teacher.head.last_layer.weight_v: checkpoint \[11, 7\], model \[12, 7\]"):
        DINO.from_config({**made.config, "prototypes": 12}).load_checkpoint(tmp_path / "whole.pth")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (views()[0], TypeError, "views must be a tuple of tensors, two of them global, got Tensor"),
        (views()[:1], ValueError, "two global ones and perhaps local ones, got 1"),
        ((views()[0], views()[2]), ValueError, r"one shape, got \[3, 1, 16, 16\] and \[3, 1, 8, 8\]"),
        ((*views(), torch.randn(2, 1, 8, 8)), ValueError, "of the same images, got 3, 3, 3, 3, 2"),
        ((*views(), torch.randn(3, 1, 10, 8)), ValueError, r"patch size 4 x 4 does not divide images \[3, 1, 10, 8\]"),
    ],
)
def test_views_that_do_not_fit_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        build()(given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prototypes": 0}, "prototypes must be a positive integer, got 0"),
        ({"teacher_temp": 0.0}, "teacher_temp must be positive and finite, got 0.0"),
        ({"center_momentum": 1.0}, "center_momentum must be at least 0 and below 1, got 1.0"),
    ],
)
def test_arguments_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)
