"""Which calls stay with PyTorch's attention, by a table of measurements: here by tables made for the purpose."""

import copy
import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import mimkernels
from mimkernels.nn.sdpa import measured, observing
from mimkernels.nn.sdpa.measured import Measured, Point, why_torch
from mimkernels.nn.sdpa.stand_in import stand_in
from mimkernels.ops import _registry
from mimkernels.testing import Watch
from tests.integrations.models import Seen

HERE = measured.instruction_set("cpu")


@pytest.fixture
def table(monkeypatch):
    """Puts a row in the place of the committed ones; at first, PyTorch wins beyond 32 tokens, without gradients."""

    def put(forward=((16, 16, 0.5), (64, 16, 2.0)), training=((16, 16, 0.5),), dtype="float32", isa=HERE, device="cpu"):
        points = {"forward": [Point(*one) for one in forward], "training": [Point(*one) for one in training]}
        monkeypatch.setattr(measured, "_rows", lambda: [Measured(device, isa, dtype, points)])
        monkeypatch.setattr(measured, "_known", {})
        monkeypatch.setattr(measured, "_decided", {})
        monkeypatch.setattr(sys.modules[stand_in.__module__], "_known", {})  # as in a new process
        torch._dynamo.reset()

    put()
    return put


def qkv(tokens, dim=16, keys=None, dtype=torch.float32, grad=False, leading=(2, 3)):
    generator = torch.Generator().manual_seed(0)
    sizes = [(*leading, n, dim) for n in (tokens, keys or tokens, keys or tokens)]
    return [torch.randn(size, generator=generator).to(dtype).requires_grad_(grad) for size in sizes]


def runs_on(function, *arguments, **options):
    """What computes attention inside a call: "ours" or "torch"."""
    with Watch(lambda op, args: op._schema.name) as watch:
        function(*arguments, **options)
    ours = any(name.startswith("mimkernels::attention") for name in watch.seen)
    assert ours != any("scaled_dot_product" in name or "softmax" in name for name in watch.seen), watch.seen
    return "ours" if ours else "torch"


def test_the_nearest_length_decides_for_forward_passes(table):
    for tokens, expected in ((5, "ours"), (32, "ours"), (33, "torch"), (300, "torch")):
        assert runs_on(stand_in(), *qkv(tokens)) == expected, tokens
    assert runs_on(stand_in(), *qkv(4, keys=256)) == "ours"  # as many scores as of 32 tokens
    assert runs_on(stand_in(), *qkv(5, keys=256)) == "torch"
    assert runs_on(stand_in(), *qkv(64, leading=())) == runs_on(stand_in(), *qkv(64, leading=(2, 1, 3))) == "torch"


def test_calls_that_train_have_measurements_of_their_own(table):
    assert runs_on(stand_in(), *qkv(64, grad=True)) == "ours"
    with torch.no_grad():
        assert runs_on(stand_in(), *qkv(64, grad=True)) == "torch"
    table(forward=[(16, 16, 0.5)], training=[(16, 16, 1.01)])
    assert runs_on(stand_in(), *qkv(64)) == "ours"
    assert runs_on(stand_in(), *qkv(64, grad=True)) == "torch"
    bias = torch.zeros(64, 64, requires_grad=True)
    assert runs_on(stand_in(), *qkv(64), bias) == "torch"


def test_the_nearest_head_dim_comes_first(table):
    table(forward=[(16, 16, 2.0), (64, 64, 0.5), (256, 64, 2.0)])
    for dim, tokens, expected in ((16, 64, "torch"), (32, 64, "torch"), (40, 64, "ours"), (40, 200, "torch")):
        assert runs_on(stand_in(), *qkv(tokens, dim=dim)) == expected, (dim, tokens)


def test_an_equal_time_is_ours(table):
    table(forward=[(16, 16, 1.0)])
    assert runs_on(stand_in(), *qkv(16)) == "ours"


