"""Checkpoints by name: read without running code from the file, matched whole, or refused whole."""

import argparse
import errno
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

__all__ = ["CheckpointReport", "DamagedFileError", "check_by_name", "copy_by_name", "read_file", "read_weights",
           "weights_of"]  # fmt: skip

_NAMES_SHOWN = 6

# What published training checkpoints keep their settings in: "args" of MAE is a Namespace, "config" of SimMIM and Swin
# a dict of yacs, for which a dict stands here: yacs is not imported.
_PLAIN: list[Any] = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]

# What DistributedDataParallel and torch.compile put before every name of the module that they wrap.
_WRAPPERS = ("module.", "_orig_mod.")


class DamagedFileError(ValueError):
    """A file is not what was once written: cut short, or with changed bits."""


_SHOWN = 8  # names of a report that are printed


class CheckpointReport(NamedTuple):
    """What a checkpoint held for a model; counts and the first names where it is printed.

    Attributes:
        loaded: names that were copied into the model.
        missing: names the checkpoint does not hold; the model keeps its own values there.
        left: names in the checkpoint that no weight of the model has, such as those of a head.
        resized: what was of another window, each with the windows of both sides.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    left: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} weights loaded"]
        for what, names in (("missing", self.missing), ("left", self.left), ("resized", self.resized)):
            more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            lines.append(f"{len(names)} {what}" + (": " + ", ".join(names[:_SHOWN]) + more if names else ""))
        return "\n".join(lines)


def read_file(path: str | os.PathLike) -> Any:
    """What ``torch.save`` wrote to `path`, on the CPU. No code in the file is run.

    ``torch.load`` reads changed bits without a word. Here every record is compared with the checksum (CRC-32) that
    ``torch.save`` keeps of it.

    Raises:
        DamagedFileError: the file is cut short, a checksum is wrong, or it cannot be decoded.
        ValueError: the file is of another kind (says which), or holds more than tensors and plain values.
        OSError: there is no such file, or it cannot be opened.
    """
    where = os.fspath(path)
    with open(where, "rb") as file:
        _check_kind(file, where)
        _check_sums(file, where)
        file.seek(0)
        try:
            with torch.serialization.safe_globals(_PLAIN):
                return torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # zip, pickle and torch each have their own
            if "allocate memory" in str(error):
                raise MemoryError(f"{where!r} does not fit into memory") from error
            code = _code_named_by(error)
            if code is not None:
                # Without its cause: torch's message advises to switch the protection off.
                raise ValueError(
                    f"{where!r} cannot be read: it holds more than tensors and plain values{code}, which is not "
                    "unpickled because that could run code from the file"
                ) from None
            reason = "" if isinstance(error, pickle.UnpicklingError) else f" ({str(error).partition(chr(10))[0]})"
            raise DamagedFileError(
                f"{where!r} cannot be read: it is damaged, or was not written by torch.save{reason}"
            ) from None


def read_weights(source: str | os.PathLike | Mapping[str, Any]) -> dict[str, Tensor]:
    """Named tensors of a checkpoint: a file or dict, either ``{"model": {...}}`` or the names themselves.

    The prefix of a wrapper (``module.``, ``_orig_mod.``) that all names have is left out.

    Raises:
        ValueError: the file is not a checkpoint of tensors (nothing in it is executed), or has none by name.
        FileNotFoundError: there is no such file.
    """
    if isinstance(source, Mapping):
        return weights_of(source, "the checkpoint")
    return weights_of(read_file(source), repr(os.fspath(source)))


def weights_of(source: Any, where: str) -> dict[str, Tensor]:
    """``read_weights`` of what ``read_file`` gave."""
    if not isinstance(source, Mapping):
        raise ValueError(f"{where} holds a {type(source).__name__}, not a dict of named tensors")
    weights = source["model"] if isinstance(source.get("model"), Mapping) else source
    odd = [f"{name}: {type(value).__name__}" for name, value in weights.items() if not isinstance(value, Tensor)]
    if odd or not weights:
        inside = [repr(name) for name, value in weights.items() if _is_weights(value)]
        raise ValueError(
            f"{where} is not a dict of named tensors, nor has it one under 'model'; "
            + (f"it holds {_some(odd)}" if odd else "it is empty")
            + (f"; named tensors are under {', '.join(inside)}: save those alone" if inside else "")
        )
    return _unwrapped({str(name): tensor for name, tensor in weights.items()})


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
    missing = check_by_name(target, weights, title=title, optional=optional)
    with torch.no_grad():
        for name, tensor in target.items():
            if name in weights:
                tensor.copy_(weights[name])
    return CheckpointReport(tuple(name for name in target if name in weights), tuple(missing))


def check_by_name(
    target: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    *,
    title: str,
    optional: Callable[[str], bool] = lambda name: False,
) -> list[str]:
    """The optional names that `weights` lacks; everything else must be there as in `target`.

    Raises:
        ValueError: as ``copy_by_name``, whose arguments these are.
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
        if (name in target and tensor.is_floating_point() != target[name].is_floating_point())
        or tensor.layout != torch.strided
        or tensor.is_meta
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
    return missing


