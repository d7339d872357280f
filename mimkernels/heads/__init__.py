"""What heads do: statistics over a data set with published settings, CKA, plots, and regularisers."""

from mimkernels.stats.cka import CKA, unbiased_hsic
from mimkernels.stats.derived import (
    eps_patch_entropy,
    normalized_mutual_information,
    patch_head_divergence,
    patch_nmi,
    per_head_divergence,
    query_mean,
    renormalized_distance,
)
from mimkernels.stats.plots import plot_cka, plot_heads, plot_overview
from mimkernels.stats.presets import (
    BEYOND_CLS,
    PRESETS,
    QUANTITIES,
    Preset,
    Quantity,
    patch_grid_positions,
    required_stats,
)
from mimkernels.stats.recorder import HeadStatistics
from mimkernels.stats.regularize import parse_regularizers, regularization_loss

__all__ = [
    "BEYOND_CLS",
    "CKA",
    "PRESETS",
    "QUANTITIES",
    "HeadStatistics",
    "Preset",
    "Quantity",
    "eps_patch_entropy",
    "normalized_mutual_information",
    "parse_regularizers",
    "patch_grid_positions",
    "patch_head_divergence",
    "patch_nmi",
    "per_head_divergence",
    "plot_cka",
    "plot_heads",
    "plot_overview",
    "query_mean",
    "regularization_loss",
    "renormalized_distance",
    "required_stats",
    "unbiased_hsic",
]
