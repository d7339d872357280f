"""Random configurations of attention_qkvpacked."""

from tests.configurations import Draw
from tests.ops.attention.configurations import COMPARED, nan_of, of_scores, scores, statistics, wide_biases


def configuration(draw: Draw) -> dict:
    (batch, heads, tokens, _, dim), options = scores(draw, cross=False)
    options |= statistics(draw, batch, tokens, tokens)
    parameters = ("positions", *wide_biases(draw))
    arguments = {
        "qkv": draw.values(batch, tokens, 3, heads, dim, most=5.0, flat=False, wild=nan_of(options)),
        **options,
    }
    names = ("qkv", "bias", "bias_table", "logit_scale") if tokens != 1 else ()
    grads = draw.some(*names)
    arguments["stats"] += of_scores(draw)
    return draw.case(arguments, grads, parameters=parameters, compared=COMPARED, varied={"qkv": 1})
