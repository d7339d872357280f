"""The colours of everything that is drawn: pages, charts and the plots of heads."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

INK = "#1c2430"  # text, and lines that carry the message
MUTED = "#5d6877"  # notes and axes
LINE = "#d9dee5"  # borders and grids
PAPER, PAGE = "#ffffff", "#f5f7f9"  # a section, and what lies around it
# One colour per model or epoch; told apart in print and by colour-blind readers (after Okabe and Ito).
SERIES = ("#0b66c3", "#d1570c", "#1b8a6b", "#a3478a", "#8a6d00", "#4c5c6e")
ACCENT = SERIES[0]

# matplotlib's settings for every chart.
CHART: "dict[RcKeyType, Any]" = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 11, "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED, "axes.titlecolor": INK, "axes.titlesize": 12, "axes.spines.top": False,
    "axes.spines.right": False, "xtick.color": MUTED, "ytick.color": MUTED, "svg.fonttype": "path",
    "svg.hashsalt": "mimkernels",
    "text.parse_math": False,  # names of models are text, with dollar signs or without
}  # fmt: skip
