"""What can be recorded, and the settings with which published code computes it, as data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

__all__ = ["BEYOND_CLS", "PRESETS", "QUANTITIES", "Preset", "Quantity", "patch_grid_positions", "required_stats"]

UNITS = ("pixel", "patch", "unit")
UNIT_NAMES = {"pixel": "pixels", "patch": "patches", "unit": "image sides"}


@dataclass(frozen=True)
class Quantity:
    """One number per image and head (or per image and layer), and what it is made of.

    Attributes:
        name: as in tables, files and plots.
        label: for people.
        formula: per query i where it has an index, then a mean over patch queries. P is the attention, T the patch
            keys, M_i the sum of P_ij over T.
        unit: "nats", "" for a pure number, or "distance": the unit of the positions given to ``attention``.
        row_stats: names to ask of ``attention(..., stats=...)``.
        inputs: what ``HeadStatistics.update`` needs besides: any of "q", "k", "v", "lse", "tokens",
            "output".
        per_head: False where a layer has one number.
    """

    name: str
    label: str
    formula: str
    unit: str = ""
    row_stats: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    per_head: bool = True


_QK = ("q", "k", "lse")
# The eight of Beyond-[cls], in the published order.
BEYOND_CLS = (
    "cls_cls_attention",
    "pos_self_attention",
    "cls_cls_attention_adj",
    "pos_self_attention_adj",
    "cls_pos_attention",
    "pos_cls_attention",
    "cls_pos_entropy",
    "pos_pos_entropy",
)
_MASSES = ("self_mass", "patch_mass")
_ENTROPY = ("patch_entropy", "patch_mass")
QUANTITIES: dict[str, Quantity] = {
    quantity.name: quantity
    for quantity in (
        Quantity("entropy", "attention entropy", "-sum_j P_ij log P_ij", "nats", ("entropy",)),
        Quantity(
            "patch_entropy", "attention entropy over patches", "entropy of P_ij / M_i", "nats", ("patch_entropy",)
        ),
        Quantity(
            "normalized_entropy",
            "attention entropy, normalised",
            "H_i / log n_i, n_i the keys that no mask hides from query i; 0 where that is one",
            "",
            ("entropy",),
            ("k",),
        ),
        Quantity("prefix_mass", "mass on prefix tokens", "1 - M_i: the [cls] mass", "", ("prefix_mass",)),
        Quantity("patch_mass", "mass on patches", "M_i", "", ("patch_mass",)),
        Quantity("self_mass", "attention to oneself", "P_ii", "", ("self_mass",)),
        Quantity("peak", "largest attention weight", "max_j P_ij", "", ("peak",)),
        Quantity(
            "max_score",
            "largest score",
            "max of S_ij over patch queries i and the keys j that they see; an image without any does not count",
            "",
            ("max_score",),
        ),
        Quantity(
            "argmax_is_prefix",
            "queries that look most at prefix tokens",
            "1 where the j of max_j P_ij is [cls] or a register",
            "",
            ("argmax",),
        ),
        Quantity("distance", "attention distance", "sum over T of P_ij |x_i - x_j|", "distance", ("distance",)),
        Quantity(
            "renormalized_distance",
            "renormalised attention distance",
            "distance_i / M_i; 0 where M_i = 0",
            "distance",
            ("distance", "patch_mass"),
        ),
        Quantity(
            "nmi",
            "normalised mutual information",
            "(H(p_k) - mean_i H_i) / sqrt(log N H(p_k)), patch queries and keys, rows P_ij / M_i; within the regions "
            "that a mask cuts windows into",
            "",
            _ENTROPY,
            _QK,
        ),
        Quantity(
            "head_divergence",
            "head divergence",
            "mean over g != h of KL(P^h || P^g), itself a mean over all queries, [cls] too, and over all keys",
            "nats",
            (),
            _QK,
        ),
        Quantity(
            "patch_head_divergence",
            "head divergence over patches",
            "the same over patch queries and patch keys, rows P_ij / M_i",
            "nats",
            ("patch_mass",),
            _QK,
        ),
        Quantity("cls_cls_attention", "[cls] to [cls]", "P_00", "", ("self_mass",)),
        Quantity("pos_self_attention", "patch to itself", "P_ii", "", ("self_mass",)),
        Quantity("cls_cls_attention_adj", "[cls] to [cls] / to patches", "P_00 / (M_0 + eps)", "", _MASSES),
        Quantity("pos_self_attention_adj", "patch to itself / to patches", "P_ii / (M_i + eps)", "", _MASSES),
        Quantity("cls_pos_attention", "[cls] to a patch", "M_0 / N", "", ("patch_mass",)),
        Quantity("pos_cls_attention", "patch to [cls]", "1 - M_i", "", ("prefix_mass",)),
        Quantity("cls_pos_entropy", "entropy of [cls] over patches", "of P_0j / (M_0 + eps)", "nats", _ENTROPY),
        Quantity("pos_pos_entropy", "entropy of patches over patches", "of P_ij / (M_i + eps)", "nats", _ENTROPY),
        Quantity("cls_magnitude", "norm of [cls]", "|x_0|", inputs=("tokens",), per_head=False),
        Quantity("pos_magnitude", "norm of patch tokens", "|x_i|", inputs=("tokens",), per_head=False),
        Quantity("cls_output_magnitude", "norm of output, [cls]", "|y_0|", inputs=("output",), per_head=False),
        Quantity("pos_output_magnitude", "norm of output, patches", "|y_i|", inputs=("output",), per_head=False),
        Quantity(
            "token_similarity",
            "similarity of patch tokens",
            "mean cosine of x_i and x_j, i != j, both patches",
            inputs=("tokens",),
            per_head=False,
        ),
        Quantity(
            "high_frequency",
            "relative log amplitude of the highest frequency",
            "log |F(pi, pi)| - log |F(0, 0)| of the map of patch tokens, mean over channels",
            inputs=("tokens",),
            per_head=False,
        ),
        Quantity("sink_attention", "attention on the sink", "max_j of mean_i P_ij; the sink is that j", inputs=_QK),
        Quantity("sink_is_cls", "sink is [cls]", "1 where the sink is the first prefix token", inputs=_QK),
        Quantity("sink_is_prefix", "sink is a prefix token", "1 where the sink is [cls] or a register", inputs=_QK),
        Quantity(
            "sink_value_norm",
            "norm of the sink's value",
            "|v_j| of the sink / mean_i |v_i|",
            inputs=(*_QK, "v"),
        ),
    )
}


@dataclass(frozen=True)
class Preset:
    """How one source computes its numbers, as settings of this library.

    Attributes:
        name: of the preset.
        source: paper and code that it reproduces.
        quantities: what it records, names in ``QUANTITIES``.
        unit: of distances, "pixel" | "patch" | "unit"; None where it has no distances.
        exclude_prefix: prefix queries are left out of the mean over queries.
        eps: in denominators.
        notes: where the source's own constants show.
    """

    name: str
    source: str
    quantities: tuple[str, ...]
    unit: str | None = None
    exclude_prefix: bool = True
    eps: float = 0.0
    notes: str = ""

    @property
    def renormalize(self) -> bool:
        """Whether rows are divided by their mass on patches before distances are taken."""
        return "renormalized_distance" in self.quantities

    @property
    def row_stats(self) -> tuple[str, ...]:
        """Names to ask of ``attention(..., stats=...)``."""
        return required_stats(self)

    def positions(self, grid: int | Sequence[int], patch_size: int | Sequence[int] | None = None) -> Tensor:
        """``[N, d]`` patch coordinates in this preset's unit, to be given to ``attention``."""
        if self.unit is None:
            raise ValueError(f"the preset {self.name!r} has no distances, so it needs no positions")
        return patch_grid_positions(grid, self.unit, patch_size)


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "dosovitskiy",
            "An Image Is Worth 16x16 Words, arXiv:2010.11929, Fig. 11, from the ViT authors' snippet; also Keras "
            "'probing ViTs' and the line of 'Do Vision Transformers See Like CNNs', arXiv:2108.08810",
            ("distance",),
            unit="pixel",
            notes="Prefix rows and columns are dropped and rows are not renormalised: attention to [cls] shortens.",
        ),
        Preset(
            "park",
            "What Do Self-Supervised Vision Transformers Learn, arXiv:2305.00729, github.com/naver-ai/cl-vs-mim",
            ("renormalized_distance", "nmi"),
            unit="pixel",
            notes="The source adds 1e-32 to A before distances and 1e-8 before mutual information. The first shows "
            "only in rows with less than about 1e-28 of their mass on patches, which count as 0 here; the second "
            "moves NMI by about N * 1e-8 * log(1e8), 4e-5 at N = 196.",
        ),
        Preset(
            "walmer",
            "Teaching Matters, arXiv:2212.03862, github.com/mwalmer-umd/vit_analysis",
            ("renormalized_distance",),
            unit="unit",
            notes="Coordinates run from 0 at the first patch's centre to 1 at the last one's. The source takes square "
            "grids; on others each axis is scaled by itself.",
        ),
        Preset(
            "beyond_cls",
            "Beyond [cls], arXiv:2412.03215, and its code",
            BEYOND_CLS,
            eps=1e-6,
            notes="The source's eps in denominators is kept exactly. Its eps inside the logarithm of the entropies "
            "lowers them by at most N * eps (2e-4 nats at N = 196), which row statistics cannot know; "
            "HeadStatistics(exact_eps=True) computes the published expression from q and k. With registers, "
            "pos_cls_attention is the mass on all prefix tokens.",
        ),
    )
}


