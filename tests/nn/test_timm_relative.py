"""timm's attention with relative position biases on mimkernels.attention: BEiT, Swin and Swin V2."""

import copy
import math
import pickle

import pytest
import torch

pytest.importorskip("timm")
import timm
from timm.models.beit import Attention as TimmBeit
from timm.models.swin_transformer import SwinTransformerBlock, window_partition
from timm.models.swin_transformer import WindowAttention as TimmSwin
from timm.models.swin_transformer_v2 import WindowAttention as TimmSwinV2

import mimkernels
from mimkernels.heads import capture, normalized_entropy, record_heads, region_entropy
from mimkernels.nn import use_mimkernels_attention
from mimkernels.nn.relative import BeitAttention, BiasTable
from mimkernels.nn.windows import Windows
from mimkernels.testing import Watch

HEADS, WINDOW, COUNT = 3, (4, 2), 4  # a window of 4 x 2 tokens, 4 of them per image


def shift_mask():
    """As timm makes it for an image of 4 windows, of which three are wrapped."""
    block = SwinTransformerBlock(8, (8, 4), num_heads=1, window_size=WINDOW, shift_size=(2, 1))
    return block.attn_mask


def livelier(module):
    with torch.no_grad():  # what starts at zero hides what it multiplies
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module


def beit(**options):
    torch.manual_seed(0)
    return livelier(TimmBeit(48, HEADS, **{"qkv_bias": True, "window_size": WINDOW, **options}))


def swin(**options):
    torch.manual_seed(0)
    return livelier(TimmSwin(48, HEADS, window_size=WINDOW, **options))


def swin_v2(**options):
    torch.manual_seed(0)
    made = livelier(TimmSwinV2(48, WINDOW, HEADS, **options))
    with torch.no_grad():
        made.logit_scale[1] = 5.0  # above ln 100: counts as that, and gets no gradient
    return made


def shared():
    return torch.randn(HEADS, 9, 9, generator=torch.Generator().manual_seed(3))


# A layer, its tokens, and what its forward gets besides.
LAYERS = {
    "beit": (beit, 9, dict),
    "beit, no biases": (lambda: beit(qkv_bias=False), 9, dict),
    "beit, bias apart": (lambda: beit(qkv_bias_separate=True), 9, dict),
    "beit, shared bias": (lambda: beit(window_size=None), 9, lambda: {"shared_rel_pos_bias": shared()}),
    "beit, both biases": (beit, 9, lambda: {"shared_rel_pos_bias": shared()}),
    "swin": (swin, 8, dict),
    "swin, shifted": (swin, 8, lambda: {"mask": shift_mask()}),
    "swin, wide heads": (lambda: swin(head_dim=24, qkv_bias=False), 8, lambda: {"mask": shift_mask()}),
    "swin v2": (swin_v2, 8, dict),
    "swin v2, shifted": (swin_v2, 8, lambda: {"mask": shift_mask()}),
    "swin v2, no biases": (lambda: swin_v2(qkv_bias=False), 8, lambda: {"mask": shift_mask()}),
    "swin v2, bias apart": (lambda: swin_v2(qkv_bias_separate=True), 8, dict),
}
ONE_OF_EACH = ("beit", "swin, shifted", "swin v2, shifted")
layers = pytest.mark.parametrize("kind", ONE_OF_EACH)


def tokens(length, batch=2 * COUNT):
    return torch.randn(batch, length, 48, generator=torch.Generator().manual_seed(1))


def ours_of(module):
    module = copy.deepcopy(module)
    assert use_mimkernels_attention(module) == [module]
    return module


def run(module, x, **arguments):
    """Output, and gradients of the input, of a shared bias and of all parameters."""
    module, x = copy.deepcopy(module).to(x.dtype), x.clone().requires_grad_()
    arguments = {name: value.to(x.dtype, copy=True) for name, value in arguments.items()}
    if "shared_rel_pos_bias" in arguments:
        arguments["shared_rel_pos_bias"].requires_grad_()
    out = module(x, **arguments)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out))
    bias = arguments.get("shared_rel_pos_bias")
    made = {"out": out.detach(), "x": x.grad, **({} if bias is None else {"bias": bias.grad})}
    return {**made, **{name: parameter.grad for name, parameter in module.named_parameters()}}


