"""What the contract tests cannot see of the CPU library: instruction sets, threads, rounding, large and wide shapes."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mimkernels
from mimkernels.ops import _native

OPS = torch.ops.mimkernels
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")


def masks(batch, tokens, keep, in_order=False):
    return OPS.random_mask_fwd.cpu(7, 3, None, batch, tokens, keep, in_order, CPU)


def every_output(dtype):
    """Outputs of every op on shapes with odd sizes, repeated ids and more rows than one run of a sum."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=g).to(dtype)

    batch, tokens, keep, dim = 37, 23, 9, 83
    shuffle, restore, removed = masks(batch, tokens, keep)
    ids = torch.randint(0, tokens, (2, batch, keep), generator=g)
    outputs = [shuffle, restore, removed, *masks(3, 700, 100, True)]
    noise = torch.rand(5, 300, generator=g).mul(20).round()
    outputs += OPS.mask_from_noise_fwd.cpu(noise, 75, False)
    x, pos, prefix = draw(batch, tokens, dim), draw(tokens, dim), draw(2, dim)
    outputs += [OPS.gather_tokens_fwd.cpu(x, ids, pos, prefix)]
    outputs += OPS.gather_tokens_bwd.cpu(draw(2 * batch, 2 + keep, dim), ids, tokens, 2, True, True, True)
    kept, token, all_pos = draw(batch, 1 + keep, dim), draw(dim), draw(1 + tokens, dim)
    outputs += [OPS.restore_tokens_fwd.cpu(kept, restore, token, all_pos, 1)]
    grad = draw(batch, 1 + tokens, dim)
    outputs += OPS.restore_tokens_bwd.cpu(grad, restore, keep, 1, True, True, True)
    outputs += OPS.restore_tokens_bwd.cpu(grad, ids[0, :, :1].expand(-1, tokens), keep, 1, True, True, True)
    mask = removed.bool()
    outputs += [OPS.fill_mask_tokens_fwd.cpu(x, mask, token)]
    outputs += OPS.fill_mask_tokens_bwd.cpu(x, mask, True, True)
    for channels, patch in ((3, 8), (3, 6), (2, 3), (1, 20)):
        images = draw(4, channels, 2, 5 * patch, 2 * patch)
        pixels = torch.randint(0, 256, images.shape, generator=g, dtype=torch.uint8)
        scale, shift = torch.rand(channels, generator=g), torch.rand(channels, generator=g)
        some = torch.randint(0, 20, (2, 4, 6), generator=g)
        rows = OPS.patchify_gather_fwd.cpu(pixels, some, 1, patch, patch, scale, shift, dtype)
        sizes = (4, channels, 2, 5 * patch, 2 * patch, 1, patch, patch)
        outputs += [rows, OPS.patchify_gather_bwd.cpu(rows, some, *sizes, scale, dtype)]
        pred, mask = draw(4, 20, channels * patch * patch), torch.rand(4, 20, generator=g) < 0.7
        for kind, norm, last, mean in ((0, True, True, True), (1, False, False, False), (2, True, True, False)):
            options = (1, patch, patch, scale, shift, norm, kind, 0.5, last, mean, 0)
            loss = OPS.masked_patch_loss_fwd.cpu(pred, images, None, mask, *options)
            up = torch.rand(loss.shape, generator=g)
            outputs += [loss, OPS.masked_patch_loss_bwd.cpu(up, pred, images, None, mask, *options)]
            # Boxes around pixels; ids, which name the patches of a row anywhere, and columns of pixels that count.
            options = (1, patch, patch, scale, shift, False, kind, 0.5, last, mean, 7)
            columns = torch.rand(4, 5, 2 * patch, generator=g) < 0.7
            for source, ids, counted in ((images, some[0], None), (images[:, :, 0], None, columns)):
                rows = pred[:, : 6 if counted is None else 10]
                loss = OPS.masked_patch_loss_fwd.cpu(rows, source, ids, counted, *options)
                up = torch.rand(loss.shape, generator=g)
                outputs += [loss, OPS.masked_patch_loss_bwd.cpu(up, rows, source, ids, counted, *options)]
    return outputs


