"""A capture sees what its own thread and asyncio task run, and nothing else."""

import asyncio
import contextvars
import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mimkernels
from mimkernels.nn.sdpa import observers, observing
from tests.integrations import models as m

GIVEN = {"num_prefix": 1, "positions": (4, 4)}


def in_another_thread(function, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result(timeout=60)


def accelerated_vit():
    model = m.vit()
    mimkernels.accelerate(model)
    return model


@pytest.mark.parametrize("make", [m.vit, accelerated_vit])
@pytest.mark.parametrize("same", [True, False], ids=["same model", "another model"])
def test_other_threads_are_not_seen(make, same):
    model = make()
    other = model if same else copy.deepcopy(model)
    with torch.no_grad(), mimkernels.capture(model, ["entropy"]) as heads:
        in_another_thread(other, m.images())
        assert len(heads) == 0
        model(m.images())
        in_another_thread(other, m.images())
    assert list(heads) == ["blocks.0.attn", "blocks.1.attn"] and heads.statistics.images == {0: 2, 1: 2}


def test_a_thread_that_runs_the_model_at_the_same_time_changes_nothing():
    """Both are inside the same modules: the other thread enters and leaves them while this one waits in the first."""
    model = accelerated_vit()
    with torch.no_grad(), mimkernels.capture(model, ["entropy"]) as alone:
        model(m.images())
    busy = []

    def wait_for_the_other(module, args):
        if threading.current_thread() is threading.main_thread():
            busy.append(in_another_thread(model, m.images(batch=3)))

    model.blocks[0].attn.qkv.register_forward_pre_hook(wait_for_the_other)
    with torch.no_grad(), mimkernels.capture(model, ["entropy"]) as heads:
        model(m.images())
    assert len(busy) == 1 and list(heads) == list(alone)
    for name, layer in alone.items():
        assert torch.equal(heads[name].stats["entropy"], layer.stats["entropy"])


def test_observers_are_those_of_the_thread():
    with observing(m.Seen()), observing(m.Seen()):
        assert len(observers()) == 2
        assert in_another_thread(observers) == ()
        # A copied context takes nobody along: what it runs would be mixed up with what runs here.
        assert in_another_thread(contextvars.copy_context().run, observers) == ()
        assert contextvars.copy_context().run(observers) == observers()
    assert observers() == ()


@pytest.mark.parametrize("first_to_leave", [0, 1])
def test_threads_that_capture_one_model_leave_it_as_it_was(first_to_leave):
    """The plain branch, torch's own fast path and compilation are back when the last has left, in whichever order."""
    model = m.vit()
    for block in model.blocks:
        block.attn.fused_attn = False
    with torch.no_grad(), mimkernels.capture(model, ["entropy"]) as alone:
        model(m.images())
    inside = [threading.Event() for _ in range(2)]
    leave = [threading.Event() for _ in range(2)]
    found = [None, None]

    def work(number):
        torch.set_num_threads(1)
        with torch.no_grad(), mimkernels.capture(model, ["entropy"]) as found[number]:
            inside[number].set()
            assert leave[number].wait(60)
            model(m.images())

    with ThreadPoolExecutor(2) as pool:
        done = []
        for number in range(2):
            done.append(pool.submit(work, number))
            assert inside[number].wait(60)
        for number in (first_to_leave, 1 - first_to_leave):
            leave[number].set()
            done[number].result(timeout=60)
    for heads in found:
        for name, layer in alone.items():
            assert torch.equal(heads[name].stats["entropy"], layer.stats["entropy"])
    assert all(block.attn.fused_attn is False for block in model.blocks)
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch._dynamo.eval_frame._stance.stance == "default"
    assert not nn.modules.module._global_forward_hooks and not nn.modules.module._global_forward_pre_hooks


@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["fused", "computed as it is"])
def test_captures_in_two_threads_count_their_own_calls(dropout):
    model = m.hand_written(dropout=dropout).train()
    barrier = threading.Barrier(2)

    def work(batch):
        with torch.no_grad(), mimkernels.capture(model, ["entropy"], num_prefix=1) as heads:
            for _ in range(20):
                barrier.wait(60)
                model(m.tokens(batch=batch))
        return heads

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, (2, 3)))
    for heads, batch in zip(found, (2, 3), strict=True):
        assert heads.statistics.images == {0: 20 * batch, 1: 20 * batch}
        assert list(heads) == ["blocks.0", "blocks.1"]


def test_asyncio_tasks_see_their_own_calls():
    model = m.hand_written()

    async def work(batch, first):
        with mimkernels.capture(model, ["entropy"], num_prefix=1) as heads:
            for number in range(3):
                await asyncio.sleep(0.02 if (number == 0) == first else 0.0)
                model(m.tokens(batch=batch))
        return heads

    async def unseen():
        for _ in range(6):
            await asyncio.sleep(0.0)
            model(m.tokens(batch=7))

    async def everything():
        return await asyncio.gather(work(2, True), unseen(), work(3, False))

    found = asyncio.run(everything())
    assert [heads.statistics.images for heads in found[::2]] == [{0: 6, 1: 6}, {0: 9, 1: 9}]
    assert observers() == () and torch.overrides._get_current_function_mode() is None


def test_a_task_that_is_started_inside_is_seen():
    model = m.hand_written()

    async def step(batch):
        await asyncio.sleep(0.0)
        model(m.tokens(batch=batch))

    async def work():
        with mimkernels.capture(model, ["entropy"], num_prefix=1) as heads:
            await asyncio.gather(step(2), step(3))
        return heads

    assert asyncio.run(work()).statistics.images == {0: 5, 1: 5}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward after"])
def test_backward_passes_of_other_threads_recompute_without_being_seen(reentrant, inside):
    """As autograd's own threads do, which run the backward passes of GPUs."""
    model = m.hand_written().train()

    def run(x):
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return x.square().sum()

    plain = m.tokens().requires_grad_()
    run(plain).backward()
    x = m.tokens().requires_grad_()
    with mimkernels.capture(model, ["entropy"], num_prefix=1) as heads:
        loss = run(x)
        if inside:
            in_another_thread(loss.backward)
    if not inside:
        in_another_thread(loss.backward)
    torch.testing.assert_close(x.grad, plain.grad, rtol=1e-4, atol=1e-4)
    assert list(heads) == ["blocks.0", "blocks.1"] and heads.statistics.images == {0: 2, 1: 2}


def test_captures_inside_each_other_are_counted_once_whoever_leaves_first():
    model = m.hand_written(dropout=0.4).train()
    outer, inner = (mimkernels.capture(model, ["entropy"], num_prefix=1) for _ in range(2))
    with torch.no_grad():
        first = outer.__enter__()
        second = inner.__enter__()
        model(m.tokens())
        outer.__exit__(None, None, None)
        model(m.tokens())
        inner.__exit__(None, None, None)
        model(m.tokens())
    assert first.statistics.images == {0: 2, 1: 2} and second.statistics.images == {0: 4, 1: 4}
    assert torch.overrides._get_current_function_mode() is None
