"""The light decoder of MAE: mask tokens in, pixels of patches out."""

from timm.models.vision_transformer import Block
from torch import Tensor

from mimkernels.ops import gather_tokens

__all__ = ["DecoderBlock"]


class DecoderBlock(Block):
    """timm's block, whose second half can run for chosen tokens only; same parameters, same names.

    Attention needs every token's keys and values, but what follows it acts on each token alone: in the last
    block only the tokens that the loss reads need it.
    """

    # Takes chosen tokens where timm's takes masks, which a decoder has not.
    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """``[B, N, D]`` to ``[B, N, D]``, or to ``[B, L, D]``: the tokens `ids` ``[B, L]`` in that order."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        if ids is not None:
            x = gather_tokens(x, ids)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
