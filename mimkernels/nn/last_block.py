"""A last block for the tokens only that something reads: what follows attention acts on each token alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks

try:
    from timm.layers import GluMlp, LayerNormFp32, RmsNorm, RmsNormFp32, SimpleNorm, SimpleNormFp32, SwiGLU
    from timm.layers import LayerNorm as TimmLayerNorm
    from timm.layers import Mlp as TimmMlp
    from timm.models.beit import Block as BeitBlock
    from timm.models.vision_transformer import Block as TimmBlock
except ImportError as error:
    raise ImportError(
        f"mimkernels.nn.last_block needs timm, which cannot be imported ({error}); pip install 'mimkernels[train]'"
    ) from error

from mimkernels.nn._classes import is_heard, name_beside
from mimkernels.nn.block import Block, reason_against_parts
from mimkernels.nn.mlp import Mlp
from mimkernels.ops import gather_tokens

__all__ = [
    "block_of_tokens",
    "by_halves",
    "draws",
    "norms_act_alone",
    "reason_against",
    "reason_against_norms",
    "tokens_of",
]

_BLOCKS = (TimmBlock, Block, BeitBlock)
_MLPS = (TimmMlp, Mlp, SwiGLU, GluMlp)
_NORMS = (
    *(TimmLayerNorm, LayerNormFp32, nn.LayerNorm),
    *(RmsNorm, RmsNormFp32, nn.RMSNorm, SimpleNorm, SimpleNormFp32),
)
_PARTS = (nn.Linear, nn.Dropout, nn.GELU, *_NORMS)  # of an MLP, mostly
_ACTIVATIONS = ("torch.nn.modules.activation", "timm.layers.activations")
# Of these, those that may look at several tokens, or draw for each of them.
_MIXING = (nn.Softmax, nn.Softmax2d, nn.Softmin, nn.LogSoftmax, nn.GLU, nn.MultiheadAttention, nn.RReLU)


def block_of_tokens(block: Any, x: Tensor, ids: Tensor | int, **options: Any) -> Tensor:
    """What a block gives of some tokens, ``[B, K, C]``, with its keyword arguments.

    Attention needs the keys and values of all tokens; what follows it runs for these tokens only, in timm's Block and
    BEiT's. In other blocks, for the reasons of ``reason_against``, and with dropout in the MLP, which draws for every
    token, all of it runs for all tokens.

    Args:
        ids: ``[B, K]``, which tokens; a number: the first so many.
    """
    if reason_against(block) is not None or draws(block.mlp):
        return tokens_of(block(x, **options), ids)
    return by_halves(block, x, ids, **options)


def by_halves(block: Any, x: Tensor, ids: Tensor | int | None, **options: Any) -> Tensor:
    """What timm's Block or BEiT's computes, the half that follows attention for some tokens only; None: for all."""
    x = tokens_of(x + block.drop_path1(_scaled(block, 1, block.attn(block.norm1(x), **options))), ids)
    out: Tensor = x + block.drop_path2(_scaled(block, 2, block.mlp(block.norm2(x))))
    return out


def tokens_of(x: Tensor, ids: Tensor | int | None) -> Tensor:
    """The tokens `ids` ``[B, K]`` of ``[B, N, C]``, or the first so many; None: all."""
    if ids is None:
        return x
    return x[:, :ids] if isinstance(ids, int) else gather_tokens(x, ids)


def norms_act_alone(encoder: Any) -> bool:
    """Whether the norms behind the blocks act on each token alone, and nobody sees what they compute."""
    return reason_against_norms(encoder) is None


def reason_against_norms(encoder: Any) -> str | None:
    """Why the norms behind the blocks must run for all tokens, or None."""
    for name, norm in (("norm", encoder.norm), ("fc_norm", encoder.fc_norm)):
        reason = _reason_against_norm(name, norm)
        if reason is not None:
            return reason
    return None


def _reason_against_norm(name: str, norm: nn.Module) -> str | None:
    if is_heard(norm):
        return f"a hook or a forward of its own on {name}"
    if not _acts_alone(norm):
        return f"its {name} is {name_beside(type(norm), *_NORMS)}, not known to act on the last dimension alone"
    return None


def _acts_alone(norm: Any) -> bool:
    return type(norm) is nn.Identity or (type(norm) in _NORMS and len(norm.normalized_shape) == 1)


def reason_against(block: Any) -> str | None:
    """Why all of a block must run for all tokens, or None: what it is, and who sees it."""
    if type(block) not in _BLOCKS:
        return f"its last block is {name_beside(type(block), *_BLOCKS)}"
    if is_heard(block) or has_global_hooks() or block._compiled_call_impl is not None:
        return "its last block is heard, or compiled by itself"
    parts = {"drop_path1": block.drop_path1, "drop_path2": block.drop_path2}
    if not isinstance(block, BeitBlock):
        parts |= {"ls1": block.ls1, "ls2": block.ls2}
    return _reason_against_norm("norm2", block.norm2) or reason_against_parts(**parts) or _reason_against_mlp(block.mlp)


def _reason_against_mlp(mlp: nn.Module) -> str | None:
    if type(mlp) not in _MLPS:
        return f"its MLP is {name_beside(type(mlp), *_MLPS)}"
    for name, part in mlp.named_modules():
        if is_heard(part):
            return f"a hook or a forward of its own on mlp.{name}".rstrip(".")
        if part is mlp or type(part) in (nn.Linear, nn.Dropout) or _acts_alone(part):
            continue
        mixes = isinstance(part, _MIXING) or (isinstance(part, nn.PReLU) and part.num_parameters > 1)
        if type(part).__module__ not in _ACTIVATIONS or mixes:
            return f"its MLP has a {name_beside(type(part), *_PARTS)}"
    return None


def draws(mlp: nn.Module, *, training: bool = False) -> bool:
    """Whether there is dropout in an MLP, in its mode or in `training`."""
    return any(isinstance(part, nn.Dropout) and part.p > 0 and (training or part.training) for part in mlp.modules())


def _scaled(block: Any, number: int, branch: Tensor) -> Tensor:
    """A branch times its LayerScale, a module of timm's blocks and a parameter or None of BEiT's."""
    if isinstance(block, BeitBlock):
        gamma = getattr(block, f"gamma_{number}")
        return branch if gamma is None else gamma * branch
    scaled: Tensor = getattr(block, f"ls{number}")(branch)
    return scaled
