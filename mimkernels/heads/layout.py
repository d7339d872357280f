"""Which tokens of a model are patches, and where: what its patch embedding made of the images that it got."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimkernels.heads.calls import named_parts
from mimkernels.nn.sdpa import Patches
from mimkernels.nn.windows import pair, windows_of

# Parameters that put one token (or as many as they have rows) in front of the patches.
PREFIX_PARAMETERS = (
    *("cls_token", "class_token", "class_embedding", "dist_token", "distillation_token"),
    *("reg_token", "register_token", "register_tokens", "storage_tokens"),
)


class Part(NamedTuple):
    """A model, or one inside another, that embeds patches.

    Attributes:
        embedding: the module in which images become patches, by convolutions or as timm's NaFlexEmbeds.
        num_prefix: P, tokens that the part puts in front of the patches.
        declared: the part says so itself; else it is what its parameters look like.
    """

    embedding: nn.Module
    num_prefix: int
    declared: bool = False


class Place(NamedTuple):
    """What is known of the tokens that a layer attends to.

    Attributes:
        num_prefix: P, or None if that is not known.
        patches: those that the other tokens are, or None if that is not known.
        why: what is not known, and why; "" if all is.
        windows: of an image, one after the other, that the layer's attention runs in; 1 of other layers.
        note: what fills these windows besides patches; "" if nothing does.
    """

    num_prefix: int | None
    patches: Patches | None
    why: str = ""
    windows: int = 1
    note: str = ""


class Layouts:
    """Where tokens lie in every part of a model, followed while it runs.

    What is not seen is not known: a grid is that of the images that the part embedded last, whatever it was built for.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parts = find_parts(model)
        self._names = {id(module): name for name, module in named_parts(model)}
        self._embeddings = {id(part.embedding): name for name, part in self.parts.items()}
        self._droppers = {
            id(part) for part in model.modules() if any(kind.__name__ in _DROPPERS for kind in type(part).__mro__)
        }
        self._seen: dict[str, _Seen] = {}
        self._convolutions: list[_Convolution] = []  # in the embedding that runs now

    def place(
        self, modules: Sequence[nn.Module], batch: int, tokens: int, given: int | None, images: int | None = None
    ) -> Place:
        """What is known of the keys of a call made in these modules, the innermost first.

        Args:
            batch, tokens: of the keys.
            given: P, if it is known; else it is that of the part.
            images: that the model got, for where no part embedded any.
        """
        name = _innermost(self._names[id(modules[0])], self.parts)
        _, prefix, declared = self.parts[name] if name is not None else (None, 0, False)
        # Where there are no prefix tokens, none can be missing in front of whatever became of the patches.
        certain = 0 if declared and prefix == 0 else None
        if given is not None:
            certain = prefix = given
        seen, count = self._seen.get(name) if name is not None else None, tokens - prefix
        images = images if seen is None else seen.patches.batch
        cut = _in_windows(modules, batch, tokens, None if seen is None else seen.patches) if prefix == 0 else None
        if cut is not None:
            patches, whole = cut
            windows = batch // patches.batch
            return Place(0, patches, windows=windows, note=_filled(windows, tokens, whole))
        if seen is not None and count in seen.chosen:
            ids = seen.chosen[count]
            if ids is not None:
                return Place(prefix, seen.patches._replace(ids=ids))
            grid = shown_grid(seen.patches.grid)
            return Place(prefix, None, f"which {count} of the {grid} patches were kept was not seen")
        if seen is not None and seen.whole and count == math.prod(seen.patches.grid):
            return Place(prefix, seen.patches)
        if seen is not None and prefix and given is None and tokens in seen.bare:
            return Place(0, seen.patches._replace(ids=seen.bare[tokens]))
        window = window_of(modules, tokens) if prefix == 0 else None
        if window is not None:
            windows = _windows_of(images, batch)
            note = "" if seen is None else _filled(windows, tokens, seen.patches.grid)
            return Place(0, self.of_grid(modules, batch, window), windows=windows, note=note)
        windows = _windows_of(images, batch) if certain == 0 else 1
        if name is None:
            return Place(certain, None, "this part of the model embeds no patches", windows)
        if seen is None:
            return Place(certain, None, f"no image was embedded by {name or 'the model'} inside capture", windows)
        why = f"{tokens} tokens, but {described(prefix, seen.patches.grid)}" + seen.describe_choices()
        return Place(certain, None, why, windows)

    def of_grid(self, modules: Sequence[nn.Module], batch: int, grid: Sequence[int]) -> Patches:
        """Patches in a grid that is known: a window of the part's own, or one that was given."""
        name = _innermost(self._names[id(modules[0])], self.parts)
        seen = None if name is None else self._seen.get(name)
        patches = Patches(batch, tuple(grid))
        if seen is None:
            return patches
        whole = seen.patches.batch * math.prod(seen.patches.grid)
        # Where there are fewer, they were merged, and each has more pixels.
        return patches._replace(patch_size=seen.patches.patch_size) if whole == batch * math.prod(grid) else patches

    def see(self, embedding: nn.Module, patches: Patches) -> None:
        """As of an observer of `mimkernels.nn.sdpa`."""
        name = _innermost(self._names.get(id(embedding)), self.parts)
        if name is not None:
            self._seen[name] = _Seen(patches)

    def left(self, module: nn.Module, inputs: Sequence[Any], named: Mapping[str, Any], output: Any) -> None:
        """Look at a module that has just run, with its inputs by place and by name."""
        name = self._embeddings.get(id(module))
        if name is not None and _is_flexible(module):
            if output is not None:  # None of one that failed
                self._seen[name] = _Seen(_of_any_size(module, output, *inputs, **named))
        elif name is not None and self._convolutions:
            self._seen[name] = _Seen(_embedded(self._convolutions))
        if name is not None:
            self._convolutions = []
        if id(module) in self._droppers:
            name = _innermost(self._names[id(module)], self.parts)
            seen = None if name is None else self._seen.get(name)
            kept = output[0] if isinstance(output, tuple) else output
            if seen is not None and inputs and isinstance(kept, Tensor):
                seen.drop(inputs[0].shape[1], kept.shape[1], getattr(module, "num_prefix_tokens", 0))

    def note(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, modules: Sequence[nn.Module]
    ) -> None:
        """Look at one of ``LAYOUT_FUNCTIONS`` that was called in these modules, the innermost first."""
        if func in _CONVOLUTIONS:
            if any(id(module) in self._embeddings for module in modules):
                self._convolutions.append(_convolution(result, *args, **kwargs))
            return
        choice = _CHOICES[func](result, *args, **kwargs)
        if choice is None:
            return
        inside = _innermost(self._names[id(modules[0])], self._seen) if modules else None
        for name in self._seen if inside is None else (inside,):
            if isinstance(choice, _Rest):
                self._seen[name].cut(choice, self.parts[name].num_prefix)
            else:
                self._seen[name].choose(choice, self.parts[name].num_prefix)


