"""Trained poolings beside attention: what they weigh, and the pictures of marked queries."""

import numpy as np
import torch

from mimkernels._palette import SERIES
from mimkernels.commands.analyze import pooled as pooled_module
from mimkernels.commands.analyze.pictures import marked_images
from mimkernels.commands.analyze.pooled import POOLINGS, LastTokens
from mimkernels.data.labelled import LabelledImages
from mimkernels.engine.encoder import load_encoder
from mimkernels.engine.model_names import parse_models
from mimkernels.engine.readout import train_pooling, why_no_classes
from tests.commands.analyze.shown import shown

MODEL = "a=vit_tiny_patch16_224:pretrained=false:in_chans=1:img_size=16:patch_size=4:embed_dim=16:depth=1:num_heads=2"


def made(count=192, tokens=9, dim=8):
    """``[n, 1 + N, D]`` tokens, their classes, and the patch that tells the class: others tell one at random."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.arange(count) % 2
    places = torch.randint(tokens, (count,), generator=generator)
    x = 0.1 * torch.randn(count, 1 + tokens, dim, generator=generator)
    rows = torch.arange(count)
    x[..., 1] = 2.0 * torch.randint(2, x.shape[:2], generator=generator) - 1
    x[rows, 1 + places, 1] = 2.0 * targets - 1
    x[rows, 1 + places, 0] = 3.0  # marks the one that is right
    return x, targets, places


def test_poolings_find_the_patch_that_tells_the_class():
    x, targets, places = made()
    for name in POOLINGS:
        before = torch.get_rng_state()
        pooling, accuracy, images = train_pooling(name, x, targets, 1, torch.device("cpu"))
        assert torch.equal(before, torch.get_rng_state())
        assert images == 135 and accuracy > 0.95
        _, weights = pooling(x, return_weights=True)
        assert (weights[:, :, 1:].mean(1).argmax(1) == places).float().mean() > 0.9


def test_images_without_classes_have_none():
    assert why_no_classes(torch.tensor([-1, -1])) == "the images have no classes"
    assert why_no_classes(torch.tensor([0, 1] * 4)) == "8 images of 2 classes, 5 of each are needed"
    assert why_no_classes(torch.tensor([0, 1] * 5)) == ""
    encoder = load_encoder(parse_models([MODEL])[0])
    last = LastTokens(encoder, LabelledImages(None, np.arange(8), torch.full((8,), -1)), True)
    last.add(torch.zeros(8, 17, 16), torch.arange(8))
    assert last.why and last.train(torch.zeros(2, 17, 16)) == {}


def test_marked_queries_and_poolings_stand_beside_each_other(monkeypatch):
    encoder = load_encoder(parse_models([MODEL])[0])
    images = torch.randint(0, 256, (20, 1, 16, 16), dtype=torch.uint8)
    monkeypatch.setattr(pooled_module, "MOST_BYTES", 11 * 17 * 16 * 2)  # of 11 images: every second is kept
    last = LastTokens(encoder, LabelledImages(None, np.arange(20), torch.arange(20) // 2 % 2), True)
    for positions in torch.arange(20).split(7):
        last.add(encoder(images[positions]).tokens, positions)
    maps, tokens = shown(encoder, images[:5])
    trained = last.train(tokens)
    assert list(trained) == list(POOLINGS) and {one["images"] for one in trained.values()} == {7}
    for one in trained.values():
        assert one["weights"].shape == (5, 4, 4)
        torch.testing.assert_close(one["weights"].sum((1, 2)), torch.ones(5))
    pictures = marked_images({"a": maps, "b": maps}, {"a": trained})
    assert len(pictures) == 4
    names = [name for name, _ in pictures[0].columns]
    assert names == ["image", "[cls]", "patch 1", "patch 2", "patch 3", "abmilp", "ep"]
    assert len({colour for _, colour in pictures[0].columns if colour}) == 3 and pictures[0].columns[2][1] in SERIES
    (a, with_pooled), (b, without) = pictures[0].rows
    assert (a, b) == ("a", "b") and with_pooled[:5] == without[:5] and without[5:] == [None, None]
    assert len(set(with_pooled)) == 7 and all(address.startswith("data:image/png") for address in with_pooled)
