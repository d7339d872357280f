"""Masked autoencoders: reconstruct the masked patches from a few visible ones."""

import math
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mimkernels.models.base import ImageModel, check_computed_by, check_integers, check_numbers
from mimkernels.models.checkpoint import CheckpointReport, copy_by_name, read_weights
from mimkernels.models.decoder import DecoderBlock, FusedDecoderBlock
from mimkernels.models.pictures import Pictures, pictures_of
from mimkernels.models.target_sum import FeatureWidths, Heads, TargetSum
from mimkernels.models.targets import Target
from mimkernels.nn import sincos_positions_2d, use_mimkernels_attention, use_mimkernels_block, use_mimkernels_mlp
from mimkernels.nn._classes import change_class
from mimkernels.nn.attention import attention_layers
from mimkernels.nn.block import run_blocks_in_a_row
from mimkernels.nn.encoder import (
    check_encoder,
    count_kept,
    create_encoder,
    encode_visible,
    init_encoder,
    init_linears_and_norms,
    resample_positions,
)
from mimkernels.nn.recorder import LayerRecorder
from mimkernels.nn.sdpa import Patches, tell_patches
from mimkernels.ops import TokenMask, mask_from_noise, masked_patch_loss, random_mask, restore_tokens

__all__ = ["MAE", "MAEOutput"]

_DECODER_NAMES = ("mask_token", "decoder_")


class MAEOutput(NamedTuple):
    """What one forward pass gives.

    Attributes:
        loss: fp32 scalar, the mean over all masked patches of the batch; of several targets the weighted sum.
        mask: which patches were visible. Of masks that leave the images different numbers of them, ``ids_keep`` has
            as many as the image with most: others go on with masked patches, as ``mask.mask`` says.
        pred: ``[B, N, E]`` the prediction for every patch, E pixels as (height, width, channel), where it was
            asked for; else None. Of several targets, that of pixels, or the first.
        head_stats: ``LayerHeads.stats`` of every encoder block: each asked statistic ``[B, H, P + K]`` fp32 with
            gradients, by name, in plain containers, through which DistributedDataParallel finds tensors; None if none
            was asked for.
        metrics: of several targets the loss of each without its weight, without gradients, as ``loss_pixels``.
    """

    loss: Tensor
    mask: TokenMask
    pred: Tensor | None = None
    head_stats: list[dict[str, Tensor]] | None = None
    metrics: Mapping[str, Tensor] = MappingProxyType({})


