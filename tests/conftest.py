"""Without a GPU, Triton runs in its interpreter; that must be decided before triton is imported."""

import gc
import os
import sys
from collections import Counter

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from tests.interpreter import quicken_interpreter

if "TRITON_INTERPRET" in os.environ:
    quicken_interpreter()

LONG = ("test_fuzz.py", "test_instruction_sets.py", "test_packaging.py", "test_distributed.py")
MODULES = 300  # imported since the objects of the modules were last taken out of garbage collections

known_modules = 0


def pytest_addoption(parser):
    parser.addoption(
        "--configurations",
        type=int,
        help="how many random configurations tests/test_fuzz.py draws for each backend",
    )


def pytest_collection_modifyitems(items):
    """What takes longest in one test comes first, so that no process of a run has it left when the others are done."""
    items.sort(key=lambda item: item.path.name not in LONG)  # stable: otherwise as they were


def pytest_collection_finish(session):
    freeze_modules()


@pytest.hookimpl(trylast=True)  # without what the file's fixtures made
def pytest_runtest_teardown(item, nextitem):
    """Once a file's tests are done: torch and timm import much of themselves at first use."""
    if nextitem is None or item.path != nextitem.path:
        freeze_modules()


def freeze_modules():
    """Take the objects of all modules out of garbage collections.

    Every run of the trainer ends with one. It goes through 700,000 objects of the modules that the tests import, for a
    third of a second, and finds none of them.
    """
    global known_modules
    if len(sys.modules) >= known_modules + MODULES:
        gc.collect()  # what is garbage by now must not stay
        gc.freeze()
        known_modules = len(sys.modules)


def pytest_runtest_setup(item):
    """A test says which backend or instruction set it is of by a parameter of that name."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    item.user_properties += [(name, parameters[name]) for name in ("backend", "isa") if parameters.get(name)]


def pytest_terminal_summary(terminalreporter):
    """What ran, and what did not: a suite that is green because it left something out says so here."""
    from mimkernels.ops import _native
    from mimkernels.ops._registry import TRITON_INTERPRETED

    ran = Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            ran.update(tuple(entry) for entry in report.user_properties if report.when == "call")
    backends = [f"{name} {count}" for (kind, name), count in sorted(ran.items()) if kind == "backend"]
    sets = sorted(name for kind, name in ran if kind == "isa")
    native = _native.library("cpu").isa
    terminalreporter.section("what ran")
    line = terminalreporter.write_line
    line(f"instruction sets: {', '.join([f'{native} (this process)', *(name for name in sets if name != native)])}")
    line(f"backends, in tests: {', '.join(backends) or 'none'}{' (triton interpreted)' if TRITON_INTERPRETED else ''}")
    skipped = Counter(reason(report) for report in terminalreporter.stats.get("skipped", []))
    line(f"skipped: {sum(skipped.values()) or 'nothing'}")
    for why, count in sorted(skipped.items()):
        line(f"  {count} x {why}")


def reason(report) -> str:
    """Why a test was skipped."""
    return report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else str(report.longrepr)


@pytest.fixture
def poisoned():
    """Fresh tensors hold NaN (or the largest integer), so that an element nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def device() -> str:
    """The device that every op's kernels are tested on: the GPU if there is one."""
    from mimkernels.testing import DEVICE

    return DEVICE


@pytest.fixture
def fused_at_any_size(monkeypatch):
    """timm's blocks are fused however few numbers a test gives them."""
    pytest.importorskip("timm")
    from mimkernels.nn import block

    monkeypatch.setattr(block, "SMALL", 0)
