"""Random configurations of gather_tokens."""

from tests.configurations import Draw


def configuration(draw: Draw) -> dict:
    batch, tokens, dim = draw.few(), draw.tokens(), draw.columns()
    keep = draw.of(0, 1, tokens, min(tokens, draw.tokens()), tokens // 4) if tokens else 0
    masks = draw.of((), (), (), (1,), (3,), (0,))
    leading = draw.of((), (1,))
    arguments = {
        "x": draw.values(batch, tokens, dim),
        "ids": draw.ids(*masks, batch, keep, tokens=tokens),
        "pos": draw.values(*leading, tokens, dim) if draw.chance(0.5) else None,
        "prefix": draw.values(*leading, draw.of(0, 1, 1, 2, 5), dim) if draw.chance(0.5) else None,
    }
    return draw.case(arguments, draw.some("x", "pos", "prefix"))
