"""The processes that train or measure one model together, by ``torch.distributed``."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

__all__ = ["distributed", "gather_objects"]

_Object = TypeVar("_Object")


def distributed() -> bool:
    """Whether there is a group of processes."""
    return dist.is_available() and dist.is_initialized()


def gather_objects(mine: _Object, group: dist.ProcessGroup | None = None) -> list[_Object]:
    """The objects of all processes in the order of ranks, pickled on the way; without a group `mine` alone.

    Every process of the group has to call this.
    """
    if not distributed():
        return [mine]
    objects: list[_Object] = [mine] * dist.get_world_size(group)
    dist.all_gather_object(objects, mine, group=group)
    return objects
