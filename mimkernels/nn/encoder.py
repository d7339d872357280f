"""timm Vision Transformers as encoders that see the visible patches only."""

import difflib
import sys
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

try:
    import timm
    from timm.layers import PatchEmbed, resample_abs_pos_embed
    from timm.models import checkpoint_seq
    from timm.models.vision_transformer import VisionTransformer
except ImportError as error:
    raise ImportError(
        f"mimkernels.nn.encoder needs timm, which cannot be imported ({error}); pip install 'mimkernels[train]'"
    ) from error

from mimkernels.nn import embed_visible, sincos_positions_2d
from mimkernels.nn._classes import every_module_is_heard, is_heard, name_beside
from mimkernels.nn.block import run_blocks_in_a_row
from mimkernels.nn.last_block import block_of_tokens, norms_act_alone, tokens_of

__all__ = [
    "build_timm",
    "check_encoder",
    "check_headless",
    "check_linear_patches",
    "check_patch_embed",
    "create_encoder",
    "encode_visible",
    "has_vision_transformers",
    "init_encoder",
    "init_linears_and_norms",
    "positions_and_prefix",
    "resample_positions",
    "run_blocks",
    "timm_image_size",
    "timm_module",
    "visible_features",
]

# timm modules whose `vit_*` models compute positions or patches in a way that dropping patches would change.
_OTHER_FAMILIES = {
    "eva": "rotary positions are computed for the full grid of patches inside its forward",
    "vision_transformer_relpos": "its relative position bias covers all N x N pairs of patches",
    "vision_transformer_hybrid": "its convolutional stem mixes pixels of visible and masked patches",
    "vision_transformer_sam": "its windowed attention needs the full grid of patches",
}


def create_encoder(
    name: str,
    *,
    img_size: int | Sequence[int] = 224,
    in_chans: int = 3,
    patch_size: int | Sequence[int] | None = None,
    **timm_kwargs: Any,
) -> VisionTransformer:
    """Build a timm model without pooling and head, and check that it can encode visible patches alone.

    Raises:
        ValueError: the name is unknown, the model is not a supported Vision Transformer (says why), timm
            refuses an argument, or the patch size does not divide the image.
    """
    module = timm_module(name, "vit_*")
    if module is not None:
        family = module.rpartition(".")[2]
        if family not in _OTHER_FAMILIES and not has_vision_transformers(module):
            raise ValueError(
                f"{name!r} is no Vision Transformer of timm's VisionTransformer class (it is built from timm's module "
                f"{family!r}), and no other can encode visible patches alone; take one such as 'vit_base_patch16_224'"
            )
        if family in _OTHER_FAMILIES:
            raise ValueError(
                f"{name!r} cannot encode visible patches alone: {_OTHER_FAMILIES[family]}; "
                "use a plain Vision Transformer such as 'vit_base_patch16_224'"
            )
    encoder = build_timm(name, img_size=img_size, in_chans=in_chans, patch_size=patch_size, **timm_kwargs)
    try:
        check_encoder(encoder)
    except ValueError as error:
        raise ValueError(f"{name!r} cannot be the encoder: {error}") from error
    return cast(VisionTransformer, encoder)


