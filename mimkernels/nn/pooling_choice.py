"""A pooling with its options as one word, such as ``abmilp:depth=2``: for command lines and saved settings."""

from typing import Any, NamedTuple

from mimkernels._options import option_value
from mimkernels.nn.pooling import poolings

__all__ = ["PoolingChoice", "parse_pooling"]


class PoolingChoice(NamedTuple):
    """What ``build_pooling`` is called with."""

    label: str  # as given: its name in tables and files
    name: str
    options: dict[str, Any]


def parse_pooling(label: str) -> PoolingChoice:
    """``"abmilp:depth=2:content=all"`` to name and options; ValueError shows what is wrong with it."""
    name, *pairs = label.split(":")
    if name not in poolings():
        raise ValueError(f"unknown pooling {name!r}; known: {', '.join(poolings())}")
    options: dict[str, Any] = {}
    for pair in pairs:
        option, equals, value = pair.partition("=")
        if not option or not equals:
            raise ValueError(f"pooling {label!r}: expected NAME:OPTION=VALUE, got {pair!r}")
        options[option] = option_value(value)
    return PoolingChoice(label, name, options)
