"""The rule of mimkernels.testing: how far from the oracle a kernel may be, and over which draws that is measured."""

import itertools

import pytest
import torch

from mimkernels import testing
from tests.cases import cases, rich


def test_the_error_of_n_draws_is_the_largest_of_each():
    case, key = rich("add_layer_norm"), (torch.float32, "cpu", "contiguous")
    first, *_, last = made = [testing.plain_errors(case, *key, draws) for draws in (1, 2, 3, 4)]
    errors: dict[str, list[float]] = {name: [] for name in first}
    for seed in range(4):
        inputs = case.inputs(torch.float32, seed=seed)
        plain, exact = testing.run(case, inputs, "reference"), testing.oracle(case, inputs)
        for prefix, ours, theirs in zip(("", "gradient of "), plain, exact, strict=True):
            for name in ours:
                errors[prefix + name].append((ours[name].double() - theirs[name]).abs().max().item())
    assert last == {name: max(of_draws) for name, of_draws in errors.items()}
    assert first == {name: of_draws[0] for name, of_draws in errors.items()} != last
    assert all(fewer[name] <= more[name] for fewer, more in itertools.pairwise(made) for name in first)


@pytest.mark.parametrize(("draws", "passes"), [(2, False), (3, True), (9, True)])
def test_a_kernel_is_refused_by_all_draws_of_its_case_alone(draws, passes, monkeypatch):
    """The third draw shows a plain error that allows what the kernel is off."""
    asked = []

    def measured(case, dtype, device, layout, draws):
        asked.append(draws)
        return dict.fromkeys(("output", "gradient of x"), 0.01 * (draws >= 3))

    def run(case, inputs, backend, dtype=None):
        outputs, grads = real(case, inputs, backend, dtype)
        return {name: out + 0.01 * (backend == "cpu") for name, out in outputs.items()}, grads

    real = testing.run
    monkeypatch.setattr(testing, "plain_errors", measured)
    monkeypatch.setattr(testing, "run", run)
    case = testing.Case("gather_tokens", "here", cases("gather_tokens")[0].make, ("x",), draws=draws)
    if passes:
        testing.check(case, "cpu", torch.float32)
    else:
        with pytest.raises(AssertionError, match=r"output: error 1.0\d+e-02 against the oracle, plain PyTorch has 0"):
            testing.check(case, "cpu", torch.float32)
    assert asked == list(range(1, min(draws, 3) + 1))
