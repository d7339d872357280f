"""One pass of a frozen encoder over the images: statistics of its heads and tokens, nothing of size N x N."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from mimkernels.commands.analyze.config import AnalyzeConfig
from mimkernels.commands.analyze.results import Measured
from mimkernels.data.batches import Augmentation
from mimkernels.data.labelled import EncoderImages, LabelledImages, in_order
from mimkernels.engine.command import TrainingError
from mimkernels.engine.encoder import FrozenEncoder
from mimkernels.heads import BEYOND_CLS, capture, gram_matrices

# Of every attention layer; layers without a [cls] token go without its quantities.
HEAD_QUANTITIES = (
    "distance", "renormalized_distance", "entropy", "head_divergence", "nmi", "prefix_mass", "peak", *BEYOND_CLS,
)  # fmt: skip
_LEAST_FOR_CKA = 4


class States:
    """The tokens before the first block of a model and after every block, of the last batch."""

    def __init__(self, model: nn.Module) -> None:
        found: Any = getattr(model, "blocks", None)
        self.blocks: list[nn.Module] = list(found) if found is not None else []
        self.tokens: list[Tensor] = []

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        if not self.blocks:
            yield
            return
        handles: list[Any] = [self.blocks[0].register_forward_pre_hook(self._enter)]
        handles += [block.register_forward_hook(self._leave) for block in self.blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.tokens = [args[0]]

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 3:
            self.tokens.append(output)

    @property
    def whole(self) -> bool:
        """Whether every block gave tokens ``[B, N, D]``."""
        return bool(self.blocks) and len(self.tokens) == len(self.blocks) + 1


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
    states = States(encoder.model)
    grams: list[Tensor] = []
    seen, broken = 0, []
    augmentation = Augmentation(encoder.img_size, encoder.in_chans, 1.0, False)
    loader = in_order(EncoderImages(images, augmentation, 0, False), config.batch_size, workers, device.type == "cuda")
    with (
        warnings.catch_warnings(),
        capture(encoder.model, HEAD_QUANTITIES, unit=config.unit, accumulate=True) as heads,
        states.followed(),
    ):
        for batch in loader:
            broken += batch.broken
            if batch.images is None:
                continue
            with accelerator.autocast():
                encoder(batch.images.to(device, non_blocking=True))
            seen += len(batch.images)
            if states.whole and len(batch.images) >= _LEAST_FOR_CKA:
                features = [tokens.float() for tokens in states.tokens]
                grams.append(gram_matrices(features, tokens="patch", num_prefix=encoder.num_prefix).float().cpu())
            note(f"{seen:,}/{len(images):,} images")
    notes = [f"{name} was not seen: {why}" for name, why in heads.missed.items()]
    if broken:
        position, reason = broken[0]
        text = f"{len(broken)} of {len(images)} images cannot be read, such as {images.label(position)}: {reason}"
        if not seen:
            raise TrainingError(text)
        notes.append(f"{text}; they are left out")
    if not grams:
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
    return Measured(facts, statistics.to_dict(), grams, notes)
