"""timm's transformer block with its norms behind the sums, as in data2vec."""

from __future__ import annotations

from typing import Any

from torch import Tensor

try:
    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import Block
except ImportError as error:
    raise ImportError(
        f"mimkernels.nn.post_norm needs timm, which cannot be imported ({error}); pip install 'mimkernels[train]'"
    ) from error

__all__ = ["PostNormBlock", "biased_patches"]


class PostNormBlock(Block):
    """``x = norm1(x + attn(x)); x = norm2(x + mlp(x))``; parameters and names are those of timm's ``Block``.

    timm's own ``ResPostBlock`` normalises the branches, not the sums.
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        options: dict[str, Any] = {"is_causal": True} if is_causal else {}  # older releases of timm have none
        x = self.norm1(x + self.drop_path1(self.ls1(self.attn(x, attn_mask=attn_mask, **options))))
        out: Tensor = self.norm2(x + self.drop_path2(self.ls2(self.mlp(x))))
        return out


def biased_patches(*args: Any, **kwargs: Any) -> PatchEmbed:
    """timm's patch embedding with a bias, which its models with ``pre_norm`` leave out."""
    return PatchEmbed(*args, **{**kwargs, "bias": True})
