"""Mixed pairs: what timm makes of a batch, and that the targets say so."""

import pytest
import torch

from mimkernels.data.batches import drawing_from
from mimkernels.engine.training.mixing import check_pairs, mix_pairs


def mixed(mixup: float, cutmix: float):
    """Image b has the value b everywhere, and class b."""
    pixels = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 8, 8).clone()
    with drawing_from(3):
        return mix_pairs(pixels, torch.arange(4), mixup=mixup, cutmix=cutmix, num_classes=4)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
def test_targets_are_the_shares_of_the_images(mixup, cutmix):
    pixels, shares = mixed(mixup, cutmix)
    assert shares.dtype == torch.float32 and 0 < shares[0, 0] < 1
    torch.testing.assert_close(shares.sum(1), torch.ones(4))
    torch.testing.assert_close(pixels.mean((1, 2, 3)), shares @ torch.arange(4.0))
    assert len(pixels[0].unique()) == (1 if mixup else 2)  # blended, or pasted
    torch.testing.assert_close(shares, shares.flip(0, 1))  # the first with the last


def test_odd_batches_are_refused_where_pairs_are_mixed():
    check_pairs(0.0, 0.0, 3)
    check_pairs(0.8, 0.0, 4)
    with pytest.raises(ValueError, match="batch_size must be even, got 3"):
        check_pairs(0.0, 1.0, 3)
