"""Readouts of frozen features that several commands fit."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimkernels.nn import Pooling, build_pooling

_LEAST_PER_CLASS = 5
_THREADED = 2**22  # numbers from which on the products of a fit are worth more than one thread
_BATCH, _LR = 64, 0.1  # the rate is divided by the root of the width: a step moves scores alike
_CONVERTED = 2**27  # numbers, of tokens in half precision that are converted once, not at every step: 512 MB
_FEWEST, _MOST, _READ = 40, 400, 2**29  # steps, and numbers of the tokens that all of them read


def why_no_classes(targets: Tensor) -> str:
    """Why images of these class numbers, -1 for none, are too few to fit a classifier on; empty if they are not."""
    labels = targets.unique()
    if int(labels[0]) < 0 or len(labels) < 2:
        return "the images have no classes"
    if len(targets) < _LEAST_PER_CLASS * len(labels):
        return f"{len(targets)} images of {len(labels)} classes, {_LEAST_PER_CLASS} of each are needed"
    return ""


def fitted_and_tested(count: int) -> tuple[Tensor, Tensor]:
    """Numbers of seven tenths of `count` images, chosen at random by a fixed seed, and of the others."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    fitted, tested = order.split([count - 3 * count // 10, 3 * count // 10])
    return fitted, tested


def logistic_accuracy(train: Tensor, train_targets: Tensor, test: Tensor, test_targets: Tensor) -> float:
    """scikit-learn's logistic regression on standardised features (C = 1)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    # Threads of one library that wait for those of another take thirteen times as long for a few hundred rows.
    with threadpool_limits(1 if train.numel() < _THREADED else None, user_api="blas"):
        model.fit(train.numpy(), train_targets.numpy())
        return float(model.score(test.numpy(), test_targets.numpy()))


def train_pooling(
    name: str, tokens: Tensor, targets: Tensor, num_prefix: int, device: torch.device
) -> tuple[Pooling, float, int]:
    """A pooling trained for a short time with batch norm and a linear layer behind it, by AdamW.

    For pictures of its weights; ``mimkernels probe`` trains as the papers do. Steps are fewer where tokens are many and
    wide, so that training stays short beside the pass of the encoder that made them.

    Args:
        name: as of ``build_pooling``.
        tokens: ``[n, N, D]`` on the CPU.
        targets: ``[n]`` class numbers.

    Returns:
        the pooling, the accuracy on three tenths of the images, and how many the others are, which it was trained on.
    """
    fitted, tested = fitted_and_tested(len(tokens))
    if tokens.numel() <= _CONVERTED:
        tokens = tokens.float()
    fork = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=fork):
        torch.manual_seed(0)
        pooling = build_pooling(name, tokens.shape[2], num_prefix)
        norm = nn.BatchNorm1d(pooling.out_dim, affine=False, eps=1e-6)
        linear = nn.Linear(pooling.out_dim, int(targets.max()) + 1)
    parts = nn.ModuleList([pooling, norm, linear]).to(device)
    steps = min(_MOST, max(_FEWEST, _READ // (_BATCH * tokens[0].numel())))
    rate = _LR / math.sqrt(tokens.shape[2])
    optimizer = torch.optim.AdamW(parts.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    drawing = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = fitted[torch.randperm(len(fitted), generator=drawing)[:_BATCH]]
        logits = linear(norm(pooling(tokens[chosen].to(device).float())))
        F.cross_entropy(logits, targets[chosen].to(device)).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    parts.eval()
    right = 0
    with torch.no_grad():
        for chosen in tested.split(_BATCH):
            found = linear(norm(pooling(tokens[chosen].to(device).float()))).argmax(1).cpu()
            right += int((found == targets[chosen]).sum())
    return pooling, right / max(1, len(tested)), len(fitted)