def timm_module(name: str, pattern: str) -> str | None:
    """The module of timm that builds the model `name`; None for a name with a source of its own, such as ``hf-hub:``.

    Raises:
        ValueError: timm has no such model; tells the close names of those that match `pattern`.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a timm model name, got {type(name).__name__}")
    if ":" in name:
        return None
    base = name.partition(".")[0]
    if not timm.is_model(base):
        close = difflib.get_close_matches(base, timm.list_models(pattern), n=3, cutoff=0.4)
        raise ValueError(f"timm has no model {name!r}; close names: {', '.join(close) or 'none'}")
    module: str = timm.model_entrypoint(base).__module__
    return module


def timm_image_size(name: str) -> int:
    """Pixels per side of the images that the timm model `name` was trained on; 224 where timm does not say."""
    settings = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return settings.input_size[-1] if settings is not None and settings.input_size else 224


def build_timm(
    name: str,
    *,
    img_size: int | Sequence[int],
    in_chans: int,
    patch_size: int | Sequence[int] | None,
    **timm_kwargs: Any,
) -> nn.Module:
    """A timm model without pooling and head.

    Raises:
        ValueError: timm refuses an argument; shows all of them.
    """
    # No pooling and no head: every parameter then takes part in the loss, which DDP and weight decay rely on.
    kwargs: dict[str, Any] = {"num_classes": 0, "global_pool": "", **timm_kwargs}
    if patch_size is not None:
        kwargs["patch_size"] = _as_pair(patch_size, "patch_size")
    kwargs["img_size"] = _as_pair(img_size, "img_size")
    try:
        model: nn.Module = timm.create_model(name, in_chans=in_chans, **kwargs)
    except (TypeError, AssertionError, LookupError, ArithmeticError, RuntimeError) as error:
        reason = f"{type(error).__name__} {error}" if isinstance(error, LookupError) else error
        raise ValueError(f"timm cannot build {name!r} with in_chans={in_chans}, {kwargs}: {reason}") from error
    return model


def check_encoder(encoder: nn.Module) -> None:
    """Raise ValueError, naming what and why, unless `encoder` can run on visible patches alone."""
    check_patch_embed(encoder)
    if not isinstance(encoder.patch_drop, nn.Identity):
        raise ValueError("patch_drop_rate > 0 would drop visible patches a second time; leave it at 0")
    check_headless(encoder)


def check_headless(encoder: nn.Module) -> None:
    """Raise ValueError if `encoder` has a head or pooling with weights of its own."""
    unused = [part for part in ("head", "attn_pool") if _has_parameters(getattr(encoder, part, None))]
    if unused:
        raise ValueError(
            f"its {' and '.join(unused)} would never be trained; remove with encoder.reset_classifier(0, '')"
        )


def check_patch_embed(encoder: nn.Module) -> None:
    """Raise ValueError, naming what and why, unless `encoder` can embed some of an image's patches alone."""
    kind = name_beside(type(encoder), VisionTransformer)
    if not isinstance(encoder, VisionTransformer):
        raise ValueError(f"a {kind} is not a timm VisionTransformer")
    for method in ("_pos_embed", "forward_features"):
        if getattr(type(encoder), method) is not getattr(VisionTransformer, method):
            raise ValueError(f"{kind} has its own {method}, which visible patches alone would bypass")
    check_linear_patches(encoder.patch_embed)


def check_linear_patches(embed: nn.Module) -> None:
    """Raise ValueError, naming what and why, unless `embed` is one linear map per patch that divides the image."""
    if type(embed) is not PatchEmbed:
        raise ValueError(
            f"its patch embedding is a {name_beside(type(embed), PatchEmbed)}, not one linear map per patch"
        )
    proj, patch = embed.proj, tuple(embed.patch_size)
    plain = isinstance(proj, nn.Conv2d) and proj.groups == 1 and proj.padding in ((0, 0), "valid")
    if not plain or not patch == proj.kernel_size == proj.stride:
        raise ValueError(f"its patch projection {proj} is not one linear map per patch of {patch}")
    if embed.dynamic_img_pad:
        raise ValueError("dynamic_img_pad=True pads images; resize them to a multiple of the patch size instead")
    if any(size % p != 0 for size, p in zip(embed.img_size, patch, strict=True)):
        raise ValueError(f"patch size {_by(patch)} does not divide image size {_by(embed.img_size)} (height x width)")


def encode_visible(
    encoder: VisionTransformer,
    images: Tensor,
    ids: Tensor,
    *,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    present: Tensor | None = None,
) -> Tensor:
    """The encoder's normalised output ``[B, P + K, D]`` for the patches `ids` ``[B, K]`` of each image.

    Equal to embedding every patch, adding positions and keeping the tokens `ids`, as MAE does. The blocks run
    through ``encoder.blocks`` as timm runs them: hooks, drop path and gradient checkpointing act as usual.

    Args:
        present: ``[B, P + K]`` bool, which tokens are there; others are padding, to which nobody attends. None: all.
    """
    # timm puts the final norm either into forward_features or, as fc_norm, behind pooling, which is not done here.
    features: Tensor = encoder.fc_norm(visible_features(encoder, images, ids, mean=mean, std=std, present=present))
    return features


def visible_features(
    encoder: VisionTransformer,
    images: Tensor,
    ids: Tensor,
    *,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    present: Tensor | None = None,
    read: int | None = None,
) -> Tensor:
    """What timm's ``forward_features`` gives, ``[B, P + K, D]``, for the patches `ids` ``[B, K]`` of each image.

    `read`: only the first so many tokens are wanted.
    """
    embed = encoder.patch_embed
    grid = images.shape[-2] // embed.patch_size[0], images.shape[-1] // embed.patch_size[1]
    pos, prefix = positions_and_prefix(encoder, grid)
    x = embed_visible(images, ids, embed.proj, norm=embed.norm, pos=pos, prefix=prefix, mean=mean, std=std)
    if pos is not None:
        x = encoder.pos_drop(x)
    return run_blocks(encoder, x, present, ids=read)


