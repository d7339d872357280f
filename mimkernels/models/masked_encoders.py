"""timm models as encoders that see every patch, the masked ones as mask tokens: ViT, BEiT, Swin and Swin V2."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from timm.models import checkpoint
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mimkernels.nn import embed_visible, use_mimkernels_attention, use_mimkernels_block, use_mimkernels_mlp
from mimkernels.nn._classes import is_heard, name_beside
from mimkernels.nn.encoder import (
    build_timm,
    check_encoder,
    check_headless,
    check_linear_patches,
    has_vision_transformers,
    positions_and_prefix,
    run_blocks,
    timm_module,
)
from mimkernels.nn.last_block import block_of_tokens, norms_act_alone, tokens_of
from mimkernels.nn.relative import BeitAttention, BiasTable
from mimkernels.nn.windows import window_positions

__all__ = [
    "FAMILIES",
    "Family",
    "compute_by",
    "create_masked_encoder",
    "encode",
    "family_of",
    "readout",
    "represent",
    "tokens_read",
]


class Family:
    """What a family of timm's models does with tokens whose masked ones have been replaced; no instances.

    Attributes:
        kinds: the classes of timm, none of their subclasses.
        module: of timm, in which they are built.
        options: arguments of timm's models as SimMIM was published with them.
        resizes: the model may take images of other sizes than it was built for.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]]
    module: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {}
    resizes: ClassVar[bool] = False

    @classmethod
    def check(cls, encoder: Any) -> None:
        """Raise ValueError, naming what and why, unless the family's functions fit this encoder."""
        check_linear_patches(encoder.patch_embed)
        check_headless(encoder)

    @staticmethod
    def init(encoder: Any) -> None:
        """Initialise as published, where timm does not."""

    @staticmethod
    def stride(encoder: Any) -> tuple[int, int]:
        """Pixels per output token."""
        height, width = encoder.patch_embed.patch_size
        return height, width

    @staticmethod
    def blocks(encoder: Any) -> Iterator[nn.Module]:
        yield from encoder.blocks

    @staticmethod
    def features(encoder: Any, x: Tensor, grid: tuple[int, int], ids: Tensor | int | None = None) -> Tensor:
        """Output tokens ``[B, P + L, D']``, prefix first, for patch tokens ``[B, N, D]`` that have no positions yet.

        Or those of them whose numbers are `ids` ``[B, K]``, or the first so many, as ``[B, K, D']``.
        """
        raise NotImplementedError

    @classmethod
    def run(cls, encoder: Any, x: Tensor, grid: tuple[int, int], ids: Tensor | None = None) -> Tensor:
        """``features`` without the prefix tokens, ``[B, L, D']``, or of the tokens `ids` behind them alone."""
        prefix = getattr(encoder, "num_prefix_tokens", 0)
        if ids is not None:
            return cls.features(encoder, x, grid, ids + prefix)
        return cls.features(encoder, x, grid)[:, prefix:]

    @staticmethod
    def positions(
        encoder: nn.Module, layers: Sequence[nn.Module], grid: tuple[int, int], device: torch.device
    ) -> Tensor | list[Tensor | None]:
        """Rows and columns of the tokens that attend to each other, for distances: of all layers, or of each."""
        places = torch.arange(math.prod(grid), device=device)
        return torch.stack((places // grid[1], places % grid[1]), dim=-1).float()


class ViT(Family):
    """Plain Vision Transformers: positions are added, prefix tokens put in front."""

    kinds = (VisionTransformer,)
    module = "vision_transformer"
    resizes = True

    @classmethod
    def check(cls, encoder: Any) -> None:
        check_encoder(encoder)

    @staticmethod
    def init(encoder: Any) -> None:
        _init_transformer(encoder)
        with torch.no_grad():
            for token in (encoder.cls_token, encoder.reg_token, encoder.pos_embed):
                if token is not None:
                    _trunc_normal(token)

    @staticmethod
    def features(encoder: Any, x: Tensor, grid: tuple[int, int], ids: Tensor | int | None = None) -> Tensor:
        pos, prefix = positions_and_prefix(encoder, grid)
        if pos is not None:
            x = x + pos
        if prefix is not None:
            x = torch.cat((prefix.expand(x.shape[0], -1, -1), x), dim=1)
        if pos is not None:
            x = encoder.pos_drop(x)
        tokens: Tensor = encoder.fc_norm(run_blocks(encoder, x, ids=ids))
        return tokens


class BEiT(Family):
    """BEiT's Vision Transformer with a relative position bias, that all blocks share: the ViT of SimMIM."""

    kinds = (Beit,)
    module = "beit"
    options: ClassVar[dict[str, Any]] = {
        "use_abs_pos_emb": False,
        "use_shared_rel_pos_bias": True,
        "use_rel_pos_bias": False,
        "init_values": 0.1,
    }

    @staticmethod
    def init(encoder: Any) -> None:
        _init_transformer(encoder)
        with torch.no_grad():
            for token in (encoder.cls_token, encoder.pos_embed):
                if token is not None:
                    _trunc_normal(token)

    @staticmethod
    def features(encoder: Any, x: Tensor, grid: tuple[int, int], ids: Tensor | int | None = None) -> Tensor:
        x = torch.cat((encoder.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        if encoder.pos_embed is not None:
            x = x + encoder.pos_embed
        x = encoder.pos_drop(x)
        bias = _shared_bias(encoder)
        for block in encoder.blocks:
            if encoder.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, shared_rel_pos_bias=bias)
            elif ids is not None and block is encoder.blocks[-1] and norms_act_alone(encoder):
                x, ids = block_of_tokens(block, x, ids, shared_rel_pos_bias=bias), None
            else:
                x = block(x, shared_rel_pos_bias=bias)
        tokens: Tensor = encoder.fc_norm(encoder.norm(x))
        return tokens_of(tokens, ids)


class Swin(Family):
    """Swin Transformers: attention in windows, patches merged from stage to stage. timm initialises as published."""

    kinds: ClassVar[tuple[type[nn.Module], ...]] = (SwinTransformer,)
    module = "swin_transformer"
    options: ClassVar[dict[str, Any]] = {"drop_path_rate": 0.0}

    @classmethod
    def check(cls, encoder: Any) -> None:
        super().check(encoder)
        size, stride = encoder.patch_embed.img_size, cls.stride(encoder)
        if any(pixels % step for pixels, step in zip(size, stride, strict=True)):
            raise ValueError(
                f"its stride of {_by(stride)} pixels does not divide images of {_by(size)}: patches would be padded"
            )
        for name, block in encoder.named_modules():
            window = getattr(block, "window_size", None)
            tokens = getattr(block, "input_resolution", None)
            if window is None or tokens is None:
                continue
            if any(length % side for length, side in zip(tokens, window, strict=True)):
                fit = [side for side in range(2, min(tokens) + 1) if not any(length % side for length in tokens)]
                raise ValueError(
                    f"its windows of {_by(window)} tokens do not divide the {_by(tokens)} tokens of {name} for images "
                    f"of {_by(size)} pixels; give window_size, here one of {', '.join(map(str, fit))}, or another "
                    "img_size"
                )

    @staticmethod
    def stride(encoder: Any) -> tuple[int, int]:
        height, width = encoder.patch_embed.patch_size
        merged = 2 ** (len(encoder.layers) - 1)
        return height * merged, width * merged

    @staticmethod
    def blocks(encoder: Any) -> Iterator[nn.Module]:
        for stage in encoder.layers:
            yield from stage.blocks

    @staticmethod
    def features(encoder: Any, x: Tensor, grid: tuple[int, int], ids: Tensor | int | None = None) -> Tensor:
        x = encoder.norm(encoder.layers(x.unflatten(1, grid)))  # [B, h', w', D']
        return tokens_of(x.flatten(1, 2), ids)

    @staticmethod
    def positions(
        encoder: nn.Module, layers: Sequence[nn.Module], grid: tuple[int, int], device: torch.device
    ) -> list[Tensor | None]:
        return window_positions((encoder,), layers)


class SwinV2(Swin):
    """Swin Transformers V2: cosine attention, norms behind the branches."""

    kinds = (SwinTransformerV2,)
    module = "swin_transformer_v2"


FAMILIES: tuple[type[Family], ...] = (ViT, BEiT, Swin, SwinV2)
_EXAMPLES = "vit_base_patch16_224, beit_base_patch16_224, swin_base_patch4_window7_224, swinv2_base_window12_192"


def family_of(encoder: nn.Module) -> type[Family]:
    """The family of an encoder.

    Raises:
        ValueError: it is of none, or its family's functions do not fit it; says why.
    """
    for family in FAMILIES:
        if type(encoder) in family.kinds or (family is ViT and isinstance(encoder, VisionTransformer)):
            family.check(encoder)
            return family
    kinds = [kind for family in FAMILIES for kind in family.kinds]
    raise ValueError(
        f"a {name_beside(type(encoder), *kinds)} is not one of timm's {', '.join(kind.__name__ for kind in kinds)}"
    )


def create_masked_encoder(
    name: str,
    *,
    img_size: int | Sequence[int] = 224,
    in_chans: int = 3,
    patch_size: int | Sequence[int] | None = None,
    **timm_kwargs: Any,
) -> nn.Module:
    """Build a timm model without pooling and head whose masked patches can be replaced, with its family's options.

    Raises:
        ValueError: the name is unknown, the model is of no supported family or does not fit the images (says why),
            or timm refuses an argument.
    """
    module = timm_module(name, "*")
    options: dict[str, Any] = {}
    if module is not None:
        known = {f"timm.models.{family.module}": family for family in FAMILIES}
        if module not in known and not has_vision_transformers(module):
            raise ValueError(
                f"{name!r} cannot be the encoder: it is built from timm's module {module.rpartition('.')[2]!r}; take a "
                f"ViT, BEiT, Swin or Swin V2, such as {_EXAMPLES}"
            )
        options = known[module].options if module in known else {}
    encoder = build_timm(
        name, img_size=img_size, in_chans=in_chans, patch_size=patch_size, **{**options, **timm_kwargs}
    )
    try:
        family_of(encoder)
    except ValueError as error:
        raise ValueError(f"{name!r} cannot be the encoder: {error}") from error
    return encoder


def compute_by(encoder: nn.Module, *, attention: str, mlp: str, block: str) -> None:
    """Let the blocks of `encoder` compute with the ops of this package, in place, where the choice is "mimkernels"."""
    if attention == "mimkernels":
        use_mimkernels_attention(encoder, required=False)
    if mlp == "mimkernels":
        use_mimkernels_mlp(encoder, required=False)
    if block == "mimkernels":
        use_mimkernels_block(encoder, required=False)


def encode(
    encoder: Any, images: Tensor, mean: Tensor | None = None, std: Tensor | None = None, *, first: int | None = None
) -> Tensor:
    """The normalised output ``[B, P + L, D]`` of an encoder of any family, prefix tokens first.

    Args:
        encoder: a timm model, as ``create_masked_encoder`` builds it.
        images: ``[B, C, H, W]``, uint8 (with `mean` and `std`) or floating point; where the family resizes, of any
            size that the patches divide.
        mean, std: per channel; pixels are normalised inside the kernel.
        first: only the first so many tokens are wanted, ``[B, first, D]``; None: all.
    """
    embed = encoder.patch_embed
    height, width = embed.patch_size
    x = embed_visible(images, None, embed.proj, norm=embed.norm, mean=mean, std=std)
    return family_of(encoder).features(encoder, x, (images.shape[-2] // height, images.shape[-1] // width), first)


def tokens_read(encoder: Any) -> int | None:
    """How many of the first tokens ``readout`` reads, if it reads no others."""
    return 1 if getattr(encoder, "cls_token", None) is not None else None


def represent(encoder: Any, images: Tensor, mean: Tensor | None = None, std: Tensor | None = None) -> Tensor:
    """``[B, D]``: ``readout`` of what ``encode`` gives, of no more tokens than it reads."""
    return readout(encoder, encode(encoder, images, mean, std, first=tokens_read(encoder)))


def readout(encoder: Any, tokens: Tensor) -> Tensor:
    """``[B, D]``: the [cls] token of what ``encode`` gives; of an encoder without one, the mean of the patch tokens."""
    if getattr(encoder, "cls_token", None) is not None:
        return tokens[:, 0]
    return tokens[:, getattr(encoder, "num_prefix_tokens", 0) :].mean(1)


def _init_transformer(encoder: Any) -> None:
    """Initialise as published for the ViT of SimMIM: normal of deviation 0.02 cut at one deviation, zero biases.

    The last linear layers of block i, counted from 1, are divided by the root of 2i. LayerScale and relative position
    bias keep timm's values, which are the published ones.
    """
    with torch.no_grad():
        for part in encoder.modules():
            if isinstance(part, nn.Linear | nn.Conv2d):
                _trunc_normal(part.weight)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
            elif isinstance(part, nn.LayerNorm) and part.elementwise_affine:
                nn.init.ones_(part.weight)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        for number, block in enumerate(encoder.blocks, 1):
            for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
                weight.div_(math.sqrt(2 * number))


def _shared_bias(encoder: Any) -> Tensor | BiasTable | None:
    """BEiT's bias of all blocks: its table, where our layers read that, or ``[H, 1 + N, 1 + N]``."""
    shared = encoder.rel_pos_bias
    if shared is None:
        return None
    if is_heard(shared) or not all(isinstance(block.attn, BeitAttention) for block in encoder.blocks):
        expanded: Tensor = shared()
        return expanded
    return BiasTable(shared.relative_position_bias_table, shared.relative_position_index)


def _trunc_normal(tensor: Tensor, std: float = 0.02) -> None:
    nn.init.trunc_normal_(tensor, std=std, a=-std, b=std)


def _by(sizes: Sequence[int]) -> str:
    return " x ".join(str(size) for size in sizes)
