"""The native libraries: which are there and loaded, and for the others why not and what to do about it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent.parent / "_lib"
OLDEST_TORCH = (2, 10)  # TORCH_TARGET_VERSION in CMakeLists.txt

REINSTALL = "reinstall mimkernels with MIMKERNELS_BUILD=require to see the whole error"


@dataclass(frozen=True)
class NativeLibrary:
    """State of one native library in this process."""

    name: str
    path: Path
    loaded: bool = False
    reason: str | None = "not loaded yet"  # why it is not loaded
    remedy: str | None = None
    isa: str | None = None  # the instruction set whose kernels run
    build: dict[str, Any] = field(default_factory=dict, repr=False)  # build.json: compiler, flags, torch, targets


EMULATED = "cuda_emulated"  # the CUDA kernels compiled for the host, for tests: only source trees have it
_LIBRARIES = {name: NativeLibrary(name, FOLDER / f"libmimkernels_{name}.so") for name in ("cpu", "cuda", EMULATED)}
if not _LIBRARIES[EMULATED].path.exists():
    del _LIBRARIES[EMULATED]
_tried = False


def library(name: str) -> NativeLibrary:
    """The state of library ``"cpu"``, ``"cuda"`` or, where it was built, ``"cuda_emulated"``."""
    return _LIBRARIES[name]


def has_emulation() -> bool:
    """Whether the CUDA kernels were also built for the host."""
    return EMULATED in _LIBRARIES


def libraries() -> tuple[NativeLibrary, ...]:
    """The states of all native libraries."""
    return tuple(_LIBRARIES.values())


def torch_version() -> tuple[int, int]:
    """Major and minor version of torch."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def load() -> None:
    """Load what is there, once per process, after the schemas were defined. Failing is a state, not an error.

    Raises:
        ValueError: MIMKERNELS_CPU_ISA names what the CPU or the library does not have.
    """
    global _tried
    if _tried:
        return
    _tried = True
    build = read_build()
    for name, state in _LIBRARIES.items():
        _LIBRARIES[name] = _load(replace(state, build=build))


def read_build() -> dict[str, Any]:
    """What build.json says of the build; empty if there was none."""
    try:
        build = json.loads((FOLDER / "build.json").read_text())
        return build if isinstance(build, dict) else {}
    except (OSError, ValueError):
        return {}


def _load(state: NativeLibrary) -> NativeLibrary:
    refusal = missing(state) or _refused_by_torch(state)
    if refusal:
        return replace(state, reason=refusal[0], remedy=refusal[1])
    try:
        torch.ops.load_library(str(state.path))
        isa = torch.ops.mimkernels.cpu_isa() if state.name == "cpu" else None
    except Exception as error:  # whatever a broken file does, the package works without it
        message = " ".join(str(error).split()) or type(error).__name__
        if message.startswith("MIMKERNELS_CPU_ISA="):
            raise ValueError(message) from None
        return replace(state, reason=f"{state.path.name} does not load: {message}", remedy=REINSTALL)
    return replace(state, loaded=True, reason=None, isa=isa)


def missing(state: NativeLibrary) -> tuple[str, str] | None:
    """Why a library's file is not there, and the remedy; None if it is."""
    if state.path.exists():
        return None
    facts = state.build.get("libraries", {}).get(state.name, {})
    if facts.get("reason"):
        return f"not built: {facts['reason']}", facts.get("remedy") or REINSTALL
    if state.build:
        return f"{state.path} was built but is gone", "reinstall mimkernels"
    reason, remedy = "not built: this source tree was never installed", "make build, or pip install -e ."
    if hidden := _hidden_package():
        return f"{reason}, and hides {hidden}, which is", f"run in another folder than the clone, or {remedy}"
    return reason, remedy


def _hidden_package() -> Path | None:
    """An installed mimkernels in place of which this source tree was imported, as Python does in the tree's folder."""
    folders = (Path(str(found.locate_file("mimkernels"))) for found in metadata.distributions(name="mimkernels"))
    here = FOLDER.parent
    return next((folder for folder in folders if folder.is_dir() and folder.resolve() != here), None)


def _refused_by_torch(state: NativeLibrary) -> tuple[str, str] | None:
    version = torch.__version__
    if torch_version() < OLDEST_TORCH:
        return f"needs torch >= {'.'.join(map(str, OLDEST_TORCH))}, this is torch {version}", "update torch"
    if state.name == "cuda" and torch.version.cuda is None:
        return f"this torch ({version}) was built without CUDA", "install a CUDA build of torch (pytorch.org)"
    return None
