"""MAE's attention: timm's numbers either way, and statistics of the encoder's heads over the visible patches."""

import os

import pytest
import torch

pytest.importorskip("timm")
from timm.layers import Attention as TimmAttention

from mimkernels.heads import record_heads, regularization_loss
from mimkernels.models import MAE
from mimkernels.nn import Attention

HEADS, DEPTH = 3, 2
SMALL = {
    "img_size": (32, 48),
    "patch_size": 8,
    "embed_dim": 48,
    "depth": DEPTH,
    "num_heads": HEADS,
    "reg_tokens": 1,
    "decoder_dim": 32,
    "decoder_depth": 2,
    "decoder_heads": 4,
    "mask_ratio": 0.6,
}
NAMES = ("entropy", "distance", "prefix_mass", "self_mass", "patch_entropy")
PREFIX, KEEP = 2, 9


def build(seed=0, **overrides):
    torch.manual_seed(seed)
    model = MAE.from_timm("vit_tiny_patch16_224", **{**SMALL, **overrides})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batch(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 3, 32, 48, generator=generator), torch.rand(3, 24, generator=generator)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same_gradients(ours, expected, rtol=1e-3):
    for name, grad in ours.items():
        atol = 1e-4 * float(expected[name].abs().max()) + 1e-7
        torch.testing.assert_close(grad, expected[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def attention_maps(model, images, noise):
    """The encoder's attention ``[B, H, P + K, P + K]`` per block, from what goes into its projection."""
    maps = []

    def keep(layer, args):
        q, k, _ = layer.qkv(args[0]).reshape(3, PREFIX + KEEP, 3, HEADS, 16).permute(2, 0, 3, 1, 4)
        maps.append((q @ k.transpose(-2, -1) / 4).softmax(-1))

    hooks = [block.attn.register_forward_pre_hook(keep) for block in model.encoder.blocks]
    out = model(images, noise=noise)
    for hook in hooks:
        hook.remove()
    return maps, out


def expected_statistics(p, ids):
    mass = p[..., PREFIX:].sum(-1)
    over_patches = p[..., PREFIX:] / mass[..., None]
    apart = torch.zeros(p.shape[0], p.shape[2], p.shape[2])
    for image, visible in enumerate(ids.tolist()):
        for i, a in enumerate(visible):
            for j, b in enumerate(visible):
                apart[image, PREFIX + i, PREFIX + j] = ((a // 6 - b // 6) ** 2 + (a % 6 - b % 6) ** 2) ** 0.5
    return {
        "entropy": -(p * p.log()).sum(-1),
        "distance": (p * apart[:, None]).sum(-1),
        "prefix_mass": p[..., :PREFIX].sum(-1),
        "self_mass": p.diagonal(dim1=-2, dim2=-1),
        "patch_entropy": -(over_patches * over_patches.log()).sum(-1),
    }


def test_both_attentions_give_the_same_model():
    ours, timm_s = build(), build(attention="timm")
    layers = [block.attn for block in [*ours.encoder.blocks, *ours.decoder_blocks]]
    assert all(type(layer) is Attention for layer in layers)
    assert all(type(block.attn) is TimmAttention for block in [*timm_s.encoder.blocks, *timm_s.decoder_blocks])
    assert list(ours.state_dict()) == list(timm_s.state_dict())
    timm_s.load_state_dict(ours.state_dict())
    images, noise = batch()
    a, b = ours(images, noise=noise), timm_s(images, noise=noise)
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-5, atol=0)
    assert_same_gradients(gradients(ours, a.loss), gradients(timm_s, b.loss))


def test_config_remembers_the_attention():
    for attention in ("mimkernels", "timm"):
        model = build(attention=attention)
        assert model.config["attention"] == attention
        assert type(MAE.from_config(model.config).encoder.blocks[0].attn) is type(model.encoder.blocks[0].attn)
    old = {name: value for name, value in build().config.items() if name != "attention"}
    assert type(MAE.from_config(old).decoder_blocks[0].attn) is Attention
    with pytest.raises(ValueError, match="attention must be one of mimkernels, timm, got 'flash'"):
        build(attention="flash")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient checkpointing"])
def test_head_statistics_are_those_of_the_visible_patches_maps(checkpointing):
    model = build()
    model.set_grad_checkpointing(checkpointing)
    images, noise = batch()
    out = model(images, noise=noise, head_stats=NAMES)
    ours = gradients(model, out.loss + sum(layer[name].mean() for layer in out.head_stats for name in NAMES))
    model.set_grad_checkpointing(False)
    maps, expected_out = attention_maps(model, images, noise)
    assert torch.equal(out.mask.ids_keep, expected_out.mask.ids_keep)
    torch.testing.assert_close(out.loss, expected_out.loss, rtol=1e-6, atol=0)
    expected = [expected_statistics(p, out.mask.ids_keep) for p in maps]
    assert len(out.head_stats) == DEPTH
    for layer, theirs in zip(out.head_stats, expected, strict=True):
        assert tuple(layer) == NAMES
        for name, value in layer.items():
            assert value.shape == (3, HEADS, PREFIX + KEEP) and value.dtype == torch.float32
            torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5, msg=name)
    loss = expected_out.loss + sum(layer[name].mean() for layer in expected for name in NAMES)
    assert_same_gradients(ours, gradients(model, loss))


def test_statistics_are_made_only_where_asked_for():
    model = build()
    images, noise = batch()
    assert model(images, noise=noise).head_stats is None
    out = model(images, noise=noise, head_stats=["entropy"])
    assert [list(layer) for layer in out.head_stats] == [["entropy"]] * DEPTH
    assert model(images, noise=noise).head_stats is None
    assert torch.equal(out.loss, model(images, noise=noise).loss)
    for arguments, message in (
        ({"head_stats": ["entropi"]}, "unknown 'entropi' in stats"),
        ({"head_stats": ["entropy"]}, "call use_mimkernels_attention"),
    ):
        with pytest.raises(ValueError, match=message):
            (build(attention="timm") if "entropy" in arguments["head_stats"] else model)(images, **arguments)


def test_the_decoder_s_heads_can_be_recorded_too():
    model = build()
    images, noise = batch()
    with record_heads(model.decoder_blocks, ["entropy"], num_prefix=PREFIX) as heads:
        out = model(images, noise=noise, head_stats=["entropy"])
    assert [layer["entropy"].shape for layer in heads.stats] == [(3, 4, PREFIX + 24)] * 2
    with pytest.raises(RuntimeError, match="cannot be nested"):
        with record_heads(model, ["entropy"]):
            model(images, noise=noise, head_stats=["entropy"])
    assert torch.equal(model(images, noise=noise).loss, out.loss)


def test_statistics_of_a_dynamic_image_size():
    model = build(dynamic_img_size=True)
    images = torch.randn(2, 3, 40, 24)
    ids = torch.tensor([[0, 4, 14], [5, 1, 2]])
    assert model.patch_positions(images, ids).tolist() == [[[0, 0], [1, 1], [4, 2]], [[1, 2], [0, 1], [0, 2]]]
    assert model(images, head_stats=["distance"]).head_stats[0]["distance"].isfinite().all()


@pytest.mark.parametrize("weight", [1.0, -1.0], ids=["lowered", "raised"])
def test_a_term_in_the_loss_moves_the_heads(weight):
    model = build()
    images, noise = batch()
    optimizer = torch.optim.SGD(model.encoder.parameters(), lr=0.1)
    seen = []
    for _ in range(5):
        out = model(images, noise=noise, head_stats=["distance"])
        loss = regularization_loss({"distance": weight}, out.head_stats, num_prefix=PREFIX)
        seen.append(weight * float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert weight * (seen[-1] - seen[0]) < -1e-3, seen


def test_compiles_into_one_graph_with_statistics():
    model = build(depth=1, decoder_depth=1)
    images, noise = batch()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for names in (["entropy", "distance"], (), ["entropy", "distance"]):
        expected = model(images, noise=noise, head_stats=names)
        out = compiled(images, noise=noise, head_stats=names)
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=0)
        if not names:
            assert out.head_stats is None
            continue
        torch.testing.assert_close(out.head_stats, expected.head_stats, rtol=1e-4, atol=1e-5)
        terms = [regularization_loss({"entropy": 1.0, "distance": 0.5}, o.head_stats) for o in (out, expected)]
        ours, theirs = (gradients(model, o.loss + term) for o, term in zip((out, expected), terms, strict=True))
        assert_same_gradients(ours, theirs)


def test_statistics_through_distributed_data_parallel(tmp_path):
    from torch.nn.parallel import DistributedDataParallel

    if torch.distributed.is_initialized():
        pytest.skip("a process group is there already")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    model = build()
    images, noise = batch()
    weights = {"entropy": 1.0, "distance": 0.5}

    def loss_of(run):
        out = run(images, noise=noise, head_stats=list(weights))
        return out.loss + regularization_loss(weights, out.head_stats, num_prefix=PREFIX)

    expected = gradients(model, loss_of(model))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for options in ({}, {"find_unused_parameters": True}):
            parallel = DistributedDataParallel(model, **options)
            assert_same_gradients(gradients(model, loss_of(parallel)), expected)
    finally:
        torch.distributed.destroy_process_group()
