"""The sweep over timm's families: some of it, and that the committed results are whole."""

import json
from dataclasses import replace

import pytest

timm = pytest.importorskip("timm")

from benchmarks.timm_sweep import FAMILIES, JSON, TABLE, Row, examine, other_families, renewed  # noqa: E402

QUICK = (
    *("beit", "cait", "deit", "eva", "fastvit", "lowformer", "maxxvit", "mobilevit", "pit", "swin_transformer"),
    "swin_transformer_v2",
    *("tiny_vit", "vision_transformer", "vision_transformer_relpos", "vision_transformer_sam", "xcit", "timm.layers"),
)
# Left to PyTorch: head dims that the kernels do not take.
NOT_TAKEN = {
    "mobilevit_xxs": 4,
    "vit_dwee_patch16_reg1_gap_256": 2,
    "vit_dpwee_patch16_reg1_gap_256": 2,
    "SimPool1d": 1,
    "SimPool2d": 1,
}


@pytest.mark.parametrize("family", QUICK)
def test_a_model_of_each_family(family):
    for variant in FAMILIES[family][:1] if family != "timm.layers" else FAMILIES[family]:
        row = examine(family, variant, seconds=0)
        assert row.layers > 0
        assert row.equal, row
        assert row.accelerated == row.layers - NOT_TAKEN.get(row.model, 0), row
        assert row.captured >= row.layers, row
        assert bool(row.left or row.to_pytorch) == (row.accelerated < row.layers or family == "cait"), row


def test_every_family_of_timm_is_looked_at():
    others = dict(other_families())
    assert {*others, *FAMILIES} == {*timm.list_modules(), "timm.layers"}
    assert not [name for name, why in others.items() if why.startswith("MISSED")]
    assert "MultiScaleAttention" in others["mvitv2"] and others["vgg"] == "no softmax attention"
    assert "HaloAttn" in others["byoanet"]


def test_the_committed_results_are_whole_and_good():
    results = json.loads(JSON.read_text())
    found = [(row["family"], row["model"]) for row in results["families"]]
    assert found == [(family, variant.model) for family, variants in FAMILIES.items() for variant in variants]
    for row in results["families"]:
        for kind in ("output", "gradient"):
            assert row[f"{kind}_error"] <= 2 * row[f"{kind}_error_stock"] + 2**-23, row
        assert row["captured"] >= row["layers"] > 0, row
        assert row["accelerated"] == row["layers"] - NOT_TAKEN.get(row["model"], 0) or row["to_pytorch"], row
        assert f"| {row['family']} | `{row['model']}` |" in TABLE.read_text()


def test_times_on_file_stay_where_nothing_was_timed():
    rows = json.loads(JSON.read_text())
    first = Row(**rows["families"][0])
    untimed = replace(first, captured=7, timed_at=0, time_ratio=None)
    versions = {name: rows[name] for name in ("timm", "torch", "cpu")}
    got = renewed([untimed], versions)
    assert got[0] == replace(first, captured=7) and first.time_ratio is not None
    assert got[1:] == [Row(**row) for row in rows["families"][1:]]
