"""Published checkpoints: where in a file the encoder is, who publishes such names, and its weights by timm's names."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mimkernels.models.build import PIXEL_STATISTICS
from mimkernels.models.checkpoint import weights_of

__all__ = ["LoadReport", "Published", "read_published"]

_PATCHES, _POSITIONS = "patch_embed.proj.weight", "pos_embed"
_IMAGE = "modality_encoders.IMAGE."  # of data2vec 2
_CAPI = "encoder.blocks.0.residual1.fn.q_proj.weight"
_ANCHORS = (_PATCHES, f"{_IMAGE}local_encoder.proj.weight", _CAPI)  # each is in one of the encoders that are told apart
_TABLE = "relative_position_bias_table"
_SHARED, _OF_BLOCK = f"rel_pos_bias.{_TABLE}", f"blocks.0.attn.{_TABLE}"

# Of several encoders in a file, the one that is evaluated: the teacher of DINO, iBOT and DINOv2 and the target encoder
# of I-JEPA, but the base encoder of MoCo v3 and the student of data2vec 2; of timm's training the moving average, which
# timm takes. Others are between the two.
_FIRST = {"teacher": 0, "target_encoder": 1, "student_ema": 2, "state_dict_ema": 2}
_LAST = {"student": 4, "momentum_encoder": 5, "_ema": 6, "model_ema": 6}

# Beside an encoder's weights under the same prefix: decoders, heads, mask tokens, and what follows from the sizes.
_BEYOND = re.compile(
    r"(mask_token|masked_embed|decoder_|decoder|head|lm_head|cls_pt_layers|cls_pt_norm|cls_pt_lm_head|shared_decoder"
    rf"|recon_proj|_ema|{re.escape(_IMAGE)}decoder|rel_pos_bias\.relative_position_index)(?=\.|$|(?<=_))"
)
_INDEX = re.compile(r"blocks\.\d+\.attn\.relative_position_index$")
_CHUNK = re.compile(r"^blocks\.\d+\.(?=\d+\.)")  # of DINOv2's training: blocks.CHUNK.BLOCK

# Published encoders by width and depth; the number of heads cannot be read off the weights.
_BY_SHAPE = {
    (192, 12): "vit_tiny_patch16_224",
    (384, 12): "vit_small_patch16_224",
    (768, 12): "vit_base_patch16_224",
    (1024, 24): "vit_large_patch16_224",
    (1280, 32): "vit_huge_patch14_224",
    (1408, 40): "vit_giant_patch14_224",
    (1536, 40): "vit_giant_patch14_dinov2",
}
_BEIT_SIZES = {(768, 12): "base", (1024, 24): "large"}
_DINOV2_SIZES = {384: "small", 768: "base", 1024: "large", 1536: "giant"}
_SHOWN = 6  # weights that are not finite and told by name
_HALF = (0.5, 0.5, 0.5)  # mean and deviation of pixels in BEiT's own runs


class LoadReport(NamedTuple):
    """What became of the weights in a published checkpoint.

    Attributes:
        family: who publishes such names.
        arch: the timm model, or in words what timm has not.
        found: what stands before the encoder's names in the file.
        loaded: how many weights were copied.
        renamed: each pattern of names that are others in timm, with how many there are.
        resampled: each with its sizes in the file and in the model.
        left_out: what is not the encoder's, by group, with how many tensors.
        missing: weights of the model that the file has not; without them all nothing is loaded.
        pixels: mean and deviation that pixels are normalised with.
        not_finite: weights with NaN or infinity, each with how many of its numbers are.
    """

    family: str
    arch: str
    found: str
    loaded: int
    renamed: tuple[str, ...]
    resampled: tuple[str, ...]
    left_out: dict[str, int]
    missing: tuple[str, ...]
    pixels: str
    not_finite: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The report in one line."""
        left = ", ".join(f"{group} ({count})" for group, count in self.left_out.items())
        broken, more = ", ".join(self.not_finite[:_SHOWN]), len(self.not_finite) - _SHOWN
        parts = [
            f"{self.family}" + (f" under {self.found!r}" if self.found else "") + f": {self.loaded} weights loaded",
            f"warning: NaN or infinity in {broken}" + (f" and {more} more" if more > 0 else "") if broken else "",
            f"renamed {', '.join(self.renamed)}" if self.renamed else "",
            f"resampled {', '.join(self.resampled)}" if self.resampled else "",
            f"left out {left}" if left else "nothing left out",
            f"missing {', '.join(self.missing)}" if self.missing else "nothing missing",
            f"pixels normalised with {self.pixels}",
        ]
        return "; ".join(part for part in parts if part)


