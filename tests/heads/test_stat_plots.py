import math

import pytest
import torch

from mimkernels.heads import HeadStatistics, plot_cka, plot_heads, plot_overview

pytest.importorskip("matplotlib", reason="plots need the extra mimkernels[train]")


def recorded(layers=12, heads=3, times=1.0, quantities=("entropy", "distance", "prefix_mass"), unit="pixel"):
    generator = torch.Generator().manual_seed(0)
    seen = HeadStatistics(quantities=quantities, num_prefix=1, unit=unit)
    for layer in range(layers):
        rows = torch.rand(len(quantities), 2, heads, 5, generator=generator) * times
        seen.update(layer, dict(zip(quantities, rows, strict=True)))
    return seen


def panels(figure):
    return [axes for axes in figure.axes if axes.get_visible()]


def test_one_dot_per_head_a_mean_line_and_labelled_axes(tmp_path):
    seen = recorded()
    figure = plot_heads(seen, "distance", title="Attention distance")
    (axes,) = panels(figure)
    dots = torch.tensor(axes.collections[0].get_offsets().tolist(), dtype=torch.float64)
    assert dots.shape == (12 * 3, 2)
    torch.testing.assert_close(dots[:, 1].view(12, 3), seen.mean("distance"))
    assert list(axes.lines[0].get_ydata()) == seen.layer_mean("distance").tolist()
    assert axes.get_xlabel() == "layer" and axes.get_ylabel() == "attention distance (pixels)"
    assert axes.get_xticks().tolist() == list(range(12))
    figure.savefig(tmp_path / "distance.png")
    assert (tmp_path / "distance.png").read_bytes().startswith(b"\x89PNG")


def test_models_stand_side_by_side_and_no_dot_is_cut_off():
    models = {"epoch 10": recorded(times=1.0), "epoch 800": recorded(times=7.0), "random": recorded(times=0.1)}
    for figure in (plot_heads(models, "entropy"), plot_overview(models, ["entropy"])):
        shown = panels(figure)
        assert [axes.get_title() for axes in shown] == list(models)
        for axes, seen in zip(shown, models.values(), strict=True):
            low, high = axes.get_ylim()
            assert low <= seen.mean("entropy").min() and seen.mean("entropy").max() <= high
        assert len({axes.get_ylim() for axes in shown}) == 1


def test_the_legend_covers_no_panel():
    figure = plot_overview(recorded(), title="Heads")
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert all(not legend.overlaps(axes.get_window_extent()) for axes in panels(figure))


def test_overview_shows_what_all_recorded():
    assert len(panels(plot_overview(recorded()))) == 3
    both = {"a": recorded(), "b": recorded(quantities=("entropy", "self_mass"))}
    assert [axes.get_ylabel() for axes in panels(plot_overview(both))] == ["attention entropy (nats)", ""]
    assert len(panels(plot_overview(recorded(quantities=("self_mass",))))) == 1


@pytest.mark.parametrize("layers", [1, 40])
def test_layer_ticks_are_whole_numbers(layers):
    figure = plot_heads(recorded(layers=layers), "entropy")
    figure.draw_without_rendering()
    assert all(float(tick).is_integer() for tick in panels(figure)[0].get_xticks())


def test_equal_and_missing_values_still_give_a_picture():
    seen = HeadStatistics(quantities=["self_mass"])
    seen.update(0, {"self_mass": torch.zeros(2, 2, 3)})
    seen.update(1, {"self_mass": torch.full((2, 2, 3), math.nan)})
    plot_heads(seen, "self_mass").draw_without_rendering()


def test_cka_map(tmp_path):
    figure = plot_cka(torch.eye(12), x_name="layer of MAE", y_name="layer of DINO", title="CKA")
    assert figure.axes[0].get_xlabel() == "layer of MAE"
    figure.savefig(tmp_path / "cka.png")


def test_refusals():
    for call, told in (
        (lambda: plot_heads({}, "entropy"), "nothing to plot"),
        (lambda: plot_heads(HeadStatistics(quantities=["entropy"]), "entropy"), "recorded no layer"),
        (lambda: plot_heads(recorded(), "nmi"), "did not record 'nmi': entropy"),
        (lambda: plot_heads(recorded(), "speed"), "unknown quantity 'speed'"),
        (lambda: plot_heads({"a": recorded(), "b": recorded(unit="patch")}, "distance"), "different units"),
        (lambda: plot_overview({"a": recorded(), "b": recorded(quantities=("peak",))}), "no quantity in common"),
        (lambda: plot_cka(torch.ones(3)), "must be"),
    ):
        with pytest.raises(ValueError, match=told):
            call()
