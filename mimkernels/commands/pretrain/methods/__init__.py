"""What differs between the methods that ``mimkernels pretrain`` trains by; imports no torch, for the parser's sake."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from mimkernels.commands.pretrain.methods.dino import DINO
from mimkernels.commands.pretrain.methods.mae import MAE
from mimkernels.commands.pretrain.methods.mocov3 import MoCoV3
from mimkernels.commands.pretrain.methods.simmim import SimMIM
from mimkernels.commands.pretrain.methods.supervised import Supervised
from mimkernels.engine.settings import default_of
from mimkernels.engine.training.method import Method, Moment

if TYPE_CHECKING:
    from mimkernels.commands.pretrain.config import PretrainConfig

__all__ = ["METHODS", "Method", "Moment", "check_method"]

METHODS: dict[str, type[Method]] = {
    "mae": MAE,
    "simmim": SimMIM,
    "supervised": Supervised,
    "mocov3": MoCoV3,
    "dino": DINO,
}


def check_method(config: PretrainConfig) -> None:
    """Raise ValueError for settings that cannot work with the method, or that are others' alone."""
    method = METHODS[config.method]
    defaults = {f.name: default_of(f) for f in fields(config)}
    for name in dict.fromkeys(option for other in METHODS.values() for option in other.options):
        if name not in method.options and getattr(config, name) != defaults[name]:
            owners = " and ".join(other.title for other in METHODS.values() if name in other.options)
            raise ValueError(
                f"{name} is an option of {owners}, got {getattr(config, name)!r} and method {config.method!r}, whose "
                f"own are {', '.join(method.options)}"
            )
    method.check(config)
