"""timm's block on mimkernels.add_layer_norm: the same numbers, the same names, in the same objects."""

import copy
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("timm")
import timm
from timm.layers import DropPath, LayerNorm, LayerScale, RmsNorm, SwiGLU
from timm.layers import Mlp as TimmMlp
from timm.models.vision_transformer import Block as TimmBlock

from mimkernels.nn import Block, use_mimkernels_attention, use_mimkernels_block, use_mimkernels_mlp
from mimkernels.nn import block as fused_block
from mimkernels.nn.block import reason_against
from mimkernels.ops import use_backend
from mimkernels.testing import Watch
from tests.nn.timm_layers import assert_same_as_timm, run

pytestmark = pytest.mark.usefixtures("fused_at_any_size")


def layer(**options):
    torch.manual_seed(0)
    made = TimmBlock(24, num_heads=3, **{"qkv_bias": True, **options})
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return made


def ours_of(module):
    module = copy.deepcopy(module)
    use_mimkernels_block(module)
    return module


def tokens(*shape):
    return torch.randn(shape or (5, 17, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calls():
    """The schemas of add_layer_norm that were reached."""

    def note(op, args):
        name = op._schema.name.partition("::")[2]
        return name if op.namespace == "mimkernels" and name.startswith("add_layer_norm") else None

    with Watch(note) as reached:
        yield reached.seen


ONCE = ["add_layer_norm_fwd", "add_layer_norm_bwd"]
LAYERS = {
    "plain": {},
    "LayerScale": {"init_values": 0.5},
    "torch's LayerNorm": {"norm_layer": nn.LayerNorm},
    "no affine": {"norm_layer": lambda dim, **kwargs: LayerNorm(dim, affine=False)},
    "no bias": {"norm_layer": lambda dim, **kwargs: nn.LayerNorm(dim, bias=False, eps=1e-3)},
    "another MLP": {"mlp_layer": SwiGLU},
    "norms of q and k": {"qk_norm": True, "norm_layer": LayerNorm},
}


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_output_and_gradients_are_timm_s(options, train, calls):
    plain, x = layer(**options).train(train), tokens()
    assert_same_as_timm(run(ours_of(plain), x), run(plain, x), run(plain, x.double()))
    assert calls == ONCE


def test_masks_are_passed_on(calls):
    plain, x = layer(), tokens()
    mask = torch.zeros(17, 17).masked_fill_(torch.ones(17, 17).triu(1).bool(), float("-inf"))
    ours = run(ours_of(plain), x, attn_mask=mask)
    assert_same_as_timm(ours, run(plain, x, attn_mask=mask), run(plain, x.double(), attn_mask=mask.double()))
    assert not torch.equal(ours["out"], run(plain, x)["out"]) and calls == ONCE


@pytest.mark.parametrize("shape", [(0, 17, 24), (1, 1, 24)], ids=str)
def test_few_tokens(shape):
    torch.testing.assert_close(ours_of(layer())(tokens(*shape)), layer()(tokens(*shape)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale_by_keep", [True, False])
@pytest.mark.parametrize("rate", [0.4, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drop_path_drops_the_same_images(dtype, rate, scale_by_keep, calls):
    plain = layer(drop_path=rate, init_values=0.5).train()
    for part in (plain.drop_path1, plain.drop_path2):
        part.scale_by_keep = scale_by_keep
    x = tokens(16, 5, 24).to(dtype)
    ours, theirs = run(ours_of(plain), x), run(plain, x)
    for name in ours:
        tolerance = 1e-5 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance)
    if rate == 1.0:
        assert torch.equal(ours["out"], x)
    else:
        assert 0 < (ours["out"] == x).all(-1).all(-1).sum() < 16  # some lose both branches
    assert calls == ONCE
    calls.clear()
    torch.testing.assert_close(ours_of(plain).eval()(tokens()), plain.eval()(tokens()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_few_numbers_run_timm_s_code_unless_a_backend_is_named(autocast, calls, monkeypatch):
    plain, x = layer(), tokens()
    ours = ours_of(plain)

    def made(module, small):
        calls.clear()
        monkeypatch.setattr(fused_block, "SMALL", small)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return module(x), len(calls)

    bound = x.numel() * (8 if autocast else 1)
    (fused, ops), (left, none) = made(ours, bound), made(ours, bound + 8)
    assert ops == 1 and none == 0 and torch.equal(left, made(plain, 0)[0])
    torch.testing.assert_close(fused, left, rtol=1e-5, atol=2e-2 if autocast else 1e-5)
    with use_backend("cpu"):
        assert made(ours, bound + 8)[1] == (2 if autocast else 1)


def test_a_norm_with_its_cast_is_fused_from_half_the_bound(calls, monkeypatch):
    ours, x = ours_of(layer()), tokens()
    for most, names in ((2 * x.numel(), ONCE[:1] * 2), (2 * x.numel() + 2, ONCE[:1])):
        calls.clear()
        monkeypatch.setattr(fused_block, "SMALL", most)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            ours(x)
        assert calls == names


def hooked(name, register):
    return lambda module: getattr(getattr(module, name), register)(lambda *args: None)


def with_forward_of_its_own(module):
    forward = module.norm2.forward
    module.norm2.forward = lambda x: forward(x) + 1


def fast(module):
    module.norm2._fast_norm = True


LEFT_TO_TIMM = {
    "another norm": lambda module: setattr(module, "norm2", RmsNorm(24)),
    "a subclass of LayerNorm": lambda module: setattr(module, "norm2", type("Mine", (nn.LayerNorm,), {})(24)),
    "a norm of two dimensions": lambda module: setattr(module, "norm2", nn.LayerNorm((17, 24))),
    "timm's fast norm": fast,
    "parametrized": lambda module: nn.utils.parametrize.register_parametrization(module.norm2, "weight", nn.Tanh()),
    "another scale": lambda module: setattr(module, "ls1", nn.Hardtanh()),
    "a scale in place": lambda module: setattr(module, "ls1", LayerScale(24, inplace=True)),
    "another drop": lambda module: setattr(module, "drop_path1", nn.Dropout(0.5)),
    "a forward of its own": with_forward_of_its_own,
    **{
        f"{register} on {name}": hooked(name, register)
        for name in ("norm2", "ls1", "drop_path1")
        for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")
    },
}


@pytest.mark.parametrize("change", LEFT_TO_TIMM.values(), ids=LEFT_TO_TIMM.keys())
def test_what_is_not_plain_runs_timm_s_code(change, calls):
    plain = layer()
    ours = ours_of(plain)
    assert ours(tokens()).shape == (5, 17, 24) and calls == ONCE[:1]
    for module in (plain, ours):
        torch.manual_seed(3)
        change(module)
    assert reason_against(ours) is not None
    calls.clear()
    made = []
    for module in (plain, ours):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            made.append(module(tokens()))
    assert torch.equal(*made) and calls == []


def test_hooks_on_the_norm_still_see_it():
    ours, plain, seen = ours_of(layer()), layer(), []
    for module in (ours, plain):
        handle = module.norm2.register_forward_hook(lambda module, args, out: seen.append(out))
        module(tokens())
        handle.remove()
        module(tokens())
    assert torch.equal(*seen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_autocast_gives_timm_s_dtype_and_values(dtype, scale, calls):
    plain = layer(init_values=scale)
    use_mimkernels_mlp(plain)
    ours, x = ours_of(plain), tokens().requires_grad_()
    with torch.autocast("cpu", dtype):
        made, theirs = ours(x), plain(x)
    assert made.dtype == theirs.dtype == torch.float32
    assert calls == ["add_layer_norm_fwd"] * 2  # norm1 has nothing to add, but gives what qkv would cast to
    exact = plain(x)
    assert (made - exact).norm() <= 1.2 * (theirs - exact).norm()
    gradients = [torch.autograd.grad(out.square().sum(), module.parameters()) for out, module in
                 ((made, ours), (theirs, plain), (exact, plain))]  # fmt: skip
    for got, wanted, right in zip(*gradients, strict=True):
        assert got.dtype == wanted.dtype
        assert (got - right).norm() <= 1.2 * (wanted - right).norm() + 1e-2 * right.norm()


def dtypes_seen(module, *names):
    """What forward pre-hooks on parts of a block see under autocast."""
    seen = []
    for name in names:
        module.get_submodule(name).register_forward_pre_hook(lambda part, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        module(tokens())
    return seen


@pytest.mark.parametrize("names", [("attn", "mlp"), ("attn.qkv", "mlp.fc1")], ids=str)
def test_hooks_behind_the_norms_see_timm_s_dtype(names):
    assert dtypes_seen(ours_of(layer()), *names) == dtypes_seen(layer(), *names) == [torch.float32] * 2


def test_a_reader_of_another_kind_gets_timm_s_dtype():
    class Reads(TimmMlp):
        def forward(self, x):
            self.seen = x.dtype
            return super().forward(x)

    ours = ours_of(layer(mlp_layer=Reads))
    with torch.autocast("cpu", torch.bfloat16):
        ours(tokens())
    assert ours.mlp.seen == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision(dtype, calls):
    plain = layer(init_values=0.5)
    ours, theirs = (run(module, tokens().to(dtype)) for module in (ours_of(plain), plain))
    exact = run(plain.to(dtype).double(), tokens().to(dtype).double())
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype == dtype
        error, error_of_timm = ((r[name].double() - exact[name]).norm() for r in (ours, theirs))
        assert error <= 2 * error_of_timm, name  # sums of a few numbers that were rounded apart
    assert calls == ONCE


def test_mixed_dtypes_that_pytorch_computes_otherwise_are_its_own(calls):
    plain = layer(init_values=0.5).bfloat16()
    plain.norm2.float()  # which CPUs take, with tokens in bf16
    ours, x = ours_of(plain), tokens().bfloat16()
    assert torch.equal(ours(x), plain(x)) and calls == []
    plain = layer(init_values=0.5)  # under autocast its gamma makes a stream in bf16 fp32
    ours = ours_of(plain)
    with torch.autocast("cpu", torch.bfloat16):
        made, theirs = ours(x), plain(x)
    assert made.dtype == theirs.dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"init_values": 0.5, "drop_path": 0.3}], ids=str)
def test_where_there_is_no_kernel_timm_s_code_runs(options, calls):
    plain = layer(**options).train()
    ours = ours_of(plain)
    made = []
    for module in (ours, plain):
        torch.manual_seed(3)
        made.append(module.double()(tokens().double()))
    assert torch.equal(*made)
    ours, plain = ours.float(), plain.float()
    with use_backend("reference"):
        torch.manual_seed(3)
        first = ours(tokens())
    torch.manual_seed(3)
    assert torch.equal(first, plain(tokens())) and calls == []
    assert ours.to("meta")(tokens().to("meta")).shape == (5, 17, 24)


def test_only_the_class_changes():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=3)
    before = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    text, objects = repr(model), [id(part) for part in model.modules()]
    blocks = use_mimkernels_block(model)
    assert blocks == list(model.blocks) and all(type(part) is Block for part in blocks)
    assert {name: id(value) for name, value in model.state_dict(keep_vars=True).items()} == before
    assert [id(part) for part in model.modules()] == objects and repr(model) == text
    assert use_mimkernels_block(model) == blocks
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(block) for block in again.blocks] == [Block, Block]


def test_other_kinds_stay_and_a_model_without_is_refused():
    class Wider(TimmBlock):
        pass

    model = nn.ModuleList([Wider(8, 1), nn.Linear(8, 8)])
    with pytest.raises(ValueError, match="ModuleList has no timm.models.vision_transformer.Block"):
        use_mimkernels_block(model)
    assert use_mimkernels_block(model, required=False) == []
    assert [type(part) for part in model] == [Wider, nn.Linear]


def test_built_like_timm_s():
    options = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", block_fn=Block, **options)
    assert type(model.blocks[0]) is Block
    plain = timm.create_model("vit_tiny_patch16_224", **options)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(backend):
    torch._dynamo.reset()
    ours, x = ours_of(layer(init_values=0.5, drop_path=0.4)).train(), tokens().requires_grad_()
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    compiled(x).sum().backward()
    assert ours.norm2.weight.grad is not None and ours.ls1.gamma.grad is not None
    ours.eval()
    torch.testing.assert_close(compiled(x), ours(x), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x), ours(x), rtol=0.05, atol=0.05)


def test_gradient_checkpointing(calls):
    from torch.utils.checkpoint import checkpoint

    ours, x = ours_of(layer(drop_path=0.4)).train(), tokens().requires_grad_()
    torch.manual_seed(2)
    expected = torch.autograd.grad(ours(x).square().sum(), [x, *ours.parameters()])
    calls.clear()
    torch.manual_seed(2)
    out = checkpoint(ours, x, use_reentrant=False)
    got = torch.autograd.grad(out.square().sum(), [x, *ours.parameters()])
    assert calls == ["add_layer_norm_fwd", "add_layer_norm_fwd", "add_layer_norm_bwd"]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_torch_func(calls):
    plain = layer(init_values=0.5)
    plain.attn.fused_attn = False  # PyTorch's SDPA has no forward-mode gradients
    ours, x, way = ours_of(plain), tokens(), tokens(7, 17, 24)[:5]

    def loss(module):
        return lambda weights, x: torch.func.functional_call(module, weights, (x,)).square().sum()

    made = []
    for module in (ours, plain):
        weights = dict(module.named_parameters())
        slope = torch.func.vmap(torch.func.grad(loss(module)), in_dims=(None, 0))(weights, x[:, None])
        _, tangent = torch.func.jvp(module, (x,), (way,))
        made.append({**slope, "vmap": torch.func.vmap(module)(x[:, None]), "jvp": tangent})
    for name, value in made[0].items():
        torch.testing.assert_close(value, made[1][name], rtol=1e-4, atol=1e-4)
    assert "add_layer_norm_bwd" in calls


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
    assert nodes[0] == nodes[1] and nodes[0].count("layer_norm") == 1
    traced = torch.jit.trace(ours, tokens())
    assert "mimkernels" not in {str(node.kind()).partition("::")[0] for node in traced.inlined_graph.nodes()}
    with pytest.warns(UserWarning, match="original classes"):
        scripted = torch.jit.script(ours)
    assert torch.equal(scripted(tokens()), plain(tokens())) and type(ours) is TimmBlock


def test_all_parts_together():
    plain = layer(init_values=0.5, drop_path=0.4).train()
    ours = ours_of(plain)
    use_mimkernels_attention(ours)
    use_mimkernels_mlp(ours)
    assert type(ours.drop_path1) is DropPath
    got, wanted = run(ours, tokens()), run(plain, tokens())
    for name, value in got.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-4)