def digest():
    md5 = hashlib.md5()
    for dtype in FLOATS:
        for out in every_output(dtype):
            md5.update(out.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return md5.hexdigest()


def in_new_process(isa, code=None):
    """The last words of a process whose kernels are those of one instruction set."""
    command = [sys.executable, *(("-c", code) if code else (__file__,))]
    package = str(Path(mimkernels.__file__).parents[1])
    env = {**os.environ, "MIMKERNELS_CPU_ISA": isa, "PYTHONPATH": package}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    return (done.stdout or done.stderr).strip().splitlines()[-1]


def test_every_instruction_set_gives_the_same_bits():
    best = OPS.cpu_isa()
    assert best in ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")
    here = digest()
    for isa in {"portable", "portable" if best == "portable" else "avx2"}:
        assert in_new_process(isa) == f"{isa} {here}"


@pytest.mark.parametrize("unknown", ["sse9", "AVX2"])
def test_unknown_instruction_set_is_refused(unknown):
    words = in_new_process(unknown, "import mimkernels")
    assert words.startswith("ValueError") and f"MIMKERNELS_CPU_ISA={unknown}" in words and "portable" in words


def test_an_instruction_set_that_the_cpu_does_not_have_is_refused():
    wider = {"portable": "avx2", "avx2": "avx512"}.get(OPS.cpu_isa())
    if "MIMKERNELS_CPU_ISA" in os.environ or wider not in _native.library("cpu").build["isas"]:
        pytest.skip("no instruction set of the library is known to be missing here")
    words = in_new_process(wider, "import mimkernels")
    assert words.startswith("ValueError") and f"MIMKERNELS_CPU_ISA={wider}: this CPU does not support it" in words


def test_number_of_threads_changes_no_bit():
    before = torch.get_num_threads()
    try:
        digests = set()
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            digests.add(digest())
    finally:
        torch.set_num_threads(before)
    assert len(digests) == 1


# ---- rounding: patchify_gather of 1 x W images converts element by element ----


def convert(values, dtype):
    images = values.view(1, 1, 1, 1, -1)
    return OPS.patchify_gather_fwd.cpu(images, None, 1, 1, values.numel(), None, None, dtype).view(-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_value_widens_exactly(dtype):
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    assert torch.equal(convert(halves, torch.float32).nan_to_num(1e38), halves.float().nan_to_num(1e38))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_to_nearest_even_with_subnormals_and_quiet_nan(dtype):
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 18,), generator=g).to(torch.int32)
    near_ties = torch.arange(-(2**15), 2**15, dtype=torch.int32)[:, None] * 65536 + torch.tensor(
        [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFF, 0x1000, 0x1001], dtype=torch.int32
    )
    values = torch.cat([bits, near_ties.flatten()]).view(torch.float32)
    got, want = convert(values, dtype), values.to(dtype)
    assert torch.equal(got.isnan(), values.isnan())
    good = ~values.isnan()
    assert torch.equal(got[good].view(torch.int16), want[good].view(torch.int16))
    assert (got[~good].view(torch.int16) & (0x40 if dtype == torch.bfloat16 else 0x200)).all()


