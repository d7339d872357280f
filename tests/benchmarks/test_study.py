"""The study: its costs, its cells, what it makes of results, and its page."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")

from benchmarks import study as tool
from benchmarks.studies import cells, claims, page, plan
from benchmarks.studies.plan import METHODS, SEEDS, Cell, forward_flops
from mimkernels.cli import build_parser
from mimkernels.commands.pretrain.config import PretrainConfig
from mimkernels.data.fashion_mnist import FashionMNISTSource

COMMITTED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "study"
LATE = 4  # layers from here on are the last quarter of 6


def made_result(method, budget="epochs", seed=0, **layers):
    """A result in which every quantity is 1, or what ``layers`` says: ``[layers][heads]``, or a value for the rest."""
    depth, heads = plan.ENCODER["depth"], plan.ENCODER["num_heads"]
    names = ("distance", "entropy", "head_divergence", "cls_cls_attention", "cls_pos_entropy")
    values = {name: layers.get(name, [[1.0] * heads] * depth) for name in names}
    probe = {name: {"accuracy": layers.get(name, 0.5), "knn": None, "parameters": 0} for name in plan.READOUTS}
    return {
        "format": 1, "method": method, "budget": budget, "seed": seed, "epochs": METHODS[method].epochs(budget),
        "encoder_flops_per_image": METHODS[method].flops, "data": {}, "settings": {}, "revision": "0123456789abcdef",
        "machine": {"device": "a CPU", "cpu_isa": "avx2", "mimkernels": "0", "torch": "0"}, "date": "2026-01-01",
        "seconds": {"pretrain": 60.0}, "training": {}, "probe": probe,
        "analysis": {
            "facts": {}, "heads": {name: {"mean": value, "std": value} for name, value in values.items()},
            "cka": layers.get("cka", [[1.0] * (depth + 1)] * (depth + 1)), "accuracy_by_depth": [0.5] * (depth + 1),
        },
    }  # fmt: skip


def write(folder, results):
    folder.mkdir(exist_ok=True)
    for result in results:
        path = folder / f"{result['method']}-{result['budget']}-{result['seed']}.json"
        path.write_text(json.dumps(result))
    return claims.Study(folder)


def test_flops_are_those_counted_by_hand():
    # Width 128, 6 blocks, 2 tokens: qkv 2*2*128*384, scores and weighted sum 2*2*2*2*128, projection 2*2*128*128, MLP
    # 2*2*128*512 twice; the projection of one patch of 16 pixels.
    block = 2 * 2 * 128 * 384 + 2 * (2 * 2 * 2 * 128) + 2 * 2 * 128 * 128 + 2 * (2 * 2 * 128 * 512)
    assert forward_flops(2) == 6 * block + 2 * 16 * 128
    all_tokens, visible, local = forward_flops(50), forward_flops(13), forward_flops(17)
    assert METHODS["supervised"].flops == METHODS["simmim"].flops == 3 * all_tokens
    assert METHODS["mae"].flops == 3 * visible
    assert METHODS["mocov3"].flops == 2 * 3 * all_tokens + 2 * all_tokens
    assert METHODS["dino"].flops == 3 * (2 * all_tokens + 2 * local) + 2 * all_tokens


def test_flops_agree_with_what_torch_counts():
    timm = pytest.importorskip("timm")
    from torch.utils.flop_counter import FlopCounterMode

    options = {"img_size": 28, "in_chans": 1, "patch_size": 4, "num_classes": 0, **plan.ENCODER}
    encoder = timm.create_model("vit_tiny_patch16_224", **options)
    for module in encoder.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(torch.zeros(1, 1, 28, 28))
    assert counter.get_total_flops() == forward_flops(50)


def test_mae_sees_as_many_patches_as_are_counted():
    from mimkernels.models import MAE

    options = {"img_size": 28, "in_chans": 1, "patch_size": 4, "decoder_dim": 64, "decoder_heads": 4, **plan.ENCODER}
    model = MAE.from_timm("vit_tiny_patch16_224", **options, mask_ratio=plan.MASK_RATIO["mae"], decoder_depth=1)
    mask = model.draw_mask(torch.zeros(1, 1, 28, 28))
    assert mask.ids_keep.shape[1] + 1 == METHODS["mae"].passes[0].tokens


@pytest.mark.parametrize("name", METHODS)
def test_equal_flops_are_equal_within_rounding(name):
    method = METHODS[name]
    assert method.epochs("epochs") == plan.EPOCHS
    assert method.epochs("flops") * method.flops == pytest.approx(plan.EPOCHS * METHODS["supervised"].flops, rel=0.04)
    with pytest.raises(ValueError, match="budget must be one of epochs, flops, got 'time'"):
        method.epochs("time")


def test_cells_that_both_budgets_share_are_run_once():
    run = list(plan.cells())
    assert len(run) == len(set(run)) == len(SEEDS) * (2 * len(METHODS) - 2)
    assert Cell("simmim", "flops", 1).run == Cell("simmim", "epochs", 1) in run
    assert Cell("mae", "flops", 1).run == Cell("mae", "flops", 1) in run
    assert [cell.seed for cell in run] == sorted(cell.seed for cell in run)


def fake_set(root):
    """Files as of Fashion-MNIST with 6,000 and 2,500 images; the class is the last digit of the colour."""
    folder = root / "whole"
    folder.mkdir(parents=True)
    for part, count in (("train", 6000), ("t10k", 2500)):
        pixels = (torch.arange(count) % 251).to(torch.uint8)[:, None].expand(-1, 784).contiguous()
        labels = (torch.arange(count) % 251 % 10).to(torch.uint8)
        for name, values, shape in (("images-idx3", pixels, (count, 28, 28)), ("labels-idx1", labels, (count,))):
            sizes = b"".join(size.to_bytes(4, "big") for size in shape)
            header = bytes((0, 0, 8, len(shape))) + sizes
            (folder / f"{part}-{name}-ubyte").write_bytes(header + values.numpy().tobytes())


def test_the_subset_is_the_same_every_time_and_keeps_labels(tmp_path):
    for name in ("a", "b"):
        fake_set(tmp_path / name)
        cells.write_data(tmp_path / name)
    train, again = (FashionMNISTSource(tmp_path / name) for name in ("a", "b"))
    assert len(train) == plan.TRAIN_IMAGES and len(FashionMNISTSource(tmp_path / "a", False)) == plan.TEST_IMAGES
    assert train.fingerprint() == again.fingerprint()
    colours = [int(train.read(index)[0, 0, 0]) for index in range(50)]
    assert len(set(colours)) > 40  # drawn, not the first ones
    assert [colour % 10 for colour in colours] == train.targets()[0][:50]
    before = (tmp_path / "a" / "train-images-idx3-ubyte.gz").stat().st_mtime_ns
    cells.write_data(tmp_path / "a")
    assert (tmp_path / "a" / "train-images-idx3-ubyte.gz").stat().st_mtime_ns == before


class Commands:
    """Stands for the library's commands: notes which ran, and fails at one of them if told to."""

    def __init__(self, monkeypatch, fail_at=None):
        self.ran, self.fail_at = [], fail_at
        monkeypatch.setattr(cells, "run_command", self.run)
        monkeypatch.setattr(cells, "collect", lambda cell, *rest: made_result(cell.method, cell.budget, cell.seed))
        monkeypatch.setattr(cells, "write_data", lambda folder: None)

    def run(self, name, arguments, folder):
        if name == self.fail_at:
            raise cells.CellError(f"`mimkernels {name}` ended with status 2")
        assert arguments[0] == name
        self.ran.append((folder.name, name))
        return 1.0


