"""What a file may say of an encoder: a name of timm's and plain arguments of its architecture, nothing that opens."""

import difflib
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["ARCHITECTURE_ARGUMENTS", "check_architecture", "check_sizes"]

# Arguments of timm's VisionTransformer, Beit, SwinTransformer and SwinTransformerV2, without those that take classes
# and those of `timm.create_model` that name files, repositories or other weights (checkpoint_path, pretrained,
# pretrained_cfg, pretrained_cfg_overlay, cache_dir).
ARCHITECTURE_ARGUMENTS = frozenset((
    "img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth", "num_heads", "mlp_ratio",
    "qkv_bias", "qk_norm", "scale_attn_norm", "scale_mlp_norm", "proj_bias", "init_values", "class_token", "pos_embed",
    "no_embed_class", "reg_tokens", "pre_norm", "final_norm", "fc_norm", "pool_include_prefix", "dynamic_img_size",
    "dynamic_img_pad", "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate",
    "drop_path_rate", "weight_init", "fix_init", "embed_norm_layer", "norm_layer", "act_layer",
    "use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias", "swiglu_mlp", "scale_mlp", "use_fc_norm",
    "depths", "window_size", "head_dim", "always_partition", "strict_img_size", "pretrained_window_sizes",
))  # fmt: skip

_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?")  # a timm model, with or without the tag of its weights
_WORD = re.compile(r"[A-Za-z0-9_]{0,40}")  # a key of timm's tables of layers; no path, no dotted name
_LONGEST_LIST = 4

# Whole numbers, with the largest that is built: a file shall not keep a machine busy with a model that fits none.
_LARGEST = {
    "img_size": 65_536, "patch_size": 65_536, "in_chans": 1_024, "embed_dim": 65_536, "depth": 1_024,
    "depths": 1_024, "num_heads": 4_096, "head_dim": 65_536, "window_size": 256, "reg_tokens": 65_536,
    "num_classes": 10_000_000, "decoder_dim": 65_536, "decoder_depth": 1_024, "decoder_heads": 4_096,
    "mlp_dim": 65_536, "out_dim": 65_536, "prototypes": 1_048_576, "bottleneck_dim": 65_536,
    "target_dim": 65_536,
}  # fmt: skip
_LISTS = ("img_size", "patch_size", "window_size", "depths", "num_heads", "target_dim")  # may be lists of such numbers
_MOST_WEIGHTS = 200_000_000_000


def check_architecture(name: str, arguments: Mapping[str, Any]) -> None:
    """Refuse everything that could make ``timm.create_model`` open a file, reach the network or run code.

    Args:
        name: a timm model's name, such as ``vit_base_patch16_224``.
        arguments: for the model; numbers, truth values, None, single words, and lists of up to four numbers.

    Raises:
        ValueError: the name has another source than timm, or an argument is not one of the architecture; names it.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"model {name!r} is not a plain timm name such as 'vit_base_patch16_224'; folders and hubs are not opened"
        )
    for key, value in arguments.items():
        if key not in ARCHITECTURE_ARGUMENTS:
            close = difflib.get_close_matches(str(key), ARCHITECTURE_ARGUMENTS, n=1)
            raise ValueError(
                f"model argument {key!r} is not allowed: only the architecture's own are, "
                + (f"such as {close[0]!r}" if close else "such as embed_dim, depth and num_heads")
            )
        if not _is_plain(value):
            raise ValueError(
                f"model argument {key!r} must be a number, true, false, null, a word or a short list of numbers, got "
                f"{str(value)[:80]!r}"
            )


def check_sizes(arguments: Mapping[str, Any]) -> None:
    """Refuse sizes of encoder and decoder that are no whole numbers, or larger than any model that could be built.

    Raises:
        ValueError: names the argument, or the product of width and depth.
    """
    for key, largest in _LARGEST.items():
        value = arguments.get(key)
        parts = value if key in _LISTS and isinstance(value, (list, tuple)) else [value]
        if value is None or key == "target_dim":  # of the model, or of one of its targets: the encoder's
            parts = [part for part in parts if part is not None]
        for part in parts:
            if not isinstance(part, int) or isinstance(part, bool) or not 0 <= part <= largest:
                raise ValueError(f"model argument {key!r} must be a whole number up to {largest:,}, got {value!r}")
    for width, blocks in (("embed_dim", "depth"), ("embed_dim", "depths"), ("decoder_dim", "decoder_depth")):
        depths = arguments.get(blocks) or 0
        # Every stage is twice as wide as the one before.
        depths = [depths] if isinstance(depths, int) else depths
        weights = sum(12 * ((arguments.get(width) or 0) * 2**stage) ** 2 * depth for stage, depth in enumerate(depths))
        if weights > _MOST_WEIGHTS:
            raise ValueError(
                f"{width} {arguments[width]:,} and {blocks} {', '.join(f'{depth:,}' for depth in depths)} make about "
                f"{weights:.1e} weights; at most {_MOST_WEIGHTS:.0e} are built"
            )


def _is_plain(value: Any) -> bool:
    if value is None or isinstance(value, (bool, int, float)):
        return True
    if isinstance(value, str):
        return _WORD.fullmatch(value) is not None
    return (
        isinstance(value, (list, tuple))
        and len(value) <= _LONGEST_LIST
        and all(isinstance(item, (int, float)) for item in value)
    )
