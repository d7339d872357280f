"""SimMIM: predict the pixels of masked patches from an encoder that sees all patches, masked ones as mask tokens."""

import math
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mimkernels.models.base import ImageModel, check_computed_by, check_numbers
from mimkernels.models.checkpoint import CheckpointReport, read_weights
from mimkernels.models.masked_encoders import compute_by, create_masked_encoder, family_of
from mimkernels.models.pictures import Pictures, pictures_of
from mimkernels.models.simmim_names import load_published, published_buffers, to_published
from mimkernels.models.target_sum import FeatureWidths, Heads, TargetSum
from mimkernels.models.targets import FeatureTarget, Target
from mimkernels.nn import embed_visible
from mimkernels.ops import fill_mask_tokens, masked_patch_loss, random_mask

__all__ = ["SimMIM", "SimMIMOutput"]

_PUBLISHED_UNIT = 32  # pixels
_LOSSES = {"l1": "l1", "mse": "mse", "smooth-l1": "smooth_l1"}


class SimMIMOutput(NamedTuple):
    """What one forward pass gives.

    Attributes:
        loss: fp32 scalar, the mean over all masked pixels and channels of the batch; of several targets the weighted
            sum.
        mask: ``[B, h, w]`` bool, the masked patches.
        pred: ``[B, L, E]`` the prediction of every output token, E pixels as (height, width, channel), where it was
            asked for; else None. Of several targets, that of the first of pixels, or the first.
        head_stats, metrics: as of ``MAEOutput``, the first over all tokens.
    """

    loss: Tensor
    mask: Tensor
    pred: Tensor | None = None
    head_stats: list[dict[str, Tensor]] | None = None
    metrics: Mapping[str, Tensor] = MappingProxyType({})