def find_preset(preset: str | Preset) -> Preset:
    if isinstance(preset, Preset):
        return preset
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    return PRESETS[preset]


def find_quantity(name: str) -> Quantity:
    if not isinstance(name, str) or name not in QUANTITIES:
        raise ValueError(f"unknown quantity {name!r}; known: {', '.join(QUANTITIES)}")
    return QUANTITIES[name]


def required_stats(wanted: str | Preset | Iterable[str | Preset]) -> tuple[str, ...]:
    """The row statistics that ``attention`` must capture.

    Args:
        wanted: a preset or quantity, by name or as an object, or several of them.

    Returns:
        names for ``attention(..., stats=...)``, each once.

    Raises:
        ValueError: an unknown name; lists the known ones.
    """
    wanted = (wanted,) if isinstance(wanted, str | Preset) or not isinstance(wanted, Iterable) else tuple(wanted)
    names: list[str] = []
    for item in wanted:
        if not isinstance(item, str | Preset):
            raise TypeError(f"a preset or quantity is a str or a Preset, got {type(item).__name__} {item!r:.60}")
        if isinstance(item, Preset) or item in PRESETS:
            names.extend(find_preset(item).quantities)
        elif item in QUANTITIES:
            names.append(item)
        else:
            raise ValueError(
                f"{item!r} is neither a preset ({', '.join(PRESETS)}) nor a quantity ({', '.join(QUANTITIES)})"
            )
    return tuple(dict.fromkeys(stat for name in names for stat in QUANTITIES[name].row_stats))


