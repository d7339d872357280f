import math

import pytest
import torch

from mimkernels.engine.schedule import learning_rate, parameter_groups, scaled_learning_rate


def test_warm_up_is_linear_from_zero_to_the_peak():
    assert [learning_rate(s, 100, 4, 0.8) for s in range(5)] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])


def test_cosine_falls_from_the_peak_through_half_to_the_floor():
    assert learning_rate(20, 100, 20, 1.0, 0.1) == pytest.approx(1.0)
    assert learning_rate(60, 100, 20, 1.0, 0.1) == pytest.approx(0.55)
    assert learning_rate(100, 100, 20, 1.0, 0.1) == pytest.approx(0.1)
    assert learning_rate(40, 100, 20, 1.0, 0.0) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_without_warm_up_the_first_step_has_the_peak():
    assert learning_rate(0, 10, 0, 0.5) == 0.5


def test_linear_scaling_is_per_256_images():
    assert scaled_learning_rate(1.5e-4, 4096) == pytest.approx(2.4e-3)


def test_biases_and_one_dimensional_parameters_are_not_decayed():
    model = torch.nn.Module()
    model.linear = torch.nn.Linear(3, 4)
    model.norm = torch.nn.LayerNorm(4)
    model.token = torch.nn.Parameter(torch.zeros(1, 1, 4))
    model.positions = torch.nn.Parameter(torch.zeros(1, 5, 4), requires_grad=False)
    decayed, plain = parameter_groups(model.named_parameters(), 0.05)
    assert {id(p) for p in decayed["params"]} == {id(model.linear.weight), id(model.token)}
    assert {id(p) for p in plain["params"]} == {id(model.linear.bias), id(model.norm.weight), id(model.norm.bias)}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)


def test_warm_up_from_a_rate_and_one_step_down():
    rates = [learning_rate(s, 80, 4, 0.8, start=0.4, tenth_from=70) for s in (0, 1, 4, 69, 70, 79)]
    assert rates == pytest.approx([0.4, 0.5, 0.8, 0.8, 0.08, 0.08])


def test_named_parameters_are_not_decayed():
    model = torch.nn.ModuleDict({"table": torch.nn.Linear(3, 2, bias=False), "head": torch.nn.Linear(3, 2)})
    decayed, plain = parameter_groups(model.named_parameters(), 0.05, lambda name: name.startswith("table"))
    assert [p.shape for p in decayed["params"]] == [(2, 3)] and decayed["weight_decay"] == 0.05
    assert [p.shape for p in plain["params"]] == [(2, 3), (2,)] and plain["weight_decay"] == 0.0