@pytest.mark.parametrize("kind", LAYERS)
def test_output_and_gradients_are_timm_s(kind):
    build, length, arguments = LAYERS[kind]
    plain, x = build(), tokens(length)
    ours, theirs = run(ours_of(plain), x, **arguments()), run(plain, x, **arguments())
    exact = run(plain, x.double(), **arguments())
    assert ours.keys() == theirs.keys() == exact.keys()
    for name, value in ours.items():
        assert value.dtype == torch.float32 and value.shape == theirs[name].shape
        allowed = 2 * (theirs[name].double() - exact[name]).abs().max()
        allowed = allowed + 16 * torch.finfo(torch.float32).eps * exact[name].abs().max()
        error = (value.double() - exact[name]).abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
    if kind.startswith("swin v2"):
        assert ours["logit_scale"][1] == 0 and ours["logit_scale"][0] != 0


def test_a_shared_table_is_the_bias_that_it_makes():
    own = beit()
    table = BiasTable(*(t.detach().clone() for t in (own.relative_position_bias_table, own.relative_position_index)))
    for plain in (beit(window_size=None), beit()):
        ours = ours_of(plain)
        got = ours(tokens(9), shared_rel_pos_bias=table)
        torch.testing.assert_close(got, plain(tokens(9), shared_rel_pos_bias=table.expanded()), rtol=1e-4, atol=1e-5)
        ours.fused_attn = False  # timm's own code gets the bias
        assert torch.equal(
            ours(tokens(9), shared_rel_pos_bias=table),
            told(plain, False)(tokens(9), shared_rel_pos_bias=table.expanded()),
        )


def told(module, fused):
    module.fused_attn = fused
    return module


@layers
def test_no_bias_is_made_for_images_or_windows(kind):
    """In forward and backward, nothing is as large as the mask and table together would be, [nW, H, N, N]."""
    build, length, arguments = LAYERS[kind]
    if mimkernels.ops._registry.backend_in_force() == "reference":
        pytest.skip("plain PyTorch makes the matrix")
    ours, x = ours_of(build()), tokens(length, 16 * COUNT).requires_grad_()

    def matrices(op, args):
        return next((a.shape for a in args if isinstance(a, torch.Tensor) and a.shape[-2:] == (length, length)), None)

    with Watch(matrices) as watch:
        ours(x, **arguments()).sum().backward()
    assert all(math.prod(shape) <= COUNT * length * length for shape in watch.seen)


@layers
def test_dropout_of_attention_in_training_is_timm_s(kind):
    build, length, arguments = LAYERS[kind]
    plain = build(attn_drop=0.4, proj_drop=0.2)
    made = []
    for module in (plain, ours_of(plain)):
        torch.manual_seed(5)
        made.append(module(tokens(length), **arguments()))
    assert torch.equal(*made)
    ours = ours_of(plain)
    with pytest.raises(RuntimeError, match=r"cannot be recorded under attention dropout \(attn_drop = 0.4\)"):
        with record_heads(ours, ["entropy"]):
            ours(tokens(length), **arguments())


@layers
def test_autocast_gives_timm_s_dtype_and_values(kind):
    build, length, arguments = LAYERS[kind]
    plain, x = build(), tokens(length)
    ours = ours_of(plain)
    with torch.autocast("cpu", torch.bfloat16):
        made, theirs = ours(x, **arguments()), plain(x, **arguments())
    assert made.dtype == theirs.dtype == torch.bfloat16
    exact = plain.double()(x.double(), **{name: value.double() for name, value in arguments().items()})
    errors = [(out.double() - exact).abs().max() for out in (made, theirs)]
    assert errors[0] <= 1.5 * errors[1] + torch.finfo(torch.bfloat16).eps * exact.abs().max()


@layers
def test_layers_compile_whole(kind):
    torch._dynamo.reset()
    build, length, arguments = LAYERS[kind]
    ours, given = ours_of(build()), arguments()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens(length), **given), ours(tokens(length), **given))


@layers
def test_copies_pickles_and_names_stay(kind):
    build, length, arguments = LAYERS[kind]
    plain = build()
    ours = ours_of(plain)
    assert repr(ours) == repr(plain) and list(ours.state_dict()) == list(plain.state_dict())
    again = pickle.loads(pickle.dumps(ours))
    assert type(again) is type(ours)
    assert torch.equal(again(tokens(length), **arguments()), ours(tokens(length), **arguments()))


def test_hooks_on_the_matrix_of_swin_v2_see_it():
    plain, seen = swin_v2(), []
    ours = ours_of(plain)
    handle = ours.attn_drop.register_forward_hook(lambda *args: seen.append(args[2]))
    assert torch.equal(ours(tokens(8)), plain(tokens(8))) and seen[0].shape == (8, HEADS, 8, 8)
    handle.remove()
    ours(tokens(8))
    assert len(seen) == 1


