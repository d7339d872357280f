"""Accumulation over batches, layers and processes; giving out; refusals."""

import csv
import json
import math
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mimkernels import attention
from mimkernels.heads import CKA, HeadStatistics, Preset, patch_grid_positions

NAMES = ("entropy", "distance", "nmi", "head_divergence", "cls_pos_entropy", "pos_magnitude")


def images(count, seed=0, heads=3, layers=2, device="cpu"):
    """Per layer q, k, v [B, H, N, D] and tokens [B, N, C] of 3 x 3 patches and [cls]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((3, count, heads, 10, 8), (count, 10, 6))
    return [[torch.randn(shape, generator=generator).to(device) for shape in shapes] for _ in range(layers)]


def record(seen, batch, first_layer=0):
    positions = patch_grid_positions(3, seen.unit, 16)
    for layer, ((q, k, v), tokens) in enumerate(batch, start=first_layer):
        made = attention(
            q, k, v, num_prefix=1, positions=positions.to(q.device), stats=seen.row_stats, backend="reference"
        )
        seen.update(layer, made, q=q, k=k, tokens=tokens, backend="reference")
    return seen


def fresh(**options):
    return HeadStatistics(quantities=NAMES, num_prefix=1, **options)


def part(batch, which):
    return [[x[:, which] if x.dim() == 5 else x[which] for x in layer] for layer in batch]


def same(a, b, tolerance=1e-6):
    assert a.names == b.names and a.layers == b.layers and a.images == b.images
    for name in a.names:
        torch.testing.assert_close(a.mean(name), b.mean(name), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(a.variance(name), b.variance(name), rtol=tolerance, atol=tolerance)


def test_batches_and_merged_parts_equal_one_big_batch():
    batch = images(7)
    whole = record(fresh(), batch)
    in_batches = record(record(fresh(), part(batch, slice(0, 3))), part(batch, slice(3, 7)))
    same(in_batches, whole)
    merged = record(fresh(), part(batch, slice(0, 5))).merge(record(fresh(), part(batch, slice(5, 7))))
    same(merged, whole)
    assert whole.images == {0: 7, 1: 7}
    assert whole.mean("entropy").shape == (2, 3) and whole.mean("pos_magnitude").shape == (2, 1)
    assert whole.layer_mean("entropy").shape == (2,)
    assert whole.mean("entropy").dtype == torch.float64


def test_variance_is_over_images():
    seen = HeadStatistics(quantities=["entropy"])
    rows = torch.rand(6, 2, 4)
    seen.update(0, {"entropy": rows})
    per_image = rows.double().mean(-1)
    torch.testing.assert_close(seen.variance("entropy"), per_image.var(0)[None], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(seen.std("entropy"), per_image.std(0)[None], rtol=1e-6, atol=1e-9)
    alone = HeadStatistics(quantities=["entropy"])
    alone.update(0, {"entropy": rows[:1]})
    assert alone.variance("entropy").isnan().all()


def test_an_empty_batch_changes_nothing_and_nan_is_not_hidden():
    seen = HeadStatistics(quantities=["entropy"])
    seen.update(0, {"entropy": torch.zeros(0, 2, 4)})
    assert seen.mean("entropy").isnan().all()
    seen.update(0, {"entropy": torch.ones(3, 2, 4)})
    assert (seen.mean("entropy") == 1).all() and seen.images == {0: 3}
    broken = torch.ones(3, 2, 4)
    broken[1, 0, 2] = math.nan
    seen.update(0, {"entropy": broken})
    assert seen.mean("entropy").isnan().tolist() == [[True, False]]
    assert seen.layer_mean("entropy").isnan().all()
    seen.reset()
    assert seen.layers == () and "no layer" in seen.table()


def test_updates_work_under_inference_mode_keep_no_graph_and_do_not_wait(device):
    seen = fresh()
    batch = images(4, device=device)
    record(seen, batch)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            record(seen, batch)
        record(seen, [[x.requires_grad_() for x in layer] for layer in batch])
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert seen.images == {0: 12, 1: 12}
    assert not seen.mean("entropy").requires_grad
    assert seen.reduce().images == seen.images


def test_to_dict_through_json_restores_exactly():
    seen = record(fresh(symmetrize=True), images(5))
    back = HeadStatistics.from_dict(json.loads(json.dumps(seen.to_dict())))
    same(back, seen, tolerance=0)
    assert back.to_dict() == seen.to_dict()
    assert back.merge(seen).images == {0: 10, 1: 10}
    with pytest.raises(ValueError, match="format 9"):
        HeadStatistics.from_dict({**seen.to_dict(), "format": 9})
    with pytest.raises(ValueError, match="lack num_prefix, .*layers; given: format, quantities"):
        HeadStatistics.from_dict({"format": 1, "quantities": ["entropy"]})
    mine = Preset("mine", "here", ("cls_cls_attention_adj",), eps=1e-3)
    assert HeadStatistics.from_dict(HeadStatistics(mine, num_prefix=1).to_dict()).eps == 1e-3


def test_csv_holds_every_number(tmp_path):
    seen = record(fresh(), images(5))
    seen.to_csv(tmp_path / "heads.csv")
    with open(tmp_path / "heads.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * (5 * 3 + 1)
    for line in lines:
        head = int(line["head"] or 0)
        assert float(line["mean"]) == seen.mean(line["quantity"])[int(line["layer"]), head].item()
        assert float(line["std"]) == seen.std(line["quantity"])[int(line["layer"]), head].item()
        assert line["images"] == "5"
        assert line["unit"] == {"distance": "patches", "nmi": "", "pos_magnitude": ""}.get(line["quantity"], "nats")


def test_table_is_readable():
    seen = record(HeadStatistics("dosovitskiy", quantities=["entropy"], num_prefix=1), images(5))
    text = seen.table()
    assert "distance (pixels)" in text and "entropy (nats)" in text and text.endswith("5 images")
    assert f"{seen.layer_mean('entropy')[1].item():.4g} [{seen.mean('entropy')[1].min().item():.4g}, " in text
    assert len({len(line) for line in text.splitlines()[:4]}) == 1


def test_layers_may_have_different_head_counts():
    seen = HeadStatistics(quantities=["entropy"])
    seen.update(3, {"entropy": torch.ones(2, 4, 5)})
    seen.update(1, {"entropy": torch.ones(2, 2, 5)})
    assert seen.layers == (1, 3)
    assert seen.mean("entropy").isnan().sum(1).tolist() == [2, 0]
    assert seen.layer_mean("entropy").tolist() == [1, 1]
    assert HeadStatistics.from_dict(seen.to_dict()).to_dict() == seen.to_dict()


def shares(rank):
    """What one of two processes sees: its part of the batch, the second one a layer more, the first one features."""
    seen = record(fresh(), part(images(7), slice(0, 3) if rank == 0 else slice(3, 7)))
    if rank == 1:
        record(seen, images(2, seed=5, layers=1), first_layer=4)
    cka = CKA()
    if rank == 0:
        cka.update(list(torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(1))))
    return seen, cka


OTHER_PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
import mimkernels.heads
assert "matplotlib" not in sys.modules, "only plots may import matplotlib"
from test_head_statistics import shares
dist.init_process_group("gloo", init_method=sys.argv[2], rank=1, world_size=2)
seen, cka = shares(1)
seen.reduce()
cka.reduce()
dist.destroy_process_group()
"""


