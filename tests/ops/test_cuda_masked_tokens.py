"""What the CUDA kernels of the masked-token ops do beyond the contract's cases: every path of every kernel."""

import pytest
import torch

import mimkernels as mk
from mimkernels import testing
from mimkernels.testing import DEVICE, Case
from tests.cases import OPS, rich
from tests.ops.fill_mask_tokens.cases import fill_mask_tokens
from tests.ops.gather_tokens.cases import gather_tokens
from tests.ops.masked_patch_loss.cases import masked_patch_loss
from tests.ops.patchify_gather.cases import patchify_gather
from tests.ops.restore_tokens.cases import restore_tokens

BACKEND = "cuda" if DEVICE == "cuda" else "cuda-emulated"
# Kernels have at most 2^14 blocks, then they loop.
MOST_BLOCKS = 2**14

TOKENS = ("x", "pos", "prefix")
CASES = [
    # Rows longer than a block is wide, and sums over enough images to be cut into slices.
    Case("gather_tokens", "wide", gather_tokens(2, 6, 4, 1100, masks=2, pos=True, prefix=3), TOKENS),
    Case("gather_tokens", "many-images", gather_tokens(70, 3, 2, 24, pos=True, prefix=1), TOKENS),
    # Enough rows for several to a thread.
    Case("gather_tokens", "many-rows", gather_tokens(1, 10, 8460, 24, pos=True, prefix=1, repeat=True), TOKENS),
    Case("gather_tokens", "many-rows-copied", gather_tokens(1, 10, 8460, 5, repeat=True), TOKENS),
    Case("restore_tokens", "wide", restore_tokens(2, 9, 4, 1100, pos=True, num_prefix=1), ("x", "mask_token", "pos")),
    Case("restore_tokens", "many-images", restore_tokens(70, 9, 4, 24, pos=True), ("x", "mask_token", "pos")),
    Case("restore_tokens", "fixed-positions", restore_tokens(70, 9, 4, 24, pos=True), ("x", "mask_token")),
    Case("restore_tokens", "mask-token-alone", restore_tokens(5, 9, 4, 24), ("mask_token",)),
    Case("fill_mask_tokens", "wide", fill_mask_tokens(2, 9, 1100), ("x", "mask_token")),
    Case("fill_mask_tokens", "many-parts", fill_mask_tokens(9, 300, 24), ("x", "mask_token")),
    Case("fill_mask_tokens", "x-alone", fill_mask_tokens(5, 9, 24), ("x",)),
    # Patches whose rows are no multiple of a vector, and larger than shared memory.
    Case("patchify_gather", "patch-14", patchify_gather((2, 3, 28, 28), 14, 3, uint8=True, normalise=True)),
    Case("patchify_gather", "wide", patchify_gather((1, 3, 32, 64), 32, 2, normalise=True), ("images",)),
    Case("masked_patch_loss", "patch-14", masked_patch_loss((2, 3, 28, 28), 14, 3, norm_pix=True), ("pred",)),
    Case("masked_patch_loss", "patch-32", masked_patch_loss((1, 3, 32, 96), 32, 2, norm_pix=True), ("pred",)),
    Case("masked_patch_loss", "patch-64", masked_patch_loss((1, 3, 64, 128), 64, 2, norm_pix=True), ("pred",)),
    Case("masked_patch_loss", "patch-68", masked_patch_loss((1, 3, 68, 68), 68, 1, norm_pix=True), ("pred",)),
    Case("masked_patch_loss", "one-pixel", masked_patch_loss((1, 1, 2, 3), 1, 4, norm_pix=False), ("pred",)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_float64_oracle(case, dtype, poisoned):
    testing.check(case, BACKEND, dtype, DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [rich(op) for op in OPS if "cuda" in testing.backends(op)], ids=str)
def test_takes_addresses_that_no_vector_starts_at(case, dtype, monkeypatch, poisoned):
    plain = testing._placed

    def one_element_later(value, *arguments):
        value = plain(value, *arguments)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        room = value.new_empty(value.numel() + 1)[1:].view(value.shape)
        return room.copy_(value)

    monkeypatch.setattr(testing, "_placed", one_element_later)
    testing.check(case, BACKEND, dtype, DEVICE)


def test_masks_of_more_images_than_blocks(poisoned):
    images = MOST_BLOCKS + 3
    for order in ("shuffle", "sorted"):
        options = {"order": order, "device": DEVICE}
        got = mk.random_mask(images, 3, 1, 5, backend=BACKEND, **options)
        expected = mk.random_mask(images, 3, 1, 5, backend="reference", **options)
        assert torch.equal(got.ids_restore, expected.ids_restore)
        assert torch.equal(got.mask, expected.mask)


def test_gathers_from_more_images_than_blocks(poisoned):
    images = MOST_BLOCKS + 3
    ids = torch.arange(images, device=DEVICE)[:, None] % 2
    x = torch.arange(2 * images, dtype=torch.float32, device=DEVICE).view(images, 2, 1)
    out = mk.gather_tokens(x.requires_grad_(), ids, backend=BACKEND)
    assert torch.equal(out, x.gather(1, ids[..., None]))
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(dx[..., 0], torch.nn.functional.one_hot(ids[:, 0], 2).float())


def test_patches_of_more_images_than_blocks(poisoned):
    images = torch.arange(MOST_BLOCKS + 3, device=DEVICE).view(-1, 1, 1, 1) % 251
    rows = mk.patchify_gather(images.to(torch.uint8), None, 1, mean=[0.0], std=[1 / 255], backend=BACKEND)
    torch.testing.assert_close(rows.flatten(), images.flatten().float())


def test_sums_over_more_rows_than_blocks(poisoned):
    tokens = 8 * MOST_BLOCKS + 5
    x = torch.zeros(1, tokens, 1, device=DEVICE, requires_grad=True)
    mask_token = torch.ones(1, device=DEVICE, requires_grad=True)
    mask = torch.arange(tokens, device=DEVICE)[None] % 3 == 0
    out = mk.fill_mask_tokens(x, mask, mask_token, backend=BACKEND)
    assert torch.equal(out[..., 0], mask.float())
    dx, dtoken = torch.autograd.grad(out.sum(), (x, mask_token))
    assert torch.equal(dx[..., 0], (~mask).float())
    assert dtoken.item() == mask.sum().item()


def test_losses_of_more_patches_than_warps(poisoned):
    images = 8 * MOST_BLOCKS + 5
    pixels = torch.zeros(images, 1, 1, 1, device=DEVICE)
    pred = (torch.arange(images, device=DEVICE) % 7).float().view(-1, 1, 1).requires_grad_()
    mask = torch.arange(images, device=DEVICE)[:, None] % 100 == 5  # the last one counts too
    loss = mk.masked_patch_loss(pred, pixels, mask=mask, patch_size=1, backend=BACKEND)
    counted = pred.detach()[..., 0][mask]
    torch.testing.assert_close(loss.item(), counted.square().mean().item())
    (dpred,) = torch.autograd.grad(loss, pred)
    expected = torch.where(mask, 2 * pred.detach()[..., 0] / mask.sum(), 0.0)
    torch.testing.assert_close(dpred[..., 0], expected)


def test_copies_more_rows_than_blocks_hold(poisoned):
    rows = 32 * MOST_BLOCKS + 40  # 8 warps of 4 rows each
    x = torch.randn(1, 3, 17, device=DEVICE, dtype=torch.float16)
    ids = torch.arange(rows, device=DEVICE)[None] % 3
    assert torch.equal(mk.gather_tokens(x, ids, backend=BACKEND)[0], x[0, ids[0]])
