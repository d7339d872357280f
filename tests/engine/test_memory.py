"""Freed memory that stays in the process: page faults tell."""

import os
import platform
import subprocess
import sys

import pytest

import mimkernels
from mimkernels.engine import memory

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")

# Page faults of tensors that come and go, once they lie where they will; then what `freed_memory` says. The tensors are
# larger than 32 MiB: smaller ones glibc keeps by itself, more or less, as it has seen their like go.
FAULTS = """
import resource, sys, torch, mimkernels
from mimkernels.engine.memory import freed_memory
if "keep" in sys.argv:
    assert mimkernels.keep_freed_memory() is True
def pass_by():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(6):
        parts = [torch.ones(10 * 2**20) for _ in range(2)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
pass_by()
print(min(pass_by() for _ in range(4)), *freed_memory())
"""
ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "1000000000000",
    "MALLOC_TOP_PAD_": "67108864",
}


def faults(*arguments, **environment):
    command = [sys.executable, "-c", FAULTS, *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    count, state, detail = done.stdout.split(maxsplit=2)
    return int(count), state, detail


@needs_glibc
def test_no_page_is_faulted_in_twice():
    usual, state, detail = faults()
    assert state == "returned" and "mimkernels.keep_freed_memory()" in detail
    kept, state, detail = faults("keep")
    assert state == "kept" and "keep_freed_memory" in detail
    by_environment, state, detail = faults(**ENVIRONMENT)
    assert state == "kept" and "environment" in detail
    assert usual > 240  # 12 tensors of 40 MiB; at least 20 each with huge pages
    assert kept < usual / 10 and by_environment < usual / 10


def test_the_documented_environment_is_this_one():
    for name, value in ENVIRONMENT.items():
        assert f"{name}={value} " in memory.keep_freed_memory.__doc__


@pytest.mark.parametrize("library", ["libjemalloc.so.2", "/usr/lib/libtcmalloc_minimal.so.4"])
def test_a_preloaded_allocator_is_not_concerned(monkeypatch, library):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setenv("LD_PRELOAD", library)
    assert memory.keep_freed_memory() is False
    state, detail = memory.freed_memory()
    assert state == "unknown" and "is preloaded" in detail


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert mimkernels.keep_freed_memory() is False
    assert memory.freed_memory()[0] == "unknown"
