"""Which implementations an op has, and which one a call gets.

An op's ``spec.py`` states its schemas, its shape functions and one row per backend; this module turns the
rows into torch ops (one overload per backend) and chooses among them.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from mimkernels.ops import _autograd, _gpus, _native
from mimkernels.ops._autograd import Gradient, Kernel, Run

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

    def reasons(
        self, device: torch.device | str, dtype: torch.dtype, sizes: dict[str, int], named: bool = False
    ) -> list[str]:
        """Why this implementation does not take these inputs; empty if it does."""
        backend = BACKENDS[self.backend]
        kind, index = _kind_and_index(device)
        found = []
        if self.backend in _UNAVAILABLE:
            found.append(_UNAVAILABLE[self.backend])
        if self.backend != "reference" and torch.jit.is_tracing():
            found.append("torch.jit.trace records no overloads, and so not which backend runs")
        if self.backend != "reference" and not named and _autograd.forward_mode():
            found.append("has no forward-mode gradients")
        if not backend.runs_on(kind, named):
            hint = " (TRITON_INTERPRET=1 runs it on CPU tensors)" if self.backend == "triton" else ""
            runs_on = _words(backend.devices or backend.testing_devices)
            found.append(f"runs on {runs_on}, the inputs are on {kind}{hint}")
        elif kind == "cuda" and self.backend not in _UNAVAILABLE:
            refusal = _gpus.refusal(self.backend, index, named)
            if refusal is not None:
                found.append(refusal)
        if dtype not in self.dtypes:
            found.append(f"takes {_words(self.dtypes)}, got {_words((dtype,))}")
        for name, most in self.limits.items():
            if name in sizes and sizes[name] > most:
                found.append(f"takes at most {most} {name}, got {sizes[name]}")
        for name, divisor in self.multiples.items():
            if name in sizes and (sizes[name] % divisor or sizes[name] == 0):
                found.append(f"takes {name} in multiples of {divisor}, got {sizes[name]}")
        return found


@dataclass(frozen=True)
class OpSpec:
    """An op: schemas by name (without the overload), shape functions by the same names, rows by priority.

    ``gradient`` differentiates the first schema by means of the others, which cannot be differentiated. Without it the
    outputs carry no gradient.
    """

    name: str
    schemas: dict[str, str]
    fakes: dict[str, Run]
    impls: tuple[Impl, ...]
    gradient: Gradient | None = None
    kernels: dict[str, dict[str, Kernel]] = field(default_factory=dict)  # by backend and schema; register fills it

    def overload(self, schema: str, backend: str) -> torch._ops.OpOverload:
        """The torch op ``mimkernels::<schema>.<backend>``."""
        packet: torch._ops.OpOverloadPacket = getattr(torch.ops.mimkernels, schema)
        overload: torch._ops.OpOverload = getattr(packet, _overload_name(backend))
        return overload

    def runner(self, backend: str, reference: Run, tracked: bool) -> Run:
        """What runs on a resolved backend.

        Args:
            backend: its name.
            reference: the op in plain PyTorch.
            tracked: whether a gradient is wanted.
        """
        if backend == "reference":
            return reference
        kernel = self.kernels[backend][next(iter(self.schemas))]
        if _autograd.transformed():
            return kernel.dispatched
        if tracked:
            return kernel.tracked
        return kernel.inference if torch.is_inference_mode_enabled() else kernel.direct

    def plain_ops(self, backend: str) -> tuple[Run, ...] | None:
        """What an autograd.Function that puts the ops of all schemas together calls, in their order.

        None where there are none (the reference) or the dispatcher must see each op on its own: under torch.func, and
        in what is exported, where torch.export keeps the function's forward alone, without gradients.
        """
        if backend == "reference" or torch.compiler.is_exporting():
            return None
        first, *others = (self.kernels[backend][schema] for schema in self.schemas)
        if torch.compiler.is_compiling():
            return first.dispatched, *(other.dispatched for other in others)
        return None if _autograd.transformed() else (first.direct, *(other.backward for other in others))

    def resolve(self, backend: str, device: torch.device | str, dtype: torch.dtype, **sizes: int) -> str:
        """The name of the backend that runs this call.

        Args:
            backend: ``"auto"`` (then ``use_backend`` and ``MIMKERNELS_BACKEND`` decide) or a backend's name.
            device: of the inputs, or its type: then the current device of that type.
            dtype: dtype of the main input.
            sizes: sizes that a row may limit, by name.

        Raises:
            ValueError: no backend has that name.
            NotImplementedError: nothing takes these inputs; lists each backend's reasons.
        """
        wanted = backend_in_force() if backend == "auto" else backend
        if not isinstance(wanted, str):
            raise TypeError(f"{self.name}: backend must be a str, got {type(wanted).__name__}")
        if wanted != "auto" and wanted not in BACKENDS:
            raise ValueError(f"{self.name}: unknown backend {wanted!r}; known: auto, {', '.join(BACKENDS)}")
        kind, _ = _kind_and_index(device)
        for impl in self.impls:
            named = impl.backend == wanted
            if not (named or wanted == "auto") or not BACKENDS[impl.backend].runs_on(kind, named):
                continue
            if not impl.reasons(device, dtype, sizes, named):
                return impl.backend
        raise NotImplementedError(self.refusal(wanted, device, dtype, sizes))

    def refusal(self, wanted: str, device: torch.device | str, dtype: torch.dtype, sizes: dict[str, int]) -> str:
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
_BY_ENVIRONMENT = os.environ.get("MIMKERNELS_BACKEND") or "auto"
forced = ContextVar("backend of mimkernels", default=_BY_ENVIRONMENT)  # the backend that use_backend names
# What torch.compile traces can set no context variable, and read one (with a guard) since torch 2.14: there a block is
# seen here. Before 2.14 all blocks are, of every thread.
_TRACED_CONTEXT = _native.torch_version() >= (2, 14)
_traced_blocks: list[str] = []


def register(spec: OpSpec) -> OpSpec:
    """Define the op's overloads with shapes and gradients; native kernels attach when their library loads."""
    if _native.has_emulation():
        spec = replace(spec, impls=(*spec.impls, *_emulated(spec.impls)))
    for impl in spec.impls:
        if impl.backend == "reference":
            continue
        kernels = spec.kernels.setdefault(impl.backend, {})
        for schema, signature in reversed(spec.schemas.items()):
            name = f"{schema}.{_overload_name(impl.backend)}"
            _LIBRARY.define(f"{name}{signature}", tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(f"mimkernels::{name}", spec.fakes[schema], lib=_LIBRARY)
            if impl.backend == "triton":
                _LIBRARY.impl(name, _lazy_triton(spec.name, schema), "CompositeExplicitAutograd")
            first = schema == next(iter(spec.schemas))
            kernels[schema] = _autograd.attach(
                _LIBRARY,
                spec.overload(schema, impl.backend),
                spec.fakes[schema],
                spec.gradient if first else _autograd.refused(name),
                [*reversed(kernels.values())],
            )
    SPECS[spec.name] = spec
    return spec


def _overload_name(backend: str) -> str:
    return backend.replace("-", "_")


def _emulated(impls: tuple[Impl, ...]) -> list[Impl]:
    """What runs on CUDA runs emulated, within the same limits."""
    return [replace(impl, backend=EMULATION.name) for impl in impls if impl.backend == "cuda"]


def _lazy_triton(op: str, schema: str) -> Run:
    # Triton is imported at the first launch, so that `import mimkernels` stays quick and works without it.
    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"mimkernels.ops.{op}.triton"), schema)(*args)

    return launch


