"""Which implementations an op has, and which one a call gets.

An op's ``spec.py`` states its schemas, its shape functions and one row per backend; this module turns the
rows into torch ops (one overload per backend) and chooses among them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from mimkernels.ops import _native

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ANY_FLOAT = (*FLOATS, torch.float64)

# Interpreted Triton runs on CPU tensors, thousands of times slower than anything else: by name only.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@dataclass(frozen=True)
class Backend:
    """How a family of implementations is reached, and on which devices it runs."""

    name: str
    devices: tuple[str, ...] | None  # None: every device
    library: str | None = None  # the native library that holds its kernels
    testing_devices: tuple[str, ...] = ()  # taken by name, never by "auto"

    def runs_on(self, device: str, named: bool) -> bool:
        return self.devices is None or device in self.devices or (named and device in self.testing_devices)

    def unavailable(self) -> str | None:
        """Why nothing of this backend can run in this process, or None."""
        if self.library is not None:
            return _native.library(self.library).reason
        if self.name == "triton" and importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install triton)"
        return None


BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("triton", ("cuda",), testing_devices=("cpu",) if TRITON_INTERPRETED else ()),
        Backend("cuda", ("cuda",), library="cuda"),
        Backend("cpu", ("cpu",), library="cpu"),
        Backend("reference", None),
    )
}
# The CUDA kernels run on the host by csrc/emulation, which finds their faults: for tests, by name only.
EMULATION = Backend("cuda-emulated", (), library=_native.EMULATED, testing_devices=("cpu",))
if _native.has_emulation():
    BACKENDS[EMULATION.name] = EMULATION


@dataclass(frozen=True)
class Impl:
    """One row of an op's table: a backend, the dtypes it takes, upper limits and divisors of named sizes."""

    backend: str
    dtypes: tuple[torch.dtype, ...] = FLOATS
    limits: dict[str, int] = field(default_factory=dict)
    multiples: dict[str, int] = field(default_factory=dict)

    def reasons(self, device: str, dtype: torch.dtype, sizes: dict[str, int], named: bool = False) -> list[str]:
        """Why this implementation does not take these inputs; empty if it does."""
        backend = BACKENDS[self.backend]
        found = []
        if self.backend in _UNAVAILABLE:
            found.append(_UNAVAILABLE[self.backend])
        if not backend.runs_on(device, named):
            hint = " (TRITON_INTERPRET=1 runs it on CPU tensors)" if self.backend == "triton" else ""
            runs_on = _words(backend.devices or backend.testing_devices)
            found.append(f"runs on {runs_on}, the inputs are on {device}{hint}")
        if dtype not in self.dtypes:
            found.append(f"takes {_words(self.dtypes)}, got {_words((dtype,))}")
        for name, most in self.limits.items():
            if name in sizes and sizes[name] > most:
                found.append(f"takes at most {most} {name}, got {sizes[name]}")
        for name, divisor in self.multiples.items():
            if name in sizes and sizes[name] % divisor:
                found.append(f"takes {name} in multiples of {divisor}, got {sizes[name]}")
        return found


