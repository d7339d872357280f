"""bf16 attention where its products run in matrix tiles: shapes at the edges of tiles, steps and blocks.

Run on the instruction set with tiles and on its stand-in, each in a process of its own.
"""

import sys

import pytest
import torch

import mimkernels
from mimkernels.testing import Case, check
from tests.ops.attention.cases import COMPARED, STATISTICS, attention
from tests.test_instruction_sets import on_an_instruction_set

ON_TILES = pytest.mark.parametrize("isa", ["avx2_amx", "amx_bf16"])
GRADS = ("q", "k", "v", "bias")
MASSES = ("entropy", "self_mass", "distance")


def shapes() -> dict:
    """Inputs by label: 16 rows are a tile, 32 queries a step, 256 what is summed at once.

    A block of keys is 512 in forward, 320 in backward.
    """
    made = {}
    for dim in range(8, 129, 8):
        made |= {f"dim {dim}, {n} tokens": attention(2, 2, n, dim) for n in (1, 15, 16, 17, 31, 33)}
        made[f"dim {dim}, everything"] = attention(1, 2, 50, dim, prefix=2, stats=STATISTICS)
        made[f"dim {dim}, cross"] = attention(2, 2, 33, dim, keys=50, mask=True)
    for tokens in (197, 256, 257, 319, 320, 321, 511, 512, 513, 577):
        made[f"{tokens} tokens"] = attention(1, 1, tokens, 40, prefix=1, stats=STATISTICS)
        made[f"{tokens} tokens, masked"] = attention(1, 3, tokens, 24, prefix=1, stats=("entropy",), mask=True)
        made[f"{tokens} keys"] = attention(1, 1, 20, 32, keys=tokens, stats=("entropy",))
        made[f"{tokens} queries"] = attention(1, 1, tokens, 32, keys=20, stats=("entropy",))
    for tokens in (1, 33, 197, 321):
        for batch, heads in ((1, 1), (1, 3), (2, 1), (2, 3)):
            bias = (batch, heads, tokens, tokens)
            prefix = min(1, tokens - 1)
            made[f"bias {bias}"] = attention(2, 3, tokens, 16, bias=bias, prefix=prefix, stats=MASSES)
            made[f"bias {bias}, hiding"] = attention(2, 3, tokens, 40, bias=bias, hidden=True)
        made[f"bias of 9 heads, {tokens} keys"] = attention(2, 9, 17, 40, keys=tokens, bias=(9, 17, tokens))
    for name in STATISTICS:
        for tokens in (50, 330):
            label = f"{name} alone, {tokens} tokens"
            made[label] = attention(2, 2, tokens, 72, prefix=3, stats=(name,), positions="per-image")
    return made


@ON_TILES
def test_results_agree_with_fp64_at_the_edges_of_tiles(isa):
    done = on_an_instruction_set(isa, "-m", "tests.ops.attention.test_matrix_tiles", isa)
    assert done.returncode == 0, done.stdout + done.stderr


@ON_TILES
def test_what_is_not_finite_stays_in_its_row_and_its_key(isa):
    call(isa, "spoil_a_row")


@ON_TILES
def test_bits_do_not_depend_on_threads(isa):
    call(isa, "vary_threads")


def call(isa: str, function: str) -> None:
    code = f"from tests.ops.attention import test_matrix_tiles; test_matrix_tiles.{function}()"
    done = on_an_instruction_set(isa, "-c", code)
    assert done.returncode == 0, done.stdout + done.stderr


def results(made: dict, dout: torch.Tensor) -> dict[str, torch.Tensor]:
    """out, lse and the gradients of the inputs that have any."""
    leaves = {name: made[name].detach().requires_grad_() for name in GRADS if made.get(name) is not None}
    called = mimkernels.attention(**{**made, **leaves}, backend="cpu")
    grads = torch.autograd.grad(called.out, list(leaves.values()), dout)
    return {"out": called.out, "lse": called.lse, **dict(zip(leaves, grads, strict=True))}


def spoil_a_row() -> None:
    """The gradients of one query and of every key are NaN, or infinite, where one upstream row is; no others."""
    for tokens, dim in ((17, 40), (50, 64), (330, 24)):
        made = Case("attention", "", attention(2, 2, tokens, dim)).inputs(torch.bfloat16)
        for wild in (torch.nan, torch.inf):
            dout = torch.randn(2, 2, tokens, dim).to(torch.bfloat16)
            clean = results(made, dout)
            dout[0, 1, tokens // 2, 3] = wild
            spoiled = results(made, dout)
            for name in ("q", "k", "v"):
                grad = spoiled[name]
                touched = torch.zeros(2, 2, tokens, dtype=torch.bool)
                touched[0, 1, tokens // 2 if name == "q" else slice(None)] = True
                assert torch.equal(grad[~touched], clean[name][~touched]), (tokens, name)
                wrong = grad[touched].isfinite()
                assert not (wrong[:, 3] if name == "v" else wrong).any(), (tokens, name)


def vary_threads() -> None:
    for batch, heads, tokens, dim, bias in (
        (3, 4, 50, 64, None),
        (1, 1, 300, 24, None),  # one head, in chunks of rows
        (1, 2, 700, 32, (1, 1, 700, 700)),
        (2, 9, 61, 40, (1, 9, 61, 61)),
    ):
        case = Case("attention", "", attention(batch, heads, tokens, dim, bias=bias, mask=True))
        made = case.inputs(torch.bfloat16)
        dout = torch.randn(batch, heads, tokens, dim).to(torch.bfloat16)
        torch.set_num_threads(1)
        alone = results(made, dout)
        for threads in (2, 3, 2):
            torch.set_num_threads(threads)
            for name, value in results(made, dout).items():
                assert torch.equal(value, alone[name]), (tokens, threads, name)


def main() -> int:
    """Every shape; prints those whose results are worse than the rule of mimkernels.testing allows."""
    assert torch.ops.mimkernels.cpu_isa() == sys.argv[1]
    torch.set_num_threads(1)
    failed = 0
    for label, make in shapes().items():
        try:
            check(Case("attention", label, make, GRADS, compared=COMPARED), "cpu", torch.bfloat16)
        except AssertionError as error:
            failed += 1
            print(f"{label}: {error}")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