def test_what_was_not_measured_is_ours(table):
    q = qkv(64)
    for device, isa, dtype in (("cpu", "another", "float32"), ("cuda", HERE, "float32"), ("cpu", HERE, "float16")):
        table(device=device, isa=isa, dtype=dtype)
        assert runs_on(stand_in(), *q) == "ours"
    table(forward=[], training=[(64, 16, 2.0)])
    assert runs_on(stand_in(), *q) == "ours"


@pytest.mark.parametrize(
    ("here", "there", "dtype", "counts"),
    [
        ("avx512", "avx2", "float32", True),
        ("amx_bf16", "avx2", "float32", True),
        ("portable", "avx2", "float32", True),
        ("avx512", "avx2", "bfloat16", True),
        ("avx512_bf16", "avx2", "bfloat16", False),  # another way to multiply
        ("amx_bf16", "avx512_bf16", "bfloat16", False),
        ("avx2", "avx512_bf16", "bfloat16", False),
        ("amx_bf16", "amx_bf16", "bfloat16", True),
        ("unheard_of", "avx2", "float32", False),
        ("avx2_amx", "avx2", "float32", False),  # of the tests only, slow on purpose
        ("avx2_amx", "amx_bf16", "bfloat16", False),
    ],
)
def test_a_neighbouring_instruction_set_stands_in_for_one_that_was_not_measured(
    table, monkeypatch, here, there, dtype, counts
):
    table(isa=there, dtype=dtype)
    monkeypatch.setattr(measured, "instruction_set", lambda device: here)
    reason = why_torch(*qkv(64, dtype=getattr(torch, dtype)), None)
    assert (reason is not None) == counts
    assert reason is None or reason.endswith(f"2.00 times as fast on {there}")


def test_statistics_are_always_ours(table):
    seen = Seen()
    with observing(seen):
        assert runs_on(stand_in(), *qkv(64)) == "ours"
    assert len(seen.calls) == 1


def test_a_named_backend_always_wins(table, monkeypatch):
    with mimkernels.use_backend("cpu"):
        assert runs_on(stand_in(), *qkv(64)) == "ours"
    with mimkernels.use_backend("auto"):
        assert runs_on(stand_in(), *qkv(64)) == "torch"
    token = _registry.forced.set("cpu")  # as MIMKERNELS_BACKEND leaves it
    try:
        assert runs_on(stand_in(), *qkv(64)) == "ours"
    finally:
        _registry.forced.reset(token)


def test_the_caller_is_told_once_in_words_of_the_measurement(table):
    told = []
    function = stand_in(told.append)
    function(*qkv(50))
    function(*qkv(60))
    reason = "torch's attention is kept for float32 near 64 tokens, head dim 16: 2.00 times as fast on " + HERE
    assert told == [[reason], [reason]]
    table(forward=[], training=[(64, 16, 1.5)])
    assert "for float32 in training near 64 tokens" in why_torch(*qkv(64, grad=True), None)


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": torch.ones(64, 64).tril() > 0}]
)
def test_pytorch_gets_the_call_as_it_was_made(table, options):
    q = qkv(64)
    assert torch.equal(stand_in()(*q, **options), F.scaled_dot_product_attention(*q, **options))


