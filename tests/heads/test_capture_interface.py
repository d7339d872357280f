"""What capture takes, gives and refuses."""

import json
import re

import pytest
import torch
from torch import nn

import mimkernels
from mimkernels.heads import PRESETS, HeadStatistics, patch_grid_positions
from mimkernels.nn.recorder import _of_images
from mimkernels.nn.sdpa import AttentionCall
from mimkernels.ops import attention_rows
from tests.integrations import models as m

GIVEN = {"num_prefix": 1, "positions": (4, 4)}


def captured(model, stats, *inputs, **options):
    with torch.no_grad(), mimkernels.capture(model, stats, **options) as heads:
        model(*inputs)
    return heads


def test_two_calls_of_one_module_have_names_of_their_own():
    model, x, others = m.hand_written(), m.tokens(), m.tokens(length=9)
    heads = captured(model, ["entropy", "distance", "nmi"], x, others, **GIVEN)
    assert list(heads) == ["blocks.0", "blocks.0#1", "blocks.1", "blocks.1#1"]
    cross = heads["blocks.0#1"]
    assert (cross.index, cross.queries, cross.keys) == (1, 17, 9)
    assert cross.missing == dict.fromkeys(["distance", "nmi"], "cross-attention: 17 queries, 9 keys")
    assert cross.stats.keys() == {"entropy"} and cross.stats["entropy"].shape == (2, 3, 17)
    assert heads["blocks.0"].missing == {} and {"entropy", "distance"} <= heads["blocks.0"].stats.keys()
    assert [group.layers for group in heads.groups] == [(0, 2), (1, 3)]
    table = heads.table()
    assert "without distance, nmi: cross-attention: 17 queries, 9 keys" in table and "17 on 9 tokens" in table
    # All queries of cross-attention count: none is known to be a prefix token.
    torch.testing.assert_close(
        heads.groups[1].mean("entropy")[0].float(), cross.stats["entropy"].mean((0, 2)), rtol=1e-5, atol=1e-6
    )


def test_heads_of_cross_attention_differ_as_their_maps_do():
    """As those of pooling by attention: every query counts, and what is not of them is told to be missing."""
    model, x, others = m.hand_written(), m.tokens(), m.tokens(length=9)
    names = ["head_divergence", "nmi", "patch_head_divergence"]
    heads = captured(model, names, x, others, num_prefix=1, keep=("q", "k"))
    cross = heads["blocks.0#1"]
    assert cross.missing == dict.fromkeys(names[1:], "cross-attention: 17 queries, 9 keys")
    q, k = cross.q.double(), cross.k.double()
    log_p = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).log_softmax(-1)  # [B, H, N, 9]
    divergences = torch.stack(
        [(log_p.exp() * (log_p - log_p[:, [other]])).sum(-1).mean(-1) for other in range(3)]
    )  # [H, B, H]: from the others to one
    torch.testing.assert_close(
        heads.groups[1].mean("head_divergence")[0], divergences.sum(0).mean(0) / 2, rtol=1e-4, atol=1e-6
    )
    lse = torch.zeros(2, 3, 17)
    with pytest.raises(ValueError, match=r"k \[2, 3, 9, 16\] does not fit statistics of \[B, H, N\] = \[2, 3, 17\]"):
        HeadStatistics(quantities=["head_divergence", "sink_attention"]).update(0, {}, q=cross.q, k=cross.k, lse=lse)
    with pytest.raises(ValueError, match=r"k \[1, 3, 9, 16\] does not fit statistics of \[B, H, N\] = \[2, 3, 17\]"):
        HeadStatistics(quantities=["head_divergence"]).update(0, {}, q=cross.q, k=cross.k[:1], lse=lse)


def test_a_module_used_twice_has_two_layers_and_a_second_pass_has_more_images():
    block = m.HandWritten()
    model = nn.Sequential(block, block)
    with torch.no_grad(), mimkernels.capture(model, ["entropy"], num_prefix=1) as heads:
        model(m.tokens())
        model(m.tokens(batch=3))
    assert list(heads) == ["0", "0#1"]
    assert heads["0"].stats["entropy"].shape == (5, 3, 17) and heads.statistics.images == {0: 5, 1: 5}


def test_a_part_of_the_model_can_be_run():
    model = m.vit()
    with torch.no_grad(), mimkernels.capture(model, ["entropy"]) as heads:
        model.forward_features(m.images())
        model.blocks[1](m.tokens())
    assert heads.statistics.images == {0: 2, 1: 4}


