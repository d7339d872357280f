"""Gradients belong to the ops: under torch.func, through raw torch ops, and refused where there are none."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vjp, vmap

import mimkernels as mk
from mimkernels import testing
from mimkernels.ops._registry import BACKENDS, backend_state
from tests.calls import VARIANTS, differentiated, tensors
from tests.calls import function as on

MODELS = 3
IDS = torch.tensor([[0, 3, 5], [5, 1, 2]])
MASK = torch.tensor([[0, 1, 0, 1, 1, 0], [1, 1, 0, 0, 1, 0]])
NATIVE = [name for name in ("cpu", "cuda-emulated") if name in BACKENDS and backend_state(name) is None]
each_op = pytest.mark.parametrize("name", [label for label in VARIANTS if differentiated(label)])
each_op_with_kernels = pytest.mark.parametrize(
    "name", [label for label, (op, _) in VARIANTS.items() if differentiated(label) and "cpu" in testing.backends(op)]
)


def gradients(outputs, inputs):
    return torch.autograd.grad(outputs.square().sum(), inputs)


def agree(ours, exact):
    torch.testing.assert_close(ours, exact, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        (backend, label)
        for backend in NATIVE
        for label, (op, _) in VARIANTS.items()
        if differentiated(label) and backend in testing.backends(op)
    ],
)
def test_backward_after_vmap_is_backward_of_each(name, backend):
    op, stacked = on(name, backend), tensors(name, MODELS)
    out = vmap(op)(*stacked)
    each = torch.stack([op(*(t[i] for t in stacked)) for i in range(MODELS)])
    assert torch.equal(out, each)
    for ours, exact in zip(gradients(out, stacked), gradients(each, stacked), strict=True):
        assert torch.equal(ours, exact)


@each_op_with_kernels
def test_vmap_over_some_arguments_and_other_dims(name):
    op, (first, *rest) = on(name, "cpu"), tensors(name)
    stacked = torch.stack([first.detach() * scale for scale in (1.0, 0.5, 2.0)], -1).requires_grad_()
    out = vmap(op, (-1, *[None] * len(rest)))(stacked, *rest)
    each = torch.stack([op(stacked[..., i], *rest) for i in range(MODELS)])
    agree(out, each)
    agree(gradients(out, [stacked, *rest]), gradients(each, [stacked, *rest]))


@each_op_with_kernels
def test_grad_and_per_sample_gradients(name):
    inputs, stacked = tensors(name), tensors(name, MODELS)
    wanted = tuple(range(len(inputs)))

    def of(backend):
        return grad(lambda *args: on(name, backend)(*args).square().sum(), wanted)

    agree(of("cpu")(*inputs), of("reference")(*inputs))
    agree(vmap(of("cpu"))(*stacked), vmap(of("reference"))(*stacked))


@each_op_with_kernels
def test_jacrev_and_vjp(name):
    inputs = tensors(name)
    agree(jacrev(on(name, "cpu"))(*inputs), jacrev(on(name, "reference"))(*inputs))
    for plain in (inputs, [t.detach() for t in inputs]):
        pulled = []
        for backend in ("cpu", "reference"):
            out, pull = vjp(on(name, backend), *plain)
            pulled.append(pull(torch.ones_like(out)))
        agree(*pulled)


@each_op
def test_forward_mode_is_right_by_default(name):
    inputs = [t.detach() for t in tensors(name)]
    tangents = [torch.randn_like(t) for t in inputs]
    doubles, double_tangents = [t.double() for t in inputs], [t.double() for t in tangents]
    exact = jvp(on(name, "reference"), tuple(doubles), tuple(double_tangents))
    agree([t.double() for t in jvp(on(name), tuple(inputs), tuple(tangents))], list(exact))
    with forward_ad.dual_level():
        dual = on(name)(*(forward_ad.make_dual(t, d) for t, d in zip(inputs, tangents, strict=True)))
        agree([t.double() for t in forward_ad.unpack_dual(dual)], list(exact))
    over_models = [torch.stack([t, 2 * t]) for t in inputs]
    both = jvp(vmap(on(name)), tuple(over_models), tuple(torch.stack([t, t]) for t in tangents))[1]
    agree(both[0].double(), exact[1])


@each_op_with_kernels
def test_forward_mode_of_a_kernel_is_refused(name):
    inputs = [t.detach() for t in tensors(name)]
    op = on(name, "cpu")
    transforms = {
        "jvp": lambda: jvp(op, tuple(inputs), tuple(inputs)),
        "jvp of vmap": lambda: jvp(vmap(op), tuple(t[None] for t in inputs), tuple(t[None] for t in inputs)),
        "vmap of jvp": lambda: vmap(lambda *args: jvp(op, args, args)[1])(*(t[None] for t in inputs)),
        "jvp of grad": lambda: jvp(grad(lambda *args: op(*args).square().sum()), tuple(inputs), tuple(inputs)),
        "dual": lambda: dual(op, inputs),
    }
    for transform in transforms.values():
        with pytest.raises(NotImplementedError, match=r"no forward-mode gradients.*backend='reference' has them"):
            transform()


def dual(op, inputs):
    with forward_ad.dual_level(), torch.no_grad():
        return op(*(forward_ad.make_dual(t, t) for t in inputs))


@each_op_with_kernels
def test_a_kernel_runs_where_forward_mode_is_on_but_not_asked_of_it(name):
    inputs = tensors(name)
    expected = gradients(on(name, "cpu")(*inputs), inputs)
    with forward_ad.dual_level():
        assert all(map(torch.equal, gradients(on(name, "cpu")(*inputs), inputs), expected))


@each_op_with_kernels
def test_double_backward_of_a_kernel_is_refused(name):
    inputs = tensors(name)
    first = torch.autograd.grad(on(name, "cpu")(*inputs).square().sum(), inputs, create_graph=True)
    agree(first, gradients(on(name, "reference")(*inputs), inputs))
    with pytest.raises(NotImplementedError, match="double backward.*backend='reference' has second derivatives"):
        torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
    with pytest.raises(NotImplementedError, match="double backward.*backend='reference' has second derivatives"):
        inner = grad(lambda *args: on(name, "cpu")(*args).square().sum())
        grad(lambda *args: inner(*args).square().sum())(*inputs)


@each_op
def test_second_derivatives_of_the_reference(name):
    inputs = tensors(name, dtype=torch.float64)
    first = torch.autograd.grad(on(name, "reference")(*inputs).square().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs, allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in second)


def test_raw_ops_are_differentiated():
    ops = torch.ops.mimkernels
    x, token = torch.randn(2, 6, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    raw = ops.fill_mask_tokens_fwd.cpu(x, MASK.bool(), token)
    agree(gradients(raw, [x, token]), gradients(mk.fill_mask_tokens(x, MASK, token), [x, token]))
    q = torch.randn(2, 1, 2, 6, 8, requires_grad=True)
    raw = vmap(lambda q: ops.attention_fwd.cpu(q, q, q, None, None, None, None, None, 0.5, 0, None, 0)[0])(q)
    agree(gradients(raw, q), gradients(torch.stack([mk.attention(t, t, t, scale=0.5).out for t in q]), q))
    torch.library.opcheck(ops.fill_mask_tokens_fwd.cpu, (x, MASK.bool(), token))


def test_a_raw_op_says_what_gets_no_gradient():
    ops = torch.ops.mimkernels
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    lse = mk.attention(q, q, q).lse
    positions = torch.rand(4, 2, requires_grad=True)
    stats = 1 << 3  # distance
    with pytest.raises(NotImplementedError, match="positions gets no gradient"):
        ops.attention_fwd.cpu(q, q, q, None, None, None, None, None, 1.0, 0, positions, stats)[0].sum().backward()
    assert not ops.received_attention_fwd.cpu(q, q, lse, None, None, None, None, None, 1.0).requires_grad
    assert not ops.head_divergence_fwd.cpu(q, q, lse, None, None, None, None, None, 1.0).requires_grad


def test_masks_carry_no_gradient():
    noise = torch.rand(3, 2, 6, requires_grad=True)
    masks = vmap(lambda n: mk.mask_from_noise(n, 2).mask)(noise)
    assert torch.equal(masks, torch.stack([mk.mask_from_noise(n, 2).mask for n in noise]))
    assert not masks.requires_grad
    assert not torch.ops.mimkernels.mask_from_noise_fwd.cpu(noise[0], 2, False)[2].requires_grad
    steps = torch.arange(3)
    assert torch.equal(
        vmap(lambda step: mk.random_mask(2, 6, 3, 7, step).mask)(steps),
        torch.stack([mk.random_mask(2, 6, 3, 7, int(step)).mask for step in steps]),
    )


def test_vmap_over_nothing_has_the_shape_of_its_outputs():
    assert vmap(lambda x: mk.gather_tokens(x, IDS, backend="cpu"))(torch.zeros(0, 2, 6, 8)).shape == (0, 2, 3, 8)
    w = torch.zeros(1, 8)
    pooled = vmap(lambda x: mk.query_pool(x, w, return_weights=True, backend="cpu"), 1)
    out, weights = pooled(torch.zeros(2, 0, 6, 8))
    assert out.shape == (0, 2, 1, 8)
    assert weights.shape == (0, 2, 1, 6)


@pytest.mark.parametrize("leave", ["grad", "jvp"])
def test_what_a_transform_left_behind_is_a_tensor_as_any_other(leave):
    x, kept = torch.randn(2, 6, 8, requires_grad=True), []

    def keep(t):
        kept.append(t * 1)
        return t.sum()

    grad(keep)(x) if leave == "grad" else jvp(keep, (x,), (x.detach(),))
    for _ in range(2):
        out = mk.reduce_pool(kept[0], "mean")
        torch.testing.assert_close(out, x.mean(1))
        torch.testing.assert_close(torch.autograd.grad(out.sum(), x, retain_graph=True)[0], torch.full_like(x, 1 / 6))


def test_a_call_inside_a_transform_does_not_change_later_calls():
    x = torch.randn(2, 6, 8, requires_grad=True)
    direct = mk.reduce_pool(x, "mean")
    vmap(lambda t: mk.reduce_pool(t, "mean"))(torch.stack([x, x]))
    grad(lambda t: mk.reduce_pool(t, "mean").sum())(x)
    assert torch.equal(mk.reduce_pool(x, "mean"), direct)
    assert torch.equal(gradients(mk.reduce_pool(x, "mean"), x)[0], gradients(direct, x)[0])


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.fc, self.out = (
            torch.nn.Linear(16, 48),
            torch.nn.Linear(16, 32, bias=False),
            torch.nn.Linear(32, 4),
        )
        self.bias = torch.nn.Parameter(torch.randn(32))

    def forward(self, x):
        packed = self.qkv(x).unflatten(-1, (3, 2, 8))
        x = x + mk.attention_qkvpacked(packed).out.transpose(1, 2).flatten(2)
        return self.out(mk.reduce_pool(mk.bias_gelu(self.fc(x), self.bias), "mean", num_prefix=1))


def test_an_ensemble_trains_as_its_members_do():
    torch.manual_seed(0)
    members = [Block() for _ in range(MODELS)]
    params, buffers = stack_module_state(members)
    x = torch.randn(2, 6, 16)
    out = vmap(lambda p, b: functional_call(members[0], (p, b), (x,)))(params, buffers)
    each = torch.stack([member(x) for member in members])
    agree(out, each)
    out.square().sum().backward()
    each.square().sum().backward()
    for name, stacked in params.items():
        agree(stacked.grad, torch.stack([member.get_parameter(name).grad for member in members]))


def test_accelerated_vision_transformers_in_an_ensemble_and_in_forward_mode():
    timm = pytest.importorskip("timm")
    from mimkernels.integrations.timm import accelerate

    def member(seed):
        torch.manual_seed(seed)
        return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=4).eval()

    plain, ours = [member(s) for s in range(2)], [member(s) for s in range(2)]
    for model in ours:
        accelerate(model)
    x = torch.randn(2, 3, 32, 32)
    found = []
    for block in plain[0].blocks:
        block.attn.fused_attn = False  # torch's own fused attention has no forward mode
    for models in (plain, ours):
        params, buffers = stack_module_state(models)
        out = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(params, buffers)  # noqa: B023
        out.square().sum().backward()
        found.append(
            (out.detach(), {name: p.grad for name, p in params.items()}, jvp(models[0], (x,), (x,))[1].detach())
        )
    agree(found[1], found[0])
    assert found[1][2].abs().max() > 1e-4
