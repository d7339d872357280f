"""Recording what the heads of a model do, against attention maps made in plain PyTorch."""

import copy
import gc
import itertools
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("timm")
import timm

from mimkernels.heads import HeadStatistics, RecordedHeads, capture, record_heads, regularization_loss
from mimkernels.nn import use_mimkernels_attention
from mimkernels.ops import attention_rows, head_divergence, received_attention

HEADS, DEPTH, PREFIX = 3, 3, 2
NAMES = ("entropy", "prefix_mass", "self_mass", "distance", "patch_entropy", "peak", "patch_mass")
GRID = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))


def vit(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": DEPTH, "num_heads": HEADS, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", reg_tokens=1, **sizes, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    use_mimkernels_attention(model)
    return model


def images(batch=2, seed=4):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def attention_maps(model, x):
    """Every layer's P ``[B, H, N, N]`` from what goes into its projection, and what comes out of the model."""
    maps = []

    def keep(layer, args):
        tokens = args[0]
        packed = layer.qkv(tokens).reshape(*tokens.shape[:2], 3, HEADS, -1)
        q, k, _ = packed.permute(2, 0, 3, 1, 4)
        q, k = layer.q_norm(q), layer.k_norm(k)
        maps.append(((q @ k.transpose(-2, -1)) * layer.scale).softmax(-1))

    hooks = [block.attn.register_forward_pre_hook(keep) for block in model.blocks]
    out = model(x)
    for hook in hooks:
        hook.remove()
    return maps, out


def expected_statistics(p, positions, prefix=PREFIX):
    mass = p[..., prefix:].sum(-1)
    over_patches = p[..., prefix:] / mass[..., None]
    apart = torch.zeros(positions.shape[0], p.shape[-1], p.shape[-1])
    apart[:, prefix:, prefix:] = torch.cdist(positions, positions, compute_mode="donot_use_mm_for_euclid_dist")
    return {
        "entropy": -(p * p.log()).sum(-1),
        "prefix_mass": p[..., :prefix].sum(-1),
        "self_mass": p.diagonal(dim1=-2, dim2=-1),
        "distance": (p * apart[:, None]).sum(-1),
        "patch_entropy": -(over_patches * over_patches.log()).sum(-1),
        "peak": p.amax(-1),
        "patch_mass": mass,
    }


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, expected, rtol=1e-3):
    assert ours.keys() == expected.keys()
    for name, grad in ours.items():
        atol = 1e-4 * float(expected[name].abs().max()) + 1e-6
        torch.testing.assert_close(grad, expected[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk-norm"])
@pytest.mark.parametrize("per_image", [False, True], ids=["shared positions", "positions per image"])
def test_every_layer_s_statistics_are_those_of_its_map(per_image, qk_norm):
    model = vit(qk_norm=qk_norm)
    positions = torch.rand(2, 16, 2, generator=torch.Generator().manual_seed(1)) * 4 if per_image else GRID
    with record_heads(model, NAMES, num_prefix=PREFIX, positions=positions) as heads:
        out = model(images())
    maps, expected_out = attention_maps(model, images())
    torch.testing.assert_close(out, expected_out, rtol=1e-5, atol=1e-5)
    assert len(heads) == len(heads.stats) == DEPTH
    for layer, p in zip(heads.values(), maps, strict=True):
        expected = expected_statistics(p, positions if per_image else positions[None])
        assert tuple(layer.stats) == NAMES
        for name, value in layer.stats.items():
            assert value.shape == (2, HEADS, PREFIX + 16) and value.dtype == torch.float32
            assert value.requires_grad == (name != "peak")
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_largest_scores_and_their_keys_are_recorded_and_captured():
    model = vit().eval()
    with record_heads(model, ["max_score", "argmax"], num_prefix=PREFIX) as heads, torch.no_grad():
        model(images())
    maps, _ = attention_maps(model, images())
    with capture(model, ["max_score", "argmax_is_prefix"], num_prefix=PREFIX) as captured, torch.no_grad():
        model(images())
    for layer, same, p in zip(heads.values(), captured.values(), maps, strict=True):
        assert torch.equal(layer.stats["argmax"], p.argmax(-1))
        assert layer.stats["max_score"].shape == p.shape[:3]
        for name, row in layer.stats.items():
            torch.testing.assert_close(same.stats[name], row)
    counted = torch.stack([(p.argmax(-1)[..., PREFIX:] < PREFIX).double().mean((0, 2)) for p in maps])
    torch.testing.assert_close(captured.statistics.mean("argmax_is_prefix"), counted)


def test_gradients_through_statistics_are_those_of_the_maps():
    model = vit()
    differentiable = [name for name in NAMES if name != "peak"]
    weights = [0.7, -0.3, 0.5, 0.2, -0.4, 0.9]

    def total(stats):
        return sum((layer[n] * w).sum() for layer in stats for n, w in zip(differentiable, weights, strict=True))

    with record_heads(model, differentiable, num_prefix=PREFIX, positions=GRID) as heads:
        out = model(images())
    (out.square().sum() + total(heads.stats)).backward()
    ours = gradients(model)
    model.zero_grad()
    maps, out = attention_maps(model, images())
    (out.square().sum() + total([expected_statistics(p, GRID[None]) for p in maps])).backward()
    assert_same_gradients(ours, gradients(model))


@pytest.mark.parametrize("weight", [1.0, -1.0], ids=["lowered", "raised"])
def test_a_regulariser_moves_the_entropy(weight):
    model = vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    seen = []
    for _ in range(6):
        with record_heads(model.blocks, ["entropy"], num_prefix=PREFIX) as heads:
            model(images())
        loss = regularization_loss({"entropy": weight}, heads.stats, num_prefix=PREFIX)
        seen.append(float(loss.detach()) / weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    steps = [weight * (after - before) for before, after in itertools.pairwise(seen)]
    assert all(step < 0 for step in steps) and sum(steps) < -0.02, seen


def test_what_is_kept_feeds_the_companion_ops_and_head_statistics():
    model = vit()
    collector = HeadStatistics(quantities=["entropy", "nmi", "head_divergence", "pos_output_magnitude"], num_prefix=2)
    outputs = []
    hooks = [block.attn.proj.register_forward_hook(lambda *args: outputs.append(args[2])) for block in model.blocks]
    with record_heads(model, collector.row_stats, num_prefix=PREFIX, keep=collector.inputs) as heads:
        model(images())
    for hook in hooks:
        hook.remove()
    maps, _ = attention_maps(model, images())
    for number, (layer, p) in enumerate(zip(heads.values(), maps, strict=True)):
        received = received_attention(layer.q, layer.k, layer.lse, **layer.options)
        torch.testing.assert_close(received, p.mean(2), rtol=1e-4, atol=1e-6)
        rows = attention_rows(layer.q, layer.k, torch.tensor([0, 5]), **layer.options)
        torch.testing.assert_close(rows, p[:, :, [0, 5]], rtol=1e-4, atol=1e-6)
        between = (p[:, :, None] * (p[:, :, None].log() - p[:, None].log())).sum(-1).mean(-1)
        torch.testing.assert_close(
            head_divergence(layer.q, layer.k, layer.lse, **layer.options), between, rtol=1e-3, atol=1e-5
        )
        assert layer.output is outputs[number]
        collector.update(number, layer.stats, q=layer.q, k=layer.k, lse=layer.lse, output=layer.output, **layer.options)
    assert "nmi" in collector.table()


def test_nothing_is_kept_that_was_not_asked_for():
    model = vit()
    with record_heads(model, ["entropy"]) as heads:
        model(images())
    layer = heads[-1]
    assert list(layer.stats) == ["entropy"]
    assert layer.q is layer.k is layer.lse is layer.output is layer.bias is layer.key_mask is None


def test_what_a_capture_wants_is_not_recorded():
    model = vit()
    with (
        torch.no_grad(),
        capture(model, ["distance"], num_prefix=PREFIX, positions=GRID) as captured,
        record_heads(model, keep=("lse",)) as recorded,
    ):
        model(images())
    assert recorded.stats == [{}] * DEPTH and recorded[0].lse.shape == (2, HEADS, 18)
    assert all(list(stats) == ["distance"] for stats in captured.stats)


def test_masks_are_recorded_for_the_companion_ops():
    model = vit()
    layer = model.blocks[0].attn
    allowed = torch.rand(2, 1, 1, 18, generator=torch.Generator().manual_seed(0)) < 0.6
    x = torch.randn(2, 18, 48, generator=torch.Generator().manual_seed(1))
    with record_heads(layer, ["entropy"], keep=("q", "k", "lse")) as heads:
        layer(x, attn_mask=allowed)
    assert torch.equal(heads[0].key_mask, allowed[:, 0, 0])
    received = received_attention(heads[0].q, heads[0].k, heads[0].lse, **heads[0].options)
    assert not received[~allowed.expand(2, HEADS, 1, 18)[:, :, 0]].any()


def test_the_model_is_as_before():
    model = vit()
    expected = model(images())
    state = {id(part): dict(part.__dict__) for part in model.modules()}
    with record_heads(model, ["entropy"]) as heads:
        assert torch.equal(model(images()), expected)
    assert torch.equal(model(images()), expected)
    for part in model.modules():
        now = {name: value for name, value in part.__dict__.items() if name != "_recorder"}
        assert now == state[id(part)] and part.__dict__.get("_recorder") is None
        assert not part._forward_hooks and not part._forward_pre_hooks
    entropy = heads[0].stats["entropy"]
    model(images(seed=9))
    assert heads[0].stats["entropy"] is entropy


def test_a_recorder_keeps_no_graph_alive_in_the_model():
    model = vit()
    with record_heads(model, ["distance"], num_prefix=PREFIX, positions=GRID) as heads:
        model(images())
    from mimkernels.nn import recorder

    assert sum(len(recorder._awaiting_backward.get(block.attn, ())) for block in model.blocks) == DEPTH
    del heads
    gc.collect()
    assert not any(recorder._awaiting_backward.get(block.attn) for block in model.blocks)


def test_copies_made_while_recording_do_not_record():
    model = vit()
    with record_heads(model, ["entropy"]) as heads:
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            other(images())
        with pytest.raises(RuntimeError, match="layer 0 of 3 has not run"):
            heads[0]
        model(images())


def test_a_pass_of_another_thread_is_not_recorded():
    model = vit()
    expected = model(images(seed=7))
    with ThreadPoolExecutor(1) as pool, record_heads(model, ["entropy"]) as heads:
        out = model(images())
        other = pool.submit(model, images(seed=7)).result(timeout=60)
    with record_heads(model, ["entropy"]) as alone:
        assert torch.equal(out, model(images()))
    assert torch.equal(other, expected)
    for name, layer in alone.items():
        assert torch.equal(heads[name].stats["entropy"], layer.stats["entropy"])


def test_an_error_inside_leaves_nothing_behind():
    model = vit()
    with pytest.raises(KeyError):
        with record_heads(model, ["entropy"]):
            raise KeyError
    with record_heads(model, ["entropy"]):
        model(images())


def test_misuse_is_refused():
    model = vit()
    recorder = record_heads(model, ["entropy"])
    with pytest.raises(RuntimeError, match=r"3 of 3 attention layers recorded nothing \(0, 1, 2\)"):
        with recorder:
            pass
    with pytest.raises(RuntimeError, match="used before"):
        recorder.__enter__()
    with pytest.raises(RuntimeError, match=r"2 of 3 attention layers recorded nothing \(0, 2\)"):
        with record_heads(model, ["entropy"]):
            model.blocks[1](torch.zeros(1, 5, 48))
    with pytest.raises(RuntimeError, match="cannot be nested"):
        with record_heads(model, ["entropy"]), record_heads(model.blocks[2:], ["entropy"]):
            pass
    with pytest.raises(RuntimeError, match="layer 0 ran a second time"):
        with record_heads(model, ["entropy"]):
            model(images())
            model(images())
    with record_heads(model, ["entropy"]):  # each refusal left the model usable
        model(images())
    for arguments, error, message in (
        ({"stats": ["entropie"]}, ValueError, "unknown 'entropie' in stats; known: entropy, prefix_mass"),
        ({"stats": "entropy"}, TypeError, "stats must be a sequence of names"),
        ({"keep": ["tokens"]}, ValueError, "unknown 'tokens' in keep; known: q, k, lse, output"),
        ({"stats": ["distance"]}, ValueError, "needs positions, got None"),
    ):
        with pytest.raises(error, match=message):
            record_heads(model, **arguments)
    plain = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    with pytest.raises(ValueError, match="call use_mimkernels_attention"):
        record_heads(plain)
    with pytest.raises(ValueError, match="there is no attention layer that can record; its attention: Multihead"):
        record_heads(torch.nn.MultiheadAttention(8, 2))
    with pytest.raises(TypeError, match="got str"):
        record_heads(["blocks.0"])


def test_attention_dropout_in_training_cannot_be_recorded():
    model = vit(attn_drop_rate=0.3)
    with pytest.raises(RuntimeError, match=r"attn_drop = 0.3"):
        with record_heads(model, ["entropy"]):
            model(images())
    model.eval()
    with record_heads(model, ["entropy"]):
        model(images())


def test_without_gradients():
    model = vit()
    with torch.no_grad(), record_heads(model, ["entropy"]) as heads:
        model(images())
    assert not heads[0].stats["entropy"].requires_grad
    model.eval()
    with record_heads(model, ["entropy"]):
        with torch.inference_mode():
            model(images())


def regularised_gradients(model, *, backward_inside=False):
    model.zero_grad()
    with record_heads(model, ["entropy", "distance"], num_prefix=PREFIX, positions=GRID) as heads:
        loss = model(images()).square().sum() + heads_loss(heads)
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    return gradients(model)


def heads_loss(heads):
    return sum(layer["entropy"].sum() - layer["distance"].square().sum() for layer in heads.stats)


@pytest.mark.parametrize("backward_inside", [True, False], ids=["backward inside", "backward after"])
def test_gradient_checkpointing_changes_no_gradient(backward_inside):
    model = vit()
    expected = regularised_gradients(model)
    model.set_grad_checkpointing(True)
    assert_same_gradients(regularised_gradients(model, backward_inside=backward_inside), expected, rtol=1e-5)
    model.zero_grad()
    model(images()).square().sum().backward()  # unrecorded again
    again = gradients(model)
    model.set_grad_checkpointing(False)
    model.zero_grad()
    model(images()).square().sum().backward()
    assert_same_gradients(again, gradients(model), rtol=1e-5)


def test_two_checkpointed_passes_with_other_positions_are_not_confused():
    model = vit()
    model.set_grad_checkpointing(True)
    losses = []
    for factor in (1.0, 2.0):
        with record_heads(model, ["distance"], num_prefix=PREFIX, positions=GRID * factor) as heads:
            model(images())
        losses.append(sum(layer["distance"].sum() for layer in heads.stats))
        heads = None
    with pytest.raises(RuntimeError, match="before the next forward pass"):
        sum(losses).backward()
    losses = []
    for _ in range(2):
        with record_heads(model, ["distance"], num_prefix=PREFIX, positions=GRID) as heads:
            model(images())
        losses.append(sum(layer["distance"].sum() for layer in heads.stats))
    sum(losses).backward()


def test_reentrant_checkpointing_is_refused():
    model = vit()
    x = torch.randn(2, 18, 48, requires_grad=True)
    with pytest.raises(RuntimeError, match="recorded without gradients.*use_reentrant=False"):
        with record_heads(model.blocks[0], ["entropy"]):
            checkpoint(model.blocks[0], x, use_reentrant=True)
    checkpoint(model.blocks[0], x, use_reentrant=True).sum().backward()


def test_autocast():
    model = vit()
    with record_heads(model, NAMES, num_prefix=PREFIX, positions=GRID, keep=("q",)) as heads:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(images())
    maps, _ = attention_maps(model, images())
    assert heads[0].q.dtype == torch.bfloat16
    for layer, p in zip(heads.values(), maps, strict=True):
        for name, value in expected_statistics(p, GRID[None]).items():
            assert layer.stats[name].dtype == torch.float32
            torch.testing.assert_close(layer.stats[name], value, rtol=0.05, atol=0.05, msg=name)
    (out.float().sum() + heads_loss(heads)).backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


def test_a_compiled_model_records_inside_and_only_inside():
    model = vit()
    expected = regularised_gradients(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for seed in (4, 5):
        plain = model(images(seed=seed))
        torch.testing.assert_close(compiled(images(seed=seed)), plain, rtol=1e-4, atol=1e-5)
        for positions in (GRID, GRID * 3):
            with record_heads(model, NAMES, num_prefix=PREFIX, positions=positions) as heads:
                compiled(images(seed=seed))
            maps, _ = attention_maps(model, images(seed=seed))
            for layer, p in zip(heads.values(), maps, strict=True):
                for name, value in expected_statistics(p, positions[None]).items():
                    torch.testing.assert_close(layer.stats[name], value, rtol=1e-4, atol=1e-5, msg=name)
    with record_heads(compiled, ["entropy", "distance"], num_prefix=PREFIX, positions=GRID) as heads:
        loss = compiled(images()).square().sum() + heads_loss(heads)
    model.zero_grad()
    loss.backward()
    assert_same_gradients(gradients(model), expected)


def test_distributed_data_parallel(tmp_path):
    from torch.nn.parallel import DistributedDataParallel

    if torch.distributed.is_initialized():
        pytest.skip("a process group is there already")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    model = vit()
    expected = regularised_gradients(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model)
        model.zero_grad()
        with record_heads(parallel, ["entropy", "distance"], num_prefix=PREFIX, positions=GRID) as heads:
            out = parallel(images())
        (out.square().sum() + heads_loss(heads)).backward()
        assert_same_gradients(gradients(model), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_the_result_is_that_of_a_capture():
    model = vit()
    with record_heads(model, ["entropy"], num_prefix=PREFIX) as recorded:
        model(images())
    with capture(model, ["entropy"], num_prefix=PREFIX) as captured:
        model(images())
    assert type(recorded) is type(captured) is RecordedHeads
    assert list(recorded) == list(captured) == [f"blocks.{number}.attn" for number in range(DEPTH)]
    for name, layer in recorded.items():
        assert layer is recorded[layer.index] and layer.describe() == captured[name].describe()
        assert torch.equal(layer.stats["entropy"], captured[name].stats["entropy"])
    assert recorded.table().splitlines() == captured.table().splitlines()[-DEPTH:]
    with pytest.raises(KeyError, match="'blocks.9' was not captured; captured: blocks.0.attn, "):
        recorded["blocks.9"]


def test_names_are_those_of_the_model_inside_its_wrappers():
    model = vit()
    names = [f"blocks.{number}.attn" for number in range(DEPTH)]
    for wrapped in (torch.compile(model, backend="eager"), torch.nn.DataParallel(model)):
        with torch.no_grad(), record_heads(wrapped, ["entropy"]) as heads:
            model(images())
        assert list(heads) == names
    with torch.no_grad(), record_heads([model.blocks[2], model.blocks[0].attn]) as heads:
        model(images())
    assert list(heads) == ["0.attn", "1"]
    with torch.no_grad(), record_heads(model.blocks[0].attn) as heads:
        model(images())
    assert list(heads) == ["Attention"]


def test_compiled_code_that_records_is_one_graph():
    model = vit()

    def recorded(x):
        with record_heads(model, ["entropy"], num_prefix=PREFIX, keep=("q", "lse", "output")) as heads:
            out = model(x)
        return out, heads.stats, heads[0].q, heads[0].lse, heads[0].output

    torch._dynamo.reset()
    compiled = torch.compile(recorded, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(images()), recorded(images()), rtol=1e-4, atol=1e-5)
