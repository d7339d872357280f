"""What differs between the methods that ``mimkernels pretrain`` trains by; imports no torch, for the parser's sake."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from mimkernels.commands.pretrain.methods.base import Method
from mimkernels.commands.pretrain.methods.mae import MAE
from mimkernels.commands.pretrain.methods.simmim import SimMIM

if TYPE_CHECKING:
    from mimkernels.commands.pretrain.config import PretrainConfig

__all__ = ["METHODS", "Method", "check_method"]

METHODS: dict[str, type[Method]] = {"mae": MAE, "simmim": SimMIM}


def check_method(config: PretrainConfig) -> None:
    """Raise ValueError for settings that cannot work with the method, or that are another method's."""
    method = METHODS[config.method]
    defaults = {f.name: f.default for f in fields(config)}
    for other in METHODS.values():
        for name in other.options:
            if name not in method.options and getattr(config, name) != defaults[name]:
                raise ValueError(
                    f"{name} is an option of {other.title}, got {getattr(config, name)!r} and method "
                    f"{config.method!r}, whose own are {', '.join(method.options)}"
                )
    method.check(config)