def finish_loading() -> None:
    """Load the native libraries and note what is missing; called once, after every op is registered."""
    _native.load()
    for name, backend in BACKENDS.items():
        reason = backend.unavailable()
        if reason is not None:
            _UNAVAILABLE[name] = reason
    if _BY_ENVIRONMENT != "auto" and _BY_ENVIRONMENT not in BACKENDS:
        raise ValueError(f"MIMKERNELS_BACKEND={_BY_ENVIRONMENT!r} is unknown; known: auto, {', '.join(BACKENDS)}")


def backend_state(name: str) -> str | None:
    """Why the backend cannot run in this process, or None if it can."""
    return _UNAVAILABLE.get(name)


def backend_in_force() -> str:
    """The backend of calls that name none: ``"auto"``, or what ``use_backend`` or ``MIMKERNELS_BACKEND`` names."""
    if torch.compiler.is_compiling() and (_traced_blocks or not _TRACED_CONTEXT):
        return _traced_blocks[0] if _traced_blocks else _BY_ENVIRONMENT
    return forced.get()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op of the calling thread on one backend while the block runs; it never falls back.

    Other threads, new ones too, and other asyncio tasks are not concerned. Backward runs on the backend of its forward,
    whichever thread runs it; what checkpointing computes again in backward on a GPU does so on autograd's own thread,
    where the call itself or ``MIMKERNELS_BACKEND`` must name the backend. Code that torch.compile traced before torch
    2.14 takes the block that any thread entered last.

    Args:
        name: ``"auto"``, or a name from ``mimkernels info``.

    Raises:
        ValueError: no backend has that name.
        TypeError: `name` is no str.
    """
    if not isinstance(name, str):
        raise TypeError(f"a backend is named by a str, got {type(name).__name__}")
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known: auto, {', '.join(BACKENDS)}")
    traced = torch.compiler.is_compiling()
    if traced or not _TRACED_CONTEXT:
        _traced_blocks.insert(0, name)  # so that remove takes the latest of a name
    token = None if traced else forced.set(name)
    try:
        yield
    finally:
        if token is not None:
            forced.reset(token)
        if traced or not _TRACED_CONTEXT:
            _traced_blocks.remove(name)


def _kind_and_index(device: torch.device | str) -> tuple[str, int | None]:
    return (device, None) if isinstance(device, str) else (device.type, device.index)


def _words(things: Iterable[object]) -> str:
    return "/".join(str(thing).removeprefix("torch.") for thing in things)
