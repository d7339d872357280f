"""DINO, self-distillation without labels: a joint-embedding baseline beside masked image modeling."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimkernels.models.base import ImageModel, check_computed_by, check_numbers
from mimkernels.models.checkpoint import CheckpointReport, copy_by_name, read_file, weights_of
from mimkernels.models.masked_encoders import compute_by, family_of, represent
from mimkernels.models.momentum import copy_without_gradients, feature_std, follow
from mimkernels.nn.encoder import create_encoder
from mimkernels.nn.processes import distributed

__all__ = ["DINO", "DINOHead", "DINOOutput"]

_GLOBAL = 2  # views that the teacher sees


class DINOOutput(NamedTuple):
    """What one forward pass gives.

    Attributes:
        loss: fp32 scalar, the mean cross-entropy between the teacher's and the student's distributions over all pairs
            of a global view and another view.
        metrics: without gradients, ``teacher_entropy``, the mean entropy of the teacher's distributions in nats (a
            collapsed model has the logarithm of their number, or 0), and ``feature_std`` of the teacher's [cls]
            features (0: collapsed; see ``mimkernels.models.momentum.feature_std``).
        head_stats: as of ``MAEOutput``, of the student over all tokens of the global views, one after the other.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    head_stats: list[dict[str, Tensor]] | None = None


class DINOHead(nn.Module):
    """The projection of DINO: an MLP of three layers, an L2 norm, and cosines with prototypes.

    Args:
        dim: of the features.
        prototypes: K, cosines per feature.
        mlp_dim: width of the hidden layers.
        bottleneck_dim: width of what is normalised.
    """

    def __init__(self, dim: int, prototypes: int, *, mlp_dim: int = 2048, bottleneck_dim: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_dim),
            nn.GELU(),
            nn.Linear(mlp_dim, mlp_dim),
            nn.GELU(),
            nn.Linear(mlp_dim, bottleneck_dim),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = _Prototypes(bottleneck_dim, prototypes)

    def forward(self, features: Tensor) -> Tensor:
        """``[B, K]`` of ``[B, D]``."""
        x: Tensor = self.last_layer(F.normalize(self.mlp(features), dim=-1))
        return x


class _Prototypes(nn.Module):
    """A linear layer without bias whose rows have length 1: weight norm with its factors fixed, under its names."""

    def __init__(self, dim: int, prototypes: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1), requires_grad=False)
        self.weight_v = nn.Parameter(torch.empty(prototypes, dim))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # as nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True)))