def patch_grid_positions(
    grid: int | Sequence[int],
    unit: str = "patch",
    patch_size: int | Sequence[int] | None = None,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Coordinates of patch centres, row-major, so that ``attention`` measures distances in the unit wanted.

    Args:
        grid: patches per axis, ``(rows, columns)`` or ``(frames, rows, columns)``; an int for a square grid.
        unit: "patch": steps of the grid; "pixel": times ``patch_size``; "unit": from 0 to 1 along each axis, the first
            patch's centre at 0 and the last one's at 1.
        patch_size: pixels per patch, one number or one per axis; needed for "pixel" only.
        device: of the result.

    Returns:
        ``[N, d]`` fp32, d the number of axes. For masked encoders, ``positions[ids_keep]`` gives ``[B, K, d]``.

    Raises:
        ValueError: an unknown unit, an empty grid, or "pixel" without ``patch_size``.
    """
    for name, value in (("grid", grid), ("patch_size", patch_size)):
        several = value if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
        if not all(isinstance(size, Real) for size in several) and not (name == "patch_size" and value is None):
            raise TypeError(f"{name} must be a number or one for each axis, got {type(value).__name__} {value!r:.60}")
    sizes = tuple(int(size) for size in grid) if isinstance(grid, Iterable) else (int(grid), int(grid))
    if not 1 <= len(sizes) <= 3 or min(sizes) < 1:
        raise ValueError(f"grid must have 1 to 3 axes of at least one patch, got {grid}")
    if unit not in UNITS:
        raise ValueError(f"unknown unit {unit!r}; known: {', '.join(UNITS)}")
    steps: tuple[float, ...]
    if unit == "pixel":
        if patch_size is None:
            raise ValueError("positions in pixels need patch_size, got None")
        steps = tuple(patch_size) if isinstance(patch_size, Iterable) else (patch_size,) * len(sizes)
        if len(steps) != len(sizes) or min(steps) <= 0:
            raise ValueError(f"patch_size {patch_size} does not fit the grid {sizes}: one positive size per axis")
    elif unit == "unit":
        steps = tuple(1.0 / max(1, size - 1) for size in sizes)
    else:
        steps = (1.0,) * len(sizes)
    offset = 0.5 if unit == "pixel" else 0.0
    axes = [
        (torch.arange(size, dtype=torch.float32, device=device) + offset) * step
        for size, step in zip(sizes, steps, strict=True)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