@pytest.mark.parametrize("build", [swin, swin_v2])
def test_masks_that_do_not_fit_are_refused(build):
    ours = ours_of(build())
    with pytest.raises(ValueError, match=r"mask \[4, 8, 8\] must be \[nW, N, N\], nW a divisor of the 6 windows"):
        ours(tokens(8, 6), mask=shift_mask())
    with pytest.raises(ValueError, match=r"bias \[4, 1, 9, 9\] must be"):
        ours(tokens(8), mask=torch.zeros(4, 9, 9))


# Windows of the image's grid


@pytest.mark.parametrize("grid", [(8, 4), (6, 6), (7, 5), (4, 2), (3, 9)])
@pytest.mark.parametrize("shift", [(0, 0), (2, 1), (1, 0)])
def test_windows_hold_the_tokens_that_timm_puts_there(grid, shift):
    windows = Windows(grid, WINDOW, shift)
    (rows, columns), (height, width) = windows.padded, grid
    places = torch.arange(rows)[:, None] * columns + torch.arange(columns)
    rolled = places.clone()  # padding stays where it is
    rolled[:height, :width] = places[:height, :width].roll([-step for step in shift], (0, 1))
    wanted = window_partition(rolled[None, ..., None], WINDOW).flatten(1)
    inside = (wanted // columns < height) & (wanted % columns < width)
    ids = windows.ids()
    assert ids.shape == wanted.shape == (windows.number, 8)
    assert torch.equal(ids[inside], wanted[inside]) and sorted(ids.flatten().tolist()) == list(range(rows * columns))
    assert torch.equal(windows.positions().long() @ torch.tensor([columns, 1]), ids)


def two_windows(shift, vertical=0.0, embed_dim=8):
    """A Swin block of 4 x 2 tokens in two windows of 2 x 2, all of whose keys are alike but by their place."""
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=(16, 8), window_size=2, embed_dim=embed_dim, depths=(2,),
        num_heads=(1,), num_classes=0,
    )  # fmt: skip
    for block in model.layers[0].blocks:
        block.attn.qkv.weight.data.zero_()
        block.attn.relative_position_bias_table.data.zero_()
        # Of offsets (dy + 1) * 3 + dx + 1: one up and one down.
        block.attn.relative_position_bias_table.data[[1, 7]] = vertical
    return model


def captured_in_two_windows(vertical=0.0):
    model = two_windows((1, 0), vertical).eval()
    with capture(model, ["distance", "entropy", "normalized_entropy", "nmi"]) as heads:
        model(torch.randn(1, 3, 16, 8))
    return heads


def test_distances_and_entropies_of_two_windows_by_hand():
    heads = captured_in_two_windows()
    plain, shifted = (layer.stats for layer in heads.values())  # [2 windows, 1 head, 4 tokens]
    near = (2 + math.sqrt(2)) / 4
    torch.testing.assert_close(plain["distance"], torch.full((2, 1, 4), near))
    torch.testing.assert_close(plain["entropy"], torch.full((2, 1, 4), math.log(4)))
    # Rows 1 and 2 are a whole window; rows 3 and 0, which lie at both ends of the image, are cut from each other.
    torch.testing.assert_close(shifted["distance"], torch.tensor([near, 0.5])[:, None, None].expand(2, 1, 4))
    entropies = torch.tensor([math.log(4), math.log(2)])[:, None, None].expand(2, 1, 4)
    torch.testing.assert_close(shifted["entropy"], entropies)
    # As even as it can be, of the keys that are there; which half of the window it is, the mask alone tells.
    statistics = heads.statistics
    assert list(statistics.images.values()) == [1, 1] and [layer.windows for layer in heads.values()] == [2, 2]
    torch.testing.assert_close(statistics.mean("normalized_entropy"), torch.ones(2, 1).double())
    torch.testing.assert_close(statistics.mean("nmi"), torch.zeros(2, 1).double(), atol=1e-6, rtol=0)


def test_what_the_mask_cuts_off_is_not_far():
    """All attend to the token above or below; where that was cut off, evenly to the two that are left."""
    heads = captured_in_two_windows(vertical=40.0)
    plain, shifted = (layer.stats["distance"] for layer in heads.values())
    torch.testing.assert_close(plain, torch.ones(2, 1, 4))
    torch.testing.assert_close(shifted, torch.tensor([1.0, 0.5])[:, None, None].expand(2, 1, 4))