def _check_kind(file: BinaryIO, where: str) -> None:
    """Refuse an empty file, and name the kinds of file that are often taken for a checkpoint."""
    head = file.read(512)
    if not head:
        raise DamagedFileError(f"{where!r} cannot be read: it is empty")
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    kind = None
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        kind = "an HTML or XML page, as a download that was refused leaves behind; download it again"
    elif head.startswith(b"version https://git-lfs"):
        kind = "a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`"
    elif head[8:9] == b"{" and int.from_bytes(head[:8], "little") < os.fstat(file.fileno()).st_size:
        kind = "a safetensors file; write its tensors with torch.save(safetensors.torch.load_file(PATH), 'model.pth')"
    elif head.startswith(b"\x89HDF"):
        kind = "an HDF5 file"
    elif head.startswith(b"\x1f\x8b"):
        kind = "a gzip archive; unpack it first"
    elif text.startswith((b"{", b"[")):
        kind = "a JSON file"
    if kind is not None:
        raise ValueError(f"{where!r} cannot be read: it is no checkpoint of torch.save, but {kind}")


def _check_sums(file: BinaryIO, where: str) -> None:
    """Compare every record with its checksum; the format of torch before 1.6 is no zip archive, has none and passes."""
    file.seek(0)
    if file.read(2) != b"PK":
        return
    file.seek(0)
    try:
        with zipfile.ZipFile(file) as archive:
            kinds = {name.rpartition("/")[2] for name in archive.namelist()}
            # torch takes a record that is marked as a folder (0x10) for read, and returns whatever memory holds.
            folders = (record.filename for record in archive.infolist() if record.is_dir() or record.external_attr & 16)
            wrong = next(folders, None) or archive.testzip()
    except zipfile.BadZipFile:
        raise DamagedFileError(f"{where!r} cannot be read: it is damaged, its end is missing or changed") from None
    except Exception as error:  # a changed header can be anything: an encrypted record, an unknown method, ...
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise DamagedFileError(f"{where!r} cannot be read: it is damaged, its table of contents is wrong") from None
    if wrong is not None:
        raise DamagedFileError(f"{where!r} cannot be read: it is damaged, the checksum of its part {wrong!r} is wrong")
    if "constants.pkl" in kinds:
        raise ValueError(f"{where!r} cannot be read: it is a TorchScript archive, which is code; save its state_dict()")
    if "data.pkl" not in kinds:
        raise ValueError(f"{where!r} cannot be read: it is a zip archive that torch.save did not write")


def _code_named_by(error: Exception) -> str | None:
    """What torch refused to unpickle, for people; None if `error` is about something else."""
    if not isinstance(error, pickle.UnpicklingError):
        return None
    text = str(error).rpartition("WeightsUnpickler error:")[2]  # before it torch's advice
    name = re.search(r"GLOBAL ([\w.]+)", text)
    if name is not None:
        return f" ({name[1]})"
    return "" if re.search(r"unrecognized function|Can not|Can only", text) else None


def _is_weights(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(item, Tensor) for item in value.values())


def _unwrapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in weights):
            return _unwrapped({name.removeprefix(prefix): tensor for name, tensor in weights.items()})
    return weights


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = len(names) - _NAMES_SHOWN
    return "; ".join(names[:_NAMES_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
