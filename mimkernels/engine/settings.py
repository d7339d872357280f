"""Settings of a command: a dataclass that is at once command-line options, checks and the saved JSON."""

import argparse
import difflib
import json
import sys
import types
import typing
from dataclasses import MISSING, Field, asdict, field, fields
from pathlib import Path
from typing import Any

from mimkernels._options import option_value

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")


def setting(default: Any, help: str, group: str, **extra: Any) -> Any:
    """A field of ``Settings``, with what its command-line option shows."""
    return field(default=default, metadata={"help": help, "group": group, **extra})


class Settings:
    """Base of dataclasses of settings: saved as JSON, read back with checks."""

    __dataclass_fields__: typing.ClassVar[dict[str, Field[Any]]]  # of the subclass

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> typing.Self:
        """Rebuild from saved values; names that are unknown and values of another type are refused by name."""
        known = {f.name: f.type for f in fields(cls)}
        for name, value in values.items():
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                raise ValueError(f"unknown setting {name!r}" + (f": did you mean {close[0]!r}?" if close else ""))
            if not is_of_type(value, known[name]):
                wanted = getattr(known[name], "__name__", None) or str(known[name])
                raise ValueError(f"setting {name!r} must be {wanted}, got {type(value).__name__} {str(value)[:60]!r}")
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> typing.Self:
        """From a file that ``to_json`` filled; ValueError names the file and what is wrong with it."""
        values = read_settings(path)
        try:
            return cls.from_dict(values)
        except ValueError as e:
            raise ValueError(f"{str(path)!r} does not hold settings: {e}") from e


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a file, whichever command's they are; ValueError names the file and what is wrong with it."""
    try:
        values = json.loads(Path(path).read_text())
        if not isinstance(values, dict):
            raise ValueError(f"expected an object, found {type(values).__name__}")
    except (ValueError, RecursionError) as e:  # of JSON and of UTF-8 as well
        raise ValueError(f"{str(path)!r} does not hold settings: {e}") from e
    return values


def require(condition: bool, name: str, value: Any, wanted: str) -> None:
    """Raise ValueError that names the setting, what it must be and what it is, unless `condition` holds."""
    if not condition:
        raise ValueError(f"{name} must be {wanted}, got {value}")


def default_of(f: Field) -> Any:
    """The value of a setting that nobody gave."""
    return f.default if f.default_factory is MISSING else f.default_factory()


def require_unset(settings: Settings, names: typing.Iterable[str], where: str) -> None:
    """Raise ValueError if a setting has another value than its default, though nothing reads it: `where` says why."""
    for name in names:
        value = getattr(settings, name)
        if value != default_of(settings.__dataclass_fields__[name]):
            raise ValueError(f"{name} has no effect {where}, got {value!r}")


def require_seed(seed: int) -> None:
    """Raise ValueError unless all that draws can begin from `seed`."""
    require(0 <= seed < 2**63, "seed", seed, "in 0..2^63 - 1")


def add_arguments(parser: argparse.ArgumentParser, kind: type[Settings]) -> None:
    """One option per field. Defaults are left out of the namespace, so that it holds what the user gave and no more.

    The metadata of a field may hold ``short``, a second name of its option, ``positional=True`` for a list that is
    given without an option, ``nargs`` for a list of fixed length, ``hidden=True`` where it has no option, and
    ``joined``, what stands between the values of an option that is given several times.
    """
    groups: dict[str, argparse._ArgumentGroup] = {}
    for f in fields(kind):
        meta = f.metadata
        if meta.get("hidden"):
            continue
        group = groups.setdefault(meta["group"], parser.add_argument_group(meta["group"]))
        options = ["--" + f.name.replace("_", "-"), *filter(None, [meta.get("short")])]
        default = default_of(f)
        scalar, optional = _scalar_type(f.type)
        text = meta["help"]
        if not optional and scalar is not dict and default not in ("", []):
            text += f" (default: {('yes' if default else 'no') if scalar is bool else default})"
        common: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if (typing.get_origin(scalar) or scalar) is list:
            names = [f.name] if meta.get("positional") else options
            group.add_argument(*names, nargs=meta.get("nargs", "*"), metavar=meta["metavar"], **common)
        elif scalar is dict:
            group.add_argument(*options, nargs="+", type=_pair, metavar="NAME=VALUE", **common)
        elif scalar is bool:
            group.add_argument(*options, action=argparse.BooleanOptionalAction, **common)
        else:
            metavar = None if "choices" in meta else meta.get("metavar", {int: "N", float: "X", str: "NAME"}[scalar])
            if "joined" in meta:
                common |= {"action": _Joined, "joined": meta["joined"]}
            group.add_argument(*options, type=scalar, choices=meta.get("choices"), metavar=metavar, **common)


class _Joined(argparse.Action):
    """Values of an option that is given several times, as one text."""

    def __init__(self, *args: Any, joined: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.joined = joined

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        before = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, values if before is None else f"{before}{self.joined}{values}")


def given_arguments(args: argparse.Namespace, kind: type[Settings]) -> dict[str, Any]:
    """The settings that were given on the command line."""
    given = {f.name: getattr(args, f.name) for f in fields(kind) if hasattr(args, f.name)}
    dicts = {f.name for f in fields(kind) if f.type is dict}
    return {name: dict(value) if name in dicts else value for name, value in given.items()}


def is_of_type(value: Any, annotation: Any) -> bool:
    """Whether a value read from a file is what a field of a dataclass is annotated with.

    An int is also a float, unless it is larger than floats are.
    """
    if isinstance(annotation, types.UnionType):
        return any(is_of_type(value, kind) for kind in typing.get_args(annotation))
    kind, items = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if isinstance(value, bool):
        return kind is bool
    if not isinstance(value, (int, float) if kind is float else kind):
        return False
    if kind is float and isinstance(value, int) and abs(value) > sys.float_info.max:
        return False
    return not isinstance(value, list) or not items or all(is_of_type(item, items[0]) for item in value)


def _scalar_type(annotation: Any) -> tuple[Any, bool]:
    if isinstance(annotation, types.UnionType):
        kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        return kinds[0], True
    return annotation, False


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, option_value(value)


def changes(saved: Settings, now: Settings, names: typing.Iterable[str]) -> list[str]:
    """``name: saved -> now`` for each named setting that differs."""
    return [
        f"{name}: {getattr(saved, name)!r} -> {getattr(now, name)!r}"
        for name in names
        if getattr(saved, name) != getattr(now, name)
    ]
