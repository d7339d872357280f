"""What heads do: recorded or captured, as statistics over a data set with published settings, CKA, plots, losses."""

from mimkernels.heads.ablation import ablate, head_importance
from mimkernels.heads.capture import capture
from mimkernels.heads.cka import CKA, gram_matrices, unbiased_hsic
from mimkernels.heads.derived import (
    eps_patch_entropy,
    normalized_entropy,
    normalized_mutual_information,
    patch_head_divergence,
    patch_nmi,
    per_head_divergence,
    query_mean,
    region_entropy,
    renormalized_distance,
)
from mimkernels.heads.plots import plot_cka, plot_heads, plot_overview
from mimkernels.heads.presets import (
    BEYOND_CLS,
    PRESETS,
    QUANTITIES,
    Preset,
    Quantity,
    patch_grid_positions,
    required_stats,
)
from mimkernels.heads.record import LayerHeads, RecordedHeads, record_heads
from mimkernels.heads.regularizers import parse_regularizers, regularization_loss
from mimkernels.heads.statistics import HeadStatistics
from mimkernels.heads.tokens import relative_log_amplitude, token_similarity

__all__ = [
    "BEYOND_CLS",
    "CKA",
    "PRESETS",
    "QUANTITIES",
    "HeadStatistics",
    "LayerHeads",
    "Preset",
    "Quantity",
    "RecordedHeads",
    "ablate",
    "capture",
    "eps_patch_entropy",
    "gram_matrices",
    "head_importance",
    "normalized_entropy",
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
    "record_heads",
    "region_entropy",
    "regularization_loss",
    "relative_log_amplitude",
    "renormalized_distance",
    "required_stats",
    "token_similarity",
    "unbiased_hsic",
]
