"""Settings of an analysis, and the models that its arguments name."""

from dataclasses import dataclass, field

from mimkernels.data import MAX_PIXELS
from mimkernels.engine.model_names import parse_models
from mimkernels.engine.settings import DEVICES, PRECISIONS, Settings, require, setting

UNITS = ("pixel", "patch", "unit")
X_AXES = ("layer", "depth")
SPLITS = ("test", "train")


@dataclass
class AnalyzeConfig(Settings):
    """Everything that an analysis depends on."""

    models: list[str] = field(
        default_factory=list,
        metadata={
            "help": "run folder or checkpoint of `mimkernels pretrain`, a published checkpoint, or a timm name; "
            "NAME=MODEL names it, and several runs of one name are its seeds; options follow colons: arch, img_size, "
            "pretrained, and timm's own, as in small=vit_tiny_patch16_224:img_size=32:depth=6",
            "group": "models", "positional": True, "nargs": "+", "metavar": "MODEL",
        },
    )  # fmt: skip
    compare: list[str] = field(
        default_factory=list,
        metadata={
            "help": "names of two models, such as before and after fine-tuning: also draw what differs, layer by layer",
            "group": "models", "nargs": 2, "metavar": ("BEFORE", "AFTER"),
        },
    )  # fmt: skip

    data: str = setting("digits", "digits (embedded), fashion-mnist, a folder of images, or torchvision:NAME", "data",
                        metavar="DATA")  # fmt: skip
    data_root: str = setting("data", "where fashion-mnist is looked for, and torchvision sets are kept or downloaded "
                             "to", "data", metavar="DIR")  # fmt: skip
    split: str = setting("test", "images of the set's test part, if it has one, or of its training part", "data",
                         choices=SPLITS)  # fmt: skip
    images: int = setting(1000, "number of images, spread evenly over the set", "data")
    max_pixels: int = setting(MAX_PIXELS, "refuse image files of more pixels, before they are decoded", "data")
    pixel_range: str = setting("auto", "values that become black and white in grey images of more than 8 bits", "data",
                               metavar="LOW,HIGH")  # fmt: skip
    workers: int | None = setting(None, "data-loading processes; 0 for none (default: by the cores)", "data")

    unit: str = setting("pixel", "of attention distances; unit: sides of the image", "figures", choices=UNITS)
    x: str = setting("layer", "horizontal axis: number of the layer, or its relative depth from 0 to 1", "figures",
                     choices=X_AXES)  # fmt: skip

    depth_probe: bool = setting(True, "fit a linear classifier on the tokens after every block, where images have "
                                "classes", "figures")  # fmt: skip
    importance: int = setting(0, "images on which every head is taken out once, to see what it is worth, a pass for "
                              "each; 0 for none", "figures")  # fmt: skip
    during: bool = setting(False, "also draw how the heads of runs changed while they were trained with "
                           "--analyze-every", "figures")  # fmt: skip
    viewer_images: int = setting(16, "images of the page on which attention can be looked at, 0 for none", "figures")

    batch_size: int = setting(64, "images at a time; CKA is an average over these batches", "execution")
    device: str = setting("auto", "where to compute", "execution", choices=DEVICES)
    precision: str = setting("fp32", "of the encoders; auto takes bf16 where it is fast", "execution",
                             choices=PRECISIONS)  # fmt: skip
    output: str = setting("runs/analysis", "output folder; what it holds of a model is not computed again", "output",
                          metavar="DIR", short="-o")  # fmt: skip
    title: str = setting("", "title of the report", "output")

    def check(self) -> None:
        """Raise ValueError for values that cannot work, before anything is read or written."""
        from mimkernels.data.pixels import Decoder

        if not self.models:
            raise ValueError("models are missing: name at least one run folder, checkpoint or timm model")
        require(self.images >= 4, "images", self.images, "at least 4 (CKA compares images with each other)")
        require(self.batch_size >= 4, "batch_size", self.batch_size, "at least 4 (CKA compares images of a batch)")
        require(self.importance >= 0, "importance", self.importance, "0 or more")
        require(self.viewer_images >= 0, "viewer_images", self.viewer_images, "0 or more")
        require(self.workers is None or self.workers >= 0, "workers", self.workers, "0 or more")
        choices = (("split", SPLITS), ("unit", UNITS), ("x", X_AXES), ("device", DEVICES), ("precision", PRECISIONS))
        for name, known in choices:
            require(getattr(self, name) in known, name, getattr(self, name), f"one of {', '.join(known)}")
        Decoder.from_settings(self.max_pixels, self.pixel_range)
        names = [choice.name for choice in parse_models(self.models)]
        require(len(self.compare) in (0, 2), "compare", self.compare, "two names of models")
        for name in self.compare:
            require(name in names, "compare", repr(name), f"a name of a model: {', '.join(dict.fromkeys(names))}")
        if len(self.compare) == 2:
            require(self.compare[0] != self.compare[1], "compare", " ".join(self.compare), "two different models")
