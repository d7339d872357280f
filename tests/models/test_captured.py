"""A captured step is the eager one: same bits, new masks, and what a graph cannot do is refused before it."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("timm")
from mimkernels.models import DINO, MAE, SimMIM, Supervised, captured, captured_step
from tests.waits import Waits, fake_device, put_on_device

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
PIXELS = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
RATES = [2**-k for k in (7, 6, 8, 7, 9, 7)]  # which fp32 has


def build(kind=MAE, **options):
    torch.manual_seed(0)
    if kind is MAE:
        options = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, **options}
    return kind.from_timm("vit_tiny_patch16_224", **SMALL, **PIXELS, **options).train()


def adamw(model, **options):
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    many = [weight for weight in weights if weight.dim() > 1]
    groups = [
        {"params": many, "weight_decay": 0.25},
        {"params": [weight for weight in weights if weight.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=RATES[0], fused=True, **options)


def batches(count, batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (batch, 3, 16, 16), dtype=torch.uint8, generator=generator) for _ in range(count)]


def eager(model, optimizer, images, *, clip_grad=None, **arguments):
    """The step, written down apart from the library."""
    loss = model(images, **arguments).loss
    loss.backward()
    if clip_grad is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


@pytest.mark.parametrize(
    ("kind", "options", "arguments"),
    [
        (MAE, {}, {"seed": 5}),
        (MAE, {"drop_path_rate": 0.5}, {}),  # whose random numbers are torch's
        (SimMIM, {"mask_unit": 4}, {"seed": 5}),
        (Supervised, {"num_classes": 4}, {"targets": torch.tensor([0, 3, 1])}),
    ],
    ids=["mae", "mae-drop-path", "simmim", "supervised"],
)
@pytest.mark.parametrize("clip_grad", [None, 0.01])
def test_captured_steps_are_eager_steps_bit_for_bit(kind, options, arguments, clip_grad):
    ours, plain = build(kind, **options), build(kind, **options)
    our_optimizer, plain_optimizer = adamw(ours), adamw(plain)
    data = [*batches(5), batches(1)[0][:2]]  # the last is short
    step = captured_step(ours, our_optimizer, data[0], clip_grad=clip_grad, offset=7, stand_in=True, **arguments)
    masked = kind is not Supervised
    for number, (images, rate) in enumerate(zip(data, RATES, strict=True)):
        for optimizer in (our_optimizer, plain_optimizer):
            for group in optimizer.param_groups:
                group["lr"] = rate
        tensors = {name: value[: len(images)] for name, value in arguments.items() if name == "targets"}
        torch.manual_seed(number)
        got = step(images, **tensors)
        torch.manual_seed(number)
        at = {"offset": 7 + number} if masked else {}
        expected = eager(plain, plain_optimizer, images, clip_grad=clip_grad, **{**arguments, **tensors}, **at)
        assert torch.equal(got, expected), number
        assert step.captured == (number >= 3)
    assert step.calls == len(data) and step.offset == 7 + len(data)
    for ours_now, plain_now in zip(ours.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours_now, plain_now)
    assert all(weight.grad is None for weight in ours.parameters())
    assert [group["lr"] for group in our_optimizer.param_groups] == [RATES[-1]] * 2


def test_every_replay_draws_its_own_masks():
    model = build()
    seen = []
    model.register_forward_hook(lambda module, args, out: seen.append(out.mask.ids_keep.clone()))
    (images,) = batches(1)
    step = captured_step(model, adamw(model), images, stand_in=True, seed=3)
    for _ in range(6):
        step(images)
    step(images, offset=1)
    expected = [model.draw_mask(images, seed=3, offset=at).ids_keep for at in (0, 1, 2, 3, 4, 5, 1)]
    assert all(map(torch.equal, seen, expected))
    assert len({tuple(mask.flatten().tolist()) for mask in seen}) == 6
    assert step.offset == 2


def test_tensors_are_copied_in_and_the_loss_out():
    model = build()
    images = batches(1)[0]
    step = captured_step(model, adamw(model), images, stand_in=True, noise=torch.rand(3, 16))
    noises = torch.rand(6, 3, 16)
    losses = [step(images, noise=noise) for noise in noises]
    kept = [loss.clone() for loss in losses]
    step(images, noise=noises[0])
    assert all(map(torch.equal, losses, kept)), "a later step wrote over the loss"
    assert len({float(loss) for loss in losses}) == 6


def test_a_loss_of_ones_own():
    model, plain = build(), build()
    optimizer, (images,) = adamw(plain), batches(1)
    step = captured_step(model, adamw(model), images, stand_in=True, loss=lambda out: 2 * out.loss)
    for number in range(4):
        got, out = step(images), plain(images, offset=number)
        (2 * out.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(got, 2 * out.loss.detach())


@pytest.mark.parametrize("clip_grad", [None, 1.0])
@pytest.mark.parametrize("kind", [MAE, SimMIM])
def test_nothing_within_the_step_waits(kind, clip_grad):
    """On the CPU, where reading a value is seen, too: forward, backward, clipping and optimizer."""
    model = build(kind)
    (images,) = batches(1)
    step = captured_step(model, adamw(model), images, stand_in=True, clip_grad=clip_grad)
    for _ in range(4):
        step(images)
    assert step.captured
    with Waits(host=True) as waits:
        step(images)
    assert not waits.found


def test_that_is_seen_where_a_step_would_wait():
    model = build()
    (images,) = batches(1)
    step = captured_step(
        model, adamw(model), images, stand_in=True, loss=lambda out: out.loss * float(out.loss.detach())
    )
    with Waits(host=True) as waits:
        step(images)
    assert "_local_scalar_dense" in waits.found[0]


@pytest.fixture
def steps():
    model = build()
    optimizer, (images,) = adamw(model), batches(1)
    step = captured_step(model, optimizer, images, stand_in=True, noise=torch.rand(3, 16))
    for _ in range(4):
        step(images, noise=torch.rand(3, 16))
    saved = copy.deepcopy(optimizer.state_dict())
    return SimpleNamespace(
        saved=saved, step=step, model=model, optimizer=optimizer, images=images, noise=torch.rand(3, 16)
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: s.step(s.images.repeat(2, 1, 1, 1), noise=s.noise), ValueError, r"or fewer of them, got \[6,"),
        (lambda s: s.step(s.images[..., :8], noise=s.noise), ValueError, r"got \[3, 3, 16, 8\] torch.uint8"),
        (lambda s: s.step(s.images.float(), noise=s.noise), ValueError, "got .* torch.float32"),
        (lambda s: s.step(s.images), TypeError, "takes the tensors noise beside the images, got none"),
        (lambda s: s.step(s.images, noise=s.noise[:2]), ValueError, r"noise must be \[3, 16\] torch.float32, got \[2,"),
        (lambda s: (s.model.eval(), s.step(s.images, noise=s.noise)), ValueError, "eval mode"),
        (
            lambda s: (s.optimizer.param_groups[0].update(weight_decay=0.5), s.step(s.images, noise=s.noise)),
            ValueError,
            "weight_decay of the optimizer was 0.25 and is 0.5",
        ),
        (
            lambda s: (s.optimizer.load_state_dict(s.saved), s.step(s.images, noise=s.noise)),
            RuntimeError,
            "lie elsewhere than when the graph was captured",
        ),
    ],
)  # fmt: skip
def test_calls_that_the_graph_does_not_fit_are_refused(steps, change, error, message):
    before = [weight.clone() for weight in steps.model.parameters()]
    with pytest.raises(error, match=message):
        change(steps)
    assert all(map(torch.equal, before, steps.model.parameters()))
    assert steps.step.calls == 4


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"stand_in": False}, ValueError, "CUDA graphs are of CUDA devices, got cpu"),
        ({"autocast": torch.float16}, ValueError, "fp16 needs a GradScaler, which looks at the gradients"),
        ({"optimizer": torch.amp.GradScaler("cpu")}, TypeError, "must be a torch.optim.Optimizer, got GradScaler"),
        ({"images": batches(2)}, TypeError, "models of several views have a teacher"),
        ({"images": batches(1)[0].to("meta")}, ValueError, "images are on meta but the weights are on cpu"),
        ({"model": DistributedDataParallel.__new__(DistributedDataParallel)}, TypeError, "by hooks of its own"),
        ({"warmup": 1}, ValueError, "warmup must be at least 2, got 1"),
        ({"mask": torch.zeros(3, 4, 4, dtype=torch.bool)}, ValueError, "MAE counts the visible patches of a mask"),
        ({"offset": 0.5}, TypeError, "offset must be an int, got float"),
    ],
)  # fmt: skip
def test_what_cannot_be_captured_is_refused(changed, error, message):
    model = build()
    arguments = {"model": model, "optimizer": adamw(model), "images": batches(1)[0], "stand_in": True, **changed}
    with pytest.raises(error, match=message):
        captured_step(**arguments)


def test_gradient_checkpointing_is_refused():
    model = build()
    model.set_grad_checkpointing()
    with pytest.raises(ValueError, match="gradient checkpointing keeps torch's random state"):
        captured_step(model, adamw(model), batches(1)[0], stand_in=True)


def test_short_batches_are_no_warm_up():
    model = build()
    (images,) = batches(1)
    step = captured_step(model, adamw(model), images, stand_in=True, warmup=2)
    captured = []
    for batch in (images[:1], images, images[:2], images, images[:1], images):
        step(batch)
        captured.append(step.captured)
    assert captured == [False] * 5 + [True]


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_an_optimizer_that_counts_on_the_host_is_refused(optimizer):
    model = build()
    with fake_device():
        put_on_device(model)
        images = torch.empty(2, 3, 16, 16, device="cuda")
        made = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match=f"{optimizer} keeps its step count on the host; make it with capturable="):
            captured_step(model, made, images)


def test_the_graph_of_a_device_is_warmed_up_captured_and_replayed_in_order(monkeypatch):
    """With a driver that writes down what it is told; what it captures does not run, as on a device."""
    told, recorded, mode = [], {}, ["default"]

    class Graph:
        def replay(self):
            told.append("replay")
            recorded["step"]()

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            told.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def capturing(graph, *, stream, capture_error_mode):
        told.append(f"capture on {stream.name}, {capture_error_mode}")
        yield

    @contextlib.contextmanager
    def on(stream):
        told.append(f"on {stream.name}, waits: {mode[0]}")
        yield

    cuda = SimpleNamespace(
        CUDAGraph=Graph,
        Stream=lambda device: Stream("side"),
        current_stream=lambda device: Stream("current"),
        stream=on,
        graph=capturing,
        get_sync_debug_mode=lambda: mode[0],
        set_sync_debug_mode=lambda new: mode.__setitem__(0, new),
    )
    monkeypatch.setattr(captured.torch, "cuda", cuda)
    ran = []
    graph = captured._CUDAGraph("cuda")
    graph.warm_up(lambda: ran.append("first"), strict=False)
    graph.warm_up(lambda: ran.append("last"), strict=True)
    with pytest.raises(RuntimeError, match="a device was waited for"):
        graph.warm_up(lambda: (_ for _ in ()).throw(RuntimeError("a device was waited for")), strict=True)
    assert mode == ["default"], "the mode of the caller is back"
    recorded["step"] = lambda: ran.append("replayed")
    graph.capture(lambda: None)
    graph.replay()
    assert ran == ["first", "last", "replayed"]
    warm_up = ["side waits for current", "on side, waits: {}", "current waits for side"]
    assert told == [
        *(line.format(level) for level in ("default", "error", "error") for line in warm_up),
        "capture on side, thread_local",
        "replay",
    ]


def test_errors_of_the_driver_are_explained():
    with pytest.raises(RuntimeError, match=r"waits for the device \(.item\(\).*not permitted when stream is capt"):
        with captured._explained():
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
    with pytest.raises(RuntimeError, match="^something else$"), captured._explained():
        raise RuntimeError("something else")


def test_models_of_views_are_refused():
    with pytest.raises(TypeError, match="images must be one tensor, got tuple"):
        captured_step(build(DINO), None, (batches(1)[0],) * 2, stand_in=True)
