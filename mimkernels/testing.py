"""What every implementation is tested against: input factories, the float64 oracle, the one tolerance table.

A kernel passes when its error against the oracle is at most twice that of the plain PyTorch expression in the
same dtype, plus one rounding band of the result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mimkernels
from mimkernels.ops._registry import SPECS, OpSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where the tests run

# One rounding band: how far the nearest representable value may be, relative to the result.
ROUNDING = {
    torch.float32: 2.0**-23,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-10,
    torch.float64: 2.0**-52,
}
# Below this a result of that dtype is compared absolutely (the least normal number, with room for sums).
SMALLEST = {torch.float32: 1e-30, torch.bfloat16: 1e-30, torch.float16: 1e-7, torch.float64: 1e-300}
TIMES_PLAIN = 2.0
DRAWS = 4  # of the inputs, over which the plain expression's error is taken

LAYOUTS = ("contiguous", "strided", "permuted")


@dataclass(frozen=True)
class Case:
    """One call of one op: how its inputs are made, and which of them get gradients."""

    op: str
    label: str
    make: Callable[[torch.Generator], dict]
    grads: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = field(default=(torch.float32, torch.bfloat16, torch.float16))
    parameters: tuple[str, ...] = ()  # inputs that stay fp32 whatever the dtype of the others, as under autocast
    draws: int = DRAWS

    def __str__(self) -> str:
        return f"{self.op}-{self.label}"

    def inputs(self, dtype: torch.dtype, device: str = "cpu", layout: str = "contiguous", seed: int = 0) -> dict:
        """Keyword arguments of the op; floating-point tensors rounded to ``dtype``."""
        arguments = self.make(torch.Generator().manual_seed(seed))
        return {
            name: _placed(value, torch.float32 if name in self.parameters else dtype, device, layout)
            for name, value in arguments.items()
        }

    def upstream(self, name: str, out: Tensor, generator: torch.Generator) -> Tensor | None:
        """The gradient that reaches an output, a number of every dtype; None where the output is not used."""
        drawn = torch.randn(out.shape, generator=generator)
        return drawn.to(torch.bfloat16).to(torch.float16).to(out)


def _placed(value, dtype: torch.dtype, device: str, layout: str):
    if not isinstance(value, Tensor):
        return value
    value = value.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype)
    if layout == "strided" and value.dim() >= 2:  # rows further apart than they are long
        wide = torch.zeros((*value.shape[:-1], value.shape[-1] + 3), dtype=value.dtype, device=device)
        wide[..., : value.shape[-1]] = value
        return wide[..., : value.shape[-1]]
    if layout == "permuted" and value.dim() >= 2:  # the last dim is not contiguous
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    return value


def call(case: Case, inputs: dict, backend: str) -> dict[str, Tensor]:
    """The op's outputs by name."""
    made = getattr(mimkernels, case.op)(**inputs, backend=backend)
    if isinstance(made, Tensor):
        return {"output": made}
    if isinstance(made, mimkernels.TokenMask):
        return made._asdict()
    if case.op in ("query_pool", "weighted_pool"):
        return dict(zip(("output", "weights"), made, strict=True))
    return {"out": made.out, "lse": made.lse, **made.stats}