@pytest.mark.parametrize(
    "layers, names",
    [
        (None, ["blocks.0", "blocks.0#1", "blocks.1", "blocks.1#1"]),
        (r"#1$", ["blocks.0#1", "blocks.1#1"]),
        (re.compile("blocks.1"), ["blocks.1", "blocks.1#1"]),
        (["blocks.1", 0], ["blocks.0", "blocks.1"]),
        ([2], ["blocks.1"]),
    ],
)
def test_layers_can_be_chosen(layers, names):
    model = m.hand_written()
    heads = captured(model, ["entropy"], m.tokens(), m.tokens(length=9), num_prefix=1, layers=layers)
    assert list(heads) == names
    everything = captured(model, ["entropy"], m.tokens(), m.tokens(length=9), num_prefix=1)
    for name in names:
        assert heads[name].index == everything[name].index
        assert torch.equal(heads[name].stats["entropy"], everything[name].stats["entropy"])


def test_layers_that_never_called_attention_are_named():
    with pytest.raises(
        RuntimeError, match="no layer 'blocks.7', 9 called attention; those that did: blocks.0, blocks.1"
    ):
        captured(m.hand_written(), ["entropy"], m.tokens(), num_prefix=1, layers=["blocks.0", "blocks.7", 9])
    with pytest.raises(RuntimeError, match="nothing was captured: no layer 'decoder' called attention"):
        captured(m.hand_written(), ["entropy"], m.tokens(), num_prefix=1, layers="decoder")


def test_accumulated_statistics_are_those_of_all_batches():
    model = m.hand_written()
    names = ["entropy", "distance", "head_divergence", "nmi"]
    with torch.no_grad(), mimkernels.capture(model, names, accumulate=True, **GIVEN) as heads:
        for seed in range(3):
            model(m.tokens(seed=seed))
    whole = captured(model, names, torch.cat([m.tokens(seed=seed) for seed in range(3)]), **GIVEN)
    assert heads["blocks.0"].stats == {} and heads.statistics.images == {0: 6, 1: 6}
    for name in names:
        torch.testing.assert_close(heads.statistics.mean(name), whole.statistics.mean(name), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(heads.statistics.std(name), whole.statistics.std(name), rtol=1e-3, atol=1e-5)


def test_presets_are_those_of_head_statistics():
    model = m.vit()
    heads = captured(model, ["park", "beyond_cls", "head_divergence"], m.images())
    seen = HeadStatistics(["park", "beyond_cls"], quantities=["head_divergence"], num_prefix=1)
    positions = PRESETS["park"].positions((4, 4), 8)
    inputs = []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(m.images())
        for number, (block, x) in enumerate(zip(model.blocks, inputs, strict=True)):
            q, k, v = block.attn.qkv(x).unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4).unbind(0)
            made = mimkernels.attention(q, k, v, num_prefix=1, positions=positions, stats=seen.row_stats)
            seen.update(number, made, q=q, k=k)
    assert heads.statistics.names == seen.names and heads.statistics.presets == ("park", "beyond_cls")
    for name in seen.names:
        torch.testing.assert_close(heads.statistics.mean(name), seen.mean(name), rtol=1e-5, atol=1e-6)


def test_windows_have_positions_of_their_own():
    heads = captured(m.swin(), ["distance"], m.images())
    given = captured(m.swin(), ["distance"], m.images(), positions=patch_grid_positions(4), num_prefix=0)
    for name, layer in heads.items():
        assert layer.keys == 16 and torch.equal(layer.stats["distance"], given[name].stats["distance"])
    # 4 windows per image in the first stage, one in the second.
    assert [layer.windows for layer in heads.values()] == [4, 4, 1, 1]


def test_an_image_in_windows_counts_once():
    heads = captured(m.swin(), ["entropy", "peak"], m.images())
    sums = captured(m.swin(), ["entropy", "peak"], m.images(), accumulate=True)
    assert set(heads.statistics.images.values()) == set(sums.statistics.images.values()) == {2}
    for name in ("entropy", "peak"):
        for number, layer in enumerate(heads.values()):
            images = layer.stats[name].double().mean(-1).unflatten(0, (2, layer.windows)).mean(1)
            for statistics in (heads.statistics, sums.statistics):
                torch.testing.assert_close(statistics.mean(name)[number], images.mean(0))