class MAE(ImageModel):
    """Masked autoencoder around a timm Vision Transformer.

    Computes what the published code computes, with less work: only visible patches are embedded, and the last
    decoder block's MLP and the prediction head run for masked patches only.

    All prefix tokens of the encoder, registers too, go on to the decoder as [cls] does in the paper, with
    positions of zero there. Positions of encoder and decoder are fixed: they get no gradient. Hooks on the
    encoder's blocks and norms fire as usual; ``encoder.patch_embed`` is not called, its weights are used.

    Args:
        encoder: a timm VisionTransformer without head, with the weights it is to start from.
        decoder_dim, decoder_depth, decoder_heads: the decoder's width, blocks, and heads per block.
        mask_ratio: share of patches removed.
        norm_pix_loss: targets are normalised by each patch's own mean and deviation.
        target: "pixels"; or a teacher's features, such as "features:vit_base_patch16_224" or "ema" (``parse_target``),
            which `forward` is then given. This module has no teacher, the name is a note. Or several with weights,
            ``"pixels + 0.5*features:NAME"`` (``parse_targets``): behind the one decoder each has a linear layer of its
            own, and the loss is the weighted sum.
        target_dim: width of these features, of several targets of features a list; None takes that of the encoder.
        mean, std: per channel, for pixels in [0, 1]: images are normalised inside the kernels. uint8 images
            need both. None: images come as the encoder wants them.
        attention: "mimkernels" lets the blocks of decoder and encoder compute attention with
            ``mimkernels.attention`` (in place, as ``use_mimkernels_attention`` does; of an encoder whose attention is
            of another kind, that stays); "timm" leaves them as they are. Weights and results are the same.
        mlp: "mimkernels" lets their MLPs compute with ``mimkernels.bias_gelu`` (as ``use_mimkernels_mlp`` does), "timm"
            leaves them as they are; likewise.
        block: "mimkernels" lets their blocks add and normalise with ``mimkernels.add_layer_norm`` (as
            ``use_mimkernels_block`` does), "timm" leaves them as they are; likewise.

    Example::

        model = MAE.from_timm("vit_base_patch16_224")
        for step, images in enumerate(loader):
            loss = model(images, seed=0, offset=step).loss  # without offset, every step has the same masks

    Source: arXiv:2111.06377.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
        target: str = "pixels",
        target_dim: FeatureWidths = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        attention: str = "mimkernels",
        mlp: str = "mimkernels",
        block: str = "mimkernels",
    ) -> None:
        super().__init__()
        check_encoder(encoder)
        check_computed_by(attention=attention, mlp=mlp, block=block)
        check_integers(decoder_dim=decoder_dim, decoder_depth=decoder_depth, decoder_heads=decoder_heads)
        check_numbers(mask_ratio=mask_ratio)
        for name, size in (("decoder_dim", decoder_dim), ("decoder_depth", decoder_depth)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if decoder_heads < 1 or decoder_dim % decoder_heads != 0:
            raise ValueError(f"decoder_dim {decoder_dim} is not a multiple of decoder_heads {decoder_heads}")
        self._set_encoder(encoder)
        self.mask_ratio = mask_ratio
        self.norm_pix_loss = norm_pix_loss
        self.target, self._targets = target, TargetSum(target, target_dim)
        for term in self._targets.terms:
            if term.target.features is None and term.target != Target():
                raise ValueError(
                    f"target must be pixels, features:MODEL, ema or bootstrap, or a sum of these, got {target!r}; "
                    "norm_pix_loss normalises pixels"
                )
        self._keep(encoder.patch_embed.num_patches)
        self._set_pixel_statistics(mean, std)

        if encoder.pos_embed is not None:
            encoder.pos_embed.requires_grad_(False)
        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(
            sincos_positions_2d(decoder_dim, self.grid_size, encoder.num_prefix_tokens), requires_grad=False
        )
        self.decoder_blocks = nn.ModuleList(
            DecoderBlock(decoder_dim, decoder_heads, mlp_ratio=4.0, qkv_bias=True) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        outputs = self._targets.outputs(
            pixels=self.in_chans * self.patch_size[0] * self.patch_size[1], encoder=encoder.embed_dim
        )
        layers = [nn.Linear(decoder_dim, size) for size in outputs]
        self.decoder_pred = layers[0] if len(layers) == 1 else Heads(layers)
        nn.init.normal_(self.mask_token, std=0.02)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_norm, self.decoder_pred):
            init_linears_and_norms(part)
        if attention == "mimkernels":
            use_mimkernels_attention(encoder.blocks, required=False)
            use_mimkernels_attention(self.decoder_blocks)
        if mlp == "mimkernels":
            use_mimkernels_mlp(encoder.blocks, required=False)
            use_mimkernels_mlp(self.decoder_blocks)
        if block == "mimkernels":
            use_mimkernels_block(encoder.blocks, required=False)
            change_class(self.decoder_blocks, DecoderBlock, FusedDecoderBlock)
        self.grad_checkpointing = False

    @classmethod
    def from_timm(
        cls,
        name: str,
        *,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        patch_size: int | Sequence[int] | None = None,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
        target: str = "pixels",
        target_dim: FeatureWidths = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        attention: str = "mimkernels",
        mlp: str = "mimkernels",
        block: str = "mimkernels",
        **timm_kwargs: Any,
    ) -> "MAE":
        """A new MAE around the timm model `name`, initialised as published.

        Args:
            name: any timm ``vit_*`` that treats patches independently before its blocks.
            img_size: pixels per side, or ``(height, width)``.
            in_chans: channels of the images.
            patch_size: pixels per patch side, or ``(height, width)``; None takes the model's own.
            timm_kwargs: further arguments of the timm model, such as ``reg_tokens``, ``drop_path_rate`` or
                ``dynamic_img_size``. With ``pretrained=True`` or ``checkpoint_path`` the encoder keeps those
                weights and positions.

        The other arguments are those of the class.

        Raises:
            ValueError: the name is unknown, or the model or an argument is not supported; says what and why.
        """
        encoder = create_encoder(name, img_size=img_size, in_chans=in_chans, patch_size=patch_size, **timm_kwargs)
        own: dict[str, Any] = {
            "decoder_dim": decoder_dim,
            "decoder_depth": decoder_depth,
            "decoder_heads": decoder_heads,
            "mask_ratio": mask_ratio,
            "norm_pix_loss": norm_pix_loss,
            "target": target,
            "target_dim": target_dim,
            "mean": mean,
            "std": std,
            "attention": attention,
            "mlp": mlp,
            "block": block,
        }
        shape = {"img_size": img_size, "in_chans": in_chans, "patch_size": patch_size}
        return cls._initialised(encoder, init_encoder, name, shape, own, timm_kwargs)

    def forward(
        self,
        images: Tensor,
        *,
        mask: Tensor | None = None,
        noise: Tensor | None = None,
        seed: int = 0,
        offset: int | Tensor = 0,
        features: Tensor | Sequence[Tensor] | None = None,
        full_prediction: bool = False,
        head_stats: Sequence[str] = (),
    ) -> MAEOutput:
        """Mask, encode the visible patches, predict the masked ones, compare.

        Args:
            images: ``[B, C, H, W]`` uint8 (with the model's mean and std) or floating point.
            mask: ``[B, h, w]`` bool on the grid of patches, True = masked, such as those of
                ``mimkernels.data.masks.MaskSampler``; it is counted where it lies, so that one on the CPU waits for no
                device. Where all images have as many visible patches, the work is that of random masks. Else the
                encoder computes, for every image, as many tokens as the image with most of them has (padding is
                attended to by nobody), and the decoder predicts visible patches too; the numbers are those of each
                image alone. None: drawn, by `noise` or from `seed` and `offset`.
            noise: ``[B, N]`` fp32; the patches with the smallest noise stay visible. None: drawn from `seed`
                and `offset`, which give the same masks on every device.
            seed: of the masks.
            offset: usually the training step; the same `seed` and `offset` give the same masks. A 0-d int64
                tensor on the images' device is read without waiting for it.
            features: ``[B, N, D]`` of a teacher at every patch, where these are the target; where several targets are
                features, a list in their order.
            full_prediction: predict visible patches too and return the prediction; changes no result.
            head_stats: statistics of ``mimkernels.attention`` to return for every encoder block, over the visible
                patches; distances are in patches. They carry gradients: terms of them can be added to the loss.

        Raises:
            ValueError, TypeError: images, mask or noise do not fit the model; the message shows both sides. Or the
                encoder's attention cannot record statistics, or these are asked for of different numbers of patches.
        """
        tokens, present = self._masks(images, mask, noise=noise, seed=seed, offset=offset)
        layer_stats = None
        if head_stats:
            if present is not None:
                raise ValueError(
                    f"head_stats needs masks that leave every image as many patches visible, got {_range(tokens)}"
                )
            layers = attention_layers(self.encoder.blocks)
            positions = self.patch_positions(images, tokens.ids_keep)
            prefix = self.encoder.num_prefix_tokens
            with LayerRecorder(layers, head_stats, num_prefix=prefix, positions=positions) as heads:
                latent = self.encode(images, tokens.ids_keep)
            layer_stats = [layer.stats for layer in heads]
        else:
            latent = self.encode(images, tokens.ids_keep, present)
        given = self._targets.given(features)
        full = full_prediction or present is not None or self._targets.any_of_all_tokens
        preds = self._predicted(latent, tokens, self._grid(images), full=full, present=present)
        loss, metrics = self._targets.total([
            self._loss(term.target, pred, images, tokens, each, full)
            for term, pred, each in zip(self._targets.terms, preds, given, strict=True)
        ])  # fmt: skip
        shown = preds[self._targets.painted] if full_prediction else None
        return MAEOutput(loss, tokens, shown, layer_stats, metrics)

    def _loss(
        self, target: Target, pred: Tensor, images: Tensor, tokens: TokenMask, features: Tensor | None, full: bool
    ) -> Tensor:
        """The loss of the masked patches against one target; `full` where `pred` holds all patches."""
        if features is not None and target.features is not None:
            if target.features.tokens == "all":
                return target.features.compare(pred, features, None)
            if not full:
                return target.features.compare(pred, features, tokens.ids_masked)
            ids = tokens.mask.flatten().nonzero().flatten()
            return target.features.compare(pred.flatten(0, 1)[ids], features, ids)
        return masked_patch_loss(
            pred,
            images,
            ids=None if full else tokens.ids_masked,
            mask=tokens.mask.bool() if full else None,
            patch_size=self.patch_size,
            norm_pix=self.norm_pix_loss,
            mean=self._pixel_mean,
            std=self._pixel_std,
        )

    def draw_mask(
        self,
        images: Tensor,
        *,
        mask: Tensor | None = None,
        noise: Tensor | None = None,
        seed: int = 0,
        offset: int | Tensor = 0,
    ) -> TokenMask:
        """The mask that `forward` uses for these images and arguments."""
        return self._masks(images, mask, noise=noise, seed=seed, offset=offset)[0]

    def _masks(
        self, images: Tensor, mask: Tensor | None, *, noise: Tensor | None, seed: int, offset: int | Tensor
    ) -> tuple[TokenMask, Tensor | None]:
        """The patches as ids; where images have different numbers of visible ones, also ``[B, P + K]`` bool.

        It says which tokens of the encoder are there: the prefix, and those of the first K patches that are visible.
        """
        self._check_images(images)
        grid = self._grid(images)
        patches = grid[0] * grid[1]
        if mask is not None:
            if noise is not None:
                raise ValueError("give mask or noise, got both")
            fewest, most = self._visible(mask, images)
            flat = mask.to(images.device, non_blocking=True).flatten(1).float()
            tokens = mask_from_noise(flat, most, order="sorted")._replace(mask=flat)  # visible ones first
            if fewest == most:
                return tokens, None
            visible = flat.gather(1, tokens.ids_keep) == 0
            return tokens, nn.functional.pad(visible, (self.encoder.num_prefix_tokens, 0), value=True)
        return self._drawn(images, patches, noise, seed, offset), None

    def _drawn(self, images: Tensor, patches: int, noise: Tensor | None, seed: int, offset: int | Tensor) -> TokenMask:
        keep = self._keep(patches)
        if noise is None:
            return random_mask(images.shape[0], patches, keep, seed, offset, device=images.device)
        if tuple(noise.shape) != (images.shape[0], patches):
            raise ValueError(
                f"noise must be [{images.shape[0]}, {patches}], one value per image and patch, got {list(noise.shape)}"
            )
        return mask_from_noise(noise, keep)

    def encode(self, images: Tensor, ids_keep: Tensor, present: Tensor | None = None) -> Tensor:
        """Encoder output ``[B, P + K, D]``: prefix tokens, then the visible patches `ids_keep` ``[B, K]``.

        `present` ``[B, P + K]`` bool says which of these tokens are there; to others nobody attends.
        """
        mean, std = self._pixel_mean, self._pixel_std
        return encode_visible(self.encoder, images, ids_keep, mean=mean, std=std, present=present)

    def patch_positions(self, images: Tensor, ids: Tensor) -> Tensor:
        """Row and column in the grid of patches, ``[B, K, 2]`` fp32, of the patches `ids` ``[B, K]``."""
        columns = self._grid(images)[1]
        return torch.stack((ids // columns, ids % columns), dim=-1).float()

    def decode(
        self,
        latent: Tensor,
        mask: TokenMask,
        grid: tuple[int, int],
        *,
        full: bool = False,
        present: Tensor | None = None,
    ) -> Tensor:
        """Predicted pixels ``[B, N - K, E]`` of the masked patches, in the order of ``mask.ids_masked``.

        With ``full``, ``[B, N, E]`` of every patch of the grid (rows, columns), in its order. Tokens that are not
        `present` ``[B, P + K]`` count as masked. Of several targets, those of pixels, or of the first.
        """
        return self._predicted(latent, mask, grid, full=full, present=present)[self._targets.painted]

    def _predicted(
        self, latent: Tensor, mask: TokenMask, grid: tuple[int, int], *, full: bool, present: Tensor | None
    ) -> list[Tensor]:
        """``decode`` of every target."""
        prefix = self.encoder.num_prefix_tokens
        pos = resample_positions(self.decoder_pos_embed, grid, self.grid_size, prefix)
        # Under autocast the projection is in its dtype; tokens go on in that of mask token and positions, the
        # dtype that concatenating and adding them would give.
        x = self.decoder_embed(latent).to(self.mask_token.dtype)
        if present is not None:
            x = torch.where(present[:, :, None], x, self.mask_token)
        x = restore_tokens(x, mask.ids_restore, self.mask_token, pos, prefix)  # [B, P + N, D]
        tell_patches(self, Patches(x.shape[0], grid, self.encoder.patch_embed.patch_size))
        *blocks, last = self.decoder_blocks
        ids = None if full else mask.ids_masked + prefix
        if self.grad_checkpointing and torch.is_grad_enabled():
            for block in blocks:
                x = checkpoint(block, x, use_reentrant=False)
            x = checkpoint(last, x, ids, use_reentrant=False)
        else:
            x = run_blocks_in_a_row([*((block, {}) for block in blocks), (last, {"ids": ids})], x)
        if full:
            x = x[:, prefix:]
        preds = self.decoder_pred(self.decoder_norm(x))
        return [preds] if isinstance(preds, Tensor) else preds

    @torch.no_grad()
    def loss_of_mean(self, images: Tensor, mask: Tensor, colour: Tensor) -> Tensor:
        """The loss of predicting the mean everywhere, with norm_pix_loss each patch's own.

        Args:
            images, mask: as of ``forward``.
            colour: ``[C]`` in [0, 1], the mean colour of the data.
        """
        patches = mask.shape[1] * mask.shape[2]
        return masked_patch_loss(
            self._constant(None if self.norm_pix_loss else colour, images, patches, self.patch_size),
            images,
            mask=mask.flatten(1).to(images.device),
            patch_size=self.patch_size,
            norm_pix=self.norm_pix_loss,
            mean=self._pixel_mean,
            std=self._pixel_std,
        )

    @torch.no_grad()
    def reconstruct(
        self,
        images: Tensor,
        *,
        mask: Tensor | None = None,
        noise: Tensor | None = None,
        seed: int = 0,
        offset: int | Tensor = 0,
    ) -> Pictures:
        """Pictures of what the model makes of the masked patches; visible patches stay as they are.

        Runs without dropout and gradients. Predictions are brought back to pixels: with norm_pix_loss by each
        patch's true mean and deviation, then by the model's mean and std. One channel becomes a grey picture.
        """
        tokens, present = self._masks(images, mask, noise=noise, seed=seed, offset=offset)
        with self._in_eval_mode():
            latent = self.encode(images, tokens.ids_keep, present)
            pred = self.decode(latent, tokens, self._grid(images), full=True, present=present)
        return pictures_of(
            images,
            pred,
            tokens.mask.unflatten(1, self._grid(images)),
            self.patch_size,
            norm_pix=self.norm_pix_loss,
            mean=self._pixel_mean,
            std=self._pixel_std,
        )

    def load_checkpoint(self, source: str | os.PathLike | Mapping[str, Any]) -> CheckpointReport:
        """Load published weights by name, all of them or none.

        Args:
            source: a file or dict, ``{"model": {...}}`` or the names themselves. Published pre-training
                checkpoints hold encoder and decoder; one without any decoder name loads the encoder alone.

        Returns:
            The names that were loaded, and as missing the decoder's where there is only an encoder.

        Raises:
            ValueError: another architecture (lists names and shapes of both sides), or not a file of tensors.
        """
        weights = {name.removeprefix("encoder."): tensor for name, tensor in read_weights(source).items()}
        encoder_only = not any(map(_is_decoder_name, weights))
        config = self.config or {}
        title = (
            f"{config.get('name', type(self.encoder).__name__)}, {self.encoder.embed_dim} wide, "
            f"{len(self.encoder.blocks)} blocks, {self.grid_size[0]} x {self.grid_size[1]} patches; decoder "
            f"{self.mask_token.shape[-1]} wide, {len(self.decoder_blocks)} blocks"
        )
        return copy_by_name(
            self.mae_state_dict(),
            weights,
            title=title,
            optional=lambda name: encoder_only and _is_decoder_name(name),
        )

    def mae_state_dict(self) -> dict[str, Tensor]:
        """The weights under their published names (the encoder's without prefix); they share its memory."""
        return {name.removeprefix("encoder."): tensor for name, tensor in self.state_dict().items()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass, in encoder and decoder."""
        self.encoder.set_grad_checkpointing(enable)
        self.grad_checkpointing = enable

    def _keep(self, patches: int) -> int:
        """How many of `patches` stay visible, rounded as published."""
        inside = 0 < self.mask_ratio < 1
        keep = count_kept(patches, self.mask_ratio) if inside else 0
        if not 0 < keep < patches:
            raise ValueError(
                f"mask_ratio must lie between 0 and 1 and leave some of the {patches} patches visible and "
                f"some masked, got {self.mask_ratio}" + (f" ({keep} visible)" if inside else "")
            )
        return keep

    def _visible(self, mask: Tensor, images: Tensor) -> tuple[int, int]:
        """The least and the greatest number of visible patches of an image."""
        self._check_mask(mask, images)
        batch, patches = mask.shape[0], math.prod(mask.shape[1:])
        if batch == 0:
            return 1, 1
        counts: list[int] = (~mask).flatten(1).sum(1).tolist()
        fewest, most = min(counts), max(counts)
        if fewest == 0:
            raise ValueError(f"mask hides all of the {patches} patches of image {counts.index(0)}; one must be visible")
        if fewest == patches:
            raise ValueError(f"mask hides none of the {patches} patches of any of the {batch} images")
        return fewest, most


def _is_decoder_name(name: str) -> bool:
    return name.startswith(_DECODER_NAMES)


def _range(mask: TokenMask) -> str:
    counts = (mask.mask == 0).sum(1)
    return f"{int(counts.min())} to {int(counts.max())}"
