"""One pass of a frozen encoder over the images: statistics of its heads and tokens, nothing of size N x N."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mimkernels.commands.analyze.config import AnalyzeConfig
from mimkernels.commands.analyze.maps import attention_maps
from mimkernels.commands.analyze.results import Measured
from mimkernels.data.batches import Augmentation
from mimkernels.data.labelled import EncoderImages, LabelledImages, in_order
from mimkernels.engine.command import TrainingError
from mimkernels.engine.encoder import FrozenEncoder
from mimkernels.engine.readout import logistic_accuracy
from mimkernels.heads import BEYOND_CLS, HeadStatistics, capture, gram_matrices, head_importance
from mimkernels.heads.sinks import SINKS

# Of every attention layer; layers without a [cls] token go without its quantities.
HEAD_QUANTITIES = (
    "distance", "renormalized_distance", "entropy", "head_divergence", "nmi", "prefix_mass", "peak", *BEYOND_CLS,
    *SINKS,
)  # fmt: skip
# Of tokens before the first block and after every block, and of attention's outputs.
STATE_QUANTITIES = ("pos_magnitude", "cls_magnitude", "token_similarity", "high_frequency")
OUTPUT_QUANTITIES = ("pos_output_magnitude", "cls_output_magnitude")
_OF_CLS = {
    name for name in (*HEAD_QUANTITIES, *STATE_QUANTITIES, *OUTPUT_QUANTITIES)
    if name.startswith("cls_") or name == "sink_is_cls"
}  # fmt: skip
_LEAST_PER_CLASS = 5
_LEAST_FOR_CKA = 4


class Tokens:
    """What the tokens of a model are like, before its first block and after every block, batch by batch.

    Attributes:
        states, outputs: statistics of the tokens, and of the outputs of attention.
        grams: Gram matrices of every batch.
        features: of every batch ``[B, states, D]``, means over patches, if they are wanted.
    """

    def __init__(self, encoder: FrozenEncoder, with_features: bool) -> None:
        self._num_prefix = encoder.num_prefix
        found: Any = getattr(encoder.model, "blocks", None)
        self._blocks: list[Any] = list(found) if found is not None else []
        self._tokens: list[Tensor] = []
        options: dict[str, Any] = {"num_prefix": encoder.num_prefix, "grid": encoder.grid}
        names = [name for name in (*STATE_QUANTITIES, *OUTPUT_QUANTITIES)
                 if (encoder.has_cls_token or name not in _OF_CLS)
                 and (encoder.grid or name != "high_frequency")]  # fmt: skip
        self.states = HeadStatistics(quantities=[name for name in names if name in STATE_QUANTITIES], **options)
        self.outputs = HeadStatistics(quantities=[name for name in names if name in OUTPUT_QUANTITIES], **options)
        self.grams: list[Tensor] = []
        self.features: list[Tensor] = []
        self._with_features = with_features

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Inside the block, the model is listened to."""
        handles: list[Any] = [block.register_forward_hook(self._leave) for block in self._blocks]
        handles += [block.register_forward_pre_hook(self._enter) for block in self._blocks[:1]]
        for number, block in enumerate(self._blocks):
            if isinstance(getattr(block, "attn", None), nn.Module):
                handles.append(block.attn.register_forward_hook(functools.partial(self._attended, number)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._tokens = [args[0]]

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 3:
            self._tokens.append(output)

    def _attended(self, number: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 3:
            self.outputs.update(number, {}, output=output)

    def update(self) -> None:
        """Take the batch that has run; blocks that give no tokens ``[B, N, D]`` are left alone."""
        tokens, self._tokens = self._tokens, []
        if not tokens or len(tokens) != len(self._blocks) + 1:
            return
        tokens = [state.float() for state in tokens]
        for number, state in enumerate(tokens):
            self.states.update(number, {}, tokens=state)
        if len(tokens[0]) >= _LEAST_FOR_CKA:
            grams = gram_matrices(tokens, tokens="patch", num_prefix=self._num_prefix)
            self.grams.append(grams.float().cpu())
        if self._with_features:
            means = [state[:, self._num_prefix :].mean(1) for state in tokens]
            self.features.append(torch.stack(means, 1).cpu())


def measure(
    encoder: FrozenEncoder,
    images: LabelledImages,
    config: AnalyzeConfig,
    accelerator: Accelerator,
    workers: int,
    note: Callable[[str], None],
) -> Measured:
    """Run the encoder once over the images.

    Raises:
        TrainingError: no image can be read.
    """
    device = accelerator.device
    encoder.to(device)
    tokens = Tokens(encoder, config.depth_probe)
    seen, broken = 0, []
    read: list[Tensor] = []  # positions
    augmentation = Augmentation(encoder.img_size, encoder.in_chans, 1.0, False)
    loader = in_order(EncoderImages(images, augmentation, 0, False), config.batch_size, workers, device.type == "cuda")
    # Registers alone are prefix tokens, too, but none of them is [cls].
    wanted = [name for name in HEAD_QUANTITIES if encoder.has_cls_token or name not in _OF_CLS]
    with (
        capture(encoder.model, wanted, unit=config.unit, accumulate=True) as heads,
        tokens.followed(),
    ):
        for batch in loader:
            broken += batch.broken
            if batch.images is None:
                continue
            with accelerator.autocast():
                encoder(batch.images.to(device, non_blocking=True))
            seen += len(batch.images)
            tokens.update()
            read.append(batch.positions)
            note(f"{seen:,}/{len(images):,} images")
    notes = [f"{name} was not seen: {why}" for name, why in heads.missed.items()]
    if broken:
        position, reason = broken[0]
        text = f"{len(broken)} of {len(images)} images cannot be read, such as {images.label(position)}: {reason}"
        if not seen:
            raise TrainingError(text)
        notes.append(f"{text}; they are left out")
    if not tokens.grams:
        notes.append("no CKA: its blocks give no tokens [B, N, D]")
    statistics = heads.statistics
    layers = [layer for layer in heads.values() if layer.index in statistics.layers]
    if len(layers) < len(heads):
        notes.append(f"{len(heads) - len(layers)} layers of other tokens are left out of the figures")
    facts = {
        "encoder": encoder.title,
        "parameters": sum(weight.numel() for weight in encoder.parameters()),
        "dim": encoder.dim,
        "layers": len(layers),
        "heads": max(layer.heads for layer in layers),
        "tokens": layers[0].keys,
        "prefix": layers[0].num_prefix,
        "grid": list(encoder.grid) if encoder.grid else None,
        "img_size": encoder.img_size,
        "in_chans": encoder.in_chans,
        "images": seen,
    }
    accuracy, why = _accuracy_by_depth(tokens.features, images.targets[torch.cat(read)])
    if why and config.depth_probe:
        notes.append(f"no accuracy by depth: {why}")
    return Measured(
        facts,
        statistics.to_dict(),
        tokens.states.to_dict() if tokens.states.layers else None,
        tokens.outputs.to_dict() if tokens.outputs.layers else None,
        tokens.grams,
        accuracy,
        _importance(encoder, _some(images, augmentation, config.importance), config.batch_size),
        _maps(encoder, _some(images, augmentation, config.viewer_images)),
        notes,
    )


def _accuracy_by_depth(features: list[Tensor], targets: Tensor) -> tuple[list[float], str]:
    """Accuracy of logistic regression on the mean patch token of every state, and why there is none.

    Fitted on seven tenths of the images, chosen at random by a fixed seed, and tested on the others.
    """
    if not features:
        return [], "its blocks give no tokens [B, N, D]"
    labels = targets.unique()
    if int(labels[0]) < 0 or len(labels) < 2:
        return [], "the images have no classes"
    if len(targets) < _LEAST_PER_CLASS * len(labels):
        return [], f"{len(targets)} images of {len(labels)} classes, {_LEAST_PER_CLASS} of each are needed"
    vectors = torch.cat(features)  # [n, states, D]
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    fitted, tested = order.split([len(order) - 3 * len(order) // 10, 3 * len(order) // 10])
    return [
        logistic_accuracy(state[fitted], targets[fitted], state[tested], targets[tested]) for state in vectors.unbind(1)
    ], ""


def _some(images: LabelledImages, augmentation: Augmentation, count: int) -> Tensor | None:
    """A few images ``[count, C, S, S]``, spread evenly over all of them; None if there is none."""
    source = EncoderImages(images, augmentation, 0, False)
    positions = torch.linspace(0, len(images) - 1, min(count, len(images))).round().long().tolist()
    read = [image for image, _, _ in (source[(0, position)] for position in positions) if image is not None]
    return torch.stack(read) if read else None


def _maps(encoder: FrozenEncoder, images: Tensor | None) -> dict[str, Any] | None:
    """Attention rows of a few images, for the viewer."""
    maps = None if images is None else attention_maps(encoder, images)
    return None if maps is None else vars(maps)


def _importance(encoder: FrozenEncoder, images: Tensor | None, batch_size: int) -> list[list[float]]:
    """1 - cosine of the tokens with and without each head, mean over tokens and images."""
    if images is None:
        return []
    batches = images.to(next(encoder.parameters()).device).split(batch_size)
    importance = head_importance(encoder.model, lambda: torch.cat([encoder(batch).tokens for batch in batches]))
    return [heads.tolist() for heads in importance.values()]
