"""Only what is PyTorch's own function goes elsewhere; the rest of a forward does what it did."""

import functools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("timm")

import mimkernels
from mimkernels.integrations._reroute import calls_sdpa, rerouted
from mimkernels.nn.sdpa import observing
from tests.integrations.models import Seen

attend_by_another_name = F.scaled_dot_product_attention
module_that_offers_it = types.SimpleNamespace(scaled_dot_product_attention=lambda q, k, v: q * 0)


class Calls(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class CallsByAnotherName(nn.Module):
    def forward(self, x):
        return attend_by_another_name(x, x, x)


class ImportsIt(nn.Module):
    def forward(self, x):
        from torch.nn.functional import scaled_dot_product_attention as attend

        return attend(x, x, x)


class ImportsItsModule(nn.Module):
    def forward(self, x):
        import torch.nn.functional as functional

        return functional.scaled_dot_product_attention(x, x, x)


class NamesItLocally(nn.Module):
    def forward(self, x):
        scaled_dot_product_attention = F.scaled_dot_product_attention
        return scaled_dot_product_attention(x, x, x)


class HoldsIt(nn.Module):
    def __init__(self):
        super().__init__()
        self.scaled_dot_product_attention = F.scaled_dot_product_attention

    def forward(self, x):
        return self.scaled_dot_product_attention(x, x, x)


class PrivateNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.__factor = 3.0

    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x) * self.__factor


class OldSuper(Calls):
    def forward(self, x):
        return super(OldSuper, self).forward(x) + F.scaled_dot_product_attention(x, x, x)  # noqa: UP008


class LongText(nn.Module):
    def forward(self, x):
        text = """
one
  two"""
        return F.scaled_dot_product_attention(x, x, x) * len(text)


class InLambda(nn.Module):
    def forward(self, x, times=(1.0, 2.0)):
        attend = lambda scale: F.scaled_dot_product_attention(x, x, x, scale=scale)  # noqa: E731
        return sum(attend(scale) for scale in times)


class OwnFlag(nn.Module):
    def __init__(self):
        super().__init__()
        self.scaled_dot_product_attention = False

    def forward(self, x):
        return x * 5 if self.scaled_dot_product_attention else F.scaled_dot_product_attention(x, x, x)


TAKEN = (Calls, CallsByAnotherName, ImportsIt, ImportsItsModule, NamesItLocally, HoldsIt, PrivateNames, OldSuper,
         LongText, InLambda, OwnFlag)  # fmt: skip


class OwnMethod(nn.Module):
    def scaled_dot_product_attention(self, x):
        return x * 7

    def forward(self, x):
        return self.scaled_dot_product_attention(x)


class OwnModule(nn.Module):
    def forward(self, x):
        return module_that_offers_it.scaled_dot_product_attention(x, x, x)


class OwnParameter(nn.Module):
    def forward(self, x, scaled_dot_product_attention=torch.neg):
        return scaled_dot_product_attention(x)


def scaled_dot_product_attention(q, k, v):
    return q * 0


class OwnFunction(nn.Module):
    def forward(self, x):
        return scaled_dot_product_attention(x, x, x)


NOT_TAKEN = (OwnMethod, OwnModule, OwnParameter, OwnFunction)


def tokens():
    return torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", TAKEN)
def test_pytorch_s_function_is_replaced_however_it_is_named(kind):
    ours = kind()
    report = mimkernels.accelerate(ours)
    assert [change.became for change in report] == ["mimkernels.attention"]
    seen = Seen()
    with observing(seen):
        made = ours(tokens())
    assert len(seen.calls) >= 1
    torch.testing.assert_close(made, kind()(tokens()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", NOT_TAKEN)
def test_what_only_has_its_name_is_left_alone(kind):
    ours = kind()
    assert not mimkernels.accelerate(ours).accelerated and type(ours) is kind
    assert torch.equal(ours(tokens()), kind()(tokens()))


@pytest.mark.parametrize("kind", NOT_TAKEN)
def test_beside_pytorch_s_function_it_stays_what_it_is(kind):
    both = type("Both", (nn.Module,), {})

    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x), self.other(x)

    both.forward = forward
    ours = both()
    ours.other = kind()
    assert mimkernels.accelerate(ours).accelerated
    assert torch.equal(ours(tokens())[1], kind()(tokens()))


def test_a_function_put_in_its_place_later_is_called(monkeypatch):
    ours = Calls()
    mimkernels.accelerate(ours)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: q * 9)
    assert torch.equal(ours(tokens()), tokens() * 9)


def doubled(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs) * 2

    return wrapper


class DecoratedAttention(nn.Module):
    @doubled
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class Other(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, scale=0.5)


def test_a_forward_that_cannot_be_rewritten_is_left_alone_with_the_reason(monkeypatch):
    ours = DecoratedAttention()
    (change,) = mimkernels.accelerate(ours)
    assert change.reason == "its forward, which calls SDPA, is wrapped by a decorator"
    assert torch.equal(ours(tokens()), DecoratedAttention()(tokens()))
    # As of tools that rewrite what they import: it runs something else than its source says.
    changed = types.FunctionType(Other.forward.__code__, globals(), "forward")
    code = changed.__code__.replace(co_firstlineno=Calls.forward.__code__.co_firstlineno)
    rewritten = type("Rewritten", (nn.Module,), {"forward": types.FunctionType(code, globals(), "forward")})
    (change,) = mimkernels.accelerate(rewritten())
    assert change.reason == "it cannot be rewritten: its source, compiled again, is not what it runs"


def test_a_forward_of_the_object_s_own_is_left_alone():
    ours = Calls()
    ours.forward = lambda x: x * 11
    (change,) = mimkernels.accelerate(ours)
    assert change.reason == "it has a forward of its own" and torch.equal(ours(tokens()), tokens() * 11)


def test_the_rewritten_forward_compiles_whole():
    torch._dynamo.reset()
    for kind in (Calls, NamesItLocally, PrivateNames):
        ours = kind()
        mimkernels.accelerate(ours)
        made = torch.compile(ours, fullgraph=True, backend="aot_eager")(tokens())
        torch.testing.assert_close(made, kind()(tokens()), rtol=1e-5, atol=1e-5)


def test_every_forward_of_timm_that_calls_it_can_be_rewritten():
    import timm
    from timm.layers import AttentionPoolLatent

    kinds = {AttentionPoolLatent}
    for name in timm.list_modules():
        space = vars(__import__(f"timm.models.{name}", fromlist=[name]))
        kinds.update(value for value in space.values() if isinstance(value, type) and issubclass(value, nn.Module))
    forwards = {kind.forward for kind in kinds if calls_sdpa(kind.forward)}
    assert len(forwards) > 20
    for forward in forwards:
        new = rerouted(forward, lambda *args, **kwargs: None)
        assert new.__code__.co_firstlineno >= forward.__code__.co_firstlineno and not calls_sdpa(new)