@dataclass
class Published:
    """The encoder of a published checkpoint.

    Attributes:
        where: the file, for people.
        family: who publishes such names.
        found: what stands before the encoder's names in the file, such as ``teacher.backbone.``.
        weights: by timm's names.
        width, depth, patch, channels: read off their shapes.
        grid: patches a side that its positions are for; None where they do not tell.
        relative: its positions are relative; ``arch`` is then of BEiT or Swin.
        arch: the timm model; None if its size is none that was published.
        options: arguments of the timm model that the weights tell.
        pixels: mean and deviation of pixels in its pre-training.
        build: makes the encoder for images of some side, where timm has none like it.
    """

    where: str
    family: str
    found: str
    weights: dict[str, Tensor]
    renamed: tuple[str, ...]
    left_out: dict[str, int]
    width: int
    depth: int
    patch: int
    channels: int
    grid: int | None
    relative: bool = False
    arch: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    pixels: tuple[Sequence[float], Sequence[float]] = PIXEL_STATISTICS[3]
    build: Callable[[int], torch.nn.Module] | None = None

    @property
    def part(self) -> str:
        """Of the file, that the encoder is in."""
        return self.found.partition(".")[0]

    def report(self, arch: str, loaded: int, resampled: Sequence[str], left_out: Sequence[str] = ()) -> LoadReport:
        left = Counter(self.left_out)
        left.update(name.removeprefix("encoder.").rpartition(".")[2] for name in left_out)
        mean, std = (", ".join(f"{value:g}" for value in values) for values in self.pixels)
        return LoadReport(
            self.family, arch, self.found, loaded, self.renamed, tuple(resampled), dict(left), (),
            f"mean {mean} and deviation {std}", tuple(_not_finite(self.weights)),
        )  # fmt: skip


def read_published(content: Any, where: str, arch: str | None = None) -> Published:
    """The encoder in what ``read_file`` gave, for a timm model.

    Args:
        content: of the file, with dicts in it at any depth.
        where: the file, for people.
        arch: the timm model that it shall be, where that is known.

    Raises:
        ValueError: there is no encoder or more than one, its sizes cannot be read, or timm has none like it.
    """
    tensors = _tensors_in(content)
    found = _place_of_encoder(tensors, where)
    if found is None:
        weights = weights_of(content, where)
        raise ValueError(_without(where, weights, _PATCHES, "it is not timm's or MAE's Vision Transformer"))
    inside: dict[str, Tensor] = {}
    left: Counter[str] = Counter()
    for name, tensor in tensors.items():
        own = name.removeprefix(found) if name.startswith(found) else None
        beyond = None if own is None else _BEYOND.match(own)
        if own is None:
            left[_outer_group(name, found)] += 1
        elif beyond is not None:
            left[beyond[0] + "*" * beyond[0].endswith("_")] += 1
        elif _INDEX.match(own):
            left["blocks.*.attn.relative_position_index"] += 1
        else:
            inside[own] = tensor
    _check_stored(inside, where)
    if _CAPI in inside:
        return _of_capi(where, found, inside, left)
    if any(name.startswith(_IMAGE) for name in inside):
        return _of_data2vec(where, found, inside, left)
    if any(name.endswith(f".{_TABLE}") or ".cpb_mlp." in name for name in inside):
        return _with_relative_positions(where, found, inside, left, arch)
    return _of_plain_names(where, found, inside, left)


