"""The readouts: linear layers on feature maps, and votes of the nearest patches."""

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimkernels import upsample_cross_entropy
from mimkernels.commands.dense.config import DenseConfig
from mimkernels.commands.dense.features import joined, joined_batches
from mimkernels.commands.dense.heat_maps import LinearKeypoints
from mimkernels.commands.dense.metrics import valid_depths
from mimkernels.commands.dense.windows import Windows, merged
from mimkernels.data.pixel_targets import IGNORED
from mimkernels.engine.command import TrainingError
from mimkernels.engine.schedule import learning_rate

_WARMUP = 1500 / 40000  # share of the steps, as published
_EARLY_STEPS = 100  # of the depth's loss, at most a tenth of all
_MOST_PATCHES = 50_000  # that a test patch is compared with
_TEMPERATURE = 0.07
_AT_ONCE = 16  # images that are predicted together
_PIXELS_AT_ONCE = 2**20  # of which there are fewer where these are large


class Reader:
    """What reads maps: values of every pixel, which may be averaged, and what they mean."""

    def values(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """``[B, C, H, W]`` from maps ``[B, D, h, w]``."""
        raise NotImplementedError

    def decide(self, values: Tensor) -> Tensor:
        """Predictions ``[B, H, W]``: numbers of the largest values, uint8."""
        return values.argmax(1).to(torch.uint8)

    def predict(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """The same of maps at once."""
        return self.decide(self.values(maps, size))


class LinearSegmentation(Reader, nn.Module):
    """Channels dropped, normalised over the batch, and one linear layer: logits of classes at the maps' size."""

    def __init__(self, dim: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout, self.norm = nn.Dropout2d(dropout), nn.BatchNorm2d(dim)
        self.linear = nn.Conv2d(dim, classes, 1)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)  # type: ignore[arg-type]

    def forward(self, maps: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.norm(self.dropout(maps)))
        return logits

    def loss(self, maps: Tensor, labels: Tensor, early: bool) -> Tensor:
        logits = self(maps)
        if not (labels != IGNORED).any():  # a mean of nothing is not finite
            return 0 * logits.sum()
        return upsample_cross_entropy(logits, labels, ignore_index=IGNORED)

    def values(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits ``[B, classes, H, W]``."""
        return F.interpolate(self(maps), size, mode="bilinear")


class LinearDepth(Reader, nn.Module):
    """One linear layer to weights of fixed depths, whose mean is the depth, at the maps' size."""

    centres: Tensor

    def __init__(self, dim: int, low: float, high: float, bins: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm2d(dim), nn.Conv2d(dim, bins, 1)
        self.register_buffer("centres", torch.linspace(low, high, bins))
        self.low, self.high = low, high

    def forward(self, maps: Tensor) -> Tensor:
        weights = self.linear(self.norm(maps)).relu() + 0.1
        return torch.einsum("bkhw,k->bhw", weights, self.centres) / weights.sum(1)

    def values(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Depths ``[B, 1, H, W]``."""
        return F.interpolate(self(maps)[:, None], size, mode="bilinear")

    def decide(self, values: Tensor) -> Tensor:
        """Depths ``[B, H, W]``."""
        return values[:, 0]

    def loss(self, maps: Tensor, depths: Tensor, early: bool) -> Tensor:
        """The root of ``variance + 0.15 mean^2`` of the difference of logarithms (SigLoss); `early` of the mean alone,
        so that the scale is found first."""
        valid = valid_depths(depths, self.low, self.high)
        predicted = self.predict(maps, (depths.shape[1], depths.shape[2]))
        if not valid.any():  # a mean of nothing is not finite
            return 0 * predicted.sum()
        error = (predicted[valid] + 1e-3).log() - (depths[valid] + 1e-3).log()
        variance = 0.0 if early else error.var(correction=0)
        return (variance + 0.15 * error.mean().square() + 1e-12).sqrt()


def train(
    head: LinearSegmentation | LinearDepth | LinearKeypoints,
    maps: list[Tensor],
    targets: Tensor,
    config: DenseConfig,
    weight_decay: float,
    device: torch.device,
    what: str,
) -> list[float]:
    """Train on all images in an order of the seed's; the loss of every step.

    Args:
        maps: of the layers that are read together, ``[n, D, h, w]`` on the CPU.
        targets: labels or depths ``[n, H, W]``, or joints ``[n, K, 3]``.
        what: for the error of a loss that is not finite.
    """
    head.to(device).train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=config.lr, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(config.seed)
    batch = min(config.batch_size, len(targets))
    order = torch.empty(0, dtype=torch.int64)
    losses = []
    for step in range(config.steps):
        if len(order) < batch:
            order = torch.randperm(len(targets), generator=generator)
        chosen, order = order[:batch], order[batch:]
        optimizer.param_groups[0]["lr"] = learning_rate(
            step + 1, config.steps + 1, max(1, round(_WARMUP * config.steps)), config.lr
        )
        features = joined([each[chosen].to(device) for each in maps])
        early = step < min(_EARLY_STEPS, config.steps // 10)
        loss = head.loss(features, targets[chosen].to(device), early)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 35.0)
        optimizer.step()
        losses.append(loss.detach())
    values = [float(loss) for loss in losses]
    wrong = next((step for step, value in enumerate(values) if not abs(value) < float("inf")), None)
    if wrong is not None:
        raise TrainingError(f"the loss of {what} became {values[wrong]} at step {wrong}; try a lower --lr")
    return values


@torch.no_grad()
def predict(
    predict_batch: Callable[[Tensor, tuple[int, int]], Tensor],
    maps: list[Tensor],
    size: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """Predictions of all images, on the CPU."""
    return torch.cat([predict_batch(part, size).cpu() for part in _batches(maps, size, device)])


@torch.no_grad()
def predict_squares(
    reader: Reader, maps: list[Tensor], size: tuple[int, int], device: torch.device, mirrored: list[Tensor]
) -> Tensor:
    """Predictions ``[n, H, W]`` of all images, on the CPU.

    Args:
        mirrored: maps of the mirror images, whose values are averaged with those of the images; none: of the images.
    """
    return torch.cat([reader.decide(values).cpu() for values in _values(reader, maps, size, device, mirrored)])


@torch.no_grad()
def predict_whole(
    reader: Reader,
    maps: list[Tensor],
    windows: Windows,
    sizes: list[tuple[int, int]],
    device: torch.device,
    mirrored: list[Tensor],
) -> Iterator[Tensor]:
    """Predictions ``[H, W]`` of whole images, on the CPU: values of their windows averaged, then resized.

    Args:
        maps: of all windows.
        sizes: of the predictions.
        mirrored: maps of all windows mirrored, as of ``predict_squares``.
    """
    side = (windows.images.shape[-2], windows.images.shape[-1])
    for number, span in windows.spans():
        own, other = ([each[span] for each in of_windows] for of_windows in (maps, mirrored))
        values = merged(_values(reader, own, side, device, other), windows.sizes[number], windows.corners[number])
        yield reader.decide(F.interpolate(values[None], sizes[number], mode="bilinear"))[0].cpu()


def _values(
    reader: Reader, maps: list[Tensor], size: tuple[int, int], device: torch.device, mirrored: list[Tensor]
) -> Iterator[Tensor]:
    """Values ``[B, C, H, W]`` of some images after others, averaged with those of their mirror images if there are."""
    others = _batches(mirrored, size, device) if mirrored else itertools.repeat(None)
    for part, other in zip(_batches(maps, size, device), others, strict=False):
        values = reader.values(part, size)
        yield values if other is None else (values + reader.values(other, size).flip(-1)) / 2


def _batches(maps: list[Tensor], size: tuple[int, int], device: torch.device) -> Iterator[Tensor]:
    count = max(1, min(_AT_ONCE, _PIXELS_AT_ONCE // (size[0] * size[1])))
    return joined_batches(maps, count, device)


class NearestPatches(Reader):
    """Segmentation without training: each patch asks the most similar patches of the training images.

    A training patch votes with the shares of the classes in it, weighted by exp(cosine / 0.07) as in DINO
    (arXiv:2104.14294); the votes are resized like logits.
    """

    def __init__(
        self, maps: list[Tensor], labels: Tensor, classes: int, neighbours: int, seed: int, device: torch.device
    ) -> None:
        grid = (maps[0].shape[-2], maps[0].shape[-1])
        total = len(labels) * grid[0] * grid[1]
        chosen = torch.ones(total, dtype=torch.bool)
        if total > _MOST_PATCHES:
            ids = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:_MOST_PATCHES]
            chosen = torch.zeros(total, dtype=torch.bool).index_fill(0, ids, True)
        patches, shares = [], []
        for start in range(0, len(labels), _AT_ONCE):  # those of all images may not fit in memory
            part = slice(start, start + _AT_ONCE)
            kept = chosen.view(-1, *grid)[part].flatten()
            each = [F.adaptive_avg_pool2d((labels[part] == number).float(), grid) for number in range(classes)]
            shares.append(torch.stack(each, -1).flatten(0, 2)[kept])
            patches.append(joined([layer[part] for layer in maps]).movedim(1, -1).flatten(0, 2)[kept])
        self.patches, self.shares = F.normalize(torch.cat(patches), dim=1).to(device), torch.cat(shares).to(device)
        self.neighbours = min(neighbours, len(self.patches))

    def values(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Votes ``[B, classes, H, W]``."""
        asked = F.normalize(maps.movedim(1, -1).flatten(0, 2), dim=1)
        votes = []
        for part in asked.split(1024):
            closeness, ids = (part @ self.patches.T).topk(self.neighbours, dim=1)
            weights = (closeness / _TEMPERATURE).softmax(1)
            votes.append(torch.einsum("pk,pkc->pc", weights, self.shares[ids]))
        grid = torch.cat(votes).view(len(maps), *maps.shape[-2:], -1).movedim(-1, 1)
        return F.interpolate(grid, size, mode="bilinear")
