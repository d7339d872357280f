"""Checkpoints by name: read without running code from the file, matched whole, or refused whole."""

import argparse
import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["CheckpointReport", "copy_by_name", "read_weights"]

_NAMES_SHOWN = 6


class CheckpointReport(NamedTuple):
    """What a checkpoint held for a model.

    Attributes:
        loaded: names that were copied into the model.
        missing: names the checkpoint does not hold; the model keeps its own values there.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]


def read_weights(source: str | os.PathLike | Mapping[str, Any]) -> dict[str, Tensor]:
    """Named tensors of a checkpoint: a file or dict, either ``{"model": {...}}`` or the names themselves.

    Raises:
        ValueError: the file is not a checkpoint of tensors (nothing in it is executed), or has none by name.
        FileNotFoundError: there is no such file.
    """
    where = "the checkpoint"
    if not isinstance(source, Mapping):
        where = os.fspath(source)
        with open(where, "rb") as file:
            try:
                # Published training checkpoints keep their command line in "args": a Namespace, plain values.
                with torch.serialization.safe_globals([argparse.Namespace]):
                    source = torch.load(file, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:
                # torch's own message advises to switch the protection off.
                raise ValueError(
                    f"{where} is no torch checkpoint, or holds more than tensors and plain values, which is not "
                    "unpickled because that could run code from the file"
                ) from error
            except (RuntimeError, OSError, EOFError, LookupError, AttributeError) as error:
                reason = str(error).partition("\n")[0]
                raise ValueError(f"{where} is damaged, or no torch checkpoint: {reason}") from error
    if not isinstance(source, Mapping):
        raise ValueError(f"{where} holds a {type(source).__name__}, not a dict of named tensors")
    weights = source["model"] if isinstance(source.get("model"), Mapping) else source
    odd = [f"{name}: {type(value).__name__}" for name, value in weights.items() if not isinstance(value, Tensor)]
    if odd or not weights:
        raise ValueError(
            f"{where} is not a dict of named tensors, nor has it one under 'model'; "
            + (f"it holds {_some(odd)}" if odd else "it is empty")
        )
    return dict(weights)


def copy_by_name(
    target: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    *,
    title: str,
    optional: Callable[[str], bool] = lambda name: False,
) -> CheckpointReport:
    """Copy `weights` into the tensors of `target` with the same names, all of them or none.

    Args:
        target: the model's tensors by name; written in place, in their own dtype and on their own device.
        weights: the checkpoint's tensors by name.
        title: what the model is, for the refusal.
        optional: whether a name may be missing in `weights`.

    Raises:
        ValueError: a name is missing or unexpected, or a shape or kind differs; lists both sides.
    """
    missing = [name for name in target if name not in weights]
    required = [name for name in missing if not optional(name)]
    unexpected = [f"{name} {_shape(tensor)}" for name, tensor in weights.items() if name not in target]
    differing = [
        f"{name}: checkpoint {_shape(weights[name])}, model {_shape(tensor)}"
        for name, tensor in target.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    unusable = [
        f"{name}: {tensor.dtype}, {tensor.layout}"
        for name, tensor in weights.items()
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta
    ]
    problems = [
        f"  {what} ({len(names)}): {_some(names)}"
        for what, names in (
            ("shapes differ", differing),
            ("in the model but not in the checkpoint", required),
            ("in the checkpoint but not in the model", unexpected),
            ("not floating-point values", unusable),
        )
        if names
    ]
    if problems:
        raise ValueError("\n".join((f"the checkpoint is not of this model ({title}); nothing was loaded", *problems)))
    with torch.no_grad():
        for name, tensor in target.items():
            if name in weights:
                tensor.copy_(weights[name])
    return CheckpointReport(tuple(name for name in target if name in weights), tuple(missing))


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - _NAMES_SHOWN
    return "; ".join(names[:_NAMES_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
