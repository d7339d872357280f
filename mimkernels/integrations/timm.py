"""timm models on the kernels, in place: attention of every kind that calls SDPA, MLPs, blocks, and patch dropout."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

try:
    from timm.layers import Attention as TimmAttention
    from timm.layers import Mlp as TimmMlp
    from timm.layers import (
        PatchDropout,
        PatchDropoutWithIndices,
        PatchEmbed,
        is_notrace_module,
        register_notrace_module,
    )
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import Block as TimmBlock
    from timm.models.vision_transformer import VisionTransformer
except ImportError as error:
    raise ImportError(
        f"mimkernels.accelerate needs timm, which cannot be imported ({error}); pip install 'mimkernels[train]'"
    ) from error

from mimkernels.integrations._reroute import calls_sdpa, rerouted
from mimkernels.nn import Attention, Block, Mlp, last_block
from mimkernels.nn import block as fused_block
from mimkernels.nn import mlp as fused_mlp
from mimkernels.nn._classes import (
    MARK,
    PARTS,
    STANDS_IN,
    become,
    change_back,
    every_module_is_heard,
    fused_attn,
    is_heard,
    prepare_scriptable,
    shows_its_matrix,
)
from mimkernels.nn.encoder import check_patch_embed, count_kept, run_blocks, visible_features
from mimkernels.nn.relative import RELATIVE, head_dim
from mimkernels.nn.sdpa import is_for_pytorch
from mimkernels.nn.sdpa.measured import reasons
from mimkernels.nn.sdpa.stand_in import kernels_refuse, stand_in
from mimkernels.ops import gather_tokens, mask_from_noise

__all__ = ["Accelerated", "Change", "accelerate", "restore"]

_ATTENTION = "mimkernels.attention"
# What a model does from images to logits, as timm has it.
_TIMMS = {
    (kind, name): getattr(kind, name)
    for kind in (VisionTransformer, VisionTransformerDistilled)
    for name in ("forward", "forward_features", "forward_head", "pool")
}


@dataclass(frozen=True)
class Change:
    """One line of the report: a module, what it became, or why it stayed as it was.

    Attributes:
        name: of the module within the model; "" is the model itself.
        kind: its class.
        became: what computes it now; "" where it was left alone.
        reason: why it was left alone, or when the change does not apply: with dropout in training, and where PyTorch's
            attention was measured to be faster at the model's own number of tokens, or timm's block with so few images.
    """

    name: str
    kind: str
    became: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Accelerated:
    """What ``accelerate`` did, line by line; a table where it is printed or shown."""

    changes: list[Change]
    _classes: list[Any] = field(repr=False, compare=False)

    @property
    def accelerated(self) -> list[Change]:
        """The modules that run on the kernels now."""
        return [change for change in self.changes if change.became]

    @property
    def left(self) -> list[Change]:
        """The modules that were left alone, each with its reason."""
        return [change for change in self.changes if not change.became]

    @property
    def refused(self) -> dict[str, list[str]]:
        """Why calls of accelerated classes went to PyTorch nevertheless, since the process began, by class."""
        return {kind.__name__: sorted(kind._refused) for kind in self._classes if kind._refused}

    def __len__(self) -> int:
        return len(self.changes)

    def __iter__(self) -> Iterator[Change]:
        return iter(self.changes)

    def __repr__(self) -> str:
        rows = [("module", "class", "now", "remarks")]
        rows += [(change.name or "(model)", change.kind, change.became or "-", change.reason) for change in self]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = ["  ".join([*map(str.ljust, row[:3], widths), row[3]]).rstrip() for row in rows]
        lines.append(f"{len(self.accelerated)} of {len(self)} on mimkernels")
        lines += [f"calls of {kind} that went to PyTorch: {'; '.join(why)}" for kind, why in self.refused.items()]
        return "\n".join(lines)


def accelerate(
    model: nn.Module,
    *,
    attention: bool = True,
    patch_drop: bool = True,
    pool: bool = True,
    patch_embed: bool = True,
    mlp: bool = True,
    block: bool = True,
    read_tokens: bool = True,
) -> Accelerated:
    """Let a timm model compute on mimkernels, in place: same results, parameters and names.

    Only the classes of modules change, to subclasses of what they were: parameters, buffers, state-dict keys, hooks and
    modes stay, and the model can be compiled, copied, pickled and distributed as before. ``restore`` undoes it.
    Modules that run on mimkernels already are left so, and reported.

    A module of any class whose ``forward`` calls PyTorch's ``F.scaled_dot_product_attention`` is taken. Calls that
    ``mimkernels.attention`` does not take, such as attention dropout in training, go to PyTorch as before, and so do
    calls that PyTorch was measured to compute faster, by device, instruction set, dtype, number of tokens and head dim
    (``python -m benchmarks measure-attention``): unless statistics are captured or recorded, or a backend is named. The
    report tells of plain layers beforehand; of others once they ran, when it is printed.

    Whoever looks into the model later finds what they would without this. A module runs its original code while there
    are hooks on parts that it would not run or on every module, after ``fused_attn = False``, where somebody has
    replaced ``F.scaled_dot_product_attention``, and for tensors with rules of their own (subclasses). torch.fx, and
    with it torchvision's and timm's ``create_feature_extractor``, and ``torch.jit.trace`` trace the original code;
    ``torch.jit.script`` compiles the original classes and gives them back to the modules. Where ``fused_attn`` was
    False before, the layer is fused as long as there are no hooks on ``attn_drop``, which see the attention matrix:
    without that, it is stored.

    Args:
        model: a timm model, or one that contains timm models.
        attention: take attention layers.
        patch_drop: take ``PatchDropout`` (the same patches are dropped, for the same random state).
        pool: take pooling heads that are attention, such as ``AttentionPoolLatent``. Averages and maxima stay: they
            read the tokens once in PyTorch, too.
        patch_embed: in training with ``PatchDropout``, embed only the patches that are kept.
        mlp: take ``Mlp``: the first layer's bias and GELU in one pass.
        block: take ``Block``: its sum after attention and the norm of that in one pass.
        read_tokens: where the head of a Vision Transformer reads [cls] alone (and DeiT's distillation token), run what
            follows attention in the last block for that alone, in calls of the model itself.

    Returns:
        a report, one line per module; print it.

    Raises:
        TypeError: `model` is no module.
        NotImplementedError: parameters are on a device for which there are no kernels; names it, and why.

    Example::

        model = timm.create_model("vit_base_patch16_224")
        print(mimkernels.accelerate(model))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate takes a module, got {type(model).__name__}")
    _check_devices(model)
    changes: list[Change] = []
    vit, tokens = "", None  # the latest Vision Transformer that was come by: plain attention in it sees all its tokens
    for name, module in model.named_modules():
        change: Change | None = None
        if isinstance(module, VisionTransformer):
            vit, tokens = name, _tokens(module)
        if STANDS_IN in module.__dict__ and attention:
            change = _keep(module)
        elif _is_accelerated(module):
            change = Change(name, type(module).__name__, "mimkernels", "already")
        elif isinstance(module, (PatchDropout, PatchDropoutWithIndices)):
            change = _take_patch_drop(module) if patch_drop else None
        elif isinstance(module, TimmMlp):
            change = _take_mlp(module) if mlp else None
        elif isinstance(module, TimmBlock) and not calls_sdpa(type(module).forward, module):
            change = _take_block(module, _inside(tokens, vit, name)) if block else None
        elif isinstance(module, VisionTransformer):
            lines = _take_model(module, embed=patch_embed and patch_drop, read=read_tokens)
            changes += [replace(line, name=name) for line in lines]
        elif pool if "pool" in type(module).__name__.lower() else attention:
            change = _take_attention(module, _inside(tokens, vit, name))
        if change is not None:
            changes.append(replace(change, name=name))
    classes = dict.fromkeys(type(module) for module in model.modules() if hasattr(type(module), "_refused"))
    return Accelerated(changes, list(classes))


def restore(model: nn.Module) -> int:
    """Undo ``accelerate`` exactly; layers by ``use_mimkernels_attention`` and the like stay.

    Args:
        model: as given to ``accelerate``.

    Returns:
        how many modules were given their class back.

    Raises:
        TypeError: `model` is no module.
        NotImplementedError: a module's class was changed again since, as parametrizations and FSDP do; nothing is
            changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore takes a module, got {type(model).__name__}")
    marked = [module for module in model.modules() if MARK in module.__dict__]
    for name, module in model.named_modules():
        if MARK in module.__dict__ and type(module).__bases__[0] is not module.__dict__[MARK]:
            raise NotImplementedError(
                f"restore: {name or 'the model'} became a {type(module).__name__} after accelerate, as parametrizations"
                f" and FSDP do, and would lose that as a {module.__dict__[MARK].__name__}; undo it first, such as by "
                "remove_parametrizations"
            )
    for module in marked:
        change_back(module)
    return len(marked)


def _check_devices(model: nn.Module) -> None:
    for device in sorted({parameter.device.type for parameter in model.parameters()}):
        missing = kernels_refuse(device, torch.float32)
        if missing is not None:
            raise NotImplementedError(
                f"accelerate: the model is on {device}, where attention has no kernels ({missing}); "
                "`mimkernels info` tells what is here"
            )


def _take_attention(module: nn.Module, tokens: int | None) -> Change | None:
    kind = type(module)
    if kind not in RELATIVE and not calls_sdpa(kind.forward, module):
        return _other_attention(module)
    reason = _reason_against(module) or _change_class(module)
    if reason is not None:
        return Change("", kind.__name__, "", reason)
    dropout = _dropout(module)
    remarks = [f"not in training: attention dropout {dropout}"] if dropout else []
    if kind is TimmAttention and isinstance(module, TimmAttention) and tokens is not None:
        remarks += _left_to_torch(module, tokens)
    return Change("", kind.__name__, _ATTENTION, "; ".join(remarks))


def _keep(module: nn.Module) -> Change:
    """A line for what computes a layer inside ``capture`` already, and shall stay when that ends."""
    del module.__dict__[STANDS_IN]
    kind = module.__dict__[MARK] = type(module).__bases__[0]
    return Change("", kind.__name__, _ATTENTION)


def _tokens(model: VisionTransformer) -> int | None:
    """How many tokens the blocks see of images of the model's own size, all patches kept."""
    patches = getattr(model.patch_embed, "num_patches", None)
    return patches + model.num_prefix_tokens if isinstance(patches, int) else None


def _inside(tokens: int | None, vit: str, name: str) -> int | None:
    """The tokens that a part of a model sees, if it is within the Vision Transformer `vit`."""
    return tokens if name.startswith(f"{vit}." if vit else "") else None


def _left_to_torch(module: TimmAttention, tokens: int) -> list[str]:
    """Where PyTorch's attention is faster in this layer: in its own dtype, and in that of autocast."""
    weight = module.proj.weight if isinstance(module.proj, nn.Linear) else next(module.parameters(), None)
    if weight is None:  # quantised layers keep theirs elsewhere
        return []
    device = weight.device.type
    cast = () if device == "meta" else (torch.get_autocast_dtype(device),)
    dtypes = dict.fromkeys((weight.dtype, *cast))
    return [line for dtype in dtypes for line in reasons(device, dtype, tokens, module.head_dim)]


def _other_attention(module: nn.Module) -> Change | None:
    """A line for what is attention by its name only, or out of reach."""
    kind = type(module)
    if isinstance(module, nn.MultiheadAttention):
        return Change("", kind.__name__, "", "torch's own layer, with a fused path of its own")
    if calls_sdpa(inspect.unwrap(kind.forward), module):
        return Change("", kind.__name__, "", "its forward, which calls SDPA, is wrapped by a decorator")
    if any(calls_sdpa(base.__dict__.get("forward"), module) for base in kind.__mro__):
        return Change("", kind.__name__, "", "its forward calls that of a parent class, which calls SDPA")
    if "att" in kind.__name__.lower() and any(True for _ in module.parameters()):
        inner = (part for part in module.modules() if part is not module)
        if not any(calls_sdpa(type(part).forward, part) or _is_accelerated(part) for part in inner):
            return Change("", kind.__name__, "", "its forward does not call scaled_dot_product_attention")
    return None


def _reason_against(module: nn.Module) -> str | None:
    """What is known before any call; the rest is decided call by call."""
    own = RELATIVE.get(type(module))
    dim = getattr(module, "head_dim", None) if own is None else head_dim(module)
    parameter = next(module.parameters(), None)
    if isinstance(dim, int) and parameter is not None:
        missing = kernels_refuse(parameter.device.type, torch.float32, dim)
        if missing is not None:
            return missing
    if getattr(module, "fused_attn", own is None) is not False:  # Swin V2 has none, and computes its matrix
        return None
    scale = getattr(module, "scale", None)
    rewritten = type(module) is not TimmAttention and own is None
    if rewritten and isinstance(dim, int) and isinstance(scale, float) and scale != dim**-0.5:
        return f"its scale, {scale:g}, counts in its plain branch only"
    return shows_its_matrix(module)


def _dropout(module: nn.Module) -> float:
    drop = getattr(module, "attn_drop", 0.0)
    drop = getattr(drop, "p", drop)
    return float(drop) if isinstance(drop, (int, float)) else 0.0


def _take_mlp(module: TimmMlp) -> Change:
    kind = type(module)
    reason = "a class of its own" if kind is not TimmMlp else fused_mlp.reason_against(module)
    if reason is not None:
        return Change("", kind.__name__, "", reason)
    reason = _change_class(module)
    return Change("", kind.__name__, "" if reason else "mimkernels.bias_gelu", reason or "")


def _take_block(module: TimmBlock, tokens: int | None) -> Change:
    kind = type(module)
    reason = "a class of its own" if kind is not TimmBlock else fused_block.reason_against(module)
    if reason is not None:
        return Change("", kind.__name__, "", reason)
    reason = _change_class(module)
    if reason is not None:
        return Change("", kind.__name__, "", reason)
    return Change("", kind.__name__, "mimkernels.add_layer_norm", "" if tokens is None else _batches(module, tokens))


def _batches(module: TimmBlock, tokens: int) -> str:
    """For how few images a block runs timm's own code; empty where it never does."""
    norm: Any = module.norm2
    numbers = tokens * norm.normalized_shape[0]
    fewest, fewest_cast = (-(-count // numbers) for count in (fused_block.SMALL, fused_block.SMALL // 8))
    if next(module.parameters()).device.type != "cpu" or fewest <= 1:
        return ""
    return f"timm's own is faster, and kept, for less than {fewest} images, under autocast {fewest_cast}"


def _take_patch_drop(module: nn.Module) -> Change | None:
    kind = type(module)
    if kind not in (PatchDropout, PatchDropoutWithIndices):
        return Change("", kind.__name__, "", "a class of its own")
    if module.prob == 0:
        return None
    reason = _change_class(module)
    return Change("", kind.__name__, "" if reason else "mimkernels.gather_tokens", reason or "")


def _take_model(module: VisionTransformer, *, embed: bool, read: bool) -> list[Change]:
    """What the model itself computes: patches that are dropped, and tokens of the last block that nobody reads."""
    offers = {
        "patch_embed": _offer_patch_embed(module) if embed else None,
        "read_tokens": _offer_read_tokens(module) if read else None,
    }
    taken = {part: offer for part, offer in offers.items() if offer is not None and offer.became}
    left = [offer for offer in offers.values() if offer is not None and not offer.became]
    if not taken:
        return left
    reason = _change_class(module)
    if reason is not None:
        return [Change("", type(module).__name__, "", reason)]
    module.__dict__[PARTS] = tuple(taken)
    became = ", ".join(offer.became for offer in taken.values())
    remarks = "; ".join(offer.reason for offer in taken.values())
    return [Change("", type(module).__name__, became, remarks), *left]


def _offer_patch_embed(module: VisionTransformer) -> Change | None:
    drop, kind = module.patch_drop, type(module).__name__
    if not isinstance(drop, PatchDropout) or drop.prob == 0:
        return None
    try:
        check_patch_embed(module)
        why = _why_every_patch(module)
    except ValueError as error:
        why = str(error)
    if why is not None:
        return Change("", kind, "", f"embeds every patch: {why}")
    return Change("", kind, "mimkernels.patchify_gather", "in training: embeds the kept patches only")


def _offer_read_tokens(module: VisionTransformer) -> Change | None:
    count, kind = _read_tokens(module), type(module).__name__
    if count is None:
        return None
    why = _why_every_token(module)
    if why is not None:
        return Change("", kind, "", f"its last block computes every token: {why}")
    block: Any = module.blocks[-1]
    drops = ", not in training: dropout in the MLP" if last_block.draws(block.mlp, training=True) else ""
    names = "[cls]" if count == 1 else "[cls] and [dist]"
    remark = f"what follows attention in its last block runs for {names} alone{drops}"
    return Change("", kind, "last block of read tokens", remark)


def _read_tokens(module: VisionTransformer) -> int | None:
    """How many of the first tokens the head reads, if it reads no others and timm's own code says so."""
    kind = module.__dict__.get(MARK, type(module))
    if kind is VisionTransformerDistilled:
        return 2
    if kind is not VisionTransformer or module.global_pool != "token" or module.attn_pool is not None:
        return None
    return 1 if module.cls_token is not None else None


def _method_of_its_own(module: VisionTransformer) -> str | None:
    """The method between images and logits that somebody has put in the place of timm's."""
    for (kind, name), timms in _TIMMS.items():
        if name in module.__dict__ or (isinstance(module, kind) and getattr(kind, name) is not timms):
            return name
    return None


def _why_every_token(module: VisionTransformer) -> str | None:
    """Why the last block runs for all tokens, as the model is now; calls look anew. None if it does not."""
    own = _method_of_its_own(module)
    if own is not None:
        return f"a {own} of its own"
    of_norms = last_block.reason_against_norms(module)
    if of_norms is not None:
        return of_norms
    if type(module.blocks) is not nn.Sequential or is_heard(module.blocks) or not len(module.blocks):
        return "a hook on its blocks, or no plain row of them"
    return last_block.reason_against(module.blocks[-1])


def _why_every_patch(module: VisionTransformer) -> str | None:
    """Why a model must embed the patches that it drops, too, of what may change later; None if it need not."""
    if isinstance(module.pos_drop, nn.Dropout) and module.pos_drop.p > 0:
        return "position dropout comes before patch dropout"
    embed = module.patch_embed
    if type(embed) is not PatchEmbed or getattr(type(embed.proj), "forward", None) is not nn.Conv2d.forward:
        return "its patch embedding is no plain convolution"
    parts = {"patch_embed": embed, "its projection": embed.proj, "patch_drop": module.patch_drop}
    heard = [name for name, part in parts.items() if is_heard(part)]
    return f"a hook or a forward of its own on {heard[0]}" if heard else None


# The classes that modules get: each a subclass of what the module was, under the same name.


def _change_class(module: nn.Module) -> str | None:
    """Give a module its new class, or say why not."""
    kind: Any = type(module)
    if "forward" in module.__dict__:
        return "it has a forward of its own"
    if is_parametrized(module):  # a class above its own would keep PyTorch from taking the parametrization away
        return "a parameter of its own is parametrized: do that after accelerate"
    try:
        new = _accelerated(kind)
    except OSError as error:
        return f"its source cannot be read: {error}"
    except ValueError as error:
        return f"it cannot be rewritten: {error}"
    become(module, new)
    module.__dict__[MARK] = kind
    return None


@functools.cache
def _accelerated(kind: Any) -> type[nn.Module]:
    known = {TimmAttention: Attention, TimmMlp: Mlp, TimmBlock: Block, **RELATIVE}
    written_here: type[nn.Module] | None = known.get(kind)
    if written_here is not None:
        return written_here
    methods: dict[str, Any] = {}
    if issubclass(kind, VisionTransformer):
        methods["forward_features"] = _features_of_kept_patches(kind)
        methods["forward"] = _forward_of_read_tokens(kind)
    elif kind is PatchDropout:
        methods["forward"] = lambda self, x: kind.forward(self, x) if is_for_pytorch(x) else _dropped(self, x)[0]
    elif kind is PatchDropoutWithIndices:
        methods["forward"] = lambda self, x: kind.forward(self, x) if is_for_pytorch(x) else _dropped(self, x)
    else:
        methods["_refused"] = set()
        methods["forward"] = rerouted(kind.forward, stand_in(methods["_refused"].update))
        methods["fused_attn"] = fused_attn
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    ways = {"__reduce_ex__": _reduce, "__prepare_scriptable__": prepare_scriptable}
    new: type[nn.Module] = type(kind.__name__, (kind,), {**names, **methods, **ways})
    return register_notrace_module(new) if is_notrace_module(kind) else new


def _reduce(module: nn.Module, protocol: int) -> tuple:
    # A class made here has no name to be found by: pickles and copies name the class it was made from.
    return _made_again, (module.__dict__[MARK],), module.__getstate__()


def _made_again(kind: Any) -> nn.Module:
    new = _accelerated(kind)
    return new.__new__(new)


def _dropped(module: PatchDropout | PatchDropoutWithIndices, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """What timm's ``patch_dropout_forward`` gives, for the same random state."""
    if not module.training or module.prob == 0:
        return x, None
    prefix = module.num_prefix_tokens
    ids = _kept(module, x.shape[0], x.shape[1] - prefix, x.device)
    rows = ids
    if prefix:
        rows = torch.cat((torch.arange(prefix, device=x.device).expand(ids.shape[0], -1), ids + prefix), dim=1)
    return gather_tokens(x, rows), ids


def _kept(drop: PatchDropout | PatchDropoutWithIndices, batch: int, patches: int, device: torch.device) -> Tensor:
    keep = max(1, count_kept(patches, drop.prob))
    noise = torch.randn(batch, patches, device=device)
    return mask_from_noise(noise, keep, order="sorted" if drop.ordered else "shuffle").ids_keep


def _features_of_kept_patches(kind: Any) -> Callable[..., Tensor]:
    def forward_features(self: VisionTransformer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _is_masked(args, kwargs) or not _embeds_kept_patches(self, x):
            features: Tensor = kind.forward_features(self, x, *args, **kwargs)
            return features
        return visible_features(self, x, _kept_patches(self, x))

    return forward_features


def _forward_of_read_tokens(kind: Any) -> Callable[..., Any]:
    # Arguments by name, for torch.fx; passed on only where given, for releases of timm that have fewer.
    def forward(self: VisionTransformer, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        given: dict[str, Any] = {} if attn_mask is None else {"attn_mask": attn_mask}
        if is_causal is not False:
            given["is_causal"] = is_causal
        if given or is_for_pytorch(x) or "read_tokens" not in self.__dict__.get(PARTS, ()):
            return kind.forward(self, x, **given)
        count = _read_tokens(self)
        if count is None or every_module_is_heard() or _method_of_its_own(self) is not None:
            return kind.forward(self, x)
        if _embeds_kept_patches(self, x):
            features = visible_features(self, x, _kept_patches(self, x), read=count)
        else:
            features = run_blocks(self, self.patch_drop(self._pos_embed(self.patch_embed(x))), ids=count)
        return self.forward_head(features)

    return forward


def _is_masked(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a call of a model has more than images: a mask, or ``is_causal``."""
    return any(value is not None and value is not False for value in (*args, *kwargs.values()))


def _embeds_kept_patches(module: VisionTransformer, x: Tensor) -> bool:
    """Whether patches are dropped from these images, and only those that are kept need be embedded."""
    drop, embed = module.patch_drop, module.patch_embed
    return (
        module.training
        and "patch_embed" in module.__dict__.get(PARTS, ())
        and isinstance(drop, PatchDropout)
        and drop.prob > 0
        and not is_for_pytorch(x)
        and not every_module_is_heard()
        and (module.dynamic_img_size or tuple(x.shape[-2:]) == tuple(embed.img_size))
        and _why_every_patch(module) is None
    )


def _kept_patches(module: VisionTransformer, x: Tensor) -> Tensor:
    height, width = module.patch_embed.patch_size
    return _kept(module.patch_drop, x.shape[0], (x.shape[-2] // height) * (x.shape[-1] // width), x.device)


def _is_accelerated(module: nn.Module) -> bool:
    return MARK in module.__dict__ or isinstance(module, (Attention, Block, Mlp, *RELATIVE.values()))
