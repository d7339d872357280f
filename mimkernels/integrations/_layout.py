"""Which tokens of a model are patches, and where: read off models of timm, transformers and torchvision."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mimkernels.integrations._calls import named_parts

# Parameters that put one token (or as many as they have rows) in front of the patches.
PREFIX_PARAMETERS = (
    *("cls_token", "class_token", "class_embedding", "dist_token", "distillation_token"),
    *("reg_token", "register_token", "register_tokens", "storage_tokens"),
)


@dataclass(frozen=True)
class Layout:
    """Prefix tokens first, then patches.

    Attributes:
        grid: patches per axis.
        num_prefix: P.
        patch_size: pixels per patch and axis, or None.
    """

    grid: tuple[int, ...]
    num_prefix: int
    patch_size: tuple[int, ...] | None = None

    @property
    def patches(self) -> int:
        return math.prod(self.grid)

    def __str__(self) -> str:
        return f"{self.num_prefix} prefix tokens + {shown_grid(self.grid)} patches"


def find_layouts(model: nn.Module) -> dict[str, Layout]:
    """The layouts of the model and of models inside it, by qualified name."""
    found: dict[str, Layout] = {}
    configs: list[Any] = []
    for name, module in named_parts(model):
        layout = _of_timm(module) or _of_torchvision(module)
        config = getattr(module, "config", None)
        if layout is None and config is not None and not any(config is other for other in configs):
            configs.append(config)  # every part of a transformers model refers to the whole model's
            layout = _of_transformers(module, config)
        if layout is not None:
            found[name] = layout
    return found


def layout_of(name: str, layouts: dict[str, Layout]) -> Layout | None:
    """That of the innermost model that the module of that name is in."""
    while True:
        if name in layouts:
            return layouts[name]
        if not name:
            return None
        name = name.rpartition(".")[0]


def window_of(modules: Iterable[nn.Module], tokens: int) -> tuple[int, int] | None:
    """The window that attention runs in, if a calling module (innermost first) has one of that many tokens."""
    for module in modules:
        window = _pair(getattr(module, "window_size", None))
        if window is not None and math.prod(window) == tokens:
            return window
    return None


def shown_grid(grid: Sequence[int]) -> str:
    return " x ".join(str(size) for size in grid)


def _of_timm(module: nn.Module) -> Layout | None:
    if hasattr(module, "decoder_blocks") and hasattr(module, "encoder"):
        module = module.encoder  # mimkernels.models.MAE: the decoder's tokens are laid out as the encoder's
    embed = getattr(module, "patch_embed", None)
    grid = _pair(getattr(embed, "grid_size", None))
    if grid is None:
        return None
    prefix = getattr(module, "num_prefix_tokens", None)
    prefix = prefix if isinstance(prefix, int) else _prefix_tokens(module)
    return Layout(grid, prefix, _pair(getattr(embed, "patch_size", None)))


def _of_torchvision(module: nn.Module) -> Layout | None:
    if not isinstance(getattr(module, "class_token", None), Tensor):
        return None
    image, patch = _pair(getattr(module, "image_size", None)), _pair(getattr(module, "patch_size", None))
    return _of_sizes(image, patch, _prefix_tokens(module))


def _of_transformers(module: nn.Module, config: Any) -> Layout | None:
    image, patch = _pair(getattr(config, "image_size", None)), _pair(getattr(config, "patch_size", None))
    if not any(isinstance(part, nn.Conv2d | nn.Conv3d) for part in module.modules()):
        return None  # embeds no patches, as a decoder: its tokens come from the model that it is in
    # The tokens belong to the module that embeds patches.
    prefix = next((count for part in module.modules() if (count := _prefix_tokens(part))), 0)
    layout = _of_sizes(image, patch, prefix)
    frames, tubelet = getattr(config, "num_frames", None), getattr(config, "tubelet_size", None)
    if layout is not None and isinstance(frames, int) and isinstance(tubelet, int):
        return Layout((frames // tubelet, *layout.grid), prefix)
    return layout


def _of_sizes(image: tuple[int, int] | None, patch: tuple[int, int] | None, prefix: int) -> Layout | None:
    if image is None or patch is None or min(patch) < 1:
        return None
    rows, columns = image[0] // patch[0], image[1] // patch[1]
    return Layout((rows, columns), prefix, patch) if rows and columns else None


def _prefix_tokens(module: nn.Module) -> int:
    """How many tokens a module's own parameters put in front."""
    count = 0
    for name in PREFIX_PARAMETERS:
        token = getattr(module, name, None)
        if isinstance(token, Tensor):
            count += token.shape[-2] if token.dim() > 1 else 1
    return count


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    if isinstance(value, Sequence) and len(value) == 2 and all(isinstance(size, int) for size in value):
        return value[0], value[1]
    return None
