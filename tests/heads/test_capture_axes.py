"""Heads and windows that have no axis of ``[B, H, N, D]`` are found where the layer says how many heads it has."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mimkernels
from mimkernels.heads import ablate
from mimkernels.heads.arrange import arranged
from mimkernels.nn.sdpa import SDPAArguments, as_attention
from tests.heads.test_capture_layout import images
from tests.integrations import models as m

NAMES = ["entropy", "head_divergence", "peak"]


class Layer(nn.Module):
    """Calls attention on tensors as they are given."""

    def __init__(self, **numbers):
        super().__init__()
        vars(self).update(numbers)

    def forward(self, q, k, v, mask=None):
        return F.scaled_dot_product_attention(q, k, v, mask)


def qkv(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*sizes, 7, 16, generator=generator) for _ in range(3)]


def heads_last(tensor, axis):
    """``[B, *, H, *]`` with heads behind whatever else images are cut into, as ``[images and windows, H, N, D]``."""
    return tensor.movedim(axis, -3).flatten(0, -4)


LAYERS = {
    # sizes before [N, D], of which one axis is heads when `as_given` is split as it should be; layer; as split; axis
    "among images": ((6,), {"num_heads": 3}, (2, 3), 1),
    "before windows": ((2, 3, 5), {"heads": 3}, (2, 3, 5), 1),
    "behind windows": ((2, 5, 3), {"num_heads": 3}, (2, 5, 3), 2),
    "one, among windows": ((2, 1, 5), {"heads": 1}, (2, 1, 5), 1),
    "before two axes": ((2, 3, 2, 2), {"n_heads": 3}, (2, 3, 2, 2), 1),
}


@pytest.mark.parametrize("mask", ["none", "bias", "bias of heads", "keys"])
@pytest.mark.parametrize("name", LAYERS)
def test_statistics_are_by_head(name, mask):
    sizes, numbers, split, axis = LAYERS[name]
    q, k, v = qkv(*sizes)
    generator = torch.Generator().manual_seed(1)
    given = {
        "none": None,
        "bias": torch.randn(7, 7, generator=generator),
        "bias of heads": torch.randn(*sizes, 7, 7, generator=generator),
        "keys": torch.rand(*sizes[:1], *(1 for _ in sizes[1:]), 1, 7, generator=generator) > 0.3,
    }[mask]
    layer = Layer(**numbers)
    expected = layer(q, k, v, given)
    with mimkernels.capture(layer, NAMES, num_prefix=0) as heads:
        out = layer(q, k, v, given)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    scores = q.double() @ k.double().transpose(-2, -1) / 4
    if given is not None:
        scores = scores.masked_fill(~given, float("-inf")) if given.dtype == torch.bool else scores + given
    p = heads_last(scores.softmax(-1).reshape(*split, 7, 7), axis)
    seen = heads["Layer"]
    assert seen.heads == split[axis] and not any("queries are" in note for note in seen.notes)
    torch.testing.assert_close(seen.stats["entropy"].double(), torch.special.entr(p).sum(-1), rtol=1e-5, atol=1e-5)
    assert list(heads.statistics.layers) == [0]


def test_what_is_not_known_is_told():
    for sizes, numbers, heads, note in (
        ((6,), {}, 1, "queries are [6, 7, 16]: counted as one head"),
        ((7,), {"num_heads": 3}, 1, "queries are [7, 7, 16]: counted as one head"),
        ((2, 3, 5), {}, 5, "queries are [2, 3, 5, 7, 16]: counted as 5 heads"),
        ((2, 3, 3), {"num_heads": 3}, 3, "which axis is heads is not known, counted as the last"),
        ((6,), {"num_heads": 1}, 1, None),
        ((2, 3), {"num_heads": 6}, 3, None),
    ):
        layer = Layer(**numbers)
        with mimkernels.capture(layer, ["entropy"], num_prefix=0) as seen:
            layer(*qkv(*sizes))
        [said] = seen[0].notes or [""]
        assert seen[0].heads == heads and (note in said if note else said == ""), (sizes, said)


def test_output_and_lse_go_back_to_where_the_layer_had_them():
    q, k, v = qkv(2, 3, 5)
    call = as_attention(SDPAArguments(q, k, v))
    here = arranged(call, Layer(num_heads=3))
    assert here.call.q.shape[:2] == (10, 3)
    got, expected = here.restored(here.call.compute(), call), call.compute()
    torch.testing.assert_close(got.out, expected.out)
    torch.testing.assert_close(got.lse, expected.lse)


@pytest.mark.parametrize("name", ["among images", "before windows", "behind windows"])
def test_heads_are_taken_out_where_they_are(name):
    sizes, numbers, split, axis = LAYERS[name]
    q, k, v = qkv(*sizes)
    layer = Layer(**numbers)
    expected = layer(q, k, v).reshape(*split, 7, 16).clone()
    expected.select(axis, 1)[:] = 0
    with ablate(layer, {0: [1]}) as heads:
        out = layer(q, k, v)
    torch.testing.assert_close(out, expected.reshape(out.shape), rtol=1e-5, atol=1e-5)
    assert heads == {"Layer": 3}


def test_sam_has_its_heads_and_the_windows_of_each_image():
    model = m.timm_model("samvit_base_patch16_224", patch_size=8, img_size=32, window_size=2, global_attn_indexes=(1,))
    with torch.no_grad(), mimkernels.capture(model, ["entropy", "distance"]) as heads:
        model(images(32, 32))
    assert [(layer.heads, layer.windows, layer.keys) for layer in heads.values()] == [(3, 4, 4), (3, 1, 16)]
    assert heads[0].stats["distance"].max() <= 2**0.5 + 1e-6 and "2 images" in heads.table()


@pytest.mark.parametrize(
    ("module", "name", "options", "expected"),
    [
        ("hiera", "Hiera", {"stages": (1, 1, 1, 1)}, [(1, 49), (2, 49), (4, 49), (8, 1)]),
        # As many heads as windows in the second level.
        ("nest", "Nest", {"embed_dims": (32, 32, 64), "num_heads": (2, 4, 8), "depths": (1, 1, 1)},
         [(2, 16), (4, 4), (8, 1)]),
        ("twins", "Twins", {"embed_dims": (16, 16, 32, 32), "num_heads": (1, 2, 2, 2), "depths": (1, 1, 1, 1),
         "wss": (7, 7, 7, 7)}, [(1, 64), (2, 16), (2, 4), (2, 1)]),
    ],
)  # fmt: skip
def test_models_with_heads_before_or_behind_windows(module, name, options, expected):
    models = pytest.importorskip(f"timm.models.{module}")
    model = getattr(models, name)(num_classes=3, **options).eval()
    with torch.no_grad(), mimkernels.capture(model, ["peak"], num_prefix=0) as heads:
        model(torch.rand(2, 3, 224, 224))
    assert [(layer.heads, layer.windows) for layer in heads.values()] == expected
    assert not any("queries are" in note for layer in heads.values() for note in layer.notes)
    assert "2 images" in heads.table()
