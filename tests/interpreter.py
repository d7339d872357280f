"""Triton's interpreter, without what takes more than half of its time."""

import dataclasses
import functools
import importlib.util
from typing import Any


def quicken_interpreter() -> None:
    """Leave out what the interpreter does again and again, to the same effect.

    Before a kernel runs, it replaces the functions of ``triton.language``, which it finds by looking at every name
    there; and so again whenever the kernel calls another function, thousands of times per launch. Here what a launch
    has replaced stays until it ends. And it makes a table each time for numpy's dtype of a number, lists and names for
    the shape of every tensor; here it keeps them. Whether sums and products of integers overflow it finds out for an
    assertion that only its debug mode has; here, only there.
    """
    if importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch: Any = getattr(interpreter, "_patch_lang", None)
    if patch is None or hasattr(patch, "__wrapped__"):  # another Triton is left as it is; or done already
        return
    run, numpy_dtype = interpreter.GridExecutor.__call__, interpreter._get_np_dtype
    patched: set[str] | None = None  # by the launch that runs
    known: dict[str, Any] = {}

    @functools.cache
    def languages(fn) -> frozenset[str]:
        return frozenset(value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core)

    @functools.wraps(patch)
    def patch_new(fn):
        if patched is not None:
            if languages(fn) <= patched:
                return interpreter._LangPatchScope()
            patched.update(languages(fn))
        return patch(fn)

    @functools.wraps(run)
    def launch(self, *args, **kwargs):
        nonlocal patched
        patched = set()
        try:
            return run(self, *args, **kwargs)
        finally:
            patched = None

    @functools.wraps(numpy_dtype)
    def known_dtype(of):
        element = of.element_ty if isinstance(of, tl.block_type) else of
        if isinstance(element, tl.pointer_type):
            return numpy_dtype(element)
        if element.name not in known:
            known[element.name] = numpy_dtype(element)
        return known[element.name]

    of_block, of_tensor = tl.block_type.__init__, tl.tensor.__init__
    blocks: dict[Any, dict[str, Any]] = {}  # by shape and dtype, what is not their own in types of blocks
    tensors: dict[Any, dict[str, Any]] = {}  # by shape, what is not their own in tensors

    @functools.wraps(of_block)
    def block(self, element_ty, shape):
        key = (element_ty.name, *(size.value if isinstance(size, tl.constexpr) else size for size in shape))
        if key in blocks and isinstance(shape, (list, tl.tuple)):
            self.__dict__.update(blocks[key], element_ty=element_ty)
        else:
            of_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))

    @functools.wraps(of_tensor)
    def tensor(self, handle, type):
        key = (*type.shape,) if type.is_block() else ()
        if key in tensors:
            self.__dict__.update(tensors[key], handle=handle, type=type, dtype=type.scalar)
        else:
            of_tensor(self, handle, type)
            tensors[key] = {
                name: value for name, value in vars(self).items() if name not in ("handle", "type", "dtype")
            }

    tl.block_type.__init__, tl.tensor.__init__ = block, tensor
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
    interpreter._patch_lang = patch_new
    interpreter.GridExecutor.__call__ = launch
    interpreter._get_np_dtype = known_dtype
