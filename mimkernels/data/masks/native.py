"""The native module of block masks, or why it is not there. Without it the same masks are drawn in Python."""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import sysconfig
from dataclasses import replace
from types import ModuleType

from mimkernels.ops import _native

_NAME = "mimkernels_masks"


def module() -> ModuleType | None:
    """The module, which is loaded once; None if ``state`` says why not."""
    return _loaded()[0]


def state() -> _native.NativeLibrary:
    """The module's state as ``mimkernels info`` shows that of the libraries."""
    return _loaded()[1]


@functools.cache
def _loaded() -> tuple[ModuleType | None, _native.NativeLibrary]:
    path = _native.FOLDER / f"{_NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    library = _native.NativeLibrary("masks", path, build=_native.read_build())
    if not path.exists():
        others = sorted(other.name for other in _native.FOLDER.glob(f"{_NAME}.*"))
        if others:
            reason = f"built for another Python ({', '.join(others)}; this one needs {path.name})"
            return None, replace(library, reason=reason, remedy="reinstall mimkernels with this Python")
        refusal = _native.missing(library)
        assert refusal is not None
        return None, replace(library, reason=refusal[0], remedy=refusal[1])
    try:
        loader = importlib.machinery.ExtensionFileLoader(_NAME, str(path))
        spec = importlib.util.spec_from_file_location(_NAME, path, loader=loader)
        assert spec is not None
        loaded = importlib.util.module_from_spec(spec)
        loader.exec_module(loaded)
    except Exception as error:  # whatever a broken file does, the package works without it
        message = " ".join(str(error).split()) or type(error).__name__
        return None, replace(library, reason=f"{path.name} does not load: {message}", remedy=_native.REINSTALL)
    return loaded, replace(library, loaded=True, reason=None)
