"""Random configurations of query_pool."""

from tests.configurations import Draw, tokens_to_pool, without_infinity_where_weights_vanish


def configuration(draw: Draw) -> dict:
    (batch, tokens, dim), options = tokens_to_pool(draw)
    groups = draw.of(0, 1, 1, 2, 3, 4, 8, 12, 33)
    width = draw.of(None, None, draw.columns())
    columns = dim if width is None else width
    sliced = groups > 0 and columns % groups == 0 and draw.chance(0.4)
    arguments = {
        "x": draw.values(batch, tokens, dim),
        "queries": draw.values(*draw.of((), (batch,)), groups, dim),
        "values": None if width is None else draw.values(batch, tokens, width),
        "scale": draw.of(None, None, 1.0, 0.1, 0.0) if dim else 1.0,
        "sliced": sliced,
        "return_weights": draw.chance(0.5),
    }
    after = without_infinity_where_weights_vanish("query_pool", "values")
    return draw.case({**arguments, **options}, draw.some("queries", "x", "values"), after=after)
