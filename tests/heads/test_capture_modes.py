"""capture in training, under autocast, compilation, checkpointing, several processes, and inside itself."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import mimkernels
from mimkernels.heads import PRESETS, HeadStatistics, RecordedHeads, patch_grid_positions, regularization_loss
from tests.integrations import models as m
from tests.integrations import reduced

GIVEN = {"num_prefix": 1, "positions": (4, 4)}


def gradients(model, loss):
    names, weights = zip(*((n, w) for n, w in model.named_parameters() if w.requires_grad), strict=True)
    made = torch.autograd.grad(loss, weights, allow_unused=True)
    nothing = [torch.zeros_like(weight) if grad is None else grad for weight, grad in zip(weights, made, strict=True)]
    return dict(zip(names, nothing, strict=True))


def assert_same_gradients(ours, plain, exact):
    assert ours.keys() == plain.keys()
    for name, grad in ours.items():
        allowed = 2 * (plain[name].double() - exact[name]).abs().max()
        # Keys share their bias, which moves no softmax: its gradient is 0, with the error of its terms.
        allowed = allowed + 32 * torch.finfo(torch.float32).eps * max(g.abs().max() for g in exact.values())
        assert (grad.double() - exact[name]).abs().max() <= allowed, name


def test_gradients_of_outputs_are_those_of_the_model():
    model = m.vit(drop_path_rate=0.0).train()

    def loss(model, dtype=torch.float32):
        return model(m.images().to(dtype)).square().sum()

    with mimkernels.capture(model, ["entropy", "distance"]) as heads:
        ours = gradients(model, loss(model))
    exact = copy.deepcopy(model).double()
    assert_same_gradients(ours, gradients(model, loss(model)), gradients(exact, loss(exact, torch.float64)))
    assert not any(row.requires_grad for layer in heads.values() for row in layer.stats.values())


def test_differentiable_statistics_have_the_gradients_of_the_materialised_map():
    model = m.hand_written()
    weights = {"entropy": 0.3, "prefix_mass": -0.7}
    with mimkernels.capture(model, ["entropy", "prefix_mass"], num_prefix=1, differentiable=True) as heads:
        model(m.tokens())
    ours = gradients(model, regularization_loss(weights, heads.stats, num_prefix=1))

    def materialised(model, x):
        total = 0.0
        for block in model.blocks:
            q, k, v = (layer(x).unflatten(-1, (3, -1)).transpose(1, 2) for layer in (block.q, block.k, block.v))
            p = (q @ k.transpose(-2, -1) / 4).softmax(-1)
            rows = -0.3 * (p * p.log()).sum(-1) - 0.7 * p[..., 0]
            total = total + rows[..., 1:].mean() / len(model.blocks)
            x = x + (p @ v).transpose(1, 2).flatten(2)
        return total

    exact = copy.deepcopy(model).double()
    plain = gradients(model, materialised(model, m.tokens()))
    assert_same_gradients(ours, plain, gradients(exact, materialised(exact, m.tokens().double())))


@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_records_once_and_changes_no_gradient(reentrant, backward_inside):
    model = m.hand_written().train()

    def run(model, x):
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return x.square().sum()

    def leaves():
        return m.tokens().requires_grad_()

    x = leaves()
    with mimkernels.capture(model, ["entropy"], num_prefix=1) as heads:
        loss = run(model, x)
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    plain = leaves()
    run(model, plain).backward()
    torch.testing.assert_close(x.grad, plain.grad, rtol=1e-4, atol=1e-4)
    assert list(heads) == ["blocks.0", "blocks.1"] and heads["blocks.0"].stats["entropy"].shape == (2, 3, 17)


def test_differentiable_statistics_are_refused_inside_checkpointing():
    model = m.hand_written().train()
    with (
        pytest.raises(RuntimeError, match="blocks.0 runs inside gradient checkpointing"),
        mimkernels.capture(model, ["entropy"], num_prefix=1, differentiable=True),
    ):
        checkpoint(model.blocks[0], m.tokens().requires_grad_(), use_reentrant=False)


def test_autocast():
    model = m.vit()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = model(m.images())
        with mimkernels.capture(model, ["entropy", "distance"]) as heads:
            ours = model(m.images())
    with torch.no_grad(), mimkernels.capture(model, ["entropy"]) as exact:
        model(m.images())
    assert ours.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(ours, plain, rtol=0.05, atol=0.05)
    row = heads["blocks.0.attn"].stats["entropy"]
    assert row.dtype == torch.float32
    torch.testing.assert_close(row, exact["blocks.0.attn"].stats["entropy"], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("how", ["model", "in place", "a block", "capture inside"])
def test_compiled_models(how):
    model = m.hand_written(depth=1)
    with torch.no_grad():
        expected = model(m.tokens())
    compiled = model
    if how == "model":
        compiled = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    elif how == "a block":
        model.blocks[0] = torch.compile(model.blocks[0], backend="eager")

    def captured(x):
        with mimkernels.capture(compiled, ["entropy"], num_prefix=1) as heads:
            out = compiled(x)
        return out * 1.0, heads

    step = torch.compile(captured, backend="eager") if how == "capture inside" else captured
    with torch.no_grad():
        compiled(m.tokens())
        for _ in range(2):
            out, heads = step(m.tokens())
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
            assert list(heads) == ["blocks.0"]
            assert heads["blocks.0"].stats["entropy"].shape == (2, 3, 17)
        torch.testing.assert_close(compiled(m.tokens()), expected, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_dropout_is_the_model_s_own():
    model = m.hand_written(dropout=0.4).train()
    torch.manual_seed(1)
    expected = model(m.tokens())
    torch.manual_seed(1)
    with mimkernels.capture(model, ["entropy"], num_prefix=1) as heads:
        assert torch.equal(model(m.tokens()), expected)
    with mimkernels.capture(model.eval(), ["entropy"], num_prefix=1) as without:
        model(m.tokens())
    layer = heads["blocks.0"]
    assert layer.notes == ["computed as it is: dropout_p is 0.4: attention has no dropout"]
    torch.testing.assert_close(layer.stats["entropy"], without["blocks.0"].stats["entropy"], rtol=1e-5, atol=1e-5)


def test_asked_for_maps_are_the_model_s_own():
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(48, 3, batch_first=True)
    x = m.tokens()
    out, weights = layer(x, x, x, average_attn_weights=False)
    with mimkernels.capture(layer, ["entropy"], num_prefix=1) as heads:
        ours, ours_weights = layer(x, x, x, average_attn_weights=False)
    assert torch.equal(ours, out) and torch.equal(ours_weights, weights)
    expected = -(weights * weights.log()).sum(-1)
    torch.testing.assert_close(heads["MultiheadAttention"].stats["entropy"], expected, rtol=1e-4, atol=1e-5)
    assert "need_weights=True" in heads["MultiheadAttention"].notes[0]


@pytest.mark.parametrize("head_dim", [12, 20])
def test_head_dims_between_the_kernels_are_filled_up(head_dim):
    torch.manual_seed(0)
    model = m.HandWritten(3 * head_dim)
    x = m.tokens(dim=3 * head_dim)
    with torch.no_grad(), mimkernels.capture(model, ["entropy"], num_prefix=1) as heads:
        ours = model(x)
        q, k = (layer(x).unflatten(-1, (3, -1)).transpose(1, 2) for layer in (model.q, model.k))
    assert torch.equal(ours, model(x))
    p = (q @ k.transpose(-2, -1) * head_dim**-0.5).softmax(-1)
    torch.testing.assert_close(heads[0].stats["entropy"], -(p * p.log()).sum(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head_dim", [132, 136, 256])
def test_heads_wider_than_the_kernels_have_statistics(head_dim):
    torch.manual_seed(0)
    model, x = m.HandWritten(2 * head_dim, heads=2), m.tokens(dim=2 * head_dim)
    with torch.no_grad(), mimkernels.capture(model, ["entropy", "distance", "head_divergence"], **GIVEN) as heads:
        ours = model(x)
        q, k = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2).double() for layer in (model.q, model.k))
    assert torch.equal(ours, model(x))
    p = (q @ k.transpose(-2, -1) * head_dim**-0.5).softmax(-1)
    places = patch_grid_positions((4, 4)).double()
    layer, apart = heads[0], F.pad(torch.cdist(places, places), (1, 0, 1, 0))
    assert f"head dim is {head_dim}" in layer.notes[0]
    torch.testing.assert_close(layer.stats["entropy"].double(), -(p * p.log()).sum(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.stats["distance"].double(), (p * apart).sum(-1), rtol=1e-4, atol=1e-5)
    between = (p[:, :, None] * (p[:, :, None].log() - p[:, None].log())).sum(-1).mean((0, -1))  # [H, H]
    expected = (between.sum(-1) / (between.shape[-1] - 1)).float()
    torch.testing.assert_close(heads.statistics.mean("head_divergence")[0].float(), expected, rtol=1e-3, atol=1e-5)


def test_captures_inside_each_other():
    model = m.hand_written()
    with torch.no_grad():
        with mimkernels.capture(model, ["entropy"], num_prefix=1) as alone:
            expected = model(m.tokens())
        with mimkernels.capture(model, ["entropy"], num_prefix=1) as outer:
            with mimkernels.capture(model.blocks[1], ["distance", "entropy"], **GIVEN) as inner:
                ours = model(m.tokens())
            model(m.tokens(seed=7))
    assert torch.equal(ours, expected)
    assert list(outer) == ["blocks.0", "blocks.1"] and list(inner) == ["HandWritten"]
    assert outer["blocks.0"].stats["entropy"].shape == (4, 3, 17)
    for layer in ("blocks.0", "blocks.1"):
        assert torch.equal(outer[layer].stats["entropy"][:2], alone[layer].stats["entropy"])
    assert torch.equal(inner[0].stats["entropy"], alone["blocks.1"].stats["entropy"])


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_captures_of_one_model_inside_each_other_count_every_call_once(dropout):
    model = m.hand_written(dropout=dropout).train()
    with (
        mimkernels.capture(model, ["entropy"], num_prefix=1) as outer,
        mimkernels.capture(model, ["entropy"], num_prefix=1) as inner,
    ):
        model(m.tokens())
    for heads in (outer, inner):
        assert list(heads) == ["blocks.0", "blocks.1"] and heads.statistics.images == {0: 2, 1: 2}


def test_maps_asked_for_are_counted_once_by_captures_inside_each_other():
    torch.manual_seed(0)
    layer, x = nn.MultiheadAttention(48, 3, batch_first=True), m.tokens()
    with (
        mimkernels.capture(layer, ["entropy"], num_prefix=1) as outer,
        mimkernels.capture(layer, ["entropy"], num_prefix=1) as inner,
    ):
        layer(x, x, x)
    assert len(outer) == len(inner) == 1 and outer.statistics.images == inner.statistics.images == {0: 2}


def test_models_on_mimkernels_attention():
    from mimkernels.heads import record_heads
    from mimkernels.nn import use_mimkernels_attention

    model = m.vit()
    with torch.no_grad(), mimkernels.capture(model, ["entropy", "distance"]) as plain:
        model(m.images())
    use_mimkernels_attention(model)
    with (
        torch.no_grad(),
        mimkernels.capture(model, ["entropy", "distance"]) as heads,
        record_heads(model, ["entropy"], num_prefix=1) as recorded,
    ):
        model(m.images())
    assert list(heads) == list(plain)
    for number, (ours, theirs) in enumerate(zip(heads.values(), plain.values(), strict=True)):
        for name, row in ours.stats.items():
            torch.testing.assert_close(row, theirs.stats[name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.stats["entropy"], recorded[number].stats["entropy"], rtol=1e-6, atol=1e-6)


def test_our_own_attention_under_checkpointing():
    from mimkernels.nn import use_mimkernels_attention

    model = m.vit()
    use_mimkernels_attention(model)
    model.set_grad_checkpointing(True)
    model.train()

    def grads():
        return gradients(model, model(m.images()).square().sum())

    expected = grads()
    with mimkernels.capture(model, ["entropy"]) as heads:
        loss = model(m.images()).square().sum()
    for name, grad in gradients(model, loss).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-4)
    assert heads["blocks.0.attn"].stats["entropy"].shape == (2, 3, 17)


def test_our_own_masked_autoencoder():
    from mimkernels.models import MAE

    torch.manual_seed(0)
    sizes = {"decoder_dim": 48, "decoder_depth": 1, "decoder_heads": 3}
    options = {key: size for key, size in m.SIZES.items() if key != "num_classes"}
    model = MAE.from_timm("vit_tiny_patch16_224", patch_size=8, **options, **sizes)
    with torch.no_grad():
        expected = model(m.images(), seed=0, offset=0).loss
        with mimkernels.capture(model, ["entropy", "prefix_mass"]) as heads:
            assert torch.equal(model(m.images(), seed=0, offset=0).loss, expected)
    assert [(layer.keys, layer.num_prefix) for layer in heads.values()] == [(5, 1), (5, 1), (17, 1)]


def test_a_module_inside_itself_keeps_its_name():
    class Twice(m.HandWritten):
        def forward(self, x, depth=1):
            if depth:
                x = self(x, depth - 1)
            return super().forward(x)

    model = Twice()
    with torch.no_grad(), mimkernels.capture(model, ["entropy"], num_prefix=1) as heads:
        model(m.tokens())
    assert list(heads) == ["Twice", "Twice#1"]


def test_float64_models():
    model = m.hand_written().double()
    with torch.no_grad(), mimkernels.capture(model, ["entropy"], num_prefix=1) as heads:
        out = model(m.tokens().double())
        assert torch.equal(out, model(m.tokens().double()))
    assert "float64" in heads["blocks.0"].notes[0] and heads["blocks.0"].stats["entropy"].shape == (4, 3, 17)


def test_calls_outside_the_model_are_left_alone():
    model = m.hand_written()
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    with mimkernels.capture(model, ["entropy"], num_prefix=1) as heads:
        out = F.scaled_dot_product_attention(q, q, q)
        model(m.tokens())
    assert "ScaledDotProduct" in type(out.grad_fn).__name__
    assert list(heads) == ["blocks.0", "blocks.1"]


def test_two_processes_reduce_to_what_one_would_have_seen(tmp_path):
    command = [sys.executable, "-m", "tests.integrations.reduced", "1", str(tmp_path / "store")]
    other = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    try:
        reduced.compare_with_one_process(0, tmp_path / "store")
        _, errors = other.communicate(timeout=120)
        assert other.returncode == 0, errors
    finally:
        other.kill()


def test_one_process_reduces_to_itself():
    model = m.hand_written()
    with mimkernels.capture(model, "park", num_prefix=1, positions=PRESETS["park"].positions((4, 4), 8)) as heads:
        model(m.tokens())
    total = heads.reduce()
    assert isinstance(total, RecordedHeads) and total.to_dict() == heads.to_dict()


def test_asking_for_capture_imports_no_model_library():
    code = "import sys, mimkernels; mimkernels.capture; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = {name.partition(".")[0] for name in done.stdout.split()}
    assert not names & {"timm", "transformers", "torchvision", "lightly", "matplotlib"}
    assert "mimkernels" in names and HeadStatistics.__module__ in done.stdout.split()
