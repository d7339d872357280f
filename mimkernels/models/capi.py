"""The encoder of CAPI, which timm has not: rotary positions, of registers at the border of the image too."""

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import Tensor, nn

__all__ = ["CapiEncoder"]

_EPS = 1e-5


class CapiEncoder(nn.Module):
    """A Vision Transformer as CAPI (arXiv:2502.08769) publishes it: no [cls], no biases, RMSNorm.

    Queries and keys are turned by angles ``place @ freqs``; patches lie on a grid from 0 to 1, R registers at equal
    distances along its border. Layers are named as timm names them.

    Args:
        img_size, patch_size: pixels a side.
        embed_dim, depth, num_heads: D, blocks and heads.
        reg_tokens: R, a multiple of 4.
    """

    def __init__(
        self, img_size: int, patch_size: int, embed_dim: int, depth: int, num_heads: int, reg_tokens: int
    ) -> None:
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"patch size {patch_size} does not divide image size {img_size}")
        if reg_tokens % 4:
            raise ValueError(f"registers along the border come in fours, got {reg_tokens}")
        self.num_prefix_tokens = reg_tokens
        self.patch_embed = PatchEmbed(img_size, patch_size, 3, embed_dim)
        self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, embed_dim))
        self.blocks = nn.ModuleList(_Block(embed_dim, num_heads) for _ in range(depth))
        self.norm: nn.Module = nn.RMSNorm(embed_dim, eps=_EPS, elementwise_affine=False)
        self.register_buffer("places", _places(img_size // patch_size, reg_tokens), persistent=False)

    def forward_features(self, images: Tensor) -> Tensor:
        """``[B, R + N, D]``, registers first."""
        x = torch.cat((self.reg_token.expand(images.shape[0], -1, -1), self.patch_embed(images)), dim=1)
        for block in self.blocks:
            x = block(x, self.places)
        tokens: Tensor = self.norm(x)
        return tokens

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_features(images)


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(dim, eps=_EPS)
        self.attn = _Attention(dim, heads)
        self.norm2 = nn.RMSNorm(dim, eps=_EPS)
        self.mlp = _Mlp(dim)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), places)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.freqs = nn.Parameter(torch.zeros(2, dim // heads))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        angles = places @ self.freqs  # [R + N, D / H]
        cos, sin = angles.cos(), angles.sin()
        q, k = (_turned(part, cos, sin).to(v.dtype) for part in (q, k))
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.proj(x)
        return out


class _Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim, bias=False)
        self.fc2 = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Channel pairs (c, c + half) turned by an angle each."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _places(side: int, registers: int) -> Tensor:
    """``[R + N, 2]`` places in [0, 1]: registers around the border, then patches row by row."""
    steps = torch.linspace(0, 1, side)
    patches = torch.cartesian_prod(steps, steps)
    along = torch.arange(registers // 4) / max(registers // 4, 1)
    zero, one = torch.zeros_like(along), torch.ones_like(along)
    border = torch.cat([
        torch.stack(pair, dim=-1) for pair in ((along, zero), (one, along), (1 - along, one), (zero, 1 - along))
    ])  # fmt: skip
    low, high = patches.amin(0), patches.amax(0)  # of a single patch, registers lie where it does
    return torch.cat((low + border * (high - low), patches))