def run_blocks(
    encoder: VisionTransformer, x: Tensor, present: Tensor | None = None, *, ids: Tensor | int | None = None
) -> Tensor:
    """The rest of timm's ``forward_features`` for tokens ``[B, P + K, D]`` with their positions.

    Args:
        present: ``[B, P + K]`` bool, tokens that are there; padding is attended by nobody. None: all.
        ids: ``[B, L]``, the tokens that are wanted, or a number, the first so many: gives ``[B, L, D]``. None: all.
    """
    x = encoder.norm_pre(x)
    if present is not None:
        x = _attending_to(encoder, x, present[:, None, None])
    elif encoder.grad_checkpointing and torch.is_grad_enabled():
        x = checkpoint_seq(encoder.blocks, x)
    elif type(encoder.blocks) is nn.Sequential and not (is_heard(encoder.blocks) or every_module_is_heard()):
        calls: list[tuple[nn.Module, dict[str, Any]]] = [(block, {}) for block in encoder.blocks]
        if ids is not None and calls and norms_act_alone(encoder):
            last = calls.pop()[0]
            x, ids = block_of_tokens(last, run_blocks_in_a_row(calls, x), ids), None
        else:
            x = run_blocks_in_a_row(calls, x)
    else:
        x = encoder.blocks(x)
    features: Tensor = encoder.norm(x)
    return tokens_of(features, ids)


def _attending_to(encoder: VisionTransformer, x: Tensor, attn_mask: Tensor) -> Tensor:
    """The blocks, each with a mask: timm's way to run them in a row, which takes none, in a loop."""
    if not (encoder.grad_checkpointing and torch.is_grad_enabled()):
        return run_blocks_in_a_row([(block, {"attn_mask": attn_mask}) for block in encoder.blocks], x)
    for block in encoder.blocks:
        x = checkpoint(block, x, attn_mask=attn_mask, use_reentrant=False)
    return x


def positions_and_prefix(encoder: VisionTransformer, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
    """Patch positions ``[1, N, D]`` and prefix tokens ``[1, P, D]`` with their positions added."""
    prefix_tokens: list[Tensor] = [token for token in (encoder.cls_token, encoder.reg_token) if token is not None]
    prefix = torch.cat(prefix_tokens, dim=1) if prefix_tokens else None
    table = encoder.pos_embed
    if table is None:
        return None, prefix
    num_prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    pos = resample_positions(table, grid, encoder.patch_embed.grid_size, num_prefix)
    if num_prefix and prefix is not None:
        prefix = prefix + pos[:, :num_prefix]
    return pos[:, num_prefix:], prefix


def resample_positions(pos: Tensor, grid: tuple[int, int], table_grid: tuple[int, int], num_prefix: int) -> Tensor:
    """Positions for another grid, interpolated as timm's dynamic_img_size does; the table itself if equal."""
    if tuple(grid) == tuple(table_grid):
        return pos
    resampled: Tensor = resample_abs_pos_embed(pos, list(grid), list(table_grid), num_prefix_tokens=num_prefix)
    return resampled


def init_encoder(encoder: VisionTransformer) -> None:
    """Initialise as MAE does: fixed 2-D sine-cosine positions, Xavier linears, tokens of deviation 0.02.

    The patch projection is initialised as the linear layer it is. Its bias and LayerScale keep timm's values.
    """
    with torch.no_grad():
        if encoder.pos_embed is not None:
            num_prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
            grid = encoder.patch_embed.grid_size
            encoder.pos_embed.copy_(sincos_positions_2d(encoder.embed_dim, grid, num_prefix))
        weight = encoder.patch_embed.proj.weight
        nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
        for token in (encoder.cls_token, encoder.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        init_linears_and_norms(encoder)


def init_linears_and_norms(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for linear layers, ones and zeros for LayerNorm, as MAE does."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm) and part.elementwise_affine:
            nn.init.ones_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def has_vision_transformers(module: str) -> bool:
    """Whether a module of timm defines or imports a VisionTransformer."""
    kinds = (value for value in vars(sys.modules[module]).values() if isinstance(value, type))
    return any(issubclass(kind, VisionTransformer) for kind in kinds)


def _has_parameters(module: nn.Module | None) -> bool:
    return module is not None and any(True for _ in module.parameters())


def _as_pair(value: int | Sequence[int], what: str) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2 or not all(type(size) is int and size > 0 for size in pair):
        raise ValueError(f"{what} must be a positive integer or (height, width), got {value!r}")
    return pair


def _by(sizes: Sequence[int]) -> str:
    return " x ".join(str(size) for size in sizes)


def count_kept(patches: int, removed: float) -> int:
    """How many of `patches` stay where the share `removed` does not, rounded down as published.

    torch.compile takes floats for variables under dynamic=True, and fails where lengths of tokens depend on them. What
    is hashed has to be known to it.
    """
    hash(removed)
    return int(patches * (1 - removed))
