"""A whole training step in a CUDA graph: forward, loss, backward, optimizer, started by one launch."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mimkernels.models.mae import MAE
from mimkernels.ops._checks import positive

__all__ = ["CapturedStep", "captured_step"]


def captured_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    clip_grad: float | None = None,
    autocast: torch.dtype | None = None,
    offset: int = 0,
    warmup: int = 3,
    stand_in: bool = False,
    **arguments: Any,
) -> "CapturedStep":
    """Training steps of `model` that a CUDA graph replays: ``loss = step(images)``, in place of the usual five lines.

    The host starts a step by one launch and a few copies, whatever the number of kernels; it never waits for the
    device. A replay computes what the eager step would: it draws new masks (`offset` lies on the device), new dropout
    and stochastic depth (from torch's generator of the device), and follows the learning rate of every group of the
    optimizer.

    Before a graph can be captured, everything in it must have run: the driver loads kernels at their first launch,
    Triton compiles them, the optimizer makes its moments. The first `warmup` calls are such runs, on the stream that
    is captured afterwards; they train, like any other call. The last of them fails where the step waits for the device,
    which a graph cannot do. The call after them captures.

    Args:
        model: MAE, SimMIM, Supervised, or what else returns something with a ``loss`` for ``model(images, ...)``; on a
            CUDA device, in training mode.
        optimizer: of its parameters, made with ``capturable=True``, such as ``torch.optim.AdamW``. The learning rate
            may change from step to step; it is rounded to fp32. What else its groups hold stays as it is.
        images: a batch, for its shape, dtype and device; nothing is computed of it.
        loss: of what the model returns, the scalar to be minimised; None takes its ``loss``. Terms of head statistics
            go in here.
        clip_grad: largest norm of all gradients together; None: they are not clipped.
        autocast: torch.bfloat16, or None for the dtype of the weights.
        offset: of the first step's masks, where the model draws any; each step after it has the next.
        warmup: calls before the capture, at least 2.
        stand_in: run eagerly what a graph would replay, on any device: for tests without a GPU.
        arguments: others of the model's ``forward``. Tensors (``targets``, ``noise``) come anew with every step, of the
            same shapes; what else there is (``seed``) stays as it is.

    Raises:
        TypeError, ValueError: what cannot be captured, with the reason.

    Example::

        model = MAE.from_timm("vit_tiny_patch16_224", depth=2, decoder_depth=1).to(images.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, capturable=images.is_cuda)
        step = captured_step(model, optimizer, images, stand_in=not images.is_cuda)
        for images in loader:  # in pinned memory, so that their copy does not wait either
            loss = step(images)
    """
    _check(model, optimizer, images, arguments, autocast=autocast, offset=offset, warmup=warmup, stand_in=stand_in)
    if clip_grad is not None:
        clip_grad = positive("captured_step", "clip_grad", clip_grad)
    return CapturedStep(
        model,
        optimizer,
        images,
        arguments,
        loss=loss,
        clip_grad=clip_grad,
        autocast=autocast,
        offset=offset,
        warmup=warmup,
        graph=_EagerGraph() if stand_in else _CUDAGraph(images.device),
    )


class CapturedStep:
    """What ``captured_step`` returns: call it with the images of a step.

    Gradients are gone after every step. State that the model keeps on the host stays as it was at the capture.

    Attributes:
        calls: how many steps there were.
        offset: of the masks of the next step.
        captured: whether there is a graph yet.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        images: Tensor,
        arguments: Mapping[str, Any],
        *,
        loss: Callable[[Any], Tensor] | None,
        clip_grad: float | None,
        autocast: torch.dtype | None,
        offset: int,
        warmup: int,
        graph: "_EagerGraph | _CUDAGraph",
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.calls, self.offset, self.captured = 0, offset, False
        self._loss_of, self._clip_grad, self._autocast = loss, clip_grad, autocast
        self._to_warm_up, self._graph = warmup, graph
        self._device = images.device
        # Where every replay reads and writes.
        self._images = torch.empty_like(images, memory_format=torch.contiguous_format)
        self._tensors = {
            name: torch.empty_like(value, device=self._device, memory_format=torch.contiguous_format)
            for name, value in arguments.items()
            if isinstance(value, Tensor)
        }
        self._others = {name: value for name, value in arguments.items() if name not in self._tensors}
        self._draws = "offset" in inspect.signature(model.forward).parameters
        self._at = torch.zeros((), dtype=torch.int64, device=self._device)
        self._loss = torch.zeros((), device=self._device)
        self._rates = [torch.zeros((), device=self._device) for _ in optimizer.param_groups]
        self._settings = self._fixed_settings()
        self._places: tuple[int, ...] = ()

    def __call__(self, images: Tensor, *, offset: int | None = None, **tensors: Tensor) -> Tensor:
        """One step.

        Args:
            images: of the shape and dtype of those given first, on the device or the host. Fewer of them, such as the
                last of an epoch, are a step without graph.
            offset: of this step's masks; None: one more than the last.
            tensors: those of ``captured_step``, of this step.

        Returns:
            The loss before the step, fp32, detached, in memory of its own.

        Raises:
            TypeError, ValueError: images, tensors or settings of the optimizer are not those that were captured.
            RuntimeError: the step cannot be captured; or model or optimizer have moved since.
        """
        self._check_call(images, tensors)
        self.offset = self.offset if offset is None else offset
        with self._rates_on_device():
            self._at.fill_(self.offset)
            if len(images) < len(self._images):
                given = {name: value.to(self._device, non_blocking=True) for name, value in tensors.items()}
                self._run(images.to(self._device, non_blocking=True), given)
            else:
                self._images.copy_(images, non_blocking=True)
                for name, value in tensors.items():
                    self._tensors[name].copy_(value, non_blocking=True)
                self._replay()
        self.calls += 1
        self.offset += 1
        return self._loss.clone()

    def _replay(self) -> None:
        if self._to_warm_up:
            with _explained():
                self._graph.warm_up(self._run_static, strict=self._to_warm_up == 1)
            self._to_warm_up -= 1
            return
        if not self.captured:
            with _explained():
                self._graph.capture(self._run_static)
            self.captured, self._places = True, self._pointers()
        self._graph.replay()

    def _run_static(self) -> None:
        self._run(self._images, self._tensors)

    def _run(self, images: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """The step. All that it reads and writes lies on the device."""
        arguments = {**self._others, **tensors, **({"offset": self._at} if self._draws else {})}
        self._forget_gradients()
        with torch.autocast(self._device.type, self._autocast, enabled=self._autocast is not None):
            out = self.model(images, **arguments)
            loss: Tensor = out.loss if self._loss_of is None else self._loss_of(out)
        loss.backward()
        if self._clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._clip_grad)
        self.optimizer.step()
        self._forget_gradients()
        self._loss.copy_(loss.detach())

    def _forget_gradients(self) -> None:
        """Those of weights that the optimizer does not have would otherwise add up."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)

    @contextlib.contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """The groups' learning rates in tensors that a graph reads, until the step is over."""
        groups = self.optimizer.param_groups
        given = [group["lr"] for group in groups]
        try:
            for group, rate, value in zip(groups, self._rates, given, strict=True):
                rate.fill_(value)
                group["lr"] = rate
            yield
        finally:
            for group, value in zip(groups, given, strict=True):
                group["lr"] = value

    def _check_call(self, images: Tensor, tensors: Mapping[str, Tensor]) -> None:
        wanted = self._images
        if images.dtype != wanted.dtype or images.shape[1:] != wanted.shape[1:] or len(images) > len(wanted):
            raise ValueError(
                f"captured_step: the graph takes images {list(wanted.shape)} {wanted.dtype}, or fewer of them, got "
                f"{list(images.shape)} {images.dtype}"
            )
        if tensors.keys() != self._tensors.keys():
            raise TypeError(
                f"captured_step: every step takes the tensors {_words(self._tensors)} beside the images, "
                f"got {_words(tensors)}"
            )
        for name, value in tensors.items():
            static = self._tensors[name]
            shape = (len(images), *static.shape[1:]) if static.shape[:1] == wanted.shape[:1] else tuple(static.shape)
            if tuple(value.shape) != shape or value.dtype != static.dtype:
                raise ValueError(
                    f"captured_step: {name} must be {list(shape)} {static.dtype}, got {list(value.shape)} {value.dtype}"
                )
        if not self.model.training:
            raise ValueError("captured_step: the model is in eval mode; call model.train() before the step")
        settings = self._fixed_settings()
        for before, now in zip(self._settings, settings, strict=True):
            for key in before:
                if now.get(key) is not before[key] and now.get(key) != before[key]:
                    raise ValueError(
                        f"captured_step: {key} of the optimizer was {before[key]} and is {now.get(key)}, but a graph "
                        "follows the learning rate alone; make another captured_step"
                    )
        if self.captured and self._pointers() != self._places:
            raise RuntimeError(
                "captured_step: weights or moments lie elsewhere than when the graph was captured (moved, or a "
                "checkpoint loaded); make another captured_step"
            )

    def _fixed_settings(self) -> list[dict[str, Any]]:
        """What the groups hold beside weights, the learning rate, and what schedulers keep there."""
        left_out = ("params", "lr", "initial_lr")
        return [
            {key: value for key, value in group.items() if key not in left_out} for group in self.optimizer.param_groups
        ]

    def _pointers(self) -> tuple[int, ...]:
        """Where the first weight of every group and its moments lie."""
        firsts = [group["params"][0] for group in self.optimizer.param_groups if group["params"]]
        states = [value for weight in firsts for value in self.optimizer.state.get(weight, {}).values()]
        return tuple(tensor.data_ptr() for tensor in (*firsts, *states) if isinstance(tensor, Tensor))


class _CUDAGraph:
    """A graph of torch.cuda, and the stream that it is captured on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph = torch.cuda.CUDAGraph()
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, step: Callable[[], None], *, strict: bool) -> None:
        """Run the step on the stream of the capture, which has workspaces of its own; `strict` refuses to wait."""
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        mode = torch.cuda.get_sync_debug_mode()
        try:
            if strict:
                torch.cuda.set_sync_debug_mode("error")
            with torch.cuda.stream(self._stream):
                step()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            here.wait_stream(self._stream)

    def capture(self, step: Callable[[], None]) -> None:
        # Backward runs on autograd's own thread, and loaders pin memory on theirs: another mode would refuse both.
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            step()

    def replay(self) -> None:
        self._graph.replay()


class _EagerGraph:
    """Stands in for a graph: what was captured runs eagerly, from the same memory."""

    _step: Callable[[], None]

    def warm_up(self, step: Callable[[], None], *, strict: bool) -> None:
        step()

    def capture(self, step: Callable[[], None]) -> None:
        self._step = step

    def replay(self) -> None:
        self._step()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Errors of the driver say that something cannot be captured, and not what."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ("captur", "synchroniz")):
            raise
        raise RuntimeError(
            "captured_step: a part of the step cannot be captured: it waits for the device (.item(), .cpu(), a tensor "
            f"made of Python numbers, a hook that prints), or allocates outside of torch. {error}"
        ) from error


def _check(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    arguments: Mapping[str, Any],
    *,
    autocast: torch.dtype | None,
    offset: int,
    warmup: int,
    stand_in: bool,
) -> None:
    if isinstance(model, DistributedDataParallel):
        raise TypeError("captured_step: DistributedDataParallel reduces gradients by hooks of its own; give its module")
    if not isinstance(model, nn.Module):
        raise TypeError(f"captured_step: model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(images, Tensor):
        raise TypeError(
            f"captured_step: images must be one tensor, got {type(images).__name__}: models of several views have a "
            "teacher that follows outside of the step"
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"captured_step: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if autocast == torch.float16 or getattr(optimizer, "scaler", None) is not None:
        raise ValueError(
            "captured_step: fp16 needs a GradScaler, which looks at the gradients to decide whether to step at all, "
            "and so waits for the device; use autocast=torch.bfloat16"
        )
    if warmup < 2:
        raise ValueError(f"captured_step: warmup must be at least 2, got {warmup}: kernels load at their first launch")
    if type(offset) is not int:
        raise TypeError(f"captured_step: offset must be an int, got {type(offset).__name__}")
    if isinstance(getattr(model, "_orig_mod", model), MAE) and arguments.get("mask") is not None:
        raise ValueError("captured_step: MAE counts the visible patches of a mask on the host; give noise, or neither")
    if any(getattr(part, "grad_checkpointing", False) for part in model.modules()):
        raise ValueError(
            "captured_step: gradient checkpointing keeps torch's random state, which a graph has not; switch it off"
        )
    where = {weight.device for group in optimizer.param_groups for weight in group["params"]}
    if where != {images.device}:
        raise ValueError(f"captured_step: images are on {images.device} but the weights are on {_words(where)}")
    if stand_in:
        return
    if images.device.type != "cuda":
        raise ValueError(f"captured_step: CUDA graphs are of CUDA devices, got {images.device}; run the step as it is")
    if not all(group.get("capturable") for group in optimizer.param_groups):
        raise ValueError(
            f"captured_step: {type(optimizer).__name__} keeps its step count on the host; make it with "
            "capturable=True, if it has that, as torch.optim.AdamW"
        )


def _words(values: Any) -> str:
    return ", ".join(sorted(map(str, values))) or "none"