def run(case: Case, inputs: dict, backend: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs of a differentiable op, and the gradients of all outputs together, each with its own drawn upstream."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in case.grads if inputs.get(name) is not None}
    outputs = call(case, {**inputs, **leaves}, backend)
    detached = {name: out.detach() for name, out in outputs.items()}
    if not leaves:
        return detached, {}
    generator = torch.Generator().manual_seed(1)
    upstream = {name: case.upstream(name, out, generator) for name, out in outputs.items()}
    used = [name for name, out in outputs.items() if out.requires_grad and upstream[name] is not None]
    if not used:
        return detached, {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    grads = torch.autograd.grad(
        [outputs[name] for name in used],
        list(leaves.values()),
        [upstream[name] for name in used],
        materialize_grads=True,
    )
    return detached, dict(zip(leaves, grads, strict=True))


def doubled(inputs: dict) -> dict:
    """The same inputs in float64."""
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def oracle(case: Case, inputs: dict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The reference in float64 on the same (already rounded) inputs."""
    exact = doubled(inputs)
    if exact.get("dtype") is not None:
        exact["dtype"] = torch.float64
    return run(case, exact, "reference")


@functools.cache
def plain_errors(case: Case, dtype: torch.dtype, device: str, layout: str) -> dict[str, float]:
    """Largest error of the plain expression in ``dtype`` against the oracle, of every output and gradient.

    Over several draws of the inputs: of a small result, one draw may be right by luck to the last bit.
    """
    worst: dict[str, float] = {}
    for seed in range(case.draws):
        inputs = case.inputs(dtype, device, layout, seed)
        pairs = zip(("", "gradient of "), run(case, inputs, "reference"), oracle(case, inputs), strict=True)
        for prefix, plain, exact in pairs:
            for name in plain:
                error = (plain[name].double() - exact[name]).abs()
                error = error[error.isfinite()]
                largest = error.max().item() if error.numel() else 0.0
                worst[prefix + name] = max(worst.get(prefix + name, 0.0), largest)
    return worst


def check(
    case: Case, backend: str, dtype: torch.dtype, device: str = "cpu", layout: str = "contiguous"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients of the case on one backend, after comparing all of them with the oracle."""
    inputs = case.inputs(dtype, device, layout)
    outputs, grads = run(case, inputs, backend)
    exact, exact_grads = oracle(case, inputs)
    plain = plain_errors(case, dtype, device, layout)
    assert list(outputs) == list(exact)
    assert list(grads) == list(exact_grads)
    for name, out in outputs.items():
        assert_as_good_as_plain(name, out, plain[name], exact[name])
    for name, grad in grads.items():
        assert grad.dtype == inputs[name].dtype
        assert_as_good_as_plain(f"gradient of {name}", grad, plain[f"gradient of {name}"], exact_grads[name])
    return outputs, grads


def assert_as_good_as_plain(name: str, got: Tensor, plain_error: float, exact: Tensor) -> None:
    """Fail unless ``got`` is as near to ``exact`` as the rule of this module asks."""
    assert got.shape == exact.shape, f"{name}: shape {list(got.shape)}, expected {list(exact.shape)}"
    if not got.is_floating_point():
        assert torch.equal(got, exact), f"{name}: other integers than the reference"
        return
    exact = representable(exact, got.dtype)
    assert torch.equal(got.isnan(), exact.isnan()), f"{name}: NaN in other places than the oracle"
    finite = exact.isfinite()
    same_infinities = torch.equal(got.double()[~finite].nan_to_num(), exact[~finite].nan_to_num())
    assert same_infinities, f"{name}: infinities differ from the oracle"
    error = (got.double() - exact)[finite].abs()
    if error.numel() == 0:
        return
    allowed = TIMES_PLAIN * plain_error + ROUNDING[got.dtype] * exact[finite].abs() + SMALLEST[got.dtype]
    excess = (error - allowed).max().item()
    assert excess <= 0, (
        f"{name}: error {error.max().item():.3e} against the oracle, plain PyTorch has {plain_error:.3e} "
        f"({got.dtype}); beyond the allowance by {excess:.3e}"
    )


def representable(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Infinity for what is beyond the largest number of the dtype, as rounding has it."""
    return torch.where(exact.to(dtype).isinf(), exact.sign() * float("inf"), exact)


class Watch(TorchDispatchMode):
    """``seen`` collects what `note` makes of each torch op that runs, forward and backward, and of its arguments.

    Ops of which it makes None are left out.
    """

    def __init__(self, note: Callable[[torch._ops.OpOverload, tuple], Any]) -> None:
        super().__init__()
        self.note, self.seen = note, []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        noted = self.note(op, args)
        if noted is not None:
            self.seen.append(noted)
        return op(*args, **(kwargs or {}))


def cases(op: str | None = None) -> list[Case]:
    """Every case, or those of one op."""
    return [case for case in _CASES if op is None or case.op == op]


def _attention(batch, heads, length, dim, *, keys=None, bias=None, mask=False, prefix=0, stats=(), **options):
    """``positions``: "shared" or "per-image"; ``logits``: the size of the scores; ``hidden``: -inf in the bias."""

    def make(generator):
        nk = length if keys is None else keys
        # Views of one packed projection, as in every ViT.
        packed = torch.randn(batch, max(length, nk), 3, heads, dim, generator=generator)
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        made = {"q": q[:, :, :length] * options.get("logits", 1.0), "k": k[:, :, :nk], "v": v[:, :, :nk]}
        made["bias"] = None if bias is None else torch.randn(bias, generator=generator)
        if options.get("hidden"):
            made["bias"].masked_fill_(torch.rand(bias, generator=generator) < 0.3, float("-inf"))
        made["key_mask"] = torch.rand(batch, nk, generator=generator) < 0.7 if mask else None
        if mask and batch > 1:
            made["key_mask"][-1] = False  # an image that may attend nothing
        images = {"shared": (), "per-image": (batch,)}.get(options.get("positions", "shared"))
        coordinates = torch.rand(*images, max(0, length - prefix), 2, generator=generator) * 14
        made["positions"] = coordinates if "distance" in stats else None
        return {**made, "num_prefix": prefix, "stats": stats}

    return make


def _companion(batch, heads, length, dim, **options):
    def make(generator):
        made = _attention(batch, heads, length, dim, **options)(generator)
        kept = {name: made[name] for name in ("q", "k", "bias", "key_mask")}
        exact = {name: value for name, value in made.items() if name not in ("stats", "num_prefix", "positions")}
        kept["lse"] = mimkernels.attention(**doubled(exact), backend="reference").lse
        return kept

    return make


def _packed_attention(*sizes, **options):
    def make(generator):
        made = _attention(*sizes, **options)(generator)
        return {"qkv": torch.stack([made.pop(name).transpose(1, 2) for name in "qkv"], dim=2), **made}

    return make


def spec(op: str) -> OpSpec:
    """Of a public op; the packed one runs the kernels of attention."""
    return SPECS["attention" if op == "attention_qkvpacked" else op]


def backends(op: str) -> list[str]:
    return [impl.backend for impl in spec(op).impls]


# Input factories -------------------------------------------------------------------------------------------------


def token_ids(generator: torch.Generator, *shape: int, tokens: int) -> Tensor:
    """Ids without repetition in the last dim."""
    *outer, keep = shape
    return torch.rand(*outer, tokens, generator=generator).argsort(-1)[..., :keep]


def _gather(batch, tokens, keep, dim, *, masks=0, pos=False, prefix=0, repeat=False):
    def make(generator):
        outer = (masks, batch) if masks else (batch,)
        ids = token_ids(generator, *outer, keep, tokens=tokens)
        if repeat:
            ids = torch.randint(tokens, (*outer, keep), generator=generator)
        return {
            "x": torch.randn(batch, tokens, dim, generator=generator),
            "ids": ids,
            "pos": torch.randn(tokens, dim, generator=generator) if pos else None,
            "prefix": torch.randn(prefix, dim, generator=generator) if prefix else None,
        }

    return make


def _restore(batch, tokens, keep, dim, *, pos=False, num_prefix=0, repeat=False):
    def make(generator):
        restore = token_ids(generator, batch, tokens, tokens=tokens)
        if repeat:
            restore = torch.randint(tokens, (batch, tokens), generator=generator)
        return {
            "x": torch.randn(batch, num_prefix + keep, dim, generator=generator),
            "ids_restore": restore,
            "mask_token": torch.randn(dim, generator=generator),
            "pos": torch.randn(num_prefix + tokens, dim, generator=generator) if pos else None,
            "num_prefix": num_prefix,
        }

    return make


def _fill(batch, tokens, dim, ratio=0.6):
    def make(generator):
        return {
            "x": torch.randn(batch, tokens, dim, generator=generator),
            "mask": torch.rand(batch, tokens, generator=generator) < ratio,
            "mask_token": torch.randn(dim, generator=generator),
        }

    return make


def _bias_gelu(*size, bias=True, spread=1.0, **options):
    def make(generator):
        x = torch.randn(size, generator=generator) * spread
        return {"x": x, "bias": torch.randn(size[-1], generator=generator) if bias else None, **options}

    return make


def _images(generator, size, uint8):
    if uint8:
        return torch.randint(256, size, generator=generator, dtype=torch.uint8)
    return torch.rand(size, generator=generator)


def _normalisation(channels, given):
    return ([0.485, 0.456, 0.406][:channels], [0.229, 0.224, 0.225][:channels]) if given else (None, None)


def _patchify(size, patch, keep, *, masks=0, uint8=False, normalise=False, repeat=False, dtype=None):
    def make(generator):
        tokens = _token_count(size, patch)
        outer = (masks, size[0]) if masks else (size[0],)
        ids = None if keep is None else token_ids(generator, *outer, keep, tokens=tokens)
        if repeat:
            ids = torch.randint(tokens, (*outer, keep), generator=generator)
        mean, std = _normalisation(size[1], normalise)
        arguments = {"images": _images(generator, size, uint8), "ids": ids, "patch_size": patch}
        return {**arguments, "mean": mean, "std": std, "dtype": dtype}

    return make


def _loss(size, patch, keep, *, uint8=False, normalise=False, **options):
    def make(generator):
        tokens = _token_count(size, patch)
        sizes = (patch,) * (len(size) - 2) if isinstance(patch, int) else patch
        pixels = size[1] * int(torch.tensor(sizes).prod())
        mean, std = _normalisation(size[1], normalise)
        arguments = {"images": _images(generator, size, uint8), "patch_size": patch, "mean": mean, "std": std}
        arguments["pred"] = torch.randn(size[0], tokens if keep is None else keep, pixels, generator=generator)
        if keep is None:
            arguments["mask"] = torch.rand(size[0], tokens, generator=generator) < 0.75
        else:
            arguments["ids"] = token_ids(generator, size[0], keep, tokens=tokens)
        return {**arguments, **options}

    return make


def _token_count(size, patch) -> int:
    sizes = (patch,) * (len(size) - 2) if isinstance(patch, int) else patch
    return int(torch.tensor([length // side for length, side in zip(size[2:], sizes, strict=True)]).prod())


def _allowed(generator, batch, tokens, prefix):
    """A mask with one image that has no allowed token, and one that has a single one."""
    mask = torch.rand(batch, tokens, generator=generator) < 0.7
    mask[-1] = False
    mask[-2, prefix:] = False
    mask[-2, prefix] = True
    mask[0, prefix] = True
    return mask


def _query_pool(batch, tokens, dim, groups, *, width=None, prefix=0, mask=False, per_image=False, **options):
    def make(generator):
        made = {
            "x": torch.randn(batch, tokens, dim, generator=generator),
            "queries": torch.randn(*(batch,) * per_image, groups, dim, generator=generator),
            "values": None if width is None else torch.randn(batch, tokens, width, generator=generator),
            "mask": _allowed(generator, batch, tokens, prefix) if mask else None,
        }
        return {**made, "num_prefix": prefix, **options}

    return make


def _weighted_pool(batch, tokens, dim, groups=None, *, prefix=0, mask=False, **options):
    def make(generator):
        made = {
            "x": torch.randn(batch, tokens, dim, generator=generator),
            "scores": torch.randn(batch, *(() if groups is None else (groups,)), tokens, generator=generator),
            "mask": _allowed(generator, batch, tokens, prefix) if mask else None,
        }
        return {**made, "num_prefix": prefix, **options}

    return make


def _reduce_pool(batch, tokens, dim, kind, *, prefix=0, mask=False, p=None, **options):
    def make(generator):
        made = {
            "x": torch.randn(batch, tokens, dim, generator=generator),
            "mask": _allowed(generator, batch, tokens, prefix) if mask else None,
        }
        if p is not None:
            made["p"] = torch.tensor([p])
        return {**made, "kind": kind, "num_prefix": prefix, **options}

    return make


_ALL = ("entropy", "prefix_mass", "self_mass", "distance", "patch_entropy", "peak", "patch_mass")
_QKV = ("q", "k", "v", "bias")


def _attention_cases() -> list[Case]:
    made = {
        "plain": _attention(2, 2, 17, 16),
        "mae": _attention(2, 3, 50, 32, prefix=1, stats=_ALL),
        "everything": _attention(
            3, 2, 21, 24, bias=(3, 2, 21, 21), mask=True, prefix=2, stats=_ALL, positions="per-image"
        ),
        "cross": _attention(2, 2, 9, 16, keys=23, prefix=1, stats=("entropy", "prefix_mass", "patch_entropy", "peak")),
        "bias-per-head": _attention(2, 3, 18, 16, bias=(3, 18, 18)),
        "bias-per-image": _attention(2, 3, 18, 16, bias=(2, 1, 18, 18), stats=("entropy",)),
        "bias-shared": _attention(2, 3, 18, 16, bias=(1, 1, 18, 18)),
        "bias-few-tokens": _attention(2, 2, 9, 40, bias=(2, 9, 9), prefix=1, stats=_ALL, positions="shared"),
        "bias-few-queries": _attention(2, 2, 3, 40, keys=21, bias=(2, 1, 3, 21)),
        "bias-hides": _attention(2, 2, 20, 16, bias=(2, 20, 20), hidden=True, prefix=1, stats=_ALL),
        "key-mask": _attention(3, 2, 19, 16, mask=True, prefix=1, stats=_ALL),
        "huge-logits": _attention(1, 2, 33, 16, logits=300.0, prefix=1, stats=("entropy", "prefix_mass", "peak")),
        "no-images": _attention(0, 2, 5, 16, stats=("entropy",)),
        "no-keys": _attention(2, 2, 5, 16, keys=0, stats=("entropy",)),
        "all-prefix": _attention(1, 1, 3, 8, prefix=3, stats=("entropy", "prefix_mass", "patch_entropy", "patch_mass")),
    }
    for stat in _ALL:
        made[f"only-{stat}"] = _attention(1, 2, 26, 16, prefix=1, stats=(stat,))
    for length in (1, 2, 49, 64, 197, 256, 257, 1025):
        made[f"length-{length}"] = _attention(1, 1 if length > 64 else 2, length, 16, stats=("entropy", "self_mass"))
    for dim in (8, 64, 72, 80, 88, 96, 128):
        made[f"dim-{dim}"] = _attention(1, 1, 17, dim, stats=("entropy", "peak"))
    # Only where gradients are written differs from `attention`.
    packed = {
        "plain": _packed_attention(2, 2, 17, 16),
        "everything": _packed_attention(
            3, 2, 21, 24, bias=(3, 2, 21, 21), mask=True, prefix=2, stats=_ALL, positions="per-image"
        ),
        "one-token": _packed_attention(2, 3, 1, 8, stats=("entropy", "peak")),
        "no-tokens": _packed_attention(2, 2, 0, 16, stats=("entropy",)),
        "odd": _packed_attention(3, 5, 9, 24, stats=("entropy",)),
        "length-257": _packed_attention(1, 1, 257, 16),
        "dim-128": _packed_attention(1, 2, 33, 128),
    }
    return [Case("attention", label, make, _QKV) for label, make in made.items()] + [
        Case("attention_qkvpacked", label, make, ("qkv", "bias")) for label, make in packed.items()
    ]


def _companion_cases(op: str) -> list[Case]:
    made = {
        "plain": _companion(2, 3, 50, 32),
        "masked": _companion(2, 2, 21, 16, mask=True, bias=(2, 21, 21)),
        "bias-few-tokens": _companion(2, 2, 9, 40, bias=(2, 9, 9)),
        "long": _companion(1, 2, 300, 16),
        "cross": _companion(2, 2, 9, 24, keys=30),
        "no-images": _companion(0, 2, 5, 16),
    }
    return [Case(op, label, make) for label, make in made.items()]


_GATHER = ("x", "pos", "prefix")
_RESTORE = ("x", "mask_token", "pos")
_FILL = ("x", "mask_token")
_CASES = [
    Case("gather_tokens", "plain", _gather(2, 16, 4, 32), _GATHER),
    Case("gather_tokens", "mae", _gather(3, 49, 12, 64, pos=True, prefix=1), _GATHER),
    Case("gather_tokens", "odd", _gather(3, 17, 5, 37, pos=True, prefix=2), _GATHER),
    Case("gather_tokens", "masks", _gather(2, 20, 6, 24, masks=3, pos=True, prefix=1), _GATHER),
    Case("gather_tokens", "repeated-ids", _gather(2, 7, 11, 19, masks=2, pos=True), _GATHER),
    Case("gather_tokens", "keep-all", _gather(2, 9, 9, 16), _GATHER),
    Case("gather_tokens", "one", _gather(1, 1, 1, 1, pos=True, prefix=1), _GATHER),
    Case("gather_tokens", "no-images", _gather(0, 8, 3, 16, pos=True, prefix=1), _GATHER),
    Case("gather_tokens", "no-ids", _gather(2, 8, 0, 16, prefix=2), _GATHER),
    Case("restore_tokens", "plain", _restore(2, 16, 4, 32), _RESTORE),
    Case("restore_tokens", "mae", _restore(3, 49, 12, 64, pos=True, num_prefix=1), _RESTORE),
    Case("restore_tokens", "odd", _restore(3, 17, 5, 37, pos=True, num_prefix=2), _RESTORE),
    Case("restore_tokens", "keep-all", _restore(2, 9, 9, 16, pos=True), _RESTORE),
    Case("restore_tokens", "keep-none", _restore(2, 9, 0, 16, num_prefix=1), _RESTORE),
    Case("restore_tokens", "not-a-permutation", _restore(2, 12, 5, 19, repeat=True, pos=True), _RESTORE),
    Case("restore_tokens", "no-images", _restore(0, 8, 3, 16, pos=True, num_prefix=1), _RESTORE),
    Case("fill_mask_tokens", "plain", _fill(3, 49, 64), _FILL),
    Case("fill_mask_tokens", "odd", _fill(2, 17, 37), _FILL),
    Case("fill_mask_tokens", "all-masked", _fill(2, 5, 16, ratio=2.0), _FILL),
    Case("fill_mask_tokens", "none-masked", _fill(2, 5, 16, ratio=-1.0), _FILL),
    Case("fill_mask_tokens", "no-images", _fill(0, 5, 16), _FILL),
    Case("patchify_gather", "plain", _patchify((2, 3, 32, 32), 8, 4), ("images",)),
    Case("patchify_gather", "mae", _patchify((2, 3, 32, 32), 16, 1, normalise=True), ("images",)),
    Case("patchify_gather", "all", _patchify((2, 3, 12, 20), 4, None, normalise=True), ("images",)),
    Case("patchify_gather", "odd", _patchify((2, 2, 9, 25), (3, 5), 7), ("images",)),
    Case("patchify_gather", "masks", _patchify((2, 3, 16, 16), 4, 5, masks=3, normalise=True), ("images",)),
    Case("patchify_gather", "repeated-ids", _patchify((2, 1, 8, 8), 4, 6, repeat=True), ("images",)),
    Case("patchify_gather", "video", _patchify((2, 3, 4, 8, 12), (2, 4, 4), 5, normalise=True), ("images",)),
    Case("patchify_gather", "uint8", _patchify((2, 3, 16, 16), 4, 5, uint8=True, normalise=True)),
    Case(
        "patchify_gather",
        "uint8-bf16",
        _patchify((2, 3, 8, 8), 4, 3, uint8=True, normalise=True, dtype=torch.bfloat16),
    ),
    Case("patchify_gather", "uint8-video", _patchify((1, 3, 4, 8, 8), 4, 3, uint8=True, normalise=True)),
    Case("patchify_gather", "no-images", _patchify((0, 3, 8, 8), 4, 2), ("images",)),
    Case("masked_patch_loss", "ids", _loss((2, 3, 32, 32), 8, 12), ("pred",)),
    Case("masked_patch_loss", "mae", _loss((2, 3, 32, 32), 16, 3, norm_pix=True, normalise=True), ("pred",)),
    Case("masked_patch_loss", "mask", _loss((3, 3, 16, 24), 8, None, norm_pix=True), ("pred",)),
    Case("masked_patch_loss", "per-patch", _loss((2, 3, 16, 16), 4, None, reduction="none"), ("pred",)),
    Case(
        "masked_patch_loss",
        "per-patch-ids",
        _loss((2, 3, 16, 16), 4, 5, reduction="none", norm_pix=True),
        ("pred",),
    ),
    Case("masked_patch_loss", "l1", _loss((2, 3, 16, 16), 4, 5, kind="l1", layout="channels_first"), ("pred",)),
    Case(
        "masked_patch_loss",
        "smooth-l1",
        _loss((2, 3, 16, 16), 4, None, kind="smooth_l1", beta=0.5),
        ("pred",),
    ),
    Case("masked_patch_loss", "odd", _loss((2, 2, 9, 25), (3, 5), 7, norm_pix=True), ("pred",)),
    Case(
        "masked_patch_loss",
        "channels-first",
        _loss((2, 3, 12, 8), 4, None, layout="channels_first", norm_pix=True),
        ("pred",),
    ),
    Case(
        "masked_patch_loss",
        "uint8",
        _loss((2, 3, 16, 16), 8, 3, uint8=True, normalise=True, norm_pix=True),
        ("pred",),
    ),
    Case("masked_patch_loss", "video", _loss((2, 3, 4, 8, 8), (2, 4, 4), 5, norm_pix=True), ("pred",)),
    Case("masked_patch_loss", "no-images", _loss((0, 3, 8, 8), 4, 2), ("pred",)),
]
_CASES += _attention_cases() + _companion_cases("received_attention") + _companion_cases("head_divergence")
_QUERY_POOL = ("queries", "x", "values")
_WEIGHTED_POOL = ("x", "scores")
_REDUCE_POOL = ("x", "p")


def _pool_cases() -> list[Case]:
    """The first of each op's gradients is of an input whose first element always counts."""
    query = {
        "mae": _query_pool(3, 50, 48, 2, prefix=1, mask=True, return_weights=True),
        "plain": _query_pool(2, 49, 64, 1),
        "abmilp": _query_pool(2, 197, 96, 1, prefix=1, scale=1.0),
        "efficient-probing": _query_pool(2, 49, 64, 8, width=64, sliced=True, prefix=1),
        "sliced": _query_pool(3, 21, 36, 3, sliced=True, mask=True, return_weights=True),
        "values": _query_pool(2, 33, 24, 5, width=40, per_image=True, return_weights=True),
        "odd": _query_pool(3, 17, 37, 7, width=35, prefix=2, mask=True, sliced=True, return_weights=True),
        "odd-per-image": _query_pool(2, 19, 37, 11, per_image=True, mask=True),
        "many-queries": _query_pool(2, 30, 32, 33, return_weights=True),
        "long": _query_pool(1, 1025, 16, 2),
        "wide": _query_pool(1, 9, 1100, 1, prefix=1, return_weights=True),
        "huge-logits": _query_pool(1, 40, 16, 2, scale=300.0, return_weights=True),
        "one": _query_pool(1, 1, 1, 1, return_weights=True),
        "all-prefix": _query_pool(2, 3, 8, 2, prefix=3, return_weights=True),
        "no-queries": _query_pool(2, 5, 8, 0, return_weights=True),
        "no-tokens": _query_pool(2, 0, 8, 2, return_weights=True),
        "no-columns": _query_pool(2, 5, 0, 2, width=8, scale=1.0, return_weights=True),
        "no-images": _query_pool(0, 5, 16, 2, width=8, return_weights=True),
    }
    weighted = {
        "plain": _weighted_pool(2, 49, 64, return_weights=True),
        "groups": _weighted_pool(3, 50, 48, 6, prefix=1, mask=True, return_weights=True),
        "as-given": _weighted_pool(3, 21, 40, 3, normalize=False, mask=True, return_weights=True),
        "odd": _weighted_pool(3, 17, 37, prefix=2, mask=True),
        "long": _weighted_pool(1, 1025, 16, 2),
        "wide": _weighted_pool(1, 9, 1100, 1, normalize=False, prefix=1),
        "all-prefix": _weighted_pool(2, 3, 8, prefix=3, return_weights=True),
        "no-tokens": _weighted_pool(2, 0, 8, return_weights=True),
        "no-images": _weighted_pool(0, 5, 16, 2),
    }
    reduce = {
        "mean": _reduce_pool(2, 49, 64, "mean"),
        "mean-masked": _reduce_pool(3, 50, 37, "mean", prefix=1, mask=True),
        "mean-long": _reduce_pool(1, 1025, 24, "mean"),
        "max": _reduce_pool(2, 49, 64, "max"),
        "max-masked": _reduce_pool(3, 50, 37, "max", prefix=1, mask=True),
        "plain": _reduce_pool(2, 49, 64, "gem", p=3.0),
        "gem-masked": _reduce_pool(3, 50, 37, "gem", p=2.5, prefix=1, mask=True),
        "gem-number": _reduce_pool(2, 197, 40, "gem", prefix=1),
        "gem-floor": _reduce_pool(2, 9, 16, "gem", p=4.0, eps=0.5),
        "one": _reduce_pool(1, 1, 1, "gem", p=2.5),
        "all-prefix": _reduce_pool(2, 3, 8, "max", prefix=3),
        "no-tokens": _reduce_pool(2, 0, 8, "gem", p=3.0),
        "no-images": _reduce_pool(0, 5, 16, "mean"),
        "gem-no-images": _reduce_pool(0, 5, 16, "gem", p=3.0),
    }
    made = {"query_pool": (query, _QUERY_POOL), "weighted_pool": (weighted, _WEIGHTED_POOL)}
    made["reduce_pool"] = (reduce, _REDUCE_POOL)
    return [Case(op, label, make, grads) for op, (some, grads) in made.items() for label, make in some.items()]


_CASES += _pool_cases()


def _bias_gelu_cases() -> list[Case]:
    made = {
        "plain": _bias_gelu(2, 49, 64),
        "odd": _bias_gelu(3, 17, 37),
        "no-bias": _bias_gelu(2, 21, 40, bias=False),
        "tanh": _bias_gelu(2, 33, 48, approximate="tanh"),
        "large": _bias_gelu(2, 40, 56, spread=5.0),
        "tanh-large": _bias_gelu(2, 40, 56, spread=5.0, approximate="tanh"),
        "four-dims": _bias_gelu(2, 3, 5, 24),
        "vector": _bias_gelu(70),
        "many-rows": _bias_gelu(5000, 8),
        "wide": _bias_gelu(5, 3072),
        "one": _bias_gelu(1, 1, 1),
        "no-rows": _bias_gelu(2, 0, 16),
        "no-images": _bias_gelu(0, 5, 16),
        "no-columns": _bias_gelu(2, 5, 0),
    }
    grads = ("x", "bias")
    with_parameter = {"fp32-bias": _bias_gelu(3, 21, 40), "tanh-fp32-bias": _bias_gelu(2, 9, 35, approximate="tanh")}
    return [Case("bias_gelu", label, make, grads) for label, make in made.items()] + [
        Case("bias_gelu", label, make, grads, (torch.bfloat16, torch.float16), ("bias",))
        for label, make in with_parameter.items()
    ]


_CASES += _bias_gelu_cases()