def _of_plain_names(where: str, found: str, weights: dict[str, Tensor], left: Counter[str]) -> Published:
    """Of timm's names: MAE, the plain ViT of SimMIM, DINO, iBOT, MoCo v3, I-JEPA; and of DINOv2, that differ little."""
    family = _plain_family(found, weights, left)
    options: dict[str, Any] = {}
    merged = "register_tokens" in weights
    weights, renamed = _renamed(
        where,
        weights,
        lambda name: (
            _CHUNK.sub("blocks.", name)
            .replace(".mlp.w12.", ".mlp.fc1.")
            .replace(".mlp.w3.", ".mlp.fc2.")
            .replace("register_tokens", "reg_token")
        ),
    )
    weights = _with_own_cls_position(weights) if merged else weights
    published = _sized(where, family, found, weights, renamed, left)
    if family.startswith("MoCo v3") and published.width == 384:
        options["num_heads"] = 12  # its ViT-S alone has heads of 32, where all others have heads of 64
    published.options = {**_options(published), **options}
    if family.startswith("DINOv2") and published.width in _DINOV2_SIZES and published.arch is not None:
        registers = f"_reg{published.options['reg_tokens']}" if published.options.get("reg_tokens") == 4 else ""
        published.arch = f"vit_{_DINOV2_SIZES[published.width]}_patch14{registers}_dinov2"
    return published


def _of_data2vec(where: str, found: str, weights: dict[str, Tensor], left: Counter[str]) -> Published:
    """Of data2vec 2, whose blocks have their norms behind the sums; some are in the encoder of the modality."""
    first = f"{_IMAGE}context_encoder.blocks."
    before = 1 + max((_number(name.removeprefix(first)) for name in weights if name.startswith(first)), default=-1)
    outer = {
        f"{_IMAGE}extra_tokens": "cls_token",
        f"{_IMAGE}fixed_positional_encoder.positions": _POSITIONS,
        f"{_IMAGE}local_encoder.": "patch_embed.",
        f"{_IMAGE}context_encoder.norm.": "norm_pre.",
        first: "blocks.",
    }

    def timm_name(name: str) -> str:
        if before and name.startswith("blocks."):
            number = name.split(".")[1]
            return f"blocks.{_number(number) + before}.{name.removeprefix(f'blocks.{number}.')}"
        return next((new + name.removeprefix(old) for old, new in outer.items() if name.startswith(old)), name)

    weights, renamed = _renamed(where, weights, timm_name)
    published = _sized(where, "data2vec 2", found, weights, renamed, left)
    from mimkernels.nn.post_norm import PostNormBlock, biased_patches

    published.options = {
        **_options(published), "block_fn": PostNormBlock, "embed_layer": biased_patches, "pre_norm": True,
        "final_norm": False, "fc_norm": False,
    }  # fmt: skip
    return published


