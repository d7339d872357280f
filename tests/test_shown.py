"""What a person sees of an object in a notebook."""

import pytest
import torch

import mimkernels
from mimkernels.data.masks import MaskSampler
from mimkernels.heads import CKA

timm = pytest.importorskip("timm")

from mimkernels.models import CheckpointReport  # noqa: E402
from tests.integrations.test_accelerate import vit  # noqa: E402


def test_a_report_of_accelerate_is_a_table():
    report = mimkernels.accelerate(vit(depth=1))
    first, *_, last = repr(report).splitlines()
    assert first.split() == ["module", "class", "now", "remarks"] and last == "4 of 4 on mimkernels"
    assert str(report) == repr(report)


def test_a_report_of_a_checkpoint_counts_and_names_the_first():
    report = CheckpointReport(("a",) * 40, tuple(f"m{i}" for i in range(11)), ("head",))
    assert str(report).splitlines() == [
        "40 weights loaded",
        "11 missing: m0, m1, m2, m3, m4, m5, m6, m7, and 3 more",
        "1 left: head",
        "0 resized",
    ]


def test_masks_are_shown_by_their_shapes():
    masks = MaskSampler((4, 6), "block_exact", count=9).sample(5, 0, device="cpu")
    assert repr(masks) == "MaskBatch(mask [5, 4, 6]; 15 patches visible; cpu)"
    with_targets = MaskSampler((14, 14), "multiblock").sample(2, 0)
    assert repr(with_targets).startswith("MaskBatch(mask [2, 14, 14], context [2, ")
    unequal = MaskSampler((14, 14), "dinov2").sample(4, 0)
    assert repr(unequal) == "MaskBatch(mask [4, 14, 14]; masks of unequal counts; cpu)"


def test_cka_is_shown_by_its_layers():
    cka = CKA(tokens="patch")
    assert repr(cka) == "CKA(tokens='patch', 0 batches)"
    cka.update([torch.randn(5, 3, 2)] * 2)
    assert repr(cka) == "CKA(tokens='patch', 2 x 2 layers, 1 batches)"