class _Choice(NamedTuple):
    """Some of the tokens ``[B, N, D]`` of a batch."""

    tokens: int
    kept: int
    ids: Tensor | None  # [B, K], or None if they are not known


class _Rest(NamedTuple):
    """All tokens ``[B, N, D]`` of a batch but the first so many."""

    batch: int
    tokens: int
    first: int


class _Seen:
    """The patches that a part embedded last, and what was chosen of them since.

    Attributes:
        chosen: the ids ``[B, K]`` of patches that were chosen, by K; None where they are not known.
        whole: all patches are there, in their order.
        bare: the ids of patches whose prefix tokens were taken off, by their number; None of all, in their order.
    """

    def __init__(self, patches: Patches) -> None:
        self.patches = patches._replace(ids=None)
        self.chosen: dict[int, Tensor | None] = {}
        self.bare: dict[int, Tensor | None] = {}
        self.whole = patches.ids is None
        if patches.ids is not None:
            self.chosen[patches.ids.shape[-1]] = patches.ids

    def choose(self, choice: _Choice, num_prefix: int) -> None:
        """Some of the tokens, which may be patches alone or patches that were chosen before."""
        count = math.prod(self.patches.grid)
        shuffled = count in self.chosen
        if choice.tokens == choice.kept == count and not self.whole and not shuffled:
            self.chosen, self.whole = {}, True  # back in their order, with mask tokens among them
        elif choice.tokens == count:
            # Once patches were shuffled, it may be of them or of a table of positions, which is in order.
            again = shuffled and not _same(self.chosen[count], choice.ids)
            self._add(choice.kept, None if again else choice.ids)
        elif choice.tokens in self.chosen:
            before, ids = self.chosen[choice.tokens], choice.ids
            chosen = None
            if before is not None and ids is not None and (len(before), before.device) == (len(ids), ids.device):
                chosen = before[torch.arange(len(ids), device=ids.device)[:, None], ids]
            self._add(choice.kept, chosen)
        elif choice.tokens == count + num_prefix:
            self.whole, self.bare = False, {}  # whether the prefix is still there is not known

    def cut(self, rest: _Rest, num_prefix: int) -> None:
        """Tokens without the first so many, which may be the prefix tokens."""
        count = rest.tokens - rest.first
        if rest.first != num_prefix or rest.batch != self.patches.batch:
            return  # or of a table of positions
        if count in self.chosen:
            if self.chosen[count] is not None:
                self.bare[count] = self.chosen[count]
        elif self.whole and count == math.prod(self.patches.grid):
            self.bare[count] = None

    def drop(self, tokens: int, kept: int, num_prefix: int) -> None:
        """A choice of patches that leaves prefix tokens alone, whose ids need not have been seen."""
        if kept < tokens and kept - num_prefix not in self.chosen:
            self._add(kept - num_prefix, None)

    def _add(self, kept: int, ids: Tensor | None) -> None:
        # As many chosen twice: which of the two a layer gets is not known, unless they are the same, as where tokens
        # and their positions are chosen one after the other.
        if kept in self.chosen and not _same(self.chosen[kept], ids):
            ids = None
        self.chosen[kept] = ids
        self.whole, self.bare = False, {}

    def describe_choices(self) -> str:
        if self.whole:
            return ""
        return f", of which {' or '.join(map(str, self.chosen)) or 'some'} were chosen"