def _of_capi(where: str, found: str, weights: dict[str, Tensor], left: Counter[str]) -> Published:
    """Of CAPI, whose encoder is built here: timm has none like it."""
    outer = {"encoder.blocks.": "blocks.", "registers": "reg_token", "patch_embed.": "patch_embed.proj."}
    inner = (
        (".residual1.norm.", ".norm1."), (".residual1.fn.rope.", ".attn."), (".residual1.fn.", ".attn."),
        (".residual2.norm.", ".norm2."), (".residual2.fn.", ".mlp."),
    )  # fmt: skip

    def timm_name(name: str) -> str:
        for old, new in inner:
            name = name.replace(old, new)
        return next((new + name.removeprefix(old) for old, new in outer.items() if name.startswith(old)), name)

    weights, renamed = _renamed(where, weights, timm_name)
    published = _sized(where, "CAPI", found, weights, renamed, left, positions=False)
    width, freqs, registers = published.width, weights.get("blocks.0.attn.freqs"), weights.get("reg_token")
    if freqs is None or freqs.dim() != 2 or not freqs.shape[1] or width % freqs.shape[1] or freqs.shape[1] % 4:
        raise ValueError(_without(where, weights, "blocks.0.attn.freqs", "its heads cannot be counted"))
    if registers is None or registers.dim() != 3:
        raise ValueError(_without(where, weights, "reg_token", "its registers cannot be counted"))
    heads, count, depth, patch = width // freqs.shape[1], registers.shape[1], published.depth, published.patch
    published.arch = f"CAPI's ViT, {width} wide, {depth} blocks of {heads} heads, patches of {patch}"

    def build(img_size: int) -> torch.nn.Module:
        from mimkernels.models.capi import CapiEncoder

        return CapiEncoder(img_size, patch, width, depth, heads, count)

    published.build = build
    return published


def _with_relative_positions(
    where: str, found: str, weights: dict[str, Tensor], left: Counter[str], arch: str | None
) -> Published:
    """Of BEiT v1 and v2 and SimMIM's ViT, whose sizes the weights tell; of Swin and Swin V2, whose do not."""
    published = _sized(where, "Swin, Swin V2 or BEiT", found, weights, (), left, positions=False)
    published.relative, published.arch = True, None
    second = any(group.startswith("cls_pt_") for group in left)
    if found.split(".")[-2:-1] == ["encoder"] and "lm_head" not in left and not second:
        published.family = "SimMIM"
    shared, own = weights.get(_SHARED), weights.get(_OF_BLOCK)
    table = shared if shared is not None else own
    if table is None or table.dim() != 2 or any(name.startswith("layers.") for name in weights):
        return published
    rows = math.isqrt(max(len(table) - 3, 0))
    published.grid = (rows + 1) // 2 if rows * rows == len(table) - 3 and rows % 2 else None
    published.options = {
        "num_heads": table.shape[1],
        "use_shared_rel_pos_bias": shared is not None,
        "use_rel_pos_bias": own is not None,
        "use_abs_pos_emb": _POSITIONS in weights,
        "init_values": 0.1 if "blocks.0.gamma_1" in weights else None,
        "qkv_bias": "blocks.0.attn.q_bias" in weights,
        "use_fc_norm": "fc_norm.weight" in weights,
    }
    if published.family != "SimMIM":
        by_arch = arch is not None and arch.startswith("beitv2")
        published.family = "BEiT v2" if second or by_arch else "BEiT"
        if published.family == "BEiT":
            published.pixels = (_HALF, _HALF)
    size = _BEIT_SIZES.get((published.width, published.depth))
    # Fine-tuned files have the same names in BEiT, in BEiT v2 and in SimMIM, whose pixels are normalised otherwise.
    if size is not None and (published.family == "SimMIM" or second or shared is not None):
        version = "v2" if published.family == "BEiT v2" else ""
        published.arch = f"beit{version}_{size}_patch16_224"
    return published


def _plain_family(found: str, weights: Mapping[str, Tensor], left: Mapping[str, int]) -> str:
    tokens = found.split(".")
    gammas = "blocks.0.ls1.gamma" in weights or any(_CHUNK.match(name) for name in weights)
    if "register_tokens" in weights or "reg_token" in weights:
        return "DINOv2 with registers"
    if gammas and ("mask_token" in left or "teacher" in tokens):
        return "DINOv2"
    if "base_encoder" in tokens or "momentum_encoder" in tokens:
        return "MoCo v3"
    if "cls_token" not in weights:
        return "I-JEPA" if {"target_encoder", "encoder"} & {*tokens} else "plain ViT without [cls]"
    if "masked_embed" in left:
        return "iBOT"
    if "teacher" in tokens or "student" in tokens:
        return "DINO or iBOT"
    if "decoder_*" in left:
        return "MAE"
    if tokens[-2:-1] == ["encoder"]:
        return "SimMIM"
    return "plain ViT"