@dataclass(frozen=True)
class OpSpec:
    """An op: schemas by name (without the overload), shape functions by the same names, rows by priority."""

    name: str
    schemas: dict[str, str]
    fakes: dict[str, Callable]
    impls: tuple[Impl, ...]

    def overload(self, schema: str, backend: str):
        """The torch op ``mimkernels::<schema>.<backend>``."""
        return getattr(getattr(torch.ops.mimkernels, schema), _overload_name(backend))

    def runner(
        self, backend: str, reference: Callable, function: type[torch.autograd.Function] | None, tracked: bool
    ) -> Callable:
        """What runs on a resolved backend.

        Args:
            backend: its name.
            reference: the op in plain PyTorch.
            function: takes the torch ops of all schemas, in their order, before the op's own arguments; None if the op
                has no gradient.
            tracked: whether a gradient is wanted.
        """
        if backend == "reference":
            return reference
        if tracked:
            return partial(function.apply, *(self.overload(schema, backend) for schema in self.schemas))
        return self.overload(next(iter(self.schemas)), backend)

    def resolve(self, backend: str, device: str, dtype: torch.dtype, **sizes: int) -> str:
        """The name of the backend that runs this call.

        Args:
            backend: ``"auto"`` (then ``use_backend`` and ``MIMKERNELS_BACKEND`` decide) or a backend's name.
            device: device type of the inputs, such as ``"cuda"``.
            dtype: dtype of the main input.
            sizes: sizes that a row may limit, by name.

        Raises:
            ValueError: no backend has that name.
            NotImplementedError: nothing takes these inputs; lists each backend's reasons.
        """
        wanted = forced if backend == "auto" else backend
        if wanted != "auto" and wanted not in BACKENDS:
            raise ValueError(f"{self.name}: unknown backend {wanted!r}; known: auto, {', '.join(BACKENDS)}")
        for impl in self.impls:
            named = impl.backend == wanted
            if not (named or wanted == "auto") or not BACKENDS[impl.backend].runs_on(device, named):
                continue
            if not impl.reasons(device, dtype, sizes, named):
                return impl.backend
        raise NotImplementedError(self.refusal(wanted, device, dtype, sizes))

    def refusal(self, wanted: str, device: str, dtype: torch.dtype, sizes: dict[str, int]) -> str:
        """The message of a refused call: the inputs, and every backend's reasons."""
        given = ", ".join([f"device {device}", f"dtype {_words((dtype,))}", *(f"{k} {v}" for k, v in sizes.items())])
        lines = [f"{self.name}: backend {wanted!r} does not take these inputs ({given})."]
        rows = {impl.backend: impl for impl in self.impls}
        for name in BACKENDS:
            if name not in rows:
                lines.append(f"  {name}: does not implement {self.name}")
            else:
                why = rows[name].reasons(device, dtype, sizes, named=True)
                lines.append(f"  {name}: {'; '.join(why) if why else 'takes them'}")
        return "\n".join(lines)


SPECS: dict[str, OpSpec] = {}

_LIBRARY = torch.library.Library("mimkernels", "FRAGMENT")
_UNAVAILABLE: dict[str, str] = {}
forced = "auto"  # the backend that use_backend or MIMKERNELS_BACKEND names


def register(spec: OpSpec) -> OpSpec:
    """Define the op's overloads with their shape functions; native kernels attach when their library loads."""
    if _native.has_emulation():
        spec = replace(spec, impls=(*spec.impls, *_emulated(spec.impls)))
    for impl in spec.impls:
        if impl.backend == "reference":
            continue
        for schema, signature in spec.schemas.items():
            name = f"{schema}.{_overload_name(impl.backend)}"
            _LIBRARY.define(f"{name}{signature}", tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"mimkernels::{name}", spec.fakes[schema], lib=_LIBRARY)
            if impl.backend == "triton":
                _LIBRARY.impl(name, _lazy_triton(spec.name, schema), "CompositeExplicitAutograd")
    SPECS[spec.name] = spec
    return spec


def _overload_name(backend: str) -> str:
    return backend.replace("-", "_")


def _emulated(impls: tuple[Impl, ...]) -> list[Impl]:
    """What runs on CUDA runs emulated, within the same limits."""
    return [replace(impl, backend=EMULATION.name) for impl in impls if impl.backend == "cuda"]


def _lazy_triton(op: str, schema: str) -> Callable:
    # Triton is imported at the first launch, so that `import mimkernels` stays quick and works without it.
    def launch(*args):
        return getattr(importlib.import_module(f"mimkernels.ops.{op}.triton"), schema)(*args)

    return launch


def finish_loading() -> None:
    """Load the native libraries and note what is missing; called once, after every op is registered."""
    _native.load()
    for name, backend in BACKENDS.items():
        reason = backend.unavailable()
        if reason is not None:
            _UNAVAILABLE[name] = reason
    wanted = os.environ.get("MIMKERNELS_BACKEND") or "auto"
    if wanted != "auto" and wanted not in BACKENDS:
        raise ValueError(f"MIMKERNELS_BACKEND={wanted!r} is unknown; known: auto, {', '.join(BACKENDS)}")
    _force(wanted)


def backend_state(name: str) -> str | None:
    """Why the backend cannot run in this process, or None if it can."""
    return _UNAVAILABLE.get(name)


def _force(name: str) -> str:
    global forced
    before, forced = forced, name
    return before


@contextmanager
def use_backend(name: str):
    """Run every op inside the block on one backend; it never falls back.

    Args:
        name: ``"auto"``, or a name from ``mimkernels info``. Process-wide while the block runs.

    Raises:
        ValueError: no backend has that name.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known: auto, {', '.join(BACKENDS)}")
    before = _force(name)
    try:
        yield
    finally:
        _force(before)


def _words(things: tuple) -> str:
    return "/".join(str(thing).removeprefix("torch.") for thing in things)