# ---- shapes beyond the contract's: outputs that bypass the cache, rows wider than a tile, long sums ----


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_outputs_equal_plain_torch(dtype):
    g = torch.Generator().manual_seed(0)
    batch, tokens, keep, dim = 120, 100, 93, 768
    x, pos = torch.randn(batch, tokens, dim, generator=g).to(dtype), torch.randn(tokens, dim, generator=g).to(dtype)
    shuffle, restore, removed = masks(batch, tokens, keep)
    ids, mask, token = shuffle[:, :keep], removed.bool(), x[0, 0]
    index = ids[..., None].expand(-1, -1, dim)
    gathered = x.gather(1, index)
    assert torch.equal(OPS.gather_tokens_fwd.cpu(x, ids[None], None, None), gathered)
    assert torch.equal(OPS.gather_tokens_fwd.cpu(x, ids[None], pos, None), gathered + pos[ids])
    dx = OPS.gather_tokens_bwd.cpu(gathered, ids[None], tokens, 0, True, True, False)[0]
    assert torch.equal(dx, torch.zeros_like(x).scatter(1, index, gathered))
    filled = torch.where(mask[..., None], token, x)
    assert torch.equal(OPS.restore_tokens_fwd.cpu(gathered, restore, token, pos, 0), filled + pos)
    assert torch.equal(OPS.restore_tokens_bwd.cpu(x, restore, keep, 0, True, False, False)[0], gathered)
    assert torch.equal(OPS.restore_tokens_bwd.cpu(x, restore, keep, 0, True, True, True)[0], gathered)
    assert torch.equal(OPS.fill_mask_tokens_fwd.cpu(x, mask, token), filled)
    assert torch.equal(OPS.fill_mask_tokens_bwd.cpu(x, mask, True, True)[0], x.masked_fill(mask[..., None], 0))


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_images_equal_plain_torch(dtype):
    images = torch.randn(30, 3, 1, 320, 320, generator=torch.Generator().manual_seed(0)).to(dtype)
    patches = images.unfold(3, 16, 16).unfold(4, 16, 16).permute(0, 2, 3, 4, 1, 5, 6).flatten(4).flatten(1, 3)
    assert torch.equal(OPS.patchify_gather_fwd.cpu(images, None, 1, 16, 16, None, None, dtype), patches)
    sizes = (30, 3, 1, 320, 320, 1, 16, 16)
    assert torch.equal(OPS.patchify_gather_bwd.cpu(patches, None, *sizes, None, dtype), images)
    ids, _, removed = masks(30, 400, 100)
    some = patches.gather(1, ids[:, :100, None].expand(-1, -1, 768))
    sparse = OPS.patchify_gather_bwd.cpu(some, ids[None, :, :100], *sizes, None, dtype)
    back = OPS.patchify_gather_fwd.cpu(sparse, None, 1, 16, 16, None, None, dtype)
    assert torch.equal(back, patches.masked_fill(removed.bool()[..., None], 0))
    pred = torch.zeros(30, 400, 768, dtype=dtype)
    options = (1, 16, 16, None, None, False, 0, 1.0, False, False, 0)
    dpred = OPS.masked_patch_loss_bwd.cpu(torch.full((30, 400), -384.0), pred, images, None, removed == 1, *options)
    assert torch.equal(dpred, patches.masked_fill(removed[..., None] == 0, 0))


@pytest.mark.parametrize("dim", [1024, 1500, 2049])
def test_rows_wider_than_a_tile(dim):
    x = torch.randn(3, 7, dim, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[[0, 0, 6], [1, 2, 3], [5, 5, 5]]])
    dx, dpos, _ = OPS.gather_tokens_bwd.cpu(x[:, :3], ids, 7, 0, True, True, False)
    want = torch.zeros(3, 7, dim).scatter_add(1, ids[0, ..., None].expand(-1, -1, dim), x[:, :3])
    torch.testing.assert_close(dx, want)
    torch.testing.assert_close(dpos, want.sum(0))
    restore, mask = torch.tensor([[3, 1, 0, 6, 2, 5, 4]] * 3), torch.tensor([[True, False, True, True] * 2][0][:7])
    dx, dtoken, dpos = OPS.restore_tokens_bwd.cpu(x, restore, 3, 0, True, True, True)
    assert torch.equal(dx, x[:, [2, 1, 4]])
    torch.testing.assert_close(dtoken, x[:, [0, 3, 5, 6]].sum((0, 1)))
    torch.testing.assert_close(dpos, x.sum(0))
    dtoken = OPS.fill_mask_tokens_bwd.cpu(x, mask.expand(3, 7), False, True)[1]
    torch.testing.assert_close(dtoken, x[:, mask].sum((0, 1)))


def test_long_sums_are_as_accurate_as_torch():
    g = torch.Generator().manual_seed(0)
    grad = torch.randn(9000, 3, 40, generator=g) + 1
    restore = torch.stack([torch.randperm(3, generator=g) for _ in range(9000)])
    mask = torch.rand(9000, 3, generator=g) < 0.5
    dpos = OPS.restore_tokens_bwd.cpu(grad, restore, 1, 0, False, False, True)[2]
    dprefix = OPS.gather_tokens_bwd.cpu(grad, restore[None, :, :2], 3, 1, False, False, True)[2]
    dtoken = OPS.fill_mask_tokens_bwd.cpu(grad, mask, False, True)[1]
    for got, rows in ((dpos, grad), (dprefix, grad[:, :1]), (dtoken, (grad * mask[..., None]).flatten(0, 1))):
        exact = rows.double().sum(0)
        plain = (rows.sum(0) - exact).abs().max()
        assert (got - exact).abs().max() <= 2 * plain + exact.abs().max() * 2**-23