def _same(ids: Tensor | None, others: Tensor | None) -> bool:
    return ids is not None and others is not None and ids.data_ptr() == others.data_ptr()


class _Convolution(NamedTuple):
    batch: int
    pixels: tuple[int, ...]
    stride: tuple[int, ...]
    grid: tuple[int, ...]


def _convolution(
    result: Tensor, input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, *_: Any, **__: Any
) -> _Convolution:
    axes = weight.dim() - 2
    steps = (stride,) * axes if isinstance(stride, int) else tuple(stride)
    batch = result.shape[0] if result.dim() == weight.dim() else 1
    return _Convolution(batch, tuple(input.shape[-axes:]), steps * (axes // len(steps)), tuple(result.shape[-axes:]))


def _embedded(convolutions: Sequence[_Convolution]) -> Patches:
    first, last = convolutions[0], convolutions[-1]
    patch_size: tuple[int, ...] | None = None
    if len(convolutions) == 1:
        patch_size = last.stride
    elif all(size % count == 0 for size, count in zip(first.pixels, last.grid, strict=True)):
        patch_size = tuple(size // count for size, count in zip(first.pixels, last.grid, strict=True))
    # Of videos, steps in time are no pixels.
    return Patches(last.batch, last.grid, patch_size if len(last.grid) == 2 else None)


def _is_flexible(module: nn.Module) -> bool:
    """Whether a module is timm's NaFlexEmbeds, which takes images, or patches of images of any size."""
    return any(kind.__name__ == "NaFlexEmbeds" for kind in type(module).__mro__)


def _of_any_size(
    module: nn.Module, output: Any, x: Tensor, patch_coord: Tensor | None = None, patch_valid: Tensor | None = None
) -> Patches:
    """What NaFlexEmbeds made: tokens and their grid of images, tokens and None of patches with their places."""
    embeds: Any = module
    size = tuple(embeds.patch_size)
    if patch_coord is None:
        return Patches(x.shape[0], tuple(output[1]), size)
    if x.dim() == 5:  # [B, N, Ph, Pw, C], or channels before pixels
        size = tuple(x.shape[2:4] if getattr(embeds, "channels_last", True) else x.shape[3:5])
    places = patch_coord.long()
    if patch_valid is not None:
        places = places.where(patch_valid.bool()[..., None], 0)
    grids = places.amax(1) + 1  # [B, 2]
    rows, columns = grids.amax(0).tolist()
    return Patches(len(places), (rows, columns), size, places[..., 0] * columns + places[..., 1], grids)


# What a function that chooses tokens chose: called with its result and its arguments.


def _gathered(result: Tensor, input: Tensor, dim: int, index: Tensor, **_: Any) -> _Choice | None:
    if input.dim() != 3 or dim not in (1, -2):
        return None
    return _Choice(input.shape[1], index.shape[1], index[:, :, 0])


def _along(result: Tensor, input: Tensor, indices: Tensor, dim: int | None = None, **_: Any) -> _Choice | None:
    if input.dim() != 3 or dim not in (1, -2):
        return None
    return _Choice(input.shape[1], indices.shape[1], indices[:, :, 0].expand(len(input), -1))


def _selected(result: Tensor, input: Tensor, dim: int, index: Tensor, **_: Any) -> _Choice | None:
    if input.dim() != 3 or dim not in (1, -2):
        return None
    return _Choice(input.shape[1], result.shape[1], index.expand(len(input), -1))


def _indexed(result: Tensor, x: Tensor, index: Any) -> _Choice | _Rest | None:
    if x.dim() != 3:
        return None
    batch, tokens, _ = x.shape
    if isinstance(index, tuple) and len(index) == 2 and index[0] == slice(None) and isinstance(index[1], slice):
        first, end, step = index[1].indices(tokens)
        return _Rest(batch, tokens, first) if (end, step) == (tokens, 1) else None
    if isinstance(index, Tensor) and index.dtype == torch.bool and index.dim() == 2:  # [B, N], of every image as many
        kept, rest = divmod(len(result), max(1, batch))
        order = index.byte().argsort(dim=1, descending=True, stable=True)
        return None if rest else _Choice(tokens, kept, order[:, :kept])
    if not isinstance(index, tuple) or len(index) < 2 or not isinstance(index[1], Tensor) or result.dim() != 3:
        return None
    rows, ids = index[:2]
    # x[:, ids] of all images, x[rows, ids] of each.
    of_all = isinstance(rows, slice) and rows == slice(None) and ids.dim() == 1
    of_each = isinstance(rows, Tensor) and rows.shape == (batch, 1) and ids.dim() == 2
    known = (of_all or of_each) and ids.dtype in (torch.int32, torch.int64)
    return _Choice(tokens, result.shape[1], ids.expand(batch, -1) if known else None)


_DROPPERS = ("PatchDropout", "PatchDropoutWithIndices")  # of timm
_CONVOLUTIONS = (F.conv2d, F.conv3d)
_CHOICES: dict[Any, Callable[..., _Choice | _Rest | None]] = {
    **dict.fromkeys((torch.gather, Tensor.gather), _gathered),
    **dict.fromkeys((torch.take_along_dim, Tensor.take_along_dim), _along),
    **dict.fromkeys((torch.index_select, Tensor.index_select), _selected),
    Tensor.__getitem__: _indexed,
}
LAYOUT_FUNCTIONS = frozenset((*_CONVOLUTIONS, *_CHOICES))


def find_parts(model: nn.Module) -> dict[str, Part]:
    """The model and models inside it that embed patches, by qualified name."""
    parts: dict[str, Part] = {}
    configs: list[Any] = []
    for name, module in named_parts(model):
        part = _of_timm(module) or _of_torchvision(module)
        config = getattr(module, "config", None)
        if part is None and config is not None and not any(config is other for other in configs):
            configs.append(config)  # every part of a transformers model refers to the whole model's
            part = _of_transformers(module, config)
        if part is not None:
            parts[name] = part
    return parts


def _innermost(name: str | None, parts: Mapping[str, Any]) -> str | None:
    """The name of the innermost part that the module of that name is in."""
    while name is not None:
        if name in parts:
            return name
        name = name.rpartition(".")[0] if name else None
    return None


def _windows_of(images: int | None, batch: int) -> int:
    """How many windows each of so many images was cut into, if a batch of so many is theirs."""
    return batch // images if images and batch % images == 0 else 1


def window_of(modules: Iterable[nn.Module], tokens: int) -> tuple[int, int] | None:
    """The window that attention runs in, if a calling module (innermost first) has one of that many tokens."""
    for module in modules:
        window = pair(getattr(module, "window_size", None))
        if window is not None and math.prod(window) == tokens:
            return window
    return None


def _filled(windows: int, tokens: int, grid: Sequence[int]) -> str:
    """A note where so many windows of so many tokens hold more than the image's grid has."""
    held = windows * tokens
    if held <= math.prod(grid):
        return ""
    return f"its windows hold {held} tokens of {shown_grid(grid)} patches: what fills them up counts as patches"


def _in_windows(
    modules: Iterable[nn.Module], batch: int, tokens: int, seen: Patches | None
) -> tuple[Patches, tuple[int, int]] | None:
    """Of a block of Swin (of modules, innermost first), the windows that attention runs in, and the image's grid."""
    windows = next((found for found in map(windows_of, modules) if found is not None), None)
    if windows is None or math.prod(windows.size) != tokens:
        return None
    grids = {windows.grid: None} if seen is None else _merged(seen)
    # The grid that the block was built for, unless the images were of another size.
    for grid in sorted(grids, key=lambda grid: grid != windows.grid):
        here = windows._replace(grid=grid)
        if batch == here.number * seen.batch if seen is not None else batch % here.number == 0:
            ids = here.ids().repeat(batch // here.number, 1)
            return Patches(batch // here.number, here.padded, grids[grid], ids), grid
    return None


def _merged(seen: Patches) -> dict[tuple[int, int], tuple[int, ...] | None]:
    """The grids that patches have after merging two by two, none or more times, with their pixels."""
    if len(seen.grid) != 2:
        return {}
    (rows, columns), size = seen.grid, seen.patch_size
    grids: dict[tuple[int, int], tuple[int, ...] | None] = {(rows, columns): size}
    while (rows, columns) != (1, 1):
        rows, columns = -(-rows // 2), -(-columns // 2)
        size = None if size is None else tuple(2 * pixels for pixels in size)
        grids[rows, columns] = size
    return grids


def shown_grid(grid: Sequence[int]) -> str:
    return " x ".join(str(size) for size in grid)


def described(num_prefix: int, grid: Sequence[int]) -> str:
    return f"{num_prefix} prefix tokens + {shown_grid(grid)} patches are {num_prefix + math.prod(grid)}"


def _of_timm(module: nn.Module) -> Part | None:
    if hasattr(module, "decoder_blocks") and hasattr(module, "encoder"):
        encoder: Any = module.encoder
        module = encoder  # mimkernels.models.MAE: the decoder's tokens are laid out as the encoder's
    embed = getattr(module, "patch_embed", None)
    if not isinstance(embed, nn.Module):
        embed = getattr(module, "embeds", None)
    if not isinstance(embed, nn.Module) or isinstance(embed, nn.ModuleList):  # several, of tokens of several sizes
        return None
    if not (_is_flexible(embed) or _convolutions_of(embed)):
        return None
    prefix = getattr(module, "num_prefix_tokens", None)
    return Part(embed, prefix, True) if isinstance(prefix, int) else Part(embed, _prefix_tokens(module))


def _of_torchvision(module: nn.Module) -> Part | None:
    embed = getattr(module, "conv_proj", None)
    if not isinstance(embed, nn.Module) or not isinstance(getattr(module, "class_token", None), Tensor):
        return None
    return Part(embed, _prefix_tokens(module))


def _of_transformers(module: nn.Module, config: Any) -> Part | None:
    patch = pair(getattr(config, "patch_size", None))
    embed = next((part for part in _convolutions_of(module) if tuple(part.kernel_size[-2:]) == patch), None)
    if embed is None:
        return None  # as a decoder: its tokens come from the model that it is in
    # The tokens belong to the module that embeds patches.
    return Part(embed, next((count for part in module.modules() if (count := _prefix_tokens(part))), 0))


def _convolutions_of(module: nn.Module) -> list[nn.Conv2d | nn.Conv3d]:
    return [part for part in module.modules() if isinstance(part, nn.Conv2d | nn.Conv3d)]


def _prefix_tokens(module: nn.Module) -> int:
    """How many tokens a module's own parameters put in front."""
    count = 0
    for name in PREFIX_PARAMETERS:
        token = getattr(module, name, None)
        if isinstance(token, Tensor):
            count += token.shape[-2] if token.dim() > 1 else 1
    return count
