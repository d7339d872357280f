"""A frozen encoder: from a run, a checkpoint or timm's name to tokens. For every command that only reads features."""

import difflib
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mimkernels.engine.checkpoint import CheckpointFolder, check_content, is_checkpoint, whole_beside
from mimkernels.engine.published import LoadReport, Published, read_published
from mimkernels.engine.settings import is_of_type, read_settings
from mimkernels.heads import record_heads
from mimkernels.models.architecture import check_sizes
from mimkernels.models.build import PIXEL_STATISTICS, build_model, encoder_name
from mimkernels.models.checkpoint import DamagedFileError, copy_by_name, read_file
from mimkernels.nn import cls_attention, use_mimkernels_attention, use_mimkernels_block, use_mimkernels_mlp

_EXPORTED = (  # by `mimkernels pretrain`, and the last by `finetune`
    "mae_checkpoint.pth", "simmim_checkpoint.pth", "supervised_checkpoint.pth", "mocov3_checkpoint.pth",
    "dino_checkpoint.pth", "final.pth",
)  # fmt: skip


_WITHOUT_POSITIONS = 224  # pixels a side of images, where no positions tell how many


class EncoderChoice(Protocol):
    """Which encoder a command shall load, as its settings say.

    Attributes:
        model: a run folder, a checkpoint or a timm name.
        arch, model_kwargs: timm name and arguments of a published checkpoint's encoder.
        pretrained: load the published weights of a timm name.
        img_size: image side in pixels; None for the encoder's own. At another one positions are resampled.
        final_norm: tokens after the encoder's last norm.
    """

    model: str
    arch: str | None
    model_kwargs: dict
    pretrained: bool
    img_size: int | None
    final_norm: bool


class Tokens(NamedTuple):
    """What the encoder makes of a batch."""

    tokens: Tensor  # [B, N, D] fp32
    cls_attention: Tensor | None  # [B, H, N] fp32 of the last block, where it was asked for


