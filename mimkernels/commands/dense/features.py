"""Feature maps of frozen encoders: of every wanted layer in one pass, kept in a file."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from mimkernels.engine import files
from mimkernels.engine.encoder import FrozenEncoder

_LUMA = (0.299, 0.587, 0.114)


def fitted_images(images: Tensor, size: int, channels: int) -> Tensor:
    """Images ``[n, 3, S, S]`` uint8 as an encoder takes them: of its size, grey if it has one channel."""
    pixels = images.float()
    if channels == 1:
        pixels = (pixels * torch.tensor(_LUMA, device=images.device).view(3, 1, 1)).sum(1, keepdim=True)
    if images.shape[-1] != size:
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    return pixels.round().clamp(0, 255).to(torch.uint8)


def layer_maps(
    encoder: FrozenEncoder,
    images: Tensor,
    layers: Sequence[int],
    accelerator: Accelerator,
    batch_size: int,
    note: Callable[[str], None],
) -> dict[int, Tensor]:
    """``[n, D, h, w]`` bf16 on the CPU of each layer, numbered from 1 on; one pass."""
    maps: dict[int, Tensor] = {}
    noted = time.perf_counter()
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size].to(accelerator.device)
        with accelerator.autocast():
            found = encoder.maps(fitted_images(part, encoder.img_size, encoder.in_chans), layers)
        for layer, values in found.items():
            if layer not in maps:
                maps[layer] = torch.empty(len(images), *values.shape[1:], dtype=torch.bfloat16)
            maps[layer][start : start + len(part)] = values
        if time.perf_counter() - noted > 10:
            noted = time.perf_counter()
            note(f"{start + len(part):,}/{len(images):,} images encoded")
    return maps


def kept_maps(
    path: Path, key: Sequence[object], make: Callable[[], dict[int, Tensor]], *, anew: bool = False
) -> tuple[dict[int, Tensor], bool]:
    """Maps from the file of this key below `path`, as a memory map, and True; or new ones, saved, and False."""
    name = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
    file = path / f"{name}.pt"
    kept = None if anew else _read(file)
    if kept is not None:
        return kept, True
    files.save(file, {"maps": make()})
    made = _read(file)
    if made is None:
        raise OSError(f"{str(file)!r} cannot be read again")
    return made, False


def _read(file: Path) -> dict[int, Tensor] | None:
    try:
        maps: dict[int, Tensor] = torch.load(file, mmap=True, weights_only=True)["maps"]
    except (OSError, RuntimeError, KeyError, ValueError, EOFError):  # absent or damaged: made anew
        return None
    return maps


def joined(maps: Sequence[Tensor]) -> Tensor:
    """Maps ``[n, D, h, w]`` of several layers as one, fp32, those of other sizes resized to the first's."""
    size = maps[0].shape[-2:]
    resized = [
        each.float() if each.shape[-2:] == size else F.interpolate(each.float(), size, mode="bilinear") for each in maps
    ]
    return torch.cat(resized, 1)


def joined_batches(maps: Sequence[Tensor], count: int, device: torch.device) -> Iterator[Tensor]:
    """Maps of several layers ``joined`` on the device, those of `count` images after others."""
    for start in range(0, len(maps[0]), count):
        yield joined([each[start : start + count].to(device) for each in maps])