def test_reduce_over_two_processes_equals_one(tmp_path):
    store = f"file://{tmp_path / 'store'}"
    other = subprocess.Popen([sys.executable, "-c", OTHER_PROCESS, str(Path(__file__).parent), store])
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=2, timeout=timedelta(seconds=120))
    try:
        seen, cka = shares(0)
        alone = seen.to_dict()
        same(seen.reduce(), record(record(fresh(), images(7)), images(2, seed=5, layers=1), first_layer=4))
        assert seen.to_dict() == alone, "reduce must leave the local statistics as they are"
        torch.testing.assert_close(cka.reduce().result(), cka.result())
        assert other.wait(timeout=120) == 0
    finally:
        dist.destroy_process_group()
        other.kill()


def test_refusals_name_what_is_missing():
    rows = torch.ones(2, 3, 5)
    for make, told in (
        (lambda: HeadStatistics(), "at least one preset or quantity"),
        (lambda: HeadStatistics("parks"), "unknown preset 'parks'; known: dosovitskiy, park"),
        (lambda: HeadStatistics(quantities=["entropie"]), "unknown quantity 'entropie'; known: entropy"),
        (lambda: HeadStatistics(["park", "walmer"]), "unit cannot differ .*park: 'pixel', walmer: 'unit'"),
        (lambda: HeadStatistics("park", unit="patch"), "unit cannot differ"),
        (lambda: HeadStatistics(quantities=["distance"], unit="inch"), "unknown unit 'inch'"),
        (lambda: HeadStatistics("beyond_cls"), r"needs a \[cls\] token, but num_prefix is 0"),
        (lambda: HeadStatistics(quantities=["entropy"], num_prefix=-1), "must not be negative"),
    ):
        with pytest.raises(ValueError, match=told):
            make()
    with pytest.raises(TypeError, match="quantities must be a sequence of names, got str 'entropy'"):
        HeadStatistics(quantities="entropy")
    seen = HeadStatistics(quantities=["entropy", "nmi"], num_prefix=1)
    stats = {"entropy": rows, "patch_entropy": rows, "patch_mass": rows}
    q = torch.ones(2, 3, 5, 8)
    for update, told in (
        (lambda: seen.update(0, {"entropy": rows}, q=q, k=q, lse=rows), "nmi needs the row statistics .*patch_mass"),
        (lambda: seen.update(0, {}), "entropy needs .*got none: ask for stats="),
        (lambda: seen.update(0, stats, q=q, k=q), "nmi needs lse, got None"),
        (lambda: seen.update(0, stats, q=q[0], k=q, lse=rows), "q must be"),
        (lambda: seen.update(0, stats, q=q[:1], k=q, lse=rows), "q .* does not fit"),
        (lambda: seen.update(0, {**stats, "entropy": rows[:, :2]}, q=q, k=q, lse=rows), "must be .*H, N"),
        (lambda: seen.update(-1, stats, q=q, k=q, lse=rows), "numbered from 0"),
        (lambda: seen.mean("distance"), "'distance' was not recorded; recorded: entropy, nmi"),
        (lambda: seen.beyond_cls(), "was not recorded"),
        (lambda: seen.merge(HeadStatistics(quantities=["entropy"])), "set up differently"),
    ):
        with pytest.raises(ValueError, match=told):
            update()
    few = HeadStatistics(quantities=["entropy"], num_prefix=5)
    with pytest.raises(ValueError, match="no patch tokens"):
        few.update(0, {"entropy": rows})
    other = HeadStatistics(quantities=["entropy"])
    other.update(0, {"entropy": rows})
    with pytest.raises(ValueError, match="3 heads in earlier batches, now 2"):
        other.update(0, {"entropy": rows[:, :2]})


def test_the_windows_of_an_image_count_as_one():
    """Its value is the mean over its windows, and the spread over images is that of these means."""
    seen = HeadStatistics(quantities=["peak"])
    rows = torch.tensor([0.1, 0.3, 0.5, 0.9]).view(4, 1, 1).expand(4, 2, 5)  # windows of two images, two each
    seen.update(0, {"peak": rows}, windows=2)
    assert seen.images == {0: 2}
    torch.testing.assert_close(seen.mean("peak"), torch.full((1, 2), 0.45, dtype=torch.float64))
    torch.testing.assert_close(seen.std("peak"), torch.full((1, 2), 0.5 / 2**0.5, dtype=torch.float64))
    with pytest.raises(ValueError, match="4 windows cannot be 3 of each image"):
        seen.update(0, {"peak": rows}, windows=3)