def test_a_study_goes_on_with_the_cells_that_have_no_result(tmp_path, monkeypatch, capsys):
    chosen = [Cell("mae", "epochs", 0), Cell("simmim", "epochs", 0)]
    broken = Commands(monkeypatch, fail_at="probe")
    assert tool.run(chosen, tmp_path / "work", tmp_path / "results", jobs=1) == 1
    assert not list(tmp_path.glob("results/*")) and "mae-epochs-0: `mimkernels probe`" in capsys.readouterr().err
    assert broken.ran == [("mae-epochs-0", "pretrain"), ("simmim-epochs-0", "pretrain")]
    whole = Commands(monkeypatch)
    assert tool.run(chosen[:1], tmp_path / "work", tmp_path / "results", jobs=1) == 0
    assert tool.run(chosen, tmp_path / "work", tmp_path / "results", jobs=2) == 0
    assert [cell for cell, name in whole.ran if name == "pretrain"] == ["mae-epochs-0", "simmim-epochs-0"]
    assert sorted(path.name for path in tmp_path.glob("results/*")) == ["mae-epochs-0.json", "simmim-epochs-0.json"]


def test_a_command_that_fails_shows_the_end_of_its_log(tmp_path):
    with pytest.raises(cells.CellError, match=r"`mimkernels pretrain` ended with status 2; .*pretrain.log ends with"):
        cells.run_command("pretrain", ["pretrain", "--epochs", "none"], tmp_path)


