"""What fp16 has no room for in a gradient is infinite: a GradScaler skips such a step; a wrong one it would take."""

import pytest
import torch

from mimkernels import attention
from mimkernels.testing import DEVICE, backends

HERE = ("cpu", "triton", "cuda-emulated", "reference") if DEVICE == "cpu" else ("triton", "cuda", "reference")
each_backend = pytest.mark.parametrize("backend", [name for name in backends("attention") if name in HERE])


def gradients(cosine: bool, size: float, dtype: torch.dtype, backend: str) -> dict[str, torch.Tensor]:
    """Those of q, k and v, with dS of up to some 60 times `size`; inputs are the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = torch.randn(4, 1, 1, 17, 16, generator=generator).to(DEVICE)
    # Cosines: of vectors about as long as 1, so that their lengths change dS little.
    lengths = {"q": 0.25, "k": 0.25, "v": 100.0} if cosine else {"q": 1.0, "k": 0.05, "v": 100.0}
    tensors = {name: lengths[name] * tensor for name, tensor in zip("qkv", (q, k, v), strict=True)}
    tensors = {name: tensor.half().to(dtype).requires_grad_() for name, tensor in tensors.items()}
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    options = {"logit_scale": torch.zeros(1, dtype=exact, device=DEVICE)} if cosine else {}
    attention(**tensors, **options, backend=backend).out.backward((size * grad).half().to(dtype))
    return {name: tensor.grad.double() for name, tensor in tensors.items()}


@pytest.mark.parametrize("size", [200.0, 4000.0, 12000.0])
@pytest.mark.parametrize("cosine", [False, True], ids=["plain", "cosine"])
@each_backend
@pytest.mark.filterwarnings("ignore:.*encountered in")  # by numpy, in Triton's interpreter
def test_a_gradient_is_right_or_not_finite(backend, cosine, size):
    exact = gradients(cosine, size, torch.float64, "reference")
    for name, got in gradients(cosine, size, torch.float16, backend).items():
        finite, wanted = got.isfinite(), exact[name]
        assert not (finite & (wanted.abs() > 66000)).any(), f"{name}: more than fp16 has room for, but finite"
        error = (got - wanted)[finite].abs()
        assert (error <= 0.005 * wanted.abs().max()).all(), f"{name}: wrong by {error.max()}, but finite"
        if size == 200 and backend != "reference":  # whose products are rounded more often
            assert finite.all(), f"{name}: there is room for {wanted.abs().max()}"


@each_backend
def test_vectors_without_length_leave_the_others_gradients(backend):
    """The factor of such a vector, a quotient by the least length, is finite in fp32 alone."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 5, 16, generator=generator).half().to(DEVICE) for _ in range(3))
    q[..., 0, :] = k[..., 1, :] = 0
    tensors = [tensor.requires_grad_() for tensor in (q, k, v)]
    attention(*tensors, logit_scale=torch.zeros(1, device=DEVICE), backend=backend).out.sum().backward()
    for tensor in tensors:
        assert tensor.grad[..., 2:, :].isfinite().all()