class FrozenEncoder(nn.Module):
    """A Vision or Swin Transformer without gradients, from uint8 images to tokens.

    Attributes:
        name, title: for people, short and whole.
        dim, num_tokens, num_prefix: D, N and P of the tokens.
        grid: rows and columns of patch tokens, or None if they form no grid.
        pixel_range: what images of more than 8 bits were converted with in its pre-training; see ``Decoder``.
        loading: what became of the weights of a published checkpoint; None of everything else.
        built_by: timm name and arguments that built the model, but for those of images; None where it is not timm's.
        pretrained: whether it has weights of its own; a timm name may be asked for with random ones.
    """

    _shift: Tensor
    _scale: Tensor

    def __init__(
        self,
        model: nn.Module,
        name: str,
        title: str,
        *,
        img_size: int,
        in_chans: int,
        mean: Sequence[float],
        std: Sequence[float],
        final_norm: bool = True,
        pixel_range: str = "auto",
        built_by: tuple[str, dict[str, Any]] | None = None,
        pretrained: bool = True,
    ) -> None:
        super().__init__()
        if in_chans not in PIXEL_STATISTICS:
            raise ValueError(f"{title} takes images of {in_chans} channels; those that are read have 3, or 1 in grey")
        self.built_by, self.pretrained = built_by, pretrained
        self.model = model.requires_grad_(False)
        self.eval()
        self.name, self.title, self.img_size, self.in_chans = name, title, img_size, in_chans
        self.final_norm, self.pixel_range = final_norm, pixel_range
        if not final_norm:
            if not isinstance(getattr(model, "norm", None), nn.Module):
                raise ValueError(f"final_norm: {title} has no norm behind its blocks to leave out")
            model.norm = nn.Identity()
        # With 255 folded in: pixels are uint8.
        self.register_buffer("_shift", 255 * torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("_scale", 1 / (255 * torch.tensor(std).view(-1, 1, 1)))
        self.num_prefix = int(getattr(model, "num_prefix_tokens", 0))
        self._map_size: tuple[int, int] | None = None  # of encoders that give maps
        self.loading: LoadReport | None = None
        self.has_cls_token = self.num_prefix > 0 and getattr(model, "cls_token", None) is not None
        use_mimkernels_attention(model, required=False)
        use_mimkernels_mlp(model, required=False)
        use_mimkernels_block(model, required=False)
        try:
            tokens = self(torch.zeros(1, in_chans, img_size, img_size, dtype=torch.uint8)).tokens
        except (AssertionError, RuntimeError) as e:
            raise ValueError(f"{title} does not take images of {img_size} x {img_size} pixels: {e}") from e
        _, self.num_tokens, self.dim = tokens.shape
        self.grid = self._grid(self.num_tokens - self.num_prefix)

    def train(self, mode: bool = True) -> "FrozenEncoder":
        return super().train(False)  # dropout and stochastic depth stay off

    @torch.no_grad()
    def forward(self, images: Tensor, with_attention: bool = False) -> Tokens:
        """``images [B, C, S, S]`` uint8; `with_attention` also gives the last block's [cls] attention."""
        pixels = (images - self._shift) * self._scale
        if not with_attention:
            return Tokens(self._tokens(pixels), None)
        with record_heads(self._last_block(), keep=("q", "k")) as heads:
            tokens = self._tokens(pixels)
        last = heads[-1]
        return Tokens(tokens, cls_attention(last.q, last.k, **last.options))

    @property
    def stages(self) -> list[list[nn.Module]]:
        """Blocks by stage: of a Swin Transformer as it has them, of others one stage of all; empty without blocks."""
        model: Any = self.model
        layers = [list(stage.blocks) for stage in getattr(model, "layers", ()) if hasattr(stage, "blocks")]
        return layers or [list(getattr(model, "blocks", ()))]

    @property
    def num_layers(self) -> int:
        """Blocks, or stages of a Swin Transformer, that ``maps`` are taken after; ValueError where timm has none."""
        info = getattr(self.model, "feature_info", None)
        if not info or not hasattr(self.model, "forward_intermediates"):
            raise ValueError(f"{self.title} gives no maps of its layers: it is none of timm's Transformers")
        return len(info)

    @torch.no_grad()
    def maps(self, images: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """``[B, D, h, w]`` fp32 of each layer, from 1 on: its patches after the last norm, of ``images`` uint8."""
        model: Any = self.model
        pixels = (images - self._shift) * self._scale
        wanted = sorted(set(layers))
        found = model.forward_intermediates(
            pixels, indices=[layer - 1 for layer in wanted], norm=self.final_norm, intermediates_only=True
        )
        return {layer: values.float() for layer, values in zip(wanted, found, strict=True)}

    def check_attention(self, what: str) -> None:
        """Raise ValueError unless the last block's attention can be had, which `what` needs."""
        try:
            record_heads(self._last_block())
        except ValueError as e:
            raise ValueError(f"{what} needs the attention of the last block of {self.title}: {e}") from e

    def fingerprint(self) -> str:
        """Changes with the weights and with what is done to the pixels."""
        digest = hashlib.sha256(f"{self.img_size} {self.in_chans} {self.final_norm}".encode())
        for name, value in self.state_dict().items():
            digest.update(name.encode() + value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:32]

    def _tokens(self, pixels: Tensor) -> Tensor:
        model: Any = self.model  # of timm
        tokens = model.forward_features(pixels)
        if isinstance(tokens, Tensor) and tokens.dim() == 4 and getattr(model, "output_fmt", None) == "NHWC":
            self._map_size = (tokens.shape[1], tokens.shape[2])
            tokens = tokens.flatten(1, 2)  # Swin's maps: patch tokens, row by row
        if not isinstance(tokens, Tensor) or tokens.dim() != 3:
            shape = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(
                f"{self.title} gives {shape}, not tokens [B, N, D] or [B, H, W, D]; probe a Vision Transformer or a "
                "Swin Transformer, such as 'vit_base_patch16_224.mae'"
            )
        if self.final_norm and getattr(model, "fc_norm", None) is not None:
            tokens = model.fc_norm(tokens)  # where timm has the last norm behind the pooling
        return tokens.float()

    def _last_block(self) -> nn.Module:
        blocks = getattr(self.model, "blocks", None)
        if not blocks:
            raise ValueError("it has no blocks")
        return blocks[-1]

    def _grid(self, patches: int) -> tuple[int, int] | None:
        if self._map_size is not None:
            return self._map_size
        grid = tuple(getattr(getattr(self.model, "patch_embed", None), "grid_size", None) or ())
        side = math.isqrt(patches)
        if len(grid) == 2 and math.prod(grid) == patches:
            return grid
        return (side, side) if side * side == patches else None


def load_encoder(choice: EncoderChoice, *, to_copy: bool = False) -> FrozenEncoder:
    """The encoder that ``--model`` names.

    Args:
        to_copy: the caller gives the weights of a run to a model of its own, which ``model_kwargs`` and ``img_size``
            are then of: the run is loaded as it is. Otherwise ``model_kwargs`` are refused with a run.

    Raises:
        ValueError: there is no such run, checkpoint or timm model, or it gives no tokens.
    """
    path = Path(choice.model)
    if not choice.pretrained and not to_copy and (path.is_dir() or path.is_file()):
        raise ValueError(
            f"pretrained=false (--no-pretrained) takes a timm name with random weights, and {choice.model!r} has "
            "weights of its own"
        )
    if path.is_dir():
        newest = CheckpointFolder(path / "checkpoints", 1).latest()
        found = newest or next((path / name for name in _EXPORTED if (path / name).is_file()), None)
        if found is None:
            raise ValueError(f"{choice.model!r} holds no run: neither checkpoints/ nor {' nor '.join(_EXPORTED)}")
        return _from_file(choice, found, to_copy)
    if path.is_file():
        return _from_file(choice, path, to_copy)
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".tar") or "/" in choice.model.removeprefix("hf-hub:"):
        raise ValueError(f"model {choice.model!r} does not exist (looked for {path.absolute()})")
    return _from_timm(choice)


def load_same_encoder(choice: EncoderChoice, *, to_copy: bool = False, seed: int = 0) -> FrozenEncoder:
    """As ``load_encoder``; random weights are the same ones every time, those of the `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return load_encoder(choice, to_copy=to_copy)


def _from_file(choice: EncoderChoice, path: Path, to_copy: bool) -> FrozenEncoder:
    try:
        content = read_file(path)
    except DamagedFileError as e:
        whole = whole_beside(path)
        raise ValueError(f"{e}; whole beside it, as --model: {whole}" if whole else str(e)) from None
    if is_checkpoint(content):
        check_content(content, str(path))
        return _from_run(choice, path, path, content["config"], content["model"], to_copy=to_copy)
    beside = path.parent / "config.json"
    if choice.arch is not None or not beside.is_file():
        return _from_published(choice, path, content)
    # Exported by a run, whose settings lie beside it.
    return _from_run(choice, path, beside, read_settings(beside), content, published=True, to_copy=to_copy)


def _from_run(
    choice: EncoderChoice,
    path: Path,
    settings_path: Path,
    settings: dict[str, Any],
    weights: Any,
    *,
    published: bool = False,
    to_copy: bool,
) -> FrozenEncoder:
    """The encoder of a model that `settings`, read from `settings_path`, build and `weights`, from `path`, fill.

    `published`: `weights` are what a published file holds, not named tensors of the model.
    """
    _not_with(choice, "a checkpoint of `mimkernels pretrain`", "arch", *(() if to_copy else ("model_kwargs",)))
    resized = None if to_copy else choice.img_size
    pixel_range = settings.get("pixel_range", "auto")
    if not is_of_type(pixel_range, str):
        raise ValueError(f"{str(settings_path)!r}: setting 'pixel_range' must be str, got {pixel_range!r}")
    try:
        model = build_model(settings)
    except ValueError as e:
        raise ValueError(f"{str(settings_path)!r}: {e}") from e
    name = encoder_name(settings)
    if published:
        if not isinstance(weights, dict):
            raise ValueError(f"{str(path)!r} holds a {type(weights).__name__}, not a dict")
        model.load_checkpoint(weights)
    else:
        copy_by_name(model.state_dict(), weights, title=f"{name} of {settings_path}")
    arguments = ", ".join(f"{argument} {value}" for argument, value in settings["model_kwargs"].items())
    method = type(model).__name__
    size = settings["img_size"]
    encoder, told = model.evaluated_encoder, ""
    if resized is not None and resized != size:
        told = _resize(encoder, resized, f"{method} {name} of {choice.model}")
        size = resized
    patch = {} if settings["patch_size"] is None else {"patch_size": settings["patch_size"]}
    assert model.mean is not None and model.std is not None
    return FrozenEncoder(
        encoder,
        f"{method} {name} of {choice.model}",
        f"{method} {name}{f' ({arguments})' if arguments else ''} from {path}{told}",
        img_size=size,
        in_chans=settings["in_chans"],
        mean=model.mean,
        std=model.std,
        final_norm=choice.final_norm,
        pixel_range=pixel_range,
        built_by=(name, {**patch, **settings["model_kwargs"]}),
    )


def _resize(encoder: nn.Module, size: int, title: str) -> str:
    """Resample the positions of a Vision Transformer for images of `size` pixels; what was done, in words."""
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(encoder, VisionTransformer):
        raise ValueError(
            f"img_size {size} cannot be given with {title}: positions of Vision Transformers alone are resampled, this "
            f"is a {type(encoder).__name__}"
        )
    former, patch = tuple(encoder.patch_embed.grid_size), encoder.patch_embed.patch_size
    if any(size % pixels for pixels in patch):
        raise ValueError(f"img_size must be a multiple of the patches of {title}, {_by(patch)} pixels, got {size}")
    encoder.set_input_size(img_size=(size, size))
    grid = tuple(encoder.patch_embed.grid_size)
    return "" if grid == former or encoder.pos_embed is None else f", positions {_by(former)} to {_by(grid)} patches"


def _from_published(choice: EncoderChoice, path: Path, content: Any) -> FrozenEncoder:
    """The encoder in a published checkpoint, with a report of what was done to its weights."""
    from mimkernels.nn.encoder import create_encoder

    published = read_published(content, repr(str(path)), choice.arch)
    if published.relative:
        return _with_relative_positions(choice, path, published)
    name = _arch_of(choice, published)
    encoder: nn.Module
    kwargs: dict[str, Any] | None = None
    if published.build is not None:
        _not_with(choice, f"a checkpoint of {published.family}, of which timm has no equal", "arch", "model_kwargs")
        size = choice.img_size or _WITHOUT_POSITIONS
        encoder = published.build(size)
    else:
        assert published.grid is not None
        size = choice.img_size or published.grid * published.patch
        kwargs = {"patch_size": published.patch, **published.options, **choice.model_kwargs}
        encoder = create_encoder(name, **{"img_size": size, "in_chans": published.channels, **kwargs})
    weights, resampled = _fitted(published, encoder)
    copied = copy_by_name(encoder.state_dict(), weights, title=f"{name}, {size} x {size} pixels")
    report = published.report(name, len(copied.loaded), resampled)
    return _frozen(choice, path, published, encoder, report, size, kwargs)


def _with_relative_positions(choice: EncoderChoice, path: Path, published: Published) -> FrozenEncoder:
    """The encoder of a checkpoint with relative positions: of BEiT, or a Swin or Swin V2, alone or of SimMIM."""
    from mimkernels.models.masked_encoders import create_masked_encoder, family_of
    from mimkernels.models.simmim_names import load_published
    from mimkernels.nn.encoder import timm_image_size

    name = choice.arch or published.arch
    if name is None:
        fine_tuned = published.options.get("use_rel_pos_bias")
        raise ValueError(
            f"{published.where} has relative positions, as Swin, Swin V2, BEiT and SimMIM: name its timm model with "
            "--arch (and what differs from it with --img-size and --model-kwargs, such as window_size)"
            + (
                "; tables in every block are of a fine-tuned BEiT, BEiT v2 or SimMIM, whose pixels are normalised "
                "differently: take a name of beit_ or of beitv2_, as SimMIM the latter"
                if fine_tuned
                else ""
            )
        )
    of_beit = name.startswith("beit") and published.grid is not None
    own = published.grid * published.patch if of_beit and published.grid is not None else timm_image_size(name)
    size = choice.img_size or own
    kwargs = {"patch_size": published.patch, **(published.options if of_beit else {}), **choice.model_kwargs}
    encoder: Any = create_masked_encoder(name, img_size=size, **kwargs)
    weights, resampled = _fitted(published, encoder)
    target = {f"encoder.{key}": tensor for key, tensor in encoder.state_dict().items()}
    title = f"{name}, {size} x {size} pixels"
    copied = load_published(weights, target, encoder, family_of(encoder).stride(encoder), title=title)
    resampled += [told.removeprefix("encoder.") for told in copied.resized]
    report = published.report(name, len(copied.loaded), resampled, copied.left)
    return _frozen(choice, path, published, encoder, report, size, kwargs)


def _arch_of(choice: EncoderChoice, published: Published) -> str:
    name = choice.arch or published.arch
    if name is None:
        raise ValueError(
            f"{published.where} ({published.family}) is {published.width} wide with {published.depth} blocks, which is "
            "no published size: name its timm model with --arch (and --model-kwargs)"
        )
    return name


def _fitted(published: Published, encoder: Any) -> tuple[dict[str, Tensor], list[str]]:
    """Weights with patches and positions as large as the encoder's, and what was resampled."""
    from timm.layers import resample_patch_embed

    from mimkernels.nn.encoder import resample_positions

    weights, resampled = dict(published.weights), []
    projection, patch = weights["patch_embed.proj.weight"], tuple(encoder.patch_embed.patch_size)
    if projection.is_floating_point() and tuple(projection.shape[2:]) != patch:
        weights["patch_embed.proj.weight"] = resample_patch_embed(projection.float(), list(patch))
        resampled.append(f"patch_embed.proj: {published.patch} x {published.patch} to {_by(patch)} pixels")
    table, grid = weights.get("pos_embed"), tuple(encoder.patch_embed.grid_size)
    former = published.grid
    if table is None or former is None or encoder.pos_embed is None or not table.is_floating_point():
        return weights, resampled
    prefix = table.shape[1] - former * former
    if grid != (former, former) and prefix >= 0:
        weights["pos_embed"] = resample_positions(table, (grid[0], grid[1]), (former, former), prefix)
        resampled.append(f"pos_embed: {former} x {former} to {_by(grid)} patches")
    return weights, resampled


def _frozen(
    choice: EncoderChoice,
    path: Path,
    published: Published,
    encoder: nn.Module,
    report: LoadReport,
    size: int,
    kwargs: dict[str, Any] | None,
) -> FrozenEncoder:
    mean, std = published.pixels
    part = published.part if published.part != "model" else ""
    frozen = FrozenEncoder(
        encoder,
        report.arch,
        f"{report.arch} from {path}" + (f" ({part})" if part else ""),
        img_size=size,
        in_chans=published.channels,
        mean=mean,
        std=std,
        final_norm=choice.final_norm,
        built_by=None if kwargs is None else (report.arch, kwargs),
    )
    frozen.loading = report
    return frozen


def _by(sizes: Sequence[int]) -> str:
    return " x ".join(str(size) for size in sizes)


def _from_timm(choice: EncoderChoice) -> FrozenEncoder:
    import timm

    _not_with(choice, "a timm name", "arch")
    base = choice.model.partition(".")[0]
    if ":" not in choice.model and not timm.is_model(base):
        close = difflib.get_close_matches(base, timm.list_models(), n=3, cutoff=0.5)
        raise ValueError(
            f"model {choice.model!r} is neither a file, nor a folder, nor a timm model"
            + (f"; close names: {', '.join(close)}" if close else "")
        )
    check_sizes(choice.model_kwargs)
    size: dict[str, Any] = {} if choice.img_size is None else {"img_size": choice.img_size}
    try:
        model = timm.create_model(
            choice.model, pretrained=choice.pretrained, num_classes=0, **size, **choice.model_kwargs
        )
    except Exception as e:  # timm, the hub and the network each have their own
        hint = (
            "; --no-pretrained, or :pretrained=false behind a name, takes random weights" if choice.pretrained else ""
        )
        raise ValueError(f"timm cannot build {choice.model!r}: {str(e).partition(chr(10))[0]}{hint}") from e
    expected = timm.data.resolve_model_data_config(model)
    in_chans = choice.model_kwargs.get("in_chans", expected["input_size"][0])
    mean, std = expected["mean"], expected["std"]
    if len(mean) != in_chans and in_chans in PIXEL_STATISTICS:
        mean, std = PIXEL_STATISTICS[in_chans]
    return FrozenEncoder(
        model,
        choice.model,
        choice.model + ("" if choice.pretrained else " with random weights"),
        img_size=choice.img_size or expected["input_size"][-1],
        in_chans=in_chans,
        mean=mean,
        std=std,
        final_norm=choice.final_norm,
        built_by=(choice.model, dict(choice.model_kwargs)),
        pretrained=choice.pretrained,
    )


def _not_with(choice: EncoderChoice, what: str, *names: str) -> None:
    given = [name for name in names if getattr(choice, name)]
    if given:
        raise ValueError(f"{given[0]} cannot be given with {what}: {getattr(choice, given[0])!r}")
