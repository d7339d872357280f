from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mimkernels.ops import _checks
from mimkernels.ops._memo import by_signature
from mimkernels.ops.restore_tokens import reference
from mimkernels.ops.restore_tokens.spec import SPEC


def restore_tokens(
    x: Tensor,
    ids_restore: Tensor,
    mask_token: Tensor,
    pos: Tensor | None = None,
    num_prefix: int = 0,
    *,
    backend: str = "auto",
) -> Tensor:
    """The decoder's input in one pass: unshuffle the visible tokens, fill the gaps, add positions.

    Args:
        x: ``[B, P + K, D]`` prefix tokens, then the visible tokens, fp32, fp16 or bf16 (fp64 on the reference).
        ids_restore: ``[B, N]`` int64 or int32 in ``[0, N)``: patch n is visible token ``ids_restore[b, n]`` where
            that is below K, the mask token elsewhere.
        mask_token: ``[D]`` or ``[1, 1, D]``.
        pos: ``[P + N, D]`` or ``[1, P + N, D]`` positions added to every token, or None.
        num_prefix: P, prefix tokens at the front of ``x``, which stay there.
        backend: ``"auto"`` or a name from ``mimkernels info``. A named backend never falls back.

    Returns:
        ``[B, P + N, D]``, dtype of ``x``. Gradients reach ``x``, ``mask_token`` and ``pos``.

    Raises:
        ValueError: shapes or devices disagree; the message shows both sides.
        TypeError: a dtype that the op does not take.
        IndexError: an id is out of range (checked on CPU; on CUDA only with ``MIMKERNELS_DEBUG=1``, to avoid a sync).
        NotImplementedError: no backend takes these inputs; lists each backend's reasons.

    Source: the decoder input of MAE, arXiv:2111.06377.
    """
    run, tensors, options = _checked((x, ids_restore, mask_token, pos), num_prefix, backend)
    return run(*tensors, *options)


@by_signature
def _checked(
    x: Tensor, ids_restore: Tensor, mask_token: Tensor, pos: Tensor | None, num_prefix: int, backend: str
) -> tuple[Callable[..., Tensor], tuple[Tensor, Tensor, Tensor, Tensor | None], tuple[int]]:
    op = "restore_tokens"
    _checks.has_rank(op, "x", x, 3)
    _checks.is_float(op, "x", x)
    ids_restore = _checks.token_ids(op, "ids_restore", ids_restore, (2,), "x", x)
    _checks.same_size(op, "ids_restore", ids_restore, 0, "x", x, 0)
    _checks.prefix_count(op, num_prefix, x.shape[1])
    tokens = ids_restore.shape[1]
    if x.shape[1] - num_prefix > tokens:
        raise ValueError(
            f"{op}: x has {x.shape[1] - num_prefix} visible tokens ({_checks.shape(x)}, num_prefix {num_prefix}) "
            f"but ids_restore {_checks.shape(ids_restore)} restores only {tokens}"
        )
    mask_token = _checks.parameter(op, "mask_token", mask_token, 1, "x", x)
    _checks.same_size(op, "mask_token", mask_token, 0, "x", x, 2)
    if pos is not None:
        pos = _checks.parameter(op, "pos", pos, 2, "x", x)
        if pos.shape[0] != num_prefix + tokens:
            raise ValueError(
                f"{op}: pos {_checks.shape(pos)} must have num_prefix {num_prefix} + {tokens} patches of "
                f"ids_restore {_checks.shape(ids_restore)} = {num_prefix + tokens} rows"
            )
        _checks.same_size(op, "pos", pos, 1, "x", x, 2)
    name = SPEC.resolve(backend, x.device, x.dtype)
    run = SPEC.runner(name, reference.restore_tokens, _checks.needs_grad(x, mask_token, pos))
    return run, (_checks.rows(x), ids_restore, mask_token, pos), (num_prefix,)