@pytest.mark.parametrize("name", METHODS)
def test_commands_take_the_options_of_a_cell(name, tmp_path):
    for command, words in cells.commands(Cell(name, "flops", 2), tmp_path, tmp_path).items():
        options = build_parser(command).parse_args([command, *words[1:]])
        assert Path(options.output).parent == tmp_path
    pretrain = cells.commands(Cell(name, "flops", 2), tmp_path, tmp_path)["pretrain"]
    config = PretrainConfig(**{
        field.name: value for field in dataclasses.fields(PretrainConfig)
        if (value := getattr(build_parser("pretrain").parse_args(pretrain), field.name, None)) is not None
    })  # fmt: skip
    config.check()
    assert (config.method, config.seed, config.epochs) == (name, 2, METHODS[name].epochs("flops"))


def test_statistics_keep_means_and_deviations_by_layer_and_head():
    layer = {"images": 2, "heads": 2, "distance": {"mean": [1.23456789, 2.0], "std": [0.5, None], "sum": [3.0, 4.0]}}
    assert cells.quantities({"layers": {"10": layer, "2": {**layer, "distance": {"mean": [0.0], "std": [0.0]}}}}) == {
        "distance": {"mean": [[0.0], [1.23457, 2.0]], "std": [[0.0], [0.5, None]]}
    }


def test_a_difference_counts_beyond_twice_its_spread():
    assert claims.side([1.0, 1.1, 0.9]) == 1 and claims.side([-1.0, -1.1, -0.9]) == -1
    assert claims.side([1.0, -1.0, 0.1]) == 0 and claims.side([0.0, 0.0, 0.0]) == 0
    assert claims.side([3.0, 2.0, 1.0]) == 0  # 2 is not beyond 2 x 1
    assert claims.side([3.1, 2.1, 1.1]) == 1


def layers(early, late):
    return [[early] * 4] * LATE + [[late] * 4] * 2


def judged(folder, claim, values):
    """The verdict at equal epochs where late layers of each method have these values, of one seed after the other."""
    results = [
        made_result(method, seed=seed, distance=layers(1.0, value))
        for method, seeds in values.items()
        for seed, value in zip(SEEDS, seeds, strict=False)
    ]
    return claims.judge(claim, write(folder, results), "epochs")


def test_claims_are_judged_by_every_comparison(tmp_path):
    (claim,) = (claim for claim in claims.CLAIMS if "more local" in claim.text)
    near, far = (1.0, 1.01, 1.02), (2.0, 2.01, 2.02)
    others = dict.fromkeys(claims.OTHERS, far)
    found = judged(tmp_path / "a", claim, {"mae": near, "simmim": near, **others})
    assert (found.verdict, found.confirmed, found.comparisons) == (claims.CONFIRMED, 6, 6)
    found = judged(tmp_path / "b", claim, {"mae": far, "simmim": far, **dict.fromkeys(claims.OTHERS, near)})
    assert (found.verdict, found.contradicted) == (claims.CONTRADICTED, 6)
    found = judged(tmp_path / "c", claim, {"mae": near, "simmim": far, **others})
    assert (found.verdict, found.confirmed, found.contradicted) == (claims.UNSEEN, 3, 0)
    found = judged(tmp_path / "d", claim, {"mae": near[:2], "simmim": near, **others})
    assert (found.verdict, found.values["mae"]) == (claims.OPEN, list(near[:2]))


