"""Probes on frozen features, all trained in one pass over the data: pooling, batch norm, linear layer."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimkernels.commands.probe.config import ProbeConfig
from mimkernels.commands.probe.features import Encoded
from mimkernels.data.batches import BatchPlan
from mimkernels.engine.command import TrainingError
from mimkernels.engine.progress import Progress
from mimkernels.engine.schedule import learning_rate
from mimkernels.engine.settings import is_of_type
from mimkernels.engine.stop import StopSignal
from mimkernels.nn import Pooling

_STEPS_BETWEEN_LOGS = 10
_SECONDS_BETWEEN_SAVES = 30


class Probe(nn.Module):
    """A pooling, BatchNorm without gain and bias (eps 1e-6), and a linear layer: the recipe of MAE and Beyond-[cls]."""

    def __init__(self, pooling: Pooling, classes: int) -> None:
        super().__init__()
        self.pooling = pooling
        self.norm = nn.BatchNorm1d(pooling.out_dim, affine=False, eps=1e-6)
        self.linear = nn.Linear(pooling.out_dim, classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, label: str, batch: Encoded) -> Tensor:
        """Logits ``[B, classes]``; vectors that were pooled before are taken as they are."""
        pooled = batch.pooled.get(label)
        if pooled is None:
            pooled = self.pooling(batch.tokens, cls_attention=batch.cls_attention)
        return self.linear(self.norm(pooled))


class Stopwatch:
    """Seconds of device work inside its ``with`` blocks; on CUDA by events, so that nothing waits."""

    def __init__(self, device: torch.device, seconds: float = 0.0) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = seconds
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        if not self._cuda:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._events.append((first, last))
        if len(self._events) > 1000:
            self.seconds  # noqa: B018  folds the events

    @property
    def seconds(self) -> float:
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(first.elapsed_time(last) for first, last in self._events) / 1000
            self._events.clear()
        return self._seconds


@dataclass
class Trained:
    """A probe in training."""

    label: str
    probe: Probe
    optimizer: torch.optim.Optimizer
    watch: Stopwatch
    losses: list[float] = field(default_factory=list)  # mean training loss of every epoch
    epoch_loss: Tensor | None = None  # of the steps of this epoch

    def state_dict(self) -> dict[str, Any]:
        return {
            "probe": self.probe.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "seconds": self.watch.seconds,
            "losses": self.losses,
            "epoch_loss": self.epoch_loss,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take over what ``state_dict`` gave; ValueError, KeyError or TypeError where it was not of such a probe."""
        self.probe.load_state_dict(state["probe"])
        self.optimizer.load_state_dict(state["optimizer"])
        for weight, held in self.optimizer.state.items():
            if any(
                isinstance(value, Tensor) and value.dim() and value.shape != weight.shape for value in held.values()
            ):
                raise ValueError("the optimizer's state has other shapes than the weights")
        if not is_of_type(state["seconds"], float) or not is_of_type(state["losses"], list[float]):
            raise TypeError("seconds and losses must be numbers")
        self.watch = Stopwatch(device, state["seconds"])
        self.losses = state["losses"]
        self.epoch_loss = None if state["epoch_loss"] is None else state["epoch_loss"].to(device)


def build_optimizer(config: ProbeConfig, module: nn.Module, steps: int) -> torch.optim.Optimizer:
    """LARS as in MAE's probing code: vectors and scalars are neither decayed nor adapted. Or AdamW, or SGD.

    Args:
        steps: of the whole training.
    """
    lr = config.peak_lr
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(weights, lr=lr, weight_decay=config.weight_decay)
    matrices = [weight for weight in weights if weight.ndim > 1]
    vectors = [weight for weight in weights if weight.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay, "always_adapt": True},
        {"params": vectors, "weight_decay": 0.0, "always_adapt": False},
    ]
    if config.optimizer == "lars":
        from timm.optim import Lars

        return Lars(groups, lr=lr, momentum=config.momentum, trust_coeff=config.trust_coefficient(steps))
    return torch.optim.SGD(groups, lr=lr, momentum=config.momentum)


