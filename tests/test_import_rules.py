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


def test_only_the_bindings_include_torch():
    for folder in sorted(path.name for path in CSRC.iterdir() if path.is_dir() and path.name != "torch"):
        for file, name in includes(folder):
            assert not re.match(r"(torch|ATen|c10|caffe2)/|.*/torch/", name), f"{file} includes {name}"


def test_the_bindings_use_only_the_stable_abi():
    for file, name in includes("torch"):
        if re.match(r"(torch|ATen|c10|caffe2)/", name):
            stable = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
            assert name.startswith(stable), f"{file} includes {name}"


def test_shared_and_cpu_sources_need_no_cuda():
    for folder in ("core", "cpu"):
        for file, name in includes(folder):
            assert not name.startswith("cuda"), f"{file} includes {name}"


COMPANIONS = ("attention_rows", "head_divergence", "received_attention")  # of attention: they share its scores
OP_FOLDERS = sorted(folder.name for folder in (PACKAGE / "ops").iterdir() if (folder / "api.py").exists())


def ops_imported(file: Path) -> set[str]:
    """Folders of ops that a file of ``mimkernels/ops`` imports, anywhere and in any form."""
    package = ["mimkernels", *file.relative_to(PACKAGE).parts[:-1]]
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*origin, *filter(None, [node.module])])
            names += [f"{module}.{alias.name}" for alias in node.names]
    parts = [name.split(".") for name in names]
    return {part[2] for part in parts if part[:2] == ["mimkernels", "ops"] and part[2:3] and part[2] in OP_FOLDERS}


@pytest.mark.parametrize("op", OP_FOLDERS)
def test_the_folder_of_an_op_imports_no_other_op(op):
    """Attention's companions excepted; what several ops share is in ``mimkernels/ops/_*.py``."""
    allowed = {op, "attention"} if op in COMPANIONS else {op}
    for file in python_files(f"ops/{op}"):
        others = ops_imported(file) - allowed
        assert not others, f"{file} imports {sorted(others)}"


def test_what_ops_share_imports_no_op():
    for file in sorted((PACKAGE / "ops").glob("_[a-z]*.py")):
        assert not ops_imported(file), f"{file} imports {sorted(ops_imported(file))}"


def test_imports_of_other_ops_are_seen_in_every_form():
    probe = PACKAGE / "ops" / "gather_tokens" / "probe.py"

    class Text(type(probe)):
        def read_text(self, *args, **kwargs):
            return (
                "from mimkernels.ops import bias_gelu, _checks\nfrom ..query_pool.api import query_pool\n"
                "def f():\n    import mimkernels.ops.random_mask.spec\nfrom .. import reduce_pool\nfrom . import api\n"
            )

    seen = {"bias_gelu", "query_pool", "random_mask", "reduce_pool", "gather_tokens"}
    assert ops_imported(Text(probe)) == seen
