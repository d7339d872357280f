"""Random configurations of weighted_pool."""

from tests.configurations import Draw, tokens_to_pool, without_infinity_where_weights_vanish


def configuration(draw: Draw) -> dict:
    (batch, tokens, dim), options = tokens_to_pool(draw)
    groups = draw.of((), (0,), (1,), (2,), (6,), (33,))
    arguments = {
        "x": draw.values(batch, tokens, dim),
        "scores": draw.values(batch, *groups, tokens),
        "normalize": draw.chance(0.7),
        "return_weights": draw.chance(0.5),
    }
    grads, parameters = draw.some("x", "scores"), draw.wide_parameter("scores")
    after = without_infinity_where_weights_vanish("weighted_pool", "x") if arguments["normalize"] else None
    return draw.case({**arguments, **options}, grads, parameters=parameters, after=after)