class _Network(nn.Module):
    """An encoder and its head."""

    def __init__(self, encoder: nn.Module, head: DINOHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head


class DINO(ImageModel):
    """A timm ViT that learns without labels: a student predicts what its moving average says of other views.

    The model is called with views of the same images: two global ones, then any number of smaller local ones, for
    which the positions are interpolated. After every step of the optimizer, ``update_teacher`` moves teacher and
    centre. ``encoder`` and ``head`` are the student's; features are read from the teacher (``evaluated_encoder``), as
    published. The teacher takes no gradient and stays in eval mode, without stochastic depth.

    Args:
        encoder: a timm VisionTransformer without head, with the weights it is to start from. For local views it has
            to be built with ``dynamic_img_size=True``.
        prototypes: K, length of the distributions that are compared; published 65536.
        mlp_dim, bottleneck_dim: of the head, see ``DINOHead``.
        student_temp, teacher_temp: temperatures of both softmaxes; ``teacher_temp`` is an attribute that may be
            changed between steps.
        center_momentum: share that the centre of the teacher's outputs keeps at every step.
        mean, std: per channel, for pixels in [0, 1]: images are normalised inside the kernels. uint8 images
            need both. None: images come as the encoder wants them.
        attention, mlp, block: "mimkernels" lets the blocks compute with ``mimkernels.attention``,
            ``mimkernels.bias_gelu`` and ``mimkernels.add_layer_norm`` where their kind is supported, in place; "timm"
            leaves them as they are. Weights and results are the same.

    Example::

        model = DINO.from_timm("vit_tiny_patch16_224", img_size=64, depth=2)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        views = [torch.randn(2, 3, side, side) for side in (64, 64, 32, 32)]
        model(views).loss.backward()
        optimizer.step()
        model.update_teacher(0.996)

    Source: arXiv:2104.14294 and its code.
    """

    center: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        *,
        prototypes: int = 2048,
        mlp_dim: int = 2048,
        bottleneck_dim: int = 256,
        student_temp: float = 0.1,
        teacher_temp: float = 0.04,
        center_momentum: float = 0.9,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        attention: str = "mimkernels",
        mlp: str = "mimkernels",
        block: str = "mimkernels",
    ) -> None:
        super().__init__()
        self._family = family_of(encoder)
        if not self._family.resizes:
            raise ValueError(
                f"a {type(encoder).__name__} does not take views of several sizes; take a plain Vision Transformer "
                "such as 'vit_small_patch16_224'"
            )
        check_computed_by(attention=attention, mlp=mlp, block=block)
        check_numbers(student_temp=student_temp, teacher_temp=teacher_temp, center_momentum=center_momentum)
        for name, size in (("prototypes", prototypes), ("mlp_dim", mlp_dim), ("bottleneck_dim", bottleneck_dim)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
        for name, value in (("student_temp", student_temp), ("teacher_temp", teacher_temp)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if not 0 <= center_momentum < 1:
            raise ValueError(f"center_momentum must be at least 0 and below 1, got {center_momentum}")
        self._set_encoder(encoder)
        self.prototypes = prototypes
        self.student_temp, self.teacher_temp, self.center_momentum = student_temp, teacher_temp, center_momentum
        self._set_pixel_statistics(mean, std)
        compute_by(encoder, attention=attention, mlp=mlp, block=block)
        self.head = DINOHead(self.encoder.num_features, prototypes, mlp_dim=mlp_dim, bottleneck_dim=bottleneck_dim)
        self.teacher = copy_without_gradients(_Network(encoder, self.head)).eval()
        self.register_buffer("center", torch.zeros(1, prototypes))
        # Of the teacher's outputs since the last update. No buffers: DDP would give every process those of the first.
        self._sum: Tensor | None = None
        self._count = 0

    @classmethod
    def from_timm(
        cls,
        name: str,
        *,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        patch_size: int | Sequence[int] | None = None,
        prototypes: int = 2048,
        mlp_dim: int = 2048,
        bottleneck_dim: int = 256,
        student_temp: float = 0.1,
        teacher_temp: float = 0.04,
        center_momentum: float = 0.9,
        drop_path_rate: float = 0.1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        attention: str = "mimkernels",
        mlp: str = "mimkernels",
        block: str = "mimkernels",
        **timm_kwargs: Any,
    ) -> "DINO":
        """A new model around the timm encoder `name`, initialised as published.

        Args:
            name: a timm ``vit_*``.
            img_size: pixels per side of the global views, or ``(height, width)``.
            in_chans: channels of the images.
            patch_size: pixels per patch side, or ``(height, width)``; None takes the model's own.
            drop_path_rate: stochastic depth of the student's last block; those before it have less.
            timm_kwargs: further arguments of the timm model. With ``pretrained=True`` or ``checkpoint_path`` student
                and teacher start from those weights.

        The other arguments are those of the class.

        Raises:
            ValueError: the name is unknown, or the model or an argument is not supported; says what and why.
        """
        shape: dict[str, Any] = {
            "img_size": img_size,
            "in_chans": in_chans,
            "patch_size": patch_size,
            "drop_path_rate": drop_path_rate,
        }
        encoder = create_encoder(name, **shape, **{"dynamic_img_size": True, **timm_kwargs})
        own: dict[str, Any] = {
            "prototypes": prototypes,
            "mlp_dim": mlp_dim,
            "bottleneck_dim": bottleneck_dim,
            "student_temp": student_temp,
            "teacher_temp": teacher_temp,
            "center_momentum": center_momentum,
            "mean": mean,
            "std": std,
            "attention": attention,
            "mlp": mlp,
            "block": block,
        }
        return cls._initialised(encoder, _init_encoder, name, shape, own, timm_kwargs)

    @property
    def evaluated_encoder(self) -> nn.Module:
        """The teacher's, as published."""
        evaluated: nn.Module = self.teacher.encoder
        return evaluated

    @property
    def blocks(self) -> list[nn.Module]:
        """The student's transformer blocks, in their order."""
        return list(self._family.blocks(self.encoder))

    def forward(self, views: Sequence[Tensor], *, head_stats: Sequence[str] = ()) -> DINOOutput:
        """Compare what the student says of every view with what the teacher says of the other global ones.

        Args:
            views: of the same images, each ``[B, C, H, W]`` uint8 (with the model's mean and std) or floating point:
                two global ones of one size, then local ones of any sizes that the patches divide; those of one size
                go through the encoder together.
            head_stats: statistics of ``mimkernels.attention`` to return for every block of the student, over all
                patches of the global views, ``[2 B, ...]``; distances are in patches. They carry gradients: terms of
                them can be added to the loss.

        Raises:
            ValueError, TypeError: the views do not fit the model or each other; the message shows both sides. Or the
                encoder's attention cannot record statistics.
        """
        self._check_views(views)
        seen, batch = torch.cat(list(views[:_GLOBAL])), views[0].shape[0]
        with torch.no_grad():
            features = self._features(self.teacher.encoder, seen)
            outputs = _exact(self.teacher.head(features))  # [2 B, K]
            log_targets = F.log_softmax((outputs - self.center) / self.teacher_temp, dim=1)
            targets = log_targets.exp()
            if self.training:
                total = outputs.sum(0, keepdim=True)
                self._sum = total if self._sum is None else self._sum + total
                self._count += len(outputs)
            metrics = {
                "teacher_entropy": -(targets * log_targets).sum(1).mean(),
                "feature_std": feature_std(features),
            }
        with self._recorded(seen, head_stats) as heads:
            student = [self._features(self.encoder, seen)]
        student += [self._features(self.encoder, group) for group in _by_size(views[_GLOBAL:])]
        logits = (_exact(self.head(torch.cat(student))) / self.student_temp).unflatten(0, (len(views), batch))
        loss = _cross_entropy(logits, targets.unflatten(0, (_GLOBAL, batch)))
        return DINOOutput(loss, metrics, [layer.stats for layer in heads] if head_stats else None)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """Follow a step of the optimizer: the teacher's weights by `momentum`, the centre by what the teacher gave.

        The centre moves towards the mean of the teacher's outputs in all forward passes in training mode since the
        last call, of all processes; every process has to call this.
        """
        follow(self.teacher.encoder, self.encoder, momentum)
        follow(self.teacher.head, self.head, momentum)
        if self._sum is None:
            return
        total = torch.cat((self._sum, self._sum.new_full((1, 1), self._count)), dim=1)
        if distributed():
            torch.distributed.all_reduce(total)
        self.center.lerp_(total[:, :-1] / total[:, -1:], 1 - self.center_momentum)
        self._sum, self._count = None, 0

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.teacher.eval()
        return self

    def load_checkpoint(self, source: str | os.PathLike | Mapping[str, Any]) -> CheckpointReport:
        """Load weights under their published names, all of them or none.

        Args:
            source: a file or dict with ``student`` and ``teacher``, and perhaps the centre in ``dino_loss``; or of one
                of both (``backbone.*`` and ``head.*``), which then goes into both.

        Raises:
            ValueError: another architecture (lists names and shapes of both sides), or not a file of tensors.
        """
        content = source if isinstance(source, Mapping) else read_file(source)
        where = "the checkpoint" if isinstance(source, Mapping) else repr(os.fspath(source))
        parts = {part: content[part] for part in ("student", "teacher") if part in content} or {"student": content}
        read = {part: weights_of(weights, where) for part, weights in parts.items()}
        only = next(iter(read.values()))
        read = {part: read.get(part, only) for part in ("student", "teacher")}
        weights = {f"{part}.{name}": tensor for part, named in read.items() for name, tensor in named.items()}
        target = {f"{part}.{name}": tensor for part in read for name, tensor in self._published(part)}
        loss = content.get("dino_loss")
        if isinstance(loss, Mapping) and isinstance(loss.get("center"), Tensor):
            target["dino_loss.center"], weights["dino_loss.center"] = self.center, loss["center"]
        title = f"{self._title()}, {self.prototypes} prototypes"
        return copy_by_name(target, weights, title=title)

    def dino_state_dict(self) -> dict[str, dict[str, Tensor]]:
        """``student``, ``teacher`` and ``dino_loss`` under the published names; they share this model's memory."""
        return {
            # Published students were wrapped by DistributedDataParallel, teachers not.
            "student": {f"module.{name}": tensor for name, tensor in self._published("student")},
            "teacher": dict(self._published("teacher")),
            "dino_loss": {"center": self.center.detach()},
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of the student's blocks in the backward pass."""
        self.encoder.set_grad_checkpointing(enable)

    def _features(self, encoder: nn.Module, images: Tensor) -> Tensor:
        return represent(encoder, images, self._pixel_mean, self._pixel_std)

    def _published(self, part: str) -> Iterator[tuple[str, Tensor]]:
        network: Any = self if part == "student" else self.teacher
        for published, module in (("backbone", network.encoder), ("head", network.head)):
            for name, tensor in module.state_dict().items():
                yield f"{published}.{name}", tensor

    def _check_views(self, views: Sequence[Tensor]) -> None:
        if not isinstance(views, (tuple, list)):
            raise TypeError(f"views must be a tuple of tensors, two of them global, got {type(views).__name__}")
        if len(views) < _GLOBAL:
            raise ValueError(f"views must be two global ones and perhaps local ones, got {len(views)}")
        for view in views:
            self._check_images(view)
        first, second = views[:_GLOBAL]
        if first.shape != second.shape:
            raise ValueError(f"both global views must have one shape, got {list(first.shape)} and {list(second.shape)}")
        batches, dtypes = [view.shape[0] for view in views], {view.dtype for view in views}
        if len(set(batches)) > 1:
            raise ValueError(f"views must be of the same images, got {', '.join(map(str, batches))} of them")
        if len(dtypes) > 1:
            raise TypeError(f"views must have one dtype, got {', '.join(sorted(map(str, dtypes)))}")


def _exact(x: Tensor) -> Tensor:
    """In fp32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by_size(views: Sequence[Tensor]) -> Iterator[Tensor]:
    """Views of one size as one batch, in the order in which sizes come first."""
    groups: dict[torch.Size, list[Tensor]] = {}
    for view in views:
        groups.setdefault(view.shape, []).append(view)
    yield from map(torch.cat, groups.values())


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of ``-sum(p log_softmax(x))`` over images and pairs of a global view p and another view x.

    Args:
        logits: ``[V, B, K]`` of all views, the global ones first.
        targets: ``[2, B, K]`` of the global ones.
    """
    normalisers = logits.logsumexp(-1)  # [V, B]; targets sum to 1: -sum(p log_softmax(x)) = logsumexp(x) - <p, x>
    crossed = normalisers[:_GLOBAL] - (targets.flip(0) * logits[:_GLOBAL]).sum(-1)
    local = _GLOBAL * normalisers[_GLOBAL:] - (targets.sum(0) * logits[_GLOBAL:]).sum(-1)
    return (crossed.sum() + local.sum()) / (_GLOBAL * (len(logits) - 1) * logits.shape[1])


def _init_encoder(encoder: Any) -> None:
    """Initialise as published: normal of deviation 0.02 for linear layers, tokens and positions, zero biases.

    The patch projection keeps torch's values of a convolution.
    """
    with torch.no_grad():
        for part in encoder.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
            elif isinstance(part, nn.LayerNorm) and part.elementwise_affine:
                nn.init.ones_(part.weight)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        for token in (encoder.cls_token, encoder.reg_token, encoder.pos_embed):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)
