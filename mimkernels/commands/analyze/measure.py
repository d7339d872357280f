"""One pass of a frozen encoder over the images: statistics of its heads and tokens, nothing of size N x N."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mimkernels.commands.analyze.config import AnalyzeConfig
from mimkernels.commands.analyze.maps import ShownImages
from mimkernels.commands.analyze.pooled import LastTokens
from mimkernels.commands.analyze.results import Measured
from mimkernels.data.batches import Augmentation
from mimkernels.data.labelled import EncoderImages, LabelledImages, in_order
from mimkernels.engine.command import TrainingError
from mimkernels.engine.encoder import FrozenEncoder
from mimkernels.engine.readout import fitted_and_tested, logistic_accuracy, why_no_classes
from mimkernels.heads import BEYOND_CLS, HeadStatistics, capture, gram_matrices, head_importance
from mimkernels.heads.sinks import SINKS

# Of every attention layer; layers without a [cls] token go without its quantities.
HEAD_QUANTITIES = (
    "distance", "renormalized_distance", "entropy", "normalized_entropy", "head_divergence", "nmi", "prefix_mass",
    "peak", "max_score", "argmax_is_prefix", *BEYOND_CLS, *SINKS,
)  # fmt: skip
# Without [cls] and registers these say nothing.
_OF_PREFIX = ("prefix_mass", "argmax_is_prefix", "pos_cls_attention", "sink_is_prefix")
# Of tokens before the first block and after every block, and of attention's outputs.
STATE_QUANTITIES = ("pos_magnitude", "cls_magnitude", "token_similarity", "high_frequency")
OUTPUT_QUANTITIES = ("pos_output_magnitude", "cls_output_magnitude")
_OF_CLS = {
    name for name in (*HEAD_QUANTITIES, *STATE_QUANTITIES, *OUTPUT_QUANTITIES)
    if name.startswith("cls_") or name == "sink_is_cls"
}  # fmt: skip
_LEAST_FOR_CKA = 4
LEFT_OUT = "; they are left out"  # how a note about images that cannot be read ends


class Tokens:
    """What the tokens of a model are like, before its first block and after every block, batch by batch.

    Attributes:
        states, outputs: statistics of the tokens, and of the outputs of attention.
        grids: of every state, rows and columns of patches.
        grams: Gram matrices of every batch.
        features: of every state and batch ``[B, D]``, means over patches, if they are wanted.
    """

    def __init__(self, encoder: FrozenEncoder, with_features: bool) -> None:
        self._num_prefix = encoder.num_prefix
        self._blocks = _blocks_of(encoder.model)
        self._tokens: list[Tensor] = []
        self.grids: list[tuple[int, int] | None] = [encoder.grid] * (len(self._blocks) + 1)
        options: dict[str, Any] = {"num_prefix": encoder.num_prefix, "grid": encoder.grid}
        names = [name for name in (*STATE_QUANTITIES, *OUTPUT_QUANTITIES)
                 if (encoder.has_cls_token or name not in _OF_CLS)
                 and (encoder.grid or name != "high_frequency")]  # fmt: skip
        self.states = HeadStatistics(quantities=[name for name in names if name in STATE_QUANTITIES], **options)
        self.outputs = HeadStatistics(quantities=[name for name in names if name in OUTPUT_QUANTITIES], **options)
        self.grams: list[Tensor] = []
        self.features: list[list[Tensor]] = [[] for _ in self.grids] if with_features else []

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
        if isinstance(output, Tensor) and output.dim() in (3, 4):
            self._tokens.append(output)

    def _attended(self, number: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 3:
            windows = len(output) // max(1, len(self._tokens[0])) if self._tokens else 1
            self.outputs.update(number, {}, output=output, windows=windows)

    def update(self) -> None:
        """Take the batch that has run; blocks that give neither ``[B, N, D]`` nor ``[B, H, W, D]`` are left alone."""
        states, self._tokens = self._tokens, []
        if not states or len(states) != len(self._blocks) + 1:
            return
        images, grams = len(states[0]), []
        for number in range(len(self.grids)):
            state = states.pop(0)  # one at a time in fp32, and none longer than it is needed
            if state.dim() == 4:  # Swin's maps, coarser from stage to stage
                self.grids[number] = (state.shape[1], state.shape[2])
                state = state.flatten(1, 2)
            state = state.float()
            self.states.update(number, {}, tokens=state, grid=self.grids[number])
            if images >= _LEAST_FOR_CKA:
                grams.append(gram_matrices([state], tokens="patch", num_prefix=self._num_prefix))
            if self.features:
                self.features[number].append(state[:, self._num_prefix :].mean(1).cpu())
        if grams:
            self.grams.append(torch.cat(grams).float().cpu())


def _blocks_of(model: nn.Module) -> list[Any]:
    """The blocks in their order; of Swin, those of one stage after the other."""
    blocks: Any = getattr(model, "blocks", None)
    stages: Any = getattr(model, "layers", ())
    return list(blocks) if blocks is not None else [block for stage in stages for block in getattr(stage, "blocks", ())]


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
    last = LastTokens(encoder, images, config.viewer_images > 0)
    seen, broken = 0, []
    read: list[Tensor] = []  # positions
    augmentation = Augmentation(encoder.img_size, encoder.in_chans, 1.0, False)
    # Registers alone are prefix tokens, too, but none of them is [cls].
    quantities = [name for name in HEAD_QUANTITIES
                  if (encoder.num_prefix or name not in _OF_PREFIX)
                  and (encoder.has_cls_token or name not in _OF_CLS)]  # fmt: skip
    loader = in_order(EncoderImages(images, augmentation, 0, False), config.batch_size, workers, device.type == "cuda")
    with (
        capture(encoder.model, quantities, unit=config.unit, accumulate=True, keep=("q", "k")) as heads,
        tokens.followed(),
    ):
        shown = ShownImages(encoder, _spread(len(images), config.viewer_images), heads)
        for batch in loader:
            broken += batch.broken
            if batch.images is None:
                continue
            shown.expect(batch.positions)
            with accelerator.autocast():
                encoded = encoder(batch.images.to(device, non_blocking=True))
            shown.add(batch.images, encoded.tokens)
            last.add(encoded.tokens, batch.positions)
            seen += len(batch.images)
            tokens.update()
            read.append(batch.positions)
            note(f"{seen:,}/{len(images):,} images")
        unread = images.unread(broken) if broken else ""
        if not seen:
            raise TrainingError(unread)
    notes = [f"{name} was not seen: {why}" for name, why in heads.missed.items()]
    if unread:
        notes.append(f"{unread}{LEFT_OUT}")
    if not tokens.grams:
        notes.append("no CKA: its blocks give no tokens [B, N, D]")
    statistics = heads.statistics
    layers = [layer for layer in heads.values() if layer.index in statistics.layers]
    if len(layers) < len(heads):
        notes.append(f"{len(heads) - len(layers)} layers of other tokens are left out of the figures")
    if not encoder.num_prefix:
        notes.append("it has no [cls] and no registers: what heads do with these is left out")
    if any(layer.windows > 1 for layer in layers):
        notes.append("attention runs in windows: numbers of heads are means over the windows of an image; keys that "
                     "the mask of shifted windows hides do not count")  # fmt: skip
    if len(set(tokens.grids)) > 1:
        grids = ", ".join(f"{rows} x {columns}" for rows, columns in dict.fromkeys(filter(None, tokens.grids)))
        notes.append(f"its maps are coarser from stage to stage ({grids}): patches, and the finest patterns whose "
                     "amplitude is drawn, are those of the stage")  # fmt: skip
    facts = {
        "encoder": encoder.title,
        "parameters": sum(weight.numel() for weight in encoder.parameters()),
        "dim": encoder.dim,
        "layers": len(layers),
        "heads": max(layer.heads for layer in layers),
        "tokens": layers[0].keys,
        "keys": [layer.keys for layer in layers],
        "windows": [layer.windows for layer in layers],
        "prefix": layers[0].num_prefix,
        "grid": list(encoder.grid) if encoder.grid else None,
        "img_size": encoder.img_size,
        "in_chans": encoder.in_chans,
        "images": seen,
    }
    accuracy, why = accuracy_by_depth(tokens.features, images.targets[torch.cat(read)])
    if why and config.depth_probe:
        notes.append(f"no accuracy by depth: {why}")
    if config.viewer_images and last.why:
        notes.append(f"no weights of trained poolings beside attention: {last.why}")
    return Measured(
        facts,
        statistics.to_dict(),
        tokens.states.to_dict() if tokens.states.layers else None,
        tokens.outputs.to_dict() if tokens.outputs.layers else None,
        tokens.grams,
        accuracy,
        _importance(encoder, _some(images, augmentation, config.importance), config.batch_size),
        None if shown.maps is None else vars(shown.maps),
        notes,
        last.train(shown.tokens),
    )


def accuracy_by_depth(features: list[list[Tensor]], targets: Tensor) -> tuple[list[float], str]:
    """Accuracy of logistic regression on the mean patch token of every state, and why there is none.

    Fitted on seven tenths of the images, chosen at random by a fixed seed, and tested on the others.
    """
    if not features or not features[0]:
        return [], "its blocks give no tokens [B, N, D]"
    why = why_no_classes(targets)
    if why:
        return [], why
    fitted, tested = fitted_and_tested(len(targets))
    return [
        logistic_accuracy(state[fitted], targets[fitted], state[tested], targets[tested])
        for state in map(torch.cat, features)  # [n, D]
    ], ""


def _spread(images: int, count: int) -> list[int]:
    """Positions of a few images, spread evenly over all."""
    return torch.linspace(0, images - 1, min(count, images)).round().long().tolist()


def _some(images: LabelledImages, augmentation: Augmentation, count: int) -> Tensor | None:
    """A few images ``[count, C, S, S]``, spread evenly over all of them; None if there is none."""
    source = EncoderImages(images, augmentation, 0, False)
    samples = (source[(0, position)] for position in _spread(len(images), count))
    read = [image for image, _, _ in samples if image is not None]
    return torch.stack(read) if read else None


def _importance(encoder: FrozenEncoder, images: Tensor | None, batch_size: int) -> list[list[float]]:
    """1 - cosine of the tokens with and without each head, mean over tokens and images."""
    if images is None:
        return []
    batches = images.to(next(encoder.parameters()).device).split(batch_size)
    importance = head_importance(encoder.model, lambda: torch.cat([encoder(batch).tokens for batch in batches]))
    return [heads.tolist() for heads in importance.values()]
