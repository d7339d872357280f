"""Modules become modules of another class, in place."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

Ours = TypeVar("Ours", bound=nn.Module)


def change_class(module: nn.Module, plain: type[nn.Module], ours: type[Ours]) -> list[Ours]:
    """Let `module` and its parts that are of class `plain`, not of its subclasses, be of class `ours`.

    Returns:
        all that are of class `ours` now, in the module's order.
    """
    layers = []
    for part in module.modules():
        if type(part) is plain:
            part.__class__ = ours
        if isinstance(part, ours):
            layers.append(part)
    return layers
