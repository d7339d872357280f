"""Nothing waits for the device: no op, no model, no step of the optimizer; and those that would are seen to."""

import pytest
import torch

import mimkernels
from mimkernels import heads, models
from mimkernels.nn import build_pooling
from mimkernels.nn.pooling import poolings
from tests.calls import VARIANTS
from tests.waits import Waits, fake_device, none_waits, on_device, put_on_device


@pytest.mark.parametrize("label", VARIANTS)
def test_no_op_waits(label):
    op, arguments = VARIANTS[label]
    with fake_device():
        given = on_device(arguments)
        if op in ("random_mask",):
            given["device"] = "cuda"
        with none_waits():
            getattr(mimkernels, op)(**given)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.max()),
        lambda x: x.cpu(),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x + torch.ones(3, 4).to(x.device),
        lambda x: torch.equal(x, x),
    ],
)
def test_what_waits_is_seen(wait):
    with fake_device():
        x = on_device(torch.ones(3, 4))
        waits = Waits()
        try:
            with waits:
                wait(x)
        except Exception as error:  # a fake tensor refuses to give a number
            assert "DataDependent" in type(error).__name__ or "GuardOn" in type(error).__name__, error
        assert waits.found


def test_a_number_of_the_host_is_no_copy():
    with fake_device(), none_waits():
        x = on_device(torch.ones(3, 4))
        x * torch.tensor(2.0) + 1.0


def _model(model, **options):
    sizes = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    return model.from_timm("vit_tiny_patch16_224", **sizes, **options)


MODELS = {
    "mae": lambda: _model(models.MAE, decoder_dim=32, decoder_depth=2, decoder_heads=2),
    "simmim": lambda: _model(models.SimMIM),
    "simmim-swin": lambda: models.SimMIM.from_timm(
        "swinv2_tiny_window8_256", img_size=64, embed_dim=16, depths=(2, 2), num_heads=(1, 2), window_size=4
    ),
    "supervised": lambda: _model(models.Supervised, num_classes=5),
    "mocov3": lambda: _model(models.MoCoV3),
    "dino": lambda: _model(models.DINO),
}
STATS = ("entropy", "distance", "prefix_mass")


def _inputs(name, model, device):
    images = torch.empty(2, 3, *model.encoder.patch_embed.img_size, device=device)
    arguments = {}
    if model.mean is not None:
        images = images.to(torch.uint8)
    if name in ("mae", "simmim"):
        arguments["offset"] = torch.empty((), dtype=torch.int64, device=device)
    if name == "supervised":
        arguments["targets"] = torch.empty(2, dtype=torch.int64, device=device)
    return ((images, images) if name in ("mocov3", "dino") else images), arguments


@pytest.mark.parametrize(("name", "stats"), [*((name, ()) for name in MODELS), ("mae", STATS), ("simmim-swin", STATS)])
def test_no_forward_pass_of_a_model_waits(name, stats):
    model = MODELS[name]()
    with fake_device():
        put_on_device(model)
        images, arguments = _inputs(name, model, "cuda")
        with none_waits():
            out = model(images, head_stats=stats, **arguments)
            if stats:
                penalty = heads.regularization_loss({"entropy": 0.1, "distance": -0.1}, out.head_stats, num_prefix=1)
                assert penalty.device.type == "cuda"
            if name in ("mocov3", "dino"):
                (model.follow if name == "mocov3" else model.update_teacher)(0.99)
        assert out.loss.device.type == "cuda"


@pytest.mark.parametrize(
    "name", [name for name in MODELS if name != "mocov3"]
)  # its labels need torch.arange with data
def test_no_backward_pass_of_a_model_waits(name):
    """On "meta": autograd asks the driver for a fake CUDA device, which is not there."""
    model = MODELS[name]()
    put_on_device(model, "meta")
    images, arguments = _inputs(name, model, "meta")
    with none_waits():
        model(images, **arguments).loss.backward()
        gradients = [parameter for parameter in model.parameters() if parameter.grad is not None]
    assert gradients


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}], ids=str)  # fused has no shapes
def test_no_step_of_a_capturable_optimizer_waits(options):
    with fake_device():
        weights = [torch.nn.Parameter(on_device(torch.ones(3, 4))) for _ in range(2)]
        optimizer = torch.optim.AdamW(weights, lr=0.1, weight_decay=0.05, capturable=True, **options)
        optimizer.param_groups[0]["lr"] = torch.empty((), device="cuda")
        for _ in range(2):
            for weight in weights:
                weight.grad = on_device(torch.ones(3, 4))
            with none_waits():
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()


@pytest.mark.parametrize("name", poolings())
def test_no_pooling_waits(name):
    pooling = build_pooling(name, 24, 1)
    with fake_device():
        put_on_device(pooling)
        attention = {"cls_attention": on_device(torch.ones(2, 2, 5))} if pooling.needs_cls_attention else {}
        with none_waits():
            pooling(on_device(torch.ones(2, 5, 24)), **attention)


def test_rows_of_attention_by_number_do_not_wait():
    with fake_device():
        q = on_device(torch.ones(2, 2, 5, 8))
        with none_waits():
            mimkernels.attention_rows(q, q, [0, 3])
