"""Random configurations of attention_qkvpacked."""

from tests.configurations import Draw
from tests.ops.attention.configurations import nan_of, scores, statistics, wide_biases


def configuration(draw: Draw) -> dict:
    (batch, heads, tokens, _, dim), options = scores(draw, cross=False)
    options |= statistics(draw, batch, tokens, tokens)
    parameters = ("positions", *wide_biases(draw))
    arguments = {
        "qkv": draw.values(batch, tokens, 3, heads, dim, most=5.0, flat=False, wild=nan_of(options)),
        **options,
    }
    names = ("qkv", "bias", "bias_table", "logit_scale") if tokens != 1 else ()
    return draw.case(arguments, draw.some(*names), parameters=parameters)