def test_masks_that_cut_no_regions_tell_nothing():
    causal = torch.zeros(4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), float("-inf"))
    halves = torch.tensor([[0.0, -100.0], [-100.0, 0.0]]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    bias = torch.stack((causal, halves, torch.randn(4, 4), torch.full((4, 4), -100.0)))[:, None]
    torch.testing.assert_close(region_entropy(bias)[:, 0], torch.tensor([0, math.log(2), 0, 0]).double())
    ones = normalized_entropy(torch.ones(8, 2, 4), bias)
    assert ones.shape == (8, 2, 4) and torch.equal(ones[0, 0], ones[4, 1])
    torch.testing.assert_close(ones[0, 0], torch.tensor([0, *(1 / math.log(n) for n in (2, 3, 4))]))
    key_mask = torch.tensor([[True, True, True, False]]).repeat(4, 1)
    torch.testing.assert_close(
        normalized_entropy(torch.ones(4, 1, 4), key_mask=key_mask)[0, 0, 0], 1 / torch.tensor(3.0).log()
    )
    torch.testing.assert_close(normalized_entropy(torch.ones(4, 1, 4), bias, key_mask)[1, 0, 2:], torch.zeros(2))


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_heads_are_recorded_as_they_are_captured(name):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}
    model = livelier(timm.create_model(name, num_classes=0, **sizes)).eval()
    images = torch.randn(2, 3, 32, 32)
    names = ["entropy", "distance"]
    with capture(model, names) as seen:
        out = model(images)
    torch.testing.assert_close(out, model(images), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(part, BeitAttention) or hasattr(part, "_recorder") for part in model.modules())
    use_mimkernels_attention(model)
    with record_heads(model, names, keep=("q", "k", "lse")) as heads:
        model(images)
    assert [layer.stats["entropy"].shape for layer in heads.values()] == [(32, 2, 16)] * 2 + [(8, 2, 16)] * 2
    for ours, other in zip(heads.values(), seen.values(), strict=True):
        for statistic in names:
            torch.testing.assert_close(ours.stats[statistic], other.stats[statistic])
        p = mimkernels.attention_rows(ours.q, ours.k, range(16), **ours.options)
        entropy = torch.special.entr(p).sum(-1)
        torch.testing.assert_close(ours.stats["entropy"], entropy, rtol=1e-4, atol=1e-4)


MODELS = {
    "beit_base_patch16_224": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
    "swin_tiny_patch4_window7_224": {
        "patch_size": 4,
        "window_size": 4,
        "embed_dim": 16,
        "depths": (2,),
        "num_heads": (2,),
    },
    "swinv2_tiny_window8_256": {"patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (2,), "num_heads": (2,)},
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_checkpointed_passes_are_captured_and_repeated_by_timm_s_code(name, fused):
    torch.manual_seed(0)
    model = livelier(timm.create_model(name, num_classes=0, img_size=32, **MODELS[name]))
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = fused
    before = [(type(part), dict(part.__dict__)) for part in model.modules()]
    with capture(model, ["entropy"]) as wanted:
        model(tokens_of_images())
    model.set_grad_checkpointing()
    with capture(model, ["entropy"]) as heads:
        out = model(tokens_of_images())
    out.sum().backward()  # when the capture is over
    model.set_grad_checkpointing(False)
    assert [(type(part), part.__dict__) for part in model.modules()] == before
    assert len(heads) == len(wanted) == sum(hasattr(part, "attn_drop") for part in model.modules())
    for layer in heads.values():
        torch.testing.assert_close(layer.stats["entropy"], wanted[layer.name].stats["entropy"], rtol=1e-4, atol=1e-4)


def tokens_of_images():
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(4))


def test_images_of_another_size_have_the_windows_of_theirs():
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(2, 1),
        num_heads=(2, 2), num_classes=0, strict_img_size=False,
    ).eval()  # fmt: skip
    images = torch.randn(2, 3, 32, 64)
    with capture(model, ["distance"], unit="pixel") as heads:
        model(images)
    assert [len(layer.stats["distance"]) for layer in heads.values()] == [64, 64, 16]
    use_mimkernels_attention(model)
    with record_heads(model, ["distance"]) as recorded:
        model(images)
    for layer, pixels in zip(recorded.values(), (2, 2, 4), strict=True):  # merged patches are 4 pixels wide
        torch.testing.assert_close(pixels * layer.stats["distance"], heads[layer.name].stats["distance"])
