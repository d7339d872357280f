"""Run the installed package under whatever torch is installed: every op and gradient of the CPU library.

Not a pytest module: it runs where neither pytest nor timm is, from outside the source tree, to show that one built
library serves several versions of torch (`.ci/run` builds under one and calls this under another).
"""

import sys
from pathlib import Path

import torch

import mimkernels
from mimkernels import testing
from mimkernels.ops import _native

sys.path.append(str(Path(__file__).resolve().parent.parent))  # behind the installed package
from tests.cases import cases


def check_libraries() -> None:
    package, source = Path(mimkernels.__file__).resolve().parent, Path(__file__).resolve().parent.parent / "mimkernels"
    assert package != source, f"{package} is the source tree, not the installed package"
    cpu, cuda = _native.library("cpu"), _native.library("cuda")
    assert cpu.loaded, f"the CPU library did not load: {cpu.reason}"
    assert cpu.build["torch"], "build.json does not say which torch the library was built with"
    print(f"cpu library: {cpu.isa}, built with torch {cpu.build['torch']}, running under {torch.__version__}")
    if cuda.path.exists() and torch.version.cuda is None:
        assert not cuda.loaded
        assert "built without CUDA" in cuda.reason, cuda.reason
        assert cuda.remedy
        print(f"cuda library: refused, {cuda.reason}")


def check_refusals() -> None:
    x, ids = torch.zeros(2, 4, 8), torch.full((2, 3), 4)
    try:
        mimkernels.gather_tokens(x, ids, backend="cpu")
    except IndexError as error:
        assert "4" in str(error), error
    else:
        raise AssertionError("an id out of range was taken")


def main() -> int:
    check_libraries()
    check_refusals()
    with_kernels = [case for case in cases() if "cpu" in testing.backends(case.op)]
    for case in with_kernels:
        for dtype in case.dtypes:
            testing.check(case, "cpu", dtype)
    ops = {case.op for case in with_kernels}
    print(f"torch {torch.__version__}: {len(with_kernels)} cases of {len(ops)} ops passed, with gradients")
    return 0


if __name__ == "__main__":
    sys.exit(main())
