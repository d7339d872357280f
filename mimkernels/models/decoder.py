"""The light decoder of MAE: mask tokens in, pixels of patches out."""

from timm.models.vision_transformer import Block
from torch import Tensor

from mimkernels.nn import Block as FusedBlock
from mimkernels.nn.block import is_for_timm, normalised
from mimkernels.nn.last_block import by_halves
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
        return by_halves(self, x, ids)


class FusedDecoderBlock(FusedBlock, DecoderBlock):
    """The decoder's block on ``mimkernels.add_layer_norm``, as ``mimkernels.nn.Block`` is timm's."""

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """As the decoder's."""
        if is_for_timm(self, x):
            return DecoderBlock.forward(self, x, ids)
        return self.joined(*self.branches(normalised(self.norm1, x, self.attn), x, ids=ids))

    def branches(self, inner: Tensor, x: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """As the block's, of the tokens `ids` only."""
        if ids is None:
            return super().branches(inner, x)
        x = gather_tokens(x + self.drop_path1(self.ls1(self.attn(inner))), ids)
        return x, self.mlp(normalised(self.norm2, x, self.mlp))