class ProbeTrainer:
    """Trains several probes on the same batches, from any step on.

    Args:
        batches: from the first step on; step t gets the same images whatever came before.
        save: called with the state now and then, and when training is stopped.
    """

    def __init__(
        self,
        config: ProbeConfig,
        probes: list[Trained],
        plan: BatchPlan,
        batches: Callable[[int], Iterator[Encoded]],
        *,
        step: int,
        progress: Progress,
        save: Callable[[dict[str, Any]], None],
    ) -> None:
        self.config, self.probes, self.plan, self.batches = config, probes, plan, batches
        self.step, self.progress, self.save = step, progress, save
        self.total_steps = config.epochs * plan.steps_per_epoch
        warmup = config.epochs / 9 if config.warmup_epochs is None else config.warmup_epochs
        self.warmup_steps = round(warmup * plan.steps_per_epoch)
        self.stopped_by = 0

    def train(self) -> None:
        """Run to the end; a stop request saves the state and sets ``stopped_by`` to the signal's number."""
        for trained in self.probes:
            trained.probe.train()
        saved = logged = time.perf_counter()
        logged_step = self.step
        self.progress.start(self.step)
        try:
            with StopSignal() as stop:
                stream = self.batches(self.step)
                while self.step < self.total_steps:
                    batch = next(stream)
                    lr = learning_rate(self.step, self.total_steps, self.warmup_steps, self.config.peak_lr)
                    losses = [self._train_step(trained, batch, lr) for trained in self.probes]
                    self.step += 1
                    if self.step % self.plan.steps_per_epoch == 0:
                        self._end_epoch()
                    if self.step % _STEPS_BETWEEN_LOGS == 0 or self.step == self.total_steps:
                        values = torch.stack(losses).tolist()
                        self._require_finite(values)
                        now = time.perf_counter()
                        rate = (self.step - logged_step) / (now - logged)
                        logged, logged_step = now, self.step
                        self.progress.update(
                            self.step,
                            loss=sum(values) / len(values),
                            lr=lr,
                            images_per_second=rate * self.plan.batch_size,
                            steps_per_second=rate,
                        )
                    now = time.perf_counter()
                    if stop.number or (now - saved > _SECONDS_BETWEEN_SAVES and self.step < self.total_steps):
                        self.save(self.state_dict())
                        saved = now
                    if stop.number:
                        self.stopped_by = stop.number
                        return
        finally:
            self.progress.stop()

    def _train_step(self, trained: Trained, batch: Encoded, lr: float) -> Tensor:
        for group in trained.optimizer.param_groups:
            group["lr"] = lr
        with trained.watch():
            loss = F.cross_entropy(trained.probe(trained.label, batch), batch.targets)
            loss.backward()
            trained.optimizer.step()
            trained.optimizer.zero_grad(set_to_none=True)
        loss = loss.detach()
        trained.epoch_loss = loss if trained.epoch_loss is None else trained.epoch_loss + loss
        return loss

    def _end_epoch(self) -> None:
        for trained in self.probes:
            assert trained.epoch_loss is not None
            trained.losses.append(float(trained.epoch_loss) / self.plan.steps_per_epoch)
            trained.epoch_loss = None

    def _require_finite(self, losses: list[float]) -> None:
        for trained, loss in zip(self.probes, losses, strict=True):
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss of pooling {trained.label!r} became {loss} at step {self.step} (peak learning rate "
                    f"{self.config.peak_lr:.3g}); try a lower --lr or --optimizer adamw"
                )

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "probes": {trained.label: trained.state_dict() for trained in self.probes}}


@torch.no_grad()
def accuracies(probes: dict[str, Probe], batches: Iterator[Encoded]) -> dict[str, tuple[float, int]]:
    """Share of the images that each probe classifies right, and how many images there were."""
    right = dict.fromkeys(probes, 0)
    seen = 0
    for probe in probes.values():
        probe.eval()
    for batch in batches:
        seen += len(batch.targets)
        for label, probe in probes.items():
            right[label] += int((probe(label, batch).argmax(1) == batch.targets).sum())
    return {label: (number / max(1, seen), seen) for label, number in right.items()}


@torch.no_grad()
def knn_accuracy(
    train: Tensor, train_targets: Tensor, test: Tensor, test_targets: Tensor, neighbours: int, classes: int
) -> float:
    """k-NN on unit vectors, votes weighted by exp(cosine / 0.07), as in DINO (arXiv:2104.14294).

    Args:
        train, test: ``[n, D]`` and ``[m, D]`` features.
    """
    neighbours = min(neighbours, len(train))
    train, test = F.normalize(train.float(), dim=1), F.normalize(test.float(), dim=1)
    right = 0
    for part, wanted in zip(test.split(256), test_targets.split(256), strict=True):
        closeness, ids = (part @ train.T).topk(neighbours, dim=1)  # [256, k]
        # Relative to the nearest, which changes no vote: exp(1 / 0.07) is large.
        votes = torch.zeros(len(part), classes).scatter_add(
            1, train_targets[ids], ((closeness - closeness[:, :1]) / 0.07).exp()
        )
        right += int((votes.argmax(1) == wanted).sum())
    return right / len(test)