def test_under_autocast_its_dtype_counts(table):
    table(dtype="bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        assert runs_on(stand_in(), *qkv(64)) == "torch"
        assert stand_in()(*qkv(64)).dtype == torch.bfloat16
        assert runs_on(stand_in(), *qkv(16)) == "ours"
    assert runs_on(stand_in(), *qkv(64)) == "ours"


def test_transforms_and_forward_mode_were_not_measured(table):
    q, k, v = qkv(64)
    expected = F.scaled_dot_product_attention(q, k, v)
    out = torch.func.vmap(stand_in(), in_dims=0)(q, k, v)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert runs_on(torch.func.vmap(stand_in()), q, k, v) == "ours"
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        out = torch.autograd.forward_ad.unpack_dual(stand_in()(dual, k, v))  # which PyTorch's kernels have not
    assert out.tangent is not None


def test_nested_tensors_and_calls_that_pytorch_refuses_go_to_it(table):
    nested = torch.nested.nested_tensor([torch.randn(3, 64, 16), torch.randn(3, 40, 16)])
    out = stand_in()(nested, nested, nested)
    assert out.is_nested
    with pytest.raises(RuntimeError):
        stand_in()(torch.randn(16), torch.randn(16), torch.randn(16))


@pytest.mark.parametrize("grad", [False, True])
def test_compiled_calls_decide_in_one_graph(table, grad):
    table(training=[(16, 16, 0.5), (64, 16, 2.0)])
    graphs = []

    def backend(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    compiled = torch.compile(stand_in(), fullgraph=True, dynamic=True, backend=backend)
    for tokens in (8, 12, 20, 40, 50, 200, 9):
        q = qkv(tokens, grad=grad)
        torch.testing.assert_close(compiled(*q), F.scaled_dot_product_attention(*q), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 2  # one for each side of the boundary, whatever the length
    ours, torchs = graphs
    assert any("attention_fwd" in name for name in ours) and any("scaled_dot_product" in name for name in torchs)
    with mimkernels.use_backend("cpu"):
        compiled(*qkv(40, grad=grad))
    assert any("attention_fwd" in name for name in graphs[-1])


def test_what_is_compiled_first_in_a_process_is_compiled_once(table):
    table()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(stand_in(), fullgraph=True, backend=counter)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            compiled(*qkv(20))
    assert counter.frame_count == 1


def test_a_decision_costs_compiled_code_no_length_where_one_side_always_wins(table):
    for ratio in (0.5, 2.0):
        table(forward=[(16, 16, ratio), (64, 16, ratio)])
        counter = torch._dynamo.testing.CompileCounter()
        compiled = torch.compile(stand_in(), fullgraph=True, dynamic=True, backend=counter)
        for tokens in (8, 20, 40, 200):
            compiled(*qkv(tokens))
        assert counter.frame_count == 1


# The committed table


def test_the_committed_table_is_whole():
    rows = measured.checked(json.loads(measured.TABLE.read_text()), "measured.json")
    assert {row.instruction_set for row in rows} >= {"avx2", "avx512_bf16"}
    for row in rows:
        for points in row.points.values():
            assert all(math.isfinite(point.ratio) and point.ratio > 0 for point in points)
            assert all(point.head_dim % 8 == 0 for point in points)


def test_matrix_units_for_bf16_are_known_to_be_faster_for_long_sequences(monkeypatch):
    monkeypatch.setattr(measured, "_known", {})
    monkeypatch.setattr(measured, "_decided", {})
    monkeypatch.setattr(measured, "instruction_set", lambda device: "avx512_bf16")
    half = torch.bfloat16
    assert [bool(measured.reasons("cpu", half, tokens, 64)) for tokens in (50, 197, 577)] == [False, True, True]
    assert why_torch(*qkv(577, dim=64, dtype=half), None).endswith("577 tokens, head dim 64: 2.78 times as fast on "
                                                                   "avx512_bf16")  # fmt: skip
    assert why_torch(*qkv(577, dim=64), None) is None


def row(**changes):
    texts = {"device": "cpu", "instruction_set": "avx2", "dtype": "float32", "machine": "", "torch": "", "comment": ""}
    return {**texts, "forward": [[50, 64, 0.5]], "training": [], **changes}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("none", 'the table must be {"comment"'),
        ([{"device": "cpu"}], r"measured\[0\] must be an object of device"),
        ([row(device=3)], r"measured\[0\].device must be a string, got 3"),
        ([row(dtype="float33")], r"measured\[0\].dtype must be the name of a dtype of torch, got \"float33\""),
        ([row(forward=[[50, 64, 0]])], r"measured\[0\].forward must be positive \[tokens, head dim, ratio\]"),
        ([row(forward=[[50, 64]])], "positive"),
        ([row(forward=[[50.5, 64, 1.0]])], "positive"),
        ([row(training=[[50, 64, float("nan")]])], "positive"),
        ([row(training=None)], "positive"),
        ([row(training=[[50, 64, 1.0], [50, 64, 2.0]])], r"measured\[0\].training must be one ratio for each"),
        ([row(), row()], "the table must be one row for each device"),
    ],
)
def test_a_malformed_table_is_refused_by_its_place(rows, said):
    with pytest.raises(ValueError, match=f"made.json: .*{said}"):
        measured.checked({"comment": "", "measured": rows}, "made.json")


# Layers


def vit(**options):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **sizes, **options).eval()