def test_positions_can_be_given_per_image():
    model = m.hand_written()
    x, grid = m.tokens(length=6), patch_grid_positions(4)
    ids = torch.tensor([[0, 3, 5, 9, 11], [1, 2, 7, 8, 15]])
    both = captured(model, ["distance"], x, num_prefix=1, positions=grid[ids])
    for image in range(2):
        one = captured(model, ["distance"], x[image : image + 1], num_prefix=1, positions=grid[ids[image]])
        torch.testing.assert_close(both[0].stats["distance"][image], one[0].stats["distance"][0], rtol=1e-5, atol=1e-6)


def test_units():
    model = m.vit()
    rows = {unit: captured(model, ["distance"], m.images(), unit=unit)[0].stats["distance"] for unit in (None, "pixel")}
    torch.testing.assert_close(rows["pixel"], 8 * rows[None], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="pixels of 4 x 4 patches need the patch size"):
        captured(m.hand_written(), ["distance"], m.tokens(), unit="pixel", **GIVEN)


def test_the_result_as_table_picture_and_data(tmp_path):
    pytest.importorskip("matplotlib")
    heads = captured(m.hand_written(), ["entropy", "distance"], m.tokens(), m.tokens(length=9), **GIVEN)
    data = json.loads(json.dumps(heads.to_dict()))
    assert [layer["name"] for layer in data["layers"]] == list(heads)
    again = HeadStatistics.from_dict(data["statistics"][0])
    assert torch.equal(again.mean("distance"), heads.statistics.mean("distance"))
    assert "entropy (nats)" in heads.table() and "blocks.0#1" in heads.table()
    assert len(heads.plot("entropy").axes) == 2 and len(heads.plot("distance").axes) == 1
    heads.plot().savefig(tmp_path / "heads.png")
    assert (tmp_path / "heads.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="no layer has 'peak'; captured: entropy, distance"):
        heads.plot("peak")
    with pytest.raises(KeyError, match="'blocks.9' was not captured; captured: blocks.0, "):
        heads["blocks.9"]


def test_attention_that_stores_its_map_is_told_of():
    model = nn.Sequential(m.PlainAttention(), nn.Identity())
    message = r"(?s)ran without calling.*\n  0 \(PlainAttention\): it computes a softmax of \[2, 3, 17, 17\] itself"
    with pytest.raises(RuntimeError, match=message):
        captured(model, ["entropy"], m.tokens(), num_prefix=1)
    mixed = nn.Sequential(m.PlainAttention(), m.HandWritten())
    heads = captured(mixed, ["entropy"], m.tokens(), num_prefix=1)
    assert list(heads) == ["1"] and list(heads.missed) == ["0"]
    assert "not captured: 0: it computes a softmax of [2, 3, 17, 17] itself" in heads.table()


def test_models_of_other_libraries_that_store_their_maps_are_told_of():
    with pytest.raises(RuntimeError, match=r"features.1.0.attn \(ShiftedWindowAttention\): it computes a softmax"):
        captured(m.torchvision_swin(), ["entropy"], m.images(), num_prefix=0)
    eager = m.transformers_model("Data2VecVisionModel", "Data2VecVisionConfig", attention="eager")
    with pytest.raises(RuntimeError, match="built with attn_implementation='eager'"):
        captured(eager, ["entropy"], m.images())


def test_models_without_attention_are_told_of():
    model = nn.Linear(48, 48)
    with pytest.raises(RuntimeError, match="nothing in it looked like attention"):
        captured(model, ["entropy"], m.tokens(), num_prefix=1)
    with (
        pytest.raises(RuntimeError, match="Linear did not run inside capture"),
        mimkernels.capture(model, ["entropy"], num_prefix=1),
    ):
        pass


@pytest.mark.parametrize(
    "stats, options, message",
    [
        (["entropie"], {}, "unknown statistic 'entropie'; known: entropy,.*presets: dosovitskiy"),
        ([], {}, "at least one statistic"),
        (["cls_magnitude"], {}, "cls_magnitude is of tokens outside attention"),
        (["entropy"], {"num_prefix": "auto"}, "num_prefix of Stack is not known.*num_prefix=1"),
        (["distance"], {}, r"positions of Stack is not known.*positions=\(14, 14\)"),
        (["entropy"], {"num_prefix": -1}, "num_prefix must be.*got -1"),
        (["distance"], {"positions": "grid"}, "positions must be.*got 'grid'"),
        (["entropy"], {"layers": [-1]}, "layers must be names, numbers from 0.*got -1"),
        (["entropy"], {"accumulate": True, "differentiable": True}, "accumulate=True keeps no rows"),
    ],
)
def test_bad_arguments_are_refused_at_once(stats, options, message):
    with pytest.raises(ValueError, match=message):
        mimkernels.capture(m.hand_written(), stats, **{"num_prefix": 1, **options})


def test_only_modules_are_taken():
    with pytest.raises(TypeError, match="takes a module, got function"):
        mimkernels.capture(lambda x: x, ["entropy"])


@pytest.mark.parametrize(
    "length, options, message",
    [
        (18, GIVEN, r"blocks.0: 18 tokens, but 1 prefix tokens \+ 4 x 4 patches are 17"),
        (
            17,
            {"num_prefix": 2, "positions": (4, 4)},
            r"blocks.0: 17 tokens, but 2 prefix tokens \+ 4 x 4 patches are 18",
        ),
        (17, {"num_prefix": 1, "positions": torch.zeros(9, 2)}, r"17 tokens of 2 images, 1.*positions are \[9, 2\]"),
        (17, {"num_prefix": 1, "positions": torch.zeros(3, 16, 2)}, r"of 2 images.*positions are \[3, 16, 2\]"),
        (5, {"num_prefix": 6, "positions": (4, 4)}, "5 tokens, but num_prefix is 6"),
    ],
)
def test_tokens_that_do_not_fit_are_refused_and_nothing_stays_behind(length, options, message):
    model = m.hand_written()
    with pytest.raises(ValueError, match=message):
        captured(model, ["distance"], m.tokens(length=length), **options)
    assert torch.backends.mha.get_fastpath_enabled() and not nn.modules.module._global_forward_hooks
    captured(model, ["distance"], m.tokens(), **GIVEN)


def test_errors_of_the_model_pass_and_leave_nothing_behind():
    model = m.swin()
    fused = [part.fused_attn for part in model.modules() if hasattr(part, "fused_attn")]
    with pytest.raises(AssertionError, match="Input width"), mimkernels.capture(model, ["entropy"]):
        model(m.images()[..., :20])
    assert [part.fused_attn for part in model.modules() if hasattr(part, "fused_attn")] == fused
    assert not nn.modules.module._global_forward_hooks and not nn.modules.module._global_forward_pre_hooks
    assert mimkernels.nn.sdpa.observers() == ()
    captured(model, ["entropy"], m.images())


def test_a_capture_is_entered_once():
    model = m.hand_written()
    once = mimkernels.capture(model, ["entropy"], num_prefix=1)
    with once:
        model(m.tokens())
    with pytest.raises(RuntimeError, match="used before"), once:
        pass


def test_q_and_k_are_kept_of_some_images_with_all_their_windows():
    model, x = m.swin(), m.images()
    with torch.no_grad(), mimkernels.capture(model, ["entropy"], accumulate=True, keep=("q", "k", "lse")) as heads:
        model(x)
        whole = [(layer.q, layer.k, layer.lse, layer.options, layer.windows) for layer in heads.values()]
        heads.kept_images = [1]
        model(x)
        for layer, (q, k, lse, options, windows) in zip(heads.values(), whole, strict=True):
            own = slice(windows, 2 * windows)
            assert torch.equal(layer.lse, lse[own]) and layer.q.untyped_storage().nbytes() == layer.q.nbytes
            rows = attention_rows(layer.q, layer.k, [0, 3], **layer.options)
            torch.testing.assert_close(rows, attention_rows(q, k, [0, 3], **options)[own])
        heads.kept_images = []
        model(x)
        assert all(len(layer.q) == 0 for layer in heads.values())
    assert set(heads.statistics.images.values()) == {3 * len(x)}


@pytest.mark.parametrize("windows", [1, 2])
def test_images_that_are_kept_keep_their_masks(windows):
    generator = torch.Generator().manual_seed(0)
    images = 4
    q, k, v = torch.randn(3, images * windows, 2, 5, 8, generator=generator)
    bias = torch.randn(images * windows, 1, 5, 5, generator=generator)
    visible = torch.rand(images * windows, 5, generator=generator) < 0.8
    call = AttentionCall(q, k, v, bias, visible, 0.3, (images * windows, 2))
    chosen, _ = _of_images([3, 1], windows, call, call.compute())
    wanted = attention_rows(q, k, range(5), **call.options).unflatten(0, (images, windows))[[3, 1]].flatten(0, 1)
    torch.testing.assert_close(attention_rows(chosen.q, chosen.k, range(5), **chosen.options), wanted)
