"""What masked pixels are compared with: themselves, or normalised by their patch or their neighbourhood."""

import re
from typing import NamedTuple

__all__ = ["Target", "parse_target"]

_LOCAL = re.compile(r"local-norm:(\d+)")


class Target(NamedTuple):
    """A target as the loss takes it.

    Attributes:
        norm_pix: normalise by each patch's own mean and deviation.
        local_norm: normalise by the mean and deviation in a box of this side around each pixel; None for neither.
    """

    norm_pix: bool = False
    local_norm: int | None = None


def parse_target(text: str) -> Target:
    """``"pixels"``, ``"patch-norm"`` or ``"local-norm:K"``, K odd and at least 3.

    Raises:
        ValueError: anything else.
    """
    if text == "pixels":
        return Target()
    if text == "patch-norm":
        return Target(norm_pix=True)
    match = _LOCAL.fullmatch(text) if isinstance(text, str) else None
    if match is not None and int(match[1]) % 2 and int(match[1]) >= 3:
        return Target(local_norm=int(match[1]))
    raise ValueError(
        f"target must be pixels, patch-norm, or local-norm:K with an odd number of pixels K of at least 3 "
        f"(published: local-norm:47), got {text!r}"
    )
