"""Settings of a pre-training run."""

import math
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from mimkernels.commands.pretrain.methods import METHODS, check_method
from mimkernels.engine.settings import require, require_unset, setting
from mimkernels.engine.training.config import TrainingConfig, shared

# Those of mimkernels.data.masks for images; to be shown without torch.
MASKINGS = (
    "random", "unit", "block", "block_exact", "inverse_block", "dinov2", "ibot", "multiblock", "uniform",
    "attention_guided",
)  # fmt: skip
NO_MASKING = "none"  # of targets that all tokens have
EMA = "ema"  # a teacher
MEASURED = ("auto", "imagenet", "data")  # of pixel_stats, where it has no numbers
LOSSES = ("l1", "mse", "smooth-l1")

# As of `TrainingConfig.architecture` ...
ARCHITECTURE_FIELDS = (
    "method", "model", "img_size", "in_chans", "patch_size", "model_kwargs",
    "decoder_dim", "decoder_depth", "decoder_heads", "mlp_dim", "out_dim", "stop_grad_conv1", "sincos_positions",
    "prototypes", "bottleneck_dim",
)  # fmt: skip
# ... and with another value of these the stream of batches would be another one.
STREAM_FIELDS = (
    "data", "val_split", "max_pixels", "pixel_range", "pixel_stats", "seed", "crop_scale", "hflip", "masking",
    "mask_ratio", "masking_kwargs", "norm_pix_loss", "mask_unit", "target", "loss", "teacher", "teacher_momentum",
    "label_smoothing", "mixup", "cutmix", "color_jitter", "blur_prob", "solarize_prob", "temperature", "momentum",
    "local_crops", "local_size", "local_scale",
    "student_temp", "teacher_temp", "warmup_teacher_temp", "warmup_teacher_temp_epochs",
)  # fmt: skip
# ... and what else changes the numbers of a continued run.
RESULT_FIELDS = (
    *STREAM_FIELDS, "batch_size", "accum_steps", "epochs", "warmup_epochs", "blr", "lr", "min_lr", "weight_decay",
    "clip_grad", "precision", "regularize", "min_blr", "warmup_blr", "schedule", "step_epoch", "beta2",
    "decay_bias_tables", "weight_decay_end",
)  # fmt: skip


