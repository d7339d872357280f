"""From a configuration to the module that is trained. A further method is one more branch of ``build_model``."""

import torch

from mimkernels.commands.pretrain.config import ARCHITECTURE_FIELDS, PretrainConfig
from mimkernels.engine.settings import changes

# Statistics of ImageNet, per channel and for luminance, in units of [0, 1].
COLOUR = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_GREY = ((0.449,), (0.226,))


def build_model(config: PretrainConfig) -> torch.nn.Module:
    """Build the freshly initialised model; ValueError names what does not fit. The caller sets the seed."""
    from mimkernels.models import MAE

    mean, std = COLOUR if config.in_chans == 3 else _GREY
    own = {
        "img_size": config.img_size,
        "in_chans": config.in_chans,
        "patch_size": config.patch_size,
        "decoder_dim": config.decoder_dim,
        "decoder_depth": config.decoder_depth,
        "decoder_heads": config.decoder_heads,
        "mask_ratio": config.mask_ratio,
        "norm_pix_loss": config.norm_pix_loss,
        "mean": mean,
        "std": std,
    }
    repeated = sorted({"name", *own}.intersection(config.model_kwargs))
    if repeated:
        raise ValueError(f"model_kwargs repeats {', '.join(repeated)}, which is given by an option of its own")
    # Not from_timm: the settings may be those of a file.
    return MAE.from_config({"name": config.model, **own, **config.model_kwargs})


def check_same_architecture(saved: PretrainConfig, now: PretrainConfig, path: str) -> None:
    """Refuse a checkpoint of another architecture or method, showing both sides."""
    different = changes(saved, now, ARCHITECTURE_FIELDS)
    if different:
        raise ValueError(
            f"checkpoint {path!r} is of another architecture or method (checkpoint -> asked for): "
            f"{'; '.join(different)}"
        )
