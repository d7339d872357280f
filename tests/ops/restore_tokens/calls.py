"""Calls of restore_tokens, good and refused."""

import torch

X = torch.randn(2, 6, 8)
TOKEN = torch.randn(8)
RESTORE = torch.arange(6).expand(2, -1)

CALL = {
    "x": X[:, :4],
    "ids_restore": torch.tensor([[0, 3, 1, 4, 2, 5], [5, 1, 0, 2, 4, 3]]),
    "mask_token": TOKEN,
    "pos": torch.randn(7, 8),
    "num_prefix": 1,
}
LEAST = {"x": X[:, :3], "ids_restore": RESTORE, "mask_token": TOKEN}
REFUSED = [
    ({"x": X[0]}, ValueError, "x must have 3 dimensions, got 2"),
    ({"num_prefix": 4}, ValueError, r"num_prefix is 4 but there are 3 tokens"),
    ({"num_prefix": -1}, ValueError, "num_prefix is -1 but there are 3 tokens"),
    ({"x": torch.randn(2, 7, 8)}, ValueError, "x has 7 visible tokens .* restores only 6"),
    ({"mask_token": TOKEN[:7]}, ValueError, r"mask_token \[7\] has size 7 in dimension 0 but x"),
    ({"ids_restore": RESTORE[:1]}, ValueError, r"ids_restore \[1, 6\] has size 1 in dimension 0 but x"),
    ({"pos": X[0, :5]}, ValueError, r"pos \[5, 8\] must have num_prefix 0 \+ 6 patches .* = 6 rows"),
]
