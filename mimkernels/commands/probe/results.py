"""What one pooling achieved, as it is saved and read again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from mimkernels.engine.settings import is_of_type

_MOST = 2**53  # of images, parameters and seconds


@dataclass
class PoolingResult:
    """What one pooling achieved; accuracies are shares of the test images."""

    label: str
    description: str
    accuracy: float
    test_images: int  # that could be read
    knn: float | None
    logistic: float | None
    pooling_parameters: int
    classifier_parameters: int
    seconds: float  # of training pooling and classifier, without the encoder
    losses: list[float] = field(repr=False)

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> Self:
        """Read an entry of ``results.json``; ValueError, KeyError or TypeError where it is none."""
        for f in fields(cls):
            if not is_of_type(entry[f.name], f.type):
                raise ValueError(f"{f.name}: {entry[f.name]!r}")
        for name in ("test_images", "pooling_parameters", "classifier_parameters", "seconds"):
            if not 0 <= entry[name] < _MOST:
                raise ValueError(f"{name}: {entry[name]!r}")
        for name in ("accuracy", "knn", "logistic"):
            if entry[name] is not None and not 0 <= entry[name] <= 1:
                raise ValueError(f"{name}: {entry[name]!r}")
        return cls(**entry)


def count_tested(results: Sequence[PoolingResult]) -> int:
    """Test images that could be read."""
    return max((result.test_images for result in results), default=0)
