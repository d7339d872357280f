"""Random configurations of masked_feature_loss."""

from tests.configurations import Draw


def configuration(draw: Draw) -> dict:
    batch, tokens, dim = draw.few(), draw.tokens(), draw.columns()
    if draw.small and tokens * dim > 4000:
        tokens = 3
    kind = draw.of("all", "per image", "flat")
    shape, ids = (batch, tokens), None
    if kind == "per image":
        shape = (batch, draw.of(0, 1, tokens, draw.rng.randint(0, tokens)) if tokens else 0)
        ids = draw.ids(*shape, tokens=tokens)
    elif kind == "flat":
        shape = (draw.rng.randint(0, batch * tokens),)
        ids = draw.ids(*shape, tokens=batch * tokens)
    loss = draw.of("mse", "l1", "smooth_l1", "smooth_l1", "cosine")
    # The cosine of a vector of zeros has a slope of 1e8, and of equal numbers LayerNorm leaves roundings alone.
    flat = loss != "cosine"
    arguments = {
        "pred": draw.values(*shape, dim, flat=flat),
        "target": draw.values(batch, tokens, dim, flat=flat),
        "ids": ids,
        "norm": draw.of("ln", "ln", "none"),
        "eps": draw.of(1e-5, 1e-6),
        "kind": loss,
        "beta": draw.of(1.0, 2.0, 0.5, 1e-3),
        "reduction": draw.of("mean", "none"),
    }
    draws = 48 if arguments["reduction"] == "mean" else 12
    parameters = draw.wide_parameter(draw.of("pred", "target"))
    return draw.case(arguments, draw.some("pred"), parameters=parameters, draws=draws)