def _sized(
    where: str,
    family: str,
    found: str,
    weights: dict[str, Tensor],
    renamed: tuple[str, ...],
    left: Counter[str],
    *,
    positions: bool = True,
) -> Published:
    """An encoder with the sizes that its weights tell."""
    projection = weights.get(_PATCHES)
    if projection is None or projection.dim() != 4 or projection.shape[2] != projection.shape[3]:
        raise ValueError(_without(where, weights, _PATCHES, "it is not timm's or MAE's Vision Transformer"))
    width, channels, patch = projection.shape[:3]
    if channels != 3:
        raise ValueError(f"{where} takes images of {channels} channels, published checkpoints take 3")
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    grid = None
    if positions:
        table = weights.get(_POSITIONS)
        if table is None or table.dim() != 3:
            why = "its positions are of another kind (rotary, relative, or computed)"
            raise ValueError(_without(where, weights, _POSITIONS, why))
        grid, _ = _grid_of(where, weights)
    return Published(
        where, family, found, weights, renamed, dict(left), width, depth, patch, channels, grid,
        arch=_BY_SHAPE.get((width, depth)),
    )  # fmt: skip


def _options(published: Published) -> dict[str, Any]:
    """Arguments of timm's VisionTransformer that weights tell, where they are not as in most."""
    weights, options = published.weights, dict[str, Any]()
    if "cls_token" not in weights:
        options["class_token"] = False
    if "reg_token" in weights and weights["reg_token"].dim() == 3:
        options["reg_tokens"] = weights["reg_token"].shape[1]
    options["no_embed_class"] = not _grid_of(published.where, weights)[1]
    if "blocks.0.ls1.gamma" in weights:
        options["init_values"] = 1e-5
    if "blocks.0.attn.qkv.weight" in weights and "blocks.0.attn.qkv.bias" not in weights:
        options["qkv_bias"] = False
    if "norm.weight" not in weights and "fc_norm.weight" in weights:
        options["fc_norm"] = True  # fine-tuned on the mean of the tokens
    inner, outer = weights.get("blocks.0.mlp.fc1.weight"), weights.get("blocks.0.mlp.fc2.weight")
    if inner is not None and outer is not None and inner.dim() == outer.dim() == 2:
        if len(inner) != int(published.width * 4):
            options["mlp_ratio"] = (len(inner) + 0.5) / published.width  # timm rounds down
        if len(inner) == 2 * outer.shape[1]:
            from timm.layers import SwiGLUPacked

            options.update(mlp_layer=SwiGLUPacked, act_layer=torch.nn.SiLU)
    return options


