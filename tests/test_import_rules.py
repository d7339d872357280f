"""Who may import whom, and what `import mimkernels` may not pull in."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mimkernels

PACKAGE = Path(mimkernels.__file__).parent
CSRC = PACKAGE.parent / "csrc"
ALLOWED = {
    "ops": {"ops"},
    "nn": {"nn", "ops"},
    "stats": {"stats", "ops"},
    "models": {"models", "nn", "ops"},
    "train": {"train", "models", "stats", "nn", "ops"},
    "integrations": {"integrations", "models", "nn", "stats", "ops"},
}
HEAVY = ("triton", "timm", "torchvision", "transformers", "matplotlib", "xformers", "accelerate", "sklearn", "PIL")


def imported_parts(file: Path) -> set[str]:
    """Sub-packages of mimkernels that a file imports anywhere; "" is mimkernels itself."""
    package = ["mimkernels", *file.relative_to(PACKAGE).parts[:-1]]
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*origin, *(node.module or "").split(".")]).strip(".")
            # `from mimkernels import ops` imports ops; `from mimkernels import MAE` imports the package's face.
            names += [f"{module}.{alias.name}" if module == "mimkernels" else module for alias in node.names]
    ours = {name for name in names if name.partition(".")[0] == "mimkernels"}
    parts = {name.partition(".")[2].partition(".")[0] for name in ours}
    return {part if (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").exists() else "" for part in parts}


def python_files(part: str) -> list[Path]:
    return sorted((PACKAGE / part).rglob("*.py"))


@pytest.mark.parametrize("part", [part for part in ALLOWED if (PACKAGE / part).exists()])
def test_sub_packages_import_only_what_is_below_them(part):
    # The face of the package is what `ops` and `nn` export: those above them may use it, they themselves may not.
    allowed = ALLOWED[part] | {"_version"} | (set() if part == "ops" else {""})
    for file in python_files(part):
        beyond = imported_parts(file) - allowed
        assert not beyond, f"{file} imports {sorted(beyond)}; {part} may import {sorted(ALLOWED[part])}"


def test_nobody_imports_the_integrations():
    for file in python_files(""):
        if file.relative_to(PACKAGE).parts[0] != "integrations":
            assert "integrations" not in imported_parts(file), file


def test_the_rules_see_every_form_of_import():
    probe = PACKAGE / "ops" / "gather_tokens" / "probe.py"

    class Text(type(probe)):
        def read_text(self, *args, **kwargs):
            return "from ...nn import a\nfrom mimkernels import stats, MAE\nimport mimkernels.commands.pretrain.loop\n"

    assert imported_parts(Text(probe)) == {"nn", "stats", "", "train"}


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(' '.join({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("statement", ["import mimkernels", "import mimkernels.ops, mimkernels.info, mimkernels.cli"])
def test_importing_stays_light(statement):
    # torch itself may import some of these: what counts is what comes on top of it.
    pulled_in = (modules_after(statement) - modules_after("import torch")) & set(HEAVY)
    assert not pulled_in, f"{statement!r} imports {sorted(pulled_in)}"


def includes(folder: str) -> list[tuple[Path, str]]:
    files = [file for file in sorted((CSRC / folder).rglob("*")) if file.is_file()]
    found = [(file, re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', file.read_text(), re.M)) for file in files]
    return [(file, name) for file, names in found for name in names]


def binds(file: Path) -> bool:
    """Whether a file of csrc is one of the bindings: csrc/torch and csrc/ops/<op>/bind*."""
    folder, *_ = file.relative_to(CSRC).parts
    return folder == "torch" or (folder == "ops" and file.name.startswith("bind"))


def is_torch(name: str) -> bool:
    """Whether an include is a header of torch: csrc has a folder of that name, too."""
    return bool(re.match(r"(torch|ATen|c10|caffe2)/", name)) and not (CSRC / name).exists()


def test_only_the_bindings_include_torch():
    for file, name in includes("."):
        if not binds(file):
            assert not is_torch(name) and not name.startswith("torch/"), f"{file} includes {name}"


def test_the_bindings_use_only_the_stable_abi():
    stable = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
    for file, name in includes("."):
        assert not is_torch(name) or name.startswith(stable), f"{file} includes {name}"


def test_shared_and_cpu_sources_need_no_cuda():
    for folder in ("core", "cpu"):
        for file, name in includes(folder):
            assert not name.startswith("cuda"), f"{file} includes {name}"
    for file, name in includes("ops"):
        if file.name.startswith("cpu") or file.name in ("params.h", "bind.h", "bind_cpu.cpp"):
            assert "cuda" not in name, f"{file} includes {name}"
