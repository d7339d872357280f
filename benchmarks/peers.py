"""Runs tests of torch, timm, transformers on mimkernels: ``python -m benchmarks peers --opinfo --timm DIR``.

Every test runs twice, without us and with us; what passes without and fails with us is printed, and the exit status is
1 if there is any. DIR is the ``tests`` folder of a checkout of the installed version: wheels do not hold it; torch's
samples need ``pip install expecttest``. Not part of continuous integration: what the peers test changes with their
versions, and a run takes from minutes to an hour.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import torch

from mimkernels import testing

ROOT = Path(__file__).resolve().parent.parent
TIMM = ("test_models.py", "test_layers.py", "test_layers_pool.py")
TRANSFORMERS = ("vit", "vit_mae", "deit", "dinov2", "dinov2_with_registers", "beit", "dinov3_vit", "ijepa", "swin")

# rtol and atol of torch.testing
TOLERANCES = {torch.float32: (1.3e-6, 1e-5), torch.bfloat16: (1.6e-2, 1e-5), torch.float16: (1e-3, 1e-5)}

# Loaded by pytest before the tests (-p): what they make goes through our doors.
DOORS = {
    "timm": """
import mimkernels, timm, timm.models

def through_the_door(create):
    def create_model(*args, **kwargs):
        model = create(*args, **kwargs)
        mimkernels.accelerate(model)
        return model
    return create_model

timm.create_model = timm.models.create_model = through_the_door(timm.create_model)
""",
    "transformers": """
import mimkernels.integrations.transformers
from transformers import PreTrainedModel

before = PreTrainedModel.__init__

def with_our_attention(self, config, *args, **kwargs):
    before(self, config, *args, **kwargs)
    if self.config._attn_implementation == "sdpa":
        self.set_attn_implementation("mimkernels")

PreTrainedModel.__init__ = with_our_attention
""",
}


def outcomes(peer: str, tests: list[Path], selected: str, with_us: bool) -> dict[str, str]:
    """The outcome of every test, by its name."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "doors.py").write_text(DOORS[peer] if with_us else "")
        path = os.pathsep.join([folder, str(ROOT), str(tests[0].parents[1])])
        command = [sys.executable, "-m", "pytest", "-q", "-p", "doors", f"--junitxml={folder}/report.xml"]
        command += [*(["-k", selected] if selected else []), *map(str, tests)]
        done = subprocess.run(
            command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
        )
        report = Path(folder) / "report.xml"
        if not report.exists():
            raise RuntimeError(f"pytest wrote no report:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        cases = ElementTree.parse(report).getroot().iter("testcase")
        return {f"{case.get('classname')}::{case.get('name')}": _outcome(case) for case in cases}


def _outcome(case: ElementTree.Element) -> str:
    for child in case:
        if child.tag in ("failure", "error"):
            return (child.get("message") or child.tag).splitlines()[0][:200]
        if child.tag == "skipped":
            return "skipped"
    return "passed"


def files(peer: str, folder: Path) -> list[Path]:
    """The peer's test files that make Vision Transformers."""
    names = TIMM if peer == "timm" else [f"models/{name}/test_modeling_{name}.py" for name in TRANSFORMERS]
    present = [folder / name for name in names if (folder / name).exists()]
    if not present:
        raise FileNotFoundError(f"{folder} holds none of {', '.join(names)}: it is not the tests folder of {peer}")
    return present


def lost_tests(peer: str, folder: Path, selected: str) -> list[str]:
    """Tests that pass without us and not with us."""
    tests = files(peer, folder.resolve())
    without, ours = (outcomes(peer, tests, selected, with_us) for with_us in (False, True))
    passed = [name for name, outcome in without.items() if outcome == "passed"]
    print(f"{peer}: {len(without)} tests, {len(passed)} pass without us")
    return [f"{name}: {ours.get(name, 'did not run')}" for name in passed if ours.get(name) != "passed"]


def samples() -> Iterator[tuple[str, torch.dtype, bool, object]]:
    """What torch's operator tests call ``scaled_dot_product_attention`` with, with and without gradients."""
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = (info for info in op_db if info.name == "nn.functional.scaled_dot_product_attention")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for grad in (False, True):
            for number, sample in enumerate(info.sample_inputs("cpu", dtype, requires_grad=grad)):
                yield f"sample {number}", dtype, grad, sample


def lost_samples() -> list[str]:
    """Samples on which ours alone raises, or is further from fp64 than torch.testing and our rule allow."""
    from mimkernels.nn.sdpa.stand_in import stand_in

    lost, count, torchs = [], 0, torch.nn.functional.scaled_dot_product_attention
    for name, dtype, grad, sample in samples():
        if sample.kwargs.get("dropout_p"):
            continue  # no two implementations draw the same
        try:
            plain = _computed(torchs, sample, grad, dtype)
        except Exception:
            continue
        count += 1
        exact = _computed(torchs, sample, grad, torch.float64)
        try:
            ours = _computed(stand_in(), sample, grad, dtype)
            for what, a, b, c in zip(("output", "dq", "dk", "dv"), ours, plain, exact, strict=False):
                if torch.allclose(a.double(), c, *TOLERANCES[dtype], equal_nan=True):
                    continue
                error = (b.double() - c).abs()
                testing.assert_as_good_as_plain(what, a, error[error.isfinite()].max().item() if c.numel() else 0.0, c)
        except Exception as error:
            reason = str(error).splitlines()[0]
            lost.append(f"scaled_dot_product_attention, {name}, {dtype}, gradients {grad}: {reason}")
    print(f"opinfo: {count} samples")
    return lost


def _computed(function, sample, grad: bool, dtype: torch.dtype) -> list[torch.Tensor]:
    """The output on one sample, and the gradients of its sum to query, key and value."""
    given = [sample.input, *sample.args]
    leaves = [tensor.detach().to(dtype).requires_grad_(grad) for tensor in given]
    options = {k: v.to(dtype) if _is_float(v) else v for k, v in sample.kwargs.items()}
    out = function(*leaves, **options)
    return [out.detach(), *(torch.autograd.grad(out.sum(), leaves) if grad and out.numel() else [])]


def _is_float(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--opinfo", action="store_true", help="torch's samples of scaled_dot_product_attention")
    parser.add_argument("--timm", type=Path, metavar="DIR", help="folder tests of a checkout of timm")
    parser.add_argument("--transformers", type=Path, metavar="DIR", help="folder tests of a checkout of transformers")
    parser.add_argument("-k", default="", dest="selected", help="some of the peers' tests, as pytest takes it")
    asked = parser.parse_args()
    if not (asked.opinfo or asked.timm or asked.transformers):
        parser.error("give at least one of --opinfo, --timm and --transformers")
    lost = lost_samples() if asked.opinfo else []
    for peer, folder in (("timm", asked.timm), ("transformers", asked.transformers)):
        lost += lost_tests(peer, folder, asked.selected) if folder is not None else []
    print("\n".join([*lost, f"{len(lost)} pass without us and fail with us"]))
    return len(lost) > 0