def test_bounds_are_judged_method_by_method(tmp_path):
    (claim,) = (claim for claim in claims.CLAIMS if "Supervised models attend locally" in claim.text)
    assert judged(tmp_path / "a", claim, {"supervised": (2.0, 2.1, 2.2)}).verdict == claims.CONFIRMED
    assert judged(tmp_path / "b", claim, {"supervised": (0.9, 0.85, 0.8)}).verdict == claims.CONTRADICTED
    assert judged(tmp_path / "c", claim, {"supervised": (0.5, 1.5, 1.1)}).verdict == claims.UNSEEN


def test_values_of_claims_on_known_numbers():
    heads = [[1.0, 2.0, 3.0, 6.0]] * LATE + [[0.5, 0.5, 0.5, 2.5]] * 2
    cka = torch.full((7, 7), 0.5).fill_diagonal_(1.0).tolist()
    result = made_result(
        "mae", distance=heads, entropy=heads, head_divergence=heads, cls_cls_attention=heads,
        cls_pos_entropy=layers(math.log(49), math.log(7)), cka=cka, cls=0.25, abmilp=0.75, mean=0.5,
    )  # fmt: skip
    heads_of_layers = [-2, -2, 1, 2, 2, 1 / 3, 1 / 3, 1, 0.5]
    cls_and_probes = [1, 0.5, 0.5, 0.5, 25, 50, 25, 50]
    assert [claim.value(result) for claim in claims.CLAIMS] == pytest.approx(heads_of_layers + cls_and_probes)


def test_the_page_tells_what_is_there_and_what_is_missing(tmp_path):
    results = [
        made_result(method, budget, seed, distance=layers(1.0, 2.0 + seed / 100), abmilp=0.75)
        for method in ("supervised", "mae")
        for budget in plan.BUDGETS
        for seed in SEEDS
        if Cell(method, budget, seed).run == Cell(method, budget, seed)
    ]
    write(tmp_path / "results", results)
    (tmp_path / "docs").mkdir()
    written = page.write_page(tmp_path / "results", tmp_path / "docs").read_text()
    assert "15 of 24 models (method, budget, seed) are still to be trained:\nsimmim-epochs-0, " in written
    assert "| Supervised | 13 | 50.0 ± 0.0 | 50.0 ± 0.0 | 75.0 ± 0.0 | 50.0 ± 0.0 | 25.0 ± 0.0 |" in written
    assert "| DINO | 4 |  |  |  |  |  |" in written
    assert "**confirmed** (1 for, 0 against, of 1)<br>Supervised&nbsp;1.01&nbsp;±&nbsp;0.01" in written
    assert "**not yet known**<br>MAE&nbsp;2.01" in written
    pictures = {path.stem for path in (tmp_path / "docs" / "pictures" / "study").glob("*.png")}
    assert pictures == set(page.CAPTIONS) and all(f"pictures/study/{name}.png" in written for name in pictures)
    assert "\n\n\n" not in written


def test_a_page_needs_results(tmp_path):
    with pytest.raises(ValueError, match="holds no result of the study; run python -m benchmarks study"):
        page.write_page(tmp_path, tmp_path)


def test_committed_results_are_whole():
    for path in (COMMITTED / f"{cell.name}.json" for cell in plan.cells()):
        if not path.is_file():
            continue
        result = json.loads(path.read_text())
        assert path.stem == f"{result['method']}-{result['budget']}-{result['seed']}"
        assert result["epochs"] == METHODS[result["method"]].epochs(result["budget"]), path.stem
        assert result["encoder_flops_per_image"] == METHODS[result["method"]].flops, path.stem
        assert set(result["probe"]) == set(plan.READOUTS) and "+changes" not in result["revision"], path.stem
        assert all(math.isfinite(claim.value(result)) for claim in claims.CLAIMS), path.stem
        assert not any(isinstance(value, str) and value.startswith("/") for value in result["settings"].values())
