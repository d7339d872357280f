"""The light decoder of MAE: mask tokens in, pixels of patches out."""

from timm.models.vision_transformer import Block
from torch import Tensor

from mimkernels.nn import Block as FusedBlock
from mimkernels.nn.block import add_normalised, is_for_timm, normalised
from mimkernels.ops import gather_tokens

__all__ = ["DecoderBlock", "FusedDecoderBlock"]


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


class FusedDecoderBlock(FusedBlock, DecoderBlock):
    """The decoder's block on ``mimkernels.add_layer_norm``, as ``mimkernels.nn.Block`` is timm's."""

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """As the decoder's."""
        if is_for_timm(self, x):
            return DecoderBlock.forward(self, x, ids)
        branch = self.attn(normalised(self.norm1, x, self.attn))
        if ids is None:
            x, inner = add_normalised(x, branch, self.ls1, self.drop_path1, self.norm2, self.mlp)
        else:
            x = gather_tokens(x + self.drop_path1(self.ls1(branch)), ids)
            inner = normalised(self.norm2, x, self.mlp)
        return x + self.drop_path2(self.ls2(self.mlp(inner)))