@dataclass
class PretrainConfig(TrainingConfig):
    """Everything a pre-training run depends on. Saved as ``config.json`` in the run folder and in every checkpoint."""

    methods: ClassVar = METHODS
    architecture: ClassVar = ARCHITECTURE_FIELDS
    results: ClassVar = RESULT_FIELDS

    method: str = setting("mae", "pre-training method", "model", choices=tuple(METHODS))
    model: str = setting(
        "vit_tiny_patch16_224",
        "encoder: any timm vit_*; of simmim, supervised and mocov3 also beit_*, swin_*, swinv2_*",
        "model",
    )
    img_size: int = setting(224, "image side in pixels", "model")
    in_chans: int = setting(3, "image channels: 3 (colour) or 1 (grey)", "model")
    patch_size: int | None = setting(None, "patch side in pixels (default: the model's own)", "model")
    model_kwargs: dict = field(
        default_factory=dict,
        metadata={"help": "further timm model arguments, such as embed_dim=128 depth=4", "group": "model"},
    )
    masking: str = setting("random", "how the masked patches are chosen", "model", choices=(*MASKINGS, NO_MASKING))
    mask_ratio: float | None = setting(
        None, "share of patches that are masked (default: 0.75 of random, simmim 0.6; other strategies' own)", "model"
    )
    masking_kwargs: dict = field(
        default_factory=dict,
        metadata={"help": "options of --masking, such as min_patches=16 aspect=[0.5,2]", "group": "model"},
    )
    teacher: str = setting(
        EMA, "whose [cls] attention --masking attention_guided follows: ema, the moving average of what is trained, "
        "or a run folder, checkpoint or timm name, which stays as it is", "model", metavar="ema|MODEL",
    )  # fmt: skip
    teacher_momentum: float = setting(0.996, "share that the moving average keeps at every step", "model")

    decoder_dim: int = setting(512, "decoder width", "MAE")
    decoder_depth: int = setting(8, "decoder blocks", "MAE")
    decoder_heads: int = setting(16, "decoder attention heads", "MAE")
    norm_pix_loss: bool = setting(True, "normalise each target patch by its own mean and variance", "MAE")

    mask_unit: int | None = setting(
        None, "side in pixels of the squares that are masked whole (default: 32, or one patch where images are not of "
        "several such squares)", "SimMIM",
    )  # fmt: skip
    target: str = setting(
        "pixels", "what is predicted: pixels; patch-norm (SimMIM), normalised by mean and variance of what one output "
        "token predicts; local-norm:K (SimMIM), by those of the K x K pixels around each; features:MODEL, those that a "
        "timm model, run or checkpoint has of the whole image; ema, those of the encoder's moving average; "
        "bootstrap:stages=N, those of the encoder at the end of the stage before, each stage beginning from new "
        "weights. Options of the last three: features:MODEL:layer=8,layers=4,norm=ln,loss=smooth-l1,beta=1,"
        "tokens=masked; of a MODEL also pretrained=false, img_size=N, arch=NAME and timm's arguments. Given several "
        "times, each perhaps with a weight as in 0.5*features:MODEL, the weighted sum is trained, a head for each",
        "MAE and SimMIM", metavar="TARGET", joined=" + ",
    )  # fmt: skip
    target_dim: int | list[int | None] | None = setting(  # noqa: RUF009 # a field
        None, "width of the features (default: the teacher's)", "MAE and SimMIM"
    )
    loss: str = setting("l1", "how the prediction is compared", "SimMIM", choices=LOSSES)
    decay_bias_tables: bool = setting(
        False, "weight decay on relative position bias tables, their MLPs and scales of logits, too, as in the "
        "published runs, whose exclusion of them names no parameter", "SimMIM",
    )  # fmt: skip

    num_classes: int | None = setting(None, "classes of the labels (default: those of the data)", "supervised")
    label_smoothing: float = setting(0.1, "share of each target that is spread over all classes", "supervised")
    mixup: float | None = setting(
        None, "mix pairs of images by a share from Beta(X, X); 0 for none (default: 0.8 from 50 epochs on, else 0)",
        "supervised",
    )  # fmt: skip
    cutmix: float | None = setting(
        None,
        "paste a part of an image into another one; 0 for none (default: 1 from 50 epochs on, else 0)",
        "supervised",
    )

    momentum: float | None = setting(
        None, "share that the moving average keeps at the first step; it rises to 1 along half a cosine (default: "
        "0.99; dino: 0.996; --target ema: 0.999)", "joint embedding",
    )  # fmt: skip
    mlp_dim: int | None = setting(
        None, "width of the hidden layers behind the encoder (default: 4096; dino: 2048)", "joint embedding"
    )
    color_jitter: float | None = setting(
        None, "largest change of brightness and contrast of a view; of colours, saturation changes by half of it, hue "
        "by a quarter; 0 for none (default: 0.4)", "joint embedding",
    )  # fmt: skip
    blur_prob: float | None = setting(
        None, "share of the views that are blurred (default: all first ones, a tenth of the second ones; dino: half of "
        "the local ones)", "joint embedding",
    )  # fmt: skip
    solarize_prob: float | None = setting(
        None, "share of the second views that are solarised, as no others are (default: 0.2)", "joint embedding"
    )
    temperature: float = setting(0.2, "similarities are divided by it", "MoCo v3")
    out_dim: int = setting(256, "width of what projector and predictor give", "MoCo v3")
    stop_grad_conv1: bool = setting(True, "leave the patch projection as it was initialised", "MoCo v3")
    sincos_positions: bool = setting(
        True, "fixed 2-d sine-cosine positions of a ViT, in place of learned ones", "MoCo v3"
    )

    local_crops: int = setting(2, "local views per image, besides two global ones (published: 8)", "DINO")
    local_size: int | None = setting(
        None, "side of the local views in pixels (default: 3/7 of --img-size in whole patches)", "DINO"
    )
    local_scale: float = setting(
        0.05, "smallest area of a local view's crop; the largest is --crop-scale, above which global views begin",
        "DINO",
    )  # fmt: skip
    prototypes: int = setting(2048, "length of the distributions that are compared (published: 65536)", "DINO")
    bottleneck_dim: int = setting(256, "width of what is compared with the prototypes", "DINO")
    student_temp: float = setting(0.1, "temperature of the student's softmax", "DINO")
    teacher_temp: float = setting(0.04, "temperature of the teacher's softmax, after its warm-up", "DINO")
    warmup_teacher_temp: float = setting(0.04, "the same at the beginning of the warm-up", "DINO")
    warmup_teacher_temp_epochs: int = setting(
        0, "epochs in which the teacher's temperature rises, such as 30 of 100 to --teacher-temp 0.07", "DINO"
    )
    weight_decay_end: float = setting(0.4, "weight decay at the end of a cosine that begins with its own", "DINO")

    data: str = setting(
        "digits", "digits (embedded, no download), fashion-mnist (of the Debian package dataset-fashion-mnist, or in "
        "--data-root), an image folder, or torchvision:NAME", "data", metavar="DATA",
    )  # fmt: skip
    data_root: str = shared("data_root")
    max_pixels: int = shared("max_pixels")
    pixel_range: str = shared("pixel_range")
    pixel_stats: str = setting(
        "auto", "mean and deviation that pixels are normalised by: imagenet; data, measured on training images once; "
        "MEAN/STD with commas between channels, in [0, 1]; auto: imagenet, those of the set for fashion-mnist", "data",
        metavar="STATS",
    )  # fmt: skip
    val_data: str | None = setting(
        None, "images to validate on, a folder or a set (default: the set's own test images, if it has any)", "data",
        metavar="DATA",
    )  # fmt: skip
    val_split: float | None = setting(
        None, "share of the training images that is held out to validate on, chosen by name", "data", metavar="SHARE"
    )
    val_every: float | None = shared("val_every")
    val_images: int = setting(1024, "most images to validate on, spread over those there are", "data")
    val_masks: int = setting(4, "masks per validation image, the same every time; the loss is their mean", "data")
    crop_scale: float | None = setting(
        None,
        "smallest area of the random crop, 1 for none (default: 0.2; digits, fashion-mnist: 0.6; mocov3: 0.08; "
        "dino: 0.4)",
        "data",
    )
    hflip: bool | None = shared("hflip")
    workers: int | None = shared("workers")

    batch_size: int = setting(64, "images per process and forward pass", "optimisation")
    accum_steps: int = shared("accum_steps")
    epochs: int = setting(100, "passes over the data", "optimisation")
    warmup_epochs: float | None = setting(
        None,
        "epochs of linear learning-rate warm-up (default: a twentieth of all; supervised: a fifth; mocov3: 40 of 300; "
        "dino: a tenth)",
        "optimisation",
    )
    blr: float | None = setting(
        None, "base learning rate: lr = blr * effective batch size / 256 (default: 1.5e-4; supervised: 2.5e-4; "
        "dino: 5e-4)",
        "optimisation",
    )  # fmt: skip
    lr: float | None = shared("lr")
    min_lr: float = shared("min_lr")
    min_blr: float | None = shared("min_blr")
    warmup_blr: float = shared("warmup_blr")
    schedule: str = shared("schedule")
    step_epoch: float | None = shared("step_epoch")
    beta2: float | None = setting(
        None, "decay of AdamW's mean of squared gradients (default: 0.999; mae: 0.95)", "optimisation"
    )
    weight_decay: float | None = setting(
        None,
        "weight decay, not on biases, norms and other 1-d parameters (default: 0.05; mocov3: 0.1; dino: 0.04)",
        "optimisation",
    )
    clip_grad: float | None = setting(
        None, "clip the gradient norm to this (default: no clipping; dino: 3, of each parameter)", "optimisation"
    )
    seed: int = setting(0, "seed of weights, order, augmentation and masks", "optimisation")

    head_stats: str = shared("head_stats")
    head_stats_every: int = shared("head_stats_every")
    analyze_every: float = setting(
        0.0, "epochs between records of what the heads do on 64 images, whole and the same every time, for the report "
        "and `analyze --during`; 0 for none", "heads",
    )  # fmt: skip
    regularize: dict = shared("regularize")  # noqa: RUF009 # a field

    device: str = shared("device")
    precision: str = shared("precision")
    compile: bool = shared("compile")

    output: str = shared("output")
    save_every: float = shared("save_every")
    keep_checkpoints: int = shared("keep_checkpoints")
    log_every: int = shared("log_every")
    pictures: int = setting(12, "reconstructed images in the report", "output")
    title: str = setting("", "title of the report (default: method, model and data)", "output")

    @classmethod
    def continued(cls, saved: dict[str, Any], given: dict[str, Any]) -> Self:
        """As the parent's; a teacher outside timm and the file system has to be given again.

        Raises:
            ValueError: the settings of the checkpoint alone name one: a file makes nobody reach a hub.
        """
        from mimkernels.models.targets import split_targets

        named = {name: str(saved.get(name, "")) for name in ("target", "teacher")}
        for name, model in [
            *(("target", text.removeprefix("features:")) for _, text in split_targets(named["target"])),
            ("teacher", named["teacher"]),
        ]:
            if name not in given and re.match(r"[a-z-]+hub:|[a-z]+-dir:", model):
                raise ValueError(
                    f"the checkpoint names a teacher that is fetched, {name} {saved[name]!r}: give --{name} again to "
                    "load it"
                )
        return super().continued(saved, given)

    def check(self) -> None:
        """Raise ValueError for values that cannot work, before anything is written."""
        super().check()
        for name in ("decoder_dim", "decoder_depth", "decoder_heads"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("local_crops", "warmup_teacher_temp_epochs"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        maskings = (*MASKINGS, NO_MASKING)
        require(self.masking in maskings, "masking", self.masking, f"one of {', '.join(maskings)}")
        ratio = self.mask_ratio
        require(ratio is None or 0 < ratio < 1, "mask_ratio", ratio, "between 0 and 1, both excluded")
        momentum = self.teacher_momentum
        require(0 <= momentum < 1, "teacher_momentum", momentum, "at least 0 and below 1")
        if self.masking != "attention_guided" and (self.teacher != EMA or momentum != 0.996):
            raise ValueError(
                f"teacher and teacher_momentum are for masking 'attention_guided', got teacher {self.teacher!r}, "
                f"momentum {momentum} and masking {self.masking!r}"
            )
        if self.teacher != EMA:
            require_unset(self, ["teacher_momentum"], f"on teacher {self.teacher!r}, which stays as it is")
        if self.masking == NO_MASKING:
            require_unset(self, ["mask_ratio", "masking_kwargs"], f"with masking {NO_MASKING!r}")
        require(self.loss in LOSSES, "loss", self.loss, f"one of {', '.join(LOSSES)}")
        for name in ("mask_unit", "mlp_dim", "out_dim", "local_size", "prototypes", "bottleneck_dim"):
            width = getattr(self, name)
            require(width is None or width >= 1, name, width, "at least 1")
        for name in ("color_jitter", "blur_prob", "solarize_prob"):
            share = getattr(self, name)
            require(share is None or 0 <= share <= 1, name, share, "in [0, 1]")
        kept = self.momentum
        require(kept is None or 0 <= kept <= 1, "momentum", kept, "in [0, 1]")
        require(0 < self.local_scale <= 1, "local_scale", self.local_scale, "in (0, 1]")
        for name in ("temperature", "student_temp", "teacher_temp", "warmup_teacher_temp"):
            value = getattr(self, name)
            require(value > 0 and math.isfinite(value), name, value, "positive and finite")
        value = self.weight_decay_end
        require(value >= 0 and math.isfinite(value), "weight_decay_end", value, "0 or more and finite")
        share = self.val_split
        require(share is None or 0 < share < 1, "val_split", share, "between 0 and 1, both excluded")
        if share is not None and self.val_data is not None:
            raise ValueError(f"give val_data or val_split, got {self.val_data!r} and {share}")
        if self.pixel_stats not in MEASURED:
            from mimkernels.models.build import parse_statistics

            parse_statistics(self.pixel_stats, self.in_chans)
        if self.patch_size is not None:
            require(self.patch_size >= 1, "patch_size", self.patch_size, "at least 1")
            if self.img_size % self.patch_size:
                raise ValueError(
                    f"img_size {self.img_size} is not divisible by patch_size {self.patch_size}: "
                    f"try --img-size {max(1, self.img_size // self.patch_size) * self.patch_size}"
                )
        check_method(self)
        if not self.the_method.masks:
            require_unset(self, ["val_masks"], f"with method {self.method!r}, which masks nothing")
        elif self.masking == NO_MASKING:
            require_unset(self, ["val_masks"], f"with masking {NO_MASKING!r}")
