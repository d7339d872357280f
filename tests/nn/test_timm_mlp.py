"""timm's MLP on mimkernels.bias_gelu: the same numbers, the same names, in the same objects."""

import copy
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("timm")
import timm
from timm.layers import GluMlp
from timm.layers import Mlp as TimmMlp
from timm.layers.activations import GELU, GELUTanh

from mimkernels.nn import Mlp, use_mimkernels_mlp
from mimkernels.testing import Watch
from tests.nn.timm_layers import assert_same_as_timm, run


def layer(**options):
    torch.manual_seed(0)
    made = TimmMlp(24, 40, **options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return made


def ours_of(module):
    module = copy.deepcopy(module)
    use_mimkernels_mlp(module)
    return module


def tokens(*shape):
    return torch.randn(shape or (2, 17, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calls():
    """The schemas of bias_gelu that were reached."""

    def note(op, args):
        return op._schema.name.partition("::")[2] if op.namespace == "mimkernels" else None

    with Watch(note) as reached:
        yield reached.seen


LAYERS = {
    "plain": {},
    "no bias": {"bias": False},
    "bias in the second layer only": {"bias": (False, True)},
    "tanh": {"act_layer": lambda: nn.GELU(approximate="tanh")},
    "timm's GELU": {"act_layer": GELU},
    "timm's GELUTanh": {"act_layer": GELUTanh},
    "norm": {"norm_layer": nn.LayerNorm},
    "other width": {"out_features": 12},
}


@pytest.mark.parametrize("shape", [(2, 17, 24), (5, 24), (2, 3, 4, 24), (0, 5, 24)], ids=str)
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
def test_output_and_gradients_are_timm_s(options, shape, calls):
    if 0 in shape:
        assert torch.equal(ours_of(layer(**options))(tokens(*shape)), layer(**options)(tokens(*shape)))
    else:
        plain, x = layer(**options), tokens(*shape)
        assert_same_as_timm(run(ours_of(plain), x), run(plain, x), run(plain, x.double()))
        assert calls == ["bias_gelu_fwd", "bias_gelu_bwd"]


def test_dropout_draws_the_same_numbers():
    plain = layer(drop=(0.3, 0.2)).train()
    ours, theirs = run(ours_of(plain), tokens()), run(plain, tokens())
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    assert (ours["out"] == 0).any()


def parametrized(module):
    nn.utils.parametrizations.weight_norm(module.fc1)


def with_hook(name, register):
    return lambda module: getattr(getattr(module, name), register)(lambda *args: None)


def with_forward_of_its_own(module):
    forward = module.fc1.forward
    module.fc1.forward = lambda x: forward(x) + 1


LEFT_TO_TIMM = {
    "no linear layer": lambda module: setattr(module, "fc1", nn.Sequential(module.fc1)),
    "a subclass of Linear": lambda module: setattr(module, "fc1", type("Low", (nn.Linear,), {})(24, 40)),
    "parametrized": parametrized,
    "another activation": lambda module: setattr(module, "act", nn.SiLU()),
    "a subclass of GELU": lambda module: setattr(module, "act", type("Mine", (nn.GELU,), {})()),
    "a forward of its own": with_forward_of_its_own,
    **{
        f"{register} on {name}": with_hook(name, register)
        for name in ("fc1", "act")
        for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")
    },
}


@pytest.mark.parametrize("change", LEFT_TO_TIMM.values(), ids=LEFT_TO_TIMM.keys())
def test_what_is_not_plain_runs_timm_s_code(change, calls):
    plain = layer()
    ours = ours_of(plain)
    assert ours(tokens()).shape == (2, 17, 24) and calls == ["bias_gelu_fwd"]
    for module in (plain, ours):
        torch.manual_seed(3)
        change(module)
    calls.clear()
    assert torch.equal(ours(tokens()), plain(tokens())) and calls == []


def test_a_hook_on_the_activation_still_sees_it():
    ours, seen = ours_of(layer()), []
    hook = ours.act.register_forward_hook(lambda module, args, out: seen.append(out))
    ours(tokens())
    assert seen[0].shape == (2, 17, 40)
    hook.remove()
    ours(tokens())
    assert len(seen) == 1


def test_convolutions_run_timm_s_code(calls):
    plain, x = layer(use_conv=True), torch.randn(2, 24, 5, 5)
    assert torch.equal(ours_of(plain)(x), plain(x)) and calls == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_timm_s_dtype_and_values(dtype, calls):
    plain = layer()
    ours, x = ours_of(plain), tokens().requires_grad_()
    with torch.autocast("cpu", dtype):
        made, theirs = ours(x), plain(x)
    assert made.dtype == theirs.dtype == dtype
    torch.testing.assert_close(made.float(), plain(x), rtol=0.05, atol=0.05)
    made.float().square().sum().backward()
    assert calls == ["bias_gelu_fwd", "bias_gelu_bwd"]
    assert ours.fc1.bias.grad.dtype == torch.float32  # as the parameter
    exact = copy.deepcopy(plain).double()
    exact(tokens().double()).square().sum().backward()
    torch.testing.assert_close(ours.fc1.bias.grad.double(), exact.fc1.bias.grad, rtol=0.1, atol=1.0)


def test_a_model_in_half_precision_under_autocast_of_the_other_kind():
    ours, plain = ours_of(layer()).half(), layer().half()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(tokens()), plain(tokens()), rtol=0.05, atol=0.05)


def test_only_the_class_changes():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=3)
    before = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    text, objects = repr(model), [id(part) for part in model.modules()]
    layers = use_mimkernels_mlp(model)
    assert layers == [block.mlp for block in model.blocks] and all(type(part) is Mlp for part in layers)
    assert {name: id(value) for name, value in model.state_dict(keep_vars=True).items()} == before
    assert [id(part) for part in model.modules()] == objects and repr(model) == text
    assert use_mimkernels_mlp(model) == layers
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(block.mlp) for block in again.blocks] == [Mlp, Mlp]