def images(batch=2):
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(4))


def test_accelerate_tells_which_layers_stay_with_pytorch(table):
    model = vit()
    stock = copy.deepcopy(model)
    report = mimkernels.accelerate(model)
    kept = f"torch's attention is kept for float32 near 64 tokens, head dim 16: 2.00 times as fast on {HERE}"
    attention = [change for change in report if change.kind == "Attention"]
    assert [(change.became, change.reason) for change in attention] == [("mimkernels.attention", kept)] * 2
    type(model.blocks[0].attn)._refused.clear()
    with torch.no_grad():
        assert runs_on(model, images()) == "torch"
        torch.testing.assert_close(model(images()), stock(images()), rtol=1e-5, atol=1e-5)
    assert report.refused == {"Attention": [kept]} and f"calls of Attention that went to PyTorch: {kept}" in str(report)
    assert runs_on(model, images()) == "ours"  # gradients are wanted
    type(model.blocks[0].attn)._refused.clear()


def test_the_report_is_silent_where_ours_is_faster(table, fused_at_any_size):
    table(forward=[(16, 16, 0.5)])
    assert {change.reason for change in mimkernels.accelerate(vit(), read_tokens=False)} == {""}


def test_statistics_of_a_layer_run_on_ours(table):
    from mimkernels.heads import record_heads

    model = vit()
    mimkernels.accelerate(model)
    with torch.no_grad():
        assert runs_on(model, images()) == "torch"
        with record_heads(model, ["entropy"], num_prefix=1) as heads:
            assert runs_on(model, images()) == "ours"
        with mimkernels.capture(model, ["entropy"]) as captured:
            assert runs_on(model, images()) == "ours"
    for layer, other in zip(heads.values(), captured.values(), strict=True):
        assert torch.equal(layer.stats["entropy"], other.stats["entropy"])


def test_the_other_scale_of_a_layer_counts_with_pytorch(table):
    from timm.layers import Attention

    torch.manual_seed(0)
    layer, x = Attention(48, num_heads=3), torch.randn(2, 65, 48)
    layer.fused_attn, layer.scale = False, 0.7
    with torch.no_grad():
        expected = layer(x)
        mimkernels.accelerate(layer)
        assert runs_on(layer, x) == "torch"
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
@pytest.mark.parametrize("inside", [False, True], ids=["backward after capture", "backward inside"])
def test_checkpointing_repeats_what_was_chosen(table, name, inside):
    """A first pass that is captured, and its repetition that may not be, save the same tensors."""
    timm = pytest.importorskip("timm")
    table(training=[(16, 16, 2.0)])
    torch.manual_seed(0)
    sizes = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = timm.create_model(name, **sizes)
    mimkernels.accelerate(model)
    x = torch.randn(2, 65, 48)

    def run(block):
        leaf = x.clone().requires_grad_()
        return leaf, checkpoint(block, leaf, use_reentrant=False)

    block = model.blocks[0]
    assert runs_on(block, x.clone().requires_grad_()) == "torch"
    wanted, out = run(block)
    out.sum().backward()
    with mimkernels.capture(model.blocks[0], ["entropy"], num_prefix=1) as heads:
        leaf, out = run(block)
        if inside:
            out.sum().backward()
    if not inside:
        out.sum().backward()
    assert torch.equal(leaf.grad, wanted.grad)
    assert [layer.stats["entropy"].shape for layer in heads.values()] == [(2, 3, 65)]


def test_a_compiled_model_follows_the_table(table):
    model = vit()
    mimkernels.accelerate(model)
    expected = model(images())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(compiled(images(3))[:2], expected, rtol=1e-4, atol=1e-5)
