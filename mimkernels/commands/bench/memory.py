"""Peak memory of a call."""

from __future__ import annotations

from collections.abc import Callable

import torch


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """The most bytes of torch's allocator that `run` holds at once, beyond those held before.

    Call `run` once before: what only its first call allocates does not count.
    """
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
        del result
    # The raw record: the profiler's own tables add allocations up over an op, and miss what it released again.
    record = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(record, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
