"""What a run starts from: an encoder, how it was built, and which labelled images."""

from typing import Any

import numpy as np
import torch

from mimkernels.commands.finetune.config import FinetuneConfig, parse_labels
from mimkernels.data.batches import derived_seed
from mimkernels.data.labelled import LabelledImages
from mimkernels.data.sources import Source, SubsetSource
from mimkernels.engine.encoder import FrozenEncoder, load_same_encoder
from mimkernels.engine.model_names import ModelChoice
from mimkernels.models.build import format_statistics

_LABELS = 7  # stream of the seed; the others are in data/batches.py, engine/training/loop.py and validation.py

# Arguments of timm's models that have an option of their own here, or follow from the data.
_ELSEWHERE = {"img_size": "--img-size", "num_classes": "the data", "global_pool": "--readout"}


def load_source(config: FinetuneConfig) -> tuple[FrozenEncoder, dict[str, Any]]:
    """The encoder that ``--model`` names, and the settings that it tells: those of the architecture and of pixels.

    A timm name without its published weights is trained from scratch.

    Raises:
        ValueError: there is no such encoder, timm has none that it could be given to, or ``model_kwargs`` names what
            has an option of its own.
    """
    given = config.model_kwargs
    said = [f"{name} ({by} says it)" for name, by in _ELSEWHERE.items() if name in given]
    if given.get("drop_path_rate", config.drop_path) != config.drop_path:
        said.append(f"drop_path_rate {given['drop_path_rate']} (--drop-path says {config.drop_path})")
    if said:
        raise ValueError(f"model_kwargs has {', '.join(said)}: leave it out there")
    pretrained = config.pretrained and not config.from_scratch
    choice = ModelChoice(config.model, config.model, config.arch, given, pretrained, config.img_size or None)
    encoder = load_same_encoder(choice, to_copy=True, seed=config.seed)
    if encoder.pretrained and not config.pretrained and not config.from_scratch:
        raise ValueError(
            f"--no-pretrained takes a timm name with random weights, and {config.model!r} has weights of its own; "
            "--from-scratch takes its architecture alone"
        )
    if encoder.built_by is None:
        raise ValueError(f"{encoder.title} is not fine-tuned: timm has no equal model")
    arch, kwargs = encoder.built_by
    arguments = {**kwargs, **_of_beit(encoder.model), **given, "drop_path_rate": config.drop_path}
    for name in ("img_size", "in_chans", "num_classes", "global_pool"):
        arguments.pop(name, None)
    channels = given.get("in_chans", encoder.in_chans)
    if channels != encoder.in_chans:
        raise ValueError(f"model_kwargs has in_chans {channels}, {encoder.title} takes {encoder.in_chans}")
    stats = [tuple(float(value) for value in values) for values in _statistics(encoder)]
    return encoder, {
        "from_scratch": config.from_scratch or not encoder.pretrained,
        "arch": arch,
        "patch_size": arguments.pop("patch_size", None),
        "model_kwargs": arguments,
        "img_size": config.img_size or encoder.img_size,
        "in_chans": encoder.in_chans,
        "pixel_stats": format_statistics(*stats),
        "pixel_range": encoder.pixel_range if config.pixel_range == "auto" else config.pixel_range,
    }


def choose_labels(images: LabelledImages, labels: str, seed: int, classes: list[str]) -> Source:
    """The images that ``--labels`` leaves: equally many of each class, all of a class that has fewer.

    Of one seed, the choice of fewer images is part of that of more. Where the number does not divide by the classes,
    some that the seed draws have one more.
    """
    share, each = parse_labels(labels)
    targets = images.targets.numpy()
    if share is None and each is None:
        return _subset(images, np.arange(len(targets)))
    drawn = np.random.default_rng(derived_seed(seed, _LABELS))
    members = [drawn.permutation(np.flatnonzero(targets == number)) for number in range(len(classes))]
    order = drawn.permutation(len(members))  # of the classes: who gets what is left over
    if each is not None:
        counts = np.array([min(each, len(of_class)) for of_class in members])
    else:
        assert share is not None
        wanted = round(share * len(targets))
        if wanted < len(members):
            raise ValueError(
                f"labels {labels!r} of {len(targets):,} images are {wanted}, fewer than the {len(members)} classes"
            )
        counts = np.zeros(len(members), dtype=int)
        while counts.sum() < wanted:
            room = [number for number in order if counts[number] < len(members[number])]
            least = min(counts[number] for number in room)
            poorest = [number for number in room if counts[number] == least]
            counts[poorest[: wanted - counts.sum()]] += 1
    chosen = np.concatenate([of_class[:count] for of_class, count in zip(members, counts, strict=True)])
    return _subset(images, np.sort(chosen))


def as_source(images: LabelledImages) -> Source:
    """The images of one half of a split."""
    return _subset(images, np.arange(len(images)))


def _subset(images: LabelledImages, positions: np.ndarray) -> Source:
    indices = images.indices[positions]
    whole = len(indices) == len(images.source)
    return images.source if whole else SubsetSource(images.source, indices)


def _of_beit(encoder: Any) -> dict[str, Any]:
    """Arguments of a BEiT: defaults of timm and SimMIM differ; a table that all blocks share goes into each."""
    if not hasattr(encoder, "rel_pos_bias"):
        return {}
    table = getattr(encoder.blocks[0].attn, "relative_position_bias_table", None)
    gamma = getattr(encoder.blocks[0], "gamma_1", None)
    return {
        "use_abs_pos_emb": encoder.pos_embed is not None,
        "use_rel_pos_bias": encoder.rel_pos_bias is not None or table is not None,
        "use_shared_rel_pos_bias": False,
        "init_values": None if gamma is None else 0.1,
    }


def _statistics(encoder: FrozenEncoder) -> tuple[torch.Tensor, torch.Tensor]:
    return encoder._shift.flatten() / 255, 1 / (255 * encoder._scale.flatten())
