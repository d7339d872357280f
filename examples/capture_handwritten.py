"""Statistics of attention that you wrote yourself, and as a term of its loss.

python examples/capture_handwritten.py
"""

import torch
import torch.nn.functional as F
from torch import nn

import mimkernels
from mimkernels.heads import regularization_loss


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


torch.manual_seed(0)
model = nn.Sequential(*(Attention(96, heads=3) for _ in range(3)), nn.Linear(96, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
x, labels = torch.randn(16, 1 + 8 * 8, 96), torch.randint(10, (16,))  # [cls], then 8 x 8 patches

for step in range(40):
    layout = {"num_prefix": 1, "positions": (8, 8)}
    with mimkernels.capture(model, ["distance", "entropy"], **layout, differentiable=True) as heads:
        logits = model(x)[:, 0]
    # Heads are asked to look near by.
    locality = regularization_loss({"distance": 1.0}, heads.stats, num_prefix=1)
    loss = F.cross_entropy(logits, labels) + locality
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step:2d}  loss {loss:.3f}  of which locality {locality:.3f}")

print(heads.table())
print("entropy of the first layer:", tuple(heads["0"].stats["entropy"].shape), "[B, H, N]")
