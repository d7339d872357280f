"""Contract cases of received_attention."""

from tests.ops.attention.cases import companion_cases

RICH = "plain"
SPOILED = "q"
PER_IMAGE = ("q", "k", "lse", "key_mask")
MATRIX_PRODUCTS = True
NO_OPCHECK = ("no-queries",)  # means over nothing
CASES = companion_cases("received_attention")