class SimMIM(ImageModel):
    """SimMIM around a timm ViT, BEiT, Swin or Swin V2: masked patches become a mask token, one linear layer decodes.

    Computes what the published code computes. Its decoder, a 1x1 convolution and a pixel shuffle, is a linear layer
    here, whose rows are in the order that the loss reads pixels in. Where the model draws the masks, and they hide
    whole output tokens, the decoder runs for the masked ones only, and so does what follows attention in the last block
    of a ViT or BEiT, unless somebody sees that block, a part of it or the last norm. Hooks on the encoder's blocks and
    norms fire as usual; ``encoder.patch_embed`` is not called, its weights are used.

    The loss is the sum over masked pixels and channels over their number, all images together. The published code adds
    1e-5 to the number of masked pixels, which is below fp32's rounding from 100 masked pixels on; without any masked
    pixel it gives 0, and this NaN.

    Args:
        encoder: a timm model without head, with the weights it is to start from.
        mask_unit: side in pixels of the squares that are masked whole: a multiple of the patch (of Swin 4 pixels as a
            rule) that divides the image. Of what an output token predicts (of Swin 32 x 32 pixels as a rule) it may
            hide a part: then that part counts. None: 32 as published, where images are of several such squares, else
            one patch.
        mask_ratio: share of the units that are masked, rounded up.
        target: "pixels"; "patch-norm": each output token's pixels minus their mean over their deviation, as MAE;
            "local-norm:K": each pixel by mean and deviation of the K x K pixels around it (published for Swin V2: 47).
            Or a teacher's features, such as "features:vit_base_patch16_224:norm=ln" or "ema" (``parse_target``), which
            `forward` is then given; MaskDistill. This module has no teacher, the name is a note. Or several with
            weights, ``"pixels + 0.5*features:NAME"`` (``parse_targets``): each has a linear layer of its own, in
            ``decoders``, and the loss is the weighted sum.
        target_dim: width of these features, of several targets of features a list; None takes that of the encoder.
        loss: "l1", "mse" or "smooth-l1", of pixels.
        mean, std: per channel, for pixels in [0, 1]: images are normalised inside the kernels. uint8 images
            need both. None: images come as the encoder wants them.
        attention: "mimkernels" lets the blocks compute attention with ``mimkernels.attention``, in place; "timm"
            leaves them as they are. Weights and results are the same.
        mlp: "mimkernels" lets the MLPs compute with ``mimkernels.bias_gelu``; likewise.

    Example::

        model = SimMIM.from_timm("beit_base_patch16_224")
        for step, images in enumerate(loader):
            loss = model(images, seed=0, offset=step).loss  # without offset, every step has the same masks

    Source: arXiv:2111.09886.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        mask_unit: int | None = None,
        mask_ratio: float = 0.6,
        target: str = "pixels",
        target_dim: FeatureWidths = None,
        loss: str = "l1",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        attention: str = "mimkernels",
        mlp: str = "mimkernels",
    ) -> None:
        super().__init__()
        self._family = family_of(encoder)
        check_computed_by(attention=attention, mlp=mlp)
        check_numbers(mask_ratio=mask_ratio)
        if not isinstance(loss, str) or loss not in _LOSSES:
            raise ValueError(f"loss must be one of {', '.join(_LOSSES)}, got {loss!r}")
        self._set_encoder(encoder)
        self.encoder_stride = self._family.stride(encoder)
        self.mask_unit = self._published_unit() if mask_unit is None else mask_unit
        self.mask_ratio = mask_ratio
        self.target, self.loss = target, loss
        self._targets = TargetSum(target, target_dim)
        single = self.in_chans * math.prod(self.encoder_stride) == 1
        if single and any(term.target.norm_pix for term in self._targets.terms):
            raise ValueError(
                "target patch-norm divides by the deviation of what an output token predicts, here a single value, "
                "which has none; take larger patches, or another target"
            )
        self._check_unit()
        self._units(self.grid_size)
        self._set_pixel_statistics(mean, std)

        self.mask_token = nn.Parameter(torch.empty(1, 1, self.encoder.patch_embed.proj.out_channels))
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        # Initialised as the published convolution: both draw from +-1 / sqrt(inputs).
        width = self.encoder.num_features
        outputs = self._targets.outputs(pixels=self.in_chans * math.prod(self.encoder_stride), encoder=width)
        if len(outputs) == 1:
            self.decoder = nn.Linear(width, outputs[0])
        else:
            self.decoders = Heads(nn.Linear(width, size) for size in outputs)
        compute_by(encoder, attention=attention, mlp=mlp, block="timm")

    @classmethod
    def from_timm(
        cls,
        name: str,
        *,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        patch_size: int | Sequence[int] | None = None,
        mask_unit: int | None = None,
        mask_ratio: float = 0.6,
        target: str = "pixels",
        target_dim: FeatureWidths = None,
        loss: str = "l1",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        attention: str = "mimkernels",
        mlp: str = "mimkernels",
        **timm_kwargs: Any,
    ) -> "SimMIM":
        """A new SimMIM around the timm model `name`, initialised as published.

        Args:
            name: a timm ``vit_*``, ``beit_*``, ``swin_*`` or ``swinv2_*``. BEiT is built as the ViT of SimMIM: one
                relative position bias for all blocks, LayerScale 0.1; `timm_kwargs` come before that.
            img_size: pixels per side, or ``(height, width)``.
            in_chans: channels of the images.
            patch_size: pixels per patch side, or ``(height, width)``; None takes the model's own.
            timm_kwargs: further arguments of the timm model, such as ``drop_path_rate`` or ``window_size``. With
                ``pretrained=True`` or ``checkpoint_path`` the encoder keeps those weights.

        The other arguments are those of the class.

        Raises:
            ValueError: the name is unknown, or the model or an argument is not supported; says what and why.
        """
        encoder = create_masked_encoder(
            name, img_size=img_size, in_chans=in_chans, patch_size=patch_size, **timm_kwargs
        )
        own: dict[str, Any] = {
            "mask_unit": mask_unit,
            "mask_ratio": mask_ratio,
            "target": target,
            "target_dim": target_dim,
            "loss": loss,
            "mean": mean,
            "std": std,
            "attention": attention,
            "mlp": mlp,
        }
        shape = {"img_size": img_size, "in_chans": in_chans, "patch_size": patch_size}
        return cls._initialised(encoder, family_of(encoder).init, name, shape, own, timm_kwargs)

    @property
    def masked_share(self) -> float:
        """Share of the patches that are masked, in images of the size that the model was built for."""
        units, masked = self._units(self.grid_size)
        return masked / math.prod(units)

    @property
    def blocks(self) -> list[nn.Module]:
        """The encoder's transformer blocks, in their order."""
        return list(self._family.blocks(self.encoder))

    @property
    def _steps(self) -> tuple[int, int]:
        """Patches per output token, in rows and columns."""
        rows, columns = (step // side for step, side in zip(self.encoder_stride, self.patch_size, strict=True))
        return rows, columns

    @property
    def _heads(self) -> list[nn.Module]:
        """The linear layer of each target."""
        return [self.decoder] if len(self._targets.terms) == 1 else list(self.decoders)

    def forward(
        self,
        images: Tensor,
        *,
        mask: Tensor | None = None,
        seed: int = 0,
        offset: int | Tensor = 0,
        features: Tensor | Sequence[Tensor] | None = None,
        ids: Tensor | None = None,
        full_prediction: bool = False,
        head_stats: Sequence[str] = (),
    ) -> SimMIMOutput:
        """Mask, encode, predict all pixels, compare the masked ones; or predict features of the masked tokens.

        Args:
            images: ``[B, C, H, W]`` uint8 (with the model's mean and std) or floating point.
            mask: ``[B, h, w]`` bool on the grid of patches, True = masked, any shape; not all of a batch may be
                visible. None: drawn from `seed` and `offset`, which give the same masks on every device.
            seed: of the masks.
            offset: usually the training step; the same `seed` and `offset` give the same masks. A 0-d int64
                tensor on the images' device is read without waiting for it.
            features: ``[B, L, D]`` of a teacher at every output token, where these are the target; where several
                targets are features, a list in their order.
            ids: ``masked_ids(mask)``, for who has them: to find them in a given mask waits for the device.
            full_prediction: predict visible patches too and return the prediction; changes no result.
            head_stats: statistics of ``mimkernels.attention`` to return for every encoder block, over all patches;
                distances are in patches. Of Swin, a window counts as an image, and its tokens as patches. They carry
                gradients: terms of them can be added to the loss.

        Raises:
            ValueError, TypeError: images or mask do not fit the model; the message shows both sides. Or the encoder's
                attention cannot record statistics.
        """
        tokens = None  # [B, K], of all images the masked ones, where they have as many and nothing needs the others
        if mask is None:
            mask = self.draw_mask(images, seed=seed, offset=offset)
            whole = not any(self.mask_unit % step for step in self.encoder_stride)
            if whole:
                drawn = self._drawn_tokens(mask)
                tokens = None if full_prediction or self._targets.any_of_all_tokens else drawn
                if features is not None:
                    outputs = mask[0].numel() // math.prod(self._steps)
                    ids = (drawn + torch.arange(mask.shape[0], device=mask.device)[:, None] * outputs).flatten()
        else:
            self._check_images(images)
            self._check_mask(mask, images)
            if mask.device != images.device:  # to bring it there might wait for the device
                raise ValueError(f"mask is on {mask.device} but images are on {images.device}")
            # A given mask may hide single patches; to look whether it does would wait for the device.
            whole = self.encoder_stride == self.patch_size
        given = self._targets.given(features)
        with self._recorded(images, head_stats) as heads:
            latent = self.encode(images, mask, tokens)
        layer_stats = [layer.stats for layer in heads] if head_stats else None
        if ids is None and any(term.of_masked_tokens for term in self._targets.terms):
            ids = self.masked_ids(mask)
        losses: list[Tensor] = []
        preds: list[Tensor | None] = []
        for term, head, each in zip(self._targets.terms, self._heads, given, strict=True):
            pred: Tensor | None
            if each is None or term.target.features is None:
                pred = head(latent)  # [B, L, E], or [B, K, E]
                loss = self._loss(term.target, pred, images, mask, whole, tokens)
            else:
                of_masked = tokens is not None
                loss, pred = self._feature_loss(
                    term.target.features, head, latent, each, ids, full=full_prediction, of_masked=of_masked
                )
            losses.append(loss)
            preds.append(pred)
        loss, metrics = self._targets.total(losses)
        shown = preds[self._targets.painted] if full_prediction else None
        return SimMIMOutput(loss, mask, shown, layer_stats, metrics)

    def draw_mask(self, images: Tensor, *, seed: int = 0, offset: int | Tensor = 0) -> Tensor:
        """The mask ``[B, h, w]`` bool that `forward` uses for these images and arguments."""
        self._check_images(images)
        units, masked = self._units(self._grid(images))
        count = math.prod(units)
        drawn = random_mask(images.shape[0], count, count - masked, seed, offset, device=images.device)
        mask = drawn.mask.bool().unflatten(1, units)
        for axis in (1, 2):
            mask = mask.repeat_interleave(self.mask_unit // self.patch_size[axis - 1], dim=axis)
        return mask

    def masked_ids(self, mask: Tensor) -> Tensor:
        """Output tokens ``[M]`` of all images, token n of image b as ``b * L + n``, of which ``mask`` hides a patch."""
        rows, columns = self._steps
        hidden = mask.unflatten(2, (-1, columns)).any(3).unflatten(1, (-1, rows)).any(2)
        return hidden.flatten().nonzero().flatten()

    def _drawn_tokens(self, mask: Tensor) -> Tensor:
        """Output tokens ``[B, K]`` that a mask hides which the model drew, of whole tokens; waits for no device."""
        rows, columns = self._steps
        hidden = mask[:, ::rows, ::columns].flatten(1).to(torch.uint8)
        high, wide = self.encoder_stride
        count = self._units((mask.shape[1], mask.shape[2]))[1] * (self.mask_unit // high) * (self.mask_unit // wide)
        return hidden.argsort(dim=1, descending=True, stable=True)[:, :count]

    def encode(self, images: Tensor, mask: Tensor, ids: Tensor | None = None) -> Tensor:
        """The encoder's output ``[B, L, D']``, without prefix tokens, for masked patches ``[B, h, w]`` bool.

        Of the tokens `ids` ``[B, K]`` alone it is ``[B, K, D']``, and what follows attention in the last block of a ViT
        or BEiT runs for these only.
        """
        embed = self.encoder.patch_embed
        x = embed_visible(images, None, embed.proj, norm=embed.norm, mean=self._pixel_mean, std=self._pixel_std)
        x = fill_mask_tokens(x, mask.flatten(1), self.mask_token)  # [B, N, D]
        return self._family.run(self.encoder, x, self._grid(images), ids)

    @torch.no_grad()
    def loss_of_mean(self, images: Tensor, mask: Tensor, colour: Tensor) -> Tensor:
        """The loss of predicting the mean everywhere, that of its neighbourhood where the target has one.

        All targets are of pixels.

        Args:
            images, mask: as of ``forward``.
            colour: ``[C]`` in [0, 1], the mean colour of the data.
        """
        tokens = math.prod(side // step for side, step in zip(images.shape[2:], self.encoder_stride, strict=True))
        losses = []
        for term in self._targets.terms:
            normalised = term.target.norm_pix or term.target.local_norm is not None
            pred = self._constant(None if normalised else colour, images, tokens, self.encoder_stride)
            losses.append(self._loss(term.target, pred, images, mask, self.encoder_stride == self.patch_size))
        return self._targets.total(losses)[0]

    @torch.no_grad()
    def reconstruct(
        self, images: Tensor, *, mask: Tensor | None = None, seed: int = 0, offset: int | Tensor = 0
    ) -> Pictures:
        """Pictures of what the model makes of the masked patches; visible patches stay as they are.

        Runs without dropout and gradients. Predictions are brought back to pixels: by the true mean and deviation that
        the target is normalised by, then by the model's mean and std. One channel becomes a grey picture.
        """
        mask = self.draw_mask(images, seed=seed, offset=offset) if mask is None else mask
        place = self._targets.painted
        target = self._targets.terms[place].target
        with self._in_eval_mode():
            pred = self._heads[place](self.encode(images, mask))
        return pictures_of(
            images,
            pred,
            mask,
            self.encoder_stride,
            norm_pix=target.norm_pix,
            local_norm=target.local_norm,
            mean=self._pixel_mean,
            std=self._pixel_std,
        )

    def load_checkpoint(self, source: str | os.PathLike | Mapping[str, Any]) -> CheckpointReport:
        """Load published weights by name, all of them or none.

        Args:
            source: a file or dict, ``{"model": {...}}`` or the names themselves: a published SimMIM checkpoint, or
                one of Swin, Swin V2 or BEiT, which is the encoder alone. Of the settings in it, no code is run.
                Tables of relative positions of other windows, or of another resolution, are resized as published. Of
                Swin V2, whose are computed, coordinates are scaled by the checkpoint's windows where it holds them, as
                published files do; of others give ``pretrained_window_sizes``.

        Returns:
            The published names that were loaded, as missing those of decoder and mask token where there is only an
            encoder, as left those that no weight of the model has (heads, and what follows from the architecture), and
            as resized what was of another window.

        Raises:
            ValueError: another architecture (lists names and shapes of both sides), a window that cannot be resized, or
                not a file of tensors.
        """
        config = self.config or {}
        title = (
            f"{config.get('name', type(self.encoder).__name__)}, {len(self.blocks)} blocks, "
            f"{self.encoder.num_features} features per output token, {_by(self.grid_size)} patches, stride "
            f"{_by(self.encoder_stride)}"
        )
        weights = read_weights(source)
        stride = (1, 1) if self._targets.of_features else self.encoder_stride
        return load_published(weights, self.state_dict(), self.encoder, stride, title=title, config=self.config)

    def simmim_state_dict(self) -> dict[str, Tensor]:
        """The weights under their published names and in their published layout, with what is published besides.

        The decoder's weights are copies; the other tensors share the model's memory. One that predicts features, of
        which there is no published layout, is a 1x1 convolution, too; those of several targets stay as they are here.
        """
        stride = (1, 1) if self._targets.of_features else self.encoder_stride
        return {**to_published(self.state_dict(), stride), **published_buffers(self.encoder)}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass."""
        self.encoder.set_grad_checkpointing(enable)

    def _loss(
        self, target: Target, pred: Tensor, images: Tensor, mask: Tensor, whole: bool, ids: Tensor | None = None
    ) -> Tensor:
        """The loss of pixels; `whole` where the mask hides all or nothing of what an output token predicts.

        `ids`: the tokens of `pred`, all masked; None where it has all tokens.
        """
        rows, columns = self._steps
        return masked_patch_loss(
            pred,
            images,
            ids=ids,
            mask=None if ids is not None else mask[:, ::rows, ::columns].flatten(1) if whole else mask,
            patch_size=self.encoder_stride,
            norm_pix=target.norm_pix,
            local_norm=target.local_norm,
            kind=_LOSSES[self.loss],
            mean=self._pixel_mean,
            std=self._pixel_std,
        )

    def _feature_loss(
        self,
        target: FeatureTarget,
        head: nn.Module,
        latent: Tensor,
        features: Tensor,
        ids: Tensor | None,
        *,
        full: bool,
        of_masked: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The loss against a teacher's features, and the prediction of every output token where it is wanted.

        `of_masked`: `latent` has the masked tokens only, the `ids` in their order.
        """
        if of_masked:
            return target.compare(head(latent).flatten(0, 1), features, ids), None
        if target.tokens == "all":
            pred = head(latent)
            return target.compare(pred, features, None), pred if full else None
        assert ids is not None
        if full:
            pred = head(latent)
            return target.compare(pred.flatten(0, 1)[ids], features, ids), pred
        return target.compare(head(latent.flatten(0, 1)[ids]), features, ids), None

    def _published_unit(self) -> int:
        """32 pixels, or one patch where 32 do not fit."""
        sizes = self.encoder.patch_embed.img_size
        fits = not any(_PUBLISHED_UNIT % side for side in self.patch_size) and not any(
            size % _PUBLISHED_UNIT for size in sizes
        )
        several = math.prod(sizes) > _PUBLISHED_UNIT**2
        return _PUBLISHED_UNIT if fits and several else math.lcm(*self.patch_size)

    def _check_unit(self) -> None:
        """Raise ValueError unless units consist of whole patches and images of whole units."""
        unit, sizes = self.mask_unit, self.encoder.patch_embed.img_size
        if not isinstance(unit, int) or unit < 1 or any(unit % side for side in self.patch_size):
            raise ValueError(f"mask_unit must be a multiple of the patch size {_by(self.patch_size)}, got {unit}")
        if any(size % unit for size in sizes):
            raise ValueError(f"mask_unit {unit} does not divide images of {_by(sizes)} pixels")

    def _units(self, grid: tuple[int, int]) -> tuple[tuple[int, int], int]:
        """Rows and columns of units in a grid of patches, and how many of them are masked, rounded as published."""
        pixels = tuple(count * side for count, side in zip(grid, self.patch_size, strict=True))
        if any(size % self.mask_unit for size in pixels):
            raise ValueError(f"mask_unit {self.mask_unit} does not divide images of {_by(pixels)} pixels")
        rows, columns = (size // self.mask_unit for size in pixels)
        count = rows * columns
        masked = math.ceil(count * self.mask_ratio) if 0 < self.mask_ratio < 1 else 0
        if not 0 < masked < count:
            raise ValueError(
                f"mask_ratio must lie between 0 and 1 and leave some of the {count} units of {self.mask_unit} pixels "
                f"visible and some masked, got {self.mask_ratio}"
                + (f" ({masked} masked); take a smaller mask_unit or mask_ratio" if masked else "")
            )
        return (rows, columns), masked


def _by(sizes: Sequence[int]) -> str:
    return " x ".join(str(size) for size in sizes)