@pytest.mark.parametrize("tokens", [1, 3, 31, 64, 511, 512, 513, 4096])
def test_ranks_equal_a_stable_double_argsort(tokens):
    g = torch.Generator().manual_seed(tokens)
    noise = torch.randn(4, tokens, generator=g)
    noise[1] = noise[1].round()
    noise[2, ::3], noise[2, 1::3] = -0.0, 0.0
    noise[3, ::2], noise[3, -1] = torch.nan, torch.inf
    shuffle, restore, removed = OPS.mask_from_noise_fwd.cpu(noise, tokens // 2, False)
    assert torch.equal(shuffle, noise.argsort(dim=1, stable=True))
    assert torch.equal(restore, shuffle.argsort(dim=1))
    assert torch.equal(removed, (restore >= tokens // 2).float())


def test_ids_out_of_range_are_named():
    x, bad = torch.zeros(2, 5, 8), torch.tensor([[[0, 1], [4, 5]]])
    with pytest.raises(IndexError, match=r"gather_tokens: ids\[0, 1, 1\] = 5 is out of range \[0, 5\)"):
        OPS.gather_tokens_fwd.cpu(x, bad, None, None)
    with pytest.raises(IndexError, match=r"ids\[0, 1, 1\] = 5 is out of range \[0, 5\)"):
        OPS.gather_tokens_bwd.cpu(x[:, :2], bad, 5, 0, True, True, True)
    with pytest.raises(IndexError, match=r"restore_tokens: ids_restore\[1, 0\] = -1 is out of range \[0, 2\)"):
        OPS.restore_tokens_fwd.cpu(x, torch.tensor([[0, 1], [-1, 0]]), x[0, 0], None, 0)
    images, ids = torch.zeros(2, 3, 1, 8, 8), torch.tensor([[0, 3], [4, 0]])
    with pytest.raises(IndexError, match=r"patchify_gather: ids\[0, 1, 0\] = 4 is out of range \[0, 4\)"):
        OPS.patchify_gather_fwd.cpu(images, ids[None], 1, 4, 4, None, None, torch.float32)
    options = (1, 4, 4, None, None, False, 0, 1.0, True, True, 0)
    with pytest.raises(IndexError, match=r"masked_patch_loss: ids\[1, 0\] = 4 is out of range \[0, 4\)"):
        OPS.masked_patch_loss_fwd.cpu(torch.zeros(2, 2, 48), images, ids, None, *options)


def test_wrong_direct_calls_are_refused():
    x, ids = torch.zeros(2, 5, 8), torch.zeros(1, 2, 3, dtype=torch.int64)
    wrong = [
        lambda: OPS.gather_tokens_fwd.cpu(x, ids[:, :1], None, None),
        lambda: OPS.gather_tokens_fwd.cpu(x, ids.int(), None, None),
        lambda: OPS.gather_tokens_fwd.cpu(x, ids, x[0, :4], None),
        lambda: OPS.gather_tokens_fwd.cpu(x.double(), ids, None, None),
        lambda: OPS.gather_tokens_bwd.cpu(x, ids, 5, -1, True, True, True),
        lambda: OPS.restore_tokens_fwd.cpu(x, ids[0], x[0, 0].half(), None, 0),
        lambda: OPS.restore_tokens_fwd.cpu(x, ids[0], x[0, 0], None, 6),
        lambda: OPS.patchify_gather_fwd.cpu(x[None, None], None, 1, 3, 4, None, None, torch.float32),
        lambda: OPS.patchify_gather_fwd.cpu(x[None, None], None, 1, 1, 0, None, None, torch.float32),
        lambda: OPS.random_mask_fwd.cpu(0, 0, None, 2, 5, 6, False, CPU),
        lambda: OPS.random_mask_fwd.cpu(0, 0, None, -2, 5, 1, False, CPU),
    ]
    for call in wrong:
        with pytest.raises(ValueError):
            call()


if __name__ == "__main__":
    print(OPS.cpu_isa(), digest())