def test_other_kinds_stay_and_a_model_without_is_refused():
    class Wider(TimmMlp):
        pass

    model = nn.ModuleList([Wider(8), GluMlp(8), nn.Linear(8, 8)])
    with pytest.raises(ValueError, match="ModuleList has no timm.layers.Mlp"):
        use_mimkernels_mlp(model)
    assert use_mimkernels_mlp(model, required=False) == []
    assert [type(part) for part in model] == [Wider, GluMlp, nn.Linear]


def test_built_like_timm_s():
    options = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", mlp_layer=Mlp, **options)
    assert type(model.blocks[0].mlp) is Mlp
    plain = timm.create_model("vit_tiny_patch16_224", **options)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(backend):
    torch._dynamo.reset()
    ours, x = ours_of(layer()), tokens().requires_grad_()
    out = torch.compile(ours, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(out, ours(x), rtol=1e-5, atol=1e-5)
    out.sum().backward()
    assert ours.fc1.bias.grad is not None


def test_gradient_checkpointing(calls):
    from torch.utils.checkpoint import checkpoint

    ours, x = ours_of(layer()), tokens().requires_grad_()
    expected = torch.autograd.grad(ours(x).square().sum(), [x, *ours.parameters()])
    calls.clear()
    out = checkpoint(ours, x, use_reentrant=False)
    got = torch.autograd.grad(out.square().sum(), [x, *ours.parameters()])
    assert calls == ["bias_gelu_fwd", "bias_gelu_fwd", "bias_gelu_bwd"]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_tensors_with_rules_of_their_own_run_timm_s_code(calls):
    class Tagged(torch.Tensor):
        pass

    plain = layer()
    ours, x = ours_of(plain), tokens().as_subclass(Tagged)
    made = ours(x)
    assert type(made) is Tagged and torch.equal(made, plain(x)) and calls == []


def test_torch_fx_and_torchscript_get_timm_s_code():
    plain = layer()
    ours = ours_of(plain)
    nodes = [[str(node) for node in torch.fx.symbolic_trace(module).graph.nodes] for module in (ours, plain)]
    assert nodes[0] == nodes[1] and "fc1" in nodes[0] and "act" in nodes[0]
    with pytest.warns(UserWarning, match="original classes"):
        scripted = torch.jit.script(ours)
    assert torch.equal(scripted(tokens()), plain(tokens())) and type(ours) is TimmMlp