def _grid_of(where: str, weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """Patches a side that positions are for, and how many of them are of prefix tokens."""
    registers = weights["reg_token"].shape[1] if "reg_token" in weights and weights["reg_token"].dim() == 3 else 0
    count, prefix = weights[_POSITIONS].shape[1], ("cls_token" in weights) + registers
    for embedded in (0, prefix) if registers else (prefix, 0):
        side = math.isqrt(max(count - embedded, 0))
        if side and side * side == count - embedded:
            return side, embedded
    raise ValueError(f"{where} has {count} positions with {prefix} prefix tokens, which are of no square image")


def _with_own_cls_position(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Positions without that of [cls], which is added to [cls], where registers stand behind it."""
    cls, table = weights.get("cls_token"), weights.get(_POSITIONS)
    side = math.isqrt(table.shape[1]) if table is not None and table.dim() == 3 else 0
    if cls is None or table is None or not side or side * side == table.shape[1] or cls.dim() != 3:
        return weights
    if cls.shape[2] != table.shape[2]:
        return weights  # for the check of names and shapes
    return {**weights, "cls_token": cls + table[:, :1], _POSITIONS: table[:, 1:]}


def _renamed(
    where: str, weights: dict[str, Tensor], rule: Callable[[str], str]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Weights by other names, and what was renamed, with all blocks as one."""
    named: dict[str, Tensor] = {}
    told: Counter[str] = Counter()
    for old, tensor in weights.items():
        new = rule(old)
        if new in named:
            raise ValueError(f"{where} has two tensors for timm's {new}, {old} {list(tensor.shape)} is one of them")
        named[new] = tensor
        if new != old:
            parts = (re.sub(r"\d+", "*", name.removesuffix(".weight").removesuffix(".bias")) for name in (old, new))
            told[" to ".join(parts)] += 1
    return named, tuple(f"{names} ({count})" for names, count in told.items())


def _tensors_in(content: Any) -> dict[str, Tensor]:
    """Tensors of nested dicts by dotted names. Every dict is read once: one in a file may hold itself."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    todo = [("", content)]
    while todo:
        name, part = todo.pop()
        if isinstance(part, Tensor):
            found[name] = part
        elif isinstance(part, Mapping) and id(part) not in seen:
            seen.add(id(part))
            todo += [(f"{name}.{key}" if name else str(key), value) for key, value in reversed(list(part.items()))]
    return found


def _place_of_encoder(tensors: Mapping[str, Tensor], where: str) -> str | None:
    """What stands before the names of the encoder that is evaluated; None if there is none."""
    places = {
        name.removesuffix(anchor): None for name in tensors for anchor in _ANCHORS if f".{name}".endswith(f".{anchor}")
    }
    ranked: dict[int, list[str]] = {}
    for place in places:
        ranks = {**_FIRST, **_LAST}
        rank = max((ranks[token] for token in place.split(".") if token in ranks), default=3)
        ranked.setdefault(rank, []).append(place)
    if not ranked:
        return None
    best = ranked[min(ranked)]
    if len(best) > 1:
        shown = ", ".join(repr(place) for place in best[:6])
        raise ValueError(f"{where} holds {len(best)} encoders, under {shown}: save the weights of one alone")
    return best[0]


def _outer_group(name: str, found: str) -> str:
    """The part of a file that a name outside of the encoder belongs to."""
    parts, ours = name.split("."), found.split(".")
    same = next((i for i, (a, b) in enumerate(zip(parts, ours, strict=False)) if a != b), 0)
    return ".".join(parts[: same + 1])


def _check_stored(weights: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors that are no plain values or larger than what the file stores: sizes are believed afterwards."""
    odd = [
        f"{name} {list(tensor.shape)} ({tensor.layout})"
        for name, tensor in weights.items()
        if tensor.layout != torch.strided
        or tensor.is_meta
        or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
    ]
    if odd:
        raise ValueError(f"{where} does not store {len(odd)} of its weights whole, such as {odd[0]}")


def _not_finite(weights: Mapping[str, Tensor]) -> Iterator[str]:
    """Weights with NaN or infinity and how many of their numbers are; a sum, which is quick, tells where to count."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite():
            count = tensor.numel() - int(tensor.double().isfinite().sum())
            if count:
                yield f"{name} ({count:,} of {tensor.numel():,})"


def _without(where: str, weights: Mapping[str, Tensor], name: str, why: str) -> str:
    weight = weights.get(name)
    held = f"{name} has shape {list(weight.shape)}" if weight is not None else f"there is no {name}"
    return f"{where}: {held}, so {why}; its {len(weights)} weights begin with {_first(weights)}"


def _first(weights: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{key} {list(value.shape)}" for key, value in list(weights.items())[:4])


def _number(text: str) -> int:
    digits = re.match(r"\d{1,6}(?=\.|$)", text)
    return int(digits[0]) if digits else 0
