"""The models that arguments of a command name: ``NAME=MODEL:OPTION=VALUE``."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mimkernels._options import option_value
from mimkernels.engine.progress import printable
from mimkernels.engine.settings import require

# Anything but a path, an option, or two names ("a | b" in the numbers of an analysis).
_NAME = re.compile(r"([^:=/|\x00-\x1f]*[^:=/|\s\x00-\x1f][^:=/|\x00-\x1f]*)=(.+)", re.DOTALL)
_OPTION = re.compile(r":([A-Za-z_]\w*)=([^:/]*)$")


@dataclass
class ModelChoice:
    """One model: what ``load_encoder`` needs, and its name in figures."""

    name: str
    model: str
    arch: str | None = None
    model_kwargs: dict = field(default_factory=dict)
    pretrained: bool = True
    img_size: int | None = None
    final_norm: bool = True


def parse_models(texts: list[str]) -> list[ModelChoice]:
    """``NAME=MODEL:OPTION=VALUE`` of every model, in order.

    Raises:
        ValueError: an option of another type, or two models that have one name which nobody gave them.
    """
    choices: list[ModelChoice] = []
    named: list[bool] = []
    for text in texts:
        match = None if Path(text).exists() else _NAME.fullmatch(text)
        given, model = (match[1].strip(), match[2]) if match else (None, text)
        options: dict[str, Any] = {}
        while not Path(model).exists() and (option := _OPTION.search(model)):
            options = {option[1]: option_value(option[2]), **options}
            model = model[: option.start()]
        choice = ModelChoice(printable(given or _name_of(model)), model, options.pop("arch", None))
        choice.pretrained = options.pop("pretrained", True)
        choice.img_size = options.pop("img_size", None)
        choice.model_kwargs = options
        require(isinstance(choice.pretrained, bool), f"pretrained of {text!r}", choice.pretrained, "true or false")
        size = choice.img_size
        require(size is None or (type(size) is int and size >= 1), f"img_size of {text!r}", size, "at least 1")
        same = [other for other, known in zip(choices, named, strict=True) if other.name == choice.name and not known]
        if same or (given is None and choice.name in [other.name for other in choices]):
            raise ValueError(
                f"two models are called {choice.name!r}: name them, as in a={same[0].model if same else model} "
                f"b={model}; one name for both, if they are runs of one model"
            )
        choices.append(choice)
        named.append(given is not None)
    return choices


def _name_of(model: str) -> str:
    path = Path(model)
    if path.is_file() and path.parent.name == "checkpoints":
        return path.parent.parent.name or model
    if path.is_dir():
        return path.resolve().name
    return path.stem if path.is_file() else model
